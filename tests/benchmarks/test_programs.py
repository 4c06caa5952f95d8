"""Each program of benchmarks/ that README files name, run as they say, with as little work as it takes: what
counts is that they work. They run in this process, and their servers are forked.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.embedded.location import model_dir
from tests.programs import run_module

EMBEDDED = str(model_dir())
PROGRAMS = {
    "kernels": (("--layers", "1", "--repeats", "0"), "linear, 8 bits"),
    "lora_kernels": (("--layers", "1", "--repeats", "1", "--adapters", "1", "2"), "2 adapters of rank 8..64"),
    "decode_step": ((EMBEDDED, "--batch", "1", "--steps", "2", "--context", "20"), "prefill tok/s"),
    "roofline": ((EMBEDDED, "--concurrency", "1"), "reads"),
    "flood": (
        ("--runs", "1", "--seconds", "1", "--flood", "10", "--flood-tokens", "8", "--fair-by", "adapter"),
        "fair by adapter: p95",
    ),
    "swaps": (("--swaps", "2", "--settle", "1", "--clients", "1", "--output-tokens", "4"), "mixture"),
    "cold_loads": (
        (
            *("--adapters", "2", "--every", "0.1", "--runs", "1", "--output-tokens", "2"),
            *("--streams", "1", "--stream-tokens", "40", "--stream-adapters", "1"),
        ),
        "p99, cold / warm",
    ),
    "many_adapters": (
        (
            *("--adapters", "4", "--room", "2", "--host-room", "3", "--output-tokens", "2"),
            *("--minutes", "0.02", "--rate", "5"),
        ),
        "growth after the first minute",
    ),
}
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("forked_servers", "small_machine", "few_words"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Programs choose how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(program: str, *words: str) -> str:
    """What it prints."""
    return run_module(f"benchmarks.{program}", *words, MOTET_THREADS="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_measures_what_it_says(program: str) -> None:
    words, expected = PROGRAMS[program]
    assert expected in run(program, *words)


def test_decode_step_has_adapters_if_it_is_asked_for_some() -> None:
    few = (EMBEDDED, "--batch", "3", "--steps", "2", "--context", "20")
    said = run("decode_step", *few, "--adapters", "2", "--rank", "4")
    assert re.search(r"^ +3 +20 +\d+ ", said, re.M), said


def test_idle_cost_measures_a_model_that_it_is_given(tmp_path: Path) -> None:
    run("make_model", "--shape", "tiny", "--out", str(tmp_path))
    words = ("--adapters", "1", "--streams", "1", "--pairs", "1", "--output-tokens", "24")
    said = run("idle_cost", "--model", str(tmp_path / "model"), *words)
    assert re.search(r"^highest pair +\d", said, re.M), said
