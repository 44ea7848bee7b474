"""The networks of the method: checkpoints, hidden states, option log-likelihoods, finetuning.

Selective weak-to-strong generalization (Lang, Huang, Li, arXiv 2511.14166) asks three things of a language
model: a classifier finetuned on soft labels (weak supervisor, student, ceiling), hidden states (P(IK), graph)
and the log-likelihood of each option (self-generated labels). All three run through one function,
Transformer.packed.

    symbol     here                shape      source
    P(y = 1)   Classifier.predict  (N,)       soft label, Burns et al. 2023 (arXiv 2312.09390), app. A [D8]
    log p(a|q) Reading.loglik      (Q, O)     option scores, Kadavath et al. 2022 (arXiv 2207.05221) [D1]
    h(q)       Reading.prompt      (Q, n, C)  state at the end of the question: what P(IK) looks at
    h(q, a)    Reading.item        (Q, n, C)  state at the end of the item: a node of the graph

Shapes: B sequences, T tokens of one, P tokens of all, C width, H heads, K key/value heads, D head dimension,
I inner width of the MLP, V vocabulary, N items, Q questions, O options, n layers asked for.
Packed layout: the tokens of a batch lie end to end, (P, C), and nothing is computed for padding; attention
alone unpacks runs of sequences of about one length, (B, H, T, D), right-padded, where plain causal attention
needs no mask, and packs again.
Parameters are a dict with one set of names for all families: embed pos norm head, layers.{i}.{norm1 q k v
q_norm k_norm o post1 norm2 gate up down post2}, each .weight and perhaps .bias, matrices (out, in), gains as
they multiply (Gemma's files hold gain - 1). A part that a family lacks has no tensor, and the network passes
it by.
"""
import base64
import ctypes
import itertools
import json
import math
import os
import re
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint as recompute


class LoadError(ValueError):
    """A checkpoint that cannot be used: one line saying what is wrong, where, and what to do."""

    def __init__(self, text: str):  # names in a damaged file may hold line feeds, or be a page long
        line = "".join(c if c.isprintable() else " " for c in text)
        super().__init__(line if len(line) < 600 else f"{line[:400]} ... {line[-150:]}")


class TrainError(ValueError):
    """A finetuning run or a reading that cannot go on: one line saying where, and what to do."""


# ---- families: names in a table, numbers from config.json --------------------------------------------------

MOST_LAYERS = 4096  # more is a damaged file: refused before anything is made that long
ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}
KEYS = dict(  # field of Config -> key of config.json, unless a family's row names others (any of several)
    vocab="vocab_size", context="max_position_embeddings", width="hidden_size", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim",
    inner="intermediate_size", tied="tie_word_embeddings", act="hidden_act", eps="rms_norm_eps",
    base="rope_theta", local_base="rope_local_base_freq", fraction="", window="sliding_window",
    scale="query_pre_attn_scalar", attn_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping",
    parallel="use_parallel_residual", attention_bias="attention_bias", mlp_bias="mlp_bias")
WHOLE = "vocab context width layers heads kv_heads head_dim inner window".split()
LOGICAL = "tied parallel attention_bias mlp_bias use_sliding_window".split()
NULLABLE = "kv_heads head_dim inner window scale attn_cap logit_cap".split()  # null: none, or from the others
INERT_KEYS = re.compile(  # keys that change nothing in a forward pass without dropout
    r"model_type|architectures|auto_map|transformers_version|_name_or_path|(torch_)?dtype|use_cache"
    r"|.*(dropout|_pdrop|layerdrop)(_prob)?|initializer_range|init_std|(bos|eos|pad|unk|sep)_token_id|prefix"
    r"|summary_.*|id2label|label2id|_?num_labels|task_specific_params|n_special|predict_special_tokens"
    r"|output_.*|n_ctx|is_decoder"
    r"|pretraining_tp|is_llama_config|gradient_checkpointing|chunk_size_feed_forward|is_encoder_decoder"
    r"|return_dict|problem_type|tokenizer_class|reorder_and_upcast_attn|cache_implementation")


def but(row: dict, names: dict = {}, numbers: dict = {}, **changes) -> dict:
    """A row with some entries changed; a part named None is taken out."""
    named = {parts: name for parts, name in (row["names"] | names).items() if name}
    return row | changes | dict(names=named, numbers=row["numbers"] | numbers)


def keys_of(row: dict, field: str) -> list[str]:
    return (KEYS | row.get("keys", {}))[field].split()


# A row holds: prefix and names of its tensors (several parts: one fused tensor, rows in that order); numbers,
# the defaults of transformers' configuration class for absent keys; keys, where it differs from KEYS; echo,
# keys that the class does not read: they must say what the field's own key does; biased, the parts with a
# bias whatever the config says; must, keys with the one value we support; also, keys read by a lambda or
# without effect up to `context` tokens; buffers, tensors that are no weights. What neither file nor config
# shows is a literal with its proof.
LLAMA = dict(
    prefix="model.", buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    must=dict(rope_interleaved=False), echo=dict(partial_rotary_factor="fraction"),
    names={"embed": "embed_tokens", "norm": "norm", "head": "lm_head", "norm1": "layers.{}.input_layernorm",
           "q": "layers.{}.self_attn.q_proj", "k": "layers.{}.self_attn.k_proj",
           "v": "layers.{}.self_attn.v_proj", "o": "layers.{}.self_attn.o_proj",
           "norm2": "layers.{}.post_attention_layernorm", "gate": "layers.{}.mlp.gate_proj",
           "up": "layers.{}.mlp.up_proj", "down": "layers.{}.mlp.down_proj"},
    numbers=dict(vocab=32000, context=2048, width=4096, layers=32, heads=32, kv_heads=None, head_dim=None,
                 inner=11008, act="silu", eps=1e-6, tied=False, base=1e4, fraction=1.0,
                 attention_bias=False, mlp_bias=False))
QK_NORM = {"q_norm": "layers.{}.self_attn.q_norm", "k_norm": "layers.{}.self_attn.k_norm"}
POST_NORMS = {"post1": "layers.{}.post_attention_layernorm", "post2": "layers.{}.post_feedforward_layernorm"}
UNBIASED = dict(attention_bias=False, mlp_bias=False)  # not read by these classes: false is harmless
MISTRAL = but(LLAMA, numbers=dict(context=131072, kv_heads=8, inner=14336, window=4096), must=UNBIASED,
              slides=lambda i, raw: True)
QWEN2 = but(
    LLAMA, numbers=dict(vocab=151936, context=32768, kv_heads=32, inner=22016, window=4096),
    biased="q k v",  # Qwen2Attention: bias=True for q, k, v and False for o; no key says so
    slides=lambda i, raw: i >= raw.get("max_window_layers", 28),  # and none at all without use_sliding_window
    also="use_sliding_window max_window_layers layer_types", must=dict(use_mrope=False, **UNBIASED))
QWEN3 = but(QWEN2, names=QK_NORM, numbers=dict(head_dim=128), biased="",
            must=dict(use_mrope=False, mlp_bias=False))
OLMO2 = but(
    LLAMA, names=QK_NORM | POST_NORMS | {"norm1": None, "norm2": None}, numbers=dict(vocab=50304, eps=1e-5),
    must=dict(mlp_bias=False), wide_qk_norm=True)  # Olmo2Attention: q_norm and k_norm over all heads together
PHI3 = but(
    LLAMA, names={"q": None, "k": None, "v": None, "q k v": "layers.{}.self_attn.qkv_proj",
                  "gate": None, "up": None, "gate up": "layers.{}.mlp.gate_up_proj"},
    numbers=dict(vocab=32064, context=4096, width=3072, inner=8192, eps=1e-5, window=None),
    keys=dict(fraction="partial_rotary_factor"), echo={}, must=UNBIASED,
    slides=lambda i, raw: True, also="original_max_position_embeddings")
GEMMA = but(
    LLAMA, numbers=dict(vocab=256000, context=8192, width=3072, layers=28, heads=16, kv_heads=16,
                        head_dim=256, inner=24576, act="gelu_pytorch_tanh", tied=True),
    must=dict(use_bidirectional_attention=False, mlp_bias=False),
    echo=dict(partial_rotary_factor="fraction", hidden_activation="act"),
    plus_one=True,     # GemmaRMSNorm multiplies by 1 + weight, in float32
    embed_scale=True,  # GemmaModel: embeddings times sqrt(width), a factor rounded to the activations' dtype
    act_means={"gelu": "gelu_pytorch_tanh"})  # early files say gelu, mean tanh: transformers #29402
GEMMA2 = but(
    GEMMA, names=POST_NORMS | {"norm2": "layers.{}.pre_feedforward_layernorm"},
    numbers=dict(width=2304, layers=26, heads=8, kv_heads=4, inner=9216, scale=256, attn_cap=50.0,
                 logit_cap=30.0, window=4096),
    keys=dict(act="hidden_activation"), echo=dict(partial_rotary_factor="fraction", hidden_act="act"),
    act_means={}, slides=lambda i, raw: i % 2 == 0, also="layer_types")
GEMMA3 = but(
    GEMMA2, names=QK_NORM, numbers=dict(vocab=262208, context=131072, logit_cap=None, base=1e6,
                                        local_base=1e4),  # blocks with a window turn at a base of their own
    slides=lambda i, raw: (i + 1) % (raw.get("sliding_window_pattern") or 6) > 0,
    also="layer_types sliding_window_pattern _sliding_window_pattern")
del GEMMA3["numbers"]["attn_cap"]  # Gemma3Attention takes no cap: a config that sets one is refused
GPT2 = dict(
    prefix="transformer.", buffers=r"h\.\d+\.attn\.(masked_)?bias", layer_norm=True, biased="q k v o up down",
    names={"embed": "wte", "pos": "wpe", "norm": "ln_f", "head": "lm_head", "norm1": "h.{}.ln_1",
           "q k v": "h.{}.attn.c_attn", "o": "h.{}.attn.c_proj", "norm2": "h.{}.ln_2", "up": "h.{}.mlp.c_fc",
           "down": "h.{}.mlp.c_proj"},
    numbers=dict(vocab=50257, context=1024, width=768, layers=12, heads=12, inner=None, act="gelu_new",
                 eps=1e-5, tied=True),
    keys=dict(width="n_embd hidden_size", layers="n_layer num_hidden_layers", inner="n_inner",
              heads="n_head num_attention_heads", context="n_positions max_position_embeddings",
              act="activation_function", eps="layer_norm_epsilon"),
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    transposed=True)  # Conv1D keeps its matrices (in, out)
GPT_NEO = but(
    GPT2, names={"q k v": None, "q": "h.{}.attn.attention.q_proj", "k": "h.{}.attn.attention.k_proj",
                 "v": "h.{}.attn.attention.v_proj", "o": "h.{}.attn.attention.out_proj"},
    buffers=r"h\.\d+\.attn\.attention\.(masked_)?bias", biased="o up down", transposed=False,
    numbers=dict(context=2048, width=2048, layers=24, heads=16, window=256),
    keys=dict(layers="num_layers num_hidden_layers", heads="num_heads num_attention_heads",
              act="activation_function", eps="layer_norm_epsilon", window="window_size"),
    kinds=lambda raw: raw.get("attention_layers") or [kind for kinds, times in raw.get(
        "attention_types", [[["global", "local"], 12]]) for kind in kinds * min(times, MOST_LAYERS)],
    also="attention_types attention_layers", must={},
    unscaled=True)  # GPTNeoSelfAttention never divides by sqrt(D)
QWEN = but(  # first generation: QWenAttention and QWenMLP in the repositories' own modeling_qwen.py
    GPT2, names={"pos": None, "gate": "h.{}.mlp.w2", "up": "h.{}.mlp.w1"},
    buffers=r"(h\.\d+\.attn\.)?rotary_emb\.inv_freq", biased="q k v", layer_norm=False, transposed=False,
    numbers=dict(vocab=151936, width=4096, layers=32, heads=32, head_dim=128, inner=22016, act="silu",
                 eps=1e-6, tied=False, context=8192, base=1e4, fraction=1.0),
    keys=dict(head_dim="kv_channels", eps="layer_norm_epsilon", base="rotary_emb_base", fraction="rotary_pct",
              act="",  # QWenMLP: silu, no key says so
              context="seq_length"),  # up to here logn attention and dynamic NTK are the identity: no more
    also="max_position_embeddings use_logn_attn use_dynamic_ntk use_flash_attn bf16 fp16 fp32 onnx_safe "
         "softmax_in_fp32",
    must=dict(no_bias=True, scale_attn_weights=True, use_cache_quantization=False, use_cache_kernel=False),
    halved=True)  # intermediate_size counts w1 and w2 together
GPT_NEOX = but(
    GPT2, prefix="gpt_neox.", buffers=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    names={"embed": "embed_in", "pos": None, "norm": "final_layer_norm", "head": "embed_out",
           "norm1": "layers.{}.input_layernorm", "q k v": "layers.{}.attention.query_key_value",
           "o": "layers.{}.attention.dense", "norm2": "layers.{}.post_attention_layernorm",
           "up": "layers.{}.mlp.dense_h_to_4h", "down": "layers.{}.mlp.dense_4h_to_h"},
    numbers=dict(vocab=50432, context=2048, width=6144, layers=44, heads=64, inner=24576, act="gelu",
                 tied=False, base=1e4, fraction=0.25, parallel=True, attention_bias=True),
    keys=dict(eps="layer_norm_eps", base="rotary_emb_base", fraction="rotary_pct"),
    echo=dict(rope_theta="base", partial_rotary_factor="fraction"),  # some versions of transformers add them
    biased="up down", must={}, transposed=False,
    per_head=True)  # GPTNeoXAttention views fused rows as (H, 3 D) before it splits: (H, 3, D), not (3, H, D)
OPT = but(
    GPT2, prefix="model.decoder.", buffers=r"(?!)",
    names={"embed": "embed_tokens", "pos": "embed_positions", "norm": "final_layer_norm",
           "norm1": "layers.{}.self_attn_layer_norm", "q k v": None, "q": "layers.{}.self_attn.q_proj",
           "k": "layers.{}.self_attn.k_proj", "v": "layers.{}.self_attn.v_proj",
           "o": "layers.{}.self_attn.out_proj", "norm2": "layers.{}.final_layer_norm", "up": "layers.{}.fc1",
           "down": "layers.{}.fc2"},
    numbers=dict(vocab=50272, context=2048, inner=3072, act="relu", attention_bias=True, mlp_bias=True),
    keys=dict(inner="ffn_dim", act="activation_function", attention_bias="enable_bias",
              mlp_bias="enable_bias", eps=""),  # OPTDecoderLayer: LayerNorm's own default
    biased="", also="word_embed_proj_dim", transposed=False,
    must=dict(do_layer_norm_before=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
    pos_offset=2)  # OPTLearnedPositionalEmbedding: two rows stand before that of position 0
FAMILIES = dict(gpt2=GPT2, gpt_neo=GPT_NEO, gpt_neox=GPT_NEOX, opt=OPT, llama=LLAMA, mistral=MISTRAL,
                qwen=QWEN, qwen2=QWEN2, qwen3=QWEN3, gemma=GEMMA, gemma2=GEMMA2, gemma3_text=GEMMA3,
                olmo2=OLMO2, phi3=PHI3)


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
        return Config(family=family, **resolve(raw, FAMILIES[family]))
    except LoadError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        raise LoadError(f"config.json: a value is missing or of the wrong type ({error})") from None


def resolve(raw: dict, row: dict) -> dict:
    """The fields of Config but the family."""
    n, known = dict(row["numbers"]), set(row.get("also", "").split())
    for field in n:
        keys = keys_of(row, field)
        given = {key: raw[key] for key in keys if key in raw and (raw[key] is not None or field != "act")}
        for key, value in given.items():
            check_value(key, value, field)
        if field == "act":
            given = {key: row.get("act_means", {}).get(value, value) for key, value in given.items()}
        if any(value != given[key] for key in given for value in given.values()):
            raise LoadError(f"config.json: {' and '.join(given)} disagree")
        n[field] = next(iter(given.values()), n[field])
        known |= set(keys)
    for key, field in row.get("echo", {}).items():
        if raw.get(key) not in (None, n[field]):
            raise LoadError(f"config.json: {key} = {raw[key]!r:.40} is not read by this family, where it is "
                            f"{n[field]!r}: make them agree")
        known.add(key)
    check_keys(raw, row, known)
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
    biased = row.get("biased", "") + " q k v o" * n.pop("attention_bias", False)
    n["biased"] = frozenset((biased + " gate up down" * n.pop("mlp_bias", False)).split())
    n["windows"] = windows(raw, row, n["layers"], n.pop("window", None))
    base, local, fraction = n.pop("base", None), n.pop("local_base", None), n.pop("fraction", None)
    n["rope"] = rotary(raw, row, "full_attention", base, fraction, n["head_dim"]) if base else None
    n["local_rope"] = n["rope"] if not local else rotary(raw, row, "sliding_attention", local, fraction,
                                                         n["head_dim"])
    return n


def check_value(key: str, value, field: str = "") -> None:
    """LoadError unless a value of config.json is of the type and size that its field can have."""
    if field == "act" or value is None and field in NULLABLE:
        return
    if field in LOGICAL:
        good, need = isinstance(value, bool), "true or false"
    elif field in WHOLE:
        most = MOST_LAYERS if field == "layers" else 2 ** 24
        good, need = type(value) is int and 0 < value <= most, f"a whole number from 1 to {most}"
    else:  # NaN compares false
        good, need = type(value) in (int, float) and 0 < value < 1e30, "a positive number"
    if not good:
        raise LoadError(f"config.json: {key} = {value!r:.40} is of the wrong type or out of range: {need} is "
                        "needed")


def check_keys(raw: dict, row: dict, known: set) -> None:
    known |= {"rope_scaling", "rope_parameters"} if "base" in row["numbers"] else set()
    for key, value in raw.items():
        if value is None or key not in row["must"] and (key in known or INERT_KEYS.fullmatch(key)):
            continue
        if key not in row["must"]:
            raise LoadError(f"config.json: unknown key {key!r} (= {value!r:.60}): it may change the model")
        if value != row["must"][key]:
            raise LoadError(f"config.json: {key} = {value!r} is not supported, only {row['must'][key]!r}")


def windows(raw: dict, row: dict, layers: int, width: int | None) -> tuple:
    """Per block its sliding window or None."""
    key, names = ("attention_types", ["global", "local"]) if "kinds" in row else (
        "layer_types", ["full_attention", "sliding_attention"])
    kinds = row["kinds"](raw) if "kinds" in row else raw.get(key) if key in row.get("also", "") else None
    if kinds and (not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - set(names)):
        raise LoadError(f"config.json: {key} must give {layers} x {' or '.join(names)}")
    on = raw.get("use_sliding_window", "use_sliding_window" not in row.get("also", ""))
    check_value("use_sliding_window", on, "use_sliding_window")
    if not width or not on:
        return (None,) * layers
    return tuple(width if (kinds[i] == names[1] if kinds else row["slides"](i, raw)) else None
                 for i in range(layers))


def rotary(raw: dict, row: dict, kind: str, base: float, fraction: float, head_dim: int) -> tuple:
    """(base, rotated channels, scaling), from rope_parameters as transformers 5 writes it or from
    rope_scaling, which is for the blocks without a window."""
    p = raw.get("rope_parameters") or {"full_attention": raw.get("rope_scaling")}
    by_kind = p.keys() & {"full_attention", "sliding_attention"}
    if raw.get("rope_scaling") and raw["rope_scaling"] not in (p, p.get("full_attention")):
        raise LoadError("config.json: rope_scaling and rope_parameters disagree")
    if "local_base" in row["numbers"] and not by_kind:
        raise LoadError("config.json: rope_parameters must have full_attention and sliding_attention")
    p = dict((p.get(kind) or {}) if by_kind else p)
    base = p.pop("rope_theta", base)
    if keys_of(row, "fraction"):
        fraction = p.pop("partial_rotary_factor", fraction)
    check_value("rope_theta", base)
    check_value("partial_rotary_factor", fraction)
    scaling, _ = p.pop("rope_type", p.get("type", "default")), p.pop("type", None)
    needs = {"default": [], "linear": ["factor"], "llama3": ["factor", "high_freq_factor", "low_freq_factor",
                                                             "original_max_position_embeddings"]}
    if scaling not in needs or sorted(p) != needs[scaling]:
        raise LoadError(f"config.json: RoPE scaling {scaling!r} with {sorted(p)} is not supported, only "
                        f"{needs}")
    for key, value in p.items():
        check_value(key, value)
    rotated = int(head_dim * fraction)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise LoadError(f"config.json: RoPE on {rotated} of {head_dim} channels of a head: it needs pairs")
    if p.get("low_freq_factor", 0) >= p.get("high_freq_factor", 1):
        raise LoadError("config.json: low_freq_factor must be below high_freq_factor")
    return float(base), rotated, tuple(sorted(p.items()))


def tensors(c: Config):
    """Yields (name in the file, canonical names, their shapes) for every tensor that this configuration must
    have."""
    row, q, k = FAMILIES[c.family], c.heads * c.head_dim, c.kv_heads * c.head_dim
    wide = row.get("wide_qk_norm")
    shapes = dict(embed=(c.vocab, c.width), pos=(c.context + row.get("pos_offset", 0), c.width),
                  head=(c.vocab, c.width), q=(q, c.width), k=(k, c.width), v=(k, c.width), o=(c.width, q),
                  gate=(c.inner, c.width), up=(c.inner, c.width), down=(c.width, c.inner),
                  q_norm=(q if wide else c.head_dim,), k_norm=(k if wide else c.head_dim,))
    for joined, template in row["names"].items():
        parts = joined.split()
        biased = parts[0] in c.biased or (row.get("layer_norm") and parts[0].startswith("norm"))
        for i in range(c.layers) if "{}" in template else [None]:
            for kind in ["weight", "bias"] if biased else [] if joined == "head" and c.tied else ["weight"]:
                sizes = [shapes.get(part, (c.width,)) for part in parts]
                yield (f"{template.format(i)}.{kind}",
                       [f"{part}.{kind}" if i is None else f"layers.{i}.{part}.{kind}" for part in parts],
                       sizes if kind == "weight" else [size[:1] for size in sizes])


# ---- checkpoints -------------------------------------------------------------------------------------------

WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
          "vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json"]


def load(source: str, *, device="cpu", dtype=torch.float32) -> "tuple[Transformer, Tokenizer]":
    """A directory in Hugging Face layout or a hub id (NAME or NAME@REVISION) -> (Transformer, Tokenizer);
    matrices in dtype, norms in float32. Prints one line. LoadError for everything a user can get wrong."""
    keep_freed_memory(2 ** 21, 2 ** 17)  # kept memory would get gaps: 1.5 times a model's size
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
    keep_freed_memory(2 ** 30, 2 ** 26)
    count = sum(p.numel() for p in params.values()) / 1e6
    print(f"{config.family}: {len(params)} tensors, {ignored} ignored, {'tied' if config.tied else 'own'} "
          f"head, {count:.1f}M parameters, {str(dtype).removeprefix('torch.')}")
    return model, tokenizer


def keep_freed_memory(most: int, block: int) -> None:
    """Tells glibc to hold up to `most` bytes of freed memory, of blocks below `block` bytes, for what comes
    next. Else they go back to the system after each step of finetuning, and it clears every page anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # and is not macOS
        mallopt(-1, most)  # M_TRIM_THRESHOLD
        mallopt(-3, block)  # M_MMAP_THRESHOLD


def check_device(device) -> None:
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


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError:
        raise LoadError(f"no {path.name} there; a directory in Hugging Face layout is needed") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path.name}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path.name}: not a JSON object")
    return value


def open_tensors(path: Path):
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


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened for each, so that the pages of its memory map are given back at once."""
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


def read_params(c: Config, files: dict[str, Path], device, dtype) -> tuple[dict[str, torch.Tensor], int]:
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
        x = read_tensor(*left.pop(source))
        x = x.t() if turned(row, source, x) else x
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if x.shape != whole:
            raise LoadError(f"tensor {source} has shape {tuple(x.shape)}, config.json implies {whole}")
        if row.get("per_head") and len(names) == 3:
            x = x.view(c.heads, 3, c.head_dim, *whole[1:]).transpose(0, 1).reshape(whole)
        for name, piece in zip(names, x.split([shape[0] for shape in shapes])):
            kind = torch.float32 if is_norm(name) else dtype
            params[name] = piece.to(device, kind, copy=True).contiguous()
            if kind == torch.float16 and not params[name].isfinite().all():
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


def is_norm(name: str) -> bool:
    """Norms are kept and computed in float32, whatever the dtype."""
    return "norm" in name or "post" in name


def turned(row: dict, source: str, x: torch.Tensor) -> bool:
    return row.get("transposed", False) and source.startswith("h.") and x.ndim == 2


def export(c: Config, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """read_params backwards: the family's own names and layout; a head of the language model's own is read
    but left out: a classifier has another."""
    row, out = FAMILIES[c.family], {}
    for source, names, _ in tensors(c):
        x = torch.cat([params[name] for name in names])
        if row.get("per_head") and len(names) == 3:
            x = x.view(3, c.heads, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        x = x - 1 if row.get("plus_one") and is_norm(names[0]) else x
        if names != ["head.weight"]:
            out[row["prefix"] + source] = (x.t() if turned(row, source, x) else x).contiguous().cpu()
    return out


# ---- the network -------------------------------------------------------------------------------------------

ALIKE = dict(cpu=1.0, cuda=0.8)  # see alike: CPUs pay for padding, GPUs for each call


class Batch:
    """How packed sequences attend: runs of neighbours of about equal length, each as (B, T), where shorter
    ones are padded on the right; plain causal attention needs no mask for that. tree: (P,) int64 or None, the
    branch each token is on, 0 = trunk: a token sees those before it in its sequence that are on the trunk or
    on its own branch, and its position counts them. kinds: the (window, explicit mask?) pairs needed. keep
    (B,) or None: the one token of each sequence that still looks in the last block."""

    def __init__(self, lengths: list[int], tree, kinds: set, keep, device):
        self.runs, slots, tokens, positions, start, size = [], [], [], [], 0, 0
        self.masks, self.kept = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
        for run in alike(lengths, ALIKE[device.type]):
            B, T, n = len(run), max(run), torch.tensor(run, device=device)[:, None]  # (B, 1)
            at, first = torch.arange(T, device=device), start + n.cumsum(0) - n  # (T,), (B, 1)
            real, slot = at < n, first + at.minimum(n - 1)  # (B, T); past its end its last token stands again
            sees = at[:, None] >= at  # (T, T)
            if tree is not None:
                branch = tree[slot][:, None]  # (B, 1, T)
                sees = sees & ((branch.mT == branch) | (branch == 0))  # (B, T, T)
                at = sees.sum(-1) - 1  # (B, T)
            for window, explicit in kinds:  # a window counts the token itself
                plain = tree is None and not explicit and (window is None or window >= T)
                near = sees if window is None else sees & (at[..., :, None] - at[..., None, :] < window)
                self.masks[window, explicit].append(None if plain else near.view(-1, 1, T, T))
                if keep is not None:
                    row = keep[:B] - first[:, 0]
                    near = near.expand(B, T, T)[torch.arange(B, device=device), row]
                    self.kept[window, explicit].append(near[:, None, None])  # (B, 1, 1, T)
            keep = None if keep is None else keep[B:]
            self.runs.append((B, T))
            slots.append(slot.flatten())
            tokens.append(size + real.flatten().nonzero()[:, 0])
            positions.append(at.expand(B, T)[real])
            start, size = start + sum(run), size + B * T
        self.sizes = [B * T for B, T in self.runs]
        self.slot, self.token = torch.cat(slots), torch.cat(tokens)  # (S,) token in a slot, (P,) its slot
        self.padded, self.position = start < size, torch.cat(positions)  # (P,)

    def attend(self, q, k, v, kind, scale, cap):
        """k and v (P, K, D), q (P, H, D) or of the kept tokens (B, H, D) -> (P or B, H * D). No mask: causal;
        a mask is True where a token may look."""
        out, all_look = [], len(q) == len(k)
        masks = self.masks[kind] if all_look else self.kept[kind]
        if self.padded:
            q = q.index_select(0, self.slot) if all_look else q
            k, v = k.index_select(0, self.slot), v.index_select(0, self.slot)  # (S, K, D)
        parts = q.split(self.sizes if all_look else [B for B, _ in self.runs])
        for (B, _), mask, *qkv in zip(self.runs, masks, parts, k.split(self.sizes), v.split(self.sizes)):
            q, k, v = (x.view(B, -1, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (B, H, T, D)
            if cap is None:
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
            else:
                scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))  # (B, H, T, T)
                y = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
            out.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        y = torch.cat(out)
        return y.index_select(0, self.token) if self.padded and all_look else y


def alike(lengths: list[int], least: float) -> list[list[int]]:
    """Lengths cut into runs of neighbours; the shortest of a run is at least that part of its longest."""
    out, low, high = [], 0, 0
    for n in lengths:
        low, high = min(low, n), max(high, n)
        if low < least * high or not out:
            out, low, high = out + [[]], n, n
        out[-1].append(n)
    return out


def rope_table(rope: tuple, position):
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


def rotate(x, cos, sin):
    """RoPE on the first R channels of every head; channels a = r and b = r + R / 2 are a pair, turned to
    a cos - b sin, b cos + a sin. x (P, H, D)"""
    R = cos.shape[-1]
    part = x[..., :R].float() if R < x.shape[-1] else x.float()
    turned = (part * cos).addcmul_(part.roll(R // 2, -1), sin).to(x.dtype)
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], -1)


def times(x, y):
    """x * y, in x's own memory where no gradient asks for x: new memory costs more than the product."""
    return x * y if x.requires_grad else x.mul_(y)


class Product(torch.autograd.Function):
    """F.linear for float32 on a CPU, x (P, C), weight (O, C) -> (P, O), as a convolution over single pixels:
    that asks oneDNN, 1.1 to 1.5 times as fast as MKL, which F.linear asks. MKL keeps the weight's gradient,
    where it is the faster one."""

    @staticmethod
    def pixels(x, weight, bias=None):
        image = x.contiguous().view(1, len(x), 1, -1).permute(0, 3, 1, 2)  # (1, C, P, 1), channels last
        return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).view(len(x), -1)

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return Product.pixels(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (Product.pixels(gradient, weight.t()) if wanted[0] else None,
                gradient.t() @ x if wanted[1] else None, gradient.sum(0) if wanted[2] else None)


class RMSNorm(torch.autograd.Function):
    """x (..., C) over its root mean square, times weight (C,). With its own gradient it takes half the passes
    over memory of F.rms_norm on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(size * size / len(weight) + eps)  # (..., 1)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight if any(ctx.needs_input_grad) else unit.mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        unit, scale, weight = ctx.saved_tensors
        along = gradient * unit
        inward = along @ weight[:, None] / len(weight)  # (..., 1): what scale takes back
        return ((gradient * weight).addcmul_(unit, inward, value=-1).mul_(scale),
                along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None)


class Transformer:
    """A checkpoint: config, params (canonical name -> tensor), device, dtype; from load also raw
    (config.json), folder, revision (the hub's commit; None for a directory). Nothing here changes params."""
    raw, folder, revision = None, None, None
    recompute = False  # activation checkpointing, block by block

    def __init__(self, config: Config, params: dict[str, torch.Tensor]):
        self.config, self.params = config, params
        self.device, self.dtype = params["embed.weight"].device, params["embed.weight"].dtype

    def norm(self, x, name):
        """LayerNorm where there is a bias, else RMSNorm, else (no such part) x; float32 inside."""
        weight, bias = self.params.get(name + ".weight"), self.params.get(name + ".bias")
        if weight is None:
            return x
        if bias is not None:
            return F.layer_norm(x.float(), weight.shape, weight, bias, self.config.eps).to(x.dtype)
        return RMSNorm.apply(x.float(), weight, self.config.eps).to(x.dtype)

    def linear(self, x, name):
        weight, bias = self.params[name + ".weight"], self.params.get(name + ".bias")
        onednn = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= ONEDNN_TOKENS
        y = Product.apply(x, weight, bias) if onednn else F.linear(x, weight, bias)
        if name + ".lora_a" in self.params:
            y = y + F.linear(F.linear(x, self.params[name + ".lora_a"]), self.params[name + ".lora_b"])
        return y

    def heads(self, x, name):
        """(P, H * D) -> (P, H, D), normed over what the gain of q_norm or k_norm spans: one head, or all
        together."""
        gain = self.params.get(name + ".weight")
        x = x if gain is None else self.norm(x.view(len(x), -1, len(gain)), name)
        return x.reshape(len(x), -1, self.config.head_dim)

    def attention(self, x, layer, batch, kind, table, keep):
        """(P, C) -> (P, H * D), or (B, H * D) of the kept tokens"""
        c = self.config
        looks = x if keep is None else x[keep]
        q = self.heads(self.linear(looks, layer + "q"), layer + "q_norm")  # (P or B, H, D)
        k = self.heads(self.linear(x, layer + "k"), layer + "k_norm")  # (P, K, D)
        v = self.linear(x, layer + "v").view(k.shape)  # (P, K, D)
        if table:
            q = rotate(q, *(table if keep is None else (t[keep] for t in table)))
            k = rotate(k, *table)
        if c.kv_heads < c.heads:  # a key/value head serves H / K neighbouring query heads
            k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        return batch.attend(q, k, v, kind, c.scale, c.attn_cap)

    def mlp(self, x, layer):
        act, up = ACTIVATIONS[self.config.act], self.linear(x, layer + "up")  # (P, I)
        gated = layer + "gate.weight" in self.params
        y = times(act(self.linear(x, layer + "gate")), up) if gated else act(up)
        return self.linear(y, layer + "down")

    def block(self, x, layer, batch, kind, table, keep):
        a = self.attention(self.norm(x, layer + "norm1"), layer, batch, kind, table, keep)
        x = x if keep is None else x[keep]  # nothing looks at the other tokens any more
        a = self.norm(self.linear(a, layer + "o"), layer + "post1")
        if self.config.parallel:
            return x + a + self.mlp(self.norm(x, layer + "norm2"), layer)
        x = x + a
        return x + self.norm(self.mlp(self.norm(x, layer + "norm2"), layer), layer + "post2")

    def packed(self, tokens, lengths: list[int], layers: Sequence[int | None] = (None,), tree=None,
               keep=None) -> list[torch.Tensor]:
        """tokens (P,) int64, sequences end to end -> one (P, C) per entry of layers: None = after the final
        norm, i = the residual stream after block i (0 = embeddings). keep (B,): index of the one token of
        each sequence whose state is wanted, instead of all P. tree: see Batch. ValueError for a sequence
        longer than the context."""
        c, row = self.config, FAMILIES[self.config.family]
        assert tokens.shape == (sum(lengths),) and min(lengths) > 0, "sequences end to end, none empty"
        kinds = [(window, c.attn_cap is not None) for window in c.windows]
        batch = Batch(lengths, tree, set(kinds), keep, tokens.device)
        if max(lengths) > c.context and int(batch.position.max()) >= c.context:
            raise ValueError(f"a sequence of {int(batch.position.max()) + 1} tokens is longer than the "
                             f"context of {c.context}")
        x = F.embedding(tokens, self.params["embed.weight"])  # (P, C)
        if row.get("embed_scale"):
            x = x * torch.tensor(c.width ** 0.5, dtype=x.dtype)
        if "pos.weight" in self.params:
            x = x + F.embedding(batch.position + row.get("pos_offset", 0), self.params["pos.weight"])
        tables = {rope: rope_table(rope, batch.position) for rope in {c.rope, c.local_rope} if rope}
        last = c.layers if None in layers else max(layers)
        states = {0: x if keep is None else x[keep]}
        for i in range(last):
            table = tables.get(c.rope if c.windows[i] is None else c.local_rope)
            inputs = x, f"layers.{i}.", batch, kinds[i], table, keep if i + 1 == last else None
            x = recompute(self.block, *inputs, use_reentrant=False) if self.recompute else self.block(*inputs)
            if i + 1 in layers:
                states[i + 1] = x if keep is None or i + 1 == last else x[keep]
        return [self.norm(x, "norm") if layer is None else states[layer] for layer in layers]

    def hidden(self, tokens, lengths, layer: int | None = None):
        """tokens (B, T) int64 right-padded, lengths (B,) -> (B, T, C); zeros past a length."""
        B, T = tokens.shape
        real = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)
        x = self.packed(tokens[real], lengths.tolist(), (layer,))[0]
        return x.new_zeros(B, T, x.shape[-1]).masked_scatter(real[..., None], x)

    def logits(self, hidden):
        """(..., C) after the final norm -> (..., V)"""
        y = F.linear(hidden, self.params.get("head.weight", self.params["embed.weight"]))
        cap = self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)


# ---- tokens ------------------------------------------------------------------------------------------------

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]


class Tokenizer:
    """Text <-> ids, from tokenizer.json, vocab.json + merges.txt, or qwen.tiktoken. size: highest id + 1."""

    def __init__(self, folder: Path, family: str):
        from tokenizers import Tokenizer as Backend
        self.folder = folder
        try:
            settings = read_settings(folder)
            qwen = family.startswith("qwen") or str(settings.get("tokenizer_class")).startswith("Qwen")
            if (folder / "tokenizer.json").is_file():
                self.backend = Backend.from_file(str(folder / "tokenizer.json"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                merges = [tuple(line.split(" ")) if line and line[:8] != "#version" else None
                          for line in (folder / "merges.txt").read_text("utf-8").split("\n")]
                if odd := [n for n, pair in enumerate(merges, 1) if pair and len(pair) != 2]:
                    raise LoadError(f"merges.txt:{odd[0]}: not two tokens with a space between them")
                merges = [pair for pair in merges if pair]
                self.backend = byte_level(read_json(folder / "vocab.json"), merges, qwen)
                add_special(self.backend, settings, qwen)
            elif (folder / "qwen.tiktoken").is_file():
                self.backend = byte_level(*from_ranks(folder / "qwen.tiktoken"), True)
                self.backend.add_special_tokens(QWEN_SPECIAL)
            else:
                raise LoadError("no tokenizer.json there, nor vocab.json with merges.txt, nor qwen.tiktoken")
            cut = self.backend.pre_tokenizer
            if settings.get("add_prefix_space") and cut and b'"add_prefix_space":false' in cut.__getstate__():
                raise LoadError("tokenizer_config.json asks for add_prefix_space, tokenizer.json does not")
            self.backend.no_padding()
            self.backend.no_truncation()  # GPT-2's own file says 50 tokens
            around = self.backend.encode("").ids  # what is put around a text need not be in the vocabulary
        except LoadError:
            raise
        except BaseException as error:
            raise damaged(error) from None
        self.size = max([*self.backend.get_vocab(with_added_tokens=True).values(), *around], default=-1) + 1

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """special=False: without the tokens put around a text (BOS), for a text that continues another."""
        try:
            ids = [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]
        except BaseException as error:
            raise LoadError(f"{self.folder}: {damaged(error)}") from None
        for text, tokens in zip(texts, ids):
            if text and not tokens:
                raise LoadError(f"{self.folder}: the tokenizer has no token for {text!r:.60}: it is of "
                                "another language or model")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))


def damaged(error: BaseException) -> LoadError:
    """What to raise for an error of the tokenizers package: it raises plain Exception, and panics of its Rust
    code, PanicException, are not even that."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    line = next(iter(str(error).splitlines()), "")
    return LoadError(f"the tokenizer's files are damaged ({line}); download them again")


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], qwen: bool):
    """A byte-level BPE over GPT-2's alphabet of visible bytes, with GPT-2's or Qwen's cut into words."""
    from tokenizers import Regex, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)
    backend.decoder = decoders.ByteLevel()
    if qwen:
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, backend.pre_tokenizer])
    return backend


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, with what older files tell beside it where it has no added_tokens_decoder."""
    read = {name: read_json(folder / name) if (folder / name).is_file() else {} for name in WANTED[-3:]}
    settings, special, added = read.values()
    if "added_tokens_decoder" not in settings:
        settings |= special | dict(added_tokens_decoder={
            place: dict(content=token, special=token in special.values()) for token, place in added.items()})
    return settings


def add_special(backend, settings: dict, qwen: bool) -> None:
    """Special tokens, BOS and EOS, with the defaults of transformers' GPT2Tokenizer and Qwen2Tokenizer."""
    from tokenizers import AddedToken, processors

    def made(token):
        return AddedToken(**{k: v for k, v in token.items() if k != "__type"})
    added = settings.get("added_tokens_decoder") or {}
    for place, token in sorted(added.items(), key=lambda item: int(item[0])):
        backend.add_tokens([made(token)])
        if backend.token_to_id(token["content"]) != int(place):
            raise LoadError(f"tokenizer_config.json gives {token['content']!r} the id {place}, vocab.json "
                            "another")
    default = dict.fromkeys(("eos_token", "unk_token", "pad_token" if qwen else "bos_token"), "<|endoftext|>")
    named = {key: settings.get(key, default.get(key)) for key in (
        "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    for token in filter(None, [*named.values(), *(more.values() if isinstance(more, dict) else more)]):
        backend.add_special_tokens([made(token) if isinstance(token, dict) else token])
    ends = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items()}
    bos = ends["bos_token"] if settings.get("add_bos_token") else None
    eos = ends["eos_token"] if settings.get("add_eos_token") else None
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=[*filter(None, (bos, "$A", eos))],
            special_tokens=[(token, backend.token_to_id(token)) for token in {bos, eos} - {None}])


def byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: a visible character for every byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def from_ranks(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """qwen.tiktoken (base64 token, rank) -> vocabulary and merges. There two neighbours merge when together
    they are a token, lowest rank first; so every split of a token into two tokens is a merge of that token's
    rank."""
    ranks, letter = {}, byte_letters()
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not token or token in ranks or int(rank) != len(ranks):
                raise ValueError
        except ValueError:
            raise LoadError(f"{path.name}:{n}: not a new token in base64 and the rank {len(ranks)}; download "
                            "it again") from None
        ranks[token] = len(ranks)
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise LoadError(f"{path.name}: byte {missing[0]} has no rank; download it again")
    text = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = [(text[token[:i]], text[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    return {text[token]: rank for token, rank in ranks.items()}, merges


# ---- reading -----------------------------------------------------------------------------------------------

# From here Product wins: oneDNN prepares half a millisecond for each new shape.
ONEDNN_TOKENS = 1024 if torch.backends.mkldnn.is_available() else math.inf
BATCH_TOKENS = 2048  # enough for a few CPU cores, few enough for their cache; a GPU wants more


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by falling length, cut so that a batch has at most budget tokens (or one sequence)."""
    out, room = [], -1
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < lengths[i]:
            out.append([])
            room = budget
        out[-1].append(i)
        room -= lengths[i]
    return out


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_batches(lengths: Sequence[int], budget: int, work: Callable[[list[int]], None]) -> None:
    """work(indices) for every batch; one that runs out of memory is halved."""
    todo = batches(lengths, budget)[::-1]
    while todo:
        rows = todo.pop()
        try:
            work(rows)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise TrainError(f"out of memory with one sequence of {lengths[rows[0]]} tokens: use a "
                                 "smaller model, or a device with more memory") from None
            todo += [rows[len(rows) // 2:], rows[:len(rows) // 2]]


def cut(tokenizer, prompts: list[str], completions: list[list[str]]):
    """Token ids of prompts (N) and completions (N x K), cut where prompt + completion stops being the prompt.

    The whole text is tokenised, then cut: a tokenizer may merge across the seam, and then the merged token
    counts to the completion, in all completions of that question alike."""
    alone = tokenizer.encode(prompts)
    whole = iter(tokenizer.encode([p + c for p, cs in zip(prompts, completions) for c in cs]))
    heads, tails = [], []
    for ids, cs in zip(alone, completions):
        texts = [next(whole) for _ in cs]
        n = min(map(len, texts)) - 1
        while any(text[:n] != ids[:n] for text in texts):
            n -= 1
        heads.append(texts[0][:n])
        tails.append([text[n:] for text in texts])
    return heads, tails


def pack(sequences: Sequence[list[int]], device) -> tuple[torch.Tensor, list[int]]:
    """Sequences end to end: tokens (P,) and their lengths."""
    return torch.tensor(list(itertools.chain(*sequences)), device=device), [len(s) for s in sequences]


@torch.no_grad()
def hidden_at(model: Transformer, sequences: list[list[int]], position="last", layer: int | None = None,
              batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
    """The state of one token of each sequence: its last, or token position[n] of sequence n. (N, C), input
    order."""
    at = [len(s) - 1 for s in sequences] if position == "last" else list(position)
    out = torch.empty(len(sequences), model.config.width, dtype=model.dtype, device=model.device)

    def work(rows):
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        starts = itertools.accumulate([0] + lengths[:-1])
        keep = torch.tensor([start + at[i] for start, i in zip(starts, rows)], device=model.device)
        out[rows] = model.packed(tokens, lengths, (layer,), keep=keep)[0]

    in_batches([len(s) for s in sequences], batch_tokens, work)
    return out


class Reading(NamedTuple):
    """What one pass over Q questions gives, in input order."""
    loglik: torch.Tensor         # (Q, O) float64, sum of log p(token | before); -inf: no such option
    option_tokens: torch.Tensor  # (Q, O) int64
    prompt: torch.Tensor         # (Q, n, C) state at the prompt's last token
    item: torch.Tensor           # (Q, n, C) state at the last token of option pick[q], or the prompt's for -1


@torch.no_grad()
def read(model: Transformer, prompts: list[list[int]], options: list[list[list[int]]], pick: list[int], *,
         layers: Sequence[int | None] = (None,), batch_tokens: int = BATCH_TOKENS) -> Reading:
    """One forward pass over every question with its options as branches of its prompt (see Batch): prompt +
    sum(options) tokens instead of a whole sequence per option. No prompt and no option is empty. [D1]"""
    Q, O, n, C = len(prompts), max(map(len, options), default=0), len(layers), model.config.width
    out = Reading(torch.full((Q, O), -torch.inf, dtype=torch.float64), torch.zeros(Q, O, dtype=torch.int64),
                  torch.empty(Q, n, C, dtype=model.dtype), torch.empty(Q, n, C, dtype=model.dtype))
    sequences = [list(itertools.chain(p, *o)) for p, o in zip(prompts, options)]

    def work(rows):
        tokens, lengths = pack([sequences[q] for q in rows], model.device)
        tree, ends, before, target, at = [], [], [], [], 0
        for q in rows:
            at += len(prompts[q])
            tree += [0] * len(prompts[q])
            ends.append([at - 1])  # of the prompt, then of each option
            for o, option in enumerate(options[q]):
                tree += [o + 1] * len(option)
                before += [ends[-1][0], *range(at, at + len(option) - 1)]
                target += range(at, at + len(option))
                at += len(option)
                ends[-1].append(at - 1)
        tree = torch.tensor(tree, device=model.device)
        final, *states = model.packed(tokens, lengths, (None, *layers), tree)
        scores = log_likelihood(model, final, before, tokens[target]).double().cpu()
        scores = iter(scores.split([len(option) for q in rows for option in options[q]]))
        for q, end in zip(rows, ends):
            for o, option in enumerate(options[q]):
                out.loglik[q, o], out.option_tokens[q, o] = next(scores).sum(), len(option)
            for j, x in enumerate(states):
                out.prompt[q, j], out.item[q, j] = x[end[0]], x[end[pick[q] + 1]]

    in_batches([len(s) for s in sequences], batch_tokens, work)
    return out


def log_likelihood(model: Transformer, x, before: list[int], target, cells: int = 2 ** 25) -> torch.Tensor:
    """log p(target[n] | everything up to token before[n]) in float32, (n,), from final states x (P, C). At
    most `cells` logits exist at a time, and each state gets its own once: the end of a prompt serves all
    options."""
    where, back = torch.unique(torch.tensor(before, device=x.device), return_inverse=True)
    out, step = torch.empty(len(before), device=x.device), max(1, cells // model.config.vocab)
    for a in range(0, len(where), step):
        logits = model.logits(x[where[a:a + step]]).float()  # (step, V)
        mine = (back >= a) & (back < a + step)
        row = back[mine] - a
        out[mine] = logits[row, target[mine]] - logits.logsumexp(-1)[row]
    return out


# ---- finetuning --------------------------------------------------------------------------------------------

TRAIN_TOKENS = 8192  # of a micro-batch
SAVE_SECONDS = 300.0  # between two saves of a resumable run


class Classifier:
    """A model, the tensors finetuning put in place of its own or beside them (LoRA), and the head
    classifier.weight (2, C) on the final state of the last token [D8]. Classifier(model, c.state()) is c
    again, bit for bit."""

    def __init__(self, model: Transformer, state: dict[str, torch.Tensor]):
        self._state = {name: x.to(model.device) for name, x in state.items()}
        self.model = Transformer(model.config, model.params | self._state)
        self.model.raw, self.model.folder = model.raw, model.folder

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors."""
        return self._state

    def predict(self, sequences: list[list[int]], batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """P(y = 1), (N,) float32, in input order."""
        x = hidden_at(self.model, sequences, batch_tokens=batch_tokens)
        return F.linear(x.float(), self._state["classifier.weight"]).softmax(-1)[:, 1].cpu()

    def save(self, folder: str) -> None:
        """Hugging Face layout, LoRA merged: loads as AutoModelForSequenceClassification where the family has
        one. FileExistsError for the pretrained model's own folder and for one with a sharded model."""
        if Path(folder).resolve() == self.model.folder.resolve() or any(Path(folder).glob("*.index.json")):
            raise FileExistsError(f"{folder}: holds another model")
        params = dict(self.model.params)
        for stem in [name.removesuffix(".lora_a") for name in params if name.endswith(".lora_a")]:
            delta = params[stem + ".lora_b"].float() @ params[stem + ".lora_a"].float()
            params[stem + ".weight"] = (params[stem + ".weight"].float() + delta).to(self.model.dtype)
        files = export(self.model.config, params) | {"score.weight": params["classifier.weight"].cpu()}
        stale = "architectures", "auto_map", "num_labels", "label2id", "torch_dtype"
        raw = {k: v for k, v in self.model.raw.items() if k not in stale}
        raw |= dict(id2label={"0": "no", "1": "yes"}, dtype=str(self.model.dtype).removeprefix("torch."))
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(files, Path(folder) / "model.safetensors", {"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(raw, indent=1))
        for name in WANTED[3:]:  # the tokenizer's files
            if (self.model.folder / name).is_file():
                shutil.copyfile(self.model.folder / name, Path(folder) / name)


def trainable(model: Transformer, tune: str, rank: int, head_init: str, generator, used) -> dict:
    """Name -> a tensor that Adam owns: float32 copies, whatever the model's dtype; of the embedding, only the
    rows used (U,)."""
    if tune not in ("full", "lora", "head") or head_init not in ("zero", "normal"):
        raise TrainError(f"tune = {tune!r}, head_init = {head_init!r}: must be full, lora or head, and zero "
                         "or normal")
    noise = torch.randn(2, model.config.width, generator=generator) / model.config.width ** 0.5
    out = {"classifier.weight": noise if head_init == "normal" else torch.zeros_like(noise)}
    for name, x in model.params.items():
        stem, _, kind = name.rpartition(".")
        if tune == "full" and name != "head.weight":  # the language model's own head takes no part
            out[name] = (x[used] if name == "embed.weight" else x).detach().to(torch.float32, copy=True)
        if tune == "lora" and kind == "weight" and re.search(r"\.(q|k|v|o|gate|up|down)$", stem):
            out[stem + ".lora_a"] = torch.randn(rank, x.shape[1], generator=generator) / x.shape[1] ** 0.5
            out[stem + ".lora_b"] = torch.zeros(x.shape[0], rank)  # Hu et al. 2021 (arXiv 2106.09685): B = 0
    return {name: x.to(model.device).requires_grad_() for name, x in out.items()}


def finetune(model: Transformer, sequences: list[list[int]], targets, *, lr: float, epochs: int = 2,
             batch: int = 32, seed: int, tune: str = "full", target_fn: Callable | None = None,
             batch_tokens: int = TRAIN_TOKENS, rank: int = 8, lora_alpha: float = 16.0,
             checkpoint: bool = False, progress: Callable | None = None, head_init: str = "zero",
             save=None) -> Classifier:
    """Soft-label cross-entropy against targets (N,) = P(y = 1): Adam, no weight decay, cosine to 0 over all
    steps, no warm-up, no dropout, a new order each epoch (Burns et al. 2023, appendix A). The model is not
    modified.

    target_fn(p, w, fraction) -> the targets of a step, from the student's own p (B,) on the whole batch, the
    given w (B,), and the fraction of steps done. Micro-batches hold at most batch_tokens tokens and halve
    when memory runs out; gradients are always the whole batch's. tune: full, lora (all linear maps) or head.
    checkpoint: recompute activations. progress(step, steps, loss) follows each step. save: a file with the
    state of the run, rewritten now and then; the same call goes on from it to the same bits, and whoever gave
    it removes it. TrainError for a loss that is not finite or a sequence that does not fit into memory."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(sequences), generator=generator).split(batch) for _ in range(epochs)]
    steps = [rows.tolist() for order in orders for rows in order]
    used = None
    if tune == "full":  # Adam would leave the other rows of the embedding alone: they never get a gradient
        used, ids = torch.unique(pack(sequences, model.device)[0], return_inverse=True)  # (U,), (all tokens,)
        sequences = [x.tolist() for x in ids.split([len(s) for s in sequences])]
    trained = trainable(model, tune, rank, head_init, generator, used)
    adam = torch.optim.Adam(trained.values(), lr=lr, betas=(0.9, 0.999), fused=True)
    features = hidden_at(model, sequences, batch_tokens=batch_tokens) if tune == "head" else None
    given = torch.as_tensor(targets, dtype=torch.float32, device=model.device)

    def logits(rows):  # (len(rows), 2) float32
        state = seen(model, trained, lora_alpha / rank)
        if features is not None:
            return F.linear(features[rows].float(), state["classifier.weight"])
        student = Transformer(model.config, model.params | state)
        student.recompute = checkpoint
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
        return F.linear(student.packed(tokens, lengths, keep=last)[0].float(), state["classifier.weight"])

    saved_at = time.monotonic()
    for step in range(resume(save, trained, adam), len(steps)):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        rows, loss = steps[step], None
        lengths = [len(sequences[i]) for i in rows]
        while loss is None:
            try:
                loss = gradients(logits, rows, lengths, given[rows], target_fn, step / len(steps),
                                 batch_tokens)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if batch_tokens < max(lengths):
                    raise TrainError(f"out of memory at step {step + 1} with one sequence of {max(lengths)} "
                                     "tokens: tune less (lora, head) or recompute activations") from None
                batch_tokens = min(batch_tokens, sum(lengths)) // 2
                adam.zero_grad()  # the step starts again from nothing
        if not math.isfinite(loss):
            if save and step:  # the weights are still those of the last good step
                suspend(save, trained, adam, step)
            raise TrainError(f"the loss is {loss} at step {step + 1} of {len(steps)} (learning rate {lr}): "
                             "lower it")
        adam.step()
        adam.zero_grad()
        if progress:
            progress(step + 1, len(steps), loss)
        if save and time.monotonic() - saved_at > SAVE_SECONDS:
            suspend(save, trained, adam, step + 1)
            saved_at = time.monotonic()
    final = {name: x.detach().clone() for name, x in seen(model, trained, lora_alpha / rank).items()}
    if tune == "full":
        final["embed.weight"] = model.params["embed.weight"].index_copy(0, used, final["embed.weight"])
    return Classifier(model, final)


def seen(model: Transformer, trained: dict, scale: float) -> dict[str, torch.Tensor]:
    """The trained tensors as the network sees them: in its own dtypes, LoRA's B times alpha / rank."""
    dtypes = {name: x.dtype for name, x in model.params.items()} | {"classifier.weight": torch.float32}
    return {name: (x * scale if name.endswith("lora_b") else x).to(dtypes.get(name, model.dtype))
            for name, x in trained.items()}


def gradients(logits: Callable, rows: list[int], lengths: list[int], w, target_fn, fraction: float,
              budget: int) -> float:
    """Adds the gradients of a batch's mean cross-entropy against w (B,), one backward per micro-batch; the
    loss."""
    micro, p, total = batches(lengths, budget), torch.empty_like(w), 0.0  # micro: indices into rows
    if target_fn and len(micro) > 1:  # the targets need p of the whole batch before any gradient
        with torch.no_grad():
            for part in micro:
                p[part] = logits([rows[j] for j in part]).softmax(-1)[:, 1]
        w = target_fn(p, w, fraction)
    for part in micro:
        z = logits([rows[j] for j in part])  # (len(part), 2)
        if target_fn and len(micro) == 1:
            p[part] = z.detach().softmax(-1)[:, 1]
            w = target_fn(p, w, fraction)
        loss = -(torch.stack([1 - w[part], w[part]], -1) * z.log_softmax(-1)).sum() / len(rows)
        loss.backward()
        total += loss.item()
    return total


def checksum(file: dict[str, torch.Tensor], step: str) -> str:
    """CRC-32 of the step and all tensors' bytes, in the order of the names."""
    crc = zlib.crc32(step.encode())
    for _, x in sorted(file.items()):
        crc = zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return str(crc)


def suspend(path, trained: dict, adam, step: int) -> None:
    """Where a run stands: weights, Adam's moments, steps done; order and learning rate follow from those."""
    file = {"w." + name: x.detach() for name, x in trained.items()}
    for name, x in trained.items():
        file |= {"m." + name: adam.state[x]["exp_avg"], "v." + name: adam.state[x]["exp_avg_sq"]}
    save_file(file, f"{path}.{os.getpid()}", {"step": str(step), "crc32": checksum(file, str(step))})
    os.replace(f"{path}.{os.getpid()}", path)


def resume(path, trained: dict, adam) -> int:
    """Steps done, with weights and Adam's moments put back; 0 without a whole file of these tensors."""
    if not path or not Path(path).is_file():
        return 0
    try:
        with open_tensors(Path(path)) as stored:
            meta, file = stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}
    except (LoadError, SafetensorError):
        return 0
    shapes = {f"{kind}.{name}": x.shape for kind in "wmv" for name, x in trained.items()}
    whole = checksum(file, meta.get("step", "")) == meta.get("crc32")
    if not whole or {name: x.shape for name, x in file.items()} != shapes:
        return 0
    for name, x in trained.items():
        with torch.no_grad():
            x.copy_(file["w." + name])
        adam.state[x] = {"step": torch.tensor(float(meta["step"]), device=x.device),
                         "exp_avg": file["m." + name].to(x.device),
                         "exp_avg_sq": file["v." + name].to(x.device)}
    return int(meta["step"])
