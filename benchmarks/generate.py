"""Measure answering at Gemma-2-27B size with random weights: one task at a time as in 2024, beside slots.

    python benchmarks/generate.py                      # one GPU with 40 GB or more
    python benchmarks/generate.py --memory-gib 24      # as if the GPU had 24 GiB
    python benchmarks/generate.py --tiny               # a tiny model on the CPU: both must give the same answers

Prompts have about 3,000 tokens, answers 10 to 400 (random weights never end an answer, so the length is set).
Both loops carry the LoRA adapter, the repetition penalty and the banned words of the recipe. The 2024 loop is measured
on a few tasks and projected to all; tokens/s count the time for the prompts too.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import gpu

BANNED = [[7], [8, 9], [10, 11, 12]]  # random weights know no words: any short sequences cost the same


def make_tasks(count: int, tiny: bool, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Prompts (token ids) and the number of new tokens of each."""
    draw = random.Random(0)
    prompt_tokens, new_tokens = ((20, 40), (1, 30)) if tiny else ((2700, 3300), (10, 400))
    prompts = [[draw.randrange(4, vocabulary) for _ in range(draw.randint(*prompt_tokens))] for _ in range(count)]
    return prompts, [draw.randint(*new_tokens) for _ in range(count)]


def build_tiny(folder: Path) -> None:
    """A tiny Gemma 2 in float32, with weights large enough that softcapping and sliding window matter."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**gpu.TINY | {"sliding_window": 24, "attn_logit_softcapping": 2.0}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    gpu.save_tokenizer(folder)


def load(folder: str, engine: str, tiny: bool):
    """The checkpoint with an adapter of r = 64, ready to answer."""
    import torch

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    dtype = torch.float32 if tiny else torch.bfloat16
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=4096, dtype=dtype, load_in_4bit=not tiny, use_exact_model_name=True
        )
        model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64, target_modules=targets)
        FastLanguageModel.for_inference(model)
        return model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map="cpu" if tiny else {"": 0},
        attn_implementation="eager",
    )
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # peft keeps it float32, which costs a cast of every input
            parameter.data = parameter.data.to(dtype)
    if not tiny:
        from liger_kernel.transformers import apply_liger_kernel_to_gemma2

        apply_liger_kernel_to_gemma2(geglu=False, fused_linear_cross_entropy=False, model=model.get_base_model())
    return model.eval()


def loop_2024(folder: str, engine: str, tiny: bool, count: int, measured: int) -> dict:
    """One task at a time with generate(), as in 2024."""
    import torch

    model = load(folder, engine, tiny)
    prompts, lengths = make_tasks(count, tiny, model.config.vocab_size)
    measured = count if tiny else measured
    answers, prompt_seconds, answer_seconds, generated = {}, 0.0, 0.0, 0
    with torch.inference_mode():
        for index in range(-1, measured):  # the first one (-1) warms up
            ids = torch.tensor([prompts[index]], device=model.device)
            options = {"do_sample": False, "use_cache": True, "bad_words_ids": BANNED, "repetition_penalty": 1.1}
            options |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
            wanted = lengths[index] if tiny else 65
            started = time.time()
            if not tiny:
                model.generate(ids, max_new_tokens=1, **options).tolist()
            prompt_end = time.time()
            tokens = model.generate(ids, max_new_tokens=wanted, **options)[0, ids.shape[1] :].tolist()
            if index >= 0:
                answers[index] = tokens
                prompt_seconds += prompt_end - started
                answer_seconds += time.time() - prompt_end
                generated += len(tokens)
    decode_rate = (generated - measured) / (answer_seconds - prompt_seconds)
    total = prompt_seconds / measured * count + (sum(lengths) - count) / decode_rate
    return {
        "seconds": round(total, 1),
        "tokens_per_second": round(sum(lengths) / total, 1),
        "decode_tokens_per_second": round(decode_rate, 1),
        "prompt_seconds": round(prompt_seconds / measured, 3),
        "peak_gib": peak_gib(),
        "answers": answers if tiny else None,
    }


def slots(folder: str, tiny: bool, count: int, wanted: int, memory_gib: float) -> dict:
    """All tasks through `answer_in_slots`."""
    import torch
    from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

    from helpers import Decoding, answer_in_slots, slots_that_fit

    if memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / total)
    model = load(folder, "transformers", tiny)
    prompts, lengths = make_tasks(count, tiny, model.config.vocab_size)
    process = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), NoBadWordsLogitsProcessor(BANNED)])
    columns = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    number = slots_that_fit(model, columns, wanted)

    def never(history, _scores):
        return torch.zeros(len(history), dtype=torch.bool, device=history.device)

    decoding = Decoding(answer_in_slots, number, process, never)
    list(answer_in_slots(model, [prompts[0][:2048]], lambda _index: 3, decoding._replace(parallel=1)))  # warms up
    started = time.time()
    answers = dict(answer_in_slots(model, prompts, lengths.__getitem__, decoding))
    seconds = time.time() - started
    return {
        "slots": number,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "peak_gib": peak_gib(),
        "answers": answers if tiny else None,
    }


def peak_gib() -> float | None:
    """The most GPU memory reserved so far, GiB."""
    import torch

    return round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--slots", type=int, default=40, help="answers at once, fewer if memory is short")
    parser.add_argument("--memory-gib", type=float, default=0, help="use no more GPU memory than this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = 12 if options.tiny else options.tasks
    if options.child == "build":
        if options.tiny:
            build_tiny(Path(options.folder))
        else:
            gpu.build_checkpoint(Path(options.folder), gpu.GEMMA_2_27B, "cuda")
        print(json.dumps({}))
    elif options.child == "slots":
        wanted = 4 if options.tiny else options.slots
        print(json.dumps(slots(options.folder, options.tiny, count, wanted, options.memory_gib)))
    elif options.child:
        print(json.dumps(loop_2024(options.folder, options.child, options.tiny, count, measured=3)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Build the checkpoint, run both loops alone and print the table."""
    import torch

    passed_on = ["--tasks", str(options.tasks), "--slots", str(options.slots), "--memory-gib", str(options.memory_gib)]
    passed_on += ["--tiny"] if options.tiny else []
    with tempfile.TemporaryDirectory() as folder:
        gpu.run_alone(__file__, ["--child", "build", "--folder", folder, *passed_on], 300)
        results = {
            name: gpu.run_alone(__file__, ["--child", child, "--folder", folder, *passed_on], 900)
            for name, child in {"2024: unsloth, one at a time": "unsloth", "slots": "slots"}.items()
        }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny model"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    limit = f", limited to {options.memory_gib:g} GiB" if options.memory_gib else ""
    print(f"\n{device}{limit}, {date.today()}; {packages}\n")
    print("| answers | tokens/s | ratio | seconds for all tasks | peak GiB |\n|---|---|---|---|---|")
    base = next(iter(results.values())).get("tokens_per_second")
    for name, row in results.items():
        answers = row.pop("answers", None)
        print(json.dumps({"loop": name} | row), file=sys.stderr)
        row["answers"] = answers
        if "error" in row:
            print(f"| {name} | failed: {row['error'].splitlines()[-1]} | | | |")
        else:
            rate = row["tokens_per_second"]
            print(f"| {name} | {rate} | {rate / base:.1f} | {row['seconds']} | {row['peak_gib']} |")
    if options.tiny:
        first, second = (row["answers"] for row in results.values())
        if first != second:
            sys.exit("the answers differ")
        print(f"\nThe {len(first)} answers are equal.")


if __name__ == "__main__":
    main()
