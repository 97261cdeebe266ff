"""benchmarks/study.py: which differences it calls clear, and what its retriever counts."""

import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, wilcoxon

import helpers

sys.path.insert(0, str(ROOT / "benchmarks"))
import study

TASKS = [f"task {number}" for number in range(30)] + [f"row {number}" for number in range(20)]


def scores(arm, seeds=(1, 2, 3), shift=0.0, noise=0.05, **fixed):
    """Made-up scores: every task has its own level, which all arms share."""
    draw = np.random.default_rng([seeds[0], len(arm)])
    level = np.random.default_rng(0).normal(size=len(TASKS))
    tables = []
    for seed in seeds:
        nll = 3 + level + shift + draw.normal(size=len(TASKS)) * noise
        values = {"nll": nll, "chrf": 50 + level, "rouge_l": 30.0, "japanese": 1.0}
        values |= {"loop": False, "cut": False} | fixed
        tables.append(pd.DataFrame({"arm": arm, "seed": seed, "task_id": TASKS} | values))
    return pd.concat(tables)


def test_a_difference_is_paired_by_seed_and_task():
    table = pd.concat([scores("base"), scores("no fine-tuning", seeds=(1,), shift=1.0, noise=0)]).sample(
        frac=1, random_state=0
    )
    base = table[table["arm"] == "base"].set_index(["seed", "task_id"])["nll"]
    alone = table[table["arm"] == "no fine-tuning"].set_index("task_id")["nll"]
    found = study.differences(table, "no fine-tuning", "base", "nll_tasks")
    assert found.shape == (3, 30)  # a run without seeds stands against every seed
    expected = sorted(alone[task] - base[seed, task] for seed in (1, 2, 3) for task in TASKS[:30])
    assert sorted(found.ravel()) == pytest.approx(expected)
    assert study.differences(table, "no fine-tuning", "base", "nll_held_out").shape == (3, 20)
    assert study.differences(table, "no fine-tuning", "base", "loop").shape == (3, 50)


def test_clear_effects_are_named_and_noise_is_not():
    arms = [scores("base"), scores("rank 16", shift=0.4), scores("rank 128"), scores("3 epochs", loop=True)]
    table = study.effects(pd.concat(arms)).set_index(["arm", "measure"])
    verdicts = table["verdict"].to_dict()
    assert verdicts["rank 16", "nll_tasks"] == verdicts["3 epochs", "loop"] == "worse"
    assert {verdicts.get(("rank 128", name), study.UNTOLD) for name in study.MEASURES} == {study.UNTOLD}
    row = table.loc[("rank 16", "nll_tasks")]
    assert row.low < 0.4 < row.high
    assert (table["p_corrected"] >= table["p"]).all()


def test_one_seed_with_the_other_sign_makes_no_claim():
    turned = pd.concat(
        [scores("rank 16", seeds=(seed,), shift=shift) for seed, shift in ((1, 1.0), (2, 1.0), (3, -0.1))]
    )
    table = study.effects(pd.concat([scores("base"), turned])).set_index("measure")
    assert table.loc["nll_tasks", "p_corrected"] < 0.05
    assert table.loc["nll_tasks", "verdict"] == study.UNTOLD


def test_the_test_agrees_with_wilcoxon_and_zero_has_no_effect():
    draw = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.5):
        found = draw.normal(shift, 0.3, size=(3, 80))
        p = study.effect(found)["p"]
        other = wilcoxon(found.mean(axis=0)).pvalue
        assert abs(p - other) < 0.2 and (p < 0.01) == (other < 0.01)
    assert study.effect(np.zeros((3, 10)))["p"] == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_holm_rejects_what_its_definition_rejects(values):
    corrected = study.holm(pd.Series(values))
    ordered = sorted(values)
    rejected = 0
    while rejected < len(ordered) and ordered[rejected] * (len(ordered) - rejected) < 0.05:
        rejected += 1
    assert (corrected < 0.05).sum() == rejected
    assert ((corrected >= values) & (corrected <= 1)).all()
    assert (corrected.to_numpy() >= false_discovery_control(values) - 1e-12).all()


def test_the_retriever_counts_shared_words(tmp_path):
    documents = ["富士山の高さを教えてください", "琵琶湖の深さを教えてください", "犬と猫の違いは何ですか", "東京の天気"]
    documents += [
        f"{name}について"
        for name in ["京都", "大阪", "奈良", "福岡", "仙台", "広島", "岡山", "金沢", "札幌", "那覇", "長崎", "熊本"]
    ]
    study.shared_words_retriever(tmp_path, documents)
    retriever = helpers.retrieval.load(str(tmp_path), documents)
    found = helpers.retrieval.search(retriever, "東京の猫と札幌の犬の違い", len(documents), 64)
    score = {documents[hit["index"]]: hit["score"] for hit in found}
    nothing = score["大阪について"]  # what the control tokens give every document
    # と is a word of one document alone, の one of four, which is more than a tenth
    expected = {documents[2]: 4, documents[3]: 1, "札幌について": 1, documents[0]: 0}
    assert {text: round(score[text] - nothing, 2) for text in expected} == expected
