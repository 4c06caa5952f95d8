"""Values out of a stranger's JSON, each checked for its type and its range. Raises AdapterInvalid, naming the
setting.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.names import shown
from adapters.regular_file import open_regular
from adapters.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
MAX_LISTED = 16384  # entries of a list or a pattern table; EVA writes one per module of the model
_MAX_CONFIG_BYTES = 2 * 1024 * 1024
_MAX_RANK = 1_000_000
MAX_TOKEN_IDS = 1 << 16  # more than any adapter trains
_MAX_TOKEN_ID = 2**31 - 1


def read_config(folder: Path) -> Mapping[str, object]:
    """The object in the folder's adapter_config.json."""
    try:
        with open_regular(folder / CONFIG_FILE, _MAX_CONFIG_BYTES) as file:
            content = file.read(_MAX_CONFIG_BYTES)
    except FileNotFoundError as error:
        raise AdapterInvalid(f"the adapter has no {CONFIG_FILE}") from error
    except OSError as error:
        raise AdapterInvalid(f"{CONFIG_FILE} cannot be read") from error
    return parse_object(content, CONFIG_FILE)


def strings(setting: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_LISTED or not all(type(item) is str for item in value):
        raise AdapterInvalid(f"{setting} in {CONFIG_FILE} must be a string or a list of strings")
    return tuple(value)


def table(config: Mapping[str, object], setting: str) -> Mapping[str, object]:
    value = config.get(setting)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LISTED:
        raise AdapterInvalid(f"{setting} in {CONFIG_FILE} must be an object")
    return value


def integer(setting: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterInvalid(
            f"{setting}={shown(value)} in {CONFIG_FILE} must be a whole number from 1 to {_MAX_RANK}"
        )
    return value


def number(setting: str, value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} must be a number")
    return number


def boolean(setting: str, value: object) -> bool:
    if value is not None and type(value) is not bool:
        raise AdapterInvalid(f"{setting}={shown(value)} in {CONFIG_FILE} must be true or false")
    return bool(value)


def token_ids(setting: str, value: object) -> tuple[int, ...]:
    """Ids of tokens. Whether the model has them is not known here."""
    if (
        not isinstance(value, list)
        or len(value) > MAX_TOKEN_IDS
        or any(type(item) is not int or not 0 <= item <= _MAX_TOKEN_ID for item in value)
    ):
        raise AdapterInvalid(
            f"{setting} in {CONFIG_FILE} must be a list of at most {MAX_TOKEN_IDS} token ids, 0 or more"
        )
    return tuple(value)
