"""What the server says about an adapter, as JSON."""

from typing import Literal

from typing_extensions import TypedDict

from adapters.types import AdapterStatus, Revision, Tier, kind_of
from server.api.ports import Service


class AdapterRecord(TypedDict):
    """A registered adapter."""

    id: str
    object: Literal["adapter"]
    name: str  # the same as `id`
    revision: str | None  # digest of its content; null until its weights are read for the first time
    rank: int  # the largest
    targets: list[str]
    kind: str  # "lora", or what it has beside that, joined by "+"
    bytes: int  # in the served dtype
    tier: Literal["disk", "host", "device"]  # the fastest memory that it is in
    pinned: bool
    users: int  # requests that use it now
    last_used: float | None  # unix time
    loads: int  # how often its files were read
    load_seconds: float | None  # of the last time
    source: str  # "local", "upload", "hub" or "s3"
    root: str  # where it came from
    parent: str  # the base model
    created: int  # unix time of registration
    error: str | None  # why its files could not be read the last time


def record_of(status: AdapterStatus, service: Service, resident: frozenset[Revision]) -> AdapterRecord:
    """`resident`: what is on the device."""
    info = status.info
    return {
        "id": info.ref.name,
        "object": "adapter",
        "name": info.ref.name,
        "revision": info.revision,
        "rank": info.rank,
        "targets": list(info.targets),
        "kind": kind_of(info.kinds),
        "bytes": info.num_bytes,
        "tier": _tier_of(status, resident).value,
        "pinned": status.is_pinned,
        "users": status.users,
        "last_used": status.last_used,
        "loads": status.loads,
        "load_seconds": status.load_seconds,
        "source": info.source,
        "root": info.root,
        "parent": service.card.id,
        "created": info.created,
        "error": status.error,
    }


def _tier_of(status: AdapterStatus, resident: frozenset[Revision]) -> Tier:
    if status.info.ref.revision in resident:
        return Tier.DEVICE
    return Tier.HOST if status.is_loaded else Tier.DISK
