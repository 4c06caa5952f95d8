"""Every byte of an answer, head and chunks, against files. Rows J2, J10, L1, L3, L12, L15, Z2, Z4, Z5, Z12,
the frames of the wire formats, and the events of OpenAI's responses and Anthropic's messages.

A file that is missing is written, and the test fails so that somebody looks at it.
"""

from pathlib import Path

import pytest

from server.types import Alternative, FinishReason, GenerationRequest, TokenEvent
from tests.server.api.fake_service import (
    FakeService,
    Script,
    finish_of,
    scored,
    sentence_with_eos,
    token_event,
    words,
)
from tests.server.api.on_file import assert_on_file
from tests.server.api.raw_http import ask, post

GOLDEN = Path(__file__).parent / "golden"
MESSAGE = {"model": "pirate", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
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


def vectors(request: GenerationRequest) -> list[TokenEvent]:
    return [
        TokenEvent(index, "", None, finish_of(request, "", 0, index=index), vector=(0.6, -0.8, 0.0))
        for index in range(request.num_choices)
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
    "completion_echo": ("/v1/completions", {"prompt": "Hi", "echo": True, "logprobs": 1}, scored),
    "completion_echo_stream": (
        "/v1/completions",
        {"prompt": ["Hi", "Ho"], "echo": True, "logprobs": 0, "stream": True},
        scored,
    ),
    "embeddings": ("/v1/embeddings", {"input": ["Hi", "Ho"], "model": "pirate"}, vectors),
    "embeddings_base64": ("/v1/embeddings", {"input": "Hi", "encoding_format": "base64"}, vectors),
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
    "response": (
        "/v1/responses",
        {"model": "pirate", "input": "Hi", "instructions": "Be brief.", "metadata": {"a": "é"}},
        sentence_with_eos("Once", " upon"),
    ),
    "response_stream": (
        "/v1/responses",
        {"model": "pirate", "input": "Hi", "stream": True, "max_output_tokens": 2},
        words("Once", " upon"),
    ),
    "response_stream_unicode": ("/v1/responses", {"input": "Hi", "stream": True}, unicode_in_pieces),
    "response_stream_broken": ("/v1/responses", {"input": "Hi", "stream": True}, broken),
    "response_unknown_model": (
        "/v1/responses",
        {"model": "nobody", "input": "Hi", "stream": True},
        words("x"),
    ),
    "message": ("/v1/messages", {**MESSAGE, "system": "Be brief."}, sentence_with_eos("Once", " upon")),
    "message_stream": ("/v1/messages", {**MESSAGE, "stream": True}, sentence_with_eos("Once", " upon")),
    "message_stream_unicode": ("/v1/messages", {**MESSAGE, "stream": True}, unicode_in_pieces),
    "message_stream_broken": ("/v1/messages", {**MESSAGE, "stream": True}, broken),
    "message_unknown_model": (
        "/v1/messages",
        {**MESSAGE, "model": "nobody", "stream": True},
        words("x"),
    ),
    "compat_list": ("/", {"inputs": "Hi", "stream": False}, words("Once", " upon")),
    "kserve_generate_stream": (
        "/v2/models/pirate/generate_stream",
        {"text_input": "Hi", "parameters": {"max_tokens": 3}},
        sentence_with_eos("Once", " upon"),
    ),
    "kserve_generate_stream_unicode": (
        "/v2/models/base/versions/1/generate_stream",
        {"id": "7", "text_input": "Hi", "return_num_output_tokens": True},
        unicode_in_pieces,
    ),
    "kserve_generate_stream_broken": ("/v2/models/base/generate_stream", {"text_input": "Hi"}, broken),
    "kserve_generate": ("/v2/models/base/generate", {"text_input": "Hi"}, words("Once", " upon")),
    "kserve_infer": (
        "/v2/models/base/infer",
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}]},
        words("Once", " upon"),
    ),
    "kserve_unknown_model": ("/v2/models/nobody/generate_stream", {"text_input": "Hi"}, words("x")),
    "compat_stream": ("/", {"inputs": "Hi", "stream": True}, words("Once", " upon")),
}


@pytest.mark.parametrize("name", CASES)
async def test_answer_is_the_one_on_file(name: str, service: FakeService, port: int) -> None:
    path, body, service.script = CASES[name]
    service.registry.add("pirate")

    answer = await ask(port, post(path, body))
    assert_on_file(answer, GOLDEN / f"{name}.txt")
    assert service.is_idle


@pytest.mark.parametrize("name", [name for name in CASES if "unknown" not in name])
def test_files_hold_ascii_and_line_feeds_only(name: str) -> None:
    """Z3, T2, T6, T7: clients that decode each read by itself, end lines at other characters, too, or compare
    with "[DONE]" line by line.
    """
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert body.isascii()
    assert b"\r" not in body


@pytest.mark.parametrize("name", [name for name in CASES if "generate" in name or "compat" in name])
def test_lorax_routes_have_no_sentinel(name: str) -> None:
    """L3, T4."""
    assert b"[DONE]" not in (GOLDEN / f"{name}.txt").read_bytes()


@pytest.mark.parametrize("name", [name for name in CASES if "job" not in name])
def test_J10_ids_and_retry_times_are_on_the_jobs_route_only(name: str) -> None:
    """T1: the OpenAI SDK delivers events without data where it has seen one."""
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert not [line for line in body.splitlines() if line.startswith((b"id:", b"retry:"))]


@pytest.mark.parametrize("name", [name for name in CASES if "response_stream" in name or "message_" in name])
def test_typed_events_need_no_sentinel(name: str) -> None:
    assert b"[DONE]" not in (GOLDEN / f"{name}.txt").read_bytes()


def test_every_case_has_a_file_and_every_file_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(CASES)
