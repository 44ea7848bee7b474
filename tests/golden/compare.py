"""Compare a port with the golden files: compare.main(port), as ../port_numpy.py does it.

port is a module with the functions of port_numpy.py, NumPy arrays in and out, and its NETWORKS. These must
run in float64, as the stored gradients are checked by differences of the loss; a port that differentiates by
itself, or runs in float32 only, replaces that part of family() by its own gradients.
"""
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
TOLERANCE = {"float32": 2e-5, "float64": 1e-9}      # of a stored array's dtype; none for integers


def family(port, g, config):
    w = {k.removeprefix("weight/"): x.astype(np.float64) for k, x in g.items() if k.startswith("weight/")}
    net, ends = port.NETWORKS[config["model_type"]], np.cumsum(g["lengths"])

    def run(w):     # the sequences end to end
        states, logits = zip(*(net(config, w, tokens) for tokens in np.split(g["tokens"], ends[:-1])))
        return [np.concatenate(x) for x in zip(*states)], np.concatenate(logits)

    def loss(**changed):
        return port.classifier_loss(run(w | changed)[0][-1][ends - 1], w | changed, g["target"])

    states, logits = run(w)
    for i, x in zip([*range(len(states) - 1), "final"], states):
        yield f"hidden.{i}", x, g[f"hidden.{i}"]
    yield from (("logits", logits, g["logits"]), ("loss", loss(), g["loss"]))
    b, c = np.split(g["tokens"], ends[:-1])[1:]
    scores = [port.option_loglik(net, config, w, c[:15], option) for option in (c[15:], b[:4])]
    yield "option.loglik", scores, g["option.loglik"]
    for key in [key for key in g if key.startswith("gradient.")]:
        stored, name = g[key].astype(np.float64), key.removeprefix("gradient.")
        steps = [*np.eye(stored.size)[np.abs(stored).ravel().argsort()[-4:]],   # the four largest entries
                 np.cos(np.arange(stored.size)) / stored.size ** 0.5]           # and all entries at once
        for step in (1e-4 * step.reshape(stored.shape) for step in steps):
            slope = (loss(**{name: w[name] + step}) - loss(**{name: w[name] - step})) / 2e-4
            yield key, slope, np.float32((stored * step).sum() / 1e-4)


def graph(port, g, _):
    index, similarity = port.knn(g["x"], 7)
    W = port.affinity(g["cosine.index"], g["cosine.similarity"], 3.0)
    S, (row, col) = port.normalise(W), W.nonzero()
    crow = np.append(0, np.bincount(row, minlength=len(W)).cumsum())
    out = {"cosine.index": index, "cosine.similarity": similarity, "S.crow": crow, "S.col": col,
           "W.value": W[row, col], "S.value": S[row, col],
           "F.half": port.propagate(S, g["Y"], 0.5), "F.most": port.propagate(S, g["Y"], 0.99)}
    yield from ((key, x, g[key]) for key, x in out.items())


def probe(port, g):
    features = g["probe.features"].astype(np.float64)
    x, mean, scale = port.standardise(features)
    for name, y in (("hard", g["probe.hard"]), ("soft", g["probe.soft"]), ("cv", g["probe.hard"])):
        weight, bias, l2 = g[f"{name}.weight"], g[f"{name}.bias"], g[f"{name}.l2"]
        w = np.append(weight * scale, bias + weight @ mean)
        yield f"{name}.weight", port.gradient(x, y, l2, w)[0], np.zeros(len(w))     # the optimum
        yield f"{name}.bias", port.fit(x, y, l2), w
        yield f"{name}.p", port.sigmoid(features @ weight + bias), g[f"{name}.p"]
    l2, p = port.cross_validate(x, y, g["probe.fold"])
    yield from (("cv.l2", l2, g["cv.l2"]), ("cv.held_out", p, g["cv.held_out"]))
    yield "cv.loss", port.metrics(p, y)["cross_entropy"], g["cv.loss"]


def method(port, g, _):
    yield from probe(port, g)
    p, w, fractions = g["loss.p"], g["loss.w"], g["loss.fraction"]
    label, is_self = port.route(*(g[f"route.{name}"] for name in ("p_ik", "own", "weak", "tau")))
    out = {"route.label": label, "route.is_self": is_self, "loss.product": port.product(p, w),
           "loss.log_confidence": [port.log_confidence(p, w, fraction) for fraction in fractions],
           "smooth.p": port.smooth(g["smooth.features"], g["smooth.prior"], 0.9, 5, 3.0),
           "metric.pgr": port.pgr(*g["metric.accuracies"])}
    measured = port.metrics(g["metric.p"].astype(np.float64), g["metric.y"].astype(np.float64))
    out |= {f"metric.{name}": x for name, x in measured.items()}
    yield from ((key, x, g[key]) for key, x in out.items())


def select(port, g, _):
    parts = ({key.removeprefix(of): x for key, x in g.items() if key.startswith(of)}
             for of in ("learn.", "transfer."))
    out = port.select(*parts)
    for choice in ("chosen", "alone"):
        for key, x in zip(("layer", "alpha", "k", "before", "after"), out[choice]):
            yield f"{choice}.{key}", x, g[f"{choice}.{key}"]
    for rule, tau in zip(("answers", "labels", "item"), out["tau"]):
        yield f"tau.{rule}", tau, g[f"tau.{rule}"]
    for key in ("rule", "is_self", "routed", "refined", "smoothed_weak"):
        yield f"select.{key}", out[key], g[f"select.{key}"]


FILES = {"gpt2": family, "llama": family, "gemma3_text": family, "graph": graph, "method": method,
         "select_on": select, "select_off": select}


def difference(got, want):
    """The largest |got - want| / max(1, |want|); infinite for another shape."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.max(np.abs(got - want) / np.maximum(1, np.abs(want))) if got.shape == want.shape else np.inf


def compare(port, path):
    """Yields (key, difference, tolerance). A safetensors file: 8 bytes of length, that much JSON, arrays."""
    blob = path.read_bytes()
    header = json.loads(blob[8:8 + int.from_bytes(blob[:8], "little")])
    config = json.loads(header["__metadata__"].get("config", "{}"))
    for key, got, want in FILES[path.stem](port, load_file(path), config):
        yield key, difference(got, want), TOLERANCE.get(str(want.dtype), 0)


def main(port, folder=HERE):
    """Print a line per file; 1 if anything is beyond its tolerance, else 0."""
    failed = 0
    for name in FILES:
        rows = list(compare(port, Path(folder, f"{name}.safetensors")))
        wrong = dict.fromkeys(key for key, d, tolerance in rows if not d <= tolerance)
        arrays, largest = len({row[0] for row in rows}), max(row[1] for row in rows)
        print(f"{name}.safetensors: {arrays} arrays, largest difference {largest:.1e}",
              *["MISMATCH in", *wrong] if wrong else [])
        failed |= bool(wrong)
    return failed
