"""Choosing a threshold: the bound and the choice, against scipy and simulation."""

import pytest
import torch

from tdkd_dist.anytime import ExitRule
from tdkd_dist.calibration import bound_drop, calibrate, candidates, describe
from tdkd_dist.losses import ensembles
from tdkd_dist.metrics import label_rank
from tdkd_dist.mistakes import Mistake

T, K = 4, 5


def draw(seed: int, samples: int, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, B, K] that get surer and righter with t, and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (samples,), generator=generator)
    clean = 3 * torch.nn.functional.one_hot(labels, K).double()
    hardness = torch.rand(samples, 1, generator=generator, dtype=torch.float64) * 2
    noises = torch.randn(T, samples, K, generator=generator, dtype=torch.float64) * noise * hardness
    return clean + noises, labels


def correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return label_rank(ensembles(logits), labels) == 0


@pytest.mark.parametrize("kind", ["confidence", "entropy", "margin", "patience"])
def test_the_rule_with_the_fewest_timesteps_within_the_bound(kind):
    logits, labels = draw(0, 4000)
    rule = calibrate(logits, labels, kind, max_drop=1.5)
    right = correct(logits, labels)
    found = rule.calibration
    exits = rule.decide(logits)
    assert found["samples"] == 4000
    assert found["drop_bound"] == pytest.approx(bound_drop(right, exits))
    assert found["drop_bound"] <= 1.5
    assert found["top1_at_T"] - found["top1"] <= found["drop_bound"]
    assert found["mean_timesteps"] == pytest.approx(exits.double().mean().item())
    assert found["mean_timesteps"] < T or kind == "patience"
    assert sum(found["histogram"]) == pytest.approx(100)
    # Whatever stops earlier comes after one that is beyond the bound.
    measured = rule.measure(ensembles(logits))
    others = [ExitRule(kind, x, T).decide_measured(measured) for x in candidates(kind, measured)]
    earlier = [other for other in others if other.double().mean() < exits.double().mean()]
    if earlier:
        assert bound_drop(right, max(earlier, key=lambda other: other.double().mean())) > 1.5


def test_the_bound_is_exact_on_discordant_samples():
    right = torch.zeros(2, 100, dtype=torch.bool)
    right[1, :10] = True  # ten that only T gets right
    right[0, 10:13] = True  # three that only t = 1 does
    exits = torch.ones(100, dtype=torch.int64)
    beta = pytest.importorskip("scipy.stats").beta
    want = beta.ppf(0.975, 11, 90) - beta.ppf(0.025, 3, 98)
    assert bound_drop(right, exits) == pytest.approx(100 * want)
    assert bound_drop(right, torch.full((100,), 2)) == 0.0
    assert describe(right, exits)["top1"] == pytest.approx(3.0)


def test_the_bound_holds_on_other_samples():
    """In at most 5 % of calibrations the true loss, on many more samples, is above what was allowed."""
    allowed, beyond, tries = 2.0, 0, 40
    logits, labels = draw(10_000, 40_000)
    right = correct(logits, labels)
    for seed in range(tries):
        rule = calibrate(*draw(seed, 600), "confidence", max_drop=allowed)
        exits = rule.decide(logits)
        top1 = right.gather(0, (exits - 1).unsqueeze(0)).double().mean() * 100
        beyond += bool(right[-1].double().mean() * 100 - top1 > allowed)
    assert beyond <= 5  # of 40 at 5 %: more with a chance of 1 %


def test_the_most_accurate_within_a_mean_t():
    logits, labels = draw(1, 1000)
    right = correct(logits, labels)
    rule = calibrate(logits, labels, "margin", mean_timesteps=2.0)
    found = rule.calibration
    assert found["mean_timesteps"] <= 2.0
    measured = rule.measure(ensembles(logits))
    for x in candidates("margin", measured):
        exits = ExitRule("margin", x, T).decide_measured(measured)
        if exits.double().mean() <= 2.0:
            assert describe(right, exits)["top1"] <= found["top1"]


def test_what_cannot_be_is_said():
    logits, labels = draw(2, 50)
    with pytest.raises(Mistake, match=r"max_drop=-1: with 50 held-out samples"):
        calibrate(logits, labels, "confidence", max_drop=-1)
    with pytest.raises(Mistake, match=r"mean_timesteps=0\.5: no threshold stops so early"):
        calibrate(logits, labels, "confidence", mean_timesteps=0.5)
    with pytest.raises(Mistake, match="either"):
        calibrate(logits, labels, "confidence")


def test_the_pictures_are_those_that_are_signed(tmp_path):
    import numpy as np
    from networks import student
    from PIL import Image

    from tdkd_dist.anytime import AnytimeStudent
    from tdkd_dist.calibration import open_labelled

    for split, count in (("train", 5), ("val", 3)):
        folder = tmp_path / split / "n01"
        folder.mkdir(parents=True)
        for k in range(count):
            Image.fromarray(np.full((32, 32, 3), 10 * count + k, np.uint8)).save(folder / f"{k}.png")
    net = student("sew_resnet8").float()
    net.default_cfg = {**net.default_cfg, "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    signatures = set()
    for split, count in (("train", 5), ("val", 3), (None, 3)):
        loader, signature = open_labelled(AnytimeStudent(net), tmp_path, split=split, workers=1, batch_size=8)
        signatures.add(signature)
        (images, _), *rest = loader
        assert not rest
        assert images[:, 0, 16, 16].tolist() == [10 * count + k for k in range(count)]
    assert len(signatures) == 2


@pytest.mark.parametrize("kind", ["confidence", "entropy", "margin"])
def test_falling_thresholds_need_fewer_timesteps_for_the_same_bound(kind):
    logits, labels = draw(0, 4000)
    falling, constant = (calibrate(logits, labels, kind, max_drop=1.5, fall=fall) for fall in (0.85, 1.0))
    assert isinstance(constant.threshold, float)
    assert isinstance(falling.threshold, tuple)
    assert len(falling.threshold) == T
    factor = 1 / 0.85 if kind == "entropy" else 0.85
    inside = [
        (x, y) for x, y in zip(falling.threshold, falling.threshold[1:], strict=False) if 0 < min(x, y) <= max(x, y) < 1
    ]
    assert inside
    assert all(y == pytest.approx(x * factor) for x, y in inside)
    assert falling.calibration["drop_bound"] <= 1.5
    assert falling.calibration["mean_timesteps"] < constant.calibration["mean_timesteps"]


@pytest.mark.parametrize(
    "aim",
    [{"max_drop": float("nan")}, {"max_drop": 101}, {"mean_timesteps": float("nan")}, {"mean_timesteps": float("inf")}],
)
def test_an_aim_that_is_none(aim):
    with pytest.raises(Mistake, match=f"^{next(iter(aim))}="):
        calibrate(*draw(0, 20), "confidence", **aim)


@pytest.mark.parametrize("fall", [0.0, -1.0, 1.5, float("nan")])
def test_what_thresholds_cannot_fall_by(fall):
    with pytest.raises(Mistake, match="fall="):
        calibrate(*draw(0, 100), "margin", max_drop=1.0, fall=fall)
