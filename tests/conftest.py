"""The repository root on the import path, and one thread: the tiny models are slower on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test marked `plain_trl` gets a process of its own if unsloth, which changes trl, is loaded in this one."""
    if pyfuncitem.get_closest_marker("plain_trl") and "unsloth" in sys.modules:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return True
    return None


# Those of tests/notebooks that take longest, in this order; the others follow.
LONGEST = ("test_resume", "test_alone", "test_series", "test_lost", "test_execution", "test_changes", "test_run")


def pytest_collection_modifyitems(config, items):
    """What lies in tests/notebooks executes notebooks, and nothing else does: `pytest -m "not notebook"`."""
    for item in items:
        if item.path.parent.name == "notebooks":
            item.add_marker("notebook")
        elif "smoke" in item.fixturenames:
            raise pytest.UsageError(f"{item.nodeid} executes notebooks: it belongs into tests/notebooks")
    items[:] = in_parts(items, getattr(config, "workerinput", {}).get("workercount", 1))


def in_parts(items, number):
    """The tests in the order in which so many workers shall run them; `--dist worksteal` begins with equal parts.

    In each part first come tests marked `plain_trl`, as long as no test has loaded unsloth, then whole files that
    execute notebooks: so what these share is made once, and what is left for the end, and for stealing, is short.
    """
    long = [item for item in items if item.get_closest_marker("notebook")]
    plain = [item for item in items if item not in long and item.get_closest_marker("plain_trl")]
    short = [item for item in items if item not in long and item not in plain]
    parts = [plain[worker::number] for worker in range(number)]
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    paths = sorted(dict.fromkeys(item.path for item in long), key=lambda path: ranks.get(path.stem, len(ranks)))
    for turn, path in enumerate(paths):  # forth and back: the first worker has the longest file, and then the shortest
        forth = turn // number % 2 == 0
        worker = turn % number if forth else number - 1 - turn % number
        parts[worker] += [item for item in long if item.path == path]
    for worker in range(number):
        size = (len(items) - sum(map(len, parts[:worker]))) // (number - worker)
        more = max(0, size - len(parts[worker]))
        parts[worker] += short[:more]
        del short[:more]
    return [item for part in (*parts, short) for item in part]


def run_cell(notebook, cell_id, **values):
    """Execute one code cell of a notebook with these values; returns all names that it leaves behind."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if cell["id"] == cell_id]
    exec(source, values)
    return values


def execute(name, output_dir, **values):
    """Execute a notebook as papermill users do, with the smoke values and `values` on top."""
    import papermill
    import yaml

    run = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))
    parameters = run[name] | {"output_dir": str(output_dir)} | values
    output = Path(output_dir) / f"{name}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        output,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(ROOT),
    )
    return parameters


@pytest.fixture(scope="session")
def quantized(tmp_path_factory) -> Path:
    """The tiny model in 4 bit with its tokenizer and record, as notebook 1 writes it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import helpers

    base, folder = ROOT / "data/tiny/gemma2", tmp_path_factory.mktemp("quantized")
    values = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **values)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    helpers.models.keep_weights_unpacked(model)
    model.save_pretrained(folder)
    helpers.models.load_tokenizer(str(base)).save_pretrained(folder)
    source = helpers.records.model_source("data/tiny/gemma2")
    helpers.records.write(folder, helpers.records.make("01_quantize", {"model": source}, {}, []))
    return folder


@pytest.fixture(scope="session")
def smoke() -> Path:
    """The folder of a finished smoke run; run.py does nothing if it is already there."""
    with FileLock(ROOT / "outputs.lock"):  # the tests run in several processes
        subprocess.run([sys.executable, "run.py", "data/runs/smoke.yaml"], cwd=ROOT, check=True)
    return ROOT / "outputs" / "smoke"
