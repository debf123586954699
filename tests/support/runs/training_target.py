"""A run on ranks of its own: `python training_target.py [--ranks N] FOLDER TP DP`.

With `--ranks` the process is the parent of N ranks, as the command line is; without it is a rank.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # started with -P

from mlm_eval.ranks import launch
from mlm_eval.ranks.world import World, detect_world

DELAY = 0.1  # of each step: time for a kill
SETTINGS = {"max_steps": 7, "save_minutes": 0.0, "hidden_dropout": 0.1, "attention_dropout": 0.1}


def train(folder: Path, world: World, tp: int, dp: int) -> None:
    """Train, and leave this process's number for the test."""
    launch.init_process_group(world, device="cpu")
    (folder / f"pid{world.rank}").write_text(str(os.getpid()))
    import torch

    from support.house import other_kernels
    from support.runs import training_runs

    torch.set_num_threads(1)  # as on the ranks of the test: the bytes are compared
    other_kernels.install_as_asked()
    training_runs.run(tp, dp, "mlm", folder / "run", SETTINGS, delay=DELAY)
    launch.shutdown()


def whole(folder: Path, tp: int, dp: int) -> dict[str, bytes]:
    """Train without a stop, on ranks that run already; return the bytes of the written weights."""
    from mlm_eval.checkpoints.open import open_checkpoint
    from support.runs import training_runs

    report, _ = training_runs.run(tp, dp, "mlm", folder, SETTINGS)
    tensors = open_checkpoint(report.checkpoint).tensors
    return {name: tensor.read().numpy().tobytes() for name, tensor in tensors.items()}


def main() -> int:
    if sys.argv[1] == "--ranks":
        command = [sys.executable, "-P", __file__]
        result = launch.launch(sys.argv[3:], ranks=int(sys.argv[2]), device="cpu", command=command)
        if result.message is not None:
            print(result.message, file=sys.stderr)
        return result.exit_code
    world = detect_world()
    assert world is not None
    launch.prepare_worker()
    folder, tp, dp = sys.argv[1:]
    with launch.reporting_errors(world):
        train(Path(folder), world, int(tp), int(dp))
    return 0


if __name__ == "__main__":
    sys.exit(main())
