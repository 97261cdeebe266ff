"""Retrieval with the tiny ColBERT through RAGatouille."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

import helpers

QA = helpers.files.load_rows("data/sample/qa.jsonl")
DOCUMENTS = [row["input"] for row in QA]


@pytest.fixture(scope="module")
def retriever():
    return helpers.retrieval.load("data/tiny/colbert", DOCUMENTS)


def maxsim(retriever, query, query_length):
    """MaxSim written out: for each token of the query the best dot product with a token of the document, summed.

    RAGatouille pads documents with zero vectors and masks nothing, so that no token of a query scores below 0.
    """
    checkpoint = retriever.model.inference_ckpt
    checkpoint.query_tokenizer.query_maxlen = query_length
    (query_vectors,) = checkpoint.queryFromText([query], bsize=1)
    scores = []
    for document in DOCUMENTS:
        (document_vectors,) = checkpoint.docFromText([document], bsize=1)[0]
        scores.append(sum(max(0.0, *(float(q @ d) for d in document_vectors)) for q in query_vectors))
    return scores


@pytest.mark.parametrize("query", ["健康のために歩く習慣をつけるにはどうすればよいですか。", DOCUMENTS[3]])
def test_scores_are_those_of_plain_maxsim(retriever, query):
    found = helpers.retrieval.search(retriever, query, k=len(QA), query_max_tokens=512)
    length = retriever.model.inference_ckpt.query_tokenizer.query_maxlen
    expected = maxsim(retriever, query, length)
    torch.testing.assert_close(
        torch.tensor([result["score"] for result in found]),
        torch.tensor([expected[result["index"]] for result in found]),
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip
    assert [result["score"] for result in found] == sorted((result["score"] for result in found), reverse=True)


@pytest.mark.parametrize(
    "query", ["健康のために歩く習慣をつけるにはどうすればよいですか。", DOCUMENTS[3], DOCUMENTS[5] * 3]
)
def test_the_largest_similarity_of_each_token_sums_up_to_the_score(retriever, query):
    """What the picture of notebook 04 shows: of task and example the tokens, and for each pair the cosine."""
    for result in helpers.retrieval.search(retriever, query, k=3, query_max_tokens=512):
        tokens, vectors = helpers.retrieval.embed_query(retriever, query, 512)
        text = DOCUMENTS[result["index"]]
        document_tokens, document = helpers.retrieval.embed_document(retriever, result["index"], text)
        cosines = vectors.to(document) @ document.T
        assert cosines.shape == (len(tokens), len(document_tokens))
        assert cosines.abs().max() < 1.001
        assert float(cosines.max(dim=1).values.sum()) == pytest.approx(result["score"], rel=1e-4)
        shown = "".join(document_tokens).replace("##", "")
        assert shown.startswith("[CLS][unused1]") and shown.endswith("[SEP]")
        assert shown.count("習慣") == text.count("習慣")


def test_32_tokens_give_ragatouilles_own_scores(retriever):
    query = "来月、家族四人で京都へ二泊三日の旅行に行きます。" * 4
    own = retriever.search_encoded_docs(query=query, k=5)
    ours = helpers.retrieval.search(retriever, query, k=5, query_max_tokens=32)
    assert [result["result_index"] for result in own] == [result["index"] for result in ours]
    assert [result["score"] for result in own] == pytest.approx([result["score"] for result in ours], rel=1e-5)


def test_decisive_words_at_the_end_of_a_long_query_count(retriever):
    """2024 cut every Japanese query after about 29 tokens, so that the question at its end was never read."""
    wanted = 20
    greeting = "はじめまして。私は東京に住んでいる会社員です。"
    greeting += "毎日忙しく過ごしていますが、ふと気になったことがあるので、一つ質問させてください。"
    query = greeting + DOCUMENTS[wanted]
    assert helpers.retrieval.search(retriever, query, k=1, query_max_tokens=512)[0]["index"] == wanted
    assert helpers.retrieval.search(retriever, query, k=1, query_max_tokens=32)[0]["index"] != wanted


def test_a_question_finds_itself_first(retriever):
    for index, document in enumerate(DOCUMENTS):
        assert helpers.retrieval.search(retriever, document, k=1, query_max_tokens=512)[0]["index"] == index


def test_k_larger_than_the_number_of_documents(retriever):
    assert len(helpers.retrieval.search(retriever, "質問", k=1000, query_max_tokens=512)) == len(DOCUMENTS)


def test_equal_scores_keep_the_order_of_the_documents():
    retriever = helpers.retrieval.load("data/tiny/colbert", [DOCUMENTS[i] for i in (7, 11, 7, 7)])
    found = helpers.retrieval.search(retriever, DOCUMENTS[7], k=3, query_max_tokens=512)
    assert [result["index"] for result in found] == [0, 2, 3]


def test_a_checkpoint_that_names_its_base_model(retriever, tmp_path):
    """Published checkpoints name the model that they were trained from; the weights are their own all the same."""
    copy = tmp_path / "colbert"
    shutil.copytree("data/tiny/colbert", copy)
    metadata = json.loads((copy / "artifact.metadata").read_text(encoding="utf-8"))
    metadata["model_name"] = str(ROOT / "data/tiny/colbert")
    (copy / "artifact.metadata").write_text(json.dumps(metadata), encoding="utf-8")
    named = helpers.retrieval.load(str(copy), DOCUMENTS)
    assert helpers.retrieval.search(named, DOCUMENTS[3], 3, 512) == helpers.retrieval.search(
        retriever, DOCUMENTS[3], 3, 512
    )


def test_what_the_retriever_cuts_is_said(capsys):
    """Two examples that differ only behind what it reads have the same vectors."""
    texts = ["山" * 600 + "A", "山" * 600 + "B", "海はどこですか。"]
    retriever = helpers.retrieval.load("data/tiny/colbert", texts)
    assert "of 2 of 3 examples the retriever reads the first 508 tokens only" in capsys.readouterr().out
    one, two = retriever.model.in_memory_embed_docs[:2]
    assert torch.equal(one, two)
    helpers.retrieval.say_what_is_cut(retriever, "tasks", texts, limit=32)
    assert capsys.readouterr().out == "of 2 of 3 tasks the retriever reads the first 32 tokens only\n"
