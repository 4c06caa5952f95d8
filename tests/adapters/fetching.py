"""What the tests of all remote sources do in the same way."""

import threading
from collections.abc import Callable
from pathlib import Path

from adapters.sources.hub import HubSource
from adapters.sources.limits import Deadline
from adapters.sources.s3 import S3Source
from tests.adapters.faulty_http import LIMIT_S, FaultyServer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 2**20
Source = HubSource | S3Source


def stored(folder: Path) -> list[Path]:
    """Every file of the cache that belongs to a version, whole or not."""
    return [
        path
        for part in ("versions", "partial", "trash")
        for path in (folder / "cache" / part).rglob("*")
        if path.is_file()
    ]


def let_time_begin_when_stalled(source: Source, server: FaultyServer) -> None:
    """The time of its fetches stands still until the server has stalled, and is over from then on.

    However slow the machine is, no limit is reached before that.
    """

    def clock() -> float:
        return 10.0 * LIMIT_S * server.stalled.is_set()

    source._http.deadline = lambda seconds: Deadline(seconds, clock)  # type: ignore[method-assign]


def fetch_beside_a_stalled_one(
    first: Source, second: Source, server: FaultyServer, fetch: Callable[[Source], Path]
) -> list[Path]:
    """What both have got: the second comes to the shared cache while the first one's download is stalled,
    which goes on then.
    """
    found: list[Path] = []
    is_there = threading.Event()
    obtain = second._cache.obtain

    def noted(key: str, num_bytes: int, deadline: Deadline, fill: Callable[[Path], None]) -> Path:
        is_there.set()
        return obtain(key, num_bytes, deadline, fill)

    second._cache.obtain = noted  # type: ignore[method-assign]
    threads = [
        threading.Thread(target=lambda source=source: found.append(fetch(source)))
        for source in (first, second)
    ]
    threads[0].start()
    assert server.stalled.wait(LIMIT_S)
    threads[1].start()
    assert is_there.wait(LIMIT_S)
    server.released.set()
    for thread in threads:
        thread.join()
    return found
