"""How `/v1/responses` answers: one object, or a stream of typed events around it.

    created, in_progress,
      output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done,
      output_item.done,
    completed | incomplete | failed

Each event is named twice, in its `event:` line and in its `type`, and numbered; there is no sentinel. The
last event carries the whole object, and the store has it before that event leaves: a client may ask for the
response as soon as it has read of its end.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from server.api.finishes import text_to_json
from server.api.openai.obfuscation import obfuscation
from server.api.records import EVENT_STREAM, Accepted
from server.api.responses.schema import ResponsesBody
from server.api.shapes import json_text
from server.errors import ServeError
from server.types import Finish, FinishReason, TokenEvent, Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]

Keep = Callable[[str, str], None]
"""Keep a response that has ended: the text of its answer, and the object."""


class ResponseRender:
    """Writes one response object in each of its states. Output is JSON text."""

    def __init__(
        self,
        accepted: Accepted,
        body: ResponsesBody,
        id: str,
        item_id: str,
        unix_time: Callable[[], int],
    ) -> None:
        self._unix_time = unix_time
        self._head = json_text({"id": id, "object": "response", "created_at": accepted.created})[:-1]
        self._tail = _settings(accepted, body)
        self._item_head = f'{{"id":{json_text(item_id)},"type":"message","role":"assistant"'
        self.place = f'"item_id":{json_text(item_id)},"output_index":0,"content_index":0'

    def running(self) -> str:
        return self._object("in_progress")

    def ended(self, finish: Finish, text: str) -> str:
        """`text` is JSON, as everywhere here."""
        status = status_of(finish)
        is_complete = status == "completed"
        return self._object(
            status,
            completed_at=self._unix_time() if is_complete else None,
            incomplete_details=None if is_complete else {"reason": "max_output_tokens"},
            output=self.item(status, self.part(text)),
            usage=_usage(finish.usage),
        )

    def failed(self, error: ServeError, text: str | None) -> str:
        """`text`: what was said before, if anything was."""
        output = "" if text is None else self.item("incomplete", self.part(text))
        return self._object("failed", error={"code": "server_error", "message": error.message}, output=output)

    def item(self, status: Status, content: str) -> str:
        """The one item of the output."""
        return f'{self._item_head},"status":"{status}","content":[{content}]}}'

    def part(self, text: str) -> str:
        """Its one part."""
        return f'{{"type":"output_text","annotations":[],"logprobs":[],"text":{text}}}'

    def _object(
        self,
        status: Status,
        *,
        completed_at: int | None = None,
        error: dict[str, object] | None = None,
        incomplete_details: dict[str, object] | None = None,
        output: str = "",
        usage: dict[str, object] | None = None,
    ) -> str:
        state = json_text(
            {
                "status": status,
                "completed_at": completed_at,
                "error": error,
                "incomplete_details": incomplete_details,
                "usage": usage,
            }
        )
        return f'{self._head},{state[1:-1]},"output":[{output}],{self._tail}}}'


class ResponsesWriter:
    """Writes one stream."""

    framing = EVENT_STREAM

    def __init__(self, render: ResponseRender, keep: Keep, *, has_obfuscation: bool) -> None:
        self._render = render
        self._keep = keep
        self._has_obfuscation = has_obfuscation
        self._num_events = 0
        self._has_item = False
        self._ready = ""
        self._said: list[str] = []
        self._finish: Finish | None = None

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        frames = [] if self._has_item else [*self._begin(), *self._open_item()]
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
        status = status_of(self._finish)
        text = text_to_json(self._finish.generated_text)
        part = self._render.part(text)
        yield self._event("response.output_text.done", f'{self._render.place},"text":{text},"logprobs":[]')
        yield self._event("response.content_part.done", f'{self._render.place},"part":{part}')
        item = self._render.item(status, part)
        yield self._event("response.output_item.done", f'"output_index":0,"item":{item}')
        response = self._render.ended(self._finish, text)
        self._keep(self._finish.generated_text, response)
        yield self._event(f"response.{status}", f'"response":{response}')

    def failure(self, error: ServeError) -> Iterable[bytes]:
        if not self._has_item:
            yield from self._begin()
        text = "".join(self._said)
        response = self._render.failed(error, text_to_json(text) if self._has_item else None)
        self._keep(text, response)
        yield self._event("response.failed", f'"response":{response}')

    def _begin(self) -> Iterable[bytes]:
        response = self._render.running()
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, f'"response":{response}')

    def _open_item(self) -> Iterable[bytes]:
        self._has_item = True
        item, part = self._render.item("in_progress", ""), self._render.part('""')
        yield self._event("response.output_item.added", f'"output_index":0,"item":{item}')
        yield self._event("response.content_part.added", f'{self._render.place},"part":{part}')

    def _delta(self) -> bytes:
        text = json_text(self._ready)
        self._said.append(self._ready)
        self._ready = ""
        padding = obfuscation(text) if self._has_obfuscation else ""
        return self._event(
            "response.output_text.delta", f'{self._render.place},"delta":{text},"logprobs":[]{padding}'
        )

    def _event(self, name: str, members: str) -> bytes:
        number = self._num_events
        self._num_events += 1
        frame = f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{members}}}\n\n'
        return frame.encode("utf-8")


def status_of(finish: Finish) -> Status:
    """completed or incomplete."""
    return "incomplete" if finish.reason is FinishReason.LENGTH else "completed"


def _settings(accepted: Accepted, body: ResponsesBody) -> str:
    """What a response says of its request, without braces: equal in all states of it."""
    sampling = accepted.request.sampling
    settings = json_text(
        {
            "background": False,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": accepted.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": body.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",  # whatever was asked for: there is only one
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }
    )
    instructions = "null" if body.instructions is None else text_to_json(body.instructions)
    return f'{settings[1:-1]},"instructions":{instructions}'


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
    }
