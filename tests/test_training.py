"""Section 4 of helpers.py: training texts, chat template, resuming."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_lora import gemma2
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerControl, TrainerState, set_seed
from transformers.integrations.neftune import activate_neftune
from trl import SFTConfig, SFTTrainer

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


def train_in(dtype, folder, scale=2.0**16, checkpoint=None):
    """Losses of a training of the tiny model on a CPU in this number type, with the arguments of notebook 3.

    accelerate scales no gradients on a CPU. So that they are scaled as on a GPU without bfloat16, it is told to.
    """
    model, tokenizer = helpers.models.load("data/tiny/gemma2", "transformers", max_seq_length=64, dtype=dtype)
    rows = [[2, *range(10 + number, 20 + 2 * number), 1] for number in range(8)]
    dataset = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
    without_padding = helpers.rows.switch_on(model, rows[:2])
    assert without_padding and model.dtype == getattr(torch, dtype)
    set_seed(1)
    targets = helpers.shapes.lora_targets(model.config)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    own = helpers.training.machine_arguments(model, dtype, without_padding, False, 5)
    assert (own["fp16"], own["bf16"]) == (dtype == "float16", dtype == "bfloat16")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "max_length": None}
    logs = {"logging_steps": 1, "save_steps": 4, "report_to": "none", "learning_rate": 0.01, "output_dir": str(folder)}
    trainer = SFTTrainer(model, SFTConfig(**sizes, **logs, **own), train_dataset=dataset, processing_class=tokenizer)
    if dtype == "float16":
        assert trainer.accelerator.mixed_precision == "fp16"
        trainer.accelerator.native_amp, trainer.accelerator.scaler = (
            True,
            torch.amp.GradScaler("cpu", scale),
        )
    helpers.training.prepare(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.accelerator.scaler


@pytest.mark.plain_trl
def test_float16_trains_with_scaled_gradients(tmp_path):
    """As on a T4: the losses of float32 up to rounding, although the model computes in float16."""
    expected, _ = train_in("float32", tmp_path / "float32")
    losses, scaler = train_in("float16", tmp_path / "float16")
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < losses[0] - 1
    assert scaler.get_scale() == 2.0**16


@pytest.mark.plain_trl
def test_steps_that_overflow_in_float16_are_left_out_and_a_checkpoint_holds_the_scale(tmp_path):
    losses, scaler = train_in("float16", tmp_path / "whole", 2.0**20)
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[-1] < losses[0] - 1
    assert scaler.get_scale() < 2.0**20
    checkpoint = tmp_path / "whole/checkpoint-4"
    assert torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"] < 2.0**20
    assert train_in("float16", tmp_path / "again", 2.0**20, str(checkpoint))[0] == losses


def test_a_training_whose_numbers_overflow_ends_before_a_checkpoint_holds_them():
    model, state, control = torch.nn.Linear(2, 2), TrainerState(global_step=7), TrainerControl(should_save=True)
    guard = helpers.training.FiniteNumbers()
    guard.on_step_end(None, state, control, model=model)
    for loss in (2.0, math.nan, 1.5, math.inf):  # one in a row: float16 leaves such a step out
        guard.on_log(None, state, control, logs={"loss": loss})
    guard.on_log(None, state, control, logs={"eval_loss": 1.0})
    with pytest.raises(helpers.RecipeError, match="losses at step 7 are no finite numbers: lower learning_rate"):
        guard.on_log(None, state, control, logs={"loss": math.nan})
    model.weight.data[0, 0] = math.nan
    guard.on_step_end(None, state, TrainerControl(), model=model)
    with pytest.raises(helpers.RecipeError, match="weights at step 7"):
        guard.on_step_end(None, state, control, model=model)
