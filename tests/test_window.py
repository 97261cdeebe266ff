"""What fits into the window: training texts and tasks that are too long are named before anything is loaded."""

import pytest
from test_reading import ANSWER, QUESTIONS, refusal

import helpers

TOKENIZER = helpers.models.load_tokenizer("data/tiny/gemma2")
# One text fits, of one the answer is cut, and of one the question alone fills a window of 256 tokens.
PAIRS = [("山は？", "富士山"), ("山は？", ANSWER * 50), (QUESTIONS[0] * 50, "富士山")]


def examples(pairs, loss_on):
    return [helpers.training_example(TOKENIZER, *pair, loss_on=loss_on) for pair in pairs]


@pytest.mark.parametrize("loss_on", ["text", "answer"])
def test_training_texts_beyond_the_window_are_cut_or_left_out(loss_on):
    rows, changed = helpers.cut_examples(examples(PAIRS, loss_on), 256)
    assert changed == {1: "cut", 2: "left out" if loss_on == "answer" else "cut"}
    assert len(rows) == (2 if loss_on == "answer" else 3)
    assert all(len(row["input_ids"]) == len(row["labels"]) <= 256 for row in rows)
    assert all(any(label != -100 for label in row["labels"]) for row in rows)


def test_nothing_left_to_learn_is_refused():
    message = refusal(helpers.cut_examples, examples(PAIRS[2:], "answer"), 256)
    assert "raise max_seq_length = 256" in message


def check_tasks(*texts, window=512, longest=128):
    tasks = [{"task_id": f"問{n}", "input": text} for n, text in enumerate(texts)]
    prompts = [helpers.encode(TOKENIZER, helpers.build_prompt(text, (), "2024")).ids for text in texts]
    left = [window - len(prompt) for prompt in prompts]
    return helpers.answers.check_tasks("tasks.jsonl", tasks, prompts, window, longest), left


def test_tasks_without_room_for_an_answer_are_refused():
    message = refusal(check_tasks, "山は？", "あ" * 3_000)
    assert message.startswith("tasks.jsonl: no room to answer task_id 問1 (3,") and "max_seq_length = 512" in message


def test_tasks_with_little_room_are_named_with_the_room_that_is_left(capsys):
    (_, (bare,)) = check_tasks("")
    rare = "鬱"  # one token or more for each
    (_, (ten,)) = check_tasks(rare * 10)
    too_long, left = check_tasks("山は？", rare * ((bare - 16) * 10 // (bare - ten) - 5))
    assert too_long == ["問1"] and 16 <= left[1] < 128 <= left[0]
    assert f"answered without shots, in at most as many tokens: {{'問1': {left[1]}}}" in capsys.readouterr().out


def test_examples_that_no_prompt_can_hold_are_left_out(capsys):
    rows = [{"instruction": "山は？", "response": answer} for answer in ("富士山", ANSWER * 30)]
    assert helpers.answers.check_examples("qa.jsonl", rows, TOKENIZER, 384, 1) == rows[:1]
    said = capsys.readouterr().out
    assert "1 of 2 examples fit into max_seq_length - max_new_tokens = 384 tokens" in said
    assert "qa.jsonl: no example fits" in refusal(
        helpers.answers.check_examples, "qa.jsonl", rows[1:], TOKENIZER, 384, 1
    )
