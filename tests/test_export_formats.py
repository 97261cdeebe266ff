"""export.py and engine/formats.py, engine/gguf.py: what an exported folder tells other programs."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_chat
import torch
from conftest import ROOT
from families import FAMILIES, gemma_tokenizer, llama2_tokenizer, llama3_tokenizer, llmjp_tokenizer, make_checkpoint
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Phi3Config

import export
import helpers
from helpers import RecipeError

chat, formats, gguf = helpers.chat, helpers.formats, helpers.gguf
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 512, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8, "rope_theta": 2e4}


def read_json(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def exported(folder, family="gemma2", text_format="2024", penalty=1.1, **changes):
    """A checkpoint of a family with what formats.make_readable adds."""
    make_checkpoint(family, folder, **changes)
    formats.make_readable(folder, helpers.models.load_tokenizer(str(folder)), text_format, penalty)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_says_the_same_as_before(family, tmp_path):
    before = AutoConfig.from_pretrained(make_checkpoint(family, tmp_path / "base")).get_text_config()
    after = AutoConfig.from_pretrained(exported(tmp_path / "exported", family)).get_text_config()
    assert after.rope_parameters == before.rope_parameters
    assert after.layer_types == before.layer_types if hasattr(before, "layer_types") else True


@pytest.mark.parametrize(
    ("kind", "rope", "old"),
    [
        (LlamaConfig, {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (LlamaConfig, LLAMA3, {"rope_theta": 5e5, "rope_scaling": {k: LLAMA3[k] for k in list(LLAMA3)[:-1]}}),
        (LlamaConfig, YARN, {"rope_theta": 5e5, "rope_scaling": {k: YARN[k] for k in list(YARN)[:-1]}}),
        (
            Phi3Config,
            LONG,
            {
                "rope_theta": 2e4,
                "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8},
                "partial_rotary_factor": 1.0,
            },
        ),
    ],
)
def test_rotary_values_stand_where_both_generations_look(kind, rope, old, tmp_path):
    config = kind(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope), pad_token_id=0)
    config.save_pretrained(tmp_path)
    found = formats.old_rope_keys(read_json(tmp_path, "config.json"))
    assert {name: found[name] for name in old} == old
    assert found["rope_parameters"] == read_json(tmp_path, "config.json")["rope_parameters"]
    helpers.files.write_json(tmp_path / "config.json", found)
    again = AutoConfig.from_pretrained(tmp_path)
    ids = torch.arange(64)[None]
    rotary = [helpers.shapes.empty(c).base_model.rotary_emb for c in (config, again)]
    tables = [type(r)(c)(torch.zeros(1, 64, 16), ids) for r, c in zip(rotary, (config, again), strict=True)]
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=0)


def test_gemma_3_has_two_bases(tmp_path):
    folder = exported(tmp_path / "m", "gemma3_text")
    config = read_json(folder, "config.json")
    assert (config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]) == (1e6, 1e4, None)


def test_answers_are_greedy_with_the_penalty_of_the_recipe_and_all_end_tokens(tmp_path):
    folder = make_checkpoint("llama3", tmp_path / "m")
    tokenizer = helpers.models.load_tokenizer(str(folder))
    turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    GenerationConfig(eos_token_id=[turn_end], repetition_penalty=1.7, do_sample=True, top_p=0.9).save_pretrained(folder)
    formats.save_generation_config(folder, tokenizer, "2024", 1.05)
    found = GenerationConfig.from_pretrained(folder)
    assert sorted(found.eos_token_id) == sorted([turn_end, tokenizer.eos_token_id])
    assert (found.do_sample, found.repetition_penalty, found.top_p) == (False, 1.05, None)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")  # it can be saved


def test_in_the_chat_format_the_bases_sampling_and_the_end_of_a_turn_are_kept(tmp_path):
    folder = make_checkpoint("gemma2", tmp_path / "m")  # at temperature 0.6
    tokenizer = helpers.models.load_tokenizer(str(folder))
    formats.save_generation_config(folder, tokenizer, "chat", 1.1)
    found = GenerationConfig.from_pretrained(folder)
    assert (found.do_sample, found.temperature, found.repetition_penalty) == (True, 0.6, 1.1)
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in found.eos_token_id
    assert found.no_repeat_ngram_size is None  # not one of the recipe's rules


def test_the_penalty_is_that_of_the_runs_answers(tmp_path):
    assert export.answer_penalty(tmp_path) == 1.1
    output = tmp_path / "output.jsonl"
    helpers.files.write_jsonl(output, [{"task_id": 0, "input": "山", "output": "川"}])
    helpers.records.write(output, helpers.records.make("04_rag_inference", {}, {"repetition_penalty": 1.02}, []))
    assert export.answer_penalty(tmp_path) == 1.02


OLD = os.environ.get("TRANSFORMERS_4", "")  # the python of an environment with transformers 4.57


@pytest.mark.skipif(not OLD, reason="TRANSFORMERS_4 names no python with transformers 4.57")
def test_transformers_4_reads_the_same_ids_and_logits():
    done = subprocess.run(
        [sys.executable, "benchmarks/readers.py", OLD], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def ollama_template(lines):
    return re.findall(r'TEMPLATE """(.*?)"""', lines, flags=re.S)[0]


def test_ollama_asks_in_the_words_of_the_training(tmp_path):
    folder = exported(tmp_path / "m", penalty=1.05)
    lines = gguf.modelfile(tmp_path / "x.gguf", folder, "2024")
    refusal, template = ollama_template(lines).split("{{ end }}")
    assert formats.ONE_QUESTION in refusal
    assert template.replace("{{ (index .Messages 0).Content }}", "山は？") == helpers.sft_text("山は？", "", "")
    assert lines.startswith("FROM ./x.gguf\n")
    expected = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1.05", 'PARAMETER stop "### 質問"')
    for line in (*expected, "PARAMETER num_ctx 4096"):
        assert line in lines.splitlines()


# What Ollama does with a template: it holds .Messages, so all of them are given at once.
RENDER = """package main
import ("encoding/json"; "fmt"; "os"; "text/template")
func main() {
    values := map[string]any{}
    if err := json.Unmarshal([]byte(os.Args[2]), &values); err != nil { panic(err) }
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(os.Args[1]))
    if err := parsed.Execute(os.Stdout, values); err != nil { fmt.Fprintln(os.Stderr, err); os.Exit(1) }
}"""


@pytest.mark.skipif(not shutil.which("go"), reason="there is no Go")
def test_go_renders_one_question_and_refuses_more(tmp_path):
    template = ollama_template(gguf.modelfile(tmp_path / "x.gguf", exported(tmp_path / "m"), "2024"))
    (tmp_path / "render.go").write_text(RENDER)
    question = {"Role": "user", "Content": '絵文字😀𠮷\n{{ .System }} と "引用" <b> {% x %}'}
    answer, system = {"Role": "assistant", "Content": "はい"}, {"Role": "system", "Content": "簡潔に"}
    for messages in ([question], [question, answer, question], [system, question]):
        command = ["go", "run", "render.go", template, json.dumps({"Messages": messages})]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if messages == [question]:
            assert (done.returncode, done.stdout) == (0, helpers.sft_text(question["Content"], "", ""))
        else:
            assert (done.returncode, done.stdout) == (1, "") and formats.ONE_QUESTION in done.stderr


CHATML = "{{ bos_token }}" + test_chat.CHATML.replace("<|im_end|>", "' + eos_token + '")
GEMMA = helpers.models.GEMMA_CHAT_TEMPLATE.replace("<end_of_turn>", "<eos>")
FOLDING = (  # as Gemma 3's: a system text stands before the first question
    "{{ bos_token }}{% set system = messages[0]['role'] == 'system' %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<start_of_turn>' + m['role'] + '\n' }}"
    "{{ messages[0]['content'] + ' / ' if system and loop.index == 2 else '' }}{{ m['content'] + '<eos>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "簡潔に"},
    {"role": "user", "content": '絵文字😀𠮷\n{{ .System }} と "引用" <b> {% x %}'},
    {"role": "assistant", "content": "はい"},
    {"role": "user", "content": "高さは？"},
]


def chat_tokenizer(template):
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.skipif(not shutil.which("go"), reason="there is no Go")
@pytest.mark.parametrize("template", [GEMMA, CHATML, FOLDING])
@pytest.mark.parametrize("turns", [TURNS[1:2], TURNS[1:], TURNS])
def test_go_renders_a_conversation_as_the_training_did(template, turns, tmp_path):
    tokenizer = chat_tokenizer(template)
    (tmp_path / "render.go").write_text(RENDER)
    messages = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
    command = ["go", "run", "render.go", gguf.go_template(tokenizer), json.dumps({"Messages": messages})]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    given = chat.without_system(turns) if template == GEMMA else turns
    assert "<bos>" + done.stdout == chat.render(tokenizer, given, answer_follows=True)


def test_ollama_gets_a_chat_template_where_turns_end_with_eos(tmp_path, capsys):
    """It would take Gemma's for Gemma's with <eos>; where it must guess, this is said."""
    folder = exported(tmp_path / "m", text_format="chat")
    assert "TEMPLATE" not in gguf.modelfile(tmp_path / "x.gguf", folder, "chat")
    for template, begins in ((GEMMA, "<start_of_turn>user\n"), (CHATML, "<|im_start|>user\n")):
        chat_tokenizer(template).save_pretrained(folder)
        written = ollama_template(gguf.modelfile(tmp_path / "x.gguf", folder, "chat"))
        assert begins + "{{ $system }}{{ .Content }}<eos>\n" in written and "<bos>" not in written
    of_its_own = "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ 'You are Qwen.' }}{% endif %}"
    chat_tokenizer(CHATML.replace("{{ bos_token }}", of_its_own)).save_pretrained(folder)
    assert "TEMPLATE" not in gguf.modelfile(tmp_path / "x.gguf", folder, "chat")
    assert "Ollama is left to guess the chat template" in capsys.readouterr().out


TEXTS = ["1 + 1 は？", "日本で一番高い山は\n\n富士山です。  空白", "絵文字😀👨\u200d👩\u200d👧と𠮷 {x}"]


@pytest.mark.parametrize(("tokenizer", "front"), [(gemma_tokenizer(), ""), (llama2_tokenizer(), " ")])
def test_a_vocabulary_for_llama_cpp_joins_as_the_tokenizer_does(tokenizer, front):
    proto = gguf.sentencepiece_model(json.loads(tokenizer.backend_tokenizer.to_str()))
    pieces = SentencePieceProcessor(model_proto=proto)
    for text in TEXTS:
        assert pieces.encode(front + text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert pieces.is_control(tokenizer.eos_token_id) and pieces.is_byte(tokenizer.convert_tokens_to_ids("<0x41>"))


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [(gemma_tokenizer, False), (llama2_tokenizer, False), (llama3_tokenizer, False), (llmjp_tokenizer, True)],
)
def test_whether_a_space_stands_behind_a_control_token(tokenizer, space):
    assert gguf.space_behind_control(tokenizer()) == space


def test_the_converter_gets_a_vocabulary_and_is_told_of_the_space(tmp_path):
    merged, folder = exported(tmp_path / "m", "mistral"), tmp_path / "laid out"
    folder.mkdir()
    gguf.lay_out(merged, folder, {"name": str(tmp_path), "commit": ""})
    assert SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size() > 1000
    assert read_json(folder, "tokenizer_config.json")["add_prefix_space"] is False
    assert read_json(merged, "tokenizer_config.json").get("add_prefix_space") is not False
    (tmp_path / "tokenizer.model").write_text("the base's own")
    other = tmp_path / "with it"
    other.mkdir()
    gguf.lay_out(merged, other, {"name": str(tmp_path), "commit": ""})
    assert (other / "tokenizer.model").read_text() == "the base's own"


def test_a_file_that_llama_cpp_reads_otherwise_is_refused(tmp_path, capsys):
    merged = exported(tmp_path / "m", "llama3")
    gguf.check_ids(tmp_path / "x.gguf", merged, str(tmp_path))
    assert "x.gguf: its token ids were not compared, which needs" in capsys.readouterr().out
    reader = tmp_path / gguf.READER
    reader.parent.mkdir(parents=True)
    reader.write_text(f"#!{sys.executable}\nprint([1, 2, 3])")
    reader.chmod(0o755)
    with pytest.raises(RecipeError, match=r"llama\.cpp reads \[1, 2, 3\] where the training had"):
        gguf.check_ids(tmp_path / "x.gguf", merged, str(tmp_path))


def test_without_llama_cpp_one_line_says_how_to_get_it():
    with pytest.raises(RecipeError, match=r"type q4_k_m needs llama\.cpp: git clone"):
        gguf.find_programs("", "q4_k_m")
    done = subprocess.run(
        [sys.executable, "export.py", "outputs/none", "--gguf", "--llama-cpp", "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("export.py: ")]
    assert gguf.HOW_TO_GET in line and "type q4_k_m needs nowhere" in line


def test_bf16_needs_the_converter_alone(tmp_path):
    (tmp_path / gguf.CONVERTER).touch()
    assert gguf.find_programs(str(tmp_path), "bf16") == [tmp_path / gguf.CONVERTER]
    with pytest.raises(RecipeError, match=re.escape(f"needs {tmp_path / gguf.QUANTIZER}: git clone")):
        gguf.find_programs(str(tmp_path), "q4_k_m")


def test_a_scale_that_llama_cpp_does_not_know_is_refused():
    gemma = {"hidden_size": 2304, "num_attention_heads": 8, "head_dim": 256}
    gguf.check_scale(gemma | {"query_pre_attn_scalar": 256})
    gguf.check_scale({"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144})
    gguf.check_scale({"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(RecipeError, match="not by query_pre_attn_scalar = 1"):
        gguf.check_scale(gemma | {"query_pre_attn_scalar": 1})


@pytest.mark.parametrize(
    ("family", "changes", "tokens"),
    [
        ("mistral", {}, 24),
        ("mistral", {"sliding_window": None}, 4096),
        ("mistral", {"sliding_window": 8192}, 4096),
        ("phi3", {}, 24),
        ("qwen2.5", {"sliding_window": 24, "use_sliding_window": False}, 4096),
        ("gemma2", {}, 4096),
        ("gemma3_text", {}, 4096),
    ],
)
def test_a_server_reads_no_further_than_a_window_that_llama_cpp_ignores(family, changes, tokens, tmp_path):
    merged = exported(tmp_path / "merged", family, **changes)
    assert gguf.context(merged) == tokens
    assert gguf.commands(tmp_path, tmp_path / "x.gguf")["llama.cpp"].endswith(f" -c {tokens}")
    assert f"PARAMETER num_ctx {tokens}\n" in gguf.modelfile(tmp_path / "x.gguf", merged, "2024")


def test_a_failed_conversion_is_told_and_leaves_no_file(tmp_path):
    converter = tmp_path / "llama.cpp" / gguf.CONVERTER
    converter.parent.mkdir()
    converter.write_text("import sys; sys.exit('the vocabulary is unknown')")
    folder = exported(tmp_path / "m", "llama3")
    with pytest.raises(RecipeError, match=r"convert_hf_to_gguf\.py failed: the vocabulary is unknown"):
        gguf.convert(folder, tmp_path / "x.gguf", "bf16", str(tmp_path / "llama.cpp"), {"name": "x", "commit": ""})
    assert not list(tmp_path.glob("*.gguf"))


LLAMA_CPP = os.environ.get("LLAMA_CPP", "")  # a folder of llama.cpp


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no folder of llama.cpp")
def test_a_gguf_file_holds_template_penalty_and_temperature(tmp_path):
    folder, target = exported(tmp_path / "m", "mistral"), tmp_path / "x.gguf"
    gguf.convert(folder, target, "bf16", LLAMA_CPP, {"name": "x", "commit": ""})
    sys.path.insert(0, f"{LLAMA_CPP}/gguf-py")
    reader = importlib.import_module("gguf").GGUFReader

    fields = reader(target).fields
    assert fields["tokenizer.chat_template"].contents() == AutoTokenizer.from_pretrained(folder).chat_template
    assert fields["general.sampling.penalty_repeat"].contents() == pytest.approx(1.1)
    assert fields["general.sampling.temp"].contents() == 0
