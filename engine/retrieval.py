"""The retriever: ColBERT through RAGatouille."""

from __future__ import annotations

import io
import sys
import tempfile
import types
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from langchain_core.documents import BaseDocumentCompressor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from engine import hub
from helpers import RecipeError, first_line, max_sim


def embed_query(retriever: Any, query: str, query_max_tokens: int) -> tuple[list[str], torch.Tensor]:
    """The tokens of a query as ColBERT reads it, and their unit vectors (tokens, width).

    RAGatouille derives the query's length from its number of spaces, so that Japanese, which has none, is cut to
    32 tokens. Here the length is that of the query, at most `query_max_tokens`; 32 gives RAGatouille's own scores.
    ColBERT fills a query of fewer than 32 tokens up with [MASK], and these count as well.
    """
    model = retriever.model
    tokenizer = model.inference_ckpt.query_tokenizer
    tokens = len(tokenizer.tok(query)["input_ids"]) + 1  # colbert inserts its query marker after [CLS]
    length = max(32, int(len(query.split(" ")) * 1.35), min(tokens, query_max_tokens))
    tokenizer.query_maxlen = min(length, model.base_model_max_tokens)
    ((ids, _),) = tokenizer.tensorize([query], bsize=1)
    return tokenizer.tok.convert_ids_to_tokens(ids[0]), model.inference_ckpt.queryFromText([query], bsize=1)[0]


def embed_document(retriever: Any, index: int, text: str) -> tuple[list[str], torch.Tensor]:
    """The tokens of the document with this index and `text`, and their unit vectors (tokens, width)."""
    reader = retriever.model.inference_ckpt.doc_tokenizer
    ((ids, _),), _ = reader.tensorize([text], bsize=1)
    return reader.tok.convert_ids_to_tokens(ids[0]), retriever.model.in_memory_embed_docs[index][: len(ids[0])]


def search(retriever: Any, query: str, k: int, query_max_tokens: int) -> list[dict[str, Any]]:
    """The `k` most similar documents, best first, as {"index", "score"}; equal scores keep the order of the documents.

    `score` is ColBERT's MaxSim (see `helpers.max_sim`). At most `query_max_tokens` of the query are read (see
    `embed_query`).
    """
    _, vectors = embed_query(retriever, query, query_max_tokens)
    documents = retriever.model.in_memory_embed_docs  # (documents, tokens, width), filled up with zeros
    scores = max_sim(vectors.to(documents), documents)
    return [{"index": i, "score": float(scores[i])} for i in scores.argsort(descending=True, stable=True)[:k].tolist()]


def say_what_is_cut(retriever: Any, kind: str, texts: Sequence[str], limit: int | None = None) -> None:
    """Print how many `texts` (documents, or queries with a `limit`) are longer than the retriever reads: two that
    differ only behind that are equal to it.
    """
    reader, longest = retriever.model.inference_ckpt.doc_tokenizer, retriever.model.base_model_max_tokens
    limit = min(limit or reader.doc_maxlen, longest)
    tokens = [len(reader.tok(text)["input_ids"]) + 1 for text in texts]  # with the mark of a document or query
    if cut := sum(number > limit for number in tokens):
        print(f"of {cut} of {len(tokens)} {kind} the retriever reads the first {limit} tokens only")


@lru_cache
def patch_ragatouille() -> None:
    """Make RAGatouille 0.0.9 and colbert-ai 0.2.22 work on today's langchain and transformers; no score changes."""
    # ragatouille imports this class by its path in langchain 0.
    path = "langchain.retrievers.document_compressors.base"
    for depth in range(1, path.count(".") + 2):
        name = ".".join(path.split(".")[:depth])
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[path].BaseDocumentCompressor = BaseDocumentCompressor

    import colbert.modeling.colbert as modeling
    from colbert.modeling import base_colbert, hf_colbert
    from colbert.modeling.tokenization import doc_tokenization, query_tokenization

    modeling.ColBERT.loaded_extensions = True  # C++ that is compiled for an index on disk
    # colbert-ai would run a repository's own code: `auto_map` of its config, whoever is asked, and of its tokenizer.
    hf_colbert.AutoConfig = types.SimpleNamespace(from_pretrained=load_config)
    hf_colbert.get_class_from_dynamic_module = refuse_class
    safe = types.SimpleNamespace(from_pretrained=partial(AutoTokenizer.from_pretrained, trust_remote_code=False))
    hf_colbert.AutoTokenizer = base_colbert.AutoTokenizer = safe
    original = hf_colbert.class_factory

    def class_factory(name_or_path: str) -> type:
        class PatchedColBERT(original(name_or_path)):
            def __init__(self, config: Any, colbert_config: Any) -> None:
                super().__init__(config, colbert_config)
                self.post_init()  # transformers 5 loads no weights before it

        return PatchedColBERT

    for module in (hf_colbert, base_colbert, query_tokenization, doc_tokenization):
        module.class_factory = class_factory


def load_config(name: str, **_: Any) -> PreTrainedConfig:
    """The config of a model that transformers knows; RecipeError for one with code of its own."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    hub.refuse_auto_map(name, config.to_dict())
    return config


def refuse_class(reference: str, name: str, **_: Any) -> type:
    """In the place of what fetches a class of a repository and runs it."""
    raise RecipeError(f"{name}: it asks to run code of its own ({reference}), which is not done here")


def check_base(name: str, commit: str) -> None:
    """RecipeError if the model that a checkpoint names as its base, where colbert-ai reads the kind, has code of its
    own or cannot be read: then colbert-ai would take another one.
    """
    if not (Path(name, "artifact.metadata").is_file() or (commit and hub.fetch(name, "artifact.metadata", commit))):
        return
    metadata = hub.read_json(name, commit, "artifact.metadata")
    named = metadata["config"] if isinstance(metadata.get("config"), dict) else metadata
    base = named.get("model_name")
    if base is None:
        return
    try:
        load_config(base)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}: its base model {base} cannot be read ({first_line(error)})") from None


def load(name: str, documents: Sequence[str]) -> Any:
    """Load a ColBERT checkpoint with RAGatouille and encode `documents` in memory; returns a RAGPretrainedModel.

    RecipeError for one that cannot be read, or that asks for code of its own.
    """
    check_base(name, hub.find_model(name))
    # colbert-ai prints that it misses faiss, which only an index on disk needs.
    with redirect_stdout(io.StringIO()):
        patch_ragatouille()
        from ragatouille import RAGPretrainedModel

    try:
        retriever = RAGPretrainedModel.from_pretrained(name, index_root=tempfile.gettempdir(), verbose=0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}: colbert-ai cannot load it ({first_line(error)})") from None
    # colbert-ai takes bert-base-uncased for a checkpoint whose kind it cannot read.
    checkpoint = retriever.model.inference_ckpt
    if checkpoint.name != (checkpoint.colbert_config.model_name or name):
        raise RecipeError(f"{name}: colbert-ai cannot read it and would take {checkpoint.name} instead")
    retriever.encode(list(documents), verbose=False)
    say_what_is_cut(retriever, "examples", documents)
    return retriever
