"""Measure notebooks 3 and 4 on two GPUs of one host beside one of them: same data, same effective batch, same seed.

    python benchmarks/two_gpus.py --out outputs/two_gpus          # two GPUs with 40 GB or more, about seven minutes
    python benchmarks/two_gpus.py --out outputs/two_gpus --tiny   # a tiny model on the CPU: does every step still run?

The model has random weights in the shape of gemma-2-9b with 24 of its 42 layers (--model 27b: gemma-2-27b), in 4 bits.
The notebooks run as the README says: papermill --prepare-only, nbconvert, then `python` for one process and `accelerate
launch` for two. Only notebook 3 gets something more: a clock that notes when each step ends and how many tokens were
in it.

Five runs, each in processes of its own with a time limit; what failed is reported, and the others still run: training
on one GPU and, at the same time, answering on the other one; then training on two, answering on two, and the training
on two once more from its checkpoint in the middle. OUT gets two_gpus.json (anew after every run), all outputs and logs;
what takes too long writes to its log where it stands. The result is a Markdown table on stdout.

What can be equal: accelerate deals the batches out in turn, so that a step has the same rows (8 texts end to end) as on
one GPU. transformers counts the tokens of a step over all processes and divides the sum of all losses by it, so that
shorter rows do not count more. What is left is the order in which gradients are added up. The noise of NEFTune is off:
every process draws its own, in another order than one process alone.
The loss on the texts held out is a mean over rows, on two GPUs weighted by the tokens of two rows, on one not.
An answer depends on its neighbours by rounding: sums in bf16 change with the number of slots and columns. Random
weights find many tokens almost equally good, so that two answers soon differ; real ones do so later or never.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

import gpu
import psutil

ROOT = Path(__file__).resolve().parents[1]
GEMMA_2_9B = gpu.GEMMA_2_27B | {
    "num_hidden_layers": 24,  # of 42: work and messages shrink alike
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
SHAPES = {"9b": GEMMA_2_9B, "27b": gpu.GEMMA_2_27B, "tiny": gpu.TINY | {"vocab_size": 2560}}
TOKENIZER = ROOT / "data/tiny/gemma2"
STEP, HELD_OUT = 32, 0.03  # texts of a step; share of the texts that is only tested on
CLOCK = '''
import time

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Notes the end of every step and the tokens that this process was given in it, padding not counted."""

    def __init__(self):
        self.ends, self.rows = [], []
        lm.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, arguments, named):
        if module.training:
            positions = named["position_ids"]  # every text begins at 0 and goes on at 1; padding stays at 0
            self.rows.append(int((positions == 1).sum() + (positions > 0).sum()))

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())

    def on_train_end(self, args, state, control, **kwargs):
        rows, count = self.rows, gradient_accumulation_steps
        tokens = [sum(rows[first : first + count]) for first in range(0, len(rows), count)]
        helpers.files.write_json(
            Path(output_dir, f"clock.{args.process_index}.json"),
            {"first_step": state.global_step - len(self.ends) + 1, "ends": self.ends, "tokens": tokens},
        )


trainer.add_callback(StepClock())
'''


def build(folder: Path, shape: str) -> None:
    """A random checkpoint that writes words: of the vocabulary only printable tokens are likely.

    Other tokens (control tokens, bytes, line ends and those that the tokenizer does not know) get ten times shorter
    vectors, so that they never score highest: an answer that decodes to nothing would stop notebook 4. All vectors are
    short, because otherwise the model, whose layers say nothing, would repeat its last token without end.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, Gemma2Config

    device = "cpu" if shape == "tiny" else "cuda"
    gpu.build_checkpoint(folder, Gemma2Config(**SHAPES[shape]), device)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.embed_tokens.weight"]
    rest = load_file(shard)
    size = rest["model.embed_tokens.weight"].shape
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    printable = [
        token for token, text in enumerate(texts) if text.strip() and text.isprintable() and "\ufffd" not in text
    ]
    printable = sorted(set(printable) - set(tokenizer.all_special_ids))
    length = torch.full((size[0], 1), 0.1, device=device)
    length[printable] = 1
    vectors = torch.randn(size, device=device) * length * (0.25 / size[1] ** 0.5)
    rest["model.embed_tokens.weight"] = vectors.to(torch.bfloat16).cpu()
    save_file(rest, shard, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """Japanese sentences of the sample, put together at random: training rows, tasks without references."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = [json.loads(line) for line in (ROOT / "data/sample/qa.jsonl").open(encoding="utf-8")]
    sentences = [f"{part}。" for row in rows for part in row["output"].replace("\n", "").split("。") if part]
    size = {sentence: len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) for sentence in sentences}
    draw = random.Random(0)

    def text(tokens: float) -> str:
        chosen: list[str] = []
        while tokens > 0:
            chosen.append(draw.choice(sentences))
            tokens -= size[chosen[-1]]
        return "".join(chosen)

    mean, longest = (40, 100) if options.tiny else (240, 2000)  # of the answers, to which comes the prompt's text
    texts = math.ceil(options.steps * STEP / (1 - HELD_OUT)) - len(rows)  # which are trained on, too
    lengths = gpu.example_lengths(texts, longest, mean)
    training = [{"input": draw.choice(rows)["input"], "output": text(length)} for length in lengths]
    asked = [{"task_id": number, "input": text(40)} for number in range(options.tasks)]
    for name, written in (("train.jsonl", training), ("tasks.jsonl", asked)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def parameters(out: Path, name: str, options: argparse.Namespace) -> dict:
    """The notebook's parameters for one of the five runs."""
    values: dict = {"output_dir": out / name, "model": out / "model", "qa_data": "data/sample/qa.jsonl"}
    if name.startswith("train"):
        processes = 1 if name == "train_one" else 2
        batch = 2 if options.tiny else 8
        values |= {"train_data": out / "train.jsonl", "per_device_train_batch_size": batch}
        values |= {"gradient_accumulation_steps": STEP // batch // processes, "max_steps": options.steps}
        values |= {"save_steps": options.steps // 2, "logging_steps": 1, "warmup_steps": 2, "learning_rate": 1e-3}
        values |= {"neftune_noise_alpha": 0, "wandb_project": "", "eval_share": HELD_OUT}
        values |= {"r": 4, "lora_alpha": 4, "max_seq_length": 128} if options.tiny else {}
    else:
        values |= {"adapter": "none", "tasks": out / "tasks.jsonl", "retriever": "data/tiny/colbert"}
        # Every answer has this length, so that the slots are all full or all empty: the number of tasks should be a
        # multiple of both processes' slots.
        values |= {"max_new_tokens": options.new_tokens, "batch_size": 4 if options.tiny else 32}
        values |= {"k": 1, "max_seq_length": 512} if options.tiny else {}
    return values


def prepare(out: Path, name: str, options: argparse.Namespace) -> dict:
    """The notebook with its parameters as a script (notebook 3 with the clock): what went wrong, if anything."""
    notebook = "03_sft" if name.startswith("train") else "04_rag_inference"
    folder = out / name
    folder.mkdir()
    values = [str(text) for pair in parameters(out, name, options).items() for text in ("-p", *pair)]
    copy = str(folder / f"{notebook[:2]}.ipynb")
    for command in (
        ["papermill", f"notebooks/{notebook}.ipynb", copy, "--prepare-only", *values],
        ["nbconvert", "--to", "python", copy],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            (out / f"{name}.log").write_text(done.stderr, encoding="utf-8")
            return {"error": f"{command[0]} failed: {done.stderr[-2000:]}"}
    if notebook == "03_sft":
        script = (folder / "03.py").read_text(encoding="utf-8")
        before, after = script.split("helpers.checkpoints.train(trainer")
        (folder / "03.py").write_text(f"{before}{CLOCK}helpers.checkpoints.train(trainer{after}", encoding="utf-8")
    return {}


def start_in_the_middle(out: Path) -> None:
    """Give `train_resumed` what `train_two` had written when its checkpoint in the middle was finished."""
    checkpoints = out / "train_two/checkpoints"
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(checkpoints, out / "train_resumed/checkpoints", ignore=shutil.ignore_patterns(last.name))


def stop(process: subprocess.Popen) -> None:
    """End a process and its children; each one first writes to its log where it stands."""
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for number, seconds in ((signal.SIGABRT, 5), (signal.SIGKILL, 20)):
        for victim in family:
            with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                victim.send_signal(number)
            time.sleep(0.5)  # one after another: they write to the same log
        _, family = psutil.wait_procs(family, timeout=seconds)


def run(out: Path, name: str, device: str | None, seconds: float) -> dict:
    """Run a prepared notebook, in one process on `device` or (None) in two: what went wrong, if anything."""
    (script,) = (out / name).glob("*.py")
    # With the machine's settings for NCCL; a process that has to be stopped loses no line, and says where it stood.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(script)]
    if device is None:
        # Any free port: another training on this machine may have the usual one.
        launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
        on_cpu = json.loads((out / "model/config.json").read_text(encoding="utf-8"))["hidden_size"] < 1000
        if on_cpu:
            launch.append("--multi_gpu")  # it would start one process
            environment["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not "cpu:0", to which torch cannot load a checkpoint
        command[1:1] = launch
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            problem = f"exit status {code}" if (code := process.wait(seconds)) else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {seconds:.0f} s"
            stop(process)
    if not problem:
        return {}
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    own = list(takewhile(lambda line: "distributed/elastic/multiprocessing/api.py" not in line, lines))
    return {"error": "\n".join([problem, *own[-30:]])}  # without what accelerate says of processes that have failed


def read_training(folder: Path, save_steps: int) -> dict:
    """Losses, tokens and speed of a training. Not timed: the first two steps, which compile, and those after a save."""
    metrics = json.loads((folder / "sft_metrics.json").read_text(encoding="utf-8"))
    clocks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("clock.*.json"))]
    first, ends = clocks[0]["first_step"], clocks[0]["ends"]
    shares = list(zip(*(clock["tokens"] for clock in clocks), strict=True))  # of the processes, for every step
    timed = [i for i in range(2, len(ends)) if (first + i - 1) % save_steps]
    seconds = [ends[i] - ends[i - 1] for i in timed]
    tokens = sum(sum(shares[i]) for i in timed)
    return {
        "loss": [loss for _, loss in metrics["loss"]],
        "held_out": metrics["held_out"][-1][1],
        "first_step": first,
        "tokens": [sum(share) for share in shares],
        "step_seconds": [round(second, 3) for second in seconds],
        "tokens_per_second": round(tokens / sum(seconds), 1),
        "busier_share": round(sum(max(shares[i]) for i in timed) / tokens, 4),
        "peak_gpu_gib": metrics["peak_gpu_gib"],
        "tokens_per_second_of_notebook": metrics["tokens_per_second"],
    }


def read_answers(folder: Path) -> dict:
    """Answers and their speed, from the first prompt to the last answer of the slower process, without loading."""
    metrics = json.loads((folder / "inference_metrics.json").read_text(encoding="utf-8"))
    logs = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("answers*.jsonl"))]
    seconds = [sum(json.loads(line)["seconds"] for line in log) for log in logs]
    submission = [json.loads(line) for line in (folder / "output.jsonl").open(encoding="utf-8")]
    return {
        "tokens_per_second": round(metrics["new_tokens"] / max(seconds), 1),
        "seconds": [round(second, 2) for second in seconds],
        **{key: metrics[key] for key in ("new_tokens", "attention", "parallel", "cut", "peak_gpu_gib")},
        "shots": sum(metrics["shots"].values()) / len(submission),
        "answers": {row["task_id"]: row["output"] for row in submission},
    }


def compare_losses(one: dict, other: dict) -> dict:
    """How far the losses of two trainings lie apart in the steps that the second one did, beside how far they fall."""
    first = other["first_step"]
    gaps = [abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True)][first - 1 :]
    return {
        "steps": len(gaps),
        "largest_gap": round(max(gaps), 6),
        "fall": round(one["loss"][0] - one["loss"][-1], 4),
        "same_tokens_in_every_step": one["tokens"][first - one["first_step"] :] == other["tokens"],
    }


def compare_answers(one: dict, other: dict) -> dict:
    """Shares of the answers that are equal and that begin with the same 10 characters."""
    pairs = [(answer, other["answers"][task]) for task, answer in one["answers"].items()]
    alike = [sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False))) for pair in pairs]
    return {
        "equal": round(sum(a == b for a, b in pairs) / len(pairs), 3),
        "same_first_10": round(sum(length >= 10 for length in alike) / len(pairs), 3),
        "characters": round(sum(len(a) for a, _ in pairs) / len(pairs), 1),
        "characters_alike": round(sum(alike) / len(pairs), 1),
    }


def compare(runs: dict) -> dict:
    """What can be said of the runs that have ended well."""
    good = {name: result for name, result in runs.items() if "error" not in result}
    comparisons = {}
    for key, one, other, function in (
        ("training", "train_one", "train_two", compare_losses),
        ("resumed", "train_two", "train_resumed", compare_losses),
        ("answering", "answer_one", "answer_two", compare_answers),
    ):
        if one in good and other in good:
            try:
                comparisons[key] = function(good[one], good[other])
            except Exception as error:  # the other comparisons are worth having all the same
                comparisons[key] = {"error": repr(error)}
            if other.endswith("two"):
                speeds = [good[name]["tokens_per_second"] for name in (one, other)]
                comparisons[key]["speedup"] = round(speeds[1] / speeds[0], 3)
    return comparisons


def table(runs: dict, comparisons: dict) -> str:
    """The runs and what their comparison says, as Markdown."""
    lines = [
        "| run | tokens/s | loss, first and last | held out | peak GiB | seconds in all |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in runs.items():
        if "error" in result:
            lines.append(f"| {name} | failed: {result['error'].splitlines()[0]} | | | | {result['wall_seconds']} |")
            continue
        loss = f"{result['loss'][0]:.4f}, {result['loss'][-1]:.4f}" if "loss" in result else ""
        cells = [result["tokens_per_second"], loss, result.get("held_out", ""), result["peak_gpu_gib"]]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {result['wall_seconds']} |")
    lines += ["", "| compared | |", "|---|---|"]
    for key, values in comparisons.items():
        lines.append(f"| {key} | {', '.join(f'{name} {value}' for name, value in values.items())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--model", choices=["9b", "27b"], default="9b", help="whose shape")
    parser.add_argument("--steps", type=int, help="training steps of 32 texts, an even number (10; tiny: 8)")
    parser.add_argument("--tasks", type=int, help="tasks to answer (128; tiny: 16)")
    parser.add_argument("--new-tokens", type=int, help="tokens of each answer (192; tiny: 24)")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one run")
    parser.add_argument("--minutes", type=float, default=7.6, help="for everything; runs beyond that are stopped")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = "tiny" if options.tiny else options.model
    if options.build:
        build(options.out / "model", shape)
        return
    defaults = (8, 16, 24) if options.tiny else (10, 128, 192)
    for name, value in zip(("steps", "tasks", "new_tokens"), defaults, strict=True):
        setattr(options, name, getattr(options, name) or value)
    measure(options, shape)


def measure(options: argparse.Namespace, shape: str) -> None:
    """Prepare everything, run the five runs, and write and print what they gave."""
    import torch

    if not options.tiny and torch.cuda.device_count() < 2:
        sys.exit("two GPUs are needed; with --tiny none")
    started = time.time()
    deadline = started + 60 * options.minutes
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # see `stop`
    out = options.out.resolve()
    (out / "model").mkdir(parents=True)
    names = ("train_one", "answer_one", "train_two", "answer_two", "train_resumed")
    again = [sys.executable, __file__, "--build", "--out", str(out), *sys.argv[1:]]
    with (out / "build.log").open("w", encoding="utf-8") as log:
        builder = subprocess.Popen(again, stdout=log, stderr=log)  # a process of its own, so that it frees the GPU
    write_data(out, options)
    with ThreadPoolExecutor(len(names)) as pool:
        problems = dict(zip(names, pool.map(lambda name: prepare(out, name, options), names), strict=True))
    if builder.wait():
        sys.exit(f"the checkpoint could not be built: {(out / 'build.log').read_text(encoding='utf-8')[-2000:]}")
    device = f"2 x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU, tiny model"
    packages = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes")
    results: dict = {"device": device, "shape": shape, "versions": {name: version(name) for name in packages}}
    results |= {"prepared_seconds": round(time.time() - started, 1), "runs": {}}

    def measured(name: str, device: str | None) -> None:
        begun = time.time()
        try:
            if name == "train_resumed":
                start_in_the_middle(out)
            result = problems[name] or run(out, name, device, max(0, min(options.limit, deadline - begun)))
            if not result and name.startswith("train"):
                result = read_training(out / name, options.steps // 2)
            elif not result:
                result = read_answers(out / name)
        except Exception as error:  # the other runs are worth having all the same
            result = {"error": f"it cannot be started, or its results not be read: {error!r}"}
        results["runs"][name] = result | {"wall_seconds": round(time.time() - begun, 1)}
        results["comparisons"] = compare(results["runs"])
        (out / "two_gpus.json").write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"{name}: {time.time() - begun:.0f} s {result.get('error', '')}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measured, ("train_one", "answer_one"), ("0", "1")))
    measured("train_two", None)
    measured("answer_two", None)
    if "error" not in results["runs"]["train_two"]:
        measured("train_resumed", None)
    print(f"\n{device}, shape {shape}, {date.today()}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}")
    print(f"{options.steps} steps of {STEP} texts, {options.tasks} tasks; {time.time() - started:.0f} s in all\n")
    print(table(results["runs"], results["comparisons"]))


if __name__ == "__main__":
    main()
