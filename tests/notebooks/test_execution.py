"""What the notebooks leave behind when they are executed with other values."""

import json
import shutil

import pytest
from conftest import execute
from families import run_notebook
from papermill.exceptions import PapermillExecutionError
from test_judge import GOOD, serve  # noqa: F401, a fixture
from test_notebooks import NOTEBOOKS

import helpers
from helpers import RecipeError


def test_other_values_reach_training_and_inference_with_unsloth(smoke, tmp_path):
    """r and k differ from the smoke run and from the defaults, and both show in what is written; see test_smoke.py."""
    quantized, few = str(smoke / "quantized"), {"max_steps": 6, "warmup_steps": 1}
    data = {"model": quantized, "train_data": str(smoke / "filtered_magpie.jsonl")}
    execute("03_sft", tmp_path, engine="unsloth", r=4, **data, **few)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, quantized)
    metrics = json.loads((tmp_path / "sft_metrics.json").read_text())
    assert metrics["attention"] != "sdpa"
    assert metrics["last_loss"] < metrics["first_loss"]

    execute("04_rag_inference", tmp_path, engine="unsloth", k=1, model=quantized, max_new_tokens=8)
    metrics = json.loads((tmp_path / "inference_metrics.json").read_text())
    assert set(metrics["shots"].values()) == {1}
    assert metrics["answered"] == metrics["tasks"] == 10


def test_texts_that_speak_of_control_tokens_are_trained_on(smoke, tmp_path):
    """ "<eos>" in a question is text: it neither ends the training text nor counts as a second <bos>."""
    rows = [{"input": "文の終わりの<eos>とは？", "output": "<bos>で始まり<eos>で終わるという印です。"}] * 8
    helpers.files.write_jsonl(tmp_path / "qa.jsonl", rows)
    own = {"model": str(smoke / "quantized"), "train_data": str(tmp_path / "own.jsonl")}
    helpers.files.write_jsonl(own["train_data"], [{"instruction": r["input"], "response": r["output"]} for r in rows])
    own |= {"output_dir": str(tmp_path), "qa_data": str(tmp_path / "qa.jsonl")}
    run_notebook("03_sft", max_steps=1, warmup_steps=0, **own)
    assert helpers.records.check(tmp_path / "adapter", finished=True)


def test_a_data_set_of_an_unknown_form_stops_before_anything_is_written(tmp_path):
    helpers.files.write_jsonl(tmp_path / "rows.jsonl", [{"title": "山", "text": "富士山は高い。"}] * 3)
    with pytest.raises(PapermillExecutionError) as error:
        execute("02_filter_magpie", tmp_path / "out", dataset=str(tmp_path / "rows.jsonl"))
    assert error.value.ename == "RecipeError"
    assert "3 of 3 rows cannot be used" in error.value.evalue and "columns are ['text', 'title']" in error.value.evalue
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_answers_are_those_of_the_adapter_that_lies_there(smoke, tmp_path):
    """Trained again with other settings in the same folder, notebook 04 must not hand out the old answers."""
    folder = tmp_path / "run"
    shutil.copytree(smoke, folder)
    run_notebook("03_sft", output_dir=str(folder), max_steps=2, warmup_steps=0)
    output, before = folder / "output.jsonl", helpers.records.read(folder / "output.jsonl")
    answers, log = output.read_bytes(), (folder / "answers.jsonl").read_bytes()

    # Interrupted with answers of the old adapter, trained anew, started again: refused, and the answers stay.
    output.unlink()
    with pytest.raises(RecipeError, match="answers of an interrupted run with other settings"):
        run_notebook("04_rag_inference", output_dir=str(folder))
    assert (folder / "answers.jsonl").read_bytes() == log

    output.write_bytes(answers)
    run_notebook("04_rag_inference", output_dir=str(folder))
    record = helpers.records.check(output, finished=True)
    adapter = helpers.records.model_source(str(folder / "adapter"), finished=True)
    assert record["inputs"]["adapter"]["sha256"] == adapter["sha256"]
    assert helpers.records.changed_parts(before, record) == ["adapter"]
    assert output.read_bytes() != answers


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("01_quantize", {"base_model": "nowhere/at/all"}, "nowhere/at/all: no such folder"),
        (
            "01_quantize",
            {"base_model": "nobody/nothing"},
            "nobody/nothing: no such folder, and the hub cannot be reached",
        ),
        ("01_quantize", {"hub_repo": "me/model"}, "set the environment variable HF_TOKEN"),
        ("03_sft", {"engine": "vllm", "model": "data/tiny/gemma2"}, "engine must be 'transformers' or 'unsloth'"),
        ("03_sft", {"model": "nowhere/at/all"}, "nowhere/at/all: no such folder"),
        (
            "04_rag_inference",
            {"tasks": "none.jsonl", "model": "data/tiny/gemma2", "adapter": "none"},
            "tasks: none.jsonl is not here",
        ),
        (
            "04_rag_inference",
            {"adapter": "nowhere/at/all", "model": "data/tiny/gemma2"},
            "nowhere/at/all: no such folder",
        ),
    ],
)
def test_errors_say_what_to_do(smoke, tmp_path, monkeypatch, name, values, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    values = {"train_data": str(smoke / "filtered_magpie.jsonl")} | values if name == "03_sft" else values
    with pytest.raises(PapermillExecutionError) as error:
        execute(name, tmp_path, **values)
    assert error.value.ename == "RecipeError"
    assert message in error.value.evalue
    assert "\n" not in error.value.evalue


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"^none\.jsonl: no such file"):
        run_notebook("03_sft", output_dir=str(tmp_path), train_data="none.jsonl", model="data/tiny/gemma2")


@pytest.mark.parametrize("notebook", [path.stem for path in NOTEBOOKS])
def test_papermill_stops_at_the_set_up(notebook, tmp_path):
    wrong = {"01_quantize": ("quant_type", "int8"), "02_filter_magpie": ("max_rows", 0.5)}
    name, value = wrong.get(notebook, ("max_seq_length", 8))
    with pytest.raises(PapermillExecutionError, match=f"RecipeError: {name} must be ") as raised:
        execute(notebook, tmp_path, **{name: value})
    assert raised.value.exec_count == 3  # after the parameters and papermill's values


@pytest.mark.parametrize(("references", "graded"), [(["420", None, ""], {"0": 4}), ([None, None, None], {})])
def test_notebook_scores_the_tasks_with_a_reference(serve, smoke, tmp_path, monkeypatch, references, graded):  # noqa: F811
    """The judge at work in notebook 04; a missing reference is no error, and the key is in no file."""
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    tasks = [{"task_id": i, "input": f"課題{i}", "output": text} for i, text in enumerate(references)]
    helpers.files.write_jsonl(tmp_path / "tasks.jsonl", tasks)
    values = {"tasks": str(tmp_path / "tasks.jsonl"), "model": str(smoke / "quantized"), "adapter": "none", "k": 1}
    server = serve(GOOD)
    values |= {"judge_base_url": server.url, "judge_model": "judge-1", "max_new_tokens": 8}
    printed = run_notebook("04_rag_inference", output_dir=str(tmp_path / "run"), **values)["printed"]
    scores = json.loads((tmp_path / "run/scores.json").read_text(encoding="utf-8"))
    assert (scores["tasks_with_reference"], scores["judge"]["grades"]) == (len(graded), graded)
    assert [scored["chrf"] is not None for scored in scores["per_task"]] == [bool(text) for text in references]
    assert scores["mean"]["characters"]["tasks"] == 3
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"secret-key" in path.read_bytes()]
    assert "secret-key" not in printed
