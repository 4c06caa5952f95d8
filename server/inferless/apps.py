"""All Inferless apps of a server, by name. An app's name is that of its folder."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from adapters.types import Clock
from server.inferless.worker import AppLimits, AppState, AppSurroundings, AppWorker

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - replaced, not bound


class AppsError(Exception):
    """A folder cannot be an app; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class AppsOptions:
    """What the apps share."""

    base_url: str = ""  # of the server they belong to
    api_key: str | None = None
    output_dir: Path | None = None  # what an app prints goes to NAME.log in it; None: nowhere
    limits: AppLimits = field(default_factory=AppLimits)


class Apps:
    """Made and used on the event loop."""

    def __init__(
        self, folders: Sequence[Path] = (), options: AppsOptions | None = None, clock: Clock = time.monotonic
    ) -> None:
        """Raises: AppsError."""
        self._options = options or AppsOptions()
        self._workers: dict[str, AppWorker] = {}
        for folder in folders:
            name = _name_of(folder)
            if name in self._workers:
                raise AppsError(f"two folders are called {name}: an app has its name from its folder")
            self._workers[name] = AppWorker(
                name, folder.resolve(), self._surroundings(name), self._options.limits, clock
            )

    def start(self) -> None:
        """Start them all; returns at once."""
        for worker in self:
            worker.start()

    def __iter__(self) -> Iterator[AppWorker]:
        """By name."""
        return iter(sorted(self._workers.values(), key=lambda worker: worker.name))

    def get(self, name: str) -> AppWorker | None:
        return self._workers.get(name)

    @property
    def are_ready(self) -> bool:
        """Whether every app that has not been unloaded takes requests."""
        return all(worker.state in (AppState.READY, AppState.STOPPED) for worker in self)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the others end, after `timeout_s` by force."""
        await asyncio.gather(*(worker.drain(timeout_s) for worker in self))

    async def close(self) -> None:
        """Finalize the apps and end their processes."""
        await asyncio.gather(*(worker.stop(0) for worker in self))

    def _surroundings(self, name: str) -> AppSurroundings:
        environment = {"MOTET_BASE_URL": self._options.base_url}
        if self._options.api_key is not None:
            environment["MOTET_API_KEY"] = self._options.api_key
        output_dir = self._options.output_dir
        return AppSurroundings(environment, None if output_dir is None else output_dir / f"{name}.log")


def reachable(address: str) -> str:
    """The address by which a program on this machine reaches a server that listens on `address`."""
    parts = urlsplit(address)
    host = _WILDCARDS.get(parts.hostname or "")
    return address if host is None else urlunsplit(parts._replace(netloc=f"{host}:{parts.port}"))


def _name_of(folder: Path) -> str:
    if not (folder / "app.py").is_file():
        raise AppsError(f"--inferless-app {folder}: there is no app.py in it")
    name = folder.resolve().name
    if not name.isprintable():
        raise AppsError(f"--inferless-app {folder}: the folder's name cannot be printed")
    return name
