"""The filter of notebook 02 beyond one machine: the same functions as steps of a datatrove pipeline.

    pip install -r requirements-datatrove.txt
    python pipelines/datatrove_filter.py IN_FOLDER OUTPUT_DIR [--run data/runs/seed2024.yaml] [--tasks 8] [--workers 2]

IN_FOLDER holds the data set in any number of .jsonl, .jsonl.gz or .parquet files, taken in the order of their names;
`number` in the dropped rows counts within a file. Take a new OUTPUT_DIR for other data, parameters or --tasks.
Four stages, each in as many tasks as it allows, each skipping the tasks that an earlier run completed: count the
characters of every file; merge the counts; filter every file and count the characters of what is kept; merge those
counts and write the final files, which are those of the notebook. Parameters are the notebook's, changed by the run
file. For a cluster replace LocalPipelineExecutor below by datatrove's SlurmPipelineExecutor or RayPipelineExecutor
(its own arguments: partition, time, ...), with both folders on a disk that every node sees.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import papermill  # noqa: E402
import yaml  # noqa: E402
from datatrove.data import DocumentsPipeline  # noqa: E402
from datatrove.executor import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402

import helpers  # noqa: E402

NOTEBOOK = "02_filter_magpie"


class FilterStep(PipelineStep):
    """A step that reads and writes files itself; task number `rank` of `world_size` takes every world_size-th file."""

    type = "🔻 - FILTER"

    def __init__(self, source: str, output_dir: str, settings: helpers.FilterSettings) -> None:
        super().__init__()
        self.source, self.settings, self.output_dir = source, settings, Path(output_dir)
        self.work = self.output_dir / "filter_shards"

    def shards(self, rank: int, world_size: int) -> Iterator[tuple[str, helpers.Shard]]:
        """(name that sorts like the input, shard) of every shard of this task's files."""
        files = input_files(self.source)
        for index in range(rank, len(files), world_size):
            for number, shard in enumerate(helpers.read_shards(os.path.join(self.source, files[index]))):
                yield f"{index:06}-{number:06}", shard

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.work.mkdir(parents=True, exist_ok=True)
        with self.track_time("task"):
            self.process(rank, world_size)
        yield from ()  # the rows travel through files, not through datatrove's documents

    def process(self, rank: int, world_size: int) -> None:
        raise NotImplementedError


class CountCharacters(FilterStep):
    name = "count characters"

    def process(self, rank: int, world_size: int) -> None:
        rows, counts = 0, np.zeros(sys.maxunicode + 1, np.int64)
        for _, shard in self.shards(rank, world_size):
            codes, found = helpers.count_characters(shard, self.settings)
            counts[codes] += found
            rows += len(shard.lines)
        np.savez_compressed(self.work / f"counts-{rank:06}.npz", rows=rows, counts=counts)
        self.stat_update("rows", value=rows)


class MergeCounts(FilterStep):
    name = "merge counts"

    def process(self, rank: int, world_size: int) -> None:
        parts = [np.load(path) for path in sorted(self.work.glob("counts-*.npz"))]
        rows, counts = sum(int(part["rows"]) for part in parts), sum(part["counts"] for part in parts)
        rare = helpers.rare_characters(rows, counts, self.settings)
        helpers.write_json(self.work / "rare.json", [ord(character) for character in rare])


class FilterRows(FilterStep):
    name = "filter and count again"

    def process(self, rank: int, world_size: int) -> None:
        rare = "".join(map(chr, json.loads((self.work / "rare.json").read_text())))
        for name, shard in self.shards(rank, world_size):
            helpers.save_shard(self.work / f"{name}.jsonl", shard, self.settings, rare)
            self.stat_update("rows", value=len(shard.lines))


class Finish(FilterStep):
    name = "second count, final files"

    def process(self, rank: int, world_size: int) -> None:
        report = helpers.finish_filter(sorted(self.work.glob("*.jsonl")), self.output_dir, self.settings)
        helpers.write_json(self.output_dir / "filter_report.json", report)
        for reason, rows in report["reasons"].items():
            self.stat_update(f"dropped_{reason}", value=rows)


def input_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith((".jsonl", ".jsonl.gz", ".parquet")))


def filter_settings(run_file: str | None) -> helpers.FilterSettings:
    """The defaults of the notebook, changed by the run file."""
    defaults = papermill.inspect_notebook(str(ROOT / f"notebooks/{NOTEBOOK}.ipynb"))
    values = {name: ast.literal_eval(parameter["default"]) for name, parameter in defaults.items()}
    if run_file:
        values.update(yaml.safe_load(Path(run_file).read_text(encoding="utf-8"))[NOTEBOOK])
    fields = {name: values[name] for name in helpers.FilterSettings.__dataclass_fields__ if name in values}
    return helpers.FilterSettings(**helpers.load_filter_rules(ROOT / values["rules"]), **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN_FOLDER")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR")
    parser.add_argument("--run", help="run file whose filter parameters take the place of the notebook's defaults")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not os.path.isdir(options.source) or not input_files(options.source):
        parser.error(f"{options.source}: no folder with .jsonl, .jsonl.gz or .parquet files")
    arguments = (options.source, options.output_dir, filter_settings(options.run))
    executor = None
    for step, tasks in ((CountCharacters, options.tasks), (MergeCounts, 1), (FilterRows, options.tasks), (Finish, 1)):
        executor = LocalPipelineExecutor(
            [step(*arguments)],
            tasks=tasks,
            workers=options.workers,
            logging_dir=os.path.join(options.output_dir, "logs", step.__name__),
            depends=executor,
        )
    executor.run()


if __name__ == "__main__":
    main()
