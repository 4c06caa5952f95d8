"""Templates render as transformers renders them, and their refusals reach the client."""

import json
from pathlib import Path

import pytest

from server.errors import BadRequest
from server.text.tokenizer import Tokenizer
from tests import made_tokenizers

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('Tool messages are not supported') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if mood is defined %}({{ mood }}){% endif %}"
)
USER = {"role": "user", "content": "hi"}


def chat_tokenizer(folder: Path, template: str = TEMPLATE) -> Tokenizer:
    made_tokenizers.byte_level().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


def test_a_conversation_is_rendered_with_the_generation_prompt(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat([USER]) == "<s><|user|>hi\n<|assistant|>"
    assert tokenizer.render_chat([USER], add_generation_prompt=False) == "<s><|user|>hi\n"


def test_the_beginning_of_sequence_token_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    ids = tokenizer.encode(tokenizer.render_chat([USER]), add_special_tokens=False)
    bos = tokenizer.encode("<s>", add_special_tokens=False)[0]
    assert ids.count(bos) == 1


def test_variables_reach_the_template(tmp_path: Path) -> None:
    assert chat_tokenizer(tmp_path).render_chat([USER], mood="merry").endswith("(merry)")


def test_the_final_message_can_be_continued(tmp_path: Path) -> None:
    messages = [USER, {"role": "assistant", "content": "Hel"}]
    rendered = chat_tokenizer(tmp_path).render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered.endswith("<|assistant|>Hel")


def test_the_template_s_own_message_reaches_the_client(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="Tool messages are not supported") as refused:
        chat_tokenizer(tmp_path).render_chat([{"role": "tool", "content": "x"}])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[5].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].missing.deeper }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_fails_is_a_refusal_and_not_a_crash(tmp_path: Path, template: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_tokenizer(tmp_path, template).render_chat([USER])
    assert refused.value.param == "messages"


def test_no_messages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="empty"):
        chat_tokenizer(tmp_path).render_chat([])


def test_nothing_of_the_sandbox_leaks_into_later_conversations(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{% set ns = namespace(n=0) %}{{ ns.n }}{{ messages | length }}")
    assert [tokenizer.render_chat([USER] * n) for n in (1, 2)] == ["01", "02"]
