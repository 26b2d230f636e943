"""Has torch.compile generate the code of an H100 on a machine without a GPU, and keeps the code instead of running it.

A network is compiled as it always is: Dynamo, AOTAutograd and Inductor, with whatever options the caller gives
`torch.compile`. It is traced on the processor, since autograd refuses fake CUDA tensors where there is no driver; the
forward and the backward graph that come out of that move to `cuda:0`, and from there on all that Inductor decides, it
decides for a GPU. What is left out is compiling and calling the code: the "compiled" functions return uninitialised
tensors, just enough for autograd to ask for the backward graph. The network's own code must not ask for the device.

The stubs are for good: use a process of its own. They replace private parts of torch, all named in `install`.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import detect_fake_mode

WRITTEN_FOR = "2.15"
"""The torch whose private parts `install` replaces."""
PROPERTIES = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "total_memory": 80 * 2**30,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "L2_cache_size": 50 * 2**20,
    "gcnArchName": "",
}
CUDA = torch.device("cuda:0")


class StubError(RuntimeError):
    """A stub no longer fits this torch."""


@dataclass(frozen=True)
class Kernel:
    """A fused kernel: all but convolutions, matrix products and what else comes from a library."""

    moved: int
    """Bytes that it reads and writes at least, each tensor once: Inductor's own count."""
    operations: frozenset[object]
    """The ATen operations in it."""


@dataclass
class Generated:
    """What Inductor made of a graph."""

    graph: fx.Graph
    """Of ATen operations, after partitioning, before Inductor's own passes."""
    kernels: list[Kernel]
    """In the order they run."""
    code: str
    """The Python file with its Triton kernels."""


@dataclass
class Pair:
    """The two graphs of a network in training."""

    num_results: int
    """Leading outputs of the forward graph that aren't kept for the backward pass: buffers' new values, logits."""
    forward: Generated
    backward: Generated | None = None


generated: list[Pair] = []
"""Of every graph compiled since `install`, in order."""
_replaced: set[str] = set()


class _Stop(BaseException):
    """Ends Inductor's work once the code is there. Not an `Exception`: those, Inductor wraps in its own."""

    def __init__(self, kernels: list[Kernel], code: str) -> None:
        self.kernels, self.code = kernels, code


def install() -> None:
    """Replace what needs a GPU, for the rest of this process. Raises `StubError` if torch has changed."""
    if _replaced:
        return
    import torch._dynamo.device_interface
    import torch._functorch.config
    import torch._inductor.config
    import triton
    from triton.backends.compiler import GPUTarget

    properties = type("Properties", (), PROPERTIES)()

    class Driver:
        """Triton's driver, as far as Inductor asks it."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: CUDA)

    triton.runtime.driver.set_active(Driver())
    # Results of earlier processes; they were compiled for another device.
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1

    # The device.
    _replace("torch.cuda.get_device_properties", properties)
    _replace("torch.cuda.get_device_capability", (9, 0))
    _replace("torch.cuda.current_device", 0)
    interface = "torch._dynamo.device_interface.CudaInterface"
    for name, value in {
        "get_device_properties": properties,
        "Worker.get_device_properties": properties,
        "Worker.current_device": 0,
        "current_device": 0,
        "is_available": True,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }.items():
        _replace(f"{interface}.{name}", value, static=True)
    # What cuDNN answers for channels_last images.
    _replace("torch._C._conv_determine_backend_memory_format", torch.channels_last)
    # The road to the code.
    _wrap("torch._inductor.compile_fx.compile_fx_forward", "gm example_inputs num_orig_model_outputs", _forward)
    _wrap("torch._inductor.compile_fx.compile_fx_backward", "gm example_inputs", _backward)
    _wrap("torch._inductor.graph.GraphLowering._compile_to_module", "self", _stop)


def _find(path: str) -> tuple[Any, str, Any]:
    """What holds the attribute `path`, its name there, and its value."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            holder: Any = importlib.import_module(".".join(parts[:length]))
            break
        except ImportError:
            continue
    try:
        for part in parts[length:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1], getattr(holder, parts[-1])
    except AttributeError:
        raise _misfit(f"has no {path}") from None


def _misfit(what: str) -> StubError:
    return StubError(f"torch {torch.__version__} {what}: the stubs of {__name__}.py are for torch {WRITTEN_FOR}")


def _replace(path: str, value: Any, static: bool = False) -> None:
    """Have the function at `path` return `value`."""
    holder, name, _ = _find(path)
    _replaced.add(path)

    def constant(*_: Any, **__: Any) -> Any:
        return value

    setattr(holder, name, staticmethod(constant) if static else constant)


def _wrap(path: str, parameters: str, replacement: Callable[..., Any]) -> None:
    """Call `replacement` instead of the function at `path`, with that function first; it begins with `parameters`."""
    holder, name, original = _find(path)
    _replaced.add(path)
    found = list(inspect.signature(original).parameters)
    if found[: len(parameters.split())] != parameters.split():
        raise _misfit(f"passes other arguments to {path}, {', '.join(found)}")

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(holder, name, wrapper)


def _on_cuda(value: Any) -> Any:
    """`value`, with a fake CUDA tensor for each tensor in it."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
    if isinstance(value, tuple | list):
        return type(value)(_on_cuda(part) for part in value)
    return value


def _move(gm: fx.GraphModule) -> None:
    """Have the graph compute on the GPU."""
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _on_cuda(node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    gm.recompile()


def _forward(
    original: Callable[..., Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    num_orig_model_outputs: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    metadata = torch._guards.TracingContext.get().fw_metadata
    assert metadata is not None
    run, found = _generate(original, gm, example_inputs, num_orig_model_outputs, *args, **kwargs)
    generated.append(Pair(metadata.num_mutated_inp_runtime_indices + num_orig_model_outputs, found))
    return run


def _backward(
    original: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any
) -> Any:
    run, generated[-1].backward = _generate(original, gm, example_inputs, *args, **kwargs)
    return run


def _generate(
    original: Callable[..., Any], gm: fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any
) -> tuple[Callable[..., Any], Generated]:
    """A stand-in for the compiled function, and what it would have been."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})  # Inductor's passes change the graph
    graph.output(output)
    results = [node.meta["val"] if isinstance(node, fx.Node) else node for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]

    @make_boxed_func
    def run(*_: Any) -> list[Any]:
        return [
            torch.empty_strided(r.shape, r.stride(), dtype=r.dtype) if isinstance(r, torch.Tensor) else r
            for r in results
        ]

    fake_mode = detect_fake_mode(results)
    assert fake_mode is not None
    with fake_mode:
        _move(gm)
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    assert len(inputs) == len(example_inputs)
    try:
        original(gm, inputs, *args, **kwargs)
    except _Stop as stopped:
        return run, Generated(graph, stopped.kernels, stopped.code)
    raise _misfit("didn't ask for the code to be compiled")


def _stop(_: Callable[..., Any], self: Any) -> None:
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    code, _ = self.codegen()
    raise _Stop(
        [
            Kernel(
                scheduled.get_read_write_buffers_sizes(),
                frozenset(o.target for node in scheduled.get_nodes() for o in node.node.get_origins()),
            )
            for scheduled in self.scheduler.nodes
            if not isinstance(scheduled, ExternKernelSchedulerNode | NopKernelSchedulerNode)
        ],
        code.value,
    )
