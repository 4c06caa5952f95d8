"""How KServe answers of our own models look: Triton's frames with `text_output`, and tensors.

Keys are in sorted order, as Triton writes them. A frame is a piece of text; the last one carries
`generated_text` and `details` beside it. No sentinel.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from server.api.finishes import details, text_to_json
from server.api.records import EVENT_STREAM, Accepted, WholeChoice
from server.api.shapes import json_text, long_json_text, to_json
from server.errors import ServeError
from server.types import Finish, FinishReason, TokenEvent

MODEL_VERSION = "1"  # of everything that is served here

EXTRAS = ("finish_reason", "num_input_tokens", "num_output_tokens")
"""Outputs of Triton's vLLM backend beside the text, for those who ask for them."""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What a request says about its answer."""

    id: str | None = None
    extras: frozenset[str] = frozenset()  # of EXTRAS
    has_text: bool = True  # false where `outputs` lists only others
    has_prompt: bool = False  # the text begins with the prompt


class KServeWriter:
    """Writes one stream."""

    framing = EVENT_STREAM

    def __init__(self, accepted: Accepted, options: RenderOptions) -> None:
        self._accepted = accepted
        self._options = options
        self._num_unsent = 0  # tokens since the last frame
        self._envelope = {
            key: json_text(value) for key, value in envelope(accepted.model, options.id).items()
        }
        # What comes before the text, which is last in sorted order.
        self._head = f"data: {_object(self._envelope)[:-1]},"

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        text = ""
        for event in events:
            text += event.text
            self._num_unsent += event.token is not None
            if event.finish is not None:
                yield self._last(text, event.finish)
            elif text and not join:
                yield self._piece(text)
                text = ""
        if text and events[-1].finish is None:
            yield self._piece(text)

    def end(self) -> Iterable[bytes]:
        return ()

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return (b"data: " + to_json({"error": error.message}) + b"\n\n",)

    def _piece(self, text: str) -> bytes:
        if not self._options.extras:
            self._num_unsent = 0
            return f'{self._head}"text_output":{json_text(text)}}}\n\n'.encode("ascii")
        members = {**self._envelope, "text_output": json_text(text), **self._extras(None)}
        return f"data: {_object(members)}\n\n".encode("ascii")

    def _last(self, text: str, finish: Finish) -> bytes:
        members = {
            **self._envelope,
            "text_output": json_text(text),
            "generated_text": text_to_json(finish.generated_text),
            "details": json_text(details(finish, self._accepted.request.sampling)),
            **self._extras(finish),
        }
        return f"data: {_object(members)}\n\n".encode()

    def _extras(self, finish: Finish | None) -> dict[str, str]:
        """As the vLLM backend: counts of output tokens are those since the frame before."""
        values: dict[str, object] = {
            "finish_reason": "None" if finish is None else kserve_reason(finish),
            "num_input_tokens": len(self._accepted.prompt.ids),
            "num_output_tokens": self._num_unsent,
        }
        self._num_unsent = 0
        return {name: json_text(values[name]) for name in self._options.extras}


def whole_generate(accepted: Accepted, choice: WholeChoice, options: RenderOptions) -> bytes:
    """`/generate`: the one object."""
    text = choice.finish.generated_text
    members = {
        **envelope(accepted.model, options.id),
        "text_output": _shown(accepted, 0, choice, options),
        "generated_text": text,
        "details": details(choice.finish, accepted.request.sampling),
    }
    for name in options.extras:
        members[name] = _extra(name, accepted, 0, choice)
    return long_json_text(dict(sorted(members.items()))).encode("ascii")


def whole_infer(
    accepted: Accepted, choices: Sequence[WholeChoice], shape: Sequence[int], options: RenderOptions
) -> bytes:
    """`/infer`: a tensor of each output, in the shape of the input."""
    tensors: list[dict[str, object]] = []
    numbered = list(enumerate(choices))
    if options.has_text:
        texts: list[object] = [_shown(accepted, i, choice, options) for i, choice in numbered]
        tensors.append(_tensor("text_output", "BYTES", shape, texts))
    for name in EXTRAS:
        if name in options.extras:
            values = [_extra(name, accepted, i, choice) for i, choice in numbered]
            tensors.append(_tensor(name, "BYTES" if name == "finish_reason" else "UINT32", shape, values))
    answer = {**envelope(accepted.model, options.id), "outputs": tensors}
    return long_json_text(answer).encode("ascii")


def envelope(model: str, request_id: str | None) -> dict[str, object]:
    """What every answer says about itself."""
    said: dict[str, object] = {"model_name": model, "model_version": MODEL_VERSION}
    return said if request_id is None else {"id": request_id, **said}


def kserve_reason(finish: Finish) -> str:
    """stop or length, as vLLM says it."""
    return "length" if finish.reason is FinishReason.LENGTH else "stop"


def _shown(accepted: Accepted, index: int, choice: WholeChoice, options: RenderOptions) -> str:
    prompt = accepted.prompt_of(index).text if options.has_prompt else ""
    return prompt + choice.finish.generated_text


def _extra(name: str, accepted: Accepted, index: int, choice: WholeChoice) -> object:
    if name == "finish_reason":
        return kserve_reason(choice.finish)
    if name == "num_input_tokens":
        return len(accepted.prompt_of(index).ids)
    return choice.finish.usage.generated_tokens


def _tensor(name: str, datatype: str, shape: Sequence[int], data: list[object]) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def _object(members: Mapping[str, str]) -> str:
    """A JSON object of values that are JSON already."""
    return "{" + ",".join(f'"{key}":{value}' for key, value in sorted(members.items())) + "}"
