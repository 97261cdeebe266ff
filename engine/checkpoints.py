"""Checkpoints that can be trusted: recorded, checked, and gone on from."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engine import files, records, training
from helpers import RecipeError


def find(folder: str | Path, record: Mapping[str, Any], adapter: str | Path) -> Path | None:
    """The newest whole checkpoint below `folder` of the training with this `record`, or None to start anew.

    A checkpoint is whole if every file is as its own record says (see `Recorder`), which must be one of this
    training; others are named and left out. If the checkpoints are those of another training, it depends on whether
    that one was finished, that is, whether its `adapter` folder has its record: then the checkpoints are deleted.
    Otherwise RecipeError asks what to do with them, and nothing is touched. The record of another training's adapter is
    deleted, because the adapter is about to be replaced.
    """
    folder, adapter = Path(folder), Path(adapter)
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((path for path, found in numbers.items() if found), key=lambda path: -int(numbers[path][1]))
    finished = records.read(adapter)
    # Every checkpoint repeats the record of the training, so that no single damaged file makes it unknown.
    old = next(filter(None, map(records.read, [folder, *checkpoints])), {})
    changed = records.changed_parts(old, record) if old else ["what it was started with"] if checkpoints else []
    if changed:
        if not old or not finished or records.changed_parts(finished, old):
            raise RecipeError(
                f"{folder} holds an interrupted training with other values of {', '.join(changed)}: set them back to "
                "go on with it, or choose another output_dir, or delete that folder"
            )
        shutil.rmtree(folder)
        checkpoints = []
    if finished and records.changed_parts(finished, record):
        records.path_of(adapter).unlink()
    files.write_json(folder / "record.json", record)
    for checkpoint in checkpoints:
        own = records.read(checkpoint)
        if not own.get("files") or "measured" not in own:
            problem = "it was not written to its end, or its record cannot be read"
        elif records.changed_parts(own, record):
            problem = "it is of another training"
        else:
            problem = records.find_change(checkpoint, own)
        if not problem:
            return checkpoint
        print(f"{checkpoint} is left out: {problem}")
    return None


class Recorder(TrainerCallback):
    """Writes the record of every checkpoint, last of all, and so marks it as whole.

    It adds what was `measured` up to then: seconds of training, with those before the `checkpoint` that it goes on
    from, and the peak of this process's GPU memory in GiB (None without a GPU).
    """

    def __init__(self, record: Mapping[str, Any], checkpoint: Path | None = None):
        self.record = record
        self.seconds_before = records.read(checkpoint)["measured"]["seconds"] if checkpoint else 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process keeps its random state in the checkpoint
        if state.is_world_process_zero:
            seconds = self.seconds_before + time.perf_counter() - self.started
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            measured = {"seconds": round(seconds, 1), "peak_gpu_gib": peak and round(peak, 2)}
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            records.write(checkpoint, {**self.record, "measured": measured})


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one, and try the held-out texts. Of several processes only the
    first one returns; the others end here. RecipeError says what to change where the GPU's memory is too small.
    """
    args, config = trainer.args, trainer.model.config
    config.use_cache = False
    try:
        go_on(trainer, checkpoint)
    except torch.OutOfMemoryError as error:
        raise training.out_of_memory(args.per_device_train_batch_size, args.gradient_accumulation_steps) from error
    if trainer.eval_dataset:
        trainer.evaluate()
    config.use_cache = True
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        sys.exit()


def go_on(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the beginning; after the last step only its weights are loaded.

    transformers would go one step too far from a checkpoint of the last step in the middle of an epoch.
    """
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json") if checkpoint else None
    if state is None or state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    else:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device=str(trainer.model.device)))
        trainer.state = state
