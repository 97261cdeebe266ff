"""The set-up cell as on Colab: an empty folder that holds only the notebook; and what colab_setup.py decides."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from site import getsitepackages

import nbformat
import papermill
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement

import colab_setup

PINS = [Requirement(line) for line in ("torch>=2.11,<2.15", "transformers==5.17.0", "scipy", "unsloth_zoo==2026.10.9")]
COMPLETE = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "scipy": "1.16.0", "unsloth-zoo": "2026.10.9"}


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (COMPLETE, []),
        ({}, [str(pin) for pin in PINS]),
        (COMPLETE | {"transformers": "5.15.0"}, ["transformers==5.17.0"]),
        (COMPLETE | {"torch": "2.9.1"}, []),  # never replaced
        ({name: version for name, version in COMPLETE.items() if name != "unsloth-zoo"}, ["unsloth_zoo==2026.10.9"]),
    ],
    ids=["all there", "nothing there", "wrong version", "other torch", "missing"],
)
def test_only_what_is_missing_or_wrong_is_wanted(installed, expected):
    assert sorted(colab_setup.unmet(PINS, installed)) == sorted(expected)


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({"torchao": "0.10.0"}, ["torchao"]), ({"torchao": "0.16.0"}, []), ({"torch": "2.11.0"}, [])],
)
def test_a_torchao_that_peft_refuses_goes(installed, expected):
    assert colab_setup.to_remove(installed) == expected


def test_both_files_of_pins_are_read():
    pins = {pin.name: pin for file in ROOT.glob("requirements*.txt") for pin in colab_setup.read_requirements(file)}
    assert {"torch", "transformers", "unsloth", "ragatouille"} <= set(pins)
    assert all(pins[name].specifier for name in ("transformers", "peft", "unsloth"))


def test_of_two_installed_versions_the_one_that_is_imported_counts(tmp_path, monkeypatch):
    """Colab's machine has system packages behind its own."""
    for folder, version in (("first", "2.0"), ("second", "1.0")):
        (tmp_path / folder / f"twice-{version}.dist-info").mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: twice\nVersion: {version}\n"
        (tmp_path / folder / f"twice-{version}.dist-info/METADATA").write_text(metadata)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    assert colab_setup.installed_versions()["twice"] == "2.0"


def test_restart_is_asked_for_only_if_an_imported_package_changed():
    owners = {"json": ["Some_Package"], "pytest": ["pytest"], "not_imported": ["other"]}
    before = {"some-package": "1", "pytest": "9", "other": "1"}
    assert colab_setup.changed_modules(before, {"some-package": "2", "pytest": "9"}, owners) == {"json"}
    assert colab_setup.changed_modules(before, {"pytest": "9"}, owners) == {"json"}
    assert colab_setup.changed_modules(before, before | {"new": "1"}, owners) == set()
    assert colab_setup.changed_modules({"setuptools": "65"}, {"setuptools": "84"}, {"json": ["setuptools"]}) == set()


def make_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel of one empty module; a wheel is a zip file with three files of metadata."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD", "".join(f"{n},,\n" for n in [f"{name}.py", f"{info}/METADATA", f"{info}/WHEEL"])
        )
    return path


def test_an_environment_without_the_pins_gets_them_and_keeps_its_torch(tmp_path):
    """With real pip, from wheels made here: one package is missing, one is old, one goes; torch stays."""
    versions = {"torch": "2.9", "transformers": "1.0", "torchao": "0.10.0"}
    # The packages of this interpreter behind its own: an environment made from an environment would not see them.
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "behind.pth").write_text("\n".join(getsitepackages()))
    wheels = [make_wheel(tmp_path, name, version) for name, version in versions.items()]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", "--no-index"]
    subprocess.run([*pip, *wheels], check=True)
    for name, version in {"torch": "2.11", "transformers": "2.0", "missing_one": "1.0", "loose": "3.0"}.items():
        make_wheel(tmp_path, name, version)
    shutil.copy(ROOT / "colab_setup.py", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch>=2.9\ntransformers==2.0\nmissing_one==1.0  # new\n")
    (tmp_path / "requirements-nodeps.txt").write_text("loose==3.0\n")
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    def set_up(imports: str) -> subprocess.CompletedProcess:
        code = f"{imports}; import colab_setup; colab_setup.install()"
        return subprocess.run(
            [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    first = set_up("import transformers")
    assert first.returncode == 1
    assert first.stderr.strip() == (
        "set-up: transformers changed while in use: Runtime > Restart session, then Run all again"
    )
    assert "installing transformers==2.0, missing_one==1.0, loose==3.0" in first.stdout
    second = set_up("import transformers, missing_one, loose")
    assert (second.returncode, second.stdout) == (0, "set-up: everything is installed\n"), second.stderr
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    found = {package["name"]: package["version"] for package in json.loads(listed)}
    assert found["torch"] == "2.9"
    assert "torchao" not in found


@pytest.fixture
def repository(tmp_path):
    """A git repository of the working tree with the tag that the set-up cell asks for; returns its address."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "models", "__pycache__"))
    git = ["git", "-C", source, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"], ["tag", "v0.1.0"]):
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
    assert raised.value.evalue.startswith(f"{path} is not here. Run {number} with the same output_dir first")
    assert f"or set {parameter} to the hub repository that {number} pushed to" in raised.value.evalue
    assert "set-up: installing" not in set_up_output(tmp_path / "out.ipynb")


def test_the_competition_s_tasks_are_asked_for_by_name_and_found_beside_the_notebook(tmp_path, monkeypatch, capsys):
    values = {"model": "me/base", "adapter": "none", "tasks": "elyza-tasks-100-TV_0.jsonl", "train_data": ""}
    monkeypatch.chdir(ROOT)
    assert "elyza/ELYZA-tasks-100" in colab_setup.missing_input(values, "outputs/try")
    monkeypatch.setattr(colab_setup, "START", tmp_path)
    (tmp_path / "elyza-tasks-100-TV_0.jsonl").write_text('{"input": "q"}\n')
    colab_setup.find_beside_notebook(values)
    assert Path(values["tasks"]).samefile(tmp_path / "elyza-tasks-100-TV_0.jsonl")
    assert capsys.readouterr().out == f"tasks: {values['tasks']}\n"
    assert colab_setup.missing_input(values, "outputs/try") == ""
    before = dict(values)
    colab_setup.find_beside_notebook(values)  # the cell may run twice
    assert values == before


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
