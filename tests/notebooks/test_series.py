"""Other base models: the series on tiny checkpoints of each family, and what is refused or answered in another way."""

import json
import subprocess
import sys

import families
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from transformers import AutoConfig, GenerationConfig, RepetitionPenaltyLogitsProcessor

import helpers
from helpers import RecipeError

GPT_OSS = {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_series_works(family, tmp_path):
    """Notebooks 01, 03 and 04; then, in float32, slots and batches against a loop without cache, and a row of texts."""
    row = families.table_row(family, "transformers", tmp_path)
    assert row["01, 03, 04"] == "yes"
    assert row["<bos> per text"] == ("0" if family.startswith(("qwen", "phi")) else "1")
    assert row["untrained matrices"] == 0
    assert row["slots equal to the loop"] == row["batches equal to the loop"] == "6 of 6"
    assert float(row["row against texts alone"]) < 1e-3
    card = (tmp_path / "run/quantized/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "Gemma" not in card.replace("Gemma3", "")


def test_the_series_works_with_unsloth():
    """In a process of its own, because unsloth patches the libraries."""
    command = [sys.executable, "tests/families.py", "--engine", "unsloth", "gemma3", "qwen3"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "unsloth" in line]
    assert len(rows) == 2
    assert all("| yes |" in row and row.endswith("| 0 | 6 of 6 |") for row in rows), printed


def config_only(kind, folder, **values):
    """A folder that holds a config and a tokenizer, but no weights: what is refused here is refused before them."""
    checkpoint = families.make_checkpoint(kind, folder, **values)
    for weights in checkpoint.glob("*.safetensors"):
        weights.unlink()
    return str(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        ({"model_type": "qwen3_5_text"}, r"layers that are not attention \(linear_attention\)"),
        ({"model_type": "rwkv"}, r"layers that are not attention \(with a state of their own\)"),
        ({"model_type": "mistral3"}, "mistral3 reads more than text"),
        ({"model_type": "gemma4_text"}, "its layers differ in their sizes"),
        ({"model_type": "of 2031"}, "its config.json cannot be used"),
        ({"model_type": "llama", "max_position_embeddings": 512}, "it reads at most 512 tokens: lower max_seq_length"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_their_config(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=message):
        helpers.models.text_config(str(tmp_path), max_seq_length=1024)


def test_experts_would_stay_untrained(tmp_path):
    """Notebook 03 stops before it looks for weights, and lists them."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = config_only("Qwen3MoeConfig", tmp_path / "base", **sizes)
    with pytest.raises(RecipeError, match=r"does not reach model\.layers\.\*\.mlp\.experts\.down_proj, .*untrained"):
        families.run_notebook(
            "03_sft", output_dir=str(tmp_path / "run"), model=model, train_data="data/sample/qa.jsonl"
        )


def test_notebook_04_refuses_before_weights_are_loaded(tmp_path):
    model = config_only("qwen3", tmp_path / "base", max_position_embeddings=512)
    values = {"output_dir": str(tmp_path / "run"), "model": model, "adapter": "none"}
    with pytest.raises(RecipeError, match=r"at most 512 tokens: lower max_seq_length \(1024\)"):
        families.run_notebook("04_rag_inference", **values)


def test_notebook_01_refuses_weights_that_are_quantized_already(smoke, tmp_path):
    with pytest.raises(RecipeError, match="is quantized already: name its weights in 16 bit"):
        families.run_notebook("01_quantize", output_dir=str(tmp_path), base_model=str(smoke / "quantized"))


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


def test_rounding_in_16_bit_is_told_from_a_wrong_mask(tmp_path):
    """A row in which the second text sees the first gives other scores only at the second text's first tokens."""
    checkpoint = families.make_checkpoint("mistral", tmp_path)
    model, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512)
    texts = [torch.tensor([helpers.encode(tokenizer, prompt).ids[:200]]) for prompt in families.PROMPTS[:2]]
    row, positions = torch.cat(texts, dim=1), torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        alone = torch.cat([model(text).logits for text in texts], dim=1)
        mixed = model(row, attention_mask=torch.ones_like(row), position_ids=positions).logits
    assert helpers.attention.scores_agree(alone * 1.01, alone)
    assert not helpers.attention.scores_agree(mixed, alone)
    assert not helpers.attention.scores_agree(mixed * torch.nan, alone)


def test_both_engines_end_at_all_end_tokens_of_the_model(tmp_path):
    """A list of end tokens in the generation config, with a pad token that is one of them."""
    checkpoint = families.make_checkpoint("qwen2.5", tmp_path)
    before = families.answers_of(checkpoint, "transformers")["loop"]
    ends = [0, before[0][2]]
    GenerationConfig(eos_token_id=ends, pad_token_id=0, **families.GENERATION).save_pretrained(checkpoint)
    found = families.answers_of(checkpoint, "transformers")
    assert found["slots"] == found["batches"] == found["loop"]
    assert found["loop"][0] == before[0][: before[0].index(ends[1]) + 1]


def test_rules_see_no_padding():
    """Token 3 was written in both rows, 0 in none; the second row is shorter."""
    scores = torch.ones(2, 6)
    history = torch.tensor([[4, 3, 5], [6, 6, 3]])
    found = helpers.decoding.apply_rules(RepetitionPenaltyLogitsProcessor(2.0), history, scores)
    assert found.tolist() == [[1, 1, 1, 0.5, 0.5, 0.5], [1, 1, 1, 0.5, 1, 1]]


@pytest.mark.parametrize("generate", [helpers.slots.answer, helpers.decoding.in_batches])
@pytest.mark.parametrize("penalize_prompt", [True, False])
def test_histories_hold_what_was_read_and_written_and_nothing_else(tmp_path, generate, penalize_prompt):
    """Prompts of different lengths together, and a pad token that is the end token: every row of a history is the
    beginning of its own text.
    """
    checkpoint = families.make_checkpoint("qwen3", tmp_path)
    model, _ = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512, dtype="float32")
    prompts, seen = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]], []

    def watch(history, scores):
        nothing = scores.shape[1] - 1
        seen.extend([token for token in row if token != nothing] for row in history.tolist())
        return scores

    never = lambda history, _scores: torch.zeros(len(history), dtype=torch.bool)  # noqa: E731
    decoding = helpers.decoding.Decoding(3, watch, never, penalize_prompt)
    answers = dict(generate(model, prompts, lambda _: 4, decoding))
    texts = [(prompt if penalize_prompt else []) + answers[i] for i, prompt in enumerate(prompts)]
    expected = [text[: len(text) - 4 + step] for text in texts for step in range(4)]
    assert sorted(seen) == sorted(expected)


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


@pytest.mark.parametrize(
    ("family", "pad", "template"),
    [
        ("gemma2", "<pad>", helpers.models.GEMMA_CHAT_TEMPLATE),
        ("llama3", "<|reserved_special_token_0|>", None),
        ("llm-jp", "<PAD|LLM-jp>", None),
        ("mistral", "<unk>", None),
        ("qwen3", "<|vision_pad|>", families.qwen_tokenizer().chat_template),
        ("phi3", "<|placeholder1|>", None),
    ],
)
def test_pad_token_and_chat_template(tmp_path, family, pad, template):
    families.FAMILIES[family][2]().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = helpers.models.load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.chat_template) == (pad, template)
    assert tokenizer.pad_token_id < len(families.FAMILIES[family][2]())  # no token was added


def test_encode_adds_what_stands_in_front_and_nothing_behind():
    """Of llm-jp's <s> and </s> only the first; a text within another has no ▁ of its own."""
    tokenizer = families.llmjp_tokenizer()
    assert tokenizer("山")["input_ids"][-1] == tokenizer.eos_token_id
    ids = helpers.encode(tokenizer, "山").ids
    assert (ids[0], tokenizer.eos_token_id in ids) == (tokenizer.bos_token_id, False)
    assert helpers.encode_within(tokenizer, "山") == ids[2:]


def test_values_for_sampling_do_not_stop_the_saving(tmp_path):
    """`temperature` without `do_sample`, as in many repositories: transformers refuses to save it, after hours."""
    checkpoint = families.make_checkpoint("llama3", tmp_path / "base")
    values = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    model = helpers.models.load_weights(str(checkpoint), helpers.models.text_config(str(checkpoint)), device_map="cpu")
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("card", "licence", "said"),
    [
        ("license: [gemma, llama3.3]", ["gemma", "llama3.3"], ("Gemma Terms of Use", "Built with Llama.")),
        ("license: apache-2.0", "apache-2.0", ()),
        ("license: other\nlicense_name: qwen\nlicense_link: https://a/b", "other", ()),
        ("license: [a", None, ()),
        ("tags: [x]", None, ()),
    ],
)
def test_the_card_has_the_licence_of_the_base_and_says_what_it_asks_for(tmp_path, card, licence, said):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    record = helpers.records.make("01", {"model": helpers.records.model_source(str(tmp_path))}, {}, [])
    helpers.records.check_licences(record["inputs"])  # a model's licence is shown, not judged
    text = helpers.records.model_card("T", record, [], {})
    data = ModelCard(text).data
    assert data.license == licence
    assert (data.license_name, data.license_link) == (("qwen", "https://a/b") if licence == "other" else (None, None))
    notices = ("Gemma Terms of Use", "Built with Llama.")
    assert [notice in text for notice in notices] == [notice in said for notice in notices]
