"""Make the two tiny models below data/tiny/ from the sample text: python data/tiny/make_tiny.py (about four minutes).

gemma2/   Gemma 2 in its real architecture with a byte-fallback BPE tokenizer, trained on the sample text until it
          writes something that looks like Japanese. It knows nothing.
colbert/  ColBERT in the checkpoint format of stanford-nlp/ColBERT, as JaColBERTv2 has it, trained until texts that
          share words find each other.

One thread and fixed seeds: the same machine and library versions write the same bytes again.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertJapaneseTokenizer, BertModel, Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "sample"
TURNS = ["<start_of_turn>", "<end_of_turn>"]

# The inference prompt of the recipe. The training prompt is left out: it is what fine-tuning has to teach.
SHOTS_HEAD = "質問・文章をよく読んで、正確で親切な回答を書きなさい。\n"
SHOT = "### 質問:\n{}\n\n### 回答:\n{}\n\n\n"
TASK = (
    "あなたは日本語が堪能な優秀な人間です。\n"
    "**文脈**を踏まえて、改行と箇条書きを駆使して、日本語で**詳細に**書きなさい。\n"
    "優秀な人間になりきって、推測をいれずに根拠をもってわかりやすく答えてください。"
    "### 質問:\n{}\n\n### 回答:\n{}"
)


def read_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(question, answer) pairs of the magpie rows that are plain text without an NG string, and of the QA rows."""
    ng = json.loads((HERE.parent / "filter_rules_2024.json").read_text(encoding="utf-8"))["ng"]
    magpie = []
    for line in (SAMPLE / "magpie.jsonl").open(encoding="utf-8"):
        turns = json.loads(line)["conversations"]
        text = "".join(turn["content"] for turn in turns)
        plain = text.replace("\n", "").isprintable() and not any(string in text for string in ng)
        if plain and [turn["role"] for turn in turns] == ["user", "assistant"] and len(turns[1]["content"]) >= 40:
            magpie.append((turns[0]["content"], turns[1]["content"]))
    qa = [json.loads(line) for line in (SAMPLE / "qa.jsonl").open(encoding="utf-8")]
    return magpie, [(row["input"], row["output"]) for row in qa]


def make_gemma_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """Gemma's tokenizer class with a small vocabulary: special tokens in Gemma's order, bytes, characters, merges."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *TURNS]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    text = "\n".join(texts).replace(" ", "▁")
    counts = Counter(text)
    # Rare characters are left to the bytes, as in the real tokenizer.
    text = "".join(char for char in text if counts[char] >= 3)
    bpe = Tokenizer(models.BPE())
    # No merge across line ends and punctuation: without this the trainer learns whole phrases of so small a text.
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[▁:、。「」]"), "isolated")
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=2560, special_tokens=special, max_token_length=6, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, extra_special_tokens=TURNS)


def make_gemma(folder: Path) -> int:
    """Train and save the tiny Gemma 2; returns its number of parameters."""
    magpie, qa = read_pairs()
    pairs = magpie + qa
    tokenizer = make_gemma_tokenizer([SHOTS_HEAD + TASK, *(SHOT.format(*pair) for pair in pairs)])
    random.seed(0)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        max_position_embeddings=8192,
        # Gemma 2 divides by sqrt(query_pre_attn_scalar). 1 makes the scores so large that the softcap of 50 is felt:
        # an attention that drops it gives other logits, which tests can see.
        query_pre_attn_scalar=1,
        initializer_range=0.05,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)

    def example() -> str:
        """One training text: the inference prompt with 0 to 2 shots, and the answer."""
        shots = "".join(SHOT.format(*pair) for pair in random.sample(qa, random.randint(0, 2)))
        return SHOTS_HEAD + shots + TASK.format(*random.choice(pairs))

    steps, batch_size = 140, 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        ids = [tokenizer(example() + tokenizer.eos_token).input_ids[-384:] for _ in range(batch_size)]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"gemma2 step {step}: loss {loss.item():.3f}", flush=True)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    # bf16, as google/gemma-2-27b is stored; it also halves the file.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def make_colbert_tokenizer(texts: list[str], folder: Path) -> BertJapaneseTokenizer:
    """JaColBERTv2's tokenizer (MeCab with unidic_lite, then wordpiece) over the words and characters of the texts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(10))]
    options = {"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "unidic_lite"}}
    chars = sorted({char for text in texts for char in text if char.isprintable() and char != " "})
    vocab_file = folder / "vocab.txt"
    vocab_file.write_text("\n".join(special + chars), encoding="utf-8")
    mecab = BertJapaneseTokenizer(str(vocab_file), **options).word_tokenizer
    counts = Counter(word for text in texts for word in mecab.tokenize(text))
    words = sorted(word for word, count in counts.items() if count >= 2 and len(word) >= 2)
    vocab_file.write_text("\n".join(special + chars + [f"##{char}" for char in chars] + words) + "\n", encoding="utf-8")
    return BertJapaneseTokenizer(str(vocab_file), **options)


def make_colbert(folder: Path) -> int:
    """Train and save the tiny ColBERT; returns its number of parameters."""
    magpie, qa = read_pairs()
    folder.mkdir(parents=True)
    tokenizer = make_colbert_tokenizer([text for pair in magpie + qa for text in pair], folder)
    questions = [question for question, _ in magpie + qa]
    answers = [answer for _, answer in magpie]
    torch.manual_seed(0)
    random.seed(0)
    config = BertConfig(
        architectures=["HF_ColBERT"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    bert = BertModel(config)
    # Small position vectors: words match wherever they stand, even at positions that training never reaches.
    bert.embeddings.position_embeddings.weight.data *= 0.1
    linear = torch.nn.Linear(config.hidden_size, 32, bias=False)
    query_mark, doc_mark = tokenizer.convert_tokens_to_ids(["[unused0]", "[unused1]"])

    def embed(texts: list[str], mark: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (texts, length, 32) and the mask of real tokens (texts, length), laid out as colbert does it."""
        ids = [tokenizer.encode(text, add_special_tokens=False)[: length - 3] for text in texts]
        ids = [[tokenizer.cls_token_id, mark, *row, tokenizer.sep_token_id] for row in ids]
        batch = tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=length, return_tensors="pt")
        padding = batch.attention_mask == 0
        if mark == query_mark:  # ColBERT's query augmentation; the masks are not attended to
            batch.input_ids[padding] = tokenizer.mask_token_id
        vectors = linear(bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state)
        return torch.nn.functional.normalize(vectors, dim=2), ~padding

    # A question with a third of its words left out must find the question itself among the others of the batch, at
    # any query length and also at the end of a longer text.
    optimizer = torch.optim.AdamW([*bert.parameters(), *linear.parameters()], lr=1e-3)
    for step in range(150):
        docs = random.sample(questions, 16)
        words = [tokenizer.word_tokenizer.tokenize(doc) for doc in docs]
        queries = ["".join(word for word in doc if random.random() > 1 / 3) for doc in words]
        length = random.choice([32, 64, 256])
        if length == 256:
            queries = [random.choice(answers) + query for query in queries]
        query_vectors, _ = embed(queries, query_mark, length)
        doc_vectors, doc_mask = embed(docs, doc_mark, 128)
        similarity = torch.einsum("qid,pjd->qpij", query_vectors, doc_vectors)
        best = similarity.masked_fill(~doc_mask[None, :, None, :], -1).amax(3)
        loss = torch.nn.functional.cross_entropy(20 * best.mean(2), torch.arange(len(docs)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == 149:
            print(f"colbert step {step}: loss {loss.item():.3f}", flush=True)

    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {f"bert.{name}": weight for name, weight in bert.state_dict().items()} | {"linear.weight": linear.weight}
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    # No model_name and no checkpoint: colbert must take the architecture from this folder, not from a hub.
    settings = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_token": "[Q]",
        "doc_token": "[D]",
        "query_maxlen": 32,
        "doc_maxlen": 300,
        "attend_to_mask_tokens": False,
        "mask_punctuation": True,
        "similarity": "cosine",
        "dim": 32,
        "nbits": 2,
    }
    (folder / "artifact.metadata").write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    return sum(weight.numel() for weight in weights.values())


def main() -> None:
    torch.set_num_threads(1)
    for name, make in (("gemma2", make_gemma), ("colbert", make_colbert)):
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        parameters = make(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {parameters:,} parameters, {size / 1e6:.2f} MB on disk")


if __name__ == "__main__":
    main()
