"""Run the notebooks in order with papermill: `python run.py data/runs/smoke.yaml`.

A run file names an `output_dir` and, for each notebook, the parameters that differ from its defaults; several run files
are a sweep. A finished notebook is skipped until its code, helpers.py, a parameter, a file that a parameter names or the
notebook before it changes. Executed notebooks are kept in <output_dir>/notebooks/, what is finished in run.json.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from helpers import RecipeError, sha256_file, write_json

Values = dict[str, Any]


def find(name: str, known: Values) -> str:
    """The key of `known` that is `name` or has that number ("03"); RecipeError with close names if there is none."""
    for key in known:
        if name == key or (name.isdigit() and key.startswith(f"{name}_")):
            return key
    raise RecipeError(f"unknown {name!r}; did you mean {', '.join(difflib.get_close_matches(name, known) or known)}?")


def read_notebook(path: Path) -> tuple[str, Values]:
    """A notebook's code, and the values that its cell tagged `parameters` assigns."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    tagged = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    # papermill.inspect_notebook gives the values as text and skips a line whose comment holds a "=".
    assigned = [node for node in ast.parse(tagged).body if isinstance(node, ast.Assign)]
    return "\n".join(c.source for c in cells), {n.targets[0].id: ast.literal_eval(n.value) for n in assigned}


def typed(key: str, value: Any, default: Any) -> Any:
    """`value` if its type fits the default's (YAML reads 2e-4 as text: it becomes the number), else RecipeError."""
    if isinstance(default, float) and re.fullmatch(r"\d+e[+-]?\d+", str(value)):
        value = float(value)
    if type(value) is type(default) or {type(value), type(default)} == {int, float}:
        return value
    raise RecipeError(f"{key} must be {type(default).__name__} like {default!r}, not {value!r}")


def read_run(path: Path, sets: list[str], defaults: dict[str, Values]) -> dict[str, Values]:
    """All parameters of each notebook: its defaults, then the run file's, then `--set`; RecipeError if one is unknown."""
    try:
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        wanted = [(name, "output_dir", run["output_dir"]) for name in defaults]
        sections = [(find(name, defaults), section or {}) for name, section in run.items() if name != "output_dir"]
    except (OSError, yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise RecipeError(f"{path}: not a run file with `output_dir: NAME` and a section a notebook: {error}") from None
    wanted += [(name, key, value) for name, section in sections for key, value in section.items()]
    for text in sets:
        target, _, value = text.partition("=")
        name, _, key = target.rpartition(".")
        find(key, {known: None for values in defaults.values() for known in values})
        names = [find(name, defaults)] if name else [name for name in defaults if key in defaults[name]]
        wanted += [(name, key, yaml.safe_load(value)) for name in names]
    chosen = {name: dict(values) for name, values in defaults.items()}
    for name, key, value in wanted:
        chosen[name][key] = typed(f"{name}.{key}", value, chosen[name][find(key, chosen[name])])
    return chosen


def execute(source: Path, executed: Path, parameters: Values) -> None:
    """Run one notebook; RecipeError names the cell that failed and its error."""
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(source, executed, parameters)
    except (PapermillExecutionError, DeadKernelError) as error:
        # papermill notes "exception", true or false, on every cell that it has started: the last of them failed.
        cells = [cell for cell in nbformat.read(executed, 4).cells if "papermill" in cell.metadata]
        cell = [cell for cell in cells if cell.metadata.papermill.exception is not None][-1]
        number = [c.id for c in nbformat.read(source, 4).cells].index(cell.id) + 1
        what = (
            f"{error.ename}: {error.evalue}" if isinstance(error, PapermillExecutionError) else f"{error} (no memory?)"
        )
        where = f"{source.stem}, cell {number} (id {cell.id}, `{cell.source.splitlines()[0]}`)"
        raise RecipeError(f"{where}: {what}\n{executed} shows it") from None


def why_run(record: Values, parts: Values, executed: Path) -> str:
    """Why a notebook has to run; "" if it is finished."""
    old = record.get("parts", {})
    if changed := [key for key in {**old, **parts} if key not in old or key not in parts or old[key] != parts[key]]:
        return f"changed: {', '.join(changed)}" if old else "not finished yet"
    failed = not executed.is_file() or nbformat.read(executed, 4).metadata.papermill.exception
    return f"{executed} is missing or holds an error" if failed else ""


def run_series(output_dir: Path, chosen: dict[str, Values], notebooks: Values, args: argparse.Namespace) -> None:
    """Run the selected notebooks of one run file that are not finished; with --dry-run only say which and why."""
    first = find(args.only or args.start, notebooks) if args.only or args.start else min(notebooks)
    run_json, fingerprint = output_dir / "run.json", ""
    records = json.loads(run_json.read_text(encoding="utf-8")) if run_json.is_file() else {}
    for name, (code, defaults) in notebooks.items():
        if name < first or (args.only and name != first):
            fingerprint = records.get(name, {}).get("fingerprint", "")
            continue
        files = [value for value in chosen[name].values() if isinstance(value, str) and os.path.isfile(value)]
        parts = {"code": hashlib.sha256(code.encode()).hexdigest(), "helpers.py": sha256_file("helpers.py")}
        parts |= {"the notebook before": fingerprint, **chosen[name], **{f"text of {f}": sha256_file(f) for f in files}}
        fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        executed = output_dir / "notebooks" / f"{name}.ipynb"
        why = "--force" if args.force else why_run(records.get(name, {}), parts, executed)
        print(f"{name}: {f'run, {why}' if why else 'finished, skipped'}", flush=True)
        if args.dry_run:
            print("".join(f"    {k}={v!r}\n" for k, v in chosen[name].items() if v != defaults[k]), end="")
        elif why:
            records.pop(name, None)  # before it starts: an interrupted notebook is not finished
            write_json(run_json, records)
            start = time.monotonic()
            execute(Path(f"notebooks/{name}.ipynb"), executed, chosen[name])
            records[name] = {"fingerprint": fingerprint, "seconds": time.monotonic() - start, "parts": parts}
            write_json(run_json, records)


def table(output_dir: Path) -> str:
    """What the notebooks reported, a line each; what is missing is left out."""
    reports = [output_dir / f"{name}.json" for name in ("filter_report", "sft_metrics", "inference_metrics", "run")]
    rows, loss, tasks, runs = (json.loads(p.read_text(encoding="utf-8")) if p.is_file() else {} for p in reports)
    lines = [f"rows kept: {rows['rows_kept']} of {rows['rows_in']}"] if rows else []
    lines += [f"rows dropped, {reason}: {count}" for reason, count in rows.get("dropped", {}).items()]
    lines += [f"loss, first and last: {loss['first_loss']:.3f} {loss['last_loss']:.3f}"] if loss else []
    lines += [f"tasks answered: {tasks['answered']} of {tasks['tasks']} in {output_dir}/output.jsonl"] if tasks else []
    lines += [f"seconds, {name}: {run['seconds']:.0f}" for name, run in runs.items()]
    return "\n".join("{:<36} {}".format(*line.split(": ")) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_files", nargs="+", type=Path, metavar="RUN.yaml", help="for example data/runs/smoke.yaml")
    parser.add_argument("--only", metavar="NOTEBOOK", help="run this notebook alone: 03 or 03_sft")
    parser.add_argument("--from", dest="start", metavar="NOTEBOOK", help="run this notebook and those after it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="r=32 or 03_sft.r=32; repeatable"
    )
    parser.add_argument("--force", action="store_true", help="run also what is finished")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    args = parser.parse_args()
    run_files = [path.resolve() for path in args.run_files]
    os.chdir(Path(__file__).resolve().parent)
    # The kernel "python3" shall be this interpreter's, also where the user has installed another environment's.
    os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter{os.pathsep}{os.environ.get('JUPYTER_PATH', '')}"
    notebooks = {path.stem: read_notebook(path) for path in sorted(Path("notebooks").glob("0*.ipynb"))}
    try:
        runs = [
            read_run(path, args.set, {name: values for name, (_, values) in notebooks.items()}) for path in run_files
        ]
        directories = [Path(run[min(run)]["output_dir"]) for run in runs]
        if len({directory.resolve() for directory in directories}) < len(runs):
            raise RecipeError("two of the run files have one output_dir; give each its own")
        for chosen, output_dir in zip(runs, directories, strict=True):
            run_series(output_dir, chosen, notebooks, args)
            print(table(output_dir))
    except RecipeError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
