"""What the smoke run leaves behind must be right, not only there."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers


@pytest.fixture(scope="module")
def quantized(smoke):
    model, tokenizer = helpers.models.load("outputs/smoke/quantized", "transformers", max_seq_length=512)
    return model, tokenizer


@pytest.fixture(scope="module")
def inputs(quantized):
    return quantized[1]("### 質問:\n日本で一番高い山はどこですか。\n\n### 回答:\n", return_tensors="pt")


def test_quantized_model_is_nf4_with_double_quantization(quantized):
    states = [p.quant_state for p in quantized[0].parameters() if hasattr(p, "quant_state")]
    assert len(states) == 7 * quantized[0].config.num_hidden_layers
    assert {state.quant_type for state in states} == {"nf4"}
    assert all(state.nested for state in states)
    assert quantized[0].model.embed_tokens.weight.dtype == torch.bfloat16


def test_records_lead_back_to_base_and_data_and_name_every_file(smoke):
    for name in ("quantized", "filtered_magpie.jsonl", "adapter", "output.jsonl"):
        assert helpers.records.check(smoke / name, finished=True)["files"], name
    found = helpers.records.origins(helpers.records.read(smoke / "output.jsonl")["inputs"])
    assert found["model"]["name"] == "data/tiny/gemma2"
    assert found["dataset"]["name"] == "data/sample/magpie.jsonl"
    assert found["qa_data"]["name"] == "data/sample/qa.jsonl"


@torch.no_grad()
def test_reload_gives_equal_logits(quantized, inputs):
    again, _ = helpers.models.load("outputs/smoke/quantized", "transformers", max_seq_length=512)
    assert torch.equal(again(**inputs).logits, quantized[0](**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_attention_applies_softcapping(smoke, inputs, engine):
    """In float32 the loaded model agrees with eager attention; sdpa, transformers' default, leaves the softcap out."""
    folder, float32 = "outputs/smoke/quantized", {"dtype": torch.float32}
    model, _ = helpers.models.load(folder, engine, max_seq_length=512, dtype="float32")
    eager, sdpa = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, **float32) for name in ("eager", "sdpa")
    )
    helpers.models.keep_weights_unpacked(eager)
    helpers.models.keep_weights_unpacked(sdpa)
    assert model.config._attn_implementation != "sdpa"
    expected = eager(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() < 1e-3
    assert (sdpa(**inputs).logits - expected).abs().max() > 1e-2


def test_training_lowered_the_loss(smoke):
    metrics = json.loads((smoke / "sft_metrics.json").read_text(encoding="utf-8"))
    assert metrics["last_loss"] < metrics["first_loss"] - 0.1
    assert metrics["steps"] == len(metrics["loss"])


def test_values_of_the_run_file_reach_training_and_inference(smoke):
    """Neither r nor k is the default."""
    config = json.loads((smoke / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["base_model_name_or_path"]) == (8, "outputs/smoke/quantized")
    training, inference = (
        json.loads((smoke / f"{name}_metrics.json").read_text(encoding="utf-8")) for name in ("sft", "inference")
    )
    assert training["attention"] != "sdpa"
    assert set(inference["shots"].values()) == {3}
    assert inference["answered"] == inference["tasks"] == 10


@torch.no_grad()
def test_adapter_changes_the_output(smoke, inputs):
    model, _ = helpers.models.load("outputs/smoke/quantized", "transformers", max_seq_length=512)
    before = model(**inputs).logits
    adapted = PeftModel.from_pretrained(model, smoke / "adapter")
    assert (adapted(**inputs).logits - before).abs().max() > 0.1
    weights = load_file(smoke / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 7 * model.config.num_hidden_layers
    assert all(tensor.any() for tensor in weights.values()), "a LoRA matrix was never trained"


def test_saved_tokenizer_adds_exactly_one_bos(smoke):
    for folder in ("quantized", "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(smoke / folder)
        ids = tokenizer(helpers.build_prompt("課題", [], "2024"))["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.chat_template != helpers.models.GEMMA_CHAT_TEMPLATE  # the adapter's asks as it was trained
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "課題"}], tokenize=False)
    assert asked == f"<bos>{helpers.sft_text('課題', '', '')}"
    quantized = AutoTokenizer.from_pretrained(smoke / "quantized")
    assert quantized.chat_template == helpers.models.GEMMA_CHAT_TEMPLATE


def test_output_has_one_valid_line_a_task_in_order(smoke):
    tasks = helpers.files.load_tasks("data/sample/tasks.jsonl")
    rows = helpers.files.load_rows(smoke / "output.jsonl")
    assert [row["task_id"] for row in rows] == [task["task_id"] for task in tasks]
    assert [row["input"] for row in rows] == [task["input"] for task in tasks]
    assert all(row["output"].strip() and "### 質問" not in row["output"] for row in rows)
    assert all(set(row) == {"task_id", "input", "output"} for row in rows)


def test_the_readers_question_is_answered_with_and_without_shots(smoke):
    cells = json.loads((smoke / "notebooks/04_rag_inference.ipynb").read_text(encoding="utf-8"))["cells"]
    (ask,) = [cell for cell in cells if cell["id"] == "ask"]
    said = "".join("".join(output["text"]) for output in ask["outputs"] if output.get("name") == "stdout")
    with_shots, without = said.removeprefix("With 3 shots:\n").split("Without shots:\n")
    assert with_shots.strip() and without.strip() and with_shots != without
    assert "<eos>" not in said and "### 質問" not in said


def test_smoke_run_is_scored(smoke):
    scores = json.loads((smoke / "scores.json").read_text(encoding="utf-8"))
    tasks = helpers.files.load_tasks("data/sample/tasks.jsonl")
    assert [row["task_id"] for row in scores["per_task"]] == [row["task_id"] for row in tasks]
    assert all(0 < row["nll"] < 10 and 0 <= row["chrf"] < 100 for row in scores["per_task"])
    assert scores["judge"] is None
    assert {copy["task_id"] for copy in scores["near_duplicates"]} < {row["task_id"] for row in tasks}


def test_the_card_names_base_and_data(smoke):
    card = ModelCard.load(smoke / "adapter" / "README.md")
    assert card.data.base_model == "data/tiny/gemma2"
    assert "data/sample/magpie.jsonl" in card.text and "data/sample/qa.jsonl" in card.text
