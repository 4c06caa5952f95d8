"""What the maker writes is what transformers and peft read."""

from pathlib import Path

import pytest

from benchmarks.bpe import train_tokenizer
from benchmarks.floor import cost_of
from benchmarks.shapes import SHAPES

torch = pytest.importorskip("torch")
make_model = pytest.importorskip("benchmarks.make_model")


def test_text_comes_back_and_every_id_has_text() -> None:
    tokenizer = train_tokenizer(SHAPES["tiny"], characters=100_000)
    assert tokenizer.get_vocab_size() == 1024
    text = "def main() -> None:\n    print('gr\u00fc\u00df dich \U0001f600')\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(1024))


def test_weights_depend_on_the_seed_alone() -> None:
    model = make_model.skeleton(make_model.config_of(SHAPES["tiny"]))
    cpu = torch.device("cpu")
    one, same, other = (dict(make_model.random_weights(model, seed, cpu)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 still asks for it
def test_transformers_reads_the_shards_and_peft_the_adapters(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny, folder = SHAPES["tiny"], tmp_path / "model"
    make_model.write_model(
        tiny, folder, seed=1, device=torch.device("cpu"), characters=50_000, shard_bytes=100_000
    )
    made = make_model.write_adapters(tiny, tmp_path / "adapters", count=3, ranks=(4, 8), seed=1)
    assert [path.name for path in made] == ["r4-00", "r8-01", "r4-02"]
    assert len(list(folder.glob("model-*.safetensors"))) > 1

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        plain = model(input_ids=chat["input_ids"]).logits
        changed = PeftModel.from_pretrained(model, made[1])(input_ids=chat["input_ids"]).logits
    assert not torch.equal(plain, changed)


def test_the_floor_knows_the_linear_layers(tmp_path: Path) -> None:
    tiny = SHAPES["tiny"]
    make_model.write_model(tiny, tmp_path, seed=1, device=torch.device("cpu"), characters=50_000)
    model = make_model.skeleton(make_model.config_of(tiny))
    linears = [linear for _, linear in make_model.linear_layers(model)]
    assert len(linears) == 2 * 7
    assert cost_of(tmp_path).layer_weights == sum(linear.weight.numel() for linear in linears)
