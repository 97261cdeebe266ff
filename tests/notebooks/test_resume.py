"""Notebooks killed in the middle, and notebooks run in two processes, must end like an undisturbed run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import ROOT
from nbconvert import PythonExporter

FILTER = {"dataset": "data/sample/magpie.jsonl", "dataset_revision": ""}
TRAIN = {"engine": "transformers", "r": 4, "lora_alpha": 4, "qa_data": "data/sample/qa.jsonl"}
TRAIN |= {"max_seq_length": 64, "max_steps": 6, "warmup_steps": 2, "save_steps": 2, "logging_steps": 1}
TRAIN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "wandb_project": ""}
ANSWER = {"tasks": "data/sample/tasks.jsonl", "qa_data": "data/sample/qa.jsonl", "retriever": "data/tiny/colbert"}
ANSWER |= {"engine": "transformers", "k": 2, "max_seq_length": 1024, "max_new_tokens": 8}
# In bf16 an answer can change with its neighbours, by rounding alone: one at a time.
ANSWER |= {"model": "data/tiny/gemma2", "adapter": "none", "batch_size": 1}


def prepare(name, output_dir, smoke, **values):
    """The notebook with these values, as papermill would execute it."""
    trained = {"model": str(smoke / "quantized"), "train_data": str(smoke / "filtered_magpie.jsonl")}
    own = {"02_filter_magpie": FILTER, "03_sft": TRAIN | trained, "04_rag_inference": ANSWER}
    parameters = {"output_dir": str(output_dir)} | own[name] | values
    notebook = papermill.execute_notebook(ROOT / f"notebooks/{name}.ipynb", None, parameters, prepare_only=True)
    return nbformat.from_dict(notebook)


def code(notebook):
    """Id and source of its code cells."""
    return [(cell.get("id"), cell.source) for cell in notebook.cells if cell.cell_type == "code"]


@contextlib.contextmanager
def forks(**environment):
    """Gives `run(cells, folder)`, which runs cells in a forked process (forks.py) and returns what is printed and after
    which cells it was killed; `kill` says when that shall be, or `meanwhile(pid)` does it.
    """
    command = [sys.executable, Path(__file__).with_name("forks.py")]
    environment = os.environ | {"MPLBACKEND": "agg"} | environment
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(cells, folder, kill="never", meanwhile=None, processes=1):
            log = folder.with_suffix(".log")
            job = {"cells": cells, "folder": str(folder), "log": str(log), "kill": kill, "processes": processes}
            print(json.dumps(job), file=process.stdin, flush=True)
            while "status" not in (answer := json.loads(process.stdout.readline())):
                if meanwhile:
                    meanwhile(answer["pid"])
            printed = log.read_text(encoding="utf-8")
            shall_be_killed = isinstance(kill, dict) or meanwhile
            assert answer["status"] == (-signal.SIGKILL if shall_be_killed else 0), printed[-3000:]
            return printed, answer["cells"]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def run():
    with forks() as run:
        yield run


@pytest.fixture(scope="module")
def whole(run, smoke, tmp_path_factory):
    """The folder of an undisturbed run of a notebook."""

    @cache
    def whole(name):
        folder = tmp_path_factory.mktemp(name) / "whole"
        run(code(prepare(name, folder, smoke)), folder)
        return folder

    return whole


def outputs(output_dir):
    """The answers of a finished run by task_id, in its order."""
    rows = map(json.loads, (output_dir / "output.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["task_id"]: row["output"] for row in rows}


def check_mostly_equal(found, expected):
    """Other tasks beside an answer make other matrices, and in bf16 a processor may round them to another token; with
    another model or other prompts all answers would differ.
    """
    assert sum(found[task_id] == text for task_id, text in expected.items()) >= 7


def losses(output_dir):
    report = json.loads((output_dir / "sft_metrics.json").read_text(encoding="utf-8"))
    return [loss for _, loss in report["loss"]]


MADE = {
    "02_filter_magpie": ("filtered_magpie.jsonl", "dropped_magpie.jsonl", "filtered_magpie.jsonl.record.json"),
    "03_sft": ("adapter/adapter_model.safetensors", "adapter/README.md", "adapter/record.json"),
    "04_rag_inference": ("output.jsonl", "output.jsonl.record.json", "scores.json"),
}
# 04 knows an adapter by the bytes of its files, so these may not depend on the process that wrote them.
MADE["03_sft"] += tuple(f"adapter/{name}.json" for name in ("adapter_config", "tokenizer", "tokenizer_config"))
# What writes into the folder: to be killed after another cell is to be killed after the one before it.
WRITING = {
    "02_filter_magpie": {"filter"},
    "03_sft": {"run", "metrics", "save"},
    "04_rag_inference": {"answer", "output", "metrics", "scores"},
}


def check_same(name, folder, whole):
    """The two runs lie in two folders, and that is all they may differ in."""
    for file in MADE[name]:
        texts = [(place / file).read_bytes().replace(str(place).encode(), b"") for place in (folder, whole)]
        assert texts[0] == texts[1], file
    if name == "03_sft":
        assert losses(folder) == losses(whole)
        assert len(losses(whole)) == TRAIN["max_steps"]


@pytest.mark.parametrize("name", MADE)
def test_killed_after_every_cell_it_ends_the_same(name, run, whole, smoke, tmp_path):
    killed = tmp_path / "killed"
    _, after = run(code(prepare(name, killed, smoke)), killed, "after cells")
    assert WRITING[name] <= set(after)
    check_same(name, killed, whole(name))


def test_killed_training_goes_on_and_ends_the_same(run, whole, smoke, tmp_path):
    killed = tmp_path / "killed"
    cells = code(prepare("03_sft", killed, smoke))
    checkpoint = killed / "checkpoints/checkpoint-2"
    run(cells, killed, {"file": str(checkpoint / "record.json"), "lines": 1})
    assert not (killed / "checkpoints/checkpoint-6").exists() and not (killed / "sft_metrics.json").exists()
    printed, _ = run(cells, killed)
    assert f"from {checkpoint}\n" in printed
    check_same("03_sft", killed, whole("03_sft"))


def test_killed_inference_answers_only_what_is_missing(run, whole, smoke, tmp_path):
    """One at a time, answers are those of an undisturbed run."""
    killed = tmp_path / "killed"
    cells, log = code(prepare("04_rag_inference", killed, smoke)), killed / "answers.jsonl"
    run(cells, killed, {"file": str(log), "lines": 3})
    assert not (killed / "output.jsonl").exists()
    finished = log.read_bytes().split(b"\n")[:-1]
    assert len(finished) == 3
    printed, _ = run(cells, killed)
    assert "3 tasks are already answered, 7 to go" in printed
    assert log.read_bytes().split(b"\n")[:3] == finished
    texts, kept = outputs(killed), {row["task_id"]: row["output"] for row in map(json.loads, finished)}
    assert list(texts) == list(range(10)) and kept.items() <= texts.items()
    check_mostly_equal(texts, outputs(whole("04_rag_inference")))


def test_killed_inference_goes_on_with_the_number_of_its_record(run, smoke, tmp_path):
    """Several at a time, an answer can change in bf16 with what is decoded beside it: what is written stays, and the
    rest is decoded as many at a time as before.
    """
    killed = tmp_path / "killed"
    log, record = killed / "answers.jsonl", killed / "output.jsonl.record.json"
    run(code(prepare("04_rag_inference", killed, smoke, batch_size=4)), killed, kill={"file": str(log), "lines": 1})
    begun = json.loads(record.read_text(encoding="utf-8"))
    assert begun["parallel"] == 4 and "files" not in begun
    finished = log.read_bytes().split(b"\n")[:-1]
    run(code(prepare("04_rag_inference", killed, smoke, batch_size=0)), killed)
    assert 0 < len(finished) < 10 and log.read_bytes().split(b"\n")[: len(finished)] == finished
    assert len(outputs(killed)) == 10
    done = json.loads(record.read_text(encoding="utf-8"))
    assert done["parallel"] == 4 and done["files"].keys() == {"output.jsonl"}


def test_run_all_twice_in_one_process_gives_the_same(run, smoke, tmp_path):
    """All cells, all cells again, and the cells from the results on once more: same answers, scores and metrics."""
    once, again = tmp_path / "once", tmp_path / "again"
    cells = code(prepare("04_rag_inference", again, smoke, batch_size=4, ban_words=False, k=0))
    results = [name for name, _ in cells].index("answer")
    copy = ("copy", f"import shutil; shutil.copytree({str(again)!r}, {str(once)!r})")
    printed, _ = run([*cells, copy, *cells, *cells[results:]], again)
    assert [line for line in printed.splitlines() if "already answered" in line] == [
        "0 tasks are already answered, 10 to go",
        "10 tasks are already answered, 0 to go",
        "10 tasks are already answered, 0 to go",
    ]
    assert (again / "answers.jsonl").read_bytes().count(b"\n") == 10
    for name in ("output.jsonl", "scores.json"):
        assert (again / name).read_bytes() == (once / name).read_bytes()
    metrics, before = (json.loads((path / "inference_metrics.json").read_text()) for path in (again, once))
    timing = ("seconds", "tokens_per_second")
    assert {k: v for k, v in metrics.items() if k not in timing} == {k: v for k, v in before.items() if k not in timing}
    assert metrics["seconds"] > 0  # the time that the answers took, not that of reading the log


def run_in_two(name, output_dir, smoke, **values):
    """Run a notebook in two processes as the README says, on a CPU (gloo) and on any free port; what is printed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    script, _ = PythonExporter().from_notebook_node(prepare(name, output_dir, smoke, **values))
    (output_dir / "notebook.py").write_text(script, encoding="utf-8")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    # accelerate would call the CPU of several processes "cpu:0", to which torch cannot load a checkpoint.
    environment = os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    command = [sys.executable, *launch, str(output_dir / "notebook.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# The first of two processes runs this after training: what averaged the gradients could deadlock if it went last.
WITHOUT_REDUCER = """
import gc, torch
kind = torch.nn.parallel.DistributedDataParallel
assert not any(issubclass(type(thing), kind) for thing in gc.get_objects())
"""


def test_two_processes_train_like_one_with_twice_the_accumulation(run, smoke, tmp_path):
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    values = {"neftune_noise_alpha": 0, "max_steps": 4, "eval_share": 0.043}  # 8 texts, as many for each of two
    run(code(prepare("03_sft", one, smoke, gradient_accumulation_steps=4, **values)), one)
    printed = run_in_two("03_sft", two, smoke, gradient_accumulation_steps=2, **values)
    assert printed.count("4 steps of 8 texts") == 1  # one process speaks for both
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    reports = [json.loads((folder / "sft_metrics.json").read_text()) for folder in (one, two)]
    held_out = [[loss for _, loss in report["held_out"]] for report in reports]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)  # a mean over rows, and over pairs of rows by tokens

    # Two processes go on from the checkpoint in the middle: forked ones, which accelerate would start alike.
    left_out = shutil.ignore_patterns("checkpoint-4")
    shutil.copytree(two / "checkpoints", resumed / "checkpoints", ignore=left_out)
    cells = code(prepare("03_sft", resumed, smoke, gradient_accumulation_steps=2, **values))
    printed, _ = run([*cells, ("gone", WITHOUT_REDUCER)], resumed, processes=2)
    assert f"from {resumed}/checkpoints/checkpoint-2" in printed
    assert losses(resumed) == losses(two)


def test_two_processes_answer_like_one(run, whole, smoke, tmp_path):
    one, two = whole("04_rag_inference"), tmp_path / "two"
    # In the other folder lies a finished run with other settings, in one process.
    two.mkdir()
    old = [json.loads(line) | {"key": "old"} for line in (one / "answers.jsonl").read_bytes().splitlines()]
    (two / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    for name in ("output.jsonl", "output.jsonl.record.json"):
        shutil.copy(one / name, two)
    run(code(prepare("04_rag_inference", two, smoke)), two, processes=2)
    assert not (two / "answers.jsonl").exists()
    assert len(list(two.glob("answers.*.jsonl"))) == 2
    texts = outputs(two)
    assert list(texts) == list(range(10))
    check_mostly_equal(texts, outputs(one))
