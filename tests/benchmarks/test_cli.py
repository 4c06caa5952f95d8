"""The command line against a real server on a real port. Nothing here asserts how long anything took."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from tests.benchmarks.conftest import ScriptedServer

Output = pytest.CaptureFixture[str]

QUIET = ["--warmup", "0", "--prompt-tokens", "12", "--output-tokens", "4"]


def bench(server: ScriptedServer, *arguments: str) -> int:
    return main(["--url", server.url, *QUIET, *arguments])


def bench_json(server: ScriptedServer, path: Path, *arguments: str) -> dict[str, Any]:
    bench(server, "--json", str(path / "run.json"), *arguments)
    run: dict[str, Any] = json.loads((path / "run.json").read_text())
    return run


def test_counts_tokens_by_usage_and_finds_the_model(
    server: ScriptedServer, tmp_path: Path, capsys: Output
) -> None:
    run = bench_json(server, tmp_path, "--concurrency", "1", "3", "--requests", "6")
    assert [level["concurrency"] for level in run["levels"]] == [1, 3]
    summary = run["levels"][0]["summary"]
    assert (summary["requests"], summary["output_tokens"], summary["is_exact"]) == (6, 24, True)
    assert summary["cached_tokens"] == 18
    assert summary["ttft"]["count"] == 6
    assert summary["gap"]["count"] == 18  # three gaps between four chunks
    assert {body["model"] for body in server.bodies} == {"base"}
    printed = capsys.readouterr().out
    assert "time to first token, ms" in printed
    assert "~" not in printed


def test_the_json_says_what_was_run_and_where(server: ScriptedServer, tmp_path: Path) -> None:
    run = bench_json(
        server, tmp_path, "--requests", "2", "--label", "mine", "--api-key", "secret", "--seed", "5"
    )
    assert run["label"] == "mine"
    assert run["machine"]["cores"] >= 1
    assert run["machine"]["versions"]["aiohttp"]
    assert run["load"]["seed"] == 5
    assert run["command"].startswith("motet bench --url")
    assert "secret" not in json.dumps(run)
    assert server.keys == {"Bearer secret"}


def test_without_usage_chunks_are_counted_and_marked(
    server: ScriptedServer, tmp_path: Path, capsys: Output
) -> None:
    run = bench_json(server, tmp_path, "--adapters", "mute", "--requests", "2")
    assert run["levels"][0]["summary"]["output_tokens"] == 8
    assert not run["levels"][0]["summary"]["is_exact"]
    assert "chunks are counted" in capsys.readouterr().out


def test_speaks_plain_completions(server: ScriptedServer, tmp_path: Path) -> None:
    run = bench_json(server, tmp_path, "--api", "completions", "--requests", "2")
    assert run["levels"][0]["summary"]["output_tokens"] == 8
    assert isinstance(server.bodies[0]["prompt"], str)


def test_speaks_lorax_and_names_the_adapter_in_parameters(server: ScriptedServer, tmp_path: Path) -> None:
    run = bench_json(
        server, tmp_path, "--api", "lorax", "--adapters", "base,ada", "--mix", "distinct", "--requests", "4"
    )
    assert run["levels"][0]["summary"]["output_tokens"] == 16
    assert run["levels"][0]["summary"]["prompt_tokens_p50"] == 11
    common = {"max_new_tokens": 4, "details": True}
    asked = [body["parameters"] for body in server.bodies]
    assert asked == [common, common | {"adapter_id": "ada"}] * 2


def test_all_adapters_are_those_the_server_lists_with_a_parent(
    server: ScriptedServer, tmp_path: Path, capsys: Output
) -> None:
    run = bench_json(server, tmp_path, "--adapters", "all", "--mix", "distinct", "--requests", "4")
    assert run["load"]["adapters"] == ["ada", "bob"]
    assert {name: group["requests"] for name, group in run["levels"][0]["adapters"].items()} == {
        "ada": 2,
        "bob": 2,
    }
    assert "ada" in capsys.readouterr().out


def test_extra_goes_into_the_body(server: ScriptedServer) -> None:
    bench(server, "--requests", "1", "--extra", '{"ignore_eos": true, "temperature": 0.5}')
    assert server.bodies[0]["ignore_eos"] is True
    assert server.bodies[0]["temperature"] == 0.5


def test_an_open_loop_measures_from_the_schedule(
    server: ScriptedServer, tmp_path: Path, capsys: Output
) -> None:
    run = bench_json(server, tmp_path, "--rate", "200", "--arrival", "constant", "--requests", "5")
    level = run["levels"][0]
    assert level["rate"] == 200
    assert [request["scheduled"] for request in level["requests"]] == [0.0, 0.005, 0.01, 0.015, 0.02]
    assert all(request["sent"] >= request["scheduled"] for request in level["requests"])
    assert "from schedule" in capsys.readouterr().out


def test_a_duration_ends_a_level(server: ScriptedServer, tmp_path: Path) -> None:
    run = bench_json(server, tmp_path, "--duration", "0.5")
    assert run["levels"][0]["summary"]["requests"] >= 1


@pytest.mark.parametrize(
    ("script", "kind"),
    [("busy", "http 429"), ("broken", "stream error"), ("cut", "cut off"), ("plain", "not a stream")],
)
def test_failures_are_counted_by_kind(
    server: ScriptedServer, tmp_path: Path, capsys: Output, script: str, kind: str
) -> None:
    run = bench_json(server, tmp_path, "--adapters", f"base,{script}", "--mix", "distinct", "--requests", "4")
    assert run["levels"][0]["summary"]["failures"] == [[kind, 2]]
    assert run["levels"][0]["summary"]["output_tokens"] == 8
    assert f"2 x {kind}" in capsys.readouterr().out


def test_a_level_without_a_good_answer_is_status_1(server: ScriptedServer) -> None:
    assert bench(server, "--adapters", "busy", "--requests", "2") == 1


def test_a_hopeless_warm_up_ends_the_run(server: ScriptedServer, capsys: Output) -> None:
    assert main(["--url", server.url, "--adapters", "busy"]) == 1
    assert "the queue is full" in capsys.readouterr().err


def test_the_warm_up_meets_every_adapter_and_is_not_measured(server: ScriptedServer, tmp_path: Path) -> None:
    main(["--url", server.url, "--adapters", "ada,bob,mute", "--mix", "one", "--requests", "1"])
    assert sorted(str(body["model"]) for body in server.bodies[:3]) == ["ada", "bob", "mute"]
    assert len(server.bodies) == 4


def test_prompts_have_the_exact_length_where_the_server_counts(server: ScriptedServer) -> None:
    bench(server, "--api", "completions", "--requests", "2", "--shared-prefix", "20")
    words = [str(body["prompt"]).split() for body in server.bodies]
    assert [len(prompt) + 1 for prompt in words] == [32, 32]  # the server counts one token more than words
    assert words[0][:19] == words[1][:19]
    assert words[0][19:] != words[1][19:]
    assert not any(word.startswith("z") for prompt in words for word in prompt)


def test_without_models_and_tokenize_it_runs_all_the_same(
    server: ScriptedServer, tmp_path: Path, capsys: Output
) -> None:
    server.has_models = server.has_tokenize = False
    run = bench_json(server, tmp_path, "--requests", "1")
    assert run["levels"][0]["summary"]["output_tokens"] == 4
    assert "about right" in capsys.readouterr().out


def test_writes_a_picture(server: ScriptedServer, tmp_path: Path) -> None:
    picture = tmp_path / "run.png"
    assert bench(server, "--plot", str(picture), "--concurrency", "1", "2", "--adapters", "ada,bob") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_says_in_one_line_that_no_server_runs(capsys: Output) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        assert main(["--url", f"http://127.0.0.1:{unused.getsockname()[1]}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("No server runs at http://127.0.0.1:")
    assert said.count("\n") == 1
    assert "motet serve" in said


def test_says_that_the_server_is_not_ready(server: ScriptedServer, capsys: Output) -> None:
    server.is_ready = False
    assert bench(server) == 2
    assert "not ready" in capsys.readouterr().err


def test_says_that_there_are_no_adapters(server: ScriptedServer, capsys: Output) -> None:
    server.has_models = False
    assert bench(server, "--adapters", "all") == 2
    assert "lists no adapters" in capsys.readouterr().err


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else find(name))
    assert main([]) == 2
    assert capsys.readouterr().err == "motet bench needs aiohttp: pip install 'motet[bench]'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--requests", "0"],
        ["--concurrency", "0"],
        ["--rate", "-1"],
        ["--extra", "[]"],
        ["--extra", "{"],
        ["--mix", "odd"],
        ["--requests", "3", "--duration", "3"],
    ],
)
def test_arguments_without_sense_are_refused(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2


def test_arguments_need_no_extra_package() -> None:
    """`motet bench --help` works where only the core is installed."""
    code = "import sys; sys.modules['aiohttp'] = None; sys.modules['tqdm'] = None; import benchmarks.cli"
    subprocess.run([sys.executable, "-c", code], check=True)
