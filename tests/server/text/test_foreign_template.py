"""What a template that came with an adapter says, and what becomes of one that takes too long."""

from collections.abc import Iterator

import pytest

from server.errors import BadRequest, TemplateFailed, Unavailable
from server.text.foreign_template import ForeignTemplate
from server.text.sandbox import Sandbox

USER: dict[str, object] = {"role": "user", "content": "hi"}
SLOW_FOR_MANY = (
    "{% if messages | length > 9 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}{{ messages | length }}"
)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox("templates", memory_bytes=512 * 2**20, cpu_s=0.3)
    yield sandbox
    sandbox.close()


def render(template: ForeignTemplate, messages: list[dict[str, object]], **options: object) -> str:
    asked = {"add_generation_prompt": True, "continue_final_message": False, **options}
    return template.render(messages, **asked)  # type: ignore[arg-type]


def test_names_and_variables_reach_the_template(sandbox: Sandbox) -> None:
    template = ForeignTemplate("{{ eos_token }}{{ mood }}", {"eos_token": "</s>"}, sandbox)
    assert render(template, [USER], mood="merry") == "</s>merry"


def test_null_is_the_same_as_nothing(sandbox: Sandbox) -> None:
    template = ForeignTemplate("{{ 'name' in messages[0] }}", {}, sandbox)
    assert render(template, [{**USER, "name": None}]) == "False"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[5].content }}", "refused the messages: "),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ lipsum.__globals__['os'].system('true') }}", "refused the messages: "),
        ("{{ 1 // 0 }}", "refused the messages: "),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "nested too deeply"),
        ("{% import 'x' as y %}", "refused the messages: "),
        ("{{ raise_exception('x' * 100000) }}", r"x\.\.\.$"),
    ],
)
def test_what_a_template_refuses_is_the_client_s_to_read(sandbox: Sandbox, source: str, message: str) -> None:
    with pytest.raises(TemplateFailed, match=message) as refused:
        render(ForeignTemplate(source, {}, sandbox), [USER])
    assert refused.value.param == "messages"
    assert len(refused.value.message) < 1000


def test_no_messages_and_contradictions_are_refused_before_anything_runs(sandbox: Sandbox) -> None:
    template = ForeignTemplate("x", {}, sandbox)
    with pytest.raises(BadRequest, match="empty"):
        render(template, [])
    with pytest.raises(TemplateFailed, match="continued"):
        render(template, [USER], continue_final_message=True)


def test_messages_nested_too_deeply_are_refused(sandbox: Sandbox) -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateFailed, match="nested too deeply"):
        render(ForeignTemplate("x", {}, sandbox), [{**USER, "tool_calls": deep}])


def test_what_took_too_long_is_not_tried_again_for_a_while(sandbox: Sandbox) -> None:
    time = Time()
    template = ForeignTemplate(SLOW_FOR_MANY, {}, sandbox, time)
    with pytest.raises(TemplateFailed, match=r"more than 0\.3 seconds"):
        render(template, [USER] * 20)
    for size in (20, 100):
        with pytest.raises(TemplateFailed, match="a moment ago"):
            render(template, [USER] * size)
    time.now += 61
    with pytest.raises(TemplateFailed, match=r"more than 0\.3 seconds"):
        render(template, [USER] * 20)


def test_smaller_conversations_go_on_meanwhile(sandbox: Sandbox) -> None:
    template = ForeignTemplate(SLOW_FOR_MANY, {}, sandbox)
    with pytest.raises(TemplateFailed):
        render(template, [USER] * 20)
    assert render(template, [USER] * 3) == "3"


def test_a_syntax_error_is_found_without_messages(sandbox: Sandbox) -> None:
    assert ForeignTemplate("{{ messages }}", {}, sandbox).check() is None
    assert "endfor" in (ForeignTemplate("{% endfor %}", {}, sandbox).check() or "")


def test_without_a_sandbox_it_is_for_later(sandbox: Sandbox) -> None:
    closed = Sandbox("templates", memory_bytes=512 * 2**20, cpu_s=1.0)
    closed.close()
    with pytest.raises(Unavailable) as refused:
        render(ForeignTemplate("x", {}, closed), [USER])
    assert refused.value.retry_after_s
