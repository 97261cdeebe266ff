"""Decoding: the rules by which tokens are chosen, and answers in batches with the model's own generate()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation import (
    EosTokenCriteria,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from helpers import RecipeError, encode_within

Model = PreTrainedModel | PeftModel
LONGEST_BAN = 16  # tokens: no banned string has more in any tokenizer
Rules = Callable[[torch.Tensor, Any], torch.Tensor]
# How answers are made: from prompts (token ids) and a function that says how many tokens the answer to prompt number N
# may have by now, it yields (N, token ids of the answer) in the order in which they finish.
Generate = Callable[[Sequence[list[int]], Callable[[int], int]], Iterator[tuple[int, list[int]]]]


class Decoding(NamedTuple):
    """How the tokens of a run's answers are chosen, the same for all of them."""

    parallel: int  # answers at the same time
    process: Rules  # transformers' LogitsProcessorList: (token ids so far, scores) to scores
    stop: Rules  # transformers' StoppingCriteriaList: (token ids so far, None) to true where an answer ends
    penalize_prompt: bool  # whether "so far" includes the prompt


def token_rules(
    tokenizer: PreTrainedTokenizerBase, ends: list[int], repetition_penalty: float, banned: Sequence[str], stop: str
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """The rules that change the scores of the next token, and those that end an answer: at an end token (their ids are
    `ends`) or at the text `stop`, if it is not empty.

    A banned string is forbidden both as a beginning and within a text, where some tokenizers spell it otherwise. End
    tokens are not penalized: a prompt in chat format holds them, and fewer answers would end.
    """
    penalty = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))

    def penalize(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        penalized = penalty(ids, scores)
        for end in ends:
            if 0 <= end < scores.shape[1]:
                penalized[:, end] = scores[:, end]
        return penalized

    rules = LogitsProcessorList([penalize])
    if banned:
        banned_ids = [tokenizer.encode(word, add_special_tokens=False) for word in banned]
        banned_ids += [encode_within(tokenizer, word) for word in banned]
        rules.append(NoBadWordsLogitsProcessor(banned_ids, eos_token_id=ends))
    stops = [EosTokenCriteria(ends)] + ([StopStringCriteria(tokenizer, stop)] if stop else [])
    return rules, StoppingCriteriaList(stops)


def apply_rules(process: Rules, history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` (rows, vocabulary) after the rules of `process` for each row's `history` (rows, tokens).

    Where a history holds the number of tokens of the vocabulary, there is none: that is how histories are padded. No
    real token will do, because the rules would take it for one that was written. Some padding is always there: a ban
    on several tokens does not look at a history that is shorter than they are.
    """
    history = torch.nn.functional.pad(history, (LONGEST_BAN, 0), value=scores.shape[1])
    return process(history, torch.nn.functional.pad(scores, (0, 1), value=-torch.inf))[:, :-1]


def generate_batch(model: Model, rows: Sequence[list[int]], limit: int, decoding: Decoding) -> list[list[int]]:
    """Answers of at most `limit` tokens to prompts (token ids) with the model's own `generate`, padded on the left."""
    width = max(map(len, rows))
    padding = torch.tensor([[True] * (width - len(row)) + [False] * len(row) for row in rows], device=model.device)
    lengths = [limit] * len(rows)  # of the answers

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        history = ids.clone()
        history[:, :width][padding] = scores.shape[1]
        return apply_rules(decoding.process, history[:, 0 if decoding.penalize_prompt else width :], scores)

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        stopped, length = decoding.stop(ids[:, width:], scores), ids.shape[1] - width
        for row in stopped.nonzero().flatten().tolist():
            lengths[row] = min(lengths[row], length)
        return stopped

    with torch.inference_mode():
        written = model.generate(
            torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device),
            attention_mask=(~padding).long(),
            do_sample=False,
            max_new_tokens=limit,
            max_length=None,  # unsloth sets one, and generate() would tell of two limits each time
            eos_token_id=None,  # `stop` alone knows where an answer ends
            logits_processor=[process],
            stopping_criteria=[stop],
        )
    return [row[:length] for row, length in zip(written[:, width:].tolist(), lengths, strict=True)]


def in_batches(
    model: Model, prompts: Sequence[list[int]], limit_of: Callable[[int], int], decoding: Decoding
) -> Iterator[tuple[int, list[int]]]:
    """Like `slots.answer`, with the model's own `generate`: for unsloth, and for models that do not fit the slots.

    When a batch does not fit into the GPU's memory it is halved, and so are those that follow.
    Raises RecipeError if a single prompt does not fit.
    """
    waiting, size = list(range(len(prompts))), decoding.parallel
    while waiting:
        chosen = waiting[:size]
        try:
            found = generate_batch(model, [prompts[i] for i in chosen], max(map(limit_of, chosen)), decoding)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                length = f"{len(prompts[chosen[0]])} tokens: lower k or max_seq_length"
                raise RecipeError(f"the GPU's memory is too small for a prompt of {length}") from None
            torch.cuda.empty_cache()
            size = len(chosen) // 2
            continue
        waiting = waiting[len(chosen) :]
        for index, tokens in zip(chosen, found, strict=True):
            yield index, tokens[: limit_of(index)]


def sample(
    model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers to a few prompts (token ids) without any rules, to see what training changes."""

    def ended(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        ends = torch.tensor(model.generation_config.eos_token_id, device=ids.device)
        return torch.isin(ids[:, -1], ends)

    plain = Decoding(len(prompts), LogitsProcessorList(), ended, penalize_prompt=False)
    found = generate_batch(model, prompts, max_new_tokens, plain)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


def first_tokens(
    generate: Callable[..., Any],
    decoding: Decoding,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    number: int = 8,
) -> list[dict[str, Any]]:
    """The first tokens of the answer to a prompt (token ids), with their probabilities before and after the rules, and
    the token that would have come first without them.
    """
    steps = []

    def watch(history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ruled = decoding.process(history, scores)
        steps.append((scores[0].softmax(-1), ruled[0].softmax(-1)))
        return ruled

    def shown(token: int) -> str:
        text = tokenizer.decode([token])
        return repr(tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text)  # a part of a character

    list(generate([prompt], lambda _: number, decoding=decoding._replace(process=watch)))
    rows = []
    for before, after in steps:
        chosen, first = int(after.argmax()), int(before.argmax())
        row = {
            "chosen": shown(chosen),
            "probability": float(after[chosen]),
            "probability before": float(before[chosen]),
        }
        rows.append(row | {"first before": shown(first), "probability of first before": float(before[first])})
    return rows


def write_live(
    generate: Callable[..., Any], decoding: Decoding, tokenizer: PreTrainedTokenizerBase, prompt: list[int], limit: int
) -> None:
    """Answer one prompt (token ids) with at most `limit` tokens and print the text while it is written."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)

    def choose_and_show(history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ruled = decoding.process(history, scores)
        streamer.put(ruled[0].argmax(-1, keepdim=True).cpu())
        return ruled

    list(generate([prompt], lambda _: limit, decoding=decoding._replace(process=choose_and_show, parallel=1)))
    streamer.end()
