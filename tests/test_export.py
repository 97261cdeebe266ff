"""export.py: base + adapter as one model in bf16, the same model."""

import json
import re
import shutil
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_hub import SHA, call, hub  # noqa: F401, a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Phi3Config

import export
import helpers
from helpers import RecipeError

TINY = ROOT / "data/tiny/gemma2"


def all_tensors(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def save_adapter(base, folder, seed=0, **config):
    """A LoRA adapter with random matrices for all linear layers of a model folder, and a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def phi3(folder):
    """Fused projections, and embeddings that are not tied to the output."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Phi3Config(**sizes, vocab_size=500, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def pack(source, folder, quant_type, double):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    helpers.models.keep_weights_unpacked(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bf16", "phi3", "nf4", "nf4 double", "fp4", "fp4 double"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_weight_is_what_peft_would_merge(kind, rslora, tmp_path):
    """transformers dequantizes, peft merges, all at once and in float32: rounded to bf16 it is what was written."""
    base = TINY if kind == "bf16" else phi3(tmp_path / "phi3")
    adapter = save_adapter(TINY if "4" in kind else base, tmp_path / "adapter", use_rslora=rslora)
    if "4" in kind:
        base = pack(TINY, tmp_path / "base", kind[:3], "double" in kind)
    export.merge(str(base), adapter, tmp_path / "merged")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if "4" in kind:
        helpers.models.keep_weights_unpacked(model)
        model = model.dequantize()
    expected = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload().bfloat16().state_dict()
    found = all_tensors(tmp_path / "merged")
    assert found.keys() == {name for name in expected if name != "lm_head.weight" or kind == "phi3"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-6)  # one step of bf16
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()) and again.dtype == torch.bfloat16
    assert not hasattr(again.config, "quantization_config")


def test_without_a_record_it_is_unfinished_and_old_files_are_gone(tmp_path):
    adapter, merged = save_adapter(TINY, tmp_path / "adapter"), tmp_path / "merged"
    shutil.copytree(TINY, merged)
    helpers.records.write(merged, helpers.records.make("03_sft", {}, {}, []))
    export.merge(str(TINY), adapter, merged)
    with pytest.raises(RecipeError, match="merged is unfinished"):
        helpers.records.model_source(str(merged))
    assert sorted(path.name for path in merged.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("small", ["memory", "disk"])
def test_too_little_memory_or_disk_is_told_before_anything_is_deleted(small, tmp_path, monkeypatch):
    adapter, base, merged = save_adapter(TINY, tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged"
    shutil.copytree(TINY, base)
    shutil.copytree(TINY, merged)
    config = json.loads((TINY / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 2**40}))
    if small == "disk":
        monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=2**60))
    with pytest.raises(RecipeError, match=rf"merged takes 281475\.0 GB, and the {small} has .* GB: make room"):
        export.merge(str(base), adapter, merged)
    assert (merged / "model.safetensors").is_file()


def test_a_base_on_the_hub_gives_the_same_files(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    hub.files["me/base"] = {path.name: path.read_bytes() for path in TINY.iterdir()}
    adapter = save_adapter(TINY, tmp_path / "adapter")
    load = f"helpers.models.load('me/base', 'transformers', max_seq_length=64, revision={SHA!r})"
    merge = f"import export; export.merge('me/base', {str(adapter)!r}, {str(tmp_path / 'merged')!r}, {SHA!r})"
    done = call(hub, f"{load}; {merge}")
    assert done.returncode == 0, done.stderr
    export.merge(str(TINY), adapter, tmp_path / "expected")
    found, expected = (helpers.files.hashes(tmp_path / name) for name in ("merged", "expected"))
    differing = {name for name in expected if found.get(name) != expected[name]}
    assert differing <= {"tokenizer_config.json"}  # in which transformers notes whether it was offline


@pytest.fixture
def run_dir(quantized, tmp_path):
    """A finished training whose adapter changes far more than rounding does."""
    folder = save_adapter(str(quantized), tmp_path / "run/adapter")
    AutoTokenizer.from_pretrained(quantized).save_pretrained(folder)
    inputs = {"model": helpers.records.model_source(str(quantized), finished=True)}
    inputs["train_data"] = helpers.records.data_source("data/sample/qa.jsonl")
    helpers.records.write(folder, helpers.records.make("03_sft", inputs, {}, []))
    return folder.parent


def test_export_writes_a_finished_model_with_card_and_record(quantized, run_dir, capsys):
    export.export(run_dir)
    record = helpers.records.check(run_dir / "merged", finished=True)
    assert record["inputs"]["model"] == helpers.records.model_source(str(quantized))
    assert record["inputs"]["adapter"] == helpers.records.model_source(str(run_dir / "adapter"))
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= record["files"].keys()
    card = ModelCard.load(run_dir / "merged/README.md")
    assert card.data.base_model == "data/tiny/gemma2" and "data/sample/qa.jsonl" in card.text
    assert re.search(r"logits \| differ from base \+ adapter by 0\.\d{3} standard deviations", card.text)
    printed = dict(re.findall(r"^(.+): ([\d.]+) standard deviations from base", capsys.readouterr().out, re.MULTILINE))
    assert float(printed["base alone"]) > 10 * float(printed["merged"])


def test_the_exported_model_answers_like_base_and_adapter(quantized, run_dir):
    """In float32, but for the rounding of its weights to bf16: the first choice of base + adapter is its own, too."""
    export.merge(str(quantized), run_dir / "adapter", run_dir / "merged")
    load = partial(helpers.models.load, engine="transformers", max_seq_length=256, dtype="float32")
    (trained, tokenizer), (alone, _) = load(str(quantized)), load(str(quantized))
    trained, (model, _) = helpers.models.load_adapter(trained, str(run_dir / "adapter")), load(str(run_dir / "merged"))
    gaps = {"merged": [], "base alone": []}
    for task in helpers.files.load_rows(ROOT / "data/sample/tasks.jsonl")[:5]:
        ids = torch.tensor([helpers.encode(tokenizer, helpers.sft_text(task["input"], task["output"], "")).ids])
        with torch.no_grad():
            expected = trained(ids).logits
            for name, other in {"merged": model, "base alone": alone}.items():
                gaps[name].append(((other(ids).logits - expected).abs().mean() / expected.std()).item())
    assert max(gaps["merged"]) < 0.02 and min(gaps["base alone"]) > 0.2, gaps


def test_another_model_in_the_place_of_the_merged_one_is_refused(quantized, run_dir):
    """As if merging had lost the adapter."""
    export.merge(str(quantized), save_adapter(TINY, run_dir / "other", seed=7), run_dir / "merged")
    with pytest.raises(RecipeError, match="merged gives other logits than base \\+ adapter: use the adapter instead"):
        export.distances(str(quantized), str(run_dir / "adapter"), run_dir / "merged")


def test_an_export_without_a_finished_training_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/adapter does not exist: run the notebook that writes it"):
        export.export(tmp_path)
