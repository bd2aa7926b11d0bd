"""The device mesh [data, fsdp]: where parameters and batches live, and functions mapped over it.

Batches are split over both axes. Parameters, their averages and optimiser states are split over
`fsdp` by rules on their names (ZeRO-3, arXiv 1910.02054: gathered where they are used) and repeated
over `data`. `fsdp` is the inner axis, so that up to a host's devices it stays within the host.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mbpo_jax.types import Params

AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, tuple[int, ...]]]


def start_processes(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins this process with those of other hosts into one JAX program; to be called before any
    computation. Does nothing where there is one process.

    Args:
        coordinator: "HOST:PORT" of process 0. By default all three come from the environment:
            `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or what a cluster
            sets (SLURM, Open MPI, Kubernetes: see `jax.distributed.initialize`).

    Raises:
        ValueError: only some of the three are known.
    """
    environment = os.environ
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if processes is None and "JAX_NUM_PROCESSES" in environment:
        processes = int(environment["JAX_NUM_PROCESSES"])
    if process is None and "JAX_PROCESS_ID" in environment:
        process = int(environment["JAX_PROCESS_ID"])
    named = [x is not None for x in (coordinator, processes, process)]
    launched = int(environment.get("SLURM_NTASKS", environment.get("OMPI_COMM_WORLD_SIZE", 1)))
    if not any(named) and launched == 1:
        return
    if any(named) and not all(named) and launched == 1:
        raise ValueError(
            "of several processes the coordinator's address, their number and this one's index "
            f"must all be given; there are {coordinator}, {processes} and {process}"
        )
    # Without an accelerator processes talk through gloo; elsewhere this has no effect.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh [devices / fsdp, fsdp] with axes `data` and `fsdp`, by default over all devices.

    Raises:
        ValueError: when `fsdp` does not divide the number of devices.
    """
    count = len(devices or jax.devices())
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"parallel.fsdp = {fsdp} does not divide the {count} devices present")
    return jax.make_mesh(
        (count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def parameter_sharding(tree: Params, mesh: Mesh, rules: Rules = ()) -> Params:
    """The tree of shardings of a tree of arrays.

    Args:
        rules: pairs of a regular expression, searched in an array's '/'-joined path, and the
            dimensions that may be split over `fsdp`, in order of preference, counted from the end
            (-1 is the last). The first rule that matches counts, and of its dimensions the first
            that `fsdp` divides; an array without either is replicated.
    """
    size = mesh.shape["fsdp"]

    def one(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = [None] * x.ndim
        for dim in next((dims for pattern, dims in rules if re.search(pattern, name)), ()):
            if size > 1 and -dim <= x.ndim and x.shape[dim] % size == 0:
                spec[dim] = "fsdp"
                break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def frozen_weight_sharding(
    tree: Params, mesh: Mesh, rules: Rules, placement: str
) -> tuple[Params, Params]:
    """Where weights that are only read live: (between uses, while in use).

    Args:
        placement: "replicated": whole on every device. "sharded": split like trained parameters,
            and gathered layer by layer. "offloaded": split in pinned host memory, and whole on
            every device while in use.

    Raises:
        ValueError: an unknown placement, or devices without pinned host memory.
    """
    split = parameter_sharding(tree, mesh, rules)
    whole = parameter_sharding(tree, mesh)
    if placement == "replicated":
        return whole, whole
    if placement == "sharded":
        return split, split
    if placement != "offloaded":
        raise ValueError(
            f"parallel.world_model is {placement!r}: choose 'replicated', 'sharded' or 'offloaded'"
        )
    device = mesh.local_devices[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"parallel.world_model = 'offloaded' needs pinned host memory, which {device} does not "
            "have: choose 'replicated' or 'sharded'"
        )
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), split), whole


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def shard_batch(batch: Any, mesh: Mesh, slices: int = 1) -> Any:
    """Puts a host batch on the mesh, leading axis split.

    Args:
        batch: the rows of this process; the rows of all processes, in order, are the batch.
        slices: how many parts of the batch will be used one after the other.

    Raises:
        ValueError: when the batch, or a slice of it, does not divide the number of devices.
    """
    for x in jax.tree.leaves(batch):
        rows = len(x) * jax.process_count()
        if rows % (mesh.size * slices):
            parts = f"{mesh.size} devices" + (f" in {slices} slices" if slices > 1 else "")
            raise ValueError(
                f"a batch of {rows} does not divide over {parts}; "
                f"choose a batch size that is a multiple of {mesh.size * slices}"
            )
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced knowing the mesh, so that models can gather their weights."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def map_rows(
    function: Callable, mesh: Mesh, how: str, in_axes: tuple, out_axes: Any
) -> Callable[..., Any]:
    """Compiles `function` so that every device computes its own rows of the batch.

    Args:
        function: a pure function whose result for a row depends on that row and on the arguments
            without rows only.
        how: "shard_map" over `data`; along `fsdp`, where arguments without rows may be split, the
            compiler partitions each shard. "pmap" over all devices of one process, each of which
            holds those arguments whole.
        in_axes, out_axes: as in `jax.vmap`, the axis of the rows; None for an argument without.

    Raises:
        ValueError: an unknown `how`, or pmap with several processes.
    """
    if how == "shard_map":
        # Where nothing is split along fsdp there is nothing to leave to the compiler, which forbids
        # callbacks (the simulator as a world model) wherever something is.
        manual = {"data"} if mesh.shape["fsdp"] > 1 else set(mesh.axis_names)
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=_map_axes(lambda a: PartitionSpec(*(None,) * a, "data"), in_axes),
            out_specs=_map_axes(lambda a: PartitionSpec(*(None,) * a, "data"), out_axes),
            axis_names=manual,
            check_vma=False,  # a branch's carry starts as a constant, the same on every device
        )
        return jax.jit(
            mapped, out_shardings=jax.tree.map(lambda a: batch_sharding(mesh, a), out_axes)
        )
    if how != "pmap":
        raise ValueError(f"parallel.rollout is {how!r}: choose 'shard_map' or 'pmap'")
    if jax.process_count() > 1:
        raise ValueError("parallel.rollout = 'pmap' is for one process: choose 'shard_map'")
    mapped = jax.pmap(function, in_axes=in_axes, out_axes=out_axes, devices=[*mesh.devices.flat])

    def call(*arguments):
        split = [_per_device(x, axes, mesh) for x, axes in zip(arguments, in_axes, strict=True)]
        return jax.tree.map(_merge, out_axes, mapped(*split))

    return call


def _map_axes(spec: Callable[[int], PartitionSpec], axes: Any) -> Any:
    return jax.tree.map(
        lambda a: PartitionSpec() if a is None else spec(a), axes, is_leaf=lambda a: a is None
    )


def _per_device(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """Rows as [..., devices, rows, ...] on their devices; a tree without rows on every device."""
    if axes is None:
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    def split(axis, subtree):
        def one(x):
            shape = (*x.shape[:axis], mesh.size, -1, *x.shape[axis + 1 :])
            return jax.device_put(x.reshape(shape), batch_sharding(mesh, axis))

        return jax.tree.map(one, subtree)

    return jax.tree.map(split, axes, tree)


def _merge(axis: int, subtree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), subtree)
