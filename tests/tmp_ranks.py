"""Temporary."""
from __future__ import annotations
import atexit, os, tempfile, traceback
from pathlib import Path
import torch.multiprocessing as mp

_POOL = {}

def _serve(rank, connection):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    size = 1
    while True:
        message = connection.recv()
        if message is None:
            return
        n, store, function, args = message
        try:
            if n != size:
                if dist.is_initialized():
                    dist.destroy_process_group()
                if n > 1:
                    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
                size = n
            connection.send((True, function(*args)))
        except BaseException as e:
            connection.send((False, (e if isinstance(e, Exception) else repr(e), traceback.format_exc())))

def run_ranks(n, function, *args):
    if n == 1:
        return [function(*args)]
    context = mp.get_context("spawn")
    pool = _POOL.setdefault(n, {})
    for rank in range(len(pool), n):
        ours, theirs = context.Pipe()
        p = context.Process(target=_serve, args=(rank, theirs), daemon=True)
        p.start()
        pool[rank] = (p, ours)
    store = tempfile.mktemp()
    for rank in range(n):
        pool[rank][1].send((n, store, function, args))
    results = [pool[rank][1].recv() for rank in range(n)]
    for ok, value in results:
        if not ok:
            if isinstance(value[0], Exception) and type(value[0]).__name__ == "InputError":
                raise value[0]
            raise AssertionError(value[1])
    return [v for _, v in results]
