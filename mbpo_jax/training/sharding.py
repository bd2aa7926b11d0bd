"""The device mesh: batches split over every device, large parameters over `fsdp`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbpo_jax.types import Params

MIN_SHARDED_SIZE = 2**18  # smaller arrays cost more to gather than to keep


def make_mesh(fsdp: int = 1) -> Mesh:
    """A mesh [devices / fsdp, fsdp] with axes `data` and `fsdp` over all devices.

    Raises:
        ValueError: when `fsdp` does not divide the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise ValueError(f"parallel.fsdp = {fsdp} does not divide the {devices} devices present")
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def parameter_sharding(tree: Params, mesh: Mesh) -> Params:
    """For each array the largest axis that `fsdp` divides is sharded, if the array is large."""
    size = mesh.shape["fsdp"]

    def one(x):
        spec = [None] * x.ndim
        if size > 1 and x.size >= MIN_SHARDED_SIZE:
            for axis in np.argsort(x.shape)[::-1]:
                if x.shape[axis] % size == 0:
                    spec[axis] = "fsdp"
                    break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def shard_batch(batch, mesh: Mesh):
    """Puts a host batch on the mesh, leading axis split.

    Raises:
        ValueError: when the batch does not divide the number of devices.
    """
    for x in jax.tree.leaves(batch):
        if x.shape[0] % mesh.size:
            raise ValueError(
                f"a batch of {x.shape[0]} does not divide over {mesh.size} devices; "
                f"choose a batch size that is a multiple of {mesh.size}"
            )
    return jax.device_put(batch, batch_sharding(mesh))
