"""A conversation to prompt text, by the template that comes with the tokenizer.

Rendering is transformers' own: a sandboxed jinja environment that sees plain values only, with the filters
and functions that templates in the wild expect. What is ours is the answer when a template refuses a
conversation: it does so by raising, and its message ("roles must alternate …") is meant for whoever wrote
the conversation.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from server.errors import BadRequest, TemplateFailed

# A template is somebody else's program over the client's values: besides jinja's own errors it can fail as
# expressions do (a missing key, a number where a string was expected).
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ChatTemplate:
    """Thread-safe: rendering changes nothing."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers tokenizer with a chat template."""
        self._tokenizer = tokenizer

    @property
    def source(self) -> str:
        """The template itself; of several, the one that is used for messages alone."""
        template: str | dict[str, str] = self._tokenizer.chat_template
        return template if isinstance(template, str) else template.get("default", "")

    def render(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: object,
    ) -> str:
        """Raises TemplateFailed, or BadRequest without messages; param "messages", and the template's own
        message.
        """
        if not messages:
            raise BadRequest("messages must not be empty", param="messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
        except RecursionError:
            raise TemplateFailed(
                "messages are nested too deeply for the chat template", param="messages"
            ) from None
        except _TEMPLATE_FAILURES as error:
            raise TemplateFailed(
                f"the chat template refused the messages: {error}", param="messages"
            ) from error
        return text
