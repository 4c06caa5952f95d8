"""The threads of a serving process, beside the event loop's.

One computes: it loads the model and then is the engine's. Two read adapters, apart from the pool, so that
slow files do not keep prompts from being tokenised. The pool does what would hold up the event loop for more
than a millisecond. What waits for other machines has threads of its own, so that nobody else waits with it;
and who only asks whether an adapter may be used does not wait for those who fetch one. The last one waits for
changes in the adapters folder.

Loaders must not be felt in a running stream, and there are three things that they share with the engine:

    cores        a loader steps back: where engine and loader want one core, the engine gets nine tenths of
                 it and more. All threads of a step wait for the slowest, and who loses a core loses it for a
                 whole tick of the scheduler (4 ms are usual).
    interpreter  of what a loader does for long (reading, hashing, converting) nothing holds the interpreter
                 lock, and it does it in few calls: see `adapters.conversion`. Where it holds the lock the
                 engine waits for it, whatever their priorities; a loader that lost its core meanwhile gets
                 the one that the engine does not use then.
    memory       numbers are converted in slices that stay in a core's cache: what moves through memory is
                 the file once and the adapter once.
"""

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)

NUM_LOADERS = 2
POOL_THREADS = 4
NUM_ASKERS = 16
NUM_FETCHERS = 4

_LOADER_NICENESS = 10
"""Added to the process's own. The weight of such a thread is a ninth of the engine's: enough to make progress
when all cores are busy, which 19 (a seventieth) is not: an adapter takes some tens of milliseconds of a core.
Niceness counts inside one session or control group, which the threads of a process share."""


class Threads:
    """Made once, closed once."""

    def __init__(self) -> None:
        self.engine = ThreadPoolExecutor(1, thread_name_prefix="motet-engine")
        self.loaders = ThreadPoolExecutor(
            NUM_LOADERS, thread_name_prefix="motet-loader", initializer=_step_back
        )
        self.pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="motet-pool")
        self.askers = ThreadPoolExecutor(NUM_ASKERS, thread_name_prefix="motet-asker")
        self.fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="motet-fetcher")
        self.watcher = ThreadPoolExecutor(1, thread_name_prefix="motet-watcher")

    def close(self) -> None:
        """Blocks until what runs has ended; what has not begun never will."""
        remote = (self.askers, self.fetchers)
        for executor in (self.engine, self.loaders, self.pool, *remote, self.watcher):
            executor.shutdown(cancel_futures=True)


def _step_back() -> None:
    """Give the calling thread a lower priority, where the system has one for threads and lets us."""
    if sys.platform != "linux":
        return  # elsewhere niceness is the whole process's
    thread = threading.get_native_id()
    try:
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness + _LOADER_NICENESS))
    except OSError as error:
        logger.warning("adapters are read at the engine's priority: %s", error.strerror)
