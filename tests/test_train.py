import copy
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys

import prepare
import train
from model import GPT, GPTConfig

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from faults import differences
from hypothesis import given, settings
from hypothesis import strategies as st

MODERN = [str(ROOT / "config/modern.py")]


def metrics(folder="out", name="metrics.jsonl"):
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in open(f"{folder}/{name}")]
    for line in lines:
        line.pop("seconds")
        line.pop("tokens_per_second", None)
    return lines


# --- Memory ---------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, train, torch
if sys.argv[1] == "train":
    train.precision(train.TrainConfig(device="cpu"))
counts = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)  # a quarter of a GB, and gone
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts[1:]))  # the system may take idle memory away at any one of them
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_freed_memory_is_used_again():
    def faults(how):
        argv = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)

    assert faults("train") < 20 < faults("as it is")


# --- Batches --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permute_is_a_permutation(n, seed):
    out = train.permute(np.arange(n), n, np.random.default_rng(seed))
    assert sorted(out) == list(range(n))


def test_permute_is_well_shuffled():
    """Every place comes to every other place about equally often (chi-squared, 11 x 11)."""
    n, rounds = 12, 12_000
    counts = np.zeros((n, n))
    for seed in range(rounds):
        counts[np.arange(n), train.permute(np.arange(n), n, np.random.default_rng(seed))] += 1
    expected = rounds / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 121 + 6 * math.sqrt(2 * 121)
    big = train.permute(np.arange(100_000), 100_000, np.random.default_rng(0))
    assert abs(np.corrcoef(np.arange(100_000), big)[0, 1]) < 0.02
    assert len(set(np.diff(big[:2000]))) > 1900  # no regular stride


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(20, 400),
    batch_size=st.integers(1, 7),
    T=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_an_epoch_visits_every_window_once(tokens, batch_size, T, seed):
    stream = np.arange(tokens, dtype=np.uint16)
    windows = (tokens - 1) // T
    rows, step = [], 0
    while len(rows) < 3 * windows:
        x, y = train.get_batch(stream, step, batch_size=batch_size, context_length=T, seed=seed)
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (batch_size, T)
        assert torch.equal(y, (x + 1) % tokens)  # the token after each
        rows += x.tolist()
        step += 1
    offsets = set()
    for epoch in range(3):
        starts = {row[0] for row in rows[epoch * windows : (epoch + 1) * windows]}
        assert len(starts) == windows  # none twice
        [offset] = {o for o in starts if {(o + i * T) % tokens for i in range(windows)} == starts}
        offsets.add(offset)
    assert len(offsets) > 1 or tokens < 30 or T == 1 or tokens % T == 0
    again = train.get_batch(stream, 1, batch_size=batch_size, context_length=T, seed=seed)[0]
    assert rows[batch_size : 2 * batch_size] == again.tolist()[: len(rows) - batch_size]


def test_fixed_windows_are_the_books():
    stream, rows = np.arange(4612, dtype=np.uint16), []
    for step in range(18):
        x, _ = train.get_batch(
            stream, step, batch_size=2, context_length=256, seed=1, shift_windows=False
        )
        rows += x[:, 0].tolist()
    assert sorted(rows[:18]) == sorted(rows[18:]) == list(range(0, 18 * 256, 256))
    assert rows[:18] != rows[18:]


def test_seeds_and_epochs_differ():
    stream = np.arange(1000, dtype=np.uint16)

    def order(seed, epoch):
        x, _ = train.get_batch(stream, epoch, batch_size=62, context_length=16, seed=seed)
        return x[:, 0].tolist()

    assert order(0, 0) != order(1, 0) and order(0, 0) != order(0, 1)


# --- Schedule -------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    config = train.TrainConfig(
        max_iters=90, warmup_iters=18, learning_rate=5e-4, initial_lr=3e-5, min_lr=1e-6
    )
    rate = {step: train.get_lr(step, config) for step in range(91)}
    assert rate[0] == 3e-5
    assert rate[1] == pytest.approx(3e-5 + (5e-4 - 3e-5) / 18)
    assert rate[9] == pytest.approx(2.65e-4)  # half-way up
    assert rate[18] == 5e-4
    assert rate[54] == pytest.approx((5e-4 + 1e-6) / 2)  # half-way down
    assert rate[72] == pytest.approx(1e-6 + 4.99e-4 * 0.5 * (1 - math.sqrt(0.5)))  # cos(3 pi / 4)
    assert rate[90] == pytest.approx(1e-6)
    assert max(rate.values()) == rate[18]
    config.lr_schedule = "constant"
    assert {train.get_lr(step, config) for step in range(18, 200)} == {5e-4}
    assert train.get_lr(0, train.TrainConfig(warmup_iters=0, learning_rate=1e-3)) == 1e-3


def test_warmup_stable_decay_by_hand():
    config = train.TrainConfig(
        lr_schedule="wsd", max_iters=100, warmup_iters=10, learning_rate=0.02, min_lr=0.004
    )
    config.cooldown_fraction = 0.4
    rate = [train.get_lr(step, config) for step in range(121)]
    assert rate[5] == pytest.approx(0.01) and set(rate[10:61]) == {0.02}
    assert rate[80] == pytest.approx(0.012)  # half-way down
    assert rate[99] == pytest.approx(0.0044) and rate[100] == rate[120] == pytest.approx(0.004)


# --- Optimizers -----------------------------------------------------------------------------------

MUON = dict(optimizer="muon", learning_rate=0.02, embedding_learning_rate=0.006)
MUON |= dict(head_learning_rate=0.004, n_layer=2, n_head=2, n_embd=16, vocab_size=50)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_has_one_optimizer_and_its_own_rate(tie_weights):
    config = train.TrainConfig(**MUON, tie_weights=tie_weights)
    gpt = GPT(GPTConfig(**config.model_args()))
    adamw, muon = train.make_optimizers(gpt, config)
    groups = [(x, group) for x in (adamw, muon) for group in x.param_groups]
    rates = {p: (type(x).__name__, group["share"]) for x, group in groups for p in group["params"]}
    assert sum(len(group["params"]) for _, group in groups) == len(list(gpt.parameters()))
    for name, p in gpt.named_parameters():
        expected = ("AdamW", 0.3)
        if name.startswith("transformer.h.") and p.dim() == 2:
            expected = ("Muon", 1)
        if name == "lm_head.weight":
            expected = ("AdamW", 0.2 * 128 / 16)  # falls with the channels
        assert rates[p] == (expected[0], pytest.approx(expected[1])), name


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_muon_is_pytorchs(shape):
    """But for queries, keys and values, and for the dtype: theirs is bfloat16, of two digits."""
    torch.manual_seed(0)
    start, options = torch.randn(shape), dict(lr=0.1, momentum=0.9, weight_decay=0.5)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        train.Muon([mine], torch.float32, **options),
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
        train.Muon(params, torch.float32, **options).step()
    torch.testing.assert_close(whole.detach(), torch.cat(parts).detach())


def test_muon_takes_each_matrix_in_turn():
    """With an interval of 2 the others wait; a step is then twice as long, of all gradients."""
    torch.manual_seed(0)
    start, grads = torch.randn(2, 16, 16), torch.randn(4, 2, 16, 16)
    options = dict(lr=0.01, momentum=0.9, weight_decay=0.5)
    turns = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    each = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    taking_turns = train.Muon(turns, torch.float32, 2, **options)
    always = train.Muon(each, torch.float32, **(options | dict(lr=0.02)))
    for number in range(4):
        before = [p.detach().clone() for p in turns]
        for p, q, grad in zip(turns, each, grads[number]):
            p.grad, q.grad = grad.clone(), grad.clone()
        taking_turns.number = number
        taking_turns.step()
        mine, other = number % 2, 1 - number % 2
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
    out = train.orthogonal((u * values @ v)[None] * 1e-9, torch.float32)[0]
    found = torch.linalg.svdvals(out)
    assert 0.3 < found.min() and found.max() < 1.3
    assert out.shape == (rows, columns)
    assert not train.orthogonal(torch.zeros(2, 3), torch.float32).any()


def test_a_skipped_update_leaves_weights_and_state_alone_in_muon_too():
    config = train.TrainConfig(**MUON, context_length=8, batch_size=2)
    gpt = GPT(GPTConfig(**config.model_args())).train()
    optimizers = train.make_optimizers(gpt, config)
    scaler, none = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", enabled=False)

    def step(number):
        batch = torch.randint(50, (2, 2, 8)).unbind(0)
        train.update(gpt, optimizers, scaler, none, batch, config, number)
        return {"gpt": gpt.state_dict(), "optimizer": train.optimizer_state(gpt, optimizers)}

    before = copy.deepcopy(step(0))
    for parameter in (gpt.transformer.wte.weight, gpt.transformer.h[0].mlp.c_fc.weight):
        hook = parameter.register_hook(lambda grad: grad * math.nan)
        assert differences(before, step(1)) == []
        hook.remove()
    assert differences(before, step(2)) != []


def test_a_run_with_muon_interrupted_is_the_run(command, dataset, folder, monkeypatch):
    run = [*MODERN, *TINY, "--max_iters=20"]
    assert command("train.py", *run, "--out_dir=whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert command("train.py", *run, "--out_dir=parts")[0] == 130
    code, out, _ = command("train.py", *run, "--out_dir=parts", "--init_from=resume")
    assert code == 0 and "changed" not in out
    assert metrics("whole") == metrics("parts")
    ends = [torch.load(f"{x}/model.ckpt", weights_only=True) for x in ("whole", "parts")]
    assert differences(*ends) == []
    assert {frozenset(x) for x in ends[0]["optimizer"].values()} == {
        frozenset(x) for x in train.OPTIMIZER_STATE.values()
    }
    assert command("sample.py", "--ckpt=whole/model.ckpt", "--start=a")[0] == 0
    assert command("sample.py", "--ckpt=whole/model.ckpt", "--score=words.txt")[0] == 0
    code, _, err = command("sample.py", "--ckpt=whole/model.ckpt", "--export=x")
    assert code == 2 and "not expressible as GPT-2" in err and err.count("\n") == 1


@pytest.mark.parametrize("first, second", [("adamw", "muon"), ("muon", "adamw")])
def test_resume_refuses_another_optimizer(command, dataset, folder, first, second):
    assert command("train.py", *TINY, f"--optimizer={first}")[0] == 0
    argv = [f"--optimizer={second}", "--init_from=resume", "--max_iters=9"]
    code, _, err = command("train.py", *TINY, *argv)
    assert code == 2 and f"model.ckpt is of --optimizer {first}: with another use" in err
    assert err.count("\n") == 1


# --- Evaluation -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(9, 200), st.integers(1, 5))
def test_a_small_split_is_seen_whole(tokens, micro_batch_size):
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(vocab_size=50, context_length=8, n_layer=1, n_head=1, n_embd=8, dropout=0.5)
    )
    split = np.random.default_rng(0).integers(50, size=tokens).astype(np.uint16)
    config = train.TrainConfig(
        vocab_size=50,
        context_length=8,
        batch_size=5,
        micro_batch_size=micro_batch_size,
        eval_iters=100,
    )
    cpu, none = torch.device("cpu"), torch.autocast("cpu", enabled=False)
    got = train.estimate_loss(gpt, {"val": split}, config, cpu, none)["val"]
    assert gpt.training
    gpt.eval()
    total = 0.0
    for start in range(0, tokens - 1, 8):
        x = torch.from_numpy(split[start : start + 9].astype(np.int64))[None]
        total += gpt(x[:, :-1], x[:, 1:]).item() * (x.shape[1] - 1)
    assert got == pytest.approx(total / (tokens - 1), rel=1e-5)


# --- Runs -----------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_promises(command, dataset, folder):
    code, out, err = command("train.py", *TINY, "--max_iters=60", "--learning_rate=1e-2")
    assert code == 0 and err == ""
    assert "words.txt" in out.splitlines()[0]
    lines = metrics()
    evals = [line for line in lines if "val_loss" in line]
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == list(range(1, 61))
    assert [line["step"] for line in evals] == list(range(0, 61, 3))
    assert set(logs[0]) == {"step", "loss", "lr", "grad_norm"}
    for line in evals:
        assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))
    assert evals[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert evals[-1]["val_loss"] < 3.0
    ckpt = torch.load("out/model.ckpt", weights_only=True)
    assert set(ckpt) >= set(
        "model model_args config tokenizer step best_val_loss optimizer".split()
    )
    assert (ckpt["step"], ckpt["tokenizer"]) == (60, "bytes")
    assert ckpt["best_val_loss"] == min(line["val_loss"] for line in evals)
    assert ckpt["model_args"]["vocab_size"] == 257 and ckpt["config"]["max_iters"] == 60
    gpt = GPT.from_checkpoint("out/model.ckpt")
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert all(torch.equal(gpt.state_dict()[name], ckpt["model"][name]) for name in ckpt["model"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(command, dataset):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ["--dropout=0.1", f"--out_dir={name}", f"--seed={seed}"]
        assert command("train.py", *TINY, *argv)[0] == 0
    assert metrics("a") == metrics("b") != metrics("c")


def test_micro_batches_add_up_to_the_batch(command, dataset):
    for micro in (4, 2, 3):
        argv = [f"--micro_batch_size={micro}", f"--out_dir={micro}", "--dtype=float32"]
        assert command("train.py", *TINY, *argv)[0] == 0
    for micro in ("2", "3"):
        for one, other in zip(metrics("4"), metrics(micro)):
            assert one == pytest.approx(other, rel=1e-4)


def test_one_update_is_adamw_by_hand(command, dataset, folder):
    """Clipped gradient, decay on matrices alone, Adam's first step: lr times the sign."""
    argv = ["--max_iters=1", "--warmup_iters=0", "--learning_rate=0.01", "--weight_decay=0.5"]
    argv += ["--dtype=float32", "--grad_clip=0.1", "--lr_schedule=constant"]
    assert command("train.py", *TINY, *argv)[0] == 0
    torch.manual_seed(1337)
    gpt = GPT(GPTConfig(257, 16, 2, 2, 16))
    stream = np.fromfile("data/words/train.bin", np.uint16)
    loss = gpt(*train.get_batch(stream, 0, batch_size=4, context_length=16, seed=1337))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in gpt.parameters()))
    log = next(line for line in metrics() if "loss" in line)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
    after = GPT.from_checkpoint("out/model.ckpt").state_dict()
    for name, p in gpt.named_parameters():
        g = p.grad * 0.1 / norm
        kept = p * (1 - 0.01 * 0.5) if p.dim() == 2 else p
        expected = kept - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected.detach(), atol=1e-5, rtol=1e-3)


def test_a_fresh_run_keeps_the_old_ones_files(command, dataset, folder):
    command("train.py", *TINY)
    ckpt = (folder / "out/model.ckpt").read_bytes()
    code, out, _ = command("train.py", *TINY, "--seed=2")
    assert code == 0 and "out/model.ckpt of an earlier run is now model.ckpt.bak" in out
    assert (
        (folder / "out/model.ckpt.bak").read_bytes()
        == ckpt
        != (folder / "out/model.ckpt").read_bytes()
    )
    assert (folder / "out/metrics.jsonl.bak").exists() and (folder / "out/loss.png.bak").exists()
    second = (folder / "out/model.ckpt").read_bytes()
    _, out, _ = command("train.py", *TINY, "--seed=3")
    assert "out/model.ckpt of an earlier run is now model.ckpt.bak2" in out
    assert (folder / "out/model.ckpt.bak").read_bytes() == ckpt
    assert (folder / "out/model.ckpt.bak2").read_bytes() == second


@pytest.mark.parametrize("renamed", [1, 2])
def test_files_set_aside_by_a_run_that_is_killed_meanwhile(
    command, dataset, folder, monkeypatch, renamed
):
    command("train.py", *TINY)
    before = (folder / "out/metrics.jsonl").read_bytes()
    replace, moved = os.replace, []

    def once(source, target):
        if len(moved) == renamed:
            raise KeyboardInterrupt
        moved.append(source)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", once)
        train.keep_old(folder / "out")
    command("train.py", *TINY, "--seed=2")
    left = [path.read_bytes() for path in (folder / "out").glob("metrics.jsonl.bak*")]
    assert before in left and (folder / "out/model.ckpt.bak2").exists()


def test_weights_of_another_run_can_be_the_start(command, dataset):
    command("train.py", *TINY, "--out_dir=a")
    argv = ["--max_iters=1", "--out_dir=b", "--init_from=a/model.ckpt", "--dtype=float32"]
    assert command("train.py", *TINY, *argv)[0] == 0
    first, last = metrics("b")[0], metrics("a")[-1]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(last["val_loss"], rel=1e-2)


def test_ctrl_c_saves_and_resume_goes_on(dataset, folder):
    argv = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=100000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step") and " loss " in line and "validation" not in line:
                break
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
    assert process.returncode == 130
    assert out.splitlines()[-1].startswith("to go on: python train.py")
    step = torch.load("out/model.ckpt", weights_only=True)["step"]
    assert step == metrics()[-1]["step"] > 0
    more = [*TINY, f"--max_iters={step + 2}", "--init_from=resume"]
    assert subprocess.run([*argv[:2], *more], capture_output=True).returncode == 0
    assert [x["step"] for x in metrics() if "loss" in x] == list(range(1, step + 3))


def interrupt_at(monkeypatch, *steps):
    """Ctrl-C in the middle of each of these updates."""
    original = train.update

    def update(*args):
        if args[-1] in steps:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(train, "update", update)


def test_a_run_interrupted_three_times_is_the_run(command, dataset, folder, monkeypatch):
    run = [*TINY, "--max_iters=20", "--dropout=0.2", "--micro_batch_size=2"]
    assert command("train.py", *run, "--out_dir=whole")[0] == 0
    run += ["--out_dir=parts"]
    for n, at in enumerate((4, 9, 14)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, at)
            code, out, _ = command("train.py", *run, *(["--init_from=resume"] if n else []))
        assert code == 130 and "--init_from" in out.splitlines()[-1]
        assert torch.load("parts/model.ckpt", weights_only=True)["step"] == at + 1
    assert command("train.py", *run, "--init_from=resume")[0] == 0
    assert metrics("whole") == metrics("parts")
    ends = [torch.load(f"{x}/model.ckpt", weights_only=True) for x in ("whole", "parts")]
    assert differences(*ends) == []


def test_resume_goes_back_to_the_checkpoint_in_metrics_too(command, dataset, folder):
    command("train.py", *TINY)
    lines = (folder / "out/metrics.jsonl").read_text()
    with open("out/metrics.jsonl", "a") as file:  # what a killed run may have left
        file.write('{"step": 7, "seconds": 1, "loss": 3.0}\n{"step": 8, "sec')
    assert command("train.py", *TINY, "--init_from=resume", "--max_iters=7")[0] == 0
    after = (folder / "out/metrics.jsonl").read_text()
    assert after.startswith(lines)
    assert [line["step"] for line in metrics()][-3:] == [6, 7, 7]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer=3"], "is of another model: n_layer (2 there, 3 here)"),
        (["--n_embd=32", "--no"], "there is no setting 'no'"),
        (["--bias=false", "--max_iters=9"], "is of another model: bias (True there, False here)"),
        (["--dataset=other", "--max_iters=9"], "not what out/model.ckpt was trained on"),
    ],
)
def test_resume_refuses_what_would_be_another_run(command, dataset, folder, argv, message):
    command("train.py", *TINY)
    before = (folder / "out/model.ckpt").read_bytes(), (folder / "out/metrics.jsonl").read_bytes()
    (folder / "other.txt").write_text("every effort " * 500)
    command("prepare.py", "other.txt", "--tokenizer=bytes")
    code, _, err = command("train.py", *TINY, "--init_from=resume", *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    after = (folder / "out/model.ckpt").read_bytes(), (folder / "out/metrics.jsonl").read_bytes()
    assert before == after


def test_a_run_killed_after_its_last_save_is_done(command, dataset, folder):
    command("train.py", *TINY)
    before = metrics(), (folder / "out/model.ckpt").read_bytes()
    (folder / "out/loss.png").unlink(missing_ok=True)
    code, out, _ = command("train.py", *TINY, "--init_from=resume")
    assert code == 0 and "all 6 updates are done; a larger --max_iters goes on" in out
    assert before == (metrics(), (folder / "out/model.ckpt").read_bytes())


def test_seconds_go_on_where_they_were(command, dataset):
    command("train.py", *TINY)
    command("train.py", *TINY, "--init_from=resume", "--max_iters=8")
    seconds = [json.loads(line)["seconds"] for line in open("out/metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_a_fresh_run_that_never_saved_leaves_nothing_to_resume(command, dataset, monkeypatch):
    """Its metrics must not be taken for those of the run before, nor that one's weights for its."""
    command("train.py", *TINY)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command("train.py", *TINY, "--seed=2")
    code, _, err = command("train.py", *TINY, "--seed=2", "--init_from=resume")
    assert code == 2 and "there is no checkpoint out/model.ckpt" in err
    assert len(metrics("out", "metrics.jsonl.bak")) == 9
    command("train.py", *TINY, "--seed=2")  # the first run's files stay where they are
    assert torch.load("out/model.ckpt.bak", weights_only=True)["config"]["seed"] == 1337
    assert len(metrics("out", "metrics.jsonl.bak")) == 9


def test_the_best_of_a_run_that_never_saved_is_kept(command, dataset, folder):
    command("train.py", *TINY, "--save_best")
    best = (folder / "out/best.ckpt").read_bytes()
    os.remove("out/model.ckpt")  # as if it had been killed before
    command("train.py", *TINY)
    assert (folder / "out/best.ckpt.bak").read_bytes() == best
    assert not (folder / "out/best.ckpt").exists()  # it is not this run's


def without(*path):
    """A change that takes something out of a checkpoint."""

    def change(ckpt):
        for name in path[:-1]:
            ckpt = ckpt[name]
        del ckpt[path[-1]]

    return change


def put(*path, value):
    def change(ckpt):
        for name in path[:-1]:
            ckpt = ckpt[name]
        ckpt[path[-1]] = value

    return change


GAIN = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (without("optimizer"), "has no optimizer to resume with"),
        (without("config"), "has no config to resume with"),
        (without("scaler"), "has no scaler to resume with"),
        (without("best_val_loss"), "has no best_val_loss to resume with"),
        (put("config", value=3), "has no config to resume with"),
        (put("step", value="x"), "has no step to resume with"),
        (put("step", value=-5), "has no step to resume with"),
        (put("step", value=2.5), "has no step to resume with"),
        (put("optimizer", value={}), "AdamW's state of transformer.wte.weight is missing"),
        (put("optimizer", GAIN, value=3), f"AdamW's state of {GAIN} is missing"),
        (without("optimizer", GAIN, "exp_avg"), f"AdamW's state of {GAIN} is missing"),
        (put("optimizer", GAIN, "exp_avg", value=torch.zeros(1)), "exp_avg of"),
        (put("optimizer", GAIN, "step", value="x"), f"step of {GAIN} does not fit it"),
    ],
)
def test_a_checkpoint_whose_optimizer_does_not_fit(command, dataset, folder, change, message):
    command("train.py", *TINY)
    ckpt = torch.load("out/model.ckpt", weights_only=True)
    change(ckpt)
    torch.save(ckpt, "out/model.ckpt")
    before = (folder / "out/metrics.jsonl").read_bytes()
    code, _, err = command("train.py", *TINY, "--init_from=resume", "--max_iters=9")
    assert code == 2 and message in err and err.count("\n") == 1
    assert (folder / "out/metrics.jsonl").read_bytes() == before


def test_a_full_disk_costs_lines_of_metrics_and_nothing_else(command, dataset, monkeypatch):
    assert command("train.py", *TINY, "--out_dir=a")[0] == 0
    original = train.Metrics.append

    class Full:
        def __init__(self, file):
            self.file, self.name = file, file.name
            self.seek, self.truncate = file.seek, file.truncate

        def write(self, line):
            return self.file.write(line[:7])  # room for half a line

    def append(self, values):
        file = self.file
        if values["step"] == 4:
            self.file = Full(file)
        original(self, values)
        self.file = file

    monkeypatch.setattr(train.Metrics, "append", append)
    code, out, _ = command("train.py", *TINY, "--out_dir=b")
    assert code == 0 and "b/metrics.jsonl lacks the line of step 4: the disk is full" in out
    assert metrics("b") == [line for line in metrics("a") if line["step"] != 4]


def test_whoever_stops_reading_does_not_stop_the_run(dataset, folder):
    argv = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=200"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")
    assert torch.load("out/model.ckpt", weights_only=True)["step"] == 200


def test_ids_outside_the_vocabulary_wherever_they_are(command, dataset, monkeypatch):
    ids = np.fromfile("data/words/train.bin", np.uint16)
    ids[5000] = 40_000
    ids.tofile("data/words/train.bin")
    os.remove("data/words/meta.json")
    monkeypatch.setattr(prepare, "sample_blocks", lambda ids: [ids[:100]])  # as in a huge file
    code, _, err = command("train.py", *TINY, "--vocab_size=257", "--max_iters=900")
    assert code == 2 and "data/words holds token id 40,000, outside the vocabulary of 257" in err
    assert err.count("\n") == 1


def test_a_text_of_a_few_letters(command, folder):
    (folder / "short.txt").write_text("ab")
    assert command("prepare.py", "short.txt", "--tokenizer=bytes")[0] == 0
    code, _, err = command("train.py", *TINY, "--dataset=short")
    assert code == 2 and err.count("\n") == 1
    assert "train.bin has 1 tokens, too few for context_length 16: prepare more text" in err


def test_a_sample_prompt_outside_the_vocabulary(command, dataset):
    os.remove("data/words/meta.json")  # gpt2 ids, as far as anyone knows
    argv = ["--vocab_size=257", "--sample_prompt=Every effort"]
    code, out, err = command("train.py", *TINY, *argv)
    assert (code, err) == (0, "") and "no samples: 'Every effort' is outside the vocabulary" in out


def test_another_validation_split_is_another_dataset(command, dataset):
    command("train.py", *TINY)
    ids = np.fromfile("data/words/val.bin", np.uint16)
    ids[::-1].tofile("data/words/val.bin")
    meta = dict(tokenizer="bytes", vocab_size=257, dtype="uint16")
    (dataset / "meta.json").write_text(json.dumps(meta))
    argv = ["--init_from=resume", "--max_iters=9"]
    code, _, err = command("train.py", *TINY, *argv)
    assert code == 2 and "is not what out/model.ckpt was trained on" in err


def test_weights_that_read_other_tokens_are_refused(command, dataset, folder):
    command("train.py", *TINY, "--out_dir=a")
    assert command("prepare.py", "words.txt", "--dataset=gpt2")[0] == 0
    for argv in (["--init_from=a/model.ckpt"], ["--init_from=resume", "--out_dir=a"]):
        code, _, err = command("train.py", *TINY, "--dataset=gpt2", *argv)
        assert code == 2 and "the model reads bytes tokens, data/gpt2 holds gpt2" in err


def test_weights_bring_their_shape_and_may_see_less(command, dataset):
    command("train.py", *TINY, "--out_dir=a")
    argv = ["--init_from=a/model.ckpt", "--context_length=9", "--n_layer=5"]
    code, out, _ = command("train.py", *TINY, *argv)
    assert code == 0 and "n_layer is 2, that of a/model.ckpt, not 5" in out
    assert GPT.from_checkpoint("out/model.ckpt").config.context_length == 9


def test_a_run_from_weights_is_resumed_by_what_it_says(command, dataset, monkeypatch):
    command("train.py", *TINY, "--out_dir=a")
    argv = ["--dataset=words", "--init_from=a/model.ckpt", "--out_dir=b", "--sample_prompt="]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        code, out, _ = command("train.py", *argv, "--max_iters=5")
    assert code == 130
    words = shlex.split(out.splitlines()[-1].removeprefix("to go on: python train.py "))
    code, out, err = command("train.py", *words)
    assert (code, err) == (0, "") and "changed since" not in out
    assert "epochs; going on after 3\n" in out
    assert torch.load("b/model.ckpt", weights_only=True)["step"] == 5


def test_a_loss_without_a_number_is_skipped_with_a_scaler_too(command, dataset, monkeypatch):
    """An infinite loss whose gradient is finite, which the scaler alone would not notice."""
    original = GPT.forward

    def forward(self, idx, targets=None, **options):
        loss = original(self, idx, targets, **options)
        return loss + math.inf if self.training and targets is not None else loss

    monkeypatch.setattr(GPT, "forward", forward)
    argv = ["--dtype=float16", "--max_iters=1", "--warmup_iters=0"]  # or else its rate is 0
    assert command("train.py", *TINY, *argv)[0] == 0
    torch.manual_seed(1337)
    first = GPT(GPTConfig(257, 16, 2, 2, 16)).state_dict()
    after = torch.load("out/model.ckpt", weights_only=True)["model"]
    assert all(torch.equal(first[name], after[name]) for name in first)


def test_a_resume_at_step_0_has_one_line_of_it(command, dataset, monkeypatch):
    original = train.estimate_loss

    def estimate_loss(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "estimate_loss", estimate_loss)
        assert command("train.py", *TINY)[0] == 130
    assert command("train.py", *TINY, "--init_from=resume")[0] == 0
    assert [line["step"] for line in metrics()].count(0) == 1


def test_what_is_refused_leaves_an_earlier_run_alone(command, dataset, folder, monkeypatch):
    command("train.py", *TINY)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert command("train.py", *TINY, "--wandb")[0] == 2
    assert (folder / "out/model.ckpt").exists() and len(metrics()) == 9


def test_a_second_signal_of_any_kind_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with train.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_compile_that_fails_backwards(command, dataset, monkeypatch):
    def compile(gpt, dynamic):
        def forward(*args):
            loss = gpt(*args)
            loss.register_hook(lambda grad: 1 / 0)
            return loss

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    code, out, _ = command("train.py", *TINY, "--compile")
    assert code == 0 and "not compiled, training is slower for it: division by zero" in out


@pytest.mark.parametrize("message", ["no C compiler\nand many more lines", ""])
def test_compile_that_cannot_be_had(command, dataset, monkeypatch, message):
    def refuse(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", lambda model, **options: refuse)
    code, out, err = command("train.py", *TINY, "--compile")
    assert (code, err) == (0, "")
    assert "not compiled, training is slower for it: " in out and "many more" not in out


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("Quadro T400", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_card_is_its_own_or_none(card, peak):
    assert train.peak_flops(card) == peak


def test_where_the_time_went(command, dataset):
    _, out, _ = command("train.py", *TINY)
    line = next(line for line in out.splitlines() if line.startswith("6 updates in"))
    shares = [int(word.rstrip("%,")) for word in line.split() if "%" in word]
    assert "training" in line and "evaluation" in line and "saving" in line
    assert 97 <= sum(shares) <= 103


def test_resume_reports_what_changed(command, dataset):
    command("train.py", *TINY)
    argv = ["--init_from=resume", "--max_iters=8", "--learning_rate=0.5", "--beta1=0.5"]
    code, out, _ = command("train.py", *TINY, *argv)
    assert code == 0
    assert "changed since the checkpoint: learning_rate was 0.0006, is 0.5" in out


def test_a_loss_that_is_not_finite_never_reaches_the_weights(command, dataset, monkeypatch):
    """Of six updates the third is poisoned: the run is that of the five others."""
    original = GPT.forward

    def run(poisoned, out, *argv):
        calls = []

        def forward(self, idx, targets=None):
            loss = original(self, idx, targets)
            if targets is not None and self.training:
                calls.append(1)
                if len(calls) in poisoned:
                    loss = loss * math.inf
            return loss

        monkeypatch.setattr(GPT, "forward", forward)
        return command("train.py", *TINY, f"--out_dir={out}", "--lr_schedule=constant", *argv)

    code, out, _ = run({3}, "a")
    assert code == 0 and "skipped 1 of the updates" in out
    logs = [line for line in metrics("a") if "lr" in line]
    assert [line["loss"] is None for line in logs] == [False, False, True, False, False, False]
    ckpt = torch.load("a/model.ckpt", weights_only=True)
    assert all(x.isfinite().all() for x in ckpt["model"].values())
    assert ckpt["optimizer"]["transformer.wte.weight"]["step"] == 5

    # The weights that several skipped updates follow may be the ones to blame, or may not: both
    # they and the checkpoint before are kept.
    code, out, err = run(range(4, 100), "b", "--checkpoint_interval=2")
    assert code == 0 and "b/model.ckpt not saved" not in out
    assert "the last 3 updates were skipped; model.ckpt.bak is of before them" in out
    for name, step in (("model.ckpt", 6), ("model.ckpt.bak", 4)):
        assert torch.load(f"b/{name}", weights_only=True)["step"] == step
    assert (
        run(range(2, 100), "c", "--checkpoint_interval=4")[1].count("c/model.ckpt not saved") == 1
    )


def poison(monkeypatch, first, last=10**9):
    """Gradients that are not numbers in the updates from `first` to `last`."""
    original = train.update

    def update(model, *args):
        if first <= args[-1] <= last:
            model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
        else:
            model.lm_head.weight._backward_hooks = None
        return original(model, *args)

    monkeypatch.setattr(train, "update", update)


@pytest.mark.parametrize("log_interval", [1, 50])
def test_training_stops_after_several_in_a_row(command, dataset, folder, monkeypatch, log_interval):
    argv = ["--max_iters=60", "--checkpoint_interval=5", "--max_skipped=4"]
    argv += [f"--log_interval={log_interval}"]
    with monkeypatch.context() as patch:
        poison(patch, 12)
        code, out, err = command("train.py", *TINY, *argv)
    assert "updates in a row had no finite loss or gradient; model.ckpt is of step 10" in str(code)
    ckpt = torch.load("out/model.ckpt", weights_only=True)
    assert ckpt["step"] == 10 and all(x.isfinite().all() for x in ckpt["model"].values())
    assert command("train.py", *TINY, *argv, "--init_from=resume")[0] == 0


def test_skipped_updates_between_log_lines_are_reported(command, dataset, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 3, 4)
        code, out, _ = command("train.py", *TINY, "--log_interval=50")
    assert code == 0 and out.count("skipped 2 of the updates") == 1
    with monkeypatch.context() as patch:
        poison(patch, 1, 4)  # long enough to stop for, though it has ended by the end
        code, _, _ = command("train.py", *TINY, "--log_interval=50", "--max_skipped=4")
    assert "stopped: 4 updates in a row" in str(code)


def test_float16_with_its_scaler(command, dataset):
    """The only dtype with a scaler; a run may go on in it, and from it in another."""
    argv = [*TINY, "--max_iters=20", "--learning_rate=1e-2"]
    assert command("train.py", *argv, "--dtype=float16", "--out_dir=a")[0] == 0
    assert command("train.py", *argv, "--dtype=float32", "--out_dir=b")[0] == 0
    a, b = metrics("a")[-1]["val_loss"], metrics("b")[-1]["val_loss"]
    assert a == pytest.approx(b, abs=0.05) and b < 5
    for out_dir, dtype in (("b", "float16"), ("a", "float32")):
        more = ["--max_iters=22", "--init_from=resume", f"--dtype={dtype}", f"--out_dir={out_dir}"]
        assert command("train.py", *argv, *more)[0] == 0


def test_save_best(command, dataset):
    argv = ["--save_best", "--max_iters=40", "--learning_rate=0.3", "--grad_clip=0"]
    assert command("train.py", *TINY, *argv)[0] == 0
    evals = [line for line in metrics() if "val_loss" in line and line["step"]]
    best = min(evals, key=lambda line: line["val_loss"])
    ckpt = torch.load("out/best.ckpt", weights_only=True)
    assert (ckpt["step"], ckpt["best_val_loss"]) == (best["step"], best["val_loss"])
    assert "optimizer" not in ckpt
    assert command("sample.py", "--ckpt=out/best.ckpt", "--start=a")[0] == 0
    code, _, err = command("train.py", *TINY, "--init_from=resume", "--max_iters=99")
    assert code == 0
    os.replace("out/best.ckpt", "out/model.ckpt")
    code, _, err = command("train.py", *TINY, "--init_from=resume", "--max_iters=99")
    assert code == 2 and "no optimizer to resume with" in err


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: (d / "train.bin").write_bytes(b"\1\0" * 99), "99 uint16 ids and 0 bytes over"),
        (lambda d: (d / "val.bin").write_bytes((d / "val.bin").read_bytes()[:-1]), "1 bytes over"),
        (lambda d: (d / "val.bin").write_bytes(b""), "has 0 bytes"),
        (lambda d: (d / "val.bin").unlink(), "there is no data/words/val.bin"),
        (lambda d: flip(d / "train.bin"), "train.bin is not what meta.json describes"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json cannot be used"),
        (lambda d: (d / "meta.json").write_text("[1]"), "meta.json cannot be used"),
        (lambda d: (d / "meta.json").write_text('{"dtype": "O"}'), "meta.json cannot be used"),
        (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe"), "meta.json cannot be used"),
    ],
)
def test_a_damaged_dataset_is_refused(command, dataset, harm, message):
    harm(dataset)
    code, _, err = command("train.py", *TINY)
    assert code == 2 and message in err and err.count("\n") == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_plot_is_drawn(command, dataset, folder):
    pytest.importorskip("matplotlib")
    assert command("train.py", *TINY)[0] == 0
    assert (folder / "out/loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_or_wandb(command, dataset, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, out, _ = command("train.py", *TINY)
    assert code == 0 and "pip install matplotlib" in out and not (folder / "out/loss.png").exists()
    code, _, err = command("train.py", *TINY, "--wandb")
    assert code == 2 and "pip install wandb" in err


def test_wandb_gets_the_keys_of_metrics(command, dataset, monkeypatch):
    class Recorder(list):
        def init(self, **kwargs):
            return self

        def log(self, values, step):
            self.append({"step": step} | values)

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    assert command("train.py", *TINY, "--wandb")[0] == 0
    for line in recorder:
        line.pop("tokens_per_second", None)
        assert line.pop("seconds") >= 0
    assert recorder == metrics()


def test_nanogpt_data_is_read_as_gpt2_ids(command, folder):
    (folder / "data/old").mkdir(parents=True)
    ids = np.random.default_rng(0).integers(50257, size=500).astype(np.uint16)
    ids.tofile("data/old/train.bin")
    ids[:100].tofile("data/old/val.bin")
    code, out, _ = command("train.py", *TINY, "--dataset=old", "--max_iters=1")
    ckpt = torch.load("out/model.ckpt", weights_only=True)
    assert code == 0 and ckpt["tokenizer"] == "gpt2" and ckpt["model_args"]["vocab_size"] == 50257


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--dataset=none_such"],
            "data/none_such/train.bin; make it with: python prepare.py",
        ),
        (["--context_length=99999"], "too few for context_length 99,999: take --context_length"),
        (["--vocab_size=50"], "outside the vocabulary of 50"),
        (["--n_embd=15"], "n_embd (15) must be a multiple of n_head (2)"),
        (["--n_layer=0"], "n_layer is 0; it must be at least 1"),
        (["--batch_size=-1"], "batch_size is -1; the least is 1"),
        (["--micro_batch_size=0"], "micro_batch_size is 0; the least is 1"),
        (["--learning_rate=-1"], "learning_rate is -1.0; the least is 0"),
        (["--learning_rate=1e999"], "learning_rate is inf; the least is 0"),
        (["--beta2=1"], "beta2 is 1.0; it must be in [0, 1)"),
        (["--dropout=1.5"], "dropout is 1.5"),
        (["--n_layers=3"], "there is no setting 'n_layers'; did you mean n_layer?"),
        (["--max_iters=many"], "--max_iters is 'many'; it must be int"),
        (["--n_layer=100000000"], "parameters takes"),
        (["--n_embd=1000000"], "parameters takes"),
        (["--dataset=../words"], "there is no data/../words/train.bin"),
        (["--seed=-1"], "seed is -1; the least is 0"),
        (["--warmup_iters=-3"], "warmup_iters is -3; the least is 0"),
        (["--embedding_std=-1"], "embedding_std is -1.0"),
        (["--vocab_size=0"], "vocab_size is 0; it must be at least 1"),
        (["--max_iters"], "--max_iters needs a value"),
        (["--init_from=."], ". lacks config.json"),
        (["--seed=99999999999999999999999"], "--seed is 99999999999999999999...; it is too large"),
        (["--batch_size", "9" * 20], "it is too large"),
        (["--max_iters", "1" + "0" * 400], "it is too large"),
        (["--device=privateuseone"], "--device privateuseone cannot be used here"),
        (["--tokenizer=bytes"], "there is no setting 'tokenizer'"),
        (["--wandb=perhaps"], "--wandb is 'perhaps'; it must be bool"),
        (["--out_dir=words.txt"], "File exists: 'words.txt'"),
        (["--dtype=int8"], "must be auto or float32 or bfloat16 or float16"),
        (["--device=cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device=tpu"], "--device tpu cannot be used here"),
        (["--init_from=resume"], "there is no checkpoint out/model.ckpt; train.py makes one"),
        (["--init_from=words.txt"], "words.txt is not a checkpoint"),
        (["config/none.py"], "cannot read config file config/none.py: No such file"),
        (["words.txt"], "words.txt, line 1"),
    ],
)
def test_refused(command, dataset, folder, argv, message):
    code, out, err = command("train.py", *TINY, *argv)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (folder / "out").exists()


def test_plan(command, dataset, folder):
    """Figures of the paper, a checkpoint as large as foretold, and nothing done."""
    code, out, _ = command("train.py", "--vocab_size=50257", "--batch_size=480", "--plan")
    assert code == 0 and "124,439,808 parameters: token embedding 38,597,376" in out
    # 6 for each multiplied parameter, 12 L T C for attention
    assert (
        f"{(6 * (124_439_808 - 786_432 - 38_400 - 82_944) + 12**2 * 1024 * 768) / 1e9:.3g}" in out
    )
    for argv in ([], ["--optimizer=muon", "--tie_weights=false"]):
        code, out, _ = command("train.py", *TINY, *argv, "--plan")
        assert code == 0 and not (folder / "out").exists()
        assert "8  fsdp      they cannot share 4 sequences" in out
        size = float(out.split("checkpoint")[1].split()[0]) * 1e9
        assert command("train.py", *TINY, *argv)[0] == 0
        tensors = torch.load("out/model.ckpt", weights_only=True)
        states = [x for state in tensors["optimizer"].values() for x in state.values() if x.dim()]
        weights = {x.data_ptr(): x for x in tensors["model"].values()}.values()
        assert sum(4 * x.numel() for x in [*states, *weights]) == pytest.approx(size, rel=1e-3)
        for path in (folder / "out").iterdir():
            path.unlink()
        (folder / "out").rmdir()


def test_activations_are_counted():
    """A linear layer's input is kept once, and recomputed blocks keep their inputs alone."""
    config = train.TrainConfig(n_layer=3, n_head=2, n_embd=64, context_length=32, vocab_size=50)
    none = torch.autocast("cpu", enabled=False)
    one, two = (train.count_activations(config, B, none, False) for B in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.02)
    stream, kept = 4 * 2 * 32 * 64, train.count_activations(config, 2, none, True)
    # embeddings' sum, a block's input thrice, ln_f's, log-probabilities, ids and targets
    assert 4 * stream < kept < 8 * stream + 4 * 2 * 32 * 50 < two


def test_help_reads_every_setting_without_data(shell):
    code, out, _ = shell("train.py", "--help")
    assert code == 0
    for field in train.TrainConfig.__dataclass_fields__:
        line = next(line for line in out.splitlines() if line.startswith(f"  --{field} "))
        assert len(line.split()) > 4, line
