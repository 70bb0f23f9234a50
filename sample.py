"""Text from a trained model.

    python sample.py --start "Every effort"
    python sample.py --start FILE:prompt.txt --num_samples 3 --temperature 0.8 --top_k 50
    echo "Every effort" | python sample.py --start -

The checkpoint alone says which model and which tokenizer it needs.
"""

import codecs
import sys
from dataclasses import dataclass

import torch

import prepare
from config import UserError, parse, run, user_errors
from model import GPT, choose_device


@dataclass
class SampleConfig:
    """What to write, and how."""

    start: str | None = None  # prompt; FILE:path: from a file, -: from standard input
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 100  # length of each
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model says; higher: wilder
    top_k: int | None = 50  # draw from the k likeliest tokens alone; none: from all
    seed: int = 1337  # the same seed gives the same text
    ckpt: str = "out/model.ckpt"  # checkpoint that train.py wrote
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a name such as cuda:1

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or none")


def read_prompt(start: str | None) -> str:
    """The prompt that `--start` means."""
    if start is None:
        return prepare.ENDOFTEXT
    if start == "-":
        return sys.stdin.read()
    if start.startswith("FILE:"):
        return prepare.read_text(start.removeprefix("FILE:"))
    return start


def main(argv: list[str]):
    config = parse(SampleConfig, argv)
    with user_errors():
        device, _ = choose_device(config.device)
        gpt = GPT.from_checkpoint(config.ckpt).to(device).eval()
    tokenizer = prepare.get_tokenizer(gpt.checkpoint.get("tokenizer", "gpt2"))
    prompt = read_prompt(config.start)
    ids = tokenizer.encode(prompt, allowed_special={prepare.ENDOFTEXT}, disallowed_special=())
    if not ids:
        raise UserError("the prompt is empty: give one with --start")
    if max(ids) >= gpt.config.vocab_size:
        raise UserError(f"the prompt holds token {max(ids)}, which the model does not know")
    generator = torch.Generator(device).manual_seed(config.seed)
    idx = torch.tensor([ids], device=device)
    for number in range(config.num_samples):
        if number:
            print("-" * 40)
        print("" if config.start is None else prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # never half a character
        for token in gpt.stream(
            idx, config.max_new_tokens, config.temperature, config.top_k, generator
        ):
            piece = prepare.token_bytes(tokenizer, token.item())
            print(decoder.decode(piece), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
