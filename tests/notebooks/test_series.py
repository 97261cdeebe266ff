"""Other base models: the series on tiny checkpoints of each family, and what is refused or answered in another way."""

import subprocess
import sys

import families
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from helpers import RecipeError

# `python tests/families.py` runs all; these show every kind of tokenizer, attention, layer and wrapper once.
SHOWN = ("gemma2", "llama3", "llm-jp", "phi3", "gemma4", "qwen3.5", "qwen3 moe", "ministral3")


@pytest.mark.parametrize("family", SHOWN)
def test_the_series_works(family, tmp_path):
    """Notebooks 01, 03 and 04; then, in float32, slots and batches against a loop without cache, and a row of texts."""
    row = families.table_row(family, "transformers", tmp_path)
    assert row["01, 03, 04"] == "yes"
    assert row["<bos> per text"] == ("0" if family.startswith(("qwen", "phi")) else "1")
    assert row["untrained matrices"] == 0
    assert row["batches equal to the loop"] == "18 of 18"
    if family == "qwen3.5":
        assert row["row against texts alone"] == "padded" and "slots equal to the loop" not in row
    else:
        assert row["slots equal to the loop"] == "18 of 18" and float(row["row against texts alone"]) < 1e-3
    if family == "qwen3 moe":  # two matrices in each of three layers, beside which none is still zero
        weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        experts = [weight for name, weight in weights.items() if ".experts." in name and "lora_B" in name]
        assert len(experts) == 2 * 3 and all(weight.any() for weight in experts)
    card = (tmp_path / "run/quantized/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "Gemma" not in card.replace("Gemma3", "")


def test_the_series_works_with_unsloth():
    """In a process of its own, because unsloth patches the libraries."""
    command = [sys.executable, "tests/families.py", "--engine", "unsloth", "--sizes", "3", "--", "gemma3", "qwen3"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "unsloth" in line]
    assert len(rows) == 2
    assert all("| yes |" in row and row.endswith("| 0 | 18 of 18 |") for row in rows), printed


def config_only(kind, folder, **values):
    """A folder that holds a config and a tokenizer, but no weights: what is refused here is refused before them."""
    checkpoint = families.make_checkpoint(kind, folder, **values)
    for weights in checkpoint.glob("*.safetensors"):
        weights.unlink()
    return str(checkpoint)


def test_what_cannot_be_trained_is_refused_before_the_download(tmp_path):
    """Notebook 01 stops before it looks for weights."""
    model = config_only("RwkvConfig", tmp_path / "base")
    with pytest.raises(RecipeError, match=r"rwkv models do not fit this recipe: LoRA does not reach rwkv\.blocks"):
        families.run_notebook("01_quantize", output_dir=str(tmp_path / "run"), base_model=model)


def test_notebook_04_refuses_before_weights_are_loaded(tmp_path):
    model = config_only("qwen3", tmp_path / "base", max_position_embeddings=512)
    values = {"output_dir": str(tmp_path / "run"), "model": model, "adapter": "none"}
    with pytest.raises(RecipeError, match=r"at most 512 tokens: lower max_seq_length \(1024\)"):
        families.run_notebook("04_rag_inference", **values)


def test_notebook_01_refuses_weights_that_are_quantized_already(smoke, tmp_path):
    with pytest.raises(RecipeError, match="is quantized already: name its weights in 16 bit"):
        families.run_notebook("01_quantize", output_dir=str(tmp_path), base_model=str(smoke / "quantized"))
