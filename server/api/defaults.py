"""What stands where a request says nothing."""

from typing import TypeVar

T = TypeVar("T")


def first_given(asked: T | None, recommended: T | None, default: T) -> T:
    """What the request asks for, else what the model's generation_config recommends, else the protocol's own
    default.
    """
    if asked is not None:
        return asked
    return default if recommended is None else recommended
