"""Every field that OpenAI's own SDK can send is read, refused by name or ignored on purpose. Row Z18."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel

from server.api.openai import schema as openai_schema
from server.api.responses import schema as responses_schema
from server.types import GenerationRequest, SamplingParams, TokenEvent
from tests.server.api.fake_service import FakeService, finish_of, token_event

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}

NOTES = {"user", "metadata", "safety_identifier", "store"}  # to the operator; chats are not stored
HINTS = {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction"}  # for speed
WITHOUT_TOOLS_NOTHING = {"parallel_tool_calls"}


@pytest.mark.parametrize(
    ("params", "schema", "neutral", "ignored"),
    [
        (
            chat_params.CompletionCreateParamsBase,
            openai_schema.ChatBody,
            openai_schema.CHAT_NEUTRAL,
            NOTES | HINTS | WITHOUT_TOOLS_NOTHING,
        ),
        (
            CompletionCreateParamsBase,
            openai_schema.CompletionBody,
            openai_schema.COMPLETION_NEUTRAL,
            {"user"},
        ),
        (
            ResponseCreateParamsBase,
            responses_schema.ResponsesBody,
            {**responses_schema.NEUTRAL, "reasoning": (), "text": ()},
            {"prompt_cache_options"},
        ),
    ],
    ids=["chat", "completions", "responses"],
)
def test_Z18_every_field_of_the_sdk_is_decided_on(
    params: type, schema: type[BaseModel], neutral: Mapping[str, object], ignored: set[str]
) -> None:
    """A new version of the SDK that brings a new field fails here."""
    sent = set(params.__annotations__)
    read = set(schema.model_fields)

    assert sent - read - set(neutral) == ignored
    assert not read & ignored


IGNORED: dict[str, Any] = {
    "user": "u",
    "metadata": {"a": "b"},
    "safety_identifier": "s",
    "store": True,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "prediction": {"type": "content", "content": "Once"},
    "parallel_tool_calls": False,
}


@pytest.mark.parametrize("name", sorted(NOTES | HINTS | WITHOUT_TOOLS_NOTHING))
async def test_ignored_fields_change_nothing(
    client: httpx.AsyncClient, service: FakeService, name: str
) -> None:
    plain = (await client.post(CHAT, json=HELLO)).json()
    asked = service.last
    with_it = (await client.post(CHAT, json={**HELLO, name: IGNORED[name]})).json()

    assert dataclasses.replace(service.last, request_id=asked.request_id) == asked
    assert {**with_it, "id": plain["id"]} == plain


@pytest.mark.parametrize(
    "neutral",
    [
        {"verbosity": "medium"},
        {"reasoning_effort": "none"},
        {"functions": []},
        {"function_call": "auto"},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"moderation": None},
        {"web_search_options": None},
    ],
    ids=str,
)
async def test_values_that_ask_for_what_happens_anyway_are_accepted(
    client: httpx.AsyncClient, service: FakeService, neutral: dict[str, Any]
) -> None:
    assert (await client.post(CHAT, json={**HELLO, **neutral})).status_code == 200
    assert service.last.sampling == SamplingParams()


@pytest.mark.parametrize(
    "asked",
    [
        {"verbosity": "low"},
        {"reasoning_effort": "high"},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"modalities": ["text", "audio"]},
        {"moderation": {"model": "m"}},
        {"web_search_options": {}},
        {"response_format": {"type": "json_object"}},
    ],
    ids=str,
)
async def test_what_would_change_the_answer_is_refused_by_name(
    client: httpx.AsyncClient, asked: dict[str, Any]
) -> None:
    response = await client.post(CHAT, json={**HELLO, **asked})

    assert response.status_code == 400
    assert response.json()["error"]["param"] in asked


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "priority"])
async def test_service_tier_is_answered_with_the_only_one(client: httpx.AsyncClient, tier: str) -> None:
    whole = (await client.post(CHAT, json={**HELLO, "service_tier": tier})).json()
    streamed = (await client.post(CHAT, json={**HELLO, "service_tier": tier, "stream": True})).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]

    assert whole["service_tier"] == "default"
    assert {chunk["service_tier"] for chunk in chunks} == {"default"}
    assert "service_tier" not in (await client.post(CHAT, json=HELLO)).json()


async def test_service_tier_must_be_a_name(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={**HELLO, "service_tier": 1})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "service_tier")


async def test_calls_in_the_old_style_reach_the_template_in_the_new_one(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "function_call": call, "tool_calls": None, "refusal": None},
        {"role": "function", "name": "f", "content": "2"},
    ]
    assert (await client.post(CHAT, json={"messages": messages})).status_code == 200

    assert service.tokenizer.rendered[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]


# --- stream_options ---------------------------------------------------------------------------------------


def uneven(request: GenerationRequest) -> list[TokenEvent]:
    """Choices of different lengths, and an "é" of two tokens."""
    pieces = {0: ["One", "", "é", " 語", "."], 1: ["two"], 2: ["", "", "x y"]}
    events = []
    for index in range(request.num_choices):
        texts = pieces[index]
        for i, text in enumerate(texts):
            finish = finish_of(request, "".join(texts), len(texts)) if i == len(texts) - 1 else None
            events.append(token_event(text, index=index, finish=finish))
    return events


async def chunks_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_running_usage_counts_all_choices_so_far(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    service.script = uneven
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chunks_of(client, path, {**HELLO, "prompt": "Hi", "n": 3, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]

    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-2:] == [9, 9]
    assert all(
        chunk["usage"]["total_tokens"]
        == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
        for chunk in chunks
    )
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_obfuscation_makes_equal_lengths_and_only_where_it_is_asked_for(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    def script(request: GenerationRequest) -> list[TokenEvent]:
        pieces = ["a", " quite long piece", "é", "x"]
        events = [token_event(piece) for piece in pieces]
        return [*events, token_event("", id=2, finish=finish_of(request, "".join(pieces), 5))]

    service.script = script
    body = {**HELLO, "prompt": "Hi"}
    plain = await chunks_of(client, path, {**body, "stream_options": {"include_obfuscation": False}})
    padded = await chunks_of(client, path, {**body, "stream_options": {"include_obfuscation": True}})

    assert not any("obfuscation" in chunk for chunk in plain)
    assert len({len(json.dumps(chunk)) for chunk in padded[1:4]}) == 1  # the first one has the role as well
    assert [chunk["choices"] for chunk in padded] == [chunk["choices"] for chunk in plain]


# --- Z11 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_by": "word"},
        {"chunk_by": "word", "chunk_size": 2},
        {"chunk_by": "sentence"},
        {"chunk_size": 2},
        {"chunk_by": "token", "chunk_size": 1000},
    ],
    ids=str,
)
async def test_Z11_each_choice_says_the_same_however_it_is_cut(
    client: httpx.AsyncClient, service: FakeService, path: str, options: dict[str, Any]
) -> None:
    service.script = uneven
    chunks = await chunks_of(client, path, {**HELLO, "prompt": "Hi", "n": 3, "stream_options": options})
    texts = ["", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
        if "generated_text" in chunk:  # nothing comes after it
            assert texts[choice["index"]] == chunk["generated_text"]

    assert texts == ["Oneé 語.", "two", "x y"]
    assert sum("generated_text" in chunk for chunk in chunks) == 3


async def test_Z11_tokens_without_text_of_their_own_count(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = uneven
    chunks = await chunks_of(client, CHAT, {**HELLO, "stream_options": {"chunk_size": 2}})

    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["One", "é 語", ".", None]


async def test_Z11_logprobs_are_those_of_the_tokens_in_a_chunk(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = uneven
    body = {**HELLO, "logprobs": True, "stream_options": {"chunk_size": 2}}
    chunks = await chunks_of(client, CHAT, body)
    counts = [len((chunk["choices"][0].get("logprobs") or {"content": []})["content"]) for chunk in chunks]

    assert counts == [2, 2, 1, 0]


@pytest.mark.parametrize(
    "options", [{"chunk_by": "line"}, {"chunk_size": 0}, {"chunk_size": 2000}, {"chunk_size": "5"}], ids=str
)
async def test_Z11_wrong_chunks_are_refused_by_name(
    client: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    response = await client.post(CHAT, json={**HELLO, "stream": True, "stream_options": options})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"stream_options.{next(iter(options))}"
