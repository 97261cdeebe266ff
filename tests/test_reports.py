"""What finished runs report: files read back, and tables."""

import pytest

import helpers
from engine import reports
from engine.reports import sweep_table
from helpers import RecipeError


def test_sweep_table_shows_what_differs_and_what_was_measured(tmp_path):
    for r, loss in ((8, 2.5), (16, 2.25)):
        parts = {"r": r, "seed": 1, "output_dir": f"r{r}", "code": "0123456789abcdef"}
        helpers.files.write_json(tmp_path / f"r{r}/run.json", {"03_sft": {"parts": parts}})
        metrics = {
            "first_loss": 3.0,
            "last_loss": loss,
            "held_out_loss": 2.75,
            "tokens_per_second": 100.0,
            "peak_gpu_gib": None,
        }
        helpers.files.write_json(tmp_path / f"r{r}/sft_metrics.json", metrics)
    header, _, first, second = sweep_table([tmp_path / "r8", tmp_path / "r16"]).splitlines()
    assert header.startswith("| run | 03_sft.r | first loss | last loss | held-out loss |")
    assert first.startswith("| r8 | 8 | 3 | 2.5 | 2.75 | 100 |")
    assert second.startswith("| r16 | 16 | 3 | 2.25 | 2.75 | 100 |")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"01_quantize": {"pa',
        "[]",
        '{"01_quantize": 3}',
        '{"01_quantize": {}}',
        '{"01_quantize": {"parts": [1]}}',
        '{"01_quantize": {"parts": {}, "products": []}}',
        "\ufeff{",
    ],
)
def test_a_damaged_run_json_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"run\.json: damaged or cut short; delete it and run run\.py") as raised:
        reports.read(tmp_path / "run.json")
    assert "\n" not in str(raised.value)
