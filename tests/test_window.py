"""What fits into the window: training texts and tasks that are too long are named before anything is loaded."""

import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_cell
from test_reading import ANSWER, QUESTIONS, refusal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers

TINY = "data/tiny/gemma2"


@pytest.mark.parametrize("loss_on", ["text", "answer"])
def test_training_texts_beyond_the_window_are_listed_with_what_happens_to_them(loss_on):
    """One text fits, of one the answer is cut, and of one the question alone fills the window."""
    texts = [("山は？", "富士山"), ("山は？", ANSWER * 50), (QUESTIONS[0] * 50, "富士山")]
    pairs = [{"instruction": question, "response": answer} for question, answer in texts]
    values = {"helpers": helpers, "pd": pd, "tokenizer": helpers.models.load_tokenizer(TINY), "max_seq_length": 256}
    values |= {"pairs": pairs, "filtered": pairs[:2], "qa": pairs[2:], "train_file": "a.jsonl", "qa_data": "b.jsonl"}
    left = run_cell("03_sft", "window", **run_cell("03_sft", "tokenize", **values, loss_on=loss_on))
    assert len(left["train_rows"]) == (2 if loss_on == "answer" else 3)
    assert [row[:2] for row in left["too_long"]] == [["a.jsonl", 2], ["b.jsonl", 1]]
    assert [row[4] for row in left["too_long"]] == ["cut", "left out" if loss_on == "answer" else "cut"]
    assert [row[3] >= 256 for row in left["too_long"]] == [False, True]
    assert all(row[2] > 256 for row in left["too_long"])
    assert all(len(row["input_ids"]) == len(row["labels"]) <= 256 for row in left["train_rows"])
    assert all(any(label != -100 for label in row["labels"]) for row in left["train_rows"])
    if loss_on == "answer":
        values |= {"pairs": pairs[2:], "filtered": [], "loss_on": loss_on}
        alone = run_cell("03_sft", "tokenize", **values)
        assert "raise max_seq_length = 256" in refusal(lambda: run_cell("03_sft", "window", **alone))


def window_of_04(task_texts, answers=("富士山",), **values):
    tasks = [{"task_id": f"問{n}", "input": text} for n, text in enumerate(task_texts)]
    rows = [{"input": "山は？", "output": answer} for answer in answers]
    values = {"helpers": helpers, "pd": pd, "model_name": TINY, "inputs": {"model": {"commit": ""}}, "k": 1} | values
    values |= {"task_rows": tasks, "qa_rows": rows, "prompt_style": "2024", "tasks": "tasks.jsonl"}
    values |= {"qa_data": "qa.jsonl", "max_seq_length": 512, "max_new_tokens": 128}
    return run_cell("04_rag_inference", "fitting-examples", **run_cell("04_rag_inference", "window", **values))


def test_tasks_beyond_the_window_are_named_before_the_model_is_loaded(capsys):
    began = time.perf_counter()
    message = refusal(window_of_04, ["山は？", "あ" * 300_000])
    assert time.perf_counter() - began < 10
    assert message.startswith("tasks.jsonl: no room to answer task_id 問1 (300,") and "max_seq_length = 512" in message
    count = window_of_04(["山は？"])["count_tokens"]
    prompt = count(helpers.build_prompt("", ()))
    rare = "鬱"  # one token or more for each
    tokens = count(helpers.build_prompt(rare * 10, ())) - prompt
    fits = (512 - 16 - prompt) * 10 // tokens
    left = window_of_04(["山は？", rare * (fits - 5)], ["富士山", ANSWER * 30])
    assert left["too_long"].keys() == {"問1"} and 16 <= left["room"]["問1"] < 128
    assert left["qa"] == [{"input": "山は？", "output": "富士山"}]
    said = capsys.readouterr().out
    assert f"answered without shots, in at most as many tokens: {{'問1': {left['room']['問1']}}}" in said
    assert "1 of 2 examples fit into max_seq_length - max_new_tokens = 384 tokens" in said
    assert "qa.jsonl: no example fits" in refusal(window_of_04, ["山は？"], [ANSWER * 30])
