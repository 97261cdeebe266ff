"""Exported models in two generations of transformers: `python benchmarks/readers.py OTHER_PYTHON` prints a table.

OTHER_PYTHON is the python of an environment with torch and transformers 4.57. Each family of tests/families.py gets
what export.py adds to a model; both generations then render questions, tokenize them and score a text. It ends with 1
if they differ. With --plain the models stay as transformers saves them.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [
    "1 + 1 は？",
    "  前後に空白  ",
    "改行\n\n\tと{波}かっこ {{ x }} {% y %}",
    "絵文字😀👨\u200d👩\u200d👧と'引用'\"符\" \\n",
]


def read(folder: Path) -> None:
    """What this process's transformers makes of the models in a folder: printed as JSON in the last line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}
    for model_dir in sorted(folder.iterdir()):
        row = found[model_dir.name] = {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
            texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            row["rendered"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            row["ids"] = [tokenizer(question)["input_ids"] for question in QUESTIONS]
        except Exception as error:
            row["problem"] = type(error).__name__
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        ids = torch.arange(1, 1501) * 7919 % (model.config.get_text_config().vocab_size - 10)
        with torch.no_grad():
            row["logits"] = model(ids[None], use_cache=False).logits[0, ::37].tolist()
    print(json.dumps(found))


def write(folder: Path, plain: bool) -> dict[str, list[list[int]]]:
    """Write the families; returns the token ids of their training prompts."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from families import FAMILIES, make_checkpoint

    import helpers

    expected = {}
    for family in FAMILIES:
        name = family.replace(" ", "-")
        tokenizer = helpers.models.load_tokenizer(str(make_checkpoint(family, folder / name)))
        if not plain:
            helpers.formats.make_readable(folder / name, tokenizer, "2024", 1.1)
        expected[name] = [helpers.encode(tokenizer, helpers.sft_text(text, "", "")).ids for text in QUESTIONS]
    return expected


def read_with(python: str, folder: Path) -> dict[str, dict]:
    """What the transformers of another python makes of the models in a folder."""
    command = [python, __file__, "--read", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(expected: dict, here: dict, there: dict) -> list[list[str]]:
    """A row per family; the last column says whether everything is equal."""
    rows = []
    for name, prompts in expected.items():
        new, old = here[name], there[name]
        gap, equal, places = 0.0, 0, len(new["logits"])
        for a, b in zip(new["logits"], old["logits"], strict=True):
            gap = max(gap, *(abs(x - y) for x, y in zip(a, b, strict=True)))
            equal += a.index(max(a)) == b.index(max(b))
        rendered = [found.get("problem") or str(found["rendered"] == prompts) for found in (new, old)]
        ids = "" if "problem" in old or "problem" in new else str(new["ids"] == old["ids"])
        good = rendered == ["True", "True"] and ids == "True" and gap < 1e-3
        rows.append([name, *rendered, ids, f"{gap:.1e}", f"{equal} of {places}", "yes" if good else "no"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="python of an environment with transformers 4.57")
    parser.add_argument("--plain", action="store_true", help="leave out what export.py adds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        expected = write(folder, options.plain)
        rows = compare(expected, read_with(sys.executable, folder), read_with(options.python, folder))
    print("| family | prompt ids, here | there | plain ids equal | logits differ by | first choices equal | equal |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.exit(any(row[-1] == "no" for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        main()
