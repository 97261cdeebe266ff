"""Generation: batched answers must be those of one prompt at a time, and no answer may be lost."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

import helpers
from helpers import RecipeError

TASKS = [task["input"] for task in helpers.read_tasks("data/sample/tasks.jsonl")][:6]
LONGEST = [40, 3, 17, 1, 30, 25]


@pytest.fixture
def model():
    model = AutoModelForCausalLM.from_pretrained("data/tiny/gemma2", dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("data/tiny/gemma2")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(helpers.build_prompt(task, []))["input_ids"] for task in TASKS]


@pytest.fixture(scope="module")
def process(tokenizer):
    banned = helpers.banned_token_ids(
        helpers.BANNED_WORDS, lambda word: tokenizer.encode(word, add_special_tokens=False)
    )
    rules = [RepetitionPenaltyLogitsProcessor(1.1), NoBadWordsLogitsProcessor(banned, eos_token_id=1)]
    return LogitsProcessorList(rules)


@pytest.fixture(scope="module")
def stop():
    return StoppingCriteriaList([EosTokenCriteria(1)])


def one_by_one(model, prompts, process, stop, penalize_prompt):
    """The loop of 2024: one prompt at a time through generate()."""
    answers = []
    for prompt, longest in zip(prompts, LONGEST, strict=True):
        seen = 0 if penalize_prompt else len(prompt)
        written = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=longest,
            logits_processor=[lambda ids, scores, seen=seen: process(ids[:, seen:], scores)],
            stopping_criteria=stop,
        )
        answers.append(written[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("penalize_prompt", [True, False])
@pytest.mark.parametrize("parallel", [1, 4, 6])
def test_slots_and_batches_answer_like_one_by_one(model, prompts, process, stop, parallel, penalize_prompt):
    expected = one_by_one(model, prompts, process, stop, penalize_prompt)
    for generate in (helpers.answer_in_batches, helpers.answer_all):
        found = dict(generate(model, prompts, LONGEST.__getitem__, parallel, process, stop, penalize_prompt))
        assert [found[i] for i in range(len(prompts))] == expected, generate.__name__


def test_a_limit_of_the_models_own_says_nothing_and_changes_nothing(model, prompts, process, stop, caplog, monkeypatch):
    """unsloth sets `max_length` on a GPU, of which transformers tells again with every batch."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = dict(helpers.answer_in_batches(model, prompts, LONGEST.__getitem__, 1, process, stop))
    model.generation_config.max_length = 8192
    assert dict(helpers.answer_in_batches(model, prompts, LONGEST.__getitem__, 1, process, stop)) == expected
    assert not caplog.records


def test_the_sliding_window_is_kept_in_slots(model, tokenizer, process, stop):
    """The prompt is several times longer than the tiny model's window, so that a wrong window would show."""
    prompt = tokenizer("".join(TASKS * 2))["input_ids"]
    assert len(prompt) > 3 * model.config.sliding_window
    expected = one_by_one(model, [prompt] * 6, process, stop, False)[0]
    assert dict(helpers.answer_all(model, [prompt], lambda _: 40, 2, process, stop))[0] == expected


def test_shorter_limit_during_the_run(model, prompts, process, stop):
    limits = [40]
    lengths = []
    for _, tokens in helpers.answer_all(model, prompts, lambda _: limits[-1], 2, process, stop):
        lengths.append(len(tokens))
        limits.append(5)
    assert max(lengths[2:]) <= 5


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


def test_out_of_memory_halves_the_batch_and_loses_nothing(model, prompts, process, stop):
    small = SmallGpu(model)
    found = dict(helpers.answer_in_batches(small, prompts, LONGEST.__getitem__, 6, process, stop))
    assert [found[i] for i in range(6)] == one_by_one(model, prompts, process, stop, False)
    assert small.calls == [6, 3, 1, 1, 1, 1, 1, 1]


def test_a_prompt_that_never_fits(model, prompts, process, stop):
    class NoGpu(SmallGpu):
        def generate(self, ids, **options):
            raise torch.OutOfMemoryError

    with pytest.raises(RecipeError, match="lower k or max_seq_length"):
        list(helpers.answer_in_batches(NoGpu(model), prompts, LONGEST.__getitem__, 4, process, stop))


def log(folder, name, rows, tail=b""):
    lines = [json.dumps({"task_id": i, "key": key, "output": output}) for i, key, output in rows]
    (folder / name).write_bytes("".join(line + "\n" for line in lines).encode() + tail)


def test_kept_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    log(tmp_path, "answers.jsonl", [(1, "a", "x"), (2, "b", "y")], tail=b'{"task_id": 3, "ke')
    log(tmp_path, "answers.1.jsonl", [(4, "d", "z")])
    keys = {1: "a", 2: "b", 3: "c", 4: "d"}
    kept = helpers.kept_answers(tmp_path, keys, tmp_path / "output.jsonl")
    assert {task: row["output"] for task, row in kept.items()} == {1: "x", 2: "y", 4: "z"}
    assert (tmp_path / "answers.jsonl").read_bytes().endswith(b'"y"}\n')


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    output = tmp_path / "output.jsonl"
    log(tmp_path, "answers.jsonl", [(1, "a", "x"), (2, "old", "y")])
    with pytest.raises(RecipeError, match="holds 1 answers of an interrupted run with other settings"):
        helpers.kept_answers(tmp_path, {1: "a", 2: "b"}, output)
    assert (tmp_path / "answers.jsonl").exists()
    output.write_text("finished")
    assert helpers.kept_answers(tmp_path, {1: "a", 2: "b"}, output) == {}
    assert not (tmp_path / "answers.jsonl").exists()
    assert not output.exists()


@given(st.integers(1, 4096), st.floats(0, 1e4), st.integers(0, 200), st.floats(1, 1000), st.floats(0.1, 1e4))
def test_clock_never_raises_the_limit_and_shares_the_time(limit, left, open_tasks, mean, rate):
    allowed = helpers.allowed_new_tokens(limit, left, open_tasks, mean, rate)
    assert min(limit, 16) <= allowed <= limit
    if allowed < limit and allowed > 16:
        assert allowed * open_tasks <= left * rate
    if mean * open_tasks <= left * rate:
        assert allowed == limit


def test_answer_key_depends_on_everything():
    key = helpers.answer_key({"a": 1}, "x")
    assert key == helpers.answer_key({"a": 1}, "x")
    assert len({key, helpers.answer_key({"a": 2}, "x"), helpers.answer_key({"a": 1}, "y")}) == 3
