"""`lorax-client`, `text-generation` and `huggingface_hub` < 1.0 ask for sequences, other tokens and the
prompt's log-probabilities, and raise their own exceptions: rows L2, L5, L10, L12 to L14.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from statistics import fmean
from typing import Any

import pytest

from server.api.app import build_app
from server.api.state import Phase, ServerState
from server.errors import BadRequest, Overloaded
from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.e2e.running import RunningServer
from tests.e2e.test_legacy_clients import speak
from tests.server.api.conftest import serve
from tests.server.api.fake_service import FakeLease, FakeService, FakeStream, finish_of, token_event, words

SCRIPT, PROMPT = "legacy_details.py", "Motet is"
CLIENTS = ("lorax", "text_generation", "hub")
LONG = "\u732b" * 40_000  # 120 kB of UTF-8, 240 kB of escapes


@pytest.fixture(scope="module")
def details(server: RunningServer) -> dict[str, dict[str, Any]]:
    """What each client saw of everything it can ask for."""
    return {client: speak(f"{client}_details", server.url, SCRIPT) for client in CLIENTS}


def mean_logprob(sequence: dict[str, Any]) -> float:
    return fmean(logprob for _, logprob in sequence["tokens"])


def without_cut_character(text: str) -> str:
    """What is left of a character before a last token that is no text belongs to the answer alone."""
    return text.removesuffix("\ufffd")


def assert_best_of(seen: dict[str, Any], num_others: int, num_tokens: int) -> None:
    """The likeliest is the answer, each has a seed of its own, its tokens are its text, and the prompt is
    listed.

    What is drawn differs from run to run, and an end-of-sequence token that is ignored may be among it: that
    one has a name and is no text.
    """
    best, others = seen["best"], seen["others"]
    everyone = [best, *others]

    assert len(others) == num_others
    assert all(mean_logprob(best) >= mean_logprob(other) for other in others)
    assert len({sequence["seed"] for sequence in everyone}) == len(everyone)
    assert without_cut_character(best["said"]) == without_cut_character(seen["text"])
    for other in others:
        assert without_cut_character(other["said"]) == without_cut_character(other["text"])
    for sequence in everyone:
        assert sequence["generated_tokens"] == len(sequence["tokens"]) <= num_tokens
        (first, nothing), *rest = sequence["prefill"]
        assert first + "".join(text for text, _ in rest) == PROMPT
        assert nothing is None
        assert all(logprob < 0 for _, logprob in rest)


def test_lorax_client_gets_all_its_details(details: dict[str, dict[str, Any]]) -> None:
    seen = details["lorax"]

    assert_best_of(seen, num_others=2, num_tokens=6)
    assert seen["again"] == seen["text"]  # with the seed that the answer names
    for (_, logprob), alternatives in zip(seen["best"]["tokens"], seen["alternatives"], strict=True):
        assert len(alternatives) == 2
        assert alternatives[0][1] >= alternatives[1][1]
        assert alternatives[0][1] >= logprob
    assert [len(alternatives) for alternatives in seen["stream_alternatives"]] == [2, 2, 2]


def test_prefill_says_of_a_text_what_generating_it_said(details: dict[str, dict[str, Any]]) -> None:
    seen = details["lorax"]
    generated, read = seen["greedy"]["tokens"], seen["read"]["prefill"][-4:]

    assert [text for text, _ in read] == [text for text, _ in generated]
    assert [logprob for _, logprob in read] == pytest.approx([logprob for _, logprob in generated], abs=1e-3)
    assert seen["truncated"] == [1, 1]


def test_typical_p_narrows_what_is_drawn_from(details: dict[str, dict[str, Any]]) -> None:
    seen = details["lorax"]

    assert len(set(seen["free"])) > 1
    assert len(set(seen["typical"])) == 1  # no more than the most typical token is left to draw from


@pytest.mark.parametrize("client", ["text_generation", "hub"])
def test_clients_of_tgi_get_all_their_details(details: dict[str, dict[str, Any]], client: str) -> None:
    seen = details[client]

    assert_best_of(seen, num_others=1, num_tokens=5)
    assert_best_of(seen["asynchronous"], num_others=1, num_tokens=5)
    for (text, logprob), tops in zip(seen["best"]["tokens"], seen["top_tokens"], strict=True):
        assert [top for _, top in tops] == sorted((top for _, top in tops), reverse=True)
        assert len(tops) == 3
        assert text in dict(tops) or logprob <= tops[-1][1]
    assert [tops[0] for tops in seen["stream_top_tokens"]] == seen["stream_tokens"]
    assert [len(tops) for tops in seen["stream_top_tokens"]] == [2, 2, 2]
    assert seen["stream_details"] == 3


MODULES = {
    "lorax": "lorax.errors",
    "text_generation": "text_generation.errors",
    "hub": "huggingface_hub.errors",
}
ASKED_IN_VAIN = {
    "lorax": {
        "watermark": "watermark is not supported",
        "grammar": "response_format is not supported",
        "stream_source": "hub",
    },
    "text_generation": {
        "watermark": "watermark is not supported",
        "grammar": "grammar is not supported",
        "too_many": "`top_n_tokens` must be >= 0 and <= 20. Given: 99",
    },
    "hub": {
        "watermark": "watermark is not supported",
        "grammar": "grammar is not supported",
        "greedy_best_of": "you must use sampling when `best_of` is > 1",
        "streamed_best_of": "`best_of` != 1 is not supported when streaming tokens",
        "streamed_prompt": "`decoder_input_details` == true is not supported when streaming tokens",
    },
}


@pytest.mark.parametrize("client", ASKED_IN_VAIN)
def test_L13_L14_refusals_are_the_clients_own_validation_errors(
    details: dict[str, dict[str, Any]], client: str
) -> None:
    for what, text in ASKED_IN_VAIN[client].items():
        module, name, message = details[client][what]
        assert (module, name) == (MODULES[client], "ValidationError")
        assert text in message


# --- Errors of the engine -----------------------------------------------------------------------------------


class ObedientService(FakeService):
    """Does to each request what its prompt says."""

    def submit(self, request: GenerationRequest, lease: FakeLease | None) -> FakeStream:
        wish = self.tokenizer.decode(request.prompts[0])
        if wish == "overloaded":
            raise Overloaded("the queue is full", retry_after_s=1)
        if wish == "invalid":
            raise BadRequest("`top_k` must be strictly positive", param="top_k")
        stream = super().submit(request, lease)
        if wish == "incomplete":
            stream.end_without_finish()
        return stream


def obey(request: GenerationRequest) -> list[TokenEvent]:
    wish = "".join(map(chr, request.prompts[0][1:]))
    end = finish_of(request, "Once", 1, reason=FinishReason.ERROR, error="logits were not finite")
    if wish == "failing":
        return [TokenEvent(0, "", None, end)]
    if wish == "breaking":
        return [token_event("Once"), TokenEvent(0, "", None, end)]
    if wish == "incomplete":
        return [token_event("Once")]
    if wish == "long":
        return [token_event("\u732b", finish=finish_of(request, LONG, 1))]
    return list(words("Once", " upon")(request))


@pytest.fixture
async def obedient_url() -> AsyncIterator[str]:
    service = ObedientService(script=obey)
    numbers = itertools.count()
    state = ServerState(service=service, phase=Phase.READY, new_id=lambda: f"id{next(numbers)}")
    async with serve(build_app(state)) as port:
        yield f"http://127.0.0.1:{port}"
    assert service.is_idle
    service.pool.shutdown()


EXCEPTIONS = [
    ("OverloadedError", "Model is overloaded"),
    ("GenerationError", "Request failed during generation: logits were not finite"),
    ("GenerationError", "Request failed during generation: logits were not finite"),
    ("IncompleteGenerationError", "Incomplete generation"),
    ("ValidationError", "Input validation error: `top_k` must be strictly positive"),
]


@pytest.mark.parametrize("client", CLIENTS)
async def test_L12_L13_every_error_is_the_clients_own_exception(obedient_url: str, client: str) -> None:
    """Streamed or not; before the stream as a true status, in it as a frame. T8: and a large last frame is
    read by aiohttp, which refuses lines of more than 128 KiB.
    """
    seen = await asyncio.to_thread(speak, f"{client}_errors", obedient_url, SCRIPT)
    module = MODULES[client]

    for how in ("whole", "stream", "asynchronous"):
        assert [tuple(error) for error in seen[how]] == [(module, *error) for error in EXCEPTIONS], how
    if client == "lorax":
        assert seen["unknown_adapter"][:2] == [module, "NotFoundError"]  # L10
        assert seen["long"] == LONG
