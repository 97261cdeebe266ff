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


def run_cell(notebook, cell_id, **values):
    """Execute one code cell of a notebook with these values; returns all names that it leaves behind."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells if cell["id"] == cell_id]
    exec(source, values)
    return values


@pytest.fixture(scope="session")
def smoke() -> Path:
    """The folder of a finished smoke run; run.py does nothing if it is already there."""
    with FileLock(ROOT / "outputs.lock"):  # the tests run in several processes
        subprocess.run([sys.executable, "run.py", "data/runs/smoke.yaml"], cwd=ROOT, check=True)
    return ROOT / "outputs" / "smoke"
