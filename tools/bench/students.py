"""Time and peak memory of a training step of every student, beside spikingjelly's where it has the network.

    python tools/bench/students.py                       # this machine: T=4, 4 images of 96 px on a CPU
    python tools/bench/students.py --device cuda --batch 32 --size 224 --compile

Each network runs in a process of its own, since peak memory is the process's. A step is forward, mean of the logits
over time, cross-entropy, backward; the optimiser is left out, as it is the same for both. A table in Markdown.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
from arguments import check_counts, check_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import require
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import spiking_names

PEERS = ("sew_resnet18", "sew_resnet34", "sew_resnet50", "sew_resnet101", "sew_resnet152", "ms_resnet18", "ms_resnet34")
CLASSES = 1000


def build(name: str, peer: bool, timesteps: int) -> Callable[[Tensor], Tensor]:
    """A network from images `[B, 3, H, W]` to logits `[B, K]`, averaged over time; LIF, decay 1/2, soft reset."""
    if not peer:
        net = timm.create_model(name, num_classes=CLASSES, num_timesteps=timesteps, neuron=NeuronConfig())
        return _Mean(net.train())
    from spikingjelly.activation_based import functional, neuron  # type: ignore[import-untyped]
    from spikingjelly.activation_based.model import ms_resnet, sew_resnet  # type: ignore[import-untyped]

    lif = {"spiking_neuron": neuron.LIFNode, "v_reset": None, "decay_input": False}
    if name.startswith("ms"):
        return _Reset(getattr(ms_resnet, name)(T=timesteps, num_classes=CLASSES, **lif).train(), functional.reset_net)
    net = getattr(sew_resnet, name)(num_classes=CLASSES, cnf="ADD", **lif).train()
    functional.set_step_mode(net, "m")
    return _Reset(_Repeat(net, timesteps), functional.reset_net)


class _Mean(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).mean(0)
        return logits


class _Repeat(_Mean):
    def __init__(self, net: nn.Module, timesteps: int) -> None:
        super().__init__(net)
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(0).repeat(self.timesteps, 1, 1, 1, 1))


class _Reset(nn.Module):
    def __init__(self, net: nn.Module, reset: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.net, self.reset = net, reset

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.net)
        logits: Tensor = self.net(x)
        return logits


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and peak MiB above what the process held before the first step."""
    torch.manual_seed(0)
    device, cuda = torch.device(options.device), options.device == "cuda"
    layout = torch.contiguous_format if options.peer else torch.channels_last
    net = build(options.only, options.peer, options.timesteps)
    assert isinstance(net, nn.Module)
    net.to(device).to(memory_format=layout)
    step_net = torch.compile(net) if options.compile and not options.peer else net
    x = torch.randn(options.batch, 3, options.size, options.size, device=device).to(memory_format=layout)
    labels = torch.randint(CLASSES, (options.batch,), device=device)
    before = torch.cuda.memory_allocated() if cuda else _peak_rss()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.warmup + options.steps):
        net.zero_grad()
        start = time.perf_counter()
        cross_entropy(step_net(x), labels).backward()  # type: ignore[no-untyped-call]
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_rss()
    return {"seconds": statistics.median(seconds[options.warmup :]), "mib": (peak - before) / 2**20}


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: list[str]) -> int:
    """Measure and tell; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(parse(argv), argv))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help="students to measure; all of them unless given")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile ours (spikingjelly runs as it is)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(argv)
    for name in options.names:
        require(name in spiking_names(), f"{name}: no such student; choose from {', '.join(spiking_names())}")
    check_counts(options, "timesteps", "batch", "size", "steps")
    require(options.warmup >= 0, f"--warmup {options.warmup}: must be at least 0")
    check_device(options.device)
    return options


def compare(options: argparse.Namespace, argv: list[str]) -> None:
    """Print the table, or with `--only` one network's figures as JSON. Raises `SystemExit` if a network fails."""
    if options.only:
        print(json.dumps(measure(options)))
        return
    images = f"{options.batch} images of {options.size} px"
    print(f"T={options.timesteps}, {images}, {options.device}, torch {torch.__version__}")
    print("\n| student | step, s | spikingjelly, s | peak, MiB | spikingjelly, MiB |\n|---|---|---|---|---|")
    for name in options.names or spiking_names():
        ours = _run(name, argv)
        peer = _run(name, argv, "--peer") if name in PEERS else None
        theirs = (f"{peer['seconds']:.2f}", f"{peer['mib']:.0f}") if peer else ("-", "-")
        print(f"| {name} | {ours['seconds']:.2f} | {theirs[0]} | {ours['mib']:.0f} | {theirs[1]} |", flush=True)


def _run(name: str, argv: list[str], *extra: str) -> dict[str, float]:
    settings = [text for text in argv if text not in spiking_names()]
    command = [sys.executable, __file__, *settings, "--only", name, *extra]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise SystemExit(f"{' '.join([name, *extra])}: {said[-1] if said else f'exit status {done.returncode}'}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
