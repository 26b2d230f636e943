"""What makes a step fast changes nothing: compilation, memory formats, recomputing, the folded teacher.

Compilation is counted for every student with Dynamo alone; Inductor's code generation, minutes for a deep net, runs
for the smallest.
"""

import copy
from collections import Counter
from collections.abc import Sequence

import pytest
import timm.optim
import torch
from networks import B, K, T, assert_close, everything, images, student
from step_contestants import LoopedNet
from torch._inductor.fx_passes import freezing_patterns
from torch.nn import functional as F

from tdkd_dist import distributed
from tdkd_dist.config import DataConfig, TeacherConfig
from tdkd_dist.losses import TemporalDistillationLoss
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.recipe import load_config
from tdkd_dist.run.log import Log
from tdkd_dist.students import choose_recomputed, spiking_names
from tdkd_dist.teachers import create_teacher
from tdkd_dist.training.compilation import compile_training
from tdkd_dist.training.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = {"sew_resnet101", "sew_resnet152"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in DEEP else []) for n in spiking_names()]
)
def test_one_graph_forward_and_backward(name):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    net = student(name, num_timesteps=2).train()
    plain, counter = copy.deepcopy(net), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_close(everything(compiled, images()), everything(plain, images()), 1e-9)
    assert counter.frame_count == 1


def test_writing_the_gradient_of_a_shortcut_changes_no_bit():
    """As on CUDA, and not."""
    found = []
    for write in (False, True):
        torch.compiler.reset()
        net = student("sew_resnet8").train()
        compile_training(net, device=torch.device("cuda" if write else "cpu"))
        assert {m.writes_shortcut_gradient for m in net.modules() if isinstance(m, SpikingNeuron)} == {write}
        net.compile(backend="aot_eager", fullgraph=True)
        found.append(everything(net, images()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_one_compilation_for_each_t_and_shape():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    net = student("sew_resnet8").train()
    plain, counter = copy.deepcopy(net), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=False)
    wanted = 0
    for steps in (T, T - 1, T + 1):
        for frames in (None, steps):
            wanted += 1
            for _ in range(2):
                for model in (net, plain):
                    model.set_num_timesteps(steps)
                x = images(frames=frames)
                assert_close(everything(compiled, x), everything(plain, x), 1e-9)
                assert counter.frame_count == wanted
    net.set_num_timesteps(T)
    everything(compiled, images())
    assert counter.frame_count == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sew_resnet8"])
def test_inductors_network_is_the_eager_one(name):
    torch.compiler.reset()
    net = student(name).train()
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    logits = compiled(images())
    logits.square().sum().backward()
    want = plain(images())
    want.square().sum().backward()
    assert_close([logits, *(p.grad for p in net.parameters())], [want, *(p.grad for p in plain.parameters())], 1e-9)
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sew_resnet8", "sew_resnet50", "ms_resnet18", "preact_resnet34", "spiking_resnet19"])
def test_recomputing_changes_no_bit(name):
    net = student(name, drop_path_rate=0.3 if name == "sew_resnet50" else 0.0).train()
    plain = copy.deepcopy(net)
    net.recompute([1, 3])
    kept = []
    for model in (net, plain):
        torch.manual_seed(3)  # of drop-path
        with torch.autograd.graph.saved_tensors_hooks(lambda x, model=model: kept.append(model) or x, lambda x: x):
            model(images())
        torch.manual_seed(3)
        model.found = everything(model, images())
    assert 0 < kept.count(net) < kept.count(plain)
    assert all(torch.equal(one, other) for one, other in zip(net.found, plain.found, strict=True))
    for model in (net.eval(), plain.eval()):
        model.found = everything(model, images())
    assert all(torch.equal(one, other) for one, other in zip(net.found, plain.found, strict=True))


@pytest.mark.slow
def test_recomputing_compiled_changes_nothing_either():
    torch.compiler.reset()
    net = student("sew_resnet8").train()
    plain = copy.deepcopy(net)
    net.set_grad_checkpointing()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close(everything(compiled, images()), everything(plain, images()), 1e-9)


@pytest.mark.parametrize(
    ("model", "stages", "message"),
    [
        ("sew_resnet8", "[4]", r"train.recompute_stages=\[4\]: sew_resnet8 has no stage 4: there are 1 to 3"),
        ("resnet10t", "[1]", r"train.recompute_stages=\[1\]: student.model=resnet10t is no spiking network"),
    ],
)
def test_stages_that_are_not_there_are_named(model, stages, message):
    config = load_config("fashion_sew", [f"student.model={model}", f"train.recompute_stages={stages}"])
    with pytest.raises(ValueError, match=message):
        choose_recomputed(timm.create_model(model), config)


def kept_by(
    name: str, batch: int, activation_budget: float, recomputed: Sequence[int] = (), **arguments: object
) -> list[int]:
    """Bytes of each tensor that the compiled network keeps for its backward pass, its weights apart."""
    torch.compiler.reset()
    net = timm.create_model(name, num_classes=K, **arguments).train().to(memory_format=torch.channels_last)
    if recomputed:
        net.recompute(recomputed)
    weights = {p.data_ptr() for p in net.parameters()}
    found = {}

    def keep(x):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() not in weights else 0
        return x

    with (
        torch._functorch.config.patch(activation_memory_budget=activation_budget),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        x_BCHW = torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last)
        torch.compile(net, backend="aot_eager_decomp_partition")(x_BCHW)
    return list(found.values())


def test_compiled_it_keeps_no_more_for_the_backward_pass_than_the_plain_network():
    """Membranes, spikes before the shortcut and surrogates are computed again, from what batch norm keeps anyway."""
    resnet, student = sum(kept_by("resnet18", T * B, 1.0)), sum(kept_by("sew_resnet18", B, 1.0, num_timesteps=T))
    assert 0 < student <= resnet
    half = sum(kept_by("sew_resnet18", B, 0.7, num_timesteps=T))
    assert 0 < half <= 0.6 * student  # spikes are computed again too


def test_compiled_every_recomputed_block_keeps_its_input():
    """Were they not kept, all blocks would be computed again at once, at a higher peak than without recomputing."""
    sizes: list[int] = []
    net = timm.create_model("sew_resnet18", num_classes=K, num_timesteps=T)
    for stage in net.stages:
        for block in stage.children():
            block.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].nbytes))
    net(torch.randn(B, 3, 64, 64))
    assert len(sizes) == 8
    kept = kept_by("sew_resnet18", B, 1.0, (1, 2, 3, 4), num_timesteps=T)
    assert not Counter(sizes) - Counter(kept)
    assert sum(kept) < 0.5 * sum(kept_by("sew_resnet18", B, 1.0, num_timesteps=T))


@pytest.mark.slow
def test_twenty_steps_of_the_fast_path_are_those_of_the_plain_one(monkeypatch):
    """Compiled, in channels_last, the stem once, the teacher folded, by DeepSpeed; against loops, eager, by torch."""
    torch.compiler.reset()
    # Batch norms are folded first; then come these, which pack the weights: oneDNN packs no float64.
    freezing_patterns.lazy_init()
    monkeypatch.setattr(freezing_patterns, "pass_patterns", [])
    overrides = ["student.num_timesteps=3", "train.batch_size=2", "launcher.tasks_per_node=1", "optim.lr=0.05"]
    config = load_config(
        "fashion_sew", [*overrides, "loss.temperature=2", "train.recompute_stages=[2]", "train.activation_budget=0.7"]
    )
    net = student("sew_resnet8").train()
    looped = LoopedNet(copy.deepcopy(net))
    choose_recomputed(net, config)
    teacher = create_teacher(TeacherConfig("resnet10t", pretrained=False), DataConfig(), num_classes=K, in_chans=3)
    plain_teacher = copy.deepcopy(teacher.double())
    teacher.to(memory_format=torch.channels_last).compile_folded()
    distributed.start_here(0, 1, distributed.free_port(), torch.device("cpu"))
    try:
        engine = Engine(net, config, device=torch.device("cpu"), steps_per_epoch=100, compiled=True)
        optim = config.optim
        optimizer = timm.optim.create_optimizer_v2(
            looped, opt="momentum", lr=1.0, weight_decay=optim.weight_decay, momentum=optim.momentum
        )
        loss = TemporalDistillationLoss(config.loss.alpha, config.loss.beta, 2.0)
        ours, theirs = [], []
        for k in range(20):
            x, labels = images(seed=k), torch.tensor([k % K, (k + 2) % K])
            terms = loss(engine.forward(x.to(memory_format=torch.channels_last)), teacher(x), labels)
            engine.backward(terms.total)
            rate = engine.learning_rate
            engine.update()
            ours.append(terms.total.item())
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = by_hand(looped(x), plain_teacher(x), labels, config.loss.alpha, config.loss.beta, 2.0)
            total.backward()
            optimizer.step()
            theirs.append(total.item())
    finally:
        distributed.stop()
    assert max(theirs) - min(theirs) > 0.1
    assert ours == pytest.approx(theirs, rel=1e-9, abs=0)


def by_hand(logits_TBK, teacher_BK, labels, alpha, beta, tau):
    ensemble_BK, total = logits_TBK.mean(0).detach(), 0.0
    for logits_BK in logits_TBK:
        total = total + F.cross_entropy(logits_BK, labels) / T
        for weight, target_BK in ((alpha, teacher_BK), (beta, ensemble_BK)):
            p_BK, log_q_BK = F.softmax(target_BK / tau, 1), F.log_softmax(logits_BK / tau, 1)
            total = total + weight * tau**2 * (p_BK * (p_BK.log() - log_q_BK)).sum() / B / T
    return total


def test_more_than_eight_versions_stay_compiled(monkeypatch, tmp_path):
    """Dynamo's own limit is 8: with ten numbers of timesteps the last two would silently run eager."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, compile_ = CompileCounter(), torch.nn.Module.compile
    asked = {}

    def counted(self, **keywords):
        asked.update(keywords)
        compile_(self, backend=counter, dynamic=keywords["dynamic"])

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    log = Log(tmp_path / "log.txt")
    log.take_over_logging()
    net = SpikingNeuron(NeuronConfig(), 1)
    compile_training(net)

    def run(steps: int, size: int = 8) -> None:
        net.num_timesteps = steps
        net(torch.randn(steps * 2, 3, size, size, requires_grad=True)).sum().backward()

    for steps in range(1, 11):
        for size in (4, 8):
            run(steps, size)
    assert counter.frame_count == 20
    assert not (tmp_path / "log.txt").exists()
    with torch._dynamo.config.patch(cache_size_limit=20):
        run(11)
        run(12)
    assert counter.frame_count == 20
    assert (tmp_path / "log.txt").read_text().count("runs uncompiled") == 1
