"""What a parameter may be: one table for run.py, papermill and a cell."""

import ast
import json
import math
import re

import pytest
from conftest import ROOT, run_cell
from papermill.cli import _resolve_type
from test_notebooks import NOTEBOOKS, RUN_FILES, defaults, parameters_cell, source

import helpers
from engine.parameters import Text
from helpers import RecipeError
from run_file import read_notebook, read_run

# Found by use; each of them was accepted in silence once, or ended in an error of a library after hours.
FOUND = [
    *[("learning_rate", value) for value in (math.inf, 1e9, -1.0, 0, math.nan, "2e-4", True)],
    *[("num_train_epochs", value) for value in (0, -1, math.nan, None)],
    *[("gradient_accumulation_steps", value) for value in (-1, 0, 1.5)],
    *[("per_device_train_batch_size", value) for value in (0, 2.0, "4")],
    *[("max_seq_length", value) for value in (8, 0, -1, 2048.0)],
    *[("loss_on", value) for value in ("answers", "", None, True)],
    *[("lora_alpha", value) for value in (0, -16, math.inf)],
    *[("r", value) for value in (1.5, 0, True, "64", [64], 10**6)],
    *[("max_new_tokens", value) for value in (0, -5, 48.0)],
    *[("k", value) for value in (-3, 1.0, None)],
    *[("prompt_style", value) for value in ("2025", 2024, None)],
    *[("max_rows", value) for value in (0.5, -1, "all")],
    *[("max_steps", value) for value in (-1, 1.0, True)],
    *[("logging_steps", value) for value in (0, -1, 0.1)],
    *[("double_quant", value) for value in (1, 0, "true", None)],
    *[("output_dir", value) for value in ("", " outputs/a", "outputs/a ", "~/x", "~", "a\nb", None, 3)],
    *[("hub_repo", value) for value in ("name", "a/b/c", "https://huggingface.co/a/b", " ", None)],
    *[("judge_base_url", value) for value in ("localhost:8000/v1", "https://", "ftp://a/v1", None)],
    *[("wandb_project", value) for value in ("a/b", "100%", "x" * 129, None)],
    *[("neftune_noise_alpha", value) for value in (-5, math.nan, "5")],
    *[("repetition_penalty", value) for value in (0, 0.5, -1.1, math.inf)],
    *[("seed", value) for value in (-1, 2**32, 1.0)],
]


def kinds_of_wrong(allowed):
    """Values that are wrong for everything of the same kind."""
    yield from (None, [], {}, b"x", [1], ("nf4",))
    if isinstance(allowed, Text):
        yield from (1, 1.5, True, "two\nlines")
    elif isinstance(allowed, range):
        yield from (allowed[0] - 1, allowed[-1] + 1, float(allowed[0]), True, str(allowed[0]), math.nan, math.inf)
    elif isinstance(allowed, tuple):
        yield from (allowed[0] - 1, allowed[1] * 2, -math.inf, math.inf, math.nan, True, str(allowed[0]))
    else:
        yield from ("", "other", 1, 0.0, str(allowed[0]) + " ")


def test_the_table_and_the_notebooks_name_the_same_parameters():
    assert {name for path in NOTEBOOKS for name in defaults(path)} == helpers.parameters.ALLOWED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defaults_are_allowed_and_forms_offer_the_choices_of_the_table(path):
    helpers.parameters.check(defaults(path))
    for line in source(parameters_cell(path)).splitlines():
        name, form = line.split(" ")[0], line.partition("# @param ")[2]
        allowed, choices = helpers.parameters.ALLOWED[name], re.match(r"\[.*?\]", form)
        if choices:
            assert ast.literal_eval(choices[0]) == allowed
        else:
            kinds = {"string": Text, "integer": range, "number": tuple, "boolean": list}
            kind = kinds[re.match(r'{type:"(\w+)"}', form)[1]]
            assert isinstance(allowed, kind) or (name == "lora_alpha" and kind is range)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_are_allowed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    read_run(path, [], {path.stem: read_notebook(path) for path in NOTEBOOKS})


@pytest.mark.parametrize(("name", "allowed"), helpers.parameters.ALLOWED.items(), ids=helpers.parameters.ALLOWED)
def test_what_is_not_allowed_is_refused_by_name(name, allowed):
    for value in kinds_of_wrong(allowed):
        with pytest.raises(RecipeError) as raised:
            helpers.parameters.check({name: value, "another": value})
        assert str(raised.value).startswith(f"{name} must be ") and "\n" not in str(raised.value)


def test_all_mistakes_are_named_at_once_with_what_is_allowed():
    with pytest.raises(RecipeError) as raised:
        helpers.parameters.check({"r": 0, "loss_on": "answers", "learning_rate": math.inf, "qa_data": 1}, "03_sft.")
    assert str(raised.value) == (
        "03_sft.qa_data must be the name of a file, a folder or a hub repository, without ~ and spaces at its ends, in "
        'quotes (run file: `qa_data: "1"`, papermill: `-r qa_data "1"`); it is 1; 03_sft.r must be a whole number from '
        "1 to 4,096; it is 0; 03_sft.learning_rate must be a number from 1e-09 to 0.1; it is inf; 03_sft.loss_on must "
        "be 'text' or 'answer'; it is 'answers'"
    )


@pytest.mark.parametrize(("name", "value"), FOUND, ids=lambda value: repr(value)[:30])
def test_run_py_and_the_cell_say_the_same(name, value, tmp_path, monkeypatch):
    """The value in a run file, and in the set-up cell of every notebook that has the parameter."""
    monkeypatch.chdir(ROOT)
    notebooks = {path.stem: read_notebook(path) for path in NOTEBOOKS}
    having = [notebook for notebook, (_, values) in notebooks.items() if name in values]
    assert having
    for notebook in having:
        values = defaults(ROOT / f"notebooks/{notebook}.ipynb") | {"output_dir": str(tmp_path), name: value}
        with pytest.raises(RecipeError, match=f"^{name} must be ") as in_cell:
            run_cell(notebook, "setup", **values)
        if isinstance(value, (bytes, tuple)) or value in ("~/x", "2e-4"):  # run.py knows what these two mean
            continue
        run_file = tmp_path / "run.yaml"
        section = json.dumps({name: value})  # YAML reads what JSON writes, but for Infinity and NaN
        section = section.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
        run_file.write_text(f"output_dir: outputs/a\n{notebook}: {section}\n", encoding="utf-8")
        with pytest.raises(RecipeError) as in_run_file:
            read_run(run_file, [], notebooks)
        assert str(in_run_file.value) == f"{notebook}.{in_cell.value}"


WRITTEN = ["010", "064", "0x10", "0b11", "0o17", "10:30", "1:2:3", "1_0", "1__0", "00", "+5", "１０", "1,000", "", "5."]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", ["max_rows", "time_budget_minutes"])
def test_numbers_are_decimal_or_refused_everywhere(name, written, tmp_path, monkeypatch):
    """In a run file, behind `--set`, and behind papermill's -p."""
    monkeypatch.chdir(ROOT)
    notebooks = {path.stem: read_notebook(path) for path in NOTEBOOKS}
    notebook = next(notebook for notebook, (_, values) in notebooks.items() if name in values)
    run_file, found = tmp_path / "run.yaml", []
    for section, sets in ((f"{name}: {written}", []), ("", [f"{notebook}.{name}={written}"])):
        run_file.write_text(f"output_dir: outputs/a\n{notebook}:\n  {section}\n", encoding="utf-8")
        try:
            found.append(read_run(run_file, sets, notebooks)[f"{notebook}.{name}"])
        except RecipeError as error:
            assert f"{notebook}.{name} must be " in str(error)
            found.append("refused")
    try:
        meant = _resolve_type(written)
        helpers.parameters.check({name: meant})
    except RecipeError:
        meant = "refused"
    decimal = int(written) if re.fullmatch(r"[+]?\d+(_\d+)*", written) else 5
    assert found == [meant, meant] and meant in ("refused", decimal)


@pytest.mark.parametrize("value", [["a", "b"], None, {}, 7, True, {"a": 1}])
@pytest.mark.parametrize("name", helpers.parameters.ALLOWED)
def test_advice_in_quotes_is_right_when_it_is_followed(name, value):
    try:
        helpers.parameters.check({name: value})
    except RecipeError as error:
        if advised := re.search(rf'`{name}: "(.*?)"`', str(error)):
            helpers.parameters.check({name: advised[1]})
