"""The second half of the set-up cell.

It checks the parameters and that there is something to work on. Then, where a notebook had to fetch the repository, as
on Colab, it installs what the machine lacks of requirements.txt and requirements-nodeps.txt. An installed torch is
never replaced: it fits the machine's driver, and another build is a download of gigabytes.
"""

import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent
START = Path.cwd()  # where the notebook lies
OLDEST_TORCHAO = "0.16"  # peft does not even import beside an older one; Colab brings 0.10, and nothing here uses it
stale: set[str] = set()  # changed while imported; kept until the session is restarted


def installed_versions() -> dict[str, str]:
    """Version of every installed distribution, by normalized name; of several the first on the path, as for imports."""
    return {canonicalize_name(found.name): found.version for found in reversed([*distributions()]) if found.name}


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of a plain requirements file: a line each, comments left out."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def unmet(requirements: Iterable[Requirement], installed: Mapping[str, str]) -> list[str]:
    """Those that are missing or installed in a version that does not fit, as text; an installed torch always fits."""
    versions = [(wanted, installed.get(canonicalize_name(wanted.name))) for wanted in requirements]
    return [
        str(wanted)
        for wanted, version in versions
        if version is None or (wanted.name != "torch" and not wanted.specifier.contains(version, prereleases=True))
    ]


def to_remove(installed: Mapping[str, str]) -> list[str]:
    """["torchao"] if one is installed that peft refuses."""
    too_old = "torchao" in installed and Version(installed["torchao"]) < Version(OLDEST_TORCHAO)
    return ["torchao"] if too_old else []


def changed_modules(before: Mapping[str, str], after: Mapping[str, str], owners: Mapping[str, list[str]]) -> set[str]:
    """Imported modules whose distribution was replaced or removed; `owners` maps module to distributions."""
    # Every Python loads a piece of setuptools when it starts; nothing here uses it.
    changed = {name for name, version in before.items() if after.get(name) != version and name != "setuptools"}
    return {m for m, names in owners.items() if m in sys.modules and changed & set(map(canonicalize_name, names))}


def pip(*arguments: str) -> None:
    """Run pip quietly; SystemExit with its last words if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        words = re.sub(r"\s*\n\s*", " | ", done.stderr.strip()[-600:])
        raise SystemExit(f"set-up: `pip {' '.join(arguments)}` failed: {words}")


def install() -> None:
    """Bring the packages to the pinned versions; SystemExit asks for a restart if an imported one was changed."""
    files = [ROOT / "requirements.txt", ROOT / "requirements-nodeps.txt"]
    before = installed_versions()
    missing, missing_nodeps = (unmet(read_requirements(file), before) for file in files)
    surplus = to_remove(before)
    if missing or missing_nodeps or surplus:
        owners = packages_distributions()
        print(f"set-up: installing {', '.join(missing + missing_nodeps) or 'nothing'}; takes a few minutes", flush=True)
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                keep = Path(folder, "keep.txt")
                keep.write_text(f"torch=={before['torch']}\n" if "torch" in before else "", encoding="utf-8")
                pip("install", "-r", str(files[0]), "-c", str(keep))
        if missing_nodeps:
            pip("install", "--no-deps", *missing_nodeps)
        if surplus:
            pip("uninstall", "-y", *surplus)
        importlib.invalidate_caches()
        stale.update(changed_modules(before, installed_versions(), owners))
    if stale:
        raise SystemExit(
            f"set-up: {', '.join(sorted(stale))} changed while in use: Runtime > Restart session, then Run all again"
        )
    print("set-up: everything is installed")


def quiet_libraries() -> None:
    """Turn off known notes of libraries that tell a reader nothing and fill the notebook; errors are not touched.

    Of several processes (accelerate) only the first one prints.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm: a text bar instead of a widget
    warnings.filterwarnings(
        "ignore", message=r"\s*\*+\s*RAGatouille WARNING"
    )  # on a future version; this one is pinned
    # colbert-ai asks for mixed precision by an old name, and PyTorch says that there is none on a CPU.
    warnings.filterwarnings("ignore", module=r"colbert\.utils\.amp|torch\.cuda\.amp")
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")  # torch 2.14, of colbert-ai
    # bitsandbytes offers another package for the CPU; Liger and torch name the hardware that is not there.
    for name in ("bitsandbytes.backends.cpu.ops", "liger_kernel.backends.registry", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # trl and Liger do not know that the attention "examples" keeps examples apart and applies the softcapping.
    notes = ("Padding-free training is enabled, but the attention", "attention implementation instead of `examples`")
    for name in ("trl.trainer.sft_trainer", "liger_kernel.transformers.model.gemma2"):
        logging.getLogger(name).addFilter(lambda record: not any(note in record.getMessage() for note in notes))


INPUTS = ("base_model", "dataset", "rules", "model", "train_data", "qa_data", "adapter", "tasks", "retriever")


def find_beside_notebook(values: dict[str, Any]) -> None:
    """Let parameters that name a file or folder beside the notebook name it from the repository's root."""
    for name in INPUTS:
        value = values.get(name)
        if not isinstance(value, str) or not value or Path(value).exists():
            continue
        for folder in (START, ROOT / "notebooks"):
            if (folder / value).exists():
                values[name] = os.path.relpath(folder / value)
                print(f"{name}: {values[name]}")
                break


def missing_inputs(values: Mapping[str, Any], output_dir: str) -> str:
    """All that is not there, in one line with what to do: what earlier notebooks write and no parameter names
    otherwise, and a file of tasks; "" if nothing is missing.
    """
    needs = {"model": ("quantized", 1), "adapter": ("adapter", 3)}
    if "adapter" not in values:  # notebook 3; notebook 4 can do without the training rows
        needs["train_data"] = ("filtered_magpie.jsonl", 2)
    elif values["adapter"] not in ("", "none"):
        del needs["model"]  # notebook 4 knows the base of an adapter
    missing = [
        f"{Path(output_dir, product)} (notebook {number} writes it; or set {name} to the hub repository it pushed to)"
        for name, (product, number) in needs.items()
        if values.get(name) == "" and not Path(output_dir, product).exists()
    ]
    problem = ""
    if missing:
        problem = f"{' and '.join(missing)}: not here. Run first what writes it, with the same output_dir (on Colab, "
        problem += "where each notebook opens a machine of its own, with the same drive_dir, too). "
    tasks = values.get("tasks", "")
    if tasks.endswith(".jsonl") and not Path(tasks).exists():
        problem += f"tasks: {tasks} is not here. If it is the competition's file, which only participants have, put it "
        problem += 'beside the notebook, or set tasks to "elyza/ELYZA-tasks-100", public tasks of the same kind'
    return problem.strip()


def prepare(values: dict[str, Any]) -> ModuleType:
    """Return helpers.py, with the repository's root as the working directory and everything installed.

    `values` are the notebook's globals. Before anything is installed, the parameters among them are checked, and
    RecipeError says all that is missing and how to get it.
    """
    fetched = ROOT not in (Path.cwd(), *Path.cwd().parents)
    os.chdir(ROOT)
    helpers = importlib.import_module("helpers")
    helpers.parameters.check(values)
    find_beside_notebook(values)
    output_dir = helpers.machine.place_outputs(values["output_dir"], values["drive_dir"])
    if missing := missing_inputs(values, output_dir):
        raise helpers.RecipeError(missing)
    if fetched:
        install()
    quiet_libraries()
    return helpers
