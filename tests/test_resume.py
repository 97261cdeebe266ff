"""Notebook 03 killed in the middle and started again must end with the loss curve of an uninterrupted run."""

import json
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT


def start(output_dir, smoke):
    output_dir.mkdir(parents=True, exist_ok=True)
    values = {"output_dir": output_dir, "model": smoke / "quantized", "train_data": smoke / "filtered_magpie.jsonl"}
    values |= {
        "qa_data": "data/sample/qa.jsonl",
        "engine": "transformers",
        "r": 4,
        "lora_alpha": 4,
        "optim": "adamw_torch",
    }
    values |= {"max_seq_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    values |= {"max_steps": 40, "warmup_steps": 2, "save_steps": 5, "logging_steps": 1, "wandb_project": ""}
    arguments = [text for name, value in values.items() for text in ("-p", name, str(value))]
    command = ["notebooks/03_sft.ipynb", str(output_dir / "out.ipynb"), "--no-progress-bar", *arguments]
    return subprocess.Popen([sys.executable, "-m", "papermill", *command], cwd=ROOT)


def loss_curve(output_dir):
    return json.loads((output_dir / "sft_metrics.json").read_text(encoding="utf-8"))["loss"]


def test_killed_training_goes_on_and_ends_the_same(smoke, tmp_path):
    assert start(tmp_path / "whole", smoke).wait() == 0
    killed = start(tmp_path / "killed", smoke)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed/checkpoints/checkpoint-10/trainer_state.json").exists():
        assert killed.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # papermill and its kernel, which is a process group of its own
    for process in [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]:
        process.kill()
    killed.wait()
    assert not (tmp_path / "killed/sft_metrics.json").exists()
    assert start(tmp_path / "killed", smoke).wait() == 0
    resumed, whole = loss_curve(tmp_path / "killed"), loss_curve(tmp_path / "whole")
    assert len(whole) == 40
    assert [step for step, _ in resumed] == [step for step, _ in whole]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=1e-6)
