"""The pages: their links lead somewhere, their figures are those that were measured, both languages say the same.

A figure has one source: the table of benchmarks/RESULTS.md, and there it is what the linked page has, rounded.
"""

import json
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from test_outlook import NAMES

import helpers

PAGES = sorted(
    path
    for folder, pattern in ((".", "*.md"), ("docs", "**/*.md"), ("benchmarks", "**/*.md"), ("data", "*.md"))
    for path in (ROOT / folder).glob(pattern)
)
PAIRS = [("README.md", "README.ja.md")]
PAIRS += [(f"docs/{path.name}", f"docs/ja/{path.name}") for path in sorted((ROOT / "docs").glob("*.md"))]
# Figures of the READMEs that nobody measures here: versions, years, sizes of published things, the competition.
FACTS = {
    "3.11",
    "3.13",
    "2.13.0",
    "4.57.6",
    "2024",
    "132,476",
    "1,300",
    "3.74",
    "111",
    "100",
    "512",
    "270",
    "296",
    "306",
}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
IN_REPOSITORY = re.compile(
    r"https://(?:github\.com|colab\.research\.google\.com/github)/[^/]+/gemma2-ja-qlora/blob/[^/]+/"
)
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*")


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text of a page without comments, blocks and pieces of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))


def headings(text: str) -> list[tuple[int, str]]:
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", outside, flags=re.MULTILINE)]


def anchor(title: str) -> str:
    """The anchor that GitHub makes of a heading: lower case, without punctuation, spaces as hyphens."""
    kept = [c for c in title.lower() if c in " -_" or unicodedata.category(c)[0] in "LMN"]
    return "".join(kept).strip().replace(" ", "-")


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page as rows of cells, without the line below the header."""
    found, rows = [], []
    for line in [*re.sub(r"<!--.*?-->", "", text).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append([row for row in rows if not set("".join(row)) <= set("-: ") or not any(row)])
            rows = []
    return found


def commands(text: str) -> list[str]:
    """The lines of the blocks of code, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in (re.sub(r"\s*#.*", "", line) for line in block.splitlines()) if line]


def value(number: str) -> float:
    return float(number.replace(",", ""))


def figures(text: str) -> set[str]:
    """The numbers of a text that a reader takes for measured: with a decimal point, a comma, or three digits."""
    numbers = set(NUMBER.findall(prose(text)))
    return {number for number in numbers if "." in number or len(number) > 2} - FACTS


def rounds_to(number: str, numbers: set[str]) -> bool:
    """Whether a figure is one of the numbers, rounded; one of 0 to 100 may be their percentage."""
    whole, step = value(number), 10.0 ** -len(number.partition(".")[2])
    exact = [value(other) for other in numbers if other.count(".") < 2]
    return any(abs(other - whole) <= 0.501 * step or abs(100 * other - whole) <= 0.501 * step for other in exact)


def numbers_of(*paths: str | Path) -> set[str]:
    return {number for path in paths for number in NUMBER.findall(read(path))}


def results() -> list[list[str]]:
    (table,) = tables(read("benchmarks/RESULTS.md"))
    return table[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        name, _, fragment = unquote(IN_REPOSITORY.sub("/", link)).partition("#")
        if name.startswith(("https://", "http://")):
            continue
        target = ROOT / name.lstrip("/") if name.startswith("/") else page.parent / name if name else page
        assert target.exists(), f"{link} leads nowhere"
        if fragment:
            assert fragment in {anchor(title) for _, title in headings(read(target))}, f"{link} has no such heading"


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [IN_REPOSITORY.sub("", link) for link in LINK.findall(text) if IN_REPOSITORY.match(link)]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_tests_that_results_name_exist():
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    pages = (ROOT / "benchmarks/results").glob("*.md")
    assert not {name for page in pages for name in re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", read(page))} - there


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_both_languages_say_the_same(pair):
    english, japanese = map(read, pair)
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(japanese)]
    shapes = [[[len(row) for row in table] for table in tables(text)] for text in (english, japanese)]
    assert shapes[0] == shapes[1]
    assert commands(english) == commands(japanese)
    assert english.count("<!--") == japanese.count("<!--")


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_readme_fits_one_page(page):
    assert len(read(page).splitlines()) <= 140


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_figures_of_the_readmes_are_those_of_the_results(page):
    measured = numbers_of("benchmarks/RESULTS.md", "benchmarks/results/cost.md")
    assert not sorted(figures(read(page)) - measured)


@pytest.mark.parametrize("page", [name for pair in PAIRS[1:] for name in pair])
def test_figures_of_the_other_pages_are_those_of_the_results(page):
    measured = numbers_of(*(ROOT / "benchmarks").rglob("*.md"))
    assert not sorted(number for number in figures(read(page)) if not rounds_to(number, measured))


@pytest.mark.parametrize("row", results(), ids=lambda row: row[0])
def test_a_figure_of_the_table_is_that_of_its_page(row):
    (page,) = LINK.findall(row[5])
    measured = numbers_of(Path("benchmarks", page))
    assert not [number for number in NUMBER.findall(row[1]) if not rounds_to(number, measured)]


def test_there_are_296_strings():
    rules = json.loads(read("data/filter_rules_2024.json"))
    assert (len(rules["ng"]), len(set(rules["ng"])), len(rules["replacements"])) == (306, 296, 28)


def test_costs_are_computed_as_the_page_says():
    (table,) = tables(read("benchmarks/results/cost.md"))
    shown = {}
    for row in table[1:]:
        weights, tflops, bandwidth, rate, answering, *rest = map(value, row[2:])
        card, engine = NAMES[row[0]], "unsloth" if "t4" in row[1] else "transformers"
        slowdown = helpers.outlook.slowdown(card[0])
        assert (tflops, bandwidth) in helpers.outlook.CARDS.values()
        assert slowdown == 0.63 * 989 / tflops + 0.37 * 3350 / bandwidth
        tokens = helpers.outlook.training_rate(weights, *card, engine)
        assert tokens == pytest.approx(rate * 27.2 / weights / slowdown)
        answers = helpers.outlook.answering_seconds(weights, *card)
        assert answers == pytest.approx(answering * weights / 27.2 * slowdown)
        hours, price = (2 * weights / 0.1 + 40e6 / tokens + answers) / 3600, rest[3]
        assert rest == [
            round(slowdown, 2),
            round(tokens),
            round(hours, 1),
            price,
            round(hours * price),
            round(hours * price / 10, 1),
        ], row[0]
        shown[row[0]] = [row[1], row[9], row[11]]
    for page in ("README.md", "README.ja.md"):
        (costs,) = [table for table in tables(read(page)) if table[0][0] == "GPU"]
        assert {row[0]: [row[1], *row[3:]] for row in costs[2:]} == shown
