"""What comes from elsewhere runs nothing, tells nothing, costs nothing: attacks and faults, one test each."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_hub import Hub, call
from test_hub import serve as start_hub
from test_judge import GOOD, TASKS, judge, serve  # noqa: F401, a fixture

import helpers
import run
from helpers import RecipeError

TOKEN = "hf_" + "Zq7" * 11
EVIL = """
open({mark!r}, "w").close()
from transformers import BertModel, BertPreTrainedModel, BertTokenizer
EvilModel, EvilPreTrainedModel, EvilTokenizer = BertModel, BertPreTrainedModel, BertTokenizer
"""
SANDBOXED = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def mark(tmp_path):
    """Where a payload leaves a file if it runs."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def copy(tmp_path, mark):
    """Copies a tiny model into a folder, with code beside it that leaves `mark`."""

    def make(name, folder="copy"):
        shutil.copytree(ROOT / "data/tiny" / name, tmp_path / folder)
        (tmp_path / folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
        return tmp_path / folder

    return make


def edit(path, **values):
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | values), encoding="utf-8")


class Payload:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def one_line(error):
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    return str(error.value)


AUTO_MAPS = {
    "config.json": {"auto_map": {"AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}},
    "generation_config.json": {"deep": [{"auto_map": {"AutoModel": "evil.EvilModel"}}]},
    "artifact.metadata": {"auto_map": {"AutoModel": "evil.EvilModel"}},
}


@pytest.mark.parametrize("file", AUTO_MAPS)
def test_a_retriever_with_code_of_its_own_is_refused(copy, file):
    folder = copy("colbert")
    edit(folder / file, **AUTO_MAPS[file])
    with pytest.raises(RecipeError, match=rf"{file} asks to run code of its own \(auto_map\)") as error:
        helpers.retrieval.load(str(folder), ["文"])
    one_line(error)


def test_a_retriever_whose_base_has_code_of_its_own_is_refused(copy):
    folder, other = copy("colbert"), copy("colbert", "other")
    edit(other / "config.json", **AUTO_MAPS["config.json"])
    edit(folder / "artifact.metadata", model_name=str(other))
    with pytest.raises(RecipeError, match=r"other: config\.json asks to run code of its own"):
        helpers.retrieval.load(str(folder), ["文"])


def test_colbert_cannot_fetch_a_class_even_if_it_is_asked(copy):
    helpers.retrieval.patch_ragatouille()
    from colbert.modeling import hf_colbert

    folder = copy("colbert")
    with pytest.raises(RecipeError, match="asks to run code of its own"):
        hf_colbert.get_class_from_dynamic_module("evil.EvilModel", str(folder))
    edit(folder / "config.json", **AUTO_MAPS["config.json"])
    with pytest.raises(RecipeError, match="asks to run code of its own"):
        hf_colbert.class_factory(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_base_with_code_of_its_own_is_refused(copy, file):
    folder = copy("gemma2")
    edit(folder / file, **AUTO_MAPS[file])
    load = {"max_seq_length": 64, "dtype": "float32"}
    for read in (
        lambda: helpers.records.model_source(str(folder)),
        lambda: helpers.models.text_config(str(folder)),
        lambda: helpers.models.load_tokenizer(str(folder)),
        lambda: helpers.models.load(str(folder), "transformers", **load),
    ):
        with pytest.raises(RecipeError, match="asks to run code of its own") as error:
            read()
        one_line(error)


def test_kernels_of_a_repository_are_refused(copy):
    folder = copy("gemma2")
    edit(folder / "config.json", attn_implementation="somebody/kernels")
    with pytest.raises(RecipeError, match=r"code of its own \(attn_implementation\)"):
        helpers.models.text_config(str(folder))


def test_weights_in_a_pickle_are_refused(copy, mark):
    folder = copy("gemma2")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RecipeError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        helpers.models.load(str(folder), "transformers", max_seq_length=64)


def test_an_adapter_in_a_pickle_or_of_nonsense_is_refused(copy, mark, tmp_path):
    model, _ = helpers.models.load(str(copy("gemma2")), "transformers", max_seq_length=64)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    edit(adapter / "adapter_config.json", **config)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(RecipeError, match=r"adapter_model\.bin is a pickle"):
        helpers.models.load_adapter(model, str(adapter))
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="the adapter cannot be loaded") as error:
        helpers.models.load_adapter(model, str(adapter))
    one_line(error)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": "many"}', "{}", "[" * 100_000])
def test_an_adapter_config_of_any_shape_is_one_line(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(RecipeError, match=r"adapter_config\.json") as error:
        helpers.hub.lora_rank({"name": str(tmp_path), "commit": ""})
    one_line(error)


def test_a_chat_template_that_reaches_out_of_its_sandbox_is_refused(copy):
    folder = copy("gemma2")
    edit(folder / "tokenizer_config.json", chat_template=SANDBOXED)
    with pytest.raises(RecipeError, match="its chat template reaches out of its sandbox"):
        helpers.models.load_tokenizer(str(folder))


def test_a_checkpoint_with_a_pickle_of_another_is_left_out(tmp_path, mark, capsys):
    record = helpers.records.make("03_sft", {}, {}, [])
    folder = tmp_path / "checkpoints"
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    torch.save({}, checkpoint / "optimizer.pt")
    helpers.records.write(checkpoint, record | {"measured": {"seconds": 1.0}})
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Payload(mark)))
    assert helpers.checkpoints.find(folder, record, tmp_path / "adapter") is None
    assert "optimizer.pt was changed" in capsys.readouterr().out


def test_a_run_file_with_a_tag_of_python_is_refused(tmp_path, mark):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: !!python/object/apply:builtins.open [{mark}, w]\n")
    done = run_py(str(path), "--dry-run")
    assert done.returncode == 1 and "cannot be read as YAML" in done.stderr and done.stderr.count("\n") == 1


def run_py(*arguments, options=(), before="", **environment):
    command = [sys.executable, *options, "run.py", *arguments]
    if before:
        command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# ---- foreign text, and what a server says


def test_terminal_escapes_and_line_breaks_of_others_are_shown_as_text(tmp_path):
    assert helpers.shown("ア\x1b[2J\u202eb\u2028\ud800") == "ア\\x1b[2J\\u202eb\\u2028\\ud800"
    edit(tmp_path / "adapter_config.json", r=4, base_model_name_or_path="\x1b]0;title\x07")
    source = {"name": str(tmp_path), "commit": "", "sha256": "1", "inputs": {}}
    with pytest.raises(RecipeError) as error:
        helpers.records.check_adapter(source, source | {"name": "base"})
    assert "\\x1b]0;title\\x07" in one_line(error)
    (tmp_path / "README.md").write_text('---\nlicense: "mit\\e[31m"\n---\n')
    assert helpers.hub.card_licence(str(tmp_path), "") == {"licence": "mit\\x1b[31m"}


class Hostile(Hub):
    """A hub that answers some paths with an error, and repeats what it was sent."""

    def fail(self):
        for part, status in self.server.broken.items():
            if part in self.path:
                body = json.dumps({"error": f"no\n{self.headers.get('Authorization')}"}).encode()
                self.send_response(status, f"no {self.headers.get('Authorization')}")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Error-Message", f"no {self.headers.get('Authorization')}")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                return True
        return False

    def answer(self, body, status=200, **headers):
        if isinstance(body, dict) and "private" in body:
            body = body | {"private": self.server.private}
        super().answer(body, status, **headers)

    def do_GET(self):
        if not self.fail():
            super().do_GET()

    do_HEAD = do_GET

    def do_POST(self):
        if self.fail():
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return super().do_POST()


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    server = start_hub(Hostile)
    server.broken, server.private = {}, True
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def refused(done):
    """The RecipeError of a process, which tells no token."""
    assert done.returncode == 1 and TOKEN not in done.stdout + done.stderr, done.stderr
    kind, _, line = done.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "helpers.RecipeError", done.stderr
    return line


@pytest.mark.parametrize(("place", "status"), [("/api/", 401), ("/api/repos/create", 403), ("/commit/", 500)])
def test_a_push_that_fails_tells_status_and_remedy_but_no_token(hostile, tmp_path, place, status):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    hostile.broken = {place: status}
    line = refused(call(hostile, f"helpers.hub.push_folder({str(folder)!r}, 'me/thing', {TOKEN!r})"))
    assert f"HTTP {status}" in line and "cannot be pushed to me/thing" in line


def test_a_push_without_network_is_one_line(hostile, tmp_path):
    hostile.shutdown()
    hostile.server_close()
    line = refused(call(hostile, f"helpers.hub.push_rows({{}}, 'me/thing', {TOKEN!r})"))
    assert "ConnectError" in line and "check the network" in line


def test_nothing_is_pushed_into_a_public_repository(hostile, tmp_path):
    hostile.files["me/thing"] = {"README.md": b"---\n{}\n---"}
    hostile.private = False
    line = refused(call(hostile, f"helpers.hub.push_folder({str(tmp_path)!r}, 'me/thing', {TOKEN!r})"))
    assert "exists and is public: make it private" in line
    assert not hostile.commits


@pytest.mark.parametrize(("file", "status"), [("record.json", 503), ("README.md", 503), ("config.json", 401)])
def test_a_hub_that_cannot_be_reached_is_no_missing_file(hostile, file, status):
    hostile.files["me/base"] = {"config.json": b"{}", "README.md": b"---\n{}\n---"}
    known = call(hostile, "print(helpers.records.model_source('me/base')['sha256'] == '')")
    assert known.stdout == "True\n", known.stderr  # no record there
    shutil.rmtree(os.environ["HF_HOME"])
    hostile.broken = {f"/{file}": status}
    # huggingface_hub asks six times if the hub is busy, and waits 23 seconds in all.
    line = refused(call(hostile, "import time; time.sleep = lambda _: None; helpers.records.model_source('me/base')"))
    assert f"{file} cannot be fetched from the hub" in line and f"HTTP {status}" in line


def pushed(files):
    """The files of a hub repository with the record that notebook 3 writes for them."""
    record = helpers.records.make("03_sft", {}, {}, [])
    record["files"] = {name: helpers.hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {**files, "record.json": json.dumps(record).encode(), "README.md": b"---\n{}\n---"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapter_model.safetensors": b"other"}, "adapter_model.safetensors was changed on the hub"),
        ({"chat_template.jinja": b"x"}, "chat_template.jinja was added on the hub"),
        ({"tokenizer.json": None}, "tokenizer.json is missing on the hub"),
    ],
)
def test_what_lies_on_the_hub_is_compared_with_its_record(hostile, change, said):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "tokenizer.json": b"{}"}
    hostile.files["me/adapter"] = pushed(files)
    source = "print(helpers.records.model_source('me/adapter')['sha256'])"
    assert len(call(hostile, source).stdout.strip()) == 64
    shutil.rmtree(os.environ["HF_HOME"])
    changed = {**hostile.files["me/adapter"], **change}
    hostile.files["me/adapter"] = {name: content for name, content in changed.items() if content is not None}
    assert said in refused(call(hostile, source))


def set_up(tmp_path, **environment):
    """What the set-up cell of notebook 1 says in a folder of its own."""
    content = nbformat.read(ROOT / "notebooks/01_quantize.ipynb", 4)
    content.cells = [cell for cell in content.cells if cell.id == "setup"]
    with pytest.raises(CellExecutionError) as error:
        NotebookClient(content, resources={"metadata": {"path": str(tmp_path)}}).execute(env=os.environ | environment)
    assert error.value.ename == "SystemExit"
    return str(error.value)


def test_the_set_up_cell_tells_no_token_and_knows_half_a_clone(tmp_path):
    address = f"http://me:{TOKEN}@127.0.0.1:9/recipe.git"
    said = set_up(tmp_path, RECIPE_REPOSITORY=address)
    assert TOKEN not in said and "127.0.0.1:9/recipe.git cannot be fetched at v" in said
    (tmp_path / "gemma2-ja-qlora").mkdir()
    (tmp_path / "gemma2-ja-qlora/colab_setup.py").touch()
    assert "gemma2-ja-qlora is not whole: delete it" in set_up(tmp_path, RECIPE_REPOSITORY=address)


# ---- the judge


def drip(handler):
    """A byte every 0.1 s, without end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    with suppress(OSError):
        for _ in range(600):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)


def drip_headers(handler):
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(600):
            handler.wfile.write(f"X-{number}: 1\r\n".encode())
            handler.wfile.flush()
            time.sleep(0.1)


@pytest.mark.parametrize("slow", [drip, drip_headers])
def test_a_judge_that_drips_is_given_up_at_the_time_limit(serve, tmp_path, monkeypatch, slow):  # noqa: F811
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server, started = serve(slow), time.monotonic()
    found = judge(server, tmp_path, TASKS[:1], ["答え"], timeout=0.5)
    assert found["failures"] == [{"task_id": 0, "reason": "TimeoutError"}]
    assert len(server.requests) == 4
    assert time.monotonic() - started < 30  # four times the limit, and a dripping server would take minutes


def test_a_reply_without_end_is_not_read(serve, tmp_path):  # noqa: F811
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        for _ in range(400):
            handler.wfile.write(b" " * 2**20)
            sent.append(2**20)

    server = serve(flood, GOOD)
    found = judge(server, tmp_path, TASKS[:2], ["答え", "答え"], timeout=60)
    assert found["failures"] == [{"task_id": 0, "reason": "a reply of more than 4,194,304 bytes"}]
    assert found["grades"] == {1: 4}
    assert sum(sent) < 100 * 2**20  # what the sockets hold, not what the server has


# ---- records, versions, run.py


def test_a_product_that_was_kept_keeps_the_versions_that_made_it(tmp_path):
    path = tmp_path / "output.jsonl"
    path.write_text("1")
    record = helpers.records.make("04_rag_inference", {}, {"k": 1}, [])
    helpers.records.write(path, record | {"versions": {"torch": "1"}, "parallel": 4})
    helpers.records.write(path, record | {"versions": {"torch": "2"}, "parallel": 8})
    kept = helpers.records.read(path)
    assert (kept["versions"], kept["parallel"]) == ({"torch": "1"}, 4)
    path.write_text("2")
    helpers.records.write(path, record | {"versions": {"torch": "2"}})
    assert helpers.records.read(path)["versions"] == {"torch": "2"}


@pytest.mark.parametrize(("last", "versions"), [(True, "1"), (False, "1, then 2")])
def test_a_training_that_goes_on_names_the_versions_of_both(tmp_path, last, versions):
    record = helpers.records.make("03_sft", {}, {"r": 1}, []) | {"versions": {"trl": "1"}}
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "weights").touch()
    helpers.records.write(checkpoint, record | {"measured": {"seconds": 1}, "last_step": last})
    for _ in range(2):
        now = record | {"versions": {"trl": "2"}}
        assert helpers.checkpoints.find(tmp_path, now, tmp_path / "adapter") == checkpoint
        assert now["versions"] == {"trl": versions}


def test_answers_that_are_partly_kept_name_the_versions_of_both(tmp_path):
    base = {"name": "base", "commit": "", "sha256": "1", "inputs": {}}
    made = helpers.records.make("04_rag_inference", {"model": base}, {"k": 1}, [])
    first, second = (made | {"versions": {"torch": v}, "parallel": n} for v, n in (("1", 7), ("2", 7)))
    output = tmp_path / "output.jsonl"
    assert helpers.answers.parallel_before(output) == 0
    helpers.answers.begin(output, first)
    assert helpers.answers.parallel_before(output) == 7
    helpers.answers.begin(output, second)
    assert helpers.records.read(output)["versions"] == {"torch": "1, then 2"}
    output.write_text("")
    helpers.records.write(output, second)
    assert helpers.answers.parallel_before(output) == 0  # that run is finished


def series(tmp_path, monkeypatch, *, seed=1, **changed):
    """run.py in this process with notebooks that write a file and a report; the names of those that ran."""
    output_dir, ran = tmp_path / "out", []
    notebooks = {name: ("", {"output_dir": "", "seed": 1}) for name in ("01_a", "02_b", "03_c")}

    def execute(source, executed, parameters):
        name = source.stem
        ran.append(name)
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.write_text('{"metadata": {"papermill": {"exception": null}}}')
        (output_dir / f"{name}.jsonl").write_text(name)
        helpers.records.write(output_dir / f"{name}.jsonl", helpers.records.make(name, {}, {}, []))
        report = output_dir / f"{name}_report.json"
        report.write_text("{}")
        os.utime(report, (1e9, 1e9 + len(ran)))  # a file system whose clock is years behind
        return 1.0

    monkeypatch.setattr(run, "execute", execute)
    run.hashes.cache_clear()
    chosen = {f"{name}.seed": seed for name in notebooks}
    chosen |= {f"{name}.output_dir": str(output_dir) for name in notebooks}
    values = {"start": "01", "only": None, "force": False, "dry_run": False} | changed
    run.run_series(chosen, notebooks, run.argparse.Namespace(**values))
    return ran


@pytest.mark.parametrize("chosen", [{"start": "03"}, {"only": "03"}])
@pytest.mark.parametrize("change", [lambda path: path.write_text("more"), Path.unlink])
def test_what_a_notebook_reads_is_compared_even_if_the_one_before_is_not_run(tmp_path, monkeypatch, chosen, change):
    assert series(tmp_path, monkeypatch) == ["01_a", "02_b", "03_c"]
    assert series(tmp_path, monkeypatch) == []
    assert series(tmp_path, monkeypatch, **chosen) == []
    change(tmp_path / "out/02_b.jsonl")
    assert series(tmp_path, monkeypatch, **chosen) == ["03_c"]


def test_a_report_is_guarded_whatever_the_clock_of_the_file_system_says(tmp_path, monkeypatch):
    for _ in range(2):
        series(tmp_path, monkeypatch, force=True)
        (tmp_path / "out/02_b_report.json").unlink()
        assert series(tmp_path, monkeypatch) == ["02_b"]


@pytest.mark.parametrize("product", [3, "x", [], {"a": 1}])
def test_a_run_json_with_a_product_of_another_form_is_one_line(tmp_path, monkeypatch, product):
    series(tmp_path, monkeypatch)
    path = tmp_path / "out/run.json"
    runs = json.loads(path.read_text())
    runs["02_b"]["products"]["02_b.jsonl"] = product
    path.write_text(json.dumps(runs))
    with pytest.raises(RecipeError, match=r"run\.json: damaged or cut short"):
        series(tmp_path, monkeypatch)


# ---- names, and how Python is started

SMOKE = ("data/runs/smoke.yaml", "--dry-run")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("-rf", 'it begins with "-"'),
        ("outputs/\x1b[2J", "a control character"),
        (b"outputs/\xff", "writes names in"),
        ("outputs/loop/a", "is a link that leads nowhere"),
    ],
)
def test_an_output_dir_that_cannot_be_one_is_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/loop").symlink_to("loop")
    with pytest.raises(RecipeError, match=said) as error:
        helpers.machine.check_output_dir(os.fsdecode(name))
    one_line(error)


@pytest.mark.parametrize("start", [{"options": ("-I",)}, {"PYTHONSAFEPATH": "1"}])
def test_an_isolated_python_finds_the_rooms(start):
    done = run_py(*SMOKE, "--set", "output_dir=outputs/never", **start)
    assert done.returncode == 0 and "01_quantize: run" in done.stdout, done.stderr


def test_a_japanese_name_without_utf8_is_one_line():
    start = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_py(*SMOKE, "--set", "output_dir=outputs/日本語", **start)
    assert done.returncode == 1 and "set PYTHONUTF8=1" in done.stderr and done.stderr.count("\n") == 1


def test_few_file_handles_are_named():
    done = run_py(*SMOKE, before="ulimit -n 40")
    assert done.returncode == 1 and "only 40 files may be open" in done.stderr and done.stderr.count("\n") == 1


def test_a_closed_output_is_no_error():
    done = run_py(*SMOKE, before="exec >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_file_beside_the_caller_is_found(tmp_path):
    (tmp_path / "own.yaml").write_text("output_dir: outputs/never\n")
    command = [sys.executable, str(ROOT / "run.py"), "own.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "01_quantize: run" in done.stdout, done.stderr
