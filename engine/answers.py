"""Answers: questions, the clock, and the log that survives an interruption and the loss of the machine."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from engine import files, forms, records
from engine.decoding import Generate
from engine.travel import Courier, arrivals
from helpers import SHOT, RecipeError, clean_answer, digest, encode


def check_tasks(
    name: str, tasks: Sequence[Mapping[str, Any]], prompts: Sequence[list[int]], window: int, longest: int
) -> list[Any]:
    """The task_ids that leave fewer than `longest` tokens for an answer, beside their prompts without shots (token
    ids); they are printed. RecipeError, beginning with `name`, for those that leave fewer than 16.
    """
    left = {task["task_id"]: window - len(ids) for task, ids in zip(tasks, prompts, strict=True)}
    if hopeless := [f"{task_id} ({window - rest:,} tokens)" for task_id, rest in left.items() if rest < 16]:
        remedy = f"prompt and answer share max_seq_length = {window:,}: raise it, or shorten or remove the tasks"
        raise RecipeError(f"{name}: no room to answer task_id {', '.join(hopeless[:10])}; {remedy}")
    if too_long := {task_id: rest for task_id, rest in left.items() if rest < longest}:
        print(f"answered without shots, in at most as many tokens: {too_long}")
    return list(too_long)


def check_examples(
    name: str, rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, budget: int, k: int
) -> list[dict[str, str]]:
    """The examples (instruction, response) that fit into a prompt of `budget` tokens; RecipeError if none does."""
    fitting = [row for row in rows if len(encode(tokenizer, SHOT.format(**row)).ids) <= budget]
    print(f"{len(fitting)} of {len(rows)} examples fit into max_seq_length - max_new_tokens = {budget:,} tokens")
    if k and not fitting:
        raise RecipeError(f"{name}: no example fits: raise max_seq_length or lower max_new_tokens")
    if k > len(fitting):
        print(f"k = {k}: all of them are used")
    return fitting


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
            except (ValueError, RecursionError):
                row = None
            if forms.is_row(row):
                yield row
            else:
                print(f"{path}, line {number}: left out (no answer); its task is answered again")


def find_logs(folder: str | Path) -> list[Path]:
    """The logs of answers in a folder: `answers.jsonl` (one process) and `answers.N.jsonl` (several)."""
    return sorted(p for p in Path(folder).glob("answers*") if re.fullmatch(r"answers(\.\d+)?\.jsonl", p.name))


def kept(folder: str | Path, keys: Mapping[Any, str], finished: str | Path) -> dict[Any, dict[str, Any]]:
    """Answers of an earlier run by task_id, from the logs in `folder`; `keys` holds each task's `key`.

    Answers with other keys are removed from the logs if the run that gave them was finished, that is, if the file
    `finished` and its record are there and whole; if it was interrupted, RecipeError asks what to do. `finished` is
    removed when a task is to be answered. With several processes the main one has to come first.
    """
    logs = find_logs(folder)
    rows = {path: list(read_log(path)) for path in logs}
    own = {path: [row for row in found if keys.get(row["task_id"]) == row["key"]] for path, found in rows.items()}
    if other := [path for path in logs if own[path] != rows[path]]:
        if not (Path(finished).exists() and records.read(finished).get("files")):
            raise RecipeError(
                f"{other[0]} holds {len(rows[other[0]]) - len(own[other[0]])} answers of an interrupted run with other "
                "settings: set them back to go on with it, or choose another output_dir, or delete that file"
            )
        for path in other:
            if own[path]:
                files.write_jsonl(path, own[path])
            else:
                path.unlink()
    every = sorted((row for found in own.values() for row in found), key=lambda row: row["attempt"])
    kept = {row["task_id"]: row for row in every}
    if keys.keys() - kept.keys():
        Path(finished).unlink(missing_ok=True)
    return kept


def parallel_before(finished: str | Path) -> int:
    """How many answers an interrupted run that was to write `finished` decoded at the same time, 0 if there is none.

    In 16 bit an answer can change with what is decoded beside it, so a resumed run keeps that number.
    """
    record = records.read(finished)
    return 0 if "files" in record else record.get("parallel", 0)


def begin(finished: str | Path, record: dict[str, Any]) -> None:
    """Write the record of `finished` without its files: its answers are begun.

    If answers of the same models with the same settings are kept, the `versions` of `record` become those of both.
    """
    old = records.read(finished)
    if old and "model" in old["inputs"] and key(old, []) == key(record, []):
        record["versions"] = records.join_versions(old, record)
    files.write_json(records.path_of(finished), record)


def courier(hub_repo: str, token: str, record: Mapping[str, Any]) -> Courier | None:
    """What carries the answers of the run with this `record` to a hub repository; None without one."""
    return Courier(hub_repo, token, "answers", key(record, [])) if hub_repo else None


def bring(carrier: Courier | None, output_file: Path, record: Mapping[str, Any]) -> None:
    """Add the answers that another machine sent to the log beside `output_file`, and the record with which that machine
    began. Where an unfinished run with other settings has its log, nothing is added: `kept` asks what to do.
    """
    state, old = PartialState(cpu=not torch.cuda.is_available()), records.read(output_file)
    other = old and "files" not in old and key(old, []) != key(record, [])
    with state.main_process_first():
        if carrier and state.is_main_process and not other:
            names = carrier.open()
            with arrivals(output_file.parent) as part:
                carrier.bring(names, part)
                if not old and (begun := records.read(part / output_file.name)):
                    files.write_json(records.path_of(output_file), begun)
                add_to_log(output_file.parent, [row for log in find_logs(part) for row in read_log(log)])


def add_to_log(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append to `answers.jsonl` the rows that none of the logs in `folder` holds."""
    here = [row for log in find_logs(folder) for row in read_log(log)]
    for row in rows:
        if row not in here:
            files.append_row(folder / "answers.jsonl", row)


def send(carrier: Courier, output_file: Path) -> None:
    """Send all answers beside `output_file` in one log, and the record with which they were begun."""
    logs, begun = map(Path.read_bytes, find_logs(output_file.parent)), records.path_of(output_file)
    whole_lines = b"".join(log[: log.rfind(b"\n") + 1] for log in logs)
    carrier.send({"answers.jsonl": whole_lines, begun.name: begun.read_bytes()})


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


def answer_all(
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    output_file: Path,
    clock: Clock,
    record: dict[str, Any],
    carrier: Courier | None = None,
) -> tuple[dict[Any, dict[str, Any]], int]:
    """The rows (task_id and ROW) of all questions by task_id, and the number of processes that answered.

    Answers of an earlier run in the folder of `output_file` are kept (see `kept`), and if there are more to come its
    `record` is begun (see `begin`). The `carrier` takes the log to the hub after each fiftieth of the answers. Of
    several processes (accelerate) each answers its share into a log of its own; the main one returns with all answers,
    the others end here.
    """
    folder, keys = output_file.parent, {question.task_id: question.key for question in questions}
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # it removes the log of a finished run with other settings
        rows = kept(folder, keys, finished=output_file)
        if state.is_main_process and len(rows) < len(questions):
            begin(output_file, record)
    print(f"{len(rows)} tasks are already answered, {len(questions) - len(rows)} to go")
    state.wait_for_everyone()
    mine = questions[state.process_index :: state.num_processes]
    log = folder / (f"answers.{state.process_index}.jsonl" if state.num_processes > 1 else "answers.jsonl")
    answered = answer(generate, tokenizer, mine, rows, log, clock)
    progress = tqdm(answered, total=len(mine), unit="answer", disable=not state.is_main_process)
    seconds = tokens = 0
    before, every = len(rows), max(1, len(mine) // 50)
    for count, row in enumerate(progress, start=1):
        rows[row["task_id"]] = row
        seconds, tokens = seconds + row["seconds"], tokens + row["new_tokens"]
        rate, end = tokens / max(seconds, 1e-3), seconds / count * len(mine) / 60
        progress.set_postfix_str(f"{rate:.0f} tokens/s, projected end after {end:.1f} minutes")
        if carrier and state.is_main_process and len(rows) > before and count % every == 0:
            send(carrier, output_file)
    processes = state.num_processes
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        sys.exit()
    if carrier and len(rows) > before:
        send(carrier, output_file)
        carrier.wait()
    return (rows if processes == 1 else kept(folder, keys, finished=output_file)), processes


def submission_rows(tasks: Sequence[Mapping[str, Any]], answers: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Rows (task_id, input, output) in the order of the tasks; RecipeError lists tasks without an answer."""
    ids = [task["task_id"] for task in tasks]
    missing, empty = [i for i in ids if i not in answers], [i for i in ids if answers.get(i) == ""]
    if missing:
        raise RecipeError(
            f"no answer for task_id {missing[:10]} ({len(missing)} of {len(ids)}): run this notebook again"
        )
    if empty:  # greedy decoding would write the same again
        raise RecipeError(
            f"an empty answer for task_id {empty[:10]} ({len(empty)} of {len(ids)}): set ban_words = False, "
            "another prompt_style or a smaller repetition_penalty, or train the adapter longer"
        )
    return [{"task_id": task["task_id"], "input": task["input"], "output": answers[task["task_id"]]} for task in tasks]


def metrics(rows: Mapping[Any, Mapping[str, Any]], processes: int) -> dict[str, Any]:
    """What all answers (rows by task_id) cost: seconds of answering, tokens, cut and repeated answers, memory."""
    seconds = sum(row["seconds"] for row in rows.values()) / processes
    new_tokens = sum(row["new_tokens"] for row in rows.values())
    return {
        "tasks": len(rows),
        "answered": len(rows),
        "seconds": round(seconds, 1),
        "new_tokens": new_tokens,
        "tokens_per_second": round(new_tokens / max(seconds, 1e-3), 1),
        "cut": sum(row["cut"] for row in rows.values()),
        "asked_again": [task_id for task_id, row in rows.items() if row["attempt"] == 2],
        "longest_answer_at_the_end": min(row["limit"] for row in rows.values()),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
    }
