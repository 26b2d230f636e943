"""Full-range metrics against a brute-force reference in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkd_dist.curves import flatten_curves
from tdkd_dist.metrics import TIGHTNESS, TimestepCounts, ensemble_losses, label_rank

CPU = torch.device("cpu")


def rank_first(scores: np.ndarray) -> int:
    return int(np.argsort(-scores, kind="stable")[0])


def brute_force_exits(logits: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """Exit by exit, sample by sample."""
    T, B, K = logits.shape
    means = logits.cumsum(0) / np.arange(1, T + 1)[:, None, None]
    exponentials = np.exp(means - means.max(-1, keepdims=True))
    probs = exponentials / exponentials.sum(-1, keepdims=True)
    logs = np.log(probs, where=probs > 0, out=np.zeros_like(probs))
    scores = {"confidence": probs.max(-1), "entropy": -(probs * logs).sum(-1) / np.log(K)}
    row: dict[str, object] = {}
    for rule, score in scores.items():
        curve: dict[str, list[object]] = {"threshold": [], "mean_timesteps": [], "top1": [], "histogram": []}
        for tightness in TIGHTNESS.tolist():
            threshold = 1 - tightness if rule == "confidence" else tightness
            exits = []
            for b in range(B):
                passed = [s >= threshold if rule == "confidence" else s <= threshold for s in score[:, b]]
                exits.append(passed.index(True) if True in passed else T - 1)
            curve["threshold"].append(threshold)
            curve["mean_timesteps"].append(np.mean(exits) + 1)
            curve["top1"].append(100 * np.mean([rank_first(means[t, b]) == labels[b] for b, t in enumerate(exits)]))
            curve["histogram"].append([100 * exits.count(t) / B for t in range(T)])
        row[f"exit_{rule}"] = curve
    firsts = [[t + 1 for t in range(T) if rank_first(means[t, b]) == labels[b]] for b in range(B)]
    ever = [found[0] for found in firsts if found]
    row["first_correct_aet"] = np.mean(ever) if ever else 0.0
    row["never_correct"] = 100 * (B - len(ever)) / B
    return row


def brute_force(logits: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """Per cent of samples whose label is first, or among the first five, by a stable sort (lower index first)."""
    T, B, _ = logits.shape
    row: dict[str, object] = {}
    for t in range(T):
        mean = logits[: t + 1].sum(0) / (t + 1)
        for name, scores in ((f"top1_t{t + 1}", mean), (f"step_top1_t{t + 1}", logits[t])):
            row[name] = 100 * sum(np.argsort(-scores[b], kind="stable")[0] == labels[b] for b in range(B)) / B
        row[f"top5_t{t + 1}"] = 100 * sum(labels[b] in np.argsort(-mean[b], kind="stable")[:5] for b in range(B)) / B
        exponentials = np.exp(mean - mean.max(-1, keepdims=True))
        probs = exponentials / exponentials.sum(-1, keepdims=True)
        row[f"loss_t{t + 1}"] = -np.log(probs[np.arange(B), labels]).mean()
        row[f"confidence_t{t + 1}"] = probs.max(-1).mean()
        right = [rank_first(mean[b]) == labels[b] for b in range(B)]
        row[f"ece_t{t + 1}"] = 0.0
        for low in range(15):
            inside = [b for b in range(B) if low / 15 < probs[b].max() <= (low + 1) / 15]
            if inside:
                gap = np.mean([probs[b].max() for b in inside]) - np.mean([right[b] for b in inside])
                row[f"ece_t{t + 1}"] += len(inside) / B * abs(gap)
    row |= brute_force_exits(logits, labels)
    row["top1_mean"] = float(np.mean([row[f"top1_t{t + 1}"] for t in range(T)]))
    row["samples"] = B
    return row


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(2, 9), st.booleans(), st.integers(0, 2**31), st.data())
def test_equals_brute_force_in_any_batches(T, B, K, ties, seed, data):
    rng = np.random.default_rng(seed)
    # Multiples of 60 stay exact integers in every mean over t <= 5, so that ties are ties in both computations.
    logits = rng.integers(-2, 3, (T, B, K)) * 60.0 if ties else rng.normal(size=(T, B, K))
    labels = rng.integers(0, K, B)
    counts, start = TimestepCounts(), 0
    while start < B:
        end = start + data.draw(st.integers(1, B - start))
        counts.update(torch.from_numpy(logits[:, start:end]), torch.from_numpy(labels[start:end]))
        start = end
    found = counts.summary(T, CPU)
    found |= flatten_curves(found)
    for name in [name for name, value in found.items() if isinstance(value, list)]:
        del found[name]
    expected = brute_force(logits, labels)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            for name, values in value.items():
                np.testing.assert_allclose(found[key][name], values, rtol=1e-12, atol=1e-12, err_msg=f"{key} {name}")
        else:
            assert found[key] == pytest.approx(value, rel=1e-11, abs=1e-12), key


def test_of_ties_the_lower_class_ranks_first():
    logits = torch.zeros(4)
    assert [label_rank(logits, torch.tensor(y)).item() for y in range(4)] == [0, 1, 2, 3]


def test_not_a_number_is_never_correct():
    counts = TimestepCounts()
    counts.update(torch.full((2, 1, 3), float("nan")), torch.tensor([0]))
    row = flatten_curves(counts.summary(2, CPU))
    assert row["top1_t1"] == row["top5_t1"] == row["step_top1_t2"] == 0


def test_an_empty_validation_set_is_refused():
    with pytest.raises(ValueError, match=r"data\.val holds no sample"):
        TimestepCounts().summary(4, CPU)


def test_training_losses_are_those_of_the_ensembles():
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(3, 5, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0])
    soft = 0.9 * torch.nn.functional.one_hot(labels, 4) + 0.025
    for t in range(3):
        mean = z[: t + 1].mean(0)
        loss = torch.nn.functional.cross_entropy(mean, labels, reduction="sum").item()
        correct = int((mean.argmax(-1) == labels).sum())
        found = ensemble_losses(z, labels)[:, t].tolist()
        assert found == [pytest.approx(loss, rel=1e-5), correct, 5]
        assert ensemble_losses(z, soft)[1, t] == correct
