"""The command line: help that can be read, and commands about a running server."""

import argparse
import io
import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from server.__main__ import main
from server.settings import Settings, SettingsError, read_settings


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*words])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_the_flags_of_serve_come_in_groups_and_none_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "serve", "--help")
    usage, _, flags = text.partition("options:")
    assert len(usage.splitlines()) < 10
    shown = set(re.findall(r"^  --([a-z0-9-]+)", text, re.M))
    fields = {name.replace("_", "-") for name in Settings.model_fields if name != "model"}
    assert fields == shown
    groups = re.findall(r"^([a-zA-Z ,]+):$", flags, re.M)
    assert {"where to listen", "adapters", "fair shares and limits"} <= set(groups)


@pytest.mark.parametrize(
    "words", [("chat",), ("adapters", "list"), ("adapters", "load", "x"), ("adapters", "unload", "x")]
)
def test_without_a_server_one_line_says_what_to_do(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert main([*words, "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "motet serve" in error


def completions(line: str, tmp_path: Path) -> list[str]:
    """What bash offers at the end of the line, after it has read the script."""
    program = """
        complete() { builtin complete "$@"; [[ $1 == -o ]] && offer=${@: -2:1}; true; }
        source "$1"
        COMP_LINE=$2 COMP_POINT=${#2}
        read -ra COMP_WORDS <<< "$2"; [[ $2 == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        $offer motet "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    words = ["bash", "-c", program, "bash", str(tmp_path / "motet.bash"), line]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "error" not in done.stderr, done.stderr
    return [word.strip() for word in done.stdout.splitlines()]


def test_a_shell_completes_commands_flags_and_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "motet.bash").write_text(capsys.readouterr().out)

    assert {"serve", "chat", "adapters", "bench"} <= set(completions("motet ", tmp_path))
    assert completions("motet serve --adapters-d", tmp_path) == ["--adapters-dir"]
    assert completions("motet serve --quantization ", tmp_path) == ["none", "int8", "int4"]
    assert completions("motet bench --prof", tmp_path) == ["--profile"]
    assert set(completions("motet adapters ", tmp_path)) >= {"check", "list", "load", "unload"}
    assert completions("motet adapters load --p", tmp_path) == ["--pin"]
    assert completions("motet completion z", tmp_path) == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "adapters-dir" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_empty_variables_count_as_none_but_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files write them."""
    monkeypatch.setenv("MOTET_MODEL", "")
    monkeypatch.setenv("MOTET_PORT", "")
    settings = read_settings(argparse.Namespace())
    assert (settings.model, settings.port) == (None, 8000)
    monkeypatch.setenv("MOTET_API_KEY", "")
    with pytest.raises(SettingsError, match="MOTET_API_KEY is empty"):
        read_settings(argparse.Namespace())
    assert read_settings(argparse.Namespace(api_key="sk-flag")).api_key == "sk-flag"


def test_names_of_any_shape_reach_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a b", "\u00e9", "a?b#c"):
        assert main(["chat", "--url", "http://127.0.0.1:9", "--model", name]) == 1
        assert capsys.readouterr().err.count("\n") == 1


class _Scripted(BaseHTTPRequestHandler):
    """A server whose model answers with what would clear a terminal, and then cuts the stream off."""

    words = "safe\x1b[2J\x07 and\n\tsound\x9b1m"

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "base"}]}).encode())

    def do_POST(self) -> None:
        chunk = {"choices": [{"delta": {"content": self.words}}]}
        self._answer(f"data: {json.dumps(chunk)}\n\n".encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_models_words_do_not_steer_the_terminal_and_a_cut_answer_is_no_whole_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTTPServer(("127.0.0.1", 0), _Scripted) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        status = main(["chat", "--url", f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    said = capsys.readouterr()
    assert said.out == "safe[2J and\n\tsound1m\n"
    assert (status, said.err) == (1, "motet: the answer was cut off\n")
