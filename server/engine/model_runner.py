"""One step on the device: adapters into the arena, tokens through the model, logits into tokens.

The only place where arithmetic happens, and it decides nothing: what runs, where its keys go and which
adapters move is in the plan. The host learns nothing from the device but the sampled ids, and
log-probabilities where asked.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from adapters.batch import LoraBatch
from adapters.device import Arena
from adapters.types import Revision
from adapters.weights import LoraWeights
from server.engine.input_batch import InputBatch, build_input_batch
from server.engine.kv_cache import KVCache
from server.engine.plan import RunnerOutput, StepPlan
from server.engine.sampler import Sampler
from server.model.loader import LoadedModel


class ModelRunner:
    """Implements `server.engine.plan.Runner`. Owns the KV tensors and the arena while it lives."""

    def __init__(
        self, model: LoadedModel, kv: KVCache, arena: Arena, weights_of: Callable[[Revision], LoraWeights]
    ) -> None:
        self._model = model
        self._kv = kv
        self._arena = arena
        self._weights_of = weights_of
        self._sampler = Sampler(model.vocab_size, model.eos_token_ids)
        self._windows = frozenset(layer.sliding_window for layer in model.layers)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters
        model.context.keys, model.context.values = kv.keys, kv.values
        model.context.block_size = kv.block_size

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> RunnerOutput:
        self._move_adapters(plan)
        batch = build_input_batch(
            plan,
            windows=self._windows,
            block_size=self._kv.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        if batch.stale is not None:
            self._kv.clear(batch.stale)
        logits = self._forward(batch)
        if not batch.sampling:
            return RunnerOutput(())
        return self._sampler.sample(logits, batch.sampling)

    def _move_adapters(self, plan: StepPlan) -> None:
        """Evictions before writes: a write may use the room of an evicted adapter."""
        for ref in plan.evictions:
            self._arena.evict(ref)
        for write in plan.writes:
            is_move = write.moved_from is not None
            self._arena.write(write, None if is_move else self._weights_of(write.ref.revision))

    def _forward(self, batch: InputBatch) -> Tensor:
        """Logits [B, V] of the rows in `batch.sampling`, in that order."""
        model = self._model
        model.context.batch = batch.attention
        model.lora.batch = LoraBatch.build(self._arena, batch.adapter_rows)
        try:
            kept = {"logits_to_keep": batch.last} if self._keeps_logits else {}
            output = model.module(
                input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False, **kept
            )
        finally:
            model.context.batch = None
            model.lora.batch = None
        logits: Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[batch.last]
