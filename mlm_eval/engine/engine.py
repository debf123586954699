"""The engine: a checkpoint's shard in memory, on a mesh of dp x tp ranks.

Each rank asks the table for its slice of each parameter and reads only that. What a loaded model
does stands in `score`, `encode` and `generate`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlm_eval.checkpoints.checkpoint import Checkpoint, with_warnings
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import dtype_name, evaluation_dtype
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.memory.host import keep_freed_memory
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import MAMBA_VECTORS, check_tp, parameters
from mlm_eval.checkpoints.soundness.odd_values import OddValues
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_entries, find_tokenizer
from mlm_eval.checkpoints.vocabulary import with_rows
from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS, OnProgress
from mlm_eval.engine.encode import BertInput, BertOutput, encode
from mlm_eval.engine.generate import generate
from mlm_eval.engine.prompts import GREEDY, Continuation, Prompt, Sampling
from mlm_eval.engine.resume import PartialScores
from mlm_eval.engine.score import Request, Scores, score
from mlm_eval.model.bert import BERT
from mlm_eval.model.costs.flops import forward_flops
from mlm_eval.model.experts import Router
from mlm_eval.model.gpt import GPT
from mlm_eval.model.mamba import MambaMixer
from mlm_eval.model.t5 import T5
from mlm_eval.model.tensor_parallel import TensorParallel
from mlm_eval.ranks.collectives import gather_over_ranks, on_every
from mlm_eval.ranks.groups import make_mesh
from mlm_eval.ranks.mesh import Mesh, default_device


@dataclass(eq=False, repr=False)
class Engine:
    """One rank's part of a loaded model."""

    checkpoint: Checkpoint
    model: GPT | BERT | T5
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    vocab: str
    batch_tokens: int
    load_seconds: float
    given_tokenizer: Tokenizer | None = None
    load_warnings: tuple[str, ...] = ()
    """What reading the weights has shown, on any rank; the checkpoint's warnings hold it too."""

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.model.config

    def __repr__(self) -> str:
        return (
            f"Engine({self.config.family}, {self.checkpoint.num_parameters:,} parameters, "
            f"{dtype_name(self.dtype)} on {self.device}, tp {self.tp} x dp {self.dp}, "
            f"{str(self.checkpoint.provenance.path)!r})"
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint | str | Path,
        *,
        tp: int | None = None,
        dp: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        vocab: str = "padded",
        true_vocab_size: int | None = None,
        batch_tokens: int | None = None,
        compile_model: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> Engine:
        """Return an engine that holds this rank's shard of a checkpoint.

        Args:
            checkpoint: What `open_checkpoint` returned, or what it takes.
            tp: Tensor-parallel size; tp x dp must be the number of running ranks (1 without a
                process group).
            dp: Data-parallel size.
            dtype: Compute dtype; `auto` is the checkpoint's on CUDA and float32 on the CPU.
            device: Where to compute: `cpu`, `cuda`, `cuda:N`, or `auto`: on a GPU where torch sees
                one, on the CPU where the running ranks talk over gloo.
            vocab: `padded`: the softmax runs over all stored rows, as Megatron's does; `true`:
                over the first `true_vocab_size` rows.
            true_vocab_size: Entries of the tokenizer; needed for `vocab="true"`.
            batch_tokens: Padded tokens per forward pass and rank; None: 4,096 on the CPU, 32,768
                on CUDA.
            compile_model: Compile the layers with torch.compile.
            tokenizer: The model's, for texts; None: the one stored with the checkpoint.

        Raises:
            InputError: The sizes do not divide, the vocabulary size is unknown or too large, or the
                checkpoint cannot be opened.
        """
        started = time.perf_counter()
        if isinstance(checkpoint, str | Path):
            checkpoint = open_checkpoint(checkpoint)
        mesh = make_mesh(tp, dp)
        device = torch.device(default_device() if device == "auto" else device)
        if device.type == "cuda" and device.index is not None:
            # Events and object collectives go by the current device.
            torch.cuda.set_device(device)
        check_tp(checkpoint.config, mesh.tp)
        dtype = evaluation_dtype(dtype, checkpoint.config.params_dtype, device.type)
        if vocab == "true":
            if true_vocab_size is None:
                raise InputError(
                    "--vocab true needs the tokenizer's size; give --tokenizer or --vocab-file"
                )
            check_entries(true_vocab_size, checkpoint.config.vocab_size)
            checkpoint = with_rows(checkpoint, true_vocab_size)
        elif vocab != "padded":
            raise InputError(f"--vocab {vocab!r} is unknown; use padded or true")
        odd = OddValues()
        shape = mesh.tensor_parallel
        model = on_every(  # no rank goes on where another could not read its part
            lambda: load_model(checkpoint, shape, device=device, dtype=dtype, odd=odd)
        )
        odd.merge(gather_over_ranks(odd.found))
        model.eval().requires_grad_(False)
        if device.type == "cpu":
            keep_freed_memory()  # each batch reuses the memory of the one before
        if compile_model:
            model.compile(dynamic=True)
        return cls(
            with_warnings(checkpoint, odd.warnings()),
            model,
            mesh=mesh,
            device=device,
            dtype=dtype,
            vocab=vocab,
            batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS[device.type],
            load_seconds=time.perf_counter() - started,
            given_tokenizer=tokenizer,
            load_warnings=tuple(odd.warnings()),
        )

    def fits(self, config: ModelConfig, dtype: torch.dtype) -> bool:
        """Return whether a model of this config, computed in this dtype, has the same tensors."""
        return self.config == config and self.dtype == dtype

    def refilled(self, checkpoint: Checkpoint) -> Engine:
        """Return an engine for another checkpoint, in the memory of this one, which is over then.

        Args:
            checkpoint: One that `fits`, with as many rows of vocabulary as it has stored.

        Raises:
            InputError: Its weights cannot be read; then neither engine can be used.
        """
        started = time.perf_counter()
        if self.vocab == "true":
            checkpoint = with_rows(checkpoint, self.vocab_size)
        odd = OddValues()
        on_every(lambda: _fill(self.model, checkpoint, self.mesh.tensor_parallel, odd))
        odd.merge(gather_over_ranks(odd.found))
        return dataclasses.replace(
            self,
            checkpoint=with_warnings(checkpoint, odd.warnings()),
            load_seconds=time.perf_counter() - started,
            given_tokenizer=None,
            load_warnings=tuple(odd.warnings()),
        )

    def another(self, checkpoint: Checkpoint, dtype: torch.dtype | str) -> Engine:
        """Return an engine for another checkpoint in this one's layout and on its device."""
        return Engine.load(
            checkpoint,
            tp=self.tp,
            dp=self.dp,
            dtype=dtype,
            device=self.device,
            batch_tokens=self.batch_tokens,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: the one given to `load`, or stored with the checkpoint.

        Raises:
            InputError: There is none.
        """
        path = self.checkpoint.provenance.path
        found = self.given_tokenizer or find_tokenizer(path)
        if found is None:
            raise InputError(
                f"no tokenizer is stored with {path}; give one: Engine.load(..., tokenizer="
                "mlm_eval.load_tokenizer(directory=...))"
            )
        return found

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.mesh.tp

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.mesh.dp

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.mesh.rank == 0

    @property
    def vocab_size(self) -> int:
        """Rows that the softmax runs over."""
        return self.config.vocab_size

    def flops(self, requests: Sequence[Request]) -> float:
        """Return the floating-point operations of scoring, over all ranks, without padding."""
        return sum(
            forward_flops(
                self.config,
                request.length,
                last_rows=request.num_scored,
                head_rows=request.num_scored,
            )
            for request in requests
        )

    def score(
        self,
        requests: Sequence[Request | str | Sequence[int]],
        *,
        on_progress: OnProgress | None = None,
        partial: PartialScores | None = None,
    ) -> Scores:
        """Return the log-probabilities of the scored tokens; see `score.score`.

        Args:
            requests: Texts or lists of token ids, of which every token but the first is scored, or
                requests that say how many.
            on_progress: Called with tokens done and tokens in all.
            partial: Scores kept from an interrupted run.

        Raises:
            InputError: The model is a BERT, a request is empty or too long, or a token id is
                outside the vocabulary.
        """
        if isinstance(self.model, BERT):
            raise InputError(
                "this is a BERT checkpoint: it scores whole inputs, not continuations; use "
                "`mlm-eval score`"
            )
        return score(
            self.model,
            [self._request(number, request) for number, request in enumerate(requests)],
            mesh=self.mesh,
            device=self.device,
            batch_tokens=self.batch_tokens,
            on_progress=on_progress,
            partial=partial,
        )

    def _request(self, number: int, given: Request | str | Sequence[int]) -> Request:
        if isinstance(given, Request):
            return given
        ids = self.tokenizer.encode(given) if isinstance(given, str) else given
        if (
            not isinstance(ids, Sequence)
            or len(ids) < 2
            or not all(type(token) is int for token in ids)
        ):
            raise InputError(
                f"sequence {number} is {shown(given)}; score takes texts, lists of at least two "
                "token ids, or Requests"
            )
        return Request(torch.tensor(list(ids)), len(ids) - 1)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Continuation]:
        """Return a continuation of each prompt; see `generate.generate`.

        Args:
            prompts: Texts, lists of token ids, or prompts with settings of their own. What the
                other arguments say holds for the first two.
            max_new_tokens: Of each.
            sampling: How tokens are chosen.
            stop: Strings that end a text; the tokenizer's end of text does too.
            seed: Prompt n draws from `seed` + n.

        Raises:
            InputError: The model is not a GPT, or a prompt is empty, too long or of another
                vocabulary.
        """
        if isinstance(prompts, str):
            raise InputError("generate takes a list of prompts; write generate([text])")
        if isinstance(stop, str):
            raise InputError("stop is a list of strings; write stop=[text]")
        tokenizer = self.given_tokenizer or find_tokenizer(self.checkpoint.provenance.path)
        end = None if tokenizer is None else tokenizer.eot_id

        def prompt(number: int, given: str | Sequence[int] | Prompt) -> Prompt:
            if isinstance(given, Prompt):
                return given
            ids = self.tokenizer.encode(given) if isinstance(given, str) else given
            if not isinstance(ids, Sequence) or any(type(token) is not int for token in ids):
                raise InputError(
                    f"prompt {number} is {shown(given)}; generate takes texts, lists of token ids, "
                    "or Prompts"
                )
            return Prompt(
                list(ids),
                max_new_tokens,
                stop_tokens=frozenset(() if end is None else (end,)),
                stop=tuple(stop),
                sampling=sampling,
                seed=seed + number,
            )

        asked = [prompt(number, given) for number, given in enumerate(prompts)]
        return generate(self, asked, tokenizer=tokenizer)

    def encode(
        self,
        inputs: Sequence[BertInput],
        *,
        states: bool = True,
        score: bool = False,
        head: str | None = None,
        autocast: torch.dtype | None = None,
        on_progress: OnProgress | None = None,
        partial: PartialScores | None = None,
    ) -> list[BertOutput]:
        """Return a BERT model's states and head logits for whole inputs; see `encode.encode`.

        Raises:
            InputError: The model is not a BERT, an input is empty or too long, or an id is outside
                a table.
        """
        if not isinstance(self.model, BERT):
            raise InputError(
                f"this is a {self.config.family.upper()} checkpoint; only BERT checkpoints encode "
                "whole inputs"
            )
        return encode(
            self.model,
            inputs,
            mesh=self.mesh,
            device=self.device,
            batch_tokens=self.batch_tokens,
            states=states,
            score=score,
            head=head,
            autocast=autocast,
            on_progress=on_progress,
            partial=partial,
        )

    def describe(self) -> dict[str, Any]:
        """Return the engine's part of a record's settings."""
        return {
            "vocab": self.vocab,
            "vocab_size": self.vocab_size,
            "dtype": dtype_name(self.dtype),
            "device": self.device.type,
            "tp": self.tp,
            "dp": self.dp,
            "batch_tokens": self.batch_tokens,
        }


MODELS: dict[str, type[GPT | BERT | T5]] = {"gpt": GPT, "bert": BERT, "t5": T5}
"""Family -> its model."""


def load_model(
    checkpoint: Checkpoint,
    tp: TensorParallel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    odd: OddValues | None = None,
) -> GPT | BERT | T5:
    """Return the model with this rank's slices in it, read one tensor at a time.

    What `odd` finds among the values is added to it.
    """
    config = checkpoint.config
    kind = MODELS[config.family]
    with torch.device("meta"):
        model = kind(config, tp).to(dtype)
        for module in model.modules():
            if isinstance(module, Router) and module.expert_bias is not None:
                module.expert_bias.data = module.expert_bias.data.float()  # it decides close calls
            if isinstance(module, MambaMixer):  # exponents, which Megatron keeps in float32 too
                for name in MAMBA_VECTORS:
                    module.get_parameter(name).data = module.get_parameter(name).data.float()
    # All memory is taken before anything is read: what is read for a moment, put between weights
    # that stay, would leave holes that malloc cannot give back (a quarter of the shard).
    _take_memory(model, device)
    _fill(model, checkpoint, tp, odd)
    return model


def _take_memory(model: nn.Module, device: str | torch.device) -> None:
    """Give the parameters of a model on the meta device memory of `device`, whatever is in it.

    As `to_empty` does, by way of a function in Python that imports sympy: a quarter of a second.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _fill(
    model: GPT | BERT | T5, checkpoint: Checkpoint, tp: TensorParallel, odd: OddValues | None
) -> None:
    """Read this rank's slices into a model, one tensor at a time."""
    table = parameters(checkpoint.config)
    found = dict(model.named_parameters())
    assert set(found) == set(table), sorted(set(found) ^ set(table))
    with torch.no_grad():
        for name, parameter in table.items():
            piece = parameter.read_shard(checkpoint.tensors[name], tp.rank, tp.size)
            assert piece.shape == found[name].shape, (name, piece.shape, found[name].shape)
            if odd is not None:
                odd.look(name, piece, found[name].dtype)
            found[name].copy_(piece)
            del piece  # before the next is read
