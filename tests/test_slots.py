"""The slot decoder: the answers of generate(), for every kind of model, or a line that says why not."""

import families
import pytest
import torch
from test_attention import model  # noqa: F401, a fixture
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import helpers


def test_both_engines_end_at_all_end_tokens_of_the_model(tmp_path):
    """A list of end tokens in the generation config, with a pad token that is one of them."""
    checkpoint = families.make_checkpoint("qwen2.5", tmp_path)

    def loop(ends):
        own, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=2048, dtype="float32")
        prompt = helpers.encode(tokenizer, families.PROMPTS[-1]).ids
        return families.greedy(own, prompt, 12, *families.rules(tokenizer, ends), penalize_prompt=True)

    before = loop([0])
    ends = [0, before[2]]
    GenerationConfig(eos_token_id=ends, pad_token_id=0, **families.GENERATION).save_pretrained(checkpoint)
    assert loop(ends) == before[: before.index(ends[1]) + 1]
    found = families.answers_of(checkpoint, "transformers")
    assert found.keys() == {"slots", "batches"} and all(equal == number for equal, number in found.values())


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
def test_a_banned_string_cannot_begin_an_answer(tmp_path, generate):
    """One of two tokens, with a history that begins with the answer."""
    checkpoint = families.make_checkpoint("qwen3", tmp_path)
    own, _ = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512, dtype="float32")
    never = lambda history, _scores: torch.zeros(len(history), dtype=torch.bool)  # noqa: E731

    def answer(*rules):
        decoding = helpers.decoding.Decoding(1, LogitsProcessorList(rules), never, penalize_prompt=False)
        return dict(generate(own, [[5, 6, 7]], lambda _: 4, decoding))[0]

    free = answer()
    banned = answer(NoBadWordsLogitsProcessor([free[:2]], eos_token_id=None))
    assert banned[0] == free[0] and banned[1] != free[1]


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
@pytest.mark.parametrize("penalize_prompt", [True, False])
def test_histories_hold_what_was_read_and_written_and_nothing_else(tmp_path, generate, penalize_prompt):
    """Prompts of different lengths together, and a pad token that is the end token: every row of a history is the
    beginning of its own text.
    """
    checkpoint = families.make_checkpoint("qwen3", tmp_path)
    own, _ = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512, dtype="float32")
    prompts, seen = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]], []

    def watch(history, scores):
        nothing = scores.shape[1] - 1
        seen.extend([token for token in row if token != nothing] for row in history.tolist())
        return scores

    never = lambda history, _scores: torch.zeros(len(history), dtype=torch.bool)  # noqa: E731
    decoding = helpers.decoding.Decoding(3, watch, never, penalize_prompt)
    answers = dict(generate(own, prompts, lambda _: 4, decoding))
    texts = [(prompt if penalize_prompt else []) + answers[i] for i, prompt in enumerate(prompts)]
    expected = [text[: len(text) - 4 + step] for text in texts for step in range(4)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("penalize_prompt", [True, False])
def test_slots_answer_like_generate_one_by_one(model, slots, penalize_prompt):  # noqa: F811
    """Prompts and answers longer than the window, slots taken over again and again: the tokens of generate()."""
    prompts = [torch.randint(4, 512, (length,)).tolist() for length in (5, 40, 17, 33, 9, 25)]
    lengths = [12, 20, 3, 30, 1, 8]

    def processors(ignored=None):
        return LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=ignored),
                NoBadWordsLogitsProcessor([[7], [8, 9], [100, 200]], eos_token_id=None),
            ]
        )

    model.generation_config.pad_token_id = 0
    expected = {}
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        process = processors(None if penalize_prompt else len(prompt))
        options = {"do_sample": False, "eos_token_id": None, "logits_processor": process}
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=length, **options)[0]
        expected[index] = answer[len(prompt) :].tolist()
    never = lambda history, _scores: torch.zeros(len(history), dtype=torch.bool)  # noqa: E731
    decoding = helpers.decoding.Decoding(slots, processors(), never, penalize_prompt)
    assert dict(helpers.slots.answer(model, prompts, lengths.__getitem__, decoding)) == expected


def test_answers_are_made_one_at_a_time_where_padding_changes_them():
    chosen = helpers.slots.choose(None, in_slots=False, together=False, prompts=[[1]], longest_answer=8, wanted=0)
    assert chosen == (helpers.decoding.in_batches, 1)
