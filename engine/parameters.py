"""What each parameter of the notebooks may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from helpers import RecipeError


class Text(NamedTuple):
    """Text that `pattern` matches as a whole; `words` say the same to a reader."""

    pattern: str
    words: str


ANY_TEXT = Text(r".*", "text on one line")
MANY, SWITCH = 10**9, [True, False]


def wrong_values(values: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, str]:
    """The `values` that a table such as PARAMETERS does not allow: name and what it must be."""
    wrong = {}
    for name, allowed in table.items():
        value = values.get(name, ...)
        if isinstance(allowed, Text):
            fits, words = isinstance(value, str) and re.fullmatch(allowed.pattern, value), allowed.words
        elif isinstance(allowed, range):
            fits = type(value) is int and value in allowed
            words = f"a whole number from {allowed[0]:,} to {allowed[-1]:,}"
        elif isinstance(allowed, tuple):
            fits = type(value) in (int, float) and allowed[0] <= value <= allowed[1]  # never true for nan
            words = f"a number from {allowed[0]:g} to {allowed[1]:,g}"
        else:
            fits = type(value) is type(allowed[0]) and value in allowed  # True is not 1 here
            words = " or ".join(map(repr, allowed))
        if name in values and not fits:
            wrong[name] = words
    return wrong


NAME = Text(
    r"(?![~\s])[^\0-\x1f\x7f]+(?<!\s)",
    "the name of a file, a folder or a hub repository, without ~ and spaces at its ends",
)
NAME_OR_EMPTY = Text(f"({NAME.pattern})?", f"empty or {NAME.words}")
NAMES = (NAME, NAME_OR_EMPTY)

# What each parameter may be: text, a whole number of a range, a real number from a smallest to a largest value, or a
# choice from a list. The upper limits catch slips of the hand.
ALLOWED: dict[str, list | range | tuple[float, float] | Text] = {
    **dict.fromkeys(("output_dir", "base_model", "dataset", "rules", "qa_data", "tasks", "retriever"), NAME),
    **dict.fromkeys(("drive_dir", "model", "train_data", "adapter"), NAME_OR_EMPTY),
    **dict.fromkeys(("base_revision", "dataset_revision"), NAME_OR_EMPTY),
    **dict.fromkeys(("allow_licences", "judge_model"), ANY_TEXT),
    "hub_repo": Text(r"([\w.-]+/[\w.-]+)?", "empty or a hub repository, owner/name"),
    "judge_base_url": Text(r"(https?://[^\s/]\S*)?", "empty or an address that begins with https:// or http://"),
    "wandb_project": Text(r"[^/\\#?%:\n]{0,128}", "empty or a name of at most 128 characters without / \\ # ? % :"),
    **dict.fromkeys(("max_rows", "max_steps", "warmup_steps"), range(MANY)),
    **dict.fromkeys(("save_steps", "logging_steps"), range(1, MANY)),
    **dict.fromkeys(("r", "per_device_train_batch_size"), range(1, 4097)),
    "gradient_accumulation_steps": range(1, 65_537),
    "batch_size": range(4097),
    "max_seq_length": range(16, 2**20),
    "max_new_tokens": range(1, 2**20),
    "query_max_tokens": range(8, 8193),
    "k": range(10_001),
    "seed": range(2**32),
    "lora_alpha": (1e-3, 65_536),
    "learning_rate": (1e-9, 0.1),
    "num_train_epochs": (1e-3, 1_000),
    "eval_share": (0, 0.5),
    "neftune_noise_alpha": (0, 1_000),
    "repetition_penalty": (1, 10),
    "time_budget_minutes": (0, 100_000),
    "engine": ["transformers", "unsloth"],
    "quant_type": ["nf4", "fp4"],
    "loss_on": ["text", "answer"],
    "prompt_style": ["2024", "training", "chat"],
    "text_format": ["2024", "chat"],
    **dict.fromkeys(("double_quant", "penalize_prompt", "ban_words"), SWITCH),
}


def check(values: Mapping[str, Any], section: str = "") -> None:
    """RecipeError that names all parameters among `values` (a notebook passes its globals()) that are wrong.

    `section` (of a run file) goes before the names.
    """
    problems = []
    for name, words in wrong_values(values, ALLOWED).items():
        value, allowed, remedy = values[name], ALLOWED[name], ""
        if isinstance(value, list | tuple | dict | set):
            remedy = " (for several files: name the folder that holds them)" if allowed in NAMES else ", one alone"
        elif not isinstance(value, str):
            text = "" if value is None else str(value)
            if not wrong_values({name: text}, {name: allowed}):  # the advice must work
                remedy = f', in quotes (run file: `{name}: "{text}"`, papermill: `-r {name} "{text}"`)'
        problems.append(f"{section}{name} must be {words}{remedy}; it is {value!r}")
    if problems:
        raise RecipeError("; ".join(problems))
