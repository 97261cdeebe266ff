"""Run the notebooks in order with papermill: `python run.py data/runs/smoke.yaml`.

A run file holds `output_dir` and the parameters that differ from a notebook's defaults; several run files are a sweep.
A notebook is skipped while all it depends on has the same contents (code, helpers.py and the rooms that it reaches,
parameters and the files they name, what earlier notebooks wrote) and what it wrote is unchanged; <output_dir>/run.json
and notebooks/ hold the rest. --force runs it again, but a training and answers that are there with the same record are
kept, and so are the versions in that record: to make them anew, delete them or choose another output_dir.
"""

import argparse
import json
import os
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there with `python -I` or PYTHONSAFEPATH

import nbformat
import papermill

from engine import files, folders, forms, records, reports
from helpers import RecipeError, digest, shown
from run_file import read_notebook, read_run

FEWEST_FILES = 128  # that a process may open; a kernel with torch needs about 60


def execute(source: Path, executed: Path, parameters: dict) -> float:
    """Run one notebook (log level 50: no start messages), return its seconds; RecipeError names cell and error."""
    target = str(executed).replace("{", "{{").replace("}", "}}")  # papermill fills in parameters
    try:
        executed.parent.mkdir(parents=True, exist_ok=True)
        options = {"extra_arguments": ["--log-level=50"], "coalesce_streams": True}  # a progress bar stays one line
        options["start_timeout"] = 600  # seconds; a kernel starts slowly on a busy machine
        return papermill.execute_notebook(source, target, parameters, **options).metadata.papermill.duration
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # a dead kernel is a RuntimeError
        kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        what = reports.one_line(f"{kind}: {text}")
        if "Kernel died" in text or kind in ("DeadKernelError", "CellExecutionError"):  # it could not even say why
            what = "the kernel died, probably out of memory"
        raise RecipeError(f"{source.stem}{failed_cell(source, executed)}: {what}; {executed} shows it") from None
    except OSError as error:
        problem = f"{executed} cannot be written ({error.strerror or error})"
        raise RecipeError(
            f"{source.stem}: {problem}; check that the disk has room and the folder can be written"
        ) from None


def failed_cell(source: Path, executed: Path) -> str:
    """Number, id and first line of the cell that failed, "" if it is not known."""
    try:
        # papermill notes "exception", true or false, on every cell that it has started: the last of them failed.
        cells = [cell for cell in nbformat.read(executed, 4).cells if "papermill" in cell.metadata]
        cell = [cell for cell in cells if cell.metadata.papermill.exception is not None][-1]
        number = [c.id for c in nbformat.read(source, 4).cells].index(cell.id) + 1
    except (OSError, ValueError, IndexError):
        return ""
    return f", cell {number} (id {cell.id}, `{cell.source.splitlines()[0]}`)"


def products(output_dir: Path) -> dict[str, dict]:
    """The record of everything finished below `output_dir`, by path; see engine/records.py."""
    found = [path.parent for path in output_dir.glob("*/record.json")]
    found += [Path(str(path).removesuffix(".record.json")) for path in output_dir.glob("*.record.json")]
    made = {path.name: records.read(path) for path in sorted(found)}
    return {name: record for name, record in made.items() if record.get("files")}


hashes = cache(files.hashes)  # forgotten after each notebook


def states(output_dir: Path) -> dict[str, tuple]:
    """What changes with every single file in `output_dir` that is written, by name; no two clocks are compared."""
    paths = [path for path in output_dir.glob("[!.]*") if path.is_file() and path.name != "run.json"]
    return {path.name: (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def contents(value: object) -> str:
    """What a parameter names, if it is a file or folder, also beside the notebooks: a hash that changes with it."""
    name, _ = folders.parse_name(str(value))
    found = [path for path in (name, f"notebooks/{name}") if name and os.path.exists(path)]
    return digest(hashes(found[0])) if found else ""


def why_run(record: dict, parts: dict, executed: Path) -> str:
    """Why a notebook has to run; "" if it is finished."""
    old = record.get("parts", {})
    if changed := [key for key in {**old, **parts} if key not in old or key not in parts or old[key] != parts[key]]:
        return f"changed: {', '.join(changed)}" if old else "not finished yet"
    for name, made in record.get("products", {}).items():
        product = executed.parent.parent / name
        if change := forms.compare(made, hashes(product)):
            return change if change.startswith(name) else f"{name}: {change}"
        if product.is_dir() and records.read(product).get("files") != made:
            return f"{name}: its record is missing or was changed"
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if not json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]["exception"]:
            return ""
    return f"{executed} is missing or holds an error"


def run_series(chosen: dict, notebooks: dict, args: argparse.Namespace) -> None:
    """Run the selected notebooks of one run file that are not finished; with --dry-run only say which and why."""
    output_dir, fingerprint = Path(chosen[f"{min(notebooks)}.output_dir"]), ""
    runs = reports.read(run_json := output_dir / "run.json")
    for name, (code, defaults) in notebooks.items():
        if name[:2] < args.start or args.only not in (None, name[:2]):
            fingerprint = runs.get(name, {}).get("fingerprint", "")
            continue
        parameters, made = {key: chosen[f"{name}.{key}"] for key in defaults}, products(output_dir).items()
        before = {f"{key} of {r['stage']}": digest(hashes(output_dir / key)) for key, r in made if r["stage"] < name}
        parts = {"code": digest(code), **records.hash_code(records.rooms_in(code)), "notebook before": fingerprint}
        parts |= parameters | before
        parts |= {f"contents of {v}": c for k, v in parameters.items() if k != "output_dir" and (c := contents(v))}
        fingerprint = digest(parts)
        executed = output_dir / "notebooks" / f"{name}.ipynb"
        why = "--force" if args.force else why_run(runs.get(name, {}), parts, executed)
        print(shown(f"{name}: {f'run, {why}' if why else 'finished, skipped'}"), flush=True)
        if args.dry_run:
            print("".join(f"    {key}={v!r}\n" for key, v in parameters.items() if v != defaults[key]), end="")
        elif why:
            files.write_json(run_json, {k: v for k, v in runs.items() if k != name})  # if interrupted: not finished
            old, earlier = states(output_dir), runs.get(name, {}).get("products", {})
            seconds = execute(Path(f"notebooks/{name}.ipynb"), executed, parameters)
            hashes.cache_clear()
            made = {key: r["files"] for key, r in products(output_dir).items() if r["stage"] == name}
            new = {key for key, state in states(output_dir).items() if key in earlier or old.get(key) != state}
            made |= {key: hashes(output_dir / key) for key in sorted(new)}
            runs[name] = {"fingerprint": fingerprint, "seconds": seconds, "parts": parts, "products": made}
            files.write_json(run_json, runs)
    print("" if args.dry_run else reports.run_table(output_dir))


def check_process() -> None:
    """Make up for what this process was started without; RecipeError if it may open too few files for a kernel."""
    for number in range(3):  # closed standard streams: other files would take their numbers
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in (sys.stdout, sys.stderr):
        if stream:  # a name in Japanese where the locale is C
            stream.reconfigure(errors="backslashreplace")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if 0 <= most < FEWEST_FILES:
        raise RecipeError(
            f"only {most} files may be open at a time, too few for a kernel: `ulimit -n 1024` allows more"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_files", nargs="+", type=Path, metavar="RUN.yaml", help="data/runs/smoke.yaml")
    parser.add_argument("--only", choices=["01", "02", "03", "04"], help="run this notebook alone")
    parser.add_argument("--from", choices=["01", "02", "03", "04"], dest="start", default="01", help="run from it on")
    parser.add_argument("--set", action="append", default=[], help="r=32 or 03_sft.r=32; repeatable")
    parser.add_argument("--force", action="store_true", help="run also what is finished (see above)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    args = parser.parse_intermixed_args()
    args.run_files = [path.absolute() if os.path.exists(path) else path for path in args.run_files]
    os.chdir(Path(__file__).resolve().parent)
    # The kernel "python3" shall be this interpreter's, also where the user has installed another environment's.
    os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter{os.pathsep}{os.environ.get('JUPYTER_PATH', '')}"
    notebooks = {path.stem: read_notebook(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
    try:
        check_process()
        if args.only and args.only < args.start:
            raise RecipeError(f"--from {args.start} --only {args.only} would run nothing; drop one of them")
        runs = [read_run(path, args.set, notebooks) for path in args.run_files]
        if len({Path(run[f"{min(notebooks)}.output_dir"]).resolve() for run in runs}) < len(runs):
            raise RecipeError("two of the run files have the same output_dir; give each its own")
        for run in runs:
            run_series(run, notebooks, args)
        if len(runs) > 1 and not args.dry_run:
            print(reports.sweep_table([run[f"{min(notebooks)}.output_dir"] for run in runs]))
    except (RecipeError, KeyboardInterrupt) as error:
        sys.exit(f"run.py: {str(error) or 'interrupted; the same command goes on with the unfinished notebook'}")
    except BrokenPipeError:  # `run.py ... | head`: nobody reads on
        sys.exit(1)
    except OSError as error:
        sys.exit(f"run.py: {error}; check that the disk has room and the folder can be written")


if __name__ == "__main__":
    main()
