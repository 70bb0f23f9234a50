"""Measure speed and memory, beside Hugging Face's GPT-2 and beside the machine's own limit.

    python tests/benchmark.py                      all but verdict and gpu (twenty minutes on a CPU)
    python tests/benchmark.py verdict              the book's run, also with the book's own package
    python tests/benchmark.py training data        the training step; get_batch
    python tests/benchmark.py corpus --rounds 1 --megabytes 2000    prepare.py beside tiktoken
    python tests/benchmark.py gpu --json gpu.jsonl                  a GPU, in four minutes
    python tests/benchmark.py gpu --only training optimizers --budget 600
    python tests/benchmark.py gpu --device cpu --tiny               the same code, tiny models

The sides of a comparison take turns, after a round that does not count; figures are medians of
--rounds. Hugging Face's sides run in processes of their own with PyTorch's defaults, as this
project's memory settings would make them faster on a CPU. Without the package transformers its
rows are left out; rows of gpu name the package they lack (tiktoken, for all that uses train.py).
--json PATH appends each row to a file, one JSON object per line. tests/README.md holds results.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402  (before torch: it sets environment variables)
from model import GPT, GPTConfig  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

try:
    import prepare
    import train
except ImportError as error:  # tiktoken
    missing, train = error, None
try:
    import transformers
except ImportError:
    transformers = None


def take_turns(sides: dict, rounds: int) -> dict[str, float]:
    """Return the median seconds of each function in `sides`, called in turn."""
    times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """Return the largest memory of this process so far in GB, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine(device: torch.device) -> str:
    """Return the processor and the versions with which figures are taken."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    name = found[1] if found else "an unknown processor"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    libraries = f"torch {torch.__version__}"
    if transformers is not None:
        libraries += f", transformers {transformers.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, Python {sys.version.split()[0]}, {libraries}"


def report(path: str | None, part: str, row: str, **values):
    """Print a row; append it to the JSON lines file `path`, if there is one. NaNs are left out."""
    found = {name: x if isinstance(x, str) else float(f"{x:.4g}") for name, x in values.items()}
    found = {name: x for name, x in found.items() if x == x}
    print(f"{part:<12} {row:<58}", *[f"{name} {x}" for name, x in found.items()], flush=True)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"part": part, "row": row} | found) + "\n")


# --- A training step ------------------------------------------------------------------------------


class Run:
    """A model, its optimizers and its data, made as train.py makes them."""

    def __init__(self, config, split=None):
        self.config, self.step = config, 0
        self.device, dtype, self.autocast, self.scaler = train.get_precision(config)
        torch.manual_seed(config.seed)
        with self.device:  # initial weights are drawn there
            self.gpt = GPT(GPTConfig(**config.model_args())).train()
        self.model = train.distribute(self.gpt, config, self.device, dtype)
        self.optimizers = model.make_optimizers(self.gpt, config, dtype)
        random_tokens = np.random.default_rng(0).integers(config.vocab_size, size=2**20)
        self.split = random_tokens.astype(np.uint16) if split is None else split


def training_step(run: Run, stamp=lambda phase: None, host_check: bool = True):
    """Make one update, like one pass of the loop in `train.train`; dropout is not seeded.

    `stamp` is called after each phase. Without `host_check` the host does not wait for the loss to
    see whether it is finite, and begins the next update while the GPU computes this one.
    """
    config, optimizers, scaler = run.config, run.optimizers, run.scaler
    train.set_lr(optimizers, run.step, config)
    x, y = train.get_batch(run.split, run.step, config, run.device)
    loss = 0.0
    stamp("get_batch")
    for inputs, targets in train.split_batch(x, y, config):
        with run.autocast:
            micro_loss = run.model(inputs, targets)
        micro_loss = micro_loss * (len(inputs) / len(x))
        stamp("forward pass and loss")
        scaler.scale(micro_loss).backward()
        stamp("backward pass")
        loss += micro_loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    total_norm = model.gradient_norm(run.gpt)
    loss, norm = train.to_numbers(loss, total_norm) if host_check else (0.0, math.inf)
    if 0 < config.grad_clip < norm:
        torch.nn.utils.clip_grads_with_norm_(run.gpt.parameters(), config.grad_clip, total_norm)
    stamp("clipping")
    for optimizer in optimizers:
        if not host_check or math.isfinite(loss + norm):
            optimizer.step()
        optimizer.zero_grad()
    scaler.update()
    stamp("optimizer")
    run.step += 1


def phases(run: Run, rounds: int) -> dict[str, float]:
    """Return the median seconds of each phase of an update, waiting for the device after each."""
    stamps = {}

    def stamp(phase: str):
        synchronize()
        stamps.setdefault(phase, []).append(time.perf_counter())

    for _ in range(rounds + 1):
        stamp("start")
        training_step(run, stamp)
    found = {}
    for before, (phase, times) in zip(stamps.values(), list(stamps.items())[1:]):
        found[phase] = statistics.median(b - a for a, b in zip(before[1:], times[1:]))
    return found


def train_config(**settings):
    """Return the settings of a run; by default GPT-2 124M with a constant learning rate."""
    if train is None:
        raise RuntimeError(f"rows that go through train.py need tiktoken: {missing}")
    fixed = dict(vocab_size=50257, lr_schedule="constant", warmup_iters=0)
    return train.TrainConfig(**fixed | settings)


def matrix_products(config, batch_size: int, device, dtype, attention: bool = True):
    """Return a function that computes only the matrix products of an update.

    Each product of the forward pass takes two in the backward pass. `attention` includes those of
    attention, without the causal mask.
    """
    B, T, C, H = batch_size, config.context_length, config.n_embd, config.n_head
    matrix = partial(torch.randn, device=device, dtype=dtype)
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    shapes = [(shape, config.n_layer) for shape in shapes] + [((C, config.vocab_size), 1)]
    linears = [(matrix(B * T, i), matrix(o, i), matrix(B * T, o), n) for (i, o), n in shapes]
    q = matrix(B * H, T, C // H)
    weights = matrix(B * H, T, T) if attention else None

    def run():
        for x, weight, gradient, count in linears:
            for _ in range(count):
                x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in range(3 * config.n_layer if attention else 0):
            q @ q.mT, weights @ q

    return run


# --- Hugging Face ---------------------------------------------------------------------------------


@contextlib.contextmanager
def apart(make, *args):
    """Yield a function that calls make(*args)() in a process with PyTorch's default settings."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # this process has read it already
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(start, (make, *args))
        yield lambda: pool.apply(call)


def start(make, *args):
    globals()["side"] = make(*args)


def call():
    side()  # noqa: F821  (of this process, made by `start`)
    synchronize()


def hugging_face_generates(device, dtype, new: int, rows: int = 1, **shape):
    """Return a function that generates `new` tokens after 16 with transformers' GPT-2."""
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).to(device, dtype).eval()
    prompt = torch.randint(gpt.config.vocab_size, (rows, 16), device=device)
    gpt.generation_config.eos_token_id = None  # never ends early
    options = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0, do_sample=False)
    return lambda: gpt.generate(prompt, max_new_tokens=new, **options)


def hugging_face_trains(device, B: int, T: int, autocast: bool, compile=None, **shape):
    """Return a function that makes an update of transformers' GPT-2 on (B, T) tokens."""
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).to(device).train()
    idx = torch.randint(gpt.config.vocab_size, (B, T), device=device)
    # On a CPU with PyTorch's defaults; on a GPU as their Trainer does.
    optimizer = torch.optim.AdamW(gpt.parameters(), 6e-4, weight_decay=0.1, fused=idx.is_cuda)
    theirs = compile(gpt) if compile else gpt

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = theirs(input_ids=idx, labels=idx, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- Parts for a CPU ------------------------------------------------------------------------------


def generation(rounds: int) -> dict[str, float]:
    """124M parameters, a prompt of 16 tokens, 200 new ones, greedy."""
    device, dtype = model.choose_device()
    best = str(dtype).removeprefix("torch.")

    def write(gpt, rows=1):
        idx = torch.randint(50257, (1, 16), device=device).expand(rows, -1)
        return torch.inference_mode()(lambda: gpt.generate(idx, 200, temperature=0))

    plain = GPT(GPTConfig()).to(device).eval()
    float32, packed = model.prepack(plain), model.prepack(plain, dtype)  # as sample.py does
    sides = {"float32": write(float32), best: write(packed), "10 samples": write(packed, 10)}
    sides[f"GPT.generate in {best}"] = write(plain.to(dtype))
    with contextlib.ExitStack() as stack:
        for name in ("float32", "bfloat16") if transformers is not None else ():
            theirs = apart(hugging_face_generates, device, getattr(torch, name), 200)
            sides[f"Hugging Face, {name}"] = stack.enter_context(theirs)
        times = take_turns(sides, rounds)
    found = {f"{name}: tokens/s": 200 / seconds for name, seconds in times.items()}
    found["10 samples: tokens/s"] *= 10
    for name in {"float32": 0, best: 0}:
        size = getattr(torch, name).itemsize * model.count_parameters(GPTConfig())[1]
        numbers = torch.ones(size // 4, device=device)
        limit = 1 / take_turns({"read": numbers.sum}, 7)["read"]
        found[f"reading the {name} weights once per token: tokens/s"] = limit
        found[f"share of that, {name}"] = found[f"{name}: tokens/s"] / limit
    for length in (100, 1000):
        stream = packed.stream(torch.randint(50257, (1, length), device=device), 21, temperature=0)
        next(stream)  # the prompt
        seconds = take_turns({"token": partial(next, stream)}, 19)["token"]
        found[f"after {length:,} tokens: ms per token"] = 1000 * seconds
    return found


def training(rounds: int) -> dict[str, float]:
    """A step of GPT-2 124M with dropout 0.1 and 2 x 256 tokens."""
    device, dtype = model.choose_device()
    run = Run(train_config(batch_size=2, context_length=256, dropout=0.1))
    sides = {"this project": partial(training_step, run)}
    take_turns(sides, 2)
    found = {"peak memory: GB": peak_memory()}
    sides["matrix products alone"] = matrix_products(run.config, 2, device, dtype)
    # Processors without instructions for bfloat16 need half a minute for a step in it.
    dtypes = {"float32": False} | ({"bfloat16": True} if dtype == torch.bfloat16 else {})
    with contextlib.ExitStack() as stack:
        for name, autocast in dtypes.items() if transformers is not None else ():
            theirs = apart(hugging_face_trains, device, 2, 256, autocast)
            sides[f"Hugging Face, {name}"] = stack.enter_context(theirs)
        times = take_turns(sides, rounds)
    found |= {f"{name}: seconds": seconds for name, seconds in times.items()}
    mine = times.pop("this project")
    found |= {f"{name} / this project": seconds / mine for name, seconds in times.items()}
    return found | {f"{name}: seconds": seconds for name, seconds in phases(run, rounds).items()}


def data(rounds: int) -> dict[str, float]:
    """get_batch of 2 x 256 tokens from a small file and from a huge one, in milliseconds."""
    found, config = {}, train_config(batch_size=2, context_length=256)
    with tempfile.NamedTemporaryFile() as file:
        for name, size in {"10 MB": 10**7, "10 GB": 10**10}.items():
            file.truncate(size)  # sparse: it takes no room on the disk
            fetch = partial(train.get_batch, prepare.open_memmap(file.name, "uint16"), 1, config)
            seconds = take_turns({"get_batch": fetch}, 100 * rounds)["get_batch"]
            found[f"of {name}: ms"] = 1000 * seconds
    return found


def corpus(rounds: int, megabytes: int = 200) -> dict[str, float]:
    """prepare.py on Python's own sources, repeated, by 1 and 2 workers; tiktoken in one thread."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    tokenizer, rows, text, size = prepare.get_tokenizer("gpt2"), {}, "".join(texts), 0
    with tempfile.TemporaryDirectory() as folder:
        while size < megabytes * 1e6:
            turn = [each.replace("self", f"self{size}") for each in texts]
            with open(f"{folder}/{size}.jsonl", "w") as file:
                file.writelines(json.dumps({"text": each}) + "\n" for each in turn)
            size += sum(len(each.encode()) for each in turn)
        for _ in range(rounds):
            seconds = take_turns({"": lambda: tokenizer.encode_ordinary(text)}, 2)[""]
            rows.setdefault("tiktoken alone: MB/s", []).append(len(text.encode()) / seconds / 1e6)
            for workers in (1, 2):
                seconds, memory = run_prepare(folder, workers)
                rows.setdefault(f"{workers} workers: MB/s", []).append(size / seconds / 1e6)
                rows.setdefault(f"{workers} workers: GB of memory", []).append(memory)
    return {row: statistics.median(values) for row, values in rows.items()}


def run_prepare(folder: str, workers: int) -> tuple[float, float]:
    """Return the seconds of prepare.py on folder/*.jsonl, and its peak memory in GB (Linux)."""
    argv = [sys.executable, ROOT / "prepare.py", "*.jsonl", "--dataset=d", f"--workers={workers}"]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *map(int, re.findall(r"VmHWM:\s*(\d+) kB", status))])
        time.sleep(0.05)
    assert process.returncode == 0
    return time.perf_counter() - started, peak * 1024 / 1e9


# The book's run (chapter 5) with the code of its package, for a folder with data/verdict/input.txt.
BOOK = """
import os, sys
import torch  # first, so that OpenMP has its own defaults: prepare sets an environment variable
sys.path.insert(0, {root!r})
import prepare
tokenizer = prepare.get_tokenizer("gpt2")  # also where tiktoken's host is out of reach
from llms_from_scratch.ch02 import create_dataloader_v1
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch05 import train_model_simple

torch.manual_seed(123)
text = open("data/verdict/input.txt", encoding="utf-8").read()
shape = dict(vocab_size=50257, context_length=256, emb_dim=768, n_heads=12, n_layers=12)
model = GPTModel(shape | dict(drop_rate=0.1, qkv_bias=False))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
cut, windows = int(0.9 * len(text)), dict(batch_size=2, max_length=256, stride=256)
train = create_dataloader_v1(text[:cut], drop_last=True, shuffle=True, **windows)
val = create_dataloader_v1(text[cut:], drop_last=False, shuffle=False, **windows)
cpu, start = torch.device("cpu"), "Every effort moves you"
train_model_simple(model, train, val, optimizer, cpu, 10, 5, 5, start, tokenizer)
torch.save(model.state_dict(), os.devnull)
"""


def verdict(rounds: int) -> dict[str, float]:
    """The whole command of config/verdict.py, and the same run with the book's package."""
    if not importlib.util.find_spec("llms_from_scratch"):
        sys.exit("verdict needs the book's package: pip install --no-deps llms-from-scratch")
    times, own = {}, ("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT")  # train.py sets them for itself
    env = {name: value for name, value in os.environ.items() if name not in own}
    quiet = subprocess.DEVNULL
    defaults = env | {"THP_MEM_ALLOC_ENABLE": "0"}  # PyTorch's; prepare.py leaves it as it is
    with tempfile.TemporaryDirectory() as folder:
        ours = [ROOT / "train.py", "config/verdict.py", "--device=cpu", f"--out_dir={folder}/out"]
        book = ["-c", BOOK.format(root=str(ROOT))]
        sides = {"this project": (ours, env), "the book": (book, defaults)}
        for _ in range(rounds):
            for name, (argv, variables) in sides.items():
                started = time.perf_counter()
                command = [sys.executable, *map(str, argv)]
                subprocess.run(command, cwd=ROOT, env=variables, stdout=quiet, check=True)
                times.setdefault(name, []).append(time.perf_counter() - started)
    times = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = times["the book"] / times["this project"]
    return {f"{name}: seconds": x for name, x in times.items()} | {"book / this project": ratio}


# --- A GPU ----------------------------------------------------------------------------------------


# Dense bfloat16 or float16 TFLOP/s of cards, from the data sheets of NVIDIA and AMD.
PEAKS = """
H100 PCIe 756, H100 NVL 835, H200 NVL 835, H100 989, H200 989, GH200 989, B200 2250, A100 312,
A40 150, A30 165, A10G 70, A10 125, L40S 362, L40 181, L4 121, V100 125, T4 65,
RTX 5090 210, RTX 4090 165, RTX 4080 97, RTX 3090 71, RTX 3080 60, RTX A6000 155, RTX 6000 Ada 364,
MI300X 1307
"""


def peak_flops(card: str) -> float | None:
    """Return the peak FLOP/s of the GPU that PyTorch calls `card`; None for unknown cards."""
    for entry in PEAKS.split(","):
        name, _, tera = entry.strip().rpartition(" ")
        if re.search(rf"\b{name}\b(?!.*Laptop)", card):
            return float(tera) * 1e12
    return None


class Card:
    """A GPU, the sizes of models for it, and the FLOP/s of its matrix products in bfloat16."""

    def __init__(self, device: str, tiny: bool):
        self.device = model.choose_device(device)[0]
        if self.device.type == "cpu" and not tiny:
            sys.exit("there is no GPU here; --device cpu --tiny runs the same code, tiny")
        # 50,257 tokens are rounded up to a multiple of 64, as in nanoGPT, for fast products.
        gpt2 = dict(context_length=1024, vocab_size=50304)
        large = gpt2 | dict(n_layer=24, n_head=16, n_embd=1024)
        small = dict(n_layer=6, n_head=6, n_embd=384, context_length=256, vocab_size=256)
        self.sizes = {"124M": gpt2, "350M": large, "11M": small}
        self.sizes["124M, vocabulary 50,257"] = gpt2 | dict(vocab_size=50257)
        backend, self.square, self.new = "inductor", 8192, 200
        if tiny:
            backend, self.square, self.new = "aot_eager", 256, 8
            shape = dict(n_layer=1, n_head=2, n_embd=16, context_length=32, vocab_size=64)
            self.sizes = dict.fromkeys(self.sizes, shape)
        self.compile = partial(torch.compile, dynamic=False, backend=backend)
        self.peak = math.nan
        if self.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(self.device)) or math.nan
        self.ceiling = self.product(self.square, self.square, self.square)

    def product(self, m: int, k: int, n: int) -> float:
        """Return the FLOP/s of a product of random bfloat16 matrices (m, k) and (k, n)."""
        a = torch.randn(m, k, device=self.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=self.device, dtype=torch.bfloat16)
        return 2 * m * k * n / seconds_per_call(lambda: a @ b.T)

    def speed(self, step, shape: dict, batch_size: int) -> dict:
        """Return speed and memory of `step`, an update of a model of `shape`."""
        config, started = GPTConfig(**shape), time.perf_counter()
        step()
        synchronize()
        first = time.perf_counter() - started
        seconds = seconds_per_call(step)
        rate = batch_size * config.context_length / seconds
        flops = rate * model.flops_per_token(config)
        found = {"tokens/s": rate, "ms": 1000 * seconds, "% MFU": 100 * flops / self.peak}
        found |= {"% of ceiling": 100 * flops / self.ceiling, "GB": peak_memory()}
        return found | {"s for the first update": first}

    def hugging_face(self, size: str) -> dict:
        """Return a size as fields of transformers' GPT2Config, without dropout."""
        if transformers is None:
            raise RuntimeError("transformers is not installed")
        fields = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa")
        fields |= self.sizes[size]
        return fields | dict(n_positions=fields.pop("context_length"))


def seconds_per_call(call) -> float:
    """Return the seconds of a call: median of 3 groups of at least 4 calls, after 3 warm-ups."""

    def group(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        return (time.perf_counter() - started) / count

    count = max(4, math.ceil(0.2 / group(3)))
    return statistics.median(group(count) for _ in range(3))


def ceiling(card: Card) -> dict:
    """Return the rate of large square products, to which other rows are compared."""
    return {"TFLOP/s": card.ceiling / 1e12, "% of data sheet": 100 * card.ceiling / card.peak}


def products(card: Card, size: str, batch_size: int) -> dict:
    """Return the TFLOP/s of the forward pass's matrix products, and of all in an update."""
    config = GPTConfig(**card.sizes[size])
    M, C = batch_size * config.context_length, config.n_embd
    shapes = {"qkv": (C, 3 * C), "projection": (C, C), "MLP in": (C, 4 * C), "MLP out": (4 * C, C)}
    shapes["head"] = (C, config.vocab_size)
    found = {name: card.product(M, k, n) / 1e12 for name, (k, n) in shapes.items()}
    every = matrix_products(config, batch_size, card.device, torch.bfloat16, attention=False)
    flops = 6 * M * model.count_parameters(config)[1]
    return found | {"all": flops / seconds_per_call(every) / 1e12}


@torch.no_grad()
def agreement(card: Card, size: str, batch_size: int) -> dict:
    """Return the loss of one batch on the CPU, and the differences of losses on the GPU."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**card.sizes[size])).eval()
    idx = torch.randint(gpt.config.vocab_size, (batch_size, gpt.config.context_length + 1))
    cpu = gpt(idx[:, :-1], idx[:, 1:]).item()
    gpt, idx = gpt.to(card.device), idx.to(card.device)
    float32 = gpt(idx[:, :-1], idx[:, 1:]).item()
    with torch.autocast(card.device.type, torch.bfloat16):
        bfloat16 = gpt(idx[:, :-1], idx[:, 1:]).item()
    return {"CPU loss": cpu, "float32": float32 - cpu, "bfloat16": bfloat16 - cpu}


def gpu_run(card: Card, size: str, dtype: str = "bfloat16", **settings) -> Run:
    return Run(train_config(device=card.device.type, dtype=dtype, **card.sizes[size], **settings))


def step(card: Card, size: str, batch_size: int, compiled=False, dtype="bfloat16") -> dict:
    """Return speed and memory of an update, with and without `host_check`; float32 is TF32."""
    torch.set_float32_matmul_precision("high" if dtype == "float32" else "highest")
    run = gpu_run(card, size, dtype, batch_size=batch_size)
    run.model = card.compile(run.gpt) if compiled else run.gpt
    found = card.speed(partial(training_step, run), card.sizes[size], batch_size)
    seconds = seconds_per_call(partial(training_step, run, host_check=False))
    torch.set_float32_matmul_precision("highest")
    return found | {"ms without host check": 1000 * seconds}


def one_rank(card: Card, size: str, batch_size: int, parallel: str) -> dict:
    """Return speed and memory of an update under DDP or FSDP, in a group of one process."""
    gpu = card.device.type == "cuda"
    backend, store = "cpu:gloo,cuda:nccl" if gpu else "gloo", torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        run = gpu_run(card, size, batch_size=batch_size, parallel=parallel)
        return card.speed(partial(training_step, run), card.sizes[size], batch_size)
    finally:
        torch.distributed.destroy_process_group()


def step_phases(card: Card, **settings) -> dict:
    """Return the milliseconds of each phase of an update, and the optimizer's share."""
    found = phases(gpu_run(card, **settings), 10)
    share = 100 * found["optimizer"] / sum(found.values())
    found = {f"{name} ms": 1000 * seconds for name, seconds in found.items()}
    return found | {"% optimizer": share}


def hugging_face(card: Card, size: str, batch_size: int, compiled: bool = False) -> dict:
    """Return speed and memory of an update of transformers' GPT-2 with fused AdamW."""
    shape, fields = card.sizes[size], card.hugging_face(size)
    options = dict(autocast=True, compile=card.compile if compiled else None, **fields)
    update = hugging_face_trains(card.device, batch_size, shape["context_length"], **options)
    return card.speed(update, shape, batch_size)


def generate(card: Card, size: str, sequences: int, theirs=False, **options) -> dict:
    """Return the speed of generation in bfloat16 after prompts of 16 tokens; greedy by default."""
    new, where = card.new, (card.device, torch.bfloat16)
    if theirs:
        writer = hugging_face_generates(*where, new, sequences, **card.hugging_face(size))
    else:
        gpt = GPT(GPTConfig(**card.sizes[size])).to(*where).eval()
        idx = torch.randint(gpt.config.vocab_size, (sequences, 16), device=card.device)
        options = options or dict(temperature=0)
        writer = torch.inference_mode()(lambda: gpt.generate(idx, new, **options))
    seconds = take_turns({"": writer}, 3)[""]
    return {"tokens/s": sequences * new / seconds, "ms per token": 1000 * seconds / new}


# Part, function, its arguments; the most telling rows first, as the time budget may end them.
GPT2 = dict(size="124M", batch_size=16)
ROWS = [
    ("ceiling", ceiling, {}),
    ("ceiling", products, GPT2),
    ("agreement", agreement, dict(size="124M", batch_size=2)),
    *[("training", step, GPT2 | dict(batch_size=B)) for B in (16, 8, 32)],
    ("training", step, GPT2 | dict(compiled=True)),
    *[("hugging_face", hugging_face, GPT2 | dict(compiled=x)) for x in (False, True)],
    *[("small", step, dict(size="11M", batch_size=64, compiled=x)) for x in (False, True)],
    *[("generation", generate, dict(size="124M", sequences=B)) for B in (1, 64)],
    ("generation", generate, dict(size="124M", sequences=1, temperature=0.8, top_k=50)),
    *[("generation", generate, dict(size="124M", sequences=B, theirs=True)) for B in (1, 64)],
    *[("optimizers", step_phases, GPT2 | dict(optimizer=name)) for name in ("adamw", "muon")],
    *[("parallel", one_rank, GPT2 | dict(parallel=name)) for name in ("ddp", "fsdp")],
    *[("precision", step, GPT2 | dict(dtype=dtype)) for dtype in ("float16", "float32")],
    ("large", step, dict(size="350M", batch_size=8)),
    ("training", step, dict(size="124M, vocabulary 50,257", batch_size=16)),
    ("training", step, GPT2 | dict(batch_size=64)),
    *[("training", step, GPT2 | dict(batch_size=B, compiled=True)) for B in (32, 8, 64)],
    ("large", step, dict(size="350M", batch_size=8, compiled=True)),
]


def gpu(args):
    """Measure and report the rows of ROWS that `--only` admits, until the time budget is spent."""
    end, card = time.perf_counter() + args.budget, Card(args.device, args.tiny)
    report(args.json, "gpu", machine(card.device))
    for part, measure, settings in [row for row in ROWS if row[0] in (args.only or row)]:
        found = {"note": "skipped: the time budget is spent"}
        if time.perf_counter() < end:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            try:
                found = measure(card, **settings)
            except Exception as error:  # out of memory, say, which must not end the other rows
                found = {"note": f"failed: {model.one_line(error)[:120]}"}
        row = [settings.get("size", ""), *[f"{x} {y}" for x, y in settings.items() if x != "size"]]
        report(args.json, part, f"{measure.__name__} {', '.join(row)}", **found)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


PARTS = {"generation": generation, "training": training, "data": data, "corpus": corpus}
PARTS |= {"verdict": verdict}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, gpu")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count [3]")
    parser.add_argument("--megabytes", type=int, default=200, help="of text for corpus [200]")
    parser.add_argument("--json", metavar="PATH", help="append each row to a JSON lines file")
    parser.add_argument("--only", nargs="+", choices={part for part, *_ in ROWS}, help="of gpu")
    parser.add_argument("--budget", type=float, default=240, help="seconds for gpu [240]")
    parser.add_argument("--device", default="auto", help="for gpu [the GPU]")
    parser.add_argument("--tiny", action="store_true", help="gpu with tiny models")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, "gpu"}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}, gpu")
    if "gpu" in args.parts:
        return gpu(args)
    report(args.json, "machine", machine(model.choose_device()[0]))
    # In this order: from training on, this process keeps its memory, which sample.py does not.
    for name in [name for name in PARTS if name in (args.parts or {*PARTS} - {"verdict"})]:
        options = {"megabytes": args.megabytes} if name == "corpus" else {}
        print(f"{name}: {PARTS[name].__doc__}")
        for row, value in PARTS[name](args.rounds, **options).items():
            report(args.json, name, row, value=value)


if __name__ == "__main__":
    main()
