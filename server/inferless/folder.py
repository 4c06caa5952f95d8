"""An Inferless folder, imported as it stands: `app.py` and, in most, `input_schema.py`.

Runs in the app's process. What an app takes is said by `INPUT_SCHEMA` in input_schema.py, or by a pydantic
class that app.py marks with `@inferless.request`; its options by names beside INPUT_SCHEMA, or by a class
marked with `@inferless.config`.
"""

import importlib
import inspect
import runpy
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.inferless.schema import FAMILIES, SPELLINGS, AppInput, AppSchema
from server.inferless.stand_in import Declared, install

MODEL_CLASS = "InferlessPythonModel"

_MAX_BATCH = 1024
_DATATYPE_OF: Mapping[type, str] = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}


class FolderError(Exception):
    """The folder is not an app that can be served; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class LoadedApp:
    """What an import of the folder gave."""

    schema: AppSchema
    model_class: Any
    request_class: Any  # None: `infer` takes a dictionary


def load_app(folder: Path) -> LoadedApp:
    """Import a folder. Raises: FolderError, and whatever the app's own code raises."""
    sys.path.insert(0, str(folder))  # apps import files that lie beside them
    declared = install()
    schema_file = folder / "input_schema.py"
    names = runpy.run_path(str(schema_file), run_name="input_schema") if schema_file.exists() else {}
    app = importlib.import_module("app")
    model_class = getattr(app, MODEL_CLASS, None)
    if model_class is None:
        raise FolderError(f"app.py has no class {MODEL_CLASS}")
    return LoadedApp(_schema(names, declared), model_class, declared.request)


def arguments_for(method: Callable[..., object]) -> tuple[object, ...]:
    """What to call `initialize` or `finalize` with: apps write them with an argument and without."""
    parameters = inspect.signature(method).parameters.values()
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return tuple({} for _ in needed)


def _schema(names: Mapping[str, Any], declared: Declared) -> AppSchema:
    options: dict[str, Any] = {**names, **declared.options}
    if "INPUT_SCHEMA" in names:
        inputs = tuple(_declared_input(name, said) for name, said in names["INPUT_SCHEMA"].items())
    elif declared.request is not None:
        inputs = tuple(_field_input(name, known) for name, known in declared.request.model_fields.items())
    else:
        raise FolderError("there is no INPUT_SCHEMA in input_schema.py and no @inferless.request in app.py")
    is_streaming = bool(options.get("IS_STREAMING_OUTPUT", False))
    batch_size = options.get("BATCH_SIZE")
    if batch_size is not None and not (type(batch_size) is int and 1 <= batch_size <= _MAX_BATCH):
        raise FolderError(f"BATCH_SIZE must be a number from 1 to {_MAX_BATCH}")
    if batch_size is not None and is_streaming:
        raise FolderError("BATCH_SIZE and IS_STREAMING_OUTPUT exclude each other")
    return AppSchema(
        inputs=inputs,
        is_streaming=is_streaming,
        batch_size=batch_size,
        batch_window_s=float(options.get("BATCH_WINDOW", 0)) / 1000,
    )


def _declared_input(name: str, said: Mapping[str, Any]) -> AppInput:
    datatype = str(said.get("datatype", "STRING")).upper()
    datatype = SPELLINGS.get(datatype, datatype)
    if datatype not in FAMILIES:
        raise FolderError(f"INPUT_SCHEMA: {name} has the unknown datatype {said.get('datatype')!r}")
    shape = tuple(said.get("shape", (1,)))
    if not shape or not all(type(size) is int and (size > 0 or size == -1) for size in shape):
        raise FolderError(f"INPUT_SCHEMA: {name} has the shape {list(shape)!r}")
    return AppInput(name, datatype, shape, bool(said.get("required", True)))


def _field_input(name: str, field: Any) -> AppInput:
    """A field of the pydantic class. The class itself fills in defaults and has the last word on values."""
    kind, is_list = _without_list(_without_none(field.annotation))
    datatype = _DATATYPE_OF.get(kind, "ANY")
    return AppInput(name, datatype, (-1,) if is_list or datatype == "ANY" else (1,), field.is_required())


def _without_none(annotation: Any) -> Any:
    """Optional[X] -> X."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    return annotation


def _without_list(annotation: Any) -> tuple[Any, bool]:
    """List[X] -> X, True."""
    if typing.get_origin(annotation) is list:
        return _without_none(typing.get_args(annotation)[0]), True
    return annotation, annotation is list
