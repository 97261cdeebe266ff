"""What a model's architecture allows, found before anything is downloaded: on a tiny random model of the same kind."""

from __future__ import annotations

import copy
import inspect
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)

from engine import attention, decoding, rows, shapes, slots
from helpers import RecipeError, first_line

LARGEST = 100e6  # weights of a tiny model: what is larger was not made smaller by the names below
# What a config's sizes are called, and how large they may be in a tiny model. Widths of heads stay: rotations depend
# on them.
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
AT_MOST = dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 24)
AT_MOST |= dict.fromkeys(("attention_chunk_size", "local_attention", "keep_window_size", "index_topk"), 24)
AT_MOST |= {"block_size": 16, "index_block_size": 8, "index_topk_blocks": 1, "index_local_blocks": 1}
AT_MOST |= dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4)
AT_MOST |= dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2)
AT_MOST |= dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "max_window_layers"), 1)
AT_MOST |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
AT_MOST |= {"mamba_d_state": 16, "mamba_chunk_size": 16, "ssm_state_size": 16, "state_size": 16, "chunk_size": 16}
AT_MOST |= dict.fromkeys(("ffn_dim", "ffn_hidden_size", "vocab_size_per_layer_input"), 256)

# Packages with faster kernels for a GPU. Where they are installed, transformers takes them for the tiny model, too.
KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


class Architecture(NamedTuple):
    """How models of one kind can be trained and asked."""

    rows: bool  # texts stand end to end in a row, without padding
    slots: bool  # answers are decoded in slots
    batches: bool  # prompts of different lengths are padded and answered together


examined: dict[tuple[type[PreTrainedConfig], str], Architecture] = {}


def check(config: PreTrainedConfig, engine: str) -> Architecture:
    """Train and ask a tiny random model with the config's architecture, in float32; a line says what it allows.

    RecipeError for an architecture that LoRA does not reach, or whose padded texts or answers are not right. The engine
    unsloth has its own code for each model, so its models are only looked at for LoRA.
    """
    try:
        if engine == "unsloth":
            shapes.lora_targets(config)
            found = Architecture(rows=False, slots=False, batches=True)
        else:
            found = examine(config)
    except Exception as error:  # a tiny model fails in any way that a model can
        problem = error if isinstance(error, RecipeError) else first_line(error)
        if kernels := gpu_kernels(config):
            problem = f"{problem}; uninstall {', '.join(kernels)}, with whose kernels it was tried, and try again"
        raise RecipeError(f"{config.model_type} models do not fit this recipe: {problem}") from None
    texts = "end to end in rows" if found.rows else "padded"
    answers = "in slots" if found.slots else "in batches" if found.batches else "one at a time"
    print(f"{config.model_type}: texts are trained {texts}, and answers decoded {answers}")
    if experts := shapes.experts_in_16_bit(config):
        print(experts)
    return found


def gpu_kernels(config: PreTrainedConfig) -> list[str]:
    """The installed packages that models of this kind compute with, and that need a GPU."""
    modeling = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    source = inspect.getsource(modeling) if modeling else ""
    return [name for module, name in KERNELS.items() if f'"{module}"' in source and find_spec(module)]


def examine(config: PreTrainedConfig) -> Architecture:
    """`check` without its line; a process looks at the same architecture once."""
    key = type(config), repr(values_of(config))
    if key not in examined:
        examined[key] = examine_anew(config)
    return examined[key]


def examine_anew(config: PreTrainedConfig) -> Architecture:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to share: on a busy machine threads wait for each other
    try:
        return examine_model(tiny(config))
    finally:
        torch.set_num_threads(threads)


def examine_model(model: PreTrainedModel) -> Architecture:
    """What a tiny random model allows; where a package has kernels for it, on the GPU that they need."""
    config = model.config
    if torch.cuda.is_available() and gpu_kernels(config):
        model = model.to("cuda")
    generator = torch.Generator().manual_seed(0)
    size = config.get_text_config().vocab_size
    texts = [torch.randint(3, size, (length,), generator=generator).tolist() for length in (70, 9, 45)]
    check_adapter(copy.deepcopy(model), shapes.lora_targets(config), texts[0])
    check_padding(model, texts)
    return Architecture(
        batches=answers_agree(model, texts),
        slots=not slots.problem(model, texts[0]),
        rows=not rows.problem(model, texts),
    )


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in float32 with the layers of `config`, each kind of them at least once, but narrow ones."""
    try:
        small = type(config)(**tiny_values(config))
        small._attn_implementation = "eager"
        if (weights := shapes.empty(small).num_parameters()) > LARGEST:
            raise RecipeError(f"a tiny model of the kind would have {weights / 1e6:.0f} million weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=False)
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:  # large enough to tell right attention from wrong
                    std = 0.08 if "embed" in name else 2 / parameter.shape[-1] ** 0.5
                    torch.nn.init.normal_(parameter, std=std)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"no tiny model of the kind can be made to check it ({first_line(error)})") from None
    return model.eval()


def values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that describe an architecture."""
    others = ("model_type", "transformers_version", "architectures", "dtype", "quantization_config")
    return {name: value for name, value in copy.deepcopy(config).to_dict().items() if name not in others}


def tiny_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config with small sizes: few layers, heads and experts, narrow windows and matrices."""
    values = values_of(config)
    sizes = {name: value for name, value in values.items() if type(value) is int}
    values |= {name: min(value, AT_MOST[name]) for name, value in sizes.items() if name in AT_MOST}
    values |= {name: min(value, 96) for name, value in sizes.items() if "intermediate" in name}
    values |= {"vocab_size": min(sizes.get("vocab_size", 256), 256), "pad_token_id": 0, "bos_token_id": 1}
    values["eos_token_id"] = 2
    values |= few_heads(sizes)
    return few_layers(config, values)


def few_heads(sizes: dict[str, int]) -> dict[str, int]:
    """Two or four heads of their own width, with fewer key heads if there were fewer, and a hidden state for them."""
    hidden = next((name for name in HIDDEN if name in sizes), None)
    name = next((name for name in HEADS if name in sizes), None)
    if not (hidden and name):
        return {hidden: min(sizes[hidden], 64)} if hidden else {}
    width = sizes.get("head_dim") or sizes[hidden] // sizes[name]
    heads = min(sizes[name], 2 if width > 256 else 4)
    small = {name: heads, hidden: heads * width}
    for kind in ("num_key_value_heads", "num_global_key_value_heads"):
        if kind in sizes:
            small[kind] = heads if sizes[kind] >= sizes[name] else min(sizes[kind], heads // 2)
    if "mamba_expand" in sizes and "mamba_n_heads" in sizes and "mamba_d_ssm" not in sizes:
        width = sizes["mamba_expand"] * sizes[hidden] // sizes["mamba_n_heads"]
        small["mamba_n_heads"] = sizes["mamba_expand"] * small[hidden] // width
    if "expand" in sizes:  # Mamba 2
        small[hidden] //= sizes["expand"]
    return small


def few_layers(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values with the first layers only, until each kind of them was there once, and two at least."""
    name = next((name for name in LAYERS if type(values.get(name)) is int), None)
    if name is None:
        return values
    layers = values[name]
    lists = {key: list(v) for key, v in values.items() if isinstance(v, list | tuple) and len(v) == layers}
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [""] * layers
    per_layer = [types, *(v for v in lists.values() if len(set(map(str, v))) < layers)]  # not the numbers of layers
    per_layer += parts_of_layers(config, layers)
    kinds = list(map(str, zip(*per_layer, strict=True)))
    few = min(layers, max(2, max(map(kinds.index, kinds)) + 1))
    if values.get("num_kv_shared_layers"):  # the last layers take the keys of the last one before them of their kind
        values["num_kv_shared_layers"], few = few, 2 * few
    values |= {key: value[:few] for key, value in lists.items()}
    values[name] = few
    if own := values.get("per_layer_config"):
        values["per_layer_config"] = {
            layer: small_layer(other, values) for layer, other in own.items() if int(layer) < few
        }
    return values


def parts_of_layers(config: PreTrainedConfig, layers: int) -> list[list[list[str]]]:
    """What each of so many layers is made of, by the names of classes: where experts are is often not a list.

    One list for each list of so many modules that the model has.
    """
    found = [m for m in shapes.empty(config).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    return [[sorted({type(part).__name__ for part in layer.modules()}) for layer in modules] for modules in found]


def small_layer(own: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The sizes of one layer that has its own, made small as those of the others."""
    small = AT_MOST | {name: size for name, size in values.items() if name.endswith("heads")}
    return own | {name: min(size, small[name]) for name, size in own.items() if name in small and type(size) is int}


def check_adapter(model: PreTrainedModel, targets: dict[str, list[str]], text: list[int]) -> None:
    """RecipeError unless LoRA stands beside all that the targets name, and every matrix B gets a gradient from one text
    (token ids).
    """
    ids, last_names = torch.tensor([text], device=model.device), targets["target_modules"]
    expected = {name for name in shapes.linear_layers(model) if name.rpartition(".")[2] in last_names}
    try:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
        with torch.enable_grad():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except Exception as error:
        raise RecipeError(f"it cannot be trained with LoRA ({first_line(error)})") from None
    weights = [(name, weight) for name, weight in model.named_parameters() if "lora_B" in name]
    beside = {name.removeprefix("base_model.model.").partition(".lora_B")[0] for name, _ in weights}
    if bare := sorted(expected - beside):
        raise RecipeError(f"peft puts no LoRA beside {bare[0]}, which would stay untrained without a word")
    if idle := [name for name, weight in weights if weight.grad is None or not weight.grad.any()]:
        raise RecipeError(f"LoRA beside {idle[0].partition('.lora_B')[0]} would stay untrained")


def check_padding(model: PreTrainedModel, texts: list[list[int]]) -> None:
    """RecipeError if a text (token ids) has other scores alone than padded on the right, or than as a beginning."""
    width = max(map(len, texts))
    place = {"device": model.device}
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], **place)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], **place)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        for row, text in zip(padded, texts, strict=True):
            alone = model(torch.tensor([text], **place), use_cache=False).logits[0]
            half = model(torch.tensor([text[: len(text) // 2]], **place), use_cache=False).logits[0]
            if not attention.scores_agree(row[: len(text)], alone):
                raise RecipeError("a padded text has other scores than the text alone")
            if not attention.scores_agree(alone[: len(half)], half):
                raise RecipeError("it sees the tokens to come")


def follows(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> bool:
    """Whether each token of an answer is the likeliest after all before it: prompt and answer (token ids) are read as
    one text, without a cache and without padding. `check_padding` has seen that no token depends on those to come.
    """
    with torch.no_grad():
        ids = torch.tensor([prompt + answer[:-1]], device=model.device)
        scores = model(ids, use_cache=False).logits[0]
    return scores[len(prompt) - 1 :].argmax(-1).tolist() == answer


def together(model: PreTrainedModel, prompts: list[list[int]], limit: int = 6) -> list[list[int]]:
    """The model's own answers to prompts (token ids), of `limit` tokens each, all prompts padded to one length."""
    plain = decoding.Decoding(len(prompts), LogitsProcessorList(), StoppingCriteriaList(), penalize_prompt=False)
    return decoding.generate_batch(model, prompts, limit, plain)


def answers_agree(model: PreTrainedModel, texts: list[list[int]]) -> bool:
    """Whether prompts (token ids) that are answered together get the answers that each gets alone.

    RecipeError if already alone, with a cache, they are others than without one.
    """
    try:
        alone = [together(model, [text])[0] for text in texts]
    except Exception as error:
        raise RecipeError(f"it does not answer ({first_line(error)})") from None
    if not all(follows(model, text, answer) for text, answer in zip(texts, alone, strict=True)):
        raise RecipeError("with a cache its answers are others than without")
    try:
        return together(model, texts) == alone
    except Exception:  # whatever a model has to say: it answers one prompt at a time
        return False
