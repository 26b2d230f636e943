"""What the code that torch.compile generates for an H100 reads, writes and keeps: no GPU needed, nothing is timed.

    python tools/bench/generated_code.py --network sew_resnet18 sew_resnet34 [--markdown FILE]

The forward and backward pass of a training step are compiled as in a run, up to the Triton code (`fake_cuda.py`):
`default` with Inductor's own settings, `run` by `tdkd_dist.compilation.compile_training`. The table counts of the fused
kernels, which are all but convolutions and matrix products,

kernels         how many a pass starts
neuron kernels  how many of them compute spikes (forward) or surrogate gradients (backward)
MiB             what they read and write at least, each tensor once a kernel, by Inductor's own count
kept            what the forward pass keeps for the backward pass beside inputs and weights, by type
other           of it, what neither a convolution nor a norm needs: no input or output of a convolution or matrix
                product, no index of a pool, and larger than a norm's statistics
ratio           MiB of both passes to those of the plain network of the same depth with Inductor's own settings

A plain network (timm's `resnet18`) takes T*B images, a student B of them.
"""

import argparse
import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_cuda
import timm
import torch
from arguments import check_counts, check_outputs
from torch import fx, nn

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import Mistake, require
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.students import spiking_names
from tdkd_dist.training.compilation import compile_training

MIB = 2**20
VARIANTS = ("default", "run")
SMALL = 1 << 16
"""Bytes up to which a kept tensor counts as a norm's statistics."""
aten = torch.ops.aten
VIEWS = {
    aten.view.default,
    aten.permute.default,
    aten._unsafe_view.default,
    aten.t.default,
    aten.reshape.default,
    aten.transpose.int,
}
CAST = torch.ops.prims.convert_element_type.default
PRODUCTS = {aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default}


@dataclass(frozen=True)
class Setting:
    """What is compiled."""

    network: str
    variant: str = "run"
    batch: int = 64
    size: int = 224
    timesteps: int = 4
    precision: str = "bf16"
    activation_budget: float = 1.0
    first_statistics: bool = False


@dataclass(frozen=True)
class Pass:
    """The fused kernels of a forward or a backward pass."""

    kernels: int
    neuron_kernels: int
    moved: int
    """Bytes."""


@dataclass(frozen=True)
class Count:
    """What was generated for a setting."""

    setting: Setting
    neuron_layers: int
    forward: Pass
    backward: Pass
    kept: dict[str, int]
    """Bytes by type."""
    other: dict[str, int]
    """Of them, bytes of each tensor that neither convolutions nor norms need, by its name in the graph."""

    @property
    def moved(self) -> int:
        """Bytes that the fused kernels of both passes move."""
        return self.forward.moved + self.backward.moved


def build(setting: Setting) -> nn.Module:
    """The network of this name."""
    arguments: dict[str, Any] = {}
    if setting.network in spiking_names():
        arguments = {"num_timesteps": setting.timesteps, "first_statistics": setting.first_statistics}
    net: nn.Module = timm.create_model(setting.network, num_classes=1000, **arguments)
    return net


def count(setting: Setting, net: nn.Module | None = None, write_to: Path | None = None) -> Count:
    """Compile `net` (None: the one that `setting` names) and count; `write_to`: a folder for the generated code.

    Stubs this process for good: see `fake_cuda`, also for what is raised.
    """
    torch._dynamo.reset()
    fake_cuda.generated.clear()
    fake_cuda.install()
    net = (build(setting) if net is None else net).train().to(memory_format=torch.channels_last)
    neuron_layers = sum(isinstance(module, SpikingNeuron) for module in net.modules())
    n = setting.batch * (1 if neuron_layers else setting.timesteps)
    images = torch.empty(n, 3, setting.size, setting.size).to(memory_format=torch.channels_last)
    if setting.variant == "run":
        compile_training(net, setting.activation_budget, fake_cuda.CUDA)
    else:
        net.compile()
    bf16 = torch.autocast("cpu", torch.bfloat16) if setting.precision == "bf16" else nullcontext()
    with bf16:
        logits = net(images)
    logits.float().sum().backward()
    (pair,) = fake_cuda.generated
    assert pair.backward is not None
    if write_to is not None:
        write_to.mkdir(parents=True, exist_ok=True)
        for name, part in (("forward", pair.forward), ("backward", pair.backward)):
            (write_to / f"{setting.network}.{setting.variant}.{name}.py").write_text(part.code)
    kept, other = _kept(pair)
    return Count(
        setting,
        neuron_layers,
        _passed(pair.forward, aten.ge.Scalar),
        _passed(pair.backward, aten.sigmoid.default),
        kept,
        other,
    )


def _passed(generated: fake_cuda.Generated, marker: object) -> Pass:
    """A pass's fused kernels, and how many of them hold the operation `marker`."""
    kernels = generated.kernels
    return Pass(len(kernels), sum(marker in k.operations for k in kernels), sum(k.moved for k in kernels))


def _kept(pair: fake_cuda.Pair) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes kept by type, and of the tensors that neither a convolution nor a norm needs."""
    kept: Counter[str] = Counter()
    other = {}
    outputs = pair.forward.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    for node in dict.fromkeys(outputs[pair.num_results :]):
        if not isinstance(node, fx.Node) or node.op == "placeholder":
            continue
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        size = value.numel() * value.element_size()
        kept[str(value.dtype).removeprefix("torch.")] += size
        if size > SMALL and value.is_floating_point() and not _needed(node):
            other[node.name] = size
    return dict(kept), other


def _needed(node: fx.Node) -> bool:
    """Whether it is input or output of a convolution or matrix product, or a view or a cast of a weight or an image."""
    base = node
    while base.target in VIEWS:
        (base,) = base.args[:1]  # type: ignore[assignment]
    cast = base.args[0] if base.target is CAST else base
    assert isinstance(cast, fx.Node)
    return cast.op == "placeholder" or bool(PRODUCTS & {base.target, *(user.target for user in _users(base))})


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """What reads this node or a view of it."""
    for user in node.users:
        yield user
        if user.target in VIEWS:
            yield from _users(user)


def plain(network: str) -> str:
    """The plain network of the same depth."""
    return "resnet" + re.sub(r"\D", "", network)


def main(argv: list[str]) -> int:
    """Count and tell; the exit status: 0 done, 2 a user's mistake or another torch, told in one line."""
    return run_tool(lambda: compare(parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--network", nargs="+", default=["sew_resnet18"], help="students, or timm's ResNets")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64, help="images a student sees (default: 64)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--activation-budget", type=float, default=1.0, help="train.activation_budget")
    parser.add_argument("--first-statistics", action="store_true", help="student.first_statistics")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--code", type=Path, help="write the generated code into this folder")
    options = parser.parse_args(argv)
    for name in options.network:
        require(timm.is_model(name), f"--network {name}: no student, and timm has no such network")
        require(timm.is_model(plain(name)), f"--network {name}: timm has no {plain(name)} to compare it with")
    check_counts(options, "batch", "size", "timesteps")
    budget = options.activation_budget
    require(0 < budget <= 1, f"--activation-budget {budget}: must be above 0 and at most 1")
    check_outputs(options, "markdown")
    require(options.code is None or not options.code.is_file(), f"--code {options.code}: a file; name a folder")
    return options


def compare(options: argparse.Namespace) -> None:
    """Count and print the table. Raises `Mistake` where torch is not the one that the stubs are made for."""
    torch.set_num_threads(1)
    networks = list(dict.fromkeys([*options.network, *map(plain, options.network)]))
    counts = []
    try:
        for network in networks:
            for variant in options.variant if network in options.network else ["default"]:
                setting = Setting(
                    network,
                    variant,
                    options.batch,
                    options.size,
                    options.timesteps,
                    options.precision,
                    options.activation_budget,
                    options.first_statistics,
                )
                counts.append(count(setting, write_to=options.code))
                print(f"{network}, {variant}: {counts[-1].moved / MIB:,.0f} MiB", file=sys.stderr, flush=True)
    except fake_cuda.StubError as error:
        raise Mistake(str(error)) from error
    text = as_markdown(counts)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text + "\n")


def as_markdown(counts: list[Count]) -> str:
    """The table."""
    s = counts[0].setting
    limit = {c.setting.network: c.moved for c in counts if c.setting.variant == "default"}
    heads = ["network", "settings", "neuron layers", "kernels, forward / backward", "neuron kernels"]
    heads += ["MiB forward", "backward", "both", "ratio", "kept, MiB", "other"]
    lines = [
        f"{s.batch} images of {s.size} px, T = {s.timesteps}, {s.precision}; sm_90, torch {torch.__version__}, "
        f"triton {importlib.metadata.version('triton')}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for c in counts:
        kept = ", ".join(f"{short(t)} {n / MIB:,.0f}" for t, n in sorted(c.kept.items()) if n >= MIB / 2)
        whole = limit.get(plain(c.setting.network))
        cells = [
            c.setting.network,
            c.setting.variant,
            c.neuron_layers,
            f"{c.forward.kernels} / {c.backward.kernels}",
            f"{c.forward.neuron_kernels} / {c.backward.neuron_kernels}",
            f"{c.forward.moved / MIB:,.0f}",
            f"{c.backward.moved / MIB:,.0f}",
            f"{c.moved / MIB:,.0f}",
            "-" if whole is None else f"{c.moved / whole:.3f}",
            kept,
            f"{sum(c.other.values()) / MIB:,.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def short(dtype: str) -> str:
    """torch's name of a type, as the field says it."""
    return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}.get(dtype, dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
