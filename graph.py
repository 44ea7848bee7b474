"""Exact nearest neighbours and label propagation: the graph smoothing of weak labels, step 6 of the method.

Selective weak-to-strong generalization (Lang et al. 2026, arXiv 2511.14166) refines the weak labels it keeps
by graph smoothing and leaves the graph open. Ours is the kNN graph of Iscen et al. 2019 (arXiv 1904.04717)
with the propagation of Zhou et al. 2004, "Learning with local and global consistency".

    index, similarity = knn(x, k)         NN_k(i) and s_ij, exact
    W = affinity(index, similarity)       A_ij = s_ij^gamma for j in NN_k(i), s_ij > 0;  W = A + A^T
    S = normalise(W)                      S = D^-1/2 W D^-1/2,  D = diag(W 1)
    F = propagate(S, Y, alpha).F          F = (1 - alpha)(I - alpha S)^-1 Y

    symbol   code         shape       what
    x_i      x            (N, d)      features of node i
    NN_k     index        (N, k)      the k nearest other nodes, nearest first: a smaller k is a prefix
    s_ij     similarity   (N, k)      cosine of x_i and x_j; 0 where one of them is zero
    gamma    gamma        >= 0        exponent of the affinity
    W, S     W, S         (N, N)      affinity and its symmetric normalisation, sparse CSR, float64
    Y, F     Y, F         (N, M)      labels before and after, a column per class
    alpha    alpha        in [0, 1)   weight of the neighbours; 0 returns Y bit for bit

Other letters: Q queries, R x C one tile, G groups of its columns, E entries of a sparse matrix, H of a row.
"""
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 16              # columns per group
TINY = 2.0 ** -1000     # shorter than any row but zero; keeps 0 / 0 away

# How knn works. u, v: unit rows of the queries and of x, in float64; without queries, v is u.
#           J                 1. Tiles T = u_I v_J^T in a fast dtype. v is u: only those on and above the
#     + - - T - -                diagonal, as T^T is the tile (J, I).
#   I   + - T - -             2. A row keeps its k + spare largest columns, and a bound that no other exceeds.
#         + - - -                T's columns form G groups, g with every G-th column from g on: a group is
#      T^T  + - -                looked into where its maximum exceeds the bound, which soon is rare.
#             + -             3. The kept ones are scored again in float64, pair by pair. A row whose k-th is
#               +                not above the bound by the tiles' error is searched again in float64.


class GraphError(ValueError):
    """An input that no graph can be made of; the message is one line."""


def _checked(x, name):
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise GraphError(f"knn: {name} must be (N, d) and not empty, got shape {tuple(x.shape)}")
    if x.is_complex() or not all(end.isfinite() for end in x.aminmax()):
        raise GraphError(f"knn: {name} holds NaN, infinite or complex values")
    return x


def _unit(x):
    """Rows of x at length 1, float64; a zero row stays. The largest entry first: no square overflows."""
    unit = x.to(torch.float64, copy=True)
    unit /= unit.abs().amax(1, keepdim=True).clamp(min=TINY)
    unit /= unit.norm(dim=1, keepdim=True).clamp(min=TINY)
    return unit


def _csr(row, col, value, shape):
    """Sparse CSR matrix of entries sorted by row."""
    crow = pad(row.bincount(minlength=shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():     # PyTorch says once per process that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, col, value, shape, check_invariants=False)


def _score(u, v, row, col):
    """u_row . v_col (E,), sorted by row: a pair is summed by itself, in one order, to the same bits."""
    pattern = _csr(row, col, u.new_zeros(len(col)), (len(u), len(v)))
    return torch.sparse.sampled_addmm(pattern, u, v.T, beta=0).values()


def _table(row, col, s, R):
    """Entries (E,) sorted by row -> index, similarity (R, H), H of the fullest row; the rest 0 and -inf."""
    count = row.bincount(minlength=R)
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]   # 0, 1 ... in a row
    index = col.new_zeros(R, count.max())
    similarity = s.new_full(index.shape, -torch.inf)
    index[row, slot], similarity[row, slot] = col, s
    return index, similarity


def _first(index, similarity, k):
    """The k most similar of each row (R, H), nearest first; index ascends, so ties go to the lower."""
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return index.gather(1, order[:, :k]), similarity[:, :k].contiguous()


def _tiles(u, v, block, dtype):
    """Yields rows (a slice), start, groups (R, G, GROUP) of columns start + g + G * lane, their maxima."""
    N, own = len(v), v is u
    size = -(-block // GROUP) * GROUP                       # block, rounded up
    b = pad(v.to(dtype), (0, 0, 0, -N % GROUP))             # whole groups
    a = b[:N] if own else u.to(dtype)
    for i in range(0, len(a), size):
        for j in range(i if own else 0, N, size):
            T = (a[i:i + size] @ b[j:j + size].T).float()                   # (R, C)
            T[:, N - j:] = -torch.inf
            if own and i == j:
                T.fill_diagonal_(-torch.inf)                                # no row its own neighbour
            lanes = T.unflatten(1, (GROUP, -1))                             # (R, GROUP, G): fast maxima
            yield slice(i, i + len(T)), j, lanes.transpose(1, 2), lanes.amax(1)
            if own and i < j:
                lanes = T[:, :N - j].unflatten(0, (GROUP, -1))              # (GROUP, G, C): T^T
                yield slice(j, j + lanes.shape[2]), i, lanes.permute(2, 1, 0), lanes.amax(0).T


def _shortlist(u, v, k, block, dtype):
    """index, similarity (Q, k + spare), unsorted; bound (Q,): in its tiles, no other column exceeds it."""
    spare = 4 if torch.finfo(dtype).eps < 1e-6 else 16 + k // 2             # coarse tiles blur the order
    keep = k + spare
    index = torch.zeros((len(u), keep), dtype=torch.int64, device=u.device)
    similarity = torch.full((len(u), keep), -torch.inf, device=u.device)
    bound = torch.full((len(u),), -torch.inf, device=u.device)
    for rows, start, groups, top in _tiles(u, v, block, dtype):
        R, G = top.shape
        least = bound[rows]                                                 # (R,)
        above = top > least[:, None]                                        # (R, G)
        if above.sum() > 2 * keep * R and G > keep:     # as in a first tile: the maxima make a bound
            least = torch.maximum(least, top.topk(keep + 1).values[:, -1])
            above = top > least[:, None]
        row, group = above.nonzero(as_tuple=True)
        s = groups[row, group]                                              # (groups above, GROUP)
        hit, lane = (s > least[row, None]).nonzero(as_tuple=True)           # (E,)
        new, s = _table(row[hit], start + group[hit] + G * lane, s[hit, lane], R)           # (R, H)
        similarity[rows], slot = torch.cat((similarity[rows], s), 1).topk(keep, sorted=False)
        index[rows] = torch.cat((index[rows], new), 1).gather(1, slot)
        bound[rows] = torch.maximum(least, similarity[rows].amin(1))
    return index, similarity, bound


def _settle(u, v, k, shortlist, block, dtype):
    """index, similarity (Q, k) by float64 scores, of all of v where the shortlist may lack a neighbour."""
    listed, rough, bound = shortlist
    listed, order = listed.sort(dim=1)                                      # (Q, keep)
    rough = rough.gather(1, order).double()
    row, slot = (rough > -torch.inf).nonzero(as_tuple=True)                 # (E,)
    s = rough.clone()
    s[row, slot] = _score(u, v, row, listed[row, slot])
    slack = 4 * max(torch.finfo(dtype).eps, u.shape[1] * torch.finfo(torch.float64).eps)    # of s, rounded
    error = 3 * (s - rough).nan_to_num(0).abs().max() + slack               # of tiles, seen on the shortlist
    index, similarity = _first(listed, s.to(dtype), k)
    unsure = (similarity[:, -1] <= bound.double() + error).nonzero()[:, 0]
    step = max(1, block * block // (2 * len(v)))
    for i in range(0, len(unsure), step):
        rows = unsure[i:i + step]
        every = u[rows] @ v.T                                               # (R, N)
        if v is u:
            every.scatter_(1, rows[:, None], -torch.inf)
        row, col = (every >= every.topk(k).values[:, -1:] - slack).nonzero(as_tuple=True)
        s = _score(u[rows], v, row, col).to(dtype)
        index[rows], similarity[rows] = _first(*_table(row, col, s, len(rows)), k)
    return index, similarity


@torch.no_grad()
def knn(x, k: int, *, queries=None, block: int | None = None, tile=torch.float32) -> tuple[Tensor, Tensor]:
    """The k nearest rows of x (N, d) by cosine, exact: index (N, k) int64, similarity (N, k), nearest first.

    Without queries: neighbours of x's own rows, no row its own. With queries (Q, d): of these among the rows
    of x, none excluded; index and similarity are (Q, k). k is cut to the rows there are. A zero row's cosines
    are 0. Ties, of cosines as rounded for the output, go to the lower index. Any real dtype, never modified;
    similarity float32, float64 for float64 x. GraphError: not (N, d), empty, NaN, infinite, complex, k < 1.

    Memory O(N (d + k) + block^2). Neither block (None: 2048 on a CPU, else 16384) nor tile changes a bit;
    tile=torch.bfloat16, or float32 under PyTorch's TF32 switch, is faster where the hardware is. The error
    of the tiles is taken as three times the largest seen on a shortlisted pair.
    """
    x = _checked(x, "x")
    asked = x if queries is None else _checked(queries, "queries")
    if asked.shape[1] != x.shape[1]:
        raise GraphError(f"knn: x has {x.shape[1]} columns, queries {asked.shape[1]}")
    if k < 1:
        raise GraphError(f"knn: k must be at least 1, got {k}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    k = min(k, len(x) if queries is not None else len(x) - 1)
    if k == 0:                                          # x is a single row
        return x.new_zeros((1, 0), dtype=torch.int64), x.new_zeros((1, 0), dtype=dtype)
    v = _unit(x)
    u = v if queries is None else _unit(asked)
    block = block or (2048 if x.device.type == "cpu" else 16384)
    return _settle(u, v, k, _shortlist(u, v, k, block, tile), block, dtype)


def affinity(index: Tensor, similarity: Tensor, *, gamma: float = 3.0) -> Tensor:
    """W = A + A^T, A_ij = s_ij^gamma if s_ij > 0 and j is among index_i: a mutual pair counts twice.

    index, similarity (N, k) as of knn; W sparse CSR (N, N) float64, symmetric, zero diagonal, no zero stored
    [Iscen et al. 2019]. GraphError: shapes differ, NaN, an index beyond N - 1 (as of separate queries).
    """
    N = len(index)
    if index.ndim != 2 or index.shape != similarity.shape or N == 0:
        shapes = tuple(index.shape), tuple(similarity.shape)
        raise GraphError(f"affinity: index and similarity must both be (N, k), got shapes {shapes}")
    if similarity.isnan().any() or (index < 0).any() or (index >= N).any():
        raise GraphError(f"affinity: similarity holds NaN, or index leaves 0 ... {N - 1}")
    row = torch.arange(N, device=index.device)[:, None].expand_as(index)                # (N, k)
    weight = torch.where(similarity > 0, similarity.double() ** gamma, 0)               # (N, k)
    edge = (weight > 0) & (index != row)                # (N, k); a power may underflow
    ends, weight = torch.stack((row[edge], index[edge])), weight[edge]                  # (2, E), (E,)
    both = torch.cat((ends, ends.flip(0)), 1)           # entries of A and of A^T, which coalesce adds up
    W = torch.sparse_coo_tensor(both, weight.repeat(2), (N, N), check_invariants=False).coalesce()
    return _csr(*W.indices(), W.values(), W.shape)


def normalise(W: Tensor) -> Tensor:
    """S = D^-1/2 W D^-1/2, D = diag(W 1) [Zhou et al. 2004]; an isolated row stays zero.

    W sparse CSR (N, N), symmetric, float64, as of affinity; S as W, with eigenvalues in [-1, 1].
    """
    row = torch.arange(len(W), device=W.device).repeat_interleave(W.crow_indices().diff())
    col, value = W.col_indices(), W.values()                                            # (E,)
    degree = (W @ value.new_ones(len(W), 1))[:, 0]                                      # (N,)
    linked = degree >= torch.finfo(degree.dtype).tiny       # below, scale * scale would overflow
    scale = torch.where(linked, degree.rsqrt(), 0)                                      # (N,)
    return _csr(row, col, value * (scale[row] * scale[col]), W.shape)


class Propagation(NamedTuple):
    F: Tensor               # (N, M) float64
    iterations: int         # of the column that took most
    residual: float         # of the worst column: |(1 - alpha) Y + alpha S F - F| / ((1 - alpha) max|Y|)


@torch.no_grad()
def propagate(S: Tensor, Y, alpha: float, *, tol: float = 1e-6, max_iter: int = 1000) -> Propagation:
    """F = (1 - alpha)(I - alpha S)^-1 Y, the fixed point of F = alpha S F + (1 - alpha) Y [Zhou et al. 2004].

    S sparse CSR (N, N), symmetric, as of normalise; Y (N, M), any real dtype. An isolated node, whose row of
    S is zero, keeps its prior: F_i = Y_i. Conjugate gradients in float64 on all columns at once, each until
    residual <= tol: as no eigenvalue of S exceeds 1, no entry of F is then further than tol max|Y| from the
    exact one. A larger residual is returned and warned of. GraphError: alpha outside [0, 1); Y not (N, M),
    empty, NaN, infinite.
    """
    Y = torch.as_tensor(Y).to(S.device, torch.float64)
    if not 0 <= alpha < 1:
        raise GraphError(f"propagate: alpha must lie in [0, 1), got {alpha}")
    if Y.ndim != 2 or len(Y) != len(S) or 0 in Y.shape or not Y.isfinite().all():
        raise GraphError(f"propagate: Y must be finite ({len(S)}, M), not empty, got shape {tuple(Y.shape)}")
    # 64-bit indices would be copied to 32 bits in every product
    crow, col, value = S.crow_indices().int(), S.col_indices().int(), S.values().double()
    S = torch.sparse_csr_tensor(crow, col, value, S.shape, check_invariants=False)
    isolated = S @ Y.new_ones(len(Y), 1) == 0                               # (N, 1)
    B = torch.where(isolated, Y, (1 - alpha) * Y)                           # (I - alpha S) F = B
    F, scale = Y.clone(), (1 - alpha) * Y.abs().amax(0)                     # (N, M), (M,)
    R = P = B + alpha * (S @ F) - F                                         # (N, M), zero for alpha = 0
    rr, goal, iterations = (R * R).sum(0), (tol * scale) ** 2, 0
    while (rr > goal).any() and iterations < max_iter:
        Q = torch.addmm(P, S, P, alpha=-alpha)                              # (I - alpha S) P
        step = torch.where(rr > goal, rr / (P * Q).sum(0), 0)               # a converged column stands still
        F += step * P
        R = R - step * Q
        last, rr = rr, (R * R).sum(0)
        P = R + torch.where(rr > goal, rr / last, 0) * P
        iterations += 1
    R = B + alpha * (S @ F) - F                                             # anew: not the rounded sum
    residual = torch.where(scale > 0, R.norm(dim=0) / scale, 0).max().item()
    if not residual <= tol:     # NaN too
        warnings.warn(f"propagate: residual {residual:.1e} > tol {tol:.0e} at step {iterations}/{max_iter}")
    return Propagation(F, iterations, residual)
