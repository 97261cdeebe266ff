"""The slot decoder: several answers together, one slot each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from engine import attention, shapes
from engine.decoding import Decoding, Model, apply_rules, in_batches


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of the `Decoder` that is at work; returns (rows, tokens, heads, width).

    One new token per row: query (rows, heads, 1, width), key and value (rows, key heads, columns, width).
    One prompt: `attention.packed` with a single text.
    RecipeError if the model asks for a mask of its own or for anything else that is not known here.
    """
    attention.refuse_arguments(others | {"attention_mask": attention_mask})
    decoder = Decoder.at_work
    if decoder.slot is None:
        unseen = decoder.unseen(sliding_window)
        return attention.capped(query, key, value, unseen, scaling, softcap).transpose(1, 2).contiguous(), None
    return attention.packed(module, query, key, value, None, scaling, softcap, sliding_window, decoder.position_ids)


class Decoder:
    """A model (with or without an adapter) that decodes several answers together, one slot (row) each.

    Keys and values lie in a ring of columns; every decoding step writes one column of all slots. The order of columns
    does not matter to attention, because positions are rotated into the keys before they are stored; `positions`
    (slots, columns) says which token a column holds, -1 for none. So a new prompt can take over one slot while the
    others go on: it is read alone, without padding, into the columns just before the next one.
    Memory: see `shapes.values_per_token`, times the columns, per slot.

    On a GPU the decoding step is recorded once as a CUDA graph and replayed: launched one by one its thousands of
    small kernels would take longer than they run.
    """

    at_work: Decoder  # the one whose model is called: not every model hands arguments of ours down to its attention

    def __init__(self, model: Model, slots: int, columns: int):
        AttentionInterface.register("slots", slot_attention)
        self.model, self.device = model, model.device
        self.config = model.config.get_text_config()
        self.own_attention, self.config._attn_implementation = self.config._attn_implementation, "slots"
        self.keys: dict[int, torch.Tensor] = {}  # by layer, made by the first prompt: layers may differ in shape
        self.values: dict[int, torch.Tensor] = {}
        # A recorded step reads and writes these tensors, so they keep their place.
        self.positions = torch.full((slots, columns), -1, device=self.device)
        self.column = torch.zeros(1, dtype=torch.long, device=self.device)  # the next one to be written
        self.tokens = torch.zeros((slots, 1), dtype=torch.long, device=self.device)
        self.token_positions = torch.zeros((slots, 1), dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None

    def close(self) -> None:
        """Give the model back its own attention: that of the slots cannot read padded batches."""
        self.config._attn_implementation = self.own_attention

    def read_prompt(self, slot: int, prompt: Sequence[int]) -> torch.Tensor:
        """Fill `slot` with the prompt (token ids); returns the scores of the next token (1, vocabulary)."""
        positions = torch.arange(len(prompt), device=self.device)
        columns = (positions + self.column - len(prompt)) % self.positions.shape[1]
        self.positions[slot] = -1
        self.positions[slot, columns] = positions
        self.token_positions[slot] = len(prompt)
        return self._forward(torch.tensor([prompt], device=self.device), positions[None], slot, columns)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token per slot (slots,); returns the scores of the next ones (slots, vocabulary)."""
        self.tokens.copy_(tokens[:, None])
        if self.device.type != "cuda":
            self.logits = self._step()
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()
        self.token_positions += 1
        self.column.add_(1).remainder_(self.positions.shape[1])
        return self.logits

    def unseen(self, window: int | None) -> torch.Tensor:
        """True where the new token of a slot does not see a column, for layers with this window (None: all is seen)."""
        if window not in self.masks:
            mask = self.positions < 0
            if window is not None:
                mask = mask | (self.positions <= self.token_positions - window)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def _step(self) -> torch.Tensor:
        self.positions.index_copy_(1, self.column, self.token_positions)
        self.masks: dict[int | None, torch.Tensor] = {}
        return self._forward(self.tokens, self.token_positions, None, self.column)

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # loads kernels and handles; a step may be repeated, it writes the same column again
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, slot: int | None, columns: torch.Tensor
    ) -> torch.Tensor:
        """Run the model over new tokens of one slot or (None) of all."""
        self.slot, self.columns, self.position_ids = slot, columns, positions
        Decoder.at_work = self
        with torch.no_grad():
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values of `layer` and return those to attend to; the model calls this as a cache's own."""
        rows = slice(None) if self.slot is None else slice(self.slot, self.slot + 1)
        for stored, new in ((self.keys, key), (self.values, value)):
            if layer not in stored:
                shape = (len(self.positions), new.shape[1], self.positions.shape[1], new.shape[3])
                stored[layer] = new.new_zeros(shape)
            stored[layer][rows].index_copy_(2, self.columns, new)
        return (self.keys[layer], self.values[layer]) if self.slot is None else (key, value)


def problem(model: Model, prompt: Sequence[int], steps: int = 4) -> str:
    """Why a `Decoder` does not give the model's own scores for the last `steps` tokens of a prompt; "" if it does.

    Long prompts are cut to 1,024 tokens: the reference holds the scores of all pairs.
    """
    ids = torch.tensor([prompt[:1024]], device=model.device)
    with torch.no_grad():
        expected = attention.reference(model, lambda: model(ids, use_cache=False, logits_to_keep=steps + 1).logits[0])

    def attempt() -> str:
        decoder = Decoder(model, 1, ids.shape[1])
        try:
            found = [decoder.read_prompt(0, ids[0, :-steps].tolist()).clone()]
            found += [decoder.decode(token[None]).clone() for token in ids[0, -steps:]]
        finally:
            decoder.close()
        agree = attention.scores_agree(torch.cat(found), expected)
        return "" if agree else "slots give other scores than the model alone"

    return attention.find_way(model.device, attempt)


def that_fit(model: Model, columns: int, wanted: int, reserve: float = 3.0) -> int:
    """How many slots of `columns` tokens fit on the model's GPU beside `reserve` GiB of working memory (at least 1).

    Found by asking for the memory, so that a limit of any kind counts. Without a GPU: `wanted`.
    """
    if model.device.type != "cuda":
        return wanted
    slot = shapes.values_per_token(model.config.get_text_config()) * columns * model.dtype.itemsize
    torch.cuda.empty_cache()
    for slots in range(wanted, 1, -1):
        try:
            torch.empty(slots * slot + int(reserve * 2**30), dtype=torch.uint8, device=model.device)
        except torch.OutOfMemoryError:
            continue
        torch.cuda.empty_cache()
        return slots
    return 1


def answer(
    model: Model, prompts: Sequence[list[int]], limit_of: Callable[[int], int], decoding: Decoding
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers to `prompts` (token ids), yielded as (index, new token ids) in the order in which they finish.

    `limit_of(index)` is how many tokens that answer may have. It is asked after every token; it may fall while the run
    goes on, but not rise. The rules of `decoding` see (rows, history) token ids, padded on the left (see
    `apply_rules`), of the new tokens alone or, with `penalize_prompt`, of prompt and new tokens. The token that
    stopped an answer is part of it.
    """
    if not prompts:
        return
    slots = min(decoding.parallel, len(prompts))
    pad = model.config.get_text_config().vocab_size
    columns = max(len(prompt) + limit_of(index) for index, prompt in enumerate(prompts))
    history = torch.full((slots, columns), pad, device=model.device)
    tokens = torch.zeros(slots, dtype=torch.long, device=model.device)
    waiting = deque(range(len(prompts)))
    running: dict[int, tuple[int, list[int]]] = {}  # slot: index of its prompt, answer so far
    decoder = Decoder(model, slots, columns)
    try:
        while waiting or running:
            changed = [slot for slot in range(slots) if slot not in running][: len(waiting)]
            for slot in changed:  # free slots read the next prompts
                index = waiting.popleft()
                running[slot] = index, []
                history[slot] = pad
                if decoding.penalize_prompt:
                    history[slot, -len(prompts[index]) :] = torch.tensor(prompts[index], device=model.device)
                scores = decoder.read_prompt(slot, prompts[index]).float()
                tokens[slot] = apply_rules(decoding.process, history[slot : slot + 1], scores).argmax(-1)[0]
            if not changed:  # no slot or no prompt is free: all running answers get one more token
                changed = list(running)
                scores = decoder.decode(tokens).float()
                tokens = apply_rules(decoding.process, history, scores).argmax(-1)
            history[changed] = torch.cat([history[changed, 1:], tokens[changed, None]], dim=1)
            stopped = decoding.stop(history, None).tolist()
            for slot, token in zip(changed, tokens[changed].tolist(), strict=True):
                index, written = running[slot]
                written.append(token)
                if stopped[slot] or len(written) >= limit_of(index):
                    del running[slot]
                    yield index, written
    finally:
        decoder.close()


def choose(
    model: Model, in_slots: bool, together: bool, prompts: Sequence[list[int]], longest_answer: int, wanted: int
) -> tuple[Callable[..., Iterator[tuple[int, list[int]]]], int]:
    """How to answer, `answer` or `in_batches`, and how many prompts (token ids) at a time: `wanted`, 0 for as many as
    fit. `in_slots` and `together` are what the architecture allows; slots must also give the model's own scores for the
    first prompt.
    """
    if in_slots:
        if not (why := problem(model, prompts[0])):
            columns = max(map(len, prompts)) + longest_answer
            return answer, that_fit(model, columns, wanted or 64)
        print(f"{why}: the model answers with its own generate(), in batches")
    return in_batches, (wanted or 16) if together else 1
