"""What the clients of LoRAX, TGI and the Hub may ask for beside the text, and what they make of refusals.

As `legacy_clients.py`: run by `test_legacy_details.py` in an environment of their own, prints what it saw as
JSON. `details` speaks to a real server with the embedded model, `errors` to one whose engine does what the
prompt says.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

PROMPT = "Motet is"
FORMAT = {"type": "json_object", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}


def sequence(choice: Any) -> dict[str, Any]:
    """One of the sequences of an answer, as every client has it."""
    return {
        "generated_tokens": choice.generated_tokens,
        "seed": choice.seed,
        "finish_reason": choice.finish_reason,
        "prefill": [(token.text, token.logprob) for token in choice.prefill],
        "tokens": [(token.text, token.logprob) for token in choice.tokens],
        "said": "".join(token.text for token in choice.tokens if not token.special),
    }


def sequences(whole: Any) -> dict[str, Any]:
    """Of a request with `best_of`: the answer, and the others."""
    others = whole.details.best_of_sequences
    return {
        "text": whole.generated_text,
        "best": sequence(whole.details),
        "others": [{**sequence(other), "text": other.generated_text} for other in others],
    }


def raised(call: Callable[[], object]) -> list[str]:
    """The module, name and message of what a call raises."""
    try:
        call()
    except Exception as error:
        return [type(error).__module__, type(error).__name__, str(error)]
    return []


def lorax_details(url: str) -> dict[str, Any]:
    from lorax import AsyncClient, Client

    client = Client(url)
    best = client.generate(
        PROMPT,
        adapter_id="pirate",
        best_of=3,
        do_sample=True,
        decoder_input_details=True,
        return_k_alternatives=2,
        max_new_tokens=6,
        ignore_eos_token=True,
    )
    again = client.generate(
        PROMPT,
        adapter_id="pirate",
        do_sample=True,
        seed=best.details.seed,
        max_new_tokens=6,
        ignore_eos_token=True,
    )
    greedy = client.generate(PROMPT, max_new_tokens=4)
    read = client.generate(PROMPT + greedy.generated_text, decoder_input_details=True, max_new_tokens=1)
    free, typical = [
        [
            client.generate(
                PROMPT,
                adapter_id="pirate",
                do_sample=True,
                typical_p=p,
                seed=seed,
                max_new_tokens=6,
                ignore_eos_token=True,
            ).generated_text
            for seed in range(4)
        ]
        for p in (None, 1e-6)
    ]
    truncated = client.generate(PROMPT, truncate=1, decoder_input_details=True, max_new_tokens=1)

    async def frames() -> list[list[str]]:
        stream = AsyncClient(url).generate_stream(PROMPT, max_new_tokens=3, return_k_alternatives=2)
        return [[other.text for other in frame.token.alternative_tokens] async for frame in stream]

    return {
        **sequences(best),
        "again": again.generated_text,
        "alternatives": [
            [(other.text, other.logprob) for other in token.alternative_tokens]
            for token in best.details.tokens
        ],
        "greedy": sequence(greedy.details),
        "read": sequence(read.details),
        "free": free,
        "typical": typical,
        "truncated": [truncated.details.prompt_tokens, len(truncated.details.prefill)],
        "stream_alternatives": asyncio.run(frames()),
        "watermark": raised(lambda: client.generate(PROMPT, watermark=True)),
        "stream_source": raised(
            lambda: list(client.generate_stream(PROMPT, adapter_id="pirate", adapter_source="hub"))
        ),
        "grammar": raised(lambda: client.generate(PROMPT, response_format=FORMAT)),
    }


def text_generation_details(url: str) -> dict[str, Any]:
    from text_generation import AsyncClient, Client
    from text_generation.types import Grammar, GrammarType

    client = Client(url)
    best = client.generate(
        PROMPT, best_of=2, temperature=1.0, decoder_input_details=True, top_n_tokens=3, max_new_tokens=5
    )
    frames = list(client.generate_stream(PROMPT, top_n_tokens=2, max_new_tokens=3))

    async def asynchronous() -> Any:
        return await AsyncClient(url).generate(
            PROMPT, best_of=2, do_sample=True, decoder_input_details=True, max_new_tokens=5
        )

    return {
        **sequences(best),
        "asynchronous": sequences(asyncio.run(asynchronous())),
        "top_tokens": [[(top.text, top.logprob) for top in tops] for tops in best.details.top_tokens],
        "stream_top_tokens": [[top.text for top in frame.top_tokens] for frame in frames],
        "stream_tokens": [frame.token.text for frame in frames],
        "stream_details": frames[-1].details.generated_tokens,
        "watermark": raised(lambda: client.generate(PROMPT, watermark=True)),
        "too_many": raised(lambda: list(client.generate_stream(PROMPT, top_n_tokens=99))),
        "grammar": raised(
            lambda: client.generate(PROMPT, grammar=Grammar(type=GrammarType.Regex, value="[0-9]+"))
        ),
    }


def hub_details(url: str) -> dict[str, Any]:
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    client = InferenceClient(base_url=url)  # leaves lists of lists as they come
    best = client.text_generation(
        PROMPT,
        details=True,
        adapter_id="german",
        best_of=2,
        do_sample=True,
        decoder_input_details=True,
        top_n_tokens=3,
        max_new_tokens=5,
    )
    frames = list(client.text_generation(PROMPT, details=True, stream=True, top_n_tokens=2, max_new_tokens=3))

    async def asynchronous() -> Any:
        return await AsyncInferenceClient(base_url=url).text_generation(
            PROMPT, details=True, best_of=2, top_k=50, decoder_input_details=True, max_new_tokens=5
        )

    return {
        **sequences(best),
        "asynchronous": sequences(asyncio.run(asynchronous())),
        "top_tokens": [[(top["text"], top["logprob"]) for top in tops] for tops in best.details.top_tokens],
        "stream_top_tokens": [[top["text"] for top in frame.top_tokens] for frame in frames],
        "stream_tokens": [frame.token.text for frame in frames],
        "stream_details": frames[-1].details.generated_tokens,
        "greedy_best_of": raised(lambda: client.text_generation(PROMPT, best_of=2)),
        "streamed_best_of": raised(
            lambda: list(client.text_generation(PROMPT, best_of=2, do_sample=True, stream=True))
        ),
        "streamed_prompt": raised(
            lambda: list(
                client.text_generation(PROMPT, decoder_input_details=True, details=True, stream=True)
            )
        ),
        "unknown_adapter": raised(lambda: client.text_generation(PROMPT, adapter_id="no-such-adapter")),
        "watermark": raised(lambda: client.text_generation(PROMPT, watermark=True)),
        "grammar": raised(
            lambda: client.text_generation(PROMPT, grammar={"type": "regex", "value": "[0-9]+"})
        ),
    }


# --- Errors: what the scripted engine does is the prompt ----------------------------------------------------

SCENARIOS = ("overloaded", "failing", "breaking", "incomplete", "invalid")


def lorax_errors(url: str) -> dict[str, Any]:
    from lorax import AsyncClient, Client

    client = Client(url)

    async def stream(prompt: str) -> None:
        async for _ in AsyncClient(url).generate_stream(prompt):
            pass

    async def last_text(prompt: str) -> str | None:
        return [frame.generated_text async for frame in AsyncClient(url).generate_stream(prompt)][-1]

    return {
        "long": asyncio.run(last_text("long")),
        "whole": [raised(lambda p=prompt: client.generate(p)) for prompt in SCENARIOS],
        "stream": [raised(lambda p=prompt: list(client.generate_stream(p))) for prompt in SCENARIOS],
        "asynchronous": [raised(lambda p=prompt: asyncio.run(stream(p))) for prompt in SCENARIOS],
        "unknown_adapter": raised(lambda: list(client.generate_stream("fine", adapter_id="nobody"))),
    }


def text_generation_errors(url: str) -> dict[str, Any]:
    from text_generation import AsyncClient, Client

    client = Client(url)

    async def stream(prompt: str) -> None:
        async for _ in AsyncClient(url).generate_stream(prompt):
            pass

    return {
        "whole": [raised(lambda p=prompt: client.generate(p)) for prompt in SCENARIOS],
        "stream": [raised(lambda p=prompt: list(client.generate_stream(p))) for prompt in SCENARIOS],
        "asynchronous": [raised(lambda p=prompt: asyncio.run(stream(p))) for prompt in SCENARIOS],
    }


def hub_errors(url: str) -> dict[str, Any]:
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    client = InferenceClient(base_url=url)

    async def stream(prompt: str) -> None:
        async for _ in await AsyncInferenceClient(base_url=url).text_generation(prompt, stream=True):
            pass

    return {
        "whole": [raised(lambda p=prompt: client.text_generation(p)) for prompt in SCENARIOS],
        "stream": [
            raised(lambda p=prompt: list(client.text_generation(p, stream=True))) for prompt in SCENARIOS
        ],
        "asynchronous": [raised(lambda p=prompt: asyncio.run(stream(p))) for prompt in SCENARIOS],
    }


def main() -> None:
    wanted: dict[str, Callable[[str], dict[str, Any]]] = {
        "lorax_details": lorax_details,
        "text_generation_details": text_generation_details,
        "hub_details": hub_details,
        "lorax_errors": lorax_errors,
        "text_generation_errors": text_generation_errors,
        "hub_errors": hub_errors,
    }
    print(json.dumps(wanted[sys.argv[1]](sys.argv[2])))


if __name__ == "__main__":
    main()
