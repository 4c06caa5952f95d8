"""`motet completion SHELL`: a script that lets a shell complete commands, flags, their values and paths.

Each command has a parser of its own, which is made when the command runs. Here all of them are hung into one
tree, out of which shtab writes the script. A shell that has read it asks nobody: completing starts no Python.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import shtab

_WHERE = {
    "bash": 'eval "$(motet completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(motet completion zsh)" in ~/.zshrc, after compinit',
    "tcsh": "motet completion tcsh > ~/.motet.tcsh, and source that in ~/.tcshrc",
}
_FOLDERS = frozenset({"MODEL", "DIR"})
_FILES = frozenset({"FILE", "PATH"})


def make_parser() -> argparse.ArgumentParser:
    """Of `motet completion`."""
    parser = argparse.ArgumentParser(
        prog="motet completion",
        description="Print what lets a shell complete motet's commands and flags.",
        epilog="To have it always: " + "; ".join(_WHERE.values()) + ".",
    )
    parser.add_argument("shell", choices=sorted(_WHERE))
    return parser


def main(words: Sequence[str], commands: argparse.ArgumentParser) -> int:
    """Run `motet completion WORDS`; returns the exit status. `commands`: the parser that knows them all."""
    shell = make_parser().parse_args(list(words)).shell
    print(shtab.complete(_whole_tree(commands), shell))
    return 0


def _whole_tree(root: argparse.ArgumentParser) -> argparse.ArgumentParser:
    from benchmarks.options import make_parser as bench
    from server.adapters_command import make_parser as adapters
    from server.chat_command import make_parser as chat

    (commands,) = _sub_commands(root)
    known = dict(commands.choices or {})
    commands.choices = {
        **known,
        **{"adapters": adapters(), "bench": bench(), "chat": chat(), "completion": make_parser()},
    }
    _mark(root)
    return root


def _mark(parser: argparse.ArgumentParser) -> None:
    """Say of each flag what its values are, where that is a path or one of a few words."""
    for action in parser._actions:
        word = str(action.metavar)
        if word in _FOLDERS:
            vars(action)["complete"] = shtab.DIRECTORY
        elif word in _FILES or action.type is Path:
            vars(action)["complete"] = shtab.FILE
        elif word.startswith("{"):
            action.choices = word.strip("{}").split(",")
    for commands in _sub_commands(parser):
        for command in (commands.choices or {}).values():
            _mark(command)


def _sub_commands(parser: argparse.ArgumentParser) -> "Iterator[argparse._SubParsersAction[Any]]":
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield action
