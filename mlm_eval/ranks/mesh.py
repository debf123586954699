"""How many ranks: the tensor- and data-parallel sizes of a run, chosen before any rank starts."""

from __future__ import annotations

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp

ACTIVATION_BYTES = 3 << 30
"""Left free on each device beside the weights: activations, logits, the CUDA context."""


def pick_device(device: str) -> str:
    """Return `cpu` or `cuda` for `--device`.

    Raises:
        InputError: CUDA is asked for and not there, or the name is unknown.
    """
    if device == "cpu":
        return "cpu"
    if device not in ("auto", "cuda"):
        raise InputError(f"--device {device!r} is unknown; use auto, cpu or cuda")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return "cpu"


def choose_layout(
    checkpoint: Checkpoint,
    *,
    tp: int | None,
    dp: int | None,
    device: str,
    itemsize: int,
    running: int | None = None,
) -> tuple[int, int]:
    """Return (tp, dp).

    Args:
        checkpoint: The model.
        tp: Asked tensor-parallel size, None for auto.
        dp: Asked data-parallel size, None for auto.
        device: `cpu` or `cuda`.
        itemsize: Bytes of a weight in the compute dtype.
        running: Ranks that torchrun or Slurm has started; None when this command starts its own.

    On the CPU auto means 1 and 1, or whatever fills the running ranks. On CUDA it is the smallest
    tp whose shard fits the free memory of the fullest device, and the other devices as dp.

    Raises:
        InputError: The sizes do not divide the model, or no size fits.
    """
    if tp is not None:
        check_tp(checkpoint.config, tp)
    if running is not None:
        return _fill(running, tp, dp)
    if device == "cpu":
        return tp or 1, dp or 1
    import torch

    devices = torch.cuda.device_count()
    if tp is None:
        free = min(torch.cuda.mem_get_info(i)[0] for i in range(devices))
        tp = smallest_fitting_tp(
            checkpoint, free=free, itemsize=itemsize, limit=devices // (dp or 1)
        )
    return tp, dp or max(devices // tp, 1)


def smallest_fitting_tp(checkpoint: Checkpoint, *, free: int, itemsize: int, limit: int) -> int:
    """Return the smallest allowed tp whose shard leaves `ACTIVATION_BYTES` of `free` bytes.

    Raises:
        InputError: Not even `limit` ranks suffice.
    """
    weights = checkpoint.num_parameters * itemsize
    allowed = [n for n in allowed_tp(checkpoint.config) if n <= max(limit, 1)]
    for size in allowed:
        if weights / size + ACTIVATION_BYTES <= free:
            return size
    raise InputError(
        f"the model has {weights / 1e9:.1f} GB of weights, which does not fit {allowed[-1]} "
        "device(s) with "
        f"{free / 1e9:.1f} GB free each; use more devices, --dtype bfloat16, or --device cpu"
    )


def _fill(running: int, tp: int | None, dp: int | None) -> tuple[int, int]:
    """Let the size that is not given follow from the number of running ranks."""
    if tp is None:
        tp = max(running // dp, 1) if dp else 1
    if dp is None:
        dp = max(running // tp, 1)
    if tp * dp != running:
        raise InputError(
            f"--tp {tp} x --dp {dp} is {tp * dp} ranks, {running} are running; give sizes whose "
            f"product is {running}"
        )
    return tp, dp
