"""The outlook: rates and hours by card, and what to change where a training does not fit."""

from functools import partial

import pytest
import yaml
from conftest import ROOT
from test_machine import GEOMETRY, config
from transformers import Gemma3TextConfig, Qwen3Config

import helpers

NAMES = {  # as nvidia-smi names the cards of benchmarks/results/cost.md, with their free memory in GiB
    "H100 80 GB": ("NVIDIA H100 80GB HBM3", 79.1),
    "A100 80 GB": ("NVIDIA A100-SXM4-80GB", 79.2),
    "A100 40 GB": ("NVIDIA A100-SXM4-40GB", 39.4),
    "G4 96 GB": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.9),
    "L4 24 GB": ("NVIDIA L4", 22.0),
    "T4 16 GB": ("Tesla T4", 14.6),
}


@pytest.mark.parametrize(("free_gib", "measured"), [(38, 3053), (130, 3931)])
def test_the_rates_of_an_h200_are_those_measured(free_gib, measured):
    """benchmarks/results/training.md; the formula knows them only from the data sheet."""
    assert helpers.outlook.training_rate(27.2, "NVIDIA H200", free_gib, "transformers") == pytest.approx(
        measured, rel=0.1
    )


@pytest.mark.parametrize("card", ["NVIDIA GeForce RTX 4090", "NVIDIA L40S", "NVIDIA A10G", "NVIDIA H100 PCIe", ""])
def test_an_unknown_card_has_no_estimate(card):
    assert helpers.outlook.slowdown(card) is helpers.outlook.answering_seconds(27.2, card, 40) is None
    gpu = {"name": card, "free_gib": 40.0, "compute_capability": 8.9}
    lines = helpers.outlook.training_lines(gpu, config("google/gemma-2-2b"), "transformers", True)
    assert lines[-1] == f"no estimate of the hours: the rates of {card} are not known"


def test_the_lines_say_the_way_the_rate_and_that_it_is_an_estimate():
    name, free_gib = NAMES["A100 40 GB"]
    gpu = {"name": name, "free_gib": free_gib, "compute_capability": 8.0}
    way, estimate = helpers.outlook.training_lines(gpu, config("google/gemma-2-27b"), "transformers", True)
    assert way.startswith("rows without padding, with a compiled attention")
    assert estimate.startswith("estimate, computed from an H100: 1,01") and "so 5.5 hours for one pass" in estimate
    assert helpers.outlook.training_lines(gpu, config("google/gemma-2-27b"), "unsloth", False)[0].startswith(
        "texts are padded"
    )


def test_what_is_advised_fits():
    """A training that does not fit an A100 with 40 GB is divided until it does; a T4 is too small at any rate."""
    need = partial(helpers.shapes.estimate_memory, config("google/gemma-2-27b"), four_bit=True, r=64, length=2048)
    free_gib = NAMES["A100 40 GB"][1]
    assert not helpers.machine.fits(need(batch_size=16), free_gib)
    advice = helpers.outlook.remedy(need, free_gib, 16, 2)
    assert advice == "set per_device_train_batch_size=8 and gradient_accumulation_steps=4"
    assert helpers.machine.fits(need(batch_size=8), free_gib)
    assert helpers.outlook.remedy(need, NAMES["T4 16 GB"][1], 4, 8).startswith("not even one text at a time fits")


def test_the_machine_cell_says_it_all(monkeypatch, capsys):
    name, free_gib = NAMES["L4 24 GB"]
    gpu = {"name": name, "free_gib": free_gib, "compute_capability": 8.9}
    monkeypatch.setattr(helpers.machine, "find_gpu", lambda: gpu)
    nine = config("google/gemma-2-9b")
    need = partial(helpers.shapes.estimate_memory, nine, four_bit=True, r=64, length=2048)
    helpers.outlook.report_training(nine, ["torch"], need, ("transformers", True), (32, 1))
    said = capsys.readouterr().out
    assert "NVIDIA L4, 22.0 GiB free" in said and "tokens/s, so at least 6." in said
    assert "IT WILL NOT FIT: set per_device_train_batch_size=" in said and "or choose a larger GPU" in said
    helpers.outlook.report_answering(nine)
    assert "minutes for 100 tasks" in capsys.readouterr().out
    monkeypatch.setattr(helpers.machine, "find_gpu", lambda: None)
    helpers.outlook.report_training(nine, ["torch"], need, ("transformers", True), (32, 1))
    helpers.outlook.report_answering(nine)
    assert "estimate" not in capsys.readouterr().out


def small(kind, vocabulary, *sizes):
    return kind(vocab_size=vocabulary, tie_word_embeddings=True, **dict(zip(GEOMETRY, sizes, strict=True)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("google/gemma-2-2b", config("google/gemma-2-2b")),
        ("Qwen/Qwen3-1.7B-Base", small(Qwen3Config, 151_936, 2048, 6144, 28, 16, 8, 128)),
        ("Qwen/Qwen3-4B-Base", small(Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, 128)),
        ("google/gemma-3-4b-pt", small(Gemma3TextConfig, 262_208, 2560, 10240, 34, 8, 4, 256)),
        ("Qwen/Qwen3-8B-Base", config("Qwen/Qwen3-8B-Base")),
    ],
)
def test_the_run_file_of_the_t4_says_what_fits(model, shape):
    text = (ROOT / "data/runs/t4.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)["03_sft"]
    size = {"r": values["r"], "length": values["max_seq_length"], "batch_size": values["per_device_train_batch_size"]}
    need = helpers.shapes.estimate_memory(shape, four_bit=True, **size)
    assert f"{model} {sum(need.values()):.1f}" in text and helpers.machine.fits(need, NAMES["T4 16 GB"][1])


def test_the_run_file_of_the_t4_says_how_long_it_takes():
    text = (ROOT / "data/runs/t4.yaml").read_text(encoding="utf-8")
    for billions, said in ((8.2, "33 hours"), (4.0, "weights 16 hours"), (2.6, "2.6 billion 11 hours")):
        hours = 40e6 / helpers.outlook.training_rate(billions, *NAMES["T4 16 GB"], "unsloth") / 3600
        assert said in text.replace("\n# ", " ") and f"{hours:.0f} hours" in said
