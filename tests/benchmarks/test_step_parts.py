"""`--profile` asks the server where its time went, and says so if it cannot tell."""

import json
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.serving import serving
from benchmarks.step_parts import StepParts, parts_table, read_parts
from tests.benchmarks.conftest import ScriptedServer


def test_a_level_is_what_came_since_the_one_before() -> None:
    before = StepParts(10, 100, {"linear layers": 1.0})
    after = StepParts(30, 180, {"linear layers": 3.0, "sampling": 0.5})
    level = after.since(before)
    assert level == StepParts(20, 80, {"linear layers": 2.0, "sampling": 0.5})
    table = parts_table(["1 concurrent"], [level], [5.0])
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["linear", "layers", "40.0%"],
        ["sampling", "10.0%"],
        ["between", "steps", "50.0%"],
        ["steps;", "ms", "each", "20;", "125.0"],
        ["tokens", "a", "step", "4.0"],
    ]


async def test_a_real_server_accounts_for_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving() as site:
        before = await read_parts(site.session, site.url)
        await site.send("", "once upon a time", 20)
        level = (await read_parts(site.session, site.url)).since(before)
    assert level.steps >= 20
    assert level.tokens >= 20
    assert level.seconds["scheduling"] > 0
    assert level.seconds["sampling"] > 0


def test_a_server_that_does_not_tell_is_found_out(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--url", server.url, "--requests", "1", "--profile"]) == 2
    assert "does not tell at /metrics" in capsys.readouterr().err


def test_without_the_flag_nobody_is_asked(server: ScriptedServer, tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    assert (
        cli.main(["--url", server.url, "--requests", "1", "--concurrency", "1", "--json", str(written)]) == 0
    )
    assert json.loads(written.read_text())["step_parts"] == []
