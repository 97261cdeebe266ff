"""Colab's secrets and Drive, the fit estimate, data licences and cards."""

import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import DatasetCard, ModelCard
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

import helpers

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


def config(name: str) -> PreTrainedConfig:
    if "Swallow" in name:
        name = "google/gemma-2-27b"
    if name in GEMMA:
        return Gemma2Config(vocab_size=256_000, **dict(zip(GEOMETRY, GEMMA[name], strict=True)))
    if name.startswith("Qwen/"):
        sizes, kind, vocabulary = (4096, 12288, 36, 32, 8, 128), Qwen3Config, 151_936
    else:  # by the card of llm-jp-4-8b
        sizes, kind, vocabulary = (4096, 14336, 32, 32, 8, 128), LlamaConfig, 196_608
    return kind(vocab_size=vocabulary, tie_word_embeddings=False, **dict(zip(GEOMETRY, sizes, strict=True)))


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
        need = helpers.models.estimate_memory(config("google/gemma-2-27b"), four_bit=True, r=64, **settings)
        assert sum(need.values()) == pytest.approx(measured, rel=0.07)

    @pytest.mark.parametrize(
        ("name", "settings", "measured"),
        [
            # benchmarks/RESULTS.md, one H100: the longest row of 16 texts held 12,346 tokens.
            ("Qwen/Qwen3-8B-Base", {"r": 64, "batch_size": 16, "length": 771}, 14.95),
            ("Qwen/Qwen3-8B-Base", {"slots": 24, "columns": 3192}, 17.93),
        ],
    )
    def test_agrees_with_the_measured_peaks_of_another_family(self, name, settings, measured):
        need = helpers.models.estimate_memory(config(name), four_bit=True, **settings)
        assert sum(need.values()) == pytest.approx(measured, rel=0.08)

    def test_unquantized_weights_cost_more(self):
        need = helpers.models.estimate_memory(config("google/gemma-2-27b"), four_bit=False, r=64)
        assert need["weights"] == pytest.approx(27.2e9 * 2 / 2**30, rel=0.01)

    @pytest.mark.parametrize(
        ("run_file", "free_gib"),
        [
            ("t4", 14.6),
            ("l4", 22.0),
            ("a100", 39.0),
            ("h100", 79.0),
            ("seed2024", 39.0),
            ("g4", 94.0),
            ("swallow27b", 39.0),
            ("llmjp4-8b", 22.0),
            ("qwen3-8b", 22.0),
        ],
    )
    def test_run_files_fit_their_gpus(self, run_file, free_gib):
        run = yaml.safe_load((ROOT / f"data/runs/{run_file}.yaml").read_text(encoding="utf-8"))
        values = {"r": 64, "max_seq_length": 2048, "per_device_train_batch_size": 4, "engine": "transformers"}
        values |= {"base_model": "google/gemma-2-27b"} | run["01_quantize"] | run["03_sft"]
        need = helpers.models.estimate_memory(
            config(values["base_model"]),
            four_bit=True,
            r=values["r"],
            batch_size=values["per_device_train_batch_size"],
            length=values["max_seq_length"] // (2 if values["engine"] == "transformers" else 1),
        )
        gpu = {"name": run_file, "free_gib": free_gib, "compute_capability": 7.5 if run_file == "t4" else 8.0}
        assert helpers.machine.fit_report(gpu, need, "")[-1] == "it fits"

    def test_report_names_what_to_change(self):
        t4 = {"name": "Tesla T4", "free_gib": 14.6, "compute_capability": 7.5}
        need = helpers.models.estimate_memory(
            config("google/gemma-2-27b"), four_bit=True, r=64, batch_size=4, length=2048
        )
        lines = helpers.machine.fit_report(t4, need, "lower the batch")
        assert lines[0] == "Tesla T4, 14.6 GiB free, bfloat16: no, float16 is used"
        assert lines[-1] == "IT WILL NOT FIT: lower the batch, or choose a larger GPU"
        assert "no GPU" in helpers.machine.fit_report(None, need, "")[-1]


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

    def test_smoke_run_records_its_lineage(self, smoke):
        card = ModelCard.load(smoke / "adapter" / "README.md")
        assert card.data.base_model == "data/tiny/gemma2"
        assert "data/sample/magpie.jsonl" in card.text and "data/sample/qa.jsonl" in card.text


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
        assert helpers.machine.secret("HF_TOKEN") == "value of HF_TOKEN"
        colab.userdata.get = lambda name: time.sleep(60)  # no browser tab answers
        started = time.perf_counter()
        assert helpers.machine.secret("HF_TOKEN", seconds=0.2) == ""
        assert time.perf_counter() - started < 10

    def test_drive_is_mounted_only_if_named(self, colab, capsys):
        mounted = []
        colab.drive.mount = mounted.append
        assert helpers.machine.place_outputs("outputs/full", "") == "outputs/full"
        assert "a disconnect loses outputs/full" in capsys.readouterr().out
        assert not mounted
        placed = helpers.machine.place_outputs("outputs/full", "recipe")
        assert Path(placed) == Path("/content/drive/MyDrive/recipe/outputs/full")
        assert helpers.machine.place_outputs(placed, "recipe") == placed  # the cell may run twice
        assert mounted == ["/content/drive"] * 2

    def test_elsewhere_the_folder_stays(self, tmp_path):
        assert helpers.machine.place_outputs(str(tmp_path), "recipe") == str(tmp_path)
