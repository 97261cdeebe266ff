"""Models: what their config tells before anything is downloaded, and loading them."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import hub, lora, machine
from helpers import RecipeError, first_line

Model = PreTrainedModel | PeftModel

# google/gemma-2-27b has no chat template; 2024 took that of google/gemma-2-9b. Neither stage of the recipe applies it:
# it is stored with the tokenizer so that the saved model can be used with chat tools.
GEMMA_CHAT_TEMPLATE = (
    "\n{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}\n"
)


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a transformers config without its weights: modules, names and shapes, in a moment."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it writes into the config
    model.tie_weights()
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model's blocks by their full names: what 4 bit shrinks and what LoRA stands beside."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def lora_targets(config: PreTrainedConfig) -> list[str]:
    """The names of a block's linear layers, for LoRA; RecipeError lists matrices beyond its reach, such as experts."""
    model = empty(config)
    linear = linear_layers(model)
    known = [*linear.values(), model.get_input_embeddings(), model.get_output_embeddings()]
    reached = {id(module.weight) for module in known}
    beyond = [name for name, weight in model.named_parameters() if weight.dim() > 1 and id(weight) not in reached]
    if beyond:
        names = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in beyond}))
        raise RecipeError(
            f"{config.model_type}: LoRA does not reach {names}, which would stay untrained without a word; choose a "
            "model of another kind"
        )
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def check_gpu(config: PreTrainedConfig, gpu: bool, limit: float = 1.5e9) -> None:
    """RecipeError for a model of more than `limit` weights on a machine without a GPU; tied embeddings count once."""
    if not gpu and (weights := empty(config).num_parameters()) > limit:
        raise RecipeError(
            f"no GPU here, and the model has {weights / 1e9:.1f} billion weights: in Colab choose Runtime > Change "
            "runtime type > A100, or try the series on a CPU with `make smoke`"
        )


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key heads and head width: how much a model stores of every token that it has read."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def estimate_memory(
    config: PreTrainedConfig,
    *,
    four_bit: bool,
    r: int = 0,
    batch_size: int = 0,
    length: int = 0,
    slots: int = 0,
    columns: int = 0,
) -> dict[str, float]:
    """GiB of GPU memory that a run will need at its peak, part by part, from the model's transformers config.

    `r` is the rank of the adapter. Training: rows of `batch_size` texts of `length` tokens, gradient checkpointing,
    loss in chunks. Answering: `slots` answers of `columns` tokens. Measured peaks (benchmarks/RESULTS.md) are met
    within 7 %; with unsloth, which keeps less, it is an upper bound.
    """
    model = empty(config)
    linear = linear_layers(model).values()
    in_linear = sum(module.weight.numel() for module in linear)
    adapter = r * sum(module.in_features + module.out_features for module in linear)
    tokens = batch_size * length
    layers, key_heads, width = cache_shape(config)
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    gib = {
        # NF4 with double quantization: 4.127 bits per weight of a linear layer. Embeddings and experts stay in 16 bit.
        "weights": in_linear * (4.127 / 8 if four_bit else 2) + 2 * (model.num_parameters() - in_linear),
        # Weights and gradients in float32 and two moments of a byte each; 16 bit and nothing else for answering.
        "adapter": adapter * (10 if tokens else 2),
        # One hidden state a layer is kept; of one layer at a time five tensors of the MLP are alive.
        "activations": tokens * (2 * layers * config.hidden_size + 5 * 2 * inner),
        "keys and values": 4 * layers * key_heads * width * slots * columns,
        # Expanded matrices, a chunk of the loss, a prompt's forward pass, CUDA itself: at the size of 27B.
        "working memory": 3 * 2**30,
    }
    return {part: round(size / 2**30, 2) for part, size in gib.items()}


def text_config(name: str, revision: str = "", max_seq_length: int = 0) -> PreTrainedConfig:
    """The transformers config of a model, read before its weights; of a multimodal Gemma 3 that of its text part.

    Raises RecipeError for a model that is known not to fit the recipe, or that cannot read `max_seq_length` tokens.
    """
    hub.find_model(name, revision)
    try:
        whole = AutoConfig.from_pretrained(name, revision=revision or None)
    except Exception as error:
        raise RecipeError(f"{name}: its config.json cannot be used ({first_line(error)})") from None
    config = whole.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    longest = getattr(config, "max_position_embeddings", None) or max_seq_length
    problem = ""
    if whole.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = f"{whole.model_type} is not a causal language model"
    elif config is not whole and config.model_type != "gemma3_text":
        problem = f"{whole.model_type} reads more than text; of such models only the text part of Gemma 3 is known here"
    elif kinds or empty(config)._is_stateful:
        problem = f"it has layers that are not attention ({', '.join(sorted(kinds)) or 'with a state of their own'})"
    elif max_seq_length > longest:
        problem = f"it reads at most {longest} tokens: lower max_seq_length ({max_seq_length})"
    try:
        cache_shape(config)
    except Exception as error:  # Gemma 4
        problem = problem or f"its layers differ in their sizes ({first_line(error)})"
    if problem:
        raise RecipeError(f"{name}: {problem}")
    if config is not whole and hasattr(whole, "quantization_config"):
        config.quantization_config = whole.quantization_config
    return config


def load_tokenizer(name: str, revision: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub repository, with what it lacks.

    A pad token that is not the end token: one that the vocabulary reserves, as unsloth chooses too, else <unk>. And if
    it has no chat template but Gemma's tokens for turns, Gemma's template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or None)
    except Exception as error:
        raise RecipeError(f"{name}: its tokenizer cannot be used ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"{name}: its tokenizer has no end token, so that no answer would ever end")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
        words = re.compile("pad|reserved|unused|placeholder|control", re.I)
        spare = list(filter(words.search, tokenizer.get_added_vocab()))
        spare.sort(key=lambda token: ("pad" not in token.lower(), tokenizer.convert_tokens_to_ids(token)))
        tokenizer.pad_token = next(filter(None, [*spare, tokenizer.unk_token, tokenizer.eos_token]))
    if not tokenizer.chat_template and {"<start_of_turn>", "<end_of_turn>"} <= tokenizer.get_vocab().keys():
        tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    return tokenizer


def load_weights(name: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model with this config (see `text_config`), with transformers.

    Raises RecipeError if tensors are missing, which transformers would fill with random numbers.
    """
    if config.model_type == "gemma3_text":  # names in the weights of a multimodal Gemma 3
        options["key_mapping"] = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
    model, info = AutoModelForCausalLM.from_pretrained(name, config=config, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise RecipeError(f"{name}: {len(missing)} tensors are missing, such as {missing[0]}; fetch it again")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # values for sampling without this switch are common on the hub, but cannot be saved
        model.generation_config.do_sample = True
    keep_weights_unpacked(model)
    return model


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place at the first forward pass on a CPU with AVX512-BF16.

    Backward passes through repacked weights are wrong, and what is saved afterwards does not reload to the same model.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load(
    name: str, engine: str, *, max_seq_length: int, dtype: str = "bfloat16", revision: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model as it is stored (4 bit if it was saved in 4 bit) and its tokenizer.

    Its attention is eager, because the default of transformers, sdpa, leaves out the softcapping of Gemma 2's scores.
    On a GPU unsloth brings its own attention, with softcapping. Of the model's own settings for `generate` only the end
    tokens are kept: a repetition penalty there would be applied on top of the recipe's.
    Raises RecipeError for a missing model, one that does not fit (see `text_config`), a large one without a GPU, and if
    another model than `name` was loaded.
    """
    machine.start_engine(engine)
    config = text_config(name, revision, max_seq_length)
    gpu = torch.cuda.is_available()
    check_gpu(config, gpu)
    if not gpu and empty(config).num_parameters() < 1e7:
        torch.set_num_threads(1)  # the tiny models' matrices are too small to share: a second thread only waits
    tokenizer = load_tokenizer(name, revision)
    options = {"dtype": getattr(torch, dtype), "revision": revision or None}
    if engine != "unsloth" or not gpu:
        options["attn_implementation"] = "eager"
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        if hub.read_config(name, revision)["model_type"] != config.model_type:
            raise RecipeError(f"{name} reads more than text: give unsloth the text part that notebook 1 saves")
        options["load_in_4bit"] = getattr(config, "quantization_config", None) is not None
        model, _ = FastLanguageModel.from_pretrained(
            name, max_seq_length=max_seq_length, use_exact_model_name=True, **options
        )
        keep_weights_unpacked(model)
    else:
        device = os.environ.get("LOCAL_RANK")  # set by `accelerate launch`: one process a GPU, the whole model on each
        device_map = "cpu" if not gpu else {"": int(device)} if device else "auto"
        model = load_weights(name, config, device_map=device_map, **options)
    if model.config._name_or_path != name:
        raise RecipeError(f"{engine} loaded {model.config._name_or_path} instead of {name}")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), **special)
    return model, tokenizer


def load_adapter(model: PreTrainedModel, name: str, revision: str = "") -> PeftModel:
    """The model with the LoRA adapter of a folder or hub repository; RecipeError if some of its tensors are missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:  # by default peft would turn the adapter into float32 and cast every input to it
            return PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False, revision=revision or None)
        except UserWarning as error:
            missing = str(error).count("lora_")
            raise RecipeError(f"{name}: {missing} of its tensors are missing; train or fetch it again") from None


def load_trained(sources: Mapping[str, Mapping[str, Any]], engine: str, max_seq_length: int, dtype: str) -> Model:
    """The model and, if there is one, the adapter of these `sources` (see `records.find_models`), ready to answer."""
    base, adapter = sources["model"], sources.get("adapter")
    model: Model
    model, _ = load(base["name"], engine, max_seq_length=max_seq_length, dtype=dtype, revision=base["commit"])
    if adapter:
        model = load_adapter(model, adapter["name"], adapter["commit"])
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    elif model.device.type == "cuda":
        lora.add_in_place(model)  # prompts are read faster
    return model.eval()
