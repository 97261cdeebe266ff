"""What travels over the hub: whole or not at all, in a private repository, and nothing there can harm."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import ROOT
from test_checkpoints import checkpoint, training
from test_trust import TOKEN, hostile  # noqa: F401, a fixture
from transformers import Trainer

import helpers
from helpers import RecipeError

FILES = {"record.json": b"{}", "adapter_model.safetensors": b"weights" * 1000, "optimizer.pt": b"optimizer"}


@pytest.fixture
def hub(hostile, monkeypatch):  # noqa: F811
    """The stand-in of the hub, and this process as one that may ask it."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hostile.address)
    online = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in {"ENDPOINT": hostile.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, **online}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(helpers.travel, "PAUSE", 0)
    return hostile


def courier(run="run", what="checkpoints"):
    return helpers.travel.Courier("me/thing", TOKEN, what, run)


def send(carrier, files):
    carrier.send(files)
    carrier.wait()


def on_the_hub(hub):
    return {path: content for path, content in hub.files["me/thing@recipe-checkpoints"].items() if "/" in path}


def test_the_newest_files_travel_and_main_is_not_touched(hub, tmp_path):
    assert courier().open() == []
    assert hub.created[0]["visibility"] == "private"
    hub.files["me/thing"]["README.md"] = b"---\n{}\n---\nmine"
    send(courier(), FILES | {"scheduler.pt": b"scheduler"})
    send(courier("another run"), {"record.json": b"another"})
    send(courier(), FILES | {"optimizer.pt": b"newer"})  # there is no scheduler.pt any more
    carrier = courier()
    names = carrier.open()
    assert sorted(names) == sorted(FILES)
    carrier.bring(names, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES | {"optimizer.pt": b"newer"}
    assert courier("another run").open() == ["record.json"]
    assert hub.files["me/thing"] == {".gitattributes": b"", "README.md": b"---\n{}\n---\nmine"}
    assert hub.squashed == ["/api/models/me/thing/super-squash/recipe-checkpoints"] * 3


def test_of_several_that_wait_only_the_newest_are_sent(hub):
    carrier, begun, go = courier(), threading.Event(), threading.Event()
    carrier.open()
    hub.lost = lambda path: begun.set() or not go.wait(60)
    carrier.send({"record.json": b"0"})
    assert begun.wait(60)
    for number in range(1, 5):
        carrier.send({"record.json": str(number).encode()})
    go.set()
    carrier.wait()
    assert on_the_hub(hub) == {"checkpoints/run/record.json": b"4"}
    assert len(hub.commits) == 2


def test_an_upload_that_hangs_holds_up_none_and_replaces_none(hub, monkeypatch):
    monkeypatch.setattr(helpers.travel, "PATIENCE", 0)
    carrier, hangs, go = courier(), threading.Event(), threading.Event()
    carrier.open()
    hub.lost = lambda path: "/commit/" in path and not hangs.is_set() and (hangs.set() or not go.wait(60))
    carrier.send({"record.json": b"older"})
    hanging = carrier.thread
    assert hangs.wait(60)
    carrier.send({"record.json": b"newer"})
    carrier.thread.join()
    go.set()
    hanging.join()
    assert on_the_hub(hub) == {"checkpoints/run/record.json": b"newer"}


LOST = """
import sys
import helpers
carrier = helpers.travel.Courier("me/thing", "hf_x", "checkpoints", "run")
print(carrier.open(), flush=True)
carrier.send({"record.json": b"newer", "adapter_model.safetensors": b"newer weights"})
carrier.wait()
"""


@pytest.mark.parametrize("where", ["/preupload/", "/objects/batch", "/store/", "/commit/"])
def test_a_machine_lost_in_an_upload_leaves_the_files_of_before(hub, where):
    """It is killed in the middle of this request, whose answer never comes."""
    courier().open()
    send(courier(), FILES)
    before = on_the_hub(hub)
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-c", LOST], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    hub.lost = lambda path: where in path and not process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    hub.lost = lambda path: False
    assert on_the_hub(hub) == before
    send(courier(), FILES | {"optimizer.pt": b"newer"})  # and the next machine goes on
    assert on_the_hub(hub)["checkpoints/run/optimizer.pt"] == b"newer"


def fail_with(status):
    def fail(hub):
        hub.broken = {"/commit/": status}  # the answer repeats the token

    return fail


def no_network(hub):
    hub.lost = lambda path: True


def public(hub):
    hub.private = False


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (fail_with(403), "HTTP 403): check that the secret HF_TOKEN may do this, .* and that your storage is not full"),
        (fail_with(401), "HTTP 401): check the secret HF_TOKEN"),
        (fail_with(500), "HTTP 500"),
        (no_network, r"check the network"),
        (public, "me/thing exists and is public: make it private"),
    ],
)
def test_an_upload_that_fails_is_one_line_and_the_next_one_goes_through(hub, capfd, fault, said):
    carrier, well = courier(), hub.lost
    carrier.open()
    send(carrier, FILES)
    before = on_the_hub(hub)
    fault(hub)
    send(carrier, {"record.json": b"newer"})
    first, last = "".join(capfd.readouterr()).splitlines()
    for line in (first, last):
        assert TOKEN not in line and helpers.re.search(said.replace(")", r"\)"), line)
    assert first.endswith("; the run goes on, and they are sent again with the next ones or at its end")
    assert last.endswith(
        "the newest checkpoints are on this machine only: another one would go on from older ones, or begin anew"
    )
    assert on_the_hub(hub) == before
    hub.broken, hub.private, hub.lost = {}, True, well
    send(carrier, {"record.json": b"newest"})
    assert on_the_hub(hub) == {"checkpoints/run/record.json": b"newest"}


@pytest.mark.parametrize("fault", [fail_with(401), fail_with(500), no_network, public])
def test_the_last_upload_is_tried_again_at_the_end(hub, capfd, monkeypatch, fault):
    carrier, well = courier(), hub.lost
    carrier.open()
    fault(hub)

    def mend(_):
        hub.broken, hub.private, hub.lost = {}, True, well

    monkeypatch.setattr(helpers.travel.time, "sleep", mend)
    send(carrier, {"record.json": b"last"})
    assert on_the_hub(hub) == {"checkpoints/run/record.json": b"last"}
    assert "".join(capfd.readouterr()).count("\n") == 1
    monkeypatch.setattr(helpers.travel.time, "sleep", lambda _: pytest.fail("it has arrived"))
    carrier.wait()
    assert len(hub.commits) == 1


@pytest.mark.parametrize("fault", [fail_with(403), no_network, public])
def test_what_is_wrong_with_the_repository_is_said_before_the_training(hub, fault):
    """A hub that cannot be reached may hold a newer checkpoint than this machine."""
    courier().open()
    hub.broken = {"/api/": 403} if fault not in (no_network, public) else {}
    if fault in (no_network, public):
        fault(hub)
    with pytest.raises(RecipeError) as error:
        courier().open()
    assert "\n" not in str(error.value) and TOKEN not in str(error.value) and "me/thing" in str(error.value)


# ---- checkpoints: as whole as local ones


@pytest.fixture
def sent(hub, tmp_path):
    """A checkpoint of step 300 on the hub, and where it lay."""
    path = checkpoint(tmp_path / "lost/checkpoints", 300, training(r=8))
    record = helpers.records.read(path) | {"step": 300, "last_step": False}
    helpers.records.write(path, record)
    carrier = helpers.checkpoints.courier("me/thing", TOKEN, training(r=8))
    carrier.open()
    send(carrier, {file.name: file for file in path.iterdir()})
    return path


def find(folder, **settings):
    record = training(**settings)
    carrier = helpers.checkpoints.courier("me/thing", TOKEN, record)
    return helpers.checkpoints.find(folder / "checkpoints", record, folder / "adapter", carrier)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_fresh_machine_finds_the_checkpoint_of_the_lost_one(sent, tmp_path):
    found = find(tmp_path / "fresh", r=8)
    assert found == tmp_path / "fresh/checkpoints/checkpoint-300"
    assert contents(found) == contents(sent)
    assert sorted(path.name for path in found.parent.iterdir()) == ["checkpoint-300", "record.json"]
    assert find(tmp_path / "fresh", r=8) == found  # and again, where it is now a local one


def test_without_a_repository_nothing_is_asked():
    assert helpers.checkpoints.courier("", "", training(r=8)) is None


def test_a_newer_checkpoint_of_this_machine_is_not_replaced_and_an_older_one_is(sent, tmp_path):
    older = checkpoint(tmp_path / "old/checkpoints", 100, training(r=8))
    assert find(tmp_path / "old", r=8) == older.with_name("checkpoint-300")
    newer = checkpoint(tmp_path / "new/checkpoints", 500, training(r=8))
    assert find(tmp_path / "new", r=8) == newer
    assert not newer.with_name("checkpoint-300").exists()
    half = checkpoint(tmp_path / "half/checkpoints", 300, training(r=8))
    (half / "optimizer.pt").unlink()
    assert contents(find(tmp_path / "half", r=8)) == contents(sent)


def test_another_training_neither_takes_nor_replaces_it(sent, hub, tmp_path, capsys):
    before = on_the_hub(hub)
    assert find(tmp_path / "other", r=16) is None
    assert "me/thing holds checkpoints of other runs only" in capsys.readouterr().out
    send(helpers.checkpoints.courier("me/thing", TOKEN, training(r=16)), {"record.json": b"{}"})
    assert before.items() <= on_the_hub(hub).items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer.pt": b"cut"}, "optimizer.pt was changed"),
        ({"optimizer.pt": None}, "optimizer.pt is missing"),
        ({"record.json": b'{"inp'}, "its record cannot be read"),
        ({"record.json": b"{}"}, "its record cannot be read"),
        ({"more.pt": b"more"}, "more.pt was added"),
    ],
)
def test_a_damaged_checkpoint_on_the_hub_is_left_out(sent, hub, tmp_path, capsys, change, said):
    branch = hub.files["me/thing@recipe-checkpoints"]
    (place,) = {path.rpartition("/")[0] for path in branch if "/" in path}
    branch |= {f"{place}/{name}": content for name, content in change.items()}
    hub.files["me/thing@recipe-checkpoints"] = {path: found for path, found in branch.items() if found is not None}
    assert find(tmp_path / "fresh", r=8) is None
    printed = capsys.readouterr().out
    assert printed.startswith("the checkpoint in me/thing is left out: ") and said in printed
    assert sorted(path.name for path in (tmp_path / "fresh/checkpoints").iterdir()) == ["record.json"]
    local = checkpoint(tmp_path / "fresh/checkpoints", 100, training(r=8))
    assert find(tmp_path / "fresh", r=8) == local


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickles_of_the_hub_are_not_run_and_other_places_not_written(sent, hub, tmp_path):
    """Someone may write into the repository: a checkpoint with a record that fits, and a file beside its folder."""
    branch, mark = hub.files["me/thing@recipe-checkpoints"], tmp_path / "ran"
    (place,) = {path.rpartition("/")[0] for path in branch if "/" in path}
    evil = pickle.dumps(Payload(mark))
    record = json.loads(branch[f"{place}/record.json"])
    record["files"] |= {"rng_state.pth": helpers.hashlib.sha256(evil).hexdigest()}
    branch |= {f"{place}/rng_state.pth": evil, f"{place}/record.json": json.dumps(record).encode()}
    branch |= {f"{place}/../../../escaped": b"x", f"{place}/sub/file": b"x", f"{place}/pytorch_model.bin": evil}
    found = find(tmp_path / "fresh", r=8)
    assert sorted(contents(found)) == sorted([*contents(sent), "rng_state.pth"])
    assert not list(tmp_path.rglob("escaped"))
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=1))
    with pytest.raises(pickle.UnpicklingError):
        Trainer._load_rng_state(trainer, str(found))
    assert not mark.exists()


# ---- answers


def run(**settings):
    base = {"name": "base", "commit": "", "sha256": "1", "inputs": {}}
    return helpers.records.make("04_rag_inference", {"model": base}, settings, []) | {"parallel": 4}


def log(folder, record, task_ids):
    """Answers in a folder, as a run with this record leaves them in the middle; where its answers will be."""
    values = {"new_tokens": 1, "cut": False, "limit": 9, "seconds": 1.0, "attempt": 1}
    for task_id in task_ids:
        row = {"task_id": task_id, "key": helpers.answers.key(record, [task_id]), "output": f"{task_id}", **values}
        helpers.files.append_row(folder / "answers.jsonl", row)
    helpers.answers.begin(folder / "output.jsonl", record)
    return folder / "output.jsonl"


def answered(output_file):
    return [
        row["task_id"]
        for path in helpers.answers.find_logs(output_file.parent)
        for row in helpers.answers.read_log(path)
    ]


@pytest.fixture
def carrier(hub, tmp_path):
    """What carries the answers of a run, three of which a lost machine has sent."""
    found = helpers.answers.courier("me/thing", TOKEN, run(k=3))
    found.open()
    lost = log(tmp_path / "lost", run(k=3), [1, 2, 3])
    (tmp_path / "lost/answers.1.jsonl").write_bytes(b'{"task_id": 9, "ke')  # of another process, which is writing
    helpers.answers.send(found, lost)
    found.wait()
    return found


def test_answers_of_a_lost_machine_are_added_once(carrier, tmp_path, capsys):
    fresh = tmp_path / "fresh/output.jsonl"
    fresh.parent.mkdir()
    for _ in range(2):
        helpers.answers.bring(carrier, fresh, run(k=3))
        assert answered(fresh) == [1, 2, 3]
    assert helpers.answers.parallel_before(fresh) == 4
    older = log(tmp_path / "older", run(k=3), [2])
    helpers.answers.bring(carrier, older, run(k=3))
    assert answered(older) == [2, 1, 3]
    assert not list(tmp_path.glob("*/.brought")) and "left out" not in capsys.readouterr().out


def test_answers_of_another_run_are_not_mixed(carrier, tmp_path):
    """Those of an unfinished one stay alone, and another run finds none on the hub."""
    other = log(tmp_path / "other", run(k=5), [1])
    helpers.answers.bring(carrier, other, run(k=3))
    assert answered(other) == [1]
    helpers.answers.bring(helpers.answers.courier("me/thing", TOKEN, run(k=5)), other, run(k=5))
    assert answered(other) == [1]
    helpers.answers.bring(None, other, run(k=5))
    assert helpers.answers.courier("", "", run(k=5)) is None
