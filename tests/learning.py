"""Compare what config/modern.py and GPT-2 with nanoGPT's settings learn from the same tokens.

    python tests/learning.py                            1M parameters, three seeds
    python tests/learning.py --size 10M --seeds 1       larger ones: 10M, 30M
    python tests/learning.py --ablation                 the recipe with each ingredient taken out
    python tests/learning.py stdlib --ablation Muon QK-norm      some of them, on another text
    python tests/learning.py stdlib                     the text on which settings were chosen
    python tests/learning.py my.txt --tokenizer gpt2    your own text

Both sides see the same tokens in the same order. The recipe's learning rate falls at the end of a
run, and the loss falls with it, so whole runs of several lengths are compared, not points of one
long run. Seconds are of training alone; with one thread (OMP_NUM_THREADS=1) they are processor
time, which other programs on the machine hardly change.
"""

import argparse
import math
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402  (before torch: it sets environment variables)
import model  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402

import torch  # noqa: E402
from benchmark import Run, training_step  # noqa: E402

MODERN = str(ROOT / "config/modern.py")

# About so many parameters; batches and context as small as a CPU asks for. `max_iters` is the
# baseline's.
SIZES = {
    "1M": dict(n_layer=4, n_head=4, n_embd=128, context_length=64, batch_size=12, max_iters=2000),
    "5M": dict(n_layer=6, n_head=4, n_embd=256, context_length=128, batch_size=16, max_iters=200),
    "10M": dict(n_layer=6, n_head=6, n_embd=384, context_length=128, batch_size=12, max_iters=200),
    "30M": dict(n_layer=8, n_head=9, n_embd=576, context_length=128, batch_size=12, max_iters=100),
}

# https://github.com/karpathy/nanoGPT: the README's run on a CPU, train_shakespeare_char.py for the
# rates. Its 100 updates of warm-up are of 2,000 or more; a shorter run has a twentieth.
BASELINE = ["--bias=false", "--learning_rate=1e-3", "--min_lr=1e-4", "--weight_decay=0.1"]
BASELINE += ["--beta2=0.99", "--lr_schedule=cosine", "--grad_clip=1.0", "--dropout=0.0"]

SHARED = ["--eval_iters=40"]  # settings of both sides

# What `--ablation` takes out: the settings that are changed for it.
ABLATION = {
    "rotary positions": ["--rotary=false"],
    "RMSNorm": ["--rms_norm=false"],
    "QK-norm": ["--qk_norm=false"],
    "untied head": ["--tie_weights=true"],
    "Muon": ["--optimizer=adamw", "--learning_rate=2e-3"],
    "warm-up, stable, decay": ["--lr_schedule=cosine"],
}


def open_text(text: str, tokenizer: str = "bytes") -> tuple[dict, dict]:
    """Return the tokens of a text's splits, and meta.json. A text is topics, stdlib, or a file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.abspath(text)]
        if text == "stdlib":
            paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        if text == "topics":
            from pydoc_data.topics import topics

            paths = [Path(folder) / f"{name}.txt" for name in topics]
            for name, path in zip(topics, paths):
                path.write_text(topics[name], encoding="utf-8")
        before = os.getcwd()
        os.chdir(folder)
        try:
            prepare.main([*map(str, paths), "--dataset=text", f"--tokenizer={tokenizer}"])
            splits, meta = prepare.load_dataset("text")
            return {name: ids[:].copy() for name, ids in splits.items()}, meta
        finally:
            os.chdir(before)


def settings(size: str, argv: list[str], share: float = 1.0) -> train.TrainConfig:
    """Return the settings of a run of `share` of the baseline's updates."""
    shape = SIZES[size] | dict(max_iters=max(1, round(SIZES[size]["max_iters"] * share)))
    words = [f"--{name}={value}" for name, value in shape.items()]
    if not argv[0].endswith(".py"):
        words.append(f"--warmup_iters={min(100, shape['max_iters'] // 20)}")
    return config.parse(train.TrainConfig, [*words, *SHARED, *argv])


def learn(config: train.TrainConfig, splits: dict, token_sizes=None) -> tuple[int, float, ...]:
    """Train; return updates, seconds of training, validation loss, and perhaps bits per byte."""
    run = Run(config, splits["train"])
    one_thread = run.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    started = clock()
    for _ in range(config.max_iters):
        training_step(run)
    seconds = clock() - started
    val = {"val": splits["val"]}
    losses = train.estimate_loss(run.gpt, val, config, run.autocast, token_sizes)
    return config.max_iters, seconds, *losses.values()


def compare(size: str, splits: dict, seeds: list[int], shares: list[float], brief: bool):
    """Print the updates and seconds that both sides need to reach the baseline's final loss.

    The recipe is run for each of `shares` of the baseline's updates, shortest first, until it
    reaches that loss, and then, unless `brief`, for as many seconds as the baseline.
    """
    rows, missed = {}, 0

    def add(name, run, baseline):
        step, seconds, loss = run
        tokens = step * SIZES[size]["batch_size"] * SIZES[size]["context_length"]
        parts = step / baseline[0], seconds / baseline[1]
        rows.setdefault(name, []).append((step, tokens, seconds, loss, *parts))
        print(f"  {name}: {step:,} updates, {seconds:.1f} s, loss {loss:.4f}", flush=True)

    for seed in seeds:
        print(f"{size}, seed {seed}")
        baseline = learn(settings(size, [*BASELINE, f"--seed={seed}"]), splits)
        add("GPT-2, nanoGPT's settings", baseline, baseline)
        argv = [MODERN, f"--seed={seed}"]
        for share in sorted(shares):
            run = learn(settings(size, argv, share), splits)
            if run[2] <= baseline[2]:
                break
            print(f"  not enough: {run[0]:,} updates, loss {run[2]:.4f}", flush=True)
        missed += run[2] > baseline[2]
        add("recipe", run, baseline)
        if brief:
            continue
        share *= baseline[1] / run[1]
        add("recipe, the same time", learn(settings(size, argv, share), splits), baseline)
    print(
        f"\n{size}: medians of {len(seeds)} seeds; the recipe missed the loss with {missed} of them"
    )
    print(f"{'':27} runs  updates      tokens  seconds    loss  of the updates, seconds")
    for name, runs in rows.items():
        step, tokens, seconds, loss, *parts = map(statistics.median, zip(*runs))
        updates, time_ = (f"{part:.0%}" for part in parts)
        print(
            f"{name:27} {len(runs):4} {step:8,.0f} {tokens:11,.0f} {seconds:8.1f}  {loss:.4f}"
            f"  {updates:>14}, {time_:>7}"
        )


def ablate(size: str, splits: dict, seeds: list[int], share: float, names: list[str]):
    """Print the recipe's loss without each ingredient, and the updates that this costs.

    A loss becomes a number of updates by a straight line over the logarithm of updates, through the
    losses of the whole recipe after `share` and after 0.8 `share` of the baseline's updates.
    """

    def losses(argv, share=share):
        runs = [learn(settings(size, [MODERN, *argv, f"--seed={s}"], share), splits) for s in seeds]
        return statistics.mean(run[2] for run in runs), runs[0][0]

    whole, updates = losses([])
    shorter, fewer = losses([], 0.8 * share)
    if fewer == updates or shorter <= whole:
        sys.exit("more updates do not help here: longer --shares, or more --seeds, are needed")
    slope = (shorter - whole) / math.log(updates / fewer)
    print(f"\n{size}: {updates} updates, means of {len(seeds)} seeds")
    print(f"{'the recipe':34} loss {whole:.4f}   (after {fewer} updates {shorter:.4f})")
    for name in names:
        loss, _ = losses(ABLATION[name])
        more = math.exp((loss - whole) / slope) - 1
        print(f"{'without ' + name:34} loss {loss:.4f}   {more:+.0%} updates", flush=True)


def compare_tokenizers(text: str, size: str, seconds: float, tokenizers: list[str]):
    """Print what the recipe reaches in `seconds` of training with each tokenizer."""
    print(f"{text}, {size}, {seconds:.0f} s of training with each tokenizer")
    print("tokenizer     ids  parameters  of which ids  bytes/token  updates   bits per byte")
    for name in tokenizers:
        splits, meta = open_text(text, name)
        SHARED[:] = [f"--vocab_size={meta['vocab_size']}", "--dropout=0.1", "--eval_iters=100000"]
        pace = learn(
            settings(size, [MODERN, "--max_iters=10"]), {**splits, "val": splits["val"][:500]}
        )
        config = settings(size, [MODERN, f"--max_iters={round(10 * seconds / pace[1])}"])
        sizes = prepare.token_sizes(prepare.get_tokenizer(meta["tokenizer"]))
        updates, _, _, bits = learn(config, splits, sizes)
        parameters, table = model.count_parameters(config)[0], 2 * config.vocab_size * config.n_embd
        per_token = meta["train_bytes"] / meta["train_tokens"]
        print(
            f"{name:10} {meta['vocab_size']:6,} {parameters:11,} {table / parameters:13.0%} "
            f"{per_token:12.2f} {updates:8,} {bits:15.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="topics", help="topics, stdlib or a file")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--seeds", type=int, default=3, help="how many [3]")
    parser.add_argument("--updates", type=int, help="the baseline's; none: as in SIZES")
    parser.add_argument(
        "--shares", type=float, nargs="+", help="lengths of the recipe [0.1 ... 0.25]"
    )
    parser.add_argument("--brief", action="store_true", help="no run as long as the baseline's")
    parser.add_argument("--ablation", nargs="*", choices=ABLATION, help="leave out each ingredient")
    parser.add_argument("--tokenizers", nargs="+", help="compare them, in as many --seconds")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run [60]")
    args = parser.parse_args()
    if args.tokenizers:
        return compare_tokenizers(args.text, args.size, args.seconds, args.tokenizers)
    if args.updates:
        SIZES[args.size]["max_iters"] = args.updates
    splits, meta = open_text(args.text, args.tokenizer)
    SHARED.append(f"--vocab_size={meta['vocab_size']}")
    seeds = list(range(1, args.seeds + 1))
    if args.ablation is not None:
        names = args.ablation or ABLATION
        ablate(args.size, splits, seeds, (args.shares or [0.25])[0], names)
    else:
        compare(args.size, splits, seeds, args.shares or [0.1, 0.15, 0.2, 0.25], args.brief)


if __name__ == "__main__":
    main()
