"""Measure answering at Gemma-2-27B size with random weights: one task at a time as in 2024, beside slots.

    python benchmarks/generate.py                      # one GPU with 40 GB or more
    python benchmarks/generate.py --tiny               # a tiny model on the CPU: both must give the same answers

One task at a time as in 2024, batches of the model's own generate(), and slots within all memory, 40 and 24 GiB.
Prompts have about 3,000 tokens, answers 10 to 400 (random weights never end an answer, so the length is set).
Both loops carry the LoRA adapter, the repetition penalty and the banned words of the recipe. The 2024 loop is measured
on a few tasks and projected to all; tokens/s count the time for the prompts too.
"""

import argparse
import json
import random
import sys
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
        gpu.helpers.machine.start_engine(engine)
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


def batches(folder: str, tiny: bool, count: int, size: int) -> dict:
    """Padded batches of `generate()`: the prompts and 32 tokens of one batch are measured, the rest is projected."""
    import torch

    model = load(folder, "transformers", tiny)
    prompts, lengths = make_tasks(count, tiny, model.config.vocab_size)
    size = min(size, count)
    options = {"do_sample": False, "bad_words_ids": BANNED, "repetition_penalty": 1.1}
    options |= {"eos_token_id": None, "pad_token_id": 0}

    def run(first: int, new_tokens: int) -> tuple[list[list[int]], float]:
        batch = prompts[first : first + size]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=model.device)
        started = time.time()
        with torch.inference_mode():
            answers = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=new_tokens, **options)
        return answers[:, longest:].tolist(), time.time() - started

    answers = {}
    if tiny:
        for first in range(0, count, size):
            found, _ = run(first, max(lengths))
            answers |= {first + row: tokens[: lengths[first + row]] for row, tokens in enumerate(found)}
    while True:
        try:
            run(0, 2)  # warms up
            break
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    prompt_seconds, step = run(0, 1)[1], (run(0, 33)[1] - run(0, 1)[1]) / 32
    steps = sum(max(lengths[first : first + size]) - 1 for first in range(0, count, size))
    total = prompt_seconds * count / size + steps * step
    return {
        "size": size,
        "seconds": round(total, 1),
        "tokens_per_second": round(sum(lengths) / total, 1),
        "prompt_seconds": round(prompt_seconds / size, 3),
        "peak_gib": peak_gib(),
        "answers": answers if tiny else None,
    }


def slots(folder: str, tiny: bool, count: int, wanted: int, memory_gib: float) -> dict:
    """All tasks through `answer_in_slots`."""
    import torch
    from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

    import helpers

    if memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / total)
    model = load(folder, "transformers", tiny)
    helpers.lora.add_in_place(model)  # as notebook 4 does
    prompts, lengths = make_tasks(count, tiny, model.config.vocab_size)
    process = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), NoBadWordsLogitsProcessor(BANNED)])
    columns = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    number = helpers.slots.that_fit(model, columns, wanted)

    def never(history, _scores):
        return torch.zeros(len(history), dtype=torch.bool, device=history.device)

    decoding = helpers.decoding.Decoding(number, process, never, penalize_prompt=True)
    started = time.time()
    warm_up = [prompts[0][:2048], prompts[0][:1000], prompts[0]]  # compiles
    list(helpers.slots.answer(model, warm_up, lambda _index: 3, decoding._replace(parallel=1)))
    compile_seconds = time.time() - started
    prompt = prompts[0][:3000]
    decoder = helpers.slots.Decoder(model, 1, len(prompt))
    reading = []
    for _ in range(3):
        started = time.time()
        decoder.read_prompt(0, prompt).tolist()
        reading.append(time.time() - started)
    decoder.close()
    del decoder
    measured = count // 4 if 0 < memory_gib < 30 else count  # with few slots a part shows the rate
    started = time.time()
    answers = dict(helpers.slots.answer(model, prompts[:measured], lengths.__getitem__, decoding))
    rate = sum(lengths[:measured]) / (time.time() - started)
    return {
        "slots": number,
        "seconds": round(sum(lengths) / rate, 1),
        "compile_seconds": round(compile_seconds, 1),
        "prompt_seconds": round(min(reading), 3),
        "prompt_tokens": len(prompt),
        "tokens_per_second": round(rate, 1),
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
    parser.add_argument("--tasks", type=int, help="how many; 100, and of the tiny model 12")
    parser.add_argument("--slots", type=int, default=40, help="answers at once, fewer if memory is short")
    parser.add_argument("--folder", help="keep the checkpoint there, and use the one that is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tasks = count = options.tasks or (12 if options.tiny else 100)
    if options.child == "build":
        if options.tiny:
            build_tiny(Path(options.folder))
        else:
            gpu.build_checkpoint(Path(options.folder), gpu.make_config("gemma-2-27b", tiny=False), "cuda")
        print(json.dumps({}))
    elif options.child == "unsloth":
        print(json.dumps(loop_2024(options.folder, options.child, options.tiny, count, measured=3)))
    elif options.child == "batches":
        print(json.dumps(batches(options.folder, options.tiny, count, size=16)))
    elif options.child:
        wanted, memory_gib = 4 if options.tiny else options.slots, int(options.child.removeprefix("slots "))
        print(json.dumps(slots(options.folder, options.tiny, count, wanted, memory_gib)))
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Build the checkpoint, run every loop alone and print the table."""
    import torch

    passed_on = ["--tasks", str(options.tasks), "--slots", str(options.slots), *["--tiny"] * options.tiny]
    loops = {
        "2024: unsloth, one at a time": "unsloth",
        "padded batches of generate()": "batches",
        "slots": "slots 0",
        "slots, 40 GiB": "slots 40",
        "slots, 24 GiB": "slots 24",
    }
    results = {}
    with gpu.checkpoint_folder(__file__, options.folder, passed_on) as folder:
        for name, child in loops.items():
            if not (options.tiny and child in ("slots 40", "slots 24")):
                results[name] = gpu.run_alone(__file__, ["--child", child, "--folder", folder, *passed_on], 900)
                print(json.dumps({"loop": name} | results[name] | {"answers": None}), file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny model"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    print(f"\n{device}, {date.today()}; {packages}; {options.tasks} tasks\n")
    print("| answers | at once | tokens/s | ratio | seconds for all tasks | a prompt, s | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    base = next(iter(results.values())).get("tokens_per_second")
    for name, row in results.items():
        if "error" in row:
            print(f"| {name} | failed: {row['error'].splitlines()[-1]} | | | | | |")
        else:
            rate = row["tokens_per_second"]
            figures = [row.get("slots", row.get("size", 1)), rate, f"{rate / base:.1f}" if base else ""]
            figures += [row["seconds"], row["prompt_seconds"], row["peak_gib"]]
            print(f"| {name} | " + " | ".join(map(str, figures)) + " |")
    if options.tiny:
        first, *others = (row["answers"] for row in results.values())
        if any(other != first for other in others):
            sys.exit("the answers differ")
        print(f"\nThe {len(first)} answers are equal.")


if __name__ == "__main__":
    main()
