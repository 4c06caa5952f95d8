"""The store keeps what it says, for whom it says, within its bounds; oldest out first."""

import random
import tracemalloc

import pytest

from server.api.responses.conversations import Conversation, Item, KeptResponse, ResponseStore
from server.app import Application
from server.settings import Settings


def kept(id: str, text: str = "Hi", body: bytes = b"{}") -> KeptResponse:
    conversation = Conversation().and_then(Item(f"msg_{id}", "user", (text,)))
    return KeptResponse(id, body, conversation, num_inputs=1)


def test_a_response_is_there_for_its_owner_only() -> None:
    store = ResponseStore()
    store.put("alice", kept("r1"))

    assert store.get("alice", "r1") == kept("r1")
    assert store.get("bob", "r1") is None
    assert not store.delete("bob", "r1")
    assert store.delete("alice", "r1")
    assert store.get("alice", "r1") is None
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_oldest_make_room_by_number() -> None:
    store = ResponseStore(max_responses=2)
    for id in ("r1", "r2", "r3"):
        store.put("alice", kept(id))

    assert [store.get("alice", id) is not None for id in ("r1", "r2", "r3")] == [False, True, True]


def test_the_oldest_make_room_by_bytes_whoever_they_belong_to() -> None:
    store = ResponseStore(max_bytes=3 * kept("r1").num_bytes)
    for owner in ("alice", "bob", "carol"):
        store.put(owner, kept("r1"))
    store.put("dave", kept("r1", body=b"x" * kept("r1").num_bytes))  # as large as two

    assert [store.get(owner, "r1") is not None for owner in ("alice", "bob", "carol", "dave")] == [
        False,
        False,
        True,
        True,
    ]


def test_what_is_larger_than_the_store_is_not_kept_and_drives_nobody_out() -> None:
    store = ResponseStore(max_bytes=2 * kept("r1").num_bytes)
    store.put("alice", kept("r1"))
    store.put("alice", kept("r2", body=b"x" * 10_000))

    assert store.get("alice", "r1") is not None
    assert store.get("alice", "r2") is None


def test_a_store_without_memory_keeps_nothing() -> None:
    store = ResponseStore(max_bytes=0)
    store.put("alice", kept("r1"))

    assert len(store) == 0


def test_putting_the_same_id_again_replaces_it() -> None:
    store = ResponseStore()
    store.put("alice", kept("r1", body=b"old"))
    store.put("alice", kept("r1", body=b"new"))

    found = store.get("alice", "r1")
    assert found is not None
    assert found.body == b"new"
    assert (len(store), store.num_bytes) == (1, found.num_bytes)


def test_bytes_are_those_of_what_is_there_after_many_changes() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    store = ResponseStore(max_responses=20, max_bytes=30_000)
    for _ in range(500):
        owner, id = draw.choice("ab"), f"r{draw.randrange(40)}"
        if draw.random() < 0.2:
            store.delete(owner, id)
        else:
            store.put(owner, kept(id, "é" * draw.randrange(2000)))
        there = [found for o in "ab" for i in range(40) if (found := store.get(o, f"r{i}")) is not None]
        assert store.num_bytes == sum(response.num_bytes for response in there) <= 30_000
        assert len(store) == len(there) <= 20


def test_bytes_cover_what_python_takes_for_a_conversation() -> None:
    """A bound that was far below the truth would bound nothing."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    conversation = Conversation()
    for i in range(200):
        texts = (f"{i} " * 50, f"and {i}")
        conversation = conversation.and_then(Item(f"msg_{'0' * 32}_{i}", "user", texts))
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    assert conversation.num_bytes >= taken


def test_a_conversation_goes_on_without_changing_what_was_before() -> None:
    first = Conversation().and_then(Item("a", "developer", ("Be ", "brief.")))
    both = first.and_then(Item("b", "user", ("Hi",)))

    assert first.messages == ({"role": "system", "content": "Be brief."},)
    assert both.messages == (*first.messages, {"role": "user", "content": "Hi"})
    assert (first.num_chars, both.num_chars) == (9, 11)
    assert both.num_bytes > first.num_bytes > 9


@pytest.mark.parametrize(("size", "is_kept"), [("0", False), ("1KiB", True), (None, True)])
def test_operators_choose_how_much_is_kept(
    monkeypatch: pytest.MonkeyPatch, size: str | None, is_kept: bool
) -> None:
    if size is not None:
        monkeypatch.setenv("MOTET_RESPONSE_STORE_BYTES", size)
    store = Application(Settings(), "http://127.0.0.1:0").state.responses
    store.put("alice", kept("r1"))

    assert (len(store) == 1) is is_kept
