"""Checkpoints: which one a training goes on from, and which are left out or refused."""

import pytest

import helpers
from helpers import RecipeError


def training(**settings):
    base = {"name": "base", "commit": "", "sha256": settings.pop("base", "1"), "inputs": {}}
    return helpers.records.make("03_sft", {"model": base}, settings, [])


def checkpoint(folder, step, record):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors"):
        (path / name).write_text(f"{name} {step}")
    helpers.records.write(path, record | {"measured": {"seconds": 1.0}})
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def adapter(tmp_path):
    return tmp_path / "adapter"


def test_resume_takes_the_newest_checkpoint_of_the_same_training(folder, adapter):
    record = training(r=8, modules=("q", "k"))
    assert helpers.checkpoints.find(folder, record, adapter) is None
    checkpoint(folder, 300, record)
    newest = checkpoint(folder, 1200, record)
    for foreign in ("checkpoint-old", "checkpoint-1500x", "notes"):
        (folder / foreign).mkdir()
    assert helpers.checkpoints.find(folder, record, adapter) == newest


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "record.json").unlink(), "it was not written to its end"),
        (lambda path: (path / "record.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "optimizer.pt").write_text("optimizer"), "optimizer.pt was changed"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, adapter, capsys, damage, said):
    record = training(r=8)
    helpers.checkpoints.find(folder, record, adapter)
    whole, damaged = checkpoint(folder, 300, record), checkpoint(folder, 1200, record)
    damage(damaged)
    assert helpers.checkpoints.find(folder, record, adapter) == whole
    printed = capsys.readouterr().out
    assert printed.startswith(f"{damaged} is left out: ") and said in printed and printed.count("\n") == 1


def test_resume_refuses_checkpoints_of_other_settings_or_another_base(folder, adapter):
    helpers.checkpoints.find(folder, training(r=8, seed=1), adapter)
    kept = checkpoint(folder, 300, training(r=8, seed=1))
    for other, named in ((training(r=16, seed=1), "r"), (training(r=8, seed=1, base="2"), "model")):
        with pytest.raises(RecipeError, match=rf"other values of {named}:"):
            helpers.checkpoints.find(folder, other, adapter)
    assert helpers.checkpoints.find(folder, training(r=8, seed=1), adapter) == kept
    (folder / "record.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"other values of r:"):  # every checkpoint repeats the record
        helpers.checkpoints.find(folder, training(r=16, seed=1), adapter)
    (folder / "record.json").unlink()
    assert helpers.checkpoints.find(folder, training(r=8, seed=1), adapter) == kept
    (folder / "record.json").unlink()
    (kept / "record.json").unlink()
    with pytest.raises(RecipeError, match="other values of what it was started with"):
        helpers.checkpoints.find(folder, training(r=8, seed=1), adapter)


def finish(adapter, record):
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")
    helpers.records.write(adapter, record)


def test_a_finished_training_is_not_repeated(folder, adapter):
    record = training(r=8)
    helpers.checkpoints.find(folder, record, adapter)
    last = checkpoint(folder, 300, record)
    finish(adapter, record)
    assert helpers.checkpoints.find(folder, record, adapter) == last
    assert helpers.records.check(adapter, finished=True)


def test_another_training_after_a_finished_one_starts_anew(folder, adapter):
    helpers.checkpoints.find(folder, training(r=8), adapter)
    checkpoint(folder, 300, training(r=8))
    finish(adapter, training(r=8))
    assert helpers.checkpoints.find(folder, training(r=16), adapter) is None
    assert not helpers.records.read(adapter), "the old adapter still counts as finished"
    assert not list(folder.glob("checkpoint-*"))


def test_a_checkpoint_of_another_training_is_left_out(folder, adapter, capsys):
    own, other = checkpoint(folder, 5, training(r=8)), checkpoint(folder, 10, training(r=8, base="2"))
    helpers.files.write_json(folder / "record.json", training(r=8))
    assert helpers.checkpoints.find(folder, training(r=8), adapter) == own
    assert f"{other} is left out: it is of another training" in capsys.readouterr().out


def test_an_old_adapter_is_not_finished_once_another_training_has_begun(folder, adapter):
    finish(adapter, training(r=8))
    assert helpers.checkpoints.find(folder, training(r=8), adapter) is None  # the checkpoints were deleted
    assert helpers.records.check(adapter, finished=True)
    assert helpers.checkpoints.find(folder, training(r=16), adapter) is None
    with pytest.raises(RecipeError, match="has no record"):
        helpers.records.check(adapter, finished=True)
