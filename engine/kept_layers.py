"""Gradient checkpointing in only as many layers as the GPU's memory requires."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import lora


class KeptLayers:
    """Gradient checkpointing in only as many layers as the GPU's memory requires, decided anew for every row.

    A checkpointed layer keeps its input alone and is computed again in the backward pass; a kept layer saves that time.
    Between them are layers that remember the result of their MLP: a third of the time for a twentieth of the memory.
    How many bytes each takes per token, and how many the rest of a step, is measured while training. A row that does
    not fit all the same is computed again with fewer of them, with the same noise, and no gradient is added twice. Of
    several processes each decides for itself, but an error stays one: the others wait for this one.
    """

    def __init__(self, trainer: Trainer, margin_gib: float = 2.0):
        self.layers = [layer for layer in trainer.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        self.margin, self.alone = margin_gib * 2**30, trainer.args.world_size == 1
        self.layer_bytes, self.result_bytes, self.rest_bytes, self.rest_tokens = 0.0, 0.0, 0.0, 0
        self.checkpoint: Any = None
        if not self.layers:
            return
        self.layers[-1].register_forward_pre_hook(self.measure_layer)
        self.layers[-1].register_forward_hook(self.measure_layer)
        self.step, trainer.training_step = trainer.training_step, self.training_step

    def measure_layer(self, layer: GradientCheckpointingLayer, _inputs: Any, output: Any = None) -> None:
        if output is None:
            self.before = torch.cuda.memory_allocated()
        elif layer.training and not layer.gradient_checkpointing:
            hidden = output[0] if isinstance(output, tuple) else output  # what a checkpointed layer holds, too
            self.layer_bytes = (torch.cuda.memory_allocated() - self.before - hidden.nbytes) / self.tokens

    def keep(self, kept: int, remembering: int) -> None:
        """Keep the last layers; those before them remember."""
        self.kept, self.remembering = kept, remembering
        for index, layer in enumerate(self.layers, start=-len(self.layers)):
            layer.gradient_checkpointing = index < -kept

    def watch_checkpoints(self) -> None:
        """Tell the functions that checkpoint a layer, which the trainer sets when it starts, what is remembered."""
        if self.layers[-1]._gradient_checkpointing_func is self.checkpoint:
            return
        for index, layer in enumerate(self.layers, start=-len(self.layers)):
            self.checkpoint = partial(layer._gradient_checkpointing_func, context_fn=partial(self.contexts, index))
            layer._gradient_checkpointing_func = self.checkpoint

    def contexts(self, index: int) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For the first and the second forward pass of a checkpointed layer; `index` counts from the last one, -1."""
        if index < -self.kept - self.remembering:
            return nullcontext(), nullcontext()
        results: lora.Results = deque()
        return self.measure_results(results), lora.recall(results)

    @contextmanager
    def measure_results(self, results: lora.Results) -> Iterator[None]:
        with lora.remember(results):
            yield
        self.result_bytes = sum(result.nbytes for result, _ in results) / self.tokens

    def plan(self, used: int) -> tuple[int, int]:
        """How many layers are kept and how many remember; `used` is what is taken before the row, in bytes."""
        if self.layer_bytes <= 0 or not self.rest_tokens:  # the first row that is done measures
            return 1, 1
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - used - self.margin
        free -= self.rest_bytes * max(1.0, self.tokens / self.rest_tokens)
        layer, result, count = self.layer_bytes * self.tokens, self.result_bytes * self.tokens, len(self.layers)
        kept = int(min(max((free - count * result) / max(layer - result, 1.0), 0), count))
        remembering = min(max(free / result, 0), count) if result else count
        return kept, min(int(remembering), count - kept)

    def added(self, before: list[tuple[torch.Tensor | None, int]]) -> list[torch.nn.Parameter]:
        """The parameters whose gradient is not as it was `before` (gradient and number of changes of each)."""
        pairs = zip(self.parameters, before, strict=True)
        return [p for p, (gradient, version) in pairs if p.grad is not gradient or changes(gradient) != version]

    def training_step(self, model: torch.nn.Module, inputs: Mapping[str, Any], *arguments: Any) -> torch.Tensor:
        """The trainer's own training step, planned before and measured after."""
        if not self.rest_tokens:  # loading the model may have taken more
            torch.cuda.reset_peak_memory_stats()
        self.watch_checkpoints()
        self.tokens, used = inputs["input_ids"].numel(), torch.cuda.memory_allocated()
        before = torch.cuda.max_memory_allocated()
        self.keep(*self.plan(used))
        gradients = [(parameter.grad, changes(parameter.grad)) for parameter in self.parameters]
        random_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        while True:
            try:
                with unchanged(self.added(gradients)):
                    loss = self.step(model, inputs, *arguments)
                break
            except torch.OutOfMemoryError:
                if not (self.kept + self.remembering and self.alone):
                    raise
            self.margin += 2**30
            self.keep(self.kept // 2, self.remembering if self.kept else self.remembering // 2)
            gc.collect()
            torch.cuda.empty_cache()
            torch.set_rng_state(random_states[0])
            torch.cuda.set_rng_state_all(random_states[1])
        peak = torch.cuda.max_memory_allocated()
        if peak > before and self.tokens >= self.rest_tokens:  # so the peak is this row's
            taken = (self.kept * self.layer_bytes + self.remembering * self.result_bytes) * self.tokens
            self.rest_bytes, self.rest_tokens = peak - used - taken, self.tokens
        return loss


@contextmanager
def unchanged(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block backward passes leave the gradients of these parameters as they are."""
    hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def changes(gradient: torch.Tensor | None) -> int:
    """How often a gradient was changed in its place."""
    return -1 if gradient is None else gradient._version
