"""The filter of notebook 02 for data that does not fit into memory: the same row functions in a datatrove pipeline.

    pip install -r requirements-datatrove.txt
    python pipelines/datatrove_filter.py IN_FOLDER OUTPUT_DIR [--rules FILE] [--tasks 8] [--workers 2]

IN_FOLDER holds the data set in .jsonl, .jsonl.gz or .parquet files that each fit into memory, taken in the order of
their names. The rows kept are those of the notebook; `number` in the dropped rows counts within a file, and the report
lacks the lists of rules and characters. Finished tasks are skipped: take a new OUTPUT_DIR for other data, rules or
--tasks. On a cluster, SlurmPipelineExecutor or RayPipelineExecutor takes the place of LocalPipelineExecutor.
"""

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers


class Stage(PipelineStep):
    """Runs the method `name` on the files of a task, given by their indices; what it makes is kept in `parts`."""

    def __init__(self, name, source, output_dir, rules) -> None:
        self.type, self.name, self.rules = "🔻 - FILTER", name, rules
        super().__init__()
        paths = [path for end in (".jsonl", ".jsonl.gz", ".parquet") for path in Path(source).glob(f"*{end}")]
        self.files = sorted(map(str, paths))
        self.output_dir, self.parts = Path(output_dir), Path(output_dir, "filter_parts")

    def run(self, data, rank=0, world_size=1):
        self.parts.mkdir(parents=True, exist_ok=True)
        with self.track_time("task"):
            getattr(self, self.name)(rank, range(rank, len(self.files), world_size))
        yield from ()

    def total(self, name):
        """Rows and counts of characters, summed over all tasks."""
        parts = [np.load(path) for path in self.parts.glob(f"{name}-*.npz")]
        return sum(int(part["rows"]) for part in parts), sum(part["counts"] for part in parts)

    def read(self, index):
        """The rows of a file."""
        return [helpers.parse_row(row) for row in helpers.files.load_rows(self.files[index])]

    def count(self, rank, files):
        rows, counts = 0, 0
        for index in files:
            texts = [helpers.row_texts(row, self.rules)[0] for row in self.read(index)]
            rows, counts = rows + len(texts), counts + helpers.count_characters(texts)
            if self.rules.duplicates:
                replaced = ({f: helpers.replace_strings(t, self.rules) for f, t in row.items()} for row in texts if row)
                (self.parts / f"keys-{index:06}.bin").write_bytes(b"".join(set(map(helpers.row_key, replaced))))
        np.savez_compressed(self.parts / f"count-{rank:06}.npz", rows=rows, counts=counts)

    def keys_before(self, index):
        """The keys of all rows in earlier files."""
        keys = b"".join(path.read_bytes() for path in sorted(self.parts.glob("keys-*.bin"))[:index])
        return {keys[start : start + 16] for start in range(0, len(keys), 16)}

    def judge(self, rank, files):
        (_, counts), counts_after = self.total("count"), 0
        rare = helpers.rare_characters(counts, self.rules.rare_below)
        for index in files:
            rows = self.read(index)
            texts_of = (helpers.row_texts(row, self.rules) for row in rows)
            passed, dropped, _ = helpers.judge_rows(rows, texts_of, self.rules, rare, self.keys_before(index))
            counts_after = counts_after + helpers.count_characters(texts for _, _, texts in passed)
            passed = [(number, row.row, texts) for number, row, texts in passed]
            helpers.files.write_jsonl(self.parts / f"judged-{index:06}.jsonl", [{"passed": passed, "dropped": dropped}])
        np.savez_compressed(self.parts / f"again-{rank:06}.npz", rows=0, counts=counts_after)

    def write(self, rank, files):
        rare = helpers.rare_characters(self.total("again")[1], self.rules.rare_after_below)
        for index in files:
            judged = helpers.files.load_rows(self.parts / f"judged-{index:06}.jsonl")[0]
            passed = [(number, helpers.parse_row(row), texts) for number, row, texts in judged["passed"]]
            passed, late = helpers.drop_rare_afterwards(passed, rare)
            dropped = judged["dropped"] + late
            kept = (helpers.written_row(row, texts, self.rules) for _, row, texts in passed)
            helpers.files.write_jsonl(self.parts / f"filtered_magpie-{index:06}.jsonl", kept)
            helpers.files.write_jsonl(self.parts / f"dropped_magpie-{index:06}.jsonl", dropped)
            reasons = Counter(record["reason"] for record in dropped)
            helpers.files.write_jsonl(self.parts / f"reasons-{index:06}.jsonl", [{"kept": len(passed), **reasons}])

    def join(self, rank, files):
        for name in ("filtered_magpie", "dropped_magpie"):
            with helpers.files.atomic_write(self.output_dir / f"{name}.jsonl", binary=True) as joined:
                for index in files:
                    with open(self.parts / f"{name}-{index:06}.jsonl", "rb") as file:
                        shutil.copyfileobj(file, joined)
        counted = [Counter(*helpers.files.load_rows(path)) for path in self.parts.glob("reasons-*.jsonl")]
        reasons = sum(counted, Counter())
        report = helpers.filter_counts(self.rules, self.total("count")[0], reasons.pop("kept", 0), reasons)
        helpers.files.write_json(self.output_dir / "filter_report.json", report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN_FOLDER")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR")
    parser.add_argument("--rules", default=f"{sys.path[0]}/data/filter_rules_reviewed.json")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options, executor = parser.parse_args(), None
    arguments = options.source, options.output_dir, helpers.rules.load(options.rules)
    if not Stage("", *arguments).files:
        parser.error(f"{options.source}: no folder with .jsonl, .jsonl.gz or .parquet files")
    for name, tasks in {**dict.fromkeys(("count", "judge", "write"), options.tasks), "join": 1}.items():
        stage, logs = Stage(name, *arguments), f"{options.output_dir}/logs/{name}"
        executor = LocalPipelineExecutor([stage], tasks, options.workers, logs, depends=executor)
    executor.run()
