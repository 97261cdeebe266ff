"""Section 4 of helpers.py: prompts, shots, banned words, submission; and tasks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import helpers
from helpers import RecipeError

SHOTS = [{"instruction": f"問{i}", "response": f"答{i}"} for i in range(4)]


def test_prompt_is_that_of_2024():
    assert helpers.build_prompt("課題", SHOTS[:2], "2024") == (
        "質問・文章をよく読んで、正確で親切な回答を書きなさい。\n"
        "### 質問:\n問1\n\n### 回答:\n答1\n\n\n"
        "### 質問:\n問0\n\n### 回答:\n答0\n\n\n"
        "あなたは日本語が堪能な優秀な人間です。\n"
        "**文脈**を踏まえて、改行と箇条書きを駆使して、日本語で**詳細に**書きなさい。\n"
        "優秀な人間になりきって、推測をいれずに根拠をもってわかりやすく答えてください。"
        "### 質問:\n課題\n\n### 回答:\n"
    )


@given(
    task=st.text(max_size=30),
    shots=st.lists(
        st.builds(lambda a, b: {"instruction": a, "response": b}, st.text(max_size=30), st.text(max_size=30)),
        max_size=8,
    ),
    budget=st.integers(0, 600),
    style=st.sampled_from(["2024", "training"]),
)
def test_fit_shots_drops_the_least_similar_and_cuts_nothing(task, shots, budget, style):
    def to_ids(question, shown):
        return [*map(ord, helpers.build_prompt(question, shown, style))]

    ids, number = helpers.fit_shots(task, shots, to_ids, budget)
    assert ids == to_ids(task, shots[:number])
    assert len(ids) <= budget or number == 0
    if number < len(shots):
        assert len(to_ids(task, shots[: number + 1])) > budget


def test_banned_words_are_the_eight_of_2024():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in helpers.BANNED_WORDS]
    assert [tokenizer.decode(word) for word in ids] == ["質問", "###", "#", "##", "---", "<h3>", "filepath", "> "]
    assert all(tokenizer.bos_token_id not in word for word in ids)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 答え\n", "答え"),
        ("答え\n\n### 質問:\n次の課題", "答え"),
        ("### 質問:\n次", ""),
        ("質問に答えます。\n### 手順", "質問に答えます。\n### 手順"),
    ],
)
def test_clean_answer(text, answer):
    assert helpers.clean_answer(text) == answer


def test_submission_is_in_the_order_of_the_tasks():
    tasks = [{"task_id": i, "input": f"課題{i}"} for i in (3, 1, 2)]
    rows = helpers.answers.submission_rows(tasks, {1: "b", 2: "c", 3: "a"})
    assert rows == [
        {"task_id": 3, "input": "課題3", "output": "a"},
        {"task_id": 1, "input": "課題1", "output": "b"},
        {"task_id": 2, "input": "課題2", "output": "c"},
    ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({1: "a"}, r"task_id \[2\] \(1 of 2\): run this notebook again"),
        ({1: "a", 2: ""}, r"an empty answer for task_id \[2\] \(1 of 2\): set "),
    ],
)
def test_submission_with_a_missing_or_empty_answer_is_refused(answers, message):
    """Each with its own remedy: to run again does not help where greedy decoding has written nothing."""
    tasks = [{"task_id": i, "input": "x"} for i in (1, 2)]
    with pytest.raises(RecipeError, match=message):
        helpers.answers.submission_rows(tasks, answers)
