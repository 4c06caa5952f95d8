"""Each program of benchmarks/ that README files name, run as they say, with as little work as it takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.embedded.location import model_dir
from tests.e2e.running import REPOSITORY

EMBEDDED = str(model_dir())
PROGRAMS = {
    "kernels": (("--repeats", "0"), "linear, 8 bits"),
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
            *("--minutes", "0.05", "--rate", "5"),
        ),
        "growth after the first minute",
    ),
}
pytestmark = pytest.mark.timeout(180)


def run(program: str, *words: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{program}", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MOTET_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
