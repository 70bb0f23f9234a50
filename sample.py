"""Text from a trained model.

    python sample.py --start "Every effort"
    python sample.py                              on a terminal: type, read, type again
    python sample.py --start FILE:prompt.txt --num_samples 3 --temperature 0.8 --top_p 0.9
    python sample.py --start "Every effort" --top_logprobs 5
    python sample.py --score notes.txt            loss, perplexity and bits per byte of a text
    python sample.py --export folder              the weights as Hugging Face's GPT-2

The checkpoint alone says which model and which tokenizer it needs.
"""

import codecs
import contextlib
import math
import os
import sys
from dataclasses import dataclass
from typing import Literal

# Large tensors in huge pages, which a CPU reads faster; PyTorch looks when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

import prepare
from config import UserError, parse, run, user_errors
from model import GPT, choose_device, load_model


@dataclass
class SampleConfig:
    """What to write, and how."""

    # Model
    ckpt: str = "out/model.ckpt"  # checkpoint that train.py wrote
    init_from: str | None = None  # instead of ckpt: gpt2, another name on the hub, or a folder
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a name such as cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    # Text
    start: str | None = None  # prompt; FILE:path: from a file, -: from standard input
    num_samples: int = 1  # how many continuations, produced together
    max_new_tokens: int = 100  # greatest length of each
    stop: bool = True  # end a sample at <|endoftext|>
    seed: int = 1337  # the same seed gives the same text
    # Choice of each token
    temperature: float = 0.8  # 0: always the likeliest; 1: as the model says; higher: wilder
    top_k: int | None = 50  # among the k likeliest; none: among all
    top_p: float = 1.0  # among the likeliest that add up to this probability
    min_p: float = 0.0  # among those at least this many times as likely as the likeliest
    # Instead of a text
    top_logprobs: int | None = None  # show this many alternatives to each token
    score: str | None = None  # a file, or - for standard input, to tell the loss of
    export: str | None = None  # a folder to write, that Hugging Face's transformers loads

    def __post_init__(self):
        bounds = {"num_samples": (1, 2**16), "max_new_tokens": (1, 2**40), "seed": (0, 2**62)}
        bounds |= {"temperature": (0, 1e9), "top_k": (1, 2**40), "min_p": (0, 1)}
        bounds |= {"top_logprobs": (1, 2**40)}
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                wanted = f"from {least} to {most}" if most == 1 else f"at least {least}"
                raise ValueError(f"{name} is {value}; it must be {wanted}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def read_prompt(start: str | None) -> str:
    """The prompt that `--start` means."""
    if start is None:
        return prepare.ENDOFTEXT
    if start == "-" or start.startswith("FILE:"):
        return prepare.read_text(start.removeprefix("FILE:"))
    return start


def encode(prompt: str, tokenizer, gpt: GPT) -> list[int]:
    """Token ids of a prompt, in which <|endoftext|> is the special token."""
    ids = tokenizer.encode(prompt, allowed_special={prepare.ENDOFTEXT}, disallowed_special=())
    if not ids:
        raise UserError("the prompt is empty: give one with --start")
    if max(ids) >= gpt.config.vocab_size:
        raise UserError(f"the prompt holds token {max(ids)}, which the model does not know")
    if len(ids) > (T := gpt.config.context_length):
        print(f"(a prompt of {len(ids):,} tokens: the model sees the last {T:,})", file=sys.stderr)
    return ids


@torch.inference_mode()  # a few hundredths faster than no_grad
def write(prompt: str, config: SampleConfig, gpt: GPT, tokenizer):
    """Print the prompt and its continuations, the first of them as it is produced."""
    device = gpt.transformer.wte.weight.device
    idx = torch.tensor([encode(prompt, tokenizer, gpt)] * config.num_samples, device=device)
    stream = gpt.stream(
        idx,
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.min_p,
        config.seed,
        tokenizer.eot_token if config.stop else None,
        compile=device.type == "cuda",
    )
    shown = "" if config.start is None and prompt == prepare.ENDOFTEXT else prompt
    rows = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character back
    print(shown, end="\n" if config.top_logprobs else "", flush=True)
    for token, logits in stream:
        rows.append(token[:, 0].tolist())
        id = rows[-1][0]
        if config.stop and id == tokenizer.eot_token:
            if config.num_samples == 1:
                break
        elif config.top_logprobs:
            print(alternatives(id, logits[0], config.top_logprobs, tokenizer), flush=True)
        else:
            print(decoder.decode(prepare.token_bytes(tokenizer, id)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    for ids in list(zip(*rows))[1:]:  # the other samples, which were produced beside the first
        if config.stop and tokenizer.eot_token in ids:
            ids = ids[: ids.index(tokenizer.eot_token)]
        print("-" * 40 + f"\n{shown}{prepare.decode(tokenizer, ids)}")


def alternatives(id: int, logits: torch.Tensor, k: int, tokenizer) -> str:
    """A line: the token that was produced, its probability, and the `k` likeliest with theirs."""
    logprobs = logits.log_softmax(dim=-1)  # (V,)
    likeliest = logprobs.topk(min(k, len(logprobs)))

    def show(id, logprob):
        return f"{prepare.decode(tokenizer, [id])!r} {100 * math.exp(logprob):.1f}%"

    others = "  ".join(map(show, likeliest.indices.tolist(), likeliest.values.tolist()))
    return f"{show(id, logprobs[id].item()):<24} of  {others}"


@torch.no_grad()
def score(text: str, gpt: GPT, tokenizer) -> tuple[float, float, int]:
    """Mean loss in nats per token, bits per byte and tokens, of all tokens after the first.

    Windows overlap by half a context, so that beyond the first each token has at least that much
    before it.
    """
    ids = torch.tensor(tokenizer.encode_ordinary(text))
    if len(ids) < 2:
        raise UserError("a text to score needs at least two tokens")
    if ids.max() >= gpt.config.vocab_size:
        raise UserError(f"the text holds token {ids.max()}, which the model does not know")
    T, device = gpt.config.context_length, gpt.transformer.wte.weight.device
    total, done = 0.0, 0  # loss and number of the tokens so far
    while done < len(ids) - 1:
        start = max(0, done - T // 2)
        window = ids[start : start + T + 1].to(device)[None]  # (1, at most T + 1)
        targets = window[:, 1:].clone()
        targets[:, : done - start] = -100  # already counted
        new = start + targets.shape[1] - done
        total += gpt(window[:, :-1], targets).item() * new
        done += new
    count = len(prepare.decode_bytes(tokenizer, ids[1:].tolist()))
    return total / done, total / math.log(2) / count, done


def main(argv: list[str]):
    config = parse(SampleConfig, argv)
    with user_errors():
        device, dtype = choose_device(config.device, config.dtype)
        gpt = load_model(config.init_from) if config.init_from else GPT.from_checkpoint(config.ckpt)
    if config.score and config.dtype == "auto":
        dtype = torch.float32  # a loss deserves all its digits
    name = gpt.checkpoint.get("tokenizer", "gpt2")
    if config.export:
        with user_errors():
            gpt.save_pretrained(config.export, name)
            if name == "gpt2":
                prepare.save_gpt2_tokenizer(config.export)
        print(f"written: {config.export}, for GPT2LMHeadModel.from_pretrained")
        return
    gpt.checkpoint = None
    gpt.to(device, dtype).eval()
    if device.type == "cpu":
        gpt.pack()
    tokenizer = prepare.get_tokenizer(name)
    if config.score:
        loss, bits, tokens = score(prepare.read_text(config.score), gpt, tokenizer)
        print(f"tokens         {tokens:,}\nloss           {loss:.4f} nats per token")
        print(f"perplexity     {math.exp(min(loss, 700)):,.2f}\nbits per byte  {bits:.4f}")
    elif config.start is None and sys.stdin and sys.stdin.isatty():
        print("Type a prompt; an empty line ends, Ctrl-C cuts a text short.")
        while prompt := read_line():
            with contextlib.suppress(KeyboardInterrupt):
                write(prompt, config, gpt, tokenizer)
            print()
    else:
        write(read_prompt(config.start), config, gpt, tokenizer)


def read_line() -> str:
    """A line from the terminal; empty at its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys edit the line and bring back earlier ones
    try:
        return input("> ")
    except EOFError:
        print()
        return ""


if __name__ == "__main__":
    run(main)
