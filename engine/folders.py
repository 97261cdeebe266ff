"""Which files are the rows of a data set: one file, or of a folder or hub repository a configuration and a split.

`NAME:CHOICE` names a configuration of the card, a split, or a file or folder in the data set, and
`NAME:CONFIGURATION:SPLIT` both. A split for validation or test is taken only when it is named (or if tasks are read
from a data set that has no other).
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fsspec.utils import glob_translate
from huggingface_hub import HfApi, metadata_load, snapshot_download

from helpers import RecipeError, first_line

KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
READABLE = re.compile(rf"\.({'|'.join(KINDS)})(\.(gz|zst))?$", re.IGNORECASE)
# Files that may hold rows, but not in a kind that is read here.
OTHER_ROWS = re.compile(
    r"\.(arrow|feather|orc|avro|xlsx?|ods|pkl|pickle|sqlite3?|db|h5|hdf5|npy|npz|zip|tar|tgz|7z|rar|bz2|xz|lz4|lzma)$",
    re.IGNORECASE,
)
# Files that describe a data set.
NO_ROWS = re.compile(
    r"(readme|licen[cs]e)(.*\.(md|txt|rst))?|config\.json|dataset_infos?\.json|dataset_dict\.json|(.*\.)?record\.json"
    r"|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
CACHES = {".git", ".cache", ".ipynb_checkpoints", "__pycache__", "__MACOSX"}
# The words in the name of a file or folder that put it into a split, as on the hub.
SPLIT_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "dev", "val"},
    "train": {"train", "training"},
}
# What people write in place of a name, and what to do about it.
NOT_NAMES = {
    r"[\0-\x1f\x7f]": "the name holds a control character; write it anew",
    r"^\w+://|^datasets/": "addresses are not followed; name a hub data set as owner/name",
    r"^[A-Za-z]:|\\": "a Windows path means nothing here; copy the file to this machine and write its path with /",
    r"^[\[({'\"]": "write one name without quotes and brackets; several files are read if a folder holds them",
    r"[*?]": "patterns are not followed; name the folder, and all its files are read",
    r"@": "write a hub data set as owner/name; its branch or commit goes into dataset_revision (notebook 2)",
}


class Selection(NamedTuple):
    """What is read of a data set, and what of it is not."""

    files: list[Path]
    folder: Path | None = None  # None for a single file
    part: str = ""  # configuration and split in words; "" where there are none
    left_out: Sequence[str] = ()  # in words


def parse_name(name: str) -> tuple[str, list[str]]:
    """The file, folder or hub repository in `NAME:CHOICE`, and the choices; a name that exists may hold colons."""
    parts = name.split(":")
    for end in range(len(parts), 0, -1):
        if os.path.exists(base := ":".join(parts[:end])):
            return base, parts[end:]
    return (name, []) if re.match(r"[A-Za-z]:[\\/]|\w+://", name) else (parts[0], parts[1:])


def check_hub_id(name: str) -> None:
    """RecipeError if `name`, which is neither a file nor a folder here, cannot be a hub repository either."""
    hub_id = re.fullmatch(r"(?!datasets/)[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII)
    if not hub_id or READABLE.search(name) or OTHER_ROWS.search(name):
        advice = "relative paths start at the repository's root"
        advice = next((said for pattern, said in NOT_NAMES.items() if re.search(pattern, name)), advice)
        shown = name if name.isprintable() else repr(name)
        raise RecipeError(f"{shown[:200]}: no such file or folder, and no hub repository (owner/name); {advice}")


def shorten(names: Sequence[str], most: int = 6) -> str:
    """The names on one line; of many the first ones and the last."""
    middle = [f"{len(names) - most + 1:,} more"] if len(names) > most else []
    return ", ".join([*names[: most - 2], *middle, names[-1]] if middle else names)


def list_files(folder: Path) -> list[str]:
    """The paths of all files below a folder, also behind links, but for caches."""

    def stop(error: OSError) -> None:
        raise RecipeError(f"{folder}: cannot be read ({first_line(error)})")

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name not in CACHES]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def read_card(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a data set's card, README.md, lists, by name."""
    card = folder / "README.md"
    try:
        configs = (metadata_load(card) or {}).get("configs") or [] if card.is_file() else []
        named = {str(config.get("config_name", "default")): config for config in configs}
        if len(named) < len(configs):
            raise ValueError("a configuration is there twice")
        return named
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(f"{card}: its header cannot be read ({first_line(error)}); correct or delete it") from None


def card_splits(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The patterns of file names of each split of a card's configuration; {} if it names no files."""
    folder = glob.escape(config.get("data_dir") or "")
    given = config.get("data_files") or ([{"split": "", "path": "**"}] if folder else [])
    if isinstance(given, Mapping):
        given = [{"split": split, "path": path} for split, path in given.items()]
    splits: dict[str, list[str]] = {}
    for entry in [given] if isinstance(given, str) else given:
        split, paths = (entry["split"], entry["path"]) if isinstance(entry, Mapping) else ("train", entry)
        inside = [posixpath.join(folder, p) for p in ([paths] if isinstance(paths, str) else paths)]
        splits.setdefault(str(split), []).extend(inside)
    return splits


def split_files(card: Path, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The files among `names` that a card's patterns name, each once; RecipeError for what lies outside its folder."""
    found: dict[str, None] = {}
    for pattern in map(posixpath.normpath, patterns):
        if re.match(r"\.\.(/|$)|/|~|[A-Za-z]:/|\w+:/", pattern) or "\\" in pattern:
            raise RecipeError(f"{card}: {pattern!r} lies outside the folder; a card may only name files beside it")
        try:  # a name may hold brackets itself
            form = re.compile(glob_translate(pattern))
            readable = [n for n in names if READABLE.search(n) and is_data(n)]
            matching = [pattern] if pattern in names else list(filter(form.match, readable))
        except ValueError as error:
            raise RecipeError(f"{card}: {pattern!r} is no pattern ({first_line(error)}); correct it") from None
        if not matching:
            raise RecipeError(f"{card}: no file that can be read is named {pattern!r}; correct the card")
        found |= dict.fromkeys(matching)
    return list(found)


def split_of(name: str) -> str:
    """The split that the name of a file says, "" if it says none."""
    if shard := re.match(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", name):
        return shard[1]
    words = set(re.split(r"[-._ 0-9/]+", READABLE.sub("", name).lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & known), "")


def is_held_out(split: str) -> bool:
    """Whether a split is for validation or test."""
    return split_of(split) in ("test", "validation")


def group_files(config: Mapping[str, Any], card: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split, "" being no split: as the card's configuration says, or by their names."""
    try:
        splits = card_splits(config)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{card}: its data_files cannot be read ({first_line(error)}); correct the card") from None
    groups = {split: split_files(card, patterns, names) for split, patterns in splits.items()}
    rows = [name for name in names if READABLE.search(name) and is_data(name)]
    if not groups or "" in groups:  # the configuration is a folder, or there is none
        by_name: dict[str, list[str]] = {}
        for name in groups.get("", rows):
            by_name.setdefault(split_of(name.removeprefix(f"{config.get('data_dir')}/")), []).append(name)
        groups = by_name
    return groups


def choose_split(base: str, groups: Mapping[str, list[str]], for_tasks: bool) -> str:
    """The split that is read if none is named: train, or the only one that may be meant; RecipeError if it is unclear.

    Held-out splits are meant only `for_tasks`, and not beside train.
    """
    free = [split for split in groups if not is_held_out(split) or (for_tasks and "train" not in groups)]
    if len(free) == 1 or ("train" in free and "" not in free):
        return "train" if "train" in free else free[0]
    held = "; ".join(f"{shorten(names)} of {f'split {s}' if s else 'no split'}" for s, names in groups.items())
    choices = [f"{base}:{choice}" for split, names in groups.items() for choice in ([split] if split else names)]
    why = "several splits could be meant" if free else "all its files are held out for validation or test"
    raise RecipeError(f"{base}: {why} ({held}); name one: {shorten(choices)}")


def is_data(name: str) -> bool:
    """Whether a file may be meant as data: it is not hidden and does not only describe the data set."""
    return not re.search(r"(^|/)\.", name) and not NO_ROWS.fullmatch(name.rpartition("/")[2])


def is_hidden(name: str) -> bool:
    """Whether a file that could be read is hidden, and is not what macOS writes beside each file."""
    return bool(re.search(r"(^|/)\.(?!_)", name) and READABLE.search(name))


def choose_configuration(name: str, base: str, configs: Mapping[str, Any], choices: list[str]) -> str:
    """The configuration that is named first (and taken from the choices), the card's default, or the only one."""
    if choices and choices[0] in configs:
        return choices.pop(0)
    default = [key for key, config in configs.items() if config.get("default") is True or len(configs) == 1]
    key = (*default, "default" if configs else "")[0]
    if configs and key not in configs:
        listed = shorten([f"{base}:{key}" for key in configs], 20)
        raise RecipeError(f"{name}: it has several configurations; name one: {listed}")
    return key


def select(name: str, revision: str = "", for_tasks: bool = False) -> Selection:
    """The files of a data set; RecipeError if it is not there, or if it is unclear which of its files are meant."""
    base, choices = parse_name(name)
    if os.path.isfile(base):
        if choices:
            raise RecipeError(f"{name}: {base} is one file, in which there is no {':'.join(choices)}; name it alone")
        return Selection([Path(base)])
    own = os.path.isdir(base)
    folder, others = (Path(base), []) if own else download(base, revision)
    names, configs, card = list_files(folder), read_card(folder), folder / "README.md"
    if len(choices) == 1 and choices[0] in names and choices[0] not in configs:
        return Selection([folder / choices[0]], folder)
    rows = [n for n in names if READABLE.search(n) and is_data(n)]
    others += [n for n in names if n not in rows and (is_data(n) or is_hidden(n))]
    check_readable(base, rows, others)
    unasked, key = not choices, choose_configuration(name, base, configs, choices)
    words, groups = f"configuration {key}" * bool(key), group_files(configs.get(key, {}), card, names)
    if choices and not find_splits(choices[0], groups) and any(n.startswith(f"{choices[0]}/") for n in rows):
        key, configs = choices.pop(0), {}
        words, groups = f"folder {key}", group_files({"data_dir": key}, card, names)
    inside = f"{base}:{key}" if key and len(configs) != 1 else base
    if choices and (len(choices) > 1 or not find_splits(choices[0], groups)):
        there = shorten([f"{inside}:{split or 'train'}" for split in groups], 20)
        raise RecipeError(f"{name}: there is no {':'.join(choices)}; name one of {there}, or a file in it")
    # On the hub files of no split count only where none has one; in a folder of one's own they may well be meant.
    meant = {s: files for s, files in groups.items() if s or own or len(groups) == 1}
    split = find_splits(choices[0], groups)[0] if choices else choose_split(inside, meant, for_tasks)
    if own and unasked and not configs:
        check_others(base, split, others)
    named = set(chain.from_iterable(groups.values()))
    left_out = [f"{f'split {s}' if s else 'no split'} ({shorten(files)})" for s, files in groups.items() if s != split]
    left_out += [f"configuration {other}" for other in configs if other != key]
    left_out += [shorten([n for n in rows if n not in named]), shorten(others)]
    part = ", ".join(filter(None, [words, f"split {split}" * bool(split)]))
    return Selection([folder / n for n in groups[split]], folder, part, list(filter(None, left_out)))


def check_others(base: str, split: str, others: Iterable[str]) -> None:
    """RecipeError if files beside those of `split` may hold rows and cannot be read."""
    if unread := [name for name in others if OTHER_ROWS.search(name)]:
        raise RecipeError(
            f"{base}: {shorten(unread)} may hold rows, too, and cannot be read; save such files as JSON Lines or "
            f"Parquet, or read the others alone: {base}:{split or 'train'}"
        )


def find_splits(wanted: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The split that was named, also by another word for it (dev, eval); files of no split are for training."""
    known = [wanted, split_of(wanted) or wanted] + [""] * (wanted == "train")
    return [split for split in known if split in groups]


def check_readable(base: str, rows: Sequence[str], others: Sequence[str]) -> None:
    """RecipeError, with what to do, if a folder holds no readable file or is one that `save_to_disk` wrote."""
    arrow = [name for name in others if name.endswith(".arrow")]
    if arrow and any(name.endswith("state.json") for name in rows):
        part = '["train"]' if arrow[0].count("/") else ""
        code = f'datasets.load_from_disk("{base}"){part}.to_parquet("rows.parquet")'
        raise RecipeError(f"{base}: save_to_disk wrote this folder; run `{code}` in Python, name rows.parquet")
    if not rows:
        held = f"it holds {shorten(others)}" if others else "it is empty"
        kinds = f"{', '.join(KINDS)}, also with .gz or .zst"
        raise RecipeError(f"{base}: the folder holds no file that can be read ({kinds}); {held}")


def download(name: str, revision: str) -> tuple[Path, list[str]]:
    """The folder with the readable files of a hub data set, and the names of its other files."""
    check_hub_id(name)
    # The hub's patterns tell upper from lower case.
    kinds = ["".join(f"[{c}{c.upper()}]" for c in kind) for kind in KINDS]
    patterns = ["README.md", *(f"*.{kind}{packed}" for kind in kinds for packed in ("", ".gz", ".zst"))]
    wanted = {"repo_type": "dataset", "revision": revision or None}
    others: list[str] = []
    with suppress(Exception):  # without network what was stored before is read
        others = [n for n in HfApi().list_repo_files(name, **wanted) if not READABLE.search(n)]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **wanted))
    except Exception as error:
        raise RecipeError(
            f"{name}: the data set cannot be read ({first_line(error)}); check the name, the network and, for a "
            "private one, the secret HF_TOKEN; or name a local file"
        ) from None
    return folder, [
        n for n in others if n.rpartition("/")[2][:1] != "." and not NO_ROWS.fullmatch(n.rpartition("/")[2])
    ]
