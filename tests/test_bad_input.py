"""What a user can get wrong, through the command line: one line on stderr, exit code 2, nothing half-written.
Run: pytest tests/test_bad_input.py (8 s)."""
import base64
import io
import json
import os
import re
import signal
import struct
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import selw2s

WQ, EMBED = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


class Box:
    """A copy of the tiny task and its two checkpoints, the command line on them, and ways to damage both."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch, self.out = folder, monkeypatch, folder / "out"
        self.task, self.weak, self.strong = folder / "task.jsonl", folder / "weak", folder / "strong"
        self.argv = ["--task", str(self.task), "--weak", str(self.weak), "--strong", str(self.strong),
                     "--lr", "1e-3", "--epochs", "1", "--methods", "naive", "--out", str(self.out)]

    def flag(self, *words):
        self.argv += words              # the last one counts

    def rows(self, edit=None, keep=None):
        """The task's lines as objects; edit(rows) may change them, keep(row) may drop some."""
        rows = [json.loads(line) for line in self.task.read_text().splitlines()]
        if edit:
            edit(rows)
        self.task.write_text("".join(json.dumps(row) + "\n" for row in rows if not keep or keep(row)))

    def line(self, text, n=3):
        """Line n of the task becomes this text, or these bytes."""
        lines = self.task.read_bytes().splitlines()
        lines[n - 1] = text if isinstance(text, bytes) else text.encode()
        self.task.write_bytes(b"\n".join(lines))

    def json(self, name="config.json", side="weak", **keys):
        """Keys of a JSON file of a checkpoint set (a file that is not there: written)."""
        path = self.folder / side / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | keys))

    def text(self, name, text, side="weak"):
        (self.folder / side / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    def without(self, name, side="weak"):
        (self.folder / side / name).unlink()

    def cut(self, name, share, side="weak"):
        os.truncate(self.folder / side / name, int((self.folder / side / name).stat().st_size * share))

    def tensors(self, edit, side="weak"):
        path = self.folder / side / "model.safetensors"
        state = load_file(path)
        edit(state)
        save_file(state, path)

    def header(self, edit):
        """The JSON header of weak/model.safetensors edited, its length corrected, the data left."""
        path = self.weak / "model.safetensors"
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    def dangling(self, name):
        """The file becomes a link to nothing."""
        self.without(name)
        (self.weak / name).symlink_to("../../blobs/" + "0" * 40)

    def shards(self, weight_map):
        """The one file under another name, and an index."""
        names = load_file(self.weak / "model.safetensors")
        (self.weak / "model.safetensors").rename(self.weak / "model-1.safetensors")
        self.json("model.safetensors.index.json", weight_map=weight_map(names))

    def vocab_and_merges(self, merges="", **vocab):
        """vocab.json and merges.txt instead of tokenizer.json."""
        vocab = vocab or json.loads((self.weak / "tokenizer.json").read_text())["model"]["vocab"]
        self.without("tokenizer.json")
        self.text("vocab.json", json.dumps(vocab))
        self.text("merges.txt", "#version: 0.2\n" + merges)

    def tiktoken(self, *more, n=256):
        """qwen.tiktoken instead of tokenizer.json: n single bytes, then these lines."""
        self.without("tokenizer.json")
        lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(n)]
        self.text("qwen.tiktoken", b"\n".join([*lines, *more]))

    def official(self, task="boolq"):
        """The command line on an official task, no network: files are looked for under data/."""
        self.flag("--task", task, "--data-dir", str(self.folder / "data"))
        self.offline()
        (self.folder / "data" / task).mkdir(parents=True)
        return self.folder / "data" / task

    def offline(self, body=None):
        def urlopen(url, timeout):
            if body is None:
                raise OSError("Network is unreachable")
            response = io.BytesIO(body)
            response.url = url
            return response
        self.monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    def result(self, **keys):
        """--rerun of a result.json with these keys."""
        (self.folder / "result.json").write_text(json.dumps({"schema": 3, "analysis": None, **keys}))
        self.flag("--rerun", str(self.folder / "result.json"))


def flip(box, at, bit=6):
    """One bit of the weak checkpoint's data, counted from the end, or of its header, from the start."""
    path = box.weak / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def poison(state):
    state[WQ][0, 0] = float("nan")


def blow(state):
    """A flipped exponent bit, as bad memory makes it: 1.0 becomes infinite."""
    state["model.norm.weight"].view(torch.uint8)[3] ^= 0x40


def replaced(path: Path, body=b""):
    """A file where a directory is expected."""
    path.write_bytes(body)
    return str(path)


def no_home(box):
    def nobody(uid):
        raise KeyError(uid)
    box.monkeypatch.delenv("HOME")
    box.monkeypatch.delenv("SELW2S_DATA", raising=False)
    box.monkeypatch.setattr("pwd.getpwuid", nobody)


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")


def full_disk(box):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    box.monkeypatch.setattr(np, "savez_compressed", full)


# name: (regex of the message, what is done to the box)
CHECKPOINTS = {
    "no such directory": (r"nowhere: no such directory",
          lambda b: b.flag("--weak", str(b.folder / "nowhere"))),
    "file in the place of a directory": (r"task\.jsonl: no such directory",
          lambda b: b.flag("--weak", str(b.task))),
    "empty directory": (r"empty: no config\.json there", lambda b: (
        (b.folder / "empty").mkdir(), b.flag("--strong", str(b.folder / "empty")))),
    "zero byte in the name": (r"no such directory", lambda b: b.flag("--weak", "a\0b")),
    "pickle only": (r"pickle checkpoints are refused", lambda b: (
        b.weak / "model.safetensors").rename(b.weak / "pytorch_model.bin")),
    "shards without an index": (r"weak: .* only shards without their model\.safetensors\.index\.json",
          lambda b: (b.weak / "model.safetensors").rename(b.weak / "model-00001-of-00002.safetensors")),
    "weights that link to nothing": (r"weak: model\.safetensors is a link to no file: .*half-downloaded",
          lambda b: b.dangling("model.safetensors")),
    "configuration that links to nothing": (r"weak: config\.json is a link to no file: .*half-downloaded",
          lambda b: b.dangling("config.json")),
    "tokenizer that links to nothing": (r"weak: tokenizer\.json is a link to no file: .*half-downloaded",
          lambda b: b.dangling("tokenizer.json")),
    "settings that link to nothing": (r"tokenizer_config\.json is a link to no file", lambda b: (
        b.json("tokenizer_config.json"), b.dangling("tokenizer_config.json"))),
    "a classifier as the strong model": (
        r"strong: has a classifier's head, and no language model's.*give the pretrained model", lambda b: (
            b.json(side="strong", tie_word_embeddings=False),
            b.tensors(lambda s: s.update({"score.weight": torch.ones(2, 32)}), "strong"))),
    "strong one truncated": (r"strong: .*truncated or damaged",
          lambda b: b.cut("model.safetensors", 0.5, "strong")),
    "header cut": (r"model\.safetensors: .*damaged", lambda b: b.cut("model.safetensors", 0.01)),
    "not safetensors at all": (r"truncated or damaged",
          lambda b: b.text("model.safetensors", b"PK\3\4" * 99)),
    "git-lfs pointer": (r"truncated or damaged", lambda b: b.text(
        "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    "header of 2**60 bytes": (r"truncated or damaged", lambda b: b.text(
        "model.safetensors", struct.pack("<Q", 2 ** 60) + b"{}")),
    "bit flipped in the header": (r"damaged|missing|unexpected", lambda b: flip(b, 60)),
    "bit flipped in the data": (r"tensor model\.norm\.weight holds NaN or infinity",
          lambda b: b.tensors(blow)),
    "header lies about a size": (r"truncated or damaged", lambda b: b.header(
        lambda h: h[WQ].update(shape=[2 ** 40, 2 ** 20]))),
    "offsets overlap": (r"truncated or damaged", lambda b: b.header(
        lambda h: h[WQ].update(data_offsets=h[EMBED]["data_offsets"]))),
    "offsets out of the file": (r"truncated or damaged", lambda b: b.header(
        lambda h: h[WQ].update(data_offsets=[0, 2 ** 50]))),
    "unknown dtype": (r"truncated or damaged", lambda b: b.header(lambda h: h[WQ].update(dtype="F31"))),
    "integers": (r"int8: quantised checkpoints and other types are refused, use float32", lambda b: b.tensors(
        lambda s: s.update({WQ: s[WQ].to(torch.int8)}))),
    "float64": (r"float64: .*use float32", lambda b: b.tensors(lambda s: s.update({WQ: s[WQ].double()}))),
    "NaN weight": (r"holds NaN or infinity: .*download it again", lambda b: b.tensors(poison)),
    "type that PyTorch has not": (
        r"weak: tensor model\.embed_tokens\.weight in .* cannot be read .*F6_E2M3.*: use float32",
        lambda b: b.header(lambda h: h[EMBED].update(dtype="F6_E2M3", shape=[300 * 16 * 32 // 6]))),
    "missing tensor": (r"tensor layers\.0\.self_attn\.q_proj\.weight is missing", lambda b: b.tensors(
        lambda s: s.pop(WQ))),
    "extra tensor": (r"1 unexpected tensors, the first is layers\.7\.x", lambda b: b.tensors(
        lambda s: s.update({"model.layers.7.x": torch.ones(1)}))),
    "extra tensor with line feeds in its name": (r"1 unexpected tensors", lambda b: b.tensors(
        lambda s: s.update({"a\nb\x1b[2J": torch.ones(1)}))),
    "misshapen tensor": (r"has shape \(16,\), config\.json implies \(16, 16\)", lambda b: b.tensors(
        lambda s: s.update({WQ: s[WQ][0].clone()}))),
    "index with ../": (r"plain file names", lambda b: b.shards(
        lambda s: {k: "../strong/model.safetensors" for k in s})),
    "index with an absolute path": (r"plain file names", lambda b: b.shards(
        lambda s: {k: str(b.strong / "model.safetensors") for k in s})),
    "index of the directory above": (r"weak: \.\.: missing, truncated or damaged", lambda b: b.shards(
        lambda s: {k: ".." for k in s})),
    "index with a zero byte": (r"a.b: missing, .*half-downloaded", lambda b: b.shards(
        lambda s: {k: "a\0b" for k in s})),
    "index with half a character": (r"missing, .*half-downloaded", lambda b: b.shards(
        lambda s: {k: "\ud800" for k in s})),
    "index with a name of 5000 letters": (r"missing, .*half-downloaded", lambda b: b.shards(
        lambda s: {k: "x" * 5000 for k in s})),
    "index naming a missing file": (r"model-2\.safetensors: missing, .*half-downloaded", lambda b: b.shards(
        lambda s: {k: "model-2.safetensors" for k in s})),
    "index that names too much": (r"disagree, first on '?zz", lambda b: b.shards(
        lambda s: {k: "model-1.safetensors" for k in [*s, "zz"]})),
    "larger than the memory": (r"weak: .*memory.*--dtype bfloat16", lambda b: b.monkeypatch.setattr(
        "model.read_params", no_memory)),
    "index not JSON": (r"index\.json: not valid JSON", lambda b: (
        b.shards(lambda s: {}), b.text("model.safetensors.index.json", "{"))),
}
CONFIGS = {
    "not JSON": (r"config\.json: not valid JSON", lambda b: b.cut("config.json", 0.5)),
    "not UTF-8": (r"config\.json: not valid JSON", lambda b: b.text("config.json", b"\xff\xfe{}")),
    "not an object": (r"config\.json: not a JSON object", lambda b: b.text("config.json", "[1]")),
    "nested too deep": (r"config\.json: not valid JSON",
          lambda b: b.text("config.json", '{"a":' + "[" * 100_000)),
    "a directory": (r"config\.json", lambda b: (b.without("config.json"), (b.weak / "config.json").mkdir())),
    "not causal": (r"is_causal = False is not supported, only True", lambda b: b.json(is_causal=False)),
    "layers that differ": (r"per_layer_config = {'0'", lambda b: b.json(
        per_layer_config={"0": {"hidden_act": "relu"}})),
    "part of a head is turned": (r"partial_rotary_factor = 0\.5 is not supported", lambda b: b.json(
        partial_rotary_factor=0.5)),
    "mixture of experts": (r"model_type 'mixtral' is not supported, only gpt2", lambda b: b.json(
        model_type="mixtral")),
    "no family": (r"model_type None is not supported", lambda b: b.json(model_type=None)),
    "family a list": (r"model_type", lambda b: b.json(model_type=["llama"])),
    "family a page long": (r"model_type 'x", lambda b: b.json(model_type="x\n" * 9999)),
    "quantised": (r"quantised checkpoints are refused", lambda b: b.json(quantization_config={"bits": 4})),
    "wrong type": (r"config\.json: hidden_size = 'sixteen' is of the wrong type", lambda b: b.json(
        hidden_size="sixteen")),
    "true as a number": (r"config\.json: num_hidden_layers = True", lambda b: b.json(num_hidden_layers=True)),
    "zero heads": (r"config\.json: num_attention_heads = 0 .*a whole number from 1", lambda b: b.json(
        num_attention_heads=0)),
    "heads that do not divide": (r"config\.json: 3 heads do not share out", lambda b: b.json(
        num_key_value_heads=2, num_attention_heads=3, head_dim=4)),
    "more heads than width": (r"config\.json: 32 heads do not share out", lambda b: b.json(
        num_attention_heads=32)),
    "odd head dimension": (r"config\.json: RoPE on 7 of 7 channels", lambda b: b.json(head_dim=7)),
    "huge width": (r"config\.json: hidden_size = 1000000000", lambda b: b.json(hidden_size=10 ** 9)),
    "huge number of layers": (r"config\.json: num_hidden_layers = 10000000000", lambda b: b.json(
        num_hidden_layers=10 ** 10)),
    "blocks listed ten milliard times": (r"attention_types must give 1 x global or local", lambda b: b.json(
        model_type="gpt_neo", attention_types=[[["global"], 10 ** 10]])),
    "number of 400 digits": (r"config\.json: head_dim = 1000", lambda b: b.json(head_dim=10 ** 400)),
    "number of 5000 digits": (r"config\.json: not valid JSON", lambda b: b.text(
        "config.json", '{"head_dim": 1' + "0" * 5000 + "}")),
    "negative layers": (r"config\.json: num_hidden_layers = -1", lambda b: b.json(num_hidden_layers=-1)),
    "negative context": (r"config\.json: max_position_embeddings = -5", lambda b: b.json(
        max_position_embeddings=-5)),
    "negative window": (r"config\.json: sliding_window = -4", lambda b: b.json(
        model_type="mistral", num_key_value_heads=2, sliding_window=-4)),
    "eps NaN": (r"config\.json.*rms_norm_eps", lambda b: b.json(rms_norm_eps=float("nan"))),
    "eps 1e400": (r"config\.json.*rms_norm_eps", lambda b: b.text(
        "config.json", (b.weak / "config.json").read_text().replace("{", '{"rms_norm_eps": 1e400,', 1))),
    "rope_theta NaN": (r"config\.json.*rope_theta", lambda b: b.json(rope_theta=float("nan"))),
    "rope_theta null": (r"config\.json.*rope_theta", lambda b: b.json(rope_theta=None)),
    "rope factor zero": (r"config\.json: factor = 0", lambda b: b.json(
        rope_scaling={"rope_type": "linear", "factor": 0})),
    "rope factor a list": (r"config\.json: factor = \[2\]", lambda b: b.json(
        rope_scaling={"rope_type": "linear", "factor": [2]})),
    "rope scaling unknown": (r"RoPE scaling 'yarn'",
          lambda b: b.json(rope_scaling={"type": "yarn", "factor": 2})),
    "rope frequencies equal": (r"low_freq_factor must be below high_freq_factor",
          lambda b: b.json(rope_scaling={
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
        "original_max_position_embeddings": 64})),
    "tied a word": (r"config\.json: tie_word_embeddings = 'false'",
          lambda b: b.json(tie_word_embeddings="false")),
    "sliding window off by a word": (r"use_sliding_window = 'false' .*true or false", lambda b: b.json(
        model_type="qwen2", num_key_value_heads=2, use_sliding_window="false")),
}
TOKENIZERS = {
    "missing": (r"weak: no tokenizer\.json there", lambda b: b.without("tokenizer.json")),
    "truncated": (r"tokenizer's files are damaged", lambda b: b.cut("tokenizer.json", 0.7)),
    "empty": (r"tokenizer's files are damaged", lambda b: b.text("tokenizer.json", "")),
    "nested too deep": (r"tokenizer's files are damaged", lambda b: b.text(
        "tokenizer.json", '{"a":' + "[" * 100_000)),
    "larger than the vocabulary": (
        r"weak: '.*Which colour.*' has the token id 2\d\d, the embedding only 200 rows", lambda b: (
        b.json(vocab_size=200), b.tensors(lambda s: s.update({EMBED: s[EMBED][:200].clone()})))),
    "of another family": (r"weak: .*damaged \(WordPiece error: Missing \[UNK\]", lambda b: b.json(
        "tokenizer.json", model={"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                                 "max_input_chars_per_word": 100, "vocab": {"bonjour": 0}})),
    "of another language": (r"weak: the tokenizer has no token for 'Q: Which.*another language",
          lambda b: b.json(
        "tokenizer.json", model={"type": "BPE", "vocab": {"\u6f22": 0}, "merges": []})),
    "no vocabulary": (r"weak: the tokenizer has no token for 'Q: ", lambda b: b.json(
        "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})),
    "template of a token that is not there": (r"the tokenizer's files are damaged", lambda b: b.json(
        "tokenizer.json", post_processor={
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},     # the Rust code panics
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}]})),
    "template of an id that is not there": (r"'Q: .*' has the token id 1000, the embedding only 300 rows",
          lambda b: b.json(
        "tokenizer.json", post_processor={
            "type": "BertProcessing", "sep": ["[SEP]", 1000], "cls": ["[CLS]", 1]})),
    "merge of three": (r"merges\.txt:2: not two tokens", lambda b: b.vocab_and_merges("a b c\n")),
    "merge of one": (r"merges\.txt:3: not two tokens", lambda b: b.vocab_and_merges("\nab\n")),
    "merge out of the vocabulary": (r"tokenizer's files are damaged",
          lambda b: b.vocab_and_merges("zz yy\n")),
    "vocab.json negative": (r"tokenizer's files are damaged", lambda b: b.vocab_and_merges(a=-1)),
    "vocab.json of words": (r"tokenizer's files are damaged", lambda b: b.vocab_and_merges(a="b")),
    "vocab.json empty": (r"weak: the tokenizer",
          lambda b: (b.vocab_and_merges(), b.text("vocab.json", "{}"))),
    "id of another vocabulary": (r"the id 7, vocab\.json another", lambda b: (b.vocab_and_merges(), b.json(
        "tokenizer_config.json", added_tokens_decoder={"7": {"content": "<new>"}}))),
    "settings a list": (r"tokenizer_config\.json: not a JSON object", lambda b: (
        b.vocab_and_merges(), b.text("tokenizer_config.json", "[]"))),
    "qwen: bad base64": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"!!! 256")),
    "qwen: a letter that base64 has not": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"Y!WI= 256")),
    "qwen: no rank": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YWI=")),
    "qwen: rank no number": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YWI= x")),
    "qwen: rank negative": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YWI= -1")),
    "qwen: rank skipped": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YWI= 300")),
    "qwen: token twice": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YQ== 256")),
    "qwen: rank twice": (r"qwen\.tiktoken:257", lambda b: b.tiktoken(b"YWI= 97")),
    "qwen: bytes missing": (r"qwen\.tiktoken: byte 255", lambda b: b.tiktoken(n=255)),
}
HUB = {
    "offline": (r"no/model-here: no such directory, and the hub gives",
          lambda b: b.flag("--weak", "no/model-here")),
    "three parts": (r"a/b/c: no such directory", lambda b: b.flag("--weak", "a/b/c")),
    "a name the hub refuses": (r"no such directory, and the hub gives",
          lambda b: b.flag("--weak", "a--b/c..d")),
    "a name with a space": (r"my model: no such directory", lambda b: b.flag("--weak", "my model")),
    "empty name": (r"--weak|no such directory", lambda b: b.flag("--weak", "")),
}
DATA = {
    "unknown task": (r"unknown task 'sciqq'; known are demo", lambda b: b.flag("--task", "sciqq")),
    "task without models": (r"needs --weak MODEL and --strong MODEL", lambda b: (
        b.argv.clear(), b.flag("--task", "sciq", "--out", str(b.out)))),
    "missing": (r"none\.jsonl: cannot be read: No such file",
          lambda b: b.flag("--task", str(b.folder / "none.jsonl"))),
    "directory": (r"d\.jsonl: cannot be read: Is a directory", lambda b: (
        (b.folder / "d.jsonl").mkdir(), b.flag("--task", str(b.folder / "d.jsonl")))),
    "empty": (r"0 training question\(s\) are too few; give 20 or more", lambda b: b.task.write_text("")),
    "malformed": (r"task\.jsonl:3: not JSON: .* at column 4", lambda b: b.line("{} {}")),
    "not an object": (r"task\.jsonl:3: not an object", lambda b: b.line("[1, 2]")),
    "not UTF-8": (r"task\.jsonl:3: not UTF-8; save the file as UTF-8",
          lambda b: b.line(b'{"question": "caf\xe9"}')),
    "UTF-16": (r"task\.jsonl:1: not UTF-8",
          lambda b: b.task.write_bytes(b.task.read_text().encode("utf-16"))),
    "nested too deep": (r"task\.jsonl:3: .*recursion", lambda b: b.line("[" * 100_000)),
    "number of 5000 digits": (r"task\.jsonl:3: .*digits",
          lambda b: b.line('{"answer": 1' + "0" * 5000 + "}")),
    "NaN": (r'task\.jsonl:3: "answer" must be int or str, found nan', lambda b: b.line(
        '{"question": "q", "options": ["a", "b"], "answer": NaN}')),
    "question a number": (r'task\.jsonl:1: "question" must be str, found 7', lambda b: b.rows(
        lambda r: r[0].update(question=7))),
    "options a text": (r'task\.jsonl:1: "options" must be list', lambda b: b.rows(
        lambda r: r[0].update(options="ab"))),
    "answer missing": (r'task\.jsonl:9: "answer" is missing', lambda b: b.rows(lambda r: r[8].pop("answer"))),
    "answer out of range": (r'task\.jsonl:1: "answer" 4 is neither an option nor an index', lambda b: b.rows(
        lambda r: r[0].update(answer=4))),
    "options that are all the same": (r"task\.jsonl:1: 3 options, 1 different; give two", lambda b: b.rows(
        lambda r: r[0].update(options=["a", "a ", "a\u200b"], answer=1))),
    "ids that repeat": (r"task\.jsonl:2: id 'q0' is line 1's too",
          lambda b: b.rows(lambda r: r[1].update(id="q0"))),
    "key twice": (r"task\.jsonl:3: key 'answer' stands there twice", lambda b: b.line(
        '{"question": "q", "options": ["a", "b"], "answer": 0, "answer": 1, "split": "train"}')),
    "unknown key": (r"task\.jsonl:1: unknown key 'contxt'",
          lambda b: b.rows(lambda r: r[0].update(contxt="c"))),
    "split on some rows": (r'task\.jsonl:2: "split" must stand on every line or on none', lambda b: b.rows(
        lambda r: r[1].pop("split"))),
    "one class": (r"all training answers are yes; give yes and no", lambda b: b.rows(
        lambda rows: [r.update(options=["yes", "no"], answer=0) for r in rows])),
    "too few to train on": (r"1 training question\(s\) are too few; give 20", lambda b: b.rows(
        keep=lambda r: r["split"] == "test" or r["id"] == "q0")),
    "too few to test on": (r"0 test question\(s\) are too few; give 10", lambda b: b.rows(
        keep=lambda r: r["split"] == "train")),
    "one group": (r"give more questions, in more groups", lambda b: b.rows(
        lambda rows: [r.update(group="g") for r in rows if r["split"] == "train"])),
    "test asks what training asks": (r"no training question is left",
          lambda b: b.rows(lambda rows: [r.update(group="g") for r in rows])),
    "question over the context": (r"question q5 is \d+ tokens over the models' 128 .*shorten it",
          lambda b: b.rows(
        lambda r: r[5].update(question="gold " * 500))),
    "official file changed": (r"train\.jsonl is not the official file: SHA-256 \w{64}.*move it away",
          lambda b: (
        b.official() / "train.jsonl").write_text("{}\n")),
    "official file a directory": (r"train\.jsonl: Is a directory",
          lambda b: (b.official() / "train.jsonl").mkdir()),
    "official file, no network": (
        r"train\.jsonl is missing, no download: Network is unreachable; get https://.* and put it there",
        lambda b: b.official()),
    "official file, another downloaded": (r"no download: got 5 bytes of SHA-256", lambda b: (
        b.official(), b.offline(b"<html"))),
}
NUMBERS = {"tau": "nan inf -0.1 high 1e400", "alpha": "nan inf -0.1 1 1.5 high", "k": "0 -3 2.5 nan many",
           "lr": "0 -1e-3 nan inf fast", "gamma": "nan inf -1 x", "epochs": "0 -1 2.5 answers many",
           "batch": "0 -8 x 9999999999",
           "limit": "-1 all", "shots": "-1 one", "seeds": "a 0.5 -1 99999999999999999999"}
FLAGS = {
    "unknown flag": (r"unrecognized arguments: --taau", lambda b: b.flag("--taau", "0.5")),
    "abbreviated flag": (r"unrecognized arguments: --meth", lambda b: b.flag("--meth", "all")),
    "line feed in a flag": (r"unrecognized arguments: --ta u$", lambda b: b.flag("--ta\nu")),
    "flag without a value": (r"--tau: expected one argument", lambda b: b.flag("--tau")),
    "unknown method": (r"--methods: invalid choice: 'best'", lambda b: b.flag("--methods", "best")),
    "unknown dtype": (r"--dtype: invalid choice: 'int8'", lambda b: b.flag("--dtype", "int8")),
    "unknown analysis": (r"--analysis: invalid choice: 'x'", lambda b: b.flag("--analysis", "x")),
    "analysis that needs a weak model": (r"cross-task needs --weak MODEL, which labels the other", lambda b: (
        b.argv.clear(), b.flag("--task", str(b.task), "--strong", str(b.folder / "strong"), "--out",
                               str(b.out), "--analysis", "cross-task"))),
    "analysis that needs the probe": (r"cross-task needs --weak MODEL, .* and --route probe",
                                      lambda b: b.flag("--analysis", "cross-task", "--route", "belief")),
    **{f"--{name}={value}": (rf"--{name}\b", lambda b, flag=f"--{name}={value}": b.flag(flag))
       for name, values in NUMBERS.items() for value in values.split()},
    "seeds that repeat": (r"--seeds", lambda b: b.flag("--seeds", "0", "1", "0")),
    "more shots than questions": (r"--shots", lambda b: b.flag("--shots", "999")),
    "prompt over the context": (r"a prompt of \d+ tokens is over the strong model's 128: use fewer --shots",
                                lambda b: b.flag("--shots", "9")),
    "limit too small": (r"items", lambda b: b.flag("--limit", "1")),
    "limit of three": (r"items|--limit", lambda b: b.flag("--limit", "3")),
    "cuda that is not there": (r"selw2s: device 'cuda:77' cannot be used",
          lambda b: b.flag("--device", "cuda:77")),
    "device unknown": (r"selw2s: device 'tpu' cannot be used .*choose cpu",
          lambda b: b.flag("--device", "tpu")),
    "device without data": (r"selw2s: device 'meta' cannot be used", lambda b: b.flag("--device", "meta")),
    "keep of a method that is not run": (r"--keep", lambda b: b.flag("--keep", "selective")),
    "learning rate too high": (r"(the loss is .* at step \d+|not finite after step \d+, the last) .*lower it",
                               lambda b: b.flag("--lr", "1e30")),
    "learning rate too high in the only step": (r"weights are not finite after step 1", lambda b: b.flag(
        "--lr", "1e38", "--epochs", "1", "--batch", "1000", "--tune", "head")),
    "rerun of nothing": (r"none\.json", lambda b: b.flag("--rerun", str(b.folder / "none.json"))),
    "rerun of a directory": (r"weak", lambda b: b.flag("--rerun", str(b.weak))),
    "rerun of no JSON": (r"task\.jsonl: not a result\.json", lambda b: b.flag("--rerun", str(b.task))),
    "rerun of another program's": (r"result\.json: not a result\.json", lambda b: b.result(
        config={"a": 1}, metrics={})),
    "rerun with a missing part": (r"result\.json: not a result\.json", lambda b: b.result(
        config={"task": "demo-sciq"}, metrics={"methods": {}})),
    "rerun with a nonsense value": (r"result\.json: not a result\.json .*epochs", lambda b: b.result(
        config={"task": "demo-sciq", "data_dir": "", "epochs": "x"}, metrics={"methods": {}}, code={},
        data={}, models={}, env={})),
    **{f"rerun with {what}": (r"result\.json: not a result\.json", lambda b, config=config, methods=methods:
                              b.result(config={"task": "demo-sciq", "data_dir": "", **config}, code={},
                                       data={}, metrics={"methods": methods}, models={}, env={}))
       for what, config, methods in (("no seeds", {"seeds": []}, {}), ("no methods", {"methods": []}, {}),
                                     ("no weak", {"methods": ["naive"]}, {}), ("a list of methods", {}, []))},
    "out is a file": (r"out", lambda b: b.flag("--out", replaced(b.folder / "a-file"))),
    "out below a file": (r"a-file", lambda b: b.flag("--out", replaced(b.folder / "a-file") + "/runs")),
    "out not writable": (r"/proc/runs", lambda b: b.flag("--out", "/proc/runs")),
}
ENVIRONMENT = {
    "SELW2S_DATA is a file": (r"a-file/boolq.*: Not a directory; choose another folder", lambda b: (
        b.offline(), b.flag("--task", "boolq"),
        b.monkeypatch.setenv("SELW2S_DATA", replaced(b.folder / "a-file")))),
    "--data-dir is a file": (r"a-file/sciq.*: Not a directory; choose another folder", lambda b: (
        b.offline(), b.flag("--task", "sciq", "--data-dir", replaced(b.folder / "a-file")))),
    "no home": (r"--data-dir", lambda b: (b.offline(), b.flag("--task", "cosmosqa"), no_home(b))),
    "home of nobody": (r"--data-dir", lambda b: (
        b.offline(), b.flag("--task", "boolq", "--data-dir", "~nobody-here/x"))),
    "disk full at the end": (r"No space left on device", full_disk),
}
GROUPS = {"checkpoint": CHECKPOINTS, "config": CONFIGS, "tokenizer": TOKENIZERS, "hub": HUB, "data": DATA,
          "flags": FLAGS, "environment": ENVIRONMENT}
TABLE = {f"{group}: {name}": row for group, rows in GROUPS.items() for name, row in rows.items()}


@pytest.fixture
def box(tiny, tmp_path, monkeypatch):
    for name in ("weak", "strong"):
        (tmp_path / name).mkdir()
        for file in (Path(tiny[1]).parent / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "task.jsonl").write_bytes(Path(tiny[1]).read_bytes())
    yield Box(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)       # --device cuda sets it before anything can fail


@pytest.mark.parametrize("name", TABLE)
def test_one_clear_line(name, box, capfd):
    message, damage = TABLE[name]
    damage(box)
    signal.alarm(60)                                # a hang is a failure too
    try:
        code = selw2s.main(box.argv)
    finally:
        signal.alarm(0)
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2, (code, error)
    assert "Traceback" not in error
    assert re.match(r"selw2s(\.py: error)?: ", lines[-1]), error
    assert re.search(message, lines[-1]), lines[-1]
    assert len(lines[-1]) < 700 and lines[-1].isprintable()
    for line in lines[:-1]:                         # what a download says; a Rust panic speaks too
        assert line.startswith("downloading ") or "panic" in error, error
    assert not [p for p in box.out.rglob("*") if p.name == "result.json" or p.name.startswith(".")]
