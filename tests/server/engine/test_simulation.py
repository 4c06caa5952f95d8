"""Random worlds: anything may happen at any time, and every text must still be the one its prompt and adapter
give.

A world draws its sizes and its events from a seed: arrivals with shared beginnings, ends in every phase,
pauses, more adapters than fit, steps that fail half-way, rows without a result. After every step all counts
are recomputed; in the end everybody was answered exactly once and nothing is held.
"""

import logging
from collections import Counter
from random import Random

import pytest

from adapters.types import AdapterPart, AdapterUse
from server.engine.plan import StepOutput
from server.engine.sequence import SequenceId, WaitReason
from server.types import FinishReason, Pooling, SamplingParams
from tests.fakes import VOCAB_SIZE, Rig, adapter, make_rig

ADAPTERS = [adapter(name) for name in ("ant", "bee", "cat", "dog", "elk", "fox")]
ALIAS = adapter("ant-by-another-name", "r-ant")
WHALE = adapter("whale")  # larger than any arena


class Trouble(Exception):
    """What a device might raise."""


class World:
    """One rig and the dice that move it."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.sizes = {ref.name: random.randint(1, 12) for ref in ADAPTERS} | {WHALE.name: 1000}
        self.sizes[ALIAS.name] = self.sizes["ant"]
        self.is_calm = False
        self.events: Counter[str] = Counter()
        self.ended: set[SequenceId] = set()
        self.rig: Rig = make_rig(
            num_blocks=random.choice([60, 110, 160, 400]) // (block_size := random.choice([1, 2, 4, 8])),
            block_size=block_size,
            enable_prefix_caching=random.random() < 0.7,
            max_num_seqs=random.randint(1, 8),
            max_num_batched_tokens=random.choice([1, 3, 8, 20, 60]),
            arena_bytes=random.randint(12, 30),
            sizes=self.sizes,
            adapter_stay_s=random.choice([0.0, 0.05, 0.5]),
            prefetches=random.random() < 0.5,
            crowd_tokens=random.choice([None, 1, 4, 16]),
            max_model_len=random.choice([60, 1000]),
            interrupt=self._interrupt,
        )
        self.stems = [[random.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(3)]

    def live(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._happen()
            self._note(self.rig.step())
        self._settle()
        self._judge()

    def _happen(self) -> None:
        random = self.random
        living = self._living()
        if len(living) < 12:
            for _ in range(random.choice([0, 0, 1, 3])):
                self._arrive()
        if random.random() < 0.05:
            self.rig.forget(random.choice([ALIAS, *ADAPTERS]))
        if living:
            one = random.choice(living)
            what = random.random()
            if what < 0.06:
                self.rig.end(one, random.choice([FinishReason.ABORT, FinishReason.STOP]))
                self.ended.add(one)
            elif what < 0.12:
                self.rig.pause(one)
            elif what < 0.24:
                self.rig.resume(one)
            elif what < 0.25:
                self.rig.runner.bad_rows.add(one)
        if random.random() < 0.02:
            self.rig.pin(*random.sample(ADAPTERS, random.choice([0, 1, 1, 3])))

    def _arrive(self) -> None:
        random = self.random
        stem = random.choice(self.stems)[: random.choice([0, 4, 8, 13, 24])]
        leaf = [random.randrange(VOCAB_SIZE) for _ in range(random.choice([1, 1, 2, 5, 20]))]
        who = random.choice([None, None, ALIAS, *ADAPTERS, *ADAPTERS])
        who = WHALE if random.random() < 0.02 else self._several() if random.random() < 0.2 else who
        begins_late = who is not None and random.random() < 0.3
        pooling = random.choice([None, None, None, None, *Pooling])
        self.rig.add(
            stem + leaf,
            adapter=who,
            adapter_start=random.randrange(len(stem + leaf)) if begins_late else 0,
            sampling=SamplingParams(num_prompt_logprobs=random.choice([None, None, None, 0, 2])),
            pooling=pooling,
            max_tokens=0 if pooling is not None else random.choice([0, 1, 3, 10, 30, 60]),
            min_tokens=random.choice([0, 0, 4]),
            stop_token_ids=random.sample(range(VOCAB_SIZE), random.choice([0, 5])),
            ignore_eos=random.random() < 0.5,
            tenant=random.choice(["", "", "a", "b", "c"]),
            weight=random.choice([0.5, 1.0, 3.0]),
        )

    def _several(self) -> AdapterUse:
        scales = iter(self.random.choices([0.5, 1.0, 2.0], k=3))
        chosen = self.random.sample([ALIAS, *ADAPTERS], self.random.choice([2, 3]))
        return AdapterUse.sum_of(AdapterPart(ref, next(scales)) for ref in chosen)

    def _interrupt(self, point: str) -> None:
        if not self.is_calm and self.random.random() < (0.1 if point in ("write", "prefetch") else 0.01):
            self.events[f"failed at {point}"] += 1
            raise Trouble(point)

    def _note(self, output: StepOutput | None) -> None:
        if output is not None:
            stats = output.stats
            self.events["steps"] += 1
            self.events["preemptions"] += stats.preemptions
            self.events["prefix hits"] += stats.prefix_hits
            self.events["waits for an adapter"] += dict(stats.waiting_by).get(WaitReason.ADAPTER, 0)
            self.events["waits for blocks"] += dict(stats.waiting_by).get(WaitReason.BLOCKS, 0)
            self.events["scores in several parts"] += sum(
                bool(news.scores) and news.token is None and news.finish is None for news in output.outputs
            )
            self.events["vectors"] += sum(news.vector is not None for news in output.outputs)
            assert stats.running <= self.rig.scheduler._limits.max_num_seqs
            assert (
                stats.prefill_tokens + stats.decode_tokens
                <= self.rig.scheduler._limits.max_num_batched_tokens
            )

    def _living(self) -> list[SequenceId]:
        return [number for number in self.rig.added if self.rig.scheduler.get(number) is not None]

    def _settle(self) -> None:
        self.is_calm = True
        for number in self._living():
            self.rig.resume(number)
        self.rig.run(max_steps=20_000)

    def _judge(self) -> None:
        rig = self.rig
        rig.assert_all_free()
        for number in rig.added:
            terminal = rig.finish(number)
            assert terminal is not None, f"sequence {number} was never answered"
            self.events[f"ended with {terminal.finish}"] += 1
            got = rig.tokens(number)
            told, scores = rig.scores(number), rig.expected_scores(number)
            if terminal.finish is FinishReason.ERROR or number in self.ended:
                assert got == rig.expected(number)[: len(got)]
                assert told == scores[: len(told)]
                assert terminal.vector is None
                continue
            assert got == ([] if rig.added[number].stop.max_tokens == 0 else rig.expected(number))
            assert told == scores
            assert terminal.vector == rig.expected_vector(number)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Every failed step logs its traceback; here they fail by the hundred."""
    caplog.set_level(logging.CRITICAL, logger="server.engine.core")


@pytest.mark.parametrize("seed", range(10))
def test_every_text_in_a_random_world_is_the_expected_one(seed: int) -> None:
    World(seed).live(num_steps=400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 510))
def test_every_text_in_many_more_random_worlds_is_the_expected_one(seed: int) -> None:
    World(seed).live(num_steps=400)


def test_the_random_worlds_are_eventful() -> None:
    events: Counter[str] = Counter()
    for seed in range(10):
        world = World(seed)
        world.live(num_steps=200)
        events += world.events
    for event in (
        "preemptions",
        "prefix hits",
        "waits for an adapter",
        "waits for blocks",
        "failed at start",
        "failed at write",
        "failed at prefetch",
        "failed at end",
        "ended with stop",
        "ended with length",
        "ended with abort",
        "ended with error",
        "scores in several parts",
        "vectors",
    ):
        assert events[event] > 0, f"no world had {event}"
