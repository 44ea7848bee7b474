"""Exact k-nearest neighbours and label propagation (milestone 1: correct, not yet fast)."""
import warnings
from typing import NamedTuple

import torch


@torch.no_grad()
def knn(x, k, *, queries=None, metric="cosine", block=4096):
    """The k nearest rows of x: (index (N, k) int64, similarity (N, k)), most similar first, ties to the lower index."""
    x = _features(x, "x")
    q = x if queries is None else _features(queries, "queries")
    n, width = len(x), min(k, len(x) - (queries is None))
    rows, out = max(1, block * block // n), []
    for start in range(0, len(q), rows):
        part = q[start:start + rows].double()
        if metric == "cosine":
            s = torch.nn.functional.normalize(part) @ torch.nn.functional.normalize(x.double()).T
        else:
            s = 1 / (1 + torch.cdist(part, x.double(), compute_mode="donot_use_mm_for_euclid_dist"))
        if queries is None:
            s[torch.arange(len(s)), torch.arange(start, start + len(s))] = -torch.inf
        s = s.float().sort(dim=-1, descending=True, stable=True)
        out.append((s.indices[:, :width].clone(), s.values[:, :width].clone()))
    return torch.cat([i for i, _ in out]), torch.cat([s for _, s in out])


def _features(x, name):
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"knn: {name} must be a non-empty (N, d) tensor, got shape {tuple(x.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not torch.isfinite(x).all():
        raise ValueError(f"knn: {name} holds NaN or infinite values")
    return x


def affinity(index, similarity, *, gamma=3.0):
    """W = A + A^T, A_ij = max(0, similarity_ij)^gamma for j among i's neighbours; zero diagonal. CSR (N, N) float64."""
    N, k = index.shape
    row = torch.arange(N, device=index.device).repeat_interleave(k)
    col, weight = index.flatten(), similarity.flatten().double().clamp(min=0) ** gamma
    edge = (weight > 0) & (row != col)
    row, col, weight = row[edge], col[edge], weight[edge]
    ends = torch.stack((torch.cat((row, col)), torch.cat((col, row))))
    return torch.sparse_coo_tensor(ends, weight.repeat(2), (N, N)).coalesce().to_sparse_csr()


def normalise(W):
    """S = D^-1/2 W D^-1/2, D the row sums of W; an isolated row stays zero."""
    crow, col, weight = W.crow_indices(), W.col_indices(), W.values()
    row = torch.arange(len(W), device=W.device).repeat_interleave(crow.diff())
    degree = weight.new_zeros(len(W)).index_add(0, row, weight)
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    return torch.sparse_csr_tensor(crow, col, scale[row] * weight * scale[col], W.shape)


class Propagation(NamedTuple):
    F: torch.Tensor
    iterations: int
    residual: float


@torch.no_grad()
def propagate(S, Y, alpha, *, tol=1e-6, max_iter=1000, clamp=None):
    """F = (1 - alpha)(I - alpha S)^-1 Y by conjugate gradients; isolated and clamped rows keep their prior."""
    if not 0 <= alpha < 1:
        raise ValueError(f"propagate: alpha must lie in [0, 1), got {alpha}")
    S, F = S.double(), torch.as_tensor(Y).double().clone()
    if F.ndim != 2 or len(F) != len(S) or not torch.isfinite(F).all():
        raise ValueError(f"propagate: Y must be a finite ({len(S)}, M) tensor, got shape {tuple(F.shape)}")
    free = (S.crow_indices().diff() > 0).double()[:, None]
    if clamp is not None:
        free = free * ~torch.as_tensor(clamp, device=S.device)[:, None]
    R = free * alpha * (S @ F - F)
    goal = (tol * (1 - alpha) * F.norm(dim=0)) ** 2
    P, rr, iterations = R.clone(), (R * R).sum(0), 0
    while (rr > goal).any() and iterations < max_iter:
        AP = P - free * (alpha * (S @ P))
        step = torch.where(rr > goal, rr / (P * AP).sum(0), 0)
        F += step * P
        R -= step * AP
        new = (R * R).sum(0)
        P = R + torch.where(rr > goal, new / rr, 0) * P
        rr, iterations = new, iterations + 1
    R = free * ((1 - alpha) * torch.as_tensor(Y).double() + alpha * (S @ F) - F)
    scale = ((1 - alpha) * torch.as_tensor(Y).double().norm(dim=0))
    residual = float(torch.where(scale > 0, R.norm(dim=0) / scale, 0).max()) if F.shape[1] else 0.0
    if residual > 2 * tol:
        warnings.warn(f"propagate: residual {residual:.1e} above tol {tol:.0e} after {iterations} iterations", stacklevel=2)
    return Propagation(F, iterations, residual)
