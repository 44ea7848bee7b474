"""Damaged files of every kind: taken, or one of three errors, never anything else; soon, in little memory.
Run: pytest tests/test_fuzz.py (5 s; with CI=1 all 20,000 files, a minute).
One case again: python tests/test_fuzz.py 1234"""
import base64
import contextlib
import csv
import io
import json
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT

ALWAYS, ALL = 600, 20_000
SECONDS, MEGABYTES = 5.0, 1024          # what one case may take, by what all cases may grow the process
TEXTS = ["Question: what colour is it? Answer: red", "caf\u00e9 \u6f22\u5b57 \U0001f600\r\n\t  x", "0", " "]
SMALL = {"vocab": 300, "context": 64, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4,
         "inner": 16, "fraction": 0.5, "window": 3, "tied": False}


# ---- valid files, as {name: bytes} -------------------------------------------------------------------------

def checkpoint(family: str) -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    from data import architecture as A
    from data import checkpoint as C
    row = A.FAMILIES[family]
    raw = {"model_type": family} | {A.keys_of(row, f)[0]: x for f, x in SMALL.items()
                                   if f in row["numbers"] and A.keys_of(row, f)}
    if family == "qwen":
        raw |= {"seq_length": 64, "vocab_size": 512}
    if family == "gpt_neo":
        raw["attention_types"] = [[["local"], 1]]
    if family == "llama":
        raw["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    files, state = {"config.json": json.dumps(raw).encode()}, {}
    for source, _, shapes in A.tensors(A.configure(raw)):
        x = torch.randn(sum(shape[0] for shape in shapes), *shapes[0][1:]) / 4
        state[row["prefix"] + source] = (x.t() if C.turned(row, source, x) else x).contiguous()
    files["model.safetensors"] = save(state, {"format": "pt"})
    return files | tokenizer(family)


def tokenizer(family: str) -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=290, show_progress=False, special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    raw = json.loads(bpe.to_str())
    if family == "qwen":
        lines = [base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)]
        return {"qwen.tiktoken": b"".join([*lines, b"IHQ= 256\n", b"IHRo 257\n"])}
    if family not in ("gpt2", "opt"):
        return {"tokenizer.json": json.dumps(raw).encode()}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in raw["model"]["merges"])])
    settings = {"bos_token": "</s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
                "added_tokens_decoder": {"0": {"content": "</s>", "special": True, "lstrip": False}}}
    return {"vocab.json": json.dumps(raw["model"]["vocab"]).encode(), "merges.txt": merges.encode(),
            "tokenizer_config.json": json.dumps(settings).encode()}


def other_tokenizers() -> list[bytes]:
    """tokenizer.json as llama, T5, BERT and qwen2 checkpoints bring it: many parts, each with its traps."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(160)), "\u2581", *letters, "re", "red"]
    llama = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(pieces)}, merges=[("r", "e"), ("re", "d")],
                                 unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                             normalizers.Replace(" ", "\u2581")])
    llama.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    unigram = Tokenizer(models.Unigram(
        [("<unk>", 0.0), ("\u2581", -2.0), *((x, -4.0) for x in letters), ("red", -3.0)], unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    bert = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {
        x: i + 3 for i, x in enumerate([*letters, *("##" + x for x in letters)])}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    qwen2 = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
    qwen2.normalizer = normalizers.NFC()
    qwen2.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t)|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
                             "isolated"),
        pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    qwen2.add_special_tokens(["<|endoftext|>"])
    qwen2.enable_truncation(50)
    qwen2.enable_padding(length=9)
    return [each.to_str().encode() for each in (llama, unigram, bert, qwen2)]


def shards(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.torch import load, save
    state, files = load(files["model.safetensors"]), dict(files)
    del files["model.safetensors"]
    weight_map = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        files[file] = save({name: x for name, x in state.items() if weight_map[name] == file})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    return files | {"model.safetensors.index.json": index.encode()}


def own_rows() -> list[dict]:
    rows = [{"question": f"number {i}?", "options": ["one", "two", "three"], "answer": i % 3, "id": f"q{i}",
             "split": "train" if i < 30 else "test"} for i in range(45)]
    for row in rows[::4]:
        row |= {"options": ["yes", "no"], "answer": row["answer"] % 2, "context": "A passage.",
                "group": row["id"]}
    for row in rows:
        said = [0.5, 0.5] + [0.0] * (len(row["options"]) - 2)
        row |= {"weak": {"ann": said, "bob": None}, "transcripts": ["one", "two"]}
    return rows


def sciq_rows() -> list[dict]:
    return [{"question": f"number {i}?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
             "correct_answer": "d", "support": "" if i % 3 else "Because."} for i in range(25)]


def zipped(splits: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in splits.items():
            archive.writestr(f"SciQ dataset-2 3/{split}.json", text)
    return out.getvalue()


def boolq_lines() -> list[bytes]:
    return [json.dumps({"question": f"number {i}", "passage": f"It is {i // 2}.", "answer": i % 2 == 0,
                        "title": "T"}).encode() for i in range(25)]


def cosmos_file() -> bytes:
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["id", "context", "question", "answer0", "answer1", "answer2", "answer3", "label"])
    for i in range(25):
        table.writerow([i, f'A "story", {i}.', f"number {i}?", "a", "b", "c", "None of the above choices .",
                        i % 4])
    return out.getvalue().encode()


# ---- damage: each takes the generator, returns what it made and says what it did ---------------------------

def damaged_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # half of the damage goes to the first kilobyte, where headers are
        at = rng.randrange(max(1, len(data) if rng.random() < 0.5 else min(1024, len(data))))
        n = rng.choice((1, 1, 2, 7, 50, 400))
        junk = rng.choice((rng.randbytes(n), b"\0" * n, b"\xff" * n, b'"' * n, b"[" * n, b"9" * n, b"\n" * n,
                           data[:n], b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800"))
        kind = rng.choice(("flip", "flip", "flip", "cut", "insert", "overwrite", "delete", "repeat"))
        if kind == "flip":
            data = data[:at] + bytes([(data[at:at + 1] or b"\0")[0] ^ 1 << rng.randrange(8)]) + data[at + 1:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + junk + data[at:]
        elif kind == "overwrite":
            data = data[:at] + junk + data[at + len(junk):]
        elif kind == "delete":
            data = data[:at] + data[at + n:]
        else:
            data = data[:at] + data[at:at + n] * 2 + data[at + n:]
        said.append(f"{kind} at {at}")
    return data, ", ".join(said)


DEEP, TWICE = "<deep>", "<twice>"     # in the text they become deep nesting, and a key that was there already
ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 10 ** 6, 10 ** 9, 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64,
       10 ** 30, 10 ** 400, 0.0, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, "", " ", "0", "x",
       "llama", "\0", "\ud800", "a\nb\x1b[2J", "x" * 5000, "caf\u00e9", [], {}, [[]], [None], {"": {}},
       [0] * 300, [1, "a"], DEEP]


def damaged_json(rng: random.Random, value) -> tuple[bytes, str]:
    value, said = json.loads(json.dumps(value)), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value, what = changed(rng, value)
        said.append(what)
    depth, text = rng.choice((200, 2000, 100_000)), json.dumps(value, ensure_ascii=rng.random() < 0.5)
    text = re.sub(TWICE + r"\d", "", text.replace(json.dumps(DEEP), "[" * depth + "]" * depth))
    return text.encode("utf-8", "surrogatepass"), "; ".join(said)


def changed(rng: random.Random, value):
    """One change somewhere: down a random path, then there."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.7:
        value = value.copy()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        kind = rng.choice(("below",) * 5 + ("delete", "other", "add"))
        if kind == "below":
            value[key], what = changed(rng, value[key])
            return value, f"{key!r:.40}: {what}"
        if kind == "delete":
            del value[key]
        elif kind == "other":
            value[key] = value[rng.choice(keys)]
        elif isinstance(value, list):
            value.insert(key, rng.choice((value[key], rng.choice(ODD))))
        else:
            name = rng.choice((f"{key}{TWICE}{rng.randrange(9)}", key.upper(), "", "new", key + "\ud800"))
            value[name] = rng.choice((value[key], rng.choice(ODD)))
        return value, f"{kind} {key!r:.40}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    new = rng.choice((value + 1, value - 1, -value, value * 2, str(value), value * 10 ** 9)
                     ) if number and rng.random() < 0.5 else rng.choice(ODD)
    return new, f"{value!r:.40} -> {new!r:.40}"


DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75,
          "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "F31": 4, "f32": 4,
          "": 4}


def damaged_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file whose header says something else; most of the time its length is right."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:end]), data[end:]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, other = header[name], header[rng.choice([key for key in header if key != "__metadata__"])]
    size, kind = entry["data_offsets"][1] - entry["data_offsets"][0], rng.choice(
        ("json", "dtype", "retype", "shape", "offsets", "huge", "name", "twice", "length", "body"))
    what = f"{kind} of {name}"
    if kind == "dtype":
        entry["dtype"] = rng.choice(list(DTYPES))
    elif kind == "retype":              # another type, with a shape of as many bytes
        entry["dtype"] = rng.choice(list(DTYPES))
        count = int(size / DTYPES[entry["dtype"]])
        entry["shape"] = rng.choice(([count], [1, count]))
    elif kind == "shape":
        entry["shape"] = rng.choice((
            entry["shape"][::-1], [], [0], entry["shape"] + [1], [size // 4], [-1, -size], other["shape"],
            [1] * 70 + entry["shape"], [0, 2 ** 62, 2 ** 62], [2 ** 63]))
    elif kind == "offsets":
        a, b = entry["data_offsets"]
        entry["data_offsets"] = rng.choice((
            other["data_offsets"], [b, a], [a, b + 4], [a + 4, b], [a, a], [-a, b], [a], [0, 2 ** 63],
            [a, len(body) * 2], [2 ** 64 - 4, 2 ** 64 + b]))
    elif kind == "huge":                # sizes that agree with each other, but not with the file
        entry |= {"shape": [2 ** rng.randrange(20, 60)], "dtype": "F32"}
        entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][0] + 4 * entry["shape"][0]]
    elif kind == "name":
        new = rng.choice(("x", "", name + ".", "lm_head.weight", "a\nb", "x" * 3000, name.upper(),
                          name.split(".", 1)[-1]))
        header[new] = header.pop(name)
    text = json.dumps(header).encode()
    if kind == "json":
        text, what = damaged_json(rng, header)
    elif kind == "twice":
        text = b'{"%s": %s,' % (name.encode(), json.dumps(other).encode()) + text[1:]
    elif kind == "body":
        body, more = damaged_bytes(rng, body)
        what += ": " + more
    length = len(text)
    if kind == "length":
        length = rng.choice((0, 1, length - 1, length + 1, length + len(body), 2 ** 27, 2 ** 40, 2 ** 64 - 1))
    return struct.pack("<Q", length) + text + body, what


def damaged_lines(rng: random.Random, lines: list[bytes]) -> tuple[bytes, str]:
    """Lines of JSON or CSV: one damaged inside, or lines lost, repeated, joined, swapped."""
    lines, n = list(lines), rng.randrange(len(lines))
    kind = rng.choice(("inside", "inside", "inside", "lose", "repeat", "join", "swap", "only"))
    if kind == "inside":
        try:
            lines[n], kind = damaged_json(rng, json.loads(lines[n]))
        except ValueError:
            cells = lines[n].split(b",")
            cells[rng.randrange(len(cells))] = json.dumps(rng.choice(ODD)).encode()
            lines[n] = b",".join(cells)
    elif kind == "lose":
        del lines[n]
    elif kind == "repeat":
        lines.insert(n, lines[rng.randrange(len(lines))])
    elif kind == "join":
        lines[n:n + 2] = [rng.choice((b"", b",", b" ")).join(lines[n:n + 2])]
    elif kind == "swap":
        lines[n], lines[0] = lines[0], lines[n]
    else:
        lines = lines[:n]
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r")).join(lines), f"line {n}: {kind}"


# ---- the cases ---------------------------------------------------------------------------------------------

FAMILIES = ("llama", "gpt2", "qwen", "gpt_neo", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma",
            "gemma2", "gemma3_text", "olmo2", "phi3")
KINDS = ("weights, bytes", "weights, header", "config", "tokenizer", "vocabulary", "qwen", "shards",
         "everything", "own", "sciq", "boolq", "cosmosqa")


VALUES = [True, False, None, 0, 1, 2, 4, 8, 64, 300, 0.5, 1.0, 1e-5, 1e4, "silu", "gelu", "full_attention",
          ["full_attention"], ["sliding_attention"], ["local"], [[["global"], 1]], [[["local"], 10 ** 9]],
          [[[], 10 ** 9]], [[["global"], 10 ** 9], [["local"], -1]],
          {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 1e4}, {"type": "yarn"},
          {"full_attention": {"rope_type": "linear", "factor": 4}, "sliding_attention": {"rope_theta": 5}},
          {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 0}]


def known_keys(family: str) -> list[str]:
    from data import architecture as A
    return sorted(A.known_keys(A.FAMILIES[family]))


def damage(rng: random.Random, kind: str, base: dict) -> tuple[dict[str, bytes], str]:
    """The files of one case, damaged, and what was done."""
    family = {"tokenizer": "llama", "qwen": "qwen", "shards": "llama",
              "vocabulary": rng.choice(("gpt2", "opt"))}.get(kind, rng.choice(FAMILIES))
    kept = f"tokenizer {rng.randrange(-1, 4)}" if kind == "tokenizer" else kind
    files = dict(base.get(kept) or base[family])
    name = {"weights, bytes": "model.safetensors", "weights, header": "model.safetensors",
            "config": "config.json", "tokenizer": "tokenizer.json", "qwen": "qwen.tiktoken",
            "vocabulary": rng.choice(("vocab.json", "merges.txt", "tokenizer_config.json")),
            "shards": "model.safetensors.index.json"}.get(kind) or rng.choice(sorted(files))
    if kind == "config" and rng.random() < 0.6:     # a key that this family knows
        key, value = rng.choice(known_keys(family)), rng.choice(VALUES)
        files[name] = json.dumps(json.loads(files[name]) | {key: value}).encode()
        return files, f"{kind} ({family}), {key} = {value!r:.80}"
    as_json = name.endswith(".json") and rng.random() < 0.75
    if kind == "weights, header":
        files[name], what = damaged_header(rng, files[name])
    elif kind == "sciq" and as_json:
        files[name], what = damaged_json(rng, json.loads(files[name]))
    elif name.endswith((".jsonl", ".csv", ".tiktoken", "merges.txt")) and rng.random() < 0.6:
        files[name], what = damaged_lines(rng, files[name].split(b"\n"))
    elif as_json:
        files[name], what = damaged_json(rng, json.loads(files[name]))
    else:
        files[name], what = damaged_bytes(rng, files[name])
    if kind == "everything":
        other = rng.choice(sorted(files))
        files[other], more = damaged_bytes(rng, files[other])
        what += f" and {other}: {more}"
    if kind == "sciq":
        files = {"SciQ.zip": zipped({key.removesuffix(".json"): text for key, text in files.items()})}
        if rng.random() < 0.4:
            files["SciQ.zip"], more = damaged_bytes(rng, files["SciQ.zip"])
            what += " and the archive: " + more
    return files, f"{kind} ({family}), {name}: {what}"


def valid() -> dict[str, dict[str, bytes]]:
    base = {family: checkpoint(family) for family in FAMILIES}
    base["shards"] = shards(base["llama"])
    for n, text in enumerate(other_tokenizers()):
        base[f"tokenizer {n}"] = base["llama"] | {"tokenizer.json": text}
    base["own"] = {"task.jsonl": "\n".join(map(json.dumps, own_rows())).encode()}
    base["sciq"] = {f"{split}.json": json.dumps(sciq_rows()).encode() for split in ("train", "test")}
    base["boolq"] = {f"{split}.jsonl": b"\n".join(boolq_lines()) for split in ("train", "dev")}
    base["cosmosqa"] = {f"{split}.csv": cosmos_file() for split in ("train", "valid")}
    return base


def attempt(kind: str, files: dict[str, bytes], folder: Path) -> bool:
    """The program reads the files and, if it takes them, works with what it read; False: it refused them."""
    import data
    import model as M
    from data import official
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        if kind in ("own", *data.OFFICIAL):
            official.content = lambda name, data_dir: files[name.split("/")[-1]]    # past the pinned hashes
            task = data.load_task(str(folder / "task.jsonl") if kind == "own" else kind)
            assert all(0 <= q.answer < len(q.options) for q in task.train + task.test)
            for protocol in ("paper", "openai"):
                drawn = data.items(task.train, protocol=protocol, seed=0)
                data.halves(drawn, task.train, protocol=protocol, seed=0)
        else:
            net, tokenizer = M.load(str(folder))
            ids = [ids[:net.config.context] for ids in tokenizer.encode(TEXTS)]
            assert all(0 <= i < net.config.vocab for row in ids for i in row)
            assert M.hidden_at(net, ids).shape == (len(TEXTS), net.config.width)
    except (M.LoadError, M.TrainError, data.DataError) as error:  # TrainError: states that are not finite
        assert str(error).isprintable() and len(str(error)) < 1000, f"not one short line: {error!r:.3000}"
        return False
    return True


class TooSlow(BaseException):
    pass


def main(first: int, count: int) -> dict:
    """Cases first to first + count; what came out, for the test below to judge."""
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, outcome, failures, slowest = valid(), {kind: [0, 0] for kind in KINDS}, [], (0.0, -1)
    if Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + MEGABYTES * 2 ** 20
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def stop(*_):
        raise TooSlow
    signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        for kind, files in base.items():
            if kind == "sciq":
                files = {"SciQ.zip": zipped({key.removesuffix(".json"): text for key, text in files.items()})}
            assert attempt(kind, files, Path(folder)), f"{kind}: the valid files are refused"
        for i in range(first, first + count):
            kind, rng = KINDS[i % len(KINDS)], random.Random(i)
            files, what = damage(rng, kind, base)
            print(f"{i}: {what}"[:500].encode("ascii", "backslashreplace").decode(), file=sys.stderr)
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcome[kind][attempt(kind, files, Path(folder))] += 1
            except BaseException as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append(f"case {i}, {what}: {type(error).__name__}: {error!s:.300}"[:1500])
                if count == 1:
                    raise
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, (time.perf_counter() - start, i))
            said.seek(said.truncate(0))
    return {"outcome": outcome, "failures": failures, "slowest": slowest,
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


@pytest.mark.parametrize("first, count", [
    (0, ALWAYS), pytest.param(ALWAYS, ALL - ALWAYS, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(first, count):
    child = subprocess.run([sys.executable, __file__, str(first), str(count)], cwd=ROOT, capture_output=True,
                           text=True, errors="backslashreplace", timeout=1200,
                           env=os.environ | {"RUST_BACKTRACE": "0"})
    assert child.returncode == 0, child.stderr[-3000:]      # a crash: the last line is its case
    result = json.loads(child.stdout.splitlines()[-1])      # tokenizers prints warnings before
    assert not result["failures"], "\n".join(result["failures"][:5])
    assert result["slowest"][0] < SECONDS, "case {1} took {0:.1f} s".format(*result["slowest"])
    assert result["megabytes"] < 2048
    refused, taken = zip(*result["outcome"].values())       # too little or too much damage proves nothing
    assert all(refused) and sum(taken) > count / 10, result["outcome"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)))
