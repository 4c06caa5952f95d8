"""The threads of a serving process, beside the event loop's.

One computes: it loads the model and then is the engine's. Two read adapters, apart from the pool, so that
slow files do not keep prompts from being tokenised. The pool does what would hold up the event loop for more
than a millisecond. What waits for other machines has threads of its own, so that nobody else waits with it;
and who only asks whether an adapter may be used does not wait for those who fetch one. The last one waits for
changes in the adapters folder.
"""

from concurrent.futures import ThreadPoolExecutor

NUM_LOADERS = 2
POOL_THREADS = 4
NUM_ASKERS = 16
NUM_FETCHERS = 4


class Threads:
    """Made once, closed once."""

    def __init__(self) -> None:
        self.engine = ThreadPoolExecutor(1, thread_name_prefix="motet-engine")
        self.loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="motet-loader")
        self.pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="motet-pool")
        self.askers = ThreadPoolExecutor(NUM_ASKERS, thread_name_prefix="motet-asker")
        self.fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="motet-fetcher")
        self.watcher = ThreadPoolExecutor(1, thread_name_prefix="motet-watcher")

    def close(self) -> None:
        """Blocks until what runs has ended; what has not begun never will."""
        remote = (self.askers, self.fetchers)
        for executor in (self.engine, self.loaders, self.pool, *remote, self.watcher):
            executor.shutdown(cancel_futures=True)
