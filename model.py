"""The network: GPT-2, its loss, its text and its weights.

    gpt = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    logits = gpt(idx)           # (B, T) token ids -> (B, T, V)
    loss = gpt(idx, targets)    # mean cross-entropy, a scalar
    gpt.generate(idx, max_new_tokens=20)

Read downwards: attention, MLP, block, GPT. In comments B is the batch, T the tokens of a sequence,
C the channels (`n_embd`), V the vocabulary, H the heads and D = C / H the channels of a head.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Tensors have the
names and places of OpenAI's release, as nanoGPT and Hugging Face spell them.
"""

import importlib
import json
import math
import os
import pickle
import zipfile
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 with 124M parameters."""

    # Model (the defaults are GPT-2 124M)
    vocab_size: int = 50257  # number of different tokens
    context_length: int = 1024  # most tokens the model can look at
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # channels, a multiple of n_head
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in Linear and LayerNorm
    qkv_bias: bool = True  # biases of queries, keys and values too (the book: no)
    tie_weights: bool = True  # output head and token embedding are one matrix (the book: no)
    embedding_std: float = 0.02  # spread of the initial embeddings (PyTorch's own, the book's: 1)
    # Model, newer than GPT-2 (config/modern.py sets them)
    rotary: bool = False  # positions turn queries and keys (Su et al. 2021), in place of wpe
    rms_norm: bool = False  # divide by the root mean square (Zhang & Sennrich 2019), no gains
    qk_norm: bool = False  # normalise queries and keys (Henry et al. 2020)

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.embedding_std < math.inf:
            raise ValueError(f"embedding_std is {self.embedding_std}; it must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.rotary and self.n_embd // self.n_head % 2:
            raise ValueError("rotary needs an even number of channels in a head: n_embd / n_head")


class Cache:
    """The keys and values of the tokens a model has seen, so that each is computed only once.

    Room for `size` tokens of B sequences, on the device and in the dtype of `like`; on a CPU in
    float32, in which PyTorch's attention is several times as fast there as in bfloat16. The first
    call of a model with it fills in the prompt, later ones add a token each. What is handed out
    grows with the tokens; with `static` it is always the whole, and a mask, so that compiled code
    never sees a new shape.
    """

    def __init__(self, config: GPTConfig, B: int, size: int, like: torch.Tensor, static=False):
        D = config.n_embd // config.n_head
        dtype = torch.float32 if like.is_cpu else like.dtype
        self.kv = like.new_zeros(config.n_layer, 2, B, config.n_head, size, D, dtype=dtype)
        self.length = 0
        self.static = static
        self.mask = None  # (T, T max), which keys each new position may see

    def advance(self, T: int):
        """Make room for T more tokens."""
        self.positions = torch.arange(self.length, self.length + T, device=self.kv.device)  # (T,)
        self.length += T
        if self.static:
            self.mask = torch.arange(self.kv.shape[4], device=self.kv.device)
            self.mask = self.mask <= self.positions[:, None]
        else:  # once for all layers: of each, the keys and the values
            kv = self.kv.flatten(0, 1)  # (2 L, B, H, size, D)
            self.new = kv[:, :, :, self.length - T : self.length].unbind()
            self.seen = kv[:, :, :, : self.length].unbind()

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Add the keys and values (B, H, T, D) of one layer for the newest tokens; all so far."""
        if self.static:
            keys, values = self.kv[layer]
            k, v = k.to(keys.dtype), v.to(keys.dtype)
            return keys.index_copy_(2, self.positions, k), values.index_copy_(2, self.positions, v)
        self.new[2 * layer].copy_(k)
        self.new[2 * layer + 1].copy_(v)
        return self.seen[2 * layer : 2 * layer + 2]


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """`x` with a share `p` of its elements zeroed and the others scaled up to make good for it.

    PyTorch's draws a random number for each element, which is most of its time on a CPU; here a
    number of 64 bits does for four elements, which makes `p` a multiple of 1/65,536.
    """
    if not x.is_cpu:
        return F.dropout(x, p)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = numbers.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    dropped = min(round(p * 2**16), 2**16 - 1)
    keep = (numbers >= dropped - 2**15).to(x.dtype)
    return x * keep.mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Module):
    """The same as a layer, which does nothing outside of training."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


def norm(config: GPTConfig, channels: int) -> nn.Module:
    """The normalisation of a model: LayerNorm, or RMSNorm without parameters."""
    if config.rms_norm:
        return nn.RMSNorm(channels, eps=1e-5, elementwise_affine=False)
    return nn.LayerNorm(channels, eps=1e-5, bias=config.bias)


def rotation(positions: torch.Tensor, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (T, D/2) of the angles by which `rotate` turns what is at `positions` (T,).

    Pair i of a head's channels turns by 10,000^(-2i/D) from a position to the next.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, device=positions.device) / D)  # (D/2,)
    angles = positions[:, None] * frequencies  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys `x` (B, H, T, D), whose pairs are channels i and i + D/2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and those before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.qk_norm = config.qk_norm

    def forward(self, x: torch.Tensor, cache=None, angles=None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        mask = None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, all tokens so far, D)
            q, mask = q.to(k.dtype), cache.mask
        p = self.dropout if self.training else 0.0
        short = T <= 512 and q.dtype != torch.float32  # a matrix (T, T) is not too much memory
        if x.is_cpu and cache is None and (p or short):  # written out, which is faster there
            later = q.new_full((T, T), -math.inf).triu(1)
            q, k, v = (z.flatten(0, 1) for z in (q, k, v))  # (B H, T, D)
            scores = torch.baddbmm(later, q, k.mT, alpha=1 / math.sqrt(q.shape[-1]))
            weights = scores.softmax(dim=-1)  # (B H, T, T)
            y = (dropout(weights, p) if p else weights) @ v
            y = y.unflatten(0, (B, self.n_head))  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(
                *(q, k, v, mask),
                is_causal=mask is None and T > 1,  # a single new token may look at all before it
                dropout_p=p,
            )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Two layers, four times as wide in between, each position on its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate="tanh")  # OpenAI's form of GELU (Hendrycks & Gimpel 2016)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP; each adds to the residual stream what it read through a norm."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache=None, angles=None) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, angles))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """Token ids in, a score for every possible next token out."""

    checkpoint: dict | None = None  # what else was in the file that the weights are from
    recompute = False  # activations in the backward pass, instead of keeping them in memory

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.context_length, config.n_embd),
                drop=Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=norm(config, config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie_weights()
        self.apply(self._init_weights)
        for embedding in (self.transformer.wte, self.transformer.wpe):
            nn.init.normal_(embedding.weight, std=config.embedding_std)
        if config.rotary:
            del self.transformer.wpe

    def _tie_weights(self):
        if self.config.tie_weights:  # Press & Wolf 2017, "Using the Output Embedding"
            self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self, module: nn.Module):
        """GPT-2's: std 0.02, and less where 2 n_layer branches add up in the residual stream."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # after its own Linears
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V), or with `targets` the mean cross-entropy in nats, a scalar.

        idx, targets: (B, T) int64, T at most `context_length`. A target of -100 does not count.
        With a `cache`, which has advanced by T, idx continues the tokens in it, and the logits
        (B, 1, V) are those of the last.
        """
        T = idx.shape[1]
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions
        x, angles = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.rotary:
            angles = rotation(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        if self.config.rms_norm:
            x = self.transformer.ln_f(x)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.recompute and self.training:  # Chen et al. 2016, "Sublinear Memory Cost"
                run = torch.utils.checkpoint.checkpoint
                x = run(block, x, None, angles, use_reentrant=False)
            else:
                x = block(x, cache, angles)
        if cache is not None:
            x = x[:, -1:]  # (B, 1, C): the next token needs no more
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B T, V), (B T)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, *args, **options) -> torch.Tensor:
        """Continue `idx` (B, T) int64 by up to `max_new_tokens` tokens: (B, T + new).

        The other arguments are those of `stream`.
        """
        for token, _ in self.stream(idx, max_new_tokens, *args, **options):
            idx = torch.cat((idx, token), dim=1)
        return idx

    @torch.no_grad()
    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token: int | None = None,
        use_cache: bool = True,
        compile: bool = False,
    ):
        """The new tokens (B, 1) of `generate`, each with its logits (B, V), as they come.

        `temperature` 0 takes the likeliest token each time; otherwise tokens are drawn from
        softmax(logits / temperature), among those that `choose` leaves. Row n draws its random
        numbers from `seed` + n, whatever the other rows do. Where a row has produced `stop_token`
        it repeats it, and when all have, this ends.

        The model sees the last `context_length` tokens at most. With `use_cache` each token is
        computed once; as its position is part of it, a full cache cannot slide but is filled anew
        with the last half of the context. Without, all of it is computed for every token. `compile`
        is for GPUs, which otherwise wait for Python between the small steps of a single token.
        """
        T, B = self.config.context_length, len(idx)
        size = T if compile else min(T, idx.shape[1] + max_new_tokens)
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        generators = [torch.Generator().manual_seed(seed + row) for row in range(B)]
        ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        like = self.transformer.wte.weight
        idx = idx[:, -T:]
        new = idx[:1] if (idx == idx[:1]).all() else idx  # one prompt for all is computed once
        cache = Cache(self.config, len(new), size, like, compile) if use_cache else None
        decode = torch.compile(self, dynamic=False) if compile else self
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if cache is None:
                    new = idx
                else:
                    if cache.length == T:
                        new, cache.length = idx[:, -max(1, T // 2) :], 0
                    cache.advance(new.shape[1])
                try:
                    logits = (decode if new.shape == (B, 1) else self)(new, cache=cache)
                except Exception:  # of as many kinds as there are ways to lack a compiler
                    if decode is self:
                        raise
                    decode = self
                    logits = self(new, cache=cache)
                if len(logits) < B:
                    logits = logits.repeat(B, 1, 1)
                    cache.kv = cache.kv.repeat(1, 1, B, 1, 1, 1)  # `advance` takes views of it anew
                logits = logits[:, -1].float()  # (B, V)
                token = choose(logits, temperature, top_k, top_p, min_p, generators)  # (B, 1)
                if stop_token is not None:
                    token = token.masked_fill(ended, stop_token)
                    ended = ended | (token == stop_token)
                yield token, logits
                if stop_token is not None and ended.all():
                    break
                new, idx = token, torch.cat((idx, token), dim=1)[:, -T:]
        finally:
            self.train(training)

    def pack(self) -> "GPT":
        """Lay the matrices out as this CPU reads them fastest; all a model can do then is generate.

        Nothing changes where PyTorch has no such layout (it is of oneDNN, and knows few dtypes).
        """
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    try:
                        setattr(module, name, PackedLinear(child))
                    except (AttributeError, RuntimeError):
                        return self
        return self

    def crop_context(self, context_length: int):
        """Forget the positions from `context_length` on."""
        self.config.context_length = context_length
        if not self.config.rotary:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:context_length].clone())

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward pass for a token (a full context).

        6 for each parameter that is multiplied by, and 12 L T C for attention (Chowdhery et al.
        2022, "PaLM", appendix B); what is computed a second time does not count.
        """
        c = self.config
        matrices = [m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)]
        return 6 * sum(matrices) + 12 * c.n_layer * c.context_length * c.n_embd

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups: matrices decay, biases and LayerNorm gains do not."""
        parameters = list(self.parameters())
        matrices = [p for p in parameters if p.dim() >= 2]
        vectors = [p for p in parameters if p.dim() < 2]
        return [
            dict(params=matrices, weight_decay=weight_decay),
            dict(params=vectors, weight_decay=0.0),
        ]

    @classmethod
    def from_checkpoint(cls, path: str, **changes) -> "GPT":
        """The model in the file `path`, on the CPU; what else is in the file is in `.checkpoint`.

        `changes` are fields of GPTConfig that are to differ, such as `dropout`. nanoGPT's files are
        read, too. Raises ValueError, saying why, for a file that does not hold such a model.
        """
        checkpoint = read_checkpoint(path)
        args = dict(checkpoint["model_args"])
        if "block_size" in args:  # nanoGPT's name; its bias is for everything
            args["context_length"] = args.pop("block_size")
        try:
            config = GPTConfig(**args | changes)
            state = {
                name.removeprefix("_orig_mod.").removeprefix("module."): tensor
                for name, tensor in checkpoint.pop("model").items()
                if not name.endswith(".attn.bias")  # a causal mask of old
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not fit what it says of itself: {error}") from error
        model = cls.from_state(config, state, path)
        model.checkpoint = checkpoint
        return model

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> "GPT":
        """The model in a folder of Hugging Face's GPT-2 format, or on their hub under `name`.

        Needs safetensors, and huggingface_hub for the hub. Raises ValueError, saying why, where
        there is no such model or it is not a GPT-2.
        """
        folder = name if os.path.isdir(name) else download(name)
        theirs = read_json(folder, "config.json")
        same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * theirs.get("n_embd", 0)}
        for field, value in HUGGING_FACE.items():
            if theirs.get(field, value) not in (value, same.get(field, value)):
                raise ValueError(f"{name} is no GPT-2 as here: its {field} is {theirs[field]!r}")
        try:
            config = GPTConfig(
                **{field: theirs[field] for field in ("vocab_size", "n_layer", "n_head", "n_embd")},
                context_length=theirs["n_positions"],
                dropout=theirs.get("resid_pdrop", 0.1),
                tie_weights=theirs.get("tie_word_embeddings", True),
            )
            files = ["model.safetensors"]
            if os.path.exists(os.path.join(folder, "model.safetensors.index.json")):
                index = read_json(folder, "model.safetensors.index.json")
                files = sorted({str(file) for file in index["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is no GPT-2's folder: {error!r}") from error
        config = replace(config, **changes)
        state = {}
        for file in files:
            for key, tensor in read_safetensors(os.path.join(folder, file)).items():
                key = key if key.startswith("lm_head.") else f"transformer.{key}"
                key = key.replace("transformer.transformer.", "transformer.")
                if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks of old
                    state[key] = tensor.T if key.endswith(TRANSPOSED) else tensor
        if config.tie_weights and "transformer.wte.weight" in state:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        model = cls.from_state(config, state, name)
        model.checkpoint = {"tokenizer": theirs.get("tokenizer", "gpt2")}
        return model

    def save_pretrained(self, folder: str, tokenizer: str):
        """Write config.json and model.safetensors, which GPT2LMHeadModel.from_pretrained reads.

        Raises ValueError for a model that is no GPT-2.
        """
        for field, feature in NOT_GPT2.items():
            if getattr(self.config, field):
                raise ValueError(f"not expressible as GPT-2: {feature} ({field})")
        safetensors = import_extra("safetensors.torch")
        config, state = self.config, self.state_dict()
        for name, module in self.transformer.named_modules(prefix="transformer"):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):  # theirs always have a bias
                state.setdefault(f"{name}.bias", torch.zeros(len(module.weight)))
        for name, tensor in state.items():
            state[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).contiguous()
        if config.tie_weights:
            del state["lm_head.weight"]
        pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        sizes = {x: getattr(config, x) for x in ("vocab_size", "n_layer", "n_head", "n_embd")}
        theirs = HUGGING_FACE | sizes | pdrop
        theirs["architectures"] = ["GPT2LMHeadModel"]
        theirs["n_positions"] = config.context_length
        theirs["tie_word_embeddings"] = config.tie_weights
        theirs["tokenizer"] = tokenizer  # theirs ignore it; `from_pretrained` does not
        os.makedirs(folder, exist_ok=True)
        contents = {
            "model.safetensors": safetensors.save(state, metadata={"format": "pt"}),
            "config.json": json.dumps(theirs, indent=2).encode(),
        }
        for name, content in contents.items():
            path = os.path.join(folder, name)
            with open(path + ".tmp", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)

    @classmethod
    def from_state(cls, config: GPTConfig, state: dict, name: str) -> "GPT":
        """A model of these tensors. Raises ValueError, naming the first, where they do not fit."""
        try:
            layers = {key.split(".")[2] for key in state if key.startswith("transformer.h.")}
            if len(layers) != config.n_layer:  # before a hostile n_layer builds for hours
                raise ValueError(f"tensors of {len(layers)} layers, n_layer {config.n_layer}")
            with torch.device("meta"):  # takes no memory: these tensors become the weights
                model = cls(config)
            for key, tensor in state.items():
                if not tensor.is_floating_point() or tensor.layout != torch.strided:
                    raise ValueError(f"{key} is of {tensor.dtype}, {tensor.layout}")
            state = {key: tensor.float().contiguous() for key, tensor in state.items()}
            model.load_state_dict(state, assign=True)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            reason = (str(error).strip().splitlines() or [repr(error)])[:2][-1].strip()
            raise ValueError(f"{name}: its tensors do not fit its model_args: {reason}") from error
        model._tie_weights()
        return model


class PackedLinear(nn.Module):
    """A Linear without gradients, which multiplies a few rows in about half of the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        # What torch.compile makes of a Linear on a CPU; its overload is looked up once.
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, self.packed, self.bias, "none", [], "")


# What Hugging Face's config.json says of every GPT-2 that this file can express.
HUGGING_FACE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

# Fields that no GPT-2 has, in words.
NOT_GPT2 = {
    "rotary": "rotary positions",
    "rms_norm": "RMSNorm",
    "qk_norm": "normalised queries and keys",
}

# Matrices that OpenAI wrote (in, out) where nn.Linear has (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def import_extra(name: str):
    """An optional module. Raises ValueError, saying how to get it, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ValueError(f"this needs {package} (pip install {package})") from None


def download(name: str) -> str:
    """The folder that has the model called `name` on Hugging Face's hub."""
    try:
        hub = import_extra("huggingface_hub")
    except ValueError as error:
        raise ValueError(f"{name} is not a file or folder here; for the hub {error}") from None
    try:
        return hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # of many kinds: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{name} is not a file or folder here, and cannot be had from the hub: {reason}"
        ) from error


def read_json(folder: str, file: str) -> dict:
    """A JSON object. Raises ValueError, saying why, where there is none."""
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8") as opened:
            content = json.load(opened)
    except FileNotFoundError:
        raise ValueError(f"{folder} lacks {file}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of one file. Raises ValueError, saying why, where it cannot be read."""
    safetensors = import_extra("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{os.path.dirname(path)} lacks {os.path.basename(path)}") from None
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load_model(name: str, **changes) -> GPT:
    """The model in a checkpoint file, in a folder of Hugging Face's, or on their hub."""
    if os.path.isfile(name) or str(name).endswith((".ckpt", ".pt")):
        return GPT.from_checkpoint(name, **changes)
    return GPT.from_pretrained(name, **changes)


def read_checkpoint(path: str) -> dict:
    """The contents of a checkpoint file, of which no code is run. Raises ValueError, saying why."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # a zip archive, as torch.save writes them
                raise ValueError("is not a checkpoint but some other file")
            if not zipfile.is_zipfile(file):
                raise ValueError("is truncated: its end is missing")
            if zipfile.ZipFile(file).testzip():  # torch.load does not compare the checksums
                raise ValueError("is corrupt: its checksums do not fit")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for name in ("model", "model_args"):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), dict):
                raise ValueError(f"is foreign: it does not hold {name!r}, as train.py's do")
        return checkpoint
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}; train.py makes one") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:
        what = f"is corrupt: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            what = "asks for code to be run, which is refused: do not trust where it is from"
        raise ValueError(f"{path} {what}") from error


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """One token (B, 1) for each row of `logits` (B, V).

    Drawn from the `top_k` likeliest tokens; from the fewest whose probabilities add up to `top_p`
    (nucleus sampling, Holtzman et al. 2020); from those at least `min_p` times as likely as the
    likeliest (Nguyen et al. 2024).
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    device = logits.device
    logits = logits.to("cpu" if device.type == "mps" else device)  # MPS has no float64
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)  # nothing overflows
    probabilities = F.softmax(logits / temperature, dim=-1)  # (B, V)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones add up to
        probabilities = torch.zeros_like(probabilities).scatter(
            1, order, ordered.masked_fill(before >= top_p, 0)
        )
    if min_p > 0:
        likeliest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * likeliest, 0)
    # The token at which the sum of the probabilities passes a random share of the whole.
    sums = probabilities.cumsum(dim=-1)
    share = torch.cat([torch.rand(1, 1, generator=g, dtype=torch.float64) for g in generators])
    token = torch.searchsorted(sums, share.to(sums.device) * sums[:, -1:], right=True)
    return token.clamp(max=logits.shape[-1] - 1).to(device)


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """The device called `device`, and the dtype in which it multiplies matrices best.

    Raises ValueError if the device is not there.
    """
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    if dtype != "auto":
        return found, getattr(torch, dtype)
    if found.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, torch.bfloat16 if native else torch.float16
    # A CPU gains by bfloat16 only with instructions for it (AVX512-BF16, AMX, Arm's BF16); without
    # them its matrix products are several times slower than in float32.
    native = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return found, torch.bfloat16 if found.type == "cpu" and native else torch.float32
