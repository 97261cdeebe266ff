"""The filter of 2024 once more, as plainly as possible: the yardstick for speed and for byte equality.

Every step follows the published script (recipe of the LLM2024 competition, section 2.2.1), with its quirks: all NG
strings are tried on every row even after one has matched, characters are counted before the replacements, and the
second pass runs once. Two things differ, and neither changes a row: the text to count is joined once (`+=` on a
global string is quadratic on today's Python), and a row is copied rather than changed in place.

    python tests/oracles/filter_2024.py IN.jsonl OUT.jsonl [rules.json]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pycld2

Row = dict[str, Any]


def first_content(row: Row, role: str) -> str:
    for turn in row["conversations"]:
        if turn["role"] == role:
            return turn["content"]
    return ""


def count_characters(rows: Iterable[Row]) -> Counter[str]:
    return Counter("".join(row["response"] + " " + row["instruction"] for row in rows))


def is_japanese(text: str, percent: int) -> bool:
    _, _, languages = pycld2.detect(text)
    return any(code == "ja" and share >= percent for _, code, share, _ in languages)


def survivors(
    rows: Iterable[Row], rules: Row, rare_below: int = 20, rare_after_below: int = 10, japanese_percent: int = 60
) -> list[Row]:
    rows = [
        {**row, "instruction": first_content(row, "user"), "response": first_content(row, "assistant")} for row in rows
    ]
    ng_list = list(rules["ng"]) + [char for char, n in count_characters(rows).items() if n < rare_below]
    kept = []
    for row in rows:
        for old, new in rules["replacements"]:
            for field in ("response", "instruction"):
                if old in row[field]:
                    row[field] = row[field].replace(old, new)
        bad = False
        for ng in ng_list:
            if ng in row["response"] or ng in row["instruction"]:
                bad = True
                continue
        if bad:
            continue
        try:
            if is_japanese(row["instruction"], japanese_percent) and is_japanese(row["response"], japanese_percent):
                kept.append(row)
        except Exception:  # the published script catches everything that cld2 may raise, and so loses the row
            continue
    rare = [char for char, n in count_characters(kept).items() if n < rare_after_below]
    return [row for row in kept if not any(char in row["response"] or char in row["instruction"] for char in rare)]


def filter_file(source: str | Path, target: str | Path, rules: str | Path, **thresholds: int) -> int:
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    kept = survivors(rows, json.loads(Path(rules).read_text(encoding="utf-8")), **thresholds)
    with open(target, "w", encoding="utf-8") as file:
        for row in kept:
            json.dump(row, file, ensure_ascii=False)
            file.write("\n")
    return len(kept)


if __name__ == "__main__":
    print(filter_file(*sys.argv[1:3], (sys.argv[3:] or ["data/filter_rules_2024.json"])[0]), "rows kept")
