"""The four notebooks: their form, and what they leave behind when they are executed with other values."""

import ast
import json
from pathlib import Path

import papermill
import pytest
import yaml
from conftest import ROOT
from papermill.exceptions import PapermillExecutionError

import helpers

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# study/parts.yaml is the list of benchmarks/study.py.
RUN_FILES = sorted(file for file in (ROOT / "data" / "runs").rglob("*.yaml") if file.stem != "parts")


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def parameters_cell(path):
    (cell,) = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    return cell


def defaults(path):
    """Name and default value of every parameter."""
    tree = ast.parse(source(parameters_cell(path)))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}


def test_there_are_at_most_62_parameters():
    assert sum(len(defaults(path)) for path in NOTEBOOKS) <= 62


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["01_quantize", "02_filter_magpie", "03_sft", "04_rag_inference"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestForm:
    def test_format(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert notebook["metadata"]["language_info"]["name"] == "python"
        assert "widgets" not in notebook["metadata"]
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)

    def test_outputs_are_stripped(self, path):
        assert not [cell["id"] for cell in cells(path) if cell.get("outputs") or cell.get("execution_count")]

    def test_set_up_cell_is_the_same_everywhere(self, path):
        def set_up(notebook):
            return next(source(cell) for cell in cells(notebook) if cell["id"] == "setup")

        assert set_up(path) == set_up(NOTEBOOKS[0])

    def test_every_parameter_has_a_form_field(self, path):
        lines = [line for line in source(parameters_cell(path)).splitlines() if not line.startswith("#")]
        assert len(lines) == len(defaults(path))  # Colab reads a form field from a single line
        assert not [line for line in lines if "# @param" not in line]

    def test_cells_are_short(self, path):
        lengths = {cell["id"]: source(cell).count("\n") + 1 for cell in cells(path) if cell["cell_type"] == "code"}
        assert not {name: lines for name, lines in lengths.items() if lines > 30 and name != "parameters"}

    def test_parameters_keep_their_names(self, path):
        """No parameter's name is used for something else; only output_dir is set once more, below drive_dir."""
        names = defaults(path).keys() - {"output_dir"}
        code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code" and cell["id"] != "parameters"]
        stored = {
            node.id
            for text in code
            for node in ast.walk(ast.parse(text))
            if isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, ast.Name)
        }
        assert not names & stored

    def test_mock_values_are_those_of_the_smoke_run(self, path):
        run = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))
        expected = {"output_dir": run["output_dir"], **run[path.stem]}
        assert parameters_cell(path)["metadata"]["nbmake"]["mock"] == expected

    def test_seed2024_spells_out_every_value(self, path):
        run = yaml.safe_load((ROOT / "data/runs/seed2024.yaml").read_text(encoding="utf-8"))
        assert {"output_dir", *run[path.stem]} == set(defaults(path))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_name_parameters_that_exist(path):
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert run.pop("output_dir").startswith("outputs/")
    for notebook, values in run.items():
        known = defaults(ROOT / "notebooks" / f"{notebook}.ipynb")
        assert set(values) <= set(known)
        for name, value in values.items():
            number = isinstance(known[name], (int, float)) and isinstance(value, (int, float))
            assert number or isinstance(value, type(known[name])), (notebook, name)


def execute(name, output_dir, **values):
    """Execute a notebook as papermill users do, with the smoke values and `values` on top."""
    run = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))
    parameters = run[name] | {"output_dir": str(output_dir)} | values
    output = Path(output_dir) / f"{name}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        output,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(ROOT),
    )
    return parameters


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
def test_other_values_reach_training_and_inference(smoke, tmp_path, engine):
    """r and k differ from the smoke run, with both engines, and both show in what is written."""
    quantized = str(smoke / "quantized")
    execute("03_sft", tmp_path, engine=engine, r=4, model=quantized, train_data=str(smoke / "filtered_magpie.jsonl"))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, quantized)
    metrics = json.loads((tmp_path / "sft_metrics.json").read_text())
    assert metrics["attention"] != "sdpa"
    assert metrics["last_loss"] < metrics["first_loss"]

    execute("04_rag_inference", tmp_path, engine=engine, k=1, model=quantized)
    metrics = json.loads((tmp_path / "inference_metrics.json").read_text())
    assert set(metrics["shots"].values()) == {1}
    assert metrics["answered"] == metrics["tasks"] == 10


def test_texts_that_speak_of_control_tokens_are_trained_on(smoke, tmp_path):
    """ "<eos>" in a question is text: it neither ends the training text nor counts as a second <bos>."""
    rows = [{"input": "文の終わりの<eos>とは？", "output": "<bos>で始まり<eos>で終わるという印です。"}] * 8
    helpers.files.write_jsonl(tmp_path / "qa.jsonl", rows)
    own = {"model": str(smoke / "quantized"), "train_data": str(tmp_path / "own.jsonl")}
    helpers.files.write_jsonl(own["train_data"], [{"instruction": r["input"], "response": r["output"]} for r in rows])
    execute("03_sft", tmp_path, qa_data=str(tmp_path / "qa.jsonl"), max_steps=1, warmup_steps=0, **own)
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
    model = str(smoke / "quantized")
    data = {"model": model, "train_data": str(smoke / "filtered_magpie.jsonl")}
    answers = []
    for steps in (2, 20):
        execute("03_sft", tmp_path, max_steps=steps, warmup_steps=0, **data)
        execute("04_rag_inference", tmp_path, model=model)
        record = helpers.records.check(tmp_path / "output.jsonl", finished=True)
        adapter = helpers.records.model_source(str(tmp_path / "adapter"), finished=True)
        assert record["inputs"]["adapter"]["sha256"] == adapter["sha256"]
        answers.append((tmp_path / "output.jsonl").read_bytes())
    assert answers[0] != answers[1]

    # Interrupted with answers of this adapter, trained anew, started again: refused, and the answers are not touched.
    (tmp_path / "output.jsonl").unlink()
    log = (tmp_path / "answers.jsonl").read_bytes()
    execute("03_sft", tmp_path, max_steps=3, **data)
    with pytest.raises(PapermillExecutionError, match="answers of an interrupted run with other settings"):
        execute("04_rag_inference", tmp_path, model=model)
    assert (tmp_path / "answers.jsonl").read_bytes() == log


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
        ("03_sft", {"train_data": "none.jsonl", "model": "data/tiny/gemma2"}, "none.jsonl: no such file"),
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
