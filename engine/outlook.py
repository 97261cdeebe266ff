"""Outlook: what a GPU will do with a model, estimated before anything is downloaded.

The rates were measured on one H100; benchmarks/results/cost.md says how they are carried over to other cards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from engine import machine, shapes

# What stands in the names that nvidia-smi gives; TFLOP/s (16 bit, dense) and GB/s of the data sheets.
CARDS = {
    r"H200": (989, 4800),
    r"H100.*HBM3": (989, 3350),
    r"A100.*80": (312, 2039),
    r"A100": (312, 1555),
    r"RTX PRO 6000": (504, 1597),  # Colab calls it G4
    r"\bL4\b": (121, 300),
    r"\bT4\b": (65, 320),
}
MEASURED = 27.2  # billions of weights of the model whose rates are these
PASS = 20e6  # tokens of the recipe's own training texts, once


def slowdown(card: str) -> float | None:
    """How many times as long as an H100 a card takes; None for one that is not in CARDS."""
    for name, (tflops, bandwidth) in CARDS.items():
        if re.search(name, card):
            return 0.63 * 989 / tflops + 0.37 * 3350 / bandwidth
    return None


def training_rate(billions: float, card: str, free_gib: float, engine: str) -> float | None:
    """Tokens per second of a training of so many billions of weights, at most if they are far fewer than MEASURED: the
    smaller a model, the less of its time is matrix products. None for an unknown card.
    """
    times = slowdown(card)
    measured = 1347 if engine == "unsloth" else 3708 if free_gib > 70 else 2846
    return measured * MEASURED / billions / times if times else None


def answering_seconds(billions: float, card: str, free_gib: float) -> float | None:
    """Seconds for the answers to 100 tasks; None for an unknown card."""
    times = slowdown(card)
    measured = 102 if free_gib > 70 else 129 if free_gib > 35 else 308
    return measured * billions / MEASURED * times if times else None


def training_lines(gpu: Mapping[str, Any], config: PreTrainedConfig, engine: str, rows: bool) -> list[str]:
    """What a training of the model with this config will be like on a GPU (see `machine.find_gpu`)."""
    way = "texts are padded to one length"
    if rows:
        way = "rows without padding, with a compiled attention if this GPU can run it (tried after loading)"
    billions = shapes.empty(config).num_parameters() / 1e9
    rate = training_rate(billions, gpu["name"], gpu["free_gib"], engine)
    if not rate:
        return [way, f"no estimate of the hours: the rates of {gpu['name']} are not known"]
    hours, at_most, at_least = PASS / rate / 3600, "", ""
    if billions < MEASURED / 2:
        at_most, at_least = "at most ", "at least "
    said = f"{at_most}{rate:,.0f} tokens/s, so {at_least}{hours:.1f} hours"
    said += f" for one pass over the recipe's data ({PASS / 1e6:.0f} million)"
    return [way, f"estimate, computed from an H100: {said}; rough for models far from {MEASURED} billion weights"]


def remedy(need: Callable[..., Mapping[str, float]], free_gib: float, batch_size: int, accumulation: int) -> str:
    """What to change where a training of `batch_size` texts at a time does not fit; `need(batch_size=)` is its memory.

    Half as many texts, and half of that, are tried, at the same effective batch size.
    """
    smaller = batch_size
    while smaller > 1:
        smaller //= 2
        if machine.fits(need(batch_size=smaller), free_gib):
            steps = -(-batch_size * accumulation // smaller)
            return f"set per_device_train_batch_size={smaller} and gradient_accumulation_steps={steps}"
    return "not even one text at a time fits: lower max_seq_length or r, or take a smaller model"


def report_training(
    config: PreTrainedConfig,
    packages: list[str],
    need: Callable[..., Mapping[str, float]],
    ways: tuple[str, bool],
    batches: tuple[int, int],
) -> None:
    """Print versions, GPU, whether a training fits and what to change if not, and how long it will take.

    `ways`: the engine, and whether rows have no padding; `batches`: texts at a time, and how often per step.
    """
    batch_size, accumulation = batches
    gpu, own = machine.find_gpu(), need(batch_size=batch_size)
    too_large = gpu and not machine.fits(own, gpu["free_gib"])
    machine.report(packages, own, remedy(need, gpu["free_gib"], batch_size, accumulation) if too_large else "")
    if gpu:
        print("\n".join(training_lines(gpu, config, *ways)))


def report_answering(config: PreTrainedConfig) -> None:
    """Print how long the answers to 100 tasks will take."""
    gpu = machine.find_gpu()
    billions = shapes.empty(config).num_parameters() / 1e9
    if gpu and (seconds := answering_seconds(billions, gpu["name"], gpu["free_gib"])):
        print(f"estimate, computed from an H100: {seconds / 60:.0f} minutes for 100 tasks")
