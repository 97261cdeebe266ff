"""Two questions about a model that notebook 3 has fine-tuned (`merged/`, written by export.py).

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # no gaps between rows of different length
import helpers

NEW_TOKENS, MAX_LENGTH = 256, 1024  # of a sampled answer; of question and answer together
ANSWERS_AT_A_TIME, PAIRS_AT_A_TIME, PAIRS_PER_STEP = 250, 4, 32
# trl's example for a model of 0.5B makes 1,000 steps with 5e-6 and alpha / r = 1/2; 2,000 pairs are 63 steps here.
# With this rate, rate x steps x alpha / r is the same. Warm-up is a share of the steps.
TRAINING = {"beta": 0.1, "learning_rate": 4e-5, "num_train_epochs": 1, "warmup_steps": 0.1, "max_length": MAX_LENGTH}
LORA = {"r": 64, "lora_alpha": 64, "lora_dropout": 0, "bias": "none"}
OWN_ANSWER = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}  # top_k: by default the best 50 only
# Greedy answers and samples alike get the penalty of notebook 4, so that they differ in the choice of tokens alone.
GREEDY = {"do_sample": False, "repetition_penalty": 1.1}
SAMPLES, SAMPLE = 8, GREEDY | OWN_ANSWER | {"temperature": 0.7}


def load(name: str) -> tuple[Any, Any]:
    """The model with the fastest attention that is right for it, and its tokenizer."""
    dtype = helpers.machine.compute_dtype()
    model, tokenizer = helpers.models.load(name, "transformers", max_seq_length=MAX_LENGTH, dtype=dtype)
    if not getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("sdpa")  # it leaves out the softcapping of Gemma 2
    return model.eval(), tokenizer


def write_answers(model: Any, tokenizer: Any, questions: list[str], decoding: dict) -> list[tuple[str, bool]]:
    """An answer to each question in the training prompt, and whether it was cut at NEW_TOKENS; long prompts first."""
    prompts = [helpers.encode(tokenizer, helpers.sft_text(question, "", "")).ids for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: dict[int, tuple[str, bool]] = {}
    for first in range(0, len(order), ANSWERS_AT_A_TIME):
        chosen = order[first : first + ANSWERS_AT_A_TIME]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        ids = model.generate(**batch.to(model.device), max_new_tokens=NEW_TOKENS, **decoding)
        for i, row in zip(chosen, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            cut = not set(row) & set(model.generation_config.eos_token_id)
            answers[i] = tokenizer.decode(row, skip_special_tokens=True), cut
    return [answers[i] for i in range(len(prompts))]


def pair_ids(tokenizer: Any, pair: dict[str, Any]) -> dict[str, list[int]]:
    """The token ids of a pair (instruction, response, rejected, cut), named as trl names them.

    As in notebook 3 there is one <bos>, in front, and the end token behind each answer; it is missing behind one that
    was cut, because the model did not end there. RecipeError for control tokens anywhere else.
    """
    begin, end = helpers.encode(tokenizer, "").ids, tokenizer.eos_token_id
    prompt = helpers.encode(tokenizer, helpers.sft_text(pair["instruction"], "", "")).ids
    chosen, rejected = (helpers.encode_within(tokenizer, pair[name]) for name in ("response", "rejected"))
    if prompt[: len(begin)] != begin or {*begin, end} & {*prompt[len(begin) :], *chosen, *rejected}:
        raise helpers.RecipeError(f"no <bos>, or a control token in the middle: {pair['instruction'][:60]!r}")
    return {"prompt_ids": prompt, "chosen_ids": [*chosen, end], "rejected_ids": rejected + [end] * (not pair["cut"])}


def make_pairs(tokenizer: Any, rows: list[dict], answers: list[tuple[str, bool]]) -> tuple[list[dict], Counter]:
    """Rows with the model's answers as `rejected` (see `pair_ids`), and the number left out by reason."""
    pairs, left_out = [], Counter()
    for row, (answer, cut) in zip(rows, answers, strict=True):
        pair = row | {"rejected": answer, "cut": cut}
        prompt, *texts = map(len, pair_ids(tokenizer, pair).values())
        reasons = {"empty": not answer.strip(), "equal": answer.strip() == row["response"].strip()}
        reasons["too long"] = prompt + max(texts) > MAX_LENGTH
        left_out.update([name for name, holds in reasons.items() if holds][:1])
        pairs += [] if any(reasons.values()) else [pair]
    return pairs, left_out


def make_trainer(model: Any, tokenizer: Any, pairs: list[dict], out: Path, seed: int) -> Any:
    """trl's DPOTrainer over token ids, with a new LoRA adapter; the reference is the model without it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # trl takes an "<eos>" written in a text for the end token, and puts one behind cut answers

    options = TRAINING | {"save_strategy": "no", "report_to": "none", "logging_steps": 5, "seed": seed}
    options |= {"bf16": str(model.dtype) == "torch.bfloat16", "use_cpu": model.device.type == "cpu"}
    options |= {"per_device_train_batch_size": PAIRS_AT_A_TIME, "gradient_checkpointing": False}
    options |= {"gradient_accumulation_steps": PAIRS_PER_STEP // PAIRS_AT_A_TIME, "output_dir": str(out)}
    lora = LoraConfig(**LORA, **helpers.shapes.lora_targets(model.config), task_type="CAUSAL_LM")
    data = Dataset.from_list([pair_ids(tokenizer, pair) for pair in pairs])
    args = DPOConfig(**options)
    trainer = PairTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=args, peft_config=lora)
    # trl's loss in chunks, summed in float32: all logits would be 262,144 values per token. As an argument this switch
    # would also bring Liger's kernels, which need a GPU.
    trainer.use_liger_kernel = True
    return trainer


def train_on_preferences(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, train and save the adapter; returns the report."""
    inputs = {"model": helpers.records.model_source(args.model), "train_data": helpers.records.data_source(args.rows)}
    model, tokenizer = load(args.model)
    rows = helpers.files.load_pairs(args.rows)[: args.count]
    started = time.perf_counter()
    answers = write_answers(model, tokenizer, [row["instruction"] for row in rows], OWN_ANSWER)
    pairs, left_out = make_pairs(tokenizer, rows, answers)
    helpers.files.write_jsonl(args.out / "pairs.jsonl", pairs)
    sampled = time.perf_counter()
    model.set_attn_implementation("eager")  # a padded row can have queries that see no key: kernels differ in that
    trainer = make_trainer(model, tokenizer, pairs, args.out, args.seed)
    trainer.train()
    if not all(parameter.isfinite().all() for parameter in trainer.model.parameters() if parameter.requires_grad):
        raise helpers.RecipeError("the training has diverged to nan: another seed or a smaller learning_rate")
    seconds = {"sampling": round(sampled - started, 1), "training": round(time.perf_counter() - sampled, 1)}
    lm, adapter = trainer.model.to(model.dtype), args.out / "adapter"
    lm.peft_config["default"].target_modules = sorted(lm.peft_config["default"].target_modules)  # always in one order
    lm.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    settings = TRAINING | LORA | OWN_ANSWER | {"new_tokens": NEW_TOKENS, "pairs_per_step": PAIRS_PER_STEP}
    settings |= {"seed": args.seed, "count": args.count, "pairs": helpers.files.sha256(args.out / "pairs.jsonl")}
    record = helpers.records.make("preferences", inputs, settings, ["torch", "transformers", "peft", "trl"])
    facts = {"rows": len(rows), "pairs": len(pairs), "left out": dict(left_out), "cut": sum(p["cut"] for p in pairs)}
    card = helpers.records.model_card("LoRA adapter, trained on preferences", record, ["peft", "lora", "dpo"], facts)
    helpers.records.write_with_card(adapter, record, card)
    return {"settings": settings, **facts, "seconds": seconds, "log": trainer.state.log_history}


def consensus(answers: list[str]) -> int:
    """The index of the answer that is most like all of them by chrF; its likeness to itself is the same for each."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    likeness = [sum(chrf.sentence_score(answer, [other]).score for other in answers) for answer in answers]
    return likeness.index(max(likeness))


def compare_decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the tasks in three ways and score them; returns the report."""
    tasks, (model, tokenizer) = helpers.files.load_tasks(args.tasks), load(args.model)
    answers, seconds = {}, {}  # answers: per task one or several (text, cut)
    for name, times, decoding in (("greedy", 1, GREEDY), ("first", 1, SAMPLE), ("others", SAMPLES - 1, SAMPLE)):
        started = time.perf_counter()
        written = write_answers(model, tokenizer, [task["input"] for task in tasks for _ in range(times)], decoding)
        written = [(helpers.clean_answer(text), cut and "### 質問" not in text) for text, cut in written]
        answers[name] = [written[i : i + times] for i in range(0, len(written), times)]
        seconds[name] = time.perf_counter() - started
    started = time.perf_counter()
    samples = [first + others for first, others in zip(answers["first"], answers.pop("others"), strict=True)]
    answers["mbr"] = [[group[consensus([text for text, _ in group])]] for group in samples]
    seconds["mbr"] = seconds["first"] + seconds.pop("others") + time.perf_counter() - started
    seconds = {arm: round(spent, 1) for arm, spent in seconds.items()}
    settings = {"greedy": GREEDY, "sample": SAMPLE, "samples": SAMPLES, "new_tokens": NEW_TOKENS, "seed": args.seed}
    for arm, groups in answers.items():
        texts, cut = zip(*(group[0] for group in groups), strict=True)
        file = args.out / arm / "output.jsonl"
        helpers.files.write_jsonl(file, [task | {"output": text} for task, text in zip(tasks, texts, strict=True)])
        per_task = helpers.score_texts(tasks, texts, cut)
        scores = {"mean": helpers.summarize_scores(per_task), "near_duplicates": [], "per_task": per_task}
        scores |= {"tasks_sha256": helpers.digest_tasks(tasks), "output_sha256": helpers.files.sha256(file)}
        helpers.files.write_json(file.with_name("scores.json"), scores | {"seconds": seconds[arm]})
    return {
        "model": helpers.records.model_source(args.model),
        "settings": settings,
        "seconds": seconds,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["dpo", "mbr"])
    for name, kind, default in (("count", int, 2000), ("seed", int, 1), ("out", Path, Path("outputs/preferences"))):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("model", "rows", "tasks"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    file = args.out / f"{args.question}.json"
    if file.is_file():
        return print(f"{file} is there: finished")
    import torch
    import transformers

    transformers.set_seed(args.seed)
    report = (train_on_preferences if args.question == "dpo" else compare_decoding)(args)
    report["peak_gpu_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None
    helpers.files.write_json(file, report)
    print(file, json.dumps({key: value for key, value in report.items() if key not in ("log", "model", "samples")}))


if __name__ == "__main__":
    main()
