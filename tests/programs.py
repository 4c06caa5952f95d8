"""`python -m MODULE` inside this process: most of what one of its own does is to import torch once more."""

import contextlib
import io
import runpy
import sys
import warnings

import pytest


def run_module(module: str, *words: str, **variables: str) -> str:
    """What it prints; fails unless it ends well. What it changes for this process is its caller's care."""
    said = io.StringIO()
    status: object = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")  # as in a program; also that the module was imported before
        patch.setattr(sys, "argv", [module, *words])
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    assert status in (0, None), f"{module} {' '.join(words)}: {status}\n{said.getvalue()}"
    return said.getvalue()
