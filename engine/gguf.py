"""GGUF: a merged model as one file for llama.cpp and Ollama, written by llama.cpp's own programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepieces
from transformers import PreTrainedTokenizerBase

from engine import chat, files, hub, models
from engine.formats import ONE_QUESTION
from helpers import SFT_PROMPT, RecipeError, encode

CONVERTER, QUANTIZER, READER = "convert_hf_to_gguf.py", "build/bin/llama-quantize", "build/bin/llama-tokenize"
HOW_TO_GET = (
    "git clone https://github.com/ggml-org/llama.cpp && cmake -S llama.cpp -B llama.cpp/build && cmake --build "
    "llama.cpp/build --target llama-quantize llama-tokenize llama-server, then --llama-cpp llama.cpp"
)
TYPES = ("q4_k_m", "bf16")
WINDOWS = ("cohere2", "exaone", "gemma", "gpt_oss", "llama4", "olmo3")  # types whose sliding windows llama.cpp knows


def find_programs(llama_cpp: str, kind: str) -> list[Path]:
    """The programs in a folder of llama.cpp that write a type of TYPES; RecipeError says how to get them."""
    programs = [Path(llama_cpp, name) for name in (CONVERTER, QUANTIZER)[: 1 if kind == "bf16" else 2]]
    missing = [str(path) for path in programs if not path.is_file()] if llama_cpp else ["llama.cpp"]
    if missing:
        raise RecipeError(f"a GGUF file of type {kind} needs {' and '.join(missing)}: {HOW_TO_GET}")
    return programs


def run(*command: str | Path) -> str:
    """What a program prints; RecipeError with the end of what it wrote if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise RecipeError(f"{' '.join(Path(part).name for part in command[:2])} failed: {' / '.join(lines[-3:])}")
    return done.stdout


def check_scale(config: Mapping[str, Any]) -> None:
    """RecipeError for a Gemma whose attention is scaled otherwise than by its head width: a GGUF file cannot say so."""
    scale, width = config.get("query_pre_attn_scalar"), config.get("head_dim")
    if scale not in (None, width, config["hidden_size"] // config["num_attention_heads"]):
        raise RecipeError(f"llama.cpp would scale the attention by {width}, not by query_pre_attn_scalar = {scale}")


def context(merged: Path) -> int:
    """How many tokens a server should read: 4096, or as many as the model's sliding window has if llama.cpp would let
    it look back beyond that, as it does for Mistral and Phi-3.
    """
    config = json.loads(Path(merged, "config.json").read_text(encoding="utf-8"))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return min(4096, window) if window and not config["model_type"].startswith(WINDOWS) else 4096


def vocabulary(base: Mapping[str, Any]) -> Path | None:
    """The file tokenizer.model of a base (a source, see engine/records.py), if it has one.

    llama.cpp reads the vocabularies of SentencePiece from it, and transformers no longer saves it.
    """
    name, file = base["name"], "tokenizer.model"
    path = hub.fetch(name, file, base["commit"]) if base["commit"] else Path(name, file)
    return path if path and path.is_file() else None


def sentencepiece_model(tokenizer: Mapping[str, Any]) -> bytes:
    """The file tokenizer.model that says the same as a tokenizer.json, for a BPE that falls back to bytes.

    Without one, llama.cpp's converter gives all pieces of Llama 2 or Mistral the same score, and joins others than
    the training did. The earlier a piece is joined, the higher is its score.
    """
    vocab = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    vocab = {number: token["content"] for number, token in added.items()} | vocab
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(tokenizer["model"]["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    found, kinds = sentencepieces.ModelProto(), sentencepieces.ModelProto.SentencePiece
    for number, piece in sorted(vocab.items()):
        kind = kinds.NORMAL
        if piece == (tokenizer["model"]["unk_token"] or "<unk>"):
            kind = kinds.UNKNOWN
        elif number in added:
            kind = kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED
        elif len(piece) == 6 and piece.startswith("<0x"):
            kind = kinds.BYTE
        found.pieces.add(piece=piece, score=-ranks.get(piece, len(ranks)), type=kind)
    found.trainer_spec.model_type, found.trainer_spec.byte_fallback = 2, True  # 2 is BPE
    found.normalizer_spec.name, found.normalizer_spec.add_dummy_prefix = "identity", False
    found.normalizer_spec.remove_extra_whitespaces = False
    return found.SerializeToString()


def space_behind_control(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts ▁ before a text that stands behind a control token."""
    ids = tokenizer(f"{tokenizer.eos_token}山", add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids)[1].startswith("▁")


def lay_out(merged: Path, folder: Path, base: Mapping[str, Any]) -> None:
    """Fill `folder` with links to the merged model and with what llama.cpp's converter needs beyond it.

    llama.cpp puts a space behind a control token unless it is told that the tokenizer does not.
    """
    for path in [*merged.iterdir(), *filter(None, [vocabulary(base)])]:
        Path(folder, path.name).symlink_to(path.resolve())
    tokenizer = json.loads(Path(merged, "tokenizer.json").read_text(encoding="utf-8"))
    model = Path(folder, "tokenizer.model")
    if not model.exists() and tokenizer["model"]["type"] == "BPE" and tokenizer["model"].get("byte_fallback"):
        model.write_bytes(sentencepiece_model(tokenizer))
    config = Path(folder, "tokenizer_config.json")
    values = json.loads(config.read_text(encoding="utf-8"))
    config.unlink()  # a link
    files.write_json(config, values | {"add_prefix_space": space_behind_control(models.load_tokenizer(str(merged)))})


def check_ids(file: Path, merged: Path, llama_cpp: str) -> None:
    """RecipeError if llama.cpp reads a rendered conversation of a GGUF file as other token ids than transformers."""
    reader = Path(llama_cpp, READER)
    if not reader.is_file():
        return print(f"{file}: its token ids were not compared, which needs {reader}: {HOW_TO_GET}")
    tokenizer = models.load_tokenizer(str(merged))
    turns = [
        {"role": "user", "content": " 1 + 1 は？\n{答え} を😀書いて。"},
        {"role": "assistant", "content": "２です。"},
    ]
    for text in (tokenizer.apply_chat_template(turns[:number], tokenize=False) for number in (1, 2)):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        begins = encode(tokenizer, "").ids  # llama.cpp puts <bos> there itself
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder, "text")
            written.write_bytes(text.removeprefix(tokenizer.bos_token if begins else "").encode())
            found = json.loads(run(reader, "-m", file, "-f", written, "--ids"))
        if found != expected:
            raise RecipeError(
                f"llama.cpp reads {found[:40]} where the training had {expected[:40]}: its converter does "
                "not know this tokenizer"
            )


def convert(merged: Path, target: Path, kind: str, llama_cpp: str, base: Mapping[str, Any]) -> None:
    """Write the merged model as the GGUF file `target` of a type of TYPES, with the defaults of its generation config.

    `base` is the published model (see `vocabulary`). llama.cpp would sample at temperature 0.8 if the file did not say
    otherwise.
    """
    converter, *quantizer = find_programs(llama_cpp, kind)
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    check_scale(json.loads((merged / "config.json").read_text(encoding="utf-8")))
    metadata = {} if settings.get("do_sample") else {"general.sampling.temp": 0.0}
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        whole, extra = Path(temporary, "bf16.gguf"), Path(temporary, "metadata.json")
        extra.write_text(json.dumps(metadata), encoding="utf-8")
        model = Path(temporary, "model")
        model.mkdir()
        lay_out(merged, model, base)
        run(sys.executable, converter, model, "--outtype", "bf16", "--outfile", whole, "--metadata", extra)
        for program in quantizer:
            run(program, whole, Path(temporary, "quantized.gguf"), kind.upper())
            whole = Path(temporary, "quantized.gguf")
        check_ids(whole, merged, llama_cpp)
        whole.rename(target)


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template in Go's language, for Ollama, which puts <bos> there itself; RecipeError if it writes a turn
    otherwise depending on those around it.

    A system text is one of the turns, or stands before the next question: there, or where the template refuses it.
    """
    system = chat.prepare(tokenizer)
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": f"印{number}印"} for number, role in enumerate(roles)]
    begin, asked, between, again, answered = around_turns(tokenizer, turns)
    regular = between == answered + begin and again == asked
    regular &= chat.render(tokenizer, turns[:3], True).endswith(turns[2]["content"] + asked)
    glue, role = "\n\n", ""  # between a system text and the question behind it
    if system:
        opening, closing, *rest = around_turns(tokenizer, [{"role": "system", "content": "印"}, *turns])
        regular &= rest == [asked, between, again, answered]
        if closing.endswith(begin):
            role = f'{{{{ if eq .Role "system" }}}}{opening}{{{{ .Content }}}}{closing.removesuffix(begin)}'
        else:  # the template puts it before the question itself
            regular &= opening == begin
            glue = closing
    joined = json.dumps(f"%s{glue}", ensure_ascii=False)
    role = role or f'{{{{ if eq .Role "system" }}}}{{{{ $system = printf {joined} .Content }}}}'
    if not regular:
        raise RecipeError("its chat template writes turns otherwise depending on those around them")
    role += f'{{{{ else if eq .Role "user" }}}}{begin}{{{{ $system }}}}{{{{ .Content }}}}{asked}{{{{ $system = "" }}}}'
    role += f"{{{{ else }}}}{{{{ .Content }}}}{answered}{{{{ end }}}}"
    return f'{{{{ $system := "" }}}}{{{{ range .Messages }}}}{role}{{{{ end }}}}'


def around_turns(tokenizer: PreTrainedTokenizerBase, turns: chat.Turns) -> list[str]:
    """What a chat template writes before, between and behind turns whose contents stand nowhere else, without <bos>."""
    text, parts = chat.render(tokenizer, turns).removeprefix(tokenizer.bos_token or ""), []
    for turn in turns:
        before, _, text = text.partition(turn["content"])
        parts.append(before)
    return [*parts, text]


def modelfile(gguf: Path, merged: Path, text_format: str) -> str:
    """Ollama's Modelfile. Its template is Go's, so in the format "2024" it is written here, and where turns end with
    <eos> (see `chat.settle_end`). Other chat templates are left to Ollama, which knows those of the common models.

    A Go template cannot raise an error with a text of its own, so it calls one that does not exist: its name is shown.
    """
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    lines = [f"FROM ./{gguf.name}"]
    if text_format == "2024":
        opening, ending, _ = SFT_PROMPT.split("{}")
        refusal = f'{{{{ if ne (len .Messages) 1 }}}}{{{{ template "{ONE_QUESTION}" . }}}}{{{{ end }}}}'
        question = "{{ (index .Messages 0).Content }}"
        lines += [f'TEMPLATE """{refusal}{opening}{question}{ending}"""', 'PARAMETER stop "### 質問"']
    else:
        tokenizer = models.load_tokenizer(str(merged))
        if chat.end_of_turn(tokenizer) == tokenizer.eos_token_id:
            try:
                lines.append(f'TEMPLATE """{go_template(tokenizer)}"""')
            except RecipeError as error:
                print(f"Ollama is left to guess the chat template ({error}): compare `ollama show --template`")
    lines.append(f"PARAMETER num_ctx {context(merged)}")
    lines.append(f"PARAMETER temperature {settings.get('temperature', 1) if settings.get('do_sample') else 0}")
    lines += [f"PARAMETER {name} {settings[name]}" for name in ("top_k", "top_p", "min_p") if name in settings]
    return "\n".join([*lines, f"PARAMETER repeat_penalty {settings['repetition_penalty']}", ""])


def commands(run_dir: str | Path, file: Path | None) -> dict[str, str]:
    """The command lines that serve an exported model, by program; `file` is its GGUF file."""
    merged, name = Path(run_dir, "merged"), Path(run_dir).resolve().name
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    greedy = "" if settings.get("do_sample") else """ --override-generation-config '{"temperature": 0}'"""
    found = {"vLLM": f"vllm serve {merged} --served-model-name {name} --max-model-len 4096{greedy}"}
    if file:
        found["llama.cpp"] = f"llama-server -m {file} -c {context(merged)}"
        found["Ollama"] = f"ollama create {name} -f {file.parent}/Modelfile"
    return found
