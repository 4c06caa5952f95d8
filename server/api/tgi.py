"""LoRAX's and TGI's routes: bodies to drafts. How answers look is in tgi_render.py.

Sampling follows LoRAX: greedy, unless `do_sample` or any of temperature, top_k, top_p asks for it;
temperature 0 is greedy whatever else is said. Refusals use LoRAX's texts, which name the parameter in
backticks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.generation import read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_tolerated_type
from server.api.ports import ModelCard, Tokenizer
from server.api.prompting import check_chars, run_for_text
from server.api.records import Accepted, ChatPrompt, Draft, FrameWriter, Prompt, TextPrompt, WholeChoice
from server.api.schema import MAX_INT, MAX_SEED, refuse_unsupported, stop_strings, validate
from server.api.shapes import long_json_text, to_json
from server.api.state import ApiOptions, ServerState
from server.api.tgi_render import LoraxWriter, whole_object
from server.api.tgi_schema import NEUTRAL, GenerateBody, Parameters, TokenizeBody
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
        _check(asked, card.max_model_len, self.is_stream)
        if not self.inputs:
            raise BadRequest("`inputs` cannot be empty", param="inputs")
        return Draft(
            model=asked.adapter_id,
            prompts=(self._prompt(),),
            sampling=_sampling(asked),
            max_tokens=asked.max_new_tokens,
            stop=stop_strings(asked.stop, MAX_STOP_SEQUENCES),
            ignore_eos=bool(asked.ignore_eos_token),
            keep_stop=True,
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
        return LoraxWriter(accepted, self._shown_before(accepted))

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        has_tokens = bool(self.parameters.details)
        answer = whole_object(accepted, choices[0], self._shown_before(accepted), has_tokens)
        return long_json_text([answer] if self.is_list else answer).encode("ascii")

    def _prompt(self) -> Prompt:
        keep_last = self.parameters.truncate
        if self.parameters.apply_chat_template:
            message: dict[str, object] = {"role": "user", "content": self.inputs}
            return ChatPrompt((message,), num_chars=len(self.inputs), keep_last=keep_last)
        return TextPrompt(self.inputs, keep_last=keep_last)

    def _shown_before(self, accepted: Accepted) -> str:
        return accepted.prompt.text if self.parameters.return_full_text else ""


def read_generate(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /generate`. Raises: BadRequest."""
    return _read(body, is_stream=False)


def read_generate_stream(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /generate_stream`. Raises: BadRequest."""
    return _read(body, is_stream=True)


def read_compat(body: dict[str, object], exchange: Exchange) -> LoraxWish:
    """`POST /`: the body says whether to stream. Raises: BadRequest."""
    return _read(body, is_stream=None, is_list=True)


def _read(body: dict[str, object], *, is_stream: bool | None, is_list: bool = False) -> LoraxWish:
    parameters = body.get("parameters")
    if isinstance(parameters, dict):
        if parameters.get("merged_adapters") is not None and parameters.get("adapter_id"):
            raise BadRequest(
                "at most one of `adapter_id` or `merged_adapters` may be provided", param="merged_adapters"
            )
        refuse_unsupported(parameters, NEUTRAL)
    generate = validate(GenerateBody, body)
    if is_stream is None:
        is_stream = bool(generate.stream)
    return LoraxWish(generate.inputs, generate.parameters or Parameters(), is_stream, is_list)


def _check(asked: Parameters, max_tokens: int, is_stream: bool) -> None:
    """Ranges, in LoRAX's words. Raises: BadRequest."""
    _check_best_of(asked.best_of, is_stream)
    _positive(asked, "repetition_penalty", "top_k", "max_new_tokens", "return_k_alternatives")
    if asked.temperature is not None and asked.temperature < 0:
        raise BadRequest("`temperature` must be non-negative", param="temperature")
    for name in ("frequency_penalty", "presence_penalty"):
        penalty = getattr(asked, name)
        if penalty is not None and not -2 <= penalty <= 2:
            raise BadRequest(f"`{name}` must be >= -2.0 and <= 2.0", param=name)
    if asked.top_p is not None and not 0 < asked.top_p <= 1:
        raise BadRequest("`top_p` must be > 0.0 and <= 1.0", param="top_p")
    if asked.typical_p is not None and asked.typical_p != 1:
        is_valid = 0 < asked.typical_p < 1
        says = "is not supported by this server" if is_valid else "must be > 0.0 and < 1.0"
        raise BadRequest(f"`typical_p` {says}", param="typical_p")
    if (asked.return_k_alternatives or 0) > _MAX_ALTERNATIVES:
        raise BadRequest(
            f"`return_k_alternatives` must be <= {_MAX_ALTERNATIVES}", param="return_k_alternatives"
        )
    if asked.seed is not None and not 0 <= asked.seed <= MAX_SEED:
        raise BadRequest("`seed` must be a 64-bit integer that is not negative", param="seed")
    if asked.truncate is not None and not 0 < asked.truncate < max_tokens:
        raise BadRequest(
            f"`truncate` must be strictly positive and less than {max_tokens}. Given: {asked.truncate}",
            param="truncate",
        )
    if asked.decoder_input_details:
        says = "is not supported when streaming tokens" if is_stream else "is not supported by this server"
        raise BadRequest(f"`decoder_input_details` == true {says}", param="decoder_input_details")


def _check_best_of(best_of: int | None, is_stream: bool) -> None:
    if best_of is None or best_of == 1:
        return
    if best_of < 1:
        raise BadRequest(f"`best_of` must be > 0 and <= 1. Given: {best_of}", param="best_of")
    if is_stream:
        raise BadRequest("`best_of` != 1 is not supported when streaming tokens", param="best_of")
    raise BadRequest("`best_of` != 1 is not allowed for this endpoint", param="best_of")


def _positive(asked: Parameters, *names: str) -> None:
    for name in names:
        value = getattr(asked, name)
        if value is not None and value <= 0:
            raise BadRequest(f"`{name}` must be strictly positive", param=name)


def _sampling(asked: Parameters) -> SamplingParams:
    temperature = 1.0 if asked.temperature is None else asked.temperature
    is_sampling = temperature != 0 and (
        bool(asked.do_sample)
        or temperature != 1
        or asked.top_k is not None
        or (asked.top_p is not None and asked.top_p < 1)
    )
    return SamplingParams(
        temperature=temperature if is_sampling else 0.0,
        top_k=min(asked.top_k or 0, MAX_INT),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        seed=asked.seed,
        num_logprobs=asked.return_k_alternatives or 0,  # every frame has the log-probability of its token
    )


def tokenize_endpoint(state: ServerState) -> Endpoint:
    """`POST /tokenize`: a list of {id, text, start, stop}."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        check_tolerated_type(exchange.header(b"content-type"))
        raw = await exchange.read_body(state.options.max_body_bytes)
        body = await read_json(service, raw, lambda value: validate(TokenizeBody, value))
        check_chars(len(body.inputs), service.card.max_model_len, service.tokenizer)

        def tokenise() -> bytes:
            spans = service.tokenizer.encode_with_offsets(
                body.inputs, add_special_tokens=body.add_special_tokens is not False
            )
            return to_json([{"id": s.id, "text": s.text, "start": s.start, "stop": s.stop} for s in spans])

        await exchange.answer(await run_for_text(service.pool, len(body.inputs), tokenise))

    return endpoint


def info_endpoint(state: ServerState) -> Endpoint:
    """`GET /info`: LoRAX's fields, then TGI's where they are called otherwise; null where nothing
    corresponds.
    """

    async def endpoint(exchange: Exchange) -> None:
        card = state.require_service().card
        await exchange.answer(
            to_json(
                {
                    "model_id": card.id,
                    "model_sha": card.sha,
                    "model_dtype": card.dtype,
                    "model_device_type": card.device.partition(":")[0],
                    "model_pipeline_tag": "text-generation",
                    "max_concurrent_requests": None,
                    "max_best_of": 1,
                    "max_stop_sequences": MAX_STOP_SEQUENCES,
                    "max_input_length": card.max_model_len - 1,
                    "max_total_tokens": card.max_model_len,
                    "waiting_served_ratio": None,
                    "max_batch_total_tokens": None,
                    "max_waiting_tokens": None,
                    "validation_workers": 1,
                    "eager_prefill": False,
                    "version": state.version,
                    "sha": None,
                    "docker_label": None,
                    "request_logger_url": None,
                    "max_input_tokens": card.max_model_len - 1,
                    "max_client_batch_size": 1,
                    "router": "motet",
                }
            )
        )

    return endpoint
