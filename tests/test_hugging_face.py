"""Weights from and to Hugging Face, against transformers itself."""

import json
import os
import random
import shutil
import sys
from dataclasses import asdict

import model
import prepare
from config import UserError
from model import GPT, GPTConfig, load_model

import pytest
import torch
from conftest import ROOT, TINY, words
from tiktoken.load import read_file_cached

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


MODERN = dict(rotary=True, rms_norm=True, qk_norm=True, bias=False, tie_weights=False)

# What transformers' NanoChat needs to be a model of ours.
NANOCHAT = dict(num_hidden_layers=2, num_attention_heads=3, hidden_size=24, intermediate_size=96)
NANOCHAT |= dict(max_position_embeddings=16, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-5)
NANOCHAT |= dict(final_logit_softcapping=None, bos_token_id=0, eos_token_id=0, pad_token_id=None)


def theirs(folder, kind="gpt2", **changes):
    torch.manual_seed(0)
    config = dict(n_positions=16, n_embd=24, n_layer=2, n_head=3) if kind == "gpt2" else NANOCHAT
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 61} | config | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains that matter
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def ours(**changes) -> GPT:
    torch.manual_seed(1)
    gpt = GPT(
        GPTConfig(
            **dict(vocab_size=61, context_length=16, n_layer=2, n_head=3, n_embd=24) | changes
        )
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return gpt.eval()


def assert_same_logits(one, other):
    idx = torch.randint(61, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(one(idx), other(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gpt2", {}),
        ("gpt2", {"n_layer": 3, "n_head": 2, "tie_word_embeddings": False}),
        ("gpt2", {"n_inner": 96, "activation_function": "gelu_pytorch_tanh"}),
        ("nanochat", {}),
        ("nanochat", {"num_attention_heads": 2, "hidden_act": "gelu_new"}),
        ("nanochat", {"tie_word_embeddings": True}),
    ],
)
def test_their_models_give_their_logits_here(tmp_path, kind, changes):
    expected = theirs(tmp_path, kind, **changes)
    gpt, rest = load_model(tmp_path)
    assert rest["tokenizer"] is None and not gpt.training
    assert_same_logits(gpt, expected)


def test_sharded_files(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=3, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path), model)
    fresh = theirs(tmp_path / "fresh", n_layer=3, n_head=2)
    for stale in tmp_path.glob("*.safetensors*"):  # beside a newer single file
        shutil.copy(stale, tmp_path / "fresh")
    assert (tmp_path / "fresh" / "model.safetensors.index.json").exists()
    assert_same_logits(GPT.from_pretrained(tmp_path / "fresh"), fresh)
    shard = next(tmp_path.glob("*00002*.safetensors"))
    for harm in (lambda: shard.write_bytes(b"x" * 99_999), shard.unlink):
        harm()
        with pytest.raises(ValueError, match="cannot read .* as GPT-2 or NanoChat: ") as error:
            GPT.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False, "tie_weights": False},  # the book's model
        {"bias": False},
        {"n_layer": 1, "n_head": 1, "tie_weights": False, "dropout": 0.25},
        MODERN,
        MODERN | {"n_layer": 3, "n_head": 2, "tie_weights": True, "dropout": 0.25},
    ],
)
def test_our_models_give_our_logits_there(tmp_path, changes):
    gpt = ours(**changes)
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # of an earlier, larger model
    name = gpt.save_pretrained(tmp_path, "bytes", 256)
    assert not list(tmp_path.glob("*index*"))
    cls = transformers.NanoChatForCausalLM if "rotary" in changes else transformers.GPT2LMHeadModel
    assert name == cls.__name__
    model, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == config.eos_token_id == 256 and config.pad_token_id is None
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_logits(gpt, model.eval())
    idx = torch.randint(61, (2, 3))
    generated = model.generate(idx, max_new_tokens=13, do_sample=False)
    assert torch.equal(generated, gpt.generate(idx, 13, temperature=0))
    again, rest = load_model(tmp_path)
    assert rest["tokenizer"] == "bytes" and again.config.dropout == gpt.config.dropout
    assert_same_logits(again, model)


@pytest.mark.parametrize("changes", [dict(qkv_bias=False, tie_weights=False), MODERN])
def test_export_import_export_gives_the_same_files(tmp_path, changes):
    gpt = ours(**changes)
    gpt.transformer.wte.weight.data.mul_(0.01)  # so close to zero that epsilons matter
    for block in gpt.transformer.h:
        block.attn.c_attn.weight.data[:48].mul_(0.003)  # queries and keys
    gpt.save_pretrained(tmp_path / "a", "gpt2", 50256)
    GPT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", "gpt2", 50256)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len({(tmp_path / "a" / name).stat().st_mode for name in names}) == 1


def test_a_model_with_other_logits_there_is_neither_written_nor_read(tmp_path, monkeypatch):
    theirs(tmp_path / "in")
    right = model.transformers_config

    def wrong(*args, **kwargs):
        config = right(*args, **kwargs)
        config.activation_function = "relu"
        return config

    monkeypatch.setattr(model, "transformers_config", wrong)
    for use in (
        lambda: ours().save_pretrained(tmp_path / "out", "gpt2", 50256),
        lambda: load_model(tmp_path / "in"),
    ):
        with pytest.raises(ValueError, match="its logits differ from transformers' by"):
            use()
    assert not (tmp_path / "out").exists()


def test_names_without_a_prefix_and_old_masks(tmp_path):
    """As OpenAI's own models lie on the hub."""
    model = theirs(tmp_path)
    state = {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in state.items() if k != "lm_head.weight"}
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), model)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, **changes):
    """Replace, add or with None remove tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path) | {f"transformer.{k}": v for k, v in changes.items()}
    safetensors.save_file({k: v for k, v in tensors.items() if v is not None}, path)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


def save_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(
        {"transformer.wte.weight": Malice(), "x": torch.ones(9999)}, folder / "pytorch_model.bin"
    )


BIAS = "h.1.mlp.c_fc.bias"


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: (d / "config.json").unlink(), "lacks config.json"),
        (
            lambda d: (d / "model.safetensors").unlink(),
            "as GPT-2 or NanoChat: its files are smaller than",
        ),
        (lambda d: (d / "config.json").write_text("{"), "config.json. is not a valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "as GPT-2 or NanoChat: "),
        (lambda d: (d / "config.json").write_text("{}"), "its files are smaller than the model"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99_999), "header too large"),
        (save_pickle, "would run code when loaded, which is refused"),
        (lambda d: edit(d, model_type="llama"), "its model_type is 'llama'"),
        (lambda d: edit(d, activation_function="relu"), "its activation_function is 'relu'"),
        (lambda d: edit(d, n_inner=50), "its n_inner is 50"),
        (lambda d: edit(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda d: edit(d, n_embd=27), "mismatched_keys: .*transformer.h.0"),
        (lambda d: edit(d, n_layer=3), "missing_keys: transformer.h.2.attn.c_attn.bias"),
        (lambda d: edit(d, n_layer=10**9), "its files are smaller than the model"),
        (lambda d: edit(d, n_head="3"), "as GPT-2 or NanoChat: "),
        (lambda d: edit_tensors(d, **{BIAS: None}), f"missing_keys: transformer.{BIAS}"),
        (lambda d: edit_tensors(d, more=torch.ones(2)), "unexpected_keys: transformer.more"),
        (lambda d: edit_tensors(d, **{BIAS: torch.ones(2)}), f"mismatched_keys: .*{BIAS}"),
    ],
)
def test_folders_that_are_no_gpt2(folder, capfd, harm, message):
    theirs(folder / "x")
    harm(folder / "x")
    capfd.readouterr()
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained("x")
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
    assert not (folder / "malice").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_act="relu2"), "its hidden_act is 'relu2', not 'gelu_pytorch_tanh'"),
        (dict(intermediate_size=50), "its intermediate_size is 50, not 96"),
        (dict(num_key_value_heads=1), "its num_key_value_heads is 1, not 3"),
        (dict(final_logit_softcapping=15.0), "its final_logit_softcapping is 15.0, not None"),
        (dict(attention_bias=True), "its attention_bias is True"),
        (dict(rms_norm_eps=1e-6), "its rms_norm_eps is 1e-06, not 1e-05"),
        (dict(rope_theta=5e5), "its rope_parameters is {'rope_theta': 500000.0"),
        (dict(rope_parameters=dict(rope_type="linear", factor=2.0)), "its rope_parameters is "),
        (dict(head_dim=12), "mismatched_keys: .*model.layers.0.self_attn"),
    ],
)
def test_nanochats_with_other_settings(tmp_path, changes, message):
    theirs(tmp_path, "nanochat", **changes)
    if "rope_theta" in changes:  # as older versions of transformers write it
        edit(tmp_path, rope_parameters=None, **changes)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rms_norm=True), "as gpt2: its rms_norm is not False"),
        (dict(qk_norm=True), "as gpt2: its qk_norm is not False"),
        (MODERN | dict(rms_norm=False), "as nanochat: its rms_norm is not True"),
        (MODERN | dict(qk_norm=False), "as nanochat: its qk_norm is not True"),
        (MODERN | dict(bias=True), "as nanochat: its bias is not False"),
    ],
)
def test_models_that_transformers_lacks_are_not_exported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"not expressible {message}"):
        ours(**changes).save_pretrained(tmp_path / "x", "gpt2", 50256)
    assert not (tmp_path / "x").exists()


def test_a_name_that_is_neither_here_nor_on_the_hub(command, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise OSError("no such name")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    code, _, err = command("sample.py", "--init_from=nobody/nothing")
    where = "nobody/nothing (not a file or folder here)"
    assert code == 2 and f"cannot read {where} as GPT-2 or NanoChat: no such name" in err
    monkeypatch.setitem(sys.modules, "transformers", None)
    gpt = GPT(GPTConfig(257, 8, 1, 1, 8))
    torch.save({"model": gpt.state_dict(), "model_args": asdict(gpt.config)}, "gpt.ckpt")
    for argv, what in (
        (["--init_from=gpt2"], "gpt2 (not a file or folder here)"),
        (["--ckpt=gpt.ckpt", "--export=a"], "--export"),
    ):
        code, _, err = command("sample.py", *argv)
        wanted = f"sample.py: {what} needs transformers: pip install transformers\n"
        assert (code, err) == (2, wanted)


def test_a_hub_name_is_downloaded(command, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    theirs(tmp_path / "hub", vocab_size=50257)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **kwargs: str(tmp_path / "hub"))
    code, out, _ = command("sample.py", "--init_from=gpt2", "--start=Every", "--max_new_tokens=3")
    assert code == 0 and out.startswith("Every")


def save_tokenizer(folder, kind):
    """Write GPT-2's tokenizer files, with one more token, in another order, or another class's."""
    for name, original in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        (folder / name).write_bytes(read_file_cached(prepare.GPT2_URL + original))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    if kind == "padded":
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)
    if kind == "shuffled":
        vocabulary = json.loads((folder / "vocab.json").read_text())
        ids = random.Random(0).sample(range(50257), 50257)
        (folder / "vocab.json").write_text(json.dumps(dict(zip(vocabulary, ids))))
    if kind == "bert":
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a"]))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


@pytest.mark.parametrize(
    "kind, vocab_size, name, says",
    [
        ("none", 50257, "gpt2", "no tokenizer named: 50,257 ids, so GPT-2's is assumed"),
        ("none", 65, None, "tokenizer is not known (65 ids without names)"),
        ("gpt2", 50257, "gpt2", ""),
        ("padded", 50304, "bpe:50258", ""),
        ("shuffled", 50257, None, "cannot be used: its ids are not in the order of its merges"),
        ("bert", 21128, None, "cannot be used: its model is WordPiece, not BPE"),
    ],
)
def test_the_tokenizer_of_a_folder(command, tmp_path, kind, vocab_size, name, says):
    """What can be expressed is used and exported; what cannot is never taken for GPT-2's."""
    folder = tmp_path / "in"
    theirs(folder, vocab_size=vocab_size, eos_token_id=0, bos_token_id=0)
    if kind != "none":
        save_tokenizer(folder, kind)
    argv = ["--max_new_tokens=2", "--start=Every effort"]
    code, out, err = command("sample.py", "--init_from=in", *argv)
    assert (code, err.count("\n")) == (0 if name else 2, bool(says)) and says in err
    assert out.startswith("Every effort") if name else not out
    code, out, _ = command("sample.py", "--init_from=in", "--export=out")
    assert code == 0 and bool(name) == (tmp_path / "out" / "tokenizer.json").exists()
    lacks = "names of the last 46 ids" if kind == "padded" else "" if name else "tokenizer files: "
    assert out.count("\n") == 1 + bool(lacks) and lacks in out
    found = load_model("out")[1]["tokenizer"]
    assert (found and prepare.tokenizer_name(found).split("-")[0]) == name
    # Its own files may be written again; other files stay as they are.
    assert command("sample.py", "--init_from=out", "--export=out")[0] == 0
    code, _, err = command("sample.py", "--init_from=out", "--export=in")
    assert code == 0 if kind == "none" else code == 2 and "name a new folder" in err


@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base", "bytes", "bpe:300"])
def test_a_tokenizer_travels_with_the_weights(command, dataset, tmp_path, tokenizer):
    """The dataset's ids are those of AutoTokenizer; training goes on from the folder, both ways."""
    assert command("prepare.py", "words.txt", f"--tokenizer={tokenizer}")[0] == 0
    modern = [str(ROOT / "config/modern.py")] if tokenizer == "bpe:300" else []
    assert command("train.py", *modern, *TINY, "--max_iters=1")[0] == 0
    code, out, _ = command("sample.py", "--export=out")
    name = "NanoChatForCausalLM" if modern else "GPT2LMHeadModel"
    assert (code, out) == (0, f"written: out, for {name}.from_pretrained\n")
    theirs, text = transformers.AutoTokenizer.from_pretrained("out"), words(50) + prepare.SAMPLE
    encoding = prepare.get_tokenizer(model.find_tokenizer(tmp_path / "out")[0])
    assert theirs.encode(text) == encoding.encode_ordinary(text)
    assert theirs.eos_token_id == theirs.bos_token_id == encoding.eot_token
    saved = transformers.AutoConfig.from_pretrained("out")
    assert saved.eos_token_id == saved.bos_token_id == encoding.eot_token
    argv = ["--max_iters=1", "--eval_iters=1", "--init_from=out", "--out_dir=o"]
    code, _, err = command("train.py", "--dataset=words", *argv)
    assert (code, err) == (0, "")
    # With the folder's tokenizer, and no longer with the name.
    assert command("prepare.py", "words.txt", "--dataset=again", "--tokenizer=out")[0] == 0
    again = (tmp_path / "data" / "again" / "train.bin").read_bytes()
    assert again == (dataset / "train.bin").read_bytes()
    code, _, err = command("train.py", "--dataset=again", *argv)
    assert (code, err) == (0, "")


def test_export_without_the_vocabulary(command, tmp_path, monkeypatch):
    theirs(tmp_path / "in", vocab_size=50257)

    def refuse(name):
        raise UserError("cannot get the vocabulary of gpt2")

    monkeypatch.setattr(prepare, "load_encoding", refuse)
    code, out, err = command("sample.py", "--init_from=in", "--export=out")
    assert code == 0 and "without tokenizer files: cannot get the vocabulary of gpt2" in out
    assert load_model("out")[1]["tokenizer"] == "gpt2"
