"""Every byte of what LoRAX's and TGI's routes answer, against files; what the OpenAI routes share with them
is in test_golden.py. Rows L1, L3, L5, L10, L12, L13, L14, L15, L18.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.errors import Overloaded, ServeError
from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.conftest import serve
from tests.server.api.fake_service import FakeService, Script, finish_of, token_event, words
from tests.server.api.on_file import assert_on_file
from tests.server.api.raw_http import ask, post
from tests.server.api.tgi_scripts import choices_of, with_prompt

GOLDEN = Path(__file__).parent / "golden" / "tgi"


def failing(request: GenerationRequest) -> list[TokenEvent]:
    """One token, then the engine fails."""
    end = finish_of(request, "Once", 1, reason=FinishReason.ERROR, error="logits were not finite")
    return [token_event("Once"), TokenEvent(0, "", None, end)]


def going_down(request: GenerationRequest) -> list[TokenEvent]:
    """One token, then the server drains."""
    end = finish_of(request, "Once", 1, reason=FinishReason.ABORT, error="the server is shutting down")
    return [token_event("Once"), TokenEvent(0, "", None, end)]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def generate(path: str = "/generate", **parameters: object) -> bytes:
    return post(path, {"inputs": "Hi", "parameters": parameters})


@dataclass(frozen=True)
class Case:
    request: bytes
    script: Script = field(default_factory=lambda: words("Once", " upon"))
    refusal: ServeError | None = None
    phase: Phase = Phase.READY


TWO = choices_of([-2.0, -2.0], [-0.5, -1.0])
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}

CASES: dict[str, Case] = {
    "best_of": Case(generate(best_of=2, do_sample=True, details=True), TWO),
    "best_of_everything": Case(
        generate(
            "/",
            best_of=2,
            do_sample=True,
            decoder_input_details=True,
            top_n_tokens=2,
            return_k_alternatives=1,
            return_full_text=True,
        ),
        with_prompt(TWO),
    ),
    "prefill": Case(generate(decoder_input_details=True), with_prompt(words("Once", " upon"))),
    "top_tokens": Case(generate(details=True, top_n_tokens=2), choices_of([-0.25, -0.5])),
    "stream_top_tokens": Case(generate("/generate_stream", top_n_tokens=2), choices_of([-0.25, -0.5])),
    "stream_alternatives": Case(
        generate("/generate_stream", return_k_alternatives=1, details=True), choices_of([-0.25, -0.5])
    ),
    "stream_sampled": Case(
        generate("/generate_stream", do_sample=True, typical_p=0.9), words("Once", " upon")
    ),
    "invocations": Case(generate("/invocations")),
    "invocations_stream": Case(post("/invocations", {"inputs": "Hi", "stream": True})),
    "invocations_chat": Case(post("/invocations", CHAT)),
    "info": Case(get("/info")),
    "startup": Case(get("/startup"), words("I")),
    "tokenize": Case(post("/tokenize", {"inputs": "H\u00e9"})),
    "chat_tokenize": Case(post("/chat_tokenize", CHAT)),
    "detokenize": Case(post("/detokenize", {"tokens": [1, 72, 233]})),
    "ping": Case(get("/ping")),
    "error_validation": Case(generate(top_k=0)),
    "error_unsupported": Case(generate(watermark=True)),
    "error_wrong_type": Case(generate(top_k="many")),
    "error_too_long": Case(generate(max_new_tokens=1000)),
    "error_best_of_stream": Case(generate("/generate_stream", best_of=2, do_sample=True)),
    "error_best_of_greedy": Case(generate(best_of=2)),
    "error_prefill_stream": Case(generate("/generate_stream", decoder_input_details=True)),
    "error_not_json": Case(post("/generate", b"{")),
    "error_template": Case(post("/chat_tokenize", {"messages": [{"role": "tool", "content": "first"}]})),
    "error_overloaded": Case(generate("/generate_stream"), refusal=Overloaded("full", retry_after_s=3)),
    "error_generation": Case(generate(), failing),
    "error_generation_stream": Case(generate("/generate_stream"), failing),
    "error_drain_stream": Case(generate("/generate_stream"), going_down),
    "error_loading": Case(generate(), phase=Phase.LOADING),
    "error_unhealthy": Case(get("/ping"), phase=Phase.FAILED),
    "error_startup": Case(get("/startup"), words("")),
    "error_unknown_adapter": Case(generate("/", adapter_id="nobody")),
}


@pytest.mark.parametrize("name", CASES)
async def test_answer_of_lorax_and_tgi_is_the_one_on_file(
    name: str, service: FakeService, make_state: Callable[..., ServerState]
) -> None:
    case = CASES[name]
    service.script, service.refusal = case.script, case.refusal
    state = make_state()
    state.phase = case.phase
    async with serve(build_app(state)) as port:
        answer = await ask(port, case.request)

    assert_on_file(answer, GOLDEN / f"{name}.txt")
    assert service.is_idle


@pytest.mark.parametrize("name", CASES)
def test_files_of_lorax_and_tgi_hold_ascii_and_no_sentinel(name: str) -> None:
    """L3, Z3."""
    body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\r\n\r\n")[2]

    assert body.isascii()
    assert b"\r" not in body
    assert b"[DONE]" not in body


def test_every_case_of_lorax_and_tgi_has_a_file_and_every_file_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(CASES)
