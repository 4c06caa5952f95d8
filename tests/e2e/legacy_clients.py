"""Speaks to a server with the clients of LoRAX, TGI and the Hub, in an environment of their own.

Run by `test_legacy_clients.py` as `.venv-legacy/bin/python legacy_clients.py CLIENT URL`; prints what it saw
as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

PROMPT = "Motet is"


def lorax(url: str) -> dict[str, Any]:
    from lorax import AsyncClient, Client
    from lorax.errors import GenerationError, NotFoundError, ValidationError

    client = Client(url)
    whole = client.generate(PROMPT, adapter_id="pirate", max_new_tokens=6)
    frames = list(client.generate_stream(PROMPT, adapter_id="pirate", max_new_tokens=6))

    async def stream() -> list[str]:
        asynchronous = AsyncClient(url)
        return [frame.token.text async for frame in asynchronous.generate_stream(PROMPT, max_new_tokens=4)]

    def refusal(**wish: Any) -> str:
        try:
            list(client.generate_stream(PROMPT, **wish))
        except (GenerationError, NotFoundError, ValidationError) as error:
            return type(error).__name__
        return "none"

    return {
        "whole": whole.generated_text,
        "frames": [frame.token.text for frame in frames],
        "last": frames[-1].generated_text,
        "early": [frame.generated_text for frame in frames[:-1]],
        "finish_reason": frames[-1].details.finish_reason,
        "prompt_tokens": whole.details.prompt_tokens,
        "asynchronous": asyncio.run(stream()),
        "base": client.generate(PROMPT, max_new_tokens=4).generated_text,
        "unknown_adapter": refusal(adapter_id="no-such-adapter"),
        "too_long": refusal(max_new_tokens=10**6),
    }


def text_generation(url: str) -> dict[str, Any]:
    from text_generation import AsyncClient, Client

    client = Client(url)
    whole = client.generate(PROMPT, max_new_tokens=6)
    frames = list(client.generate_stream(PROMPT, max_new_tokens=6))
    chat = client.chat(
        messages=[{"role": "user", "content": "What is Motet?"}], max_tokens=6, temperature=0.0
    )

    async def stream() -> list[str]:
        asynchronous = AsyncClient(url)
        return [frame.token.text async for frame in asynchronous.generate_stream(PROMPT, max_new_tokens=6)]

    return {
        "whole": whole.generated_text,
        "finish_reason": whole.details.finish_reason,
        "frames": [frame.token.text for frame in frames],
        "asynchronous": asyncio.run(stream()),
        "chat": chat.choices[0].message.content,
    }


def hub(url: str) -> dict[str, Any]:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import ValidationError

    client = InferenceClient(base_url=url)
    frames = list(
        client.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True, adapter_id="german")
    )
    chat = client.chat_completion(
        [{"role": "user", "content": "What is Motet?"}], max_tokens=6, temperature=0.0
    )
    chunks = client.chat_completion(
        [{"role": "user", "content": "What is Motet?"}], max_tokens=6, temperature=0.0, stream=True
    )
    try:
        list(client.text_generation(PROMPT, max_new_tokens=10**6, stream=True))
        too_long = "none"
    except ValidationError as error:
        too_long = type(error).__name__
    return {
        "whole": client.text_generation(PROMPT, max_new_tokens=6, adapter_id="german"),
        "frames": [frame.token.text for frame in frames],
        "chat": chat.choices[0].message.content,
        "chunks": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "too_long": too_long,
    }


def main() -> None:
    clients: dict[str, Callable[[str], dict[str, Any]]] = {
        "lorax": lorax,
        "text_generation": text_generation,
        "hub": hub,
    }
    print(json.dumps(clients[sys.argv[1]](sys.argv[2])))


if __name__ == "__main__":
    main()
