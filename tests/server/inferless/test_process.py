"""The process itself: that it ends when the server does, and what it cannot send."""

import asyncio
import os
from pathlib import Path

import pytest

from server.inferless.apps import Apps, AppsError, reachable
from server.inferless.process import AppFailed, AppProcess
from server.inferless.wire import Infer, Loaded, Output, Ready
from tests.server.api.raw_http import until
from tests.server.inferless.making import ECHO, TEXT, make_app

ENDLESS = """
    import os
    from pathlib import Path

    class InferlessPythonModel:
        def initialize(self):
            Path("pid").write_text(str(os.getpid()))

        def infer(self, inputs, handler):
            while Path("pid").exists():
                handler.send_streamed_output({"OUT": "x"})

        def finalize(self):
            Path("finalized").touch()
"""


async def test_process_ends_by_itself_when_the_server_has_gone(tmp_path: Path) -> None:
    """Also in the middle of a request: its outputs are thrown away until `infer` returns."""
    folder = make_app(tmp_path, ENDLESS, TEXT + "IS_STREAMING_OUTPUT = True")
    process = await AppProcess.start(folder, {}, None)
    assert isinstance(await process.receive(), Loaded)
    assert await process.receive() == Ready()
    process.send(Infer([1], [{"TEXT": ""}]))
    assert await process.receive() == Output(1, {"OUT": "x"})

    process._writer.close()  # as the kernel does for a server that was killed
    (folder / "pid").unlink()
    await until((folder / "finalized").exists)
    async with asyncio.timeout(30):
        await process.stop(grace_s=30)


async def test_end_of_a_process_is_a_failure_for_who_listens(tmp_path: Path) -> None:
    process = await AppProcess.start(make_app(tmp_path, ECHO), {}, None)
    process.kill()
    with pytest.raises(AppFailed, match="ended"):
        await receive_all(process)
    await process.stop(grace_s=0)


async def receive_all(process: AppProcess) -> None:
    while True:
        await process.receive()


async def test_output_file_that_cannot_be_opened_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AppFailed, match="cannot be started"):
        await AppProcess.start(make_app(tmp_path, ECHO), {}, tmp_path / "nowhere" / "toy.log")


async def test_app_speaks_over_its_own_socket_only(tmp_path: Path) -> None:
    """Its standard input is empty: an app that asks for something there is not left waiting."""
    app = """
        import sys

        class InferlessPythonModel:
            def initialize(self):
                assert sys.stdin.read() == ""
    """
    process = await AppProcess.start(make_app(tmp_path, app), {}, None)
    assert isinstance(await process.receive(), Loaded)
    assert await process.receive() == Ready()
    await process.stop(grace_s=0)


def test_folders_must_be_apps_with_names_of_their_own(tmp_path: Path) -> None:
    first = make_app(tmp_path, ECHO)
    (tmp_path / "elsewhere").mkdir()
    second = make_app(tmp_path / "elsewhere", ECHO)
    os.mkdir(tmp_path / "empty")

    with pytest.raises(AppsError, match=r"app\.py"):
        Apps([tmp_path / "empty"])
    with pytest.raises(AppsError, match="toy"):
        Apps([first, second])
    assert [worker.name for worker in Apps([first / ".." / "toy"])] == ["toy"]


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://[::]:80", "http://[::1]:80"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://[fe80::1]:1", "http://[fe80::1]:1"),
    ],
)
def test_apps_reach_their_server_on_this_machine(address: str, reached: str) -> None:
    assert reachable(address) == reached
