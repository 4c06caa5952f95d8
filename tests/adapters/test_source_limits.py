"""What a remote adapter may cost, and which of its files are fetched."""

import pytest

from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from adapters.sources.files import ADAPTER_FILES
from adapters.sources.limits import Deadline, FetchLimits, RemoteFile, refuse_many, select_files

LIMITS = FetchLimits(max_bytes=100, max_files=20, seconds=1)
CONFIG, WEIGHTS = RemoteFile("adapter_config.json", 10), RemoteFile("adapter_model.safetensors", 80)


def test_only_files_of_adapters_are_chosen() -> None:
    others = [
        RemoteFile(name, 10**9)
        for name in ("README.md", "optimizer.pt", "a/adapter_config.json", "model.safetensors", "run.py")
    ]
    template = RemoteFile("chat_template.jinja", 10)

    assert select_files([*others, template, WEIGHTS, CONFIG], LIMITS) == (CONFIG, WEIGHTS, template)


def test_no_file_of_an_adapter_is_a_pickle_or_a_program() -> None:
    assert not [name for name in ADAPTER_FILES if name.endswith((".bin", ".pt", ".pkl", ".py", ".so"))]
    assert not [name for name in ADAPTER_FILES if "/" in name or name.startswith(".")]


def test_bytes_count_together() -> None:
    assert select_files([CONFIG, RemoteFile(WEIGHTS.name, 90)], LIMITS)
    with pytest.raises(AdapterTooLarge, match="101"):
        select_files([CONFIG, RemoteFile(WEIGHTS.name, 91)], LIMITS)


def test_all_files_count_whether_fetched_or_not() -> None:
    others = [RemoteFile(f"{number}.txt", 0) for number in range(18)]

    assert select_files([CONFIG, WEIGHTS, *others], LIMITS)
    with pytest.raises(AdapterTooLarge, match="20 files"):
        select_files([CONFIG, WEIGHTS, *others, RemoteFile("one.more", 0)], LIMITS)
    refuse_many(20, LIMITS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no adapter_config.json"),
        ([WEIGHTS], "no adapter_config.json"),
        ([CONFIG], "no adapter_model.safetensors"),
        ([CONFIG, RemoteFile("adapter_model.bin", 1)], "adapter_model.bin' is a pickle"),
        ([CONFIG, WEIGHTS, CONFIG], "two files of one name"),
    ],
)
def test_what_is_no_adapter_is_refused_by_what_it_lacks(files: list[RemoteFile], message: str) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        select_files(files, LIMITS)
    assert message in refusal.value.message


def test_a_deadline_counts_down_and_then_says_so() -> None:
    now = [100.0]
    deadline = Deadline(5, lambda: now[0])
    now[0] = 104.0
    assert deadline.left() == 1.0
    now[0] = 105.0

    with pytest.raises(AdapterUnavailable, match="5 seconds"):
        deadline.left()
