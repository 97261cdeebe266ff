"""What an architecture allows: found on a tiny random model, for every kind of model that transformers knows.

`python tests/test_architectures.py` prints the table of benchmarks/results/models.md.
"""

import os
import subprocess
import sys

import families
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForImageTextToText, Gemma2Config, logging
from trl import SFTConfig, SFTTrainer

import helpers
from helpers import RecipeError

logging.set_verbosity_error()

# By model_type, with the values that transformers gives a config of this class.
NAMES = """afmoe apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v3 diffllama ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe
glm4_moe_lite gpt_neox granite granitemoe granitemoeshared helium hy_v3 hyperclovax jais2 laguna lfm2 llama
mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral modernbert-decoder nanochat olmo olmo2 olmo3
olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 solar_open stablelm starcoder2
vaultgemma youtu"""
PADDED_NAMES = """bloom codegen falcon gpt_neo gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa llama4_text
mimo_v2_flash minimax mpt olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next xglm"""
FULL, PADDED = NAMES.split(), PADDED_NAMES.split()
KINDS = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}


def default_config(model_type):
    """The config of a causal language model with the values of its class; None for another kind, or without values."""
    try:
        config = KINDS[model_type]()
    except Exception:  # two models for music: "text_encoder: None"
        return None
    text = config.get_text_config(decoder=True)
    return None if config.is_encoder_decoder or text is not config else config


@pytest.mark.parametrize("model_type", sorted(filter(default_config, KINDS)))
def test_every_model_type_runs_or_is_refused_in_one_line(model_type):
    config = default_config(model_type)
    try:
        found = helpers.architectures.examine(config)
    except RecipeError as error:
        assert model_type not in FULL + PADDED and "\n" not in str(error)
        return
    assert found.batches
    assert (found.rows and found.slots) == (model_type in FULL)
    assert not found.rows or model_type not in PADDED


GRANITE = {"layer_types": ["linear_attention", "attention"] * 2, "num_hidden_layers": 4, "mamba_n_heads": 128}
DENSE = {"layer_types": ["attention"] * 32, "num_local_experts": 0}
MORE = {
    "Gemma 4 E4B": ("gemma4_text", {"num_kv_shared_layers": 6, "num_hidden_layers": 12}, "full"),
    "Gemma 4 31B": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 4, "num_hidden_layers": 12},
        "full",
    ),
    "Granite 4 H, experts": ("granitemoehybrid", GRANITE, "padded"),
    "LFM 2 with experts": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 16}, "padded"),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 128}, "full"),
    "Hunyuan with experts, whose router is a layer": ("hunyuan_v1_moe", {"head_dim": 128}, "full"),
    "Ministral": ("ministral", {"head_dim": 128}, "full"),
    "Minitron": ("nemotron", {"head_dim": 128, "num_key_value_heads": 8}, "full"),
    "Granite 4, attention only": ("granitemoehybrid", DENSE, "full"),
    "a model that sees the tokens to come": ("gemma3_text", {"use_bidirectional_attention": True}, "tokens to come"),
    "Mamba 2": ("mamba2", {}, "cannot be trained with LoRA"),
    "RWKV": ("rwkv", {}, "LoRA does not reach rwkv"),
}


@pytest.mark.parametrize("name", MORE)
def test_other_values_of_a_config_count(name, capsys):
    model_type, values, expected = MORE[name]
    config = KINDS[model_type](**values)
    if expected not in ("full", "padded"):
        with pytest.raises(RecipeError, match=f"^{model_type} models do not fit this recipe: .*{expected}"):
            helpers.architectures.check(config, "transformers")
        return
    found = helpers.architectures.check(config, "transformers")
    assert found == helpers.architectures.Architecture(expected == "full", expected == "full", batches=True)
    ways = ("end to end in rows", "in slots") if found.rows else ("padded", "in batches")
    said = capsys.readouterr().out
    assert said.startswith("{}: texts are trained {}, and answers decoded {}\n".format(model_type, *ways))
    assert ("billion weights are experts and stay in 16 bit" in said) == ("experts" in name)


SHARED = {"num_kv_shared_layers": 6, "num_hidden_layers": 12}


@pytest.mark.parametrize(
    ("model_type", "values"), [("gemma2", {}), ("gemma4_text", SHARED), ("qwen3_moe", {}), ("ministral3", {})]
)
def test_a_checkpointed_row_gives_the_gradients_of_padded_texts(model_type, values):
    """Layers that share keys, experts, and attention that is not told the positions: computed twice, all the same."""
    config, texts = KINDS[model_type](**values), [list(range(3, 43)), [7, 9, 8], list(range(50, 81))]
    found = []
    for padded in (True, False):
        model = helpers.architectures.tiny(config)
        if not padded:
            assert helpers.rows.switch_on(model, texts)
        torch.manual_seed(0)
        lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **helpers.shapes.lora_targets(config))
        model = get_peft_model(model, lora).train()
        if padded:
            width = max(map(len, texts))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
            inputs, known = {"attention_mask": (ids > 0).long()}, ids > 0
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
            positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
            ids = torch.tensor([[token for text in texts for token in text]])
            inputs, known = {"position_ids": positions}, positions > 0
        model(input_ids=ids, labels=ids.where(known, -100), use_cache=False, **inputs).loss.backward()
        gradients = [p.grad.flatten() for name, p in model.named_parameters() if "lora_" in name and p.grad is not None]
        found.append(torch.cat(gradients))
    assert (found[1] - found[0]).norm() < 1e-3 * found[0].norm()


def test_an_answer_follows_if_each_token_is_the_likeliest():
    """Also the first and the last one, and none after another beginning."""
    model, prompt = helpers.architectures.tiny(KINDS["gemma2"]()), list(range(3, 40))
    (answer,) = helpers.architectures.together(model, [prompt])
    assert len(answer) == 6 and helpers.architectures.follows(model, prompt, answer)
    assert answer == families.greedy(model, prompt, 6, lambda _, scores: scores, lambda *_: [False], True)
    for changed in (0, 3, 5):
        other = [token ^ (index == changed) for index, token in enumerate(answer)]
        assert not helpers.architectures.follows(model, prompt, other)


def test_a_tiny_model_has_every_kind_of_layer_once():
    config = KINDS["gemma3_text"](layer_types=["sliding_attention"] * 5 + ["full_attention"], num_hidden_layers=6)
    model = helpers.architectures.tiny(config)
    assert model.config.layer_types == config.layer_types and model.config.sliding_window == 24
    assert model.config.head_dim == config.head_dim and model.num_parameters() < 1e8
    again = helpers.architectures.tiny(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "family", [name for name, (kind, *_) in families.FAMILIES.items() if kind in families.WRAPPERS]
)
def test_the_text_part_of_a_multimodal_model_has_the_scores_of_the_whole(tmp_path, capsys, family):
    checkpoint = families.make_checkpoint(family, tmp_path)
    part, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512, dtype="float32")
    ids = torch.tensor([helpers.encode(tokenizer, families.PROMPTS[-1]).ids])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, whole(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    config = helpers.models.text_config(str(checkpoint))
    said = capsys.readouterr().out
    assert f"the text part of {whole.config.model_type} is used, without its other " in said
    assert config.tie_word_embeddings == whole.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["gemma2", "gemma4", "gemma4 e4b", "qwen3.5", "gpt-oss", "llama3"])
def test_values_per_token_are_those_of_the_cache(tmp_path, family):
    checkpoint = families.make_checkpoint(family, tmp_path)
    model, _ = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512, dtype="float32")
    with torch.no_grad():
        cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    expected = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert helpers.shapes.values_per_token(model.config) == expected


def adapted(model_type, **values):
    config = KINDS[model_type](**values)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **helpers.shapes.lora_targets(config))
    return get_peft_model(helpers.architectures.tiny(config), lora)


def test_experts_and_linear_layers_of_the_same_names_both_get_an_adapter():
    model = adapted("ernie4_5_moe", moe_layer_start_index=3)  # a tiny model has the first layer with experts, too
    beside = {name.partition(".lora_B")[0] for name, _ in model.named_parameters() if "lora_B" in name}
    for part in ("layers.0.mlp.gate_proj", "layers.3.mlp.shared_experts.down_proj", "layers.3.mlp.experts"):
        assert f"base_model.model.model.{part}" in beside


def test_gradients_are_shown_of_a_model_whose_experts_come_first():
    rows = helpers.lora.first_gradients(adapted("granitemoehybrid", **GRANITE), list(range(3, 40)))
    assert [row["matrix"][0] for row in rows] == ["W", "A", "B"]


@pytest.mark.parametrize(
    ("model_type", "own"), [("granite", True), ("llama4_text", True), ("gemma2", False), ("gpt_bigcode", False)]
)
def test_a_training_has_the_loss_of_the_model_itself(tmp_path, capsys, model_type, own):
    """trl leaves out Granite's scaling of logits, and does not find the decoder of Llama 4; dropout is no reason."""
    values = {"granite": {"logits_scaling": 8.0}, "gpt_bigcode": {"resid_pdrop": 0.5}}.get(model_type, {})
    model, ids = adapted(model_type, **values), list(range(3, 43))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    tokenizer = families.llama3_tokenizer()
    data = Dataset.from_list([{"input_ids": ids, "labels": ids}])
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    helpers.training.check_loss(trainer)
    assert ("its own is used" in capsys.readouterr().out) == own == (args.loss_type == "nll")
    model.eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        scores = model(input_ids=tokens).logits[0, :-1]
        found = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(scores, tokens[0, 1:]))


ON_A_GPU = """
def causal_conv1d_fn(*_, **__):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
causal_conv1d_update = causal_conv1d_fn
"""


def test_kernels_that_run_on_a_gpu_alone_are_named(tmp_path):
    """They cannot be installed here: a package that refuses the CPU as causal-conv1d does."""
    (tmp_path / "causal_conv1d.py").write_text(ON_A_GPU)
    code = "import helpers, transformers; helpers.architectures.check(transformers.Qwen3_5TextConfig(), 'transformers')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    line = done.stderr.splitlines()[-1]
    problem = "it cannot be trained with LoRA (RuntimeError: Expected x.is_cuda() to be true, but got false.)"
    assert f"qwen3_5_text models do not fit this recipe: {problem}" in line
    assert line.endswith("uninstall causal-conv1d, with whose kernels it was tried, and try again")
    assert helpers.architectures.gpu_kernels(Gemma2Config()) == []


def test_unsloth_has_code_of_its_own(capsys):
    """Nothing of transformers is tried, only whether LoRA reaches all matrices."""
    found = helpers.architectures.check(KINDS["gemma2"](), "unsloth")
    assert found == helpers.architectures.Architecture(rows=False, slots=False, batches=True)
    assert "texts are trained padded, and answers decoded in batches" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="rwkv models do not fit"):
        helpers.architectures.check(KINDS["rwkv"](), "unsloth")


def main() -> None:
    """Every model type, by what notebook 1 says of it before it downloads anything."""
    found: dict[str, list[str]] = {}
    for model_type in sorted(KINDS):
        config = default_config(model_type)
        if config is None:
            continue
        try:
            allowed = helpers.architectures.examine(config)
            texts = "rows without padding" if allowed.rows else "padded"
            answers = "slots" if allowed.slots else "batches" if allowed.batches else "one at a time"
            found.setdefault(f"{texts}, {answers}", []).append(model_type)
        except RecipeError as error:
            found.setdefault(f"refused: {error}".replace(model_type, "..."), []).append(model_type)
    print("| what notebook 1 finds | model types | |\n|---|---|---|")
    for said, names in sorted(found.items(), key=lambda item: (item[0].startswith("refused"), -len(item[1]))):
        print(f"| {said} | {len(names)} | {', '.join(names)} |")


if __name__ == "__main__":
    main()
