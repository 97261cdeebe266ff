"""Section 2 of helpers.py: sizes, versions, guards."""

import json

import pytest

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


def test_parameter_count_of_gemma_2_27b():
    # 27,227,128,320 weights by its model card; the norms that are not counted are 46 * 4 * 4608 + 4608.
    assert helpers.parameter_count(GEMMA_2_27B) == 27_227_128_320 - (46 * 4 + 1) * 4608


def test_large_model_without_gpu_is_refused():
    with pytest.raises(RecipeError, match=r"no GPU.*27\.2 billion"):
        helpers.check_gpu(GEMMA_2_27B, gpu=False)
    helpers.check_gpu(GEMMA_2_27B, gpu=True)
    helpers.check_gpu(GEMMA_2_27B | {"num_hidden_layers": 1, "vocab_size": 1000}, gpu=False)


def test_package_versions():
    versions = helpers.package_versions(["transformers", "no-such-package"])
    assert versions["no-such-package"] == ""
    assert json.dumps(versions)
    assert versions["transformers"].count(".") >= 1
