"""Two questions about a model that notebook 3 has fine-tuned (`merged/`, written with `export_merged`).

    python benchmarks/preferences.py dpo --model MERGED --rows ROWS.jsonl --count 2000 --out DIR --seed 1
    python benchmarks/preferences.py mbr --model MERGED --tasks TASKS.jsonl --out DIR --seed 1

dpo: direct preference optimization on the first rows of a file. The row's answer is preferred to one that the model
itself samples, so no judge is needed. Writes DIR/adapter for notebook 4 (with `model` = MERGED), DIR/dpo.json, and
DIR/pairs.jsonl, which notebook 3 reads as `train_data`: the same rows for one more epoch.
mbr: sample several answers and keep the one most like the others (minimum Bayes risk). Writes DIR/mbr.json and, for
compare.py, the folders DIR/greedy, DIR/first (the first sample) and DIR/mbr. A finished run is not repeated.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps between rows of different length
import helpers

NEW_TOKENS, MAX_LENGTH = 256, 1024  # of a sampled answer; of question and answer together
PAIRS_AT_A_TIME, PAIRS_PER_STEP = 4, 32
# trl's example for a model of 0.5B makes 1,000 steps with 5e-6 and alpha / r = 1/2; 2,000 pairs are 63 steps here.
# With this rate, rate x steps x alpha / r is the same.
TRAINING = {"beta": 0.1, "learning_rate": 4e-5, "num_train_epochs": 1, "warmup_steps": 0.1}  # warm-up: a share
TRAINING |= {"lr_scheduler_type": "linear", "max_length": MAX_LENGTH}
LORA = {"r": 64, "lora_alpha": 64, "lora_dropout": 0, "bias": "none"}
# top_k = 0: by default transformers would sample from the 50 likeliest tokens only.
OWN_ANSWER = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
# Greedy answers and samples alike get the penalty of notebook 4, so that they differ in the choice of tokens alone.
GREEDY = {"do_sample": False, "repetition_penalty": 1.1}
SAMPLE = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.1}
SAMPLES = 8


def load(name: str) -> tuple[Any, Any]:
    """The model with the fastest attention that is right for it, and its tokenizer."""
    dtype = helpers.compute_dtype()
    model, tokenizer = helpers.load_model(name, "transformers", max_seq_length=MAX_LENGTH, dtype=dtype)
    if not getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("sdpa")  # it leaves out the softcapping of Gemma 2
    return model.eval(), tokenizer


def write_answers(
    model: Any, tokenizer: Any, questions: Sequence[str], decoding: dict[str, Any], batch_tokens: int = 100_000
) -> list[tuple[str, bool]]:
    """An answer to each question in the training prompt, and whether it was cut at NEW_TOKENS.

    A batch holds prompts of similar length, as many as come to `batch_tokens` together with their answers.
    """
    import torch

    prompts = [helpers.encode(tokenizer, helpers.sft_text(question, "", "")).ids for question in questions]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, tuple[str, bool]] = {}
    while waiting:
        width = len(prompts[waiting[0]])
        size = max(1, batch_tokens // (width + NEW_TOKENS))
        chosen, waiting = waiting[:size], waiting[size:]
        ids = [[tokenizer.pad_token_id] * (width - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        with torch.inference_mode():
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            written = model.generate(**batch, max_new_tokens=NEW_TOKENS, **decoding)[:, width:].tolist()
        for i, row in zip(chosen, written, strict=True):
            cut = not set(row) & set(model.generation_config.eos_token_id)
            answers[i] = tokenizer.decode(row, skip_special_tokens=True), cut
    return [answers[i] for i in range(len(prompts))]


def pair_ids(tokenizer: Any, pair: dict[str, Any]) -> dict[str, list[int]]:
    """The token ids of a pair (input, output, rejected, cut), named as trl names them.

    As in notebook 3 there is one <bos>, in front, and the end token behind each answer; it is missing behind one that
    was cut, because the model did not end there. RecipeError for control tokens anywhere else.
    """
    begin, end = helpers.encode(tokenizer, "").ids, tokenizer.eos_token_id
    prompt = helpers.encode(tokenizer, helpers.sft_text(pair["input"], "", "")).ids
    chosen, rejected = (helpers.encode_within(tokenizer, pair[name]) for name in ("output", "rejected"))
    if prompt[: len(begin)] != begin or {*begin, end} & {*prompt[len(begin) :], *chosen, *rejected}:
        raise helpers.RecipeError(f"no <bos>, or a control token in the middle: {pair['input'][:60]!r}")
    return {"prompt_ids": prompt, "chosen_ids": [*chosen, end], "rejected_ids": rejected + [end] * (not pair["cut"])}


def make_pairs(tokenizer: Any, rows: Sequence[dict], answers: Sequence[tuple[str, bool]]) -> tuple[list[dict], Counter]:
    """Rows (input, output, rejected, cut) with the model's answers as `rejected`; the number left out by reason."""
    pairs, left_out = [], Counter()
    for row, (answer, cut) in zip(rows, answers, strict=True):
        pair = row | {"rejected": answer, "cut": cut}
        prompt, *texts = map(len, pair_ids(tokenizer, pair).values())
        if not answer.strip():
            left_out["empty"] += 1
        elif answer.strip() == row["output"].strip():
            left_out["equal"] += 1
        elif prompt + max(texts) > MAX_LENGTH:
            left_out["too long"] += 1
        else:
            pairs.append(pair)
    return pairs, left_out


def make_trainer(model: Any, tokenizer: Any, pairs: Sequence[dict], out: Path, seed: int) -> Any:
    """trl's DPOTrainer over token ids, with a new LoRA adapter; the reference is the model without it."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # trl takes an "<eos>" written in a text for the end token, and puts one behind cut answers

    dtype = str(model.dtype).removeprefix("torch.")
    options = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "use_cpu": model.device.type == "cpu"}
    options |= {"save_strategy": "no", "report_to": "none", "logging_steps": 5, "seed": seed}
    options |= {"per_device_train_batch_size": PAIRS_AT_A_TIME, "gradient_checkpointing": False}
    options |= {"gradient_accumulation_steps": PAIRS_PER_STEP // PAIRS_AT_A_TIME}
    set_seed(seed)
    lora = LoraConfig(**LORA, target_modules=helpers.lora_targets(model.config), task_type="CAUSAL_LM")
    data = Dataset.from_list([pair_ids(tokenizer, pair) for pair in pairs])
    args = DPOConfig(output_dir=str(out), **options, **TRAINING)
    trainer = PairTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=args, peft_config=lora)
    # trl's loss in chunks, summed in float32: all logits would be 262,144 values per token. As an argument this switch
    # would also bring Liger's kernels, which need a GPU.
    trainer.use_liger_kernel = True
    return trainer


def train_on_preferences(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, train and save the adapter; returns the report."""
    import torch
    from transformers import set_seed

    inputs = {"model": helpers.model_source(args.model), "train_data": helpers.data_source(args.rows)}
    model, tokenizer = load(args.model)
    rows = helpers.load_pairs(args.rows)[: args.count]
    set_seed(args.seed)
    started = time.perf_counter()
    answers = write_answers(model, tokenizer, [row["input"] for row in rows], OWN_ANSWER)
    pairs, left_out = make_pairs(tokenizer, rows, answers)
    helpers.write_jsonl(args.out / "pairs.jsonl", pairs)
    seconds = {"sampling": round(time.perf_counter() - started, 1)}
    print(f"{len(pairs):,} pairs of {len(rows):,} rows; left out: {dict(left_out)}; {seconds}", flush=True)
    trainer = make_trainer(model, tokenizer, pairs, args.out, args.seed)
    started = time.perf_counter()
    trainer.train()
    seconds["training"] = round(time.perf_counter() - started, 1)
    lm, adapter = trainer.model.to(model.dtype), args.out / "adapter"
    lm.peft_config["default"].target_modules = sorted(lm.peft_config["default"].target_modules)  # always in one order
    lm.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    settings = TRAINING | LORA | OWN_ANSWER | {"new_tokens": NEW_TOKENS, "pairs_per_step": PAIRS_PER_STEP}
    settings |= {"seed": args.seed, "count": args.count, "pairs": helpers.sha256_file(args.out / "pairs.jsonl")}
    record = helpers.make_record("preferences", inputs, settings, ["torch", "transformers", "peft", "trl"])
    facts = {"pairs": f"{len(pairs):,}, the row's answer preferred to a sampled one", "rows left out": dict(left_out)}
    facts |= {"sampled answers cut": sum(pair["cut"] for pair in pairs), "steps": trainer.state.global_step}
    card = helpers.model_card("LoRA adapter, trained on preferences", record, ["peft", "lora", "dpo"], facts)
    (adapter / "README.md").write_text(card, encoding="utf-8")
    helpers.write_record(adapter, record)
    peak = round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None
    return {"settings": settings, **facts, "seconds": seconds, "peak_gpu_gib": peak, "log": trainer.state.log_history}


def consensus(answers: Sequence[str]) -> int:
    """The index of the answer that is most like the others: its mean chrF against them is the largest."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    rated = [
        [chrf.sentence_score(a, [b]).score for j, b in enumerate(answers) if j != i] for i, a in enumerate(answers)
    ]
    return max(range(len(answers)), key=lambda i: sum(rated[i]))


def compare_decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the tasks in three ways and score them; returns the report."""
    from transformers import set_seed

    tasks = helpers.read_tasks(args.tasks)
    inputs = {"model": helpers.model_source(args.model), "tasks": helpers.rows_source(args.tasks, tasks)}
    model, tokenizer = load(args.model)
    set_seed(args.seed)
    answers, clock = {}, [time.perf_counter()]
    for name, times, decoding in (("greedy", 1, GREEDY), ("first", 1, SAMPLE), ("others", SAMPLES - 1, SAMPLE)):
        questions = [task["input"] for task in tasks for _ in range(times)]
        written = write_answers(model, tokenizer, questions, decoding)
        written = [(helpers.clean_answer(text), cut and "### 質問" not in text) for text, cut in written]
        answers[name] = [written[i : i + times] for i in range(0, len(written), times)]
        clock.append(time.perf_counter())
    samples = [first + others for first, others in zip(answers["first"], answers.pop("others"), strict=True)]
    picked = [consensus([text for text, _ in group]) for group in samples]
    answers["mbr"] = [[group[index]] for group, index in zip(samples, picked, strict=True)]
    clock.append(time.perf_counter())
    seconds = {"greedy": clock[1] - clock[0], "first": clock[2] - clock[1], "mbr": clock[4] - clock[1]}
    settings = {"greedy": GREEDY, "sample": SAMPLE, "samples": SAMPLES, "new_tokens": NEW_TOKENS, "seed": args.seed}
    report = {"settings": settings, "seconds": seconds, "mean": {}, "inputs": inputs}
    for arm, groups in answers.items():
        texts, cut = zip(*(group[0] for group in groups), strict=True)
        file = args.out / arm / "output.jsonl"
        helpers.write_jsonl(file, [task | {"output": text} for task, text in zip(tasks, texts, strict=True)])
        per_task = helpers.score_texts(tasks, texts, cut)
        scores = {"mean": helpers.summarize_scores(per_task), "near_duplicates": [], "per_task": per_task}
        scores |= {"tasks_sha256": helpers.digest_tasks(tasks), "output_sha256": helpers.sha256_file(file)}
        helpers.write_json(file.with_name("scores.json"), scores | {"seconds": seconds[arm]})
        report["mean"][arm] = {measure: round(row["mean"], 4) for measure, row in scores["mean"].items()}
    return report | {"samples": samples, "picked": picked}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["dpo", "mbr"])
    for option in ("--model", "--rows", "--tasks"):
        parser.add_argument(option)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    report_file = arguments.out / f"{arguments.question}.json"
    if report_file.is_file():
        sys.exit(print(f"{report_file} is there: finished"))
    result = (train_on_preferences if arguments.question == "dpo" else compare_decoding)(arguments)
    helpers.write_json(report_file, result)
    shown = {key: value for key, value in result.items() if key not in ("inputs", "log", "samples", "picked")}
    print(json.dumps(shown, indent=1, ensure_ascii=False))
