"""One file of any kind to rows with their place: JSON Lines, a JSON array, CSV, TSV or Parquet, also packed."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pyarrow import ArrowException, input_stream

from helpers import (
    ANSWERS,
    CHATS,
    CONTEXTS,
    MORE_ANSWERS,
    MORE_CHATS,
    MORE_QUESTIONS,
    QUESTIONS,
    Parsed,
    RecipeError,
    first_line,
    first_pair,
    has_role,
    is_number,
)

# What no line of rows begins with, and what to do about a file that begins so.
NOT_ROWS = {
    (b"\xff\xfe\0\0", b"\0\0\xfe\xff"): "it is UTF-32 text; save it as UTF-8 (`iconv -f UTF-32 -t UTF-8`)",
    (b"\xff\xfe", b"\xfe\xff"): "it is UTF-16 text; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)",
    (b"PK\x03\x04",): "it is a zip archive or an Excel file; unpack it, or save the table as CSV",
    (b"\xd0\xcf\x11\xe0",): "it is an old Excel file; save the table as CSV",
    (b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"): "it is an archive (bzip2, xz, 7z or rar); unpack it",
    (b"version https://git-lfs",): "it is only the Git LFS pointer to a file; run `git lfs pull`",
    (b"<!", b"<html", b"<HTML", b"<?xml"): "it is a web page or XML; fetch the file itself",
    (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"%PDF"): "it is a picture or a PDF, which holds no rows",
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"): (
        "it is a Python pickle, which could run code and is not opened; save the rows as JSON Lines"
    ),
    (b"ARROW1",): "it is an Arrow file; run `pandas.read_feather(FILE).to_parquet('rows.parquet')`, name rows.parquet",
    (b"\xff\xff\xff\xff",): (
        "it is an Arrow file; run `datasets.Dataset.from_file(FILE).to_parquet('rows.parquet')`, name rows.parquet"
    ),
    (b"SQLite format 3",): "it is an SQLite data base; save the table as CSV",
    (b"\x89HDF", b"Obj\x01", b"\x93NUMPY"): "it is an HDF5, Avro or NumPy file; save the rows as Parquet",
}
OVER_LINES = re.compile(rb"(\xef\xbb\xbf)?\s*\{\s*[\r\n]")
KANA_OR_KANJI = "[ぁ-んァ-ヶ一-龠ｦ-ﾟ]"


def other_encoding(text: bytes) -> str:
    """The encoding that bytes which are not UTF-8 are in, as far as Japanese letters tell; "" if they do not."""
    if re.search(rb"\x1b\$[@B]", text):
        return "ISO-2022-JP"
    for encoding in ("EUC-JP", "cp932"):  # text in cp932 is next to never valid EUC-JP
        with suppress(UnicodeDecodeError):  # the last character may be cut
            if re.search(KANA_OR_KANJI, codecs.getincrementaldecoder(encoding)().decode(text)):
                return encoding
    return ""


def advise(head: bytes, line: bytes) -> str:
    """What to do about a file that begins with `head`, and whose `line` cannot be read as UTF-8 JSON or CSV."""
    if encoding := other_encoding(line):
        return f"it looks like text in {encoding}; save it as UTF-8 (`iconv -f {encoding} -t UTF-8`)"
    if head.startswith(b"<"):
        return "it is a web page or XML; fetch the file itself"
    if OVER_LINES.match(head):
        return "one JSON object over several lines; write one object per line, or a list of objects"
    with suppress(UnicodeDecodeError):
        line.decode()
        return "correct or delete the line"
    return "correct or delete the line, or save the file as UTF-8"


def check_head(path: Path, head: bytes) -> None:
    """RecipeError, with what to do, for a file whose first bytes show that it is no text in UTF-8."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for first_bytes, advice in NOT_ROWS.items():
        if head.startswith(first_bytes) or start.startswith(first_bytes):
            raise RecipeError(f"{path}: {advice.replace('FILE', repr(str(path)))}")
    if b"\0" not in head:
        return
    for encoding in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(head)
            if re.search(r"[{\[,\n]", text) and re.sub(r"\s", "", text).isprintable():
                raise RecipeError(
                    f"{path}: it is {encoding[:6]} text; save it as UTF-8 (`iconv -f {encoding} -t UTF-8`)"
                )
    raise RecipeError(f"{path}: it holds NUL bytes, so it is no text; save the rows as JSON Lines in UTF-8")


def parse_json(where: str, head: bytes, text: bytes) -> Any:
    """The JSON value in `text`; RecipeError, beginning with `where`, says what is wrong with it (see `advise`)."""
    try:  # half a surrogate pair stays what it is: the filter names it
        return json.loads(text.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise RecipeError(f"{where}: not valid JSON ({str(error)[:120]}); {advise(head, text)}") from None
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply to be read; delete the column or the line") from None


@contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked if its first bytes are those of gzip or zstd."""
    with open(path, "rb") as file:
        packed = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(file.read(2))
    with io.BufferedReader(input_stream(str(path), compression=packed), 2**20) as file:
        yield file


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file with its place ("rows.jsonl, line 7"); RecipeError names the place.

    Packed files, Parquet and arrays are known by their first bytes, CSV and TSV by their names (also `.csv.gz`).
    """
    table = re.search(r"\.(csv|tsv)\b", path.name.lower())
    try:
        with open_unpacked(path) as file:
            head = file.peek(4096)[:4096]
            if head.startswith(b"PAR1"):
                rows = read_parquet(path)
                yield from ((f"{path}, row {count}", row) for count, row in enumerate(rows, start=1))
                return
            check_head(path, head)
            if table:
                rows = read_csv(path, io.TextIOWrapper(file, "utf-8-sig", newline=""), ",\t"[table[1] == "tsv"])
            elif head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = [part for row in parse_json(str(path), head, file.read()) for part in samples_of(row) or [row]]
            elif OVER_LINES.match(head):
                rows = samples_of(parse_json(str(path), head, file.read()))
                if rows is None:
                    raise RecipeError(f"{path}: {advise(head, b'')}")
            else:
                for number, line in enumerate(file, start=1):
                    if line.removeprefix(codecs.BOM_UTF8).strip():  # each line may begin with a byte order mark
                        place = f"{path}, line {number}"
                        row = parse_json(place, head, line)
                        yield from ((place, part) for part in samples_of(row) or [row])
                return
        yield from ((f"{path}, row {count}", row) for count, row in enumerate(rows, start=1))
    except RecipeError:
        raise
    except UnicodeDecodeError:
        number, line = find_wrong_line(path)
        raise RecipeError(f"{path}, line {number}: not UTF-8 text; {advise(b'', line)}") from None
    except (OSError, ArrowException, ValueError) as error:  # half a file
        raise RecipeError(f"{path}: cannot be read ({first_line(error)}); fetch it again or write it anew") from None


def find_wrong_line(path: Path) -> tuple[int, bytes]:
    """The first line of a file that is not UTF-8, with its number."""
    with open_unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number, line
    raise RecipeError(f"{path}: changed while it was read")


def samples_of(value: Any) -> list[dict[str, Any]] | None:
    """The tasks of one of llm-jp-eval's objects, each under its instruction; None if `value` is no such object."""
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, list) or not all(isinstance(sample, dict) and "input" in sample for sample in samples):
        return None
    instruction = {"instruction": value["instruction"]} if value.get("instruction") else {}
    return [instruction | sample for sample in samples]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file."""
    from datasets import Dataset
    from pyarrow.parquet import read_table

    rows = Dataset(read_table(path)).to_list()  # turns columns stored as JSON text into values
    return with_whole_numbers(rows, lambda value: str(value) in ("None", "nan"))


def with_whole_numbers(rows: list[dict[str, Any]], is_missing: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """Rows of a table in which whole numbers that pandas wrote as 5.0, because others are missing, are whole again."""
    for column in rows[0] if rows else ():
        values = [row[column] for row in rows] if column.lower() in (*ANSWERS, *MORE_ANSWERS, *CONTEXTS) else []
        held = [value for value in values if not is_missing(value)]
        if held and len(held) < len(values) and all(re.fullmatch(r"-?\d{1,15}\.0", str(value)) for value in held):
            for row, value in zip(rows, values, strict=True):
                row[column] = value if is_missing(value) else int(float(value))
    return rows


def read_csv(path: Path, file: IO[str], delimiter: str) -> list[dict[str, Any]]:
    """The rows of a table with a header. All cells are text, but a column of whole numbers becomes numbers."""
    csv.field_size_limit(sys.maxsize)
    table, rows = csv.DictReader(file, delimiter=delimiter, strict=True), []
    try:
        for row in table:
            if None in row or None in row.values():  # a cell too many, or too few
                problem = f"not {len(table.fieldnames)} cells as in the header; put cells with commas into quotes"
                raise RecipeError(f"{path}, line {table.line_num}: {problem}")
            if found := re.search("\0|\x1b\\$", "".join(row.values())):
                problem = "a NUL byte" if found[0] == "\0" else "text in ISO-2022-JP"
                raise RecipeError(f"{path}, line {table.line_num}: holds {problem}; save the file as UTF-8")
            rows.append(row)
    except csv.Error as error:
        raise RecipeError(f"{path}, line {table.line_num}: not valid CSV ({error}); correct the line") from None
    header = table.fieldnames or []
    if len(set(header)) < len(header):
        raise RecipeError(f"{path}: two columns have the same name; the header is {header}")
    for column in header:
        if all(re.fullmatch("0|-?[1-9][0-9]{0,17}", row[column]) for row in rows):
            rows = [{**row, column: int(row[column])} for row in rows]
    return with_whole_numbers(rows, lambda value: value == "")


SYSTEMS = {"system", "system_prompt", "system_message", "system_instruction", "developer"}
TOOLS = {"tool", "function", "function_call", "observation", "tool_call", "tool_response"}
KNOWN_FORMS = (
    f"known are lists of turns (role, content or from, value) in {', '.join(CHATS + MORE_CHATS)}; or "
    f"{', '.join(QUESTIONS + MORE_QUESTIONS)} for the question, with {' or '.join(CONTEXTS)} for what belongs to it, "
    f"and {', '.join(ANSWERS + MORE_ANSWERS)} for the answer"
)


def check_text(where: str, value: Any, or_number: bool = False) -> str:
    """The text `value`, or with `or_number` a number's digits; RecipeError (beginning with `where`) for all else."""
    if or_number and is_number(value):
        return str(value)
    if not isinstance(value, str):
        kinds = {type(None): "null", bool: "true or false", int: "a number", dict: "an object", list: "a list"}
        found = kinds.get(type(value), type(value).__name__)
        parts = value if isinstance(value, list) else []
        if parts := sorted({str(part["type"]) for part in parts if isinstance(part, dict) and "type" in part}):
            found += f" of parts ({', '.join(parts)})"
        raise RecipeError(f"{where} is {found}, expected text; correct or delete the row")
    if half := re.search("[\ud800-\udfff]", value):
        found = f"U+{ord(half[0]):04X}, half a surrogate pair"
        raise RecipeError(f"{where} holds {found}, which UTF-8 cannot hold; correct the text")
    return value


def read_pair(place: str, parsed: Parsed, need_answer: bool = True) -> tuple[str, str, Any]:
    """The form of a row, its first question and the answer to it, which without `need_answer` is returned as it is.

    RecipeError, beginning with `place`, for an unknown form and for a question or answer that is no text.
    """
    row, columns, turns = parsed
    check_turns(place, parsed)
    asked, answered = first_pair(turns)
    if not asked or (need_answer and answered is None):
        raise RecipeError(
            f"{place}: no {'answer' if asked else 'question'} found; {what_is_there(parsed)}; {KNOWN_FORMS}"
        )

    def where(part: str, text: Any, names: Sequence[str]) -> str:
        own = "history" if "history" in columns else columns[0]
        return f"{place}: the {part} ({next((name for name in names if row[name] is text), own)})"

    texts = [turns[number].get("content") for number in asked]
    question = "\n".join(check_text(where("question", text, columns), text) for text in texts)
    turn = turns[answered] if answered is not None else {}
    answer = turn.get("content")
    if need_answer and (turn.get("tool_calls") or turn.get("function_call")) and not answer:
        raise RecipeError(f"{place}: the answer ({columns[0]}) only calls a tool; delete the row")
    answer = check_text(where("answer", answer, columns[::-1]), answer, or_number=True) if need_answer else answer
    return ", ".join([*columns, *form_notes(parsed, asked, answered)]), question, answer


def check_turns(place: str, parsed: Parsed) -> None:
    """RecipeError if something in a list of turns is no turn."""
    for number, turn in enumerate(parsed.turns, start=1):
        if not has_role(turn):
            form = ", ".join(parsed.columns)
            raise RecipeError(f"{place}: turn {number} of {form} has no role; {KNOWN_FORMS}")


def what_is_there(parsed: Parsed) -> str:
    """What a row holds in which no question or no answer was found."""
    row, columns, turns = parsed
    if columns and columns[0] in CHATS + MORE_CHATS:
        return f"its roles in {columns[0]} are {[turn['role'] for turn in turns][:20]}"
    chats = [f"; {name} holds no list of turns" for name in CHATS if row.get(name) and not columns]
    return f"its columns are {sorted(map(str, row))[:20]}{''.join(chats)}"


def form_notes(parsed: Parsed, asked: Sequence[int], answered: int | None) -> list[str]:
    """What of a row is read in another way than it stands there, or not at all."""
    roles = [turn["role"] for turn in parsed.turns]
    notes = {
        "begun by the assistant": "assistant" in roles[: asked[0]],
        "user turns in a row joined": len(asked) > 1,
        "without the system text": bool(
            SYSTEMS & {*roles, *(str(name).lower() for name, value in parsed.row.items() if value)}
        ),
        "without the tool calls": bool(TOOLS & set(roles[asked[-1] : answered])),
        "first question of several": roles.count("user") > len(asked),
    }
    return [note for note, is_so in notes.items() if is_so]
