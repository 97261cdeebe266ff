"""Answers: questions, the clock, the log, batches, and how likely a reference is."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from engine import files, records
from helpers import RecipeError, clean_answer, digest, encode_within

Model = PreTrainedModel | PeftModel
Rules = Callable[[torch.Tensor, Any], torch.Tensor]
# How answers are made: from prompts (token ids) and a function that says how many tokens the answer to prompt number N
# may have by now, it yields (N, token ids of the answer) in the order in which they finish.
Generate = Callable[[Sequence[list[int]], Callable[[int], int]], Iterator[tuple[int, list[int]]]]


def key(record: Mapping[str, Any], prompt: Sequence[int]) -> str:
    """A hash of all that an answer depends on: contents of model and adapter, the record's settings, the prompt."""
    models = [records.identity(record["inputs"][role]) for role in ("model", "adapter") if role in record["inputs"]]
    return digest([models, record["settings"], prompt])


# A row of an answer log, besides task_id: the `key`; the text; its length; whether it ended for want of room;
# the longest that an answer could become just then; seconds since the answer before; 1, or 2 for the second attempt.
ROW = ("key", "output", "new_tokens", "cut", "limit", "seconds", "attempt")


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of an answer log; a line that is none, such as one that was cut off by a kill, is named and left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and {"task_id", *ROW} <= row.keys():
                yield row
            else:
                print(f"{path}, line {number}: left out (no answer); its task is answered again")


def kept(folder: str | Path, keys: Mapping[Any, str], finished: str | Path) -> dict[Any, dict[str, Any]]:
    """Answers of an earlier run by task_id, from the logs in `folder`; `keys` holds each task's `key`.

    The logs are `answers.jsonl` (one process) and `answers.N.jsonl` (several). If they hold answers with other keys and
    the run that gave them was finished (the file `finished` exists), they are removed; if it was interrupted,
    RecipeError asks what to do. `finished` is removed when a task is to be answered. With several processes the main
    one has to come first.
    """
    logs = sorted(p for p in Path(folder).glob("answers*") if re.fullmatch(r"answers(\.\d+)?\.jsonl", p.name))
    rows = [(path, row) for path in logs for row in read_log(path)]
    if other := [path for path, row in rows if keys.get(row["task_id"]) != row["key"]]:
        if not Path(finished).exists():
            raise RecipeError(
                f"{other[0]} holds {other.count(other[0])} answers of an interrupted run with other settings: set them "
                "back to go on with it, or choose another output_dir, or delete that file"
            )
        for path in logs:
            path.unlink()
        rows = []
    kept = {row["task_id"]: row for _, row in sorted(rows, key=lambda pair: pair[1]["attempt"])}
    if keys.keys() - kept.keys():
        Path(finished).unlink(missing_ok=True)
    return kept


class Clock:
    """How long an answer may become: `limit` tokens, fewer where prompt and answer would exceed `window` tokens, and
    fewer for all once the time is short.

    `budget` is in seconds from now on, for all answers; 0 means no limit.
    """

    def __init__(self, limit: int, window: int, budget: float):
        self.limit, self.window, self.budget, self.started = limit, window, budget, time.perf_counter()
        self.seconds, self.answers, self.tokens = 0.0, 0, 0

    def limit_after(self, prompt: Sequence[int]) -> int:
        """How many tokens the answer to this prompt may have now."""
        return max(1, min(self.limit, self.window - len(prompt)))

    def note(self, tokens: int) -> float:
        """Count an answer of `tokens`; returns the seconds since the one before."""
        before, self.seconds = self.seconds, time.perf_counter() - self.started
        self.answers += 1
        self.tokens += tokens
        return self.seconds - before

    def share(self, open_tasks: int) -> None:
        """Lower `limit` if `open_tasks` more answers like those so far take too long, down to 16 at least."""
        left = self.budget - self.seconds
        needed = open_tasks * self.seconds / max(self.answers, 1)
        if self.budget and open_tasks and needed > left:
            rate = self.tokens / self.seconds
            self.limit = min(self.limit, max(16, int(left * rate / open_tasks)))


class Question(NamedTuple):
    """A task as the model is asked it."""

    task_id: Any
    key: str  # see `key`
    prompts: tuple[list[int], list[int]]  # the second one, without shots, is asked if the first answer is empty


class Decoding(NamedTuple):
    """How the tokens of a run's answers are chosen, the same for all of them."""

    parallel: int  # answers at the same time
    process: Rules  # transformers' LogitsProcessorList: (token ids so far, scores) to scores
    stop: Rules  # transformers' StoppingCriteriaList: (token ids so far, None) to true where an answer ends
    penalize_prompt: bool  # whether "so far" includes the prompt


def apply_rules(process: Rules, history: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` (rows, vocabulary) after the rules of `process` for each row's `history` (rows, tokens).

    Where a history holds the number of tokens of the vocabulary, there is none: that is how histories are padded. No
    real token will do, because the rules would take it for one that was written.
    """
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


def ask(
    generate: Generate, tokenizer: PreTrainedTokenizerBase, questions: Iterable[Question], attempt: int, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Yield the rows (task_id and ROW) of one attempt (1 or 2) at each question, as the answers finish.

    The longest prompts come first: what does not fit into the memory shows at once.
    """
    questions = sorted(questions, key=lambda question: len(question.prompts[attempt - 1]), reverse=True)
    prompts = [question.prompts[attempt - 1] for question in questions]
    clock.share(len(prompts))

    def limit_of(index: int) -> int:
        return clock.limit_after(prompts[index])

    for done, (index, tokens) in enumerate(generate(prompts, limit_of), start=1):
        row = {
            "task_id": questions[index].task_id,
            "key": questions[index].key,
            "output": clean_answer(tokenizer.decode(tokens, skip_special_tokens=True)),
            "new_tokens": len(tokens),
            "cut": len(tokens) >= limit_of(index),
            "limit": clock.limit,
            "seconds": round(clock.note(len(tokens)), 4),
            "attempt": attempt,
        }
        clock.share(len(prompts) - done)
        yield row


def answer(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    kept: Mapping[Any, dict[str, Any]],
    log: str | Path,
    clock: Clock,
) -> Iterator[dict[str, Any]]:
    """Yield one finished answer per question, as a dictionary (task_id and ROW).

    Those in `kept` (see the function of this name) come first, the others in the order in which they finish; each is in
    the file `log` before it is yielded. A question whose answer is empty is asked a second time, without shots; only
    the second answer is yielded. When the time is short, answers become shorter; when it is used up, the rest is not
    answered.
    """

    def is_final(row: Mapping[str, Any]) -> bool:
        return row["output"] != "" or row["attempt"] == 2

    rows = {question.task_id: kept[question.task_id] for question in questions if question.task_id in kept}
    yield from filter(is_final, list(rows.values()))
    for attempt in (1, 2):
        if attempt == 1:
            chosen = [question for question in questions if question.task_id not in rows]
        else:
            chosen = [question for question in questions if not is_final(rows[question.task_id])]
        for row in ask(generate, tokenizer, chosen, attempt, clock):
            if attempt == 2:
                row["seconds"] = round(row["seconds"] + rows[row["task_id"]]["seconds"], 4)
            files.append_row(log, row)
            rows[row["task_id"]] = row
            if is_final(row):
                yield row
            if 0 < clock.budget <= clock.seconds and len(rows) < len(questions):
                return


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
