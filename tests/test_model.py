"""model.py against transformers and against itself. Run: pytest tests/test_model.py (about 40 s on two cores).

Parity goes through saved files with shaken weights (at the usual initialisation most mistakes are invisible), on ragged
right-padded batches longer than every window, for every layer, the logits and all gradients, at assert_close's defaults.
Each fact of the family table is then flipped once and parity must fail. Real files are read from ../shared when it is there.
"""
import copy
import dataclasses
import json
import re
from pathlib import Path

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

# sizes: no two alike where it matters, grouped heads (two groups of three), head_dim * heads != width, window < T
SIZE = dict(vocab_size=101, hidden_size=42, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)
PLAIN = {k: v for k, v in SIZE.items() if k not in ("num_key_value_heads", "head_dim")} | dict(hidden_size=48, num_attention_heads=3)
GPT2 = dict(vocab_size=101, n_positions=64, n_embd=40, n_layer=3, n_head=5, bos_token_id=None, eos_token_id=None)
NEO = dict(vocab_size=101, max_position_embeddings=64, hidden_size=40, num_layers=3, num_heads=5, window_size=8,
           attention_types=[[["global", "local"], 1], [["local"], 1]], bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=8)

VARIANTS = {  # name: (model_type, transformers configuration)
    "gpt2": ("gpt2", GPT2),
    "gpt2-erf": ("gpt2", GPT2 | dict(activation_function="gelu", n_inner=56, tie_word_embeddings=False)),
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neox": ("gpt_neox", PLAIN | dict(rotary_pct=0.5)),
    "gpt_neox-serial": ("gpt_neox", PLAIN | dict(use_parallel_residual=False, hidden_act="gelu_fast", attention_bias=False)),
    "opt": ("opt", {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | dict(ffn_dim=56, word_embed_proj_dim=48)),
    "llama": ("llama", SIZE),
    "llama-biased": ("llama", SIZE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama-llama3": ("llama", SIZE | dict(rope_parameters=LLAMA3)),
    "llama-linear": ("llama", SIZE | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e4))),
    "mistral": ("mistral", SIZE | dict(sliding_window=8)),
    "mistral-full": ("mistral", SIZE | dict(sliding_window=None)),
    "qwen2": ("qwen2", SIZE | dict(sliding_window=8, use_sliding_window=False)),
    "qwen2-window": ("qwen2", SIZE | dict(sliding_window=8, use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("qwen3", SIZE),
    "gemma": ("gemma", SIZE),
    "gemma2": ("gemma2", SIZE | ALTERNATE | dict(query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=5.0)),
    "gemma3_text": ("gemma3_text", SIZE | ALTERNATE | dict(query_pre_attn_scalar=24, rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "olmo2": ("olmo2", SIZE),
    "phi3": ("phi3", SIZE | dict(sliding_window=8)),
    "qwen": ("qwen2", PLAIN | dict(num_key_value_heads=3)),  # transformers has no class for it: see first_generation
}


def shake(net):
    """Weights as far from their initial values as keeps activations of size one: nothing may sit at 0 or 1."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim == 1:
                p += 0.3 * noise
            elif re.search(r"embed|wte|wpe", name):
                p.copy_(noise)
            else:
                p.copy_(noise / (p.shape[0] if re.search(r"\bh\..*c_(attn|proj|fc)", name) else p.shape[1]) ** 0.5)


def first_generation(folder):
    """Rewrites a saved Qwen2 checkpoint in the layout of first-generation Qwen."""
    old, new = load_file(folder / "model.safetensors"), {}
    raw = json.loads((folder / "config.json").read_text())
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
    for i in range(3):
        a, b = f"model.layers.{i}.", f"transformer.h.{i}."
        names |= {a + "input_layernorm": b + "ln_1", a + "post_attention_layernorm": b + "ln_2", a + "self_attn.o_proj": b + "attn.c_proj",
                  a + "mlp.up_proj": b + "mlp.w1", a + "mlp.gate_proj": b + "mlp.w2", a + "mlp.down_proj": b + "mlp.c_proj"}
        for kind in ("weight", "bias"):
            new[f"{b}attn.c_attn.{kind}"] = torch.cat([old.pop(f"{a}self_attn.{part}_proj.{kind}") for part in "qkv"])
    new |= {names[name.rpartition(".")[0]] + ".weight": x for name, x in old.items()}
    save_file(new, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen", vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, kv_channels=16, seq_length=64,
        max_position_embeddings=128, intermediate_size=112, layer_norm_epsilon=raw["rms_norm_eps"], rotary_emb_base=10000, rotary_pct=1.0,
        no_bias=True, use_logn_attn=True, use_dynamic_ntk=True, use_flash_attn="auto", bf16=True, tie_word_embeddings=False)))


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
    Tokenizer(models.WordLevel({str(i): i for i in range(ids)}, unk_token="0")).save(str(folder / "tokenizer.json"))


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
    net.get_submodule(row["prefix"] + row["names"]["norm"]).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
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
