"""The first cause of a failure, left where every rank looks: in the store that they met at.

Ranks that mlm-eval has started report to their parent (`launch.py`). Those of torchrun and srun
have none of ours: a rank that waits for one that has failed would spin until NCCL's watchdog ends
it, half an hour later, and then name a lost connection.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

    from mlm_eval.ranks.world import World

LOOK_SECONDS = 2.0
GRACE_SECONDS = 10.0
"""For a rank to notice by itself, and to say in its own words what it was doing."""

COUNT, CAUSE = "mlm-eval/causes", "mlm-eval/cause"


class CauseWatch:
    """Looks for the cause of another rank's failure, and ends this process when there is one.

    Its thread ends with `stop`, before the ranks part.
    """

    def __init__(self, store: Store, world: World, tell: Callable[[str], None]) -> None:
        """Start looking.

        Args:
            store: Where the ranks have met.
            world: This rank.
            tell: Takes a sentence for the user.
        """
        self.store, self.world, self.tell = store, world, tell
        self.stopped = threading.Event()
        # A connection of its own: the other one may be waiting.
        self.own: Store = store.clone()  # type: ignore[attr-defined]
        threading.Thread(target=self._look, name="causes", daemon=True).start()

    def stop(self) -> None:
        """Stop looking."""
        self.stopped.set()

    def leave(self, text: str) -> None:
        """Say why this rank fails, unless another one has said so before."""
        self.stop()
        try:
            if self.store.add(COUNT, 1) == 1:
                self.store.set(CAUSE, json.dumps([self.world.rank, text]))
        except RuntimeError:  # the store has gone with its rank
            return

    def found(self, seconds: float = 0.0) -> str | None:
        """Return the cause that another rank has left within some seconds; None without one."""
        try:
            if seconds:
                self.store.wait([CAUSE], timedelta(seconds=seconds))
            elif not self.store.check([CAUSE]):
                return None
            rank, text = json.loads(self.store.get(CAUSE))
        except RuntimeError:  # the time is over, or the store has gone
            return None
        return None if rank == self.world.rank else f"rank {rank} failed: {text}"

    def _look(self) -> None:
        while not self.stopped.wait(LOOK_SECONDS):
            try:
                if not self.own.check([CAUSE]):
                    continue
                rank, text = json.loads(self.own.get(CAUSE))
                cause = f"rank {rank} failed: {text}"
            except RuntimeError:
                cause = "rank 0, where the ranks met, is gone; the cause stands in its output"
            time.sleep(GRACE_SECONDS)
            if not self.stopped.is_set():
                self.tell(f"rank {self.world.rank} stops: {cause}")
                os._exit(1)  # the main thread may be in a collective that never ends
            return
