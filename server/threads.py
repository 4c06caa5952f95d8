"""The threads of a serving process, beside the event loop's.

One computes: it loads the model and then is the engine's. Two read adapters, apart from the pool, so that
slow files do not keep prompts from being tokenised. The pool does what would hold up the event loop for more
than a millisecond. What waits for other machines has threads of its own, so that nobody else waits with it:
more than may fetch at once, because whether an adapter may be used is asked for every request.
"""

from concurrent.futures import ThreadPoolExecutor

NUM_LOADERS = 2
POOL_THREADS = 4
NUM_FETCHERS = 20


class Threads:
    """Made once, closed once."""

    def __init__(self) -> None:
        self.engine = ThreadPoolExecutor(1, thread_name_prefix="motet-engine")
        self.loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="motet-loader")
        self.pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="motet-pool")
        self.fetchers = ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="motet-fetcher")

    def close(self) -> None:
        """Blocks until what runs has ended; what has not begun never will."""
        for executor in (self.engine, self.loaders, self.pool, self.fetchers):
            executor.shutdown(cancel_futures=True)
