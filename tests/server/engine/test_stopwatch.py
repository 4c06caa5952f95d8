"""Where the time of a step goes: every part is told, and together they are the step."""

from pathlib import Path

import pytest

from server.engine.plan import Part
from server.engine.stopwatch import Stopwatch
from tests.server.engine.test_adapter_parity import held, save_adapters
from tests.server.model_rig import Checkpoint, Wish, load_tiny, make_model_rig
from tests.server.tiny_models import original, prompt_ids

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_parts_are_what_passed_between_the_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 13.5, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.begin()
    watch.lap(Part.INPUTS)
    watch.lap(Part.MODEL)
    watch.split(Part.MODEL, [(Part.LINEAR, 1.25), (Part.ATTENTION, 0.25)])
    watch.lap(Part.INPUTS)
    assert dict(watch.read()) == {
        Part.INPUTS: 1.5,
        Part.MODEL: 0.5,
        Part.LINEAR: 1.25,
        Part.ATTENTION: 0.25,
    }
    watch.begin()
    assert watch.read() == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_part_of_a_step_is_told(family: str, checkpoint: Checkpoint) -> None:
    """Where one call computes all layers, and where it does not."""
    model = load_tiny(checkpoint(family), block_size=16)
    rig = make_model_rig(model, block_size=16)
    rig.generate([Wish(prompt_ids(9, seed=1), 4)])
    for stats in rig.stats:
        assert sum(seconds for _, seconds in stats.seconds) == pytest.approx(stats.step_s)
        assert all(seconds >= 0 for part, seconds in stats.seconds if part is not Part.SCHEDULING)
    # What is left for scheduling is by the rig's own clock, which does not know how long a step takes.
    named = {part for stats in rig.stats for part, seconds in stats.seconds if seconds}
    whole = {Part.SCHEDULING, Part.INPUTS, Part.MODEL, Part.SAMPLING}
    layers = {Part.LINEAR, Part.ATTENTION, Part.ACTIVATIONS}
    assert named == (whole | layers if "one call" in model.kernels else whole)


def test_adapters_have_a_part_of_their_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    folders = save_adapters(original(folder), "llama", tmp_path)
    model = load_tiny(folder, block_size=16)
    if "one call" not in model.kernels:
        pytest.skip(model.kernels)
    (ref, weights), *_ = held(model, folders).values()
    rig = make_model_rig(model, block_size=16, adapters={ref: weights})
    rig.generate([Wish(prompt_ids(9, seed=1), 4, ref)])
    assert all(dict(stats.seconds)[Part.ADAPTERS] > 0 for stats in rig.stats)
