"""What model.load takes and what it refuses: configurations, tensors, tokenizers that do not fit, the hub.

Run: pytest tests/test_load.py (about 40 s on two cores). Real files are read from ../shared when it is there.
"""
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

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file

import model as M
from data import checkpoint as C

transformers = pytest.importorskip("transformers")
from test_model import LENGTHS, REAL, TOKENS, reference, tiny, tokenizer_file  # noqa: E402, F401

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
            C.configure(raw)
        return
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    count = sum(torch.Size(shape).numel() for _, _, shapes in C.tensors(C.configure(raw)) for shape in shapes)
    assert count == sum(p.numel() for p in theirs.parameters())


def test_real_index():
    raw = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded", "config.json").read_text())
    index = json.loads(shared("hub", "meta-llama__Llama-3.2-3B_resharded",
                              "model.safetensors.index.json").read_text())
    prefix = C.FAMILIES["llama"]["prefix"]
    assert {prefix + source for source, _, _ in C.tensors(C.configure(raw))} == set(index["weight_map"])


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
            C.configure(base | keys)


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
        C.configure({"model_type": family, key: value})


def test_keys_that_say_what_is_so_are_taken():
    for same in (dict(model_type="llama", partial_rotary_factor=1.0),
                 dict(model_type="gpt_neox", rotary_emb_base=500, rope_theta=500, partial_rotary_factor=0.25),
                 dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh"),
                 dict(model_type="gemma", hidden_act="gelu", hidden_activation=None),
                 dict(model_type="mistral", attention_bias=False)):
        C.configure(same)
    assert C.configure(dict(model_type="gemma2", hidden_activation="gelu")).act == "gelu"  # and not tanh


def test_absent_keys_take_the_family_default():
    config = C.configure(dict(model_type="gpt_neox"))
    assert config.parallel and config.rope[1] == 24 and config.heads == 64  # 0.25 of 96
    assert C.configure(dict(model_type="mistral")).windows == (4096,) * 32
    assert C.configure(dict(model_type="mistral", sliding_window=None)).windows == (None,) * 32
    assert C.configure(dict(model_type="qwen2", sliding_window=32768)).windows == (None,) * 32
    assert C.configure(dict(model_type="gemma", hidden_act="gelu")).act == "gelu_pytorch_tanh"
    assert C.configure(dict(model_type="gemma3_text")).windows[:7] == (4096,) * 5 + (None, 4096)
    assert C.configure(dict(model_type="gpt_neo")).windows[:4] == (None, 256, None, 256)


@pytest.mark.parametrize("family", [family for family in C.FAMILIES if family != "qwen"])
def test_every_default_is_transformers_own(family):
    import transformers
    theirs, compared = transformers.AutoConfig.for_model(family), 0
    for field, mine in C.FAMILIES[family]["numbers"].items():
        keys = C.keys_of(C.FAMILIES[family], field)
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
        config = C.configure(raw)
        state = {"model." + source: torch.ones(shape[0], dtype=stored)
                 for source, _, shape in C.tensors(config)}
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
