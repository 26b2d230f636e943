"""The figures of tools/bench/teacher.py, against probabilities written down."""

import torch
from teacher import main, sureness
from torch import nn

from tdkd_dist.data.batch import Batch
from tdkd_dist.recipe import load_config
from tdkd_dist.teachers import Teacher

PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25]])


class Says(nn.Module):
    """Logits of the probabilities in order, whatever the pictures are."""

    def forward(self, images_BCHW):
        return PROBABILITIES[: len(images_BCHW)].log()


def test_it_tells_how_often_and_how_sure():
    one = [1.0, 1.0, 1.0]
    teacher = Teacher(Says(), student_mean=one, student_std=one, mean=one, std=one)
    config = load_config("cifar10_sew8_cpu", ["loss.temperature=2"])
    labels_B = torch.tensor([0, 1, 1, 0])
    images_BCHW = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images, top1, loss, ece, sure, softly = sureness(teacher, [Batch(images_BCHW, labels_B)], config)
    rooted = PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum(1, keepdim=True)
    assert (images, top1, sure) == ("4", "75.00 %", "0.650")
    assert loss == f"{-torch.tensor([0.7, 0.3, 0.8, 0.5]).log().mean():.3f}"
    # Each in a bin of its own: |0.7 - 1|, |0.6 - 0|, |0.8 - 1| and |0.5 - 1|, a quarter each.
    assert ece == "0.400"
    assert softly == f"{rooted.amax(1).mean():.3f}"


def test_a_recipe_without_a_teacher_is_refused_in_a_line(capsys):
    assert main(["cifar10_teacher_cpu"]) == 2
    assert "recipe=cifar10_teacher_cpu: it has no teacher" in capsys.readouterr().err
