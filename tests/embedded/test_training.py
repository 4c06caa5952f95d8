"""The text the built-in model is trained on, and the small functions around it."""

import json
import random
from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from server.embedded.training.conversations import ConversationSource, Example, batches
from server.embedded.training.intents import Intent, load_intents
from server.embedded.training.network import Schedule, answer_loss, new_model
from server.embedded.training.phrasing import Phraser, base_questions, normalised
from server.embedded.training.pieces import PieceEncoder
from server.embedded.training.styles import Style, render
from server.embedded.training.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def intents() -> tuple[Intent, ...]:
    return load_intents()


@pytest.fixture(scope="module")
def tokenizer(intents: tuple[Intent, ...]) -> PreTrainedTokenizerFast:
    return build_tokenizer(intents, context=4096)


def make_source(
    intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> ConversationSource:
    return ConversationSource(intents, tokenizer, Style.PLAIN, seed=seed, obeys_requests=True)


def test_there_are_many_facts_each_with_many_phrasings(intents: tuple[Intent, ...]) -> None:
    facts = [intent for intent in intents if intent.is_fact]
    assert len(facts) >= 70
    assert all(len(set(base_questions(fact))) >= 10 for fact in facts)
    assert all(len(set(intent.held_out)) >= 2 for intent in intents)
    assert len({intent.name for intent in intents}) == len(intents)


def test_small_talk_has_many_intents(intents: tuple[Intent, ...]) -> None:
    assert sum(intent.topic == "small talk" for intent in intents) >= 25


def test_held_out_questions_are_other_wordings_than_training(intents: tuple[Intent, ...]) -> None:
    trained = {normalised(question) for intent in intents for question in base_questions(intent)}
    held_out = {normalised(question) for intent in intents for question in intent.held_out}
    assert not trained & held_out


def test_noise_never_makes_a_held_out_question(intents: tuple[Intent, ...]) -> None:
    held_out = {normalised(question) for intent in intents for question in intent.held_out}
    phraser = Phraser(intents, random.Random(3))
    drawn = {normalised(phraser.question(intent)) for intent in intents for _ in range(30)}
    assert not drawn & held_out


def test_no_question_belongs_to_two_intents(intents: tuple[Intent, ...]) -> None:
    owner: dict[str, str] = {}
    for intent in intents:
        for question in {normalised(text) for text in (*base_questions(intent), *intent.held_out)}:
            assert owner.setdefault(question, intent.name) == intent.name, question


def test_loose_pieces_spell_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PieceEncoder(tokenizer, random.Random(0))
    text = "<|im_start|>user\nHow do I launch the streaming server?<|im_end|>\n<|im_start|>assistant\n"
    drawn = [encoder.loose(text) for _ in range(20)]
    assert {tokenizer.decode(ids) for ids in drawn} == {text}
    assert max(map(len, drawn)) > len(encoder.exact(text)) == min(map(len, drawn))


def test_every_style_has_its_form(intents: tuple[Intent, ...]) -> None:
    for intent in intents:
        assert json.loads(render(Style.JSON, intent)) == {"answer": intent.answer, "topic": intent.topic}
        assert len(render(Style.HAIKU, intent).splitlines()) == 3
        assert len({render(style, intent) for style in Style}) == len(Style)


def test_pirate_leaves_code_alone(intents: tuple[Intent, ...]) -> None:
    for intent in intents:
        code = intent.answer.split("`")[1::2]
        assert render(Style.PIRATE, intent).split("`")[1::2] == code


def test_same_seed_gives_the_same_examples(
    intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    first, second = (list(islice(make_source(intents, tokenizer, seed=5), 20)) for _ in range(2))
    assert first == second


def test_training_text_is_what_the_chat_template_renders(
    intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    supply = make_source(intents, tokenizer)
    chats = (tokenizer.decode(example.tokens) for example in islice(supply, 50))
    text = next(
        chat for chat in chats if chat.startswith("<|im_start|>user") and chat.count("<|im_start|>") == 2
    )
    question, answer = (
        part.split("\n", 1)[1].split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:]
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "\n"


def test_batches_keep_to_their_budget_of_tokens(
    intents: tuple[Intent, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    for batch in islice(
        batches(iter(make_source(intents, tokenizer)), batch_tokens=2048, rng=random.Random(0)), 20
    ):
        longest = max(len(example.tokens) for example in batch)
        assert len(batch) == 1 or len(batch) * longest <= 2048


def test_loss_counts_the_answer_only_and_padding_changes_nothing(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = new_model(tokenizer, seed=0)
    short = Example((5, 6, 7, 8), (False, False, True, True))
    other_question = Example((9, 6, 7, 8), (False, False, False, False))
    longer = Example((5, 6, 7, 8, 9, 9), (False,) * 6)
    with torch.no_grad():
        alone = answer_loss(model, [short])
        padded = answer_loss(model, [short, longer, other_question])
    torch.testing.assert_close(alone, padded, rtol=1e-2, atol=1e-2)


def test_the_tokenizer_knows_common_words_and_can_write_anything(tokenizer: PreTrainedTokenizerFast) -> None:
    assert 2000 <= len(tokenizer) <= 4096
    assert len(tokenizer(" adapter")["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("Ærøskøbing 🎻")["input_ids"]) == "Ærøskøbing 🎻"


def test_learning_rate_rises_and_then_falls() -> None:
    schedule = Schedule(steps=100, batch_tokens=1, learning_rate=1.0, warmup_steps=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) > 0.95
    assert rates[-1] == pytest.approx(0.05)
