"""From the engine's ids to what a client sees: text, stop strings, usage, the one finish of each choice.

`Choice` is the text state of one choice. Each `SequenceOutput` of the engine becomes one `TokenEvent`. A
stop string is found here, because the engine sees no text: the event that completes it carries the finish
at once, and whatever the engine still sends for that sequence is dropped until its terminal output.

Two texts leave here and must not be confused. `TokenEvent.text` is text that is certainly part of the
answer, late by what may still become a stop string; joined it is `Finish.generated_text`.
`GeneratedToken.text` is the token's own share, never late, with special tokens spelled out.
"""

from collections.abc import Mapping
from types import MappingProxyType

from server.engine.plan import SampledToken, SequenceOutput
from server.engine.sequence import SequenceId
from server.text.detokenizer import make_detokenizer
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


class Choice:
    """One choice of a request, on the event loop's side. `finish` is None until the client has been shown
    its end.
    """

    __slots__ = (
        "_detokenizer",
        "_keep_stop",
        "_min_tokens",
        "_parts",
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
        self._detokenizer = make_detokenizer(tokenizer, request.prompt_of(index))
        self._stops = stops
        self._min_tokens = request.stop.min_tokens
        self._keep_stop = request.stop.keep_stop
        self._parts: list[str] = []

    def advance(self, output: SequenceOutput, at: float) -> TokenEvent:
        """Turn the engine's news of `at` clock seconds into the client's. Only while `finish` is None."""
        if self.first_token is None:
            self.started = output.started
            self.num_cached = output.num_cached
        if output.token is None:
            assert output.finish is not None, "an output is a token, an end, or both"
            return self.end(output.finish, at, error=output.error)
        if self.first_token is None:
            self.first_token = at
        self.last_token = at
        self.num_generated += 1
        return self._take_token(output.token, output, at)

    def end(self, reason: FinishReason, at: float, *, error: str | None = None) -> TokenEvent:
        """Finish without another token: the client left, the server drains, or the engine gave up."""
        error = error or _MESSAGES.get(reason)
        text = ""
        if reason is not FinishReason.ERROR:  # after an error nothing is trusted, the text state included
            text, _ = self._match(self._detokenizer.flush(), is_last=True)
        self._finish(text, reason, at, stop=None, error=error)
        return TokenEvent(self.index, text, None, self.finish)

    def _take_token(self, token: SampledToken, output: SequenceOutput, at: float) -> TokenEvent:
        piece, spelled = self._read(token, output)
        if output.finish is not None:
            piece += self._detokenizer.flush()
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
        return TokenEvent(self.index, text, generated, self.finish)

    def _read(self, token: SampledToken, output: SequenceOutput) -> tuple[str, str | None]:
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
        return self._detokenizer.push(token.token_id), None

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
