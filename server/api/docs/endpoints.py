"""`/openapi.json`: what is said there is made once, when it is first asked for, in every phase."""

import asyncio
import functools
from collections.abc import Callable, Sequence

from starlette.routing import Route

from server.api.docs.document import Table, document
from server.api.docs.operations import Chapter
from server.api.http import Endpoint, Exchange, Resource
from server.api.pages import NO_CACHE
from server.api.shapes import to_json
from server.api.state import ServerState


def table_of(routes: Sequence[Route]) -> Table:
    """Paths and methods of the routes."""
    table: list[tuple[str, tuple[str, ...]]] = []
    for route in routes:
        assert isinstance(route.endpoint, Resource), f"{route.path} is no Resource"
        table.append((route.path, route.endpoint.methods))
    return table


def document_endpoint(
    state: ServerState, table: Callable[[], Table], chapters: Sequence[Chapter]
) -> Endpoint:
    """`GET /openapi.json`"""

    def write() -> bytes:
        asks_for_key = state.options.asks_for_key
        return to_json(document(table(), chapters, version=state.version, asks_for_key=asks_for_key))

    made = functools.cache(write)

    async def endpoint(exchange: Exchange) -> None:
        await exchange.answer(await asyncio.to_thread(made), headers=[NO_CACHE])

    return endpoint
