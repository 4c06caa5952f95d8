"""`/v1/adapters`: pages of adapters, and adding, removing and pinning them."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapters.errors import AdapterUnavailable
from adapters.types import UNREAD, AdapterRef, Revision
from server.api.app import build_app
from server.api.state import ServerState
from tests.server.api.conftest import connect
from tests.server.api.fake_service import FakeService

ADAPTERS = "/v1/adapters"
MakeState = Callable[..., ServerState]


async def names(client: httpx.AsyncClient, **query: object) -> list[str]:
    response = await client.get(ADAPTERS, params=query)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    return [record["id"] for record in response.json()["data"]]


# --- Lists ------------------------------------------------------------------------------------------------


async def test_a_record_says_everything_about_an_adapter(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("org/pirate", "/adapters/pirate")
    service.registry.pinned.add("org/pirate")
    service.registry.users["org/pirate"] = 2
    service.registry.errors["org/pirate"] = "adapter_config.json is not valid JSON"

    record = (await client.get(f"{ADAPTERS}/org/pirate")).json()

    assert record == {
        "id": "org/pirate",
        "object": "adapter",
        "name": "org/pirate",
        "revision": "rev-/adapters/pirate",
        "rank": 8,
        "targets": ["q_proj"],
        "kind": "lora",
        "bytes": 1000,
        "tier": "host",
        "pinned": True,
        "users": 2,
        "last_used": 1763000100.0,
        "loads": 1,
        "load_seconds": 0.25,
        "source": "local",
        "root": "/adapters/pirate",
        "parent": "base",
        "created": 1763000000,
        "error": "adapter_config.json is not valid JSON",
    }
    assert (await client.get(ADAPTERS)).json()["data"] == [record]


async def test_the_tier_is_the_fastest_memory_that_an_adapter_is_in(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    for name in ("a", "b", "c"):
        service.registry.add(name, f"/adapters/{name}")
    service.registry.evicted = {"a"}
    service.resident = frozenset({Revision("rev-/adapters/c")})

    tiers = [record["tier"] for record in (await client.get(ADAPTERS)).json()["data"]]

    assert tiers == ["disk", "host", "device"]


async def test_kinds_are_joined_and_an_unread_adapter_has_no_revision(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    info = service.registry.add("pirate")
    object.__setattr__(info, "kinds", ("dora", "rslora"))
    object.__setattr__(info, "ref", AdapterRef("pirate", UNREAD))

    record = (await client.get(f"{ADAPTERS}/pirate")).json()

    assert (record["kind"], record["revision"]) == ("dora+rslora", None)


@pytest.mark.parametrize("path", ["org/a", "org%2Fa", "base:org/a", "org%2fa"])
async def test_ids_may_hold_slashes_as_they_are_or_encoded(
    client: httpx.AsyncClient, service: FakeService, path: str
) -> None:
    service.registry.add("org/a")

    assert (await client.get(f"{ADAPTERS}/{path}")).json()["id"] == "org/a"


@pytest.mark.parametrize("path", ["nobody", "base", "default", ""])
async def test_what_is_no_adapter_is_404_in_openai_s_words(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"{ADAPTERS}/{path}")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_pages_hold_each_adapter_once_also_when_some_come_and_go(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    for number in range(25):
        service.registry.add(f"a{number:02}")
    first = (await client.get(ADAPTERS, params={"limit": 10})).json()
    del service.registry.adapters[first["last_id"]]
    service.registry.add("a005")
    second = (await client.get(ADAPTERS, params={"limit": 10, "after": first["last_id"]})).json()
    third = (await client.get(ADAPTERS, params={"limit": 10, "after": second["last_id"]})).json()

    assert [record["id"] for record in second["data"]] == [f"a{number}" for number in range(10, 20)]
    assert (first["has_more"], second["has_more"], third["has_more"]) == (True, True, False)
    assert (first["total"], third["total"]) == (25, 25)
    assert [record["id"] for record in third["data"]] == [f"a{number}" for number in range(20, 25)]
    assert third["last_id"] == "a24"
    assert await names(client, after="zzz") == []


async def test_prefix_and_search_choose_and_the_total_counts_what_they_chose(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    for name in ("team-a/Pirate", "team-a/json", "team-b/pirate", "PIRATE"):
        service.registry.add(name)

    assert await names(client, prefix="team-a/") == ["team-a/Pirate", "team-a/json"]
    assert await names(client, search="pirate") == ["PIRATE", "team-a/Pirate", "team-b/pirate"]
    assert await names(client, search="IRAT", prefix="team-a/") == ["team-a/Pirate"]
    page = (await client.get(ADAPTERS, params={"search": "pirate", "limit": 1})).json()
    assert (page["total"], page["has_more"], page["last_id"]) == (3, True, "PIRATE")


async def test_broken_adapters_are_told_apart(client: httpx.AsyncClient, service: FakeService) -> None:
    for name in ("a", "b", "c"):
        service.registry.add(name)
    service.registry.errors["b"] = "adapter_model.safetensors ends in the middle of a tensor"

    assert await names(client) == ["a", "b", "c"]
    assert await names(client, broken="true") == ["b"]
    assert await names(client, broken="true", search="c") == []


async def test_a_long_list_is_the_same_as_short_ones(client: httpx.AsyncClient, service: FakeService) -> None:
    """It is written elsewhere."""
    for number in range(300):
        service.registry.add(f"a{number:03}")
    whole = (await client.get(ADAPTERS, params={"limit": 300})).json()["data"]
    halves = [
        record
        for after in ("", "a099", "a199")
        for record in (await client.get(ADAPTERS, params={"after": after})).json()["data"]
    ]

    assert whole == halves
    assert len((await client.get("/v1/models")).json()["data"]) == 301


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("broken=perhaps", "broken"),
        ("limit=1.5", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("after=" + "x" * 257, "after"),
        ("search=" + "x" * 257, "search"),
    ],
)
async def test_bad_queries_are_refused_by_name(client: httpx.AsyncClient, query: str, param: str) -> None:
    response = await client.get(f"{ADAPTERS}?{query}")

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# --- Keys -------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Any) -> dict[str, object]:
    (tmp_path / "keys").write_text("sk-one adapters=pirate,team/*\nsk-ops admin=yes\n")
    return {"api_keys_file": tmp_path / "keys"}


async def test_a_key_sees_the_adapters_that_it_may_use(
    make_state: MakeState, service: FakeService, keys: dict[str, object]
) -> None:
    for name in ("pirate", "secret", "team/a"):
        service.registry.add(name)
    async with connect(build_app(make_state(**keys))) as client:
        client.headers["x-api-key"] = "sk-one"
        page = (await client.get(ADAPTERS)).json()
        hidden = await client.get(f"{ADAPTERS}/secret")
        unknown = await client.get(f"{ADAPTERS}/nobody")

    assert [record["id"] for record in page["data"]] == ["pirate", "team/a"]
    assert page["total"] == 2
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace("secret", "nobody") == unknown.text


CHANGES = [
    ("POST", ADAPTERS),
    ("DELETE", f"{ADAPTERS}/pirate"),
    ("POST", f"{ADAPTERS}/pirate/pin"),
    ("POST", f"{ADAPTERS}/pirate/unpin"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_changes_are_for_admins(
    make_state: MakeState, service: FakeService, keys: dict[str, object], method: str, path: str
) -> None:
    service.registry.add("pirate")
    body = {"name": "pirate"} if path == ADAPTERS else None
    async with connect(build_app(make_state(**keys))) as client:
        refused = await client.request(method, path, json=body, headers={"x-api-key": "sk-one"})
        there = "pirate" in service.registry.adapters
        allowed = await client.request(method, path, json=body, headers={"x-api-key": "sk-ops"})

    assert refused.status_code == 403
    assert there
    assert allowed.status_code == 200


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_changes_are_closed_to_foreign_pages_without_keys(
    client: httpx.AsyncClient, service: FakeService, method: str, path: str
) -> None:
    service.registry.add("pirate")
    response = await client.request(
        method, path, json={"name": "x"}, headers={"origin": "https://evil.example"}
    )

    assert response.status_code == 403
    assert list(service.registry.adapters) == ["pirate"]
    assert service.registry.pinned == set()


# --- Adding by name and by place --------------------------------------------------------------------------


async def test_adding_answers_201_once_and_200_when_it_is_there(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {"name": "pirate", "source": "local", "path": "/adapters/pirate", "pin": True}
    first, second = [await client.post(ADAPTERS, json=body) for _ in range(2)]

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert first.json()["pinned"]


async def test_other_content_needs_replace(client: httpx.AsyncClient) -> None:
    await client.post(ADAPTERS, json={"name": "pirate", "path": "/adapters/one"})
    other = {"name": "pirate", "path": "/adapters/two"}
    refused = await client.post(ADAPTERS, json=other)
    replaced = await client.post(ADAPTERS, json={**other, "replace": True})

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "path")
    assert (replaced.status_code, replaced.json()["revision"]) == (201, "rev-/adapters/two")


async def test_a_source_gets_location_revision_and_token(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    body = {"name": "cook", "source": "hub", "location": "org/cook", "revision": "v2", "token": "hf_secret"}
    response = await client.post(ADAPTERS, json=body)

    assert response.status_code == 201
    assert service.registry.loads == [{"path": "org/cook@v2", "source": "hub", "token": "hf_secret"}]
    assert "hf_secret" not in response.text


async def test_a_name_alone_means_what_a_request_would_find(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("pirate")
    found = await client.post(ADAPTERS, json={"name": "pirate", "pin": True})
    missing = await client.post(ADAPTERS, json={"name": "nobody"})

    assert (found.status_code, found.json()["pinned"]) == (200, True)
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "name")
    assert service.is_idle


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "base", "path": "/adapters/x"}, "name"),
        ({"name": "default"}, "name"),
        ({"name": "a\nb", "path": "/adapters/x"}, "name"),
        ({"name": "x", "path": "/etc"}, "path"),
        ({"name": "x", "path": "/adapters/x", "location": "org/x"}, "path"),
        ({"name": "x", "path": "/adapters/x", "token": "t"}, "token"),
        ({"name": "x", "revision": "v1"}, "revision"),
        ({"name": "x", "source": "hub"}, "source"),
        ({"name": "x", "source": "hub", "path": "/adapters/x"}, "source"),
        ({"name": "x", "path": 5}, "path"),
        ({"name": "x", "path": "/adapters/x", "pin": "yes"}, "pin"),
    ],
)
async def test_bad_bodies_are_refused_by_name_and_add_nothing(
    client: httpx.AsyncClient, service: FakeService, body: dict[str, object], param: str
) -> None:
    response = await client.post(ADAPTERS, json=body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert service.registry.adapters == {}


async def test_what_cannot_be_had_now_is_503_with_a_time(
    client: httpx.AsyncClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(*_: object, **__: object) -> None:
        raise AdapterUnavailable("the hub did not answer", retry_after_s=7)

    monkeypatch.setattr(service.registry, "load", load)
    response = await client.post(ADAPTERS, json={"name": "x", "source": "hub", "location": "org/x"})

    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


# --- Removing ---------------------------------------------------------------------------------------------


async def test_removing_says_what_it_freed_and_cannot_be_repeated(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("org/pirate")
    removed = await client.delete(f"{ADAPTERS}/org/pirate", params={"force": "true", "wait": "2.5"})
    again = await client.delete(f"{ADAPTERS}/org/pirate")

    assert removed.json() == {
        "id": "org/pirate",
        "object": "adapter",
        "deleted": True,
        "revision": "rev-/adapters/one",
        "freed_bytes": 1000,
        "ended": 1,
        "users": 0,
        "files_removed": False,
    }
    assert service.retired[0] == ("org/pirate", True, 2.5)
    assert again.status_code == 404


async def test_without_force_nobody_is_ended(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("pirate")
    response = await client.delete(f"{ADAPTERS}/pirate")

    assert response.json()["ended"] == 0
    assert service.retired == [("pirate", False, 0)]


@pytest.mark.parametrize(
    ("query", "param"),
    [("force=perhaps", "force"), ("wait=-1", "wait"), ("wait=nan", "wait"), ("wait=inf", "wait")],
)
async def test_bad_ways_to_remove_are_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, query: str, param: str
) -> None:
    service.registry.add("pirate")
    response = await client.delete(f"{ADAPTERS}/pirate?{query}")

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert "pirate" in service.registry.adapters


async def test_the_base_model_stays(client: httpx.AsyncClient) -> None:
    for method, path in (("DELETE", "base"), ("POST", "base/pin"), ("POST", "other-name/unpin")):
        response = await client.request(method, f"{ADAPTERS}/{path}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "id")


async def test_every_protocol_unloads_in_the_same_way(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    for name in ("a", "b"):
        service.registry.add(name)
    await client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    await client.post("/v2/repository/models/b/unload")

    assert service.retired == [("a", False, 0), ("b", False, 0)]


# --- Pins -------------------------------------------------------------------------------------------------


async def test_pins_can_be_repeated_and_names_hold_slashes(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    service.registry.add("org/pirate")
    for _ in range(2):
        pinned = await client.post(f"{ADAPTERS}/org/pirate/pin")
        assert pinned.json()["pinned"] is True
    for _ in range(2):
        unpinned = await client.post(f"{ADAPTERS}/org%2Fpirate/unpin")
        assert unpinned.json()["pinned"] is False
    assert service.is_idle


async def test_only_adapters_can_be_pinned(client: httpx.AsyncClient) -> None:
    for action in ("pin", "unpin"):
        response = await client.post(f"{ADAPTERS}/nobody/{action}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_adapter_may_be_called_like_a_route(client: httpx.AsyncClient, service: FakeService) -> None:
    service.registry.add("org/pin")

    assert (await client.get(f"{ADAPTERS}/org/pin")).json()["id"] == "org/pin"
    assert (await client.post(f"{ADAPTERS}/org/pin/pin")).json()["pinned"] is True
    assert (await client.delete(f"{ADAPTERS}/org/pin")).json()["deleted"] is True


async def test_other_methods_are_405(client: httpx.AsyncClient) -> None:
    response = await client.put(f"{ADAPTERS}/pirate")

    assert response.status_code == 405
    assert "DELETE" in response.headers["allow"]
