"""What lies in the adapters folder, compared with what lay there at the last look.

A look only asks for the signatures of the folder's sub-folders, in the pool; of what is as it was nothing is
read. A folder that is new or changed is offered to the registry. One that cannot be taken may be half
written: nothing is said about it before the next look finds it unchanged.
"""

import asyncio
import logging
import os
import stat
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterError, AdapterUnavailable
from adapters.names import shown
from adapters.origins import Sign, Source
from adapters.registry import AdapterRegistry
from adapters.signature import Signature, sign
from adapters.types import Clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One sub-folder."""

    signature: Signature
    is_taken: bool  # else it is offered again at the next look


class AdaptersFolder:
    """Belongs to the event loop; one scan at a time."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        registry: AdapterRegistry,
        pool: Executor,
        *,
        sign: Sign = sign,
        clock: Clock = time.monotonic,
    ) -> None:
        """`source` lists the sub-folders of `folder`."""
        self.folder = folder.resolve()
        self.names: tuple[str, ...] = ()
        """As of the last look."""
        self.look_seconds = 0.0
        """What the last look took."""
        self._source = source
        self._registry = registry
        self._pool = pool
        self._sign = sign
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._is_first = True

    async def scan(self) -> None:
        """Register what is new, reload what has changed, forget what is gone. Never raises AdapterError.

        One after the other, so that the loaders stay free for requests; these find what the scan has not
        reached.
        """
        known = tuple(self._seen)
        loop = asyncio.get_running_loop()
        found, gone = await loop.run_in_executor(self._pool, self._look, known)
        for name in gone:
            del self._seen[name]
            await self._offer(name, is_settled=False)
        num_taken = 0
        for name, signature in found.items():
            seen = self._seen.get(name)
            is_same = seen is not None and seen.signature == signature
            if seen is None or not is_same or not seen.is_taken:
                is_settled = is_same or self._is_first
                is_taken = await self._offer(name, is_settled=is_settled)
                self._seen[name] = _Seen(signature, is_taken)
                num_taken += is_taken
        self.names = tuple(found)
        if num_taken or gone:
            logger.info(
                "adapters folder: %d new or changed, %d gone, %d in all", num_taken, len(gone), len(found)
            )
        if self._is_first:
            self._is_first = False
            await self._registry.warm()

    async def _offer(self, name: str, *, is_settled: bool) -> bool:
        """Whether the registry has taken it, or has a reason that lasts not to."""
        try:
            await self._registry.refresh(name, is_settled=is_settled)
        except AdapterUnavailable:
            return False
        except AdapterError as error:
            if is_settled and self._registry.status(name) is None:
                logger.warning("adapter %s: left out: %s", shown(name), error.message)
            return is_settled
        return True

    def _look(self, known: tuple[str, ...]) -> tuple[dict[str, Signature], list[str]]:
        """In the pool. What is there, and which of the known ones are gone. A file system that fails for a
        moment makes nothing look gone, nor changed.
        """
        begun = self._clock()
        found: dict[str, Signature] = {}
        for name in self._source.names():
            try:
                found[name] = self._sign(self.folder / name)
            except OSError:
                continue
        gone = [name for name in known if name not in found and self._is_gone(name)]
        self.look_seconds = self._clock() - begun
        return found, gone

    def _is_gone(self, name: str) -> bool:
        try:
            return not stat.S_ISDIR(os.stat(self.folder / name).st_mode)
        except FileNotFoundError:
            return self.folder.is_dir()
        except OSError:
            return False
