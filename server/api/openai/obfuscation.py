"""Padding of deltas, so that the lengths of encrypted frames do not tell the lengths of tokens."""

_UNIT_CHARS = 32  # the text of nearly every token, as JSON, is shorter
_FILLER = "0123456789abcdefghijklmnopqrstuv"


def obfuscation(text: str) -> str:
    """The member of a frame that makes it, with this text, a multiple of a fixed number of characters long.

    What the filler says does not matter: it is not seen, only its length is.
    """
    return f',"obfuscation":"{_FILLER[: -len(text) % _UNIT_CHARS]}"'
