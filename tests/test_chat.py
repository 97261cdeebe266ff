"""engine/chat.py: conversations in a model's own format; what is trained, and what cannot be."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import helpers
from engine import chat, formats
from helpers import RecipeError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Qwen 3: an answer holds an empty thought while it is the last turn, and none once others follow.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "日本で一番高い山は？"},
    {"role": "assistant", "content": "富士山です。"},
    {"role": "user", "content": "高さは？"},
    {"role": "assistant", "content": "3,776メートルです。\n昔は3,778メートルでした。"},
]
SYSTEM = {"role": "system", "content": "短く答えてください。"}


@pytest.fixture(scope="module")
def gemma():
    tokenizer = helpers.models.load_tokenizer("data/tiny/gemma2")
    chat.prepare(tokenizer)
    return tokenizer


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    chat.prepare(tokenizer)
    return tokenizer


def trained(tokenizer, example):
    """The pieces of text that the loss counts, each a run of labels."""
    pieces, before = [], -100
    for label in example.labels:
        if label != -100:
            if before == -100:
                pieces.append([])
            pieces[-1].append(label)
        before = label
    return [tokenizer.decode(piece) for piece in pieces]


def test_every_answer_is_trained_to_the_end_of_its_turn_and_nothing_else(gemma):
    example = chat.example(gemma, TALK)
    assert trained(gemma, example) == [f"{turn['content']}<end_of_turn>" for turn in TALK[1::2]]
    assert example.ids.count(gemma.bos_token_id) == 1 and example.ids[0] == gemma.bos_token_id
    assert all(label in (-100, token) for label, token in zip(example.labels, example.ids, strict=True))
    assert gemma.decode(example.ids[example.question :]).startswith("富士山です。")


def test_the_ids_are_those_that_a_server_sends(gemma):
    """A chat program renders the template and reads the text; <bos> stands in the template."""
    prompt = chat.prompt_ids(
        gemma, TALK[2]["content"], [{"instruction": TALK[0]["content"], "response": "富士山です。"}]
    )
    server = gemma.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == list(server)
    assert chat.example(gemma, TALK).ids[: len(prompt)] == prompt  # asked as it was trained


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_a_template_without_bos_gets_the_one_that_the_tokenizer_puts(template):
    tokenizer = with_template(template)
    example = chat.example(tokenizer, TALK[:2])
    assert example.ids[0] == tokenizer.bos_token_id and example.ids.count(tokenizer.bos_token_id) == 1
    assert trained(tokenizer, example) == ["富士山です。<|im_end|>"]
    assert chat.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_is_named():
    with pytest.raises(RecipeError, match="writes earlier turns otherwise once others follow"):
        chat.example(with_template(THINKING), TALK)


def test_a_system_text_goes_where_the_template_wants_it(gemma, capsys):
    found, problems = chat.examples(gemma, [[SYSTEM, *TALK], TALK])
    assert not problems and "1 system texts stand before the first question" in capsys.readouterr().out
    assert "user\n短く答えてください。\n\n日本で一番高い山は？<end_of_turn>" in found[0].text
    tokenizer = with_template(CHATML)
    assert chat.prepare(tokenizer)
    assert chat.example(tokenizer, [SYSTEM, *TALK]).text.startswith(
        "<|im_start|>system\n短く答えてください。<|im_end|>"
    )


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "user", "content": "<end_of_turn>とは？"}, TALK[1]], "holds the control token <end_of_turn>"),
        ([TALK[0]], "holds no answer to a question"),
        ([{"role": "tool", "content": "12"}, *TALK], "a turn of the role 'tool'"),
    ],
)
def test_what_cannot_be_trained_on_says_why(gemma, turns, said):
    with pytest.raises(RecipeError, match=said):
        chat.example(gemma, turns)
    found, problems = chat.examples(gemma, [turns, TALK])
    assert len(found) == 1 and said in problems[0]
    with pytest.raises(RecipeError, match="no conversation can be trained on; the first one"):
        chat.examples(gemma, [turns])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'][:3] }}{% endfor %}", "drops or changes the text of turn 1"),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "puts no end token behind an answer"),
        ("{{ raise_exception('only for tools') }}", "refuses it"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_named(template, said):
    with pytest.raises(RecipeError, match=said):
        chat.example(with_template(template), TALK)


def rows(*alike, size=64, width=16):
    """A random matrix (tokens, width) in which the tokens `alike`, and a dozen others, have nearly the same row."""
    matrix = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    same = [*alike, *range(max(0, size - 12), size)]
    matrix[same] = matrix[0] + matrix[same] / 50
    return matrix.bfloat16()


def test_a_token_that_was_never_trained_has_no_row_of_its_own():
    assert [chat.is_known(rows(5), token) for token in (1, 5, 63)] == [True, False, False]
    zeros = rows(5)
    zeros[[5, *range(52, 64)]] *= 1e-4  # as in Llama 3
    assert [chat.is_known(zeros, token) for token in (1, 5)] == [True, False]
    assert chat.is_known(torch.eye(4), 1)  # a vocabulary of four
    added = rows()
    added[5] = added.float().mean(0)  # as transformers adds tokens
    assert [chat.is_known(added, token) for token in (1, 5)] == [True, False]
    most = rows(*range(10, 50))  # fewer were trained than not
    assert [chat.is_known(most, token) for token in (1, 12)] == [True, False]
    with pytest.raises(RecipeError, match="weights of this base are damaged"):
        chat.is_known(torch.full((64, 16), torch.nan), 5)


@pytest.mark.parametrize("alike", [[], ["<end_of_turn>"]])
def test_an_end_of_turn_that_the_base_never_learnt_becomes_eos(alike, capsys, tmp_path):
    tokenizer = helpers.models.load_tokenizer("data/tiny/gemma2")
    matrix = rows(*tokenizer.convert_tokens_to_ids(alike), size=len(tokenizer))
    chat.settle_end(tokenizer, matrix, "chat")
    ending = "<eos>" if alike else "<end_of_turn>"
    assert trained(tokenizer, chat.example(tokenizer, TALK)) == [f"{turn['content']}{ending}" for turn in TALK[1::2]]
    assert ("has not learnt <end_of_turn>: turns end with <eos>" in capsys.readouterr().out) == bool(alike)
    formats.save_tokenizer(tokenizer, tmp_path, "chat")  # a program that asks the trained model writes <eos>, too
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tokenize=False)
    assert text.count("<eos>") == (4 if alike else 0) and ("<end_of_turn>" in text) == (not alike)


def test_each_of_two_tokens_at_the_end_of_an_answer_is_looked_at():
    tokenizer = with_template(CHATML.replace("<|im_end|>\n", "<|im_end|>\n' + eos_token + '\n"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.ends_of_turn(tokenizer) == [end, tokenizer.eos_token_id]
    chat.settle_end(tokenizer, rows(end, size=len(tokenizer)), "chat")
    assert trained(tokenizer, chat.example(tokenizer, TALK[:2])) == ["富士山です。<eos>\n<eos>"]


def test_a_beginning_that_is_the_end_token_may_stand_in_every_turn():
    """As in OLMo 2: <|endoftext|> begins the text and ends the answers."""
    tokenizer = with_template("{{ eos_token }}" + CHATML.replace("<|im_end|>", "' + eos_token + '"))
    tokenizer.bos_token = tokenizer.eos_token
    example = chat.example(tokenizer, TALK)
    assert example.ids.count(tokenizer.eos_token_id) == 5
    assert trained(tokenizer, example) == [f"{turn['content']}<eos>" for turn in TALK[1::2]]
    doubled = with_template("{{ bos_token + bos_token }}" + CHATML)
    with pytest.raises(RecipeError, match="holds a second <bos>"):
        chat.example(doubled, TALK)


@pytest.mark.parametrize(
    ("unknown", "tokens", "said"),
    [
        (["<end_of_turn>", "<eos>"], 512, "has not learnt <end_of_turn>, .*name the instruct model that the template"),
        ([], 5, "the tokenizer has tokens that the model has not, such as <end_of_turn>"),
    ],
)
def test_a_base_without_an_end_is_refused(unknown, tokens, said):
    tokenizer = helpers.models.load_tokenizer("data/tiny/gemma2")
    ids = tokenizer.convert_tokens_to_ids(unknown)
    with pytest.raises(RecipeError, match=said) as problem:
        chat.settle_end(tokenizer, rows(*ids, size=tokens), "chat")
    assert "2024" not in str(problem.value)  # which ends with <eos>


def test_what_cannot_be_known_of_an_end_is_said(capsys):
    tokenizer = helpers.models.load_tokenizer("data/tiny/gemma2")
    chat.settle_end(tokenizer, None, "chat")
    assert "whether this base has learnt <end_of_turn> cannot be read" in capsys.readouterr().out
    chat.settle_end(tokenizer, rows(tokenizer.eos_token_id, size=len(tokenizer)), "2024")
    assert "has not learnt <eos>, with which texts end: few answers will end" in capsys.readouterr().out
    chat.settle_end(tokenizer, rows(size=len(tokenizer)), "2024")
    assert capsys.readouterr().out == ""


def test_without_a_template_another_format_is_advised():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny/gemma2")
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match='set text_format = "2024"'):
        chat.examples(tokenizer, [TALK])


def test_turns_are_tidied():
    greeting = {"role": "assistant", "content": "こんにちは。ご用件は？"}
    more = {"role": "user", "content": "標高も教えて。"}
    assert chat.tidy([greeting, *TALK]) == TALK
    joined = chat.tidy([TALK[0], more, *TALK[1:], {"role": "user", "content": "ありがとう。"}])
    assert joined == [{"role": "user", "content": "日本で一番高い山は？\n\n標高も教えて。"}, *TALK[1:]]


def test_a_question_that_speaks_of_control_tokens_ends_no_turn(gemma):
    ids = chat.prompt_ids(gemma, "<end_of_turn>とは？", [])
    assert ids.count(gemma.convert_tokens_to_ids("<end_of_turn>")) == 1


def test_conversations_are_loaded_whole(tmp_path):
    rows = [{"conversations": TALK}, {"instruction": "山は？", "response": "富士山です。"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert chat.load(str(tmp_path / "a.jsonl")) == [
        TALK,
        [{"role": "user", "content": "山は？"}, {"role": "assistant", "content": "富士山です。"}],
    ]


words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_text_is_trained_as_it_is(gemma, pairs):
    assume(not any(token in text for pair in pairs for text in pair for token in chat.control_tokens(gemma)))
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    example = chat.example(gemma, turns)
    expected = [f"{answer.strip()}<end_of_turn>" for _, answer in pairs]
    unknown = gemma.decode([gemma.unk_token_id])
    assert unknown in gemma.decode(example.ids) or trained(gemma, example) == expected
