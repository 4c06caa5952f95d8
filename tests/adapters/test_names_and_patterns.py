"""PEFT's spellings, and its patterns with its own library as the judge."""

import itertools

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.errors import AdapterInvalid
from adapters.names import Part, TensorName, format_key, parse_key, shown
from adapters.patterns import MatchBudget, ModulePattern
from adapters.spec import LoraSpec

Q = "model.layers.0.self_attn.q_proj"

PATHS = tuple(
    f"{prefix}.{layer}.{module}"
    for prefix in ("model.layers", "transformer.h", "model.decoder.layers", "model.language_model.layers")
    for layer in (0, 1, 10, 11)
    for module in (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
        "attn.c_attn",
        "mlp.experts.1.up_proj",
    )
)

PATTERNS = (
    "q_proj",
    "proj",
    "_proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "layers.1",
    r"layers\.1\.self_attn\.q_proj",
    "model.layers.0.self_attn.q_proj",
    "odel.layers.0.self_attn.q_proj",
    r"layers\.\d\..*q_proj",
    r"layers\.\d+\..*q_proj",
    r".*\.(q_proj|v_proj)",
    r"(q_proj|v_proj)",
    r"q_proj|v_proj",
    r".*",
    r".*attn.*",
    r"h\.(0|1)\.attn\.c_attn",
    r"[qv]_proj",
    r"[^q]_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)",
    r"^model\.layers.*",
    r".*q_proj$",
    r"^(?!.*experts).*_proj$",
    r"model(?=\.).*\.(?:q_proj|up_proj)",
    r"layers.1[01].self_attn.\w+",
    r"\w{2}_proj|q{1,3}_proj",
    "",
)


@pytest.mark.parametrize("half", [Part.A, Part.B])
@pytest.mark.parametrize("infix", ["", ".default", ".my-adapter_1"])
def test_key_gives_module_and_part(half: Part, infix: str) -> None:
    name = parse_key(f"base_model.model.{Q}.{half.value}{infix}.weight")

    assert (name.module, name.part) == (Q, half)
    assert parse_key(format_key(name)) == name


@pytest.mark.parametrize(
    ("spelling", "part"),
    [
        ("lora_magnitude_vector", Part.MAGNITUDE),
        ("lora_magnitude_vector.default.weight", Part.MAGNITUDE),
        ("lora_magnitude_vector.default", Part.MAGNITUDE),
        ("lora_B.bias", Part.BIAS),
        ("lora_B.default.bias", Part.BIAS),
        ("lora_embedding_A", Part.EMBEDDING_A),
        ("lora_embedding_A.default", Part.EMBEDDING_A),
        ("lora_embedding_B", Part.EMBEDDING_B),
        ("token_adapter.trainable_tokens_delta", Part.ROWS),
        ("token_adapter.trainable_tokens_delta.default", Part.ROWS),
        ("base_layer.weight", Part.BASE),
        ("token_adapter.base_layer.weight", Part.BASE),
        ("weight", Part.BASE),
    ],
)
def test_every_part_is_known_by_its_spelling(spelling: str, part: Part) -> None:
    name = parse_key(f"base_model.model.{Q}.{spelling}")

    assert name == TensorName(Q, part)
    assert parse_key(format_key(name)) == name


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        (f"base_model.model.{Q}.bias", "bias"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "modules_to_save"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
        (f"base_model.model.{Q}.lora_C.default.weight", "not part"),
        (f"{Q}.lora_A.weight", "not part"),
        ("base_model.model..lora_A.weight", "not part"),
        ("base_model.model.a..b.lora_A.weight", "not part"),
        (f"base_model.model.{Q}.lora_C.weight", "not part"),
        (f"base_model.model.{Q}.lora_A.weight\n", "not part"),
        ("", "not part"),
        ("x" * 10_000, "not part"),
        ("\x00\x1b[31m", "not part"),
    ],
)
def test_other_keys_are_refused_by_the_feature_they_belong_to(key: str, feature: str) -> None:
    with pytest.raises(AdapterInvalid, match=feature) as refusal:
        parse_key(key)
    assert len(refusal.value.message) < 400
    assert refusal.value.message.isprintable()


def test_shown_text_is_short_and_printable() -> None:
    assert shown("a\nb\x1b") == r"'a\nb\x1b'"
    assert len(shown("x" * 100_000)) < 200


def test_format_key_is_what_peft_writes() -> None:
    assert format_key(TensorName(Q, Part.A)) == f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rank_patterns_match_what_peft_matches(pattern: str) -> None:
    ours = ModulePattern(pattern, MatchBudget(), is_suffix=True)
    for path in PATHS:
        assert ours.matches(path) == (get_pattern_key([pattern], path) == pattern), path


def test_first_matching_rank_pattern_counts() -> None:
    for first, second in itertools.permutations(["q_proj", r"layers\.1\..*", "self_attn.q_proj"], 2):
        spec = lora_spec(rank_pattern={first: 3, second: 5}, alpha_pattern={first: 7.0, second: 9})
        for path in PATHS:
            key = get_pattern_key([first, second], path)
            assert spec.rank_of(path) == {first: 3, second: 5}.get(key, 8)
            assert spec.alpha_of(path) == {first: 7, second: 9}.get(key, 8)


def lora_spec(**settings: object) -> LoraSpec:
    return LoraSpec.parse({"peft_type": "LORA"} | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "c_attn"], "exclude_modules": ["0.self_attn.q_proj"]},
        {"target_modules": ["model.layers.10.self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "c_attn"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        *({"target_modules": pattern} for pattern in PATTERNS if pattern),
    ],
    ids=str,
)
def test_targets_are_those_of_peft(settings: dict[str, object]) -> None:
    theirs, ours = LoraConfig(**settings), lora_spec(**settings)
    for path in PATHS:
        assert ours.matches(path) == bool(check_target_module_exists(theirs, path)), path


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{2,1}", "(?P<x>", "*", "(?z)", "a" * 9000, "(" * 3000 + ")" * 3000]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterInvalid):
        lora_spec(target_modules=pattern)
    with pytest.raises(AdapterInvalid):
        lora_spec(rank_pattern={pattern: 4})


def test_pattern_that_backtracks_for_ever_is_refused_in_time() -> None:
    slow = ModulePattern(r"(.*a){30}(.*b){30}x", MatchBudget(left_s=0.05))

    with pytest.raises(AdapterInvalid, match="too long"):
        slow.matches("ab" * 500)
    with pytest.raises(AdapterInvalid, match="too long"):
        slow.matches("ab" * 500)


@pytest.mark.parametrize("pattern", ["q_proj", "(q|k)_proj"], ids=["plain", "other"])
def test_patterns_pay_for_being_compiled_and_for_being_asked(pattern: str) -> None:
    with pytest.raises(AdapterInvalid, match="too long"):
        ModulePattern(pattern, MatchBudget(left_s=1e-9))
    budget = MatchBudget()
    asked = ModulePattern(pattern, budget)
    budget.left_s = 1e-9
    with pytest.raises(AdapterInvalid, match="too long"):
        asked.matches("model.q_proj")


def test_pattern_table_of_a_whole_model_gives_each_module_its_own_rank() -> None:
    """EVA writes a rank for every module."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(100)]
    spec = lora_spec(rank_pattern={name: 1 + index for index, name in enumerate(names)})

    assert [spec.rank_of(name) for name in names] == list(range(1, 101))
