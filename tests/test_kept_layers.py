"""Gradient checkpointing in as many layers as memory requires: the same numbers, whatever is kept."""

import itertools

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


def trained_model(layers=2):
    model = adapted(gemma2(layers))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    randomize_b(model)
    return model


def fail_once_in_backward(model, layer, only_if):
    """Out of memory when the gradients of an MLP are known, in the second row that `only_if` is for."""
    failures = iter([False, True])

    def fail(*_):
        if only_if() and next(failures, False):
            raise torch.OutOfMemoryError("out of memory")

    model.base_model.model.model.layers[layer].mlp.register_full_backward_hook(fail)
    return lambda: next(failures, None) is None


@pytest.mark.parametrize("failing_layer", [0, 1])
def test_a_row_that_does_not_fit_is_computed_again_and_changes_nothing(gpu_of_ten_gib, failing_layer):
    """Out of memory in the middle of a backward pass: same losses, same gradients, same noise as without."""
    model = trained_model()
    expected = gradients_of_three_rows(Trainer(model))
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    has_failed = fail_once_in_backward(model, failing_layer, lambda: kept.kept)
    losses, gradients = gradients_of_three_rows(trainer)
    assert has_failed() and kept.margin == 3 * 2**30
    torch.testing.assert_close((losses, gradients), expected, rtol=0, atol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_row_that_is_given_up_when_computed_again_leaves_the_next_its_gradients(gpu_of_ten_gib, error):
    """Stopped by hand, or out of memory although nothing is kept any more."""
    model = trained_model()
    expected = gradients_of_three_rows(Trainer(model))
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    kept.plan = lambda used: (1, 0)
    errors = iter([torch.OutOfMemoryError, error])

    def fail(*_):
        if error := next(errors, None):
            raise error

    model.base_model.model.model.layers[0].mlp.register_full_backward_hook(fail)
    with pytest.raises(error):
        gradients_of_three_rows(trainer)
    torch.testing.assert_close(gradients_of_three_rows(trainer), expected, rtol=0, atol=0)


def long_row_gradients(trainer):
    """Of rows of 300 tokens, for which `add_in_place` computes the layers."""
    torch.manual_seed(0)
    trainer.model.zero_grad()
    losses = [trainer.training_step(trainer.model, {"input_ids": torch.randint(2, 500, (1, 300))}) for _ in range(2)]
    return losses, [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("fails", [False, True])
def test_layers_that_remember_give_the_same_gradients_and_compute_their_last_matrix_once(gpu_of_ten_gib, fails):
    model = trained_model(layers=3)
    helpers.lora.add_in_place(model)
    expected = long_row_gradients(Trainer(model))
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    kept.plan = lambda used: (0, 2)
    calls, frozen_weight = [], helpers.lora.frozen_weight

    def count(layer, dtype):
        calls.append(layer)
        return frozen_weight(layer, dtype)

    has_failed = fail_once_in_backward(model, 1, lambda: fails)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers.lora, "frozen_weight", count)
        found = long_row_gradients(trainer)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    first, *remembering = (layer.mlp.down_proj for layer in model.base_model.model.model.layers)
    if fails:
        assert has_failed() and kept.remembering == 1
    else:
        assert [calls.count(layer) for layer in (first, *remembering)] == [2 * 3, 2 * 2, 2 * 2]
    assert kept.result_bytes == 64 * 4


def test_a_result_that_the_model_changes_in_its_place_is_computed_again(gpu_of_ten_gib):
    model = trained_model()
    helpers.lora.add_in_place(model)
    for layer in model.base_model.model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _inputs, result: result.mul_(2))
    expected = long_row_gradients(Trainer(model))
    trainer = Trainer(model)
    helpers.kept_layers.KeptLayers(trainer).plan = lambda used: (0, 2)
    torch.testing.assert_close(long_row_gradients(trainer), expected, rtol=0, atol=0)


def test_layers_are_kept_as_long_as_memory_lasts(gpu_of_ten_gib):
    """8 of 10 GiB are free beside the margin: 2 for the rest of a step, 3 for each layer; first, all remember."""
    kept = helpers.kept_layers.KeptLayers(Trainer(trained_model()))
    kept.layer_bytes, kept.rest_bytes, kept.rest_tokens = 3 * 2**30 / 4096, 2 * 2**30, 4096
    for tokens, expected in ((1024, 2), (4096, 2), (5120, 1), (16384, 0)):
        kept.tokens = tokens
        kept.keep(*kept.plan(used=0))
        assert [layer.gradient_checkpointing for layer in kept.layers] == [True] * (2 - expected) + [False] * expected
    kept.result_bytes = 2**30 / 4096
    for tokens, expected in ((4096, (2, 0)), (5120, (1, 1)), (8192, (0, 2)), (10240, (0, 1)), (16384, (0, 0))):
        kept.tokens = tokens
        assert kept.plan(used=0) == expected


def test_a_first_row_that_is_interrupted_is_no_measure_of_the_next(gpu_of_ten_gib, monkeypatch):
    """Stopped while it compiles, after the kept layer and before the peak are measured."""
    model = trained_model()
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    allocated = itertools.count(2**30, 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.base_model.model.model.layers[0].mlp.register_full_backward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        gradients_of_three_rows(trainer)
    hook.remove()
    assert kept.layer_bytes > 0
    gradients_of_three_rows(trainer)


def test_a_training_that_starts_again_still_remembers(gpu_of_ten_gib):
    """The trainer sets the functions that checkpoint a layer whenever it starts."""
    model = trained_model()
    helpers.lora.add_in_place(model)
    trainer = Trainer(model)
    kept = helpers.kept_layers.KeptLayers(trainer)
    kept.plan = lambda used: (0, 2)
    for _ in range(2):
        kept.result_bytes = 0.0
        model.gradient_checkpointing_enable()
        long_row_gradients(trainer)
        assert kept.result_bytes
