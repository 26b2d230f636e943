"""Mixup and cutmix against their definitions."""

import numpy as np
import pytest
import torch

from tdkd_dist.data.mixing import Mixer

B, K = 6, 5


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def mixer(seed: int = 1, rank: int = 0, **kind: float) -> Mixer:
    return Mixer(**{"mixup": 0.0, "cutmix": 0.0} | kind, num_classes=K, seed=seed, rank=rank)


def share_of_partner(soft: torch.Tensor, labels: torch.Tensor) -> float:
    """1 - lambda, read from a sample whose partner (the batch reversed) has another label."""
    i = next(i for i in range(B) if labels[i] != labels[B - 1 - i])
    return soft[i, labels[B - 1 - i]].item()


def test_mixup_is_the_same_convex_combination_of_images_and_labels():
    images, labels = batch()
    mixed, soft = mixer(mixup=1.0)(images.clone(), labels, 3, 0)
    share = share_of_partner(soft, labels)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, (1 - share) * images + share * images.flip(0))
    one_hot = torch.nn.functional.one_hot(labels, K).float()
    torch.testing.assert_close(soft, (1 - share) * one_hot + share * one_hot.flip(0))


def test_cutmix_takes_a_box_of_the_partner_and_its_share_of_the_label():
    images, labels = batch()
    mixed, soft = mixer(cutmix=1.0)(images.clone(), labels, 4, 0)
    from_partner = (mixed == images.flip(0)).all(1)
    assert torch.equal(from_partner | (mixed == images).all(1), torch.ones_like(from_partner))
    share = share_of_partner(soft, labels)
    assert share == pytest.approx(from_partner[0].float().mean().item(), abs=1e-6)
    assert share > 0


def test_draws_depend_on_seed_step_rank_and_micro_batch_alone():
    def share(seed: int, rank: int, step: int, micro_batch: int) -> float:
        np.random.seed(step)  # the global generator neither matters nor is disturbed
        before = np.random.get_state()[1].copy()
        images, labels = batch()
        _, soft = mixer(seed, rank, mixup=1.0)(images, labels, step, micro_batch)
        assert (np.random.get_state()[1] == before).all()
        return share_of_partner(soft, labels)

    assert share(1, 0, 2, 0) == share(1, 0, 2, 0)
    shares = [share(1, 0, 2, 0), share(2, 0, 2, 0), share(1, 1, 2, 0), share(1, 0, 3, 0), share(1, 0, 2, 1)]
    assert len(set(shares)) == len(shares)


def test_off_by_default():
    images, labels = batch()
    mixed, same = mixer()(images, labels, 0, 0)
    assert mixed is images
    assert same is labels
