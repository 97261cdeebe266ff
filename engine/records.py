"""Records: what was made from what, under which licence, and the cards that tell people so.

The record of a folder is the file record.json in it, that of a file lies beside it. A record holds
    stage      the notebook or script
    inputs     a source for each input: name, commit (of a hub repository), sha256 (of its contents), licence (of
               data), and the inputs that it was made from itself: a record leads back to published weights and data
    settings   the values that decide the result
    versions   of the packages
    parallel   (of answers) how many were decoded at the same time: in 16 bit an answer can depend on it
    files      SHA-256 of every file that was written
It is written last, so a folder or file whose record names its files is finished.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from engine import files, folders, forms, hub, machine
from helpers import ROOMS, RecipeError, digest, first_line, shown

CODE = Path(__file__).resolve().parent.parent  # where helpers.py lies
ONLOOKERS = {"architectures", "outlook", "trial"}  # they make nothing; what they decide stands in records' settings


def path_of(product: str | Path) -> Path:
    """Where the record of a folder or file lies."""
    product = Path(product)
    return product / "record.json" if product.is_dir() else product.with_name(f"{product.name}.record.json")


def make(stage: str, inputs: Mapping[str, Any], settings: Mapping[str, Any], packages: Iterable[str]) -> dict[str, Any]:
    """A record of something that is not written yet, as JSON gives it back; `write` adds the files."""
    record = {"stage": stage, "inputs": inputs, "settings": settings, "versions": machine.package_versions(packages)}
    return json.loads(json.dumps(record))


def write_with_card(product: str | Path, record: Mapping[str, Any], card: str) -> Path:
    """Write the card and, last, the record of a finished folder or file; returns where the card lies."""
    product = Path(product)
    card_file = product / "README.md" if product.is_dir() else product.with_name(f"{product.stem}_card.md")
    card_file.write_text(card, encoding="utf-8")
    write(product, record)
    return card_file


def finish(
    product: str | Path, record: Mapping[str, Any], card: str, hub_repo: str, token: str, next_step: tuple[str, str]
) -> None:
    """Write the card and, last, the record of a folder or file; push it if `hub_repo` names a repository.

    `next_step`, such as ("notebook 3", "model"), is who goes on with it and by which parameter: that is printed.
    """
    product, (who, parameter) = Path(product), next_step
    card_file = write_with_card(product, record, card)
    if not hub_repo:
        return print(f"{who} finds {product} by the same output_dir and drive_dir")
    if product.is_dir():
        hub.push_folder(product, hub_repo, token)
    else:
        own = path_of(product)
        hub.push_rows({product.name: product, own.name: own, "README.md": card_file}, hub_repo, token)
    return print(f'in {who}: {parameter} = "{hub_repo}"')


def begin(folder: str | Path) -> None:
    """Mark a folder as unfinished, with an empty record in the place of its old one: nothing may use it yet."""
    files.write_json(Path(folder, "record.json"), {})


def write(product: str | Path, record: Mapping[str, Any]) -> None:
    """Write the record of a finished folder or file, with the hash of every file.

    `versions` are those that made it: where the old record says that the same files were made from the same inputs with
    the same settings, they were only kept, and so are its versions.
    """
    hashes, old = files.hashes(product), read(product)
    if old.get("files") == hashes and not changed_parts(old, record):
        record = {**record, **{part: old[part] for part in ("versions", "parallel") if part in old}}
    files.write_json(path_of(product), {**record, "files": hashes})


def join_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The versions in two records, the second of which goes on with what the first began: "5.1, then 5.2"."""
    joined = dict(new["versions"])
    for name, before in old["versions"].items():
        now = joined.get(name, "")
        same = before == now or before.endswith(f", then {now}")
        joined[name] = before if same else f"{before or 'none'}, then {now or 'none'}"
    return joined


def read(product: str | Path) -> dict[str, Any]:
    """The record of a local folder or file; {} if there is none, or it is damaged or has another form.

    RecipeError if the file system does not say: what cannot be read is not what is not there.
    """
    return forms.read_record(path_of(product))


def read_hub(name: str, file: str, commit: str, kind: str = "model") -> dict[str, Any]:
    """The record that a hub repository holds as `file`, {} without one.

    RecipeError if it cannot be fetched, or if another file there is not as it says: of a data set those that it names
    are compared, of a model all.
    """
    record = forms.read_record(hub.fetch(name, file, commit, kind))
    recorded = record.get("files", {})
    if recorded and (
        change := forms.compare(recorded, hub.hashes(name, commit, recorded if kind == "dataset" else None, kind))
    ):
        raise RecipeError(
            f"{name}: {change} on the hub after notebook {record['stage']} wrote it: push it again, or delete {file} "
            "there if what is there is meant"
        )
    return record


def find_change(product: str | Path, record: Mapping[str, Any]) -> str:
    """The first file that is not as its record says, such as "weights was changed"; "" if all are."""
    return forms.compare(record["files"], files.hashes(product))


def check(product: str | Path, finished: bool = False) -> dict[str, Any]:
    """The record of a local folder or file; {} if there is none, unless it must be `finished`.

    RecipeError if a file is missing, was added or changed, or if the record is damaged or was only begun.
    """
    record, path = read(product), path_of(product)
    own = f" (or, if what lies there is meant, delete {path} and name {product} in the parameters)"
    if path.exists() and not record.get("files"):
        raise RecipeError(f"{product} is unfinished, or {path} cannot be read: run the notebook that writes it{own}")
    if finished and not record:
        state = "has no record, so it was not written to its end" if Path(product).exists() else "does not exist"
        raise RecipeError(f"{product} {state}: run the notebook that writes it, or name another input")
    if record and (change := find_change(product, record)):
        raise RecipeError(
            f"{product}: {change} after notebook {record['stage']} wrote it: run that notebook again{own}"
        )
    return record


def data_source(name: str, revision: str = "", finished: bool = False) -> dict[str, Any]:
    """The source (see Records) of a data set: a local file or folder, which counts as your own, or a hub data set.

    Of `NAME:CHOICE` (see engine/folders.py) the choice is `chosen`, and part of the identity. RecipeError for a hub
    data set whose card cannot be read, and what `check` raises.
    """
    base, choices = (name, []) if finished else folders.parse_name(name)
    source = _local_data(base, finished) if finished or os.path.exists(base) else _hub_data(base, revision)
    if choices:
        source |= {"sha256": digest([identity(source), choices]), "chosen": ":".join(choices)}
    return source


def _local_data(name: str, finished: bool) -> dict[str, Any]:
    return _source(name, "", check(name, finished), {"licence": OWN_DATA})


def _hub_data(name: str, revision: str) -> dict[str, Any]:
    folders.check_hub_id(name)
    try:
        commit = hub.find_dataset(name, revision)
        card = {"licence": "unknown"} | hub.card_licence(name, commit, "dataset")
        record = read_hub(name, "filtered_magpie.jsonl.record.json", commit, "dataset")
        return _source(name, commit, record, card)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{name}: its licence cannot be read from the hub ({first_line(error)}); check the name, the network and, "
            "for a private one, the secret HF_TOKEN; or name a local file"
        ) from None


def model_source(name: str, revision: str = "", finished: bool = False) -> dict[str, Any]:
    """The source (see Records) of a model or adapter: a hub repository, or a local folder (always, if it must be
    `finished`), whose files `check` checks.
    """
    commit = "" if finished else hub.find_model(name, revision)
    record = read_hub(name, "record.json", commit) if commit else check(name, finished)
    return _source(name, commit, record, hub.card_licence(name, commit))


def _source(name: str, commit: str, record: Mapping[str, Any], licence: Mapping[str, str]) -> dict[str, Any]:
    hashes = record.get("files") or ({} if commit else files.hashes(name))
    sha256 = digest(hashes) if hashes else ""
    return {"name": name, "commit": commit, "sha256": sha256, **licence, "inputs": record.get("inputs", {})}


def find_models(model: str, adapter: str, output_dir: str) -> dict[str, dict[str, Any]]:
    """The sources of `model` and, unless `adapter` is "none", of the adapter; empty names mean those of `output_dir`.

    An adapter on the hub names the model that it was trained on, which is taken where there is none in `output_dir`.
    RecipeError for an adapter that was trained on another model.
    """
    own, found = f"{output_dir}/quantized", {}
    if adapter != "none":
        found["adapter"] = model_source(adapter or f"{output_dir}/adapter", finished=not adapter)
    trained_on = found.get("adapter", {"inputs": {}})["inputs"].get("model", {})
    name = model or (trained_on["name"] if trained_on.get("commit") and not Path(own).exists() else own)
    if name != shown(name):
        raise RecipeError(f"the adapter {adapter} names a base model with control characters, {name}: name it in model")
    found = {"model": model_source(name, finished=name == own)} | found
    if "adapter" in found:
        check_adapter(found["adapter"], found["model"])
    return found


def rows_source(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The source (see Records) of rows that were read, known by their contents, wherever they came from."""
    return {"name": name, "commit": "", "sha256": digest(rows), "inputs": {}}


def origins(inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sources at the bottom of a record's inputs: published weights and data."""
    found: dict[str, dict[str, Any]] = {}
    for role, source in inputs.items():
        found |= origins(source["inputs"]) or {role: source}
    return found


def identity(source: Mapping[str, Any]) -> str:
    """What tells a source from another one: its contents, wherever they lie; without a hash its commit or name."""
    return source["sha256"] or source["commit"] or source["name"]


def changed_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the inputs and settings in which two records differ."""
    parts = [{role: identity(source) for role, source in r["inputs"].items()} | r["settings"] for r in (old, new)]
    return sorted(key for key in parts[0].keys() | parts[1].keys() if parts[0].get(key) != parts[1].get(key))


def rooms_in(code: str) -> set[str]:
    """The rooms but ONLOOKERS that code names (`helpers.slots`) or imports (from `engine`, or from `engine.slots`)."""
    named = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "helpers":
            named.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("engine"):
            named |= {alias.name for alias in node.names} | {node.module.removeprefix("engine.")}
    return named & set(ROOMS) - ONLOOKERS


def hash_code(rooms: Iterable[str]) -> dict[str, str]:
    """SHA-256 of helpers.py, of these rooms and of all rooms that they import in turn, by path."""
    reached, waiting = {"helpers.py": files.sha256(CODE / "helpers.py")}, sorted(rooms)
    while waiting:
        path = f"engine/{waiting.pop()}.py"
        if path not in reached:
            reached[path] = files.sha256(CODE / path)
            waiting += rooms_in((CODE / path).read_text(encoding="utf-8"))
    return dict(sorted(reached.items()))


# Licences of data that ask for nothing but a notice. Share-alike, non-commercial and unknown ones are not among them.
ALLOWED_LICENCES = [
    *("afl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-3.0", "cc-by-4.0", "cc0-1.0"),
    *("cdla-permissive-2.0", "mit", "odc-by", "pddl", "unlicense"),
]
OWN_DATA = "your own (local file)"


def check_licences(inputs: Mapping[str, Any], also_allowed: str = "") -> None:
    """RecipeError if a data set at the bottom of `inputs` has a licence that is neither in ALLOWED_LICENCES nor in
    `also_allowed` (identifiers with commas between; "unknown" stands for a card that names none).
    """
    allowed = [*ALLOWED_LICENCES, OWN_DATA, *(part.strip().lower() for part in also_allowed.split(","))]
    for role, source in origins(inputs).items():
        found = "" if role in ("model", "adapter") else source.get("licence", OWN_DATA)
        if wrong := ", ".join(licence for licence in found.split(", ") if found and licence not in allowed):
            raise RecipeError(
                f"{source['name']}: the licence {wrong} is not on the allowed list (what is trained on share-alike "
                f"data may inherit its licence); choose other data, or read it and set allow_licences = {wrong!r}"
            )


def _card(data: Any, title: str, record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A card: front matter, title, and a table of the origins, the settings, the versions and more `facts`."""
    rows = {}
    for role, source in origins(record["inputs"]).items():
        rows[role.replace("_", " ")] = ", ".join(filter(None, map(source.get, ("name", "chosen", "commit", "licence"))))
    for part in ("settings", "versions"):
        values = {name: value for name, value in record[part].items() if value != "" and name not in ("texts", "lists")}
        rows[part] = ", ".join(f"{name} {value}" for name, value in values.items())
    cells = {name: shown(str(value)).replace("|", "\\|") for name, value in (rows | dict(facts)).items()}
    table = "".join(f"| {name} | {value} |\n" for name, value in cells.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}"


# What licences of models ask to be said with a model that was made from theirs.
LICENCE_NOTICES = {
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
    "llama": "Built with Llama.",
}


def model_card(title: str, record: Mapping[str, Any], tags: Iterable[str], facts: Mapping[str, Any]) -> str:
    """The hub's model card (README.md), with the base model's licence and the notice that it asks for."""
    sources = origins(record["inputs"])
    base = sources.pop("model")
    licences = base["licence"].split(", ") if base.get("licence") else [None]
    data = ModelCardData(
        base_model=base["name"],
        language="ja",
        license=licences if len(licences) > 1 else licences[0],
        license_name=base.get("licence_name"),
        license_link=base.get("licence_link"),
        tags=list(tags),
        datasets=[source["name"] for source in sources.values() if source["commit"]] or None,
    )
    notices = [f"\n{text}\n" for name, text in LICENCE_NOTICES.items() if f", {name}" in f", {base.get('licence')}"]
    return "".join([_card(data, title, record, facts), *notices])


def dataset_card(title: str, record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The hub's dataset card (README.md), with the licence of the source."""
    source = record["inputs"]["dataset"]
    licences = [licence for licence in source["licence"].split(", ") if licence not in (OWN_DATA, "unknown")]
    data = DatasetCardData(
        language="ja",
        license=licences or None,
        source_datasets=[source["name"]] if source["commit"] else None,
        configs=[{"config_name": "default", "data_files": "filtered_magpie.jsonl"}],  # the record beside it is no data
    )
    return _card(data, title, record, facts)


def check_adapter(adapter: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """RecipeError if the adapter was trained on another base than `model` (both as `model_source` gives them).

    The same base has the same contents; for an adapter without a record, the name that the adapter's config holds.
    """
    name, found = adapter["name"], model["name"]
    if base := adapter["inputs"].get("model"):
        trained_on, same = base["name"], identity(base) == identity(model)
    else:
        trained_on = hub.read_config(name, adapter["commit"], "adapter_config.json").get("base_model_name_or_path")
        same = os.path.realpath(str(trained_on).replace("\0", "")) == os.path.realpath(found)
    if not same:
        raise RecipeError(
            f"the adapter {name} was trained on {trained_on}, not on {found}: name the same model in both"
        )
