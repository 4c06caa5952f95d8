"""OpenAI messages to what chat templates expect: text as one string, arguments of tool calls as objects.

Content may be null, a string, or parts; parts that are not text are refused by name, because leaving them out
would answer another question than the one that was asked.
"""

from collections.abc import Mapping, Sequence

from server.api.json_body import load_json
from server.api.openai.schema import Message
from server.api.shapes import shown
from server.errors import BadRequest

# Templates know these roles by older or other names.
_ROLE_IN_TEMPLATES: Mapping[str, str] = {"developer": "system", "function": "tool"}


def role_in_templates(role: str) -> str:
    """The name by which chat templates know a role."""
    return _ROLE_IN_TEMPLATES.get(role, role)


def template_message(index: int, message: Message) -> dict[str, object]:
    """The `index`-th message of a body. Raises: BadRequest that names the part."""
    where = f"messages[{index}]"
    result: dict[str, object] = {
        "role": role_in_templates(message.role),
        "content": "".join(texts_of(message.content, f"{where}.content")),
    }
    if message.name is not None:
        result["name"] = message.name
    calls = message.tool_calls or []
    if message.function_call is not None:  # what tool_calls were called before they could be several
        calls = [*calls, {"type": "function", "function": message.function_call}]
    if calls:
        result["tool_calls"] = [_template_call(call) for call in calls]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def count_chars(messages: Sequence[Mapping[str, object]]) -> int:
    """How much there is for a template to print: not only `content`, names and tool calls as well."""
    total = 0
    rest = [value for message in messages for value in message.values()]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += 2
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list):
            total += 2
            rest += value
        else:
            total += len(str(value))
    return total


def texts_of(content: object, where: str, kinds: Sequence[str] = ("text", "input_text")) -> tuple[str, ...]:
    """Null, a string, or parts of which each must be text, under one of these names.

    Raises: BadRequest that names the part.
    """
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise BadRequest(f"{where}: input should be a string, a list of parts or null", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise BadRequest(
                f"{where}[{i}]: {shown(kind, 'this')} parts are not supported, only text",
                param=f"{where}[{i}]",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRequest(f"{where}[{i}].text: input should be a valid string", param=f"{where}[{i}].text")
        texts.append(text)
    return tuple(texts)


def _template_call(call: dict[str, object]) -> dict[str, object]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = load_json(arguments)
    except (ValueError, RecursionError):
        return call  # the template may still print it as it is
    return {**call, "function": {**function, "arguments": parsed}}
