"""Why a checkpoint is not served. Raised only at start; the message tells the operator what to do."""


class ModelError(Exception):
    """Base of all start-up refusals of this package."""


class ModelNotFound(ModelError):
    """The folder, or a file that a checkpoint needs, is not there."""


class ModelNotSupported(ModelError):
    """The architecture, or a feature of the checkpoint, cannot be served correctly."""


class ModelInvalid(ModelError):
    """The files do not fit together: missing or mis-shaped weights, unreadable config."""


class MemoryTooSmall(ModelError):
    """The KV memory does not hold one sequence of the longest length."""
