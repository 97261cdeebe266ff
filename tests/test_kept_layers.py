"""Gradient checkpointing in as many layers as memory requires: the same numbers, whatever is kept."""

import pytest
import torch
from test_lora import adapted, gemma2, randomize_b

import helpers


@pytest.fixture
def gpu_of_ten_gib(monkeypatch):
    """What torch says about memory, as if a GPU of 10 GiB were empty: only these figures are made up."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * 2**30, 10 * 2**30))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)


class Trainer:
    """Only what `KeptLayers` uses of trl's trainer; the step draws noise, as NEFTune does."""

    def __init__(self, model):
        self.model, self.args = model, type("Arguments", (), {"world_size": 1})

    def training_step(self, model, inputs):
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        loss = model(inputs_embeds=embeddings + 0.1 * torch.rand_like(embeddings), labels=inputs["input_ids"]).loss
        loss.backward()
        return loss.detach()


def gradients_of_three_rows(trainer):
    torch.manual_seed(0)
    trainer.model.zero_grad()
    losses = [trainer.training_step(trainer.model, {"input_ids": torch.randint(2, 500, (1, 40))}) for _ in range(3)]
    return losses, [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("failing_layer", [0, 1])
def test_a_row_that_does_not_fit_is_computed_again_and_changes_nothing(gpu_of_ten_gib, failing_layer):
    """Out of memory in the middle of a backward pass: same losses, same gradients, same noise as without."""
    model = adapted(gemma2())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    randomize_b(model)
    expected = gradients_of_three_rows(Trainer(model))
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    failures = iter([False, True])

    def fail(*_):
        if kept.kept and next(failures, False):
            raise torch.OutOfMemoryError("out of memory")

    model.base_model.model.model.layers[failing_layer].mlp.down_proj.register_full_backward_hook(fail)
    losses, gradients = gradients_of_three_rows(trainer)
    assert next(failures, "none") == "none" and kept.margin == 3 * 2**30
    torch.testing.assert_close((losses, gradients), expected, rtol=0, atol=0)


def test_layers_are_kept_as_long_as_memory_lasts(gpu_of_ten_gib):
    """8 of 10 GiB are free beside the margin: 2 for the rest of a step, 3 for each layer."""
    model = adapted(gemma2())
    model.gradient_checkpointing_enable()
    kept = helpers.kept_layers.KeptLayers(Trainer(model))
    kept.layer_bytes, kept.rest_bytes, kept.rest_tokens = 3 * 2**30 / 4096, 2 * 2**30, 4096
    for tokens, expected in ((1024, 2), (4096, 2), (5120, 1), (16384, 0)):
        kept.tokens = tokens
        kept.keep(kept.number_that_fits(used=0))
        assert [layer.gradient_checkpointing for layer in kept.layers] == [True] * (2 - expected) + [False] * expected


def test_gradients_of_several_rows_are_summed_where_a_row_gives_none(gpu_of_ten_gib):
    """As for an expert that no token of a row is sent to."""
    model = adapted(gemma2())
    kept = helpers.kept_layers.KeptLayers(Trainer(model))
    first, second, *others = kept.parameters
    for parameter in kept.parameters:
        parameter.grad = torch.ones_like(parameter)
    second.grad = None
    sums = [None, *(torch.full_like(parameter, 2.0) for parameter in (second, *others))]
    kept.add_gradients(sums)
    assert [float(parameter.grad.max()) for parameter in (first, second, others[0])] == [1.0, 2.0, 3.0]
