"""The set-up cell as on Colab: an empty folder that holds only the notebook; and what colab_setup.py decides."""

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from site import getsitepackages

import pytest
from conftest import ROOT
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
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
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


def test_the_competition_s_tasks_are_asked_for_by_name_and_found_beside_the_notebook(tmp_path, monkeypatch, capsys):
    values = {"model": "me/base", "adapter": "none", "tasks": "elyza-tasks-100-TV_0.jsonl", "train_data": ""}
    monkeypatch.chdir(ROOT)
    assert "elyza/ELYZA-tasks-100" in colab_setup.missing_inputs(values, "outputs/try")
    monkeypatch.setattr(colab_setup, "START", tmp_path)
    (tmp_path / "elyza-tasks-100-TV_0.jsonl").write_text('{"input": "q"}\n')
    colab_setup.find_beside_notebook(values)
    assert Path(values["tasks"]).samefile(tmp_path / "elyza-tasks-100-TV_0.jsonl")
    assert capsys.readouterr().out == f"tasks: {values['tasks']}\n"
    assert colab_setup.missing_inputs(values, "outputs/try") == ""
    before = dict(values)
    colab_setup.find_beside_notebook(values)  # the cell may run twice
    assert values == before


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("trl.trainer.sft_trainer", "Padding-free training is enabled, but the attention implementation is not set to"),
        (
            "liger_kernel.transformers.model.gemma2",
            "It is strongly recommended to train Gemma2 models with the `eager` attention implementation instead of "
            "`examples`. Use",
        ),
    ],
)
def test_only_the_known_notes_are_quiet(name, known, caplog):
    """A note on another attention than ours, such as sdpa, is one that the reader needs."""
    colab_setup.quiet_libraries()
    other = known.replace("Padding-free", "Packing").replace("examples", "sdpa")
    for text in (known, other):
        logging.getLogger(name).warning(text)
    assert [record.getMessage() for record in caplog.records] == [other]
