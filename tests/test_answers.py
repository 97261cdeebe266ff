"""Generation: batched answers must be those of one prompt at a time, and no answer may be lost."""

import json
import logging
import types
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria

import helpers
from helpers import RecipeError

TASKS = [task["input"] for task in helpers.files.load_tasks("data/sample/tasks.jsonl")][:6]
LONGEST = [40, 3, 17, 1, 30, 25]


def load_tiny():
    model = AutoModelForCausalLM.from_pretrained("data/tiny/gemma2", dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture
def model():
    return load_tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("data/tiny/gemma2")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(helpers.build_prompt(task, [], "2024"))["input_ids"] for task in TASKS]


@pytest.fixture(scope="module")
def process(tokenizer):
    banned = [tokenizer.encode(word, add_special_tokens=False) for word in helpers.BANNED_WORDS]
    rules = [RepetitionPenaltyLogitsProcessor(1.1), NoBadWordsLogitsProcessor(banned, eos_token_id=1)]
    return LogitsProcessorList(rules)


@pytest.fixture(scope="module")
def stop():
    return StoppingCriteriaList([EosTokenCriteria(1)])


def one_by_one(model, prompts, process, stop, penalize_prompt, longest=LONGEST):
    """The loop of 2024: one prompt at a time through generate()."""
    answers = []
    for prompt, limit in zip(prompts, longest, strict=True):
        seen = 0 if penalize_prompt else len(prompt)
        written = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=limit,
            logits_processor=[
                lambda ids, scores, seen=seen: helpers.decoding.apply_rules(process, ids[:, seen:], scores)
            ],
            stopping_criteria=stop,
        )
        answers.append(written[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def alone(prompts, process, stop):
    """The answers to the prompts one by one, with and without the prompt under the penalty."""
    model = load_tiny()
    return {penalized: one_by_one(model, prompts, process, stop, penalized) for penalized in (True, False)}


def answer(generate, model, prompts, longest, decoding):
    """The answers to `prompts` with lengths of at most `longest`, by index."""
    return dict(generate(model, prompts, longest.__getitem__, decoding))


@pytest.mark.parametrize("penalize_prompt", [True, False])
@pytest.mark.parametrize("parallel", [1, 4, 6])
def test_slots_and_batches_answer_like_one_by_one(model, prompts, process, stop, alone, parallel, penalize_prompt):
    for generate in (helpers.decoding.in_batches, helpers.slots.answer):
        decoding = helpers.decoding.Decoding(parallel, process, stop, penalize_prompt)
        found = answer(generate, model, prompts, LONGEST, decoding)
        assert [found[i] for i in range(len(prompts))] == alone[penalize_prompt], generate.__name__


def test_a_limit_of_the_models_own_says_nothing_and_changes_nothing(model, prompts, process, stop, caplog, monkeypatch):
    """unsloth sets `max_length` on a GPU, of which transformers tells again with every batch."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    decoding = helpers.decoding.Decoding(1, process, stop, penalize_prompt=False)
    expected = answer(helpers.decoding.in_batches, model, prompts, LONGEST, decoding)
    model.generation_config.max_length = 8192
    assert answer(helpers.decoding.in_batches, model, prompts, LONGEST, decoding) == expected
    assert not caplog.records


class SmallGpu:
    """The real model behind a generate() that runs out of memory for more than two prompts."""

    def __init__(self, model):
        self.model, self.calls = model, []
        self.device, self.generation_config = model.device, model.generation_config

    def generate(self, ids, **options):
        self.calls.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return self.model.generate(ids, **options)


def test_out_of_memory_halves_the_batch_and_loses_nothing(model, prompts, process, stop, alone):
    small = SmallGpu(model)
    decoding = helpers.decoding.Decoding(6, process, stop, penalize_prompt=False)
    found = answer(helpers.decoding.in_batches, small, prompts, LONGEST, decoding)
    assert [found[i] for i in range(6)] == alone[False]
    assert small.calls == [6, 3, 1, 1, 1, 1, 1, 1]


def test_a_prompt_that_never_fits(model, prompts, process, stop):
    class NoGpu(SmallGpu):
        def generate(self, ids, **options):
            raise torch.OutOfMemoryError

    decoding = helpers.decoding.Decoding(4, process, stop, penalize_prompt=False)
    with pytest.raises(RecipeError, match="lower k or max_seq_length"):
        answer(helpers.decoding.in_batches, NoGpu(model), prompts, LONGEST, decoding)


def answer_row(task_id, key, output, **fields):
    row = {"task_id": task_id, "key": key, "output": output, "new_tokens": 3, "cut": False}
    return row | {"limit": 40, "seconds": 0.5, "attempt": 1} | fields


def log(folder, name, rows, tail=b""):
    lines = [json.dumps(answer_row(*row)) for row in rows]
    (folder / name).write_bytes("".join(line + "\n" for line in lines).encode() + tail)


def test_kept_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path, capsys):
    log(tmp_path, "answers.jsonl", [(1, "a", "x"), (2, "b", "y")], tail=b'{"task_id": 3, "ke')
    log(tmp_path, "answers.1.jsonl", [(4, "d", "z")])
    before = (tmp_path / "answers.jsonl").read_bytes()
    keys = {1: "a", 2: "b", 3: "c", 4: "d"}
    kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
    assert {task: row["output"] for task, row in kept.items()} == {1: "x", 2: "y", 4: "z"}
    assert "answers.jsonl, line 3: left out (no answer)" in capsys.readouterr().out
    assert (tmp_path / "answers.jsonl").read_bytes() == before  # nothing is rewritten in place
    helpers.files.append_row(tmp_path / "answers.jsonl", answer_row(3, "c", "w"))
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(before + b'\n{"task_id": 3, "key": "c"')
    assert helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl").keys() == {1, 2, 3, 4}


def without(name):
    return json.dumps({key: value for key, value in answer_row(2, "b", "y").items() if key != name}).encode()


BAD_LINES = [
    *(b"\x80\x81\xfe\xff", b"\0" * 200, b'"output": "y", "new_tokens": 3}', b"\r", b"", b"  "),
    *(b'[2, "b", "y"]', b"null", *map(without, ("task_id", "key", "cut", "attempt"))),
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path, capsys, line):
    good = [json.dumps(answer_row(i, key, "x"), ensure_ascii=False).encode() for i, key in ((1, "a"), (3, "c"))]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"\n".join([good[0], line, good[1] + b"\r", b""]))  # a line end of Windows is no fault
    before = path.read_bytes()
    kept = helpers.answers.kept(tmp_path, {1: "a", 2: "b", 3: "c"}, tmp_path / "output.jsonl")
    assert kept.keys() == {1, 3}
    assert capsys.readouterr().out == f"{path}, line 2: left out (no answer); its task is answered again\n"
    assert path.read_bytes() == before


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    output = tmp_path / "output.jsonl"
    log(tmp_path, "answers.jsonl", [(1, "a", "x"), (2, "old", "y")])
    log(tmp_path, "answers-mine.jsonl", [(1, "old", "x")])  # not a log of this series
    with pytest.raises(RecipeError, match="holds 1 answers of an interrupted run with other settings"):
        helpers.answers.kept(tmp_path, {1: "a", 2: "b"}, output)
    assert (tmp_path / "answers.jsonl").exists()
    output.write_text("finished")
    assert helpers.answers.kept(tmp_path, {1: "a", 2: "b"}, output) == {}
    assert not (tmp_path / "answers.jsonl").exists()
    assert not output.exists()
    assert (tmp_path / "answers-mine.jsonl").exists()


def test_a_finished_run_that_is_run_again_keeps_its_output(tmp_path):
    output = tmp_path / "output.jsonl"
    output.write_text("finished")
    log(tmp_path, "answers.jsonl", [(1, "a", "x"), (2, "b", "y")])
    assert helpers.answers.kept(tmp_path, {1: "a", 2: "b"}, output).keys() == {1, 2}
    assert output.exists()
    assert helpers.answers.kept(tmp_path, {1: "a", 2: "b"} | {3: "c"}, output).keys() == {1, 2}
    assert not output.exists()  # task 3 is open


# The generator of notebook 04.


@pytest.fixture(scope="module")
def questions(tokenizer, prompts):
    other = [tokenizer(helpers.build_prompt(task, [], "training"))["input_ids"] for task in TASKS]
    pairs = zip(prompts, other, strict=True)
    return [helpers.answers.Question(i, f"key {i}", pair) for i, pair in enumerate(pairs)]


@pytest.fixture
def decoding(process, stop):
    return helpers.decoding.Decoding(3, process, stop, penalize_prompt=True)


@pytest.fixture
def answers_to(model, tokenizer, decoding, tmp_path):
    """Answers to questions as notebook 04 asks for them, with other values where a test names them."""

    def answers_to(questions, kept=None, path=tmp_path / "answers.jsonl", way=helpers.slots.answer, **values):
        generate = partial(way, model, decoding=decoding._replace(**values.pop("decoding", {})))
        clock = helpers.answers.Clock(**{"limit": 40, "window": 1024, "budget": 0} | values)
        return helpers.answers.answer(generate, tokenizer, questions, kept or {}, path, clock)

    return answers_to


def answers_without_a_model(questions, kept, path):
    """All answers are known: a model that is asked would be an error."""

    def generate(prompts, _limit_of):
        assert not prompts
        return iter(())

    return helpers.answers.answer(generate, None, questions, kept, path, helpers.answers.Clock(40, 1024, 0))


def read_log(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_generator_answers_like_generate_one_by_one(
    model, tokenizer, questions, decoding, prompts, tmp_path, answers_to
):
    """In slots and in batches, a few at once or all: the rows are those of one prompt at a time."""
    expected = one_by_one(model, prompts, decoding.process, decoding.stop, True, longest=[40] * 6)
    expected = [helpers.clean_answer(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in expected]
    assert all(expected)
    for generate in (helpers.slots.answer, helpers.decoding.in_batches):
        for parallel in (4, 64):
            setting = {"parallel": parallel}
            path = tmp_path / f"{generate.__name__}-{parallel}" / "answers.jsonl"
            rows = list(answers_to(questions, path=path, way=generate, decoding=setting))
            assert {row["task_id"]: row["output"] for row in rows} == dict(enumerate(expected))
            assert read_log(path) == rows
            assert all(row["cut"] == (row["new_tokens"] == 40) and row["attempt"] == 1 for row in rows)


def test_kept_answers_come_first_and_are_not_written_again(questions, answers_to, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = list(answers_to(questions[:2]))
    keys = {question.task_id: question.key for question in questions}
    kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
    before = path.read_bytes()
    rows = list(answers_to(questions, kept))
    assert sorted(rows[:2], key=lambda row: row["task_id"]) == sorted(first, key=lambda row: row["task_id"])
    assert path.read_bytes().startswith(before)
    assert {row["task_id"] for row in read_log(path)[2:]} == {2, 3, 4, 5}
    kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
    before = path.read_bytes()
    again = list(answers_without_a_model(questions, kept, path))
    assert sorted(again, key=lambda row: row["task_id"]) == sorted(rows, key=lambda row: row["task_id"])
    assert path.read_bytes() == before


def test_an_answer_is_in_the_log_before_it_is_yielded(questions, answers_to, tmp_path):
    for row in answers_to(questions):
        assert read_log(tmp_path / "answers.jsonl")[-1] == row


def test_no_room_beside_a_long_prompt(questions, answers_to, prompts, tmp_path):
    """Prompt and answer share max_seq_length; a prompt that fills it gets one token."""
    longest = max(map(len, prompts))
    rows = list(answers_to(questions, window=longest + 5))
    assert all(row["new_tokens"] <= min(40, longest + 5 - len(prompts[row["task_id"]])) for row in rows)
    rows = list(answers_to(questions, path=tmp_path / "answers.0.jsonl", window=10))
    assert all(row["new_tokens"] == 1 and row["cut"] for row in rows)


@pytest.fixture
def one_second_an_answer(monkeypatch):
    """The clock of helpers.py moves on by a second whenever it is looked at: once when it starts, once per answer."""
    seconds = iter(range(1000))
    monkeypatch.setattr(helpers.answers, "time", types.SimpleNamespace(perf_counter=lambda: float(next(seconds))))


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
def test_the_clock_shortens_answers(questions, answers_to, one_second_an_answer, generate):
    setting = {"parallel": 1, "stop": StoppingCriteriaList()}
    rows = list(answers_to(questions, way=generate, decoding=setting, budget=5.5))
    assert [row["seconds"] for row in rows] == [1.0] * 6
    # After one answer of 40 tokens in 1 s, 4.5 s are left for five: 4.5 * 40 / 5 = 36 tokens each, and so on.
    assert [row["limit"] for row in rows[:2]] == [40, 36]
    assert all(row["new_tokens"] == row["limit"] and row["cut"] for row in rows)
    assert [row["limit"] for row in rows] == sorted((row["limit"] for row in rows), reverse=True)


def test_when_the_time_is_used_up_the_rest_is_not_answered(questions, answers_to, tmp_path, one_second_an_answer):
    rows = list(answers_to(questions, decoding={"parallel": 1}, budget=2.0))
    assert len(rows) == len(read_log(tmp_path / "answers.jsonl")) == 2


class NothingAfter:
    """A rule that ends answers at once whose history holds the given token: then the answer is empty."""

    def __init__(self, token):
        self.token = token

    def __call__(self, history, scores):
        scores = scores.clone()
        scores[(history == self.token).any(dim=1), 1] = torch.inf
        return scores


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
def test_an_empty_answer_is_asked_again_without_shots(tokenizer, questions, answers_to, tmp_path, generate):
    (token,) = tokenizer.encode("親切", add_special_tokens=False)  # only in the words of 2024's prompt
    empty = questions[0]
    others = [question._replace(prompts=question.prompts[::-1]) for question in questions[1:3]]
    values = {"way": generate, "decoding": {"process": LogitsProcessorList([NothingAfter(token)])}}
    path = tmp_path / "answers.jsonl"
    rows = list(answers_to([empty, *others], **values))
    assert [(row["task_id"], row["attempt"]) for row in rows][-1] == (0, 2)
    assert all(row["output"] for row in rows)
    assert len(rows) == 3
    logged = read_log(path)
    assert [(row["output"], row["attempt"]) for row in logged if row["task_id"] == 0] == [
        ("", 1),
        (rows[-1]["output"], 2),
    ]
    # Killed before the second attempt, it is made by the next run; after it, it is not made again.
    keys = {question.task_id: question.key for question in [empty, *others]}
    path.write_text("".join(json.dumps(row) + "\n" for row in logged[:-1]), encoding="utf-8")
    kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
    again = list(answers_to([empty, *others], kept, **values))
    assert without_seconds(again[-1:]) == without_seconds(rows[-1:])
    assert len(read_log(path)) == 4
    kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
    assert len(list(answers_without_a_model([empty, *others], kept, path))) == 3


def test_a_second_attempt_that_is_empty_too_ends_it(questions, answers_to, tmp_path):
    setting = {"process": LogitsProcessorList([NothingAfter(2)])}  # <bos>: every prompt
    rows = list(answers_to(questions[:2], decoding=setting))
    assert [(row["output"], row["attempt"]) for row in rows] == [("", 2), ("", 2)]
    kept = {row["task_id"]: row for row in rows}
    again = list(answers_without_a_model(questions[:2], kept, tmp_path / "answers.jsonl"))
    assert sorted(again, key=lambda row: row["task_id"]) == sorted(rows, key=lambda row: row["task_id"])


def test_a_process_touches_only_its_own_log(questions, answers_to, tmp_path):
    """Two processes, each with its share, empty answers among them, and a log of an earlier run in one process."""
    log(tmp_path, "answers.jsonl", [(5, "key 5", "from before")], tail=b"half a li")
    one, two = tmp_path / "answers.0.jsonl", tmp_path / "answers.1.jsonl"
    keys = {question.task_id: question.key for question in questions}
    setting = {"process": LogitsProcessorList([NothingAfter(2)])}
    finished = {}
    for path, share in ((one, questions[0::2]), (two, questions[1::2])):
        kept = helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl")
        before = {other: other.read_bytes() for other in tmp_path.iterdir() if other != path}
        finished |= {row["task_id"]: row for row in answers_to(share, kept, path, decoding=setting)}
        assert {other: other.read_bytes() for other in tmp_path.iterdir() if other != path} == before
    assert len(read_log(one)) == 6  # three tasks, each asked twice
    assert {row["task_id"] for row in read_log(two)} == {1, 3}
    assert helpers.answers.kept(tmp_path, keys, tmp_path / "output.jsonl") == finished
    assert finished[5]["output"] == "from before"


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
def test_first_tokens_are_those_of_the_answer(model, tokenizer, decoding, prompts, generate):
    generate = partial(generate, model, decoding=decoding)
    steps = helpers.decoding.first_tokens(generate, decoding, tokenizer, prompts[0])
    tokens = one_by_one(model, prompts, decoding.process, decoding.stop, True)[0][:8]
    assert [step["chosen"] for step in steps] == [
        repr(text if "\ufffd" not in (text := tokenizer.decode([token])) else tokenizer.convert_ids_to_tokens(token))
        for token in tokens
    ]
    with torch.no_grad():
        before = model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    assert steps[0]["probability before"] == pytest.approx(float(before[tokens[0]]), rel=1e-4)
    assert steps[0]["probability of first before"] == pytest.approx(float(before.max()), rel=1e-4)
    assert all(0 < step["probability"] <= 1 for step in steps)


@given(
    limit=st.integers(1, 4096),
    left=st.floats(-100, 1e4),
    open_tasks=st.integers(0, 200),
    seconds=st.floats(0.1, 1e4),
    answers=st.integers(1, 200),
    tokens=st.integers(1, 100_000),
)
def test_clock_never_raises_the_limit_and_shares_the_time(limit, left, open_tasks, seconds, answers, tokens):
    clock = helpers.answers.Clock(limit, window=4096, budget=max(seconds + left, 0.01))
    clock.seconds, clock.answers, clock.tokens = seconds, answers, tokens
    clock.share(open_tasks)
    allowed, room = clock.limit, (clock.budget - seconds) * tokens / seconds
    assert min(limit, 16) <= allowed <= limit
    if allowed < limit and allowed > 16:
        assert allowed * open_tasks <= room * 1.000001
    if tokens / answers * open_tasks < room * 0.999999 or not open_tasks:
        assert allowed == limit


def test_without_a_budget_answers_stay_long():
    clock = helpers.answers.Clock(40, window=1024, budget=0)
    clock.note(40)
    clock.share(1000)
    assert clock.limit == 40


def test_answer_key_depends_on_everything():
    def key(model="1", adapter="2", penalty=1.1, prompt=(1, 2), name="here"):
        sources = {"model": model, "adapter": adapter, "tasks": "3"}
        inputs = {role: {"name": name, "commit": "", "sha256": sha, "inputs": {}} for role, sha in sources.items()}
        return helpers.answers.key(helpers.records.make("04", inputs, {"penalty": penalty}, ["torch"]), prompt)

    assert key() == key(name="moved")
    changed = [key(model="9"), key(adapter="9"), key(penalty=1.2), key(prompt=(1, 3))]
    assert len({key(), *changed}) == 5


def test_the_sliding_window_is_kept_in_slots(model, tokenizer, process, stop):
    """The prompt is several times longer than the tiny model's window, so that a wrong window would show."""
    prompt = tokenizer("".join(TASKS * 2))["input_ids"]
    assert len(prompt) > 3 * model.config.sliding_window
    expected = one_by_one(model, [prompt] * 6, process, stop, False)[0]
    decoding = helpers.decoding.Decoding(2, process, stop, penalize_prompt=False)
    assert answer(helpers.slots.answer, model, [prompt], [40], decoding)[0] == expected


def test_shorter_limit_during_the_run(model, prompts, process, stop):
    limits = [40]
    lengths = []
    decoding = helpers.decoding.Decoding(2, process, stop, penalize_prompt=False)
    for _, tokens in helpers.slots.answer(model, prompts, lambda _: limits[-1], decoding):
        lengths.append(len(tokens))
        limits.append(5)
    assert max(lengths[2:]) <= 5
