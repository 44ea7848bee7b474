"""Write tests/golden/graph.safetensors: a small graph problem with every intermediate, for ports of graph.py.

    python tests/golden/make_graph.py

x (97, 13) with a twin and a zero row; for each metric the 7 neighbours and their similarities; W and S of the
cosine graph (gamma 3) as CSR with common S.crow and S.col; Y (97, 3); F.half for alpha .5, F.most for .99,
F.clamped for .9 with the rows of clamp held. The inputs are stored because seeds differ between frameworks.
"""
import platform
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import graph  # noqa: E402


def main():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(97, 13, generator=g)
    x[11], x[29] = x[5], 0      # a twin; a row whose cosines are all 0, so that it is isolated
    Y = torch.rand(97, 3, generator=g)
    clamp = torch.arange(97) % 5 == 0
    out = {"x": x, "Y": Y, "clamp": clamp.to(torch.uint8)}
    for metric in ("cosine", "euclidean"):
        index, similarity = graph.knn(x, 7, metric=metric)
        out |= {f"{metric}.index": index.int(), f"{metric}.similarity": similarity}
    W = graph.affinity(out["cosine.index"].long(), out["cosine.similarity"])
    S = graph.normalise(W)
    out |= {"S.crow": S.crow_indices().int(), "S.col": S.col_indices().int()}
    out |= {"W.value": W.values(), "S.value": S.values()}
    for name, alpha, held in (("half", 0.5, None), ("most", 0.99, None), ("clamped", 0.9, clamp)):
        out[f"F.{name}"] = graph.propagate(S, Y, alpha, clamp=held, tol=1e-12).F
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "graph.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
