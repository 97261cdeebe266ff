"""Attention that skips padding and attention over slots: the same numbers as transformers' eager attention."""

import families
import pytest
import torch
from torch._inductor.exc import InductorError
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GptOssConfig
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

import helpers
from helpers import RecipeError

LENGTHS = [50, 9, 70, 33]


@pytest.fixture
def model():
    """Weights large enough, and a cap and a window small enough, that softcapping and window change the result."""
    torch.manual_seed(0)
    config = Gemma2Config(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        query_pre_attn_scalar=16,
        sliding_window=24,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


def test_examples_end_to_end_do_not_see_each_other(model):
    """A row of four examples gives each the logits and gradients that it has alone with eager attention."""
    AttentionInterface.register("examples", helpers.attention.packed)
    examples = [torch.randint(4, 512, (length,)) for length in LENGTHS]
    alone = torch.cat([model(example[None]).logits[0] for example in examples])
    alone.logsumexp(-1).sum().backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradient, weight.grad = weight.grad.clone(), None
    model.config._attn_implementation = "examples"
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    row = model(torch.cat(examples)[None], position_ids=positions[None], use_cache=False).logits[0]
    row.logsumexp(-1).sum().backward()
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"s_aux": torch.ones(4)},
        {"attention_mask": {"full_attention": None, "sliding_attention": None}},
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
        {"dropout": 0.1},
    ],
)
def test_attention_refuses_what_it_does_not_know(arguments):
    """Sinks, masks of the model's own, dropout: left out in silence, they would give other answers."""
    (name,) = arguments
    with pytest.raises(RecipeError, match=f"attention uses {name}, which is not known here"):
        helpers.attention.refuse_arguments(arguments)
    harmless = {"dropout": 0.0, "use_cache": False, "return_dict": True, "num_items_in_batch": torch.tensor(7)}
    helpers.attention.refuse_arguments(harmless | {"attention_mask": None})


def test_rounding_in_16_bit_is_told_from_a_wrong_mask(tmp_path):
    """A row in which the second text sees the first gives other scores only at the second text's first tokens."""
    checkpoint = families.make_checkpoint("mistral", tmp_path)
    model, tokenizer = helpers.models.load(str(checkpoint), "transformers", max_seq_length=512)
    texts = [helpers.encode(tokenizer, prompt).ids[:200] for prompt in families.PROMPTS[:2]]
    texts = [torch.tensor([ids], device=model.device) for ids in texts]
    row = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(len(text[0]), device=model.device) for text in texts])[None]
    with torch.no_grad():
        alone = torch.cat([model(text).logits for text in texts], dim=1)
        mixed = model(row, attention_mask=torch.ones_like(row), position_ids=positions).logits
    assert helpers.attention.scores_agree(alone * 1.01, alone)
    assert not helpers.attention.scores_agree(mixed, alone)
    assert not helpers.attention.scores_agree(mixed * torch.nan, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("heads, key_heads, width", [(4, 1, 256), (8, 4, 128)])  # Gemma 3 270M, a larger one
def test_rows_of_any_length_on_a_gpu_give_the_attention_of_the_cpu(heads, key_heads, width, softcap):
    for lengths in ([1], [5], [100], [127], [128], [9, 60], [150, 9, 170]):
        tokens, draw = sum(lengths), torch.Generator().manual_seed(0)
        states = [torch.randn(1, n, tokens, width, generator=draw) for n in (heads, key_heads, key_heads)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        found = [attention_of(states, positions, softcap, device) for device in ("cpu", "cuda")]
        torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def attention_of(states, positions, softcap, device):
    query, key, value = (state.to(device) for state in states)
    options = {"scaling": query.shape[3] ** -0.5, "softcap": softcap, "sliding_window": 64}
    options |= {"position_ids": positions.to(device)}
    return helpers.attention.packed(None, query, key, value, None, **options)[0].cpu()


def too_large(*_):
    """What torch's compiler and Triton raise for a kernel that asks for more shared memory than a GPU has."""
    raise InductorError(RuntimeError("No valid triton configs. out of resource: Required: 151552"), None)


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def wrong(query, *_):
    return torch.zeros_like(query)


class WrongGradient(torch.autograd.Function):
    """Right forwards; backwards the gradient is that of something else."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -20 * gradient


def wrong_backwards(*arguments):
    return WrongGradient.apply(helpers.attention.text_by_text(*arguments))


def fails_backwards(*arguments):
    result = helpers.attention.text_by_text(*arguments)
    if result.requires_grad:
        result.register_hook(too_large)
    return result


CALLABLES = [too_large, full, wrong]
SAID = {too_large: "InductorError", full: "OutOfMemoryError", wrong: "other scores"}


@pytest.fixture
def compiled_by(monkeypatch):
    """Puts a function in the place of the compiled attention."""
    yield lambda attend: monkeypatch.setattr(helpers.attention, "WAYS", (attend, helpers.attention.text_by_text))
    helpers.attention.left_out.clear()


@pytest.mark.parametrize("attend", [*CALLABLES, wrong_backwards, fails_backwards])
def test_an_attention_that_fails_gives_way_to_the_next_one_in_training(model, compiled_by, capsys, attend):
    said = SAID | {wrong_backwards: "other gradients", fails_backwards: "InductorError"}
    compiled_by(attend)
    texts = [torch.randint(4, 512, (length,)).tolist() for length in LENGTHS[:2]]
    assert helpers.rows.switch_on(model, texts)
    *others, line = capsys.readouterr().out.splitlines()
    assert not others or torch.cuda.is_available()  # there the first one may be of another kernel
    assert said[attend] in line and line.endswith("each text is computed by itself, which is slower")
    assert helpers.attention.ways(model.device) == [helpers.attention.text_by_text]
    assert model.config._attn_implementation == "examples"


@pytest.mark.parametrize("attend", CALLABLES)
def test_an_attention_that_fails_gives_way_to_the_next_one_in_slots(model, compiled_by, capsys, attend):
    compiled_by(attend)
    assert not helpers.slots.problem(model, torch.randint(4, 512, (60,)).tolist())
    (line,) = capsys.readouterr().out.splitlines()
    assert SAID[attend] in line
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("attend", CALLABLES)
def test_where_every_attention_fails_the_model_keeps_its_own(model, monkeypatch, capsys, attend):
    monkeypatch.setattr(helpers.attention, "WAYS", (attend,))
    ids = torch.randint(4, 512, (60,)).tolist()
    assert not helpers.rows.switch_on(model, [ids, ids[:20]])
    problem = helpers.slots.problem(model, ids)
    assert SAID[attend] in problem or "slots give other scores" in problem
    (padded,) = capsys.readouterr().out.splitlines()
    assert SAID[attend] in padded and "texts are padded" in padded
    assert model.config._attn_implementation == "eager"


def test_options_follow_the_width_of_the_heads_and_the_card():
    """Up to 128 torch's own, as ever; above, those whose kernels fit (benchmarks/results/attention.md)."""
    t4, l4, a100, h200 = 65536, 101376, 166912, 232448
    options = helpers.attention.kernel_options
    assert options(64, h200) == options(128, h200) == {"BACKEND": "TRITON", "bwd_num_stages": 2}
    for card in (t4, l4, a100):
        assert options(64, card) == options(128, card) == {"BACKEND": "TRITON"}
    for card in (t4, l4, a100, h200):
        assert options(256, card)["fwd_num_stages"] == options(256, card)["bwd_num_stages"] == 2
    assert options(512, h200) == options(512, a100) == {"BACKEND": "TRITON", "fwd_num_stages": 2}
    assert options(512, l4)["fwd_BLOCK_M"] == options(512, l4)["fwd_BLOCK_N"] == 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("card", [101376, 166912, 232448])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("heads, key_heads, width", [(8, 4, 64), (8, 4, 128), (4, 1, 256), (4, 2, 512)])
def test_options_of_other_cards_give_the_outputs_and_gradients_of_text_by_text(
    monkeypatch, heads, key_heads, width, softcap, card
):
    """Forced on this GPU, in bfloat16, against float32."""
    torch._dynamo.reset()  # after eight kernels of one function torch would compile it no longer
    helpers.attention.compiled.cache_clear()
    options = helpers.attention.kernel_options(width, card)
    monkeypatch.setattr(helpers.attention, "kernel_options", lambda *_: options)
    position_ids = torch.cat([torch.arange(length) for length in (150, 9, 170)])[None].cuda()
    draw, tokens = torch.Generator().manual_seed(0), position_ids.shape[1]
    states = [torch.randn(1, n, tokens, width, generator=draw).cuda() for n in (heads, key_heads, key_heads, heads)]
    found = []
    room = helpers.attention
    for attend, dtype in ((room.text_by_text, torch.float32), (room.in_one_kernel, torch.bfloat16)):
        query, key, value = (state.detach().to(dtype).requires_grad_() for state in states[:3])
        result = attend(query, key, value, position_ids, width**-0.5, softcap, 64)
        found.append([result, *torch.autograd.grad(result, (query, key, value), states[3].to(dtype))])
    for expected, here in zip(*found, strict=True):
        assert (here.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_reference_is_the_attention_of_transformers_with_scores_in_float32(dtype, limit, softcap):
    """Large scores, as of a model that does not divide them: in 16 bit eager attention is far off."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 40, 64, generator=draw).to(dtype) for heads in (4, 2, 2)]
    position = torch.arange(40)
    unseen = (position[:, None] < position) | (position[:, None] - position >= 24)
    mask = torch.zeros(40, 40).masked_fill(unseen, torch.finfo(torch.float32).min)[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 2, False
    options = {"scaling": 4.0, "softcap": softcap, "dropout": 0.0}
    exact, _ = eager_attention_forward(module, *(s.double() for s in states), mask.double(), **options)
    eager, _ = eager_attention_forward(module, *states, mask.to(dtype), **options)
    found, _ = helpers.attention.in_float32(module, *states, mask, **options | {"sliding_window": 24})
    error = ((found - exact).norm() / exact.norm()).item()
    assert found.dtype == dtype and error < limit
    if dtype == torch.bfloat16 and softcap is None:
        assert (eager - exact).norm() > 10 * (found - exact).norm()


def test_the_reference_leaves_a_model_as_it_was_and_its_own_attention_to_one_that_asks_for_more():
    ids, found = torch.arange(2, 42)[None], {}
    for kind, config in (("gemma2", Gemma2Config), ("gpt-oss", GptOssConfig)):
        values = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        values |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "sliding_window": 24}
        values |= {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "gpt-oss" else {}
        model = AutoModelForCausalLM.from_config(config(**values), attn_implementation="eager").eval()
        used = []

        def run(model=model, used=used):
            used.append(model.config._attn_implementation)
            with torch.no_grad():
                return model(ids, use_cache=False).logits

        expected = run()
        torch.testing.assert_close(helpers.attention.reference(model, run), expected, rtol=1e-4, atol=1e-5)
        found[kind] = [*used, model.config._attn_implementation]
    assert found == {
        "gemma2": ["eager", "float32", "eager"],
        "gpt-oss": ["eager", "float32", "eager", "eager"],
    }
