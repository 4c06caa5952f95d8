"""Speaks to a server with Ollama's package for Python, in an environment of its own.

Run by `test_ollama_clients.py` as `.venv-ollama/bin/python ollama_client.py URL`; prints what it saw as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from math import dist, hypot
from typing import Any

from ollama import AsyncClient, Client, ResponseError

QUESTION = "How do I stream tokens?"
TURNS = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0, "num_predict": 20}
ANSWER: dict[str, Any] = {"model": "pirate", "prompt": QUESTION, "options": GREEDY}
CHAT: dict[str, Any] = {"model": "pirate", "messages": TURNS, "options": GREEDY}


def generate(client: Client) -> dict[str, Any]:
    whole = client.generate(**ANSWER)
    parts = list(client.generate(**ANSWER, stream=True))
    again = client.generate(model="pirate", prompt="And then?", context=whole.context, options=GREEDY)
    load = client.generate(model="pirate")
    return {
        "whole": whole.response,
        "pieces": [part.response for part in parts],
        "done": [part.done for part in parts],
        "last": parts[-1].model_dump(exclude={"context"}),
        "context": list(parts[-1].context or ()) == list(whole.context or ()),
        "longer_by": len(again.context or ()) - len(whole.context or ()),
        "prompt_with_context": again.prompt_eval_count,
        "load": [load.response, load.done, load.done_reason],
        "unload": client.generate(model="pirate", keep_alive=0).done_reason,
        "raw": client.generate(model="motet", prompt="Motet is", raw=True, options=GREEDY).response,
        "stopped": client.generate(**{**ANSWER, "options": {**GREEDY, "stop": [" "]}}).response,
    }


def chat(client: Client) -> dict[str, Any]:
    whole = client.chat(**CHAT)
    parts = list(client.chat(**CHAT, stream=True, keep_alive="5m"))
    full = client.chat(**{**CHAT, "options": {"temperature": 0}})
    seeded = {"temperature": 1.0, "seed": 7, "num_predict": 12}
    with_logprobs = client.chat(**CHAT, logprobs=True, top_logprobs=2)
    return {
        "whole": whole.message.content,
        "pieces": [part.message.content for part in parts],
        "roles": sorted({part.message.role for part in parts}),
        "reason": [whole.done_reason, full.done_reason],
        "seeded": [client.chat(model="haiku", messages=TURNS, options=seeded).message.content for _ in "ab"],
        "models": {
            name: client.chat(model=name, messages=TURNS, options=GREEDY).message.content
            for name in ("motet", "pirate", "pirate:latest", "haiku")
        },
        "logprobs": [len(entry.top_logprobs or ()) for entry in with_logprobs.logprobs or ()],
        "load": client.chat(model="pirate").done_reason,
    }


def models(client: Client) -> dict[str, Any]:
    shown, listed = client.show("pirate"), client.list().models
    return {
        "tags": [(model.model, model.details.parent_model) for model in listed if model.details],
        "digests": [len(model.digest or "") for model in listed],
        "ps": [(model.name, model.context_length) for model in client.ps().models],
        "family": shown.details.family if shown.details else None,
        "parent": shown.details.parent_model if shown.details else None,
        "context_length": (shown.modelinfo or {}).get(f"{shown.details.family}.context_length"),
        "capabilities": shown.capabilities,
        "has_template": bool(shown.template),
        "pull": client.pull("pirate").status,
        "pull_steps": [step.status for step in client.pull("motet:latest", stream=True)],
    }


def embeddings(client: Client) -> dict[str, Any]:
    texts = ["Motet serves adapters.", "Rain falls on the roof."]
    both = client.embed(model="pirate", input=texts)
    alone = [client.embed(model="pirate", input=text).embeddings[0] for text in texts]
    return {
        "count": len(both.embeddings),
        "lengths": [hypot(*vector) for vector in both.embeddings],
        "far_from_alone": max(dist(*pair) for pair in zip(both.embeddings, alone, strict=True)),
        "apart": dist(*both.embeddings),
        "far_from_base": dist(client.embed(model="motet", input=texts[0]).embeddings[0], alone[0]),
        "prompt_tokens": both.prompt_eval_count,
        "short": len(client.embed(model="pirate", input=texts[0], dimensions=8).embeddings[0]),
        "old": dist(client.embeddings(model="pirate", prompt=texts[0]).embedding, alone[0]),
        "nothing": len(client.embed(model="pirate", input=[]).embeddings),
    }


def errors(client: Client) -> dict[str, Any]:
    def refusal(call: Callable[..., Any], **wish: Any) -> list[object]:
        try:
            answer = call(**wish)
            if wish.get("stream"):
                list(answer)
        except ResponseError as error:
            return [error.status_code, error.error]
        return [200, ""]

    return {
        "unknown": refusal(client.generate, **{**ANSWER, "model": "nobody"}),
        "unknown_stream": refusal(client.chat, **{**CHAT, "model": "nobody"}, stream=True),
        "show": refusal(client.show, model="nobody"),
        "pull": refusal(client.pull, model="nobody", stream=True),
        "format": refusal(client.chat, **CHAT, format="json"),
        "tools": refusal(client.chat, **CHAT, tools=[{"type": "function", "function": {"name": "f"}}]),
        "images": refusal(client.generate, **ANSWER, images=["aGk="]),
        "embed": refusal(client.embed, model="nobody", input="x"),
        "option": refusal(client.generate, **{**ANSWER, "options": {"temperature": -1}}),
        "create": refusal(client.create, model="new", from_="motet"),
        "copy": refusal(client.copy, source="motet", destination="new"),
        "delete": refusal(client.delete, model="pirate"),
        "push": refusal(client.push, model="pirate", stream=True),
    }


async def asynchronous(url: str) -> dict[str, Any]:
    client = AsyncClient(host=url)
    parts = [part.message.content async for part in await client.chat(**CHAT, stream=True)]
    whole = await client.generate(**ANSWER)
    answers = await asyncio.gather(*(client.chat(**CHAT) for _ in range(4)))
    return {
        "pieces": parts,
        "whole": whole.response,
        "at_once": sorted({answer.message.content for answer in answers}),
    }


def main() -> None:
    url = sys.argv[1]
    client = Client(host=url)
    seen = {
        "generate": generate(client),
        "chat": chat(client),
        "models": models(client),
        "embeddings": embeddings(client),
        "errors": errors(client),
        "asynchronous": asyncio.run(asynchronous(url)),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
