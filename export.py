"""Write the trained model of a run as one plain model: `python export.py outputs/a100` makes outputs/a100/merged.

With --gguf also as a file for llama.cpp and Ollama, outputs/a100/gguf; --llama-cpp names a folder of llama.cpp.

The base is dequantized and each pair of thin matrices is added to its weight, all in bf16: 54 GB for 27B, which vLLM
and llama.cpp can read. The sums are made in the host's memory, which has to hold that model. The result is compared
with base and adapter, and gets a card and a record, as every product of the notebooks.
"""

import argparse
import gc
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there with `python -I` or PYTHONSAFEPATH

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it offers another package for the CPU

import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import attention, formats, gguf, hub, machine, models, records, shapes
from helpers import RecipeError, encode, sft_text

PACKAGES = ["torch", "transformers", "peft"]
QUESTION, ANSWER = "日本で一番高い山はどこですか。", "日本で一番高い山は富士山です。標高は3,776メートルです。"


def merge(base: str, adapter: str | Path, target: str | Path, revision: str = "") -> None:
    """Write the model `base` with an adapter added to its weights, all in bf16, into the folder `target`.

    The model is dequantized and merged in the host's memory, 2 bytes per weight. What `target` held is deleted, and it
    counts as unfinished until its record is written. RecipeError for too little memory or disk.
    """
    config, target = models.text_config(base, revision), Path(target)
    held = sum(path.stat().st_size for path in target.glob("*"))
    free = {"memory": psutil.virtual_memory().available, "disk": held + shutil.disk_usage(target.parent).free}
    need = 2 * shapes.empty(config).num_parameters()
    for name, size in free.items():
        if size < 1.1 * need:
            raise RecipeError(f"{target} takes {need / 1e9:.1f} GB, and the {name} has {size / 1e9:.1f} GB: make room")
    shutil.rmtree(target, ignore_errors=True)
    records.begin(target)
    model = models.load_weights(base, config, device_map="cpu", dtype=torch.bfloat16, revision=revision or None)
    if hasattr(config, "quantization_config"):
        model = model.dequantize(torch.bfloat16)
    hub.find_model(str(adapter))
    model = PeftModel.from_pretrained(model, adapter, torch_device="cpu").merge_and_unload()  # sums in float32
    model.save_pretrained(target, max_shard_size="5GB", save_original_format=False)
    AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).save_pretrained(target)


def score(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits of one text (1, tokens, vocabulary), on the CPU."""
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device), use_cache=False).logits.cpu()


def distances(base: str, adapter: str, merged: Path, revision: str = "") -> dict[str, float]:
    """How far the logits of the merged model and of the base alone are from those of base + adapter on one text: mean
    differences, in standard deviations. RecipeError if the merged model differs by more than rounding.
    """
    dtype = machine.compute_dtype()
    model, tokenizer = models.load(base, "transformers", max_seq_length=512, dtype=dtype, revision=revision)
    ids = encode(tokenizer, sft_text(QUESTION, ANSWER, "")).ids
    scores = {"base alone": score(model, ids)}
    expected = score(models.load_adapter(model, adapter).eval(), ids)
    model = None  # makes room for the merged one
    gc.collect()
    torch.cuda.empty_cache()
    options = {"attn_implementation": "eager", "device_map": "auto" if torch.cuda.is_available() else "cpu"}
    options |= {"trust_remote_code": False, "use_safetensors": True}
    scores["merged"] = score(AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, dtype), **options), ids)
    if not attention.scores_agree(scores["merged"], expected):
        raise RecipeError(f"{merged} gives other logits than base + adapter: use the adapter instead")
    gaps = {name: (found.float() - expected.float()).abs().mean() for name, found in scores.items()}
    return {name: (gap / expected.float().std()).item() for name, gap in gaps.items()}


def answer_penalty(run_dir: str | Path) -> float:
    """The repetition penalty with which notebook 4 answered in this run; 1.1, its default, if it has not."""
    return records.read(Path(run_dir, "output.jsonl")).get("settings", {}).get("repetition_penalty", 1.1)


def export(run_dir: str | Path, base_name: str = "") -> dict[str, Any]:
    """Merge the adapter of a run with its base, which may have moved to `base_name`, into the run's folder merged/.

    Returns the record.
    """
    adapter_dir, merged_dir = f"{run_dir}/adapter", Path(run_dir, "merged")
    adapter = records.model_source(adapter_dir, finished=True)
    trained_on = adapter["inputs"]["model"]
    base = records.model_source(base_name or trained_on["name"], "" if base_name else trained_on["commit"])
    records.check_adapter(adapter, base)
    text_format = records.read(adapter_dir)["settings"].get("text_format", "2024")
    merge(base["name"], adapter_dir, merged_dir, base["commit"])
    tokenizer = models.load_tokenizer(adapter_dir)
    formats.make_readable(merged_dir, tokenizer, text_format, answer_penalty(run_dir))
    found = distances(base["name"], adapter_dir, merged_dir, base["commit"])
    for name, gap in found.items():
        print(f"{name}: {gap:.3f} standard deviations from base + adapter")
    record = records.make(
        "export", {"model": base, "adapter": adapter}, {"dtype": "bfloat16", "text_format": text_format}, PACKAGES
    )
    facts = {"logits": f"differ from base + adapter by {found['merged']:.3f} standard deviations (mean)"}
    published = records.origins(record["inputs"])["model"]["name"]
    card = records.model_card(f"{published}, fine-tuned", record, ["merged"], facts)
    records.write_with_card(merged_dir, record, card)
    print(f"{merged_dir}: {', '.join(sorted(path.name for path in merged_dir.iterdir()))}")
    return record


def export_gguf(run_dir: str | Path, merged: dict[str, Any], kind: str, llama_cpp: str) -> Path:
    """Write merged/, of which this is the record, as a GGUF file and Ollama's Modelfile into the run's folder gguf/."""
    merged_dir, folder = Path(run_dir, "merged"), Path(run_dir, "gguf")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    records.begin(folder)
    target = folder / f"{Path(run_dir).resolve().name}-{kind}.gguf"
    gguf.convert(merged_dir, target, kind, llama_cpp, records.origins(merged["inputs"])["model"])
    modelfile = gguf.modelfile(target, merged_dir, merged["settings"]["text_format"])
    Path(folder, "Modelfile").write_text(modelfile, encoding="utf-8")
    source = records.model_source(str(merged_dir), finished=True)
    record = records.make("export", {"model": source}, {"type": kind}, PACKAGES)
    published = records.origins(record["inputs"])["model"]["name"]
    card = records.model_card(f"{published}, fine-tuned", record, ["gguf"], {})
    records.write_with_card(folder, record, card)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a finished training")
    parser.add_argument("--base", default="", help="where the base model lies now, if it has moved")
    parser.add_argument("--gguf", action="store_true", help="also write a file for llama.cpp and Ollama")
    parser.add_argument("--type", default="q4_k_m", choices=gguf.TYPES, help="of its numbers")
    parser.add_argument("--llama-cpp", default="", metavar="FOLDER", help="where llama.cpp lies, built in its build/")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    try:
        if args.gguf:
            gguf.find_programs(args.llama_cpp, args.type)  # before an hour's work
        merged = export(args.run_dir, args.base)
        file = export_gguf(args.run_dir, merged, args.type, args.llama_cpp) if args.gguf else None
        for program, command in gguf.commands(args.run_dir, file).items():
            print(f"{program}: {command}")
    except (RecipeError, OSError) as problem:
        sys.exit(f"export.py: {problem}")
