"""Short runs of the fault harness; `python tests/faults.py` is the long one."""

import random

import faults
import pytest


@pytest.fixture
def rng():
    seed = random.randrange(10**6)
    print("seed", seed)  # pytest shows it where a test fails
    return random.Random(seed)


def test_killed_training_resumes_to_the_bit(tmp_path, rng):
    faults.make_dataset(tmp_path, 0)
    faults.finish("train.py", *faults.RUN, "--out_dir=reference", folder=tmp_path)
    reference = faults.result(tmp_path / "reference")
    counts = faults.kill_training(tmp_path, 4, rng, "out", reference)
    assert counts["DIFFERENT"] == 0


def test_killed_prepare_leaves_one_dataset_whole(tmp_path, rng):
    faults.kill_prepare(tmp_path, 6, rng)


def test_a_full_disk_ends_neither_the_run_nor_the_old_checkpoint(tmp_path):
    faults.make_dataset(tmp_path, 0)
    assert "model.ckpt NOT SAVED" in faults.full_disk(tmp_path)
