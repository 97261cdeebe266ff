"""compare.py: paired intervals, the verdict, and the runs that are refused."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import helpers
from compare import compare_runs, verdict
from helpers import RecipeError


def finished_run(folder, chrf, tasks=None, copies=(), **settings):
    """A run folder as notebook 04 and run.py leave it, with `chrf` of every task and a judge that missed task 0."""
    folder.mkdir(parents=True)
    tasks = tasks or [{"task_id": i, "input": f"課題{i}", "output": "答え"} for i in range(len(chrf))]
    rows = [{"task_id": task["task_id"], "input": task["input"], "output": str(folder)} for task in tasks]
    helpers.files.write_jsonl(folder / "output.jsonl", rows)
    scored = [
        {"task_id": task["task_id"], "chrf": float(value), "judge": 3 if i else None, "japanese": None}
        for i, (task, value) in enumerate(zip(tasks, chrf, strict=True))
    ]
    scores = {
        "near_duplicates": [{"task_id": task_id} for task_id in copies],
        "output_sha256": helpers.files.sha256(folder / "output.jsonl"),
        "tasks_sha256": helpers.digest([[task["task_id"], task["input"], task["output"]] for task in tasks]),
        "per_task": scored,
    }
    helpers.files.write_json(folder / "scores.json", scores)
    parts = {"code": "a" * 64, "helpers.py": "b" * 64, "output_dir": str(folder), **settings}
    helpers.files.write_json(folder / "run.json", {"04_rag_inference": {"parts": parts}})
    return folder


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(30, 10, 40)


def compare(tmp_path, *folders):
    return compare_runs(folders, tmp_path / "out")


def table(tmp_path):
    with open(tmp_path / "out/comparison.csv", encoding="utf-8") as file:
        return {(row["run"], row["measure"], row["subset"]): row for row in csv.DictReader(file)}


def test_a_small_steady_gain_is_told_from_noise_by_pairing(tmp_path, noise):
    """Tasks differ by 10 and runs by 1: the intervals of the means overlap, that of the difference does not hold 0."""
    a = finished_run(tmp_path / "a", noise, k=0)
    b = finished_run(tmp_path / "b", noise + np.random.default_rng(1).normal(1, 1, 40), k=3)
    text = compare(tmp_path, a, b)
    first, second = (table(tmp_path)[str(run), "chrf", "all"] for run in (a, b))
    assert float(first["high"]) > float(second["low"])
    assert float(second["difference_low"]) > 0
    assert second["verdict"] == "better"
    assert "| 04_rag_inference.k | 0 | 3 |" in text
    assert f"{b} against {a}: chrf is better by more than noise explains" in text
    assert text == (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_within_the_noise_is_called_so(tmp_path, noise):
    runs = [finished_run(tmp_path / "a", noise), finished_run(tmp_path / "b", noise[::-1])]
    text = compare(tmp_path, *runs)
    assert "nothing differs by more than noise explains; judge, chrf: within noise." in text
    assert "No setting differs." in text


def test_grades_are_paired_where_both_runs_have_one(tmp_path, noise):
    compare(tmp_path, finished_run(tmp_path / "a", noise), finished_run(tmp_path / "b", noise))
    row = table(tmp_path)[str(tmp_path / "b"), "judge", "all"]
    assert (row["tasks"], row["difference_tasks"]) == ("39", "39")


def test_everything_is_given_without_the_tasks_that_a_run_has_seen(tmp_path, noise):
    better = noise + 50 * (np.arange(40) < 3)
    runs = [finished_run(tmp_path / "a", noise), finished_run(tmp_path / "b", better, copies=[0, 1, 2])]
    compare(tmp_path, *runs)
    rows = table(tmp_path)
    assert float(rows[str(runs[1]), "chrf", "all"]["difference_mean"]) == pytest.approx(50 * 3 / 40)
    clean = rows[str(runs[1]), "chrf", "without near-duplicates"]
    assert (clean["tasks"], float(clean["difference_mean"])) == ("37", 0)


def judged(differences, direction=1):
    """The verdict on differences with their own interval."""
    interval = helpers.mean_interval(differences)
    return verdict(differences, direction, interval["low"], interval["high"])


def test_noise_is_rarely_called_a_difference_even_with_few_tasks():
    """20 tasks, most of them answered alike: a bootstrap interval alone is wrong in more than one of ten here."""
    random = np.random.default_rng(3)
    samples = np.where(random.random((150, 20)) < 0.65, 0, random.normal(size=(150, 20)))
    alarms = sum(judged(sample.tolist()) in ("better", "worse") for sample in samples)
    assert alarms <= 150 * 0.08


@pytest.mark.parametrize(
    ("differences", "direction", "expected"),
    [
        ([1.0] * 6, 1, "better"),
        ([1.0] * 6, -1, "worse"),
        ([-1.0] * 6, 0, "lower"),
        ([1.0] * 5, 1, "too few tasks to tell"),
        ([], 1, "too few tasks to tell"),
        ([0.0] * 20, 1, "within noise"),
        ([1.0, -1.0] * 10, 1, "within noise"),
    ],
)
def test_verdict(differences, direction, expected):
    assert judged(differences, direction) == expected


def test_interval_and_verdict_do_not_contradict_each_other():
    """With few tasks the interval leaves out zero more often than the test is sure: then neither is the verdict."""
    random, unclear = np.random.default_rng(5), 0
    for _ in range(200):
        differences = random.choice([0, 0, 0, 1, 4], 12) * random.choice([-1, 1, 1, 1], 12)
        low, high = (helpers.mean_interval(differences.tolist())[end] for end in ("low", "high"))
        said = judged(differences.tolist())
        assert (said in ("better", "worse")) <= (not low <= 0 <= high)
        assert (said == "within noise") <= (low <= 0 <= high)
        unclear += said == "unclear (interval and test disagree)"
    assert 0 < unclear < 100


def test_a_test_alone_makes_no_difference_clear():
    sure = [1.0] * 20
    assert verdict(sure, 1, 0.5, 1.5) == "better"
    assert (
        verdict(sure, 1, -0.1, 1.5) == verdict([1.0, -1.0] * 10, 1, 0.1, 0.5) == "unclear (interval and test disagree)"
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_interval_holds_the_mean_and_lies_within_the_values(values):
    found = helpers.mean_interval(values)
    margin = 1e-9 * max(map(abs, values))
    assert min(values) - margin <= found["low"] <= found["mean"] + margin
    assert found["mean"] - margin <= found["high"] <= max(values) + margin


def test_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(2).normal(size=400).tolist()
    found = helpers.mean_interval(values)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert found == helpers.mean_interval(values)


def test_runs_over_different_tasks_are_refused_with_the_reason(tmp_path, noise):
    tasks = [{"task_id": i, "input": f"課題{i}", "output": "答え"} for i in range(40)]
    a = finished_run(tmp_path / "a", noise, tasks)
    fewer = finished_run(tmp_path / "fewer", noise[:39], tasks[:39])
    with pytest.raises(RecipeError, match=r"different tasks: task_id \[39\] \(1\) are in one of them only"):
        compare(tmp_path, a, fewer)
    other = finished_run(tmp_path / "other", noise, [*tasks[:3], {**tasks[3], "input": "別の課題"}, *tasks[4:]])
    with pytest.raises(RecipeError, match=r"task_id \[3\] \(1\) have another question"):
        compare(tmp_path, a, other)
    reference = finished_run(tmp_path / "reference", noise, [{**tasks[0], "output": "別の答え"}, *tasks[1:]])
    with pytest.raises(RecipeError, match="the references or the order of the tasks differ"):
        compare(tmp_path, a, reference)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "scores.json").unlink(), "there is no scores.json"),
        (lambda run: (run / "output.jsonl").unlink(), "there is no output.jsonl"),
        (lambda run: (run / "run.json").write_text('{"03_sft": {"parts": {}}}'), "notebook 04 was interrupted"),
        (lambda run: (run / "output.jsonl").write_text('{"task_id": 0}\n'), "is that of another output.jsonl"),
    ],
)
def test_unfinished_runs_are_refused(tmp_path, noise, spoil, message):
    runs = [finished_run(tmp_path / name, noise) for name in "ab"]
    spoil(runs[1])
    with pytest.raises(RecipeError, match=f"{runs[1]}.*{message}.*run notebook 04"):
        compare(tmp_path, *runs)


@pytest.mark.parametrize("name", ["scores.json", "run.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff" + content,
        lambda content: b"[" + content + b"]",
        lambda content: b"[" * 100_000,
        lambda content: content.replace(b'"task_id"', b'"number"').replace(b'"parts"', b'"pieces"'),
        lambda content: content.replace(b'"per_task": [', b'"per_task": [3, ').replace(b'"parts"', b'"pieces"'),
    ],
    ids=["cut", "empty", "encoding", "list", "deep", "keys", "types"],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, noise, name, spoil):
    runs = [finished_run(tmp_path / run, noise) for run in "ab"]
    path = runs[1] / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(RecipeError, match=f"{path}: .* again") as caught:
        compare(tmp_path, *runs)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error:Glyph:UserWarning")
@pytest.mark.parametrize("name", ["二つ目|の実行", "two\nlines", r"$\frac{a$", "a_b^c $x$"])
def test_any_name_fits_into_table_and_picture(tmp_path, noise, name):
    runs = [finished_run(tmp_path / "a", noise, style="2024"), finished_run(tmp_path / name, noise, style="一\n二|三")]
    text = compare(tmp_path, *runs)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = [line.replace("\\|", "").count("|") for line in rows]
    assert columns == [4] * 3 + [7] * (2 + 4)
    assert r"| 04_rag_inference.style | 2024 | 一 二\|三 |" in rows
    assert table(tmp_path)[str(runs[1]), "chrf", "all"]["verdict"] == "within noise"


def test_a_run_named_twice_is_refused(tmp_path, noise):
    run = finished_run(tmp_path / "a", noise)
    with pytest.raises(RecipeError, match="each named once"):
        compare(tmp_path, run, f"{tmp_path}/./b/../a")


@pytest.mark.parametrize("out", ["file", "/proc/out"])
def test_an_out_that_cannot_be_written_is_one_line(tmp_path, noise, out):
    (tmp_path / "file").touch()
    runs = [str(finished_run(tmp_path / name, noise)) for name in "ab"]
    command = [sys.executable, str(ROOT / "compare.py"), *runs, "--out", out]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert out in refused.stderr


def test_a_run_without_run_json_is_compared_with_unknown_settings(tmp_path, noise):
    runs = [finished_run(tmp_path / "a", noise, k=0), finished_run(tmp_path / "b", noise)]
    (runs[1] / "run.json").unlink()
    assert "| 04_rag_inference | run | - |" in compare(tmp_path, *runs)


def test_command_line(tmp_path, noise):
    """Two finished runs are compared; one alone is refused in one line."""
    runs = [str(finished_run(tmp_path / name, noise)) for name in "ab"]
    command = [sys.executable, "compare.py", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *runs], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "within noise" in done.stdout
    refused = subprocess.run([*command, runs[0]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
