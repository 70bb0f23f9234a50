"""Training and generation on a GPU, in two minutes; skipped where there is none.

    python -m pytest tests/test_gpu.py -n 0
    GPT_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py -n 0    the same code on a CPU

Models are small, and float32 products have all their digits (PyTorch's default), so losses on the
GPU are compared with losses on the CPU.
"""

import json
import os
import subprocess
import sys

import model
import train

import pytest
import torch
from conftest import ROOT, words

DEVICE = os.environ.get("GPT_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)

RUN = ["--dataset=words", "--n_layer=2", "--n_head=2", "--n_embd=64", "--context_length=64"]
RUN += ["--batch_size=8", "--max_iters=20", "--warmup_iters=2", "--lr_schedule=constant"]
RUN += ["--learning_rate=3e-3", "--log_interval=1", "--eval_interval=20", "--eval_iters=2"]
RUN += ["--sample_prompt=the painter", "--dtype=float32", "--compile=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/words, where matplotlib cannot be imported, as drawing is slow."""
    import prepare

    here, place = os.getcwd(), tmp_path_factory.mktemp("gpu")
    os.chdir(place)
    (place / "words.txt").write_text(words(3000))
    prepare.main(["words.txt", "--tokenizer=bytes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield place
    os.chdir(here)


@pytest.fixture(scope="module")
def losses(place):
    """losses(out_dir, "--seed=1", ...): train as RUN says, and return the losses of updates."""

    def call(out_dir, *argv):
        with pytest.raises(SystemExit) as stop:
            train.main([*RUN, f"--device={DEVICE}", f"--out_dir={out_dir}", *argv])
        assert not stop.value.code
        return read_losses(place / out_dir)

    return call


def read_losses(out_dir) -> list[float]:
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def plain(losses):
    """The losses of RUN, whose checkpoint is in plain/."""
    return losses("plain")


def torchrun(place, *argv) -> str:
    """Return the standard output of a script in one process under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = subprocess.run([*command, *argv], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losses_agree_with_the_cpu(plain, losses):
    assert plain == pytest.approx(losses("cpu", "--device=cpu"), abs=1e-3)
    assert plain[-1] < plain[0] - 1


def test_batches_are_the_same_as_on_the_cpu(place):
    config = train.TrainConfig(vocab_size=257, context_length=64, batch_size=8)
    split = train.prepare.load_dataset("words")[0]["train"]
    on_device, on_cpu = (train.get_batch(split, 7, config, name) for name in (DEVICE, "cpu"))
    for ours, other in zip(on_device, on_cpu):
        assert ours.device.type == DEVICE
        assert torch.equal(ours.cpu(), other)


def test_micro_batches_and_recomputed_activations_change_nothing(plain, losses):
    options = ["--micro_batch_size=3", "--activation_checkpointing"]
    assert losses("parts", *options) == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_learn(losses, plain, place, dtype):
    found = losses(dtype, f"--dtype={dtype}", "--max_iters=40")
    assert found[-1] < plain[0] - 1
    scaler = torch.load(place / dtype / "model.ckpt", weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_compiled_losses_agree(plain, losses, capfd):
    found = losses("compiled", "--compile")
    assert "compiled in" in capfd.readouterr().out
    assert found == pytest.approx(plain, abs=1e-3)


def test_newer_fields_and_muon_compiled_in_16_bits(losses):
    newer = ["--rotary", "--rms_norm", "--qk_norm", "--bias=false", "--tie_weights=false"]
    muon = ["--optimizer=muon", "--learning_rate=0.02", "--muon_interval=2", "--compile"]
    found = losses("newer", *newer, *muon, "--dtype=bfloat16")
    assert found[-1] < found[0] - 1


def test_muon_agrees_with_the_cpu(losses):
    options = ["--optimizer=muon", "--learning_rate=0.02"]
    found = losses("muon", *options)
    assert found == pytest.approx(losses("muon_cpu", *options, "--device=cpu"), abs=1e-2)
    assert found[-1] < found[0] - 1


def test_resumed_losses_agree(losses):
    whole = losses("whole", "--dropout=0.1", "--dtype=bfloat16")
    losses("resumed", "--dropout=0.1", "--dtype=bfloat16", "--max_iters=10")
    resumed = losses("resumed", "--dtype=bfloat16", "--init_from=resume")
    assert len(resumed) == 20
    assert resumed == pytest.approx(whole, abs=1e-2)


CHECKPOINT = """
import sys, torch
checkpoint = torch.load(sys.argv[1], weights_only=True)
assert not torch.cuda.is_available()
state = checkpoint["model"]
moments = [x for each in checkpoint["optimizer"].values() for x in each.values()]
assert len(moments) > len(state)
assert all(x.device.type == "cpu" for x in [*state.values(), *moments])
head, embedding = state["lm_head.weight"], state["transformer.wte.weight"]
assert head.data_ptr() == embedding.data_ptr()
"""


def test_checkpoint_opens_without_a_gpu(plain, place):
    argv = [sys.executable, "-c", CHECKPOINT, place / "plain/model.ckpt"]
    subprocess.run(argv, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)


def test_one_rank_of_ddp(plain, place):
    torchrun(place, ROOT / "train.py", *RUN, f"--device={DEVICE}", "--out_dir=ddp")
    assert read_losses(place / "ddp") == pytest.approx(plain, abs=1e-3)


FSDP = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
from model import GPT, GPTConfig, make_optimizers
import torch
import torch.distributed as dist

device = torch.device(sys.argv[2])
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
idx = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0)).to(device)
shape = dict(vocab_size=64, context_length=32, n_layer=2, n_head=2, n_embd=64)

def losses(dtype, shard):
    config = train.TrainConfig(**shape, parallel="fsdp", warmup_iters=0)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**shape)).train()
    sharded = train.distribute(gpt, config, device, dtype) if shard else gpt.to(device)
    optimizers = make_optimizers(gpt, config, dtype)
    for step in range(10):
        train.set_lr(optimizers, step, config)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sharded(idx[:, :-1], idx[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        yield train.to_numbers(loss.detach(), norm)[0]
        optimizers[0].step()
        optimizers[0].zero_grad()

for dtype in (torch.float32, torch.bfloat16):
    print(json.dumps([list(losses(dtype, shard)) for shard in (True, False)]))
dist.destroy_process_group()
"""


def test_one_rank_of_fsdp(place):
    (place / "fsdp.py").write_text(FSDP)
    lines = torchrun(place, "fsdp.py", ROOT, DEVICE).splitlines()
    for line, tolerance in zip(lines, (1e-3, 5e-2), strict=True):
        sharded, whole = json.loads(line)
        assert sharded == pytest.approx(whole, abs=tolerance)
        assert whole[-1] < whole[0] - 0.1


def test_generation_agrees_with_the_cpu_and_without_a_cache(plain, place):
    gpt = model.GPT.from_checkpoint(place / "plain/model.ckpt")
    idx = torch.randint(257, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = gpt.generate(idx, 80, temperature=0)  # beyond the context of 64
    gpt = gpt.to(DEVICE)
    for use_cache in (True, False):
        ours = gpt.generate(idx.to(DEVICE), 50, temperature=0, use_cache=use_cache)
        assert torch.equal(ours.cpu(), expected[:, :55])
    assert torch.equal(gpt.generate(idx.to(DEVICE), 80, temperature=0).cpu(), expected)
    drawn = [gpt.generate(idx.to(DEVICE), 50, top_k=20, seed=1) for _ in range(2)]
    assert torch.equal(*drawn)


def test_sample_py_agrees_with_the_cpu(plain, place, command):
    options = ["--ckpt", place / "plain/model.ckpt", "--dtype=float32", "--start=the painter"]
    options += ["--num_samples=2"]
    found = [command("sample.py", *options, f"--device={name}") for name in (DEVICE, "cpu")]
    assert found[0] == found[1]
    assert found[0][0] == 0
