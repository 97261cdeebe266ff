"""Section 6 of helpers.py: measures of an answer, likelihood of a reference, near-duplicates."""

import pandas as pd
import pytest

import helpers


def task(task_id=0, **values):
    return {"task_id": task_id, "input": "日本で一番高い山はどこですか。", "output": "富士山です。", **values}


def score(answer, **values):
    (scores,) = helpers.score_texts([task(**values)], [answer], [False])
    return scores


def test_the_reference_itself_scores_highest_and_another_answer_between():
    same, near, other = (score(answer) for answer in ("富士山です。", "それは富士山だ。", "犬と猫"))
    assert same["chrf"] == same["rouge_l"] == pytest.approx(100)
    for name in ("chrf", "rouge_l"):
        assert same[name] > near[name] > other[name] == 0


def test_rouge_l_counts_japanese_words():
    """富士|山|です|。 against 富士|山|だ|。: three of four words. Cut at spaces, both would be one unlike word."""
    assert score("富士山だ。")["rouge_l"] == pytest.approx(75)


@pytest.mark.parametrize("reference", [None, "", " \n", []])
def test_without_a_reference_only_the_answer_is_measured(reference):
    scores = score("富士山です。", output=reference)
    assert scores["chrf"] is scores["rouge_l"] is None
    assert scores["japanese"] == 1
    assert "chrf" not in helpers.summarize_scores([scores])


@pytest.mark.parametrize(
    ("text", "share"), [("富士山は3776m", 4 / 5), ("カタカナー々ひらがな", 1), ("山는 hill", 1 / 6), ("420 ※", None)]
)
def test_japanese_share(text, share):
    assert helpers.japanese_share(text) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("はじめに。" + "同じ文を書いてしまう。" * 4, True),
        ("あ" * 40, True),
        ("同じ文を書いてしまう。" * 3, False),
        ("あ" * 39, False),
        ("-" * 80, False),
        ("| 一 | 二 |\n|" + "---|" * 20, False),
        ("1. 走る\n2. 歩く\n3. 休む\n4. 眠る", False),
    ],
)
def test_loops(text, loops):
    assert helpers.has_loop(text) is loops
    assert helpers.has_loop(text + "終わり") is loops


def test_repeated_pieces():
    assert helpers.repeated_share("あいうえおかきくけこさしす") == 0
    assert helpers.repeated_share("あいうえおかきくけこ" * 2) == pytest.approx(1 / 11)
    assert helpers.repeated_share("短い") == 0


def test_an_empty_answer_counts_as_empty():
    assert [score(text)["empty"] for text in ("", " \n", "答")] == [1, 1, 0]


QUESTIONS = [
    "仕事の熱意を取り戻すためのアイデアを5つ挙げてください。",
    "クマが海辺に行ってアザラシと友達になり、最終的には家に帰るというプロットの短編小説を書いてください。",
]


@pytest.mark.parametrize(
    "copy",
    [
        QUESTIONS[0],
        "仕事の熱意を取り戻すためのアイデアを５つ挙げて ください。\n",
        "仕事の熱意を取り戻すためのアイデアを3つ挙げてください。",
    ],
)
def test_near_duplicates_are_found_and_named(copy):
    tasks = [task(i, input=text) for i, text in zip((7, 8), QUESTIONS, strict=True)]
    known = {"example": ["犬", "日本の首都は?"], "training row": ["空はなぜ青いのですか。", copy, "短い文"]}
    (found,) = helpers.near_duplicates(tasks, known)
    assert (found["task_id"], found["source"], found["row"]) == (7, "training row", 2)
    assert found["similarity"] >= 0.5


def test_questions_that_only_begin_alike_are_no_near_duplicates():
    tasks = [task(input="日本で一番高い山の名前と、その高さを教えてください。")]
    known = {"example": ["日本で一番高い建物が完成した年と、その理由を説明してください。", "", "。"]}
    assert helpers.near_duplicates(tasks, known) == []


def test_summary_leaves_out_what_it_is_told_and_what_is_missing():
    per_task = [{"task_id": i, "chrf": float(i), "judge": None if i else 5} for i in range(4)]
    summary = helpers.summarize_scores(per_task, without=[3])
    assert (summary["chrf"]["tasks"], summary["chrf"]["mean"]) == (3, 1)
    assert summary["judge"] == {"tasks": 1, "mean": 5, "low": None, "high": None}


def test_a_table_shows_text_as_text_and_cuts_it():
    """What models and data say must not become HTML in the notebook."""
    html = helpers.show(
        pd.DataFrame({"text": ["<script>alert(1)</script>", "長" * 300], "value": [1 / 3, 2.0]})
    ).to_html()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "長" * 200 + " …" in html and "長" * 201 not in html
    assert "0.333" in html
