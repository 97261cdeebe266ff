"""Measure QLoRA training at Gemma-2-27B size with random weights: the 2024 settings beside today's.

    python benchmarks/gpu.py            # one GPU with 40 GB or more, about ten minutes
    python benchmarks/gpu.py --tiny     # a tiny model on the CPU, one minute: does every step still run?

Real weights are not needed for speed and memory: one random matrix of each shape is quantized once and written to
every layer. Every setting runs in a process of its own (unsloth patches transformers, and memory starts empty),
on the same examples in the same order, and reports real tokens per second: padding does not count.
The result is a Markdown table on stdout.
"""

import argparse
import json
import math
import os
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
# Every setting trains 32 examples a step; only how they reach the GPU differs.
FAST = {
    "attention": "examples",
    "padding_free": True,
    "pad_to_multiple_of": 128,
    "use_liger_kernel": True,
    "liger_kernel_config": {"geglu": False},  # slower here than torch's own
}
SETTINGS = {
    "transformers, 2024": {"attention": "eager", "kbit_fp32": True, "batch": 4, "loss_type": "nll"},
    "unsloth, 2024": {"engine": "unsloth", "batch": 4},
    "here, 38 GiB": FAST | {"batch": 8, "memory_gib": 38},
    "here, 16 texts per row, 38 GiB": FAST | {"batch": 16, "memory_gib": 38},
    "here": FAST | {"batch": 8},
    "here, 16 texts per row": FAST | {"batch": 16},
}
EXAMPLES_A_STEP = 32
MAX_LENGTH = 2048


def example_lengths(count: int, max_length: int, mean: float = 631.0, sigma: float = 0.6) -> list[int]:
    """Lengths in tokens of `count` examples: lognormal, cut at `max_length`, scaled to the recipe's mean."""
    import numpy as np

    draws = np.random.default_rng(0).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(draws, 16, max_length)]


def build_checkpoint(folder: Path, geometry: dict, device: str) -> None:
    """Write a random NF4 (double quantization) Gemma 2 checkpoint to `folder`: one shard a layer, the same weights."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import Gemma2Config

    config = Gemma2Config(**geometry)
    config.architectures = ["Gemma2ForCausalLM"]
    config.dtype = "bfloat16"
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    config.save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, key_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    linear_shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (key_heads, hidden),
        "self_attn.v_proj": (key_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    torch.manual_seed(0)
    layer = {}
    for name, shape in linear_shapes.items():
        weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        layer[f"{name}.weight"] = packed.cpu()
        for key, value in state.as_dict(packed=True).items():
            layer[f"{name}.weight.{key}"] = value.cpu()
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer |= {f"{name}.weight": torch.zeros(hidden, dtype=torch.bfloat16) for name in norms}
    shards = {
        f"layer-{index}.safetensors": {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
        for index in range(config.num_hidden_layers)
    }
    embedding = torch.randn((config.vocab_size, hidden), dtype=torch.bfloat16, device=device) * 0.02
    shards["rest.safetensors"] = {
        "model.embed_tokens.weight": embedding.cpu(),
        "model.norm.weight": torch.zeros(hidden, dtype=torch.bfloat16),
    }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of nothing but special tokens: the trainers want one even for examples that are token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(special.values())}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def load_for_training(folder: str, setting: dict):
    """Load the checkpoint with a LoRA adapter on every linear layer (r = alpha = 64), as the recipe does."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if setting.get("engine") == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            folder, max_seq_length=MAX_LENGTH, load_in_4bit=True, use_exact_model_name=True
        )
        model = FastLanguageModel.get_peft_model(
            model, r=64, lora_alpha=64, target_modules=targets, use_gradient_checkpointing="unsloth", random_state=3407
        )
        return model, tokenizer
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, set_seed

    AttentionInterface.register("examples", helpers.attention.packed)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0} if torch.cuda.is_available() else "cpu",
        attn_implementation=setting["attention"],
    )
    if setting.get("kbit_fp32"):  # as the 2024 guides did: norms, embeddings and head become float32
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(3407)
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))
    return model, AutoTokenizer.from_pretrained(folder)


def train(folder: str, name: str, steps: int) -> dict:
    """Train `steps` optimizer steps of 32 examples; the first only warms up. Tokens/s count no padding."""
    setting = SETTINGS[name]
    if setting.get("engine") == "unsloth":
        import unsloth  # noqa: F401  (before trl and transformers, which it patches)
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    others = 0  # bytes that other programs would use on a smaller GPU
    if cuda and "memory_gib" in setting:
        others = torch.cuda.mem_get_info()[0] - int(setting["memory_gib"] * 2**30)
        ballast = torch.empty(others, dtype=torch.uint8, device="cuda")  # noqa: F841  (alive until the function ends)
    started = time.time()
    model, tokenizer = load_for_training(folder, setting)
    load_seconds = time.time() - started
    max_length = MAX_LENGTH if cuda else 64
    generator = torch.Generator().manual_seed(0)
    lengths = example_lengths(EXAMPLES_A_STEP * steps, max_length, 631 if cuda else 20)
    vocabulary = model.config.vocab_size
    rows = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    options_of_trainer = (
        "loss_type",
        "padding_free",
        "pad_to_multiple_of",
        "use_liger_kernel",
        "liger_kernel_config",
        "train_sampling_strategy",
    )
    trainer_options = {key: setting[key] for key in options_of_trainer if key in setting}
    if not cuda:  # liger's kernels run on a GPU only
        trainer_options.pop("use_liger_kernel", None)
        trainer_options.pop("liger_kernel_config", None)
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = SFTConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=setting["batch"],
            gradient_accumulation_steps=EXAMPLES_A_STEP // setting["batch"],
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_8bit" if cuda else "adamw_torch",
            weight_decay=0.01,
            bf16=True,
            use_cpu=not cuda,
            max_length=None,  # the examples are short enough; padding_free accepts nothing else
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=3407,
            **trainer_options,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
        )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl makes the adapter bf16, in which small updates are rounded away
            parameter.data = parameter.data.float()
    kept = None
    if setting.get("padding_free"):  # as notebook 3 does
        helpers.lora.add_in_place(model)
        kept = helpers.kept_layers.KeptLayers(trainer) if cuda else None

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
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batches_a_step = EXAMPLES_A_STEP // setting["batch"]
    tokens = sum(batch_tokens[batches_a_step : batches_a_step * steps])
    return {
        "setting": name,
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": [round(loss, 4) for loss in losses],
        "tokens": tokens,
        "peak_gib": round((torch.cuda.max_memory_allocated() - others) / 2**30, 2) if cuda else None,
        "reserved_gib": round((torch.cuda.max_memory_reserved() - others) / 2**30, 2) if cuda else None,
        "load_seconds": round(load_seconds, 1),
        "first_step_seconds": round(times[0] - started, 1),
        "kept_layers_of_last_row": kept and kept.kept,
        "step_seconds": round(seconds / (steps - 1), 2),
    }


def quantize(folder: str, geometry: dict, layers: int) -> dict:
    """Quantize a bf16 checkpoint of `layers` layers from disk and save it, as notebook 01 does; scale up by layers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    with torch.device(device):
        base = Gemma2ForCausalLM(Gemma2Config(**geometry | {"num_hidden_layers": layers})).to(torch.bfloat16)
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
    if "unsloth" in " ".join(command):
        # torch 2.11's inductor fails (AssertionError in decompose_triton_kernel_wrapper_functional) on the block that
        # unsloth 2026.10.9 compiles around its own Triton kernels; without that it autotunes attention for minutes.
        environment["TORCHDYNAMO_DISABLE"] = "1"
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
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a setting; the first warms up")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings to run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="keep the checkpoint there, and use the one that is there")
    options = parser.parse_args()
    geometry = TINY if options.tiny else GEMMA_2_27B
    if options.child == "build":
        build_checkpoint(Path(options.folder), geometry, "cpu" if options.tiny else "cuda")
        print(json.dumps({}))
    elif options.child == "quantize":
        print(json.dumps(quantize(options.folder, geometry, layers=2 if options.tiny else 4)))
    elif options.child:
        print(json.dumps(train(options.folder, options.child, options.steps)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Build the checkpoint, run every setting alone and print the table."""
    import torch

    tiny = ["--tiny"] if options.tiny else []
    results = []
    with checkpoint_folder(__file__, options.folder, tiny) as folder:
        for name in options.only:
            command = ["--child", name, "--folder", folder, "--steps", str(options.steps), *tiny]
            results.append({"setting": name} | run_alone(__file__, command, 600))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        quantized = run_alone(__file__, ["--child", "quantize", "--folder", folder, *tiny], 300)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny model"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"))
    print(f"\n{device}, {date.today()}; {packages}\n")
    print("| setting | real tokens/s | ratio | peak GiB | first step, s | losses |\n|---|---|---|---|---|---|")
    base = results[0].get("tokens_per_second")
    for row in results:
        if "error" in row:
            print(f"| {row['setting']} | failed: {row['error'].splitlines()[-1]} | | | | |")
        else:
            ratio = row["tokens_per_second"] / base if base else math.nan
            print(
                f"| {row['setting']} | {row['tokens_per_second']:.0f} | {ratio:.2f} | {row['peak_gib']} "
                f"| {row['first_step_seconds']} | {', '.join(f'{loss:.4f}' for loss in row['loss'])} |"
            )
    print(f"\nQuantize: {json.dumps(quantized)}")


if __name__ == "__main__":
    main()
