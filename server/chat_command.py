"""`motet chat`: talk to a running server in the terminal, and change the voice between two answers.

The conversation is kept here and sent whole, as every client does; so another adapter can go on with what the
one before has said. Ctrl-C ends an answer, and the server is free at once.
"""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from urllib.parse import quote, urlencode

from server.remote_server import RemoteServer, ServerFailed, add_server_flags, server_of

_MOST_LISTED = 50
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's words must not steer the terminal
_HELP = """\
/adapter NAME     go on with this adapter; without a name: with the base model
/adapters [TEXT]  which there are
/system [TEXT]    the system prompt; without a text: none
/new              forget the conversation
/quit             or Ctrl-D"""


class Conversation:
    """What was said, and to whom it goes next."""

    def __init__(
        self, server: RemoteServer, model: str, base: str, system: str, max_tokens: int | None
    ) -> None:
        self._server = server
        self._base = base
        self.model = model
        self._system = system
        self._max_tokens = max_tokens
        self._turns: list[dict[str, str]] = []

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash. False: that was the end. Raises ServerFailed."""
        word, _, rest = line.partition(" ")
        match word, rest.strip():
            case (("/quit" | "/exit" | "/q"), _):
                return False
            case "/adapter", name:
                if name:
                    self._server.get(f"/v1/models/{quote(name)}")
                self.model = name or self._base
            case "/adapters", text:
                self._list(text)
            case "/system", text:
                self._system = text
            case "/new", _:
                self._turns.clear()
            case _:
                print(_HELP)
        return True

    def ask(self, text: str) -> None:
        """Print the answer as it comes. Raises ServerFailed; then the question is forgotten."""
        self._turns.append({"role": "user", "content": text})
        try:
            answer = self._stream()
        except BaseException:
            self._turns.pop()
            raise
        self._turns.append({"role": "assistant", "content": answer})

    def _stream(self) -> str:
        system = [{"role": "system", "content": self._system}] if self._system else []
        body: dict[str, object] = {"model": self.model, "messages": [*system, *self._turns], "stream": True}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        began, first, pieces = time.monotonic(), 0.0, []
        events = self._server.events("/v1/chat/completions", body)
        try:
            with contextlib.closing(events), contextlib.suppress(KeyboardInterrupt):  # type: ignore[type-var]
                for event in events:
                    text = next((choice["delta"].get("content") for choice in event["choices"]), None)
                    if text:
                        first = first or time.monotonic()
                        pieces.append(text)
                        print(_CONTROLS.sub("", text), end="", flush=True)
        finally:
            if pieces:
                print()
        if first and sys.stdout.isatty():
            seconds = time.monotonic() - first
            speed = f", {(len(pieces) - 1) / seconds:.0f} tokens/s" if len(pieces) > 1 and seconds else ""
            print(f"\x1b[2m{self.model}: first token {(first - began) * 1e3:.0f} ms{speed}\x1b[0m")
        return "".join(pieces)

    def _list(self, text: str) -> None:
        query = urlencode({"search": text, "limit": _MOST_LISTED})
        page = self._server.get(f"/v1/adapters?{query}")
        for one in page["data"]:
            print(f"  {one['id']}  (rank {one['rank']}, {one['tier']})")
        if page["total"] > len(page["data"]):
            print(f"  … {page['total'] - len(page['data'])} more: /adapters TEXT")


def make_parser() -> argparse.ArgumentParser:
    """Of `motet chat`."""
    parser = argparse.ArgumentParser(
        prog="motet chat",
        description="Talk to a running server. Lines of a pipe are questions.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_flags(parser)
    parser.add_argument("--model", metavar="NAME", help="the base model or an adapter (default: the base)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    return parser


def main(words: Sequence[str]) -> int:
    """Run `motet chat WORDS`; returns the exit status."""
    flags = make_parser().parse_args(list(words))
    server = server_of(flags)
    try:
        base = server.get("/v1/models")["data"][0]["id"]
        if flags.model:
            server.get(f"/v1/models/{quote(flags.model)}")
    except ServerFailed as error:
        print(f"motet: {error}", file=sys.stderr)
        return 1
    try:
        return _talk(Conversation(server, flags.model or base, base, flags.system, flags.max_tokens))
    except KeyboardInterrupt:  # between two things that it could end
        return 130


def _talk(conversation: Conversation) -> int:
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited, and called back
        print("/help says what there is beside asking.")
    status = 0
    while True:
        try:
            line = input(f"{conversation.model}> " if is_typed else "").strip()
        except EOFError:
            return status
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                if not conversation.command(line):
                    return status
            elif line:
                conversation.ask(line)
        except ServerFailed as error:
            print(f"motet: {error}", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            print()
