"""One timestep at a time: T steps are the whole pass, for every student, neuron and kind of input.

Shapes: T timesteps, B images, K classes.
"""

import pytest
import torch
from networks import B, T, images, student

from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import spiking_names
from tdkd_dist.students.base import INPUT

pytestmark = pytest.mark.usefixtures("one_thread")
NEURONS = {
    "soft": NeuronConfig(),
    "hard": NeuronConfig(v_reset=0.0),
    "hard below": NeuronConfig(v_reset=-0.2, threshold=0.8),
    "if": NeuronConfig("if"),
    "plif": NeuronConfig("plif", decay=0.4),
    "charged": NeuronConfig(v_init=0.6),
    "learning its start": NeuronConfig(v_reset=-0.2, v_init="learned", first_scale="learned"),
    "loud at first": NeuronConfig(first_scale=1.3),
}


def steps(net: torch.nn.Module, x: torch.Tensor, count: int) -> torch.Tensor:
    """Logits [T, B, K], one timestep after the other."""
    state, logits = None, []
    for t in range(count):
        z, state = net.step(x, state) if x.ndim == 4 else net.step(x[t], state, frame=True)
        logits.append(z)
    return torch.stack(logits)


@pytest.mark.parametrize("frames", [None, T])
@pytest.mark.parametrize("name", spiking_names())
@torch.no_grad()
def test_steps_are_the_whole_pass(name, frames):
    net, x = student(name), images(frames=frames)
    whole = net(x)
    torch.testing.assert_close(steps(net, x, T), whole, rtol=1e-10, atol=1e-10)
    assert net.num_timesteps == T
    assert torch.equal(net(x), whole)  # nothing is left behind


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_whatever_the_neuron_and_the_precision(neuron, dtype):
    net = student("sew_resnet8", neuron=neuron).to(dtype)
    x = images().to(dtype)
    assert torch.equal(steps(net, x, T), net(x))


@torch.no_grad()
def test_the_image_is_looked_at_once_and_rows_can_be_selected():
    net, x = student("preact_resnet34"), images(batch=4)
    whole, calls = net(x), []
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    z, state = net.step(x)
    torch.testing.assert_close(z, whole[0])
    kept = torch.tensor([3, 1])
    state = {name: rows[kept] for name, rows in state.items()}
    assert {len(rows) for rows in state.values()} == {2}
    z, state = net.step(torch.empty(0), state)
    torch.testing.assert_close(z, whole[1][kept])
    assert len(calls) == 1
    assert state[INPUT].shape[0] == 2


def test_compiled_it_is_one_graph_for_the_first_step_and_one_for_the_others():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    net, x, counter = student("sew_resnet8"), images(), CompileCounter()
    with torch.no_grad():
        want = net(x)
        step = torch.compile(net.step, backend=counter, fullgraph=True)
        state, logits = None, []
        for _ in range(T + 2):
            z, state = step(x, state)
            logits.append(z)
    torch.testing.assert_close(torch.stack(logits[:T]), want, rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 2
    assert all(row.shape[0] == B for row in state.values())
