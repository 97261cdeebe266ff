"""Gradient checkpointing in only as many layers as the GPU's memory requires."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer


class KeptLayers:
    """Gradient checkpointing in only as many layers as the GPU's memory requires, decided anew for every row.

    A checkpointed layer keeps its input alone and is computed again in the backward pass; a kept layer saves that time.
    How many bytes a kept layer takes per token, and how many the rest of a step, is measured while training. A row that
    does not fit all the same is computed again with fewer kept layers, with the same noise and on top of the same
    gradients. Of several processes each decides for itself, but an error stays one: the others wait for this one.
    """

    def __init__(self, trainer: Trainer, margin_gib: float = 2.0):
        self.layers = [layer for layer in trainer.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        self.margin, self.alone = margin_gib * 2**30, trainer.args.world_size == 1
        self.layer_bytes, self.rest_bytes, self.rest_tokens = 0.0, 0.0, 0
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

    def keep(self, number: int) -> None:
        self.kept = number
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < len(self.layers) - number

    def number_that_fits(self, used: int) -> int:
        if self.layer_bytes <= 0:  # the first row measures
            return 1
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - used - self.margin
        rest = self.rest_bytes * max(1.0, self.tokens / self.rest_tokens)
        return int(min(max((free - rest) / (self.layer_bytes * self.tokens), 0), len(self.layers)))

    def add_gradients(self, sums: list[torch.Tensor | None]) -> None:
        """Add the gradients of the rows before; a row that no expert of a layer gets gives its matrices none."""
        pairs = [(p.grad, total) for p, total in zip(self.parameters, sums, strict=True)]
        both = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        if both:
            torch._foreach_add_(*map(list, zip(*both, strict=True)))
        for parameter, total in zip(self.parameters, sums, strict=True):
            if parameter.grad is None:
                parameter.grad = total

    def training_step(self, model: torch.nn.Module, inputs: Mapping[str, Any], *arguments: Any) -> torch.Tensor:
        """The trainer's own training step, planned before and measured after."""
        if not self.rest_tokens:  # loading the model may have taken more
            torch.cuda.reset_peak_memory_stats()
        self.tokens, used = inputs["input_ids"].numel(), torch.cuda.memory_allocated()
        before = torch.cuda.max_memory_allocated()
        self.keep(self.number_that_fits(used))
        sums = [parameter.grad for parameter in self.parameters]
        random_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        while True:
            if self.alone:  # half a backward pass must leave nothing in the sums
                for parameter in self.parameters:
                    parameter.grad = None
            try:
                loss = self.step(model, inputs, *arguments)
                break
            except torch.OutOfMemoryError:
                if not (self.kept and self.alone):
                    raise
            self.margin += 2**30
            self.keep(self.kept // 2)
            gc.collect()
            torch.cuda.empty_cache()
            torch.set_rng_state(random_states[0])
            torch.cuda.set_rng_state_all(random_states[1])
        if self.alone:
            self.add_gradients(sums)
        peak = torch.cuda.max_memory_allocated()
        if peak > before and self.tokens >= self.rest_tokens:  # so the peak is this row's
            self.rest_bytes = peak - used - self.kept * self.layer_bytes * self.tokens
            self.rest_tokens = self.tokens
        return loss
