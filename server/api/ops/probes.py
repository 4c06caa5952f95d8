"""Routes for those who run the server: probes, metrics, version, load. They answer in every phase, at once.

`/health` says whether the process is worth keeping: 200 while it loads and while it serves, 503 once the
engine is dead or the server is going down, so that routers stop sending. `/ready` says whether generation
would be accepted now.
"""

import asyncio

from server.api.http import Endpoint, Exchange
from server.api.shapes import to_json
from server.api.state import Phase, ServerState
from server.errors import Forbidden, Unavailable

_NO_STORE = (b"cache-control", b"no-store")


def health_endpoint(state: ServerState) -> Endpoint:
    """`GET /health`, `/ping`"""

    async def endpoint(exchange: Exchange) -> None:
        status = state.phase if state.is_alive else Phase.FAILED
        if status in (Phase.DRAINING, Phase.FAILED):
            body: dict[str, object] = {"status": status, "error": "unhealthy", "error_type": "healthcheck"}
            await exchange.answer(to_json(body), status=503, headers=[_NO_STORE])
        else:
            body = {"status": "ok" if status is Phase.READY else status}
            await exchange.answer(to_json(body), headers=[_NO_STORE])

    return endpoint


def ready_endpoint(state: ServerState) -> Endpoint:
    """`GET /ready`"""

    async def endpoint(exchange: Exchange) -> None:
        try:
            state.require_service()
        except Unavailable as error:
            body = {"status": state.phase, "progress": state.progress(), "error": error.message}
            retry = (b"retry-after", str(error.retry_after_s).encode("ascii"))
            await exchange.answer(to_json(body), status=503, headers=[_NO_STORE, retry])
        else:
            await exchange.answer(to_json({"status": "ready"}), headers=[_NO_STORE])

    return endpoint


def metrics_endpoint(state: ServerState) -> Endpoint:
    """`GET /metrics`: names all adapters, so it is not for keys that may use only some."""

    async def endpoint(exchange: Exchange) -> None:
        if exchange.caller.is_limited and not state.options.open_metrics:
            raise Forbidden("this API key may not read the metrics of all adapters")
        body, content_type = b"", "text/plain"
        if state.metrics is not None:
            accept = exchange.header(b"accept") or ""
            body, content_type = await asyncio.to_thread(state.metrics.snapshot().render, accept)
        await exchange.answer(body, content_type=content_type.encode("ascii"))

    return endpoint


def version_endpoint(state: ServerState) -> Endpoint:
    """`GET /version`"""

    async def endpoint(exchange: Exchange) -> None:
        await exchange.answer(to_json({"version": state.version}))

    return endpoint


def server_load_endpoint(state: ServerState) -> Endpoint:
    """`GET /load`: generation requests under way, as vLLM counts them."""

    async def endpoint(exchange: Exchange) -> None:
        await exchange.answer(to_json({"server_load": state.num_active}))

    return endpoint
