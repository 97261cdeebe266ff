"""Rows of several texts, end to end and without padding: whether a model can be trained on them, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AttentionInterface, PreTrainedModel, Trainer

from engine import attention


def switch_on(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> bool:
    """Give a freshly loaded model `attention.packed`, if a row of these `texts` (token ids) has the scores and
    gradients that each has alone.

    Otherwise it keeps eager attention, and a line says why its rows have to be padded.
    """
    if why := problem(model, texts):
        print(f"{why}: texts are padded instead, with transformers' own eager attention")
    return not why


def problem(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> str:
    """Give a model `attention.packed`, or its eager attention back and say why (see `switch_on`)."""
    AttentionInterface.register("examples", attention.packed)
    config = model.config.get_text_config()
    single = [torch.tensor([ids[:256]], device=model.device) for ids in texts]
    row, lengths = torch.cat(single, dim=1), [text.shape[1] for text in single]
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])[None]
    parts = attention.reference(model, lambda: [scores_and_gradients(model, text) for text in single])
    alone = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]

    def attempt() -> str:
        config._attn_implementation = "examples"
        train_once(model, row, positions)
        scores, gradients = scores_and_gradients(model, row, positions)
        if not attention.scores_agree(scores, alone[0]):
            return "a row without padding gives other scores than its texts alone"
        if not gradients_agree(gradients, alone[1]):
            return "a row without padding gives other gradients than its texts alone"
        return ""

    hook = attention.remember_positions(model)
    if why := attention.find_way(model.device, attempt):
        config._attn_implementation = "eager"
        hook.remove()
    return why


def train_once(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> None:
    """A forward pass as in training, where attention may ask for more than in evaluation, such as dropout."""
    was_training = model.training
    try:
        with torch.no_grad():
            model.train()(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.train(was_training)


def scores_and_gradients(
    model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of a row of token ids (1, tokens, vocabulary), and the gradients of its embeddings (1, tokens, width)
    when every token shall predict itself: so no text has a part in another's.
    """
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _ids: Any, embeddings: torch.Tensor) -> torch.Tensor:
        kept.append(embeddings.detach().requires_grad_())
        return kept[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(scores[0].float(), ids[0], reduction="sum")
            (gradients,) = torch.autograd.grad(loss, kept[0])
    finally:
        hook.remove()
    return scores.detach(), gradients


def gradients_agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors of gradients differ by rounding only: by less than a hundredth of their norm, in 16 bit by
    less than half of it.
    """
    limit = 1e-2 if found.dtype == torch.float32 else 0.5
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= limit * expected.norm())


def even_rows(texts: Sequence[int], lengths: Sequence[int], texts_per_row: int) -> list[list[int]]:
    """Deal `texts` (their numbers) out to rows of nearly the same length: the longest first, each to the shortest row.

    `lengths[number]` is a text's length in tokens; no row gets more than `texts_per_row` texts.
    """
    rows: list[list[int]] = [[] for _ in range(-(-len(texts) // texts_per_row))]
    for text in sorted(texts, key=lambda text: lengths[text], reverse=True):
        open_rows = [row for row in rows if len(row) < texts_per_row]
        min(open_rows, key=lambda row: sum(lengths[other] for other in row)).append(text)
    return rows


class EvenRows(torch.utils.data.Sampler):
    """The texts of every step, dealt out to rows of nearly the same length (see `even_rows`).

    `lengths` holds those of all texts in tokens. Their order is random, by `seed`, and another one in each epoch.
    """

    epoch = 0

    def __init__(self, lengths: Sequence[int], texts_per_row: int, texts_per_step: int, seed: int):
        self.lengths, self.seed = lengths, seed
        self.texts_per_row, self.texts_per_step = texts_per_row, texts_per_step

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for first in range(0, len(order), self.texts_per_step):
            for row in even_rows(order[first : first + self.texts_per_step], self.lengths, self.texts_per_row):
                yield from row


def balance(trainer: Trainer) -> None:
    """Let every step of a training without padding have rows of nearly the same length.

    Only where in its step a text is trained is chosen, which changes no gradient but by rounding. So no row needs much
    more memory than the others, and of several processes, which get the rows in turn, none waits for a longer row.
    """
    args, lengths = trainer.args, [len(ids) for ids in trainer.train_dataset["input_ids"]]
    texts_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sampler = EvenRows(lengths, args.per_device_train_batch_size, texts_per_step, args.seed)
    trainer._get_train_sampler = lambda *_: sampler


def noise_as_with_padding(model: PreTrainedModel | PeftModel, alpha: float) -> None:
    """Make NEFTune's noise on a row without padding that of a padded batch of the same texts.

    The noise is alpha / sqrt(tokens of a row x width). A padded row is as long as the longest text of its batch; a row
    without padding holds all of them, so its noise would shrink with their number. The trainer's alpha is set anew for
    every row, from the row's `position_ids` (1, tokens), which begin at 0 with every text.
    """
    embeddings = model.get_input_embeddings()

    def set_alpha(_module: torch.nn.Module, _arguments: Any, named: Mapping[str, torch.Tensor]) -> None:
        positions = named["position_ids"]
        embeddings.neftune_noise_alpha = alpha * (positions.shape[1] / (int(positions.max()) + 1)) ** 0.5

    model.register_forward_pre_hook(set_alpha, with_kwargs=True)
