"""Full-range metrics against a brute-force reference in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkd_dist.metrics import TimestepCounts, label_rank

CPU = torch.device("cpu")


def brute_force(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Per cent of samples whose label is first, or among the first five, by a stable sort (lower index first)."""
    T, B, _ = logits.shape
    row: dict[str, float] = {}
    for t in range(T):
        mean = logits[: t + 1].sum(0) / (t + 1)
        for name, scores in ((f"top1_t{t + 1}", mean), (f"step_top1_t{t + 1}", logits[t])):
            row[name] = 100 * sum(np.argsort(-scores[b], kind="stable")[0] == labels[b] for b in range(B)) / B
        row[f"top5_t{t + 1}"] = 100 * sum(labels[b] in np.argsort(-mean[b], kind="stable")[:5] for b in range(B)) / B
        exponentials = np.exp(mean - mean.max(-1, keepdims=True))
        probs = exponentials / exponentials.sum(-1, keepdims=True)
        row[f"loss_t{t + 1}"] = -np.log(probs[np.arange(B), labels]).mean()
        row[f"confidence_t{t + 1}"] = probs.max(-1).mean()
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
    expected = brute_force(logits, labels)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-12), key


def test_of_ties_the_lower_class_ranks_first():
    logits = torch.zeros(4)
    assert [label_rank(logits, torch.tensor(y)).item() for y in range(4)] == [0, 1, 2, 3]


def test_not_a_number_is_never_correct():
    counts = TimestepCounts()
    counts.update(torch.full((2, 1, 3), float("nan")), torch.tensor([0]))
    row = counts.summary(2, CPU)
    assert row["top1_t1"] == row["top5_t1"] == row["step_top1_t2"] == 0


def test_an_empty_validation_set_is_refused():
    with pytest.raises(ValueError, match=r"data\.val holds no sample"):
        TimestepCounts().summary(4, CPU)
