"""Batched greedy answering for Gemma 2 in which a finished answer makes room for the next task at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def slot_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention with the softcapping of Gemma 2 for `SlotDecoder`: the arithmetic of transformers' eager attention
    without its copies of keys and values and without holding the scores of a whole prompt.

    One new token a row: query (rows, heads, 1, width), key and value (rows, key heads, columns, width),
    attention_mask (rows, 1, 1, columns), true where a column may be seen.
    One prompt: query (1, heads, tokens, width), key and value (1, key heads, tokens, width), attention_mask None.
    Returns (rows, tokens, heads, width). Inference only.
    """
    import torch

    rows, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    cap = softcap or 1.0
    query = query * (scaling / cap)

    def attend(query: Any, key: Any, value: Any, hidden: Any) -> Any:
        # Query heads that share a key head stand side by side: (rows, key heads, group, tokens, width).
        scores = torch.matmul(query.flatten(2, 3), key.transpose(2, 3))
        if softcap is not None:
            scores = scores.tanh_().mul_(cap)
        scores.view(*query.shape[:-1], -1).masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        return torch.matmul(weights, value).view(query.shape)

    query = query.view(rows, key_heads, heads // key_heads, tokens, width)
    if attention_mask is not None:
        result = attend(query, key, value, ~attention_mask[:, :, None])
    else:
        result = torch.empty_like(query)
        for start in range(0, tokens, 512):
            end = min(start + 512, tokens)
            first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
            position = torch.arange(start, end, device=query.device)[:, None]
            column = torch.arange(first, end, device=query.device)
            hidden = column > position
            if sliding_window is not None:
                hidden |= column <= position - sliding_window
            result[..., start:end, :] = attend(
                query[..., start:end, :], key[:, :, first:end], value[:, :, first:end], hidden
            )
    return result.flatten(1, 2).transpose(1, 2), None


def example_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """Causal attention with the softcapping of Gemma 2 for training rows that hold several examples end to end.

    An example begins wherever `position_ids` (1, tokens) is 0; no token sees another example. Every example gets its
    own scores, so the work grows with the square of an example's length, not of the row's, and nothing is compiled.
    Query (1, heads, tokens, width), key and value (1, key heads, tokens, width); returns (1, tokens, heads, width).
    """
    import torch

    _, heads, tokens, width = query.shape
    key_heads, cap = key.shape[1], softcap or 1.0
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], tokens], strict=True)]
    rows = (query * (scaling / cap), key, value)
    results = []
    for length, q, k, v in zip(lengths, *(row[0].split(lengths, dim=1) for row in rows), strict=True):
        # Query heads that share a key head stand side by side, so that keys and values need no copies.
        scores = torch.matmul(q.reshape(key_heads, -1, width), k.transpose(1, 2))
        if softcap is not None:
            scores = torch.tanh(scores) * cap
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (sliding_window or tokens))
        scores = scores.view(heads, length, length).masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        results.append(torch.matmul(weights.view(key_heads, -1, length), v).view(heads, length, width))
    return torch.cat(results, dim=1).transpose(0, 1)[None], None


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
    """A Gemma 2 model (with or without an adapter) over a `SlotCache`: reads prompts one by one, without padding, and
    decodes all slots together.

    On a GPU the decoding step is recorded once as a CUDA graph and replayed: launched one by one its thousands of
    small kernels would take longer than they run.
    """

    def __init__(self, model: Any, slots: int, columns: int):
        import torch
        from transformers import AttentionInterface

        AttentionInterface.register("slots", slot_attention)
        self.model = model
        self.config = model.config.get_text_config()
        self.config._attn_implementation = "slots"
        self.cache = SlotCache(self.config, slots, columns, model.device, model.dtype)
        # The tensors that a recorded step reads; they keep their place.
        self.column = torch.zeros(1, dtype=torch.long, device=model.device)
        self.tokens = torch.zeros((slots, 1), dtype=torch.long, device=model.device)
        self.token_positions = torch.zeros((slots, 1), dtype=torch.long, device=model.device)
        self.graph: Any = None
        self.logits: Any = None

    def read_prompt(self, slot: int, prompt: Sequence[int]) -> Any:
        """Fill `slot` with the prompt (token ids); returns the scores of the next token (1, vocabulary)."""
        import torch

        cache, device = self.cache, self.model.device
        positions = torch.arange(len(prompt), device=device)
        cache.slot = slot
        cache.columns = (positions + self.column - len(prompt)) % cache.positions.shape[1]
        cache.positions[slot] = -1
        cache.positions[slot, cache.columns] = positions
        self.token_positions[slot] = len(prompt)
        with torch.no_grad():
            return self.model(
                input_ids=torch.tensor([prompt], device=device),
                attention_mask={"full_attention": None, "sliding_attention": None},
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def decode(self, tokens: Any) -> Any:
        """Append one token a slot (slots,); returns the scores of the next ones (slots, vocabulary)."""
        self.cache.slot = None
        self.cache.columns = self.column
        self.tokens.copy_(tokens[:, None])
        if self.model.device.type != "cuda":
            self.logits = self._step()
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()
        self.token_positions += 1
        self.column.add_(1).remainder_(self.cache.positions.shape[1])
        return self.logits

    def _step(self) -> Any:
        import torch

        cache = self.cache
        cache.positions.index_copy_(1, self.column, self.token_positions)
        seen = cache.positions >= 0
        near = seen & (cache.positions > self.token_positions - self.config.sliding_window)
        masks = {"full_attention": seen[:, None, None], "sliding_attention": near[:, None, None]}
        with torch.no_grad():
            return self.model(
                input_ids=self.tokens,
                attention_mask=masks,
                position_ids=self.token_positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

    def _record(self) -> None:
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # loads kernels and handles; a step may be repeated, it writes the same column again
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()


def slots_that_fit(model: Any, columns: int, wanted: int, reserve: float = 3.0) -> int:
    """How many slots of `columns` tokens fit on the model's GPU beside `reserve` GiB of working memory (at least 1).

    Found by asking for the memory, so that a limit of any kind counts. Without a GPU: `wanted`.
    """
    import torch

    if model.device.type != "cuda":
        return wanted
    config = model.config.get_text_config()
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * columns * model.dtype.itemsize
    torch.cuda.empty_cache()
    for slots in range(wanted, 1, -1):
        try:
            torch.empty(slots * slot + int(reserve * 2**30), dtype=torch.uint8, device=model.device)
        except torch.OutOfMemoryError:
            continue
        torch.cuda.empty_cache()
        return slots
    return 1


def answer_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Callable[[int], int],
    slots: int,
    process: Callable[[Any, Any], Any],
    stop: Callable[[Any, Any], Any],
    penalize_prompt: bool = False,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers to `prompts` (token ids), yielded as (index, new token ids) in the order in which they finish.

    `max_new_tokens(index)` is asked after every token; it may fall while the run goes on, but not rise. `process` and
    `stop` are transformers' LogitsProcessorList and StoppingCriteriaList: they see (rows, history) token ids, padded on
    the left, of the new tokens alone or, with `penalize_prompt`, of prompt and new tokens. The token that stopped an
    answer is part of it.
    """
    import torch

    longest = max(len(prompt) + max_new_tokens(index) for index, prompt in enumerate(prompts))
    decoder = SlotDecoder(model, slots, longest)
    history = torch.full((slots, longest), model.generation_config.pad_token_id or 0, device=model.device)
    tokens = torch.zeros(slots, dtype=torch.long, device=model.device)
    waiting = deque(range(len(prompts)))
    running: dict[int, int] = {}  # slot: index of its prompt
    answers: dict[int, list[int]] = {}
    while waiting or running:
        changed = [slot for slot in range(slots) if slot not in running][: len(waiting)]
        for slot in changed:
            running[slot] = index = waiting.popleft()
            answers[index] = []
            history[slot] = model.generation_config.pad_token_id or 0
            if penalize_prompt:
                history[slot, -len(prompts[index]) :] = torch.tensor(prompts[index], device=model.device)
            scores = decoder.read_prompt(slot, prompts[index])
            tokens[slot] = process(history[slot : slot + 1], scores.float()).argmax(-1)[0]
        if not changed:
            changed = list(running)
            tokens = process(history, decoder.decode(tokens).float()).argmax(-1)
        history[changed] = torch.cat([history[changed, 1:], tokens[changed, None]], dim=1)
        stopped = stop(history, None).tolist()
        for slot, token in zip(changed, tokens[changed].tolist(), strict=True):
            index = running[slot]
            answers[index].append(token)
            if stopped[slot] or len(answers[index]) >= max_new_tokens(index):
                del running[slot]
                yield index, answers.pop(index)
