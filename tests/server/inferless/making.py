"""Apps for tests: folders with an `app.py` of a few lines, and workers that end with the test."""

import json
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server.inferless.apps import Apps, AppsOptions
from server.inferless.run import AppRun
from server.inferless.worker import AppLimits, AppState, AppWorker
from tests.server.api.raw_http import until

TEXT = """
INPUT_SCHEMA = {"TEXT": {"datatype": "STRING", "required": True, "shape": [1], "example": ["hi"]}}
"""
STREAMING_TEXT = TEXT + "IS_STREAMING_OUTPUT = True\n"

ECHO = """
    class InferlessPythonModel:
        def initialize(self):
            pass

        def infer(self, inputs, stream_output_handler):
            for word in inputs["TEXT"].split():
                stream_output_handler.send_streamed_output({"OUT": word})
            stream_output_handler.finalise_streamed_output()
"""


def make_app(root: Path, app: str, schema: str | None = STREAMING_TEXT, name: str = "toy") -> Path:
    """A folder with these files."""
    folder = root / name
    folder.mkdir()
    (folder / "app.py").write_text(textwrap.dedent(app))
    if schema is not None:
        (folder / "input_schema.py").write_text(textwrap.dedent(schema))
    return folder


def quick(**changes: Any) -> AppLimits:
    """Limits under which a failed process is replaced almost at once."""
    return AppLimits(**{"first_pause_s": 0.01, "longest_pause_s": 0.05, "finalize_s": 1.0, **changes})


@asynccontextmanager
async def running(*folders: Path, wait: bool = True, **options: Any) -> AsyncIterator[Apps]:
    """Apps that have been started."""
    apps = Apps(folders, AppsOptions(**{"limits": quick(), **options}))
    apps.start()
    try:
        if wait:
            await until(lambda: apps.are_ready)
        yield apps
    finally:
        await apps.close()


@asynccontextmanager
async def worker_of(folder: Path, **options: Any) -> AsyncIterator[AppWorker]:
    async with running(folder, **options) as apps:
        (worker,) = apps
        yield worker


async def ask(worker: AppWorker, **inputs: object) -> list[dict[str, object]]:
    """Everything that an app answers to one request."""
    return await all_of(submit(worker, **inputs))


def submit(worker: AppWorker, **inputs: object) -> AppRun:
    return worker.submit("request", json.dumps(inputs).encode("ascii"))


async def all_of(run: AppRun) -> list[dict[str, object]]:
    return [dict(values) async for values in run]


async def until_ready(worker: AppWorker) -> None:
    await until(lambda: worker.state is AppState.READY)
