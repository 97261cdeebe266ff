"""The slot decoder: the answers of generate(), for every kind of model, or a line that says why not."""

import families
import pytest
import torch
from test_attention import model  # noqa: F401, a fixture
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import helpers

GPT_OSS = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}


@pytest.mark.parametrize(
    ("family", "values", "known", "said"),
    [
        ("Olmo3Config", {"sliding_window": 24}, False, "the attention of olmo3 models has not been checked here"),
        # As if these two were known: the check finds out.
        ("GptOssConfig", GPT_OSS, True, "attention uses s_aux"),
        ("gemma3_text", {"use_bidirectional_attention": True}, True, "other scores"),
    ],
)
def test_other_attention_is_left_to_the_model_itself(tmp_path, capsys, monkeypatch, family, values, known, said):
    """Then rows are padded, and generate() answers like the loop; a line says why."""
    checkpoint = families.make_checkpoint(family, tmp_path, **values)
    if known:
        monkeypatch.setattr(helpers.attention, "KNOWN_MODELS", (AutoConfig.from_pretrained(checkpoint).model_type,))
    assert families.row_difference(checkpoint) is None
    printed = capsys.readouterr().out
    assert said in printed and "texts are padded instead" in printed
    if family != "gemma3_text":  # a model that sees the tokens to come cannot write
        found = families.answers_of(checkpoint, "transformers")
        printed = capsys.readouterr().out
        assert said in printed and "answers with its own generate()" in printed
        assert "slots" not in found and found["batches"] == found["loop"]


def test_both_engines_end_at_all_end_tokens_of_the_model(tmp_path):
    """A list of end tokens in the generation config, with a pad token that is one of them."""
    checkpoint = families.make_checkpoint("qwen2.5", tmp_path)
    before = families.answers_of(checkpoint, "transformers")["loop"]
    ends = [0, before[0][2]]
    GenerationConfig(eos_token_id=ends, pad_token_id=0, **families.GENERATION).save_pretrained(checkpoint)
    found = families.answers_of(checkpoint, "transformers")
    assert found["slots"] == found["batches"] == found["loop"]
    assert found["loop"][0] == before[0][: before[0].index(ends[1]) + 1]


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
