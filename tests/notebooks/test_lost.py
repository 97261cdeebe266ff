"""Machines that are lost, with all their files: another one goes on with what a private hub repository holds."""

import json
import os
import signal
import threading

import pytest
from test_hub import Hub, serve
from test_resume import code, forks, losses, outputs, prepare

VALUES = {"max_steps": 9, "save_steps": 2, "neftune_noise_alpha": 0, "eval_share": 0}


@pytest.fixture(scope="module")
def hub():
    """The stand-in of the hub. Libraries read its address when they are imported, so it is one for all tests."""
    server = serve(Hub)
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs cells in a forked process with the stand-in of the hub; see `forks`."""
    online = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x"}
    with forks(HF_HOME=str(tmp_path_factory.mktemp("cache")), **online) as run:
        yield run


def lose_machine(hub, uploads, run, cells, folder):
    """Kill a notebook in the middle of an upload, after so many whole ones: the commit is asked for and not made."""
    reached, lost, before = threading.Event(), threading.Event(), len(hub.commits)

    def kill(pid):
        while not reached.wait(0.02):
            os.kill(pid, 0)  # an error if it has ended before it could be killed
        os.kill(pid, signal.SIGKILL)

    def is_lost(path):
        return "/commit/" in path and len(hub.commits) - before == uploads and (reached.set() or lost.wait())

    hub.lost = is_lost
    run(cells, folder, meanwhile=kill)
    lost.set()
    hub.lost = lambda path: False


def on_the_hub(hub, repository, what):
    """The files of the one run on the branch, by name."""
    files = hub.files[f"{repository}@recipe-{what}"]
    return {path.split("/")[2]: found for path, found in files.items() if "/" in path}


def test_another_machine_goes_on_with_a_training(hub, run, smoke, tmp_path):
    """With as many texts at a time it ends the same, with fewer the same up to rounding."""
    whole, lost, fresh, smaller = (tmp_path / name for name in ("whole", "lost", "fresh", "smaller"))

    def cells(folder, **values):
        return code(prepare("03_sft", folder, smoke, **VALUES, **values))

    run(cells(whole), whole)
    lose_machine(hub, 2, run, cells(lost, hub_repo="me/thing"), lost)
    sent = on_the_hub(hub, "me/thing", "checkpoints")
    step = json.loads(sent["record.json"])["step"]
    assert step in (4, 6)  # the third upload holds a later one, whole and not arrived
    for branch in ("", "@recipe-checkpoints"):  # what a third machine finds
        hub.files[f"me/copy{branch}"] = {**hub.files[f"me/thing{branch}"]}
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    as_before, _ = run(cells(fresh, hub_repo="me/thing"), fresh)
    with_less, _ = run(cells(smaller, hub_repo="me/copy", **batches), smaller)

    assert f"from {fresh}/checkpoints/checkpoint-{step}" in as_before
    brought = fresh / f"checkpoints/checkpoint-{step}"
    assert {path.name: path.read_bytes() for path in brought.iterdir()} == sent
    assert losses(fresh) == losses(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (fresh / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
        assert hub.files["me/thing"][name] == (whole / "adapter" / name).read_bytes()  # pushed at the end, to main

    assert "1 texts at a time instead of 2: losses can differ by rounding" in with_less
    assert losses(smaller)[:step] == losses(whole)[:step]
    assert losses(smaller) == pytest.approx(losses(whole), rel=5e-3)


def test_another_machine_answers_only_what_is_missing(hub, run, smoke, tmp_path):
    lost, fresh = tmp_path / "lost", tmp_path / "fresh"

    def cells(folder):
        return code(prepare("04_rag_inference", folder, smoke, hub_repo="me/answers"))

    lose_machine(hub, 2, run, cells(lost), lost)
    log = on_the_hub(hub, "me/answers", "answers")["answers.jsonl"]
    finished = [json.loads(line) for line in log.splitlines()]
    assert 2 <= len(finished) < 10
    printed, _ = run(cells(fresh), fresh)
    assert (fresh / "answers.jsonl").read_bytes().startswith(log)
    texts = outputs(fresh)
    assert (
        list(texts) == list(range(10)) and {row["task_id"]: row["output"] for row in finished}.items() <= texts.items()
    )
    assert f"{len(finished)} tasks are already answered" in printed
    assert on_the_hub(hub, "me/answers", "answers")["answers.jsonl"] == (fresh / "answers.jsonl").read_bytes()
