"""How fast a recipe would be on 1 to 512 GPUs, and what it would cost: predicted from a measured step and the links.

    python tools/plan_run.py recipe=imagenet_sew34 --step-ms 60 --cores 64
    python tools/plan_run.py recipe=imagenet_sew34 nodes=1,4 --step-ms 60 --cores 64
    python tools/plan_run.py recipe=imagenet_sew34 --step-ms 60 --cores 64 --gpus 8,64 --node-gb-s 50
    python tools/plan_run.py recipe=fashion_sew --check      # measures here, and checks the model against real ranks

Without --step-ms the step of one micro-batch is measured on this machine, by as many ranks at a time as the recipe puts
on a node (which then share its caches and its memory's bandwidth), and so is the all-reduce between them. The model is
in docs/scaling.md.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tdkd_dist import distributed
from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.config import Config
from tdkd_dist.data.beton.manifest import check_beton
from tdkd_dist.mistakes import Mistake, Mistakes
from tdkd_dist.recipe import load_config
from tdkd_dist.run.log import format_seconds
from tdkd_dist.students import create_student
from tdkd_dist.training.step import build_untrained

GPUS = "1,2,4,8,16,32,64,128,256,512"
GPU_GB_S = 200.0


@dataclass
class Links:
    """What ranks are connected by."""

    gpu_bytes_s: float
    """Of a rank's all-reduce within a node, in bytes a second."""
    node_bytes_s: float
    """Of a node's all-reduce with other nodes."""
    latency_s: float
    """Of one message."""


@dataclass
class Plan:
    """What a run would be on so many ranks."""

    ranks: int
    nodes: int
    batch: int
    step_s: float
    images_s: float
    efficiency: float
    epoch_s: float
    run_s: float


def predict(
    config: Config,
    size: int,
    links: Links,
    micro_s: float,
    *,
    ranks: int,
    ranks_per_node: int,
    images: int,
    val_images: int,
    synced_norms: int = 0,
) -> Plan:
    """The plan for `ranks` ranks, as docs/scaling.md has it.

    `size`: bytes of the gradients; `micro_s`: one rank's seconds for a micro-batch; `images`: of an epoch;
    `val_images`: of a validation; `synced_norms`: batch norms whose statistics travel between ranks in each
    micro-batch, forward and backward.
    """
    nodes = math.ceil(ranks / ranks_per_node)
    micro = config.train.micro_batch or config.micro_batch
    accumulation = max(1, round(config.train.batch_size / (ranks * micro)))
    batch = ranks * micro * accumulation
    compute_s = accumulation * (micro_s + 2 * synced_norms * all_reduce_seconds(0, links, ranks, ranks_per_node))
    step_s = compute_s + all_reduce_seconds(size, links, ranks, ranks_per_node)
    images_s = batch / step_s
    # A validation image costs a forward pass, about a third of a step, and only now and then.
    validation_s = config.eval_timesteps / config.student.num_timesteps * val_images * micro_s / micro / 3 / ranks
    epoch_s = images / images_s + validation_s / config.eval.every
    ideal = ranks * micro / micro_s
    return Plan(ranks, nodes, batch, step_s, images_s, images_s / ideal, epoch_s, epoch_s * config.train.epochs)


def all_reduce_seconds(size: int, links: Links, ranks: int, ranks_per_node: int) -> float:
    """Of a ring within each node and one across them, for `size` bytes; 0 for one rank."""
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, ranks_per_node), math.ceil(ranks / ranks_per_node)
    seconds = 2 * (inside - 1) / inside * size / links.gpu_bytes_s + 2 * (nodes - 1) / nodes * size / links.node_bytes_s
    return seconds + 2 * math.ceil(math.log2(ranks)) * links.latency_s


def gradient_bytes(config: Config) -> int:
    """What a step's all-reduce carries: the student's gradients in fp32."""
    return 4 * sum(p.numel() for p in create_student(config.student).parameters())


def count_images(config: Config) -> tuple[int, int]:
    """Of data.train and data.val where they are here as betons, else of ImageNet. Raises `Mistake` for bad files."""
    found = []
    for key, path, imagenet in (
        ("data.train", config.data.train, 1_281_167),
        ("data.val", config.data.val, 50_000),
    ):
        here = config.data.format == "ffcv" and path is not None and Path(path).exists()
        found.append(check_beton(path, key).num_samples if here and path else imagenet)
    return found[0], found[1]


def synced_norms(config: Config) -> int:
    """How many batch norms are synchronised between ranks."""
    if not config.train.sync_bn:
        return 0
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in create_student(config.student).modules())


def main(argv: list[str]) -> int:
    """Plan; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: show(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="recipe=NAME, nodes=N,... and overrides")
    parser.add_argument("--step-ms", type=float, help="a micro-batch on one GPU: step, teacher and losses")
    parser.add_argument("--gpus", default=GPUS, help="numbers of GPUs, separated by commas")
    parser.add_argument("--gpus-per-node", type=int, help="as in the recipe unless given")
    parser.add_argument(
        "--gpu-gb-s", type=float, help=f"all-reduce bandwidth within a node, GB/s; {GPU_GB_S:.0f} unless measured"
    )
    parser.add_argument("--node-gb-s", type=float, default=25.0, help="all-reduce bandwidth between nodes, GB/s a node")
    parser.add_argument("--latency-us", type=float, default=5.0, help="of one message")
    parser.add_argument("--images", type=int, help="of an epoch; those of data.train if it is here, else ImageNet's")
    parser.add_argument(
        "--loader-core-ms", type=float, default=0.81, help="an image, as tools/bench/loader.py finds it"
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="of a node; this machine's unless given")
    parser.add_argument("--check", action="store_true", help="also run the recipe's ranks here together, and compare")
    options = parser.parse_intermixed_args(argv)
    recipes = [text.removeprefix("recipe=") for text in options.settings if text.startswith("recipe=")]
    nodes = [text.removeprefix("nodes=") for text in options.settings if text.startswith("nodes=")]
    options.overrides = [text for text in options.settings if not text.startswith(("recipe=", "nodes="))]
    found = Mistakes()
    found.require(len(recipes) == 1, "which recipe? give recipe=NAME")
    with found.gathered():
        options.nodes = numbers("nodes=", nodes[-1]) if nodes else None
    with found.gathered():
        options.gpus = numbers("--gpus ", options.gpus)
    for name in ("step_ms", "gpus_per_node", "gpu_gb_s", "node_gb_s", "loader_core_ms", "images", "cores"):
        value = getattr(options, name)
        fits = value is None or 0 < value < math.inf  # nor NaN
        found.require(fits, f"--{name.replace('_', '-')} {value}: must be positive and finite")
    fits = 0 <= options.latency_us < math.inf
    found.require(fits, f"--latency-us {options.latency_us}: must be finite, and not negative")
    found.tell()
    options.recipe = recipes[0]
    return options


def numbers(key: str, text: str) -> list[int]:
    """Whole numbers from 1, separated by commas. Raises `Mistake`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise Mistake(f"{key}{text}: give numbers separated by commas") from error
    if min(found) < 1:
        raise Mistake(f"{key}{text}: must be at least 1")
    return found


def show(options: argparse.Namespace) -> None:
    """Measure what is not given, and print the plan."""
    config = load_config(options.recipe, options.overrides)
    per_node = options.gpus_per_node or config.launcher.ranks_per_node
    links = Links(1e9 * (options.gpu_gb_s or GPU_GB_S), 1e9 * options.node_gb_s, 1e-6 * options.latency_us)
    images, val_images = count_images(config)
    images, norms = options.images or images, synced_norms(config)
    micro_s, size = options.step_ms and options.step_ms / 1000, gradient_bytes(config)
    if micro_s is None or options.check:
        gpu_s, gpu_links = measure(config, links, size, check_them=options.check)
        micro_s = micro_s or gpu_s
        if options.gpu_gb_s is None:
            links = gpu_links
    print(
        f"{options.recipe}: {config.student.model}, T = {config.student.num_timesteps}, a micro-batch of"
        f" {config.train.micro_batch or config.micro_batch} images in {1000 * micro_s:.0f} ms;"
        f" gradients of {size / 1e6:.0f} MB; within a node {links.gpu_bytes_s / 1e9:.3g} GB/s,"
        f" between nodes {links.node_bytes_s / 1e9:.3g} GB/s, {1e6 * links.latency_s:.0f} µs;"
        f" {images:,} images an epoch, {options.cores} cores a node,"
        f" {options.loader_core_ms} core ms to load one\n"
    )
    heads = (
        "GPUs",
        "nodes",
        "global batch",
        "images/s",
        "efficiency",
        "an epoch",
        "the run",
        "GPU-hours",
        "loader's load",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for ranks in [n * per_node for n in options.nodes] if options.nodes else options.gpus:
        plan = predict(
            config, size, links, micro_s,
            ranks=ranks, ranks_per_node=per_node, images=images, val_images=val_images, synced_norms=norms,
        )  # fmt: skip
        load = plan.images_s / plan.nodes * options.loader_core_ms / 1000 / options.cores
        cells = [
            ranks, plan.nodes, plan.batch, f"{plan.images_s:,.0f}", f"{plan.efficiency:.1%}",
            format_seconds(plan.epoch_s), format_seconds(plan.run_s), f"{ranks * plan.run_s / 3600:,.1f}",
            f"{load:.0%}" + (" (too slow)" if load > 1 else ""),
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


def measure(config: Config, links: Links, size: int, *, check_them: bool) -> tuple[float, Links]:
    """A micro-batch's seconds on this machine with a node's ranks, and the links with what they measure here.

    Raises `Mistake` where the recipe wants GPUs and none is here.
    """
    here = config.launcher.ranks_per_node
    if config.launcher.gpus_per_node:
        here = min(here, torch.cuda.device_count())
        if here == 0:
            raise Mistake("no GPU here to measure on: give --step-ms, or launcher.gpus_per_node=0 for a plan of CPUs")
    say(f"measuring {here} rank(s) on this machine")
    micro_s = max(on_ranks(here, _time_alone, config))
    if here > 1:
        bytes_s, latency_s = on_ranks(here, _time_all_reduce, config)[0]
        links = Links(bytes_s, links.node_bytes_s, max(latency_s, links.latency_s))
        if check_them:
            check(config, size, Links(bytes_s, links.node_bytes_s, latency_s), micro_s, here)
    return micro_s, links


def check(config: Config, size: int, links: Links, micro_s: float, ranks: int) -> None:
    """Print what the model says of this machine's ranks, and what they really do."""
    together_s = max(on_ranks(ranks, _time_together, config))
    norms_s = 2 * synced_norms(config) * all_reduce_seconds(0, links, ranks, ranks)
    predicted_s = micro_s + norms_s + all_reduce_seconds(size, links, ranks, ranks)
    say(
        f"{ranks} rank(s) here: predicted {1000 * predicted_s:.1f} ms a step, measured {1000 * together_s:.1f} ms"
        f" ({predicted_s / together_s - 1:+.1%}); alone {1000 * micro_s:.1f} ms, efficiency {micro_s / together_s:.1%}"
    )


def on_ranks(ranks: int, task: Callable[..., Any], config: Config) -> list[Any]:
    """What `task(rank, ranks, config, port, meet)` returns in as many processes at a time."""
    context = mp.get_context("spawn")
    queue, meet, port = context.SimpleQueue(), context.Barrier(ranks), distributed.free_port()
    arguments = (task, ranks, config, port, meet, queue)
    mp.spawn(_call, arguments, ranks)  # type: ignore[attr-defined,no-untyped-call]
    return [answer for _, answer in sorted(queue.get() for _ in range(ranks))]


def _call(rank: int, task: Callable[..., Any], ranks: int, config: Config, port: int, meet: Any, queue: Any) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    if _device(config) == "cuda":
        torch.cuda.set_device(rank)
    queue.put((rank, task(rank, ranks, config, port, meet)))
    dist.destroy_process_group()


def _time_alone(rank: int, ranks: int, config: Config, port: int, meet: Any) -> float:
    distributed.start_here(0, 1, distributed.free_port(), torch.device(_device(config)))
    return _time_steps(config, meet)


def _time_together(rank: int, ranks: int, config: Config, port: int, meet: Any) -> float:
    distributed.start_here(rank, ranks, port, torch.device(_device(config)))
    return _time_steps(config, meet)


def _time_steps(config: Config, meet: Any) -> float:
    """Median seconds of an optimiser step of one micro-batch, all ranks at a time."""
    device = torch.device(_device(config))
    config.train.batch_size = config.micro_batch * dist.get_world_size()
    config.launcher.nodes, config.launcher.tasks_per_node = 1, dist.get_world_size()
    step = build_untrained(config, device, compiled=config.train.compile is True or device.type == "cuda")
    size, channels, micro = config.data.image_size, config.student.in_chans, config.micro_batch
    x_BCHW = torch.randn(micro, channels, size, size, device=device).to(memory_format=torch.channels_last)
    labels_B = torch.randint(config.student.num_classes, (micro,), device=device)
    times = []
    for k in range(40):
        if k in (0, 5):
            meet.wait()
        started = time.perf_counter()
        step([(x_BCHW, labels_B)] * config.accumulation)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:])


def _time_all_reduce(rank: int, ranks: int, config: Config, port: int, meet: Any) -> tuple[float, float]:
    """Bytes a second of the gradients' all-reduce, with the copies into and out of one buffer; a message's seconds."""
    distributed.start_here(rank, ranks, port, torch.device(_device(config)))
    device = torch.device(_device(config))
    gradients = [torch.zeros_like(p, device=device) for p in create_student(config.student).parameters()]

    def reduce(tensors: list[torch.Tensor]) -> float:
        meet.wait()
        started = time.perf_counter()
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    small = [torch.zeros(1, device=device)]
    latency_s = statistics.median([reduce(small) for _ in range(30)][5:]) / (2 * math.ceil(math.log2(ranks)))
    seconds = statistics.median([reduce(gradients) for _ in range(15)][5:])
    size = 4 * sum(g.numel() for g in gradients)
    left_s = max(seconds - latency_s * 2 * math.ceil(math.log2(ranks)), 1e-9)
    return 2 * (ranks - 1) / ranks * size / left_s, latency_s


def _device(config: Config) -> str:
    return "cuda" if config.launcher.gpus_per_node and torch.cuda.is_available() else "cpu"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
