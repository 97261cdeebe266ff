"""Section 2 of helpers.py: sizes, provenance, guards."""

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


def test_folder_of_another_base_is_refused(tmp_path):
    helpers.check_quantized_folder(tmp_path, "a/b", "123")
    helpers.write_json(tmp_path / "provenance.json", {"base_model": "a/b", "base_commit": "123"})
    helpers.check_quantized_folder(tmp_path, "a/b", "123")
    for model, commit in (("a/c", "123"), ("a/b", "124")):
        with pytest.raises(RecipeError, match="already holds a/b"):
            helpers.check_quantized_folder(tmp_path, model, commit)


def test_hash_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / "skipped").write_bytes(b"x")
    assert helpers.hash_folder(tmp_path, skip=["skipped"]) == {
        "b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "sub/a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def test_package_versions():
    versions = helpers.package_versions(["transformers", "no-such-package"])
    assert versions["no-such-package"] == ""
    assert json.dumps(versions)
    assert versions["transformers"].count(".") >= 1


def test_model_card_names_base_licence_and_facts():
    card = helpers.model_card("A title", "google/gemma-2-27b", ["4-bit"], {"quantization": "nf4"})
    assert card.startswith("---\n")
    assert "base_model: google/gemma-2-27b" in card
    assert "license: gemma" in card
    assert "| quantization | nf4 |" in card
    assert "Gemma Terms of Use" in card
