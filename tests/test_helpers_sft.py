"""Section 4 of helpers.py: training texts, chat template, resuming."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import helpers
from helpers import RecipeError


def test_sft_text_is_the_prompt_of_2024():
    assert helpers.sft_text("質問です", "答えです", "<eos>") == (
        "\nあなたは高性能なAIです。質問に対して、適切な回答を書きなさい。\n"
        "回答に関係のないことは絶対に書かないでください。\n\n### 質問:\n質問です\n\n### 回答:\n答えです<eos>"
    )
    assert helpers.sft_text("質問です", "", "<eos>").endswith("### 回答:\n")


@given(instruction=st.text(), response=st.text(min_size=1))
def test_sft_text_keeps_both_texts_whole(instruction, response):
    """Braces, percent signs and the like in the data must not be taken for format fields."""
    text = helpers.sft_text(instruction, response, "<eos>")
    assert text.endswith(f"### 質問:\n{instruction}\n\n### 回答:\n{response}<eos>")


def test_training_pairs_appends_qa_and_drops_other_columns():
    filtered = [{"id": "1", "instruction": "a", "response": "b", "conversations": []}]
    pairs = helpers.training_pairs(filtered, [{"input": "c", "output": "d"}])
    assert pairs == [{"instruction": "a", "response": "b"}, {"instruction": "c", "response": "d"}]


def test_chat_template():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    tokenizer.chat_template = helpers.GEMMA_CHAT_TEMPLATE
    turns = [{"role": "user", "content": " こんにちは "}, {"role": "assistant", "content": "はい"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.strip() == (
        "<bos><start_of_turn>user\nこんにちは<end_of_turn>\n<start_of_turn>model\nはい<end_of_turn>\n<start_of_turn>model"
    )
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template([turns[1]], tokenize=False)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    return str(path)


def test_resume_takes_the_newest_checkpoint_of_the_same_settings(tmp_path):
    folder, finished = tmp_path / "checkpoints", tmp_path / "sft_metrics.json"
    settings = {"r": 8, "modules": ("q", "k")}
    assert helpers.checkpoint_to_resume(folder, settings, finished) is None
    checkpoint(folder, 300)
    newest = checkpoint(folder, 1200)
    (folder / "checkpoint-1500").mkdir()  # killed before it was complete
    assert helpers.checkpoint_to_resume(folder, settings, finished) == newest


def test_resume_refuses_checkpoints_of_other_settings(tmp_path):
    folder, finished = tmp_path / "checkpoints", tmp_path / "sft_metrics.json"
    helpers.checkpoint_to_resume(folder, {"r": 8, "seed": 1}, finished)
    kept = checkpoint(folder, 300)
    with pytest.raises(RecipeError, match=r"other values of r:"):
        helpers.checkpoint_to_resume(folder, {"r": 16, "seed": 1}, finished)
    assert helpers.checkpoint_to_resume(folder, {"r": 8, "seed": 1}, finished) == kept


def test_finished_training_starts_anew(tmp_path):
    folder, finished = tmp_path / "checkpoints", tmp_path / "sft_metrics.json"
    helpers.checkpoint_to_resume(folder, {"r": 8}, finished)
    checkpoint(folder, 300)
    finished.write_text(json.dumps({}))
    assert helpers.checkpoint_to_resume(folder, {"r": 16}, finished) is None
    assert not finished.exists()
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("response", ["富士山です。", "### 回答:\nを含む答え", "🎂"])
def test_answer_labels_cover_the_answer_and_nothing_else(response):
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    text = helpers.sft_text("日本で一番高い山は？", response, tokenizer.eos_token)
    encoded = tokenizer(text, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    prompt_length = len(helpers.sft_text("日本で一番高い山は？", "", ""))
    labels = helpers.answer_labels(encoded["input_ids"], starts, prompt_length)
    assert len(labels) == len(encoded["input_ids"])
    assert tokenizer.decode([label for label in labels if label != -100]) == response + tokenizer.eos_token
    assert helpers.answer_labels(encoded["input_ids"], starts, 0) == encoded["input_ids"]


def test_out_of_memory_keeps_the_effective_batch():
    assert "per_device_train_batch_size=8 and gradient_accumulation_steps=4" in str(helpers.out_of_memory(16, 2))
    assert "lower max_seq_length" in str(helpers.out_of_memory(1, 32))
