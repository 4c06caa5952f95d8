"""A real server in a process of its own with the embedded model: what end-to-end tests talk to."""

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.e2e.browsing import Site, serve_site
from tests.e2e.running import RunningServer, start
from tests.nursery import Nursery


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The embedded model with its adapters, shared by all tests that leave it as they found it."""
    running = start(nursery=None)
    yield running
    assert running.stop() == 0, "\n".join(running.lines)


@pytest.fixture
def launch(nursery: Nursery) -> Iterator[Callable[..., RunningServer]]:
    """Start servers of one's own; whatever still runs at the end of the test is killed."""
    started: list[RunningServer] = []

    def launch_one(*flags: str, **options: object) -> RunningServer:
        running = start(*flags, **{"nursery": nursery, **options})  # type: ignore[arg-type]
        started.append(running)
        return running

    yield launch_one
    for running in started:
        running.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # of a busy machine
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A web site of another origin."""
    with serve_site() as there:
        yield there
