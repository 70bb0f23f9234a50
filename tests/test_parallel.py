"""Real torchrun processes on the CPU (gloo), which must train as one process does."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import config
import prepare
import train

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, words
from faults import differences, metrics, result

RUN = [*TINY, "--batch_size=12", "--micro_batch_size=2", "--learning_rate=1e-2"]
RUN += ["--lr_schedule=constant", "--eval_interval=10", "--eval_iters=3", "--dtype=float32"]
RUN += ["--checkpoint_interval=10", "--max_iters=40"]

# train.py with what a test adds to it: `at(step, act)` calls `act` in the middle of an update.
PATCHED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train, torch
from functools import partial
rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
original = train.get_batch
def at(number, act):
    def get_batch(split, step, *args):
        if step == number:
            act()
        return original(split, step, *args)
    train.get_batch = get_batch
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/words, and out_dir one: what a single process makes of RUN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place := tmp_path_factory.mktemp("parallel"))
        (place / "words.txt").write_text(words(3000))
        prepare.main(["words.txt", "--tokenizer=bytes"])
        alone(*RUN, "--out_dir=one")
        yield place


def alone(*argv):
    """A run in this process."""
    with pytest.raises(SystemExit) as end:
        train.main([*argv])
    assert end.value.code == 0


@contextlib.contextmanager
def torchrun(place, processes, *argv, options=("--standalone",), script=(ROOT / "train.py",)):
    """A running torchrun, which does not outlive the block."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command += [*options, *script, *argv]
    with subprocess.Popen(map(str, command), cwd=place, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()  # torchrun ends its workers, too


def finished(place, processes, *argv, patch="", **options):
    """(exit code, standard output, train.py's errors) of torchrun."""
    if patch:
        (place / "patched_train.py").write_text(f"{PATCHED}{patch}\ntrain.run(train.main)")
        options["script"] = [place / "patched_train.py"]
    with torchrun(place, processes, *argv, **options) as process:
        out, err = process.communicate(timeout=120)
    print(err)  # pytest shows it where a test fails
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0]
    return process.returncode, out, [line for line in err.splitlines() if "train.py: " in line]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(true):
    """Until `true()`, a minute at most."""
    for _ in range(20_000):
        if true():
            return
        time.sleep(0.003)
    raise TimeoutError


def largest_differences(one, other) -> tuple[float, float]:
    """Between any two numbers in the metrics of two runs, and in their checkpoints."""
    (ckpt, lines), (ckpt_2, lines_2) = result(one), result(other)
    assert [(x["step"], x.keys()) for x in lines] == [(x["step"], x.keys()) for x in lines_2]
    curves = [(x[name], y[name]) for x, y in zip(lines, lines_2) for name in x]
    assert ckpt["model"].keys() == ckpt_2["model"].keys()
    assert ckpt["optimizer"].keys() == ckpt_2["optimizer"].keys()
    pairs = [(x, ckpt_2["model"][name]) for name, x in ckpt["model"].items()]
    for name, state in ckpt["optimizer"].items():
        pairs += [(x, ckpt_2["optimizer"][name][key]) for key, x in state.items()]
    assert all(type(x) is type(y) is torch.Tensor for x, y in pairs)
    in_curves = max(abs(x - y) / max(1, abs(x)) for x, y in curves)
    return in_curves, max((x - y).abs().max().item() for x, y in pairs)


def agree(one, other):
    """To float32 rounding, which AdamW makes more of in the weights than in the losses."""
    in_curves, in_weights = largest_differences(one, other)
    print(f"largest difference: {in_curves:.1e} in the metrics, {in_weights:.1e} in the weights")
    assert in_curves < 5e-6 and in_weights < 1e-3


@pytest.fixture(scope="module")
def two(place):
    """What two processes make of RUN, in out_dir two."""
    code, out, err = finished(place, 2, *RUN, "--out_dir=two")
    assert (code, err) == (0, []) and out.count("saved: step 40") == 1
    assert "2 processes (ddp)" in out
    return place / "two"


def test_two_processes_train_as_one(place, two):
    agree(place / "one", two)
    first = [json.loads(open(x / "metrics.jsonl").readline()) for x in (place / "one", two)]
    assert first[0]["val_loss"] == first[1]["val_loss"]  # the weights are still the same


def test_a_run_goes_on_with_other_processes_than_it_began(place):
    """4 of DDP, then 3 of FSDP, with shards of different sizes, then one that is told nothing."""
    assert finished(place, 4, *RUN, "--out_dir=chain", "--max_iters=10")[0] == 0
    argv = ["--out_dir=chain", "--init_from=resume"]
    stop = "if rank == '1': at(29, lambda: os.kill(os.getpid(), signal.SIGINT))"
    fsdp = ["--parallel=fsdp", "--max_iters=40", "--sample_prompt=the"]
    code, out, _ = finished(place, 3, *argv, *fsdp, patch=stop)
    assert code and "\n      the" in out and "saved: step 30" in out and "3 processes (fsdp)" in out
    assert "changed since the checkpoint: parallel was ddp, is fsdp" in out
    assert "to go on: torchrun --nproc_per_node=3 train.py --init_from resume" in out
    ckpt = torch.load(place / "chain/model.ckpt", weights_only=True)["model"]
    tied = ckpt["lm_head.weight"], ckpt["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one matrix in the file
    alone(*argv)
    agree(place / "one", place / "chain")


def test_processes_share_the_work_of_muon(place):
    """Each takes some of the matrices, and all have the same weights after it."""
    muon = ["--optimizer=muon", "--learning_rate=0.01", "--muon_interval=2", "--n_layer=3"]
    alone(*RUN, *muon, "--out_dir=muon_one")
    assert finished(place, 2, *RUN, *muon, "--out_dir=muon_two")[0] == 0
    agree(place / "muon_one", place / "muon_two")


def test_sigterm_to_torchrun_saves_once_where_all_stop(place):
    path = place / "stopped" / "metrics.jsonl"
    with torchrun(place, 2, *RUN, "--out_dir=stopped", "--max_iters=100000") as process:
        wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") > 5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode and out.count("model.ckpt saved: step") >= 1
    ckpt, lines = result(place / "stopped")
    assert out.splitlines()[-1].startswith("to go on: torchrun --nproc_per_node=2 train.py")
    assert f"saved: step {ckpt['step']:,}," in out and ckpt["step"] == lines[-1]["step"]
    assert "train.py" not in err  # what else is there is torchrun's


def test_an_interrupted_run_of_two_is_the_run(place):
    """With dropout, whose numbers differ between ranks, bfloat16, and momentum that ranks share."""
    run = [*RUN, "--dropout=0.1", "--dtype=bfloat16", "--optimizer=muon", "--max_iters=8"]
    assert finished(place, 2, *run, "--out_dir=whole")[0] == 0
    assert finished(place, 2, *run, "--out_dir=parts", "--max_iters=3")[0] == 0
    argv = ["--out_dir=parts", "--init_from=resume", "--max_iters=8"]
    assert finished(place, 2, *argv, "--eval_interval=10")[0] == 0
    (whole, lines), (parts, more) = result(place / "whole"), result(place / "parts")
    assert lines == [line for line in more if line["step"] != 3 or "loss" in line]
    for part in ("model", "optimizer", "config"):
        assert differences(whole[part], parts[part]) == []


@pytest.mark.parametrize("address", ["standalone", "port"])
def test_a_killed_worker_is_a_restart_and_the_same_run(place, two, address):
    """To the bit, as the sums have the same order; an earlier run's checkpoint is left alone."""
    options = ["--max_restarts=1", "--monitor_interval=0.1", "--standalone"]
    out_dir, kill = place / f"killed_{address}", "os.kill(os.getpid(), signal.SIGKILL)"
    shutil.copytree(place / "one", out_dir)
    for number, step in enumerate((25, 0), 1):
        if address == "port":
            options[2:] = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        patch = f"if rank == '1' and restarts == '0': at({step}, lambda: {kill})"
        earlier = (out_dir / "model.ckpt").read_bytes()
        argv = [*RUN, f"--out_dir={out_dir.name}"]
        code, out, _ = finished(place, 2, *argv, options=options, patch=patch)
        assert code == 0
        assert (f"restarted: going on from {out_dir.name}/model.ckpt" in out) == (step > 0)
        assert (out_dir / f"earlier-{number}/model.ckpt").read_bytes() == earlier
        assert differences(result(two), result(out_dir)) == []


# Of torch.compile all but the code that it would generate.
EAGER = "torch.compile = partial(torch.compile, backend='eager')"
BACKWARD = """
def fail(model, **options):
    def forward(*args):
        loss = model(*args)
        loss.register_hook(lambda grad: 1 / 0)
        return loss
    return forward
if rank == "1":
    torch.compile = fail
"""


def test_ranks_compile_all_or_none(place, two):
    argv = [*RUN, "--compile", "--max_iters=3", "--out_dir=compiled"]
    for patch, message in (
        (EAGER, "\ncompiled in "),
        (EAGER + BACKWARD, "\nnot compiled, training is slower: division by zero\n"),
    ):
        code, out, err = finished(place, 2, *argv, patch=patch)
        assert (code, err) == (0, []) and message in out
        losses = [line for line in metrics(place / "compiled") if "loss" in line]
        assert losses == [line for line in metrics(two) if "loss" in line][:3]
    code, out, err = finished(place, 2, *argv, "--parallel=fsdp", patch=EAGER + BACKWARD)
    assert code and "train.py: cannot compile: division by zero; use --compile false" in err[0]


@pytest.mark.parametrize("word", ["--batch_size=none", "--dataset=none_such", "--batch_size=3"])
def test_a_mistake_is_said_once(place, word):
    code, _, err = finished(place, 2, *RUN, "--out_dir=failed", word)
    assert code and len(err) == 1


SCRIPT = ["--no-python", "bash", "-c", 'test $RANK = 1 && cd other; exec "$@"', "bash"]
SCRIPT += [sys.executable, ROOT / "train.py"]  # rank 1 in another folder


def test_another_dataset_on_one_rank(place):
    other = place / "other" / "data" / "words"
    shutil.copytree(place / "data" / "words", other)
    os.remove(other / "meta.json")
    ids = np.fromfile(other / "val.bin", np.uint16)
    ids[::-1].tofile(other / "val.bin")
    argv = [*RUN, "--out_dir=failed", "--vocab_size=257"]
    code, out, err = finished(place, 2, *argv, script=SCRIPT)
    assert code and len(err) == 1 and "train.py: processes differ in data/words: " in err[0]
    assert not (place / "failed").exists()


def test_one_rank_alone_that_fails_ends_the_run(place):
    """Within seconds, in its own words."""
    argv = [*RUN, "--dataset=more", "--out_dir=failed"]
    shutil.copytree(place / "data" / "words", place / "data" / "more")
    started = time.monotonic()
    code, out, err = finished(place, 2, *argv, script=SCRIPT)
    assert code and len(err) == 1 and "train.py: there is no data/more/train.bin" in err[0]
    assert time.monotonic() - started < 30 and not (place / "failed").exists()


def test_a_checkpoint_that_one_rank_does_not_see(place):
    shutil.copytree(place / "one", place / "seen")
    shutil.copytree(place / "data", place / "other/data", dirs_exist_ok=True)
    argv = ["--init_from=resume", "--out_dir=seen", "--max_iters=41"]
    code, out, err = finished(place, 2, *argv, script=SCRIPT)
    assert code and len(err) == 1 and "there is no checkpoint seen/model.ckpt" in err[0]


def test_processes_that_see_different_things(monkeypatch):
    config_, meta, cpu = train.TrainConfig(seed=1), {"fingerprint": "x"}, torch.device("cpu")
    with monkeypatch.context() as patch, pytest.raises(config.UserError) as error:
        patch.setattr(train, "all_gather", lambda x: [x, x | {"seed": 2}])
        train.check_ranks(config_, meta, {}, cpu)
    assert str(error.value) == "processes differ in seed: 1 in process 0, 2 in 1"
    monkeypatch.setattr(train, "get_world_size", lambda: 4)
    for batch_size, fits in ((10, 8), (3, 4)):
        config_.batch_size = batch_size
        message = f"4 processes cannot share batch_size {batch_size}: take --batch_size {fits}$"
        with pytest.raises(config.UserError, match=message):
            train.check_ranks(config_, meta, {}, cpu)


def test_what_is_printed_arrives(place):
    """Also where something other than torchrun, which has Python unbuffered, starts processes."""
    here = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment = {x: os.environ[x] for x in os.environ if x != "PYTHONUNBUFFERED"} | here
    command = [sys.executable, ROOT / "train.py", *RUN, "--max_iters=1", "--out_dir=printed"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("data "), done.stderr
    assert "1 updates in" in done.stdout.splitlines()[-1]


def test_processes_that_never_meet(command, folder, monkeypatch):
    places = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "RENDEZVOUS", timedelta(seconds=1))
    code, _, err = command("train.py", *TINY)
    assert code == 2 and "process 1 of 2 at 127.0.0.1:1 cannot reach the others" in err
    assert err.splitlines()[-1].startswith("train.py: ")


def test_each_rank_reads_its_share_of_the_rows():
    stream = np.arange(1000, dtype=np.uint16)
    config_ = train.TrainConfig(batch_size=12, context_length=16, seed=3, vocab_size=1000)
    for step in range(9):  # beyond the end of an epoch
        whole = train.get_batch(stream, step, config_)[0]
        parts = [train.get_batch(stream, step, config_, "cpu", rank, 3)[0] for rank in range(3)]
        assert torch.equal(torch.cat(parts), whole)
