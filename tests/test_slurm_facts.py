"""What is read from Slurm's answers, given by stand-ins for its programs in the words of Slurm 22.05 and 23.11."""

import os
from pathlib import Path

import pytest

from tdkd_dist.cluster import slurm
from tdkd_dist.launcher_config import LauncherConfig

PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL Default=YES QoS=N/A DefaultTime=NONE MaxNodes=UNLIMITED \
MaxTime=UNLIMITED MinNodes=0 MaxCPUsPerNode=UNLIMITED Nodes=c[1-2] PriorityTier=1 State=UP TotalCPUs=128 TotalNodes=2 \
DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL Default=NO QoS=N/A DefaultTime=01:00:00 GraceTime=60 MaxNodes=2 \
MaxTime=2-00:00:00 MinNodes=0 MaxCPUsPerNode=UNLIMITED Nodes=g[1-3] PriorityTier=1 State=UP TotalCPUs=320 TotalNodes=3 \
DefMemPerCPU=2000 MaxMemPerNode=UNLIMITED
PartitionName=short Default=NO MaxNodes=UNLIMITED MaxTime=00:30:00 MaxCPUsPerNode=24 Nodes=g[1-3] State=DRAIN
"""
NODES = {
    "cpu": [f"NodeName=c{k} CPUTot=64 Gres=(null) RealMemory=250000 ThreadsPerCore=1 State=IDLE" for k in (1, 2)],
    "gpu": [
        "NodeName=g1 CPUAlloc=0 CPUEfctv=126 CPUTot=128 AvailableFeatures=h100,ib Gres=gpu:h100:8(S:0-1),shard:h100:0"
        " OS=Linux 5.14 #1 SMP RealMemory=1000000 ThreadsPerCore=2 State=MIXED",
        "NodeName=g2 CPUEfctv=128 CPUTot=128 AvailableFeatures=h100,ib Gres=gpu:h100:8 RealMemory=1000000"
        " ThreadsPerCore=2 State=DOWN",
        "NodeName=g3 CPUEfctv=64 CPUTot=64 AvailableFeatures=a100 Gres=gpu:a100:4 RealMemory=500000 ThreadsPerCore=2",
    ],
}
NODES["short"] = NODES["gpu"]


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol` and `sinfo` that answer as that cluster's would."""
    (tmp_path / "partition").write_text(PARTITIONS)
    (tmp_path / "config").write_text("DefMemPerCPU            = 1000\nMaxMemPerNode           = UNLIMITED\n")
    for name, lines in NODES.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    scripts = {
        # scontrol -o show partition, scontrol show config, scontrol -o show node HOSTS
        "scontrol": 'case "$*" in *partition) cat partition;; *config) cat config;; *) cat "${@: -1}";; esac',
        # sinfo -h -p NAME -o %N: here a partition's name stands for its hosts
        "sinfo": 'echo "$3"',
    }
    for name, line in scripts.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/bash\ncd {tmp_path}\n{line}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    slurm._read_partitions.cache_clear()
    yield
    slurm._read_partitions.cache_clear()


def launcher(**changes) -> LauncherConfig:
    return LauncherConfig(**({"cluster": "slurm", "time_min": 60} | changes))


@pytest.mark.parametrize(
    ("changes", "cpus"),
    [
        ({"partition": "gpu", "gpus_per_node": 8}, 14),  # 126 CPUs for 8 ranks, in whole cores of two threads
        ({"partition": "gpu", "gpus_per_node": 4}, 14),  # the a100 node has 16 a rank, g1 half of its 126
        ({"partition": "gpu", "gpus_per_node": 1}, 14),
        ({"partition": "gpu", "gpus_per_node": 1, "constraint": "a100"}, 16),
        ({"partition": "gpu", "gpus_per_node": 8, "sbatch": {"hint": "nomultithread"}}, 7),
        ({"partition": "gpu", "gpus_per_node": 8, "cpus_per_task": 3}, 3),
        ({"partition": "gpu", "gpus_per_node": 8, "sbatch": {"cpus-per-task": "5"}}, 5),
        ({"partition": "gpu", "gpus_per_node": 8, "sbatch": {"cpus-per-gpu": "5"}}, None),
        ({"partition": "short", "gpus_per_node": 8}, 2),  # MaxCPUsPerNode
        ({"tasks_per_node": 2}, 16),  # the default partition's nodes of 64
        ({"tasks_per_node": 8}, 8),
        ({"partition": "unheard_of"}, None),
    ],
)
def test_a_rank_asks_for_its_share_of_a_node(changes, cpus):
    config = launcher(**changes)
    assert slurm.cpus_per_task(config, slurm.partitions(config)) == cpus


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"partition": "gpu", "time_min": 7 * 24 * 60},
            "launcher.time_min=10080: partition gpu allows 2880; set launcher.time_min=2880",
        ),
        ({"partition": "gpu", "nodes": 3}, "launcher.nodes=3: partition gpu allows 2 a job"),
        ({"nodes": 3}, "launcher.nodes=3: partition cpu has 2"),
        ({"gpus_per_node": 8}, "launcher.gpus_per_node=8: no 1 node(s) of partition cpu have so many; 0 is the most"),
        ({"cpus_per_task": 40, "tasks_per_node": 2}, "launcher.cpus_per_task=40 for 2 rank(s) a node: no 1 node(s)"),
        ({"mem_gb": 300}, "launcher.mem_gb=300: no 1 node(s) of partition cpu have so many; 244 is the most"),
        ({"partition": "gpu", "gpus_per_node": 8, "nodes": 2}, None),
        ({"partition": "gpu", "time_min": 7 * 24 * 60, "qos": "long"}, None),
        ({"partition": "short,gpu"}, None),
        ({"partition": "unheard_of"}, None),
    ],
)
def test_what_could_never_start_is_told_with_the_key_to_change(changes, words):
    config = launcher(**changes)
    reason = slurm.never_starts(config, slurm.partitions(config))
    assert reason is None if words is None else reason is not None and reason.startswith(words)


def advice(**changes) -> str:
    config = launcher(**changes)
    return "\n".join(slurm.advice(config, slurm.partitions(config)))


def test_what_had_better_be_set():
    said = advice(partition="gpu", gpus_per_node=1, nodes=2)
    assert "launcher.network_interface is not set" in said
    assert advice(partition="gpu", gpus_per_node=1, cpus_per_task=8) == ""
    said = advice(partition="gpu", gpus_per_node=8, cpus_per_task=1)
    assert "launcher.mem_gb is not set, and partition gpu then gives the job 15.6 GB a node" in said
    assert "set launcher.mem_gb=64 or more" in said
    assert "launcher.mem_gb" not in advice(partition="gpu", gpus_per_node=8, cpus_per_task=1, mem_gb=64)
    assert "launcher.cpus_per_task is not set" in advice(partition="unheard_of")
    assert "partition short is DRAIN" in advice(partition="short", time_min=20)


@pytest.mark.parametrize(
    ("reason", "key"),
    [
        ("PartitionTimeLimit", "launcher.time_min"),
        ("QOSMaxWallDurationPerJobLimit", "launcher.time_min"),
        ("PartitionNodeLimit", "launcher.nodes"),
        ("AssocMaxNodePerJobLimit", "launcher.nodes"),
        ("PartitionConfig", "launcher.mem_gb"),
        ("QOSMaxGRESPerJob", "launcher.gpus_per_node"),
        ("QOSMaxCpuPerNode", "launcher.cpus_per_task"),
        ("BadConstraints", "launcher.constraint"),
        ("AccountNotAllowed", "launcher.account"),
        ("InvalidQOS", "launcher.qos"),
        ("Job's account not known, so it can't use this partition (closed allows nobody)", "launcher.account"),
        ("Job's QOS not permitted to use this partition (gpu allows long not normal)", "launcher.qos"),
        ("ReqNodeNotAvail, UnavailableNodes:g[1-2]", "launcher.time_min"),
        ("ReqNodeNotAvail, Reserved for maintenance", "launcher.time_min"),
        ("AssocGrpGRES", "account"),
        ("launch failed requeued held", "scontrol release"),
        ("JobHeldUser", "scontrol release"),
    ],
)
def test_slurms_reason_for_waiting_is_told_with_what_to_change(reason, key):
    said = slurm.explain(reason)
    assert said is not None
    assert said.startswith(f"{reason}: ")
    assert key in said


@pytest.mark.parametrize(
    "reason", ["Resources", "Priority", "BeginTime", "None", "QOSMaxJobsPerUserLimit", "Dependency"]
)
def test_a_job_that_only_waits_for_its_turn_needs_no_words(reason):
    assert slurm.explain(reason) is None


@pytest.mark.parametrize(
    ("state", "key"),
    [("OUT_OF_MEMORY", "launcher.mem_gb"), ("TIMEOUT", "launcher.signal_delay_s"), ("FAILED", None), ("", None)],
)
def test_slurms_word_for_a_jobs_end_is_told_where_it_says_more(tmp_path, state, key):
    (tmp_path / "7").write_text(f"JobId=7 JobName=x JobState={state} Reason=None\n")
    said = slurm.how_it_ended("7")
    assert said is None if key is None else said is not None and key in said


def test_a_cluster_without_slurms_programs_tells_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm.partitions(launcher()) == []
    assert slurm.never_starts(launcher(), []) is None
