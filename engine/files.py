"""Any file to rows with their place; JSON written whole or not at all; hashes of contents."""

from __future__ import annotations

import base64
import codecs
import csv
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from engine.rules import load_rules  # noqa: F401
from helpers import Parsed, RecipeError, check_text, first_line, parse_row, read_pair

# The first bytes of files that are often taken for JSON Lines, and what to do about them.
NOT_ROWS = {
    (b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0"): "it is UTF-16 text; save it as UTF-8",
    (b"PK\x03\x04",): "it is a zip archive or an Excel file; unpack it, or save the table as CSV",
    (b"BZh", b"\xfd7zXZ"): "it is compressed with bzip2 or xz; unpack it",
    (b"version https://git-lfs",): "it is only the Git LFS pointer to a file; run `git lfs pull`",
    (b"<",): "it is a web page or XML; fetch the file itself",
    (b"{\n", b"{\r"): "one JSON object over several lines; write one object per line, or a list of objects",
}


def advise(head: bytes, line: bytes) -> str:
    """What a file that begins with `head`, and whose `line` cannot be read as UTF-8 JSON, seems to be; what to do."""
    for first_bytes, advice in NOT_ROWS.items():
        if head.startswith(first_bytes):
            return advice
    with suppress(UnicodeDecodeError):
        line.decode()
        return "correct or delete the line"
    for encoding in ("euc_jp", "cp932"):  # text in cp932 is next to never valid EUC-JP
        with suppress(UnicodeDecodeError):
            if re.search("[ぁ-んァ-ヶ一-龠]", line.decode(encoding)):
                return f"it looks like text in {encoding}; save it as UTF-8 (`iconv -f {encoding} -t UTF-8`)"
    return "correct or delete the line, or save the file as UTF-8"


def parse_json(where: str, head: bytes, text: bytes) -> Any:
    """The JSON value in `text`; RecipeError, beginning with `where`, says what is wrong with it (see `advise`)."""
    try:  # half a surrogate pair stays what it is: the filter names it
        return json.loads(text.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise RecipeError(f"{where}: not valid JSON ({str(error)[:120]}); {advise(head, text)}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply to be read; delete the column or the line") from None


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file (see `load_rows`) with its place ("rows.jsonl, line 7"); RecipeError names the place.

    Packed files, Parquet and arrays are known by their first bytes, CSV and TSV by their names (also `.csv.gz`).
    """
    from pyarrow import ArrowException, input_stream

    table = re.search(r"\.(csv|tsv)\b", path.name.lower())
    try:
        with open(path, "rb") as file:
            packed = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(file.read(2))
        with io.BufferedReader(input_stream(str(path), compression=packed), 2**20) as file:
            head = file.peek(64)[:64]
            if head.startswith(b"PAR1"):
                from datasets import Dataset
                from pyarrow.parquet import read_table

                rows = Dataset(read_table(path)).to_list()  # turns columns stored as JSON text into values
            elif table:
                rows = read_csv(path, io.TextIOWrapper(file, "utf-8-sig", newline=""), ",\t"[table[1] == "tsv"])
            elif head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = parse_json(str(path), head, file.read())
            else:
                for number, line in enumerate(file, start=1):
                    if line.removeprefix(codecs.BOM_UTF8).strip():  # each line may begin with a byte order mark
                        place = f"{path}, line {number}"
                        yield place, parse_json(place, head, line)
                return
        yield from ((f"{path}, row {count}", row) for count, row in enumerate(rows, start=1))
    except RecipeError:
        raise
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text; {advise(head, error.object)}") from None
    except (OSError, ArrowException, ValueError) as error:  # half a file
        raise RecipeError(f"{path}: cannot be read ({first_line(error)}); fetch it again or write it anew") from None


def read_csv(path: Path, file: IO[str], delimiter: str) -> list[dict[str, Any]]:
    """The rows of a table with a header. All cells are text, but a column of whole numbers becomes numbers."""
    csv.field_size_limit(sys.maxsize)
    table, rows = csv.DictReader(file, delimiter=delimiter, strict=True), []
    try:
        for row in table:
            if None in row or None in row.values():  # a cell too many, or too few
                problem = f"not {len(table.fieldnames)} cells as in the header; put cells with commas into quotes"
                raise RecipeError(f"{path}, line {table.line_num}: {problem}")
            rows.append(row)
    except csv.Error as error:
        raise RecipeError(f"{path}, line {table.line_num}: not valid CSV ({error}); correct the line") from None
    header = table.fieldnames or []
    if len(set(header)) < len(header):
        raise RecipeError(f"{path}: two columns have the same name; the header is {header}")
    for column in header:
        if all(re.fullmatch("0|-?[1-9][0-9]{0,17}", row[column]) for row in rows):
            rows = [{**row, column: int(row[column])} for row in rows]
    return rows


KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")


def check_hub_id(name: str) -> None:
    """RecipeError if `name`, which is neither a file nor a folder here, cannot be a hub repository either."""
    if name.count("/") != 1 or name[0] in "./~" or Path(name).suffix[1:] in (*KINDS, "gz", "zst"):
        raise RecipeError(
            f"{name}: no such file or folder, and no hub repository (owner/name); relative paths start at the "
            "repository's root"
        )


def data_files(name: str, revision: str = "") -> list[Path]:
    """The files of a data set: `name` itself, or the split "train" (else the first) of a folder or hub repository."""
    path = Path(name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        check_hub_id(name)
    from datasets import load_dataset_builder
    from huggingface_hub import snapshot_download

    try:
        if not path.is_dir():
            patterns = [f"*.{kind}{packed}" for kind in KINDS for packed in ("", ".gz", ".zst")]
            wanted = {"revision": revision or None, "allow_patterns": ["README.md", *patterns]}
            path = Path(snapshot_download(name, repo_type="dataset", **wanted))
        splits = load_dataset_builder(str(path)).config.data_files
        return [Path(file) for file in splits.get("train") or next(iter(splits.values()))]
    except Exception as error:
        raise RecipeError(
            f"{name}: the data set cannot be read ({first_line(error)}); check the name and, for a hub data set, the "
            "network and the secret HF_TOKEN (if it is private); or name a single local file"
        ) from None


def read_rows(name: str, revision: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a data set with its place; RecipeError if there is none."""
    row = None
    for path in data_files(name, revision):
        for place, row in read_file(path):
            if not isinstance(row, dict):
                raise RecipeError(f"{place}: expected a JSON object, found {type(row).__name__}")
            yield place, row
    if row is None:
        raise RecipeError(f"{name}: the data set holds no rows; was the step that writes it interrupted?")


def load_rows(name: str | Path, revision: str = "", max_rows: int = 0) -> list[dict[str, Any]]:
    """Rows of a data set: a file (JSON Lines, JSON array, CSV, TSV or Parquet, also packed with gzip or zstd), a folder
    of such files, or a hub repository at the commit, tag or branch `revision`. `max_rows` 0 means all rows. RecipeError
    names the file and the line or row that cannot be read; an empty data set is an error, too.
    """
    return [row for _, row in islice(read_rows(str(name), revision), max_rows or None)]


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
    for position, (place, row) in enumerate(read_rows(name)):
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

    Left out are records and cards, hidden files, the litter of systems, and files not written to their end.
    """
    product = Path(product)
    if product.is_file():
        return {product.name: sha256(product)}
    left_out = re.compile(r"(^|/)(\.|(record\.json|readme\.md|thumbs\.db|desktop\.ini)$)|\.part$", re.IGNORECASE)
    files = {path.relative_to(product).as_posix(): path for path in sorted(product.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in files.items() if not left_out.search(name)}


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
