"""What `options` mean: how the next token is drawn, how long the answer may be, and what happens to a prompt
that is too long.

Values come from the request, else from the model's generation_config, which stands where the parameters of a
Modelfile would, else from Ollama's own defaults (its repeat_penalty has been 1.0 since August 2026).
"""

import re

from server.api.adapter_fields import parts_of
from server.api.defaults import first_given
from server.api.ollama.schema import OPTIONS_NEUTRAL, GenerationBody, Options
from server.api.ports import ModelCard
from server.api.records import Shortening
from server.api.schema import refuse_unsupported
from server.errors import BadRequest
from server.types import SamplingParams
from server.wishes import AdapterWish

MAX_STOP_STRINGS = 64
_TEMPERATURE, _TOP_K, _TOP_P = 0.8, 40, 0.9
_REPEAT_LAST_N = 64
_NUM_KEEP = 4
_LEAST_TOP_P = 1e-6  # 0 leaves the most likely token, which every share of the distribution does
_MAX_TOP_LOGPROBS = 20

_DURATION = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:(?:ns|us|µs|ms|s|m|h)(?:[\d.]+(?:ns|us|µs|ms|s|m|h))*)?")
_NOT_ZERO = re.compile(r"[1-9]")


def check_options(raw: object) -> None:
    """Raises: BadRequest for an option that is known but not served."""
    if isinstance(raw, dict):
        refuse_unsupported(raw, OPTIONS_NEUTRAL)


def sampling_of(body: GenerationBody, card: ModelCard) -> SamplingParams:
    """Raises: BadRequest."""
    asked, usual = body.options or Options(), card.generation_defaults
    repeat_penalty = first_given(asked.repeat_penalty, usual.repetition_penalty, 1.0)
    frequency, presence = asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0
    last_n = first_given(asked.repeat_last_n, None, _REPEAT_LAST_N)
    window = card.max_model_len if last_n == -1 else last_n
    if window == 0:
        repeat_penalty, frequency, presence = 1.0, 0.0, 0.0
    has_penalties = (repeat_penalty, frequency, presence) != (1.0, 0.0, 0.0)
    seed = asked.seed
    return SamplingParams(
        temperature=first_given(asked.temperature, usual.temperature, _TEMPERATURE),
        top_k=max(first_given(asked.top_k, usual.top_k, _TOP_K), 0),
        top_p=max(first_given(asked.top_p, usual.top_p, _TOP_P), _LEAST_TOP_P),
        min_p=first_given(asked.min_p, usual.min_p, 0.0),
        typical_p=first_given(asked.typical_p, None, 1.0),
        repetition_penalty=repeat_penalty,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalty_window=window if has_penalties else None,
        seed=None if seed == -1 else seed,
        num_logprobs=_num_logprobs(body),
    )


def max_tokens_of(options: Options | None) -> int | None:
    """None: until the context is full, which is what every number that is not positive means."""
    asked = None if options is None else options.num_predict
    return asked if asked is not None and asked > 0 else None


def wish_of(options: Options | None, model: str, card: ModelCard) -> AdapterWish:
    """Raises: BadRequest for a list of adapters beside a model that is one."""
    return AdapterWish(parts=None if options is None else parts_of(options.lora, model, card))


def shortening_of(body: GenerationBody, card: ModelCard) -> Shortening | None:
    """What becomes of a prompt that leaves no room for an answer; None: it is refused.

    Where Ollama would go on and shift the context while it generates, which leaves half of it at a time, here
    the room is made before: what num_predict asks for, and no more than half.
    """
    if body.truncate is False:
        return None
    options = body.options or Options()
    context = min(first_given(options.num_ctx, None, card.max_model_len), card.max_model_len)
    half = max(context // 2, 1)
    to = context - min(max_tokens_of(options) or half, half)
    num_keep = first_given(options.num_keep, None, _NUM_KEEP)
    return Shortening(
        beyond=context - 1,
        to=max(to, 1),
        first=max(to - 1, 0) if num_keep < 0 else min(num_keep, max(to - 1, 0)),
    )


def is_zero(keep_alive: object) -> bool:
    """Whether `keep_alive`, seconds or a duration as Go writes it, is zero. Raises: BadRequest.

    Models stay as long as the server runs; the value only says what a request without a prompt is answered.
    """
    if keep_alive is None:
        return False
    if isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool):
        return keep_alive == 0
    if isinstance(keep_alive, str) and _DURATION.fullmatch(keep_alive):
        return _NOT_ZERO.search(keep_alive) is None
    raise BadRequest('keep_alive: input should be seconds or a duration such as "5m"', param="keep_alive")


def _num_logprobs(body: GenerationBody) -> int | None:
    num_top = body.top_logprobs or 0
    if not 0 <= num_top <= _MAX_TOP_LOGPROBS:
        raise BadRequest(f"top_logprobs must be between 0 and {_MAX_TOP_LOGPROBS}", param="top_logprobs")
    return num_top if body.logprobs else None
