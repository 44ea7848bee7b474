"""How fast graph.py is, beside faiss, scikit-learn, scipy and plain torch, in one process on the same input.

    python tests/bench_graph.py                   # knn baselines propagate spreading: 10 minutes on two cores
    python tests/bench_graph.py knn --threads 1   # some of them
    OPENBLAS_NUM_THREADS=1 python tests/bench_graph.py propagate    # else scipy's BLAS threads spin on after
                                                  # a call and slow who runs next; scipy itself gains by it
    python tests/bench_graph.py growth            # N = 10k ... 80k: data/results/graph_growth.json and .svg
    python tests/bench_graph.py memory            # peak memory of the self-join of N = 200,000, d = 64
    python tests/bench_graph.py gpu               # beside plain torch on the same GPU, in float32

--keep writes the rows into data/results/speed.json. Runs alternate, ours then theirs; a line gives the median
seconds of each, then the median of the ratios of the pairs, ours / theirs, and their range. With --threads 1
the clock is the processor's, which other programs on the machine disturb less. Inputs are Gaussian rows,
k = 10.
"""
import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import graph  # noqa: E402
from make_results import keep_speed  # noqa: E402

K = 10
KEEP = "--keep" in sys.argv


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(f):
    start = clock()
    f()
    return clock() - start


def compare(name, ours, theirs, repeats, device=None):
    """Print the median seconds of both and the ratio over alternating runs; name: WHAT / PEER (remark)."""
    ours(), theirs()        # once for the allocator and the thread pools
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    a, b = (statistics.median(side) for side in zip(*pairs))
    print(f"{name:58s} {a:8.3f} s {b:8.3f} s   {statistics.median(ratios):5.2f} "
          f"({min(ratios):.2f} ... {max(ratios):.2f}, n = {repeats})", flush=True)
    if KEEP:
        what, peer = name.split(" (")[0].split(" / ")
        faster, here = sorted(1 / ratio for ratio in ratios), f"CPU, {torch.get_num_threads()} threads"
        blas = [f"{key}={value}" for key, value in os.environ.items() if key == "OPENBLAS_NUM_THREADS"]
        keep_speed({"what": what, "peer": peer, "unit": "s", "ours": a, "theirs": b,
                    "times": [statistics.median(faster), faster[0], faster[-1]], "pairs": repeats,
                    "device": device or here,
                    "command": shlex.join([*blas, "python", "tests/bench_graph.py", *sys.argv[1:]])})


def gaussian(n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))


def faiss_search(x):
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    unit = torch.nn.functional.normalize(x).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return index.search(unit, K + 1)[1][:, 1:]      # self comes first where no row has a twin


def knn(repeats):
    for n, d in ((20_000, 768), (50_000, 256)):
        x = gaussian(n, d)
        agree = (graph.knn(x, K)[0].numpy() == faiss_search(x)).mean()
        compare(f"knn {n} x {d} / faiss IndexFlatIP ({agree:.4%} same)",
                lambda: graph.knn(x, K), lambda: faiss_search(x), repeats)
        compare(f"knn {n} x {d}, bfloat16 tiles / faiss IndexFlatIP",
                lambda: graph.knn(x, K, tile=torch.bfloat16), lambda: faiss_search(x), repeats)


def baselines(repeats):
    from sklearn.neighbors import NearestNeighbors
    x = gaussian(20_000, 768)
    unit = torch.nn.functional.normalize(x)

    def brute():
        NearestNeighbors(n_neighbors=K, algorithm="brute").fit(unit.numpy()).kneighbors()

    def cdist():
        for part in unit.split(2048):
            torch.cdist(part, unit).topk(K + 1, largest=False)

    compare("knn 20000 x 768 / scikit-learn brute", lambda: graph.knn(x, K), brute, repeats)
    compare("knn 20000 x 768 / torch.cdist + topk", lambda: graph.knn(x, K), cdist, repeats)


def propagate(repeats):
    import scipy.sparse as sparse
    from scipy.sparse.linalg import cg
    n = 100_000
    S = graph.normalise(graph.affinity(*graph.knn(gaussian(n, 8), K)))
    Y = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = Y.numpy()
    parts = S.values(), S.col_indices().int(), S.crow_indices().int()
    matrix = sparse.csr_matrix(tuple(part.numpy() for part in parts))
    for alpha in (0.9, 0.99):
        A = (sparse.identity(n, format="csr") - alpha * matrix).tocsr()

        def theirs(**stop):
            return np.stack([cg(A, (1 - alpha) * column, x0=column, **stop)[0] for column in y.T], 1)

        exact = graph.propagate(S, Y, alpha, tol=1e-9).F.numpy()
        error = np.abs(graph.propagate(S, Y, alpha).F.numpy() - exact).max()
        for name, stop in (("to our residual", dict(rtol=0, atol=1e-6 * (1 - alpha))),
                           ("rtol 1e-6", dict(rtol=1e-6))):
            off = np.abs(theirs(**stop) - exact).max()
            compare(f"propagate {n}, alpha {alpha} / scipy cg {name} (off {error:.0e}, {off:.0e})",
                    lambda: graph.propagate(S, Y, alpha), lambda: theirs(**stop), repeats)


def spreading(repeats):
    from sklearn.semi_supervised import LabelSpreading
    x = gaussian(20_000, 64)
    label = torch.randint(2, (20_000,), generator=torch.Generator().manual_seed(0))
    label[2_000:] = -1
    Y = torch.nn.functional.one_hot(label.clamp(min=0), 2) * (label[:, None] >= 0)

    def ours():
        graph.propagate(graph.normalise(graph.affinity(*graph.knn(x, K))), Y, 0.9)

    def theirs(kernel):
        with warnings.catch_warnings():     # that it has not converged
            warnings.simplefilter("ignore")
            LabelSpreading(kernel=kernel, gamma=0.01, n_neighbors=K, alpha=0.9).fit(x.numpy(), label.numpy())

    compare("graph + propagate 20000 x 64 / LabelSpreading, knn", ours, lambda: theirs("knn"), repeats)
    compare("graph + propagate 20000 x 64 / LabelSpreading, rbf", ours, lambda: theirs("rbf"), 1)


def gpu(repeats):
    """knn beside the product of all pairs and topk, a tile at a time; propagate on sparse S, by columns."""
    print(torch.cuda.get_device_name(), torch.__version__)

    def waited(f):
        def g():
            f()
            torch.cuda.synchronize()
        return g
    for n, d in ((20_000, 768), (50_000, 256), (200_000, 256)):
        x = gaussian(n, d).cuda()
        unit = torch.nn.functional.normalize(x)

        def theirs():
            return torch.cat([(part @ unit.T).topk(K + 1).indices[:, 1:] for part in unit.split(8192)])
        agree = (graph.knn(x, K)[0] == theirs()).double().mean()
        for tile in (torch.float32, torch.bfloat16):
            name = str(tile).removeprefix("torch.")
            compare(f"knn {n} x {d}, {name} tiles / torch.mm + topk ({agree:.4%} same)",
                    waited(lambda: graph.knn(x, K, tile=tile)), waited(theirs), repeats,
                    torch.cuda.get_device_name())
    found = graph.knn(gaussian(100_000, 8).cuda(), K)
    S, Y = graph.normalise(graph.affinity(*found)), torch.rand(100_000, 2, device="cuda")
    for alpha in (0.9, 0.99):
        seconds = [timed(waited(lambda: graph.propagate(S, Y, alpha))) for _ in range(repeats + 1)][1:]
        print(f"propagate 100000, alpha {alpha}: {statistics.median(seconds):.3f} s, "
              f"{graph.propagate(S, Y, alpha).iterations} iterations", flush=True)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024        # MB


def memory(repeats):
    before, x = peak(), gaussian(200_000, 64)
    seconds = timed(lambda: graph.knn(x, K))
    print(f"knn {len(x)} x 64: {seconds:.0f} s, peak {peak():.0f} MB, {before:.0f} MB before the features")


def growth(repeats):
    """One process per size, so that each peak is its own."""
    import multiprocessing
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        threads = torch.get_num_threads()
        rows = [pool.apply(grown, (n, repeats, threads)) for n in (10_000, 20_000, 40_000, 80_000)]
    command = f"python tests/bench_graph.py growth --threads {threads} --repeats {repeats}"
    head = {"command": command, "k": K, "d": 256, "alpha": 0.9, "columns": 2,
            "threads": threads, "clock": "processor" if threads == 1 else "wall", "repeats": repeats,
            "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
    folder = ROOT / "data" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph_growth.json").write_text(json.dumps(head, indent=1) + "\n")
    draw(head, folder / "graph_growth.svg")


def grown(n, repeats, threads):
    torch.set_num_threads(threads)
    x, Y = gaussian(n, 256), torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    base = peak()
    found = graph.knn(x, K)
    extra = peak() - base
    S = graph.normalise(graph.affinity(*found))
    row = {"N": n, "iterations": graph.propagate(S, Y, 0.9).iterations, "knn_extra_mb": round(extra)}
    for name, stage in (("knn_s", lambda: graph.knn(x, K)),
                        ("graph_s", lambda: graph.normalise(graph.affinity(*found))),
                        ("propagate_s", lambda: graph.propagate(S, Y, 0.9))):
        row[name] = round(statistics.median(timed(stage) for _ in range(repeats)), 4)
    print(row, flush=True)
    return row


def draw(head, path):
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graph"
    from matplotlib import pyplot
    rows = head["rows"]
    n = [row["N"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for key, colour, label in (("knn_s", "#0072b2", "knn"), ("graph_s", "#009e73", "affinity + normalise"),
                               ("propagate_s", "#d55e00", "propagate")):
        left.loglog(n, [row[key] for row in rows], "o-", color=colour, label=label)
    left.loglog(n, [rows[0]["knn_s"] * (m / n[0]) ** 2 for m in n], ":", color="grey", label="$N^2$")
    left.set(xlabel="N", ylabel="seconds", title=f"time, {head['threads']} thread(s)")
    left.legend(frameon=False)
    right.plot(n, [row["knn_extra_mb"] for row in rows], "o-", color="#0072b2")
    right.set(xlabel="N", ylabel="MB", ylim=(0, None), title="memory of knn beyond its input")
    for axis in (left, right):
        axis.set_xticks(n, [f"{m // 1000}k" for m in n])
        axis.minorticks_off()
    figure.suptitle(f"k = {K}, d = {head['d']}, median of {head['repeats']}: {head['command']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    known = {f.__name__: f for f in (knn, baselines, propagate, spreading, growth, memory, gpu)}
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(known))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="rows into data/results/speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.what or ["knn", "baselines", "propagate", "spreading"]:
        known[name](args.repeats)


if __name__ == "__main__":
    main()
