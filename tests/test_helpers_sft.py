"""Section 3 of helpers.py: training texts, tokens, labels, even rows."""

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import helpers


def test_encode_adds_what_stands_in_front_and_nothing_behind():
    """Of llm-jp's <s> and </s> only the first; a text within another has no ▁ of its own."""
    tokenizer = families.llmjp_tokenizer()
    assert tokenizer("山")["input_ids"][-1] == tokenizer.eos_token_id
    ids = helpers.encode(tokenizer, "山").ids
    assert (ids[0], tokenizer.eos_token_id in ids) == (tokenizer.bos_token_id, False)
    assert helpers.encode_within(tokenizer, "山") == ids[2:]


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


def test_control_tokens_in_a_text_stay_text():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    text = "終わりは<eos>、始まりは<bos>です。<start_of_turn>とも書きます。"
    ids = helpers.encode(tokenizer, text).ids
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:]) == text
    plain = "# 見出し\n\n<h1>題</h1>\t```python\nprint('あ')\n```\n"
    assert helpers.encode(tokenizer, plain).ids == tokenizer(plain)["input_ids"]


def test_texts_of_a_step_are_dealt_out_to_even_rows():
    lengths = torch.randint(20, 2000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = helpers.rows.even_rows(range(32), lengths, 8)
    assert sorted(text for row in rows for text in row) == [*range(32)]
    assert [len(row) for row in rows] == [8] * 4
    sums = [sum(lengths[text] for text in row) for row in rows]
    assert max(sums) < 1.05 * min(sums)
    assert [len(row) for row in helpers.rows.even_rows(range(3), lengths, 8)] == [3]
