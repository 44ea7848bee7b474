"""The network of the paper's weak supervisor and strong student: checkpoints, hidden states, finetuning.

Selective weak-to-strong generalization (arXiv 2511.14166) needs three things of a language model: a classifier finetuned
on soft labels (section 2 of method.md: weak supervisor, student, ceiling), hidden states (P(IK) probe, graph), and the
log-likelihood of each option (self-generated labels). All three run on one plain function, `Transformer.packed`.

Shapes: B sequences, T longest length, P sum of lengths (packed tokens), C width, H heads, K key/value heads, D head
dimension, R rotated channels of D, I inner width of the MLP, V vocabulary, L blocks.
Packed layout: the tokens of a batch lie one after the other, (P, C), so linear layers and norms work on real tokens only;
attention alone unpacks to (B, T, H, D), right-padded, where causal attention needs no mask, and packs again.

Parameters are a plain dict, matrices (out, in), under one set of names for all families: embed pos norm head and
layers.{i}.{norm1 q k v q_norm k_norm o post1 norm2 gate up down post2}, each .weight and perhaps .bias. Names come from the
table FAMILIES, numbers from config.json; a part that a family lacks has no tensor, and the network skips it.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open


class LoadError(ValueError):
    """A checkpoint that cannot be used: one line saying what is wrong, where, and what to do."""


class TrainError(ValueError):
    """A finetuning run that cannot go on: one line saying at which step, and what to do."""


# ---- families -------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
}

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
GPT2 = dict(
    prefix="transformer.",
    names={"embed": "wte", "pos": "wpe", "norm": "ln_f", "head": "lm_head", "norm1": "h.{}.ln_1",
           "q k v": "h.{}.attn.c_attn", "o": "h.{}.attn.c_proj", "norm2": "h.{}.ln_2", "up": "h.{}.mlp.c_fc",
           "down": "h.{}.mlp.c_proj"},
    numbers=dict(vocab=("vocab_size", 50257), context=("n_positions", 1024), width=("n_embd", 768),
                 layers=("n_layer", 12), heads=("n_head", 12), inner=("n_inner", None),
                 act=("activation_function", "gelu_new"), eps=("layer_norm_epsilon", 1e-5),
                 tied=("tie_word_embeddings", True)),
    layer_norm=True, bias=((None, True, "q k v o up down"),), transposed=True,  # Conv1D keeps its matrices (in, out)
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    ignore=r"h\.\d+\.attn\.(masked_)?bias",
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
    per_head=True,  # fused rows are (H, 3, D), not (3, H, D): GPTNeoXAttention views (.., H, 3 * D) before it chunks
    ignore=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
FAMILIES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX, "llama": LLAMA}

# config.json keys that change nothing in a forward pass without dropout
IGNORED_KEYS = re.compile(
    r"model_type|architectures|auto_map|transformers_version|_name_or_path|torch_dtype|dtype|use_cache|is_decoder|n_ctx"
    r"|.*(dropout|_pdrop)(_prob)?|initializer_range|(bos|eos|pad|unk)_token_id|summary_.*|task_specific_params|n_special"
    r"|predict_special_tokens|output_past|pretraining_tp|is_llama_config|reorder_and_upcast_attn|gradient_checkpointing"
    r"|id2label|label2id|_?num_labels|chunk_size_feed_forward|is_encoder_decoder|return_dict|output_(attentions|hidden_states)"
    r"|problem_type")


@dataclass(frozen=True)
class Config:
    """The numbers of one checkpoint, resolved: what config.json says, else the family's default."""
    family: str
    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    inner: int
    act: str
    eps: float
    tied: bool
    kv_heads: int | None = None
    head_dim: int | None = None
    parallel: bool = False          # attention and MLP read the same residual stream
    rope: tuple | None = None       # (base, rotated channels, scaling as sorted items); None: learned positions
    biased: frozenset = frozenset()  # the linear parts that have a bias


def configure(raw: dict) -> Config:
    """config.json -> Config. LoadError for an unknown family, an unknown non-null key, or an unsupported value."""
    family = raw.get("model_type")
    if raw.get("quantization_config"):
        raise LoadError("config.json: quantization_config: quantised checkpoints are not supported, use the full-precision one")
    if family not in FAMILIES:
        raise LoadError(f"config.json: model_type {family!r} is not supported, only {', '.join(FAMILIES)}")
    row = FAMILIES[family]
    known = {key for key, _ in row["numbers"].values()} | {key for key, _, _ in row["bias"]} | set(row.get("must", ()))
    known |= {row["base"][0], row["fraction"][0], "rope_scaling", "rope_parameters"} if "base" in row else set()
    for key, value in raw.items():
        if key not in known and value is not None and not IGNORED_KEYS.fullmatch(key):
            raise LoadError(f"config.json: unknown key {key!r} (= {value!r:.60}) for {family}: it may change the model")
        if key in row.get("must", ()) and value is not None and value != row["must"][key]:
            raise LoadError(f"config.json: {key} = {value!r} is not supported, only {row['must'][key]!r}")
    n = {field: raw.get(key, default) for field, (key, default) in row["numbers"].items()}
    n["kv_heads"] = n.get("kv_heads") or n["heads"]
    n["head_dim"] = n.get("head_dim") or n["width"] // n["heads"]
    n["inner"] = n["inner"] or 4 * n["width"]
    if n["act"] not in ACTIVATIONS:
        raise LoadError(f"config.json: activation {n['act']!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if "base" in row:
        n["rope"] = rotary(raw, row, n["head_dim"])
    biased = " ".join(parts for key, default, parts in row["bias"] if raw.get(key, default))
    return Config(family=family, biased=frozenset(biased.split()), **n)


def rotary(raw: dict, row: dict, head_dim: int) -> tuple:
    """(base, rotated channels, scaling): rope_parameters (files of transformers 5) or rope_theta and rope_scaling."""
    p = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    base = p.pop("rope_theta", raw.get(*row["base"]))
    fraction = p.pop("partial_rotary_factor", raw.get(*row["fraction"]))
    kind = p.pop("rope_type", p.pop("type", "default"))
    p.pop("type", None)
    needs = {"default": set(), "linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor",
                                                                "original_max_position_embeddings"}}
    if kind not in needs or set(p) != needs[kind]:
        raise LoadError(f"config.json: RoPE scaling {kind!r} with {sorted(p)} is not supported, only {needs}")
    return float(base), int(head_dim * fraction), tuple(sorted(p.items()))


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor this configuration must have, canonical name -> shape; a tied head is the embedding and not listed."""
    row = FAMILIES[c.family]
    q, k = c.heads * c.head_dim, c.kv_heads * c.head_dim
    part_shapes = {"embed": (c.vocab, c.width), "pos": (c.context, c.width), "head": (c.vocab, c.width),
                   "q": (q, c.width), "k": (k, c.width), "v": (k, c.width), "o": (c.width, q),
                   "gate": (c.inner, c.width), "up": (c.inner, c.width), "down": (c.width, c.inner)}
    out = {}
    for parts, template in row["names"].items():
        for part in parts.split():
            shape = part_shapes.get(part, (c.width,))
            biased = part in c.biased or (part.startswith("norm") and row.get("layer_norm"))
            if part == "head" and c.tied:
                continue
            for i in range(c.layers) if "{}" in template else [None]:
                name = part if i is None else f"layers.{i}.{part}"
                out[name + ".weight"] = shape
                if biased:
                    out[name + ".bias"] = shape[:1]
    return out


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def load(source: str, *, device="cpu", dtype=torch.float32) -> "tuple[Transformer, Tokenizer]":
    """A directory in Hugging Face layout -> (Transformer, Tokenizer). LoadError for everything a user can get wrong."""
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder}: no config.json there; give a directory in Hugging Face layout")
    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise LoadError(f"{folder}/config.json: not valid JSON ({error})") from None
    config = configure(raw)
    params, ignored = read_params(config, tensor_files(folder), device, dtype)
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.vocab:
        raise LoadError(f"{folder}: the tokenizer has {tokenizer.size} ids, the embedding {config.vocab} rows: they do not "
                        "belong together")
    count = sum(p.numel() for p in params.values())
    print(f"{config.family}: {len(params)} tensors, {ignored} ignored, {'tied' if config.tied else 'own'} head, "
          f"{count / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}")
    return Transformer(config, params), tokenizer


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, for single and sharded checkpoints."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    elif (folder / "model.safetensors").is_file():
        with open_tensors(folder / "model.safetensors") as file:
            files = dict.fromkeys(file.keys(), folder / "model.safetensors")
    else:
        raise LoadError(f"{folder}: no model.safetensors (pickle checkpoints are refused: convert them to safetensors)")
    return files


def open_tensors(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def read_params(c: Config, files: dict[str, Path], device, dtype) -> tuple[dict[str, torch.Tensor], int]:
    """All parameters under canonical names, and how many tensors were ignored. Every tensor of the files is consumed
    once or matches the family's ignore pattern; every expected one is there with its shape."""
    row, expected, params = FAMILIES[c.family], shapes(c), {}
    left = {name.removeprefix(row["prefix"]): (name, path) for name, path in files.items()}
    if len(left) != len(files):
        raise LoadError(f"{path}: tensors are there twice, with and without the prefix {row['prefix']!r}")
    ignored = [name for name in left if re.fullmatch(row["ignore"], name)]
    for name in ignored:
        del left[name]

    def fetch(name):
        name, path = left.pop(name)
        with open_tensors(path) as file:
            x = file.get_tensor(name)
        return x

    for parts, template in row["names"].items():
        for i in range(c.layers) if "{}" in template else [None]:
            for kind in ("weight", "bias"):
                names = [(part if i is None else f"layers.{i}.{part}") + "." + kind for part in parts.split()]
                names = [name for name in names if name in expected]
                source = f"{template.format(i)}.{kind}"
                if not names:
                    continue
                if source not in left:
                    raise LoadError(f"tensor {source} is missing from the checkpoint")
                x = fetch(source)
                if row.get("transposed") and i is not None and x.ndim == 2:
                    x = x.t()
                if x.shape[0] != sum(expected[n][0] for n in names) or x.shape[1:] != expected[names[0]][1:]:
                    raise LoadError(f"tensor {source} has shape {tuple(x.shape)}, expected {[expected[n] for n in names]}")
                if row.get("per_head") and len(names) > 1:
                    pieces = x.view(c.heads, 3, c.head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape).chunk(3)
                else:
                    pieces = x.split([expected[n][0] for n in names])
                for name, piece in zip(names, pieces):  # norms stay in float32: they are computed there
                    precise = torch.float32 if "norm" in name or "post" in name else dtype
                    params[name] = piece.to(device, precise, copy=True).contiguous()
    if c.tied and "head" in row["names"] and row["names"]["head"] + ".weight" in left:
        left.pop(row["names"]["head"] + ".weight")
    if left:
        raise LoadError(f"{len(left)} unexpected tensors, the first is {next(iter(left))}")
    return params, len(ignored)


# ---- the network ----------------------------------------------------------------------------------------------------

class Batch:
    """Where the tokens of a packed batch lie. tree: (P,) branch of each token, 0 = trunk; a token sees the tokens of its
    own sequence before it that are on the trunk or on its branch, and counts its position along that path."""

    def __init__(self, lengths: list[int], tree, device):
        n = torch.tensor(lengths, device=device)
        self.B, self.T = len(lengths), max(lengths)
        start = torch.repeat_interleave(n.cumsum(0) - n, n)
        index = torch.arange(int(sum(lengths)), device=device) - start                       # (P,) place in its sequence
        self.flat = torch.repeat_interleave(torch.arange(self.B, device=device), n) * self.T + index  # (P,) into B * T
        self.position, self.branch = index, None
        if tree is not None:
            self.branch = self.unpack(tree[:, None, None])[:, 0, :, 0]                                # (B, T)
            same = (self.branch[:, :, None] == self.branch[:, None, :]) | (self.branch[:, None, :] == 0)
            order = torch.arange(self.T, device=device)
            self.sees = same & (order[:, None] >= order[None, :])                                     # (B, T, T)
            self.position = (self.sees.sum(-1) - 1).flatten()[self.flat]
        self.masks = {}

    def mask(self, window: int | None):
        """None where plain causal attention is right, else a boolean (1 or B, 1, T, T)."""
        if self.branch is None and (window is None or window >= self.T):
            return None
        if window not in self.masks:
            at = self.unpack(self.position[:, None, None])[:, 0, :, 0] if self.branch is not None \
                else torch.arange(self.T, device=self.position.device)[None]                          # (1 or B, T)
            sees = self.sees if self.branch is not None else at[:, :, None] >= at[:, None, :]
            if window is not None:
                sees = sees & (at[:, :, None] - at[:, None, :] < window)  # the window counts the token itself
            self.masks[window] = sees[:, None]
        return self.masks[window]

    def unpack(self, x):
        """(P, H, D) -> (B, H, T, D)"""
        out = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.flat, x)
        return out.view(self.B, self.T, *x.shape[1:]).transpose(1, 2)

    def pack(self, x):
        """(B, H, T, D) -> (P, H * D)"""
        return x.transpose(1, 2).reshape(self.B * self.T, -1)[self.flat]


def rope_table(rope: tuple, position):
    """cos, sin (P, 1, R / 2) in float32."""
    base, rotated, scaling = rope
    frequency = 1.0 / base ** (torch.arange(0, rotated, 2, device=position.device).float() / rotated)  # (R / 2,)
    s = dict(scaling)
    if "low_freq_factor" in s:  # llama3: long waves are stretched, short ones kept, those between interpolated
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    elif s:
        frequency = frequency / s["factor"]
    angle = position.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the first R channels of every head: channel r and channel r + R / 2 are a pair. x (P, H, D)"""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half:2 * half].float(), x[..., 2 * half:]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


class Transformer:
    """A checkpoint: config, params (canonical name -> tensor), device, dtype. Nothing here changes params."""

    def __init__(self, config: Config, params: dict[str, torch.Tensor]):
        self.config, self.params = config, params
        self.device, self.dtype = params["embed.weight"].device, params["embed.weight"].dtype

    def norm(self, x, name):
        w, b = self.params.get(name + ".weight"), self.params.get(name + ".bias")
        if w is None:
            return x
        if b is None:
            return F.rms_norm(x.float(), w.shape, w, self.config.eps).to(x.dtype)
        return F.layer_norm(x.float(), w.shape, w, b, self.config.eps).to(x.dtype)

    def linear(self, x, name):
        p = self.params
        y = F.linear(x, p[name + ".weight"], p.get(name + ".bias"))
        if name + ".lora_a" in p:
            y = y + F.linear(F.linear(x, p[name + ".lora_a"]), p[name + ".lora_b"])
        return y

    def attention(self, x, layer, batch, table):
        c = self.config
        q, k, v = (self.linear(x, f"{layer}.{part}").view(len(x), -1, c.head_dim) for part in "qkv")  # (P, H or K, D)
        if table:
            q, k = rotate(q, *table), rotate(k, *table)
        if c.kv_heads < c.heads:  # each key/value head serves the next H / K query heads
            k, v = (y.repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        q, k, v = batch.unpack(q), batch.unpack(k), batch.unpack(v)  # (B, H, T, D)
        mask = batch.mask(None)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.linear(batch.pack(y), layer + ".o")

    def mlp(self, x, layer):
        act, up = ACTIVATIONS[self.config.act], self.linear(x, layer + ".up")  # (P, I)
        gated = layer + ".gate.weight" in self.params
        return self.linear(act(self.linear(x, layer + ".gate")) * up if gated else act(up), layer + ".down")

    def block(self, x, layer, batch, table):
        a = self.norm(self.attention(self.norm(x, layer + ".norm1"), layer, batch, table), layer + ".post1")
        if self.config.parallel:
            return x + a + self.mlp(self.norm(x, layer + ".norm2"), layer)
        x = x + a
        return x + self.norm(self.mlp(self.norm(x, layer + ".norm2"), layer), layer + ".post2")

    def packed(self, tokens, lengths: list[int], layers: Sequence[int | None] = (None,), tree=None) -> list[torch.Tensor]:
        """tokens (P,) int64 -> one (P, C) per entry of layers: None = after the final norm, i = residual stream after
        block i (0 = embeddings). tree: see Batch."""
        c, p = self.config, self.params
        assert tokens.shape == (sum(lengths),) and min(lengths) > 0, "tokens must be all sequences, none empty, end to end"
        batch = Batch(lengths, tree, tokens.device)
        if int(batch.position.max()) >= c.context:
            raise ValueError(f"a sequence of {int(batch.position.max()) + 1} tokens is longer than the context of {c.context}")
        x = F.embedding(tokens, p["embed.weight"])  # (P, C)
        if "pos.weight" in p:
            x = x + F.embedding(batch.position, p["pos.weight"])
        table = rope_table(c.rope, batch.position) if c.rope else None
        states = [x]
        for i in range(c.layers if None in layers else max(layers)):
            x = self.block(x, f"layers.{i}", batch, table)
            states.append(x)
        return [self.norm(x, "norm") if layer is None else states[layer] for layer in layers]

    def hidden(self, tokens, lengths, layer: int | None = None):
        """tokens (B, T) int64 right-padded, lengths (B,) -> (B, T, C); zeros past a length."""
        B, T = tokens.shape
        real = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)
        x = self.packed(tokens[real], lengths.tolist(), (layer,))[0]
        return x.new_zeros(B, T, x.shape[-1]).masked_scatter(real[..., None], x)

    def logits(self, hidden):
        """(..., C) after the final norm -> (..., V)"""
        return F.linear(hidden, self.params.get("head.weight", self.params["embed.weight"]))


# ---- tokens ---------------------------------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> ids, as the checkpoint's own files say, special tokens at the ends included."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Backend
        if not (folder / "tokenizer.json").is_file():
            raise LoadError(f"{folder}: no tokenizer.json there")
        self.backend = Backend.from_file(str(folder / "tokenizer.json"))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """special=False: without the tokens that the checkpoint puts around a text (BOS), for text that goes on."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(list(ids))


# ---- reading --------------------------------------------------------------------------------------------------------

BATCH_TOKENS = 1024  # enough to fill the matrix units of a CPU core pair, small enough for its cache


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices by falling length, cut so that a batch holds at most budget tokens (at least one sequence)."""
    out, room = [], -1
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room < lengths[i]:
            out.append([])
            room = budget
        out[-1].append(i)
        room -= lengths[i]
    return out


def pack(sequences: Sequence[list[int]], device) -> tuple[torch.Tensor, list[int]]:
    tokens = torch.tensor([t for s in sequences for t in s], device=device)
    return tokens, [len(s) for s in sequences]


@torch.no_grad()
def hidden_at(model: Transformer, sequences: list[list[int]], position="last", layer: int | None = None,
              batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
    """Hidden state of one token per sequence, (N, C): the last one, or position[n] of sequence n. Input order."""
    at = [len(s) - 1 for s in sequences] if position == "last" else list(position)
    out = torch.empty(len(sequences), model.config.width, dtype=model.dtype, device=model.device)
    for rows in batches([len(s) for s in sequences], batch_tokens):
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        x = model.packed(tokens, lengths, (layer,))[0]
        starts = torch.tensor([0] + lengths[:-1]).cumsum(0) + torch.tensor([at[i] for i in rows])
        out[rows] = x[starts.to(model.device)]
    return out


class Reading(NamedTuple):
    """What one pass over questions gives: Q questions, at most O options, n layers."""
    loglik: torch.Tensor         # (Q, O) float64, sum over an option's tokens of log p(token | before); -inf: no such option
    option_tokens: torch.Tensor  # (Q, O) int64
    prompt: torch.Tensor         # (Q, n, C) hidden state at the prompt's last token
    item: torch.Tensor           # (Q, n, C) hidden state at the last token of option pick[q]; pick -1: the prompt's last


@torch.no_grad()
def read(model: Transformer, prompts: list[list[int]], options: list[list[list[int]]], pick: list[int], *,
         layers: Sequence[int | None] = (None,), batch_tokens: int = BATCH_TOKENS) -> Reading:
    """One forward pass over every question, its options as branches of its prompt (see Batch): prompt + sum(options)
    tokens instead of one whole sequence per option. [D1]"""
    Q, O, n, C = len(prompts), max(map(len, options), default=0), len(layers), model.config.width
    out = Reading(torch.full((Q, O), -torch.inf, dtype=torch.float64), torch.zeros(Q, O, dtype=torch.int64),
                  torch.empty(Q, n, C, dtype=model.dtype), torch.empty(Q, n, C, dtype=model.dtype))
    sequences = [sum(o, p) for p, o in zip(prompts, options)]
    for rows in batches([len(s) for s in sequences], batch_tokens):
        tokens, lengths = pack([sequences[q] for q in rows], model.device)
        tree, before, target, owner, ends, start = [], [], [], [], [], 0
        for q in rows:
            at = start + len(prompts[q])
            tree += [0] * len(prompts[q])
            ends.append([at - 1])
            for o, option in enumerate(options[q]):
                tree += [o + 1] * len(option)
                before += [start + len(prompts[q]) - 1, *range(at, at + len(option) - 1)]
                target += range(at, at + len(option))
                owner += [q * O + o] * len(option)
                out.option_tokens[q, o] = len(option)
                at += len(option)
                ends[-1].append(at - 1)
            start = at
        states = model.packed(tokens, lengths, (None, *layers), torch.tensor(tree, device=model.device))
        for i, q in enumerate(rows):
            for j, x in enumerate(states[1:]):
                out.prompt[q, j], out.item[q, j] = x[ends[i][0]], x[ends[i][pick[q] + 1]]
        logp = log_likelihood(model, states[0], before, tokens[target])
        loglik = out.loglik.view(-1)
        loglik[sorted(set(owner))] = 0.0
        loglik.index_add_(0, torch.tensor(owner), logp.double().cpu())
    return out


def log_likelihood(model: Transformer, x, before: list[int], target, cells: int = 2 ** 25):
    """log p(target[n] | tokens up to before[n]) in float32, (n,); at most `cells` logits exist at a time."""
    where, back = torch.unique(torch.tensor(before, device=x.device), return_inverse=True)  # a prompt's end serves all options
    out = torch.empty(len(before), device=x.device)
    step = max(1, cells // model.config.vocab)
    for a in range(0, len(where), step):
        logits = model.logits(x[where[a:a + step]]).float()
        mine = (back >= a) & (back < a + step)
        row = back[mine] - a
        out[mine] = logits[row, target[mine]] - logits.logsumexp(-1)[row]
    return out


# ---- finetuning -----------------------------------------------------------------------------------------------------

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


class Classifier:
    """A model, what finetuning changed in it, and the head (2, C): P(y = 1) from the last token's final hidden state [D8]."""

    def __init__(self, model: Transformer, state: dict[str, torch.Tensor]):
        self.head = state["classifier.weight"].to(model.device)
        changed = {k: v.to(model.device) for k, v in state.items() if k != "classifier.weight"}
        self.model, self._state = Transformer(model.config, model.params | changed), state

    def predict(self, sequences: list[list[int]], batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """(N,) float32 P(y = 1), in input order."""
        x = hidden_at(self.model, sequences, batch_tokens=batch_tokens)
        return F.linear(x.float(), self.head).softmax(-1)[:, 1].cpu()

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that were trained; Classifier(model, state) is this classifier again, bit for bit."""
        return self._state


def finetune(model: Transformer, sequences: list[list[int]], targets, *, lr: float, epochs: int = 2, batch: int = 32,
             seed: int, tune: str = "full", target_fn: Callable | None = None, batch_tokens: int = BATCH_TOKENS,
             rank: int = 8, lora_alpha: float = 16, checkpoint: bool = False, progress: Callable | None = None,
             head_init: str = "zero", save=None) -> Classifier:
    """Adam, cosine to 0, a new order every epoch; soft-label cross-entropy against target_fn(p, w, fraction of steps)."""
    generator = torch.Generator().manual_seed(seed)
    trained = {"classifier.weight": torch.zeros(2, model.config.width)}
    if tune == "full":
        trained |= {k: v.detach().float().clone() for k, v in model.params.items() if k != "head.weight"}
    elif tune == "lora":
        for name, w in model.params.items():
            if name.split(".")[-2] in LINEAR and name.endswith(".weight"):
                stem = name.removesuffix(".weight")
                trained[stem + ".lora_a"] = torch.randn(rank, w.shape[1], generator=generator) / w.shape[1] ** 0.5
                trained[stem + ".lora_b"] = torch.zeros(w.shape[0], rank)
    trained = {k: v.to(model.device).requires_grad_() for k, v in trained.items()}
    scale = {"lora_b": lora_alpha / rank}

    def current():
        return {k: (v * scale.get(k.split(".")[-1], 1.0) if k.endswith("lora_b") else v)
                .to(model.params[k].dtype if k in model.params else torch.float32 if k == "classifier.weight" else model.dtype)
                for k, v in trained.items()}

    def logits(rows):
        p = current()
        student = Transformer(model.config, model.params | p)
        tokens, lengths = pack([sequences[i] for i in rows], model.device)
        x = student.packed(tokens, lengths)[0]
        last = torch.tensor(lengths, device=model.device).cumsum(0) - 1
        return F.linear(x[last].float(), p["classifier.weight"])

    targets = torch.as_tensor(targets, dtype=torch.float32, device=model.device)
    orders = [torch.randperm(len(sequences), generator=generator).split(batch) for _ in range(epochs)]
    steps = [rows.tolist() for order in orders for rows in order]
    adam = torch.optim.Adam(trained.values(), lr=lr, fused=True)
    for step, rows in enumerate(steps):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        w = targets[rows]
        micro = [[rows[i] for i in m] for m in batches([len(sequences[i]) for i in rows], batch_tokens)]
        place = {r: n for n, r in enumerate(rows)}
        if target_fn:
            with torch.no_grad():
                p = torch.empty_like(w)
                for m in micro:
                    p[[place[i] for i in m]] = logits(m).softmax(-1)[:, 1]
            w = target_fn(p, w, step / len(steps))
        total = 0.0
        for m in micro:
            t = w[[place[i] for i in m]]
            logp = logits(m).log_softmax(-1)
            loss = -(t * logp[:, 1] + (1 - t) * logp[:, 0]).sum() / len(rows)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise TrainError(f"the loss is {total} at step {step + 1} of {len(steps)} (learning rate {lr}); use a smaller one")
        adam.step()
        adam.zero_grad()
        if progress:
            progress(step + 1, len(steps), total)
    with torch.no_grad():
        return Classifier(model, {k: v.detach().clone() for k, v in current().items()})
