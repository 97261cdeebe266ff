"""Attention that skips padding and attention over slots: the same numbers as transformers' eager attention."""

import families
import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
)

import helpers
from helpers import RecipeError

LENGTHS = [50, 9, 70, 33]


@pytest.fixture
def model():
    """Weights large enough, and a cap and a window small enough, that softcapping and window change the result."""
    torch.manual_seed(0)
    config = Gemma2Config(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        query_pre_attn_scalar=16,
        sliding_window=24,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


def test_examples_end_to_end_do_not_see_each_other(model):
    """A row of four examples gives each the logits and gradients that it has alone with eager attention."""
    AttentionInterface.register("examples", helpers.attention.packed)
    examples = [torch.randint(4, 512, (length,)) for length in LENGTHS]
    alone = torch.cat([model(example[None]).logits[0] for example in examples])
    alone.logsumexp(-1).sum().backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradient, weight.grad = weight.grad.clone(), None
    model.config._attn_implementation = "examples"
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    row = model(torch.cat(examples)[None], position_ids=positions[None], use_cache=False).logits[0]
    row.logsumexp(-1).sum().backward()
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"s_aux": torch.ones(4)},
        {"attention_mask": {"full_attention": None, "sliding_attention": None}},
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
        {"dropout": 0.1},
    ],
)
def test_attention_refuses_what_it_does_not_know(arguments):
    """Sinks, masks of the model's own, dropout: left out in silence, they would give other answers."""
    (name,) = arguments
    with pytest.raises(RecipeError, match=f"attention uses {name}, which is not known here"):
        helpers.attention.refuse_arguments(arguments)
    harmless = {"dropout": 0.0, "use_cache": False, "return_dict": True, "num_items_in_batch": torch.tensor(7)}
    helpers.attention.refuse_arguments(harmless | {"attention_mask": None})


def test_rounding_in_16_bit_is_told_from_a_wrong_mask(tmp_path):
    """A row in which the second text sees the first gives other scores only at the second text's first tokens."""
    checkpoint = families.make_checkpoint("mistral", tmp_path)
    model, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512)
    texts = [torch.tensor([helpers.encode(tokenizer, prompt).ids[:200]]) for prompt in families.PROMPTS[:2]]
    row, positions = torch.cat(texts, dim=1), torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        alone = torch.cat([model(text).logits for text in texts], dim=1)
        mixed = model(row, attention_mask=torch.ones_like(row), position_ids=positions).logits
    assert helpers.attention.scores_agree(alone * 1.01, alone)
    assert not helpers.attention.scores_agree(mixed, alone)
    assert not helpers.attention.scores_agree(mixed * torch.nan, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("heads, key_heads, width", [(4, 1, 256), (8, 4, 128)])  # Gemma 3 270M, a larger one
def test_rows_of_any_length_on_a_gpu_give_the_attention_of_the_cpu(heads, key_heads, width, softcap):
    for lengths in ([1], [5], [100], [127], [128], [9, 60], [150, 9, 170]):
        tokens, draw = sum(lengths), torch.Generator().manual_seed(0)
        states = [torch.randn(1, n, tokens, width, generator=draw) for n in (heads, key_heads, key_heads)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        found = [attention_of(states, positions, softcap, device) for device in ("cpu", "cuda")]
        torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def attention_of(states, positions, softcap, device):
    query, key, value = (state.to(device) for state in states)
    options = {"scaling": query.shape[3] ** -0.5, "softcap": softcap, "sliding_window": 64}
    options |= {"position_ids": positions.to(device)}
    return helpers.attention.packed(None, query, key, value, None, **options)[0].cpu()
