"""What each rule of the filter catches, and what it costs, on data whose contamination is known.

    python benchmarks/filter_effects.py ROWS.jsonl

Every row names its contamination in the column `mix` ("clean" for none). A bad row counts as dealt with if it is
dropped, or if it is kept in corrected form (`nfd` and `compat`: brought to NFC). Prints two Markdown tables: the rules
of 2024, each improved rule added alone, and the reviewed rules file; then every kind of contamination.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers  # noqa: E402

OLD, NEW = (helpers.load_rules(ROOT / f"data/filter_rules_{name}.json") for name in ("2024", "reviewed"))
# fullwidth letters and a system turn are no fault; a second turn is one only if it is foreign
GOOD = ("clean", "fullwidth", "system")
SWITCHES = ("all_turns", "clean_conversations", "nfc", "cp932_only")
RULES = {
    "2024": OLD,
    "+ reviewed lists": replace(OLD, replacements=NEW.replacements, ng=NEW.ng),
    "+ `rare_share=0.00015`": replace(OLD, rare_share=NEW.rare_share),
    **{
        f"+ `{name}`": replace(OLD, **{name: True})
        for name in ("all_turns", "clean_conversations", "nfc", "cp932_only")
    },
    "reviewed": NEW,
}


def kind(row: dict) -> str:
    """The contamination of a row; a dialogue of several turns is bad if a later answer holds no kana at all."""
    later = "".join(turn["content"] for turn in row["conversations"][3:])
    if row["mix"] == "multiturn":
        return "multiturn" if not any("ぁ" <= character <= "ヿ" for character in later) else "clean"
    return row["mix"]


def dealt_with(rows: list[dict], rules: helpers.FilterRules) -> tuple[int, Counter[str]]:
    """(rows kept, rows dropped or corrected by kind)."""
    kept, dropped, _ = helpers.filter_rows(rows, rules)
    done = Counter(kind(record["row"]) for record in dropped)
    for row in kept:
        texts = helpers.row_texts(row, OLD)[0]
        was = texts["instruction"] + texts["response"]
        corrected = row["instruction"] + row["response"] == unicodedata.normalize("NFC", was)
        done[row["mix"]] += row["mix"] in ("nfd", "compat") and corrected
    return len(kept), done


def main(source: str) -> None:
    rows = helpers.load_rows(source)
    total = Counter(map(kind, rows))
    good, bad = (sum(n for name, n in total.items() if (name in GOOD) is wanted) for wanted in (True, False))
    results = {name: dealt_with(rows, rules) for name, rules in RULES.items()}
    print(f"{len(rows):,} rows, {good:,} of them good\n")
    print("| rules | rows kept | good rows kept | contamination dropped or corrected |\n|---|---|---|---|")
    for name, (kept, done) in results.items():
        lost = sum(done[k] for k in GOOD)
        print(f"| {name} | {kept:,} | {1 - lost / good:.1%} | {(done.total() - lost) / bad:.1%} |")
    first, reviewed = results["2024"][1], results["reviewed"][1]
    print("\n| kind | rows | dropped or corrected: 2024 | reviewed |\n|---|---|---|---|")
    for name, number in total.most_common():
        print(f"| {name} | {number:,} | {first[name] / number:.1%} | {reviewed[name] / number:.1%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
