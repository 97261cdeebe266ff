"""Attention over texts that stand end to end in a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedConfig

from helpers import RecipeError

# Models (model_type of config.json) whose attention is what `packed` and `slots.Decoder` compute;
# tests/test_families.py trains and asks each. Others are trained with padding and answer with their own `generate`.
KNOWN_MODELS = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


def check_known(config: PreTrainedConfig) -> None:
    """RecipeError if the attention of a model may be of another kind than those known here."""
    if config.model_type not in KNOWN_MODELS:
        raise RecipeError(f"the attention of {config.model_type} models has not been checked here")


def scores_agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors of a model's scores (..., vocabulary) differ by rounding only.

    The measure is the mean difference at the worst token, as a part of the spread of all scores: below 0.001 in float32
    and below 0.5 in 16 bit. There, right ways came to at most 0.3, and tokens that saw what they should not to 1.1.
    """
    limit = 1e-3 if found.dtype == torch.float32 else 0.5
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().mean(-1).max() < limit * expected.std())


def capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    unseen: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with the softcapping of Gemma 2: the arithmetic of transformers' eager attention without its copies of
    keys and values, because the query heads that share a key head stand side by side.

    Query (rows, heads, tokens, width), key and value (rows, key heads, columns, width); `unseen`, true where a token
    does not see a column, broadcasts to (rows, heads, tokens, columns). Returns (rows, heads, tokens, width).
    """
    cap = softcap or 1.0
    grouped = (query * (scaling / cap)).reshape(len(key), key.shape[1], -1, query.shape[-1])
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores) * cap
    scores = scores.view(*query.shape[:-1], -1).masked_fill(unseen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights.view(*grouped.shape[:-1], -1), value).view(query.shape)


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """RecipeError if a model hands its attention a number or tensor that ours would leave out, such as sinks or a mask.

    What models hand down to every layer and attention does not use is no reason.
    """
    unused = ("position_ids", "cache_position", "num_items_in_batch", "shift_labels")
    for name, value in arguments.items():
        is_switch = value is None or isinstance(value, bool)
        if name not in unused and not is_switch and (isinstance(value, torch.Tensor) or value):
            raise RecipeError(f"this model's attention uses {name}, which is not known here")


def packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention for rows that hold several texts end to end, with softcapping and a sliding window.

    A text begins wherever `position_ids` (1, tokens) is 0; no token sees another text. On a GPU (Ampere and later)
    torch's flex attention skips what is not seen; elsewhere every text gets its own scores by `capped`, and nothing is
    compiled. The work grows with the square of a text's length, not of a row's.
    Query (1, heads, tokens, width), key and value (1, key heads, tokens, width); returns (1, tokens, heads, width).
    RecipeError if the model asks for a mask of its own or for anything else that is not known here.
    """
    refuse_arguments(others | {"attention_mask": attention_mask})
    tokens = query.shape[2]
    if query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0):
        options = {"block_mask": packed_mask(position_ids, sliding_window or tokens), "enable_gqa": True}
        # Left to itself, torch takes another kernel for fewer than 128 tokens, which does not fit every model's heads.
        options["kernel_options"] = {"BACKEND": "TRITON"}
        if softcap is not None:
            options["score_mod"] = lambda score, *_: softcap * torch.tanh(score / softcap)
        return compiled()(query, key, value, scale=scaling, **options).transpose(1, 2), None
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]
    results = []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        position = torch.arange(q.shape[2], device=query.device)
        distance = position[:, None] - position
        unseen = (distance < 0) | (distance >= (sliding_window or tokens))
        results.append(capped(q, k, v, unseen, scaling, softcap))
    return torch.cat(results, dim=2).transpose(1, 2), None


@lru_cache(maxsize=4)
def packed_mask(position_ids: torch.Tensor, window: int) -> BlockMask:
    """For flex attention: which blocks of a row's keys a block of its queries sees; made once for all layers."""
    text = (position_ids[0] == 0).cumsum(0)
    width = torch.tensor(window, device=text.device)  # a number would be compiled in, and so once for each window

    def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (text[query] == text[key]) & (query >= key) & (query - key < width)

    return create_block_mask(seen, None, None, len(text), len(text), device=text.device)


@lru_cache
def compiled() -> Any:
    """torch's flex attention, compiled at its first call for rows of any length."""
    import torch._dynamo

    torch._dynamo.config.specialize_float = True  # the cap is a constant of the kernel
    # With several processes torch would look for places to split the kernel at its weights: it has none, and some
    # versions of torch refuse to compile attention that way.
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(flex_attention, dynamic=True)
