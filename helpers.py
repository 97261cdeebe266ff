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

import ast
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
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain, cycle, groupby, islice
from numbers import Number
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np


def shown(text: str) -> str:
    """Text from elsewhere on one line: control and invisible characters, such as terminal escapes, become \\x1b etc."""
    hidden = ("C", "Zl", "Zp")  # categories of Unicode
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c).startswith(hidden) else c for c in text
    )


class RecipeError(ValueError):
    """An error that the user can fix: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(shown(str(message)))


NETWORK = ("httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3", "aiohttp", "openai")


def find_cause(error: BaseException) -> tuple[BaseException | None, int | None]:
    """The error of a network library behind a library's error, and the HTTP status of a server's answer, or None."""
    behind: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(behind) < 20:
        behind.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in behind:
        if isinstance(status := getattr(getattr(cause, "response", None), "status_code", None), int):
            return cause, status
    return next((cause for cause in behind if type(cause).__module__.partition(".")[0] in NETWORK), None), None


def first_line(error: Exception) -> str:
    """Kind and first line of a library's error, at most 120 characters: what fits into a RecipeError.

    Of an error of the network it is kind and status alone: a server may repeat what it was sent, a token included.
    """
    cause, status = find_cause(error)
    if cause is not None:
        return type(cause).__name__ + (f", HTTP {status}" if status else "")
    return shown(f"{type(error).__name__}: {error}".splitlines()[0][:120])


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold; the order of a dictionary's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- 1. Rows --------------------------------------------------------------------------------------------------------

# The forms of rows. The texts stand in a list of turns (with role and content, or other names for them), or the
# question, further text that belongs to it, and the answer stand in columns of their own. The names in MORE_ say less:
# they count only where none of the others is there. Names of columns may be capitalised.
CHATS, MORE_CHATS = ("conversations", "messages", "conversation"), ("utterances", "turns")
QUESTIONS, MORE_QUESTIONS = ("instruction", "question", "prompt", "input"), ("problem", "inputs", "query", "text")
CONTEXTS = ("input", "context")
ANSWERS, MORE_ANSWERS = ("response", "output", "answer", "completion"), ("solution", "targets", "target")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
PARTS = ("text", "input_text", "output_text")
TURN_KEYS = {"role": ("from", "speaker", "name"), "content": ("value", "text")}
# The keys of a turn that holds a question and its answer, in the order of the turns that it becomes.
SIDES = {"system": "system", "human": "user", "user": "user", "input": "user"}
SIDES |= dict.fromkeys(("assistant", "gpt", "output"), "assistant")


def read_turn(turn: Any) -> Any:
    """A turn with the keys role ("user", "assistant" or others) and content, whatever it calls them."""
    if not isinstance(turn, dict):
        return turn
    for key, others in () if "role" in turn and "content" in turn else TURN_KEYS.items():
        if key not in turn and (used := next((name for name in others if name in turn), "")):
            turn = {key if name == used else name: value for name, value in turn.items()}
            if key == "role" and isinstance(turn["role"], str):
                turn["role"] = turn["role"].lower()
    if "role" in turn and turn["role"] not in ("user", "assistant"):
        turn = turn | {"role": ROLES.get(turn["role"], turn["role"]) if isinstance(turn["role"], str) else ""}
    parts = turn.get("content")  # OpenAI's form: [{"type": "text", "text": ...}, ...]
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") in PARTS for p in parts):
        texts = [part.get("text") for part in parts]
        turn = turn | {"content": "\n".join(texts)} if all(isinstance(text, str) for text in texts) else turn
    return turn


def has_role(turn: Any) -> bool:
    """Whether what `read_turn` returns is a turn."""
    return isinstance(turn, dict) and "role" in turn


def read_turns(value: Any) -> list[Any] | None:
    """The turns in a column, which is a list, a dictionary of lists, or either as text of JSON or Python; else None."""
    for read in (json.loads, ast.literal_eval) if isinstance(value, str) else ():
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(value) if isinstance(value, str) else value
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        with suppress(ValueError):  # as datasets stores a Sequence
            value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        return None
    turns = list(map(read_turn, value))
    if any(isinstance(turn, dict) and "role" not in turn for turn in turns):
        turns = [part for turn in turns for part in split_turn(turn)]
    return turns


def split_turn(turn: Any) -> list[Any]:
    """The turns in one that holds question and answer (of ms-swift: {"human": ..., "assistant": ...}), else itself."""
    sides = {name: side for name, side in SIDES.items() if turn.get(name)} if isinstance(turn, dict) else {}
    both = not has_role(turn) and {"user", "assistant"} <= set(sides.values())
    return [{"role": side, "content": turn[name]} for name, side in sides.items()] if both else [turn]


class Parsed(NamedTuple):
    """A row whose form was read."""

    row: dict[str, Any]
    columns: tuple[str, ...]  # those that hold its texts; () if the form is unknown
    turns: list[Any]  # see `read_turn`


def read_chat(row: dict[str, Any], names: Iterable[str]) -> Parsed:
    """A row with the first of these columns that holds turns, or an empty list only if there is no better one."""
    chats = {name: turns for name in names if name in row and (turns := read_turns(row[name])) is not None}
    name = next((name for name, turns in chats.items() if turns), next(iter(chats), ""))
    turns = chats.get(name, [])
    if name == "turns" and all(isinstance(turn, str) for turn in turns):  # MT-bench: questions, and answers to some
        answers = [*(read_turns(row.get("reference")) or []), *[None] * len(turns)]
        turns = _alternating(text for pair in zip(turns, answers, strict=False) for text in pair)
    return Parsed(row, (name,) if chats else (), turns)


def _alternating(texts: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), texts, strict=False)]


def parse_row(row: dict[str, Any], columns_first: bool = False) -> Parsed:
    """A row with its form. Of a list of turns and columns with question and answer the list is taken, or with
    `columns_first` the columns.
    """
    chat = read_chat(row, CHATS)
    if chat.columns and not columns_first:
        return chat

    lower = {name: name if chat.columns else str(name).lower() for name in row}  # names beside turns are exact

    def first(names: tuple[str, ...]) -> tuple[str, ...]:  # a column that is null only if there is no better one
        known = [name for name in row if lower[name] in names]
        found = [(row[name] is None, name not in names, names.index(lower[name]), name) for name in known]
        return (min(found)[3],) if found else ()

    question, answer = first(QUESTIONS), first(ANSWERS)
    if not chat.columns:
        if not question and (chat := read_chat(row, MORE_CHATS)).columns:
            return chat
        answer = first(ANSWERS + MORE_ANSWERS)
        question = first(QUESTIONS + (MORE_QUESTIONS if answer else MORE_QUESTIONS[:-1]))  # text alone asks nothing
    if not question or (chat.columns and (not answer or row[answer[0]] is None)):
        return chat
    # A row that has a conversation as well is one of notebook 2, whose instruction is already the whole question.
    capitalised = not question[0].islower()
    contexts = [n for c in CONTEXTS for n in row if n == c or (capitalised and isinstance(n, str) and n.lower() == c)]
    contexts = [n for n in contexts if n not in question and (row[n] or is_number(row[n]))]
    context = () if chat.columns else tuple(contexts)
    parts = [row[question[0]], *(str(row[name]) if is_number(row[name]) else row[name] for name in context)]
    wrong = [part for part in parts if not isinstance(part, str)]
    texts = [wrong[0] if wrong else "\n".join(filter(None, parts))]
    texts += [str(row[name]) if is_number(row[name]) else row[name] for name in answer]
    columns, history = question + context + answer, row.get("history")
    if isinstance(history, list) and history:  # the turns before, as LLaMA-Factory stores them: a list of pairs
        texts = [text for pair in history if isinstance(pair, list) for text in pair[:2]] + texts
        columns += ("history",)
    return Parsed(row, columns, _alternating(texts))


def first_pair(turns: Sequence[Mapping[str, Any]]) -> tuple[list[int], int | None]:
    """Where the first question (one user turn, or several before an answer) and the answer to it stand in `turns`."""
    asked: list[int] = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and asked:
            return asked, number
        asked += [number] if turn["role"] == "user" else []
    return asked, None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number: its digits are what is meant where a text is wanted."""
    return isinstance(value, Number) and not isinstance(value, (bool, complex)) and math.isfinite(value)


def show(table: Any, longest: int = 200) -> Any:
    """A pandas DataFrame for the reader: text at the left, its HTML as text, cut at `longest` characters; 3 digits."""
    table = table.map(
        lambda value: f"{value[:longest]} …" if isinstance(value, str) and len(value) > longest else value
    )
    left = [{"selector": "th, td", "props": "text-align: left; white-space: pre-wrap"}]
    return table.style.format(escape="html", precision=3).set_table_styles(left)


# --- 2. Filter ------------------------------------------------------------------------------------------------------

# What can be wrong with a row, in the order in which it is asked.
REASONS = (
    "malformed",  # conversations is not a list of {"role", "content"} with text in it
    "missing turn",  # no user turn, or no assistant turn
    "empty",  # a field holds nothing but white space
    "ng string",  # a string of the NG list
    "rare character",  # a character that the whole data set hardly uses
    "foreign character",  # a character that Japanese text does not use, see `is_japanese`
    "pattern",  # a regular expression of the rules file; its name takes the place of this word
    "loop",  # the same text again and again, see `repeated_text`
    "repeats the question",  # see `repeats_question`
    "unreadable",  # a control character or half a surrogate pair: cld2 or UTF-8 refuses it
    "not Japanese",  # cld2 finds too little Japanese, and its script does not decide either
    "duplicate",  # an earlier row has the same texts, see `row_key`
    "rare afterwards",  # a character that the rows kept so far hardly use
)
ALONE = ("malformed", "missing turn", "empty", "unreadable", "not Japanese", "duplicate")  # no other rule is asked then
LISTED = ("ng string", "rare character", "foreign character")  # the report counts these by what was matched
Problem = tuple[str, str, str]  # (reason, field, matched string)
_MARKERS = " \u3000\t0123456789０１２３４５６７８９.．)）、,・-*#>|：:①②③④⑤⑥⑦⑧⑨⑩"  # before a line of a list
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class FilterRules:
    """The whole filter, with 2024's numbers and switches as defaults; `rules.load` reads and checks a file."""

    replacements: Sequence[tuple[str, str]]  # (old, new): applied one after the other to every text
    ng: Sequence[str]  # a row that holds one of these strings is dropped
    # Regular expressions by name, for "text" of any kind, for a "question" (turns of the user) or for an "answer"
    patterns: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    rare_below: int = 20  # drop rows with a character that occurs fewer times than this in all rows; 0 is off
    rare_after_below: int = 10  # the same once more, counted over the rows that passed all other rules; 0 is off
    japanese_percent: int = 60  # the least share of Japanese, in percent of bytes, that cld2 must find in each text
    japanese_characters: bool = False  # drop rows with a character that Japanese text does not use (`is_japanese`)
    characters_also: str = ""  # characters that `japanese_characters` lets pass nevertheless
    all_turns: bool = False  # judge every turn, not only the first question and the first answer
    clean_conversations: bool = False  # apply the replacements to the column `conversations`, too
    plain_looks: bool = False  # write what only looks different in its plain form, see LOOKS: か + ゛ becomes が
    plain_text: bool = False  # let cld2 read every character; without, it takes the text for HTML and skips tags
    script_decides: bool = False  # ask cld2 only where kana do not decide (`mostly_kana`, `japanese_by_script`)
    loops: bool = False  # drop rows with an answer that repeats itself
    echoes: bool = False  # drop rows with an answer that repeats the question
    duplicates: bool = False  # drop rows with the texts of an earlier row

    def normal(self, text: str) -> str:
        """The text in the form in which it is judged. Unicode's NFC as a whole would rewrite kanji of names, too."""
        if self.plain_looks and ANY_LOOKS.search(text):
            text = re.sub("[ぁ-ヿ][\u3099\u309a]", lambda kana: unicodedata.normalize("NFC", kana[0]), text)
            text = text.translate(LOOKS)
        return text


# What only looks different, and its plain form: spaces of other widths; hyphens that do not break; what cannot be seen;
# kanji drawn as radicals or for compatibility, ligatures, letters as mathematical signs.
LOOKS = dict.fromkeys((0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F), " ")
LOOKS |= {0xF06C: "●", 0xF06E: "■", 0xF0A7: "■", 0xF0B7: "・"}  # bullets of Word's symbol fonts
LOOKS |= {0xB5: "μ", 0x2010: "-", 0x2011: "-", 0x2028: "\n", 0x2029: "\n", 0xAD: "", 0x20E3: "", 0xFEFF: ""}
for start, end in ((0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF)):
    LOOKS |= dict.fromkeys(range(start, end + 1), "")
for code in (*range(0x2F00, 0x2FD6), *range(0xF900, 0xFADA), *range(0xFB00, 0xFB07), *range(0x1D400, 0x1D800)):
    if not chr(code).encode("cp932", "ignore"):  # 神 and others that Japanese Windows writes stay: names need them
        LOOKS[code] = unicodedata.normalize("NFKC", chr(code))
ANY_LOOKS = re.compile(f"[\u3099\u309a{''.join(chr(code) for code in LOOKS if code < 2**16)}\U00010000-\U0010ffff]")


@cache
def is_japanese(character: str) -> bool:
    """Whether Japanese text uses a character: Japanese Windows writes it (but Cyrillic), it is a kanji, a kana or a
    sign of the standard JIS X 0213, a Latin letter of Western Europe, or a common sign that is no emoji: punctuation,
    mathematics, currencies, numbers such as ² and ₂, arrows, shapes.
    """
    if character.encode("cp932", "ignore") and not "\ue000" <= character <= "\uf8ff":  # not its private use
        return not "Ѐ" <= character <= "ӿ"
    jis, category = len(character.encode("euc_jis_2004", "ignore")) > 1, unicodedata.category(character)
    if category[0] == "L":
        western = "À" <= character <= "ÿ" or character in "Œœ"
        return western or (jis and category == "Lo") or "\u2070" <= character <= "\u2138"
    if category == "So":  # of pictures only those that the standard knows
        return jis or ("\u2190" <= character <= "\u25ff" and unicodedata.east_asian_width(character) != "W")
    common = any(low <= character <= high for low, high in ("\xa0÷", "\u2000\u2bff", "\u3000\u33ff", "︰\uffef"))
    return common and category[0] in "SPN" and category != "Nl"


def any_expression(expressions: Iterable[str]) -> list[re.Pattern]:
    """Patterns one of which finds something if one of the expressions does; joining those that begin with an ordinary
    character, or at the beginning, is fast. None of them holds | outside brackets, see `engine/rules.py`.
    """
    joined, others = defaultdict(lambda: defaultdict(list)), []
    for expression in expressions:
        if first := re.match(r"(\\[An]|\\\W|[^\\\[\](){}.^$*+?|])(?![*?+{])", expression):
            joined[r"\A" if first[0] == r"\A" else first[0].isascii()][first[0]].append(expression[first.end() :])
        else:
            others.append(expression)
    both = ("|".join(f"{first}(?:{'|'.join(rest)})" for first, rest in after.items()) for after in joined.values())
    return [re.compile(expression) for expression in (*both, *others) if expression]


def any_character(characters: Iterable[str]) -> re.Pattern:
    """A pattern for these characters and for all beyond U+FFFF (emoji, rare kanji), which the caller looks up: a class
    of many would be slow.
    """
    basic = "".join(character for character in characters if character <= "\uffff")
    return re.compile(f"[{re.escape(basic)}\U00010000-\U0010ffff]")


def row_texts(parsed: Parsed, rules: FilterRules) -> tuple[dict[str, str], Problem | None]:
    """The texts of a row by field, and what is wrong with its form; a malformed row has no texts.

    `instruction` is the first user turn and `response` the first assistant turn, as in 2024, "" where missing. With
    `all_turns` they are the first question and the answer after it, and what else people and model say follows as
    "turn N (role)", counted from 1.
    """
    if not parsed.columns:
        return {}, ("malformed", "conversations", type(parsed.row.get("conversations")).__name__)
    asked, answered = first_pair(parsed.turns) if rules.all_turns and all(map(has_role, parsed.turns)) else ([], None)
    texts: dict[str, str] = {}
    for number, turn in enumerate(parsed.turns, start=1):
        if not has_role(turn):
            return {}, ("malformed", f"turn {number}", type(turn).__name__)
        field, content = {"user": "instruction", "assistant": "response"}.get(turn["role"]), turn.get("content")
        if rules.all_turns:
            if turn["role"] not in ("system", "user", "assistant") or (content is None and turn.get("tool_calls")):
                continue  # a tool speaks, or one is called
            if number - 1 not in (*asked, answered):
                field = f"turn {number} ({turn['role']})"
        elif field is None or field in texts:
            continue
        if not isinstance(content, str):
            return {}, ("malformed", field, type(content).__name__)
        texts[field] = "\n".join([texts[field], rules.normal(content)]) if field in texts else rules.normal(content)
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
        np.add.at(counts, np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), np.uint32), 1)
    return counts


def rare_characters(counts: np.ndarray, limit: int) -> str:
    """The characters that occur, but fewer times than `limit`, in the order of their code points."""
    return "".join(map(chr, np.flatnonzero((counts > 0) & (counts < limit)).tolist()))


def replace_strings(text: str, rules: FilterRules) -> str:
    """The text after the replacements, one after the other: a later one sees what an earlier one wrote."""
    for old, new in rules.replacements:
        if old in text:
            text = text.replace(old, new)
    return text


class Forbidden:
    """What no text may hold, ready to be searched for: NG strings, `rare` characters, foreign ones, and patterns."""

    def __init__(self, rules: FilterRules, rare: str = "") -> None:
        self.strings = [string for string in dict.fromkeys(rules.ng) if len(string) > 1]
        self.any_string = any_expression(map(re.escape, self.strings))
        single = [string for string in rules.ng if len(string) == 1]
        self.reason_of = {**dict.fromkeys(rare, "rare character"), **dict.fromkeys(single, "ng string")}
        self.other_reason = "foreign character" if rules.japanese_characters else None
        self.any_character = any_character(self.reason_of)
        if rules.japanese_characters:
            allowed = set(filter(is_japanese, map(chr, (*range(0x10000), *range(0x20000, 0x2A6E0)))))
            allowed = (allowed | set(rules.characters_also)) - self.reason_of.keys()
            self.any_character = re.compile(f"[^{re.escape(''.join(allowed))}]")
        self.patterns, self.any_pattern = {}, {"text": []}
        for scope in ("text", "question", "answer"):
            own, shared = rules.patterns.get(scope, {}), rules.patterns.get("text", {})
            self.patterns[scope] = {name: any_expression(parts) for name, parts in {**shared, **own}.items()}
            self.any_pattern[scope] = self.any_pattern["text"] + any_expression(chain(*own.values()))


def scope_of(place: str) -> str:
    """Which patterns a field is judged by: those of "question", "answer" or, for a system turn, "text"."""
    if place == "instruction" or place.endswith("(user)"):
        return "question"
    return "answer" if place == "response" or place.endswith("(assistant)") else "text"


def find_forbidden(texts: Mapping[str, str], forbidden: Forbidden) -> list[Problem]:
    """(reason, field, matched string) of everything forbidden in the texts of a row: first strings and characters."""
    found, reason_of, matches = [], forbidden.reason_of, []
    for place, text in texts.items():
        if any(pattern.search(text) for pattern in forbidden.any_string):
            found += [("ng string", place, string) for string in forbidden.strings if string in text]
        if characters := forbidden.any_character.findall(text):
            reasons = [(reason_of.get(c, forbidden.other_reason), c) for c in sorted(set(characters))]
            found += [(reason, place, _shown(character)) for reason, character in reasons if reason]
        scope = scope_of(place)
        if any(pattern.search(text) for pattern in forbidden.any_pattern[scope]):
            for name, patterns in forbidden.patterns[scope].items():
                matches += [(name, place, match[0]) for p in patterns if (match := p.search(text))][:1]
    return sorted(found, key=lambda problem: REASONS.index(problem[0])) + matches if found else matches


def _shown(character: str) -> str:
    return f"U+{ord(character):04X}" if "\ud800" <= character <= "\udfff" else character  # half a surrogate pair


def repeated_text(text: str) -> str:
    """What a text repeats, or "": a piece four times in a row (`has_loop`); a line or sentence three times in a row, or
    four times in all and a third of the text, whatever number or bullet stands before it; words between commas four
    times in a row; a few characters six times at the end. Or at least half of its lines and sentences are repetitions.
    """
    for start in range(0, len(text) - 30, 20):  # a loop holds one of these pieces twice
        again = text.find(text[start : start + 10], start + 1, start + 110)
        piece = text[start:again] if again > 0 else ""
        if any(map(str.isalnum, piece)) and 3 * piece in text and has_loop(text[max(0, start - 400) : start + 500]):
            return piece
    parts = [part for line in text.replace("。", "\n").split("\n") if (part := line.strip(_MARKERS))]
    if len(different := set(parts)) < len(parts) - 1:
        for part, times in Counter(parts).most_common(2):
            if times > 3 and 3 * times * len(part) > len(text) and sum(map(str.isalpha, part)) > 2:
                return part
        if len(parts) > 7 and 2 * len(different) <= len(parts):
            return parts[-1]
    end, words = text.rstrip("。、！？!? \n"), text.replace("。", "、").replace("\n", "、").split("、")
    for pieces, times, shortest in ((parts, 3, 8), (words, 4, 2)):
        for part, run in groupby(pieces) if len(pieces) - len(set(pieces)) >= times - 1 else ():
            if len(part) >= shortest and any(map(str.isalpha, part)) and len(list(run)) >= times:
                return part
    return next((end[-n:] for n in range(2, 9) if end[-n:].isalpha() and end.endswith(6 * end[-n:])), "")


def repeats_question(texts: Mapping[str, str]) -> bool:
    """Whether the first answer is the question or holds it whole: to its end mark, or as its first line or sentence."""
    question, answer = "".join(texts["instruction"].split()), texts["response"].strip()
    asked = question.rstrip("。") if question.endswith(("ください。", "でしょうか。", "なさい。")) else question
    whole = len(question) >= 8 and question[-1] in "。？?" and asked in "".join(answer.split())
    parts = (answer, *(re.split(end, answer, maxsplit=1)[0] for end in ("\n", "[。？?！!\n]") if len(question) >= 8))
    bare = [re.sub(r"[\W_]", "", text[: 2 * len(question)]) for text in (question, *parts)]
    return whole or bare[0] in bare[1:]


def japanese_by_script(text: str) -> bool:
    """Whether a text is Japanese by its letters: kana enough for a sentence, or few letters: up to 20 kanji, and eight
    Latin words, more of them with a capital (names) than without.
    """
    kana = len(re.findall("[ぁ-ヿｦ-ﾟ]", text))
    kanji = len(re.findall("(?![一二三四五六七八九十百千万])[々〇一-鿿]", text))  # without numerals
    words = re.findall(r"(?<![A-Za-zÀ-ÖØ-öø-ÿ])[A-Za-zÀ-ÖØ-öø-ÿ]{2}[^\s、。,]*", unicodedata.normalize("NFKC", text))
    lower = sum(word[0].islower() for word in words)
    names = len(words) <= 8 and lower <= max(1, len(words) - lower - 1)
    if kana:
        return (names or lower <= kana + kanji) and (kana + kanji <= 20 or 5 * kana >= kanji)
    return kanji <= 20 and names and any(unicodedata.category(character)[0] in "LNS" for character in text)


def mostly_kana(text: str) -> bool:
    """Whether at least two fifths of a text's bytes are kana, which no other language writes; half-width ones aside."""
    written = text.encode("utf-8", "surrogatepass")
    return 15 * sum(map(written.count, (b"\xe3\x81", b"\xe3\x82", b"\xe3\x83"))) >= 2 * len(written)


def not_japanese(texts: Mapping[str, str], rules: FilterRules) -> list[Problem]:
    """[(reason, field, what was found)] of the first text that cld2 cannot read or finds too little Japanese in; or [].
    A later turn too short for cld2 to name its language ("はい。") passes, with `script_decides` each short text.
    """
    import pycld2

    for place, text in texts.items():
        if rules.script_decides and mostly_kana(text) and not _UNREADABLE.search(text):
            continue
        try:
            languages = pycld2.detect(text, isPlainText=rules.plain_text)[2]
        except (pycld2.error, UnicodeEncodeError) as error:
            unreadable = _UNREADABLE.search(text)
            return [("unreadable", place, f"U+{ord(unreadable.group()):04X}" if unreadable else str(error))]
        if not any(code == "ja" and share >= rules.japanese_percent for _, code, share, _ in languages):
            short = place.startswith("turn") and languages[0][1] == "un"
            if not (japanese_by_script(text) if rules.script_decides else short):
                shares = ", ".join(f"{code} {share} %" for _, code, share, _ in languages if share)
                return [("not Japanese", place, shares)]
    return []


def row_key(texts: Mapping[str, str]) -> bytes:
    """A fingerprint of the texts of a row, the same for all that differ in white space alone."""
    joined = "\0".join("".join(text.split()) for text in texts.values())
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_problems(texts: Mapping[str, str], rules: FilterRules, forbidden: Forbidden) -> list[Problem]:
    """Why a row with these texts (after the replacements) is dropped: everything forbidden in them, or else their
    language (cld2 is slow, and its percentage overlooks a short foreign tail); [] keeps the row.
    """
    found = find_forbidden(texts, forbidden)
    for place, text in texts.items():
        if rules.loops and scope_of(place) == "answer" and (part := repeated_text(text)):
            found.append(("loop", place, part))
    if rules.echoes and repeats_question(texts):
        found.append(("repeats the question", "response", texts["instruction"]))
    return found or not_japanese(texts, rules)


# What `row_texts` finds; and the number of a row from 1, the row, its texts as judged.
RowTexts = tuple[dict[str, str], Problem | None]
Passed = tuple[int, Parsed, dict[str, str]]


def judge_rows(
    rows: Iterable[Parsed], texts_of: Iterable[RowTexts], rules: FilterRules, rare: str, seen: set[bytes]
) -> tuple[list[Passed], list[dict[str, Any]], dict[tuple[str, str], list[int]]]:
    """Apply every rule but the last to the rows, each with what `row_texts` found; `rare` characters are forbidden, and
    with `duplicates` rows whose `row_key` is in `seen`, to which theirs are added.

    Returns the rows that passed, the dropped ones (see `dropped_record`), and for each (reason, match) how many rows
    hold it and how many of them no other rule would have dropped. Only strings and characters are counted by match.
    """
    forbidden = Forbidden(rules, rare)
    passed, dropped, hits = [], [], defaultdict(lambda: [0, 0])
    for number, (row, (given, malformed)) in enumerate(zip(rows, texts_of, strict=True), start=1):
        texts = {field: replace_strings(text, rules) for field, text in given.items()}
        problems = [malformed] if malformed else find_problems(texts, rules, forbidden)
        if rules.duplicates and not malformed:
            key = row_key(texts)
            problems = problems or [("duplicate", "instruction", "")] * (key in seen)
            seen.add(key)
        if not problems:
            passed.append((number, row, texts))
            continue
        broken = list(dict.fromkeys((why, m if why in LISTED else "") for why, _, m in problems if why not in ALONE))
        only = len(broken) == 1 and not not_japanese(texts, rules)
        for rule in broken:
            hits[rule][0] += 1
            hits[rule][1] += only
        dropped.append(dropped_record(number, problems[0], row.row, [match or why for why, match in broken[1:]]))
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
    passed, dropped, hits = judge_rows(progress(rows), texts_of, rules, rare, set())

    counts_after = count_characters(texts for _, _, texts in passed)
    rare_after = rare_characters(counts_after, rules.rare_after_below)
    passed, late = drop_rare_afterwards(passed, rare_after)
    kept = [written_row(row, texts, rules) for _, row, texts in passed]
    dropped = sorted(dropped + late, key=lambda record: record["number"])
    report = {
        "settings": asdict(rules),
        **filter_counts(rules, len(rows), len(kept), Counter(record["reason"] for record in dropped)),
        "rules": [
            {"reason": reason, "match": match, "rows": held, "only": only}
            for (reason, match), (held, only) in sorted(hits.items(), key=lambda rule: (-rule[1][1], -rule[1][0]))
        ],
        "rare_characters": {_shown(character): int(counts[ord(character)]) for character in rare},
        "rare_afterwards": {character: int(counts_after[ord(character)]) for character in rare_after},
    }
    return kept, dropped, report


def filter_counts(rules: FilterRules, rows_in: int, rows_kept: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    """The counts of a filter's report, with the rows left after each step; AssertionError if a row were lost."""
    rows_dropped = sum(reasons.values())
    assert rows_in == rows_kept + rows_dropped, f"{rows_in} rows in, {rows_kept} kept, {rows_dropped} dropped"
    names = [name for named in rules.patterns.values() for name in named]
    order = [name for reason in REASONS for name in (names if reason == "pattern" else [reason])]
    reasons = {reason: reasons[reason] for reason in order if reasons.get(reason)}
    left = rows_in - np.cumsum([0, *reasons.values()])
    return {
        "rows_in": rows_in,
        "rows_kept": rows_kept,
        "rows_dropped": rows_dropped,
        "reasons": reasons,
        "funnel": [{"step": step, "rows": int(rows)} for step, rows in zip(("rows in", *reasons), left, strict=True)],
    }


# --- 3. Fine-tune ---------------------------------------------------------------------------------------------------

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


# --- 4. Answer ------------------------------------------------------------------------------------------------------

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


# --- 5. Score -------------------------------------------------------------------------------------------------------

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


# --- 6. The door to the rooms ---------------------------------------------------------------------------------------

ROOMS = ("answers", "architectures", "attention", "chat", "checkpoints", "decoding", "files", "folders", "formats")
ROOMS += ("forms", "gguf", "hub", "judge", "kept_layers", "likelihood", "lora", "machine", "models", "outlook")
ROOMS += ("parameters", "reading", "records", "reports", "retrieval", "rows", "rules", "shapes", "slots", "training")
ROOMS += ("travel", "trial")

if TYPE_CHECKING:  # for editors
    # fmt: off
    from engine import (  # noqa: F401, I001
        answers, architectures, attention, chat, checkpoints, decoding, files, folders, formats, forms, gguf, hub,
        judge, kept_layers, likelihood, lora, machine, models, outlook, parameters, reading, records, reports,
        retrieval, rows, rules, shapes, slots, training, travel, trial,
    )
    # fmt: on


def __getattr__(name: str) -> ModuleType:
    """The room `name`: a machine that reads, writes, loads, trains or asks."""
    if name not in ROOMS:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return importlib.import_module(f"engine.{name}")
