"""Models: what their config tells before anything is downloaded, and loading them."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from jinja2.exceptions import SecurityError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import hub, lora, machine, shapes
from helpers import RecipeError, encode, first_line

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


def check_gpu(config: PreTrainedConfig, gpu: bool, limit: float = 1.5e9) -> None:
    """RecipeError for a model of more than `limit` weights on a machine without a GPU; tied embeddings count once."""
    if not gpu and (weights := shapes.empty(config).num_parameters()) > limit:
        raise RecipeError(
            f"no GPU here, and the model has {weights / 1e9:.1f} billion weights: in Colab choose Runtime > Change "
            "runtime type > A100, or try the series on a CPU with `make smoke`"
        )


def text_config(name: str, revision: str = "", max_seq_length: int = 0) -> PreTrainedConfig:
    """The transformers config of a model, read before its weights; of a multimodal one, which is said, that of its text
    part. RecipeError for what is no causal language model, or cannot read `max_seq_length` tokens.
    """
    whole, config = read_configs(name, revision, max_seq_length)
    if config is not whole:
        print(f"{name}: the text part of {whole.model_type} is used{left_behind(whole, config)}")
    return config


def read_configs(name: str, revision: str, max_seq_length: int) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The transformers config of a model, and that of its text part (see `text_config`); often they are the same."""
    hub.find_model(name, revision)
    try:
        whole = AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=False)
        config = text_part(whole)
    except Exception as error:
        raise RecipeError(f"{name}: its config.json cannot be used ({first_line(error)})") from None
    longest = readable_tokens(config)
    if problem := not_causal(whole, config):
        raise RecipeError(f"{name}: {problem}")
    if longest and max_seq_length > longest:
        raise RecipeError(f"{name}: it reads at most {longest} tokens: lower max_seq_length ({max_seq_length})")
    if config is not whole:  # what the wrapper says of its text part
        if hasattr(whole, "tie_word_embeddings"):
            config.tie_word_embeddings = whole.tie_word_embeddings
        if hasattr(whole, "quantization_config"):
            config.quantization_config = whole.quantization_config
    return whole, config


def text_part(whole: PreTrainedConfig) -> PreTrainedConfig:
    """The config of its text part; itself if it has no other."""
    part = whole.get_text_config(decoder=True)
    if isinstance(part, PreTrainedConfig):
        return part
    return whole if part.model_type == whole.model_type else whole.text_config  # unsloth gives a stand-in for Gemma 4's


def not_causal(whole: PreTrainedConfig, config: PreTrainedConfig) -> str:
    """Why a model is no causal language model, from its config and that of its text part; empty if it is one."""
    if whole.is_encoder_decoder:
        return f"{whole.model_type} models have an encoder and are not causal language models"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    if config is whole:
        return f"{whole.model_type} is not a causal language model"
    part = f"transformers has no causal language model for the text part ({config.model_type})"
    return f"{whole.model_type} reads more than text, and {part}; choose a model for text alone"


def readable_tokens(config: PreTrainedConfig) -> int | None:
    """How many tokens a model can read, None if there is no limit.

    Where rotations depend on a text's length, one long text would change the others of its batch: then it is the
    length up to which they do not.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]  # one, or one a kind of layer
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(filter(None, (getattr(config, "max_position_embeddings", None), *lengths)), default=None)


def left_behind(whole: PreTrainedConfig, config: PreTrainedConfig) -> str:
    """What a multimodal model has beside its text part, such as a tower for pictures, by its size."""
    try:
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(copy.deepcopy(whole), trust_remote_code=False)
        weights = model.num_parameters() - shapes.empty(config).num_parameters()
    except Exception:  # the libraries for its other parts are not here
        return ""
    return f", without its other {weights / 1e6:,.0f} million weights"


def load_tokenizer(name: str, revision: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub repository, with what it lacks.

    A pad token that is not the end token: one that the vocabulary reserves, as unsloth chooses too, else <unk>. And if
    it has no chat template but Gemma's tokens for turns, Gemma's template.
    """
    try:
        hub.find_model(name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or None, trust_remote_code=False)
    except RecipeError:
        raise
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
    try_chat_template(name, tokenizer)
    return tokenizer


def try_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """RecipeError if the chat template, which is code from elsewhere, reaches out of the sandbox that it runs in."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "こんにちは"}], tokenize=False)
    except SecurityError:
        raise RecipeError(f"{name}: its chat template reaches out of its sandbox; choose another model") from None
    except Exception:  # a template for other turns, or none: it is used nowhere but where the model is shown
        return


def load_weights(name: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model with this config (see `text_config`), with transformers.

    Raises RecipeError if tensors are missing, which transformers would fill with random numbers.
    """
    try:
        model, missing = read_weights(name, config, **options)
    except (SafetensorError, HfHubHTTPError, OSError) as error:
        raise RecipeError(f"{name}: its weights cannot be read ({first_line(error)}); fetch it again") from None
    if missing:
        raise RecipeError(f"{name}: {len(missing)} tensors are missing, such as {missing[0]}; fetch it again")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # values for sampling without this switch are common on the hub, but cannot be saved
        model.generation_config.do_sample = True
    keep_weights_unpacked(model)
    return model


def read_weights(name: str, config: PreTrainedConfig, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model with this config as transformers reads it, and the names of the tensors that it did not find."""
    # The names in the weights of a multimodal model become those of its text part.
    options["key_mapping"] = {r"^language_model\.": "", r"^model\.(language|text)_model\.": "model."}
    options |= {"config": config, "output_loading_info": True, "trust_remote_code": False, "use_safetensors": True}
    model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    return model, sorted(info["missing_keys"])


def score_matrix(name: str, commit: str, config: PreTrainedConfig) -> torch.Tensor | None:
    """The matrix (vocabulary, width) from a hidden state to the scores of tokens, read without the other weights.

    None if a checkpoint does not hold it under its usual name, or as packed numbers.
    """
    model = shapes.empty(config)
    tied = getattr(config, "tie_word_embeddings", False)
    module = model.get_input_embeddings() if tied else model.get_output_embeddings()
    ending = next(f"{own.rpartition('.')[2]}.weight" for own, part in model.named_modules() if part is module)
    whole, index = "model.safetensors", "model.safetensors.index.json"
    files = {whole}
    if not hub.find_file(name, commit, whole) and hub.find_file(name, commit, index):
        places = hub.read_json(name, commit, index).get("weight_map")
        places = places if isinstance(places, Mapping) else {}
        files = {file for key, file in places.items() if str(key).endswith(ending)}
    for path in filter(None, (hub.find_file(name, commit, str(file)) for file in sorted(files))):
        try:
            with safe_open(path, "pt") as tensors:
                keys = [key for key in tensors.keys() if f".{key}".endswith(f".{ending}")]  # noqa: SIM118
                if keys:
                    found = tensors.get_tensor(keys[0])
                    return found if found.is_floating_point() and found.shape[1:] == module.weight.shape[1:] else None
        except SafetensorError as error:
            raise RecipeError(f"{name}: its weights cannot be read ({first_line(error)}); fetch it again") from None
    return None


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
    _, config = read_configs(name, revision, max_seq_length)
    gpu = torch.cuda.is_available()
    check_gpu(config, gpu)
    if not gpu and shapes.empty(config).num_parameters() < 1e7:
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
        options |= {"use_exact_model_name": True, "trust_remote_code": False}
        model, _ = FastLanguageModel.from_pretrained(name, max_seq_length=max_seq_length, **options)
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
    check_numbers(model, tokenizer)
    return model, tokenizer


def check_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """RecipeError unless a model's scores of a short text are numbers: its weights are damaged, or it was trained in
    bfloat16 and computes what float16 cannot hold, as Gemma 3 does.
    """
    ids = torch.tensor([encode(tokenizer, "日本で一番高い山は").ids], device=model.device)
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.float()
    if not scores.logsumexp(-1).isfinite().all():
        why = "its weights are damaged: fetch them again"
        if model.dtype == torch.float16:
            why = "float16 is too small for it: take a GPU with bfloat16 (L4, A100)"
        raise RecipeError(f"{model.config._name_or_path} computes no finite numbers: {why}")


def load_adapter(model: PreTrainedModel, name: str, revision: str = "") -> PeftModel:
    """The model with the LoRA adapter of a folder or hub repository; RecipeError if it is none that fits the model."""
    hub.find_model(name, revision)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:  # by default peft would turn the adapter into float32 and cast every input to it
            return PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False, revision=revision or None)
        except UserWarning as error:
            missing = str(error).count("lora_")
            raise RecipeError(f"{name}: {missing} of its tensors are missing; train or fetch it again") from None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RecipeError(f"{name}: the adapter cannot be loaded ({first_line(error)})") from None


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
