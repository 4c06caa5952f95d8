"""Which adapters there are: a page of them, or one. For every key, as far as it may know of them.

A server may have thousands, and somebody types letters into a search box: so there are pages, and what is
looked for is looked for here. A page goes on after a name, whether an adapter still has that name or not.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

from adapters.types import AdapterInfo
from server.api.access import usable_adapters
from server.api.adapters.query import number, text, truth
from server.api.adapters.records import record_of
from server.api.caller import Caller
from server.api.http import Endpoint, Exchange
from server.api.names import adapter_name
from server.api.ports import Service
from server.api.shapes import long_json_text, to_json
from server.api.state import ServerState
from server.errors import ModelNotFound, ServeError

USUAL_LIMIT, MAX_LIMIT = 100, 1000
_MAX_TEXT_CHARS = 256
_INLINE_ITEMS = 100  # are written in well below a millisecond


def list_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/adapters`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        query = dict(exchange.query())
        limit = int(number(query, "limit", USUAL_LIMIT, 1, MAX_LIMIT, is_whole=True))
        prefix, search = text(query, "prefix", _MAX_TEXT_CHARS), text(query, "search", _MAX_TEXT_CHARS)
        after = text(query, "after", _MAX_TEXT_CHARS)
        is_broken = truth(query, "broken")
        known = _broken(service, exchange.caller) if is_broken else usable_adapters(service, exchange.caller)
        matches = _matches(known, prefix, search)
        start = bisect_right(matches, after, key=_name) if after else 0
        page = [_name(info) for info in matches[start : start + limit]]
        resident = service.resident
        statuses = (service.registry.status(name) for name in page)
        body: dict[str, object] = {
            "object": "list",
            "data": [record_of(status, service, resident) for status in statuses if status is not None],
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
            "has_more": len(matches) > start + limit,
            "total": len(matches),
        }
        await answer_list(exchange, service, body)

    return endpoint


def one_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/adapters/{id}`, where an id may hold slashes. Also tells why a broken one is not listed."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        asked = exchange.path_param("id")
        name = adapter_name(asked, service)
        if service.registry.status(name) is None or not exchange.caller.may_use(name):
            raise no_adapter(asked)
        await answer_record(exchange, service, name)

    return endpoint


async def answer_list(exchange: Exchange, service: Service, body: dict[str, object]) -> None:
    """Answer with a list that may be long; then it is written in the pool."""
    items = body["data"]
    assert isinstance(items, list)
    if len(items) <= _INLINE_ITEMS:
        await exchange.answer(to_json(body))
        return
    written = await asyncio.get_running_loop().run_in_executor(service.pool, long_json_text, body)
    await exchange.answer(written.encode("ascii"))


async def answer_record(exchange: Exchange, service: Service, name: str, *, status: int = 200) -> None:
    """Answer with what is known of an adapter. Raises: ModelNotFound if it has gone."""
    known = service.registry.status(name)
    if known is None:
        raise no_adapter(name)
    await exchange.answer(to_json(record_of(known, service, service.resident)), status=status)


def no_adapter(name: str) -> ServeError:
    """What is said of a name that no adapter has, or none that the caller may know of."""
    return ModelNotFound(f"The adapter `{name}` does not exist.", param="id")


def _broken(service: Service, caller: Caller) -> tuple[AdapterInfo, ...]:
    """Those whose files could not be read the last time; some are served as they were before."""
    broken = (status.info for status in service.registry.statuses() if status.error is not None)
    return tuple(info for info in broken if caller.may_use(info.ref.name))


def _matches(known: Sequence[AdapterInfo], prefix: str, search: str) -> Sequence[AdapterInfo]:
    if not prefix and not search:
        return known
    wanted = search.casefold()
    return [info for info in known if _name(info).startswith(prefix) and wanted in _name(info).casefold()]


def _name(info: AdapterInfo) -> str:
    return info.ref.name
