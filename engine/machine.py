"""The machine and its session: GPU, engine, secrets, output folder, lock; whether a run fits.

The set-up cell uses this room before any package is installed: at its top only the standard library is imported.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from helpers import RecipeError, first_line


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name; "" for a package that is not installed."""
    versions = dict.fromkeys(names, "")
    for name in versions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def secret(name: str, seconds: float = 60) -> str:
    """A secret from the environment, else from Colab's secrets (the key symbol at the left), else "".

    Colab asks the open browser tab and never stops waiting if there is none, so it gets at most `seconds`.
    """
    if os.environ.get(name):
        return os.environ[name]
    try:
        from google.colab import userdata
    except ImportError:
        return ""

    def give_up(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second: Colab's loop swallows some exceptions
    try:
        return userdata.get(name)
    except Exception:  # not there, not allowed, no tab: the versions of Colab name these errors differently
        return ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def hub_token(hub_repo: str) -> str:
    """The hub token for a push to `hub_repo` ("" when there is no push); RecipeError says where to put it."""
    token = secret("HF_TOKEN") if hub_repo else ""
    if hub_repo and not token:
        raise RecipeError(
            f"hub_repo is {hub_repo!r} but there is no token: set the environment variable HF_TOKEN, or in Colab add "
            "HF_TOKEN under the key symbol and allow this notebook to read it"
        )
    return token


def wandb_mode(key: str) -> str:
    """The value for WANDB_MODE: "online" if wandb takes the key, "offline" without a key or network (wandb itself would
    wait for minutes). RecipeError for a key that wandb refuses.
    """
    import requests

    if os.environ.get("WANDB_MODE") or not key:
        return os.environ.get("WANDB_MODE", "offline")
    address, query = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), {"query": "{viewer {username}}"}
    try:
        reply = requests.post(f"{address}/graphql", json=query, auth=("api", key), timeout=10)
        if reply.status_code < 500 and not (reply.ok and (reply.json().get("data") or {}).get("viewer")):
            raise RecipeError(f"{address} refuses the key WANDB_API_KEY: correct it, or set wandb_project to nothing")
        reply.raise_for_status()
    except (requests.RequestException, AttributeError) as error:  # AttributeError: the reply is something else
        print(f"wandb cannot be reached ({type(error).__name__}) and logs into output_dir")
        return "offline"
    return "online"


def place_outputs(output_dir: str, drive_dir: str) -> str:
    """The folder to write to: `output_dir`, on Colab below `drive_dir` in the reader's Google Drive, which is mounted.

    On Colab with an empty `drive_dir` it says what a disconnect costs. Elsewhere `drive_dir` does nothing.
    """
    check_output_dir(output_dir)
    try:
        from google.colab import drive
    except ImportError:
        return output_dir
    if not drive_dir:
        print(
            f"a disconnect loses {output_dir}: set drive_dir to a folder of your Google Drive to keep it, or hub_repo "
            "to keep checkpoints and answers"
        )
        return output_dir
    drive.mount("/content/drive")
    return str(Path("/content/drive/MyDrive", drive_dir, output_dir))


# The repository's own folders, besides those that begin with a dot.
OWN_FOLDERS = ("benchmarks", "data", "docs", "engine", "notebooks", "pipelines", "tests")


def check_output_dir(output_dir: str) -> None:
    """RecipeError if `output_dir` is a file, or lies over the files of the repository, which is the current folder, or
    is a name that some program on the way would not take for a folder.
    """
    check_name(output_dir)
    root, folder = Path.cwd(), Path(output_dir).resolve()
    first = folder.relative_to(root).parts[0].lower() if root in folder.parents else ""
    if folder == root or folder in root.parents or first.startswith(".") or first in OWN_FOLDERS:
        raise RecipeError(f"output_dir {output_dir!r} lies over the repository's own files; take one like outputs/NAME")
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise RecipeError(f"output_dir {output_dir!r}: {place} is a file; output_dir must be a folder")


def check_name(output_dir: str) -> None:
    """RecipeError for a name that is no UTF-8, that this Python cannot write, that papermill takes for an option, or
    that leads over a link to nowhere.
    """
    problem = ""
    if output_dir.startswith("-") or not output_dir.isprintable():
        problem = 'it begins with "-" or holds a control character; choose another name'
    try:
        output_dir.encode()
        os.fsencode(output_dir)
    except UnicodeError:
        problem = f"this Python writes names in {sys.getfilesystemencoding()}; set PYTHONUTF8=1, or choose another name"
    if not problem:
        folder = Path(output_dir).absolute()
        links = [place for place in (folder, *folder.parents) if place.is_symlink() and not place.exists()]
        problem = f"{links[-1]} is a link that leads nowhere; delete it" if links else ""
    if problem:
        raise RecipeError(f"output_dir {output_dir!r}: {problem}")


_locks: dict[Path, Any] = {}  # held until the process ends


def lock_folder(folder: str | Path, stage: str) -> None:
    """Lock `folder` for `stage` until this process ends or is killed; of several (accelerate) the first one locks.

    RecipeError if another process holds that lock, or if the folder cannot be written: better now than after hours.
    """
    from filelock import FileLock, Timeout

    path = Path(folder, f".{stage}.lock").resolve()
    if path in _locks or os.environ.get("RANK", "0") != "0":
        return
    lock, holder = FileLock(path), path.with_suffix(".holder")
    me = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text(encoding="utf-8", errors="replace") if holder.is_file() else "another process"
        raise RecipeError(f"{folder} is in use: {who} runs {stage}; wait, or choose another output_dir") from None
    except (NotImplementedError, OSError):
        pass  # no locks here, or nothing can be written: that the next line tells
    try:
        holder.write_text(me, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"output_dir {folder} cannot be written ({first_line(error)}); choose another one") from None
    _locks[path] = lock


def open_outputs(output_dir: str, drive_dir: str, stage: str) -> str:
    """The folder to write to (see `place_outputs`), locked for this notebook (see `lock_folder`)."""
    folder = place_outputs(output_dir, drive_dir)
    lock_folder(folder, stage)
    return folder


def start_wandb(project: str, output_dir: str) -> None:
    """Set wandb up for a `project` ("": not used): it logs online, or without a key or network into `output_dir`."""
    if not project:
        return
    os.environ |= {"WANDB_PROJECT": project, "WANDB_DIR": output_dir, "WANDB_SILENT": "true"}
    if key := secret("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key
    os.environ["WANDB_MODE"] = wandb_mode(key)
    print(f"wandb is {os.environ['WANDB_MODE']}")


def find_gpu() -> dict[str, Any] | None:
    """Name, free memory in GiB and compute capability of the first NVIDIA GPU, None if there is none.

    Asks nvidia-smi: torch would take hold of the GPU before unsloth has set how.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    name, free, capability = answer.splitlines()[0].rsplit(", ", 2)
    return {"name": name, "free_gib": int(free) / 1024, "compute_capability": float(capability)}


def compute_dtype() -> str:
    """The type of matrix products and of what is not quantized: "bfloat16", on a GPU without it (T4) "float16"."""
    gpu = find_gpu()
    return "float16" if gpu and gpu["compute_capability"] < 8 else "bfloat16"


def start_engine(engine: str) -> None:
    """Choose this process's GPU, and import unsloth, if it is the engine, before the libraries that it patches.

    A process uses one GPU: of several processes (accelerate) each the one of its number, a single one the first. Left
    to the libraries, a single process would spread the model over all GPUs, and one of several would put what is not
    told its place (the retriever, recorded decoding steps) on the first.
    """
    number = os.environ.get("LOCAL_RANK")
    if number is None:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if engine == "unsloth":
        # No usage statistics.
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        # The code that it generates goes into a folder of the user's own: others could write into a shared one.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache" / "unsloth_compiled_cache"))
        # unsloth 2026.10.9 compiles each block; on torch 2.11, which Colab has, the compiler fails at that with an
        # AssertionError in the first training step.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        import torch._dynamo

        torch._dynamo.config.disable = os.environ["TORCHDYNAMO_DISABLE"] == "1"
        import unsloth  # noqa: F401
    if number is not None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(number))


def fits(need: Mapping[str, float], free_gib: float) -> bool:
    """Whether a run that needs so many GiB, part by part, fits into the memory that is free."""
    return sum(need.values()) <= 0.95 * free_gib


def fit_report(gpu: Mapping[str, Any] | None, need: Mapping[str, float], remedy: str) -> list[str]:
    """Lines that say whether a run that needs `need` GiB, part by part, fits the GPU (see `find_gpu`)."""
    total = sum(need.values())
    parts = ", ".join(f"{part} {size:.1f}" for part, size in need.items() if size >= 0.05)
    needed = f"about {total:.1f} GiB of GPU memory: {parts}"
    if gpu is None:
        return [
            "no NVIDIA GPU was found, so the CPU computes: enough for the tiny models of the smoke run, slow for "
            "larger ones",
            f"with a GPU (in Colab: Runtime > Change runtime type) it would need {needed}",
        ]
    bf16 = "yes" if gpu["compute_capability"] >= 8 else "no, float16 is used"
    verdict = "it fits" if fits(need, gpu["free_gib"]) else f"IT WILL NOT FIT: {remedy}, or choose a larger GPU"
    return [f"{gpu['name']}, {gpu['free_gib']:.1f} GiB free, bfloat16: {bf16}", f"this run needs {needed}", verdict]


def report(packages: Iterable[str], need: Mapping[str, float], remedy: str) -> None:
    """Print versions, GPU, and whether the run fits; `remedy` is what to change if not."""
    versions = {"python": sys.version.split()[0], **package_versions(packages)}
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    print("\n".join(fit_report(find_gpu(), need, remedy)))
