"""What can go wrong with an adapter, as types that a server can turn into a status.

Every message is safe to show to a client: it names the adapter, the file, the tensor or the config key, and
never a path outside the adapter's own folder.
"""


class AdapterError(Exception):
    """Base of all adapter errors; `message` is client-safe."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterNotFound(AdapterError):
    """No source knows this name."""


class AdapterInvalid(AdapterError):
    """The files are broken, hostile, or use a feature that is not served."""


class AdapterIncompatible(AdapterError):
    """The files are fine but belong to another base model: wrong shapes, or targets it does not have."""


class AdapterTooLarge(AdapterError):
    """The adapter alone is larger than the memory that adapters may take."""


class AdapterUnavailable(AdapterError):
    """Not now: still loading, draining, or no memory free. Worth another try after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
