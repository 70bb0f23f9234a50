import io
import math
import os
import pickle

from model import GPT, Cache, GPTConfig, dropout, rotate, rotation

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = dict(vocab_size=50, context_length=8, n_layer=2, n_head=2, n_embd=16)


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | changes)).eval()


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
    with torch.device("meta"):
        assert GPT(GPTConfig(**changes)).num_parameters() == parameters


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
    """GPT-2's forward pass for one sequence (T,), written out position by position."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in gpt.state_dict().items()}
    C, heads = gpt.config.n_embd, gpt.config.n_head
    D = C // heads

    def norm(x, name):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    xs = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(idx)]
    for n in range(gpt.config.n_layer):
        h = f"h.{n}."
        qkv = [linear(norm(x, h + "ln_1"), h + "attn.c_attn") for x in xs]
        for t in range(len(xs)):
            gathered = []
            for s in (slice(i * D, (i + 1) * D) for i in range(heads)):
                scores = [qkv[t][:C][s] @ qkv[u][C : 2 * C][s] / D**0.5 for u in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                gathered.append(sum(a * qkv[u][2 * C :][s] for u, a in enumerate(weights)))
            xs[t] = xs[t] + linear(torch.cat(gathered), h + "attn.c_proj")
        for t, x in enumerate(xs):
            x = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
            xs[t] = xs[t] + linear(x, h + "mlp.c_proj")
    return torch.stack([w["lm_head.weight"] @ norm(x, "ln_f") for x in xs])


@pytest.mark.parametrize("tie_weights", [True, False])
def test_forward_is_gpt2_written_out(tie_weights):
    gpt = small(tie_weights=tie_weights)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # biases and gains that matter
    idx = torch.randint(50, (2, 8))
    with torch.no_grad():
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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_the_right_rate_and_is_independent(p):
    torch.manual_seed(0)
    x, y = (dropout(torch.ones(1000, 1001), p) for _ in range(2))
    kept = x > 0
    assert torch.equal(x[kept], torch.full_like(x[kept], 1 / (1 - round(p * 65536) / 65536)))
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


def test_recomputing_activations_changes_nothing():
    gpt, idx = lively(dropout=0.5).train(), torch.randint(50, (2, 8))
    grads = []
    for gpt.recompute in (False, True):
        torch.manual_seed(4)
        gpt.zero_grad()
        gpt(idx, idx.roll(1)).backward()
        grads.append([p.grad.clone() for p in gpt.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads))


def test_flops_of_the_published_model():
    """124M: 6 x (85M in blocks + 38.6M in the head) + 12 x 12 x 1024 x 768."""
    with torch.device("meta"):
        flops = GPT(GPTConfig()).flops_per_token()
    assert flops == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768


def test_weight_decay_is_for_matrices_alone():
    gpt = small()
    decayed, others = gpt.optimizer_groups(0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {
        1
    }
    assert len(decayed["params"]) + len(others["params"]) == len(list(gpt.parameters()))


@pytest.mark.parametrize("length, new", [(3, 4), (8, 1), (2, 20), (12, 5)])
def test_greedy_generation_is_the_argmax_of_the_cropped_context(length, new):
    gpt, idx = small(), torch.randint(50, (2, length))
    expected = idx
    for _ in range(new):
        token = gpt(expected[:, -8:])[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, token), 1)
    assert torch.equal(gpt.generate(idx, new, temperature=0, use_cache=False), expected)


def lively(**changes) -> GPT:
    """A model whose next token hangs on all of the tokens before it."""
    gpt = small(**changes)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return gpt


NEWER = dict(
    rotary=True,
    rms_norm=True,
    qk_norm=True,
)  # fields that GPT-2 has not, and a value of each that says so
COMBINATIONS = st.sets(st.sampled_from(list(NEWER))).map(lambda on: {x: NEWER[x] for x in on})
SHAPES = dict(
    B=st.integers(1, 4),
    T=st.integers(1, 24),
    length=st.integers(1, 30),
    qkv_bias=st.booleans(),
    n_head=st.sampled_from([1, 2, 4]),
    newer=COMBINATIONS,
)


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_the_cache_changes_no_token_until_the_context_is_full(
    B, T, length, qkv_bias, n_head, newer
):
    gpt = lively(context_length=T, qkv_bias=qkv_bias, n_head=n_head, **newer)
    idx = torch.randint(50, (B, length))
    new = max(1, T - length + 1)  # the last of them is the first that does not fit
    expected = gpt.generate(idx, new, temperature=0, use_cache=False)
    assert torch.equal(gpt.generate(idx, new, temperature=0), expected)


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_a_full_cache_starts_again_from_half_of_the_context(B, T, length, qkv_bias, n_head, newer):
    gpt = lively(context_length=T, qkv_bias=qkv_bias, n_head=n_head, **newer)
    expected = idx = torch.randint(50, (B, length))
    window = idx[:, -T:]
    for _ in range(2 * T + 3):
        token = gpt(window)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, token), 1)
        full = window.shape[1] == T
        window = expected[:, -max(1, T // 2) :] if full else torch.cat((window, token), 1)
    assert torch.equal(gpt.generate(idx, 2 * T + 3, temperature=0), expected)


def test_one_refill_per_half_context(monkeypatch):
    gpt, lengths = small(), []
    original = GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, idx, **k: lengths.append(idx.shape[1]) or original(self, idx, **k),
    )
    gpt.generate(torch.randint(50, (1, 3)), 20, temperature=0)
    assert lengths == [3, 1, 1, 1, 1, 1] + [4, 1, 1, 1, 1] * 2 + [4, 1, 1, 1]


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(COMBINATIONS)
def test_the_static_cache_that_compiled_code_uses_gives_the_same_tokens(newer):
    gpt, idx = lively(**newer), torch.randint(50, (3, 2))
    caches = [Cache(gpt.config, 3, 8, gpt.lm_head.weight, static) for static in (False, True)]
    for new in (idx, idx[:, :1], idx[:, 1:], idx[:, :1]):
        for cache in caches:
            cache.advance(new.shape[1])
        one, other = (gpt(new, cache=cache) for cache in caches)
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("newer", [{}, NEWER])
def test_generation_in_16_bits_is_that_of_float32_but_for_rounding(
    newer, dtype, static, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda gpt, **options: gpt)
    exact, gpt, text = lively(**newer), lively(**newer).to(dtype), torch.randint(50, (2, 3))
    for token, logits in gpt.stream(text, 6, temperature=0, compile=static):
        expected = exact(text)[:, -1]
        assert (logits - expected).norm() < 0.05 * expected.norm()
        text = torch.cat((text, token), dim=1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_that_all_rows_share_is_computed_once(length, compile, monkeypatch):
    gpt, prompt, seen, compiled = lively(), torch.randint(50, (1, length)).expand(4, -1), [], []

    def fake(gpt, **options):
        def run(new, cache):
            compiled.append(tuple(new.shape))
            return gpt(new, cache=cache)

        return run

    monkeypatch.setattr(torch, "compile", fake)
    gpt.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    text = gpt.generate(prompt, 12, seed=1, compile=compile)
    one = [(4, 1)]  # the only shape that is ever compiled
    refilled = [(4, 4)] + 4 * one  # a full context goes on with its last half
    assert seen == ([(1, length)] + (8 - length) * one + 2 * refilled)[:12]
    assert compiled == (seen.count(one[0]) * one if compile else [])
    assert torch.equal(text[:, :8], gpt.generate(prompt, 8 - length, seed=1, use_cache=False))
    for _, logits in gpt.stream(prompt, 2, compile=compile):
        logits[0, 0] = 7  # theirs who asked for it
        assert logits[1, 0] != 7


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_packed_matrices_give_the_same_logits(qkv_bias):
    gpt, idx = lively(qkv_bias=qkv_bias), torch.randint(50, (3, 8))
    expected, text = gpt(idx), gpt.generate(idx, 9, temperature=0)
    gpt.pack()
    assert not isinstance(gpt.lm_head, torch.nn.Linear)  # PyTorch here has oneDNN
    torch.testing.assert_close(gpt(idx), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(gpt.generate(idx, 9, temperature=0), text)


def test_packing_leaves_alone_what_cannot_be_packed(monkeypatch):
    gpt, idx = small(), torch.randint(50, (3, 8))
    expected = gpt(idx)

    def refuse(weight, batch_size=None):
        raise RuntimeError("no such dtype on this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert torch.equal(gpt.pack()(idx), expected)


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
    assert torch.equal(gpt.generate(idx, 12, seed=6), many[1:2])


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
    stream.close()  # whoever reads need not read to the end
    assert gpt.training and torch.is_grad_enabled()


BOOLEANS = (st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), *BOOLEANS, COMBINATIONS)
def test_any_small_shape_works(n_layer, n_head, bias, qkv_bias, tie_weights, newer):
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=4 * n_head)
    gpt = small(**shape, bias=bias, qkv_bias=qkv_bias, tie_weights=tie_weights, **newer)
    loss = gpt(torch.randint(50, (2, 8)), torch.randint(50, (2, 8)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=10, n_head=3), "n_embd .10. must be a multiple of n_head .3."),
        (dict(n_layer=0), "n_layer is 0; it must be at least 1"),
        (dict(vocab_size=-1), "vocab_size is -1"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(n_embd=15, n_head=5, rotary=True), "rotary needs an even number of channels"),
    ],
)
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)


# --- Newer than GPT-2 -----------------------------------------------------------------------------


def test_rotary_scores_follow_from_the_distance_alone():
    """And by hand: a pair of channels (a, b) at position p is a + bi, turned by p radians."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    scores = [
        (rotate(q, *rotation(torch.tensor([p]), 8)) * rotate(k, *rotation(torch.tensor([r]), 8)))
        .sum()
        .item()
        for p, r in ((3, 1), (12, 10), (502, 500), (3, 2))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) == pytest.approx(scores[2], abs=1e-3)
    assert abs(scores[0] - scores[3]) > 0.01
    x = rotate(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), *rotation(torch.tensor([2]), 2))
    turned = complex(3, 4) * complex(math.cos(2), math.sin(2))
    assert x.flatten().tolist() == pytest.approx([turned.real, turned.imag], rel=1e-5)
    slowest = rotate(torch.eye(8)[3].view(1, 1, 1, 8), *rotation(torch.tensor([7]), 8))
    assert slowest[0, 0, 0, 7].item() == pytest.approx(math.sin(7 * 10_000**-0.75), rel=1e-5)


def modern_by_hand(gpt: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The forward pass with every newer field for one sequence (T,), position by position."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in gpt.state_dict().items()}
    C, heads = gpt.config.n_embd, gpt.config.n_head
    D = C // heads

    def norm(x):
        return x / (x.square().mean() + 1e-5).sqrt()

    def turned(x, position):
        out = x.clone()
        for i in range(D // 2):
            angle = position * 10_000 ** (-2 * i / D)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[i + D // 2] * sin
            out[i + D // 2] = x[i + D // 2] * cos + x[i] * sin
        return out

    xs = [norm(w["wte.weight"][token]) for token in idx]
    for n in range(gpt.config.n_layer):
        h = f"h.{n}."
        qkv = [w[h + "attn.c_attn.weight"] @ norm(x) for x in xs]
        for t in range(len(xs)):
            gathered = []
            for s in (slice(i * D, (i + 1) * D) for i in range(heads)):
                q = turned(norm(qkv[t][:C][s]), t)
                ks = [turned(norm(qkv[u][C : 2 * C][s]), u) for u in range(t + 1)]
                weights = torch.stack([q @ k / D**0.5 for k in ks]).softmax(0)
                values = [qkv[u][2 * C :][s] for u in range(t + 1)]
                gathered.append(sum(a * v for a, v in zip(weights, values)))
            xs[t] = xs[t] + w[h + "attn.c_proj.weight"] @ torch.cat(gathered)
        for t, x in enumerate(xs):
            x = w[h + "mlp.c_fc.weight"] @ norm(x)
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            xs[t] = xs[t] + w[h + "mlp.c_proj.weight"] @ x
    return torch.stack([w["lm_head.weight"] @ norm(x) for x in xs])


@torch.no_grad()
def test_forward_with_every_newer_field_is_what_is_written_out():
    gpt = lively(**NEWER, bias=False, tie_weights=False)
    idx = torch.randint(50, (2, 8))
    expected = torch.stack([modern_by_hand(gpt, row) for row in idx])
    torch.testing.assert_close(gpt(idx), expected, atol=1e-4, rtol=1e-4)


def test_every_newer_field_matters():
    idx = torch.randint(50, (2, 8))
    plain = lively()(idx)
    for field, value in NEWER.items():
        assert not torch.allclose(lively(**{field: value})(idx), plain, atol=1e-3), field


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
    assert torch.equal(GPT.from_checkpoint(path).eval()(idx), gpt(idx))


@pytest.mark.parametrize("field", NEWER)
def test_what_is_no_gpt2_is_not_exported(tmp_path, field):
    with pytest.raises(ValueError, match=f"not expressible as GPT-2: .*({field})"):
        small(**{field: NEWER[field]}).save_pretrained(str(tmp_path / "x"), "gpt2")
    assert not (tmp_path / "x").exists()


# --- Checkpoints ----------------------------------------------------------------------------------


def checkpoint_bytes(**changes) -> bytes:
    gpt, file = small(), io.BytesIO()
    contents = {"model": gpt.state_dict(), "model_args": SMALL, "tokenizer": "gpt2", "step": 3}
    torch.save(contents | changes, file)
    return file.getvalue()


def changed(function) -> dict:
    state = small().state_dict()
    return state | {"transformer.ln_f.weight": function(state["transformer.ln_f.weight"])}


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a checkpoint but some other file"),
        (b"Once upon a time", "not a checkpoint but some other file"),
        (pickle.dumps(Malice()), "not a checkpoint but some other file"),
        (checkpoint_bytes()[:1000], "is truncated: its end is missing"),
        (checkpoint_bytes()[:-1], "is truncated: its end is missing"),
        (checkpoint_bytes(step=Malice()), "asks for code to be run, which is refused"),
        (checkpoint_bytes(model=3), "is foreign: it does not hold 'model'"),
        (checkpoint_bytes(model_args=None), "is foreign: it does not hold 'model_args'"),
        (checkpoint_bytes(model_args=SMALL | {"n_embd": 32}), "do not fit its model_args: size"),
        (checkpoint_bytes(model_args=SMALL | {"n_layer": 10**9}), "tensors of 2 layers"),
        (checkpoint_bytes(model_args=SMALL | {"n_layer": "2"}), "does not fit what it says"),
        (checkpoint_bytes(model_args=SMALL | {"n_head": 5}), "must be a multiple of n_head"),
        (
            checkpoint_bytes(model_args=SMALL | {"depth": 5}),
            "does not fit what it says of itself: .*depth",
        ),
        (checkpoint_bytes(model={}), "tensors of 0 layers"),
        (checkpoint_bytes(model={"transformer.h.0": 3, "transformer.h.1": 3}), "do not fit"),
        (checkpoint_bytes(model={3: torch.ones(2)}), "does not fit what it says"),
        (checkpoint_bytes(model=changed(lambda t: t.to_sparse())), "layout|sparse"),
        (checkpoint_bytes(model=changed(lambda t: t.int())), "is of torch.int32"),
        (checkpoint_bytes(model=changed(lambda t: t + 1j)), "is of torch.complex64"),
    ],
)
def test_checkpoints_from_strangers(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        GPT.from_checkpoint("x.ckpt")
    assert not (tmp_path / "malice").exists()


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


def test_nanogpts_checkpoint_loads(tmp_path):
    """Written by `torch.compile`d code of another name for context_length, with a tied head."""
    gpt = small()
    state = {f"_orig_mod.{name}": tensor for name, tensor in gpt.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True, vocab_size=50, dropout=0.0)
    contents = dict(model=state, model_args=args, iter_num=7, best_val_loss=torch.tensor(3.0))
    torch.save(contents | {"config": {"dataset": "x"}, "optimizer": {}}, tmp_path / "ckpt.pt")
    loaded, idx = GPT.from_checkpoint(tmp_path / "ckpt.pt", dropout=0.1), torch.randint(50, (2, 8))
    assert loaded.config.context_length == 8 and loaded.config.dropout == 0.1
    assert torch.equal(loaded.eval()(idx), gpt(idx))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
