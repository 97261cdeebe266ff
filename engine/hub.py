"""The hub: commits, configs, cards and other files of its repositories, and what is pushed there.

Nothing from elsewhere runs here: what asks for code of its own, or holds its weights as a pickle, is refused. What a
server says is shown nowhere, because it may repeat a token.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine import files, folders
from helpers import RecipeError, find_cause, first_line, shown

logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its warnings are the server's words

REMEDIES = {
    401: "check the secret HF_TOKEN",
    403: "check that the secret HF_TOKEN may do this, that the terms of the repository are accepted, and that your "
    "storage is not full",
    404: "check the name",
    429: "the hub is asked too often: wait a while",
}


def failure(what: str, error: Exception) -> RecipeError:
    """The line for an error of the hub's client: `what` failed, kind and status, and what to do."""
    remedy = REMEDIES.get(find_cause(error)[1] or 0, "check the network and the disk, and try again later")
    return RecipeError(f"{what} ({first_line(error)}): {remedy}")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Every error of the hub's client within becomes a RecipeError that begins with `what` (see `failure`)."""
    try:
        with warnings.catch_warnings(action="ignore"):  # some are the server's words
            yield
    except RecipeError:
        raise
    except Exception as error:
        raise failure(what, error) from None


def find_model(name: str, revision: str = "") -> str:
    """The commit of a hub repository, "" for a model folder, before anything large is loaded.

    RecipeError says whether the name, the permission or the network is at fault, and refuses what asks for code of its
    own (see `refuse_code`).
    """
    if Path(name).is_dir():
        if not any(Path(name, file).is_file() for file in ("config.json", "adapter_config.json")):
            raise RecipeError(f"{name}: the folder holds no config.json; did the notebook that writes it finish?")
        refuse_code(name, "", [path.name for path in Path(name).iterdir()])
        return ""
    if name.count("/") != 1 or name.startswith((".", "/")):
        problem = "no such folder; run the notebook that writes it, or name a hub repository (owner/name)"
        raise RecipeError(f"{name}: {problem}")
    try:
        info = HfApi().model_info(name, revision=revision or None, timeout=20)
    except GatedRepoError:
        problem = "asks for consent: accept its terms on the hub and set the secret HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "neither a folder nor a hub repository (a private one needs the secret HF_TOKEN)"
    except RevisionNotFoundError:
        problem = f"the hub repository has no revision {revision!r}"
    except Exception as error:
        problem = f"no such folder, and the hub cannot be reached ({first_line(error)})"
    else:
        commit = check_commit(name, info.sha)
        refuse_code(name, commit, [file.rfilename for file in info.siblings or ()])
        return commit
    raise RecipeError(f"{name}: {problem}")


# What transformers, peft and colbert-ai read of a repository besides weights and vocabularies.
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
CONFIGS += ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "artifact.metadata")


def refuse_code(name: str, commit: str, names: Collection[str]) -> None:
    """RecipeError if one of the files `names` of a model folder or repository asks a library to run code from there:
    a config with `auto_map`, or weights that are there as a pickle only.
    """
    for file in sorted(set(CONFIGS) & set(names)):
        refuse_auto_map(name, read_json(name, commit, file), file)
    pickles = sorted(file for file in names if re.search(r"^[^/]*\.(bin|pt|pth|ckpt|pkl|dnn)$", file))
    weights = [file for file in pickles if "model" in file]
    if weights and not any(file.endswith(".safetensors") for file in names):
        raise RecipeError(
            f"{name}: {weights[0]} is a pickle, which can run code; name a repository with safetensors, or save the "
            "model anew with them"
        )


def refuse_auto_map(name: str, config: Any, file: str = "config.json") -> None:
    """RecipeError if a config names, at any depth, code that a library would fetch and run: classes, or a repository of
    kernels as the implementation of its attention.
    """
    waiting = [config]
    while waiting:
        value = waiting.pop()
        for key, named in value.items() if isinstance(value, dict) else ():
            kernel = "implementation" in str(key) and "/" in str(named)
            if named and (key == "auto_map" or kernel):
                raise RecipeError(
                    f"{name}: {file} asks to run code of its own ({key}), which is not done here; choose a model that "
                    "the libraries know"
                )
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def find_dataset(name: str, revision: str = "") -> str:
    """The commit of a hub data set; raises what the hub's client raises."""
    return check_commit(name, HfApi().dataset_info(name, revision=revision or None, timeout=20).sha)


def check_commit(name: str, commit: Any) -> str:
    """The commit that the hub names; RecipeError if it is none: it becomes a part of paths on this machine."""
    if not (isinstance(commit, str) and re.fullmatch("[0-9a-f]{40,64}", commit)):
        raise RecipeError(f"{name}: the hub names no commit; check the address HF_ENDPOINT")
    return commit


def fetch(name: str, file: str, commit: str, kind: str = "model") -> Path | None:
    """One file of a hub repository, where it was stored on this machine; None if the repository does not hold it.

    RecipeError if that cannot be found out: a hub that cannot be reached is no hub without the file.
    """
    with one_line(f"{name}: {file} cannot be fetched from the hub"):
        try:
            path = Path(hf_hub_download(name, file, repo_type=kind, revision=commit or None))
            if not path.is_file():
                raise OSError("what came is no file")
            return path
        except LocalEntryNotFoundError:  # the network is at fault, although it is an EntryNotFoundError, too
            raise
        except EntryNotFoundError:
            return None


def find_file(name: str, commit: str, file: str) -> Path | None:
    """A file of a model folder or hub repository, on this machine; None if there is none."""
    path = Path(name, file) if Path(name).is_dir() else fetch(name, file, commit)
    return path if path and path.is_file() else None


def read_json(name: str, commit: str, file: str) -> dict[str, Any]:
    """A JSON object of a model folder or hub repository; RecipeError if it is not there or something else."""
    path = find_file(name, commit, file)
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{name}: its {file} cannot be read ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{name}: its {file} {'is not there' if value is None else 'holds no JSON object'}")
    return value


def read_config(name: str, revision: str = "", file: str = "config.json") -> dict[str, Any]:
    """A JSON file of a model folder or hub repository, without loading the model; RecipeError if there is no model."""
    return read_json(name, find_model(name, revision), file)


def lora_rank(adapter: Mapping[str, Any] | None) -> int:
    """The rank of an adapter (a source, see engine/records.py), 0 without one."""
    rank = read_config(adapter["name"], adapter["commit"], "adapter_config.json").get("r") if adapter else 0
    if type(rank) is not int:
        raise RecipeError(f"{adapter['name']}: its adapter_config.json names no rank `r`; is it a LoRA adapter?")
    return rank


def hashes(name: str, commit: str, names: Collection[str] | None = None, kind: str = "model") -> dict[str, str]:
    """SHA-256 of files of a hub repository by path, as `files.hashes` of a folder gives them; of `names` or, without,
    of all but records, cards and hidden files. Of a large file the hub tells it, small ones are fetched.
    """
    with one_line(f"{name}: its files cannot be listed by the hub"):
        info = HfApi().repo_info(name, repo_type=kind, revision=commit, files_metadata=True, timeout=20)
    found = {file.rfilename: file.lfs for file in info.siblings or ()}
    left_out = re.compile(r"(^|/)(\.|(record\.json|readme\.md)$)", re.IGNORECASE)
    wanted = [file for file in found if (file in names if names is not None else not left_out.search(file))]
    large = {file: found[file].sha256 for file in wanted if found[file]}
    small = {file: fetch(name, file, commit, kind) for file in wanted if file not in large}
    return large | {file: files.sha256(path) for file, path in small.items() if path}


def card_licence(name: str, commit: str, kind: str = "model") -> dict[str, str]:
    """The licence that a card names: `licence` (several with ", " between), and for one that the hub does not know
    `licence_name` and `licence_link`; {} without one. A card that cannot be read is said, and names none.
    """
    path = fetch(name, "README.md", commit, kind) if commit else Path(name, "README.md")
    try:
        card = metadata_load(path) or {} if path and path.exists() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        print(f"{shown(name)}: its card names no licence that can be read ({first_line(error)})")
        return {}
    card = card if isinstance(card, dict) else {}
    licences = card.get("license") or []
    found = {"licence": ", ".join(map(str, licences if isinstance(licences, list) else [licences])).lower()}
    found |= {f"licence_{part}": card.get(f"license_{part}") for part in ("name", "link")}
    return {key: shown(str(value)) for key, value in found.items() if value}


def open_private(api: HfApi, hub_repo: str, kind: str) -> None:
    """Create a private hub repository, or take the one that is there; RecipeError if that one is public."""
    try:
        private = api.repo_info(hub_repo, repo_type=kind, timeout=20).private
    except RepositoryNotFoundError:
        api.create_repo(hub_repo, repo_type=kind, private=True, exist_ok=True)
        return
    refuse_public(hub_repo, private)


def refuse_public(hub_repo: str, private: Any) -> None:
    """RecipeError unless a repository is private, as the hub says."""
    if not private:
        raise RecipeError(
            f"hub_repo {hub_repo} exists and is public: make it private in its settings on the hub, or choose another "
            "name (what is meant to be public, make public after the push)"
        )


def push_folder(folder: str | Path, hub_repo: str, token: str) -> None:
    """Upload a folder to a private hub model repository in one commit; an interrupted upload goes on where it stopped.

    `upload_folder` would make several commits of a large folder, and a reader between two would see half of it.
    """
    api = HfApi(token=token)
    with one_line(f"{folder} is complete, but cannot be pushed to {hub_repo}"):
        open_private(api, hub_repo, "model")
        added = [CommitOperationAdd(name, str(Path(folder, name))) for name in folders.list_files(Path(folder))]
        api.create_commit(hub_repo, added, commit_message="Files, card and record")


def push_rows(paths: Mapping[str, str | Path], hub_repo: str, token: str) -> None:
    """Upload files, each under the name that is its key, to a private hub data set in one commit."""
    api = HfApi(token=token)
    with one_line(f"{', '.join(paths)} are complete, but cannot be pushed to {hub_repo}"):
        open_private(api, hub_repo, "dataset")
        added = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        api.create_commit(hub_repo, added, commit_message="Filtered rows and card", repo_type="dataset")
