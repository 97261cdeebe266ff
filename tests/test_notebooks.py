"""The four notebooks: their form, and what they leave behind when they are executed with other values."""

import ast
import json

import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# study/parts.yaml is the list of benchmarks/study.py.
RUN_FILES = sorted(file for file in (ROOT / "data" / "runs").rglob("*.yaml") if file.stem != "parts")


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def parameters_cell(path):
    (cell,) = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    return cell


def defaults(path):
    """Name and default value of every parameter."""
    tree = ast.parse(source(parameters_cell(path)))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}


def test_there_are_at_most_62_parameters():
    assert sum(len(defaults(path)) for path in NOTEBOOKS) <= 62


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["01_quantize", "02_filter_magpie", "03_sft", "04_rag_inference"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestForm:
    def test_format(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert notebook["metadata"]["language_info"]["name"] == "python"
        assert "widgets" not in notebook["metadata"]
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)

    def test_outputs_are_stripped(self, path):
        assert not [cell["id"] for cell in cells(path) if cell.get("outputs") or cell.get("execution_count")]

    def test_set_up_cell_is_the_same_everywhere(self, path):
        def set_up(notebook):
            return next(source(cell) for cell in cells(notebook) if cell["id"] == "setup")

        assert set_up(path) == set_up(NOTEBOOKS[0])

    def test_every_parameter_has_a_form_field(self, path):
        lines = [line for line in source(parameters_cell(path)).splitlines() if not line.startswith("#")]
        assert len(lines) == len(defaults(path))  # Colab reads a form field from a single line
        assert not [line for line in lines if "# @param" not in line]

    def test_cells_are_short(self, path):
        lengths = {cell["id"]: source(cell).count("\n") + 1 for cell in cells(path) if cell["cell_type"] == "code"}
        assert lengths.pop("parameters") <= 30 and lengths.pop("setup") <= 30
        assert not {name: lines for name, lines in lengths.items() if lines > 25}

    def test_parameters_keep_their_names(self, path):
        """No parameter's name, of any notebook, is used for something else: the set-up cell, run again, would take it
        for the parameter. Only output_dir is set once more, below drive_dir.
        """
        names = set().union(*map(defaults, NOTEBOOKS)) - {"output_dir"}
        code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code" and cell["id"] != "parameters"]
        stored = {
            node.id
            for text in code
            for node in ast.walk(ast.parse(text))
            if isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, ast.Name)
        }
        assert not names & stored

    def test_mock_values_are_those_of_the_smoke_run(self, path):
        run = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))
        expected = {"output_dir": run["output_dir"], **run[path.stem]}
        assert parameters_cell(path)["metadata"]["nbmake"]["mock"] == expected

    def test_seed2024_spells_out_every_value(self, path):
        run = yaml.safe_load((ROOT / "data/runs/seed2024.yaml").read_text(encoding="utf-8"))
        assert {"output_dir", *run[path.stem]} == set(defaults(path))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_name_parameters_that_exist(path):
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert run.pop("output_dir").startswith("outputs/")
    for notebook, values in run.items():
        known = defaults(ROOT / "notebooks" / f"{notebook}.ipynb")
        assert set(values) <= set(known)
        for name, value in values.items():
            number = isinstance(known[name], (int, float)) and isinstance(value, (int, float))
            assert number or isinstance(value, type(known[name])), (notebook, name)
