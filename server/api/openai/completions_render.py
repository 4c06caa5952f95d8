"""How text completions look: elements of their answers, streamed and whole."""

from collections.abc import Mapping, Sequence

from server.api.finishes import json_logprob
from server.api.openai.prompt_logprobs import prompt_logprobs
from server.api.openai.render import finish_members, openai_reason
from server.api.records import Accepted, WholeChoice
from server.types import Finish, GeneratedToken


class CompletionRender:
    """Elements of text completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, accepted: Accepted, *, is_echo: bool = False, num_prompt_logprobs: int | None = None
    ) -> None:
        """`is_echo`: a text begins with its prompt. `num_prompt_logprobs`: add vLLM's `prompt_logprobs`."""
        self.id = f"cmpl-{accepted.request.request_id}"
        self.more: Mapping[str, object] = {}
        self._accepted = accepted
        self._tokenizer = accepted.tokenizer
        self._is_echo = is_echo
        self._num_prompt_logprobs = num_prompt_logprobs

    def before(self, index: int) -> str:
        return self._accepted.prompt_of(index).text if self._is_echo else ""

    def piece(self, index: int, text: str, is_first: bool, logprobs: str) -> str:
        return f'{{"index":{index},"text":{text},{logprobs}"finish_reason":null}}'

    def finish(self, index: int, is_first: bool, logprobs: str, finish: Finish) -> str:
        return f'{{"index":{index},"text":"",{logprobs}{finish_members(finish)}}}'

    def logprobs(
        self, index: int, prompt: Sequence[GeneratedToken], tokens: Sequence[GeneratedToken], offset: int
    ) -> dict[str, object]:
        shown = (*prompt, *tokens) if self._is_echo else tokens
        spelled = [self._tokenizer.token_text(token.id) for token in shown]
        offsets = self._prompt_offsets(index, prompt) if self._is_echo else []
        for token in tokens:
            offsets.append(offset)
            offset += 0 if token.is_special else len(token.text)
        return {
            "text_offset": offsets,
            "token_logprobs": [_logprob(token) for token in shown],
            "tokens": spelled,
            "top_logprobs": [self._top(token, text) for token, text in zip(shown, spelled, strict=True)],
        }

    def whole(self, index: int, choice: WholeChoice, logprobs: object) -> dict[str, object]:
        element: dict[str, object] = {
            "index": index,
            "text": self.before(index) + choice.finish.generated_text,
            "logprobs": logprobs,
            "finish_reason": openai_reason(choice.finish),
            "stop_reason": choice.finish.stop,
        }
        if self._num_prompt_logprobs is not None:
            element["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, choice.prompt, self._num_prompt_logprobs
            )
        return element

    def answer_members(self, choices: Sequence[WholeChoice]) -> dict[str, object]:
        return {}

    def _prompt_offsets(self, index: int, prompt: Sequence[GeneratedToken]) -> list[int]:
        """A special token is part of the echoed text only where the client wrote it out, or gave ids."""
        text, offset = self.before(index), 0
        offsets: list[int] = []
        for token in prompt:
            offsets.append(offset)
            if not token.is_special or text.startswith(token.text, offset):
                offset += len(token.text)
        return offsets

    def _top(self, token: GeneratedToken, spelled: str) -> dict[str, float] | None:
        own = _logprob(token)
        if own is None:
            return None
        limit = self._accepted.request.sampling.num_logprobs  # of a prompt there may be more
        top = {
            self._tokenizer.token_text(other.token_id): json_logprob(other.logprob)
            for other in token.alternatives[:limit]
        }
        return {**top, spelled: own}


def _logprob(token: GeneratedToken) -> float | None:
    """Null for the first token of a prompt, before which there is nothing."""
    return None if token.logprob is None else json_logprob(token.logprob)
