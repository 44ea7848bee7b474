"""model.py against transformers and against itself: the network, reading, finetuning.

Run: pytest tests/test_model.py (about two minutes on two cores).

Parity goes through saved files with shaken weights (at the usual initialisation most mistakes are invisible),
on ragged right-padded batches longer than every window, for every layer, the logits and all gradients, at
assert_close's defaults. Each fact of the family table is then flipped once and parity must fail.
"""
import copy
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as M
from conftest import ROOT
from data import architecture as A
from data import checkpoint as C

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
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
    row, caught = A.FAMILIES[kind], []
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
    config = A.configure(raw)
    grads, _ = C.read_params(config, C.tensor_files(folder / "grad"), "cpu", torch.float32)
    if A.FAMILIES[config.family].get("plus_one"):
        grads = {k: x - 1 if "norm" in k or "post" in k else x for k, x in grads.items()}
    count = sum(p.numel() for p in net.parameters())
    return folder, [x.detach() for x in states], grads, count


def ours(net):
    """The same list as compute's: every layer's states, final states, logits, all on real tokens."""
    tokens, lengths = TOKENS[REAL], LENGTHS.tolist()
    *states, final = net.packed(tokens, lengths, (*range(net.config.layers + 1), None))
    return [*states, final, net.logits(final)]


def parity(net, states, grads):
    params = net.requires_grad_().params
    got = ours(net)
    for i, (a, b) in enumerate(zip(got, states, strict=True)):
        CLOSE(a, b, msg=lambda m, i=i: f"state {i}: {m}")
    (got[-1] * PULL[REAL]).sum().backward()
    assert params.keys() == grads.keys() == net.state_dict().keys()
    for name, p in params.items():
        CLOSE(p.grad, grads[name], msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(variant, reference):
    folder, states, grads, count = reference(variant)
    net, _ = M.load(folder)
    assert sum(p.numel() for p in net.params.values()) == count
    parity(net, states, grads)


@pytest.mark.parametrize("least", [0.7, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_in_padded_runs(variant, least, reference, monkeypatch):
    """How attention unpacks a batch on a GPU: runs of about equal length, or the whole batch."""
    monkeypatch.setitem(M.ALIKE, "cpu", least)
    folder, states, grads, _ = reference(variant)
    parity(M.load(folder)[0], states, grads)
    packing = M.Packing(LENGTHS.tolist(), None, None, set(), torch.device("cpu"))
    runs = [(run.B, run.T) for run in packing.runs]
    assert packing.padded and runs == ([(1, 31), (1, 7), (2, 43)] if least == 0.7 else [(4, 43)])


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
    return lambda net: M.Transformer(dataclasses.replace(net.config, **fields), net.params)


def drop(pattern):
    return lambda net: M.Transformer(net.config, {name: x for name, x in net.params.items()
                                                  if not re.search(pattern, name)})


def swap(a, b):
    def other(name):
        return ".".join({a: b, b: a}.get(part, part) for part in name.split("."))
    return lambda net: M.Transformer(net.config, {other(name): x for name, x in net.params.items()})


def rope(**fields):
    """base, rotated, scaling of the full blocks, or local for the window blocks."""
    def mutate(net):
        base, rotated, scaling = net.config.rope
        new = (fields.get("base", base), fields.get("rotated", rotated), fields.get("scaling", scaling))
        return change(rope=new, local_rope=fields.get("local", new))(net)
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
    "own head taken for tied": ("gpt2-erf", lambda net: change(tied=True)(drop(r"^head\.")(net))),
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
        monkeypatch.setitem(A.FAMILIES, family, A.FAMILIES[family] | mutate)
    elif mutate == "tile":
        monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, n, 1))
    elif mutate is interleaved:
        monkeypatch.setattr(M, "rotate", interleaved)
    if name == "position offset, opt":  # the table's rows stay, only the offset goes
        monkeypatch.setattr(C, "tensors", lambda c, real=A.tensors: [
            (s, n, [(66, 48)] if n == ["pos.weight"] else shape) for s, n, shape in real(c)])
    if name == "positions off by one":
        monkeypatch.setattr(C, "tensors", lambda c, real=A.tensors: [
            (s, n, [(64, 40)] if n == ["pos.weight"] else shape) for s, n, shape in real(c)])
    net, _ = M.load(folder)
    if callable(mutate) and mutate is not interleaved:
        net = mutate(net)
    with pytest.raises(AssertionError):
        parity(net, states, grads)


# ---- packing, padding, trees -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(reference):
    return reference("gpt2")[0]


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
    every = M.read(net, prompts, options, layers=(None, 0, 2), batch_tokens=90)
    assert torch.equal(every.prompt_state, got.prompt_state) and torch.equal(every.loglik, got.loglik)
    for q, o in enumerate(pick):
        at = every.prompt_state[q] if o < 0 else every.item_state[q, o]
        assert torch.equal(at, got.item_state[q])
        assert not every.item_state[q, len(options[q]):].any()
        assert every.item_state[q, :len(options[q])].flatten(1).any(1).all()
    for q in range(5):
        for j, layer in enumerate((None, 0, 2)):
            ends = [len(prompts[q]) - 1]
            CLOSE(got.prompt_state[q, j], M.hidden_at(net, [prompts[q]], layer=layer)[0])
            item = prompts[q] + (options[q][pick[q]] if pick[q] >= 0 else [])
            CLOSE(got.item_state[q, j], M.hidden_at(net, [item], layer=layer)[0])
        for o in range(4):
            if o >= len(options[q]):
                assert got.loglik[q, o] == -torch.inf and got.option_tokens[q, o] == 0
                continue
            whole = torch.tensor(prompts[q] + options[q][o])
            logp = net.logits(net.packed(whole, [len(whole)])[0]).log_softmax(-1)
            want = logp[torch.arange(ends[0], len(whole) - 1), whole[ends[0] + 1:]].sum()
            CLOSE(got.loglik[q, o].float(), want.detach(), rtol=1e-5, atol=1e-4)
            assert got.option_tokens[q, o] == len(options[q][o])
    where = [3, 3, 1, 7], torch.tensor([5, 6, 7, 8])
    whole = M.log_likelihood(net, net.packed(torch.arange(9), [9])[0], *where)
    monkeypatch.setitem(M.CELLS, "cpu", 101)
    CLOSE(M.log_likelihood(net, net.packed(torch.arange(9), [9])[0], *where), whole)


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


@pytest.mark.parametrize("words, it_is", [
    ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
    ("CUDA error: device-side assert triggered", False)])
def test_how_memory_runs_out(words, it_is):
    assert C.out_of_memory(RuntimeError(words)) is it_is


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


TRAIN = dict(inputs=ragged(11), targets=torch.linspace(0.05, 0.95, 11), lr=1e-3, seed=4, batch=4)


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
    p = a.predict(TRAIN["inputs"])
    assert p.dtype == torch.float32 and p.shape == (11,)
    assert torch.equal(M.Classifier(net, a.state()).predict(TRAIN["inputs"]), p)
    CLOSE(a.predict(TRAIN["inputs"], batch_tokens=1), p)  # input order, whatever the batches
    names = set(a.state()) - {"classifier.weight"}
    assert names == {"full": set(net.params), "head": set()}.get(tune, {k for k in names if ".lora_" in k})
    assert tune != "lora" or len(names) == 2 * 6 * 3


def test_no_function_s_first_call_is_made_by_several_threads(monkeypatch):
    """pytorch issue 188792: one process in forty computed its first cosines, and what followed, otherwise.
    Of the functions that ATen gives to MKL, load calls each that the program uses."""
    of_mkl = "acos asin atan cos erf erfc erfinv exp expm1 log log10 log1p log2 sin sqrt tan tanh".split()
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/results/*.py")]
    source = "".join(file.read_text("utf-8") for file in files)
    called = set(re.findall(r"(?<!math)(?<!np)\.([a-z0-9]+)\(", source))
    assert {"cos", "sin"} < called & set(of_mkl) <= set(C.OF_MKL) <= set(of_mkl)
    cosines, cos = [], torch.cos
    monkeypatch.setattr(torch, "cos", lambda x: cosines.append((x.dtype, x.numel())) or cos(x))
    M.load(str(ROOT / "data/demo/weak"))
    assert cosines == [(torch.float32, 1), (torch.float64, 1)]


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
            z = torch.cat([theirs(torch.tensor([TRAIN["inputs"][i]])).logits for i in rows])
            w = torch.as_tensor(TRAIN["targets"])[rows]
            F.cross_entropy(z, torch.stack([1 - w, w], 1)).backward()
            sizes.append((schedule.get_last_lr()[0], theirs.score.weight.grad.clone()))
            adam.step(), adam.zero_grad(), schedule.step()
    CLOSE(got.state()["embed.weight"], theirs.transformer.wte.weight.detach(), rtol=1e-4, atol=1e-4)
    unused = sorted(set(range(101)) - set(sum(TRAIN["inputs"], [])))  # Adam has no rows for them
    same = (got.state()["embed.weight"] == net.params["embed.weight"]).all(1)
    assert unused and same.nonzero()[:, 0].tolist() == unused
    for (lr, grads), (their_lr, head) in zip(ours, sizes, strict=True):
        assert lr == pytest.approx(their_lr)
        CLOSE(grads[0], head, rtol=1e-3, atol=1e-5)
    z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["inputs"]])
    CLOSE(got.predict(TRAIN["inputs"]), z.softmax(-1)[:, 1].detach(), rtol=1e-4, atol=1e-4)


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
    with pytest.raises(M.TrainError, match="tune = 'some'.* must be full, lora or head"):
        M.finetune(net, **TRAIN, tune="some")
    monkeypatch.setattr(M.Transformer, "packed", small_memory(M.Transformer.packed, 5))
    with pytest.raises(M.TrainError, match="out of memory at step 1 with one sequence of"):
        M.finetune(net, **TRAIN)


def test_half_precision_keeps_small_steps(tiny):
    """Steps of 1e-5 vanish in bfloat16 weights of size one unless masters are float32."""
    net, _ = M.load(tiny, dtype=torch.bfloat16)
    c = M.finetune(net, **TRAIN | dict(lr=1e-5, epochs=15))
    moved = c.state()["layers.1.up.weight"].float() - net.params["layers.1.up.weight"].float()
    assert c.state()["layers.1.up.weight"].dtype == torch.bfloat16 and (moved != 0).float().mean() > 0.05


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_small_gradients_survive_float16(tune, tiny, steps):
    """After a step of 1e-6 from zero the head sends back 1e-7: unscaled, most of it would be 0."""
    given = {}
    for dtype in (torch.float32, torch.float16):
        M.finetune(M.load(tiny, dtype=dtype)[0], **TRAIN | dict(lr=1e-6, epochs=1), tune=tune)
        given[dtype] = steps[1][1]
        steps.clear()
    for got, want in zip(given[torch.float16], given[torch.float32], strict=True):
        if want.norm() > 1e-9:      # else zero but for rounding: a softmax does not see the keys' bias
            assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2",
                                     "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3"])
def test_saved_student_loads_in_transformers(variant, reference, tmp_path):
    net, _ = M.load(reference(variant)[0])
    c = M.finetune(net, **TRAIN, tune="lora" if variant in ("gpt2", "phi3") else "full")
    c.save(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["inputs"]])
    CLOSE(c.predict(TRAIN["inputs"]), z.softmax(-1)[:, 1], rtol=1e-5, atol=2e-5)


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
        z = torch.cat([theirs(torch.tensor([s])).logits for s in TRAIN["inputs"]]).float()
    loose = dict(rtol=1e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=0, atol=0.02)
    CLOSE(c.predict(TRAIN["inputs"]), z.softmax(-1)[:, 1], **loose)


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


# ---- the head in float32, states that are not finite -------------------------------------------------------

def test_the_head_s_product_is_float32_whatever_the_dtype(reference, monkeypatch):
    """Against float64 on the same rounded numbers; in blocks; its gradient too."""
    for variant in ("gpt2", "gpt2-erf", "gemma2"):
        net, _ = M.load(reference(variant)[0], dtype=torch.bfloat16)
        monkeypatch.setitem(M.HEAD_ROWS, "cpu", 13)
        hidden = net.packed(TOKENS[0], [43])[0].requires_grad_()
        head = net.params.get("head.weight", net.params["embed.weight"])
        want = hidden.double() @ head.double().T
        cap = net.config.logit_cap
        want = want if cap is None else cap * torch.tanh(want / cap)
        got = net.logits(hidden)
        assert got.dtype == torch.float32 and hidden.dtype == head.dtype == torch.bfloat16
        CLOSE(got.double(), want, rtol=1e-6, atol=1e-6)
        pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
        a, b = (torch.autograd.grad(y, hidden, pull.to(y.dtype))[0] for y in (got, want))
        CLOSE(a, b)  # both rounded to bfloat16 once


@pytest.mark.parametrize("dtype, remedy", [
    (torch.float16, "float16: use --dtype bfloat16 or float32"),
    (torch.bfloat16, "bfloat16: use --dtype float32"),
    (torch.float32, "float32: the checkpoint is damaged or overflows")])
def test_states_that_are_not_finite_are_an_error_at_once(dtype, remedy, tiny):
    net, _ = M.load(tiny, dtype=dtype)
    huge = torch.finfo(dtype).max
    broken = M.Transformer(net.config, net.params | {
        "layers.1.down.bias": torch.full_like(net.params["layers.1.down.bias"], huge),
        "layers.2.down.bias": torch.full_like(net.params["layers.2.down.bias"], huge)})
    for call in (lambda: M.hidden_at(broken, ragged(5)), lambda: M.read(broken, [[1]], [[[2], [3]]], [0]),
                 lambda: M.finetune(broken, **TRAIN), lambda: M.finetune(broken, **TRAIN, tune="head"),
                 lambda: M.Classifier(broken, {"classifier.weight": torch.ones(2, 40)}).predict([[1, 2]]),
                 lambda: M.Answerer(broken, {}).predict([M.Choice([1], [[2], [3]], 0)])):
        with pytest.raises(M.TrainError, match=f"^hidden states of .* are not finite in {remedy}"):
            call()
    assert M.hidden_at(broken, ragged(5), layer=1).isfinite().all()


# ---- the student that answers ------------------------------------------------------------------------------

def choices(n, seed=5, options=(2, 4)):
    g = torch.Generator().manual_seed(seed)
    many = [int(torch.randint(options[0], options[1] + 1, (), generator=g)) for _ in range(n)]
    return [M.Choice(prompt, ragged(k, 1, 7, seed + i), i % k)
            for i, (prompt, k) in enumerate(zip(ragged(n, 3, 15, seed), many))]


ANSWER = dict(inputs=choices(11), targets=torch.linspace(0.05, 0.95, 11), lr=1e-3, seed=4, batch=4,
              student="answer")


def plain_log_p(net, choice):
    """[log P(y = 0), log P(y = 1)] by a sequence per option, without packing, trees or chunks."""
    sums = []
    for option in choice.options:
        whole = torch.tensor([choice.prompt + option])
        logp = net.logits(net.hidden(whole, torch.tensor([whole.shape[1]])))[0].log_softmax(-1)
        at = range(len(choice.prompt) - 1, whole.shape[1] - 1)
        sums.append(sum(logp[i, whole[0, i + 1]] for i in at).double())
    p = torch.stack(sums).softmax(0)[choice.shown]
    return torch.stack([1 - p, p]).log()


@pytest.mark.parametrize("variant", ["gpt2", "gpt2-erf", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("options", [(2, 2), (4, 4), (2, 5)])
def test_untouched_it_believes_what_reading_says(variant, options, reference):
    net, _ = M.load(reference(variant)[0])
    asked = choices(9, 8, options)
    got = M.Answerer(net, {}).predict(asked, batch_tokens=70)
    assert got.dtype == torch.float32 and got.shape == (9,)
    read = M.read(net, [c.prompt for c in asked], [c.options for c in asked], [-1] * 9).loglik.softmax(1)
    CLOSE(got, read[range(9), [c.shown for c in asked]].float())
    plain = torch.stack([plain_log_p(net, c)[1].exp() for c in asked]).detach().float()
    CLOSE(got, plain, rtol=1e-4, atol=1e-5)
    start = M.finetune(net, asked, got, lr=0.0, seed=0, student="answer", tune="lora", epochs=1)
    CLOSE(start.predict(asked), got)


@pytest.mark.parametrize("variant", ["gpt2", "gpt2-erf", "gemma2"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradients_of_what_answers_are_a_plain_loop_s(variant, tune, reference, steps, monkeypatch):
    """The first step's, by micro-batches of all sizes, with logits in chunks of one state, recomputed or
    not."""
    net, _ = M.load(reference(variant)[0])

    def trainable(*args, real=M.trainable):
        out = real(*args)
        for name in out:
            if name.endswith("lora_b"):  # B = 0 hides the gradient of A
                out[name].data.fill_(0.05)
        return out

    monkeypatch.setattr(M, "trainable", trainable)
    train = ANSWER | dict(epochs=1, batch=11, tune=tune)
    for case in (dict(), dict(batch_tokens=30), dict(batch_tokens=1), dict(checkpoint=True)):
        M.finetune(net, **train, **case)
    monkeypatch.setitem(M.CELLS, "cpu", 101)
    M.finetune(net, **train)
    g = torch.Generator().manual_seed(4)
    torch.randperm(11, generator=g)
    masters = M.trainable(net, tune, 8, g)
    frozen = {"embed.weight", "head.weight"} & net.params.keys()
    assert tune == "lora" or masters.keys() == net.params.keys() - frozen
    plain = M.Transformer(net.config, net.params | masters, lora_scale=2.0)
    loss = 0
    for c, w in zip(ANSWER["inputs"], ANSWER["targets"]):
        log_no, log_yes = plain_log_p(plain, c)
        loss = loss - ((1 - w) * log_no + w * log_yes) / 11
    loss.backward()
    want = [plain.params[name].grad for name in masters]
    assert len(steps) == 5 and all(x is not None and x.any() for x in want)
    for _, grads in steps:
        for name, a, b in zip(masters, grads, want, strict=True):
            CLOSE(a, b, rtol=1e-3, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_steps_of_what_answers_are_a_plain_loop_s(tiny):
    """Orders, schedule, loss and Adam, in transformers and torch, a sequence per option."""
    net, _ = M.load(tiny)
    got = M.finetune(net, **ANSWER | dict(lr=1e-4))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tiny).eval()
    theirs.transformer.wte.weight.requires_grad_(False)
    adam = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 6)
    wrapped = SimpleNamespace(hidden=lambda tokens, lengths: tokens, logits=lambda x: theirs(x).logits)
    g = torch.Generator().manual_seed(4)
    for _ in range(2):
        for rows in torch.randperm(11, generator=g).split(4):
            log_p = torch.stack([plain_log_p(wrapped, ANSWER["inputs"][i]) for i in rows])
            w = ANSWER["targets"][rows]
            (-((1 - w) * log_p[:, 0] + w * log_p[:, 1])).mean().backward()
            adam.step(), adam.zero_grad(), schedule.step()
    moved = theirs.transformer.h[1].mlp.c_fc.weight.detach().T
    CLOSE(got.state()["layers.1.up.weight"], moved, rtol=1e-4, atol=1e-5)
    assert (moved - net.params["layers.1.up.weight"]).abs().mean() > 1e-4
    assert not {"embed.weight", "head.weight"} & got.state().keys()
    want = torch.stack([plain_log_p(wrapped, c) for c in ANSWER["inputs"]]).detach().float()
    after = got.log_p(ANSWER["inputs"]).detach()
    possible = want.isfinite()  # log(1 - p) cancels in the plain loop
    CLOSE(after[possible], want[possible], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_answers_same_seed_same_bits_and_learns(tune, tiny):
    net, _ = M.load(tiny)
    before = {k: x.clone() for k, x in net.params.items()}
    losses = []
    train = ANSWER | dict(tune=tune, epochs=12, targets=[float(i % 3 == 0) for i in range(11)])
    a = M.finetune(net, **train, progress=lambda step, total, loss: losses.append(loss))
    assert same_state(a, M.finetune(net, **train))
    assert not same_state(a, M.finetune(net, **train | dict(seed=5)))
    assert all(torch.equal(x, net.params[k]) for k, x in before.items())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    p = a.predict(train["inputs"])
    assert torch.equal(M.Answerer(net, a.state()).predict(train["inputs"]), p)
    CLOSE(a.predict(train["inputs"], batch_tokens=1), p, rtol=1e-4, atol=1e-5)
    right = (p > 0.5) == (torch.tensor(train["targets"]) > 0.5)
    assert right.float().mean() > 0.9


def test_targets_of_what_answers_may_follow_from_its_own(tiny, monkeypatch):
    net, _ = M.load(tiny)
    seen = []

    def mix(p, w, fraction):
        seen.append(p.clone())
        return 0.5 * w + 0.5 * (p - p.mean()).sigmoid()

    a = M.finetune(net, **ANSWER, target_fn=mix)
    b = M.finetune(net, **ANSWER, target_fn=mix, batch_tokens=40)
    CLOSE(torch.cat(seen[:6]), torch.cat(seen[6:]), rtol=1e-3, atol=1e-5)
    CLOSE(a.predict(ANSWER["inputs"]), b.predict(ANSWER["inputs"]), rtol=1e-2, atol=1e-3)
    monkeypatch.setattr(M.Transformer, "packed", small_memory(M.Transformer.packed, 60))
    c = M.finetune(net, **ANSWER, target_fn=mix)
    CLOSE(a.predict(ANSWER["inputs"]), c.predict(ANSWER["inputs"]), rtol=1e-2, atol=1e-3)


def test_one_minus_p_does_not_cancel(tiny):
    """A candidate the model is sure of has log P(y = 0) far below float32's resolution of 1 - p."""
    net, _ = M.load(tiny)
    sure = M.Transformer(net.config, net.params | {"norm.weight": net.params["norm.weight"] * 8,
                                                   "norm.bias": net.params["norm.bias"] * 8})
    asked = [M.Choice([3, 4], [[5] * 6, [6] * 6, [7, 8]], i) for i in range(3)]
    log_p = M.Answerer(sure, {}).log_p(asked).double()
    assert log_p.isfinite().all() and log_p[:, 0].min() < -20
    loglik = M.read(sure, [[3, 4]], [asked[0].options], [0]).loglik[0]
    for i in range(3):
        rest = torch.cat([loglik[:i], loglik[i + 1:]]).logsumexp(0) - loglik.logsumexp(0)
        CLOSE(log_p[i, 0], rest, rtol=1e-5, atol=1e-6)


def test_what_answers_cannot_be_trained_by_its_head(tiny):
    net, _ = M.load(tiny)
    with pytest.raises(M.TrainError, match="no head to train alone: tune must be full or lora"):
        M.finetune(net, **ANSWER, tune="head")
    states = list(M.hidden_at(net, TRAIN["inputs"]))
    assert same_state(M.finetune(net, **TRAIN | dict(inputs=states), tune="head"),
                      M.finetune(net, **TRAIN, tune="head"))
    for tune in ("full", "lora"):
        with pytest.raises(M.TrainError, match=f"a head trained on them: tune must be head, not {tune}"):
            M.finetune(net, **TRAIN | dict(inputs=states), tune=tune)
    with pytest.raises(M.TrainError, match="student = 'both'"):
        M.finetune(net, **ANSWER | dict(student="both"))


@pytest.mark.parametrize("variant, dtype", [
    *((variant, torch.float32) for variant in ("gpt2", "gpt2-erf", "gpt_neox", "opt", "llama", "llama-biased",
                                               "qwen2", "gemma2", "gemma3_text", "olmo2", "phi3")),
    ("gpt2-erf", torch.bfloat16), ("gemma3_text", torch.bfloat16)])
def test_what_answers_is_saved_as_a_language_model(variant, dtype, reference, tmp_path):
    net, tokenizer = M.load(reference(variant)[0], dtype=dtype)
    student = M.finetune(net, **ANSWER, tune="lora" if variant in ("gpt2", "phi3") else "full")
    student.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.dtype == dtype
    again, _ = M.load(tmp_path, dtype=dtype)
    tokens = TOKENS[:1, :31]
    with torch.no_grad():
        logits = student.model.logits(student.model.packed(tokens[0], [31])[0])
        CLOSE(again.logits(again.packed(tokens[0], [31])[0]), logits, rtol=1e-4, atol=1e-4)
        loose = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0, atol=0.3)
        CLOSE(theirs(tokens).logits[0].float(), logits, **loose)
    believed = M.Answerer(again, {}).predict(ANSWER["inputs"])
    CLOSE(believed, student.predict(ANSWER["inputs"]), rtol=1e-3, atol=1e-4)
    with pytest.raises(FileExistsError, match="holds another model"):
        M.Answerer(again, {}).save(tmp_path)


def test_half_precision_of_what_answers(tiny):
    """bfloat16 activations, float32 masters, a float32 head: close to float32's student."""
    full, _ = M.load(tiny)
    half, _ = M.load(tiny, dtype=torch.bfloat16)
    a, b = (M.finetune(net, **ANSWER | dict(lr=1e-4)) for net in (full, half))
    assert b.state()["layers.1.up.weight"].dtype == torch.bfloat16
    assert (a.predict(ANSWER["inputs"]) - b.predict(ANSWER["inputs"])).abs().max() < 0.1
