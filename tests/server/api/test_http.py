"""What surrounds all routes: ids, CORS, 404 and 405, the key, and the protection against web pages.

Rows Z6, Z19, U4, C3.
"""

import logging
from collections.abc import Callable, Mapping, MutableMapping

import httpx
import pytest
import uvicorn

from server.api.adapters import vllm
from server.api.app import build_app
from server.api.guard import for_own_programs
from server.api.http import Identity, Refusals, Resource
from server.api.state import ServerState
from tests.server.api.conftest import connect, serve
from tests.server.api.fake_service import FakeService
from tests.server.api.raw_http import ask, post

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
MakeState = Callable[..., ServerState]


@pytest.mark.parametrize("path", [CHAT, "/health", "/nowhere", "/v1/models/nobody"])
async def test_every_answer_has_a_request_id(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).headers["x-request-id"] == "id1"


async def test_valid_incoming_request_id_is_kept(client: httpx.AsyncClient, service: FakeService) -> None:
    response = await client.post(CHAT, json=HELLO, headers={"x-request-id": "trace-1/a.b:c"})

    assert response.headers["x-request-id"] == "trace-1/a.b:c"
    assert response.json()["id"] == "chatcmpl-trace-1/a.b:c"
    assert service.last.request_id == "trace-1/a.b:c"


@pytest.mark.parametrize("bad", ["a b", "a" * 129, 'a"b', "", "a,b", "<a>"])
async def test_other_incoming_request_ids_are_replaced(client: httpx.AsyncClient, bad: str) -> None:
    assert (await client.get("/health", headers={"x-request-id": bad})).headers["x-request-id"] == "id1"


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/nowhere", {"error"}),
        ("/nowhere", {"error"}),
        ("/generate/x", {"error"}),
        ("/api/nothing", {"error"}),
        ("/v2/nothing", {"error"}),
        ("/api/jobs/1", {"detail"}),
    ],
)
async def test_unknown_paths_are_json_404_in_the_shape_of_their_family(
    client: httpx.AsyncClient, path: str, shape: set[str]
) -> None:
    response = await client.post(path, json={})

    assert response.status_code == 404
    assert set(response.json()) == shape
    message = response.json().get("error") or response.json()["detail"]
    assert isinstance(message, str) == path.startswith(("/api", "/v2"))


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST, OPTIONS"),
        ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
        ("GET", "/generate", "POST, OPTIONS"),
        ("PUT", "/", "GET, HEAD, POST, OPTIONS"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
    ],
)
async def test_wrong_methods_are_json_405_with_allow(
    client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    response = await client.request(method, path)

    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert response.json()["error"]


async def test_options_without_cors_says_what_is_allowed(client: httpx.AsyncClient) -> None:
    response = await client.options(CHAT)

    assert response.status_code == 200
    assert response.headers["allow"] == "POST, OPTIONS"


async def test_U4_preflight_mirrors_headers_and_allows_private_networks(client: httpx.AsyncClient) -> None:
    """T20."""
    response = await client.options(
        CHAT,
        headers={
            "origin": "https://example.org",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-lang",
            "access-control-request-private-network": "true",
        },
    )

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-lang"
    assert response.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize("body", [HELLO, {**HELLO, "stream": True}, {}, {**HELLO, "model": "nobody"}])
async def test_U4_pages_may_read_all_headers_of_all_answers(
    client: httpx.AsyncClient, body: dict[str, object]
) -> None:
    """T20: said with the answer itself."""
    response = await client.post(CHAT, json=body, headers={"origin": "https://example.org"})
    exposed = set(response.headers["access-control-expose-headers"].split(", "))

    assert response.headers["access-control-allow-origin"] == "*"
    assert {name for name in response.headers if name.startswith("x-")} - {"x-accel-buffering"} <= exposed
    assert {"retry-after", "x-compute-time", "x-time-to-first-token", "x-request-id"} <= exposed


async def test_bugs_are_bare_500s_with_cors_and_an_id(
    service: FakeService, state: ServerState, caplog: pytest.LogCaptureFixture
) -> None:
    """T20: what Starlette answers outside its own middleware has these headers, too."""
    secret = "what the user said"

    def bug(request: object) -> list[object]:
        raise ZeroDivisionError(secret)

    service.script = bug  # type: ignore[assignment]
    with caplog.at_level(logging.DEBUG):
        async with connect(build_app(state)) as client:
            response = await client.post(CHAT, json=HELLO, headers={"origin": "https://example.org"})

    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["x-request-id"] == "id1"
    assert "ZeroDivisionError" in caplog.text
    assert secret not in caplog.text


async def test_allowed_origins_restrict_pages(make_state: MakeState) -> None:
    async with connect(build_app(make_state(allowed_origins=("https://ours.org",)))) as client:
        ours = await client.post(CHAT, json=HELLO, headers={"origin": "https://ours.org"})
        theirs = await client.post(CHAT, json=HELLO, headers={"origin": "https://theirs.org"})

    assert ours.headers["access-control-allow-origin"] == "https://ours.org"
    assert "access-control-allow-origin" not in theirs.headers


@pytest.mark.parametrize("value", ["Bearer any", "Bearer x", "Bearer None", "Basic eA=="])
async def test_Z6_C3_any_key_is_accepted_when_none_is_set(client: httpx.AsyncClient, value: str) -> None:
    """T26: load generators without a key send "None"."""
    assert (await client.post(CHAT, json=HELLO, headers={"authorization": value})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({b"authorization": "Bearer sécret".encode()}, ""),
        ({b"authorization": "bearer  sécret".encode()}, ""),
        ({b"x-api-key": "sécret".encode()}, ""),
        ({b"authorization": b"Bearer wrong", b"x-api-key": "sécret".encode()}, ""),
        ({}, "?api_key=s%C3%A9cret"),
    ],
)
async def test_Z19_the_key_is_taken_from_three_places(
    make_state: MakeState, headers: Mapping[bytes, bytes], query: str
) -> None:
    async with connect(build_app(make_state(api_key="sécret"))) as client:
        response = await client.post(CHAT + query, json=HELLO, headers=headers)

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, ""),
        ({"authorization": "Bearer"}, ""),
        ({"authorization": "Bearer wrong"}, ""),
        ({"authorization": "Basic secret"}, ""),
        ({"x-api-key": ""}, "?api_key="),
        ({}, "?api_key=secre"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/generate", "/v1/models", "/metrics", "/load", "/nowhere", "/"])
async def test_Z19_without_the_key_there_is_a_401(
    make_state: MakeState, path: str, headers: dict[str, str], query: str
) -> None:
    async with connect(build_app(make_state(api_key="secret"))) as client:
        response = await client.post(path + query, json=HELLO, headers=headers)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key" if isinstance(error, dict) else error


async def test_probes_and_preflights_need_no_key(make_state: MakeState) -> None:
    async with connect(build_app(make_state(api_key="secret", open_metrics=True))) as client:
        for path in ("/health", "/ready", "/ping", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert (await client.options(CHAT)).status_code == 200


LOAD = ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/adapters/new"})


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.org"},
        {"origin": "null"},
        {"origin": "http://["},
        {"host": "evil.org"},
        {"host": "evil.org:8000", "origin": "http://evil.org:8000"},
        {"host": "192.168.0.7:8000"},
    ],
)
async def test_web_pages_cannot_change_a_server_without_a_key(
    client: httpx.AsyncClient, service: FakeService, headers: dict[str, str]
) -> None:
    response = await client.post(LOAD[0], json=LOAD[1], headers=headers)

    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"
    assert service.registry.list() == ()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:8000"},
        {"host": "[::1]:8000"},
        {"host": "127.0.0.2"},
        {"host": "motet.example"},
        {"origin": "http://localhost:3000"},
        {"origin": "https://ours.org"},
    ],
)
async def test_own_programs_can_change_a_server_without_a_key(
    make_state: MakeState, headers: dict[str, str]
) -> None:
    state = make_state(host="motet.example", allowed_origins=("https://ours.org",))
    async with connect(build_app(state)) as client:
        assert (await client.post(LOAD[0], json=LOAD[1], headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("more", ["%0A", "%0D", "%00", "%7F", "%C2%85", "%E2%80%A8"])
async def test_pages_cannot_change_a_server_by_another_spelling_of_the_path(
    client: httpx.AsyncClient, service: FakeService, path: str, more: str
) -> None:
    service.registry.add("old")
    body = {"lora_name": "old", "lora_path": "/adapters/new"}
    response = await client.post(path + more, json=body, headers={"origin": "https://evil.org"})

    assert response.status_code == 404
    assert [info.root for info in service.registry.list()] == ["/adapters/one"]


async def test_page_protection_surrounds_the_endpoint_whatever_route_leads_to_it(
    state: ServerState, service: FakeService
) -> None:
    protected = for_own_programs(vllm.load_endpoint(state), state.options)
    app = Identity(Refusals(Resource(post=protected)), new_id=state.new_id, clock=state.clock)
    async with connect(app) as client:
        response = await client.post("/any%0A", json=LOAD[1], headers={"origin": "https://evil.org"})

    assert response.status_code == 403
    assert service.registry.list() == ()


@pytest.mark.parametrize("path", ["/health%0A", "/ready%0A", "/metrics%0A", "/v1/models%0A", CHAT + "%0A"])
async def test_key_is_not_bypassed_by_another_spelling_of_the_path(make_state: MakeState, path: str) -> None:
    async with connect(build_app(make_state(api_key="secret", open_metrics=True))) as client:
        assert (await client.get(path)).status_code == 404
        assert (await client.post(path, json=HELLO)).status_code == 404


@pytest.mark.parametrize("path", ["/health/", "/health/../v1/models", "//health", "/HEALTH", "/health;x"])
async def test_open_paths_are_open_in_their_exact_spelling_only(make_state: MakeState, path: str) -> None:
    async with connect(build_app(make_state(api_key="secret"))) as client:
        request = client.build_request("GET", "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert (await client.send(request)).status_code == 401


async def test_server_on_all_addresses_is_changed_by_address_and_not_by_name(make_state: MakeState) -> None:
    async with connect(build_app(make_state(host="0.0.0.0"))) as client:
        by_address = await client.post(LOAD[0], json=LOAD[1], headers={"host": "10.1.2.3:8000"})
        by_name = await client.post(LOAD[0], json=LOAD[1], headers={"host": "rebound.evil.org:8000"})

    assert by_address.status_code == 200
    assert by_name.status_code == 403


async def test_with_a_key_pages_from_anywhere_may_change_the_server(make_state: MakeState) -> None:
    headers = {"origin": "https://evil.org", "authorization": "Bearer secret"}
    async with connect(build_app(make_state(api_key="secret"))) as client:
        assert (await client.post(LOAD[0], json=LOAD[1], headers=headers)).status_code == 200


async def test_generation_is_open_to_pages(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json=HELLO, headers={"origin": "https://any.org"})).status_code == 200


async def test_importing_sse_starlette_leaves_uvicorn_as_it_was(state: ServerState) -> None:
    """T19, D10."""
    build_app(state)

    assert uvicorn.Server.handle_exit.__module__ == "uvicorn.server"


async def test_large_body_is_answered_though_it_was_not_read_to_its_end(make_state: MakeState) -> None:
    async with serve(build_app(make_state(max_body_bytes=1000))) as port:
        answer = await ask(port, post(CHAT, b"x" * 3_000_000))

    assert answer.status == 413


async def test_http_1_0_is_answered_without_a_connection_header_of_ours(port: int) -> None:
    """C16: the head names the connection once."""
    answer = await ask(port, post(CHAT, HELLO, version="1.0"))

    assert answer.status == 200
    assert answer.header("connection") == "close"


async def test_websockets_are_closed() -> None:
    sent: list[MutableMapping[str, object]] = []

    async def send(message: MutableMapping[str, object]) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/ws/chat", "headers": [], "query_string": b""}
    await build_app(ServerState())(scope, receive, send)

    assert sent[0]["type"] == "websocket.close"


@pytest.mark.parametrize("query", ["api_key=%FF", "&".join(["api_key=x"] * 101)])
async def test_key_in_a_query_that_cannot_be_read_is_refused(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"/v1/models?{query}")).status_code == 400
