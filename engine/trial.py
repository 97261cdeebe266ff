"""A trial of what notebook 1 does with a checkpoint, on a tiny random one, before anything is downloaded.

The text part is taken out of a multimodal model, quantized, saved and loaded again. With some kinds of models the
libraries fail at one of these steps, and would do so after the download.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from engine import architectures, attention, models
from helpers import RecipeError, first_line

TEXT = torch.arange(3, 40)[None]


def check(name: str, revision: str = "") -> None:
    """RecipeError if notebook 1 would fail with a tiny model of the kind that `name` is."""
    whole, config = models.read_configs(name, revision, 0)
    small = architectures.tiny(config)
    with tempfile.TemporaryDirectory() as folder, without_progress():
        if config is whole:
            small.save_pretrained(folder)
        elif not save_whole(small, whole, config, folder):
            return  # if the text part then lacks weights, it is said when they are loaded
        with one_line(f"{whole.model_type} models do not fit this recipe: their weights cannot be read"):
            agree(small, read(folder))
        with one_line(f"{whole.model_type} models do not fit this recipe: saved in 4 bit they cannot be read again"):
            in_4_bit = read(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
            in_4_bit.save_pretrained(Path(folder, "4-bit"), save_original_format=False)
            agree(in_4_bit, read(Path(folder, "4-bit")))


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Every error within becomes a RecipeError that begins with `what`: libraries fail in any way."""
    try:
        yield
    except Exception as error:
        raise RecipeError(f"{what} ({error if isinstance(error, RecipeError) else first_line(error)})") from None


def read(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The text part of the checkpoint in a folder, in float32 on the CPU."""
    _, config = models.read_configs(str(folder), "", 0)
    options |= {"device_map": "cpu", "dtype": torch.float32, "attn_implementation": "eager"}
    model, missing = models.read_weights(str(folder), config, **options)
    if missing:
        raise RecipeError(f"{len(missing)} tensors are not found, such as {missing[0]}")
    models.keep_weights_unpacked(model)
    return model


def agree(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """RecipeError unless two models give a text the same scores. Those of the pad token, the first, may differ: some
    kinds of models set its embedding to zero when they are read.
    """
    with torch.no_grad():
        if not attention.scores_agree(*(model(TEXT, use_cache=False).logits[0, :, 1:] for model in (first, second))):
            raise RecipeError("the scores are others then")


def save_whole(small: PreTrainedModel, whole: PreTrainedConfig, config: PreTrainedConfig, folder: str) -> bool:
    """Save the tiny model `small` as what it is, the text part `config` of a multimodal model, into a folder. The rest
    has no weights, so that it may be large. False if such a model cannot be made.
    """
    try:
        outer = copy.copy(whole)
        part = next(name for name, value in vars(whole).items() if value is config)
        setattr(outer, part, copy.deepcopy(small.config))
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(outer, trust_remote_code=False)
        model.save_pretrained(folder, state_dict=inner_names(small, model), save_original_format=False)
    except Exception:  # sizes that must fit others, or libraries for pictures that are not here
        return False
    return True


def inner_names(small: PreTrainedModel, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a text model under the names that they have within a multimodal `model`."""
    place = {type(module): name for name, module in model.named_modules()}
    tensors = small.state_dict()
    if type(small) in place:
        return {f"{place[type(small)]}.{name}": tensor for name, tensor in tensors.items()}
    own, there = f"{small.base_model_prefix}.", place[type(small.base_model)]
    heads = {name: next(n for n in model.state_dict() if n.endswith(name)) for name in tensors if own not in name}
    return {heads.get(n, n.replace(own, f"{there}.", 1)): tensor for n, tensor in tensors.items()}


@contextmanager
def without_progress() -> Iterator[None]:
    """No bars of transformers within: they would stand for nothing that is seen."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
