"""Runs cells in processes forked from this one, which has imported what takes long: so a start costs little.

Reads jobs from standard input, one JSON object per line: `cells` (id and source of each), the `folder` that they write
to, the `log` for what they print, how many `processes` run them together, and when to `kill` the process:

    "never"                        it runs to the end
    "after cells"                  again and again, until one gets to the end; each is killed after one cell more than
                                   the one before
    {"file": path, "lines": n}     as soon as the file has so many lines, when the next file is opened: in a cell

Tells the `pid` of each process when it starts, a JSON line, and at the end of a job the `status` of its last process
and the ids of the `cells` after which one was killed.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

IMPORTED = ["bitsandbytes", "datasets", "matplotlib.pyplot", "pandas", "peft", "torch", "transformers", "trl"]
IMPORTED += ["transformers.models.gemma2.modeling_gemma2", "colbert", "matplotlib_fontja"]
FIRST = 100  # exit status of a process that was killed after the first cell
HANGS = 600  # seconds after which a process ends that has not yet, and shows in its log where it stands


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that a later run can find in the folder; the lock names its holder and ends with it."""
    paths = [path for path in folder.rglob("*") if path.suffix not in (".lock", ".holder")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def kill_when(file: str, lines: int) -> None:
    """Kill this process when the file has so many lines; asked whenever a file is opened, so no clock decides."""
    asking = False

    def hook(event: str, _: tuple) -> None:
        nonlocal asking
        if event == "open" and not asking and os.path.exists(file):
            asking = True
            if Path(file).read_bytes().count(b"\n") >= lines:
                os.kill(os.getpid(), signal.SIGKILL)
            asking = False

    sys.addaudithook(hook)


def run_cells(job: dict, start: int) -> None:
    """Run all cells; with "after cells" end without any ado after a cell from `start` on.

    It is the first after which the folder holds something else than before the start. After the cells before it a new
    process would find what this one has found, and do the same.
    """
    faulthandler.dump_traceback_later(HANGS, exit=True)
    folder = Path(job["folder"])
    found, scope = contents(folder), {"__name__": "__main__"}
    for number, (name, code) in enumerate(job["cells"]):
        exec(compile(code, f"<{name}>", "exec"), scope)
        if job["kill"] == "after cells" and number >= start and contents(folder) != found:
            os._exit(FIRST + number)


def end_with(run: Callable[[], None]) -> NoReturn:
    """Run this and end the process, without waiting for threads that libraries have started."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_together(job: dict) -> None:
    """Run all cells in several processes that find each other as torchrun's and accelerate's do."""
    store = sys.modules["torch"].distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(job["processes"])}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    # accelerate would call the CPU of several processes "cpu:0", to which torch cannot load a checkpoint.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    running = set()
    for rank in map(str, range(job["processes"])):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            end_with(lambda: run_cells(job, 0))
        running.add(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status:  # the others would wait for it
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise RuntimeError(f"one of the processes has ended with {os.waitstatus_to_exitcode(status)}")


def run_job(job: dict, start: int) -> None:
    with open(job["log"], "ab") as log, open(os.devnull) as nothing:
        for number, stream in enumerate((nothing, log, log)):
            os.dup2(stream.fileno(), number)
    if isinstance(job["kill"], dict):
        kill_when(**job["kill"])
    if job["processes"] > 1:
        run_together(job)
    else:
        run_cells(job, start)


def fork(job: dict, answers: TextIO, start: int = 0) -> int:
    """The status with which a forked process ends that runs the cells."""
    if (child := os.fork()) == 0:
        end_with(lambda: run_job(job, start))
    print(json.dumps({"pid": child}), file=answers, flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print when they are imported
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        job, killed = json.loads(line), []
        while (status := fork(job, answers, len(killed) and killed[-1] + 1)) >= FIRST:
            killed.append(status - FIRST)
        answer = {"status": status, "cells": [job["cells"][number][0] for number in killed]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
