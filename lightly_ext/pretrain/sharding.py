"""Training with weights, gradients and moments sharded over the processes (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from pytorch_lightning.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightly_ext.pretrain.compilation import BLOCKS

# Its name for `--trainer.strategy`.
SHARDED = "fsdp2"
# Methods of a pretraining that all processes call, and that read its weights.
METHODS = ("training_step", "validation_step", "sample_rows")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's model-parallel strategy, as one mesh of shards over all processes.

    A run goes on as one of DDP does, and from files of any strategy: they hold whole
    tensors in the order of a single process, and are read before training is set up.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    load_checkpoint = Strategy.load_checkpoint

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Makes the mesh, on which modules shard themselves in `configure_model`."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights in the first process, nothing in the others."""
        assert self.lightning_module is not None
        return unsharded(self.lightning_module.state_dict())

    def load_model_state_dict(
        self, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Loads whole weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {
            name: _sharded_like(tensor, own.get(name))
            for name, tensor in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments in the first process, nothing in the others."""
        return unsharded(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads whole moments."""
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {k: _sharded_like(v, weights[number]) for k, v in own.items()}
                for number, own in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})


StrategyRegistry.register(
    SHARDED, ShardedStrategy, "Fully sharded over all processes (torch's fully_shard)."
)


def shard(module: Any, mesh: DeviceMesh) -> None:
    """Shards a pretraining in place; the names of its weights stay as they are.

    Every transformer block, of encoder, decoder and teacher, is whole while it runs.
    What is read outside of blocks too (embeddings, queries, projections, heads,
    prototypes) is one more unit, whole for the whole step. A frozen tokenizer is not
    sharded. Weights are gathered and gradients reduced in the weights' precision: what
    is mixed is mixed by autocast, as without shards.

    Args:
        module:
            A `Pretraining`.
        mesh:
            The processes, of one dimension.
    """
    for part in module.modules():
        if isinstance(part, BLOCKS):
            fully_shard(part, mesh=mesh)
    tokenizer = getattr(module.model, "tokenizer", None)
    whole = set() if tokenizer is None else set(tokenizer.parameters())
    fully_shard(module, mesh=mesh, ignored_params=whole)
    for method in METHODS:
        register_fsdp_forward_method(module, method)


def check_strategy(strategy: str | Strategy) -> None:
    """Checks that a pretraining knows how to train with a strategy.

    Args:
        strategy:
            Of a trainer, or its name.

    Raises:
        ValueError: If it does not, with the names of those that it knows.
    """
    if isinstance(strategy, str):
        known = strategy.startswith(("auto", "ddp", "single_device", SHARDED))
    else:
        known = isinstance(
            strategy, (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)
        )
    if not known:
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"--trainer.strategy {name} is not supported: use ddp (every GPU holds all "
            f"weights) or {SHARDED} (weights, gradients and moments are sharded over "
            "the GPUs)."
        )


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of tensors: a shard, or all of one that is not sharded.

    Writing into them writes into the tensors.
    """
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def unsharded(state: Any) -> Any:
    """Collects a state, which all processes have to do.

    Args:
        state:
            Dictionaries and lists with tensors, some of them sharded.

    Returns:
        The same with whole tensors in the memory of the first process, an empty
        dictionary in the others.
    """
    first = dist.get_rank() == 0

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if not first:
            return None  # one tensor at a time
        return value.cpu() if isinstance(value, Tensor) else value

    state = tree_map(whole, state)
    return state if first else {}


@contextlib.contextmanager
def whole_states(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets `state_dict` of a module and of its parts have whole tensors.

    Args:
        module:
            The module; nothing changes if it is not sharded.
        state:
            Its whole tensors.
    """

    def put(name: str, part: nn.Module, result: Any, prefix: str, _: Any) -> None:
        for own, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                result[prefix + own] = state[f"{name}.{own}" if name else own]

    handles = [
        part.register_state_dict_post_hook(partial(put, name))
        for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharded_like(tensor: Any, other: Any) -> Any:
    """The shard of a whole tensor that belongs to one of the same shape."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    # Every process has the whole tensor: nothing is sent.
    mesh, placements = other.device_mesh, other.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
