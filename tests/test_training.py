"""Section 4 of helpers.py: training texts, chat template, resuming."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_lora import gemma2
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
)
from transformers.integrations.neftune import activate_neftune

import helpers


def test_noise_without_padding_is_that_of_a_padded_batch():
    """NEFTune draws from -alpha to alpha, divided by the root of row length x width: here of the longest text."""
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**config, num_attention_heads=2, num_key_value_heads=1)).train()
    embeddings = model.get_input_embeddings()
    activate_neftune(model, 5)
    helpers.rows.noise_as_with_padding(model, 5)
    noise = []
    clean = embeddings.weight.data * embeddings.embed_scale
    embeddings.register_forward_hook(lambda _m, ids, out: noise.append((out - clean[ids[0]]).abs().max().item()))
    for lengths in ([50], [50, 9, 41, 30]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        model(torch.randint(0, 50, positions.shape), position_ids=positions)
        assert noise[-1] == pytest.approx(5 / (50 * 64) ** 0.5, rel=0.02)


def test_out_of_memory_keeps_the_effective_batch():
    assert "per_device_train_batch_size=8 and gradient_accumulation_steps=4" in str(
        helpers.training.out_of_memory(16, 2)
    )
    assert "lower max_seq_length" in str(helpers.training.out_of_memory(1, 32))


@pytest.mark.parametrize("processes", [1, 2])
def test_even_rows_hold_every_text_once_in_each_epoch_whatever_the_number_of_processes(processes):
    class Args:
        seed, per_device_train_batch_size = 3407, 2
        gradient_accumulation_steps, world_size = 4 // processes, processes

    class Trainer:
        args, train_dataset = Args, {"input_ids": [[0] * length for length in range(1, 101)]}

    helpers.rows.balance(Trainer)
    sampler = Trainer._get_train_sampler(None)
    epochs = [list(sampler)]
    sampler.set_epoch(1)
    epochs.append(list(sampler))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3407)).tolist()
    assert sorted(epochs[0][:8]) == sorted(order[:8])  # the texts of a step are those of the random order
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == [*range(100)] for epoch in epochs) and len(sampler) == 100


@pytest.mark.parametrize(("processes", "tested"), [(1, 19), (2, 16), (4, 16), (8, 19)])
def test_several_processes_test_whole_batches(processes, tested):
    """transformers would fill the last one up with texts that have been counted already."""
    arguments = SimpleNamespace(per_device_eval_batch_size=4, world_size=processes)
    held_out = Dataset.from_dict({"input_ids": [[2, number] for number in range(19)]})
    assert len(helpers.training.whole_batches(held_out, arguments)) == tested


def test_an_interrupted_question_leaves_the_model_as_it_was():
    model = gemma2().train()
    model.config._attn_implementation, model.config.use_cache = "examples", False
    with pytest.raises(KeyboardInterrupt), helpers.training.paused(model, "transformers"):
        assert not model.training and model.config._attn_implementation == "eager" and model.config.use_cache
        raise KeyboardInterrupt
    assert model.training and model.config._attn_implementation == "examples" and not model.config.use_cache
