"""Compare finished runs with the first of them: `python compare.py outputs/base outputs/r32 outputs/r64`.

Reads output.jsonl, scores.json and run.json of each run and writes comparison.md, comparison.csv and comparison.png:
the settings that differ, every measure with its interval, and the difference to the first run, paired task by task,
with a verdict.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine import files, reports
from helpers import MEASURES, RecipeError, mean_interval

# Verdicts on a difference, besides better and worse.
UNTOLD = ("within noise", "unclear (interval and test disagree)", "too few tasks to tell")


def read_scored_run(folder: Path) -> dict[str, Any]:
    """A finished run: `name`, `records` (run.json), `tasks` ({task_id: input}) and from scores.json `digest` (of the
    tasks), `seen` (task_ids of near-duplicates) and `scores`, a row per task and a column per measure.

    Raises RecipeError if the run is not finished, a file is damaged, or the scores are those of other answers.
    """
    records, report = reports.read(folder / "run.json"), reports.read(folder / "scores.json")
    missing = [name for name in ("output.jsonl", "scores.json") if not (folder / name).is_file()]
    if missing or (records and "04_rag_inference" not in records):
        what = f"there is no {' and no '.join(missing)}" if missing else "notebook 04 was interrupted"
        raise RecipeError(f"{folder}: not a finished run ({what}); run notebook 04 with this output_dir to its end")
    if report.get("output_sha256") != files.sha256(folder / "output.jsonl"):
        raise RecipeError(f"{folder}: scores.json is that of another output.jsonl; run notebook 04 again to its end")
    tasks = {row["task_id"]: row["input"] for row in files.load_rows(folder / "output.jsonl")}
    try:
        scores = pd.DataFrame(report["per_task"]).set_index("task_id").reindex(columns=list(MEASURES)).astype(float)
        seen, digest = {found["task_id"] for found in report["near_duplicates"]}, report["tasks_sha256"]
    except (KeyError, TypeError, ValueError):
        raise RecipeError(f"{folder}/scores.json: not what notebook 04 writes; run it again to its end") from None
    return {"name": str(folder), "records": records, "tasks": tasks, "digest": digest, "seen": seen, "scores": scores}


def check_same_tasks(first: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise RecipeError, with the reason, unless both runs answered the same tasks with the same references."""
    if run["digest"] == first["digest"]:
        return
    only = run["tasks"].keys() ^ first["tasks"].keys()
    changed = [key for key, text in first["tasks"].items() if run["tasks"].get(key, text) != text]
    if only:
        reason = f"task_id {sorted(only, key=str)[:5]} ({len(only)}) are in one of them only"
    elif changed:
        reason = f"task_id {changed[:5]} ({len(changed)}) have another question"
    else:
        reason = "the references or the order of the tasks differ"
    raise RecipeError(f"{first['name']} and {run['name']} answered different tasks: {reason}")


def verdict(differences: list[float], direction: int, low: float | None, high: float | None) -> str:
    """In plain words what paired differences with the 95 % interval from `low` to `high` show.

    They are clear where the interval leaves out zero and a sign-flip test (scipy) agrees at 5 %, within noise where
    neither does. The test holds its 5 % of false alarms with few tasks, too; of bootstrap intervals over 20 tasks 8 to
    14 in 100 miss the truth when most differences are 0 or a few are large.
    """
    from scipy.stats import permutation_test

    if len(differences) < 6:  # below, no result of this test is rarer than 5 %
        return UNTOLD[2]
    test = permutation_test((differences,), np.mean, permutation_type="samples", vectorized=True, rng=0)
    apart = low is not None and not low <= 0 <= high
    if apart != (test.pvalue < 0.05):
        return UNTOLD[1]
    if not apart:
        return UNTOLD[0]
    if not direction:
        return "higher" if test.statistic > 0 else "lower"
    return "better" if test.statistic * direction > 0 else "worse"


def compare_scores(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Every measure of every run with its interval, and the paired difference to the first run with its own.

    If tasks are near-duplicates of what a run has seen, everything is given a second time without them (`subset`
    "without near-duplicates"). Rows are in the order of MEASURES, then of the runs.
    """
    seen = set().union(*(run["seen"] for run in runs))
    rows = []
    for subset, without in {"all": set(), **({"without near-duplicates": seen} if seen else {})}.items():
        for measure, (_, direction) in MEASURES.items():
            first = runs[0]["scores"][measure].dropna()
            for run in runs:
                own = run["scores"][measure].dropna().drop(without, errors="ignore")
                row = {"run": run["name"], "measure": measure, "subset": subset, **mean_interval(own.tolist())}
                if run is not runs[0]:
                    pairs = [value - first[task] for task, value in own.items() if task in first.index]
                    interval = mean_interval(pairs)
                    row |= {f"difference_{key}": value for key, value in interval.items()}
                    row["verdict"] = verdict(pairs, direction, interval["low"], interval["high"])
                if len(own):
                    rows.append(row)
    return pd.DataFrame(rows).astype({"difference_tasks": "Int64"})


def with_interval(mean: float, low: float, high: float, sign: str = "") -> str:
    """ "3.2 [2.9, 3.5]", "3.2" where there is no interval, "" where there is nothing."""
    interval = "" if pd.isna(low) else f" [{low:{sign}.3g}, {high:{sign}.3g}]"
    return "" if pd.isna(mean) else f"{mean:{sign}.3g}{interval}"


def sentence(verdicts: pd.Series) -> str:
    """One run's verdicts (by measure) in words."""
    clear = ", ".join(f"{measure} is {text}" for measure, text in verdicts.items() if text not in UNTOLD)
    others = [(", ".join(verdicts.index[verdicts == text]), text) for text in UNTOLD]
    untold = "".join(f"; {measures}: {text}" for measures, text in others if measures)
    return f"{clear or 'nothing differs'} by more than noise explains{untold}."


def comparison_text(runs: list[dict[str, Any]], rows: pd.DataFrame) -> str:
    """The comparison in Markdown: one table of settings, one of scores, sentences, and what the measures mean."""
    names = [reports.one_line(run["name"]) for run in runs]
    settings = reports.differing_settings([run["records"] for run in runs])
    # Where not all runs ran a notebook with run.py, its parameters say nothing: only who ran it is shown.
    order = sorted(settings, key=lambda key: ("." in key, key))
    shown = [[key, *settings[key]] for key in order if "." not in key or key.partition(".")[0] not in settings]
    text = f"# Comparison of {len(runs)} runs over {len(runs[0]['tasks'])} tasks\n\n"
    text += f"Settings that differ:\n\n{reports.markdown(['', *names], shown)}" if shown else "No setting differs.\n"
    text += "\nMean and 95 % bootstrap interval; the difference is paired, task by task, against the first run.\n"
    text += (
        "A difference is clear where its interval leaves out zero and a sign-flip test at 5 %, which is right with\n"
    )
    text += "few tasks, too, agrees. It is within noise where neither does, and unclear where only one does.\n"
    for subset, part in rows.groupby("subset", sort=False):
        table = part[["measure", "run", "tasks"]].assign(
            mean=[with_interval(*values) for values in part[["mean", "low", "high"]].values],
            difference=[with_interval(*values, "+") for values in part.filter(regex="^difference_[mlh]").values],
            verdict=part["verdict"].fillna(""),
        )
        text += f"\n## Tasks: {subset}\n\n{reports.markdown(list(table), table.itertuples(index=False))}\n"
        for run, name in zip(runs[1:], names[1:], strict=True):
            verdicts = part[part["run"] == run["name"]].set_index("measure")["verdict"].dropna()
            text += f"- {name} against {names[0]}: {sentence(verdicts)}\n"
    legend = "".join(f"- {measure}: {MEASURES[measure][0]}\n" for measure in rows["measure"].unique())
    told = rows["verdict"].notna().sum()
    return f"{text}\n{legend}\nOf {told} comparisons about one in twenty comes out clear by chance alone.\n"


def plot_comparison(names: list[str], rows: pd.DataFrame) -> Any:
    """A matplotlib figure of the scores over all tasks: one panel per measure, one line per run."""
    import matplotlib_fontja  # noqa: F401  brings a Japanese font
    from matplotlib.figure import Figure

    panels = list(rows[rows["subset"] == "all"].groupby("measure", sort=False))
    lines = -(-len(panels) // 3)
    figure = Figure(figsize=(11, (1.1 + 0.25 * len(names)) * lines), layout="constrained")
    axes = figure.subplots(lines, 3, sharey=True, squeeze=False).flat
    for axis, (measure, part) in zip(axes, panels, strict=False):
        places = [names.index(name) for name in part["run"]]
        axis.hlines(places, part["low"].fillna(part["mean"]), part["high"].fillna(part["mean"]), color="tab:blue")
        axis.plot(part["mean"], places, "o", color="tab:blue")
        axis.set_title(measure, fontsize=9)
        axis.set_xlabel(MEASURES[measure][0], fontsize=8)
        axis.set_yticks(range(len(names)), [reports.one_line(name) for name in names], parse_math=False)
        axis.set_ylim(len(names) - 0.5, -0.5)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    return figure


def compare_runs(folders: list[str | Path], out: str | Path) -> str:
    """Compare finished runs with the first of them: writes comparison.md, .csv and .png below `out`, returns the text.

    Raises RecipeError for fewer than two runs, an unfinished or damaged run, and runs over different tasks.
    """
    paths, out = [Path(folder).expanduser() for folder in folders], Path(out).expanduser()
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise RecipeError("compare.py needs two run folders or more, each named once")
    runs = [read_scored_run(path) for path in paths]
    for run in runs[1:]:
        check_same_tasks(runs[0], run)
    rows = compare_scores(runs)
    text = comparison_text(runs, rows)
    with files.atomic_write(out / "comparison.md") as file:
        file.write(text)
    with files.atomic_write(out / "comparison.csv") as file:
        rows.to_csv(file, index=False, lineterminator="\n")
    with files.atomic_write(out / "comparison.png", binary=True) as file:
        plot_comparison([run["name"] for run in runs], rows).savefig(file, dpi=120, format="png")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output_dir of a finished run")
    parser.add_argument("--out", default="outputs/compare", help="folder for the table and the picture")
    args = parser.parse_args()
    try:
        print(compare_runs(args.run_dirs, args.out))
    except (RecipeError, OSError) as error:
        sys.exit(f"compare.py: {reports.one_line(error)}")
