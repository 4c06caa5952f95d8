"""What can be asked about prompts, by the OpenAI Python SDK from a real server: many at once, their tokens'
log-probabilities, vectors of them. Row C13. For the base model and each embedded adapter.
"""

from collections.abc import Iterator

import openai
import pytest

from tests.e2e.running import RunningServer

MODELS = ["motet", "pirate", "json", "haiku", "german"]
PROMPTS = ["How do I stream tokens?", "What is an adapter?", "Hello, Motet"]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def complete(client: openai.OpenAI, model: str, prompt: str) -> str:
    return client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12).choices[0].text


@pytest.mark.parametrize("model", MODELS)
def test_many_prompts_are_answered_as_each_alone(client: openai.OpenAI, model: str) -> None:
    alone = [complete(client, model, prompt) for prompt in PROMPTS]
    whole = client.completions.create(model=model, prompt=PROMPTS, temperature=0, max_tokens=12, n=2)
    streamed = [""] * len(PROMPTS)
    for chunk in client.completions.create(
        model=model, prompt=PROMPTS, temperature=0, max_tokens=12, echo=True, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text

    assert [choice.text for choice in whole.choices] == [text for text in alone for _ in range(2)]
    assert streamed == [prompt + text for prompt, text in zip(PROMPTS, alone, strict=True)]


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_scores_as_a_prompt_what_it_scored_when_it_was_made(
    client: openai.OpenAI, model: str
) -> None:
    made = client.completions.create(
        model=model, prompt=PROMPTS[0], temperature=0, max_tokens=12, logprobs=1, echo=True
    ).choices[0]
    assert made.logprobs is not None
    scored = client.completions.create(model=model, prompt=made.text, max_tokens=0, logprobs=1, echo=True)
    again = scored.choices[0]

    assert again.text == made.text
    assert again.logprobs is not None
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert again.logprobs.tokens is not None
    assert made.logprobs.tokens is not None
    num_common = len(again.logprobs.tokens)  # an end-of-sequence token is not part of the text
    assert again.logprobs.tokens == made.logprobs.tokens[:num_common]
    assert again.logprobs.text_offset == (made.logprobs.text_offset or [])[:num_common]
    before, after = made.logprobs.token_logprobs, again.logprobs.token_logprobs
    assert before is not None
    assert after is not None
    assert before[0] is None
    assert after[1:] == pytest.approx(before[1:num_common], abs=1e-3)


def test_vectors_of_many_inputs_are_those_of_each_alone(client: openai.OpenAI) -> None:
    together = client.embeddings.create(model="motet", input=PROMPTS)
    for prompt, found in zip(PROMPTS, together.data, strict=True):
        [alone] = client.embeddings.create(model="motet", input=prompt, encoding_format="float").data
        assert found.embedding == pytest.approx(alone.embedding, abs=1e-4)
        assert sum(number * number for number in found.embedding) == pytest.approx(1.0, abs=1e-4)


def test_C13_each_adapter_has_vectors_of_its_own(client: openai.OpenAI) -> None:
    seen: list[list[float]] = []
    for model in MODELS:
        for pooling in ("mean", "last"):
            answer = client.embeddings.create(model=model, input=PROMPTS[0], extra_body={"pooling": pooling})
            assert answer.model == model
            seen.append(answer.data[0].embedding)
    pairs = [(a, b) for i, a in enumerate(seen) for b in seen[:i]]
    assert all(sum(x * y for x, y in zip(a, b, strict=True)) < 0.999 for a, b in pairs)
