"""Run the notebooks in order with papermill: `python run.py data/runs/smoke.yaml`.

A run file holds `output_dir` and the parameters that differ from a notebook's defaults; several run files are a sweep.
What is finished (<output_dir>/run.json) is skipped until its code, helpers.py, a parameter, a file that a parameter
names or the notebook before it changes. Executed notebooks are kept in <output_dir>/notebooks/.
`python run.py compare RUN_DIR...` compares the scores of finished runs with those of the first.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

from helpers import RecipeError, compare_runs, report_table, sha256_file, sweep_table, write_json


def read_notebook(path: Path) -> tuple[str, dict]:
    """The hash of a notebook's code, and what its cell tagged `parameters` assigns (papermill gives only text)."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    tagged = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(tagged).body if isinstance(n, ast.Assign)}
    return hashlib.sha256("\n".join(cell.source for cell in cells).encode()).hexdigest(), values


def typed(key: str, value: object, default: object) -> object:
    """`value` if its type fits the default's (YAML reads 2e-4 as text: it becomes the number), else RecipeError."""
    if isinstance(default, float) and re.fullmatch(r"\d+e[+-]?\d+", str(value)):
        value = float(value)
    if type(value) is type(default) or {type(value), type(default)} == {int, float}:
        return value
    raise RecipeError(f"{key} must be {type(default).__name__} like {default!r}, not {value!r}")


def read_run(path: Path, sets: list[str], notebooks: dict[str, tuple[str, dict]]) -> dict:
    """`NOTEBOOK.PARAMETER: value` for every parameter: default, then run file, then `--set`; RecipeError if unknown."""
    defaults = {f"{name}.{key}": value for name, (_, values) in notebooks.items() for key, value in values.items()}
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = dict.fromkeys([f"{name}.output_dir" for name in notebooks], run.pop("output_dir"))
        wanted |= {f"{name}.{key}": value for name, part in run.items() for key, value in (part or {}).items()}
        for text in sets:
            key, _, value = text.partition("=")
            matching = [known for known in defaults if key in (known, known.partition(".")[2])]
            wanted |= dict.fromkeys(matching or [key], yaml.safe_load(value))
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise RecipeError(f"{path} or --set: want `output_dir: NAME` and a section a notebook: {error}") from None
    for key in wanted.keys() - defaults.keys():
        close = difflib.get_close_matches(key, {*defaults, *(known.partition(".")[2] for known in defaults)})
        raise RecipeError(f"{path} or --set: unknown {key!r}; did you mean {', '.join(close or defaults)}?")
    return {key: typed(key, wanted.get(key, default), default) for key, default in defaults.items()}


def execute(source: Path, executed: Path, parameters: dict) -> float:
    """Run one notebook (log level 50: no start messages), return its seconds; RecipeError names cell and error."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        options = {"extra_arguments": ["--log-level=50"], "coalesce_streams": True}  # a progress bar stays one line
        done = papermill.execute_notebook(source, executed, parameters, **options)
        return done.metadata.papermill.duration
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        # papermill notes "exception", true or false, on every cell that it has started: the last of them failed.
        cells = [cell for cell in nbformat.read(executed, 4).cells if "papermill" in cell.metadata]
        cell = [cell for cell in cells if cell.metadata.papermill.exception is not None][-1]
        number = [c.id for c in nbformat.read(source, 4).cells].index(cell.id) + 1
        where = f"{source.stem}, cell {number} (id {cell.id}, `{cell.source.splitlines()[0]}`)"
        what = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else f"{error} (out of memory?)"
        raise RecipeError(f"{where}: {what}\n{executed} shows it") from None


def why_run(record: dict, parts: dict, executed: Path) -> str:
    """Why a notebook has to run; "" if it is finished."""
    old = record.get("parts", {})
    if changed := [key for key in {**old, **parts} if key not in old or key not in parts or old[key] != parts[key]]:
        return f"changed: {', '.join(changed)}" if old else "not finished yet"
    finished = executed.is_file() and not nbformat.read(executed, 4).metadata.papermill.exception
    return "" if finished else f"{executed} is missing or holds an error"


def run_series(chosen: dict, notebooks: dict, args: argparse.Namespace) -> None:
    """Run the selected notebooks of one run file that are not finished; with --dry-run only say which and why."""
    output_dir, fingerprint = Path(chosen[f"{min(notebooks)}.output_dir"]), ""
    run_json = output_dir / "run.json"
    records = json.loads(run_json.read_text(encoding="utf-8")) if run_json.is_file() else {}
    for name, (code, defaults) in notebooks.items():
        if name[:2] < args.start or args.only not in (None, name[:2]):
            fingerprint = records.get(name, {}).get("fingerprint", "")
            continue
        parameters = {key: chosen[f"{name}.{key}"] for key in defaults}
        parts = {"code": code, "helpers.py": sha256_file("helpers.py"), "notebook before": fingerprint} | parameters
        parts |= {f"text of {v}": sha256_file(v) for v in parameters.values() if os.path.isfile(str(v))}
        fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        executed = output_dir / "notebooks" / f"{name}.ipynb"
        why = "--force" if args.force else why_run(records.get(name, {}), parts, executed)
        print(f"{name}: {f'run, {why}' if why else 'finished, skipped'}", flush=True)
        if args.dry_run:
            print("".join(f"    {key}={v!r}\n" for key, v in parameters.items() if v != defaults[key]), end="")
        elif why:
            write_json(run_json, {k: v for k, v in records.items() if k != name})  # if interrupted, it is not finished
            seconds = execute(Path(f"notebooks/{name}.ipynb"), executed, parameters)
            records[name] = {"fingerprint": fingerprint, "seconds": seconds, "parts": parts}
            write_json(run_json, records)
    print("" if args.dry_run else report_table(output_dir))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_files", nargs="+", type=Path, metavar="RUN.yaml", help="data/runs/smoke.yaml")
    parser.add_argument("--out", default="outputs/compare", help="compare: folder for the table and the picture")
    parser.add_argument("--only", choices=["01", "02", "03", "04"], help="run this notebook alone")
    parser.add_argument("--from", choices=["01", "02", "03", "04"], dest="start", default="01", help="run from it on")
    parser.add_argument("--set", action="append", default=[], help="r=32 or 03_sft.r=32; repeatable")
    parser.add_argument("--force", action="store_true", help="run also what is finished")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    args = parser.parse_intermixed_args()
    os.chdir(Path(__file__).resolve().parent)
    # The kernel "python3" shall be this interpreter's, also where the user has installed another environment's.
    os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter{os.pathsep}{os.environ.get('JUPYTER_PATH', '')}"
    notebooks = {path.stem: read_notebook(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
    try:
        if args.run_files[0] == Path("compare"):
            return print(compare_runs(args.run_files[1:], args.out))
        runs = [read_run(path, args.set, notebooks) for path in args.run_files]
        if len({Path(run[f"{min(notebooks)}.output_dir"]).resolve() for run in runs}) < len(runs):
            raise RecipeError("two of the run files have the same output_dir; give each its own")
        for run in runs:
            run_series(run, notebooks, args)
        if len(runs) > 1 and not args.dry_run:
            print(sweep_table([run[f"{min(notebooks)}.output_dir"] for run in runs]))
    except (RecipeError, KeyboardInterrupt) as error:
        sys.exit(f"run.py: {str(error) or 'interrupted; the same command goes on with the unfinished notebook'}")


if __name__ == "__main__":
    main()
