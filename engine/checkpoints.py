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
from engine.travel import Courier, arrivals
from helpers import RecipeError, digest


def courier(hub_repo: str, token: str, record: Mapping[str, Any]) -> Courier | None:
    """What carries the checkpoints of the training with this `record` to a hub repository; None without one."""
    sources = {role: records.identity(source) for role, source in record["inputs"].items()}
    run = digest([sources, record["settings"]])
    return Courier(hub_repo, token, "checkpoints", run) if hub_repo else None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder names, -1 if it names none."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def find(
    folder: str | Path, record: dict[str, Any], adapter: str | Path, carrier: Courier | None = None
) -> Path | None:
    """The newest whole checkpoint below `folder` of the training with this `record`, or None to start anew.

    A checkpoint is whole if every file is as its own record says (see `Recorder`), which must be one of this
    training; others are named and left out. If the checkpoints are those of another training, it depends on whether
    that one was finished, that is, whether its `adapter` folder has its record: then the checkpoints are deleted.
    Otherwise RecipeError asks what to do with them, and nothing is touched. The record of another training's adapter is
    deleted, because the adapter is about to be replaced. A newer checkpoint that another machine sent by the `carrier`
    is brought. The `versions` of `record` become those that trained up to the checkpoint and, if it is not of the last
    step, train on from it.
    """
    folder, adapter = Path(folder), Path(adapter)
    checkpoints = sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)[::-1]
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
    found = next((path for path in checkpoints if is_whole(path, record)), None)
    if carrier:
        found = bring(carrier, folder, record, found)
    if found:
        own = records.read(found)
        record["versions"] = own["versions"] if own.get("last_step") is True else records.join_versions(own, record)
    return found


def is_whole(checkpoint: Path, record: Mapping[str, Any], place: object = None) -> bool:
    """Whether a checkpoint is as its own record says, and of the training with this `record`; if not, it is said, with
    its `place` if that is not the folder.
    """
    own = records.read(checkpoint)
    if not own.get("files") or "measured" not in own:
        problem = "it was not written to its end, or its record cannot be read"
    elif records.changed_parts(own, record):
        problem = "it is of another training"
    else:
        problem = records.find_change(checkpoint, own)
    if problem:
        print(f"{place or checkpoint} is left out: {problem}")
    return not problem


def bring(carrier: Courier, folder: Path, record: Mapping[str, Any], local: Path | None) -> Path | None:
    """The checkpoint that another machine sent, put into `folder`, if it is whole and newer than the `local` one;
    otherwise the local one.

    Whatever lies there runs no code: the trainer reads optimizer and random state with `weights_only`.
    """
    names = carrier.open()
    with arrivals(folder) as part:
        carrier.bring({"record.json"} & {*names}, part)
        step = records.read(part).get("step", sys.maxsize)
        if names and step > (step_of(local) if local else 0):
            carrier.bring(names, part)
            if is_whole(part, record, f"the checkpoint in {carrier.hub_repo}"):
                local = folder / f"checkpoint-{step}"
                shutil.rmtree(local, ignore_errors=True)  # it was not whole
                part.rename(local)
    return local


class Recorder(TrainerCallback):
    """Writes the record of every checkpoint, last of all, and so marks it as whole.

    It adds what was `measured` up to then: seconds of training, with those before the `checkpoint` that it goes on
    from, and the peak of this process's GPU memory in GiB (None without a GPU). The `carrier` takes each one along.
    """

    def __init__(self, record: Mapping[str, Any], checkpoint: Path | None = None, carrier: Courier | None = None):
        self.record, self.carrier = record, carrier
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
            last = state.global_step >= state.max_steps
            step = {"step": state.global_step, "last_step": last}
            records.write(checkpoint, {**self.record, "measured": measured, **step})
            if self.carrier:
                names = ["record.json", *records.read(checkpoint)["files"]]
                self.carrier.send({name: checkpoint / name for name in names})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.carrier:
            self.carrier.wait()


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
    # DistributedDataParallel first: as the last to let go of the processes' connections it may wait for itself forever.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        sys.exit()


def go_on(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the beginning; after the last step only its weights are loaded.

    transformers would go one step too far from a checkpoint of the last step in the middle of an epoch.
    """
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json") if checkpoint else None
    if state is None or state.global_step < state.max_steps:
        if state and state.train_batch_size != trainer.args.train_batch_size:
            before, now = state.train_batch_size, trainer.args.train_batch_size
            print(f"{now} texts at a time instead of {before}: losses can differ by rounding and by NEFTune's noise")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    else:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device=str(trainer.model.device)))
        trainer.state = state
