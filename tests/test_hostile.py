"""Random records, logs, configs, checkpoints, cards and replies: a right result or one RecipeError line, and no file
outside the folder changes. The environment variable EXAMPLES sets how many of each kind are tried.
"""

import hashlib
import json
import os
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import helpers
from engine import forms, reports
from helpers import RecipeError

# Off by default: a database of examples in the repository, and a limit per example, which would depend on the machine.
EXAMPLES = int(os.environ.get("EXAMPLES", "300"))
hostile = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

TEXTS = st.text(max_size=12) | st.sampled_from(["", "\0", "\x1b[2J", "../x", "/etc/passwd", "a\nb", "\u202e", "日本"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
SOURCE = {"name": "base", "commit": "", "sha256": "1", "inputs": {}}
RECORD = {"stage": "03_sft", "inputs": {"model": SOURCE}, "settings": {"r": 8}, "versions": {"trl": "1"}}
RECORD |= {"files": {"weights": hashlib.sha256(b"w").hexdigest()}, "measured": {"seconds": 1.0}, "parallel": 4}
ROW = {"task_id": 1, "key": "a", "output": "x", "new_tokens": 3, "cut": False, "limit": 8, "seconds": 0.1, "attempt": 1}


@st.composite
def altered(draw, whole):
    """A value like `whole` with something else at one place, at any depth, or without it."""
    value = json.loads(json.dumps(whole))
    place = value
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        break
    if draw(st.booleans()):
        place[key] = draw(VALUES)
    else:
        del place[key]
    return value


def written(whole):
    """Bytes of a file that should hold JSON like `whole`: altered, cut, damaged, nested, or anything else."""
    text = altered(whole).map(partial(json.dumps, ensure_ascii=True)).map(str.encode)
    cut = st.tuples(text, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xef\xbb\xbf{}", b"NaN", b""])
    return text | cut | deep | st.binary(max_size=40) | VALUES.map(json.dumps).map(str.encode)


def everything(folder):
    """Names and bytes of all files below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder beside those that are written to; nothing in it may change."""
    folder = tmp_path_factory.mktemp("around")
    (folder / "outside.txt").write_text("mine")
    (folder / "in").mkdir()
    return folder


@pytest.fixture
def room(outside, monkeypatch):
    """An empty folder for each example; a function that empties it. The process works beside it."""
    inner = outside / "in"
    monkeypatch.chdir(outside)

    def empty():
        shutil.rmtree(inner)
        inner.mkdir()
        return inner

    yield empty
    assert {path for path in everything(outside) if inner not in path.parents} == {outside / "outside.txt"}
    assert (outside / "outside.txt").read_text() == "mine"


def outcome(function, *arguments, **values):
    """What a function returns, None for a RecipeError, which has to be one line; any other error fails the test."""
    try:
        return function(*arguments, **values)
    except RecipeError as error:
        line = str(error)
        assert line and "\n" not in line and "\x1b" not in line and "hf_secret" not in line
        return None


@hostile
@given(content=written(RECORD))
def test_records(room, content):
    folder = room()
    (folder / "weights").write_text("w")
    (folder / "record.json").write_bytes(content)
    before = everything(folder)
    found = helpers.records.read(folder)
    assert found == {} or forms.is_record(found)
    outcome(helpers.records.check, folder)
    outcome(helpers.records.check, folder, finished=True)
    source = outcome(helpers.records.data_source, str(folder))
    if source:
        helpers.records.origins(source["inputs"])
        outcome(helpers.records.check_licences, {"dataset": source})
        helpers.records.identity(source)
    assert everything(folder) == before
    if found:
        assert helpers.records.changed_parts(found, found) == []
        helpers.records.join_versions(found, RECORD)
        outcome(helpers.records.write, folder, RECORD)


@hostile
@given(lines=st.lists(written(ROW), max_size=4), finished=written(RECORD), keys=st.booleans())
def test_logs(room, lines, finished, keys):
    """Rows of the run itself are never lost, whatever lies beside them."""
    folder = room()
    own = json.dumps({**ROW, "task_id": "own"}).encode()
    (folder / "answers.jsonl").write_bytes(b"\n".join([own, *lines]))
    (folder / "output.jsonl").write_text("x")
    (folder / "output.jsonl.record.json").write_bytes(finished)
    wanted = {"own": "a", 1: "b"} if keys else {"own": "a"}
    rows = outcome(helpers.answers.kept, folder, wanted, folder / "output.jsonl")
    assert rows is None or rows["own"]["output"] == "x" or json.loads(lines[0])["task_id"] == "own"
    assert own in (folder / "answers.jsonl").read_bytes() or rows
    if rows:
        helpers.answers.metrics(rows, 1)
    assert type(helpers.answers.parallel_before(folder / "output.jsonl")) is int
    begun = json.loads(json.dumps(RECORD))
    outcome(helpers.answers.begin, folder / "output.jsonl", begun)
    assert forms.is_record(begun)


@hostile
@given(content=written(RECORD), own=written(RECORD), made=written(RECORD))
def test_checkpoints(room, content, own, made, capsys):
    """Nothing is deleted unless both records were read whole and differ."""
    folder = room()
    checkpoint, adapter = folder / "checkpoints/checkpoint-5", folder / "adapter"
    for path, text in ((checkpoint, own), (adapter, made)):
        path.mkdir(parents=True)
        (path / "weights").write_text("w")
        (path / "record.json").write_bytes(text)
    (folder / "checkpoints/record.json").write_bytes(content)
    readable = [helpers.records.read(path) for path in (folder / "checkpoints", checkpoint)]
    finished = helpers.records.read(adapter)
    outcome(helpers.checkpoints.find, folder / "checkpoints", json.loads(json.dumps(RECORD)), adapter)
    old = next(filter(None, readable), {})
    differ = bool(old and helpers.records.changed_parts(old, RECORD))
    if not checkpoint.is_dir():
        assert differ and finished and not helpers.records.changed_parts(finished, old)
    if not (adapter / "record.json").exists():
        assert finished and helpers.records.changed_parts(finished, RECORD)
    assert (adapter / "weights").exists()


CONFIG = json.loads((ROOT / "data/tiny/gemma2/config.json").read_text())


@settings(hostile, max_examples=max(EXAMPLES // 3, 1))  # each builds a model without weights
@given(content=written(CONFIG))
def test_configs_of_models(room, content):
    folder = room()
    (folder / "config.json").write_bytes(content)
    config = outcome(helpers.models.text_config, str(folder), max_seq_length=64)
    if config is not None:
        outcome(helpers.shapes.lora_targets, config)
    assert everything(folder) == {folder / "config.json": content}


ADAPTER = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base", "bias": "none"}


@hostile
@given(content=written(ADAPTER))
def test_configs_of_adapters(room, content):
    folder = room()
    (folder / "adapter_config.json").write_bytes(content)
    source = {"name": str(folder), "commit": "", "sha256": "", "inputs": {}}
    rank = outcome(helpers.hub.lora_rank, source)
    assert rank is None or type(rank) is int
    outcome(helpers.records.check_adapter, source, source | {"name": "base"})
    assert everything(folder) == {folder / "adapter_config.json": content}


@hostile
@given(front=st.dictionaries(st.sampled_from(["license", "license_name", "license_link", "tags"]), VALUES) | VALUES)
def test_cards(room, front, capsys):
    folder = room()
    with open(folder / "README.md", "wb") as file:
        file.write(b"---\n" + json.dumps(front).encode() + b"\n---\n# Title\n")
    licence = outcome(helpers.hub.card_licence, str(folder), "")
    assert licence is not None and all(text == helpers.shown(text) for text in licence.values())
    source = {"name": "a/b", "commit": "1", "sha256": "1", "inputs": {}} | licence
    record = RECORD | {"inputs": {"model": source, "dataset": {"licence": "unknown"} | source}}
    outcome(helpers.records.check_licences, record["inputs"])
    for card in (helpers.records.model_card("T", record, ["x"], {}), helpers.records.dataset_card("T", record, {})):
        assert "\x1b" not in card


RUN = {"02_filter_magpie": {"fingerprint": "1", "seconds": 1.0, "parts": {"a": 1}, "products": {"rows": {"rows": "0"}}}}


@hostile
@given(content=written(RUN))
def test_runs(room, content):
    folder = room()
    (folder / "run.json").write_bytes(content)
    runs = outcome(reports.read, folder / "run.json")
    if runs is not None:
        outcome(reports.run_table, folder)
        for found in runs.values():
            assert all(forms.is_table(hashes, str) for hashes in found.get("products", {}).values())


REPLY = '{"reason": "正しい", "grade": 4}'


@hostile
@given(text=st.text() | VALUES.map(json.dumps) | st.sampled_from([REPLY, "{" * 10_000, "[" * 100_000]))
def test_replies_of_a_judge(text):
    try:
        found = helpers.judge.parse_grade(text)
    except ValueError:
        return
    assert found["grade"] in range(1, 6) and found["reason"].encode()


@hostile
@given(name=st.text(max_size=30) | TEXTS)
def test_names_of_folders(room, name):
    folder = room()
    outcome(helpers.machine.check_output_dir, name)
    outcome(helpers.hub.find_model, name)
    assert everything(folder) == {}


@hostile
@given(text=st.text())
def test_a_line_is_a_line(text):
    line = str(RecipeError(text))
    assert line.splitlines() in ([], [line])
    assert helpers.shown(line) == line
    assert len(helpers.first_line(ValueError(text)).splitlines()) == 1


SHA = "c0ffee" + "0" * 34
INFO = {"id": "me/base", "sha": SHA, "private": True, "tags": [], "siblings": {}, "cardData": {}}
FILES = st.sampled_from(["config.json", "record.json", "README.md", "../../../outside.txt", "/etc/passwd", "a/b.bin"])
HEADERS = {
    "X-Error-Code": st.sampled_from(["EntryNotFound", "RepoNotFound", "GatedRepo", "x"]),
    "X-Repo-Commit": st.sampled_from([SHA, "../../../outside.txt", "main"]),
    "ETag": st.sampled_from(['"1"', "../../../outside.txt", ""]),
    "X-Error-Message": st.just("no hf_secret"),
}


@st.composite
def hub_replies(draw):
    """Status, headers and body of a hub's reply: the one that describes a repository, or one of its files."""
    names = draw(st.lists(FILES, max_size=3))
    siblings = [{"rfilename": name} for name in names]
    info = INFO | {"siblings": siblings, "sha": draw(st.sampled_from([SHA, SHA, "../../../outside.txt", None]))}
    body = draw(written(INFO) | written(RECORD))
    if draw(st.booleans()):
        body = json.dumps(info).encode()
    headers = {name: draw(values) for name, values in HEADERS.items() if draw(st.booleans())}
    return draw(st.sampled_from([200, 200, 200, 401, 403, 404, 416])), headers, body


class Replies(BaseHTTPRequestHandler):
    def do_GET(self):
        replies = self.server.replies
        status, headers, body = replies[self.server.count % len(replies)]
        self.server.count += 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, outside):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    server.replies, server.count = [], 0
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(outside / "in/cache"))
    yield server
    server.shutdown()
    server.server_close()


@hostile
@given(replies=st.lists(hub_replies(), min_size=1, max_size=4))
def test_replies_of_a_hub(room, hub, replies, capsys):
    room()
    hub.replies, hub.count = replies, 0
    for ask in (
        partial(helpers.hub.find_model, "me/base"),
        partial(helpers.hub.fetch, "me/base", "record.json", SHA),
        partial(helpers.hub.hashes, "me/base", SHA),
        partial(helpers.records.model_source, "me/base"),
        partial(helpers.records.data_source, "me/rows"),
        partial(helpers.hub.push_rows, {}, "me/rows", "hf_secret"),
    ):
        outcome(ask)
    said = capsys.readouterr()
    assert "hf_secret" not in said.out + said.err


def test_examples_are_of_every_kind():
    """What the strategies above give is whole now and then: a test of right values alone, or of none, shows nothing."""
    assert forms.is_record(RECORD) and forms.is_row(ROW) and not forms.is_row({**ROW, "task_id": []})
    assert not forms.is_record(RECORD | {"files": [1]}) and not forms.is_record(RECORD | {"settings": []})
    named = {"model": SOURCE | {"name": ["x"]}}
    assert not forms.is_record(RECORD | {"inputs": named}) and Path(ROOT, "engine/forms.py").is_file()
