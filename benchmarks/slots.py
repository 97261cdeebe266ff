"""Batched greedy answering for Gemma 2 in which a finished answer makes room for the next task at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def one_token_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention of one new token a row over the whole cache, with the softcapping of Gemma 2.

    The same arithmetic as transformers' eager attention, but the cache is read where it lies: query heads that share
    a key head are grouped, where eager copies the keys and values once a query head.
    Shapes: query (rows, heads, 1, width), key and value (rows, key heads, columns, width), attention_mask
    (rows, 1, 1, columns), true where a column may be seen. Returns (rows, 1, heads, width).
    """
    import torch

    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~attention_mask, -torch.inf), dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(rows, 1, heads, width), None


class SlotCache:
    """Keys and values of several answers at once, one slot (row) each, in a ring of columns.

    Every decoding step writes one column of all slots. The order of columns does not matter to attention, because
    positions are rotated into the keys before they are stored; `positions` (slots, columns) says which token a column
    holds, -1 for none. So a new prompt can take over one slot while the others go on: it is written into the columns
    just before the next one. Memory: 2 x layers x key heads x head width x columns values a slot.
    """

    def __init__(self, config: Any, slots: int, columns: int, device: Any, dtype: Any):
        import torch

        shape = (slots, config.num_key_value_heads, columns, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.positions = torch.full((slots, columns), -1, device=device)
        self.columns = torch.zeros(1, dtype=torch.long, device=device)  # where the next forward pass writes
        self.slot: int | None = None  # the slot that reads its prompt; None: all slots decode one token

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store the new keys and values of `layer`; return what this forward pass attends to (called by the model)."""
        rows = slice(None) if self.slot is None else slice(self.slot, self.slot + 1)
        self.keys[layer][rows].index_copy_(2, self.columns, key)
        self.values[layer][rows].index_copy_(2, self.columns, value)
        return (self.keys[layer], self.values[layer]) if self.slot is None else (key, value)


class SlotDecoder:
    """A causal language model with a `SlotCache`: reads prompts one by one, decodes all slots together.

    On a GPU the decoding step is recorded once as a CUDA graph and replayed: at these sizes most of a step would
    otherwise go into launching its thousands of kernels.
    """

    def __init__(self, model: Any, slots: int, columns: int):
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register("one_token", one_token_attention)
        self.model = model
        self.config = model.config.get_text_config()
        self.cache = SlotCache(self.config, slots, columns, model.device, model.dtype)
        self.tokens = torch.zeros((slots, 1), dtype=torch.long, device=model.device)
        self.token_positions = torch.zeros((slots, 1), dtype=torch.long, device=model.device)
        self.next_column = 0
        self.graph: Any = None

    def read_prompt(self, slot: int, prompt: Sequence[int]) -> Any:
        """Fill `slot` with the prompt (token ids); returns the scores of the next token (1, vocabulary)."""
        import torch
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        device, columns = self.model.device, self.cache.positions.shape[1]
        ids = torch.tensor([prompt], device=device)
        positions = torch.arange(len(prompt), device=device)
        self.cache.slot = slot
        self.cache.columns = (positions + self.next_column - len(prompt)) % columns
        self.cache.positions[slot] = -1
        self.cache.positions[slot, self.cache.columns] = positions
        self.token_positions[slot] = len(prompt)
        mask_options = {
            "config": self.config,
            "inputs_embeds": torch.empty((1, len(prompt), 1), dtype=self.model.dtype, device=device),
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions[None],
        }
        masks = {
            "full_attention": create_causal_mask(**mask_options),
            "sliding_attention": create_sliding_window_causal_mask(**mask_options),
        }
        return self.model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _step(self) -> Any:
        """One forward pass of all slots on the fixed tensors of this object."""
        cache = self.cache
        cache.positions.index_copy_(1, cache.columns, self.token_positions)
        seen = cache.positions >= 0
        near = seen & (cache.positions > self.token_positions - self.config.sliding_window)
        return self.model(
            input_ids=self.tokens,
            attention_mask={"full_attention": seen[:, None, None], "sliding_attention": near[:, None, None]},
            position_ids=self.token_positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    def decode(self, tokens: Any) -> Any:
        """Append one token a slot (slots,); returns the scores of the next ones (slots, vocabulary)."""
        import torch

        self.cache.slot = None
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            self.cache.columns = torch.zeros(1, dtype=torch.long, device=self.model.device)
            self.column = self.cache.columns
        self.cache.columns = self.column
        self.column.fill_(self.next_column)
        attention, self.config._attn_implementation = self.config._attn_implementation, "one_token"
        try:
            if self.model.device.type != "cuda":
                logits = self._step()
            else:
                if self.graph is None:
                    self._record()
                self.graph.replay()
                logits = self.logits
        finally:
            self.config._attn_implementation = attention
        self.token_positions += 1
        self.next_column = (self.next_column + 1) % self.cache.positions.shape[1]
        return logits

    def _record(self) -> None:
        """Record the decoding step; the pass before it only compiles and allocates (it may be repeated unharmed)."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()


def slots_that_fit(model: Any, columns: int, wanted: int, reserve: float = 2.5 * 2**30) -> int:
    """How many slots of `columns` tokens fit on the model's GPU beside `reserve` bytes of working memory (at least 1)."""
    import torch

    if model.device.type != "cuda":
        return wanted
    config = model.config.get_text_config()
    bytes_a_slot = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * columns * model.dtype.itemsize
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(model.device).total_memory
    allowed = total * torch.cuda.get_per_process_memory_fraction(model.device) - torch.cuda.memory_reserved()
    free = min(allowed, torch.cuda.mem_get_info(model.device)[0])
    return max(1, min(wanted, int((free - reserve) // bytes_a_slot)))


def answer_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Callable[[int], int],
    slots: int,
    process: Callable[[Any, Any], Any],
    stop: Callable[[Any, Any], Any],
    hide_prompt: bool = True,
    columns: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers to `prompts` (token ids), yielded as (index, new token ids) in the order in which they finish.

    `max_new_tokens(index)` is asked at every token, so it may fall while the run goes on. `process` and `stop` are
    transformers' LogitsProcessorList and StoppingCriteriaList: they see (slots, history) token ids, padded on the left;
    with `hide_prompt` the history starts after the prompt. The token that stopped an answer is included.
    """
    import torch

    longest = max(len(prompt) + max_new_tokens(index) for index, prompt in enumerate(prompts))
    decoder = SlotDecoder(model, slots, max(columns, longest))
    pad = model.generation_config.pad_token_id or 0
    history = torch.full((slots, longest), pad, device=model.device)
    running: list[int | None] = [None] * slots
    answers: dict[int, list[int]] = {}
    waiting = deque(range(len(prompts)))
    tokens = torch.zeros(slots, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        while waiting or any(index is not None for index in running):
            fresh = []
            for slot in range(slots):
                if running[slot] is None and waiting:
                    running[slot] = index = waiting.popleft()
                    answers[index] = []
                    history[slot] = pad
                    if not hide_prompt:
                        history[slot, -len(prompts[index]) :] = torch.tensor(prompts[index], device=model.device)
                    logits = decoder.read_prompt(slot, prompts[index])
                    tokens[slot] = process(history[slot : slot + 1], logits.float()).argmax(-1)[0]
                    fresh.append(slot)
            if not fresh:
                logits = decoder.decode(tokens)
                tokens = process(history, logits.float()).argmax(-1)
            changed = fresh or [slot for slot in range(slots) if running[slot] is not None]
            history[changed] = torch.cat([history[changed, 1:], tokens[changed, None]], dim=1)
            stopped = stop(history, None).tolist()
            for slot, token in zip(changed, tokens[changed].tolist(), strict=True):
                index = running[slot]
                answers[index].append(token)
                if stopped[slot] or len(answers[index]) >= max_new_tokens(index):
                    running[slot] = None
                    yield index, answers.pop(index)
