"""A service, a tokenizer and a registry whose every answer the test has written down. No engine, no torch.

One character is one token, and its id is its code point. A stream either plays a script at once, one event
per read, or waits for the test to put events into it (`service.is_manual`).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import AdapterInvalid, AdapterNotFound
from adapters.types import (
    AdapterInfo,
    AdapterPart,
    AdapterRef,
    AdapterStatus,
    AdapterUse,
    Revision,
    Unloaded,
)
from server.engine.card import ModelCard
from server.errors import ModelNotFound, ServeError, TemplateFailed
from server.types import (
    Alternative,
    Finish,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    Retired,
    SamplingDefaults,
    Timing,
    TokenEvent,
    Usage,
)
from server.wishes import NO_WISH, AdapterWish

BOS = 1
TIMING = Timing(received=100.0, queued=100.002, started=100.005, first_token=100.030, last_token=100.050)


@dataclass(frozen=True)
class FakeSpan:
    id: int
    text: str
    start: int
    stop: int


class FakeTokenizer:
    """One character, one token."""

    vocab_size = 0x110000
    max_token_chars = 4

    def __init__(self) -> None:
        self.chat_pool: ThreadPoolExecutor | None = None
        self.has_chat_template = True
        self.chat_template: str | None = "{{ messages }}"
        self.rendered: list[dict[str, object]] = []  # messages of the last chat
        self.num_encoded = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded += 1
        return [BOS] * add_special_tokens + [ord(character) for character in text]

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> list[FakeSpan]:
        spans = [FakeSpan(ord(c), c, i, i + 1) for i, c in enumerate(text)]
        return [FakeSpan(BOS, "", 0, 0)] * add_special_tokens + spans

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i == BOS))

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        if messages[0]["role"] == "tool":
            raise TemplateFailed("the chat template refused the messages: tool comes first", param="messages")
        self.rendered = list(messages)
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + "<assistant>" * (add_generation_prompt and not continue_final_message)

    def token_text(self, token_id: int) -> str:
        return self.special_text(token_id) or chr(token_id)

    def special_text(self, token_id: int) -> str | None:
        return {BOS: "<s>", 2: "</s>"}.get(token_id)

    def spell_token(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class FakeLease:
    """Of the registry's, for one adapter, and of the service's, for what a request uses."""

    def __init__(
        self, ref: AdapterRef, *, use: AdapterUse | None = None, source: str = "local", **facts: Any
    ) -> None:
        """`facts`: of the adapter."""
        self.ref = ref
        self.info = info_of(ref, source=source, **facts)
        self.use = use or AdapterUse.of(ref)
        self.names = tuple(part.ref.name for part in self.use.parts)
        self.source = source
        self.invocation_tokens: tuple[int, ...] = ()
        self.extras: FakeTokenizer | None = None
        self.num_released = 0

    def release(self) -> None:
        self.num_released += 1


def info_of(ref: AdapterRef, root: str = "/adapters/one", **facts: Any) -> AdapterInfo:
    usual = {
        "source": "local",
        "rank": 8,
        "targets": ("q_proj",),
        "num_bytes": 1000,
        "created": 1763000000,
    }
    return AdapterInfo(ref=ref, root=root, **{**usual, **facts})


class FakeRegistry:
    def __init__(self) -> None:
        self.adapters: dict[str, AdapterInfo] = {}
        self.evicted: set[str] = set()  # names whose weights are not in memory
        self.tokenizers: dict[str, FakeTokenizer] = {}  # of adapters that have their own
        self.revision_of: Callable[[str], Revision] = lambda root: Revision(f"rev-{root}")
        self.pinned: set[str] = set()
        self.users: dict[str, int] = {}  # leases by name
        self.errors: dict[str, str] = {}  # of the last attempt to load
        self.loads: list[dict[str, object]] = []  # what was asked for beside name and path
        self.folder = Path("/adapters")  # where those lie that are adopted
        self.adopted: list[str] = []

    def add(self, name: str, root: str = "/adapters/one", source: str = "local") -> AdapterInfo:
        info = info_of(AdapterRef(name, self.revision_of(root)), root, source=source)
        self.adapters[name] = info
        return info

    async def load(
        self,
        name: str,
        path: str,
        *,
        source: str | None = None,
        token: str | None = None,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        self.loads.append({"path": path, "source": source, "token": token})
        if source in (None, "local") and not path.startswith("/adapters/"):
            raise AdapterInvalid(f"adapter {name!r} is outside of the folders that may be loaded from")
        known = self.adapters.get(name)
        if known is not None and known.root != path and not load_inplace:
            raise AdapterInvalid(f"adapter {name!r} is loaded with other content; pass load_inplace")
        self.pinned |= {name} if is_pinned else set()
        return self.add(name, path, source or "local")

    async def register(
        self,
        name: str,
        folder: Path,
        *,
        source: str,
        load_inplace: bool = False,
        is_pinned: bool = False,
    ) -> AdapterInfo:
        return await self.load(
            name, str(folder), source=source, load_inplace=load_inplace, is_pinned=is_pinned
        )

    async def adopt(self, name: str, *, load_inplace: bool = False, is_pinned: bool = False) -> AdapterInfo:
        self.pinned |= {name} if is_pinned else set()
        self.adopted.append(name)
        return self.add(name, str(self.folder / name), "upload")

    async def unload(self, name: str, *, force: bool = False) -> Unloaded | None:
        info = self.adapters.pop(name, None)
        self.pinned.discard(name)
        users = self.users.get(name, 0)
        return None if info is None else Unloaded(name, info.revision, 0 if users else info.num_bytes, users)

    def pin(self, name: str) -> AdapterInfo:
        info = self._known(name)
        self.pinned.add(name)
        return info

    def unpin(self, name: str) -> AdapterInfo:
        info = self._known(name)
        self.pinned.discard(name)
        return info

    def status(self, name: str) -> AdapterStatus | None:
        info = self.adapters.get(name)
        if info is None:
            return None
        return AdapterStatus(
            info=info,
            is_loaded=name not in self.evicted,
            is_pinned=name in self.pinned,
            users=self.users.get(name, 0),
            last_used=1763000100.0,
            loads=1,
            load_seconds=0.25,
            error=self.errors.get(name),
        )

    def statuses(self) -> tuple[AdapterStatus, ...]:
        return tuple(status for name in sorted(self.adapters) if (status := self.status(name)) is not None)

    def _known(self, name: str) -> AdapterInfo:
        if name not in self.adapters:
            raise AdapterNotFound(f"there is no adapter {name!r}")
        return self.adapters[name]

    def list(self) -> tuple[AdapterInfo, ...]:
        return tuple(sorted(self.adapters.values(), key=lambda info: info.ref.name))

    def get(self, name: str) -> AdapterInfo | None:
        return self.adapters.get(name)

    def is_loaded(self, ref: AdapterRef) -> bool:
        return ref.name not in self.evicted


def token_event(
    text: str,
    *,
    index: int = 0,
    id: int | None = None,
    shown: str | None = None,
    is_special: bool = False,
    alternatives: tuple[Alternative, ...] = (),
    finish: Finish | None = None,
) -> TokenEvent:
    """`text` is what is certain now, `shown` the token's own share (default: the same)."""
    token = GeneratedToken(
        id=ord((text or "?")[0]) if id is None else id,
        text=text if shown is None else shown,
        is_special=is_special,
        logprob=-0.25,
        alternatives=alternatives,
    )
    return TokenEvent(index, text, token, finish)


def finish_of(
    request: GenerationRequest,
    text: str,
    num_generated: int,
    *,
    reason: FinishReason = FinishReason.LENGTH,
    stop: str | int | None = None,
    error: str | None = None,
    index: int = 0,
) -> Finish:
    return Finish(
        reason=reason,
        generated_text=text,
        usage=Usage(len(request.prompt_of(index)), num_generated, cached_tokens=0),
        timing=TIMING,
        seed=7,
        stop=stop,
        error=error,
    )


Script = Callable[[GenerationRequest], Sequence[TokenEvent]]


def words(*pieces: str, reason: FinishReason = FinishReason.LENGTH, stop: str | int | None = None) -> Script:
    """Every choice says these pieces and ends with the last one."""

    def script(request: GenerationRequest) -> list[TokenEvent]:
        events = []
        for position, piece in enumerate(pieces):
            is_last = position == len(pieces) - 1
            for index in range(request.num_choices):
                finish = None
                if is_last:
                    text, num = "".join(pieces), len(pieces)
                    finish = finish_of(request, text, num, reason=reason, stop=stop, index=index)
                events.append(token_event(piece, index=index, finish=finish))
        return events

    return script


def sentence_with_eos(*pieces: str) -> Script:
    """Pieces, then an end-of-sequence token."""

    def script(request: GenerationRequest) -> list[TokenEvent]:
        finish = finish_of(request, "".join(pieces), len(pieces) + 1, reason=FinishReason.STOP)
        return [
            *(token_event(piece) for piece in pieces),
            token_event("", id=2, shown="</s>", is_special=True, finish=finish),
        ]

    return script


_OTHERS = (Alternative(ord("i"), -0.125), Alternative(ord("e"), -2.0))


def scored(request: GenerationRequest) -> list[TokenEvent]:
    """The prompt of each choice with its log-probabilities, then "ab" if anything is to be generated."""
    events = []
    for index in range(request.num_choices):
        first, *rest = request.prompt_of(index)
        count = request.sampling.num_prompt_logprobs
        others = _OTHERS[: count or 0]
        prompt = (_prompt_token(first, None, ()), *(_prompt_token(one, -0.5, others) for one in rest))
        told = prompt if count is not None else ()
        if request.stop.max_tokens == 0:
            finish = finish_of(request, "", 0, index=index)
            events.append(TokenEvent(index, "", None, finish, told))
            continue
        began = token_event("a", index=index)
        events.append(TokenEvent(index, "a", began.token, None, told))
        events.append(token_event("b", index=index, finish=finish_of(request, "ab", 2, index=index)))
    return events


def _prompt_token(token_id: int, logprob: float | None, others: tuple[Alternative, ...]) -> GeneratedToken:
    is_special = token_id == BOS
    return GeneratedToken(token_id, "<s>" if is_special else chr(token_id), is_special, logprob, others)


class FakeStream:
    """Yields what is put into it; one event per read from a script, everything pending otherwise."""

    def __init__(self, request: GenerationRequest, lease: FakeLease | None, service: "FakeService") -> None:
        self.request = request
        self.request_id = request.request_id
        self.num_prompt = request.num_prompt_tokens
        self._lease = lease
        self._service = service
        self._pending: deque[TokenEvent] = deque()
        self._news = asyncio.Event()
        self._listener: Callable[[], None] | None = None
        self._num_unfinished = request.num_choices
        self.is_closed = False
        self.closed = asyncio.Event()
        self.is_paused = False
        self.num_pauses = 0
        self.failure: Exception | None = None

    def put(self, *events: TokenEvent) -> None:
        self._pending += events
        self._tell()

    def end_without_finish(self) -> None:
        self._num_unfinished = 0
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        if self._listener is not None:
            asyncio.get_running_loop().call_soon(self._call)

    def _call(self) -> None:
        if self._listener is not None:
            self._listener()

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> tuple[TokenEvent, ...]:
        while not (taken := self.take()):
            if taken is None:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return taken

    def take(self) -> tuple[TokenEvent, ...] | None:
        if not self._pending:
            if self.failure is not None:
                raise self.failure
            if self._num_unfinished == 0 or self.is_closed:
                self.close()
                return None
        count = len(self._pending) if self._service.is_manual else min(1, len(self._pending))
        taken = tuple(self._pending.popleft() for _ in range(count))
        self._num_unfinished -= sum(event.finish is not None for event in taken)
        if self._pending:
            self._tell()
        return taken

    def listen(self, listener: Callable[[], None] | None) -> None:
        self._listener = listener
        if self._pending or self._num_unfinished == 0 or self.failure is not None:
            self._tell()

    def pause(self) -> None:
        if not self.is_closed:
            self.is_paused = True
            self.num_pauses += 1

    def resume(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._service.active.remove(self)
            if self._lease is not None:
                self._lease.release()
            self.closed.set()
            self._tell()


@dataclass
class FakeService:
    """Plays `script` for every request; `is_manual` leaves the streams to the test."""

    card: ModelCard = field(
        default_factory=lambda: ModelCard(
            id="base",
            served_names=("base", "other-name"),
            max_model_len=1000,
            kv_tokens=64000,
            created=1764000000,
            dtype="float32",
            device="cpu",
            compute_type="cpu",
            fingerprint="fp_test",
            vocab_size=0x110000,
            family="llama",
            num_parameters=1_234_567,
            num_bytes=4_938_268,
            num_layers=2,
            hidden_size=64,
            eos_token_ids=frozenset({2}),
            generation_defaults=SamplingDefaults(),
        )
    )
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    is_alive: bool = True
    script: Script = field(default_factory=lambda: words("Once", " upon"))
    is_manual: bool = False
    refusal: ServeError | None = None  # of the next submit
    resolving: asyncio.Event | None = None  # resolve() waits for it
    active: list[FakeStream] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    leases: list[FakeLease] = field(default_factory=list)
    streams: "asyncio.Queue[FakeStream]" = field(default_factory=asyncio.Queue)
    wishes: list[AdapterWish] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)  # of the wishes, while they were asked for
    num_resolving: int = 0
    resident: frozenset[Revision] = frozenset()
    retired: list[tuple[str, bool, float]] = field(default_factory=list)  # name, force, seconds

    async def retire(self, name: str, *, force: bool = False, wait_s: float = 0.0) -> Retired | None:
        self.retired.append((name, force, wait_s))
        unloaded = await self.registry.unload(name, force=force)
        if unloaded is None:
            return None
        ref = AdapterRef(name, unloaded.revision or Revision(""))
        return Retired(ref, unloaded.num_bytes, ended=1 if force else 0, users=0)

    @property
    def last(self) -> GenerationRequest:
        return self.requests[-1]

    @property
    def is_idle(self) -> bool:
        """Nothing is held: no stream, no adapter, nobody waits for one."""
        return not self.active and not self.num_resolving and all(x.num_released == 1 for x in self.leases)

    async def resolve(self, name: str | None, wish: AdapterWish = NO_WISH) -> FakeLease | None:
        self.num_resolving += 1
        self.wishes.append(wish)
        self.tokens.append(None if wish.token is None else wish.token.reveal())
        try:
            if self.resolving is not None:
                await self.resolving.wait()
            use = self._use(name, wish)
        finally:
            self.num_resolving -= 1
        if use is None:
            return None
        lease = FakeLease(use.refs[0], use=use, source=wish.source or "local")
        named = wish.parts[0].name if wish.parts else wish.merge.names[0] if wish.merge else name
        lease.extras = self.registry.tokenizers.get(named or "")
        self.leases.append(lease)
        return lease

    def _use(self, name: str | None, wish: AdapterWish) -> AdapterUse | None:
        """As the real one, but that a merge is called "merged" and adapters are all there."""
        if wish.parts is not None:
            parts = [
                AdapterPart(self._find(part.name, part.param), part.scale)
                for part in wish.parts
                if part.scale
            ]
            return AdapterUse.sum_of(parts) if parts else None
        if wish.merge is not None:
            for number, named in enumerate(wish.merge.names):
                self._find(named, f"{wish.merge.param}.ids[{number}]")
            return AdapterUse.of(AdapterRef("merged", Revision("rev-merged")))
        return None if self.card.is_base(name) else AdapterUse.of(self._find(name or "", "model"))

    def _find(self, name: str, param: str) -> AdapterRef:
        info = self.registry.get(name)
        if info is None:
            raise self.unknown(name, param)
        return info.ref

    def tokenizer_for(self, lease: FakeLease | None) -> FakeTokenizer:
        return self.tokenizer if lease is None or lease.extras is None else lease.extras

    def unknown(self, name: str, param: str = "model") -> ServeError:
        return ModelNotFound(f"the model {name!r} does not exist", param=param)

    def submit(self, request: GenerationRequest, lease: FakeLease | None) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(request, lease, self)
        self.active.append(stream)
        self.requests.append(request)
        if not self.is_manual:
            stream.put(*self.script(request))
        self.streams.put_nowait(stream)
        return stream


class FakeMetrics:
    def snapshot(self) -> "FakeMetrics":
        return self

    def render(self, accept: str) -> tuple[bytes, str]:
        return b"vllm:num_requests_running 0.0\n", "text/plain; version=0.0.4; charset=utf-8"
