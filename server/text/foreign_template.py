"""A chat template that came with an adapter: it runs in a sandbox, and never here.

What a template takes too long for is not tried again for a while: neither that conversation nor a larger one.
Smaller ones are, so that one client's huge conversation does not take the template from all others.
"""

import time
from collections.abc import Mapping, Sequence

from adapters.types import Clock
from server.errors import BadRequest, TemplateFailed, Unavailable
from server.text.sandbox import Sandbox, SandboxOverrun, SandboxUnavailable, line_of

_REMEMBERED_S = 60.0
_RETRY_AFTER_S = 5


class ForeignTemplate:
    """Thread-safe: of the state that changes, one thread may overwrite what another has just noted."""

    def __init__(
        self, source: str, named_tokens: Mapping[str, str], sandbox: Sandbox, clock: Clock = time.monotonic
    ) -> None:
        self._source = source
        self._named_tokens = dict(named_tokens)
        self._sandbox = sandbox
        self._clock = clock
        self._refused_until = 0.0
        self._refused_size = 0  # of a conversation that was too much, as a power of two

    @property
    def source(self) -> str:
        return self._source

    def check(self) -> str | None:
        """What is wrong with it as a program, if anything. Raises SandboxUnavailable."""
        try:
            answer, _ = self._sandbox.ask({"messages": None}, self._source.encode())
        except SandboxOverrun as error:
            return str(error)
        refused: str | None = answer.get("refused")
        return refused

    def render(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: object,
    ) -> str:
        """Blocks while the sandbox works. Raises TemplateFailed, or BadRequest without messages; param
        "messages". Raises Unavailable without a sandbox.
        """
        if not messages:
            raise BadRequest("messages must not be empty", param="messages")
        if add_generation_prompt and continue_final_message:
            raise TemplateFailed(
                "a conversation cannot both be continued and get a generation prompt", param="messages"
            )
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        source = self._source.encode()
        try:
            line = line_of(
                {
                    "messages": list(messages),
                    "options": options,
                    "variables": {**self._named_tokens, **variables},
                },
                (source,),
            )
        except RecursionError:
            raise TemplateFailed(
                "messages are nested too deeply for the chat template", param="messages"
            ) from None
        size = len(line).bit_length()
        if size >= self._refused_size and self._clock() < self._refused_until:
            raise _refused("it took too long for such a conversation a moment ago")
        try:
            answer, texts = self._sandbox.ask_line(line, source)
        except SandboxOverrun as error:
            self._refused_size, self._refused_until = size, self._clock() + _REMEMBERED_S
            raise _refused(str(error)) from None
        except SandboxUnavailable as error:
            raise Unavailable(str(error), retry_after_s=_RETRY_AFTER_S) from error
        if "refused" in answer:
            raise _refused(answer["refused"])
        return texts[0].decode("utf-8", "surrogatepass")


def _refused(reason: str) -> TemplateFailed:
    return TemplateFailed(f"the adapter's chat template refused the messages: {reason}", param="messages")
