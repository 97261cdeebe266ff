"""What each rule of the filter catches, and what it costs, on data whose contamination is known.

    python benchmarks/filter_effects.py ROWS.jsonl

Every row names its contamination in the column `mix` ("clean" for none). A bad row counts as dealt with if it is
dropped, or if it is kept in mended form (`nfd` and `compat`: brought to NFC). Prints two Markdown tables: the rules of
2024, each improved rule added alone, and all of them as in notebook 02; then every kind of contamination.
"""

from __future__ import annotations

import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers  # noqa: E402

OLD, NEW = (helpers.load_filter_rules(ROOT / f"data/filter_rules{name}.json") for name in ("", "_reviewed"))
# fullwidth letters and a system turn are no fault; a second turn is one only if it is foreign
GOOD = ("clean", "fullwidth", "system")
IMPROVED = {"all_turns": True, "clean_conversations": True, "nfc": True, "cp932_only": True, "rare_share": 0.00015}
SETTINGS = {
    "2024": OLD,
    "+ reviewed list": NEW,
    "+ `rare_share=0.00015`": {**OLD, "rare_share": 0.00015},
    **{f"+ `{name}`": {**OLD, name: True} for name in ("all_turns", "clean_conversations", "nfc", "cp932_only")},
    "+ `near_duplicates=0.9`": {**OLD, "near_duplicates": 0.9},
    "improved (notebook 02)": {**NEW, **IMPROVED},
    "improved + `near_duplicates=0.9`": {**NEW, **IMPROVED, "near_duplicates": 0.9},
}


def kind(row: dict) -> str:
    """The contamination of a row; a dialogue of several turns is bad if a later answer holds no kana at all."""
    later = "".join(turn["content"] for turn in row["conversations"][3:])
    if row["mix"] == "multiturn":
        return "multiturn" if not any("ぁ" <= character <= "ヿ" for character in later) else "clean"
    return row["mix"]


def dealt_with(source: str, settings: helpers.FilterSettings, kinds: list[str]) -> tuple[int, Counter[str]]:
    """(rows kept, rows dropped or mended by kind); `kinds` by row of the source."""
    with tempfile.TemporaryDirectory() as folder:
        report = helpers.run_filter(source, folder, settings)
        done = Counter(kinds[record["number"] - 1] for record in helpers.read_jsonl(f"{folder}/dropped_magpie.jsonl"))
        for row in helpers.read_jsonl(f"{folder}/filtered_magpie.jsonl"):
            texts = row["instruction"] + row["response"]
            judged = helpers.judged_texts(row, helpers.FilterSettings())[0]
            was = judged["instruction"] + judged["response"]
            done[row["mix"]] += row["mix"] in ("nfd", "compat") and texts == unicodedata.normalize("NFC", was)
    return report["rows_kept"], done


def main(source: str) -> None:
    kinds = [kind(row) for row in helpers.read_jsonl(source)]
    total = Counter(kinds)
    good, bad = (sum(n for name, n in total.items() if (name in GOOD) is wanted) for wanted in (True, False))
    results = {name: dealt_with(source, helpers.FilterSettings(**values), kinds) for name, values in SETTINGS.items()}
    print(f"{len(kinds):,} rows, {good:,} of them good\n")
    print("| rules | rows kept | good rows kept | contamination dropped or mended |\n|---|---|---|---|")
    for name, (kept, done) in results.items():
        lost = sum(done[k] for k in GOOD)
        print(f"| {name} | {kept:,} | {1 - lost / good:.1%} | {(done.total() - lost) / bad:.1%} |")
    first, improved = results["2024"][1], results["improved (notebook 02)"][1]
    print("\n| kind | rows | dropped or mended: 2024 | improved |\n|---|---|---|---|")
    for name, rows in total.most_common():
        print(f"| {name} | {rows:,} | {first[name] / rows:.1%} | {improved[name] / rows:.1%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
