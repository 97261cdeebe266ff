"""Training: rows without padding, kept layers, noise, checkpoints that can be trusted."""

from __future__ import annotations

import gc
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from engine import attention, files, records
from helpers import RecipeError, even_rows


@contextmanager
def paused(model: PreTrainedModel | PeftModel, engine: str) -> Iterator[None]:
    """Within the block a model in training can answer, with a cache and padded prompts; then it is as it was found.

    Also after an interruption: the cell that trains would take the attention for answering for its own.
    """
    config, training = model.config.get_text_config(), model.training
    before, cached = config._attn_implementation, config.use_cache
    model.eval()
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    else:
        config._attn_implementation = "eager"  # the attention of training reads rows without padding only
    config.use_cache = True
    try:
        yield
    finally:
        config._attn_implementation, config.use_cache = before, cached
        if engine == "unsloth":
            FastLanguageModel.for_training(model)
        model.train(training)


def try_without_padding(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> bool:
    """Give a freshly loaded model `attention.packed`, if a row of these `texts` (token ids) scores each as alone.

    Otherwise it keeps eager attention, and a line says why its rows have to be padded.
    """
    AttentionInterface.register("examples", attention.packed)
    config, problem = model.config.get_text_config(), ""
    rows = [torch.tensor([ids[:256]], device=model.device) for ids in texts]
    positions = torch.cat([torch.arange(row.shape[1], device=model.device) for row in rows])[None]
    try:
        attention.check_known(config)
        with torch.no_grad():
            alone = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
            config._attn_implementation = "examples"
            together = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
        if not attention.scores_agree(together, alone):
            problem = "a row without padding gives other scores than its texts alone"
    except RecipeError as error:
        problem = str(error)
    if problem:
        config._attn_implementation = "eager"
        print(f"{problem}: texts are padded instead, with transformers' own eager attention")
    return not problem


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


def balance_rows(trainer: Trainer) -> None:
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


class KeptLayers:
    """Gradient checkpointing in only as many layers as the GPU's memory requires, decided anew for every row.

    A checkpointed layer keeps its input alone and is computed again in the backward pass; a kept layer saves that time.
    How many bytes a kept layer takes per token, and how many the rest of a step, is measured while training. A row that
    does not fit all the same is computed again with fewer kept layers, with the same noise and on top of the same
    gradients. Of several processes each decides for itself, but an error stays one: the others wait for this one.
    """

    def __init__(self, trainer: Trainer, margin_gib: float = 2.0):
        self.layers = [layer for layer in trainer.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self.parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        self.margin, self.alone = margin_gib * 2**30, trainer.args.world_size == 1
        self.layer_bytes, self.rest_bytes, self.rest_tokens = 0.0, 0.0, 0
        self.layers[-1].register_forward_pre_hook(self.measure_layer)
        self.layers[-1].register_forward_hook(self.measure_layer)
        self.step, trainer.training_step = trainer.training_step, self.training_step

    def measure_layer(self, layer: GradientCheckpointingLayer, _inputs: Any, output: Any = None) -> None:
        if output is None:
            self.before = torch.cuda.memory_allocated()
        elif layer.training and not layer.gradient_checkpointing:
            hidden = output[0] if isinstance(output, tuple) else output  # what a checkpointed layer holds, too
            self.layer_bytes = (torch.cuda.memory_allocated() - self.before - hidden.nbytes) / self.tokens

    def keep(self, number: int) -> None:
        self.kept = number
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = index < len(self.layers) - number

    def number_that_fits(self, used: int) -> int:
        if self.layer_bytes <= 0:  # the first row measures
            return 1
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - used - self.margin
        rest = self.rest_bytes * max(1.0, self.tokens / self.rest_tokens)
        return int(min(max((free - rest) / (self.layer_bytes * self.tokens), 0), len(self.layers)))

    def training_step(self, model: torch.nn.Module, inputs: Mapping[str, Any], *arguments: Any) -> torch.Tensor:
        """The trainer's own training step, planned before and measured after."""
        if not self.rest_tokens:  # loading the model may have taken more
            torch.cuda.reset_peak_memory_stats()
        self.tokens, used = inputs["input_ids"].numel(), torch.cuda.memory_allocated()
        before = torch.cuda.max_memory_allocated()
        self.keep(self.number_that_fits(used))
        sums = [parameter.grad for parameter in self.parameters]
        random_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        while True:
            if self.alone:  # half a backward pass must leave nothing in the sums
                for parameter in self.parameters:
                    parameter.grad = None
            try:
                loss = self.step(model, inputs, *arguments)
                break
            except torch.OutOfMemoryError:
                if not (self.kept and self.alone):
                    raise
            self.margin += 2**30
            self.keep(self.kept // 2)
            gc.collect()
            torch.cuda.empty_cache()
            torch.set_rng_state(random_states[0])
            torch.cuda.set_rng_state_all(random_states[1])
        if self.alone and sums[0] is not None:
            torch._foreach_add_([parameter.grad for parameter in self.parameters], sums)
        peak = torch.cuda.max_memory_allocated()
        if peak > before and self.tokens >= self.rest_tokens:  # so the peak is this row's
            self.rest_bytes = peak - used - self.kept * self.layer_bytes * self.tokens
            self.rest_tokens = self.tokens
        return loss


def keep_layers(trainer: Trainer) -> None:
    """Let a trainer on a GPU checkpoint only as many layers as its memory requires (see `KeptLayers`)."""
    KeptLayers(trainer)


def checkpoint_to_resume(folder: str | Path, record: Mapping[str, Any], adapter: str | Path) -> Path | None:
    """The newest whole checkpoint below `folder` of the training with this `record`, or None to start anew.

    A checkpoint is whole if every file is as its own record says (see `CheckpointRecorder`), which must be one of this
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


class CheckpointRecorder(TrainerCallback):
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


def run(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one; after the last step only its weights are loaded.

    transformers would go one step too far from a checkpoint of the last step in the middle of an epoch.
    """
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json") if checkpoint else None
    if state is None or state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    else:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device=str(trainer.model.device)))
        trainer.state = state


def out_of_memory(batch_size: int, accumulation: int) -> RecipeError:
    """What to change when a training step does not fit into the GPU's memory, at the same effective batch."""
    if batch_size > 1:
        advice = (
            f"set per_device_train_batch_size={batch_size // 2} and gradient_accumulation_steps={accumulation * 2} "
            f"(the effective batch stays {batch_size * accumulation}, up to rounding)"
        )
    else:
        advice = "lower max_seq_length or r, or take a smaller model"
    return RecipeError(f"the GPU's memory is full: {advice}, restart the runtime and run the notebook again")
