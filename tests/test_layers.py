"""Imports only go down: the table of ARCHITECTURE.md, held against every module; and policy runs without
torch.

The place of a module is that of the longest name in `PLACES` that it begins with. It may import its own level
and those below. "policy" modules neither import torch nor a module that does, "device" modules may.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "adapters")


@dataclass(frozen=True)
class Place:
    level: int
    side: Literal["policy", "device"] = "policy"


PLACES = {
    # 7: the command line, and tools that nothing imports
    "server.__main__": Place(7),
    "server.adapters_command": Place(7),
    "server.chat_command": Place(7),
    "server.completion_command": Place(7),
    "server.launchers": Place(7),
    "server.remote_server": Place(0),
    "server.embedded.training": Place(7, "device"),
    # 6: composition
    "server.process": Place(6),
    "server.app": Place(6),
    "server.assembly": Place(6, "device"),
    "server.settings": Place(6),
    "server.remotes": Place(6),
    "server.http_server": Place(6),
    # 5: HTTP and wire formats
    "server.api": Place(5),
    # 4: between the event loop and the engine thread
    "server.engine.service": Place(4),
    "server.engine.generation": Place(4),
    "server.engine.adapter_users": Place(4),
    "server.engine.stream": Place(4),
    "server.engine.card": Place(4),
    "server.engine.refusals": Place(1),
    "server.engine.invocation": Place(1),
    "server.engine.leases": Place(4),
    "server.engine.worker": Place(4),
    "server.inferless": Place(4),
    # 3: what to do ...
    "server.engine.core": Place(3),
    "server.engine.scheduler": Place(3),
    "server.engine.adapter_gate": Place(3),
    "server.engine.device_orders": Place(3),
    "server.engine.company": Place(3),
    "server.engine.fair_queue": Place(3),
    "server.engine.step_draft": Place(3),
    "server.engine.quotas": Place(3),
    "server.engine.queue_bound": Place(3),
    "server.engine.output": Place(3),
    "server.metrics": Place(3),
    "server.meters": Place(3),
    "server.scrape": Place(3),
    "server.log": Place(3),
    # 3: ... and doing it
    "server.engine.model_runner": Place(3, "device"),
    "server.engine.input_batch": Place(3, "device"),
    "server.engine.kv_cache": Place(3, "device"),
    "server.engine.sampler": Place(3, "device"),
    "server.engine.stopwatch": Place(3, "device"),
    "server.engine.logit_edits": Place(3, "device"),
    "server.engine.draw": Place(3, "device"),
    "server.engine.logprobs": Place(3, "device"),
    "server.engine.prompt_reader": Place(3, "device"),
    "server.model": Place(3, "device"),
    "server.model.errors": Place(0),
    "adapters.device": Place(3, "device"),
    "adapters.batch": Place(3, "device"),
    "adapters.layers": Place(3, "device"),
    "adapters.kernels": Place(3, "device"),
    # 2
    "server.engine.blocks": Place(2),
    "server.text": Place(2),
    "server.text.sandbox_child": Place(2, "device"),  # a process of its own, which nobody imports
    "server.text.tokenizer_comparison": Place(2, "device"),  # only there
    "adapters.registry": Place(2),
    "adapters.named": Place(2),
    "adapters.remotes": Place(2),
    "adapters.merges": Place(2),
    "adapters.reader": Place(2),
    "adapters.flights": Place(2),
    "adapters.leases": Place(2),
    "adapters.scan": Place(2),
    "adapters.watch": Place(2),
    "adapters.placement": Place(2),
    "adapters.weights": Place(2, "device"),
    "adapters.merge": Place(2, "device"),
    "adapters.conversion": Place(2, "device"),
    "adapters.host_memory": Place(2, "device"),
    "adapters.pages": Place(1, "device"),
    "adapters.filling": Place(2, "device"),
    "adapters.dora": Place(2, "device"),
    "adapters.base": Place(2, "device"),
    "adapters.run": Place(2, "device"),
    "adapters.store": Place(2),
    # 1
    "server.engine.plan": Place(1),
    "server.engine.sequence": Place(1),
    "adapters.spec": Place(1),
    "adapters.values": Place(1),
    "adapters.inventory": Place(1, "device"),
    "adapters.trained_tokens": Place(1, "device"),
    "adapters.names": Place(1),
    "adapters.patterns": Place(1),
    "adapters.sources": Place(1),
    "adapters.uploads": Place(1),
    "adapters.origins": Place(1),
    "adapters.signature": Place(1),
    "adapters.failures": Place(1),
    "adapters.safetensors_file": Place(1, "device"),
    "adapters.regular_file": Place(1),
    "adapters.strict_json": Place(1),
    # 0: words that everybody speaks; standard library only
    "server.types": Place(0),
    "server.errors": Place(0),
    "server.progress": Place(0),
    "server.threads": Place(0),
    "server.garbage": Place(0),
    "server.embedded": Place(0),
    "adapters.types": Place(0),
    "adapters.recipes": Place(0),
    "server.wishes": Place(0),
    "adapters.errors": Place(0),
}

EMPTY = (
    "server",
    "adapters",
    "adapters.sources",
    "server.engine",
    "server.model",
    "server.api",
    "server.api.adapters",
    "server.api.anthropic",
    "server.api.docs",
    "server.api.jobs",
    "server.api.kserve",
    "server.api.ollama",
    "server.api.openai",
    "server.api.ops",
    "server.api.responses",
    "server.api.tgi",
    "server.text",
    "server.inferless",
)
"""Packages whose `__init__` everybody imports on the way, so that it must import nothing itself."""

TORCH_FAMILY = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")

ONLY_IN = {
    "pydantic": ("server.api", "server.settings"),
    "pydantic_settings": ("server.settings",),
    "prometheus_client": ("server.scrape",),
    "shtab": ("server.completion_command",),
    "python_multipart": ("server.api.adapters",),
    "starlette": ("server.api", "server.http_server"),
    "sse_starlette": ("server.api",),
    "uvicorn": ("server.api", "server.process", "server.http_server"),
    "jinja2": ("server.text",),
    "botocore": ("adapters.sources.s3",),
    "httpx2": ("adapters.sources.download",),
    "huggingface_hub": ("adapters.sources.hub", "server.launchers.reading", "server.remotes"),
    "filelock": ("adapters.sources.cache",),
    "watchfiles": ("adapters.watch",),
}

LAZY = {"server.text.tokenizer", "server.app", "server.__main__", "server.adapters_command"}
"""Policy modules that load device modules or the torch family inside a function, when that is asked for."""


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    is_lazy: bool  # inside a function: runs when called
    is_for_types: bool  # under TYPE_CHECKING: never runs

    def __str__(self) -> str:
        return f"{self.importer} (line {self.line}) imports {self.imported}"


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def place_of(module: str) -> Place | None:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if place := PLACES.get(".".join(parts[:length])):
            return place
    return None


def imports_of(module: str) -> list[Import]:
    tree = ast.parse(MODULES[module].read_text("utf-8"), MODULES[module])
    return list(_walk(module, tree, is_lazy=False, is_for_types=False))


def _walk(module: str, node: ast.AST, is_lazy: bool, is_for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _names(child):
            yield Import(module, name, child.lineno, is_lazy, is_for_types)  # type: ignore[attr-defined]
        lazy = is_lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = is_for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield from _walk(module, child, lazy, for_types)


def _names(node: ast.AST) -> list[str]:
    """The modules that a statement imports; `from package import module` means the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        assert node.module is not None
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in inner]
    return []


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_of_torch_family(module: str) -> bool:
    return module.split(".")[0] in TORCH_FAMILY


@cache
def all_imports() -> list[Import]:
    return [found for module in MODULES for found in imports_of(module)]


def assert_none(broken: list[Import], rule: str) -> None:
    assert not broken, rule + "".join(f"\n    {found}" for found in broken)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in EMPTY])
def test_every_module_has_a_place(module: str) -> None:
    assert place_of(module), f"give {module} a level in PLACES (see ARCHITECTURE.md)"


@pytest.mark.parametrize("module", EMPTY)
def test_packages_import_nothing(module: str) -> None:
    assert_none(imports_of(module), "a package's __init__ stays almost empty:")


def test_imports_only_go_down() -> None:
    broken = []
    for found in all_imports():
        importer, imported = place_of(found.importer), place_of(found.imported)
        if importer and imported and imported.level > importer.level:
            broken.append(found)
    assert_none(broken, "imports only go down the levels of PLACES:")


def test_adapters_know_nothing_of_a_server() -> None:
    broken = [
        found
        for found in all_imports()
        if is_in(found.importer, "adapters") and is_in(found.imported, "server")
    ]
    assert_none(broken, "adapters is complete without server:")


def test_policy_does_not_import_the_device_side() -> None:
    broken = []
    for found in all_imports():
        importer, imported = place_of(found.importer), place_of(found.imported)
        is_device = is_of_torch_family(found.imported) or (imported is not None and imported.side == "device")
        is_allowed = found.is_for_types or (found.is_lazy and found.importer in LAZY)
        if importer and importer.side == "policy" and is_device and not is_allowed:
            broken.append(found)
    assert_none(broken, "policy imports no torch, not even through others:")


def test_the_lowest_level_uses_the_standard_library_only() -> None:
    broken = []
    for found in all_imports():
        root = found.imported.split(".")[0]
        if (
            place_of(found.importer) == Place(0)
            and root not in sys.stdlib_module_names
            and root not in PACKAGES
        ):
            broken.append(found)
    assert_none(broken, "level 0 uses the standard library only:")


def test_packages_from_outside_stay_where_they_belong() -> None:
    broken = []
    for found in all_imports():
        homes = ONLY_IN.get(found.imported.split(".")[0])
        if homes is not None and not any(is_in(found.importer, home) for home in homes):
            broken.append(found)
    assert_none(broken, f"these packages belong into {ONLY_IN}:")


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked in this test")

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    __import__(module)
"""


def test_policy_can_be_imported_where_there_is_no_torch() -> None:
    policy = [module for module in MODULES if (place := place_of(module)) and place.side == "policy"]
    code = WITHOUT_TORCH.format(blocked=TORCH_FAMILY, modules=policy)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
