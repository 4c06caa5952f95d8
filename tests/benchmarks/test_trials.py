"""The benchmarks of the adapters: their arithmetic, their streams, and servers that do not start."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cold_loads, idle_cost, many_adapters, swaps
from benchmarks.client import open_session
from benchmarks.metrics import spread
from benchmarks.records import Wish
from benchmarks.serving import WIRE, ServerFailed, serving, sum_of
from benchmarks.steady import FIRST_TOKENS, Steady, gaps_within, steady_streams
from benchmarks.trial import median
from tests.benchmarks.conftest import TOKENS, ScriptedServer


def stream(*answers: list[float]) -> Steady:
    return Steady(Wish("", "x", 9), times=list(answers))


def test_gaps_are_those_that_lie_in_the_window_and_in_one_answer() -> None:
    streams = [stream([0.0, 1.0, 3.0, 6.0], [7.0, 7.5]), stream([2.0, 4.0, 100.0])]

    assert gaps_within(streams, 1.0, 8.0) == [2.0, 3.0, 0.5, 2.0]
    assert gaps_within(streams, 8.0, 9.0) == []


def cold_run(kind: str, p99: float) -> cold_loads.Run:
    return cold_loads.Run(kind, replace(spread([p99]), p99=p99), spread([]), 0, 0, 1.0, ())


def test_cold_runs_are_compared_with_the_warm_run_beside_them() -> None:
    runs = [
        cold_run(*run)
        for run in [("alone", 1.0), ("warm", 2.0), ("cold", 3.0)] * 2 + [("warm", 4.0), ("cold", 2.0)]
    ]

    assert cold_loads.ratios(runs) == [1.5, 1.5, 0.5]
    assert median(cold_loads.ratios(runs)) == 1.5


@pytest.mark.parametrize(
    ("resident", "expected"),
    [
        ([(0.0, 10), (30.0, 50), (60.0, 70), (70.0, 90), (80.0, 75)], 5.0),
        ([(0.0, 10), (61.0, 50)], math.nan),
        ([], math.nan),
    ],
)
def test_growth_begins_after_the_first_minute(resident: Sequence[tuple[float, int]], expected: float) -> None:
    assert many_adapters.growth(resident, 60.0) == pytest.approx(expected, nan_ok=True)


def test_an_answer_is_one_reference_or_a_mixture() -> None:
    tally = swaps.Tally()
    for text in ("a b", "c d", "a d", "a", ""):
        tally.count(text, ("a b", "c d"))

    assert tally.answers == {"first": 1, "second": 1, "mixture": 3}
    assert tally.mixtures == ["a d", "a", ""]


def test_idle_cost_is_the_share_of_speed_that_is_left() -> None:
    assert idle_cost.Pair(1, without=0.049, having=0.05, errors=0).ratio == pytest.approx(0.98)


def test_samples_of_a_metric_are_summed() -> None:
    text = '# HELP a b\na{x="1"} 2.0\na{x="2"} 3.5\nab 100\na_total 7\nb 1e3\n'

    assert (sum_of("a", text), sum_of("b", text), sum_of("c", text)) == (5.5, 1000.0, 0)


async def test_steady_streams_begin_anew_until_they_are_cut(server: ScriptedServer) -> None:
    wishes = [Wish("ada", "x", 9), Wish("bob", "x", 9)]
    async with open_session(WIRE) as session, steady_streams(session, server.url, wishes) as streams:
        for one in streams:  # open at last: the answers are shorter than what a beginning takes
            assert one.failures == []
            assert [len(times) for times in one.times[:2]] == [len(TOKENS)] * 2
            assert 2 * len(TOKENS) >= FIRST_TOKENS


async def test_steady_stream_that_is_refused_says_so(server: ScriptedServer) -> None:
    async with (
        open_session(WIRE) as session,
        steady_streams(session, server.url, [Wish("busy", "x", 9)]) as (one,),
    ):
        pass
    assert one.failures == ['http 429: {"error":{"message":"the queue is full"}}']


async def test_server_that_does_not_start_gives_its_last_words() -> None:
    with pytest.raises(ServerFailed, match="no such folder"):
        async with serving("--adapters-dir", "/nowhere"):
            pass


@pytest.mark.slow
def test_every_trial_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import make_model

    small = ["--json", str(tmp_path / "out.json")]
    make_model.main(["--shape", "tiny", "--out", str(tmp_path)])
    assert (
        cold_loads.main([*small, "--adapters", "6", "--every", "0.2", "--streams", "2", "--runs", "1"]) == 0
    )
    assert (
        many_adapters.main(
            [*small, "--adapters", "9", "--room", "3", "--host-room", "4", "--minutes", "0.05"]
        )
        == 0
    )
    assert (
        swaps.main(
            [
                *small,
                "--by",
                "post",
                "--swaps",
                "3",
                "--settle",
                "4",
                "--clients",
                "2",
                "--output-tokens",
                "16",
            ]
        )
        == 0
    )
    model = ["--model", str(tmp_path / "model")]
    assert idle_cost.main([*small, *model, "--adapters", "2", "--streams", "2", "--pairs", "1"]) == 0
    said = capsys.readouterr().out
    assert "p99, cold / warm" in said
    assert "adapters of 9 that answered" in said
    assert "tokens/s, with / without" in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("mixtures")] == ["0"]
