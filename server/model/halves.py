"""The model in two halves: the body from tokens to hidden states, the head from hidden states to logits.

A causal model's `forward` does both, and what it does to logits after the output matrix (caps, scales)
differs from architecture to architecture. So the head is that same `forward` with the body's answer given:
while it runs, the body returns what it has returned before. That lets the head see some rows at a time, and
lets a step that wants no logits do without it.
"""

import inspect
from typing import Any

from torch import Tensor, nn


class Halves:
    """Owned by the runner. `body` is the child of `module` in which all attention layers are."""

    def __init__(self, module: nn.Module, body: nn.Module) -> None:
        self._module = module
        self._body = body
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def logits(self, input_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Both halves at once: [T], [T], [n] -> logits [n, V] of these rows."""
        kept = {"logits_to_keep": rows} if self._keeps_logits else {}
        output = self._module(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **kept
        )
        logits: Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[rows]

    def body(self, input_ids: Tensor, positions: Tensor) -> "BodyOutput":
        """The body alone: [T], [T] -> hidden states."""
        output = self._body(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return BodyOutput(self, output, input_ids, positions)

    def head(self, given: "BodyOutput", rows: Tensor) -> Tensor:
        """The head alone: logits [n, V] of rows [n] of what the body has returned."""
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

    def logits(self, rows: Tensor) -> Tensor:
        """[n] -> [n, V]"""
        return self._halves.head(self, rows)
