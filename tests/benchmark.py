"""How fast this is, beside Hugging Face's GPT-2 and beside what the machine can do.

    python tests/benchmark.py                        every part, as a table (half an hour)
    python tests/benchmark.py generation --json      one part, as JSON
    python tests/benchmark.py training data          the training step; get_batch
    python tests/benchmark.py growth                 larger models, longer contexts
    python tests/benchmark.py corpus --rounds 1 --megabytes 2000    prepare.py beside tiktoken alone
    python tests/benchmark.py parallel               one process and two

The sides of a comparison take turns, after a round that does not count; figures are medians over
--rounds. Hugging Face's run in processes of their own, as their users start them: this project's
settings of how memory is had would make them faster. Without the package transformers its rows are
left out.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import unittest.mock
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py and sample.py do
sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig, choose_device  # noqa: E402

import torch  # noqa: E402

try:
    import transformers
except ImportError:
    transformers = None


def take_turns(sides: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each of the functions in `sides`, called in turn."""
    times = {name: [] for name in sides}
    for round in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def machine(device: torch.device) -> str:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = open("/proc/cpuinfo").read().splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    libraries = f"torch {torch.__version__}"
    if transformers is not None:
        libraries += f", transformers {transformers.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}, Python {platform.python_version()}, {libraries}"


def serve(pipe, make, *args):
    """Call what make(*args) returns, as often as the other end of `pipe` asks for it."""
    side = make(*args)
    while True:
        pipe.send("ready")
        pipe.recv()
        side()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@contextlib.contextmanager
def apart(make, *args):
    """A function that calls what make(*args) returns, in a process that has PyTorch's defaults."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, make, *args))
    with unittest.mock.patch.dict(os.environ, THP_MEM_ALLOC_ENABLE="0"):
        process.start()
    there.close()  # so that `here` is told if the process ends

    def side():
        here.send("go")
        here.recv()

    try:
        here.recv()
        yield side
    finally:
        process.terminate()
        process.join()


def hugging_face(device, dtype):
    """Their GPT-2 124M with its own settings, of which dropout 0.1 is one, and random weights."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(device, dtype)


def hugging_face_writes(device, dtype, new: int):
    """A function that has their model write so many tokens after 16."""
    gpt = hugging_face(device, dtype).eval()
    prompt = torch.randint(50257, (1, 16), device=device)
    gpt.generation_config.eos_token_id = None  # never ends early
    options = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0, do_sample=False)
    return lambda: gpt.generate(prompt, max_new_tokens=new, **options)


def hugging_face_trains(device, B: int, T: int, autocast: bool):
    """A function that makes an update of their model on (B, T) tokens."""
    gpt = hugging_face(device, torch.float32).train()
    idx = torch.randint(50257, (B, T), device=device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=6e-4, weight_decay=0.1)
    model = torch.compile(gpt) if device.type == "cuda" else gpt

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_to_read(bytes: int, device) -> float:
    """The least time in which so many bytes go through the processor."""
    numbers = torch.ones(bytes // 4, device=device)
    return take_turns({"read": numbers.sum}, 7)["read"]


# --- Generation -----------------------------------------------------------------------------------


def generation(rounds: int) -> dict[str, float]:
    """124M parameters, a prompt of 16 tokens, 200 new ones, greedy."""
    device, dtype = choose_device()
    new, prompt = 200, torch.randint(50257, (1, 16), device=device)

    def ours(dtype):
        gpt = GPT(GPTConfig()).to(device, dtype).eval()
        return gpt.pack() if device.type == "cpu" else gpt

    def write(gpt, rows=1):
        idx, options = prompt.expand(rows, -1), dict(temperature=0, compile=device.type == "cuda")
        return torch.inference_mode()(lambda: gpt.generate(idx, new, **options))  # as sample.py

    @torch.inference_mode()
    def per_token(gpt, length, count=20):
        idx = torch.randint(50257, (1, length), device=device)
        stream = gpt.stream(idx, count + 1, temperature=0, compile=device.type == "cuda")
        next(stream)  # the prompt
        started = time.perf_counter()
        for _ in stream:
            pass
        return 1000 * (time.perf_counter() - started) / count

    best = str(dtype).removeprefix("torch.")
    gpt = ours(dtype)
    sides = {"this project, float32": write(gpt if best == "float32" else ours(torch.float32))}
    sides[f"this project, {best}"] = write(gpt)
    sides["this project, 10 samples at once"] = write(gpt, 10)
    found = {}
    with contextlib.ExitStack() as stack:
        for name in ("float32", "bfloat16") if transformers is not None else ():
            theirs = apart(hugging_face_writes, device, getattr(torch, name), new)
            sides[f"Hugging Face, {name}"] = stack.enter_context(theirs)
        times = take_turns(sides, rounds)
    for name, seconds in times.items():
        found[f"{name}: tokens/s"] = new * (10 if "10" in name else 1) / seconds
    multiplied = sum(x.numel() for x in GPT(GPTConfig()).parameters() if x.dim() == 2) - 1024 * 768
    for name, size in {"float32": 4, best: dtype.itemsize}.items():
        limit = 1 / seconds_to_read(size * multiplied, device)
        found[f"reading the {name} weights once per token: tokens/s"] = limit
        found[f"this project's share of that, {name}"] = (
            found[f"this project, {name}: tokens/s"] / limit
        )
    one = found[f"this project, {best}: tokens/s"]
    found["10 samples / 1 sample"] = found["this project, 10 samples at once: tokens/s"] / one
    if transformers is not None:
        mine = found["this project, float32: tokens/s"]
        found["this project / Hugging Face, float32"] = (
            mine / found["Hugging Face, float32: tokens/s"]
        )
        label = f"this project, {best} / Hugging Face, bfloat16"
        found[label] = one / found["Hugging Face, bfloat16: tokens/s"]
    costs = [(per_token(gpt, 100), per_token(gpt, 1000)) for _ in range(rounds + 1)][1:]
    for length, cost in zip((100, 1000), zip(*costs)):
        found[f"after {length:,} tokens: ms per token"] = statistics.median(cost)
    return found


# --- Training -------------------------------------------------------------------------------------


class Step:
    """Updates of a model by this project, on random tokens, as train.py makes them."""

    def __init__(self, batch_size: int, **settings):
        self.config = train.TrainConfig(
            **dict(vocab_size=50257, batch_size=batch_size, micro_batch_size=batch_size) | settings
        )
        self.device, _, self.autocast, self.scaler = train.precision(self.config)
        self.gpt = GPT(GPTConfig(**self.config.model_args())).to(self.device).train()
        self.optimizers = train.make_optimizers(self.gpt, self.config)
        self.model = train.compiled(self.gpt, self.config, self.device, self.autocast)
        shape = (batch_size, self.config.context_length)
        self.batch = [torch.randint(50257, shape, device=self.device) for _ in range(2)]

    def __call__(self):
        how = (self.model, self.optimizers, self.scaler, self.autocast)
        train.update(*how, self.batch, self.config, 0)

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of one update."""
        stamps = []

        def stamp(*_):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

        hook = self.gpt.lm_head.register_forward_pre_hook(stamp)
        stamp()
        with self.autocast:
            loss = self.gpt(*self.batch)
        stamp()
        loss.backward()
        stamp()
        torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        stamp()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stamp()
        hook.remove()
        names = ("forward", "head and loss", "backward", "clip", "optimizer")
        return {name: b - a for name, a, b in zip(names, stamps, stamps[1:])}


def matrix_products(config, batch_size: int, device, dtype):
    """All matrix products of an update and nothing else: forward, and twice that backward."""
    B, T, C, H = batch_size, config.context_length, config.n_embd, config.n_head
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    shapes = [(shape, config.n_layer) for shape in shapes] + [((C, config.vocab_size), 1)]

    def matrix(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    linears = [(matrix(B * T, i), matrix(o, i), matrix(B * T, o), n) for (i, o), n in shapes]
    q, attention = matrix(B * H, T, C // H), matrix(B * H, T, T)

    def run():
        for x, weight, gradient, count in linears:
            for _ in range(count):
                x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in range(3 * config.n_layer):
            q @ q.mT, attention @ q

    return run


def peak_memory() -> float:
    """Largest memory so far, in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def training(rounds: int) -> dict[str, float]:
    """A step of GPT-2 124M with dropout 0.1, 2 x 256 tokens on a CPU, 16 x 1,024 on a GPU."""
    device, dtype = choose_device()
    B, T = (16, 1024) if device.type == "cuda" else (2, 256)
    ours = Step(B, context_length=T, dropout=0.1)
    sides = {"this project": ours}
    sides["matrix products alone"] = matrix_products(ours.config, B, device, dtype)

    autocast = {"float32": False}
    if dtype == torch.bfloat16:  # others need half a minute for a step in it
        autocast["bfloat16 autocast"] = True
    with contextlib.ExitStack() as stack:
        for name, enabled in autocast.items() if transformers is not None else ():
            theirs = apart(hugging_face_trains, device, B, T, enabled)
            sides[f"Hugging Face, {name}"] = stack.enter_context(theirs)
        seconds = take_turns(sides, rounds)
    found = {f"{name}: seconds": value for name, value in seconds.items()}
    mine = seconds["this project"]
    found["this project: tokens/s"] = B * T / mine
    for name, value in seconds.items():
        if name != "this project":
            found[f"{name} / this project"] = value / mine
    if device.type == "cuda" and (peak := train.peak_flops(torch.cuda.get_device_name(device))):
        found["this project: MFU"] = B * T / mine * ours.gpt.flops_per_token() / peak
    phases = [ours.phases() for _ in range(rounds + 1)][1:]
    for name in phases[0]:
        found[f"{name}: seconds"] = statistics.median(phase[name] for phase in phases)
    for name, value in data(rounds).items():
        found[f"get_batch {name.removesuffix(': ms')}: share of the step"] = value / 1000 / mine
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        settings = dict(batch_size=B, context_length=T, dropout=0.1)
        found["peak memory: GB"] = pool.apply(measure, (settings,))[1]
    return found


def data(rounds: int) -> dict[str, float]:
    """get_batch of 2 x 256 tokens from a small file and from a huge one, in milliseconds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in {"10 MB": 10**7, "10 GB": 10**10}.items():
            path = Path(folder) / "train.bin"
            with open(path, "wb") as file:
                file.truncate(size)  # sparse: it takes no room on the disk
            split = prepare.map_ids(path, "uint16")
            steps = iter(range(10**9))

            def fetch(split=split, steps=steps):
                for _ in range(100):
                    train.get_batch(split, next(steps), batch_size=2, context_length=256, seed=1)

            found[f"of {name}: ms"] = take_turns({"get_batch": fetch}, rounds)["get_batch"] * 10
    return found


def measure(settings: dict) -> tuple[float, float]:
    """Tokens per second and GB of memory of a training step, in a process of its own."""
    step = Step(**settings)
    tokens = settings["batch_size"] * settings["context_length"]
    return tokens / take_turns({"step": step}, 2)["step"], peak_memory()


def growth(rounds: int) -> dict[str, float]:
    """Training steps as the model grows (context 256) and as the context grows (30M)."""
    shapes = {"10M": (4, 4, 128), "30M": (6, 6, 384), "124M": (12, 12, 768), "350M": (24, 16, 1024)}
    cases = {f"{size} parameters": (size, 2, 256) for size in shapes}
    cases |= {f"context {T:,}": ("30M", 1, T) for T in (256, 1024, 4096)}
    found = {}
    for name, (size, batch_size, T) in cases.items():
        n_layer, n_head, n_embd = shapes[size]
        settings = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        settings |= dict(batch_size=batch_size, context_length=T)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rate, memory = pool.apply(measure, (settings,))
        found[f"{name}: tokens/s"], found[f"{name}: GB"] = rate, memory
    return found


# --- Large corpora --------------------------------------------------------------------------------


def write_corpus(folder: Path, megabytes: int) -> dict[str, int]:
    """Bytes of text in folder/jsonl, of shards, and in folder/one.txt, a single text of as much.

    The texts are Python's own sources and what its packages say of themselves, over and over, with
    small changes.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = [x for x in library.rglob("*.py") if "site-packages" not in x.parts]
    paths += library.rglob("METADATA")
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths)]
    random.Random(0).shuffle(sources)
    (folder / "jsonl").mkdir()
    size = turn = 0
    with open(folder / "one.txt", "wb") as one:
        while size < megabytes * 1e6:
            with open(folder / f"jsonl/{turn:04d}.jsonl", "w") as shard:
                for source in sources:
                    text = f"# {turn}\n" + source.replace("self", f"self{turn}")
                    size += one.write(text.encode())
                    shard.write(json.dumps({"text": text}) + "\n")
                    if size >= megabytes * 1e6:
                        break
            turn += 1
    return {"jsonl": size, "one.txt": size}


def tiktoken_alone(folder: Path, megabytes: int = 20) -> tuple[float, float]:
    """Seconds and seconds of CPU time that tiktoken takes per MB of the corpus, in one thread."""
    tokenizer, size, texts = prepare.get_tokenizer("gpt2"), 0, []
    for line in open(folder / "jsonl/0000.jsonl"):
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode())
        if size > megabytes * 1e6:
            break
    started, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        tokenizer.encode_ordinary(text)
    return 1e6 * (time.perf_counter() - started) / size, 1e6 * (time.process_time() - cpu) / size


def run_prepare(folder: Path, source: str, workers: int) -> tuple[float, float, float, str]:
    """Seconds, seconds of CPU time, peak GB of memory (Linux) and a hash of the ids of a run."""
    script = Path(__file__).parent.parent / "prepare.py"
    argv = [sys.executable, script, source, "--dataset=d", f"--workers={workers}"]
    started, before, peak = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *map(int, re.findall(r"VmHWM:\s*(\d+) kB", status))])
        time.sleep(0.05)
    seconds, after = time.perf_counter() - started, os.times()
    assert process.returncode == 0
    digest = hashlib.sha256()
    for split in ("train", "val"):
        with open(folder / f"data/d/{split}.bin", "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that ended
    return seconds, cpu, peak * 1024 / 1e9, digest.hexdigest()


def corpus(rounds: int, megabytes: int = 200) -> dict[str, float]:
    """prepare.py by 1 and 2 workers; tiktoken alone, in one thread, before and after each run.

    The output has to be the same. Where other programs take a part of the machine, CPU time says
    more than the clock.
    """
    rows, hashes = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write_corpus(folder, megabytes)
        for _ in range(rounds):
            for source, size in sizes.items():
                for workers in (1, 2):
                    before = tiktoken_alone(folder)
                    seconds, cpu, memory, digest = run_prepare(folder, source, workers)
                    alone, alone_cpu = map(statistics.mean, zip(before, tiktoken_alone(folder)))
                    assert hashes.setdefault(source, digest) == digest
                    label = f"{source}, {workers} workers"
                    rate = size / seconds / 1e6
                    found = {
                        "tiktoken alone: MB/s": 1 / alone,
                        f"{label}: MB/s": rate,
                        f"{label}: share of tiktoken's rate per worker": rate * alone / workers,
                        f"{label}: share of its rate per CPU second": size * alone_cpu / cpu / 1e6,
                        f"{label}: GB of memory": memory,
                    }
                    for row, value in found.items():
                        rows.setdefault(row, []).append(value)
    return {row: statistics.median(values) for row, values in rows.items()}


# --- Several processes ----------------------------------------------------------------------------


def updates(settings: dict, processes: int) -> tuple[float, float, float]:
    """Median seconds of an update, of one without synchronising, and of adding up as much alone.

    By this process, which is one of so many; each has its share of the batch.
    """
    config = train.TrainConfig(**settings)
    device, dtype, autocast, scaler = train.precision(config)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**config.model_args())).train()
    model = train.distribute(gpt, config, device, dtype)
    how = (model, train.make_optimizers(gpt, config), scaler, autocast)
    shape = (config.batch_size // processes, config.context_length)
    batch = [torch.randint(config.vocab_size, shape, device=device) for _ in range(2)]
    gradients = torch.zeros(gpt.num_parameters(), device=device)

    synchronize = train.synchronize

    def alone():
        train.synchronize = lambda model, now: synchronize(model, False)
        train.update(*how, batch, config, 0)
        train.synchronize = synchronize

    sides = {"update": lambda: train.update(*how, batch, config, 0)}
    if processes > 1 and config.parallel == "ddp":
        sides["alone"] = alone
        sides["sum"] = lambda: train.all_reduce(gradients)
    seconds = take_turns(sides, 3)
    return tuple(seconds.get(name, 0.0) for name in ("update", "alone", "sum"))


def parallel(rounds: int) -> dict[str, float]:
    """A batch of 4 x 256 tokens by one process with 2 threads, and by 2 with one each (gloo)."""
    found = {}
    for size, (n_layer, n_head, n_embd) in {"10M": (4, 4, 128), "124M": (12, 12, 768)}.items():
        settings = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257)
        settings |= dict(batch_size=4, context_length=256, device="cpu", dtype="float32")
        for processes, how in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
            argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            argv = [*argv, f"--nproc_per_node={processes}"] if processes > 1 else argv[:1]
            argv += [__file__, "--updates", json.dumps(settings | {"parallel": how})]
            environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
            done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True)
            update, alone, total = json.loads(done.stdout.splitlines()[-1])
            label = f"{size}, {processes} process{'es' * (processes > 1)}"
            label += f", {how}" if processes > 1 else ""
            found[f"{label}: seconds"] = update
            if processes > 1 and how == "ddp":
                found[f"{label}: seconds without synchronising"] = alone
                found[f"{label}: seconds to add up the gradients alone"] = total
    return found


@train.together()
def print_updates(settings: str):
    print(json.dumps(updates(json.loads(settings), train.processes())), flush=True)


PARTS = {"generation": generation, "training": training, "data": data, "growth": growth}
PARTS |= {"corpus": corpus, "parallel": parallel}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count [3]")
    parser.add_argument("--megabytes", type=int, default=200, help="of text for corpus [200]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--updates", help=argparse.SUPPRESS)  # what `parallel` starts
    args = parser.parse_args()
    if args.updates:
        return print_updates(args.updates)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = {"machine": machine(choose_device()[0])}
    # In this order: from training on, this process keeps its memory, which sample.py does not.
    for name in [name for name in PARTS if name in (args.parts or PARTS)]:
        options = {"megabytes": args.megabytes} if name == "corpus" else {}
        found[name] = PARTS[name](args.rounds, **options)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(found.pop("machine"))
    for name, rows in found.items():
        print(f"\n{name}: {PARTS[name].__doc__.splitlines()[0]}")
        for label, value in rows.items():
            print(f"  {label:<56} {value:>12,.4g}")


if __name__ == "__main__":
    main()
