"""How Anthropic's Messages route answers: one message, or a stream of named events that build it.

    message_start,
      content_block_start, content_block_delta ..., content_block_stop,
    message_delta, message_stop

The answer is one block of text. Tokens that came from the prefix cache are counted apart from the other input
tokens, as clients add the two up; the first event does not know of them yet, the last but one corrects it.
Into silence goes a `ping`.
"""

from collections.abc import Iterable, Sequence

from server.api.finishes import text_to_json
from server.api.records import Accepted, Framing, WholeChoice
from server.api.shapes import anthropic_body, json_text
from server.errors import ServeError
from server.types import Finish, FinishReason, TokenEvent

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_FRAMING = Framing("text/event-stream", _PING)


class MessageWriter:
    """Writes one stream."""

    framing = _FRAMING

    def __init__(self, accepted: Accepted, max_tokens: int) -> None:
        """`max_tokens`: as asked for; the context may leave less."""
        self._accepted = accepted
        self._max_tokens = max_tokens
        self._has_started = False
        self._ready = ""
        self._finish: Finish | None = None

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        frames = [] if self._has_started else [*self._begin()]
        for event in events:
            self._ready += event.text
            if event.finish is not None:
                self._finish = event.finish
            if self._ready and not join:
                frames.append(self._delta())
        if self._ready:
            frames.append(self._delta())
        return frames

    def end(self) -> Iterable[bytes]:
        assert self._finish is not None, "a stream ends with a finish"
        yield _event("content_block_stop", '"index":0')
        reason = json_text(_reason(self._finish, self._max_tokens))
        yield _event("message_delta", f'"delta":{reason},"usage":{json_text(_usage(self._finish))}')
        yield _event("message_stop", "")

    def failure(self, error: ServeError) -> Iterable[bytes]:
        yield _event("error", f'"error":{json_text(anthropic_body(error)["error"])}')

    def _begin(self) -> Iterable[bytes]:
        self._has_started = True
        usage = _counts(len(self._accepted.prompt.ids), 0, 0)
        message = _message(self._accepted, "", {"stop_reason": None, "stop_sequence": None}, usage)
        yield _event("message_start", f'"message":{message}')
        yield _event("content_block_start", '"index":0,"content_block":{"type":"text","text":""}')

    def _delta(self) -> bytes:
        text = json_text(self._ready)
        self._ready = ""
        return _event("content_block_delta", f'"index":0,"delta":{{"type":"text_delta","text":{text}}}')


def whole_message(accepted: Accepted, choice: WholeChoice, max_tokens: int) -> bytes:
    """An answer that is not streamed. `max_tokens`: as asked for."""
    finish = choice.finish
    block = f'{{"type":"text","text":{text_to_json(finish.generated_text)}}}'
    return _message(accepted, block, _reason(finish, max_tokens), _usage(finish)).encode("utf-8")


def _message(accepted: Accepted, content: str, reason: dict[str, object], usage: dict[str, object]) -> str:
    head = json_text(
        {
            "id": f"msg_{accepted.request.request_id}",
            "type": "message",
            "role": "assistant",
            "model": accepted.model,
        }
    )
    tail = json_text({**reason, "usage": usage})
    return f'{head[:-1]},"content":[{content}],{tail[1:]}'


def _reason(finish: Finish, max_tokens: int) -> dict[str, object]:
    """Why the message ended, and the stop sequence if that is why."""
    if finish.reason is FinishReason.LENGTH:
        is_all = finish.usage.generated_tokens >= max_tokens
        reason = "max_tokens" if is_all else "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": None}
    if isinstance(finish.stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(finish: Finish) -> dict[str, object]:
    usage = finish.usage
    return _counts(usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)


def _counts(num_prompt: int, num_cached: int, num_generated: int) -> dict[str, object]:
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_generated,
    }


def _event(name: str, members: str) -> bytes:
    comma = "," if members else ""
    return f'event: {name}\ndata: {{"type":"{name}"{comma}{members}}}\n\n'.encode()
