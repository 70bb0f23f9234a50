"""Train a GPT.

    python train.py config/verdict.py                          the book's run
    python train.py config/tiny.py --n_layer 2 --seed=1        a config file, then changes to it
    python train.py config/tiny.py --init_from resume          go on where a run stopped

Reads data/<dataset>/, which prepare.py makes. Writes out/model.ckpt, the weights and all that
resuming needs, out/metrics.jsonl, a line for every report, and out/loss.png, a picture of them.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

# Large tensors in huge pages: PyTorch otherwise pages them in by 4 KiB at every step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch

import prepare
from config import UserError, parse, run, user_errors
from model import GPT, GPTConfig, choose_device, load_model


@dataclass
class TrainConfig(GPTConfig):
    """Every setting of a run: those of the model, and these."""

    vocab_size: int | None = None  # number of different tokens; none: the dataset's
    # Data
    dataset: str = "verdict"  # folder under data/ that prepare.py made
    batch_size: int = 8  # sequences per update
    micro_batch_size: int | None = None  # sequences per forward pass; none: batch_size
    shift_windows: bool = True  # cut the text elsewhere in every epoch (the book: no)
    seed: int = 1337  # weights, order of the data and dropout follow from it
    # Updates
    max_iters: int = 1000  # updates in all
    learning_rate: float = 6e-4  # the highest learning rate
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_iters: int = 100  # updates over which the learning rate rises in a line
    initial_lr: float = 0.0  # learning rate of the first update
    min_lr: float = 6e-5  # learning rate at the end of the cosine
    weight_decay: float = 0.1  # on matrices alone
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # and of its square
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

    def __post_init__(self):
        GPTConfig(**self.model_args() | ({} if self.vocab_size is not None else {"vocab_size": 1}))
        if self.micro_batch_size is None:
            self.micro_batch_size = self.batch_size
        at_least_1 = "batch_size micro_batch_size max_iters log_interval eval_interval eval_iters "
        at_least_1 += "checkpoint_interval max_skipped"
        at_least_0 = "seed warmup_iters learning_rate initial_lr min_lr weight_decay grad_clip"
        for least, names in ((1, at_least_1), (0, at_least_0)):
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"{name} is {getattr(self, name)}; the least is {least}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")

    def model_args(self) -> dict:
        """The fields of GPTConfig among the settings."""
        return {field.name: getattr(self, field.name) for field in fields(GPTConfig)}


def open_dataset(config: TrainConfig) -> tuple[dict[str, np.ndarray], dict]:
    """The dataset of a run, if it is one that its model can be trained on."""
    splits, meta = prepare.load_dataset(config.dataset)
    vocab_size = meta["vocab_size"] if config.vocab_size is None else config.vocab_size
    for split, ids in splits.items():
        name, tokens = f"data/{config.dataset}/{split}.bin", len(ids)
        if tokens <= config.context_length:
            raise UserError(
                f"{name} has {tokens:,} tokens, too few for context_length "
                f"{config.context_length:,}: take --context_length {tokens - 1} or less, or "
                "prepare more text"
            )
        largest = max(int(block.max()) for block in prepare.sample_blocks(ids))
        if largest >= vocab_size:
            raise UserError(
                f"{name} holds token id {largest:,}, outside the vocabulary of {vocab_size:,}"
            )
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (batch_size, context_length) int64, of update number `step`.

    A function of its arguments alone. The stream `split` (L,) is closed to a ring and cut into
    windows from an offset that is new in every epoch (0 without `shift_windows`); an epoch visits
    each window once, in shuffled order.
    """
    windows = (len(split) - 1) // context_length  # in an epoch
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size), windows)
    starts = np.empty(batch_size, dtype=np.int64)
    for e in np.unique(epoch):
        rng = np.random.default_rng([seed, e])
        offset = rng.integers(len(split)) if shift_windows else 0
        starts[epoch == e] = offset + context_length * permute(place[epoch == e], windows, rng)
    positions = starts[:, None] + np.arange(context_length + 1)  # (B, T + 1)
    tokens = torch.from_numpy(split[positions % len(split)].astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


def get_lr(step: int, config: TrainConfig) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then cosine (book, appendix D)."""
    if step < config.warmup_iters:
        rise = (config.learning_rate - config.initial_lr) / config.warmup_iters
        return config.initial_lr + step * rise
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    share = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.min_lr + (config.learning_rate - config.min_lr) * share


@torch.no_grad()
def estimate_loss(model, splits, config, device, autocast) -> dict[str, float]:
    """Mean loss of each split over `eval_iters` batches, the same at every call, without dropout.

    The windows lie evenly over the split; one that has no more is seen whole, each token once.
    """
    T, size = config.context_length, config.micro_batch_size
    losses = {}
    model.eval()
    for name, split in splits.items():
        windows = -(-(len(split) - 1) // T)  # the last one may be short
        count = min(windows, config.eval_iters * config.batch_size)
        starts = np.arange(count) * windows // count * T
        total = tokens = 0
        for first in range(0, count, size):
            positions = starts[first : first + size, None] + np.arange(T + 1)  # (B, T + 1)
            batch = torch.from_numpy(split[positions % len(split)].astype(np.int64)).to(device)
            ended = torch.from_numpy(positions[:, 1:] >= len(split)).to(device)
            x, y = (batch[:, :-1], batch[:, 1:].masked_fill(ended, -100))  # -100: does not count
            with autocast:
                loss = model(x, y)
            total += loss.item() * int((~ended).sum())
            tokens += int((~ended).sum())
        losses[name] = total / tokens
    model.train()
    return losses


def save_checkpoint(path: Path, contents: dict) -> bool:
    """Write `path` whole or not at all, and say so; a full disk must not end the training."""
    started = time.perf_counter()
    try:
        with prepare.replacing(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch turns some of the first into the second
        reason = str(error.__context__ or error).splitlines()[0]
        print(f"{path.as_posix()} NOT SAVED, what was there is as it was: {reason}")
        return False
    print(
        f"{path.as_posix()} saved: step {contents['step']:,}, {path.stat().st_size / 1e6:,.1f} MB "
        f"in {time.perf_counter() - started:.1f} s"
    )
    return True


def plot(out_dir: Path, config: TrainConfig):
    """Draw out/loss.png from out/metrics.jsonl: losses over updates and tokens, learning rate."""
    try:
        import matplotlib
    except ImportError:
        print("no loss.png: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in open(out_dir / "metrics.jsonl", encoding="utf-8")]
    logs = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "val_loss" in line]
    grey = dict(color="0.75", linewidth=1)
    figure, (losses, rates) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(4, 1), layout="constrained"
    )
    losses.plot([x["step"] for x in logs], [x["loss"] for x in logs], label="batch", **grey)
    for name, label, color in (("train_loss", "training", "C0"), ("val_loss", "validation", "C3")):
        steps, values = [x["step"] for x in evals], [x[name] for x in evals]
        losses.plot(steps, values, ".-", color=color, label=label)
        losses.annotate(f" {values[-1]:.2f}", (steps[-1], values[-1]), color=color, va="center")
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
    return f"{minutes // 60} h {minutes % 60:02d} min"


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
    else:
        path = f"{config.out_dir}/model.ckpt"
        with user_errors():
            gpt = GPT.from_checkpoint(path, dropout=config.dropout)
        saved = gpt.checkpoint
        if not isinstance(saved.get("optimizer"), dict) or "dataset" not in saved:
            raise UserError(f"{path} has no optimizer state to resume with: use --init_from {path}")
        old, new = saved["config"], asdict(config)
        changed = {x: (old[x], new[x]) for x in new if x in old and old[x] != new[x]}
        shape = [x for x in changed if x in config.model_args() and x != "dropout"]
        shape = [x for x in shape if changed[x] != (gpt.config.vocab_size, None)]
        if shape:
            listed = ", ".join(f"{x} ({changed[x][0]} there, {changed[x][1]} here)" for x in shape)
            raise UserError(f"{path} is of another model: {listed}")
        for x in changed.keys() - {"init_from", "vocab_size"}:
            print(f"changed since the checkpoint: {x} was {changed[x][0]}, is {changed[x][1]}")
    for name, value in asdict(gpt.config).items():
        setattr(config, name, value)
    return gpt


def check_memory(config: TrainConfig, device: torch.device):
    """Refuse a model that cannot fit: weight, gradient and two moments are 16 bytes a parameter."""
    C = config.n_embd
    parameters = C * (config.vocab_size + config.context_length + 12 * config.n_layer * C)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else 1e12
        )
    if 16 * parameters > memory:
        raise UserError(
            f"a model of {parameters:,} parameters takes {16 * parameters / 1e9:,.0f} GB to train; "
            f"here are {memory / 1e9:,.0f} GB"
        )


def keep_old(path: Path):
    """What an earlier run left at `path` stays, as `path`.bak."""
    if path.exists():
        os.replace(path, f"{path}.bak")
        print(f"{path.as_posix()} of an earlier run is now {path.name}.bak")


def open_metrics(path: Path, step: int):
    """metrics.jsonl to append to; a run that resumes after `step` updates drops later lines."""
    if step == 0:
        keep_old(path)
    elif path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with prepare.replacing(path) as file:
            for line in lines:
                if line.endswith("}\n") and json.loads(line)["step"] <= step:  # not torn, not later
                    file.write(line.encode())
    return open(path, "a", encoding="utf-8", buffering=1)  # a line is written as it comes


class Stop:
    """Waits for Ctrl-C or SIGTERM: the first is kept in `signal`, a second ends the program."""

    def __enter__(self):
        self.signal = None
        self.before = {
            number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def handle(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(1, b"stopping after this update; a second time stops at once\n")  # print may not

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def update(gpt, optimizer, scaler, autocast, batch, config, step):
    """One step of gradient descent on `batch` (inputs, targets); its loss and gradient norm.

    The batch goes through in micro batches, whose gradients add up to those of the whole. Where
    loss or norm is not finite, weights and optimizer stay as they are.
    """
    device = gpt.lm_head.weight.device
    batch_loss = 0.0
    micro_batches = zip(*(tensor.split(config.micro_batch_size) for tensor in batch))
    for micro_step, (x, y) in enumerate(micro_batches):
        set_rng(config.seed, step, micro_step)
        with autocast:
            loss = gpt(x.to(device), y.to(device))  # forward pass and loss
        loss = loss * (len(x) / config.batch_size)
        scaler.scale(loss).backward()  # backward pass
        batch_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.grad_clip or math.inf)
    # Fused optimizers do nothing where this is 1, and nobody has to wait for the device to know.
    optimizer.found_inf = (~(batch_loss + norm).isfinite()).float()
    scaler.step(optimizer)  # update
    scaler.update()
    optimizer.zero_grad()
    return batch_loss, norm


def main(argv: list[str]):
    config = parse(TrainConfig, argv)
    gpt = first_model(config)
    splits, meta = open_dataset(config)
    dataset = prepare.fingerprint(splits["train"])
    with user_errors():
        device, dtype = choose_device(config.device, config.dtype)
    tokenizer = prepare.get_tokenizer(meta["tokenizer"]) if config.sample_prompt else None
    if gpt is None:
        config.vocab_size = meta["vocab_size"] if config.vocab_size is None else config.vocab_size
        check_memory(config, device)
        torch.manual_seed(config.seed)
        gpt = GPT(GPTConfig(**config.model_args()))
    gpt.to(device).train()
    betas = (config.beta1, config.beta2)
    groups = gpt.optimizer_groups(config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    mixed = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best_val_loss, saved = 0, math.inf, gpt.checkpoint
    if config.init_from == "resume":
        if saved["dataset"] != dataset:
            raise UserError(
                f"data/{config.dataset} is not what {config.out_dir}/model.ckpt was trained on"
            )
        with user_errors():
            optimizer.load_state_dict(saved["optimizer"])
        for group, new in zip(optimizer.param_groups, groups):  # settings are those of this run
            group.update(betas=betas, weight_decay=new["weight_decay"])
        scaler.load_state_dict(saved["scaler"])
        step, best_val_loss = saved["step"], saved["best_val_loss"]
    gpt.checkpoint = saved = None

    tokens_per_update = config.batch_size * config.context_length
    epochs = config.max_iters * tokens_per_update / len(splits["train"])
    print(
        f"data    {config.dataset}: {meta['source']}\n"
        f"        {len(splits['train']):,} tokens to train on, {len(splits['val']):,} to validate "
        f"with ({meta['tokenizer']})\n"
        f"model   {gpt.num_parameters():,} parameters: {config.n_layer} layers, "
        f"{config.n_embd} channels, {config.n_head} heads, context {config.context_length:,}\n"
        f"device  {device}, matrix products in {str(dtype).removeprefix('torch.')}\n"
        f"run     {config.max_iters:,} updates of {tokens_per_update:,} tokens, {epochs:.3g} epochs"
    )
    out_dir = Path(config.out_dir)
    wandb = start_wandb(config) if config.wandb else None
    with user_errors():
        out_dir.mkdir(parents=True, exist_ok=True)
        metrics = open_metrics(out_dir / "metrics.jsonl", step)
    started = time.perf_counter()
    first_step, width = step, len(str(config.max_iters))
    if step >= config.max_iters:
        print(f"all {step:,} updates are done; a larger --max_iters goes on from here")
    first_save = config.init_from != "resume"
    skipped = torch.zeros(2, device=device)  # updates since the last log line, and in a row

    def record(**values):
        values = {x: value if math.isfinite(value) else None for x, value in values.items()}
        line = {"step": step, "seconds": round(time.perf_counter() - started, 3)} | values
        metrics.write(json.dumps(line) + "\n")
        if wandb is not None:
            wandb.log(values, step=step)

    def evaluate():
        nonlocal best_val_loss
        losses = estimate_loss(gpt, splits, config, device, autocast)
        train_loss, val_loss = losses["train"], losses["val"]
        perplexity = math.exp(min(val_loss, 700))
        record(train_loss=train_loss, val_loss=val_loss, val_perplexity=perplexity)
        print(
            f"step {step:>{width}}  training loss {train_loss:.4f}  validation loss "
            f"{val_loss:.4f}  perplexity {perplexity:,.2f}"
        )
        if tokenizer:
            prompt = tokenizer.encode(config.sample_prompt, disallowed_special=())
            idx = gpt.generate(torch.tensor([prompt], device=device), 40, temperature=0)
            print("      " + " ".join(prepare.decode(tokenizer, idx[0].tolist()).split()))
        if val_loss < best_val_loss:
            best_val_loss = val_loss
            if config.save_best and step > 0:
                save_checkpoint(out_dir / "best.ckpt", contents())

    def contents() -> dict:
        return {
            "model": gpt.state_dict(),
            "model_args": asdict(gpt.config),
            "config": asdict(config),
            "tokenizer": meta["tokenizer"],
            "step": step,
            "best_val_loss": best_val_loss,
        }

    def save() -> bool:
        nonlocal first_save
        if first_save:
            keep_old(out_dir / "model.ckpt")
            first_save = False
        os.fsync(metrics.fileno())  # a checkpoint never knows more than metrics.jsonl
        more = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return save_checkpoint(out_dir / "model.ckpt", contents() | more | {"dataset": dataset})

    with Stop() as stop:
        if step == 0:
            evaluate()
        logged_step, logged_at = step, time.perf_counter()
        while step < config.max_iters and not stop.signal:
            lr = get_lr(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = get_batch(
                splits["train"],
                step,
                batch_size=config.batch_size,
                context_length=config.context_length,
                seed=config.seed,
                shift_windows=config.shift_windows,
            )
            loss, norm = update(gpt, optimizer, scaler, autocast, batch, config, step)
            step += 1
            skipped = (skipped + optimizer.found_inf) * torch.stack(
                (torch.ones_like(norm), optimizer.found_inf)
            )

            if step % config.log_interval == 0:
                loss, norm = float(loss), float(norm)  # waits for the device
                now = time.perf_counter()
                rate = (step - logged_step) * tokens_per_update / (now - logged_at)
                left = (config.max_iters - step) * tokens_per_update / rate
                logged_step, logged_at = step, now
                record(loss=loss, lr=lr, grad_norm=norm, tokens_per_second=rate)
                print(
                    f"step {step:>{width}}  loss {loss:.4f}  lr {lr:.2e}  gradient norm {norm:.2f}"
                    f"  {rate:,.0f} tokens/s  {duration(left)} left"
                )
                since, in_a_row = skipped.tolist()
                if since:
                    print(f"{since:.0f} updates skipped: their loss or gradient is not finite")
                if in_a_row >= config.max_skipped:
                    raise SystemExit(
                        f"stopped: {in_a_row:.0f} updates in a row had no finite loss or gradient; "
                        f"{out_dir}/model.ckpt, if there is one, is sound; lower --learning_rate"
                    )
                skipped[0] = 0
            paused = time.perf_counter()
            if step % config.eval_interval == 0 or step == config.max_iters:
                evaluate()
            if step % config.checkpoint_interval == 0 and step < config.max_iters:
                save()
            logged_at += time.perf_counter() - paused  # tokens per second are those of training

        saved = step == first_step > 0 or save()  # nothing new to save
        plot(out_dir, config)
    metrics.close()
    print(f"{step:,} updates in {duration(time.perf_counter() - started)}")
    if stop.signal:
        resume = "" if config.init_from == "resume" else " --init_from resume"
        print(f"to go on: python train.py {shlex.join(argv)}{resume}")
        sys.exit(128 + stop.signal)
    if not saved:
        sys.exit(1)


def start_wandb(config: TrainConfig):
    """A Weights & Biases run; WANDB_MODE=offline keeps it on this machine."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb (pip install wandb)") from None
    return wandb.init(project="gpt", config=asdict(config), dir=config.out_dir)


if __name__ == "__main__":
    run(main)
