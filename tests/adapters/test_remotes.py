"""Adapters of remotes: every request is checked with its own token, and what was brought is shared."""

import asyncio

import pytest

from adapters import remotes
from adapters.errors import AdapterInvalid, AdapterNotFound, AdapterUnavailable
from adapters.types import Revision
from tests.adapters.fake_files import Gate
from tests.adapters.stage import ROOT, Stage, reached, waiting

SQL = "org/sql"


# --- Requests -----------------------------------------------------------------------------------------------


async def test_a_location_is_fetched_once_and_asked_about_for_every_request(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1")

    leases = [await stage.registry.acquire(SQL, source="hub") for _ in range(3)]

    assert [lease.ref.revision for lease in leases] == ["rev-1"] * 3
    assert (leases[0].info.source, leases[0].info.root, leases[0].ref.name) == ("hub", SQL, SQL)
    assert len(stage.hub.resolved) == 3
    assert len(stage.hub.fetched) == 1
    for lease in leases:
        lease.release()
    assert not stage.is_held("rev-1")


async def test_what_one_token_may_see_is_not_served_to_another(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1", readers=("hers",))
    lease = await stage.registry.acquire(SQL, source="hub", token="hers")

    for token in (None, "his"):
        with pytest.raises(AdapterNotFound):
            await stage.registry.acquire(SQL, source="hub", token=token)

    stage.hub.revoke(SQL, "hers")
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire(SQL, source="hub", token="hers")
    assert stage.is_held("rev-1"), "what runs goes on"
    lease.release()


async def test_what_requests_brought_is_not_listed(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1")
    await stage.use(SQL, source="hub")

    assert stage.registry.list() == ()
    assert stage.registry.statuses() == ()
    assert stage.registry.get(SQL) is None


async def test_a_refusal_of_one_token_says_nothing_about_another(stage: Stage) -> None:
    """Both may ask, but only one may fetch; they share the work that the other one began."""
    stage.hub.put(SQL, "v1", "rev-1", readers=("hers", "his"))
    stage.hub.refused_files = {"his"}
    stage.hub.gate = gate = Gate()
    his = asyncio.create_task(stage.registry.acquire(SQL, source="hub", token="his"))
    await reached(gate)
    hers = asyncio.create_task(stage.registry.acquire(SQL, source="hub", token="hers"))
    await waiting(stage, ("hub", SQL, "v1"), 2)
    gate.is_open.set()

    with pytest.raises(AdapterNotFound, match="not for this token"):
        await his
    (await hers).release()
    assert [token for *_, token in stage.hub.fetched] == ["his", "hers"]


async def test_all_who_ask_at_once_share_one_fetch_and_one_load(stage: Stage) -> None:
    stage.s3.put("s3://bucket/a", "v1", "rev-1", readers=("one", "two"))
    stage.s3.gate = gate = Gate()
    asked = [
        asyncio.create_task(stage.registry.acquire("s3://bucket/a", token=token))
        for token in ("one", "two", "one")
    ]
    await reached(gate)
    await waiting(stage, ("s3", "s3://bucket/a", "v1"), 3)
    gate.is_open.set()
    leases = await asyncio.gather(*asked)

    assert len(stage.s3.fetched) == len(stage.files.reads) == 1
    for lease in leases:
        lease.release()
    assert stage.store.total_pins() == 0


async def test_a_new_version_is_loaded_beside_the_one_in_use(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1")
    running = await stage.registry.acquire(SQL, source="hub")
    stage.hub.put(SQL, "v2", "rev-2")

    fresh = await stage.registry.acquire(SQL, source="hub")

    assert (running.ref.revision, fresh.ref.revision) == ("rev-1", "rev-2")
    running.release()
    assert not stage.store.is_loaded(Revision("rev-1"))
    fresh.release()


async def test_a_local_name_and_a_hub_id_do_not_mix(stage: Stage) -> None:
    stage.files.put(f"{ROOT}/x", "rev-local")
    stage.hub.put(SQL, "v1", "rev-hub")
    await stage.registry.load(SQL, f"{ROOT}/x")

    there = await stage.registry.acquire(SQL, source="hub")
    here = await stage.registry.acquire(SQL, source="local")
    bare = await stage.registry.acquire(SQL)

    assert [one.ref.revision for one in (there, here, bare)] == ["rev-hub", "rev-local", "rev-local"]
    for one in (there, here, bare):
        one.release()


async def test_a_bare_name_is_local_first_and_then_where_names_are_written_like_it(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-hub")
    stage.s3.put("s3://bucket/a", "v1", "rev-s3")
    stage.put("pirate", "rev-local")

    found = [await stage.registry.acquire(name) for name in (SQL, "s3://bucket/a", "pirate")]

    assert [lease.info.source for lease in found] == ["hub", "s3", "local"]
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire(SQL, source="local")
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire("nobody")


@pytest.mark.parametrize(("source", "name"), [("pbase", "x"), ("", "x"), ("s3", "org/x"), ("hub", "pirate")])
async def test_sources_that_are_not_allowed_and_places_they_do_not_have_are_invalid(
    stage: Stage, source: str, name: str
) -> None:
    stage.put("pirate", "rev-1")

    with pytest.raises(AdapterInvalid):
        await stage.registry.acquire(name, source=source)

    assert stage.hub.resolved == stage.s3.resolved == []


async def test_names_of_the_base_model_are_asked_of_nobody(stage: Stage) -> None:
    stage.registry._reserved = frozenset({"org/base"})

    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire("org/base")

    assert stage.hub.resolved == []


async def test_a_remote_that_said_no_is_left_alone_for_a_while_by_that_token_only(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1", readers=("hers",))
    for _ in range(3):
        with pytest.raises(AdapterNotFound):
            await stage.registry.acquire(SQL, source="hub", token="his")
    assert len(stage.hub.resolved) == 1
    await stage.use(SQL, source="hub", token="hers")

    stage.hub.put(SQL, "v1", "rev-1", readers=("hers", "his"))
    stage.clock.now += 5
    await stage.use(SQL, source="hub", token="his")


async def test_a_remote_that_is_away_is_asked_again_every_few_seconds(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1")
    stage.hub.error = AdapterUnavailable("the hub does not answer", retry_after_s=5)
    for _ in range(4):
        for _ in range(3):
            with pytest.raises(AdapterUnavailable):
                await stage.registry.acquire(SQL, source="hub")
        stage.clock.now += 5
    assert len(stage.hub.resolved) == 4

    stage.hub.error = None
    await stage.use(SQL, source="hub")


async def test_broken_files_of_a_version_are_not_read_again_at_once(stage: Stage) -> None:
    folder = stage.hub.put(SQL, "v1", "rev-1")
    stage.files.spoil(str(folder), AdapterInvalid("NaN"))
    for _ in range(3):
        with pytest.raises(AdapterInvalid, match="NaN"):
            await stage.registry.acquire(SQL, source="hub")

    assert len(stage.files.reads) == 1


async def test_an_evicted_version_is_brought_again(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1")
    await stage.use(SQL, source="hub")
    await stage.crowd_out()

    await stage.use(SQL, source="hub")

    assert len(stage.files.reads) == 2


async def test_only_so_many_locations_are_known(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "_MAX_ENTRIES", 8)
    stage.hub.put("org/held", "v1", "rev-held", 0)
    held = await stage.registry.acquire("org/held", source="hub")
    for number in range(12):
        stage.hub.put(f"org/{number}", "v1", f"rev-{number}", 0)
        await stage.use(f"org/{number}", source="hub")

    assert len(stage.registry._remote._entries) == 8
    assert not stage.store.is_loaded(Revision("rev-0"))
    assert stage.store.is_loaded(Revision("rev-11"))
    assert stage.is_held("rev-held")
    held.release()


async def test_tokens_are_kept_nowhere(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-1", readers=("secret-token",))
    await stage.use(SQL, source="hub", token="secret-token")
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire(SQL, source="hub", token="other-secret")
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire(SQL, source="hub", token="\ud800")

    kept = repr([*stage.registry._remote._failures._known.items(), *stage.registry._remote._entries.items()])
    assert kept.count(SQL) >= 3, "what is kept is written out"
    assert "secret" not in kept


# --- Names that an operator gave to a location --------------------------------------------------------------


async def test_an_operator_names_a_location(stage: Stage) -> None:
    stage.s3.put("s3://bucket/a", "v1", "rev-1", readers=("key",))

    info = await stage.registry.load("pirate", "s3://bucket/a", token="key")

    assert (info.ref.name, info.source, info.root) == ("pirate", "s3", "s3://bucket/a")
    assert stage.names() == ["pirate"]
    await stage.crowd_out()
    lease = await stage.registry.acquire("pirate")
    assert lease.ref == info.ref
    assert [token for _, token in stage.s3.resolved] == ["key", "key"], "requests need no token"
    lease.release()


async def test_a_remote_that_is_away_does_not_take_a_named_adapter_along(stage: Stage) -> None:
    stage.s3.put("s3://bucket/a", "v1", "rev-1")
    await stage.registry.load("pirate", "s3://bucket/a")
    await stage.crowd_out()
    stage.s3.error = AdapterUnavailable("no route", retry_after_s=5)

    await stage.use("pirate")


async def test_a_named_location_that_is_gone_is_not_asked_for_by_every_request(stage: Stage) -> None:
    stage.s3.put("s3://bucket/a", "v1", "rev-1", readers=("key",))
    await stage.registry.load("pirate", "s3://bucket/a", token="key")
    await stage.crowd_out()
    stage.s3.revoke("s3://bucket/a", "key")
    for _ in range(3):
        with pytest.raises(AdapterNotFound, match="not there any more"):
            await stage.registry.acquire("pirate")
    assert len(stage.s3.resolved) == 2

    stage.s3.put("s3://bucket/a", "v1", "rev-1", readers=("key",))
    stage.clock.now += 5
    await stage.use("pirate")


async def test_loading_a_location_again_follows_its_versions(stage: Stage) -> None:
    stage.s3.put("s3://bucket/a", "v1", "rev-1")
    first = await stage.registry.load("pirate", "s3://bucket/a")
    assert await stage.registry.load("pirate", "s3://bucket/a") is first
    assert len(stage.files.reads) == 1

    stage.s3.put("s3://bucket/a", "v2", "rev-2")
    with pytest.raises(AdapterInvalid, match="load_inplace"):
        await stage.registry.load("pirate", "s3://bucket/a")
    second = await stage.registry.load("pirate", "s3://bucket/a", load_inplace=True)

    assert second.ref.revision == "rev-2"


async def test_what_is_written_like_both_is_a_folder_if_there_is_one(stage: Stage) -> None:
    stage.hub.put(SQL, "v1", "rev-hub")
    stage.source.relative.add("my/folder")
    stage.files.put("my/folder", "rev-local")
    assert (await stage.registry.load("zero", "my/folder")).source == "local"
    assert (await stage.registry.load("one", SQL)).source == "hub"
    assert (await stage.registry.load("two", SQL, source="hub")).source == "hub"
    with pytest.raises(AdapterInvalid):
        await stage.registry.load("three", SQL, source="local")
    with pytest.raises(AdapterInvalid):
        await stage.registry.load("three", "/etc/passwd")
    with pytest.raises(AdapterInvalid, match="not allowed"):
        await stage.registry.load("three", SQL, source="pbase")
