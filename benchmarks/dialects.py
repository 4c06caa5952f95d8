"""The three request shapes a server may be asked in, and what each of their frames says.

A dialect is a translation and nothing else: a wish into a body, the JSON of one event into a `Frame`.
Sending, timing and counting are the client's and know no protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from benchmarks.records import BASE, Api, Wire, Wish

DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of an answer, understood."""

    has_output: bool = False  # carries generated text (OpenAI) or a token (LoRAX)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str | None = None
    error: str | None = None


class Dialect(Protocol):
    path: str

    def body(self, wish: Wish, model: str) -> dict[str, object]: ...

    def read(self, event: Mapping[str, object]) -> Frame: ...


def dialect_of(wire: Wire) -> Dialect:
    if wire.api is Api.LORAX:
        return LoraxDialect(wire.extra)
    return OpenAIDialect(wire.api, wire.extra, asks_usage=wire.asks_usage)


class OpenAIDialect:
    """Chat or plain completions. An adapter is asked for by its model name."""

    def __init__(self, api: Api, extra: Mapping[str, object], *, asks_usage: bool) -> None:
        self._is_chat = api is Api.CHAT
        self._extra = dict(extra)
        self._asks_usage = asks_usage
        self.path = "/v1/chat/completions" if self._is_chat else "/v1/completions"

    def body(self, wish: Wish, model: str) -> dict[str, object]:
        body: dict[str, object] = {
            "model": model if wish.adapter == BASE else wish.adapter,
            "max_tokens": wish.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._is_chat:
            body["messages"] = [{"role": "user", "content": wish.prompt}]
        else:
            body["prompt"] = wish.prompt
        if self._asks_usage:
            body["stream_options"] = {"include_usage": True}
        return body | self._extra

    def read(self, event: Mapping[str, object]) -> Frame:
        if event.get("error") is not None:
            return Frame(error=error_text(event))
        has_output, finish = False, None
        for choice in _records(event.get("choices")):
            delta = _record(choice.get("delta"))
            # Reasoning models stream their thoughts under a name of their own: they are tokens all the same.
            texts = (
                choice.get("text"),
                *(delta.get(key) for key in ("content", "reasoning_content", "reasoning")),
            )
            has_output = has_output or any(isinstance(text, str) and text for text in texts)
            reason = choice.get("finish_reason")
            finish = reason if isinstance(reason, str) else finish
        usage = _record(event.get("usage"))
        return Frame(
            has_output=has_output,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
            cached_tokens=_count(_record(usage.get("prompt_tokens_details")).get("cached_tokens")),
            finish=finish,
        )


class LoraxDialect:
    """`/generate_stream` of LoRAX and TGI. `parameters` name the adapter; every token has its frame."""

    path = "/generate_stream"

    def __init__(self, extra: Mapping[str, object]) -> None:
        self._extra = dict(extra)

    def body(self, wish: Wish, model: str) -> dict[str, object]:
        parameters: dict[str, object] = {"max_new_tokens": wish.max_tokens, "details": True}
        if wish.adapter != BASE:
            parameters["adapter_id"] = wish.adapter
        return {"inputs": wish.prompt, "parameters": parameters | self._extra}

    def read(self, event: Mapping[str, object]) -> Frame:
        if event.get("error") is not None:
            return Frame(error=error_text(event))
        details = _record(event.get("details"))
        reason = details.get("finish_reason")
        if not isinstance(reason, str) and isinstance(event.get("generated_text"), str):
            reason = "unknown"  # TGI before 1.0 ends without details
        return Frame(
            has_output=isinstance(event.get("token"), dict),
            prompt_tokens=_count(details.get("prompt_tokens")),
            output_tokens=_count(details.get("generated_tokens")),
            finish=reason if isinstance(reason, str) else None,
        )


def error_text(event: Mapping[str, object]) -> str:
    """The message in any of the error shapes servers use."""
    error = event.get("error", event.get("detail", event.get("message")))
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)


def _record(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _records(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
