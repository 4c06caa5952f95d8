"""Adapters with a chat template, tokens or an end of their own, over HTTP; transformers says what is right.

The base is the embedded model with spare rows in its table of embeddings, as large models have them.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from server.embedded.location import adapters_dir, model_dir
from tests.e2e.running import RunningServer, start
from tests.nursery import Nursery
from tests.text_folders import Change, edit_json, reference, save_beside

PIRATE = adapters_dir() / "pirate"
SPARE = 16
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role | upper }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>ASSISTANT: {% endif %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is <thing> Motet?"},
]
CHAT = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
TEXT = "Motet <thing> is <|turn|> a"


def roomy(folder: Path) -> Path:
    """The embedded model with `SPARE` rows more in its table of embeddings."""
    shutil.copytree(model_dir(), folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    table = weights[name]
    spare = table.mean(dim=0, keepdim=True).expand(SPARE, -1).to(table.dtype)
    weights[name] = torch.cat([table, spare]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=table.shape[0] + SPARE))
    return folder


def add_tokens(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens(["<thing>"])


def add_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE


def add_both(tokenizer: Any) -> None:
    add_tokens(tokenizer)
    add_template(tokenizer)


CHANGES: dict[str, Change] = {
    "saved": lambda tokenizer: tokenizer(["x"], truncation=True, max_length=9),
    "template": add_template,
    "tokens": add_tokens,
    "both": add_both,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roomy(tmp_path_factory.mktemp("models") / "roomy")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with the weights of `pirate`, each with a text of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(PIRATE, folder / "plain")
    for name, change in CHANGES.items():
        shutil.copytree(PIRATE, folder / name)
        save_beside(folder / name, model, change)
    return folder


@pytest.fixture(scope="module")
def lending(nursery: Nursery, model: Path, folder: Path) -> Iterator[RunningServer]:
    names = ("--served-model-name", "base", "--adapters-dir", str(folder))
    exactly = ("--dtype", "float32")  # no near tie turns over in another batch
    running = start(str(model), *names, *exactly, nursery=nursery)
    yield running
    assert running.stop() == 0, "\n".join(running.lines)


def post(server: RunningServer, path: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=100)
    assert response.status_code == 200, response.text
    return response.json()


def said(server: RunningServer, name: str, **fields: Any) -> str:
    answer = post(server, "/v1/chat/completions", **{**CHAT, "model": name, **fields})
    text: str = answer["choices"][0]["message"]["content"]
    return text


def chat_ids(folder: Path, name: str) -> list[int]:
    """Of the prompt, as transformers makes them from the adapter's own folder."""
    ids: list[int] = reference(folder / name).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_prompt_of_a_chat_is_what_transformers_makes_of_the_adapter_s_folder(
    lending: RunningServer, folder: Path, name: str
) -> None:
    expected = chat_ids(folder, name)
    told = post(lending, "/chat_tokenize", messages=MESSAGES, model=name)
    assert [span["id"] for span in told["tokenize_response"]] == expected

    openai = post(lending, "/v1/chat/completions", **CHAT, model=name)
    assert openai["usage"]["prompt_tokens"] == len(expected)
    ollama = post(
        lending, "/api/chat", model=name, messages=MESSAGES, options={"num_predict": 1}, stream=False
    )
    assert ollama["prompt_eval_count"] == len(expected)
    turns = {"system": MESSAGES[0]["content"], "messages": MESSAGES[1:]}
    anthropic = post(lending, "/v1/messages", model=name, max_tokens=1, **turns)["usage"]
    assert anthropic["input_tokens"] + anthropic["cache_read_input_tokens"] == len(expected)
    counted = post(lending, "/v1/messages/count_tokens", model=name, **turns)
    assert counted["input_tokens"] == len(expected)


@pytest.mark.parametrize("name", list(CHANGES))
def test_the_prompt_of_a_text_has_the_adapter_s_tokens(
    lending: RunningServer, folder: Path, name: str
) -> None:
    expected = reference(folder / name).encode(TEXT)
    parameters = {"adapter_id": name, "max_new_tokens": 2, "decoder_input_details": True, "details": True}
    lorax = post(lending, "/generate", inputs=TEXT, parameters=parameters)
    prefill = lorax["details"]["prefill"]
    assert [token["id"] for token in prefill] == expected
    assert "".join(token["text"] for token in prefill) == TEXT
    spans = post(lending, "/tokenize", inputs=TEXT, model=name)
    assert [span["id"] for span in spans] == expected
    assert post(lending, "/detokenize", tokens=expected, model=name) == {"prompt": TEXT}
    echoed = post(lending, "/v1/completions", model=name, prompt=TEXT, echo=True, max_tokens=1)
    assert echoed["choices"][0]["text"].startswith(TEXT)
    assert echoed["usage"]["prompt_tokens"] == len(expected)


def test_weights_under_several_names_are_shared_and_the_base_s_text_is_nobody_s_own(
    lending: RunningServer,
) -> None:
    for name in ("plain", *CHANGES):
        said(lending, name)
    cards = httpx.get(f"{lending.url}/v1/models").json()["data"]
    revisions = {card["id"]: card["revision"] for card in cards if card["parent"]}
    assert len(set(revisions.values())) == 1
    assert said(lending, "saved") == said(lending, "plain") != said(lending, "both")


def test_each_name_has_its_own_template_also_in_one_batch(lending: RunningServer) -> None:
    names = ["base", "plain", *CHANGES]
    alone = [said(lending, name) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: said(lending, name), names * 3))
    assert together == alone * 3


def test_show_tells_the_adapter_s_template(lending: RunningServer) -> None:
    assert post(lending, "/api/show", model="both")["template"] == TEMPLATE
    assert (
        post(lending, "/api/show", model="plain")["template"]
        == post(lending, "/api/show", model="base")["template"]
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_token_and_its_trained_row_are_served_as_peft_does(
    model: Path, folder: Path, tmp_path: Path, launch: Any
) -> None:
    """What `trainable_token_indices` is for: new tokens in spare rows."""
    adapter = tmp_path / "adapters" / "trained"
    tokenizer = reference(save_beside(adapter, model, add_both))
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [tokenizer.convert_tokens_to_ids(token) for token in ("<|turn|>", "<thing>")]
    torch.manual_seed(0)
    trained = get_peft_model(
        network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=rows)
    )
    for name, parameter in trained.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(str(adapter), save_embedding_layers=False)
    prompt = torch.tensor([chat_ids(tmp_path / "adapters", "trained")])
    assert set(rows) <= set(prompt[0].tolist())
    with torch.inference_mode():
        expected = trained.eval().generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    server = launch(
        *(str(model), "--served-model-name", "base", "--dtype", "float32"),
        *("--adapters-dir", str(adapter.parent)),
    )

    answer = post(server, "/v1/chat/completions", **CHAT, model="trained", logprobs=True)
    told = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert told == [tokenizer.decode([token_id]) for token_id in expected]
    assert server.stop() == 0, "\n".join(server.lines)


# --- Ends ---------------------------------------------------------------------------------------------------


def with_end(folder: Path, name: str, end_id: int) -> None:
    """`plain` under another name, whose answers end with this token too."""
    shutil.copytree(folder / "plain", folder / name)
    (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_id]}))


def test_an_own_end_ends_answers_of_its_adapter_alone(lending: RunningServer, folder: Path) -> None:
    parameters = {"max_new_tokens": 8, "details": True, "temperature": 0}
    plain = post(lending, "/generate", inputs="Motet is", parameters={**parameters, "adapter_id": "plain"})
    tokens = plain["details"]["tokens"]
    seen = [token["id"] for token in tokens]
    place = next(i for i in range(2, 8) if seen[i] not in seen[:i])
    before = "".join(token["text"] for token in tokens[:place])
    with_end(folder, "ending", seen[place])

    ended = post(lending, "/generate", inputs="Motet is", parameters={**parameters, "adapter_id": "ending"})
    assert ended["details"]["finish_reason"] == "eos_token"
    assert ended["generated_text"] == before
    body = {"prompt": "Motet is", "max_tokens": 8, "temperature": 0}
    completion = post(lending, "/v1/completions", **body, model="ending")["choices"][0]
    assert (completion["text"], completion["finish_reason"]) == (before, "stop")
    ignored = post(lending, "/v1/completions", **body, model="ending", ignore_eos=True)["choices"][0]
    assert ignored["finish_reason"] == "length"
    longer = post(lending, "/v1/completions", **body, model="ending", min_tokens=8)["choices"][0]
    assert longer["finish_reason"] == "length"
    job = {"prompt": "Motet is", "max_new_tokens": 8, "temperature": 0}
    assert before in json.dumps(post(lending, "/api/jobs/ending/infer", **job))
    assert post(lending, "/api/jobs/ending/infer", **job) != post(lending, "/api/jobs/plain/infer", **job)
    ollama = {
        "prompt": "Motet is",
        "raw": True,
        "stream": False,
        "options": {"temperature": 0, "num_predict": 8},
    }
    shown = post(lending, "/api/generate", model="ending", **ollama)
    assert (shown["response"], shown["done_reason"]) == (before, "stop")

    for name in ("plain", "base"):
        other = post(lending, "/v1/completions", **body, model=name)
        assert other["choices"][0]["finish_reason"] == "length"
    assert (
        post(lending, "/generate", inputs="Motet is", parameters={**parameters, "adapter_id": "plain"})[
            "generated_text"
        ]
        == plain["generated_text"]
    )


# --- Changes and refusals -----------------------------------------------------------------------------------


def test_a_template_that_changes_under_its_name_counts_from_the_next_load_on(
    lending: RunningServer, folder: Path
) -> None:
    shutil.copytree(folder / "plain", folder / "changing")
    before = post(lending, "/chat_tokenize", messages=MESSAGES, model="changing")["templated_text"]
    staged = folder / "changing" / "template.new"
    staged.write_text("{{ messages[1].content }}")
    staged.rename(folder / "changing" / "chat_template.jinja")
    loaded = {"lora_name": "changing", "lora_path": str(folder / "changing"), "load_inplace": True}
    assert httpx.post(f"{lending.url}/v1/load_lora_adapter", json=loaded, timeout=60).status_code == 200
    after = post(lending, "/chat_tokenize", messages=MESSAGES, model="changing")["templated_text"]
    assert before != after == MESSAGES[1]["content"]


def broken_tokenizer(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_bytes(b"{" * 100_000)


def far_token(adapter: Path) -> None:
    save_beside(adapter, model_dir(), lambda t: t.add_tokens([f"<{i}>" for i in range(SPARE + 1)]))


def swapped_ids(adapter: Path) -> None:
    save_beside(adapter, model_dir())

    def swap(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit_json(adapter / "tokenizer.json", swap)


def own_code(adapter: Path) -> None:
    (adapter / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (adapter / "evil.py").write_text("raise SystemExit")


REFUSED = {
    "broken tokenizer": (broken_tokenizer, "tokenizer.json cannot be used"),
    "far token": (far_token, "has embeddings for"),
    "swapped ids": (swapped_ids, "was not trained on this model"),
    "own code": (own_code, "code of its own, which is never run"),
    "huge template": (
        lambda a: (a / "chat_template.jinja").write_text("x" * 10**6),
        "chat_template.jinja is larger than",
    ),
    "no template": (lambda a: (a / "chat_template.jinja").write_text("{% if %}"), "no usable chat template"),
    "link out": (lambda a: (a / "chat_template.jinja").symlink_to("/etc/hostname"), "leads out"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_a_text_that_cannot_be_served_is_refused_by_name(
    lending: RunningServer, folder: Path, what: str
) -> None:
    name = what.replace(" ", "-")
    shutil.copytree(folder / "plain", folder / name)
    prepare, message = REFUSED[what]
    prepare(folder / name)
    answer = httpx.post(f"{lending.url}/v1/chat/completions", json={**CHAT, "model": name}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert str(folder) not in answer.text
    lending.wait_until_idle()


HOSTILE = {
    "endless": (LOOP, "takes more than"),
    "hungry": ("{{ messages[0].content * 10**9 }}", "too much memory"),
    "escaping": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "refusing": ("{{ raise_exception('only one message') }}", "only one message"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_template_costs_its_own_request_a_400(
    lending: RunningServer, folder: Path, name: str
) -> None:
    shutil.copytree(folder / "plain", folder / name)
    template, message = HOSTILE[name]
    (folder / name / "chat_template.jinja").write_text(template)
    before = said(lending, "both")
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(
            httpx.post, f"{lending.url}/v1/chat/completions", json={**CHAT, "model": name}, timeout=60
        )
        meanwhile = said(lending, "plain")  # whose template is the base's
        answer = hostile.result()
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"
    assert meanwhile == said(lending, "plain")
    assert said(lending, "both") == before
    body = {"prompt": "Motet is", "max_tokens": 2, "model": name}
    assert (
        post(lending, "/v1/completions", **body)["usage"]["completion_tokens"] == 2
    )  # texts need no template
    lending.wait_until_idle()


# --- Other servers ------------------------------------------------------------------------------------------


def test_adapters_bring_templates_to_a_base_without_one(folder: Path, tmp_path: Path, launch: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir(), base)
    (base / "chat_template.jinja").unlink()
    shutil.copytree(PIRATE, tmp_path / "adapters" / "own")
    shutil.copytree(PIRATE, tmp_path / "adapters" / "plain")
    (tmp_path / "adapters" / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    server = launch(str(base), "--served-model-name", "base", "--adapters-dir", str(tmp_path / "adapters"))

    assert said(server, "own")
    for name in ("base", "plain"):
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "model": name}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert server.stop() == 0, "\n".join(server.lines)


def test_an_operator_may_leave_adapters_texts_aside(model: Path, folder: Path, launch: Any) -> None:
    server = launch(
        *(str(model), "--served-model-name", "base", "--adapters-dir", str(folder)),
        *("--adapter-text", "base"),
    )
    assert said(server, "both") == said(server, "plain")
    assert server.stop() == 0, "\n".join(server.lines)
