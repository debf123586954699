"""Makes the small copies of genuine Megatron checkpoints in tests/oracles from the full set.

    python scripts/trim_oracle.py SOURCE TARGET

SOURCE is a checkpoint root that a Megatron-LM revision wrote, with `golden.pt`: inputs and the
outputs of that revision's own forward pass. The checkpoint is copied byte for byte. Of the outputs
the copy keeps the loss of every token, the argmax at every position with its lead over the second,
and whole rows of logits at a few positions only.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

POSITIONS = (0, 1, 20, 39, 63)
"""Where whole rows of logits stay. BERT's second input is padded from position 40 on."""

KEPT = (
    "tokens",
    "labels",
    "tokentype_ids",
    "attention_mask",
    "token_loss",
    "nsp_logits",
    "head_logits",
    "pooled",
)


def trim(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a golden output that the tests need of it."""
    kept = {name: golden[name] for name in KEPT if name in golden}
    if kept["attention_mask"].ndim > 2:
        del kept["attention_mask"]  # GPT's is the causal triangle
    for name in ("logits", "lm_logits"):
        if name in golden:
            best = golden[name].topk(2, dim=-1)  # [2, T, 2]
            kept["argmax"] = best.indices[..., 0]
            kept["lead"] = best.values[..., 0] - best.values[..., 1]
            kept["logits_positions"] = torch.tensor(POSITIONS)
            kept[name] = golden[name][:, POSITIONS]
    return {name: value.clone() for name, value in kept.items()}  # no storage of the whole


def main() -> None:
    """Copy one oracle."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="checkpoint root with golden.pt")
    parser.add_argument("target", type=Path, help="folder to make")
    options = parser.parse_args()
    shutil.copytree(
        options.source,
        options.target,
        ignore=shutil.ignore_patterns("golden.pt"),
        copy_function=shutil.copyfile,  # without the source's permissions: it may be read-only
    )
    golden = torch.load(options.source / "golden.pt", weights_only=True)
    torch.save(trim(golden), options.target / "golden.pt")


if __name__ == "__main__":
    main()
