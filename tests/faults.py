"""Kills real runs at random moments and looks at what they left.

    python tests/faults.py                     200 kills of train.py, 100 of prepare.py, 10 of a
                                               worker under torchrun, full disk
    python tests/faults.py --kills 20 --seed 7

Part 1 trains a small model (dropout, accumulation, evaluations), kills the process with SIGKILL
again and again, some of the time inside a save, resumes, and compares the weights and metrics.jsonl
bit for bit with those of a run that nobody disturbed. Part 2 does the same to prepare.py: the
dataset is the old one, the new one, or refused in one line. Part 3 kills one of two processes that
torchrun has started and restarts, and compares as part 1. Part 4 trains where there is no room for
a second checkpoint.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

RUN = ["--n_layer=4", "--n_head=2", "--n_embd=128", "--context_length=32", "--dataset=words"]
RUN += ["--batch_size=4", "--micro_batch_size=2", "--dropout=0.1", "--max_iters=60"]
RUN += ["--warmup_iters=5", "--eval_interval=7", "--eval_iters=2", "--log_interval=1"]
RUN += ["--checkpoint_interval=3", "--sample_prompt="]


def start(script: str, *words: str, folder: Path, launcher=(), **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(script: str, *words: str, folder: Path, **options) -> str:
    process = start(script, *words, folder=folder, **options)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def make_dataset(folder: Path, seed: int):
    text = " ".join(random.Random(seed).choices("the a of every effort moves you".split(), k=3000))
    (folder / "words.txt").write_text(text)
    finish("prepare.py", "words.txt", "--tokenizer=bytes", folder=folder)


def without_clock(lines: list[dict]) -> list[dict]:
    clock = ("seconds", "tokens_per_second")
    return [{name: x for name, x in line.items() if name not in clock} for line in lines]


def metrics(out) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what the clock says."""
    text = (Path(out) / "metrics.jsonl").read_text()
    return without_clock([json.loads(line) for line in text.splitlines()])


def result(out) -> tuple[dict, list]:
    """The checkpoint of a run and its metrics, without what differs between two equal runs."""
    ckpt = torch.load(Path(out) / "model.ckpt", weights_only=True)
    ckpt.pop("run_id")
    ckpt["metrics"] = without_clock(ckpt["metrics"])
    ckpt["config"] = {x: y for x, y in ckpt["config"].items() if x not in ("init_from", "out_dir")}
    return ckpt, metrics(out)


def differences(one, other, where="") -> list[str]:
    """Where two nests of dicts, lists and tensors are not the same to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(name, one.get(name), other.get(name)) for name in one.keys() | other.keys()]
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = [(i, x, y) for i, (x, y) in enumerate(zip(one, other))]
    else:
        return [] if one == other else [f"{where}: {one} {other}"]
    return [found for name, x, y in pairs for found in differences(x, y, f"{where}/{name}")]


def kill_training(folder: Path, kills: int, rng: random.Random, out: str, reference) -> Counter:
    """Kill runs of train.py until `kills` have hit; every run that ends must be the reference."""
    counts, folder_out = Counter(), folder / out
    while sum(n for name, n in counts.items() if name.startswith("killed")) < kills:
        resuming = (folder_out / "model.ckpt").exists()
        words = [*RUN, f"--out_dir={out}", *(["--init_from=resume"] if resuming else [])]
        (folder_out / "model.ckpt.tmp").unlink(missing_ok=True)  # of the kill before
        process = start("train.py", *words, folder=folder)
        for line in process.stdout:
            if line.startswith("data"):  # from here on it may be hit at any moment
                break
        reader = threading.Thread(target=process.stdout.read)  # keeps the pipe from filling up
        reader.start()
        time.sleep(rng.uniform(0, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
        if process.returncode == -signal.SIGKILL:
            inside = (folder_out / "model.ckpt.tmp").exists()
            saved = (folder_out / "model.ckpt").exists()
            where = "inside a save" if inside else "between saves" if saved else "before any save"
            counts[f"killed {where}"] += 1
            continue
        assert process.returncode == 0, f"a resumed run failed with {process.returncode}"
        counts["runs ended"] += 1
        for name in differences(reference, result(folder_out)):
            counts["DIFFERENT"] += 1
            print("DIFFERENT", name)
        shutil.rmtree(folder_out)
    return counts


def children(pid: int) -> list[int]:
    """The processes that process `pid` has started, such as torchrun's workers."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def kill_worker(folder: Path, kills: int, rng: random.Random) -> Counter:
    """Kill one of two workers, once in each run; torchrun starts both again."""
    finish("train.py", *RUN, "--out_dir=whole", folder=folder, launcher=TORCHRUN)
    reference, counts = result(folder / "whole"), Counter()
    while sum(n for name, n in counts.items() if name.startswith("killed")) < kills:
        shutil.rmtree(folder / "many", ignore_errors=True)
        launcher = [*TORCHRUN, "--max_restarts=1"]
        process = start("train.py", *RUN, "--out_dir=many", folder=folder, launcher=launcher)
        for line in process.stdout:
            if line.startswith("data"):
                break
        workers = children(process.pid)
        time.sleep(rng.uniform(0, 3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        resumed = "between saves" if "restarted: going on from" in out else "before any save"
        counts[f"killed {resumed}" if "exitcode: -9" in out else "runs ended before"] += 1
        for name in differences(reference, result(folder / "many")):
            counts["DIFFERENT"] += 1
            print("DIFFERENT", name)
    return counts


def kill_prepare(folder: Path, kills: int, rng: random.Random) -> Counter:
    """Kill prepare.py as it replaces one dataset by another.

    What is left is the old dataset, the new one or, after a kill between the renames, one that is
    refused. Two of the datasets are single texts, one is of documents.
    """
    texts = {
        name: " ".join(rng.choices(("ab", "c", "defg"), k=300_000))
        for name in ("one.txt", "two.txt", "three.jsonl")
    }
    documents = (texts["three.jsonl"][n : n + 1000] for n in range(0, 900_000, 1000))
    texts["three.jsonl"] = "".join(json.dumps({"text": x}) + "\n" for x in documents if x)
    wanted = {}
    for name, text in texts.items():
        (folder / name).write_text(text)
        finish("prepare.py", name, "--tokenizer=bytes", "--dataset=d", folder=folder)
        wanted[name] = [
            np.fromfile(folder / f"data/d/{x}.bin", np.uint16) for x in ("train", "val")
        ]
    counts, current, here = Counter(), "three.jsonl", Path.cwd()
    while sum(n for name, n in counts.items() if name.startswith("killed")) < kills:
        name = rng.choice([x for x in texts if x != current])
        words = (name, "--tokenizer=bytes", "--dataset=d")
        moment, described = rng.random(), (folder / "data/d/meta.json").stat().st_ino
        if moment < 0.8:
            for path in (folder / "data/d").glob("*.tmp"):  # of the kill before
                path.unlink()
        process = start("prepare.py", *words, folder=folder)
        if moment < 0.3:  # as it renames, which is over in no time
            while process.poll() is None:
                if (folder / "data/d/meta.json").stat().st_ino != described:
                    break
        elif moment < 0.8:  # as it writes
            while process.poll() is None and not list((folder / "data/d").glob("*.tmp")):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed = process.returncode == -signal.SIGKILL
        left = sorted(path.name for path in (folder / "data/d").iterdir())
        waiting = ", ".join(x for x in left if x.endswith(".tmp")) or "nothing"
        try:
            os.chdir(folder)
            splits, meta = prepare.load_dataset("d")
        except prepare.UserError as error:
            # meta.json is in place, and at least one of the others is not
            assert killed and waiting in ("train.bin.tmp", "train.bin.tmp, val.bin.tmp"), left
            assert "prepare it again" in str(error) and "\n" not in str(error), error
            counts[f"killed, {waiting} lying about: refused"] += 1
            finish("prepare.py", *words, folder=folder)
            current = name
            continue
        finally:
            os.chdir(here)
        same = [x for x in texts if all(map(np.array_equal, splits.values(), wanted[x]))]
        assert len(same) == 1 and meta["source"] == same[0], (same, meta, left)
        assert same[0] in (name, current), (same, name, current)
        if killed:
            whole = "new" if same[0] == name else "old"
            counts[f"killed, {waiting} lying about: the {whole} dataset"] += 1
        current = same[0]
    return counts


def full_disk(folder: Path) -> str:
    """Train on a disk of its own that has no room for a second checkpoint, nor, later, for a line.

    Mounting one (a tmpfs) takes root; without, no file may grow beyond half a checkpoint.
    """
    run = [*RUN, "--lr_schedule=constant", "--max_iters=12", "--out_dir=full"]
    finish("train.py", *run, "--max_iters=3", folder=folder)
    out = folder / "full"
    before = (out / "model.ckpt").read_bytes()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * len(before))}", "none", out]
    (folder / "kept").mkdir()
    shutil.copytree(out, folder / "kept", dirs_exist_ok=True)
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    shutil.copytree(folder / "kept", out, dirs_exist_ok=True)
    options = {}
    if not mounted:
        limit = (len(before) // 2, len(before) // 2)
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        process = start("train.py", *run, "--init_from=resume", folder=folder, **options)
        said, _ = process.communicate()
        assert process.returncode == 1, said
        assert said.count("NOT SAVED") == 3, said  # after 6, 9 and 12 updates
        assert (out / "model.ckpt").read_bytes() == before
        assert not (out / "model.ckpt.tmp").exists()
        if mounted:  # not a byte is left: neither lines nor pictures can be written
            with contextlib.suppress(OSError), open(out / "ballast", "wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            long = [*run, "--max_iters=60", "--init_from=resume"]
            process = start("train.py", *long, folder=folder)
            more, _ = process.communicate()
            assert process.returncode == 1 and "Traceback" not in more, more
            assert "metrics.jsonl lacks the line of step" in more, more
            assert (out / "model.ckpt").read_bytes() == before
        shutil.copytree(out, folder / "kept", dirs_exist_ok=True)
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
    shutil.copytree(folder / "kept", out, dirs_exist_ok=True)
    finish("train.py", *run, "--init_from=resume", folder=folder)  # there is room again
    finish("train.py", *run, "--out_dir=free", folder=folder)
    (full, _), (free, _) = result(folder / "full"), result(folder / "free")
    for part in ("model", "optimizer", "step"):
        assert differences(full[part], free[part]) == []
    where = "a full disk" if mounted else "a limit on the size of files"
    return f"{where}: " + next(line for line in said.splitlines() if "NOT SAVED" in line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        make_dataset(folder, args.seed)
        finish("train.py", *RUN, "--out_dir=reference", folder=folder)
        reference = result(folder / "reference")
        rng = random.Random(args.seed)
        different = 0
        for what, kill in (
            ("train.py", lambda: kill_training(folder, args.kills, rng, "out", reference)),
            ("prepare.py", lambda: kill_prepare(folder, args.kills // 2, rng)),
            ("a worker under torchrun", lambda: kill_worker(folder, min(10, args.kills), rng)),
        ):
            counts = kill()
            different += counts["DIFFERENT"]
            print(f"{what}, {time.perf_counter() - started:.0f} s")
            for where, count in sorted(counts.items()):
                print(f"  {count:4d} {where}")
        print("full disk\n  ", full_disk(folder))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
