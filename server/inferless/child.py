"""The program that an Inferless app runs in: `python -m server.inferless.child SOCKET FOLDER`.

All of the app's code runs in the main thread, one request at a time, as it would in a program of its own:
import, `initialize`, `infer` … `infer`, `finalize`. A second thread reads the socket, so that the server can
say that a client has left while `infer` runs. After an exception in `infer` the app is finalized and made
anew, because nobody knows what the exception left behind.

This program imports nothing but the standard library, and takes itself out of the app's way: the app's folder
comes first on the import path and is the current directory.
"""

import asyncio
import inspect
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.inferless.folder import LoadedApp, arguments_for, load_app
from server.inferless.handler import StreamHandler
from server.inferless.outputs import OutputError, named_values
from server.inferless.wire import (
    Channel,
    Done,
    End,
    Failed,
    FrameTooLarge,
    Gone,
    Infer,
    Loaded,
    Output,
    Ready,
    Stop,
    Took,
    WireError,
)

_LAST_S = 10.0  # what an app has for its `finalize` after the server has gone
_MOST_CHARS = 1000  # of an error message


class Host:
    """The app and its requests."""

    def __init__(self, channel: Channel, folder: Path) -> None:
        self._channel = channel
        self._folder = folder
        self._inbox: queue.SimpleQueue[Infer | Stop] = queue.SimpleQueue()
        self._handlers: dict[int, StreamHandler] = {}
        self._loop = asyncio.Runner()  # for apps whose methods are coroutines: one loop for all of them
        self._app: LoadedApp | None = None
        self._model: Any = None

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        threading.Thread(target=self._listen, name="motet-socket", daemon=True).start()
        if not self._start():
            return 1
        while True:
            self._channel.send(Ready())
            wish = self._inbox.get()
            if isinstance(wish, Stop):
                self._finalize()
                self._loop.close()
                return 0
            fault = self._serve(wish)
            self._channel.send(Done(fault))
            if fault is not None:
                self._finalize()
                if not self._start():
                    return 1

    def _start(self) -> bool:
        """Import the folder, if that has not been done, and initialize the app."""
        try:
            if self._app is None:
                self._app = load_app(self._folder)
                self._channel.send(Loaded(self._app.schema.to_json()))
            self._model = self._app.model_class()
            self._call(self._model.initialize, *arguments_for(self._model.initialize))
        except BaseException as error:  # the app's own code, which may also exit: the server must know why
            traceback.print_exc()
            self._channel.send(Failed(f"{_message(error)} ({_place(error)})"))
            return False
        return True

    def _finalize(self) -> None:
        model, self._model = self._model, None
        if (finalize := getattr(model, "finalize", None)) is None:
            return
        try:
            self._call(finalize, *arguments_for(finalize))
        except BaseException:  # as above; and there is nothing to do about it
            traceback.print_exc()

    def _serve(self, wish: Infer) -> str | None:
        """Answer the requests of one message. Returns what `infer` raised, for the log; None: nothing."""
        assert self._app is not None
        arguments: dict[int, Any] = {}
        for run_id, inputs in zip(wish.ids, wish.inputs, strict=True):
            try:
                arguments[run_id] = self._argument(inputs)
            except Exception as error:  # the request class is the app's
                self._channel.send(End(run_id, _refusal(error), "input"))
        if not arguments:
            return None
        try:
            if self._app.schema.is_streaming:
                self._stream(*arguments.popitem())
            else:
                self._answer(arguments)
        except BaseException as error:  # the app's own code
            traceback.print_exc()
            is_alone = len(wish.ids) == 1  # the text may quote an input, which is one client's own
            said = _message(error) if is_alone else type(error).__name__
            for run_id in arguments:
                self._channel.send(End(run_id, said, "app"))
            return f"{type(error).__name__} ({_place(error)})"
        return None

    def _argument(self, inputs: dict[str, object]) -> Any:
        assert self._app is not None
        return inputs if self._app.request_class is None else self._app.request_class(**inputs)

    def _stream(self, run_id: int, argument: Any) -> None:
        self._handlers[run_id] = handler = StreamHandler(run_id, self._channel)
        try:
            self._call(self._model.infer, argument, handler)
        except BaseException as error:
            handler.end(_message(error), "app")
            raise
        finally:
            handler.end()
            del self._handlers[run_id]

    def _answer(self, arguments: dict[int, Any]) -> None:
        """One call of `infer`, and one output for each of the requests, which are left in `arguments` until
        they have theirs.
        """
        assert self._app is not None
        if self._app.schema.batch_size is None:
            (argument,) = arguments.values()
            outputs = [self._call(self._model.infer, argument)]
        else:
            outputs = self._call(self._model.infer, list(arguments.values()))
            if not isinstance(outputs, list) or len(outputs) != len(arguments):
                outputs = [OutputError(f"`infer` must return a list of {len(arguments)} outputs")] * len(
                    arguments
                )
        for run_id, output in zip(tuple(arguments), outputs, strict=True):
            del arguments[run_id]
            try:
                if isinstance(output, OutputError):
                    raise output
                self._channel.send(Output(run_id, named_values(output)))
                self._channel.send(End(run_id))
            except (OutputError, FrameTooLarge) as error:
                self._channel.send(End(run_id, str(error), "output"))

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        result = method(*arguments)
        return self._loop.run(result) if inspect.iscoroutine(result) else result

    def _listen(self) -> None:
        while (message := self._receive()) is not None:
            if isinstance(message, Infer | Stop):
                self._inbox.put(message)
            elif isinstance(message, Took | Gone) and (handler := self._handlers.get(message.id)) is not None:
                if isinstance(message, Took):
                    handler.took(message.count)
                else:
                    handler.gone()
        self._inbox.put(Stop())
        for handler in tuple(self._handlers.values()):
            handler.gone()
        time.sleep(_LAST_S)
        os._exit(1)  # `infer` or `finalize` does not end, and nobody else is left to end it

    def _receive(self) -> object:
        try:
            return self._channel.receive()
        except WireError:
            return None


def _message(error: BaseException) -> str:
    """The exception in the app's own words: its author knows to whom they go."""
    text = str(error)
    name = type(error).__name__
    return (f"{name}: {text}" if text else name)[:_MOST_CHARS]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no traceback"
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"


def _refusal(error: Exception) -> str:
    """What is wrong with an input; pydantic's errors without the input that they quote."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return _message(error)
    first = errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"[:_MOST_CHARS]


def main() -> int:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    folder = Path(sys.argv[2])
    os.chdir(folder)
    # `-m` has put the folder of this package in front, and this package would hide an app's module of the
    # same name.
    if not sys.flags.safe_path:
        del sys.path[0]
    for name in [name for name in sys.modules if name == "server" or name.startswith("server.")]:
        del sys.modules[name]
    sys.argv[:] = ["app.py"]
    return Host(channel, folder).run()


if __name__ == "__main__":
    sys.exit(main())
