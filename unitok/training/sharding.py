"""FSDP2 for the decoder, on Lightning's `ModelParallelStrategy`: each process holds a part of every parameter and optimizer state.

Blocks are gathered one at a time, embedding and head once per step, because the loss multiplies rows of the head after the forward pass.
"""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from unitok.errors import UserError
from unitok.model.decoder import Decoder


def shard(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard a decoder over the mesh's `data_parallel` dimension. Errors: `UserError` for tensor parallelism, which is not supported."""
    if mesh["tensor_parallel"].size() != 1:
        raise UserError(
            "the decoder is sharded by data only: set trainer.strategy.init_args.data_parallel_size to the number of "
            "processes and tensor_parallel_size to 1"
        )
    data_mesh = mesh["data_parallel"]
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=data_mesh)
    fully_shard(decoder, mesh=data_mesh)
    register_fsdp_forward_method(decoder, "hidden")


def reshard(decoder: Decoder) -> None:
    """Free the parameters that the loss gathered; needed after a forward pass without a backward pass, which would do it."""
    if isinstance(decoder, FSDPModule):
        decoder.reshard()
