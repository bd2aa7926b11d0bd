"""What a run would need and take on many accelerators, without them: every step is compiled ahead
of time for abstract parameters on virtual devices, and its memory, matrix products and collectives
are read from the compiled program.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.benchmarks.hlo import Cost, program_cost
from experiments.benchmarks.steps import Step, Steps
from mbpo_jax.stages.build import Config
from mbpo_jax.training.sharding import make_mesh

GIB = 2**30
USABLE = 0.95  # of a device's memory: the rest is the runtime's, and lost between arrays
HOST_DEVICES = 8  # joined by NVLink; hosts are joined by the network
COMPILER_OPTIONS = {
    # Neither helps a program that is only looked at, and both take most of the time.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # It would keep the float32 copies that the CPU makes of all bfloat16 weights at once, outside
    # the loops over layers and denoise steps. Accelerators make none.
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}


@dataclass(frozen=True)
class Peaks:
    """What one device can do at most: the roofs of the roofline."""

    name: str
    flops: float  # per second, bfloat16 without sparsity
    memory: float  # bytes per second
    link: float  # bytes per second and direction, to devices of the same host
    network: float  # bytes per second, to devices of other hosts


# NVIDIA's data sheet of the SXM5 module, and one 400 Gb/s InfiniBand port per device.
H100 = Peaks("H100 SXM", flops=989e12, memory=3.35e12, link=450e9, network=50e9)


@dataclass(frozen=True)
class Measured:
    """A compiled step; bytes and operations of one device."""

    step: Step
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    cost: Cost

    @property
    def total(self) -> int:
        """Bytes that must fit the device."""
        program = self.arguments + self.outputs + self.temporaries - self.aliased
        return program + self.step.resident

    def numbers(self) -> dict:
        """All of it, for JSON."""
        collectives = {f"{kind} {axes}": b for (kind, axes), b in self.cost.collectives.items()}
        return {
            "step": self.step.name,
            "runs": self.step.runs,
            "argument_bytes": self.arguments,
            "output_bytes": self.outputs,
            "temporary_bytes": self.temporaries,
            "aliased_bytes": self.aliased,
            "resident_bytes": self.step.resident,
            "flops": self.cost.flops,
            "matrix_bytes": self.cost.bytes,
            "collective_bytes": collectives,
        }

    def seconds(self, peaks: Peaks, devices: int) -> dict[str, float]:
        """Least seconds of a run by what limits it; work on different limits may overlap."""
        crossing = [b for (_, axes), b in self.cost.collectives.items() if "data" in axes]
        crossing = sum(crossing) if devices > HOST_DEVICES else 0.0
        return {
            "compute": self.cost.flops / peaks.flops,
            "memory": self.cost.bytes / peaks.memory,
            "link": (self.cost.sent - crossing) / peaks.link,
            "network": crossing / peaks.network,
        }


def measure(step: Step, mesh: Mesh) -> Measured:
    """Compiles a step."""
    compiled = step.program.lower(*step.arguments).compile(COMPILER_OPTIONS)
    memory = compiled.memory_analysis()
    return Measured(
        step,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        program_cost(compiled.as_text(), mesh.shape),
    )


def plan(config: Config, devices: list[jax.Device], only: str = "") -> tuple[Mesh, list[Measured]]:
    """Compiles the steps of the supervised stages and of policy optimisation whose name contains
    `only`, with a progress bar.

    Raises:
        ValueError: batch sizes that do not divide the devices.
    """
    mesh = make_mesh(config.parallel.fsdp, devices)
    return mesh, _measure_all([s for s in Steps(config, mesh) if only in s.name], mesh)


def _measure_all(chosen: list[Step], mesh: Mesh) -> list[Measured]:
    measured = []
    for step in (bar := tqdm(chosen, desc=f"compiling for {mesh.size} devices")):
        bar.set_postfix_str(step.name)
        measured.append(measure(step, mesh))
    return measured


def weak_scaling(
    config: Config, devices: list[jax.Device], counts: tuple[int, ...], only: str = ""
) -> dict[int, list[Measured]]:
    """The steps of `plan` on each of these numbers of devices, with batches in proportion: the
    config's own are those of `parallel.fsdp` devices, or of one.

    Raises:
        ValueError: a number of devices that `parallel.fsdp` does not divide, or too few devices.
    """
    if max(counts) > len(devices):
        raise ValueError(f"there are {len(devices)} devices, not {max(counts)}: --devices")
    measured = {}
    for count in counts:
        grown = _with_batches_times(config, count // config.parallel.fsdp)
        mesh = make_mesh(config.parallel.fsdp, devices[:count])
        of_the_run = [s for s in Steps(grown, mesh) if s.runs and only in s.name]
        measured[count] = _measure_all(of_the_run, mesh)
    return measured


def _with_batches_times(config: Config, factor: int) -> Config:
    config = config.copy_and_resolve_references()
    world, rl = config.world_model, config.rl
    for section, name in (
        (config.sft, "batch_size"),
        (world.vae_training, "batch_size"),
        (world, "dynamics_batch_size"),
        (world, "reward_batch_size"),
        (rl, "start_states"),
        (rl, "imagination_batch"),
        (rl, "minibatch_size"),
        (rl, "anchor_batch"),
        (rl.ranked, "start_states"),
        (rl.ranked, "batch_size"),
    ):
        section[name] *= factor
    return config


def memory_table(measured: list[Measured], budget: float) -> str:
    """Gibibytes per device and whether they fit `budget` bytes."""
    columns = ("arguments", "outputs", "temporaries", "aliased", "resident", "total")
    rows = [f"{'GiB per device':32}" + "".join(f"{c:>12}" for c in columns)]
    for m in measured:
        values = (m.arguments, m.outputs, m.temporaries, m.aliased, m.step.resident, m.total)
        fits = "fits" if m.total <= budget else "DOES NOT FIT"
        rows.append(f"{m.step.name:32}" + "".join(f"{x / GIB:12.2f}" for x in values) + f"  {fits}")
    return "\n".join([*rows, f"{budget / GIB:.1f} GiB are usable", ""])


def collectives_table(measured: list[Measured]) -> str:
    """Gigabytes that a device sends per run of each step, by kind and mesh axes."""
    rows = ["GB sent per device and run"]
    for m in measured:
        parts = [f"{k} over {a}: {b / 1e9:.2f}" for (k, a), b in sorted(m.cost.collectives.items())]
        rows.append(f"{m.step.name:32}" + (", ".join(parts) or "nothing"))
    return "\n".join([*rows, ""])


def time_table(measured: list[Measured], peaks: Peaks, devices: int) -> str:
    """Least seconds per run and hours per stage."""
    rows = [
        f"{peaks.name}: {peaks.flops / 1e12:.0f} TFLOP/s, {peaks.memory / 1e12:.2f} TB/s, "
        f"{peaks.link / 1e9:.0f} GB/s within a host, {peaks.network / 1e9:.0f} GB/s between hosts",
        f"{'least seconds per run':32}{'TFLOP':>10}{'compute':>10}{'memory':>10}{'link':>10}"
        f"{'network':>10}{'limit':>10}{'runs':>8}{'hours':>8}",
    ]
    hours: dict[str, float] = {}
    for m in measured:
        seconds = m.seconds(peaks, devices)
        limit = max(seconds, key=seconds.get)
        spent = m.step.runs * seconds[limit] / 3600
        hours[m.step.stage] = hours.get(m.step.stage, 0.0) + spent
        rows.append(
            f"{m.step.name:32}{m.cost.flops / 1e12:10.1f}"
            + "".join(f"{x:10.3f}" for x in seconds.values())
            + f"{limit:>10}{m.step.runs:8d}{spent:8.2f}"
        )
    rows += [f"stage {stage}: at least {x:.2f} hours" for stage, x in hours.items()]
    return "\n".join([*rows, ""])


def scaling_table(
    measured: list[Measured], peaks: Peaks, mesh: Mesh, devices: tuple[int, ...]
) -> str:
    """Communication as a share of computation on more devices, from the same programs: `fsdp`
    stays, `data` grows, and gradients are summed over it (ring all-reduce) once per run."""
    rows = [
        f"{'communication / compute time':32}"
        + "".join(f"{f'{n}, batch grows':>20}{f'{n}, same batch':>20}" for n in devices)
    ]
    for m in measured:
        link = sum(b for (_, axes), b in m.cost.collectives.items() if axes == "fsdp") / peaks.link
        compute = m.cost.flops / peaks.flops
        row = f"{m.step.name:32}"
        for n in devices:
            data = n // mesh.shape["fsdp"]
            between = 2 * (data - 1) / data * m.step.gradient / peaks.network
            grown = (link + between) / compute
            row += f"{grown:20.2f}{grown * n / mesh.size:20.2f}"
        rows.append(row)
    return "\n".join([*rows, "above 1 communication dominates, if nothing of it is hidden", ""])


def weak_scaling_table(measured: dict[int, list[Measured]]) -> str:
    """Matrix products and bytes sent per device and run, by the number of devices; batches grow
    with it, so that what is done on a device should stay as it is."""
    counts = list(measured)
    rows = [f"{'per device and run':32}" + "".join(f"{f'{n} devices':>28}" for n in counts)]
    for same_step in zip(*measured.values(), strict=True):
        name = same_step[0].step.name
        rows.append(
            f"{name:32}"
            + "".join(
                f"{m.cost.flops / 1e9:12.2f} GFLOP{m.cost.sent / 1e6:7.1f} MB" for m in same_step
            )
        )
    return "\n".join([*rows, ""])
