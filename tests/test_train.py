import contextlib
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial

import config
import prepare
import train
from model import GPT, GPTConfig

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, words
from faults import differences, metrics, result, without_clock
from hypothesis import given, settings
from hypothesis import strategies as st

MODERN = [str(ROOT / "config/modern.py")]


def load(path="out/model.ckpt") -> dict:
    return torch.load(path, weights_only=True)


def at_update(monkeypatch, numbers, act):
    """Call `act` in the middle of each of these updates; the first one is 1."""
    original = train.get_batch

    def get_batch(split, step, *args):
        if step + 1 in numbers:
            act()
        return original(split, step, *args)

    monkeypatch.setattr(train, "get_batch", get_batch)


def interrupt_at(monkeypatch, *numbers):
    at_update(monkeypatch, numbers, lambda: signal.raise_signal(signal.SIGINT))


def nan_gradient(loss):
    loss.register_hook(lambda grad: grad * math.nan)
    return loss


def poison(monkeypatch, numbers, harm=nan_gradient):
    """Harm the losses of these updates."""
    harmed, get_batch, forward = [], train.get_batch, GPT.forward

    def noted(split, step, *args):
        harmed[:] = [1] if step + 1 in numbers else []
        return get_batch(split, step, *args)

    def forward_harmed(self, idx, targets=None, **options):
        loss = forward(self, idx, targets, **options)
        return harm(loss) if harmed and self.training and targets is not None else loss

    monkeypatch.setattr(train, "get_batch", noted)
    monkeypatch.setattr(GPT, "forward", forward_harmed)


# --- Memory ---------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch, train
try:
    if len(sys.argv) > 1:
        train.main(sys.argv[1:])
except SystemExit:
    pass
counts = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)  # a quarter of a GB, and gone
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts[1:]))  # the system may take idle memory away at any one of them
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_freed_memory_is_used_again(dataset):
    def faults(*argv):
        words, environment = [sys.executable, "-c", FAULTS, *argv], dict(PYTHONPATH=str(ROOT))
        out = subprocess.check_output(words, env=os.environ | environment, text=True)
        return int(out.splitlines()[-1])

    assert 5 * faults(*TINY, "--max_iters=1", "--device=cpu") < faults()


# --- Batches --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permute_is_a_permutation(n, seed):
    out = train.permute(np.arange(n), n, np.random.default_rng(seed))
    assert sorted(out) == list(range(n))


def test_permute_is_well_shuffled():
    """Every place comes to every other place about equally often (chi-squared, 11 x 11)."""
    n, rounds = 12, 3000
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
    config = train.TrainConfig(
        batch_size=batch_size, context_length=T, seed=seed, vocab_size=tokens
    )
    windows = (tokens - 1) // T
    rows, step = [], 0
    while len(rows) < 3 * windows:
        x, y = train.get_batch(stream, step, config)
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
    again = train.get_batch(stream, 1, config)[0]
    assert rows[batch_size : 2 * batch_size] == again.tolist()[: len(rows) - batch_size]


def test_fixed_windows_are_the_books():
    def starts(seed):
        config = train.TrainConfig(
            batch_size=2, context_length=256, seed=seed, shift_windows=False, vocab_size=4612
        )
        stream = np.arange(4612, dtype=np.uint16)
        return torch.cat([train.get_batch(stream, n, config)[0][:, 0] for n in range(18)]).tolist()

    rows = starts(1)
    assert sorted(rows[:18]) == sorted(rows[18:]) == list(range(0, 18 * 256, 256))
    assert rows[:18] != rows[18:]  # epochs differ
    assert rows != starts(2)  # and seeds


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
    none = torch.autocast("cpu", enabled=False)
    got = train.estimate_loss(gpt, {"val": split}, config, none)["val"]
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
    assert code == 0 and err == "" and "words.txt" in out.splitlines()[0]
    assert "pip install matplotlib" in out and not (folder / "out/loss.png").exists()
    lines = metrics("out")
    evals = [line for line in lines if "val_loss" in line]
    logs = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logs] == list(range(1, 61))
    assert [line["step"] for line in evals] == list(range(0, 61, 3))
    assert set(logs[0]) == {"step", "loss", "lr", "grad_norm"}
    for line in evals:
        assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2))
    assert evals[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert evals[-1]["val_loss"] < 3.0
    ckpt = load()
    names = "model model_args config tokenizer step best_val_loss optimizer scaler dataset run_id"
    assert set(ckpt) == {*names.split(), "metrics"}
    assert (ckpt["step"], ckpt["tokenizer"]) == (60, "bytes")
    assert ckpt["best_val_loss"] == min(line["val_loss"] for line in evals)
    assert ckpt["model_args"]["vocab_size"] == 257 and ckpt["config"]["max_iters"] == 60
    assert ckpt["config"]["vocab_size"] == 257 and ckpt["config"]["micro_batch_size"] is None
    assert without_clock(ckpt["metrics"]) == lines
    gpt = GPT.from_checkpoint("out/model.ckpt")
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    assert all(torch.equal(gpt.state_dict()[name], ckpt["model"][name]) for name in ckpt["model"])
    line = next(line for line in out.splitlines() if line.startswith("60 updates in"))
    shares = [int(word.rstrip("%,")) for word in line.split() if "%" in word]
    assert "training" in line and "evaluation" in line and "saving" in line
    assert 97 <= sum(shares) <= 103


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
    config = train.TrainConfig(batch_size=4, context_length=16, vocab_size=257)
    loss = gpt(*train.get_batch(stream, 0, config))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in gpt.parameters()))
    log = next(line for line in metrics("out") if "loss" in line)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
    after = GPT.from_checkpoint("out/model.ckpt").state_dict()
    for name, p in gpt.named_parameters():
        g = p.grad * 0.1 / norm
        kept = p * (1 - 0.01 * 0.5) if p.dim() == 2 else p
        expected = kept - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected.detach(), atol=1e-5, rtol=1e-3)


def test_a_second_signal_of_any_kind_stops_at_once(command, dataset, monkeypatch):
    handlers = []

    def interrupt():
        signal.raise_signal(signal.SIGINT)
        handlers.extend(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))

    at_update(monkeypatch, [2], interrupt)
    assert command("train.py", *TINY)[0] == 130 and load()["step"] == 2
    assert handlers == [signal.SIG_DFL] * 2


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
    step = load()["step"]
    assert step == metrics("out")[-1]["step"] > 0
    more = [*TINY, f"--max_iters={step + 2}", "--init_from=resume"]
    assert subprocess.run([*argv[:2], *more], capture_output=True).returncode == 0
    assert [x["step"] for x in metrics("out") if "loss" in x] == list(range(1, step + 3))


def test_a_closed_output_does_not_stop_the_run(dataset, folder):
    argv = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=200"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        err = process.stderr.read()
    assert (process.returncode, err) == (0, b"")
    assert load()["step"] == 200


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [["--dropout=0.2", "--micro_batch_size=2"], MODERN])
def test_a_run_interrupted_three_times_is_the_run(command, dataset, monkeypatch, kind):
    run = [*kind, *TINY, "--max_iters=20"]
    assert command("train.py", *run, "--out_dir=whole")[0] == 0
    run += ["--out_dir=parts"]
    for n, at in enumerate((5, 10, 15)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, at)
            code, out, _ = command("train.py", *run, *(["--init_from=resume"] if n else []))
        assert code == 130 and "--init_from resume" in out.splitlines()[-1]
        assert load("parts/model.ckpt")["step"] == at
    code, out, _ = command("train.py", *run, "--init_from=resume")
    assert code == 0 and "changed" not in out
    assert differences(result("whole"), result("parts")) == []


def test_resume_alone_goes_on_with_any_run(command, dataset, folder, monkeypatch):
    """Begun from weights and a config file with another dataset, rate and length."""
    lines = [word.removeprefix("--") for word in TINY[:-2]]
    lines += ['dataset = "words"', 'sample_prompt = ""', "max_iters = 8", "learning_rate = 0.01"]
    (folder / "mine.py").write_text("\n".join([*lines, "dropout = 0.1"]))
    assert command("train.py", "mine.py", "--seed=2", "--max_iters=1", "--out_dir=a")[0] == 0
    argv = ["mine.py", "--init_from=a/model.ckpt"]
    assert command("train.py", *argv, "--out_dir=whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, out, _ = command("train.py", *argv)
    assert code == 130
    words = shlex.split(out.splitlines()[-1].removeprefix("to go on: python train.py "))
    assert words == ["--init_from", "resume", "--out_dir", "out"]
    code, out, err = command("train.py", "--init_from=resume")
    assert (code, err) == (0, "") and "changed" not in out and "going on after 3\n" in out
    assert differences(result("whole"), result("out")) == []


@pytest.mark.parametrize("kind", [["--dropout=0.1"], MODERN])
def test_saving_changes_nothing(command, dataset, kind):
    ends = []
    for interval in (1, 500):
        argv = [*kind, *TINY, f"--checkpoint_interval={interval}", f"--out_dir={interval}"]
        assert command("train.py", *argv)[1].count("saved: step") == (6 if interval == 1 else 1)
        ends.append(result(str(interval)))
        del ends[-1][0]["config"]["checkpoint_interval"]
    assert differences(*ends) == []


def test_another_weight_decay_is_reported_and_used(command, dataset, folder):
    argv = [*TINY, "--learning_rate=0.01", "--lr_schedule=constant"]
    weights = []
    for more in ([], ["--weight_decay=0.9"]):
        assert command("train.py", *argv)[0] == 0
        before = load()["model"]
        code, out, _ = command("train.py", "--init_from=resume", "--max_iters=7", *more)
        assert ("changed since the checkpoint: weight_decay was 0.1, is 0.9" in out) == bool(more)
        assert code == 0 and "changed since the checkpoint: max_iters was 6, is 7" in out
        weights.append(load()["model"])
    for name, weight in before.items():
        decay = 0.01 * (0.9 - 0.1) * weight if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(weights[0][name] - weights[1][name], decay, atol=1e-7, rtol=1e-3)


def test_a_given_none_replaces_a_value(command, dataset):
    command("train.py", *TINY, "--micro_batch_size=2")
    argv = ["--init_from=resume", "--max_iters=7", "--micro_batch_size=none", "--vocab_size=none"]
    code, out, _ = command("train.py", *argv)
    assert code == 0 and "changed since the checkpoint: micro_batch_size was 2, is None" in out
    assert load()["config"]["micro_batch_size"] is None


def test_resume_goes_back_to_the_checkpoint_in_metrics_too(command, dataset, folder):
    command("train.py", *TINY)
    path = folder / "out/metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"step": 7, "seconds": 1, "loss": 3.0}\n{"step": 8, "sec')  # killed
    assert command("train.py", "--init_from=resume", "--max_iters=7")[0] == 0
    assert path.read_text().startswith(lines)
    assert [line["step"] for line in metrics("out")][-3:] == [6, 7, 7]
    seconds = [line["seconds"] for line in load()["metrics"]]
    assert seconds == sorted(seconds)


def test_a_run_killed_after_its_last_save_is_done(command, dataset, folder):
    command("train.py", *TINY)
    before = contents(folder)
    code, out, _ = command("train.py", "--init_from=resume")
    assert code == 0 and "0 updates in" in out and contents(folder) == before


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer=3"], "n_layer is 2 in out/model.ckpt and cannot be 3"),
        (
            ["--n_layer=12"],
            "n_layer is 2 in out/model.ckpt and cannot be 12",
        ),  # was given, though it is the default
        (["--bias=false"], "bias is True in out/model.ckpt and cannot be False"),
        (["--optimizer=muon"], "optimizer is adamw in out/model.ckpt and cannot be muon"),
        (["--dataset=other"], "data/other is not what the model was trained on"),
        (["--parallel=fsdp"], "--parallel fsdp is for several processes: start them with torchrun"),
    ],
)
def test_resume_refuses_what_would_be_another_run(command, dataset, folder, argv, message):
    command("train.py", *TINY)
    (folder / "other.txt").write_text("every effort " * 500)
    command("prepare.py", "other.txt", "--tokenizer=bytes")
    before = contents(folder)
    code, _, err = command("train.py", "--init_from=resume", "--max_iters=9", *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert contents(folder) == before


def put(*path, value=None):
    """A change to a checkpoint: a value in a nest of dicts, or, for None, its removal."""

    def change(ckpt):
        for name in path[:-1]:
            ckpt = ckpt[name]
        ckpt[path[-1]] = value
        if value is None:
            del ckpt[path[-1]]

    return change


GAIN = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (put("scaler"), "has no scaler to resume with"),
        (put("metrics"), "has no metrics to resume with"),  # the first version had none
        (put("config", value=3), "has no config to resume with"),
        (put("step"), "has no step to resume with"),
        (put("tokenizer", value=None), "has no tokenizer to resume with"),
        (put("config", "batch_size", value="x"), "batch_size is 'x'; it must be int"),
        (put("optimizer", GAIN), "the optimizer's state does not fit the model"),
        (put("optimizer", GAIN, "exp_avg", value=torch.zeros(1)), "state does not fit the model"),
        (put("optimizer", GAIN, "step", value="x"), "the checkpoint cannot be resumed"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed(command, dataset, folder, change, message):
    command("train.py", *TINY)
    ckpt = load()
    change(ckpt)
    torch.save(ckpt, "out/model.ckpt")
    before = contents(folder)
    code, _, err = command("train.py", "--init_from=resume", "--max_iters=9")
    assert code == 2 and message in err and err.count("\n") == 1
    assert contents(folder) == before


# --- An earlier run's files -----------------------------------------------------------------------


def test_an_earlier_run_moves_into_a_folder_of_its_own(command, dataset, folder):
    out = folder / "out"
    assert command("train.py", *TINY, "--save_best")[0] == 0
    (out / "loss.png").write_bytes(b"a picture")
    first = contents(folder)
    assert command("train.py", *TINY, "--seed=2", "--save_best")[0] == 0
    assert first == {out / path.name: path.read_bytes() for path in (out / "earlier-1").iterdir()}
    best = (out / "best.ckpt").read_bytes()
    os.remove(out / "model.ckpt")  # as if that run had been killed before
    assert command("train.py", *TINY, "--seed=3")[0] == 0
    assert {path.name for path in (out / "earlier-2").iterdir()} == {"best.ckpt", "metrics.jsonl"}
    assert (out / "earlier-2/best.ckpt").read_bytes() == best
    assert not (out / "best.ckpt").exists()  # it is not this run's


def refuse(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)


def interrupt_before_the_first_update(monkeypatch):
    original = train.estimate_loss

    def estimate_loss(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(train, "estimate_loss", estimate_loss)


def interrupt_after_a_skipped_update(monkeypatch):
    poison(monkeypatch, [1])
    interrupt_at(monkeypatch, 1)


@pytest.mark.parametrize(
    "stop, code",
    [
        (refuse, 2),
        (interrupt_before_the_first_update, 130),
        (interrupt_after_a_skipped_update, 1),
        (lambda patch: at_update(patch, [1], lambda: 1 / 0), None),
    ],
)
def test_without_a_first_update_an_earlier_run_stays(
    command, dataset, folder, monkeypatch, stop, code
):
    command("train.py", *TINY, "--save_best")
    before = contents(folder)
    with monkeypatch.context() as patch:
        stop(patch)
        try:
            found, out, _ = command("train.py", *TINY, "--seed=2", f"--wandb={stop == refuse}")
        except ZeroDivisionError:
            found, out = None, ""
    assert found == code and "to go on" not in out and " saved: " not in out
    assert contents(folder) == before
    code, out, _ = command("train.py", "--init_from=resume", "--max_iters=7")
    assert code == 0 and "going on after 6\n" in out


@pytest.mark.parametrize("moved", [0, 1])
def test_an_earlier_file_that_cannot_be_moved(command, dataset, folder, monkeypatch, moved):
    command("train.py", *TINY)
    before, replace, done = contents(folder), os.replace, []
    (folder / "out/earlier-1").write_text("a file in the way")

    def once(source, target):
        if "earlier" in str(target):
            done.append(source)
            if len(done) > moved:
                raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once)
        code, _, err = command("train.py", *TINY, "--seed=2")
    assert code == 2 and "Permission denied" in err and err.count("\n") == 1
    assert set(before.values()) <= set(contents(folder).values())
    assert command("train.py", *TINY, "--seed=2")[0] == 0
    assert set(before.values()) <= set(contents(folder).values())
    assert load()["config"]["seed"] == 2


def test_a_full_disk_costs_lines_of_metrics_and_nothing_else(command, dataset, monkeypatch):
    assert command("train.py", *TINY, "--out_dir=a")[0] == 0
    opened = []

    def full(path, mode):
        opened.append(path)
        if len(opened) == 3:
            with open(path, mode) as file:
                file.write(b'{"ste')  # room for half a line
            raise OSError(28, "No space left on device")
        return open(path, mode)

    monkeypatch.setattr(train, "open", full, raising=False)
    code, out, _ = command("train.py", *TINY, "--out_dir=b")
    assert code == 0 and "No space left" in out
    assert out.count("b/metrics.jsonl lacks the line of step ") == 1
    assert metrics("b") == metrics("a")  # it is written again with the next line


# --- Datasets and weights -------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_wherever_they_are(command, dataset):
    ids = np.fromfile("data/words/train.bin", np.uint16)
    ids[5000] = 40_000
    ids.tofile("data/words/train.bin")
    os.remove("data/words/meta.json")
    code, _, err = command("train.py", *TINY, "--vocab_size=257", "--max_iters=900")
    assert code == 2 and "data/words holds token id 40,000; vocab_size is 257" in err
    assert err.count("\n") == 1


def test_a_dataset_that_cannot_be_mapped(command, dataset, monkeypatch):
    def memmap(*args, **options):
        raise OSError(19, "No such device")  # as on file systems without mmap

    monkeypatch.setattr(np, "memmap", memmap)
    code, _, err = command("train.py", *TINY)
    assert code == 2 and "train.py: [Errno 19] No such device" in err and err.count("\n") == 1


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
    (dataset / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    code, _, err = command("train.py", "--init_from=resume", "--max_iters=9")
    assert code == 2 and "is not what the model was trained on" in err


def test_weights_that_read_other_tokens_are_refused(command, dataset, folder):
    command("train.py", *TINY, "--out_dir=a")
    assert command("prepare.py", "words.txt", "--dataset=gpt2")[0] == 0
    for argv in (["--init_from=a/model.ckpt"], ["--init_from=resume", "--out_dir=a"]):
        code, _, err = command("train.py", *TINY, "--dataset=gpt2", *argv)
        assert code == 2 and "the model reads bytes tokens, data/gpt2 holds gpt2" in err


def test_an_own_vocabulary_is_in_the_checkpoint(command, dataset, folder):
    """So it is known without the dataset; another one of the same name is refused."""
    (folder / "other.txt").write_text(words(3000).replace("e", "u"))
    for name in ("words", "other"):
        argv = [f"{name}.txt", f"--dataset={name}", "--tokenizer=bpe:290"]
        assert command("prepare.py", *argv)[0] == 0
    code, out, _ = command("train.py", *TINY)
    assert code == 0 and re.search(r"to validate with \(bpe:290-\w{16}\)", out)
    assert load()["tokenizer"] == (dataset / "tokenizer.json").read_text()
    assert command("train.py", "--init_from=resume", "--max_iters=7")[::2] == (0, "")
    code, _, err = command("sample.py", "--score=val")
    assert (code, err) == (0, "")
    argv = [*TINY, "--dataset=other", "--init_from=out/model.ckpt", "--out_dir=b"]
    code, _, err = command("train.py", *argv)
    assert code == 2 and err.count("\n") == 1 and len(err) < 300
    assert re.search(r"reads bpe:290-\w+ tokens, data/other holds bpe:290-\w+: prepare", err)
    assert command("prepare.py", "other.txt", "--tokenizer=data/words")[0] == 0
    assert command("train.py", *argv)[::2] == (0, "")
    (dataset / "meta.json").unlink()
    assert command("sample.py", "--start=the", "--ckpt=b", "--max_new_tokens=3")[::2] == (0, "")


def test_weights_bring_their_shape_and_may_see_less(command, dataset):
    """A context longer than the default is kept, unless a shorter one is given."""
    shape = [word for word in TINY if "context" not in word]
    argv = [*shape, "--max_iters=1", "--dtype=float32"]
    command("train.py", *argv, "--out_dir=a", "--context_length=1200")
    argv += ["--init_from=a/model.ckpt", "--out_dir=b"]
    assert command("train.py", *argv)[0] == 0
    assert GPT.from_checkpoint("b/model.ckpt").config.context_length == 1200
    assert metrics("b")[0]["val_loss"] == pytest.approx(metrics("a")[-1]["val_loss"], rel=1e-5)
    assert command("train.py", *argv, "--context_length=9")[0] == 0
    assert GPT.from_checkpoint("b/model.ckpt").config.context_length == 9
    for name, value in (("n_layer", 12), ("context_length", 2000)):
        code, _, err = command("train.py", *argv, f"--{name}={value}")
        assert code == 2 and f"in a/model.ckpt and cannot be {value}" in err
        assert err.startswith(f"train.py: {name} is ") and err.count("\n") == 1


# --- Losses that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, harm",
    [
        (["--dtype=float16"], lambda loss: loss + math.inf),  # its gradient is finite
        ([], nan_gradient),
        (MODERN, lambda loss: loss * math.inf),
    ],
)
def test_an_update_without_a_finite_loss_is_skipped(command, dataset, monkeypatch, kind, harm):
    states = []
    at_update(monkeypatch, [3, 4], lambda: states.append(load()))
    poison(monkeypatch, [3], harm)
    argv = ["--checkpoint_interval=1", "--lr_schedule=constant", "--out_dir=out"]
    code, out, _ = command("train.py", *kind, *TINY, *argv)
    assert code == 0 and "step 3 skipped: loss " in out
    line = next(line for line in metrics("out") if line["step"] == 3 and "lr" in line)
    assert line["grad_norm" if harm is nan_gradient else "loss"] is None
    assert [state["step"] for state in states] == [2, 3]
    for part in ("model", "optimizer"):
        assert differences(states[0][part], states[1][part]) == []
    assert differences(states[0]["model"], load()["model"]) != []


def test_weights_after_several_skipped_updates_replace_no_checkpoint(command, dataset, monkeypatch):
    poison(monkeypatch, range(4, 100))
    code, out, _ = command("train.py", *TINY, "--checkpoint_interval=2", "--log_interval=50")
    assert code == 1 and out.count(" skipped: loss") == 3
    assert "out/model.ckpt NOT SAVED: updates skipped in a row: 3" in out
    assert load()["step"] == 4


@pytest.mark.parametrize("log_interval", [1, 50])
def test_training_stops_after_several_in_a_row(command, dataset, monkeypatch, log_interval):
    argv = ["--max_iters=60", "--checkpoint_interval=5", "--max_skipped=4"]
    with monkeypatch.context() as patch:
        poison(patch, range(12, 100))
        code, out, err = command("train.py", *TINY, *argv, f"--log_interval={log_interval}")
    assert (code, err) == (1, "") and out.count(" skipped: loss") == 4
    assert "NOT SAVED: updates skipped in a row: 4; lower --learning_rate" in out
    assert "\n15 updates in" in out and load()["step"] == 10
    assert command("train.py", "--init_from=resume")[0] == 0


def test_losses_that_are_all_nan(command, dataset, folder, monkeypatch):
    monkeypatch.setattr(train, "estimate_loss", lambda *_: dict(train=math.nan, val=math.nan))
    poison(monkeypatch, range(1, 100), lambda loss: loss * math.nan)
    code, out, err = command("train.py", *TINY)
    assert (code, err) == (1, "") and "NOT SAVED: updates skipped in a row: 6" in out
    assert "loss.png" not in out and not (folder / "out").exists()


def test_the_picture_is_drawn(command, dataset, folder, monkeypatch, picture):
    poison(monkeypatch, [3], lambda loss: loss * math.nan)
    code, out, _ = command("train.py", *TINY)
    assert code == 0 and "loss.png" not in out
    assert (folder / "out/loss.png").read_bytes().startswith(b"\x89PNG")


# --- Compiling and devices ------------------------------------------------------------------------


def fail(message):
    raise RuntimeError(message)


def fail_backwards(model):
    def forward(*args):
        loss = model(*args)
        loss.register_hook(lambda grad: 1 / 0)
        return loss

    return forward


@pytest.mark.parametrize(
    "compiled, message",
    [
        (lambda model: lambda *args: fail("no C compiler\nand many more lines"), "no C compiler\n"),
        (lambda model: lambda *args: fail(""), "RuntimeError"),
        (fail_backwards, "division by zero\n"),
    ],
)
def test_compile_that_cannot_be_had(command, dataset, monkeypatch, compiled, message):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled(model))
    code, out, err = command("train.py", *TINY, "--compile")
    assert (code, err) == (0, "") and f"not compiled, training is slower: {message}" in out


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_compiled_updates_are_the_same(command, dataset, monkeypatch, dropout):
    """The real torch.compile but for the code that it would generate; dropout has other masks."""
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    argv = [*TINY, "--batch_size=5", "--micro_batch_size=3", f"--dropout={dropout}"]
    assert command("train.py", *argv, "--out_dir=a")[0] == 0
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    code, out, err = command("train.py", *argv, "--compile", "--out_dir=b")
    assert (code, err) == (0, "") and "\ncompiled in " in out and "not compiled" not in out
    assert len(calls) == 2 + 2 * 6  # two micro batches in a trial and in each update, each whole
    assert (metrics("a") == metrics("b")) == (dropout == 0)
    same = differences(*(load(f"{x}/model.ckpt")["model"] for x in "ab")) == []
    assert same == (dropout == 0)


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


def test_a_device_that_is_not_here_any_more(command, dataset):
    command("train.py", *TINY)
    ckpt = load()
    ckpt["config"]["device"] = "cuda:99"
    torch.save(ckpt, "out/model.ckpt")
    code, out, _ = command("train.py", "--init_from=resume", "--max_iters=7")
    assert code == 0 and "device cuda:99 is not available: the default is auto" in out


def test_save_best(command, dataset):
    argv = ["--save_best", "--max_iters=40", "--learning_rate=0.3", "--grad_clip=0"]
    assert command("train.py", *TINY, *argv)[0] == 0
    evals = [line for line in metrics("out") if "val_loss" in line and line["step"]]
    best = min(evals, key=lambda line: line["val_loss"])
    ckpt = load("out/best.ckpt")
    assert (ckpt["step"], ckpt["best_val_loss"]) == (best["step"], best["val_loss"])
    assert "optimizer" not in ckpt
    assert command("sample.py", "--ckpt=out/best.ckpt", "--start=a")[0] == 0
    os.replace("out/best.ckpt", "out/model.ckpt")
    code, _, err = command("train.py", "--init_from=resume", "--max_iters=99")
    assert code == 2 and "has no optimizer to resume with: use --init_from out/model.ckpt" in err


def test_a_best_checkpoint_that_cannot_be_written(command, folder, dataset):
    """The next loss below that of the file is saved, also if it is not the lowest so far."""
    (folder / "out/best.ckpt.tmp").mkdir(parents=True)
    code, out, _ = command("train.py", *TINY, "--save_best")
    losses = [line["val_loss"] for line in metrics("out") if "val_loss" in line]
    assert code == 0 and "best.ckpt NOT SAVED" in out and min(losses) < losses[0]
    assert load("out/model.ckpt")["best_val_loss"] == losses[0]
    (folder / "out/best.ckpt.tmp").rmdir()
    argv = ["--init_from=resume", "--max_iters=9", "--learning_rate=0", "--min_lr=0"]  # no change
    assert command("train.py", *argv)[0] == 0
    assert load("out/best.ckpt")["best_val_loss"] == losses[-1] < losses[0]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: (d / "train.bin").write_bytes(b"\1\0" * 99), "does not describe its 99 ids"),
        (
            lambda d: (d / "val.bin").write_bytes((d / "val.bin").read_bytes()[:-1]),
            "val.bin is incomplete, damaged or of another",
        ),
        (lambda d: (d / "val.bin").unlink(), "there is no data/words/val.bin"),
        (lambda d: flip(d / "train.bin"), "train.bin is incomplete, damaged or of another"),
        (lambda d: (d / "meta.json").write_text('{"dtype": "O"}'), "meta.json cannot be used"),
        (lambda d: (d / "meta.json").write_bytes(b"\xff\xfe"), "meta.json cannot be used"),
    ],
)
def test_a_damaged_dataset_is_refused(command, dataset, harm, message):
    harm(dataset)
    code, _, err = command("train.py", *TINY)
    assert code == 2 and message in err and err.count("\n") == 1


def test_wandb_gets_the_keys_of_metrics(command, dataset, folder, monkeypatch):
    class Recorder:
        lines, starts = [], []

        def init(self, **options):
            self.starts.append((options["id"], options["project"]))
            self.id = options["id"] or "new"
            return self

        def log(self, values, step):
            self.lines.append({"step": step} | values)

    monkeypatch.setitem(sys.modules, "wandb", Recorder())
    assert command("train.py", *TINY, "--wandb")[0] == 0
    assert without_clock(Recorder.lines) == metrics("out")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert command("train.py", "--init_from=resume", "--max_iters=7")[0] == 0
    assert Recorder.starts == [(None, "gpt"), ("new", "mine")]
    monkeypatch.setattr(Recorder, "log", lambda self, values, step: 1 / 0)  # a lost connection
    code, out, _ = command("train.py", *TINY, "--wandb")
    assert code == 0 and "wandb lacks the line of step 0: division by zero" in out
    monkeypatch.setattr(Recorder, "init", lambda self, **options: 1 / 0)
    code, _, err = command("train.py", *TINY, "--wandb")
    assert code == 2 and "--wandb: division by zero; WANDB_MODE=offline" in err
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = command("train.py", *TINY, "--wandb")
    assert code == 2 and "pip install wandb" in err


def test_nanogpt_data_is_read_as_gpt2_ids(command, folder):
    (folder / "data/old").mkdir(parents=True)
    ids = np.random.default_rng(0).integers(50257, size=500).astype(np.uint16)
    ids.tofile("data/old/train.bin")
    ids[:100].tofile("data/old/val.bin")
    code, out, _ = command("train.py", *TINY, "--dataset=old", "--max_iters=1")
    ckpt = load()
    assert code == 0 and ckpt["tokenizer"] == "gpt2" and ckpt["model_args"]["vocab_size"] == 50257


REFUSED = {
    "--dataset=none_such": "data/none_such/train.bin; make it with python prepare.py: ",
    "--context_length=99999": "too few for context_length 99,999: take --context_length",
    "--vocab_size=50": "vocab_size is 50",
    "--n_embd=15": "n_embd (15) must be a multiple of n_head (2)",
    "--n_layer=0": "n_layer is 0; it must be in [1, 1e12)",
    "--batch_size=-1": "batch_size is -1; it must be in [1, 1e12)",
    "--batch_size=9223372036854775807": "batch_size is 9223372036854775807; it must be in",
    "--micro_batch_size=0": "micro_batch_size is 0; it must be in [1, 1e12)",
    "--learning_rate=1e999": "learning_rate is inf; it must be in [0, inf)",
    "--beta2=1": "beta2 is 1.0; it must be in [0, 1)",
    "--cooldown_fraction=0": "cooldown_fraction is 0.0; it must be in (0, 1]",
    "--dropout=1.5": "dropout is 1.5",
    "--n_layers=3": "there is no setting 'n_layers'; did you mean n_layer?",
    "--max_iters=many": "--max_iters is 'many'; it must be int",
    "--n_layer=100000000": "parameters takes",
    "--n_embd=1000000": "parameters takes",
    "--dataset=../words": "there is no data/../words/train.bin",
    "--seed=-1": "seed is -1; it must be in [0, inf)",
    "--embedding_std=-1": "embedding_std is -1.0",
    "--max_iters": "--max_iters needs a value",
    "--seed=99999999999999999999999": "--seed is 99999999999999999999...; it is too large",
    "--device=privateuseone": "--device privateuseone cannot be used here",
    "--tokenizer=bytes": "there is no setting 'tokenizer'",
    "--plan": "there is no setting 'plan'",
    "--wandb=perhaps": "--wandb is 'perhaps'; it must be bool",
    "--out_dir=words.txt": "File exists: 'words.txt'",
    "--dtype=int8": "must be auto or float32 or bfloat16 or float16",
    "--device=cuda:99": "--device cuda:99 cannot be used here",
    "--parallel=fsdp": "--parallel fsdp is for several processes: start them with torchrun",
    "--parallel=fsdp --optimizer=muon": "take --parallel ddp or --optimizer adamw",
    "--init_from=resume": "there is no checkpoint out/model.ckpt; train.py writes one",
    "--init_from=words.txt": "cannot read words.txt: it is truncated, or not a checkpoint",
    "config/none.py": "cannot read config file config/none.py: No such file",
    "words.txt": "words.txt",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused(command, dataset, folder, word):
    code, out, err = command("train.py", *TINY, *word.split())
    assert code == 2 and err.count("\n") == 1 and REFUSED[word] in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("kind", [[], ["--optimizer=muon"], ["--tie_weights=false"], MODERN])
def test_sizes_are_foretold(command, dataset, kind):
    _, out, _ = command("train.py", *kind, *TINY)
    ckpt = load()
    config = train.TrainConfig(**ckpt["config"])
    weights = {x.data_ptr(): x for x in ckpt["model"].values()}.values()
    moments = [x for state in ckpt["optimizer"].values() for x in state.values() if x.dim()]
    weights, moments = (sum(x.numel() * x.itemsize for x in each) for each in (weights, moments))
    assert train.count_bytes(config) == (weights + moments, 2 * weights + moments)
    shown = [float(out.split(words)[1].split()[0]) for words in ("checkpoints of ", "memory ")]
    for megabytes, size in zip(shown, train.count_bytes(config)):
        assert 1e6 * megabytes == pytest.approx(size, rel=5e-3)
    assert os.path.getsize("out/model.ckpt") == pytest.approx(weights + moments, abs=60_000)


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py"])
def test_help_lists_every_setting_without_data(command, folder, script):
    code, out, _ = command(script, "--help")
    name = script.removesuffix(".py")
    settings = getattr(sys.modules[name], f"{name.capitalize()}Config").__dataclass_fields__
    assert code == 0
    for setting in set(settings) - {"sources"}:
        line = next(
            line
            for line in out.splitlines()
            if line.startswith((f"  --{setting} ", f"  --{setting},"))
        )
        assert len(line.split()) > 4, line


# --- What real use found --------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(dataset, folder, shell):
    argv = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=100000"]
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # under nohup too
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **heard) as process:
        next(line for line in process.stdout if " loss " in line and "lr" in line)
        code, _, err = shell("train.py", *TINY)
        process.send_signal(signal.SIGHUP)  # as of a closed terminal
        process.stdout.read()
    assert code == 2 and "another process is writing there" in err and err.count("\n") == 1
    assert process.returncode == 128 + signal.SIGHUP
    assert torch.load("out/model.ckpt", weights_only=True)["step"] == metrics("out")[-1]["step"]
    assert shell("train.py", "--init_from=resume", "--max_iters=1")[0] == 0  # the lock is free


def test_a_run_saves_at_evaluations(command, dataset, folder, monkeypatch):
    """Of a run that is killed at most one interval is lost, unless saving takes long."""
    saved = []
    original = train.save_checkpoint

    def save(gpt, optimizers, log, name, state, skipped):
        result = original(gpt, optimizers, log, name, state, skipped)
        saved.append(state["step"])
        log.clock.spent["saving"] = 0 if len(saved) < 3 else 1e9
        return result

    monkeypatch.setattr(train, "save_checkpoint", save)
    assert command("train.py", *TINY, "--max_iters=15")[0] == 0
    assert saved == [3, 6, 9, 15]


def test_saving_the_best_does_not_delay_checkpoints(command, dataset, folder, monkeypatch):
    saved, original = [], train.atomic_write

    @contextlib.contextmanager
    def slow(path):
        with original(path) as file:
            yield file
        time.sleep(0.3 * (path.name == "best.ckpt"))
        saved.append(path.name)

    monkeypatch.setattr(train, "atomic_write", slow)
    assert command("train.py", *TINY, "--save_best", "--max_iters=15")[0] == 0
    assert saved.count("best.ckpt") == 5 and saved.count("model.ckpt") > 2


def test_weights_that_the_run_would_move_are_refused(command, dataset, folder):
    command("train.py", *TINY, "--save_best")
    before = (folder / "out/best.ckpt").read_bytes()
    for source in ("out/best.ckpt", "out"):
        code, _, err = command("train.py", *TINY, f"--init_from={source}")
        assert code == 2 and "give another --out_dir" in err and err.count("\n") == 1
    assert (folder / "out/best.ckpt").read_bytes() == before
    assert command("train.py", *TINY, "--init_from=out/best.ckpt", "--out_dir=b")[0] == 0
    (folder / "mine.ckpt").write_bytes(before)  # is not moved
    assert command("train.py", *TINY, "--init_from=mine.ckpt", "--out_dir=.")[0] == 0


@pytest.mark.parametrize("call", [9, 16])  # in the evaluations after 3 and, the last, 6 updates
def test_a_signal_stops_an_evaluation_and_resuming_makes_up_for_it(
    command, dataset, folder, monkeypatch, call
):
    assert command("train.py", *TINY, "--out_dir=whole")[0] == 0
    original, calls = train.read_windows, []

    def read_windows(stream, starts, config):
        calls.append(len(calls))
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        assert len(calls) <= call
        return original(stream, starts, config)

    with monkeypatch.context() as patch:
        patch.setattr(train, "read_windows", read_windows)
        assert command("train.py", *TINY)[0] == 130
    assert [x["step"] for x in metrics("out") if "val_loss" in x] == [0, 3][: call // 8]
    assert command("train.py", "--init_from=resume")[0] == 0
    assert differences(result("whole"), result("out")) == []


def test_samples_end_at_endoftext_and_begin_with_the_validation_text(command, dataset, monkeypatch):
    original, argv = GPT.forward, [*TINY[:-2], "--dataset=words"]

    def forward(self, idx, targets=None, **options):
        logits = original(self, idx, targets, **options)
        if targets is None:
            logits = torch.zeros_like(logits)
            logits[..., 256] = 1
        return logits

    monkeypatch.setattr(GPT, "forward", forward)
    code, out, _ = command("train.py", *argv)
    text = bytes(np.fromfile("data/words/val.bin", np.uint16)[:8].astype(np.uint8)).decode()
    assert code == 0 and f"      {text.strip()}\n" in out
    code, out, _ = command("train.py", *argv, "--sample_prompt=a<|endoftext|>")
    assert code == 0 and "      a<|endoftext|>\n" in out


def test_training_goes_on_without_a_vocabulary(command, dataset, monkeypatch):
    def unreachable(name):
        raise config.UserError("cannot get the vocabulary")

    monkeypatch.setattr(prepare, "get_tokenizer", unreachable)
    code, out, _ = command("train.py", *TINY, "--sample_prompt=a")
    assert code == 0 and out.count("no samples, no bits per byte: cannot get the vocabulary\n") == 1


def test_a_warmup_that_never_ends_is_said(command, dataset):
    _, out, _ = command("train.py", *TINY, "--warmup_iters=1000")
    assert "warning: a warm-up of 1,000 updates never ends in this run" in out
    assert "warning: the learning rate rises" not in out
    out = command("train.py", *TINY, "--learning_rate=3e-5")[1]
    assert "warning: the learning rate rises to min_lr, 6e-05" in out


def test_weights_of_an_unknown_tokenizer_are_not_trained(command, dataset, folder):
    """nanoGPT's checkpoint of 65 characters, on data in bytes."""
    args = dict(
        vocab_size=65, block_size=16, n_layer=1, n_head=2, n_embd=16, bias=True, dropout=0.0
    )
    gpt = GPT(GPTConfig(65, 16, 1, 2, 16))
    torch.save({"model": gpt.state_dict(), "model_args": args}, "ckpt.pt")
    code, _, err = command("train.py", "--dataset=words", "--init_from=ckpt.pt")
    assert code == 2 and "ckpt.pt has an unknown tokenizer: 65 ids" in err
    assert err.count("\n") == 1


def test_weights_that_have_diverged_replace_no_checkpoint(command, dataset, folder):
    assert command("train.py", *TINY)[0] == 0
    before = (folder / "out/model.ckpt").read_bytes()
    argv = ["--init_from=resume", "--max_iters=7", "--learning_rate=1e20", "--warmup_iters=0"]
    code, out, _ = command("train.py", *argv, "--lr_schedule=constant", "--grad_clip=0")
    assert code == 1 and "NOT SAVED: the validation loss is not finite" in out
    assert (folder / "out/model.ckpt").read_bytes() == before
    assert command("train.py", "--init_from=resume", "--max_iters=7")[0] == 0


def test_bits_per_byte_are_those_of_sample(command, folder):
    """One window holds the whole split, in which <|endoftext|> counts no bytes."""
    for number in range(30):
        (folder / f"{number}.txt").write_text(words(20, seed=number) + "\u6f22\u5b57")
    sources = [f"{number}.txt" for number in range(30)]
    assert command("prepare.py", *sources, "--dataset=words", "--val_fraction=0.3")[0] == 0
    context = prepare.load_dataset("words")[1]["val_tokens"] - 1
    argv = [f"--context_length={context}", "--batch_size=1", "--dtype=float32"]
    assert command("train.py", *TINY, *argv)[0] == 0
    line = [line for line in metrics("out") if "val_loss" in line][-1]
    out = command("sample.py", "--score=val")[1]
    assert f"loss           {line['val_loss']:.4f} " in out
    assert f"bits per byte  {line['val_bits_per_byte']:.4f}\n" in out


def test_ids_beyond_the_tokenizer(command, folder):
    """Of nanoGPT's padded vocabulary; they have no bytes and no text."""
    (folder / "data/n").mkdir(parents=True)
    for split in ("train", "val"):
        np.full(600, 50_300, np.uint16).tofile(folder / f"data/n/{split}.bin")
    argv = ["--dataset=n", "--vocab_size=50304", "--max_iters=1"]
    code, out, err = command("train.py", *TINY, *argv)
    assert (code, err) == (0, "") and "bits per byte" not in out
