"""Other base models: the series on tiny checkpoints of each family, and what is refused or answered in another way."""

import subprocess
import sys

import families
import pytest
from conftest import ROOT

from helpers import RecipeError


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_series_works(family, tmp_path):
    """Notebooks 01, 03 and 04; then, in float32, slots and batches against a loop without cache, and a row of texts."""
    row = families.table_row(family, "transformers", tmp_path)
    assert row["01, 03, 04"] == "yes"
    assert row["<bos> per text"] == ("0" if family.startswith(("qwen", "phi")) else "1")
    assert row["untrained matrices"] == 0
    assert row["slots equal to the loop"] == row["batches equal to the loop"] == "6 of 6"
    assert float(row["row against texts alone"]) < 1e-3
    card = (tmp_path / "run/quantized/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "Gemma" not in card.replace("Gemma3", "")


def test_the_series_works_with_unsloth():
    """In a process of its own, because unsloth patches the libraries."""
    command = [sys.executable, "tests/families.py", "--engine", "unsloth", "gemma3", "qwen3"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "unsloth" in line]
    assert len(rows) == 2
    assert all("| yes |" in row and row.endswith("| 0 | 6 of 6 |") for row in rows), printed


def config_only(kind, folder, **values):
    """A folder that holds a config and a tokenizer, but no weights: what is refused here is refused before them."""
    checkpoint = families.make_checkpoint(kind, folder, **values)
    for weights in checkpoint.glob("*.safetensors"):
        weights.unlink()
    return str(checkpoint)


def test_experts_would_stay_untrained(tmp_path):
    """Notebook 03 stops before it looks for weights, and lists them."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = config_only("Qwen3MoeConfig", tmp_path / "base", **sizes)
    with pytest.raises(RecipeError, match=r"does not reach model\.layers\.\*\.mlp\.experts\.down_proj, .*untrained"):
        families.run_notebook(
            "03_sft", output_dir=str(tmp_path / "run"), model=model, train_data="data/sample/qa.jsonl"
        )


def test_notebook_04_refuses_before_weights_are_loaded(tmp_path):
    model = config_only("qwen3", tmp_path / "base", max_position_embeddings=512)
    values = {"output_dir": str(tmp_path / "run"), "model": model, "adapter": "none"}
    with pytest.raises(RecipeError, match=r"at most 512 tokens: lower max_seq_length \(1024\)"):
        families.run_notebook("04_rag_inference", **values)


def test_notebook_01_refuses_weights_that_are_quantized_already(smoke, tmp_path):
    with pytest.raises(RecipeError, match="is quantized already: name its weights in 16 bit"):
        families.run_notebook("01_quantize", output_dir=str(tmp_path), base_model=str(smoke / "quantized"))
