"""Colab's secrets and Drive, the fit estimate, data licences and cards."""

import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import DatasetCard, ModelCard

import helpers

QUANTIZED = {"vocab_size": 256_000, "quantization_config": {"quant_method": "bitsandbytes"}}
GEMMA = {  # hidden, inner, layers, heads, key heads, width of a head
    "google/gemma-2-27b": (4608, 36864, 46, 32, 16, 128),
    "google/gemma-2-9b": (3584, 14336, 42, 16, 8, 256),
    "google/gemma-2-2b": (2304, 9216, 26, 8, 4, 256),
}
GEOMETRY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def config(name: str) -> dict:
    return QUANTIZED | dict(zip(GEOMETRY, GEMMA[name], strict=True))


class TestFit:
    @pytest.mark.parametrize(
        ("settings", "measured"),
        [
            # benchmarks/RESULTS.md: 27B, r = 64. Rows of 8 and 16 texts of 631 tokens in the mean; the longest row of
            # a step makes the peak and holds about 6,700 and 11,700 (mean over random orders of the same lengths).
            ({"batch_size": 8, "length": 838}, 26.9),
            ({"batch_size": 16, "length": 731}, 31.3),
            ({"slots": 3, "columns": 3400}, 23.4),
            ({"slots": 46, "columns": 3400}, 78.0),
        ],
    )
    def test_agrees_with_the_measured_peaks(self, settings, measured):
        need = helpers.estimate_memory(config("google/gemma-2-27b"), r=64, **settings)
        assert sum(need.values()) == pytest.approx(measured, rel=0.07)

    def test_unquantized_weights_and_plain_training_cost_more(self):
        need = helpers.estimate_memory(config("google/gemma-2-27b") | {"quantization_config": None}, r=64)
        assert need["weights"] == pytest.approx(27.2e9 * 2 / 2**30, rel=0.01)
        eager = helpers.estimate_memory(config("google/gemma-2-27b"), r=64, batch_size=4, length=2048, eager=True)
        assert sum(eager.values()) > sum(
            helpers.estimate_memory(config("google/gemma-2-27b"), r=64, batch_size=4, length=2048).values()
        )

    @pytest.mark.parametrize(
        ("run_file", "free_gib"), [("t4", 14.6), ("l4", 22.0), ("a100", 39.0), ("h100", 79.0), ("seed2024", 39.0)]
    )
    def test_run_files_fit_their_gpus(self, run_file, free_gib):
        run = yaml.safe_load((ROOT / f"data/runs/{run_file}.yaml").read_text(encoding="utf-8"))
        values = {"r": 64, "max_seq_length": 2048, "per_device_train_batch_size": 4, "padding_free": False}
        values |= {"engine": "unsloth", "base_model": "google/gemma-2-27b"} | run["01_quantize"] | run["03_sft"]
        need = helpers.estimate_memory(
            config(values["base_model"]),
            r=values["r"],
            batch_size=values["per_device_train_batch_size"],
            length=values["max_seq_length"] // (2 if values["padding_free"] else 1),
            eager=values["engine"] == "transformers" and not values["padding_free"],
        )
        gpu = {"name": run_file, "free_gib": free_gib, "compute_capability": 7.5 if run_file == "t4" else 8.0}
        dtype = run["03_sft"].get("compute_dtype", "bfloat16")
        assert helpers.fit_report(gpu, need, dtype, "")[-1] == "it fits"

    def test_report_names_what_to_change(self):
        t4 = {"name": "Tesla T4", "free_gib": 14.6, "compute_capability": 7.5}
        need = helpers.estimate_memory(config("google/gemma-2-27b"), r=64, batch_size=4, length=2048)
        lines = helpers.fit_report(t4, need, "bfloat16", "lower the batch")
        assert lines[0] == "Tesla T4, 14.6 GiB free, bfloat16: no"
        assert 'compute_dtype = "float16"' in lines[2]
        assert lines[-1] == "IT WILL NOT FIT: lower the batch, or choose a larger GPU"
        assert "no GPU" in helpers.fit_report(None, need, "bfloat16", "")[-1]


class TestLicences:
    @pytest.mark.parametrize("licences", [["apache-2.0"], ["CC0-1.0"], ["mit", "cc-by-4.0"]])
    def test_permissive_ones_pass(self, licences):
        assert helpers.check_licence("a/b", licences) == ", ".join(licences).lower()

    @pytest.mark.parametrize(
        ("licences", "named"),
        [
            (["cc-by-sa-4.0"], "cc-by-sa-4.0"),
            ([], "unknown"),
            (["mit", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
            (["other"], "other"),
        ],
    )
    def test_others_stop_unless_allowed(self, licences, named):
        with pytest.raises(
            helpers.RecipeError, match=rf"^a/b: the licence {named} is not .* allow_licences = '{named}'$"
        ):
            helpers.check_licence("a/b", licences)
        assert named in helpers.check_licence("a/b", licences, f"x, {named}")

    def test_local_files_are_your_own_and_the_hub_is_asked_for_others(self):
        assert helpers.data_source("data/sample/qa.jsonl")["licence"] == "your own (local file)"
        with pytest.raises(helpers.RecipeError, match="nobody/nothing: its licence cannot be read"):
            helpers.data_source("nobody/nothing")

    def test_training_data_keeps_the_source_that_notebook_2_reported(self, tmp_path):
        source = {"data": "owner/set", "commit": "abc", "licence": "apache-2.0"}
        helpers.write_json(tmp_path / "filter_report.json", {"source": source})
        assert helpers.training_sources(str(tmp_path / "filtered_magpie.jsonl"), "mine.jsonl") == [
            source,
            {"data": "mine.jsonl", "commit": "", "licence": "your own (local file)"},
        ]


class TestCards:
    def test_model_card_names_base_and_data(self):
        card = ModelCard(helpers.model_card("T", "google/gemma-2-27b", ["peft"], {"r": 64}, ["owner/set"]))
        assert (card.data.base_model, card.data.datasets, card.data.license) == (
            "google/gemma-2-27b",
            ["owner/set"],
            "gemma",
        )
        assert "| r | 64 |" in card.text and "Gemma Terms of Use" in card.text

    def test_dataset_card_hands_the_licence_on(self):
        source = {"data": "owner/set", "commit": "abc", "licence": "apache-2.0"}
        card = DatasetCard(helpers.dataset_card("T", source, {"rows kept": "1 of 2"}))
        assert (card.data.license, card.data.source_datasets) == (["apache-2.0"], ["owner/set"])
        own = DatasetCard(helpers.dataset_card("T", helpers.data_source("data/sample/qa.jsonl"), {}))
        assert own.data.license is None

    def test_smoke_run_records_its_lineage(self, smoke):
        lineage = helpers.read_lineage(str(smoke / "adapter"))
        assert lineage["base_model"] == "data/tiny/gemma2"
        assert [source["data"] for source in lineage["data"]] == ["data/sample/magpie.jsonl", "data/sample/qa.jsonl"]
        card = ModelCard.load(smoke / "adapter" / "README.md")
        assert card.data.base_model == "data/tiny/gemma2"
        assert "data/sample/magpie.jsonl" in card.text


@pytest.fixture
def colab(monkeypatch):
    """The two functions of the package google.colab that are used; it exists on Colab alone."""
    package = types.ModuleType("google.colab")
    package.userdata, package.drive = types.SimpleNamespace(), types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return package


class TestColab:
    def test_secret_is_asked_for_and_does_not_block(self, colab, monkeypatch):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        colab.userdata.get = lambda name: f"value of {name}"
        assert helpers.get_secret("HF_TOKEN") == "value of HF_TOKEN"
        colab.userdata.get = lambda name: time.sleep(60)  # no browser tab answers
        started = time.perf_counter()
        assert helpers.get_secret("HF_TOKEN", seconds=0.2) == ""
        assert time.perf_counter() - started < 10

    def test_drive_is_mounted_only_if_named(self, colab, capsys):
        mounted = []
        colab.drive.mount = mounted.append
        assert helpers.place_outputs("outputs/full", "") == "outputs/full"
        assert "a disconnect loses outputs/full" in capsys.readouterr().out
        assert not mounted
        placed = helpers.place_outputs("outputs/full", "recipe")
        assert Path(placed) == Path("/content/drive/MyDrive/recipe/outputs/full")
        assert helpers.place_outputs(placed, "recipe") == placed  # the cell may run twice
        assert mounted == ["/content/drive"] * 2

    def test_elsewhere_the_folder_stays(self):
        assert helpers.place_outputs("outputs/full", "recipe") == "outputs/full"
