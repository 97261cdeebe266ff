"""Colab's secrets and Drive, the fit estimate, data licences and cards."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from transformers import (
    Gemma2Config,
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

import helpers
from helpers import RecipeError

GEMMA = {  # hidden, inner, layers, heads, key heads, width of a head
    "google/gemma-2-27b": (4608, 36864, 46, 32, 16, 128),
    "google/gemma-2-9b": (3584, 14336, 42, 16, 8, 256),
    "google/gemma-2-2b": (2304, 9216, 26, 8, 4, 256),
}
GEOMETRY = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


LOCAL_AND_GLOBAL = {"head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True, "sliding_window": 1024}
LOCAL_AND_GLOBAL |= {"hidden_size_per_layer_input": 0}
DELTA = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "vocab_size": 248_320, "tie_word_embeddings": False}
OTHERS = {  # class, sizes, other values
    "google/gemma-4-31B": (
        Gemma4TextConfig,
        (5376, 21504, 60, 32, 16),
        LOCAL_AND_GLOBAL | {"num_global_key_value_heads": 4},
    ),
    "google/gemma-4-12B": (
        Gemma4TextConfig,
        (3840, 15360, 48, 16, 8),
        LOCAL_AND_GLOBAL | {"num_global_key_value_heads": 1},
    ),
    "Qwen/Qwen3.5-9B-Base": (Qwen3_5TextConfig, (4096, 12288, 32, 16, 4, 256), DELTA),
    "Qwen/Qwen3-8B-Base": (Qwen3Config, (4096, 12288, 36, 32, 8, 128), {}),
    "Qwen/Qwen3-4B-Instruct-2507": (Qwen3Config, (2560, 9728, 36, 32, 8, 128), {"tie_word_embeddings": True}),
    "tokyotech-llm/Qwen3-Swallow-8B-CPT-v0.2": (Qwen3Config, (4096, 12288, 36, 32, 8, 128), {}),
    "tokyotech-llm/Qwen3-Swallow-32B-CPT-v0.2": (Qwen3Config, (5120, 25600, 64, 64, 8, 128), {}),
    # by the card of llm-jp-4-8b
    "llm-jp/llm-jp-4-8b-base": (LlamaConfig, (4096, 14336, 32, 32, 8, 128), {"vocab_size": 196_608}),
}


def config(name: str) -> PreTrainedConfig:
    """A config with a model's sizes, as its card or config.json gives them."""
    if name.startswith(("google/gemma-2", "tokyotech-llm/Gemma")):
        sizes = GEMMA.get(name) or GEMMA["google/gemma-2-27b"]
        return Gemma2Config(vocab_size=256_000, **dict(zip(GEOMETRY, sizes, strict=True)))
    kind, sizes, values = OTHERS[name]
    values = {"tie_word_embeddings": False} | values if kind is not Gemma4TextConfig else values
    return kind(**dict(zip(GEOMETRY, sizes, strict=False)) | values)


class TestFit:
    @pytest.mark.parametrize(
        ("settings", "measured"),
        [
            # benchmarks/RESULTS.md: 27B, r = 64. Rows of 8 and 16 texts of 631 tokens in the mean; the longest row of
            # a step makes the peak and holds about 6,700 and 11,700 (mean over random orders of the same lengths).
            ({"batch_size": 8, "length": 838}, 26.9),
            ({"batch_size": 16, "length": 731}, 31.3),
            ({"slots": 3, "columns": 3400}, 23.4),
            ({"slots": 46, "columns": 3400}, 78.0),
        ],
    )
    def test_agrees_with_the_measured_peaks(self, settings, measured):
        need = helpers.shapes.estimate_memory(config("google/gemma-2-27b"), four_bit=True, r=64, **settings)
        assert sum(need.values()) == pytest.approx(measured, rel=0.07)

    @pytest.mark.parametrize(
        ("name", "settings", "measured"),
        [
            # benchmarks/RESULTS.md, one H100: the longest row of 16 texts held 12,346 tokens.
            ("Qwen/Qwen3-8B-Base", {"r": 64, "batch_size": 16, "length": 771}, 14.95),
            ("Qwen/Qwen3-8B-Base", {"slots": 24, "columns": 3192}, 17.93),
        ],
    )
    def test_agrees_with_the_measured_peaks_of_another_family(self, name, settings, measured):
        need = helpers.shapes.estimate_memory(config(name), four_bit=True, **settings)
        assert sum(need.values()) == pytest.approx(measured, rel=0.08)

    @pytest.mark.parametrize(("settings", "per_score"), [({"batch_size": 2}, 12), ({"slots": 2}, 10)])
    def test_padded_texts_cost_their_attention_scores(self, settings, per_score):
        """A layer of bf16 alone on a CPU took 12.4 bytes per head and pair of tokens in training, 10.3 in answering."""
        estimate = partial(helpers.shapes.estimate_memory, config("Qwen/Qwen3-8B-Base"), four_bit=True)
        settings |= {"length" if "batch_size" in settings else "columns": 2048}
        without, need = estimate(**settings), estimate(**settings, eager=True)
        assert without.pop("attention scores") == 0
        scores = need.pop("attention scores")
        assert scores == pytest.approx(per_score * 2 * 32 * 2048**2 / 2**30, rel=0.01) and need == without

    def test_unquantized_weights_cost_more(self):
        need = helpers.shapes.estimate_memory(config("google/gemma-2-27b"), four_bit=False, r=64)
        assert need["weights"] == pytest.approx(27.2e9 * 2 / 2**30, rel=0.01)

    @pytest.mark.parametrize(
        ("run_file", "free_gib"),
        [
            ("t4", 14.6),
            ("l4", 22.0),
            ("a100", 39.0),
            ("h100", 79.0),
            ("seed2024", 39.0),
            ("g4", 94.0),
            ("swallow27b", 39.0),
            ("llmjp4-8b", 22.0),
            ("qwen3-8b", 22.0),
            ("gemma4-31b", 39.0),
            ("gemma4-12b", 22.0),
            ("qwen3.5-9b", 22.0),
            ("qwen3-4b", 14.6),
            ("qwen3-swallow-8b", 22.0),
            ("qwen3-swallow-32b", 39.0),
        ],
    )
    def test_run_files_fit_their_gpus(self, run_file, free_gib):
        run = yaml.safe_load((ROOT / f"data/runs/{run_file}.yaml").read_text(encoding="utf-8"))
        values = {"r": 64, "max_seq_length": 2048, "per_device_train_batch_size": 4, "engine": "transformers"}
        values |= {"base_model": "google/gemma-2-27b"} | run["01_quantize"] | run["03_sft"]
        padded = run_file.startswith("qwen3.5")
        need = helpers.shapes.estimate_memory(
            config(values["base_model"]),
            four_bit=True,
            r=values["r"],
            batch_size=values["per_device_train_batch_size"],
            length=values["max_seq_length"] // (2 if values["engine"] == "transformers" and not padded else 1),
            eager=padded,
        )
        gpu = {"name": run_file, "free_gib": free_gib, "compute_capability": 7.5 if free_gib < 16 else 8.0}
        assert helpers.machine.fit_report(gpu, need, "")[-1] == "it fits"

    def test_report_names_what_to_change(self):
        t4 = {"name": "Tesla T4", "free_gib": 14.6, "compute_capability": 7.5}
        need = helpers.shapes.estimate_memory(
            config("google/gemma-2-27b"), four_bit=True, r=64, batch_size=4, length=2048
        )
        lines = helpers.machine.fit_report(t4, need, "lower the batch")
        assert lines[0] == "Tesla T4, 14.6 GiB free, bfloat16: no, float16 is used"
        assert lines[-1] == "IT WILL NOT FIT: lower the batch, or choose a larger GPU"
        assert lines[1].startswith("this run needs about ") and " GiB of GPU memory: weights " in lines[1]

    def test_report_says_what_it_means_to_have_no_gpu(self):
        first, second = helpers.machine.fit_report(None, {"weights": 2.0, "working memory": 3.0, "adapter": 0.01}, "")
        assert first.startswith("no NVIDIA GPU was found, so the CPU computes: ")
        assert second.endswith("it would need about 5.0 GiB of GPU memory: weights 2.0, working memory 3.0")


@pytest.fixture
def colab(monkeypatch):
    """The two functions of the package google.colab that are used; it exists on Colab alone."""
    package = types.ModuleType("google.colab")
    package.userdata, package.drive = types.SimpleNamespace(), types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "google.colab", package)
    return package


class TestColab:
    def test_secret_is_asked_for_and_does_not_block(self, colab, monkeypatch):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        colab.userdata.get = lambda name: f"value of {name}"
        assert helpers.machine.secret("HF_TOKEN") == "value of HF_TOKEN"
        colab.userdata.get = lambda name: time.sleep(600)  # no browser tab answers
        assert helpers.machine.secret("HF_TOKEN", seconds=0.2) == ""

    def test_drive_is_mounted_only_if_named(self, colab, capsys):
        mounted = []
        colab.drive.mount = mounted.append
        assert helpers.machine.place_outputs("outputs/full", "") == "outputs/full"
        assert "a disconnect loses outputs/full" in capsys.readouterr().out
        assert not mounted
        placed = helpers.machine.place_outputs("outputs/full", "recipe")
        assert Path(placed) == Path("/content/drive/MyDrive/recipe/outputs/full")
        assert helpers.machine.place_outputs(placed, "recipe") == placed  # the cell may run twice
        assert mounted == ["/content/drive"] * 2

    def test_elsewhere_the_folder_stays(self, tmp_path):
        assert helpers.machine.place_outputs(str(tmp_path), "recipe") == str(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/1/x", tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(RecipeError, match=rf"^output_dir {folder} cannot be written") as error:
            helpers.machine.lock_folder(str(folder), "03_sft")
        assert "\n" not in str(error.value)


HOLD = """
import sys, time; sys.path.insert(0, sys.argv[1])
import helpers
helpers.machine.lock_folder(sys.argv[2], "03_sft")
print("locked", flush=True); time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_says_who_holds_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, ROOT, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RecipeError, match=rf"is in use: process {holder.pid} on .* since 20.* runs 03_sft; wait"):
            helpers.machine.lock_folder(tmp_path, "03_sft")
        helpers.machine.lock_folder(tmp_path, "02_filter_magpie")  # another notebook may run at the same time
        holder.kill()  # as by kill -9: the lock is free again
    helpers.machine.lock_folder(tmp_path, "03_sft")
    helpers.machine.lock_folder(tmp_path, "03_sft")  # the cell may run twice


@pytest.mark.parametrize(("number", "visible", "chosen"), [(None, "0", []), ("1", None, [1])])
def test_a_process_uses_one_gpu(monkeypatch, number, visible, chosen):
    """A single process sees the first alone; of several each takes its own, and accelerate has to see them all."""
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is set back after the test
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if number:
        monkeypatch.setenv("LOCAL_RANK", number)
    helpers.machine.start_engine("transformers")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert taken == chosen


def test_package_versions():
    versions = helpers.machine.package_versions(["transformers", "no-such-package"])
    assert versions["no-such-package"] == ""
    assert json.dumps(versions)
    assert versions["transformers"].count(".") >= 1


def test_hub_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert helpers.machine.hub_token("") == ""
    with pytest.raises(RecipeError, match="HF_TOKEN"):
        helpers.machine.hub_token("owner/name")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert helpers.machine.hub_token("owner/name") == "hf_x"
    assert helpers.machine.hub_token("") == ""


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "JUDGE_API_KEY"])
def test_without_colab_a_missing_secret_is_empty(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    assert helpers.machine.secret(name) == ""


class Wandb(BaseHTTPRequestHandler):
    """Answers who the owner of a key is, as wandb's API does."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        key = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode().removeprefix("api:")
        replies = {"good": (200, {"data": {"viewer": {"username": "me"}}}), "old": (200, {"data": {"viewer": None}})}
        replies |= {"ill": (503, {}), "list": (200, []), "bad": (401, {"errors": []})}
        status, body = replies[key]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def wandb(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    server.shutdown()


@pytest.mark.parametrize(
    ("key", "mode"), [("good", "online"), ("", "offline"), ("ill", "offline"), ("list", "offline")]
)
def test_wandb_is_online_with_a_key_and_offline_without(wandb, key, mode):
    assert helpers.machine.wandb_mode(key) == mode


@pytest.mark.parametrize("key", ["bad", "old"])
def test_a_key_that_wandb_refuses_is_named(wandb, key):
    with pytest.raises(helpers.RecipeError, match=r"refuses the key WANDB_API_KEY") as raised:
        helpers.machine.wandb_mode(key)
    assert "\n" not in str(raised.value)


def test_without_network_wandb_is_offline_at_once(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert helpers.machine.wandb_mode("good") == "offline"
    assert "wandb cannot be reached (ConnectionError)" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert helpers.machine.wandb_mode("good") == "disabled"
