"""What LoRAX bodies mean, and the parts of their answers that golden files do not show.

Rows L1, L4, L5, L6, L15 to L18, U6. L8's merged adapters belong to a later issue: refused by name
(test_bad_input.py).
"""

import json
from typing import Any

import httpx
import pytest

from server.types import FinishReason, SamplingParams
from tests.server.api.fake_service import FakeService, sentence_with_eos, words


async def frames_of(
    client: httpx.AsyncClient, body: dict[str, Any], path: str = "/generate_stream"
) -> list[Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    *frames, nothing = response.text.split("\n\n")
    assert nothing == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"do_sample": False, "temperature": None}, 0.0),
        ({"top_p": 1.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"do_sample": True, "temperature": 0.01, "top_p": 0.99, "best_of": 1}, 0.01),
    ],
    ids=str,
)
async def test_sampling_is_on_only_if_something_asks_for_it(
    client: httpx.AsyncClient, service: FakeService, parameters: dict[str, Any], temperature: float
) -> None:
    """Also U6's parameters, and L5: the seed is null unless sampling was on."""
    frames = await frames_of(client, {"inputs": "Hi", "parameters": parameters})

    assert service.last.sampling.temperature == temperature
    assert frames[-1]["details"]["seed"] == (7 if temperature else None)


async def test_every_parameter_reaches_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    parameters = {
        "temperature": 0.5,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "top_k": 10,
        "top_p": 0.95,
        "typical_p": 1.0,
        "do_sample": True,
        "max_new_tokens": 12,
        "ignore_eos_token": True,
        "stop": ["a", "b", "c", "d", "e"],
        "return_k_alternatives": 3,
        "seed": 2**64 - 1,
    }
    await client.post("/generate", json={"inputs": "Hi", "parameters": parameters})

    assert service.last.sampling == SamplingParams(
        temperature=0.5,
        top_k=10,
        top_p=0.95,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        seed=2**64 - 1,
        num_logprobs=3,
    )
    stop = service.last.stop
    assert (stop.max_tokens, stop.stop, stop.ignore_eos) == (12, ("a", "b", "c", "d", "e"), True)
    assert stop.keep_stop


async def test_nulls_and_unknown_keys_of_published_clients_are_accepted(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    names = [
        "adapter_id",
        "adapter_source",
        "merged_adapters",
        "api_token",
        "best_of",
        "temperature",
        "repetition_penalty",
        "top_k",
        "top_p",
        "typical_p",
        "max_new_tokens",
        "return_full_text",
        "truncate",
        "seed",
        "response_format",
        "return_k_alternatives",
        "grammar",
        "top_n_tokens",
        "frequency_penalty",
        "presence_penalty",
        "stop",
    ]
    parameters = {**dict.fromkeys(names), "watermark": False, "details": True, "decoder_input_details": False}

    for body in ({"inputs": "Hi", "parameters": parameters}, {"inputs": "Hi", "parameters": None, "x": 1}):
        assert (await client.post("/", json={**body, "stream": False})).status_code == 200
    assert service.last.stop.max_tokens == 1000 - 3


async def test_L1_every_token_is_a_frame_and_the_last_one_ends(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("a", "", "b", "c")
    frames = await frames_of(client, {"inputs": "Hi", "parameters": {"max_new_tokens": 4, "details": True}})

    assert [frame["index"] for frame in frames] == [1, 2, 3, 4]
    assert [frame["token"]["text"] for frame in frames] == ["a", "", "b", "c"]
    assert all(set(frame["token"]) == {"id", "text", "logprob", "special", "skipped"} for frame in frames)
    assert [frame["generated_text"] for frame in frames] == [None, None, None, "abc"]
    assert [frame["details"] is None for frame in frames] == [True, True, True, False]


async def test_L5_details_are_always_there(client: httpx.AsyncClient) -> None:
    last = (await frames_of(client, {"inputs": "Hi"}))[-1]
    whole = (await client.post("/generate", json={"inputs": "Hi"})).json()

    for details in (last["details"], whole["details"]):
        assert details["finish_reason"] == "length"
        assert (details["prompt_tokens"], details["generated_tokens"]) == (3, 2)
        assert details["skipped_tokens"] == 0
    assert whole["details"]["tokens"] == []


async def test_tokens_are_listed_for_those_who_ask_for_details(client: httpx.AsyncClient) -> None:
    body = {"inputs": "Hi", "parameters": {"details": True}}
    details = (await client.post("/generate", json=body)).json()["details"]

    assert [token["text"] for token in details["tokens"]] == ["Once", " upon"]
    assert details["prefill"] == []


@pytest.mark.parametrize(
    ("reason", "stop", "word"),
    [
        (FinishReason.LENGTH, None, "length"),
        (FinishReason.STOP, None, "eos_token"),
        (FinishReason.STOP, "END", "stop_sequence"),
    ],
)
async def test_L4_finish_reasons(
    client: httpx.AsyncClient, service: FakeService, reason: FinishReason, stop: str | None, word: str
) -> None:
    service.script = words("a", "END", reason=reason, stop=stop)

    assert (await frames_of(client, {"inputs": "Hi"}))[-1]["details"]["finish_reason"] == word


async def test_end_of_sequence_token_is_a_special_frame(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = sentence_with_eos("a")
    last = (await frames_of(client, {"inputs": "Hi"}))[-1]

    assert last["token"]["special"]
    assert last["generated_text"] == "a"


async def test_L15_compat_route_answers_a_list_or_a_stream(client: httpx.AsyncClient) -> None:
    whole = await client.post("/", json={"inputs": "Hi"})
    frames = await frames_of(client, {"inputs": "Hi", "stream": True}, path="/")

    assert [set(answer) for answer in whole.json()] == [{"generated_text", "details"}]
    assert frames[-1]["generated_text"] == "Once upon"


async def test_generate_ignores_the_stream_field(client: httpx.AsyncClient) -> None:
    assert (await client.post("/generate", json={"inputs": "Hi", "stream": True})).json()["generated_text"]


async def test_L16_full_text_starts_with_the_prompt(client: httpx.AsyncClient) -> None:
    body = {"inputs": "Hi", "parameters": {"return_full_text": True}}
    frames = await frames_of(client, body)
    whole = (await client.post("/generate", json=body)).json()

    assert frames[-1]["generated_text"] == whole["generated_text"] == "HiOnce upon"
    assert [frame["token"]["text"] for frame in frames] == ["Once", " upon"]


async def test_truncate_keeps_the_last_tokens(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post("/generate", json={"inputs": "x" * 2000 + "end", "parameters": {"truncate": 3}})

    assert service.tokenizer.decode(service.last.prompts[0]) == "end"


async def test_chat_template_is_applied_where_asked(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post("/generate", json={"inputs": "Hi", "parameters": {"apply_chat_template": True}})

    assert service.tokenizer.decode(service.last.prompts[0]) == "<user>Hi<assistant>"


async def test_L17_tokens_for_adapters_are_accepted(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    body = {
        "inputs": "Hi",
        "parameters": {"adapter_id": "pirate", "api_token": "t", "adapter_source": "local"},
    }
    response = await client.post("/generate", json=body, headers={"authorization": "Bearer t"})

    assert response.headers["x-adapter-id"] == "pirate"


async def test_L18_info_has_the_fields_of_lorax_and_tgi(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()

    assert (info["model_id"], info["model_dtype"], info["model_device_type"]) == ("base", "float32", "cpu")
    assert info["max_total_tokens"] == 1000
    assert info["max_input_length"] == info["max_input_tokens"] == 999
    assert info["version"] == "1.2.3"


async def test_L18_tokenize_gives_ids_and_offsets(client: httpx.AsyncClient) -> None:
    with_bos = (await client.post("/tokenize", json={"inputs": "Hi"})).json()
    plain = (await client.post("/tokenize", json={"inputs": "Hi", "add_special_tokens": False})).json()

    assert [token["id"] for token in with_bos] == [1, 72, 105]
    assert plain == [
        {"id": 72, "text": "H", "start": 0, "stop": 1},
        {"id": 105, "text": "i", "start": 1, "stop": 2},
    ]


async def test_tokenize_works_on_long_texts(client: httpx.AsyncClient) -> None:
    assert len((await client.post("/tokenize", json={"inputs": "x" * 3900})).json()) == 3901
