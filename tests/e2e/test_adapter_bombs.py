"""Hostile folders against a real server that is streaming to somebody else: a typed 4xx each, and no more.

Asked for by name, as any client may do, and by path, as an operator does, while another client streams one
answer after the other. The limits of the loader itself are held in tests/adapters/test_bombs.py.
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import REPOSITORY, RunningServer, start
from tests.hostile_folders import BOMBS, CONFIG, LINKS, MIB, WEIGHTS, Break
from tests.nursery import Nursery

OURS = REPOSITORY / "server" / "embedded" / "adapters" / "pirate"
MOST_BYTES = 128 * MIB  # of the process, with all that streaming takes
STREAM = {
    "model": "pirate",
    "prompt": "Tell me about Motet.",
    "temperature": 0,
    "max_tokens": 60,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(nursery: Nursery, folder: Path) -> Iterator[RunningServer]:
    running = start("--adapters-dir", str(folder), nursery=nursery)
    yield running
    assert running.stop() == 0, "\n".join(running.lines)


class Neighbour:
    """Streams the same answer again and again, until it is told to stop."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._is_leaving = threading.Event()
        self.expected = streamed(server)
        self.texts: list[str] = []
        self._thread = ThreadPoolExecutor(1)
        self._streaming = self._thread.submit(self._stream)

    def _stream(self) -> None:
        while not self._is_leaving.is_set():
            self.texts.append(streamed(self._server))

    def leave(self) -> None:
        """Raises what went wrong in its streams."""
        self._is_leaving.set()
        self._thread.shutdown()
        self._streaming.result()

    @property
    def is_well(self) -> bool:
        return not self._streaming.done() and set(self.texts) <= {self.expected}


def streamed(server: RunningServer) -> str:
    """The text of one answer, frame by frame."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=STREAM, timeout=60) as answer:
        assert answer.status_code == 200
        frames = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [choice for frame in frames for choice in json.loads(frame)["choices"]]
    return "".join(choice["text"] for choice in choices)


@pytest.fixture(scope="module")
def neighbour(server: RunningServer) -> Iterator[Neighbour]:
    living = Neighbour(server)
    yield living
    living.leave()
    assert living.texts
    assert set(living.texts) == {living.expected}
    server.wait_until_idle()


def by_name(server: RunningServer, name: str) -> httpx.Response:
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def by_path(server: RunningServer, path: Path) -> httpx.Response:
    body = {"lora_name": "enemy", "lora_path": str(path), "load_inplace": True}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)


def assert_refused(answer: httpx.Response) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"]
    assert len(answer.text) < 2000
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text


def memory(server: RunningServer, field: str) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.M)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("what", [*BOMBS, *LINKS])
def test_bomb_costs_its_own_request_a_4xx_and_nobody_else_anything(
    server: RunningServer, folder: Path, neighbour: Neighbour, what: str
) -> None:
    name = re.sub(r"\W", "-", what)
    shutil.copytree(OURS, folder / ".made" / name)
    break_it: Break = (BOMBS | LINKS)[what]
    break_it(folder / ".made" / name)
    (folder / ".made" / name).rename(folder / name)
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    before = memory(server, "VmRSS")

    assert_refused(by_name(server, name))
    assert_refused(by_path(server, folder / name))

    assert neighbour.is_well
    assert memory(server, "VmHWM") - before < MOST_BYTES
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert "enemy" not in [card["id"] for card in listed]
    shutil.rmtree(folder / name)


def test_folder_that_links_out_of_its_root_is_refused(server: RunningServer, folder: Path) -> None:
    (folder / "outside").symlink_to(OURS, target_is_directory=True)

    assert_refused(by_name(server, "outside"))
    assert_refused(by_path(server, folder / "outside"))


def test_files_that_change_while_they_are_read_are_served_or_put_off(
    server: RunningServer, folder: Path, neighbour: Neighbour
) -> None:
    """Cut, grown and made whole again all the time; at the end, when they rest, they are served."""
    shutil.copytree(OURS, folder / "restless")
    files = {folder / "restless" / name: (OURS / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    rest = threading.Event()

    def meddle() -> None:
        while not rest.is_set():
            for path, content in files.items():
                os.truncate(path, len(content) // 3)
                os.truncate(path, 2 * len(content))
                path.write_bytes(content)

    with ThreadPoolExecutor(1) as pool:
        meddling = pool.submit(meddle)
        try:
            answers = [by_path(server, folder / "restless") for _ in range(20)]
        finally:
            rest.set()
    meddling.result()

    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"]
        elif answer.status_code != 200:
            assert_refused(answer)
    assert neighbour.is_well
    assert by_path(server, folder / "restless").status_code == 200
    body = {key: value for key, value in STREAM.items() if key != "stream"} | {"model": "enemy"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == neighbour.expected
