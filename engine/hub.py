"""The hub: commits, configs, cards and other files of its repositories, and what is pushed there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from helpers import RecipeError, first_line


def find_model(name: str, revision: str = "") -> str:
    """The commit of a hub repository, "" for a model folder, before anything large is loaded.

    RecipeError says whether the name, the permission or the network is at fault.
    """
    if Path(name).is_dir():
        if any(Path(name, file).is_file() for file in ("config.json", "adapter_config.json")):
            return ""
        raise RecipeError(f"{name}: the folder holds no config.json; did the notebook that writes it finish?")
    if name.count("/") != 1 or name.startswith((".", "/")):
        problem = "no such folder; run the notebook that writes it, or name a hub repository (owner/name)"
        raise RecipeError(f"{name}: {problem}")
    try:
        return HfApi().model_info(name, revision=revision or None, timeout=20).sha
    except GatedRepoError:
        problem = "asks for consent: accept its terms on the hub and set the secret HF_TOKEN"
    except RepositoryNotFoundError:
        problem = "neither a folder nor a hub repository (a private one needs the secret HF_TOKEN)"
    except RevisionNotFoundError:
        problem = f"the hub repository has no revision {revision!r}"
    except Exception as error:
        problem = f"no such folder, and the hub cannot be reached ({first_line(error)})"
    raise RecipeError(f"{name}: {problem}")


def find_dataset(name: str, revision: str = "") -> str:
    """The commit of a hub data set; raises what the hub's client raises."""
    return HfApi().dataset_info(name, revision=revision or None, timeout=20).sha or ""


def fetch(name: str, file: str, commit: str, kind: str = "model") -> Path | None:
    """One file of a hub repository, where it was stored on this machine; None if the repository does not hold it."""
    try:
        return Path(hf_hub_download(name, file, repo_type=kind, revision=commit or None))
    except EntryNotFoundError:
        return None


def read_config(name: str, revision: str = "", file: str = "config.json") -> dict[str, Any]:
    """A JSON file of a model folder or hub repository, without loading the model; RecipeError if there is no model."""
    find_model(name, revision)
    path = Path(name, file) if Path(name).is_dir() else hf_hub_download(name, file, revision=revision or None)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def lora_rank(adapter: Mapping[str, Any] | None) -> int:
    """The rank of an adapter (a source, see engine/records.py), 0 without one."""
    return read_config(adapter["name"], adapter["commit"], "adapter_config.json")["r"] if adapter else 0


def card_licence(name: str, commit: str, kind: str = "model") -> dict[str, str]:
    """The licence that a card names: `licence` (several with ", " between), and for one that the hub does not know
    `licence_name` and `licence_link`; {} without one.
    """
    try:
        path = fetch(name, "README.md", commit, kind) if commit else Path(name, "README.md")
        card = metadata_load(path) or {} if path else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    licences = card.get("license") or []
    found = {"licence": ", ".join(map(str, licences if isinstance(licences, list) else [licences])).lower()}
    found |= {f"licence_{part}": card.get(f"license_{part}") for part in ("name", "link")}
    return {key: str(value) for key, value in found.items() if value}


def push_folder(folder: str | Path, hub_repo: str, token: str) -> None:
    """Upload a folder to a private hub model repository; an interrupted upload goes on where it stopped."""
    api = HfApi(token=token)
    api.create_repo(hub_repo, private=True, exist_ok=True)
    api.upload_folder(repo_id=hub_repo, folder_path=folder)


def push_rows(paths: Mapping[str, str | Path], hub_repo: str, token: str) -> None:
    """Upload files, each under the name that is its key, to a private hub data set in one commit."""
    api = HfApi(token=token)
    api.create_repo(hub_repo, repo_type="dataset", private=True, exist_ok=True)
    added = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
    api.create_commit(hub_repo, added, commit_message="Filtered rows and card", repo_type="dataset")
