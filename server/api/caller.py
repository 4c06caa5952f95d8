"""Who sends a request, and what that lets them use.

Guard makes a `Caller` of the key that a request brings and puts it on the exchange; whoever resolves, lists
or keeps something asks it. A server without keys serves anyone: everybody may do everything, and callers are
told apart by whatever they bring as a key. `NOBODY` is who asks a probe of a server with keys.
"""

import hashlib
import re
from dataclasses import dataclass

_PERSON = b"motet caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """What one key may do. Immutable: a changed file of keys makes new ones."""

    name: str | None  # of the key, for logs; None: it has none
    digest: str  # ties what is kept for a caller to the key, and is not the key; "" without one
    is_admin: bool = False  # may load, unload and drain
    has_base: bool = True  # may use the base model
    adapters: re.Pattern[str] | None = None  # names that it may use; None: all
    weight: float | None = None  # of its share, and its hard limits; None: what is said for all keys
    max_requests: int | None = None
    tokens_per_minute: int | None = None

    def may_use(self, adapter: str | None) -> bool:
        """`adapter` is the adapter's own name; None is the base model."""
        if adapter is None:
            return self.has_base
        return self.adapters is None or self.adapters.fullmatch(adapter) is not None

    @property
    def is_limited(self) -> bool:
        """Whether there may be a model that it must not know of."""
        return self.adapters is not None or not self.has_base


NOBODY = Caller(name=None, digest="", has_base=False, adapters=re.compile(r"(?!)"))


def anyone(key: bytes | None) -> Caller:
    """Who calls a server without keys, and brings this one all the same."""
    digest = "" if not key else digest_of(hashlib.sha256(key).digest())
    return Caller(name=None, digest=digest, is_admin=True)


def digest_of(sha256: bytes) -> str:
    """What to know a key by, given the SHA-256 digest of it."""
    return hashlib.blake2b(sha256, digest_size=16, person=_PERSON).hexdigest()
