"""Machines that are lost, with all their files: another one goes on with what a private hub repository holds."""

import json
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
from conftest import ROOT
from test_hub import hub  # noqa: F401, a fixture
from test_resume import losses, outputs, prepare

VALUES = {"max_steps": 9, "save_steps": 2, "neftune_noise_alpha": 0, "eval_share": 0}


def start(name, output_dir, smoke, **values):
    """Start a notebook as its users do; it runs in a kernel, a process of its own."""
    output_dir.mkdir(parents=True, exist_ok=True)
    nbformat.write(prepare(name, output_dir, smoke, **values), output_dir / "in.ipynb")
    command = [output_dir / "in.ipynb", output_dir / "out.ipynb", "--no-progress-bar", "--cwd", ROOT]
    return subprocess.Popen([sys.executable, "-m", "papermill", *map(str, command)], cwd=ROOT)


def kill_when(process, reached):
    """kill -9 papermill and its kernel as soon as `reached()`."""
    while not reached():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.wait()


@pytest.fixture
def online(hub, monkeypatch, tmp_path):  # noqa: F811
    """The stand-in of the hub, for the notebooks that are started."""
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    return hub


def lose_machine(hub, process, uploads):  # noqa: F811
    """Kill a notebook in the middle of an upload, after so many whole ones: the commit is asked for and not made."""
    reached, lost = threading.Event(), threading.Event()
    hub.lost = lambda path: "/commit/" in path and len(hub.commits) == uploads and (reached.set() or lost.wait())
    kill_when(process, reached.is_set)
    lost.set()
    hub.lost = lambda path: False


def on_the_hub(hub, what):  # noqa: F811
    """The files of the one run on the branch, by name."""
    return {path.split("/")[2]: found for path, found in hub.files[f"me/thing@recipe-{what}"].items() if "/" in path}


def test_another_machine_goes_on_with_a_training(online, smoke, tmp_path):
    """With as many texts at a time it ends the same, with fewer the same up to rounding."""
    whole, lost, fresh, smaller = (tmp_path / name for name in ("whole", "lost", "fresh", "smaller"))
    undisturbed = start("03_sft", whole, smoke, **VALUES)
    lose_machine(online, start("03_sft", lost, smoke, hub_repo="me/thing", **VALUES), uploads=2)
    sent = on_the_hub(online, "checkpoints")
    step = json.loads(sent["record.json"])["step"]
    assert step in (4, 6)  # the third upload holds a later one, whole and not arrived
    for branch in ("", "@recipe-checkpoints"):  # what a third machine finds
        online.files[f"me/copy{branch}"] = {**online.files[f"me/thing{branch}"]}
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    as_before = start("03_sft", fresh, smoke, hub_repo="me/thing", **VALUES)
    with_less = start("03_sft", smaller, smoke, hub_repo="me/copy", **VALUES, **batches)
    assert undisturbed.wait() == as_before.wait() == with_less.wait() == 0

    assert f"from {fresh}/checkpoints/checkpoint-{step}" in (fresh / "out.ipynb").read_text(encoding="utf-8")
    brought = fresh / f"checkpoints/checkpoint-{step}"
    assert {path.name: path.read_bytes() for path in brought.iterdir()} == sent
    assert losses(fresh) == losses(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (fresh / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
        assert online.files["me/thing"][name] == (whole / "adapter" / name).read_bytes()  # pushed at the end, to main

    printed = (smaller / "out.ipynb").read_text(encoding="utf-8")
    assert "1 texts at a time instead of 2: losses can differ by rounding" in printed
    assert losses(smaller)[:step] == losses(whole)[:step]
    assert losses(smaller) == pytest.approx(losses(whole), rel=5e-3)


def test_another_machine_answers_only_what_is_missing(online, smoke, tmp_path):
    lost, fresh = tmp_path / "lost", tmp_path / "fresh"
    lose_machine(online, start("04_rag_inference", lost, smoke, hub_repo="me/thing"), uploads=2)
    log = on_the_hub(online, "answers")["answers.jsonl"]
    finished = [json.loads(line) for line in log.splitlines()]
    assert 2 <= len(finished) < 10
    assert start("04_rag_inference", fresh, smoke, hub_repo="me/thing").wait() == 0
    assert (fresh / "answers.jsonl").read_bytes().startswith(log)
    texts = outputs(fresh)
    assert (
        list(texts) == list(range(10)) and {row["task_id"]: row["output"] for row in finished}.items() <= texts.items()
    )
    assert f"{len(finished)} tasks are already answered" in (fresh / "out.ipynb").read_text(encoding="utf-8")
    assert on_the_hub(online, "answers")["answers.jsonl"] == (fresh / "answers.jsonl").read_bytes()
