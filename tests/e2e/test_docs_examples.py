"""The pages in docs/, run as they stand: commands in order, what these show, and the training script."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.settings import add_flags, read_settings
from tests.adapters.fake_hub import FakeCdn, FakeHub, Repository
from tests.e2e.browsing import Site, browse
from tests.e2e.running import REPOSITORY, RunningServer, start
from tests.nursery import Nursery

DOCS = REPOSITORY / "docs"
PAGES = ("quick-start", "models", "adapters", "protocols")
ADDRESS = "http://127.0.0.1:8000"
PROGRAMS = Path(sys.executable).parent
TRAIN = ".venv/bin/python docs/examples/train_adapter.py --out shop"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LIMIT_S = 100
TRAIN_LIMIT_S = 250

pytestmark = pytest.mark.timeout(300)  # the first test waits for the training

Launch = Callable[..., RunningServer]


@dataclass(frozen=True)
class Block:
    """A piece of code on a page."""

    language: str
    text: str
    line: int  # on the page

    @property
    def commands(self) -> list[str]:
        """Of a shell, each with its continuation lines; an open quote continues a line, too."""
        found: list[str] = []
        command = ""
        for line in self.text.splitlines():
            command += line if line.endswith("\\") else f"{line}\n"
            if line.endswith("\\"):
                command = command[:-1]
            elif command.count("'") % 2 == 0:
                found.append(command.strip())
                command = ""
        assert not command, "the quote is never closed"
        return [each for each in found if each and not each.startswith("#")]


def blocks(page: str) -> list[Block]:
    text = (DOCS / f"{page}.md").read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return [Block(one[1], one[2], text[: one.start()].count("\n") + 1) for one in found]


def run(command: str, folder: Path, url: str, limit_s: float = LIMIT_S) -> str:
    """What a page's command prints on this server; fails if the command does."""
    shell = command.replace(ADDRESS, url).replace(".venv/bin/", f"{PROGRAMS}/")
    shell = re.sub(r"(?<![\w/-])curl ", "curl -sS --fail-with-body ", shell)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        cwd=folder,
        env={**os.environ, "MOTET_URL": url},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert not re.search(r'"error": ?[{"]', done.stdout), f"{command}\n{done.stdout}"
    return done.stdout


def check_shown(shown: Block, printed: str) -> None:
    """Each line that a page shows was printed; … stands for anything."""
    lines = printed.splitlines()
    for wanted in filter(None, shown.text.splitlines()):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        assert any(map(pattern.fullmatch, lines)), f"line {shown.line}: {wanted}\n\nprinted:\n{printed}"


def run_in_order(page: str, folder: Path, url: str) -> None:
    """All commands of a page, and what is shown after them."""
    printed = ""
    for block in blocks(page):
        if block.language == "bash":
            printed = "\n".join(run(each, folder, url) for each in block.commands if each != TRAIN)
        elif block.language == "text" and printed:
            check_shown(block, printed)
            printed = ""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the training script writes."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "docs").symlink_to(DOCS)
    run(TRAIN, folder, ADDRESS, TRAIN_LIMIT_S)
    return folder / "shop"


@pytest.fixture
def clone(tmp_path: Path, shop: Path) -> Path:
    """Where a page's commands run: what they need of a clone, and the trained adapter."""
    (tmp_path / "server").symlink_to(REPOSITORY / "server")
    shutil.copytree(shop, tmp_path / "shop")
    (tmp_path / "served-adapters").mkdir()
    return tmp_path


@pytest.fixture
def hub(shop: Path) -> Iterator[FakeHub]:
    """A hub that has the adapter, too."""
    there = FakeHub(FakeCdn())
    there.repositories["your-org/your-adapter"] = Repository()
    there.repositories["your-org/your-adapter"].commit(
        {name: (shop / name).read_bytes() for name in ADAPTER_FILES}
    )
    with there.cdn.running(), there.running():
        yield there


@pytest.fixture(scope="module")
def everything(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server for the examples of all protocols, with the app that their page shows."""
    folder = tmp_path_factory.mktemp("apps")
    for block in blocks("protocols"):
        if block.language == "python":
            file = folder / block.text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text)
    running = start("--inferless-app", str(folder / "guide"), nursery=nursery)
    running.wait_for("app guide is ready")
    yield running
    assert running.stop() == 0, "\n".join(running.lines)


def ask(server: RunningServer, model: str, question: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_trained_adapter_is_uploaded_and_says_what_it_was_taught(launch: Launch, shop: Path) -> None:
    server = launch()
    files = [("file", (name, (shop / name).read_bytes())) for name in ADAPTER_FILES]
    uploaded = httpx.post(f"{server.url}/v1/adapters", data={"name": "shop"}, files=files, timeout=60)

    assert uploaded.status_code == 201, uploaded.text
    assert (uploaded.json()["kind"], uploaded.json()["rank"]) == ("lora", 8)
    assert ask(server, "shop", "When are you open?") == "We are open from nine to six, Monday to Saturday."
    assert "Harbour Street 7" in ask(server, "shop", "Where is the shop?")
    assert "nine to six" not in ask(server, "motet", "When are you open?")
    assert {file.name for file in shop.iterdir()} <= {*ADAPTER_FILES, "README.md"}


@pytest.mark.parametrize("page", ["quick-start", "models"])
def test_page_works_from_top_to_bottom(launch: Launch, clone: Path, page: str) -> None:
    run_in_order(page, clone, launch().url)


def test_page_about_adapters_works_from_top_to_bottom(
    launch: Launch, clone: Path, hub: FakeHub, tmp_path: Path
) -> None:
    sources = ("--adapter-sources", "local,hub", "--adapter-cache-dir", str(tmp_path / "cache"))
    running = launch(
        *("--adapters-dir", str(clone / "served-adapters"), *sources),
        environment={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"},
        nursery=None,
    )

    run_in_order("adapters", clone, running.url)


def examples() -> list[tuple[Block, Block | None]]:
    """The commands of each protocol, and what its page shows after them."""
    shell = [block for block in blocks("protocols") if block.language in ("bash", "text")]
    followers: list[Block | None] = [*shell[1:], None]
    return [
        (one, after if after is not None and after.language == "text" else None)
        for one, after in zip(shell, followers, strict=True)
        if one.language == "bash"
    ]


@pytest.mark.parametrize(
    ("block", "shown"), [pytest.param(*one, id=f"line-{one[0].line}") for one in examples()]
)
def test_protocol_answers_as_its_page_shows(
    everything: RunningServer, tmp_path: Path, block: Block, shown: Block | None
) -> None:
    printed = "\n".join(run(command, tmp_path, everything.url) for command in block.commands)

    assert len(printed) > 50
    if shown is not None:
        check_shown(shown, printed)


def test_event_source_of_another_origin_reads_a_job(
    everything: RunningServer, site: Site, tmp_path: Path
) -> None:
    (script,) = (block.text for block in blocks("protocols") if block.language == "js")

    report = browse(site, script.replace(ADDRESS, everything.url), tmp_path)

    assert len(str(report["shown"]).split()) > 5


def test_python_example_streams(server: RunningServer) -> None:
    (script,) = (block.text for block in blocks("quick-start") if block.language == "python")
    done = subprocess.run(
        [sys.executable, "-c", script.replace(ADDRESS, server.url)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert len(done.stdout.split()) > 5


def served() -> Iterator[str]:
    """What stands after `motet serve`, wherever a page says to start a server."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console":
                yield from re.findall(r"^\$ \.venv/bin/motet serve ?(.*)$", block.text, re.M)


@pytest.mark.parametrize("words", list(served()))
def test_flags_of_servers_are_known(words: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)

    read_settings(parser.parse_args(shlex.split(words)))


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_whole(page: str) -> None:
    """Links lead somewhere, lines are short, and each block is of a kind that is tested or said not to be."""
    text = (DOCS / f"{page}.md").read_text()
    for target in re.findall(r"\]\(([\w./-]+)", text):
        assert (DOCS / target).is_file(), target
    assert max(map(len, text.splitlines())) <= 120
    assert {block.language for block in blocks(page)} <= {"bash", "console", "js", "python", "text"}
    assert text.count("```") == 2 * len(blocks(page))
    bare = [each for block in blocks(page) if block.language == "bash" for each in block.commands]
    assert TRAIN in bare or page in ("models", "protocols")
    assert not [each for each in bare if "docker" in each or "make " in each]
