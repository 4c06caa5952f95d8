"""From the engine's ids to what a client sees: text, stop strings, usage, the one finish of each choice.

`Choice` is the text state of one choice. A `SequenceOutput` of the engine becomes one `TokenEvent`. A
stop string is found here, because the engine sees no text: the event that completes it carries the finish
at once, and whatever the engine still sends for that sequence is dropped until its terminal output. Scores of
the prompt come piece by piece, as its chunks are computed, and leave with the first event.

Two texts leave here and must not be confused. `TokenEvent.text` is text that is certainly part of the
answer, late by what may still become a stop string; joined it is `Finish.generated_text`.
`GeneratedToken.text` is the token's own share, never late, with special tokens spelled out.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from server.engine.plan import SampledToken, ScoredToken, SequenceOutput
from server.engine.sequence import SequenceId
from server.text.detokenizer import Detokenizer, make_detokenizer
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer
from server.types import Finish, FinishReason, GeneratedToken, GenerationRequest, Timing, TokenEvent, Usage

# What a client is told when whoever ended the choice said nothing.
_MESSAGES: Mapping[FinishReason, str] = MappingProxyType(
    {
        FinishReason.ERROR: "the engine could not finish the request",
        FinishReason.ABORT: "the request was aborted",
    }
)


class PromptTokens:
    """The tokens of a prompt that is scored. Nothing comes before the first one, so it has no
    log-probability.
    """

    __slots__ = ("_detokenizer", "_tokenizer", "_tokens")

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = make_detokenizer(tokenizer)
        self._tokens: list[GeneratedToken] = []
        self._add(ids[0], None)

    def take(self, scores: Sequence[ScoredToken]) -> None:
        """The next tokens, as the engine tells them."""
        for scored in scores:
            self._add(scored.token_id, scored)

    def all(self) -> tuple[GeneratedToken, ...]:
        return tuple(self._tokens)

    def _add(self, token_id: int, scored: ScoredToken | None) -> None:
        spelled = self._tokenizer.special_text(token_id)
        text = self._detokenizer.push(token_id) if spelled is None else spelled
        logprob, alternatives = (None, ()) if scored is None else (scored.logprob, scored.alternatives)
        self._tokens.append(GeneratedToken(token_id, text, spelled is not None, logprob, alternatives))


class Choice:
    """One choice of a request, on the event loop's side. `finish` is None until the client has been shown
    its end.
    """

    __slots__ = (
        "_detokenizer",
        "_keep_stop",
        "_min_tokens",
        "_parts",
        "_prompt",
        "_request",
        "_stops",
        "_tokenizer",
        "finish",
        "first_token",
        "id",
        "index",
        "last_token",
        "num_cached",
        "num_generated",
        "queued",
        "received",
        "seed",
        "started",
    )

    def __init__(
        self,
        id: SequenceId,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        stops: StopStrings | None,
        *,
        index: int,
        seed: int,
        queued: float,
    ) -> None:
        self.id = id
        self.index = index
        self.seed = seed
        self.queued = queued
        self.received = request.received or queued  # a caller that is not a server has no arrival
        self.finish: Finish | None = None
        self.num_generated = 0
        self.num_cached = 0
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = (
            None  # made with the first token: a request may have many choices
        )
        self._stops = stops
        self._min_tokens = request.stop.min_tokens
        self._keep_stop = request.stop.keep_stop
        self._parts: list[str] = []
        is_scored = request.sampling.num_prompt_logprobs is not None
        self._prompt = PromptTokens(tokenizer, request.prompt_of(index)) if is_scored else None

    def advance(self, output: SequenceOutput, at: float) -> TokenEvent | None:
        """Turn the engine's news of `at` clock seconds into the client's; None if there is none for it yet.
        Only while `finish` is None.
        """
        if self.first_token is None:
            self.started = output.started
            self.num_cached = output.num_cached
        if output.scores:
            assert self._prompt is not None, "scores come where they were asked for"
            self._prompt.take(output.scores)
        if output.token is None:
            return None if output.finish is None else self._end_without_token(output, output.finish, at)
        is_first = self.first_token is None
        if is_first:
            self.first_token = at
        self.last_token = at
        self.num_generated += 1
        return self._take_token(output.token, output, at, self._all_of_prompt() if is_first else ())

    def end(self, reason: FinishReason, at: float, *, error: str | None = None) -> TokenEvent:
        """Finish without another token: the client left, the server drains, or the engine gave up."""
        error = error or _MESSAGES.get(reason)
        text = ""
        if reason is not FinishReason.ERROR:  # after an error nothing is trusted, the text state included
            left = "" if self._detokenizer is None else self._detokenizer.flush()
            text, _ = self._match(left, is_last=True)
        self._finish(text, reason, at, stop=None, error=error)
        return TokenEvent(self.index, text, None, self.finish)

    def _end_without_token(self, output: SequenceOutput, reason: FinishReason, at: float) -> TokenEvent:
        """The end of what was asked about its prompt alone, or an end before there was an answer."""
        if reason is not FinishReason.LENGTH:
            return self.end(reason, at, error=output.error)
        self._finish("", reason, at, stop=None)
        return TokenEvent(self.index, "", None, self.finish, self._all_of_prompt(), output.vector)

    def _all_of_prompt(self) -> tuple[GeneratedToken, ...]:
        """Once, when the engine has computed it to its end."""
        prompt, self._prompt = self._prompt, None
        return () if prompt is None else prompt.all()

    def _take_token(
        self, token: SampledToken, output: SequenceOutput, at: float, prompt: tuple[GeneratedToken, ...]
    ) -> TokenEvent:
        detokenizer = self._detokenizer
        if detokenizer is None:
            detokenizer = make_detokenizer(self._tokenizer, self._request.prompt_of(self.index))
            self._detokenizer = detokenizer
        piece, spelled = self._read(token, output, detokenizer)
        if output.finish is not None:
            piece += detokenizer.flush()
        text, stop = self._match(piece, is_last=output.finish is not None)
        if stop is not None:
            if self._keep_stop and spelled is None:
                piece = text  # nothing is held back, so the token's share ends where the answer ends
            self._finish(text, FinishReason.STOP, at, stop=stop)
        elif output.finish is not None:
            error = output.error or _MESSAGES.get(output.finish)
            self._finish(text, output.finish, at, stop=output.stop_token, error=error)
        elif text:
            self._parts.append(text)
        shown = piece if spelled is None else spelled
        generated = GeneratedToken(
            token.token_id, shown, spelled is not None, token.logprob, token.alternatives
        )
        return TokenEvent(self.index, text, generated, self.finish, prompt)

    def _read(
        self, token: SampledToken, output: SequenceOutput, detokenizer: Detokenizer
    ) -> tuple[str, str | None]:
        """The text a token completes, and its spelling if it is not part of the answer.

        A token that ended the choice is not part of it: neither an end-of-sequence token that the tokenizer
        does not call special, nor a stop token, unless the protocol keeps stops.
        """
        spelled = self._tokenizer.special_text(token.token_id)
        if spelled is None and output.finish is FinishReason.STOP:
            is_dropped = output.stop_token is None or not self._keep_stop
            spelled = self._tokenizer.token_text(token.token_id) if is_dropped else None
        if spelled is not None:
            return "", spelled
        return detokenizer.push(token.token_id), None

    def _match(self, piece: str, *, is_last: bool) -> tuple[str, str | None]:
        """The text that is now certain to be part of the answer, and the stop string that ends it."""
        if self._stops is None:
            return piece, None
        text, stop = piece, None
        if piece:
            text, stop = self._stops.push(piece, may_stop=self.num_generated >= self._min_tokens)
        if stop is None and is_last:
            text += self._stops.flush()
        return text, stop

    def _finish(
        self,
        last_text: str,
        reason: FinishReason,
        at: float,
        *,
        stop: str | int | None,
        error: str | None = None,
    ) -> None:
        self._parts.append(last_text)
        self.finish = Finish(
            reason=reason,
            generated_text="".join(self._parts),
            usage=Usage(len(self._request.prompt_of(self.index)), self.num_generated, self.num_cached),
            timing=Timing(
                received=self.received,
                queued=self.queued,
                started=at if self.started is None else self.started,
                first_token=at if self.first_token is None else self.first_token,
                last_token=at if self.last_token is None else self.last_token,
            ),
            seed=self.seed,
            stop=stop,
            error=error,
        )
        self._parts.clear()
