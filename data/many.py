"""Several processes of one run, started by torchrun: each runs the same program on its share of the work.

Under torchrun alone is anything of torch.distributed started; a single process meets size() == 1 everywhere
and takes none of these paths. All take the same decisions: what the cache holds and what probes and graph say
is rank 0's word, and what is computed in shares is put together on all. Rank 0 alone prints and writes. A
process that fails tells of it in one line; torchrun ends the others.
"""
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

LOST = "selw2s: a process of this run has died (finished stages are kept: start again)"
STOPPED = "\nselw2s: interrupted; finished stages are kept: start the same command again"
LAUNCHED = (dist.is_available() and dist.is_torchelastic_launched()    # some builds of PyTorch lack it
            and int(os.environ["WORLD_SIZE"]) > 1)
_store = None       # torchrun's, once start() has been called


def rank() -> int:
    """Of this process; 0 of a single one."""
    return int(os.environ["RANK"]) if LAUNCHED else 0


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _store is not None else 1


def here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1


def own_device(device: str) -> str:
    """"cuda" of this one of several processes. The CPU, and of a single process any GPU, is itself."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if LAUNCHED and device == "cuda" else device


def start(device: str) -> None:
    """Join the others where torchrun has started several. Device "cuda" is from now on this process's GPU."""
    global _store
    if not LAUNCHED or _store is not None:
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(own_device(device))
    store, mine, many = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=mine, world_size=many,
                            timeout=timedelta(days=1))      # rank 0 may compute alone for long
    _store = store
    if mine:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)      # at once, whatever library the main thread waits in
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=ended, args=(heard,), daemon=True).start()


def stop() -> None:
    """The end of a run in which nothing failed, on all: several processes end here. As the interpreter winds
    down, a thread of gloo's that lets go of a tensor would abort the process (pytorch pull 179291)."""
    if _store is not None:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def ended(heard: int) -> None:
    """Waits for torchrun's SIGTERM, which follows another's death, or an interrupt; ends this process."""
    while (number := os.read(heard, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
        pass
    if number == signal.SIGINT:
        failed(STOPPED, 130)
    failed(LOST)


def lost(error: RuntimeError) -> bool:
    """Whether this is what PyTorch raises when another process has gone (or is out of memory)."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def failed(line: str, code: int = 2) -> int:
    """The line of an error on stderr, and the exit code. Of several processes the first one's line; they end
    here."""
    if _store is None:
        if rank():              # before they have met: rank 0 says it; torchrun ends all when one has ended
            time.sleep(2)
        else:
            print(line, file=sys.stderr)
        return code
    try:
        first = _store.add("errors", 1) == 1
    except RuntimeError:        # the store has gone with torchrun
        first = rank() == 0
    if first:
        print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # libraries that wait for the others would abort


def word(value):
    """Rank 0's value, on all."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def by_first(work: Callable, fault: type[Exception]):
    """work(), done by rank 0 alone: its value on all, or its error, if it is of this type."""
    out = None
    if rank() == 0:
        try:
            out = work()
        except fault as error:
            out = error
    out = word(out)
    if isinstance(out, fault):
        raise out
    return out


def groups(trained: dict[str, Tensor]) -> list[dict]:
    """For Adam, which cannot update sharded tensors and whole ones together."""
    whole = [x for x in trained.values() if share(x) is x]
    sharded = [x for x in trained.values() if share(x) is not x]
    return [{"params": some} for some in (whole, sharded) if some]


def joined(x: Tensor, mine: list[int]) -> Tensor:
    """x (N, ...), of which this process has computed the rows `mine` and others the other rows, whole; in
    place, bit for bit."""
    if size() > 1:
        others = torch.ones(len(x), dtype=torch.bool, device=x.device)
        others[mine] = False
        x[others] = torch.zeros((), dtype=x.dtype, device=x.device)
        dist.all_reduce(x.view(torch.uint8))        # all but one add zero
    return x


def nearest(knn: Callable, x: Tensor, k: int, device: str) -> tuple[Tensor, Tensor]:
    """graph.knn of x (N, C), by several processes: each asks for its own rows, among every process's rows in
    turn, so that a device holds two shares of x."""
    every, n = torch.arange(len(x)), size()
    mine = every[rank()::n]
    index = torch.zeros(len(x), k, dtype=torch.int64, device=device)
    similarity = torch.zeros(len(x), k, device=device)
    if len(mine):
        rows = [every[r::n] for r in range(n) if r < len(x)]
        found = [knn(x[theirs].to(device), k + 1, queries=x[mine].to(device)) for theirs in rows]
        at = torch.cat([theirs.to(device)[i] for theirs, (i, _) in zip(rows, found)], 1)
        near = torch.cat([s for _, s in found], 1).masked_fill(at == mine.to(device)[:, None], -2)   # itself
        at, order = at.sort(1)                  # ties go to the lower index
        near, order = near.gather(1, order).sort(dim=1, descending=True, stable=True)
        index[mine], similarity[mine] = at.gather(1, order)[:, :k], near[:, :k]
    return joined(index, mine.tolist()), joined(similarity, mine.tolist())


def total(x: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


@cache
def mesh(kind: str):
    """All processes, as PyTorch's sharding takes them; one for all networks: some hold sockets open."""
    from torch.distributed.device_mesh import init_device_mesh      # here: half a second
    return init_device_mesh(kind, (size(),))


def shard(network: nn.Module, blocks, whole: set, dtype: torch.dtype, offload: bool) -> None:
    """PyTorch's FSDP2: each process keeps its share of every parameter but of those in `whole`, and gathers a
    block's, in dtype, while it computes; gradients are reduced in float32 to their mean over processes. A
    block at a time goes to the network's device, what is trained as a float32 copy. offload: the shares stay
    in the CPU's memory."""
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                        register_fsdp_forward_method)     # here: half a second
    kind = network.device.type
    cpu = CPUOffloadPolicy(pin_memory=kind == "cuda")
    options = dict(mesh=mesh(kind), ignored_params=whole,
                   offload_policy=cpu if offload else OffloadPolicy())
    in_dtype = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    gc.collect()    # FSDP2's networks are cycles: an earlier one may still be there
    for part, policy in [*((block, in_dtype) for block in blocks), (network, as_they_are)]:
        for x in part.parameters():
            if share(x) is x and (x.requires_grad or x.device != network.device):     # not sharded yet
                kept = torch.float32 if x.requires_grad else x.dtype
                x.data = x.data.to(network.device, kept, copy=x.requires_grad)
        fully_shard(part, mp_policy=policy, **options)
    register_fsdp_forward_method(network, "packed")


def share(x: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together on all; any other itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shares(sizes: list[int], processes: int) -> list[list[int]]:
    """Indices dealt out to so many processes, about equal in sum of sizes: the largest first, each to the one
    that has least."""
    loads, out = [0] * processes, [[] for _ in range(processes)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        out[least].append(i)
        loads[least] += sizes[i]
    return out
