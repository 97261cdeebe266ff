"""Measure QLoRA training at real sizes with random weights: this recipe beside unsloth and beside 2024.

    python benchmarks/gpu.py                      # Gemma 2 27B, one GPU with 80 GB, about ten minutes
    python benchmarks/gpu.py --shape qwen3-8b     # or another of SHAPES
    python benchmarks/gpu.py --only "here, 16 texts, 23 GiB" "unsloth, 8 texts, no padding"
    python benchmarks/gpu.py --tiny               # a tiny model on the CPU, one minute: does every step still run?

Real weights are not needed for speed and memory. Every setting runs in a process of its own (unsloth patches
transformers, and memory starts empty), on the same examples, and reports real tokens per second: padding does not
count. A setting names an engine, how many texts reach the GPU at a time (32 make a step), and how much of the GPU's
memory there is: what is beyond is taken beforehand. The result is a Markdown table on stdout.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helpers

GEMMA_2_27B = {
    "num_hidden_layers": 46,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 256000,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
TINY = GEMMA_2_27B | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
QWEN_3_8B = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
GEMMA_4 = {
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
GEMMA_4_12B = GEMMA_4 | {
    "num_hidden_layers": 48,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 1,
}
GEMMA_4_31B = GEMMA_4 | {
    "num_hidden_layers": 60,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
}
LFM_2_1B = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 12288, "vocab_size": 65536}
LFM_2_1B |= {"layer_types": ["full_attention" if n in (2, 5, 8, 10, 12, 14) else "conv" for n in range(16)]}
EXPERTS_30B = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
EXPERTS_30B |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
PADDED, PACKED, GROUPED = "unsloth, 4 texts", "unsloth, 8 texts, no padding", "unsloth, 8 texts, grouped by length"
# Model type, values of its config, and what is measured by default. unsloth at its best: without padding, and grouped
# by length where it refuses that.
SHAPES = {
    "gemma-2-27b": (
        "gemma2",
        GEMMA_2_27B,
        ["transformers, 4 texts", PADDED, GROUPED, "here, 8 texts, 38 GiB", "here, 8 texts, 78 GiB"],
    ),
    "qwen3-8b": ("qwen3", QWEN_3_8B, [PACKED, "here, 8 texts, 12 GiB", "here, 8 texts, 23 GiB", "here, 16 texts"]),
    "gemma-4-12b": ("gemma4_text", GEMMA_4_12B, [PACKED, "here, 8 texts"]),
    "gemma-4-31b": ("gemma4_text", GEMMA_4_31B, [PACKED, "here, 8 texts"]),
    "qwen3.5-9b": ("qwen3_5_text", {}, [PACKED, "here, 4 texts"]),  # without values: those of transformers
    "ministral3-8b": ("ministral3", {}, [PACKED, "here, 8 texts"]),
    "lfm2-1.2b": ("lfm2", LFM_2_1B, [PACKED, "here, 8 texts"]),
    "gpt-oss-20b, 8 of 24 layers": (
        "gpt_oss",
        {"num_hidden_layers": 8, "num_local_experts": 32},
        [PACKED, "here, 4 texts"],
    ),
    "qwen3-30b-a3b, 12 of 48 layers": ("qwen3_moe", EXPERTS_30B | {"num_hidden_layers": 12}, [PACKED, "here, 8 texts"]),
}
EXAMPLES_A_STEP = 32
MAX_LENGTH = 2048


def example_lengths(count: int, max_length: int, mean: float = 631.0, sigma: float = 0.6) -> list[int]:
    """Lengths in tokens of `count` examples: lognormal, cut at `max_length`, scaled to the recipe's mean."""
    import numpy as np

    draws = np.random.default_rng(0).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(draws, 16, max_length)]


def make_config(shape: str, tiny: bool):
    """The transformers config of a shape, or of a tiny model with its architecture."""
    from transformers import CONFIG_MAPPING

    model_type, values, _ = SHAPES[shape]
    config = CONFIG_MAPPING[model_type](**values)
    if tiny:
        config = type(config)(**helpers.architectures.tiny_values(config) | {"vocab_size": 512})
    return config


def build_checkpoint(folder: Path, config, device: str) -> None:
    """Write a random checkpoint in NF4 with double quantization, as notebook 1 does, to `folder`, module by module."""
    from safetensors.torch import save_file
    from transformers import set_seed

    set_seed(0)
    model = helpers.shapes.empty(config)
    linear, names = helpers.shapes.linear_layers(model), model.state_dict().keys()
    weight_map, shard = {}, {}

    def save_shard() -> None:
        file = f"shard-{len(weight_map)}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    tied = set(model.all_tied_weights_keys)
    for name, module in model.named_modules():
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        if config.model_type == "gemma4_text" and name.endswith("q_norm"):
            # It divides no scores by the root of a head's width, which trained norms make up for: with norms of 1 the
            # last bit of a number would decide what a token attends to.
            module.weight.data.fill_(module.weight.numel() ** -0.5)
        own = {f"{name}.{key}": value for key, value in (*module._parameters.items(), *module._buffers.items())}
        for key, value in own.items():
            if key in names and key not in tied:
                shard |= quantized(key, value) if name in linear else {key: value.detach().bfloat16().cpu()}
        module.to_empty(device="meta", recurse=False)
        if sum(tensor.nbytes for tensor in shard.values()) > 2**29:
            save_shard()
    save_shard()
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_tokenizer(folder)


def quantized(name: str, value) -> dict:
    """The tensors of a linear layer's weight in 4 bit, by the names that transformers stores them with; of its bias."""
    from bitsandbytes.functional import quantize_4bit

    value = value.detach().bfloat16()
    if not name.endswith(".weight"):
        return {name: value.cpu()}
    packed, state = quantize_4bit(value, compress_statistics=True, quant_type="nf4")
    tensors = {f"{name}.{key}": part.cpu() for key, part in state.as_dict(packed=True).items()}
    return tensors | {name: packed.cpu()}


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of nothing but special tokens: the trainers want one even for examples that are token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special.values())}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def load_here(folder: str, texts: list[list[int]]):
    """Model, tokenizer and arguments of the trainer, as notebook 3 has them."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    config = helpers.models.text_config(folder)
    without_padding = helpers.architectures.check(config, "transformers").rows
    model, tokenizer = helpers.models.load(folder, "transformers", max_seq_length=MAX_LENGTH)
    without_padding = without_padding and helpers.rows.switch_on(model, texts)
    set_seed(3407)
    targets = helpers.shapes.lora_targets(config)
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, **targets, task_type="CAUSAL_LM"))
    return model, tokenizer, helpers.training.machine_arguments(model, "bfloat16", without_padding, False, 0)


def load_transformers(folder: str, _texts: list[list[int]]):
    """As the guides of 2024 did: eager attention, padding, and norms, embeddings and head in float32."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    model, tokenizer = helpers.models.load(folder, "transformers", max_seq_length=MAX_LENGTH)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(3407)
    targets = helpers.shapes.lora_targets(helpers.models.text_config(folder))
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, **targets, task_type="CAUSAL_LM"))
    return model, tokenizer, {"loss_type": "nll"}


def load_unsloth(folder: str, _texts: list[list[int]]):
    """As notebook 3 does with this engine."""
    from unsloth import FastLanguageModel

    targets = helpers.shapes.lora_targets(helpers.models.text_config(folder))  # before unsloth changes the model's code
    options = {"max_seq_length": MAX_LENGTH, "load_in_4bit": True, "use_exact_model_name": True}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, **options)
    options = {"use_gradient_checkpointing": "unsloth", "random_state": 3407}
    model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64, **targets, **options)
    return model, tokenizer, {}


LOADERS = {"here": load_here, "transformers": load_transformers, "unsloth": load_unsloth}


def random_texts(count: int, vocabulary: int, tiny: bool) -> list[list[int]]:
    """The token ids of `count` examples."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = example_lengths(count, 64, 20) if tiny else example_lengths(count, MAX_LENGTH)
    return [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def train(folder: str, name: str, steps: int) -> dict:
    """Train `steps` optimizer steps of 32 examples; the first only warms up. Tokens/s count no padding."""
    engine, *options = name.split(", ")
    batch = int(re.search(r"(\d+) texts", name).group(1))
    memory = re.search(r"(\d+) GiB", name)
    helpers.machine.start_engine("unsloth" if engine == "unsloth" else "transformers")
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    others = 0  # bytes that other programs would use on a smaller GPU
    if cuda and memory:
        others = torch.cuda.mem_get_info()[0] - int(memory.group(1)) * 2**30
        ballast = torch.empty(others, dtype=torch.uint8, device="cuda")  # noqa: F841  (alive until the function ends)
    started = time.time()
    vocabulary = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    texts = random_texts(EXAMPLES_A_STEP * steps, vocabulary, tiny=not cuda)
    model, tokenizer, its_own = LOADERS[engine](folder, texts[:2])
    load_seconds = time.time() - started
    machine_arguments = {"use_cpu": not cuda, "bf16": True, "optim": "adamw_8bit" if cuda else "adamw_torch"} | its_own
    machine_arguments |= {"padding_free": True} if "no padding" in options else {}
    machine_arguments |= {"train_sampling_strategy": "group_by_length"} if "grouped by length" in options else {}
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = SFTConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=EXAMPLES_A_STEP // batch,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_length=None,  # the examples are short enough; padding_free accepts nothing else
            router_aux_loss_coef=0.0,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=3407,
            **machine_arguments,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": texts}),
            processing_class=tokenizer,
        )
    if engine == "here":
        helpers.training.prepare(trainer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # `prepare` did so for ours: trl makes it bf16, which rounds small updates away
            parameter.data = parameter.data.float()
    times: list[float] = []

    class Clock(TrainerCallback):
        """Note the time at the end of every optimizer step."""

        def on_step_end(self, *_args, **_kwargs):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.time())

    batch_tokens: list[int] = []
    collate = trainer.data_collator

    def count_tokens(examples: list[dict]) -> dict:
        batch_tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = count_tokens
    trainer.add_callback(Clock())
    started = time.time()
    trainer.train()
    seconds = times[-1] - times[0]
    batches_a_step = EXAMPLES_A_STEP // batch
    tokens = sum(batch_tokens[batches_a_step : batches_a_step * steps])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kept = getattr(trainer.training_step, "__self__", None)
    return {
        "setting": name,
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": [round(float(loss), 4) for loss in losses],
        "tokens": tokens,
        "peak_gib": round((torch.cuda.max_memory_allocated() - others) / 2**30, 2) if cuda else None,
        "reserved_gib": round((torch.cuda.max_memory_reserved() - others) / 2**30, 2) if cuda else None,
        "load_seconds": round(load_seconds, 1),
        "first_step_seconds": round(times[0] - started, 1),
        "last_row_kept_remembered": [kept.kept, kept.remembering] if hasattr(kept, "kept") else None,
        "step_seconds": round(seconds / (steps - 1), 2),
    }


def quantize(folder: str, tiny: bool) -> dict:
    """Quantize 4 of the 46 bf16 layers of Gemma 2 27B from disk and save them, as notebook 01 does."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM

    cuda = torch.cuda.is_available()
    layers = 2 if tiny else 4
    with torch.device("cuda" if cuda else "cpu"):
        config = Gemma2Config(**(TINY if tiny else GEMMA_2_27B) | {"num_hidden_layers": layers})
        base = Gemma2ForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(f"{folder}/base")
    del base
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/base",
        dtype=torch.bfloat16,
        device_map={"": 0} if cuda else "cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    loaded = time.time()
    model.save_pretrained(f"{folder}/quantized")
    return {
        "quantize_layers": layers,
        "load_and_quantize_seconds": round(loaded - started, 1),
        "save_seconds": round(time.time() - loaded, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def run_alone(script: str, command: list[str], seconds: float) -> dict:
    """Run `script` with `command` in a process of its own; the last line it prints is its result as JSON."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            [sys.executable, script, *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def checkpoint_folder(script: str, folder: str | None, options: list[str]) -> Iterator[str]:
    """A folder with the checkpoint that `script` builds: the one named, or a temporary one."""
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
        if not Path(place, "config.json").is_file():
            started = time.time()
            built = run_alone(script, ["--child", "build", "--folder", place, *options], 300)
            print(f"checkpoint: {time.time() - started:.0f} s", built.get("error", ""), file=sys.stderr)
        yield place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="gemma-2-27b")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a setting; the first warms up")
    parser.add_argument("--only", nargs="*", help="settings to run; quantize: notebook 1's step")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="keep the checkpoint there, and use the one that is there")
    options = parser.parse_args()
    if options.child == "build":
        config = make_config(options.shape, options.tiny)
        build_checkpoint(Path(options.folder), config, "cpu" if options.tiny else "cuda")
        print(json.dumps({}))
    elif options.child == "quantize":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(quantize(folder, options.tiny)))
    elif options.child:
        print(json.dumps(train(options.folder, options.child, options.steps)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Build the checkpoint, run every setting alone and print the table."""
    import torch

    passed_on = ["--shape", options.shape, *(["--tiny"] if options.tiny else [])]
    results = []
    with checkpoint_folder(__file__, options.folder, passed_on) as folder:
        for name in options.only or SHAPES[options.shape][2]:
            command = ["--child", name, "--folder", folder, "--steps", str(options.steps), *passed_on]
            results.append({"setting": name} | run_alone(__file__, command, 600))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny model"
    packages = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"\n{options.shape}, {machine}, {date.today()}; {versions}\n")
    print("| setting | real tokens/s | ratio | peak GiB (reserved) | first step, s | losses |")
    print("|---|---|---|---|---|---|")
    base = results[0].get("tokens_per_second")
    for row in results:
        if "tokens_per_second" not in row:
            print(f"| {row['setting']} | {row.get('error', json.dumps(row)).splitlines()[-1]} | | | | |")
            continue
        ratio = row["tokens_per_second"] / base if base else math.nan
        print(
            f"| {row['setting']} | {row['tokens_per_second']:.0f} | {ratio:.2f} | {row['peak_gib']} "
            f"({row['reserved_gib']}) | {row['first_step_seconds']} | {', '.join(f'{x:.4f}' for x in row['loss'])} |"
        )


if __name__ == "__main__":
    main()
