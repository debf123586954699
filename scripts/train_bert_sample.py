"""Train the BERT sample that ships with mlm-eval: `mlm-eval mlm`, then `mlm-eval convert`.

The text is what `sample_corpus.py` builds from this Python, one document a line; the vocabulary a
lower-cased WordPiece of 2,000 entries of that text. It is written in half precision as two
tensor-parallel ranks. Half an hour on one core:

    OMP_NUM_THREADS=1 python scripts/train_bert_sample.py --output build/sample-bert
    mlm-eval race --ckpt build/sample-bert --data checkpoints/samples/race --output-dir build/race
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import tokenizers
from sample_corpus import natural_text, sha256, training_articles

TENSOR_PARALLEL = 2
VOCAB_ENTRIES = 2000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

MODEL = """\
num_layers = 4
hidden_size = 128
num_attention_heads = 4
max_position_embeddings = 256
"""
OPTIONS = {
    "--epochs": "24",
    "--global-batch": "32",
    "--micro-batch": "16",
    "--seq-length": "128",
    "--lr": "2e-3",
    "--warmup": "0.05",
    "--hidden-dropout": "0",
    "--attention-dropout": "0",
    "--seed": "1234",
    "--device": "cpu",
}


def documents() -> list[str]:
    """Return the training text: articles without their headings' bars, a paragraph a line."""
    texts = [natural_text(article) for article in training_articles()]
    return ["\n".join(line.strip("= ") for line in text.split("\n") if line) for text in texts]


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Write vocab.txt of a lower-cased WordPiece, and the file that says so."""
    words = tokenizers.BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator(
        texts, vocab_size=VOCAB_ENTRIES, special_tokens=SPECIAL, show_progress=False
    )
    folder.mkdir(parents=True)
    words.save_model(str(folder))
    settings = {"do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def run(*command: str) -> None:
    """Run one of this project's commands."""
    subprocess.run([sys.executable, "-m", "mlm_eval", *command], check=True)


def main() -> None:
    """Train, convert to half precision, and write a record of how it was made."""
    parser = argparse.ArgumentParser(description="Train the BERT sample.")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    parser.add_argument("--work", type=Path, help="folder of the training run; default: beside it")
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--epochs", default=OPTIONS["--epochs"])
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} is there already; remove it or choose another folder")
    work = given.work or given.output.with_name(given.output.name + "-run")
    work.mkdir(parents=True, exist_ok=True)

    texts = documents()
    text, model, words = work / "text.jsonl", work / "bert.toml", work / "tokenizer"
    lines = (json.dumps({"text": document}) + "\n" for document in texts)
    text.write_text("".join(lines), encoding="utf-8")
    model.write_text(MODEL, encoding="utf-8")
    if not words.is_dir():
        train_tokenizer(texts, words)

    options = [part for item in (OPTIONS | {"--epochs": given.epochs}).items() for part in item]
    options += ["--init", str(model), "--data", str(text), "--tokenizer", str(words)]
    options += ["--output-dir", str(work / "out"), "--dp", str(given.dp)]
    if not (work / "out" / "result.json").exists():
        run("mlm", *options)
    trained = ["--ckpt", str(work / "out" / "checkpoint"), "--to", "megatron", "--dtype", "float16"]
    run("convert", *trained, "--tp", str(TENSOR_PARALLEL), "--output", str(given.output))
    shutil.copytree(words, given.output / "tokenizer", dirs_exist_ok=True)

    result = json.loads((work / "out" / "result.json").read_text(encoding="utf-8"))
    record = {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "training_text_sha256": sha256("".join(texts)),
        **{name: result[name] for name in ("metrics", "counts", "timing", "versions")},
        "options": OPTIONS | {"--epochs": given.epochs, "--dp": str(given.dp)},
    }
    (given.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
