"""Names and leases: nobody waits for another's load, and a lease keeps what its name meant."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnavailable
from adapters.leases import AdapterLease
from adapters.registry import AdapterRegistry, is_adapter_name
from adapters.sources.local import LocalSource
from adapters.store import AdapterStore
from adapters.types import UNREAD, Revision, Unloaded
from tests.adapters.fake_files import FakeFiles
from tests.adapters.stage import ROOT, Stage, one_step, reached, waiting, without_suspending

# --- Use ----------------------------------------------------------------------------------------------------


async def test_a_loaded_name_is_acquired_without_suspending(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")

    lease = without_suspending(stage.registry.acquire("pirate"))

    assert (lease.ref.name, lease.ref.revision) == ("pirate", "rev-1")
    assert stage.is_held("rev-1")


async def test_a_loaded_name_does_not_wait_for_the_load_of_another(stage: Stage) -> None:
    stage.put("ready", "rev-ready")
    stage.put("slow", "rev-slow")
    await stage.use("ready")
    with stage.files.held(f"{ROOT}/slow") as gate:
        slow = asyncio.create_task(stage.registry.acquire("slow"))
        await reached(gate)
        without_suspending(stage.registry.acquire("ready")).release()
        assert not slow.done()
        assert stage.names() == ["ready"], "a name appears after its load"

    assert (await slow).ref.revision == "rev-slow"
    assert stage.names() == ["ready", "slow"]


async def test_who_looks_for_a_name_while_it_arrives_does_not_load_it_again(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.source.held() as gate:
        late = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        await stage.registry.load("pirate", f"{ROOT}/pirate")

    assert (await late).ref.revision == "rev-1"
    assert len(stage.files.reads) == 1


async def test_a_small_adapter_does_not_wait_for_the_load_of_a_slow_one(stage: Stage) -> None:
    stage.put("quick", "rev-quick")
    stage.put("slow", "rev-slow")
    with stage.files.held(f"{ROOT}/slow") as gate:
        slow = asyncio.create_task(stage.registry.acquire("slow"))
        await reached(gate)
        assert (await stage.registry.acquire("quick")).ref.name == "quick"
        assert not slow.done()
    await slow


async def test_all_who_ask_for_an_unknown_name_share_one_load(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        asked = [asyncio.create_task(stage.registry.acquire("pirate")) for _ in range(8)]
        await reached(gate)
        late = asyncio.create_task(stage.registry.acquire("pirate"))
        await waiting(stage, ("name", "pirate"), 9)

    leases = await asyncio.gather(*asked, late)

    assert len(stage.files.reads) == 1
    for lease in leases[1:]:
        lease.release()
    assert stage.is_held("rev-1"), "each lease counts"
    leases[0].release()
    assert not stage.is_held("rev-1")


async def test_a_load_is_finished_for_the_next_when_all_who_asked_have_left(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        leaver = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        leaver.cancel()
        await asyncio.wait((leaver,))
        newcomer = asyncio.create_task(stage.registry.acquire("pirate"))
        await waiting(stage, ("name", "pirate"), 2)

    (await newcomer).release()

    assert leaver.cancelled()
    assert len(stage.files.reads) == 1
    assert stage.names() == ["pirate"]
    assert not stage.is_held("rev-1"), "the lease of the one who left was given back"


async def test_who_leaves_as_the_load_ends_holds_nothing(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    leaver: asyncio.Task[AdapterLease]

    def leave() -> float:
        leaver.cancel()
        return 0.0

    stage.registry._named._now = leave  # asked as the name is registered
    leaver = asyncio.create_task(stage.registry.acquire("pirate"))
    await asyncio.wait((leaver,))
    await one_step()
    await one_step()

    assert leaver.cancelled()
    assert stage.names() == ["pirate"]
    assert not stage.is_held("rev-1")


async def test_release_is_idempotent(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    first, second = await stage.registry.acquire("pirate"), await stage.registry.acquire("pirate")

    first.release()
    first.release()

    assert stage.is_held("rev-1")
    second.release()


async def test_unknown_names_are_not_found(stage: Stage) -> None:
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        await stage.registry.acquire("nobody")


@pytest.mark.parametrize(
    "name", ["", "../a", "a/../b", "/etc/passwd", "a//b", "a\\b", "a\n", "\0", "a" * 257]
)
async def test_names_with_tricks_are_not_found_and_not_looked_for(stage: Stage, name: str) -> None:
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire(name)
    with pytest.raises(AdapterInvalid):
        await stage.registry.load(name, f"{ROOT}/a")

    assert stage.source.asked == []


@pytest.mark.parametrize("name", ["pirate", "org/adapter", "org/adapter:v2", "Ünïcode 1", "a" * 256, "..."])
def test_names_that_adapters_may_have(name: str) -> None:
    assert is_adapter_name(name)


async def test_a_broken_adapter_costs_nobody_else_anything(stage: Stage) -> None:
    stage.put("good", "rev-good")
    stage.put("bad", "rev-bad")
    stage.files.spoil(f"{ROOT}/bad", AdapterInvalid("tensor is missing"))

    outcomes = await asyncio.gather(
        *(stage.registry.acquire(name) for name in ("bad", "good", "bad")), return_exceptions=True
    )

    assert [type(outcome) for outcome in outcomes] == [AdapterInvalid, AdapterLease, AdapterInvalid]
    assert stage.names() == ["good"]


async def test_a_failure_expires(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    stage.files.spoil(path, AdapterInvalid("still being copied"))
    for _ in range(3):
        with pytest.raises(AdapterInvalid):
            await stage.registry.acquire("pirate")
    assert len(stage.files.reads) == 1

    stage.put("pirate", "rev-1")
    stage.clock.now += 60

    assert (await stage.registry.acquire("pirate")).ref.revision == "rev-1"


async def test_no_room_for_another_adapter_is_unavailable(stage: Stage) -> None:
    stage.put("a", "rev-a", 60)
    stage.put("b", "rev-b", 60)
    lease = await stage.registry.acquire("a")
    with pytest.raises(AdapterUnavailable):
        await stage.registry.acquire("b")

    lease.release()

    await stage.use("b")
    assert stage.names() == ["a", "b"]


# --- Eviction and change ------------------------------------------------------------------------------------


async def test_an_evicted_name_is_loaded_again_when_it_is_used(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    known = stage.registry.get("pirate")
    assert known is not None
    await stage.crowd_out()
    assert stage.names() == ["pirate"]
    assert not stage.registry.is_loaded(known.ref)

    lease = await stage.registry.acquire("pirate")

    assert lease.ref == known.ref
    assert stage.registry.get("pirate") is known


async def test_files_that_changed_while_evicted_are_another_revision(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    await stage.crowd_out()
    stage.put("pirate", "rev-2")
    stage.unix_time += 100

    lease = await stage.registry.acquire("pirate")

    known = stage.registry.get("pirate")
    assert known is not None
    assert lease.ref == known.ref
    assert (known.ref.revision, known.created) == ("rev-2", 1_763_000_100)


async def test_a_name_whose_sub_folder_is_gone_is_forgotten_once_evicted(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    stage.source.sub_folders.clear()
    await stage.use("pirate")  # loaded: the files are not needed
    await stage.crowd_out()

    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire("pirate")

    assert stage.names() == []


async def test_a_path_that_is_gone_is_not_told_to_requests(stage: Stage) -> None:
    path = f"{ROOT}/secret/place"
    stage.files.put(path, "rev-1")
    await stage.registry.load("pirate", path)
    await stage.crowd_out()
    stage.source.lost.add(path)

    with pytest.raises(AdapterNotFound) as refusal:
        await stage.registry.acquire("pirate")

    assert "secret" not in refusal.value.message
    assert stage.names() == ["pirate"], "the operator named it"


# --- Load ---------------------------------------------------------------------------------------------------


async def test_load_registers_what_clients_may_know(stage: Stage) -> None:
    stage.files.put(f"{ROOT}/x", "rev-1", 30)

    info = await stage.registry.load("org/pirate", f"{ROOT}/x")

    assert (info.ref.name, info.ref.revision) == ("org/pirate", "rev-1")
    assert (info.root, info.source, info.rank, info.num_bytes) == (f"{ROOT}/x", "local", 8, 30)
    assert info.targets == ("q_proj", "v_proj")
    assert info.created == 1_763_000_000
    assert stage.registry.get("org/pirate") == info
    assert not stage.is_held("rev-1")


async def test_loading_the_same_again_changes_nothing(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    first = await stage.registry.load("pirate", path)
    stage.unix_time += 100

    assert await stage.registry.load("pirate", path) is first
    assert await stage.registry.load("pirate", path, load_inplace=True) is first


async def test_a_name_follows_its_content_to_another_folder(stage: Stage) -> None:
    first = await stage.registry.load("pirate", stage.put("old", "rev-1"))
    stage.unix_time += 100

    moved = await stage.registry.load("pirate", stage.put("new", "rev-1"))

    assert (moved.ref, moved.created, moved.root) == (first.ref, first.created, f"{ROOT}/new")
    stage.files.spoil(f"{ROOT}/old", AdapterInvalid("gone"))
    await stage.crowd_out()
    await stage.use("pirate")


async def test_other_content_under_a_known_name_is_refused(stage: Stage) -> None:
    await stage.registry.load("pirate", stage.put("a", "rev-a"))

    with pytest.raises(AdapterInvalid, match="load_inplace"):
        await stage.registry.load("pirate", stage.put("b", "rev-b"))

    assert [info.ref.revision for info in stage.registry.list()] == ["rev-a"]
    assert not stage.is_held("rev-b")


async def test_other_content_in_place_leaves_running_requests_what_they_have(stage: Stage) -> None:
    await stage.registry.load("pirate", stage.put("a", "rev-a"))
    running = await stage.registry.acquire("pirate")

    info = await stage.registry.load("pirate", stage.put("b", "rev-b"), load_inplace=True)

    assert info.ref.revision == "rev-b"
    assert stage.store.get(running.ref.revision).revision == "rev-a"
    assert (await stage.registry.acquire("pirate")).ref.revision == "rev-b"
    running.release()
    assert not stage.store.is_loaded(Revision("rev-a")), "no name means it any more"


async def test_a_request_that_waited_through_a_replacement_gets_what_the_name_means_now(stage: Stage) -> None:
    stage.put("pirate", "rev-old")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        await stage.registry.load("pirate", stage.put("b", "rev-new"))

    assert (await request).ref.revision == "rev-new"
    assert not stage.is_held("rev-old")


async def test_a_request_whose_files_broke_is_served_by_what_replaced_them(stage: Stage) -> None:
    stage.put("pirate", "rev-old")
    stage.files.spoil(f"{ROOT}/pirate", AdapterInvalid("broken"))
    with stage.files.held(f"{ROOT}/pirate") as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        await stage.registry.load("pirate", stage.put("b", "rev-new"))

    (lease := await request).release()
    assert lease.ref.revision == "rev-new"
    assert len(stage.files.reads) == 2
    assert [status.error for status in stage.registry.statuses()] == [None]


async def test_names_of_the_base_model_are_refused(stage: Stage) -> None:
    path = stage.put("base", "rev-1")

    with pytest.raises(AdapterInvalid, match="base model"):
        await stage.registry.load("base", path)
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire("base")


async def test_paths_outside_the_roots_are_refused(stage: Stage) -> None:
    with pytest.raises(AdapterInvalid):
        await stage.registry.load("pirate", "/etc")

    assert stage.files.reads == []


async def test_a_load_that_an_operator_began_is_finished_without_him(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    with stage.files.held(path) as gate:
        load = asyncio.create_task(stage.registry.load("pirate", path))
        await reached(gate)
        load.cancel()
        await asyncio.wait((load,))
        newcomer = asyncio.create_task(stage.registry.acquire("pirate"))
        await waiting(stage, ("name", "pirate"), 1)
        await stage.registry.load("other", stage.put("other", "rev-2"))  # until the newcomer asks for files

    assert (await newcomer).ref.revision == "rev-1"
    assert stage.files.reads.count(Path(path)) == 1


async def test_a_load_after_a_repair_does_not_repeat_the_failure(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    stage.files.spoil(path, AdapterInvalid("broken"))
    with pytest.raises(AdapterInvalid):
        await stage.registry.load("pirate", path)
    stage.put("pirate", "rev-1")

    assert (await stage.registry.load("pirate", path)).ref.revision == "rev-1"


async def test_folders_of_the_command_line_may_lie_anywhere(stage: Stage) -> None:
    info = await stage.registry.register("pirate", stage.files.put("/home/me/pirate", "rev-1"))

    assert info.root == "/home/me/pirate"
    await stage.crowd_out()
    await stage.use("pirate")
    with pytest.raises(AdapterInvalid):
        await stage.registry.register("pirate", stage.files.put("/other", "rev-2"))


async def test_the_list_is_sorted_by_name_and_up_to_date(stage: Stage) -> None:
    for name in ("b", "a/1", "a", "C"):
        await stage.registry.load(name, stage.put(f"of-{name}", f"rev-{name}"))
    assert stage.names() == ["C", "a", "a/1", "b"]
    await stage.registry.unload("a")

    assert stage.names() == ["C", "a/1", "b"]


# --- Swaps --------------------------------------------------------------------------------------------------


async def test_requests_go_on_with_the_old_revision_until_the_new_one_is_there(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    running = await stage.registry.acquire("pirate")
    path = stage.put("pirate", "rev-2")
    with stage.files.held(path) as gate:
        refresh = asyncio.create_task(stage.registry.refresh("pirate", is_settled=True))
        await reached(gate)
        meanwhile = without_suspending(stage.registry.acquire("pirate"))
        assert meanwhile.ref.revision == "rev-1"
    await refresh

    assert without_suspending(stage.registry.acquire("pirate")).ref.revision == "rev-2"
    assert stage.store.get(running.ref.revision).revision == "rev-1"
    running.release()
    assert stage.is_held("rev-1"), "one request is left"
    meanwhile.release()
    assert not stage.store.is_loaded(Revision("rev-1"))


async def test_an_idle_revision_stays_until_its_successor_is_there_if_both_fit(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 50)
    await stage.use("pirate")
    path = stage.put("pirate", "rev-2", 50)
    with stage.files.held(path) as gate:
        refresh = asyncio.create_task(stage.registry.refresh("pirate", is_settled=True))
        await reached(gate)
        assert stage.store.is_loaded(Revision("rev-1"))
        assert stage.store.free_bytes == 0
    await refresh

    assert stage.store.num_bytes == 50
    assert stage.store.is_loaded(Revision("rev-2"))


async def test_a_revision_that_leaves_no_room_for_its_successor_goes_before(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 60)
    await stage.use("pirate")
    stage.put("pirate", "rev-2", 60)

    await stage.registry.refresh("pirate", is_settled=True)

    assert without_suspending(stage.registry.acquire("pirate")).ref.revision == "rev-2"


async def test_a_failed_reload_leaves_the_old_revision_and_says_so_once(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    stage.files.spoil(f"{ROOT}/pirate", AdapterInvalid("tensor 'x' holds NaN"))
    for _ in range(3):
        with pytest.raises(AdapterInvalid):
            await stage.registry.refresh("pirate", is_settled=True)

    assert len(stage.files.reads) == 2, "one of each content"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensor 'x' holds NaN; the revision before is still served" in caplog.text
    status = stage.registry.status("pirate")
    assert status is not None
    assert (status.error, status.is_loaded) == ("tensor 'x' holds NaN", True)
    assert without_suspending(stage.registry.acquire("pirate")).ref.revision == "rev-1"
    assert stage.names() == ["pirate"]

    stage.put("pirate", "rev-2")
    await stage.registry.refresh("pirate", is_settled=True)
    repaired = stage.registry.status("pirate")
    assert repaired is not None
    assert (repaired.error, repaired.info.ref.revision) == (None, "rev-2")


async def test_files_that_change_while_they_are_read_are_not_believed(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    with stage.files.held(path) as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        stage.put("pirate", "rev-2")
    with pytest.raises(AdapterUnavailable, match="being changed"):
        await request

    assert (await stage.registry.acquire("pirate")).ref.revision == "rev-2"


async def test_files_that_break_while_they_are_being_written_are_not_called_broken(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    stage.files.spoil(path, AdapterInvalid("cut short"))
    with stage.files.held(path) as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        stage.put("pirate", "rev-2")
    with pytest.raises(AdapterUnavailable, match="being changed"):
        await request


async def test_the_same_weights_with_another_template_are_a_new_entry_of_one_revision(stage: Stage) -> None:
    stage.put("pirate", "rev-1", extras="old template")
    running = await stage.registry.acquire("pirate")
    stage.put("pirate", "rev-1", extras="new template")

    await stage.registry.refresh("pirate", is_settled=True)

    fresh = await stage.registry.acquire("pirate")
    assert (running.extras, fresh.extras) == ("old template", "new template")
    assert running.ref == fresh.ref
    assert stage.store.num_bytes == 10


async def test_two_names_of_one_revision_have_their_own_templates_and_counts(stage: Stage) -> None:
    stage.put("one", "same", extras="one's")
    stage.put("two", "same", extras="two's")
    one, _, two = [await stage.registry.acquire(name) for name in ("one", "one", "two")]

    assert (one.extras, two.extras) == ("one's", "two's")
    assert stage.store.num_bytes == 10
    assert [status.users for status in stage.registry.statuses()] == [2, 1]


# --- Pins and status ----------------------------------------------------------------------------------------


async def test_a_pinned_name_is_not_evicted(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 60)
    await stage.use("pirate")
    ref = stage.registry.pin("pirate").ref
    assert stage.pins == [frozenset({ref})]

    stage.put("big", "rev-big", 50)
    with pytest.raises(AdapterUnavailable):
        await stage.registry.acquire("big")
    stage.registry.pin("pirate")
    stage.registry.unpin("pirate")
    stage.registry.unpin("pirate")

    await stage.use("big")
    assert not stage.registry.is_loaded(ref)
    assert stage.pins == [frozenset({ref}), frozenset()]


async def test_a_pin_follows_its_name_to_the_next_revision(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    stage.registry.pin("pirate")
    stage.put("pirate", "rev-2")

    await stage.registry.refresh("pirate", is_settled=True)

    assert [{ref.revision for ref in pins} for pins in stage.pins] == [{"rev-1"}, {"rev-2"}]
    assert not stage.store.is_loaded(Revision("rev-1"))
    await stage.crowd_out()
    assert stage.store.is_loaded(Revision("rev-2"))
    await stage.registry.unload("pirate")
    assert stage.pins[-1] == frozenset()
    assert stage.store.num_bytes == 0


async def test_pinning_what_is_not_loaded_loads_it(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.registry.refresh("pirate", is_settled=True)
    assert stage.registry.pin("pirate").revision is None
    assert stage.pins == []

    lease = await stage.registry.acquire("pirate")

    assert stage.files.reads == [Path(f"{ROOT}/pirate")], "the pin's load was joined"
    assert stage.pins == [frozenset({lease.ref})]


async def test_loading_may_pin(stage: Stage) -> None:
    info = await stage.registry.load("pirate", stage.put("pirate", "rev-1"), is_pinned=True)
    await stage.registry.load("pirate", f"{ROOT}/pirate", is_pinned=True)

    assert stage.pins == [frozenset({info.ref})]
    status = stage.registry.status("pirate")
    assert status is not None
    assert status.is_pinned


async def test_what_is_not_known_cannot_be_pinned(stage: Stage) -> None:
    with pytest.raises(AdapterNotFound):
        stage.registry.pin("nobody")
    with pytest.raises(AdapterNotFound):
        stage.registry.unpin("nobody")
    assert stage.registry.status("nobody") is None


async def test_status_counts_uses_and_loads(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        stage.clock.now += 1.5
    lease = await request
    [status] = stage.registry.statuses()
    assert (status.is_loaded, status.users, status.loads, status.load_seconds) == (True, 1, 1, 1.5)
    assert status.last_used == stage.unix_time
    assert stage.loads == [("pirate", 1.5)]

    stage.unix_time += 10
    lease.release()
    await stage.crowd_out()

    [status] = stage.registry.statuses()
    assert (status.is_loaded, status.users, status.loads, status.last_used) == (False, 0, 1, stage.unix_time)
    await stage.use("pirate")
    assert stage.registry.statuses()[0].loads == 2


# --- Outlines -----------------------------------------------------------------------------------------------


async def test_an_adapter_is_listed_by_its_outline_before_anybody_reads_it(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 30)

    await stage.registry.refresh("pirate", is_settled=True)

    [info] = stage.registry.list()
    assert (info.rank, info.targets, info.num_bytes) == (8, ("q_proj", "v_proj"), 30)
    assert (info.ref.revision, info.revision) == (UNREAD, None)
    assert not stage.registry.is_loaded(info.ref)
    assert stage.files.reads == []
    stage.unix_time += 100
    lease = await stage.registry.acquire("pirate")
    assert lease.ref.revision == "rev-1"
    assert stage.registry.list() == (lease.info,)
    assert lease.info.created == 1_763_000_000, "it was there before"
    assert len(stage.files.outlines) == 1, "its size is known"


async def test_what_turns_out_to_be_broken_is_not_offered_any_more(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    stage.files.spoil(f"{ROOT}/pirate", AdapterInvalid("tensor 'x' holds NaN"))
    await stage.registry.refresh("pirate", is_settled=True)
    assert stage.names() == ["pirate"]

    with pytest.raises(AdapterInvalid):
        await stage.registry.acquire("pirate")

    assert stage.names() == []
    assert stage.registry.get("pirate") is None
    assert [status.error for status in stage.registry.statuses()] == ["tensor 'x' holds NaN"]


async def test_unread_files_that_change_are_outlined_again(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 10)
    await stage.registry.refresh("pirate", is_settled=True)
    await stage.registry.refresh("pirate", is_settled=True)
    assert len(stage.files.outlines) == 1

    stage.put("pirate", "rev-2", 20)
    await stage.registry.refresh("pirate", is_settled=True)

    assert [info.num_bytes for info in stage.registry.list()] == [20]
    assert stage.files.reads == []


async def test_a_sub_folder_does_not_take_a_name_that_stands_for_another_folder(stage: Stage) -> None:
    await stage.registry.register("pirate", stage.files.put("/home/me/pirate", "rev-1"))
    stage.put("pirate", "rev-2")

    await stage.registry.refresh("pirate", is_settled=True)

    assert [info.root for info in stage.registry.list()] == ["/home/me/pirate"]


async def test_a_sub_folder_that_was_loaded_by_its_path_is_followed_too(stage: Stage) -> None:
    await stage.registry.load("pirate", stage.put("pirate", "rev-1"))
    stage.put("pirate", "rev-2")

    await stage.registry.refresh("pirate", is_settled=True)

    assert [info.ref.revision for info in stage.registry.list()] == ["rev-2"]


async def test_the_same_files_are_not_read_again_for_a_controller_that_repeats_itself(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    for _ in range(3):
        await stage.registry.load("pirate", path)

    assert len(stage.files.reads) == 1


async def test_an_unread_name_is_not_replaced_by_another_folder_without_a_word(stage: Stage) -> None:
    path = stage.put("pirate", "rev-1")
    await stage.registry.refresh("pirate", is_settled=True)

    with pytest.raises(AdapterInvalid, match="load_inplace"):
        await stage.registry.load("pirate", stage.put("b", "rev-b"))
    assert (await stage.registry.load("pirate", path)).ref.revision == "rev-1"


# --- Unload -------------------------------------------------------------------------------------------------


async def test_unload_forgets_the_name_at_once_and_the_weights_with_the_last_lease(stage: Stage) -> None:
    path = f"{ROOT}/elsewhere/pirate"
    stage.files.put(path, "rev-1")
    await stage.registry.load("pirate", path)
    first, last = await stage.registry.acquire("pirate"), await stage.registry.acquire("pirate")

    told = await stage.registry.unload("pirate")

    assert told == Unloaded("pirate", Revision("rev-1"), num_bytes=0, users=2)
    assert stage.registry.get("pirate") is None
    with pytest.raises(AdapterNotFound):
        await stage.registry.acquire("pirate")
    first.release()
    assert stage.store.get(last.ref.revision).revision == "rev-1"
    last.release()
    assert stage.store.num_bytes == 0


async def test_unloading_what_is_not_there_says_so(stage: Stage) -> None:
    assert await stage.registry.unload("pirate") is None


async def test_unloading_what_nobody_uses_frees_its_bytes_now(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 30)
    await stage.use("pirate")

    assert await stage.registry.unload("pirate") == Unloaded("pirate", Revision("rev-1"), 30, users=0)
    assert stage.store.num_bytes == 0


async def test_an_unloaded_sub_folder_is_found_again(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    await stage.use("pirate")
    await stage.registry.unload("pirate")
    stage.put("pirate", "rev-2")

    assert (await stage.registry.acquire("pirate")).ref.revision == "rev-2"


async def test_unloading_one_of_two_names_leaves_the_weights_to_the_other(stage: Stage) -> None:
    for name in ("one", "other"):
        await stage.registry.load(name, stage.put(name, "shared"))
    assert stage.store.num_bytes == 10

    await stage.registry.unload("one")
    assert without_suspending(stage.registry.acquire("other")).ref.name == "other"

    await stage.registry.unload("other")
    assert stage.is_held("shared")


async def test_a_name_unloaded_while_it_is_loaded_again_is_not_registered_behind_its_back(
    stage: Stage,
) -> None:
    path = f"{ROOT}/elsewhere"
    stage.files.put(path, "rev-1")
    await stage.registry.load("pirate", path)
    await stage.crowd_out()
    with stage.files.held(path) as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        await stage.registry.unload("pirate")

    with pytest.raises(AdapterNotFound):
        await request
    assert stage.names() == []
    assert not stage.is_held("rev-1")


# --- Real folders, the end ----------------------------------------------------------------------------------


async def test_names_lead_only_to_sub_folders_of_the_adapters_folder(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    inside, outside = tmp_path / "adapters" / "pirate", tmp_path / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "adapters" / "link").symlink_to(outside)
    files = FakeFiles()
    for folder in (inside, outside):
        files.put(str(folder.resolve()), folder.name)
    source = LocalSource((), tmp_path / "adapters")
    registry = AdapterRegistry(AdapterStore(pool, 100), source, files.files, pool, pool)

    assert (await registry.acquire("pirate")).ref.revision == "pirate"
    for name in ("link", "outside", "../outside", str(outside)):
        with pytest.raises(AdapterError):
            await registry.acquire(name)
    with pytest.raises(AdapterInvalid):
        await registry.load("other", str(outside))
    assert [info.ref.name for info in registry.list()] == ["pirate"]


async def test_closing_ends_those_who_still_wait(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        request = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        await stage.registry.close()
        with pytest.raises(AdapterUnavailable, match="shutting down"):
            await request

    assert not stage.is_held("rev-1")


async def test_closing_ends_loads_that_nobody_waits_for(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    with stage.files.held(f"{ROOT}/pirate") as gate:
        leaver = asyncio.create_task(stage.registry.acquire("pirate"))
        await reached(gate)
        leaver.cancel()
        await asyncio.wait((leaver,))
        await stage.registry.close()
        await one_step()

    assert stage.registry._flights._flights == {}
    assert not stage.is_held("rev-1")


async def test_a_bug_that_nobody_waits_for_is_logged(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.put("pirate", "rev-1")

    def fail() -> float:
        leaver.cancel()
        raise ZeroDivisionError

    stage.registry._named._now = fail
    leaver = asyncio.create_task(stage.registry.acquire("pirate"))
    await asyncio.wait((leaver,))
    await one_step()
    await one_step()

    assert "unforeseen" in caplog.text


# --- What whoever counts is told --------------------------------------------------------------------------


async def test_every_failed_load_is_told_once_and_a_remembered_one_not_again(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    error = AdapterInvalid("broken")
    stage.files.spoil(f"{ROOT}/pirate", error)
    for _ in range(3):
        with pytest.raises(AdapterInvalid):
            await stage.use("pirate")
    assert stage.failures == [error]
    assert stage.loads == []


async def test_only_copies_that_made_room_for_others_count_as_evicted(stage: Stage) -> None:
    stage.put("pirate", "rev-1", 60)
    await stage.use("pirate")
    await stage.registry.unload("pirate")
    assert stage.registry.num_evicted == 0
    stage.put("sailor", "rev-2", 60)
    await stage.use("pirate")
    await stage.use("sailor")
    assert stage.registry.num_evicted == 1


# --- Adopting a folder that the server itself has filled --------------------------------------------------


async def test_an_adopted_sub_folder_is_loaded_pinned_and_goes_with_its_folder(stage: Stage) -> None:
    stage.put("pirate", "rev-1")
    info = await stage.registry.adopt("pirate", is_pinned=True)
    status = stage.registry.status("pirate")
    assert (info.revision, status and status.is_pinned) == ("rev-1", True)
    stage.source.sub_folders.discard("pirate")
    await stage.registry.refresh("pirate", is_settled=True)
    assert stage.registry.status("pirate") is None


async def test_adopting_takes_a_name_over_only_if_it_is_told_to(stage: Stage) -> None:
    await stage.registry.register("pirate", stage.files.put("/elsewhere", "rev-0"))
    stage.put("pirate", "rev-1")
    with pytest.raises(AdapterInvalid, match="other content"):
        await stage.registry.adopt("pirate")
    info = await stage.registry.adopt("pirate", load_inplace=True)
    assert (info.revision, info.root) == ("rev-1", f"{ROOT}/pirate")


async def test_what_is_not_there_cannot_be_adopted(stage: Stage) -> None:
    with pytest.raises(AdapterNotFound):
        await stage.registry.adopt("nobody")
    with pytest.raises(AdapterInvalid):
        await stage.registry.adopt("base")
