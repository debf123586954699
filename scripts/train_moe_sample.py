"""Train the mixture of experts that ships with mlm-eval: `mlm-eval lm`, then `mlm-eval convert`.

The text is what `sample_corpus.py` builds from this Python, one document a line, the vocabulary
that of the GPT sample. The model is Mixtral's kind: four experts a layer, of which each token takes
two, grouped queries, rotary positions. It is written in half precision as the two files of two
tensor-parallel and two expert-parallel ranks, each with two whole experts. Ten minutes on one core:

    OMP_NUM_THREADS=1 python scripts/train_moe_sample.py --output build/sample-moe
    mlm-eval wikitext103 --ckpt build/sample-moe --data checkpoints/samples/text/wiki.sample.tokens
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from sample_corpus import natural_text, sha256, training_articles

LAYOUT = ("--tp", "2", "--ep", "2", "--etp", "1")
TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "samples" / "gpt" / "tokenizer"

MODEL = """\
num_layers = 4
hidden_size = 128
num_attention_heads = 4
num_query_groups = 2
max_position_embeddings = 256
position_embedding_type = "rope"
normalization = "RMSNorm"
activation = "swiglu"
add_bias_linear = false
add_qkv_bias = false
num_experts = 4
moe_router_topk = 2
moe_ffn_hidden_size = 128
"""
OPTIONS = {
    "--max-steps": "1200",
    "--global-batch": "8",
    "--micro-batch": "8",
    "--seq-length": "256",
    "--lr": "3e-3",
    "--min-lr": "6e-5",
    "--lr-decay": "cosine",
    "--warmup": "0.05",
    "--weight-decay": "0.1",
    "--hidden-dropout": "0",
    "--attention-dropout": "0",
    "--seed": "1234",
    "--device": "cpu",
}


def run(*command: str) -> None:
    """Run one of this project's commands."""
    subprocess.run([sys.executable, "-m", "mlm_eval", *command], check=True)


def main() -> None:
    """Train, convert to half precision, and write a record of how it was made."""
    parser = argparse.ArgumentParser(description="Train the mixture-of-experts sample.")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    parser.add_argument("--work", type=Path, help="folder of the training run; default: beside it")
    parser.add_argument("--max-steps", default=OPTIONS["--max-steps"])
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} is there already; remove it or choose another folder")
    work = given.work or given.output.with_name(given.output.name + "-run")
    work.mkdir(parents=True, exist_ok=True)

    texts = [natural_text(article) for article in training_articles()]
    text, model = work / "text.jsonl", work / "moe.toml"
    lines = (json.dumps({"text": document}) + "\n" for document in texts)
    text.write_text("".join(lines), encoding="utf-8")
    model.write_text(MODEL, encoding="utf-8")

    chosen = OPTIONS | {"--max-steps": given.max_steps}
    options = [part for item in chosen.items() for part in item]
    options += ["--init", str(model), "--data", str(text), "--tokenizer", str(TOKENIZER)]
    if not (work / "out" / "result.json").exists():
        run("lm", *options, "--output-dir", str(work / "out"))
    trained = ["--ckpt", str(work / "out" / "checkpoint"), "--to", "megatron", "--dtype", "float16"]
    run("convert", *trained, *LAYOUT, "--output", str(given.output))
    shutil.copytree(TOKENIZER, given.output / "tokenizer", dirs_exist_ok=True)

    result = json.loads((work / "out" / "result.json").read_text(encoding="utf-8"))
    record = {
        "python": platform.python_version(),
        "training_text_sha256": sha256("".join(texts)),
        **{name: result[name] for name in ("metrics", "counts", "timing", "versions")},
        "command": ["mlm-eval", "lm", *(f"{name}={value}" for name, value in chosen.items())],
        "model": MODEL.splitlines(),
    }
    (given.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
