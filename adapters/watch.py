"""Scanning the adapters folder whenever something happens in it, and now and then anyway.

    kernel ── events ──> a thread of watchfiles ──> `happened` ──┐
                                     timer, by what a look costs ┴──> scan

The folder itself is watched, so that what appears, goes or is renamed is seen at once, and its sub-folders if
they are few. Not many, and none recursively: setting up thousands of watches holds the interpreter's lock for
tens of milliseconds, and following a link to a large tree holds it for seconds. What no event tells (a change
inside one of many folders, a network file system) the timer finds: seldom, for an idle server should be idle,
and a look at 64 folders takes 5 ms.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from watchfiles import watch

from adapters.scan import AdaptersFolder

logger = logging.getLogger(__name__)

_MAX_INNER = 256  # sub-folders, 3 ms to set up; if there are more, none of them is watched
_QUIET_MS = 100  # without a change, before a scan; as long as it takes to copy the next file
_LONGEST_MS = 1000  # that a scan waits for the quiet
_TICK_MS = 500  # after which the watcher says that it is there
_SHORTEST_S, _LONGEST_S = 2.0, 60.0  # between two looks without an event
_SHARE = 0.0005  # of a processor, for looks without an event
_REST = 10  # times what a look took, before the next: a storm of events costs a tenth of a processor


class AdapterWatch:
    """Belongs to the event loop."""

    def __init__(
        self, folder: AdaptersFolder, thread: Executor, *, on_scanned: Callable[[], None] | None = None
    ) -> None:
        """`thread` is busy for as long as this runs."""
        self.has_scanned = asyncio.Event()
        """Whether everything that was there at the start is registered."""
        self._folder = folder
        self._thread = thread
        self._on_scanned = on_scanned
        self._happened = asyncio.Event()
        self._watched: tuple[Path, ...] = ()
        self._end = threading.Event()
        self._has_complained = False

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._happened.clear()
                await self._folder.scan()
                self.has_scanned.set()
                if self._on_scanned is not None:
                    self._on_scanned()
                self._watch_what_is_there()
                await asyncio.sleep(self._folder.look_seconds * _REST)
                pause = self._folder.look_seconds / _SHARE
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_LONGEST_S, max(_SHORTEST_S, pause))):
                        await self._happened.wait()
        finally:
            self._end.set()

    def _watch_what_is_there(self) -> None:
        """Have the right folders watched. A new watcher first says that it is there: what happened before is
        found by the scan that follows.
        """
        root, names = self._folder.folder, self._folder.names
        wanted = (root, *(root / name for name in names)) if len(names) <= _MAX_INNER else (root,)
        if wanted == self._watched:
            return
        self._end.set()
        self._end, self._watched = threading.Event(), wanted
        loop = asyncio.get_running_loop()
        watching = loop.run_in_executor(self._thread, self._watch, wanted, self._end, loop)
        watching.add_done_callback(self._ended)

    def _watch(
        self, folders: tuple[Path, ...], end: threading.Event, loop: asyncio.AbstractEventLoop
    ) -> None:
        """In the thread."""
        is_new = True
        for changes in watch(
            *folders,
            watch_filter=None,
            debounce=_LONGEST_MS,
            step=_QUIET_MS,
            stop_event=end,
            rust_timeout=_TICK_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            force_polling=False,
            recursive=False,
            ignore_permission_denied=True,
        ):
            if end.is_set():
                return  # the loop may be closed by now
            if changes or is_new:
                loop.call_soon_threadsafe(self._happened.set)
            is_new = False

    def _ended(self, watching: "asyncio.Future[None]") -> None:
        """A kernel that has no watches left, or no folder any more: then the timer is what there is."""
        if watching.cancelled() or (error := watching.exception()) is None or self._has_complained:
            return
        self._has_complained = True
        logger.warning("the adapters folder cannot be watched and is looked at now and then: %s", error)
