"""The engine: a checkpoint's shard in memory, and scoring over a mesh of dp x tp ranks.

Each rank asks the table for its slice of each parameter and reads only that. Requests are packed
by length under a token budget and dealt to the data-parallel ranks; none is repeated or dropped,
and results come back in request order, so they do not depend on the layout beyond the rounding of
the forward itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import dtype_name, evaluation_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import check_tp, parameters
from mlm_eval.checkpoints.tokenizer import check_entries
from mlm_eval.checkpoints.vocabulary import with_rows
from mlm_eval.engine.batching import Batch, Request, Scores, collate, pack, riders
from mlm_eval.engine.encode import BertInput, BertOutput, run_bert
from mlm_eval.model.bert import BERT
from mlm_eval.model.flops import forward_flops
from mlm_eval.model.gpt import GPT
from mlm_eval.model.tensor_parallel import TensorParallel
from mlm_eval.ranks.collectives import sum_over_dp
from mlm_eval.ranks.mesh import Mesh, make_mesh

if TYPE_CHECKING:
    from mlm_eval.engine.resume import PartialScores


Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all) on rank 0."""


class Engine:
    """One rank's part of a loaded model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: GPT | BERT,
        *,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        vocab: str,
        batch_tokens: int,
        load_seconds: float,
    ) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = model.config
        self.model = model
        self.mesh = mesh
        self.device = device
        self.dtype = dtype
        self.vocab = vocab
        self.batch_tokens = batch_tokens
        self.load_seconds = load_seconds

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        tp: int | None = None,
        dp: int | None = None,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "cpu",
        vocab: str = "padded",
        true_vocab_size: int | None = None,
        batch_tokens: int | None = None,
        compile_model: bool = False,
    ) -> Engine:
        """Return an engine that holds this rank's shard of a checkpoint.

        Args:
            checkpoint: What `open_checkpoint` returned.
            tp: Tensor-parallel size; tp x dp must be the number of running ranks (1 without a
                process group).
            dp: Data-parallel size.
            dtype: Compute dtype; `auto` is the checkpoint's on CUDA and float32 on the CPU.
            device: Where to compute: `cpu`, `cuda` or `cuda:N`.
            vocab: `padded`: the softmax runs over all stored rows, as Megatron's does; `true`:
                over the first `true_vocab_size` rows.
            true_vocab_size: Entries of the tokenizer; needed for `vocab="true"`.
            batch_tokens: Padded tokens per forward pass and rank; None: 4,096 on the CPU, 32,768
                on CUDA.
            compile_model: Compile the layers with torch.compile.

        Raises:
            InputError: The sizes do not divide, or the vocabulary size is unknown or too large.
        """
        started = time.perf_counter()
        mesh = make_mesh(tp, dp)
        device = torch.device(device)
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
        model = load_model(checkpoint, mesh.tensor_parallel, device=device, dtype=dtype)
        model.eval().requires_grad_(False)
        if compile_model:
            model.compile(dynamic=True)
        if batch_tokens is None:
            batch_tokens = 32768 if device.type == "cuda" else 4096
        return cls(
            checkpoint,
            model,
            mesh=mesh,
            device=device,
            dtype=dtype,
            vocab=vocab,
            batch_tokens=batch_tokens,
            load_seconds=time.perf_counter() - started,
        )

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

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[Request],
        *,
        on_progress: Progress | None = None,
        partial: PartialScores | None = None,
    ) -> Scores:
        """Return the log-probabilities of the scored tokens of a GPT model, on every rank the same.

        Args:
            requests: What to score; each at most positions + 1 tokens.
            on_progress: Told about finished tokens, on rank 0.
            partial: Results of an interrupted run, and where to keep those of this one.

        Raises:
            InputError: The model is no GPT, a request is too long, or a token id is outside the
                vocabulary.
        """
        if not isinstance(self.model, GPT):
            raise InputError(
                "this is a BERT checkpoint: it scores whole inputs, not continuations; use "
                "`mlm-eval score`"
            )
        started = time.perf_counter()
        check_requests(requests, self.config)
        counts = torch.tensor([request.num_scored for request in requests], dtype=torch.int64)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        done = partial.finished() if partial is not None else {}
        # An interrupted run with a higher --limit may have done more than is asked for now.
        done = {index: scores for index, scores in done.items() if index < len(requests)}
        todo = [i for i in range(len(requests)) if i not in done]
        pending = [requests[i] for i in todo]
        lengths = [request.length for request in pending]
        packed = pack(lengths, self.batch_tokens, riders(pending))
        batches = [[todo[i] for i in batch] for batch in packed]
        values = torch.zeros(2, int(offsets[-1]), dtype=torch.float32)
        if self.mesh.dp_rank == 0:  # summed over dp below: earlier results enter once
            for index, (logprobs, greedy) in done.items():
                span = slice(int(offsets[index]), int(offsets[index + 1]))
                values[0, span], values[1, span] = logprobs, greedy.float()
        meter = _Meter(self, requests, batches, on_progress)
        finished: list[tuple[Batch, Tensor, Tensor]] = []
        for indices in batches[self.mesh.dp_rank :: self.mesh.dp]:
            batch = collate(requests, indices)
            logprobs, greedy = self._score_batch(batch)
            finished.append((batch, logprobs, greedy))
            meter.step(indices)
            if partial is not None and self.mesh.tp_rank == 0:
                partial.add(requests, batch, logprobs, greedy)
        if partial is not None:
            partial.flush()
        for batch, logprobs, greedy in finished:
            spans = [torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in batch.indices]
            where = torch.cat(spans)
            values[0, where], values[1, where] = logprobs.cpu(), greedy.float().cpu()
        # Every sample was scored by one copy of the model only; the sum puts them together exactly.
        values = sum_over_dp(values.to(self.device), self.mesh).cpu()
        meter.finish()
        seconds = time.perf_counter() - started
        return Scores(values[0], values[1] > 0.5, offsets, seconds)

    def encode(
        self, inputs: Sequence[BertInput], *, states: bool = True, score: bool = False
    ) -> list[BertOutput]:
        """Return a BERT model's states and head logits for whole inputs; see `run_bert`."""
        return run_bert(self, inputs, states=states, score=score)

    def _score_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, rows, targets = (
            to_device(x, self.device) for x in (batch.tokens, batch.rows, batch.targets)
        )
        states = self.model(tokens, batch.query_from)  # [B, T - from, h]
        scored = states.flatten(0, 1).index_select(0, rows)  # [N, h]
        return self.model.log_probs(scored, targets)

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


class _Meter:
    """Progress without a host sync per batch: on CUDA, events tell what has really finished."""

    MOST_AHEAD = 8

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        batches: list[list[int]],
        on_progress: Progress | None,
    ) -> None:
        self.lengths = [request.length for request in requests]
        self.total = sum(self.lengths)
        pending = sum(self.lengths[i] for batch in batches for i in batch)
        mine = sum(self.lengths[i] for batch in batches[:: engine.dp] for i in batch)
        self.done = self.total - pending
        # Rank 0 sees its own batches; the other copies of the model go at about the same pace.
        self.scale = pending / mine if mine else 1.0
        self.cuda = engine.device.type == "cuda"
        self.report = on_progress if engine.is_main else None
        self.waiting: deque[tuple[torch.cuda.Event, int]] = deque()

    def step(self, indices: list[int]) -> None:
        tokens = sum(self.lengths[i] for i in indices)
        if not self.cuda:
            self._advance(tokens)
            return
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((event, tokens))
        if len(self.waiting) > self.MOST_AHEAD:
            self.waiting[0][0].synchronize()
        while self.waiting and self.waiting[0][0].query():
            self._advance(self.waiting.popleft()[1])

    def finish(self) -> None:
        """Report that all is done: the other copies of the model are, too."""
        if self.report is not None:
            self.report(self.total, self.total)

    def _advance(self, tokens: int) -> None:
        self.done += round(tokens * self.scale)
        if self.report is not None:
            self.report(min(self.done, self.total), self.total)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`; to a GPU through pinned memory, without waiting."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def load_model(
    checkpoint: Checkpoint, tp: TensorParallel, *, device: torch.device, dtype: torch.dtype
) -> GPT | BERT:
    """Return the model with this rank's slices in it, read one tensor at a time."""
    config = checkpoint.config
    kind = GPT if config.family == "gpt" else BERT
    with torch.device("meta"):
        model = kind(config, tp).to(dtype)
    # All memory is taken before anything is read: what is read for a moment, put between weights
    # that stay, would leave holes that malloc cannot give back (a quarter of the shard).
    model.to_empty(device=device)
    table = parameters(config)
    found = dict(model.named_parameters())
    assert set(found) == set(table), sorted(set(found) ^ set(table))
    with torch.no_grad():
        for name, parameter in table.items():
            piece = parameter.read_shard(checkpoint.tensors[name], tp.rank, tp.size)
            assert piece.shape == found[name].shape, (name, piece.shape, found[name].shape)
            found[name].copy_(piece)
            del piece  # before the next is read
    return model


def check_requests(requests: Sequence[Request], config: ModelConfig) -> None:
    """Refuse requests that the model cannot run.

    Raises:
        InputError: A sequence is empty, too long, or holds an id outside the vocabulary.
    """
    for index, request in enumerate(requests):
        if not 1 <= request.num_scored <= request.length:
            raise InputError(
                f"sequence {index} has {request.tokens.numel()} token(s) of which "
                f"{request.num_scored} are to be "
                "scored; at least one token must stand before the scored ones"
            )
        if request.length > config.max_position_embeddings:
            raise InputError(
                f"sequence {index} has {request.tokens.numel()} tokens, the model takes at most "
                f"{config.max_position_embeddings + 1}; cut it, or score it by windows"
            )
    if requests:
        low, high = 0, -1
        for request in requests:
            small, large = request.tokens.aminmax()
            low, high = min(low, int(small)), max(high, int(large))
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{config.vocab_size} rows; "
                "the tokenizer does not belong to this checkpoint"
            )
