"""What makes training fast on a GPU: the same numbers as peft's own forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

import helpers

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gemma2(layers=2):
    """GELU, four norms per layer, softcapping."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES | {"num_hidden_layers": layers}, head_dim=16))


def qwen2():
    """SiLU, and a bias on q, k and v."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def pack(model):
    """Put 4-bit layers in the place of all linear ones, as notebook 1 does."""
    from bitsandbytes.nn import Linear4bit

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, old in list(parent.named_children()):
                if isinstance(old, torch.nn.Linear):
                    new = Linear4bit(old.in_features, old.out_features, old.bias is not None, torch.float32)
                    new.load_state_dict(old.state_dict())
                    setattr(parent, name, new)
    model = model.to("cpu")  # quantizes
    helpers.models.keep_weights_unpacked(model)
    return model


def adapted(model, **options):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data.normal_(0, 0.1)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, **options)).train()


def randomize_b(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)


def loss_and_gradients(model):
    ids = torch.arange(2, 302).view(2, 150)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("family", [gemma2, qwen2])
def test_adapter_in_place_gives_the_loss_and_gradients_of_peft(family, four_bit, checkpointing):
    torch.manual_seed(0)
    model = family()
    model = adapted(pack(model) if four_bit else model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    randomize_b(model)
    expected = loss_and_gradients(model)
    names = set(model.state_dict())
    replaced = helpers.lora.add_in_place(model)
    assert replaced == 2 * 8  # seven layers and the MLP of two blocks
    found = loss_and_gradients(model)
    assert set(model.state_dict()) == names
    assert found.keys() == expected.keys() and len(found) == 1 + 2 * 7 * 2
    for name, value in expected.items():
        said = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6, msg=said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", [gemma2, qwen2])
def test_rows_on_a_gpu_give_the_loss_and_gradients_of_the_cpu(family):
    """In float32, with the compiled attention and with some layers checkpointed, against peft's own way on the CPU."""
    AttentionInterface.register("examples", helpers.attention.packed)
    torch.manual_seed(0)
    model = adapted(family())
    randomize_b(model)
    model.get_base_model().config._attn_implementation = "examples"
    positions = torch.cat([torch.arange(length) for length in (150, 9, 170, 55)])[None]
    row = {"input_ids": torch.randint(2, 500, positions.shape), "position_ids": positions, "use_cache": False}
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        if device == "cuda":
            assert helpers.lora.add_in_place(model) == 2 * 8
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.base_model.model.model.layers[1].gradient_checkpointing = False
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in row.items()}
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients = [p.grad.clone().cpu() for p in model.parameters() if p.requires_grad]  # model.to() moves its own
        found.append([loss.detach().cpu(), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_adapter_in_place_can_be_switched_off():
    model = adapted(gemma2())
    randomize_b(model)
    ids = torch.arange(2, 302)[None]
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    helpers.lora.add_in_place(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, expected)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_plain_adapter_is_left_to_peft(options):
    assert helpers.lora.add_in_place(adapted(gemma2(), **options)) == 0


def test_an_mlp_that_computes_something_else_is_left_alone():
    """Such as that of Gemma 3n, which has the same parts but drops the smaller values of the gate."""
    model = gemma2()
    for block in model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x).clamp(min=0.3)) * mlp.up_proj(x))
    model = adapted(model)
    randomize_b(model)
    expected = loss_and_gradients(model)
    assert helpers.lora.add_in_place(model) == 2 * 7
    torch.testing.assert_close(loss_and_gradients(model), expected, rtol=2e-4, atol=1e-6)
