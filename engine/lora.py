"""LoRA added within the matrix products of a layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

Activation = Callable[[torch.Tensor], torch.Tensor]


def frozen_weight(layer: LoraLayer, dtype: torch.dtype) -> torch.Tensor:
    """The matrix W (out, in) of one of peft's layers, unpacked if it is stored in 4 bit."""
    weight = layer.base_layer.weight
    packed = getattr(weight, "quant_state", None)
    return (weight.data if packed is None else dequantize_4bit(weight.data, packed)).to(dtype)


def gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the last matrix of a gated MLP gets."""
    return activation(gate) * up


def gated_gradients(
    activation: Activation, gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result of `gated` once more, and the gradients of `gate` and `up` from that of the result."""
    result, pull = torch.func.vjp(lambda *both: gated(activation, *both), gate, up)
    return result, *pull(gradient)


Results = deque[tuple[torch.Tensor, int]]  # (tokens, out), and its version: how often it was changed in its place


class Memory:
    """What the two forward passes of a checkpointed layer share: the results of its MLPs. None outside of such."""

    written: Results | None = None  # while the first pass runs
    read: Results | None = None  # while the second does


memory = Memory()


@contextmanager
def remember(results: Results) -> Iterator[None]:
    """Within the block the last matrix of every MLP writes its result down: of all that is computed twice in a
    checkpointed layer, this costs most for its size.
    """
    memory.written = results
    try:
        yield
    finally:
        memory.written = None


@contextmanager
def recall(results: Results) -> Iterator[None]:
    """Within the block the last matrix of every MLP reads its result, in the order in which they were written."""
    memory.read = results
    try:
        yield
    finally:
        memory.read = None


@lru_cache
def function(gpu: bool) -> Callable[..., Any]:
    """Autograd function of peft's layer, scaling, A, B, an activation and inputs (tokens, in): Wx + bias + scaling BAx.

    Without an activation x is the input. With one it is what `gated` makes of two inputs; they are kept for the
    backward pass and x is not, so that an MLP keeps two of its four wide tensors. The products with A and B add
    themselves to those with W. The gradients of A and B are float32. A result with an activation may be remembered.
    """
    # Compiled, each of the two is a single kernel.
    make, make_gradients = (torch.compile(part, dynamic=True) if gpu else part for part in (gated, gated_gradients))

    class Lora(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layer: Any, scaling: float, a: Any, b: Any, activation: Any, *inputs: Any) -> Any:
            a, b = a.to(inputs[0].dtype), b.to(inputs[0].dtype)
            weight = frozen_weight(layer, inputs[0].dtype)
            # What a checkpointed layer saves lives from its second pass to its backward pass, a moment later.
            unpacked = () if memory.written is None and memory.read is None else (weight,)
            ctx.constants = layer, scaling, activation, bool(unpacked)
            ctx.save_for_backward(a, b, *unpacked, *inputs)
            if activation and memory.read:
                y, version = memory.read.popleft()
                if y._version == version:
                    return y
            x = make(activation, *inputs) if activation else inputs[0]
            y = torch.nn.functional.linear(x, weight, layer.base_layer.bias).addmm_(x @ a.T, b.T, alpha=scaling)
            if activation and memory.written is not None:
                memory.written.append((y.detach(), y._version))
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            (layer, scaling, activation, unpacked), (a, b, *inputs) = ctx.constants, ctx.saved_tensors
            weight = inputs.pop(0) if unpacked else frozen_weight(layer, gradient.dtype)
            inner = gradient @ b  # of Ax, but for the scaling
            of_x = (gradient @ weight).addmm_(inner, a, alpha=scaling)
            x, *of_inputs = make_gradients(activation, *inputs, of_x) if activation else (inputs[0], of_x)
            of_adapter = inner.T @ x, gradient.T @ (x @ a.T)
            of_a, of_b = (product if scaling == 1 else product.mul_(scaling) for product in of_adapter)
            return None, None, of_a.float(), of_b.float(), None, *of_inputs

    return Lora.apply


def is_plain(layer: torch.nn.Module | None) -> bool:
    """Whether `layer` is one of peft's that computes Wx + bias + scaling BAx, with one adapter, and nothing else."""
    if not isinstance(layer, LoraLayer) or type(layer.base_layer) not in (torch.nn.Linear, Linear4bit):
        return False
    name, *others = layer.active_adapters
    dropout = not isinstance(layer.lora_dropout[name], torch.nn.Identity)
    return not (others or dropout or layer.merged or layer.lora_variant or layer.lora_bias[name])


def add_in_place(model: PreTrainedModel | PeftModel) -> int:
    """Let the layers of a model with peft's adapter use `function` where more than 256 tokens come at once.

    peft copies Wx, scales BAx and adds both into a third tensor. The weights stay peft's own. What is more than a plain
    adapter (dropout, DoRA, 8 bit), and an MLP that computes something else than `gated`, are left as they are. Returns
    how many layers and MLPs were changed.
    """
    lora, activations = function(model.device.type == "cuda"), {}

    def compute(layer: LoraLayer, activation: Activation | None, *inputs: torch.Tensor) -> torch.Tensor:
        name, kind = layer.active_adapters[0], inputs[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs[0].dtype
        flat = [x.reshape(-1, x.shape[-1]).to(dtype) for x in inputs]
        adapter = layer.scaling[name], layer.lora_A[name].weight, layer.lora_B[name].weight
        return lora(layer, *adapter, activation, *flat).view(*inputs[0].shape[:-1], -1)

    def compute_mlp(
        gate: LoraLayer, up: LoraLayer, down: LoraLayer, activation: Activation, x: torch.Tensor
    ) -> torch.Tensor:
        return compute(down, activation, gate(x), up(x))

    def replace(module: torch.nn.Module, layer: LoraLayer, fast: Activation) -> None:
        own = module.forward  # bitsandbytes is faster for a few tokens, and peft can switch the adapter off
        module.forward = lambda x: own(x) if x.shape[:-1].numel() <= 256 or layer.disable_adapters else fast(x)

    layers = [module for module in model.modules() if is_plain(module)]
    for layer in layers:
        replace(layer, layer, partial(compute, layer, None))
    changed = len(layers)
    for mlp in model.modules():
        gate, up, down = (getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down"))
        if not (all(map(is_plain, (gate, up, down))) and hasattr(mlp, "act_fn")):
            continue
        # Equal activations become one object, for which nothing is compiled again.
        activation = activations.setdefault(repr(mlp.act_fn), mlp.act_fn)
        fast = partial(compute_mlp, gate, up, down, activation)
        with torch.no_grad():
            x = torch.linspace(-2, 2, 300 * gate.in_features, dtype=model.dtype, device=model.device).view(-1, 300).T
            expected = mlp(x)
            if (fast(x) - expected).norm() < 0.05 * expected.norm():
                replace(mlp, down, fast)
                changed += 1
    return changed


def first_gradients(model: PeftModel, ids: Sequence[int]) -> list[dict[str, Any]]:
    """W, A and B of the first linear layer with an adapter: shape, norm, and the norm of the gradient that one text
    (token ids) gives. The model is left as it was found.
    """
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    name, layer = next((name, layer) for name, layer in layers if isinstance(layer.base_layer, torch.nn.Linear))
    text = torch.tensor([ids], device=model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    model(input_ids=text, labels=text, position_ids=positions, use_cache=False).loss.backward()
    adapter = layer.active_adapters[0]
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    frozen = frozen_weight(layer, torch.float32)
    rows = [{"matrix": f"W, {name.rpartition('.')[2]}", "shape": tuple(frozen.shape), "norm": frozen.norm().item()}]
    rows[0]["norm of the gradient"] = "frozen"
    for matrix, weight in (("A", a), ("B", b)):
        norms = {"norm": weight.norm().item(), "norm of the gradient": weight.grad.norm().item()}
        rows.append({"matrix": matrix, "shape": tuple(weight.shape)} | norms)
    model.zero_grad(set_to_none=True)
    return rows
