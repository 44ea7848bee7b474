"""The networks of the method: loading, hidden states, option log-likelihoods, finetuning.

Selective weak-to-strong generalization (Lang, Huang, Li, arXiv 2511.14166) asks three things of a language
model: a student finetuned on soft labels (weak supervisor, student, ceiling), hidden states (P(IK), graph)
and the log-likelihood of each option (self-generated labels). All three run through one function,
Transformer.packed.

    symbol     here                  shape      source
    P(y = 1)   predict               (N,)       soft label, Burns et al. 2023 (arXiv 2312.09390), app. A, of a
                                                Classifier [D8] or an Answerer [D17]
    log p(a|q) Reading.loglik        (Q, O)     option scores, Kadavath et al. 2022 (arXiv 2207.05221) [D1]
    h(q)       Reading.prompt_state  (Q, n, C)  state at the end of the question: what P(IK) looks at
    h(q, a)    Reading.item_state    (Q, O, n, C)  after each option: of the one shown, a graph's node

Shapes: B sequences, T tokens of one, P tokens of all, C width, H heads, K key/value heads, D head dimension,
I inner width of the MLP, V vocabulary, N items, Q questions, O options, n layers asked for.

Order: loading (by data/architecture.py and data/checkpoint.py); the network, from the packing of a batch to
Transformer; reading with it; finetuning it. Parameters have one set of names for all families: embed pos norm
head, layers.{i}.{norm1 q k v q_norm k_norm o post1 norm2 gate up down post2}, each .weight and perhaps .bias;
matrices (out, in), gains as they multiply. A part that a checkpoint lacks has no tensor, and the network
passes it by.
"""
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import data.many as many
from data.architecture import ACTIVATIONS, Config, configure, tensors
from data.checkpoint import (check_device, find, first_calls, is_norm, out_of_memory, read_params, save,
                             summary, tensor_files)
from data.families import FAMILIES
from data.tokens import LoadError, Tokenizer, read_json


class TrainError(ValueError):
    """A finetuning run or a reading that cannot go on: one line saying where, and what to do."""


# ---- loading -----------------------------------------------------------------------------------------------

def load(source: str, *, device="cpu", dtype=torch.float32) -> "tuple[Transformer, Tokenizer]":
    """A directory in Hugging Face layout or a hub id (NAME or NAME@REVISION) -> (Transformer, Tokenizer);
    matrices in dtype, norms in float32. Prints one line. LoadError for everything a user can get wrong."""
    folder = find(str(source))
    try:
        check_device(device)
        first_calls()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan for every new shape, for seconds
        raw = read_json(folder / "config.json")
        config, files = configure(raw), tensor_files(folder)
        tokenizer = Tokenizer(folder, config.family, config.vocab)  # before the weights: it gives memory back
        params, ignored = read_params(config, files, device, dtype)
    except LoadError as error:
        raise LoadError(f"{source}: {error}") from None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise LoadError(f"{source}: does not fit into the memory of {device}: choose a smaller model or "
                        "--dtype bfloat16") from None
    model = Transformer(config, params)
    model.raw, model.folder, model.revision = raw, folder, None if Path(source).is_dir() else folder.name
    print(summary(config, params, ignored, raw))
    return model, tokenizer


# ---- the network -------------------------------------------------------------------------------------------

ALIKE = dict(cpu=1.0, cuda=0.5)  # see alike: CPUs pay for padding, GPUs for each call


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
    host = {}  # of a network that is spread over processes: the blocks' matrices, whole, on the CPU
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

    def shard(self, trained: set[str], offload: bool) -> None:
        """Of several processes each keeps a share of the trained parameters, given by name, and gathers a
        block's while it computes. The rest stays whole on all, and so do norms; but of a spread network the
        blocks' matrices are shared out whatever is trained."""
        whole = {x for name, x in self.named_parameters() if is_norm(name)
                 or name not in trained and not (self.host and name.startswith("layers."))}
        many.shard(self, self.layers, whole, self.dtype, offload)

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

    def check_head(self) -> None:
        """LoadError for a checkpoint that was saved as a classifier, without a language model's head."""
        if self.head.weight is None and not self.config.tied:
            raise LoadError(f"{self.folder}: has a classifier's head, and no language model's, as its own "
                            "answers need: give the pretrained model")

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) after the final norm -> (..., V) float32. The product is taken in float32 whatever the
        dtype: rounded to bfloat16, logits of size 20 lie 1/8 apart, and options tie."""
        self.check_head()
        x, head = hidden.float(), self.embed.weight if self.head.weight is None else self.head.weight
        if head.dtype == torch.float32:
            y = F.linear(x, head)
        else:  # converted a block at a time, and again in the backward pass: never a whole head in float32
            y = torch.cat([recompute(lambda x, rows: F.linear(x, rows.float()), x, rows, use_reentrant=False)
                           for rows in head.split(HEAD_ROWS[head.device.type])], -1)
        cap = self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)


def spread(model: Transformer, device) -> Transformer:
    """The network of a model on the CPU, whose blocks the processes share out: each keeps its share on the
    device and gathers one block at a time. Embedding, head and norms are whole on all."""
    params = {name: x.detach() for name, x in model.params.items()}
    out = Transformer(model.config, params)
    out.raw, out.folder, out.revision = model.raw, model.folder, model.revision
    out.host = {name: x for name, x in params.items() if name.startswith("layers.") and not is_norm(name)}
    out.device = torch.device(device)
    out.shard(set(), False)
    return out


# ---- reading -----------------------------------------------------------------------------------------------

# by kind of device: few enough for the caches of a few cores; many enough that a GPU does not wait for calls
HEAD_ROWS = dict(cpu=2 ** 13, cuda=2 ** 15)  # of the vocabulary: converted to float32 at a time
CELLS = dict(cpu=2 ** 25, cuda=2 ** 27)  # logits that exist at a time
BATCH_TOKENS = dict(cpu=2 ** 11, cuda=2 ** 14)  # of a pass without gradients


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


def in_batches(model: Transformer, lengths: Sequence[int], budget: int | None,
               work: Callable[[list[int]], None], progress: Callable | None = None) -> list[int]:
    """work(indices) for every batch, of several processes for this one's; all indices done. A batch that runs
    out of memory is halved (of a spread network not). TrainError when a single sequence does.
    progress(done_tokens, all_tokens) follows each batch."""
    every = batches(lengths, budget or BATCH_TOKENS[model.device.type])
    todo = every[many.rank()::many.size()]
    mine, done = [i for indices in todo for i in indices], 0
    if model.host and len(todo) < -(-len(every) // many.size()):
        todo = [*todo, every[0]]  # for nothing, but all must gather the blocks as often
    todo = todo[::-1]
    while todo:
        indices = todo.pop()
        try:
            work(indices)
        except RuntimeError as error:
            if not out_of_memory(error) or model.host:
                raise
            if len(indices) == 1:
                raise TrainError(f"out of memory with one sequence of {lengths[indices[0]]} tokens: use a "
                                 "smaller model, or a device with more memory") from None
            half = len(indices) // 2
            todo += [indices[half:], indices[:half]]
            continue
        done += sum(lengths[i] for i in indices)
        if progress and mine:
            progress(done, sum(lengths[i] for i in mine))
    return mine


def pack(sequences: Sequence[list[int]], device) -> tuple[Tensor, list[int]]:
    """Sequences end to end: tokens (P,) int64, and their lengths."""
    return torch.tensor(list(itertools.chain(*sequences)), device=device), [len(s) for s in sequences]


def finite(model: Transformer, x: Tensor) -> Tensor:
    """x, hidden states or what follows from them. TrainError unless all are finite."""
    if not x.isfinite().all():
        remedy = {"float16": "use --dtype bfloat16 or float32", "bfloat16": "use --dtype float32",
                  "float32": "the checkpoint is damaged or overflows"}
        dtype = str(model.dtype).removeprefix("torch.")
        name = model.folder.name if model.folder else "the model"
        raise TrainError(f"hidden states of {name} are not finite in {dtype}: {remedy[dtype]}")
    return x


@torch.no_grad()
def hidden_at(model: Transformer, sequences: list[list[int]], position="last", layer: int | None = None,
              batch_tokens: int | None = None, progress: Callable | None = None) -> Tensor:
    """The state of one token of each sequence: its last, or token position[n] of sequence n. (N, C) in the
    model's dtype and on its device, input order. layer: as in Transformer.packed; batch_tokens (None:
    BATCH_TOKENS): of one pass. TrainError for states that are not finite, or no memory."""
    at = [len(s) - 1 for s in sequences] if position == "last" else list(position)
    out = torch.empty(len(sequences), model.config.width, dtype=model.dtype, device=model.device)

    def work(indices):
        tokens, lengths = pack([sequences[i] for i in indices], model.device)
        starts = itertools.accumulate([0] + lengths[:-1])
        keep = torch.tensor([start + at[i] for start, i in zip(starts, indices)], device=model.device)
        out[indices] = finite(model, model.packed(tokens, lengths, (layer,), keep=keep)[0])

    return many.joined(out, in_batches(model, [len(s) for s in sequences], batch_tokens, work, progress))


class Reading(NamedTuple):
    """What one pass over Q questions gives, in input order, on the CPU; states in the model's dtype."""
    loglik: Tensor         # (Q, O) float64, sum of log p(token | before); -inf: no such option
    option_tokens: Tensor  # (Q, O) int64
    prompt_state: Tensor   # (Q, n, C) at the prompt's last token
    item_state: Tensor     # (Q, n, C) at the last token of option pick[q], or the prompt's for -1; without
    #                        pick (Q, O, n, C), at each option's; 0: no such option


@torch.no_grad()
def read(model: Transformer, prompts: list[list[int]], options: list[list[list[int]]],
         pick: list[int] | None = None, *, layers: Sequence[int | None] = (None,),
         batch_tokens: int | None = None, progress: Callable | None = None) -> Reading:
    """One forward pass over every question with its options as branches of its prompt: prompt + sum(options)
    tokens instead of a whole sequence per option. No prompt and no option is empty. [D1] TrainError for
    states that are not finite, or no memory."""
    Q, O, n, C = len(prompts), max(map(len, options), default=0), len(layers), model.config.width
    out = Reading(torch.full((Q, O), -torch.inf, dtype=torch.float64), torch.zeros(Q, O, dtype=torch.int64),
                  torch.empty(Q, n, C, dtype=model.dtype),
                  torch.zeros((Q, O, n, C) if pick is None else (Q, n, C), dtype=model.dtype))

    def work(indices):
        b = branch([prompts[q] for q in indices], [options[q] for q in indices], model.device)
        final, *states = model.packed(b.tokens, b.lengths, (None, *layers), b.tree)
        loglik = option_loglik(model, finite(model, final), b)
        out.loglik[indices, :loglik.shape[1]] = loglik.cpu()
        prompt_end = [ends[0] for ends in b.ends]
        if pick is None:
            where = [(q, o) for q, ends in zip(indices, b.ends) for o in range(len(ends) - 1)]
            item_end = [end for ends in b.ends for end in ends[1:]]
        else:
            where = [(q,) for q in indices]
            item_end = [ends[pick[q] + 1] for q, ends in zip(indices, b.ends)]
        for j, x in enumerate(states):
            out.prompt_state[indices, j] = finite(model, x[prompt_end]).cpu()
            out.item_state.select(-2, j)[tuple(zip(*where))] = finite(model, x[item_end]).cpu()

    for q, choices in enumerate(options):
        out.option_tokens[q, :len(choices)] = torch.tensor([len(option) for option in choices])
    sizes = [len(p) + sum(map(len, o)) for p, o in zip(prompts, options)]
    mine = in_batches(model, sizes, batch_tokens, work, progress)
    for x in (out.loglik, out.prompt_state, out.item_state):
        many.joined(x, mine)
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


def log_likelihood(model: Transformer, x: Tensor, before: list[int], target: Tensor) -> Tensor:
    """log p(target[n] | everything up to token before[n]) in float32, (n,), from final states x (P, C). At
    most CELLS logits exist at a time, also in the backward pass, which computes them again; and each state
    gets its own once: the end of a prompt serves all options."""
    where, back = torch.unique(torch.tensor(before, device=x.device), return_inverse=True)
    step, pieces, places = max(1, CELLS[x.device.type] // model.config.vocab), [], []
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


def home(model: Transformer, name: str) -> torch.device | str:
    """Where a finetuned tensor is kept: a block's of a network that is spread, in the machine's memory."""
    return "cpu" if name in model.host else model.device


def with_state(model: Transformer, state: dict[str, Tensor],
               lora_scale: float) -> tuple[Transformer, dict[str, Tensor]]:
    """The model with the tensors that finetuning put in place of its own or beside them (LoRA), and these."""
    learning = any(isinstance(x, nn.Parameter) for x in state.values())
    if not learning:
        state = {name: x.to(home(model, name)) for name, x in state.items()}
    if not learning and state.keys() <= {"classifier.weight"}:
        return model, state
    tuned = Transformer(model.config, model.params | model.host | state, dtype=model.dtype,
                        lora_scale=lora_scale)
    tuned.raw, tuned.folder, tuned.host, tuned.device = model.raw, model.folder, model.host, model.device
    if model.host and not learning:
        tuned.shard(set(), False)
    return tuned, state


def trained_tensors(student: "Student") -> dict[str, Tensor]:
    """Canonical name -> tensor; with classifier.weight, where there is one."""
    return student._state


@torch.no_grad()
def predictions(student: "Student", inputs: list, batch_tokens: int | None = None,
                progress: Callable | None = None) -> Tensor:
    """P(y = 1), (N,) float32 on the CPU, in input order. TrainError for states that are not finite."""
    out = torch.empty(len(inputs))

    def work(indices):
        p = student.log_p([inputs[i] for i in indices])[:, 1].exp()
        out[indices] = finite(student.model, p).cpu()

    sizes = [student.size(x) for x in inputs]
    return many.joined(out, in_batches(student.model, sizes, batch_tokens, work, progress))


class Classifier:
    """The student that reads a sequence; head classifier.weight (2, C) on the final state of its last token
    [D8], or on that state (C,) where it is given instead: all that a student of tune = "head" needs. state():
    the trained tensors; made again from them, it is the same bit for bit."""

    def __init__(self, model: Transformer, state: dict[str, Tensor], *, lora_scale: float = 1.0):
        self.model, self._state = with_state(model, state, lora_scale)

    def size(self, x: list[int] | Tensor) -> int:
        """Tokens of an input; a state counts as one."""
        return 1 if isinstance(x, Tensor) else len(x)

    def log_p(self, inputs: list) -> Tensor:
        """log P(y = 0), log P(y = 1), (B, 2) float32"""
        if isinstance(inputs[0], Tensor):
            x = torch.stack(inputs).to(self.model.device)
        else:
            tokens, lengths = pack(inputs, self.model.device)
            last = torch.tensor(lengths, device=self.model.device).cumsum(0) - 1
            x = self.model.packed(tokens, lengths, keep=last)[0]
        return F.linear(x.float(), self._state["classifier.weight"]).log_softmax(-1)

    state, predict = trained_tensors, predictions

    def save(self, folder: str) -> None:
        """See data.checkpoint.save: with the classifier's head."""
        save(self.model, Path(folder), self._state["classifier.weight"])


class Answerer:
    """The student that reads a question with all its options: P(y = 1) is the softmax over the options of
    their summed log-likelihoods, at the one shown. Untouched, it is the pretrained model's own belief. [D17]
    state() as a Classifier's."""

    def __init__(self, model: Transformer, state: dict[str, Tensor], *, lora_scale: float = 1.0):
        self.model, self._state = with_state(model, state, lora_scale)

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

    state, predict = trained_tensors, predictions

    def save(self, folder: str) -> None:
        """See data.checkpoint.save: with the language model's head."""
        save(self.model, Path(folder))


Student = Classifier | Answerer
STUDENTS = dict(classifier=Classifier, answer=Answerer)


def trainable(model: Transformer, tune: str, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Canonical name -> the float32 tensor that Adam owns, whatever the model's dtype. full: a copy of every
    weight but embedding and head, which are large, often one tensor, and few of whose rows are in use; lora:
    A, and B = 0, beside every linear map; head: none. Of several processes, the weight itself: many.shard
    copies a block's when it cuts it up."""
    params, out, alone = model.params | model.host, {}, many.size() == 1
    for name in [name for _, names, _ in tensors(model.config) for name in names]:
        stem, _, kind = name.rpartition(".")
        if tune == "full" and name not in ("embed.weight", "head.weight"):
            out[name] = params[name].detach()
            if alone:
                out[name] = out[name].to(torch.float32, copy=True)
        if tune == "lora" and kind == "weight" and re.search(r"\.(q|k|v|o|gate|up|down)$", stem):
            rows, columns = params[name].shape
            a = torch.randn(rank, columns, generator=generator) / columns ** 0.5
            out[stem + ".lora_a"], out[stem + ".lora_b"] = a, torch.zeros(rows, rank)
    return {name: nn.Parameter(x.to(model.device) if alone else x) for name, x in out.items()}


class Learner:
    """A student while it learns: its trained weights are float32 masters, whatever the model's dtype."""

    def __init__(self, model: Transformer, inputs: list, student: str, tune: str, rank: int,
                 lora_scale: float, generator: torch.Generator):
        self.model, self.inputs, self.lora_scale = model, inputs, lora_scale
        self.trained, self.used = {}, None
        if student == "classifier":
            head = torch.zeros(2, model.config.width, device=model.device)  # P(y = 1) = 1/2 [D8]
            self.trained["classifier.weight"] = nn.Parameter(head)
        self.trained |= trainable(model, tune, rank, generator)
        if student == "classifier" and tune == "full":
            self.train_used_rows()
        if tune == "head" and not isinstance(inputs[0], Tensor):
            self.inputs = list(hidden_at(model, inputs))
        self.student = STUDENTS[student](model, self.trained, lora_scale=lora_scale)
        self.sizes = [self.student.size(x) for x in self.inputs]

    def train_used_rows(self) -> None:
        """Trains the rows of the embedding that the sequences use; ids count those. The others never get a
        gradient: Adam would leave them alone, and need not hold moments for them."""
        self.used, ids = torch.unique(pack(self.inputs, self.model.device)[0], return_inverse=True)
        self.inputs = [x.tolist() for x in ids.split([len(s) for s in self.inputs])]
        self.trained["embed.weight"] = nn.Parameter(self.model.embed.weight.detach()[self.used].float())

    def shard(self, offload: bool) -> None:
        """Of several processes each keeps its share of the masters, and of what Adam holds for them; a
        classifier stays whole on all."""
        if many.size() == 1 or self.trained.keys() == {"classifier.weight"}:
            return
        network, masters = self.student.model, set(self.trained)
        for name in masters & set(network.params):  # or the whole ones would stay, beside their shares
            del self.trained[name]
        network.shard(masters, offload)
        self.trained |= {name: x for name, x in network.params.items() if name in masters}

    def log_p(self, indices: list[int]) -> Tensor:
        """log P(y = 0), log P(y = 1) of these inputs, (len(indices), 2) float32"""
        return self.student.log_p([self.inputs[i] for i in indices])

    def is_finite(self) -> bool:
        """All weights are, of all processes."""
        broken = sum(not many.share(x).isfinite().all() for x in self.trained.values())
        return not many.total(torch.tensor(broken))

    def finished(self) -> dict[str, Tensor]:
        """A student's state: weights in the model's dtypes, LoRA's B times its scale."""
        dtypes = {name: x.dtype for name, x in self.model.params.items()}
        dtypes["classifier.weight"] = torch.float32
        state = {}
        for name, x in self.trained.items():
            x = many.whole(x.detach())
            x = x * self.lora_scale if name.endswith("lora_b") else x
            state[name] = x.to(home(self.model, name), dtypes.get(name, self.model.dtype))
        if self.used is not None:
            whole = self.model.embed.weight.detach()
            state["embed.weight"] = whole.index_copy(0, self.used, state["embed.weight"].to(whole.device))
        return state


def finetune(model: Transformer, inputs: list, targets, *, lr: float, epochs: int = 2, batch: int = 32,
             seed: int, student: str = "classifier", tune: str = "full", target_fn: Callable | None = None,
             batch_tokens: int = TRAIN_TOKENS, rank: int = 8, lora_alpha: float = 16.0,
             checkpoint: bool = False, progress: Callable | None = None, offload: bool = False) -> Student:
    """Soft-label cross-entropy against targets (N,) = P(y = 1): Adam, no weight decay, cosine to 0 over all
    steps, no warm-up, no dropout, a new order each epoch (Burns et al. 2023, appendix A). Leaves model alone.

    student: classifier, inputs are sequences [D8], or answer, inputs are Choices [D17]. tune: full, lora (all
    linear maps) or head (of a classifier, whose inputs may be states instead); see trainable. target_fn(p, w,
    fraction) -> the targets of a step, from the student's own p (B,) on the whole batch, the given w (B,),
    and the fraction of steps done; targets may then be (N, S), and w is (B, S). Micro-batches hold at most
    batch_tokens tokens and, of one process, halve when memory runs out; gradients are always the whole
    batch's. checkpoint: recompute activations. offload: several processes keep masters and moments in the
    CPU's memory. progress(step, steps, loss) follows each step. TrainError: settings, a loss or weights not
    finite, no memory."""
    check_settings(student, tune, inputs)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(inputs), generator=generator).split(batch) for _ in range(epochs)]
    steps = [indices.tolist() for order in orders for indices in order]
    learner = Learner(model, inputs, student, tune, rank, lora_alpha / rank, generator)
    learner.student.model.recompute = checkpoint
    learner.shard(offload)
    adam = torch.optim.Adam(many.groups(learner.trained), lr=lr, betas=(0.9, 0.999), fused=True)
    given, budget = torch.as_tensor(targets, dtype=torch.float32, device=model.device), batch_tokens
    for step, indices in enumerate(steps):
        for group in adam.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        loss, fraction = None, step / len(steps)
        while loss is None:
            try:
                loss = gradients(learner, indices, given[indices], target_fn, fraction, budget)
            except RuntimeError as error:
                budget = smaller(budget, [learner.sizes[i] for i in indices], error, step + 1)
                adam.zero_grad()  # the step starts again from nothing
        if step == 0 and not math.isfinite(loss):  # nothing is learnt yet: are the model's states to blame?
            STUDENTS[student](model, learner.finished()).predict([inputs[i] for i in indices], budget)
        check_finite(math.isfinite(loss), f"the loss is {loss} at step {step + 1} of {len(steps)}", lr)
        adam.step()
        adam.zero_grad()
        if progress:
            progress(step + 1, len(steps), loss)
    check_finite(learner.is_finite(), f"weights are not finite after step {len(steps)}, the last", lr)
    state = learner.finished()
    del learner, adam, group  # what they hold is not needed beside the student
    return STUDENTS[student](model, state)


def check_finite(finite: bool, what: str, lr: float) -> None:
    """TrainError for what is not."""
    if not finite:
        raise TrainError(f"{what} (learning rate {lr}): lower it, or take bfloat16 if this is float16")


def check_settings(student: str, tune: str, inputs: list) -> None:
    """TrainError for what finetune does not know, or cannot do together."""
    if student not in STUDENTS or tune not in ("full", "lora", "head"):
        raise TrainError(f"tune = {tune!r}, student = {student!r}: they must be full, lora or head, and "
                         "classifier or answer")
    if student == "answer" and tune == "head":
        raise TrainError("the student that answers has no head to train alone: tune must be full or lora")
    if tune != "head" and isinstance(inputs[0], Tensor):
        raise TrainError(f"states can only have a head trained on them: tune must be head, not {tune}")


def smaller(budget: int, lengths: list[int], error: RuntimeError, step: int) -> int:
    """The next budget of tokens for a batch that ran out of memory. TrainError when a single sequence does;
    any other error is raised again."""
    if not out_of_memory(error) or many.size() > 1:  # the others would not halve theirs
        raise error
    if budget < max(lengths):
        raise TrainError(f"out of memory at step {step} with one sequence of {max(lengths)} tokens: tune "
                         "less (lora, head) or recompute activations") from None
    return min(budget, sum(lengths)) // 2


def gradients(learner: Learner, indices: list[int], w: Tensor, target_fn, fraction: float,
              budget: int) -> float:
    """Adds the gradients of a batch's mean cross-entropy against w (B,), or what target_fn makes of w, one
    backward pass per micro-batch; the loss. target_fn needs p of the whole batch before any gradient: several
    micro-batches run twice. Of several processes each takes items of about as many tokens, and as many
    micro-batches, the last ones maybe of no item: they gather the weights together."""
    sizes = [learner.sizes[i] for i in indices]
    dealt = [[[share[j] for j in part] for part in batches([sizes[i] for i in share], budget)]
             for share in many.shares(sizes, many.size())]  # by process, micro-batch: indices into indices
    micro, rounds = dealt[many.rank()], max(map(len, dealt))
    micro += [[]] * (rounds - len(micro))
    parts = [[indices[j] for j in part] or indices[:1] for part in micro]  # what is computed; of no item, one
    alone = learner.log_p(parts[0]) if rounds == 1 else None
    target, total = w, 0.0
    # a float16 gradient below 6e-8 would be 0; a power of two changes no other bit
    scale = 1024 if learner.student.model.dtype == torch.float16 else 1
    if target_fn:
        p = w.new_zeros(len(w))
        with torch.no_grad():
            for part, chosen in zip(micro, parts):
                log_p = learner.log_p(chosen) if alone is None else alone
                p[part] = log_p[:len(part), 1].exp()
        target = target_fn(many.total(p), w, fraction)
    for part, chosen in zip(micro, parts):
        log_p = learner.log_p(chosen) if alone is None else alone  # (len(chosen), 2)
        y = target[part]
        loss = -(torch.stack([1 - y, y], -1) * log_p[:len(part)]).sum() / len(indices)
        (many.size() * scale * loss).backward()  # FSDP2 takes the mean over processes
        total += loss.item()
    for x in learner.trained.values():
        if many.size() > 1 and many.share(x) is x:  # whole on all
            many.total(x.grad).div_(many.size())
        if scale > 1:
            x.grad /= scale
    return float(many.total(torch.tensor(total, dtype=torch.float64)))

