"""The retriever: ColBERT through RAGatouille."""

from __future__ import annotations

import io
import sys
import tempfile
import types
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from typing import Any

import torch
from langchain_core.documents import BaseDocumentCompressor
from transformers import AutoConfig

from engine import hub
from helpers import RecipeError, max_sim


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
    # Without `trust_remote_code`: nothing here runs code from a hub.
    hf_colbert.AutoConfig = types.SimpleNamespace(from_pretrained=lambda name, **_: AutoConfig.from_pretrained(name))
    original = hf_colbert.class_factory

    def class_factory(name_or_path: str) -> type:
        class PatchedColBERT(original(name_or_path)):
            def __init__(self, config: Any, colbert_config: Any) -> None:
                super().__init__(config, colbert_config)
                self.post_init()  # transformers 5 loads no weights before it

        return PatchedColBERT

    for module in (hf_colbert, base_colbert, query_tokenization, doc_tokenization):
        module.class_factory = class_factory


def load(name: str, documents: Sequence[str]) -> Any:
    """Load a ColBERT checkpoint with RAGatouille and encode `documents` in memory; returns a RAGPretrainedModel."""
    hub.find_model(name)
    # colbert-ai prints that it misses faiss, which only an index on disk needs.
    with redirect_stdout(io.StringIO()):
        patch_ragatouille()
        from ragatouille import RAGPretrainedModel

    retriever = RAGPretrainedModel.from_pretrained(name, index_root=tempfile.gettempdir(), verbose=0)
    # colbert-ai takes bert-base-uncased for a checkpoint whose kind it cannot read.
    checkpoint = retriever.model.inference_ckpt
    if checkpoint.name != (checkpoint.colbert_config.model_name or name):
        raise RecipeError(f"{name}: colbert-ai cannot read it and would take {checkpoint.name} instead")
    retriever.encode(list(documents), verbose=False)
    return retriever
