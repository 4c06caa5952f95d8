"""What OpenAI bodies mean: the request that reaches the service.

Rows Z13, Z14, Z18, C4, C6, L9.
"""

import dataclasses
from typing import Any

import httpx
import pytest

from adapters.types import AdapterRef, AdapterUse
from server.types import SamplingDefaults, SamplingParams
from tests.server.api.fake_service import FakeService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_every_sampling_field_reaches_the_engine(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {
        **HELLO,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "6": 2.5},
        "seed": 42,
        "n": 3,
        "max_tokens": 50,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 4,
    }
    assert (await client.post(CHAT, json=body)).status_code == 200

    request = service.last
    assert request.sampling == SamplingParams(
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias=((5, -100.0), (6, 2.5)),
        seed=42,
        num_logprobs=4,
    )
    assert (request.n, request.stop.max_tokens, request.stop.min_tokens) == (3, 50, 2)
    assert (request.stop.stop, request.stop.stop_token_ids) == (("a", "b"), (7,))
    assert request.stop.ignore_eos
    assert not request.stop.keep_stop
    assert request.received == 100.0


async def test_nothing_given_is_openais_defaults(client: httpx.AsyncClient, service: FakeService) -> None:
    """C4: no max_tokens on chat is what the context leaves, on completions 16."""
    await client.post(CHAT, json=HELLO)
    assert service.last.sampling == SamplingParams()
    assert service.last.stop.max_tokens == 1000 - len(service.last.prompts[0])

    await client.post(COMPLETIONS, json={"prompt": "Hi"})
    assert service.last.stop.max_tokens == 16


async def test_models_own_defaults_come_between_request_and_openai(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    usual = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05)
    service.card = dataclasses.replace(service.card, generation_defaults=usual)
    await client.post(CHAT, json={**HELLO, "temperature": 0, "top_k": -1})

    sampling = service.last.sampling
    assert sampling.is_greedy
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (
        0,
        0.95,
        0.05,
        1.05,
    )


async def test_Z18_explicit_nulls_and_unknown_fields_change_nothing(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    names = [
        "model",
        "lora_id",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "response_format",
        "best_of",
        "functions",
        "user",
        "metadata",
        "echo",
        "suffix",
    ]
    body = {**HELLO, **dict.fromkeys(names), "store": True, "never_heard_of": {"a": [1]}}

    assert (await client.post(CHAT, json=body)).status_code == 200
    assert service.last.sampling == SamplingParams()


@pytest.mark.parametrize(
    "neutral",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"best_of": 1},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"logit_bias": {}},
        {"stop": []},
        {"top_k": 0},
        {"echo": False},
        {"length_penalty": 1.0},
        {"skip_special_tokens": True},
    ],
    ids=str,
)
async def test_values_that_ask_for_nothing_are_accepted(
    client: httpx.AsyncClient, service: FakeService, neutral: dict[str, Any]
) -> None:
    assert (await client.post(CHAT, json={**HELLO, **neutral})).status_code == 200
    assert service.last.sampling.num_logprobs is None


async def test_completions_take_false_for_no_logprobs(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    assert (await client.post(COMPLETIONS, json={"prompt": "Hi", "logprobs": False})).status_code == 200
    assert service.last.sampling.num_logprobs is None


@pytest.mark.parametrize(
    "name", ["base", "other-name", "", "default", "tgi", "dummy", "__base_model__", None]
)
async def test_Z13_L9_all_names_of_the_base_are_the_base(
    client: httpx.AsyncClient, service: FakeService, name: str | None
) -> None:
    response = await client.post(CHAT, json={**HELLO, "model": name})

    assert response.json()["model"] == "base"
    assert response.headers["x-adapter-id"] == "__base_model__"
    assert service.last.adapter is None


@pytest.mark.parametrize(
    "choice",
    [
        {"model": "pirate"},
        {"lora_id": "pirate"},
        {"model": "base", "lora_id": "pirate"},
        {"model": "pirate", "lora_id": ""},
        {"model": "base:pirate"},
        {"model": "other-name:pirate"},
        {"lora_id": "base:pirate"},
        {"model": "base:pirate", "lora_id": "pirate"},
        {"model": "pirate", "lora_id": "base:pirate"},
    ],
)
async def test_Z14_L9_adapter_is_chosen_by_model_or_lora_id(
    client: httpx.AsyncClient, service: FakeService, choice: dict[str, str]
) -> None:
    info = service.registry.add("pirate")
    response = await client.post(CHAT, json={**HELLO, **choice})

    assert response.json()["model"] == "pirate"
    assert response.headers["x-adapter-id"] == "pirate"
    assert response.headers["x-adapter-source"] == "local"
    assert service.last.adapter == AdapterUse.of(AdapterRef("pirate", info.ref.revision))


@pytest.mark.parametrize(
    "name", ["base:", "base:nobody", "base:default", "base:base", "other:pirate", ":pirate"]
)
async def test_Z14_missing_adapter_of_a_base_is_404(
    client: httpx.AsyncClient, service: FakeService, name: str
) -> None:
    service.registry.add("pirate")

    assert (await client.post(CHAT, json={**HELLO, "model": name})).status_code == 404
    assert (await client.get(f"/v1/models/{name}")).status_code == 404


async def test_Z14_adapter_whose_own_name_begins_like_the_base_is_found_by_it(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    service.registry.add("base:pirate", "/adapters/two")

    assert (await client.post(CHAT, json={**HELLO, "model": "base:pirate"})).json()["model"] == "base:pirate"


async def test_C6_text_parts_are_joined_and_null_is_empty(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "function", "content": "3", "name": "f"},
    ]
    assert (await client.post(CHAT, json={"messages": messages})).status_code == 200

    seen = service.tokenizer.rendered
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "tool", "tool"]
    assert [message["content"] for message in seen] == ["Be brief.", "Hi you", "", "2", "3"]
    assert seen[2]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"a": 1}}}]
    assert seen[3]["tool_call_id"] == "1"


async def test_chat_without_a_template_is_refused(client: httpx.AsyncClient, service: FakeService) -> None:
    service.tokenizer.has_chat_template = False
    response = await client.post(CHAT, json=HELLO)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert service.is_idle


async def test_last_message_can_be_continued(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {
        "messages": [{"role": "assistant", "content": "So"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    await client.post(CHAT, json=body)

    assert service.tokenizer.decode(service.last.prompts[0]) == "<assistant>So"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"]])
async def test_completion_prompt_may_be_text(
    client: httpx.AsyncClient, service: FakeService, prompt: object
) -> None:
    await client.post(COMPLETIONS, json={"prompt": prompt})

    assert service.last.prompts[0] == (1, ord("H"), ord("i"))


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]]])
async def test_completion_prompt_may_be_ids(
    client: httpx.AsyncClient, service: FakeService, prompt: object
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": prompt})

    assert service.last.prompts[0] == (72, 105)
    assert response.headers["x-compute-characters"] == "2"


async def test_long_prompts_are_tokenised_in_the_pool(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.card = dataclasses.replace(service.card, max_model_len=300_000)
    messages = [{"role": "user", "content": "x" * 100_000}]

    assert (await client.post(CHAT, json={"messages": messages})).status_code == 200
    assert len(service.last.prompts[0]) > 100_000


async def test_max_completion_tokens_wins_over_max_tokens(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await client.post(CHAT, json={**HELLO, "max_tokens": 9, "max_completion_tokens": 5})

    assert service.last.stop.max_tokens == 5


async def test_stop_string_is_kept_where_asked(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(CHAT, json={**HELLO, "stop": "x", "include_stop_str_in_output": True})

    assert service.last.stop.keep_stop
    assert service.last.stop.stop == ("x",)
