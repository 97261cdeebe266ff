"""Data sets to rows, pairs and tasks; JSON written whole or not at all; hashes of contents."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from engine import folders, reading
from engine.reading import check_text, read_pair
from helpers import Parsed, RecipeError, parse_row


def read_rows(
    name: str, revision: str = "", max_rows: int = 0, for_tasks: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a data set with its place; of a folder or hub repository it is printed what was read.

    RecipeError if there is no row.
    """
    selection, counts = folders.select(name, revision, for_tasks), {}
    for path in selection.files:
        counts[path] = 0
        for place, row in islice(reading.read_file(path), max_rows - sum(counts.values()) if max_rows else None):
            if not isinstance(row, dict):
                raise RecipeError(f"{place}: expected a JSON object, found {type(row).__name__}")
            counts[path] += 1
            yield place, row
        if max_rows and sum(counts.values()) >= max_rows:
            break
    if not sum(counts.values()):
        raise RecipeError(f"{name}: the data set holds no rows; was the step that writes it interrupted?")
    print_selection(name, selection, counts)


def print_selection(name: str, selection: folders.Selection, counts: Mapping[Path, int]) -> None:
    """Say which files of a folder or hub repository were read, with their rows, and which were not."""
    if selection.folder is None:
        return
    place = {path: path.relative_to(selection.folder).as_posix() for path in selection.files}
    each = folders.shorten([f"{place[path]} ({count:,})" for path, count in counts.items()])
    files = f"{len(counts):,} file{'s' if len(counts) > 1 else ''}"
    part = f" of {selection.part}" if selection.part else ""
    print(f"{name}: {sum(counts.values()):,} rows{part} read from {files}: {each}")
    if empty := [place[path] for path, count in counts.items() if not count]:
        print(f"{name}: files without rows: {', '.join(empty)}")
    left_out = [*selection.left_out]
    if beyond := list(place.values())[len(counts) :]:
        left_out.append(f"beyond max_rows: {folders.shorten(beyond)}")
    if left_out:
        print(f"{name}: not read: {'; '.join(left_out)}")


def load_rows(name: str | Path, revision: str = "", max_rows: int = 0) -> list[dict[str, Any]]:
    """Rows of a data set: a file (JSON Lines, JSON array, CSV, TSV or Parquet, also packed with gzip or zstd), a folder
    of such files, or a hub repository at the commit, tag or branch `revision`. `max_rows` 0 means all rows. RecipeError
    names the file and the line or row that cannot be read; an empty data set is an error, too.
    """
    return [row for _, row in read_rows(str(name), revision, max_rows)]


def load_pairs(name: str, revision: str = "") -> list[dict[str, str]]:
    """The first question and answer of each row of a data set, as rows (instruction, response); prints which forms
    were read.

    RecipeError names file, row and column where one is missing or no text; a number as an answer becomes its digits.
    """
    pairs = [read_pair(place, parse_row(row, columns_first=True)) for place, row in read_rows(name, revision)]
    print_forms(name, Counter(form for form, _, _ in pairs))
    return [{"instruction": question, "response": answer} for _, question, answer in pairs]


def print_forms(name: str, forms: Mapping[str, int]) -> None:
    """Say how many rows of a data set have which form."""
    print(f"{name}: " + "; ".join(f"{count:,} rows read as {form}" for form, count in forms.items()))


def check_forms(name: str, rows: Sequence[Parsed]) -> None:
    """Print how many rows have which form; RecipeError if most of them hold no question and answer in a known one."""
    forms, problems = Counter(), []
    for number, row in enumerate(rows, start=1):
        try:
            forms[read_pair(f"{name}, row {number}", row)[0]] += 1
        except RecipeError as error:
            problems.append(str(error))
    said = f"cannot be used. The first one: {problems[0]}" if problems else ""
    if 2 * len(problems) > len(rows):
        raise RecipeError(f"{len(problems):,} of {len(rows):,} rows {said}")
    print_forms(name, forms)
    if problems:
        print(f"{len(problems):,} rows {said}; such rows will be dropped")


def load_tasks(name: str) -> list[dict[str, Any]]:
    """The tasks of a data set of any known form, in its order; prints which forms were read.

    A task has `task_id` (by default its position), `input`, and where the row has them `output`, a reference answer (or
    a list of them, all right), and `eval_aspect`. RecipeError names the row of what is no text or a repeated task_id.
    """
    tasks, forms, first = [], Counter(), {}
    for position, (place, row) in enumerate(read_rows(name, for_tasks=True)):
        form, question, answer = read_pair(place, parse_row(row, columns_first=True), need_answer=False)
        forms[form] += 1
        task_id = row.get("task_id", position)
        if isinstance(task_id, float) and task_id.is_integer():
            task_id = int(task_id)  # what a table makes of a number beside a missing one
        if type(task_id) is not int:
            check_text(f"{place}: task_id", task_id)
        if task_id in first:
            raise RecipeError(f"{place} repeats task_id {task_id!r} of {first[task_id]}; give every task its own id")
        first[task_id] = place
        task = {"task_id": task_id, "input": question}
        if answer is not None:
            several = answer if isinstance(answer, list) else [answer]
            several = [check_text(f"{place}: the reference answer", text, or_number=True) for text in several]
            task["output"] = several if isinstance(answer, list) else several[0]
        if row.get("eval_aspect") is not None:
            task["eval_aspect"] = check_text(f"{place}: eval_aspect", row["eval_aspect"])
        tasks.append(task)
    print_forms(name, forms)
    return tasks


def save_filtered(
    output_dir: str | Path, kept: Iterable[Mapping], dropped: Iterable[Mapping], report: Mapping[str, Any]
) -> None:
    """Write `filtered_magpie.jsonl`, `dropped_magpie.jsonl` and, when both are complete, `filter_report.json`."""
    output_dir = Path(output_dir)
    write_jsonl(output_dir / "filtered_magpie.jsonl", kept)
    write_jsonl(output_dir / "dropped_magpie.jsonl", dropped)
    write_json(output_dir / "filter_report.json", report)


@contextmanager
def atomic_write(path: str | Path, *, binary: bool = False) -> Iterator[IO]:
    """Open `path` for writing UTF-8 text, or bytes with `binary`; the file appears only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # Half a surrogate pair, which UTF-8 cannot hold, becomes its \u escape: that is valid JSON.
    text = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with open(part, "wb" if binary else "w", 2**20, **text) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _json_value(value: Any) -> Any:
    """What JSON holds in place of a value that it has no form for: numbers of numpy, bytes, dates, decimals."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_json_value).encode


def json_text(row: Any) -> str:
    """A value as valid JSON on one line: NaN and infinity become null, bytes base64, dates and decimals their text."""
    try:
        return _to_json(row)
    except ValueError:
        plain = json.dumps(row, default=_json_value)
        return _to_json(json.loads(plain, parse_constant=lambda _: None))


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line (see `json_text`) in UTF-8."""
    with atomic_write(path) as file:
        file.writelines(f"{json_text(row)}\n" for row in rows)


def write_json(path: str | Path, value: Any) -> None:
    """Write a report: indented JSON, UTF-8, Japanese readable."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(product: str | Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file below a folder, by relative path.

    Left out are records, hidden files, system files, files not written to their end, and cards but for the
    configurations that they list: these decide which files are rows.
    """
    product = Path(product)
    if product.is_file():
        return {product.name: sha256(product)}
    left_out = re.compile(r"(^|/)(\.|(record\.json|readme\.md|thumbs\.db|desktop\.ini)$)|\.part$", re.IGNORECASE)
    names = folders.list_files(product) if product.is_dir() else []
    found = {name: sha256(product / name) for name in names if not left_out.search(name)}
    with suppress(RecipeError):  # it is said where the rows are read
        if configs := folders.read_card(product):
            found["README.md, configs"] = hashlib.sha256(json_text(configs).encode()).hexdigest()
    return found


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSON Lines file, on disk when this returns; a last line that was cut off stays a line apart."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
