"""`adapter_config.json` as PEFT understands it: which modules, which rank, which scale, and what is not
served.

The tensors are the truth about an adapter; the config adds the scale, and must not contradict them. A
setting that would change the arithmetic and is not served is refused by its name, because ignoring it
would answer with another model than the one that was trained. Settings that only mattered while training
are ignored.
"""

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.patterns import MatchBudget, ModulePattern, is_plain
from adapters.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 2 * 1024 * 1024
_MAX_LISTED = 16384  # entries of a list or a pattern table; EVA writes one per module of the model
_MAX_LAYER_PATTERNS = 16  # models have one list of layers, or a few
_MAX_RANK = 1_000_000

_NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    # setting -> values that leave the arithmetic as it is; anything else is refused
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
}
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")
"""The other ones (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, ...) train against changed base weights. PEFT writes
`true` when it has converted such an adapter back to the original base."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A validated config. Modules are named by their path in the model, without PEFT's prefix."""

    rank: int
    alpha: float
    uses_rslora: bool
    targets: (
        tuple[str, ...] | ModulePattern | None
    )  # names or suffixes; a pattern; None: whatever the tensors say
    is_all_linear: bool
    excluded: tuple[str, ...] | ModulePattern
    layers: frozenset[int] | None  # None: all
    layer_patterns: tuple[str, ...]  # names of the list of layers; empty: any
    rank_patterns: tuple[tuple[ModulePattern, int], ...]  # the first that matches counts
    alpha_patterns: tuple[tuple[ModulePattern, float], ...]
    base_model: str | None  # what the author trained on; for messages only

    @classmethod
    def from_folder(cls, folder: Path) -> "LoraSpec":
        """Read and check the folder's adapter_config.json. Raises AdapterInvalid."""
        return cls.parse(_read_config(folder / CONFIG_FILE))

    @classmethod
    def parse(cls, config: Mapping[str, object]) -> "LoraSpec":
        """Raises AdapterInvalid, naming the setting."""
        _refuse_unserved(config)
        budget = MatchBudget()
        targets, is_all_linear = _targets(config, budget)
        layers, layer_patterns = _layers(config, isinstance(config.get("target_modules"), str))
        excluded = _names_or_pattern(config, "exclude_modules", budget)
        return cls(
            rank=_integer("r", config.get("r", 8)),
            alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
            uses_rslora=_boolean("use_rslora", config.get("use_rslora", False)),
            targets=targets,
            is_all_linear=is_all_linear,
            excluded=() if excluded is None else excluded,
            layers=layers,
            layer_patterns=layer_patterns,
            rank_patterns=tuple(
                (ModulePattern(key, budget, is_suffix=True), _integer(f"rank_pattern[{shown(key)}]", value))
                for key, value in _table(config, "rank_pattern").items()
            ),
            alpha_patterns=tuple(
                (ModulePattern(key, budget, is_suffix=True), _number(f"alpha_pattern[{shown(key)}]", value))
                for key, value in _table(config, "alpha_pattern").items()
            ),
            base_model=_base_model(config),
        )

    def rank_of(self, module_path: str) -> int:
        """The rank that the config gives this module."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.matches(module_path)), self.rank)

    def alpha_of(self, module_path: str) -> float:
        return next(
            (alpha for pattern, alpha in self.alpha_patterns if pattern.matches(module_path)), self.alpha
        )

    def scaling(self, module_path: str, rank: int) -> float:
        """Factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha_of(module_path) / (math.sqrt(rank) if self.uses_rslora else rank)

    def matches(self, module_path: str) -> bool:
        """Whether PEFT would put an adapter on this linear module of the model."""
        if isinstance(self.excluded, ModulePattern):
            if self.excluded.matches(module_path):
                return False
        elif _is_named(module_path, self.excluded):
            return False
        if self.is_all_linear or self.targets is None:
            return True
        if isinstance(self.targets, ModulePattern):
            return self.targets.matches(module_path)
        if module_path in self.targets:
            return True  # spelled out in full: PEFT does not ask for the layer then
        return _is_named(module_path, self.targets) and self._is_in_layers(module_path)

    def _is_in_layers(self, module_path: str) -> bool:
        if self.layers is None:
            return True
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in self.layer_patterns]
        for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            match = re.match(expression, module_path)
            if match is not None:
                return int(match["index"]) in self.layers
        return False


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _read_config(path: Path) -> Mapping[str, object]:
    content = read_small_file(path, _MAX_CONFIG_BYTES)
    return parse_object(content, path.name)


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """All of a regular file; a pipe in its place must not make us wait. Raises AdapterInvalid."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterInvalid(f"{path.name} is not a file")
            if status.st_size > max_bytes:
                raise AdapterInvalid(f"{path.name} is larger than {max_bytes} bytes")
            return file.read(max_bytes)
    except FileNotFoundError as error:
        raise AdapterInvalid(f"the adapter has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read") from error


def _refuse_unserved(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        said = "has no peft_type" if kind is None else f"has peft_type {shown(kind)}"
        raise AdapterInvalid(f"{CONFIG_FILE} {said}; only LORA is served")
    for setting, neutral in _NOT_SERVED.items():
        value = config.get(setting)
        if not any(type(value) is type(one) and value == one for one in neutral):
            raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} is not served yet")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None:
        if not isinstance(init, str):
            raise AdapterInvalid(f"init_lora_weights in {CONFIG_FILE} must be a boolean or a string")
        if init.lower() not in _HARMLESS_INITS:
            raise AdapterInvalid(
                f"init_lora_weights={shown(init)} in {CONFIG_FILE} means that the adapter was trained against"
                " changed base weights; convert it when saving (path_initial_model_for_weight_conversion)"
            )


def _targets(
    config: Mapping[str, object], budget: MatchBudget
) -> tuple[tuple[str, ...] | ModulePattern | None, bool]:
    value = config.get("target_modules")
    if isinstance(value, str) and value.lower() == "all-linear":
        return None, True
    targets = _names_or_pattern(config, "target_modules", budget)
    if targets == ():
        raise AdapterInvalid(f"target_modules in {CONFIG_FILE} is empty")
    return targets, False


def _names_or_pattern(
    config: Mapping[str, object], setting: str, budget: MatchBudget
) -> tuple[str, ...] | ModulePattern | None:
    value = config.get(setting)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return ModulePattern(value, budget)
    return _strings(setting, value)


def _layers(config: Mapping[str, object], is_pattern: bool) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    value, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if is_pattern and (value is not None or names is not None):
        raise AdapterInvalid(
            f"layers_to_transform and layers_pattern need target_modules to be a list in {CONFIG_FILE}"
        )
    patterns = (
        () if names is None else (names,) if isinstance(names, str) else _strings("layers_pattern", names)
    )
    patterns = tuple(pattern for pattern in patterns if pattern)
    if len(patterns) > _MAX_LAYER_PATTERNS:
        raise AdapterInvalid(f"layers_pattern in {CONFIG_FILE} has more than {_MAX_LAYER_PATTERNS} names")
    for pattern in patterns:
        if not is_plain(pattern):
            raise AdapterInvalid(f"layers_pattern {shown(pattern)} in {CONFIG_FILE} is not a plain name")
    if value is None:
        if patterns:
            raise AdapterInvalid(f"layers_pattern in {CONFIG_FILE} needs layers_to_transform")
        return None, ()
    indices = value if isinstance(value, list) else [value]
    if len(indices) > _MAX_LISTED or any(type(index) is not int or index < 0 for index in indices):
        raise AdapterInvalid(f"layers_to_transform in {CONFIG_FILE} must be layer numbers")
    return (frozenset(indices) if indices else None), patterns


def _strings(setting: str, value: object) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MAX_LISTED
        or not all(type(item) is str for item in value)
    ):
        raise AdapterInvalid(f"{setting} in {CONFIG_FILE} must be a string or a list of strings")
    return tuple(value)


def _table(config: Mapping[str, object], setting: str) -> Mapping[str, object]:
    value = config.get(setting)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_LISTED:
        raise AdapterInvalid(f"{setting} in {CONFIG_FILE} must be an object")
    return value


def _integer(setting: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterInvalid(
            f"{setting}={shown(value)} in {CONFIG_FILE} must be a whole number from 1 to {_MAX_RANK}"
        )
    return value


def _number(setting: str, value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} must be a number")
    return number


def _boolean(setting: str, value: object) -> bool:
    if value is not None and type(value) is not bool:
        raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} must be true or false")
    return bool(value)


def _base_model(config: Mapping[str, object]) -> str | None:
    value = config.get("base_model_name_or_path")
    return value if type(value) is str else None
