"""How likely a reference is: in batches, padded, with the logits of the references alone."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers


@pytest.fixture(scope="module")
def tiny():
    folder = "data/tiny/gemma2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder)


ASKED = ("山", "35 × 12 を計算してください。", "物語を書いて。" * 30)


REFERENCES = ["富士山です。", "420", "昔々、あるところに。" * 9]


@pytest.fixture(scope="module")
def prompts(tiny):
    return [tiny[1](helpers.build_prompt(question, [], "2024"))["input_ids"] for question in ASKED]


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, reference):
    """Without batch, padding, mask or chosen logits: the sum of -log p of each token, divided by the characters."""
    start = len(prompt)
    ids = prompt + tokenizer(reference, add_special_tokens=False)["input_ids"]
    probabilities = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    return -sum(math.log(probabilities[i - 1, ids[i]]) for i in range(start, len(ids))) / len(reference)


@pytest.mark.parametrize("batch_tokens", [1, 1024, 4096])
def test_likelihood_in_batches_is_that_of_one_by_one(tiny, prompts, batch_tokens):
    expected = [one_by_one(*tiny, *pair) for pair in zip(prompts, REFERENCES, strict=True)]
    found = helpers.likelihood.reference_nll(*tiny, prompts, REFERENCES, batch_tokens)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 3


def test_likelihood_computes_logits_for_the_references_alone(tiny, prompts, monkeypatch):
    """The vocabulary has 256,000 entries: logits over a whole prompt of 3,000 tokens would fill a GPU."""
    model, tokenizer = tiny
    shapes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **values: shapes.append((out := forward(**values)).logits.shape) or out
    )
    helpers.likelihood.reference_nll(model, tokenizer, prompts, REFERENCES)
    longest = max(len(tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in REFERENCES)
    assert [shape[:2] for shape in shapes] == [(3, longest + 1)]


def test_likelihood_is_the_same_after_answering_in_slots(tiny, prompts):
    """Notebook 04 answers first; the attention of its slots cannot read padded batches."""
    before = helpers.likelihood.reference_nll(*tiny, prompts, REFERENCES)
    helpers.slots.Decoder(tiny[0], slots=2, columns=64)
    assert tiny[0].config._attn_implementation == "slots"
    assert helpers.likelihood.reference_nll(*tiny, prompts, REFERENCES) == before


def test_unsloth_finds_the_same_likelihood(quantized, prompts):
    found = []
    for engine in ("transformers", "unsloth"):
        model, tokenizer = helpers.models.load(str(quantized), engine, max_seq_length=512, dtype="float32")
        model.eval()
        found.append(helpers.likelihood.reference_nll(model, tokenizer, prompts, REFERENCES))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_likelihood_copies_no_output_matrix(tiny, prompts):
    """Beside an adapter the output matrix is frozen, and torch may then copy it for each row: gigabytes a batch."""
    model, tokenizer = tiny
    model.requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        helpers.likelihood.reference_nll(model, tokenizer, prompts, REFERENCES)
    copied = [len(prompts), model.config.hidden_size, model.config.vocab_size]
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert shapes
    assert not any(copied in given for given in shapes)
