"""Who is charged for a request, and which hard limits it counts against.

The engine shares what it has among *tenants* and knows of no others. Here they get their meaning: what
`--fair-by` says. A request that uses several adapters at once is charged to one of them, always the same:
else combining adapters would make new tenants, each with a share of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters.names import shown
from server.api.caller import Caller
from server.api.ports import ModelCard
from server.types import Quota, QuotaKind

FairBy = Literal["adapter", "key", "off"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard ones; None: none."""

    max_requests: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """What an operator chooses."""

    by: FairBy = "adapter"
    weights: Mapping[str, float] = field(default_factory=dict)  # by the name of an adapter or of a key
    of_adapter: Limits = Limits()
    of_key: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a GenerationRequest that is about others."""

    tenant: str
    weight: float
    quotas: tuple[Quota, ...]


def share_of(caller: Caller, adapters: Sequence[str], card: ModelCard, options: ShareOptions) -> Share:
    """Of a request with these adapters, by their own names; none: the base model's."""
    quotas = (*(_of_adapter(name, options) for name in dict.fromkeys(adapters)), _of_key(caller, options))
    tenant, weight = _tenant(caller, adapters, card, options)
    return Share(tenant, weight, tuple(quota for quota in quotas if quota.limits_something))


def _tenant(
    caller: Caller, adapters: Sequence[str], card: ModelCard, options: ShareOptions
) -> tuple[str, float]:
    weights = options.weights
    if options.by == "key":
        return caller.digest, caller.weight or weights.get(caller.name or "", 1.0)
    if options.by == "adapter" and adapters:
        name = min(adapters)
        return name, weights.get(name, 1.0)
    if options.by == "adapter":
        return "", next((weight for name, weight in weights.items() if card.is_base(name)), 1.0)
    return "", 1.0


def _of_adapter(name: str, options: ShareOptions) -> Quota:
    limits = options.of_adapter
    who = f"adapter {shown(name)}"
    return Quota(QuotaKind.ADAPTER, name, who, limits.max_requests, limits.tokens_per_minute)


def _of_key(caller: Caller, options: ShareOptions) -> Quota:
    """What the file says of a key wins."""
    return Quota(
        QuotaKind.KEY,
        caller.digest,
        "this API key" if caller.digest else "clients without an API key",
        caller.max_requests or options.of_key.max_requests,
        caller.tokens_per_minute or options.of_key.tokens_per_minute,
    )
