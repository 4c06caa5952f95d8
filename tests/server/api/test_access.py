"""What a key may use: the same for every protocol, and nothing tells what else there is."""

import itertools
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import keys
from server.api.app import build_app, table
from server.api.guard import Guard
from server.api.http import Exchange, Identity
from server.api.state import ServerState
from server.errors import ServeError
from server.types import GenerationRequest, TokenEvent
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService, finish_of

MakeState = Callable[..., ServerState]

KEYS = """
sk-all     name=all
sk-one     name=one      adapters=pirate
sk-team    name=team     adapters=team/*  base=no
sk-ops     name=ops      adapters=  base=no  admin=yes
"""


def vector(request: GenerationRequest) -> list[TokenEvent]:
    return [TokenEvent(0, "", None, finish_of(request, "", 0), vector=(0.6, -0.8))]


@pytest.fixture
def state(make_state: MakeState, service: FakeService, tmp_path: Path) -> ServerState:
    for name in ("pirate", "secret", "team/a"):
        service.registry.add(name)
    (tmp_path / "keys").write_text(KEYS)
    text = service.script
    service.script = lambda request: text(request) if request.pooling is None else vector(request)
    return make_state(api_keys_file=tmp_path / "keys")


@pytest.fixture
async def client(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(build_app(state)) as http:
        yield http


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}"}


def chat(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "Hi"}]}


def completion(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": model, "prompt": "Hi", "stream": True}


def lora_id(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"lora_id": model, "prompt": "Hi"}


def generate(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/generate", {"inputs": "Hi", "parameters": {"adapter_id": model}}


def generate_stream(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": model}}


def compat(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/", {"inputs": "Hi", "parameters": {"adapter_id": model}}


def response(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {"model": model, "input": "Hi"}


def message(model: str | None) -> tuple[str, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    return "/v1/messages", {"model": model or "default", **body}


def ollama_generate(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/api/generate", {"model": model or "default", "prompt": "Hi"}


def ollama_chat(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/api/chat", {"model": model or "default", "messages": [{"role": "user", "content": "Hi"}]}


def ollama_load(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/api/chat", {"model": model or "default"}


def ollama_embed(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/api/embed", {"model": model or "default", "input": "Hi"}


def ollama_pull(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/api/pull", {"model": model or "default"}


def embeddings(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/embeddings", {"model": model or "default", "input": "Hi"}


def count_tokens(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v1/messages/count_tokens", {
        "model": model or "default",
        "messages": [{"role": "user", "content": "Hi"}],
    }


def invocation(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/invocations", {"inputs": "Hi", "parameters": {"adapter_id": model}}


def job(model: str | None) -> tuple[str, dict[str, Any]]:
    return f"/api/jobs/{model or 'default'}/infer", {"prompt": "Hi"}


def job_stream(model: str | None) -> tuple[str, dict[str, Any]]:
    return f"/api/jobs/{model or 'default'}/infer/stream", {"prompt": "Hi"}


def kserve_infer(model: str | None) -> tuple[str, dict[str, Any]]:
    text = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}
    return f"/v2/models/{model or 'default'}/infer", {"inputs": [text]}


def kserve_generate(model: str | None) -> tuple[str, dict[str, Any]]:
    return f"/v2/models/{model or 'default'}/generate", {"text_input": "Hi"}


def kserve_parameter(model: str | None) -> tuple[str, dict[str, Any]]:
    return "/v2/models/default/generate_stream", {"text_input": "Hi", "parameters": {"lora_name": model}}


PROTOCOLS = [
    chat,
    completion,
    lora_id,
    embeddings,
    response,
    message,
    count_tokens,
    generate,
    generate_stream,
    compat,
    invocation,
    ollama_generate,
    ollama_chat,
    ollama_load,
    ollama_embed,
    ollama_pull,
    job,
    job_stream,
    kserve_infer,
    kserve_generate,
    kserve_parameter,
]
Protocol = Callable[[str | None], tuple[str, dict[str, Any]]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_key_uses_what_it_may_in_every_protocol(client: httpx.AsyncClient, protocol: Protocol) -> None:
    for who, model in [
        ("all", "secret"),
        ("all", None),
        ("one", "pirate"),
        ("one", "base"),
        ("team", "team/a"),
    ]:
        path, body = protocol(model)
        response = await client.post(path, json=body, headers=key(who))
        assert response.status_code == 200, (who, model)
        if protocol not in (count_tokens, ollama_load, ollama_pull):
            used = "__base_model__" if model in (None, "base") else model
            assert response.headers["x-adapter-id"] == used


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("who", ["one", "team", "ops"])
@pytest.mark.parametrize("written", ["{}", "base:{}"])
async def test_adapter_that_a_key_may_not_use_is_refused_exactly_like_an_unknown_one(
    client: httpx.AsyncClient, service: FakeService, protocol: Protocol, who: str, written: str
) -> None:
    path, body = protocol(written.format("secret"))
    forbidden = await client.post(path, json=body, headers=key(who))
    path, body = protocol(written.format("nobody"))
    unknown = await client.post(path, json=body, headers=key("all"))

    assert forbidden.status_code == unknown.status_code == 404
    assert forbidden.text.replace("secret", "nobody") == unknown.text
    assert _without_ids(forbidden) == _without_ids(unknown)
    assert service.requests == []
    assert service.is_idle


def _without_ids(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in ("x-request-id",)}


async def test_adapter_that_a_key_may_not_use_is_not_even_looked_for(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    """Else a key could make the server load it, or measure how long that takes."""

    async def resolve(name: str | None, *_: object) -> None:
        raise AssertionError("asked")

    service.resolve = resolve  # type: ignore[assignment, method-assign]
    path, body = chat("secret")

    assert (await client.post(path, json=body, headers=key("one"))).status_code == 404


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", [None, "base", "other-name", "default"])
async def test_base_model_can_be_kept_from_a_key(
    client: httpx.AsyncClient, protocol: Protocol, model: str | None
) -> None:
    path, body = protocol(model)

    assert (await client.post(path, json=body, headers=key("team"))).status_code == 404
    assert (await client.post(path, json=body, headers=key("all"))).status_code == 200


@pytest.mark.parametrize(
    ("who", "models"),
    [
        ("all", ["base", "pirate", "secret", "team/a"]),
        ("one", ["base", "pirate"]),
        ("team", ["team/a"]),
        ("ops", []),
    ],
)
async def test_list_of_models_shows_what_the_key_may_use(
    client: httpx.AsyncClient, who: str, models: list[str]
) -> None:
    listed = (await client.get("/v1/models", headers=key(who))).json()["data"]
    shown = [
        model
        for model in ("base", "pirate", "secret", "team/a")
        if (await client.get(f"/v1/models/{model}", headers=key(who))).status_code == 200
    ]

    assert [card["id"] for card in listed] == shown == models


@pytest.mark.parametrize("name", ["secret", "base:secret"])
async def test_single_model_that_a_key_may_not_use_is_an_unknown_one(
    client: httpx.AsyncClient, name: str
) -> None:
    forbidden = await client.get(f"/v1/models/{name}", headers=key("one"))
    unknown = await client.get(f"/v1/models/{name.replace('secret', 'nobody')}", headers=key("one"))

    assert forbidden.status_code == unknown.status_code == 404
    assert forbidden.text.replace("secret", "nobody") == unknown.text


@pytest.mark.parametrize(
    ("who", "models"),
    [
        ("all", ["base", "pirate", "secret", "team/a"]),
        ("one", ["base", "pirate"]),
        ("team", ["team/a"]),
        ("ops", []),
    ],
)
async def test_ollama_shows_what_the_key_may_use(
    client: httpx.AsyncClient, who: str, models: list[str]
) -> None:
    lists = [(await client.get(f"/api/{path}", headers=key(who))).json()["models"] for path in ("tags", "ps")]
    shown = [
        model
        for model in ("base", "pirate", "secret", "team/a")
        if (await client.post("/api/show", json={"model": f"{model}:latest"}, headers=key(who))).is_success
    ]

    assert [[model["name"] for model in listed] for listed in lists] == [models, models]
    assert shown == models


async def test_nothing_that_a_limited_key_may_read_names_other_adapters(
    client: httpx.AsyncClient, state: ServerState
) -> None:
    """Whatever route is added."""
    for path, methods in table(state):
        if "GET" in methods:
            answer = await client.get(re.sub(r"\{.*?\}", "pirate", path), headers=key("one"))
            assert "secret" not in answer.text, path


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_only_admins_change_the_server(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    body = {"lora_name": "secret", "lora_path": "/adapters/one"}
    for who in ("all", "one", "team"):
        refused = await client.post(path, json=body, headers=key(who))
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "forbidden"
        assert service.registry.get("secret") is not None
    page = {**key("ops"), "origin": "https://any.org", "host": "any.org"}

    assert (await client.post(path, json=body, headers=page)).status_code == 200


async def test_metrics_are_for_keys_that_may_know_of_all_adapters(
    client: httpx.AsyncClient, make_state: MakeState, state: ServerState
) -> None:
    statuses = [
        (await client.get("/metrics", headers=key(w))).status_code for w in ("all", "one", "team", "ops")
    ]
    file = state.options.api_keys_file
    async with connect(build_app(make_state(api_keys_file=file, open_metrics=True))) as opened:
        for_anyone = await opened.get("/metrics")

    assert statuses == [200, 403, 403, 403]
    assert for_anyone.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"])
async def test_probes_do_not_look_at_the_file_of_keys(
    state: ServerState, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that hangs must not make a server look dead."""
    times = itertools.count(100)
    state.clock = lambda: float(next(times))
    async with connect(build_app(state)) as client:
        reads: list[Path] = []
        monkeypatch.setattr(keys, "_read", lambda file: reads.append(file) or b"sk-new\n")

        assert (await client.get(path)).status_code == 200
        assert reads == []
        assert (await client.get("/v1/models")).status_code == 401
        assert len(reads) == 1


async def test_key_that_is_added_or_taken_away_counts_without_a_restart(
    make_state: MakeState, tmp_path: Path
) -> None:
    file, now = tmp_path / "keys", [100.0]
    file.write_text("sk-old\n")
    state = make_state(api_keys_file=file)
    state.clock = lambda: now[0]
    async with connect(build_app(state)) as client:
        before = [(await client.get("/v1/models", headers=key(who))).status_code for who in ("old", "new")]
        file.write_text("sk-new\n")
        now[0] += 1
        after = [(await client.get("/v1/models", headers=key(who))).status_code for who in ("old", "new")]

    assert (before, after) == ([200, 401], [401, 200])


async def test_callers_of_an_open_server_are_told_apart_by_what_they_bring(
    make_state: MakeState, service: FakeService
) -> None:
    """What is kept for one client must not be found by another, with or without keys."""
    digests = [
        await _digest(make_state(), headers) for headers in ({}, key("a"), key("b"), {"x-api-key": "sk-a"})
    ]

    assert digests[0] == ""
    assert digests[1] == digests[3] != digests[2]
    assert all("sk-" not in digest for digest in digests)


async def _digest(state: ServerState, headers: dict[str, str]) -> str:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(scope, receive, send)
        seen.append(exchange.caller.digest)
        await exchange.answer(b"")

    guarded = Identity(Guard(app, state.options, None), new_id=state.new_id, clock=state.clock)
    async with connect(guarded) as client:
        await client.get("/", headers=headers)
    return seen[0]


async def test_unknown_name_is_refused_by_the_service_in_its_own_words(service: FakeService) -> None:
    """`access` relies on it."""
    with pytest.raises(ServeError) as resolved:
        await service.resolve("nobody")

    assert resolved.value.message == service.unknown("nobody").message
