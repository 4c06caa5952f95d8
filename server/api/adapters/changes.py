"""Adding, removing and pinning adapters. For those who run the server: see `for_own_programs`.

`POST` takes JSON that says where an adapter is, or a form with its files, and answers when requests can use
it. `DELETE` says what it freed: the adapter's name is unknown from the first moment on, requests that run go
on to their end, and with `force` only for `wait` seconds. Every protocol that loads or unloads does it here.
"""

from collections.abc import Mapping

from adapters.errors import AdapterError
from server.api.adapters.lists import answer_record, no_adapter
from server.api.adapters.query import number, truth
from server.api.adapters.schema import AddBody
from server.api.adapters.uploads import Sent, UploadWish
from server.api.generation import read_json
from server.api.http import Endpoint, Exchange
from server.api.json_body import check_json_type
from server.api.names import adapter_name
from server.api.ports import Service
from server.api.schema import validate
from server.api.shapes import to_json
from server.api.state import ServerState
from server.engine.refusals import refusal_of
from server.errors import BadRequest, PayloadTooLarge, ServeError, Unavailable

MAX_WAIT_S = 3600.0
_RETRY_AFTER_S = 5


def add_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/adapters`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        content_type = exchange.header(b"content-type")
        if (content_type or "").partition(";")[0].strip().lower() == "multipart/form-data":
            sent = await _receive(state, service, exchange)
            name, is_new = sent.info.ref.name, sent.is_new
        else:
            check_json_type(content_type)
            raw = await exchange.read_body(state.options.max_body_bytes)
            body = await read_json(service, raw, lambda value: validate(AddBody, value))
            name, is_new = body.name, await _add(service, body)
        await answer_record(exchange, service, name, status=201 if is_new else 200)

    return endpoint


async def _add(service: Service, body: AddBody) -> bool:
    """Whether the name means something else than before. Raises: ServeError."""
    check_new_name(body.name, service, "name")
    before = service.registry.get(body.name)
    _check_place(body)
    if body.path is not None:
        await load_adapter(
            service,
            body.name,
            body.path,
            replace=bool(body.replace),
            is_pinned=bool(body.pin),
            param="path",
        )
    elif body.location is not None:
        await load_adapter(
            service,
            body.name,
            body.location if body.revision is None else f"{body.location}@{body.revision}",
            source=body.source,
            token=body.token,
            replace=bool(body.replace),
            is_pinned=bool(body.pin),
            param="location",
        )
    else:
        await _find(service, body.name, "name", is_pinned=bool(body.pin))
    after = service.registry.get(body.name)
    return before is None or after is None or before.ref != after.ref


def _check_place(body: AddBody) -> None:
    """Raises: BadRequest for two places, and for what says more about a location where none is given."""
    if body.path is not None and body.location is not None:
        raise BadRequest("path and location are two places: give one of them", param="path")
    if body.location is not None or (body.path is not None and body.source == "local"):
        return
    for name in ("source", "revision", "token"):
        if getattr(body, name) is not None:
            raise BadRequest(f"{name} is for a location, and none is given", param=name)


async def _find(service: Service, name: str, param: str, *, is_pinned: bool) -> None:
    """Load what a request for the name would load. Raises: ServeError."""
    try:
        lease = await service.resolve(name)
    except ServeError as error:
        error.param = param
        raise
    if lease is None:
        return
    try:
        if is_pinned:
            service.registry.pin(lease.ref.name)
    finally:
        lease.release()


async def load_adapter(
    service: Service,
    name: str,
    path: str,
    *,
    source: str | None = None,
    token: str | None = None,
    replace: bool = False,
    is_pinned: bool = False,
    param: str = "lora_path",
) -> None:
    """Register what is at a path, or another location of a source. The same content again changes nothing.

    Raises: ServeError; it names `param`, which is what the client has to change.
    """
    try:
        await service.registry.load(
            name, path, source=source, token=token, load_inplace=replace, is_pinned=is_pinned
        )
    except AdapterError as error:
        raise _about(error, param) from error


async def _receive(state: ServerState, service: Service, exchange: Exchange) -> Sent:
    if state.uploads is None:
        raise Unavailable("this server takes no uploads now", retry_after_s=_RETRY_AFTER_S)

    def read(values: Mapping[str, str]) -> UploadWish:
        name = values.get("name")
        if not name:
            raise BadRequest("the form has no field name", param="name")
        check_new_name(name, service, "name")
        return UploadWish(name, pin=truth(values, "pin"), replace=truth(values, "replace"))

    length = exchange.header(b"content-length") or ""
    if length.isdecimal() and int(length) > state.uploads.max_bytes:
        raise PayloadTooLarge(f"the upload is larger than {state.uploads.max_bytes} bytes")
    content_type = exchange.header(b"content-type")
    try:
        return await state.uploads.receive(exchange.read_part, content_type, service.registry, read)
    except AdapterError as error:
        raise _about(error, None) from error


def _about(error: AdapterError, param: str | None) -> ServeError:
    refusal = refusal_of(error)
    refusal.param = param
    return refusal


def remove_endpoint(state: ServerState) -> Endpoint:
    """`DELETE /v1/adapters/{id}`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        query = dict(exchange.query())
        force, wait_s = truth(query, "force"), number(query, "wait", 0, 0, MAX_WAIT_S)
        name = _own_name(exchange, service)
        # First its files, or a request that comes in between would find them.
        was_sent = state.uploads is not None and await state.uploads.remove(name)
        retired = await service.retire(name, force=force, wait_s=wait_s)
        if retired is None and not was_sent:
            raise no_adapter(name)
        body = {
            "id": name,
            "object": "adapter",
            "deleted": True,
            "revision": None if retired is None else retired.ref.revision or None,
            "freed_bytes": 0 if retired is None else retired.freed_bytes,
            "ended": 0 if retired is None else retired.ended,
            "users": 0 if retired is None else retired.users,
            "files_removed": was_sent,
        }
        await exchange.answer(to_json(body))

    return endpoint


def pin_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/adapters/{id}/pin`: keep it in memory; loads it if need be."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        name = _own_name(exchange, service)
        await _find(service, name, "id", is_pinned=True)
        await answer_record(exchange, service, name)

    return endpoint


def unpin_endpoint(state: ServerState) -> Endpoint:
    """`POST /v1/adapters/{id}/unpin`"""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        name = _own_name(exchange, service)
        if service.registry.get(name) is None:
            raise no_adapter(name)
        service.registry.unpin(name)
        await answer_record(exchange, service, name)

    return endpoint


def _own_name(exchange: Exchange, service: Service) -> str:
    """The adapter that the path means. Raises: BadRequest for the base model."""
    name = adapter_name(exchange.path_param("id"), service)
    if service.card.is_base(name):
        raise BadRequest(f"'{name}' is a name of the base model, which stays as it is", param="id")
    return name


def check_new_name(name: str, service: Service, param: str) -> None:
    """Raises: BadRequest for what no adapter can be called, before anything is looked at."""
    if service.card.is_base(name):
        raise BadRequest(f"'{name}' is a name of the base model", param=param)
    if not name.isprintable():
        raise BadRequest(f"{param} holds characters that cannot be printed", param=param)
