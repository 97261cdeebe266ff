"""Attention over texts that stand end to end in a row."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from helpers import RecipeError


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
    does not see a column, broadcasts to (rows, heads, tokens, columns). Returns (rows, heads, tokens, width of values).
    """
    cap = softcap or 1.0
    grouped = (query * (scaling / cap)).reshape(len(key), key.shape[1], -1, query.shape[-1])
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores) * cap
    scores = scores.view(*query.shape[:-1], -1).masked_fill(unseen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights.view(*grouped.shape[:-1], -1), value).view(*query.shape[:-1], -1)


def in_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in float32 with the mask that the model makes itself, 0 where a token sees; shapes as for `packed`.

    Eager attention rounds its scores to 16 bit, which is coarse where they are large, as without a scaling factor.
    """
    refuse_arguments(others)
    states = (states.float() for states in (query, key, value))
    result = capped(*states, unseen=attention_mask < 0, scaling=scaling, softcap=softcap)
    return result.to(query.dtype).transpose(1, 2).contiguous(), None


def reference(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    """What `run` returns while the model attends `in_float32`, or by its own attention if that asks for more."""
    AttentionInterface.register("float32", in_float32)
    AttentionMaskInterface.register("float32", eager_mask)
    config = model.config.get_text_config()
    own, config._attn_implementation = config._attn_implementation, "float32"
    try:
        return run()
    except Exception:  # sinks, or attention without the interface of transformers
        config._attn_implementation = own
        return run()
    finally:
        config._attn_implementation = own


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

    A text begins wherever `position_ids` (1, tokens) is 0; no token sees another text. Layers that do not hand them
    down are served by `remember_positions`. Computed in the first of `ways`.
    Query (1, heads, tokens, width), key and value (1, key heads, tokens, width); returns (1, tokens, heads, width).
    RecipeError if the model asks for a mask of its own or for anything else that is not known here.
    """
    refuse_arguments(others | {"attention_mask": attention_mask})
    positions = row.positions if position_ids is None else position_ids
    if positions is None or positions.shape[1] != query.shape[2]:
        raise RecipeError("this model's attention is not told where a text begins")
    attend, window = ways(query.device)[0], sliding_window or query.shape[2]
    return attend(query, key, value, positions, scaling, softcap, window).transpose(1, 2).contiguous(), None


class Row:
    """The row that a model is reading."""

    positions: torch.Tensor | None = None  # its position_ids (1, tokens)


row = Row()


def remember_positions(model: PreTrainedModel) -> RemovableHandle:
    """Keep the `position_ids` of a model's every call in `row`; returns what ends that.

    The hook is one of the decoder inside: peft calls the `forward` of the model itself, which passes its hooks by.
    """

    def remember(_module: torch.nn.Module, _arguments: Any, named: Mapping[str, Any]) -> None:
        tokens = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
        row.positions = named.get("position_ids")
        if row.positions is None and tokens is not None:  # one text
            row.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]

    return model.base_model.register_forward_pre_hook(remember, with_kwargs=True)


def in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor,
    scaling: float,
    softcap: float | None,
    window: int,
) -> torch.Tensor:
    """torch's flex attention, compiled: it skips what is not seen, and holds no scores in the GPU's memory."""
    options = {"block_mask": packed_mask(position_ids, window), "enable_gqa": True}
    shared_memory = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    options["kernel_options"] = kernel_options(query.shape[3], shared_memory)
    if softcap is not None:
        options["score_mod"] = lambda score, *_: softcap * torch.tanh(score / softcap)
    return compiled()(query, key, value, scale=scaling, **options)


def text_by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor,
    scaling: float,
    softcap: float | None,
    window: int,
) -> torch.Tensor:
    """Every text gets its own scores by `capped`, and nothing is compiled.

    Work and memory grow with the square of a text's length, not of a row's.
    """
    tokens = query.shape[2]
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]
    results = []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        position = torch.arange(q.shape[2], device=query.device)
        distance = position[:, None] - position
        results.append(capped(q, k, v, (distance < 0) | (distance >= window), scaling, softcap))
    return torch.cat(results, dim=2)


WAYS: tuple[Callable[..., torch.Tensor], ...] = (in_one_kernel, text_by_text)  # the fastest first
left_out: set[Callable[..., torch.Tensor]] = set()  # those that failed this process's check, see `find_way`


def ways(device: torch.device) -> list[Callable[..., torch.Tensor]]:
    """The ways to attend that are left on a device, the fastest first; kernels are compiled from Ampere on."""
    compiles = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return [way for way in WAYS if way not in left_out and (compiles or way is not in_one_kernel)]


def find_way(device: torch.device, attempt: Callable[[], str]) -> str:
    """Try the ways in turn until `attempt` neither fails nor returns a problem; returns the last problem, "" if none.

    `attempt` runs a model. The ways that it failed with are left out from then on, and a line says so: a kernel may
    ask for more shared memory than the GPU has, for one. A RecipeError, which is about the model, ends the search.
    """
    left_out.clear()
    while True:
        try:
            problem = attempt()
        except RecipeError as error:
            return str(error)
        except Exception as error:  # whatever a compiler, a driver or the memory has to say
            problem = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        attend, *others = ways(device)
        if not (problem and others):
            return problem
        left_out.add(attend)
        print(f"the compiled attention fails on this GPU ({problem}): each text is computed by itself, which is slower")


def kernel_options(width: int, shared_memory: int) -> dict[str, Any]:
    """The options of `in_one_kernel` for heads of this width, where a block may have so many bytes of shared memory.

    benchmarks/attention_memory.py measures what the kernels ask for; benchmarks/results/attention.md holds its table.
    """
    # Left to itself, torch takes another kernel for fewer than 128 tokens, which does not fit every model's heads.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if width <= 128:  # torch's own choice fits; on an H200 its three stages are slower than two
        return options | ({"bwd_num_stages": 2} if shared_memory > 200 * 1024 else {})
    if width <= 256:  # fits an A10, L4 and G4, too, and is faster than torch's own on an H200
        blocks = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)
        return options | {"fwd_num_stages": 2, **blocks, "bwd_num_stages": 2}
    options["fwd_num_stages"] = 2  # with torch's own three not even an H200 has enough
    if shared_memory < 136 * 1024:  # A10, L4, G4
        options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32}
    return options


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
