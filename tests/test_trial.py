"""The trial: what notebook 1 will do with a checkpoint, on a tiny model, from the config alone."""

import families
import pytest
import transformers

import helpers
from helpers import RecipeError

DENSE = {"moe_layers": [], "interleave_moe_layer_step": 1000}


def wrapped(folder, name, text, **values):
    """A folder with nothing but the config of a multimodal model; `text` are values of its text part."""
    getattr(transformers, name)(text_config=text, **values).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Gemma3Config", {}),
        ("Idefics2Config", {}),  # its text part is called text_model
        ("Llama4Config", DENSE),
        ("LlavaConfig", {}),
        ("VoxtralConfig", {}),  # it reads sounds, and does not say whether embeddings are tied
    ],
)
def test_a_text_part_is_taken_out_quantized_and_read_again(tmp_path, monkeypatch, name, text):
    read, found = helpers.trial.read, []
    monkeypatch.setattr(helpers.trial, "read", lambda *a, **options: found.append(read(*a, **options)) or found[-1])
    helpers.trial.check(wrapped(tmp_path, name, text))
    whole, in_4_bit, again = found
    assert not hasattr(whole.config, "quantization_config")
    assert in_4_bit.is_loaded_in_4bit and again.is_loaded_in_4bit


def test_a_model_that_cannot_be_read_again_is_refused_before_the_download(tmp_path):
    """transformers reads the experts of Llama 4 from 4 bit only one by one, and saves them together."""
    folder = wrapped(tmp_path, "Llama4Config", {"interleave_moe_layer_step": 2})
    helpers.architectures.check(helpers.models.text_config(folder), "transformers")
    with pytest.raises(RecipeError, match=r"^llama4 models do not fit this recipe: saved in 4 bit they cannot be read"):
        families.run_notebook("01_quantize", base_model=folder, output_dir=str(tmp_path / "run"))


def test_a_text_part_whose_weights_have_other_names_is_refused(tmp_path, monkeypatch):
    folder = wrapped(tmp_path, "LlavaConfig", {})
    names = helpers.trial.inner_names
    monkeypatch.setattr(
        helpers.trial, "inner_names", lambda *a: {n.replace("language", "speech"): w for n, w in names(*a).items()}
    )
    with pytest.raises(
        RecipeError, match=r"^llava models .* cannot be read \(\d+ tensors are not found, such as model"
    ):
        helpers.trial.check(folder)


def test_other_scores_are_seen(tmp_path):
    models = [helpers.architectures.tiny(transformers.LlamaConfig()) for _ in range(2)]
    helpers.trial.agree(*models)
    models[1].model.norm.weight.data[0] = 2
    with pytest.raises(RecipeError, match="the scores are others"):
        helpers.trial.agree(*models)


def test_what_cannot_be_made_here_is_not_refused(tmp_path, monkeypatch):
    """A picture tower of another library, or sizes that must fit others."""
    monkeypatch.setattr(helpers.trial, "inner_names", lambda *_: 1 / 0)
    helpers.trial.check(wrapped(tmp_path, "LlavaConfig", {}))
