"""benchmarks/preferences.py with the tiny model: what is trained on, what notebook 4 gets, which answer is picked."""

import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import helpers
from compare import compare_runs
from helpers import RecipeError

sys.path.insert(0, str(ROOT / "benchmarks"))
import preferences

TINY = str(ROOT / "data/tiny/gemma2")
ROWS = str(ROOT / "data/sample/qa.jsonl")


def run(monkeypatch, question, **options):
    """The command line in this process."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["preferences.py", question, "--model", TINY, *arguments])
    monkeypatch.setattr(preferences, "NEW_TOKENS", 24)
    preferences.main()


@pytest.fixture(scope="module")
def loaded():
    return preferences.load(TINY)


def pair(**changes):
    return {
        "instruction": "日本で一番高い山は。",
        "response": "富士山です。",
        "rejected": "知りません。",
        "cut": False,
    } | changes


def test_a_pair_has_one_bos_and_ends_where_its_answers_end(loaded):
    _, tokenizer = loaded
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    written = "<bos>富士山です。<eos>"
    for changes, end in (({}, [eos]), ({"cut": True}, []), ({"response": written, "rejected": written}, [eos])):
        example = pair(**changes)
        ids = preferences.pair_ids(tokenizer, example)
        for name, column, last in (("chosen_ids", "response", [eos]), ("rejected_ids", "rejected", end)):
            text = helpers.sft_text(example["instruction"], example[column], "")
            assert ids["prompt_ids"] + ids[name] == helpers.encode(tokenizer, text).ids + last
        together = ids["prompt_ids"] + ids["chosen_ids"]
        assert (together.index(bos), together.count(bos), together.count(eos)) == (0, 1, 1)


def test_a_second_bos_is_refused(loaded, monkeypatch):
    _, tokenizer = loaded
    encode = helpers.encode
    twice = [tokenizer.bos_token_id]
    monkeypatch.setattr(helpers, "encode", lambda *a: encode(*a)._replace(ids=twice * bool(a[1]) + encode(*a).ids))
    with pytest.raises(RecipeError, match="control token in the middle"):
        preferences.pair_ids(tokenizer, pair())


def test_pairs_without_a_difference_are_left_out_and_counted(loaded):
    answers = [("知りません。", False), (" \n", False), ("富士山です。\n", False), ("山" * 2000, True)]
    pairs, left_out = preferences.make_pairs(loaded[1], [pair()] * 4, answers)
    assert pairs == [pair()]
    assert left_out == {"empty": 1, "equal": 1, "too long": 1}


@pytest.mark.plain_trl
def test_the_trainer_sees_the_pairs_and_starts_from_the_reference(tmp_path):
    model, tokenizer = preferences.load(TINY)
    pairs = [pair(), pair(cut=True, rejected="知りません。山は山です。")]
    trainer = preferences.make_trainer(model, tokenizer, pairs, tmp_path, seed=1)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = [preferences.pair_ids(tokenizer, example) for example in pairs]
    expected = [ids["prompt_ids"] + ids[name] for name in ("chosen_ids", "rejected_ids") for ids in expected]
    found = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(found) == sorted(expected)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters() if parameter.requires_grad)
    with trainer.compute_loss_context_manager():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.6931, abs=1e-3)  # ln 2


def test_answers_in_a_padded_batch_are_those_of_each_question_alone(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(preferences, "NEW_TOKENS", 8)
    questions = [row["instruction"] for row in helpers.files.load_pairs(ROWS)[:3]]
    found = preferences.write_answers(model.float(), tokenizer, questions, preferences.GREEDY)
    assert found == [preferences.write_answers(model, tokenizer, [q], preferences.GREEDY)[0] for q in questions]
    assert len({text for text, _ in found}) == 3


@pytest.mark.plain_trl
def test_notebook_4_gets_an_adapter_that_prefers_the_chosen_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(preferences.TRAINING, "learning_rate", 1e-2)
    monkeypatch.setattr(preferences, "PAIRS_PER_STEP", 4)
    run(monkeypatch, "dpo", rows=ROWS, count=16, out=tmp_path)
    source = helpers.records.model_source(str(tmp_path / "adapter"), finished=True)
    helpers.records.check_adapter(source, helpers.records.model_source(TINY))
    assert helpers.records.read(tmp_path / "adapter")["settings"]["count"] == 16
    pairs = helpers.files.load_pairs(str(tmp_path / "pairs.jsonl"))  # as notebook 3 reads them
    assert pairs == helpers.files.load_pairs(ROWS)[:16]

    model, tokenizer = preferences.load(TINY)
    lm = helpers.models.load_adapter(model, str(tmp_path / "adapter"))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}  # as notebook 3 saves it
    rows = helpers.files.load_rows(tmp_path / "pairs.jsonl")
    prompts = [helpers.encode(tokenizer, helpers.sft_text(row["instruction"], "", "")).ids for row in rows]

    def margin():
        nll = [
            helpers.likelihood.reference_nll(lm, tokenizer, prompts, [r[name] for r in rows])
            for name in ("response", "rejected")
        ]
        return sum(nll[1]) - sum(nll[0])

    trained = margin()
    with lm.disable_adapter():
        assert trained > margin() + 1
    capsys.readouterr()
    run(monkeypatch, "dpo", rows=ROWS, count=16, out=tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}/dpo.json is there: finished\n"


def test_the_answer_most_like_the_others_is_picked():
    answers = [
        "いいえ、違います。",
        "富士山は日本一高い山です。",
        "",
        "日本一高い山は富士山です。",
        "富士山は日本で一番高い山です。",
    ]
    assert preferences.consensus(answers) == 1
    assert preferences.consensus(answers[::-1]) == 3
    assert preferences.consensus(["", ""]) == 0


def test_three_ways_of_decoding_for_compare(tmp_path, monkeypatch):
    tasks = ROOT / "data/sample/tasks.jsonl"
    monkeypatch.setattr(preferences, "SAMPLES", 3)
    run(monkeypatch, "mbr", tasks=tasks, out=tmp_path)
    arms = ["greedy", "first", "mbr"]
    outputs = {arm: [row["output"] for row in helpers.files.load_rows(tmp_path / arm / "output.jsonl")] for arm in arms}
    report = preferences.json.loads((tmp_path / "mbr.json").read_text(encoding="utf-8"))
    samples = [[text for text, _ in group] for group in report["samples"]]
    assert outputs["first"] == [texts[0] for texts in samples]
    assert outputs["mbr"] == [texts[preferences.consensus(texts)] for texts in samples]
    assert {len(texts) for texts in samples} == {3}
    assert outputs["mbr"] != outputs["first"] != outputs["greedy"]
    assert report["seconds"].keys() == set(arms)
    text = compare_runs([tmp_path / arm for arm in arms], tmp_path / "compare")
    assert "over 10 tasks" in text
    assert "chrF to the reference" in text
