"""Text from a trained model.

    python sample.py --start "Every effort"
    python sample.py                              on a terminal: type, read, type again
    python sample.py --start FILE:prompt.txt --num_samples 3 --temperature 0.8 --top_p 0.9
    python sample.py --start "Every effort" --top_logprobs 5
    echo "Every effort" | python sample.py
    python sample.py --score notes.txt            loss, perplexity and bits per byte of a text
    python sample.py --score val                  and of the dataset's own validation split
    python sample.py --export folder              weights, tokenizer for Hugging Face's transformers

The checkpoint alone says which model and which tokenizer it needs.

A score differs from train.py's losses for the same text: windows overlap, so that each token
after the first window has at least half a context before it, and there is no dropout.
"""

import codecs
import contextlib
import math
import re
import sys
import threading
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import prepare
from config import UserError, atomic_write, check_ranges, lock, parse, run, user_errors
from model import (
    GPT,
    TOKENIZER_FILES,
    check_finite,
    choose_device,
    import_transformers,
    load_checkpoint,
    load_model,
    prepack,
)

import torch
import torch.nn.functional as F


@dataclass
class SampleConfig:
    """All settings of sample.py."""

    # Model
    ckpt: str = "out/model.ckpt"  # checkpoint that train.py wrote, or its folder
    init_from: str | None = None  # other weights instead: gpt2, another name on the hub, a folder
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a name such as cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the weights
    # Text
    start: str | None = None  # prompt; FILE:path: read it from a file, -: from standard input
    num_samples: int = 1  # number of continuations, generated together
    max_new_tokens: int = 100  # maximum number of tokens in each continuation
    stop: bool = True  # end a sample at <|endoftext|>
    seed: int = 1337  # the same seed gives the same text
    # Choice of each token
    temperature: float = 0.8  # 0: the most likely token; 1: as predicted; higher: more varied
    top_k: int | None = 50  # among the k most likely tokens; none: among all
    top_p: float = 1.0  # among the most likely tokens that add up to this probability
    min_p: float = 0.0  # among tokens with at least min_p times the highest probability
    # Instead of a text
    top_logprobs: int | None = None  # list each token with this many alternatives
    score: str | None = None  # loss of a text: a file, - for standard input, or the split val
    export: str | None = None  # write the weights to this folder for Hugging Face's transformers

    def __post_init__(self):
        ranges = {"[0, 1]": "min_p", "(0, 1]": "top_p", "[0, 1e9]": "temperature"}
        ranges |= {"[0, inf)": "seed", "[1, 65536]": "num_samples"}
        check_ranges(self, ranges | {"[1, 1e12]": "max_new_tokens top_k top_logprobs"})
        uses = ("start", "top_logprobs", "score", "export")
        uses = [name for name in uses if getattr(self, name) is not None]
        if "" in (self.score, self.export):
            raise ValueError("--score and --export need a name")
        if self.export is not None and self.dtype != "auto":
            raise ValueError("--export writes float32: leave out --dtype")
        if len(uses) > 1 and uses != ["start", "top_logprobs"]:
            raise ValueError(f"--{uses[0]} and --{uses[-1]} exclude each other: leave one out")


def main(argv: list[str]):
    config = parse(SampleConfig, argv)
    name = config.init_from
    if name and "ckpt" in config.given:
        raise UserError("--ckpt and --init_from exclude each other: leave one out")
    device, dtype = choose_device(config.device, config.dtype)
    gpt, saved = load_model(name) if name else load_checkpoint(config.ckpt)
    saved.pop("optimizer", None)  # releases its memory
    if config.export is not None:
        return export(gpt, saved["tokenizer"], config.export)
    if saved["tokenizer"] is None:
        raise UserError(f"the model's tokenizer is not known ({saved.get('vocabulary')})")
    if config.score is not None and config.dtype == "auto":
        dtype = torch.float32  # a loss with all its digits
    gpt = prepack(gpt.to(device, dtype))
    tokenizer = prepare.get_tokenizer(saved["tokenizer"])
    if config.score is not None:
        score(config.score, saved, gpt, tokenizer)
    elif config.start is None and sys.stdin and sys.stdin.isatty():
        print("Type a prompt; an empty line quits, Ctrl-C ends the text being written.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  edit the line and recall earlier ones with arrow keys
        try:
            while prompt := input("> "):
                with contextlib.suppress(KeyboardInterrupt):
                    write(prompt, config, gpt, tokenizer)
                print()
        except EOFError:  # Ctrl-D
            print()
    else:
        write(read_prompt(config.start), config, gpt, tokenizer)


@torch.inference_mode()  # a few hundredths faster than no_grad
def write(prompt: str, config: SampleConfig, gpt: GPT, tokenizer):
    """Print the prompt and its continuations, the first one as it is generated."""
    device, end = gpt.transformer.wte.weight.device, tokenizer.eot_token
    idx = torch.tensor([encode(prompt, tokenizer, gpt)] * config.num_samples, device=device)
    rules = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    rules |= {"seed": config.seed, "stop_token": end if config.stop else None}
    shown = "" if config.start is None and prompt == prepare.ENDOFTEXT else prompt
    print(shown, end="\n" if config.top_logprobs else "", flush=True)
    # Holds back incomplete characters; shows bytes that are not UTF-8 as <e7>.
    decoder = codecs.getincrementaldecoder("utf-8")("hex")
    rows = []  # rows[i]: tokens of all samples at position i
    for token, logits in gpt.stream(idx, config.max_new_tokens, **rules):  # (B, 1), (B, V)
        check_finite(logits)
        rows.append(token[:, 0].tolist())
        id = rows[-1][0]
        if config.stop and id == end:
            continue  # the other samples may go on
        if config.top_logprobs:
            print(alternatives(id, logits[0], config.top_logprobs, tokenizer), flush=True)
        else:
            print(decoder.decode(prepare.token_bytes(tokenizer, id)), end="", flush=True)
    print()
    for ids in list(zip(*rows))[1:]:  # the other samples
        if config.stop and end in ids:
            ids = ids[: ids.index(end)]
        decoder.reset()
        text = decoder.decode(prepare.decode_bytes(tokenizer, ids))
        print("-" * 40 + f"\n{shown}{text}")


# --- A first reading may stop here ----------------------------------------------------------------


def read_prompt(start: str | None) -> str:
    """Return the prompt that `--start` names; without one, standard input or <|endoftext|>."""
    if start is None:
        said = "(reading a prompt from standard input; --start gives one)"
        timer = threading.Timer(1, print, [said], dict(file=sys.stderr, flush=True))
        timer.start()  # an open pipe in which nothing arrives
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, a notebook's, ...
            start = "-" if sys.stdin.buffer.peek(1) else None
        timer.cancel()
    if start is None:
        return prepare.ENDOFTEXT
    if start == "-" or start.startswith("FILE:"):
        text = prepare.read_text(start.removeprefix("FILE:"))
        return text.removesuffix("\n").removesuffix("\r")  # the end of its last line
    return start


def encode(prompt: str, tokenizer, gpt: GPT) -> list[int]:
    """Return the token ids of a prompt. Raises UserError if the model cannot read them."""
    ids = prepare.encode_prompt(prompt, tokenizer)
    if not ids:
        raise UserError("the prompt is empty: give one with --start")
    if max(ids) >= gpt.config.vocab_size:
        raise UserError(f"token id {max(ids)} of the prompt is not in the model's vocabulary")
    if len(ids) > (T := gpt.config.context_length):
        print(f"(a prompt of {len(ids):,} tokens: the model sees the last {T:,})", file=sys.stderr)
    return ids


def alternatives(id: int, logits: torch.Tensor, k: int, tokenizer) -> str:
    """Return a line with token `id` and the `k` most likely tokens, with their probabilities."""
    logprobs = logits.log_softmax(dim=-1)  # (V,)
    likeliest = logprobs.topk(min(k, len(logprobs)))

    def show(id, logprob):
        text = prepare.token_bytes(tokenizer, id).decode("utf-8", "hex")
        return f"{text!r} {100 * math.exp(logprob):.1f}%"

    others = "  ".join(map(show, likeliest.indices.tolist(), likeliest.values.tolist()))
    first = show(id, logprobs[id].item())
    wide = sum(unicodedata.east_asian_width(x) in "WF" for x in first)  # they take two columns
    return f"{first:<{max(0, 24 - wide)}} of  {others}"


BATCH_NUMBERS = 2**25  # numbers in the largest tensor of a forward pass while scoring


def read_validation(saved: dict) -> torch.Tensor:
    """Return the ids (N,) of the validation split that the model of a checkpoint was trained with.

    Raises UserError if the checkpoint names no dataset, or the dataset is another one by now.
    """
    if "dataset" not in saved.get("config", {}):
        raise UserError("--score val: these weights do not name their dataset; give a file")
    splits, _ = prepare.load_dataset(saved["config"]["dataset"], saved)
    return torch.from_numpy(splits["val"].astype("int64"))


@torch.no_grad()
def score(name: str, saved: dict, gpt: GPT, tokenizer):
    """Print the mean loss in nats per token, perplexity and bits per byte of a text.

    `name` is a file, or val: the validation split that the model of the checkpoint `saved` was
    trained with. The first token is not predicted. Windows overlap by half a context, so that
    beyond the first window each token has at least half a context before it.
    """
    if name == "val":
        ids = read_validation(saved)  # (N,)
    else:
        ids = prepare.encode(prepare.read_text(name), tokenizer)
        ids = torch.from_numpy(ids.astype("int64"))
    if len(ids) < 2:
        raise UserError("a text to score needs at least two tokens")
    if ids.max() >= gpt.config.vocab_size:
        raise UserError(f"token id {ids.max()} of the text is not in the model's vocabulary")
    device, C, V = gpt.transformer.wte.weight.device, gpt.config.n_embd, gpt.config.vocab_size
    T = min(gpt.config.context_length, len(ids) - 1)
    stride, rest = T - T // 2, len(ids) - 1 - T  # tokens beyond the first window
    count = 1 + -(-rest // stride)
    inputs = F.pad(ids[:-1], (0, stride)).unfold(0, T, stride)  # (at least `count`, T)
    targets = F.pad(ids[1:], (0, stride), value=-100).unfold(0, T, stride)
    batch = max(1, BATCH_NUMBERS // (T * max(V, 8 * C)))  # windows in a forward pass
    total, shown = 0.0, time.perf_counter()  # sum of the losses
    for first in range(0, count, batch):
        x, y = (rows[first : min(first + batch, count)].to(device) for rows in (inputs, targets))
        y = y.clone()
        y[0 if first else 1 :, : T // 2] = -100  # counted in the window before
        total += gpt(x, y).item() * (y != -100).sum().item()
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{first + len(x):,} of {count:,} windows", file=sys.stderr, flush=True)
    check_finite(torch.tensor(total))
    done, size = len(ids) - 1, int(prepare.token_sizes(tokenizer, V)[ids[1:]].sum())
    loss = total / done
    print(f"tokens         {done:,}\nloss           {loss:.4f} nats per token")
    print(f"perplexity     {math.exp(loss) if loss < 709 else math.inf:,.2f}")
    print(f"bits per byte  {total / math.log(2) / size:.4f}" if size else "no bytes")


def export(gpt: GPT, tokenizer: str | None, folder: str):
    """Write weights and tokenizer files for Hugging Face's transformers."""
    files, end, lacking = {}, None, "tokenizer files: its tokenizer is not known"
    import_transformers("--export")
    if tokenizer is not None:
        try:
            encoding = prepare.get_tokenizer(tokenizer)
            files, end = prepare.tokenizer_files(tokenizer), encoding.eot_token
            unnamed = gpt.config.vocab_size - encoding.n_vocab
            lacking = f"names of the last {unnamed:,} ids" if unnamed > 0 else ""
        except UserError as error:
            lacking = f"tokenizer files: {error}"
    with user_errors(), lock(folder):
        config = Path(folder, "config.json")
        if config.exists() and not re.search('"model_type": "(gpt2|nanochat)"', config.read_text()):
            raise UserError(f"{config} is not of a GPT: name a new folder")
        for path in sorted(Path(folder).glob("*")):
            if path.name.startswith(TOKENIZER_FILES) and files.get(path.name) != path.read_bytes():
                raise UserError(f"{path} may be another tokenizer's: name a new folder")
        named = tokenizer if tokenizer in prepare.BUILT_IN else None
        name = gpt.save_pretrained(folder, named, end)
        for path, content in files.items():
            with atomic_write(Path(folder, path)) as file:
                file.write(content)
    print(f"written: {folder}, for {name}.from_pretrained")
    if lacking:
        print(f"without {lacking}")


if __name__ == "__main__":
    run(main)
