"""Copies of the model over data-parallel ranks: DDP or FSDP2 around the model and its loss.

The loss is computed inside the wrapped module, because both wrappers act when a module is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, parameters
from mlm_eval.model.bert import BERT
from mlm_eval.model.dropout import Dropout
from mlm_eval.model.gpt import GPT
from mlm_eval.ranks.collectives import whole_over_dp
from mlm_eval.ranks.mesh import Mesh
from mlm_eval.training.data import Batch
from mlm_eval.training.objectives import Objective
from mlm_eval.training.optimization import Trained
from mlm_eval.training.settings import DP_MODES


class LossModule(nn.Module):
    """A model with its objective: a batch in, sums over its samples out."""

    def __init__(self, model: BERT | GPT, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, batch: Batch, dropout: Dropout | None, factor: float
    ) -> tuple[Tensor, Tensor]:
        """Return `factor` times the loss summed, and float64 (summed loss, hits, predictions)."""
        losses, hits, count = self.objective.loss_and_hits(self.model, batch, dropout)
        assert losses.shape == hits.shape == (batch.samples,), "one loss and one number a sample"
        total = losses.sum()
        sums = torch.stack([total.detach().double(), hits.sum().double()])
        return total * factor, torch.cat([sums, sums.new_full((1,), float(count))])


class Replicas:
    """The model under training on this rank, and how its gradients meet those of other ranks."""

    home: BERT | GPT
    """The model that was given: the one to evaluate."""
    worker: BERT | GPT
    """The model under training; another one than `home` under FSDP2 only."""
    module: nn.Module
    """To be called with (batch, dropout, factor); see `LossModule`."""
    trained: list[Trained]
    """The parameters that the optimizer moves."""
    sharded: bool
    """Whether parameters and gradients are cut over the data-parallel ranks (FSDP2)."""

    def __init__(
        self,
        model: BERT | GPT,
        objective: Objective,
        mesh: Mesh,
        *,
        mode: str,
        recompute: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Wrap the model.

        Args:
            model: With its weights, in float32.
            objective: The loss.
            mesh: The layout.
            mode: `ddp` or `fsdp2`.
            recompute: Run each layer again in the backward pass.
            dtype: Of matrix products (autocast): FSDP2 sends the layers' weights in it.
        """
        assert mode in DP_MODES, mode
        check_trainable(model, mesh.tp)
        self.home, self.mesh = model, mesh
        self.sharded = mode == "fsdp2" and mesh.dp > 1
        table = parameters(model.config)
        unused = objective.unused(model.config)
        model.requires_grad_(True)
        for name, parameter in model.named_parameters():
            # A rank may own no row of a small vocabulary: nothing to train there. The bias that
            # chooses experts weighs nothing, so no gradient reaches it.
            chooses = name.endswith(".router.expert_bias")
            if name.startswith(unused) or parameter.numel() == 0 or chooses:
                parameter.requires_grad_(False)
        worker = _sharded_twin(model, mesh, dtype) if self.sharded else model
        block: Any = worker.get_submodule(model.config.block)
        block.recompute = recompute
        self.trained = [
            Trained(name, parameter, over_tp=mesh.tp > 1 and table[name].rule.dim is not None)
            for name, parameter in worker.named_parameters()
            if parameter.requires_grad
        ]
        self.worker = worker
        self.module = self._wrap(LossModule(worker, objective), mesh)

    def _wrap(self, module: LossModule, mesh: Mesh) -> nn.Module:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            fully_shard(module, mesh=mesh.dp_mesh)
            # The root took over what no layer holds: new Parameter objects.
            found = dict(self.worker.named_parameters())
            self.trained = [
                Trained(item.name, found[item.name], item.over_tp) for item in self.trained
            ]
            _release(self.home)
            return module
        if mesh.dp > 1:
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(
                module, process_group=mesh.dp_group, gradient_as_bucket_view=True
            )
        return module

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Sum gradients over ranks in the backward pass of a step's last micro-batch only.

        FSDP2 does so in each: otherwise it would hold the gradient of the whole model.
        """
        module: Any = self.module
        if self.sharded or last or not hasattr(module, "no_sync"):
            yield
        else:
            with module.no_sync():
                yield

    def publish(self) -> None:
        """Bring the current weights into the model that was given, for evaluation.

        Under FSDP2 that model is empty during training; collectives: one all-gather over dp
        for each parameter. Otherwise it is the one under training, and there is nothing to do.
        """
        if not self.sharded:
            return
        for name, parameter in self.worker.named_parameters():
            self.home.get_parameter(name).data = whole_over_dp(parameter, self.mesh)

    def release(self) -> None:
        """Free what `publish` has filled."""
        if self.sharded:
            _release(self.home)


def check_trainable(model: BERT | GPT, tp: int) -> None:
    """Refuse a layout in which ranks hold copies of a key/value head: their gradients would part.

    Raises:
        InputError: `tp` does not divide the number of query groups.
    """
    groups = model.config.num_query_groups
    if groups % tp:
        allowed = [n for n in allowed_tp(model.config) if groups % n == 0]
        raise InputError(
            f"cannot train this model over tp={tp}: it has {groups} query groups, and in training "
            f"tp must divide them; it allows tp in {', '.join(map(str, allowed))}"
        )


def _sharded_twin(model: BERT | GPT, mesh: Mesh, dtype: torch.dtype) -> BERT | GPT:
    """Return a second model on the same weights, each layer cut over the data-parallel ranks.

    In half precision a layer's weights are gathered as such, and freed with the layer: autocast
    would gather float32, and keep its own copies of all layers until the end of the step. What is
    in no layer (embeddings, heads) stays float32, as do the states between layers and the sums of
    gradients over ranks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        twin = type(model)(model.config, model.tp)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shared = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        setattr(twin.get_submodule(owner), leaf, shared)
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    block: Any = twin.get_submodule(model.config.block)
    for layer in block.layers:
        fully_shard(layer, mesh=mesh.dp_mesh, mp_policy=policy)
    return twin


def _release(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.new_empty(0)
