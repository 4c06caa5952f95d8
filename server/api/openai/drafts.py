"""What the bodies of OpenAI's generation routes have in common, and so what becomes of it in their drafts.

Chat, text completions and responses differ in the prompt, the meaning of `logprobs` and the shape of an
answer. Sampling defaults resolve as vLLM's do: the request, then the model's generation_config, then
OpenAI's.
"""

from server.api.adapter_fields import adapter_wish
from server.api.defaults import first_given
from server.api.http import Exchange
from server.api.names import name_of_two
from server.api.openai.render import RenderOptions
from server.api.openai.schema import GenerationBody
from server.api.ports import ModelCard, Tokenizer
from server.api.prompting import check_ids
from server.api.records import Draft, Prompt
from server.api.schema import stop_strings
from server.api.shapes import shown
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong
from server.types import SamplingParams


def wants_stream(body: GenerationBody, exchange: Exchange) -> bool:
    """As the body says, or the query where it says nothing. Raises: BadRequest."""
    is_stream = body.stream
    if is_stream is None:  # kiwi's switch: ?stream=true
        is_stream = dict(exchange.query()).get("stream", "").lower() in ("true", "1")
    if body.stream_options is not None and not is_stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    if body.prompt_logprobs is not None and is_stream:
        raise BadRequest("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    return is_stream


def draft_of(
    body: GenerationBody,
    prompts: tuple[Prompt, ...],
    card: ModelCard,
    tokenizer: Tokenizer,
    options: ApiOptions,
    *,
    num_logprobs: int | None,
    max_tokens: int | None,
    num_prompt_logprobs: int | None = None,
    usual_max_tokens: int | None = None,
) -> Draft:
    """What a body asks for, whichever of OpenAI's routes it came by. Raises: BadRequest."""
    n = body.n or 1
    if n > options.max_choices:
        raise BadRequest(f"n must not be larger than {options.max_choices}", param="n")
    stop_token_ids = tuple(body.stop_token_ids or ())
    check_ids(stop_token_ids, card.vocab_size, "stop_token_ids")
    name = name_of_two(body.model, body.lora_id, card)
    return Draft(
        model=name,
        adapter=adapter_wish(body, name, card),
        prompts=prompts,
        sampling=_sampling(body, num_logprobs, num_prompt_logprobs, card),
        max_tokens=max_tokens,
        usual_max_tokens=usual_max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=stop_strings(body.stop, options.max_stop_strings),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        keep_stop=bool(body.include_stop_str_in_output),
        n=n,
    )


def _sampling(
    body: GenerationBody, num_logprobs: int | None, num_prompt_logprobs: int | None, card: ModelCard
) -> SamplingParams:
    usual = card.generation_defaults
    top_k = first_given(body.top_k, usual.top_k, 0)
    return SamplingParams(
        temperature=first_given(body.temperature, usual.temperature, 1.0),
        top_k=max(top_k, 0),  # -1 and 0 both switch it off
        top_p=first_given(body.top_p, usual.top_p, 1.0),
        min_p=first_given(body.min_p, usual.min_p, 0.0),
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        repetition_penalty=first_given(body.repetition_penalty, usual.repetition_penalty, 1.0),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias, card.vocab_size),
        seed=body.seed,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: list[tuple[int, float]] = []
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise BadRequest(
                f"logit_bias: {shown(key)!r} is not a token id (the vocabulary has {vocab_size})",
                param="logit_bias",
            )
        pairs.append((int(key), value))
    return tuple(pairs)


def render_options(body: GenerationBody) -> RenderOptions:
    """`stream_options`, settled."""
    options = body.stream_options
    if options is None:
        return RenderOptions()
    return RenderOptions(
        has_usage=bool(options.include_usage),
        has_running_usage=bool(options.include_usage and options.continuous_usage_stats),
        chunk_by=options.chunk_by or "token",
        chunk_size=options.chunk_size or 1,
        has_obfuscation=bool(options.include_obfuscation),
    )


def context_too_long(param: str, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
    """In OpenAI's words; `param` is where the prompt came from."""
    asked = (
        f"{num_prompt + max_tokens} tokens ({num_prompt} in the {param}, {max_tokens} in the completion)"
        if max_tokens is not None
        else f"{num_prompt} tokens in the {param} and room for at least one more"
    )
    return ContextTooLong(
        f"This model's maximum context length is {limit} tokens. However, you requested {asked}.", param=param
    )
