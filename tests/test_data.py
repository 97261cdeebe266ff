"""The files below data/: the 2024 rules are exact, the samples follow their schemas, the tiny models stay tiny."""

import hashlib
import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
RULES = json.loads((DATA / "filter_rules.json").read_text(encoding="utf-8"))


def sha256_of_list(items: list) -> str:
    """Order and every code point count: NFC in place of NFD, or a lost trailing space, changes the hash."""
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()


def test_ng_strings_are_those_of_2024():
    ng = RULES["ng"]
    assert len(ng) == 306
    assert len(set(ng)) == 296
    assert sum(len(string) == 1 for string in set(ng)) == 238
    assert sha256_of_list(ng) == "496e0dff847717b2561ac26126fb19b3ae23895146a93ffac2cfd731400baec1"


def test_replacements_are_those_of_2024():
    replacements = RULES["replacements"]
    assert len(replacements) == 28
    assert len({old for old, _ in replacements}) == 28
    assert sha256_of_list(replacements) == "d93f06a1255621268457eeb8593e42449f3100c46c327d7962d9f5e9ee11dd3f"
