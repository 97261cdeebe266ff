"""Section 4 of helpers.py: training texts, chat template, resuming."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
from transformers.integrations.neftune import activate_neftune

import helpers
from helpers import RecipeError


def test_sft_text_is_the_prompt_of_2024():
    assert helpers.sft_text("質問です", "答えです", "<eos>") == (
        "\nあなたは高性能なAIです。質問に対して、適切な回答を書きなさい。\n"
        "回答に関係のないことは絶対に書かないでください。\n\n### 質問:\n質問です\n\n### 回答:\n答えです<eos>"
    )
    assert helpers.sft_text("質問です", "", "<eos>").endswith("### 回答:\n")


@given(instruction=st.text(), response=st.text(min_size=1))
def test_sft_text_keeps_both_texts_whole(instruction, response):
    """Braces, percent signs and the like in the data must not be taken for format fields."""
    text = helpers.sft_text(instruction, response, "<eos>")
    assert text.endswith(f"### 質問:\n{instruction}\n\n### 回答:\n{response}<eos>")


def test_chat_template():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    tokenizer.chat_template = helpers.models.GEMMA_CHAT_TEMPLATE
    turns = [{"role": "user", "content": " こんにちは "}, {"role": "assistant", "content": "はい"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.strip() == (
        "<bos><start_of_turn>user\nこんにちは<end_of_turn>\n<start_of_turn>model\nはい<end_of_turn>\n<start_of_turn>model"
    )
    with pytest.raises(Exception, match="System role not supported"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template([turns[1]], tokenize=False)


def training(**settings):
    base = {"name": "base", "commit": "", "sha256": settings.pop("base", "1"), "inputs": {}}
    return helpers.records.make("03_sft", {"model": base}, settings, [])


def checkpoint(folder, step, record):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors"):
        (path / name).write_text(f"{name} {step}")
    helpers.records.write(path, record | {"measured": {"seconds": 1.0}})
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def adapter(tmp_path):
    return tmp_path / "adapter"


def test_resume_takes_the_newest_checkpoint_of_the_same_training(folder, adapter):
    record = training(r=8, modules=("q", "k"))
    assert helpers.checkpoints.find(folder, record, adapter) is None
    checkpoint(folder, 300, record)
    newest = checkpoint(folder, 1200, record)
    for foreign in ("checkpoint-old", "checkpoint-1500x", "notes"):
        (folder / foreign).mkdir()
    assert helpers.checkpoints.find(folder, record, adapter) == newest


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "record.json").unlink(), "it was not written to its end"),
        (lambda path: (path / "record.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "optimizer.pt").write_text("optimizer"), "optimizer.pt was changed"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, adapter, capsys, damage, said):
    record = training(r=8)
    helpers.checkpoints.find(folder, record, adapter)
    whole, damaged = checkpoint(folder, 300, record), checkpoint(folder, 1200, record)
    damage(damaged)
    assert helpers.checkpoints.find(folder, record, adapter) == whole
    printed = capsys.readouterr().out
    assert printed.startswith(f"{damaged} is left out: ") and said in printed and printed.count("\n") == 1


def test_resume_refuses_checkpoints_of_other_settings_or_another_base(folder, adapter):
    helpers.checkpoints.find(folder, training(r=8, seed=1), adapter)
    kept = checkpoint(folder, 300, training(r=8, seed=1))
    for other, named in ((training(r=16, seed=1), "r"), (training(r=8, seed=1, base="2"), "model")):
        with pytest.raises(RecipeError, match=rf"other values of {named}:"):
            helpers.checkpoints.find(folder, other, adapter)
    assert helpers.checkpoints.find(folder, training(r=8, seed=1), adapter) == kept
    (folder / "record.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"other values of r:"):  # every checkpoint repeats the record
        helpers.checkpoints.find(folder, training(r=16, seed=1), adapter)
    (folder / "record.json").unlink()
    assert helpers.checkpoints.find(folder, training(r=8, seed=1), adapter) == kept
    (folder / "record.json").unlink()
    (kept / "record.json").unlink()
    with pytest.raises(RecipeError, match="other values of what it was started with"):
        helpers.checkpoints.find(folder, training(r=8, seed=1), adapter)


def finish(adapter, record):
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")
    helpers.records.write(adapter, record)


def test_a_finished_training_is_not_repeated(folder, adapter):
    record = training(r=8)
    helpers.checkpoints.find(folder, record, adapter)
    last = checkpoint(folder, 300, record)
    finish(adapter, record)
    assert helpers.checkpoints.find(folder, record, adapter) == last
    assert helpers.records.check(adapter, finished=True)


def test_another_training_after_a_finished_one_starts_anew(folder, adapter):
    helpers.checkpoints.find(folder, training(r=8), adapter)
    checkpoint(folder, 300, training(r=8))
    finish(adapter, training(r=8))
    assert helpers.checkpoints.find(folder, training(r=16), adapter) is None
    assert not helpers.records.read(adapter), "the old adapter still counts as finished"
    assert not list(folder.glob("checkpoint-*"))


def test_a_checkpoint_of_another_training_is_left_out(folder, adapter, capsys):
    own, other = checkpoint(folder, 5, training(r=8)), checkpoint(folder, 10, training(r=8, base="2"))
    helpers.files.write_json(folder / "record.json", training(r=8))
    assert helpers.checkpoints.find(folder, training(r=8), adapter) == own
    assert f"{other} is left out: it is of another training" in capsys.readouterr().out


def test_an_old_adapter_is_not_finished_once_another_training_has_begun(folder, adapter):
    finish(adapter, training(r=8))
    assert helpers.checkpoints.find(folder, training(r=8), adapter) is None  # the checkpoints were deleted
    assert helpers.records.check(adapter, finished=True)
    assert helpers.checkpoints.find(folder, training(r=16), adapter) is None
    with pytest.raises(RecipeError, match="has no record"):
        helpers.records.check(adapter, finished=True)


def test_noise_without_padding_is_that_of_a_padded_batch():
    """NEFTune draws from -alpha to alpha, divided by the root of row length x width: here of the longest text."""
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**config, num_attention_heads=2, num_key_value_heads=1)).train()
    embeddings = model.get_input_embeddings()
    activate_neftune(model, 5)
    helpers.training.noise_as_with_padding(model, 5)
    noise = []
    clean = embeddings.weight.data * embeddings.embed_scale
    embeddings.register_forward_hook(lambda _m, ids, out: noise.append((out - clean[ids[0]]).abs().max().item()))
    for lengths in ([50], [50, 9, 41, 30]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        model(torch.randint(0, 50, positions.shape), position_ids=positions)
        assert noise[-1] == pytest.approx(5 / (50 * 64) ** 0.5, rel=0.02)


@pytest.mark.parametrize("response", ["富士山です。", "### 回答:\nを含む答え", "🎂"])
def test_answer_labels_cover_the_answer_and_nothing_else(response):
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    text = helpers.sft_text("日本で一番高い山は？", response, tokenizer.eos_token)
    encoded = tokenizer(text, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    prompt_length = len(helpers.sft_text("日本で一番高い山は？", "", ""))
    labels = helpers.answer_labels(encoded["input_ids"], starts, prompt_length)
    assert len(labels) == len(encoded["input_ids"])
    assert tokenizer.decode([label for label in labels if label != -100]) == response + tokenizer.eos_token
    assert helpers.answer_labels(encoded["input_ids"], starts, 0) == encoded["input_ids"]


def test_out_of_memory_keeps_the_effective_batch():
    assert "per_device_train_batch_size=8 and gradient_accumulation_steps=4" in str(
        helpers.training.out_of_memory(16, 2)
    )
    assert "lower max_seq_length" in str(helpers.training.out_of_memory(1, 32))


def test_control_tokens_in_a_text_stay_text():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    text = "終わりは<eos>、始まりは<bos>です。<start_of_turn>とも書きます。"
    ids = helpers.encode(tokenizer, text).ids
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:]) == text
    plain = "# 見出し\n\n<h1>題</h1>\t```python\nprint('あ')\n```\n"
    assert helpers.encode(tokenizer, plain).ids == tokenizer(plain)["input_ids"]


def test_texts_of_a_step_are_dealt_out_to_even_rows():
    lengths = torch.randint(20, 2000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = helpers.even_rows(range(32), lengths, 8)
    assert sorted(text for row in rows for text in row) == [*range(32)]
    assert [len(row) for row in rows] == [8] * 4
    sums = [sum(lengths[text] for text in row) for row in rows]
    assert max(sums) < 1.05 * min(sums)
    assert [len(row) for row in helpers.even_rows(range(3), lengths, 8)] == [3]


@pytest.mark.parametrize("processes", [1, 2])
def test_even_rows_hold_every_text_once_in_each_epoch_whatever_the_number_of_processes(processes):
    class Args:
        seed, per_device_train_batch_size = 3407, 2
        gradient_accumulation_steps, world_size = 4 // processes, processes

    class Trainer:
        args, train_dataset = Args, {"input_ids": [[0] * length for length in range(1, 101)]}

    helpers.training.balance_rows(Trainer)
    sampler = Trainer._get_train_sampler(None)
    epochs = [list(sampler)]
    sampler.set_epoch(1)
    epochs.append(list(sampler))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3407)).tolist()
    assert sorted(epochs[0][:8]) == sorted(order[:8])  # the texts of a step are those of the random order
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == [*range(100)] for epoch in epochs) and len(sampler) == 100


@pytest.mark.parametrize(("processes", "tested"), [(1, 19), (2, 16), (4, 16), (8, 19)])
def test_several_processes_test_whole_batches(processes, tested):
    """transformers would fill the last one up with texts that have been counted already."""
    arguments = SimpleNamespace(per_device_eval_batch_size=4, world_size=processes)
    held_out = Dataset.from_dict({"input_ids": [[2, number] for number in range(19)]})
    assert len(helpers.training.whole_batches(held_out, arguments)) == tested
