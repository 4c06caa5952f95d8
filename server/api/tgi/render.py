"""How LoRAX's answers look: one frame per token, always, and the last token's frame carries the end. No
sentinel.

A superset of what lorax-client 0.6 and 0.7, text-generation and huggingface_hub ask for: `skipped`, `index`
and `prompt_tokens` are always there, `details` is never left out of the end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from server.api.finishes import details, json_logprob, lorax_reason, text_to_json
from server.api.records import EVENT_STREAM, Accepted, WholeChoice
from server.api.shapes import json_text, long_json_text, lorax_body, to_json
from server.errors import ServeError
from server.types import Finish, GeneratedToken, TokenEvent

_NO_END = '"generated_text":null,"details":null}\n\n'
_DEPTH = 7  # of a token in the deepest list: [answer] > details > best_of_sequences > sequence > tokens

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants to see beside the text that is generated."""

    text_before: str = ""  # what `generated_text` starts with: the prompt, or nothing
    has_tokens: bool = False  # `details` of an answer that is not streamed lists tokens and sequences
    num_alternatives: int = 0  # LoRAX: `alternative_tokens` in every token
    num_top: int = 0  # TGI: `top_tokens` beside every token


class LoraxRender:
    """The parts of one request's answer."""

    def __init__(self, accepted: Accepted, wanted: Wanted) -> None:
        self._accepted = accepted
        self._wanted = wanted

    def frame(self, number: int, event: TokenEvent) -> bytes:
        """The event of the `number`-th token, counted from 1."""
        assert event.token is not None, "a choice ends without a token only where it fails"
        end = _NO_END if event.finish is None else self._end(event.finish)
        top = f'"top_tokens":{json_text(self._top(event.token))},' if self._wanted.num_top else ""
        return f'data: {{"index":{number},"token":{self._token(event.token)},{top}{end}'.encode()

    def body(self, choices: Sequence[WholeChoice], *, is_list: bool) -> bytes:
        """An answer that is not streamed. Of several choices the most likely one is the answer, and the
        others are listed for those who ask for details.
        """
        best, *others = _best_first(choices)
        facts = {**self._details(best.finish), **self._lists(best)}
        if others and self._wanted.has_tokens:
            facts["best_of_sequences"] = [self._sequence(other) for other in others]
        answer: JsonObject = {"generated_text": self._text(best.finish), "details": facts}
        return long_json_text([answer] if is_list else answer, _DEPTH).encode("ascii")

    def _token(self, token: GeneratedToken) -> str:
        is_special = "true" if token.is_special else "false"
        alternatives = self._alternatives(token)
        more = f',"alternative_tokens":{json_text(alternatives)}' if alternatives else ""
        return (
            f'{{"id":{token.id},"text":{json_text(token.text)},"logprob":{json_logprob(token.logprob)!r},'
            f'"special":{is_special},"skipped":false{more}}}'
        )

    def _end(self, finish: Finish) -> str:
        text = text_to_json(self._text(finish))
        return f'"generated_text":{text},"details":{json_text(self._details(finish))}}}\n\n'

    def _text(self, finish: Finish) -> str:
        return self._wanted.text_before + finish.generated_text

    def _details(self, finish: Finish) -> JsonObject:
        facts = details(finish, self._accepted.request.sampling)
        return {**facts, "skipped_tokens": 0, "input_length": finish.usage.prompt_tokens}

    def _sequence(self, choice: WholeChoice) -> JsonObject:
        """One that was not the best."""
        finish = choice.finish
        return {
            "generated_text": self._text(finish),
            "finish_reason": lorax_reason(finish),
            "generated_tokens": finish.usage.generated_tokens,
            "seed": finish.seed,
            **self._lists(choice),
        }

    def _lists(self, choice: WholeChoice) -> JsonObject:
        if not self._wanted.has_tokens:
            return {"prefill": [], "tokens": []}
        lists: JsonObject = {
            "prefill": [_prefill_object(token) for token in choice.prompt],
            "tokens": [self._token_object(token) for token in choice.tokens],
        }
        if self._wanted.num_top:
            lists["top_tokens"] = [self._top(token) for token in choice.tokens]
        return lists

    def _token_object(self, token: GeneratedToken) -> JsonObject:
        result: JsonObject = {
            "id": token.id,
            "text": token.text,
            "logprob": json_logprob(token.logprob),
            "special": token.is_special,
            "skipped": False,
        }
        if alternatives := self._alternatives(token):
            result["alternative_tokens"] = alternatives
        return result

    def _alternatives(self, token: GeneratedToken) -> list[JsonObject]:
        tokenizer = self._accepted.tokenizer
        return [
            {
                "id": other.token_id,
                "text": tokenizer.token_text(other.token_id),
                "logprob": json_logprob(other.logprob),
            }
            for other in token.alternatives[: self._wanted.num_alternatives]
        ]

    def _top(self, token: GeneratedToken) -> list[JsonObject]:
        tokenizer = self._accepted.tokenizer
        return [
            {
                "id": other.token_id,
                "text": tokenizer.token_text(other.token_id),
                "logprob": json_logprob(other.logprob),
                "special": tokenizer.special_text(other.token_id) is not None,
            }
            for other in token.alternatives[: self._wanted.num_top]
        ]


class LoraxWriter:
    """Writes one stream. Frames are not joined for a slow reader: clients count tokens by frames."""

    framing = EVENT_STREAM

    def __init__(self, render: LoraxRender) -> None:
        self._render = render
        self._num_tokens = 0

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        return [self._frame(event) for event in events]

    def end(self) -> Iterable[bytes]:
        return ()

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return (b"data: " + to_json(lorax_body(error)) + b"\n\n",)

    def _frame(self, event: TokenEvent) -> bytes:
        self._num_tokens += 1
        return self._render.frame(self._num_tokens, event)


def _best_first(choices: Sequence[WholeChoice]) -> list[WholeChoice]:
    """The choice of the highest mean log-probability, then the others as they are numbered."""
    best = max(range(len(choices)), key=lambda number: _mean_logprob(choices[number]))
    return [choices[best], *choices[:best], *choices[best + 1 :]]


def _mean_logprob(choice: WholeChoice) -> float:
    return fmean(json_logprob(token.logprob) for token in choice.tokens)


def _prefill_object(token: GeneratedToken) -> JsonObject:
    """A token of the prompt; nothing comes before the first one, so it has no log-probability."""
    logprob = None if token.logprob is None else json_logprob(token.logprob)
    return {"id": token.id, "text": token.text, "logprob": logprob}
