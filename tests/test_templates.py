"""engine/formats.py: the chat templates of saved models render the token ids of the training."""

import pytest
from conftest import ROOT
from families import FAMILIES
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

import helpers

formats = helpers.formats
TEXTS = [
    "1 + 1 は？",
    "  前後に空白  ",
    "改行\n\n\tと{波}かっこ {{ x }} {% y %} {}",
    "絵文字😀👨‍👩‍👧と'引用'\"符\" \\n バックスラッシュ",
    "\n### 質問:\n入れ子\n\n### 回答:\n",
    "a",
]
KINDS = ["gemma2", "llama3", "llm-jp", "mistral", "qwen2.5", "phi3"]


def render(tokenizer, *contents, **options):
    """The ids of alternating turns, as a server reads them."""
    turns = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(contents)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """A tokenizer of a family before and after it was saved in the format of 2024."""
    tokenizer = FAMILIES[request.param][2]()
    own = tokenizer.chat_template
    formats.save_tokenizer(tokenizer, tmp_path, "2024")
    assert tokenizer.chat_template == own  # the training goes on with it
    return tokenizer, AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_question_is_rendered_as_the_training_prompt(saved, add_generation_prompt):
    before, after = saved
    for text in TEXTS:
        expected = helpers.encode(before, helpers.sft_text(text, "", "")).ids
        assert render(after, text, add_generation_prompt=add_generation_prompt) == expected
        assert expected.count(before.bos_token_id) == len(helpers.encode(before, "").ids)


def test_a_question_and_its_answer_are_the_training_text(saved):
    before, after = saved
    for question, response in zip(TEXTS, reversed(TEXTS), strict=True):
        assert render(after, question, response) == helpers.training_example(before, question, response, "text").ids


def test_what_was_not_trained_is_refused(saved):
    _, after = saved
    with pytest.raises(TemplateError, match="single questions in the words of 2024"):
        render(after, "一", "二", "三", add_generation_prompt=True)
    for first in ("system", "user", "assistant"):
        turns = [{"role": first, "content": "短く。"}, {"role": "user", "content": "山は？"}]
        with pytest.raises(TemplateError, match="single questions in the words of 2024"):
            after.apply_chat_template(turns, tokenize=False)


def test_a_control_token_in_a_question_is_refused(saved):
    """The training reads it as text; a template can only write it, and then it is the control token."""
    _, after = saved
    with pytest.raises(TemplateError, match=f"become a control token: {after.eos_token}".replace("|", r"\|")):
        render(after, f"{after.eos_token} とは何ですか。")


def test_a_saved_tokenizer_reads_as_before(saved):
    before, after = saved
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert after.special_tokens_map == before.special_tokens_map and len(after) == len(before)


def test_where_no_template_can_render_the_ids_it_says_so():
    """A tokenizer that reads text behind its start token otherwise than text alone."""
    tokenizer = FAMILIES["llama3"][2]()

    class Odd(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text + "." if text.startswith(self.bos_token) else text, **options)

    tokenizer.__class__ = Odd
    tokenizer.chat_template = formats.chat_template_2024(tokenizer)
    with pytest.raises(TemplateError, match="No chat template can ask as this model was trained"):
        tokenizer.apply_chat_template([{"role": "user", "content": "山"}], tokenize=False)


def test_the_chat_format_keeps_the_trained_template(tmp_path):
    tokenizer = helpers.models.load_tokenizer(str(ROOT / "data/tiny/gemma2"))
    helpers.chat.prepare(tokenizer)
    formats.save_tokenizer(tokenizer, tmp_path, "chat")
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after.chat_template == tokenizer.chat_template
    for text in TEXTS:
        assert render(after, text, add_generation_prompt=True) == helpers.chat.prompt_ids(tokenizer, text, ())


def test_the_chat_format_adds_bos_and_switches_thinking_off(tmp_path):
    """As `chat` trains where the template itself does neither."""
    tokenizer = FAMILIES["llama3"][2]()
    tokenizer.chat_template = (
        "{%- for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "[assistant]{% if enable_thinking is defined and enable_thinking is false %}無{% endif %}{% endif %}"
    )
    formats.save_tokenizer(tokenizer, tmp_path, "chat")
    after = AutoTokenizer.from_pretrained(tmp_path)
    found = render(after, "山は？", add_generation_prompt=True)
    assert found == helpers.chat.prompt_ids(tokenizer, "山は？", ())
    assert found[0] == tokenizer.bos_token_id and "無" in after.decode(found)
    formats.save_tokenizer(after, tmp_path / "again", "chat")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == after.chat_template
