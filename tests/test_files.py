"""Section 1 of helpers.py: files, records, secrets."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import RecipeError

texts = st.text(st.characters(codec=None))  # half surrogate pairs, too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), min_size=1, max_size=5))
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    helpers.files.write_jsonl(path, rows)
    assert helpers.files.load_rows(path) == rows


def test_jsonl_keeps_japanese_readable_and_reads_gzip(tmp_path):
    helpers.files.write_jsonl(tmp_path / "a.jsonl", [{"text": "日本語"}])
    assert (tmp_path / "a.jsonl").read_bytes() == '{"text": "日本語"}\n'.encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert helpers.files.load_rows(tmp_path / "a.jsonl.gz") == [{"text": "日本語"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"rows\.jsonl, line 2: not valid JSON"),
        ('{"a": 1}\n\n[1]\n', r"rows\.jsonl, line 3: expected a JSON object, found list"),
        ("\n\n", r"rows\.jsonl: the data set holds no rows"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        helpers.files.load_rows(path)


def test_bytes_that_are_not_utf8_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(RecipeError, match="line 1: not valid JSON"):
        helpers.files.load_rows(path)


def test_missing_file():
    with pytest.raises(RecipeError, match="no such file"):
        helpers.files.load_rows("nowhere.jsonl")


def test_load_rows_of_a_table_checks_keys_and_emptiness(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"input": ["一", "二", "三"]}), path)
    assert helpers.files.load_rows(path, max_rows=2) == [{"input": "一"}, {"input": "二"}]
    assert helpers.files.load_rows(tmp_path, max_rows=9)[2] == {"input": "三"}
    with pytest.raises(RecipeError, match=r"rows\.parquet, row 1: no answer found; its columns are \['input'\]"):
        helpers.files.load_pairs(path)
    pq.write_table(pa.table({"input": pa.array([], pa.string())}), path)
    with pytest.raises(RecipeError, match=r"rows\.parquet: the data set holds no rows"):
        helpers.files.load_rows(path)


def test_every_line_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert helpers.files.load_rows(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
    assert helpers.files.load_rows(tmp_path / "a.jsonl", max_rows=1) == [{"a": 1}]


def test_load_rows_offline_hub_name_and_bad_name():
    with pytest.raises(RecipeError, match="data set cannot be read"):
        helpers.files.load_rows("nobody/no-such-dataset")
    with pytest.raises(RecipeError, match="no such file or folder, and no hub repository"):
        helpers.files.load_rows("data/sample/qa.txt")


def test_atomic_write_leaves_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), helpers.files.atomic_write(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_read_tasks_refuses_a_repeated_id(tmp_path):
    rows = [{"task_id": i, "input": "x"} for i in (0, 1, 0)]
    with pytest.raises(RecipeError, match=r"tasks\.jsonl, line 3 repeats task_id 0 of .*tasks\.jsonl, line 1"):
        helpers.files.load_tasks(write(tmp_path / "tasks.jsonl", rows))


def test_read_tasks_needs_an_input_and_counts_where_there_is_no_id(tmp_path):
    with pytest.raises(RecipeError, match=r"line 2: no question found; its columns are \['task_id'\]"):
        helpers.files.load_tasks(write(tmp_path / "tasks.jsonl", [{"input": "x"}, {"task_id": 1}]))
    tasks = helpers.files.load_tasks(write(tmp_path / "tasks.jsonl", [{"input": "x"}, {"input": "y"}]))
    assert [task["task_id"] for task in tasks] == [0, 1]
