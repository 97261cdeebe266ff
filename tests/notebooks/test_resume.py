"""Notebooks killed in the middle, and notebooks run in two processes, must end like an undisturbed run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FILTER = {"dataset": "data/sample/magpie.jsonl", "dataset_revision": ""}
TRAIN = {"engine": "transformers", "r": 4, "lora_alpha": 4, "qa_data": "data/sample/qa.jsonl"}
TRAIN |= {"max_seq_length": 64, "max_steps": 30, "warmup_steps": 2, "save_steps": 5, "logging_steps": 1}
TRAIN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "wandb_project": ""}
ANSWER = {"tasks": "data/sample/tasks.jsonl", "qa_data": "data/sample/qa.jsonl", "retriever": "data/tiny/colbert"}
ANSWER |= {"engine": "transformers", "k": 2, "max_seq_length": 1024, "max_new_tokens": 40}
# In bf16 an answer can change with its neighbours, by rounding alone: one at a time.
ANSWER |= {"model": "data/tiny/gemma2", "adapter": "none", "batch_size": 1}


def parameters(name, output_dir, smoke, **values):
    trained = {"model": str(smoke / "quantized"), "train_data": str(smoke / "filtered_magpie.jsonl")}
    own = {"02_filter_magpie": FILTER, "03_sft": TRAIN | trained, "04_rag_inference": ANSWER}
    return {"output_dir": str(output_dir)} | own[name] | values


def start(name, output_dir, smoke, **changed):
    """Start a notebook as its users do; it runs in a kernel, a process of its own."""
    output_dir.mkdir(parents=True, exist_ok=True)
    values = [
        text
        for pair in parameters(name, output_dir, smoke, **changed).items()
        for text in ("-p", pair[0], str(pair[1]))
    ]
    command = [f"notebooks/{name}.ipynb", str(output_dir / "out.ipynb"), "--no-progress-bar", *values]
    return subprocess.Popen([sys.executable, "-m", "papermill", *command], cwd=ROOT)


def kill_when(process, reached):
    """kill -9 papermill and its kernel as soon as `reached()`."""
    deadline = time.monotonic() + 1200
    while not reached():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.wait()


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


def test_killed_training_goes_on_and_ends_the_same(smoke, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start("03_sft", whole, smoke).wait() == 0
    checkpoint = killed / "checkpoints/checkpoint-10/record.json"
    kill_when(start("03_sft", killed, smoke), checkpoint.exists)
    assert not (killed / "sft_metrics.json").exists()
    assert start("03_sft", killed, smoke).wait() == 0
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(whole)) == TRAIN["max_steps"]
    # 04 knows an adapter by the bytes of its files, so these may not depend on the process that wrote them.
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (killed / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_killed_inference_answers_only_what_is_missing(smoke, tmp_path):
    """One at a time, answers are those of an undisturbed run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start("04_rag_inference", whole, smoke).wait() == 0
    log = killed / "answers.jsonl"
    kill_when(start("04_rag_inference", killed, smoke), lambda: log.exists() and log.read_bytes().count(b"\n") >= 3)
    assert not (killed / "output.jsonl").exists()
    finished = log.read_bytes().split(b"\n")[:-1]
    assert len(finished) < 10
    assert start("04_rag_inference", killed, smoke).wait() == 0
    assert log.read_bytes().split(b"\n")[: len(finished)] == finished
    texts, kept = outputs(killed), {row["task_id"]: row["output"] for row in map(json.loads, finished)}
    assert list(texts) == list(range(10)) and kept.items() <= texts.items()
    check_mostly_equal(texts, outputs(whole))


def test_killed_inference_goes_on_with_the_number_of_its_record(smoke, tmp_path):
    """Several at a time, an answer can change in bf16 with what is decoded beside it: what is written stays, and the
    rest is decoded as many at a time as before.
    """
    log, record = tmp_path / "answers.jsonl", tmp_path / "output.jsonl.record.json"
    kill_when(start("04_rag_inference", tmp_path, smoke, batch_size=4), lambda: log.exists() and log.read_bytes())
    begun = json.loads(record.read_text(encoding="utf-8"))
    assert begun["parallel"] == 4 and "files" not in begun
    finished = log.read_bytes().split(b"\n")[:-1]
    assert start("04_rag_inference", tmp_path, smoke, batch_size=0).wait() == 0
    assert log.read_bytes().split(b"\n")[: len(finished)] == finished
    rows = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 10
    whole = json.loads(record.read_text(encoding="utf-8"))
    assert whole["parallel"] == 4 and whole["files"].keys() == {"output.jsonl"}


def test_run_all_twice_in_one_kernel_gives_the_same(smoke, tmp_path):
    """All cells, all cells again, and the cells from the results on once more: same answers, scores and metrics."""
    once, again = tmp_path / "once", tmp_path / "again"
    values = {"batch_size": 4, "ban_words": False, "k": 0}
    papermill.execute_notebook(
        ROOT / "notebooks/04_rag_inference.ipynb",
        None,
        parameters("04_rag_inference", once, smoke, **values),
        kernel_name="python3",
        cwd=ROOT,
        progress_bar=False,
    )
    notebook = nbformat.from_dict(
        papermill.execute_notebook(
            ROOT / "notebooks/04_rag_inference.ipynb",
            None,
            parameters("04_rag_inference", again, smoke, **values),
            prepare_only=True,
        )
    )
    results = [cell.id for cell in notebook.cells].index("answer")
    notebook.cells = [
        nbformat.v4.new_code_cell(cell.source)
        for cell in [*notebook.cells, *notebook.cells, *notebook.cells[results:]]
        if cell.cell_type == "code"
    ]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = [output.text for cell in notebook.cells for output in cell.outputs if output.output_type == "stream"]
    assert [text.strip() for text in printed if "already answered" in text] == [
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


# Runs the cells of a notebook again and again in one folder, killed after its first cell, after its second and so on,
# and at last to the end; before that once undisturbed in another folder. Forked from one process that has imported what
# takes long, so that a start costs little.
KILLS = """
import json, os, sys
import peft, torch, transformers, trl
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

cells, whole, killed = json.load(open(sys.argv[1])), *sys.argv[2:4]
torch.set_num_threads(1)
for folder, last in [(whole, None), *((killed, number) for number in range(len(cells))), (killed, None)]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        scope = {"__name__": "__main__"}
        for number, (name, code) in enumerate(cells):
            exec(compile(code.replace("FOLDER", folder), f"<{name}>", "exec"), scope)
            if number == last:
                os._exit(9)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if last is None else 9), f"{status} when killed after {last}"
"""
MADE = {
    "02_filter_magpie": ("filtered_magpie.jsonl", "dropped_magpie.jsonl", "filtered_magpie.jsonl.record.json"),
    "03_sft": ("adapter/adapter_model.safetensors", "adapter/README.md", "adapter/record.json"),
    "04_rag_inference": ("output.jsonl", "output.jsonl.record.json", "scores.json"),
}


@pytest.mark.parametrize("name", MADE)
def test_killed_after_every_cell_it_ends_the_same(smoke, tmp_path, name):
    prepared = papermill.execute_notebook(
        ROOT / f"notebooks/{name}.ipynb", None, parameters(name, Path("FOLDER"), smoke), prepare_only=True
    )
    code = [(cell.get("id"), cell.source) for cell in nbformat.from_dict(prepared).cells if cell.cell_type == "code"]
    (tmp_path / "cells.json").write_text(json.dumps(code), encoding="utf-8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLS, tmp_path / "cells.json", whole, killed]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for file in MADE[name]:
        # The two runs lie in two folders, and that is all they may differ in.
        texts = [(folder / file).read_bytes().replace(str(folder).encode(), b"") for folder in (whole, killed)]
        assert texts[0] == texts[1], file
    if name == "03_sft":
        assert losses(killed) == losses(whole)


def run_in_processes(count, name, output_dir, smoke, **values):
    """Run a notebook in one or several processes as the README says, on a CPU (gloo) and on any free port."""
    output_dir.mkdir(parents=True, exist_ok=True)
    notebook, script = (str(output_dir / f"notebook.{suffix}") for suffix in ("ipynb", "py"))
    papermill.execute_notebook(
        ROOT / f"notebooks/{name}.ipynb", notebook, parameters(name, output_dir, smoke, **values), prepare_only=True
    )
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    launch = [*launch, "--main_process_port", "0"] if count > 1 else []
    # accelerate would call the CPU of several processes "cpu:0", to which torch cannot load a checkpoint.
    environment = os.environ | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    for command in (["-m", "nbconvert", "--to", "python", notebook], [*launch, script]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_like_one_with_twice_the_accumulation(smoke, tmp_path):
    values = {"neftune_noise_alpha": 0, "max_steps": 6, "save_steps": 3, "eval_share": 0.045}  # 8 texts
    run_in_processes(1, "03_sft", tmp_path / "one", smoke, gradient_accumulation_steps=4, **values)
    printed = run_in_processes(2, "03_sft", tmp_path / "two", smoke, gradient_accumulation_steps=2, **values)
    assert printed.count("6 steps of 8 texts") == 1  # one process speaks for both
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    reports = [json.loads((tmp_path / name / "sft_metrics.json").read_text()) for name in ("one", "two")]
    held_out = [[loss for _, loss in report["held_out"]] for report in reports]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-3)  # a mean over rows, and over pairs of rows by tokens

    # Two processes go on from the checkpoint in the middle.
    left_out = shutil.ignore_patterns("checkpoint-6")
    shutil.copytree(tmp_path / "two/checkpoints", tmp_path / "resumed/checkpoints", ignore=left_out)
    printed = run_in_processes(2, "03_sft", tmp_path / "resumed", smoke, gradient_accumulation_steps=2, **values)
    assert f"from {tmp_path}/resumed/checkpoints/checkpoint-3" in printed
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")


def test_two_processes_answer_like_one(smoke, tmp_path):
    run_in_processes(1, "04_rag_inference", tmp_path / "one", smoke)
    # In the other folder lies a finished run with other settings, in one process.
    (tmp_path / "two").mkdir()
    old = [json.loads(line) | {"key": "old"} for line in (tmp_path / "one/answers.jsonl").read_bytes().splitlines()]
    (tmp_path / "two/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    for name in ("output.jsonl", "output.jsonl.record.json"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "two")
    run_in_processes(2, "04_rag_inference", tmp_path / "two", smoke)
    assert not (tmp_path / "two/answers.jsonl").exists()
    assert len(list((tmp_path / "two").glob("answers.*.jsonl"))) == 2
    texts = outputs(tmp_path / "two")
    assert list(texts) == list(range(10))
    check_mostly_equal(texts, outputs(tmp_path / "one"))
