"""The commands of the other pages, README.md and CONTRIBUTING.md: run, or read as their programs read them.

What takes minutes or gigabytes (`make test`, a model of half a billion weights) is read only; what those
commands do is run by tests of their own. No page may show a command that nobody here knows what to do with.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from server.embedded.location import adapters_dir, model_dir
from server.launchers.flags import Launcher
from server.launchers.lorax_flags import LORAX
from server.launchers.tgi_flags import TGI
from server.launchers.translation import make_parser, translate, wishes_of
from server.settings import add_flags, read_settings
from tests.e2e.running import REPOSITORY, RunningServer, start
from tests.nursery import Nursery
from tests.programs import run_module

OTHERS = (
    "quick-start",
    "models",
    "adapters",
    "protocols",
)  # test_docs_examples.py runs them from top to bottom
PAGES = [
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if page.stem not in OTHERS),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
ADDRESS = "http://127.0.0.1:8000"
ELSEWHERE = ("docker ", "kubectl ")
"""Need an engine or a cluster; test_dockerfiles.py and test_deploy.py try their files."""

pytestmark = pytest.mark.timeout(300)  # a page has many commands

Act = Callable[[list[str], RunningServer], None]


def commands(page: Path) -> Iterator[str]:
    """Of a shell: of blocks, of what is indented, and what stands in a line of text."""
    text = page.read_text("utf-8")
    fenced = [body for _, body in re.findall(r"^```(bash|console)\n(.*?)^```$", text, re.M | re.S)]
    if page.parent.name == "benchmarks":
        fenced += re.findall(r"(?:^ {4}.+\n)+", text, re.M)
        fenced += re.findall(r"`((?:motet|python -m) [^`]+)`", text)
    for block in fenced:
        whole = ""
        for line in block.replace("\\\n", " ").splitlines():
            whole += re.sub(r"(^|  +)#.*$", "", line) + "\n"
            if whole.count("'") % 2 == 0:
                command = whole.strip().removeprefix("$ ").removesuffix(" &")
                if command:
                    yield command
                whole = ""
        assert not whole, "the quote is never closed"


def program(*words: str) -> str:
    """What it says."""
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def make(words: list[str], server: RunningServer) -> None:
    program("make", "--dry-run", *words[1:])


def ask(words: list[str], server: RunningServer) -> None:
    told = [word.replace(ADDRESS, server.url) for word in words[1:]]
    said = program("curl", "-sS", "--fail-with-body", *told)
    assert len(said) > 50
    assert not re.search(r'"error": ?[{"]|"data": ?\[\]', said), said


def serve(words: list[str], server: RunningServer) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)
    read_settings(parser.parse_args([word for word in words[2:] if word != "..."]))


def take_over(launcher: Launcher) -> Act:
    def act(words: list[str], server: RunningServer) -> None:
        told = [str(model_dir()) if before == "--model-id" else word for before, word in pairwise(words)]
        wishes = wishes_of(launcher, make_parser(launcher).parse_args(told), {})
        read_settings(argparse.Namespace(**translate(wishes, {}).settings))

    return act


def look_after_adapters(words: list[str], server: RunningServer) -> None:
    known = {
        "/models/Qwen2.5-0.5B-Instruct": model_dir(),
        "/models/adapters/pirate": adapters_dir() / "pirate",
    }
    told = [str(known.get(word, word)) for word in words[1:]]
    assert run_module("server", *told, MOTET_URL=server.url).strip()


def measure(words: list[str], server: RunningServer) -> None:
    """With fewer and shorter answers, of the model that is there, and no files."""
    check_flags("benchmarks", words[2:])
    plain, left = [], {"--json": 1, "--plot": 1, "--model": 1, "--concurrency": 9, "--requests": 1}
    skipped = 0
    for word in words[2:]:
        if word.startswith("--"):
            skipped = left.get(word, -1) + 1
        if skipped <= 0:
            plain.append(word)
        skipped -= 1
    few = ("--duration", "1") if "--rate" in words else ("--requests", "2", "--concurrency", "2")
    said = run_module("server", "bench", *plain, "--url", server.url, "--output-tokens", "4", *few)
    assert "output tokens/s" in said


@cache
def help_of(module: str) -> str:
    words = ("server", "bench") if module == "benchmarks" else (module,)
    return run_module(*words, "--help")


def check_flags(module: str, words: list[str]) -> None:
    for word in words:
        if re.fullmatch(r"--[a-z0-9-]+", word):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", help_of(module)), f"{module} has no {word}"


def read(words: list[str], server: RunningServer) -> None:
    """A program of benchmarks/: tests/benchmarks runs them, with less work than the pages ask for."""
    check_flags(words[2], words[3:])


ACTS: dict[str, Act] = {
    "make": make,
    "curl": ask,
    "motet serve": serve,
    "motet adapters": look_after_adapters,
    "motet bench": measure,
    "python -m": read,
    "lorax-launcher": take_over(LORAX),
    "text-generation-launcher": take_over(TGI),
}


def act_of(command: str) -> Act | None:
    found = (act for words, act in ACTS.items() if command.startswith(f"{words} ") or command == words)
    return next(found, None)


@pytest.fixture(scope="module")
def own_server(nursery: Nursery) -> Iterator[RunningServer]:
    """The commands change it: they load, pin and unload."""
    running = start(nursery=nursery)
    yield running
    running.kill()


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_are_what_their_programs_take(own_server: RunningServer, page: Path) -> None:
    """In their order: some need what those before them have done."""
    for command in commands(page):
        if not command.startswith(ELSEWHERE):
            act = act_of(command.removeprefix(".venv/bin/"))
            assert act is not None, f"nobody here knows what to do with {command!r}"
            act(shlex.split(command.removeprefix(".venv/bin/")), own_server)


def test_there_are_commands_on_the_pages() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 40
