"""What model.load takes and what it refuses: configurations, tensors, tokenizers that do not fit, the hub.

Run: pytest tests/test_load.py (a minute on two cores). Real files are read from ../shared when it is there.
"""
import dataclasses
import hashlib
import http.server
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, write_llama
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import model as M
from data import architecture as A
from data.checkpoint import read_tensor
from data.families import INERT_KEYS

transformers = pytest.importorskip("transformers")
from test_model import (LENGTHS, REAL, TOKENS, TRAIN, VARIANTS, reference, shake, tiny,  # noqa: E402, F401
                        tokenizer_file)

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
           "gpt2_gptq-4bit_variant": "quantised"}
HUB = sorted(p.parent.name for p in SHARED.glob("hub/*/config.json")) or ["none here"]


@pytest.mark.parametrize("name", HUB)
def test_real_config(name):
    """A real config.json gives the parameter count that transformers has for it, or a refusal with the
    reason."""
    raw = json.loads(shared("hub", name, "config.json").read_text())
    if name in REFUSED:
        with pytest.raises(M.LoadError, match=REFUSED[name]):
            A.configure(raw)
        return
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    count = sum(torch.Size(shape).numel() for _, _, shapes in A.tensors(A.configure(raw)) for shape in shapes)
    assert count == sum(p.numel() for p in theirs.parameters())


def test_real_index():
    raw = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded", "config.json").read_text())
    index = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded",
                              "model.safetensors.index.json").read_text())
    prefix = A.FAMILIES["llama"]["prefix"]
    assert {prefix + source for source, _, _ in A.tensors(A.configure(raw))} == set(index["weight_map"])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(dtype, value, tmp_path):
    """At the ends and inside what a processor takes at once; no value at all is finite."""
    for size in (1, 7, 70, 70_000):
        for place in {0, size // 3, size - 1}:
            x = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)      # whose sum is infinite
            save_file({"x": x, "none": x[:0].clone()}, tmp_path / "x.safetensors")
            assert torch.equal(read_tensor(tmp_path / "x.safetensors", "x"), x)
            assert len(read_tensor(tmp_path / "x.safetensors", "none")) == 0
            x[place] = value
            save_file({"x": x}, tmp_path / "x.safetensors")
            with pytest.raises(M.LoadError, match="x holds NaN or infinity"):
                read_tensor(tmp_path / "x.safetensors", "x")


def sharded(weight_map):
    def mutate(folder):
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
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
    "index that names too much": (sharded(lambda s: {k: "model-1.safetensors" for k in [*s, "zz"]}),
                                  "disagree, first on zz"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json there"),
    "tokenizer damaged": (cut("tokenizer.json", 0.7), "tokenizer's files are damaged"),
    "ALiBi instead of positions": (tensors(lambda s: s.pop("transformer.wpe.weight")),
                                   r"tensor wpe\.weight is missing"),
    "extra head": (tensors(lambda s: s.update({"transformer.senses.weight": torch.ones(2, 40)})),
                   "1 unexpected tensors, the first is senses.weight"),
    "multi-query attention": (
        tensors(lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.ones(40, 56)})),
        r"c_attn\.weight has shape \(56, 40\), config\.json implies \(120, 40\)"),
}


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
            A.configure(base | keys)


# ---- keys of config.json -----------------------------------------------------------------------------------

ISSUE_KEYS = dict(  # found in real files, read by no class of our families
    max_sequence_length=1024, type_vocab_size=16, custom_pipelines={}, end_token_id=2, num_steps=10,
    badwordsids=[[1]], max_new_tokens=20, add_cross_attention=False, use_flash_attention=False,
    torchscript=False, author="someone",
    _model_name_or_path="x", sliding_window_size=4096, unsloth_version="2024.8", pruned_heads={},
    tie_encoder_decoder=False, _attn_implementation_autoset=True, new_trick=0.5,
    auto_map={"AutoModelForCausalLM": "modeling_x.X"}, **{"transformers.js_config": {}})
DROPPED_KEYS = dict(max_length=20, bad_words_ids=[[1]], temperature=0.5, top_p=0.9,
                    do_sample=True)  # known, and nothing to a forward pass


def config_class(family):
    return type(transformers.AutoConfig.for_model(family))


def keys_that_transformers_knows(family):
    """The fields of the family's configuration class and of its bases, what their constructors take beside
    them, and what the family's network asks the configuration for."""
    cls = config_class(family)
    network = inspect.getsource(inspect.getmodule(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[cls]))
    makers = [vars(base)["__post_init__"] for base in cls.__mro__ if "__post_init__" in vars(base)]
    taken = r'kwargs\.(?:pop|get)\("(\w+)"'
    keys = {key for maker in makers for key in re.findall(taken, inspect.getsource(maker))}
    keys -= {"rope_scaling", "rope_theta"}  # left to the family's own method
    if hasattr(cls(), "rope_parameters"):
        keys |= set(re.findall(taken, inspect.getsource(cls.convert_rope_params_to_dict)))
    keys |= {field.name for field in dataclasses.fields(cls)} | cls.attribute_map.keys()
    keys |= set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', network))
    return keys | transformers.GenerationConfig._get_default_generation_params().keys()


@pytest.mark.parametrize("family", [family for family in A.FAMILIES if family != "qwen"])
def test_every_key_that_transformers_knows_is_read_inert_or_refused(family):
    """And the row names no other key."""
    mine, theirs = A.known_keys(A.FAMILIES[family]), keys_that_transformers_knows(family)
    assert len(theirs) > 60
    assert not {key for key in theirs - mine if not INERT_KEYS.fullmatch(key)}
    elsewhere = {"attention_layers", "_sliding_window_pattern",  # written by transformers itself
                 "is_causal", "transformers_weights", "partial_rotary_factor"}  # by code of all families
    assert mine - theirs <= elsewhere


def alike(raw, folder):
    """transformers' model of this config.json, saved with it as it stands, and ours: the same logits."""
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**raw), attn_implementation="eager", dtype=torch.float32).eval()
    shake(theirs)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_file(folder)
    net, _ = M.load(folder)
    with torch.no_grad():
        want = theirs(TOKENS, attention_mask=REAL.long()).logits[REAL]
        torch.testing.assert_close(net.logits(net.packed(TOKENS[REAL], LENGTHS.tolist())[0]), want)
    return net


def shrunk(raw):
    """The same configuration in small."""
    row = A.FAMILIES[raw["model_type"]]
    numbers = A.read_numbers(raw, row)
    kv_heads = numbers.get("kv_heads")
    small = dict(vocab=101, width=48, layers=3, heads=6, kv_heads=6 if kv_heads == numbers["heads"] else 2,
                 head_dim=16, inner=56, context=64, slide_from=1)
    out = dict(raw)
    for field, value in small.items():
        for key in A.keys_of(row, field) if field in row["numbers"] else ():
            if raw.get(key) is not None:
                out[key] = value
    if "layer_types" in raw:
        out["layer_types"] = raw["layer_types"][:3]
    return out | {key: None for key in raw if key.endswith("_token_id")}


@pytest.mark.parametrize("name", [name for name in HUB if name not in REFUSED])
def test_real_configurations_in_small(name, tmp_path, capsys):
    """Equal logits, also with the keys that real files have beside those."""
    raw = shrunk(json.loads(shared("hub", name, "config.json").read_text()))
    full = raw | ISSUE_KEYS | DROPPED_KEYS
    alike(full, tmp_path)
    assert A.configure(full) == A.configure(raw)
    named = A.unread_keys(full)
    unknown = ISSUE_KEYS.keys() - A.known_keys(A.FAMILIES[raw["model_type"]])
    assert set(named) == unknown | set(A.unread_keys(raw)) and len(unknown) >= len(ISSUE_KEYS) - 1
    assert "ignored: " + ", ".join(named)[:300] in capsys.readouterr().out


FOREIGN = dict(  # keys of some families, with values that would change every other
    rotary_emb_base=500, rotary_pct=0.5, layer_norm_eps=0.5, layer_norm_epsilon=0.5, rms_norm_eps=0.5,
    activation_function="relu", hidden_act="relu", hidden_activation="relu", num_layers=2, n_positions=8,
    window_size=8, sliding_window=8, use_sliding_window=False, layer_types=["full_attention"] * 3,
    mlp_bias=True, attention_bias=True,
    kv_channels=4, n_inner=8, ffn_dim=8, use_parallel_residual=False, attn_logit_softcapping=1.0,
    final_logit_softcapping=1.0, query_pre_attn_scalar=7, rope_local_base_freq=500.0, use_mrope=True,
    rope_interleaved=True, alibi=True, multi_query=True, pos_offset=3, qk_layernorm=True, no_bias=False,
    attention_types=[[["local"], 3]], scale_attn_weights=False, do_layer_norm_before=False)


@pytest.mark.parametrize("family", [family for family in A.FAMILIES if family != "qwen"])
def test_keys_of_other_families_change_nothing(family, tmp_path, capsys):
    mine = A.known_keys(A.FAMILIES[family])
    foreign = {key: value for key, value in FOREIGN.items() if key not in mine}
    alike(dict(model_type=family) | VARIANTS[family][1] | foreign, tmp_path)
    assert len(foreign) > 15 and f"ignored: {', '.join(foreign):.300}" in capsys.readouterr().out


@pytest.mark.parametrize("variant, keys", [
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=4.0))),
    ("qwen2", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0), rope_theta=5e4)),
    ("gpt_neox", dict(rope_scaling=dict(type="dynamic", factor=8.0), rotary_pct=0.5)),
    ("gpt_neox", dict(rope_scaling=dict(type="linear", factor=8.0), rotary_pct=0.5, head_dim=16)),
    ("llama", dict(partial_rotary_factor=1.0)),
    ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e4, partial_rotary_factor=1.0))),
    ("mistral", dict(attention_bias=False)),
    ("gemma", dict(hidden_activation="relu", hidden_act="gelu")), ("gemma2", dict(hidden_act="relu"))])
def test_keys_that_are_honoured(variant, keys, tmp_path):
    family, numbers = VARIANTS[variant]
    raw = {key: value for key, value in numbers.items() if key != "rope_parameters"}
    net = alike(dict(model_type=family) | raw | keys | dict(max_position_embeddings=43), tmp_path)
    with pytest.raises(ValueError, match="longer than the context of 43"):
        net.packed(TOKENS[0, [0] * 44], [44])


@pytest.mark.parametrize("family, key, value", [
    ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "scale_attn_weights", False),
    ("gpt2", "add_cross_attention", True), ("llama", "partial_rotary_factor", 0.5),
    ("opt", "do_layer_norm_before", False), ("opt", "_remove_final_layer_norm", True),
    ("opt", "layer_norm_elementwise_affine", False), ("gemma", "use_bidirectional_attention", True),
    ("gemma3_text", "use_bidirectional_attention", True), ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("qwen", "no_bias", False), ("qwen", "use_cache_quantization", True),
    *((family, "is_causal", False) for family in A.FAMILIES),
    ("llama", "per_layer_config", {"1": {"rms_norm_eps": 0.5}}),
    ("llama", "transformers_weights", "other.safetensors")])
def test_values_that_would_change_the_result_are_refused(family, key, value):
    with pytest.raises(M.LoadError, match=f"{key} = .* is not supported, only "):
        A.configure({"model_type": family, key: value})


@pytest.mark.parametrize("scaling", ["yarn", "longrope", "su", "mrope"])
def test_rope_scalings_that_we_lack_are_refused(scaling):
    with pytest.raises(M.LoadError, match=f"RoPE scaling '{scaling}'"):
        A.configure(dict(model_type="phi3", rope_scaling=dict(type=scaling, factor=4.0)))


def test_biases_that_no_key_announces_decide(reference, tmp_path):
    """MistralConfig does not read attention_bias: the tensors do not fit."""
    shutil.copytree(reference("mistral")[0], tmp_path / "biased")
    tensors(lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}))(tmp_path / "biased")
    settings(attention_bias=True)(tmp_path / "biased")
    with pytest.raises(M.LoadError, match="unexpected tensors, the first is layers.0.self_attn.q_proj.bias"):
        M.load(tmp_path / "biased")


def test_the_line_of_a_checkpoint_is_one_printable_line(tiny, tmp_path, capsys):
    """A key may be half a character, which no console can print."""
    shutil.copytree(tiny, tmp_path / "odd")
    settings(**{"a\nb\x1b[2J\ud800": 1})(tmp_path / "odd")
    M.load(tmp_path / "odd")
    line, = capsys.readouterr().out.splitlines()
    assert line.isprintable() and "ignored: a b [2J" in line


# ---- files as people have them -----------------------------------------------------------------------------

def same(a, b):
    pairs = zip(a.params.items(), b.params.items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


@pytest.mark.parametrize("shards", ["stale", "missing", "not JSON"])
def test_one_whole_file_wins_over_an_index(shards, tiny, tmp_path):
    """As in transformers: what stands beside model.safetensors is not read."""
    shutil.copytree(tiny, tmp_path / "both")
    state = load_file(tiny / "model.safetensors")
    index = tmp_path / "both" / "model.safetensors.index.json"
    index.write_text("{" if shards == "not JSON" else json.dumps(dict(
        weight_map=dict.fromkeys(state, "model-00001-of-00001.safetensors"))))
    if shards == "stale":
        save_file({name: x + 1 for name, x in state.items()},
                  tmp_path / "both" / "model-00001-of-00001.safetensors")
    net, _ = M.load(tmp_path / "both")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert same(net, M.load(tiny)[0])
    assert torch.equal(net.params["embed.weight"], theirs.transformer.wte.weight)


def snapshot(source, folder, **blobs):
    """A folder of the hub's cache: links to blobs; name=None: a link that leads nowhere."""
    snap = folder / "models--org--name" / "snapshots" / "c0ffee"
    snap.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, snap.parent / file.name)
            (snap / file.name).symlink_to(Path("..") / file.name)
    for name, there in blobs.items():
        (snap / name.replace("__", ".")).unlink(missing_ok=True)
        if there is not None:
            (snap / name.replace("__", ".")).symlink_to(Path("..") / ".." / "blobs" / "0")
    return snap


def test_a_dangling_link_to_a_file_nobody_needs_stops_nothing(tiny, tmp_path):
    import selw2s
    odd = ("README__md", "pytorch_model__bin", "generation_config__json", "vocab__json", "merges__txt",
           "model-00001-of-00002__safetensors", "model__safetensors__index__json", "notes__txt")
    snap = snapshot(tiny, tmp_path, **dict.fromkeys(odd, "link"))
    assert same(M.load(snap)[0], M.load(tiny)[0])
    config = selw2s.Config(device="cpu", dtype="float32")
    (snap / "folder.json").mkdir()
    assert len(selw2s.pretrained(str(snap), False, config).sha256) == 64


@pytest.mark.parametrize("name, there", [(name, there) for name in ("config__json", "model__safetensors",
                                         "tokenizer__json") for there in ("link", None)])
def test_a_half_downloaded_snapshot_is_called_that(name, there, tiny, tmp_path):
    with pytest.raises(M.LoadError, match="half-downloaded.*download it again"):
        M.load(snapshot(tiny, tmp_path, **{name: there}))


def test_a_missing_shard_is_a_half_downloaded_checkpoint(reference, tmp_path):
    snap = snapshot(reference("llama")[0], tmp_path)
    assert len(list(snap.glob("model-*"))) > 2
    M.load(snap)
    sorted(snap.glob("model-*"))[1].unlink()
    with pytest.raises(M.LoadError, match="model-00002-of-.*half-downloaded"):
        M.load(snap)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma"])
def test_a_tied_model_saved_under_the_name_of_its_head(variant, reference, tmp_path):
    """safetensors' save_model keeps one name of two, not always the embedding's."""
    folder = reference(variant)[0]
    shutil.copytree(folder, tmp_path / "tied")
    row = A.FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    embed = f"{row['prefix']}{row['names']['embed']}.weight"
    tensors(lambda s: s.update({"lm_head.weight": s.pop(embed)}))(tmp_path / "tied")
    assert same(M.load(tmp_path / "tied")[0], M.load(folder)[0])


def test_opt_without_the_first_part_of_its_prefix(reference, tmp_path):
    """facebook/opt-6.7b, 13b and 30b say decoder., the others model.decoder.; neither is also right."""
    folder = reference("opt")[0]
    for name, said in (("some", "decoder."), ("none", "")):
        shutil.copytree(folder, tmp_path / name)
        tensors(lambda s, said=said: s.update({
            key.replace("model.decoder.", said): s.pop(key) for key in list(s)}))(tmp_path / name)
        assert all(key.startswith(said) for key in load_file(tmp_path / name / "model.safetensors"))
        assert same(M.load(tmp_path / name)[0], M.load(folder)[0])


def test_heads_of_classifiers_beside_a_causal_model_are_named_and_ignored(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "heads")
    more = {"score.weight": torch.ones(2, 40), "v_head.summary.weight": torch.ones(1, 40),
            "v_head.summary.bias": torch.ones(1)}
    tensors(lambda s: s.update(more))(tmp_path / "heads")
    assert same(M.load(tmp_path / "heads")[0], M.load(tiny)[0])
    assert "a classifier's head ignored: score.weight, v_head.summary.bias, v_head.summary.weight" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("variant", ["gpt2", "gpt2-erf", "gpt_neox", "opt", "llama", "gemma2", "phi3"])
def test_a_saved_student_is_loaded_again(variant, reference, tmp_path, capsys):
    """Its states are the student's; its head is the embedding, or it has none and says so when asked."""
    net, _ = M.load(reference(variant)[0])
    student = M.finetune(net, **TRAIN)
    student.save(tmp_path / "student")
    again, _ = M.load(tmp_path / "student")
    sequences = TRAIN["inputs"][:3]
    torch.testing.assert_close(M.hidden_at(again, sequences), M.hidden_at(student.model, sequences))
    M.finetune(again, **TRAIN, tune="lora").save(tmp_path / "twice")
    line = capsys.readouterr().out.splitlines()[-1]
    assert "a classifier's head ignored: score.weight" in line
    if net.config.tied:
        assert "tied head" in line and again.logits(M.hidden_at(again, sequences)).shape == (3, 101)
    else:
        assert " no head" in line
        with pytest.raises(M.LoadError, match="has a classifier's head.*give the pretrained model"):
            M.read(again, [[1, 2]], [[[3], [4]]], [0])


def test_a_language_model_without_its_head_is_refused(reference, tmp_path):
    shutil.copytree(reference("gpt_neox")[0], tmp_path / "bare")
    tensors(lambda s: s.pop("embed_out.weight"))(tmp_path / "bare")
    with pytest.raises(M.LoadError, match="tensor embed_out.weight is missing"):
        M.load(tmp_path / "bare")


def test_a_tokenizer_larger_than_the_embedding(tiny, tmp_path):
    """Only a text that uses such an id is refused: gemma-3-1b-it has one, people add [PAD]."""
    shutil.copytree(tiny, tmp_path / "larger")
    tokenizer_file(tmp_path / "larger", 110)
    _, tokenizer = M.load(tmp_path / "larger")
    assert tokenizer.backend.get_vocab_size() == 110 and tokenizer.encode(["100"]) == [[100]]
    with pytest.raises(M.LoadError, match="larger: '101' has the token id 101, the embedding only 101 rows"):
        tokenizer.encode(["7", "101"])


@pytest.mark.parametrize("keys, tokenizer, pad", [
    (dict(eos_token_id=7), {}, 7), (dict(eos_token_id=[9, 8]), {}, 9), ({}, {}, 0),
    (dict(pad_token_id=5, eos_token_id=7), dict(pad_token="3"), 5),
    (dict(pad_token_id=-1, eos_token_id=7), {}, 7), (dict(eos_token_id=7), dict(pad_token="3"), 3),
    (dict(eos_token_id=7), dict(pad_token={"content": "105"}), 7)])
def test_a_saved_classifier_names_its_padding(keys, tokenizer, pad, tiny, tmp_path):
    """Without, transformers refuses a batch of more than one."""
    shutil.copytree(tiny, tmp_path / "source")
    tokenizer_file(tmp_path / "source", 110)
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    raw = json.loads((tiny / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if not key.endswith("_token_id")}
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw | keys))
    student = M.finetune(M.load(tmp_path / "source")[0], **TRAIN)
    student.save(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["pad_token_id"] == pad
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    sequences = [[11, 12, 13, 14], [21, 22]]
    with torch.no_grad():
        p = theirs(torch.tensor([sequences[0], sequences[1] + [pad] * 2])).logits.softmax(-1)[:, 1]
    torch.testing.assert_close(student.predict(sequences), p, rtol=1e-5, atol=2e-5)


def test_absent_keys_take_the_family_default():
    config = A.configure(dict(model_type="gpt_neox"))
    assert config.parallel and config.rope[1] == 24 and config.heads == 64  # 0.25 of 96
    assert A.configure(dict(model_type="mistral")).windows == (4096,) * 32
    assert A.configure(dict(model_type="mistral", sliding_window=None)).windows == (None,) * 32
    assert A.configure(dict(model_type="qwen2", sliding_window=32768)).windows == (None,) * 32
    assert A.configure(dict(model_type="gemma", hidden_act="gelu")).act == "gelu_pytorch_tanh"
    assert A.configure(dict(model_type="gemma3_text")).windows[:7] == (4096,) * 5 + (None, 4096)
    assert A.configure(dict(model_type="gpt_neo")).windows[:4] == (None, 256, None, 256)


@pytest.mark.parametrize("family", [family for family in A.FAMILIES if family != "qwen"])
def test_every_default_is_transformers_own(family):
    import transformers
    theirs, compared = transformers.AutoConfig.for_model(family), 0
    for field, mine in A.FAMILIES[family]["numbers"].items():
        keys = A.keys_of(A.FAMILIES[family], field)
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


@pytest.mark.slow
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
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's peak")
@pytest.mark.parametrize("width, layers, vocab, stored, asked", [
    (512, 14, 80_000, "bfloat16", "bfloat16"), (512, 14, 80_000, "bfloat16", "float32"),
    (1024, 16, 256, "float32", "bfloat16")])
def test_memory_of_loading(width, layers, vocab, stored, asked, tmp_path):
    """Loading takes less than 1.2 times the weights' memory, also as the second model of a process, in the
    file's dtype or another: where half of the weights is one tensor, and where a layer's are."""
    write_llama(tmp_path, width, layers, vocab, seed=1)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    state = load_file(tmp_path / "model.safetensors")
    size = sum(x.numel() for x in state.values()) * getattr(torch, asked).itemsize
    save_file({name: x.to(getattr(torch, stored)) for name, x in state.items()},
              tmp_path / "model.safetensors")
    code = ("import re, sys, torch, model; "        # not ru_maxrss, in which the parent's memory counts
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
            f"load = lambda: (peak(), model.load(sys.argv[1], dtype=torch.{asked}), peak()); "
            "weak, strong = load(), load(); print(weak[2] - weak[0], strong[2] - strong[0])")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                         capture_output=True, check=True)
    for grown in (int(x) * 1024 for x in run.stdout.split()[-2:]):
        assert 0.9 * size < grown < 1.2 * size, grown / size
