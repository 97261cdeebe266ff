"""Training: what the trainer is given, and what a training measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.notebook import NotebookProgressCallback

from engine import formats, lora, records, rows
from engine.kept_layers import KeptLayers
from helpers import RecipeError, encode


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[int]]) -> None:
    """RecipeError unless each text (token ids) begins with the one <bos>, if the tokenizer has one, and holds no
    control token before its end.
    """
    begin = encode(tokenizer, "").ids
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for number, ids in enumerate(texts, start=1):
        if list(ids[: len(begin)]) != begin or control & set(ids[len(begin) : -1]):
            raise RecipeError(f"text {number} of {len(texts)} has a control token in its middle, or no <bos>")


def count_steps(texts: int, texts_per_step: int, epochs: float, max_steps: int, warmup: int, logging: int) -> int:
    """The steps of a training on so many texts; RecipeError if it would end before the full learning rate or a log."""
    steps = max_steps or math.ceil(epochs * math.ceil(texts / texts_per_step))
    if warmup >= steps or logging > steps:
        remedy = f"set warmup_steps to a tenth, {steps // 10}, and logging_steps to at most {steps}"
        raise RecipeError(f"warmup_steps or logging_steps is too high for {steps} steps: {remedy}")
    return steps


def machine_arguments(
    model: PreTrainedModel | PeftModel, dtype: str, without_padding: bool, evaluate: bool, every: int
) -> dict[str, Any]:
    """The arguments of the trainer that follow from the machine: number type, optimizer, kernels, several processes.

    With `evaluate` the held-out texts are tried before the training and `every` so many steps.
    """
    gpu = torch.cuda.is_available()
    fast = gpu and without_padding and dtype == "bfloat16"
    use_liger = gpu and without_padding and has_liger(model)
    return {
        "optim": "adamw_8bit" if gpu else "adamw_torch",
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not gpu,
        "padding_free": without_padding,
        "pad_to_multiple_of": 128 if fast else None,  # of a whole row: odd lengths slow its matrix products down
        "use_liger_kernel": use_liger,
        # Of an MLP, `lora` is faster; and experts with an adapter are not what Liger's take them for.
        "liger_kernel_config": {"geglu": False, "swiglu": False} if use_liger else None,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": every,
        "eval_on_start": evaluate,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,  # it would log the mean of the other steps instead
        "ddp_find_unused_parameters": False,  # several processes: every step uses the whole adapter
    }


def has_liger(model: PreTrainedModel | PeftModel) -> bool:
    """Whether Liger has kernels for a model of this type; for others trl computes the loss in chunks."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # needs Triton, so a GPU

    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


# The arguments of the trainer that decide the result: a training goes on only where they are the same. How many texts
# of a step fit at a time is not among them: the next GPU may be a smaller one.
DECISIVE = "learning_rate num_train_epochs max_steps world_size warmup_steps neftune_noise_alpha optim bf16 seed "
DECISIVE += "padding_free"


def decisive(args: TrainingArguments) -> dict[str, Any]:
    """The settings for the record that the trainer's arguments hold."""
    return {name: getattr(args, name) for name in DECISIVE.split()}


def whole_batches(texts: Dataset | None, args: TrainingArguments) -> Dataset | None:
    """Held-out texts that fill the last batch of several processes: what fills it up would count, too."""
    if not texts or args.world_size == 1:
        return texts
    at_once = args.per_device_eval_batch_size * args.world_size
    return texts.select(range(len(texts) // at_once * at_once or len(texts)))


class LossBar(ProgressCallback):
    """One progress bar with the last loss, instead of a line for each of thousands of logged losses."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pass  # no second bar for the held-out texts


class FiniteNumbers(TrainerCallback):
    """Ends a training whose numbers have overflowed, before a checkpoint holds them.

    In float16 a step may overflow: it is left out. But not two logged losses in a row.
    """

    last_loss_was_finite = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if control.should_save and not all(parameter.isfinite().all() for parameter in trained):
            raise self.overflow(state.global_step, "weights")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            finite = math.isfinite(float(logs["loss"]))
            if not finite and not self.last_loss_was_finite:
                raise self.overflow(state.global_step, "losses")
            self.last_loss_was_finite = finite

    @staticmethod
    def overflow(step: int, what: str) -> RecipeError:
        advice = "lower learning_rate, or in float16 take a GPU with bfloat16"
        return RecipeError(f"the {what} at step {step} are no finite numbers: {advice}")


def check_loss(trainer: Trainer) -> None:
    """Give the model its own loss back where that of trl or Liger, in chunks, fails or is another one for a text.

    They multiply hidden states with the head themselves, and leave out how some models scale what comes out.
    """
    model, base = trainer.model, trainer.model.get_base_model()
    theirs = trainer.args.use_liger_kernel or getattr(trainer.args, "loss_type", "") == "chunked_nll"
    if not theirs or "forward" not in vars(base):  # where it would stand in front of the class's
        return
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"][:256]], device=model.device)
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=model.device)[None]}
    was_training = model.training
    model.eval()  # with dropout in its parts, no two losses are equal
    base.training = True  # Liger computes the loss its own way only then
    with torch.no_grad():
        scores = type(base).forward(base, **inputs, use_cache=False).logits[0, :-1].float()
        expected = torch.nn.functional.cross_entropy(scores, ids[0, 1:]).item()
        try:
            found = model(**inputs, labels=ids, use_cache=False).loss.item()
        except Exception:  # they look for parts that not every model has
            found = math.nan
    model.train(was_training)
    if not abs(found - expected) <= 0.01 * expected:
        del base.forward
        trainer.args.loss_type, trainer.args.use_liger_kernel = "nll", False
        print(f"the loss in chunks is {found:.3f} where the model's own is {expected:.3f}: its own is used")


def prepare(trainer: Trainer) -> None:
    """What the libraries would decide otherwise: the model's own loss, the adapter in float32, rows of nearly the same
    length and NEFTune's noise as with padding; on a GPU with bf16 the faster layers of `lora` and `KeptLayers`; one
    progress bar.
    """
    args = trainer.args
    check_loss(trainer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl turns the adapter into bf16, in which small updates are rounded away
            parameter.data = parameter.data.float()
    if args.padding_free:
        rows.balance(trainer)
        if args.neftune_noise_alpha:
            rows.noise_as_with_padding(trainer.model, args.neftune_noise_alpha)
    if args.padding_free and args.bf16 and trainer.model.device.type == "cuda":
        print("the first row compiles its kernels: up to a minute without progress")
        lora.add_in_place(trainer.model)
        KeptLayers(trainer)
    for callback in (NotebookProgressCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LossBar)
    trainer.add_callback(FiniteNumbers)


def look_at_batch(trainer: Trainer) -> dict[str, Any]:
    """The first batch as the trainer delivers it: its shape, texts, shares of padding and of tokens that the loss
    counts, and its beginning as text. RecipeError unless it holds whole texts, as many as it should.
    """
    tokenizer, batch = trainer.processing_class, next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"]
    if trainer.args.padding_free:  # a text goes on at position 1; what fills a row up stays at 0
        position = batch["position_ids"][0]
        first = ids[0, :-1][position[1:] == 1]
        padding = ((position == 0).sum().item() - len(first)) / len(position)
    else:
        first, padding = ids[:, 0], 1 - batch["attention_mask"].float().mean().item()
    expected = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    begin = encode(tokenizer, "").ids
    if len(first) != expected or (begin and set(first.tolist()) != set(begin)):
        raise RecipeError(f"{len(first)} texts in a batch of {expected}, which begin with {first.tolist()}")
    return {
        "rows and tokens": " x ".join(map(str, ids.shape)),
        "texts": len(first),
        "padding": f"{padding:.0%}",
        "tokens that the loss counts": f"{(batch['labels'] != -100).float().mean().item():.0%}",
        "it begins": tokenizer.decode(ids[0][:40]),
    }


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


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: str, text_format: str
) -> None:
    """Save the adapter in 16 bit, and its tokenizer with a chat template that asks in `text_format` (see `formats`).

    The folder counts as unfinished until its record is written.
    """
    records.begin(folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):  # written in another order each time, it would be another adapter
            config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder)
    formats.save_tokenizer(tokenizer, folder, text_format)


def metrics(trainer: Trainer) -> dict[str, Any]:
    """What a finished training measured: losses (means over the first and last tenth of those logged), steps, real
    tokens per second, seconds and memory, and the curves `loss` and `held_out` as pairs of step and loss.
    """
    history, step = trainer.state.log_history, trainer.state.global_step
    curve = [[entry["step"], float(entry["loss"])] for entry in history if "loss" in entry]
    losses = [loss for _, loss in curve if math.isfinite(loss)]
    held_out = list({e["step"]: round(e["eval_loss"], 4) for e in history if "eval_loss" in e}.items())
    tenth = max(1, len(losses) // 10)
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    measured = records.read(Path(trainer.args.output_dir, f"checkpoint-{step}"))["measured"]
    return {
        "first_loss": round(sum(losses[:tenth]) / tenth, 4),
        "last_loss": round(sum(losses[-tenth:]) / tenth, 4),
        "held_out_loss": held_out[-1][1] if held_out else None,
        "steps": step,
        "texts": len(trainer.train_dataset),
        "trainable_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "tokens_per_second": round(tokens * trainer.state.epoch / measured["seconds"], 1),
        **measured,
        "attention": trainer.model.config._attn_implementation,
        "loss": curve,
        "held_out": held_out,
    }
