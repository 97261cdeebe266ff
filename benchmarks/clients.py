"""Exported models in llama-server against notebook 4: `python benchmarks/clients.py LLAMA_CPP RUN_DIR...`.

RUN_DIR holds notebook 4's answers (k = 0, prompt_style "training" or "chat", ban_words off) and what export.py wrote;
every GGUF file in gguf*/ is served. LLAMA_CPP is the folder of llama.cpp, built. What the file says of sampling
counts, but answers of a base that samples are made greedy. It prints a table, and ends with 1 if a prompt has other
token ids than in the training, or is answered where it should be refused.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from jinja2.exceptions import TemplateError
from readers import QUESTIONS
from transformers import AutoModelForCausalLM
from transformers.generation import RepetitionPenaltyLogitsProcessor

import helpers

Turns = list[dict[str, str]]
PORT = 8199
EARLIER = [{"role": "user", "content": "絵文字😀とは？"}, {"role": "assistant", "content": "𠮷野家の🍚です。"}]
SYSTEM = [{"role": "system", "content": "簡潔に。\n𠮷"}]
WINDOW = 64  # tokens that llama.cpp looks back for its repetition penalty, if the file does not say otherwise


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the server answers; {"error": ...} where it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        return {"error": json.load(error)["error"]["message"]}


@contextlib.contextmanager
def serving(llama_cpp: Path, file: Path) -> Iterator[None]:
    """llama-server with this model, once it is ready."""
    command = [llama_cpp / "build/bin/llama-server", "-m", file, "-c", "4096", "--port", PORT, "-np", "1"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                if ask("/health").get("status") == "ok":
                    break
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


class Run(NamedTuple):
    """A finished run with its export."""

    folder: Path
    tokenizer: Any
    text_format: str
    settings: dict[str, Any]  # of notebook 4
    answers: list[dict[str, Any]]  # task_id, input, output

    def prompt(self, turns: Turns) -> list[int] | None:
        """The token ids of the training of a conversation; None where the training knows no such conversation."""
        if self.text_format == "2024":
            question, controls = turns[0]["content"], helpers.chat.control_tokens(self.tokenizer)
            known = len(turns) == 1 and not any(token in question for token in controls)
            return helpers.encode(self.tokenizer, helpers.sft_text(question, "", "")).ids if known else None
        try:
            return helpers.chat.to_ids(self.tokenizer, helpers.chat.render(self.tokenizer, turns, True))[0]
        except TemplateError:
            return None

    def served_prompt(self, turns: Turns) -> list[int] | None:
        """What llama.cpp should read: where a template refuses a system text, it puts it before the first question."""
        found = self.prompt(turns)
        if found is None and turns[0]["role"] == "system":
            system, question, *rest = turns
            joined = {"role": "user", "content": f"{system['content']}\n{question['content']}"}
            found = self.prompt([joined, *rest])
        return found


def read_run(folder: Path) -> Run:
    tokenizer = helpers.models.load_tokenizer(str(folder / "adapter"))
    text_format = helpers.records.read(folder / "adapter")["settings"]["text_format"]
    if text_format == "chat":
        helpers.chat.prepare(tokenizer)
    settings = helpers.records.read(folder / "output.jsonl")["settings"]
    return Run(folder, tokenizer, text_format, settings, helpers.files.load_rows(folder / "output.jsonl"))


def conversations(run: Run) -> list[Turns]:
    """The tasks and difficult questions alone, then behind an earlier turn, behind a system text, and behind both."""
    questions = [row["input"] for row in run.answers] + QUESTIONS
    questions += [f"{run.tokenizer.eos_token} とは？"] if run.text_format == "2024" else []
    asked = [[{"role": "user", "content": question}] for question in questions]
    behind = (EARLIER, SYSTEM, SYSTEM + EARLIER)
    return asked + [before + turns for before in behind for turns in asked[-3:]]


def read_back(turns: Turns) -> list[int] | None:
    """The token ids that the server makes of a conversation; None where it refuses."""
    text = ask("/apply-template", {"messages": turns}).get("prompt")
    body = {"content": text, "add_special": True, "parse_special": True}
    return None if text is None else ask("/tokenize", body)["tokens"]


def compare_prompts(run: Run) -> tuple[dict[str, str], bool]:
    """Cells of the table: prompts with the ids of the training, and refusals; and whether all are right."""
    pairs = [(run.served_prompt(turns), read_back(turns)) for turns in conversations(run)]
    asked = [found == expected for expected, found in pairs if expected is not None]
    other = [found is None for expected, found in pairs if expected is None]
    cells = {"same prompt ids": asked, "refused as it should": other}
    return {name: f"{sum(right)} of {len(right)}" for name, right in cells.items()}, all(asked + other)


def behind(model: Any, prompt: list[int], answer: list[int], penalty: float) -> float:
    """How far an answer's tokens lie behind the best ones of a model, at most, in logits with llama.cpp's penalty."""
    rule, text = RepetitionPenaltyLogitsProcessor(float(penalty)), prompt + answer
    with torch.no_grad():
        logits = model(torch.tensor([text]), use_cache=False).logits[:, len(prompt) - 1 : -1].float()
    gaps = [0.0]
    for place, token in enumerate(answer, start=len(prompt)):
        scores = rule(torch.tensor([text[:place][-WINDOW:]]), logits[:, place - len(prompt)])[0]
        gaps.append((scores.max() - scores[token]).item())
    return max(gaps)


def common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def whole(text: str) -> str:
    """A text without half a character at its end, which the server drops where an answer is cut."""
    return text.rstrip("\ufffd").strip()


def compare_answers(run: Run, merged: Any) -> dict[str, str]:
    """Cells of the table: answers that are notebook 4's, where others leave them, and how good their tokens are: how
    far the worst token of an answer is behind the best one, for the median answer and the worst.
    """
    same, first, gaps = 0, [], []
    limits = {"stop": [run.settings["stop"]] if run.settings["stop"] else [], "cache_prompt": False}
    if merged.generation_config.do_sample:  # as the base does; notebook 4 never does
        limits["temperature"] = 0
    for row in run.answers:
        turns = [{"role": "user", "content": row["input"]}]
        body = {"messages": turns, "max_tokens": run.settings["max_new_tokens"]}
        text = ask("/v1/chat/completions", body | limits)["choices"][0]["message"]["content"]
        # Its list of logprobs leaves out tokens that end within a character, so the ids come from another question.
        body = {"prompt": run.prompt(turns), "n_predict": run.settings["max_new_tokens"], "return_tokens": True}
        tokens = ask("/completion", body | limits)["tokens"]
        gaps.append(behind(merged, run.prompt(turns), tokens, run.settings["repetition_penalty"]))
        answer, expected = whole(helpers.clean_answer(text)), whole(row["output"])
        same += answer == expected
        if answer != expected:
            first.append(f"{common(answer, expected)} of {len(expected)}")
    return {
        "same answers": f"{same} of {len(run.answers)}",
        "others leave at character": ", ".join(first),
        "logits behind the best of merged/": f"{sorted(gaps)[len(gaps) // 2]:.2f}, at most {max(gaps):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    rows, good = [], True
    for run in map(read_run, options.runs):
        merged = AutoModelForCausalLM.from_pretrained(
            run.folder / "merged", dtype=torch.float32, attn_implementation="eager"
        )
        for file in sorted(run.folder.glob("gguf*/*.gguf")):
            with serving(options.llama_cpp, file):
                cells, right = compare_prompts(run)
                rows.append({"file": file.name, "format": run.text_format} | cells | compare_answers(run, merged))
            good &= right
            print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    sys.exit(not good)


if __name__ == "__main__":
    main()
