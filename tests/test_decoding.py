"""How tokens are chosen: rules, stops, and batches with the model's own generate()."""

import families
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import helpers


def test_rules_see_no_padding():
    """Token 3 was written in both rows, 0 in none; the second row is shorter."""
    scores = torch.ones(2, 6)
    history = torch.tensor([[4, 3, 5], [6, 6, 3]])
    found = helpers.decoding.apply_rules(RepetitionPenaltyLogitsProcessor(2.0), history, scores)
    assert found.tolist() == [[1, 1, 1, 0.5, 0.5, 0.5], [1, 1, 1, 0.5, 1, 1]]


def test_the_penalty_spares_end_tokens():
    """A prompt in chat format holds them (2 and 5 here): penalized, they would be written less often."""
    tokenizer = families.FAMILIES["gemma2"][2]()
    process, _ = helpers.decoding.token_rules(tokenizer, [2, 5], 2.0, [], "")
    scores = torch.tensor([[1.0, 1, 1, -1, 1, -1], [1, 1, 1, -1, 1, -1]])
    found = helpers.decoding.apply_rules(process, torch.tensor([[1, 2, 3], [6, 5, 4]]), scores)
    assert found.tolist() == [[1, 0.5, 1, -2, 1, -1], [1, 1, 1, -1, 0.5, -1]]
    assert scores[0].tolist() == [1, 1, 1, -1, 1, -1]  # the model's own are as they were


@pytest.mark.parametrize("family", ["gemma2", "llama3", "llm-jp", "mistral", "qwen3", "phi3"])
def test_banned_words_cannot_be_written_anywhere(family):
    """At the beginning of an answer, on a line of its own, and in the middle of a sentence."""
    tokenizer = families.FAMILIES[family][2]()
    process, _ = families.rules(tokenizer, [tokenizer.eos_token_id])
    for word in ("質問", "###", "filepath"):
        for before in ("答え\n", "答えの"):
            ids, words = (helpers.encode(tokenizer, text).ids for text in (before, before + word))
            assert words[: len(ids)] == ids
            scores = process(torch.tensor([words[:-1]]), torch.zeros(1, len(tokenizer)))
            assert scores[0, words[-1]] == -torch.inf, (word, before)
