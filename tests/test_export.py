"""What is written gives the student's logits when other programs run it, and what cannot be said is refused.

Shapes: T timesteps, B images, K classes.
"""

import importlib.util
from pathlib import Path

import export as export_tool
import export_table
import nir as nir_library
import numpy as np
import pytest
import snntorch.import_nir
import torch
from exports import FORMATS, RESETS, T, lively, prove, read, written
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images
from spikingjelly.activation_based import nir_exchange
from torch import nn

from tdkd_dist.export import agreement, nir, plain
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.weights import StudentConfig, save_student

pytestmark = pytest.mark.usefixtures("one_thread")
HARD = NeuronConfig(v_reset=0.0)
PROVEN = export_table.read_table()
SMALL = [("sew_resnet8", connect, reset) for connect in export_table.CONNECTIONS for reset in RESETS]
OTHERS = [
    ("sew_resnet18", None, "hard"),
    ("sew_resnet50", "IAND", "hard"),
    ("ms_resnet18", None, "soft"),
    ("ms_resnet34", None, "hard"),
    ("preact_resnet34", None, "hard"),
    ("spiking_resnet18", None, "hard"),
    ("spiking_resnet19", None, "soft"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "connect", "reset"), SMALL + OTHERS)
def test_the_page_shows_what_is_found(name, connect, reset, tmp_path):
    net = lively(name, NeuronConfig(v_reset=RESETS[reset]), **({"connect": connect} if connect else {}))
    row = PROVEN[f"{name} {connect}" if connect else name, reset]
    for form, shown in zip(FORMATS, row, strict=True):
        if name == "sew_resnet50" and form == "ONNX, all timesteps":
            continue  # half a minute; the table's tool does it
        worst, note = prove(net, form, tmp_path / f"{FORMATS.index(form)}.pt2")
        if worst is None:
            assert shown == export_table.show(None, note)
        else:
            assert worst < 1e-9
            assert float(shown.split()[0]) < 1e-9
            assert ("--host-stem" in shown) == (note == "--host-stem")


def test_the_page_shows_every_student():
    from tdkd_dist.students import spiking_names

    shown = {(row.split()[0], reset) for row, reset in PROVEN}
    assert shown == {(name, reset) for name in spiking_names() for reset in RESETS}


@pytest.mark.parametrize("form", FORMATS)
def test_any_batch_size_and_neuron(form, tmp_path):
    for neuron in (HARD, NeuronConfig("plif", decay=0.3, v_reset=0.0), NeuronConfig("if", v_reset=-0.2, threshold=0.7)):
        net, path = lively("sew_resnet8", neuron), tmp_path / f"{neuron.kind}.pt2"
        written(net, form, path)
        x = images(batch=68)
        with torch.no_grad():
            want = net(x)
        torch.testing.assert_close(read(form, path, list(x.split([1, 3, 64]))), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("v_init", "scale"), [("learned", None), (0.6, 1.4), (None, "learned")])
@pytest.mark.parametrize("form", FORMATS)
def test_what_differs_at_the_first_timestep(form, v_init, scale, tmp_path):
    neuron = NeuronConfig(decay=0.9, v_reset=-0.1, v_init=v_init, first_scale=scale)
    net, path = lively("sew_resnet8", neuron), tmp_path / "s.pt2"
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "v_init"):
                module.v_init.uniform_(-0.9, 0.9)
            if hasattr(module, "first_scale"):
                module.first_scale.uniform_(0.7, 1.5)
    if form == "NIR":
        with pytest.raises(ValueError, match=r"no membrane at the start[^\n]*v_init" if v_init else "first_scale"):
            nir.refuse(net)
        return
    written(net, form, path)
    x = images(batch=8)
    with torch.no_grad():
        want = net(x)
    torch.testing.assert_close(read(form, path, agreement.batches(x)), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMATS)
def test_a_frame_a_timestep(form, tmp_path):
    net, path = lively("sew_resnet8", HARD, in_chans=2), tmp_path / "s.pt2"
    written(net, form, path, frames=T)
    x = images(2, batch=8, frames=T)
    with torch.no_grad():
        want = net(x)
        assert (want - net(x[:1].expand_as(x))).abs().max() > 1e-3  # the second frame is looked at
    torch.testing.assert_close(read(form, path, agreement.batches(x)), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMATS[:2])
def test_onnxruntime_in_fp32(form, tmp_path):
    net = lively("sew_resnet8", NeuronConfig())
    x = images(batch=8)
    with torch.no_grad():
        exact, own = net(x), net.float()(x.float())
    written(net, form, tmp_path / "s.onnx")
    found = agreement.compare(exact, own, read(form, tmp_path / "s.onnx", agreement.batches(x.float())))
    assert found.holds
    assert found.alike == 8


@pytest.mark.parametrize("frames", [None, T])
def test_the_student_itself_can_be_exported(frames):
    net = lively("sew_resnet8", NeuronConfig())
    batch = {0 if frames is None else 1: torch.export.Dim("B")}
    program = torch.export.export(net, (images(batch=2, frames=frames),), dynamic_shapes={"x": batch}).module()
    for count in (1, 3, 64):
        x = images(batch=count, frames=frames)
        with torch.no_grad():
            torch.testing.assert_close(program(x), net(x), rtol=0, atol=1e-10)


def test_a_batch_norm_that_reads_no_convolution_stays():
    net = lively("sew_resnet8", HARD)
    net.layer3[0].sn2 = nn.Sequential(nn.BatchNorm2d(32).double(), net.layer3[0].sn2).eval()
    net.layer3[0].connect = "IAND"  # which asks no more of sn2 than to be called
    net.layer3[0].sn2[0].running_var.fill_(2)
    folded, x = plain.fold_batch_norms(net), images()
    assert [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["layer3.0.sn2.0"]
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-10)
        assert isinstance(net.bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("neuron", [HARD, NeuronConfig("if", v_reset=0.0), NeuronConfig("lif", 0.2, v_reset=-0.3)])
@pytest.mark.parametrize("name", ["sew_resnet8", "spiking_resnet19", "ms_resnet18"])
def test_spikingjelly_runs_the_whole_graph(name, neuron, tmp_path):
    net, x = lively(name, neuron), images()
    written(net, "NIR", tmp_path / "s.nir")
    run, state, logits = nir_exchange.import_from_nir(tmp_path / "s.nir", dtype=torch.float64), None, []
    with torch.no_grad():
        for _ in range(T):
            z, state = run(x, state)
            logits.append(z)
        torch.testing.assert_close(torch.stack(logits), net(x), rtol=0, atol=1e-9)


@given(
    decay=st.floats(0.05, 0.95), threshold=st.floats(0.1, 3), seed=st.integers(0, 1000), kind=st.sampled_from(["lif"])
)
@settings(deadline=None, max_examples=30)
def test_snntorch_runs_our_neuron(decay, threshold, seed, kind):
    config = NeuronConfig(kind, decay, threshold, v_reset=0.0)
    currents = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    leaky = snntorch.import_nir._nir_to_snntorch_module(neuron_node(config, 50))
    ours, theirs, m, mem = SpikingNeuron(config, 1), [], None, torch.zeros(50, dtype=torch.float64)
    spikes = []
    for x in currents:
        s, m = ours.step(x, m)
        z, mem = leaky(x, mem)
        spikes.append(s)
        theirs.append(z)
    assert torch.equal(torch.stack(spikes), torch.stack(theirs).double())


def neuron_node(config: NeuronConfig, size: int) -> nir_library.LIF:
    """The node of one layer, as the graph of a student has it."""
    net = lively("sew_resnet8", config if config.threshold < 1 else NeuronConfig(v_reset=0.0))
    graph = nir._Graph(plain.fold_batch_norms(net), nir.DT)
    return graph._neuron(SpikingNeuron(config, 1), (size,))


def test_a_leak_of_nothing_is_none():
    config = NeuronConfig("lif", decay=1.0, v_reset=0.0)
    assert isinstance(neuron_node(config, 7), nir_library.IF)


def test_a_neuron_that_meets_its_threshold_fires_as_ours(tmp_path):
    below = nir.build(plain.fold_batch_norms(lively("sew_resnet8", HARD))).nodes["sn1"].v_threshold
    assert (below < 1).all()
    assert (np.nextafter(below, 2) == 1).all()


def test_the_nodes_of_a_block():
    net = lively("sew_resnet18", NeuronConfig(decay=0.2, v_reset=-0.1), connect="IAND")
    graph = nir.build(plain.fold_batch_norms(net))
    lif = graph.nodes["layer2.1.sn1"]
    np.testing.assert_allclose(lif.tau, 1.25e-4)
    np.testing.assert_allclose(lif.r, 1.25)
    assert (lif.v_leak == -0.1).all()
    assert (lif.v_reset == -0.1).all()
    assert lif.tau.shape == (16, 4, 4)
    window = graph.nodes["maxpool.sum"]
    assert [*window.kernel_size, *window.stride, *window.padding] == [3, 3, 2, 2, 1, 1]
    assert graph.nodes["maxpool"].v_threshold.max() == 0.5
    gates = [name for name in graph.nodes if name.startswith("layer2.1.mul")]
    readers = {name for name, reader in graph.edges if reader == "layer2.1.mul"}
    assert gates == ["layer2.1.mul.minus", "layer2.1.mul"]
    assert readers == {"layer2.0.mul", "layer2.1.mul.minus"}  # identity * (1 - out)


def test_adding_is_two_edges():
    graph = nir.build(plain.fold_batch_norms(lively("sew_resnet18", HARD)))
    assert {name for name, reader in graph.edges if reader == "layer1.1.conv1"} == {"layer1.0.sn2", "maxpool"}
    assert not any(isinstance(node, nir_library.Scale) for node in graph.nodes.values())


def test_what_a_comparison_tells_apart():
    net, x = lively("sew_resnet8", HARD), images(batch=16)
    other = lively("sew_resnet8", NeuronConfig(decay=0.55, v_reset=0.0))
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        exact, own, wrong = net(x), net.float()(x.float()), other(x)
    assert agreement.compare(exact, own, own).holds
    assert not agreement.compare(exact, own, wrong).holds
    assert not agreement.compare(exact, own, exact.flip(1)).holds


@pytest.fixture
def file(tmp_path) -> Path:
    return student_file(tmp_path / "student.safetensors", v_reset=0.0)


def student_file(path: Path, v_reset: float | None, model: str = "sew_resnet8") -> Path:
    neuron = NeuronConfig(v_reset=v_reset)
    net = lively(model, neuron).float()
    config = StudentConfig(model=model, num_classes=5, num_timesteps=T, width=8, neuron=neuron)
    save_student(path, net.state_dict(), config, input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.25] * 3)
    return path


@pytest.mark.parametrize("form", ["onnx", "program", "nir"])
def test_the_tool_writes_and_reads_back(form, file, tmp_path, capsys):
    dest = tmp_path / f"out.{form}"
    assert export_tool.main([str(file), str(dest), "--format", form, "--count", "6"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 pictures classified alike" in printed
    assert "Matplotlib's photograph" in printed
    made = {p.name for p in tmp_path.iterdir()} - {file.name}
    assert made == ({"out.nir"} if form == "nir" else {f"out.{form}", f"out_step.{form}"})


def test_the_tool_takes_pictures(file, tmp_path, capsys):
    from PIL import Image

    for k in range(2):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"{k}.png")
    command = [str(file), str(tmp_path / "out.nir"), "--format", "nir", "--pictures"]
    assert export_tool.main([*command, str(tmp_path / "0.png"), str(tmp_path / "1.png")]) == 0
    assert "pictures: 2 files" in capsys.readouterr().out
    assert export_tool.main([*command, str(tmp_path / "missing.png")]) == 2
    assert "missing.png: no such file" in capsys.readouterr().err


def test_onnx_files_say_what_they_want(file, tmp_path):
    import onnx

    assert export_tool.main([str(file), str(tmp_path / "s.onnx"), "--format", "onnx", "--timesteps", "3"]) == 0
    graph = onnx.load(tmp_path / "s.onnx")
    about = {entry.key: entry.value for entry in graph.metadata_props}
    assert about == {
        "num_timesteps": "3",
        "crop_pct": "0.875",
        "input_size": "[3, 32, 32]",
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.25, 0.25, 0.25]",
    }
    assert {node.op_type for node in graph.graph.node}.isdisjoint({"BatchNormalization"})
    step = onnx.load(tmp_path / "s_step.onnx").graph
    assert [x.name for x in step.input][:2] == ["images", "before.sn1"]
    assert [x.name for x in step.output][:2] == ["logits", "after.sn1"]


@pytest.mark.parametrize(
    ("model", "v_reset", "says"),
    [("sew_resnet8", None, "student.neuron.v_reset=0"), ("preact_resnet34", 0.0, "--host-stem")],
)
def test_what_nir_cannot_say_is_a_line(model, v_reset, says, tmp_path, capsys):
    file = student_file(tmp_path / "s.safetensors", v_reset, model)
    assert export_tool.main([str(file), str(tmp_path / "s.nir"), "--format", "nir"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert says in error
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_file_that_says_otherwise_does_not_stay(file, tmp_path, capsys, monkeypatch):
    honest = plain.fold_batch_norms

    def lossy(model: nn.Module) -> nn.Module:
        folded = honest(model)
        folded.fc.bias.data += torch.arange(5.0)
        return folded

    monkeypatch.setattr(plain, "fold_batch_norms", lossy)
    for form in ("onnx", "nir"):
        assert export_tool.main([str(file), str(tmp_path / "s.out"), "--format", form]) == 1
        assert "was not written" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_library_that_is_not_there_is_named(file, tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nir" else there(name))
    assert export_tool.main([str(file), str(tmp_path / "s.nir"), "--format", "nir"]) == 2
    assert "needs nir: pip install -e '.[export]'" in capsys.readouterr().err


def test_the_student_s_own_file_is_not_overwritten(file, capsys):
    before = file.read_bytes()
    assert export_tool.main([str(file), str(file), "--format", "onnx"]) == 2
    assert "is the student's own file" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_students_from_outside_are_refused_in_nir():
    with pytest.raises(Mistake, match="only the package's own students"):
        nir.refuse(torch.nn.Linear(1, 1))
