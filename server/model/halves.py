"""The model in two halves: the body from tokens to hidden states, the head from hidden states to logits.

A causal model's `forward` does both, and what it does to logits after the output matrix (caps, scales)
differs from architecture to architecture. So the head is that same `forward` with the body's answer given:
while it runs, the body returns what it has returned before. That lets the head see some rows at a time, and
lets a step that wants no logits do without it. Where `forward` does nothing else after the body than to ask
the output matrix, so do we: what it does around that takes as long as half a layer. Adapters that change the
head learn here which rows it sees.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers import LoraContext
from adapters.types import ModelTargets


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """Rows of the step whose logits are wanted, where the model needs them and where the host decides."""

    index: Tensor  # [n] on the device
    host: Sequence[int]  # the same

    def are_first(self, count: int) -> bool:
        """Whether they are as many rows as there are, in their order."""
        return len(self.host) == count and all(row == i for i, row in enumerate(self.host))


class Halves:
    """Owned by the runner."""

    def __init__(
        self, module: nn.Module, body: nn.Module, lora: LoraContext, head: nn.Module | None = None
    ) -> None:
        """`body` is the child of `module` in which all attention layers are. With a `head` (see `plain_head`)
        it may be anything that computes the same.
        """
        self._module = module
        self._body = body
        self._lora = lora
        self._head = head
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    def logits(self, input_ids: Tensor, positions: Tensor, rows: HeadRows) -> Tensor:
        """Both halves at once: [T], [T], n rows -> logits [n, V] of these rows."""
        if self._head is not None:
            return self.body(input_ids, positions).logits(rows)
        kept = {"logits_to_keep": rows.index} if self._keeps_logits else {}
        with self._announced(rows.host if self._keeps_logits else None):
            output = self._module(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **kept
            )
        logits: Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[rows.index]

    def body(self, input_ids: Tensor, positions: Tensor) -> "BodyOutput":
        """The body alone: [T], [T] -> hidden states."""
        output = self._body(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return BodyOutput(self, output, input_ids, positions)

    def head(self, given: "BodyOutput", rows: HeadRows) -> Tensor:
        """The head alone: logits [n, V] of n rows of what the body has returned."""
        if self._head is not None:
            hidden = given.hidden
            if not rows.are_first(len(hidden)):
                hidden = hidden[rows.index]
            with self._announced(rows.host):
                logits: Tensor = self._head(hidden)
            return logits
        self._body.forward = lambda *args, **kwargs: given.output
        try:
            return self.logits(given.input_ids, given.positions, rows)
        finally:
            del self._body.forward  # the class's own is seen again

    @contextmanager
    def _announced(self, rows: Sequence[int] | None) -> Iterator[None]:
        """While the head sees these rows of the step; None: all."""
        batch = self._lora.batch
        if batch is not None:
            self._lora.head = batch.for_head(rows)
        try:
            yield
        finally:
            self._lora.head = None


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


@torch.inference_mode()
def plain_head(module: nn.Module, body: nn.Module, targets: ModelTargets, ids: Tensor) -> nn.Module | None:
    """The output matrix, if it is given the body's hidden states as they are and its answer is the model's.
    Computes a step of these tokens [T] at the first positions.
    """
    if targets.head is None:
        return None
    head = module.get_submodule(targets.targets[targets.head].path)
    seen: list[tuple[Any, ...]] = []
    hooks = [
        body.register_forward_hook(lambda _, args, answer: seen.append((body, answer.last_hidden_state))),
        head.register_forward_hook(lambda _, args, answer: seen.append((head, *args, answer))),
    ]
    positions = torch.arange(len(ids))[None]
    try:
        logits = module(input_ids=ids[None], position_ids=positions, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if [part for part, *_ in seen] != [body, head] or len(seen[1]) != 3:
        return None
    (_, hidden), (_, given, answer) = seen
    return head if torch.equal(given, hidden) and answer is logits else None
