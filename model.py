"""The networks of the method: checkpoints, hidden states, option log-likelihoods, finetuning.

Selective weak-to-strong generalization (Lang, Huang, Li, arXiv 2511.14166) asks three things of a language model: a
classifier finetuned on soft labels (weak supervisor, student, ceiling), hidden states (P(IK), graph) and the
log-likelihood of each option (self-generated labels). All of them run through one plain function, Transformer.packed.

    symbol     here                shape    source
    P(y = 1)   Classifier.predict  (N,)     soft label, Burns et al. 2023 (arXiv 2312.09390), appendix A; head [D8]
    log p(a|q) Reading.loglik      (Q, O)   option scores, Kadavath et al. 2022 (arXiv 2207.05221); normalised later [D1]
    h(q)       Reading.prompt      (Q,n,C)  state at the end of the question: what P(IK) looks at
    h(q, a)    Reading.item        (Q,n,C)  state at the end of the item: the node of the graph

Shapes: B sequences, T tokens of one, P tokens of all, C width, H heads, K key/value heads, D head dimension, I inner width
of the MLP, V vocabulary, N items, Q questions, O options, n layers asked for.
Packed layout: the tokens of a batch lie end to end, (P, C), so nothing is ever computed for padding; attention looks at
runs of sequences of one length, (B, H, T, D), where plain causal attention needs no mask.
Parameters are a plain dict with one set of names for all families: embed pos norm head, and layers.{i}.{norm1 q k v q_norm
k_norm o post1 norm2 gate up down post2}, each .weight and perhaps .bias, matrices (out, in). FAMILIES gives the names in
the files, config.json the numbers; a part that a family lacks has no tensor, and the network passes it by.
"""
import base64
import itertools
import json
import math
import os
import re
import time
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


class TrainError(ValueError):
    """A finetuning run that cannot go on: one line saying at which step, and what to do."""


# ---- families -------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}

# A row says: names (parts -> tensor; several parts: one fused tensor, rows in that order), numbers (field -> config key and
# the default that transformers' configuration class has for it), bias (config key, its default, the parts that then have
# one), must (the only value we support), also (keys that are read elsewhere or cannot change the result here), ignore
# (tensors that are buffers). What neither file nor config shows is a literal, with what proves it beside it.
LLAMA = dict(
    prefix="model.",
    names={"embed": "embed_tokens", "norm": "norm", "head": "lm_head", "norm1": "layers.{}.input_layernorm",
           "q": "layers.{}.self_attn.q_proj", "k": "layers.{}.self_attn.k_proj", "v": "layers.{}.self_attn.v_proj",
           "o": "layers.{}.self_attn.o_proj", "norm2": "layers.{}.post_attention_layernorm",
           "gate": "layers.{}.mlp.gate_proj", "up": "layers.{}.mlp.up_proj", "down": "layers.{}.mlp.down_proj"},
    numbers=dict(vocab=("vocab_size", 32000), context=("max_position_embeddings", 2048), width=("hidden_size", 4096),
                 layers=("num_hidden_layers", 32), heads=("num_attention_heads", 32), head_dim=("head_dim", None),
                 kv_heads=("num_key_value_heads", None), inner=("intermediate_size", 11008), act=("hidden_act", "silu"),
                 eps=("rms_norm_eps", 1e-6), tied=("tie_word_embeddings", False)),
    base=("rope_theta", 1e4), fraction=("partial_rotary_factor", 1.0),
    bias=(("attention_bias", False, "q k v o"), ("mlp_bias", False, "gate up down")),
    must=dict(rope_interleaved=False), ignore=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)


def but(row: dict, names: dict = {}, numbers: dict = {}, **changes) -> dict:
    """A row with some entries changed; a part named None is taken out."""
    named = {parts: name for parts, name in (row["names"] | names).items() if name}
    return row | changes | dict(names=named, numbers=row["numbers"] | numbers)


MISTRAL = but(LLAMA, numbers=dict(context=("max_position_embeddings", 131072), kv_heads=("num_key_value_heads", 8),
                                  inner=("intermediate_size", 14336)),
                     window=("sliding_window", 4096), slides=lambda i, raw: True)
QWEN2 = but(
    LLAMA,
    numbers=dict(vocab=("vocab_size", 151936), context=("max_position_embeddings", 32768),
                 kv_heads=("num_key_value_heads", 32), inner=("intermediate_size", 22016)),
    bias=((None, True, "q k v"),),  # Qwen2Attention: bias=True for q, k, v, False for o; no key says so
    window=("sliding_window", 4096), slides=lambda i, raw: i >= raw.get("max_window_layers", 28),
    windowed=False,  # sliding_window: 32768 in Qwen2.5's files is inert, because use_sliding_window is false
    must=dict(use_mrope=False), also="max_window_layers")
QK_NORM = {"q_norm": "layers.{}.self_attn.q_norm", "k_norm": "layers.{}.self_attn.k_norm"}
QWEN3 = but(QWEN2, names=QK_NORM, numbers=dict(head_dim=("head_dim", 128)), bias=(("attention_bias", False, "q k v o"),))
POST_NORMS = {"post1": "layers.{}.post_attention_layernorm", "post2": "layers.{}.post_feedforward_layernorm"}
GEMMA = but(
    LLAMA,
    numbers=dict(vocab=("vocab_size", 256000), context=("max_position_embeddings", 8192), width=("hidden_size", 3072),
                 layers=("num_hidden_layers", 28), heads=("num_attention_heads", 16), head_dim=("head_dim", 256),
                 kv_heads=("num_key_value_heads", 16), inner=("intermediate_size", 24576),
                 act=("hidden_act", "gelu_pytorch_tanh"), tied=("tie_word_embeddings", True)),
    bias=(("attention_bias", False, "q k v o"),), must=dict(use_bidirectional_attention=False),
    also="hidden_activation cache_implementation",
    plus_one=True,      # GemmaRMSNorm multiplies by 1 + weight, in float32
    embed_scale=True,   # GemmaModel: embeddings times sqrt(width), that factor rounded to the activations' dtype
    act_means={"gelu": "gelu_pytorch_tanh"})  # the first files say gelu, the weights are tanh's: transformers #29402
GEMMA2 = but(
    GEMMA, names=POST_NORMS | {"norm2": "layers.{}.pre_feedforward_layernorm"},
    numbers=dict(
        width=("hidden_size", 2304), layers=("num_hidden_layers", 26), heads=("num_attention_heads", 8),
        kv_heads=("num_key_value_heads", 4), inner=("intermediate_size", 9216),
        act=("hidden_activation", "gelu_pytorch_tanh"), scale=("query_pre_attn_scalar", 256),
        attn_cap=("attn_logit_softcapping", 50.0), logit_cap=("final_logit_softcapping", 30.0)),
    also="hidden_act cache_implementation", act_means={},
    window=("sliding_window", 4096), slides=lambda i, raw: i % 2 == 0)
GEMMA3 = but(
    GEMMA2, names=QK_NORM, numbers=dict(
        vocab=("vocab_size", 262208), context=("max_position_embeddings", 131072),
        attn_cap=("attn_logit_softcapping", None), logit_cap=("final_logit_softcapping", None)),
    base=("rope_theta", 1e6), local_base=("rope_local_base_freq", 1e4),  # window layers turn at their own base
    slides=lambda i, raw: (i + 1) % raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6)) != 0,
    also="hidden_act cache_implementation sliding_window_pattern _sliding_window_pattern")
OLMO2 = but(LLAMA, names=QK_NORM | POST_NORMS | {"norm1": None, "norm2": None},  # norms behind the parts, none before
                   numbers=dict(vocab=("vocab_size", 50304), eps=("rms_norm_eps", 1e-5)),
                   bias=(("attention_bias", False, "q k v o"),),
                   wide_qk_norm=True)  # Olmo2Attention: one norm over all heads together
PHI3 = but(
    LLAMA,
    names={"q": None, "k": None, "v": None, "gate": None, "up": None, "q k v": "layers.{}.self_attn.qkv_proj",
           "gate up": "layers.{}.mlp.gate_up_proj"},
    numbers=dict(vocab=("vocab_size", 32064), context=("max_position_embeddings", 4096), width=("hidden_size", 3072),
                 inner=("intermediate_size", 8192), eps=("rms_norm_eps", 1e-5)),
    must=dict(attention_bias=False), also="original_max_position_embeddings",
    window=("sliding_window", None), slides=lambda i, raw: True)
GPT2 = dict(
    prefix="transformer.",
    names={"embed": "wte", "pos": "wpe", "norm": "ln_f", "head": "lm_head", "norm1": "h.{}.ln_1",
           "q k v": "h.{}.attn.c_attn", "o": "h.{}.attn.c_proj", "norm2": "h.{}.ln_2", "up": "h.{}.mlp.c_fc",
           "down": "h.{}.mlp.c_proj"},
    numbers=dict(vocab=("vocab_size", 50257), context=("n_positions", 1024), width=("n_embd", 768),
                 layers=("n_layer", 12), heads=("n_head", 12), inner=("n_inner", None),
                 act=("activation_function", "gelu_new"), eps=("layer_norm_epsilon", 1e-5),
                 tied=("tie_word_embeddings", True)),
    layer_norm=True, bias=((None, True, "q k v o up down"),),
    transposed=True,  # Conv1D keeps its matrices (in, out)
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    also="n_ctx reorder_and_upcast_attn", ignore=r"h\.\d+\.attn\.(masked_)?bias",
)
QWEN = but(  # first generation: QWenAttention and QWenMLP of the repositories' own modeling_qwen.py
    GPT2, names={"pos": None, "gate": "h.{}.mlp.w2", "up": "h.{}.mlp.w1"},
    numbers=dict(vocab=("vocab_size", 151936), context=("seq_length", 8192), width=("hidden_size", 4096),
                 layers=("num_hidden_layers", 32), heads=("num_attention_heads", 32), head_dim=("kv_channels", 128),
                 inner=("intermediate_size", 22016), act=(None, "silu"), eps=("layer_norm_epsilon", 1e-6),
                 tied=("tie_word_embeddings", False)),
    base=("rotary_emb_base", 1e4), fraction=("rotary_pct", 1.0), bias=((None, True, "q k v"),),
    layer_norm=False, transposed=False,
    halved=True,  # intermediate_size counts w1 and w2 together
    # logn attention and dynamic NTK change nothing up to seq_length tokens, and we take no more
    also="use_logn_attn use_dynamic_ntk max_position_embeddings use_flash_attn bf16 fp16 fp32 onnx_safe softmax_in_fp32",
    must=dict(no_bias=True, scale_attn_weights=True, use_cache_quantization=False, use_cache_kernel=False),
    ignore=r"(h\.\d+\.attn\.)?rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias",
)
GPT_NEO = but(
    GPT2, names={
        "q k v": None, "q": "h.{}.attn.attention.q_proj", "k": "h.{}.attn.attention.k_proj", "v": "h.{}.attn.attention.v_proj",
        "o": "h.{}.attn.attention.out_proj"},
    numbers=dict(context=("max_position_embeddings", 2048), width=("hidden_size", 2048), layers=("num_layers", 24),
                 heads=("num_heads", 16), inner=("intermediate_size", None)),
    bias=((None, True, "o up down"),), transposed=False, must={}, also="attention_types attention_layers",
    unscaled=True,  # GPTNeoSelfAttention never divides by sqrt(D)
    window=("window_size", 256), slides=lambda i, raw: (raw.get("attention_layers") or [
        kind for kinds, n in raw.get("attention_types", [[["global", "local"], 12]]) for kind in kinds * n])[i] == "local",
    ignore=r"h\.\d+\.attn\.attention\.(masked_)?bias",
)
GPT_NEOX = dict(
    prefix="gpt_neox.",
    names={"embed": "embed_in", "norm": "final_layer_norm", "head": "embed_out", "norm1": "layers.{}.input_layernorm",
           "q k v": "layers.{}.attention.query_key_value", "o": "layers.{}.attention.dense",
           "norm2": "layers.{}.post_attention_layernorm", "up": "layers.{}.mlp.dense_h_to_4h",
           "down": "layers.{}.mlp.dense_4h_to_h"},
    numbers=dict(vocab=("vocab_size", 50432), context=("max_position_embeddings", 2048), width=("hidden_size", 6144),
                 layers=("num_hidden_layers", 44), heads=("num_attention_heads", 64), inner=("intermediate_size", 24576),
                 act=("hidden_act", "gelu"), eps=("layer_norm_eps", 1e-5), tied=("tie_word_embeddings", False),
                 parallel=("use_parallel_residual", True)),
    base=("rotary_emb_base", 1e4), fraction=("rotary_pct", 0.25), layer_norm=True,
    bias=(("attention_bias", True, "q k v o"), (None, True, "up down")),
    must={},
    per_head=True,  # fused rows are (H, 3, D), not (3, H, D): GPTNeoXAttention views (.., H, 3 D) before it splits
    ignore=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
OPT = dict(
    prefix="model.decoder.",
    names={"embed": "embed_tokens", "pos": "embed_positions", "norm": "final_layer_norm", "head": "lm_head",
           "norm1": "layers.{}.self_attn_layer_norm", "q": "layers.{}.self_attn.q_proj",
           "k": "layers.{}.self_attn.k_proj", "v": "layers.{}.self_attn.v_proj", "o": "layers.{}.self_attn.out_proj",
           "norm2": "layers.{}.final_layer_norm", "up": "layers.{}.fc1", "down": "layers.{}.fc2"},
    numbers=dict(vocab=("vocab_size", 50272), context=("max_position_embeddings", 2048), width=("hidden_size", 768),
                 layers=("num_hidden_layers", 12), heads=("num_attention_heads", 12), inner=("ffn_dim", 3072),
                 act=("activation_function", "relu"), eps=(None, 1e-5), tied=("tie_word_embeddings", True)),
    layer_norm=True, bias=(("enable_bias", True, "q k v o up down"),),
    pos_offset=2,  # OPTLearnedPositionalEmbedding: two rows before that of position 0
    must=dict(do_layer_norm_before=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
    also="word_embed_proj_dim init_std prefix", ignore=r"(?!)",
)
FAMILIES = {"gpt2": GPT2, "gpt_neo": GPT_NEO, "gpt_neox": GPT_NEOX, "opt": OPT, "llama": LLAMA, "mistral": MISTRAL,
            "qwen": QWEN, "qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3,
            "olmo2": OLMO2, "phi3": PHI3}
# config.json keys that change nothing in a forward pass without dropout
IGNORED_KEYS = re.compile(
    r"model_type|architectures|auto_map|transformers_version|_name_or_path|torch_dtype|dtype|use_cache|is_decoder"
    r"|.*(dropout|_pdrop|layerdrop)(_prob)?|initializer_range|(bos|eos|pad|unk|sep)_token_id|summary_.*|id2label|label2id"
    r"|_?num_labels|task_specific_params|n_special|predict_special_tokens|output_.*|pretraining_tp|is_llama_config"
    r"|gradient_checkpointing|chunk_size_feed_forward|is_encoder_decoder|return_dict|problem_type|tokenizer_class")


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
    tied: bool                       # the head is the embedding
    biased: frozenset                # the linear parts that have a bias
    windows: tuple                   # per block: tokens a token sees, itself included; None: all before it
    scale: float                     # of the attention scores
    rope: tuple | None               # (base, rotated channels, scaling items); None: learned positions
    local_rope: tuple | None         # the same for the blocks with a window
    parallel: bool = False           # attention and MLP read the same residual stream
    attn_cap: float | None = None    # cap * tanh(scores / cap)
    logit_cap: float | None = None


def configure(raw: dict) -> Config:
    """config.json -> Config. LoadError for an unknown family, an unknown non-null key, a value we do not support."""
    family = raw.get("model_type")
    if raw.get("quantization_config"):
        raise LoadError("config.json: quantization_config: quantised checkpoints are refused, use the full-precision one")
    if family not in FAMILIES:
        raise LoadError(f"config.json: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    row = FAMILIES[family]
    check_keys(raw, row, family)
    n = {field: raw.get(key, default) for field, (key, default) in row["numbers"].items()}
    n["act"] = row.get("act_means", {}).get(n["act"], n["act"])
    if n["act"] not in ACTIVATIONS:
        raise LoadError(f"config.json: activation {n['act']!r} is not supported, only {', '.join(ACTIVATIONS)}")
    n["kv_heads"] = n.get("kv_heads") or n["heads"]
    n["head_dim"] = n.get("head_dim") or n["width"] // n["heads"]
    n["inner"] = (n["inner"] or 4 * n["width"]) // (2 if row.get("halved") else 1)
    n["scale"] = 1.0 if row.get("unscaled") else n.get("scale", n["head_dim"]) ** -0.5
    n["rope"] = rotary(raw, row, "base", n["head_dim"])
    n["local_rope"] = rotary(raw, row, "local_base", n["head_dim"]) or n["rope"]
    biased = " ".join(parts for key, default, parts in row["bias"] if raw.get(key, default))
    try:
        return Config(family=family, biased=frozenset(biased.split()), windows=windows(raw, row, n["layers"]), **n)
    except (TypeError, IndexError, ZeroDivisionError) as error:
        raise LoadError(f"config.json: a number is missing or of the wrong type ({error})") from None


def check_keys(raw: dict, row: dict, family: str) -> None:
    known = {key for key, _ in row["numbers"].values()} | {key for key, _, _ in row["bias"]} | set(row.get("also", "").split())
    known |= {row[key][0] for key in ("base", "local_base", "fraction") if key in row}
    known |= {"rope_scaling", "rope_parameters"} if "base" in row else set()
    known |= {row["window"][0], "layer_types", "use_sliding_window"} if "window" in row else set()
    for key, value in raw.items():
        if value is None or key in known or IGNORED_KEYS.fullmatch(key):
            continue
        if key not in row["must"]:
            raise LoadError(f"config.json: unknown key {key!r} (= {value!r:.60}) for {family}: it may change the model")
        if value != row["must"][key]:
            raise LoadError(f"config.json: {key} = {value!r} is not supported, only {row['must'][key]!r}")


def windows(raw: dict, row: dict, layers: int) -> tuple:
    """Per block its sliding window or None."""
    width = raw.get(*row["window"]) if raw.get("use_sliding_window", row.get("windowed", True)) and "window" in row else None
    kinds = raw.get("layer_types")
    if kinds and (len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}):
        raise LoadError(f"config.json: layer_types must say full_attention or sliding_attention for each of {layers} layers")
    return tuple(width if width and (kinds[i] == "sliding_attention" if kinds else row["slides"](i, raw)) else None
                 for i in range(layers))


def rotary(raw: dict, row: dict, which: str, head_dim: int) -> tuple | None:
    """(base, rotated channels, scaling), from rope_parameters as transformers 5 writes it or from rope_theta and
    rope_scaling; a scaling is for the blocks without a window."""
    if which not in row:
        return None
    p = raw.get("rope_parameters") or {"full_attention": raw.get("rope_scaling") or {}}
    kind = "full_attention" if which == "base" else "sliding_attention"
    p = dict(p.get(kind) or {} if {"full_attention", "sliding_attention"} & set(p) else p)
    base = p.pop("rope_theta", raw.get(*row[which]))
    fraction = p.pop("partial_rotary_factor", raw.get(*row["fraction"]))
    scaling = p.pop("rope_type", p.pop("type", "default"))
    p.pop("type", None)
    needs = {"default": [], "linear": ["factor"],
             "llama3": ["factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"]}
    if scaling not in needs or sorted(p) != needs[scaling]:
        raise LoadError(f"config.json: RoPE scaling {scaling!r} with {sorted(p)} is not supported, only {needs}")
    return float(base), int(head_dim * fraction), tuple(sorted(p.items()))


def tensors(c: Config):
    """Yields (name in the file, canonical names, their shapes) for every tensor this configuration must have."""
    row, q, k = FAMILIES[c.family], c.heads * c.head_dim, c.kv_heads * c.head_dim
    wide = row.get("wide_qk_norm")
    shapes = {"embed": (c.vocab, c.width), "pos": (c.context + row.get("pos_offset", 0), c.width), "head": (c.vocab, c.width),
              "q": (q, c.width), "k": (k, c.width), "v": (k, c.width), "o": (c.width, q),
              "gate": (c.inner, c.width), "up": (c.inner, c.width), "down": (c.width, c.inner),
              "q_norm": (q if wide else c.head_dim,), "k_norm": (k if wide else c.head_dim,)}
    for parts, template in row["names"].items():
        parts = parts.split()
        biased = parts[0] in c.biased or (row.get("layer_norm") and parts[0].startswith("norm"))
        for i in range(c.layers) if "{}" in template else [None]:
            for kind in ("weight", "bias") if biased else ("weight",):
                part_shapes = [shapes.get(part, (c.width,)) for part in parts]
                if not (parts == ["head"] and c.tied):
                    yield (f"{template.format(i)}.{kind}",
                           [f"{part}.{kind}" if i is None else f"layers.{i}.{part}.{kind}" for part in parts],
                           part_shapes if kind == "weight" else [shape[:1] for shape in part_shapes])


# ---- checkpoints ----------------------------------------------------------------------------------------------------

WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
          "vocab.json", "merges.txt", "qwen.tiktoken"]


def load(source: str, *, device="cpu", dtype=torch.float32) -> "tuple[Transformer, Tokenizer]":
    """A directory in Hugging Face layout or a hub id (NAME or NAME@REVISION) -> (Transformer, Tokenizer); matrices in
    `dtype`, norms in float32. Prints one line. LoadError for everything a user can get wrong."""
    folder = find(str(source))
    try:
        raw = read_json(folder / "config.json")
        config = configure(raw)
        params, ignored = read_params(config, tensor_files(folder), device, dtype)
        tokenizer = Tokenizer(folder, config.family)
        if tokenizer.size > config.vocab:
            raise LoadError(f"the tokenizer has {tokenizer.size} ids, the embedding {config.vocab} rows: they do not belong "
                            "together")
    except LoadError as error:
        raise LoadError(f"{source}: {error}") from None
    model = Transformer(config, params)
    model.raw, model.revision = raw, folder.name if not Path(source).is_dir() else None
    print(f"{config.family}: {len(params)} tensors, {ignored} ignored, {'tied' if config.tied else 'own'} head, "
          f"{sum(p.numel() for p in params.values()) / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}")
    return model, tokenizer


def find(source: str) -> Path:
    """The directory itself, or the hub's snapshot of a repository in the local cache, downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?", source) or source[0] == ".":
        raise LoadError(f"{source}: no such directory")
    from huggingface_hub import snapshot_download
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except Exception as error:  # its errors come from three libraries and share no base class
        line = next(iter(str(error).strip().splitlines()), "")
        raise LoadError(f"{source}: no such directory, and not to be had from the hub: {type(error).__name__}: {line}") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError:
        raise LoadError(f"no {path.name} there; a directory in Hugging Face layout is needed") from None
    except ValueError as error:
        raise LoadError(f"{path.name}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path.name}: not a JSON object")
    return value


def open_tensors(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
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
        raise LoadError("no model.safetensors there (pickle checkpoints are refused: convert them to safetensors)")
    found = {}
    for path in files:
        with open_tensors(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    if mapped is not None and {name: path.name for name, path in found.items()} != mapped:
        odd = sorted(set(mapped) ^ set(found)) or ["the same names in other files"]
        raise LoadError(f"{index.name} and its files disagree, first on {odd[0]}")
    return found


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened for each, so that the pages of its memory map can go again."""
    with open_tensors(path) as file:
        x = file.get_tensor(name)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise LoadError(f"tensor {name} is {x.dtype}: quantised checkpoints are refused, use the full-precision one")
    if not math.isfinite(x.sum(dtype=torch.float64)):
        raise LoadError(f"tensor {name} holds NaN or infinity: {path.name} is damaged, download it again")
    return x


def read_params(c: Config, files: dict[str, Path], device, dtype) -> tuple[dict[str, torch.Tensor], int]:
    """All parameters under canonical names, and how many tensors were ignored. Every tensor of the files is consumed
    once or matches the family's ignore pattern, every expected one is there with its shape."""
    row, params = FAMILIES[c.family], {}
    left = {name.removeprefix(row["prefix"]): (path, name) for name, path in files.items()}
    if len(left) != len(files):
        raise LoadError(f"some tensors are there both with and without the prefix {row['prefix']!r}")
    ignored = [left.pop(name) for name in list(left) if re.fullmatch(row["ignore"], name)]
    for source, names, shapes in tensors(c):
        if source not in left:
            raise LoadError(f"tensor {source} is missing")
        x = read_tensor(*left.pop(source))
        if row.get("transposed") and source.startswith("h.") and x.ndim == 2:
            x = x.t()
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if x.shape != whole:
            raise LoadError(f"tensor {source} has shape {tuple(x.shape)}, config.json implies {whole}")
        if row.get("per_head") and len(names) == 3:
            x = x.view(c.heads, 3, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(whole)
        for name, piece in zip(names, x.split([shape[0] for shape in shapes])):
            is_norm = "norm" in name or "post" in name  # kept and computed in float32
            piece = piece.to(device, torch.float32 if is_norm else dtype, copy=True).contiguous()
            params[name] = piece + 1 if is_norm and row.get("plus_one") else piece
    head = row["names"]["head"] + ".weight"
    if c.tied and head in left and not torch.equal(read_tensor(*left.pop(head)).to(device, dtype), params["embed.weight"]):
        raise LoadError(f"config.json ties the head to the embedding, but {head} differs from it; set tie_word_embeddings")
    if left:
        raise LoadError(f"{len(left)} unexpected tensors, the first is {next(iter(left))}")
    return params, len(ignored)


def export(c: Config, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical parameters -> the family's own names and layout: read_params backwards, without the head."""
    row, out = FAMILIES[c.family], {}
    for source, names, _ in tensors(c):
        if names == ["head.weight"]:
            continue
        x = torch.cat([params[name] for name in names])
        if row.get("per_head") and len(names) == 3:
            x = x.view(3, c.heads, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        if row.get("plus_one") and ("norm" in names[0] or "post" in names[0]):
            x = x - 1
        turned = row.get("transposed") and source.startswith("h.") and x.ndim == 2
        out[row["prefix"] + source] = (x.t() if turned else x).contiguous().cpu()
    return out


# ---- the network ----------------------------------------------------------------------------------------------------

class Batch:
    """How the packed tokens of some sequences attend to each other.

    tree: (P,) int64 or None, the branch each token is on, 0 = trunk. A token sees the tokens before it in its sequence that
    are on the trunk or on its own branch, and its position counts those. Neighbours of equal length form a run."""

    def __init__(self, lengths: list[int], tree, kinds: set, device):
        self.runs = [(len(list(same)), T) for T, same in itertools.groupby(lengths)]
        self.sizes = [B * T for B, T in self.runs]
        positions, self.masks = [], {kind: [] for kind in kinds}
        for (B, T), branch in zip(self.runs, tree.split(self.sizes) if tree is not None else itertools.repeat(None)):
            at = torch.arange(T, device=device)  # (T,)
            sees = at[:, None] >= at  # (T, T)
            if branch is not None:
                branch = branch.view(B, 1, T)
                sees = sees & ((branch.mT == branch) | (branch == 0))  # (B, T, T)
                at = sees.sum(-1) - 1  # (B, T)
            positions.append(at.expand(B, T).reshape(-1))
            for window, explicit in kinds:
                plain = branch is None and not explicit and (window is None or window >= T)
                near = sees if window is None else sees & (at[..., :, None] - at[..., None, :] < window)
                self.masks[window, explicit].append(None if plain else near.view(-1, 1, T, T))
        self.position = torch.cat(positions)  # (P,)

    def attend(self, q, k, v, kind, scale, cap):
        """q (P, H, D), k and v (P, K, D) -> (P, H * D). No mask means causal; a mask holds True where a token may look."""
        out = []
        for (B, T), mask, *qkv in zip(self.runs, self.masks[kind], *(x.split(self.sizes) for x in (q, k, v))):
            q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (B, H, T, D)
            if cap is None:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
            else:
                scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))  # (B, H, T, T)
                y = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
            out.append(y.transpose(1, 2).reshape(B * T, -1))
        return torch.cat(out)


def rope_table(rope: tuple, position):
    """cos and sin, each (P, 1, R / 2) float32, for R rotated channels."""
    base, rotated, scaling = rope[0], rope[1], dict(rope[2])
    frequency = 1.0 / base ** (torch.arange(0, rotated, 2, device=position.device).float() / rotated)  # (R / 2,)
    if "low_freq_factor" in scaling:  # llama3: slow turns are slowed further, fast ones kept, between them a blend
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    elif scaling:
        frequency = frequency / scaling["factor"]
    angle = position.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE on the first R channels of every head; channel r and channel r + R / 2 are a pair. x (P, H, D)"""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half:2 * half].float(), x[..., 2 * half:]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


class Transformer:
    """A checkpoint: config, params (canonical name -> tensor), device, dtype; from load also raw (config.json) and revision
    (the hub's commit, None for a directory). Nothing here changes params."""
    raw, revision, recompute = None, None, False  # recompute: activation checkpointing, block by block

    def __init__(self, config: Config, params: dict[str, torch.Tensor]):
        self.config, self.params = config, params
        self.device, self.dtype = params["embed.weight"].device, params["embed.weight"].dtype

    def norm(self, x, name):
        """LayerNorm where there is a bias, else RMSNorm, else (no such part) x. Over the last axis, float32 inside."""
        weight, bias = self.params.get(name + ".weight"), self.params.get(name + ".bias")
        if weight is None:
            return x
        if bias is None:
            return F.rms_norm(x.float(), weight.shape, weight, self.config.eps).to(x.dtype)
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.config.eps).to(x.dtype)

    def linear(self, x, name):
        y = F.linear(x, self.params[name + ".weight"], self.params.get(name + ".bias"))
        if name + ".lora_a" in self.params:
            y = y + F.linear(F.linear(x, self.params[name + ".lora_a"]), self.params[name + ".lora_b"])
        return y

    def heads(self, x, name):
        """(P, H * D) -> (P, H, D), normed over what the gain of q_norm or k_norm spans: one head or all together."""
        gain = self.params.get(name + ".weight")
        x = x if gain is None else self.norm(x.view(len(x), -1, len(gain)), name)
        return x.reshape(len(x), -1, self.config.head_dim)

    def attention(self, x, layer, batch, kind, table):
        c = self.config
        q = self.heads(self.linear(x, layer + "q"), layer + "q_norm")  # (P, H, D)
        k = self.heads(self.linear(x, layer + "k"), layer + "k_norm")  # (P, K, D)
        v = self.heads(self.linear(x, layer + "v"), layer + "v_norm")
        if table:
            q, k = rotate(q, *table), rotate(k, *table)
        if c.kv_heads < c.heads:  # a key/value head serves H / K neighbouring query heads
            k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        return self.linear(batch.attend(q, k, v, kind, c.scale, c.attn_cap), layer + "o")

    def mlp(self, x, layer):
        act, up = ACTIVATIONS[self.config.act], self.linear(x, layer + "up")  # (P, I)
        gated = layer + "gate.weight" in self.params
        return self.linear(act(self.linear(x, layer + "gate")) * up if gated else act(up), layer + "down")

    def block(self, x, layer, batch, kind, table):
        a = self.attention(self.norm(x, layer + "norm1"), layer, batch, kind, table)
        if self.config.parallel:
            return x + a + self.mlp(self.norm(x, layer + "norm2"), layer)
        x = x + self.norm(a, layer + "post1")
        return x + self.norm(self.mlp(self.norm(x, layer + "norm2"), layer), layer + "post2")

    def packed(self, tokens, lengths: list[int], layers: Sequence[int | None] = (None,), tree=None) -> list[torch.Tensor]:
        """tokens (P,) int64, sequences end to end -> one (P, C) per entry of layers: None = after the final norm, i = the
        residual stream after block i (0 = embeddings). tree: see Batch. ValueError for a sequence beyond the context."""
        c, p = self.config, self.params
        assert tokens.shape == (sum(lengths),) and min(lengths) > 0, "tokens must be the sequences end to end, none empty"
        kinds = [(window, c.attn_cap is not None) for window in c.windows]
        batch = Batch(lengths, tree, set(kinds), tokens.device)
        if max(lengths) > c.context and int(batch.position.max()) >= c.context:
            raise ValueError(f"a sequence of {int(batch.position.max()) + 1} tokens is longer than the context of {c.context}")
        x = F.embedding(tokens, p["embed.weight"])  # (P, C)
        if FAMILIES[c.family].get("embed_scale"):
            x = x * torch.tensor(c.width ** 0.5, dtype=x.dtype)
        if "pos.weight" in p:
            x = x + F.embedding(batch.position + FAMILIES[c.family].get("pos_offset", 0), p["pos.weight"])
        tables = {rope: rope_table(rope, batch.position) for rope in {c.rope, c.local_rope} if rope}
        states = [x]
        for i in range(c.layers if None in layers else max(layers)):
            table = tables.get(c.rope if c.windows[i] is None else c.local_rope)
            inputs = x, f"layers.{i}.", batch, kinds[i], table
            x = recompute(self.block, *inputs, use_reentrant=False) if self.recompute else self.block(*inputs)
            states.append(x if i + 1 in layers else None)
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
        return y if self.config.logit_cap is None else self.config.logit_cap * torch.tanh(y / self.config.logit_cap)


# ---- tokens ---------------------------------------------------------------------------------------------------------

# the pre-tokeniser of all Qwen generations: words with one leading sign, single digits, signs, white space
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]


class Tokenizer:
    """Text <-> ids, from tokenizer.json, vocab.json + merges.txt, or qwen.tiktoken. size: highest id + 1."""

    def __init__(self, folder: Path, family: str):
        from tokenizers import Tokenizer as Backend
        try:
            if (folder / "tokenizer.json").is_file():
                self.backend = Backend.from_file(str(folder / "tokenizer.json"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                lines = (folder / "merges.txt").read_text("utf-8").split("\n")
                merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
                self.backend = byte_level(read_json(folder / "vocab.json"), merges, family.startswith("qwen"))
                add_special(self.backend, folder)
            elif (folder / "qwen.tiktoken").is_file():
                self.backend = byte_level(*from_ranks(folder / "qwen.tiktoken"), True)
                self.backend.add_special_tokens(QWEN_SPECIAL)
            else:
                raise LoadError("no tokenizer.json there, nor vocab.json with merges.txt, nor qwen.tiktoken")
        except LoadError:
            raise
        except Exception as error:  # the tokenizers package raises plain Exception
            raise LoadError(f"the tokenizer's files are damaged ({str(error).splitlines()[0]}); download them again") from None
        self.backend.no_padding()
        self.backend.no_truncation()  # GPT-2's own file says 50 tokens
        self.size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """special=False: without the tokens the checkpoint puts around a text (BOS), for a text that continues one."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids))


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], qwen: bool):
    """A byte-level BPE over GPT-2's alphabet of visible bytes."""
    from tokenizers import Regex, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if qwen:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return backend


def add_special(backend, folder: Path) -> None:
    """Special tokens and BOS of tokenizer_config.json, which vocab.json and merges.txt do not tell."""
    from tokenizers import AddedToken, processors
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    added = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    named = [settings.get(f"{kind}_token", "<|endoftext|>" if kind == "eos" else None) for kind in ("bos", "eos", "unk", "pad")]
    named = [token["content"] if isinstance(token, dict) else token for token in named]
    for place, token in added:
        backend.add_tokens([AddedToken(**{k: v for k, v in token.items() if k != "__type"})])
        if backend.token_to_id(token["content"]) != int(place):
            raise LoadError(f"tokenizer_config.json gives {token['content']!r} the id {place}, vocab.json another")
    backend.add_special_tokens([token for token in named if token])
    if settings.get("add_bos_token") and named[0]:
        bos = (named[0], backend.token_to_id(named[0]))
        backend.post_processor = processors.TemplateProcessing(single=f"{named[0]} $A", special_tokens=[bos])


def from_ranks(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """qwen.tiktoken (base64 token, rank per line) -> vocabulary and merges. Two neighbours merge when together they are a
    token, lowest rank first; so every split of a token into two tokens is a merge of that token's rank."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    text = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = [(text[token[:i]], text[token[i:]]) for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    return {text[token]: rank for token, rank in ranks.items()}, merges


# ---- reading --------------------------------------------------------------------------------------------------------

BATCH_TOKENS = 2048  # fills the matrix units of a few CPU cores and stays in their cache; give more on a GPU


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
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "can't allocate" in str(error)


def in_batches(lengths: Sequence[int], budget: int, work: Callable[[list[int]], None]) -> None:
    """work(indices) for every batch; one that runs out of memory is halved."""
    todo = batches(lengths, budget)[::-1]
    while todo:
        rows = todo.pop()
        try:
            work(rows)
        except RuntimeError as error:
            if not out_of_memory(error) or len(rows) == 1:
                raise
            todo += [rows[len(rows) // 2:], rows[:len(rows) // 2]]


def pack(sequences: Sequence[list[int]], device) -> tuple[torch.Tensor, list[int]]:
    """Sequences end to end: tokens (P,) and their lengths."""
    return torch.tensor(list(itertools.chain(*sequences)), device=device), [len(s) for s in sequences]


@torch.no_grad()
def hidden_at(model: Transformer, sequences: list[list[int]], position="last", layer: int | None = None,
              batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
    """The state of one token of each sequence: its last, or token position[n] of sequence n. (N, C), in input order."""
    at = [len(s) - 1 for s in sequences] if position == "last" else list(position)
    out = torch.empty(len(sequences), model.config.width, dtype=model.dtype, device=model.device)

    def work(rows):
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        starts = itertools.accumulate([0] + lengths[:-1])
        out[rows] = model.packed(tokens, lengths, (layer,))[0][[start + at[i] for start, i in zip(starts, rows)]]

    in_batches([len(s) for s in sequences], batch_tokens, work)
    return out


class Reading(NamedTuple):
    """What one pass over Q questions gives, in input order."""
    loglik: torch.Tensor         # (Q, O) float64, sum over an option's tokens of log p(token | before); -inf: no such option
    option_tokens: torch.Tensor  # (Q, O) int64
    prompt: torch.Tensor         # (Q, n, C) state at the prompt's last token
    item: torch.Tensor           # (Q, n, C) state at the last token of option pick[q]; pick -1: the prompt's last


@torch.no_grad()
def read(model: Transformer, prompts: list[list[int]], options: list[list[list[int]]], pick: list[int], *,
         layers: Sequence[int | None] = (None,), batch_tokens: int = BATCH_TOKENS) -> Reading:
    """One forward pass over every question with its options as branches of its prompt (see Batch): prompt + sum(options)
    tokens instead of a whole sequence per option. Prompts and options are not empty. [D1]"""
    Q, O, shape = len(prompts), max(map(len, options), default=0), (len(prompts), len(layers), model.config.width)
    out = Reading(torch.full((Q, O), -torch.inf, dtype=torch.float64), torch.zeros(Q, O, dtype=torch.int64),
                  torch.empty(shape, dtype=model.dtype), torch.empty(shape, dtype=model.dtype))
    sequences = [list(itertools.chain(p, *o)) for p, o in zip(prompts, options)]

    def work(rows):
        tokens, lengths = pack([sequences[q] for q in rows], model.device)
        tree, spans, before, target, at = [], [], [], [], 0
        for q in rows:
            at += len(prompts[q])
            end = at - 1
            tree += [0] * len(prompts[q])
            ends = [end]  # of the prompt and of each option
            for o, option in enumerate(options[q]):
                tree += [o + 1] * len(option)
                before += [end, *range(at, at + len(option) - 1)]
                target += range(at, at + len(option))
                at += len(option)
                ends.append(at - 1)
            spans.append((q, ends))
        final, *states = model.packed(tokens, lengths, (None, *layers), torch.tensor(tree, device=model.device))
        scores = iter(log_likelihood(model, final, before, tokens[target]).double().cpu().split(
            [len(option) for q in rows for option in options[q]]))
        for q, ends in spans:
            for o, option in enumerate(options[q]):
                out.loglik[q, o], out.option_tokens[q, o] = next(scores).sum(), len(option)
            for j, x in enumerate(states):
                out.prompt[q, j], out.item[q, j] = x[ends[0]], x[ends[pick[q] + 1]]

    in_batches([len(s) for s in sequences], batch_tokens, work)
    return out


def log_likelihood(model: Transformer, x, before: list[int], target, cells: int = 2 ** 25) -> torch.Tensor:
    """log p(target[n] | all up to token before[n]) in float32, (n,), from final states x (P, C), at most `cells` logits at a
    time. Each state gets its logits once: the end of a prompt serves all options."""
    where, back = torch.unique(torch.tensor(before, device=x.device), return_inverse=True)
    out, step = torch.empty(len(before), device=x.device), max(1, cells // model.config.vocab)
    for a in range(0, len(where), step):
        logits = model.logits(x[where[a:a + step]]).float()  # (step, V)
        mine = (back >= a) & (back < a + step)
        row = back[mine] - a
        out[mine] = logits[row, target[mine]] - logits.logsumexp(-1)[row]
    return out


# ---- finetuning -----------------------------------------------------------------------------------------------------

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
TRAIN_TOKENS = 8192   # of a micro-batch; activations of one block and token take about 40 C numbers
SAVE_SECONDS = 60.0   # between two saves of a resumable run


class Classifier:
    """A model, the tensors that finetuning put in place of its own (or beside them: LoRA), and the head classifier.weight
    (2, C) on the final state of the last token [D8]. Classifier(model, c.state()) is c again, bit for bit."""

    def __init__(self, model: Transformer, state: dict[str, torch.Tensor]):
        self._state = {name: x.to(model.device) for name, x in state.items()}
        self.head = self._state["classifier.weight"]
        self.model = Transformer(model.config, model.params | self._state)
        self.model.raw = model.raw

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors."""
        return self._state

    def predict(self, sequences: list[list[int]], batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """P(y = 1), (N,) float32, in input order."""
        x = hidden_at(self.model, sequences, batch_tokens=batch_tokens)
        return F.linear(x.float(), self.head).softmax(-1)[:, 1].cpu()

    def save(self, folder: str) -> None:
        """Hugging Face layout: loads as AutoModelForSequenceClassification where the family has one; LoRA is merged."""
        params = dict(self.model.params)
        for name in [name.removesuffix(".lora_a") for name in params if name.endswith(".lora_a")]:
            merged = params[name + ".weight"].float() + params[name + ".lora_b"].float() @ params[name + ".lora_a"].float()
            params[name + ".weight"] = merged.to(self.model.dtype)
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = export(self.model.config, params) | {"score.weight": self.head.cpu()}
        save_file(files, Path(folder) / "model.safetensors", {"format": "pt"})
        raw = {k: v for k, v in self.model.raw.items() if k not in ("architectures", "auto_map")}
        (Path(folder) / "config.json").write_text(json.dumps(raw | {"id2label": {"0": "no", "1": "yes"}}, indent=1))


def trainable(model: Transformer, tune: str, rank: int, head_init: str, generator) -> dict[str, torch.Tensor]:
    """The tensors that Adam owns: float32 copies, whatever the model's dtype."""
    head = torch.zeros(2, model.config.width)
    if head_init == "normal":
        head = torch.randn(head.shape, generator=generator) / model.config.width ** 0.5
    out = {"classifier.weight": head}
    if tune == "full":  # the language model's own head takes no part
        out |= {name: x.detach().to(torch.float32, copy=True) for name, x in model.params.items() if name != "head.weight"}
    for name, x in model.params.items() if tune == "lora" else ():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.split(".")[-1] in LINEAR:  # Hu et al. 2021, arXiv 2106.09685: A random, B zero
            out[stem + ".lora_a"] = torch.randn(rank, x.shape[1], generator=generator) / x.shape[1] ** 0.5
            out[stem + ".lora_b"] = torch.zeros(x.shape[0], rank)
    return {name: x.to(model.device).requires_grad_() for name, x in out.items()}


def finetune(model: Transformer, sequences: list[list[int]], targets, *, lr: float, epochs: int = 2, batch: int = 32,
             seed: int, tune: str = "full", target_fn: Callable | None = None, batch_tokens: int = TRAIN_TOKENS,
             rank: int = 8, lora_alpha: float = 16.0, checkpoint: bool = False, progress: Callable | None = None,
             head_init: str = "zero", save=None) -> Classifier:
    """Soft-label cross-entropy against targets (N,) = P(y = 1), with Adam, no weight decay, cosine to 0 over all steps, no
    warm-up, no dropout, a new order each epoch (Burns et al. 2023, appendix A).

    The model is not modified. target_fn(p, w, fraction) -> targets of one step, from the student's own p (B,) on the whole
    batch, the given w (B,), and the fraction of steps done. A batch runs in micro-batches of at most batch_tokens tokens,
    halved when memory runs out; gradients are the whole batch's. tune: full, lora (on every linear map) or head.
    progress(step, steps, loss) is called after each step. save: a file where the run stands, rewritten now and then; a call
    with the same arguments goes on from it to the same bits, and the caller removes it. TrainError for a loss that is not
    finite and for a sequence that does not fit into memory."""
    if tune not in ("full", "lora", "head") or head_init not in ("zero", "normal"):
        raise TrainError(f"tune = {tune!r}, head_init = {head_init!r}: must be full, lora or head, and zero or normal")
    generator = torch.Generator().manual_seed(seed)
    trained = trainable(model, tune, rank, head_init, generator)
    orders = [torch.randperm(len(sequences), generator=generator).split(batch) for _ in range(epochs)]
    steps = [rows.tolist() for order in orders for rows in order]
    adam = torch.optim.Adam(trained.values(), lr=lr, betas=(0.9, 0.999), fused=True)
    features = hidden_at(model, sequences, batch_tokens=batch_tokens) if tune == "head" else None
    w_all = torch.as_tensor(targets, dtype=torch.float32, device=model.device)

    def current():  # what the network sees: the model's dtype, LoRA's B times alpha / rank
        scaled = {k: x * (lora_alpha / rank) if k.endswith("lora_b") else x for k, x in trained.items()}
        return {k: x.to(model.params[k].dtype if k in model.params else torch.float32 if k == "classifier.weight"
                        else model.dtype) for k, x in scaled.items()}

    def logits(rows):  # (len(rows), 2) float32
        state = current()
        if features is not None:
            return F.linear(features[rows].float(), state["classifier.weight"])
        student = Transformer(model.config, model.params | state)
        student.recompute = checkpoint
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
        return F.linear(student.packed(tokens, lengths)[0][last].float(), state["classifier.weight"])

    def gradients(rows, fraction, budget) -> float:
        micro = batches([len(sequences[i]) for i in rows], budget)  # indices into rows
        w = w_all[rows]
        if target_fn and len(micro) > 1:
            with torch.no_grad():
                z = torch.cat([logits([rows[j] for j in part]) for part in micro])
            p = torch.empty_like(w)
            p[list(itertools.chain(*micro))] = z.softmax(-1)[:, 1]
            w = target_fn(p, w, fraction)
        total = 0.0
        for part in micro:
            z = logits([rows[j] for j in part])
            target = w[part]
            if target_fn and len(micro) == 1:
                target = target_fn(z.detach().softmax(-1)[:, 1], target, fraction)
            loss = -(torch.stack([1 - target, target], -1) * z.log_softmax(-1)).sum() / len(rows)
            loss.backward()
            total += loss.item()
        return total

    start, saved_at = resume(save, trained, adam), time.monotonic()
    for step in range(start, len(steps)):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        rows = steps[step]
        while True:
            try:
                loss = gradients(rows, step / len(steps), batch_tokens)
                break
            except RuntimeError as error:
                longest = max(len(sequences[i]) for i in rows)
                if not out_of_memory(error):
                    raise
                if batch_tokens < longest:
                    raise TrainError(f"out of memory at step {step + 1} with one sequence of {longest} tokens at a time; tune "
                                     "less (lora, head), recompute activations, or use a larger machine") from None
                batch_tokens = min(batch_tokens, sum(len(sequences[i]) for i in rows)) // 2
            adam.zero_grad()  # the step is repeated from nothing
        if not math.isfinite(loss):
            raise TrainError(f"the loss is {loss} at step {step + 1} of {len(steps)} (learning rate {lr}): lower the learning rate")
        adam.step()
        adam.zero_grad()
        if progress:
            progress(step + 1, len(steps), loss)
        if save and time.monotonic() - saved_at > SAVE_SECONDS:
            suspend(save, trained, adam, step + 1)
            saved_at = time.monotonic()
    return Classifier(model, {name: x.detach().clone() for name, x in current().items()})


def suspend(path, trained: dict, adam, step: int) -> None:
    """Where a run stands, in one file: weights, Adam's two moments, steps done. Order and learning rate follow from them."""
    file = {"w." + name: x.detach() for name, x in trained.items()}
    for name, x in trained.items():
        file |= {"m." + name: adam.state[x]["exp_avg"], "v." + name: adam.state[x]["exp_avg_sq"]}
    save_file(file, f"{path}.tmp", {"step": str(step)})
    os.replace(f"{path}.tmp", path)


def resume(path, trained: dict, adam) -> int:
    """Steps done, with weights and Adam's state put back; 0 without a file."""
    if not path or not Path(path).is_file():
        return 0
    with open_tensors(Path(path)) as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, x in trained.items():
            x.copy_(file.get_tensor("w." + name))
            adam.state[x] = {"step": torch.tensor(float(step), device=x.device),
                             "exp_avg": file.get_tensor("m." + name).to(x.device, copy=True),
                             "exp_avg_sq": file.get_tensor("v." + name).to(x.device, copy=True)}
    return step
