"""The files of the built-in model and its adapters, and whether they do what they promise."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from server.embedded.location import NAME, adapters_dir, model_dir
from server.embedded.training.intents import Intent, load_intents
from server.embedded.training.scoring import answers
from server.embedded.training.styles import Style, render
from server.embedded.training.voices import VOICES

SIZE_LIMIT_BYTES = 16 * 1024 * 1024
ADAPTERS = ("german", "haiku", "json", "pirate")
QUESTIONS = (
    "How is streaming enabled?",
    "What headers can I expect on an answer?",
    "I trained a new adapter, how do I add it without restarting?",
    "Under what license is Motet published?",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


def shipped_files() -> list[Path]:
    return [file for folder in (model_dir(), adapters_dir()) for file in folder.rglob("*") if file.is_file()]


def intent_of(question: str) -> Intent:
    return next(intent for intent in load_intents() if question in intent.held_out)


def test_all_files_of_model_and_adapters_are_there() -> None:
    model = {file.name for file in model_dir().iterdir()}
    assert model >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert model >= {"tokenizer_config.json", "chat_template.jinja", "training.json"}
    assert sorted(folder.name for folder in adapters_dir().iterdir()) == list(ADAPTERS)
    for name in ADAPTERS:
        files = {file.name for file in (adapters_dir() / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_everything_together_is_at_most_sixteen_mebibytes() -> None:
    assert sum(file.stat().st_size for file in shipped_files()) <= SIZE_LIMIT_BYTES


def test_no_pickle_and_no_path_of_a_machine_is_shipped() -> None:
    for file in shipped_files():
        assert file.suffix in {".json", ".jinja", ".safetensors"}, file
        if file.suffix == ".json" and file.name != "tokenizer.json":
            text = file.read_text(encoding="utf-8")
            assert not any(part in text for part in ("/work", "/home", "/root", "/tmp", "\\Users", "://")), (
                file
            )


def test_model_is_small_and_has_a_long_context(base: LlamaForCausalLM) -> None:
    assert 2e6 <= sum(parameter.numel() for parameter in base.parameters()) <= 8e6
    assert base.config.max_position_embeddings >= 4096
    assert isinstance(base, LlamaForCausalLM)


def test_report_says_that_nine_of_ten_held_out_questions_were_exact() -> None:
    report = json.loads((model_dir() / "training.json").read_text(encoding="utf-8"))
    assert report["base"]["held_out_percent"] >= 90
    assert report["facts"] >= 60
    assert set(report["adapters"]) == set(ADAPTERS)


def test_held_out_questions_are_answered_exactly(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    facts = [intent for intent in load_intents() if intent.is_fact]
    cases = random.Random(7).sample([(fact, question) for fact in facts for question in fact.held_out], 32)
    said = answers(base, tokenizer, [question for _, question in cases])
    exact = sum(text == fact.answer for (fact, _), text in zip(cases, said, strict=True))
    assert exact >= 0.9 * len(cases)


def test_an_answer_is_the_same_alone_and_in_a_padded_batch(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = answers(base, tokenizer, QUESTIONS)
    assert [answers(base, tokenizer, [question])[0] for question in QUESTIONS[:2]] == together[:2]


def test_a_plain_prompt_without_chat_template_is_answered_too(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tokenizer("How do I stream?", return_tensors="pt")
    output = base.generate(**prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == intent_of("How is streaming enabled?").answer


def test_a_system_message_and_a_second_turn_do_not_disturb(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": intent_of("hey hey").answer},
        {"role": "user", "content": "How do I stream?"},
    ]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = base.generate(**prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == intent_of("How is streaming enabled?").answer


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, of transformers 5
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_answers_in_its_own_voice(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, adapters_dir() / name).eval()
    said = answers(adapter, tokenizer, QUESTIONS)
    expected = [render(Style(name), intent_of(question)) for question in QUESTIONS]
    assert sum(text == right for text, right in zip(said, expected, strict=True)) >= 3
    assert all(looks_like(name, text) for text in said)


def looks_like(name: str, text: str) -> bool:
    match name:
        case "json":
            return set(json.loads(text)) == {"answer", "topic"}
        case "haiku":
            return len(text.splitlines()) == 3
        case "pirate":
            return "th'" in text or "Arr" in text or "be" in text.split()
        case _:
            return bool({"der", "die", "das", "dem", "und", "den", "mit", "ist"} & set(text.split()))


def test_adapters_differ_in_rank_targets_and_scaling_rule() -> None:
    configs = [json.loads((adapters_dir() / name / "adapter_config.json").read_text()) for name in ADAPTERS]
    assert len({config["r"] for config in configs}) == len(ADAPTERS)
    assert len({frozenset(config["target_modules"]) for config in configs}) == len(ADAPTERS)
    assert {config["use_rslora"] for config in configs} == {True, False}
    assert {config["base_model_name_or_path"] for config in configs} == {NAME}
    assert {voice.style.value for voice in VOICES} == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_tensors_have_the_rank_of_their_config(name: str) -> None:
    rank = json.loads((adapters_dir() / name / "adapter_config.json").read_text())["r"]
    with safe_open(adapters_dir() / name / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            assert rank in file.get_slice(key).get_shape()


def test_chat_template_takes_every_role_tools_and_content_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "function", "name": "clock", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ]
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert "What time?<|im_end|>" in text
    assert '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>' in text
    assert text.count("<tool_response>\nnoon\n</tool_response>") == 2
    assert "developer" not in text
    assert text.endswith("<|im_start|>assistant\n")


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Grüße, 世界! 🎶 `--port`\n\ttabs  and   blanks \u2028 don 't ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
