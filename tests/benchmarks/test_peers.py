"""The comparison runs to its end, over servers that are all this one."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import peers, peers_plot
from server.embedded.location import model_dir


@pytest.mark.usefixtures("few_words", "small_machine")
def test_two_servers_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "IDLE_S", 0.1)
    again = shlex.join([sys.executable, "-m", "server", "serve"]) + " --port {port}"
    written = tmp_path / "peers.json"

    status = peers.main(
        [
            str(model_dir()),
            *("--runs", "1", "--loads", "1 stream", "--json", str(written)),
            *("--log", str(tmp_path / "log")),
            *("--peer", "twin", again),
        ]
    )

    assert status == 0
    result = json.loads(written.read_text())
    assert {start["server"] for start in result["starts"]} == {"motet", "twin"}
    assert all(start["resident_bytes"] > 1 << 26 for start in result["starts"])
    assert [(f["server"], f["load"], f["failed"]) for f in result["figures"]] == [
        ("motet", "1 stream", 0),
        ("twin", "1 stream", 0),
    ]
    assert all(figure["output_tokens_per_s"] > 0 for figure in result["figures"])
    picture = tmp_path / "peers.svg"
    assert peers_plot.main([str(written), str(picture)]) == 0
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    assert peers_plot.runs_of(result["figures"], "first_token_s").keys() == {"1 stream"}


def test_no_load_of_a_server_has_the_prompts_of_another() -> None:
    seeds = [peers.seed_of(load, number) for load in peers.ALL_LOADS for number in range(3)]
    assert len(set(seeds)) == len(seeds)
