"""The model in two halves: the body from tokens to hidden states, the head from hidden states to logits.

A causal model's `forward` does both, and what it does to logits after the output matrix (caps, scales)
differs from architecture to architecture. So the head is that same `forward` with the body's answer given:
while it runs, the body returns what it has returned before. That lets the head see some rows at a time, and
lets a step that wants no logits do without it. Adapters that change the head learn here which rows it sees.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.layers import LoraContext


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows of the step whose logits are wanted, where the model needs them and where the host decides."""

    index: Tensor  # [n] on the device
    host: Sequence[int]  # the same


class Halves:
    """Owned by the runner. `body` is the child of `module` in which all attention layers are."""

    def __init__(self, module: nn.Module, body: nn.Module, lora: LoraContext) -> None:
        self._module = module
        self._body = body
        self._lora = lora
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def logits(self, input_ids: Tensor, positions: Tensor, rows: HeadRows) -> Tensor:
        """Both halves at once: [T], [T], n rows -> logits [n, V] of these rows."""
        kept = {"logits_to_keep": rows.index} if self._keeps_logits else {}
        batch = self._lora.batch
        if batch is not None:
            self._lora.head = batch.for_head(rows.host if self._keeps_logits else None)
        try:
            output = self._module(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **kept
            )
        finally:
            self._lora.head = None
        logits: Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[rows.index]

    def body(self, input_ids: Tensor, positions: Tensor) -> "BodyOutput":
        """The body alone: [T], [T] -> hidden states."""
        output = self._body(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return BodyOutput(self, output, input_ids, positions)

    def head(self, given: "BodyOutput", rows: HeadRows) -> Tensor:
        """The head alone: logits [n, V] of n rows of what the body has returned."""
        self._body.forward = lambda *args, **kwargs: given.output
        try:
            return self.logits(given.input_ids, given.positions, rows)
        finally:
            del self._body.forward  # the class's own is seen again


class BodyOutput:
    """What the body returned for one step."""

    __slots__ = ("_halves", "input_ids", "output", "positions")

    def __init__(self, halves: Halves, output: Any, input_ids: Tensor, positions: Tensor) -> None:
        self._halves = halves
        self.output = output
        self.input_ids = input_ids
        self.positions = positions

    @property
    def hidden(self) -> Tensor:
        """[T, H] after the final norm."""
        hidden: Tensor = self.output.last_hidden_state[0]
        return hidden

    def logits(self, rows: HeadRows) -> Tensor:
        """n rows -> [n, V]"""
        return self._halves.head(self, rows)
