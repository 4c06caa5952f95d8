"""Whose something is that outlives its request: the holder of a key, known by the key's digest.

Where the server asks for no key, whatever a client sends as one still tells it from others, and clients
without any share what they make.
"""

from server.api.http import Exchange


def owner_of(exchange: Exchange) -> str:
    """The digest of the key that a request brings."""
    return exchange.caller.digest
