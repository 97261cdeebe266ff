"""Which parts of the recipe help? Train and score a small model once per part and seed, and print one table.

    python benchmarks/study.py --dataset MAGPIE.jsonl --tasks TASKS.jsonl --qa QA.jsonl --jobs 8
    python benchmarks/study.py --report     # only table and picture, from benchmarks/study/scores.csv
    python benchmarks/study.py --report benchmarks/study/filter_and_format.csv    # only the table of other scores

The arms are in data/runs/study/parts.yaml, what they share in base.yaml beside it. Every arm is a run of the notebooks
by run.py, so that a study that was interrupted goes on with what is missing. The model is that of `make cpu-real`.

No trained ColBERT is needed: the examples are found by a checkpoint made here, whose MaxSim counts the words that a
task and an example share.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import helpers  # noqa: E402
from engine import reports  # noqa: E402
from run_file import read_notebook  # noqa: E402

STUDY = yaml.safe_load((ROOT / "data/runs/study/parts.yaml").read_text(encoding="utf-8"))
ARMS, SEEDS = STUDY["arms"], STUDY["seeds"]
MAGPIE = "llm-jp/magpie-sft-v1.0"
OWN_WORDS = ("rows", "needs_rows", "examples", "model", "export", "preferences", "against", "seeds")
# Columns of the table: what is measured, how it is shown, and its better direction.
MEASURES = {
    "nll_tasks": ("reference of a task, nats per character", -1),
    "nll_held_out": ("answer of a held-out row, nats per character", -1),
    "loop": ("answers with a loop", -1),
    "cut": ("answers cut at 192 tokens", -1),
    "japanese": ("share of Japanese", 1),
    "chrf": ("chrF", 1),
    "rouge_l": ("ROUGE-L", 1),
}
COLUMNS = ["arm", "seed", "task_id", "nll", "chrf", "rouge_l", "japanese", "loop", "cut"]
DIGITS = {"nll": 4, "chrf": 2, "rouge_l": 2, "japanese": 4}
UNTOLD = "not clear"  # also where an interval leaves out zero: it is not corrected for the number of comparisons


# 1. Rows, tasks and examples


def prepare(args: argparse.Namespace) -> None:
    """Write below args.out the rows of every filter and seed (equal tokens), tasks, random examples and a retriever."""
    rules = json.loads((ROOT / "data/filter_rules_2024.json").read_text(encoding="utf-8"))
    off = {"replacements": [], "ng": [], "rare_below": 0, "rare_after_below": 0, "japanese_percent": 0}
    helpers.files.write_json(args.out / "no_rules.json", rules | off)
    files = {"none": args.out / "no_rules.json"}
    files |= {name: ROOT / f"data/filter_rules_{name}.json" for name in ("2024", "reviewed")}
    kept = {}
    for name, file in files.items():
        folder = args.out / "filter" / name
        settings = [f"output_dir={folder}", f"rules={file}"]
        if args.dataset != MAGPIE:  # else at the notebook's own revision
            settings += [f"dataset={args.dataset}", "dataset_revision="]
        run_series("02", [*settings, "02_filter_magpie.allow_licences=unknown"], folder / "log.txt", {})
        kept[name] = {row["id"]: row for row in helpers.files.load_rows(folder / "filtered_magpie.jsonl")}
    for name, file in (text.split("=") for text in args.rows):
        kept[name] = {row["id"]: row for row in helpers.files.load_rows(file)}
    tokenizer = helpers.models.load_tokenizer(args.model, "")
    limit = yaml.safe_load((ROOT / "data/runs/study/base.yaml").read_text("utf-8"))["03_sft"]["max_seq_length"]

    def tokens(row: dict) -> int:
        return len(helpers.encode(tokenizer, helpers.sft_text(row["instruction"], row["response"], "")).ids) + 1

    both = [key for key in kept["reviewed"] if key in kept["2024"] and tokens(kept["reviewed"][key]) <= limit]
    held_out = random.Random(0).sample(both, min(STUDY["held_out"], len(both) // 4))
    for name, rows in kept.items():
        lengths = {key: min(tokens(row), limit) for key, row in rows.items() if key not in set(held_out)}
        total = {}
        for seed in SEEDS:
            order, total[seed] = random.Random(seed).sample(sorted(lengths), len(lengths)), 0
            drawn = []
            for key in order:
                if total[seed] >= args.tokens:
                    break
                drawn.append(rows[key])
                total[seed] += lengths[key]
            helpers.files.write_jsonl(args.out / f"rows/{name}-{seed}.jsonl", drawn)
        print(f"rows, filter {name}: {len(rows):,} kept; tokens drawn per seed: {total}", flush=True)
    examples = helpers.files.load_pairs(args.qa)
    for seed in SEEDS:
        for k in {arm["k"] for arm in ARMS.values() if arm.get("examples") == "random"}:
            drawn = random.Random(seed).sample(examples, k)
            helpers.files.write_jsonl(args.out / f"examples/{k}-{seed}.jsonl", drawn)
    shared_words_retriever(args.out / "words", [example["instruction"] for example in examples])
    tasks = [task | {"task_id": f"task {task['task_id']}"} for task in helpers.files.load_tasks(args.tasks)]
    rows = [kept["reviewed"][key] for key in held_out]
    tasks += [{"task_id": f"row {row['id']}", "input": row["instruction"], "output": row["response"]} for row in rows]
    helpers.files.write_jsonl(args.out / "tasks.jsonl", tasks)


def shared_words_retriever(folder: Path, documents: list[str]) -> None:
    """A ColBERT checkpoint whose MaxSim counts the query's words that a document holds, too.

    Its word vectors are the axes of a space, so that equal words have a cosine of 1 and others of about 0. Words that
    more than a tenth of the documents hold say nothing and are left unknown, as are words that no document holds.
    """
    from safetensors.torch import save_file
    from transformers import BertConfig, BertJapaneseTokenizer, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
    options = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    options["subword_tokenizer_type"] = "wordpiece"
    file = folder / "vocab.txt"
    file.write_text("\n".join(special), encoding="utf-8")
    cut = BertJapaneseTokenizer(str(file), **options).word_tokenizer.tokenize
    held = pd.Series([word for document in documents for word in set(cut(document))]).value_counts()
    words = sorted(held.index[held <= max(1, len(documents) / 10)])
    file.write_text("\n".join(special + words) + "\n", encoding="utf-8")
    tokenizer, size = BertJapaneseTokenizer(str(file), **options), len(special) + len(words)
    config = BertConfig(
        architectures=["HF_ColBERT"], vocab_size=size, hidden_size=size, num_hidden_layers=0, num_attention_heads=1,
        intermediate_size=8, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    weights = {f"bert.{name}": torch.zeros_like(value) for name, value in BertModel(config).state_dict().items()}
    weights["bert.embeddings.word_embeddings.weight"] = torch.eye(size)
    weights["bert.embeddings.LayerNorm.weight"] = torch.ones(size)
    weights["linear.weight"] = torch.eye(size)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_token": "[Q]", "doc_token": "[D]",
        "query_maxlen": 32, "doc_maxlen": 300, "attend_to_mask_tokens": False, "mask_punctuation": True,
        "similarity": "cosine", "dim": size, "nbits": 2,
    }  # fmt: skip
    (folder / "artifact.metadata").write_text(json.dumps(settings), encoding="utf-8")


# 2. Runs


def run_series(notebooks: str, settings: list[str], log: Path, environment: dict[str, str]) -> None:
    """run.py with some notebooks ("02", "04", or "03-04"), its output in `log`; RecipeError with its last line."""
    chosen = ["--from", "03"] if notebooks == "03-04" else ["--only", notebooks]
    command = [sys.executable, "run.py", "data/runs/study/base.yaml", *chosen]
    execute(command + [part for setting in settings for part in ("--set", setting)], log, environment)


def execute(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run one command of the study, its output in `log`; RecipeError with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment, check=False)
    if done.returncode:
        raise helpers.RecipeError(f"{log}: {log.read_text(encoding='utf-8', errors='replace').strip()[-300:]}")


class Runner:
    """Starts the arms, `jobs` at a time, each job on one of the GPUs; an arm waits for those that it builds on."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.runs, self.pool = args, {}, ThreadPoolExecutor(args.jobs)
        gpus = range(torch.cuda.device_count())
        self.environment = [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus] or [{}]
        self.notebooks = {key: read_notebook(next(ROOT.glob(f"notebooks/{key}_*.ipynb")))[1] for key in ("03", "04")}
        self.number = itertools.count()

    def folder(self, arm: str, seed: int) -> Path:
        return self.args.out / "runs" / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"

    def start(self, arm: str, seed: int) -> Future:
        """The future of one run, started if it is not yet."""
        if (arm, seed) not in self.runs:
            values = ARMS[arm]
            needs = [self.start("1 epoch", seed)] if values.get("model") == "merged" else []
            needs += [self.start("preferences", seed)] if values.get("rows") == "pairs" else []
            if not needs and not self.trains(arm):
                needs = [self.start("base", seed)]
            self.runs[arm, seed] = self.pool.submit(self.run, arm, seed, needs)
        return self.runs[arm, seed]

    def trains(self, arm: str) -> bool:
        """Whether an arm has a training of its own; the others answer with the adapter of `base`."""
        own = {key for key in ARMS[arm] if key in self.notebooks["03"] or key == "rows"}
        return bool(own) or arm in ("base", "the same again")

    def run(self, arm: str, seed: int, needs: list[Future]) -> None:
        """Train, answer and score one arm with one seed."""
        for need in needs:  # started before this one, so that one of the workers has it
            need.result()
        args, values, folder = self.args, ARMS[arm], self.folder(arm, seed)
        environment, log = self.environment[next(self.number) % len(self.environment)], folder / "log.txt"
        rows = args.out / f"rows/{values.get('rows', 'reviewed')}-{seed}.jsonl"
        if values.get("rows") == "pairs":
            rows = self.folder("preferences", seed) / "dpo/pairs.jsonl"
        examples = args.out / f"examples/{values.get('k')}-{seed}.jsonl" if "examples" in values else args.qa
        settings = {"output_dir": folder, "model": args.model, "03_sft.train_data": rows, "03_sft.qa_data": args.qa}
        settings |= {"03_sft.seed": seed, "04_rag_inference.train_data": rows, "04_rag_inference.qa_data": examples}
        settings |= {"tasks": args.out / "tasks.jsonl", "retriever": args.out / "words", "allow_licences": "unknown"}
        notebooks = "03-04"
        if values.get("model") == "merged":
            settings["model"] = self.folder("1 epoch", seed) / "merged"
        if "preferences" in values:
            command = [sys.executable, "benchmarks/preferences.py", "dpo", "--model", settings["model"], "--rows", rows]
            execute([*map(str, command), "--seed", str(seed), "--out", str(folder / "dpo")], log, environment)
            notebooks, settings["adapter"] = "04", folder / "dpo/adapter"
        elif not self.trains(arm):
            notebooks, settings["adapter"] = "04", self.folder("base", seed) / "adapter"
        settings |= {key: value for key, value in values.items() if key not in OWN_WORDS}
        started = time.time()
        try:
            run_series(notebooks, [f"{key}={value}" for key, value in settings.items()], log, environment)
            if "export" in values:
                execute([sys.executable, "export.py", str(folder)], log, environment)
            print(f"{arm}, seed {seed}: {time.time() - started:.0f} s", flush=True)
        except helpers.RecipeError as error:
            print(f"{arm}, seed {seed}: failed, {error}", flush=True)
            raise


def collect(runner: Runner) -> pd.DataFrame:
    """The scores of every finished run, also of an earlier call: a row per arm, seed and task."""
    tables = []
    for arm, seed in itertools.product(ARMS, SEEDS):
        file = runner.folder(arm, seed) / "scores.json"
        if file.is_file():
            table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8"))["per_task"])
            tables.append(table.assign(arm=arm, seed=seed))
    scores = pd.concat(tables)
    return scores[COLUMNS].round(DIGITS)


# 3. Effects


def part_of(scores: pd.DataFrame, measure: str) -> tuple[pd.DataFrame, str]:
    """The rows of `scores` that a measure of the table is about, and its column."""
    kind = {"nll_tasks": "task ", "nll_held_out": "row "}.get(measure, "")
    return scores[scores["task_id"].str.startswith(kind)], "nll" if kind else measure


def differences(scores: pd.DataFrame, arm: str, against: str, measure: str) -> np.ndarray:
    """`arm` minus `against`, paired: (seeds that both have, tasks). A run without seeds is paired with every seed."""
    chosen, name = part_of(scores, measure)
    wide = [chosen[chosen["arm"] == a].pivot(index="seed", columns="task_id", values=name) for a in (arm, against)]
    wide = [table.astype(float) for table in wide]
    if "seeds" in ARMS[arm]:
        wide[0] = wide[0].loc[[*wide[0].index] * len(wide[1])].set_axis(wide[1].index)
    seeds = wide[0].index.intersection(wide[1].index)
    found = (wide[0].loc[seeds] - wide[1].loc[seeds]).to_numpy()
    return found[:, ~np.isnan(found).any(axis=0)]


def effect(found: np.ndarray, resamples: int = 29_999) -> dict[str, float]:
    """Mean difference, its 95 % interval and a p-value for differences (seeds, tasks).

    The interval is a bootstrap over seeds and tasks; p comes from a sign-flip test of the tasks' means over the seeds.
    """
    from scipy.stats import permutation_test

    draw = np.random.default_rng(0)
    seeds, tasks = found.shape
    means = [found[draw.integers(seeds, size=seeds)][:, draw.integers(tasks, size=tasks)].mean() for _ in range(9_999)]
    by_task = found.mean(axis=0)
    test = {"permutation_type": "samples", "n_resamples": resamples, "batch": 5_000, "rng": 0}
    p = permutation_test((by_task,), lambda x, axis: x.mean(axis=axis), vectorized=True, **test).pvalue
    low, high = np.percentile(means, [2.5, 97.5])
    same_sign = len(set(np.sign(found.mean(axis=1)))) == 1
    ends = {"difference": by_task.mean(), "low": low, "high": high}
    return ends | {"p": float(p), "same_sign": same_sign, "seeds": seeds, "tasks": tasks}


def holm(p: pd.Series) -> pd.Series:
    """p-values corrected for their number (Holm): the smallest times n, the next times n - 1, and so on."""
    ordered = p.sort_values()
    return (ordered * np.arange(len(p), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def effects(scores: pd.DataFrame) -> pd.DataFrame:
    """Every arm against its partner in every measure, with a verdict after the correction for all comparisons."""
    there, rows = set(scores["arm"]), []
    for arm, values in ARMS.items():
        against = values.get("against", "base")
        if arm not in ("base", "the same again") and {arm, against} <= there:
            for measure in MEASURES:
                found = differences(scores, arm, against, measure)
                if found.any():  # the same model gives the same likelihood, however it answers
                    rows.append({"arm": arm, "against": against, "measure": measure} | effect(found))
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p"])
    better = np.sign(table["difference"]) * table["measure"].map(lambda name: MEASURES[name][1])
    clear = (table["p_corrected"] < 0.05) & table["same_sign"] & (table["seeds"] >= len(SEEDS))
    table["verdict"] = np.where(clear, np.where(better > 0, "better", "worse"), UNTOLD)
    return table


def effects_table(table: pd.DataFrame, scores: pd.DataFrame) -> str:
    """The table of the study: an arm per row, a measure per column; bold is clear, after the correction."""
    head = ["changed", "against", *(text for text, _ in MEASURES.values())]
    parts = [part_of(scores[scores["arm"] == "base"], measure) for measure in MEASURES]
    lines = [["base itself", "", *(f"{part[name].mean():.3g}" for part, name in parts)]]
    for (arm, against), part in table.groupby(["arm", "against"], sort=False):
        cells = dict.fromkeys(MEASURES, "")  # empty: cannot differ
        for row in part.itertuples():
            text = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            cells[row.measure] = text if row.verdict == UNTOLD else f"**{text}** {row.verdict}"
        seeds = "" if part["seeds"].min() >= len(SEEDS) else f" ({part['seeds'].min()} seeds: no claim)"
        lines.append([arm + seeds, against, *cells.values()])
    return reports.markdown(head, lines)


def plot(table: pd.DataFrame) -> object:
    """A matplotlib figure: a panel per measure, a line per arm; what is clear is filled, what cannot differ is empty.

    The model without fine-tuning is left out: it lies so far away that nothing else could be seen.
    """
    from matplotlib.figure import Figure

    shown = ["nll_tasks", "nll_held_out", "loop", "chrf"]
    partner = table[table["arm"] != "no fine-tuning"].groupby("arm", sort=False)[["against", "seeds"]].first()
    names = []
    for row in partner.itertuples():
        few = "" if row.seeds >= len(SEEDS) else f", {row.seeds} seeds"
        names.append(f"{row.Index}{few}" if row.against == "base" else f"{row.Index}{few}\n(against {row.against})")
    figure = Figure(figsize=(12, 0.6 + 0.34 * len(names)), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        part = table[table["measure"] == measure].set_index("arm").reindex(partner.index)
        for place, row in enumerate(part.itertuples()):
            color = {"better": "tab:green", "worse": "tab:red"}.get(row.verdict, "0.55")
            axis.hlines(place, row.low, row.high, color=color)
            axis.plot(row.difference, place, "o", color=color, markerfacecolor=color if color[0] == "t" else "white")
        axis.axvline(0, color="0.8", zorder=0)
        text, direction = MEASURES[measure]
        axis.set_title(text.replace(", ", ",\n"), fontsize=9)
        axis.set_xlabel("difference; " + ("left is better" if direction < 0 else "right is better"), fontsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
    return figure


def report(scores: pd.DataFrame, folder: Path, picture: Path) -> None:
    """Print the table; write effects.csv and table.md into `folder`, and the picture."""
    table = effects(scores)
    text = effects_table(table, scores)
    with helpers.files.atomic_write(folder / "effects.csv") as file:
        table.drop(columns="same_sign").to_csv(file, index=False, float_format="%.5g", lineterminator="\n")
    with helpers.files.atomic_write(folder / "table.md") as file:
        file.write(text)
    with helpers.files.atomic_write(picture, binary=True) as file:
        plot(table).savefig(file, dpi=110, format="png")
    print(f"\n{text}\n{len(table)} comparisons; bold: clear at 5 % after Holm's correction, the same sign in all seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=MAGPIE, help="rows to filter and to train on")
    parser.add_argument("--tasks", default="elyza/ELYZA-tasks-100", help="tasks with references")
    parser.add_argument("--qa", default="tomo1222/Japanese-QA111dataset", help="pairs, also the examples")
    parser.add_argument("--model", default="models/gemma-3-270m", help="`make models/gemma-3-270m/tokenizer.json`")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="only these (see parts.yaml)")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME=FILE", help="rows that another filter has kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--tokens", type=int, default=STUDY["tokens"], help="of an epoch (parts.yaml)")
    stored = ROOT / "benchmarks/study"
    own = stored / "scores.csv"
    parser.add_argument("--report", nargs="?", const=own, metavar="SCORES", help="only the table, of stored scores")
    args = parser.parse_args()
    if args.report:
        scores = pd.read_csv(args.report)
        if args.report == own:
            return report(scores, stored, ROOT / "docs/study.png")
        return print(effects_table(effects(scores), scores))
    os.chdir(ROOT)
    started = time.time()
    prepare(args)
    runner = Runner(args)
    # First what others wait for and what takes longest, then one seed after the other: an early end leaves whole seeds.
    first = ["1 epoch", "base", "3 epochs", "preferences"]
    given = {text.split("=")[0] for text in args.rows}
    arms = args.arms or [arm for arm, values in ARMS.items() if "needs_rows" not in values or values["rows"] in given]
    chosen = [(arm, seed) for seed in args.seeds for arm in arms if seed in ARMS[arm].get("seeds", SEEDS)]
    for arm, seed in sorted(chosen, key=lambda run: first.index(run[0]) if run[0] in first else len(first)):
        runner.start(arm, seed)
    failed = [name for name, future in runner.runs.items() if future.exception()]
    scores = collect(runner)
    with helpers.files.atomic_write(args.out / "scores.csv") as file:
        scores.to_csv(file, index=False, lineterminator="\n")
    print(f"{len(runner.runs)} runs, {len(failed)} failed, {time.time() - started:.0f} s")
    report(scores, args.out, args.out / "study.png")
    sys.exit(f"failed: {failed}" if failed else None)


if __name__ == "__main__":
    main()
