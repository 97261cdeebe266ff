"""Helpers of the four notebooks, in the order in which the notebooks use them.

1. Files and records     every notebook
2. Quantize              01_quantize
3. Filter                02_filter_magpie
4. Fine-tune             03_sft
5. Retrieve and answer   04_rag_inference
6. Load models           what two notebooks share and what has side effects

Everything above section 6 is a pure function of plain values, or reads and writes the files it names.
Only the standard library and numpy are imported here; heavy packages are imported by the function that needs them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# --------------------------------------------------------------------------------------------------------------------
# 1. Files and records
# --------------------------------------------------------------------------------------------------------------------


class RecipeError(ValueError):
    """An error that the reader can mend: one line that says what is wrong, where, and what to do."""


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file (`.jsonl` or `.jsonl.gz`, UTF-8); blank lines are skipped.

    Raises RecipeError naming file and line for a line that is not a JSON object or lacks a `required` key,
    and for a file that is missing or holds no object at all.
    """
    path = Path(path)
    required = tuple(required)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; check the path (relative paths start at the repository root)")
    opener = gzip.open if path.suffix == ".gz" else open
    empty = True
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{path}, line {number}: not valid JSON ({error}); mend or delete the line") from None
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            for key in required:
                if key not in row:
                    raise RecipeError(f"{path}, line {number}: key {key!r} is missing; it has {sorted(row)}")
            empty = False
            yield row
    if empty:
        raise RecipeError(f"{path}: the file holds no rows; was the step that writes it interrupted?")


def load_rows(name: str, required: Iterable[str] = (), revision: str = "") -> list[dict[str, Any]]:
    """Rows of a data set: a `.jsonl` or `.jsonl.gz` file, or a hub repository (its split "train", or its first).

    Raises RecipeError for a missing key, an empty set, and a hub repository that cannot be reached.
    """
    if name.endswith((".jsonl", ".jsonl.gz")):
        return list(read_jsonl(name, required))
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise RecipeError(f"{name}: neither a .jsonl file nor a hub repository (owner/name)")
    from datasets import load_dataset

    try:
        splits = load_dataset(name, revision=revision or None)
        rows = splits.get("train", next(iter(splits.values()))).to_list()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RecipeError(
            f"{name}: the hub data set cannot be read ({reason[:120]}); check the name, the network and, for a private "
            "one, the secret HF_TOKEN; or name a local .jsonl file"
        ) from None
    for number, row in enumerate(rows, start=1):
        for key in required:
            if key not in row:
                raise RecipeError(f"{name}, row {number}: key {key!r} is missing; it has {sorted(row)}")
    return rows


@contextmanager
def atomic_write(path: str | Path) -> Iterator[TextIO]:
    """Open `path` for writing UTF-8 text so that the file appears only when complete (written beside, then renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line as `json.dump(row, ensure_ascii=False)` does; returns the number of rows."""
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write a report: indented JSON, UTF-8, Japanese readable."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_secret(name: str) -> str:
    """A secret by name: from the environment, else from Colab's secrets (the key symbol at the left), else ""."""
    if os.environ.get(name):
        return os.environ[name]
    try:
        from google.colab import userdata
    except ImportError:
        return ""
    try:
        return userdata.get(name)
    except (userdata.SecretNotFoundError, userdata.NotebookAccessError, userdata.TimeoutException):
        return ""


def hub_token(hub_repo: str) -> str:
    """The hub token for a push to `hub_repo` ("" when there is no push); RecipeError says where to put it."""
    token = get_secret("HF_TOKEN") if hub_repo else ""
    if hub_repo and not token:
        raise RecipeError(
            f"hub_repo is {hub_repo!r} but there is no token: set the environment variable HF_TOKEN, or in Colab add "
            "HF_TOKEN under the key symbol and allow this notebook to read it"
        )
    return token


# --------------------------------------------------------------------------------------------------------------------
# 2. Quantize
# --------------------------------------------------------------------------------------------------------------------


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name; "" for a package that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def hash_folder(folder: str | Path, skip: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by path relative to it, in sorted order; names in `skip` are left out."""
    folder, skip = Path(folder), set(skip)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files if path.name not in skip}


def parameter_count(config: Mapping[str, Any]) -> int:
    """Number of weights of a gated decoder (Gemma, Llama, Qwen, Mistral) from the values of its config.json.

    Matrices only: the norms are less than a thousandth. Tied embeddings are counted once.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    layer = attention + 3 * hidden * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    return config["num_hidden_layers"] * layer + embeddings


def check_gpu(config: Mapping[str, Any], gpu: bool, limit: float = 1.5e9) -> None:
    """Raise RecipeError if a model of more than `limit` weights is asked for on a machine without a GPU."""
    if not gpu and (weights := parameter_count(config)) > limit:
        raise RecipeError(
            f"no GPU here, and the model has {weights / 1e9:.1f} billion weights: in Colab choose Runtime > Change "
            "runtime type > A100, or try the series on a CPU with `make smoke`"
        )


def check_quantized_folder(folder: str | Path, base_model: str, base_commit: str) -> None:
    """Raise RecipeError if `folder` already holds the finished quantization of another base (its provenance.json)."""
    path = Path(folder) / "provenance.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if (found["base_model"], found["base_commit"]) != (base_model, base_commit):
        raise RecipeError(
            f"{folder} already holds {found['base_model']} ({found['base_commit'] or 'local'}), not {base_model} "
            f"({base_commit or 'local'}): choose another output_dir or delete that folder"
        )


# --------------------------------------------------------------------------------------------------------------------
# 3. Filter
# --------------------------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------------------------
# 4. Fine-tune
# --------------------------------------------------------------------------------------------------------------------

# The training prompt of 2024 (`alpaca_prompt_jp`): first the question, then the answer.
SFT_PROMPT = """
あなたは高性能なAIです。質問に対して、適切な回答を書きなさい。
回答に関係のないことは絶対に書かないでください。

### 質問:
{}

### 回答:
{}"""

# google/gemma-2-27b has no chat template; 2024 took that of google/gemma-2-9b. Neither stage of the recipe applies it:
# it is stored with the tokenizer so that the saved model can be used with chat tools.
GEMMA_CHAT_TEMPLATE = (
    "\n{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}\n"
)


def sft_text(instruction: str, response: str, eos_token: str) -> str:
    """One training text: the filled prompt, then `eos_token` so that the model learns where an answer ends.

    As in 2024 a row without a response gets no `eos_token`. The tokenizer adds the one <bos>.
    """
    return SFT_PROMPT.format(instruction, response) + (eos_token if response else "")


def training_pairs(filtered: Iterable[Mapping[str, Any]], qa: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Join the filtered rows (instruction, response) and, after them, the QA rows (input, output)."""
    pairs = [{"instruction": row["instruction"], "response": row["response"]} for row in filtered]
    pairs += [{"instruction": row["input"], "response": row["output"]} for row in qa]
    return pairs


def checkpoint_to_resume(folder: str | Path, settings: Mapping[str, Any], finished: str | Path) -> str | None:
    """The newest checkpoint below `folder` of an interrupted training with the same `settings`, or None to start anew.

    `settings` is kept in the folder. A training whose report `finished` exists is over: its checkpoints are deleted,
    and the report as well, so that from now on the new training counts as unfinished.
    Raises RecipeError if an interrupted training with other settings lies there; its checkpoints are not touched.
    """
    folder, finished = Path(folder), Path(finished)
    kept = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        finished.unlink()
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8"))) != settings:
        changed = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
        raise RecipeError(
            f"{folder} holds an interrupted training with other values of {', '.join(changed)}: set them back to go on "
            "with it, or choose another output_dir, or delete that folder"
        )
    write_json(kept, settings)
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))) if checkpoints else None


# --------------------------------------------------------------------------------------------------------------------
# 5. Retrieve and answer
# --------------------------------------------------------------------------------------------------------------------

# The inference prompt of 2024. There is no newline between INSTRUCTION and the last "### 質問:".
OPENING = "質問・文章をよく読んで、正確で親切な回答を書きなさい。\n"
SHOT = "### 質問:\n{input}\n\n### 回答:\n{output}\n\n\n"
INSTRUCTION = (
    "あなたは日本語が堪能な優秀な人間です。\n"
    "**文脈**を踏まえて、改行と箇条書きを駆使して、日本語で**詳細に**書きなさい。\n"
    "優秀な人間になりきって、推測をいれずに根拠をもってわかりやすく答えてください。"
)
QUESTION = "### 質問:\n{input}\n\n### 回答:\n"

# Strings that 2024 forbade the model to write (`bad_words_ids`).
BANNED_WORDS = ("質問", "###", "#", "##", "---", "<h3>", "filepath", "> ")


def read_tasks(name: str) -> list[dict[str, Any]]:
    """The tasks of a file or hub data set, in its order: rows with `input` and `task_id` (if missing: the position from 0).

    Raises RecipeError that names both rows of a repeated task_id.
    """
    tasks = load_rows(name, required=("input",))
    first: dict[Any, int] = {}
    for position, task in enumerate(tasks):
        task_id = task.setdefault("task_id", position)
        if task_id in first:
            raise RecipeError(
                f"{name}: row {position + 1} repeats task_id {task_id!r} of row {first[task_id] + 1}; "
                "give every task its own id"
            )
        first[task_id] = position
    return tasks


def build_prompt(task_input: str, shots: Iterable[Mapping[str, str]]) -> str:
    """The few-shot prompt of 2024. `shots` (input, output) come most similar first and are written in inverse order,
    so that the most similar one stands next to the task."""
    examples = "".join(SHOT.format(input=shot["input"], output=shot["output"]) for shot in reversed(list(shots)))
    return OPENING + examples + INSTRUCTION + QUESTION.format(input=task_input)


def fit_shots(
    task_input: str, shots: Sequence[Mapping[str, str]], count_tokens: Callable[[str], int], budget: int
) -> tuple[str, int]:
    """The prompt with as many shots as fit into `budget` tokens, and their number.

    The least similar shots go first; neither a shot nor the task is ever cut. A task that is too long on its own
    comes back without shots and over budget: compare `count_tokens(prompt)` with `budget`.
    """
    for number in range(len(shots), 0, -1):
        prompt = build_prompt(task_input, shots[:number])
        if count_tokens(prompt) <= budget:
            return prompt, number
    return build_prompt(task_input, ()), 0


def banned_token_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token sequences for `bad_words_ids`; `encode` must not add special tokens.

    transformers forbids the last token of a sequence after the ones before it, so "---" is forbidden only as it is
    tokenized alone.
    """
    return [encode(word) for word in words]


def clean_answer(text: str) -> str:
    """Cut everything from a new "### 質問" on (the model went on to invent the next task) and trim white space."""
    return text.split("### 質問", maxsplit=1)[0].strip()


def submission_rows(tasks: Sequence[Mapping[str, Any]], answers: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Rows (task_id, input, output) in the order of the tasks; RecipeError lists tasks without an answer."""
    missing = [task["task_id"] for task in tasks if not answers.get(task["task_id"])]
    if missing:
        raise RecipeError(
            f"no answer for task_id {missing[:10]} ({len(missing)} of {len(tasks)}): run this notebook again"
        )
    return [{"task_id": task["task_id"], "input": task["input"], "output": answers[task["task_id"]]} for task in tasks]


# --------------------------------------------------------------------------------------------------------------------
# 6. Load models
# --------------------------------------------------------------------------------------------------------------------


ENGINES = ("unsloth", "transformers")


def find_model(name: str, revision: str = "") -> str:
    """Check that `name` is a model folder or a reachable hub repository, before anything large is loaded.

    Returns the commit of a hub repository, "" for a folder.
    Raises RecipeError that says whether the name, the permission or the network is at fault.
    """
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise RecipeError(f"{name}: the folder holds no config.json; did the notebook that writes it finish?")
        return ""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise RecipeError(
            f"{name}: no such folder; run the notebook that writes it, or name a hub repository (owner/name)"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(name, revision=revision or None, timeout=20).sha
    except GatedRepoError:
        raise RecipeError(f"{name} asks for consent: accept its terms on the hub and set the secret HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise RecipeError(
            f"{name}: neither a folder nor a hub repository (a private one needs the secret HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise RecipeError(f"{name}: the hub repository has no revision {revision!r}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RecipeError(f"{name}: no such folder, and the hub cannot be reached ({reason[:120]})") from None


def keep_weights_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place at the first forward pass on a CPU with AVX512-BF16.

    Backward passes through repacked weights are wrong, and what is saved afterwards does not reload to the same model.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_model(
    name: str,
    engine: str,
    *,
    max_seq_length: int,
    dtype: str = "bfloat16",
    attention: str = "eager",
    revision: str = "",
) -> tuple[Any, Any]:
    """Load a causal language model as it is stored (4 bit if it was saved in 4 bit) and its tokenizer.

    `attention="eager"`: the default of transformers, sdpa, leaves out the softcapping of Gemma 2's attention scores.
    Raises RecipeError for an unknown engine, a missing model, a large model without a GPU, and if another model than
    `name` was loaded.
    """
    if engine not in ENGINES:
        raise RecipeError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    find_model(name, revision)
    if engine == "unsloth":
        # unsloth patches the libraries at import, so it comes before them; no usage statistics, cache out of the way.
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
        import unsloth
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(name, revision=revision or None)
    gpu = torch.cuda.is_available()
    check_gpu(config.to_dict(), gpu)
    quantized = getattr(config, "quantization_config", None) is not None
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention, "revision": revision or None}
    if engine == "unsloth":
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            name,
            max_seq_length=max_seq_length,
            load_in_4bit=quantized,
            use_exact_model_name=True,
            **options,
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(name, device_map="auto" if gpu else "cpu", **options)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or None)
    keep_weights_unpacked(model)
    if model.config._name_or_path != name:
        raise RecipeError(f"{engine} loaded {model.config._name_or_path} instead of {name}")
    return model, tokenizer


def check_adapter(adapter: str, model: str) -> None:
    """Raise RecipeError if the adapter was trained on another base than `model` (see its adapter_config.json)."""
    find_model(adapter)
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if base != model:
        raise RecipeError(f"the adapter {adapter} was trained on {base}, not on {model}: name the same model in both")


def mend_ragatouille() -> None:
    """Make RAGatouille 0.0.9 and colbert-ai 0.2.22 work on today's langchain and transformers; safe to call twice.

    None of the changes alters a score:
    - ragatouille imports a base class from `langchain.retrievers`, which langchain 1.x no longer has. langchain_core
      still has the class, so the old path is registered as an alias.
    - colbert-ai builds its BERT without `post_init()`, which transformers 5 needs in order to load weights.
    - colbert-ai reads a checkpoint's config with `trust_remote_code=True`; nothing here runs code from a hub.
    - colbert-ai compiles C++ extensions for its index on disk; searching in memory does not use them.
    """
    from langchain_core.documents import BaseDocumentCompressor

    path = "langchain.retrievers.document_compressors.base"
    for depth in range(path.count(".") + 1):
        name = ".".join(path.split(".")[: depth + 1])
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[path].BaseDocumentCompressor = BaseDocumentCompressor

    import colbert.modeling.colbert as modeling
    from colbert.modeling import base_colbert, hf_colbert
    from colbert.modeling.tokenization import doc_tokenization, query_tokenization
    from transformers import AutoConfig

    if getattr(hf_colbert.class_factory, "mended", False):
        return
    modeling.ColBERT.loaded_extensions = True
    hf_colbert.AutoConfig = types.SimpleNamespace(from_pretrained=lambda name, **_: AutoConfig.from_pretrained(name))
    original = hf_colbert.class_factory

    def class_factory(name_or_path: str) -> type:
        class MendedColBERT(original(name_or_path)):
            def __init__(self, config: Any, colbert_config: Any) -> None:
                super().__init__(config, colbert_config)
                self.post_init()

        return MendedColBERT

    class_factory.mended = True
    for module in (hf_colbert, base_colbert, query_tokenization, doc_tokenization):
        module.class_factory = class_factory


def load_retriever(name: str, documents: list[str]) -> Any:
    """Load a ColBERT checkpoint with RAGatouille and encode `documents` in memory; returns a RAGPretrainedModel."""
    find_model(name)
    mend_ragatouille()
    from ragatouille import RAGPretrainedModel

    retriever = RAGPretrainedModel.from_pretrained(name, index_root=tempfile.gettempdir(), verbose=0)
    # colbert-ai falls back to bert-base-uncased when it cannot read a checkpoint.
    if retriever.model.inference_ckpt.name != name:
        raise RecipeError(f"colbert-ai loaded {retriever.model.inference_ckpt.name} instead of {name}")
    retriever.encode(documents, verbose=False)
    return retriever


def search(retriever: Any, query: str, k: int, query_max_tokens: int) -> list[dict[str, Any]]:
    """The `k` most similar documents, best first, as {"index", "score"}; equal scores keep the order of the documents.

    `score` is ColBERT's MaxSim: the sum over the query's tokens of the best cosine similarity to a document token.
    RAGatouille derives the query's length from its number of spaces, so that Japanese, which has none, is cut to
    32 tokens. Here the length is that of the query, at most `query_max_tokens`; 32 gives RAGatouille's own scores.
    """
    model = retriever.model
    tokenizer = model.inference_ckpt.query_tokenizer
    tokens = len(tokenizer.tok(query)["input_ids"]) + 1  # colbert inserts its query marker after [CLS]
    length = max(32, int(len(query.split(" ")) * 1.35), min(tokens, query_max_tokens))
    tokenizer.query_maxlen = min(length, model.base_model_max_tokens)
    embedded = model.inference_ckpt.queryFromText([query], bsize=1)
    found = model._index_free_search(
        [embedded],
        documents=model.in_memory_collection,
        embedded_docs=model.in_memory_embed_docs,
        doc_mask=model.doc_masks,
        k=len(model.in_memory_collection),
    )
    found.sort(key=lambda result: (-result["score"], result["result_index"]))
    return [{"index": result["result_index"], "score": result["score"]} for result in found[:k]]
