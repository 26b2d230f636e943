"""Stopping when sure: rules, batch compaction and streaming against the whole pass and each image alone.

Shapes: T timesteps, B images, K classes.
"""

import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import T, images, student
from PIL import Image

from tdkd_dist.anytime import VERSIONS, AnytimeStudent, Decision, ExitRule, Stepper, decide, select, stream
from tdkd_dist.config import DataConfig, StudentConfig
from tdkd_dist.data.loaders import make_val_loader
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake
from tdkd_dist.students import create_student
from tdkd_dist.students.base import INPUT
from tdkd_dist.weights import load_student, save_student

pytestmark = pytest.mark.usefixtures("one_thread")
N = 12


@pytest.fixture(scope="module")
def net():
    return student("sew_resnet8")


@pytest.fixture(scope="module")
def x():
    return images(seed=4, batch=N) * torch.linspace(0.2, 3, N, dtype=torch.float64)[:, None, None, None]


@pytest.fixture(scope="module")
def logits(net, x):
    with torch.no_grad():
        return net(x)


def by_hand(logits_TK: torch.Tensor, rule: ExitRule) -> tuple[int, list[float]]:
    """One image: when it stops, and with which logits; plain Python."""
    unchanged, before, sums = 0, None, [0.0] * logits_TK.shape[1]
    for t, row in enumerate(logits_TK.tolist(), start=1):
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        mean = [s / t for s in sums]
        exponentials = [math.exp(m - max(mean)) for m in mean]
        p = sorted((e / sum(exponentials) for e in exponentials), reverse=True)
        predicted = mean.index(max(mean))
        unchanged = unchanged + 1 if predicted == before else 0
        before = predicted
        threshold = rule.threshold[t - 1] if isinstance(rule.threshold, tuple) else rule.threshold
        stops = {
            "confidence": p[0] >= threshold,
            "entropy": -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p)) <= threshold,
            "margin": p[0] - p[1] >= threshold,
            "patience": unchanged >= threshold,
        }[rule.kind]
        if stops or t == len(logits_TK):
            return t, mean
    raise AssertionError


kinds = st.sampled_from(["confidence", "entropy", "margin"])
thresholds = st.floats(0, 1) | st.tuples(*[st.floats(0, 1)] * T)
rules = st.builds(ExitRule, kinds, thresholds) | st.builds(ExitRule, st.just("patience"), st.integers(0, 4))


@given(rule=rules, order=st.permutations(range(N)), size=st.integers(1, N), buckets=st.booleans())
def test_a_batch_decides_as_each_image_alone(net, x, logits, rule, order, size, buckets):
    """Whoever else is in the batch, and whoever leaves it."""
    rows = torch.tensor(order[:size])
    found = decide(Stepper(net, buckets=buckets), x[rows], rule, T)
    assert isinstance(found, Decision)
    for k, row in enumerate(rows.tolist()):
        t, mean = by_hand(logits[:, row], rule)
        assert found.timesteps[k] == t
        assert found.logits[k].tolist() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert torch.equal(found.classes, found.logits.argmax(-1))
    torch.testing.assert_close(found.confidence, found.logits.softmax(-1).amax(-1))
    assert torch.equal(rule.decide(logits[:, rows]), found.timesteps)


def test_a_step_costs_what_its_survivors_cost(net, x, logits):
    rule = ExitRule("confidence", sorted(ExitRule().score(ensembles(logits)[0]).tolist())[N // 2])
    seen: list[int] = []
    hook = net.layer1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    found = decide(Stepper(net), x, rule, T)
    hook.remove()
    left = [int((found.timesteps >= t).sum()) for t in range(1, int(found.timesteps.max()) + 1)]
    assert seen == left
    assert left[0] == N > left[1]


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 1, 1), (6, 1, 3, 3), (6, 4)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_who_goes_on_keeps_the_layout(shape, layout):
    x = torch.arange(math.prod(shape)).view(shape)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    for rows in ([0], [1, 3, 4], [5, 5, 2], []):
        found = select(x, torch.tensor(rows, dtype=torch.int64))
        assert torch.equal(found, x[rows])
        assert x.ndim != 4 or found.is_contiguous(memory_format=layout)


def test_survivors_stay_in_channels_last(net, x):
    stepper = Stepper(net)
    stepper.start(x.contiguous(memory_format=torch.channels_last))
    stepper.step()
    stepper.keep(torch.tensor([1, 4]))
    stepper.step()
    maps = [value for value in stepper._state.values() if value.ndim == 4]
    assert maps
    assert all(len(m) == 2 and m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_the_stream_is_the_means_of_the_whole_pass(net, x, logits):
    found = list(stream(Stepper(net), x, T + 1))
    torch.testing.assert_close(torch.stack(found[:T]), ensembles(logits), rtol=1e-10, atol=1e-10)
    first = next(iter(stream(Stepper(net), x, T)))
    torch.testing.assert_close(first, logits[0])


def test_compiled_steps_know_few_batch_sizes(net, x):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(net.step, backend=counter, fullgraph=True, dynamic=False)
    rule = ExitRule("margin", 0.3)
    with torch._dynamo.config.patch(recompile_limit=VERSIONS):
        for size in range(1, N + 1):
            want = decide(Stepper(net), x[:size], rule, T)
            found = decide(Stepper(net, step=step, buckets=True), x[:size], rule, T)
            assert torch.equal(want.timesteps, found.timesteps)
            torch.testing.assert_close(want.logits, found.logits)
    assert counter.frame_count <= 2 * 5  # the first step and the others, of 1, 2, 4, 8 and 16


@given(rule=rules)
def test_a_rule_is_kept_in_a_file(rule, tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rule.json"
    rule.save(path)
    assert ExitRule.load(path) == rule


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"kind": "hope", "threshold": 0.5}, "kind=hope: must be one of confidence, entropy, margin, patience"),
        ({"kind": "margin", "threshold": 2}, "threshold=2: must be at least 0 and at most 1"),
        ({"kind": "margin", "threshold": []}, r"threshold=\(\): must be at least 0"),
        ({"kind": "margin", "threshold": float("nan")}, "threshold=nan: must be"),
        ({"kind": "margin", "threshold": "x"}, "threshold=x: must be"),
        ({"kind": "margin", "threshold": 0.5, "num_timesteps": 0}, "num_timesteps=0: must be at least 1"),
        ({"threshold": 0.5, "more": 1}, "holds no exit rule"),
        ([1], "holds no exit rule"),
    ],
)
def test_what_is_no_rule_is_said_so(content, words, tmp_path):
    path = tmp_path / "rule.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Mistake, match=rf"rule\.json: {words}"):
        ExitRule.load(path)
    with pytest.raises(Mistake, match=r"none\.json: No such file"):
        ExitRule.load(tmp_path / "none.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A student's file: three classes, crops of 16 pixels out of pictures of 20."""
    config = StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=T, width=8)
    torch.manual_seed(0)
    model = create_student(config)
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_student(path, model.state_dict(), config, input_size=(3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return path


def test_pictures_are_cropped_as_in_validation(weights, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "tree" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8)).save(path)
    paths = sorted((tmp_path / "tree").rglob("*.png"))
    data = DataConfig(val=str(tmp_path / "tree"), format="imagefolder", image_size=16)
    loader = make_val_loader(data, batch_size=5, rank=0, world_size=1, device=torch.device("cpu"), workers=1)
    ((shown, _),) = list(loader)
    loader.close()
    anytime = AnytimeStudent.load(weights)
    want = anytime(shown.contiguous())
    for pictures in (paths, [str(p) for p in paths], [Image.open(p) for p in paths]):
        for one, other in zip(anytime(pictures), want, strict=True):
            assert torch.equal(one, other)
    alone = anytime(Image.open(paths[2]))
    assert alone.classes[0] == want.classes[2]
    assert alone.timesteps.tolist() == [T]


def test_it_stops_or_streams_in_the_files_own_normalisation(weights, tmp_path):
    ExitRule("patience", 0).save(tmp_path / "first.json")
    shown = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    model = load_student(weights)
    x = (shown / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        means = ensembles(model(x))
    first = AnytimeStudent.load(weights, tmp_path / "first.json")(shown)
    assert first.timesteps.tolist() == [1] * 4
    torch.testing.assert_close(first.logits, means[0], rtol=1e-4, atol=1e-4)
    anytime = AnytimeStudent.load(weights, num_timesteps=T + 2)
    found = list(anytime.stream(shown))
    assert len(found) == T + 2
    torch.testing.assert_close(torch.stack(found[:T]), means, rtol=1e-4, atol=1e-4)
    assert torch.equal(anytime(shown).logits, found[-1])


def test_membranes_stay_in_fp32_under_bf16(weights):
    shown = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    anytime = AnytimeStudent.load(weights, bf16=True)
    stepper = anytime._stepper()
    with anytime._precision():
        decide(stepper, anytime.prepare(shown), None, T)
    state = stepper._state
    assert {value.dtype for name, value in state.items() if name != INPUT} == {torch.float32}


def test_streams_do_not_disturb_each_other(weights):
    one, other = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    anytime = AnytimeStudent.load(weights)
    want = list(anytime.stream(one))
    first, second = anytime.stream(one), anytime.stream(other)
    for t in range(T):
        assert torch.equal(next(first), want[t])
        next(second)
        anytime(other)


@pytest.mark.parametrize("device", ["tpu", "nonsense", "cuda:99"])
def test_a_device_that_is_not_here(device, weights):
    with pytest.raises(Mistake, match=f"^device={device}: cannot be used here: [^\n]*$"):
        AnytimeStudent.load(weights, device=device)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no pictures were given"),
        ("none.png", "none.png: no such file"),
        (7, "int: neither a picture nor the path of one"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), r"must be uint8 \[B, 3, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16), r"images of torch.float32 \[1, 3, 16, 16\]: must be uint8"),
        (torch.zeros(1, 3, 20, 16, dtype=torch.uint8), "must be uint8"),
    ],
)
def test_what_cannot_be_shown_is_said_so(weights, given, words):
    with pytest.raises(Mistake, match=words):
        AnytimeStudent.load(weights)(given)


def test_an_ordinary_network_has_no_timesteps():
    with pytest.raises(Mistake, match="ReluResNet: no spiking student"):
        AnytimeStudent(timm.create_model("cifar_resnet18"))
