"""What the filter keeps and drops of rows whose faults are known, by source and kind, and what each rule costs.

    python benchmarks/filter_effects.py FILES... [--rules RULES.json ...]

A row names its source in the column `source` (a good row), or its fault in `kind` or `mix` ("clean" for none). A bad
row counts as dealt with if it is dropped, or if it is kept without its fault: with composed accents, without invisible
characters, without ♪ and 😢. Prints two Markdown tables. The first one has a column for each rules file, by default
those of 2024 and the reviewed ones. The second one has a line for each rule of the last file: how many good and how
many bad rows break it, and how many of them break no other rule, so that they would be kept without it.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers  # noqa: E402

# fullwidth letters and a system turn are no fault; a second turn is one only if it is foreign
NO_FAULT = ("clean", "fullwidth", "system")


def load_rules(path: str) -> helpers.FilterRules:
    """The rules in a file, also in one of an earlier version: what it lacks is off."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    also = values.pop("cp932_also", "")
    if values.pop("cp932_only", False):
        codes = (*range(0xD800), *range(0xE000, sys.maxunicode + 1))
        private = map(chr, range(0xE000, 0xF900))
        values["ng"] += [c for c in map(chr, codes) if c not in also and not c.encode("cp932", "ignore")] + [*private]
    known = helpers.FilterRules.__dataclass_fields__
    return helpers.FilterRules(**{name: value for name, value in values.items() if name in known})


def label(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether a row is good, and its source or kind; a dialogue is bad if a later answer holds no kana at all."""
    if "source" in row:
        return True, row["source"]
    kind = row.get("kind") or row.get("mix")
    if not kind:
        raise SystemExit("filter_effects.py: every row needs its label, in the column `source`, `kind` or `mix`")
    if kind == "multiturn":
        later = "".join(turn["content"] for turn in row["conversations"][3:])
        return any("ぁ" <= character <= "ヿ" for character in later), kind
    return kind in NO_FAULT, kind


def without_fault(kind: str, text: str) -> str | None:
    """The text as a correction should leave it, or None where a row can only be dropped."""
    if kind in ("nfd", "compat"):
        return unicodedata.normalize("NFC", text)
    if kind == "emoji":
        return text.replace("♪", "").replace("😢", "")
    return text.translate(helpers.LOOKS) if kind == "zwsp" else None


def judge(rows: list[dict[str, Any]], rules: helpers.FilterRules) -> list[str]:
    """What became of each row: "dropped", "corrected" or "kept"."""
    texts_only = [{k: v for k, v in row.items() if k not in ("source", "kind", "mix")} for row in rows]
    parsed = list(map(helpers.parse_row, texts_only))
    kept, dropped, _ = helpers.filter_rows(parsed, rules)
    ends = dict.fromkeys((record["number"] - 1 for record in dropped), "dropped")
    plain = helpers.FilterRules((), ())
    for number, row in zip((n for n in range(len(rows)) if n not in ends), kept, strict=True):
        was = "".join(helpers.row_texts(parsed[number], plain)[0].values())
        text = row["instruction"] + row["response"]
        right = without_fault(label(rows[number])[1], was)
        ends[number] = "corrected" if right == text else "kept"
    return [ends[number] for number in range(len(rows))]


def print_shares(rows: list[dict[str, Any]], rules_files: list[str]) -> None:
    """One line for each source and kind: good rows kept, bad rows dropped or corrected."""
    labels = list(map(label, rows))
    ends = [judge(rows, load_rules(path)) for path in rules_files]
    names = [Path(path).stem for path in rules_files]
    print(f"| source or kind | rows | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for good, title in ((True, "good rows kept"), (False, "bad rows dropped or corrected")):
        kinds = Counter(kind for is_good, kind in labels if is_good is good)
        for kind, number in [(None, kinds.total()), *kinds.most_common()]:
            chosen = [i for i, (is_good, own) in enumerate(labels) if is_good is good and kind in (None, own)]
            right = [sum((end[i] != "dropped") if good else (end[i] != "kept") for i in chosen) for end in ends]
            cells = " | ".join(f"{count / max(1, number):.1%}" for count in right)
            print(f"| {kind or f'**{title}**'} | {number:,} | {cells} |")


def print_costs(rows: list[dict[str, Any]], rules: helpers.FilterRules) -> None:
    """One line for each rule: the good and the bad rows that break it, and those that break no other rule."""
    counts: dict[str, list[int]] = {}
    for column, wanted in enumerate((True, False)):
        chosen = [{**row, "mix": None} for row in rows if label(row)[0] is wanted]
        report = helpers.filter_rows(list(map(helpers.parse_row, chosen)), rules)[2]
        own = {rule["reason"] for rule in report["rules"]}
        found = [(rule["reason"], rule["rows"], rule["only"]) for rule in report["rules"]]
        found += [(name, number, number) for name, number in report["reasons"].items() if name not in own]
        for reason, held, only in found:
            line = counts.setdefault(reason, [0] * 4)
            line[2 * column] += held
            line[2 * column + 1] += only
    print("\n| rule | good rows | alone | bad rows | alone |\n|---|---|---|---|---|")
    for reason in sorted(counts, key=lambda reason: -counts[reason][1]):
        print(f"| {reason} | {' | '.join(f'{number:,}' for number in counts[reason])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILES", nargs="+")
    defaults = [str(ROOT / f"data/filter_rules_{name}.json") for name in ("2024", "reviewed")]
    parser.add_argument("--rules", nargs="+", default=defaults, metavar="RULES.json")
    options = parser.parse_args()
    rows = [row for path in options.files for row in helpers.files.load_rows(path)]
    print_shares(rows, options.rules)
    print_costs(rows, load_rules(options.rules[-1]))


if __name__ == "__main__":
    main()
