"""What goes to the hub, and what is asked of it, against a small server that speaks the hub's HTTP API."""

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import ROOT

import helpers
from helpers import RecipeError

SHA = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes files (safetensors as large files) and gives them back, with the cards of data sets.

    `files` holds what was committed: {"datasets/me/rows": {"README.md": b"..."}}; models have no prefix, and the files
    of a branch are those of "me/rows@branch". A request for which `lost(path)` is true gets no answer.
    """

    def parse_request(self) -> bool:
        return super().parse_request() and not self.server.lost(self.path)

    def revision(self, repository: str, revision: str) -> dict[str, bytes]:
        """The files of a branch or commit."""
        if revision in self.server.snapshots:
            return self.server.snapshots[revision]
        return self.server.files.get(f"{repository}@{revision}", self.server.files.get(repository, {}))

    def commit(self, repository: str, branch: str, changes: list[dict]) -> str:
        """Take all changes at once; the new commit."""
        key = f"{repository}@{branch}"
        key = key if key in self.server.files else repository
        content = {path: self.server.large.get(found, found) for path, found in committed(changes).items()}
        gone = {change["value"]["path"] for change in changes if change["key"] == "deletedFile"}
        kept = {path: found for path, found in self.server.files.get(key, {}).items() if path not in gone}
        self.server.files[key] = kept | content
        return self.sha(key)

    def sha(self, key: str) -> str:
        """The newest commit of a branch; that of main is always the same."""
        if "@" not in key or key not in self.server.files:
            return SHA
        files = self.server.files[key]
        found = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.server.snapshots[found] = files
        return found

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/vnd.git-lfs+json" if "lfs" in self.path else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            repository, _, rest = self.path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            card = self.server.cards.get(repository.removeprefix("datasets/"))
            content = self.revision(repository, revision).get(file)
            if file == "README.md" and card is not None:
                content = f"---\n{yaml.safe_dump(card)}\n---\n".encode()
            if content is None:
                return self.answer({}, 404, X_Error_Code="EntryNotFound")
            commit = revision if revision in self.server.snapshots else SHA
            return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)
        kind, _, rest = self.path.removeprefix("/api/").partition("/")
        name = "/".join(rest.split("/")[:2]).partition("?")[0]
        repository = f"datasets/{name}" if kind == "datasets" else name
        branch = self.path.partition("/revision/")[2].partition("?")[0]
        files = self.revision(repository, branch)
        if not files and name not in self.server.cards:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        if "/tree/" in self.path:
            found = [{"type": "file", "path": path, "size": len(c), "oid": "0"} for path, c in files.items()]
            return self.answer(found)
        card = self.server.cards.get(name)
        if card is None:
            card = yaml.safe_load(files.get("README.md", b"---\n{}\n---").split(b"---")[1])
        siblings = [{"rfilename": path} for path in files]
        info = {"id": name, "sha": self.sha(f"{repository}@{branch}"), "private": True, "tags": [], "cardData": card}
        info["siblings"] = siblings
        return self.answer(info)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        oid = self.path.rsplit("/", 1)[1]
        self.server.stored.append(oid)
        self.server.large[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.server.created.append(made := json.loads(body))
            prefix = "datasets/" if made.get("type") == "dataset" else ""
            name = f"{prefix}{made['organization']}/{made['name']}" if made.get("organization") else made["name"]
            self.server.files.setdefault(name, {".gitattributes": b""})
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
        elif "/branch/" in self.path:
            repository, _, branch = self.path.removeprefix("/api/models/").partition("/branch/")
            new = f"{repository}@{branch}" not in self.server.files
            self.server.files.setdefault(f"{repository}@{branch}", {**self.server.files[repository]})
            self.answer({}, 200 if new else 409)
        elif "/super-squash/" in self.path:
            self.server.squashed.append(self.path)
            self.answer({})
        elif "/commit/" in self.path and self.server.refuse:
            self.answer({"error": "interrupted"}, 400)
        else:
            commit = [json.loads(line) for line in body.decode().splitlines()]
            repository, _, branch = self.path.removeprefix("/api/").removeprefix("models/").partition("/commit/")
            if commit[0]["value"].get("parentCommit", found := self.sha(f"{repository}@{branch}")) != found:
                return self.answer({"error": "not the newest commit"}, 412)
            self.server.commits.append(commit)
            sha = self.commit(repository, branch, commit)
            url = f"{self.server.address}/me/thing/commit/{sha}"
            self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    def log_message(self, *_: object) -> None:
        pass


def serve(handler: type[Hub]) -> ThreadingHTTPServer:
    """A hub of this kind, empty, on any free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.cards, server.created, server.commits, server.stored, server.refuse = {}, [], [], [], False
    server.files, server.large, server.snapshots, server.squashed, server.lost = {}, {}, {}, [], lambda path: False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture
def hub():
    server = serve(Hub)
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
    push = f"helpers.hub.push_folder({str(tmp_path)!r}, 'me/thing', 'hf_x')"
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


def test_a_folder_of_many_files_is_one_commit(hub, tmp_path):
    """Also where the hub's client has its newer way to upload, which commits at most 250 files at a time."""
    for number in range(260):
        (tmp_path / f"{number}.json").write_text("{}")
    push = f"helpers.hub.push_folder({str(tmp_path)!r}, 'me/thing', 'hf_x')"
    done = call(hub, f"import os; os.environ['HF_HUB_DISABLE_XET'] = '0'\n{push}")
    assert done.returncode == 0, done.stderr
    (commit,) = hub.commits
    assert len(committed(commit)) == 260


def test_licence_is_read_from_the_card(hub):
    hub.cards = {"a/free": {"license": "apache-2.0"}, "a/share-alike": {"license": ["cc-by-sa-4.0"]}, "a/none": {}}
    done = call(hub, "for name in ('a/free', 'a/free:ja:train'): print(helpers.records.data_source(name))")
    free, chosen = map(ast.literal_eval, done.stdout.splitlines())
    expected = {"name": "a/free", "commit": SHA, "sha256": "", "licence": "apache-2.0", "inputs": {}}
    assert free == expected, done.stderr
    assert chosen == expected | {"sha256": chosen["sha256"], "chosen": "ja:train"} and chosen["sha256"]
    asked = """
for name, licence in (("a/share-alike", "cc-by-sa-4.0"), ("a/none", "unknown")):
    source = {"dataset": helpers.records.data_source(name, "main")}
    helpers.records.check_licences(source, licence)
    print(source["dataset"]["licence"])
    try:
        helpers.records.check_licences(source)
    except helpers.RecipeError as error:
        print(error)
"""
    said = call(hub, asked).stdout.splitlines()
    assert said[::2] == ["cc-by-sa-4.0", "unknown"]
    for name, licence, problem in zip(("a/share-alike", "a/none"), said[::2], said[1::2], strict=True):
        assert problem.startswith(f"{name}: the licence {licence} is not on the allowed list")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "holds no config.json"),
        ("outputs/nowhere/quantized", "no such folder"),
        ("nobody/nothing", "the hub cannot be reached"),
    ],
)
def test_missing_models(name, message):
    with pytest.raises(RecipeError, match=message):
        helpers.hub.find_model(name)
