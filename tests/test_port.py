"""The port kit: golden/*.safetensors against the code and against port_numpy.py, which must do without torch.

    python -m pytest tests/test_port.py         15 seconds on two cores; no network; needs no GPU

Golden files are worth something only if a wrong port fails on them: every stored array is changed in one
value, and every trap that port_numpy.py avoids is stepped into once.
"""
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import port_numpy
import make_golden
from golden import compare

TESTS = Path(__file__).resolve().parent
GOLDEN = {path.stem: path for path in sorted((TESTS / "golden").glob("*.safetensors"))}


def metadata(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


@pytest.fixture
def without_torch(tmp_path):
    """Runs python with a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is out of bounds here')\n")

    def run(*arguments):
        return subprocess.run([sys.executable, *map(str, arguments)], text=True, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120)
    assert "out of bounds" in run("-c", "import torch").stderr
    return run


def test_port_passes_without_torch(without_torch):
    run = without_torch(TESTS / "port_numpy.py")
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split(".")[0] for line in run.stdout.splitlines()] == list(compare.FILES)
    assert set(compare.FILES) == set(GOLDEN)


def test_size():
    assert sum(path.stat().st_size for path in GOLDEN.values()) < 600_000


def test_files_are_what_the_script_writes(tmp_path):
    make_golden.main(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(GOLDEN)
    for name, path in GOLDEN.items():
        old, new = load_file(path), load_file(tmp_path / path.name)
        assert old.keys() == new.keys()
        for key in old:
            torch.testing.assert_close(torch.tensor(new[key]), torch.tensor(old[key]), rtol=1e-5, atol=1e-5,
                                       msg=lambda text, key=key: f"{name}, {key}: {text}")
        assert metadata(path).get("config") == metadata(tmp_path / path.name).get("config")
        assert metadata(path).keys() >= {"torch", "numpy", "python"}


@pytest.mark.parametrize("name", GOLDEN)
def test_script_describes_every_array(name):
    words = make_golden.__doc__.replace(",", " ").split()
    for key in load_file(GOLDEN[name]):
        part, _, rest = key.partition(".")
        known = {key, f".{rest}", f"FIT.{rest}"}
        known |= {f"{part}.{{{name}" for name in ("accuracy", "answers") if rest in make_golden.__doc__}
        known |= {f"CHOICE.{rest}"} if part in ("chosen", "alone") else set()
        known |= {"hidden.{i}"} if part == "hidden" else {"gradient.NAME"} if part == "gradient" else set()
        known |= {"weight/NAME"} if key.startswith("weight/") else set()
        assert known & set(words), key


# ---- a wrong file, a wrong port ----------------------------------------------------------------------------

PLACE = {   # where a value matters that the first of its array does not
    "method": {"route.own": 7},
    "select_on": {"learn.own": 2, "learn.truth": 1, "learn.group": 8, "learn.states": 66, "transfer.own": 8,
                  "transfer.by_fold": 39, "transfer.states": 6},
    "select_off": {"learn.truth": 1, "learn.fold": 1, "learn.states": 42, "transfer.own": 1,
                   "transfer.states": 6}}


def spoil(name, key, folder):
    """A copy of a golden file with one value changed: an integer's last bit, a number by 1."""
    g = load_file(GOLDEN[name])
    at = PLACE.get(name, {}).get(key, 0)
    if key.endswith(("wte.weight", "embed_tokens.weight")) and key.startswith("weight/"):
        at = int(g["tokens"][0]) * g[key].shape[1]
    flat = g[key].reshape(-1)
    flat[at] = flat[at] ^ 1 if flat.dtype.kind in "iu" else flat[at] + 1
    save_file(g, folder / GOLDEN[name].name, metadata(GOLDEN[name]))


def wrong(port, path):
    return any(not d <= tolerance for _, d, tolerance in compare.compare(port, path))


@pytest.mark.parametrize("name", GOLDEN)
def test_every_array_counts(name, tmp_path):
    for key in load_file(GOLDEN[name]):
        if (name, key) != ("select_off", "learn.group"):    # no single one decides: "items for groups" below
            spoil(name, key, tmp_path)
            assert wrong(port_numpy, tmp_path / GOLDEN[name].name), key


@pytest.mark.parametrize("name", GOLDEN)
def test_one_wrong_value_ends_with_1(name, tmp_path, without_torch):
    for path in GOLDEN.values():
        shutil.copy(path, tmp_path)
    spoil(name, list(load_file(GOLDEN[name]))[-1], tmp_path)
    run = without_torch(TESTS / "port_numpy.py", tmp_path)
    assert run.returncode == 1 and not run.stderr
    assert [line.split(".")[0] for line in run.stdout.splitlines() if "MISMATCH" in line] == [name]


TRAPS = {   # what goes wrong: (a file that shows it, text of port_numpy.py, its wrong replacement)
    "key/value heads tiled": ("llama", "np.repeat(x, H // x.shape[1], axis=1)",
                              "np.tile(x, (1, H // x.shape[1], 1))"),
    "window one more": ("gemma3_text", "ago >= (window or T)", "ago > (window or T)"),
    "window one less": ("gemma3_text", "ago >= (window or T)", "ago >= (window or T + 1) - 1"),
    "pairs interleaved": ("llama", "x[..., :len(slow)] + 1j * x[..., len(slow):]",
                          "x[..., ::2] + 1j * x[..., 1::2]"),
    "turned backwards": ("llama", "1j * np.arange", "-1j * np.arange"),
    "llama3 scaling read as linear": ("llama", '"llama3"', '"yarn"'),
    "scaling ignored": ("gemma3_text", 'scaling.get("factor", 1)', "1"),
    "local blocks scaled": ("gemma3_text", '["rope_local_base_freq"], {})',
                            '["rope_local_base_freq"], config["rope_scaling"])'),
    "one RoPE base": ("gemma3_text", '(config["rope_local_base_freq"], {})', '(config["rope_theta"], {})'),
    "eps forgotten": ("llama", "+ eps)", "+ 1e-6)"),
    "eps outside the root": ("gpt2", "np.sqrt((x ** 2).mean(-1, keepdims=True) + eps)",
                             "(np.sqrt((x ** 2).mean(-1, keepdims=True)) + eps)"),
    "erf GELU": ("gpt2", "(2 / np.pi) ** 0.5 * (x + 0.044715 * x ** 3)", "0.8 * x + 0.0346 * x ** 3"),
    "fused rows per head": ("gpt2", ".reshape(T, 3, H, -1).swapaxes(0, 1)",
                            ".reshape(T, H, 3, -1).transpose(2, 0, 1, 3)"),
    "mean kept in LayerNorm": ("gpt2", "x - x.mean(-1, keepdims=True)", "x"),
    "positions forgotten": ("gpt2", ' + w["transformer.wpe.weight"][:T]', ""),
    "scores by head_dim": ("gemma3_text", 'config["query_pre_attn_scalar"] if gemma else D', "D"),
    "1 + weight forgotten": ("gemma3_text", "(1 if gemma else 0)", "0"),
    "embedding not scaled": ("gemma3_text", '(config["hidden_size"] ** 0.5 if gemma else 1)', "1"),
    "q and k not normed": ("gemma3_text", "        if gemma:  ", "        if False:  "),
    "SiLU for GELU": ("gemma3_text", "gelu(gate) if gemma else ", ""),
    "head tied": ("llama", 'w.get("lm_head.weight", embedding)', "embedding"),
    "logits not capped": ("gemma3_text", " if cap else logits", " if False else logits"),
    "classes swapped": ("gpt2", "(1 - target) * log_p[:, 0] + target", "target * log_p[:, 0] + (1 - target)"),
    "ties to the higher index": ("graph", 'np.argsort(-s, axis=1, kind="stable")',
                                 "np.lexsort((-np.arange(len(s)) * np.ones(s.shape), -s))"),
    "a row its own neighbour": ("graph", "np.fill_diagonal(s, -np.inf)", "None"),
    "rows not at length 1": ("graph", "x / np.maximum(np.linalg.norm", "x / np.maximum(0 * np.linalg.norm"),
    "a mutual pair counts once": ("graph", "A + A.T", "np.maximum(A, A.T)"),
    "rows sum to 1": ("graph", "scale[:, None] * W * scale", "scale[:, None] ** 2 * W"),
    "an isolated row shrinks": ("graph", "np.float64), S.any(1)", "np.float64), S.any(1) | True"),
    "1 - alpha forgotten": ("graph", "(1 - alpha) * F[u]", "F[u]"),
    "deviation over N": ("method", "ddof=1", "ddof=0"),
    "bias penalised": ("method", "(np.arange(len(w)) < len(w) - 1)", "np.ones(len(w))"),
    "l2 for l2 / 2": ("method", "l2 * (np", "2 * l2 * (np"),
    "tau exclusive": ("method", "p_ik >= tau, own, weak), p_ik >= tau", "p_ik > tau, own, weak), p_ik > tau"),
    "not centred": ("method", "features - features.mean(0)", "features"),
    "half rounded up": ("method", "round(float(w.mean()) * len(w))", "int(w.mean() * len(w) + 0.5)"),
    "ties at the cut turned round": ("method", 'np.argsort(-p, kind="stable")',
                                     "np.lexsort((-np.arange(len(p)), -p))"),
    "no ramp": ("method", "min(1, fraction / 0.2)", "1"),
    "0 / 0": ("method", "np.maximum(p * w + (1 - p) * (1 - w), 1e-12)", "(p * w + (1 - p) * (1 - w))"),
    "accuracy at 1/2": ("method", "(p > 0.5) == (y", "(p >= 0.5) == (y"),
    "ties lost in AUROC": ("method", " + 0.5 * (pairs == 0)", ""),
    "bins of equal width": ("method", 'np.array_split(np.argsort(p, kind="stable"), 10)',
                            "[np.flatnonzero(np.minimum(p * 10 // 1, 9) == i) for i in range(10)]"),
    "ties to the last rule": ("select_off", "accuracy.index(max(accuracy))",
                              "2 - accuracy[::-1].index(max(accuracy))"),
    "P(IK) against the accuracy of labels": ("select_off", '.mean(), 1 - 1e-6)', '.mean() * 0, 1)'),
    "supervisor's probability not calibrated": ("select_off",
                                                "np.abs(log_odds(weak)) - mean", "np.abs(log_odds(weak))"),
    "every better smoothing taken": ("select_off", "net.sum() > z * np.abs(net).sum() ** 0.5 and ", ""),
    "items for groups": ("select_off", "np.bincount(group, now - before)", "now - before"),
    "one candidate's test": ("select_off", "0.05 / (layers * len(alphas) * len(ks))", "0.05"),
    "alpha before k": ("select_on", "for layer, k, alpha in itertools.product(range(layers), ks, alphas)",
                       "for layer, alpha, k in itertools.product(range(layers), alphas, ks)"),
    "k beyond the smallest view": ("select_on", "max(6, min(len(view[1]) for view in views))", "99"),
    "own labels no priors": ("select_on", "np.where(is_own, own, prior)", "prior"),
    "routed items scored": ("select_off", "~np.isnan(truth) & ~is_own", "~np.isnan(truth)"),
    "D_u labelled by who saw the fold": ("select_off", 'enumerate(transfer["by_fold"])',
                                         'enumerate([transfer["weak"]] * 3)'),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", TRAPS)
def test_traps(name):
    file, right, mistake = TRAPS[name]
    source = (TESTS / "port_numpy.py").read_text("utf-8")
    assert source.count(right) == 1, name
    port = types.ModuleType("port")
    exec(source.replace(right, mistake), port.__dict__)
    assert wrong(port, GOLDEN[file])
