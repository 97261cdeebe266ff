"""Helpers of the four notebooks, in the order in which the notebooks use them.

1. Files and records     every notebook
2. Quantize              01_quantize
3. Filter                02_filter_magpie
4. Fine-tune             03_sft
5. Retrieve and answer   04_rag_inference
6. Load models           what two notebooks share and what has side effects

Everything above section 6 is a pure function of plain values, or reads and writes the files it names.
Only the standard library and numpy are imported here; heavy packages are imported by the function that needs them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# --------------------------------------------------------------------------------------------------------------------
# 1. Files and records
# --------------------------------------------------------------------------------------------------------------------


class RecipeError(ValueError):
    """An error that the reader can mend: one line that says what is wrong, where, and what to do."""


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file (`.jsonl` or `.jsonl.gz`, UTF-8); blank lines are skipped.

    Raises RecipeError naming file and line for a line that is not a JSON object or lacks a `required` key,
    and for a file that is missing or holds no object at all.
    """
    path = Path(path)
    required = tuple(required)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; check the path (relative paths start at the repository root)")
    opener = gzip.open if path.suffix == ".gz" else open
    empty = True
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{path}, line {number}: not valid JSON ({error}); mend or delete the line") from None
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            for key in required:
                if key not in row:
                    raise RecipeError(f"{path}, line {number}: key {key!r} is missing; it has {sorted(row)}")
            empty = False
            yield row
    if empty:
        raise RecipeError(f"{path}: the file holds no rows; was the step that writes it interrupted?")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[TextIO]:
    """Open `path` for writing UTF-8 text so that the file appears only when complete (written beside, then renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line as `json.dump(row, ensure_ascii=False)` does; returns the number of rows."""
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write a report: indented JSON, UTF-8, Japanese readable."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# 2. Quantize
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 3. Filter
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 4. Fine-tune
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 5. Retrieve and answer
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 6. Load models
# --------------------------------------------------------------------------------------------------------------------
