"""The composition root: one object for everything that a serving process is made of.

`Application` exists before the model does, so that the HTTP side can answer "loading". `load` builds the
heavy half on the engine thread (importing torch and transformers there), starts the engine, registers the
adapters that the operator named, and only then opens the gates.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterError
from adapters.sources.remote import RemoteSource
from adapters.uploads import UploadRoot
from server import __version__
from server.api.adapters.uploads import Uploads
from server.api.app import build_app
from server.api.keys import KeysError
from server.api.replay import ReplayLimits
from server.api.responses.conversations import ResponseStore
from server.api.shares import Limits, ShareOptions
from server.api.state import ApiOptions, Phase, ServerState
from server.embedded.location import adapters_dir
from server.engine.service import Service, ServiceLimits
from server.garbage import collect_seldom, keep_all
from server.inferless.apps import Apps, AppsError, AppsOptions, reachable
from server.inferless.worker import AppLimits
from server.metrics import Metrics
from server.progress import StartProgress, in_millions, in_units
from server.settings import Settings
from server.text.adapter_text import AdapterTexts
from server.threads import POOL_THREADS, Threads

if TYPE_CHECKING:
    from server.assembly import Assembly

_SHOWN_ADAPTERS = 20
_SCAN_S = (
    3.0  # of the start that the scan of --adapters-dir may take; after that it goes on beside the requests
)


log = logging.getLogger("motet")


class StartError(Exception):
    """The server cannot start; the message is for the operator."""


class Application:
    """Made and used on the event loop."""

    def __init__(self, settings: Settings, address: str) -> None:
        """`address`: where the server listens, as a URL. Raises StartError."""
        self.settings = settings
        self._address = address
        self._progress = StartProgress()
        self._threads = Threads()
        self._watch: asyncio.Task[None] | None = None
        self._service: Service | None = None
        self._remotes: tuple[RemoteSource, ...] = ()
        self._metrics: Metrics | None = None
        self._texts: AdapterTexts | None = None
        self._summary = ""
        self._uploads: UploadRoot | None = None
        self.state = ServerState(
            options=ApiOptions(
                host=settings.host,
                api_key=settings.api_key,
                api_keys_file=settings.api_keys_file,
                open_metrics=settings.open_metrics,
                allowed_origins=settings.allowed_origins,
                header_deadline_s=settings.header_deadline,
                keep_alive_s=settings.keep_alive,
                send_timeout_s=settings.send_timeout,
                replay=ReplayLimits(window_s=settings.resume_window),
                default_max_tokens=settings.default_max_tokens,
                max_preparing=settings.max_queued_requests,
                unload_timeout_s=settings.drain_timeout,
                max_prompts=settings.max_num_seqs + settings.max_queued_requests,
                shares=ShareOptions(
                    by=settings.fair_by,
                    weights=settings.weights(),
                    of_adapter=Limits(settings.max_adapter_requests, settings.max_adapter_tokens_per_minute),
                    of_key=Limits(settings.max_key_requests, settings.max_key_tokens_per_minute),
                ),
                num_workers=POOL_THREADS,
            ),
            version=__version__,
            responses=ResponseStore(max_bytes=settings.response_store_bytes),
            progress=lambda: self._progress.text,
        )
        try:
            self.asgi = build_app(self.state)
        except KeysError as error:
            raise StartError(f"--api-keys-file {error}") from error

    async def load(self) -> None:
        """Raises StartError. Returns when requests are served; Inferless apps may still be starting."""
        self.state.apps = self._make_apps()
        loop = asyncio.get_running_loop()
        parts = await loop.run_in_executor(self._threads.engine, self._assemble)
        self._remotes = tuple(parts.remotes.values())
        for app in self.state.apps:
            if parts.card.is_base(app.name):
                raise StartError(f"--inferless-app: {app.name} is a name of the base model")
        self._texts = parts.texts
        self._service = self._make_service(parts)
        self.state.uploads = self._make_uploads(parts)
        self._service.start()
        await self._register_adapters(parts)
        collect_seldom()
        self.state.service = self._service
        self.state.phase = Phase.READY
        self.state.apps.start()  # not before: an app may ask this server already while it initializes
        self._summary = self._describe(parts)

    def _assemble(self) -> "Assembly":
        """On the engine thread: the imports alone take seconds."""
        from server.model.pages_ahead import pages_for

        wanted = self.settings
        folder = None if wanted.model is None else Path(wanted.model)
        with pages_for(folder, wanted.device, wanted.cpu_kernels, wanted.quantization) as ahead:
            from server.model.models_table import import_models

            import_models()
            from server.assembly import AdapterObserver, assemble
            from server.model.errors import ModelError

            keep_all()
            observer = AdapterObserver(self._count_load, self._count_failed_load)
            try:
                return assemble(wanted, self._progress, self._threads, observer, ahead.zeros)
            except ModelError as error:
                raise StartError(str(error)) from error

    def _make_apps(self) -> Apps:
        settings = self.settings
        if settings.inferless_logs is not None and not settings.inferless_logs.is_dir():
            raise StartError(f"--inferless-logs {settings.inferless_logs}: there is no such folder")
        options = AppsOptions(
            base_url=reachable(self._address),
            api_key=settings.api_key,
            output_dir=settings.inferless_logs,
            limits=AppLimits(
                max_queued=settings.inferless_queue,
                start_s=settings.inferless_start_timeout,
                infer_s=settings.inferless_timeout,
            ),
        )
        try:
            return Apps([Path(folder) for folder in settings.inferless_app], options)
        except AppsError as error:
            raise StartError(str(error)) from error

    def _make_uploads(self, parts: "Assembly") -> Uploads | None:
        if not self.settings.adapter_upload_bytes:
            return None
        self._uploads = _upload_root(self.settings.adapters_dir)
        return Uploads(
            self._uploads,
            parts.check_adapter,
            loaders=self._threads.loaders,
            pool=self._threads.pool,
            max_bytes=self.settings.adapter_upload_bytes,
            is_adapters_dir=self._uploads.folder == self.settings.adapters_dir,
        )

    def _count_load(self, name: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.observe_adapter_load(name, seconds)

    def _count_failed_load(self, error: AdapterError) -> None:
        if self._metrics is not None:
            self._metrics.observe_failed_load(error)

    def _make_service(self, parts: "Assembly") -> Service:
        self._metrics = metrics = Metrics(
            parts.card.id,
            block_size=self.settings.block_size,
            max_lora=self.settings.max_num_seqs,
            is_accelerated=parts.card.compute_type == "gpu",
            adapters=parts.registry.statuses,
            is_adapter=lambda name: parts.registry.get(name) is not None,
            host_evictions=lambda: parts.registry.num_evicted,
        )
        self.state.metrics = metrics
        return Service(
            card=parts.card,
            tokenizer=parts.tokenizer,
            registry=parts.registry,
            pool=self._threads.pool,
            worker=parts.worker,
            metrics=metrics,
            limits=ServiceLimits(
                max_num_seqs=self.settings.max_num_seqs,
                max_queued_requests=self.settings.max_queued_requests,
                send_timeout_s=self.settings.send_timeout,
                seed=self.settings.seed,
            ),
            merge=parts.merge,
        )

    async def _register_adapters(self, parts: "Assembly") -> None:
        """One that the operator names must load; one that merely lies in --adapters-dir is skipped."""
        named = self.settings.named_adapters()
        if self.settings.model is None:
            ours = sorted(folder for folder in adapters_dir().iterdir() if folder.is_dir())
            named = (*((folder.name, folder) for folder in ours), *named)
        for name, folder in named:
            try:
                await parts.registry.register(name, folder)
            except AdapterError as error:
                raise StartError(f"adapter {name} ({folder}): {error.message}") from error
        if parts.watch is not None:
            self._watch = asyncio.create_task(parts.watch.run())
            self._watch.add_done_callback(_report_watch)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(parts.watch.has_scanned.wait(), _SCAN_S)

    def announce(self, address: str) -> None:
        """The one line that says what is served."""
        print(f"motet ready on {address} · {self._summary}", file=sys.stderr, flush=True)

    def _describe(self, parts: "Assembly") -> str:
        card, settings = parts.card, self.settings
        names = [info.ref.name for info in parts.registry.list()]
        shown = ", ".join(names[:_SHOWN_ADAPTERS]) or "none"
        adapters = (
            shown if len(names) <= _SHOWN_ADAPTERS else f"{shown} and {len(names) - _SHOWN_ADAPTERS} more"
        )
        num_positions = parts.num_blocks * settings.block_size
        in_bits = ", int8" if settings.kv_cache_dtype == "int8" else ""
        size = in_millions(parts.num_parameters)
        threads = (
            f", {_counted(parts.num_threads, 'thread')}, kernels: {parts.kernels}"
            if card.compute_type == "cpu"
            else ""
        )
        return " · ".join(
            (
                f"model {card.id} ({size}, {card.dtype}) on {card.device}{threads}",
                f"adapters: {adapters}",
                f"context {card.max_model_len}",
                f"KV {in_units(parts.kv_bytes)} ({num_positions} tokens{in_bits})",
                f"adapter memory {in_units(parts.adapter_bytes)}",
            )
        )

    async def engine_died(self) -> None:
        """Return when the engine cannot go on; every stream has been ended with an error by then."""
        assert self._service is not None
        await self._service.died()
        self.state.phase = Phase.FAILED

    async def drain(self) -> None:
        """Refuse new requests; return when the running ones have ended, by themselves or by force."""
        self.state.phase = Phase.DRAINING
        draining = [self.state.apps.drain(self.settings.drain_timeout)]
        if self._service is not None:
            draining.append(self._service.drain(self.settings.drain_timeout))
        await asyncio.gather(*draining)

    async def close(self) -> None:
        """End the apps and stop the threads. Waits for the step and the loads that are in flight."""
        self.state.recordings.close()
        await self.state.apps.close()
        if self._service is not None:
            if self._watch is not None:
                self._watch.cancel()
            await self._service.registry.close()
            await self._service.stop()
        for remote in self._remotes:
            remote.close()
        if self._texts is not None:
            await asyncio.to_thread(self._texts.close)
        await asyncio.to_thread(self._threads.close)
        if self._uploads is not None and self._uploads.folder != self.settings.adapters_dir:
            await asyncio.to_thread(shutil.rmtree, self._uploads.folder, ignore_errors=True)


def _upload_root(adapters_dir: Path | None) -> UploadRoot:
    """The folder of adapters if we may write there, else one that goes when the server does."""
    if adapters_dir is not None and adapters_dir.is_dir() and os.access(adapters_dir, os.W_OK | os.X_OK):
        root = UploadRoot(adapters_dir)
        root.sweep()
        return root
    return UploadRoot(Path(tempfile.mkdtemp(prefix="motet-uploads-")))


def _report_watch(watch: asyncio.Task[None]) -> None:
    """A watch that our own bug ended must not end unseen."""
    if not watch.cancelled() and (error := watch.exception()) is not None:
        log.error("--adapters-dir is not watched any more", exc_info=error)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
