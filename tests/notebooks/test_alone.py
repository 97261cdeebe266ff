"""Notebooks as a badge opens them: the set-up cell in an empty folder, and each notebook alone."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_hub import committed, hub  # noqa: F401, a fixture
from test_judge import GOOD, serve  # noqa: F401, a fixture

import helpers


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository of the working tree with the tag that the set-up cell asks for; returns its address."""
    source = tmp_path_factory.mktemp("repository") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "models", "__pycache__"))
    git = ["git", "-C", source, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"], ["tag", "v0.2.0"]):
        subprocess.run([*git, *command], check=True)
    return f"file://{source}"


def set_up_output(path: Path) -> str:
    (cell,) = [cell for cell in nbformat.read(path, 4).cells if cell.id == "setup"]
    return "".join(output.get("text", "") for output in cell.outputs)


def test_notebook_alone_in_an_empty_folder(repository, tmp_path, monkeypatch):
    """As the badge gives it. Here everything is installed, so nothing may be; the second run needs no repository."""
    alone = tmp_path / "content"
    alone.mkdir()
    shutil.copy(ROOT / "notebooks/02_filter_magpie.ipynb", alone)
    values = {"output_dir": "outputs/try", "dataset": "data/sample/magpie.jsonl", "dataset_revision": ""}
    for address in (repository, "file:///nowhere"):
        monkeypatch.setenv("RECIPE_REPOSITORY", address)
        papermill.execute_notebook(
            alone / "02_filter_magpie.ipynb", tmp_path / "out.ipynb", values, progress_bar=False, cwd=str(alone)
        )
        assert set_up_output(tmp_path / "out.ipynb") == "set-up: everything is installed\n"
        report = json.loads((alone / "gemma2-ja-qlora/outputs/try/filter_report.json").read_text(encoding="utf-8"))
        assert report["rows_in"] == 195


@pytest.mark.parametrize(
    ("notebook", "values", "missing"),
    [
        ("03_sft", {}, ("outputs/try/quantized", "notebook 1", "model")),
        ("03_sft", {"model": "me/base"}, ("outputs/try/filtered_magpie.jsonl", "notebook 2", "train_data")),
        ("04_rag_inference", {}, ("outputs/try/quantized", "notebook 1", "model")),
        ("04_rag_inference", {"model": "me/base"}, ("outputs/try/adapter", "notebook 3", "adapter")),
    ],
)
def test_a_notebook_alone_says_what_is_missing_before_it_installs_anything(
    notebook, values, missing, repository, tmp_path, monkeypatch
):
    """As a badge opens it: an empty folder, and no output of the notebooks before."""
    path, number, parameter = missing
    alone = tmp_path / "content"
    alone.mkdir()
    monkeypatch.setenv("RECIPE_REPOSITORY", repository)
    with pytest.raises(papermill.PapermillExecutionError) as raised:
        papermill.execute_notebook(
            ROOT / f"notebooks/{notebook}.ipynb",
            tmp_path / "out.ipynb",
            {"output_dir": "outputs/try"} | values,
            progress_bar=False,
            cwd=str(alone),
        )
    assert raised.value.exec_count == 3 and "\n" not in raised.value.evalue
    assert f"{path} ({number} writes it; or set {parameter} to the hub repository it pushed to)" in raised.value.evalue
    assert ": not here. Run first what writes it, with the same output_dir" in raised.value.evalue
    assert "set-up: installing" not in set_up_output(tmp_path / "out.ipynb")


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_set_up_does_nothing_inside_the_repository(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_REPOSITORY", "file:///nowhere")
    content = nbformat.read(notebook, 4)
    content.cells = [cell for cell in content.cells if cell.id in ("parameters", "setup")]
    content.cells[0].source += f"\nmodel = adapter = tasks = train_data = output_dir = {str(tmp_path)!r}"
    NotebookClient(content, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    assert not content.cells[1].outputs


def test_placeholder_address_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("RECIPE_REPOSITORY", raising=False)
    content = nbformat.read(ROOT / "notebooks/02_filter_magpie.ipynb", 4)
    address = "https://github.com/<owner>/gemma2-ja-qlora"
    content.cells = [cell for cell in content.cells if cell.id == "setup"]
    if address not in content.cells[0].source:
        pytest.skip("`make publish` has put the owner's name in")
    with pytest.raises(CellExecutionError) as error:
        NotebookClient(content, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (error.value.ename, "\n" in error.value.evalue) == ("SystemExit", False)
    assert address in error.value.evalue


SMOKE = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))


def run_alone(notebook: str, folder: Path, **values: object) -> str:
    """Execute a notebook as a badge opens it, in an empty folder, with the smoke values; what it prints."""
    folder.mkdir()
    executed = papermill.execute_notebook(
        ROOT / f"notebooks/{notebook}.ipynb",
        folder / "out.ipynb",
        SMOKE[notebook] | {"output_dir": "outputs/alone"} | values,
        progress_bar=False,
        cwd=str(folder),
    )
    outputs = (output for cell in executed.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs)


KEYS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11 + "x",
    "WANDB_API_KEY": "5ec2e7" * 6 + "beef",
    "JUDGE_API_KEY": "sk-" + "Jd4" * 9,
}


def test_each_notebook_runs_alone_on_what_the_one_before_has_pushed(hub, serve, repository, tmp_path, monkeypatch):  # noqa: F811
    """And no key is in anything that is written or pushed: neither in an executed notebook nor in a log, a report, a
    checkpoint or wandb's folder.
    """
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
        assert helpers.machine.secret(name) == key
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("RECIPE_REPOSITORY", repository)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    said = run_alone("01_quantize", tmp_path / "1", hub_repo="me/quantized")
    assert 'in notebook 3: model = "me/quantized"' in said
    said = run_alone("02_filter_magpie", tmp_path / "2", hub_repo="me/filtered", dataset="data/sample/magpie.jsonl")
    assert 'in notebook 3: train_data = "me/filtered"' in said
    (created,) = [request for request in hub.created if request.get("type") == "dataset"]
    assert created["visibility"] == "private"
    assert committed(hub.commits[-1]).keys() == {
        "README.md",
        *(f"filtered_magpie.jsonl{x}" for x in ("", ".record.json")),
    }
    pushed = hub.files["datasets/me/filtered"]  # the sample is a file of one's own, so its card names no licence
    pushed["README.md"] = pushed["README.md"].replace(b"---", b"---\nlicense: apache-2.0", 1)
    values = {"model": "me/quantized", "train_data": "me/filtered", "hub_repo": "me/adapter", "max_steps": 3}
    values |= {"warmup_steps": 1, "wandb_project": "secrets"}
    said = run_alone("03_sft", tmp_path / "3", **values)
    assert 'in notebook 4: adapter = "me/adapter"' in said
    judge = {"judge_base_url": serve(GOOD).url, "judge_model": "judge-1"}
    run_alone("04_rag_inference", tmp_path / "4", adapter="me/adapter", max_new_tokens=4, **judge)
    made = tmp_path / "4/gemma2-ja-qlora/outputs/alone"
    rows = [json.loads(line) for line in (made / "output.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 10 and not (made / "quantized").exists()
    record = json.loads((made / "output.jsonl.record.json").read_text(encoding="utf-8"))
    model, adapter = record["inputs"]["model"], record["inputs"]["adapter"]
    assert (model["name"], adapter["name"]) == ("me/quantized", "me/adapter")
    assert adapter["inputs"]["model"]["sha256"] == model["sha256"] != ""
    # The record leads from the answers back to the rows before the filter, over three repositories.
    assert adapter["inputs"]["train_data"]["inputs"]["dataset"]["name"] == "data/sample/magpie.jsonl"
    assert json.loads((made / "scores.json").read_text(encoding="utf-8"))["judge"]["grades"]

    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [name for name in written if name.endswith(".wandb")], "wandb wrote nothing: it was not switched on"
    assert {str(tmp_path / number / "out.ipynb") for number in "1234"} <= written.keys()
    pushed = {f"{repo}/{name}": content for repo, files in hub.files.items() for name, content in files.items()}
    assert "me/adapter/adapter_model.safetensors" in pushed
    holds = [
        (place, n) for place, text in (written | pushed).items() for n, key in KEYS.items() if key.encode() in text
    ]
    assert not holds


COLAB_DRIVE = """
import os
import shutil

def mount(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.islink(path):
        os.symlink(os.environ["DRIVE"], path)
"""


@pytest.mark.skipif(not os.access("/", os.W_OK) or os.path.exists("/content"), reason="Colab's /content is made here")
def test_each_notebook_runs_alone_on_what_lies_in_google_drive(repository, tmp_path, monkeypatch):
    """Machines of their own, the same Drive. The package google.colab exists on Colab alone: a small one stands in."""
    package = tmp_path / "packages/google/colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "drive.py").write_text(COLAB_DRIVE)
    (tmp_path / "drive/MyDrive").mkdir(parents=True)
    monkeypatch.setenv("DRIVE", str(tmp_path / "drive"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("RECIPE_REPOSITORY", repository)
    try:
        run_alone("01_quantize", tmp_path / "1", drive_dir="recipe")
        run_alone("02_filter_magpie", tmp_path / "2", drive_dir="recipe")
        run_alone("03_sft", tmp_path / "3", drive_dir="recipe", max_steps=2, warmup_steps=1)
        run_alone("04_rag_inference", tmp_path / "4", drive_dir="recipe", max_new_tokens=4)
    finally:
        shutil.rmtree("/content")
    made = {path.name for path in (tmp_path / "drive/MyDrive/recipe/outputs/alone").iterdir()}
    assert {"quantized", "filtered_magpie.jsonl", "adapter", "output.jsonl"} <= made
    for number in "1234":
        assert not (tmp_path / number / "gemma2-ja-qlora/outputs").exists()
