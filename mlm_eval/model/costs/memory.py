"""What a run needs in memory on each rank, from the sizes of the model and of the batch alone.

Counted are tensors: weights, gradients, optimizer moments, and the activations that live at the
moment when most do. The code that allocates them is `transformer.py`, `engine.py` and
`training.py`; a test runs it under a tracker of live tensors and compares. What a process occupies
without a model (Python, torch, a CUDA context) is not in here.

Activations are counted in bytes for each token of a batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import (
    MAMBA_VECTORS,
    layer_parameters,
    local_groups,
    local_units,
    parameters,
)
from mlm_eval.model.mamba import SCAN_CHUNK, SCAN_ELEMENTS
from mlm_eval.model.tensor_parallel import LOGIT_CHUNK_ELEMENTS

FLOAT32 = 4

OUTSIDE = 1 << 30
"""Bytes left free on a device: the CUDA context, workspaces of libraries, fragmentation."""

HEAP_SHARE = 0.5
"""Share that the heap adds on the CPU to what comes and goes in each step, activations and
gradients: glibc keeps freed blocks of up to 32 MB, in pieces that later ones do not fit into. The
middle of what benchmarks/plan_memory.py measures."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most."""

    weights: int
    """The shard of the model."""
    activations: int
    """The rest, at its highest."""
    gradients: int = 0
    """Of training; 0 in evaluation."""
    moments: int = 0
    """AdamW's two; 0 in evaluation."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations

    def on_cpu(self) -> Memory:
        """Return what a process on the CPU occupies for it: freed memory stays in the heap."""
        kept = round(HEAP_SHARE * (self.activations + self.gradients))
        return dataclasses.replace(self, activations=self.activations + kept)


@dataclass(frozen=True)
class _Local:
    """Sizes on one rank."""

    hidden: int
    """Hidden size, whole."""
    attention: int
    """Width of the attention's output."""
    mlp: int
    """Width of the MLP."""
    qkv: int
    """Rows of the packed QKV."""
    heads: int
    """Query heads."""
    copies: int
    """Widths of keys and values that are repeated for grouped queries."""
    rotary: bool
    activation: str
    sums: int
    """Whole outputs beside each other when a row-parallel layer adds its bias after the sum."""
    topk: int
    """Experts that a token is sent to; 0 where no layer has experts."""
    expert: int
    """Width of an expert."""

    @classmethod
    def of(cls, config: ModelConfig, tp: int) -> _Local:
        attends = any(config.mixer(layer) == "attention" for layer in range(config.num_layers))
        all_heads, all_groups = config.num_attention_heads, config.num_query_groups
        groups = local_groups(all_heads, all_groups, 0, tp) if attends else []
        heads = sum(len(queries) for queries, _ in groups)
        grouped = heads > len(groups)
        qkv = (config.qkv_size // config.kv_channels - 2 * config.num_query_groups) // tp
        qkv = (qkv + 2 * len(groups)) * config.kv_channels
        if config.multi_latent_attention:
            keys = config.qk_head_dim + config.qk_pos_emb_head_dim
            latents = config.q_lora_rank + config.kv_lora_rank + config.qk_pos_emb_head_dim
            # Queries; keys before and after the shared part joins them, with values.
            qkv = latents + heads * (3 * keys + config.v_head_dim)
        return cls(
            hidden=config.hidden_size,
            attention=heads * (config.attention_width // config.num_attention_heads),
            mlp=config.ffn_hidden_size // tp if config.dense_layers else 0,
            qkv=qkv,
            heads=heads,
            copies=2 * heads * config.kv_channels if grouped else 0,
            rotary=config.rotary,
            activation=config.activation,
            sums=2 if tp > 1 else 1,
            topk=config.moe_router_topk,
            expert=config.moe_ffn_hidden_size // tp,
        )


def local_parameters(config: ModelConfig, tp: int) -> int:
    """Return the number of weights on the rank that holds most of them."""
    return sum(parameter.numel(tp) for parameter in parameters(config).values())


# --- evaluation ----------------------------------------------------------------------------------


def evaluation_memory(
    config: ModelConfig,
    *,
    tp: int,
    itemsize: int,
    batch_tokens: int,
    scored_rows: int,
    cache: int = 0,
) -> Memory:
    """Return what scoring needs.

    Args:
        config: The model.
        tp: Tensor-parallel size.
        itemsize: Bytes of a weight in the compute dtype.
        batch_tokens: Padded tokens of a forward pass.
        scored_rows: Most positions of a batch whose logits are computed.
        cache: Bytes of keys and values of texts that are being generated.
    """
    local = _Local.of(config, tp)
    kinds = {config.mixer(layer) for layer in range(config.num_layers)}
    attention = _attention_widths(local, itemsize) if "attention" in kinds else 0.0
    # Each of T5's two stacks has half of a batch; see `PairRequest.width` in engine/score.py.
    tokens = batch_tokens // 2 if config.family == "t5" else batch_tokens
    layers = tokens * itemsize * max(attention, _mlp_widths(local))
    if "mamba" in kinds:
        layers = max(layers, _mamba_bytes(config, tp, itemsize, batch_tokens))
    logits = FLOAT32 * _logit_chunk(config, tp, min(scored_rows, tokens))
    length = min(tokens, config.max_position_embeddings)
    kept, made = _alibi(config, tp, length, itemsize)
    if config.family == "t5":
        kept = _beside_stacks(config, tp, tokens, length, itemsize)
    return Memory(
        weights=itemsize * local_parameters(config, tp) + _kept_wide(config, tp, itemsize),
        activations=round(max(layers + kept, made, logits)) + cache,
    )


def _alibi(config: ModelConfig, tp: int, length: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of what ALiBi adds to the scores of all layers and texts.

    As it is kept through the layers, and at the most while it is made.
    """
    if not config.alibi:
        return 0, 0
    heads, scores = config.num_attention_heads // tp, length * length
    rounded = itemsize if itemsize < FLOAT32 else 0
    # Beside it distances in int64, and which of them are negative.
    return scores * heads * itemsize, scores * (heads * (FLOAT32 + rounded) + 9)


def _beside_stacks(c: ModelConfig, tp: int, tokens: int, length: int, itemsize: int) -> int:
    """Return the bytes that stay through all layers of one of T5's stacks, whichever has more.

    Relative positions of the encoder are added to the scores of each text, since its padding is cut
    out there; the decoder's are the same for all, and it has the encoder's states beside it.
    """
    positions = length * (c.num_attention_heads // tp) * c.relative_positions
    return itemsize * max(tokens * positions, tokens * c.hidden_size + length * positions)


@dataclass(frozen=True)
class EvaluationNeed:
    """What each rank of an evaluation needs, at any layout."""

    config: ModelConfig
    """The model."""
    itemsize: int
    """Bytes of a weight in the compute dtype."""
    batch_tokens: int
    """Padded tokens of a forward pass."""
    cache: int = 0
    """Bytes of keys and values of texts that are being generated."""

    def __call__(self, tp: int, dp: int) -> Memory:
        """Return the bytes on the fullest rank."""
        return evaluation_memory(
            self.config,
            tp=tp,
            itemsize=self.itemsize,
            batch_tokens=self.batch_tokens,
            scored_rows=self.batch_tokens,
            cache=self.cache,
        )


def _attention_widths(local: _Local, itemsize: int) -> float:
    """Return the values for each token that live in an attention, at the most."""
    # The layer's input, its norm, queries with keys and values.
    held = 2 * local.hidden + local.qkv
    if local.copies:  # the queries of a group do not lie beside those of the next one
        held += local.attention
    rotated, held_turning = 0.0, float(held)
    if local.rotary:
        # Turned queries are made in float32 (two products and their sum), keys come after them.
        rotated = local.attention + (local.qkv - local.attention) / 2
        held_turning = held + local.attention + 3 * local.attention * FLOAT32 / itemsize
    output = local.attention + local.sums * local.hidden
    return max(held_turning, held + rotated + local.copies + output)


def _kept_wide(config: ModelConfig, tp: int, itemsize: int) -> int:
    """Return the bytes of weights that stay float32 in a model of less, beyond those counted."""
    count = len(MAMBA_VECTORS) * config.mamba_num_heads * len(config.mamba_layers) // tp
    return (FLOAT32 - itemsize) * count if itemsize < FLOAT32 else 0


def _mamba_bytes(config: ModelConfig, tp: int, itemsize: int, tokens: int) -> float:
    """Return the bytes that live in a Mamba layer, at the most; all of it is about its scan."""
    d, heads = config.mamba_width // tp, config.mamba_num_heads // tp
    groups = len(local_units(config.mamba_num_groups, 0, tp))
    shared, states = groups * config.mamba_state_dim, config.mamba_state_dim
    mixed = d + 2 * shared
    # The layer's input, its norm, what the first matrix gives; in float32 what is convolved, before
    # and behind.
    half = itemsize < FLOAT32
    outside = itemsize * (2 * config.hidden_size + d + mixed + heads)
    outside += FLOAT32 * ((1 + half) * mixed + 4 * heads)
    # Of the tokens in a span: dt x, and either the triangle of decays with what it is multiplied
    # by, or the states of chunks.
    span = min(tokens, max(SCAN_CHUNK, SCAN_ELEMENTS // (heads * SCAN_CHUNK)))
    triangle = SCAN_CHUNK * (heads + groups) + 2 * d
    carried = 2 * d + 3 * d * states / SCAN_CHUNK
    scanned = FLOAT32 * span * (d + max(triangle, carried))
    return tokens * outside + scanned


def _mlp_widths(local: _Local) -> float:
    """Return the values for each token that live in an MLP, at the most."""
    # The layer's input, the attention's output, their sum, and the norm of that.
    held = 4 * local.hidden
    widths = {"gelu": 2, "gelu_tanh": 2, "relu": 2, "squared_relu": 3, "swiglu": 4}
    width = widths.get(local.activation, 6)
    dense = max(width * local.mlp, local.mlp + local.sums * local.hidden)
    # Each token's states once for each of its experts, their outputs by expert and by token.
    inside = max(width * local.expert, local.expert + local.hidden)
    experts = local.topk * (local.hidden + max(inside, 3 * local.hidden))
    return held + max(dense, experts)


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBatch:
    """One micro-batch of a rank, and how it is run."""

    rows: int
    """Sequences (choices count each)."""
    length: int
    """Of the padded rows."""
    predicted: int = 0
    """Positions whose logits over the vocabulary are computed; 0 for task heads."""
    hidden_dropout: float = 0.1
    """Probability."""
    attention_dropout: float = 0.1
    """Probability; above 0 every attention weight is kept."""
    half: bool = False
    """Autocast to bfloat16 or float16; else float32."""
    recompute: bool = False
    """Activation checkpointing."""
    accumulates: bool = True
    """Gradients of an earlier micro-batch, or DDP's buckets, are there already."""

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.length

    @property
    def itemsize(self) -> int:
        """Bytes of a value that a matrix product takes or gives."""
        return 2 if self.half else FLOAT32


@dataclass(frozen=True)
class TrainingNeed:
    """What each rank of a training with its evaluations needs, at any layout."""

    config: ModelConfig
    """The model, with the head that is trained."""
    sample: TrainingBatch
    """A micro-batch of one sample."""
    micro_batch: int
    """Samples of a forward pass, at the most."""
    global_batch: int
    """Samples of a step."""
    batch_tokens: int
    """Padded tokens of a forward pass in the evaluations."""
    sharded: bool = False
    """FSDP2."""

    def __call__(self, tp: int, dp: int) -> Memory:
        """Return the bytes on the fullest rank."""
        share = -(-self.global_batch // dp)
        samples = min(self.micro_batch, share)
        buckets = dp > 1 and not self.sharded
        batch = dataclasses.replace(
            self.sample,
            rows=samples * self.sample.rows,
            predicted=samples * self.sample.predicted,
            accumulates=share > samples or buckets,
        )
        shards = dp if self.sharded else 1
        need = training_memory(self.config, batch, tp=tp, shards=shards)
        # Evaluations come when gradients are gone; FSDP2's gather the whole model for them.
        evaluation = evaluation_memory(
            self.config,
            tp=tp,
            itemsize=FLOAT32,
            batch_tokens=self.batch_tokens,
            scored_rows=self.batch_tokens if self.sample.predicted else 0,
        )
        beside = evaluation.activations + (evaluation.weights if shards > 1 else 0)
        activations = max(need.activations, beside - need.gradients)
        return dataclasses.replace(need, activations=activations)


def training_memory(
    config: ModelConfig, batch: TrainingBatch, *, tp: int, shards: int = 1
) -> Memory:
    """Return what a step of training needs: float32 weights, gradients and AdamW's moments.

    The highest point is the start of the backward pass, when the activations of all layers are
    there; or its end, where the gradients come only as the activations go.

    Args:
        config: The model.
        batch: A micro-batch.
        tp: Tensor-parallel size.
        shards: Ranks that weights, gradients and moments are cut over (FSDP2).
    """
    count = local_parameters(config, tp)
    local = _Local.of(config, tp)
    # FSDP2 gathers half-precision weights: autocast has nothing to copy.
    saved = _saved(config, local, batch, tp, copies=shards == 1)
    ends = batch.tokens * (2 * FLOAT32 * local.hidden + 1)  # the final norm's input and output
    # The logits and their exponentials, or those and their gradient.
    logits = (2 * FLOAT32 + (2 if batch.half else 0)) * _logit_chunk(config, tp, batch.predicted)
    largest = FLOAT32 * max(p.numel(tp) for p in parameters(config).values())
    start = saved + ends + max(_passing(local, batch), logits)
    start += _alibi(config, tp, batch.length, FLOAT32)[0]
    own = -(-count // shards)
    gradients = FLOAT32 * own
    activations = start if batch.accumulates else max(start - gradients, ends)
    if shards > 1:
        activations += _gathered(config, batch, tp)
    return Memory(
        weights=FLOAT32 * own,
        gradients=gradients,
        moments=2 * FLOAT32 * own,
        activations=round(max(activations, largest)),
    )


def _gathered(config: ModelConfig, batch: TrainingBatch, tp: int) -> int:
    """Return the bytes of what FSDP2 holds whole for a moment, with its gradients."""
    layer = sum(p.numel(tp) for p in layer_parameters(config, 0))
    rest = local_parameters(config, tp) - config.num_layers * layer
    # This layer and the next; its gradient, and that as the sum over ranks takes it.
    layers = layer * (2 * batch.itemsize + batch.itemsize + FLOAT32)
    return layers + 2 * FLOAT32 * rest


def _saved(
    config: ModelConfig, local: _Local, batch: TrainingBatch, tp: int, *, copies: bool
) -> float:
    """Return the bytes that all layers keep for the backward pass, autocast's copies included."""
    layers = config.num_layers
    matrices = (p for p in layer_parameters(config, 0) if len(p.shape) == 2)
    copied = 2 * sum(p.numel(tp) for p in matrices) if batch.half and copies else 0
    kept = batch.tokens * _kept_widths(local, batch)
    if not batch.recompute:
        return layers * (kept + copied)
    # A layer keeps its input only. In the backward pass one at a time has all the rest; autocast
    # has the copies of all matrices at the end of the forward pass.
    inputs = batch.tokens * FLOAT32 * local.hidden * layers
    forward = batch.tokens * batch.itemsize * _mlp_widths(local)
    return inputs + max(kept + copied, forward + layers * copied)


def _logit_chunk(config: ModelConfig, tp: int, rows: int) -> int:
    columns = -(-config.vocab_size // tp)
    return min(rows, max(1, LOGIT_CHUNK_ELEMENTS // columns)) * columns


def _kept_widths(local: _Local, batch: TrainingBatch) -> float:
    """Return the bytes for each token that a layer keeps for its backward pass."""
    itemsize = batch.itemsize
    # Inputs of the two norms; their outputs, as the linear layers take them.
    kept = 2 * (FLOAT32 + itemsize) * local.hidden
    kept += itemsize * (
        local.qkv + local.attention
    )  # queries, keys and values; the attention's output
    if local.rotary:
        kept += (itemsize + 2 * FLOAT32) * local.attention
    kept += itemsize * local.copies
    widths = {"gelu": 2, "gelu_tanh": 2, "squared_relu": 2, "swiglu": 4}
    width = widths.get(local.activation, 6)
    # Of a token's experts also their inputs and outputs.
    experts = local.topk * (3 * local.hidden + width * local.expert)
    kept += itemsize * max(width * local.mlp, experts)
    if batch.hidden_dropout > 0:
        kept += 2 * local.hidden  # two masks, a byte a value
    if batch.attention_dropout > 0:
        # For each pair of positions: the softmax in float32, the mask, and what it left.
        kept += local.heads * batch.length * (FLOAT32 + 1 + itemsize)
    else:
        kept += 2 * FLOAT32 * local.heads
    return kept


def _passing(local: _Local, batch: TrainingBatch) -> float:
    """Return the bytes of what lives for a moment beside all that is kept."""
    itemsize = batch.itemsize
    gated = {"swiglu": 2, "squared_relu": 2}.get(local.activation, 1)
    mlp = itemsize * gated * local.mlp + FLOAT32 * local.hidden
    if batch.hidden_dropout > 0:
        mlp = max(mlp, 4 * FLOAT32 * local.hidden)  # the hash of a residual mask
    attention = 0.0
    if batch.attention_dropout > 0:
        # Scores, the hash, and the masked weights; the MLP's activations are not there yet.
        later = itemsize * (2 * gated * local.mlp + local.hidden) + FLOAT32 * local.hidden
        attention = local.heads * batch.length * (FLOAT32 + 2 * (itemsize + 1)) - later
    return batch.tokens * max(mlp, attention)
