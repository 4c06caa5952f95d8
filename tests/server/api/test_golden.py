"""Every byte of an answer, head and chunks, against files. Rows J2, J10, L1, L3, L12, L15, Z2, Z4, Z5, Z12
and the frames of the wire formats.

A file that is missing is written, and the test fails so that somebody looks at it.
"""

from pathlib import Path

import pytest

from server.types import Alternative, FinishReason, GenerationRequest, TokenEvent
from tests.server.api.fake_service import (
    FakeService,
    Script,
    finish_of,
    sentence_with_eos,
    token_event,
    words,
)
from tests.server.api.raw_http import ask, post

GOLDEN = Path(__file__).parent / "golden"
CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}


def broken(request: GenerationRequest) -> list[TokenEvent]:
    """Two tokens, then the engine fails."""
    finish = finish_of(request, "Once upon", 2, reason=FinishReason.ERROR, error="logits were not finite")
    return [token_event("Once"), token_event(" upon"), TokenEvent(0, "", None, finish)]


def unicode_in_pieces(request: GenerationRequest) -> list[TokenEvent]:
    """A character in two tokens, the characters at which line readers split, and a stop string held back."""
    finish = finish_of(request, "é\u2028\x85", 5, reason=FinishReason.STOP, stop="END")
    return [
        token_event("", id=195, shown=""),
        token_event("é", id=169),
        token_event("\u2028\x85", id=3),
        token_event("", id=4, shown="EN"),
        token_event("", id=5, shown="D", finish=finish),
    ]


def with_alternatives(request: GenerationRequest) -> list[TokenEvent]:
    others = (Alternative(ord("a"), -0.25), Alternative(ord("é"), float("-inf")))
    return [
        token_event("a", alternatives=others),
        token_event("b", alternatives=others, finish=finish_of(request, "ab", 2)),
    ]


CASES: dict[str, tuple[str, dict[str, object], Script]] = {
    "chat_stream": ("/v1/chat/completions", {**CHAT, "stream": True}, sentence_with_eos("Once", " upon")),
    "chat_stream_usage": (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "n": 2, "stream_options": {"include_usage": True}},
        words("Once", " upon"),
    ),
    "chat_stream_logprobs": (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2},
        with_alternatives,
    ),
    "chat_stream_unicode": ("/v1/chat/completions", {**CHAT, "stream": True}, unicode_in_pieces),
    "chat_stream_broken": ("/v1/chat/completions", {**CHAT, "stream": True}, broken),
    "chat_stream_silent": ("/v1/chat/completions", {**CHAT, "stream": True}, sentence_with_eos()),
    "chat": ("/v1/chat/completions", {**CHAT, "n": 2}, words("Once", " upon")),
    "chat_unknown_model": ("/v1/chat/completions", {**CHAT, "model": "nobody", "stream": True}, words("x")),
    "completion_stream": ("/v1/completions", {"prompt": "Hi", "stream": True}, words("Once", " upon")),
    "completion_logprobs": ("/v1/completions", {"prompt": "Hi", "logprobs": 2}, with_alternatives),
    "generate_stream": (
        "/generate_stream",
        {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "details": True, "adapter_id": "pirate"}},
        sentence_with_eos("Once", " upon"),
    ),
    "generate_stream_unicode": ("/generate_stream", {"inputs": "Hi"}, unicode_in_pieces),
    "generate_stream_broken": ("/generate_stream", {"inputs": "Hi"}, broken),
    "generate_alternatives": (
        "/generate",
        {"inputs": "Hi", "parameters": {"return_k_alternatives": 2, "details": True}},
        with_alternatives,
    ),
    "generate_unknown_adapter": (
        "/generate_stream",
        {"inputs": "Hi", "parameters": {"adapter_id": "nobody"}},
        words("x"),
    ),
    "job": ("/api/jobs/pirate/infer", {"prompt": "Hi"}, words("Once", " upon")),
    "job_stream": (
        "/api/jobs/pirate/infer/stream",
        {"prompt": "Hi"},
        sentence_with_eos("Hello", ",", " world"),
    ),
    "job_stream_unicode": ("/api/jobs/base/infer/stream", {"prompt": "Hi"}, unicode_in_pieces),
    "job_stream_broken": ("/api/jobs/base/infer/stream", {"prompt": "Hi"}, broken),
    "job_stream_silent": ("/api/jobs/base/infer/stream", {"prompt": "Hi"}, sentence_with_eos()),
    "job_unknown": ("/api/jobs/nobody/infer/stream", {"prompt": "Hi"}, words("x")),
    "compat_list": ("/", {"inputs": "Hi", "stream": False}, words("Once", " upon")),
    "compat_stream": ("/", {"inputs": "Hi", "stream": True}, words("Once", " upon")),
}


@pytest.mark.parametrize("name", CASES)
async def test_answer_is_the_one_on_file(name: str, service: FakeService, port: int) -> None:
    path, body, service.script = CASES[name]
    service.registry.add("pirate")

    answer = await ask(port, post(path, body))
    # One HTTP chunk is one event: shown by a line between them, as the frames themselves end in blank lines.
    seen = answer.head + b"--- chunk\n".join(answer.chunks)

    file = GOLDEN / f"{name}.txt"
    if not file.exists():
        file.write_bytes(seen)
        pytest.fail(f"{file.name} was written: read it, then run again")
    assert seen.decode() == file.read_bytes().decode()
    assert service.is_idle


@pytest.mark.parametrize("name", [name for name in CASES if "unknown" not in name])
def test_files_hold_ascii_and_line_feeds_only(name: str) -> None:
    """Z3: clients that decode each read by itself, or compare with "[DONE]" line by line."""
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert body.isascii()
    assert b"\r" not in body


@pytest.mark.parametrize("name", [name for name in CASES if "generate" in name or "compat" in name])
def test_lorax_routes_have_no_sentinel(name: str) -> None:
    """L3."""
    assert b"[DONE]" not in (GOLDEN / f"{name}.txt").read_bytes()


@pytest.mark.parametrize("name", [name for name in CASES if "job" not in name])
def test_J10_ids_and_retry_times_are_on_the_jobs_route_only(name: str) -> None:
    """T1: the OpenAI SDK delivers events without data where it has seen one."""
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert not [line for line in body.splitlines() if line.startswith((b"id:", b"retry:"))]


def test_every_case_has_a_file_and_every_file_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(CASES)
