"""A real server whose adapter changes under its name while somebody streams from it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.e2e.running import REPOSITORY, RunningServer

OURS = REPOSITORY / "server" / "embedded" / "adapters"
LIMIT_S = 60
LONG_TOKENS = 2500  # of two answers at once: they take longer than a swap
Launch = Callable[..., RunningServer]


def wish(model: str, max_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "What is Motet?"}]
    return {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }


def answer(server: RunningServer, model: str, max_tokens: int) -> str:
    body = wish(model, max_tokens)
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=LIMIT_S)
    response.raise_for_status()
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def revision(server: RunningServer, name: str) -> str | None:
    """None: it is not listed."""
    cards = httpx.get(f"{server.url}/v1/models", timeout=LIMIT_S).json()["data"]
    return next((card["revision"] for card in cards if card["id"] == name), None)


def becomes(is_so: Callable[[], bool]) -> bool:
    limit = time.monotonic() + LIMIT_S
    while not is_so():
        if time.monotonic() > limit:
            return False
    return True


def replace(folder: Path, name: str) -> None:
    """By renaming, as a careful deployment does."""
    made = folder.parent.parent / f"made-{name}"
    shutil.copytree(OURS / name, made)
    if folder.exists():
        folder.rename(folder.parent.parent / f"before-{name}")
    made.rename(folder)


def pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text of a stream."""
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                yield choice["delta"].get("content") or ""


def test_a_stream_ends_on_the_revision_that_it_began_with(launch: Launch, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    replace(adapters / "voice", "pirate")
    server = launch("--adapters-dir", str(adapters))
    german = answer(server, "german", 30)
    before = revision(server, "voice")
    assert before == revision(server, "pirate"), "equal bytes are one revision"

    body = {**wish("voice", LONG_TOKENS), "stream": True}
    with (
        ThreadPoolExecutor(1) as beside,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=LIMIT_S) as response,
    ):
        text = pieces(response.iter_lines())
        said = next(text)
        pirate = beside.submit(answer, server, "pirate", LONG_TOKENS)
        replace(adapters / "voice", "german")
        assert becomes(lambda: revision(server, "voice") == revision(server, "german"))
        was_running = server.metric("vllm:num_requests_running") > 0
        assert answer(server, "voice", 30) == german
        said += "".join(text)

    assert said == pirate.result()
    assert was_running, "the stream must be longer than the swap takes"
    shutil.rmtree(adapters / "voice")
    assert becomes(lambda: revision(server, "voice") is None)
    server.wait_until_idle()
