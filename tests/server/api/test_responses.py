"""`/v1/responses`: what bodies mean, what the answers say, and what is kept of them.

Every object is read by the OpenAI SDK's own models, strictly. Streams are also golden files.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList

from server.api.app import build_app
from server.api.responses.conversations import ResponseStore
from server.api.responses.render import ResponsesWriter
from server.api.state import ServerState
from server.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.server.api.conftest import begin, connect, serve
from tests.server.api.fake_service import FakeService, finish_of, sentence_with_eos, token_event, words
from tests.server.api.openai_models import events_of, strictly

PATH = "/v1/responses"
HELLO: dict[str, Any] = {"model": "base", "input": "Hi"}


async def respond(client: httpx.AsyncClient, body: dict[str, Any], **options: Any) -> Response:
    answer = await client.post(PATH, json=body, **options)
    assert answer.status_code == 200, answer.text
    return strictly(Response, answer.json())


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
    answer = await client.post(PATH, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(answer.text)


def prompt_of(service: FakeService) -> str:
    return service.tokenizer.decode(service.last.prompts[0])


# --- Answers ----------------------------------------------------------------------------------------------


async def test_response_says_what_was_asked_and_what_it_cost(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = sentence_with_eos("Once", " upon")
    body = {
        **HELLO,
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "service_tier": "priority",
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "u",
    }
    response = await respond(client, body)

    assert response.id == "resp_id2"
    assert response.status == "completed"
    assert response.output_text == "Once upon"
    assert (response.created_at, response.completed_at) == (1764000000, 1764000000)
    assert response.model == "base"
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert (response.max_output_tokens, response.max_tool_calls) == (50, 3)
    assert (response.temperature, response.top_p) == (0.5, 0.9)
    assert (response.prompt_cache_key, response.prompt_cache_retention) == ("k", "24h")
    assert (response.safety_identifier, response.user) == ("s", "u")
    assert response.service_tier == "default"
    assert response.parallel_tool_calls is False
    assert response.store is True
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (36, 3)
    assert response.usage.total_tokens == 39
    assert service.is_idle


@pytest.mark.parametrize(
    ("reason", "stop", "status"),
    [
        (FinishReason.LENGTH, None, "incomplete"),
        (FinishReason.STOP, None, "completed"),
        (FinishReason.STOP, "END", "completed"),
    ],
)
async def test_status_says_whether_the_answer_came_to_its_end(
    client: httpx.AsyncClient, service: FakeService, reason: FinishReason, stop: str | None, status: str
) -> None:
    service.script = words("Once", " upon", reason=reason, stop=stop)
    response = await respond(client, HELLO)
    last = (await stream(client, HELLO))[-1]

    assert response.status == last.response.status == status
    assert last.type == f"response.{status}"
    assert response.output[0].status == status  # type: ignore[union-attr]
    details = response.incomplete_details
    assert (details and details.reason) == ("max_output_tokens" if status == "incomplete" else None)


async def test_stream_builds_the_response_event_by_event(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = sentence_with_eos("Once", " upon")
    events = await stream(client, HELLO)

    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.delta for event in events[4:6]] == ["Once", " upon"]
    assert events[0].response.output == []
    assert events[2].item.content == []
    assert events[6].text == events[7].part.text == events[8].item.content[0].text == "Once upon"
    assert events[9].response.output == [events[8].item]
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    assert len({event.item_id for event in events if hasattr(event, "item_id")} | {events[2].item.id}) == 1


async def test_stream_and_whole_answer_are_the_same_response(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("é\u2028", "語", reason=FinishReason.STOP)
    whole = await respond(client, HELLO)
    streamed = strictly(Response, (await stream(client, HELLO))[-1].response.model_dump())

    unlike = {"id", "output"}
    assert whole.model_dump(exclude=unlike) == streamed.model_dump(exclude=unlike)
    assert whole.output_text == streamed.output_text == "é\u2028語"


async def test_answer_without_text_is_a_message_all_the_same(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = sentence_with_eos()
    events = await stream(client, HELLO)

    assert [event.type for event in events if "delta" in event.type] == []
    assert events[-1].response.output_text == ""
    assert (await respond(client, HELLO)).output_text == ""


async def test_slow_reader_gets_joined_deltas(service: FakeService, client: httpx.AsyncClient) -> None:
    await respond(client, HELLO)
    kept: list[str] = []
    writer = ResponsesWriter(_FakeRender(), lambda text, _: kept.append(text), has_obfuscation=False)  # type: ignore[arg-type]
    pieces = [token_event("a"), token_event("b", finish=finish_of(service.last, "ab", 2))]
    frames = list(writer.frames(pieces, join=True))

    assert len(frames) == 5
    assert b'"delta":"ab"' in frames[-1]
    list(writer.end())
    assert kept == ["ab"]


class _FakeRender:
    place = '"item_id":"m"'

    def running(self) -> str:
        return "{}"

    def ended(self, finish: object, text: str) -> str:
        return "{}"

    def item(self, status: str, content: str) -> str:
        return "{}"

    def part(self, text: str) -> str:
        return "{}"


async def test_obfuscation_hides_the_length_of_a_delta_where_it_is_asked_for(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = words("I", " antidisestablishmentarianism", "é")
    plain = await client.post(PATH, json={**HELLO, "stream": True})
    padded = await client.post(
        PATH, json={**HELLO, "stream": True, "stream_options": {"include_obfuscation": True}}
    )
    deltas = [json.loads(line[6:]) for line in padded.text.split("\n") if '"delta":' in line]

    assert "obfuscation" not in plain.text
    assert len({len(json.dumps(delta)) for delta in deltas}) == 1
    assert "".join(delta["delta"] for delta in deltas) == "I antidisestablishmentarianismé"


# --- Bodies -----------------------------------------------------------------------------------------------


async def test_input_may_be_messages_of_parts(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "In English."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi "}] * 2},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Yo", "annotations": []}],
            },
            {"role": "user", "content": "Bye"},
        ],
    }
    await respond(client, body)

    assert service.tokenizer.rendered == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "In English."},
        {"role": "user", "content": "Hi Hi "},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    body = {
        "model": "pirate",
        "input": "Hi",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 42,
        "stop": ["x"],
        "max_output_tokens": 7,
    }
    response = await respond(client, body)

    assert response.model == "pirate"
    assert service.last.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=40, seed=42)
    assert (service.last.stop.max_tokens, service.last.stop.stop) == (7, ("x",))
    assert service.last.adapter is not None


async def test_without_a_limit_the_context_is_the_limit(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    await respond(client, HELLO)

    assert service.last.stop.max_tokens == 1000 - len(service.last.prompts[0])


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"include": ["never.heard_of"]}, "include"),
        ({"include": "reasoning.encrypted_content"}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": "low"}, "reasoning"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"stream_options": {}}, "stream_options"),
        ({"store": "yes"}, "store"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["Hi"]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
    ],
    ids=str,
)
async def test_what_is_wrong_or_not_served_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, field: dict[str, Any], param: str
) -> None:
    answer = await client.post(PATH, json={**HELLO, **field})

    assert answer.status_code == 400
    seen = answer.json()["error"]["param"]
    assert seen == param or seen.startswith(f"{param}.") or seen.startswith(f"{param}[")
    assert service.is_idle


async def test_values_that_ask_for_nothing_are_accepted(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {
        **HELLO,
        "background": False,
        "include": ["reasoning.encrypted_content", "file_search_call.results"],
        "tools": [],
        "tool_choice": "auto",
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "truncation": "disabled",
        "top_logprobs": 0,
        "conversation": None,
        "prompt": None,
        "never_heard_of": 1,
    }
    assert (await respond(client, body)).output_text == "Once upon"
    assert service.last.sampling == SamplingParams()


# --- Kept responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_response_can_be_read_again(
    client: httpx.AsyncClient, service: FakeService, is_stream: bool
) -> None:
    answer = await client.post(PATH, json={**HELLO, "stream": is_stream})
    response = events_of(answer.text)[-1].response if is_stream else strictly(Response, answer.json())
    again = await client.get(f"{PATH}/{response.id}")

    assert again.status_code == 200
    assert again.headers["content-type"] == "application/json"
    assert strictly(Response, again.json()).model_dump() == response.model_dump()


async def test_a_stored_conversation_goes_on(client: httpx.AsyncClient, service: FakeService) -> None:
    """Instructions are those of each request; what was said before is part of the prompt."""
    service.script = words("Yo", reason=FinishReason.STOP)
    first = await respond(client, {**HELLO, "instructions": "Be brief."})
    second = await respond(client, {"input": "And you?", "previous_response_id": first.id})

    assert second.previous_response_id == first.id
    assert prompt_of(service) == "<user>Hi<assistant>Yo<user>And you?<assistant>"

    await respond(client, {"input": "Bye", "previous_response_id": second.id, "instructions": "Be kind."})
    assert prompt_of(service) == (
        "<system>Be kind.<user>Hi<assistant>Yo<user>And you?<assistant>Yo<user>Bye<assistant>"
    )


async def test_a_conversation_outlives_the_responses_before_it(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    first = await respond(client, HELLO)
    second = await respond(client, {**HELLO, "previous_response_id": first.id})
    assert (await client.delete(f"{PATH}/{first.id}")).status_code == 200

    await respond(client, {**HELLO, "previous_response_id": second.id})
    assert prompt_of(service).count("<user>") == 3


async def test_a_conversation_can_go_on_in_two_ways(client: httpx.AsyncClient, service: FakeService) -> None:
    first = await respond(client, HELLO)
    await respond(client, {"input": "A", "previous_response_id": first.id})
    await respond(client, {"input": "B", "previous_response_id": first.id})

    assert "<user>A" not in prompt_of(service)


async def test_what_is_not_stored_cannot_be_had_again(client: httpx.AsyncClient) -> None:
    response = await respond(client, {**HELLO, "store": False})

    assert response.store is False
    assert (await client.get(f"{PATH}/{response.id}")).status_code == 404
    answer = await client.post(PATH, json={**HELLO, "previous_response_id": response.id})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")


async def test_responses_are_there_for_their_key_only(client: httpx.AsyncClient) -> None:
    alice, bob = {"authorization": "Bearer alice"}, {"authorization": "Bearer bob"}
    response = await respond(client, HELLO, headers=alice)
    path = f"{PATH}/{response.id}"

    for headers in (bob, {}, {"authorization": "Bearer "}):
        assert (await client.get(path, headers=headers)).status_code == 404
        assert (await client.get(f"{path}/input_items", headers=headers)).status_code == 404
        assert (await client.delete(path, headers=headers)).status_code == 404
        continued = {**HELLO, "previous_response_id": response.id}
        assert (await client.post(PATH, json=continued, headers=headers)).status_code == 400
    for headers in (alice, {"x-api-key": "alice"}):
        assert (await client.get(path, headers=headers)).status_code == 200


async def test_deleted_is_gone(client: httpx.AsyncClient) -> None:
    response = await respond(client, HELLO)
    deleted = await client.delete(f"{PATH}/{response.id}")

    assert deleted.json() == {"id": response.id, "object": "response", "deleted": True}
    assert (await client.get(f"{PATH}/{response.id}")).status_code == 404
    assert (await client.delete(f"{PATH}/{response.id}")).status_code == 404


async def test_oldest_responses_go_first(make_state: Callable[..., ServerState]) -> None:
    state = make_state()
    state.responses = ResponseStore(max_responses=2)
    async with connect(build_app(state)) as client:
        ids = [(await respond(client, HELLO)).id for _ in range(3)]

        assert [(await client.get(f"{PATH}/{id}")).status_code for id in ids] == [404, 200, 200]


async def test_a_response_is_there_before_its_last_event(
    port: int, manual: FakeService, state: ServerState
) -> None:
    """And not while it is under way."""
    connection, stream = await begin(port, manual, (PATH, {**HELLO, "stream": True}))
    stream.put(token_event("a"))
    await connection.read_head()
    while b"output_text.delta" not in await connection.read_chunk():
        pass
    assert len(state.responses) == 0

    stream.put(token_event("b", finish=finish_of(stream.request, "ab", 2)))
    while b"event: response.incomplete" not in await connection.read_chunk():
        pass
    assert len(state.responses) == 1
    connection.drop()


async def test_nothing_is_kept_of_what_a_client_left(
    port: int, manual: FakeService, state: ServerState
) -> None:
    connection, stream = await begin(port, manual, (PATH, {**HELLO, "stream": True}))
    stream.put(token_event("a"))
    await connection.read_head()
    connection.drop()

    await asyncio.wait_for(stream.closed.wait(), 10)
    assert len(state.responses) == 0
    assert manual.is_idle


async def test_there_is_nothing_to_cancel(client: httpx.AsyncClient) -> None:
    response = await respond(client, HELLO)

    assert (await client.post(f"{PATH}/{response.id}/cancel")).status_code == 400
    assert (await client.post(f"{PATH}/resp_nothing/cancel")).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"), [("?stream=true", "stream"), ("?include[]=message.output_text.logprobs", "include")]
)
async def test_what_reading_again_cannot_do_is_refused_by_name(
    client: httpx.AsyncClient, query: str, param: str
) -> None:
    response = await respond(client, HELLO)
    answer = await client.get(f"{PATH}/{response.id}{query}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_methods_that_are_not_there_are_named(client: httpx.AsyncClient) -> None:
    answer = await client.put(f"{PATH}/resp_1")

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, DELETE, OPTIONS")


# --- Input items ------------------------------------------------------------------------------------------


async def test_input_items_are_all_that_went_in(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = words("Yo", reason=FinishReason.STOP)
    first = await respond(client, HELLO)
    second = await respond(
        client,
        {
            "previous_response_id": first.id,
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "input_text", "text": t} for t in "AB"]},
            ],
        },
    )
    answer = await client.get(f"{PATH}/{second.id}/input_items?order=asc")
    items = strictly(ResponseItemList, answer.json())

    shown: list[Any] = items.data
    assert [(item.role, [part.text for part in item.content]) for item in shown] == [
        ("user", ["Hi"]),
        ("assistant", ["Yo"]),
        ("developer", ["Be brief."]),
        ("user", ["A", "B"]),
    ]
    assert shown[1].id == first.output[0].id
    assert len({item.id for item in shown}) == 4
    assert (items.first_id, items.last_id, items.has_more) == (shown[0].id, shown[3].id, False)


async def test_input_items_come_newest_first_and_in_pages(client: httpx.AsyncClient) -> None:
    body = {"input": [{"role": "user", "content": str(i)} for i in range(45)]}
    response = await respond(client, body)
    seen, query = [], ""
    for _ in range(3):
        page = (await client.get(f"{PATH}/{response.id}/input_items{query}")).json()
        seen += [item["content"][0]["text"] for item in page["data"]]
        query = f"?after={page['last_id']}"

    assert seen == [str(i) for i in reversed(range(45))]
    assert page["has_more"] is False
    beyond = (await client.get(f"{PATH}/{response.id}/input_items{query}")).json()
    assert (beyond["data"], beyond["first_id"], beyond["has_more"]) == ([], None, False)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=²", "order=up", "after=nothing"])
async def test_wrong_pages_are_refused_by_name(client: httpx.AsyncClient, query: str) -> None:
    response = await respond(client, HELLO)
    answer = await client.get(f"{PATH}/{response.id}/input_items?{query}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])


# --- Failures ---------------------------------------------------------------------------------------------


def breaks_after_one_token(request: GenerationRequest) -> list[TokenEvent]:
    finish = finish_of(request, "a", 1, reason=FinishReason.ERROR, error="logits were not finite")
    return [token_event("a"), TokenEvent(0, "", None, finish)]


async def test_failure_in_a_stream_is_the_last_event_and_is_kept(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.script = breaks_after_one_token
    events = await stream(client, HELLO)
    last = events[-1]

    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")
    assert last.response.error.message == "logits were not finite"
    assert last.response.output_text == "a"
    assert last.response.output[0].status == "incomplete"
    assert service.is_idle
    again = await client.get(f"{PATH}/{last.response.id}")
    assert strictly(Response, again.json()).model_dump() == last.response.model_dump()


async def test_failure_before_the_first_token_but_after_the_head_begins_a_response_all_the_same(
    manual: FakeService, make_state: Callable[..., ServerState]
) -> None:
    """Helpers of the SDK break on a stream that does not begin with `response.created`."""
    async with serve(build_app(make_state(header_deadline_s=0.01))) as port:
        connection, stream = await begin(port, manual, (PATH, {**HELLO, "stream": True}))
        await connection.read_head()  # the deadline has passed
        finish = finish_of(stream.request, "", 0, reason=FinishReason.ERROR, error="out of memory")
        stream.put(TokenEvent(0, "", None, finish))
        chunks = []
        while chunk := await connection.read_chunk():
            chunks.append(chunk.decode())
        connection.drop()
    events = events_of("".join(chunks))

    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert events[-1].response.output == []


async def test_failure_of_a_whole_answer_is_a_status(client: httpx.AsyncClient, service: FakeService) -> None:
    service.script = breaks_after_one_token
    answer = await client.post(PATH, json=HELLO)

    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "logits were not finite"


async def test_unknown_model_is_404_in_openais_shape(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={**HELLO, "model": "nobody", "stream": True})

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
