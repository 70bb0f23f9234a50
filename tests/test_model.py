import copy
import io
import math
import os
import pickle
from types import SimpleNamespace

from model import (
    GPT,
    GPTConfig,
    Muon,
    PackedLinear,
    count_parameters,
    dropout,
    flops_per_token,
    gelu,
    gradient_norm,
    load_model,
    make_optimizers,
    newton_schulz,
    prepack,
    rms_norm,
    rotate,
    rotation,
)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = dict(vocab_size=50, context_length=8, n_layer=2, n_head=2, n_embd=16)


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | changes)).eval()


def lively(**changes) -> GPT:
    """A model whose next token depends on all tokens before it, and whose biases matter."""
    gpt = small(**changes)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return gpt


@pytest.mark.parametrize(
    "changes, parameters",
    [
        (dict(qkv_bias=False, tie_weights=False), 163_009_536),  # the book, chapter 4
        (dict(qkv_bias=False, tie_weights=False, context_length=256), 162_419_712),
        (dict(qkv_bias=False, tie_weights=True), 124_412_160),
        (dict(), 124_439_808),
        (dict(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
        (dict(n_layer=36, n_head=20, n_embd=1280), 774_030_080),
        (dict(n_layer=48, n_head=25, n_embd=1600), 1_557_611_200),
    ],
)
def test_published_parameter_counts(changes, parameters):
    assert count_parameters(GPTConfig(**changes))[0] == parameters


def test_tensor_names_are_those_of_gpt2():
    names = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    names |= {f"transformer.ln_f.{kind}" for kind in ("weight", "bias")}
    for layer in range(2):
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"transformer.h.{layer}.{part}.{kind}" for kind in ("weight", "bias")}
    state = small().state_dict()
    assert set(state) == names
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (48, 16)
    assert set(small(bias=False).state_dict()) == {x for x in names if not x.endswith("bias")}
    without = {x for x in names if not x.endswith("c_attn.bias")}
    assert set(small(qkv_bias=False).state_dict()) == without


def by_hand(gpt: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The forward pass for one sequence (T,), written out position by position."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in gpt.state_dict().items()}
    C, heads, config = gpt.config.n_embd, gpt.config.n_head, gpt.config
    D = C // heads

    def rms(x):
        return x / (x.square().mean() + 1e-5).sqrt()

    def norm(x, name):
        if config.rms_norm:
            return rms(x)
        return rms(x - x.mean()) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def placed(x, position):
        """A query or key, normalised and turned."""
        out = x = rms(x) if config.qk_norm else x
        if config.rotary:
            out = x.clone()
            for i in range(D // 2):
                angle = position * 10_000 ** (-2 * i / D)
                cos, sin = math.cos(angle), math.sin(angle)
                out[i] = x[i] * cos - x[i + D // 2] * sin
                out[i + D // 2] = x[i + D // 2] * cos + x[i] * sin
        return out

    xs = [w["wte.weight"][token] for token in idx]
    if not config.rotary:
        xs = [x + w["wpe.weight"][t] for t, x in enumerate(xs)]
    if config.rms_norm:
        xs = [rms(x) for x in xs]
    for n in range(config.n_layer):
        h = f"h.{n}."
        qkv = [linear(norm(x, h + "ln_1"), h + "attn.c_attn") for x in xs]
        for t in range(len(xs)):
            gathered = []
            for s in (slice(i * D, (i + 1) * D) for i in range(heads)):
                q = placed(qkv[t][:C][s], t)
                keys = [placed(qkv[u][C : 2 * C][s], u) for u in range(t + 1)]
                weights = torch.stack([q @ k / D**0.5 for k in keys]).softmax(0)
                gathered.append(sum(a * qkv[u][2 * C :][s] for u, a in enumerate(weights)))
            xs[t] = xs[t] + linear(torch.cat(gathered), h + "attn.c_proj")
        for t, x in enumerate(xs):
            x = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
            xs[t] = xs[t] + linear(x, h + "mlp.c_proj")
    return torch.stack([w["lm_head.weight"] @ norm(x, "ln_f") for x in xs])


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_weights=False),
        dict(rotary=True),
        dict(rms_norm=True),
        dict(qk_norm=True),
        dict(rotary=True, rms_norm=True, qk_norm=True, bias=False, tie_weights=False),
    ],
)
def test_forward_is_the_formula_written_out(changes):
    gpt, idx = lively(**changes), torch.randint(50, (2, 8))
    expected = torch.stack([by_hand(gpt, row) for row in idx])
    torch.testing.assert_close(gpt(idx), expected, atol=1e-4, rtol=1e-4)


def test_loss_is_the_mean_negative_log_probability():
    """Book, section 5.1.2: look up each target's probability, take -log, average."""
    gpt, idx, targets = small(), torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    probabilities = gpt(idx).softmax(dim=-1)
    chosen = [probabilities[b, t, targets[b, t]].item() for b in range(3) for t in range(8)]
    expected = -sum(map(math.log, chosen)) / len(chosen)
    loss = gpt(idx, targets)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
    some = targets.clone()
    some[0] = -100  # does not count
    expected = -sum(map(math.log, chosen[8:])) / 16
    assert gpt(idx, some).item() == pytest.approx(expected, rel=1e-5)


def test_the_books_worked_example():
    """Section 5.1.2: the probabilities of six targets, their loss 10.7940, perplexity 48,725."""
    published = [[7.4541e-05, 3.1061e-05, 1.1563e-05], [1.0337e-05, 5.6776e-05, 4.7559e-06]]
    chosen = torch.tensor(published).double()
    gpt, targets = small(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    probabilities = ((1 - chosen) / 49)[:, :, None].repeat(1, 1, 50)
    probabilities.scatter_(2, targets[:, :, None], chosen[:, :, None])
    gpt.lm_head.forward = lambda x: probabilities.log()  # a model that says just these
    loss = gpt(targets, targets).item()
    assert loss == pytest.approx(10.7940, abs=5e-5)
    assert math.exp(loss) == pytest.approx(48_725.8, abs=2.5)


def test_initial_loss_is_near_ln_of_the_vocabulary():
    gpt = small(vocab_size=1000)
    idx = torch.randint(1000, (16, 8))
    assert gpt(idx, idx.roll(1)).item() == pytest.approx(math.log(1000), abs=0.05)


def test_initialisation():
    gpt = small(n_embd=128, n_layer=8)
    for name, p in gpt.named_parameters():
        if p.dim() < 2:
            assert (p == (1 if "ln" in name and name.endswith("weight") else 0)).all()
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("tie_weights", [True, False])
def test_embedding_std(tie_weights):
    state = small(n_embd=128, embedding_std=1.0, tie_weights=tie_weights).state_dict()
    stds = {"transformer.wte.weight": 1, "transformer.wpe.weight": 1}
    stds["lm_head.weight"] = 1 if tie_weights else 0.02
    for name, std in stds.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.1)


def test_no_position_sees_a_later_one():
    gpt, idx = small(), torch.randint(50, (1, 8))
    before = gpt(idx)
    idx[0, 5] = (idx[0, 5] + 1) % 50
    after = gpt(idx)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(
        before[:, 5], after[:, 5]
    )


def test_dropout_works_in_training_alone():
    gpt, idx = small(dropout=0.5), torch.randint(50, (1, 8))
    assert torch.equal(gpt(idx), gpt(idx))
    gpt.train()
    assert not torch.equal(gpt(idx), gpt(idx))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_the_right_rate_and_is_independent(p, dtype):
    torch.manual_seed(0)
    x, y = (dropout(torch.ones(1000, 1001, dtype=dtype), p) for _ in range(2))
    kept = x > 0
    bits = 2 ** (8 * x.element_size())
    assert torch.equal(x, kept * torch.tensor(bits / (bits - round(p * bits)), dtype=dtype))
    spread = math.sqrt(p * (1 - p) / x.numel())  # standard deviation of the mean of a fair draw
    assert abs((~kept).float().mean().item() - p) < 5 * spread + 1e-5
    assert (kept.float().mean(0) + p - 1).abs().max() < 6 * math.sqrt(p * (1 - p) / 1000)
    kept = kept.flatten().float()
    for other in [kept.roll(n) for n in (1, 2, 3, 4, 5, 8, 1001)] + [(y > 0).flatten().float()]:
        correlation = ((kept + p - 1) * (other + p - 1)).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(x.numel())


def test_dropout_follows_from_the_seed_and_passes_its_mask_to_the_gradient():
    x = torch.ones(7, 3, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.5)
    y.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(7, 3), 0.5), y) and torch.equal(x.grad, y.detach())


def test_attention_with_dropout_is_attention(monkeypatch):
    """Training on a CPU writes attention out; without its dropout it is what it is elsewhere."""
    gpt, idx = lively(dropout=0.5), torch.randint(50, (2, 8))
    expected = gpt(idx)
    monkeypatch.setattr("model.dropout", lambda x, p: x)
    torch.testing.assert_close(gpt.train()(idx), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 5e-4)])
def test_gelu_is_openais_form(dtype, atol):
    """In bfloat16 but for 0.0005, and for the rounding of the result."""
    x = torch.linspace(-6, 6, 2001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = gelu(x), F.gelu(exact, approximate="tanh")
    y.sum().backward()
    expected.sum().backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, atol=atol, rtol=eps)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=4 * atol, rtol=eps)


def test_the_gradient_norm_is_that_of_all_gradients():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(768, 3072), torch.nn.Embedding(5, 7))
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    exact = sum(p.grad.double().square().sum() for p in module.parameters()).sqrt().item()
    assert gradient_norm(module).item() == pytest.approx(exact, rel=5e-6)  # PyTorch's: 4e-5 off


def test_rotate_turns_each_pair_of_channels_by_its_angle():
    torch.manual_seed(0)
    x, positions = torch.randn(2, 9, 2, 4, 8, dtype=torch.float64), torch.arange(9).double()
    y = rotate(x, *rotation(positions, 8))
    turned = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[:, None] * 10_000 ** (-torch.arange(4).double() / 4)
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_rms_norm_in_training_is_the_formula(dtype, scale):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 3, 64)
    x = (scale * x).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = rms_norm(x), exact / (exact.square().mean(-1, True) + 1e-5).sqrt()
    y.backward(grad.to(dtype))
    expected.backward(grad.double())
    for ours, theirs in ((y, expected), (x.grad, exact.grad)):
        assert (ours - theirs).norm() < 2 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 8, 600])
def test_attention_in_16_bits_is_attention(dtype, T):
    """Written out or PyTorch's, its loss and gradients are those of float32, but for rounding."""
    gpt, idx = lively(context_length=600, n_head=4), torch.randint(50, (2, T))
    losses, grads = [], []
    for enabled in (False, True):
        gpt.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = gpt.train()(idx, idx.flip(1))
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_recomputing_activations_changes_nothing(bfloat16):
    gpt, idx = lively(dropout=0.5).train(), torch.randint(50, (2, 8))
    grads = []
    for gpt.activation_checkpointing in (False, True):
        torch.manual_seed(4)
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = gpt(idx, idx.roll(1))
        loss.backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads))


def test_flops_of_the_published_model():
    """124M: 6 x (85M in blocks + 38.6M in the head) + 12 x 12 x 1024 x 768."""
    assert (
        flops_per_token(GPTConfig()) == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768
    )


NEWER = dict(rotary=True, rms_norm=True, qk_norm=True)  # what GPT-2 lacks
COMBINATIONS = st.sets(st.sampled_from(list(NEWER))).map(lambda on: {x: NEWER[x] for x in on})
SHAPES = dict(
    B=st.integers(1, 4),
    T=st.integers(1, 24),
    length=st.integers(1, 30),
    qkv_bias=st.booleans(),
    n_head=st.sampled_from([1, 2, 4]),
    newer=COMBINATIONS,
)


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(**SHAPES, use_cache=st.booleans())
def test_greedy_generation_is_the_argmax_of_what_the_model_sees(
    B, T, length, qkv_bias, n_head, newer, use_cache
):
    """The last T tokens; a full cache starts again from the last half of them."""
    gpt = lively(context_length=T, qkv_bias=qkv_bias, n_head=n_head, **newer)
    expected = idx = torch.randint(50, (B, length))
    window = idx[:, -T:]
    for _ in range(2 * T + 3):
        token = gpt(window)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, token), 1)
        full = use_cache and window.shape[1] == T
        window = torch.cat((window, token), 1)[:, -(max(1, T // 2) if full else T) :]
    found = gpt.generate(idx, 2 * T + 3, temperature=0, use_cache=use_cache)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("newer", [{}, NEWER])
def test_generation_in_16_bits_is_that_of_float32_but_for_rounding(newer, dtype):
    exact, gpt, text = lively(**newer), lively(**newer).to(dtype), torch.randint(50, (2, 3))
    for token, logits in gpt.stream(text, 6, temperature=0):
        expected = exact(text)[:, -1]
        assert (logits - expected).norm() < 0.05 * expected.norm()
        text = torch.cat((text, token), dim=1)


@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_that_all_rows_share_is_computed_once(length):
    gpt, prompt, seen = lively(), torch.randint(50, (1, length)).expand(4, -1), []
    gpt.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    text = gpt.generate(prompt, 24, seed=1)
    one = [(4, 1)]
    refilled = [(4, 4)] + 4 * one  # a full context goes on with its last half
    assert seen == ([(1, length)] + (8 - length) * one + 4 * refilled)[:24]
    assert torch.equal(text[:, :8], gpt.generate(prompt, 8 - length, seed=1, use_cache=False))
    for _, logits in gpt.stream(prompt, 2):
        logits[0, 0] = 7  # the rows are no views of one
        assert logits[1, 0] != 7


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_packed_copy_gives_the_same_logits(qkv_bias, dtype):
    gpt, idx = lively(qkv_bias=qkv_bias).train(), torch.randint(50, (3, 8))
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    packed, same = prepack(gpt, dtype), copy.deepcopy(gpt).to(dtype).eval()
    packs = dtype is None or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not with AVX2 alone
    assert isinstance(packed.lm_head, PackedLinear) == packs == (prepack(packed) is packed)
    limit = dict(atol=1e-4, rtol=1e-4) if dtype is None else dict(atol=0.3, rtol=0.05)
    torch.testing.assert_close(packed(idx), same(idx), **limit)
    assert gpt.training and type(gpt.lm_head) is torch.nn.Linear
    after = gpt.state_dict()
    assert all(torch.equal(after[x], before[x]) and after[x].dtype == torch.float32 for x in before)


def test_generation_from_python_packs_by_itself(monkeypatch):
    gpt, idx, calls = lively().train(), torch.randint(50, (3, 8)), []
    expected = gpt.eval().generate(idx, 20, temperature=0)
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda *a: calls.append(1) or forward(*a))
    assert torch.equal(gpt.train().generate(idx, 20, temperature=0), expected)
    assert len(calls) == 20 * 9 and gpt.training  # 4 in each block, and the head
    gpt(idx, idx).backward()  # it can still be trained


def test_packing_leaves_alone_what_cannot_be_packed(monkeypatch):
    gpt, idx = small(), torch.randint(50, (3, 8))

    def refuse(weight, batch_size=None):
        raise RuntimeError("no such dtype on this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert torch.equal(prepack(gpt)(idx), gpt(idx))


def test_a_cropped_context_gives_the_same_logits():
    gpt, idx = lively(), torch.randint(50, (3, 5))
    expected = gpt(idx)
    gpt.crop_context(5)
    assert torch.equal(gpt(idx), expected) and gpt.transformer.wpe.weight.shape == (5, 16)
    assert gpt.generate(idx, 9).shape == (3, 14)


def test_sampling_follows_the_probabilities():
    gpt, idx = small(), torch.tensor([[7]])
    with torch.no_grad():
        gpt.lm_head.weight.mul_(20)
    many, logits = idx.expand(20_000, 1), gpt(idx)[0, -1]
    likely = logits.softmax(-1)
    ordered = likely.sort(descending=True).values
    nucleus = ordered[(ordered.cumsum(0) < 0.6).sum()]  # the least likely of the top 0.6
    for options, kept in (
        (dict(temperature=1.0), logits > -math.inf),
        (dict(temperature=0.5), logits > -math.inf),
        (dict(temperature=2.0, top_k=3), logits >= logits.topk(3).values[-1]),
        (dict(temperature=1.0, top_p=0.6), likely >= nucleus),
        (dict(temperature=1.0, top_p=1e-9), likely == likely.max()),
        (dict(temperature=1.0, min_p=0.5), likely >= 0.5 * likely.max()),
    ):
        expected = (logits / options["temperature"]).masked_fill(~kept, -math.inf).softmax(-1)
        drawn = gpt.generate(many, 1, seed=0, **options)[:, 1].bincount(minlength=50)
        torch.testing.assert_close(drawn / 20_000, expected, atol=0.015, rtol=0)
        assert not drawn[~kept].any() and 0 < kept.sum() <= 50


def test_any_temperature_gives_a_token():
    gpt, idx = lively(), torch.randint(50, (2, 3))
    greedy = gpt.generate(idx, 5, temperature=0)
    assert torch.equal(gpt.generate(idx, 5, temperature=1e-300), greedy)
    assert gpt.generate(idx, 5, temperature=1e300).max() < 50


def test_top_k_of_one_is_greedy_and_above_the_vocabulary_is_all():
    gpt, idx = small(), torch.randint(50, (2, 3))
    greedy = gpt.generate(idx, 5, temperature=0)
    assert torch.equal(gpt.generate(idx, 5, temperature=1.0, top_k=1), greedy)
    one, all_ = (gpt.generate(idx, 5, 1.0, k, seed=3) for k in (None, 999))
    assert torch.equal(one, all_)


def test_a_row_does_not_hang_on_the_others():
    gpt, idx = lively(), torch.randint(50, (1, 3))
    alone = gpt.generate(idx, 12, seed=5)
    many = gpt.generate(idx.expand(6, 3), 12, seed=5)
    assert torch.equal(many[:1], alone) and len(many.unique(dim=0)) == 6
    for seed in (4, 6, 5 + 2**32):  # other seeds, other texts
        others = gpt.generate(idx.expand(6, 3), 12, seed=seed)
        assert len(torch.cat((many, others)).unique(dim=0)) == 12


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "idx, options, message",
    [
        ("Every effort", {}, "for a text, give"),
        (torch.tensor([1, 2]), {}, "tensor .B, T. of token ids"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "tensor .B, T. of token ids"),
        (torch.tensor([[1]]), {"top_k": 0}, "top_k at least 1"),
        (torch.tensor([[1]]), {"temperature": -1.0}, "temperature must be at least 0"),
        (torch.tensor([[1]]), {"top_p": 0.0}, "top_p above 0"),
    ],
)
def test_generate_refuses(idx, options, message, use_cache):
    with pytest.raises(ValueError, match=message):
        small().generate(idx, 5, **options, use_cache=use_cache)


def test_generation_ends_where_every_row_has_stopped():
    gpt, idx = small(vocab_size=4), torch.zeros(5, 1, dtype=torch.int64)
    free = gpt.generate(idx, 60, seed=0)
    stopped = gpt.generate(idx, 60, seed=0, stop_token=3)
    ends = [row.tolist().index(3) for row in free]
    assert stopped.shape[1] == max(ends) + 1 < 60
    for row, kept, end in zip(free.tolist(), stopped.tolist(), ends):
        assert kept == row[: end + 1] + [3] * (max(ends) - end)


def test_stream_leaves_the_model_as_it_was():
    gpt = small(dropout=0.5).train()
    stream = gpt.stream(torch.zeros(1, 1, dtype=torch.int64), 9)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()  # before its end
    gpt.generate(torch.zeros(1, 1, dtype=torch.int64), 2, use_cache=False)
    assert gpt.training and torch.is_grad_enabled()


BOOLEANS = (st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), *BOOLEANS, COMBINATIONS)
def test_any_small_shape_works(n_layer, n_head, bias, qkv_bias, tie_weights, newer):
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=4 * n_head)
    gpt = small(**shape, bias=bias, qkv_bias=qkv_bias, tie_weights=tie_weights, **newer)
    linears = [m.weight.numel() for m in gpt.modules() if isinstance(m, torch.nn.Linear)]
    assert count_parameters(gpt.config) == (gpt.num_parameters(), sum(linears))
    loss = gpt(torch.randint(50, (2, 8)), torch.randint(50, (2, 8)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=10, n_head=3), "n_embd .10. must be a multiple of n_head .3."),
        (dict(n_layer=0), "n_layer is 0; it must be in .1, 1e12."),
        (dict(vocab_size=-1), "vocab_size is -1"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(n_embd=15, n_head=5, rotary=True), "rotary needs an even number of channels"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


def test_a_model_with_rotary_positions_has_no_others():
    gpt, idx = lively(rotary=True), torch.randint(50, (1, 5))
    assert "transformer.wpe.weight" not in gpt.state_dict()
    expected = gpt(idx)
    gpt.crop_context(5)
    assert torch.equal(gpt(idx), expected) and gpt.config.context_length == 5


@settings(max_examples=20, deadline=None)
@given(COMBINATIONS)
def test_newer_models_pass_through_a_checkpoint(tmp_path_factory, newer):
    gpt, path = lively(**newer), tmp_path_factory.mktemp("x") / "x.ckpt"
    torch.save({"model": gpt.state_dict(), "model_args": SMALL | newer}, path)
    idx = torch.randint(50, (2, 8))
    assert torch.equal(GPT.from_checkpoint(path)(idx), gpt(idx))


# --- Optimizers -----------------------------------------------------------------------------------


SETTINGS = dict(learning_rate=0.02, embedding_learning_rate=0.006, head_learning_rate=0.004)
SETTINGS |= dict(weight_decay=0.1, beta1=0.9, beta2=0.95, momentum=0.95, muon_interval=1, n_embd=16)


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_its_own_rate_and_decay(optimizer, tie_weights):
    gpt = small(tie_weights=tie_weights)
    config = SimpleNamespace(**SETTINGS, optimizer=optimizer, tie_weights=tie_weights)
    optimizers = make_optimizers(gpt, config, torch.float32)
    found = [
        (p, (type(x).__name__, group["lr_scale"], group["weight_decay"]))
        for x in optimizers
        for group in x.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(list(gpt.parameters()))
    for name, p in gpt.named_parameters():
        expected = ("AdamW", 1, 0.1 if p.dim() == 2 else 0)
        if optimizer == "muon":
            expected = ("AdamW", 0.3, 0)
            if name.startswith("transformer.h.") and p.dim() == 2:
                expected = ("Muon", 1, 0.1)
            if name == "lm_head.weight":
                expected = ("AdamW", 0.2 * 128 / 16, 0)  # falls with the channels
        assert dict(found)[p] == (expected[0], pytest.approx(expected[1]), expected[2]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_muon_is_pytorchs(shape, dtype):
    """But for queries, keys and values, and for the dtype: theirs is bfloat16, of two digits."""
    torch.manual_seed(0)
    start, options = torch.randn(shape), dict(lr=0.1, momentum=0.9, weight_decay=0.5)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([mine], dtype, **options),
        torch.optim.Muon([theirs], **options),
    ]
    for _ in range(3):
        mine.grad = torch.randn(shape)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(mine, theirs, atol=0.01, rtol=0.02)
    assert (mine - start).abs().mean() > 0.1


def test_muon_takes_queries_keys_and_values_apart():
    torch.manual_seed(0)
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.0)
    whole = torch.nn.Parameter(torch.zeros(48, 16))
    parts = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    whole.grad = torch.randn(48, 16) * torch.tensor([1.0, 9.0, 0.1]).repeat_interleave(16)[:, None]
    for part, grad in zip(parts, whole.grad.split(16)):
        part.grad = grad
    for params in ([whole], parts):
        Muon(params, torch.float32, **options).step()
    torch.testing.assert_close(whole.detach(), torch.cat(parts).detach())


def test_muon_takes_each_matrix_in_turn():
    """With an interval of 2 the others wait; a step is then twice as long, of all gradients."""
    torch.manual_seed(0)
    start, grads = torch.randn(2, 16, 16), torch.randn(4, 2, 16, 16)
    options = dict(lr=0.01, momentum=0.9, weight_decay=0.5)
    turns = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    each = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    taking_turns = Muon(turns, torch.float32, 2, **options)
    always = Muon(each, torch.float32, **(options | dict(lr=0.02)))
    for step in range(4):
        before = [p.detach().clone() for p in turns]
        for p, q, grad in zip(turns, each, grads[step]):
            p.grad, q.grad = grad.clone(), grad.clone()
        taking_turns.step_number = step
        taking_turns.step()
        mine, other = step % 2, 1 - step % 2
        assert torch.equal(turns[other], before[other])
        each[mine].data.copy_(before[mine])
        always.step()
        torch.testing.assert_close(turns[mine].detach(), each[mine].detach())
        assert not torch.allclose(turns[mine], before[mine])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_orthogonal_matrices_have_singular_values_near_one(rows, columns, seed):
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    values = torch.linspace(0.1, 3, min(rows, columns))
    out = newton_schulz((u * values @ v)[None] * 1e-9, torch.float32)[0]
    found = torch.linalg.svdvals(out)
    assert 0.3 < found.min() and found.max() < 1.3
    assert out.shape == (rows, columns)
    assert not newton_schulz(torch.zeros(1, 2, 3), torch.float32).any()


# --- Checkpoints ----------------------------------------------------------------------------------


def checkpoint_bytes(keep: int = 4, **changes) -> bytes:
    """A checkpoint, or its first entries only."""
    gpt, file = small(), io.BytesIO()
    contents = {"model": gpt.state_dict(), "model_args": SMALL, "tokenizer": "gpt2", "step": 3}
    torch.save(dict(list(contents.items())[:keep]) | changes, file)
    return file.getvalue()


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "truncated, or not a checkpoint"),
        (b"Once upon a time", "truncated, or not a checkpoint"),
        (pickle.dumps(Malice()), "truncated, or not a checkpoint"),
        (checkpoint_bytes()[:-1], "truncated, or not a checkpoint"),
        (checkpoint_bytes(step=Malice()), "would run code when loaded, which is refused"),
        (checkpoint_bytes(model=3), "'int' object"),
        (checkpoint_bytes(model_args=None), "'NoneType'"),
        (checkpoint_bytes(1), "lacks model or model_args"),
        (checkpoint_bytes(model_args=SMALL | {"n_embd": 32}), "size mismatch for transformer"),
        (checkpoint_bytes(model_args=SMALL | {"n_layer": 10**9}), "tensors of 2 layers"),
        (checkpoint_bytes(model_args=SMALL | {"n_layer": "2"}), "'str'"),
        (checkpoint_bytes(model_args=SMALL | {"n_head": 5}), "must be a multiple of n_head"),
        (checkpoint_bytes(model_args=SMALL | {"depth": 5}), "unexpected keyword argument 'depth'"),
        (checkpoint_bytes(model={}), "tensors of 0 layers"),
        (checkpoint_bytes(model={"transformer.h.0": 3, "transformer.h.1": 3}), "'int' object"),
        (checkpoint_bytes(model={3: torch.ones(2)}), "'int' object"),
    ],
)
def test_checkpoints_from_strangers(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=f"^cannot read x.ckpt: .*({message})") as error:
        GPT.from_checkpoint("x.ckpt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "malice").exists()


def test_a_loaded_model_is_ready_to_use_and_holds_its_weights_alone(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(checkpoint_bytes(optimizer={"moment": torch.ones(3)}))
    gpt, rest = load_model(path, dropout=0.5)
    assert set(rest) == {"tokenizer", "step", "optimizer"}
    for loaded in (gpt, GPT.from_checkpoint(path, dropout=0.5)):
        assert not loaded.training and loaded.config.dropout == 0.5
        assert not any(hasattr(loaded, x) for x in ("checkpoint", *rest))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_checkpoint_never_loads_as_another_model(tmp_path_factory, data):
    whole = checkpoint_bytes()
    damaged = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.mktemp("x") / "x.ckpt"
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(whole), bit // 8]))])
    try:
        state = GPT.from_checkpoint(path).state_dict()
        assert all(torch.equal(state[name], x) for name, x in small().state_dict().items())
    except ValueError:
        pass


@pytest.mark.parametrize("tied", [True, False])  # untied in some of nanoGPT's descendants
def test_nanogpts_checkpoint_loads(tmp_path, tied):
    """Written by `torch.compile`d code of another name for context_length."""
    gpt = small(tie_weights=tied)
    state = {f"_orig_mod.{name}": tensor for name, tensor in gpt.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True, vocab_size=50, dropout=0.0)
    contents = dict(model=state, model_args=args, iter_num=7, best_val_loss=torch.tensor(3.0))
    torch.save(contents | {"config": {"dataset": "x"}, "optimizer": {}}, tmp_path / "ckpt.pt")
    loaded, idx = GPT.from_checkpoint(tmp_path / "ckpt.pt", dropout=0.1), torch.randint(50, (2, 8))
    assert loaded.config.context_length == 8 and loaded.config.dropout == 0.1
    assert torch.equal(loaded(idx), gpt(idx))
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied


def book_state(C: int, qkv_bias: bool) -> dict:
    """The tensors of chapter 4's GPTModel, by the names of its modules."""
    shapes = {"tok_emb.weight": (50, C), "pos_emb.weight": (8, C), "out_head.weight": (50, C)}
    blocks = [f"trf_blocks.{layer}" for layer in range(2)]
    for block in blocks:
        linears = {f"att.W_{part}": (C, C) for part in ("query", "key", "value")}
        linears |= {"att.out_proj": (C, C), "ff.layers.0": (4 * C, C), "ff.layers.2": (C, 4 * C)}
        for name, shape in linears.items():
            shapes[f"{block}.{name}.weight"] = shape
            if qkv_bias or ".W_" not in name:
                shapes[f"{block}.{name}.bias"] = shape[:1]
    for name in ["final_norm", *(f"{block}.norm{n}" for block in blocks for n in (1, 2))]:
        shapes |= {f"{name}.scale": (C,), f"{name}.shift": (C,)}
    masks = {f"{block}.att.mask": torch.ones(8, 8).triu(1) for block in blocks}
    return {name: torch.randn(shape) / 8 for name, shape in shapes.items()} | masks


def book_logits(w: dict, idx: torch.Tensor) -> torch.Tensor:
    """The forward pass of chapter 4, with heads of 64 channels."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return w[f"{name}.scale"] * x + w[f"{name}.shift"]

    def heads(x):
        return x.unflatten(-1, (-1, 64)).transpose(1, 2)

    x = w["tok_emb.weight"][idx] + w["pos_emb.weight"]
    for block in ("trf_blocks.0", "trf_blocks.1"):
        h = norm(x, f"{block}.norm1")
        q, k, v = (heads(linear(h, f"{block}.att.W_{part}")) for part in ("query", "key", "value"))
        scores = (q @ k.mT / 8).masked_fill(w[f"{block}.att.mask"].bool(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.att.out_proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0")
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{block}.ff.layers.2")
    return linear(norm(x, "final_norm"), "out_head")


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_the_books_files_load(tmp_path, capsys, qkv_bias, with_optimizer):
    torch.manual_seed(0)
    state, idx = book_state(128, qkv_bias), torch.randint(50, (3, 8))
    with_adam = {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save(with_adam if with_optimizer else compiled, tmp_path / "model.pth")
    gpt, rest = load_model(tmp_path / "model.pth")
    torch.testing.assert_close(gpt(idx), book_logits(state, idx), atol=1e-4, rtol=1e-4)
    assert set(rest) == {"tokenizer", "vocabulary"} and not rest["tokenizer"] and not gpt.training
    assert "heads are not stored: 2 assumed, as in the book" in capsys.readouterr().err
    torch.save(book_state(32, qkv_bias), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="cannot read .*: its number of heads is not known"):
        load_model(tmp_path / "model.pth")
