"""model.py against transformers and against itself.

Run: pytest tests/test_model.py (about 40 s on two cores).

Parity goes through saved files with shaken weights (at the usual initialisation most mistakes are invisible),
on ragged right-padded batches longer than every window, for every layer, the logits and all gradients, at
assert_close's defaults. Each fact of the family table is then flipped once and parity must fail. Real files
are read from ../shared when it is there.
"""
import copy
import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as M

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
SHARED = Path(__file__).resolve().parents[2] / "shared"
CLOSE = torch.testing.assert_close

# sizes: no two alike where it matters, grouped heads (two groups of three), head_dim * heads != width,
# window < T
SIZE = dict(vocab_size=101, hidden_size=42, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=None,
            bos_token_id=None, eos_token_id=None)
PLAIN = {k: v for k, v in SIZE.items() if k not in ("num_key_value_heads", "head_dim")} | dict(
    hidden_size=48, num_attention_heads=3)
GPT2 = dict(vocab_size=101, n_positions=64, n_embd=40, n_layer=3, n_head=5, bos_token_id=None,
            eos_token_id=None)
NEO = dict(vocab_size=101, max_position_embeddings=64, hidden_size=40, num_layers=3, num_heads=5,
           window_size=8, attention_types=[[["global", "local"], 1], [["local"], 1]], bos_token_id=None,
           eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=8)

VARIANTS = {  # name: (model_type, transformers configuration)
    "gpt2": ("gpt2", GPT2),
    "gpt2-erf": ("gpt2", GPT2 | dict(activation_function="gelu", n_inner=56, tie_word_embeddings=False)),
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neox": ("gpt_neox", PLAIN | dict(rotary_pct=0.5)),
    "gpt_neox-serial": ("gpt_neox", PLAIN | dict(use_parallel_residual=False, hidden_act="gelu_fast",
                                                 attention_bias=False)),
    "opt": ("opt", {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | dict(
        ffn_dim=56, word_embed_proj_dim=48)),
    "llama": ("llama", SIZE),
    "llama-biased": ("llama", SIZE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                                          rms_norm_eps=1e-5)),
    "llama-llama3": ("llama", SIZE | dict(rope_parameters=LLAMA3)),
    "llama-linear": ("llama", SIZE | dict(rope_parameters=dict(rope_type="linear", factor=4.0,
                                                               rope_theta=5e4))),
    "mistral": ("mistral", SIZE | dict(sliding_window=8)),
    "mistral-full": ("mistral", SIZE | dict(sliding_window=None)),
    "qwen2": ("qwen2", SIZE | dict(sliding_window=8, use_sliding_window=False)),
    "qwen2-window": ("qwen2", SIZE | dict(sliding_window=8, use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("qwen3", SIZE),
    "gemma": ("gemma", SIZE),
    "gemma2": ("gemma2", SIZE | ALTERNATE | dict(query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
                                                 final_logit_softcapping=5.0)),
    "gemma3_text": ("gemma3_text", SIZE | ALTERNATE | dict(query_pre_attn_scalar=24, rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "olmo2": ("olmo2", SIZE),
    "phi3": ("phi3", SIZE | dict(sliding_window=8)),
    # transformers has no class for it: see first_generation
    "qwen": ("qwen2", PLAIN | dict(num_key_value_heads=3)),
}


def shake(net):
    """Weights as far from their initial values as keeps activations of size one: nothing may sit at 0
    or 1."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim == 1:
                p += 0.3 * noise
            elif re.search(r"embed|wte|wpe", name):
                # large logits have large rounding errors
                p.copy_(noise / 2 if net.config.tie_word_embeddings else noise)
            else:
                p.copy_(noise / (p.shape[0] if re.search(r"\bh\..*c_(attn|proj|fc)", name)
                                 else p.shape[1]) ** 0.5)


def first_generation(folder):
    """Rewrites a saved Qwen2 checkpoint in the layout of first-generation Qwen."""
    old, new = load_file(folder / "model.safetensors"), {}
    raw = json.loads((folder / "config.json").read_text())
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
    for i in range(3):
        a, b = f"model.layers.{i}.", f"transformer.h.{i}."
        names |= {a + "input_layernorm": b + "ln_1", a + "post_attention_layernorm": b + "ln_2",
                  a + "self_attn.o_proj": b + "attn.c_proj", a + "mlp.up_proj": b + "mlp.w1",
                  a + "mlp.gate_proj": b + "mlp.w2", a + "mlp.down_proj": b + "mlp.c_proj"}
        for kind in ("weight", "bias"):
            new[f"{b}attn.c_attn.{kind}"] = torch.cat([old.pop(f"{a}self_attn.{part}_proj.{kind}")
                                                       for part in "qkv"])
    new |= {names[name.rpartition(".")[0]] + ".weight": x for name, x in old.items()}
    save_file(new, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen", vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=3,
        kv_channels=16, seq_length=64, max_position_embeddings=128, intermediate_size=112,
        layer_norm_epsilon=raw["rms_norm_eps"], rotary_emb_base=10000, rotary_pct=1.0, no_bias=True,
        use_logn_attn=True, use_dynamic_ntk=True, use_flash_attn="auto", bf16=True,
        tie_word_embeddings=False)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """variant -> (folder, what transformers computes, gradients under canonical names); each is made once."""
    made = {}

    def make(variant):
        if variant not in made:
            made[variant] = compute(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return make


LENGTHS = torch.tensor([31, 7, 43, 31])
TOKENS = torch.randint(0, 101, (4, 43), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(43) < LENGTHS[:, None]
PULL = torch.randn(4, 43, 101, generator=torch.Generator().manual_seed(2)) / REAL.sum()  # d loss / d logits


def tokenizer_file(folder, ids=3):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({str(i): i for i in range(ids)}, unk_token="0")).save(
        str(folder / "tokenizer.json"))


def save(net, folder, variant, **kwargs):
    net.save_pretrained(folder, **kwargs)
    tokenizer_file(folder)
    if variant == "qwen":
        first_generation(folder)


def compute(variant, folder):
    kind, numbers = VARIANTS[variant]
    net = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **numbers), attn_implementation="eager").eval()
    shake(net)
    save(net, folder, variant, max_shard_size="20KB" if variant == "llama" else "5GB")
    row, caught = M.FAMILIES[kind], []
    net.get_submodule(row["prefix"] + row["names"]["norm"]).register_forward_pre_hook(
        lambda _, args: caught.append(args[0]))
    out = net(TOKENS, attention_mask=REAL.long(), output_hidden_states=True)
    states = [x[REAL] for x in (*out.hidden_states[:-1], caught[0], out.hidden_states[-1], out.logits)]
    (out.logits * PULL)[REAL].sum().backward()
    twin = copy.deepcopy(net)
    for p, q in zip(net.parameters(), twin.parameters()):
        q.data = p.grad
    (folder / "grad").mkdir()
    save(twin, folder / "grad", variant)
    raw = json.loads((folder / "config.json").read_text())
    config = M.configure(raw)
    grads, _ = M.read_params(config, M.tensor_files(folder / "grad"), "cpu", torch.float32)
    if M.FAMILIES[config.family].get("plus_one"):
        grads = {k: x - 1 if "norm" in k or "post" in k else x for k, x in grads.items()}
    count = sum(p.numel() for p in net.parameters())
    return folder, [x.detach() for x in states], grads, count


def ours(net):
    """The same list as compute's: every layer's states, final states, logits, all on real tokens."""
    tokens, lengths = TOKENS[REAL], LENGTHS.tolist()
    *states, final = net.packed(tokens, lengths, (*range(net.config.layers + 1), None))
    return [*states, final, net.logits(final)]


def parity(net, states, grads):
    for p in net.params.values():
        p.requires_grad_()
    got = ours(net)
    for i, (a, b) in enumerate(zip(got, states, strict=True)):
        CLOSE(a, b, msg=lambda m, i=i: f"state {i}: {m}")
    (got[-1] * PULL[REAL]).sum().backward()
    assert net.params.keys() == grads.keys()
    for name, p in net.params.items():
        CLOSE(p.grad, grads[name], msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant, reference):
    folder, states, grads, count = reference(variant)
    net, _ = M.load(folder)
    assert sum(p.numel() for p in net.params.values()) == count
    parity(net, states, grads)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_parity_by_convolution(variant, reference, monkeypatch):
    """What oneDNN computes for batches of a thousand tokens and more, on the small ones of this file."""
    seen, real = [], F.conv2d
    monkeypatch.setattr(M.F, "conv2d", lambda *args: seen.append(args[1].shape) or real(*args))
    folder, states, grads, _ = reference(variant)
    net, _ = M.load(folder)
    parity(net, states, grads)
    assert not seen
    monkeypatch.setattr(M, "ONEDNN_TOKENS", 1)
    parity(M.load(folder)[0], states, grads)
    seen.clear()
    frozen, _ = M.load(folder)
    weight = frozen.params[f"layers.{frozen.config.layers - 1}.down.weight"].requires_grad_()
    ours(frozen)[-1].sum().backward()  # nothing below is trained: no gradient of an input is computed
    assert weight.grad.any() and len(seen) == (6 if variant == "gpt2" else 7) * net.config.layers


@pytest.mark.parametrize("least", [0.7, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_in_padded_runs(variant, least, reference, monkeypatch):
    """How attention unpacks a batch on a GPU: runs of about equal length, or the whole batch."""
    monkeypatch.setitem(M.ALIKE, "cpu", least)
    folder, states, grads, _ = reference(variant)
    parity(M.load(folder)[0], states, grads)
    batch = M.Batch(LENGTHS.tolist(), None, set(), None, torch.device("cpu"))
    assert batch.padded and batch.runs == ([(1, 31), (1, 7), (2, 43)] if least == 0.7 else [(4, 43)])


def test_runs_of_about_equal_length():
    assert M.alike([5, 5, 4, 4, 5, 3], 1.0) == [[5, 5], [4, 4], [5], [3]]
    assert M.alike([10, 8, 9, 7, 8, 20, 16, 15], 0.8) == [[10, 8, 9], [7, 8], [20, 16], [15]]
    assert M.alike([8, 10, 7], 0.8) == [[8, 10], [7]]  # the longest may come later


@pytest.mark.parametrize("least", [1.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_kept_token_a_sequence(variant, least, reference, monkeypatch):
    """In the last block only the kept tokens look: with windows, caps, biases, at any place."""
    monkeypatch.setitem(M.ALIKE, "cpu", least)
    net, _ = M.load(reference(variant)[0])
    tokens, lengths = TOKENS[REAL], LENGTHS.tolist()
    starts = LENGTHS.cumsum(0) - LENGTHS
    for at in (LENGTHS - 1, LENGTHS // 2, LENGTHS * 0):
        keep = starts + at
        for layers in ((None,), (2, None), (1,)):
            want = net.packed(tokens, lengths, layers)
            for a, b in zip(net.packed(tokens, lengths, layers, keep=keep), want, strict=True):
                CLOSE(a, b[keep])


# ---- every fact of the table, flipped ----------------------------------------------------------------------

def change(**fields):
    return lambda net: setattr(net, "config", dataclasses.replace(net.config, **fields))


def drop(pattern):
    return lambda net: [net.params.pop(name) for name in list(net.params) if re.search(pattern, name)]


def swap(a, b):
    def mutate(net):
        for name in [name for name in net.params if f".{a}." in name]:
            other = name.replace(f".{a}.", f".{b}.")
            net.params[name], net.params[other] = net.params[other], net.params[name]
    return mutate


def rope(**fields):
    """base, rotated, scaling of the full blocks, or local for the window blocks."""
    def mutate(net):
        base, rotated, scaling = net.config.rope
        new = (fields.get("base", base), fields.get("rotated", rotated), fields.get("scaling", scaling))
        net.config = dataclasses.replace(net.config, rope=new, local_rope=fields.get("local", new))
    return mutate


def row(**literals):
    return literals


def interleaved(x, cos, sin):
    R = cos.shape[-1]
    a, b, rest, cos, sin = x[..., 0:R:2], x[..., 1:R:2], x[..., R:], cos[..., R // 2:], sin[..., R // 2:]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], -1)


LINEAR3 = (("factor", 8.0),)
MUTATIONS = {
    "tanh GELU read as erf": ("gpt2", change(act="gelu")),
    "erf GELU read as tanh": ("gpt2-erf", change(act="gelu_new")),
    "LayerNorm eps": ("gpt2", change(eps=1e-6)),
    "LayerNorm bias lost": ("gpt2", drop(r"norm1\.bias")),
    "fused bias lost": ("gpt2", drop(r"\.[qkv]\.bias")),
    "output bias lost": ("gpt2", drop(r"\.o\.bias")),
    "positions lost": ("gpt2", drop(r"pos\.weight")),
    "positions off by one": ("gpt2", row(pos_offset=1)),
    "norms swapped, gpt2": ("gpt2", swap("norm1", "norm2")),
    "q and k swapped": ("gpt2", swap("q", "k")),
    "final norm lost": ("gpt2", drop(r"^norm\.")),
    "own head taken for tied": ("gpt2-erf", drop(r"^head\.")),
    "scores scaled, gpt_neo": ("gpt_neo", change(scale=8 ** -0.5)),
    "window ignored, gpt_neo": ("gpt_neo", change(windows=(None,) * 3)),
    "window one more, gpt_neo": ("gpt_neo", change(windows=(None, 9, 9))),
    "local and global swapped": ("gpt_neo", change(windows=(8, None, None))),
    "tanh for erf, gpt_neox": ("gpt_neox", change(act="gelu_new")),
    "serial for parallel": ("gpt_neox", change(parallel=False)),
    "parallel for serial": ("gpt_neox-serial", change(parallel=True)),
    "RoPE base": ("gpt_neox", rope(base=1e5)),
    "all channels rotated": ("gpt_neox", rope(rotated=16)),
    "pairs interleaved, gpt_neox": ("gpt_neox", interleaved),
    "fused rows in blocks, gpt_neox": ("gpt_neox", row(per_head=False)),
    "position offset, opt": ("opt", row(pos_offset=0)),
    "GELU for ReLU": ("opt", change(act="gelu")),
    "RMSNorm eps": ("llama", change(eps=1e-5)),
    "norms swapped, llama": ("llama", swap("norm1", "norm2")),
    "pairs interleaved, llama": ("llama", interleaved),
    "kv heads tiled": ("llama", "tile"),
    "scores scaled by width / heads": ("llama", change(scale=7 ** -0.5)),
    "gate and up swapped": ("llama", swap("gate", "up")),
    "GELU for SiLU": ("llama", change(act="gelu")),
    "q bias lost": ("llama-biased", drop(r"q\.bias")),
    "down bias lost": ("llama-biased", drop(r"down\.bias")),
    "llama3 scaling ignored": ("llama-llama3", rope(scaling=())),
    "llama3 scaling read as linear": ("llama-llama3", rope(scaling=LINEAR3)),
    "linear scaling ignored": ("llama-linear", rope(scaling=())),
    "window ignored, mistral": ("mistral", change(windows=(None,) * 3)),
    "window one more, mistral": ("mistral", change(windows=(9,) * 3)),
    "window one less, mistral": ("mistral", change(windows=(7,) * 3)),
    "window where none is": ("mistral-full", change(windows=(8,) * 3)),
    "inert window used, qwen2": ("qwen2", change(windows=(None, None, 8))),
    "v bias lost, qwen2": ("qwen2", drop(r"v\.bias")),
    "k bias lost, qwen2": ("qwen2", drop(r"k\.bias")),
    "max_window_layers turned round": ("qwen2-window", change(windows=(8, None, None))),
    "q_norm lost": ("qwen3", drop("q_norm")),
    "k_norm lost": ("qwen3", drop("k_norm")),
    "q_norm and k_norm swapped": ("qwen3", swap("q_norm", "k_norm")),
    "embedding scale lost": ("gemma", row(embed_scale=False)),
    "1 + w lost": ("gemma", row(plus_one=False)),
    "erf for tanh, gemma": ("gemma", change(act="gelu")),
    "score cap lost": ("gemma2", change(attn_cap=None)),
    "logit cap lost": ("gemma2", change(logit_cap=None)),
    "scores scaled by head_dim": ("gemma2", change(scale=16 ** -0.5)),
    "post norm 1 lost": ("gemma2", drop("post1")),
    "post norm 2 lost": ("gemma2", drop("post2")),
    "alternation turned round": ("gemma2", change(windows=(None, 8, None))),
    "local base read as global": ("gemma3_text", rope()),
    "global scaling ignored": ("gemma3_text", rope(scaling=(), local=(1e4, 16, ()))),
    "local turns scaled too": ("gemma3_text", rope(local=(1e4, 16, LINEAR3))),
    "q_norm lost, olmo2": ("olmo2", drop("q_norm")),
    "eps, olmo2": ("olmo2", change(eps=1e-6)),
    "window ignored, phi3": ("phi3", change(windows=(None,) * 3)),
    "w1 and w2 swapped": ("qwen", swap("gate", "up")),
    "c_attn bias lost": ("qwen", drop(r"\.[qkv]\.bias")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, reference, monkeypatch):
    """A test of test_parity: with one fact wrong it must fail."""
    variant, mutate = MUTATIONS[name]
    folder, states, grads, _ = reference(variant)
    if isinstance(mutate, dict):
        family = json.loads((folder / "config.json").read_text())["model_type"]
        monkeypatch.setitem(M.FAMILIES, family, M.FAMILIES[family] | mutate)
    elif mutate == "tile":
        monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, n, 1))
    elif mutate is interleaved:
        monkeypatch.setattr(M, "rotate", interleaved)
    if name == "position offset, opt":  # the table's rows stay, only the offset goes
        monkeypatch.setattr(M, "tensors", lambda c, real=M.tensors: [
            (s, n, [(66, 48)] if n == ["pos.weight"] else shape) for s, n, shape in real(c)])
    if name == "positions off by one":
        monkeypatch.setattr(M, "tensors", lambda c, real=M.tensors: [
            (s, n, [(64, 40)] if n == ["pos.weight"] else shape) for s, n, shape in real(c)])
    net, _ = M.load(folder)
    if callable(mutate) and mutate is not interleaved:
        mutate(net)
    with pytest.raises(AssertionError):
        parity(net, states, grads)


# ---- real files --------------------------------------------------------------------------------------------

def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


REFUSED = {"bigscience__bloom-560m": "model_type 'bloom'",
           "tiiuae__falcon-7b": "model_type 'RefinedWebModel'",
           "microsoft__phi-1": "model_type 'phi'",
           "OpenAssistant__oasst-rm-pythia-1.4b": "model_type 'gpt_neox_reward_model'",
           "gpt2_gptq-4bit_variant": "quantised",
           "hf-internal-testing__tiny-random-gpt2": "unknown key 'hidden_act'"}
HUB = sorted(p.parent.name for p in SHARED.glob("hub/*/config.json")) or ["none here"]


@pytest.mark.parametrize("name", HUB)
def test_real_config(name):
    """A real config.json gives the parameter count that transformers has for it, or a refusal with the
    reason."""
    raw = json.loads(shared("hub", name, "config.json").read_text())
    if name in REFUSED:
        with pytest.raises(M.LoadError, match=REFUSED[name]):
            M.configure(raw)
        return
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    count = sum(torch.Size(shape).numel() for _, _, shapes in M.tensors(M.configure(raw)) for shape in shapes)
    assert count == sum(p.numel() for p in theirs.parameters())


def test_real_index():
    raw = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded", "config.json").read_text())
    index = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded",
                              "model.safetensors.index.json").read_text())
    prefix = M.FAMILIES["llama"]["prefix"]
    assert {prefix + source for source, _, _ in M.tensors(M.configure(raw))} == set(index["weight_map"])


STORY = ("Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
         "One day, she saw a big, red ball. She wanted to play with it, but it was too high")


def test_real_model_continues_its_story():
    net, tokenizer = M.load(str(shared("checkpoints", "stories260K")))
    ids = [1]
    with torch.no_grad():
        while len(ids) < 61:
            ids.append(int(net.logits(net.packed(torch.tensor(ids), [len(ids)])[0][-1]).argmax()))
    assert tokenizer.decode(ids[1:]) == STORY
    assert tokenizer.encode([STORY]) == [ids[1:]]


AWKWARD = ["", " ", "  two", "a  b   c", "\n", "a\n\nb \n", "\t x", "Hello world", " hello",
           "it's they'll WE'RE", "1234567890 3.14",
           "naïve café", "e\u0301", "日本語のテキスト", "中文，标点。",
           "🙂👩‍👩‍👧", "مرحبا",
           "<|endoftext|>", "a<|endoftext|>b", "<|im_start|>user", "</s> <s>",
           "foo_bar(x)[0] != {y};", "http://a.b/c?d=e&f", "A" * 40, "\u200b\ufeff", "Q: what? A: yes",
           "...!!!", "½ ² ①", "\r\n\r\n  x"]


@pytest.mark.parametrize("files, family", [
    ("hub/tokenizers/gpt2 tokenizer.json", "gpt2"),
    ("hub/tokenizers/gpt-neox-20b tokenizer.json", "gpt_neox"),
    ("hub/tokenizers/gpt2 vocab.json merges.txt", "gpt2"),
    ("hub/Qwen__Qwen2.5-0.5B vocab.json merges.txt tokenizer_config.json", "qwen2"),
    ("checkpoints/sciq-weak tokenizer.json", "llama"), ("checkpoints/stories260K tokenizer.json", "llama")])
def test_token_ids(files, family, tmp_path):
    folder, *names = files.split()
    for name in names:
        (tmp_path / name).symlink_to(shared(folder, name))
    if names == ["tokenizer.json"]:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / names[0]))
    else:
        theirs = {"gpt2": transformers.GPT2Tokenizer,
                  "qwen2": transformers.Qwen2Tokenizer}[family].from_pretrained(tmp_path)
    tokenizer = M.Tokenizer(tmp_path, family)
    assert tokenizer.encode(AWKWARD) == [theirs(text)["input_ids"] for text in AWKWARD]
    assert tokenizer.encode(AWKWARD, special=False) == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in AWKWARD]
    assert tokenizer.size == len(theirs)
    ids = tokenizer.encode(["The park's 3 dogs,\n naïve 🙂"])[0]
    assert tokenizer.decode(ids) == "The park's 3 dogs,\n naïve 🙂"


def test_qwen_tiktoken_ids(tmp_path):
    """First-generation Qwen has the second's vocabulary, kept as ranks: rebuilt from them, ids must be
    the same."""
    vocab = json.loads(shared("hub", "Qwen__Qwen2.5-0.5B", "vocab.json").read_text())
    letters = {c: b for b, c in M.byte_letters().items()}
    with open(tmp_path / "qwen.tiktoken", "wb") as file:
        for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
            file.write(M.base64.b64encode(bytes(letters[c] for c in token)) + f" {rank}\n".encode())
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "second").mkdir(exist_ok=True)
        (tmp_path / "second" / name).symlink_to(shared("hub", "Qwen__Qwen2.5-0.5B", name))
    first, second = M.Tokenizer(tmp_path, "qwen"), M.Tokenizer(tmp_path / "second", "qwen2")
    assert first.encode(AWKWARD) == second.encode(AWKWARD)
    assert first.size == 151851  # 151,643 ranks, 3 named and 205 extra special tokens
    assert first.encode(["<|extra_204|>"]) == [[151850]]


@pytest.mark.parametrize("settings, more, family", [
    (dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True), {}, "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_eos_token=True, pad_token="[PAD]"), {},
     "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer", additional_special_tokens=["<mask>"]), {}, "gpt_neo"),
    (dict(tokenizer_class="GPT2Tokenizer"), {"added_tokens.json": {"[PAD]": 50257},
     "special_tokens_map.json": {"pad_token": "[PAD]", "bos_token": "<s>"}}, "gpt2"),
    (dict(tokenizer_class="GPT2Tokenizer"), {}, "qwen2"),
    (dict(tokenizer_class="GPT2Tokenizer"), {}, "llama"),
    (dict(tokenizer_class="Qwen2Tokenizer"), {}, "llama")])
def test_token_ids_with_settings(settings, more, family, tmp_path):
    """What tokenizer_config.json and older files beside it say of vocab.json and merges.txt."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(shared("hub", "tokenizers", "gpt2", name))
    for name, content in (more | {"tokenizer_config.json": settings,
                                  "config.json": dict(model_type=family)}).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = M.Tokenizer(tmp_path, family)
    texts = AWKWARD + ["[PAD]", "<s> hi</s>", "<mask> ", "a [PAD]b", "x<|endoftext|> y", "I'M don'T 1234"]
    assert tokenizer.encode(texts) == [theirs(text)["input_ids"] for text in texts]
    assert tokenizer.size == len(theirs)


@pytest.mark.parametrize("names", ["tokenizer.json", "vocab.json merges.txt"])
def test_a_prefix_space_that_is_asked_for_only_is_refused(names, tmp_path):
    for name in names.split():
        (tmp_path / name).symlink_to(shared("hub", "tokenizers", "gpt2", name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(add_prefix_space=True)))
    with pytest.raises(M.LoadError, match="add_prefix_space"):
        M.Tokenizer(tmp_path, "gpt2")


def test_bos_of_vocab_and_merges(tmp_path):
    """OPT's files put </s> before a text by tokenizer_config.json alone."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "</s>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        bos_token={"content": "</s>"}, eos_token="</s>", add_bos_token=True)))
    tokenizer = M.Tokenizer(tmp_path, "opt")
    assert (tokenizer.encode(["abba"]) == [[3, 2, 1, 0]]
            and tokenizer.encode(["abba"], special=False) == [[2, 1, 0]])


# ---- what must be refused ----------------------------------------------------------------------------------

def tensors(edit):
    def mutate(folder):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")
    return mutate


def settings(**keys):
    def mutate(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | keys))
    return mutate


def sharded(weight_map):
    def mutate(folder):
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map(names))))
    return mutate


def cut(name, share):
    def mutate(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * share)])
    return mutate


def poison(state):
    state["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("nan")


WTE = "transformer.wte.weight"
BAD = {
    "missing tensor": (tensors(lambda s: s.pop("transformer.h.1.attn.c_attn.bias")),
                       r"tensor h\.1\.attn\.c_attn\.bias is missing"),
    "extra tensor": (tensors(lambda s: s.update(odd=torch.ones(1))),
                     "1 unexpected tensors, the first is odd"),
    "wrong shape": (tensors(lambda s: s.update({WTE: torch.ones(90, 40)})),
                    r"wte\.weight has shape \(90, 40\)"),
    "tensor twice": (tensors(lambda s: s.update({"wte.weight": s[WTE].clone()})),
                     "both with and without the prefix"),
    "tied head that differs": (tensors(lambda s: s.update({"lm_head.weight": s[WTE] + 1})), "ties the head"),
    "NaN": (tensors(poison), "holds NaN or infinity"),
    "integers": (tensors(lambda s: s.update({WTE: s[WTE].to(torch.int8)})), "int8: quantised"),
    "truncated": (cut("model.safetensors", 0.9), "truncated or damaged"),
    "truncated in the header": (cut("model.safetensors", 0.01), "truncated or damaged"),
    "empty file": (cut("model.safetensors", 0), "truncated or damaged"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                    "pickle checkpoints are refused"),
    "unknown key": (settings(new_trick=0.5), "unknown key 'new_trick'"),
    "value not supported": (settings(scale_attn_by_inverse_layer_idx=True),
                            "scale_attn_by_inverse_layer_idx = True is not supported"),
    "mixture of experts": (settings(model_type="mixtral"),
                           "model_type 'mixtral' is not supported, only gpt2"),
    "no family": (settings(model_type=None), "model_type None"),
    "quantised": (settings(quantization_config=dict(bits=4)), "quantised checkpoints are refused"),
    "activation": (settings(activation_function="relu6"), "activation 'relu6' is not supported"),
    "number of the wrong type": (settings(n_layer="three"), "wrong type"),
    "no number": (settings(n_layer=None), "wrong type"),
    "absurd number": (settings(n_head=0), "wrong type"),
    "config not JSON": (cut("config.json", 0.5), "config.json: not valid JSON"),
    "config not an object": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json there"),
    "index that leaves the directory": (sharded(lambda s: {k: "../x.safetensors" for k in s}),
                                        "plain file names"),
    "index of numbers": (sharded(lambda s: {k: 1 for k in s}), "plain file names"),
    "index without a map": (sharded(lambda s: None), "weight_map"),
    "index naming a missing file": (sharded(lambda s: {k: "model-2.safetensors" for k in s}),
                                    "model-2.safetensors: missing"),
    "index that names too much": (sharded(lambda s: {k: "model.safetensors" for k in [*s, "zz"]}),
                                  "disagree, first on zz"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json there"),
    "tokenizer damaged": (cut("tokenizer.json", 0.7), "tokenizer's files are damaged"),
    "tokenizer too large": (lambda f: tokenizer_file(f, 102), "102 ids, the embedding 101 rows"),
}


@pytest.fixture(scope="module")
def tiny(reference):
    return reference("gpt2")[0]


@pytest.mark.parametrize("name", BAD)
def test_refused(name, tiny, tmp_path):
    """One line that names the place."""
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    mutate, message = BAD[name]
    mutate(tmp_path)
    with pytest.raises(M.LoadError, match=message) as caught:
        M.load(str(tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_refused_settings_of_other_families():
    base = dict(model_type="llama")
    for keys, message in [(dict(rope_scaling=dict(type="yarn", factor=2.0)), "RoPE scaling 'yarn'"),
                          (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "RoPE scaling 'llama3'"),
                          (dict(model_type="opt", do_layer_norm_before=False),
                           "do_layer_norm_before = False"),
                          (dict(model_type="gemma2", layer_types=["linear_attention"] * 26), "layer_types"),
                          (dict(model_type="gemma3_text", attn_logit_softcapping=50.0),
                           "attn_logit_softcapping"),
                          (dict(model_type="gemma3_text", use_bidirectional_attention=True),
                           "use_bidirectional_attention"),
                          (dict(model_type="gpt2", n_layer=3, num_hidden_layers=2),
                           "n_layer and num_hidden_layers disagree"),
                          (dict(rope_parameters=dict(rope_type="default"),
                                rope_scaling=dict(rope_type="linear", factor=2.0)), "rope_scaling and rope"),
                          (dict(model_type="gemma3_text", rope_parameters=dict(rope_type="default")),
                           "must have full_attention and sliding"),
                          (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
                           "with .'partial_rotary_factor'. is not supported")]:
        with pytest.raises(M.LoadError, match=message):
            M.configure(base | keys)


@pytest.mark.parametrize("family, key, value", [
    ("llama", "partial_rotary_factor", 0.5), ("qwen3", "partial_rotary_factor", 0.5),
    ("gemma2", "partial_rotary_factor", 0.5), ("llama", "rotary_emb_base", 500),
    ("llama", "layer_norm_eps", 0.01), ("llama", "activation_function", "gelu"), ("llama", "num_layers", 2),
    ("llama", "n_positions", 8), ("gpt_neox", "rope_theta", 500), ("gpt_neox", "partial_rotary_factor", 0.5),
    ("gpt_neox", "rms_norm_eps", 0.01), ("gpt2", "hidden_act", "relu"), ("gpt2", "intermediate_size", 8),
    ("opt", "layer_norm_eps", 0.01), ("opt", "attention_bias", False), ("gemma", "hidden_activation", "relu"),
    ("gemma2", "hidden_act", "relu"), ("gemma3_text", "hidden_act", "gelu"), ("mistral", "window_size", 8),
    ("mistral", "layer_types", ["full_attention"] * 32), ("phi3", "layer_types", ["full_attention"] * 32),
    ("mistral", "attention_bias", True), ("qwen2", "attention_bias", True), ("qwen3", "mlp_bias", True)])
def test_keys_that_a_family_does_not_read_are_refused(family, key, value):
    """transformers ignores them there; they are another family's, or a mistake."""
    with pytest.raises(M.LoadError, match=f"key '{key}'|{key} = "):
        M.configure({"model_type": family, key: value})


def test_keys_that_say_what_is_so_are_taken():
    for same in (dict(model_type="llama", partial_rotary_factor=1.0),
                 dict(model_type="gpt_neox", rotary_emb_base=500, rope_theta=500, partial_rotary_factor=0.25),
                 dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh"),
                 dict(model_type="gemma", hidden_act="gelu", hidden_activation=None),
                 dict(model_type="mistral", attention_bias=False)):
        M.configure(same)
    assert M.configure(dict(model_type="gemma2", hidden_activation="gelu")).act == "gelu"  # and not tanh


def test_absent_keys_take_the_family_default():
    config = M.configure(dict(model_type="gpt_neox"))
    assert config.parallel and config.rope[1] == 24 and config.heads == 64  # 0.25 of 96
    assert M.configure(dict(model_type="mistral")).windows == (4096,) * 32
    assert M.configure(dict(model_type="mistral", sliding_window=None)).windows == (None,) * 32
    assert M.configure(dict(model_type="qwen2", sliding_window=32768)).windows == (None,) * 32
    assert M.configure(dict(model_type="gemma", hidden_act="gelu")).act == "gelu_pytorch_tanh"
    assert M.configure(dict(model_type="gemma3_text")).windows[:7] == (4096,) * 5 + (None, 4096)
    assert M.configure(dict(model_type="gpt_neo")).windows[:4] == (None, 256, None, 256)


@pytest.mark.parametrize("family", [family for family in M.FAMILIES if family != "qwen"])
def test_every_default_is_transformers_own(family):
    import transformers
    theirs, compared = transformers.AutoConfig.for_model(family), 0
    for field, mine in M.FAMILIES[family]["numbers"].items():
        keys = M.keys_of(M.FAMILIES[family], field)
        given = [getattr(theirs, key) for key in keys if getattr(theirs, key, None) is not None]
        if given and mine is not None:  # None: follows from others, and is tested with them
            assert given == [mine] * len(given), field
            compared += 1
    assert compared >= 8


def test_what_does_not_fit_into_float16_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "big")
    state = load_file(tiny / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.weight"][0, 0] = 7e4
    save_file(state, tmp_path / "big" / "model.safetensors")
    M.load(tmp_path / "big", dtype=torch.bfloat16)
    with pytest.raises(M.LoadError, match="c_fc.weight does not fit into float16"):
        M.load(tmp_path / "big", dtype=torch.float16)


def test_bit_flips_in_the_header_never_pass_unseen(tiny, tmp_path):
    """A flipped bit either makes a LoadError or leaves every tensor as it was."""
    data = (tiny / "model.safetensors").read_bytes()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    good, refused = load_file(tiny / "model.safetensors"), 0
    header = 8 + int.from_bytes(data[:8], "little")
    for at in range(0, header, header // 150):
        (tmp_path / "model.safetensors").write_bytes(
            data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
        try:
            M.load(str(tmp_path))
        except M.LoadError:
            refused += 1
        else:
            assert all(torch.equal(x, good[name])
                       for name, x in load_file(tmp_path / "model.safetensors").items())
    assert refused > 140


def test_weights_are_loaded_as_stored(tiny, tmp_path):
    state = {k: x.to(torch.bfloat16) for k, x in load_file(tiny / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())
    net, _ = M.load(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(net.params["embed.weight"], state[WTE]) and net.dtype == torch.bfloat16
    assert {x.dtype for name, x in net.params.items() if "norm" in name} == {torch.float32}
    full, _ = M.load(str(tmp_path))
    tokens, lengths = TOKENS[REAL], LENGTHS.tolist()
    a, b = net.packed(tokens, lengths)[0].float(), full.packed(tokens, lengths)[0]
    assert (a - b).norm() / b.norm() < 0.02  # bfloat16 keeps 8 bits


# ---- packing, padding, trees -------------------------------------------------------------------------------

ODD = ("gpt2", "gpt_neo", "llama", "gemma2", "gemma3_text", "mistral", "olmo2")


def ragged(n, low=2, high=20, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 101, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()
            for _ in range(n)]


@pytest.mark.parametrize("variant", ODD)
def test_company_and_padding_change_nothing(variant, reference):
    """A sequence alone, in a packed batch, and right-padded has the same states; padding holds zeros, not
    numbers."""
    net, _ = M.load(reference(variant)[0])
    sequences = ragged(7)
    together = M.hidden_at(net, sequences, batch_tokens=1000)
    alone = torch.cat([M.hidden_at(net, [s]) for s in sequences])
    CLOSE(together, alone)
    padded = torch.zeros(7, 20, dtype=torch.int64)
    for i, s in enumerate(sequences):
        padded[i, :len(s)] = torch.tensor(s)
    lengths = torch.tensor([len(s) for s in sequences])
    for filler in (0, 100):
        tokens = torch.where(torch.arange(20) < lengths[:, None], padded, filler)
        x = net.hidden(tokens, lengths)
        CLOSE(x[torch.arange(7), lengths - 1], together)
        assert not x[torch.arange(20) >= lengths[:, None]].any()
    firsts = M.hidden_at(net, sequences, position=[0] * 7, layer=1, batch_tokens=25)
    CLOSE(firsts, torch.stack([net.packed(torch.tensor(s), [len(s)], (1,))[0][0] for s in sequences]))


@pytest.mark.parametrize("least", [1.0, 0.1])
@pytest.mark.parametrize("variant", ODD)
def test_tree_equals_separate_sequences(variant, least, reference, monkeypatch):
    monkeypatch.setitem(M.ALIKE, "cpu", least)
    net, _ = M.load(reference(variant)[0])
    prompts = ragged(5, 3, 20, 7)
    options = [ragged(1 + q % 4, 1, 9, q) for q in range(5)]
    pick = [0, -1, 2, 3, -1]
    got = M.read(net, prompts, options, pick, layers=(None, 0, 2), batch_tokens=90)
    for q in range(5):
        for j, layer in enumerate((None, 0, 2)):
            ends = [len(prompts[q]) - 1]
            CLOSE(got.prompt[q, j], M.hidden_at(net, [prompts[q]], layer=layer)[0])
            item = prompts[q] + (options[q][pick[q]] if pick[q] >= 0 else [])
            CLOSE(got.item[q, j], M.hidden_at(net, [item], layer=layer)[0])
        for o in range(4):
            if o >= len(options[q]):
                assert got.loglik[q, o] == -torch.inf and got.option_tokens[q, o] == 0
                continue
            whole = torch.tensor(prompts[q] + options[q][o])
            logp = net.logits(net.packed(whole, [len(whole)])[0]).log_softmax(-1)
            want = logp[torch.arange(ends[0], len(whole) - 1), whole[ends[0] + 1:]].sum()
            CLOSE(got.loglik[q, o].float(), want.detach(), rtol=1e-5, atol=1e-4)
            assert got.option_tokens[q, o] == len(options[q][o])
    narrow = M.log_likelihood(net, net.packed(torch.arange(9), [9])[0], [3, 3, 1, 7],
                              torch.tensor([5, 6, 7, 8]), cells=101)
    CLOSE(narrow, M.log_likelihood(net, net.packed(torch.arange(9), [9])[0], [3, 3, 1, 7],
                                   torch.tensor([5, 6, 7, 8])))


def test_freed_memory_is_kept_where_glibc_is(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(M.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *args: told.append(args)))
    M.load(tiny)
    assert told[-2:] == [(-1, 2 ** 30), (-3, 2 ** 26)]
    assert told[:2] == [(-1, 2 ** 21), (-3, 2 ** 17)]  # see test_memory_of_loading
    monkeypatch.setattr(M.ctypes, "CDLL", lambda _: SimpleNamespace())  # macOS
    M.load(tiny)
    monkeypatch.setattr(M.os, "name", "nt")
    monkeypatch.setattr(M.ctypes, "CDLL", None)  # there CDLL(None) raises
    M.keep_freed_memory(1, 1)


def test_too_long_a_sequence(tiny):
    net, _ = M.load(tiny)
    with pytest.raises(ValueError, match="65 tokens is longer than the context of 64"):
        net.packed(torch.zeros(65, dtype=torch.int64), [65])
    M.read(net, [[1] * 60], [[[1, 2]] * 5], [0])  # 70 tokens as a tree, 62 on its longest path
    with pytest.raises(AssertionError, match="none empty"):
        net.packed(torch.zeros(3, dtype=torch.int64), [3, 0])


def test_out_of_memory_halves_a_batch(tiny, monkeypatch):
    net, _ = M.load(tiny)
    sequences = ragged(9)
    want, real = M.hidden_at(net, sequences), M.Transformer.packed
    monkeypatch.setattr(M.Transformer, "packed", small_memory(real, 40))
    CLOSE(M.hidden_at(net, sequences), want)
    monkeypatch.setattr(M.Transformer, "packed", small_memory(real, 5))
    with pytest.raises(M.TrainError,
                       match=f"out of memory with one sequence of {max(map(len, sequences))} tokens"):
        M.hidden_at(net, sequences)


def small_memory(real, most):
    def packed(self, tokens, lengths, *rest, **kw):
        if len(tokens) > most:
            raise torch.OutOfMemoryError("pretended")
        return real(self, tokens, lengths, *rest, **kw)
    return packed


# ---- finetuning --------------------------------------------------------------------------------------------

@pytest.fixture
def steps(monkeypatch):
    """What Adam was given at each step: (learning rate, gradients)."""
    seen, real = [], torch.optim.Adam.step

    def step(self, *args, **kw):
        group = self.param_groups[0]
        seen.append((group["lr"], [p.grad.clone() for p in group["params"]]))
        return real(self, *args, **kw)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return seen


TRAIN = dict(sequences=ragged(11), targets=torch.linspace(0.05, 0.95, 11), lr=1e-3, seed=4, batch=4)


def same_state(a, b):
    return a.state().keys() == b.state().keys() and all(
        torch.equal(x, b.state()[k]) for k, x in a.state().items())


@pytest.mark.parametrize("tune", ["full", "lora", "head"])
def test_same_seed_same_bits(tune, tiny):
    net, _ = M.load(tiny)
    before = {k: x.clone() for k, x in net.params.items()}
    a, b = (M.finetune(net, **TRAIN, tune=tune) for _ in range(2))
    assert same_state(a, b) and not same_state(a, M.finetune(net, **TRAIN | dict(seed=5), tune=tune))
    assert all(torch.equal(x, net.params[k]) for k, x in before.items())
    p = a.predict(TRAIN["sequences"])
    assert p.dtype == torch.float32 and p.shape == (11,)
    assert torch.equal(M.Classifier(net, a.state()).predict(TRAIN["sequences"]), p)
    CLOSE(a.predict(TRAIN["sequences"], batch_tokens=1), p)  # input order, whatever the batches
    names = set(a.state()) - {"classifier.weight"}
    assert names == {"full": set(net.params), "head": set()}.get(tune, {k for k in names if ".lora_" in k})
    assert tune != "lora" or len(names) == 2 * 6 * 3


def test_steps_are_those_of_a_plain_loop(tiny, steps):
    """Orders, schedule, loss and Adam against a loop in transformers and torch over the same batches."""
    net, _ = M.load(tiny)
    got = M.finetune(net, **TRAIN)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tiny, num_labels=2).eval()
    theirs.score.weight.data.zero_()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 6)
    g, ours, sizes = torch.Generator().manual_seed(4), list(steps), []
    for _ in range(2):
        for rows in torch.randperm(11, generator=g).split(4):
            z = torch.cat([theirs(torch.tensor([TRAIN["sequences"][i]])).logits for i in rows])
            w = torch.as_tensor(TRAIN["targets"])[rows]
            F.cross_entropy(z, torch.stack([1 - w, w], 1)).backward()
            sizes.append((schedule.get_last_lr()[0], theirs.score.weight.grad.clone()))
            adam.step(), adam.zero_grad(), schedule.step()
    CLOSE(got.state()["embed.weight"], theirs.transformer.wte.weight.detach(), rtol=1e-4, atol=1e-4)
    unused = sorted(set(range(101)) - set(sum(TRAIN["sequences"], [])))  # Adam has no rows for them
    same = (got.state()["embed.weight"] == net.params["embed.weight"]).all(1)
    assert unused and same.nonzero()[:, 0].tolist() == unused
    for (lr, grads), (their_lr, head) in zip(ours, sizes, strict=True):
        assert lr == pytest.approx(their_lr)
        CLOSE(grads[0], head, rtol=1e-3, atol=1e-5)
    z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["sequences"]])
    CLOSE(got.predict(TRAIN["sequences"]), z.softmax(-1)[:, 1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["micro-batches", "recomputed", "out of memory", "target_fn"])
def test_gradients_are_the_whole_batch_s(case, tiny, steps, monkeypatch):
    net, _ = M.load(tiny)
    seen = []

    def mix(p, w, fraction):  # depends on the whole batch
        seen.append((p.clone(), fraction))
        return 0.5 * w + 0.5 * (p - p.mean()).sigmoid()

    train = TRAIN | dict(tune="lora") | (dict(target_fn=mix) if case == "target_fn" else {})
    M.finetune(net, **train)
    want, wanted = list(steps), list(seen)
    steps.clear(), seen.clear()
    if case == "out of memory":
        monkeypatch.setattr(M.Transformer, "packed", small_memory(M.Transformer.packed, 30))
    M.finetune(net, **train, batch_tokens=30 if case in ("micro-batches", "target_fn") else 10 ** 6,
               checkpoint=case == "recomputed")
    for (_, a), (_, b) in zip(want, steps, strict=True):
        for x, y in zip(a, b, strict=True):
            CLOSE(x, y, rtol=1e-3, atol=1e-6)
    for (p, f), (q, h) in zip(wanted, seen, strict=True):
        assert f == h
        CLOSE(p, q, rtol=1e-4, atol=1e-5)
    assert case != "target_fn" or [f for _, f in seen] == [i / 6 for i in range(6)]


def test_given_targets_through_a_function_change_no_bit(tiny):
    net, _ = M.load(tiny)
    assert same_state(M.finetune(net, **TRAIN), M.finetune(net, **TRAIN, target_fn=lambda p, w, fraction: w))


def test_what_cannot_be_trained(tiny, monkeypatch):
    net, _ = M.load(tiny)
    with pytest.raises(M.TrainError, match=r"loss is nan at step 1 of 6 \(learning rate 0.001\)"):
        M.finetune(net, **TRAIN | dict(targets=torch.full((11,), torch.nan)))
    with pytest.raises(M.TrainError, match="must be full, lora or head"):
        M.finetune(net, **TRAIN, tune="some")
    monkeypatch.setattr(M.Transformer, "packed", small_memory(M.Transformer.packed, 5))
    with pytest.raises(M.TrainError, match="out of memory at step 1 with one sequence of"):
        M.finetune(net, **TRAIN)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tiny, tmp_path):
    net, _ = M.load(tiny)
    with pytest.raises(M.TrainError, match="loss is nan at step 4 of 6"):
        M.finetune(net, **TRAIN, save=tmp_path / "run",
                   target_fn=lambda p, w, fraction: w if fraction < 0.5 else w * torch.nan)
    state = load_file(tmp_path / "run")
    assert all(x.isfinite().all() for x in state.values())
    with M.open_tensors(tmp_path / "run") as file:
        assert file.metadata()["step"] == "3"


@pytest.mark.parametrize("step", ["6", "3", "r", None])
def test_a_state_whose_step_is_damaged_is_not_taken(step, tiny, tmp_path, monkeypatch):
    net, _ = M.load(tiny)
    monkeypatch.setattr(M, "SAVE_SECONDS", 0.0)

    def stop(step, total, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        M.finetune(net, **TRAIN, save=tmp_path / "run", progress=stop)
    with M.open_tensors(tmp_path / "run") as file:
        meta = file.metadata()
    assert meta["step"] == "2"
    save_file(load_file(tmp_path / "run"), tmp_path / "run", step and meta | dict(step=step))
    done = []
    again = M.finetune(net, **TRAIN, save=tmp_path / "run", progress=lambda step, *_: done.append(step))
    assert done == [1, 2, 3, 4, 5, 6] and same_state(again, M.finetune(net, **TRAIN))


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_broken_run_goes_on_to_the_same_bits(tune, tiny, tmp_path, monkeypatch):
    net, _ = M.load(tiny)
    want = M.finetune(net, **TRAIN, tune=tune)
    monkeypatch.setattr(M, "SAVE_SECONDS", 0.0)
    for stop in (2, 5):
        done = []

        def progress(step, total, loss):
            done.append(step)
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            M.finetune(net, **TRAIN, tune=tune, save=tmp_path / "run", progress=progress)
        assert done[0] == (1 if stop == 2 else 2)  # a step is saved after its progress call
    assert same_state(M.finetune(net, **TRAIN, tune=tune, save=tmp_path / "run"), want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    other = TRAIN | dict(rank=4) if tune == "lora" else TRAIN | dict(sequences=[[1, 2, 3]] * 11)
    assert same_state(M.finetune(net, **other, tune=tune, save=tmp_path / "run"),
                      M.finetune(net, **other, tune=tune))  # a file of another run is not taken


def test_half_precision_keeps_small_steps(tiny):
    """Steps of 1e-5 vanish in bfloat16 weights of size one unless masters are float32."""
    net, _ = M.load(tiny, dtype=torch.bfloat16)
    c = M.finetune(net, **TRAIN | dict(lr=1e-5, epochs=15), head_init="normal")
    moved = c.state()["layers.1.up.weight"].float() - net.params["layers.1.up.weight"].float()
    assert c.state()["layers.1.up.weight"].dtype == torch.bfloat16 and (moved != 0).float().mean() > 0.05


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2",
                                     "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3"])
def test_saved_student_loads_in_transformers(variant, reference, tmp_path):
    net, _ = M.load(reference(variant)[0])
    c = M.finetune(net, **TRAIN, tune="lora" if variant in ("gpt2", "phi3") else "full")
    c.save(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["sequences"]])
    CLOSE(c.predict(TRAIN["sequences"]), z.softmax(-1)[:, 1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stored, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_saved_student_keeps_its_dtype(stored, dtype, reference, tmp_path):
    """transformers takes the dtype that config.json names: it must be the student's, not the source's."""
    source, to = tmp_path / "source", tmp_path / "student"
    shutil.copytree(reference("llama")[0], source)
    raw = json.loads((source / "config.json").read_text())
    named = dict.fromkeys(("dtype", "torch_dtype"), str(stored).removeprefix("torch."))
    (source / "config.json").write_text(json.dumps(raw | named | dict(num_labels=5)))
    for file in source.glob("*.safetensors"):
        save_file({name: x.to(stored) for name, x in load_file(file).items()}, file)
    net, _ = M.load(source, dtype=dtype)
    c = M.finetune(net, **TRAIN)
    c.save(to)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(to).eval()
    assert theirs.dtype == dtype and theirs.num_labels == 2
    with torch.no_grad():
        z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["sequences"]]).float()
    loose = dict(rtol=1e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=0, atol=0.02)
    CLOSE(c.predict(TRAIN["sequences"]), z.softmax(-1)[:, 1], **loose)


def test_a_student_is_not_saved_over_another_model(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "own")
    net, _ = M.load(tmp_path / "own")
    c, before = M.finetune(net, **TRAIN, tune="head"), (tmp_path / "own" / "model.safetensors").read_bytes()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    for folder in ("own", "shards"):
        with pytest.raises(FileExistsError, match="holds another model"):
            c.save(tmp_path / folder)
    assert (tmp_path / "own" / "model.safetensors").read_bytes() == before


# ---- the hub -----------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs. Repositories: org/good, org/cut (the first download
    of its weights breaks off half-way), org/bare (no weights), org/gated (403), org/closed (401); none other
    exists."""
    protocol_version, commit, folder, log = "HTTP/1.1", "c0ffee" + "0" * 34, None, []

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in dict({"Content-Length": len(body)}, **headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.log.append((self.command, self.path, self.headers.get("Range")))
        name = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if name in ("org/gated", "org/closed"):
            code = "GatedRepo" if name == "org/gated" else "RepoNotFound"
            return self.reply(403 if name == "org/gated" else 401, X_Error_Code=code,
                              X_Error_Message="Access is restricted")
        if name not in ("org/good", "org/cut", "org/bare"):
            return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = [f for f in ("config.json", "model.safetensors", "tokenizer.json")
                 if name != "org/bare" or f[0] != "m"]
        if "/tree/" in self.path:
            body = json.dumps([dict(type="file", path=f, oid=f, size=(self.folder / f).stat().st_size)
                               for f in files])
            return self.reply(200, body.encode(), Content_Type="application/json")
        if self.path.startswith("/api/"):
            body = json.dumps(dict(id=name, modelId=name, sha=self.commit, private=False,
                                   siblings=[dict(rfilename=f) for f in files]))
            return self.reply(200, body.encode(), Content_Type="application/json")
        file = self.path.rpartition("/")[2]
        if file not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        data = (self.folder / file).read_bytes()
        headers = dict(ETag='"%s"' % hashlib.sha256(data).hexdigest(), X_Repo_Commit=self.commit,
                       Accept_Ranges="bytes")
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            at = int(start[1])
            return self.reply(206, data[at:], Content_Range=f"bytes {at}-{len(data) - 1}/{len(data)}",
                              **headers)
        if name == "org/cut" and file[0] == "m" and self.command == "GET":
            self.send_response(200)
            for key, value in dict(Content_Length=len(data), **headers).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        return self.reply(200, data, **headers)

    do_HEAD = do_GET


SCRIPT = ("""
import sys, json, model
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # a cut loses the chunk under way; """
          """the file here is small
for source in sys.argv[1:]:
    try:
        net, _ = model.load(source)
        print(json.dumps([source, net.revision, sum(float(x.double().sum()) for x in net.params.values())]))
    except model.LoadError as error:
        print(json.dumps([source, None, str(error)]))
""")


def test_hub(tiny, tmp_path):
    """Hub ids against a server on this machine: revision, a missing file, 401, 403, 404, a connection cut and
    resumed, no network at all, and offline mode with a full and with an empty cache."""
    def ask(*sources, **env):
        env = os.environ | dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path),
                                HF_HUB_OFFLINE="0",
                                NO_PROXY="127.0.0.1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
                                HF_TOKEN="hf_" + "secret" * 6) | env
        run = subprocess.run([sys.executable, "-c", SCRIPT, *sources], cwd=Path(M.__file__).parent, env=env,
                             text=True, capture_output=True, timeout=120)
        assert run.returncode == 0, run.stderr
        assert "secret" not in run.stdout + run.stderr
        return {line[0]: line[1:]
                for line in map(json.loads, [r for r in run.stdout.splitlines() if r[0] == "["])}

    Hub.folder, Hub.log = tiny, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    net, _ = M.load(tiny)
    total = sum(float(x.double().sum()) for x in net.params.values())
    got = ask("org/good", "org/cut", "org/bare", "org/gated", "org/closed", "org/none",
              "org/good@" + Hub.commit)
    assert got["org/good"] == got["org/cut"] == got["org/good@" + Hub.commit] == [Hub.commit, total]
    # it went on where it was cut
    assert any(path.startswith("/org/cut") and ranged for _, path, ranged in Hub.log)
    assert "no model.safetensors there" in got["org/bare"][1]
    for name, word in (("gated", "Gated"), ("closed", "NotFound"), ("none", "NotFound")):
        assert got[f"org/{name}"][1].startswith(f"org/{name}: ") and word in got[f"org/{name}"][1]
        assert "\n" not in got[f"org/{name}"][1]
    server.shutdown()
    server.server_close()
    assert ask("org/good", HF_HUB_OFFLINE="1")["org/good"] == [Hub.commit, total]
    lost = ask("org/good", "org/never")
    assert lost["org/good"] == [Hub.commit, total] and lost["org/never"][0] is None


@pytest.mark.slow
def test_memory_of_loading(tmp_path):
    """A 1 GB checkpoint in bfloat16 loads with less than 1.3 times its size, also as the second model of a
    process, and when float32 files are turned into bfloat16."""
    raw = dict(model_type="llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=30,
               num_attention_heads=8, vocab_size=256, tie_word_embeddings=True)
    for stored in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(stored)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        tokenizer_file(folder)
        config = M.configure(raw)
        state = {"model." + source: torch.ones(shape[0], dtype=stored)
                 for source, _, shape in M.tensors(config)}
        save_file(state, folder / "model.safetensors")
        size = sum(x.numel() for x in state.values()) * 2
        del state
        code = ("import re, sys, torch, model; "
                "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
                "load = lambda: (peak(), model.load(sys.argv[1], dtype=torch.bfloat16), peak()); "
                "weak, strong = load(), load(); print(weak[2] - weak[0], strong[2] - strong[0])")
        run = subprocess.run([sys.executable, "-c", code, folder], cwd=Path(M.__file__).parent, text=True,
                             capture_output=True, check=True)
        for grown in (int(x) * 1024 for x in run.stdout.split()[-2:]):
            print(f"{stored} file: {size / 1e9:.2f} GB asked for, grew by {grown / size:.3f} of it")
            assert grown < 1.3 * size and size > 0.9e9
