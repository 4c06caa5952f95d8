"""LoRAX's and TGI's generation routes: bodies to drafts. How answers look is in render.py.

Sampling follows LoRAX: greedy, unless `do_sample` or any of temperature, top_k, top_p, typical_p asks for it;
temperature 0 is greedy whatever else is said. Refusals use LoRAX's texts, which name the parameter in
backticks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.adapter_fields import adapter_wish
from server.api.http import Exchange
from server.api.openai.chat import read_chat
from server.api.openai.completions import read_completion
from server.api.ports import ModelCard, Tokenizer
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, Prompt, TextPrompt, WholeChoice, Wish
from server.api.schema import MAX_INT, MAX_SEED, refuse_unsupported, stop_strings, validate
from server.api.state import ApiOptions
from server.api.tgi.render import LoraxRender, LoraxWriter, Wanted
from server.api.tgi.schema import NEUTRAL, GenerateBody, Parameters
from server.errors import BadRequest, ContextTooLong
from server.types import SamplingParams

MAX_STOP_SEQUENCES = 16
_MAX_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class LoraxWish:
    """`POST /`, `/generate`, `/generate_stream`"""

    inputs: str
    parameters: Parameters
    is_stream: bool
    is_list: bool  # POST / answers a list of one

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        asked = self.parameters
        _check_choices(asked, options.max_choices, self.is_stream)
        _check_ranges(asked, card.max_model_len)
        if not self.inputs:
            raise BadRequest("`inputs` cannot be empty", param="inputs")
        return Draft(
            model=asked.adapter_id,
            adapter=adapter_wish(
                asked, asked.adapter_id, card, asked.merged_adapters, name_param="adapter_id"
            ),
            prompts=(self._prompt(),),
            sampling=_sampling(asked),
            max_tokens=asked.max_new_tokens,
            stop=stop_strings(asked.stop, MAX_STOP_SEQUENCES),
            ignore_eos=bool(asked.ignore_eos_token),
            keep_stop=True,
            n=asked.best_of or 1,
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        if max_tokens is None:
            return ContextTooLong(
                f"`inputs` must have less than {limit} tokens. Given: {num_prompt}", param="inputs"
            )
        return ContextTooLong(
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {num_prompt} `inputs` tokens and {max_tokens} `max_new_tokens`",
            param="max_new_tokens",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        return LoraxWriter(LoraxRender(accepted, self._wanted(accepted)))

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        return LoraxRender(accepted, self._wanted(accepted)).body(choices, is_list=self.is_list)

    def _prompt(self) -> Prompt:
        keep_last = self.parameters.truncate
        if self.parameters.apply_chat_template:
            message: dict[str, object] = {"role": "user", "content": self.inputs}
            return ChatPrompt((message,), num_chars=len(self.inputs), keep_last=keep_last)
        return TextPrompt(self.inputs, keep_last=keep_last)

    def _wanted(self, accepted: Accepted) -> Wanted:
        asked = self.parameters
        return Wanted(
            text_before=accepted.prompt.text if asked.return_full_text else "",
            has_tokens=bool(asked.details or asked.decoder_input_details),
            num_alternatives=asked.return_k_alternatives or 0,
            num_top=asked.top_n_tokens or 0,
        )


def read_generate(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /generate`. Raises: BadRequest."""
    return _read(body, is_stream=False)


def read_generate_stream(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /generate_stream`. Raises: BadRequest."""
    return _read(body, is_stream=True)


def read_compat(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /`: the body says whether to stream. Raises: BadRequest."""
    return _read(body, is_stream=None, is_list=True)


def read_invocation(body: dict[str, object], exchange: Exchange) -> Wish:
    """`POST /invocations`, SageMaker's one route for everything: `inputs` as on `POST /`, `messages` as a
    chat, `prompt` as a completion. Raises: BadRequest.
    """
    if "inputs" not in body:
        if "messages" in body:
            return read_chat(body, exchange)
        if "prompt" in body:
            return read_completion(body, exchange)
    return read_compat(body, exchange)


def _read(body: dict[str, object], *, is_stream: bool | None, is_list: bool = False) -> LoraxWish:
    parameters = body.get("parameters")
    if isinstance(parameters, dict):
        if parameters.get("merged_adapters") is not None and parameters.get("adapter_id"):
            raise BadRequest(
                "at most one of `adapter_id` or `adapters` may be provided", param="merged_adapters"
            )
        refuse_unsupported(parameters, NEUTRAL)
    generate = validate(GenerateBody, body)
    if is_stream is None:
        is_stream = bool(generate.stream)
    return LoraxWish(generate.inputs, generate.parameters or Parameters(), is_stream, is_list)


def _check_choices(asked: Parameters, most: int, is_stream: bool) -> None:
    """What cannot be streamed, and `best_of`; in LoRAX's words. Raises: BadRequest."""
    best_of = 1 if asked.best_of is None else asked.best_of
    if is_stream and best_of != 1:
        raise BadRequest("`best_of` != 1 is not supported when streaming tokens", param="best_of")
    if is_stream and asked.decoder_input_details:
        raise BadRequest(
            "`decoder_input_details` == true is not supported when streaming tokens",
            param="decoder_input_details",
        )
    if best_of == 1:
        return
    if most == 1:
        raise BadRequest("`best_of` != 1 is not allowed for this endpoint", param="best_of")
    if not 0 < best_of <= most:
        raise BadRequest(f"`best_of` must be > 0 and <= {most}. Given: {best_of}", param="best_of")
    if not _is_sampling(asked):
        raise BadRequest("you must use sampling when `best_of` is > 1", param="best_of")
    if asked.seed is not None:
        raise BadRequest("`seed` must not be set when `best_of` > 1", param="seed")


def _check_ranges(asked: Parameters, max_tokens: int) -> None:
    """In LoRAX's words. Raises: BadRequest."""
    _positive(asked, "repetition_penalty", "top_k", "max_new_tokens", "return_k_alternatives")
    if asked.temperature is not None and asked.temperature < 0:
        raise BadRequest("`temperature` must be non-negative", param="temperature")
    for name in ("frequency_penalty", "presence_penalty"):
        penalty = getattr(asked, name)
        if penalty is not None and not -2 <= penalty <= 2:
            raise BadRequest(f"`{name}` must be >= -2.0 and <= 2.0", param=name)
    for name in ("top_p", "typical_p"):
        mass = getattr(asked, name)
        if mass is not None and not 0 < mass <= 1:  # LoRAX, too, says this and takes a top_p of 1
            raise BadRequest(f"`{name}` must be > 0.0 and < 1.0", param=name)
    if (asked.return_k_alternatives or 0) > _MAX_ALTERNATIVES:
        raise BadRequest(
            f"`return_k_alternatives` must be <= {_MAX_ALTERNATIVES}", param="return_k_alternatives"
        )
    if asked.top_n_tokens is not None and not 0 <= asked.top_n_tokens <= _MAX_ALTERNATIVES:
        raise BadRequest(
            f"`top_n_tokens` must be >= 0 and <= {_MAX_ALTERNATIVES}. Given: {asked.top_n_tokens}",
            param="top_n_tokens",
        )
    if asked.seed is not None and not 0 <= asked.seed <= MAX_SEED:
        raise BadRequest("`seed` must be a 64-bit integer that is not negative", param="seed")
    if asked.truncate is not None and not 0 < asked.truncate < max_tokens:
        raise BadRequest(
            f"`truncate` must be strictly positive and less than {max_tokens}. Given: {asked.truncate}",
            param="truncate",
        )


def _positive(asked: Parameters, *names: str) -> None:
    for name in names:
        value = getattr(asked, name)
        if value is not None and value <= 0:
            raise BadRequest(f"`{name}` must be strictly positive", param=name)


def _is_sampling(asked: Parameters) -> bool:
    if asked.temperature == 0:
        return False
    if (asked.best_of or 1) > 1:  # whoever names any of these then wants sequences that differ
        named = (asked.temperature, asked.top_k, asked.top_p, asked.typical_p)
        return bool(asked.do_sample) or any(value is not None for value in named)
    return (
        bool(asked.do_sample)
        or asked.top_k is not None
        or any(
            value is not None and value != 1 for value in (asked.temperature, asked.top_p, asked.typical_p)
        )
    )


def _sampling(asked: Parameters) -> SamplingParams:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return SamplingParams(
        temperature=temperature if _is_sampling(asked) else 0.0,
        top_k=min(asked.top_k or 0, MAX_INT),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        typical_p=1.0 if asked.typical_p is None else asked.typical_p,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        seed=asked.seed,
        # Every frame has the log-probability of its token, and best_of is chosen by them.
        num_logprobs=max(asked.return_k_alternatives or 0, asked.top_n_tokens or 0),
        num_prompt_logprobs=0 if asked.decoder_input_details else None,
    )
