"""The filter beside the algorithm of 2024, on one corpus and in one run.

    python benchmarks/filter.py [--input ROWS.jsonl] [--rows 50000]

The corpus is grown from the input: its rows first, then rows of new combinations of their sentences. A sentence that
holds a character rare in the input is used once only: in real text the tail of rare characters stays as long as the
corpus grows. Prints Markdown: rows/s, MB/s, memory, the ratios to the algorithm of 2024 and to cld2
alone on the texts that reach it with the rules of 2024, and the share of each stage with the rules of 2024 and with the
reviewed ones; fails if the survivors differ from those of 2024. The times include reading and writing files.
Each time is that of the fastest of three runs, for the others also tell what else the machine was doing.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/oracles")]
import filter_2024  # noqa: E402
import pycld2  # noqa: E402

import helpers  # noqa: E402

RULES, REVIEWED = (ROOT / f"data/filter_rules_{name}.json" for name in ("2024", "reviewed"))


def grow(source: str, target: Path, rows: int) -> None:
    """Write `rows` rows made from those of `source`; the same file for the same arguments."""
    chance = random.Random(0)
    given = helpers.files.load_rows(source)
    texts = [turn["content"] for row in given for turn in row["conversations"] if isinstance(turn.get("content"), str)]
    counts = Counter("".join(texts))
    rare = {character for character, count in counts.items() if count < 20}

    def sentences(text: str) -> list[str]:
        return [part for part in re.split(r"(?<=[。？！\n])", text) if part]

    pool = [part for text in texts for part in sentences(text) if part.strip() and rare.isdisjoint(part)]
    usable = [row for row in given if all(isinstance(turn["content"], str) for turn in row["conversations"])]

    def grown() -> Iterator[dict[str, Any]]:
        yield from given[:rows]
        for number in range(len(given), rows):
            turns = []
            for turn in chance.choice(usable)["conversations"]:
                parts = sentences(turn["content"])
                keep = [chance.random() < 0.5 and rare.isdisjoint(part) for part in parts]
                parts = [part if kept else chance.choice(pool) for part, kept in zip(parts, keep, strict=True)]
                turns.append({**turn, "content": "".join(parts)})
            yield {"id": f"grown-{number:06}", "conversations": turns}

    helpers.files.write_jsonl(target, grown())


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """The fastest of three runs, each in a new process: wall and CPU seconds, peak MiB of that process, the result."""
    runs = []
    for _ in range(3):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(_measured, function, *arguments).result())
    return min(runs, key=lambda run: run["cpu"])


def _measured(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    import pyarrow  # noqa: F401  imports are not part of anyone's time
    import tqdm  # noqa: F401

    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "cpu": cpu, "peak": peak, "result": result}


def plain(source: Path, target: Path) -> int:
    return filter_2024.filter_file(source, target, RULES)


def load(source: Path) -> list[helpers.Parsed]:
    return [helpers.parse_row(row) for row in helpers.files.load_rows(source)]


def ours(source: Path, output_dir: Path, rules: Path) -> dict[str, Any]:
    rules = helpers.rules.load(rules)
    kept, dropped, report = helpers.filter_rows(load(source), rules)
    helpers.files.save_filtered(output_dir, kept, dropped, report)
    return report


def texts_for_cld2(source: Path) -> list[str]:
    """Every text that our filter gives to cld2, to judge a row or to find out whether only one rule drops it."""
    texts, detect = [], pycld2.detect

    def noted(text: str, **options: Any) -> Any:
        texts.append(text)
        return detect(text, **options)

    pycld2.detect = noted
    helpers.filter_rows(load(source), helpers.rules.load(RULES))
    pycld2.detect = detect
    return texts


def cld2_alone(source: Path) -> dict[str, Any]:
    """CPU seconds of cld2 on the texts that reach it (the fastest of three times), and how many there are."""
    texts, seconds = texts_for_cld2(source), []
    for _ in range(3):
        began = time.process_time()
        for text in texts:
            with contextlib.suppress(pycld2.error, UnicodeEncodeError):
                pycld2.detect(text)
        seconds.append(time.process_time() - began)
    return {"seconds": min(seconds), "texts": len(texts)}


def stages(source: Path, output_dir: Path, rules: Path) -> dict[str, float]:
    """CPU seconds within one run, by stage; a stage does not count what another one named here spends."""
    spent: Counter[str] = Counter()
    inner = [0.0]

    def time_of(stage: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            outer, inner[0], began = inner[0], 0.0, time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                took = time.process_time() - began
                spent[stage] += took - inner[0]
                inner[0] = outer + took

        setattr(owner, name, timed)

    time_of("cld2", helpers, "not_japanese")
    time_of("read the rows", helpers.files, "load_rows")
    time_of("count characters, both times", helpers, "count_characters")
    time_of("replacements", helpers, "replace_strings")
    time_of("strings, characters, patterns", helpers, "find_forbidden")
    time_of("loops", helpers, "repeated_text")
    time_of("rows and records", helpers, "judge_rows")
    time_of("second pass, report", helpers, "filter_rows")
    time_of("write the files", helpers.files, "save_filtered")
    ours(source, output_dir, rules)
    return dict(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(ROOT / "data/sample/magpie.jsonl"))
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, oracle = Path(folder, "corpus.jsonl"), Path(folder, "plain.jsonl")
        grow(options.input, corpus, options.rows)
        size = corpus.stat().st_size / 1e6
        print(f"{options.rows:,} rows, {size:.1f} MB, grown from {Path(options.input).name}\n", flush=True)
        runs = {
            "2024, linear counting": in_fresh_process(plain, corpus, oracle),
            "this project, rules of 2024": in_fresh_process(ours, corpus, Path(folder, "ours"), RULES),
            "this project, reviewed rules": in_fresh_process(ours, corpus, Path(folder, "reviewed"), REVIEWED),
        }
        cld2 = in_fresh_process(cld2_alone, corpus)["result"]
        print("| | wall s | CPU s | rows/s | MB/s | peak MiB | times as fast as 2024 | CPU time, cld2 alone = 1 |")
        print("|---|---|---|---|---|---|---|---|")
        first = runs["2024, linear counting"]["cpu"]
        for name, run in runs.items():
            rates = f"{options.rows / run['wall']:,.0f} | {size / run['wall']:.1f} | {run['peak']:.0f}"
            ratios = f"{first / run['cpu']:.1f} | {run['cpu'] / cld2['seconds']:.1f}"
            print(f"| {name} | {run['wall']:.1f} | {run['cpu']:.1f} | {rates} | {ratios} |")
        print(f"| cld2 alone, {cld2['texts']:,} texts | | {cld2['seconds']:.2f} | | | | | 1 |")
        same = filecmp.cmp(oracle, Path(folder, "ours/filtered_magpie.jsonl"), False)
        report = runs["this project, rules of 2024"]["result"]
        print(f"\n{report['rows_kept']:,} rows kept; files equal: {same}", end="; ")
        print(f"{len(report['rare_characters']):,} rare characters\n")
        spent = {
            name: in_fresh_process(stages, corpus, Path(folder, "stages"), rules)["result"]
            for name, rules in (("2024", RULES), ("reviewed", REVIEWED))
        }
        print("| stage | share of CPU time, rules of 2024 | reviewed rules |\n|---|---|---|")
        for stage in sorted(spent["reviewed"], key=lambda stage: -spent["reviewed"][stage]):
            shares = (f"{seconds.get(stage, 0) / sum(seconds.values()):.0%}" for seconds in spent.values())
            print(f"| {stage} | {' | '.join(shares)} |")
    if not same:
        sys.exit("the survivors differ from those of 2024")


if __name__ == "__main__":
    main()
