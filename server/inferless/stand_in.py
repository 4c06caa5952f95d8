"""The `inferless` module that apps import: the real one with its decorators watched, or one in its place.

Apps in the pydantic style say with decorators which class describes a request and which one their options.
The real package keeps neither where a server could find it, so its decorators are wrapped; where it is not
installed, decorators that do no more than that take its place. Runs in the app's process.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

Decorator = Callable[..., Any]


@dataclass(slots=True)
class Declared:
    """What an app has said about itself with decorators."""

    request: Any = None  # a pydantic class
    options: dict[str, object] = field(default_factory=dict)  # upper case, as in input_schema.py


class Cls:
    """`inferless.Cls`: marks methods for a command-line tool of Inferless, and changes nothing here."""

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu

    @staticmethod
    def load(method: Any) -> Any:
        return method

    @staticmethod
    def infer(method: Any) -> Any:
        return method


def install() -> Declared:
    """Let `import inferless` find a module that tells us; returns where it does."""
    declared = Declared()
    try:
        module = importlib.import_module("inferless")
    except ImportError:
        module = _replacement()
        sys.modules["inferless"] = module
    # An installed version may be older than one of them.
    real_request: Decorator = getattr(module, "request", _unchanged)
    real_config: Decorator = getattr(module, "config", _config)

    def request(cls: Any) -> Any:
        declared.request = cls
        return real_request(cls)

    def config(cls: Any = None) -> Any:
        def note(cls: Any) -> Any:
            declared.options.update(_defaults(cls))
            return real_config(cls)

        return note if cls is None else note(cls)  # with parentheses and without

    module.request = request  # type: ignore[attr-defined]
    module.config = config  # type: ignore[attr-defined]
    return declared


def _replacement() -> ModuleType:
    module = ModuleType("inferless", "Stands in for the inferless package, which is not installed.")
    for name, value in {
        "request": _unchanged,
        "response": _unchanged,
        "config": _config,
        "Cls": Cls,
        "method": _method,
        "local_entry_point": _unchanged,
    }.items():
        setattr(module, name, value)
    return module


def _unchanged(wrapped: Any) -> Any:
    return wrapped


def _method(gpu: str | None = None) -> Decorator:
    return _unchanged


def _config(cls: Any) -> Any:
    """As in the real package, options are environment variables, too: apps read them there."""
    for name, value in _defaults(cls).items():
        os.environ[name] = str(value)
    return cls


def _defaults(cls: Any) -> dict[str, object]:
    """The fields of a pydantic class that have a default, in upper case."""
    fields = {name: known.get_default(call_default_factory=True) for name, known in cls.model_fields.items()}
    return {
        name.upper(): value
        for name, value in fields.items()
        if value is not None and not cls.model_fields[name].is_required()
    }
