"""What finished runs report: their JSON files, read back, and tables of them for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine import forms
from helpers import RecipeError

SWEEP = {
    "first loss": ("sft_metrics.json", "first_loss"),
    "last loss": ("sft_metrics.json", "last_loss"),
    "held-out loss": ("sft_metrics.json", "held_out_loss"),
    "training tokens/s": ("sft_metrics.json", "tokens_per_second"),
    "GPU GiB": ("sft_metrics.json", "peak_gpu_gib"),
    "answered": ("inference_metrics.json", "answered"),
    "answer tokens/s": ("inference_metrics.json", "tokens_per_second"),
}


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a run, {} if there is none; RecipeError if it is damaged."""
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError):
        report = None
    is_run = path.name == "run.json"
    runs = report.values() if is_run and isinstance(report, dict) else ()
    # What a notebook depended on and, in run.json of today, what it made.
    parts = [part for r in runs for part in ((r.get("parts"), r.get("products", {})) if isinstance(r, dict) else [r])]
    if isinstance(report, dict) and all(isinstance(part, dict) for part in parts):
        hashes = [product for run in runs for product in run.get("products", {}).values()]
        if all(forms.is_table(product, str) for product in hashes):
            return report
    writer = "run.py, which then runs the notebooks again" if is_run else "the notebook that writes it, again"
    raise RecipeError(f"{path}: damaged or cut short; delete it and run {writer}")


def one_line(value: Any) -> str:
    """`value` as text without line breaks."""
    return " ".join(str(value).splitlines())


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown that rewrites no number and lets no name break a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in row) + " |\n" for row in lines)


def run_table(output_dir: Path) -> str:
    """What the notebooks of one run reported, one line each; what is missing is left out."""
    names = ("filter_report.json", "sft_metrics.json", "inference_metrics.json", "run.json")
    rows, loss, tasks, runs = (read(output_dir / name) for name in names)
    lines: dict[str, Any] = {}
    try:
        if rows:
            lines["rows kept"] = f"{rows['rows_kept']} of {rows['rows_in']}"
            lines |= {f"rows dropped, {reason}": count for reason, count in rows["reasons"].items()}
        if loss:
            lines["loss, first and last"] = f"{loss['first_loss']:.3f} {loss['last_loss']:.3f}"
        if tasks:
            lines["tasks answered"] = f"{tasks['answered']} of {tasks['tasks']} in {output_dir}/output.jsonl"
        lines |= {f"seconds, {name}": f"{run['seconds']:.0f}" for name, run in runs.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{output_dir}: a report is not as its notebook writes it ({error!r}); run it again"
        ) from None
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def differing_settings(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings in which runs differ, from their run.json: each with its value in every run.

    A setting is called NOTEBOOK.PARAMETER; a notebook's own name stands for whether it was run. "-" is "not there".
    """
    columns = []
    for run in runs:
        column = dict.fromkeys(run, "run")
        for name, notebook in run.items():
            for key, value in notebook["parts"].items():
                if key == "code" or key.endswith(".py"):
                    column[f"{name}.{key}"] = value[:8]
                elif key.isidentifier() and key != "output_dir":
                    column[f"{name}.{key}"] = value
        columns.append(column)
    names = dict.fromkeys(name for column in columns for name in column)
    table = {name: [column.get(name, "-") for column in columns] for name in names}
    return {name: values for name, values in table.items() if len(set(map(repr, values))) > 1}


def sweep_table(folders: Sequence[str]) -> str:
    """A Markdown table of several runs: the parameters in which they differ, and what the notebooks reported."""
    settings = differing_settings([read(Path(folder) / "run.json") for folder in folders])
    table = {"run": [Path(folder).name for folder in folders]}
    table |= {name: values for name, values in settings.items() if "." in name}
    for column, (file, key) in SWEEP.items():
        values = [read(Path(folder) / file).get(key) or "-" for folder in folders]
        table[column] = [f"{value:.4g}" if isinstance(value, float) else value for value in values]
    return markdown(list(table), zip(*table.values(), strict=True))
