"""How Ollama's answers look: one JSON object per line, and no sentinel but `"done":true`.

The hot path is `OllamaWriter.frames`: a line is what all lines of the stream share, the time, and the text.
The last line carries no text but everything else: why the answer ended, what it cost in nanoseconds, and for
those who read on what our other routes say in their last event.

Ollama's three durations are here: until the engine took the request up, loading an adapter included; until
its first token; from there to its last one. Together they are the whole. The last two are never zero, not
even for a single token: clients divide by them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from server.api.finishes import details, text_to_json, token_logprob
from server.api.ports import Tokenizer
from server.api.records import JSON_LINES, Accepted, WholeChoice
from server.api.shapes import json_text, long_json_text, to_json
from server.errors import ServeError
from server.types import Finish, FinishReason, GeneratedToken, Timing, TokenEvent

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What the lines of one answer have in common."""

    model: str  # as the client wrote it
    is_chat: bool
    has_context: bool  # the end says which tokens the model has read and written
    now_ns: Callable[[], int]  # unix time

    def text_member(self, text: str) -> str:
        """`text` is JSON."""
        if self.is_chat:
            return f'"message":{{"role":"assistant","content":{text}}}'
        return f'"response":{text}'

    def created_at(self) -> str:
        return rfc3339(self.now_ns())

    def whole(self, text: str, reason: str) -> dict[str, object]:
        """The members that every complete answer begins with."""
        answer: dict[str, object] = {"model": self.model, "created_at": self.created_at()}
        if self.is_chat:
            answer["message"] = {"role": "assistant", "content": text}
        else:
            answer["response"] = text
        return {**answer, "done": True, "done_reason": reason}


class OllamaWriter:
    """Writes one stream."""

    framing = JSON_LINES

    def __init__(self, accepted: Accepted, form: AnswerForm) -> None:
        self._accepted = accepted
        self._form = form
        self._has_logprobs = accepted.request.sampling.num_logprobs is not None
        self._head = f'{{"model":{json_text(form.model)},"created_at":"'
        self._ready = ""
        self._tokens: list[GeneratedToken] = []  # whose logprobs are still to be written
        self._generated: list[int] = []

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        frames: list[bytes] = []
        for event in events:
            self._take(event)
            if event.finish is not None:
                frames += self._finish(event.finish)
            elif self._ready and not join:
                frames.append(self._piece())
        if self._ready:
            frames.append(self._piece())
        return frames

    def end(self) -> Iterable[bytes]:
        return ()

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return (to_json({"error": error.message}) + b"\n",)

    def _take(self, event: TokenEvent) -> None:
        self._ready += event.text
        if event.token is None:
            return
        if self._form.has_context:
            self._generated.append(event.token.id)
        if self._has_logprobs:
            self._tokens.append(event.token)

    def _piece(self) -> bytes:
        text, self._ready = json_text(self._ready), ""
        member = self._form.text_member(text)
        line = f'{self._head}{self._form.created_at()}",{member},"done":false{self._logprobs()}}}\n'
        return line.encode("ascii")

    def _finish(self, finish: Finish) -> list[bytes]:
        frames = [self._piece()] if self._ready else []
        member = self._form.text_member('""')
        facts = json_text(_facts(self._accepted, finish, self._form, self._generated))[1:-1]
        text = text_to_json(finish.generated_text)
        more = json_text(details(finish, self._accepted.request.sampling))
        line = (
            f'{self._head}{self._form.created_at()}",{member},"done":true,"done_reason":"{_reason(finish)}",'
            f'{facts}{self._logprobs()},"generated_text":{text},"details":{more}}}\n'
        )
        return [*frames, line.encode("utf-8")]

    def _logprobs(self) -> str:
        if not self._tokens:
            return ""
        tokens, self._tokens = self._tokens, []
        return f',"logprobs":{json_text(_logprobs(self._accepted.tokenizer, tokens))}'


def whole_body(accepted: Accepted, form: AnswerForm, choice: WholeChoice) -> bytes:
    """An answer that is not streamed."""
    finish = choice.finish
    answer = form.whole(finish.generated_text, _reason(finish))
    answer |= _facts(accepted, finish, form, [token.id for token in choice.tokens])
    if accepted.request.sampling.num_logprobs is not None:
        answer["logprobs"] = _logprobs(accepted.tokenizer, choice.tokens)
    return long_json_text(answer).encode("ascii")


def rfc3339(unix_ns: int) -> str:
    """A time in UTC, to the nanosecond."""
    seconds, rest = divmod(unix_ns, _NS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def durations(timing: Timing) -> dict[str, int]:
    """What of a request's time went into what, in nanoseconds."""
    return {
        "total_duration": _ns(timing.last_token - timing.received),
        "load_duration": _ns(timing.started - timing.received),
        "prompt_eval_duration": max(_ns(timing.first_token - timing.started), 1),
        "eval_duration": max(_ns(timing.last_token - timing.first_token), 1),
    }


def _facts(
    accepted: Accepted, finish: Finish, form: AnswerForm, generated: Sequence[int]
) -> dict[str, object]:
    times = durations(finish.timing)
    context = {"context": [*accepted.prompt.ids, *generated]} if form.has_context else {}
    return {
        **context,
        "total_duration": times["total_duration"],
        "load_duration": times["load_duration"],
        "prompt_eval_count": finish.usage.prompt_tokens,
        "prompt_eval_duration": times["prompt_eval_duration"],
        "eval_count": finish.usage.generated_tokens,
        "eval_duration": times["eval_duration"],
    }


def _reason(finish: Finish) -> str:
    return "length" if finish.reason is FinishReason.LENGTH else "stop"


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[GeneratedToken]) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for token in tokens:
        entry = token_logprob(tokenizer, token.id, token.logprob)
        if token.alternatives:
            top = [token_logprob(tokenizer, other.token_id, other.logprob) for other in token.alternatives]
            entry["top_logprobs"] = top
        entries.append(entry)
    return entries


def _ns(seconds: float) -> int:
    return max(round(seconds * _NS), 0)
