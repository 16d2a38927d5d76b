"""FSDP2 for the decoder, on Lightning's `ModelParallelStrategy`: each process keeps a part of every tensor of the training.

Blocks are gathered one at a time, embedding and head once per step: the loss multiplies rows of the head after the forward pass.
"""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from unitok.errors import UserError
from unitok.model.decoder import Decoder


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard a decoder over the mesh's `data_parallel` dimension; errors: `UserError` for tensor parallelism, which it has not."""
    if mesh["tensor_parallel"].size() != 1:
        raise UserError(
            "the decoder is sharded by data only: set trainer.strategy.init_args.data_parallel_size to the number of "
            "processes and tensor_parallel_size to 1"
        )
    over: Any = mesh["data_parallel"]
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=over)
    fully_shard(decoder, mesh=over)
    register_fsdp_forward_method(decoder, "hidden")


def reshard(decoder: Decoder) -> None:
    """After a forward pass without a backward one, which would do it: give back what was gathered for the loss."""
    if isinstance(decoder, FSDPModule):
        decoder.reshard()
