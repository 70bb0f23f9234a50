"""How fast this is, beside Hugging Face's GPT-2 and beside what the machine can do.

    python tests/benchmark.py                        every part, as a table
    python tests/benchmark.py generation --json      one part, as JSON

The sides of a comparison take turns in one process, after a round that does not count; figures are
medians over --rounds. Without the package transformers its rows are left out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py and sample.py do
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from model import GPT, GPTConfig, choose_device  # noqa: E402

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


def hugging_face(device, dtype, **changes):
    """Their GPT-2 124M, with random weights, without dropout."""
    config = transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **changes)
    return transformers.GPT2LMHeadModel(config).to(device, dtype)


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
        return lambda: gpt.generate(idx, new, **options)

    def theirs(dtype):
        gpt = hugging_face(device, dtype).eval()
        gpt.generation_config.eos_token_id = None  # never ends early
        options = dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
        return lambda: gpt.generate(prompt, max_new_tokens=new, do_sample=False, **options)

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
    if transformers is not None:
        for name in ("float32", "bfloat16"):
            sides[f"Hugging Face, {name}"] = theirs(getattr(torch, name))
    found = {}
    for name, seconds in take_turns(sides, rounds).items():
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


PARTS = {"generation": generation}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count [3]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = {"machine": machine(choose_device()[0])}
    for name in args.parts or PARTS:
        found[name] = PARTS[name](args.rounds)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(found.pop("machine"))
    for name, rows in found.items():
        print(f"\n{name}: {PARTS[name].__doc__.splitlines()[0]}")
        for label, value in rows.items():
            print(f"  {label:<56} {value:>10,.2f}")


if __name__ == "__main__":
    main()
