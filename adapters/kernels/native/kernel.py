"""Our own kernel for the CPU (`lora.h`): one call a layer for all adapters of a step.

Each adapter is read where it lies; nothing is copied or kept but where that is.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from adapters.kernels.native.bindings import AdapterTable, NativeLora, NativeStep
from adapters.types import Revision, TargetId

if TYPE_CHECKING:
    from adapters.batch import LoraBatch


class NativeKernel:
    """Implements LoraKernel. It keeps a table of addresses for each adapter, and the step it saw last."""

    def __init__(self, library: NativeLora) -> None:
        self._library = library
        self._tables: dict[Revision, AdapterTable] = {}
        self._batch: LoraBatch | None = None
        self._step: NativeStep | None = None

    def add_lora(self, y: Tensor, x: Tensor, target: TargetId, batch: "LoraBatch") -> Tensor:
        self._library.add(self.step(batch), target, x, y)
        return y

    def step(self, batch: "LoraBatch") -> NativeStep:
        """The same as compiled code sees it, for whoever computes whole layers (`server.model.native`)."""
        if self._step is None or self._batch is not batch:
            self._step = NativeStep(
                [(self._table(group.revision, batch), group.scale, group.spans) for group in batch.groups]
            )
            self._batch = batch
        return self._step

    def forget(self, revision: Revision) -> None:
        if self._tables.pop(revision, None) is not None:
            self._batch = self._step = None  # it may hold on to what is to be freed

    def _table(self, revision: Revision, batch: "LoraBatch") -> AdapterTable:
        views = batch.arena.adapter(revision)
        table = self._tables.get(revision)
        if table is None or table.views is not views:
            table = self._tables[revision] = AdapterTable(views)
        return table
