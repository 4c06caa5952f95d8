"""Conversations that outlive their requests: what `/v1/responses` keeps in memory, and for whom.

A kept response holds its whole conversation, not a link to the one before it, so any of them can be dropped
or deleted without breaking those that continue it. Strings are shared between them, and counted for each:
the bound is on the safe side. The oldest go first. Whole answers are written in the pool, hence the lock.
"""

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

from server.api.messages import role_in_templates

_ITEM_BYTES = 700  # of the records, dictionaries and ids around an item's text, rounded up


@dataclass(frozen=True, slots=True)
class Item:
    """One message, with its parts as they were sent."""

    id: str
    role: str
    texts: tuple[str, ...]

    @property
    def message(self) -> dict[str, object]:
        """As chat templates expect it."""
        return {"role": role_in_templates(self.role), "content": "".join(self.texts)}

    @property
    def num_bytes(self) -> int:
        size = sum(map(sys.getsizeof, self.texts))
        return _ITEM_BYTES + (size if len(self.texts) == 1 else 2 * size)  # the message joins them

    def to_json(self) -> dict[str, object]:
        """As lists show it."""
        return {
            "id": self.id,
            "type": "message",
            "status": "completed",
            "role": self.role,
            "content": [self._part(text) for text in self.texts],
        }

    def _part(self, text: str) -> dict[str, object]:
        if self.role == "assistant":
            return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
        return {"type": "input_text", "text": text}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, as they are listed and as templates take them."""

    items: tuple[Item, ...] = ()
    messages: tuple[dict[str, object], ...] = ()
    num_chars: int = 0
    num_bytes: int = 0

    def and_then(self, *items: Item) -> "Conversation":
        """This conversation and what follows."""
        return Conversation(
            items=self.items + items,
            messages=self.messages + tuple(item.message for item in items),
            num_chars=self.num_chars + sum(len(text) for item in items for text in item.texts),
            num_bytes=self.num_bytes + sum(item.num_bytes for item in items),
        )


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response that has ended."""

    id: str
    body: bytes  # the object, as it was answered
    conversation: Conversation  # up to and with the answer
    num_inputs: int  # items of it that went into the model

    @property
    def inputs(self) -> tuple[Item, ...]:
        return self.conversation.items[: self.num_inputs]

    @property
    def num_bytes(self) -> int:
        return len(self.body) + self.conversation.num_bytes


class ResponseStore:
    """Kept responses, found by owner and id only."""

    def __init__(self, max_responses: int = 10_000, max_bytes: int = 64 * 2**20) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], KeptResponse] = OrderedDict()
        self._lock = threading.Lock()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, owner: str, response: KeptResponse) -> None:
        """Keep it, at the cost of the oldest ones. One that is larger than the store is not kept."""
        with self._lock:
            self._drop((owner, response.id))
            if response.num_bytes > self._max_bytes:
                return
            self._kept[owner, response.id] = response
            self._num_bytes += response.num_bytes
            while self._num_bytes > self._max_bytes or len(self._kept) > self._max_responses:
                self._drop(next(iter(self._kept)))

    def get(self, owner: str, id: str) -> KeptResponse | None:
        with self._lock:
            return self._kept.get((owner, id))

    def delete(self, owner: str, id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            return self._drop((owner, id))

    def _drop(self, key: tuple[str, str]) -> bool:
        response = self._kept.pop(key, None)
        if response is None:
            return False
        self._num_bytes -= response.num_bytes
        return True
