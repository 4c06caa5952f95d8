"""What an app takes, as its folder declares it. Made in the app's process, used in the server.

Standard library only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum


class Family(StrEnum):
    """The kinds of values that the datatypes stand for."""

    TEXT = "text"
    BOOL = "bool"
    INT = "int"
    FLOAT = "float"
    ANY = "any"  # declared with a type that has no name on the wire


def _integers(prefix: str, *, is_signed: bool) -> dict[str, tuple[int, int]]:
    ranges = {}
    for bits in (8, 16, 32, 64):
        low = -(2 ** (bits - 1)) if is_signed else 0
        ranges[f"{prefix}{bits}"] = (low, low + 2**bits - 1)
    return ranges


INTEGER_RANGES: Mapping[str, tuple[int, int]] = {
    **_integers("INT", is_signed=True),
    **_integers("UINT", is_signed=False),
}

FAMILIES: Mapping[str, Family] = {
    "BYTES": Family.TEXT,
    "BOOL": Family.BOOL,
    **dict.fromkeys(INTEGER_RANGES, Family.INT),
    **dict.fromkeys(("FP16", "FP32", "FP64", "BF16"), Family.FLOAT),
    "ANY": Family.ANY,
}
"""Every datatype of an app's input. All but ANY are KServe's."""

SPELLINGS: Mapping[str, str] = {"STRING": "BYTES", "BOOLEAN": "BOOL", "INT": "INT64", "FLOAT": "FP64"}
"""How Inferless writes some of them."""


@dataclass(frozen=True, slots=True)
class AppInput:
    """One input. A shape of [1] is a single value, -1 stands for any number."""

    name: str
    datatype: str  # a key of FAMILIES
    shape: tuple[int, ...]
    is_required: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.datatype]

    @property
    def is_single(self) -> bool:
        return self.shape == (1,)


@dataclass(frozen=True, slots=True)
class AppSchema:
    """What an app takes, and how it answers."""

    inputs: tuple[AppInput, ...] = ()
    is_streaming: bool = False
    batch_size: int | None = None  # None: one at a time; else `infer` takes a list of so many at most
    batch_window_s: float = 0.0  # how long a batch waits to become full

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def schema_from_json(value: Mapping[str, object]) -> AppSchema:
    """The reverse of AppSchema.to_json. Raises: TypeError, KeyError for anything else."""
    fields = dict(value)
    inputs = fields.pop("inputs")
    if not isinstance(inputs, list):
        raise TypeError("inputs must be a list")
    return AppSchema(
        inputs=tuple(AppInput(**{**each, "shape": tuple(each["shape"])}) for each in inputs),
        **fields,  # type: ignore[arg-type]
    )
