"""Ollama's embeddings: `/api/embed`, and `/api/embeddings` as older clients call it.

Vectors are the mean of the last hidden states of the served model, with the adapter that `model` names, and
of length 1; `dimensions` keeps their first numbers and makes that length 1 again. A text that is too long
loses its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from server.api.http import Endpoint
from server.api.ollama.endpoint import model_endpoint, model_name
from server.api.ollama.options import check_options, is_zero, wish_of
from server.api.ollama.render import durations
from server.api.ollama.schema import EmbedBody, EmbeddingsBody, Options
from server.api.ports import ModelCard, Tokenizer
from server.api.prompting import check_num_prompts
from server.api.records import Accepted, Draft, FrameWriter, Shortening, TextPrompt, WholeChoice
from server.api.schema import validate
from server.api.shapes import long_json_text, to_json
from server.api.state import ApiOptions, ServerState
from server.errors import BadRequest, ContextTooLong
from server.types import Pooling, SamplingParams, Timing


@dataclass(frozen=True, slots=True)
class EmbedWish:
    """One vector for each text."""

    asked_model: str  # as the client wrote it, which answers repeat
    model: str  # as the registry knows it
    texts: tuple[str, ...]
    options: Options | None
    is_shortened: bool  # a text that is too long; else it is refused
    dimensions: int  # 0: all
    is_old: bool  # /api/embeddings: one text, and nothing said but its vector
    is_stream: bool = False

    @property
    def is_load(self) -> bool:
        return not self.texts

    def for_model(self, name: str) -> "EmbedWish":
        return replace(self, model=name)

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        check_num_prompts(len(self.texts), options, self._param)  # before there is a prompt for each
        num_ctx = None if self.options is None else self.options.num_ctx
        most = min(num_ctx or card.max_model_len, card.max_model_len)
        cut = Shortening(beyond=most, to=most, first=most) if self.is_shortened else None
        return Draft(
            model=self.model,
            adapter=wish_of(self.options, self.model, card),
            prompts=tuple(TextPrompt(text, shortening=cut, param=self._param) for text in self.texts),
            sampling=SamplingParams(temperature=0.0),
            pooling=Pooling.MEAN,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return ContextTooLong(
            f"the input length exceeds the context length: it has {num_prompt} tokens, and the context holds "
            f"{limit}",
            param=self._param,
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        raise AssertionError("embeddings are not streamed")

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        vectors = [self._shown(choice) for choice in choices]
        if self.is_old:
            return to_json({"embedding": vectors[0]})
        times = durations(_overall([choice.finish.timing for choice in choices]))
        return long_json_text(
            {
                "model": self.asked_model,
                "embeddings": vectors,
                "total_duration": times["total_duration"],
                "load_duration": times["load_duration"],
                "prompt_eval_count": accepted.request.num_prompt_tokens,
            }
        ).encode("ascii")

    def load_answer(self) -> bytes:
        return to_json({"embedding": []} if self.is_old else {"model": self.asked_model, "embeddings": []})

    @property
    def _param(self) -> str:
        return "prompt" if self.is_old else "input"

    def _shown(self, choice: WholeChoice) -> list[float]:
        assert choice.vector is not None, "a pooled choice has a vector"
        if not 0 < self.dimensions < len(choice.vector):
            return list(choice.vector)
        kept = choice.vector[: self.dimensions]
        length = sqrt(sum(number * number for number in kept))
        return [number / length for number in kept] if length else list(kept)


def embed_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/embed`"""
    return model_endpoint(state, read_embed)


def embeddings_endpoint(state: ServerState) -> Endpoint:
    """`POST /api/embeddings`"""
    return model_endpoint(state, read_embeddings)


def read_embed(raw: dict[str, object]) -> EmbedWish:
    """Raises: BadRequest."""
    check_options(raw.get("options"))
    body = validate(EmbedBody, raw)
    is_zero(body.keep_alive)  # refuses what is no duration
    name = model_name(body.model)
    return EmbedWish(
        asked_model=name,
        model=name,
        texts=_texts(body.input),
        options=body.options,
        is_shortened=body.truncate is not False,
        dimensions=body.dimensions or 0,
        is_old=False,
    )


def read_embeddings(raw: dict[str, object]) -> EmbedWish:
    """Raises: BadRequest."""
    check_options(raw.get("options"))
    body = validate(EmbeddingsBody, raw)
    is_zero(body.keep_alive)
    name = model_name(body.model)
    return EmbedWish(
        asked_model=name,
        model=name,
        texts=(body.prompt,) if body.prompt else (),
        options=body.options,
        is_shortened=True,
        dimensions=0,
        is_old=True,
    )


def _texts(value: object) -> tuple[str, ...]:
    """A string, a list of strings, or nothing. Raises: BadRequest."""
    if value is None or value == "":
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("input: input should be a string or a list of strings", param="input")
    return tuple(texts)


def _overall(timings: Sequence[Timing]) -> Timing:
    """From the first text that was taken up to the last one that was done."""
    return replace(
        min(timings, key=lambda timing: timing.started),
        last_token=max(timing.last_token for timing in timings),
    )
