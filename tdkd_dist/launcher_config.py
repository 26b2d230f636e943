"""Where a job runs and what it asks for, apart from what it computes."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tdkd_dist.limits import Section, limited
from tdkd_dist.mistakes import Mistakes


@dataclass
class LauncherConfig(Section):
    """Where the job runs."""

    section: ClassVar[str] = "launcher"
    cluster: Literal["auto", "local", "slurm"] = "auto"
    """`auto`: Slurm if `sbatch` answers, else this machine."""
    nodes: int = limited(1, ">= 1", most=100_000)
    """Machines."""
    gpus_per_node: int = limited(0, ">= 0", most=64)
    """0: train on the CPU."""
    tasks_per_node: int | None = limited(None, ">= 1", most=1024)
    """Ranks a node; None: one a GPU, or one."""
    cpus_per_task: int | None = limited(None, ">= 1", most=4096)
    """None: an equal share of this machine's cores; on Slurm that of its GPUs in a node's CPUs, 16 at most."""
    time_min: int = limited(7 * 24 * 60, ">= 1", most=10 * 365 * 24 * 60)
    """Time limit of one job, in minutes."""
    partition: str | None = None
    """Slurm's `--partition`; None: the cluster's default."""
    account: str | None = None
    """Slurm's `--account`."""
    qos: str | None = None
    """Slurm's `--qos`."""
    constraint: str | None = None
    """Slurm's `--constraint`: features of the nodes, such as a kind of GPU."""
    mem_gb: int | None = limited(None, ">= 1", most=1_000_000)
    """Memory a node, on Slurm; None: the cluster's default."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that the batch script runs before the ranks start, such as `module load cuda`."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """More of sbatch's options, by their long names: `launcher.sbatch.reservation=mine`."""
    srun_args: list[str] = field(default_factory=list)
    """More of srun's arguments."""
    network_interface: str | None = None
    """The interface that NCCL and gloo talk over; None: they choose."""
    signal_delay_s: int = limited(120, ">= 0", most=86_400)
    """How long before the time limit Slurm warns the job, which must be enough to save a checkpoint."""
    hang_timeout_min: float = limited(20.0, "> 0", most=100_000)
    """A rank that has not moved for so long ends itself, and with it the job; longer than any compilation or save."""
    max_restarts: int = limited(0, ">= 0", most=10_000)
    """How often a job that crashed is started again, from its last checkpoint."""

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""
        found.require(
            self.gpus_per_node <= 0 or self.ranks_per_node == self.gpus_per_node,
            f"launcher.tasks_per_node={self.tasks_per_node}: must equal launcher.gpus_per_node={self.gpus_per_node}"
            " (one rank a GPU), or leave it out",
        )
        found.require(
            self.signal_delay_s < 60 * max(self.time_min, 1),
            f"launcher.signal_delay_s={self.signal_delay_s}: must be less than launcher.time_min={self.time_min} min",
        )

    @property
    def ranks_per_node(self) -> int:
        """Processes started on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.ranks_per_node
