"""How answers about jobs look: the frames of TuneOS's wizard and nothing beside them."""

import json
from collections.abc import Iterable, Sequence

from server.api.records import EVENT_STREAM, WholeChoice
from server.api.shapes import to_json
from server.errors import ServeError
from server.types import TokenEvent

DONE = b"data: [DONE]\n\n"
RETRY_MS = 2000  # after which a browser comes back; in the first event


class JobWriter:
    """Writes one stream: a frame per token that completes text, then [DONE]. Ids are put before by others."""

    framing = EVENT_STREAM

    def __init__(self) -> None:
        self._has_begun = False

    def frames(self, events: Sequence[TokenEvent], *, join: bool) -> Iterable[bytes]:
        texts = [event.text for event in events if event.text]
        if join and texts:
            texts = ["".join(texts)]
        return [self._event(_member("token", text)) for text in texts]

    def end(self) -> Iterable[bytes]:
        return (self._event(DONE),)

    def failure(self, error: ServeError) -> Iterable[bytes]:
        return self._event(_member("error", error.message)), self._event(DONE)

    def _event(self, frame: bytes) -> bytes:
        if self._has_begun:
            return frame
        self._has_begun = True
        return f"retry: {RETRY_MS}\n".encode("ascii") + frame


def whole_body(choice: WholeChoice) -> bytes:
    """{"response": "..."}"""
    return to_json({"response": choice.finish.generated_text})


def _member(name: str, text: str) -> bytes:
    """One event; with the blank after the colon that the wizard's frames have."""
    return f"data: {json.dumps({name: text})}\n\n".encode("ascii")
