"""What all routes share: the phase the process is in, its service once there is one, and the options of the
HTTP layer.

The port is bound before the model is loaded, so every route must be able to say "not yet". `require_service`
is the only way to the engine, and it refuses with 503 and Retry-After in every phase but READY.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from adapters.types import Clock
from server.api.adapters.uploads import Uploads
from server.api.intake import Intake
from server.api.ports import Metrics, Service
from server.api.replay import Recordings, ReplayLimits
from server.api.responses.conversations import ResponseStore
from server.api.shares import ShareOptions
from server.errors import Overloaded, Unavailable
from server.inferless.apps import Apps

_RETRY_AFTER_S = 5
_QUEUE_RETRY_S = 1


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # running streams end, new requests are refused
    FAILED = "failed"  # the engine died


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """What an operator chooses about the HTTP layer."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    api_keys_file: Path | None = None
    open_metrics: bool = False  # /metrics without the key
    allowed_origins: tuple[str, ...] = ("*",)
    max_body_bytes: int = 8 * 2**20
    header_deadline_s: float = 10.0  # how long a response head waits for the first token
    keep_alive_s: float = 15.0  # silence after which a stream carries a comment
    send_timeout_s: float = 30.0  # how long a client may not read
    replay: ReplayLimits = field(default_factory=ReplayLimits)  # of streams that can be gone on with
    default_max_tokens: int | None = None  # None: what the context leaves
    max_stop_strings: int = 4  # on OpenAI routes
    max_choices: int = 128  # over one prompt
    max_prompts: int = 1024  # of one request, times its choices over each
    unload_timeout_s: float = 30.0  # how long the requests of an app that is unloaded may go on
    max_preparing: int = 1024  # requests that wait for their adapter, or for a thread to tokenise them
    shares: ShareOptions = field(default_factory=ShareOptions)  # of tenants, and their hard limits
    num_workers: int = 4  # threads that validate and tokenise what is long

    @property
    def asks_for_key(self) -> bool:
        """Whether requests must bring a key."""
        return self.api_key is not None or self.api_keys_file is not None


def _new_id() -> str:
    return uuid.uuid4().hex


def _unix_time() -> int:
    return int(time.time())


@dataclass(slots=True)
class ServerState:
    """Lives as long as the process; changed by the event loop only."""

    options: ApiOptions = field(default_factory=ApiOptions)
    version: str = "0"
    service: Service | None = None
    metrics: Metrics | None = None
    apps: Apps = field(default_factory=Apps)  # Inferless ones; none unless the operator names folders
    phase: Phase = Phase.LOADING
    uploads: Uploads | None = None  # of adapters
    progress: Callable[[], str] = field(default=lambda: "starting")
    responses: ResponseStore = field(default_factory=ResponseStore)
    intake: Intake = field(default_factory=Intake)
    num_active: int = 0  # generation requests between receipt and last byte
    num_preparing: int = 0  # requests that wait for their adapter, or for a thread to tokenise them
    clock: Clock = time.monotonic
    unix_time: Callable[[], int] = _unix_time
    unix_time_ns: Callable[[], int] = time.time_ns
    new_id: Callable[[], str] = _new_id
    recordings: Recordings = field(init=False)

    def __post_init__(self) -> None:
        self.recordings = Recordings(self.options.replay, self.clock)

    @property
    def is_alive(self) -> bool:
        """Whether the process can still do what it was started for."""
        if self.phase is Phase.FAILED:
            return False
        return self.service is None or self.service.is_alive

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around what a request waits for before the service takes it in. Raises: Overloaded."""
        if self.num_preparing >= self.options.max_preparing:
            raise Overloaded("too many requests are waiting for their adapters", retry_after_s=_QUEUE_RETRY_S)
        self.num_preparing += 1
        try:
            yield
        finally:
            self.num_preparing -= 1

    def require_service(self) -> Service:
        """Raises: Unavailable in every phase but READY."""
        if not self.is_alive:
            raise Unavailable("the engine has failed; the server is going down", retry_after_s=_RETRY_AFTER_S)
        if self.phase is Phase.DRAINING:
            raise Unavailable("the server is going down", retry_after_s=_RETRY_AFTER_S)
        if self.phase is Phase.LOADING or self.service is None:
            raise Unavailable(f"the model is loading ({self.progress()})", retry_after_s=_RETRY_AFTER_S)
        return self.service
