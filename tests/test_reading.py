"""Data as people have it: every kind of file and every form of rows is read right, or refused in one clear line.

`python tests/test_reading.py [FILE...]` prints the table of benchmarks/RESULTS.md, and reads further files.
"""

import base64
import csv
import datetime
import decimal
import gzip
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from contextlib import redirect_stdout
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from helpers import RecipeError

ANSWER = "富士山です。日本で一番高い山で、高さは3776メートルあります。"
QUESTIONS = [f"日本で{n}番目に高い山はどこですか。" for n in range(1, 4)]


def turns(question, answer=ANSWER, role="role", content="content", names=("user", "assistant")):
    return [{role: names[0], content: question}, {role: names[1], content: answer}]


def sharegpt(question, answer=ANSWER):
    return turns(question, answer, "from", "value", ("human", "gpt"))


# Each form of rows, as a function that puts a question into it.
FORMS = {
    "magpie": lambda q: {"id": 2**60 + 1, "conversations": turns(q)},
    "ShareGPT": lambda q: {"conversations": sharegpt(q), "system": "", "tools": ""},
    "ShareGPT with a system turn": lambda q: {"conversations": [{"from": "system", "value": "丁寧に"}, *sharegpt(q)]},
    "conversations as JSON text": lambda q: {"conversations": json.dumps(sharegpt(q))},
    "OpenAI chat with weights": lambda q: {"messages": [t | {"weight": 1} for t in turns(q)]},
    "OpenAI chat with tools": lambda q: {
        "messages": [*turns(q), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "tools": [{"type": "function"}],
    },
    "UltraChat (prompt, prompt_id, messages)": lambda q: {"prompt": q, "prompt_id": "a", "messages": turns(q)},
    "several questions": lambda q: {"messages": [*turns(q), *turns("それだけですか。")]},
    "Alpaca": lambda q: {"instruction": q[:5], "input": q[5:], "output": ANSWER},
    "Alpaca without input": lambda q: {"instruction": q, "input": "", "output": ANSWER},
    "LLaMA-Factory with history": lambda q: {
        "instruction": "次は？",
        "input": "",
        "output": ANSWER,
        "system": "",
        "history": [[q, ANSWER]],
    },
    "Dolly": lambda q: {"instruction": q, "context": "", "response": ANSWER, "category": "open_qa"},
    "instruction, response": lambda q: {"instruction": q, "response": ANSWER},
    "question, answer": lambda q: {"question": q, "answer": ANSWER, "topic": None},
    "prompt, completion": lambda q: {"prompt": q, "completion": ANSWER},
    "input, output": lambda q: {"input": q, "output": ANSWER},
    "two user turns in a row": lambda q: {"messages": [{"role": "user", "content": q[:5]}, *turns(q[5:])]},
    "ShareGPT, begun by the assistant": lambda q: {
        "conversations": [{"from": "gpt", "value": "こんにちは。ご用件は何ですか。"}, *sharegpt(q)]
    },
    "a system column beside turns": lambda q: {"system": "丁寧に", "conversations": sharegpt(q)},
    "a system column beside columns": lambda q: {"system_prompt": "丁寧に", "instruction": q, "output": ANSWER},
    "OpenAI, content in parts": lambda q: {
        "messages": [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns(q)]
    },
    "a tool is called before the answer": lambda q: {
        "conversations": [
            {"from": "human", "value": q},
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "3776"},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "a dictionary of lists (Sequence)": lambda q: {
        "conversations": {"from": ["human", "gpt"], "value": [q, ANSWER]},
    },
    "turns as Python's repr": lambda q: {"messages": repr(turns(q))},
    "shaberi (Question, Answer)": lambda q: {"Question": q, "Answer": ANSWER},
    "Alpaca, capitalised": lambda q: {"Instruction": q[:5], "Input": q[5:], "Output": ANSWER},
    "megagonlabs (utterances)": lambda q: {
        "meta": {"tag": ["a"]},
        "utterances": [{"name": t["role"], "text": t["content"]} for t in turns(q)],
    },
    "MT-bench (turns) with references": lambda q: {
        "question_id": 81,
        "category": "math",
        "turns": [q, "では二番目は？"],
        "reference": [ANSWER, "北岳です。"],
    },
    "ft-llm (problem, solution)": lambda q: {"problem": q, "solution": ANSWER},
    "aya (inputs, targets)": lambda q: {"inputs": q, "targets": ANSWER, "language": "jpn"},
    "ms-swift (human, assistant)": lambda q: {
        "system": "",
        "conversation": [{"human": q, "assistant": ANSWER}, {"human": "次は？", "assistant": "北岳です。"}],
    },
    "ms-swift (query, response)": lambda q: {"query": q, "response": ANSWER},
    "ichikara (ID, text, output)": lambda q: {"ID": "ichikara-1", "text": q, "output": ANSWER},
}
# Under the rules of 2024 the first turn of each role counts, whatever stands between.
OTHERWISE_IN_2024 = {"ShareGPT, begun by the assistant", "two user turns in a row"}

# Rows that hold no question and answer in a form that can be told: what is said.
UNKNOWN = {
    "JaQuAD": (
        {"question": "山は？", "context": "富士山", "answers": {"text": ["富士山"]}},
        "no answer found; its columns are ['answers', ",
    ),
    "oasst, a tree": (
        {"message_tree_id": "a", "prompt": {"text": "山は？", "replies": []}},
        "no answer found; its columns are ['message_tree_id', ",
    ),
    "oasst, messages": (
        {"message_id": "a", "text": "山は？", "role": "prompter"},
        "no question found; its columns are",
    ),
    "preferences": (
        {"prompt": "山は？", "chosen": "富士山", "rejected": "海"},
        "no answer found; its columns are ['chosen', ",
    ),
    "plain text": ({"text": "富士山は高い。"}, "its columns are ['text']"),
    "rows in a row": ({"data": [{"question": "山は？"}]}, "its columns are ['data']"),
    "turns without roles": ({"conversations": ["山は？", "富士山"]}, "turn 1 of conversations has no role"),
    "turns of unknown roles": ({"messages": turns("山は？", names=("A", "B"))}, "its roles in messages are ['A', 'B']"),
    "conversational prompts": ({"prompt": turns("山は？"), "completion": []}, "question (prompt) is a list"),
    "a picture in the question": (
        {"messages": turns([{"type": "text", "text": "山は？"}, {"type": "image_url", "image_url": {}}])},
        "question (messages) is a list of parts (image_url, text)",
    ),
    "an answer that only calls a tool": (
        {"messages": [*turns("山は？")[:1], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "the answer (messages) only calls a tool",
    ),
    "an answer before the only question": (
        {"messages": turns("山は？", names=("assistant", "user"))},
        "no answer found; its roles in messages are ['assistant', 'user']",
    ),
    "MT-bench without references": ({"turns": ["山は？", "川は？"]}, "the answer (turns) is null"),
    "turns as numpy's repr": (
        {"messages": "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"},
        "messages holds no list of turns",
    ),
    "lists of unequal lengths": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a"]}},
        "conversations holds no list of turns",
    ),
    "roles in Japanese": (
        {"messages": turns("山は？", names=("ユーザー", "アシスタント"))},
        "its roles in messages are ['ユーザー', 'アシスタント']",
    ),
    "a list as input": (
        {"instruction": "訳して", "input": ["a"], "output": "b"},
        "the question (input) is a list, expected text",
    ),
}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8-sig")


def parquet(rows):
    pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO())
    return sink.getvalue()


def arrow(rows):
    with pa.ipc.new_stream(sink := io.BytesIO(), (rows := pa.Table.from_pylist(rows)).schema) as stream:
        stream.write_table(rows)
    return sink.getvalue()


def feather(rows):
    pa.feather.write_feather(pa.Table.from_pylist(rows), sink := io.BytesIO())
    return sink.getvalue()


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


# Each kind of file: its name, and its bytes from the rows.
FILES = {
    "JSON Lines": ("a.jsonl", lines),
    "JSON Lines, a byte order mark in each line": (
        "a.jsonl",
        lambda rows: b"".join(b"\xef\xbb\xbf" + lines([r]) for r in rows),
    ),
    "JSON Lines called .json": ("a.json", lines),
    "JSON Lines, CRLF and blank lines": ("a.jsonl", lambda rows: lines(rows).replace(b"\n", b"\r\n\r\n")),
    "gzip": ("a.jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    "gzip without the name": ("a.jsonl", lambda rows: gzip.compress(lines(rows))),
    "zstd": ("a.jsonl.zst", lambda rows: zstd(lines(rows))),
    "zstd in two frames": ("a.jsonl.zst", lambda rows: zstd(lines(rows[:1])) + zstd(lines(rows[1:]))),
    "JSON array": ("a.json", lambda rows: json.dumps(rows, indent=2).encode()),
    "JSON array called .jsonl": ("a.jsonl", lambda rows: json.dumps(rows).encode()),
    "CSV from Excel (UTF-8)": ("a.csv", table),
    "CSV, packed": ("a.csv.gz", lambda rows: gzip.compress(table(rows))),
    "TSV": ("a.tsv", lambda rows: table(rows, "\t")),
    "Parquet": ("a.parquet", parquet),
}

ROW = {"input": "山は？", "output": "富士山"}
# Files that cannot be read: name, bytes, what is said.
BAD_FILES = {
    "cp932": ("a.jsonl", lines([ROW]).decode().encode("cp932"), "line 1: .*looks like text in cp932; save it as UTF-8"),
    "EUC-JP": ("a.jsonl", lines([ROW]).decode().encode("euc_jp"), "looks like text in EUC-JP"),
    "CSV in cp932": (
        "a.csv",
        table([ROW]).decode("utf-8-sig").encode("cp932"),
        "not UTF-8 text; it looks like text in cp932",
    ),
    "CSV in cp932, 9 KiB": (
        "a.csv",
        b"input,output\n" + b"a,b\n" * 2043 + "あ".encode("cp932") * 400 + b",x\n",
        "line 2045: not UTF-8 text; it looks like text in cp932",
    ),
    "JSON Lines in ISO-2022-JP": (
        "a.jsonl",
        lines([ROW]).decode().encode("iso2022_jp"),
        "looks like text in ISO-2022-JP",
    ),
    "CSV in ISO-2022-JP": ("a.csv", table([ROW]).decode("utf-8-sig").encode("iso2022_jp"), "text in ISO-2022-JP"),
    "CSV in UTF-16 without a mark": (
        "a.csv",
        table([ROW]).decode("utf-8-sig").encode("utf-16-be"),
        "it is UTF-16 text; save it as UTF-8 .`iconv -f UTF-16BE -t UTF-8`",
    ),
    "UTF-32": ("a.csv", table([ROW]).decode("utf-8-sig").encode("utf-32"), "it is UTF-32 text"),
    "UTF-32 without a mark": ("a.jsonl", lines([ROW]).decode().encode("utf-32-le"), "it is UTF-32 text"),
    "CSV, NUL bytes": ("a.csv", b"input,output\n" + b"a,b\n" * 2000 + b"a,b\0\n", "line 2002: holds a NUL byte"),
    "JSON Lines, NUL bytes": ("a.jsonl", b"\0\1\2\3" * 99, "it holds NUL bytes, so it is no text"),
    "pickle": ("a.jsonl", pickle.dumps([ROW]), "it is a Python pickle"),
    "Arrow": ("a.jsonl", arrow([ROW]), "it is an Arrow file; run `datasets.Dataset.from_file"),
    "Feather": ("a.json", feather([ROW]), "it is an Arrow file; run `pandas.read_feather"),
    "picture": ("a.json", b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "it is a picture"),
    "web page called .csv": ("a.csv", b"\n<!DOCTYPE html>\n<html>", "it is a web page"),
    "Git LFS pointer called .csv": ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    "UTF-16": ("a.jsonl", lines([ROW]).decode().encode("utf-16"), "it is UTF-16 text"),
    "UTF-16 without a mark": ("a.jsonl", lines([ROW]).decode().encode("utf-16-le"), "it is UTF-16 text"),
    "Excel": ("a.csv", b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00\xff\xff", "a zip archive or an Excel file"),
    "Git LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run `git lfs pull`"),
    "web page": ("a.json", b"<!DOCTYPE html>\n<html></html>", "it is a web page"),
    "one object over several lines": (
        "a.json",
        json.dumps({"data": [ROW]}, indent=1).encode(),
        "write one object per line, or a list",
    ),
    "a broken line": ("a.jsonl", lines([ROW]) + b'{"input": \n', "line 2: not valid JSON"),
    "a list in a line": ("a.jsonl", lines([ROW]) + b"[1]\n", "line 2: expected a JSON object, found list"),
    "an array of numbers": ("a.json", b"[1]", "row 1: expected a JSON object, found int"),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(lines([ROW] * 99))[:-9],
        "cannot be read .*fetch it again",
    ),
    "cut zstd": ("a.jsonl.zst", zstd(lines([ROW] * 99))[:-9], "cannot be read .*fetch it again"),
    "cut Parquet": ("a.parquet", parquet([ROW])[:-9], "cannot be read .*fetch it again"),
    "Parquet without rows": ("a.parquet", parquet([ROW])[:0] or parquet([]), "holds no rows"),
    "empty file": ("a.jsonl", b"", "holds no rows"),
    "empty CSV": ("a.csv", b"", "holds no rows"),
    "CSV, a comma too many": ("a.csv", b"input,output\na,b\nc,d,e\n", "line 3: not 2 cells as in the header"),
    "CSV, an open quote": ("a.csv", b'input,output\na,"b\n', "not valid CSV"),
    "CSV, a name twice": ("a.csv", b"input,input\na,b\n", "two columns have the same name"),
}


def write(folder, name, data):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def parsed(rows):
    return list(map(helpers.parse_row, rows))


def refusal(function, *arguments):
    """The message of a RecipeError: one line of a reasonable length."""
    with pytest.raises(RecipeError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 900
    return message


# --- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_is_read_for_training_for_shots_and_as_tasks(tmp_path, capsys, form):
    rows = [FORMS[form](question) for question in QUESTIONS]
    path = write(tmp_path, "a.jsonl", lines(rows))
    pairs = helpers.files.load_pairs(path)
    assert "3 rows read as " in capsys.readouterr().out
    assert [pair["response"] for pair in pairs] == [ANSWER] * 3
    assert [pair["instruction"].replace("\n", "") for pair in pairs] == QUESTIONS
    tasks = helpers.files.load_tasks(path)
    assert [(task["task_id"], task["input"], task["output"]) for task in tasks] == [
        (n, pair["instruction"], ANSWER) for n, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rules", ["2024", "reviewed"])
def test_every_known_form_is_filtered_and_trained_on(tmp_path, form, rules):
    rows = [FORMS[form](question) for question in QUESTIONS]
    loaded = parsed(helpers.files.load_rows(write(tmp_path, "a.jsonl", lines(rows))))
    helpers.files.check_forms("a.jsonl", loaded)
    filter_rules = helpers.rules.load(f"data/filter_rules_{rules}.json")
    lenient = replace(filter_rules, rare_below=0, rare_after_below=0)
    kept, dropped, report = helpers.filter_rows(loaded, lenient)
    assert (report["rows_kept"], dropped) == (3, [])
    assert all(row["conversations"][-1].get("role") == "assistant" for row in kept)
    helpers.files.write_jsonl(tmp_path / "kept.jsonl", kept)
    if form in OTHERWISE_IN_2024 and rules == "2024":
        return
    pairs = helpers.files.load_pairs(str(tmp_path / "kept.jsonl"))
    assert [pair["instruction"].replace("\n", "") for pair in pairs] == QUESTIONS
    assert [pair["response"] for pair in pairs] == [ANSWER] * 3
    if form == "magpie":  # the row as it is, and two more columns
        assert kept == [row | {"instruction": q, "response": ANSWER} for row, q in zip(rows, QUESTIONS, strict=True)]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_forms_stop_at_once_with_row_and_columns(tmp_path, kind):
    row, said = UNKNOWN[kind]
    path = write(tmp_path, "a.jsonl", lines([row] * 3))
    assert (message := refusal(helpers.files.load_pairs, path)).startswith(f"{path}, line 1: ") and said in message
    message = refusal(helpers.files.check_forms, "a.jsonl", parsed(helpers.files.load_rows(path)))
    assert message.startswith("3 of 3 rows cannot be used. The first one: a.jsonl, row 1: ")


def test_a_few_malformed_rows_do_not_stop_the_filter(capsys):
    good, bad = parsed([FORMS["ShareGPT"](QUESTIONS[0]), {"text": "x"}])
    helpers.files.check_forms("a", [good, bad, good, bad])
    assert "2 rows read as conversations" in (said := capsys.readouterr().out)
    assert "2 rows cannot be used. The first one: a, row 2: " in said
    assert "3 of 4 rows" in refusal(helpers.files.check_forms, "a", [good, bad, bad, bad])


def test_columns_that_are_null_do_not_hide_the_form_of_a_row(tmp_path):
    """What a table makes of rows of several forms: every row has all columns, most of them null."""
    question = QUESTIONS[0]
    rows = [
        {"conversations": None, "instruction": question[:5], "input": question[5:], "output": ANSWER},
        {"conversations": turns(question), "instruction": None, "input": None, "output": None},
    ]
    for pair in helpers.files.load_pairs(write(tmp_path, "a.parquet", parquet(rows))):
        assert (pair["instruction"].replace("\n", ""), pair["response"]) == (question, ANSWER)
    kept, _, _ = helpers.filter_rows(parsed(rows), helpers.FilterRules((), (), rare_below=0, rare_after_below=0))
    assert [row["instruction"].replace("\n", "") for row in kept] == [question] * 2


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    rows = [{"task_id": 10 + n, "input": f'「{q}」,\n"{n}"', "output": f"00{n}"} for n, q in enumerate(QUESTIONS)]
    name, write_rows = FILES[kind]
    path = write(tmp_path, name, write_rows(rows))
    assert helpers.files.load_rows(path) == rows
    assert helpers.files.load_rows(path, max_rows=2) == rows[:2]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unreadable_files_are_named_with_the_place_and_the_remedy(tmp_path, kind):
    name, data, said = BAD_FILES[kind]
    path = write(tmp_path, name, data)
    message = refusal(helpers.files.load_rows, path)
    assert message.startswith(path)
    assert re.search(said, message), message


@pytest.mark.parametrize("name", ["absent.jsonl", "data/absent.csv", "./a/b", "a/b/c", "~/data/x"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    assert refusal(helpers.files.load_rows, name).startswith(f"{name}: no such file or folder")


def test_a_folder_gives_the_rows_of_its_split_train_in_the_order_of_its_files(tmp_path):
    for name, row in (("train-00001-of-00002", 2), ("train-00000-of-00002", 1), ("test-00000-of-00001", 3)):
        write(tmp_path, f"data/{name}.jsonl.gz", gzip.compress(lines([{"n": row}])))
    write(tmp_path, "README.md", b"# A data set")
    assert helpers.files.load_rows(tmp_path) == [{"n": 1}, {"n": 2}]
    write(tmp_path, "data/train-00001-of-00002.jsonl.gz", gzip.compress(b'{"n": 2}\n{"n": \n'))
    assert "train-00001-of-00002.jsonl.gz, line 2: not valid JSON" in refusal(helpers.files.load_rows, tmp_path)


class Hub(BaseHTTPRequestHandler):
    """Speaks as much of the hub's HTTP API as a download needs."""

    def do_GET(self) -> None:
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        listed = [
            {"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in self.server.files.items()
        ]
        info = {"id": "me/rows", "sha": "c" * 40, "siblings": []}
        body = self.server.files[name] if name else json.dumps(listed if "/tree/" in self.path else info).encode()
        self.server.asked.append(name)
        self.send_response(200)
        self.send_header("ETag", f'"{name.replace("/", "-")}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with one data set, whose files are a dictionary; call it with a name to read, online or offline."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked = {"README.md": b"#", "model.bin": b"0" * 9}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}

    def read(name, offline="0", function="load_rows"):
        code = f"import json, helpers; rows = helpers.files.{function}({name!r}); print(json.dumps(rows))"
        environment = os.environ | home | {"HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        return done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()[-1:]

    yield server, read
    server.shutdown()


def test_a_hub_data_set_gives_the_rows_as_they_are_and_is_read_again_without_network(hub):
    server, read = hub
    server.files |= {"data/train.jsonl": lines(MIXED), "data/test.jsonl": lines([ROW])}
    for offline in "01":
        *said, rows = read("me/rows", offline)
        assert json.loads(rows) == MIXED
        assert said[0] == "me/rows: 3 rows of split train read from 1 file: data/train.jsonl (3)"
        left = "split test (data/test.jsonl)" + ("" if offline == "1" else "; model.bin")
        assert said[1] == f"me/rows: not read: {left}"
    assert json.loads(read("me/rows:test", "1")[-1]) == [ROW]
    assert "model.bin" not in server.asked


def test_on_the_hub_files_of_no_split_are_read_only_where_there_is_no_other(hub):
    """As its viewer shows them: elyza/ELYZA-tasks-100 has answers of models beside test.csv."""
    server, read = hub
    server.files |= {"test.csv": table([ROW]), "baseline/A.JSONL": lines([ROW | {"input": "川は？"}])}
    *said, rows = read("me/rows", function="load_tasks")
    assert json.loads(rows) == [{"task_id": 0, **ROW}]
    assert said[1] == "me/rows: not read: no split (baseline/A.JSONL); model.bin"
    assert "all its files are held out for validation or test" in read("me/rows")[0]
    assert json.loads(read("me/rows:baseline/A.JSONL")[-1])[0]["input"] == "川は？"


def test_a_configuration_of_a_hub_data_set_is_named(hub):
    server, read = hub
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in ("ja", "en")]
    server.files |= {f"{name}/a.jsonl": lines([ROW | {"id": name}]) for name in ("ja", "en")}
    server.files["README.md"] = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    assert read("me/rows")[0].endswith("several configurations; name one: me/rows:ja, me/rows:en")
    assert json.loads(read("me/rows:ja")[-1]) == [ROW | {"id": "ja"}]


MIXED = [
    {
        "id": 1,
        "x": 1,
        "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "n": 0}],
    },
    {"id": None, "x": "1", "conversations": [{"role": "user", "content": "c"}], "more": {"a": [1.5]}},
    {"id": 2**60 + 1, "x": [1], "conversations": []},
]


def test_mixed_types_and_nested_keys_of_a_folder_stay_as_they_are(tmp_path):
    write(tmp_path, "train.jsonl", lines(MIXED))
    assert helpers.files.load_rows(tmp_path) == MIXED


def test_what_datasets_stores_as_json_in_parquet_is_read_as_values(tmp_path):
    from datasets import load_dataset

    write(tmp_path, "in/train.jsonl", lines(MIXED))
    stored = load_dataset(str(tmp_path / "in"), split="train", cache_dir=str(tmp_path / "cache"))
    stored.to_parquet(tmp_path / "out.parquet")
    assert "json" in str(pq.read_schema(tmp_path / "out.parquet").field("conversations").type)
    rows = helpers.files.load_rows(tmp_path / "out.parquet")
    assert rows == stored.to_list()  # datasets itself reads "1" in a mixed column as 1
    assert [row["conversations"] for row in rows] == [row["conversations"] for row in MIXED]


# --- types ----------------------------------------------------------------------------------------------------------

NO_TEXT = {"null": None, "a number": 5, "true or false": True, "a list": ["a"], "an object": {"a": 1}}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("key", ["input", "output"])
def test_what_is_no_text_is_refused_by_file_row_and_key(tmp_path, key, kind):
    path = write(tmp_path, "qa.jsonl", lines([ROW, ROW | {key: NO_TEXT[kind]}]))
    if (key, kind) == ("output", "a number"):
        assert helpers.files.load_pairs(path)[1] == {"instruction": "山は？", "response": "5"}
    else:
        message = refusal(helpers.files.load_pairs, path)
        assert message.startswith(f"{path}, line 2: ") and f"{key}) is {kind}, expected text" in message
    if key == "input":
        assert f"question (input) is {kind}, expected text" in refusal(helpers.files.load_tasks, path)


def test_half_surrogate_pairs_are_refused(tmp_path):
    for key in ("input", "output", "task_id"):
        path = write(tmp_path, "a.jsonl", json.dumps(ROW | {key: "山\ud83d"}).encode())
        assert (
            "line 1: " in (message := refusal(helpers.files.load_tasks, path)) and "U+D83D, half a surrogate" in message
        )
        if key != "task_id":
            assert "U+D83D" in refusal(helpers.files.load_pairs, path)


@pytest.mark.parametrize(("given_id", "read"), [(7, 7), ("7", "7"), (7.0, 7), ("問1", "問1"), (-1, -1)])
def test_task_ids_that_are_taken(tmp_path, given_id, read):
    (task,) = helpers.files.load_tasks(write(tmp_path, "a.jsonl", lines([{"task_id": given_id, "input": "x"}])))
    assert (task["task_id"], type(task["task_id"])) == (read, type(read))
    assert task == {"task_id": read, "input": "x"}


@pytest.mark.parametrize("given_id", [None, [1], {"a": 1}, True, 1.5, float("nan")])
def test_task_ids_that_are_refused(tmp_path, given_id):
    path = write(tmp_path, "a.jsonl", json.dumps({"task_id": given_id, "input": "x"}).encode())
    assert refusal(helpers.files.load_tasks, path).startswith(f"{path}, line 1: task_id is ")


def test_task_ids_of_a_table_are_numbers_again(tmp_path):
    path = write(tmp_path, "a.csv", table([{"task_id": n, "input": "x", "output": f"0{n}"} for n in range(3)]))
    assert [(task["task_id"], task["output"]) for task in helpers.files.load_tasks(path)] == [
        (0, "00"),
        (1, "01"),
        (2, "02"),
    ]


@pytest.mark.parametrize(
    ("output", "references"),
    [
        ("富士山", ["富士山"]),
        (420, ["420"]),
        (1.5, ["1.5"]),
        (["富士山", " 420 ", ""], ["富士山", "420"]),
        (None, []),
        ([], []),
    ],
)
def test_references_are_texts_numbers_or_a_list_of_them(tmp_path, output, references):
    (task,) = helpers.files.load_tasks(write(tmp_path, "a.jsonl", lines([{"input": "x", "output": output}])))
    assert helpers.references_of(task) == references


EVAL = {
    "instruction": "質問に答えてください。",
    "output_length": 9,
    "metrics": ["char_f1"],
    "samples": [{"input": question, "output": ANSWER} for question in QUESTIONS],
}


@pytest.mark.parametrize("data", [json.dumps(EVAL), json.dumps(EVAL, indent=2), json.dumps([EVAL], indent=2)])
def test_a_file_of_llm_jp_eval_gives_its_samples_as_tasks(tmp_path, data):
    path = write(tmp_path, "jcommonsenseqa.json", data.encode())
    tasks = helpers.files.load_tasks(path)
    assert [(task["input"], task["output"]) for task in tasks] == [
        (f"質問に答えてください。\n{question}", ANSWER) for question in QUESTIONS
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_whole_numbers_beside_missing_ones_are_whole(tmp_path, name):
    """Of both pandas makes 5.0."""
    path, columns = tmp_path / name, {"input": ["2 + 3 は？", "山は？"], "output": [5, None], "score": [1.5, 2.0]}
    (pd.DataFrame(columns).to_parquet if name == "a.parquet" else pd.DataFrame(columns).to_csv)(path, index=False)
    assert "5.0" in str(pd.read_parquet(path) if name == "a.parquet" else path.read_text(encoding="utf-8"))
    tasks = helpers.files.load_tasks(str(path))
    assert tasks[0] == {"task_id": 0, "input": "2 + 3 は？", "output": "5"}
    assert helpers.references_of(tasks[1]) == []
    assert str(helpers.files.load_rows(path)[1]["score"]) == "2.0"


@pytest.mark.parametrize("number", [0, 7, -3, 10**17])
def test_a_number_as_further_text_is_its_digits(tmp_path, number):
    path = write(tmp_path, "a.csv", table([{"instruction": "2倍は？", "input": number, "output": 2 * number}] * 2))
    pairs = helpers.files.load_pairs(path)
    assert pairs == [{"instruction": f"2倍は？\n{number}", "response": str(2 * number)}] * 2


@pytest.mark.parametrize("output", [{"a": 1}, [None], [["a"]], True])
def test_references_that_are_refused(tmp_path, output):
    path = write(tmp_path, "a.jsonl", lines([{"input": "x", "output": output}]))
    assert "line 1: the reference answer is " in refusal(helpers.files.load_tasks, path)


def test_of_several_references_the_best_counts_for_each_measure():
    def scores(*references):
        task = {"task_id": 0, "input": "x", "output": list(references)}
        return helpers.score_texts([task], ["富士山です。"], [False])[0]

    alone, both = [scores(text) for text in ("富士山です。", "犬と猫")], scores("犬と猫", "富士山です。")
    assert both == alone[0] and both["chrf"] == pytest.approx(100) and alone[1]["chrf"] < 50


# --- what is written ------------------------------------------------------------------------------------------------

DEEP = json.loads("[" * 100 + "1" + "]" * 100)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), None),
        ([1, -math.inf], [1, None]),
        (b"\x89PNG", base64.b64encode(b"\x89PNG").decode()),
        (datetime.datetime(2026, 11, 25, 1, 2), "2026-11-25 01:02:00"),
        (datetime.date(2026, 11, 25), "2026-11-25"),
        (decimal.Decimal("12.50"), "12.50"),
        (np.int64(5), 5),
        (np.array([1.5, 2]), [1.5, 2]),
        (np.float32("nan"), None),
        ("半\ud83d", "半\ud83d"),
        ("\ufeff半\u2028", "\ufeff半\u2028"),
        ([float("nan"), "半\ud83d"], [None, "半\ud83d"]),
        (2**70, 2**70),
        (1.0, 1.0),
        (0.1, 0.1),
        (DEEP, DEEP),
    ],
)
def test_every_value_is_written_as_valid_json_in_utf8(tmp_path, value, written):
    helpers.files.write_jsonl(tmp_path / "a.jsonl", [{"日本": value}])
    text = (tmp_path / "a.jsonl").read_bytes().decode("utf-8")
    assert text.startswith('{"日本": ') and text.count("\n") == 1
    (row,) = helpers.files.load_rows(tmp_path / "a.jsonl")
    assert row["日本"] == written and type(row["日本"]) is type(written)
    assert json.loads(text, parse_constant=pytest.fail) == row


def test_a_line_nested_too_deeply_is_named(tmp_path):
    too_deep = write(tmp_path, "a.jsonl", b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    assert "line 1: nested too deeply" in refusal(helpers.files.load_rows, too_deep)


def test_parquet_values_survive_the_filter(tmp_path):
    columns = {
        "n": [2**60 + 1, None],
        "x": [0.1, float("nan")],
        "b": [b"\xff\x00", None],
        "day": [datetime.date(2026, 1, 2), None],
        "d": [decimal.Decimal("1.20"), None],
        "conversations": [turns(QUESTIONS[0]), None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = helpers.files.load_rows(tmp_path / "a.parquet")
    kept, dropped, report = helpers.filter_rows(
        parsed(rows), helpers.FilterRules((), (), rare_below=0, rare_after_below=0)
    )
    helpers.files.save_filtered(tmp_path, kept, dropped, report)
    (row,), (record,) = (helpers.files.load_rows(tmp_path / f"{name}_magpie.jsonl") for name in ("filtered", "dropped"))
    values = {"n": 2**60 + 1, "x": 0.1, "b": "/wA=", "day": "2026-01-02", "d": "1.20"}
    assert {name: row[name] for name in values} == values and type(row["n"]) is int
    assert record["row"] == dict.fromkeys(columns)


# --- nothing is lost ------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)
    | st.binary(max_size=3)
    | st.dates()
    | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
known_rows = st.builds(lambda form, q: FORMS[form](q), st.sampled_from(list(FORMS)), st.sampled_from(QUESTIONS))
CLASSIC = [*helpers.CHATS, *helpers.QUESTIONS, *helpers.CONTEXTS, *helpers.ANSWERS, "history", "id"]
MORE = [*helpers.MORE_CHATS, *helpers.MORE_QUESTIONS, *helpers.MORE_ANSWERS, "reference", "Question", "Input", "Output"]
names = st.sampled_from(CLASSIC + MORE)
broken_turns = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "from", "content", "value", "name", "text", "human", "assistant"), anything)
)
wild_rows = st.dictionaries(names, anything | st.lists(broken_turns | anything, max_size=3), max_size=4)
spoiled_rows = st.builds(lambda row, more: row | more, known_rows, wild_rows)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(known_rows | wild_rows | spoiled_rows, min_size=20, max_size=20), st.booleans())
def test_rows_in_are_rows_kept_and_rows_dropped(tmp_path, rows, reviewed):
    """2,000 rows of every form and of none: each is kept or dropped, and the files are valid JSON in UTF-8."""
    switches = {field.name: reviewed for field in fields(helpers.FilterRules) if field.default is False}
    rules = helpers.FilterRules((("山", "丘"),), ("海",), rare_below=0, rare_after_below=2, **switches)
    before = helpers.files.json_text(rows)
    helpers.files.save_filtered(tmp_path, *helpers.filter_rows(parsed(rows), rules))
    assert helpers.files.json_text(rows) == before
    counts = {}
    for name in ("filtered", "dropped"):
        written = (tmp_path / f"{name}_magpie.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
        counts[name] = [json.loads(line, parse_constant=pytest.fail) for line in written]
    assert len(counts["filtered"]) + len(counts["dropped"]) == len(rows)
    for record in counts["dropped"]:
        assert record["row"] == json.loads(helpers.files.json_text(rows[record["number"] - 1]))
    for row in counts["filtered"]:
        assert isinstance(row["conversations"], list) and row["instruction"] and row["response"]


# --- the table ------------------------------------------------------------------------------------------------------

NUMBERED = [f"part-{number:03}.jsonl" for number in range(200)]
# Folders: their files with three rows each, what the card says, and what is named of it.
FOLDERS = {
    "two kinds of files": (["a.jsonl", "b.csv"], None, ""),
    "200 files": (NUMBERED, None, ""),
    "a file beside one for tests": (["chat.jsonl", "test.jsonl"], None, ""),
    "the same, the test is named": (["chat.jsonl", "test.jsonl"], None, ":test"),
    "a test alone": (["test.jsonl"], None, ""),
    "a split beside a file of none": (["chat.jsonl", "train.jsonl"], None, ""),
    "a card that lists test_sft first": (
        ["a.jsonl", "b.jsonl"],
        [{"data_files": [{"split": "test_sft", "path": "a.jsonl"}, {"split": "train_sft", "path": "b.jsonl"}]}],
        "",
    ),
    "several configurations": (["ja/a.jsonl", "en/a.jsonl"], [{"data_dir": "ja"}, {"data_dir": "en"}], ""),
    "one of them": (["ja/a.jsonl", "en/a.jsonl"], [{"data_dir": "ja"}, {"data_dir": "en"}], ":ja"),
    "one file of it": (["a.jsonl", "b.jsonl"], None, ":b.jsonl"),
    "a card that leads out of it": (["a.jsonl"], [{"data_files": "../secret.jsonl"}], ""),
    "a picture beside rows": (["a.jsonl", "a.png"], None, ""),
    "a packed file that cannot be read": (["a.jsonl", "b.jsonl.xz"], None, ""),
}


def write_folder(folder, names, configs):
    """The files of a folder; rows say in which file they are."""
    for name in names:
        rows = [{"input": f"{name} {q}", "output": ANSWER} for q in QUESTIONS]
        write(folder, name, table(rows) if name.endswith(".csv") else lines(rows) if "jsonl" in name else b"\x89PNG")
    if configs:
        named = [{"config_name": config.get("data_dir", "default")} | config for config in configs]
        write(folder, "README.md", f"---\n{json.dumps({'configs': named})}\n---\n".encode())
    return str(folder)


def report_line(kind, path, rows_in):
    """A line of the table: what was read, and what was said."""
    with redirect_stdout(io.StringIO()) as said:
        try:
            read, message = len(helpers.files.load_pairs(path)), said.getvalue()
        except RecipeError as error:
            read, message = "stops", str(error).partition("; known are")[0]
    base = path if os.path.exists(path) else path.rpartition(":")[0]
    message = message.replace(f"{path}: ", "").replace(base, Path(base).name).strip().replace("\n", "; ")
    return f"| {kind} | {rows_in} | {read} | {message.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    print("| form, file or folder | rows in | rows read | what is said |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for form, make in FORMS.items():
            print(report_line(form, write(folder, "a.jsonl", lines([make(q) for q in QUESTIONS])), 3))
        for kind, (row, _) in UNKNOWN.items():
            print(report_line(kind, write(folder, "a.jsonl", lines([row])), 1))
        for kind, (name, write_rows) in FILES.items():
            rows = [{"input": q, "output": ANSWER} for q in QUESTIONS]
            print(report_line(kind, write(folder, name, write_rows(rows)), 3))
        for kind, (name, data, _) in BAD_FILES.items():
            print(report_line(kind, write(folder, name, data), ""))
        for number, (kind, (names, configs, choice)) in enumerate(FOLDERS.items()):
            path = write_folder(Path(folder, str(number), "rows"), names, configs) + choice
            print(report_line(f"folder: {kind}", path, 3 * sum("jsonl" in n or "csv" in n for n in names)))
    for path in sys.argv[1:]:
        print(report_line(Path(path).name, path, Path(path).read_bytes().count(b"\n")))
