"""What a change in one room makes run.py run again, in a copy of the repository with a finished smoke run."""

import json
import shutil
import subprocess

import pytest
import test_run
from conftest import ROOT
from test_run import stop_forks  # noqa: F401, a fixture

SMOKE = "data/runs/smoke.yaml"


@pytest.fixture(scope="module")
def copy(smoke, tmp_path_factory):
    """A copy of all files under version control, with the outputs of the smoke run."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(smoke, folder / "outputs/smoke")
    return folder


def run(copy, *arguments):
    done = test_run.run(copy, SMOKE, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan(copy):
    """Why each notebook would run, "" for one that would not."""
    lines = [line.partition(": ") for line in run(copy, "--dry-run").splitlines() if line[:1] == "0"]
    return {name: "" if said == "finished, skipped" else said for name, _, said in lines}


def printed(copy):
    cells = json.loads((copy / "outputs/smoke/notebooks/04_rag_inference.ipynb").read_text(encoding="utf-8"))["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", ()))


FINISHED = {"01_quantize": "", "02_filter_magpie": "", "03_sft": "", "04_rag_inference": ""}


@pytest.mark.parametrize(
    ("room", "said"),
    [
        ("judge", "10 tasks are already answered, 0 to go"),
        ("slots", "0 tasks are already answered, 10 to go"),
    ],
)
def test_a_comment_in_a_room_of_notebook_4_runs_it_alone(copy, room, said):
    """The judge has no part in the answers, so they are kept; a slot decoder that has changed answers again."""
    assert plan(copy) == FINISHED
    output = copy / "outputs/smoke/output.jsonl"
    before = output.read_bytes()
    with (copy / f"engine/{room}.py").open("a", encoding="utf-8") as file:
        file.write("# A comment.\n")
    assert plan(copy) == FINISHED | {"04_rag_inference": f"run, changed: engine/{room}.py"}
    assert output.read_bytes() == before  # a dry run touches nothing
    run(copy)
    assert said in printed(copy)
    assert output.read_bytes() == before
    assert plan(copy) == FINISHED


def test_a_comment_in_a_room_of_the_training_trains_again(copy):
    with (copy / "engine/checkpoints.py").open("a", encoding="utf-8") as file:
        file.write("# A comment.\n")
    planned = plan(copy)
    assert planned["01_quantize"] == planned["02_filter_magpie"] == ""
    assert planned["03_sft"] == "run, changed: engine/checkpoints.py"
