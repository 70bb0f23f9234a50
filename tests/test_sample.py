import pytest
import torch
from conftest import TINY

import prepare
from model import GPT


@pytest.fixture
def trained(command, dataset):
    assert command("train.py", *TINY, "--max_iters=40", "--learning_rate=1e-2")[0] == 0


def test_the_prompt_and_its_continuation(command, trained):
    code, out, err = command("sample.py", "--start=The a", "--max_new_tokens=30", "--temperature=0")
    ids = list(b"The a")
    gpt = GPT.from_checkpoint("out/model.ckpt").eval()
    text = gpt.generate(torch.tensor([ids]), 30, temperature=0)[0].tolist()
    expected = prepare.decode(prepare.get_tokenizer("bytes"), text)
    assert code == 0 and err == "" and out == expected + "\n"


def test_a_seed_gives_the_same_text(command, trained):
    texts = [command("sample.py", "--start=a", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prompts_from_a_file_and_from_standard_input(command, trained, folder, shell):
    (folder / "prompt.txt").write_text("every gave")
    _, plain, _ = command("sample.py", "--start=every gave")
    assert command("sample.py", "--start=FILE:prompt.txt")[1] == plain
    assert shell("sample.py", "--start", "-", input="every gave")[1] == plain
    assert plain.startswith("every gave")


def test_several_samples(command, trained):
    _, out, _ = command("sample.py", "--start=a", "--num_samples=3")
    samples = out.split("-" * 40 + "\n")
    assert len(samples) == len(set(samples)) == 3 and all(x.startswith("a") for x in samples)


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


def test_half_a_character_prints_cleanly(command, trained, monkeypatch):
    pieces = iter([b"\xe2", b"\x82", b"\xac", b"x", b"\xf0", b"\x9f"])
    monkeypatch.setattr(prepare, "token_bytes", lambda tokenizer, id: next(pieces))
    _, out, _ = command("sample.py", "--start=a", "--max_new_tokens=6")
    assert out == "a\u20acx\ufffd\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ckpt=none.ckpt"], "there is no checkpoint none.ckpt"),
        (["--ckpt=words.txt"], "words.txt is not a checkpoint"),
        (["--start="], "the prompt is empty"),
        (["--start=FILE:none.txt"], "cannot read none.txt"),
        (["--num_samples=0"], "num_samples is 0"),
        (["--max_new_tokens=-5"], "max_new_tokens is -5"),
        (["--temperature=-1"], "temperature is -1.0"),
        (["--top_k=0"], "top_k is 0; it must be at least 1, or none"),
        (["--device=nowhere"], "--device nowhere cannot be used here"),
        (["--temprature=1"], "did you mean temperature?"),
    ],
)
def test_refused(command, trained, argv, message):
    code, out, err = command("sample.py", *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
