import errno
import io
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import config
import train

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st


@dataclass
class Settings:
    # Sizes
    n_layer: int = 12  # number of blocks
    rate: float = 0.5  # how fast
    top_k: int | None = None  # how many
    # Words
    kind: Literal["round", "square"] = "round"  # which form
    name: str = "x"  # what it is called
    start: str | None = None  # where to begin
    loud: bool = False  # say so

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer is {self.n_layer}; it must be at least 1")


@dataclass
class Sources:
    sources: list[str]
    loud: bool = False  # say so


def test_command_line_wins_over_files_and_later_over_earlier(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text('"""Why."""\nn_layer = 3  # because\nrate = 1\nname = "a"\ntop_k = 7\n')
    b.write_text("name = 'b'\ntop_k = None\nkind = 'square'\n")
    got = config.parse(Settings, ["--n_layer", "4", str(a), str(b), "--n_layer=5"])
    assert got == Settings(n_layer=5, rate=1.0, name="b", kind="square")
    assert type(got.rate) is float


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--loud"], {"loud": True}),
        (["--loud", "true", "--n_layer=2"], {"loud": True, "n_layer": 2}),
        (["--loud=false"], {"loud": False}),
        (["--loud", "--no-loud"], {"loud": False}),
        (["--rate", "-1e-3"], {"rate": -1e-3}),
        (["--rate=3"], {"rate": 3.0}),
        (["--top_k=none"], {"top_k": None}),
        (["--name", "7"], {"name": "7"}),
        (["--name="], {"name": ""}),
        (["--name=--n_layer"], {"name": "--n_layer"}),
        (["--start", "Every effort = 3"], {"start": "Every effort = 3"}),
        (["--start", "12"], {"start": "12"}),
        (["--kind", "square"], {"kind": "square"}),
        (["--n_layer", "1_000"], {"n_layer": 1000}),
    ],
)
def test_words(words, expected):
    assert config.parse(Settings, words) == Settings(**expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--n_layers", "3"], "there is no setting 'n_layers'; did you mean n_layer?"),
        (["--n-layer", "3"], "did you mean n_layer?"),
        (["--no-name"], "there is no setting 'no-name'"),
        (["--plan"], "there is no setting 'plan'; the first lines of every run say"),
        (["--recompute"], "use --activation_checkpointing"),
        (["--block_size=5"], "there is no setting 'block_size'; use --context_length"),
        (["--no-loud=false"], "there is no setting 'no-loud'"),
        (["--qqqqqqq", "3"], "--help lists them all"),
        (["--n_layer", "three"], "--n_layer is 'three'; it must be int"),
        (["--n_layer", "3.0"], "--n_layer is 3.0; it must be int"),
        (["--n_layer", "true"], "--n_layer is True; it must be int"),
        (["--n_layer", "[" * 5000], "it must be int"),
        (["--n_layer", "9" * 5000], "it must be int"),
        (["--rate", "9" * 400], "it is too large"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--name", "--loud"], "--name needs a value"),
        (["--loud=maybe"], "--loud is 'maybe'; it must be bool"),
        (["--top_k=many"], "it must be int or none"),
        (["--kind", "oval"], "--kind is 'oval'; it must be round or square"),
        (["--n_layer", "0"], "n_layer is 0; it must be at least 1"),
        (["nowhere.py"], "cannot read config file nowhere.py: No such file"),
    ],
)
def test_refused(words, message):
    with pytest.raises(config.UserError) as error:
        config.parse(Settings, words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layer = 3\nn_layers = 4\n", "line 2: there is no setting 'n_layers'"),
        ("n_layer = 'x'\n", "line 1: n_layer is 'x'; it must be int"),
        ("\n\nn_layer = = 4\n", "be.py is not a config file: invalid syntax"),
        ("import os\n", "line 1: only `name = plain value`"),
        ("n_layer = open('x')\n", "line 1: only `name = plain value`"),
        ("n_layer, rate = 1, 2\n", "line 1: only `name = plain value`"),
        ("n_layer = 1 + '\n", "line 1)"),
        ("n_layer = " + "(" * 3000, "be.py"),
        ("n_layer = " + "-" * 100_000 + "1", "be.py"),
        ("n_layer = 1\0", "be.py"),
        (b"n_layer = 1 # \xff", "be.py"),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "be.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(config.UserError) as error:
        config.parse(Settings, [str(path)])
    assert message in str(error.value)


def test_given_is_what_was_given(tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 12\nrate = 1\n")
    got = config.parse(Settings, ["--top_k=none", str(tmp_path / "a.py"), "--rate=2"])
    assert got.given == {"n_layer": 12, "rate": 2.0, "top_k": None}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[a-z]*.py")), ids=lambda p: p.name)
def test_every_shipped_config_is_read(path):
    got = config.parse(train.TrainConfig, [str(path)])
    assert "dataset" in got.given and path.read_text().count("\n" + "dataset = ") == 1


def test_sources_take_the_plain_words():
    assert config.parse(Sources, ["a", "--loud", "b.py"]) == Sources(["a", "b.py"], True)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Settings, ["--n_layer", "2", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.index("Sizes") < out.index("--n_layer") < out.index("Words") < out.index("--kind")
    for line in (
        "--n_layer int",
        "number of blocks [12]",
        "--top_k int or none",
        "how many [None]",
    ):
        assert line in out
    assert "--kind round or square" in out and "--loud, --no-loud  " in out


def test_help_shows_the_values_of_a_config_file(capsys, tmp_path):
    (tmp_path / "a.py").write_text("n_layer = 3\n")
    with pytest.raises(SystemExit):
        config.parse(Settings, [str(tmp_path / "a.py"), "--help"])
    assert "number of blocks [3]" in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), config.atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with config.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_writer(tmp_path):
    code = (
        f"import config, sys\nwith config.lock({str(tmp_path / 'out')!r}): print(1, flush=True), "
    )
    code += "sys.stdin.read()"
    argv = [sys.executable, "-c", code]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    with subprocess.Popen(argv, **pipes) as process:
        assert process.stdout.readline() == "1\n"
        with pytest.raises(config.UserError, match="out: another process is writing there"):
            with config.lock(tmp_path / "out"):
                pass
        process.kill()
    with config.lock(tmp_path / "out"), config.lock(tmp_path / "other"):
        pass


WORD = st.one_of(
    st.text(),
    st.sampled_from(["--n_layer", "--rate", "--loud", "--kind", "--name=", "--top_k", "-", "--"]),
    st.tuples(st.sampled_from(["--n_layer=", "--rate=", "--top_k=", "--loud="]), st.text()).map(
        "".join
    ),
)


@hypothesis(max_examples=300, deadline=None)
@given(st.lists(WORD, max_size=6))
def test_any_command_line_gives_settings_or_one_error(words):
    if {"-h", "--help"} & set(words):
        return
    try:
        assert isinstance(config.parse(Settings, words), Settings)
    except config.UserError:
        pass


@hypothesis(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(), st.text().map(str.encode), st.text("n_layer=1234 .'\n()[]-").map(str.encode)
    )
)
def test_any_file_gives_settings_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "c.py"
    path.write_bytes(data)
    try:
        assert isinstance(config.parse(Settings, [str(path)]), Settings)
    except config.UserError:
        pass


def test_a_notebook_has_streams_that_cannot_be_configured(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert config.run(lambda argv: "done") == "done"


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    code = "import os; [os.close(n) for n in (0, 1, 2)]; import config; f = open('x', 'w'); "
    code += "os.write(1, b'lost'); f.write(str(f.fileno()))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env)
    assert int((tmp_path / "x").read_text()) >= 3


def test_sources_is_no_option():
    with pytest.raises(config.UserError, match="there is no setting 'sources'"):
        config.parse(Sources, ["--sources", "x"])


def test_a_folder_that_cannot_be_flushed_does_not_matter(tmp_path, monkeypatch):
    """As on some shared folders: the file is renamed by then."""
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with config.atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_ctrl_c_before_main_is_one_line(tmp_path):
    """As while torch is imported."""
    code = "import config, signal; signal.raise_signal(signal.SIGINT)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "-c: stopped\n")


@pytest.mark.parametrize("interval", ["[1, 3)", "(0, 2]"])
def test_ranges(interval):
    for value in range(-1, 5):
        settings = Settings(n_layer=9, rate=value)
        if value in (1, 2):
            config.check_ranges(settings, {interval: "top_k rate"})
            continue
        with pytest.raises(ValueError) as error:
            config.check_ranges(settings, {interval: "top_k rate"})
        assert str(error.value) == f"rate is {value}; it must be in {interval}"
