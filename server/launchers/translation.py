"""From the words and variables of another launcher to the words of `motet serve`.

A flag wins over its variable, a variable over the launcher's default, and each of them over the `MOTET_…`
variable of the setting that it becomes. Only what a flag merely implies leaves the word to ours.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server import __version__
from server.launchers.flags import Flag, Ignored, Launcher, Refused, Taken, UsageError, Value

_IMPLIED = ("served_model_name", "adapter_sources")
_SECRET = ("api_key",)
_SWITCHES = {"true": ("true", "1", "yes", "on", "y", "t"), "false": ("false", "0", "no", "off", "n", "f")}


@dataclass(frozen=True, slots=True)
class Wish:
    """A flag and what was said with it."""

    flag: Flag
    text: str
    said_as: str  # "--num-shard" or "NUM_SHARD"

    @property
    def shown(self) -> str:
        between = " " if self.said_as.startswith("--") else "="
        return f"{self.said_as}{between}{self.text}"


@dataclass(frozen=True, slots=True)
class Translation:
    """What is to be done, and what is to be said about what is not."""

    settings: Mapping[str, Value]
    notices: tuple[str, ...]

    def words(self, *, has_secrets: bool = True) -> list[str]:
        """Of `motet`. Without secrets they can be shown."""
        words = ["serve"]
        if "model" in self.settings:
            words.append(str(self.settings["model"]))
        for name, value in self.settings.items():
            flag = name.replace("_", "-")
            if name == "model":
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, str):
                words.append(f"--{flag}={value if has_secrets or name not in _SECRET else '...'}")
            elif value:
                words += [f"--{flag}", *value]
        return words


def make_parser(launcher: Launcher) -> argparse.ArgumentParser:
    """The help says what becomes of each flag. One that is not given leaves no attribute behind."""
    without_flag = ", ".join(flag.variable for flag in launcher.flags if not flag.has_flag)
    parser = argparse.ArgumentParser(
        prog=launcher.name,
        usage=f"{launcher.name} [FLAGS]",
        description=f"The flags and variables of {launcher.name}, for Motet. --model-id is also MODEL_ID.",
        epilog=f"Variables without a flag: {without_flag}. MOTET_... variables say everything else.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"motet {__version__}")
    for flag in launcher.flags:
        if not flag.has_flag:
            continue
        names = [f"-{flag.letter}"] if flag.letter else []
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if flag.is_switch else {}
        parser.add_argument(
            *names,
            f"--{flag.name}",
            dest=flag.name,
            action="append",
            default=argparse.SUPPRESS,
            metavar="BOOL" if flag.is_switch else "VALUE",
            help=flag.help.replace("%", "%%"),
            **alone,
        )
    return parser


def wishes_of(launcher: Launcher, parsed: argparse.Namespace, environ: Mapping[str, str]) -> list[Wish]:
    """In the order of the table. Raises UsageError for a switch that is neither true nor false."""
    found = (_wish(flag, vars(parsed).get(flag.name, []), environ) for flag in launcher.flags)
    return [wish for wish in found if wish is not None]


def translate(wishes: list[Wish], environ: Mapping[str, str]) -> Translation:
    """Raises UsageError."""
    given = {wish.flag.name: wish.text for wish in wishes}
    settings: dict[str, Value] = {}
    notices = []
    for wish in wishes:
        flag = wish.flag
        if isinstance(flag, Taken):
            try:
                settings |= flag.read(wish.text, given)
            except UsageError as error:
                raise UsageError(f"{wish.said_as}: {error}") from None
        elif isinstance(flag, Ignored):
            notices.append(f"{wish.said_as}: ignored, because {flag.because}")
        elif isinstance(flag, Refused):
            if wish.text not in flag.unless:
                raise UsageError(f"{wish.shown}: refused, because {flag.because}: {flag.instead}")
            notices.append(f"{wish.shown}: ignored, because {flag.because}")
    for name in _IMPLIED:
        if environ.get(f"MOTET_{name.upper()}"):
            settings.pop(name, None)
    if "model" not in settings and not environ.get("MOTET_MODEL"):
        raise UsageError("no model is named: give its folder with --model-id or MODEL_ID")
    return Translation(settings, tuple(notices))


def _wish(flag: Flag, words: list[str], environ: Mapping[str, str]) -> Wish | None:
    variable = environ.get(flag.variable, "") if flag.has_variable else ""
    if words:
        text, said_as = ",".join(words) if flag.is_repeated else words[-1], f"--{flag.name}"
    elif variable and flag.counts(variable):  # compose files leave variables empty that nobody has set
        text, said_as = variable, flag.variable
    elif flag.default is not None:
        text, said_as = flag.default, f"--{flag.name}"
    else:
        return None
    return Wish(flag, _switch(text, said_as) if flag.is_switch else text, said_as)


def _switch(text: str, said_as: str) -> str:
    for meaning, words in _SWITCHES.items():
        if text.lower() in words:
            return meaning
    raise UsageError(f"{said_as} takes true or false, not {text!r}")
