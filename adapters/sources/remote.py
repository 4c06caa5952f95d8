"""What a source on another machine does, and the words that all of them refuse with.

    resolve(location, token) ──> version       asked of the remote for every request, with its token
    fetch(location, version, token) ──> folder  on this machine, whole and checked, or not there at all

A location is a client's text ("org/name@v2", "s3://bucket/prefix"); what it means may change, a version
never. Who may not see an adapter is told what is told of one that does not exist.
"""

from pathlib import Path
from typing import Protocol

from adapters.errors import AdapterNotFound, AdapterUnavailable
from adapters.names import shown

_RETRY_AFTER_S = 10


class RemoteSource(Protocol):
    """All methods but `accepts` may wait for a network: call them from threads that nobody else needs."""

    @property
    def name(self) -> str:
        """As in `--adapter-sources`, and in `AdapterInfo.source`."""
        ...

    def accepts(self, location: str) -> bool:
        """Whether this can be a location of ours, by its spelling alone."""
        ...

    def resolve(self, location: str, token: str | None) -> str:
        """The version that the location means now, for who has this token.

        Raises AdapterNotFound if there is none or the token does not show it; AdapterInvalid for what can
        never be served; AdapterUnavailable if the remote does not answer.
        """
        ...

    def fetch(self, location: str, version: str, token: str | None) -> Path:
        """The folder with that version's files. It stays for a minute at least; fetch again after that.

        Raises what `resolve` raises, and AdapterTooLarge.
        """
        ...

    def close(self) -> None:
        """Give back what the network holds. Nothing may be asked any more."""
        ...


def no_such_adapter(location: str) -> AdapterNotFound:
    """The one answer for what is not there, and for what the client may not see."""
    return AdapterNotFound(f"there is no adapter {shown(location)}")


def out_of_reach(where: str, *, retry_after_s: int | None = None) -> AdapterUnavailable:
    """The remote failed, or kept silent."""
    return AdapterUnavailable(
        f"{where} did not answer as it should; try again later", retry_after_s=retry_after_s or _RETRY_AFTER_S
    )


def has_changed(location: str) -> AdapterUnavailable:
    """Somebody replaced the adapter while we read it: half of each would be neither."""
    return AdapterUnavailable(
        f"adapter {shown(location)} was changed while it was fetched; try again", retry_after_s=1
    )
