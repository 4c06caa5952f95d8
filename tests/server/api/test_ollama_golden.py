"""Every byte of Ollama's answers, head and chunks, against files. Rows C7 to C12."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.fake_service import (
    FakeService,
    Script,
    finish_of,
    sentence_with_eos,
    token_event,
    words,
)
from tests.server.api.on_file import assert_on_file
from tests.server.api.raw_http import ask, post
from tests.server.api.test_golden import broken, unicode_in_pieces, with_alternatives

GOLDEN = Path(__file__).parent / "golden" / "ollama"
HI = {"model": "pirate", "prompt": "Hi"}
CHAT = {"model": "pirate:latest", "messages": [{"role": "user", "content": "Hi"}]}


def long_text(request: GenerationRequest) -> list[TokenEvent]:
    """An end that would be longer than line readers take, were it all escapes."""
    text = "\u2028é" * 8000
    return [token_event("Once", finish=finish_of(request, text, 1, reason=FinishReason.STOP))]


CASES: dict[str, tuple[str, dict[str, Any], Script]] = {
    "generate": ("/api/generate", {**HI, "stream": False}, sentence_with_eos("Once", " upon")),
    "generate_stream": ("/api/generate", HI, sentence_with_eos("Once", " upon")),
    "generate_raw": ("/api/generate", {**HI, "raw": True}, words("Once", " upon")),
    "generate_logprobs": ("/api/generate", {**HI, "logprobs": True, "top_logprobs": 2}, with_alternatives),
    "generate_unicode": ("/api/generate", HI, unicode_in_pieces),
    "generate_broken": ("/api/generate", HI, broken),
    "generate_broken_whole": ("/api/generate", {**HI, "stream": False}, broken),
    "generate_load": ("/api/generate", {"model": "pirate"}, words("x")),
    "generate_unknown_model": ("/api/generate", {**HI, "model": "nobody"}, words("x")),
    "chat": ("/api/chat", {**CHAT, "stream": False}, sentence_with_eos("Once", " upon")),
    "chat_stream": ("/api/chat", CHAT, sentence_with_eos("Once", " upon")),
    "chat_silent": ("/api/chat", CHAT, sentence_with_eos()),
    "chat_broken": ("/api/chat", CHAT, broken),
    "chat_logprobs": ("/api/chat", {**CHAT, "stream": False, "logprobs": True}, with_alternatives),
    "chat_load": ("/api/chat", {"model": "pirate", "keep_alive": 0}, words("x")),
    "show": ("/api/show", {"model": "base"}, words("x")),
    "show_adapter": ("/api/show", {"name": "pirate:latest"}, words("x")),
    "pull": ("/api/pull", {"model": "pirate"}, words("x")),
    "pull_unknown_model": ("/api/pull", {"model": "nobody"}, words("x")),
}
LISTS = ("tags", "ps", "version")


@pytest.mark.parametrize("name", CASES)
async def test_answer_is_the_one_on_file(name: str, service: FakeService, port: int) -> None:
    path, body, service.script = CASES[name]
    service.registry.add("pirate")

    answer = await ask(port, post(path, body))

    assert_on_file(answer, GOLDEN / f"{name}.txt")
    assert service.is_idle


@pytest.mark.parametrize("name", LISTS)
async def test_list_is_the_one_on_file(name: str, service: FakeService, port: int) -> None:
    service.registry.add("pirate")
    service.registry.add("absent")
    service.registry.evicted.add("absent")

    answer = await ask(port, f"GET /api/{name} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

    assert_on_file(answer, GOLDEN / f"{name}.txt")


@pytest.mark.parametrize("name", CASES)
def test_files_hold_ascii_and_line_feeds_only(name: str) -> None:
    """Clients split lines at other characters, too, and decode each read by itself."""
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert body.isascii()
    assert b"\r" not in body
    assert b"[DONE]" not in body


async def test_a_long_last_line_is_unicode_but_for_what_ends_lines(service: FakeService, port: int) -> None:
    service.registry.add("pirate")
    service.script = long_text
    answer = await ask(port, post("/api/generate", HI))
    last = answer.chunks[-1]

    assert json.loads(last)["generated_text"] == "\u2028é" * 8000
    assert "é".encode() in last
    assert len(last.decode().splitlines()) == 1


def test_every_case_has_a_file_and_every_file_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {*CASES, *LISTS}
