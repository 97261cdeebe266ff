"""How likely a model finds a reference answer, given the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from engine.decoding import Model
from helpers import encode_within


def reference_nll(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    references: Sequence[str],
    batch_tokens: int = 4096,
) -> list[float]:
    """Mean negative log-likelihood of each reference given its prompt (token ids), in nats per character.

    The end of the text is not counted. A batch holds as many texts as come to `batch_tokens`, the longest first. They
    are padded on the left, so that references end together and the model computes logits for them alone; only one at a
    time is turned into float32 (256,000 values per token).
    """
    texts = [
        (prompt, encode_within(tokenizer, reference)) for prompt, reference in zip(prompts, references, strict=True)
    ]
    rows = [prompt + reference for prompt, reference in texts]
    waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    nll = [0.0] * len(rows)
    config = model.config.get_text_config()
    if config._attn_implementation == "slots":  # left behind by an interrupted answer; it cannot read padded batches
        config._attn_implementation = "eager"
    with torch.inference_mode(), tqdm(total=len(rows), unit="reference") as progress:
        while waiting:
            width = len(rows[waiting[0]])
            size = max(1, batch_tokens // width)
            chosen, waiting = waiting[:size], waiting[size:]
            keep: Any = max(len(texts[i][1]) for i in chosen) + 1
            if model.device.type == "cpu":
                # For the slice that a number makes torch copies the output matrix once per row (2.7 GB for 8 rows of
                # Gemma 3), for positions it does not. unsloth on a GPU knows numbers only.
                keep = torch.arange(width - keep, width)
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(rows[i])) + rows[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in chosen])
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
                logits_to_keep=keep,
                use_cache=False,
            ).logits
            for i, row in zip(chosen, logits, strict=True):
                target = torch.tensor(texts[i][1], device=row.device)
                predicted = row[-len(target) - 1 : -1].float()
                nll[i] = float(torch.nn.functional.cross_entropy(predicted, target, reduction="sum"))
            progress.update(len(chosen))
    return [value / len(reference) for value, reference in zip(nll, references, strict=True)]
