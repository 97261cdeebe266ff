"""Section 2 of helpers.py: sizes, versions, guards."""

import json

import pytest
from transformers import Gemma2Config, Qwen3MoeConfig

import helpers
from helpers import RecipeError

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
    return helpers.models.empty(config).num_parameters()


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
    assert helpers.models.estimate_memory(experts, four_bit=True)["weights"] > 54  # 29 billion of them in 16 bit
    one, two = (Gemma2Config(**GEMMA_2_27B, tie_word_embeddings=tied) for tied in (True, False))
    assert count(two) - count(one) == 256_000 * 4608


def test_large_model_without_gpu_is_refused():
    with pytest.raises(RecipeError, match=r"no GPU.*27\.2 billion"):
        helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B), gpu=False)
    helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B), gpu=True)
    helpers.models.check_gpu(Gemma2Config(**GEMMA_2_27B | {"num_hidden_layers": 1, "vocab_size": 1000}), gpu=False)


def test_package_versions():
    versions = helpers.machine.package_versions(["transformers", "no-such-package"])
    assert versions["no-such-package"] == ""
    assert json.dumps(versions)
    assert versions["transformers"].count(".") >= 1
