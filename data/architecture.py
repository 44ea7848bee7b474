"""config.json -> Config, the numbers of one checkpoint; and the tensors that these numbers ask for.

Numbers from config.json, names and exceptions from data/families.py. A value that would change the result and
is not supported is refused by name; a key that transformers does not know either changes nothing.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F

from data.families import FAMILIES, INERT_KEYS, KEYS, LOGICAL, MOST_LAYERS, MUST, NULLABLE, WHOLE
from data.tokens import LoadError

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
    """config.json -> Config. LoadError for an unknown family, a value not supported."""
    family = raw.get("model_type")
    if raw.get("quantization_config"):
        raise LoadError("config.json: quantised checkpoints are refused, use the full-precision one")
    if not isinstance(family, str) or family not in FAMILIES:
        raise LoadError(f"config.json: model_type {family!r:.40} is not supported, only "
                        f"{', '.join(FAMILIES)}")
    try:
        numbers = read_numbers(raw, FAMILIES[family])
        check_keys(raw, FAMILIES[family])
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
    keys = set(row.get("also", "").split()) | MUST.keys() | row["must"].keys()
    for field in row["numbers"]:
        keys |= set(keys_of(row, field))
    if "base" in row["numbers"]:
        keys |= {"rope_scaling", "rope_parameters"}
    return keys


def unread_keys(raw: dict) -> list[str]:
    """The keys that transformers' classes of the family do not know, and that change nothing there either."""
    known = known_keys(FAMILIES[raw["model_type"]])
    return [key for key, value in raw.items()
            if value is not None and key not in known and not INERT_KEYS.fullmatch(key)]


def check_keys(raw: dict, row: dict) -> None:
    """LoadError for a key that has one value that is supported, and has another."""
    for key, value in (MUST | row["must"]).items():
        if raw.get(key) not in (None, value):
            raise LoadError(f"config.json: {key} = {raw[key]!r:.40} is not supported, only {value!r}")


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
    on = True
    if "use_sliding_window" in row.get("also", ""):
        on = raw.get("use_sliding_window", False)
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
    if keys_of(row, "fraction") or p.get("partial_rotary_factor") == 1:  # transformers 5 writes the 1 too
        said["partial_rotary_factor"] = p.pop("partial_rotary_factor", n["fraction"])
    scaling, _ = p.pop("rope_type", p.get("type", "default")), p.pop("type", None)
    needs = {"default": [], "linear": ["factor"], "dynamic": ["factor"],  # dynamic: to lengthen the context
             "llama3": ["factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"]}
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
    if scaling == "dynamic":
        p = {}  # the identity up to the context, and no sequence is longer
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
