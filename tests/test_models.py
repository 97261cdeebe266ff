"""Section 7 of helpers.py: the model that is loaded must be the model that was named."""

import importlib.util
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file

import colab_setup
import helpers
from helpers import RecipeError


@pytest.fixture
def two_models(tmp_path):
    """`m-bnb-4bit`, which is not quantized, and beside it another model `m`, to which unsloth redirects on a CPU."""
    for name in ("m-bnb-4bit", "m"):
        shutil.copytree("data/tiny/gemma2", tmp_path / name)
    return tmp_path / "m-bnb-4bit"


def test_another_model_than_named_stops_the_run(two_models):
    with pytest.raises(RecipeError, match=rf"unsloth loaded {two_models.parent}/m instead of {two_models}"):
        helpers.models.load(str(two_models), "unsloth", max_seq_length=64)


def test_the_plain_engine_loads_what_was_named(two_models):
    model, _ = helpers.models.load(str(two_models), "transformers", max_seq_length=64)
    assert model.config._name_or_path == str(two_models)


def test_unsloth_knows_a_repository_of_its_own_for_gemma_2_27b():
    """Why the guard is needed: on a GPU unsloth puts this repository in the place of google/gemma-2-27b."""
    mapper = Path(importlib.util.find_spec("unsloth").origin).parent / "models" / "mapper.py"
    (pairs,) = re.findall(r'"(unsloth/gemma-2-27b-bnb-4bit)"\s*: \(([^)]*)\)', mapper.read_text(encoding="utf-8"))
    assert "google/gemma-2-27b" in pairs[1]


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "holds no config.json"),
        ("outputs/nowhere/quantized", "no such folder"),
        ("nobody/nothing", "the hub cannot be reached"),
    ],
)
def test_missing_models(name, message):
    with pytest.raises(RecipeError, match=message):
        helpers.hub.find_model(name)


def test_full_size_model_without_a_gpu(tmp_path):
    """Refused from config.json alone, before 54 GB are downloaded or read."""
    config = json.loads((ROOT / "data/tiny/gemma2/config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "vocab_size": 256_000}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"no GPU here, and the model has 27\.2 billion weights"):
        helpers.models.load(str(tmp_path), "transformers", max_seq_length=64)


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


def without_a_tensor(source: Path, target: Path) -> str:
    """A copy of a folder whose weights lack the last tensor; returns that tensor's name."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("record.json"))
    (path,) = target.glob("*model.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def test_a_model_without_one_of_its_tensors_stops_the_run(tmp_path):
    """transformers would fill it with random numbers and go on."""
    without_a_tensor(ROOT / "data/tiny/gemma2", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"model: 1 tensors are missing, such as model\."):
        helpers.models.load(str(tmp_path / "model"), "transformers", max_seq_length=64)


def test_an_adapter_without_one_of_its_tensors_stops_the_run(smoke, tmp_path):
    without_a_tensor(smoke / "adapter", tmp_path / "adapter")
    model, _ = helpers.models.load(str(smoke / "quantized"), "transformers", max_seq_length=64)
    with pytest.raises(RecipeError, match=r"adapter: 1 of its tensors are missing"):
        helpers.models.load_adapter(model, str(tmp_path / "adapter"))
    helpers.models.load_adapter(
        helpers.models.load(str(smoke / "quantized"), "transformers", max_seq_length=64)[0], str(smoke / "adapter")
    )


@pytest.mark.parametrize(("number", "visible", "chosen"), [(None, "0", []), ("1", None, [1])])
def test_a_process_uses_one_gpu(monkeypatch, number, visible, chosen):
    """A single process sees the first alone; of several each takes its own, and accelerate has to see them all."""
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is set back after the test
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if number:
        monkeypatch.setenv("LOCAL_RANK", number)
    helpers.machine.start_engine("transformers")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert taken == chosen
