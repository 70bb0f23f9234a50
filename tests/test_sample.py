import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time

import prepare
import sample
from model import GPT, GPTConfig

import pytest
import torch
from conftest import ROOT, TINY
from faults import metrics


@pytest.fixture
def trained(command, dataset):
    assert command("train.py", *TINY, "--max_iters=40", "--learning_rate=1e-2")[0] == 0


def test_the_prompt_and_its_continuation(command, trained):
    argv = ["--start=The a", "--max_new_tokens=30", "--temperature=0", "--dtype=float32"]
    code, out, err = command("sample.py", *argv)
    ids = list(b"The a")
    gpt = GPT.from_checkpoint("out/model.ckpt").eval()
    text = gpt.generate(torch.tensor([ids]), 30, temperature=0)[0].tolist()
    expected = prepare.decode(prepare.get_tokenizer("bytes"), text)
    assert code == 0 and err == "" and out == expected + "\n"


def test_training_shows_what_this_would_write(command, dataset):
    argv = [*TINY, "--max_iters=40", "--learning_rate=1e-2"]
    for dtype in ("float32", "bfloat16"):
        _, out, _ = command("train.py", *argv, f"--dtype={dtype}", "--sample_prompt=The a")
        shown = [line for line in out.splitlines() if line.startswith("      The a")]
        lines = metrics("out")
        greedy = ["--temperature=0", "--max_new_tokens=40", f"--dtype={dtype}"]
        _, text, _ = command("sample.py", "--start=The a", *greedy)
        assert shown[-1] == "      " + " ".join(text.split()) and len(text) > 40
        assert len(shown) == len([line for line in lines if "val_loss" in line])
        command("train.py", *argv, f"--dtype={dtype}")
        assert metrics("out") == lines  # a run learns the same without samples


def test_a_seed_gives_the_same_text(command, trained):
    texts = [command("sample.py", "--start=a", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prompts_from_a_file_and_from_standard_input(command, trained, folder, shell):
    (folder / "prompt.txt").write_text("every gave")
    _, plain, _ = command("sample.py", "--start=every gave")
    assert command("sample.py", "--start=FILE:prompt.txt")[1] == plain
    (folder / "prompt.txt").write_bytes(b"every gave\r\n")  # an editor ends each line
    assert command("sample.py", "--start=FILE:prompt.txt")[1] == plain
    assert shell("sample.py", "--start", "-", input="every gave")[1] == plain
    assert shell("sample.py", input="every gave\n")[1] == plain
    assert shell("sample.py", "--max_new_tokens=1", stdin=subprocess.DEVNULL)[0] == 0
    assert command("sample.py", "--ckpt=out", "--start=every gave")[1] == plain
    assert plain.startswith("every gave")


def test_several_samples(command, trained):
    _, out, _ = command("sample.py", "--start=a", "--num_samples=3")
    samples = out.split("-" * 40 + "\n")
    assert len(samples) == len(set(samples)) == 3 and all(x.startswith("a") for x in samples)
    assert samples[0] == command("sample.py", "--start=a")[1]  # however many there are
    for seed in (1338, 1336, 1337 + 2**32):
        _, out, _ = command("sample.py", "--start=a", "--num_samples=3", f"--seed={seed}")
        assert not set(samples) & set(out.split("-" * 40 + "\n"))


def produce(monkeypatch, rows):
    """A model that produces these rows of tokens, whatever it is asked."""

    def stream(self, idx, *args, **options):
        for row in rows:
            yield torch.tensor(row)[: len(idx), None], torch.zeros(len(idx), 257)

    monkeypatch.setattr(GPT, "stream", stream)


def test_samples_end_at_endoftext(command, trained, monkeypatch):
    produce(monkeypatch, [[98, 99], [256, 100], [256, 101], [256, 256]])
    assert command("sample.py", "--start=a")[1] == "ab\n"
    assert command("sample.py", "--start=a", "--num_samples=2")[1] == f"ab\n{'-' * 40}\nacde\n"
    out = command("sample.py", "--start=a", "--stop=false")[1]
    assert out == "ab" + "<|endoftext|>" * 3 + "\n"


def test_top_logprobs(command, trained):
    argv = ["--start=The a", "--max_new_tokens=5", "--temperature=0", "--top_logprobs=3"]
    argv.append("--dtype=float32")
    code, out, err = command("sample.py", *argv)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first == "The a" and len([line for line in lines if line]) == 5
    logits = GPT.from_checkpoint("out/model.ckpt").eval()(torch.tensor([list(b"The a")]))[0, -1]
    likeliest = logits.softmax(-1).topk(3)
    for id, p in zip(likeliest.indices.tolist(), likeliest.values.tolist()):
        assert f"{chr(id)!r} {100 * p:.1f}%" in lines[0].split(" of ")[1]
    assert lines[0].startswith(f"{chr(likeliest.indices[0])!r} ")


@pytest.mark.parametrize("length", [2, 16, 17, 18, 24, 25, 100])
def test_score(command, trained, folder, length):
    """Every token after the first counts once, with half a context before it where there is one."""
    text = (folder / "words.txt").read_text()[:length]
    (folder / "some.txt").write_text(text)
    code, out, err = command("sample.py", "--score=some.txt")
    assert (code, err) == (0, "")
    gpt, ids = GPT.from_checkpoint("out/model.ckpt").eval(), torch.tensor([list(text.encode())])
    losses = []
    for t in range(1, length):  # windows start at 0, then 8 before the first they count
        start = 0 if t <= 16 else 8 * ((t - 1) // 8 - 1)
        losses.append(-gpt(ids[:, start:t])[0, -1].log_softmax(-1)[ids[0, t]].item())
    loss = sum(losses) / len(losses)
    numbers = [line.split()[-1 if "byte" in line else 1] for line in out.splitlines()]
    assert int(numbers[0]) == length - 1
    assert float(numbers[1]) == pytest.approx(loss, abs=1e-4)
    assert float(numbers[2].replace(",", "")) == pytest.approx(math.exp(loss), rel=1e-2)
    assert float(numbers[3]) == pytest.approx(loss / math.log(2), abs=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_score_in_16_bits_is_the_score(command, trained, folder, dtype):
    """The sum of many losses is not rounded to 16 bits."""
    argv = ["sample.py", "--score=words.txt"]
    exact, found = (command(*argv, *more)[1].split() for more in ([], [f"--dtype={dtype}"]))
    assert exact[:2] == found[:2] and int(exact[1].replace(",", "")) > 5000
    assert float(found[3]) == pytest.approx(float(exact[3]), rel=5e-3)


def test_score_reads_standard_input(trained, shell, folder):
    text = (folder / "words.txt").read_text()[:50]
    (folder / "some.txt").write_text(text)
    done = [shell("sample.py", "--score=-", input=text), shell("sample.py", "--score=some.txt")]
    assert done[0] == done[1] and done[0][0] == 0


def test_score_of_the_validation_split(command, trained, folder, monkeypatch):
    text = (folder / "words.txt").read_bytes()
    (folder / "rest.txt").write_bytes(text[int(0.9 * len(text)) :])
    code, out, err = command("sample.py", "--score=val")
    assert (code, err) == (0, "") and out == command("sample.py", "--score=rest.txt")[1]
    ticks = itertools.count(step=6)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(sample, "BATCH_NUMBERS", 2**14)
    code, slow, err = command("sample.py", "--score=val")
    assert slow == out and re.match(r"\d+ of \d+ windows\n", err)
    assert command("prepare.py", "words.txt", "--tokenizer=bytes", "--val_fraction=0.2")[0] == 0
    code, out, err = command("sample.py", "--score=val")
    assert code == 2 and not out and "data/words is not what the model was trained on" in err


def test_the_prompt_loop(command, trained):
    """On a terminal: type, read, type again; an empty line ends."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    argv = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=5", "--temperature=0"]
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        seen = ""
        for typed in ("every", "the", ""):
            while not seen.endswith("> "):
                seen += os.read(master, 1000).decode()
            os.write(master, f"{typed}\n".encode())
            seen += "\n"
        assert process.wait(60) == 0
    os.close(master)
    seen = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", seen)  # a terminal's own codes
    assert seen.startswith("Type a prompt")
    for prompt in ("every", "the"):
        _, text, _ = command("sample.py", f"--start={prompt}", *argv[2:])
        assert f"> \n{prompt}\r\n{text.rstrip(chr(10))}\r\n" in seen


def test_a_closed_output_does_not_hide_a_failure(folder):
    """What is buffered for `| head` cannot be written when the program ends."""
    (folder / "bad.jsonl").write_text("{\n" * 9)
    words = [sys.executable, str(ROOT / "prepare.py"), "bad.jsonl", "--on_error=skip"]
    words += ["--tokenizer=bytes"]
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shell = ["bash", "-c", 'set -o pipefail; "$@" | true', "_", *words]
    done = subprocess.run(shell, capture_output=True, text=True, env=buffered)
    assert done.returncode == 2 and "no text is left for train.bin" in done.stderr
    assert done.stderr.count("\n") == 1


def test_outputs_that_are_closed_or_cut_short(trained, folder):
    sample = [sys.executable, str(ROOT / "sample.py"), "--start=a"]
    for shell_words in ('exec "$@" >&-', '"$@" | head -c 1'):
        words = ["bash", "-c", f"set -o pipefail; {shell_words}", "_", *sample]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), shell_words


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("words", [["prepare.py", "words.txt"], ["train.py", "--help"]])
def test_an_output_that_cannot_be_written(dataset, shell, words):
    with open("/dev/full", "w") as full:
        argv = [sys.executable, str(ROOT / words[0]), *words[1:]]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot write to standard output: No space left on device" in done.stderr


def test_a_pipe_in_which_nothing_arrives(trained):
    argv = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert "reading a prompt from standard input" in process.stderr.readline()
        out, err = process.communicate("a")
        timer.cancel()
    assert process.returncode == 0 and out.startswith("a") and err == ""


def test_a_prompt_that_is_too_long(command, trained):
    code, out, err = command("sample.py", f"--start={'a' * 20}", "--max_new_tokens=3")
    assert code == 0 and out.startswith("a" * 20)
    assert err == "(a prompt of 20 tokens: the model sees the last 16)\n"


def test_endoftext_in_a_prompt_is_one_token(command, trained, monkeypatch):
    seen = []
    original = GPT.stream

    def stream(self, idx, *args, **kwargs):
        seen.append(idx[0].tolist())
        return original(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "stream", stream)
    command("sample.py", "--start=<|endoftext|>a")
    command("sample.py")
    assert seen == [[256, 97], [256]]


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias"]
)
def test_numbers_that_are_not_finite_are_no_result(command, trained, name):
    saved = torch.load("out/model.ckpt")
    saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"].clone()
    saved["model"][name][97 % len(saved["model"][name])] = math.nan
    torch.save(saved | {"model_args": saved["model_args"] | {"tie_weights": False}}, "bad.ckpt")
    use = ["--start=a"], ["--start=a", "--temperature=0"], ["--score=words.txt"], ["--export=out2"]
    for argv in use:
        code, out, err = command("sample.py", "--ckpt=bad.ckpt", *argv)
        assert code == 2 and err.count("\n") == 1 and "NaN or infinity" in err
        assert out.strip() in ("", "a"), argv


def test_a_checkpoint_without_a_tokenizer(command, trained):
    """nanoGPT's checkpoints: of 65 characters, which only their meta.pkl names, or GPT-2's."""
    for vocab_size in (65, 50257, 50304):
        args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=True, vocab_size=vocab_size)
        shape = {x: args[x] for x in ("n_layer", "n_head", "n_embd", "vocab_size")}
        model = GPT(GPTConfig(**shape, context_length=8)).state_dict()
        torch.save({"model": model, "model_args": args, "config": {}}, "ckpt.pt")
        code, out, err = command("sample.py", "--ckpt=ckpt.pt", "--start=!", "--max_new_tokens=1")
        if vocab_size == 65:
            assert code == 2 and not out and "tokenizer is not known (65 ids" in err
        else:
            assert code == 0 and out.startswith("!") and "so GPT-2's is assumed" in err
        assert err.count("\n") == 1


def test_half_a_character_prints_cleanly(command, trained, monkeypatch):
    pieces = iter([b"\xe2", b"\x82", b"\xac", b"x", b"\xf0", b"\x9f"])
    monkeypatch.setattr(prepare, "token_bytes", lambda tokenizer, id: next(pieces))
    _, out, _ = command("sample.py", "--start=a", "--max_new_tokens=6")
    assert out == "a\u20acx\n"
    pieces = iter([b"\xe7", b"x", b"\xff\n", b"\xe2\x82", b" \xe2\x82\xac", b"\xe7"])
    _, out, _ = command("sample.py", "--start=a", "--max_new_tokens=6")
    assert out == "a<e7>x<ff>\n<e2><82> \u20ac\n"
    monkeypatch.setattr(prepare, "token_bytes", lambda tokenizer, id: b"x\xe7")
    argv = ["--max_new_tokens=1", "--num_samples=2"]
    assert command("sample.py", "--start=a", *argv)[1].endswith("-\nax\n")
    assert "'x<e7>'" in command("sample.py", "--start=a", *argv, "--top_logprobs=2")[1]
    for token, columns in (("x", 24), ("\u732b", 23), ("\uff1d" * 25, 32)):
        monkeypatch.setattr(prepare, "token_bytes", lambda tokenizer, id, x=token: x.encode())
        line = command("sample.py", "--start=a", *argv, "--top_logprobs=2")[1].splitlines()[1]
        assert line.index(" of  ") == columns  # 24, less one for each wide character
    monkeypatch.setattr(prepare, "token_bytes", lambda tokenizer, id: b"x\xe7")
    assert prepare.decode(None, [1, 2]) == "x<e7>x<e7>"  # as train.py shows samples


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ckpt=none.ckpt"], "there is no checkpoint none.ckpt"),
        (["--ckpt=words.txt"], "cannot read words.txt: it is truncated, or not a checkpoint"),
        (["--start="], "the prompt is empty"),
        (["--start=FILE:none.txt"], "cannot read none.txt"),
        (["--num_samples=0"], "num_samples is 0; it must be in [1, 65536]"),
        (["--max_new_tokens=-5"], "max_new_tokens is -5; it must be in [1, 1e12]"),
        (["--temperature=-1"], "temperature is -1.0; it must be in [0, 1e9]"),
        (["--top_k=0"], "top_k is 0; it must be in [1, 1e12]"),
        (["--top_p=0"], "top_p is 0.0; it must be in (0, 1]"),
        (["--top_p=1.5"], "top_p is 1.5; it must be in (0, 1]"),
        (["--min_p=-0.1"], "min_p is -0.1; it must be in [0, 1]"),
        (["--top_logprobs=0"], "top_logprobs is 0; it must be in [1, 1e12]"),
        (["--score=one.txt", "--export=e"], "--score and --export exclude each other"),
        (["--ckpt=out", "--init_from=out"], "--ckpt and --init_from exclude each other"),
        (["--export=e", "--dtype=bfloat16"], "--export writes float32: leave out --dtype"),
        (["--start=a", "--score=one.txt"], "--start and --score exclude each other"),
        (["--top_logprobs=2", "--score=one.txt"], "--top_logprobs and --score exclude each"),
        (["--export=other"], "config.json is not of a GPT: name a new folder"),
        (["--score=none.txt"], "cannot read none.txt"),
        (["--score=one.txt"], "needs at least two tokens"),
        (["--score="], "--score and --export need a name"),
        (["--export="], "--score and --export need a name"),
        (["--score=latin.txt"], "latin.txt is not UTF-8 text (see byte 1)"),
        (["--export=words.txt"], "words.txt"),
        (["--init_from=data"], "cannot read data as GPT-2 or NanoChat: "),
        (["--ckpt=gpt2"], "there is no checkpoint gpt2"),
        (["--ckpt=data"], "there is no checkpoint data"),
        (["Every effort"], 'did you mean --start "Every effort"?'),
        (["Every effort " * 99], 'did you mean --start "Every effort Every'),
        (["--device=nowhere"], "--device nowhere cannot be used here"),
        (["--temprature=1"], "did you mean temperature?"),
    ],
)
def test_refused(command, trained, folder, argv, message):
    (folder / "one.txt").write_text("a")
    (folder / "latin.txt").write_bytes(b"a\xe9")
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text('{"model_type": "bert"}')
    code, out, err = command("sample.py", *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
