"""What clients do with responses that have ended: read them, list what went into them, delete them.

A response is there from its last event on, for the key that made it and no other: anything else is 404, so
that an id says nothing about whether it exists. There is nothing to cancel, because every response belongs to
a request that waits for it: whoever wants to stop it closes that.
"""

from server.api.http import Endpoint, Exchange
from server.api.responses.conversations import Item, KeptResponse
from server.api.responses.wish import check_include
from server.api.shapes import long_json_text, to_json
from server.api.state import ServerState
from server.errors import BadRequest, ResponseNotFound

_USUAL_ITEMS, _MOST_ITEMS = 20, 100


def response_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/responses/{id}`"""

    async def endpoint(exchange: Exchange) -> None:
        query = _query(exchange)
        if query.get("stream", "false") != "false":
            raise BadRequest("stream is not supported here: this response has ended", param="stream")
        await exchange.answer(_kept(state, exchange).body)

    return endpoint


def delete_response_endpoint(state: ServerState) -> Endpoint:
    """`DELETE /v1/responses/{id}`"""

    async def endpoint(exchange: Exchange) -> None:
        id = exchange.path_param("id")
        if not state.responses.delete(exchange.caller.digest, id):
            raise _not_found()
        await exchange.answer(to_json({"id": id, "object": "response", "deleted": True}))

    return endpoint


def cancel_response_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/responses/{id}/cancel`"""

    async def endpoint(exchange: Exchange) -> None:
        _kept(state, exchange)
        raise BadRequest("only background responses can be cancelled, and this server makes none", param="id")

    return endpoint


def input_items_endpoint(state: ServerState) -> Endpoint:
    """`GET /v1/responses/{id}/input_items`: the conversation that the model was given, newest first."""

    async def endpoint(exchange: Exchange) -> None:
        query = _query(exchange)
        inputs = _kept(state, exchange).inputs
        page, has_more = _page(inputs, query)
        await exchange.answer(
            long_json_text(
                {
                    "object": "list",
                    "data": [item.to_json() for item in page],
                    "first_id": page[0].id if page else None,
                    "last_id": page[-1].id if page else None,
                    "has_more": has_more,
                }
            ).encode("ascii")
        )

    return endpoint


def _kept(state: ServerState, exchange: Exchange) -> KeptResponse:
    kept = state.responses.get(exchange.caller.digest, exchange.path_param("id"))
    if kept is None:
        raise _not_found()
    return kept


def _not_found() -> ResponseNotFound:
    return ResponseNotFound("there is no response with this id", param="id")


def _query(exchange: Exchange) -> dict[str, str]:
    """The last value of each name. Raises: BadRequest for what is known and not served."""
    query = exchange.query()
    check_include([value for name, value in query if name in ("include", "include[]")])
    return dict(query)


def _page(items: tuple[Item, ...], query: dict[str, str]) -> tuple[tuple[Item, ...], bool]:
    """As `order`, `after` and `limit` say, and whether there are more. Raises: BadRequest."""
    order, limit = query.get("order", "desc"), query.get("limit", str(_USUAL_ITEMS))
    if order not in ("asc", "desc"):
        raise BadRequest("order: input should be 'asc' or 'desc'", param="order")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= _MOST_ITEMS):
        raise BadRequest(f"limit: input should be a number from 1 to {_MOST_ITEMS}", param="limit")
    ordered = items if order == "asc" else items[::-1]
    start = 0
    if (after := query.get("after")) is not None:
        start = 1 + next((i for i, item in enumerate(ordered) if item.id == after), len(ordered))
        if start > len(ordered):
            raise BadRequest("after: there is no such item", param="after")
    return ordered[start : start + int(limit)], len(ordered) > start + int(limit)
