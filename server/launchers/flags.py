"""What a flag of another launcher comes to here: it is taken, says more about another one, is ignored, or
refused.

Values travel as the text that somebody wrote: a switch is "true" or "false", and what a repeated flag said is
joined by commas, as in its variable.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass

Value = str | bool | tuple[str, ...]
"""Of one of our settings, as a flag of `motet serve` can say it."""

Given = Mapping[str, str]
"""All that was said, by the flag's name, defaults included: a flag may have to be read beside another one."""

Read = Callable[[str, Given], Mapping[str, Value]]
"""From a flag's text to our settings. Raises UsageError."""


class UsageError(Exception):
    """What was said cannot be done. The message is for the operator, and tells the next step."""


def always(text: str) -> bool:
    """Every value of the variable is meant for the launcher."""
    return True


@dataclass(frozen=True, slots=True)
class Flag(ABC):
    """A row of a launcher's table."""

    name: str  # without the dashes
    _: KW_ONLY
    letter: str | None = None  # -p
    is_switch: bool = False  # may stand alone
    is_repeated: bool = False
    has_flag: bool = True  # False: there is only the variable
    has_variable: bool = True
    default: str | None = None  # of the launcher, where it counts here too
    counts: Callable[[str], bool] = always  # whether the variable's value was meant for the launcher

    @property
    def variable(self) -> str:
        return self.name.replace("-", "_").upper()

    @property
    @abstractmethod
    def help(self) -> str:
        """What becomes of it."""


@dataclass(frozen=True, slots=True)
class Taken(Flag):
    """Says something about our settings."""

    settings: tuple[str, ...]
    read: Read

    @property
    def help(self) -> str:
        flags = ["MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in self.settings]
        return f"as {', '.join(flags)} of motet serve"


@dataclass(frozen=True, slots=True)
class Beside(Flag):
    """Read by another flag."""

    other: str

    @property
    def help(self) -> str:
        return f"read with --{self.other}"


@dataclass(frozen=True, slots=True)
class Ignored(Flag):
    """Accepted, with a line that says why nothing comes of it."""

    because: str

    @property
    def help(self) -> str:
        return f"ignored, because {self.because}"


@dataclass(frozen=True, slots=True)
class Refused(Flag):
    """Ends the start, but for the values that ask for nothing: these are ignored for the same reason."""

    because: str
    instead: str  # the next step
    unless: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        but = f", but for {' and '.join(map(repr, self.unless))}" if self.unless else ""
        return f"refused{but}, because {self.because}"


@dataclass(frozen=True, slots=True)
class Launcher:
    """A command of another server."""

    name: str
    flags: tuple[Flag, ...]


def renamed(
    name: str,
    setting: str,
    *,
    letter: str | None = None,
    default: str | None = None,
    has_flag: bool = True,
    counts: Callable[[str], bool] = always,
) -> Taken:
    """A flag whose text means the same under our name."""

    def read(text: str, given: Given) -> Mapping[str, Value]:
        return {setting: text}

    return Taken(name, (setting,), read, letter=letter, default=default, has_flag=has_flag, counts=counts)


def switched(name: str, setting: str, *, has_flag: bool = True) -> Taken:
    """A switch that is one of ours under another name."""

    def read(text: str, given: Given) -> Mapping[str, Value]:
        return {setting: text == "true"}

    return Taken(name, (setting,), read, is_switch=True, has_flag=has_flag)
