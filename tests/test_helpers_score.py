"""Section 6 of helpers.py: measures of an answer, likelihood of a reference, near-duplicates."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(scope="module")
def tiny():
    folder = "data/tiny/gemma2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


ASKED = ("山", "35 × 12 を計算してください。", "物語を書いて。" * 30)
REFERENCES = ["富士山です。", "420", "昔々、あるところに。" * 9]


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1](helpers.build_prompt(question, [], "2024"))["input_ids"] for question in ASKED]


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, reference):
    """Without batch, padding, mask or chosen logits: the sum of -log p of each token, divided by the characters."""
    start = len(prompt)
    ids = prompt + tokenizer(reference, add_special_tokens=False)["input_ids"]
    probabilities = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    return -sum(math.log(probabilities[i - 1, ids[i]]) for i in range(start, len(ids))) / len(reference)


@pytest.mark.parametrize("batch_tokens", [1, 1024, 4096])
def test_likelihood_in_batches_is_that_of_one_by_one(tiny, prompts, batch_tokens):
    expected = [one_by_one(*tiny, *pair) for pair in zip(prompts, REFERENCES, strict=True)]
    found = helpers.answers.reference_nll(*tiny, prompts, REFERENCES, batch_tokens)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 3


def test_likelihood_computes_logits_for_the_references_alone(tiny, prompts, monkeypatch):
    """The vocabulary has 256,000 entries: logits over a whole prompt of 3,000 tokens would fill a GPU."""
    model, tokenizer = tiny
    shapes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **values: shapes.append((out := forward(**values)).logits.shape) or out
    )
    helpers.answers.reference_nll(model, tokenizer, prompts, REFERENCES)
    longest = max(len(tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in REFERENCES)
    assert [shape[:2] for shape in shapes] == [(3, longest + 1)]


def test_likelihood_copies_no_output_matrix(tiny, prompts):
    """Beside an adapter the output matrix is frozen, and torch may then copy it for each row: gigabytes a batch."""
    model, tokenizer = tiny
    model.requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        helpers.answers.reference_nll(model, tokenizer, prompts, REFERENCES)
    copied = [len(prompts), model.config.hidden_size, model.config.vocab_size]
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert shapes
    assert not any(copied in given for given in shapes)


def test_likelihood_is_the_same_after_answering_in_slots(tiny, prompts):
    """Notebook 04 answers first; the attention of its slots cannot read padded batches."""
    before = helpers.answers.reference_nll(*tiny, prompts, REFERENCES)
    helpers.slots.Decoder(tiny[0], slots=2, columns=64)
    assert tiny[0].config._attn_implementation == "slots"
    assert helpers.answers.reference_nll(*tiny, prompts, REFERENCES) == before


def test_unsloth_finds_the_same_likelihood(smoke, prompts):
    found = []
    for engine in ("transformers", "unsloth"):
        model, tokenizer = helpers.models.load(str(smoke / "quantized"), engine, max_seq_length=512)
        model.eval()
        found.append(helpers.answers.reference_nll(model, tokenizer, prompts, REFERENCES))
    assert found[0] == pytest.approx(found[1], rel=1e-2)


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


def test_smoke_run_is_scored(smoke):
    scores = json.loads((smoke / "scores.json").read_text(encoding="utf-8"))
    tasks = helpers.files.load_tasks("data/sample/tasks.jsonl")
    assert [row["task_id"] for row in scores["per_task"]] == [row["task_id"] for row in tasks]
    assert all(0 < row["nll"] < 10 and 0 <= row["chrf"] < 100 for row in scores["per_task"])
    assert scores["judge"] is None
    assert {copy["task_id"] for copy in scores["near_duplicates"]} < {row["task_id"] for row in tasks}
