"""What the OpenAI Python SDK makes of our answers, also of broken ones. Rows C5, U2, U3, Z2; more in e2e."""

from collections.abc import AsyncIterator

import openai
import pytest

from server.types import FinishReason, GenerationRequest, TokenEvent
from tests.server.api.fake_service import FakeService, finish_of, token_event


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
    """Z2: and every chunk has a choice."""
    stream = await sdk.completions.create(model="base", prompt="Hi", stream=True)
    chunks = [chunk async for chunk in stream]

    assert all(chunk.choices for chunk in chunks)
    extra = chunks[-1].model_extra or {}
    assert extra["generated_text"] == "Once upon"
    assert extra["details"]["generated_tokens"] == 2
