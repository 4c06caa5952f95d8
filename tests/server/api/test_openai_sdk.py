"""What the OpenAI Python SDK makes of our answers, also of broken ones. Rows C5, U2, U3, Z2; more in e2e."""

import asyncio
from collections.abc import AsyncIterator, Callable

import openai
import pytest

from server.api.app import build_app
from server.api.state import ApiOptions, ServerState
from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.conftest import serve
from tests.server.api.fake_service import FakeService, finish_of, token_event, words
from tests.server.api.raw_http import until


@pytest.fixture
async def sdk(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0
    ) as client:
        yield client


def breaks_after_one_token(request: GenerationRequest) -> list[TokenEvent]:
    finish = finish_of(request, "a", 1, reason=FinishReason.ERROR, error="logits were not finite")
    return [token_event("a"), TokenEvent(0, "", None, finish)]


async def test_C5_chat_stream_is_iterated_and_each_content_is_text_or_none(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    contents = [chunk.choices[0].delta.content async for chunk in stream]

    assert contents == ["Once", " upon", None]


async def test_T1_T5_comments_are_no_events_and_rare(
    make_state: Callable[..., ServerState], manual: FakeService
) -> None:
    """The SDK passes over any number of them between two tokens; who reads worse gets few, or none."""
    async with (
        serve(build_app(make_state(keep_alive_s=0.001))) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any") as sdk,
    ):
        asking = asyncio.create_task(
            sdk.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        )
        source = await asyncio.wait_for(manual.streams.get(), 10)
        source.put(token_event("One"))
        stream = await asking
        contents = [(await anext(stream)).choices[0].delta.content]
        following = asyncio.create_task(anext(stream))
        enough = stream.response.num_bytes_downloaded + 3 * len(": keep-alive\n\n")
        await until(lambda: stream.response.num_bytes_downloaded >= enough)
        assert not following.done()
        source.put(token_event(" two", finish=finish_of(source.request, "One two", 2)))
        contents += [(await following).choices[0].delta.content]
        contents += [chunk.choices[0].delta.content async for chunk in stream]

    assert contents == ["One", " two", None]
    assert ApiOptions().keep_alive_s == 15


async def test_U2_error_in_a_stream_is_an_exception_with_our_message(
    sdk: openai.AsyncOpenAI, service: FakeService
) -> None:
    service.script = breaks_after_one_token
    stream = await sdk.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    assert (await anext(stream)).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError, match="logits were not finite"):
        await anext(stream)


async def test_U3_headers_can_be_read_before_the_stream(sdk: openai.AsyncOpenAI) -> None:
    create = sdk.completions.with_streaming_response.create
    async with create(model="base", prompt="Hi", stream=True) as response:
        assert response.headers["x-adapter-id"] == "__base_model__"
        assert response.headers["x-prompt-tokens"] == "3"
        assert int(response.headers["x-compute-time"]) >= 0


async def test_refusals_carry_param_code_and_request_id(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.completions.create(model="base", prompt="Hi", temperature=3)

    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    assert caught.value.request_id == "id1"


async def test_final_chunk_has_the_text_and_the_details(sdk: openai.AsyncOpenAI) -> None:
    """Z2, T3: and every chunk has a choice."""
    stream = await sdk.completions.create(model="base", prompt="Hi", stream=True)
    chunks = [chunk async for chunk in stream]

    assert all(chunk.choices for chunk in chunks)
    extra = chunks[-1].model_extra or {}
    assert extra["generated_text"] == "Once upon"
    assert extra["details"]["generated_tokens"] == 2


async def test_responses_are_made_streamed_read_and_deleted_by_the_sdk(
    sdk: openai.AsyncOpenAI, service: FakeService
) -> None:
    service.script = words("Once", " upon", reason=FinishReason.STOP)
    response = await sdk.responses.create(model="base", input="Hi")
    raw = await sdk.responses.create(model="base", input="Bye", previous_response_id=response.id, stream=True)
    events = [event async for event in raw]
    items = [item async for item in sdk.responses.input_items.list(events[-1].response.id, limit=1)]  # type: ignore[union-attr]

    assert response.output_text == "Once upon"
    assert (await sdk.responses.retrieve(response.id)).output_text == "Once upon"
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == [
        "Once",
        " upon",
    ]
    assert len(items) == 3  # page by page
    await sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(response.id)


async def test_responses_helper_follows_a_stream_to_its_end(
    sdk: openai.AsyncOpenAI, service: FakeService
) -> None:
    service.script = words("Once", " upon", reason=FinishReason.STOP)
    async with sdk.responses.stream(model="base", input="Hi") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()

    assert snapshots == ["Once", "Once upon"]
    assert (final.status, final.output_text) == ("completed", "Once upon")


async def test_failed_response_reaches_the_helper_as_its_last_event(
    sdk: openai.AsyncOpenAI, service: FakeService
) -> None:
    service.script = breaks_after_one_token
    async with sdk.responses.stream(model="base", input="Hi") as stream:
        events = [event async for event in stream]

    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message == "logits were not finite"


async def test_responses_refusals_carry_their_parameter(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.create(model="base", input="Hi", background=True)
    assert caught.value.param == "background"

    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.create(model="base", input="Hi", previous_response_id="resp_nothing")
    assert caught.value.code == "previous_response_not_found"
