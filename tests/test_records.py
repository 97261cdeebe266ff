"""Records: what was made from what, by contents; and what a changed, missing or added file leads to."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_cell
from huggingface_hub import DatasetCard, ModelCard

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


@pytest.mark.parametrize(
    ("card", "licence", "said"),
    [
        ("license: [gemma, llama3.3]", ["gemma", "llama3.3"], ("Gemma Terms of Use", "Built with Llama.")),
        ("license: apache-2.0", "apache-2.0", ()),
        ("license: other\nlicense_name: qwen\nlicense_link: https://a/b", "other", ()),
        ("license: [a", None, ()),
        ("tags: [x]", None, ()),
    ],
)
def test_the_card_has_the_licence_of_the_base_and_says_what_it_asks_for(tmp_path, card, licence, said):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    record = helpers.records.make("01", {"model": helpers.records.model_source(str(tmp_path))}, {}, [])
    helpers.records.check_licences(record["inputs"])  # a model's licence is shown, not judged
    text = helpers.records.model_card("T", record, [], {})
    data = ModelCard(text).data
    assert data.license == licence
    assert (data.license_name, data.license_link) == (("qwen", "https://a/b") if licence == "other" else (None, None))
    notices = ("Gemma Terms of Use", "Built with Llama.")
    assert [notice in text for notice in notices] == [notice in said for notice in notices]


class TestLicences:
    @staticmethod
    def source(licence):
        return {"dataset": {"name": "a/b", "commit": "c", "sha256": "", "licence": licence, "inputs": {}}}

    @pytest.mark.parametrize("licence", ["apache-2.0", "cc0-1.0", "mit, cc-by-4.0"])
    def test_permissive_ones_pass(self, licence):
        helpers.records.check_licences(self.source(licence))

    @pytest.mark.parametrize(
        ("licence", "named"),
        [
            ("cc-by-sa-4.0", "cc-by-sa-4.0"),
            ("unknown", "unknown"),
            ("mit, cc-by-nc-4.0", "cc-by-nc-4.0"),
            ("other", "other"),
        ],
    )
    def test_others_stop_unless_allowed(self, licence, named):
        with pytest.raises(
            helpers.RecipeError, match=rf"^a/b: the licence {named} is not .* allow_licences = '{named}'$"
        ):
            helpers.records.check_licences(self.source(licence))
        helpers.records.check_licences(self.source(licence), f"x, {named.upper()}")

    def test_local_files_are_your_own_and_the_hub_is_asked_for_others(self):
        assert helpers.records.data_source("data/sample/qa.jsonl")["licence"] == "your own (local file)"
        with pytest.raises(helpers.RecipeError, match="nobody/nothing: its licence cannot be read"):
            helpers.records.data_source("nobody/nothing")


class TestCards:
    @staticmethod
    def record(**inputs):
        return helpers.records.make("test", inputs, {"r": 64}, ["peft"])

    def test_model_card_names_base_and_data(self):
        model = {"name": "google/gemma-2-27b", "commit": "123", "sha256": "", "licence": "gemma", "inputs": {}}
        data = {"name": "owner/set", "commit": "abc", "sha256": "", "licence": "apache-2.0", "inputs": {}}
        card = ModelCard(
            helpers.records.model_card("T", self.record(model=model, dataset=data), ["peft"], {"loss": "2.5"})
        )
        assert (card.data.base_model, card.data.datasets, card.data.license) == (
            "google/gemma-2-27b",
            ["owner/set"],
            "gemma",
        )
        for row in ("| dataset | owner/set, abc, apache-2.0 |", "| settings | r 64 |", "| loss | 2.5 |"):
            assert row in card.text
        assert "Gemma Terms of Use" in card.text

    def test_dataset_card_hands_the_licence_on(self):
        source = {"name": "owner/set", "commit": "abc", "sha256": "", "licence": "apache-2.0", "inputs": {}}
        card = DatasetCard(helpers.records.dataset_card("T", self.record(dataset=source), {"rows kept": "1 of 2"}))
        assert (card.data.license, card.data.source_datasets) == (["apache-2.0"], ["owner/set"])
        own = DatasetCard(
            helpers.records.dataset_card(
                "T", self.record(dataset=helpers.records.data_source("data/sample/qa.jsonl")), {}
            )
        )
        assert own.data.license is None


def test_adapter_of_another_base_stops_the_run(tmp_path):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "unsloth/gemma-2-27b-bnb-4bit",
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = helpers.records.model_source(str(tmp_path))
    helpers.records.check_adapter(adapter, {"name": "unsloth/gemma-2-27b-bnb-4bit"})
    with pytest.raises(RecipeError, match=r"trained on unsloth/gemma-2-27b-bnb-4bit, not on google/gemma-2-27b"):
        helpers.records.check_adapter(adapter, {"name": "google/gemma-2-27b"})


def test_adapter_of_a_base_that_was_moved(tmp_path):
    """The same files under another name are the same base; other files are not."""
    for name, weights in {"elsewhere": "abc", "moved": "abc", "other": "def", "adapter": "ghi"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(weights)
    base = helpers.records.model_source(str(tmp_path / "elsewhere"))
    helpers.records.write(tmp_path / "adapter", helpers.records.make("03_sft", {"model": base}, {}, []))
    adapter = helpers.records.model_source(str(tmp_path / "adapter"))
    helpers.records.check_adapter(adapter, helpers.records.model_source(str(tmp_path / "moved")))
    with pytest.raises(RecipeError, match=r"trained on .*/elsewhere, not on .*/other"):
        helpers.records.check_adapter(adapter, helpers.records.model_source(str(tmp_path / "other")))
