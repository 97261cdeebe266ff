"""Keys never reach a file: neither an executed notebook nor a log, a report, a checkpoint or wandb's folder."""

import base64
import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_notebooks import execute

import helpers

KEYS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11 + "x",
    "WANDB_API_KEY": "5ec2e7" * 6 + "beef",
    "JUDGE_API_KEY": "sk-" + "Jd4" * 9,
}


def test_no_secret_in_anything_that_is_written(smoke, tmp_path, monkeypatch):
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
        assert helpers.machine.secret(name) == key
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("quantized", "filtered_magpie.jsonl", "filtered_magpie.jsonl.record.json"):
        copy = shutil.copytree if (smoke / name).is_dir() else shutil.copy
        copy(smoke / name, tmp_path / name)
    execute("03_sft", tmp_path, max_steps=2, warmup_steps=0, wandb_project="secrets")
    execute("04_rag_inference", tmp_path, max_new_tokens=4)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"03_sft.ipynb", "04_rag_inference.ipynb", "sft_metrics.json", "inference_metrics.json"} <= names
    assert [name for name in names if name.endswith(".wandb")], "wandb wrote nothing: it was not switched on"
    holds = [(path, name) for path in files for name, key in KEYS.items() if key.encode() in path.read_bytes()]
    assert not holds


@pytest.mark.parametrize("name", KEYS)
def test_without_colab_a_missing_secret_is_empty(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    assert helpers.machine.secret(name) == ""


class Wandb(BaseHTTPRequestHandler):
    """Answers who the owner of a key is, as wandb's API does."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        key = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode().removeprefix("api:")
        replies = {"good": (200, {"data": {"viewer": {"username": "me"}}}), "old": (200, {"data": {"viewer": None}})}
        replies |= {"ill": (503, {}), "list": (200, []), "bad": (401, {"errors": []})}
        status, body = replies[key]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def wandb(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    server.shutdown()


@pytest.mark.parametrize(
    ("key", "mode"), [("good", "online"), ("", "offline"), ("ill", "offline"), ("list", "offline")]
)
def test_wandb_is_online_with_a_key_and_offline_without(wandb, key, mode):
    assert helpers.machine.wandb_mode(key) == mode


@pytest.mark.parametrize("key", ["bad", "old"])
def test_a_key_that_wandb_refuses_is_named(wandb, key):
    with pytest.raises(helpers.RecipeError, match=r"refuses the key WANDB_API_KEY") as raised:
        helpers.machine.wandb_mode(key)
    assert "\n" not in str(raised.value)


def test_without_network_wandb_is_offline_at_once(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert helpers.machine.wandb_mode("good") == "offline"
    assert "wandb cannot be reached (ConnectionError)" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert helpers.machine.wandb_mode("good") == "disabled"
