"""What the tests share: the scripts, run as a user runs them, in an empty folder."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The models here are so small that a second thread costs more than it gives.
os.environ["OMP_NUM_THREADS"] = "1"

import config  # noqa: E402

settings.register_profile("repeatable", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("repeatable")

NUMBERS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
SIGNALS = {number: signal.getsignal(number) for number in NUMBERS}

WORDS = (
    "the a painter picture effort moves you every gave up his her in villa and said of to".split()
)

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--context_length=16", "--batch_size=4"]
TINY += ["--max_iters=6", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2"]
TINY += ["--log_interval=1", "--sample_prompt=", "--dataset=words"]


def words(n: int, seed: int = 0) -> str:
    """A text of n words, the same every time."""
    return " ".join(random.Random(seed).choices(WORDS, k=n)) + "\n"


@pytest.fixture(scope="session", autouse=True)
def without_matplotlib(tmp_path_factory):
    """Drawing takes longer than training, so matplotlib is missing here and in subprocesses."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "matplotlib.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture
def picture(monkeypatch):
    """Has matplotlib back."""
    monkeypatch.delitem(sys.modules, "matplotlib")
    pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restores what train.py's main replaces."""
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


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
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)

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
