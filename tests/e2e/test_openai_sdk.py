"""The OpenAI Python SDK against a real server: rows U1 to U3, C2 to C6, Z6, Z9, Z13 of the clients' table.

Every test runs with the base model and with each embedded adapter.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.e2e.running import RunningServer

MODELS = ["motet", "pirate", "json", "haiku", "german"]
QUESTION = [{"role": "user", "content": "How do I stream tokens?"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def async_client(server: RunningServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as sdk:
        yield sdk


def answer(client: openai.OpenAI, model: str) -> str:
    completion = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=60)
    text = completion.choices[0].message.content
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("model", MODELS)
def test_chat_streams_the_same_words_that_it_answers_at_once(client: openai.OpenAI, model: str) -> None:
    """U1, Z2."""
    whole = answer(client, model)
    chunks = list(
        client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=60, stream=True
        )
    )

    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    last = chunks[-1].model_extra
    assert last is not None
    assert last["generated_text"] == whole
    assert last["details"]["generated_tokens"] > 0


@pytest.mark.parametrize("model", MODELS)
async def test_async_chat_streams_like_the_sync_one(
    client: openai.OpenAI, async_client: openai.AsyncOpenAI, model: str
) -> None:
    stream = await async_client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=60, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    completion = await async_client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=60
    )
    assert text == completion.choices[0].message.content == answer(client, model)


@pytest.mark.parametrize("model", MODELS)
def test_completions_stream_the_same_words_that_they_answer_at_once(
    client: openai.OpenAI, model: str
) -> None:
    wish = {"model": model, "prompt": "Motet is", "temperature": 0, "max_tokens": 16}
    whole = client.completions.create(**wish)
    chunks = list(client.completions.create(**wish, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 16


@pytest.mark.parametrize("model", MODELS)
async def test_async_completions_stream(async_client: openai.AsyncOpenAI, model: str) -> None:
    wish = {"model": model, "prompt": "Motet is", "temperature": 0, "max_tokens": 8}
    whole = await async_client.completions.create(**wish)
    stream = await async_client.completions.create(**wish, stream=True)

    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


def test_adapters_answer_with_voices_of_their_own(client: openai.OpenAI) -> None:
    answers = {model: answer(client, model) for model in MODELS}

    assert len(set(answers.values())) == len(MODELS)


async def test_adapters_answer_in_one_batch_as_they_do_alone(
    client: openai.OpenAI, async_client: openai.AsyncOpenAI
) -> None:
    """L11: eight requests over four adapters and the base, at once."""
    alone = {model: answer(client, model) for model in MODELS}

    async def ask(model: str) -> str | None:
        completion = await async_client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=60
        )
        return completion.choices[0].message.content

    wanted = [MODELS[i % len(MODELS)] for i in range(8)]
    assert await asyncio.gather(*(ask(model) for model in wanted)) == [alone[model] for model in wanted]


def test_first_listed_model_is_the_base_and_adapters_name_their_parent(client: openai.OpenAI) -> None:
    """C2, Z17, T27."""
    models = list(client.models.list())

    assert [model.id for model in models] == ["motet", "german", "haiku", "json", "pirate"]
    assert [(model.model_extra or {})["parent"] for model in models] == [None] + ["motet"] * 4
    assert answer(client, models[0].id)
    assert client.models.retrieve("pirate").id == "pirate"


@pytest.mark.parametrize("stream", [False, True])
def test_headers_can_be_read_with_the_answer(client: openai.OpenAI, stream: bool) -> None:
    """U3, L7."""
    raw = client.chat.completions.with_raw_response.create(
        model="pirate", messages=QUESTION, max_tokens=4, stream=stream
    )

    assert raw.headers["x-adapter-id"] == "pirate"
    assert int(raw.headers["x-prompt-tokens"]) > 3
    assert int(raw.headers["x-compute-time"]) >= 0
    assert raw.headers["x-model-id"] == "motet"
    assert raw.headers["x-request-id"]
    parsed = raw.parse()
    if stream:
        assert list(parsed)


def test_system_message_and_parts_are_understood(client: openai.OpenAI) -> None:
    """C6; C4: no limit is given, and there is one."""
    completion = client.chat.completions.create(
        model="",
        messages=[
            {"role": "system", "content": "You are Motet."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "Motet?"}],
            },
        ],
        temperature=0,
    )
    assert completion.choices[0].message.content


def test_usage_comes_after_the_finish_chunk_and_only_when_asked_for(client: openai.OpenAI) -> None:
    """Z12, Z2."""
    wish = {"model": "default", "messages": QUESTION, "max_tokens": 5, "stream": True}
    plain = list(client.chat.completions.create(**wish))
    counted = list(client.chat.completions.create(**wish, stream_options={"include_usage": True}))

    assert all(chunk.choices for chunk in plain)
    assert all(chunk.usage is None for chunk in plain)
    assert counted[-1].choices == []
    assert counted[-1].usage is not None
    assert counted[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in counted[:-1])


async def test_U1_connection_is_reused_after_a_stream(
    async_client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK reads on for a moment after the sentinel, and keeps its connection if the end has come by then:
    what follows comes from the same port of its own. (The synchronous one closes it in any case.)
    """
    monkeypatch.setattr("openai._streaming_cleanup._DRAIN_TIMEOUT", 10)  # a tenth of a second as shipped
    ports = set()
    for _ in range(3):
        stream = await async_client.chat.completions.create(
            model="motet", messages=QUESTION, stream=True, max_tokens=3
        )
        ports.add(own_port(stream.response))
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
    models = await async_client.models.with_raw_response.list()
    ports.add(own_port(models.http_response))

    assert len(ports) == 1


def own_port(response: Any) -> int:
    """The client's end of the connection that an answer comes over."""
    return int(response.extensions["network_stream"].get_extra_info("client_addr")[1])


def test_unknown_model_is_a_404_that_the_sdk_understands(client: openai.OpenAI) -> None:
    """Z13."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-adapter", messages=QUESTION, stream=True)

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_bad_parameter_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="motet", messages=QUESTION, temperature=-1)

    assert caught.value.param == "temperature"


def test_n_choices_with_a_seed_can_be_had_again(client: openai.OpenAI) -> None:
    wish = {"model": "motet", "messages": QUESTION, "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 12}
    first = [choice.message.content for choice in client.chat.completions.create(**wish).choices]
    again = [choice.message.content for choice in client.chat.completions.create(**wish).choices]

    assert first == again
    assert len(set(first)) > 1


def test_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="motet", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert entry.logprob == max(other.logprob for other in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3


async def test_leaving_early_frees_everything(
    server: RunningServer, async_client: openai.AsyncOpenAI
) -> None:
    """Z9: closed after three of thousands of tokens."""
    server.wait_until_idle()
    stream = await async_client.chat.completions.create(
        model="pirate",
        messages=QUESTION,
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(3):
        await anext(stream)
    assert server.metric("vllm:num_requests_running") == 1
    await stream.close()

    server.wait_until_idle()


@pytest.mark.parametrize("model", MODELS)
def test_responses_say_what_chat_says_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    wish = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 60}
    response = client.responses.create(**wish)
    with client.responses.stream(**wish) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()

    assert response.output_text == "".join(deltas) == final.output_text == answer(client, model)
    assert len(deltas) > 3
    assert response.status == final.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens > 3


def test_a_response_is_continued_like_the_conversation_that_it_is(client: openai.OpenAI) -> None:
    wish = {"model": "pirate", "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(input=QUESTION, **wish)
    second = client.responses.create(input="And then?", previous_response_id=first.id, **wish)
    by_hand = client.chat.completions.create(
        model="pirate",
        messages=[
            *QUESTION,
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ],
        temperature=0,
        max_tokens=60,
    )

    assert second.output_text == by_hand.choices[0].message.content
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert len(list(client.responses.input_items.list(second.id))) == 3
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


async def test_a_response_that_is_left_early_frees_everything(
    server: RunningServer, async_client: openai.AsyncOpenAI
) -> None:
    async with async_client.responses.stream(
        model="pirate", input=QUESTION, max_output_tokens=3000, extra_body={"ignore_eos": True}
    ) as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                break

    server.wait_until_idle()


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_by": "word"},
        {"chunk_by": "word", "chunk_size": 3},
        {"chunk_by": "sentence"},
        {"chunk_size": 5},
        {"include_obfuscation": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [None, "stream"])
def test_Z11_text_is_the_same_however_it_is_cut(
    client: openai.OpenAI, options: dict[str, object], stop: str | None
) -> None:
    wish = {"model": "pirate", "messages": QUESTION, "temperature": 0, "max_tokens": 60, "stop": stop}
    whole = client.chat.completions.create(**wish).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **wish, n=2, stream=True, stream_options={"include_usage": True, **options}
        )
    )

    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == whole
