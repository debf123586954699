"""A converted folder through plain transformers, in a process of its own.

The other side of a verification. Run as `python -m mlm_eval.engine.plain_transformers FOLDER PROBE
OUTPUT`. Nothing of the engine or of the readers takes part: what comes out is what any user of the
folder will get.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlm_eval.ranks.signals import PARENT, die_with_parent

HEADS = {
    "NextSentencePrediction": "binary_head",
    "MultipleChoice": "multichoice_head",
    "SequenceClassification": "classification_head",
}


def transformers_outputs(folder: Path, probe: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's logits on a probe, float32, named as `mlm_eval.engine.verify` does."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    transformers.logging.set_verbosity_error()
    model: Any = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    model.eval()
    tokens = probe["tokens"]
    if "encoder_tokens" in probe:
        inputs = {
            "input_ids": probe["encoder_tokens"],
            "attention_mask": probe["encoder_mask"],
            "decoder_input_ids": tokens,
        }
        with torch.inference_mode():
            return {"logits": model(**inputs).logits.float().contiguous()}
    # A mask is given always: without one, positions with gaps would be taken for packed texts.
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "positions" in probe:
        inputs["position_ids"] = probe["positions"].expand_as(tokens)
    if "padding_mask" in probe:
        inputs["attention_mask"] = probe["padding_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = probe["tokentypes"]
    kinds = getattr(model.config, "layers_block_type", None)
    if kinds and "full_attention" not in kinds:  # transformers' cache fails without such a layer
        model.config.use_cache = False
    if architecture.endswith("MultipleChoice"):  # the rows are the choices of one question
        inputs = {name: values.unsqueeze(0) for name, values in inputs.items()}
    with torch.inference_mode():
        result = model(**inputs)
    return {name: values.float().contiguous() for name, values in _named(architecture, result)}


def _named(architecture: str, result: Any) -> list[tuple[str, Tensor]]:
    for ending, head in HEADS.items():
        if architecture.endswith(ending):
            logits = result.logits
            return [(head, logits.view(-1, 1) if head == "multichoice_head" else logits)]
    if architecture.endswith("QuestionAnswering"):
        return [("qa_head", torch.stack([result.start_logits, result.end_logits], dim=-1))]
    if architecture.endswith("ForPreTraining"):
        pairs = [("logits", result.prediction_logits)]
        return [*pairs, ("binary_head", result.seq_relationship_logits)]
    if hasattr(result, "logits"):
        return [("logits", result.logits)]
    states = [("states", result.last_hidden_state)]
    if getattr(result, "pooler_output", None) is not None:
        states.append(("pooled", result.pooler_output))
    return states


if __name__ == "__main__":
    die_with_parent(int(os.environ[PARENT]))
    folder, probe, output = (Path(argument) for argument in sys.argv[1:4])
    save_file(transformers_outputs(folder, load_file(probe)), output)
