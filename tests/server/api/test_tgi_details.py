"""What LoRAX's and TGI's clients may ask for beside the text: several sequences, other likely tokens, the
prompt's own log-probabilities. Rows L5, L14 and L16 of answers with several sequences.
"""

from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from server.api.app import build_app
from server.api.state import ServerState
from server.types import SamplingParams
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, words
from tests.server.api.test_tgi import frames_of
from tests.server.api.tgi_scripts import alternatives, choices_of, with_prompt


async def details_of(client: httpx.AsyncClient, **parameters: object) -> Any:
    body = {"inputs": "Hi", "parameters": {"details": True, **parameters}}
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()["details"]


async def refusal_of(client: httpx.AsyncClient, path: str = "/generate", **parameters: object) -> str:
    response = await client.post(path, json={"inputs": "Hi", "parameters": parameters})
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    return str(response.json()["error"]).removeprefix("Input validation error: ")


# --- best_of --------------------------------------------------------------------------------------------


async def test_best_of_answers_the_likeliest_sequence_and_lists_the_others(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = choices_of([-2.0, -2.0], [-0.5, -1.0], [-3.0])
    answer = (
        await client.post(
            "/generate",
            json={"inputs": "Hi", "parameters": {"best_of": 3, "do_sample": True, "details": True}},
        )
    ).json()

    assert service.last.n == 3
    assert answer["generated_text"] == "b0b1"
    details = answer["details"]
    assert (details["seed"], details["generated_tokens"]) == (8, 2)
    assert [token["text"] for token in details["tokens"]] == ["b0", "b1"]
    others = details["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["a0a1", "c0"]
    assert [other["seed"] for other in others] == [7, 9]
    assert [len(other["tokens"]) for other in others] == [2, 1]


async def test_likeliest_is_by_mean_and_not_by_sum(client: httpx.AsyncClient, service: FakeService) -> None:
    """A long sequence of likely tokens beats a short one of less likely tokens."""
    service.script = choices_of([-0.9], [-0.5] * 4)

    details = await details_of(client, best_of=2, do_sample=True)

    assert [token["text"] for token in details["tokens"]] == ["b0", "b1", "b2", "b3"]


async def test_first_of_equally_likely_sequences_is_the_answer(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = choices_of([-0.5], [-0.5])

    assert [token["text"] for token in (await details_of(client, best_of=2, top_k=4))["tokens"]] == ["a0"]


async def test_sequences_are_listed_only_for_those_who_ask_for_details(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = choices_of([-2.0], [-0.5])
    answer = await client.post("/generate", json={"inputs": "Hi", "parameters": {"best_of": 2, "top_p": 0.9}})

    assert answer.json()["generated_text"] == "b0"
    assert "best_of_sequences" not in answer.json()["details"]


async def test_L16_full_text_of_every_sequence_starts_with_the_prompt(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = choices_of([-2.0], [-0.5])
    details = await details_of(client, best_of=2, do_sample=True, return_full_text=True)

    assert [other["generated_text"] for other in details["best_of_sequences"]] == ["Hia0"]


@pytest.mark.parametrize(
    "asked",
    [{"do_sample": True}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 1.0}, {"typical_p": 0.9}],
    ids=str,
)
async def test_whatever_best_of_takes_for_sampling_samples(
    client: httpx.AsyncClient, service: FakeService, asked: Mapping[str, object]
) -> None:
    """LoRAX counts a parameter of sampling that is only named; sequences that are all the same are of no
    use.
    """
    service.script = choices_of([-2.0], [-0.5])
    await details_of(client, best_of=2, **asked)

    assert service.last.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "temperature": 0.0}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 128. Given: 0"),
        ({"best_of": 129, "do_sample": True}, "`best_of` must be > 0 and <= 128. Given: 129"),
    ],
    ids=str,
)
async def test_best_of_is_refused_in_the_words_of_lorax(
    client: httpx.AsyncClient, service: FakeService, parameters: dict[str, object], text: str
) -> None:
    assert await refusal_of(client, **parameters) == text
    assert service.requests == []


async def test_best_of_can_be_off(make_state: Any) -> None:
    state: ServerState = make_state(max_choices=1)
    async with connect(build_app(state)) as client:
        text = await refusal_of(client, best_of=2, do_sample=True)

    assert text == "`best_of` != 1 is not allowed for this endpoint"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
    ids=str,
)
async def test_L14_sequences_and_prompts_cannot_be_streamed(
    client: httpx.AsyncClient, parameters: dict[str, object], text: str
) -> None:
    assert await refusal_of(client, "/generate_stream", **parameters) == text


# --- Other likely tokens --------------------------------------------------------------------------------


async def test_tokens_have_as_many_alternatives_and_rivals_as_were_asked_for(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """LoRAX's are in the token, TGI's beside it; neither shows what the other one needs."""
    service.script = choices_of([-0.25])
    details = await details_of(client, return_k_alternatives=1, top_n_tokens=2)

    assert service.last.sampling.num_logprobs == 2
    assert [other["text"] for other in details["tokens"][0]["alternative_tokens"]] == ["x"]
    assert [[top["id"] for top in of_token] for of_token in details["top_tokens"]] == [[ord("x"), 2]]
    assert [top["special"] for top in details["top_tokens"][0]] == [False, True]


async def test_top_tokens_are_beside_the_token_of_each_frame(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = choices_of([-0.25, -0.5])
    body = {"inputs": "Hi", "parameters": {"top_n_tokens": 1}}

    for frame in await frames_of(client, body):
        assert [top["id"] for top in frame["top_tokens"]] == [ord("x")]
        assert "alternative_tokens" not in frame["token"]


async def test_no_top_tokens_is_no_list(client: httpx.AsyncClient) -> None:
    assert "top_tokens" not in await details_of(client, top_n_tokens=0)
    frames = await frames_of(client, {"inputs": "Hi", "parameters": {"top_n_tokens": 0}})
    assert all("top_tokens" not in frame for frame in frames)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
        ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 20. Given: -1"),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
    ],
    ids=str,
)
async def test_numbers_of_tokens_are_bounded(
    client: httpx.AsyncClient, parameters: dict[str, object], text: str
) -> None:
    assert await refusal_of(client, **parameters) == text


# --- The prompt -----------------------------------------------------------------------------------------


async def test_prefill_lists_the_prompt_and_brings_the_details_with_it(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """As in LoRAX and TGI, decoder_input_details does not need details beside it."""
    service.script = with_prompt(words("Once"))
    details = await details_of(client, decoder_input_details=True, details=False)

    assert service.last.sampling.num_prompt_logprobs == 0
    assert details["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": ord("H"), "text": "H", "logprob": -1.5},
        {"id": ord("i"), "text": "i", "logprob": -9999.0},
    ]
    assert [token["text"] for token in details["tokens"]] == ["Once"]


async def test_prefill_of_every_sequence_is_listed(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = with_prompt(choices_of([-2.0], [-0.5]))
    details = await details_of(client, best_of=2, do_sample=True, decoder_input_details=True)

    assert [len(of["prefill"]) for of in (details, *details["best_of_sequences"])] == [3, 3]


async def test_nobody_else_asks_the_engine_for_the_prompt(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await details_of(client)

    assert service.last.sampling == SamplingParams(temperature=0.0, num_logprobs=0)


async def test_answers_with_thousands_of_numbers_are_written_in_the_pool(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """The same answer, whoever writes it."""
    service.script = with_prompt(choices_of([-0.25] * 8))
    inputs = "x" * 900
    body = {"inputs": inputs, "parameters": {"decoder_input_details": True, "top_n_tokens": 2}}
    details = (await client.post("/generate", json=body)).json()["details"]

    assert len(details["prefill"]) == 901
    assert len(details["tokens"]) == len(details["top_tokens"]) == 8
    assert alternatives("x", "")[0].token_id == details["top_tokens"][0][0]["id"]
