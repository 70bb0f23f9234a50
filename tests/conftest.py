"""What the tests share: the scripts, run as a user runs them, in an empty folder."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The models here are so small that a second thread costs more than it gives.
os.environ["OMP_NUM_THREADS"] = "1"

import config  # noqa: E402

WORDS = (
    "the a painter picture effort moves you every gave up his her in villa and said of to".split()
)

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--context_length=16", "--batch_size=4"]
TINY += ["--max_iters=6", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2"]
TINY += ["--log_interval=1", "--sample_prompt=", "--dataset=words"]


def words(n: int, seed: int = 0) -> str:
    """A text of n words, the same every time."""
    return " ".join(random.Random(seed).choices(WORDS, k=n)) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder, capfd, monkeypatch):
    """command("train.py", "--seed", "1") -> (exit code, standard output, standard error).

    In this process, which spares each test the seconds that importing torch takes; `shell` starts
    a real one.
    """

    def call(script, *words):
        module = __import__(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            config.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def shell(folder):
    """The same in a process of its own."""

    def call(script, *words, **options):
        argv = [sys.executable, str(ROOT / script), *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", **options)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def dataset(command, folder) -> Path:
    """data/words, of 3,000 words in bytes."""
    (folder / "words.txt").write_text(words(3000))
    assert command("prepare.py", "words.txt", "--tokenizer", "bytes")[0] == 0
    return folder / "data" / "words"
