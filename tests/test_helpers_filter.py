"""The filter: byte equality with the plain algorithm of 2024, every trap on its own, and nothing lost."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from itertools import chain
from pathlib import Path

import pycld2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/oracles")]
import filter_2024  # noqa: E402

import helpers  # noqa: E402
from helpers import FilterRules, RecipeError  # noqa: E402

RULES_FILE = ROOT / "data/filter_rules_2024.json"
RULES_2024 = json.loads(RULES_FILE.read_text(encoding="utf-8"))
REVIEWED = json.loads((ROOT / "data/filter_rules_reviewed.json").read_text(encoding="utf-8"))
SAMPLE = ROOT / "data/sample/magpie.jsonl"
QUESTION = "週末は何をしましたか。どこかに出かけたのなら、そのときのことを教えてください。"
JAPANESE = "これは日本語の文章です。今日は天気がよいので、散歩に行きました。"
SWITCHES = ("all_turns", "clean_conversations", "plain_looks", "plain_text", "script_decides", "loops", "echoes")
SWITCHES += ("duplicates", "japanese_characters")
LENIENT = {"rare_below": 0, "rare_after_below": 0}  # the rare rules are off where a test is about something else


def talk(*turns: str, **columns) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {**columns, "conversations": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # escapes half surrogate pairs
    return path


class Result:
    """What a run of the filter left behind."""

    def __init__(self, folder: Path, rows: list | Path, rules: dict | None = None, **values) -> None:
        folder.mkdir(exist_ok=True)
        max_rows = values.pop("max_rows", 0)
        (folder / "rules.json").write_text(json.dumps({**RULES_2024, **(rules or {}), **values}), encoding="utf-8")
        source = rows if isinstance(rows, Path) else write(folder / "in.jsonl", rows)
        given = list(map(helpers.parse_row, helpers.files.load_rows(str(source), max_rows=max_rows)))
        kept, dropped, self.report = helpers.filter_rows(given, helpers.rules.load(folder / "rules.json"))
        helpers.files.save_filtered(folder / "out", kept, dropped, self.report)
        self.bytes = (folder / "out/filtered_magpie.jsonl").read_bytes()
        self.kept = [json.loads(line) for line in self.bytes.splitlines()]
        # Valid UTF-8, one JSON object per line.
        written = (folder / "out/dropped_magpie.jsonl").read_bytes().decode("utf-8")
        self.dropped = [json.loads(line) for line in written.split("\n")[:-1]]
        self.reasons = {record["number"]: (record["reason"], record["match"]) for record in self.dropped}


def expected_bytes(rows: list, **thresholds) -> bytes:
    kept = filter_2024.survivors(rows, RULES_2024, **thresholds)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()


# --- exactness ------------------------------------------------------------------------------------------------------

FOREIGN = "The weather is fine today."
CHINESE = "今天天气很好，我们去公园散步。"
PIECES = [
    JAPANESE,
    FOREIGN,
    CHINESE,
    "はい。",
    "松",
    "下",
    "♪",
    "松下村塾",
    "语",
    "们",
    "翻訳",
    "Ich ",
    "Ich",
    "한국어",
]
PIECES += [*'é★神ன\x08\x7f\x85\uffff\t\n😢 \u3000"\\\u2028', "e\u0301", "ன்", ""]
texts = st.lists(st.sampled_from(PIECES), max_size=5).map(lambda pieces: JAPANESE * (len(pieces) % 3) + "".join(pieces))
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts})
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)  # JSON has no infinity
columns = st.fixed_dictionaries({"id": numbers | texts})
dialogues = st.builds(talk, st.one_of(texts, texts.map(lambda text: text + "\ud83d")), texts)
rows_of_any_kind = st.one_of(
    dialogues, st.builds(lambda c, t: {**c, "conversations": t, "mix": None}, columns, st.lists(turns, max_size=4))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(rows_of_any_kind, min_size=1, max_size=12),
    rare_below=st.integers(0, 8),
    rare_after_below=st.integers(0, 6),
    japanese_percent=st.sampled_from([30, 60, 90]),
    improved=st.booleans(),
)
def test_survivors_are_those_of_2024_and_dropped_rows_stay_as_they_came(tmp_path, rows, improved, **thresholds):
    result = Result(tmp_path, rows, **thresholds)
    assert result.bytes == expected_bytes(rows, **thresholds)
    switches = dict.fromkeys(SWITCHES, True) if improved else {}
    for run in (result, Result(tmp_path, rows, **thresholds, **switches)):
        assert len(run.kept) + len(run.dropped) == len(rows)
        assert [record["row"] for record in run.dropped] == [rows[record["number"] - 1] for record in run.dropped]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab😢c", max_size=12),
    ng=st.lists(st.text(alphabet="ab😢c", min_size=1, max_size=4), max_size=6),
)
def test_every_ng_string_is_found_however_they_overlap(text, ng):
    found = helpers.find_forbidden({"response": text}, helpers.Forbidden(FilterRules((), tuple(ng))))
    assert {match for _, _, match in found} == {string for string in ng if string in text}
    assert len(found) == len(set(found))


def well_formed_sample() -> list[dict]:
    rows = helpers.files.load_rows(SAMPLE)
    return [row for row in rows if not helpers.row_texts(helpers.parse_row(row), FilterRules((), ()))[1]]


def test_sample_is_filtered_as_in_2024(tmp_path):
    rows = well_formed_sample()
    thresholds = {"rare_below": 3, "rare_after_below": 2}
    result = Result(tmp_path, rows, **thresholds)
    assert result.kept and result.bytes == expected_bytes(rows, **thresholds)


@pytest.mark.parametrize(("times", "kept"), [(19, False), (20, True)])
def test_a_character_is_rare_below_twenty_occurrences(tmp_path, times, kept):
    rows = [talk(JAPANESE, JAPANESE) for _ in range(20)] + [talk(JAPANESE, JAPANESE + "鰯" * times)]
    result = Result(tmp_path, rows, rare_after_below=0)  # occurrences count, not rows: one row holds them all
    assert (len(result.kept) == 21) is kept
    assert result.report["rare_characters"] == ({} if kept else {"鰯": 19})
    assert result.bytes == expected_bytes(rows, rare_after_below=0)


@pytest.mark.parametrize(("times", "kept"), [(9, False), (10, True)])
def test_after_the_other_rules_a_character_is_rare_below_ten(tmp_path, times, kept):
    rows = [talk(JAPANESE, JAPANESE) for _ in range(20)]
    rows += [talk(JAPANESE, JAPANESE + "鰯" * times), talk(JAPANESE, "翻訳" + "鰯" * 30)]
    result = Result(tmp_path, rows)
    assert (len(result.kept) == 21) is kept
    if not kept:
        assert result.reasons[21] == ("rare afterwards", "鰯")
    assert result.bytes == expected_bytes(rows)


def test_the_second_count_is_made_once_not_to_a_fixpoint(tmp_path):
    # Dropping the row with 鰯 leaves nine 鯖, yet the rows with 鯖 stay.
    rows = [talk(JAPANESE, JAPANESE) for _ in range(20)] + [talk(JAPANESE, JAPANESE + "鯖") for _ in range(9)]
    rows += [talk(JAPANESE, JAPANESE + "鯖鰯" + "鯖" * 10), talk(JAPANESE, "翻訳" + "鰯" * 30)]
    result = Result(tmp_path, rows)
    assert len(result.kept) == 29
    assert result.bytes == expected_bytes(rows)


def test_on_few_rows_absolute_limits_drop_almost_everything(tmp_path):
    rows = well_formed_sample()
    assert len(Result(tmp_path, rows).kept) < 0.1 * len(rows)


@pytest.mark.parametrize(("rows", "kept"), [(18, 0), (19, 1)])
def test_one_space_a_row_is_counted_with_the_text(tmp_path, rows, kept):
    # 19 rows give 19 spaces between their texts; one more stands in the last row.
    given = [talk(JAPANESE, JAPANESE) for _ in range(rows - 1)] + [talk(JAPANESE, JAPANESE + " " + JAPANESE)]
    for thresholds in ({"rare_after_below": 0}, {"rare_below": 0, "rare_after_below": 20}):
        result = Result(tmp_path, given, **thresholds)
        assert sum(" " in row["response"] for row in result.kept) == kept
        assert result.bytes == expected_bytes(given, **thresholds)


def test_characters_are_counted_before_the_replacements(tmp_path):
    rows = [talk(JAPANESE, JAPANESE) for _ in range(20)]
    rows += [talk(JAPANESE, JAPANESE + "よしmitsu" * 20), talk(JAPANESE, JAPANESE + "三菱")]
    result = Result(tmp_path, rows, rare_after_below=0)
    assert result.kept[20]["response"] == JAPANESE + "よしみつ" * 20
    assert result.reasons == {22: ("rare character", "三")}
    assert result.bytes == expected_bytes(rows, rare_after_below=0)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("语", "語"),  # replaced before the NG list is read: NG 语 never fires
        ("松♪下", "松下"),  # ♪ goes last, so 松下 arises too late to be replaced
        ("松下村塾", "三菱村塾"),  # a fact corrupted
        ("ドイツ語", None),
        ("Ich bin", None),  # the NG string is "Ich ", with its space
        ("Ichiban", "Ichiban"),
        ("ன்", None),
        ("ன", "ன"),  # only with its combining mark is it on the list
        ("é", None),
        ("e\u0301", "e\u0301"),  # the same letter in NFD is not matched
        ("\u9f8d", "\u9f8d"),
        ("叛", None),
        ("\uf9ba", "\uf9ba"),  # a compatibility ideograph stays what it is
    ],
)
def test_replacements_and_ng_strings(tmp_path, text, becomes):
    row = talk(JAPANESE, JAPANESE + text, id=1)
    result = Result(tmp_path, [row], **LENIENT)
    assert [kept["response"] for kept in result.kept] == ([] if becomes is None else [JAPANESE + becomes])
    assert all(kept["conversations"] == row["conversations"] for kept in result.kept)  # before replacement
    assert result.bytes == expected_bytes([row], **LENIENT)


@pytest.mark.parametrize(
    ("text", "becomes"), [("翻訳機", "機械"), ("翻♪訳", None), ("訳翻", None), ("翻", "翻"), ("訳", "訳")]
)
def test_ng_strings_are_looked_for_after_the_replacements(tmp_path, text, becomes):
    rules = {"replacements": [("翻訳機", "機械"), ("♪", ""), ("訳翻", "翻訳")], "ng": ["翻訳"]}
    # Texts are searched side by side: a string must not be found across the border of two.
    rows = [talk(JAPANESE, JAPANESE + "翻"), talk("訳" + JAPANESE, JAPANESE + text)]
    kept = [row["response"] for row in Result(tmp_path, rows, rules, **LENIENT).kept]
    assert kept == [JAPANESE + "翻"] + ([] if becomes is None else [JAPANESE + becomes])


def test_the_share_of_japanese_may_equal_the_limit(tmp_path):
    share = next(share for _, code, share, _ in pycld2.detect(JAPANESE)[2] if code == "ja")
    for percent, kept in ((share, 1), (share + 1, 0)):
        assert len(Result(tmp_path, [talk(JAPANESE, JAPANESE)], **LENIENT, japanese_percent=percent).kept) == kept


def test_duplicates_on_the_list_count_once(tmp_path):
    rules = {"replacements": (), "ng": ("鰯", "鰯", "いわし", "いわし")}
    report = Result(tmp_path, [talk(JAPANESE, JAPANESE + "鰯いわし")], rules, **LENIENT).report
    assert [(rule["match"], rule["rows"], rule["only"]) for rule in report["rules"]] == [("いわし", 1, 0), ("鰯", 1, 0)]


@pytest.mark.parametrize("character", ["\x00", "\x08", "\x0b", "\x1b", "\x7f", "\x85", "\x9f", "\uffff", "\ud83d"])
def test_characters_that_cld2_refuses_are_named(tmp_path, character):
    row = talk(JAPANESE, JAPANESE + character)
    result = Result(tmp_path, [row], **LENIENT)
    assert result.reasons == {1: ("unreadable", f"U+{ord(character):04X}")}
    assert expected_bytes([row], **LENIENT) == b""


@pytest.mark.parametrize("character", ["\t", "\n", "\r", "\f"])
def test_white_space_that_cld2_reads_is_kept(tmp_path, character):
    row = talk(JAPANESE, JAPANESE + character)
    assert Result(tmp_path, [row], **LENIENT).bytes == expected_bytes([row], **LENIENT) != b""


def test_short_text_has_no_language(tmp_path):
    result = Result(tmp_path, [talk(JAPANESE, "はい。")], **LENIENT)
    assert result.reasons == {1: ("not Japanese", "")}


def test_only_the_first_turns_are_judged_in_2024(tmp_path):
    row = talk(JAPANESE, JAPANESE, "翻訳", FOREIGN)
    row["conversations"].insert(0, {"role": "system", "content": FOREIGN})
    assert Result(tmp_path, [row], **LENIENT).bytes == expected_bytes([row], **LENIENT) != b""
    assert Result(tmp_path, [row], **LENIENT, all_turns=True).reasons == {1: ("ng string", "翻訳")}


def test_columns_are_written_as_json_dump_writes_them(tmp_path):
    columns = {"n": 123456789012345678901234567890, "x": [1e16, -0.0, 0.1], "s": "\u2028\x7f/é", "deep": {"n": [2**64]}}
    row = talk(JAPANESE, JAPANESE, **columns, instruction="replaced in place")
    assert Result(tmp_path, [row], **LENIENT).bytes == expected_bytes([row], **LENIENT)


# --- reasons and report ---------------------------------------------------------------------------------------------

BROKEN = [
    ({}, "malformed", "conversations"),
    ({"conversations": "text"}, "malformed", "conversations"),
    ({"conversations": [7]}, "malformed", "turn 1"),
    ({"conversations": [{"content": JAPANESE}]}, "malformed", "turn 1"),
    (talk(JAPANESE, None), "malformed", "response"),
    (talk(["list"], JAPANESE), "malformed", "instruction"),
    ({"conversations": []}, "missing turn", "response"),
    (talk(JAPANESE), "missing turn", "response"),
    ({"conversations": [{"role": "assistant", "content": JAPANESE}]}, "missing turn", "instruction"),
    (talk(JAPANESE, ""), "empty", "response"),
    (talk(" \u3000\n", JAPANESE), "empty", "instruction"),
]


def test_bad_rows_become_reasons_and_none_is_lost(tmp_path):
    rows = [row for row, _, _ in BROKEN] + [talk(JAPANESE, JAPANESE)]
    result = Result(tmp_path, rows, **LENIENT)
    assert len(result.kept) == 1
    assert [(r["row"], r["reason"], r["field"]) for r in sorted(result.dropped, key=lambda r: r["number"])] == BROKEN


def test_half_a_surrogate_pair_in_a_turn_that_2024_never_read_is_kept_as_an_escape(tmp_path):
    row = talk(JAPANESE, JAPANESE, "次は？", "\ud83d")
    result = Result(tmp_path, [row], **LENIENT)
    assert result.bytes.count(b"\\ud83d") == 1 and result.kept[0]["conversations"] == row["conversations"]
    assert Result(tmp_path, [row], **LENIENT, all_turns=True).reasons == {1: ("unreadable", "U+D83D")}


def test_report_adds_up(tmp_path):
    rows = [talk(JAPANESE, JAPANESE + tail) for tail in ("", "翻訳", "翻訳英訳", "翻訳" + "鰯", "")]
    rows.append(talk(JAPANESE, "翻訳" + FOREIGN * 2))
    result = Result(
        tmp_path, rows, rare_below=2, rare_after_below=0, rules={"replacements": (), "ng": ("翻訳", "英訳")}
    )
    report = result.report
    assert (report["rows_in"], report["rows_kept"], report["rows_dropped"]) == (6, 2, 4)
    assert report["funnel"] == [{"step": "rows in", "rows": 6}, {"step": "ng string", "rows": 2}]
    counts = {rule["match"]: (rule["rows"], rule["only"]) for rule in report["rules"]}
    # Row 2 is the only one that 翻訳 alone costs: the others break another rule, the last one by its language.
    assert counts["翻訳"] == (4, 1) and counts["英訳"] == (1, 0) and counts["鰯"] == (1, 0)
    assert report["rare_characters"]["鰯"] == 1
    record = next(record for record in result.dropped if record["number"] == 3)
    assert (record["field"], record["match"], record["also"]) == ("response", "翻訳", ["英訳", "英"])
    written = json.loads((tmp_path / "out/filter_report.json").read_text(encoding="utf-8"))
    assert written["rules"] == report["rules"] and written["settings"]["rare_below"] == 2


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [talk(JAPANESE, JAPANESE + tail, id=str(i)) for i, tail in enumerate(("", "翻訳", "。"))]
    plain = Result(tmp_path, rows, **LENIENT)
    with gzip.open(tmp_path / "in.jsonl.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf\n" + b"\n\n".join(json.dumps(row).encode() for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    (tmp_path / "hub").mkdir()  # `datasets` loads a folder as it loads a hub data set
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/train.parquet")
    for name in ("in.jsonl.gz", "in.parquet", "hub"):
        assert Result(tmp_path, tmp_path / name, **LENIENT).bytes == plain.bytes
    assert Result(tmp_path, tmp_path / "in.parquet", **LENIENT, max_rows=1).report["rows_in"] == 1


@pytest.mark.parametrize("line", [b'{"conversations": [', b"[1]", b"\xff\xfe", b"null"])
def test_a_broken_line_names_file_and_line(tmp_path, line):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(json.dumps(talk(JAPANESE, JAPANESE)).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(RecipeError, match=r"bad\.jsonl, line 3: "):
        Result(tmp_path, source)
    assert not (tmp_path / "out/filtered_magpie.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["absent.jsonl", "absent.parquet", "broken.parquet", "broken.jsonl.gz", "cut.jsonl.gz", "empty.jsonl"]
)
def test_unreadable_files_give_one_clear_line(tmp_path, name):
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000))[:-20])
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(RecipeError, match=name) as error:
        Result(tmp_path, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[", "[]", '{"ng": []}', '{"replacements": [], "ng": []}', "\udcff"])
def test_what_is_no_rules_file_is_refused(tmp_path, content):
    (tmp_path / "rules.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(RecipeError, match=r"rules\.json: ") as error:
        helpers.rules.load(tmp_path / "rules.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ng", "abc"),
        ("ng", [""]),
        ("ng", [1]),
        ("ng", None),
        ("replacements", {"a": "b"}),
        ("replacements", [["a"]]),
        ("replacements", ["ab"]),
        ("replacements", [["", "b"]]),
        ("replacements", [["a", None]]),
        ("rare_below", -1),
        ("rare_below", 0.5),
        ("rare_below", True),
        ("rare_after_below", "10"),
        ("japanese_percent", 101),
        ("japanese_percent", 60.0),
        ("plain_looks", 1),
        ("plain_text", "yes"),
        ("japanese_characters", 1),
        ("characters_also", ["–"]),
        ("all_turns", "false"),
        ("rare_belov", 20),
    ],
)
def test_wrong_values_in_a_rules_file_are_named(tmp_path, key, value):
    (tmp_path / "rules.json").write_text(json.dumps({**RULES_2024, key: value}), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"rules\.json: .*{key}") as error:
        helpers.rules.load(tmp_path / "rules.json")
    assert "\n" not in str(error.value)


def test_rules_files_hold_the_whole_filter():
    old, new = helpers.rules.load(RULES_FILE), helpers.rules.load(ROOT / "data/filter_rules_reviewed.json")
    assert old == FilterRules(old.replacements, old.ng)  # the defaults are those of 2024
    assert (old.rare_below, old.rare_after_below, old.japanese_percent) == (20, 10, 60)
    assert (new.rare_below, new.rare_after_below, new.japanese_percent) == (0, 0, 60)
    assert new.patterns and not old.patterns
    for rules, switch in ((old, False), (new, True)):
        assert {getattr(rules, name) for name in SWITCHES} == {switch}


def test_a_rules_file_saved_in_nfd_finds_text_in_nfc(tmp_path):
    rules = json.loads(unicodedata.normalize("NFD", json.dumps(REVIEWED, ensure_ascii=False)))
    # A name's kanji in the rules is not turned into the ordinary one, which would drop every row with 神 or 塚.
    rules["ng"] += [unicodedata.normalize("NFD", "ボンジュール"), "\ufa19", "\ufa10"]
    tails = ("", "ボンジュール", "éà", "スライcingしました。", "神と塚です。")
    result = Result(tmp_path, [talk(QUESTION, JAPANESE + tail) for tail in tails], rules)
    assert result.reasons == {2: ("ng string", "ボンジュール"), 3: ("foreign words", "é")}
    assert result.kept[1]["response"] == JAPANESE + "スライシングしました。"


# --- interrupted ----------------------------------------------------------------------------------------------------

CHILD = """
import resource, signal, sys; sys.path.insert(0, sys.argv[1])
import helpers
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process as soon as a file exceeds the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
rules = helpers.rules.load(sys.argv[1] + "/data/filter_rules_reviewed.json")
rows = list(map(helpers.parse_row, helpers.files.load_rows(sys.argv[2])))
helpers.files.save_filtered(sys.argv[3], *helpers.filter_rows(rows, rules))
"""


def test_a_run_killed_while_it_writes_leaves_no_final_file(tmp_path):
    command = [sys.executable, "-c", CHILD, str(ROOT), str(SAMPLE), str(tmp_path), "10000"]
    killed = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert [path.name for path in tmp_path.iterdir()] == ["filtered_magpie.jsonl.part"]


# --- beyond one machine ---------------------------------------------------------------------------------------------


def test_the_datatrove_pipeline_keeps_the_rows_of_the_notebook(tmp_path):
    pytest.importorskip("datatrove", reason="pip install -r requirements-datatrove.txt")
    lines = SAMPLE.read_bytes().splitlines(keepends=True)
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.jsonl").write_bytes(b"".join(lines[:70]))
    (source / "1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[70:90])))
    (source / "2.jsonl").write_bytes(b"".join(lines[90:]))
    alone = Result(tmp_path / "alone", SAMPLE, REVIEWED, rare_below=3, rare_after_below=2)
    script, rules = ROOT / "pipelines/datatrove_filter.py", tmp_path / "alone/rules.json"
    command = [sys.executable, script, source, tmp_path / "out", "--rules", rules, "--tasks", "2", "--workers", "2"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "out/filtered_magpie.jsonl").read_bytes() == alone.bytes != b""
    report = json.loads((tmp_path / "out/filter_report.json").read_text(encoding="utf-8"))
    assert report == {key: alone.report[key] for key in report} and report["rows_kept"] == len(alone.kept)
    dropped = [record["row"] for record in helpers.files.load_rows(tmp_path / "out/dropped_magpie.jsonl")]
    assert sorted(map(json.dumps, dropped)) == sorted(json.dumps(record["row"]) for record in alone.dropped)


# --- reviewed rules -------------------------------------------------------------------------------------------------


def judged(folder: Path, *answers: str, question: str = QUESTION, **values) -> dict[str, tuple[str, str]]:
    """(reason, match) of each answer that the reviewed rules drop."""
    result = Result(folder, [talk(question, answer) for answer in answers], REVIEWED, duplicates=False, **values)
    return {answers[number - 1]: reason for number, reason in result.reasons.items()}


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("か\u3099、ホ\u309a", "が、ポ"),
        ("十\u00a0%、5\u202fkg、A\u2011B", "十 %、5 kg、A-B"),
        ("日\u200b本\ufeff語\u2060です\u00ad", "日本語です"),
        ("1\ufe0f\u20e3番、葛\U000e0100城", "1番、葛城"),
        ("⽇本と⼈、類、𝐀社", "日本と人、類、A社"),
        ("\uf0b7 項目", "・ 項目"),
        ("\ufa19社、\ufa10本、7000\u212b", "\ufa19社、\ufa10本、7000\u212b"),  # cp932 writes them: names, a unit
    ],
)
def test_what_only_looks_different_is_written_plainly(tmp_path, written, plain):
    result = Result(tmp_path, [talk(QUESTION, written + JAPANESE)], REVIEWED)
    assert [row["response"] for row in result.kept] == [plain + JAPANESE]
    assert result.kept[0]["conversations"][1]["content"] == plain + JAPANESE


HTML_TALK = "JavaScriptは<script>タグの中に書きます。<style>タグの中にはスタイルシートを書きます。"
HIDDEN_ENGLISH = JAPANESE + "<script>" + FOREIGN * 10


@pytest.mark.parametrize(("text", "in_2024", "as_plain_text"), [(HTML_TALK, 0, 1), (HIDDEN_ENGLISH, 1, 0)])
def test_cld2_reads_plain_text_where_2024_read_html(tmp_path, text, in_2024, as_plain_text):
    rows = [talk(JAPANESE, text)]
    plain = Result(tmp_path, rows, **LENIENT)
    assert len(plain.kept) == in_2024 and plain.bytes == expected_bytes(rows, **LENIENT)
    assert len(Result(tmp_path, rows, **LENIENT, plain_text=True).kept) == as_plain_text


def test_clean_conversations_corrects_every_turn(tmp_path):
    row = talk(JAPANESE, JAPANESE + "スライcing", JAPANESE, "スライcing" + JAPANESE)
    result = Result(tmp_path, [row], **LENIENT, clean_conversations=True)
    contents = [turn["content"] for turn in result.kept[0]["conversations"]]
    assert contents == [JAPANESE, JAPANESE + "スライシング", JAPANESE, "スライシング" + JAPANESE]


SIGNS = "〜①㈱髙♪ー –—¥€£© m²H₂O ≈≤≥√∞ ′″ •⋯※ →⇒↔ ■▪△ ½⅓Ⅷ 𠮟剝塡頰鷗鮬濊 éÜñ ℃№™ ㎡ ✔✗ ㇷ゚"


@pytest.mark.parametrize("text", SIGNS.split(" "))
def test_japanese_text_uses_more_than_cp932_writes(tmp_path, text):
    assert judged(tmp_path, JAPANESE + "「" + text + "」") == {}


@pytest.mark.parametrize("character", "们한ㅋﾡئขяД१٣〣ạə😊✅⭐❤㉠ㄏ\ue000\ufffd")
def test_letters_and_digits_of_other_scripts_and_emoji_are_refused(tmp_path, character):
    assert next(iter(judged(tmp_path, JAPANESE + character).values()))[0] in ("foreign character", "ng string")


SHORT = "赤 神道 夏目漱石 4年 1225km/h ２倍 26.98 NHK iPhone A300-600R H₂O ３，１５０ｍ −89.2°C 07月04日 はい ○ モモ"
SHORT += " QWERTY配列 アサ 元寇 紀元前３世紀 咸鏡南道咸興地方 €20 x=5 ① 第42代大統領 W3C"


def test_short_answers_are_judged_by_their_script(tmp_path):
    names = ["Homo sapiens", "The Lord of the Rings", "WWE、ROH、Impactなどです。", "3×1=3\n3×2=6\n3×3=9"]
    assert judged(tmp_path, *SHORT.split(), *names) == {}
    foreign = ("My name is Taro.", "今天天気", "Nice to meet you", "-", "……", "안녕")
    assert list(judged(tmp_path, *foreign)) == list(foreign)


def test_a_text_of_kana_is_not_asked_about_and_a_kanji_text_is(tmp_path):
    assert helpers.mostly_kana(JAPANESE) and not helpers.mostly_kana(CHINESE) and not helpers.mostly_kana("第一条")
    assert not judged(tmp_path, "第一条　目的、第二条　定義")
    assert judged(tmp_path, "漢字" * 30)


CAUGHT = {
    "template token": [
        "<|im_end|>",
        "</s>",
        "[/INST]",
        "<end_of_turn>",
        "<think>",
        "<｜end▁of▁sentence｜>",
        "<unused7>",
    ],
    "role marker": [
        "\n### Response:\n",
        "\nUser: もう一つ",
        "\nアシスタント：",
        "assistantfinal",
        "\n人間：夏は？\nAI：海です。",
        "\n入力：\n夏は？\n出力：\n海です。",
    ],
    "foreign words": [
        "とmuy divertido y lleno",
        "\n\nThe weather is fine today.",
        "très bienです",
        "海で dengan 遊びます。",
        "planをmakeします。",
        "骨はCCVI本です。",
        "「muri shite gozaimasen」と言います。",
    ],
    "Chinese": [
        "所以，冬天很美",
        "因此、",
        "以上就是四季的特色。",
        "我們去公園。",
        "人人不同自行注意。",
        "最后に",
        "五加八等於十三",
    ],
    "code": ["\n```python", "\nimport numpy as np"],
    "JSON": ['{"name": 1}'],
    "HTML": ["<ul><li>桜", "&nbsp;", "<blockquote>", "<br>です。", "<!-- 桜 -->"],
    "address": [
        "www.example.co.jp",
        "info@example.com",
        "03-0000-0000",
        "https://a",
        "@hanako_88",
        "youtu.be/a1b2c3",
        "普通 1234567",
    ],
    "broken encoding": ["譁蟄怜喧縺代〒縺吶", "?????", "\\u65e5\\u672c", "ã“ã‚"],
    "self-mention of an AI": [
        "私はOpenAIによって開発されました。",
        "AIとして、私は",
        "私の知識は2021年までです。",
        "私はAIなので",
        "人工知能である当方は",
        "私は人間ではありませんが、",
        "Googleが開発したモデルとして、",
        "わたしのようなプログラムなら",
    ],
    "refusal": [
        "その質問にはお答えできません。",
        "I'm sorry, but",
        "個人情報は提供できません。",
        "医療に関する助言は差し控えさせていただきます。",
        "安全上の理由から手順を教えることは認められておりません。",
        "要約する文が見当たりません。",
        "画像を拝見することができないので",
    ],
    "placeholder": [
        "[ここに回答を入力]",
        "（以下略）",
        "{{answer}}",
        "担当は【氏名】です。",
        "XX月XX日です。",
        "約〈時間を入力〉時間です。",
    ],
    "about the answer itself": [
        "以下は日本語の回答です：",
        "この回答はモデルによって生成されました。",
        "この詩はAIが生成したものです。",
        "以上が回答です。",
        "\n評価：5点中4点。",
    ],
    "cut off": [
        "\n秋には紅葉狩りに出かけるのがおすすめで、とくに京都の",
        "\n春には花を見に出かけ、夏には海や山で遊び、",
        "\n1. 花見\n2. ",
        "\n春は花見です。夏は海で遊び",
        "\n春は花見です。夏は海、秋は紅葉、冬は雪景",
        "\n春は花見です。これを「デフレス",
    ],
}


@pytest.mark.parametrize(("name", "tail"), [(name, tail) for name, tails in CAUGHT.items() for tail in tails])
def test_patterns_catch(tmp_path, name, tail):
    result = Result(tmp_path, [talk(QUESTION, JAPANESE + tail)], REVIEWED)
    assert name in {result.dropped[0]["reason"], *(rule["reason"] for rule in result.report["rules"])}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("(?:ab|c)d?", ["abd?", "cd?"]),
        ("[xy?]z", ["xz", "yz", r"\?z"]),
        ("(?:a|[bc])d", ["(?:a|[bc])d"]),
        ("(?:[ab]|c)d", ["(?:[ab]|c)d"]),
        *[(text, [text]) for text in ("(?:a|b)?c", "[a-z]b", "[^ab]c", "(?:a(?:b|c)|d)e", "a(?:b|c)", "[ab]+c")],
    ],
)
def test_a_choice_at_the_beginning_is_spelled_out(expression, expected):
    assert helpers.rules.spelled_out(expression) == expected


def test_spelled_out_expressions_find_what_the_whole_ones_do():
    texts = [JAPANESE, *GOOD, *chain(*CAUGHT.values())]
    for named in json.loads((ROOT / "data/filter_rules_reviewed.json").read_text("utf-8"))["patterns"].values():
        for expression in chain(*named.values()):
            parts = helpers.rules.spelled_out(expression)
            for text in texts:
                assert any(re.search(part, text) for part in parts) == bool(re.search(expression, text))


GOOD = [
    "「To be, or not to be, that is the question.」は有名な台詞で、日本語の訳もいろいろあります。",
    "孝明天皇の子が明治天皇です。高橋是清と是枝裕和、我孫子市、達也、就職と終了、可能性を並べました。",
    "「春眠不覚暁、処処聞啼鳥」は孟浩然の詩の一節です。深圳や重慶、王家衛の名も出ます。",
    "| 県 | 人口 |\n|---|---|\n| 宮城 | 230万人 |\n| 愛知 | 750万人 |",
    "太郎「どこへ行く？」\n花子「海がいいな」\n店員：いらっしゃいませ。\n客：これをください。",
    "ドイツ語で書かれた本の翻訳もあります。フランス語に訳されたものもあります。",
    "ChatGPTはOpenAIが開発した対話型のAIです。AIとして知られる技術には機械学習があります。",
    "春が来た 春が来た どこに来た\n山に来た 里に来た 野にも来た\n花が咲く 花が咲く どこに咲く",
    "わははははははははは、と笑いました。すもももももももものうちです。",
    "この web サイトはsinとcosの値、1日のkcal、blogの書き方、「dengan」のような語を説明します。",
    "英語ではspringと書き、for文とwhile文で繰り返します。NPCはnon-player characterの略、pandasは道具です。",
    "、".join("一二三四五六七八九十") + "、" + "、".join(f"二十{digit}" for digit in "一二三四五六七八九"),
    "南の島です。火山活動は終わり、いまの形になったと考えられる",
    "明日の会議は三時からです。よろしくお願いいたします。以上",
    "これで時間も費用も節約できます。一石二鳥。大切なのは続けること、そして楽しむこと",
    "令和〇年〇月〇日\n〇〇〇〇株式会社　〇〇様\n下記のとおりご案内申し上げます。",
    "友のために私は、AIは優しいが人ではないと書いた。改行は `<br>` と `<p>` タグで書きます。",
    "| 品 | 量 |\n|---|---|\n| 卵 | 2個<br>（大） |",
    "São PauloやBeyoncé、 café を知っています。ASP.NETやNode.jsも使います。",
]


@pytest.mark.parametrize("answer", GOOD)
def test_good_answers_that_resemble_bad_ones_stay(tmp_path, answer):
    assert judged(tmp_path, answer) == {}


def test_whole_answers_that_ask_or_are_chinese_go_and_advice_stays(tmp_path):
    asks = ["どの問題のことでしょうか。問題文を送っていただければ考えます。"]
    asks += ["どの分野がお好きですか。小説でしょうか、それとも詩でしょうか。", "いくつですか？身長も教えてください。"]
    asks += ["どのような点を改善したいですか？", "もう少し詳しく教えていただけますか？", "ご要望をお聞かせください。"]
    chinese = "水的化学式是H2O。"
    advice = [
        "深呼吸を三回してください。",
        "こちらの本はいかがでしょうか。",
        "色不異空、空不異色、色即是空、空即是色。",
        "高橋是清",
    ]
    found = judged(tmp_path, *asks, chinese, *advice)
    assert {reason for answer in asks for reason in found[answer][:1]} == {"asks instead of answering"}
    assert found.keys() == {*asks, chinese} and found[chinese][0] == "Chinese"


def test_rules_about_requests_look_at_turns_of_the_user_alone(tmp_path):
    wish = "次の文をフランス語で書いてください。"
    rows = [talk(wish, JAPANESE), talk(QUESTION, JAPANESE + wish), talk(QUESTION, JAPANESE, wish, JAPANESE)]
    result = Result(tmp_path, rows, REVIEWED)
    assert [(r["number"], r["field"]) for r in result.dropped] == [(1, "instruction"), (3, "turn 3 (user)")]
    assert {r["reason"] for r in result.dropped} == {"asks for another language"}


@pytest.mark.parametrize(
    ("answer", "loops"),
    [
        ("春は楽しいです。" * 8, True),
        ("\n".join(f"{n}. 公園で桜の花を見る" for n in range(1, 9)), True),
        ("朝食は大切です。栄養があるからです。" * 5, True),
        ("体を動かすと、よく眠れます。" * 3, True),
        ("東京、大阪、" + "横浜、" * 4, True),
        ("これで終わりです" * 6, True),
        ("\n".join(f"{n}. {'桃梨柿栗'[n % 4]}の実" for n in range(16)), True),
        ("\n".join(f"3×{n}={3 * n}" for n in range(1, 10)), False),
        ("|---|---|---|---|---|---|---|---|---|---|---|---|---|\n" * 2, False),
        ("雨が降る　雨が降る\nしとしとと　屋根を打つ\n\n雨が降る　雨が降る\n僕は窓から　街を見る", False),
    ],
)
def test_loops(tmp_path, answer, loops):
    assert bool(helpers.repeated_text(answer)) is loops
    assert bool(helpers.repeated_text(JAPANESE + "\n" + answer)) is loops


def test_an_answer_that_holds_the_whole_question_is_no_answer(tmp_path):
    question = "日本で一番高い山は何ですか？"
    echo = {"repeats the question"}
    for answer in (
        question + "\n富士山です。",
        "日本で 一番高い山は 何ですか",
        "日本で一番高い山は何ですか\n富士山です。",
    ):
        assert {reason for reason, _ in judged(tmp_path, answer, question=question).values()} == echo
    assert not judged(tmp_path, "日本で一番高い山は富士山です。", question=question)
    request = "次の条件で献立を考えてください。条件：野菜を使うこと。山の高さも教えてください。"
    copied = request.replace("。条件", "。\n条件").removesuffix("。") + "とのことですが、富士山です。"
    assert {reason for reason, _ in judged(tmp_path, copied, question=request).values()} == echo
    assert not judged(tmp_path, "富士山", question="日本一の山は？")


def test_of_rows_that_differ_in_white_space_alone_the_first_one_is_kept(tmp_path):
    rows = [talk(QUESTION, JAPANESE + tail) for tail in ("", "\n", "はい。", "\u200b", "はい。 ")]
    result = Result(tmp_path, rows, REVIEWED)
    assert [row["response"] for row in result.kept] == [JAPANESE, JAPANESE + "はい。"]
    assert result.report["reasons"] == {"duplicate": 3}
    assert len(Result(tmp_path, rows, REVIEWED, duplicates=False).kept) == 5
    broken = [talk(JAPANESE, FOREIGN)] * 2  # a copy of what another rule drops goes by that rule
    assert Result(tmp_path, broken, REVIEWED).report["reasons"] == {"foreign words": 2}


def test_the_report_counts_patterns_by_name(tmp_path):
    rows = [talk(QUESTION, JAPANESE + tail) for tail in ("", "</s>", "<unk>", "</s>们")]
    report = Result(tmp_path, rows, REVIEWED).report
    assert {"reason": "template token", "match": "", "rows": 3, "only": 2} in report["rules"]
    assert report["funnel"][1:] == [{"step": "ng string", "rows": 3}, {"step": "template token", "rows": 1}]


def test_later_turns_too_short_for_a_language_pass(tmp_path):
    rows = [talk(JAPANESE, JAPANESE, "はい。", JAPANESE), talk(JAPANESE, JAPANESE, "次は？", CHINESE)]
    result = Result(tmp_path, rows, {"replacements": [], "ng": []}, **LENIENT, all_turns=True)
    assert result.kept == [{**rows[0], "instruction": JAPANESE, "response": JAPANESE}]
    assert result.dropped[0]["field"] == "turn 4 (assistant)"


@pytest.mark.parametrize(
    "patterns",
    [
        [],
        {"texts": {"a": ["b"]}},
        {"text": {"a": "b"}},
        {"text": {"a": ["("]}},
        {"text": {"a": ["(b)"]}},
        {"text": {"a": ["b|c"]}},
        {"text": {"a": ["b?"]}},
        {"text": {"a": [7]}},
        {"text": {"duplicate": ["b"]}},
        {"text": {"a": ["(?i)b"]}},
    ],
)
def test_patterns_that_cannot_be_joined_are_refused(tmp_path, patterns):
    (tmp_path / "rules.json").write_text(json.dumps({**RULES_2024, "patterns": patterns}), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"rules\.json: ") as error:
        helpers.rules.load(tmp_path / "rules.json")
    assert "\n" not in str(error.value)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab😢c.", max_size=12),
    strings=st.lists(st.text(alphabet="ab😢c.", min_size=1, max_size=4), max_size=6),
)
def test_joined_expressions_find_what_single_ones_find(text, strings):
    expressions = [*map(re.escape, strings), "[ab]c+", "b(?:a|c)$"]
    found = any(pattern.search(text) for pattern in helpers.any_expression(expressions))
    assert found == any(re.search(expression, text) for expression in expressions)


def test_reviewed_rules_leave_ordinary_japanese_and_facts_alone():
    old, new = RULES_2024, REVIEWED
    assert set(new["ng"]) - set(old["ng"]) == set("个它很无找听决怎收效")
    assert len(set(new["ng"])) == len(new["ng"]) and "们" in new["ng"]
    assert not {*"而於處叛瓊頚茉旱嗽籾仔裔采圳★éüÉ", "翻訳", "ドイツ語"} & set(new["ng"])
    assert "松下" not in dict(new["replacements"])
