"""NIR (Pedersen et al. 2024): the graph of neurons and weights that simulators and neuromorphic chips read.

NIR integrates tau dv/dt = v_leak - v + R I, fires where v > v_threshold, and then sets v to v_reset. By Euler's method
with time step dt that is our neuron with a hard reset, for tau = dt / (1 - decay), R = 1 / (1 - decay), v_leak =
v_reset and the number before our threshold, at which ours fires already. What reads several nodes reads their sum.
What NIR has no node for is made of neurons without memory, tau = dt and R = 1: the largest of binary spikes is their
sum over the window > 0.5, a AND b is a + b > 1.5, a AND NOT b is a - b > 0.5.

Shapes: T timesteps, B images, C channels, H, W pixels, K classes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tdkd_dist.export.plain import example
from tdkd_dist.files import whole
from tdkd_dist.mistakes import Mistakes
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.students.base import SpikingNet
from tdkd_dist.students.resnet import SpikingResNetBase, TemporalDropPath

DT = 1e-4
"""The time step in seconds that readers take unless told otherwise."""
Terms = tuple[str, ...]
"""Nodes, of which the sum is read."""
LEAVES = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.Identity, SpikingNeuron, TemporalDropPath)


class _Not(NamedTuple):
    """1 - x of binary x."""

    terms: Terms


def refuse(model: SpikingNet, host_stem: bool = False) -> None:
    """Raise `Mistake`, naming what could be changed, for what NIR cannot say of this student."""
    mistakes = Mistakes()
    soft = any(isinstance(m, SpikingNeuron) and m.config.v_reset is None for m in model.modules())
    mistakes.require(
        not soft, "NIR has no neuron with a soft reset: train with student.neuron.v_reset=0, or export onnx or program"
    )
    charged = any(isinstance(m, SpikingNeuron) and m.initial(torch.zeros(1, 1)) is not None for m in model.modules())
    mistakes.require(
        not charged, "NIR has no membrane at the start: train without student.neuron.v_init, or export onnx or program"
    )
    mistakes.require(
        not (isinstance(model, SpikingNet) and model.differs_at_first),
        "NIR has no timestep that differs: train without student.neuron.first_scale and student.first_statistics, or"
        " export onnx or program",
    )
    ours = isinstance(model, SpikingResNetBase)
    mistakes.require(ours, f"{type(model).__name__}: only the package's own students are known in NIR")
    real = ours and model.sn1 is None and isinstance(model.maxpool, nn.MaxPool2d) and not host_stem
    mistakes.require(
        not real,
        "NIR has no maximum of real values, which this student's stem takes:"
        " leave the stem to the host (--host-stem), or train a student with a neuron before it",
    )
    mistakes.tell()


def write(model: SpikingNet, path: Path, *, dt: float = DT, host_stem: bool = False) -> None:
    """Write the student, its batch norms folded, as a NIR graph of one timestep: image `[C, H, W]` to logits `[K]`.

    `host_stem`: the graph starts at what `SpikingNet.prepare` gives. Raises `Mistake` as `refuse`.
    """
    import nir

    graph = build(model, dt=dt, host_stem=host_stem)
    with whole(path) as partial:
        nir.write(partial, graph)


@torch.no_grad()
def build(model: SpikingNet, *, dt: float = DT, host_stem: bool = False) -> Any:
    """The `nir.NIRGraph` of a student, see `write`."""
    import nir

    refuse(model, host_stem)
    assert isinstance(model, SpikingResNetBase)
    graph = _Graph(model, dt)
    image = example(model, 1)
    x = graph.add("input", nir.Input({"input": np.array((model.prepare(image) if host_stem else image).shape[1:])}))
    x = x if host_stem else graph.module("conv1", x)
    if model.sn1 is not None:
        x = graph.module("sn1", x)
        x = x if isinstance(model.maxpool, nn.Identity) else graph.pool_spikes(x)
    for number, stage in enumerate(model.stages, start=1):
        for name, block in stage.named_children():
            x = graph.block(block, f"layer{number}.{name}.", x)
    x = x if model.sn_head is None else graph.module("sn_head", x)
    x = graph.mean(x)
    for name in ("fc1", "sn_fc1", "fc"):
        x = graph.module(name, x) if isinstance(getattr(model, name, None), nn.Module) else x
    graph.add("output", nir.Output({"output": np.array([model.num_classes])}), x)
    return nir.NIRGraph(graph.nodes, graph.edges, metadata={"dt": dt, "num_timesteps": model.num_timesteps})


class _Graph:
    """Nodes and edges as they are gathered, and the shape of what each layer reads and gives."""

    def __init__(self, model: SpikingResNetBase, dt: float) -> None:
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self._dt = dt
        self._modules = dict(model.named_modules())
        self._dtype = cast(Any, example(model, 1)).cpu().numpy().dtype
        self._shapes = _shapes(model)
        self._last = next(shape for shape in reversed(self._shapes.values()) if len(shape.given) == 3).given

    def add(self, name: str, node: Any, x: Terms = ()) -> Terms:
        """A node that reads the sum of `x`."""
        assert name not in self.nodes
        self.nodes[name] = node
        self.edges += [(source, name) for source in x]
        return (name,)

    def module(self, name: str, x: Terms) -> Terms:
        """A layer's node."""
        import nir

        module, shape = self._modules[name], self._shapes.get(name)
        if isinstance(module, nn.Identity | TemporalDropPath):
            return x
        assert shape is not None
        if isinstance(module, SpikingNeuron):
            return self.add(name, self._neuron(module, shape.given), x)
        if isinstance(module, nn.Linear):
            return self.add(name, nir.Affine(self._array(module.weight), self._array(module.bias)), x)
        assert isinstance(module, nn.Conv2d)
        bias = torch.zeros(module.out_channels) if module.bias is None else module.bias
        settings = (module.stride, module.padding, module.dilation, module.groups)
        return self.add(name, nir.Conv2d(shape.read[1:], self._array(module.weight), *settings, self._array(bias)), x)

    def block(self, block: nn.Module, prefix: str, x: Terms) -> Terms:
        """A residual block, by what its `forward` does."""
        values: dict[fx.Node, Any] = {}
        for node in _Tracer().trace(block).nodes:
            values[node] = self._node(node, prefix, x, [values.get(a, a) for a in node.args])
        return cast(Terms, values[node])

    def _node(self, node: fx.Node, prefix: str, x: Terms, args: list[Any]) -> Any:
        if node.op == "placeholder":
            return x
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self.module(prefix + str(node.target), args[0])
        operation, name = getattr(node.target, "__name__", ""), prefix + node.name
        a, b = args
        if operation == "add":
            return a + b
        if operation == "sub" and a == 1:
            return _Not(b)
        assert operation == "mul", node.target
        if isinstance(b, _Not):
            b, threshold = self._minus(f"{name}.minus", b.terms), 0.5
        else:
            threshold = 1.5
        return self.add(name, self._gate(self._given(a), threshold), a + b)

    def _minus(self, name: str, x: Terms) -> Terms:
        import nir

        return self.add(name, nir.Scale(-np.ones(self._given(x), self._dtype)), x)

    def pool_spikes(self, x: Terms) -> Terms:
        """The stem's maximum over a window of spikes."""
        import nir

        pool, shape = self._modules["maxpool"], self._shapes["maxpool"]
        assert isinstance(pool, nn.MaxPool2d)
        window, stride, padding = (np.array([n, n]) for n in (pool.kernel_size, pool.stride, pool.padding))
        summed = self.add("maxpool.sum", nir.SumPool2d(window, stride, padding), x)
        return self.add("maxpool", self._gate(shape.given, 0.5), summed)

    def mean(self, x: Terms) -> Terms:
        """The spatial mean, flat."""
        import nir

        window = np.array(self._last[1:])
        pooled = self.add("pool", nir.AvgPool2d(window, window, np.array([0, 0])), x)
        return self.add("flatten", nir.Flatten({"input": np.array([self._last[0], 1, 1])}, start_dim=0), pooled)

    def _neuron(self, neuron: SpikingNeuron, shape: tuple[int, ...]) -> Any:
        import nir

        config = neuron.config
        assert config.v_reset is not None
        v_r, threshold = (self._full(shape, v) for v in (config.v_reset, config.threshold))
        below = np.nextafter(threshold, -np.inf, dtype=self._dtype)
        forgotten = 1 - float(neuron.decay)
        if forgotten == 0:
            return nir.IF(self._full(shape, 1 / self._dt), below, v_r)
        return nir.LIF(self._full(shape, self._dt / forgotten), self._full(shape, 1 / forgotten), v_r, below, v_r)

    def _gate(self, shape: tuple[int, ...], threshold: float) -> Any:
        import nir

        values = (self._full(shape, value) for value in (self._dt, 1, 0, threshold, 0))
        return nir.LIF(*values)

    def _given(self, x: Terms) -> tuple[int, ...]:
        """The shape of a node's binary output."""
        (name,) = x  # a sum of spikes may exceed 1
        return tuple(int(n) for n in self.nodes[name].output_type["output"])

    def _full(self, shape: tuple[int, ...], value: float) -> NDArray[Any]:
        return np.full(shape, value, self._dtype)

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        return tensor.detach().cpu().numpy().astype(self._dtype)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES)


class _Shape(NamedTuple):
    read: tuple[int, ...]
    given: tuple[int, ...]


def _shapes(model: SpikingNet) -> dict[str, _Shape]:
    """What every layer reads and gives for one image in one timestep, in the order of their calls."""
    found: dict[str, _Shape] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        found[name] = _Shape(tuple(x.shape[1:]), tuple(y.shape[1:]))

    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: note(name, x[0], y))
        for name, module in model.named_modules()
        if isinstance(module, LEAVES)
    ]
    try:
        model.step(example(model, 1), frame=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def after_stem(model: SpikingNet, x: Tensor) -> Tensor:
    """What the host computes of images `[B, C, H, W]`, or of each frame `[T, B, C, H, W]`, for a graph without stem."""
    return model.prepare(x) if x.ndim == 4 else torch.stack([model.prepare(frame) for frame in x])


@torch.no_grad()
def read_back(path: Path, batches: Iterable[Tensor], num_timesteps: int) -> Tensor:
    """The logits `[T, sum of B, K]` of a written graph, run by NIRTorch in float64, for batches of what it reads;
    of frames `[T, B, C, H, W]`, one a timestep."""
    run = open_graph(path)
    logits = []
    for x in batches:
        state, steps = None, []
        for t in range(num_timesteps):
            answer, state = run((x if x.ndim == 4 else x[t]).double(), state)
            steps.append(answer)
        logits.append(torch.stack(steps))
    return torch.cat(logits, dim=1)


def open_graph(path: Path) -> nn.Module:
    """A written graph as NIRTorch runs it in float64: `(x [B, ...], state)` to `(y, state)`.

    NIRTorch connects the nodes and runs the convolutions and means; it wants to be told what neurons do, and what it
    lacks or does otherwise (1.0.8 and 2.6: a bias that is not taken over, padding of sums, flattening with the batch).
    """
    import nir
    import nirtorch

    graph = nir.read(path)
    dt = float(graph.metadata["dt"])
    known = {
        nir.Affine: _affine,
        nir.Flatten: lambda _: nn.Flatten(1),
        nir.Scale: lambda node: _Times(torch.from_numpy(node.scale)),
        nir.SumPool2d: lambda node: nn.AvgPool2d(
            tuple(node.kernel_size), tuple(node.stride), tuple(node.padding), divisor_override=1
        ),
        nir.LIF: lambda node: _Euler(node, dt),
        nir.IF: lambda node: _Euler(node, dt),
    }
    module: nn.Module = nirtorch.nir_to_torch(graph, known, dtype=torch.float64)
    return module


def _affine(node: Any) -> nn.Linear:
    layer = nn.Linear(node.weight.shape[1], node.weight.shape[0])
    layer.weight.data, layer.bias.data = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    return layer


class _Times(nn.Module):
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Euler(nn.Module):
    """An IF or LIF node by NIR's equations, integrated by Euler's method, at v_reset at first."""

    r: Tensor
    v_threshold: Tensor
    v_reset: Tensor
    tau: Tensor
    v_leak: Tensor

    def __init__(self, node: Any, dt: float) -> None:
        super().__init__()
        self._leaks = hasattr(node, "tau")
        for name in ("r", "v_threshold", "v_reset", *(("tau", "v_leak") if self._leaks else ())):
            self.register_buffer(name, torch.from_numpy(getattr(node, name)))
        self._dt = dt

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = self.v_reset.expand_as(x) if state is None else state
        dv = self._dt * self.r * x
        if self._leaks:
            dv = self._dt / self.tau * (self.v_leak - v + self.r * x)
        v = v + dv
        spikes = v > self.v_threshold
        return spikes.to(x.dtype), torch.where(spikes, self.v_reset, v)
