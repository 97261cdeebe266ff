"""The recipe: pure functions of plain values, in the order in which the notebooks use them.

1. Rows        what a row of any form asks and answers
2. Filter      02_filter_magpie
3. Fine-tune   03_sft
4. Answer      04_rag_inference
5. Score       04_rag_inference, compare.py
6. The door to the rooms of `engine/`, which act: they read, write, load, train and ask

A room is reached through this module and imported when it is first named: `helpers.models.load(...)`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import sys
import types
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from numbers import Number
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np


class RecipeError(ValueError):
    """An error that the user can fix: one line that says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """Kind and first line of a library's error, at most 120 characters: what fits into a RecipeError."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold; the order of a dictionary's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# 1. Rows
# --------------------------------------------------------------------------------------------------------------------

# The forms of rows. The texts stand in a list of turns (with role and content, or from and value), or the question,
# further text that belongs to it, and the answer stand in columns of their own.
CHATS = ("conversations", "messages", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("response", "output", "answer", "completion")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
KNOWN_FORMS = (
    f"known are lists of turns (role, content or from, value) in {', '.join(CHATS)}; or {', '.join(QUESTIONS)} for the "
    f"question, with {' or '.join(CONTEXTS)} for what belongs to it, and {', '.join(ANSWERS)} for the answer"
)


def read_turn(turn: Any) -> Any:
    """A turn with the keys role ("user", "assistant" or others) and content, whatever it calls them."""
    if not isinstance(turn, dict) or turn.get("role") in ("user", "assistant"):
        return turn
    names = {} if "role" in turn else {"from": "role", "value": "content"}
    turn = {names.get(key, key): value for key, value in turn.items()}
    if "role" in turn:
        turn["role"] = ROLES.get(turn["role"], turn["role"]) if isinstance(turn["role"], str) else ""
    return turn


def has_role(turn: Any) -> bool:
    """Whether what `read_turn` returns is a turn."""
    return isinstance(turn, dict) and "role" in turn


class Parsed(NamedTuple):
    """A row whose form was read."""

    row: dict[str, Any]
    columns: tuple[str, ...]  # those that hold its texts; () if the form is unknown
    turns: list[Any]  # see `read_turn`


def parse_row(row: dict[str, Any], columns_first: bool = False) -> Parsed:
    """A row with its form. Of a list of turns and columns with question and answer the list is taken, or with
    `columns_first` the columns.
    """
    chat = Parsed(row, (), [])
    for name in CHATS:
        turns = row.get(name)
        if isinstance(turns, str):
            with suppress(ValueError, RecursionError):
                turns = json.loads(turns)
        if isinstance(turns, list):
            chat = Parsed(row, (name,), [read_turn(turn) for turn in turns])
            break
    if chat.columns and not columns_first:
        return chat

    def first(names: Iterable[str]) -> tuple[str, ...]:  # a column that is null only if there is no better one
        return tuple(sorted((name for name in names if name in row), key=lambda name: row[name] is None)[:1])

    question, answer = first(QUESTIONS), first(ANSWERS)
    if not question or (chat.columns and (not answer or row[answer[0]] is None)):
        return chat
    # A row that has a conversation as well is one of notebook 2, whose instruction is already the whole question.
    context = tuple(name for name in CONTEXTS if name not in question and row.get(name) and not chat.columns)
    parts = [row[name] for name in question + context]
    wrong = [part for part in parts if not isinstance(part, str)]
    texts = [wrong[0] if wrong else "\n".join(filter(None, parts))]
    texts += [str(row[name]) if is_number(row[name]) else row[name] for name in answer]
    columns, history = question + context + answer, row.get("history")
    if isinstance(history, list) and history:  # the turns before, as LLaMA-Factory stores them: a list of pairs
        texts = [text for pair in history if isinstance(pair, list) for text in pair[:2]] + texts
        columns += ("history",)
    turns = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts)]
    return Parsed(row, columns, turns)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number: its digits are what is meant where a text is wanted."""
    return isinstance(value, Number) and not isinstance(value, (bool, complex)) and math.isfinite(value)


def check_text(where: str, value: Any, or_number: bool = False) -> str:
    """The text `value`, or with `or_number` a number's digits; RecipeError (beginning with `where`) for all else."""
    if or_number and is_number(value):
        return str(value)
    if not isinstance(value, str):
        kinds = {type(None): "null", bool: "true or false", int: "a number", dict: "an object", list: "a list"}
        found = kinds.get(type(value), type(value).__name__)
        raise RecipeError(f"{where} is {found}, expected text; correct or delete the row")
    if half := re.search("[\ud800-\udfff]", value):
        found = f"U+{ord(half[0]):04X}, half a surrogate pair"
        raise RecipeError(f"{where} holds {found}, which UTF-8 cannot hold; correct the text")
    return value


def read_pair(place: str, parsed: Parsed, need_answer: bool = True) -> tuple[str, str, Any]:
    """The form of a row, its first question and its first answer, which without `need_answer` is returned as it is.

    RecipeError, beginning with `place`, for an unknown form and for a question or answer that is no text.
    """
    row, columns, turns = parsed
    form = ", ".join(columns)
    for number, turn in enumerate(turns, start=1):
        if not has_role(turn):
            raise RecipeError(f"{place}: turn {number} of {form} has no role; {KNOWN_FORMS}")
    roles = [turn["role"] for turn in turns]
    for role, part in (("user", "question"), ("assistant", "answer"))[: 1 + need_answer]:
        if role not in roles:
            in_turns = columns and columns[0] in CHATS
            held = f"roles in {form} are {roles[:20]}" if in_turns else f"columns are {sorted(map(str, row))[:20]}"
            raise RecipeError(f"{place}: no {part} found; its {held}; {KNOWN_FORMS}")
    form += ", without the system text" if "system" in roles else ""
    form += ", first question of several" if roles.count("user") > 1 else ""
    texts = {turn["role"]: turn.get("content") for turn in reversed(turns)}
    question, answer = check_text(f"{place}: the question ({columns[0]})", texts["user"]), texts.get("assistant")
    return form, question, check_text(f"{place}: the answer ({form})", answer, True) if need_answer else answer


class Text(NamedTuple):
    """Text that `pattern` matches as a whole; `words` say the same to a reader."""

    pattern: str
    words: str


ANY_TEXT = Text(r".*", "text on one line")
MANY, SWITCH = 10**9, [True, False]


def wrong_values(values: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, str]:
    """The `values` that a table such as PARAMETERS does not allow: name and what it must be."""
    wrong = {}
    for name, allowed in table.items():
        value = values.get(name, ...)
        if isinstance(allowed, Text):
            fits, words = isinstance(value, str) and re.fullmatch(allowed.pattern, value), allowed.words
        elif isinstance(allowed, range):
            fits = type(value) is int and value in allowed
            words = f"a whole number from {allowed[0]:,} to {allowed[-1]:,}"
        elif isinstance(allowed, tuple):
            fits = type(value) in (int, float) and allowed[0] <= value <= allowed[1]  # never true for nan
            words = f"a number from {allowed[0]:g} to {allowed[1]:,g}"
        else:
            fits = type(value) is type(allowed[0]) and value in allowed  # True is not 1 here
            words = " or ".join(map(repr, allowed))
        if name in values and not fits:
            wrong[name] = words
    return wrong


def show(table: Any, longest: int = 200) -> Any:
    """A pandas DataFrame for the reader: text at the left, its HTML as text, cut at `longest` characters; 3 digits."""
    table = table.map(
        lambda value: f"{value[:longest]} …" if isinstance(value, str) and len(value) > longest else value
    )
    left = [{"selector": "th, td", "props": "text-align: left; white-space: pre-wrap"}]
    return table.style.format(escape="html", precision=3).set_table_styles(left)


# --------------------------------------------------------------------------------------------------------------------
# 2. Filter
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
)
Problem = tuple[str, str, str]  # (reason, field, matched string)
_VOICED_KANA = re.compile("[ぁ-ヿ][\u3099\u309a]")
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class FilterRules:
    """A rules file, with 2024's numbers and switches as defaults; RecipeError for a wrong type or range."""

    replacements: tuple[tuple[str, str], ...]  # (old, new): applied one after the other to every text
    ng: tuple[str, ...]  # a row that holds one of these strings is dropped
    rare_below: int = 20  # drop rows with a character that occurs fewer times than this in all rows; 0 is off
    rare_after_below: int = 10  # the same once more, counted over the rows that passed all other rules; 0 is off
    japanese_percent: int = 60  # the least share of Japanese, in percent of bytes, that cld2 must find in each text
    all_turns: bool = False  # judge every turn, not only the first question and the first answer
    clean_conversations: bool = False  # apply the replacements to the column `conversations`, too
    compose_kana: bool = False  # write a kana and a combining voice mark as one character: か + ゛ becomes が
    plain_text: bool = False  # let cld2 read every character; without, it takes the text for HTML and skips tags
    cp932_only: bool = False  # drop rows with a character that Japanese Windows (cp932) cannot write
    cp932_also: str = ""  # characters that `cp932_only` lets pass nevertheless

    def __post_init__(self) -> None:
        def texts(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)

        wrong = wrong_values(vars(self), RULES)
        if not texts(self.ng) or "" in self.ng:  # an empty string is in every text
            wrong["ng"] = "a list of strings, none of them empty"
        pairs = self.replacements if isinstance(self.replacements, (list, tuple)) else [None]
        if not all(texts(pair) and len(pair) == 2 and pair[0] for pair in pairs):
            wrong["replacements"] = "a list of pairs of strings [old, new], in which old is not empty"
        for name, wanted in wrong.items():
            raise RecipeError(f"{name} is {str(getattr(self, name))[:60]!r}; it must be {wanted}")
        # A string in another Unicode form than the text would never be found in it.
        pairs = tuple((self.composed(old), self.composed(new)) for old, new in pairs)
        object.__setattr__(self, "replacements", pairs)
        object.__setattr__(self, "ng", tuple(map(self.composed, self.ng)))

    @cached_property
    def any_key(self) -> re.Pattern:
        """Finds out whether a text holds anything that is to be replaced."""
        return any_string(old for old, _ in self.replacements)

    def normal(self, text: str) -> str:
        """The text in the Unicode form in which it is judged. NFC as a whole would rewrite kanji of names, too."""
        if self.compose_kana and ("\u3099" in text or "\u309a" in text):
            return _VOICED_KANA.sub(lambda kana: unicodedata.normalize("NFC", kana.group()), text)
        return text

    def composed(self, string: str) -> str:
        """A string of the rules file, which an editor may have saved with accents and voice marks of their own."""
        decomposed = self.compose_kana and any(map(unicodedata.combining, string))
        return unicodedata.normalize("NFC", string) if decomposed else string


# What the values of a rules file may be, beside its two lists (see PARAMETERS).
RULES: dict[str, list | range | tuple[float, float] | Text] = {
    **dict.fromkeys(("rare_below", "rare_after_below"), range(MANY)),
    "japanese_percent": range(101),
    **dict.fromkeys(("all_turns", "clean_conversations", "compose_kana", "plain_text", "cp932_only"), SWITCH),
    "cp932_also": ANY_TEXT,
}


def any_string(strings: Iterable[str]) -> re.Pattern:
    """A pattern that finds every place of the strings in a text, in a third of the time of their alternation.

    It matches the character that is last in code order, and looks for the rest only there: kanji come after kana and
    Latin letters and are rarer.
    """
    around = defaultdict(list)
    for string in strings:
        place = string.index(max(string)) + 1
        around[max(string)].append(f"(?<={re.escape(string[:place])})(?={re.escape(string[place:])})")
    return re.compile("|".join(f"{re.escape(last)}(?:{'|'.join(rest)})" for last, rest in around.items()) or "(?!)")


def any_character(characters: Iterable[str]) -> re.Pattern:
    """A pattern for these characters and for all beyond U+FFFF (emoji, rare kanji), which the caller looks up: a class
    of many would be slow.
    """
    basic = "".join(character for character in characters if character <= "\uffff")
    return re.compile(f"[{re.escape(basic)}\U00010000-\U0010ffff]")


def row_texts(parsed: Parsed, rules: FilterRules) -> tuple[dict[str, str], Problem | None]:
    """The texts of a row by field, and what is wrong with its form; a malformed row has no texts.

    `instruction` is the first user turn and `response` the first assistant turn, "" where missing; with `all_turns`
    the other turns follow as "turn N", counted from 1.
    """
    if not parsed.columns:
        return {}, ("malformed", "conversations", type(parsed.row.get("conversations")).__name__)
    texts: dict[str, str] = {}
    for number, turn in enumerate(parsed.turns, start=1):
        if not has_role(turn):
            return {}, ("malformed", f"turn {number}", type(turn).__name__)
        field, content = {"user": "instruction", "assistant": "response"}.get(turn["role"]), turn.get("content")
        if field is None or field in texts:
            if not rules.all_turns or (content is None and turn.get("tool_calls")):
                continue  # with `tool_calls` it calls a tool instead of saying something
            field = f"turn {number}"
        if not isinstance(content, str):
            return {}, ("malformed", field, type(content).__name__)
        texts[field] = rules.normal(content)
        if len(texts) == 2 and not rules.all_turns:
            break  # as in 2024, which never looks at what follows
    blank = [field for field in ("response", "instruction") if not texts.get(field, "").strip()]
    problem = ("empty" if blank[0] in texts else "missing turn", blank[0], "") if blank else None
    first = {field: texts.pop(field, "") for field in ("instruction", "response")}
    return first | texts, problem


def count_characters(texts_of_rows: Iterable[Mapping[str, str]]) -> np.ndarray:
    """How often each character occurs in the texts of all rows, joined by one space in a row, by its code point."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    joined = (" ".join(texts.values()) for texts in texts_of_rows if texts)
    while piece := "".join(islice(joined, 100)):  # 2024 counted one string of all rows
        np.add.at(counts, _code_points(piece), 1)
    return counts


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def rare_characters(counts: np.ndarray, limit: int) -> str:
    """The characters that occur, but fewer times than `limit`, in the order of their code points."""
    return "".join(map(chr, np.flatnonzero((counts > 0) & (counts < limit)).tolist()))


def replace_strings(text: str, rules: FilterRules) -> str:
    """The text after the replacements, one after the other: a later one sees what an earlier one wrote."""
    if rules.any_key.search(text):  # most texts hold nothing to replace, and one search is faster than 28
        for old, new in rules.replacements:
            text = text.replace(old, new)
    return text


class Forbidden:
    """What no text may hold, ready to be searched for: NG strings, `rare` characters, and those outside cp932."""

    def __init__(self, rules: FilterRules, rare: str = "") -> None:
        self.strings = {string: max(string) for string in rules.ng if len(string) > 1}
        self.any_string = any_string(self.strings)
        single = [string for string in rules.ng if len(string) == 1]
        self.reason_of = {**dict.fromkeys(rare, "rare character"), **dict.fromkeys(single, "ng string")}
        self.other_reason = "not cp932" if rules.cp932_only else None
        if rules.cp932_only:
            writable = {c for c in map(chr, range(0x10000)) if c.encode("cp932", "ignore")}
            private = set(map(chr, range(0xE000, 0xF900)))  # cp932 writes it, but it means something else to everyone
            allowed = (writable - private | set(rules.cp932_also)) - self.reason_of.keys()
            self.any_character = re.compile(f"[^{re.escape(''.join(allowed))}]")
        else:
            self.any_character = any_character(self.reason_of)


def find_forbidden(texts: Mapping[str, str], forbidden: Forbidden) -> list[Problem]:
    """(reason, field, matched string) of everything forbidden in the texts of a row, in the order of REASONS."""
    found, reason_of = [], forbidden.reason_of
    for field, text in texts.items():
        if held := set(forbidden.any_string.findall(text)):
            strings = [s for s, last in forbidden.strings.items() if last in held and s in text]
            found += [("ng string", field, string) for string in strings]
        if characters := forbidden.any_character.findall(text):
            reasons = [(reason_of.get(c, forbidden.other_reason), c) for c in sorted(set(characters))]
            found += [(reason, field, _shown(character)) for reason, character in reasons if reason]
    return sorted(found, key=lambda problem: REASONS.index(problem[0])) if found else found


def _shown(character: str) -> str:
    return f"U+{ord(character):04X}" if "\ud800" <= character <= "\udfff" else character  # half a surrogate pair


def not_japanese(texts: Mapping[str, str], rules: FilterRules) -> list[Problem]:
    """[(reason, field, what was found)] of the first text that cld2 cannot read or finds too little Japanese in; or [].

    A later turn too short for cld2 to name its language ("はい。") passes.
    """
    import pycld2

    for field, text in texts.items():
        try:
            languages = pycld2.detect(text, isPlainText=rules.plain_text)[2]
        except (pycld2.error, UnicodeEncodeError) as error:
            unreadable = _UNREADABLE.search(text)
            return [("unreadable", field, f"U+{ord(unreadable.group()):04X}" if unreadable else str(error))]
        if not any(code == "ja" and share >= rules.japanese_percent for _, code, share, _ in languages):
            if field.startswith("turn") and languages[0][1] == "un":
                continue
            return [("not Japanese", field, ", ".join(f"{code} {share} %" for _, code, share, _ in languages if share))]
    return []


def find_problems(texts: Mapping[str, str], rules: FilterRules, forbidden: Forbidden) -> list[Problem]:
    """Why a row with these texts (after the replacements) is dropped: everything forbidden in them, or else their
    language (cld2 is slow, and its percentage overlooks a short foreign tail); [] keeps the row.
    """
    return find_forbidden(texts, forbidden) or not_japanese(texts, rules)


# The number of a row from 1, the row, its texts as judged.
Passed = tuple[int, Parsed, dict[str, str]]


def judge_rows(
    rows: Iterable[Parsed], texts_of: Iterable[tuple[dict[str, str], Problem | None]], rules: FilterRules, rare: str
) -> tuple[list[Passed], list[dict[str, Any]], dict[tuple[str, str], list[int]]]:
    """Apply every rule but the last to the rows, each with what `row_texts` found; `rare` characters are forbidden.

    Returns the rows that passed, the dropped ones (see `dropped_record`), and for each (reason, match) how many rows
    hold it and how many of them no other rule would have dropped.
    """
    forbidden = Forbidden(rules, rare)
    passed, dropped, hits = [], [], defaultdict(lambda: [0, 0])
    for number, (row, (given, malformed)) in enumerate(zip(rows, texts_of, strict=True), start=1):
        texts = {field: replace_strings(text, rules) for field, text in given.items()}
        problems = [malformed] if malformed else find_problems(texts, rules, forbidden)
        if not problems:
            passed.append((number, row, texts))
            continue
        forbids = problems[0][0] in ("ng string", "rare character", "not cp932")
        broken = list(dict.fromkeys((reason, match) for reason, _, match in problems)) if forbids else []
        only = len(broken) == 1 and not not_japanese(texts, rules)
        for rule in broken:
            hits[rule][0] += 1
            hits[rule][1] += only
        dropped.append(dropped_record(number, problems[0], row.row, [match for _, match in broken[1:]]))
    return passed, dropped, hits


def dropped_record(number: int, problem: Problem, row: Mapping[str, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """What `dropped_magpie.jsonl` says of a row: its first problem, what `also` is forbidden in it, and the row."""
    reason, field, match = problem
    return {"number": number, "reason": reason, "field": field, "match": match, "also": list(also), "row": row}


def drop_rare_afterwards(passed: Iterable[Passed], rare: str) -> tuple[list[Passed], list[dict[str, Any]]]:
    """Drop the rows that hold one of the `rare` characters: once, as in 2024, not until nothing changes any more."""
    kept, dropped, pattern = [], [], any_character(rare)
    for number, row, texts in passed:
        if held := {c: field for field in reversed(texts) for c in pattern.findall(texts[field]) if c in rare}:
            worst = max(held)
            dropped.append(dropped_record(number, ("rare afterwards", held[worst], worst), row.row))
        else:
            kept.append((number, row, texts))
    return kept, dropped


def written_row(parsed: Parsed, texts: Mapping[str, str], rules: FilterRules) -> dict[str, Any]:
    """A row as it is kept: all its columns, then `instruction` and `response` after the replacements.

    `conversations` takes the place of the columns that held the texts; only `clean_conversations` changes its texts.
    """
    row, columns, turns = parsed
    if rules.clean_conversations:
        turns = [clean_turn(turn, rules) for turn in turns]
    if columns != ("conversations",):
        row = {name: value for name, value in row.items() if name not in columns}
    return {**row, "conversations": turns, "instruction": texts["instruction"], "response": texts["response"]}


def clean_turn(turn: Any, rules: FilterRules) -> Any:
    """A turn with the replacements applied to its text; what is no text stays as it is."""
    if not has_role(turn) or not isinstance(turn.get("content"), str):
        return turn
    return turn | {"content": replace_strings(rules.normal(turn["content"]), rules)}


def filter_rows(
    rows: Sequence[Parsed], rules: FilterRules, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The rows kept (see `written_row`), those dropped (see `dropped_record`), and the report.

    `progress`, such as tqdm, is handed the rows that are being judged and may show how far they are.
    """
    texts_of = [row_texts(row, rules) for row in rows]
    counts = count_characters(texts for texts, _ in texts_of)
    rare = rare_characters(counts, rules.rare_below)
    passed, dropped, hits = judge_rows(progress(rows), texts_of, rules, rare)

    counts_after = count_characters(texts for _, _, texts in passed)
    rare_after = rare_characters(counts_after, rules.rare_after_below)
    passed, late = drop_rare_afterwards(passed, rare_after)
    kept = [written_row(row, texts, rules) for _, row, texts in passed]
    dropped = sorted(dropped + late, key=lambda record: record["number"])
    report = {
        "settings": asdict(rules),
        **filter_counts(len(rows), len(kept), Counter(record["reason"] for record in dropped)),
        "rules": [
            {"reason": reason, "match": match, "rows": held, "only": only}
            for (reason, match), (held, only) in sorted(hits.items(), key=lambda rule: (-rule[1][1], -rule[1][0]))
        ],
        "rare_characters": {_shown(character): int(counts[ord(character)]) for character in rare},
        "rare_afterwards": {character: int(counts_after[ord(character)]) for character in rare_after},
    }
    return kept, dropped, report


def filter_counts(rows_in: int, rows_kept: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    """The counts of a filter's report, with the rows left after each step; AssertionError if a row were lost."""
    rows_dropped = sum(reasons.values())
    assert rows_in == rows_kept + rows_dropped, f"{rows_in} rows in, {rows_kept} kept, {rows_dropped} dropped"
    reasons = {reason: reasons[reason] for reason in REASONS if reasons.get(reason)}
    left = rows_in - np.cumsum([0, *reasons.values()])
    return {
        "rows_in": rows_in,
        "rows_kept": rows_kept,
        "rows_dropped": rows_dropped,
        "reasons": reasons,
        "funnel": [{"step": step, "rows": int(rows)} for step, rows in zip(("rows in", *reasons), left, strict=True)],
    }


# --------------------------------------------------------------------------------------------------------------------
# 3. Fine-tune
# --------------------------------------------------------------------------------------------------------------------

# The training prompt of 2024 (`alpaca_prompt_jp`): first the question, then the answer.
SFT_PROMPT = """
あなたは高性能なAIです。質問に対して、適切な回答を書きなさい。
回答に関係のないことは絶対に書かないでください。

### 質問:
{}

### 回答:
{}"""


def sft_text(instruction: str, response: str, eos_token: str) -> str:
    """One training text: the filled prompt, then `eos_token` so that the model learns where an answer ends.

    As in 2024 a row without a response gets no `eos_token`. The one <bos> is added by `encode`.
    """
    return SFT_PROMPT.format(instruction, response) + (eos_token if response else "")


class Tokens(NamedTuple):
    """A text as a model reads it."""

    ids: list[int]
    starts: list[int]  # the character at which each token begins; that of <bos> is 0


def encode(tokenizer: Any, text: str) -> Tokens:
    """The tokens of people's text: a control token such as "<eos>" that is written in it stays text.

    Without `split_special_tokens` it would become the control token itself and end the text where it stands. In front
    comes the one <bos>, if the tokenizer puts one there (that of Qwen has none); what others put at the end does not.
    """
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    options = {"split_special_tokens": True, "add_special_tokens": False, "return_offsets_mapping": True}
    encoded = tokenizer(text, **options)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return Tokens(begin + encoded["input_ids"], [0] * len(begin) + starts)


def encode_within(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that follows other text: without the ▁ that some tokenizers put before a first word.

    They are found behind a line end; where that becomes one token with the text, they are those of the text alone.
    """
    line_end, after, alone = (
        tokenizer(part, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        for part in ("\n", "\n" + text, text)
    )
    return after[len(line_end) :] if after[: len(line_end)] == line_end else alone


def answer_labels(ids: Sequence[int], starts: Sequence[int], prompt_length: int) -> list[int]:
    """Labels that train on the answer alone: the id of a token that starts at character `prompt_length` or later, -100.

    `starts` holds the character at which each token begins (a fast tokenizer's offset mapping); <bos> begins at 0.
    """
    return [token if start >= prompt_length else -100 for token, start in zip(ids, starts, strict=True)]


class Example(NamedTuple):
    """A training text as the trainer gets it."""

    text: str
    ids: list[int]
    labels: list[int]  # the id of a token that the loss counts, -100 for the others
    question: int  # how many of the tokens belong to the prompt and the question


def training_example(tokenizer: Any, instruction: str, response: str, loss_on: str) -> Example:
    """One pair as text, token ids and labels, ended by the tokenizer's end token if there is a response.

    The loss counts all tokens, or with `loss_on` "answer" those that begin after the question.
    """
    question = sft_text(instruction, "", "")
    ids, starts = encode(tokenizer, question + response)
    if response:
        ids, starts = [*ids, tokenizer.eos_token_id], [*starts, len(question + response)]
    labels = answer_labels(ids, starts, len(question) if loss_on == "answer" else 0)
    text = question + response + (tokenizer.eos_token if response else "")
    return Example(text, ids, labels, sum(start < len(question) for start in starts))


def cut_examples(examples: Sequence[Example], longest: int) -> tuple[list[dict[str, list[int]]], dict[int, str]]:
    """The examples cut at `longest` tokens, as rows (input_ids, labels), and by number what happened to longer ones.

    Where already the question is that long, nothing may be left to learn: such an example is "left out".
    """
    rows, changed = [], {}
    for number, example in enumerate(examples):
        row = {"input_ids": example.ids[:longest], "labels": example.labels[:longest]}
        learns = any(label != -100 for label in row["labels"])
        if learns:
            rows.append(row)
        if len(example.ids) > longest or not learns:
            changed[number] = "cut" if learns else "left out"
    if not rows:
        raise RecipeError(f"no question leaves room for an answer: raise max_seq_length = {longest}")
    return rows, changed


def even_rows(texts: Sequence[int], lengths: Sequence[int], texts_per_row: int) -> list[list[int]]:
    """Deal `texts` (their numbers) out to rows of nearly the same length: the longest first, each to the shortest row.

    `lengths[number]` is a text's length in tokens; no row gets more than `texts_per_row` texts.
    """
    rows: list[list[int]] = [[] for _ in range(-(-len(texts) // texts_per_row))]
    for text in sorted(texts, key=lambda text: lengths[text], reverse=True):
        open_rows = [row for row in rows if len(row) < texts_per_row]
        min(open_rows, key=lambda row: sum(lengths[other] for other in row)).append(text)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# 4. Answer
# --------------------------------------------------------------------------------------------------------------------

# The inference prompt of 2024. There is no newline between INSTRUCTION and the last "### 質問:".
OPENING = "質問・文章をよく読んで、正確で親切な回答を書きなさい。\n"
SHOT = "### 質問:\n{instruction}\n\n### 回答:\n{response}\n\n\n"
INSTRUCTION = (
    "あなたは日本語が堪能な優秀な人間です。\n"
    "**文脈**を踏まえて、改行と箇条書きを駆使して、日本語で**詳細に**書きなさい。\n"
    "優秀な人間になりきって、推測をいれずに根拠をもってわかりやすく答えてください。"
)
QUESTION = "### 質問:\n{instruction}\n\n### 回答:\n"


# Strings that 2024 forbade the model to write (`bad_words_ids`).
BANNED_WORDS = ("質問", "###", "#", "##", "---", "<h3>", "filepath", "> ")


def build_prompt(instruction: str, shots: Iterable[Mapping[str, str]], style: str) -> str:
    """The few-shot prompt; the first of `shots` (instruction, response), the most similar one, stands last, next to
    the question.

    `style` "2024" is the prompt of 2024; "training" begins like the training texts, so that without shots it is one.
    """
    examples = "".join(SHOT.format(**shot) for shot in reversed(list(shots)))
    question = QUESTION.format(instruction=instruction)
    if style == "training":
        return SFT_PROMPT.partition("### 質問")[0] + examples + question
    return OPENING + examples + INSTRUCTION + question


class Prompt(NamedTuple):
    """A prompt as the model reads it."""

    ids: list[int]
    shots: int  # how many it shows


def fit_shots(
    instruction: str,
    shots: Sequence[Mapping[str, str]],
    to_ids: Callable[[str, Sequence[Mapping[str, str]]], list[int]],
    budget: int,
) -> Prompt:
    """The prompt with as many shots as fit into `budget` tokens; `to_ids` makes token ids of a question and shots.

    The least similar shots go first; neither a shot nor the question is ever cut. A question that is too long on its
    own comes back without shots and over budget.
    """
    number = len(shots)
    while len(ids := to_ids(instruction, shots[:number])) > budget and number:
        number -= 1
    return Prompt(ids, number)


def max_sim(query: Any, documents: Any) -> Any:
    """ColBERT's scores (documents,): for each token of the query the most similar token of a document, summed up.

    `query` (tokens, width) and `documents` (documents, tokens, width) are tensors of unit vectors; documents are filled
    up with zeros.
    """
    similarity = documents @ query.T  # (documents, tokens of the document, tokens of the query)
    best = similarity.amax(dim=1)
    return best.sum(dim=1)


def clean_answer(text: str) -> str:
    """Cut everything from a new "### 質問" on (the model went on to invent the next task) and trim white space."""
    return text.split("### 質問", maxsplit=1)[0].strip()


def submission_rows(tasks: Sequence[Mapping[str, Any]], answers: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Rows (task_id, input, output) in the order of the tasks; RecipeError lists tasks without an answer."""
    ids = [task["task_id"] for task in tasks]
    missing, empty = [i for i in ids if i not in answers], [i for i in ids if answers.get(i) == ""]
    if missing:
        raise RecipeError(
            f"no answer for task_id {missing[:10]} ({len(missing)} of {len(ids)}): run this notebook again"
        )
    if empty:  # greedy decoding would write the same again
        raise RecipeError(
            f"an empty answer for task_id {empty[:10]} ({len(empty)} of {len(ids)}): set ban_words = False, "
            "another prompt_style or a smaller repetition_penalty, or train the adapter longer"
        )
    return [{"task_id": task["task_id"], "input": task["input"], "output": answers[task["task_id"]]} for task in tasks]


# --------------------------------------------------------------------------------------------------------------------
# 5. Score
# --------------------------------------------------------------------------------------------------------------------

# What a score means, and its better direction: 1 higher, -1 lower, 0 neither.
MEASURES = {
    "nll": ("negative log-likelihood of the reference, nats per character", -1),
    "judge": ("grade of the judge, 1 to 5", 1),
    "chrf": ("chrF to the reference, 0 to 100", 1),
    "rouge_l": ("ROUGE-L to the reference, 0 to 100", 1),
    "japanese": ("share of Japanese among the letters", 1),
    "repeated": ("share of 10-character pieces that were there before", -1),
    "loop": ("answers with a loop, share", -1),
    "cut": ("answers cut at the longest length, share", -1),
    "empty": ("empty answers, share", -1),
    "characters": ("length of the answer, characters", 0),
}
_JAPANESE = re.compile("[\u3005\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]")
_LOOP = re.compile(r"(.{1,100}?)\1{3,}", re.DOTALL)
NEAR_DUPLICATE = 0.5  # Jaccard similarity of two questions from which on one counts as a copy of the other


def references_of(task: Mapping[str, Any]) -> list[str]:
    """The reference answers of a task (its `output`: a text, or a list of texts that are all right); [] if none."""
    output = task.get("output") or []
    stripped = [text.strip() for text in ([output] if isinstance(output, str) else output)]
    return [text for text in stripped if text]


def reference_of(task: Mapping[str, Any]) -> str:
    """The reference answers of a task as one text, "" without any."""
    return "\nまたは\n".join(references_of(task))


def japanese_share(text: str) -> float | None:
    """Share of kana and kanji among the letters of `text`; None for a text without letters, such as "420"."""
    letters = [character for character in text if unicodedata.category(character)[0] == "L"]
    return sum(map(bool, map(_JAPANESE.match, letters))) / len(letters) if letters else None


def repeated_share(text: str, n: int = 10) -> float:
    """Share of the pieces of `n` characters in a row that occurred earlier in `text`."""
    pieces = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def has_loop(text: str) -> bool:
    """True if a piece with a letter or digit stands four times or more in a row, over at least 40 characters.

    Rules such as "-----" and the lines of a table are no loops.
    """
    return any(len(match[0]) >= 40 and any(map(str.isalnum, match[1])) for match in _LOOP.finditer(text))


def score_texts(
    tasks: Sequence[Mapping[str, Any]], answers: Sequence[str], cut: Sequence[bool]
) -> list[dict[str, Any]]:
    """What can be measured on the answers' text, one dictionary per task: task_id and names of MEASURES.

    chrF is sacrebleu's, on characters; ROUGE-L is the F measure of Google's rouge-score on MeCab's words (fugashi,
    unidic-lite). Of several references the most similar one counts; both are None for a task without any. `cut` says
    which answers ended for want of room.
    """
    from fugashi import Tagger
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    tagger, chrf = Tagger("-Owakati"), CHRF()
    words = types.SimpleNamespace(tokenize=lambda text: [word.surface for word in tagger(text)])
    rouge = RougeScorer(["rougeL"], tokenizer=words)
    scored = []
    for task, answer, ended in zip(tasks, answers, cut, strict=True):
        chrfs = [chrf.sentence_score(answer, [reference]).score for reference in references_of(task)]
        rouges = [100 * rouge.score(reference, answer)["rougeL"].fmeasure for reference in references_of(task)]
        scored.append(
            {
                "task_id": task["task_id"],
                "chrf": max(chrfs, default=None),
                "rouge_l": max(rouges, default=None),
                "japanese": japanese_share(answer),
                "repeated": repeated_share(answer),
                "loop": int(has_loop(answer)),
                "cut": int(ended),
                "empty": int(not answer.strip()),
                "characters": len(answer),
            }
        )
    return scored


def near_duplicates(tasks: Sequence[Mapping[str, Any]], questions: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Tasks whose `input` is almost one of the `questions` (texts by source) that the model was trained on or is shown.

    Returns task_id, source, row (from 1) and similarity of the most similar question of each source, if at least
    NEAR_DUPLICATE: the Jaccard similarity of the sets of 5 characters in a row, after NFKC and without white space.
    """

    def pieces(text: str) -> set[str]:
        text = "".join(unicodedata.normalize("NFKC", text).split())
        return {text[i : i + 5] for i in range(max(1, len(text) - 4))}

    wanted = [pieces(task["input"]) for task in tasks]
    holders = defaultdict(list)  # of each piece: the tasks that hold it
    for position, task_pieces in enumerate(wanted):
        for piece in task_pieces:
            holders[piece].append(position)
    best: dict[tuple[int, str], tuple[float, int]] = {}
    for source, texts in questions.items():
        for row, text in enumerate(texts, start=1):
            known = pieces(text)
            common = Counter(position for piece in known & holders.keys() for position in holders[piece])
            for position, count in common.items():
                similarity = count / (len(known) + len(wanted[position]) - count)
                if similarity >= max(NEAR_DUPLICATE, best.get((position, source), (0.0,))[0]):
                    best[position, source] = (similarity, row)
    return [
        {"task_id": tasks[position]["task_id"], "source": source, "row": row, "similarity": round(similarity, 3)}
        for (position, source), (similarity, row) in sorted(best.items())
    ]


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Number of values, mean and 95 % interval: percentiles of 9,999 bootstrap resamples, always the same ones.

    mean is None without values, low and high are None below two.
    """
    from scipy.stats import bootstrap

    low = high = None
    if len(values) > 1:
        low, high = map(float, bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval)
    return {"tasks": len(values), "mean": float(np.mean(values)) if values else None, "low": low, "high": high}


def summarize_scores(per_task: Sequence[Mapping[str, Any]], without: Iterable[Any] = ()) -> dict[str, dict[str, Any]]:
    """`mean_interval` of every measure that has a value, over all tasks but those with a task_id in `without`."""
    without = set(without)
    kept = [scores for scores in per_task if scores["task_id"] not in without]
    values = {name: [scores[name] for scores in kept if scores.get(name) is not None] for name in MEASURES}
    return {name: mean_interval(found) for name, found in values.items() if found}


def digest_tasks(tasks: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of tasks and references: runs are comparable only where it is the same."""
    return digest([[task["task_id"], task["input"], reference_of(task)] for task in tasks])


# --------------------------------------------------------------------------------------------------------------------
# 6. The door to the rooms
# --------------------------------------------------------------------------------------------------------------------

ROOMS = ("answers", "attention", "chat", "checkpoints", "decoding", "files", "formats", "gguf", "hub", "judge")
ROOMS += ("kept_layers", "lora", "machine", "models", "parameters", "records", "reports", "retrieval", "slots")
ROOMS += ("training",)

if TYPE_CHECKING:  # for editors
    from engine import answers, attention, chat, checkpoints, decoding, files, formats, gguf, hub, judge  # noqa: F401

    # isort: split
    from engine import kept_layers, lora, machine, models, parameters, records, reports, retrieval  # noqa: F401

    # isort: split
    from engine import slots, training  # noqa: F401


def __getattr__(name: str) -> ModuleType:
    """The room `name`: a machine that reads, writes, loads, trains or asks."""
    if name not in ROOMS:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return importlib.import_module(f"engine.{name}")
