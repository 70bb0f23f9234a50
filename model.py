"""The GPT-2 model: network, loss, generation, optimizers, and weights in and out.

    gpt = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    logits = gpt(idx)           # (B, T) token ids -> (B, T, V)
    loss = gpt(idx, targets)    # mean cross-entropy in nats, a scalar
    gpt.generate(idx, max_new_tokens=20)

Read from top to bottom: attention, MLP, block, GPT. In shape comments B is the batch, T the tokens
of a sequence, C the channels (`n_embd`), V the vocabulary, H the heads, D = C / H the channels of a
head and L the layers.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Tensors have the
names of OpenAI's release, as in nanoGPT and Hugging Face transformers.
"""

import contextlib
import copy
import hashlib
import math
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from config import UserError, atomic_write, check_ranges

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """The shape of a model."""

    # Model (the defaults are GPT-2 with 124M parameters)
    vocab_size: int = 50257  # number of token ids
    context_length: int = 1024  # maximum number of tokens the model can attend to
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels (size of an embedding), a multiple of n_head
    dropout: float = 0.0  # probability of zeroing an activation in training
    bias: bool = True  # biases in Linear and LayerNorm
    qkv_bias: bool = True  # biases of queries, keys and values (false in the book)
    tie_weights: bool = True  # embedding and output head share one matrix (false in the book)
    embedding_std: float = 0.02  # standard deviation of the initial embeddings (1 in the book)
    # Model, newer than GPT-2 (config/modern.py sets them)
    rotary: bool = False  # rotary positions (Su et al. 2021) instead of learned ones
    rms_norm: bool = False  # RMSNorm without gains (Zhang & Sennrich 2019) instead of LayerNorm
    qk_norm: bool = False  # normalize queries and keys (Henry et al. 2020)

    def __post_init__(self):
        sizes = "vocab_size context_length n_layer n_head n_embd"
        ranges = {"[1, 1e12)": sizes, "[0, inf)": "embedding_std", "[0, 1)": "dropout"}
        check_ranges(self, ranges)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError("rotary needs an even number of channels in a head: n_embd / n_head")


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and earlier ones (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cache=None, angles=None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if self.qk_norm or angles is not None:
            q, k, v = normalize_and_rotate(qkv, self.qk_norm, angles)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, all tokens so far, D)
            q = q.to(k.dtype)
        # softmax(q k^T / sqrt(D) + mask) v: the causal mask is -inf where a key comes after the
        # query. A single query is the newest token, so that there is nothing to mask.
        dropout_p = self.dropout if self.training else 0.0
        y = attention(q, k, v, dropout_p)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)  # concatenate the heads
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers, 4C wide in between, applied to each position separately."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        return self.c_proj(gelu(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each reads a normalized copy of `x` and adds its result to `x`."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, cache=None, angles=None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, angles))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """Map token ids to a logit for every possible next token."""

    activation_checkpointing = False  # recompute activations in the backward pass to save memory

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.Module()  # only holds the parts; their names are GPT-2's
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.transformer.drop = Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie_weights()
        self.apply(self._init_weights)
        for embedding in (self.transformer.wte, self.transformer.wpe):
            nn.init.normal_(embedding.weight, std=config.embedding_std)
        if config.rotary:  # created above so that the other weights' random numbers are kept
            del self.transformer.wpe

    def _tie_weights(self):
        if self.config.tie_weights:  # Press & Wolf 2017, "Using the Output Embedding"
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module: nn.Module):
        """Draw weights with GPT-2's std of 0.02, divided by sqrt(2 n_layer) in each `c_proj`."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # `apply` has visited its Linears
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache=None) -> Tensor:
        """Return logits (B, T, V), or with `targets` the mean cross-entropy in nats, a scalar.

        idx and targets are int64 (B, T), with T at most `context_length`; targets of -100 are
        ignored. With a `cache` (a KVCache, advanced by T) idx holds the tokens after the cached
        ones; T must be 1 unless the cache was empty. Logits are (B, 1, V), of the last position.
        """
        T = idx.shape[1]
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions
        x, angles = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.rotary:
            angles = rotation(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        if self.config.rms_norm:
            x = self.transformer.ln_f(x)  # no parameters: ln_f serves here too
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:  # Chen et al. 2016
                x = torch.utils.checkpoint.checkpoint(block, x, None, angles, use_reentrant=False)
            else:
                x = block(x, cache, angles)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V), with a cache (B, 1, V)
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)  # 16 bits are too few for the sum
        return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())  # (B T, V), (B T)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue `idx` (B, T) int64 and return (B, T + new), with new <= `max_new_tokens`.

        `temperature` 0 takes the token with the largest logit; otherwise tokens are drawn from
        softmax(logits / temperature), restricted as `sample_token` says. Each row draws its random
        numbers from `seed` and its own number, independently of other rows. A row that has produced
        `stop_token` repeats it; generation ends when all rows have.

        With `use_cache` (see `stream`) each token is computed once; when the context is full, it is
        cut to its last half. Without `use_cache`, the last `context_length` tokens are computed
        again for each new token. Both give the same tokens until the context is full.
        """
        if not isinstance(idx, Tensor) or idx.dim() != 2 or not idx.numel():
            advice = "for a text, give torch.tensor([tokenizer.encode(text)])"
            raise ValueError(f"idx must be a tensor (B, T) of token ids, not empty: {advice}")
        rules = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        if use_cache:
            for token, _ in self.stream(idx, max_new_tokens, seed, stop_token, **rules):
                idx = torch.cat((idx, token), dim=1)
            return idx
        # The loop of the book.
        generators = make_generators(seed, len(idx))
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        with evaluation_mode(self):
            for _ in range(max_new_tokens):
                context = idx[:, -self.config.context_length :]  # crop
                logits = self(context)[:, -1].float()  # forward: (B, T, V) -> (B, V)
                token = sample_token(logits, generators, **rules)  # (B, 1)
                token, ended = repeat_stop(token, ended, stop_token)
                idx = torch.cat((idx, token), dim=1)  # append
                if ended.all():
                    break
        return idx

    # --- A first reading may stop here ------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, seed=None, stop_token=None, **rules):
        """Yield each new token (B, 1) of `generate` with its logits (B, V), using a `KVCache`.

        The arguments are those of `generate`; `rules` go to `sample_token`.
        Keys depend on their positions, so a full cache cannot slide: it is recomputed from the last
        half of the context. A prompt that all rows share is computed once.
        """
        B, T = len(idx), self.config.context_length
        # A few tokens do not repay the time that packing takes.
        gpt = prepack(self) if idx.is_cpu and max_new_tokens >= 16 else self
        generators = make_generators(seed, B)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        idx = idx[:, -T:]
        new = idx[:1] if (idx == idx[:1]).all() else idx
        size = min(T, idx.shape[1] + max_new_tokens)
        cache = KVCache(self.config, len(new), size, self.transformer.wte.weight)
        with evaluation_mode(gpt):
            for _ in range(max_new_tokens):
                if cache.length == T:
                    new, cache.length = idx[:, -max(1, T // 2) :], 0
                cache.advance(new.shape[1])
                logits = gpt(new, cache=cache)[:, -1].float()  # (B, V)
                if len(logits) < B:  # (1, V) of a shared prompt
                    logits = logits.repeat(B, 1)
                    cache.kv = cache.kv.repeat(1, 1, B, 1, 1, 1)
                token = sample_token(logits, generators, **rules)  # (B, 1)
                token, ended = repeat_stop(token, ended, stop_token)
                yield token, logits
                if stop_token is not None and ended.all():
                    break
                new, idx = token, torch.cat((idx, token), dim=1)[:, -T:]

    def crop_context(self, context_length: int):
        """Shorten the context; the embeddings of later positions are removed."""
        self.config.context_length = context_length
        if not self.config.rotary:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:context_length].clone())

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_checkpoint(cls, path: str, **changes) -> "GPT":
        """Return the model in a checkpoint file, in evaluation mode; see `load_model`."""
        return load_checkpoint(path, **changes)[0]

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> "GPT":
        """Return a Hugging Face model from a folder or the hub, in evaluation mode."""
        return load_hugging_face(name, **changes)[0]

    def save_pretrained(self, folder: str, tokenizer: str | None, end_token: int | None) -> str:
        """Write config.json and weights for transformers; return transformers' class name.

        `tokenizer` is stored in config.json; `load_model` returns it if the folder has no tokenizer
        files. `end_token` is the id at which transformers stops. Raises ValueError if transformers
        lacks such a model, or if a weight is not finite.
        """
        check_finite(*self.parameters())
        transformers = import_transformers("export")
        ends = dict(bos_token_id=end_token, eos_token_id=end_token, pad_token_id=None)
        config = transformers_config(self.config, tokenizer=tokenizer, **ends)
        exported = transformers.AutoModelForCausalLM.from_config(config)
        exported.to(self.lm_head.weight)  # its device and dtype
        for theirs, ours, rows in pair_tensors(exported, self):
            theirs.copy_(torch.zeros_like(theirs) if ours is None else ours[rows])
        compare_logits(self, exported)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            exported.save_pretrained(unfinished, max_shard_size="1TB")  # a single file
            for path in Path(unfinished).iterdir():
                with atomic_write(Path(folder, path.name)) as file, open(path, "rb") as source:
                    shutil.copyfileobj(source, file)
        Path(folder, "model.safetensors.index.json").unlink(missing_ok=True)  # an earlier model's
        return type(exported).__name__


# --- Generation: one token at a time --------------------------------------------------------------


class KVCache:
    """The keys and values of all tokens so far, so that each is computed only once.

    Has room for `size` tokens of B sequences on the device of `like`, in its dtype; on a CPU in
    float32, in which PyTorch's attention is several times as fast there as in bfloat16.
    """

    def __init__(self, config: GPTConfig, B: int, size: int, like: Tensor):
        D = config.n_embd // config.n_head
        dtype = torch.float32 if like.is_cpu else like.dtype
        self.kv = like.new_zeros(config.n_layer, 2, B, config.n_head, size, D, dtype=dtype)
        self.length = 0

    def advance(self, T: int):
        """Make room for T more tokens; called before each forward pass."""
        self.positions = torch.arange(self.length, self.length + T, device=self.kv.device)  # (T,)
        self.length += T
        # Slicing once for all layers is faster than in each.
        kv = self.kv.flatten(0, 1)  # (2 L, B, H, size, D)
        self.new = kv[:, :, :, self.length - T : self.length].unbind()
        self.seen = kv[:, :, :, : self.length].unbind()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Store a layer's new keys and values (B, H, T, D); return both for all tokens so far."""
        self.new[2 * layer].copy_(k)
        self.new[2 * layer + 1].copy_(v)
        return self.seen[2 * layer : 2 * layer + 2]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Switch dropout off within a `with` block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def make_generators(seed: int | None, B: int) -> list[torch.Generator]:
    """Return a random number generator for each row, seeded with `seed` and the row."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))

    def key(row: int) -> int:
        if row == 0 and seed < 2**32:  # torch.Generator uses 32 bits
            return seed
        return int(hashlib.sha256(f"{seed} {row}".encode()).hexdigest()[:8], 16)

    return [torch.Generator().manual_seed(key(row)) for row in range(B)]


def repeat_stop(token: Tensor, ended: Tensor, stop_token: int | None) -> tuple[Tensor, Tensor]:
    """Return `token` (B, 1), with `stop_token` in rows that have `ended`, and the new `ended`."""
    if stop_token is None:
        return token, ended
    token = token.masked_fill(ended, stop_token)
    return token, ended | (token == stop_token)


def sample_token(
    logits: Tensor,
    generators: list[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one token (B, 1) for each row of `logits` (B, V); temperature 0 takes the most likely.

    Three rules apply in turn: keep the `top_k` most likely tokens; of these the fewest whose
    probabilities add up to `top_p` (nucleus sampling, Holtzman et al. 2020); of these the tokens at
    least `min_p` times as likely as the most likely one (Nguyen et al. 2024).
    """
    if not (temperature >= 0 and (top_k is None or top_k >= 1) and 0 < top_p <= 1 and min_p <= 1):
        limits = "temperature must be at least 0, top_k at least 1 or None"
        raise ValueError(f"{limits}, top_p above 0 and at most 1, min_p at most 1")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    device = logits.device
    logits = logits.to("cpu" if device.type == "mps" else device)  # MPS has no float64
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)  # avoids overflow
    probabilities = F.softmax(logits / temperature, dim=-1)  # (B, V)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # sum of the more likely tokens
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    if min_p > 0:
        highest = probabilities.amax(dim=-1, keepdim=True)  # (B, 1)
        probabilities = probabilities.masked_fill(probabilities < min_p * highest, 0)
    # Inverse transform sampling: the first token whose cumulative sum exceeds a random number.
    sums = probabilities.cumsum(dim=-1)  # (B, V)
    u = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
    token = torch.searchsorted(sums, u.to(sums.device) * sums[:, -1:], right=True)  # (B, 1)
    return token.clamp(max=logits.shape[-1] - 1).to(device)


# --- Newer than GPT-2 -----------------------------------------------------------------------------


def norm(config: GPTConfig) -> nn.Module:
    """Return a LayerNorm, or with `rms_norm` an RMSNorm without parameters."""
    if config.rms_norm:
        return RMSNorm()
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rotation(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for `rotate`, each (T, 1, 1, D); the first D/2 sines are negated.

    The angle of channel pair i
    at position t of `positions` (T,) is t * 10,000^(-2i/D) radians.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angles = (positions[:, None] * frequencies)[:, None, None]  # (T, 1, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + D/2) of queries and keys `x` (B, T, 2, H, D)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # the other channel of each pair
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def normalize_and_rotate(qkv: Tensor, qk_norm: bool, angles) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, H, T, D) each, of `qkv` (B, T, 3, H, D).

    Queries and keys are normalized with `qk_norm`, and rotated by `angles` unless these are None:
    as one tensor, which takes less time than two.
    """
    qk, v = qkv.split((2, 1), dim=2)  # (B, T, 2, H, D), (B, T, 1, H, D)
    if qk_norm:
        qk = rms_norm(qk)
    if angles is not None:
        qk = rotate(qk, *angles)
    return *qk.transpose(1, 3).unbind(2), v.transpose(1, 3).squeeze(2)


# --- Faster on a CPU ------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """Return GELU (Hendrycks & Gimpel 2016) of `x` in OpenAI's form, with a tanh.

    In bfloat16 on a CPU, return the exact form, with an error function, in a third of the time. The
    forms differ by less than 0.0005, the spacing of bfloat16 numbers near 0.1.
    """
    exact = x.is_cpu and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `F.dropout(x, p)`; on a CPU with random numbers of numpy's SFC64.

    F.dropout takes most of its time there for random numbers, and SFC64 is about twice as fast.
    An element is dropped if a random integer of as many bits is below a bound, so for 16-bit
    elements `p` is rounded to a multiple of 2^-16.
    """
    if not x.is_cpu or torch.compiler.is_compiling():  # numpy cannot be compiled
        return F.dropout(x, p)
    bits = 8 * x.element_size()
    integer = getattr(torch, f"int{bits}")
    seed = int(torch.randint(2**63 - 1, ()))  # so that the mask follows from torch.manual_seed
    numbers = np.random.SFC64(seed).random_raw(-(-x.numel() * bits // 64))  # of 64 bits each
    numbers = torch.from_numpy(numbers).view(integer)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**bits), 2**bits - 1)  # of the 2^bits integers
    scale = torch.tensor(2**bits / (2**bits - dropped), dtype=x.dtype)
    # An integer 0 or 1 times the bits of `scale` is the bits of 0 or of `scale`.
    keep = numbers.ge_(dropped - 2 ** (bits - 1)).mul_(scale.view(integer))
    return x * keep.view(x.dtype)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the function above."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class RMSFunction(torch.autograd.Function):
    """`rms_norm` in a quarter to half of the time that F.rms_norm takes on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)  # (..., 1)
        scale = (length.square() / x.shape[-1] + 1e-5).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(dim=-1, keepdim=True)  # along * y: the part of grad parallel to y
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def rms_norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + 1e-5), with the mean over the last dimension."""
    if x.is_cpu and x.requires_grad:
        return RMSFunction.apply(x)
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


class RMSNorm(nn.Module):
    """`rms_norm` as a module."""

    forward = staticmethod(rms_norm)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Return causal attention (B, H, T, D), by `F.scaled_dot_product_attention`.

    q, k and v are (B, H, T, D); a single query (B, H, 1, D) attends to all keys.
    On a CPU the formula is written out where this is faster than PyTorch's function: with dropout,
    and in 16 bits for T <= 512, where the weights (T, T) of each head need little memory.
    """
    B, _, T, D = q.shape
    if not q.is_cpu or not (dropout_p or (T <= 512 and q.dtype != torch.float32)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout_p)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B H, T, D)
    mask = q.new_full((T, T), -math.inf).triu(1)  # -inf for the later positions of each row
    weights = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D)).softmax(dim=-1)  # (B H, T, T)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    return (weights @ v).unflatten(0, (B, -1))  # (B, H, T, D)


def gradient_norm(gpt: nn.Module) -> Tensor:
    """Return the norm, a scalar, of the vector of all gradients of `gpt`.

    On a CPU the norm of a matrix takes PyTorch three times as long as the norms of its rows, and
    rounding makes it too small: by 0.3 % for 39 million random numbers.
    """
    gradients = [p.grad for p in gpt.parameters()]
    if gradients[0].is_cpu:
        gradients = [torch.linalg.vector_norm(g, dim=-1) if g.dim() > 1 else g for g in gradients]
    return torch.nn.utils.get_total_norm(gradients)


class PackedLinear(nn.Module):
    """A Linear without gradients: oneDNN's layout multiplies a few rows in half the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        # The operator that torch.compile uses for a Linear on a CPU; looked up once.
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.packed, self.bias, "none", [], "")


def prepack(gpt: GPT, dtype: torch.dtype | None = None) -> GPT:
    """Return a copy of `gpt` for generation, in `dtype`, with PackedLinears on a CPU.

    Other weights are shared with `gpt` unless their dtype changes. Where oneDNN cannot pack, the
    copy keeps its Linears. A packed model, or FSDP's shards, are returned as they are.
    """
    weight = gpt.transformer.wte.weight
    if isinstance(gpt.lm_head, PackedLinear) or hasattr(weight, "full_tensor"):  # FSDP's DTensor
        return gpt
    weights = {
        id(p): nn.Parameter(p.detach().to(dtype or p.dtype), requires_grad=False)
        for p in gpt.parameters()
    }
    packed = copy.deepcopy(gpt, weights).eval()
    with contextlib.suppress(AttributeError, RuntimeError):  # no oneDNN, or not for this dtype
        for name, module in list(packed.named_modules()):
            if isinstance(module, nn.Linear) and weight.is_cpu:
                packed.set_submodule(name, PackedLinear(module))
    return packed


# --- Counting -------------------------------------------------------------------------------------


def count_parameters(config: GPTConfig) -> tuple[int, int]:
    """Return the numbers of all parameters and of the parameters of Linears, by arithmetic.

    A tied head counts once in the first number.
    """
    C, L = config.n_embd, config.n_layer
    multiplied = 12 * L * C * C + config.vocab_size * C  # blocks and head
    wte = 0 if config.tie_weights else config.vocab_size * C
    wpe = 0 if config.rotary else config.context_length * C
    biases = L * C * (6 + 3 * config.qkv_bias) if config.bias else 0
    norms = 0 if config.rms_norm else (2 * L + 1) * C * (1 + config.bias)
    return multiplied + wte + wpe + biases + norms, multiplied


def flops_per_token(config: GPTConfig) -> int:
    """Return the floating-point operations per token of forward and backward pass, full context.

    6 for each parameter in a matrix product, and 12 L T C for attention (Chowdhery et al. 2022,
    "PaLM", appendix B); recomputed activations do not count.
    """
    _, multiplied = count_parameters(config)
    return 6 * multiplied + 12 * config.n_layer * config.context_length * config.n_embd


# --- Optimizers -----------------------------------------------------------------------------------


def make_optimizers(gpt: GPT, config, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return [AdamW] for all parameters, or [AdamW, Muon] with Muon for the blocks' matrices.

    `config` is a TrainConfig; Muon multiplies matrices in `dtype`. The training loop sets the
    learning rate of each parameter group to `lr_scale` times the base learning rate.
    """
    settings = dict(betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        matrices = [p for p in gpt.parameters() if p.dim() >= 2]
        vectors = [p for p in gpt.parameters() if p.dim() < 2]  # biases and gains do not decay
        groups = [
            dict(params=matrices, lr_scale=1.0, weight_decay=config.weight_decay),
            dict(params=vectors, lr_scale=1.0, weight_decay=0.0),
        ]
        return [torch.optim.AdamW(groups, config.learning_rate, **settings)]
    matrices = [p for p in gpt.transformer.h.parameters() if p.dim() == 2]
    head = [] if config.tie_weights else [gpt.lm_head.weight]
    in_matrices_or_head = {id(p) for p in matrices + head}
    others = [p for p in gpt.parameters() if id(p) not in in_matrices_or_head]
    base = config.learning_rate or 1
    scale, head_scale = config.embedding_learning_rate / base, config.head_learning_rate / base
    groups = [dict(params=others, lr_scale=scale)]
    if head:
        groups.append(dict(params=head, lr_scale=head_scale * 128 / config.n_embd))
    adamw = torch.optim.AdamW(groups, weight_decay=0.0, **settings)
    groups = [dict(params=matrices, lr_scale=1.0, weight_decay=config.weight_decay)]
    return [adamw, Muon(groups, dtype, config.muon_interval, momentum=config.momentum)]


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Differs from PyTorch's class:
    - matrix products are in `dtype`, not always in bfloat16, which is slow on many CPUs;
    - queries, keys and values are separate matrices;
    - each matrix is updated in one of `interval` updates, with `interval` times the learning rate:
      with small batches Muon takes as long as the gradients, and momentum changes slowly;
    - under torch.distributed each rank computes a share of the matrices.
    """

    def __init__(self, params, dtype: torch.dtype, interval: int = 1, **settings):
        super().__init__(params, **settings)
        self.dtype, self.interval = dtype, interval
        self.step_number = 0  # set by the training loop

    @torch.no_grad()
    def step(self, closure=None):
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            lr = torch.tensor(group["lr"]) * self.interval  # so that products are in float32
            momentum = group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            # Each matrix whose (step_number + index) is a multiple of the interval.
            due = group["params"][-self.step_number % self.interval :: self.interval]
            by_shape = {}  # matrices of one shape are stacked and updated together
            for p in due[rank::world_size]:
                # Nesterov momentum
                update = p.grad.lerp(self.state[p]["momentum_buffer"], momentum)
                by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                params, updates = zip(*pairs)
                M = columns if rows == 3 * columns else rows  # queries, keys and values apart
                updates = torch.stack(updates).view(-1, M, columns)
                updates = newton_schulz(updates, self.dtype, group["ns_steps"])
                for p, update in zip(params, updates.view(-1, rows, columns)):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(lr * math.sqrt(max(1, M / columns)) * update)
            if world_size > 1:
                for index, p in enumerate(due):
                    dist.broadcast(p, index % world_size)


def newton_schulz(x: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Return the orthogonal matrices nearest to `x` (n, M, N), approximately, in `dtype`.

    Their singular values are between 0.7 and 1.2. Newton-Schulz iteration with the coefficients of
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)).to(dtype)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(steps):
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A
        x = torch.baddbmm(x, B, x, beta=3.4445)  # 3.4445 x + B x
    return x.mT if tall else x


# --- Checkpoints ----------------------------------------------------------------------------------


def load_model(name: str, **changes) -> tuple[GPT, dict]:
    """Return a model and what else is stored with it, such as "tokenizer".

    `name` is a checkpoint file (of train.py, nanoGPT or the book), a folder with a GPT-2 or
    NanoChat in Hugging Face's format, or a name on their hub. The model is in evaluation mode, in
    float32, on the CPU. `changes` are fields of GPTConfig to override, such as `dropout`.
    "tokenizer" is None if it is not known, and "vocabulary" then describes it. Raises ValueError,
    saying why, if there is no such model.
    """
    in_folder = any(os.path.exists(os.path.join(name, x)) for x in ("model.ckpt", "ckpt.pt"))
    if os.path.isfile(name) or in_folder or str(name).endswith((".ckpt", ".pt", ".pth")):
        return load_checkpoint(name, **changes)
    return load_hugging_face(name, **changes)


def load_checkpoint(path: str, **changes) -> tuple[GPT, dict]:
    """Return the model in a checkpoint file and the file's other contents; see `load_model`.

    Runs no code in the file. Raises ValueError, saying why, unless the file is from train.py or
    nanoGPT, or holds a state dict of the book's GPTModel, alone or as "model_state_dict".
    """
    if os.path.isdir(path):  # of train.py, or nanoGPT's
        nano = os.path.join(path, "ckpt.pt")
        path = nano if os.path.exists(nano) else os.path.join(path, "model.ckpt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip archive
            if archive.testzip():  # torch.load does not verify the checksums
                raise ValueError("it is damaged, its checksums do not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        book = checkpoint.get("model_state_dict", checkpoint)
        if any(str(name).endswith("tok_emb.weight") for name in book):  # section 5.4
            checkpoint = {"model": book}
        elif not {"model", "model_args"} <= set(checkpoint):
            raise ValueError("it lacks model or model_args, which train.py writes")
        state = rename_tensors(checkpoint.pop("model"))
        args = checkpoint.pop("model_args") if "model_args" in checkpoint else book_shape(state)
        if "block_size" in args:  # nanoGPT's name
            args["context_length"] = args.pop("block_size")
            tied = state["lm_head.weight"].equal(state["transformer.wte.weight"])
            args.setdefault("tie_weights", tied)  # programs derived from nanoGPT may not tie them
        gpt = from_state(GPTConfig(**args | changes), state)
        if "tokenizer" not in checkpoint:
            checkpoint |= guess_tokenizer(gpt.config.vocab_size)
        return gpt, checkpoint
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; train.py writes one") from None
    except zipfile.BadZipFile:
        raise UserError(f"cannot read {path}: it is truncated, or not a checkpoint") from None
    except Exception as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


# The names of modules and parameters in the book's GPTModel (chapter 4), and here.
BOOK_NAMES = {"tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "out_head": "lm_head"}
BOOK_NAMES |= {"trf_blocks": "transformer.h", "final_norm": "transformer.ln_f"}
BOOK_NAMES |= {"norm1": "ln_1", "norm2": "ln_2", "scale": "weight", "shift": "bias"}
BOOK_NAMES |= {"att.out_proj": "attn.c_proj", "att.W_query": "attn.c_attn"}
BOOK_NAMES |= {"ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj"}


def rename_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of train.py, nanoGPT or the book by the names of GPT's parameters."""
    state = {}
    for given_name, tensor in tensors.items():
        name = given_name.removeprefix("_orig_mod.").removeprefix("module.")
        if "att.W_query." in name:  # the book has three matrices (C, C), here is one, (3C, C)
            others = [given_name.replace("W_query", other) for other in ("W_key", "W_value")]
            tensor = torch.cat([tensor, *(tensors[other] for other in others)])
        for theirs, ours in BOOK_NAMES.items():
            name = name.replace(theirs, ours)
        # Without W_key, W_value and the causal masks of the book and of old nanoGPT.
        if ".att." not in name and not name.endswith(".attn.bias"):
            state[name] = tensor
    return state


def book_shape(state: dict[str, Tensor]) -> dict:
    """Return the fields of GPTConfig of a model of the book, from its renamed tensors."""
    (V, C), T = state["transformer.wte.weight"].shape, len(state["transformer.wpe.weight"])
    if C % 64:
        raise ValueError(f"its number of heads is not known: {C} channels are not the book's")
    print(f"(heads are not stored: {C // 64} assumed, as in the book's models)", file=sys.stderr)
    shape = dict(vocab_size=V, context_length=T, n_embd=C, n_head=C // 64, tie_weights=False)
    shape["n_layer"] = len({name.split(".")[2] for name in state if ".h." in name})
    return shape | {"qkv_bias": "transformer.h.0.attn.c_attn.bias" in state}


def guess_tokenizer(vocab_size: int) -> dict:
    """Return {"tokenizer": ...} of weights that name none: gpt2 by its size, otherwise None."""
    if vocab_size in (50257, 50304):  # 50,304 with nanoGPT's padding
        print(f"(no tokenizer named: {vocab_size:,} ids, so GPT-2's is assumed)", file=sys.stderr)
        return {"tokenizer": "gpt2"}
    return {"tokenizer": None, "vocabulary": f"{vocab_size:,} ids without names"}


def check_finite(*tensors: Tensor):
    """Raise UserError unless all numbers in `tensors` are finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError("the model has or computes NaN or infinity: damaged, or a bad --dtype")


def one_line(error: Exception) -> str:
    """Return an error's message, or its first two lines that are not blank, as one line."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it would run code when loaded, which is refused: do not trust its source"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(" ".join(lines[:2]).split()) or repr(error)


def from_state(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """Return a model whose parameters are the tensors of `state`, in evaluation mode.

    Raises an error where they do not fit.
    """
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # before building what a damaged file asks for
        raise ValueError(f"tensors of {len(layers)} layers, but n_layer is {config.n_layer}")
    with torch.device("meta"):  # allocates no memory
        gpt = GPT(config)
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    gpt.load_state_dict(state, assign=True)
    gpt._tie_weights()
    return gpt.eval()


# --- Hugging Face ---------------------------------------------------------------------------------

# Fields of GPTConfig, and their names in transformers' configs.
CONFIG_NAMES = dict(vocab_size="vocab_size", n_embd="hidden_size", n_layer="num_hidden_layers")
CONFIG_NAMES |= dict(n_head="num_attention_heads", context_length="max_position_embeddings")
CONFIG_NAMES |= dict(tie_weights="tie_word_embeddings")

# The other fields of GPTConfig of each model type of transformers, and the names of its dropouts.
ARCHITECTURES = {"gpt2": dict(rotary=False, rms_norm=False, qk_norm=False)}
ARCHITECTURES |= {"nanochat": dict(rotary=True, rms_norm=True, qk_norm=True, bias=False)}
DROPOUTS = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "nanochat": ("attention_dropout",)}

# Parts of the names of NanoChat's tensors, and here.
NANOCHAT_NAMES = {"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h"}
NANOCHAT_NAMES |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "c_attn")
NANOCHAT_NAMES |= {"self_attn": "attn", "o_proj": "c_proj", "fc1": "c_fc", "fc2": "c_proj"}

# Matrices that OpenAI stored as (in, out), where nn.Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# How the names of tokenizer files begin.
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def load_hugging_face(path: str, **changes) -> tuple[GPT, dict]:
    """Return a model in Hugging Face's format, and {"tokenizer": ...}; see `load_model`."""
    name = path if os.path.exists(path) else f"{path} (not a file or folder here)"
    transformers = import_transformers(name)
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        folder = path if os.path.isdir(path) else snapshot_download(path, allow_patterns=patterns)
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ValueError("it lacks config.json")
        given, _ = transformers.PreTrainedConfig.get_config_dict(folder)
        model_type = given.get("model_type", "gpt2")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"its model_type is {model_type!r}, not {' or '.join(ARCHITECTURES)}")
        saved = transformers.AutoConfig.for_model(**given | {"model_type": model_type})
        fields = {ours: getattr(saved, theirs) for ours, theirs in CONFIG_NAMES.items()}
        fields |= {"dropout": getattr(saved, DROPOUTS[model_type][0])}
        config = GPTConfig(**fields, **ARCHITECTURES[model_type])
        for field, values in required_values(config).items():
            if (value := getattr(saved, field)) not in values:
                raise ValueError(f"its {field} is {value!r}, not {values[0]!r}")
        size = sum(file.stat().st_size for file in folder.iterdir())
        if count_parameters(config)[0] > size:  # before building what a damaged file asks for
            raise ValueError("its files are smaller than the model that config.json describes")
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=transformers_config(config),  # nothing else of config.json reaches transformers
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
        for problem, keys in report.items():  # transformers fills missing tensors at random
            if keys:
                raise ValueError(f"{problem}: {min(map(str, keys))}")
        with torch.device("meta"):  # without random numbers
            gpt = GPT(replace(config, **changes)).eval()
        gpt.to_empty(device="cpu")._tie_weights()
        for theirs, ours, rows in pair_tensors(loaded, gpt):
            ours[rows] = theirs
        compare_logits(gpt, loaded)
        tokenizer, files = find_tokenizer(folder)
    except Exception as error:  # transformers and the hub raise many kinds
        raise UserError(f"cannot read {name} as GPT-2 or NanoChat: {one_line(error)}") from error
    if not files and "tokenizer" not in given:
        return gpt, guess_tokenizer(config.vocab_size)
    if not files:  # config.json is from `save_pretrained`
        tokenizer, files = given["tokenizer"], "no tokenizer files"
    return gpt, {"tokenizer": tokenizer, "vocabulary": files}


def find_tokenizer(folder: Path) -> tuple[str | None, str]:
    """Return the text of a folder's tokenizer.json, and the names of its tokenizer files.

    transformers converts other files. The text is None without files that transformers can read.
    """
    found = sorted(path.name for path in folder.iterdir() if path.name.startswith(TOKENIZER_FILES))
    text, names = "", ", ".join(found)
    if "tokenizer.json" in found:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8-sig", errors="replace").strip()
    elif names:
        from transformers import AutoTokenizer

        with contextlib.suppress(Exception):  # transformers raises many kinds
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            text = tokenizer.backend_tokenizer.to_str()
    return text if text.startswith("{") else None, names


def import_transformers(what: str):
    """Import transformers, without its messages, for `what`. Raises ValueError without it."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what} needs transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def transformers_config(config: GPTConfig, **extra):
    """Return `config` as a config of transformers with `extra` fields.

    Raises ValueError, naming a field of `config` that does not fit, if there is no such model.
    """
    from transformers import AutoConfig

    model_type = "nanochat" if config.rotary else "gpt2"
    for name, value in ARCHITECTURES[model_type].items():
        if getattr(config, name) != value:
            raise ValueError(f"not expressible as {model_type}: its {name} is not {value}")
    fields = {theirs: getattr(config, ours) for ours, theirs in CONFIG_NAMES.items()}
    fields |= dict.fromkeys(DROPOUTS[model_type], config.dropout)
    fields |= {name: values[0] for name, values in required_values(config).items()}
    return AutoConfig.for_model(model_type, **fields, **extra)


def required_values(config: GPTConfig) -> dict[str, tuple]:
    """Return the values that GPT supports in other fields of transformers' configs.

    `transformers_config` writes each first value.
    """
    if config.rotary:
        return dict(
            num_key_value_heads=(config.n_head,),
            intermediate_size=(4 * config.n_embd,),
            hidden_act=("gelu_pytorch_tanh", "gelu_new"),
            final_logit_softcapping=(None,),
            attention_bias=(False,),
            rms_norm_eps=(1e-5,),
            rope_parameters=({"rope_type": "default", "rope_theta": 10_000.0},),
        )
    return dict(
        n_inner=(4 * config.n_embd, None),
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )


def pair_tensors(reference: nn.Module, gpt: GPT):
    """Yield (tensor of `reference`, tensor of `gpt`, rows of the latter that equal the former).

    The tensor of `gpt` is None for a bias that it lacks.
    """
    state, C, H = gpt.state_dict(), gpt.config.n_embd, gpt.config.n_head
    rows = torch.arange(3 * C, device=gpt.lm_head.weight.device).view(3, H, C // H)
    # NanoChat rotates in the other direction: swap the halves of each head's queries and keys.
    rows[:2] = rows[:2].roll(C // H // 2, dims=2)
    parts = dict(zip(("q_proj", "k_proj", "v_proj"), rows.flatten(1)))  # (C,) each
    for name, tensor in reference.state_dict().items():
        part = parts.get(name.split(".")[-2], slice(None))
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        for theirs, ours in NANOCHAT_NAMES.items():
            name = name.replace(theirs, ours)
        yield tensor, state.get(name), part


@torch.no_grad()
def compare_logits(gpt: GPT, reference: nn.Module):
    """Raise ValueError unless `gpt` and `reference`, transformers' model, give the same logits."""
    size = (2, min(64, gpt.config.context_length))
    idx = torch.randint(gpt.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    idx = idx.to(gpt.lm_head.weight.device)
    with evaluation_mode(gpt):
        logits = gpt(idx)
    difference = (logits - reference.eval()(idx).logits).abs().max()
    if not difference <= 1000 * torch.finfo(logits.dtype).eps * logits.abs().max():  # or NaN
        raise ValueError(f"its logits differ from transformers' by {difference:.1g}")


# --- Devices --------------------------------------------------------------------------------------


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return a device, and the dtype of its matrix products: `dtype`, or with "auto" the fastest.

    Device "auto" is an NVIDIA, AMD or Apple GPU if there is one, else the CPU. Raises ValueError if
    the device is not available.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found and found.type in ("cuda", "mps") else "cpu"
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except Exception as error:
        raise UserError(f"--device {device} cannot be used here: {one_line(error)}") from error
    if dtype != "auto":
        return found, getattr(torch, dtype)
    if found.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, torch.bfloat16 if native else torch.float16
    # bfloat16 pays on a CPU only with instructions for it (AVX512-BF16, AMX, Arm's BF16); without
    # them its matrix products are several times slower than float32's.
    native = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return found, torch.bfloat16 if found.type == "cpu" and native else torch.float32
