"""Forms: whether what was read from a file, which anybody may have written, is a record or a row of an answer log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers import RecipeError, first_line, is_number


def read_record(path: Path | None) -> dict[str, Any]:
    """The record in a file; {} if there is none, or it is damaged or has another form.

    RecipeError if the file system does not say: what cannot be read is not what is not there.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({first_line(error)}): give yourself access, or delete it") from None
    return record if is_record(record) else {}


def is_table(value: Any, of: type) -> bool:
    """Whether a value is a dictionary whose values have this type."""
    return isinstance(value, dict) and all(isinstance(item, of) for item in value.values())


def is_record(value: Any) -> bool:
    """Whether a value read from JSON has the form of a record (see engine/records.py)."""
    if not isinstance(value, dict):
        return False
    measured = value.get("measured", {"seconds": 0})
    return (
        isinstance(value.get("stage"), str)
        and are_sources(value.get("inputs"))
        and is_table(value.get("settings"), object)
        and is_table(value.get("versions"), str)
        and is_table(value.get("files", {}), str)
        and type(value.get("parallel", 1)) is type(value.get("step", 1)) is int
        and isinstance(measured, dict)
        and is_number(measured.get("seconds"))
    )


def are_sources(inputs: Any, depth: int = 0) -> bool:
    """Whether every input of a record has the form of a source, and so on down to the origins."""
    if not is_table(inputs, dict) or depth > 50:
        return False
    for source in inputs.values():
        texts = {key: value for key, value in source.items() if key != "inputs"}
        whole = {"name", "commit", "sha256"} <= texts.keys() and is_table(texts, str)
        if not whole or not are_sources(source.get("inputs"), depth + 1):
            return False
    return True


def is_row(value: Any) -> bool:
    """Whether a value read from JSON has the form of a row of an answer log (see `answers.ROW`)."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("key", "output"))
        and all(is_number(value.get(name)) and value[name] >= 0 for name in ("new_tokens", "limit", "seconds"))
        and type(value.get("task_id")) in (int, str)
        and type(value.get("cut")) is bool
        and value.get("attempt") in (1, 2)
    )


def compare(recorded: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first file whose hash is not the recorded one, such as "weights was changed"; "" if there is none."""
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            return f"{name} {'is missing' if name not in found else 'was changed' if name in recorded else 'was added'}"
    return ""
