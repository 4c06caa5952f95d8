"""The threads of a serving process, beside the event loop's.

One computes: it loads the model and then is the engine's. Two read adapters, apart from the pool, so that
slow files do not keep prompts from being tokenised; others fetch adapters from elsewhere, apart from both,
because that takes as long as it takes. One waits for changes in the adapters folder. The pool does what would
hold up the event loop for more than a millisecond.
"""

from concurrent.futures import ThreadPoolExecutor

NUM_LOADERS = 2
NUM_FETCHERS = 8
POOL_THREADS = 4


class Threads:
    """Made once, closed once."""

    def __init__(self) -> None:
        self.engine = ThreadPoolExecutor(1, thread_name_prefix="motet-engine")
        self.loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="motet-loader")
        self.fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="motet-fetcher")
        self.watcher = ThreadPoolExecutor(1, thread_name_prefix="motet-watcher")
        self.pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="motet-pool")

    def close(self) -> None:
        """Blocks until what runs has ended; what has not begun never will."""
        for executor in (self.engine, self.loaders, self.fetchers, self.watcher, self.pool):
            executor.shutdown(cancel_futures=True)
