"""The rules of the filter, read from a file and checked."""

from __future__ import annotations

import json
import re
import unicodedata
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from engine.parameters import ANY_TEXT, MANY, SWITCH, Text, wrong_values
from helpers import REASONS, FilterRules, RecipeError, first_line

SCOPES = ("text", "question", "answer")
# What the values of a rules file may be, beside its lists and patterns.
RULES: dict[str, list | range | Text] = {
    **dict.fromkeys(("rare_below", "rare_after_below"), range(MANY)),
    "japanese_percent": range(101),
    "characters_also": ANY_TEXT,
    **dict.fromkeys(("all_turns", "clean_conversations", "plain_looks", "plain_text", "script_decides"), SWITCH),
    **dict.fromkeys(("japanese_characters", "loops", "echoes", "duplicates"), SWITCH),
}


def load(path: str | Path) -> FilterRules:
    """The rules in a JSON file with all fields of FilterRules and perhaps `source`; RecipeError names the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        values.pop("source", None)
        known = [field.name for field in fields(FilterRules)]
        if keys := values.keys() ^ set(known):
            raise RecipeError(f"unknown or missing key {', '.join(sorted(keys))}; its keys are {', '.join(known)}")
        for name, wanted in {**wrong_values(values, RULES), **wrong_lists(values)}.items():
            raise RecipeError(f"{name} is {str(values[name])[:60]!r}; it must be {wanted}")
        if values["plain_looks"]:  # a string in another Unicode form than the texts would never be found in them
            values |= {name: composed(values[name]) for name in ("ng", "replacements", "patterns")}
        check_patterns(values["patterns"])
        values["patterns"] = {
            scope: {name: list(chain(*map(spelled_out, parts))) for name, parts in named.items()}
            for scope, named in values["patterns"].items()
        }
        return FilterRules(**values)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        problem = error if isinstance(error, RecipeError) else f"it holds no rules ({first_line(error)})"
        raise RecipeError(f"{path}: {problem}") from None


def wrong_lists(values: dict[str, Any]) -> dict[str, str]:
    """Which of the two lists are none, and what they must be."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    wrong, pairs = {}, values["replacements"]
    if not texts(values["ng"]) or "" in values["ng"]:  # an empty string is in every text
        wrong["ng"] = "a list of strings, none of them empty"
    if not isinstance(pairs, list) or not all(texts(pair) and len(pair) == 2 and pair[0] for pair in pairs):
        wrong["replacements"] = "a list of pairs of strings [old, new], in which old is not empty"
    return wrong


def composed(value: Any) -> Any:
    """A value with its strings in Unicode NFC, where an editor saved accents and voice marks of their own.

    Others stay: NFC would turn a name's kanji in the rules, such as 神 (U+FA19), into the ordinary one.
    """
    if isinstance(value, dict):
        return {name: composed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [composed(part) for part in value]
    return unicodedata.normalize("NFC", value) if any(map(unicodedata.combining, value)) else value


def check_patterns(patterns: dict[str, dict[str, list[str]]]) -> None:
    """RecipeError for patterns that cannot be used; their expressions are joined by |, hence the limits."""
    for scope, named in patterns.items():
        for name, parts in named.items():
            if scope not in SCOPES or name in REASONS or not isinstance(parts, list):
                wanted = f"lists of regular expressions by name, under {', '.join(SCOPES)}; a reason's name is taken"
                raise RecipeError(f"patterns, {scope[:60]!r}, {name[:60]!r}: it must be {wanted}")
            for part in parts:
                if not usable(part):
                    wanted = "a regular expression that matches something, captures nothing and holds | in (?:...) only"
                    raise RecipeError(f"patterns, {name[:60]!r}: {part[:60]!r} must be {wanted}")


@cache
def usable(expression: str) -> bool:
    """Whether a regular expression can be joined with others by |."""
    outside = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", expression)
    while outside != (outside := re.sub(r"\([^()]*\)", "", outside)):
        pass
    with suppress(re.error, OverflowError, RecursionError):
        pattern = re.compile(f"(?:{expression})")
        return "|" not in outside and not pattern.groups and not pattern.match("")
    return False


def spelled_out(expression: str) -> list[str]:
    """A usable regular expression as several without a choice at its beginning, which are found much faster (see
    `helpers.any_expression`): `(?:a|b)c` as `ac` and `bc`, `[ab]c` likewise.
    """
    if found := re.match(r"\(\?:([^()\[\]\\]+)\)(?![?*+{])", expression):
        choices = found[1].split("|")
    elif found := re.match(r"\[([^\[\]\\^-]{1,8})\](?![?*+{])", expression):
        choices = [re.escape(character) for character in found[1]]
    else:
        return [expression]
    return [one for choice in choices for one in spelled_out(choice + expression[found.end() :])]
