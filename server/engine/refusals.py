"""What `adapters` refuses, in the words of the server: `adapters` knows nothing of statuses."""

from adapters.errors import AdapterError, AdapterNotFound, AdapterUnavailable
from server.errors import BadRequest, ModelNotFound, ServeError, Unavailable


def refusal_of(error: AdapterError, param: str = "model") -> ServeError:
    """What a client is told when the adapter that it names there cannot be had."""
    if isinstance(error, AdapterNotFound):
        return ModelNotFound(error.message, param=param)
    if isinstance(error, AdapterUnavailable):
        return Unavailable(error.message, param=param, retry_after_s=error.retry_after_s)
    return BadRequest(error.message, param=param)
