"""engine/models.py: the model that is loaded must be the model that was named."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import families
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_export import save_adapter
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    Gemma2Config,
    Qwen3MoeConfig,
)

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


def test_full_size_model_without_a_gpu(tmp_path):
    """Refused from config.json alone, before 54 GB are downloaded or read."""
    config = json.loads((ROOT / "data/tiny/gemma2/config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "vocab_size": 256_000}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"no GPU here, and the model has 27\.2 billion weights"):
        helpers.models.load(str(tmp_path), "transformers", max_seq_length=64)


def copy_with(source: Path, target: Path, change: Callable[[dict], object]) -> None:
    """A copy of a folder whose tensors were changed."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("record.json"))
    (path,) = target.glob("*model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lose_a_tensor(tensors: dict) -> None:
    del tensors[max(tensors)]


def test_a_model_without_one_of_its_tensors_stops_the_run(tmp_path):
    """transformers would fill it with random numbers and go on."""
    copy_with(ROOT / "data/tiny/gemma2", tmp_path / "model", lose_a_tensor)
    with pytest.raises(RecipeError, match=r"model: 1 tensors are missing, such as model\."):
        helpers.models.load(str(tmp_path / "model"), "transformers", max_seq_length=64)


@pytest.mark.parametrize(("dtype", "why"), [("bfloat16", "weights are damaged"), ("float16", "too small for it")])
def test_a_model_that_computes_no_finite_numbers_stops_the_run(tmp_path, dtype, why):
    """Gemma 3's numbers are beyond what float16 holds; all answers would be the first token of the vocabulary."""
    overflow = lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(math.inf)  # noqa: E731
    copy_with(ROOT / "data/tiny/gemma2", tmp_path / "model", overflow)
    with pytest.raises(RecipeError, match=f"model computes no finite numbers: .*{why}"):
        helpers.models.load(str(tmp_path / "model"), "transformers", max_seq_length=64, dtype=dtype)


def test_an_adapter_without_one_of_its_tensors_stops_the_run(quantized, tmp_path):
    adapter = save_adapter(quantized, tmp_path / "whole")
    copy_with(adapter, tmp_path / "adapter", lose_a_tensor)
    load = partial(helpers.models.load, str(quantized), "transformers", max_seq_length=64)
    with pytest.raises(RecipeError, match=r"adapter: 1 of its tensors are missing"):
        helpers.models.load_adapter(load()[0], str(tmp_path / "adapter"))
    helpers.models.load_adapter(load()[0], str(adapter))


# Rotations of another length beyond 512 tokens: one long text would change the others of its batch.
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LONG_INSIDE = {"rope_parameters": LONG | {"original_max_position_embeddings": 512}, "max_position_embeddings": 131072}
LONG = {"rope_parameters": LONG, "original_max_position_embeddings": 512, "max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "t5 models have an encoder and are not causal language models"),
        (
            {"model_type": "qwen3_vl"},
            "qwen3_vl reads more than text, and transformers has no causal language model for the text part",
        ),
        ({"model_type": "phi3", **LONG}, "it reads at most 512 tokens"),
        ({"model_type": "llama", **LONG_INSIDE}, "it reads at most 512 tokens"),
        ({"model_type": "of 2031"}, "its config.json cannot be used"),
        ({"model_type": "llama", "max_position_embeddings": 512}, "it reads at most 512 tokens: lower max_seq_length"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_their_config(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=message):
        helpers.models.text_config(str(tmp_path), max_seq_length=1024)


@pytest.mark.parametrize(
    ("family", "pad", "template"),
    [
        ("gemma2", "<pad>", helpers.models.GEMMA_CHAT_TEMPLATE),
        ("llama3", "<|reserved_special_token_0|>", None),
        ("llm-jp", "<PAD|LLM-jp>", None),
        ("mistral", "<unk>", None),
        ("qwen3", "<|vision_pad|>", families.qwen_tokenizer().chat_template),
        ("phi3", "<|placeholder1|>", None),
    ],
)
def test_pad_token_and_chat_template(tmp_path, family, pad, template):
    families.FAMILIES[family][2]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = helpers.models.load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.chat_template) == (pad, template)
    assert tokenizer.pad_token_id < len(families.FAMILIES[family][2]())  # no token was added


def test_values_for_sampling_do_not_stop_the_saving(tmp_path):
    """`temperature` without `do_sample`, as in many repositories: transformers refuses to save it, after hours."""
    checkpoint = families.make_checkpoint("llama3", tmp_path / "base")
    values = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    model = helpers.models.load_weights(str(checkpoint), helpers.models.text_config(str(checkpoint)), device_map="cpu")
    model.save_pretrained(tmp_path / "saved")


def test_chat_template():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    tokenizer.chat_template = helpers.models.GEMMA_CHAT_TEMPLATE
    turns = [{"role": "user", "content": " こんにちは "}, {"role": "assistant", "content": "はい"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.strip() == (
        "<bos><start_of_turn>user\nこんにちは<end_of_turn>\n<start_of_turn>model\nはい<end_of_turn>\n<start_of_turn>model"
    )
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template([turns[1]], tokenize=False)


GEMMA_2_27B = {
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 256_000,
}


def count(config):
    """Number of weights, from a transformers config."""
    return helpers.shapes.empty(config).num_parameters()


def test_parameter_count_of_gemma_2_27b():
    assert count(Gemma2Config(**GEMMA_2_27B)) == 27_227_128_320  # by its model card


def test_estimate_knows_experts_and_untied_embeddings():
    """Qwen3-30B-A3B: 30.5 billion weights, of which 4 bit shrinks only those outside the experts."""
    experts = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=768,
        vocab_size=151_936,
        tie_word_embeddings=False,
    )
    assert count(experts) == pytest.approx(30.5e9, rel=0.002)
    assert helpers.shapes.estimate_memory(experts, four_bit=True)["weights"] > 54  # 29 billion of them in 16 bit
    one, two = (Gemma2Config(**GEMMA_2_27B, tie_word_embeddings=tied) for tied in (True, False))
    assert count(two) - count(one) == 256_000 * 4608


def test_large_model_without_gpu_is_refused():
    with pytest.raises(RecipeError, match=r"no GPU.*27\.2 billion"):
        helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B), gpu=False)
    helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B), gpu=True)
    helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B | {"num_hidden_layers": 1, "vocab_size": 1000}), gpu=False)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("qwen3_vl", r"reads more than text, .* for the text part \(qwen3_vl_text\)"),
        ("qwen2_5_omni_thinker", r"reads more than text, .* for the text part \(qwen2_5_omni_text\)"),
        ("t5", "models have an encoder"),
        ("vit", "is not a causal language model"),
    ],
)
def test_why_a_model_is_no_causal_one_is_said(tmp_path, model_type, said):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"{tmp_path}: {model_type} {said}"):
        helpers.models.text_config(str(tmp_path))


def test_a_multimodal_model_need_not_say_whether_embeddings_are_tied(tmp_path, capsys):
    CONFIG_MAPPING["qwen2_audio"]().save_pretrained(tmp_path)
    assert helpers.models.text_config(str(tmp_path)).tie_word_embeddings is False
    assert "the text part of qwen2_audio is used, without its other " in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma2", "llama3", "gemma3", "gemma4 e4b", "qwen3.5", "mistral3"])
def test_the_matrix_of_scores_is_read_alone(family, tmp_path):
    """Also of tied embeddings and of a multimodal model's text part; and where it lies in one file of several."""
    checkpoint = families.make_checkpoint(family, tmp_path / "base")
    config = helpers.models.text_config(str(checkpoint))
    model = helpers.models.load_weights(str(checkpoint), config, device_map="cpu")
    expected = model.get_output_embeddings().weight
    assert torch.equal(helpers.models.score_matrix(str(checkpoint), "", config), expected)
    if family == "llama3":
        model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert torch.equal(helpers.models.score_matrix(str(tmp_path / "again"), "", config), expected)
        model.save_pretrained(tmp_path / "again")  # into one file, beside the old index
        assert (tmp_path / "again/model.safetensors.index.json").is_file()
        assert torch.equal(helpers.models.score_matrix(str(tmp_path / "again"), "", config), expected)


def test_a_matrix_of_scores_in_packed_numbers_is_not_read(tmp_path):
    checkpoint = families.make_checkpoint("llama3", tmp_path / "base")
    pack = partial(copy_with, checkpoint, tmp_path / "packed")
    pack(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].view(torch.uint8)}))
    config = helpers.models.text_config(str(checkpoint))
    assert helpers.models.score_matrix(str(tmp_path / "packed"), "", config) is None


AFTER_UNSLOTH = """
import sys
import unsloth
from unsloth_zoo.temporary_patches import gemma4

gemma4.patch_Gemma4Config_kv_shared_zero()  # on a GPU, unsloth does so when it is imported
gemma4.patch_Gemma4TextConfig_kv_shared_zero()
import helpers

for folder in sys.argv[1:]:
    print(type(helpers.models.text_config(folder)).__name__, "of", folder)
"""


def test_the_config_of_gemma_4_is_read_behind_unsloth(tmp_path):
    """Which puts a stand-in of another type before it where no layers share their keys."""
    text = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=6, num_kv_shared_layers=0)
    text.save_pretrained(tmp_path / "text")
    CONFIG_MAPPING["gemma4"](text_config=text.to_dict()).save_pretrained(tmp_path / "whole")
    command = [sys.executable, "-c", AFTER_UNSLOTH, str(tmp_path / "text"), str(tmp_path / "whole")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("text", "whole"):
        assert f"Gemma4TextConfig of {tmp_path / name}" in done.stdout
