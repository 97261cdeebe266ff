"""run.py on four small notebooks of its own, in a copy of the layout: real papermill, real kernels."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from engine import machine

NAMES = ["01_quantize", "02_filter_magpie", "03_sft", "04_rag_inference"]
SMOKE = "output_dir: outputs/a\n03_sft:\n  r: 8\n"
OWN = [".", "outputs/..", "..", "/", "notebooks", "data/runs", "./tests/a", ".git", ".venv/x", "outputs/../Data"]
# Every notebook appends its name and its parameters to a log, so that order and values can be read back.
STEP = """
import json, os, sys
os.makedirs(output_dir, exist_ok=True)
with open("log.jsonl", "a") as file:
    names = ("r", "learning_rate", "prompt_style", "ban_words", "allow_licences", "output_dir")
    row = {"name": NAME, "exe": sys.executable} | {name: globals().get(name) for name in names}
    print(json.dumps(row), file=file)
"""
KERNEL = {"name": "python3", "language": "python", "display_name": "Python 3"}
PARAMETERS = {
    "03_sft": "r = 64  # rank = 64 in 2024\nlearning_rate = 1e-4\nallow_licences = 'x'\nrules = 'rules.json'",
    "04_rag_inference": "seed = 1\nprompt_style = '2024'\nban_words = True",
}


def write_notebook(folder: Path, name: str, step: str = STEP) -> None:
    parameters = 'output_dir = "outputs/full"\n' + PARAMETERS.get(name, "seed = 1")
    cells = [
        new_markdown_cell(f"# {name}", id="title"),
        new_code_cell(parameters, id="params", metadata={"tags": ["parameters"]}),
        new_code_cell(f"NAME = {name!r}\n" + step.strip(), id="step"),
    ]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the layout in which all four notebooks have run once."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "notebooks").mkdir()
    for name in NAMES:
        write_notebook(folder, name)
    for file in ("run.py", "run_file.py", "helpers.py"):
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "engine", folder / "engine")
    (folder / "rules.json").write_text("{}")
    (folder / "smoke.yaml").write_text(SMOKE)
    reports = folder / "outputs/a"
    reports.mkdir(parents=True)
    (reports / "filter_report.json").write_text('{"rows_in": 9, "rows_kept": 7, "reasons": {"language": 2}}')
    (reports / "sft_metrics.json").write_text('{"first_loss": 5.5, "last_loss": 4.25}')
    result = run(folder, "smoke.yaml")
    assert result.returncode == 0, result.stderr
    (folder / "first_output.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


# Imports once what takes long, and then runs each folder's own run.py in a process forked from it.
FORKS = """
import json, os, runpy, sys
import huggingface_hub, nbformat, papermill, yaml

for line in sys.stdin:
    folder, arguments, environment, said = json.loads(line)
    if (child := os.fork()) == 0:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0], sys.argv = folder, ["run.py", *arguments]
        for stream, path in said.items():
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), int(stream))
        sys.stdin.close()
        runpy.run_path("run.py", run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def forks() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FORKS], **pipes)


@pytest.fixture(scope="module", autouse=True)
def stop_forks():
    yield
    forks().communicate()
    forks.cache_clear()


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python run.py ...` in this folder."""
    said = {1: folder / "stdout.txt", 2: folder / "stderr.txt"}
    order = [str(folder), arguments, dict(os.environ), {stream: str(path) for stream, path in said.items()}]
    print(json.dumps(order), file=forks().stdin, flush=True)
    code = int(forks().stdout.readline())
    return subprocess.CompletedProcess(arguments, code, *(path.read_text(encoding="utf-8") for path in said.values()))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def ran(folder: Path, *arguments: str) -> list[str]:
    """The notebooks that one successful command runs."""
    before = len(log(folder))
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return [row["name"] for row in log(folder)[before:]]


def test_all_four_run_in_order_with_the_run_files_values_and_this_interpreter(finished: Path) -> None:
    rows = log(finished)
    assert [row["name"] for row in rows] == NAMES
    assert rows[2]["r"] == 8 and rows[2]["learning_rate"] == 1e-4
    assert {os.path.realpath(row["exe"]) for row in rows} == {os.path.realpath(sys.executable)}
    assert sorted(path.stem for path in (finished / "outputs/a/notebooks").iterdir()) == NAMES


def test_the_table_shows_the_reports_that_exist(finished: Path) -> None:
    lines = [line.split() for line in (finished / "first_output.txt").read_text().splitlines()]
    assert ["rows", "kept", "7", "of", "9"] in lines
    assert ["rows", "dropped,", "language", "2"] in lines
    assert ["loss,", "first", "and", "last", "5.500", "4.250"] in lines
    assert not any("answered" in line for line in lines)
    assert sum(line[:1] == ["seconds,"] for line in lines) == 4


def test_finished_notebooks_are_skipped_unless_forced(folder: Path) -> None:
    assert ran(folder, "smoke.yaml") == []
    assert ran(folder, "smoke.yaml", "--force", "--only", "02") == ["02_filter_magpie"]


def test_a_changed_parameter_reruns_its_notebook_and_those_after_it(folder: Path) -> None:
    assert ran(folder, "smoke.yaml", "--set", "r=16") == NAMES[2:]
    assert log(folder)[-2]["r"] == 16


def test_changed_helpers_and_a_changed_named_file_rerun(folder: Path) -> None:
    plan = run(folder, "smoke.yaml", "--dry-run").stdout
    assert plan.count("finished, skipped") == 4
    (folder / "rules.json").write_text('{"ng": []}')
    assert "03_sft: run, changed: contents of rules.json" in run(folder, "smoke.yaml", "--dry-run").stdout
    with (folder / "helpers.py").open("a") as file:
        file.write("\n# changed\n")
    assert "01_quantize: run, changed: helpers.py" in run(folder, "smoke.yaml", "--dry-run").stdout


def test_changed_code_reruns_what_follows_but_changed_prose_does_not(folder: Path) -> None:
    path = folder / "notebooks/02_filter_magpie.ipynb"
    path.write_text(path.read_text().replace("# 02_filter_magpie", "# The filter"))
    assert "run," not in run(folder, "smoke.yaml", "--dry-run").stdout
    path.write_text(path.read_text().replace("seed = 1", "seed = 2"))
    assert ran(folder, "smoke.yaml") == NAMES[1:]


def test_only_does_not_hide_that_an_earlier_notebook_ran_anew(folder: Path) -> None:
    """03 alone, on the old 02; when 02 then runs with other values, 03 must run again."""
    assert ran(folder, "smoke.yaml", "--set", "02_filter_magpie.seed=7", "--only", "03") == []
    assert ran(folder, "smoke.yaml", "--set", "02_filter_magpie.seed=7", "--only", "02") == ["02_filter_magpie"]
    assert ran(folder, "smoke.yaml", "--set", "02_filter_magpie.seed=7", "--from", "03") == NAMES[2:]


WRITE = (
    STEP
    + """
import helpers
from pathlib import Path
product = Path(output_dir) / "adapter"
product.mkdir(exist_ok=True)
(product / "weights").write_text("made by " + NAME)
(product / "config").write_text("{}")
Path(output_dir, "report.json").write_text("1")
helpers.records.write(product, helpers.records.make(NAME, {}, {}, []))
"""
)


@pytest.fixture(scope="module")
def writing(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout in which notebook 03 has written a folder and a file, and all are finished."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("writing") / "copy")
    write_notebook(folder, "03_sft", WRITE)
    assert run(folder, "smoke.yaml").returncode == 0
    assert set(run(folder, "smoke.yaml").stdout.split("\n")[:4]) == {f"{name}: finished, skipped" for name in NAMES}
    return folder


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda adapter: (adapter / "weights").write_text("other"), "run, adapter: weights was changed"),
        (lambda adapter: (adapter / "config").unlink(), "run, adapter: config is missing"),
        (shutil.rmtree, "run, adapter: config is missing"),
        (lambda adapter: (adapter / "record.json").unlink(), "run, adapter: its record is missing"),
        (lambda adapter: (adapter / "record.json").write_text("[]"), "run, adapter: its record is missing"),
        (lambda adapter: (adapter.parent / "report.json").unlink(), "run, report.json is missing"),
        (lambda adapter: (adapter.parent / "report.json").write_text("9"), "run, report.json was changed"),
    ],
)
def test_a_product_that_was_changed_or_deleted_is_made_again(writing: Path, tmp_path: Path, change, why: str) -> None:
    folder = shutil.copytree(writing, tmp_path / "copy")
    change(folder / "outputs/a/adapter")
    again = run(folder, "smoke.yaml").stdout
    assert f"03_sft: {why}" in again
    assert "04_rag_inference: finished, skipped" in again  # what 03 wrote is what 04 has read


def test_dry_run_prints_the_differing_values_and_runs_nothing(folder: Path) -> None:
    before = (folder / "outputs/a/run.json").read_text()
    result = run(folder, "smoke.yaml", "--set", "learning_rate=2e-4", "--dry-run")
    assert "03_sft: run, changed: learning_rate\n" in result.stdout
    assert "    r=8\n    learning_rate=0.0002\n" in result.stdout
    assert (folder / "outputs/a/run.json").read_text() == before and len(log(folder)) == 4


@pytest.mark.parametrize(
    ("run_file", "arguments", "message"),
    [
        ("output_dir: outputs/a\n03_sft: {rr: 8}\n", [], "'03_sft.rr'; did you mean 03_sft.r"),
        ("output_dir: outputs/a\n03_stf: {r: 8}\n", [], "'03_stf.r'; did you mean 03_sft.r"),
        (SMOKE, ["--set", "lora=8"], "unknown 'lora'; the first code cell of each notebook has them all"),
        (SMOKE, ["--set", "r=many"], "03_sft.r must be a whole number from 1 to 4,096; it is 'many'"),
        ("03_sft: {r: 8}\n", [], "output_dir"),
        ("output_dir: [\n", [], "smoke.yaml"),
        (SMOKE, ["other.yaml"], "the same output_dir"),
        (SMOKE, ["missing.yaml"], "missing.yaml: there is no such file"),
        ("", [], "smoke.yaml: a run file holds `output_dir: NAME`"),
        ("- output_dir\n", [], "smoke.yaml: a run file holds `output_dir: NAME`"),
        ("outputs/a\n", [], "smoke.yaml: a run file holds `output_dir: NAME`"),
        ("output_dir: outputs/a\n03_sft: 8\n", [], "smoke.yaml: 03_sft must be a section"),
        ("output_dir: outputs/a\n03_sft: [r]\n", [], "smoke.yaml: 03_sft must be a section"),
        ("# 日本語\noutput_dir: outputs/a\n".encode("cp932"), [], "smoke.yaml: cannot be read as YAML in UTF-8"),
        ("[" * 10_000, [], "smoke.yaml: cannot be read as YAML in UTF-8"),
        (SMOKE + "04_rag_inference: {}\n03_sft:\n  learning_rate: 2.0e-4\n", [], "'03_sft' is there twice (line 5)"),
        (SMOKE + "  r: 16\n", [], "'r' is there twice (line 4)"),
        (SMOKE + "04_rag_inference:\n  prompt_style: 2024\n", [], '`prompt_style: "2024"`'),
        (
            SMOKE + "04_rag_inference:\n  prompt_style:\n",
            [],
            "prompt_style must be '2024' or 'training' or 'chat'; it is None",
        ),
        ("output_dir:\n", [], "without ~ and spaces at its ends; it is None"),
        (
            SMOKE + "  allow_licences: [a, b]\n",
            [],
            "allow_licences must be text on one line, one alone; it is ['a', 'b']",
        ),
        ('output_dir: "a\\0b"\n', [], "without ~ and spaces at its ends; it is 'a\\x00b'"),
        (
            SMOKE + "04_rag_inference:\n  ban_words: 1\n",
            [],
            "ban_words must be True or False; it is 1",
        ),
        (SMOKE + "  allow_licences: 2024-99-99\n", [], "smoke.yaml: cannot be read as YAML in UTF-8"),
        (SMOKE + "  allow_licences: 2024-12-01\n", [], '`allow_licences: "2024-12-01"`'),
        (SMOKE, ["--set", "r=2024-99-99"], "03_sft.r must be a whole number from 1 to 4,096; it is '2024-99-99'"),
        (SMOKE, ["--set", "r"], "--set r: want NAME=VALUE"),
        (SMOKE, ["--set", "r="], "03_sft.r must be a whole number from 1 to 4,096; it is None"),
        (SMOKE, ["--set", "r=["], "03_sft.r must be a whole number from 1 to 4,096; it is '['"),
        (SMOKE, ["--from", "03", "--only", "02"], "--from 03 --only 02 would run nothing"),
        (SMOKE, ["--set", "output_dir="], "01_quantize.output_dir must be the name of a file, a folder"),
        (SMOKE, ["--set", "output_dir=rules.json"], "rules.json is a file; output_dir must be a folder"),
        (SMOKE, ["--set", "output_dir=rules.json/a"], "rules.json is a file; output_dir must be a folder"),
        *((SMOKE, ["--set", f"output_dir={folder}"], "lies over the repository's own files") for folder in OWN),
        (SMOKE, ["--set", "03_sft.output_dir=."], "lies over the repository's own files"),
        (SMOKE, ["--set", "output_dir=/proc/a"], "/proc/a"),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_runs(
    folder: Path, run_file: str | bytes, arguments: list[str], message: str
) -> None:
    (folder / "smoke.yaml").write_bytes(run_file if isinstance(run_file, bytes) else run_file.encode())
    (folder / "other.yaml").write_text(SMOKE)
    result = run(folder, "smoke.yaml", *arguments, "--force")
    assert result.returncode == 1 and message in result.stderr
    assert result.stderr.count("\n") == 1 and len(log(folder)) == 4


def test_text_is_taken_as_it_is_and_other_values_as_in_a_run_file(folder: Path) -> None:
    """What YAML would read as nothing, a number, a comment, a list or a key stays text where the default is text."""
    sets = {"prompt_style": "2024", "03_sft.allow_licences": "", "output_dir": "outputs/run #2", "ban_words": "false"}
    sets |= {"learning_rate": "2e-4", "r": "16"}
    ran(folder, "smoke.yaml", "--from", "03", *(w for key, value in sets.items() for w in ("--set", f"{key}={value}")))
    third, fourth = log(folder)[-2:]
    assert (third["r"], third["learning_rate"], fourth["prompt_style"], fourth["ban_words"]) == (
        16,
        2e-4,
        "2024",
        False,
    )
    assert third["output_dir"] == "outputs/run #2" and (folder / "outputs/run #2/run.json").is_file()
    for value in ("", "null", "[a]", "a: b", " x", "1e3", "true", "'quoted'", "a=b"):
        plan = run(folder, "smoke.yaml", "--set", f"allow_licences={value}", "--dry-run").stdout
        assert f"    allow_licences={value!r}\n" in plan


def test_home_is_expanded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ran(folder, "smoke.yaml", "--set", "output_dir=~/x", "--only", "04") == NAMES[3:]
    assert (tmp_path / "home/x/run.json").is_file() and not (folder / "~").exists()
    assert log(folder)[-1]["output_dir"] == str(tmp_path / "home/x")


def test_braces_in_output_dir_are_no_parameters(folder: Path) -> None:
    assert ran(folder, "smoke.yaml", "--set", "output_dir=outputs/{r}", "--only", "04") == NAMES[3:]
    assert (folder / "outputs/{r}/notebooks/04_rag_inference.ipynb").is_file()


def test_the_repositorys_own_folders_are_known() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    folders = {line.split("/")[0].lower() for line in listed.splitlines() if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} <= set(machine.OWN_FOLDERS)


def test_a_damaged_run_json_is_named_with_what_to_do(folder: Path) -> None:
    (folder / "outputs/a/run.json").write_text('{"01_quantize": {"pa')
    result = run(folder, "smoke.yaml")
    assert result.returncode == 1 and len(log(folder)) == 4
    assert result.stderr.startswith("run.py: outputs/a/run.json: damaged") and result.stderr.count("\n") == 1


def test_a_damaged_executed_notebook_runs_again(folder: Path) -> None:
    path = folder / "outputs/a/notebooks/03_sft.ipynb"
    for content in (path.read_bytes()[:300], b"", b"[]", b"{}"):
        path.write_bytes(content)
        plan = run(folder, "smoke.yaml", "--dry-run").stdout
        assert "03_sft: run, outputs/a/notebooks/03_sft.ipynb is missing or holds an error" in plan
    assert ran(folder, "smoke.yaml") == ["03_sft"]


def test_a_full_disk_is_one_line(folder: Path) -> None:
    """A limit on the size of a file stands for it: run.json fits, an executed notebook does not."""
    command = f"ulimit -f 1; exec {sys.executable} run.py smoke.yaml --force"
    result = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert "check that the disk has room" in result.stderr.splitlines()[-1]


def test_a_sweep_keeps_each_run_in_its_own_directory(folder: Path) -> None:
    (folder / "other.yaml").write_text(SMOKE.replace("outputs/a", "outputs/b"))
    assert ran(folder, "smoke.yaml", "other.yaml") == NAMES
    assert json.loads((folder / "outputs/b/run.json").read_text()).keys() == set(NAMES)
    table = run(folder, "smoke.yaml", "other.yaml").stdout.splitlines()
    assert "| a | 5.5 | 4.25 | - | - | - | - | - |" in table and "| b | - | - | - | - | - | - | - |" in table


def test_the_first_failure_stops_and_names_notebook_cell_and_error(folder: Path) -> None:
    write_notebook(folder, "03_sft", 'raise KeyError("no such column")')
    result = run(folder, "smoke.yaml")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "03_sft, cell 3 (id step, `NAME = '03_sft'`): KeyError: 'no such column'" in result.stderr
    assert json.loads((folder / "outputs/a/run.json").read_text()).keys() == {NAMES[0], NAMES[1], NAMES[3]}
    write_notebook(folder, "03_sft")
    assert ran(folder, "smoke.yaml") == ["03_sft"]  # 04 saw the very same 03 before


def test_a_killed_kernel_is_named_too(folder: Path) -> None:
    write_notebook(folder, "04_rag_inference", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result = run(folder, "smoke.yaml")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        "04_rag_inference, cell 3 (id step" in result.stderr
        and "the kernel died, probably out of memory" in result.stderr
    )


def test_a_kernel_that_cannot_start_is_named_too(folder: Path) -> None:
    (folder / "ipykernel_launcher.py").write_text("raise SystemExit(1)")
    result = run(folder, "smoke.yaml", "--force", "--only", "01")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "01_quantize: the kernel died, probably out of memory" in result.stderr.splitlines()[-1]


def test_an_interrupted_notebook_runs_again(folder: Path) -> None:
    write_notebook(folder, "03_sft", STEP + "\nimport time\ntime.sleep(0 if os.path.exists('go') else 600)")
    # A background job of a shell without job control ignores Ctrl-C, and its children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "run.py", "smoke.yaml"], cwd=folder, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 600
    while len(log(folder)) < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=600)[1] and process.returncode == 1
    assert "03_sft" not in json.loads((folder / "outputs/a/run.json").read_text())
    (folder / "go").touch()
    assert ran(folder, "smoke.yaml")[0] == "03_sft"
