"""Everything a request can be refused for: types with status, code, parameter and a client-safe message.

Protocols render these in their own shape; nothing else turns into a 4xx or 5xx. An exception that is not a
ServeError is our own bug: it is logged without its text and answered as InternalError.
"""

from typing import ClassVar


class ServeError(Exception):
    """Base of all refusals."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(ServeError):
    """A value that is wrong or not supported; `param` names it. 400, or 422 where the protocol says so."""

    status = 400
    code = "invalid_value"


class ContextTooLong(BadRequest):
    """Prompt plus max_tokens do not fit the context."""

    code = "context_length_exceeded"


class TemplateFailed(BadRequest):
    """The chat template refuses the messages, or there is none."""


class PreviousResponseNotFound(BadRequest):
    """What a request wants to continue is not kept, or not for this key."""

    code = "previous_response_not_found"


class Unauthorized(ServeError):
    """The server asks for an API key, and the request brings none that is in force."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ServeError):
    """The key may not do this, or a web page from elsewhere asks."""

    status = 403
    code = "forbidden"


class ModelNotFound(ServeError):
    """Neither the base model nor an adapter has this name."""

    status = 404
    code = "model_not_found"


class ResponseNotFound(ServeError):
    """No kept response has this id, or not for this key."""

    status = 404
    code = "response_not_found"


class RouteNotFound(ServeError):
    """There is nothing at this path."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ServeError):
    """The path does not take this method."""

    status = 405
    code = "method_not_allowed"


class PayloadTooLarge(ServeError):
    """The body is larger than the server takes."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(ServeError):
    """The Content-Type is not JSON's."""

    status = 415
    code = "unsupported_media_type"


class Overloaded(ServeError):
    """The queue is full. 429 with Retry-After."""

    status = 429
    code = "overloaded"


class RateLimited(Overloaded):
    """An adapter or a key is over its own limit. 429 with Retry-After."""

    code = "rate_limit_exceeded"


class InternalError(ServeError):
    """A bug of the server's."""

    status = 500
    code = "internal_error"


class EngineFailed(ServeError):
    """The engine could not finish an accepted request."""

    status = 500
    code = "engine_error"


class AnswerIncomplete(EngineFailed):
    """The engine's answer ended without an end."""


class Unavailable(ServeError):
    """Not now: loading, draining, or an adapter is not ready. 503 with Retry-After."""

    status = 503
    code = "unavailable"
