"""What LoRAX bodies mean, and the parts of their answers that golden files do not show.

Rows L1, L4, L5, L6, L15 to L17, U6. Merged adapters (L8) are in test_adapter_choice.py and
test_bad_input.py.
"""

import json
import logging
from typing import Any

import httpx
import pytest

from server.errors import Overloaded
from server.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.server.api.fake_service import FakeService, finish_of, sentence_with_eos, words


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
        ({"typical_p": 1.0}, 0.0),
        ({"typical_p": 0.9}, 1.0),
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
        "typical_p": 0.8,
        "do_sample": True,
        "max_new_tokens": 12,
        "ignore_eos_token": True,
        "stop": ["a", "b", "c", "d", "e"],
        "return_k_alternatives": 3,
        "top_n_tokens": 2,
        "seed": 2**64 - 1,
    }
    await client.post("/generate", json={"inputs": "Hi", "parameters": parameters})

    assert service.last.sampling == SamplingParams(
        temperature=0.5,
        top_k=10,
        top_p=0.95,
        typical_p=0.8,
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
    """T15: no token comes twice."""
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


async def test_L17_tokens_for_adapters_are_never_logged(
    client: httpx.AsyncClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of a request that is served, nor of one that is refused, nor of one that fails."""
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": "Bearer secret-of-mine"}

    def failing(request: GenerationRequest) -> list[TokenEvent]:
        end = finish_of(request, "", 0, reason=FinishReason.ERROR, error="out of memory")
        return [TokenEvent(0, "", None, end)]

    statuses = []
    for script, parameters in [(words("a"), {}), (words("a"), {"top_k": 0}), (failing, {})]:
        service.script = script
        body = {"inputs": "Hi", "parameters": {"api_token": "secret-of-mine", **parameters}}
        statuses.append((await client.post("/generate", json=body, headers=headers)).status_code)

    assert statuses == [200, 422, 424]
    assert "secret-of-mine" not in caplog.text


@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream"])
async def test_L13_full_queue_is_an_overloaded_model(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    """Before the stream, where LoRAX says it inside one."""
    service.refusal = Overloaded("10 sequences are running or waiting; try again later", retry_after_s=3)
    response = await client.post(path, json={"inputs": "Hi", "stream": True})

    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


async def test_refused_template_is_an_error_of_its_own(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.tokenizer.has_chat_template = False
    body = {"inputs": "Hi", "parameters": {"apply_chat_template": True}}
    response = await client.post("/generate", json=body)

    assert response.status_code == 422
    assert response.json()["error_type"] == "template_error"
    assert response.json()["error"].startswith(
        "Failed applying chat template to inputs: this model has no chat"
    )


# --- POST /invocations ----------------------------------------------------------------------------------


async def test_invocation_with_inputs_is_the_compat_route(client: httpx.AsyncClient) -> None:
    """L15's route under SageMaker's name; `inputs` wins over what other protocols call their prompt."""
    whole = await client.post("/invocations", json={"inputs": "Hi", "messages": 5})
    frames = await frames_of(client, {"inputs": "Hi", "stream": True}, path="/invocations")

    assert [answer["generated_text"] for answer in whole.json()] == ["Once upon"]
    assert frames[-1]["generated_text"] == "Once upon"


async def test_invocation_with_messages_is_a_chat_and_with_a_prompt_a_completion(
    client: httpx.AsyncClient,
) -> None:
    chat = await client.post("/invocations", json={"messages": [{"role": "user", "content": "Hi"}]})
    completion = await client.post("/invocations", json={"prompt": "Hi"})
    streamed = await client.post("/invocations", json={"prompt": "Hi", "stream": True})

    assert chat.json()["choices"][0]["message"]["content"] == "Once upon"
    assert completion.json()["choices"][0]["text"] == "Once upon"
    assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "inputs: field required"),
        ({"inputs": "Hi", "parameters": {"top_k": 0}}, "`top_k` must be strictly positive"),
        ({"messages": []}, "messages: "),
        ({"prompt": "Hi", "n": 0}, "n: "),
    ],
    ids=str,
)
async def test_invocations_are_refused_in_one_shape(
    client: httpx.AsyncClient, body: dict[str, Any], text: str
) -> None:
    response = await client.post("/invocations", json=body)

    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"
    assert response.json()["error"].startswith(f"Input validation error: {text}")
