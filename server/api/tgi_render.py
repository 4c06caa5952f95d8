"""How LoRAX's answers look: one frame per token, always, and the last token's frame carries the end. No
sentinel.

A superset of what lorax-client 0.6 and 0.7, text-generation and huggingface_hub ask for: `skipped`, `index`
and `prompt_tokens` are always there, `details` is never left out of the end.
"""

from collections.abc import Iterable, Sequence

from server.api.finishes import details, json_logprob, text_to_json
from server.api.records import EVENT_STREAM, Accepted, WholeChoice
from server.api.shapes import json_text, lorax_body, to_json
from server.errors import ServeError
from server.types import Finish, GeneratedToken, TokenEvent

_NO_END = '"generated_text":null,"details":null}\n\n'


class LoraxWriter:
    """Writes one stream. Frames are not joined for a slow reader: clients count tokens by frames."""

    framing = EVENT_STREAM

    def __init__(self, accepted: Accepted, shown_before: str) -> None:
        """`shown_before`: what `generated_text` starts with; the prompt, or nothing."""
        self._accepted = accepted
        self._shown_before = shown_before
        self._num_tokens = 0

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        return [self._frame(event) for event in events]

    def end(self) -> Iterable[bytes]:
        return ()

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return (b"data: " + to_json(lorax_body(error)) + b"\n\n",)

    def _frame(self, event: TokenEvent) -> bytes:
        assert event.token is not None, "a choice ends without a token only where it fails"
        self._num_tokens += 1
        end = _NO_END if event.finish is None else self._end(event.finish)
        return f'data: {{"index":{self._num_tokens},"token":{self._token(event.token)},{end}'.encode()

    def _token(self, token: GeneratedToken) -> str:
        is_special = "true" if token.is_special else "false"
        more = ""
        if token.alternatives:
            more = f',"alternative_tokens":{json_text(_alternatives(self._accepted, token))}'
        return (
            f'{{"id":{token.id},"text":{json_text(token.text)},"logprob":{json_logprob(token.logprob)!r},'
            f'"special":{is_special},"skipped":false{more}}}'
        )

    def _end(self, finish: Finish) -> str:
        text = text_to_json(self._shown_before + finish.generated_text)
        return f'"generated_text":{text},"details":{json_text(_details(self._accepted, finish))}}}\n\n'


def whole_object(
    accepted: Accepted, choice: WholeChoice, shown_before: str, has_tokens: bool
) -> dict[str, object]:
    """An answer that is not streamed; the tokens are listed only for those who ask for details."""
    tokens = [_token_object(accepted, token) for token in choice.tokens] if has_tokens else []
    return {
        "generated_text": shown_before + choice.finish.generated_text,
        "details": {**_details(accepted, choice.finish), "prefill": [], "tokens": tokens},
    }


def _details(accepted: Accepted, finish: Finish) -> dict[str, object]:
    facts = details(finish, accepted.request.sampling)
    return {**facts, "skipped_tokens": 0, "input_length": finish.usage.prompt_tokens}


def _token_object(accepted: Accepted, token: GeneratedToken) -> dict[str, object]:
    result: dict[str, object] = {
        "id": token.id,
        "text": token.text,
        "logprob": json_logprob(token.logprob),
        "special": token.is_special,
        "skipped": False,
    }
    if token.alternatives:
        result["alternative_tokens"] = _alternatives(accepted, token)
    return result


def _alternatives(accepted: Accepted, token: GeneratedToken) -> list[dict[str, object]]:
    return [
        {
            "id": other.token_id,
            "text": accepted.tokenizer.token_text(other.token_id),
            "logprob": json_logprob(other.logprob),
        }
        for other in token.alternatives
    ]
