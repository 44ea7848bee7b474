"""The networks of the method: checkpoints, hidden states, option log-likelihoods, finetuning.

Selective weak-to-strong generalization (Lang, Huang, Li, arXiv 2511.14166) asks three things of a language
model: a student finetuned on soft labels (weak supervisor, student, ceiling), hidden states (P(IK), graph)
and the log-likelihood of each option (self-generated labels). All three run through one function,
Transformer.packed.

    symbol     here                  shape      source
    P(y = 1)   Student.predict       (N,)       soft label, Burns et al. 2023 (arXiv 2312.09390), app. A, of a
                                                Classifier [D8] or an Answerer [D17]
    log p(a|q) Reading.loglik        (Q, O)     option scores, Kadavath et al. 2022 (arXiv 2207.05221) [D1]
    h(q)       Reading.prompt_state  (Q, n, C)  state at the end of the question: what P(IK) looks at
    h(q, a)    Reading.item_state    (Q, n, C)  state at the end of the item: a node of the graph

Shapes: B sequences, T tokens of one, P tokens of all, C width, H heads, K key/value heads, D head dimension,
I inner width of the MLP, V vocabulary, N items, Q questions, O options, n layers asked for.

Order: config.json -> Config; files -> parameters; the network, from the packing of a batch to Transformer;
reading with it; finetuning it. Parameters have one set of names for all families (data/families.py maps the
files' names to them): embed pos norm head, layers.{i}.{norm1 q k v q_norm k_norm o post1 norm2 gate up down
post2}, each .weight and perhaps .bias; matrices (out, in), gains as they multiply (Gemma's files hold
gain - 1). A part that a checkpoint lacks has no tensor, and the network passes it by.
"""
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from data.families import FAMILIES, INERT_KEYS, KEYS, LOGICAL, MOST_LAYERS, NULLABLE, WHOLE
from data.tokens import TOKENIZER_FILES, LoadError, Tokenizer, read_json


class TrainError(ValueError):
    """A finetuning run or a reading that cannot go on: one line saying where, and what to do."""


# ---- config.json -------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}


@dataclass(frozen=True)
class Config:
    """The numbers of one checkpoint, resolved: what config.json says, else the family's default."""
    family: str
    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    act: str
    eps: float
    tied: bool                     # the head is the embedding
    biased: frozenset              # the linear parts that have a bias
    windows: tuple                 # per block: tokens a token sees, itself included; None: all before it
    rope: tuple | None             # (base, rotated channels, scaling); None: learned positions
    local_rope: tuple | None       # the same for the blocks with a window
    scale: float                   # of the attention scores
    attn_cap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_cap: float | None = None
    parallel: bool = False         # attention and MLP read the same residual stream


def configure(raw: dict) -> Config:
    """config.json -> Config. LoadError for an unknown family, an unknown non-null key, a value not
    supported."""
    family = raw.get("model_type")
    if raw.get("quantization_config"):
        raise LoadError("config.json: quantised checkpoints are refused, use the full-precision one")
    if not isinstance(family, str) or family not in FAMILIES:
        raise LoadError(f"config.json: model_type {family!r:.40} is not supported, only "
                        f"{', '.join(FAMILIES)}")
    try:
        numbers = read_numbers(raw, FAMILIES[family])
        check_keys(raw, FAMILIES[family], numbers)
        return Config(family=family, **resolve(raw, FAMILIES[family], numbers))
    except LoadError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        raise LoadError(f"config.json: a value is missing or of the wrong type ({error})") from None


def keys_of(row: dict, field: str) -> list[str]:
    """The keys of config.json that say this field of Config, in this family."""
    return row.get("keys", {}).get(field, KEYS[field]).split()


def read_numbers(raw: dict, row: dict) -> dict:
    """What config.json says of each field in row["numbers"], else the family's default."""
    numbers = {}
    for field, default in row["numbers"].items():
        given = {key: raw[key] for key in keys_of(row, field) if key in raw}
        if field == "act":
            given = {key: row.get("act_means", {}).get(name, name) for key, name in given.items()
                     if name is not None}
        for key, value in given.items():
            check_value(key, value, field)
        values = list(given.values())
        if any(value != values[0] for value in values):
            raise LoadError(f"config.json: {' and '.join(given)} disagree")
        numbers[field] = values[0] if values else default
    return numbers


def check_value(key: str, value, field: str = "") -> None:
    """LoadError unless a value of config.json is of the type and size that its field can have."""
    if field == "act" or value is None and field in NULLABLE:
        return
    if field in LOGICAL:
        good, need = isinstance(value, bool), "true or false"
    elif field in WHOLE:
        least, most = 0 if field == "slide_from" else 1, MOST_LAYERS if field == "layers" else 2 ** 24
        good, need = type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
    else:  # NaN compares false
        good, need = type(value) in (int, float) and 0 < value < 1e30, "a positive number"
    if not good:
        raise LoadError(f"config.json: {key} = {value!r:.40} is of the wrong type or out of range: {need} is "
                        "needed")


def known_keys(row: dict) -> set[str]:
    """The keys of config.json that this family reads, or that must have the one value we support."""
    keys = set(row.get("also", "").split()) | row.get("echo", {}).keys() | row["must"].keys()
    for field in row["numbers"]:
        keys |= set(keys_of(row, field))
    if "base" in row["numbers"]:
        keys |= {"rope_scaling", "rope_parameters"}
    return keys


def unread_keys(raw: dict) -> list[str]:
    """The keys that transformers' class of the family does not know, and that change nothing there either."""
    known = known_keys(FAMILIES[raw["model_type"]])
    return [key for key, value in raw.items()
            if value is not None and key not in known and not INERT_KEYS.fullmatch(key)]


def check_keys(raw: dict, row: dict, numbers: dict) -> None:
    """LoadError for a key that has one value that is supported, and has another."""
    for key, field in row.get("echo", {}).items():
        if raw.get(key) not in (None, numbers[field]):
            raise LoadError(f"config.json: {key} = {raw[key]!r:.40} is not read by this family, where it is "
                            f"{numbers[field]!r}: make them agree")
    for key, value in row["must"].items():
        if raw.get(key) not in (None, value):
            raise LoadError(f"config.json: {key} = {raw[key]!r} is not supported, only {value!r}")


def resolve(raw: dict, row: dict, numbers: dict) -> dict:
    """The fields of Config but the family, from the numbers that are there: those that follow from others
    filled in, windows and RoPE worked out."""
    n = dict(numbers)
    if n["act"] not in ACTIVATIONS:
        raise LoadError(f"config.json: activation {n['act']!r} is not supported, only "
                        f"{', '.join(ACTIVATIONS)}")
    n["kv_heads"] = n.get("kv_heads") or n["heads"]
    n["head_dim"] = n.get("head_dim") or n["width"] // n["heads"]
    if n["heads"] % n["kv_heads"] or not n["head_dim"]:
        raise LoadError(f"config.json: {n['heads']} heads do not share out width {n['width']} and "
                        f"{n['kv_heads']} key/value heads evenly")
    n["inner"] = (n["inner"] or 4 * n["width"]) // (2 if row.get("halved") else 1)
    n["scale"] = 1.0 if row.get("unscaled") else (n.get("scale") or n["head_dim"]) ** -0.5
    biased = set(row.get("biased", "").split())
    if n.get("attention_bias"):
        biased |= {"q", "k", "v", "o"}
    if n.get("mlp_bias"):
        biased |= {"gate", "up", "down"}
    n["biased"] = frozenset(biased)
    n["windows"] = windows(raw, row, n)
    n["rope"] = n["local_rope"] = None
    if "base" in n:
        n["rope"] = n["local_rope"] = rotary(raw, row, n, "full_attention", n["base"])
    if "local_base" in n:
        n["local_rope"] = rotary(raw, row, n, "sliding_attention", n["local_base"])
    return {field: value for field, value in n.items() if field in Config.__dataclass_fields__}


def windows(raw: dict, row: dict, n: dict) -> tuple[int | None, ...]:
    """Per block its sliding window or None: by the list in config.json where there is one, else by the
    numbers of the family."""
    key, whole, sliding = "layer_types", "full_attention", "sliding_attention"
    kinds = raw.get(key) if key in row.get("also", "") else None
    if "kinds" in row:  # GPT-Neo's [[kinds, times], ...]
        key, whole, sliding = "attention_types", "global", "local"
        kinds = raw.get("attention_layers") or [
            kind for kinds, times in raw.get(key, row["kinds"]) for kind in kinds * min(times, MOST_LAYERS)]
    if kinds and (not isinstance(kinds, list) or len(kinds) != n["layers"] or set(kinds) - {whole, sliding}):
        raise LoadError(f"config.json: {key} must give {n['layers']} x {whole} or {sliding}")
    on = raw.get("use_sliding_window", "use_sliding_window" not in row.get("also", ""))
    check_value("use_sliding_window", on, "use_sliding_window")
    out = []
    for i in range(n["layers"]):
        slides = i >= n.get("slide_from", 0) and ("whole_every" not in n or (i + 1) % n["whole_every"] > 0)
        if kinds:
            slides = kinds[i] == sliding
        out.append(n.get("window") if on and slides else None)
    return tuple(out)


def rotary(raw: dict, row: dict, n: dict, kind: str, base: float) -> tuple:
    """(base, rotated channels, scaling) of the blocks of one kind, from rope_parameters as transformers 5
    writes it, or from rope_scaling, which is for the blocks without a window; both must agree."""
    p = raw.get("rope_parameters") or {"full_attention": raw.get("rope_scaling")}
    by_kind = p.keys() & {"full_attention", "sliding_attention"}
    if raw.get("rope_scaling") and raw["rope_scaling"] not in (p, p.get("full_attention")):
        raise LoadError("config.json: rope_scaling and rope_parameters disagree")
    if "local_base" in n and not by_kind:
        raise LoadError("config.json: rope_parameters must have full_attention and sliding_attention")
    p = dict((p.get(kind) or {}) if by_kind else p)
    said = {"rope_theta": p.pop("rope_theta", base), "partial_rotary_factor": n["fraction"]}
    if keys_of(row, "fraction"):
        said["partial_rotary_factor"] = p.pop("partial_rotary_factor", n["fraction"])
    scaling, _ = p.pop("rope_type", p.get("type", "default")), p.pop("type", None)
    needs = {"default": [], "linear": ["factor"], "llama3": ["factor", "high_freq_factor", "low_freq_factor",
                                                             "original_max_position_embeddings"]}
    if scaling not in needs or sorted(p) != needs[scaling]:
        raise LoadError(f"config.json: RoPE scaling {scaling!r} with {sorted(p)} is not supported, only "
                        f"{needs}")
    for key, value in (said | p).items():
        check_value(key, value)
    rotated = int(n["head_dim"] * said["partial_rotary_factor"])
    if rotated % 2 or not 0 < rotated <= n["head_dim"]:
        raise LoadError(f"config.json: RoPE on {rotated} of {n['head_dim']} channels of a head: it needs "
                        "pairs")
    if p.get("low_freq_factor", 0) >= p.get("high_freq_factor", 1):
        raise LoadError("config.json: low_freq_factor must be below high_freq_factor")
    return float(said["rope_theta"]), rotated, tuple(sorted(p.items()))


def tensors(c: Config) -> Iterator[tuple[str, list[str], list[tuple]]]:
    """Yields (name in the file without the prefix, canonical names, their shapes) for every tensor that this
    configuration must have."""
    row, q, k = FAMILIES[c.family], c.heads * c.head_dim, c.kv_heads * c.head_dim
    wide = row.get("wide_qk_norm")
    shapes = dict(embed=(c.vocab, c.width), pos=(c.context + row.get("pos_offset", 0), c.width),
                  head=(c.vocab, c.width), q=(q, c.width), k=(k, c.width), v=(k, c.width), o=(c.width, q),
                  gate=(c.inner, c.width), up=(c.inner, c.width), down=(c.width, c.inner),
                  q_norm=(q if wide else c.head_dim,), k_norm=(k if wide else c.head_dim,))
    for fused, template in row["names"].items():
        parts = fused.split()
        if fused == "head" and c.tied:
            continue
        biased = parts[0] in c.biased or row.get("layer_norm") and parts[0].startswith("norm")
        sizes = [shapes.get(part, (c.width,)) for part in parts]
        for i in range(c.layers) if "{}" in template else [None]:
            stem = "" if i is None else f"layers.{i}."
            yield template.format(i) + ".weight", [f"{stem}{part}.weight" for part in parts], sizes
            if biased:
                yield (template.format(i) + ".bias", [f"{stem}{part}.bias" for part in parts],
                       [size[:1] for size in sizes])


# ---- checkpoints -------------------------------------------------------------------------------------------

WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]


def load(source: str, *, device="cpu", dtype=torch.float32) -> "tuple[Transformer, Tokenizer]":
    """A directory in Hugging Face layout or a hub id (NAME or NAME@REVISION) -> (Transformer, Tokenizer);
    matrices in dtype, norms in float32. Prints one line. LoadError for everything a user can get wrong."""
    folder = find(str(source))
    try:
        check_device(device)
        raw = read_json(folder / "config.json")
        config = configure(raw)
        params, ignored = read_params(config, tensor_files(folder), device, dtype)
        tokenizer = Tokenizer(folder, config.family)
        if tokenizer.size > config.vocab:
            raise LoadError(f"the tokenizer has {tokenizer.size} ids, the embedding {config.vocab} rows: "
                            "they do not belong together")
    except LoadError as error:
        raise LoadError(f"{source}: {error}") from None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise LoadError(f"{source}: does not fit into the memory of {device}: choose a smaller model or "
                        "--dtype bfloat16") from None
    model = Transformer(config, params)
    model.raw, model.folder, model.revision = raw, folder, None if Path(source).is_dir() else folder.name
    count, unread = sum(p.numel() for p in params.values()) / 1e6, unread_keys(raw)
    line = (f"{config.family}: {len(params)} tensors, {ignored} ignored, {'tied' if config.tied else 'own'} "
            f"head, {count:.1f}M parameters, {str(dtype).removeprefix('torch.')}")
    if unread:
        line += f"; unknown keys of config.json ignored: {', '.join(unread):.300}"
    print(line)
    return model, tokenizer


def check_device(device) -> None:
    """LoadError unless torch can put a tensor there."""
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch is built without CUDA
        line = next(iter(str(error).splitlines()), "")
        raise LoadError(f"device {str(device)!r} cannot be used ({line}): choose cpu, or cuda where there is "
                        "a GPU") from None


def find(source: str) -> Path:
    """The directory itself, or a hub repository's snapshot in the local cache, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(@[\w./-]+)?", source):
        raise LoadError(f"{source}: no such directory")
    from huggingface_hub import snapshot_download
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except Exception as error:  # they come from three libraries and share no base class
        line = next(iter(str(error).strip().splitlines()), "")
        raise LoadError(f"{source}: no such directory, and the hub gives {type(error).__name__}: "
                        f"{line}") from None


def open_tensors(path: Path):
    """An open safetensors file. LoadError for one that is missing or damaged."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise LoadError(f"{path.name}: missing, truncated or damaged ({error}); download it again") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it; a shard index must agree with its files."""
    index, mapped = folder / "model.safetensors.index.json", None
    files = [folder / "model.safetensors"]
    if index.is_file():
        mapped = read_json(index).get("weight_map")
        if not isinstance(mapped, dict) or any(Path(str(file)).name != file for file in mapped.values()):
            raise LoadError(f"{index.name}: weight_map must give plain file names in the same directory")
        files = [folder / file for file in sorted(set(mapped.values()))]
    elif not files[0].is_file():
        raise LoadError("no model.safetensors there (pickle checkpoints are refused: convert to safetensors)")
    found = {}
    for path in files:
        with open_tensors(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    if mapped is not None and {name: path.name for name, path in found.items()} != mapped:
        odd = sorted(set(mapped) ^ set(found)) or ["a name in two files"]
        raise LoadError(f"{index.name} and its files disagree, first on {odd[0]}")
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, its values finite. The file is opened for each, so that the pages of its memory map are
    given back at once."""
    try:
        with open_tensors(path) as file:
            x = file.get_tensor(name)
    except SafetensorError as error:  # a type that PyTorch has not
        raise LoadError(f"tensor {name} in {path.name} cannot be read ({error}): use float32, float16 or "
                        "bfloat16") from None
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LoadError(f"tensor {name} is {x.dtype}: quantised checkpoints and other types are refused, use "
                        "float32, float16 or bfloat16")
    if not math.isfinite(x.sum(dtype=torch.float64)):
        raise LoadError(f"tensor {name} holds NaN or infinity: {path.name} is damaged, download it again")
    return x


def read_params(c: Config, files: dict[str, Path], device, dtype) -> tuple[dict[str, Tensor], int]:
    """All parameters under canonical names, and how many tensors were ignored. Every tensor of the files is
    consumed once or is a known buffer; every expected one is there with its shape."""
    row, params = FAMILIES[c.family], {}
    left = {name.removeprefix(row["prefix"]): (path, name) for name, path in files.items()}
    if len(left) != len(files):
        raise LoadError(f"some tensors are there both with and without the prefix {row['prefix']!r}")
    ignored = [left.pop(name) for name in list(left) if re.fullmatch(row["buffers"], name)]
    for source, names, shapes in tensors(c):
        if source not in left:
            raise LoadError(f"tensor {source} is missing")
        stored = read_tensor(*left.pop(source))
        for name, piece in zip(names, canonical(c, source, stored, shapes)):
            params[name] = piece.to(device, torch.float32 if is_norm(name) else dtype, copy=True).contiguous()
            if dtype == torch.float16 and not params[name].isfinite().all():
                raise LoadError(f"tensor {source} does not fit into float16: choose bfloat16 or float32")
            if is_norm(name) and row.get("plus_one"):
                params[name] += 1
    head = row["names"]["head"] + ".weight"
    if c.tied and head in left and not torch.equal(read_tensor(*left.pop(head)).to(device, dtype),
                                                   params["embed.weight"]):
        raise LoadError(f"tie_word_embeddings ties the head to the embedding, but {head} differs from it")
    if left:
        raise LoadError(f"{len(left)} unexpected tensors, the first is {next(iter(left))}")
    return params, len(ignored)


def canonical(c: Config, source: str, stored: Tensor, shapes: list[tuple]) -> tuple[Tensor, ...]:
    """A tensor of the file -> the parts fused in it, each (out, in) as the network wants it."""
    row = FAMILIES[c.family]
    x = stored.t() if turned(row, source, stored) else stored
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if x.shape != whole:
        raise LoadError(f"tensor {source} has shape {tuple(x.shape)}, config.json implies {whole}")
    if row.get("per_head") and len(shapes) == 3:
        x = x.view(c.heads, 3, c.head_dim, *whole[1:]).transpose(0, 1).reshape(whole)
    return x.split([shape[0] for shape in shapes])


def is_norm(name: str) -> bool:
    """Norms are kept and computed in float32, whatever the dtype."""
    return "norm" in name or "post" in name


def turned(row: dict, source: str, x: Tensor) -> bool:
    """Whether the file keeps this matrix as (in, out)."""
    return row.get("transposed", False) and source.startswith("h.") and x.ndim == 2


def export(c: Config, params: dict[str, Tensor], head: bool = False) -> dict[str, Tensor]:
    """read_params backwards: the family's own names and layout, on the CPU; with the language model's head
    only if asked, where it has one of its own: a classifier has another."""
    row, out = FAMILIES[c.family], {}
    for source, names, _ in tensors(c):
        whose = "" if names == ["head.weight"] else row["prefix"]
        if not whose and not head:
            continue
        x = torch.cat([params[name].detach() for name in names])
        if row.get("per_head") and len(names) == 3:
            x = x.view(3, c.heads, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        if row.get("plus_one") and is_norm(names[0]):
            x = x - 1
        out[whose + source] = (x.t() if turned(row, source, x) else x).contiguous().cpu()
    return out


# ---- the network -------------------------------------------------------------------------------------------

ALIKE = dict(cpu=1.0, cuda=0.8)  # see alike: CPUs pay for padding, GPUs for each call


def alike(lengths: list[int], least: float) -> list[list[int]]:
    """Lengths split into runs of neighbours; the shortest of a run is at least that part of its longest."""
    runs = []
    for n in lengths:
        if runs and min(*runs[-1], n) >= least * max(*runs[-1], n):
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


class Run:
    """B neighbouring sequences of a batch as attention sees them: a rectangle (B, T), padded on the right by
    repeating a sequence's last token. Causal attention needs no mask for that: nothing looks to the right.

    A sequence may branch (tree), so that one pass reads a prompt with all its options. A token sees those
    before it that are on the trunk (branch 0) or on its own branch; its position counts them.

        prompt p q, options a b and c           sees  p q a b c
        tokens    p q a b c                        p  x
        branch    0 0 1 1 2                        q  x x
        position  0 1 2 3 2                        a  x x x
                                                   b  x x x x
                                                   c  x x . . x
    """

    def __init__(self, lengths: list[int], start: int, tree: Tensor | None, device):
        n = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
        at = torch.arange(max(lengths), device=device)  # (T,)
        first = start + n.cumsum(0) - n  # (B, 1)
        self.B, self.T, self.first, self.branched = len(lengths), max(lengths), first[:, 0], tree is not None
        self.real = at < n  # (B, T)
        self.token = first + at.minimum(n - 1)  # (B, T)
        self.sees = (at[:, None] >= at)[None]  # (1, T, T)
        self.position = at.expand(self.B, self.T)  # (B, T)
        if tree is not None:
            branch = tree[self.token]  # (B, T)
            trunk, own = branch[:, None] == 0, branch[:, :, None] == branch[:, None]
            self.sees = self.sees & (trunk | own)  # (B, T, T)
            self.position = self.sees.sum(-1) - 1

    def mask(self, window: int | None, keep: Tensor | None = None) -> Tensor | None:
        """(1 or B, 1, T, T), True where a token may look; None: plain causal attention does it. A window
        counts the token itself. keep (B,): only the rows of these tokens, (B, 1, 1, T)."""
        if keep is None and not self.branched and (window is None or window >= self.T):
            return None
        sees = self.sees
        if window is not None:
            sees = sees & (self.position[:, :, None] - self.position[:, None] < window)  # (1 or B, T, T)
        if keep is None:
            return sees[:, None]
        sequence = torch.arange(self.B, device=keep.device)
        return sees.expand(self.B, self.T, self.T)[sequence, keep - self.first][:, None, None]


class Packing:
    """Where the tokens of a batch stand: end to end, (P, C), so that linear maps and norms work on real
    tokens only. Attention alone unpacks them to rectangles, one for each run of about equal lengths, and
    packs again:

        lengths 3 3 2 4            tokens  a a a b b b c c d d d d      (P,)
        runs (2, 3) and (2, 4)     slots   a a a   c c . .              (S,), . = the c before it again
                                           b b b   d d d d
        token_of  0 1 2 3 4 5 6 7 7 7 8 9 10 11                         (S,) slot -> token
        slot_of   0 1 2 3 4 5 6 7 10 11 12 13                           (P,) token -> slot

    position (P,): of each token in its sequence. tree (P,) int64 or None: see Run. keep (B,) or None: the one
    token of each sequence that still looks in the last block. windows: those that blocks ask for."""

    def __init__(self, lengths: list[int], tree: Tensor | None, keep: Tensor | None, windows: set, device):
        self.runs, start = [], 0
        for run in alike(lengths, ALIKE[device.type]):
            self.runs.append(Run(run, start, tree, device))
            start += sum(run)
        self.sizes, self.sequences = [run.B * run.T for run in self.runs], [run.B for run in self.runs]
        self.token_of = torch.cat([run.token.flatten() for run in self.runs])
        self.slot_of = torch.cat([run.real.flatten() for run in self.runs]).nonzero()[:, 0]
        self.position = torch.cat([run.position.flatten() for run in self.runs])[self.slot_of]
        self.padded = len(self.slot_of) < len(self.token_of)
        self.masks = {window: [run.mask(window) for run in self.runs] for window in windows}
        self.kept_masks = {}
        for window in windows if keep is not None else ():
            parts = zip(self.runs, keep.split(self.sequences))
            self.kept_masks[window] = [run.mask(window, part) for run, part in parts]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """(P, H, D) -> (B, H, T, D) for each run; of the kept tokens (B, H, D) -> (B, H, 1, D)."""
        if len(x) < len(self.slot_of):
            return [part[:, :, None] for part in x.split(self.sequences)]
        slots = x.index_select(0, self.token_of) if self.padded else x  # (S, H, D)
        return [part.view(run.B, run.T, *x.shape[1:]).transpose(1, 2)
                for run, part in zip(self.runs, slots.split(self.sizes))]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float,
               cap: float | None) -> Tensor:
        """q (P, H, D), or (B, H, D) of the kept tokens; k and v (P, H, D) -> (P or B, H * D)."""
        kept = len(q) < len(k)
        masks = self.kept_masks[window] if kept else self.masks[window]
        outs = [attention(*qkv, mask, scale, cap)
                for *qkv, mask in zip(self.unpack(q), self.unpack(k), self.unpack(v), masks)]
        y = torch.cat([out.transpose(1, 2).flatten(2).flatten(0, 1) for out in outs])  # (S or B, H * D)
        return y.index_select(0, self.slot_of) if self.padded and not kept else y


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
              cap: float | None) -> Tensor:
    """q, k, v (B, H, T, D) -> (B, H, T, D), the softmax in float32. mask: see Run.mask; None: causal."""
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))  # (B, H, T, T)
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()  # (T, T)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def rope_table(rope: tuple, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (P, 1, R) float32 for R rotated channels; sin is negative in its first half."""
    base, rotated, scaling = rope[0], rope[1], dict(rope[2])
    channel = torch.arange(0, rotated, 2, device=position.device).float()  # (R / 2,)
    frequency = 1.0 / base ** (channel / rotated)
    if "low_freq_factor" in scaling:  # llama3: slow turns are slowed further, fast ones kept, or a blend
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    elif scaling:
        frequency = frequency / scaling["factor"]
    angle = position.float()[:, None, None] * frequency  # (P, 1, R / 2)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first R channels of every head; channels a = r and b = r + R / 2 are a pair, turned to
    a cos - b sin, b cos + a sin. x (P, H, D)"""
    R = cos.shape[-1]
    part = x[..., :R].float()
    turned = (part * cos + part.roll(R // 2, -1) * sin).to(x.dtype)
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], -1)


class Weights(nn.Module):
    """The tensors name.weight, name.bias ... that params has, as parameters; None for those it has not.
    Nothing is copied, and nothing is trained but a Parameter that asks for it."""

    def __init__(self, params: dict[str, Tensor], name: str):
        super().__init__()
        for part in ("weight", "bias", "lora_a", "lora_b"):
            x = params.get(f"{name}.{part}")
            if x is not None and not isinstance(x, nn.Parameter):
                x = nn.Parameter(x, requires_grad=False)
            self.register_parameter(part, x)


class Linear(Weights):
    """x W^T + b in x's dtype: weights may be kept in a higher one (float32 masters). With lora_a (rank, C)
    and lora_b (O, rank) there, + lora_scale (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, params: dict[str, Tensor], name: str, lora_scale: float):
        super().__init__(params, name)
        self.lora_scale = lora_scale

    def forward(self, x: Tensor) -> Tensor:
        """(P, C) -> (P, O)"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_a is None:
            return y
        inner = self.lora_scale * F.linear(x, self.lora_a.to(x.dtype))  # (P, rank)
        return y + F.linear(inner, self.lora_b.to(x.dtype))


class Norm(Weights):
    """LayerNorm where there is a bias, else RMSNorm, else (no weight) the identity; float32 inside."""

    def __init__(self, params: dict[str, Tensor], name: str, eps: float):
        super().__init__(params, name)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        if self.weight is None:
            return x
        if self.bias is None:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class Block(nn.Module):
    """One layer of the residual stream x (P, C); what a checkpoint lacks is left out.

        x -+-> norm1 -> q k v -> q_norm k_norm -> rotate -> attend -> o -> post1 -> + -> x
           |________________________________________________________________________|
        x -+-> norm2 -> act(gate) * up, or act(up) -> down -> post2 -> + -> x
           |___________________________________________________________|

    in turn, or both from the same x, added together (parallel: GPT-NeoX).
    """

    def __init__(self, c: Config, params: dict, i: int, lora_scale: float):
        super().__init__()
        self.config, self.window = c, c.windows[i]
        self.rope = c.rope if self.window is None else c.local_rope
        for part in ("norm1", "q_norm", "k_norm", "post1", "norm2", "post2"):
            self.add_module(part, Norm(params, f"layers.{i}.{part}", c.eps))
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            self.add_module(part, Linear(params, f"layers.{i}.{part}", lora_scale))

    def forward(self, x: Tensor, packing: Packing, table: tuple | None, keep: Tensor | None) -> Tensor:
        """(P, C) -> (P, C); with keep (B,), the tokens that still look, (B, C) of those alone."""
        a = self.attend(self.norm1(x), packing, table, keep)
        x = x if keep is None else x[keep]  # nothing looks at the other tokens any more
        a = self.post1(self.o(a))
        if self.config.parallel:
            return x + a + self.mlp(self.norm2(x))
        x = x + a
        return x + self.post2(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, packing: Packing, table: tuple | None, keep: Tensor | None) -> Tensor:
        """(P, C) -> (P, H * D), or (B, H * D) of the kept tokens"""
        c = self.config
        q = self.heads(self.q(x if keep is None else x[keep]), self.q_norm)  # (P or B, H, D)
        k = self.heads(self.k(x), self.k_norm)  # (P, K, D)
        v = self.v(x).view(k.shape)  # (P, K, D)
        if table:
            q = rotate(q, *(table if keep is None else (part[keep] for part in table)))
            k = rotate(k, *table)
        if c.kv_heads < c.heads:  # a key/value head serves H / K neighbouring query heads
            k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        return packing.attend(q, k, v, self.window, c.scale, c.attn_cap)

    def heads(self, x: Tensor, norm: Norm) -> Tensor:
        """(P, H * D) -> (P, H, D), normed over what the gain spans: one head, or all together."""
        if norm.weight is not None:
            x = norm(x.view(len(x), -1, len(norm.weight)))
        return x.reshape(len(x), -1, self.config.head_dim)

    def mlp(self, x: Tensor) -> Tensor:
        """(P, C) -> (P, C)"""
        act = ACTIVATIONS[self.config.act]
        if self.gate.weight is None:
            return self.down(act(self.up(x)))
        return self.down(act(self.gate(x)) * self.up(x))


class Transformer(nn.Module):
    """A checkpoint: config, parameters, device, dtype (of the activations); from load also raw (config.json),
    folder, revision (the hub's commit; None for a directory).

    Built from tensors under canonical names, which it shares and which its state_dict uses: embed.weight,
    layers.0.q.weight ... Weights of a higher precision than dtype are cast where they are used."""
    raw, folder, revision = None, None, None
    recompute = False  # activation checkpointing, block by block

    def __init__(self, config: Config, params: dict[str, Tensor], *, dtype: torch.dtype | None = None,
                 lora_scale: float = 1.0):
        super().__init__()
        self.config, self.device = config, params["embed.weight"].device
        self.dtype = dtype or params["embed.weight"].dtype
        self.embed, self.pos, self.head = (Weights(params, part) for part in ("embed", "pos", "head"))
        self.layers = nn.ModuleList(Block(config, params, i, lora_scale) for i in range(config.layers))
        self.norm = Norm(params, "norm", config.eps)

    @property
    def params(self) -> dict[str, Tensor]:
        """Canonical name -> parameter."""
        return dict(self.named_parameters())

    def packed(self, tokens: Tensor, lengths: list[int], layers: Sequence[int | None] = (None,),
               tree: Tensor | None = None, keep: Tensor | None = None) -> list[Tensor]:
        """tokens (P,) int64, sequences end to end -> one (P, C) per entry of layers: None = after the final
        norm, i = the residual stream after block i (0 = embeddings). keep (B,): index of the one token of
        each sequence whose state is wanted, instead of all P. tree: see Run. ValueError for a sequence
        longer than the context."""
        c = self.config
        assert tokens.shape == (sum(lengths),) and min(lengths) > 0, "sequences end to end, none empty"
        packing = Packing(lengths, tree, keep, set(c.windows), tokens.device)
        if max(lengths) > c.context and int(packing.position.max()) >= c.context:
            raise ValueError(f"a sequence of {int(packing.position.max()) + 1} tokens is longer than the "
                             f"context of {c.context}")
        row, x = FAMILIES[c.family], F.embedding(tokens, self.embed.weight).to(self.dtype)  # (P, C)
        if row.get("embed_scale"):
            x = x * torch.tensor(c.width ** 0.5, dtype=x.dtype)
        if self.pos.weight is not None:
            x = x + F.embedding(packing.position + row.get("pos_offset", 0), self.pos.weight).to(x.dtype)
        tables = {rope: rope_table(rope, packing.position) for rope in {c.rope, c.local_rope} if rope}
        last = c.layers if None in layers else max(layers)
        states = {0: x if keep is None else x[keep]}
        for i, block in enumerate(self.layers[:last], 1):
            inputs = x, packing, tables.get(block.rope), keep if i == last else None
            x = recompute(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)
            if i in layers:
                states[i] = x if keep is None or i == last else x[keep]
        return [self.norm(x) if layer is None else states[layer] for layer in layers]

    def hidden(self, tokens: Tensor, lengths: Tensor, layer: int | None = None) -> Tensor:
        """tokens (B, T) int64 right-padded, lengths (B,) -> (B, T, C), zeros past a length. layer: as in
        packed."""
        B, T = tokens.shape
        real = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)
        x = self.packed(tokens[real], lengths.tolist(), (layer,))[0]
        return x.new_zeros(B, T, x.shape[-1]).masked_scatter(real[..., None], x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V) float32. The product is taken in float32 whatever the
        dtype: rounded to bfloat16, logits of size 20 lie 1/8 apart, and options tie."""
        x, head = hidden.float(), self.embed.weight if self.head.weight is None else self.head.weight
        if head.dtype == torch.float32:
            y = F.linear(x, head)
        else:  # converted a block at a time, and again in the backward pass: never a whole head in float32
            y = torch.cat([recompute(lambda x, rows: F.linear(x, rows.float()), x, rows, use_reentrant=False)
                           for rows in head.split(HEAD_ROWS)], -1)
        cap = self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)


# ---- reading -----------------------------------------------------------------------------------------------

HEAD_ROWS = 8192  # of the vocabulary: converted to float32 at a time
CELLS = 2 ** 25  # logits that exist at a time
BATCH_TOKENS = 2048  # enough for a few CPU cores, few enough for their cache; a GPU wants more


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, in batches of at most budget tokens (or one sequence)."""
    out, room = [], -1
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < lengths[i]:
            out.append([])
            room = budget
        out[-1].append(i)
        room -= lengths[i]
    return out


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is what PyTorch raises when a GPU's or the machine's memory runs out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_batches(lengths: Sequence[int], budget: int, work: Callable[[list[int]], None],
               progress: Callable | None = None) -> None:
    """work(indices) for every batch; one that runs out of memory is halved. TrainError when a single sequence
    does. progress(done_tokens, all_tokens) follows each batch."""
    todo, done = batches(lengths, budget)[::-1], 0
    while todo:
        indices = todo.pop()
        try:
            work(indices)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(indices) == 1:
                raise TrainError(f"out of memory with one sequence of {lengths[indices[0]]} tokens: use a "
                                 "smaller model, or a device with more memory") from None
            half = len(indices) // 2
            todo += [indices[half:], indices[:half]]
            continue
        done += sum(lengths[i] for i in indices)
        if progress:
            progress(done, sum(lengths))


def pack(sequences: Sequence[list[int]], device) -> tuple[Tensor, list[int]]:
    """Sequences end to end: tokens (P,) int64, and their lengths."""
    return torch.tensor(list(itertools.chain(*sequences)), device=device), [len(s) for s in sequences]


def finite(model: Transformer, x: Tensor) -> Tensor:
    """x, hidden states or what follows from them. TrainError unless all are finite."""
    if not x.isfinite().all():
        remedy = {"float16": "use --dtype bfloat16 or float32", "bfloat16": "use --dtype float32",
                  "float32": "the checkpoint is damaged or overflows"}
        name = str(model.dtype).removeprefix("torch.")
        raise TrainError(f"hidden states are not finite in {name}: {remedy[name]}")
    return x


@torch.no_grad()
def hidden_at(model: Transformer, sequences: list[list[int]], position="last", layer: int | None = None,
              batch_tokens: int = BATCH_TOKENS, progress: Callable | None = None) -> Tensor:
    """The state of one token of each sequence: its last, or token position[n] of sequence n. (N, C) in the
    model's dtype and on its device, input order. layer: as in Transformer.packed. TrainError for states that
    are not finite, or no memory."""
    at = [len(s) - 1 for s in sequences] if position == "last" else list(position)
    out = torch.empty(len(sequences), model.config.width, dtype=model.dtype, device=model.device)

    def work(indices):
        tokens, lengths = pack([sequences[i] for i in indices], model.device)
        starts = itertools.accumulate([0] + lengths[:-1])
        keep = torch.tensor([start + at[i] for start, i in zip(starts, indices)], device=model.device)
        out[indices] = finite(model, model.packed(tokens, lengths, (layer,), keep=keep)[0])

    in_batches([len(s) for s in sequences], batch_tokens, work, progress)
    return out


class Reading(NamedTuple):
    """What one pass over Q questions gives, in input order, on the CPU; states in the model's dtype."""
    loglik: Tensor         # (Q, O) float64, sum of log p(token | before); -inf: no such option
    option_tokens: Tensor  # (Q, O) int64
    prompt_state: Tensor   # (Q, n, C) at the prompt's last token
    item_state: Tensor     # (Q, n, C) at the last token of option pick[q], or the prompt's for -1


@torch.no_grad()
def read(model: Transformer, prompts: list[list[int]], options: list[list[list[int]]], pick: list[int], *,
         layers: Sequence[int | None] = (None,), batch_tokens: int = BATCH_TOKENS,
         progress: Callable | None = None) -> Reading:
    """One forward pass over every question with its options as branches of its prompt: prompt + sum(options)
    tokens instead of a whole sequence per option. No prompt and no option is empty. [D1] TrainError for
    states that are not finite, or no memory."""
    Q, O, n, C = len(prompts), max(map(len, options), default=0), len(layers), model.config.width
    out = Reading(torch.full((Q, O), -torch.inf, dtype=torch.float64), torch.zeros(Q, O, dtype=torch.int64),
                  torch.empty(Q, n, C, dtype=model.dtype), torch.empty(Q, n, C, dtype=model.dtype))

    def work(indices):
        b = branch([prompts[q] for q in indices], [options[q] for q in indices], model.device)
        final, *states = model.packed(b.tokens, b.lengths, (None, *layers), b.tree)
        loglik = option_loglik(model, finite(model, final), b)
        out.loglik[indices, :loglik.shape[1]] = loglik.cpu()
        prompt_end = [ends[0] for ends in b.ends]
        item_end = [ends[pick[q] + 1] for q, ends in zip(indices, b.ends)]
        for j, x in enumerate(states):
            out.prompt_state[indices, j] = finite(model, x[prompt_end]).cpu()
            out.item_state[indices, j] = finite(model, x[item_end]).cpu()

    for q, choices in enumerate(options):
        out.option_tokens[q, :len(choices)] = torch.tensor([len(option) for option in choices])
    in_batches([len(p) + sum(map(len, o)) for p, o in zip(prompts, options)], batch_tokens, work,
               progress)
    return out


class Branches(NamedTuple):
    """Prompts with their options as branches (see Run), end to end; p is an index into all P tokens."""
    tokens: Tensor         # (P,) int64
    lengths: list[int]     # of a prompt with all its options
    tree: Tensor           # (P,) int64, 0 on the prompt, o + 1 on option o
    ends: list[list[int]]  # p of a prompt's last token, then of each option's
    before: list[int]      # for each token of an option, p of the token that predicts it
    target: list[int]      # and p of itself


def branch(prompts: list[list[int]], options: list[list[list[int]]], device) -> Branches:
    """Lays out prompt, option 0, option 1, ... of each question."""
    tree, ends, before, target, at = [], [], [], [], 0
    for prompt, choices in zip(prompts, options):
        at += len(prompt)
        tree += [0] * len(prompt)
        ends.append([at - 1])
        for o, option in enumerate(choices):
            tree += [o + 1] * len(option)
            before += [ends[-1][0], *range(at, at + len(option) - 1)]
            target += range(at, at + len(option))
            at += len(option)
            ends[-1].append(at - 1)
    tokens, lengths = pack([list(itertools.chain(p, *o)) for p, o in zip(prompts, options)], device)
    return Branches(tokens, lengths, torch.tensor(tree, device=device), ends, before, target)


def option_loglik(model: Transformer, x: Tensor, b: Branches) -> Tensor:
    """(Q, O) float64 from final states x (P, C): the sum of log p(token | before) over each option's tokens;
    -inf: no such option. [D1]"""
    scores = log_likelihood(model, x, b.before, b.tokens[b.target]).double()
    sizes = [end - start for ends in b.ends for start, end in zip(ends, ends[1:])]
    sums = torch.stack([part.sum() for part in scores.split(sizes)])
    parts = sums.split([len(ends) - 1 for ends in b.ends])
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-torch.inf)


def log_likelihood(model: Transformer, x: Tensor, before: list[int], target: Tensor,
                   cells: int | None = None) -> Tensor:
    """log p(target[n] | everything up to token before[n]) in float32, (n,), from final states x (P, C). At
    most `cells` logits (CELLS) exist at a time, also in the backward pass, which computes them again; and
    each state gets its own once: the end of a prompt serves all options."""
    where, back = torch.unique(torch.tensor(before, device=x.device), return_inverse=True)
    step, pieces, places = max(1, (cells or CELLS) // model.config.vocab), [], []
    for a in range(0, len(where), step):
        mine = ((back >= a) & (back < a + step)).nonzero()[:, 0]
        pieces.append(recompute(token_loglik, model, x[where[a:a + step]], back[mine] - a, target[mine],
                                use_reentrant=False))
        places.append(mine)
    return torch.cat(pieces)[torch.cat(places).argsort()]


def token_loglik(model: Transformer, x: Tensor, state: Tensor, token: Tensor) -> Tensor:
    """log p(token[n]) by the logits of x[state[n]], (n,) float32; x (U, C)"""
    logits = model.logits(x)  # (U, V)
    return logits[state, token] - logits.logsumexp(-1)[state]


# ---- finetuning --------------------------------------------------------------------------------------------

TRAIN_TOKENS = 8192  # of a micro-batch


class Choice(NamedTuple):
    """An item for the student that answers, in token ids as encode_options gives them."""
    prompt: list[int]
    options: list[list[int]]  # two or more, none empty
    shown: int                # the one whose probability is asked for


class Student:
    """A model with the tensors that finetuning put in place of its own or beside them (LoRA). Made again from
    its state(), it is the same bit for bit. Its kinds say what an input is and how P(y) follows from it."""

    def __init__(self, model: Transformer, state: dict[str, Tensor], *, lora_scale: float = 1.0):
        self._state = {name: x.to(model.device) for name, x in state.items()}
        self.model = Transformer(model.config, model.params | self._state, dtype=model.dtype,
                                 lora_scale=lora_scale)
        self.model.raw, self.model.folder = model.raw, model.folder

    def state(self) -> dict[str, Tensor]:
        """The trained tensors."""
        return self._state

    @torch.no_grad()
    def predict(self, inputs: list, batch_tokens: int = BATCH_TOKENS,
                progress: Callable | None = None) -> Tensor:
        """P(y = 1), (N,) float32 on the CPU, in input order. TrainError for states that are not finite."""
        out = torch.empty(len(inputs))

        def work(indices):
            p = self.log_p([inputs[i] for i in indices])[:, 1].exp()
            out[indices] = finite(self.model, p).cpu()

        in_batches([self.size(x) for x in inputs], batch_tokens, work, progress)
        return out


class Classifier(Student):
    """Reads a sequence; head classifier.weight (2, C) on the final state of its last token [D8]."""

    def size(self, sequence: list[int]) -> int:
        """Tokens of an input."""
        return len(sequence)

    def log_p(self, sequences: list[list[int]]) -> Tensor:
        """log P(y = 0), log P(y = 1), (B, 2) float32"""
        tokens, lengths = pack(sequences, self.model.device)
        last = torch.tensor(lengths, device=self.model.device).cumsum(0) - 1
        return self.classify(self.model.packed(tokens, lengths, keep=last)[0])

    def classify(self, x: Tensor) -> Tensor:
        """log_p from final states x (B, C)"""
        return F.linear(x.float(), self._state["classifier.weight"]).log_softmax(-1)

    def save(self, folder: str) -> None:
        """Hugging Face layout, LoRA merged: loads as AutoModelForSequenceClassification where the family has
        one. FileExistsError for the pretrained model's own folder and for one with a sharded model."""
        files = export(self.model.config, merged(self.model))
        files["score.weight"] = self._state["classifier.weight"].detach().cpu()
        stale = "architectures", "auto_map", "num_labels", "label2id"
        raw = {key: value for key, value in self.model.raw.items() if key not in stale}
        save_checkpoint(self.model, Path(folder), files, raw | dict(id2label={"0": "no", "1": "yes"}))


class Answerer(Student):
    """Reads a question with all its options: P(y = 1) is the softmax over the options of their summed
    log-likelihoods, at the one shown. Untouched, it is the pretrained model's own belief. [D17]"""

    def size(self, choice: Choice) -> int:
        """Tokens of an input."""
        return len(choice.prompt) + sum(map(len, choice.options))

    def log_p(self, choices: list[Choice]) -> Tensor:
        """log P(y = 0), log P(y = 1), (B, 2) float32; the former over the other options, so that nothing
        cancels."""
        b = branch([c.prompt for c in choices], [c.options for c in choices], self.model.device)
        final = self.model.packed(b.tokens, b.lengths, tree=b.tree)[0]
        log_p = option_loglik(self.model, final, b).log_softmax(-1)  # (B, O) float64
        shown = torch.zeros_like(log_p, dtype=torch.bool)
        shown[range(len(choices)), [c.shown for c in choices]] = True
        others = log_p.masked_fill(shown, -torch.inf).logsumexp(-1)  # (B,)
        return torch.stack([others, log_p[shown]], -1).float()

    def save(self, folder: str) -> None:
        """Hugging Face layout, LoRA merged, with its head: loads as AutoModelForCausalLM, and as a checkpoint
        here. FileExistsError as for a Classifier."""
        files = export(self.model.config, merged(self.model), head=True)
        save_checkpoint(self.model, Path(folder), files, self.model.raw)


STUDENTS = dict(classifier=Classifier, answer=Answerer)


def merged(model: Transformer) -> dict[str, Tensor]:
    """The parameters, LoRA added to the matrices that it stands beside."""
    params = model.params
    for stem in [name.removesuffix(".lora_a") for name in params if name.endswith(".lora_a")]:
        delta = params[stem + ".lora_b"].float() @ params[stem + ".lora_a"].float()  # (O, C)
        params[stem + ".weight"] = (params[stem + ".weight"].float() + delta).to(model.dtype)
    return params


def save_checkpoint(model: Transformer, folder: Path, files: dict[str, Tensor], raw: dict) -> None:
    """Writes model.safetensors, config.json with the model's dtype, and its tokenizer."""
    if folder.resolve() == model.folder.resolve() or any(folder.glob("*.index.json")):
        raise FileExistsError(f"{folder}: holds another model")
    named = {key: value for key, value in raw.items() if key != "torch_dtype"}
    named["dtype"] = str(model.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(files, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(named, indent=1))
    for name in TOKENIZER_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)


def trainable(model: Transformer, tune: str, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Canonical name -> the float32 tensor that Adam owns, whatever the model's dtype. full: a copy of every
    weight but embedding and head; lora: A, and B = 0, beside every linear map; head: none."""
    params, out = model.params, {}
    for name in [name for _, names, _ in tensors(model.config) for name in names]:
        stem, _, kind = name.rpartition(".")
        if tune == "full" and name not in ("embed.weight", "head.weight"):
            out[name] = params[name].detach().to(torch.float32, copy=True)
        if tune == "lora" and kind == "weight" and re.search(r"\.(q|k|v|o|gate|up|down)$", stem):
            rows, columns = params[name].shape
            a = torch.randn(rank, columns, generator=generator) / columns ** 0.5
            out[stem + ".lora_a"], out[stem + ".lora_b"] = a, torch.zeros(rows, rank)
    return {name: nn.Parameter(x.to(model.device)) for name, x in out.items()}


class Learner:
    """A student while it learns: its trained weights are float32 masters, whatever the model's dtype."""

    def __init__(self, model: Transformer, inputs: list, student: str, tune: str, rank: int,
                 lora_scale: float, head_init: str, generator: torch.Generator):
        self.model, self.inputs, self.lora_scale = model, inputs, lora_scale
        self.trained, self.used, self.features = {}, None, None
        if student == "classifier":
            noise = torch.randn(2, model.config.width, generator=generator) / model.config.width ** 0.5
            head = noise if head_init == "normal" else torch.zeros_like(noise)
            self.trained["classifier.weight"] = nn.Parameter(head.to(model.device))
        self.trained |= trainable(model, tune, rank, generator)
        if student == "classifier" and tune == "full":
            self.train_used_rows()
        self.student = STUDENTS[student](model, self.trained, lora_scale=lora_scale)
        self.sizes = [self.student.size(x) for x in inputs]
        if tune == "head":
            self.features = hidden_at(model, inputs)

    def train_used_rows(self) -> None:
        """Trains the rows of the embedding that the sequences use; ids count those. The others never get a
        gradient: Adam would leave them alone, and need not hold moments for them."""
        self.used, ids = torch.unique(pack(self.inputs, self.model.device)[0], return_inverse=True)
        self.inputs = [x.tolist() for x in ids.split([len(s) for s in self.inputs])]
        self.trained["embed.weight"] = nn.Parameter(self.model.embed.weight.detach()[self.used].float())

    def log_p(self, indices: list[int]) -> Tensor:
        """log P(y = 0), log P(y = 1) of these inputs, (len(indices), 2) float32"""
        if self.features is not None:
            return self.student.classify(self.features[indices])
        return self.student.log_p([self.inputs[i] for i in indices])

    def finished(self) -> Student:
        """The student with weights in the model's dtypes, LoRA's B times its scale."""
        dtypes = {name: x.dtype for name, x in self.model.params.items()}
        dtypes["classifier.weight"] = torch.float32
        state = {name: x.detach().to(dtypes.get(name, self.model.dtype)) for name, x in self.trained.items()}
        for name in state:
            if name.endswith("lora_b"):
                state[name] = (self.trained[name].detach() * self.lora_scale).to(self.model.dtype)
        if self.used is not None:
            whole = self.model.embed.weight.detach()
            state["embed.weight"] = whole.index_copy(0, self.used, state["embed.weight"])
        return type(self.student)(self.model, state)


def finetune(model: Transformer, inputs: list, targets, *, lr: float, epochs: int = 2, batch: int = 32,
             seed: int, student: str = "classifier", tune: str = "full", target_fn: Callable | None = None,
             batch_tokens: int = TRAIN_TOKENS, rank: int = 8, lora_alpha: float = 16.0,
             checkpoint: bool = False, progress: Callable | None = None, head_init: str = "zero") -> Student:
    """Soft-label cross-entropy against targets (N,) = P(y = 1): Adam, no weight decay, cosine to 0 over all
    steps, no warm-up, no dropout, a new order each epoch (Burns et al. 2023, appendix A). Leaves model alone.

    student: classifier, inputs are sequences [D8], or answer, inputs are Choices [D17]. tune: full, lora (all
    linear maps) or head (of a classifier). What answers keeps its embedding and its head as they are: both
    are large, often one tensor, and few of their rows are in use.
    target_fn(p, w, fraction) -> the targets of a step, from the student's own p (B,) on the whole batch, the
    given w (B,), and the fraction of steps done. Micro-batches hold at most batch_tokens tokens and halve
    when memory runs out; gradients are always the whole batch's. checkpoint: recompute activations.
    progress(step, steps, loss) follows each step. TrainError for settings that do not go together, a loss or
    weights that are not finite, and an input that does not fit into memory."""
    check_settings(student, tune, head_init)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(inputs), generator=generator).split(batch) for _ in range(epochs)]
    steps = [indices.tolist() for order in orders for indices in order]
    learner = Learner(model, inputs, student, tune, rank, lora_alpha / rank, head_init, generator)
    learner.student.model.recompute = checkpoint
    adam = torch.optim.Adam(learner.trained.values(), lr=lr, betas=(0.9, 0.999), fused=True)
    given, budget = torch.as_tensor(targets, dtype=torch.float32, device=model.device), batch_tokens
    for step, indices in enumerate(steps):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        loss, fraction = None, step / len(steps)
        while loss is None:
            try:
                loss = gradients(learner, indices, given[indices], target_fn, fraction, budget)
            except RuntimeError as error:
                budget = smaller(budget, [learner.sizes[i] for i in indices], error, step + 1)
                adam.zero_grad()  # the step starts again from nothing
        if not math.isfinite(loss):
            if step == 0:  # nothing is learnt yet: are the model's own states to blame?
                learner.student.predict([learner.inputs[i] for i in indices], budget)
            raise TrainError(f"the loss is {loss} at step {step + 1} of {len(steps)} (learning rate {lr}): "
                             "lower it")
        adam.step()
        adam.zero_grad()
        if progress:
            progress(step + 1, len(steps), loss)
    if not all(x.isfinite().all() for x in learner.trained.values()):
        raise TrainError(f"weights are not finite after step {len(steps)}, the last (learning rate {lr}): "
                         "lower it")
    return learner.finished()


def check_settings(student: str, tune: str, head_init: str) -> None:
    """TrainError for what finetune does not know, or cannot do together."""
    if student not in STUDENTS or tune not in ("full", "lora", "head") or head_init not in ("zero", "normal"):
        raise TrainError(f"tune = {tune!r}, student = {student!r}, head_init = {head_init!r}: they must be "
                         "full, lora or head, classifier or answer, zero or normal")
    if student == "answer" and tune == "head":
        raise TrainError("the student that answers has no head to train alone: tune must be full or lora")


def smaller(budget: int, lengths: list[int], error: RuntimeError, step: int) -> int:
    """The next budget of tokens for a batch that ran out of memory. TrainError when a single sequence does;
    any other error is raised again."""
    if not out_of_memory(error):
        raise error
    if budget < max(lengths):
        raise TrainError(f"out of memory at step {step} with one sequence of {max(lengths)} tokens: tune "
                         "less (lora, head) or recompute activations") from None
    return min(budget, sum(lengths)) // 2


def gradients(learner: Learner, indices: list[int], w: Tensor, target_fn, fraction: float,
              budget: int) -> float:
    """Adds the gradients of a batch's mean cross-entropy against w (B,), one backward pass per micro-batch;
    the loss. target_fn needs p of the whole batch before any gradient: several micro-batches run twice."""
    micro = batches([learner.sizes[i] for i in indices], budget)  # indices into indices
    parts = [[indices[j] for j in part] for part in micro]
    alone = learner.log_p(parts[0]) if len(parts) == 1 else None
    target, total = w, 0.0
    if target_fn:
        p = torch.empty_like(w)
        with torch.no_grad():
            for part, chosen in zip(micro, parts):
                p[part] = (learner.log_p(chosen) if alone is None else alone)[:, 1].exp()
        target = target_fn(p, w, fraction)
    for part, chosen in zip(micro, parts):
        log_p = learner.log_p(chosen) if alone is None else alone  # (len(part), 2)
        y = target[part]
        loss = -(torch.stack([1 - y, y], -1) * log_p).sum() / len(indices)
        loss.backward()
        total += loss.item()
    return total
