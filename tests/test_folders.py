"""Which files of a folder are read: all that can be, or those of one split or configuration; and it is said.

`python tests/test_folders.py 3000` reads that many random folders and prints how many stopped.
"""

import csv
import gzip
import io
import json
import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
import run
from helpers import RecipeError


def csv_bytes(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, ["input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows):
    table = pa.Table.from_pylist(rows, pa.schema([("input", pa.string()), ("output", pa.string())]))
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


KINDS = {
    "jsonl": lines,
    "JSONL": lines,
    "ndjson": lines,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": csv_bytes,
    "tsv": lambda rows: csv_bytes(rows, "\t"),
    "parquet": parquet,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "csv.GZ": lambda rows: gzip.compress(csv_bytes(rows)),
    "jsonl.zst": lambda rows: pa.compress(lines(rows), codec="zstd", asbytes=True),
}


def write(folder, name, count=3):
    """A file of rows that name it; returns the questions."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = next(kind for kind in sorted(KINDS, key=len, reverse=True) if name.endswith(f".{kind}"))
    rows = [{"input": f"{name} {number}", "output": "富士山"} for number in range(count)]
    path.write_bytes(KINDS[kind](rows))
    return [row["input"] for row in rows]


def write_card(folder, configs):
    card = yaml.safe_dump({"license": "mit", "configs": configs}, allow_unicode=True)
    Path(folder, "README.md").write_text(f"---\n{card}---\n# Rows\n", encoding="utf-8")


def read(name):
    """The questions of a data set, and what was printed or said by the error."""
    with redirect_stdout(io.StringIO()) as said:
        try:
            rows = [row["input"] for row in helpers.files.load_rows(name)]
        except RecipeError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            return None, str(error)
    return rows, said.getvalue()


def test_all_kinds_of_files_in_a_folder_are_read_and_named(tmp_path):
    expected = [write(tmp_path, f"{number}.{kind}") for number, kind in enumerate(KINDS)]
    rows, said = read(tmp_path)
    assert rows == list(chain(*expected))
    assert (
        f"{tmp_path}: 30 rows read from 10 files: 0.jsonl (3), 1.JSONL (3), 2.ndjson (3), 3.json (3), 5 more, 9.js"
        in said
    )


@pytest.mark.parametrize("held", ["test", "eval-2024", "dev", "validation", "val", "Test", "data/test-00000-of-00001"])
def test_a_held_out_split_is_read_only_when_it_is_named(tmp_path, held):
    kept, out = write(tmp_path, "chat.jsonl"), write(tmp_path, f"{held}.csv")
    rows, said = read(tmp_path)
    assert rows == kept and re.search(rf"not read: split (test|validation) \({held}\.csv\)", said)
    split = re.search("split (test|validation)", said)[1]
    for name in (split, f"{held}.csv", "eval" if split == "test" else "dev"):
        assert read(f"{tmp_path}:{name}")[0] == out
    (tmp_path / "chat.jsonl").unlink()
    rows, said = read(tmp_path)
    assert rows is None and f"name one: {tmp_path}:{split}" in said
    tasks = helpers.files.load_tasks(str(tmp_path))  # such as elyza/ELYZA-tasks-100, which has no other split
    assert [task["input"] for task in tasks] == out
    write(tmp_path, "baseline.jsonl")
    with pytest.raises(RecipeError, match="several splits could be meant"):
        helpers.files.load_tasks(str(tmp_path))


def test_a_card_that_lists_the_test_split_first_gives_the_training_split(tmp_path):
    kept, out, other = (write(tmp_path, f"{name}.jsonl") for name in ("a", "b", "c"))
    files = [{"split": "test_sft", "path": "b.jsonl"}, {"split": "train_sft", "path": ["a.*"]}]
    write_card(tmp_path, [{"config_name": "chat", "data_files": files}])
    rows, said = read(tmp_path)
    assert rows == kept and "3 rows of configuration chat, split train_sft read from 1 file: a.jsonl (3)" in said
    assert "not read: split test_sft (b.jsonl); c.jsonl" in said
    assert read(f"{tmp_path}:test_sft")[0] == read(f"{tmp_path}:chat:test_sft")[0] == out
    assert read(f"{tmp_path}:c.jsonl")[0] == other
    files.append({"split": "train_gen", "path": "c.jsonl"})
    write_card(tmp_path, [{"config_name": "chat", "data_files": files}])
    rows, said = read(tmp_path)
    assert rows is None and f"{tmp_path}:train_sft, {tmp_path}:train_gen" in said


def test_of_several_configurations_one_is_named_or_the_default(tmp_path):
    expected = {name: write(tmp_path, f"{name}/rows.jsonl") for name in ("ja", "en")}
    configs = [{"config_name": name, "data_dir": name} for name in expected]
    write_card(tmp_path, configs)
    rows, said = read(tmp_path)
    assert rows is None and said.endswith(f"several configurations; name one: {tmp_path}:ja, {tmp_path}:en")
    assert {name: read(f"{tmp_path}:{name}")[0] for name in expected} == expected
    rows, said = read(f"{tmp_path}:fr")
    assert rows is None and f"name one: {tmp_path}:ja, {tmp_path}:en" in said
    write_card(tmp_path, [configs[0], configs[1] | {"default": True}])
    rows, said = read(tmp_path)
    assert rows == expected["en"] and "not read: configuration ja" in said


@pytest.mark.parametrize(
    "config",
    [
        {"data_files": "../secret.jsonl"},
        {"data_files": [{"split": "train", "path": "in/../../secret.jsonl"}]},
        {"data_files": {"train": "../*"}},
        {"data_dir": "..", "data_files": "secret.jsonl"},
        {"data_dir": "../other"},
        {"data_files": "/etc/passwd"},
        {"data_files": "~/secret.jsonl"},
        {"data_files": "https://example.com/secret.jsonl"},
        {"data_files": "hf://datasets/a/b/secret.jsonl"},
        {"data_files": "C:/secret.jsonl"},
        {"data_files": "..\\secret.jsonl"},
    ],
    ids=str,
)
def test_a_card_does_not_lead_out_of_its_folder(tmp_path, config):
    write(tmp_path, "secret.jsonl")
    write(tmp_path, "rows/a.jsonl")
    write_card(tmp_path / "rows", [{"config_name": "default"} | config])
    rows, said = read(tmp_path / "rows")
    assert rows is None and "lies outside the folder" in said


@pytest.mark.parametrize("name", ["magpie[v2]", "a*b", "a?b", "{a,b}", "a:b", "日本 語", "-x", "data.jsonl"])
def test_names_with_special_characters_are_taken_as_they_are(tmp_path, name):
    for neighbour in ("magpiev", "axb", "a", "b"):
        write(tmp_path, f"{neighbour}/a.jsonl", 9)
    expected = write(tmp_path, f"{name}/rows[1].jsonl") + write(tmp_path, f"{name}/{name}.csv")
    assert Counter(read(tmp_path / name)[0]) == Counter(expected)
    write_card(tmp_path / name, [{"config_name": "default", "data_files": ["rows[1].jsonl", f"{name}.csv"]}])
    assert Counter(read(tmp_path / name)[0]) == Counter(expected)


def test_files_without_rows_and_other_files_are_named(tmp_path):
    for number in range(200):
        write(tmp_path, f"part-{number:03}.jsonl", number != 77)
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    rows, said = read(tmp_path)
    assert len(rows) == 199
    assert "199 rows read from 200 files: part-000.jsonl (1), " in said and ", 195 more, part-199.jsonl (1)\n" in said
    assert f"{tmp_path}: files without rows: part-077.jsonl\n{tmp_path}: not read: b.png\n" in said


def test_rows_in_a_kind_that_cannot_be_read_stop_the_rest(tmp_path):
    expected = write(tmp_path, "a.jsonl")
    (tmp_path / "b.xlsx").write_bytes(b"PK\x03\x04")
    rows, said = read(tmp_path)
    assert rows is None and "b.xlsx may hold rows, too" in said
    advised = re.search(r"read the others alone: (\S+)$", said)[1]
    assert read(advised)[0] == expected


def test_what_datasets_saves_to_disk_is_named_with_the_way_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"input": "山は？", "output": "富士山"}] * 3)
    for saved, folder in ((rows, "one"), (datasets.DatasetDict({"train": rows}), "several")):
        saved.save_to_disk(folder)
        read_rows, said = read(folder)
        assert read_rows is None and "save_to_disk wrote this folder; run `" in said
        exec("import datasets; " + re.search("`(.*)`", said)[1])
        assert read("rows.parquet")[0] == ["山は？"] * 3
        (arrow,) = Path(folder).rglob("*.arrow")
        said = read(str(arrow))[1]
        exec("import datasets; " + re.search("`(.*)`", said)[1])
        assert read("rows.parquet")[0] == ["山は？"] * 3


def test_what_selects_rows_is_part_of_the_source(tmp_path):
    def identity(name):
        return helpers.records.identity(helpers.records.data_source(str(name)))

    write(tmp_path, "a.jsonl")
    write(tmp_path, "b.jsonl")
    write(tmp_path, "test.jsonl")
    found = [identity(tmp_path), *(identity(f"{tmp_path}:{choice}") for choice in ("train", "test", "a.jsonl"))]
    for file in ("a.jsonl", "b.jsonl"):
        write_card(tmp_path, [{"config_name": "default", "data_files": file}])
        found += [identity(tmp_path), identity(f"{tmp_path}:default")]
    assert len(set(found)) == len(found)
    assert read(tmp_path)[0][0].startswith("b.jsonl")
    before = identity(tmp_path)
    with (tmp_path / "README.md").open("a") as card:
        card.write("More words.\n")
    assert identity(tmp_path) == before
    assert helpers.records.data_source(f"{tmp_path}:a.jsonl")["name"] == str(tmp_path)


def test_run_py_sees_that_rows_or_what_selects_them_changed(tmp_path):
    seen, name = [], f"{tmp_path}:default"
    for file in ("a.jsonl", "b.jsonl"):
        write(tmp_path, file)
        write_card(tmp_path, [{"config_name": "default", "data_files": file}])
        run.hashes.cache_clear()
        seen += [run.contents(name), run.contents(str(tmp_path))]
    write(tmp_path, "b.jsonl", 4)
    run.hashes.cache_clear()
    seen += [run.contents(name), run.contents(str(tmp_path))]
    assert all(seen) and seen[::2] == seen[1::2] and len(set(seen)) == 3
    assert run.contents("owner/name:default") == run.contents("") == ""


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    expected = write(tmp_path, "rows/a.jsonl") + write(tmp_path, "elsewhere/b.jsonl")
    (tmp_path / "rows/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows/circle").symlink_to(tmp_path / "rows")
    assert read(tmp_path / "rows")[0] == expected
    before = helpers.files.hashes(tmp_path / "rows")
    write(tmp_path, "elsewhere/b.jsonl", 4)
    assert helpers.files.hashes(tmp_path / "rows") != before


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("data/*", "name the folder"),
        ("x/y@main", "dataset_revision"),
        ("C:/data", "Windows path"),
        ("C:\\data\\a.jsonl", "Windows path"),
        ("データ/学習", "start at the repository's root"),
        ("https://huggingface.co/datasets/a/b", "as owner/name"),
        ("['a', 'b']", "without quotes and brackets"),
        ("'a.jsonl'", "without quotes and brackets"),
        ("a\0b", "control character"),
        ("a" * 500, "start at the repository's root"),
        ("absent.jsonl", "start at the repository's root"),
        ("absent.jsonl:train", "start at the repository's root"),
    ],
)
def test_a_name_that_is_nothing_is_looked_for_first(name, advice):
    for function in (helpers.files.load_rows, helpers.records.data_source):
        with pytest.raises(RecipeError) as error:
            function(name)
        assert "no such file or folder, and no hub repository" in str(error.value) and advice in str(error.value)
        assert "\n" not in str(error.value) and "\0" not in str(error.value)


# --- random folders -------------------------------------------------------------------------------------------------

STEMS = [
    "train",
    "test",
    "dev",
    "eval-2024",
    "chat",
    "a",
    "rows[1]",
    "学習",
    "train-1",
    "TRAIN",
    "Validation",
    "sub/chat",
]
STEMS += [
    "data/train-00000-of-00002",
    "data/train-00001-of-00002",
    "data/test-00000-of-00001",
    "data/ja-00000-of-00001",
]
STEMS += ["ja/train", "ja/test", "en/train", "en/rows", "train/a", "test/a", "x.y", "a b", "train.test"]
OTHERS = ["b.png", "LICENSE", ".gitattributes", "notes.txt", "c.arrow", "d.xlsx", ".hidden.jsonl", "run.record.json"]
HELD = re.compile(r"(^|[-._ 0-9/])(test|testing|eval|evaluation|validation|valid|dev|val)([-._ 0-9/]|$)", re.IGNORECASE)


STOPS = [
    "several splits could be meant",
    "all its files are held out",
    "several configurations",
    "there is no ",
    "may hold rows, too",
    "holds no rows",
    "holds no file that can be read",
    "lies outside the folder",
    "no file that can be read is named",
]


def random_card(rng, names):
    """Configurations that put random files into random splits: by name, by pattern, by folder."""
    configs = []
    for config in rng.sample(["default", "ja", "en", "v[2]"], rng.choice([1, 1, 2, 3])):
        entry = {"config_name": config}
        if (kind := rng.randrange(4)) == 0:
            entry["data_dir"] = rng.choice(["data", "ja", "sub"])
        elif kind == 1:
            entry["data_files"] = rng.choice(["*", "**", "data/*", "*.jsonl", "../*.jsonl", rng.choice(names)])
        else:
            splits = rng.sample(["train", "test", "validation", "train_sft", "test_sft"], rng.randint(1, 3))
            entry["data_files"] = [{"split": s, "path": rng.sample(names, min(2, len(names)))} for s in splits]
        if rng.random() < 0.3:
            entry["default"] = True
        configs.append(entry)
    return configs


def check_random_folder(folder, seed):
    """Write and read a folder; AssertionError if a row is lost, read twice, or left out without a word."""
    rng = random.Random(seed)
    names = [f"{stem}.{rng.choice(list(KINDS))}" for stem in rng.sample(STEMS, rng.choice([1, 2, 2, 3, 5]))]
    held = {name: write(folder, name, rng.choice([0, 1, 3, 3, 3])) for name in names}
    for other in rng.sample(OTHERS, rng.choice([0, 0, 0, 1])):
        Path(folder, other).write_bytes(lines([{"input": f"{other} 0"}]) if other == ".hidden.jsonl" else b"\x89PNG")
    carded = rng.random() < 0.4
    if carded:
        write_card(folder, random_card(rng, names))
    named = rng.choice(["train", "test", "dev", "default", "ja", "ja:test", "sub", "no", *names])
    choice = None if rng.random() < 0.6 else named
    name = f"{folder}:{choice}" if choice else str(folder)
    rows, said = read(name)
    if rows is None:
        assert said.startswith(str(folder)), said
        return "stopped: " + next(why for why in STOPS if why in said)
    counts = Counter(rows)
    assert set(counts.values()) <= {1}, "a row was read twice"
    whole = [file for file, questions in held.items() if questions and set(questions) <= counts.keys()]
    assert sum(len(held[file]) for file in whole) == len(rows), "a file was read in part"
    if choice in held:
        assert whole == ([choice] if held[choice] else [])
        return "read"
    for file in names:
        assert f" {file} (" in said or f"({file})" in said or re.search(rf"[ (]{re.escape(file)}[,;)\n]", said), (
            f"{file} is not named"
        )
    if not carded and choice is None:
        assert not any(HELD.search(file.rpartition(".")[0]) for file in whole), "held out and read"
    return "read"


def test_rows_in_random_folders_are_read_or_named(tmp_path):
    outcomes = Counter(check_random_folder(tmp_path / str(seed), seed) for seed in range(200))
    assert outcomes["read"] > 50 and len(outcomes) == len(STOPS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(Counter(check_random_folder(Path(place, str(seed)), seed) for seed in range(int(sys.argv[1]))))
