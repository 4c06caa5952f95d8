"""KServe's tensors: what requests bring checked against the datatype and shape that they claim, and the
tensors of an answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from server.api.kserve.schema import MAX_RANK, TensorBody
from server.api.shapes import shown
from server.errors import BadRequest
from server.inferless.schema import FAMILIES, INTEGER_RANGES, SPELLINGS, Family

_MOST_ELEMENTS = 1_000_000
_DATATYPES: Mapping[type, str] = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input: its elements in row-major order."""

    name: str
    datatype: str  # KServe's
    shape: tuple[int, ...]
    elements: tuple[object, ...]


def read_tensors(bodies: Sequence[TensorBody]) -> tuple[Tensor, ...]:
    """Raises: BadRequest that names the tensor."""
    names = [body.name for body in bodies]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise BadRequest(f"the input {shown(name)} is there twice", param=f"inputs[{i}].name")
    return tuple(_read(body) for body in bodies)


def check_element(value: object, datatype: str, where: str) -> None:
    """Raises: BadRequest for what is not of the datatype; `where` names it."""
    family = FAMILIES[datatype]
    if family is Family.ANY:
        return
    is_right = {
        Family.TEXT: isinstance(value, str),
        Family.BOOL: isinstance(value, bool),
        Family.INT: isinstance(value, int) and not isinstance(value, bool),
        Family.FLOAT: isinstance(value, int | float) and not isinstance(value, bool),
    }[family]
    if not is_right:
        raise BadRequest(f"{where}: a value is not of the datatype {datatype}", param=where)
    if family is Family.INT and isinstance(value, int):
        low, high = INTEGER_RANGES[datatype]
        if not low <= value <= high:
            raise BadRequest(f"{where}: {datatype} goes from {low} to {high}", param=where)


def nested(elements: Sequence[object], shape: Sequence[int]) -> object:
    """The elements as lists of lists; a shape of () is the one element itself."""
    if not shape:
        return elements[0]
    rows, *rest = shape
    size = prod(rest)
    return [nested(elements[i * size : (i + 1) * size], rest) for i in range(rows)]


def output_tensor(name: str, value: object) -> dict[str, object]:
    """A value or lists of lists as a tensor. Raises: ValueError if the lists are ragged or of mixed types."""
    shape: list[int] = []
    inner = value
    while isinstance(inner, list):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    elements = list(_flat(value, tuple(shape)))
    kinds = {type(element) for element in elements} or {str}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) > 1:
        raise ValueError(f"output {name!r}: a tensor has one type of elements")
    return {
        "name": name,
        "datatype": _DATATYPES[kinds.pop()],
        "shape": shape or [1],
        "data": elements,
    }


def _flat(value: object, shape: tuple[int, ...]) -> Iterator[object]:
    if not shape:
        if isinstance(value, list):
            raise ValueError("the lists of an output are of different depths")
        yield value
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        raise ValueError("the lists of an output are of different lengths")
    for part in value:
        yield from _flat(part, shape[1:])


def _read(body: TensorBody) -> Tensor:
    where = shown(body.name)
    datatype = SPELLINGS.get(body.datatype, body.datatype)
    count = prod(body.shape)
    if prod(max(size, 1) for size in body.shape) > _MOST_ELEMENTS:  # [10**9, 0] is a list of as many lists
        raise BadRequest(f"{where}: more than {_MOST_ELEMENTS} elements", param=where)
    elements = tuple(_elements(body.data, MAX_RANK))
    if len(elements) != count:
        raise BadRequest(
            f"{where}: the shape {list(body.shape)} has {count} elements, and data has {len(elements)}",
            param=where,
        )
    for element in elements:
        check_element(element, datatype, where)
    return Tensor(body.name, datatype, tuple(body.shape), elements)


def _elements(data: list[object], depth: int) -> Iterator[object]:
    """KServe lets data be flat or nested as the shape is."""
    for part in data:
        if isinstance(part, list) and depth > 1:
            yield from _elements(part, depth - 1)
        else:
            yield part
