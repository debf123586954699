"""A process of its own in which megatron-core reads files in torch format and runs them.

usage: python megatron_core_torch.py SCRATCH FILE INPUTS OUTPUT [FILE INPUTS OUTPUT ...]

Each FILE is a `model_optim_rng.pt` of one rank; the model is built from nothing but its args, and
its state must fit key by key. With INPUTS other than `-` the logits go to OUTPUT.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tests' folder
from support.fuzz.megatron_core_model import build, run, start  # noqa: E402


def main(scratch: str, *triples: str) -> None:
    """Read and run one file after another."""
    start(Path(scratch))
    for file, inputs, output in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        with torch.serialization.safe_globals([Namespace]):
            saved = torch.load(file, weights_only=True)
        bert = any(name.startswith("encoder.") for name in saved["model"])
        model = build(saved["args"], bert=bert)
        model.load_state_dict(saved["model"], strict=True)
        result = run(model.eval(), torch.load(inputs), bert=bert) if inputs != "-" else {}
        torch.save(result, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
