"""The files below data/: the 2024 rules are exact, the samples follow their schemas, the tiny models stay tiny."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parent.parent / "data"
RULES = json.loads((DATA / "filter_rules_2024.json").read_text(encoding="utf-8"))


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


def test_the_reviewed_lists_change_only_on_purpose():
    reviewed = json.loads((DATA / "filter_rules_reviewed.json").read_text(encoding="utf-8"))
    hashes = {name: sha256_of_list(reviewed[name])[:16] for name in ("ng", "replacements")}
    assert hashes == {"ng": "5119be7a5b92a114", "replacements": "e84a0d07cea8b9ef"}


def read_jsonl(name: str) -> list[dict]:
    # Split at line feeds alone: splitlines() would also split at the control characters some rows hold.
    text = (DATA / "sample" / name).read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def test_magpie_sample_has_the_schema_of_magpie_sft():
    rows = read_jsonl("magpie.jsonl")
    assert len(rows) >= 140
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "conversations"}
        for turn in row["conversations"]:
            assert set(turn) == {"role", "content"}
            assert turn["role"] in {"system", "user", "assistant"}
            assert isinstance(turn["content"], str)


def test_magpie_sample_holds_every_kind_of_contamination():
    conversations = [row["conversations"] for row in read_jsonl("magpie.jsonl")]
    roles = [[turn["role"] for turn in turns] for turns in conversations]
    text = "".join(turn["content"] for turns in conversations for turn in turns)
    for part in ["们", "안", "ขอ", "ل", "и", "ू", "é", "e\u0301", "ō", "\ufffd", "\x08", "\x7f", "\ud83d", "🎂", "仔",
                 "★", "```", "https://", ".com", "<h1>", "翻訳", "フランス語", "AI assistant", " - Arigatou ",
                 "よしmitsu", "♪", "松下村塾", "语"]:  # fmt: skip
        assert part in text, f"no row holds {part!r}"
    assert ["system", "user", "assistant"] in roles
    assert ["user", "assistant", "user", "assistant"] in roles
    assert ["user"] in roles
    assert [] in roles
    assert any(turn["content"] == "" for turns in conversations for turn in turns)


def test_qa_sample():
    rows = read_jsonl("qa.jsonl")
    assert len(rows) == 24
    assert len({row["input"] for row in rows}) == 24
    assert all(set(row) == {"input", "output"} and 60 <= len(row["output"]) <= 300 for row in rows)


def test_tasks_sample_has_the_schema_of_elyza_tasks_100():
    rows = read_jsonl("tasks.jsonl")
    assert [row["task_id"] for row in rows] == list(range(10))
    assert all(set(row) == {"task_id", "input", "output", "eval_aspect"} for row in rows)
    assert all(row["input"].strip() and row["output"].strip() and row["eval_aspect"].strip() for row in rows)


def test_tiny_models_are_small_and_hold_no_pickles():
    files = [file for file in (DATA / "tiny").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    names = {file.relative_to(DATA / "tiny").as_posix() for file in files}
    assert {"gemma2/model.safetensors", "colbert/model.safetensors", "colbert/artifact.metadata"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    assert sum(file.stat().st_size for file in files) < 4_000_000


@pytest.fixture(scope="module")
def gemma_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "tiny" / "gemma2")


def test_gemma_tokenizer_is_like_gemma_2(gemma_tokenizer):
    assert type(gemma_tokenizer).__name__.startswith("GemmaTokenizer")
    assert gemma_tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    ids = gemma_tokenizer("空は青い。").input_ids
    assert ids[0] == 2
    assert ids.count(2) == 1
    assert 1 not in ids
    assert gemma_tokenizer.chat_template is None


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@example("空 は\n\n青い 🎂 é e\u0301 \t ඞ")
@settings(max_examples=200, deadline=None)
def test_gemma_tokenizer_round_trip(gemma_tokenizer, text):
    ids = gemma_tokenizer(text, add_special_tokens=False).input_ids
    assert gemma_tokenizer.unk_token_id not in ids
    assert gemma_tokenizer.decode(ids) == text


def test_gemma_feels_the_softcap():
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(300, 400).unsqueeze(0)
    logits = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            DATA / "tiny" / "gemma2", dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            logits[attention] = model(ids).logits
    assert (logits["eager"] - logits["sdpa"]).abs().max() > 0.01


def test_colbert_tokenizer_is_japanese():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny" / "colbert")
    assert type(tokenizer).__name__ == "BertJapaneseTokenizer"
    assert tokenizer.tokenize("会社の仕事") == ["会社", "の", "仕事"]
    metadata = json.loads((DATA / "tiny" / "colbert" / "artifact.metadata").read_text(encoding="utf-8"))
    for key in ("query_token_id", "doc_token_id"):
        assert tokenizer.convert_tokens_to_ids(metadata[key]) != tokenizer.unk_token_id
