"""The executed smoke notebooks as a reader sees them: rendered to HTML, without tracebacks and walls of text."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbconvert import HTMLExporter

NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
LONGEST = 200  # lines of output in a cell


def text_of(output) -> str:
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


@pytest.fixture(params=NAMES)
def executed(request, smoke):
    return nbformat.read(smoke / "notebooks" / f"{request.param}.ipynb", 4)


def test_renders_without_traceback_missing_glyphs_and_walls_of_text(executed):
    html, _ = HTMLExporter().from_notebook_node(executed)
    assert "Traceback (most recent call last)" not in html
    assert not re.search(r"Glyph \d+ .*missing from", html)
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    assert not [name for name, found in outputs.items() for output in found if output.output_type == "error"]
    lines = {name: "".join(map(text_of, found)).count("\n") for name, found in outputs.items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_nothing_is_repeated_or_warned_of(executed):
    """A progress bar is one line, and what libraries warn of is either mended or known and turned off."""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            text = text_of(output)
            assert "\r" not in text.strip(), cell.id
            assert "Warning" not in text and "WARNING" not in text, (cell.id, text)
            bars = re.findall(r"^(.*?)\s*\d+%\|", text, flags=re.MULTILINE)
            assert len(bars) == len(set(bars)), (cell.id, text)
