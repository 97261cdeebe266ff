"""Other base models in small: `python tests/families.py [--engine unsloth] [FAMILY...]` prints a table of what works.

Each family is a random checkpoint of two to four thin layers in its real architecture, with the kind of tokenizer that
its models have, and a generation config with settings that must not leak into answers. Notebooks 01, 03 and 04 run on
it, cell by cell in this process.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}

import helpers  # noqa: E402  (behind what it must find set)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 3, "max_position_embeddings": 2048}
GENERATION = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.6}


def sample_texts() -> list[str]:
    """Questions, answers and prompts of the sample, for the tokenizers to learn from."""
    qa = helpers.files.load_rows(ROOT / "data/sample/qa.jsonl")
    return [text for row in qa for text in (row["input"], row["output"], helpers.sft_text(row["input"], "", ""))]


def train_bpe(special: list[str], byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small BPE: over bytes as in Llama 3 and Qwen, or over characters, with spaces as ▁."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe, texts = Tokenizer(models.BPE()), sample_texts()
    options = {"vocab_size": 900, "special_tokens": special, "show_progress": False}
    if byte_level:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        texts = ["▁" + text.replace(" ", "▁") for text in texts]
        bpe.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        options |= {"max_token_length": 4, "vocab_size": 1400}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**options))
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gemma_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/tiny/gemma2")


def llama3_tokenizer():
    """Bytes, <bos> from a template, no pad token but reserved ones, no class of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    special = [begin, end, "<|reserved_special_token_0|>", "<|eot_id|>"]
    vocab, merges = train_bpe(special, byte_level=True)
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocab[begin])])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=begin, eos_token=end, extra_special_tokens=special[2:]
    )


def llmjp_tokenizer():
    """Unigram with ▁ in front, <s> before a text and </s> behind it, a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<PAD|LLM-jp>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [line for text in sample_texts() for line in text.split("\n")]
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=special + BYTES, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ends = [(token, unigram.token_to_id(token)) for token in ("<s>", "</s>")]
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD|LLM-jp>"}
    return PreTrainedTokenizerFast(tokenizer_object=unigram, **names)


def llama2_tokenizer():
    """As Mistral has it: ▁ in front, <s>, no pad token and nothing that is reserved."""
    from transformers import LlamaTokenizer

    vocab, merges = train_bpe(["<unk>", "<s>", "</s>", *BYTES], byte_level=False)
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def qwen_tokenizer():
    """Bytes, no <bos>, and a pad token that is the end token."""
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
    vocab, merges = train_bpe(special, byte_level=True)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[1:])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return tokenizer


def phi_tokenizer():
    """As Phi-3 has it: ▁ in front, a <s> that is not put there, and a pad token that is the end token."""
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *BYTES, "<|endoftext|>", "<|placeholder1|>"]
    vocab, merges = train_bpe(special, byte_level=False)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|placeholder1|>"]}
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=False, **names)


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "sliding_window": 24}
GEMMA4 |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 2560}
# Family: class of its config, values, tokenizer. A multimodal one's values are those of its text part.
FAMILIES = {
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 4}, gemma_tokenizer),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 24, "layer_types": MIXED}, gemma_tokenizer),
    "llama3": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, llama3_tokenizer),
    "llm-jp": ("LlamaConfig", {}, llmjp_tokenizer),
    "mistral": ("MistralConfig", {"sliding_window": 24}, llama2_tokenizer),
    "qwen2.5": ("Qwen2Config", {}, qwen_tokenizer),
    "qwen2.5 with window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        qwen_tokenizer,
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, qwen_tokenizer),
    "phi3": ("Phi3Config", {"sliding_window": 24}, phi_tokenizer),
    "olmo3": ("Olmo3Config", {"sliding_window": 24, "layer_types": MIXED}, llama3_tokenizer),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}, llama3_tokenizer),
    "qwen3 moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 32}, qwen_tokenizer),
    "gpt-oss": ("GptOssConfig", EXPERTS | {"head_dim": 32, "sliding_window": 24}, llama3_tokenizer),
    "gemma3": ("Gemma3Config", {"head_dim": 32, "sliding_window": 24, "layer_types": MIXED}, gemma_tokenizer),
    "gemma4": ("Gemma4Config", GEMMA4 | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}, gemma_tokenizer),
    "gemma4 e4b": ("Gemma4Config", GEMMA4 | SHARED, gemma_tokenizer),
    "qwen3.5": ("Qwen3_5Config", {"head_dim": 32, "layer_types": LINEAR, **DELTA}, qwen_tokenizer),
    "mistral3": ("Mistral3Config", {"head_dim": 16, "model_type": "mistral"}, llama2_tokenizer),
    "ministral3": ("Mistral3Config", {"head_dim": 16, "model_type": "ministral3"}, llama2_tokenizer),
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
WRAPPERS = {
    "Gemma3Config": {"image_size": 28, "vision_use_head": False},
    "Gemma4Config": {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
    "Qwen3_5Config": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
    "Mistral3Config": {"image_size": 28},
}


def make_checkpoint(family: str, folder: Path, **changes) -> Path:
    """Write a random checkpoint of a family and its tokenizer; `changes` are values of the config."""
    import torch
    import transformers

    name, values, make_tokenizer = FAMILIES.get(family) or (family, {}, llama3_tokenizer)
    tokenizer, kind = make_tokenizer(), getattr(transformers, name)
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    values = SIZES | {"vocab_size": len(tokenizer)} | special | values | changes
    if name in WRAPPERS:
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
        sizes = {"mm_tokens_per_image": 4} if family == "gemma3" else {}
        config = kind(text_config=values, vision_config=VISION | WRAPPERS[name], **sizes)
        model_class = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
    else:
        config = kind(**values)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # large enough to tell right attention from wrong, below the caps of Gemma 2's scores
            parameter.data.normal_(0, 0.08 if "embed" in name else 0.25)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[tokenizer.eos_token_id] = 0  # an answer that ends at once would be empty
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, **GENERATION)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return folder


def run_notebook(name: str, **parameters) -> dict:
    """Execute a notebook's cells in this process with the smoke run's values and `parameters`; returns its names.

    Returned with what it printed, as "printed".
    """
    import yaml

    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    smoke = yaml.safe_load((ROOT / "data/runs/smoke.yaml").read_text(encoding="utf-8"))
    names, printed = {"helpers": helpers, "Path": Path, "os": os, "sys": sys}, io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        for cell in cells:
            if cell["cell_type"] == "code" and cell["id"] != "setup":
                exec(compile("".join(cell["source"]), f"{name}, cell {cell['id']}", "exec"), names)
            if cell["id"] == "parameters":
                names |= smoke[name] | parameters
    return names | {"printed": printed.getvalue()}


def run_series(checkpoint: Path, folder: Path, engine: str) -> dict[str, dict]:
    """Notebooks 01, 03 and 04 on a checkpoint, two steps of training; returns the names of each."""
    rows = helpers.files.load_rows(ROOT / "data/sample/qa.jsonl")[:8]
    pairs = [{"instruction": row["input"], "response": row["output"][:80]} for row in rows]
    tasks = helpers.files.load_rows(ROOT / "data/sample/tasks.jsonl")[:4]
    folder.mkdir(parents=True, exist_ok=True)
    train_data, tasks_file = folder / "train.jsonl", folder / "tasks.jsonl"
    helpers.files.write_jsonl(train_data, pairs)
    helpers.files.write_jsonl(tasks_file, tasks)
    common = {"output_dir": str(folder / "run"), "engine": engine}
    data = {"train_data": str(train_data), "qa_data": str(ROOT / "data/sample/qa.jsonl")}
    few = {
        "max_steps": 2,
        "warmup_steps": 1,
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
        "wandb_project": "",
        "max_seq_length": 384,
    }
    answers = {"tasks": str(tasks_file), "k": 1, "max_new_tokens": 12, "max_seq_length": 1024}
    return {
        "01": run_notebook("01_quantize", output_dir=common["output_dir"], base_model=str(checkpoint)),
        "03": run_notebook("03_sft", **common, **data, **few),
        "04": run_notebook("04_rag_inference", **common, **data, **answers),
    }


def greedy(model, prompt: list[int], limit: int, process, stop, penalize_prompt: bool) -> list[int]:
    """The plainest loop: the whole text through the model for every token, no cache, no padding, no batch.

    A ban on several tokens does not look at a history that is shorter, so a token that is never banned leads it.
    """
    import torch

    ids = torch.tensor([prompt], device=model.device)
    for _ in range(limit):
        with torch.no_grad():
            scores = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        seen = ids[:, 0 if penalize_prompt else len(prompt) :]
        seen = torch.cat([torch.full((1, 9), scores.shape[1]), seen], dim=1)
        more = torch.cat([scores, torch.full((1, 1), -torch.inf)], dim=1)
        ids = torch.cat([ids, process(seen, more).argmax(-1)[:, None]], dim=1)
        if stop(ids[:, len(prompt) :], None)[0]:
            break
    return ids[0, len(prompt) :].tolist()


def rules(tokenizer, ends: list[int]):
    """The rules of notebook 04 as new objects, and its stopping criteria."""
    return helpers.decoding.token_rules(tokenizer, ends, 1.1, helpers.BANNED_WORDS, "\n### 質問")


TASKS = [task["input"] for task in helpers.files.load_tasks("data/sample/tasks.jsonl")]
# From one token to far beyond a window of 24.
PROMPTS = [
    "山",
    "山は？",
    "日本で一番高い山はどこですか。",
    *(helpers.build_prompt(task, [], "2024") for task in TASKS[:6]),
]


def answers_of(checkpoint: Path, engine: str, adapter: str = "", sizes=(3,)) -> dict[str, tuple[int, int]]:
    """Answers in float32 in slots (engine transformers, where the architecture allows it) and in batches: how many are
    those of the plain loop, and how many there are, with `sizes` prompts at a time and `penalize_prompt` on and off.
    """
    config = helpers.models.text_config(str(checkpoint))
    model, tokenizer = helpers.models.load(str(checkpoint), engine, max_seq_length=2048, dtype="float32")
    if adapter:
        model = helpers.models.load_adapter(model, adapter)
    model.eval()
    prompts, ends = [helpers.encode(tokenizer, prompt).ids for prompt in PROMPTS], model.generation_config.eos_token_id
    prompts[0], process = prompts[0][-1:], rules(tokenizer, ends)
    ways = {"batches": helpers.decoding.in_batches}
    if engine == "transformers" and helpers.architectures.examine(config).slots:
        assert not helpers.slots.problem(model, prompts[-1])
        ways["slots"] = helpers.slots.answer
    found = {way: (0, 0) for way in ways}
    for whole in (True, False):  # penalize_prompt
        loop = [greedy(model, prompt, 12, *rules(tokenizer, ends), whole) for prompt in prompts]
        for way, answer in ways.items():
            for parallel in sizes:
                decoding = helpers.decoding.Decoding(parallel, *process, penalize_prompt=whole)
                answers = dict(answer(model, prompts, lambda _: 12, decoding))
                equal, number = found[way]
                equal += sum(answers[i] == expected for i, expected in enumerate(loop))
                found[way] = equal, number + len(loop)
    return found


def row_difference(checkpoint: Path) -> float | None:
    """The largest difference of a logit, in float32, between a row of three texts and the texts alone; None: padded."""
    import torch

    model, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=2048, dtype="float32")
    texts = [helpers.encode(tokenizer, prompt).ids for prompt in PROMPTS[-3:]]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in texts])
        if not helpers.rows.switch_on(model, texts):
            return None
        row = torch.tensor([[token for ids in texts for token in ids]])
        positions = torch.cat([torch.arange(len(ids)) for ids in texts])[None]
        together = model(row, position_ids=positions, use_cache=False).logits[0]
    return (together - alone).abs().max().item()


def untrained(folder: Path, model) -> int:
    """How many linear layers of a model's blocks have no LoRA matrices in an adapter, or such as are still zero."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    trained = {name.split(".lora_B")[0].removeprefix("base_model.model.") for name, w in weights.items() if w.any()}
    return len(helpers.shapes.linear_layers(helpers.shapes.empty(model)).keys() - trained)


def table_row(family: str, engine: str, folder: Path, sizes=(3,)) -> dict[str, str]:
    """What the series did with a family."""
    checkpoint = make_checkpoint(family, folder / "base")
    row = {"family": family, "engine": engine}
    try:
        names = run_series(checkpoint, folder, engine)
    except Exception as error:
        return row | {"01, 03, 04": helpers.first_line(error)}
    row["01, 03, 04"] = "yes"
    ids = names["03"]["train_dataset"]["input_ids"]
    bos = {text.count(names["03"]["tokenizer"].bos_token_id) for text in ids}
    row["<bos> per text"] = ", ".join(map(str, sorted(bos)))
    row["untrained matrices"] = untrained(folder / "run/adapter", names["03"]["config"])
    if engine == "transformers":
        difference = row_difference(checkpoint)
        row["row against texts alone"] = "padded" if difference is None else f"{difference:.1e}"
    base = folder / "run/quantized" if FAMILIES[family][0] in WRAPPERS and engine == "unsloth" else checkpoint
    for way, (equal, number) in answers_of(base, engine, str(folder / "run/adapter"), sizes).items():
        row[f"{way} equal to the loop"] = f"{equal} of {number}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 8], help="prompts at a time")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    helpers.machine.start_engine(options.engine)
    rows = []
    for family in options.families:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            rows.append(table_row(family, options.engine, Path(folder), options.sizes))
            print(rows[-1], flush=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |")


if __name__ == "__main__":
    main()
