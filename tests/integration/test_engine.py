"""DeepSpeed's steps against plain torch: a hand-written all-reduce SGD, and one rank that accumulates.

Shapes: S optimiser steps, M micro-batches, B images of a micro-batch.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from step import allocated_mib

from tdkd_dist.config import Config, LauncherConfig, OptimConfig, StudentConfig, TrainConfig
from tdkd_dist.losses import TemporalDistillationLoss
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import create_student, spiking_names
from tdkd_dist.training.state import read_state

STEPS, BATCH, MICRO = 3, 8, 4
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-2
STUDENT = StudentConfig(model="sew_resnet8", num_classes=5, num_timesteps=3, width=8)


def make_config(world_size: int, **train: object) -> Config:
    config = Config(
        student=STUDENT,
        optim=OptimConfig(name="momentum", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, schedule_on="epoch"),
        train=TrainConfig(
            epochs=5, batch_size=BATCH, micro_batch=MICRO, **{"precision": "fp32", "sync_bn": False} | train
        ),  # type: ignore[arg-type]
        launcher=LauncherConfig(tasks_per_node=world_size),
    )
    config.loss.alpha = 0
    config.check()
    return config


def make_batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [S, M, B, 3, 16, 16] and labels [S, M, B]."""
    generator = torch.Generator().manual_seed(1)
    shape = (STEPS, BATCH // MICRO, MICRO)
    return torch.randn(*shape, 3, 16, 16, generator=generator), torch.randint(5, shape, generator=generator)


def make_student() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_student(STUDENT).train()


def snapshot(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def train_with_engine(rank: int, world_size: int, **train: object) -> dict[str, torch.Tensor]:
    from tdkd_dist.training.engine import Engine

    config = make_config(world_size, **train)
    engine = Engine(make_student(), config, device=torch.device("cpu"), steps_per_epoch=100, compiled=False)
    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    images, labels = make_batches()
    share = config.accumulation
    for step in range(STEPS):
        for micro in range(rank * share, (rank + 1) * share):
            engine.backward(loss(engine.forward(images[step, micro]), None, labels[step, micro]).total)
        engine.update()
    assert engine.global_step == STEPS
    return snapshot(engine.student)


def train_by_hand(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """SGD with momentum as Sutskever et al. write it for torch, gradients averaged by one all-reduce a tensor."""
    # channels_last as in the engine: convolutions round differently in another layout.
    student = make_student().to(memory_format=torch.channels_last)
    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    images, labels = make_batches()
    velocity: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        student.zero_grad()
        loss(student(images[step, rank]), None, labels[step, rank]).total.backward()
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                gradient = parameter.grad / world_size
                if parameter.ndim > 1:
                    gradient.add_(parameter, alpha=WEIGHT_DECAY)
                velocity[name] = velocity[name].mul_(MOMENTUM).add_(gradient) if name in velocity else gradient
                parameter.add_(velocity[name], alpha=-LR)
    return snapshot(student)


def train_in_every_way(rank: int, world_size: int, folder: Path) -> None:
    results = {"engine": train_with_engine(rank, world_size)}
    if world_size > 1:
        results["hand"] = train_by_hand(rank, world_size)
        results |= {f"zero{n}": train_with_engine(rank, world_size, zero_stage=n) for n in (1, 2)}
    torch.save(results, folder / f"{world_size}-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_twice_the_accumulation_and_a_hand_written_all_reduce(tmp_path):
    run_ranks(train_in_every_way, 2, tmp_path)
    run_ranks(train_in_every_way, 1, tmp_path)
    two, other_rank, one = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    start = snapshot(make_student())
    for name, parameter in two["engine"].items():
        assert not torch.equal(parameter, start[name]), f"{name} did not train"
        assert torch.equal(parameter, other_rank["engine"][name]), name
        # A sum of two and a halving round alike in either order, so nothing less than equality will do.
        assert torch.equal(parameter, one["engine"][name]), name
        assert torch.equal(parameter, two["hand"][name]), name
        for stage in ("zero1", "zero2"):
            torch.testing.assert_close(two[stage][name], parameter, rtol=1e-5, atol=1e-7)


def state_after(rank: int, world_size: int, folder: Path, stage: int) -> None:
    """Three steps at once, and one step, save, load in a fresh engine, two more: parameters, EMA, buffers, rate."""
    from tdkd_dist.training.engine import Engine

    config = make_config(world_size, ema_decay=0.9, zero_stage=stage)
    config.optim.schedule_on = "step"
    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    images, labels = make_batches()

    def new_engine() -> Engine:
        return Engine(make_student(), config, device=torch.device("cpu"), steps_per_epoch=2, compiled=False)

    def steps(engine: Engine, start: int, stop: int) -> None:
        for step in range(start, stop):
            engine.backward(loss(engine.forward(images[step, rank]), None, labels[step, rank]).total)
            engine.update()

    whole = new_engine()
    steps(whole, 0, 3)
    first = new_engine()
    steps(first, 0, 1)
    if rank == 0:
        torch.save(first.state(), folder / "state.pt")
    torch.save(first.rank_state(), folder / f"{rank}.pt")
    dist.barrier()
    resumed = new_engine()
    resumed.load(read_state(folder / "state.pt"), read_state(folder / f"{rank}.pt"))
    steps(resumed, 1, 3)
    assert resumed.global_step == whole.global_step == 3
    assert resumed.learning_rate == whole.learning_rate
    for network, same in ((whole.student, resumed.student), (whole.deployed, resumed.deployed)):
        for name, value in network.state_dict().items():
            assert torch.equal(value, same.state_dict()[name]), name
    whole.sync_buffers()
    statistics = torch.cat([b.flatten().double() for n, b in whole.student.named_buffers() if "running" in n])
    copy_of_mine = copy.deepcopy(statistics)
    dist.broadcast(statistics, src=0)
    assert torch.equal(statistics, copy_of_mine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path, stage):
    run_ranks(state_after, 2, tmp_path, stage)


def skip_a_bad_step(rank: int, world_size: int, stage: int) -> None:
    """One rank's NaN in step 1 is skipped on both: all ends as if that step's batch had never been seen."""
    from tdkd_dist.training.engine import Engine

    config = make_config(world_size, zero_stage=stage, sync_bn=True, ema_decay=0.9 if stage == 0 else 0.0)
    images, labels = make_batches()
    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    ends = []
    for with_bad_step in (False, True):
        engine = Engine(make_student(), config, device=torch.device("cpu"), steps_per_epoch=100, compiled=False)
        for step in range(STEPS):
            if with_bad_step and step == 1:
                engine.remember_buffers()
                x = images[step, rank] * (float("nan") if rank == 1 else 1)
                engine.backward(loss(engine.forward(x), None, labels[step, rank]).total)
                engine.update(skip=True)
                engine.recall_buffers()
            engine.backward(loss(engine.forward(images[step, rank]), None, labels[step, rank]).total)
            engine.update()
        assert engine.global_step == STEPS + with_bad_step
        ends.append({**engine.student.state_dict(), **{f"ema.{k}": v for k, v in engine.deployed.state_dict().items()}})
    for name, value in ends[0].items():
        if not name.startswith("ema.") or stage:  # the average counts steps in its warm-up
            assert torch.equal(value, ends[1][name]), name
        assert torch.isfinite(ends[1][name]).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_with_a_nan_on_one_rank_leaves_no_trace(stage):
    run_ranks(skip_a_bad_step, 2, stage)


def bounded_by_the_bucket(rank: int, world_size: int, stage: int) -> None:
    from tdkd_dist.training.engine import Engine

    engine = Engine(
        make_student(),
        make_config(world_size, zero_stage=stage),
        device=torch.device("cpu"),
        steps_per_epoch=100,
        compiled=False,
    )
    images, labels = make_batches()
    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)

    def step() -> None:
        engine.backward(loss(engine.forward(images[0, rank]), None, labels[0, rank]).total)
        engine.update()

    step()
    assert allocated_mib(step) < 60


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_zero_stage_sends_in_small_buckets(stage):
    """DeepSpeed's default would allocate 2 GB at every step."""
    run_ranks(bounded_by_the_bucket, 2, stage)


def decay_weights(rank: int, world_size: int) -> None:
    """One step of SGD by hand, w - lr (g + wd w), with and without the decay of norms and biases."""
    from tdkd_dist.training.engine import Engine

    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    images, labels = make_batches()
    student = make_student()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)  # no bias is 0, which no decay would show on
    plain = copy.deepcopy(student).to(memory_format=torch.channels_last)
    loss(plain(images[0, 0]), None, labels[0, 0]).total.backward()
    for decay_all in (False, True):
        config = make_config(world_size)
        config.train.batch_size = MICRO
        config.optim.weight_decay, config.optim.decay_all = 0.5, decay_all
        engine = Engine(copy.deepcopy(student), config, device=torch.device("cpu"), steps_per_epoch=100, compiled=False)
        engine.backward(loss(engine.forward(images[0, 0]), None, labels[0, 0]).total)
        engine.update()
        found = snapshot(engine.student)
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            decayed, free = ((parameter - LR * (parameter.grad + decay * parameter)).detach() for decay in (0.5, 0.0))
            assert (decayed - free).abs().max() > 1e-4, name
            want = decayed if decay_all or parameter.ndim > 1 else free
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_weight_decay_skips_norms_and_biases_unless_it_is_of_all():
    run_ranks(decay_weights, 1)


def one_step(rank: int, world_size: int, students: list[tuple[str, str]]) -> None:
    from tdkd_dist.training.engine import Engine

    loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
    for name, kind in students:
        config = make_config(world_size, sync_bn=True)
        config.student = StudentConfig(
            name, num_classes=5, num_timesteps=2, width=8, neuron=NeuronConfig(kind), zero_init_last=False
        )
        torch.manual_seed(0)
        engine = Engine(
            create_student(config.student).train(),
            config,
            device=torch.device("cpu"),
            steps_per_epoch=9,
            compiled=False,
        )
        start = snapshot(engine.student)
        images = torch.randn(MICRO, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        engine.backward(loss(engine.forward(images), None, torch.arange(MICRO)).total)
        engine.update()
        for parameter, value in snapshot(engine.student).items():
            others = value.clone()
            dist.broadcast(others, src=0)
            assert torch.equal(value, others), (name, kind, parameter)
            assert torch.isfinite(value).all(), (name, kind, parameter)
        moved = [
            parameter
            for parameter, value in start.items()
            if not torch.equal(value, snapshot(engine.student)[parameter])
        ]
        assert len(moved) > 0.9 * len(start), (name, kind, set(start) - set(moved))
        assert kind != "plif" or any(parameter.endswith(".w") for parameter in moved)


@pytest.mark.slow
def test_every_student_and_kind_of_neuron_takes_an_optimiser_step():
    """Two ranks, batch norms synchronised, as on GPUs."""
    run_ranks(
        one_step, 2, [*((name, "plif") for name in spiking_names()), ("sew_resnet8", "if"), ("ms_resnet18", "lif")]
    )


class WaitedError(RuntimeError):
    """Somebody waited for the device."""


def wait_for_nothing(rank: int, world_size: int, stages: tuple[int, ...]) -> None:
    """Seven steps of two micro-batches, Dynamo tracing what it would on a GPU: DeepSpeed's hooks too."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch._dynamo.testing import CompileCounter

    from tdkd_dist.training import engine as module

    def synchronize(self: object, device_index: int | None = None) -> None:
        raise WaitedError

    CPU_Accelerator.synchronize = synchronize
    for stage in stages:
        torch.compiler.reset()
        counter = CompileCounter()
        module.compile_training = lambda net, budget, counter=counter: net.compile(backend=counter)
        config = make_config(world_size, zero_stage=stage, sync_bn=True)
        config.train.micro_batch = 2
        engine = module.Engine(make_student(), config, device=torch.device("cpu"), steps_per_epoch=100, compiled=True)
        loss = TemporalDistillationLoss(0.0, 0.5, 1.0)
        for step in range(7):
            for micro in range(config.accumulation):
                images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(10 * step + micro + rank))
                images = images.to(memory_format=torch.channels_last)
                engine.backward(loss(engine.forward(images), None, torch.tensor([0, 1])).total)
            engine.update()
        assert engine.global_step == 7
        assert counter.frame_count == 1


@pytest.mark.slow
def test_deepspeed_never_waits_for_the_device_and_its_hooks_cost_no_graph():
    """Its throughput timer would from the third step on, in a hook in which Dynamo dies."""
    run_ranks(wait_for_nothing, 2, (0, 1))


def gradients_travel_in_fp32(rank: int, world_size: int, stages: tuple[int, ...]) -> None:
    from tdkd_dist.training import engine as module
    from tdkd_dist.training.engine import Engine

    module.has_bf16 = lambda device: True  # torch computes it on every CPU, if slowly
    sent: list[torch.dtype] = []
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather"):
        monitored(name, sent)
    for stage in stages:
        sent.clear()
        config = make_config(world_size, zero_stage=stage, precision="bf16")
        engine = Engine(make_student(), config, device=torch.device("cpu"), steps_per_epoch=100, compiled=False)
        images, labels = make_batches()
        logits = engine.forward(images[0, rank])
        assert logits.dtype == torch.bfloat16
        engine.backward(TemporalDistillationLoss(0.0, 0.5, 1.0)(logits, None, labels[0, rank]).total)
        engine.update()
        assert sent
        assert torch.bfloat16 not in sent


def monitored(name: str, sent: list[torch.dtype]) -> None:
    real = getattr(dist, name)

    def call(*arguments, **keywords):
        for argument in (*arguments, *keywords.values()):
            tensors = argument if isinstance(argument, list) else [argument]
            sent.extend(t.dtype for t in tensors if isinstance(t, torch.Tensor))
        return real(*arguments, **keywords)

    setattr(dist, name, call)


@pytest.mark.slow
def test_gradients_travel_in_fp32_under_autocast():
    run_ranks(gradients_travel_in_fp32, 2, (0, 1, 2))


@pytest.mark.parametrize(
    ("precision", "kind", "major", "expected"),
    [
        ("auto", "cuda", 7, False),
        ("auto", "cuda", 8, True),
        ("bf16", "cuda", 7, False),
        ("fp32", "cuda", 9, False),
        ("auto", "cpu", 9, False),
    ],
)
def test_which_precision_a_gpu_computes_in(monkeypatch, precision, kind, major, expected):
    from tdkd_dist.training.engine import use_bf16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert use_bf16(make_config(1, precision=precision), torch.device(kind)) is expected


def test_a_cpu_has_bf16_where_the_kernel_lists_avx512():
    from tdkd_dist.training.engine import has_bf16

    flags = {word for line in Path("/proc/cpuinfo").read_text().splitlines() for word in line.split()}
    on_arm = {"asimd", "bf16"} <= flags
    assert has_bf16(torch.device("cpu")) is (on_arm or {"avx512bw", "avx512dq", "avx512vl"} <= flags)
