"""The facts of tokens and of a finished choice as JSON: what several protocols say alike."""

import json
from collections.abc import Iterable

from server.api.ports import Tokenizer
from server.api.records import Accepted
from server.types import Finish, FinishReason, SamplingParams, Usage

MIN_LOGPROB = -9999.0  # JSON has no -Infinity; vLLM's floor

# Line readers of some clients refuse longer lines, and escapes make one of six characters; there are three
# characters at which others split a line.
_LONG_CHARS = 64 * 1024
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def lorax_reason(finish: Finish) -> str:
    """length, eos_token or stop_sequence."""
    if finish.reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if finish.stop is None else "stop_sequence"


def details(finish: Finish, sampling: SamplingParams) -> dict[str, object]:
    """How a choice ended and what it cost. Times are exact where the headers' are whole milliseconds."""
    usage, timing = finish.usage, finish.timing
    return {
        "finish_reason": lorax_reason(finish),
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.generated_tokens,
        "cached_tokens": usage.cached_tokens,
        "seed": None if sampling.is_greedy else finish.seed,
        "queue_time_ms": _exact_ms(timing.queue_s),
        "time_to_first_token_ms": _exact_ms(timing.time_to_first_token_s),
        "total_time_ms": _exact_ms(timing.total_s),
    }


def prompt_usage(accepted: Accepted, choices: Iterable[tuple[int, Finish]]) -> Usage:
    """The prompts of a request together, each counted once, going by the numbered choices that are over."""
    cached: dict[int, int] = {}
    for index, finish in choices:
        number = index // accepted.request.n
        cached[number] = max(cached.get(number, 0), finish.usage.cached_tokens)
    return Usage(accepted.request.num_prompt_tokens, 0, sum(cached.values()))


def openai_usage(prompt: Usage, num_generated: int) -> dict[str, object]:
    """Usage of a request: `prompt` is that of its prompts, the tokens are those of all choices together."""
    return {
        "prompt_tokens": prompt.prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": prompt.prompt_tokens + num_generated,
        "prompt_tokens_details": {"cached_tokens": prompt.cached_tokens},
    }


def text_to_json(text: str) -> str:
    """A JSON string in ASCII; where that is long, in Unicode but for the three characters that end lines."""
    escaped = json.dumps(text)
    if len(escaped) <= _LONG_CHARS:
        return escaped
    return json.dumps(text, ensure_ascii=False).translate(_LINE_BREAKS)


def token_logprob(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, object]:
    """A token as text and as bytes, and its log-probability."""
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": json_logprob(logprob),
        "bytes": list(tokenizer.spell_token(token_id)),
    }


def json_logprob(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)


def _exact_ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
