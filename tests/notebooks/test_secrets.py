"""Keys never reach a file: neither an executed notebook nor a log, a report, a checkpoint or wandb's folder."""

import shutil

from conftest import execute

import helpers

KEYS = {
    "HF_TOKEN": "hf_" + "Zq7" * 11 + "x",
    "WANDB_API_KEY": "5ec2e7" * 6 + "beef",
    "JUDGE_API_KEY": "sk-" + "Jd4" * 9,
}


def test_no_secret_in_anything_that_is_written(smoke, tmp_path, monkeypatch):
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)
        assert helpers.machine.secret(name) == key
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("quantized", "filtered_magpie.jsonl", "filtered_magpie.jsonl.record.json"):
        copy = shutil.copytree if (smoke / name).is_dir() else shutil.copy
        copy(smoke / name, tmp_path / name)
    execute("03_sft", tmp_path, max_steps=2, warmup_steps=0, wandb_project="secrets")
    execute("04_rag_inference", tmp_path, max_new_tokens=4)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"03_sft.ipynb", "04_rag_inference.ipynb", "sft_metrics.json", "inference_metrics.json"} <= names
    assert [name for name in names if name.endswith(".wandb")], "wandb wrote nothing: it was not switched on"
    holds = [(path, name) for path in files for name, key in KEYS.items() if key.encode() in path.read_bytes()]
    assert not holds
