"""How OpenAI's answers look, streamed and whole; what only text completions have is in
completions_render.py.

The hot path is `OpenAIWriter.frames`: what does not change from chunk to chunk is written once per stream and
once per choice, and only the text of a token is encoded per token. A choice's chunks are its text pieces (the
first one carries the role), then one finish chunk with an empty delta, `generated_text` and `details`; after
the last choice the usage, if asked for, and `[DONE]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.api.finishes import (
    details,
    openai_usage,
    prompt_usage,
    text_to_json,
    token_logprob,
)
from server.api.openai.chunking import ChunkBy, Chunker
from server.api.openai.obfuscation import obfuscation
from server.api.openai.prompt_logprobs import prompt_logprobs
from server.api.records import EVENT_STREAM, Accepted, WholeChoice
from server.api.shapes import json_text, long_json_text, openai_body, to_json
from server.errors import ServeError
from server.types import Finish, FinishReason, GeneratedToken, TokenEvent

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """`stream_options`."""

    has_usage: bool = False
    has_running_usage: bool = False
    chunk_by: ChunkBy = "token"
    chunk_size: int = 1
    has_obfuscation: bool = False

    @property
    def chunker(self) -> Chunker | None:
        is_plain = self.chunk_by == "token" and self.chunk_size == 1
        return None if is_plain else Chunker(self.chunk_by, self.chunk_size)


class Render(Protocol):
    """Where chat and completions differ."""

    id: str
    kind: str
    chunk_kind: str
    more: Mapping[str, object]  # what its objects say besides

    def before(self, index: int) -> str:
        """What the text of a choice begins with, before anything is generated."""
        ...

    def piece(self, index: int, text: str, is_first: bool, logprobs: str) -> str:
        """One element of `choices` with a piece of text; `text` is JSON, `logprobs` is a member or ""."""
        ...

    def finish(self, index: int, is_first: bool, logprobs: str, finish: Finish) -> str: ...

    def logprobs(
        self, index: int, prompt: Sequence[GeneratedToken], tokens: Sequence[GeneratedToken], offset: int
    ) -> dict[str, object]:
        """`prompt`: its tokens where they were asked about. `offset`: characters of the text before the first
        of `tokens`.
        """
        ...

    def whole(self, index: int, choice: WholeChoice, logprobs: object) -> dict[str, object]: ...

    def answer_members(self, choices: Sequence[WholeChoice]) -> dict[str, object]:
        """What an answer that is not streamed says besides its choices."""
        ...


class ChatRender:
    """Elements of chat answers."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, accepted: Accepted, *, has_tier: bool = False, num_prompt_logprobs: int | None = None
    ) -> None:
        """`has_tier`: say by which service tier the request was served; there is only one.
        `num_prompt_logprobs`: add vLLM's `prompt_logprobs`.
        """
        self.id = f"chatcmpl-{accepted.request.request_id}"
        self.more: Mapping[str, object] = {"service_tier": "default"} if has_tier else {}
        self._tokenizer = accepted.tokenizer
        self._num_prompt_logprobs = num_prompt_logprobs

    def before(self, index: int) -> str:
        return ""

    def piece(self, index: int, text: str, is_first: bool, logprobs: str) -> str:
        role = '"role":"assistant",' if is_first else ""
        return f'{{"index":{index},"delta":{{{role}"content":{text}}},{logprobs}"finish_reason":null}}'

    def finish(self, index: int, is_first: bool, logprobs: str, finish: Finish) -> str:
        delta = '"role":"assistant","content":""' if is_first else ""
        return f'{{"index":{index},"delta":{{{delta}}},{logprobs}{finish_members(finish)}}}'

    def logprobs(
        self, index: int, prompt: Sequence[GeneratedToken], tokens: Sequence[GeneratedToken], offset: int
    ) -> dict[str, object]:
        entries: list[dict[str, object]] = []
        for token in tokens:
            top = [token_logprob(self._tokenizer, a.token_id, a.logprob) for a in token.alternatives]
            entries.append({**token_logprob(self._tokenizer, token.id, token.logprob), "top_logprobs": top})
        return {"content": entries}

    def whole(self, index: int, choice: WholeChoice, logprobs: object) -> dict[str, object]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.finish.generated_text},
            "logprobs": logprobs,
            "finish_reason": openai_reason(choice.finish),
            "stop_reason": choice.finish.stop,
        }

    def answer_members(self, choices: Sequence[WholeChoice]) -> dict[str, object]:
        if self._num_prompt_logprobs is None:
            return {}
        found = prompt_logprobs(self._tokenizer, choices[0].prompt, self._num_prompt_logprobs)
        return {"prompt_logprobs": found}


@dataclass(slots=True)
class _ChoiceState:
    """What has happened to one choice and was not yet written."""

    index: int
    chunker: Chunker | None
    before: str  # the text that it begins with, until that is written
    offset: int  # characters of its text before the first of `tokens`
    tokens: list[GeneratedToken] = field(default_factory=list)  # whose logprobs are still to be written
    prompt: tuple[GeneratedToken, ...] = ()  # the same for the prompt
    has_started: bool = False
    ready: str = ""


class OpenAIWriter:
    """Writes one stream."""

    framing = EVENT_STREAM

    def __init__(self, accepted: Accepted, render: Render, options: RenderOptions) -> None:
        self._accepted = accepted
        self._render = render
        self._options = options
        self._has_logprobs = accepted.request.sampling.num_logprobs is not None
        self._choices = [
            _ChoiceState(i, options.chunker, before := render.before(i), len(before))
            for i in range(accepted.request.num_choices)
        ]
        self._num_generated = 0
        self._finishes: list[tuple[int, Finish]] = []
        self._head = f"data: {_envelope(accepted, render, render.chunk_kind)},"

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        frames: list[bytes] = []
        for event in events:
            choice = self._choices[event.index]
            self._take(choice, event)
            if event.finish is not None:
                frames += self._finish(choice, event.finish)
            elif choice.ready and not join:
                frames.append(self._piece(choice))
        if join:
            frames += [self._piece(choice) for choice in self._choices if choice.ready]
        return frames

    def end(self) -> Iterable[bytes]:
        if self._options.has_usage:
            yield f'{self._head}"choices":[],"usage":{self._counts()}}}\n\n'.encode("ascii")
        yield DONE

    def failure(self, error: ServeError) -> Iterable[bytes]:
        yield b"data: " + to_json(openai_body(error)) + b"\n\n"
        yield DONE

    def _take(self, choice: _ChoiceState, event: TokenEvent) -> None:
        if choice.before:
            choice.ready, choice.before = choice.before, ""
        if event.prompt and self._has_logprobs:
            choice.prompt = event.prompt
        if event.token is not None:
            self._num_generated += 1
            if self._has_logprobs:
                choice.tokens.append(event.token)
        if choice.chunker is None:
            choice.ready += event.text
        elif event.token is not None or event.text:  # a token counts even where its text is not yet certain
            choice.ready += choice.chunker.take(event.text)
        if event.finish is not None and choice.chunker is not None:
            choice.ready += choice.chunker.flush()

    def _piece(self, choice: _ChoiceState) -> bytes:
        logprobs = self._logprobs(choice)
        text = json_text(choice.ready)
        element = self._render.piece(choice.index, text, not choice.has_started, logprobs)
        choice.ready = ""
        choice.has_started = True
        usage = self._usage() if self._options.has_usage else ""
        padding = obfuscation(text) if self._options.has_obfuscation else ""
        return f'{self._head}"choices":[{element}]{usage}{padding}}}\n\n'.encode("ascii")

    def _finish(self, choice: _ChoiceState, finish: Finish) -> list[bytes]:
        self._finishes.append((choice.index, finish))
        frames = [self._piece(choice)] if choice.ready else []
        logprobs = self._logprobs(choice)
        element = self._render.finish(choice.index, not choice.has_started, logprobs, finish)
        usage = self._usage() if self._options.has_usage else ""
        text = text_to_json(finish.generated_text)
        facts = json_text(details(finish, self._accepted.request.sampling))
        frame = f'{self._head}"choices":[{element}]{usage},"generated_text":{text},"details":{facts}}}\n\n'
        return [*frames, frame.encode("utf-8")]

    def _logprobs(self, choice: _ChoiceState) -> str:
        """A member, or nothing if there is nothing to say."""
        if not choice.tokens and not choice.prompt:
            return ""
        found = self._render.logprobs(choice.index, choice.prompt, choice.tokens, choice.offset)
        logprobs = json_text(found)
        choice.offset += sum(len(token.text) for token in choice.tokens if not token.is_special)
        choice.tokens, choice.prompt = [], ()
        return f'"logprobs":{logprobs},'

    def _usage(self) -> str:
        if not self._options.has_running_usage:
            return ',"usage":null'
        return f',"usage":{self._counts()}'

    def _counts(self) -> str:
        prompt = prompt_usage(self._accepted, self._finishes)
        return json_text(openai_usage(prompt, self._num_generated))


def whole_body(accepted: Accepted, render: Render, choices: Sequence[WholeChoice]) -> bytes:
    """An answer that is not streamed."""
    has_logprobs = accepted.request.sampling.num_logprobs is not None
    elements = []
    for i, choice in enumerate(choices):
        logprobs = None
        if has_logprobs:
            logprobs = render.logprobs(i, choice.prompt, choice.tokens, len(render.before(i)))
        elements.append(render.whole(i, choice, logprobs))
    num_generated = sum(choice.finish.usage.generated_tokens for choice in choices)
    prompt = prompt_usage(accepted, ((i, choice.finish) for i, choice in enumerate(choices)))
    usage = openai_usage(prompt, num_generated)
    more = "".join(f',"{k}":{long_json_text(v)}' for k, v in render.answer_members(choices).items())
    members = f'"choices":{long_json_text(elements)},"usage":{json_text(usage)}{more}'
    return f"{_envelope(accepted, render, render.kind)},{members}}}".encode("ascii")


def openai_reason(finish: Finish) -> str:
    """stop or length."""
    return "length" if finish.reason is FinishReason.LENGTH else "stop"


def _envelope(accepted: Accepted, render: Render, kind: str) -> str:
    """The members that are equal in all objects of one answer, without the closing brace."""
    members = {
        "id": render.id,
        "object": kind,
        "created": accepted.created,
        "model": accepted.model,
        "system_fingerprint": accepted.card.fingerprint,
        **render.more,
    }
    return json_text(members)[:-1]


def finish_members(finish: Finish) -> str:
    """How a choice ended, as members of its element."""
    return f'"finish_reason":"{openai_reason(finish)}","stop_reason":{json_text(finish.stop)}'
