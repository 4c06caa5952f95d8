import pytest

from benchmarks.prompts import WORDS, Prompter, calibrate


class Counting:
    """A tokenizer of whole words: `special` tokens in front, `costs` for words that are not one token."""

    def __init__(self, special: int = 0, costs: dict[str, int] | None = None, others: int = 1) -> None:
        self.special, self.costs, self.others = special, costs or {}, others
        self.questions = 0

    async def __call__(self, text: str) -> int | None:
        self.questions += 1
        return self.exact(text)

    def exact(self, text: str) -> int:
        return self.special + sum(self.costs.get(word, self.others) for word in text.split())


@pytest.mark.parametrize("special", [0, 1, 3])
@pytest.mark.parametrize("tokens", [5, 200, 4096])
async def test_prompts_are_exact_where_words_can_be_chosen(special: int, tokens: int) -> None:
    tokenizer = Counting(special, {WORDS[3]: 2, WORDS[100]: 3, WORDS[-1]: 2})
    prompter = await calibrate(tokenizer)
    assert prompter.is_exact
    assert tokenizer.exact(prompter.text(tokens, "a")) == tokens
    assert tokenizer.questions < 100


async def test_a_shared_prefix_is_shared_and_comes_on_top() -> None:
    tokenizer = Counting(special=1)
    prompter = await calibrate(tokenizer)
    one, other = (prompter.text(50, key, shared=30, shared_key="s") for key in "ab")
    assert tokenizer.exact(one) == tokenizer.exact(other) == 80
    assert one.split()[:29] == other.split()[:29]
    assert one.split()[29:] != other.split()[29:]


async def test_a_small_vocabulary_gives_lengths_that_are_about_right() -> None:
    tokenizer = Counting(others=3)
    prompter = await calibrate(tokenizer)
    assert not prompter.is_exact
    assert tokenizer.exact(prompter.text(300, "a")) == pytest.approx(300, rel=0.02)


async def test_without_a_counter_a_word_is_a_token() -> None:
    prompter = await calibrate(None)
    assert not prompter.is_exact
    assert len(prompter.text(200, "a").split()) == 200


def test_prompts_are_decided_by_their_key() -> None:
    prompter = Prompter(WORDS, 1.0, 0, is_exact=False)
    assert prompter.text(40, "a") == prompter.text(40, "a")
    assert prompter.text(40, "a") != prompter.text(40, "b")
