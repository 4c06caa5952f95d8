"""A model's body without the Python between its parts.

    ids -> embedding -> layers and last norm (`decoder.py`) -> hidden
    positions -> angles -^

A step of one row waits for the memory, and every small operation beside it is code that has left the caches
since the step before: what transformers' own `forward` of a body does around the layers takes as long as two
of them. So the parts are called one after the other, the norm together with the layers, and the angles of the
first positions are kept. That a body is these parts and nothing else is seen by watching it: each part must
be given what the one before it made, and the last must make what the body answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from server.model.native.bindings import Angles, RMSNorm
from server.model.native.decoder import NativeDecoder, angles_of_tokens
from server.model.native.trial import SmallStep, hidden_states, is_near
from server.model.probe import FORWARD_ERRORS

# Of the largest value: the norm is rounded where the module rounds it, but its sum has another order.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_KEPT_BYTES = 64 << 20  # of angles: 131,072 positions with heads of 128 in bfloat16
_KEPT_AT_ONCE = 4096  # positions


class Rotary:
    """Cosines and sines of positions, as the model's own module gives them."""

    def __init__(self, module: nn.Module, hidden: Tensor, num_positions: int) -> None:
        """`hidden` is an example of what the module is given beside the positions. Below `num_positions` the
        angles of a position depend on nothing else.
        """
        self._module = module
        row = sum(part.nbytes for part in self._ask(hidden, torch.zeros(1, 1, dtype=torch.int64)))
        num_kept = min(num_positions, _KEPT_BYTES // row)
        pieces = torch.split(torch.arange(num_kept)[None], _KEPT_AT_ONCE, dim=1)
        kept = [self._ask(hidden, piece) for piece in pieces]
        self._cosine, self._sine = (torch.cat(parts, dim=1)[0] for parts in zip(*kept, strict=True))

    def angles(self, hidden: Tensor, positions: Tensor) -> Angles:
        """Of positions [1, T]."""
        if int(positions.max()) < len(self._cosine):
            return Angles(self._cosine, self._sine, positions[0])
        return angles_of_tokens(*self._ask(hidden, positions))

    def _ask(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self._module(hidden, position_ids=positions)
        return cosine, sine


class NativeBody(nn.Module):
    """Computes what a model's body does, which stays where it is and owns the parts."""

    def __init__(
        self, original: nn.Module, embedding: nn.Module, rotary: Rotary, decoder: NativeDecoder, norm: RMSNorm
    ) -> None:
        super().__init__()
        self._parts = original, embedding, rotary, decoder, norm  # none is a child: they are the model's

    def forward(self, *, input_ids: Tensor, position_ids: Tensor, **seen: Any) -> Any:
        """Ids and positions [1, T] -> an answer with `last_hidden_state` [1, T, H]."""
        original, embedding, rotary, decoder, norm = self._parts
        if not decoder.can_decode:
            return original(input_ids=input_ids, position_ids=position_ids, **seen)
        hidden = embedding(input_ids)
        decoder.decode(hidden[0], rotary.angles(hidden, position_ids), norm)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


def shorten_body(body: nn.Module, decoder: NativeDecoder, step: SmallStep, max_position: int) -> nn.Module:
    """A NativeBody that computes what the body does, or the body itself. `decoder` is in the place of its
    layers. Below `max_position` no position changes another's angles.
    """
    with torch.inference_mode(), step.running() as ids:
        calls, answer = _watch(body, decoder, ids)
        if not _is_chain(calls, decoder, ids, answer):
            return body
        embedding, rotary, _, norm = calls
        last_norm = _describe_norm(norm.part, decoder.dtype)
        if last_norm is None:
            return body
        angles = Rotary(rotary.part, embedding.answer, max_position)
        short = NativeBody(body, embedding.part, angles, decoder, last_norm)
        try:
            is_same = is_near(hidden_states(short, ids), answer, _TOLERANCE[decoder.dtype])
        except FORWARD_ERRORS:
            is_same = False
    return short if is_same else body


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A part at work, as it was seen."""

    part: nn.Module
    given: tuple[Any, ...]
    answer: Any


def _watch(body: nn.Module, decoder: NativeDecoder, ids: Tensor) -> tuple[list[_Call], Tensor]:
    """What the body's parts were given and answered, and what came out of them all."""
    calls: list[_Call] = []

    def note(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        calls.append(_Call(part, (*args, *named.values()), answer))

    hooks = [part.register_forward_hook(note, with_kwargs=True) for part in (*body.children(), decoder)]
    try:
        return calls, hidden_states(body, ids)
    finally:
        for hook in hooks:
            hook.remove()


def _is_chain(calls: Sequence[_Call], decoder: NativeDecoder, ids: Tensor, answer: Tensor) -> bool:
    """Whether these calls are all that the body did: embedding, rotary, layers, norm."""
    if len(calls) != 4:
        return False
    embedding, rotary, layers, norm = calls
    return (
        len(embedding.given) == 1
        and torch.equal(embedding.given[0][0], ids)
        and len(rotary.given) == 2
        and rotary.given[0] is embedding.answer
        and layers.part is decoder
        and layers.given[0] is embedding.answer
        and any(given is rotary.answer for given in layers.given)
        and len(norm.given) == 1
        and norm.given[0] is layers.answer
        and norm.answer is answer
    )


def _describe_norm(norm: nn.Module, dtype: torch.dtype) -> RMSNorm | None:
    """None where it is another kind."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dtype is not dtype or not isinstance(epsilon, float):
        return None
    return RMSNorm(weight, epsilon)
