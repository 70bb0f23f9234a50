"""Train a GPT.

    python train.py config/verdict.py                          the book's run
    python train.py config/tiny.py --n_layer 2 --seed=1        a config file, then changes to it
    python train.py config/tiny.py --init_from resume          go on where a run stopped
    torchrun --nproc_per_node=4 train.py config/gpt2.py        four processes, the same run

Reads data/<dataset>/, which prepare.py makes. Writes out/model.ckpt, the weights and all that
resuming needs, out/metrics.jsonl, a line for every report, and out/loss.png, a picture of them.
"""

import atexit
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

# Large tensors in huge pages: PyTorch otherwise pages them in by 4 KiB at every step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import prepare
from config import UserError, parse, run, user_errors
from model import GPT, GPTConfig, choose_device, load_model, read_checkpoint


@dataclass
class TrainConfig(GPTConfig):
    """Every setting of a run: those of the model, and these."""

    vocab_size: int | None = None  # number of different tokens; none: the dataset's
    # Data
    dataset: str = "verdict"  # folder under data/ that prepare.py made
    batch_size: int = 8  # sequences per update, over all processes
    micro_batch_size: int | None = None  # sequences per forward pass, per process; none: batch_size
    shift_windows: bool = True  # cut the text elsewhere in every epoch (the book: no)
    seed: int = 1337  # weights, order of the data and dropout follow from it
    # Updates
    max_iters: int = 1000  # updates in all
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of the matrices in the blocks alone
    learning_rate: float = 6e-4  # the highest learning rate (with muon about 0.02)
    embedding_learning_rate: float = 6e-4  # with muon: of embeddings, biases and gains
    head_learning_rate: float = 6e-4  # with muon: of an untied head of 128 channels, less of more
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the warm-up
    warmup_iters: int = 100  # updates over which the learning rate rises in a line
    initial_lr: float = 0.0  # learning rate of the first update
    min_lr: float = 6e-5  # learning rate at the end of cosine and wsd
    cooldown_fraction: float = 0.5  # of all updates: the last, over which wsd falls to min_lr
    weight_decay: float = 0.1  # on matrices alone
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # and of its square
    momentum: float = 0.95  # Muon's decay of the mean gradient
    muon_interval: int = 1  # updates in which Muon takes each matrix once
    grad_clip: float = 1.0  # longest gradient, as a norm over all parameters; 0: any length
    max_skipped: int = 10  # updates in a row whose loss is not finite before training stops
    # Reports
    log_interval: int = 10  # updates between log lines
    eval_interval: int = 100  # updates between evaluations
    eval_iters: int = 20  # batches of each split that an evaluation looks at
    checkpoint_interval: int = 500  # updates between checkpoints
    save_best: bool = False  # keep the weights of the best validation loss in best.ckpt, too
    sample_prompt: str = "Every effort moves you"  # continued at evaluations; empty: no samples
    out_dir: str = "out"  # where model.ckpt, metrics.jsonl and loss.png go
    wandb: bool = False  # log to Weights & Biases, too
    # Start and machine
    init_from: str = "scratch"  # scratch, resume, or weights: a checkpoint, gpt2, a folder
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a name such as cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: whole models, or a part in each
    compile: bool | None = None  # torch.compile the model; none: on a GPU
    recompute: bool = False  # activations in the backward pass: less memory, more time
    plan: bool = False  # print what the run would take, and stop

    def __post_init__(self):
        GPTConfig(**self.model_args() | ({} if self.vocab_size is not None else {"vocab_size": 1}))
        if self.micro_batch_size is None:
            self.micro_batch_size = self.batch_size
        at_least_1 = "batch_size micro_batch_size max_iters log_interval eval_interval eval_iters "
        at_least_1 += "checkpoint_interval max_skipped muon_interval"
        at_least_0 = "seed warmup_iters learning_rate initial_lr min_lr weight_decay grad_clip "
        at_least_0 += "embedding_learning_rate head_learning_rate"
        for least, names in ((1, at_least_1), (0, at_least_0)):
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"{name} is {getattr(self, name)}; the least is {least}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if not 0 < self.cooldown_fraction <= 1:
            raise ValueError(f"cooldown_fraction is {self.cooldown_fraction}; it must be in (0, 1]")

    def model_args(self) -> dict:
        """The fields of GPTConfig among the settings."""
        return {field.name: getattr(self, field.name) for field in fields(GPTConfig)}


# One process or many: each has a rank and knows how many they are, and these functions are what
# they do together. Alone, a process is the first of one.

RENDEZVOUS = timedelta(minutes=5)  # how long processes wait for one another at the start


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: torch.Tensor, how=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum, or another reduction, of every process's `x`; in place."""
    if dist.is_initialized():
        dist.all_reduce(x, how)
    return x


def gather(x) -> list:
    """Every process's `x`, which may be any small object, in the order of their ranks."""
    found = [x] * processes()
    if dist.is_initialized():
        dist.all_gather_object(found, x)
    return found


def on_first(function, *args):
    """What `function` returns on the first process, for all; the others do not call it."""
    return gather(function(*args) if rank() == 0 else None)[0]


def is_sharded(x: torch.Tensor) -> bool:
    """Whether each process holds a part of `x`: then it is a DTensor."""
    return hasattr(x, "full_tensor")


def whole(tensors: dict) -> dict:
    """`tensors` by name, those in parts put together one by one, on the first process alone."""
    found = {}  # a tensor of two names, as a tied head is, stays one
    for x in tensors.values():
        if x not in found:
            full = x.full_tensor().cpu() if is_sharded(x) else x  # takes all processes
            found[x] = full.detach() if rank() == 0 else None
    return {name: found[x] for name, x in tensors.items()}


def part(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Of `x`, which all have whole, what this process holds of `p`."""
    if not is_sharded(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def silence(number: int):
    """Nobody hears what goes to file descriptor `number` from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def together():
    """Around `main`: joins the processes that torchrun started, if it did.

    Only the first of them is heard on standard output. When one fails it says why, once if all say
    the same, and the others end as they miss it.
    """
    if "RANK" not in os.environ:
        yield
        return
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        backend += ",cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        store, number, count = next(rendezvous("env://", timeout=RENDEZVOUS))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's own store has the addresses of before a restart (pytorch/pytorch#135712).
            # On several machines the counts may differ, and a variable is to be set: see README.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        store.set(f"here {number}", "")
        store.wait([f"here {each}" for each in range(count)], RENDEZVOUS)
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(f"MASTER_{x}", "?") for x in ("ADDR", "PORT"))
        raise UserError(
            f"process {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} did not meet the "
            f"others at {where}: were all started, with the same address, and does a firewall "
            f"let them through? ({str(error).splitlines()[0]})"
        ) from error
    if rank():
        silence(1)
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "code", None)
        if not isinstance(code, int):  # which would have nothing to say
            lost = isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.I)
            said = False
            with contextlib.suppress(RuntimeError):  # where the store is gone, too
                failed = store.add("failed", 1)
                said = (failed if lost else store.add(f"said {error!r}", 1)) > 1
            if said:
                silence(2)
                time.sleep(1)  # torchrun names the one that ends first
            elif lost:
                reason = str(error).splitlines()[0]
                raise UserError(f"lost the other processes: {reason}") from error
            raise
    # gloo's threads may crash as Python cleans up (https://github.com/pytorch/pytorch/pull/179291),
    # so it does not come to that.
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def check_same(values: dict):
    """Refuse to train where processes see different settings or data."""
    first, *others = gather(values)
    for number, theirs in enumerate(others, 1):
        for name in first | theirs:
            one, other = first.get(name), theirs.get(name)
            if one != other:
                raise UserError(
                    f"processes differ in {name}: {one!r} in process 0, {other!r} in {number}"
                )


def check_parallel(config: TrainConfig, device: torch.device):
    """Refuse what so many processes cannot do."""
    count, here = processes(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.parallel == "fsdp" and count == 1:
        raise UserError(
            "--parallel fsdp cuts a model into a part for each process, and here is one alone: "
            "start several with torchrun --nproc_per_node=N train.py, or leave it out"
        )
    if config.parallel == "fsdp" and config.optimizer == "muon":
        raise UserError(
            "Muon needs whole matrices, and --parallel fsdp leaves each process a part of them: "
            "take --parallel ddp or --optimizer adamw"
        )
    if config.batch_size % count:
        below = config.batch_size // count * count
        fit = f"{below} or {below + count}" if below else f"{count}"
        raise UserError(
            f"batch_size {config.batch_size} cannot be shared evenly by {count} processes: take "
            f"--batch_size {fit}"
        )
    if count > 1 and (device.type not in ("cpu", "cuda") or device.index is not None):
        raise UserError(f"{count} processes cannot share --device {device}: take cpu or cuda")
    if device.type == "cuda" and here > (gpus := torch.cuda.device_count()):
        raise UserError(f"{here} processes here, each of which needs a GPU: there are {gpus}")


def distribute(gpt: GPT, config: TrainConfig, device: torch.device, dtype) -> torch.nn.Module:
    """`gpt` on the device, and what to call so that gradients are the mean over all processes."""
    if not dist.is_initialized():
        return gpt.to(device)
    if config.parallel == "fsdp":
        # Imported here, as one process alone would wait a second for them.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # It warns of what a Linear returns, a view, lest it be changed in place; nothing here is.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (processes(),))
        # Matrices travel in the dtype that multiplies them; LayerNorms and embeddings, and between
        # blocks the activations, stay in float32, as autocast has them.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in gpt.transformer.h:
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        return fully_shard(gpt, mesh=mesh)
    model = DistributedDataParallel(gpt.to(device), gradient_as_bucket_view=True)
    # Its gradients change places after their first backward pass, and with them the order in which
    # they are added: this one makes a resumed run's first update like any other.
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(idx, idx).backward()
    model.zero_grad()
    return model


def synchronize(model: torch.nn.Module, now: bool):
    """Whether the next backward pass adds up gradients over all processes, or keeps its own."""
    model = getattr(model, "_orig_mod", model)  # within torch.compile's
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard's
        model.set_requires_gradient_sync(now)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now  # as its no_sync() does


def resume_after_restart(config: TrainConfig):
    """torchrun starts all processes again where one has died: they go on from the checkpoint."""
    path = f"{config.out_dir}/model.ckpt"
    restarts = max(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    if restarts and os.path.exists(path):
        with user_errors():
            job = on_first(lambda: read_checkpoint(path).get("job"))
        if job == os.environ.get("TORCHELASTIC_RUN_ID"):  # and not an earlier run's
            config.init_from = "resume"
            say(f"restarted: going on from {path}")


def open_dataset(config: TrainConfig, tokenizer: str | None = None) -> tuple[dict, dict]:
    """Both splits of a run's dataset and its meta.json, if its model can be trained on it.

    `tokenizer` is the one that the model's weights are from, if they are from somewhere.
    """
    splits, meta = prepare.load_dataset(config.dataset)
    if tokenizer not in (None, meta["tokenizer"]):
        raise UserError(
            f"the model reads {tokenizer} tokens, data/{config.dataset} holds "
            f"{meta['tokenizer']}: prepare it with --tokenizer {tokenizer}"
        )
    if config.vocab_size is None:
        config.vocab_size = meta["vocab_size"]
    for split, ids in splits.items():
        if (tokens := len(ids)) <= config.context_length:
            shorter = f"take --context_length {tokens - 1} or less, or " if tokens > 1 else ""
            raise UserError(
                f"data/{config.dataset}/{split}.bin has {tokens:,} tokens, too few for "
                f"context_length {config.context_length:,}: {shorter}prepare more text"
            )
        for block in prepare.sample_blocks(ids):
            check_ids(block, config)
    return splits, meta


def permute(index: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Where a random permutation of range(n) sends each `index`, without ever holding all of it.

    A Feistel network permutes the numbers of 2k bits; whoever lands at n or above walks on until
    he is below (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    bits = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = rng.integers(2**64, size=6, dtype=np.uint64)

    def shuffle(x):
        left, right = x >> bits, x & mask
        for key in keys:  # any function of (key, right) will do; this one mixes all of the bits
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            left, right = (right, left ^ ((mixed ^ mixed >> np.uint64(29)) >> np.uint64(17) & mask))
        return left << bits | right

    index = shuffle(index.astype(np.uint64))
    while (outside := index >= n).any():
        index[outside] = shuffle(index[outside])
    return index.astype(np.int64)


def get_batch(
    split: np.ndarray,
    step: int,
    *,
    batch_size: int,
    context_length: int,
    seed: int,
    shift_windows: bool = True,
    rank: int = 0,
    processes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (batch_size, context_length) int64, of update number `step`.

    A function of its arguments alone. Of several `processes` each gets its share of the rows, in
    the order of their ranks. The stream `split` (L,) is closed to a ring and cut into
    windows from an offset that is new in every epoch (0 without `shift_windows`); an epoch visits
    each window once, in shuffled order.
    """
    windows = (len(split) - 1) // context_length  # in an epoch
    share = batch_size // processes
    rows = step * batch_size + rank * share + np.arange(share)
    epoch, place = np.divmod(rows, windows)
    starts = np.empty(share, dtype=np.int64)
    for e in np.unique(epoch):
        rng = np.random.default_rng([seed, e])
        offset = rng.integers(len(split)) if shift_windows else 0
        starts[epoch == e] = offset + context_length * permute(place[epoch == e], windows, rng)
    positions = starts[:, None] + np.arange(context_length + 1)  # (B, T + 1)
    tokens = torch.from_numpy(split[positions % len(split)].astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


def check_ids(tokens: torch.Tensor | np.ndarray, config: TrainConfig):
    """Refuse what is not in the vocabulary; `open_dataset` looks at only some of a large file."""
    if (largest := int(tokens.max())) >= config.vocab_size:
        raise UserError(
            f"data/{config.dataset} holds token id {largest:,}, outside the vocabulary of "
            f"{config.vocab_size:,}: prepare it again"
        )


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then cosine (book, appendix D).

    That of `learning_rate`; the groups that have a rate of their own follow in proportion.
    """
    if step < config.warmup_iters:
        rise = (config.learning_rate - config.initial_lr) / config.warmup_iters
        return config.initial_lr + step * rise
    if config.lr_schedule == "constant":
        return config.learning_rate
    if config.lr_schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, "MiniCPM")
        share = (config.max_iters - step) / (config.cooldown_fraction * config.max_iters)
        share = min(1, max(0, share))
    else:
        progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.min_lr + (config.learning_rate - config.min_lr) * share


@torch.no_grad()
def estimate_loss(model, splits, config, device, autocast) -> dict[str, float]:
    """Mean loss of each split over `eval_iters` batches, the same at every call, without dropout.

    The windows lie evenly over the split; one that has no more is seen whole, each token once.
    Processes take turns at the batches; the sums are added up in one order, however many they are.
    """
    T, size = config.context_length, min(config.micro_batch_size, config.batch_size // processes())
    losses = {}
    model.eval()
    for name, split in splits.items():
        windows = -(-(len(split) - 1) // T)  # the last one may be short
        count = min(windows, config.eval_iters * config.batch_size)
        starts = np.arange(count) * windows // count * T
        batches, sums = -(-count // size), []
        for i in range(rank(), -(-batches // processes()) * processes(), processes()):
            first = min(i, batches - 1) * size  # as many for each: a forward pass may take all
            positions = starts[first : first + size, None] + np.arange(T + 1)  # (B, T + 1)
            batch = torch.from_numpy(split[positions % len(split)].astype(np.int64))
            check_ids(batch, config)
            batch = batch.to(device)
            ended = torch.from_numpy(positions[:, 1:] >= len(split)).to(device)
            x, y = (batch[:, :-1], batch[:, 1:].masked_fill(ended, -100))  # -100: does not count
            with autocast:
                loss = model(x, y)
            tokens = int((~ended).sum()) if i < batches else 0
            sums.append((loss.item() * tokens, tokens))
        total, tokens = map(sum, zip(*(pair for turn in zip(*gather(sums)) for pair in turn)))
        losses[name] = total / tokens
    model.train()
    return losses


def say(text: str):
    """Print a line; that whoever reads has left (`| head`, a closed window) must not end a run."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def save_checkpoint(path: Path, contents: dict) -> bool:
    """Write `path` whole or not at all, and say so; a full disk must not end the training."""
    started = time.perf_counter()
    try:
        with prepare.replacing(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch turns some of the first into the second
        while error.__context__ is not None:
            error = error.__context__
        say(f"{path.as_posix()} NOT SAVED, what was there is as it was: {error}")
        return False
    say(
        f"{path.as_posix()} saved: step {contents['step']:,}, {path.stat().st_size / 1e6:,.1f} MB "
        f"in {time.perf_counter() - started:.1f} s"
    )
    return True


def plot(out_dir: Path, config: TrainConfig):
    """Draw out/loss.png from out/metrics.jsonl: losses over updates and tokens, learning rate."""
    try:
        import matplotlib
    except ImportError:
        return say("no loss.png: it needs matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in open(out_dir / "metrics.jsonl", encoding="utf-8")]
    logs = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "val_loss" in line]
    grey = dict(color="0.75", linewidth=1)
    figure, (losses, rates) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(4, 1), layout="constrained"
    )
    points = [(x["step"], x["loss"]) for x in logs if x["loss"] is not None]
    losses.plot(*zip(*points), label="batch", **grey)
    for name, label, color in (("train_loss", "training", "C0"), ("val_loss", "validation", "C3")):
        points = [(x["step"], x[name]) for x in evals if x[name] is not None]
        losses.plot(*zip(*points), ".-", color=color, label=label)
        losses.annotate(f" {points[-1][1]:.2f}", points[-1], color=color, va="center")
    losses.set_ylabel("loss (nats per token)")
    losses.set_title(f"{config.dataset}, {config.n_layer} layers, {config.n_embd} channels")
    losses.legend(frameon=False)
    tokens = config.batch_size * config.context_length
    top = losses.secondary_xaxis("top", functions=(lambda x: x * tokens, lambda x: x / tokens))
    top.set_xlabel("tokens")
    rates.plot([x["step"] for x in logs], [x["lr"] for x in logs], color="C2")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("updates")
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with prepare.replacing(out_dir / "loss.png") as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 60 / 24:,.1f} days"


def set_rng(*key: int):
    """Dropout's random numbers follow from `key` from here on, wherever a run was interrupted."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def first_model(config: TrainConfig) -> GPT | None:
    """The model that `init_from` names, and `config` made to say its shape; None for scratch."""
    if config.init_from == "scratch":
        return None
    if config.init_from != "resume":
        with user_errors():
            gpt = load_model(config.init_from, dropout=config.dropout)
        if config.context_length < gpt.config.context_length:
            gpt.crop_context(config.context_length)
        for field in fields(GPTConfig):
            asked, has = getattr(config, field.name), getattr(gpt.config, field.name)
            if asked not in (has, None, field.default):
                say(f"{field.name} is {has}, that of {config.init_from}, not {asked}")
    else:
        path = f"{config.out_dir}/model.ckpt"
        with user_errors():
            gpt = GPT.from_checkpoint(path, dropout=config.dropout)
        saved = gpt.checkpoint
        wanted = dict(optimizer=dict, scaler=dict, config=dict, dataset=str, step=int)
        for name, kind in (wanted | dict(best_val_loss=float)).items():
            if type(saved.get(name)) is not kind or (name == "step" and saved[name] < 0):
                raise UserError(f"{path} has no {name} to resume with: use --init_from {path}")
        old, new = saved["config"], asdict(config)
        changed = {x: (old[x], new[x]) for x in new if x in old and old[x] != new[x]}
        of_model = config.model_args().keys() - {"dropout"}
        default = {field.name: field.default for field in fields(GPTConfig)}
        # What is not said is the checkpoint's.
        shape = [x for x in changed if x in of_model and new[x] not in (None, default[x])]
        if shape:
            listed = ", ".join(f"{x} ({changed[x][0]} there, {changed[x][1]} here)" for x in shape)
            raise UserError(f"{path} is of another model: {listed}")
        if "optimizer" in changed:
            was = changed["optimizer"][0]
            raise UserError(f"{path} is of --optimizer {was}: with another use --init_from {path}")
        for x in sorted(changed.keys() - of_model - {"init_from"}):
            say(f"changed since the checkpoint: {x} was {changed[x][0]}, is {changed[x][1]}")
    for name, value in asdict(gpt.config).items():
        setattr(config, name, value)
    return gpt


def check_memory(config: TrainConfig, device: torch.device):
    """Refuse a model that cannot fit: weight, gradient and two moments are 16 bytes a parameter."""
    C = config.n_embd
    parameters = C * (config.vocab_size + config.context_length + 12 * config.n_layer * C)
    needed = 16 * parameters / (processes() if config.parallel == "fsdp" else 1)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # who share it
        known = hasattr(os, "sysconf")  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 1e12
    if needed > memory:
        raise UserError(
            f"a model of {parameters:,} parameters takes {needed / 1e9:,.0f} GB to train; "
            f"here are {memory / 1e9:,.0f} GB"
        )


def set_aside(out_dir: Path, *names: str) -> str:
    """Rename these files, if they are there, to end in .bak, or the first of .bak2, .bak3, ... that
    none has taken; returns that ending."""
    endings = (f".bak{number if number > 1 else ''}" for number in itertools.count(1))
    there = {path.name for path in out_dir.iterdir()}
    ending = next(x for x in endings if not there & {name + x for name in names})
    for name in names:  # in this order, wherever it is interrupted
        if name in there:
            os.replace(out_dir / name, out_dir / (name + ending))
    return ending


def keep_old(out_dir: Path):
    """Make way for a new run: what an earlier one left stays, under other names."""
    path = out_dir / "model.ckpt"  # last, as without it metrics.jsonl is taken for worthless
    names = ["loss.png", "metrics.jsonl", path.name] if path.exists() else []
    ending = set_aside(out_dir, "best.ckpt", *names)
    if names:
        say(f"{path.as_posix()} of an earlier run is now {path.name}{ending}")


class Metrics:
    """metrics.jsonl, to which lines are added whole or not at all."""

    def __init__(self, path: Path, step: int):
        """Cut off what a run that goes on after `step` updates will write again, or half a line."""
        self.file = open(path, "a+b", buffering=0)
        self.file.seek(0)
        keep, self.seconds = 0, 0.0  # bytes; time in the lines before
        for line in self.file.read().splitlines(keepends=True):
            try:
                values = json.loads(line if line.endswith(b"\n") else b"")
                if values["step"] > step or step == 0:
                    break
                self.seconds = float(values["seconds"])
            except (ValueError, KeyError, TypeError):  # not whole
                break
            keep += len(line)
        self.file.truncate(keep)

    def append(self, values: dict):
        line = json.dumps(values).encode() + b"\n"
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            self.file.truncate(end)
            say(f"{self.file.name} lacks the line of step {values['step']:,}: {error}")

    def flush(self):
        os.fsync(self.file.fileno())


class Stop:
    """Waits for Ctrl-C or SIGTERM: the first is kept in `signal`, a second ends the program.

    What a terminal sends to all processes torchrun passes on to each, so there a second one counts
    only some seconds later.
    """

    def __enter__(self):
        self.signal = None
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def handle(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            with contextlib.suppress(OSError):  # print may not be called here
                os.write(1, b"stopping after this update; a second time stops at once\n")
        elif time.monotonic() > self.since + 5:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not dist.is_initialized():
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any of the processes has got, the same for all; 0 if none has."""
        return int(all_reduce(torch.tensor(self.signal or 0), dist.ReduceOp.MAX))

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def compiled(gpt: GPT, config: TrainConfig, device: torch.device, autocast) -> torch.nn.Module:
    """The model as torch.compile makes it, if wanted; as it is where there is no compiler."""
    if config.compile is False or (config.compile is None and device.type != "cuda"):
        return gpt
    model = torch.compile(gpt, dynamic=False)
    B = min(config.micro_batch_size, config.batch_size // processes())
    idx = torch.zeros(B, config.context_length, dtype=torch.int64)
    started, reason = time.perf_counter(), ""
    try:
        with autocast:
            loss = model(idx.to(device), idx.to(device))
        if processes() == 1:
            loss.backward()
    except Exception as error:  # of as many kinds as there are ways to lack a compiler
        reason = (str(error).strip() or repr(error)).splitlines()[0]
    if any(reasons := gather(reason)):  # in one process: then none is
        say(f"not compiled, training is slower for it: {next(filter(None, reasons))}")
        gpt.zero_grad()
        return gpt
    if processes() > 1:  # which all have to begin
        loss.backward()
    gpt.zero_grad()
    say(f"compiled in {duration(time.perf_counter() - started)}")
    return model


def precision(config: TrainConfig):
    """Device, dtype of the matrix products, and the autocast and gradient scaler that they need.

    On a CPU it has freed memory used again, too. Raises ValueError if the device is not there.
    """
    device, dtype = choose_device(config.device, config.dtype)
    if device.type == "cpu":
        reuse_memory()
    mixed = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return device, dtype, autocast, scaler


def reuse_memory():
    """Have memory that is freed used again, where it otherwise goes back to the system.

    Getting it back, zeroed, for the tensors of the next step was mostly a sixth to a third of a
    step on two cores. In return this process keeps the most that it ever took. The names are those
    of glibc's mallopt(3); other systems' C libraries have no such thing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # large tensors are parts of the heap, as small ones are
        mallopt(M_TRIM_THRESHOLD, -1)  # and its end is never cut off


def set_lr(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig):
    """Let every group have its share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, config) * group["share"]


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), beside PyTorch's.

    Its products are in `dtype`; theirs in bfloat16, which many CPUs are slow at. Queries, keys and
    values are matrices of their own. And as the mean gradient changes little from one update to the
    next, each matrix has its turn in one of `interval` updates alone, with a step as many times as
    long: where batches are small, this optimizer would cost as much as the gradients. Processes
    share the work, a matrix each.
    """

    def __init__(self, params, dtype: torch.dtype, interval: int = 1, **settings):
        super().__init__(params, **settings)
        self.dtype, self.interval = dtype, interval
        self.number = 0  # of the update
        self.found_inf = torch.tensor(0.0)  # 1 where it is to do nothing

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"] * (1 - self.found_inf) * self.interval, group["momentum"]
            turn, by_shape = [], {}  # matrices of one shape go through together
            for index, p in enumerate(group["params"]):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                mean = state["momentum_buffer"]
                grad = torch.where(self.found_inf > 0, mean, p.grad)
                mean.lerp_(grad, 1 - momentum)
                if (self.number + index) % self.interval == 0:
                    if len(turn) % processes() == rank():
                        update = grad.lerp(mean, momentum)  # Nesterov's
                        by_shape.setdefault(p.shape, []).append((p, update))
                    turn.append(p)
            for (rows, columns), pairs in by_shape.items():
                params, updates = zip(*pairs)
                shape = (-1, columns, columns) if rows == 3 * columns else (-1, rows, columns)
                updates = torch.stack(updates).view(shape)
                updates = orthogonal(updates, self.dtype, group["ns_steps"])
                for p, update in zip(params, updates.view(-1, rows, columns)):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(lr * math.sqrt(max(1, shape[1] / columns)) * update)
            if processes() > 1:
                for index, p in enumerate(turn):
                    dist.broadcast(p, index % processes())


def orthogonal(x: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """The orthogonal matrices nearest to `x` (..., M, N), in `dtype`: singular values 0.7 to 1.2.

    Newton and Schulz's iteration, as in Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)).to(dtype)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(steps):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.mT if tall else x


def make_optimizers(gpt: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or for some, and Muon for the matrices of the blocks.

    The rate of a group is `share` times what `get_lr` says.
    """
    adamw = dict(betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        groups = [group | {"share": 1.0} for group in gpt.optimizer_groups(config.weight_decay)]
        return [torch.optim.AdamW(groups, config.learning_rate, **adamw)]
    matrices = [p for p in gpt.transformer.h.parameters() if p.dim() == 2]
    head = [] if config.tie_weights else [gpt.lm_head.weight]
    known = {id(p) for p in matrices + head}
    others = [p for p in gpt.parameters() if id(p) not in known]
    rates = (
        (others, config.embedding_learning_rate),
        (head, config.head_learning_rate * 128 / config.n_embd),
    )
    groups = [
        dict(params=params, weight_decay=0.0, share=rate / (config.learning_rate or 1))
        for params, rate in rates
        if params
    ]
    muon = Muon(
        [dict(params=matrices, share=1.0)],
        choose_device(config.device, config.dtype)[1],
        config.muon_interval,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    return [torch.optim.AdamW(groups, **adamw), muon]


# What each optimizer remembers of a parameter.
OPTIMIZER_STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def optimizer_state(gpt: GPT, optimizers: list) -> dict[str, dict]:
    """What the optimizers remember of each parameter, by its name."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {name: whole(states[p]) for name, p in gpt.named_parameters() if p in states}


def load_optimizer_state(gpt: GPT, optimizers: list, saved: dict, step: int):
    """Put back what `optimizer_state` gave. Raises ValueError where it does not fit."""
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, p in gpt.named_parameters():
        state = saved.get(name, {})
        kind = type(owner[p]).__name__
        wanted = OPTIMIZER_STATE[kind] if step else set()
        if not isinstance(state, dict) or not wanted <= state.keys():
            raise ValueError(f"{kind}'s state of {name} is missing")
        for key, value in state.items():
            shape = torch.Size() if key == "step" else p.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                raise ValueError(f"{kind}'s {key} of {name} does not fit it")
            value = value.to(p.device, torch.float32)
            state[key] = value if key == "step" else part(value, p)
        owner[p].state[p] = state


def update(model, optimizers, scaler, autocast, batch, config, step):
    """One step of gradient descent on `batch` (inputs, targets).

    Returns its loss, the norm of its gradient, and whether it was skipped, each a scalar tensor.
    The batch goes through in micro batches, whose gradients add up to those of the whole. Of
    several processes each has its share of the batch, and gradients and loss are their mean. Where
    loss or norm is not finite, weights and optimizers stay as they are.
    """
    batch_loss = 0.0
    micro_batches = list(zip(*(tensor.split(config.micro_batch_size) for tensor in batch)))
    for micro_step, (x, y) in enumerate(micro_batches):
        set_rng(config.seed, step, micro_step, rank())
        synchronize(model, micro_step == len(micro_batches) - 1)
        with autocast:
            loss = model(x, y)  # forward pass and loss
        loss = loss * (len(x) / len(batch[0]))
        scaler.scale(loss).backward()  # backward pass
        batch_loss += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    batch_loss = all_reduce(batch_loss) / processes()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    norm = norm.full_tensor() if is_sharded(norm) else norm
    skipped = (~(batch_loss + norm).isfinite()).float()
    for optimizer in optimizers:
        # They do nothing where this is 1, and nobody waits for the device to know.
        optimizer.found_inf, optimizer.number = skipped, step
        optimizer.step()  # update
        optimizer.zero_grad()
    scaler.update()
    return batch_loss, norm, skipped


# bfloat16 or float16 FLOP/s of a card without sparsity, as NVIDIA's data sheets say.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
PEAK_FLOPS |= {"V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(card: str) -> float | None:
    """Peak FLOP/s of the GPU that PyTorch calls `card`; None for one that is not in the table."""
    names = (name for name in PEAK_FLOPS if re.search(rf"\b{name}\b(?!.*Laptop)", card))
    return PEAK_FLOPS.get(next(names, ""))


class Run:
    """A model in training: where it stands, what it reports, what it saves."""

    def __init__(self, config: TrainConfig):
        gpt = first_model(config)
        saved, resumes = {} if gpt is None else gpt.checkpoint, config.init_from == "resume"
        self.config = config
        self.splits, self.meta = open_dataset(config, saved.get("tokenizer"))
        self.dataset = " ".join(self.meta[f"{split}_fingerprint"] for split in self.splits)
        path = f"{config.out_dir}/model.ckpt"
        if resumes and saved["dataset"] != self.dataset:
            raise UserError(f"data/{config.dataset} is not what {path} was trained on")
        seen = {f"data/{config.dataset}": self.dataset}
        check_same(asdict(config) | seen | {f"{path} at step": saved.get("step")})
        with user_errors():
            self.device, self.dtype, self.autocast, self.scaler = precision(config)
        check_parallel(config, self.device)
        if gpt is None:
            check_memory(config, self.device)
            torch.manual_seed(config.seed)
            gpt = GPT(GPTConfig(**config.model_args()))
        self.gpt = gpt.train()
        self.gpt.checkpoint, self.gpt.recompute = None, config.recompute
        model = distribute(gpt, config, self.device, self.dtype)
        self.optimizers = make_optimizers(gpt, config)
        self.step, self.best_val_loss = 0, math.inf
        if resumes:
            try:
                load_optimizer_state(gpt, self.optimizers, saved["optimizer"], saved["step"])
                if saved["scaler"] and self.scaler.is_enabled():
                    self.scaler.load_state_dict(saved["scaler"])
            except (ValueError, KeyError) as error:
                raise UserError(f"{path} cannot be resumed: {error}") from error
            self.step, self.best_val_loss = saved["step"], saved["best_val_loss"]
        self.prompt = self.read_prompt()
        self.out_dir = Path(config.out_dir)
        self.wandb = self.metrics = None  # are the first process's
        if rank() == 0:
            self.open_files(resumes)
        self.describe()
        self.model = compiled(model, config, self.device, self.autocast)
        self.first_step = self.saved_step = self.logged_step = self.step
        self.started = self.logged_at = time.perf_counter()
        self.next_batch = None
        self.spent = Counter()  # seconds that were not training
        # Skipped updates since the last report, in a row until now, and the most in a row.
        self.skipped = torch.zeros(3, device=self.device)

    def open_files(self, resumes: bool):
        """Where the run's files go."""
        with user_errors():
            self.out_dir.mkdir(parents=True, exist_ok=True)
        self.wandb = start_wandb(self.config) if self.config.wandb else None
        with user_errors():
            if not resumes:
                keep_old(self.out_dir)
            self.metrics = Metrics(self.out_dir / "metrics.jsonl", self.step)

    def read_prompt(self) -> list[int]:
        """Token ids of the prompt for samples; none where there are to be no samples."""
        if not self.config.sample_prompt:
            return []
        self.tokenizer = prepare.get_tokenizer(self.meta["tokenizer"])
        ids = self.tokenizer.encode(self.config.sample_prompt, disallowed_special=())
        if max(ids) < self.config.vocab_size:
            return ids
        say(f"no samples: {self.config.sample_prompt!r} is outside the vocabulary")
        return []

    def describe(self):
        """The first lines: data, model, device, and what the run amounts to."""
        config, meta = self.config, self.meta
        train, val = len(self.splits["train"]), len(self.splits["val"])
        self.tokens_per_update = config.batch_size * config.context_length
        epochs = config.max_iters * self.tokens_per_update / train
        say(
            f"data    {config.dataset}: {meta['source']}\n"
            f"        {train:,} tokens to train on, {val:,} to validate with "
            f"({meta['tokenizer']})\n"
            f"model   {self.gpt.num_parameters():,} parameters: {config.n_layer} layers, "
            f"{config.n_embd} channels, {config.n_head} heads, context {config.context_length:,}\n"
            f"device  {self.device}, matrix products in {str(self.dtype).removeprefix('torch.')}"
            f"{f', {processes()} processes ({config.parallel})' if dist.is_initialized() else ''}\n"
            f"run     {config.max_iters:,} updates of {self.tokens_per_update:,} tokens, "
            f"{epochs:.3g} epochs{f'; going on after {self.step:,}' if self.step else ''}"
        )
        if self.step >= config.max_iters:
            say(f"all {self.step:,} updates are done; a larger --max_iters goes on from here")

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of the update to come, on its way to the device."""
        config = self.config
        batch = get_batch(
            self.splits["train"],
            self.step,
            batch_size=config.batch_size,
            context_length=config.context_length,
            seed=config.seed,
            shift_windows=config.shift_windows,
            rank=rank(),
            processes=processes(),
        )
        check_ids(torch.maximum(*batch), config)
        if self.device.type == "cuda":  # only pinned memory is copied while the GPU computes
            batch = [tokens.pin_memory() for tokens in batch]
        return tuple(tokens.to(self.device, non_blocking=True) for tokens in batch)

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Update number `step`; its loss and gradient norm."""
        batch = self.next_batch or self.get_batch()
        set_lr(self.optimizers, self.step, self.config)
        how = (self.model, self.optimizers, self.scaler, self.autocast)
        loss, norm, skipped = update(*how, batch, self.config, self.step)
        self.step += 1
        self.next_batch = None
        if self.device.type == "cuda" and self.step < self.config.max_iters:
            self.next_batch = self.get_batch()  # while the GPU is at work on this one
        since, in_a_row, most = self.skipped
        in_a_row = (in_a_row + 1) * skipped
        self.skipped = torch.stack((since + skipped, in_a_row, torch.maximum(most, in_a_row)))
        return loss, norm

    def check_skipped(self):
        """Report skipped updates, and end a run that consists of them."""
        since, _, most = map(int, self.skipped.tolist())
        self.skipped[0] = 0
        if since:
            say(f"skipped {since:,} of the updates: their loss or gradient is not finite")
        if most >= self.config.max_skipped:
            at = self.saved_step
            left = f"model.ckpt is of step {at:,}" if at else "there is no checkpoint"
            raise SystemExit(
                f"stopped: {most:,} updates in a row had no finite loss or gradient; {left}; "
                "lower --learning_rate"
            )

    def record(self, **values):
        """Add a line to metrics.jsonl."""
        if self.metrics is None:
            return
        values = {x: value if math.isfinite(value) else None for x, value in values.items()}
        seconds = self.metrics.seconds + time.perf_counter() - self.started
        line = {"step": self.step, "seconds": round(seconds, 3)} | values
        self.metrics.append(line)
        if self.wandb is not None:
            self.wandb.log(line, step=self.step)

    @contextlib.contextmanager
    def spending(self, what: str):
        """Time on something that is not training, and does not count as tokens per second."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # updates under way are training
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.spent[what] += seconds
        self.logged_at += seconds

    def log(self, loss: torch.Tensor, norm: torch.Tensor):
        loss, norm = float(loss), float(norm)  # waits for the device
        lr, now = get_lr(self.step - 1, self.config), time.perf_counter()
        updates, seconds = self.step - self.logged_step, now - self.logged_at
        rate = updates * self.tokens_per_update / seconds
        left = (self.config.max_iters - self.step) * seconds / updates
        self.logged_step, self.logged_at = self.step, now
        self.record(loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)
        say(
            f"{self.step_name()}  loss {loss:.4f}  lr {lr:.2e}  gradient norm {norm:.2f}"
            f"  {rate:,.0f} tokens/s{self.utilization(rate)}  {duration(left)} left"
        )
        self.check_skipped()

    def step_name(self) -> str:
        return f"step {self.step:>{len(str(self.config.max_iters))}}"

    def utilization(self, rate: float) -> str:
        """The share of its peak that a known GPU reaches at `rate` tokens per second (MFU)."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return ""
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        if peak is None:
            return ""
        return f"  MFU {rate * self.gpt.flops_per_token() / peak / processes():.0%}"

    def evaluate(self):
        with self.spending("evaluation"):
            losses = estimate_loss(self.model, self.splits, self.config, self.device, self.autocast)
        train_loss, val_loss = losses["train"], losses["val"]
        perplexity = math.exp(min(val_loss, 700))
        self.record(train_loss=train_loss, val_loss=val_loss, val_perplexity=perplexity)
        say(
            f"{self.step_name()}  training loss {train_loss:.4f}  validation loss {val_loss:.4f}"
            f"  perplexity {perplexity:,.2f}"
        )
        sharded = self.config.parallel == "fsdp"
        if self.prompt and (rank() == 0 or sharded):  # of a sharded model all are needed
            autocast = self.autocast if sharded else contextlib.nullcontext()
            with self.spending("samples"), autocast:
                gpt = self.gpt
                if self.device.type == "cpu" and not sharded:  # a copy that writes faster
                    gpt = copy.deepcopy(gpt).to(self.dtype).pack()
                idx = torch.tensor([self.prompt], device=self.device)
                idx = gpt.generate(idx, 40, temperature=0, use_cache=not sharded)
            say("      " + " ".join(prepare.decode(self.tokenizer, idx[0].tolist()).split()))
        if sharded:
            self.gpt.reshard()  # which otherwise a backward pass does
        if val_loss < self.best_val_loss:
            before, self.best_val_loss = self.best_val_loss, val_loss
            if self.config.save_best and self.step > 0:
                with self.spending("saving"):
                    if not on_first(save_checkpoint, self.out_dir / "best.ckpt", self.contents()):
                        self.best_val_loss = before  # the next good one is saved, then

    def contents(self) -> dict:
        """What a checkpoint holds, but for what only resuming needs."""
        return {
            "model": whole(self.gpt.state_dict(keep_vars=True)),
            "model_args": asdict(self.gpt.config),
            "config": asdict(self.config),
            "tokenizer": self.meta["tokenizer"],
            "step": self.step,
            "best_val_loss": self.best_val_loss,
        }

    def save(self, last: bool = False) -> bool:
        """Write model.ckpt, unless it is of this step; False if it could not be."""
        if self.saved_step == self.step > 0:
            return True
        path = self.out_dir / "model.ckpt"
        if (in_a_row := int(self.skipped[1])) > 1:  # of one alone nothing follows
            if not last:
                say(f"{path.as_posix()} not saved: the last {in_a_row:,} updates were skipped")
                return False
            # The weights that they follow may be the ones to blame.
            if rank() == 0 and path.exists():
                now = path.name + set_aside(self.out_dir, path.name)
                say(f"the last {in_a_row:,} updates were skipped; {now} is of before them")
        contents = self.contents() | {
            "optimizer": optimizer_state(self.gpt, self.optimizers),
            "scaler": self.scaler.state_dict(),
            "dataset": self.dataset,
            "job": os.environ.get("TORCHELASTIC_RUN_ID"),
        }
        with self.spending("saving"):
            with contextlib.suppress(OSError, AttributeError):
                self.metrics.flush()  # a checkpoint never knows more than metrics.jsonl
            saved = on_first(save_checkpoint, path, contents)
        self.saved_step = self.step if saved else self.saved_step
        return saved

    def finish(self):
        """The picture, and where the time went."""
        with self.spending("drawing"):
            try:
                if rank() == 0:
                    plot(self.out_dir, self.config)
            except Exception as error:  # whatever it is, the run is worth more than its picture
                say(f"no loss.png: {error}")
        self.check_skipped()
        total = time.perf_counter() - self.started
        shares = {"training": total - self.spent.total()} | self.spent
        listed = ", ".join(f"{what} {seconds / total:.0%}" for what, seconds in shares.items())
        say(f"{self.step - self.first_step:,} updates in {duration(total)}: {listed}")


@together()
def main(argv: list[str]):
    config = parse(TrainConfig, argv)
    if config.plan:
        return plan(config)
    resume = "" if config.init_from == "resume" else " --init_from resume"
    resume_after_restart(config)
    training = Run(config)
    with Stop() as stop:
        if training.step == 0:
            training.evaluate()
        while training.step < config.max_iters and not stop.agreed():
            loss, norm = training.update()
            if training.step % config.log_interval == 0:
                training.log(loss, norm)
            if training.step % config.eval_interval == 0 or training.step == config.max_iters:
                training.evaluate()
            if training.step % config.checkpoint_interval == 0 and training.step < config.max_iters:
                training.save()
        saved = training.save(last=True)
        training.finish()
        stopped = stop.agreed()
    if stopped and saved:
        launcher = f"torchrun --nproc_per_node={processes()}" if dist.is_initialized() else "python"
        say(f"to go on: {launcher} train.py {shlex.join(argv)}{resume}")
    gather(None)  # torchrun ends all processes at the first one's exit code
    if stopped or not saved:
        sys.exit(128 + stopped if saved else 1)


# Parts of a model by what stands in the names of their parameters.
PARTS = {"wte": "token embedding", "wpe": "positions", ".attn.": "attention", ".mlp.": "MLP"}
PARTS |= {"ln_": "norms", "lm_head": "output head"}


def in_memory(numbers: int, itemsize: int = 4) -> int:
    """Bytes that a tensor takes: large ones are in pages of 2 MiB, on a GPU as well."""
    size, page = numbers * itemsize, 2**21
    return size if size < page else -(-size // page) * page


def count_activations(config: TrainConfig, B: int, autocast, recompute: bool) -> int:
    """Bytes that a forward pass of B sequences keeps for the backward pass.

    Counted by making that pass with tensors that have no contents.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # which training does not need

    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with FakeTensorMode():
        gpt = GPT(GPTConfig(**config.model_args())).train()
        gpt.recompute = recompute
        idx = torch.zeros(B, config.context_length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            loss = gpt(idx, idx)  # noqa: F841  (what it came from lives as long as it does)
        for p in gpt.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        return sum(in_memory(storage.nbytes(), 1) for storage in kept.values())


def plan(config: TrainConfig):
    """Print what a run would take. Nothing of its size is computed or held in memory.

    At its highest, memory holds weights and moments, and either all gradients or, before there are
    any but the output head's, the activations with the logits and their gradient.
    """
    if config.init_from != "scratch":
        raise UserError(f"--plan is of models from scratch, not --init_from {config.init_from}")
    with user_errors():
        _, dtype, autocast, _ = precision(config)
    if config.vocab_size is None:
        config.vocab_size = prepare.read_meta(Path("data") / config.dataset)["vocab_size"]
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**config.model_args()))
    parts, total = Counter(), gpt.num_parameters()
    for name, p in gpt.named_parameters():
        parts[next(part for key, part in PARTS.items() if key in name)] += p.numel()
    states = [
        (p, len(OPTIMIZER_STATE[type(optimizer).__name__] - {"step"}))
        for optimizer in make_optimizers(gpt, config)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    moments = sum(in_memory(p.numel()) * count for p, count in states)
    file = sum(4 * p.numel() * (1 + count) for p, count in states)
    weights = sum(in_memory(p.numel()) for p in gpt.parameters())
    tokens = config.max_iters * config.batch_size * config.context_length
    print(f"model       {total:,} parameters: " + ", ".join(f"{x} {parts[x]:,}" for x in parts))
    flops = gpt.flops_per_token()
    print(f"compute     {flops / 1e9:,.3g} GFLOP per token, {flops * tokens:.2e} FLOP in all")
    print(f"tokens      {tokens:,}; 20 per parameter are {20 * total:,} (Hoffmann et al. 2022)")
    print(f"checkpoint  {file / 1e9:,.4g} GB")
    print(
        f"\nGB per process, with up to {config.micro_batch_size} sequences at a time, products in "
        f"{str(dtype).removeprefix('torch.')}\n"
        "(for a GPU add --dtype bfloat16), large tensors in pages of 2 MiB:\n"
        "processes  parallel  weights  gradients  optimizer  activations   peak  with --recompute"
    )
    root = sum(p.numel() for name, p in gpt.named_parameters() if ".h." not in name)
    block = (total - root) // config.n_layer
    count_once = functools.cache(lambda B, again: count_activations(config, B, autocast, again))
    rows = {("ddp", 1), ("ddp", 8), ("fsdp", 8), ("fsdp", 32)}
    if processes() > 1:
        rows.add((config.parallel, processes()))
    for parallel, count in sorted(rows):
        share, rest = divmod(config.batch_size, count)
        if rest or (parallel == "fsdp" and config.optimizer == "muon"):
            why = f"they cannot share {config.batch_size} sequences" if rest else "not with Muon"
            print(f"{count:9,}  {parallel:8}  {why}")
            continue
        B = min(config.micro_batch_size, share)
        cut = count if parallel == "fsdp" else 1
        sizes = weights / cut, weights / cut, moments / cut  # gradients are like weights
        together = 4 * root + 2 * dtype.itemsize * block if cut > 1 else 0  # while it is in use
        logits = 2 * in_memory(B * config.context_length * config.vocab_size)
        head = in_memory(config.n_embd * config.vocab_size)
        held = weights if B < share else 0  # gradients of the micro batches before, whole
        peaks = []
        for recompute in (False, True):
            activations = count_once(B, recompute)
            most = max(sizes[1], held + activations + logits) + head
            peaks.append((activations, most + sizes[0] + sizes[2] + together))
        row = zip((9, 11, 11, 13, 7, 18), (*sizes, *peaks[0], peaks[1][1]))
        print(f"{count:9,}  {parallel:8}" + "".join(f"{x / 1e9:{width},.2f}" for width, x in row))
    print("\nat 40 % of the card's peak (MFU):")
    for card, count in (("RTX 4090", 1), ("A100", 1), ("H100", 1), ("H100", 8), ("H100", 64)):
        rate = 0.4 * PEAK_FLOPS[card] * count / flops
        left = duration(tokens / rate)
        print(f"  {count:2} x {card:8}  {rate:12,.0f} tokens/s  {left}")


def start_wandb(config: TrainConfig):
    """A Weights & Biases run; WANDB_MODE=offline keeps it on this machine."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb (pip install wandb)") from None
    return wandb.init(project="gpt", config=asdict(config), dir=config.out_dir)


if __name__ == "__main__":
    run(main)
