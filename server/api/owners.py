"""Whose something is that outlives its request: the holder of a key, known by the key's digest.

Where the server asks for no key, whatever a client sends as one still tells it from others, and clients
without any share what they make.
"""

import hashlib
from urllib.parse import parse_qsl

from server.api.http import Exchange


def owner_of(exchange: Exchange) -> str:
    """The digest of the key that a request brings, in the order in which clients mean it: X-API-Key, bearer,
    `?api_key=`.
    """
    return hashlib.sha256(_key(exchange).encode("utf-8", "surrogateescape")).hexdigest()


def _key(exchange: Exchange) -> str:
    if own := exchange.header(b"x-api-key"):
        return own
    scheme, _, token = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    query: dict[str, str] = dict(parse_qsl(exchange.scope["query_string"].decode("latin-1")))
    return query.get("api_key", "")
