"""Examples in the chat format: as earlier turns or in one user turn? The likelihood of references tells.

    python benchmarks/chat_shots.py --run outputs/study/runs/chat_format-1 --tasks TASKS.jsonl --qa QA.jsonl

--run is a run of notebook 3 with text_format "chat". Prints nats per character of the references (lower is better) and
the paired difference with its 95 % interval.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import helpers
from engine import chat


def one_turn(tokenizer: object, instruction: str, shots: list[dict[str, str]]) -> list[int]:
    """The prompt of a question with its examples in the same user turn, written as in 2024."""
    examples = "".join(helpers.SHOT.format(**shot) for shot in reversed(shots))
    return chat.prompt_ids(tokenizer, f"{examples}### 質問:\n{instruction}", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "tasks", "qa", "retriever"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--k", type=int, default=3)
    args = parser.parse_args()
    adapter = helpers.records.model_source(f"{args.run}/adapter", finished=True)
    sources = {"model": adapter["inputs"]["model"], "adapter": adapter}
    tasks, qa = helpers.files.load_tasks(args.tasks), helpers.files.load_pairs(args.qa)
    tasks = [task for task in tasks if helpers.references_of(task)]
    ranker = helpers.retrieval.load(args.retriever, [row["instruction"] for row in qa])
    found = [helpers.retrieval.search(ranker, task["input"], args.k, 512) for task in tasks]
    dtype = helpers.machine.compute_dtype()
    model, tokenizer = (
        helpers.models.load_trained(sources, "transformers", 4096, dtype),
        chat.load_tokenizer(sources),
    )
    nll = {}
    for name, build in {"earlier turns": chat.prompt_ids, "one user turn": one_turn}.items():
        shots = [[qa[hit["index"]] for hit in hits] for hits in found]
        prompts = [build(tokenizer, task["input"], shown) for task, shown in zip(tasks, shots, strict=True)]
        references = [helpers.references_of(task)[0] for task in tasks]
        nll[name] = helpers.likelihood.reference_nll(model, tokenizer, prompts, references)
        print(f"{name}: {sum(nll[name]) / len(tasks):.4f} nats per character, {len(tasks)} tasks")
    gaps = [a - b for a, b in zip(*nll.values(), strict=True)]
    interval = helpers.mean_interval(gaps)
    print(
        f"earlier turns minus one user turn: {interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"
    )


if __name__ == "__main__":
    main()
