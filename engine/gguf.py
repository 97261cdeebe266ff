"""GGUF: a merged model as one file for llama.cpp and Ollama, written by llama.cpp's own programs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import hub
from helpers import SFT_PROMPT, RecipeError

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "build/bin/llama-quantize"
HOW_TO_GET = (
    "git clone https://github.com/ggml-org/llama.cpp && cmake -S llama.cpp -B llama.cpp/build && cmake --build "
    "llama.cpp/build --target llama-quantize llama-server, then --llama-cpp llama.cpp"
)
TYPES = ("q4_k_m", "bf16")


def find_programs(llama_cpp: str, kind: str) -> list[Path]:
    """The programs in a folder of llama.cpp that write a type of TYPES; RecipeError says how to get them."""
    programs = [Path(llama_cpp, name) for name in (CONVERTER, QUANTIZER)[: 1 if kind == "bf16" else 2]]
    missing = [str(path) for path in programs if not path.is_file()] if llama_cpp else ["llama.cpp"]
    if missing:
        raise RecipeError(f"a GGUF file of type {kind} needs {' and '.join(missing)}: {HOW_TO_GET}")
    return programs


def run(*command: str | Path) -> None:
    """Run a program; RecipeError with the end of what it wrote if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise RecipeError(f"{' '.join(Path(part).name for part in command[:2])} failed: {' / '.join(lines[-3:])}")


def check_scale(config: Mapping[str, Any]) -> None:
    """RecipeError for a Gemma whose attention is scaled otherwise than by its head width: a GGUF file cannot say so."""
    scale, width = config.get("query_pre_attn_scalar"), config.get("head_dim")
    if scale not in (None, width, config["hidden_size"] // config["num_attention_heads"]):
        raise RecipeError(f"llama.cpp would scale the attention by {width}, not by query_pre_attn_scalar = {scale}")


def vocabulary(base: Mapping[str, Any]) -> Path | None:
    """The file tokenizer.model of a base (a source, see engine/records.py), if it has one.

    llama.cpp reads Gemma 2's vocabulary from it, and transformers no longer saves it.
    """
    name, file = base["name"], "tokenizer.model"
    path = hub.fetch(name, file, base["commit"]) if base["commit"] else Path(name, file)
    return path if path and path.is_file() else None


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
        for path in [*merged.iterdir(), *filter(None, [vocabulary(base)])]:
            Path(model, path.name).symlink_to(path.resolve())
        run(sys.executable, converter, model, "--outtype", "bf16", "--outfile", whole, "--metadata", extra)
        for program in quantizer:
            run(program, whole, Path(temporary, "quantized.gguf"), kind.upper())
            whole = Path(temporary, "quantized.gguf")
        whole.rename(target)


def modelfile(gguf: Path, merged: Path, text_format: str) -> str:
    """Ollama's Modelfile. Its template is Go's, so in the format "2024" it is written here; a chat template is left to
    Ollama, which knows those of the common models.
    """
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    lines = [f"FROM ./{gguf.name}"]
    if text_format == "2024":
        opening, ending, _ = SFT_PROMPT.split("{}")
        lines += [f'TEMPLATE """{opening}{{{{ .Prompt }}}}{ending}"""', 'PARAMETER stop "### 質問"']
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
        found["llama.cpp"] = f"llama-server -m {file} -c 4096"
        found["Ollama"] = f"ollama create {name} -f {file.parent}/Modelfile"
    return found
