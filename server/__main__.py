"""The command line: `motet serve`, `chat`, `adapters`, `bench`, `completion`, `version`.

The same as `python -m server`.
"""

import argparse
import sys
from collections.abc import Sequence

import adapters
from server import __version__
from server.garbage import collect_nothing

_OWN_ADAPTERS = (
    "another package that is also called 'adapters' is in front of Motet's on the import path: "
    "uninstall it, or install Motet into an environment of its own"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    if getattr(adapters, "OWNER", None) != "motet":
        print(f"motet: {_OWN_ADAPTERS}", file=sys.stderr)
        return 1
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    if words[:1] == ["adapters"]:
        return _adapters(words[1:])
    if words[:1] == ["chat"]:
        return _chat(words[1:])
    parser = argparse.ArgumentParser(
        prog="motet", description="Many LoRA adapters over one base model, in one batch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        usage="motet serve [MODEL] [FLAGS]",
        description="Serve MODEL, or the embedded model. Each flag is also a variable: --port is MOTET_PORT.",
    )
    commands.add_parser("chat", help="talk to a running server (motet chat --help)")
    commands.add_parser("bench", help="put load on a running server and measure it (motet bench --help)")
    commands.add_parser("adapters", help="look after adapters (motet adapters --help)")
    commands.add_parser("completion", help="let a shell complete all this (motet completion --help)")
    commands.add_parser("version", help="print the version")

    from server.settings import SettingsError, add_flags, read_settings  # pydantic: not needed for `version`

    add_flags(serve)
    if words[:1] == ["completion"]:
        return _completion(words[1:], parser)
    flags = parser.parse_args(words)
    if flags.command == "version":
        print(f"motet {__version__}")
        return 0
    try:
        settings = read_settings(flags)
    except SettingsError as error:
        serve.error(str(error))
    collect_nothing()
    from server.process import serve_until_stopped

    return serve_until_stopped(settings)


def _adapters(words: list[str]) -> int:
    from server.adapters_command import main as adapters_command

    return adapters_command(words)


def _chat(words: list[str]) -> int:
    from server.chat_command import main as chat

    return chat(words)


def _completion(words: list[str], parser: argparse.ArgumentParser) -> int:
    from server.completion_command import main as completion

    return completion(words, parser)


def _bench(words: list[str]) -> int:
    from benchmarks.cli import main as bench

    return bench(words)


if __name__ == "__main__":
    sys.exit(main())
