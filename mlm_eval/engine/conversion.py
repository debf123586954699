"""A conversion with its proof: written aside, compared with its source, only then at the target."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.convert import Conversion, convert
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import output_folder, refuse_source

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.verify import Comparison


@dataclass(frozen=True)
class CheckedConversion:
    """A conversion and, where it was measured, how far it is from its source."""

    conversion: Conversion
    comparison: Comparison | None


def convert_checked(
    checkpoint: Checkpoint,
    to: str,
    target: Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab: str | None = None,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
    allow_approximate: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckedConversion:
    """Convert as `mlm_eval.convert` does; with `verify`, leave no result that differs.

    A conversion that is approximate by nature is always measured, and what was measured stands in
    the README.md of the folder.

    Raises:
        InputError: As `mlm_eval.convert`; or the result differs, and was removed.
    """
    torch_dtype = None if dtype == "auto" else resolve_dtype(dtype, auto="float32")
    if vocab == "true" and tokenizer is None:
        raise InputError(
            "--vocab true needs the tokenizer's size; give --tokenizer or --vocab-file"
        )
    if tokenizer is not None:
        from mlm_eval.checkpoints.tokenizer import check_fits

        check_fits(tokenizer, checkpoint.config.vocab_size)
    refuse_source(checkpoint.provenance.files, target)
    with output_folder(target, overwrite=overwrite) as folder:
        conversion = convert(
            checkpoint,
            to,
            folder,
            tp=tp,
            pp=pp,
            dtype=torch_dtype,
            max_shard_size=max_shard_size,
            vocab=vocab,
            true_vocab_size=None if tokenizer is None else tokenizer.vocab_size,
            tokenizer=tokenizer,
            allow_approximate=allow_approximate,
            on_progress=on_progress,
        )
        if to != "hf" and tokenizer is not None:
            (folder / "tokenizer").mkdir()
            for file in tokenizer.files:
                shutil.copyfile(file, folder / "tokenizer" / file.name)
        comparison = None
        if verify or conversion.approximations:
            from mlm_eval.engine.verify import verify_conversion

            comparison = verify_conversion(checkpoint, folder, to=to, dtype=torch_dtype)
            if conversion.approximations:
                _record(folder, comparison)
            elif not comparison.same:
                raise InputError(
                    "the converted checkpoint differs from its source by "
                    f"{comparison.max_difference:.3g} "
                    f"(allowed: {comparison.tolerance:g}), so {target} was not written; check the "
                    "settings that `mlm-eval inspect` shows as assumed, and report this if they "
                    "are right"
                )
    return CheckedConversion(conversion, comparison)


def _record(folder: Path, comparison: Comparison) -> None:
    with (folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(
            "\n## Measured difference\n\n"
            "Against the source, on the same random tokens in float32: largest difference of a "
            f"log-probability or logit {comparison.max_difference:.3g}, mean "
            f"{comparison.mean_difference:.3g}, same most likely token at "
            f"{100 * comparison.greedy_agreement:.2f} % of the positions.\n"
        )
