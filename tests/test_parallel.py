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
from faults import differences, result

RUN = [*TINY, "--batch_size=12", "--micro_batch_size=2", "--learning_rate=1e-2"]
RUN += ["--lr_schedule=constant", "--eval_interval=10", "--eval_iters=3", "--dtype=float32"]
RUN += ["--checkpoint_interval=10", "--max_iters=40"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/words, and out_dir one: what a single process makes of RUN."""
    here, place = os.getcwd(), tmp_path_factory.mktemp("parallel")
    os.chdir(place)
    (place / "words.txt").write_text(words(3000))
    prepare.main(["words.txt", "--tokenizer=bytes"])
    (place / "without").mkdir()  # drawing would take longer than all else
    (place / "without/matplotlib.py").write_text("raise ImportError")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        train.main([*RUN, "--out_dir=one"])
        yield place
    os.chdir(here)


@contextlib.contextmanager
def torchrun(place, processes, *argv, options=(), script=(ROOT / "train.py",)):
    """A running torchrun, which does not outlive the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", *options, *script, *argv]
    environment = os.environ | {"PYTHONPATH": str(place / "without")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(map(str, command), cwd=place, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()  # torchrun ends its workers, too


def finished(*args, **options):
    """(exit code, standard output, what is from train.py on standard error) of torchrun."""
    with torchrun(*args, **options) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, [line for line in err.splitlines() if "train.py: " in line]


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
    """4 of DDP, then 3 of FSDP, which take parts of different sizes, then one."""
    argv = [*RUN, "--out_dir=chain"]
    assert finished(place, 4, *argv, "--max_iters=10")[0] == 0
    argv += ["--init_from=resume"]
    code, out, _ = finished(place, 3, *argv, "--max_iters=30", "--parallel=fsdp")
    assert code == 0 and "changed since the checkpoint: parallel was ddp, is fsdp" in out
    ckpt = torch.load(place / "chain/model.ckpt", weights_only=True)["model"]
    tied = ckpt["lm_head.weight"], ckpt["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one matrix in the file
    train.main(argv)
    agree(place / "one", place / "chain")


def test_processes_share_the_work_of_muon(place):
    """Each takes some of the matrices, and all have the same weights after it."""
    muon = ["--optimizer=muon", "--learning_rate=0.01", "--muon_interval=2", "--n_layer=3"]
    train.main([*RUN, *muon, "--out_dir=muon_one"])
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


def test_a_killed_worker_is_a_restart_and_the_same_run(place, two):
    """To the bit, as the sums have the same order; an earlier run's checkpoint is left alone."""
    shutil.copytree(place / "one", place / "killed")
    saved = place / "killed/model.ckpt"
    options = ["--max_restarts=1", "--monitor_interval=0.1"]
    with torchrun(place, 2, *RUN, "--out_dir=killed", options=options) as process:
        wait_for((place / "killed/model.ckpt.bak").exists)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        wait_for(saved.exists)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "restarted: going on from killed/model.ckpt" in out
    (ckpt, lines), (ckpt_2, lines_2) = result(two), result(place / "killed")
    assert ckpt.pop("job") != ckpt_2.pop("job")
    assert differences(ckpt, ckpt_2) == [] and lines == lines_2


SCRIPT = ["--no-python", "bash", "-c", 'test $RANK = 1 && cd other; exec "$@"', "bash"]
SCRIPT += [sys.executable, ROOT / "train.py"]  # rank 1 in another folder


def test_another_dataset_on_one_rank(place):
    """What all ranks find out is said once."""
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
    """Within seconds, in its own words; the other, which misses it, adds none."""
    argv = [*RUN, "--dataset=more", "--out_dir=failed"]
    shutil.copytree(place / "data" / "words", place / "data" / "more")
    started = time.monotonic()
    code, out, err = finished(place, 2, *argv, script=SCRIPT)
    assert code and len(err) == 1 and "train.py: there is no data/more/train.bin" in err[0]
    assert time.monotonic() - started < 30 and not (place / "failed").exists()


@pytest.mark.parametrize("job, resumes", [("this one", True), ("an earlier one", False)])
def test_a_restart_goes_on_from_its_own_checkpoint(command, dataset, monkeypatch, job, resumes):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    command("train.py", *TINY, "--max_iters=2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, out, _ = command("train.py", *TINY, "--max_iters=4")
    assert code == 0 and ("restarted: going on from out/model.ckpt" in out) == resumes
    assert ("of an earlier run is now model.ckpt.bak" in out) == (not resumes)


def test_processes_that_see_different_things(monkeypatch):
    monkeypatch.setattr(train, "gather", lambda x: [x, x | {"seed": 2}])
    with pytest.raises(config.UserError, match="differ in seed: 1 in process 0, 2 in 1"):
        train.check_same({"dataset": "words", "seed": 1})


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: 4)
    for batch_size, sizes in ((10, "8 or 12"), (3, "4")):
        with pytest.raises(config.UserError, match=f"by 4 processes: take --batch_size {sizes}$"):
            train.check_parallel(train.TrainConfig(batch_size=batch_size), torch.device("cpu"))


def test_what_is_printed_arrives(place):
    """Also where something other than torchrun, which has Python unbuffered, starts processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment = {x: os.environ[x] for x in os.environ if x != "PYTHONUNBUFFERED"} | places
    command = [sys.executable, ROOT / "train.py", *RUN, "--plan"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("model "), done.stderr
    assert done.stdout.count("64 x H100") == 1


def test_fsdp_alone_is_refused(command, dataset):
    code, _, err = command("train.py", *TINY, "--parallel=fsdp")
    assert code == 2 and "here is one alone: start several with torchrun" in err
    assert err.count("\n") == 1


def test_muon_of_parts_of_matrices_is_refused(monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: 2)
    config_ = train.TrainConfig(parallel="fsdp", optimizer="muon")
    with pytest.raises(config.UserError, match="take --parallel ddp or --optimizer adamw"):
        train.check_parallel(config_, torch.device("cpu"))


def test_processes_that_never_meet(command, folder, monkeypatch):
    places = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "RENDEZVOUS", timedelta(seconds=1))
    code, _, err = command("train.py", *TINY)
    assert code == 2 and "process 1 of 2 did not meet the others at 127.0.0.1:1" in err
    assert err.splitlines()[-1].startswith("train.py: ")


def test_each_rank_reads_its_share_of_the_rows():
    stream = np.arange(1000, dtype=np.uint16)
    how = dict(batch_size=12, context_length=16, seed=3)
    for step in range(9):  # beyond the end of an epoch
        whole = train.get_batch(stream, step, **how)[0]
        parts = [train.get_batch(stream, step, **how, rank=r, processes=3)[0] for r in range(3)]
        assert torch.equal(torch.cat(parts), whole)
