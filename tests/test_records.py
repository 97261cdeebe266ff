"""Records: what was made from what, by contents; and what a changed, missing or added file leads to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_cell

import helpers
from helpers import RecipeError

WEIGHTS = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
TOKENS = "c51e455b41df6c017327e16001dd064b8b6733faeaa69b23d9bd79c8079237d5"


def source(name="a/b", commit="", sha256="", licence="apache-2.0", **inputs):
    return {"name": name, "commit": commit, "sha256": sha256, "licence": licence, "inputs": inputs}


@pytest.fixture
def product(tmp_path):
    """A finished folder of two files and a card."""
    folder = tmp_path / "product"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"weights")
    (folder / "sub/tokens").write_bytes(b"tokens")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("card")
    helpers.records.write(folder, helpers.records.make("01_quantize", {"model": source()}, {"r": (1, 2)}, ["peft"]))
    return folder


def test_a_record_holds_the_hash_of_every_file_but_the_card(product):
    record = json.loads((product / "record.json").read_text())
    assert record["files"].keys() == {"weights", "sub/tokens", "config.json"}
    assert (record["files"]["weights"], record["files"]["sub/tokens"]) == (WEIGHTS, TOKENS)
    assert record["settings"] == {"r": [1, 2]} and record["versions"]["peft"]
    (product / "README.md").write_text("another card")
    assert helpers.records.check(product) == record


def test_the_record_of_a_file_lies_beside_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"weights")
    assert helpers.records.check(rows) == {}
    helpers.records.write(rows, helpers.records.make("02_filter_magpie", {}, {}, []))
    assert (tmp_path / "rows.jsonl.record.json").is_file()
    assert helpers.records.check(rows)["files"] == {"rows.jsonl": WEIGHTS}
    rows.write_bytes(b"weights and one row more")
    with pytest.raises(RecipeError, match=r"rows\.jsonl was changed after notebook 02_filter_magpie wrote it"):
        helpers.records.data_source(str(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"weightz"), "weights was changed after notebook 01_quantize"),
        (lambda folder: (folder / "sub/tokens").unlink(), "sub/tokens is missing"),
        (lambda folder: (folder / "more").touch(), "more was added"),
        (lambda folder: (folder / "record.json").write_text('{"inp'), r"record\.json cannot be read"),
        (lambda folder: (folder / "record.json").unlink(), "has no record, so it was not written to its end"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_product_that_is_not_what_was_written_is_refused(product, change, message):
    helpers.records.model_source(str(product), finished=True)
    change(product)
    with pytest.raises(RecipeError, match=message) as error:
        helpers.records.model_source(str(product), finished=True)
    assert str(product) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", '{"inp', "[]", "{}", '{"model": "a", "files": {}}', "[" * 100_000, "\xff"])
def test_a_record_that_is_damaged_or_of_another_form_is_one_line(product, text):
    """Nothing may use such a folder, named or not; the notebook that writes it is not held up."""
    (product / "record.json").write_text(text, encoding="latin-1")
    for finished in (True, False):
        with pytest.raises(RecipeError, match=r"is unfinished, or .*record\.json cannot be read: run the notebook"):
            helpers.records.check(product, finished)


def test_a_record_in_which_a_key_of_an_input_is_missing_is_none(product):
    record = json.loads((product / "record.json").read_text())
    del record["inputs"]["model"]["sha256"]
    (product / "record.json").write_text(json.dumps(record))
    assert helpers.records.read(product) == {}


@pytest.mark.parametrize(
    "name", [".DS_Store", "sub/.DS_Store", "Thumbs.db", ".ipynb_checkpoints/config.json", ".gitattributes", "a.part"]
)
def test_what_systems_put_into_every_folder_is_no_part_of_it(product, name):
    before = helpers.records.model_source(str(product), finished=True)
    (product / name).parent.mkdir(exist_ok=True)
    (product / name).write_text("x")
    assert helpers.records.model_source(str(product), finished=True) == before
    helpers.records.write(product, helpers.records.read(product))  # as after a kill while record.json.part was written
    assert helpers.records.read(product)["files"].keys() == {"weights", "sub/tokens", "config.json"}


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/1/x", tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(RecipeError, match=rf"^output_dir {folder} cannot be written") as error:
            helpers.machine.lock_folder(str(folder), "03_sft")
        assert "\n" not in str(error.value)


def test_a_model_is_its_contents_wherever_it_lies(product, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(product, moved)
    here, there = helpers.records.model_source(str(product)), helpers.records.model_source(str(moved))
    assert here["name"] != there["name"] and helpers.records.identity(here) == helpers.records.identity(there)
    assert here["inputs"] == {"model": source()}
    shutil.rmtree(moved)
    shutil.copytree(product, moved, ignore=shutil.ignore_patterns("record.json"))  # a folder of the reader's own
    assert helpers.records.identity(helpers.records.model_source(str(moved))) == helpers.records.identity(here)
    (moved / "weights").write_bytes(b"other weights")
    assert helpers.records.identity(helpers.records.model_source(str(moved))) != helpers.records.identity(here)


def test_records_differ_in_contents_and_settings_not_in_names():
    old = helpers.records.make(
        "03_sft", {"model": source("x", sha256="1"), "qa": source("hub/set", "c1")}, {"r": 8}, []
    )
    same = helpers.records.make(
        "03_sft", {"model": source("y", sha256="1"), "qa": source("hub/set", "c1")}, {"r": 8}, []
    )
    new = helpers.records.make(
        "03_sft", {"model": source("x", sha256="2"), "qa": source("hub/set", "c2")}, {"a": 1}, []
    )
    assert helpers.records.changed_parts(old, same) == []
    assert helpers.records.changed_parts(old, new) == ["a", "model", "qa", "r"]


def test_a_folder_that_holds_another_base_is_refused(tmp_path):
    """Notebook 1, before anything is written: the same weights may be quantized again, wherever they lie."""
    for name, weights in {"base": "abc", "moved": "abc", "other": "def"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(weights)
    out, values = tmp_path / "out", {"helpers": helpers, "Path": Path, "drive_dir": "", "hub_repo": ""}
    (out / "quantized").mkdir(parents=True)
    base = helpers.records.model_source(str(tmp_path / "base"))
    helpers.records.write(out / "quantized", helpers.records.make("01_quantize", {"model": base}, {}, []))
    values |= {"output_dir": str(out), "base_revision": ""}
    run_cell("01_quantize", "source", base_model=str(tmp_path / "moved"), **values)
    with pytest.raises(RecipeError, match=r"quantized already holds .*/base \(local\): choose another output_dir"):
        run_cell("01_quantize", "source", base_model=str(tmp_path / "other"), **values)


def test_origins_are_what_others_published():
    quantized = source("outputs/q", sha256="1", model=source("google/gemma", "c"))
    filtered = source("outputs/f.jsonl", sha256="2", dataset=source("owner/set", "d", licence="cc-by-sa-4.0"))
    inputs = {
        "model": quantized,
        "train_data": filtered,
        "qa_data": source("my.jsonl", licence=helpers.records.OWN_DATA),
    }
    found = {role: published["name"] for role, published in helpers.records.origins(inputs).items()}
    assert found == {"model": "google/gemma", "dataset": "owner/set", "qa_data": "my.jsonl"}
    with pytest.raises(RecipeError, match=r"^owner/set: the licence cc-by-sa-4\.0 is not"):
        helpers.records.check_licences(inputs)
    helpers.records.check_licences(inputs, "cc-by-sa-4.0")


HOLD = """
import sys, time; sys.path.insert(0, sys.argv[1])
import helpers
helpers.machine.lock_folder(sys.argv[2], "03_sft")
print("locked", flush=True); time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_says_who_holds_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, ROOT, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RecipeError, match=rf"is in use: process {holder.pid} on .* since 20.* runs 03_sft; wait"):
            helpers.machine.lock_folder(tmp_path, "03_sft")
        helpers.machine.lock_folder(tmp_path, "02_filter_magpie")  # another notebook may run at the same time
        holder.kill()  # as by kill -9: the lock is free again
    helpers.machine.lock_folder(tmp_path, "03_sft")
    helpers.machine.lock_folder(tmp_path, "03_sft")  # the cell may run twice
