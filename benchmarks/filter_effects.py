"""What each rule of the filter catches, and what it costs, on data whose contamination is known.

    python benchmarks/filter_effects.py ROWS.jsonl

Every row names its contamination in the column `mix` ("clean" for none). A bad row counts as dealt with if it is
dropped, or if it is kept without its contamination: in NFC, or with ♪ and 😢 removed. Prints three Markdown tables: the
rules of 2024, each improved rule added alone, and the reviewed rules file; the reviewed rules with one decision undone,
also for the rows with even and with odd numbers, because a rule that helps in one half only is made for this file; and
every kind of contamination.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers  # noqa: E402

OLD, NEW = (helpers.files.load_rules(ROOT / f"data/filter_rules_{name}.json") for name in ("2024", "reviewed"))
# fullwidth letters and a system turn are no fault; a second turn is one only if it is foreign
GOOD = ("clean", "fullwidth", "system")
RULES = {
    "2024": OLD,
    "+ reviewed lists": replace(OLD, replacements=NEW.replacements, ng=NEW.ng),
    "+ rare characters off": replace(OLD, rare_below=0, rare_after_below=0),
    **{
        f"+ `{name}`": replace(OLD, **{name: True})
        for name in ("all_turns", "clean_conversations", "compose_kana", "plain_text", "cp932_only")
    },
    "+ `cp932_only` and `cp932_also`": replace(OLD, cp932_only=True, cp932_also=NEW.cp932_also),
    "reviewed": NEW,
}
LANGUAGES = tuple(string.removesuffix("で") for string in NEW.ng if string.endswith("語で"))
KANJI = "".join(character for character in NEW.cp932_also if character >= "\u4e00")


def without(wanted: Callable[[str], bool]) -> helpers.FilterRules:
    """The reviewed rules without the NG strings for which `wanted` is true."""
    return replace(NEW, ng=tuple(string for string in NEW.ng if not wanted(string)))


DECISIONS = {
    "reviewed": NEW,
    "with every mention of a language (ドイツ語)": replace(NEW, ng=NEW.ng + LANGUAGES),
    "without ドイツ語で, ドイツ語に": without(lambda s: s.removesuffix("で").removesuffix("に") in LANGUAGES),
    "without 翻訳, 英訳, 英語:": without(lambda s: s in ("翻訳", "英訳", "英語訳", "英語:", "ヘブライ語：")),
    "without ```": without(lambda s: s == "```"),
    "without .com, http://, https://": without(lambda s: s in (".com", "http://", "https://")),
    "without accented Latin letters": replace(
        without(lambda s: len(s) == 1 and "\xc0" <= s <= "\u024f"),
        cp932_also=NEW.cp932_also + "".join(map(chr, range(0xC0, 0x250))),
    ),
    "without 个它很无找听决怎收效": without(lambda s: s in tuple("个它很无找听决怎收效")),
    "without `cp932_also`": replace(NEW, cp932_also=""),
    **{
        f"without {name}": replace(NEW, cp932_also="".join(c for c in NEW.cp932_also if c not in signs))
        for name, signs in {**{sign: sign for sign in "–—⋯≥≤•¥"}, "the 38 kanji": KANJI}.items()
    },
    "with `cp932_only` off": replace(NEW, cp932_only=False),
    "with `plain_text` off": replace(NEW, plain_text=False),
}


def kind(row: dict) -> str:
    """The contamination of a row; a dialogue of several turns is bad if a later answer holds no kana at all."""
    later = "".join(turn["content"] for turn in row["conversations"][3:])
    if row["mix"] == "multiturn":
        return "multiturn" if not any("ぁ" <= character <= "ヿ" for character in later) else "clean"
    return row["mix"]


def dealt_with(rows: list[dict], rules: helpers.FilterRules) -> list[str]:
    """What became of each row: "dropped", "corrected" or "kept"."""
    parsed = list(map(helpers.parse_row, rows))
    kept, dropped, _ = helpers.filter_rows(parsed, rules)
    ends = dict.fromkeys((record["number"] - 1 for record in dropped), "dropped")
    for number, row in zip((n for n in range(len(rows)) if n not in ends), kept, strict=True):
        given = helpers.row_texts(parsed[number], OLD)[0]
        was, text = given["instruction"] + given["response"], row["instruction"] + row["response"]
        composed = unicodedata.normalize("NFC", was)
        right = {"nfd": composed, "compat": composed, "emoji": was.replace("♪", "").replace("😢", "")}
        ends[number] = "corrected" if right.get(row["mix"]) == text else "kept"
    return [ends[number] for number in range(len(rows))]


def shares(kinds: list[str], ends: list[str]) -> tuple[float, float]:
    """(share of the good rows kept, share of the contamination dropped or corrected)."""
    good = [end != "dropped" for name, end in zip(kinds, ends, strict=True) if name in GOOD]
    bad = [end != "kept" for name, end in zip(kinds, ends, strict=True) if name not in GOOD]
    return sum(good) / len(good), sum(bad) / len(bad)


def main(source: str) -> None:
    rows = helpers.files.load_rows(source)
    kinds = list(map(kind, rows))
    print(f"{len(rows):,} rows, {sum(name in GOOD for name in kinds):,} of them good\n")
    print("| rules | rows kept | good rows kept | contamination dropped or corrected |\n|---|---|---|---|")
    results = {name: dealt_with(rows, rules) for name, rules in RULES.items()}
    for name, ends in results.items():
        good, bad = shares(kinds, ends)
        print(f"| {name} | {len(rows) - ends.count('dropped'):,} | {good:.1%} | {bad:.1%} |")
    print("\n| decision | good rows kept | of even and odd rows | contamination | of even and odd rows |")
    print("|---|---|---|---|---|")
    for name, rules in DECISIONS.items():
        ends = dealt_with(rows, rules)
        halves = [shares(kinds[half::2], ends[half::2]) for half in (1, 0)]
        cells = [f"{shares(kinds, ends)[i]:.2%} | {halves[0][i]:.1%}, {halves[1][i]:.1%}" for i in (0, 1)]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| kind | rows | dropped or corrected: 2024 | reviewed |\n|---|---|---|---|")
    for name, number in Counter(kinds).most_common():
        done = [
            sum(a == name and b != "kept" for a, b in zip(kinds, results[rules], strict=True)) / number
            for rules in ("2024", "reviewed")
        ]
        print(f"| {name} | {number:,} | {done[0]:.1%} | {done[1]:.1%} |")
    corrected = sum(a == "emoji" and b == "corrected" for a, b in zip(kinds, results["reviewed"], strict=True))
    print(f"\n{corrected} rows with emoji were corrected by the reviewed rules: ♪ or 😢 was removed.")


if __name__ == "__main__":
    main(*sys.argv[1:])
