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

import math
import pickle
import zipfile
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and those before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
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
    """Attention, then MLP; each adds to the residual stream what it read through a LayerNorm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(self.ln_1(x)))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """Token ids in, a score for every possible next token out."""

    checkpoint: dict | None = None  # what else was in the file that the weights are from

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.context_length, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._tie_weights()
        self.apply(self._init_weights)
        for embedding in (self.transformer.wte, self.transformer.wpe):
            nn.init.normal_(embedding.weight, std=config.embedding_std)

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

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V), or with `targets` the mean cross-entropy in nats, a scalar.

        idx, targets: (B, T) int64, T at most `context_length`. A target of -100 does not count.
        """
        T = idx.shape[1]
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B T, V), (B T)

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue `idx` (B, T) int64 by `max_new_tokens` tokens: (B, T + new).

        `temperature` 0 takes the likeliest token each time; otherwise tokens are drawn from
        softmax(logits / temperature), with `top_k` from the k likeliest alone.
        """
        for token in self.stream(idx, max_new_tokens, temperature, top_k, generator):
            idx = torch.cat((idx, token), dim=1)
        return idx

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """The new tokens of `generate`, each (B, 1), as they come."""
        training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.context_length :])[:, -1]  # (B, V), the last position
            token = choose(logits.float(), temperature, top_k, generator)
            idx = torch.cat((idx, token), dim=1)
            yield token
        self.train(training)

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

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
            layers = {name.split(".")[2] for name in state if name.startswith("transformer.h.")}
            if len(layers) != config.n_layer:  # before a hostile n_layer builds for hours
                raise ValueError(f"tensors of {len(layers)} layers, n_layer {config.n_layer}")
            with torch.device("meta"):  # takes no memory: the file's tensors become the weights
                model = cls(config)
            state = {name: tensor.float() for name, tensor in state.items()}
            model.load_state_dict(state, assign=True)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"{path}: its tensors do not fit its model_args: {reason}") from error
        model._tie_weights()
        model.checkpoint = checkpoint
        return model


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


def choose(logits, temperature, top_k, generator) -> torch.Tensor:
    """One token (B, 1) for each row of `logits` (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = F.softmax(logits / temperature, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)


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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    if dtype != "auto":
        return found, getattr(torch, dtype)
    if found.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, torch.bfloat16 if native else torch.float16
    native = any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return found, torch.bfloat16 if found.type == "cpu" and native else torch.float32
