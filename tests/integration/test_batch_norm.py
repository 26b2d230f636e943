"""Batch norm over ranks: two ranks with half the batch each are one process with all of it, and one graph.

Shapes: T timesteps, B images of both ranks, K classes.
"""

import copy
from collections import Counter

import pytest
import timm
import torch
import torch.distributed as dist
from networks import K, T, images, student
from ranks import run_ranks, run_without_peers
from torch import nn

from tdkd_dist.batch_norm import batch_norm_repeated, synchronise
from tdkd_dist.students import spiking_names

RANKS, B = 2, 4
PLAIN = ("resnet10t", "efficientnet_lite0")
"""Ordinary networks; the second one's batch norms are timm's own, with the activation inside."""


def network(name: str, **kwargs: object) -> nn.Module:
    if name in PLAIN:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=K, drop_rate=0.0, drop_path_rate=0.0).double()
    return student(name, **kwargs)


def share(x: torch.Tensor, rank: int, dim: int = 0) -> torch.Tensor:
    return x.chunk(RANKS, dim)[rank]


def look(net: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradients and statistics of a step whose loss is the mean over samples of a weighted sum of logits."""
    net.train()
    net.zero_grad()
    x = x.clone().requires_grad_()
    logits = net(x)
    dim = 1 if logits.ndim == 3 else 0
    (logits * weights).mean(dim).sum().backward()
    found = {"logits": logits.detach().movedim(dim, 0), "images": x.grad.movedim(x.ndim - 4, 0)}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def compare(ours: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], rank: int, what: str) -> None:
    assert ours.keys() == whole.keys()
    for name, value in ours.items():
        want = whole[name]
        if name.startswith("gradient"):
            dist.all_reduce(value)
            value = value / RANKS
        elif name in ("logits", "images"):
            want = share(want, rank)
            # The loss of a rank is the mean over its own samples, so that their gradient is twice that in the whole.
            value = value / RANKS if name == "images" else value
        # efficientnet's last norms see one pixel of four images, and magnify what was rounded before.
        tolerance = 1e-7 if "efficientnet" in what else 1e-9
        torch.testing.assert_close(
            value, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def equal_one_process(
    rank: int, world_size: int, names: list[str], compiler: str | None, T: int = T, **options: object
) -> None:
    for name in names:
        frames = T if name == "spiking_resnet18" else None  # frames: the stem is not repeated
        x = images(seed=5, batch=B, frames=frames).to(torch.float64)
        dim = 1 if frames else 0
        net = network(name, num_timesteps=T, **options)
        whole = copy.deepcopy(net)
        assert synchronise(net) is net
        assert list(net.state_dict()) == list(whole.state_dict())
        torch.compiler.reset()
        shape = (K,) if name in PLAIN else (T, 1, K)
        weights = torch.randn(shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))
        if compiler is not None:
            net.compile(backend=compiler, fullgraph=True)
        for step in range(2):
            x = x.roll(step + 1, dims=dim)
            compare(look(net, share(x, rank, dim), weights), look(whole, x, weights), rank, f"{name}, step {step}")
        net.eval()
        whole.eval()
        torch.testing.assert_close(net(x), whole(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_two_ranks_equal_one_process():
    run_ranks(equal_one_process, RANKS, [*spiking_names(), *PLAIN], None)


@pytest.mark.slow
def test_so_they_do_compiled():
    """At two timesteps: Inductor's C++ is compiled for each."""
    run_ranks(equal_one_process, RANKS, ["sew_resnet8"], "inductor", 2)


def equal_one_process_with_first_statistics(rank: int, world_size: int) -> None:
    names = ["sew_resnet8", "ms_resnet18", "spiking_resnet18"]
    equal_one_process(rank, world_size, names, None, first_statistics=True)
    equal_one_process(rank, world_size, names[:1], "aot_eager", first_statistics=True)


@pytest.mark.slow
def test_so_do_statistics_of_the_first_timestep():
    run_ranks(equal_one_process_with_first_statistics, RANKS)


def one_graph_and_two_all_reduces(rank: int, world_size: int, names: list[str], **options: object) -> None:
    from torch._dynamo.testing import CompileCounter

    for name in names:
        torch.compiler.reset()
        net, counter = synchronise(network(name, num_timesteps=2, **options)).train(), CompileCounter()
        net.compile(backend=counter, fullgraph=True)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        net(images(seed=rank)).sum().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            net(images(seed=rank + 5)).sum().backward()
        called = Counter(event.name for event in found.events() if event.name.startswith("_c10d_functional"))
        assert called == {f"_c10d_functional::{op}": 2 * norms for op in ("all_reduce", "wait_tensor")}, (name, called)
        assert counter.frame_count == 1, (name, counter.frame_count)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the deep networks take Dynamo minutes
def test_every_student_is_one_graph_with_an_all_reduce_a_layer_and_direction():
    """As one rank of two sees them, since Dynamo takes long; two networks on both ranks.

    The deepest two repeat the blocks of `sew_resnet50`; that each is one graph is shown by `test_fast_path`.
    """
    names = [name for name in spiking_names() if name not in ("sew_resnet101", "sew_resnet152")]
    run_without_peers(one_graph_and_two_all_reduces, RANKS, [*names, *PLAIN])
    run_ranks(one_graph_and_two_all_reduces, RANKS, ["sew_resnet8", "resnet10t"])


def so_with_first_statistics(rank: int, world_size: int) -> None:
    one_graph_and_two_all_reduces(rank, world_size, ["sew_resnet8", "ms_resnet18"], first_statistics=True)


@pytest.mark.slow
def test_the_first_timesteps_statistics_travel_with_the_others():
    run_without_peers(so_with_first_statistics, RANKS)


def recomputed(rank: int, world_size: int) -> None:
    x, weights = images(seed=3, batch=B), torch.ones(T, 1, K, dtype=torch.float64)
    for compiler in (None, "aot_eager"):
        torch.compiler.reset()
        net = student("sew_resnet8")
        whole = copy.deepcopy(net)
        synchronise(net).recompute([1, 3])
        if compiler is not None:
            net.compile(backend=compiler, fullgraph=True)
        for _ in range(2):
            compare(look(net, share(x, rank), weights), look(whole, x, weights), rank, f"recomputed, {compiler}")


@pytest.mark.slow
def test_recomputed_stages_change_nothing():
    run_ranks(recomputed, RANKS)


def far_from_zero(rank: int, world_size: int) -> None:
    """A mean of 1,000 standard deviations: in fp32 the mean of squares alone would lose the variance."""
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 1000
    bn = synchronise(nn.BatchNorm2d(3)).train()
    exact = nn.BatchNorm2d(3).double().train()(x.double())
    torch.testing.assert_close(bn(share(x, rank)).double(), share(exact, rank), rtol=0, atol=2e-3)
    half = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = bn(share(half, rank))
    assert y.dtype == torch.bfloat16
    assert bn.running_var.dtype == torch.float32
    momentumless = synchronise(nn.BatchNorm2d(3, momentum=None, affine=False)).double().train()
    plain = nn.BatchNorm2d(3, momentum=None, affine=False).double().train()
    for k in range(3):
        seen = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        batch_norm_repeated(momentumless, share(seen, rank), 5)
        plain(seen.repeat(5, 1, 1, 1))
    torch.testing.assert_close(momentumless.running_var, plain.running_var)
    torch.testing.assert_close(momentumless.running_mean, plain.running_mean)


def test_precision_and_settings():
    run_ranks(far_from_zero, RANKS)


def test_alone_it_changes_nothing():
    net = student("sew_resnet8").train()
    plain, x = copy.deepcopy(net), images()
    assert torch.equal(synchronise(net)(x), plain(x))
    assert all(torch.equal(one, other) for one, other in zip(net.buffers(), plain.buffers(), strict=True))


def test_an_unknown_kind_is_named():
    class Mine(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"train\.sync_bn: Mine can't be synchronised; set train\.sync_bn=false"):
        synchronise(nn.Sequential(Mine(3)))
