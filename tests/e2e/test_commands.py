"""`motet chat` and `motet adapters list|load|unload` against a real server."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.embedded.location import adapters_dir
from tests.e2e.running import REPOSITORY, RunningServer


def motet(*words: str, said: str = "", status: int = 0) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "server", *words],
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_lines_of_a_pipe_are_questions_and_voices_change_between_them(server: RunningServer) -> None:
    question = "What is an adapter?"
    lines = (question, "/adapter pirate", question, "/adapters pir", "/help", "/quit", "never asked")
    text = motet("chat", "--url", server.url, "--max-tokens", "12", said="\n".join(lines))
    plain, pirate, *listed = text.splitlines()
    assert plain
    assert pirate
    assert plain != pirate
    assert listed[0].startswith("  pirate  (rank 8, ")
    assert any("/adapters" in line for line in listed[1:])


def test_an_unknown_voice_is_one_line_and_the_talk_goes_on(server: RunningServer) -> None:
    error = motet("chat", "--url", server.url, said="/adapter nobody\nWhat is an adapter?\n", status=1)
    assert error.count("\n") == 1
    assert "nobody" in error
    assert "nobody" in motet("chat", "--url", server.url, "--model", "nobody", status=1)


def test_ctrl_c_ends_an_answer_and_not_the_talk(server: RunningServer) -> None:
    """In a terminal of its own, as people have it."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-m", "server", "chat", "--url", server.url])
    shown = b""

    def comes(wanted: bytes, within_s: float) -> bool:
        nonlocal shown
        limit = time.monotonic() + within_s
        while wanted not in shown:
            if not select.select([terminal], [], [], max(0.0, limit - time.monotonic()))[0]:
                return False
            shown += os.read(terminal, 4096)
        return True

    def until(wanted: bytes) -> None:
        assert comes(wanted, 30), shown

    until(b"motet> ")
    os.write(terminal, b"What is an adapter?\n")
    until(b"tokens/s")
    shown = shown.partition(b"tokens/s")[2]
    until(b"motet> ")
    shown = b""
    # The prompt is shown a moment before Python waits for keys. What comes in between it sees with the next
    # key only: as anybody would, press again.
    assert any(os.write(terminal, b"\x03") and comes(b"motet> ", 2) for _ in range(10)), shown
    os.write(terminal, b"/adapter haiku\n")
    until(b"haiku> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def test_adapters_are_listed_loaded_and_unloaded(
    launch: Callable[..., RunningServer], tmp_path: Path
) -> None:
    shutil.copytree(adapters_dir() / "haiku", tmp_path / "poet")
    running = launch("--port", "0", "--adapter-roots", str(tmp_path))
    about = ("--url", running.url)
    assert len(motet("adapters", "list", *about).splitlines()) == 4
    loaded = motet("adapters", "load", "poet", "--from", str(tmp_path / "poet"), "--pin", *about)
    assert loaded.startswith("poet: rank 12, ")
    (one,) = json.loads(motet("adapters", "list", "poe", "--json", *about))
    assert (one["id"], one["pinned"]) == ("poet", True)
    assert "freed" in motet("adapters", "unload", "poet", *about)
    assert motet("adapters", "list", "poet", *about) == ""
    assert "poet" in motet("adapters", "unload", "poet", *about, status=1)


@pytest.mark.parametrize("word", ["list", "load", "unload"])
def test_a_key_is_asked_for_in_one_line(launch: Callable[..., RunningServer], word: str) -> None:
    running = launch("--port", "0", "--api-key", "sk-right")
    words = ["adapters", word, *([] if word == "list" else ["pirate"]), "--url", running.url]
    assert "MOTET_API_KEY" in motet(*words, status=1)
    motet(*words, "--api-key", "sk-right")
