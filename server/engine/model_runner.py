"""One step on the device: adapters into the arena, tokens through the model, logits into tokens.

The only place where arithmetic happens, and it decides nothing: what runs, where its keys go and which
adapters move is in the plan. The host learns nothing from the device but the sampled ids, and
log-probabilities and vectors where asked.

A step that only samples is one call of the model. One that is asked about prompts computes the hidden states
first and has the head look at the rows it needs (see `server.model.halves`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from adapters.batch import LoraBatch
from adapters.device import Arena
from adapters.types import Revision
from adapters.weights import LoraWeights
from server.engine.input_batch import InputBatch, build_input_batch
from server.engine.kv_cache import KVCache
from server.engine.plan import Part, RunnerOutput, StepPlan
from server.engine.prompt_reader import read_scores, read_vectors
from server.engine.sampler import Sampler
from server.engine.stopwatch import Stopwatch
from server.model.halves import Halves
from server.model.loader import LoadedModel

# In the order of StepContext.seconds.
LAYER_PARTS = (Part.LINEAR, Part.ADAPTERS, Part.ATTENTION, Part.ACTIVATIONS)


class ModelRunner:
    """Implements `server.engine.plan.Runner`. Owns the KV tensors and the arena while it lives."""

    def __init__(
        self, model: LoadedModel, kv: KVCache, arena: Arena, weights_of: Callable[[Revision], LoraWeights]
    ) -> None:
        self._model = model
        self._kv = kv
        self._arena = arena
        self._weights_of = weights_of
        self._sampler = Sampler(model.vocab_size, model.eos_token_ids, model.native)
        self._watch = Stopwatch()
        self._windows = frozenset(layer.sliding_window for layer in model.layers)
        self._halves = Halves(model.module, model.body, model.lora, model.head)
        model.context.keys, model.context.values = kv.keys, kv.values
        model.context.block_size = kv.block_size
        model.context.seconds.zero_()  # what was tried at load does not count

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> RunnerOutput:
        self._watch.begin()
        lost = self._move_adapters(plan)
        output = self._compute(plan) if plan.chunks else RunnerOutput(())
        return replace(output, lost=lost, seconds=self._watch.read())

    def _compute(self, plan: StepPlan) -> RunnerOutput:
        batch = build_input_batch(
            plan,
            self._model.attention,
            windows=self._windows,
            block_size=self._kv.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        if batch.stale is not None:
            self._kv.clear(batch.stale)
        model = self._model
        model.context.batch = batch.attention
        model.lora.batch = LoraBatch.build(self._arena, batch.adapter_rows)
        self._watch.lap(Part.INPUTS)
        try:
            if batch.scored or batch.pooled:
                return self._compute_and_tell(batch)
            model.context.wanted = batch.last.host
            logits = self._halves.logits(batch.input_ids, batch.positions, batch.last)
        finally:
            self._end_model()
            model.context.batch = model.context.wanted = None
            model.lora.batch = None
        output = self._sampler.sample(logits, batch.sampling) if batch.sampling else RunnerOutput(())
        self._watch.lap(Part.SAMPLING)
        return output

    def _end_model(self) -> None:
        """Its time, of which the layers know their share where one call computed them all."""
        self._watch.lap(Part.MODEL)
        seconds = self._model.context.seconds
        self._watch.split(Part.MODEL, zip(LAYER_PARTS, seconds.tolist(), strict=True))
        seconds.zero_()

    def _compute_and_tell(self, batch: InputBatch) -> RunnerOutput:
        """A step that is asked about prompts, and may sample as well."""
        body = self._halves.body(batch.input_ids, batch.positions)
        output = RunnerOutput(())
        if batch.sampling:
            output = self._sampler.sample(body.logits(batch.last), batch.sampling)
        vectors, unpooled = read_vectors(batch.pooled, body.hidden)
        scores, unscored = read_scores(batch.scored, body.logits, self._model.vocab_size, self._model.device)
        failed = dict.fromkeys((*output.failed, *unpooled, *unscored))
        return RunnerOutput(
            tokens=tuple(token for token in output.tokens if token.id not in failed),
            failed=tuple(failed),
            scores=tuple(found for found in scores if found.id not in failed),
            vectors=tuple(vectors),
        )

    def _move_adapters(self, plan: StepPlan) -> tuple[Revision, ...]:
        """Evictions before writes: a write may use the room of an evicted adapter. Prefetches come last: they
        may use what was moved away, and nothing of this step waits for them. Returns those that were lost.
        """
        for ref in plan.evictions:
            self._arena.evict(ref)
        for write in plan.writes:
            is_move = write.moved_from is not None
            self._arena.write(write, None if is_move else self._weights_of(write.ref.revision))
        lost = []
        for write in plan.prefetches:
            try:
                weights = self._weights_of(write.ref.revision)
            except KeyError:
                lost.append(write.ref.revision)
            else:
                self._arena.prefetch(write, weights)
        return tuple(lost)
