"""From a body with an adapter's files to a registered adapter, or to nothing at all.

    body ──> staged folder ──> checked (in the loaders) ──> its name, by one rename ──> registered
      └────────────┴────────────────────┴──────────────── any failure: as it was before ──┘

Until the rename nobody can see the adapter, and what is renamed has passed every check that a load makes.
Bytes are never collected in memory: a megabyte at a time goes to the pool.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapters.errors import AdapterError, AdapterInvalid
from adapters.names import shown
from adapters.types import AdapterInfo, Revision
from adapters.uploads import UploadRoot, check_upload_name, discard
from server.api.adapters.form import FormReader
from server.api.ports import Registry
from server.errors import Overloaded, Unavailable

log = logging.getLogger("motet.api")

_PIECE_BYTES = 2**20
_MOST_AT_ONCE = 4
_RETRY_AFTER_S = 30

T = TypeVar("T")

ReadPart = Callable[[], Awaitable[tuple[bytes, bool]]]
"""The next part of a body, and whether there is more."""


@dataclass(frozen=True, slots=True)
class UploadWish:
    """What a form asks for beside its files."""

    name: str
    pin: bool = False
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of an upload."""

    info: AdapterInfo
    is_new: bool  # False: the same content had the name already


class Uploads:
    """Belongs to the event loop."""

    def __init__(
        self,
        root: UploadRoot,
        check: Callable[[Path], Revision],
        *,
        loaders: Executor,
        pool: Executor,
        max_bytes: int,
        is_adapters_dir: bool = False,
    ) -> None:
        """`check` runs in `loaders` and raises AdapterError; `max_bytes`: of one body. `is_adapters_dir`:
        names are found in the folder anyway.
        """
        self._root = root
        self._check = check
        self._loaders = loaders
        self._pool = pool
        self.max_bytes = max_bytes
        self._is_adapters_dir = is_adapters_dir
        self._num_running = 0
        self._naming = asyncio.Lock()  # folders get and lose their names one at a time

    async def receive(
        self,
        read_part: ReadPart,
        content_type: str | None,
        registry: Registry,
        read_values: Callable[[Mapping[str, str]], UploadWish],
    ) -> Sent:
        """Read the form and register what is in it. `read_values` raises ServeError.

        Raises: ServeError; AdapterError if the files cannot be served, or the name has other content.
        """
        if self._num_running >= _MOST_AT_ONCE:
            raise Overloaded(
                f"{_MOST_AT_ONCE} uploads are running; try again later", retry_after_s=_RETRY_AFTER_S
            )
        self._num_running += 1
        try:
            async with self._staged(content_type) as (staged, reader):
                await self._read(read_part, reader)
                wish = read_values(await self._in_pool(reader.finish))
                check_upload_name(wish.name)
                revision = await self._checked(staged)
                async with self._naming:
                    return await self._name(registry, staged, wish, revision)
        except OSError as error:
            log.warning("an upload could not be stored: %s", type(error).__name__)
            raise Unavailable("the upload cannot be stored now", retry_after_s=_RETRY_AFTER_S) from error
        finally:
            self._num_running -= 1

    async def remove(self, name: str) -> bool:
        """Whether an adapter of this name had been sent; its files are gone then."""
        async with self._naming:
            return await self._in_pool(lambda: self._root.remove(name))

    @asynccontextmanager
    async def _staged(self, content_type: str | None) -> AsyncIterator[tuple[Path, FormReader]]:
        """A folder to fill, and what fills it. Whatever has not got a name by the end is gone after it."""
        staged = await self._in_pool(self._root.stage)
        reader: FormReader | None = None
        try:
            reader = FormReader(content_type, staged, self.max_bytes)
            yield staged, reader
        finally:
            await self._in_pool(lambda: _clear(staged, reader))

    async def _read(self, read_part: ReadPart, reader: FormReader) -> None:
        piece, has_more = bytearray(), True
        while has_more:
            part, has_more = await read_part()
            piece += part
            if len(piece) >= _PIECE_BYTES or not has_more:
                await self._in_pool(partial(reader.feed, bytes(piece)))
                piece.clear()

    async def _name(self, registry: Registry, staged: Path, wish: UploadWish, revision: Revision) -> Sent:
        """Give the folder its name and register it: both or neither."""
        name = wish.name
        known = registry.get(name)
        there = known.revision if known is not None and known.revision else await self._revision_there(name)
        if known is not None and there == revision:
            return Sent(registry.pin(name) if wish.pin else known, is_new=False)
        is_other = there not in (None, revision) or (known is not None and there is None)
        if is_other and not wish.replace:
            raise AdapterInvalid(f"adapter {shown(name)} has other content; replace would change that")
        published = await self._in_pool(lambda: self._root.publish(staged, name))
        try:
            info = await self._register(registry, name, published.folder, is_pinned=wish.pin)
        except BaseException:
            await self._in_pool(published.roll_back)
            raise
        await self._in_pool(published.keep)
        return Sent(info, is_new=True)

    async def _register(self, registry: Registry, name: str, folder: Path, *, is_pinned: bool) -> AdapterInfo:
        if self._is_adapters_dir:
            return await registry.adopt(name, load_inplace=True, is_pinned=is_pinned)
        return await registry.register(name, folder, source="upload", load_inplace=True, is_pinned=is_pinned)

    async def _revision_there(self, name: str) -> Revision | None:
        """What a folder that was sent under this name holds, although no adapter is registered under it."""
        folder = await self._in_pool(lambda: self._root.find(name))
        if folder is None:
            return None
        try:
            return await self._checked(folder)
        except AdapterError:
            return None  # of no use to anybody

    async def _checked(self, folder: Path) -> Revision:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, self._check, folder)

    async def _in_pool(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _clear(staged: Path, reader: FormReader | None) -> None:
    if reader is not None:
        reader.close()
    discard(staged)
