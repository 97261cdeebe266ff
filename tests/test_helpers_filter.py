"""The filter: byte equality with the plain algorithm of 2024, every trap on its own, and nothing lost."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pycld2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/oracles")]
import filter_2024  # noqa: E402

import helpers  # noqa: E402
from helpers import FilterSettings, RecipeError, load_filter_rules, read_jsonl, run_filter  # noqa: E402

RULES_2024 = json.loads((ROOT / "data/filter_rules.json").read_text(encoding="utf-8"))
SAMPLE = ROOT / "data/sample/magpie.jsonl"
JAPANESE = "これは日本語の文章です。今日は天気がよいので、散歩に行きました。"
LENIENT = {"rare_below": 0, "rare_after_below": 0}  # the rare rules are off where a test is about something else


def talk(*turns: str, **columns) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {**columns, "conversations": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # escapes half surrogate pairs
    return path


class Result:
    """What a run of the filter left behind."""

    def __init__(self, folder: Path, rows: list | Path, rules: dict | None = None, **options) -> None:
        run = {key: options.pop(key) for key in ("num_proc", "shard_rows", "max_rows") if key in options}
        rules = rules or load_filter_rules(ROOT / "data/filter_rules.json")
        source = rows if isinstance(rows, Path) else write(folder / "in.jsonl", rows)
        self.report = run_filter(str(source), folder / "out", FilterSettings(**rules, **options), **run)
        self.bytes = (folder / "out/filtered_magpie.jsonl").read_bytes()
        self.kept = [json.loads(line) for line in self.bytes.splitlines()]
        dropped = (folder / "out/dropped_magpie.jsonl").read_bytes().splitlines()
        self.dropped = [json.loads(line) for line in dropped]
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
columns = st.fixed_dictionaries({"id": st.one_of(st.integers(), st.floats(allow_nan=False), texts)})
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
    shard_rows=st.integers(1, 5),
)
def test_survivors_are_those_of_2024_byte_for_byte(tmp_path, rows, shard_rows, **thresholds):
    result = Result(tmp_path, rows, shard_rows=shard_rows, **thresholds)
    assert result.bytes == expected_bytes(rows, **thresholds)
    assert len(result.kept) + len(result.dropped) == len(rows)


def test_sample_is_filtered_as_in_2024_and_in_several_processes_alike(tmp_path):
    rows = list(read_jsonl(SAMPLE))
    shapely = [row for row in rows if not helpers.judged_texts(row, FilterSettings())[1]]
    thresholds = {"rare_below": 3, "rare_after_below": 2}
    one = Result(tmp_path, shapely, **thresholds)
    assert one.kept and one.bytes == expected_bytes(shapely, **thresholds)
    assert Result(tmp_path, shapely, **thresholds, num_proc=2, shard_rows=20).bytes == one.bytes


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


def test_on_few_rows_absolute_limits_drop_almost_everything_and_a_share_does_not(tmp_path):
    rows = [row for row in read_jsonl(SAMPLE) if not helpers.judged_texts(row, FilterSettings())[1]]
    assert len(Result(tmp_path, rows).kept) < 0.1 * len(rows)
    assert len(Result(tmp_path, rows, rare_share=0.00015).kept) > 0.5 * len(rows)


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
    rules = {"replacements": (("翻訳機", "機械"), ("♪", ""), ("訳翻", "翻訳")), "ng": ("翻訳",)}
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
    (talk(JAPANESE, JAPANESE, "次は？", "\ud83d"), "unreadable", "another turn or column"),
]


def test_bad_rows_become_reasons_and_none_is_lost(tmp_path):
    rows = [row for row, _, _ in BROKEN] + [talk(JAPANESE, JAPANESE)]
    result = Result(tmp_path, rows, **LENIENT, shard_rows=4)
    assert len(result.kept) == 1
    assert [(r["row"], r["reason"], r["field"]) for r in sorted(result.dropped, key=lambda r: r["number"])] == BROKEN


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


@pytest.mark.parametrize(
    "rules", ['{"ng": []}', '{"replacements": [], "ng": [""]}', '{"replacements": [["a"]], "ng": []}', "["]
)
def test_a_wrong_rules_file_is_refused(tmp_path, rules):
    (tmp_path / "rules.json").write_text(rules)
    with pytest.raises(RecipeError, match=r"rules\.json"):
        load_filter_rules(tmp_path / "rules.json")


# --- interrupted and started again ----------------------------------------------------------------------------------

CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import helpers
rules = helpers.load_filter_rules(sys.argv[1] + "/data/filter_rules.json")
print(helpers.run_filter(sys.argv[2], sys.argv[3], helpers.FilterSettings(**rules), shard_rows=100)["shards"])
"""


def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_the_same_bytes(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(SAMPLE.read_bytes() * 50)
    command = [sys.executable, "-c", CHILD, str(ROOT), str(corpus)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)

    with subprocess.Popen([*command, str(tmp_path / "cut")], **quiet) as child:
        while len(done := list(tmp_path.glob("cut/filter_shards/*.jsonl"))) < 5:
            assert child.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    assert not list(tmp_path.glob("cut/*.json*")), "a final file appeared before it was complete"
    again = subprocess.run([*command, str(tmp_path / "cut")], check=True, **quiet)
    shards = json.loads(again.stdout.replace("'", '"'))
    assert len(done) <= shards["found_finished"] < shards["total"]
    for name in ("filtered_magpie.jsonl", "dropped_magpie.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_shards_of_the_same_rules_are_taken(tmp_path):
    rows = [talk(JAPANESE, JAPANESE + "鰯")]
    blocked = tmp_path / "out/filtered_magpie.jsonl.part"
    blocked.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):  # the shards are finished, the final files are not
        Result(tmp_path, rows, {"replacements": (), "ng": ()}, **LENIENT)
    blocked.rmdir()
    stricter = Result(tmp_path, rows, {"replacements": (), "ng": ("鰯",)}, **LENIENT)
    assert stricter.reasons == {1: ("ng string", "鰯")} and stricter.report["shards"]["found_finished"] == 0


# --- beyond one machine ---------------------------------------------------------------------------------------------


def test_the_datatrove_pipeline_keeps_the_rows_of_the_notebook(tmp_path):
    pytest.importorskip("datatrove", reason="pip install -r requirements-datatrove.txt")
    lines = SAMPLE.read_bytes().splitlines(keepends=True)
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.jsonl").write_bytes(b"".join(lines[:70]))
    (source / "1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[70:90])))
    (source / "2.jsonl").write_bytes(b"".join(lines[90:]))
    run_file = tmp_path / "run.yaml"
    run_file.write_text("02_filter_magpie: {rare_share: 0.0, rare_below: 3, rare_after_below: 2}", encoding="utf-8")
    script = ROOT / "pipelines/datatrove_filter.py"
    command = [sys.executable, script, source, tmp_path / "out", "--run", run_file, "--tasks", "2"]
    subprocess.run(command, check=True, capture_output=True)
    rules = load_filter_rules(ROOT / "data/filter_rules_reviewed.json")
    options = {"all_turns": True, "clean_conversations": True, "nfc": True, "cp932_only": True}
    alone = Result(tmp_path / "alone", SAMPLE, rules, rare_below=3, rare_after_below=2, **options)
    assert (tmp_path / "out/filtered_magpie.jsonl").read_bytes() == alone.bytes != b""


# --- improved rules -------------------------------------------------------------------------------------------------


def test_nfc_mends_what_2024_overlooks(tmp_path):
    rows = [talk(JAPANESE, JAPANESE + "か\u3099"), talk(JAPANESE, JAPANESE + "e\u0301")]
    result = Result(tmp_path, rows, **LENIENT, nfc=True, clean_conversations=True)
    assert [row["response"] for row in result.kept] == [JAPANESE + "が"]
    assert result.kept[0]["conversations"][1]["content"] == JAPANESE + "が"
    assert result.reasons == {2: ("ng string", "é")}


def test_clean_conversations_mends_every_turn(tmp_path):
    row = talk(JAPANESE, JAPANESE + "スライcing", JAPANESE, "スライcing" + JAPANESE)
    result = Result(tmp_path, [row], **LENIENT, clean_conversations=True)
    contents = [turn["content"] for turn in result.kept[0]["conversations"]]
    assert contents == [JAPANESE, JAPANESE + "スライシング", JAPANESE, "スライシング" + JAPANESE]


def test_cp932_drops_foreign_characters_and_keeps_japanese_ones(tmp_path):
    tails = ("〜①㈱髙♪ー", "们", "😊", "\u200b")
    rows = [talk(JAPANESE, JAPANESE + tail) for tail in tails]
    result = Result(tmp_path, rows, {"replacements": (), "ng": ()}, **LENIENT, cp932_only=True)
    assert result.reasons == {n: ("not cp932", tail) for n, tail in enumerate(tails[1:], start=2)}


def test_rare_share_counts_rows_and_grows_with_the_data(tmp_path):
    rules = {"replacements": (), "ng": ()}
    for size, kept in ((100, 100), (1000, 998)):  # a limit of 0.3 rows, then of 3
        rows = [talk(JAPANESE, JAPANESE + ("鰯" * 50 if n < 2 else "")) for n in range(size)]
        assert len(Result(tmp_path, rows, rules, rare_share=0.003).kept) == kept


def test_later_turns_too_short_for_a_language_pass(tmp_path):
    rows = [
        talk(JAPANESE, JAPANESE, "はい。", JAPANESE),
        talk(JAPANESE, JAPANESE, "次は？", CHINESE),
    ]
    result = Result(tmp_path, rows, {"replacements": (), "ng": ()}, **LENIENT, all_turns=True)
    assert result.kept == [{**rows[0], "instruction": JAPANESE, "response": JAPANESE}]
    assert result.dropped[0]["field"] == "turn 4"


def test_near_duplicates_keep_the_first(tmp_path):
    story = "昔々あるところにおじいさんとおばあさんが住んでいました。おじいさんは山へ芝刈りに、おばあさんは川へ洗濯に。"
    rows = [
        talk("昔話をしてください。", story),
        talk(JAPANESE, JAPANESE * 3),
        talk("昔話をしてください。", story + "おわり。"),
    ]
    result = Result(tmp_path, rows, **LENIENT, near_duplicates=0.8)
    assert result.reasons == {3: ("near duplicate", "row 1")}


def test_reviewed_rules_leave_ordinary_japanese_and_facts_alone():
    old, new = (load_filter_rules(ROOT / f"data/filter_rules{name}.json") for name in ("", "_reviewed"))
    assert set(new["ng"]) < set(old["ng"]) and len(set(new["ng"])) == len(new["ng"])
    assert not set("而於處叛瓊頚茉旱嗽籾仔裔采") & set(new["ng"])
    assert "松下" not in dict(new["replacements"])
    assert Counter(old["ng"])["Ich "] == 1 and "们" in new["ng"]
