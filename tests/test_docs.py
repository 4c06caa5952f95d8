"""What the pages of `docs/` name is there: links, files, modules, flags, metrics. Nothing is run.

Flags of other servers stand in two places that are told apart by their form: in the columns beside "Motet" of
the tables in docs/coming-from.md, and in commands that begin with the name of another program.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMING_FROM = DOCS / "coming-from.md"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMANDS = (
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    ROOT / "server" / "adapters_command.py",
    ROOT / "server" / "chat_command.py",
    ROOT / "server" / "remote_server.py",
    ROOT / "server" / "embedded" / "training" / "__main__.py",
)
"""The programs of ours that have flags beside `motet serve`."""

FOREIGN = re.compile(
    r"apt(-get)?|curl|docker|git|hf|kubectl|make|mypy|nginx|node|np[mx]|ollama|pip|printf|promtool|pytest|python3"
    r"|ruff|sphinx-build|sudo|systemctl|taskset|(lorax|text-generation)-launcher|uv|vllm|zse"
)
"""Programs with flags of their own, by the first word of a command."""

FOREIGN_FLAGS = frozenset(("--build-arg", "--gpus", "--enable-feature"))
"""Of other programs, named in the text without a command: docker's, Prometheus's."""

FOLDERS = ("server", "adapters", "benchmarks", "tests", "deploy", "docs", ".ci")
_TOP_FILE = re.compile(r"[A-Z]+\.md|LICENSE|Makefile|Dockerfile(\.\w+)?|pyproject\.toml|constraints\.txt")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FENCE = re.compile(r"^(```+|~~~+)\s*([^\n]*)\n(.*?)^\1\s*$", re.M | re.S)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
_METRIC = re.compile(r"\b(?:vllm:|motet_)[a-z0-9_]*[a-z]")
_MODULE = re.compile(r"python3? -m ((?:server|adapters|benchmarks)[\w.]*)")
_CELL = re.compile(r"(?<!\\)\|")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """What kind each block is said to be, and what is in it."""
    for match in _FENCE.finditer(text_of(page)):
        yield match[2].strip(), match[3]


def prose(page: Path) -> str:
    return _FENCE.sub("", text_of(page))


def code(page: Path) -> Iterator[str]:
    """What stands in backticks in the text."""
    yield from (match[1].strip() for match in _CODE.finditer(prose(page)))


# --- Links and files ----------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    """Those to files: of the text, and the entries of tables of contents."""
    for target in _LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]
    for kind, body in fences(page):
        if kind == "{toctree}":
            yield from (f"{line}.md" for line in body.split("\n") if line and not line.startswith(":"))
        elif kind.startswith("{include}"):
            yield kind.removeprefix("{include}").strip()


def paths(page: Path) -> Iterator[str]:
    """What looks like a file or a folder of this repository; a word in capitals stands for any name."""
    for word in code(page):
        is_inner = word.startswith(tuple(f"{folder}/" for folder in FOLDERS))
        if (is_inner and re.fullmatch(r"[\w./*-]+", word)) or _TOP_FILE.fullmatch(word):
            yield word


def is_there(path: str) -> bool:
    if (ROOT / path).exists():
        return True
    pattern = re.sub(r"(?<![a-z])[A-Z]{2,}(?![a-z])", "*", path).rstrip("/")
    return "*" in pattern and any(ROOT.glob(pattern))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_links_of_built_pages_stay_among_them() -> None:
    found = {target for page in DOCS.glob("*.md") for target in _LINK.findall(prose(page))}
    assert [target for target in found if target.startswith("../")] == []


@pages
def test_files_that_are_named_are_there(page: Path) -> None:
    assert [path for path in paths(page) if not is_there(path)] == []


@pages
def test_modules_that_are_run_are_there(page: Path) -> None:
    missing = []
    for module in _MODULE.findall(text_of(page)):
        place = ROOT / module.replace(".", "/")
        if not place.with_suffix(".py").exists() and not (place / "__main__.py").exists():
            missing.append(module)
    assert missing == []


@pages
def test_targets_of_make_are_there(page: Path) -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    shown = [*code(page), *(line for _, body in fences(page) for line in body.split("\n"))]
    asked = {match[1] for line in shown if (match := re.match(r"make ([a-z-]+)", line))}
    assert asked <= known


def test_every_page_is_in_the_table_of_contents() -> None:
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} == set(links(DOCS / "index.md"))


# --- Flags --------------------------------------------------------------------------------------------------


@cache
def known_flags() -> frozenset[str]:
    """Of `motet serve` and of all other programs of ours."""
    fields = {
        name.replace("_", "-"): field for name, field in Settings.model_fields.items() if name != "model"
    }
    switches = {f"--no-{name}" for name, field in fields.items() if field.annotation is bool}
    return frozenset({"--help", *switches, *(f"--{name}" for name in fields), *_flags_of_commands()})


def _flags_of_commands() -> Iterator[str]:
    for path in COMMANDS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"), path)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                words = (word.value for word in node.args if isinstance(word, ast.Constant))
                yield from (word for word in words if isinstance(word, str) and word.startswith("--"))


def is_foreign(command: str) -> bool:
    """Whether another program is called, as far as the first word tells."""
    words = [word for word in command.split() if not re.fullmatch(r"[$#]|\w+=\S*", word)]
    return bool(words) and FOREIGN.fullmatch(words[0].rpartition("/")[2]) is not None


def own_words(page: Path) -> Iterator[str]:
    """All that is said about our own flags, piece by piece."""
    for _, body in fences(page):
        yield from (line for line in body.replace("\\\n", " ").split("\n") if not is_foreign(line))
    text = prose(page)
    if page == COMING_FROM:
        for header, rows in tables(page):
            place = header.index("Motet")
            yield from (row[place] for row in rows)
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    yield _CODE.sub(lambda match: "" if is_foreign(match[1]) else match[1], text)


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The header and the rows of each."""
    for block in re.findall(r"(?:^\|.*\n)+", prose(page), re.M):
        header, _, *rows = (_cells(line) for line in block.splitlines())
        yield header, rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in _CELL.split(line.strip())[1:-1]]


@pages
def test_flags_exist(page: Path) -> None:
    named = {flag for words in own_words(page) for flag in _FLAG.findall(words)}
    assert sorted(named - known_flags() - FOREIGN_FLAGS) == []


def test_tables_about_other_servers_say_which_column_is_ours() -> None:
    found = list(tables(COMING_FROM))
    assert len(found) > 8
    for header, rows in found:
        assert header.count("Motet") == 1
        assert {len(row) for row in rows} == {len(header)}


def test_variables_are_those_of_flags() -> None:
    known = {f"MOTET_{name.upper()}" for name in Settings.model_fields} | {"MOTET_URL", "MOTET_BASE_URL"}
    named = {name for page in PAGES for name in re.findall(r"\bMOTET_[A-Z_]*[A-Z]\b", text_of(page))}
    assert sorted(named - known) == []


# --- Metrics ------------------------------------------------------------------------------------------------


@cache
def told_metrics() -> frozenset[str]:
    """All names that may stand at /metrics."""
    metrics = Metrics("model", block_size=16, max_lora=8, is_accelerated=False)
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics.snapshot().render("")[0].decode(), re.M):
        names.add(name)
        if kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")}
    return frozenset(names)


@pages
def test_metrics_exist(page: Path) -> None:
    assert sorted(set(_METRIC.findall(text_of(page))) - told_metrics()) == []
