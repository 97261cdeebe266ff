"""What a saved model says to other programs: its chat template, end tokens and config, in forms that all of them read.

transformers 5 writes some keys where version 4 does not look, and most programs still bring version 4 or code of its
time: llama.cpp's converter, for one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from engine import chat, files
from helpers import SFT_PROMPT, encode, sft_text

ONE_QUESTION = (
    "This model was trained on single questions in the words of 2024: send one user message, without a system message "
    "and without earlier turns."
)
CONTROL = "The model was trained to read this as text, but here it would become a control token: "
NO_TEMPLATE = (
    "No chat template can ask as this model was trained: send the filled prompt of the training to /v1/completions."
)
# One question, and its answer where a program renders a whole text. The question block ends where the answer begins,
# so that a program which forgets add_generation_prompt asks the same.
TEMPLATE_2024 = """\
{{%- set second = messages|length == 2 -%}}
{{%- if messages|length > 2 or messages[0]['role'] != 'user' or (second and messages[1]['role'] != 'assistant') -%}}
{{{{- raise_exception({one_question}) -}}}}
{{%- endif -%}}
{{%- for token in {control_tokens} -%}}
{{%- if token in messages[0]['content'] -%}}
{{{{- raise_exception({control} + token) -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- {begin} + messages[0]['content'] + {end} -}}}}
{{%- if second -%}}
{{{{- messages[1]['content'] + eos_token -}}}}
{{%- endif -%}}
"""


NO_THINKING = "{%- set enable_thinking = false -%}"


def _literal(value: Any) -> str:
    """A string or list of strings as Jinja reads it."""
    return json.dumps(value, ensure_ascii=False)


def chat_template_2024(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template that asks one question in the words of the training, with the same token ids.

    Some tokenizers put ▁ before a text but not behind a control token, so there a space takes its place; it is tried
    which way gives the same ids. A question in which a control token is written is refused: a template cannot say
    that it is text.
    """
    opening, ending, _ = map(_literal, SFT_PROMPT.split("{}"))
    words = {"one_question": _literal(ONE_QUESTION), "control": _literal(CONTROL)}
    words["control_tokens"] = _literal(sorted(chat.control_tokens(tokenizer)))
    question = "1 + 1 は？\n{答え} を書いて。"
    expected = encode(tokenizer, sft_text(question, "", "")).ids
    begin = "bos_token + " if encode(tokenizer, "").ids else ""
    for join in ("", '" " + '):
        template = TEMPLATE_2024.format(begin=begin + join + opening, end=ending, **words)
        turn = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([turn], chat_template=template, tokenize=False)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == expected:
            return template
    return "{{ raise_exception(" + _literal(NO_TEMPLATE) + ") }}"


def chat_template_trained(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template as `chat` reads it: thinking switched off, and the one <bos> in front."""
    template = tokenizer.chat_template.strip()
    if "enable_thinking" in template and NO_THINKING not in template:
        template = NO_THINKING + template
    begin = encode(tokenizer, "").ids
    turn = {"role": "user", "content": "山"}
    text = tokenizer.apply_chat_template([turn], chat_template=template, tokenize=False)
    if tokenizer(text, add_special_tokens=False)["input_ids"][: len(begin)] != begin:
        template = "{{- bos_token -}}" + template
    return template


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, text_format: str) -> None:
    """Save a tokenizer with the chat template of the training, by its `text_format`: "2024" or "chat"."""
    tokenizer = copy.deepcopy(tokenizer)
    template = chat_template_2024 if text_format == "2024" else chat_template_trained
    tokenizer.chat_template = template(tokenizer)
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    files.write_json(path, old_tokenizer_keys(config) | {"add_bos_token": bool(encode(tokenizer, "").ids)})


def old_tokenizer_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of tokenizer_config.json under the names that both generations of transformers know."""
    config = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config | {"add_eos_token": False}  # else an answer would begin behind an end token


def old_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of config.json with those of the rotary embeddings also where transformers 4 looks for them."""
    by_layer = config.get("rope_parameters") or {}
    rope = by_layer.get("full_attention", by_layer)
    if "rope_theta" not in rope:
        return dict(config)
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if config["model_type"] == "phi3":  # version 4 takes these three and no more
        scaling = {name: rope.get(name) for name in ("rope_type", "short_factor", "long_factor")}
        scaling["type"] = scaling.pop("rope_type")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if rope["rope_type"] != "default" else None}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "sliding_attention" in by_layer:
        old["rope_local_base_freq"] = by_layer["sliding_attention"]["rope_theta"]
    return {**config, **old}


def save_generation_config(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, text_format: str, penalty: float
) -> None:
    """Let a model's folder say how to answer: to which end tokens, greedily, with the recipe's repetition penalty.

    A model trained in the "chat" format keeps the base's own values for sampling, if it has any.
    """
    own = GenerationConfig.from_pretrained(folder)
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    if text_format == "chat":
        ends.append(chat.end_of_turn(tokenizer))
    ends = sorted({tokenizer.eos_token_id, *ends} - {None})
    kept = ["do_sample", "temperature", "top_k", "top_p", "min_p"] if text_format == "chat" and own.do_sample else []
    sampling = {"do_sample": False} | {name: value for name in kept if (value := getattr(own, name)) is not None}
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    GenerationConfig(repetition_penalty=penalty, **sampling, **special).save_pretrained(folder)


def make_readable(folder: str | Path, tokenizer: PreTrainedTokenizerBase, text_format: str, penalty: float) -> None:
    """Add to a saved model what other programs need: tokenizer, generation config, and config for both generations."""
    save_tokenizer(tokenizer, folder, text_format)
    save_generation_config(folder, tokenizer, text_format, penalty)
    path = Path(folder, "config.json")
    files.write_json(path, old_rope_keys(json.loads(path.read_text(encoding="utf-8"))))
