"""The x- headers of generation answers, under the names that LoRAX gave them. Times are integer milliseconds.

A stream's head leaves before its numbers are known, so it carries what is known by then; `x-compute-time` of
a stream is the time from receipt until the head left, which, as the head waits for the first token, is the
server's time to first token. An answer that is not streamed carries them all. With several choices the times
are those of the request as a whole: from the first choice that started to the last one that ended. With
several prompts, tokens and characters are those of all prompts together.
"""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from server.api.records import Accepted, WholeChoice

BASE_MODEL = "__base_model__"  # LoRAX's own name for "no adapter"

ON_ALL_HEADERS = (
    "x-request-id",
    "x-model-id",
    "x-adapter-id",
    "x-adapter-source",
    "x-compute-type",
    "x-compute-characters",
    "x-prompt-tokens",
    "x-compute-time",
)
ON_WHOLE_HEADERS = (
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-time-to-first-token",
    "x-time-per-output-token",
    "x-generated-tokens",
    "x-skipped-tokens",
    "x-total-tokens",
)
EXPOSED_HEADERS = (*ON_ALL_HEADERS, *ON_WHOLE_HEADERS, "retry-after")

HEADER_NOTES: Mapping[str, tuple[str, str]] = {
    "x-request-id": ("string", "The id of the request; its own, if it brought a valid one."),
    "x-model-id": ("string", "The base model."),
    "x-adapter-id": ("string", f"The adapter, percent-encoded; `{BASE_MODEL}` for none."),
    "x-adapter-source": ("string", "Where the adapter came from. Only with an adapter."),
    "x-compute-type": ("string", "cpu or gpu."),
    "x-compute-characters": ("integer", "Characters of the prompt."),
    "x-prompt-tokens": ("integer", "Tokens of the prompt."),
    "x-compute-time": (
        "integer",
        "Milliseconds from receipt to the last token, without those in the queue; of a stream: to its head.",
    ),
    "x-total-time": ("integer", "Milliseconds from receipt to the last token."),
    "x-validation-time": ("integer", "Milliseconds from receipt to the queue."),
    "x-queue-time": ("integer", "Milliseconds in the queue."),
    "x-inference-time": ("integer", "Milliseconds from the queue to the last token."),
    "x-time-per-token": ("integer", "Milliseconds of inference per token."),
    "x-time-to-first-token": ("integer", "Milliseconds from the queue to the first token."),
    "x-time-per-output-token": ("integer", "Milliseconds of inference per token after the first."),
    "x-generated-tokens": ("integer", "Tokens of all choices together."),
    "x-skipped-tokens": ("integer", "Always 0; for clients that know LoRAX."),
    "x-total-tokens": ("integer", "Tokens of the prompt and of all choices."),
    "retry-after": ("integer", "Seconds after which to try again."),
}
"""What each means, with its JSON type, for the documentation."""

_VISIBLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))


def stream_headers(accepted: Accepted, head_s: float) -> dict[str, str]:
    """For a stream whose head leaves `head_s` seconds after receipt. Framing headers are streaming.py's."""
    return {**_known_headers(accepted), "x-compute-time": _whole_ms(head_s)}


def resumed_headers(first: Mapping[str, str], head_s: float) -> dict[str, str]:
    """For a stream that goes on over another connection: `first` went over the one before."""
    return {**first, "x-compute-time": _whole_ms(head_s)}


def whole_headers(accepted: Accepted, choices: Sequence[WholeChoice]) -> dict[str, str]:
    """For an answer that is complete."""
    timings = [choice.finish.timing for choice in choices]
    first = min(timings, key=lambda timing: timing.started)
    last = max(timing.last_token for timing in timings)
    total_s = last - first.received
    inference_s = last - first.started
    first_token_s = min(timing.first_token for timing in timings) - first.started
    num_generated = sum(choice.finish.usage.generated_tokens for choice in choices)
    num_prompt = accepted.request.num_prompt_tokens
    return {
        **_known_headers(accepted),
        "x-compute-time": _whole_ms(total_s - first.queue_s),
        "x-total-time": _whole_ms(total_s),
        "x-validation-time": _whole_ms(first.queued - first.received),
        "x-queue-time": _whole_ms(first.queue_s),
        "x-inference-time": _whole_ms(inference_s),
        "x-time-per-token": _whole_ms(inference_s / max(num_generated, 1)),
        "x-time-to-first-token": _whole_ms(first_token_s),
        "x-time-per-output-token": _whole_ms((inference_s - first_token_s) / max(num_generated - 1, 1)),
        "x-generated-tokens": str(num_generated),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(num_prompt + num_generated),
    }


def _known_headers(accepted: Accepted) -> dict[str, str]:
    """What is known as soon as a request is accepted."""
    adapter = accepted.request.adapter
    headers = {
        "x-model-id": header_value(accepted.card.id),
        "x-adapter-id": BASE_MODEL if adapter is None else header_value(adapter.name),
        "x-compute-type": accepted.card.compute_type,
        "x-compute-characters": str(sum(len(prompt.text) for prompt in accepted.prompts)),
        "x-prompt-tokens": str(accepted.request.num_prompt_tokens),
    }
    if accepted.adapter_source is not None:
        headers["x-adapter-source"] = header_value(accepted.adapter_source)
    return headers


def header_value(name: str) -> str:
    """An id as a header value: percent-encoded where it is not visible ASCII (anything else breaks the
    answer).
    """
    return quote(name, safe=_VISIBLE_ASCII)


def raw_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI takes them."""
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]


def _whole_ms(seconds: float) -> str:
    return str(max(round(seconds * 1000), 0))
