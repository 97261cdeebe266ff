"""What goes to the hub, and what is asked of it, against a small server that speaks the hub's HTTP API."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes files (safetensors as large files), answers for the cards of data sets."""

    def answer(self, body: dict | None, status: int = 200) -> None:
        content = json.dumps(body).encode() if body is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.git-lfs+json" if "lfs" in self.path else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/datasets/").partition("/revision")[0]
        card = self.server.cards.get(name)
        if card is None:
            return self.answer({"error": "not found"}, 404)
        return self.answer(
            {"id": name, "sha": "c0ffee", "private": False, "tags": [], "siblings": [], "cardData": card}
        )

    def do_PUT(self) -> None:
        self.server.stored.append(self.path.rsplit("/", 1)[1])
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/me/thing", "id": "me/thing"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]}
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self.server.stored:
                    item["actions"] = {"upload": {"href": f"{self.server.address}/store/{item['oid']}", "header": {}}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path and self.server.refuse:
            self.answer({"error": "interrupted"}, 400)
        else:
            self.server.commits.append([json.loads(line) for line in body.decode().splitlines()])
            self.answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/thing/commit/0"}
            )

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.cards, server.created, server.commits, server.stored, server.refuse = {}, [], [], [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def call(hub, code: str) -> subprocess.CompletedProcess:
    """Run `code` with helpers in a process of its own: huggingface_hub reads the address of the hub at import."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", f"import helpers\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def committed(commit: list[dict]) -> dict[str, bytes | str]:
    """Path: content of a small file, or hash of a large one."""
    files = {}
    for line in commit:
        if line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            files[line["value"]["path"]] = line["value"]["oid"]
    return files


def test_folder_goes_to_a_private_repository_and_an_interrupted_push_goes_on(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    push = f"helpers.push_folder({str(tmp_path)!r}, 'me/thing', 'hf_x')"
    hub.refuse = True
    assert call(hub, push).returncode == 1
    assert (len(hub.stored), hub.commits) == (1, [])
    hub.refuse = False
    done = call(hub, push)
    assert done.returncode == 0, done.stderr
    assert len(hub.stored) == 1, "the large file was sent twice"
    assert all(request["visibility"] == "private" for request in hub.created)
    (commit,) = hub.commits
    assert committed(commit)["model.safetensors"] == hub.stored[0]
    assert committed(commit)["README.md"].startswith(b"---\nlicense: gemma")


def test_dataset_goes_up_with_its_card_in_one_commit(hub, tmp_path):
    (tmp_path / "card.md").write_text("---\nlanguage: ja\n---\n")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    files = {"README.md": str(tmp_path / "card.md"), "filtered_magpie.jsonl": str(tmp_path / "rows.jsonl")}
    done = call(hub, f"helpers.push_dataset({files!r}, 'me/thing', 'hf_x')")
    assert done.returncode == 0, done.stderr
    assert (hub.created[0]["type"], hub.created[0]["visibility"]) == ("dataset", "private")
    (commit,) = hub.commits
    assert committed(commit) == {"README.md": b"---\nlanguage: ja\n---\n", "filtered_magpie.jsonl": b'{"a": 1}\n'}


def test_licence_is_read_from_the_card(hub):
    hub.cards = {"a/free": {"license": "apache-2.0"}, "a/share-alike": {"license": ["cc-by-sa-4.0"]}, "a/none": {}}
    free = call(hub, "print(helpers.data_source('a/free'))")
    expected = {"name": "a/free", "commit": "c0ffee", "sha256": "", "licence": "apache-2.0", "inputs": {}}
    assert free.stdout.strip() == str(expected), free.stderr
    for name, licence in {"a/share-alike": "cc-by-sa-4.0", "a/none": "unknown"}.items():
        source = f"helpers.data_source({name!r}, 'main')"
        stopped = call(hub, f"helpers.check_licences({{'dataset': {source}}})")
        assert f"RecipeError: {name}: the licence {licence} is not on the allowed list" in stopped.stderr
        allowed = call(hub, f"helpers.check_licences({{'dataset': {source}}}, {licence!r}); print({source}['licence'])")
        assert allowed.stdout.strip() == licence
