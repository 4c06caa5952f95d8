"""OpenAI's embeddings: one vector of length 1 for each input, pooled from the last hidden states of the
served model, with the adapter that `model` names.

The answer says `float` unless `base64` is asked for: float32, little-endian, as OpenAI's own SDKs read it.
"""

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.api.adapter_fields import adapter_wish
from server.api.http import Exchange
from server.api.names import name_of_two
from server.api.openai.embeddings_schema import NEUTRAL, EmbeddingsBody
from server.api.openai.prompt_values import read_prompts
from server.api.ports import ModelCard, Tokenizer
from server.api.prompting import check_num_prompts
from server.api.records import Accepted, Draft, FrameWriter, Shortening, TextPrompt, TokenPrompt, WholeChoice
from server.api.schema import refuse_unsupported, validate
from server.api.shapes import json_text
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong
from server.types import SamplingParams


@dataclass(frozen=True, slots=True)
class EmbeddingsWish:
    """`POST /v1/embeddings`"""

    body: EmbeddingsBody
    prompts: tuple[TextPrompt | TokenPrompt, ...]
    is_stream: bool = False

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        body = self.body
        check_num_prompts(len(self.prompts), options, "input")  # before they are cut
        if body.dimensions is not None and body.dimensions != card.hidden_size:
            raise BadRequest(
                f"dimensions is not supported by this model, whose vectors have {card.hidden_size} numbers",
                param="dimensions",
            )
        name = name_of_two(body.model, body.lora_id, card)
        return Draft(
            model=name,
            adapter=adapter_wish(body, name, card),
            prompts=self._cut_prompts(card.max_model_len),
            sampling=SamplingParams(temperature=0.0),
            pooling=body.wanted_pooling,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        return ContextTooLong(
            f"This model's maximum context length is {limit} tokens. However, you requested {num_prompt} "
            "tokens in one input.",
            param="input",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        raise AssertionError("embeddings are not streamed")

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        write = _base64 if self.body.encoding_format == "base64" else json_text
        entries = ",".join(
            f'{{"object":"embedding","index":{index},"embedding":{write(choice.vector)}}}'
            for index, choice in enumerate(choices)
        )
        num_tokens = accepted.request.num_prompt_tokens
        usage = f'{{"prompt_tokens":{num_tokens},"total_tokens":{num_tokens}}}'
        return (
            f'{{"object":"list","data":[{entries}],"model":{json_text(accepted.model)},"usage":{usage}}}'
        ).encode("ascii")

    def _cut_prompts(self, limit: int) -> tuple[TextPrompt | TokenPrompt, ...]:
        """The prompts with what vLLM's clients want of inputs that are too long: their beginning."""
        most = self.body.truncate_prompt_tokens
        if most is None:
            return self.prompts
        if most == 0 or most > limit:
            raise BadRequest(
                f"truncate_prompt_tokens must be -1 (what the context holds) or from 1 to {limit}",
                param="truncate_prompt_tokens",
            )
        if most == -1:
            most = limit
        cut = Shortening(beyond=most, to=most, first=most)
        return tuple(
            replace(prompt, ids=prompt.ids[:most])
            if isinstance(prompt, TokenPrompt)
            else replace(prompt, shortening=cut)
            for prompt in self.prompts
        )


def read_embeddings(raw: dict[str, object], exchange: Exchange) -> EmbeddingsWish:
    """Raises: BadRequest."""
    refuse_unsupported(raw, NEUTRAL)
    body = validate(EmbeddingsBody, raw)
    prompts = read_prompts(body.input, "input", add_special_tokens=body.add_special_tokens is not False)
    return EmbeddingsWish(body, prompts)


def _base64(vector: Sequence[float] | None) -> str:
    """A JSON string."""
    assert vector is not None, "a pooled choice has a vector"
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return f'"{b64encode(numbers.tobytes()).decode("ascii")}"'
