"""Train a GPT.

    python train.py config/verdict.py                       the book's run
    python train.py config/tiny.py --n_layer 2 --seed=1     a config file, then changes to it
    python train.py --init_from resume                      go on with the run in out/
    torchrun --nproc_per_node=4 train.py config/gpt2.py     the same run in four processes

Reads data/<dataset>/, made by prepare.py. Writes out/model.ckpt (the weights and all that resuming
needs), out/metrics.jsonl (one line per report) and out/loss.png (a picture of the losses).

Read `train` first: one pass of its loop is one update, with the book's four steps: forward pass,
loss, backward pass, update. A batch follows from the seed and the step alone, so a resumed run
draws the same batches. Several processes (ranks) run the same loop, each on its share of a batch.
"""

import atexit
import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
import time
import typing
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import prepare
from config import UserError, atomic_write, check_ranges, check_type, lock, parse, run, user_errors
from model import (
    GPT,
    GPTConfig,
    choose_device,
    count_parameters,
    evaluation_mode,
    flops_per_token,
    gradient_norm,
    load_model,
    make_optimizers,
    prepack,
)

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


@dataclass
class TrainConfig(GPTConfig):
    """All settings of a training run: the model's and the ones below."""

    vocab_size: int | None = None  # number of token ids; none: as in the dataset
    # Data
    dataset: str = "verdict"  # folder under data/ that prepare.py made
    batch_size: int = 8  # sequences per update, over all processes
    micro_batch_size: int | None = None  # sequences per forward pass and process; none: no limit
    shift_windows: bool = True  # cut the text at another offset in every epoch (the book: no)
    seed: int = 1337  # seeds initial weights, order of the data, and dropout
    # Updates
    max_iters: int = 1000  # number of updates
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for blocks' matrices, AdamW for the rest
    learning_rate: float = 6e-4  # highest learning rate (about 0.02 with muon)
    embedding_learning_rate: float = 6e-4  # with muon: learning rate of embeddings and vectors
    head_learning_rate: float = 6e-4  # with muon: untied head's rate, multiplied by 128 / n_embd
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: constant, then linear decay
    warmup_iters: int = 100  # updates over which the learning rate rises linearly
    initial_lr: float = 0.0  # learning rate at the start of the warm-up
    min_lr: float = 6e-5  # learning rate at the end of cosine and wsd
    cooldown_fraction: float = 0.5  # with wsd: last fraction of max_iters, where the rate falls
    weight_decay: float = 0.1  # decoupled weight decay of matrices; vectors have none
    beta1: float = 0.9  # AdamW: decay rate of its average of gradients
    beta2: float = 0.95  # AdamW: decay rate of its average of squared gradients
    momentum: float = 0.95  # Muon: decay rate of its average of gradients
    muon_interval: int = 1  # Muon updates each matrix once every this many updates
    grad_clip: float = 1.0  # clip gradients to this global norm; 0 disables clipping
    max_skipped: int = 10  # stop when this many updates in a row have a loss or norm not finite
    # Reports
    log_interval: int = 10  # updates between log lines
    eval_interval: int = 100  # updates between evaluations
    eval_iters: int = 20  # batches of each split in an evaluation
    checkpoint_interval: int | None = None  # updates between checkpoints; none: at evaluations
    save_best: bool = False  # also keep the weights of the lowest validation loss in best.ckpt
    sample_prompt: str | None = None  # prompt of samples; none: from validation text; empty: off
    out_dir: str = "out"  # folder for model.ckpt, metrics.jsonl and loss.png
    wandb: bool = False  # also log to Weights & Biases (WANDB_PROJECT and WANDB_NAME name the run)
    # Start and machine
    init_from: str = "scratch"  # scratch, resume, or weights: a checkpoint, a folder, gpt2
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a name such as cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of matrix products
    parallel: Literal["ddp", "fsdp"] = "ddp"  # several processes: a whole model or a shard in each
    compile: bool | None = None  # torch.compile the model; none: only on CUDA
    activation_checkpointing: bool = False  # recompute activations: less memory, more time

    def __post_init__(self):
        super().__post_init__()
        from_0 = "learning_rate embedding_learning_rate head_learning_rate initial_lr min_lr "
        from_0 += "warmup_iters weight_decay grad_clip seed"
        from_1 = "batch_size micro_batch_size max_iters max_skipped muon_interval log_interval "
        from_1 += "eval_interval eval_iters checkpoint_interval"
        fractions = {"[0, 1)": "beta1 beta2 momentum", "(0, 1]": "cooldown_fraction"}
        check_ranges(self, fractions | {"[0, inf)": from_0, "[1, 1e12)": from_1})
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("Muon needs whole matrices: take --parallel ddp or --optimizer adamw")

    def model_args(self) -> dict:
        """Return the fields of GPTConfig among the settings."""
        return {field.name: getattr(self, field.name) for field in fields(GPTConfig)}


# --- Data -----------------------------------------------------------------------------------------


def get_batch(stream, step: int, config: TrainConfig, device="cpu", rank: int = 0, world_size=1):
    """Return inputs and targets, each (B, T) int64 on `device`, of update number `step`.

    `stream` (N,) is used as a ring: the last token id is followed by the first. Each epoch cuts it
    into (N - 1) // T windows of T tokens, from a new offset (0 without `shift_windows`), and visits
    each window once, in shuffled order. The seed and the epoch determine offset and order. A rank
    gets B = batch_size / world_size windows of the update.
    """
    windows = (len(stream) - 1) // config.context_length  # per epoch
    B = config.batch_size // world_size
    numbers = step * config.batch_size + rank * B + np.arange(B)  # (B,), counted over all epochs
    epochs, places = np.divmod(numbers, windows)
    starts = np.empty(B, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rng = np.random.default_rng([config.seed, epoch])
        offset = rng.integers(len(stream)) if config.shift_windows else 0
        starts[here] = offset + config.context_length * permute(places[here], windows, rng)
    tokens = read_windows(stream, starts, config).to(device)  # (B, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


def get_lr(step: int, config: TrainConfig) -> float:
    """Return the base learning rate of update `step` (from 0); `set_lr` scales it for each group.

    A linear warm-up, then the cosine of the book's appendix D, or another `lr_schedule`.
    """
    if step < config.warmup_iters:
        rise = (config.learning_rate - config.initial_lr) / config.warmup_iters
        return config.initial_lr + step * rise
    if config.lr_schedule == "constant":
        return config.learning_rate
    if config.lr_schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, "MiniCPM")
        height = (config.max_iters - step) / (config.cooldown_fraction * config.max_iters)
        height = min(1, max(0, height))
    else:
        progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        height = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.min_lr + (config.learning_rate - config.min_lr) * height


@torch.no_grad()
def estimate_loss(
    gpt: GPT, splits: dict, config: TrainConfig, autocast, token_sizes=None, signals=()
) -> dict:
    """Return the mean loss of each split in nats per token, over up to `eval_iters` batches.

    Dropout is off. The windows are evenly spaced and the same at every call; a small split is
    evaluated completely, each target once. Ranks share the batches; the number of ranks changes the
    result by rounding only. With `token_sizes`, the bytes of each token id (V,), also returns the
    bits per byte of the same targets, to compare tokenizers. Returns {} if a signal arrives.
    """
    T, B, device = config.context_length, sequences_per_pass(config), gpt.lm_head.weight.device
    losses = {}
    for name, stream in splits.items():
        windows = math.ceil((len(stream) - 1) / T)  # the last one may be short
        count = min(windows, config.eval_iters * config.batch_size)
        starts = np.arange(count) * windows // count * T
        batches = []  # the summed loss, tokens and bytes of each batch of this rank
        with evaluation_mode(gpt), autocast:  # casts the weights once
            for first in range(B * get_rank(), count + B * get_rank(), B * get_world_size()):
                if any_rank(signals):
                    return {}
                mine = starts[first : first + B]
                rows = mine if len(mine) else starts[:1]  # under FSDP all ranks make each pass
                tokens = read_windows(stream, rows, config)  # (B, T + 1)
                at_end = torch.from_numpy(rows)[:, None] + torch.arange(1, T + 1) >= len(stream)
                x, y = tokens[:, :-1], tokens[:, 1:].masked_fill(at_end, -100)  # -100: not counted
                loss = gpt(x.to(device), y.to(device))
                counted = y[: len(mine)][y[: len(mine)] >= 0].numpy()
                size = 0 if token_sizes is None else int(token_sizes[counted].sum())
                batches.append((loss.item() * len(counted), len(counted), size))
        batches = itertools.chain(*all_gather(batches))
        total, targets, size = map(math.fsum, zip(*batches))  # fsum is exact in any order
        losses[name] = total / targets
        if size:
            losses[f"{name}_bits_per_byte"] = total / math.log(2) / size
    return losses


# --- Training -------------------------------------------------------------------------------------


def main(argv: list[str]):
    with process_group() as run_id:
        config = parse(TrainConfig, argv)
        with open_out_dir(config.out_dir) if get_rank() == 0 else contextlib.nullcontext():
            exit_code = train(config, run_id)
    leave(exit_code)


def train(config: TrainConfig, run_id: str) -> int:
    """Train until `max_iters`, a signal or too many skipped updates; return the exit code."""
    signals = catch_signals()
    config, gpt, saved = load_weights(config, run_id)  # from scratch gpt is None, saved {}
    splits, meta = open_dataset(config, saved)
    device, dtype, autocast, scaler = get_precision(config)
    check_ranks(config, meta, saved, device)
    gpt = gpt or create_model(config, device)
    model = distribute(gpt, config, device, dtype)  # in a single process: gpt itself
    optimizers = make_optimizers(gpt, config, dtype)
    step, best_val_loss = load_state(gpt, optimizers, scaler, saved)
    text = read_text(config, splits, meta)
    describe(config, meta, step, device, dtype)
    train_model = compile_model(model, splits["train"], config, device, autocast)
    log = Log(config, saved, device, dtype)
    saved_step, skipped = step, 0

    def save(name: str = "model.ckpt") -> bool:  # with the values at the time of the call
        state = dict(step=step, best_val_loss=best_val_loss, scaler=scaler.state_dict())
        state |= dict(run_id=run_id, tokenizer=meta["tokenizer"], dataset=meta["fingerprint"])
        return save_checkpoint(gpt, optimizers, log, name, state, skipped)

    while True:
        if evaluation_is_due(config, step, log.lines):
            val_loss = evaluate(gpt, splits, autocast, text, log, step, signals)
            if step > 0:
                saved_step = -1  # no checkpoint has this evaluation yet
            if val_loss < best_val_loss:
                before, best_val_loss = best_val_loss, val_loss
                if config.save_best and step > 0 and not save("best.ckpt"):
                    best_val_loss = before  # the loss of the file, which is unchanged
        if step != saved_step and checkpoint_is_due(config, step, log.clock) and save():
            saved_step = step
        if step >= config.max_iters or any_rank(signals) or skipped >= config.max_skipped:
            break
        lr = set_lr(optimizers, step, config)
        x, y = get_batch(splits["train"], step, config, device, get_rank(), get_world_size())
        micro_batches = split_batch(x, y, config)
        total_loss = 0.0
        for micro_step, (inputs, targets) in enumerate(micro_batches):
            seed_dropout(config.seed, step, micro_step)
            set_grad_sync(model, micro_step == len(micro_batches) - 1)
            with autocast:
                micro_loss = train_model(inputs, targets)  # 1. forward pass, 2. loss
            micro_loss = micro_loss * (len(inputs) / len(x))
            scaler.scale(micro_loss).backward()  # 3. backward pass; gradients add up
            total_loss += micro_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        total_norm = gradient_norm(gpt)
        loss, norm = to_numbers(total_loss, total_norm)  # over all ranks; waits for the device
        if 0 < config.grad_clip < norm:  # most updates need no scaling of all gradients
            torch.nn.utils.clip_grads_with_norm_(gpt.parameters(), config.grad_clip, total_norm)
        skipped = 0 if math.isfinite(loss + norm) else skipped + 1  # updates in a row
        for optimizer in optimizers:
            if not skipped:
                optimizer.step()  # 4. update
            optimizer.zero_grad()
        scaler.update()
        step += 1

        log.update(step, skipped, loss, lr, norm)
    saved = step == saved_step or save()
    return finish(log, meta, step, saved, stopped_by=any_rank(signals))


# --- A first reading may stop here ----------------------------------------------------------------


def read_windows(stream, starts: np.ndarray, config: TrainConfig) -> torch.Tensor:
    """Return T + 1 token ids beginning at each of `starts` (B,): (B, T + 1) int64."""
    positions = starts[:, None] + np.arange(config.context_length + 1)  # (B, T + 1)
    tokens = stream[positions % len(stream)].astype(np.int64)
    V = config.vocab_size or math.inf
    if (largest := int(tokens.max())) >= V:
        raise UserError(f"data/{config.dataset} holds token id {largest:,}; vocab_size is {V:,}")
    return torch.from_numpy(tokens)


def set_lr(optimizers: list[torch.optim.Optimizer], step: int, config: TrainConfig) -> float:
    """Set the learning rate of every parameter group for update `step`; return the base rate."""
    lr = get_lr(step, config)
    for optimizer in optimizers:
        optimizer.step_number = step  # Muon updates some of its matrices in each update
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
    return lr


def evaluation_is_due(config: TrainConfig, step: int, lines: list[dict]) -> bool:
    """Return whether to evaluate at `step`; a resumed run may have done it already."""
    done = any(line["step"] == step and "val_loss" in line for line in lines[-1:])
    return not done and (step % config.eval_interval == 0 or step == config.max_iters)


def evaluate(gpt: GPT, splits: dict, autocast, text: "Text", log, step: int, signals) -> float:
    """Report the mean losses of both splits and a sample; return the validation loss."""
    with log.clock.timed("evaluation"):
        losses = estimate_loss(gpt, splits, log.config, autocast, text.token_sizes, signals)
    if not losses:  # a signal has stopped it
        return math.nan
    train, val = losses["train"], losses["val"]
    # The number of equally likely tokens with the same loss.
    perplexity = math.exp(val) if val < 709 else math.inf
    line = f"training loss {train:.4f}  validation loss {val:.4f}  perplexity {perplexity:,.2f}"
    values = dict(train_loss=train, val_loss=val, val_perplexity=perplexity)
    if bits := losses.get("val_bits_per_byte"):
        line += f"  bits per byte {bits:.4f}"
        values["val_bits_per_byte"] = bits
    log.add(step, line, **values)
    with log.clock.timed("samples"):
        write_sample(gpt, text, log, autocast)
    if is_sharded(gpt):
        gpt.reshard()  # frees the gathered weights, as a backward pass does
    return val


def permute(index: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Map each `index` through a pseudo-random permutation of range(n) in O(1) memory.

    A Feistel network permutes the numbers of 2k bits. Values of n and above are permuted again
    until they fall below n (cycle walking; Black & Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains").
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


def open_dataset(config: TrainConfig, saved: dict) -> tuple[dict, dict]:
    """Return both splits of the dataset and its meta.json, and set `vocab_size` if it is None.

    Raises UserError for a dataset that does not fit the settings or the checkpoint `saved`.
    """
    splits, meta = prepare.load_dataset(config.dataset, saved)
    config.vocab_size = config.vocab_size or meta["vocab_size"]
    for split, stream in splits.items():
        if (most := len(stream) - 1) < config.context_length:
            advice = f"take --context_length {most} or less, or " if most else ""
            few = f"data/{config.dataset}/{split}.bin has {len(stream):,} tokens, too few"
            long = f"for context_length {config.context_length:,}"
            raise UserError(f"{few} {long}: {advice}prepare more text")
    return splits, meta


def sequences_per_pass(config: TrainConfig) -> int:
    """Return how many sequences go through the model at once in each rank."""
    share = config.batch_size // get_world_size()
    return min(config.micro_batch_size or share, share)


def split_batch(x: torch.Tensor, y: torch.Tensor, config: TrainConfig) -> list[tuple]:
    """Return inputs and targets of each micro batch."""
    size = sequences_per_pass(config)
    return list(zip(x.split(size), y.split(size)))


def seed_dropout(*key: int):
    """Seed dropout from (seed, step, micro step) and the rank: a resumed run repeats the masks."""
    sequence = np.random.SeedSequence((*key, get_rank()))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def to_numbers(loss: torch.Tensor, norm: torch.Tensor) -> list[float]:
    """Return the loss, averaged over ranks, and the gradient norm, in one copy from the device."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's are DTensors
    return torch.stack((all_reduce(loss) / get_world_size(), norm)).tolist()


class Text(NamedTuple):
    """The tokenizer and values made from it, for evaluations; defaults if it cannot be loaded."""

    tokenizer: object = None  # a tiktoken.Encoding, in rank 0
    token_sizes: np.ndarray | None = None  # bytes of each token id (V,)
    prompt: list[int] = []  # token ids of the prompt for samples; no samples without
    end: int | None = None  # the id of <|endoftext|>


def read_text(config: TrainConfig, splits: dict, meta: dict) -> Text:
    """Return the `Text` of a dataset: the tokenizer in rank 0 only, the rest in all ranks."""
    tokenizer, rest = None, Text()[1:]
    try:
        if get_rank() == 0:
            tokenizer, prompt = prepare.get_tokenizer(meta["tokenizer"]), config.sample_prompt
            if prompt is None:
                ids = splits["val"][:8].tolist()  # may end within a character: the model goes on
            else:
                ids = prepare.encode_prompt(prompt, tokenizer)
            if max(ids, default=0) >= config.vocab_size:
                print0(f"no samples: {prompt!r} is outside the vocabulary")
                ids = []
            sizes = prepare.token_sizes(tokenizer, config.vocab_size)
            rest = sizes, ids, tokenizer.eot_token
    except UserError as error:
        print0(f"no samples, no bits per byte: {error}")
    return Text(tokenizer, *all_gather(rest)[0])


def write_sample(gpt: GPT, text: Text, log: "Log", autocast):
    """Print the prompt and up to 40 tokens, each the most likely next one, until <|endoftext|>."""
    if not text.prompt or (get_rank() > 0 and not is_sharded(gpt)):
        return
    idx, sharded = torch.tensor([text.prompt], device=log.device), is_sharded(gpt)
    packs = log.device.type == "cpu" and not sharded  # FSDP's modules cannot be copied
    writer = prepack(gpt, log.dtype) if packs else gpt  # a faster copy
    with autocast if sharded else contextlib.nullcontext():  # sharded: all ranks run each pass
        idx = writer.generate(idx, 40, temperature=0, stop_token=text.end, use_cache=not sharded)
    if get_rank() == 0:
        sample = prepare.decode(text.tokenizer, idx[0].tolist()).removesuffix(prepare.ENDOFTEXT)
        print0("      " + " ".join(sample.split()))


# --- Checkpoints ----------------------------------------------------------------------------------

# The files of a run, in the order in which `move_earlier_run` moves them.
RUN_FILES = ("loss.png", "metrics.jsonl", "best.ckpt", "model.ckpt")


def load_weights(config: TrainConfig, run_id: str) -> tuple[TrainConfig, GPT | None, dict]:
    """Follow `init_from`: return settings, model (None from scratch), and what else is saved."""
    path = Path(config.out_dir, "model.ckpt").as_posix()
    if restarted_from(path, run_id):
        print0(f"restarted: going on from {path}")
        config.init_from = "resume"
    if config.init_from == "scratch":
        return config, None, {}
    if config.init_from == "resume":
        return resume(config, path)
    moved = [Path(config.out_dir, name).resolve() for name in RUN_FILES]
    source = config.init_from
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "ckpt.pt")):
        source = os.path.join(source, "model.ckpt")
    if os.path.isfile(source) and Path(source).resolve() in moved:
        reason = "would be moved away by this run: give another --out_dir"
        raise UserError(f"{config.init_from} {reason}")
    gpt, saved = load_model(config.init_from, dropout=config.dropout)
    if saved["tokenizer"] is None:
        raise UserError(f"{config.init_from} has an unknown tokenizer: {saved.get('vocabulary')}")
    if config.given.get("context_length", math.inf) < gpt.config.context_length:
        gpt.crop_context(config.context_length)
    config = merge(config, {}, gpt, config.init_from)
    return config, gpt.train(), {"tokenizer": saved["tokenizer"]}


def restarted_from(path: str, run_id: str) -> bool:
    """Return whether torchrun has restarted this run and `path` is its own checkpoint."""
    if max(all_gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) == 0:
        return False
    found = None
    if get_rank() == 0 and os.path.exists(path):
        found = load_model(path)[1].get("run_id")  # at an error torchrun tries again
    return all_gather(found)[0] == run_id


def resume(config: TrainConfig, path: str) -> tuple[TrainConfig, GPT, dict]:
    """Return settings, model, and what else is saved in `path`; given settings take precedence."""
    dropout = {"dropout": config.dropout} if "dropout" in config.given else {}
    gpt, saved = load_model(path, **dropout)
    wanted = dict(tokenizer=str, optimizer=dict, scaler=dict, config=dict, dataset=str, step=int)
    wanted |= dict(best_val_loss=float, metrics=list)
    for name, kind in wanted.items():
        if type(saved.get(name)) is not kind:
            raise UserError(f"{path} has no {name} to resume with: use --init_from {path}")
    types = typing.get_type_hints(TrainConfig)
    own = (types.keys() & saved["config"].keys()) - {"init_from", "out_dir"}
    settings = {name: check_type(name, saved["config"][name], types[name]) for name in own}
    # If the saved device or parallel mode is not available, use the default.
    if settings.get("parallel") == "fsdp" and get_world_size() == 1:
        del settings["parallel"]
        print0("fsdp needs several processes: the default is ddp")
    try:
        choose_device(settings.get("device", "auto"))
    except ValueError:
        print0(f"device {settings.pop('device')} is not available: the default is auto")
    return merge(config, settings, gpt, path), gpt.train(), saved


def merge(config: TrainConfig, settings: dict, gpt: GPT, path: str) -> TrainConfig:
    """Return the given settings of `config`, else the `settings` of a checkpoint, else defaults.

    The shape is the model's. Raises UserError for given settings that would make another model or
    optimizer; reports other changes.
    """
    shape = asdict(gpt.config)
    del shape["dropout"], shape["embedding_std"]  # may change
    given = {x: value for x, value in config.given.items() if value is not None or x not in shape}
    for name, value in given.items():
        before = (settings | shape).get(name, value)
        if before != value and (name in shape or name == "optimizer"):
            raise UserError(f"{name} is {before} in {path} and cannot be {value}: leave it out")
        if before != value:
            print0(f"changed since the checkpoint: {name} was {before}, is {value}")
    with user_errors():
        return TrainConfig(**settings | shape | given | {"init_from": config.init_from})


def load_state(gpt: GPT, optimizers: list, scaler, saved: dict) -> tuple[int, float]:
    """Load the state of optimizers and scaler; return the step and the best validation loss."""
    if "step" not in saved:
        return 0, math.inf
    from torch.distributed.checkpoint import state_dict as dcp

    def shapes(state: dict) -> dict:
        return {name: {key: x.shape for key, x in state[name].items()} for name in state}

    # A step with zero gradients and learning rate 0 makes a state to compare with. The new groups
    # are kept, or the saved weight decay would replace a given one.
    state, own = saved.pop("optimizer"), dcp.get_optimizer_state_dict(gpt, optimizers)
    try:
        if shapes(state) != shapes(own["state"]):
            raise ValueError("the optimizer's state does not fit the model")
        options = dcp.StateDictOptions(full_state_dict=True)
        dcp.set_optimizer_state_dict(gpt, optimizers, own | {"state": state}, options=options)
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint cannot be resumed: {error}") from error
    return saved["step"], saved["best_val_loss"]


def checkpoint_is_due(config: TrainConfig, step: int, clock: "Clock") -> bool:
    """Return whether to save at `step`: every `checkpoint_interval` updates, else at evaluations.

    At an evaluation, save only if all saving so far and the next save, estimated at 1 GB/s, take
    less than a fortieth of the run's time.
    """
    if config.checkpoint_interval is not None:
        return step < config.max_iters and step % config.checkpoint_interval == 0
    next_time = count_bytes(config)[0] / 1e9  # seconds
    cheap = 40 * (clock.spent["saving"] + next_time) < clock.seconds()
    return step < config.max_iters and step % config.eval_interval == 0 and any_rank([int(cheap)])


def save_checkpoint(
    gpt: GPT, optimizers: list, log: "Log", name: str, state: dict, skipped: int
) -> bool:
    """Write out_dir/name; return False and report why if it is not written. All ranks call it.

    model.ckpt holds all that resuming needs, best.ckpt what sampling needs. After several skipped
    updates in a row, or a validation loss that is not finite, the weights are suspect: they never
    replace a good checkpoint.
    """
    config, path = log.config, Path(log.config.out_dir, name)
    val_losses = [line["val_loss"] for line in log.lines if "val_loss" in line]
    reason = "the validation loss is not finite" if val_losses[-1:] == [None] else ""
    if skipped > 1 or skipped == config.max_skipped or log.waiting:
        # The scale of float16 falls by itself.
        advice = "" if state["scaler"] else "; lower --learning_rate"
        reason = f"updates skipped in a row: {skipped:,}{advice}"
    if reason:
        print0(f"{path.as_posix()} NOT SAVED: {reason}")
        return False
    # The time of best.ckpt must not delay model.ckpt, see `checkpoint_is_due`.
    with log.clock.timed("saving" if name == "model.ckpt" else "saving the best"):
        from torch.distributed.checkpoint import state_dict as dcp  # takes half a second

        started, result = time.perf_counter(), ""
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        if name == "best.ckpt":
            optimizers = []
        weights, optimizer_state = dcp.get_state_dict(gpt, optimizers, options=options)
        state |= dict(model=weights, model_args=config.model_args(), config=asdict(config))
        state |= {"wandb": log.wandb.id} if log.wandb else {}
        if get_rank() == 0:  # the other ranks receive empty dicts
            if gpt.config.tie_weights:  # one matrix in the file
                weights["lm_head.weight"] = weights["transformer.wte.weight"]
            if optimizers:  # without parameter groups, which follow from the settings
                state |= {"optimizer": optimizer_state["state"], "metrics": log.lines}
            try:
                with atomic_write(path) as file:
                    torch.save(state, file)
                size, seconds = path.stat().st_size / 1e6, time.perf_counter() - started
                result = f"saved: step {state['step']:,}, {size:,.1f} MB in {seconds:.1f} s"
            except (OSError, RuntimeError) as error:  # torch.save wraps OSErrors
                result = f"NOT SAVED, an earlier one is unchanged: {error.__context__ or error}"
            print0(f"{path.as_posix()} {result}")
        return all_gather(result)[0].startswith("saved")


def move_earlier_run(out_dir: Path):
    """Move the files of an earlier run into the first new folder out_dir/earlier-N."""
    if found := [name for name in RUN_FILES if (out_dir / name).exists()]:
        folders = (out_dir / f"earlier-{number}" for number in itertools.count(1))
        folder = next(folder for folder in folders if not folder.exists())
        folder.mkdir()
        for name in found:
            os.replace(out_dir / name, folder / name)
        print0(f"files of an earlier run are now in {folder.as_posix()}/")


# --- Logs and the picture -------------------------------------------------------------------------


def print0(text: str):
    """Print a line in rank 0. A closed standard output (`| head`) must not end a run."""
    if get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")


class Clock:
    """The seconds since training began, and in `spent` the seconds of evaluation, saving, ..."""

    def __init__(self):
        self.started, self.spent, self.reported = time.perf_counter(), Counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def timed(self, what: str):
        """Count the time of the block as `what`, not as training."""
        started = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - started

    def lap(self) -> float:
        """Return the seconds of training since the last call."""
        before, self.reported = self.reported, self.seconds() - self.spent.total()
        return self.reported - before


class Log:
    """The lines of a run's metrics: printed, kept in `lines`, and by rank 0 in metrics.jsonl."""

    def __init__(self, config: TrainConfig, saved: dict, device: torch.device, dtype):
        self.config, self.device, self.dtype, self.clock = config, device, dtype, Clock()
        self.first_step, self.lines = saved.get("step", 0), saved.get("metrics", [])
        self.seconds_before = self.lines[-1]["seconds"] if self.lines else 0.0
        self.waiting = not self.first_step  # a new run writes no file before its first update
        self.complete = False  # whether metrics.jsonl has all lines
        use_wandb = config.wandb and get_rank() == 0
        self.wandb = start_wandb(config, saved.get("wandb")) if use_wandb else None

    def add(self, step: int, text: str, **values: float):
        """Print a line, and add one with `values` to `lines` and metrics.jsonl."""
        print0(f"step {step:>{len(str(self.config.max_iters))}}  {text}")
        seconds = round(self.seconds_before + self.clock.seconds(), 3)
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.append({"step": step, "seconds": seconds} | values)
        if self.wandb:
            try:
                self.wandb.log(self.lines[-1], step=step)
            except Exception as error:  # a lost connection must not end the run
                print0(f"wandb lacks the line of step {step:,}: {error}")
        self.flush()

    def flush(self):
        """Append the newest line to metrics.jsonl; at first and after an error write all lines."""
        if get_rank() > 0 or self.waiting:
            return
        path = Path(self.config.out_dir, "metrics.jsonl")
        lines = self.lines[-1:] if self.complete else self.lines
        try:
            with open(path, "ab") if self.complete else atomic_write(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self.complete = True
        except OSError as error:
            self.complete = False
            print0(f"{path.as_posix()} lacks the line of step {lines[-1]['step']:,}: {error}")

    def update(self, step: int, skipped: int, loss: float, lr: float, norm: float):
        """Report an update at its interval, or if it was skipped.

        The first update of a new run moves the files of an earlier run away.
        """
        config = self.config
        if skipped:
            print0(f"step {step:,} skipped: loss {loss:.4f}, gradient norm {norm:.2f}")
        elif self.waiting:
            self.waiting = False
            if get_rank() == 0:
                with user_errors():
                    move_earlier_run(Path(config.out_dir))
            self.flush()
        if step % config.log_interval == 0:
            pace = self.clock.lap() / min(config.log_interval, step - self.first_step)
            rate = config.batch_size * config.context_length / pace
            left = timedelta(seconds=round(min((config.max_iters - step) * pace, 1e13)))
            text = f"loss {loss:.4f}  lr {lr:.2e}  gradient norm {norm:.2f}  {rate:,.0f} tokens/s"
            text += f"{gpu_use(self, rate)}  {left} left"
            self.add(step, text, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)


def finish(log: Log, meta: dict, step: int, saved: bool, stopped_by: int) -> int:
    """Draw loss.png, report where the time went and how to go on; return the exit code."""
    config, clock = log.config, log.clock
    with clock.timed("drawing"):
        try:
            if get_rank() == 0 and not log.waiting:
                plot(config, log.lines, meta["train_tokens"])
        except ImportError:
            print0("no loss.png: it needs matplotlib (pip install matplotlib)")
        except Exception as error:  # a failed picture must not fail the run
            print0(f"no loss.png: {error}")
    total = clock.seconds()
    shares = {"training": total - clock.spent.total()} | clock.spent
    listed = ", ".join(f"{what} {seconds / total:.0%}" for what, seconds in shares.items())
    print0(f"{step - log.first_step:,} updates in {timedelta(seconds=round(total))}: {listed}")
    if stopped_by and saved and step > 0:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = f"torchrun --nproc_per_node={ranks}" if dist.is_initialized() else "python"
        out_dir = shlex.quote(config.out_dir)
        print0(f"to go on: {launcher} train.py --init_from resume --out_dir {out_dir}")
    return (128 + stopped_by if stopped_by else 0) if saved else 1


def describe(config: TrainConfig, meta: dict, step: int, device: torch.device, dtype):
    """Print the first lines of a run: data, model, device, and what the run takes."""
    train, val, parameters = meta["train_tokens"], meta["val_tokens"], count_parameters(config)[0]
    tokens, flops = config.batch_size * config.context_length, flops_per_token(config)
    epochs, total = config.max_iters * tokens / train, config.max_iters * tokens * flops
    checkpoint, memory = (size / 1e6 for size in count_bytes(config))
    ranks = f", {get_world_size()} processes ({config.parallel})" if dist.is_initialized() else ""
    done = f"; going on after {step:,}" if step else ""
    shape = f"{config.n_layer} layers, {config.n_embd} channels, {config.n_head} heads"
    print0(f"data    {config.dataset}: {meta['source']}")
    tokenizer = prepare.tokenizer_name(meta["tokenizer"])
    print0(f"        {train:,} tokens to train on, {val:,} to validate with ({tokenizer})")
    print0(f"model   {parameters:,} parameters: {shape}, context {config.context_length:,}")
    print0(f"device  {device}, matrix products in {str(dtype).removeprefix('torch.')}{ranks}")
    print0(f"memory  {memory:,.4g} MB for weights, gradients and optimizer, plus activations")
    print0(f"run     {config.max_iters:,} updates of {tokens:,} tokens, {epochs:.3g} epochs{done}")
    print0(f"        {flops:.3g} FLOP per token, {total:.3g} FLOP in all")
    print0(f"files   {Path(config.out_dir).as_posix()}/, checkpoints of {checkpoint:,.4g} MB")
    if step >= config.max_iters:
        print0(f"all {step:,} updates are done; to train longer, give a larger --max_iters")
    if config.warmup_iters >= config.max_iters:
        print0(f"warning: a warm-up of {config.warmup_iters:,} updates never ends in this run")
    if config.min_lr > config.learning_rate and config.lr_schedule != "constant":
        print0(f"warning: the learning rate rises to min_lr, {config.min_lr:g}")


def gpu_use(log: Log, rate: float) -> str:
    """Return TFLOP/s per GPU and this GPU's peak memory for a log line; empty on other devices."""
    if log.device.type != "cuda":
        return ""
    flops = rate * flops_per_token(log.config) / get_world_size()
    memory = torch.cuda.max_memory_allocated(log.device)
    return f"  {flops / 1e12:,.0f} TFLOP/s  {memory / 1e9:.1f} GB"


def plot(config: TrainConfig, lines: list[dict], train_tokens: int):
    """Draw loss.png: losses over updates and tokens (epochs, if several), and the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    title = f"{config.dataset}, {config.n_layer} layers, {config.n_embd} channels"
    losses.set_title(title, parse_math=False)
    losses.set(ylabel="loss (nats per token)")
    rates.set(xlabel="updates", ylabel="learning rate")
    for name, label, style in (
        ("loss", "each batch", dict(color="0.75")),
        ("train_loss", "training", dict(color="C0", marker=".")),
        ("val_loss", "validation", dict(color="C3", marker=".")),
    ):
        points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
        if points and name != "loss":
            label += f" {points[-1][1]:.2f}"
        losses.plot(*zip(*points or [(0, math.nan)]), label=label, **style)
    losses.legend(frameon=False)
    steps = range(max(1, lines[-1]["step"]) + 1)
    rates.plot(steps, [get_lr(step, config) for step in steps], color="C2")
    rates.set_ylim(bottom=0)
    per_update, unit = config.batch_size * config.context_length, "tokens"
    if per_update * steps[-1] > train_tokens:
        per_update, unit = per_update / train_tokens, "epochs"
    scale = (lambda x: x * per_update, lambda x: x / per_update)
    losses.secondary_xaxis("top", functions=scale).set_xlabel(unit)
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings(), atomic_write(Path(config.out_dir, "loss.png")) as file:
        warnings.simplefilter("ignore")  # about characters that the font lacks
        figure.savefig(file, dpi=110, format="png")


def start_wandb(config: TrainConfig, id: str | None):
    """Start a Weights & Biases run, or go on with run `id`. WANDB_MODE=offline needs no account."""
    try:
        import wandb

        options = dict(project=os.environ.get("WANDB_PROJECT", "gpt"), id=id, resume="allow")
        return wandb.init(config=asdict(config), dir=config.out_dir, **options)
    except Exception as error:  # not installed, no key, no network, ...
        advice = "WANDB_MODE=offline needs no account, and all need pip install wandb"
        raise UserError(f"--wandb: {str(error) or repr(error)}; {advice}") from error


# --- Devices and processes ------------------------------------------------------------------------

RENDEZVOUS = timedelta(minutes=5)  # how long ranks wait for one another at the start


def get_precision(config: TrainConfig):
    """Return the device, the dtype of matrix products, their autocast, and a gradient scaler.

    On a CPU this also keeps freed memory in the process.
    """
    device, dtype = choose_device(config.device, config.dtype)
    if device.type == "cpu":
        reuse_memory()
    mixed = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=mixed)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return device, dtype, autocast, scaler


def reuse_memory():
    """Keep freed memory in the process for the next update; do not return it to the system.

    The system zeroes memory before it hands it out again, which took a sixth of an update
    on two cores. The names are from glibc's mallopt(3); other C libraries have no such function.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # large tensors are part of the heap, as small ones are
        mallopt(M_TRIM_THRESHOLD, -1)  # the end of the heap is never returned


def create_model(config: TrainConfig, device: torch.device) -> GPT:
    """Return a new model. Raises UserError, before it is built, if it cannot fit in memory."""
    parameters, needed = count_parameters(config)[0], count_bytes(config)[1]
    if needed > (memory := memory_per_rank(device)):
        takes = f"a model of {parameters:,} parameters takes {needed / 1e9:,.0f} GB to train"
        raise UserError(f"{takes}; each process has {memory / 1e9:,.0f} GB")
    torch.manual_seed(config.seed)
    return GPT(GPTConfig(**config.model_args())).train()


def count_bytes(config: TrainConfig) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and of weights, gradients and optimizer in each rank."""
    weights = 4 * count_parameters(config)[0]
    moments = 2 * weights
    if config.optimizer == "muon":  # one moment for the blocks' matrices, AdamW has two
        moments -= 4 * 12 * config.n_layer * config.n_embd**2
    shards = get_world_size() if config.parallel == "fsdp" else 1
    return weights + moments, (2 * weights + moments) // shards


def memory_per_rank(device: torch.device) -> float:
    """Return the bytes of memory of the GPU, or this rank's share of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [math.inf]
    with contextlib.suppress(AttributeError):  # on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file; no limit ("max")
            limits.append(int(Path(path).read_text()))
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def compile_model(model, split, config: TrainConfig, device: torch.device, autocast):
    """Return the model compiled for updates, or `model` itself if it does not compile.

    Each rank tries the forward and backward pass of real micro batches without averaging gradients;
    all ranks use the compiled model, or none does.
    """
    if config.compile is False or (config.compile is None and device.type != "cuda"):
        return model
    compiled, reason, started = torch.compile(model, dynamic=False), "", time.perf_counter()
    x, y = get_batch(split, 0, config, device, get_rank(), get_world_size())
    micro_batches = split_batch(x, y, config)
    set_grad_sync(model, False)
    try:
        for inputs, targets in (micro_batches[0], micro_batches[-1]):  # the last may be smaller
            with autocast:
                loss = compiled(inputs, targets)
            (0 * loss).backward()  # by 0, as FSDP would add these gradients to the first update's
    except Exception as error:  # compilers raise many exception types
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if config.parallel == "fsdp":  # the other ranks wait for shards of this one
            raise UserError(f"cannot compile: {reason}; use --compile false") from error
    model.zero_grad()
    if any(reasons := all_gather(reason)):
        print0(f"not compiled, training is slower: {next(filter(None, reasons))}")
        return model
    print0(f"compiled in {time.perf_counter() - started:.0f} s")
    return compiled


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Return the sum, or another reduction, of `x` over all ranks; in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def all_gather(x) -> list:
    """Return the small object `x` of every rank, in the order of ranks."""
    found = [x] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(found, x)
    return found


def any_rank(signals: list[int]) -> int:
    """Return a signal that some rank has received, the same in all ranks; 0 if there is none."""
    return int(all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX))


def catch_signals() -> list[int]:
    """Return a list that receives SIGINT, SIGTERM and SIGHUP; a second signal ends the program.

    Under torchrun it does not: each rank receives a Ctrl-C twice, from the terminal and torchrun.
    """
    received, signals = [], [signal.SIGINT, signal.SIGTERM]
    if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)  # a closed terminal; nohup ignores it

    def handle(number, frame):
        received.append(number)
        if dist.is_initialized():
            return
        with contextlib.suppress(OSError):  # print is not allowed in a signal handler
            os.write(1, b"stopping after this update or batch; a second signal stops at once\n")
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, handle)
    return received


@contextlib.contextmanager
def process_group():
    """Join the process group if torchrun started this process; yield the id of the run.

    The id is random and made once per launch: torchrun's store keeps it when ranks are restarted.
    """
    if "RANK" not in os.environ:
        yield secrets.token_hex(8)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=RENDEZVOUS))
        run_id = store.compare_set("run_id", "", secrets.token_hex(8)).decode()
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # several machines: see config/gpt2.py
            # After a restart the store still has the old addresses (pytorch/pytorch#135712).
            store = dist.PrefixStore(attempt, store)
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # a new store per restart
            run_id = os.environ.get("TORCHELASTIC_RUN_ID", run_id)
        store.set(f"here {rank}", "")
        store.wait([f"here {each}" for each in range(world_size)], RENDEZVOUS)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        where = "process {} of {} at {}:{}".format(*(os.environ.get(name, "?") for name in names))
        advice = "check that all use this address and that no firewall blocks it"
        raise UserError(f"{where} cannot reach the others: {advice} ({error})") from error
    try:
        yield run_id
    except (UserError, RuntimeError) as error:
        if not isinstance(error, UserError):
            if not re.search("gloo|nccl", str(error), re.IGNORECASE):
                raise
            error = UserError(f"lost the other processes: {str(error).splitlines()[0]}")
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if store.compare_set(f"failed {attempt}", "", str(rank)).decode() != str(rank):
                sys.exit(2)  # another rank has failed before and says why
        raise error from error.__cause__
    all_gather(None)  # torchrun ends all ranks at the first one's exit code
    dist.destroy_process_group()


@contextlib.contextmanager
def open_out_dir(folder: str):
    """Make the folder and hold its lock. Raises UserError if no file can be written there."""
    with contextlib.ExitStack() as stack:
        with user_errors():
            stack.enter_context(lock(folder))
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # fails now, not after hours
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # if nothing was written


def leave(exit_code: int):
    """End the program; under torchrun, skip the interpreter's shutdown after the exit functions.

    gloo's threads may abort during it: https://github.com/pytorch/pytorch/pull/179291
    """
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        os._exit(exit_code)
    sys.exit(exit_code)


def check_ranks(config: TrainConfig, meta: dict, saved: dict, device: torch.device):
    """Raise UserError if ranks differ in settings, data or checkpoint, or cannot share the work."""
    seen = asdict(config) | {f"data/{config.dataset}": meta["fingerprint"]}
    seen |= {"the checkpoint's step": saved.get("step")}
    first, *others = all_gather(seen)
    for rank, other in enumerate(others, 1):
        for name in first:
            if first[name] != other.get(name):
                values = f"{first[name]!r} in process 0, {other.get(name)!r} in {rank}"
                raise UserError(f"processes differ in {name}: {values}")
    ranks, B = get_world_size(), config.batch_size
    if B % ranks:
        fits = max(1, B // ranks) * ranks
        raise UserError(f"{ranks} processes cannot share batch_size {B}: take --batch_size {fits}")
    if config.parallel == "fsdp" and ranks == 1:
        raise UserError("--parallel fsdp is for several processes: start them with torchrun")
    own = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device
    if device.type != "cpu" and len(set(all_gather(str(own)))) < ranks:
        raise UserError(f"{ranks} processes need {ranks} devices; {device} is used by several")


def distribute(gpt: GPT, config: TrainConfig, device: torch.device, dtype) -> torch.nn.Module:
    """Move `gpt` to the device; return a module whose gradients are averaged over all ranks."""
    gpt.activation_checkpointing = config.activation_checkpointing
    if not dist.is_initialized():
        return gpt.to(device)
    if config.parallel == "fsdp":
        # Imported here, as a single process would wait a second for them.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # FSDP warns that a module's output is a view; nothing here modifies it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (get_world_size(),))
        # Matrices are gathered in the dtype of the products; LayerNorms, embeddings and, between
        # blocks, activations stay in float32, as under autocast.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in gpt.transformer.h:
            fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
        return fully_shard(gpt, mesh=mesh)
    model = DistributedDataParallel(gpt.to(device), gradient_as_bucket_view=True)
    # DDP rebuilds its buckets after the first backward pass, which changes the summation order; one
    # dummy pass makes the first update of a resumed run match.
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(idx, idx).backward()
    model.zero_grad()
    return model


def is_sharded(gpt: GPT) -> bool:
    """Return whether FSDP has left this rank a shard of each parameter."""
    return hasattr(gpt, "reshard")


def set_grad_sync(model: torch.nn.Module, sync: bool):
    """Choose whether the next backward pass averages gradients over ranks or only adds to them."""
    if is_sharded(model):
        model.set_requires_gradient_sync(sync)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync  # as its no_sync() does


if __name__ == "__main__":
    run(main)
