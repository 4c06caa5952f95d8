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


def lorax_merges(url: str) -> dict[str, Any]:
    from lorax import Client
    from lorax.errors import GenerationError, NotFoundError, ValidationError
    from lorax.types import MergedAdapters

    client = Client(url)

    def merge(*ids: str, strategy: str = "linear", density: float = 0.0, **more: Any) -> MergedAdapters:
        weights = more.pop("weights", [1.0] * len(ids))
        return MergedAdapters(
            ids=list(ids), weights=weights, merge_strategy=strategy, density=density, **more
        )

    def text(merged: MergedAdapters) -> str:
        return str(client.generate(PROMPT, merged_adapters=merged, max_new_tokens=12).generated_text)

    def refusal(merged: MergedAdapters) -> list[str]:
        try:
            client.generate(PROMPT, merged_adapters=merged)
        except (GenerationError, NotFoundError, ValidationError) as error:
            return [type(error).__name__, str(error)]
        return []

    both = merge("pirate", "haiku")
    frames = list(client.generate_stream(PROMPT, merged_adapters=both, max_new_tokens=12))
    named = client.generate(
        PROMPT, adapter_id="pirate", adapter_source="local", api_token="secret", max_new_tokens=12
    )
    return {
        "linear": text(both),
        "streamed": "".join(frame.token.text for frame in frames),
        "pirate": named.generated_text,
        "base": client.generate(PROMPT, max_new_tokens=12).generated_text,
        "others": {
            strategy: [text(merge("pirate", "haiku", strategy=strategy, density=0.6)) for _ in range(2)]
            for strategy in ("ties", "dare_linear", "dare_ties")
        },
        "frequency": text(
            merge("pirate", "haiku", strategy="ties", density=0.9, majority_sign_method="frequency")
        ),
        "negative": text(merge("pirate", "haiku", weights=[1.0, -1.0])),
        "ranks": refusal(merge("german", "haiku")),
        "unknown": refusal(merge("pirate", "no-such-adapter")),
        "no_density": refusal(merge("pirate", "haiku", strategy="ties")),
        "of_the_base": refusal(merge("pirate", "__base_model__")),
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
        "lorax_merges": lorax_merges,
        "text_generation": text_generation,
        "hub": hub,
    }
    print(json.dumps(clients[sys.argv[1]](sys.argv[2])))


if __name__ == "__main__":
    main()
