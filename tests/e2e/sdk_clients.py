"""Speaks to a server with the SDKs of others, in an environment of their own.

Run by `test_sdk_clients.py` as `.venv-sdk/bin/python sdk_clients.py CLIENT URL`; prints what it saw as JSON.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

QUESTION = "How do I stream tokens?"
TURNS = [{"role": "user", "content": QUESTION}]


def anthropic(url: str) -> dict[str, Any]:
    from anthropic import Anthropic, AsyncAnthropic, BadRequestError, NotFoundError

    client = Anthropic(base_url=url, api_key="any", max_retries=0)
    greedy: dict[str, Any] = {
        "model": "pirate",
        "max_tokens": 20,
        "messages": TURNS,
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**greedy)
    with client.messages.stream(**greedy) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    raw = [event.type for event in client.messages.create(**greedy, stream=True)]

    async def asynchronously() -> str:
        other = AsyncAnthropic(base_url=url, api_key="any", max_retries=0)
        async with other, other.messages.stream(**greedy) as stream:
            return "".join([piece async for piece in stream.text_stream])

    def refusal(**change: Any) -> str:
        try:
            client.messages.create(**{**greedy, **change})
        except (BadRequestError, NotFoundError) as error:
            return f"{type(error).__name__} {error.body['error']['type']}"
        return "none"

    text = whole.content[0].text
    stop = text.split()[1]
    stopped = client.messages.create(**greedy, stop_sequences=[stop], system="You are Motet.")
    return {
        "whole": text,
        "pieces": pieces,
        "final": final.content[0].text,
        "raw": raw,
        "asynchronous": asyncio.run(asynchronously()),
        "stop_reason": whole.stop_reason,
        "output_tokens": [whole.usage.output_tokens, final.usage.output_tokens],
        "input_tokens": whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0),
        "counted": client.messages.count_tokens(model="pirate", messages=TURNS).input_tokens,
        "continued": client.messages.create(
            **{**greedy, "messages": [*TURNS, {"role": "assistant", "content": text[:10]}]}
        )
        .content[0]
        .text,
        "stopped": [stopped.stop_reason, stopped.stop_sequence],
        "base": client.messages.create(**{**greedy, "model": "motet"}).content[0].text,
        "beta": client.beta.messages.create(**greedy).content[0].text,
        "models": [model.id for model in client.models.list()],
        "unknown_model": refusal(model="no-such-adapter"),
        "tools": refusal(tools=[{"name": "f", "input_schema": {"type": "object"}}]),
    }


def langchain(url: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI, OpenAI

    def chat(**options: Any) -> ChatOpenAI:
        return ChatOpenAI(
            base_url=f"{url}/v1", api_key="any", model="pirate", temperature=0, max_tokens=20, **options
        )

    async def stream() -> list[str]:
        return [chunk.content async for chunk in chat().astream(QUESTION)]

    whole = chat().invoke([("system", "You are Motet."), ("user", QUESTION)])
    chunks = list(chat(stream_usage=True).stream(QUESTION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    through_responses = chat(use_responses_api=True)
    first = through_responses.invoke(QUESTION)
    follow_up = chat(use_responses_api=True, use_previous_response_id=True)
    return {
        "whole": whole.content,
        "usage": whole.usage_metadata["output_tokens"],
        "plain": chat().invoke(QUESTION).content,
        "pieces": [chunk.content for chunk in chunks],
        "total_usage": total.usage_metadata["output_tokens"],
        "asynchronous": asyncio.run(stream()),
        "batch": [answer.content for answer in chat().batch([QUESTION, QUESTION])],
        "responses": first.text,
        "responses_pieces": [chunk.text for chunk in through_responses.stream(QUESTION)],
        "continued": follow_up.invoke([("user", QUESTION), first, ("user", "And then?")]).text,
        "completion": OpenAI(
            base_url=f"{url}/v1", api_key="any", model="pirate", temperature=0, max_tokens=6
        ).invoke("Motet is"),
        "logprobs": len(
            chat(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
        ),
    }


def litellm(url: str) -> dict[str, Any]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request to elsewhere
    import litellm

    openai: dict[str, Any] = {
        "model": "openai/pirate",
        "api_base": f"{url}/v1",
        "api_key": "any",
        "messages": TURNS,
        "temperature": 0,
        "max_tokens": 20,
        "user": "u",
    }
    messages = {**openai, "model": "anthropic/pirate", "api_base": url}

    def text(**wish: Any) -> str:
        return litellm.completion(**wish).choices[0].message.content

    def pieces(**wish: Any) -> list[str]:
        chunks = litellm.completion(**wish, stream=True)
        return [chunk.choices[0].delta.content or "" for chunk in chunks]

    async def stream() -> str:
        chunks = await litellm.acompletion(**openai, stream=True, stream_options={"include_usage": True})
        return "".join([(c.choices[0].delta.content or "") if c.choices else "" async for c in chunks])

    def refusal(**change: Any) -> str:
        try:
            litellm.completion(**{**openai, **change}, num_retries=0)
        except (litellm.exceptions.BadRequestError, litellm.exceptions.NotFoundError) as error:
            return type(error).__name__
        return "none"

    response = litellm.responses(
        model="openai/pirate", input=QUESTION, api_base=f"{url}/v1", api_key="any", temperature=0
    )
    return {
        "whole": text(**openai),
        "pieces": pieces(**openai),
        "asynchronous": asyncio.run(stream()),
        "messages": text(**messages),
        "messages_pieces": pieces(**messages),
        "completion": litellm.text_completion(
            model="text-completion-openai/pirate",
            prompt="Motet is",
            api_base=f"{url}/v1",
            api_key="any",
            max_tokens=6,
            temperature=0,
        )
        .choices[0]
        .text,
        "responses": response.output[0].content[0].text,
        "unknown_model": refusal(model="openai/no-such-adapter"),
        "bad_value": refusal(temperature=5),
    }


def main() -> None:
    clients: dict[str, Callable[[str], dict[str, Any]]] = {
        "anthropic": anthropic,
        "langchain": langchain,
        "litellm": litellm,
    }
    print(json.dumps(clients[sys.argv[1]](sys.argv[2])))


if __name__ == "__main__":
    main()
