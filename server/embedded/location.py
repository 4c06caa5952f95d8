"""Where the built-in model and its adapters lie; standard library only."""

from pathlib import Path

NAME = "motet-embedded"
"""The name under which the built-in model is served."""


def model_dir() -> Path:
    """The folder of the built-in model, as transformers' `from_pretrained` takes it."""
    return Path(__file__).parent / "model"


def adapters_dir() -> Path:
    """The folder whose sub-folders are the built-in adapters: what `--adapters-dir` takes."""
    return Path(__file__).parent / "adapters"
