"""The objective against its definition, evaluated one sample and timestep at a time in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkd_dist.loss_config import LossConfig
from tdkd_dist.losses import TemporalDistillationLoss, ensembles

SELF_TARGETS = ("ensemble", "correct_only", "weighted")


def log_softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [v / temperature for v in z]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(v - top) for v in scaled))
    return [v - log_sum for v in scaled]


def kl(p: list[float], s: list[float], temperature: float) -> float:
    log_p, log_s = log_softmax(p, temperature), log_softmax(s, temperature)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_s, strict=True)) * temperature**2


def cross_entropy(z: list[float], label: list[float], smoothing: float) -> float:
    K = len(z)
    return -math.fsum(((1 - smoothing) * y + smoothing / K) * v for y, v in zip(label, log_softmax(z), strict=True))


def standardised(z: list[float]) -> list[float]:
    mean = math.fsum(z) / len(z)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in z) / len(z))
    return [(v - mean) / (spread + 1e-7) for v in z]


def aligned(v: list[float], q: list[float], y: int) -> tuple[list[float], list[float]]:
    """The student's and the teacher's logits, where the student takes class y for another."""
    guess = v.index(max(v))
    smaller = min(q[guess], q[y])
    return (
        [v[y] if k == guess else v[k] for k in range(len(v))],
        [smaller if k in (guess, y) else q[k] for k in range(len(v))],
    )


def weighted_others(own: list[list[float]], t: int) -> list[float]:
    """The mean of the others' logits, weighted by how sure they are and how similar to those of t."""
    T, K = len(own), len(own[0])
    if T == 1:
        return own[0]
    scores = []
    for s in range(T):
        entropy = -math.fsum(math.exp(v) * v for v in log_softmax(own[s]))
        cosine = math.fsum(a * b for a, b in zip(own[t], own[s], strict=True)) / (
            math.hypot(*own[t]) * math.hypot(*own[s])
        )
        scores.append((1 - entropy / math.log(K)) * cosine)
    weights = [0.0 if s == t else math.exp(scores[s]) for s in range(T)]
    return [math.fsum(w * v[k] for w, v in zip(weights, own, strict=True)) / math.fsum(weights) for k in range(K)]


def naive_terms(
    z, q, label, *, temperature, self_target, target, smoothing, standardise=False, align_errors=False, weights="equal"
):
    """(ce, kl, sd) of one batch: z [T][B][K], q [B][K], label [B][K] probabilities."""
    T, B, K = len(z), len(z[0]), len(z[0][0])

    def share(t, steps):
        return 1 / (steps * B) if weights == "equal" else (t + 1) / (math.fsum(range(1, steps + 1)) * B)

    ce = kl_term = sd = 0.0
    for b in range(B):
        prefix = [[math.fsum(z[i][b][k] for i in range(t + 1)) / (t + 1) for k in range(K)] for t in range(T)]
        own = [z[t][b] for t in range(T)]
        seen = {"temporal": own, "prefix": prefix, "ensemble": prefix[-1:], "mix": own + prefix}[target]
        as_seen = standardised if standardise else list
        y = label[b].index(max(label[b]))
        if self_target == "correct_only":
            right = [v for v in own if v.index(max(v)) == y]
            s = [math.fsum(v[k] for v in right) / (len(right) + 1e-8) for k in range(K)]
        else:
            s = prefix[-1]
        for t, v in enumerate(seen):
            ce += cross_entropy(v, label[b], smoothing) * share(t, len(seen))
            student, teacher = aligned(v, q[b], y) if align_errors else (v, q[b])
            kl_term += kl(as_seen(teacher), as_seen(student), temperature) * share(t, len(seen))
        own_seen = prefix if target == "mix" else seen
        for t, v in enumerate(own_seen):
            s = weighted_others(own, t) if self_target == "weighted" else s
            sd += kl(as_seen(s), as_seen(v), temperature) * share(t, len(own_seen))
    return ce, kl_term, sd


@st.composite
def problems(draw):
    T, B, K = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    z = torch.randn(T, B, K, generator=generator, dtype=torch.float64) * scale
    q = torch.randn(B, K, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(K, (B,), generator=generator)
    soft = torch.rand(B, K, generator=generator, dtype=torch.float64)
    return z, q, labels, soft / soft.sum(-1, keepdim=True)


@settings(max_examples=60, deadline=None)
@given(
    problems(),
    st.floats(0.5, 8),
    st.floats(0.01, 2),
    st.floats(0.01, 2),
    st.sampled_from(SELF_TARGETS),
    st.sampled_from(["temporal", "prefix", "ensemble", "mix"]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["equal", "linear"]),
)
def test_equals_the_definition(
    problem, temperature, alpha, beta, self_target, target, soft, smoothing, standardise, align_errors, weights
):
    target = "temporal" if self_target == "weighted" else target
    weights = "equal" if target == "mix" else weights
    z, q, labels, soft_labels = problem
    y = soft_labels if soft else labels
    one_hot = soft_labels if soft else torch.nn.functional.one_hot(labels, z.shape[-1]).double()
    loss = TemporalDistillationLoss(
        alpha, beta, temperature, self_target, target=target, label_smoothing=smoothing, standardise=standardise,
        align_errors=align_errors, weights=weights,
    )  # fmt: skip
    terms = loss(z, q, y)
    ce, kl_term, sd = naive_terms(
        z.tolist(), q.tolist(), one_hot.tolist(), temperature=temperature, self_target=self_target,
        target=target, smoothing=smoothing, standardise=standardise, align_errors=align_errors, weights=weights,
    )  # fmt: skip
    expected = (ce + alpha * kl_term + beta * sd, ce, kl_term, sd)
    for found, wanted in zip(terms[:4], expected, strict=True):
        assert found.item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("weights", "shares"), [("equal", [25, 13, 7, 3]), ("linear", [4, 3, 2, 1])])
def test_how_much_a_step_is_moved_by_the_ensembles_it_is_a_part_of(weights, shares):
    """Where all steps are alike, so that only the weights differ; 1 + 1/2 + 1/3 + 1/4 is 25/12."""
    z = torch.ones(4, 1, 3, dtype=torch.float64).cumsum(-1).requires_grad_()
    loss = TemporalDistillationLoss(0.0, 0.0, 1.0, target="prefix", weights=weights)
    loss(z, None, torch.tensor([0])).total.backward()
    moved_T = z.grad.abs().sum((1, 2))
    assert torch.allclose(moved_T / moved_T.sum(), torch.tensor(shares).double() / sum(shares), rtol=1e-12)


def test_a_mixture_has_two_terms_a_timestep():
    with pytest.raises(ValueError, match=r"loss\.weights=linear: loss\.target=mix has two"):
        TemporalDistillationLoss(0.2, 0.5, 1.0, target="mix", weights="linear")
    with pytest.raises(ValueError, match=r"loss\.weights=linear: loss\.target=mix has two"):
        LossConfig(target="mix", weights="linear")


@pytest.mark.parametrize("target", ["temporal", "prefix", "mix"])
def test_gradient_of_standardised_logits(target):
    z = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    q, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 4])
    loss = TemporalDistillationLoss(0.7, 0.0, 2.0, target=target, standardise=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, q, labels).total, z)


def test_gradient_where_errors_are_aligned():
    z = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    q, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 4])
    assert (z.argmax(-1) != labels).any()
    loss = TemporalDistillationLoss(0.7, 0.0, 2.0, align_errors=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, q, labels).total, z)


def test_aligned_errors_leave_the_wrong_class_its_place():
    """The teacher's term has the wrong class's gradient nowhere but in the right one's."""
    z = torch.tensor([[[3.0, 1.0, 0.0]]], requires_grad=True)
    loss = TemporalDistillationLoss(1.0, 0.0, 1.0, align_errors=True)
    (gradient,) = torch.autograd.grad(loss(z, torch.tensor([[0.0, 4.0, 0.0]]), torch.tensor([1])).kl, z)
    assert gradient[0, 0, 0] == 0
    assert loss(torch.tensor([[[1.0, 3.0, 0.0]]]), torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1])).kl == 0


def test_logits_that_are_all_equal_have_no_direction():
    z = torch.zeros(2, 3, 4, requires_grad=True)
    loss = TemporalDistillationLoss(1.0, 1.0, 1.0, standardise=True)
    loss(z, torch.randn(3, 4), torch.tensor([0, 1, 2])).total.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(problems(), st.floats(0.5, 8), st.sampled_from(SELF_TARGETS[:2]))
def test_gradient_is_the_definitions(problem, temperature, self_target):
    """d/dz_t: (softmax(z_t) - y) + tau [alpha (softmax(z_t/tau) - p_q) + beta (softmax(z_t/tau) - p_s)], over T B."""
    z, q, labels, _ = problem
    T, B, K = z.shape
    alpha, beta = 0.3, 0.7
    z.requires_grad_()
    TemporalDistillationLoss(alpha, beta, temperature, self_target)(z, q, labels).total.backward()
    with torch.no_grad():
        y = torch.nn.functional.one_hot(labels, K).double()
        right = (z.argmax(-1) == labels).unsqueeze(-1)
        s = z.mean(0) if self_target == "ensemble" else (z * right).sum(0) / (right.double().sum(0) + 1e-8)
        soft = (z / temperature).softmax(-1)
        pulls = alpha * (soft - (q / temperature).softmax(-1)) + beta * (soft - (s / temperature).softmax(-1))
        expected = (z.softmax(-1) - y + temperature * pulls) / (T * B)
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.5, 8), st.floats(0, 3), st.integers(0, 2**31))
def test_ensemble_loss_is_bounded_by_the_temporal_loss(T, temperature, log_scale, seed):
    """Jensen: f(mean of k logits) <= mean of f over the k timesteps, for distillation and for cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(T, 1, 5, generator=generator, dtype=torch.float64) * 10**log_scale
    q = torch.randn(1, 5, generator=generator, dtype=torch.float64) * 10**log_scale
    label = torch.randint(5, (1,), generator=generator)
    per_sample = TemporalDistillationLoss(1.0, 0.0, temperature)
    for k in range(1, T + 1):
        at_ensemble = per_sample(z[:k].mean(0, keepdim=True), q, label)
        mean_over_steps = per_sample(z[:k], q, label)
        for name in ("ce", "kl"):
            left, right = getattr(at_ensemble, name).item(), getattr(mean_over_steps, name).item()
            assert left <= right + 1e-12 * (1 + right)
            whole = getattr(per_sample(z, q, label), name).item()
            assert right <= T / k * whole + 1e-12 * (1 + whole)
    same = z[:1].expand(T, -1, -1)
    for name in ("ce", "kl"):
        left = getattr(per_sample(same.mean(0, keepdim=True), q, label), name).item()
        assert left == pytest.approx(getattr(per_sample(same, q, label), name).item(), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(0.01, 1), st.floats(0.01, 0.99))
def test_consistency_and_tet_equal_their_definitions(problem, weight, tet):
    z, _, labels, _ = problem
    T, B, K = z.shape
    plain = TemporalDistillationLoss(0.0, 0.0, 1.0)(z, None, labels)
    terms = TemporalDistillationLoss(0.0, 0.0, 1.0, consistency=weight, tet=tet)(z, None, labels)
    means = [[[math.fsum(z[: t + 1, b, k].tolist()) / (t + 1) for k in range(K)] for b in range(B)] for t in range(T)]
    consistency = 0.0
    for t in range(T - 1):
        for b in range(B):
            target = [math.exp(v) for v in log_softmax(means[t + 1][b])]
            consistency += cross_entropy(means[t][b], target, 0.0) / ((T - 1) * B)
    mse = math.fsum((v - 1) ** 2 for v in z.flatten().tolist()) / (T * B * K)
    assert terms.consistency.item() == pytest.approx(consistency, rel=1e-12, abs=1e-12)
    assert terms.mse.item() == pytest.approx(mse, rel=1e-12)
    assert terms.ce.item() == plain.ce.item()
    expected = (1 - tet) * plain.ce.item() + weight * consistency + tet * mse
    assert terms.total.item() == pytest.approx(expected, rel=1e-12)


def test_consistency_leaves_the_later_ensemble_alone():
    z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = TemporalDistillationLoss(0.0, 0.0, 1.0, consistency=1.0)
    (gradient,) = torch.autograd.grad(loss(z, None, torch.tensor([0, 1, 2])).consistency, z)
    # Only the first ensemble follows, and it knows nothing of the second timestep.
    assert gradient[1].abs().max() == 0
    expected = (z[0].softmax(-1) - z.mean(0).softmax(-1)) / 3
    torch.testing.assert_close(gradient[0], expected.detach(), rtol=1e-12, atol=1e-15)


def test_self_target_carries_no_gradient():
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1])
    # With z equal to its own ensemble the divergence is 0, and so must its gradient be if the target is constant.
    same = z[:1].expand(3, -1, -1)
    sd = TemporalDistillationLoss(0.0, 1.0, 2.0)(same, None, labels).sd
    (gradient,) = torch.autograd.grad(sd, z)
    assert sd.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("self_target", SELF_TARGETS)
def test_no_nan_for_huge_logits_and_hopeless_samples(self_target):
    z = torch.tensor([[[1e4, -1e4, 0.0]], [[1e4, 0.0, -1e4]]], requires_grad=True)
    q = torch.tensor([[-1e4, 1e4, 0.0]])
    terms = TemporalDistillationLoss(0.2, 0.5, 1.0, self_target)(z, q, torch.tensor([1]))
    terms.total.backward()
    assert all(torch.isfinite(term) for term in terms)
    assert torch.isfinite(z.grad).all()


def test_half_logits_are_raised_to_fp32():
    z = torch.randn(2, 3, 4).bfloat16()
    terms = TemporalDistillationLoss(0.2, 0.5, 1.0)(z, torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2]))
    assert terms.total.dtype == torch.float32


def test_the_teacher_is_needed_only_with_alpha():
    z, labels = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    assert TemporalDistillationLoss(0.0, 0.5, 1.0)(z, None, labels).kl.item() == 0
    with pytest.raises(ValueError, match=r"loss\.alpha=0\.2 needs the teacher"):
        TemporalDistillationLoss(0.2, 0.5, 1.0)(z, None, labels)


def test_ensembles_are_running_means():
    z = torch.randn(5, 2, 3, dtype=torch.float64)
    for t in range(5):
        torch.testing.assert_close(ensembles(z)[t], z[: t + 1].mean(0), rtol=1e-12, atol=0)
