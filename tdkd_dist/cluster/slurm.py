"""What Slurm says of its partitions before a job is submitted, and what can be read from that.

Everything is asked with the programs that every user has, and what Slurm does not tell is taken to fit.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import lru_cache

from tdkd_dist.launcher_config import LauncherConfig

MOST_CPUS = 16
"""CPUs that a rank is given at most unless `launcher.cpus_per_task` says otherwise: loading needs no more."""
GB_PER_RANK = 8
"""Memory under which a rank may well be killed: its libraries, CUDA and the loader's buffers."""
NEVER = "it can never start as it is; cancel it and "
REASONS = (
    (r"PartitionTimeLimit|\w+MaxWallDurationPerJob\w*", NEVER + "set a smaller launcher.time_min"),
    (r"PartitionNodeLimit|\w+MaxNodePerJob\w*", NEVER + "set fewer launcher.nodes, unless nodes are down (sinfo)"),
    (
        r"PartitionConfig|MaxMemPerLimit|(QOS|Assoc)Max\w+Per(Job|Node)\w*",
        NEVER + "ask for less: launcher.nodes, launcher.gpus_per_node, launcher.cpus_per_task, launcher.mem_gb",
    ),
    (r"BadConstraints", NEVER + "change launcher.constraint: no nodes are so"),
    (r"AccountNotAllowed|InvalidAccount|Job's account not .*", NEVER + "change launcher.account"),
    (r"InvalidQOS|QOSNotAllowed|Job's QOS not .*", NEVER + "change launcher.qos"),
    (r"DependencyNeverSatisfied", NEVER + "change launcher.sbatch.dependency"),
    (r"InvalidReservation|ReservationDeleted", NEVER + "change launcher.sbatch.reservation"),
    (r"Partition(Down|Inactive)", "the partition takes no jobs now; launcher.partition may name another"),
    (
        r"ReqNodeNotAvail.*|ReqNodeNotAvailable.*",
        "nodes are down or reserved, for maintenance perhaps: a smaller launcher.time_min may fit before that",
    ),
    (r"(QOS|Assoc)Grp.*", "what your account may use is in use, or less than this job asks for"),
    (r"JobHeld.*|JobHold.*|.*held.*", "it is held: see `scontrol show job`, then `scontrol release`"),
)
"""Why a job waits, in Slurm's words, and what that means; whatever isn't here passes by itself."""
ENDS = {
    "OUT_OF_MEMORY": "a rank needed more memory than the job was given: set launcher.mem_gb",
    "TIMEOUT": "the time limit came before a checkpoint was saved: set a larger launcher.signal_delay_s",
    "NODE_FAIL": "a node failed; launcher.max_restarts starts the job again",
}
GPU_OPTIONS = ("gres", "gpus", "gpus_per_node", "gpus_per_task")


@dataclass(frozen=True)
class Node:
    """What a job can have of one node."""

    cpus: int
    memory_mb: int
    gpus: int
    threads_per_core: int = 1
    features: frozenset[str] = frozenset()


@dataclass
class Partition:
    """A partition's limits, None where it has none, and its nodes."""

    name: str
    state: str = "UP"
    time_min: int | None = None
    max_nodes: int | None = None
    max_cpus_per_node: int | None = None
    memory_mb_per_cpu: int | None = None
    """What a job gets that asks for no memory."""
    memory_mb_per_node: int | None = None
    nodes: list[Node] = field(default_factory=list)


def options(launcher: LauncherConfig) -> dict[str, str | bool]:
    """`launcher.sbatch` as submitit wants it: words with underscores, true for an option without a value.

    A job may be requeued unless it says otherwise; some clusters forbid that by default.
    """
    given = {key.replace("-", "_"): value for key, value in launcher.sbatch.items()}
    flags: dict[str, str | bool] = {k: True if v.lower() == "true" else v for k, v in given.items()}
    return {k: v for k, v in ({"requeue": True} | flags).items() if str(v).lower() != "false"}


def partitions(launcher: LauncherConfig) -> list[Partition]:
    """The partitions that the job may go to; none if Slurm does not know them or does not answer."""
    # As for sbatch itself, its environment wins over the batch script.
    wanted = os.environ.get("SBATCH_PARTITION") or options(launcher).get("partition") or launcher.partition
    return _read_partitions(str(wanted or ""))


@lru_cache
def _read_partitions(wanted: str) -> list[Partition]:
    """Those of a comma-separated list, or the default one. A sweep of a hundred runs asks once."""
    shown = [_facts(line) for line in _ask("scontrol", "-o", "show", "partition").splitlines()]
    names = wanted.split(",") if wanted else []
    chosen = [f for f in shown if (f.get("PartitionName") in names if names else f.get("Default") == "YES")]
    defaults = dict(re.findall(r"(DefMemPer\w+)\s*=\s*(\w+)", _ask("scontrol", "show", "config"))) if chosen else {}
    return [_partition(facts, defaults) for facts in chosen]


def cpus_per_task(launcher: LauncherConfig, found: list[Partition]) -> int | None:
    """CPUs that a rank asks for: `launcher.cpus_per_task`, or its share of a node by GPUs, `MOST_CPUS` at most.

    None: the cluster's default, usually 1, because `launcher.sbatch` has its own way or Slurm doesn't tell.
    """
    if launcher.cpus_per_task is not None:
        return launcher.cpus_per_task
    given = options(launcher)
    if "cpus_per_task" in given:
        return int(given["cpus_per_task"])
    if "cpus_per_gpu" in given:
        return None
    one_thread = given.get("hint") == "nomultithread" or given.get("threads_per_core") == "1"
    shares = []
    for partition in found:
        for node in _fitting(partition, launcher):
            cpus = min(node.cpus, partition.max_cpus_per_node or node.cpus)
            # A node of eight GPUs of which the job takes one is shared with seven others.
            part = launcher.gpus_per_node / node.gpus if launcher.gpus_per_node and node.gpus else 1
            cores = int(cpus * part) // launcher.ranks_per_node // node.threads_per_core
            # Slurm gives whole cores: a rank that asks for half of one takes all of it.
            shares.append(cores * (1 if one_thread else node.threads_per_core))
    return max(1, min(*shares, MOST_CPUS)) if shares else None


def never_starts(launcher: LauncherConfig, found: list[Partition]) -> str | None:
    """Why the job could never start, with the key to change; None if one of its partitions can take it."""
    reasons = [_misfit(launcher, partition) for partition in found]
    return None if None in reasons or not reasons else reasons[0]


def advice(launcher: LauncherConfig, found: list[Partition]) -> list[str]:
    """What had better be set for the job, a line each."""
    lines = []
    cpus = cpus_per_task(launcher, found)
    if launcher.nodes > 1 and launcher.network_interface is None:
        lines.append(
            "launcher.network_interface is not set, and NCCL and gloo may choose a slow or closed network between"
            " nodes: give the fast one's name, as `ip -br address` on a node shows it (ib0, hsn0, ...)"
        )
    if cpus is None and "cpus_per_gpu" not in options(launcher):
        lines.append("launcher.cpus_per_task is not set, and Slurm's default is usually 1: give a rank 8 or more")
    for partition in found:
        memory = _default_memory_mb(launcher, partition, cpus or 1)
        need = GB_PER_RANK * launcher.ranks_per_node
        if launcher.mem_gb is None and memory is not None and memory < 1024 * need:
            lines.append(
                f"launcher.mem_gb is not set, and partition {partition.name} then gives the job"
                f" {memory / 1024:.1f} GB a node: set launcher.mem_gb={need} or more, or ranks may be killed"
            )
        if partition.state != "UP":
            lines.append(f"partition {partition.name} is {partition.state}: the job waits until that changes")
    return lines


def explain(reason: str) -> str | None:
    """What it means that Slurm gives `reason` for a job that waits; None if it is only waiting for its turn."""
    return next((f"{reason}: {meaning}" for pattern, meaning in REASONS if re.fullmatch(pattern, reason)), None)


def how_it_ended(job_id: str) -> str | None:
    """What Slurm says of the end of a job, where that tells more than its ranks can."""
    state = _facts(_ask("scontrol", "-o", "show", "job", job_id)).get("JobState", "")
    return f"{state}: {ENDS[state]}" if state in ENDS else None


def _misfit(launcher: LauncherConfig, partition: Partition) -> str | None:
    name, given = partition.name, options(launcher)
    # A quality of service may lift a partition's limits.
    limited = launcher.qos is None and not {"qos", "time", "nodes"} & given.keys()
    if limited and partition.time_min is not None and launcher.time_min > partition.time_min:
        return (
            f"launcher.time_min={launcher.time_min}: partition {name} allows {partition.time_min}; set"
            f" launcher.time_min={partition.time_min} (a longer run goes on by itself in the next job)"
        )
    if limited and partition.max_nodes is not None and launcher.nodes > partition.max_nodes:
        return f"launcher.nodes={launcher.nodes}: partition {name} allows {partition.max_nodes} a job"
    if not partition.nodes or {"nodes", "nodelist"} & given.keys():
        return None
    if launcher.nodes > len(partition.nodes):
        return f"launcher.nodes={launcher.nodes}: partition {name} has {len(partition.nodes)}"
    gpus = 0 if set(GPU_OPTIONS) & given.keys() else launcher.gpus_per_node
    ranks, cpus, memory_gb = launcher.ranks_per_node, launcher.cpus_per_task or 1, launcher.mem_gb or 0
    for key, needed, has in (
        (f"launcher.gpus_per_node={gpus}", gpus, [node.gpus for node in partition.nodes]),
        (
            f"launcher.cpus_per_task={cpus} for {ranks} rank(s) a node",
            cpus * ranks,
            [min(node.cpus, partition.max_cpus_per_node or node.cpus) for node in partition.nodes],
        ),
        (f"launcher.mem_gb={memory_gb}", memory_gb, [node.memory_mb // 1024 for node in partition.nodes]),
    ):
        if sum(h >= needed for h in has) < launcher.nodes:
            most = sorted(has)[-launcher.nodes]
            return f"{key}: no {launcher.nodes} node(s) of partition {name} have so many; {most} is the most"
    return None


def _default_memory_mb(launcher: LauncherConfig, partition: Partition, cpus: int) -> int | None:
    given = options(launcher)
    if {"mem", "mem_per_cpu", "mem_per_gpu", "exclusive"} & given.keys():
        return None
    if partition.memory_mb_per_node is not None:
        return partition.memory_mb_per_node
    per_cpu = partition.memory_mb_per_cpu
    return None if per_cpu is None else per_cpu * cpus * launcher.ranks_per_node


def _fitting(partition: Partition, launcher: LauncherConfig) -> list[Node]:
    """The nodes with enough GPUs that have the feature, if `launcher.constraint` is a single one."""
    gpus, feature = launcher.gpus_per_node, launcher.constraint
    nodes = [node for node in partition.nodes if node.gpus >= gpus]
    return [node for node in nodes if feature in node.features] or nodes


def _partition(facts: dict[str, str], defaults: dict[str, str]) -> Partition:
    name = facts["PartitionName"]
    # A partition says UNLIMITED where the configuration's value holds.
    own = {key: facts[key] for key in ("DefMemPerCPU", "DefMemPerNode") if _number(facts.get(key)) is not None}
    memory = own or defaults
    hosts = _ask("sinfo", "-h", "-p", name, "-o", "%N").strip()
    lines = _ask("scontrol", "-o", "show", "node", hosts).splitlines() if hosts else []
    return Partition(
        name=name,
        state=facts.get("State", "UP"),
        time_min=_minutes(facts.get("MaxTime", "UNLIMITED")),
        max_nodes=_number(facts.get("MaxNodes")),
        max_cpus_per_node=_number(facts.get("MaxCPUsPerNode")),
        memory_mb_per_cpu=_number(memory.get("DefMemPerCPU")),
        memory_mb_per_node=_number(memory.get("DefMemPerNode")),
        nodes=[_node(_facts(line)) for line in lines if "NodeName=" in line],
    )


def _node(facts: dict[str, str]) -> Node:
    return Node(
        # Without those that the node keeps for itself, where this version of Slurm says so.
        cpus=_number(facts.get("CPUEfctv")) or _number(facts.get("CPUTot")) or 1,
        memory_mb=(_number(facts.get("RealMemory")) or 0) - (_number(facts.get("MemSpecLimit")) or 0),
        gpus=sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", facts.get("Gres", ""))),
        threads_per_core=_number(facts.get("ThreadsPerCore")) or 1,
        features=frozenset(facts.get("AvailableFeatures", "").split(",")),
    )


def _facts(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _minutes(text: str) -> int | None:
    """Slurm's `[days-]hours:minutes:seconds` in minutes; None: no limit."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in (*parts, days or "0")):
        return None
    return 24 * 60 * int(days or 0) + 60 * int(parts[0]) + int(parts[1])


def _ask(*command: str) -> str:
    """What a program of Slurm's prints; nothing if it fails or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
