"""What run.py is told: the parameters of the notebooks, the values of a run file and of `--set`, and their mistakes."""

import ast
import difflib
import os
import re
from pathlib import Path

import nbformat
import yaml

from engine import machine, parameters
from engine.reports import one_line
from helpers import RecipeError


class RunFile(yaml.SafeLoader):
    """YAML in which a number is what Python's int() and float() read, as papermill's -p has it (plain YAML takes 010
    for 8, 10:30 for 630 and 0x10 for 16), and a key that is there twice is an error (it silently keeps the last).
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key, _ in node.value if keys.count(key.value) > 1]:
            raise yaml.YAMLError(f"{twice[1].value!r} is there twice (line {twice[1].start_mark.line + 1}); join them")
        return super().construct_mapping(node, deep)


WHOLE = r"[-+]?\d+(_\d+)*"
REAL = rf"({WHOLE}\.\d*|[-+]?\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
NUMBERS = {"tag:yaml.org,2002:int": WHOLE, "tag:yaml.org,2002:float": REAL}
RunFile.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern in NUMBERS.items():
    RunFile.add_implicit_resolver(tag, re.compile(f"({pattern})$"), None)
RunFile.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_notebook(path: Path) -> tuple[str, dict]:
    """A notebook's code, and what its cell tagged `parameters` assigns (papermill gives only text)."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    tagged = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(tagged).body if isinstance(n, ast.Assign)}
    return "\n".join(cell.source for cell in cells), values


def meant(value: object, default: object) -> object:
    """`value`, as a number where YAML reads 2e-4 as text, and with the home folder for a `~` in front."""
    if isinstance(default, int | float) and re.fullmatch(rf"{WHOLE}[eE][-+]?\d+", str(value)):
        return float(value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def number(text: str) -> object:
    """The number, true or false that `text` means in a run file; `text` itself if it is nothing that YAML can read."""
    try:
        return yaml.load(text, RunFile)
    except (yaml.YAMLError, ValueError):
        return text


def read_run(path: Path, sets: list[str], notebooks: dict[str, tuple[str, dict]]) -> dict:
    """`NOTEBOOK.PARAMETER: value` for every parameter: default, then run file, then `--set`; RecipeError if unknown."""
    defaults = {f"{name}.{key}": value for name, (_, values) in notebooks.items() for key, value in values.items()}
    try:
        run = yaml.load(path.read_text(encoding="utf-8"), RunFile)
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: encoding, or a wrong date
        raise RecipeError(f"{path}: cannot be read as YAML in UTF-8: {one_line(error)}") from None
    if not isinstance(run, dict) or "output_dir" not in run:
        raise RecipeError(
            f"{path}: a run file holds `output_dir: NAME` and one section per notebook, `03_sft: {{...}}`"
        )
    wanted = dict.fromkeys([f"{name}.output_dir" for name in notebooks], run.pop("output_dir"))
    for name, section in run.items():
        if not isinstance(section, dict | None):
            raise RecipeError(f"{path}: {name} must be a section, `{name}: {{PARAMETER: value}}`, not {section!r}")
        wanted |= {f"{name}.{key}": value for key, value in (section or {}).items()}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: want NAME=VALUE")
        for known in [known for known in defaults if key in (known, known.partition(".")[2])] or [key]:
            wanted[known] = value if isinstance(defaults.get(known, ""), str) else number(value)
    for key in wanted.keys() - defaults.keys():
        close = difflib.get_close_matches(key, {*defaults, *(known.partition(".")[2] for known in defaults)})
        remedy = f"did you mean {', '.join(close)}?" if close else "the first code cell of each notebook has them all"
        raise RecipeError(f"{path} or --set: unknown {key!r}; {remedy}")
    values = {key: meant(wanted.get(key, default), default) for key, default in defaults.items()}
    for name, (_, own) in notebooks.items():
        parameters.check({key: values[f"{name}.{key}"] for key in own}, section=f"{name}.")
        machine.check_output_dir(values[f"{name}.output_dir"])
    return values
