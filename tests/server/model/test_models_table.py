"""transformers finds the same classes, having looked for them once."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from server.model.models_table import import_models, models_table

_COUNT_READ = """
import sys
from server.model.models_table import import_models

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import_models()
import transformers.models
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models import gpt2

assert gpt2.GPT2Config.model_type == "gpt2" and Qwen2Config.model_type == "qwen2"
assert Qwen2ForCausalLM.__module__ == "transformers.models.qwen2.modeling_qwen2"
print(sum("modeling_" in path and path.endswith(".py") for path in opened))
"""


def test_the_table_is_the_one_that_transformers_makes() -> None:
    path = Path(transformers.__file__).parent / "models" / "__init__.py"
    table = models_table(import_utils.define_import_structure)
    assert table == import_utils.define_import_structure(str(path))
    assert "qwen2.modeling_qwen2" in table[frozenset({"torch"})]


def test_no_sources_are_read_for_it() -> None:
    """In a process of its own, for here they have been read."""
    ran = subprocess.run([sys.executable, "-c", _COUNT_READ], capture_output=True, text=True, check=True)
    num_read = int(ran.stdout)
    assert num_read < 20, "hundreds, if all are read"


@pytest.mark.parametrize("name", ["no_function", "another_answer"])
def test_another_transformers_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.models", raising=False)
    if name == "no_function":
        monkeypatch.delattr(import_utils, "define_import_structure")
    else:
        monkeypatch.setattr(import_utils, "define_import_structure", lambda *args, **named: None)
    import_models()
    assert "transformers.models" not in sys.modules
