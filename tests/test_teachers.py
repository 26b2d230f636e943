"""The frozen teacher: its own normalisation, its own size, the data's classes."""

from dataclasses import replace

import pytest
import timm
import torch

from tdkd_dist.config import Config, DataConfig, StudentConfig, TeacherConfig, TrainConfig
from tdkd_dist.data.frames import choose
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.mistakes import Mistake
from tdkd_dist.students import create_student
from tdkd_dist.teachers import Teacher, check_name, check_pretrained_classes, create_teacher, fetch_weights
from tdkd_dist.weights import save_student

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def images() -> torch.Tensor:
    return torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def checkpoint(path, num_classes=5):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=num_classes)
    student = StudentConfig(model="resnet10t", num_classes=num_classes, num_timesteps=1)
    save_student(path, model.state_dict(), student, input_size=(3, 32, 32), mean=MEAN, std=STD)
    return model.eval()


def test_sees_the_students_crop_in_its_own_normalisation(tmp_path):
    model = checkpoint(tmp_path / "teacher.safetensors")
    data = DataConfig()
    teacher = create_teacher(
        TeacherConfig(name="resnet10t", checkpoint=str(tmp_path / "teacher.safetensors")),
        data,
        num_classes=5,
        in_chans=3,
    )
    found = teacher(Normalise(data.mean, data.std)(images()))
    expected = model(Normalise(MEAN, STD)(images()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The change of normalisation is no small thing: without it the logits are others.
    assert (model(Normalise(data.mean, data.std)(images())) - expected).abs().max() > 1e-2


def test_normalise_is_torchvisions():
    from torchvision.transforms.v2 import functional

    expected = functional.normalize(functional.to_dtype(images(), torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(Normalise(MEAN, STD)(images()), expected, rtol=1e-5, atol=1e-6)


def test_is_frozen_and_stays_in_eval_mode():
    teacher = create_teacher(TeacherConfig(name="resnet10t", pretrained=False), DataConfig(), num_classes=5, in_chans=3)
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert not teacher(torch.randn(2, 3, 32, 32)).requires_grad
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_resizes_only_for_a_model_of_fixed_input_size():
    def teacher(name: str) -> Teacher:
        return create_teacher(TeacherConfig(name=name, pretrained=False), DataConfig(), num_classes=5, in_chans=3)

    assert teacher("resnet10t").input_size is None
    vit = teacher("vit_tiny_patch16_224")
    assert vit.input_size == (224, 224)
    assert vit(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_a_file_with_other_classes_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    checkpoint(path, num_classes=7)
    config = TeacherConfig(name="resnet10t", checkpoint=str(path))
    with pytest.raises(ValueError, match=rf"^teacher\.checkpoint={path}: has 7 classes, 5 wanted; train a"):
        create_teacher(config, DataConfig(), num_classes=5, in_chans=3)


def test_names_are_checked_before_anything_is_fetched():
    with pytest.raises(ValueError, match=r"teacher\.name=resnot34: timm has no such model"):
        check_name(TeacherConfig(name="resnot34"))
    with pytest.raises(ValueError, match=r"resnet34\.nonsense"):
        check_name(TeacherConfig(name="resnet34.nonsense"))
    check_name(TeacherConfig(name="resnet34.tv_in1k"))
    config = TeacherConfig(name="resnet34.tv_in1k")
    check_pretrained_classes(config, 1000)
    with pytest.raises(ValueError, match=r"^teacher\.name=resnet34\.tv_in1k: has 1000 classes, 10 wanted; train a"):
        check_pretrained_classes(config, 10)


IMAGENETTE = ["n01440764", "n02102040", "n03888257"]
"""The first, the 218th and the 702nd of ImageNet-1k's synsets."""


def imagenet_teacher(tmp_path, name: str = "resnet10t") -> TeacherConfig:
    """Weights of 1,000 classes, as somebody hands them out."""
    torch.manual_seed(1)
    torch.save(timm.create_model(name).state_dict(), tmp_path / "imagenet.pt")
    return TeacherConfig(name=name, checkpoint=str(tmp_path / "imagenet.pt"))


@pytest.mark.parametrize("name", ["resnet10t", "levit_128s"])  # the latter has two classifiers, as what was distilled
def test_a_teacher_of_imagenet_serves_a_part_of_its_classes(name, tmp_path):
    config, x = imagenet_teacher(tmp_path, name), torch.randn(4, 3, 64, 64)
    every = create_teacher(config, DataConfig(), num_classes=1000, in_chans=3)
    some = create_teacher(config, DataConfig(), num_classes=3, in_chans=3, class_names=IMAGENETTE)
    assert torch.equal(some(x), every(x)[:, [0, 217, 701]])
    assert some.notes[1] == "3 of its 1000 classes serve, by synset"
    assert len(every.notes) == 1


@pytest.mark.parametrize(
    ("names", "classes", "line"),
    [
        (None, 3, "has 1000 classes, 3 wanted; train a teacher on your data"),
        (["tench", "spaniel", "chute"], 3, "tench is none of ImageNet-1k's synsets"),
        (IMAGENETTE, 5, "the data has 3: set student.num_classes=3"),
    ],
)
def test_names_that_do_not_tell_the_classes_are_refused(names, classes, line, tmp_path):
    with pytest.raises(Mistake, match=f"^teacher.checkpoint=.*{line}"):
        create_teacher(imagenet_teacher(tmp_path), DataConfig(), num_classes=classes, in_chans=3, class_names=names)


def test_weights_from_a_file_are_fed_in_the_model_s_own_normalisation(tmp_path):
    data = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.rand(2, 3, 32, 32)
    as_student = (pixels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)

    def seen(config: TeacherConfig) -> tuple[torch.Tensor, str]:
        teacher = create_teacher(config, data, num_classes=1000, in_chans=3)
        found = []
        teacher.model.register_forward_pre_hook(lambda _, x: found.append(x[0]))
        teacher(as_student)
        return found[0], teacher.notes[0]

    config = imagenet_teacher(tmp_path)
    own = timm.get_pretrained_cfg("resnet10t")
    x, note = seen(config)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (own.mean, own.std))
    torch.testing.assert_close(x, (pixels - mean) / std)
    assert note.startswith("normalised with timm's of resnet10t: mean")
    x, note = seen(replace(config, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    torch.testing.assert_close(x, (pixels - 0.5) / 0.25)
    assert note.startswith("normalised with teacher.mean and teacher.std")
    checkpoint(tmp_path / "ours.safetensors", num_classes=1000)
    x, note = seen(replace(config, checkpoint=str(tmp_path / "ours.safetensors")))
    torch.testing.assert_close(x, as_student)
    assert note.startswith("normalised with its file's: mean [0.1, 0.2, 0.3]")
    x, note = seen(TeacherConfig(name="resnet10t", pretrained=False))
    assert torch.equal(x, as_student)
    assert note == "normalised as the data is"
    with pytest.raises(Mistake, match=r"teacher\.mean and teacher\.std: set both"):
        TeacherConfig(name="resnet10t", mean=(0.5, 0.5, 0.5))


def test_a_group_of_frames_is_the_sum_of_those_that_the_teacher_knows(tmp_path):
    """One of ten frames' mean, and a student of four sums of them: their mean is 2.5 times as dense."""
    config, path = StudentConfig("cifar_resnet18", num_classes=5, in_chans=2), tmp_path / "t.safetensors"
    network = create_student(config).eval()
    shown = {"input_size": (2, 32, 32), "mean": (0.0, 0.0), "std": (1.0, 1.0), "frames": 10}
    save_student(path, network.state_dict(), config, **shown)
    counts = torch.randint(0, 5, (3, 10, 2, 32, 32)).float()
    found = {}
    for frames, choice in ((4, "regroup"), (10, "regroup"), (4, "first")):
        data = DataConfig(frames=frames, frame_choice=choice, image_size=32, crop="none")
        teacher = create_teacher(TeacherConfig("cifar_resnet18", str(path)), data, num_classes=5, in_chans=2)
        teacher.model.register_forward_pre_hook(lambda _, x, key=(frames, choice): found.update({key: x[0]}))
        teacher(choose(counts, frames, choice))
    torch.testing.assert_close(found[4, "regroup"], counts.mean(1))
    assert torch.equal(found[10, "regroup"], counts.mean(1))
    assert torch.equal(found[4, "first"], counts[:, :4].mean(1))


def test_without_a_network_the_user_is_told_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"^teacher\.name=resnet34\.tv_in1k: .*set teacher\.checkpoint=FILE$"):
        fetch_weights("resnet34.tv_in1k")


def normalising_teacher() -> Teacher:
    """One whose batch norms do something."""
    torch.manual_seed(0)
    teacher = create_teacher(TeacherConfig(name="resnet10t", pretrained=False), DataConfig(), num_classes=5, in_chans=3)
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.01, 4)
            torch.nn.init.uniform_(module.weight, 0.1, 1)
    return teacher


@pytest.mark.slow
def test_compiled_in_bf16_it_errs_no_more_than_eager():
    from tdkd_dist.training.engine import has_bf16, use_bf16

    cpu = torch.device("cpu")
    if not has_bf16(cpu):
        # Emulated, and NaN when compiled (oneDNN held to AVX2): the engine must not ask for it.
        assert not use_bf16(Config(train=TrainConfig(precision="bf16")), cpu)
        return
    torch.compiler.reset()
    teacher, x = normalising_teacher(), torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = teacher(x)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return (teacher(x).float() - exact).square().mean().sqrt().item() / exact.std().item()

    eager = error()
    teacher.compile_folded()
    assert 0 < eager < 0.1
    assert error() < 1.15 * eager


@pytest.mark.slow
def test_folded_and_compiled_it_computes_the_same():
    torch.compiler.reset()
    teacher = normalising_teacher()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = teacher(x)
    teacher.compile_folded()
    assert expected.std() > 1e-3
    torch.testing.assert_close(teacher(x), expected, rtol=1e-4, atol=1e-4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        teacher(x)
    called = {event.name for event in found.events()}
    assert "mkldnn::_convolution_pointwise" in called  # on weights packed beforehand
    assert not called & {"aten::convolution", "aten::batch_norm", "aten::native_batch_norm"}
