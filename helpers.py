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

import codecs
import gzip
import hashlib
import json
import os
import re
import shutil
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# --------------------------------------------------------------------------------------------------------------------
# 1. Files and records
# --------------------------------------------------------------------------------------------------------------------


class RecipeError(ValueError):
    """An error that the reader can mend: one line that says what is wrong, where, and what to do."""


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of a `.jsonl` or `.jsonl.gz` file, without blank lines and byte order mark.

    Raises RecipeError for a file that is missing, cannot be unpacked, or holds nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; check the path (relative paths start at the repository root)")
    number = 0
    empty = True
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not content.isspace():
                    empty = False
                    yield number, content
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RecipeError(f"{path}, after line {number}: cannot be unpacked ({error}); fetch it again") from None
    if empty:
        raise RecipeError(f"{path}: the file holds no rows; was the step that writes it interrupted?")


def parse_line(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object on a line, exactly as `json.loads` reads it; RecipeError names file and line if there is none."""
    import orjson

    try:
        row = orjson.loads(line)
        if type(row) is dict and _holds_float(row):  # orjson turns an integer of 20 digits or more into a float
            row = json.loads(line)
    except ValueError:
        try:
            row = json.loads(line)  # reads what orjson refuses: lone surrogates, NaN
        except ValueError as error:
            raise RecipeError(f"{path}, line {number}: not valid JSON ({error}); mend or delete the line") from None
    if not isinstance(row, dict):
        raise RecipeError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    return row


def _holds_float(value: Any) -> bool:
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind is float or ((kind is dict or kind is list) and _holds_float(item)):
            return True
    return False


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file (`.jsonl` or `.jsonl.gz`, UTF-8); blank lines are skipped.

    Raises RecipeError naming file and line for a line that is not a JSON object or lacks a `required` key,
    and for a file that is missing or holds no object at all.
    """
    required = tuple(required)
    for number, line in read_lines(path):
        row = parse_line(path, number, line)
        for key in required:
            if key not in row:
                raise RecipeError(f"{path}, line {number}: key {key!r} is missing; it has {sorted(row)}")
        yield row


@contextmanager
def atomic_write(path: str | Path, *, binary: bool = False) -> Iterator[IO]:
    """Open `path` for writing so that the file appears only when complete (written beside, then renamed).

    UTF-8 text, or bytes with `binary`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") if binary else open(part, "w", encoding="utf-8", newline="\n") as file:
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

# What can be wrong with a row, in the order in which it is asked.
REASONS = (
    "malformed",  # conversations is not a list of {"role", "content"} with text in it
    "missing turn",  # no user turn, or no assistant turn
    "empty",  # a field holds nothing but white space
    "ng string",  # a string of the NG list
    "rare character",  # a character that the whole data set hardly uses
    "not cp932",  # a character that cannot be written in Japanese Windows' code page 932
    "unreadable",  # a control character or half a surrogate pair: cld2 or UTF-8 refuses it
    "not Japanese",  # cld2 finds too little Japanese
    "rare afterwards",  # a character that the rows kept so far hardly use
    "near duplicate",  # almost the same text as an earlier row that is kept
)
Problem = tuple[str, str, str]  # (reason, field, matched string)
_CODE_POINTS = 0x110000
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # the bytes of json.dump(row, ensure_ascii=False)


@dataclass(frozen=True)
class FilterSettings:
    """Everything that decides which rows are kept. The defaults are the filter of 2024; notebook 02 explains each."""

    replacements: tuple[tuple[str, str], ...] = ()
    ng: tuple[str, ...] = ()
    rare_below: int = 20
    rare_after_below: int = 10
    japanese_percent: int = 60
    rare_share: float = 0.0
    all_turns: bool = False
    clean_conversations: bool = False
    nfc: bool = False
    cp932_only: bool = False
    near_duplicates: float = 0.0

    @property
    def rare_after(self) -> int:
        """The second count's limit; `rare_share` takes the place of both counts."""
        return 0 if self.rare_share else self.rare_after_below


def load_filter_rules(path: str | Path) -> dict[str, tuple]:
    """`replacements` ((old, new), ...) and `ng` strings of a rules file, in its order, ready for FilterSettings."""
    try:
        rules = json.loads(Path(path).read_text(encoding="utf-8"))
        replacements = tuple((old, new) for old, new in rules["replacements"])
        ng = tuple(rules["ng"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f'{path}: not a rules file ({error}); it needs "replacements": [[old, new], ...] and "ng": [...]'
        ) from None
    strings = [text for pair in replacements for text in pair] + list(ng)
    if not all(isinstance(text, str) for text in strings) or "" in (*ng, *(old for old, _ in replacements)):
        raise RecipeError(f"{path}: every rule must be a string, and none may be empty (an empty one is in every text)")
    return {"replacements": replacements, "ng": ng}


class Shard(NamedTuple):
    """Some rows of the input as they were read: (number, JSON) for each, numbered from 1 (in JSON Lines by line)."""

    source: str
    lines: list[tuple[int, bytes]]

    def digest(self) -> bytes:
        sha = hashlib.sha256()
        for number, line in self.lines:
            sha.update(b"%d " % number)
            sha.update(line)
        return sha.digest()


def read_shards(dataset: str, revision: str = "", max_rows: int = 0, shard_rows: int = 2000) -> Iterator[Shard]:
    """Cut a data set into shards: a `.jsonl`, `.jsonl.gz` or `.parquet` file, or the train split of a hub data set.

    `max_rows` 0 means all rows. Raises RecipeError where there is nothing that can be read.
    """
    if dataset.endswith((".jsonl", ".jsonl.gz")):
        lines = read_lines(dataset)
    else:
        lines = enumerate(map(_json_bytes, _table_rows(dataset, revision)), start=1)
    lines = islice(lines, max_rows or None)
    while shard := list(islice(lines, shard_rows)):
        yield Shard(dataset, shard)


def _table_rows(dataset: str, revision: str) -> Iterator[dict[str, Any]]:
    try:
        if dataset.endswith(".parquet"):
            import pyarrow.parquet as pq

            tables = pq.ParquetFile(dataset).iter_batches(batch_size=2000)
        else:
            from datasets import load_dataset

            tables = load_dataset(dataset, revision=revision or None, split="train").with_format("arrow").iter(2000)
        for table in tables:
            yield from table.to_pylist()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{dataset}: cannot be read ({str(error).splitlines()[0]}); give a .jsonl, .jsonl.gz or .parquet file,"
            " or the id of a hub data set that the network reaches"
        ) from None


def _json_bytes(row: Mapping[str, Any]) -> bytes:
    text = _to_json(row)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
        return json.dumps(row, default=str).encode()


def judged_texts(row: Mapping[str, Any], settings: FilterSettings) -> tuple[dict[str, str], Problem | None]:
    """The texts of a row that the rules read, by field, and what is wrong with its form.

    `instruction` is the first user turn and `response` the first assistant turn, "" where missing; with `all_turns`
    the other turns follow as "turn N", counted from 1. A malformed row has no texts.
    """
    conversations = row.get("conversations")
    if not isinstance(conversations, list):
        return {}, ("malformed", "conversations", type(conversations).__name__)
    turns: dict[str, str] = {}
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, dict) or "role" not in turn:
            return {}, ("malformed", f"turn {number}", type(turn).__name__)
        field = "instruction" if turn["role"] == "user" else "response" if turn["role"] == "assistant" else None
        if field is None or field in turns:
            if not settings.all_turns:
                continue
            field = f"turn {number}"
        content = turn.get("content")
        if not isinstance(content, str):
            return {}, ("malformed", field, type(content).__name__)
        turns[field] = _normal(content, settings)
        if len(turns) == 2 and not settings.all_turns:
            break  # like 2024, which never looks at what follows
    texts = {"instruction": turns.pop("instruction", None), "response": turns.pop("response", None), **turns}
    problem = None
    for field in ("response", "instruction"):
        if texts[field] is None:
            texts[field] = ""
            problem = problem or ("missing turn", field, "")
        elif not texts[field].strip():
            problem = problem or ("empty", field, "")
    return texts, problem


def _normal(text: str, settings: FilterSettings) -> str:
    return unicodedata.normalize("NFC", text) if settings.nfc else text


def code_points(texts: Sequence[str]) -> np.ndarray:
    """All characters of the texts, one after the other, as uint32 code points."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def count_characters(shard: Shard, settings: FilterSettings) -> tuple[np.ndarray, np.ndarray]:
    """The code points in a shard and how often each occurs: two arrays of equal length.

    Counted over `response + " " + instruction` of each row before any replacement, as in 2024; with `rare_share`
    the number of rows that hold the character.
    """
    rows = [list(judged_texts(parse_line(shard.source, *line), settings)[0].values()) for line in shard.lines]
    codes = code_points([text for texts in rows for text in texts])
    if not settings.rare_share:
        counts = np.bincount(codes, minlength=ord(" ") + 1)
        counts[ord(" ")] += sum(map(bool, rows))
        return np.flatnonzero(counts), counts[counts > 0]
    present = np.flatnonzero(np.bincount(codes))
    column = np.zeros(_CODE_POINTS, np.int32)
    column[present] = np.arange(len(present))
    holds = np.zeros((len(rows), len(present)), bool)
    holds[np.repeat(np.arange(len(rows)), [sum(map(len, texts)) for texts in rows]), column[codes]] = True
    return present, holds.sum(axis=0)


class FilterRules:
    """The rules of a run, compiled into tables: one over Unicode for characters, one for how the strings begin."""

    def __init__(self, settings: FilterSettings, rare: str) -> None:
        self.settings = settings
        self.reason_of = np.zeros(_CODE_POINTS, np.uint8)  # index in REASONS, 0 for an allowed character
        if settings.cp932_only:
            self.reason_of[:] = REASONS.index("not cp932")
            writable = "".join(c for c in map(chr, range(0x10000)) if c.encode("cp932", "ignore"))
            self.reason_of[code_points([writable])] = 0
        for reason, characters in (("rare character", rare), ("ng string", [c for c in settings.ng if len(c) == 1])):
            self.reason_of[[ord(character) for character in characters]] = REASONS.index(reason)

        self.strings = [text for text in dict.fromkeys(settings.ng) if len(text) > 1]
        self.keys = {old for old, _ in settings.replacements}
        self.by_head: dict[str, list[str]] = {}
        self.may_begin = np.zeros(1 << 16, bool)  # by a hash of two characters: may a string begin with them?
        self.is_key = np.zeros(_CODE_POINTS, bool)  # replacements of one character
        for string in sorted({*self.strings, *self.keys}, key=len):
            # A string of one character is looked for wherever a longer one begins with it, too.
            self.by_head.setdefault(string[:2], list(self.by_head.get(string[0], ()))).append(string)
            self.may_begin[self._pair_hash(code_points([string[:2]]))] = True
            self.is_key[ord(string[0])] |= len(string) == 1

    @staticmethod
    def _pair_hash(codes: np.ndarray) -> np.ndarray:
        return (codes[:-1] * np.uint32(0x9E37) + codes[1:]) & np.uint32(0xFFFF)

    def clean(self, text: str) -> str:
        """The text after the replacements, one after the other in their order."""
        for old, new in self.settings.replacements:
            text = text.replace(old, new)
        return text

    def apply(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, dict[int, list[tuple[str, str]]]]:
        """Clean texts and find what forbids them.

        Returns the cleaned texts, all their code points one after the other, and by index of a text the
        (reason, matched string) of every rule it breaks.
        """
        texts = list(texts)
        codes, found = self._occurring(texts)
        if changed := [index for index, strings in found.items() if not self.keys.isdisjoint(strings)]:
            for index in changed:
                texts[index] = self.clean(texts[index])
            _, again = self._occurring([texts[index] for index in changed])
            found.update({index: again[place] for place, index in enumerate(changed)})
            codes = code_points(texts)
        hits = defaultdict(list)
        for index, strings in found.items():
            hits[index] += [("ng string", string) for string in self.strings if string in strings]
        at = np.flatnonzero(self.reason_of[codes])
        owner = np.searchsorted(np.cumsum([len(text) for text in texts]), at, side="right")
        for pair in np.unique(owner << 21 | codes[at]).tolist():  # a code point has 21 bits
            code = pair & 0x1FFFFF
            hits[pair >> 21].append((REASONS[self.reason_of[code]], _character(code)))
        return texts, codes, hits

    def _occurring(self, texts: Sequence[str]) -> tuple[np.ndarray, defaultdict[int, set[str]]]:
        """The code points of the texts, and by index of a text the strings (NG or to be replaced) that occur in it."""
        joined, codes, ends = "".join(texts), code_points(texts), np.cumsum([len(text) for text in texts])
        begins = self.is_key[codes]
        begins[:-1] |= self.may_begin[self._pair_hash(codes)]
        at = np.flatnonzero(begins)
        owner = np.searchsorted(ends, at, side="right")
        found = defaultdict(set)
        for start, index, end in zip(at.tolist(), owner.tolist(), ends[owner].tolist(), strict=True):
            head = joined[start : start + 2]
            for text in self.by_head.get(head) or self.by_head.get(head[0], ()):
                if joined.startswith(text, start, end):
                    found[index].add(text)
        return codes, found


def _character(code: int) -> str:
    return f"U+{code:04X}" if 0xD800 <= code <= 0xDFFF else chr(code)  # half a surrogate pair cannot be written


def not_japanese(texts: Mapping[str, str], percent: int) -> Problem | None:
    """The first text in which cld2 finds less than `percent` % Japanese (of its bytes) or that cld2 cannot read.

    Returns (reason, field, what was found), or None if all is well. A later turn too short for cld2 to name its
    language ("はい。") passes.
    """
    import pycld2

    for field, text in texts.items():
        try:
            languages = pycld2.detect(text)[2]
        except (pycld2.error, UnicodeEncodeError) as error:
            unreadable = _UNREADABLE.search(text)
            return "unreadable", field, f"U+{ord(unreadable.group()):04X}" if unreadable else str(error)
        if not any(code == "ja" and share >= percent for _, code, share, _ in languages):
            if field.startswith("turn") and languages[0][1] == "un":
                continue
            return "not Japanese", field, ", ".join(f"{code} {share} %" for _, code, share, _ in languages if share)
    return None


@lru_cache(maxsize=1)
def _compiled(settings: FilterSettings, rare: str) -> FilterRules:
    return FilterRules(settings, rare)


def filter_shard(shard: Shard, settings: FilterSettings, rare: str) -> tuple[dict[str, Any], list[bytes], list[bytes]]:
    """Judge the rows of a shard by every rule that needs no second look at the whole data set.

    Returns statistics for `finish_filter` (a JSON object), the lines of the rows kept, and those of the rows dropped.
    """
    rules = _compiled(settings, rare)
    rows = [parse_line(shard.source, *line) for line in shard.lines]
    judged = [judged_texts(row, settings) for row in rows]
    owners = [index for index, (texts, _) in enumerate(judged) for _ in texts]
    fields = [field for texts, _ in judged for field in texts]
    cleaned, codes, found = rules.apply([text for texts, _ in judged for text in texts.values()])
    hits = defaultdict(list)
    for text, (index, field) in enumerate(zip(owners, fields, strict=True)):
        judged[index][0][field] = cleaned[text]
        if text in found:
            hits[index] += [(reason, field, match) for reason, match in found[text]]

    kept, dropped, numbers, place = [], [], [], np.full(len(rows), -1)
    reasons, broken_by, only_by = Counter(), Counter(), Counter()
    for index, ((number, line), row, (texts, malformed)) in enumerate(zip(shard.lines, rows, judged, strict=True)):
        problem, also = malformed, []
        if not problem and hits[index]:
            broken = sorted(hits[index], key=lambda hit: REASONS.index(hit[0]))
            problem = broken[0]
            named = list(dict.fromkeys((reason, match) for reason, _, match in broken))
            also = [match for _, match in named[1:]]
            broken_by.update(named)
            if not also and not not_japanese(texts, settings.japanese_percent):
                only_by.update(named)
        problem = problem or not_japanese(texts, settings.japanese_percent)
        if not problem:
            try:
                kept.append(_to_json(_written_row(row, texts, rules)).encode() + b"\n")
                place[index] = len(numbers)
                numbers.append(number)
                continue
            except UnicodeEncodeError:
                problem = ("unreadable", "another turn or column", "half a surrogate pair")
        reasons[problem[0]] += 1
        dropped.append(_dropped_line(number, problem, also, line.strip()))

    # A character that few of these rows hold may turn out rare among all rows kept: note which rows hold it.
    place = np.repeat(place[owners], [len(text) for text in cleaned])
    codes, place = codes[place >= 0], place[place >= 0]
    counts = np.bincount(codes, minlength=ord(" ") + 1)
    counts[ord(" ")] += len(kept)
    few = np.flatnonzero((counts < settings.rare_after)[codes])
    holders = defaultdict(list)
    for pair in np.unique(codes[few].astype(np.int64) << 32 | place[few]).tolist():
        holders[pair >> 32].append(pair & 0xFFFFFFFF)
    statistics = {
        "kept": numbers,
        "reasons": reasons,
        "rules": [[*rule, rows, only_by[rule]] for rule, rows in broken_by.items()],
        "characters": {code: int(counts[code]) for code in np.flatnonzero(counts).tolist()},
        "holders": holders,
    }
    return statistics, kept, dropped


def _written_row(row: dict[str, Any], judged: Mapping[str, str], rules: FilterRules) -> dict[str, Any]:
    """All columns of the row, then the two fields; `conversations` as it was, unless it is to be cleaned as well."""
    if rules.settings.clean_conversations:
        turns = [
            {**turn, "content": rules.clean(_normal(turn["content"], rules.settings))}
            if isinstance(turn, dict) and isinstance(turn.get("content"), str)
            else turn
            for turn in row["conversations"]
        ]
        row = {**row, "conversations": turns}
    return {**row, "instruction": judged["instruction"], "response": judged["response"]}


def _dropped_line(number: int, problem: Problem, also: list[str], line: bytes) -> bytes:
    import orjson

    reason, field, match = problem
    head = orjson.dumps({"number": number, "reason": reason, "field": field, "match": match, "also": also})
    return head[:-1] + b',"row":' + line + b"}\n"


def rare_characters(rows: int, counts: np.ndarray, settings: FilterSettings) -> str:
    """The characters that occur, but fewer than `rare_below` times, or in less than a `rare_share` of all rows."""
    limit = settings.rare_share * rows if settings.rare_share else settings.rare_below
    return "".join(map(chr, np.flatnonzero((counts > 0) & (counts < limit)).tolist()))


def save_shard(path: Path, shard: Shard, settings: FilterSettings, rare: str) -> int:
    """Filter a shard into a file that appears only when complete: statistics, rows kept, rows dropped.

    Returns the number of rows.
    """
    statistics, kept, dropped = filter_shard(shard, settings, rare)
    part = path.with_suffix(".part")
    part.write_bytes(b"".join([_json_bytes(statistics), b"\n", *kept, *dropped]))
    part.replace(path)
    return len(shard.lines)


def finish_filter(paths: Sequence[Path], output_dir: str | Path, settings: FilterSettings) -> dict[str, Any]:
    """Join filtered shards, in their order, into `filtered_magpie.jsonl` and `dropped_magpie.jsonl`.

    Drops rows with characters that the rows kept hardly use (once, as in 2024) and near duplicates. Returns the
    report: funnel, reasons, rules, rare characters. Raises AssertionError if a row were lost.
    """
    characters, reasons, rules, rows_in = Counter(), Counter(), defaultdict(lambda: [0, 0]), 0
    for path in paths:
        with open(path, "rb") as file:
            shard = json.loads(file.readline())
        characters.update(shard["characters"])
        reasons.update(shard["reasons"])
        rows_in += len(shard["kept"]) + sum(shard["reasons"].values())
        for reason, match, rows, only in shard["rules"]:
            rules[reason, match][0] += rows
            rules[reason, match][1] += only
    rare = {chr(int(code)): count for code, count in characters.items() if count < settings.rare_after}
    find_duplicate = _near_duplicates(settings.near_duplicates) if settings.near_duplicates else None

    output_dir = Path(output_dir)
    rows_kept = rows_dropped = 0
    with (
        atomic_write(output_dir / "filtered_magpie.jsonl", binary=True) as kept_file,
        atomic_write(output_dir / "dropped_magpie.jsonl", binary=True) as dropped_file,
    ):
        for path in paths:
            with open(path, "rb") as file:
                shard = json.loads(file.readline())
                holders = ((chr(int(code)), places) for code, places in shard["holders"].items())
                held = {place: character for character, places in holders if character in rare for place in places}
                for place, (number, line) in enumerate(zip(shard["kept"], file, strict=False)):
                    problem = None
                    if place in held:
                        texts = judged_texts(json.loads(line), settings)[0]
                        field = next((field for field, text in texts.items() if held[place] in text), "instruction")
                        problem = ("rare afterwards", field, held[place])
                    elif find_duplicate and (first := find_duplicate(number, json.loads(line))):
                        problem = ("near duplicate", "instruction and response", f"row {first}")
                    if problem:
                        reasons[problem[0]] += 1
                        rows_dropped += 1
                        dropped_file.write(_dropped_line(number, problem, [], line.strip()))
                    else:
                        rows_kept += 1
                        kept_file.write(line)
                for line in file:
                    rows_dropped += 1
                    dropped_file.write(line)
    assert rows_in == rows_kept + rows_dropped, f"{rows_in} rows in, {rows_kept} kept, {rows_dropped} dropped"

    funnel, left = [{"step": "rows in", "rows": rows_in}], rows_in
    for reason in REASONS:
        if reasons[reason]:
            left -= reasons[reason]
            funnel.append({"step": reason, "rows": left})
    return {
        "rows_in": rows_in,
        "rows_kept": rows_kept,
        "rows_dropped": rows_dropped,
        "reasons": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "funnel": funnel,
        "rules": [
            {"reason": reason, "match": match, "rows": rows, "only": only}
            for (reason, match), (rows, only) in sorted(rules.items(), key=lambda rule: (-rule[1][1], -rule[1][0]))
        ],
        "rare_afterwards": rare,
    }


def _near_duplicates(threshold: float) -> Callable[[int, Mapping[str, str]], int]:
    """A function that returns the number of the first row with almost the same text, or remembers the row (returns 0).

    Estimated Jaccard similarity of the sets of 5 characters in a row, by MinHash with 128 permutations (rensa).
    """
    from rensa import RMinHash, RMinHashDeduplicator

    # 32 bands find nearly every pair down to a similarity of 0.6; rensa's own choice misses half of those at 0.94.
    seen, numbers = RMinHashDeduplicator(threshold, 128, True, 32), []

    def find(number: int, row: Mapping[str, str]) -> int:
        text = row["instruction"] + "\n" + row["response"]
        signature = RMinHash(num_perm=128, seed=42)
        signature.update([text[i : i + 5] for i in range(max(1, len(text) - 4))])
        if earlier := seen.get_duplicates(signature):
            return numbers[min(map(int, earlier))]
        seen.add(str(len(numbers)), signature)
        numbers.append(number)
        return 0

    return find


def run_filter(
    dataset: str,
    output_dir: str | Path,
    settings: FilterSettings,
    *,
    revision: str = "",
    max_rows: int = 0,
    num_proc: int = 1,
    shard_rows: int = 2000,
) -> dict[str, Any]:
    """Filter a data set (see `read_shards`) into `output_dir`; returns the report that it writes as filter_report.json.

    Two passes: count the characters, then judge the rows, both over shards of `shard_rows` rows in `num_proc`
    processes. Each finished shard is a file below `filter_shards/`, named by a hash of its rows, the settings and this
    module; a run that was interrupted goes on from there. The folder is removed when the final files are complete.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from tqdm import tqdm

    output_dir = Path(output_dir)
    folder = output_dir / "filter_shards"
    folder.mkdir(parents=True, exist_ok=True)
    source = (dataset, revision, max_rows, shard_rows)
    in_processes = Parallel(num_proc, return_as="generator", pre_dispatch="2*n_jobs")
    began = time.perf_counter()

    counts, sizes, digests = np.zeros(_CODE_POINTS, np.int64), [], []
    with tqdm(desc="count characters", unit=" rows", mininterval=1) as bar:
        tasks = (delayed(_count_task)(shard, settings) for shard in read_shards(*source))
        for digest, size, (codes, found) in in_processes(tasks):
            counts[codes] += found
            digests.append(digest)
            sizes.append(size)
            bar.update(size)
    rare = rare_characters(sum(sizes), counts, settings)

    run = hashlib.sha256(f"{settings} {rare!r} {sha256_file(__file__)}".encode()).digest()
    paths = [folder / f"{hashlib.sha256(run + digest).hexdigest()[:32]}.jsonl" for digest in digests]
    reused = [path.is_file() for path in paths]
    with tqdm(desc="filter", total=sum(sizes), unit=" rows", mininterval=1) as bar:
        bar.update(sum(size for size, done in zip(sizes, reused, strict=True) if done))
        tasks = (
            delayed(save_shard)(path, shard, settings, rare)
            for path, done, shard in zip(paths, reused, read_shards(*source), strict=True)
            if not done
        )
        for size in in_processes(tasks):
            bar.update(size)
    if num_proc > 1:
        get_reusable_executor().shutdown()  # idle processes would stay for five minutes

    report = {
        "dataset": dataset,
        "revision": revision,
        "settings": asdict(settings),
        **finish_filter(paths, output_dir, settings),
        "rare_characters": {_character(ord(character)): int(counts[ord(character)]) for character in rare},
        "shards": {"total": len(paths), "found_finished": sum(reused)},
        "seconds": round(time.perf_counter() - began, 1),
    }
    assert report["rows_in"] == sum(sizes), f"{sum(sizes)} rows read, {report['rows_in']} accounted for"
    write_json(output_dir / "filter_report.json", report)
    shutil.rmtree(folder)
    return report


def _count_task(shard: Shard, settings: FilterSettings) -> tuple[bytes, int, tuple[np.ndarray, np.ndarray]]:
    return shard.digest(), len(shard.lines), count_characters(shard, settings)


# --------------------------------------------------------------------------------------------------------------------
# 4. Fine-tune
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 5. Retrieve and answer
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 6. Load models
# --------------------------------------------------------------------------------------------------------------------
