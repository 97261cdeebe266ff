"""Two questions about a model that notebook 3 has fine-tuned (`merged/`, written with `export_merged`).

    python benchmarks/preferences.py dpo --model MERGED --rows ROWS.jsonl --count 2000 --out DIR --seed 1
    python benchmarks/preferences.py mbr --model MERGED --tasks TASKS.jsonl --out DIR --seed 1

dpo: preference training (direct preference optimization) on the first rows of a file. The row's answer is preferred to
an answer that the model itself samples; no judge is needed. Writes DIR/pairs.jsonl, DIR/adapter (for notebook 4, with
`model` = MERGED) and DIR/dpo.json. Notebook 3 reads pairs.jsonl as `train_data`: the same rows for one more epoch.
mbr: does it help to sample several answers and to keep the one most like the others (minimum Bayes risk)? Writes the
folders DIR/greedy, DIR/first (the first sample) and DIR/mbr for compare.py, and DIR/mbr.json.
A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps between rows of different length
import helpers  # noqa: E402

NEW_TOKENS = 256  # of an answer, at most
MAX_LENGTH = 1024  # tokens of question and answer; longer pairs are left out
PAIRS_AT_A_TIME, PAIRS_PER_STEP = 4, 32
# One round is 60 steps, a tenth of what published recipes take with 5e-6, and the adapter starts at zero.
TRAINING = {"beta": 0.1, "learning_rate": 2e-5, "num_train_epochs": 1, "warmup_steps": 0.1}
TRAINING |= {"lr_scheduler_type": "linear", "weight_decay": 0.0, "max_length": MAX_LENGTH}
LORA = {"r": 64, "lora_alpha": 64, "lora_dropout": 0, "bias": "none"}
# transformers would also keep the 50 likeliest tokens only: top_k = 0 turns that off.
OWN_ANSWER = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
# Every way of decoding has notebook 4's penalty, so that they differ in nothing else.
GREEDY = {"do_sample": False, "repetition_penalty": 1.1}
SAMPLE = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.1}
SAMPLES = 8


def load(name: str) -> tuple[Any, Any]:
    """The model with the fastest attention that is right for it, and its tokenizer."""
    model, tokenizer = helpers.load_model(
        name, "transformers", max_seq_length=MAX_LENGTH, dtype=helpers.compute_dtype()
    )
    if not getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("sdpa")  # it leaves the softcapping of Gemma 2 out
    return model.eval(), tokenizer


def write_answers(
    model: Any, prompts: Sequence[list[int]], batch_tokens: int = 100_000, **decoding: Any
) -> list[tuple[list[int], bool]]:
    """An answer (token ids without the end token) to each prompt, and whether it was cut at NEW_TOKENS.

    A batch holds prompts of similar length, as many as come to `batch_tokens` with their answers.
    """
    import torch

    pad, ends = model.generation_config.pad_token_id, set(model.generation_config.eos_token_id)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[Any] = [None] * len(prompts)
    while waiting:
        width = len(prompts[waiting[0]])
        size = max(1, batch_tokens // (width + NEW_TOKENS))
        chosen, waiting = waiting[:size], waiting[size:]
        rows = [[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        ids, mask = (torch.tensor(part, device=model.device) for part in (rows, mask))
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **decoding)
        for i, row in zip(chosen, written[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(row) if token in ends), None)
            answers[i] = row[:length], length is None
    return answers


def pair_ids(tokenizer: Any, pair: dict[str, Any]) -> dict[str, list[int]]:
    """The token ids of a pair (input, output, rejected, cut) under the names that trl's trainer uses.

    As in notebook 3 there is one <bos>, in front, and the end token behind each answer. It is missing behind one that
    was cut: the model did not end there. RecipeError for control tokens anywhere else.
    """
    begin, end = helpers.encode(tokenizer, "").ids, tokenizer.eos_token_id
    prompt = helpers.encode(tokenizer, helpers.sft_text(pair["input"], "", "")).ids
    chosen, rejected = (helpers.encode_within(tokenizer, pair[name]) for name in ("output", "rejected"))
    if prompt[: len(begin)] != begin or {*begin, end} & {*prompt[len(begin) :], *chosen, *rejected}:
        raise helpers.RecipeError(f"no <bos>, or a control token in the middle: {pair['input'][:60]!r}")
    return {"prompt_ids": prompt, "chosen_ids": [*chosen, end], "rejected_ids": rejected + [end] * (not pair["cut"])}


def make_pairs(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> tuple[list[dict], dict[str, int]]:
    """Rows (input, output, rejected, cut) with an answer of the model as `rejected`; the number left out by reason."""
    prompts = [helpers.encode(tokenizer, helpers.sft_text(row["input"], "", "")).ids for row in rows]
    pairs, left_out = [], Counter()
    for row, (answer, cut) in zip(rows, write_answers(model, prompts, **OWN_ANSWER), strict=True):
        pair = row | {"rejected": tokenizer.decode(answer, skip_special_tokens=True), "cut": cut}
        ids = pair_ids(tokenizer, pair)
        if not pair["rejected"].strip():
            left_out["empty"] += 1
        elif pair["rejected"].strip() == pair["output"].strip():
            left_out["equal"] += 1
        elif len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"])) > MAX_LENGTH:
            left_out["too long"] += 1
        else:
            pairs.append(pair)
    return pairs, dict(left_out)


def make_trainer(model: Any, tokenizer: Any, pairs: Sequence[dict], out: Path, seed: int) -> Any:
    """trl's DPOTrainer over token ids, with a new LoRA adapter; the reference is the model without it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # trl takes an "<eos>" written in a text for the end token, and puts one behind cut answers

    arguments = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=PAIRS_AT_A_TIME,
        gradient_accumulation_steps=PAIRS_PER_STEP // PAIRS_AT_A_TIME,
        gradient_checkpointing=False,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=5,
        seed=seed,
        **TRAINING,
    )
    set_seed(seed)
    lora = LoraConfig(**LORA, target_modules=helpers.lora_targets(model.config), task_type="CAUSAL_LM")
    rows = Dataset.from_list([pair_ids(tokenizer, pair) for pair in pairs])
    trainer = PairTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=arguments, peft_config=lora)
    # trl's loss in chunks, in float32: all logits would be 262,144 values per token. Set among the arguments, the same
    # switch would also bring Liger's kernels, which need a GPU.
    trainer.use_liger_kernel = True
    return trainer


def train_on_preferences(name: str, rows: str, count: int, out: Path, seed: int) -> dict[str, Any]:
    """Sample, train and save the adapter; returns the report that is written to `out`/dpo.json."""
    import torch
    from transformers import set_seed

    started = time.perf_counter()
    inputs = {"model": helpers.model_source(name), "train_data": helpers.data_source(rows)}
    model, tokenizer = load(name)
    set_seed(seed)
    chosen = helpers.load_pairs(rows)[:count]
    pairs, left_out = make_pairs(model, tokenizer, chosen)
    helpers.write_jsonl(out / "pairs.jsonl", pairs)
    sampled = time.perf_counter()
    print(f"{len(pairs):,} pairs of {len(chosen):,} rows in {sampled - started:.0f} s; left out: {left_out}")
    trainer = make_trainer(model, tokenizer, pairs, out, seed)
    trainer.train()
    trained = trainer.model
    for parameter in trained.parameters():
        parameter.data = parameter.data.to(model.dtype)
    for config in trained.peft_config.values():
        config.target_modules = sorted(config.target_modules)  # a set is written in another order each time
    adapter = out / "adapter"
    trained.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    settings = TRAINING | LORA | {"pairs_per_step": PAIRS_PER_STEP, "sampling": OWN_ANSWER, "new_tokens": NEW_TOKENS}
    settings |= {"loss": "sigmoid", "count": count, "seed": seed, "pairs": helpers.sha256_file(out / "pairs.jsonl")}
    record = helpers.make_record("preferences", inputs, settings, ["torch", "transformers", "peft", "trl"])
    facts = {"pairs": f"{len(pairs):,}, the row's answer preferred to a sampled one"}
    card = helpers.model_card("LoRA adapter, trained on preferences", record, ["peft", "lora", "dpo"], facts)
    (adapter / "README.md").write_text(card, encoding="utf-8")
    helpers.write_record(adapter, record)
    gpu = torch.cuda.is_available()
    return {
        "settings": settings,
        "rows": len(chosen),
        "pairs": len(pairs),
        "left_out": left_out,
        "cut": sum(pair["cut"] for pair in pairs),
        "steps": trainer.state.global_step,
        "seconds_sampling": round(sampled - started, 1),
        "seconds_training": round(time.perf_counter() - sampled, 1),
        "peak_gpu_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if gpu else None,
        "log": trainer.state.log_history,
    }


def consensus(answers: Sequence[str]) -> int:
    """The index of the answer that is most like the others: the largest mean chrF against them."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()

    def likeness(index: int) -> float:
        return sum(chrf.sentence_score(answers[index], [text]).score for i, text in enumerate(answers) if i != index)

    return max(range(len(answers)), key=likeness)


def compare_decoding(name: str, tasks: str, out: Path, seed: int) -> dict[str, Any]:
    """Answer the tasks in three ways and score them; returns the report that is written to `out`/mbr.json."""
    from transformers import set_seed

    task_rows = helpers.read_tasks(tasks)
    inputs = {"model": helpers.model_source(name), "tasks": helpers.rows_source(tasks, task_rows)}
    model, tokenizer = load(name)
    prompts = [helpers.encode(tokenizer, helpers.sft_text(task["input"], "", "")).ids for task in task_rows]

    def answer(times: int, decoding: dict[str, Any]) -> tuple[list[list[tuple[str, bool]]], float]:
        """For each task `times` answers (text, cut), and the seconds that they took."""
        started = time.perf_counter()
        found = []
        for ids, cut in write_answers(model, [ids for ids in prompts for _ in range(times)], **decoding):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found.append((helpers.clean_answer(text), cut and "### 質問" not in text))
        return [found[i : i + times] for i in range(0, len(found), times)], time.perf_counter() - started

    set_seed(seed)
    arms, seconds = {}, {}
    arms["greedy"], seconds["greedy"] = answer(1, GREEDY)
    arms["first"], seconds["first"] = answer(1, SAMPLE)
    others, seconds["others"] = answer(SAMPLES - 1, SAMPLE)
    started = time.perf_counter()
    samples = [first + rest for first, rest in zip(arms["first"], others, strict=True)]
    picked = [consensus([text for text, _ in group]) for group in samples]
    arms["mbr"] = [[group[index]] for group, index in zip(samples, picked, strict=True)]
    seconds["mbr"] = seconds["first"] + seconds.pop("others") + time.perf_counter() - started
    report = {"inputs": inputs, "samples": samples, "picked": picked, "mean": {}}
    for arm, groups in arms.items():
        texts, cut = zip(*(group[0] for group in groups), strict=True)
        rows = [task | {"output": text} for task, text in zip(task_rows, texts, strict=True)]
        helpers.write_jsonl(out / arm / "output.jsonl", rows)
        scores = {"per_task": helpers.score_texts(task_rows, texts, cut), "seconds": round(seconds[arm], 1)}
        scores |= {"mean": helpers.summarize_scores(scores["per_task"]), "near_duplicates": []}
        scores |= {"tasks_sha256": helpers.digest_tasks(task_rows)}
        scores |= {"output_sha256": helpers.sha256_file(out / arm / "output.jsonl")}
        helpers.write_json(out / arm / "scores.json", scores)
        report["mean"][arm] = {measure: round(row["mean"], 4) for measure, row in scores["mean"].items()}
    settings = {"greedy": GREEDY, "sampling": SAMPLE, "samples": SAMPLES, "new_tokens": NEW_TOKENS, "seed": seed}
    return report | {"settings": settings, "seconds": {arm: round(value, 1) for arm, value in seconds.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["dpo", "mbr"])
    parser.add_argument("--model", required=True, help="merged/ of notebook 3")
    parser.add_argument("--rows", help="dpo: questions and answers")
    parser.add_argument("--count", type=int, default=2000, help="dpo: rows to take, from the first on")
    parser.add_argument("--tasks", help="mbr: tasks with references")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    report_file = args.out / f"{args.question}.json"
    if report_file.is_file():
        print(f"{report_file} is there: finished")
        sys.exit()
    begun = time.perf_counter()
    if args.question == "dpo":
        result = train_on_preferences(args.model, args.rows, args.count, args.out, args.seed)
    else:
        result = compare_decoding(args.model, args.tasks, args.out, args.seed)
    result["total_seconds"] = round(time.perf_counter() - begun, 1)
    helpers.write_json(report_file, result)
    print(
        json.dumps({key: value for key, value in result.items() if key not in ("log", "samples", "inputs")}, indent=1)
    )
