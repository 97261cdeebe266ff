"""Attention that skips padding and attention over slots: the same numbers as transformers' eager attention."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
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


@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("penalize_prompt", [True, False])
def test_slots_answer_like_generate_one_by_one(model, slots, penalize_prompt):
    """Prompts and answers longer than the window, slots taken over again and again: the tokens of generate()."""
    prompts = [torch.randint(4, 512, (length,)).tolist() for length in (5, 40, 17, 33, 9, 25)]
    lengths = [12, 20, 3, 30, 1, 8]

    def processors(ignored=None):
        return LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=ignored),
                NoBadWordsLogitsProcessor([[7], [8, 9], [100, 200]], eos_token_id=None),
            ]
        )

    model.generation_config.pad_token_id = 0
    expected = {}
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        process = processors(None if penalize_prompt else len(prompt))
        options = {"do_sample": False, "eos_token_id": None, "logits_processor": process}
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=length, **options)[0]
        expected[index] = answer[len(prompt) :].tolist()
    never = lambda history, _scores: torch.zeros(len(history), dtype=torch.bool)  # noqa: E731
    decoding = helpers.decoding.Decoding(slots, processors(), never, penalize_prompt)
    assert dict(helpers.slots.answer(model, prompts, lengths.__getitem__, decoding)) == expected
