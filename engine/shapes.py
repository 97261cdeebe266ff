"""The shapes of a model without its weights: what its config alone tells of modules, memory and LoRA."""

from __future__ import annotations

import copy
import json
import re
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import transformers_weight_conversion
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from helpers import RecipeError


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a transformers config without its weights: modules, names and shapes, in a moment."""
    with torch.device("meta"), no_init_weights():  # to draw numbers that have no place takes longer than all else
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it writes into the config
    model.tie_weights()
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model's blocks by their full names: what 4 bit shrinks and what LoRA stands beside."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def expert_matrices(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The stacked matrices of a mixture of experts (experts, rows, columns) by their full names; often none."""
    return {n: p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}


def experts_in_16_bit(config: PreTrainedConfig) -> str:
    """How much of a model are experts, whose stacked matrices bitsandbytes leaves in 16 bit; empty if it has none."""
    model = empty(config)
    weights = sum(matrix.numel() for matrix in expert_matrices(model).values())
    of = f"{weights / 1e9:.1f} of {model.num_parameters() / 1e9:.1f} billion weights"
    return f"{of} are experts and stay in 16 bit, {2 * weights / 2**30:.1f} GiB" if weights else ""


def lora_targets(config: PreTrainedConfig) -> dict[str, list[str]]:
    """What LoRA stands beside, as arguments of peft's LoraConfig: a block's linear layers and, if there are any, its
    experts. Routers, embeddings and short convolutions stay as they are.

    RecipeError lists matrices that are out of reach.
    """
    model = empty(config)
    linear, experts = linear_layers(model), expert_matrices(model)
    kept = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.Conv1d)]
    reached = {id(weight) for weight in (*kept, *experts.values(), model.get_output_embeddings().weight)}
    reached |= {id(module.weight) for module in linear.values()}
    router = re.compile(r"\.(router|gate)(\.|$)")
    untouched = re.compile(r"\.experts\..*bias$|" + router.pattern)
    beyond = [
        n for n, w in model.named_parameters() if w.dim() > 1 and id(w) not in reached and not untouched.search(n)
    ]
    if beyond:
        names = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in beyond}))
        raise RecipeError(f"LoRA does not reach {names}, which would stay untrained without a word")
    last_names = dict.fromkeys(name.rpartition(".")[2] for name in linear if not router.search(name))
    targets = {"target_modules": list(last_names)}
    if experts:
        targets["target_parameters"] = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in experts})
    return targets


# peft takes gate_proj and the like for the experts of an older checkpoint, and then leaves the linear layers of that
# name, those of dense layers and shared experts, without LoRA. A config that names experts by their own needs no such.
convert_old_targets = transformers_weight_conversion._convert_peft_config_moe


def convert_targets(config: LoraConfig, model: PreTrainedModel) -> None:
    """Have peft's targets for experts made from old names only where none are named by their own."""
    if not config.target_parameters:
        convert_old_targets(config, model)


transformers_weight_conversion._convert_peft_config_moe = convert_targets


class CountingCache(DynamicCache):
    """A cache that keeps nothing but counts how many keys and values a text's token brings."""

    values = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.values += key_states[0].numel() + value_states[0].numel()
        return key_states, value_states


@lru_cache
def counted_values(config_json: str, kind: type[PreTrainedConfig]) -> int:
    config = kind(**json.loads(config_json))
    cache, token = CountingCache(config=config), torch.zeros((1, 1), dtype=torch.long, device="meta")
    with torch.no_grad():  # in bf16, the only type that grouped experts are computed in
        empty(config).bfloat16()(token, position_ids=token, past_key_values=cache, use_cache=True)
    return cache.values


def values_per_token(config: PreTrainedConfig) -> int:
    """How many numbers a model stores of every token that it has read: its keys and values in all layers.

    Found by a pass without weights; where a model refuses that, as if all layers attended to everything.
    """
    try:
        return counted_values(json.dumps(config.to_dict(), sort_keys=True, default=str), type(config))
    except Exception:
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width


def estimate_memory(
    config: PreTrainedConfig,
    *,
    four_bit: bool,
    r: int = 0,
    batch_size: int = 0,
    length: int = 0,
    slots: int = 0,
    columns: int = 0,
    eager: bool = False,
) -> dict[str, float]:
    """GiB of GPU memory that a run will need at its peak, part by part, from the model's transformers config.

    `r` is the rank of the adapter. Training: rows of `batch_size` texts of `length` tokens, gradient checkpointing,
    loss in chunks. Answering: `slots` answers of `columns` tokens. Measured peaks (benchmarks/RESULTS.md) are met
    within 7 %; with unsloth, which keeps less, it is an upper bound. `eager`: texts are padded, and one layer at a time
    holds the scores of every token for every other, in 16 bit and in float32 (not measured on a GPU).
    """
    model = empty(config)
    linear = linear_layers(model).values()
    in_linear = sum(module.weight.numel() for module in linear)
    adapter = r * sum(module.in_features + module.out_features for module in linear)
    adapter += r * sum(len(w) * (w.shape[1] + w.shape[2]) for w in expert_matrices(model).values())
    tokens, layers = batch_size * length, config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", 1)
    # Of a score one copy in 16 bit and two in float32; in training three in float32, two of them of gradients.
    scores = (12 * tokens * length or 10 * slots * columns**2) * (heads if isinstance(heads, int) else max(heads))
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * config.hidden_size
    gib = {
        # NF4 with double quantization: 4.127 bits per weight of a linear layer. Embeddings and experts stay in 16 bit.
        "weights": in_linear * (4.127 / 8 if four_bit else 2) + 2 * (model.num_parameters() - in_linear),
        # Weights and gradients in float32 and two moments of a byte each; 16 bit and nothing else for answering.
        "adapter": adapter * (10 if tokens else 2),
        # One hidden state a layer is kept; of one layer at a time five tensors of the MLP are alive.
        "activations": tokens * (2 * layers * config.hidden_size + 5 * 2 * inner),
        "attention scores": scores if eager else 0,
        "keys and values": 2 * values_per_token(config) * slots * columns,
        # Expanded matrices, a chunk of the loss, a prompt's forward pass, CUDA itself: at the size of 27B.
        "working memory": 3 * 2**30,
    }
    return {part: round(size / 2**30, 2) for part, size in gib.items()}
