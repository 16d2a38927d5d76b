"""Muon on sharded matrices is Muon on whole ones, also where rows do not divide by processes and matrices do not either."""

import socket

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from unitok.training.optim import Muon

SHAPES = [(7, 5)] * 4 + [(2, 9)] * 2 + [(6, 6)]


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train(make):
    """Three steps of matrices made of whole ones by `make`; returns the whole ones."""
    params = [torch.nn.Parameter(make(x)) for x in values(0)]
    optimizer = Muon(params, lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        for p, gradient in zip(params, values(step), strict=True):
            p.grad = make(gradient)
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in params]


def process(rank, size, port, placement):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = train(lambda x: distribute_tensor(x, mesh, [placement]))
    for a, b in zip(found, train(lambda x: x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("size", "placement"), [(3, Shard(0)), (2, Shard(1)), (2, Replicate())], ids=str)
def test_sharded_matrices_are_updated_as_whole_ones(size, placement):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (size, port, placement), nprocs=size)
