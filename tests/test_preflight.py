"""All that is wrong with a command is told at once, a line each."""

import pytest
import submit
from pictures import picture

from tdkd_dist.cluster import preflight
from tdkd_dist.config import StudentConfig
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neuron_config import NeuronConfig
from tdkd_dist.recipe import load_config
from tdkd_dist.students import create_student
from tdkd_dist.weights import save_student

WRONG = {
    "data.train=/none/a.beton": "data.train=/none/a.beton: no such file",
    "data.val=/none/b.beton": "data.val=/none/b.beton: no such file",
    "optim.name=sdg": "optim.name=sdg: timm knows ",
    "student.model=sew_resnet35": "student.model=sew_resnet35: no such model",
    "teacher.checkpoint=/none/c.pt": "teacher.checkpoint=/none/c.pt: no such file",
    "data.workers=999": "data.workers=999: only ",
    "launcher.nodes=2": "launcher.nodes=2: this machine is one",
}


def test_the_first_mistake_hides_no_other(capsys, tmp_path):
    settings = ["recipe=fashion_sew", "launcher.cluster=local", f"run.dir={tmp_path}/run", *WRONG]
    assert submit.main(settings) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(WRONG)
    for start in WRONG.values():
        assert any(line.startswith(f"error: {start}") for line in lines), start
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bnbadamw", "fusedlamb", "adahessian"])
def test_an_optimiser_that_needs_what_is_not_here_is_refused(name):
    """Another package, a GPU's kernels, gradients of gradients."""
    with pytest.raises(Mistake, match=f"^optim.name={name}: cannot be used here: .*; choose another$") as caught:
        preflight._check_optimizer(load_config("fashion_sew", [f"optim.name={name}"]), preflight.Findings())
    assert len(caught.value.lines) == 1


def test_an_optimiser_for_gpus_may_be_submitted_where_there_is_none():
    found = preflight.Findings()
    preflight._check_optimizer(load_config("imagenet_sew34", ["optim.name=fusedlamb"]), found)
    assert found.advice == ["optim.name=fusedlamb: could not be tried here, it needs a GPU"]


def test_a_bad_configuration_is_told_key_by_key(capsys):
    wrong = ["train.btach_size=3", "train.epochs=many", "loss.alpha=-1", "loss.tet=1", "student.neuron.decay=4", "word"]
    assert submit.main(["recipe=fashion_sew", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = ["word", "train.btach_size", "train.epochs", "student.neuron.decay=4.0", "loss.alpha=-1.0", "loss.tet=1.0"]
    assert [line.split(":")[1].strip() for line in lines] == keys


def test_a_sweeps_members_that_differ_in_the_seed_are_checked_once(monkeypatch):
    seen = []
    monkeypatch.setattr(preflight, "check", lambda config, **_: seen.append(config.run.seed) or preflight.Findings())
    configs = [load_config("fashion_sew", [f"run.seed={s}", f"loss.beta={b}", f"run.name=x{s}{b}"])
               for b in (0, 1) for s in range(5)]  # fmt: skip
    findings = preflight.check_all(configs, cluster="local")
    assert len(seen) == 2
    assert len({id(f) for f in findings[:5]}) == len({id(f) for f in findings[5:]}) == 1
    assert findings[0] is not findings[5]


def test_a_sweep_tells_each_mistake_once(monkeypatch):
    def refuse(config, **_):
        raise Mistake(f"loss.beta={config.loss.beta}: no\ndata.val=x: no such file")

    monkeypatch.setattr(preflight, "check", refuse)
    configs = [load_config("fashion_sew", [f"run.seed={s}", f"loss.beta={b}"]) for b in (0, 1) for s in range(3)]
    with pytest.raises(Mistake) as caught:
        preflight.check_all(configs, cluster="local")
    assert caught.value.lines == ["loss.beta=0.0: no", "data.val=x: no such file", "loss.beta=1.0: no"]


def test_pictures_are_in_colour(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(0, 24, 24).save(tmp_path / name / "x.png")
    settings = ["data.format=imagefolder", "loss.alpha=0", "train.batch_size=2", "student.in_chans=1"]
    data = [f"data.{split}={tmp_path}" for split in ("train", "val")]
    with pytest.raises(Mistake, match=r"^student.in_chans=1: pictures are read in colour, grey ones too; make it 3"):
        preflight.check(load_config("fashion_sew", [*settings, *data]), cluster="local")


def test_the_sets_classes_are_compared_before_the_job(tmp_path):
    for folder in ("train/cat", "train/dog", "val/cat", "val/owl"):
        path = tmp_path / folder / "x.png"
        path.parent.mkdir(parents=True)
        picture(0, 24, 24).save(path)
    settings = ["data.format=imagefolder", "loss.alpha=0", "train.batch_size=2"]
    data = [f"data.{split}={tmp_path}/{split}" for split in ("train", "val")]
    with pytest.raises(Mistake, match=r"^data.val=.*unlike data.train's"):
        preflight.check(load_config("fashion_sew", [*settings, *data]), cluster="local", dry_run=True)


def test_a_network_that_is_not_here_is_known_before_the_job():
    config = load_config("fashion_sew", ["launcher.network_interface=nope0"])
    with pytest.raises(Mistake, match=r"(?m)^launcher.network_interface=nope0: this machine has .*lo"):
        preflight.check(config, cluster="local")


def test_the_batch_script_can_be_looked_at_without_slurm(capsys, monkeypatch):
    monkeypatch.setattr("tdkd_dist.cluster.scheduler.sbatch_answers", lambda: False)
    assert submit.main(["recipe=imagenet_sew34", "launcher.cluster=slurm", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "\n#SBATCH --nodes=1\n" in shown
    assert "not here yet: launcher.cluster=slurm: sbatch does not answer here" in shown


def test_a_file_is_checked_as_it_will_be_evaluated(tmp_path):
    student = StudentConfig("sew_resnet8", num_classes=10, num_timesteps=4, neuron=NeuronConfig("plif"))
    state, images = create_student(student).state_dict(), {"input_size": (3, 28, 28), "mean": (0,) * 3, "std": (1,) * 3}
    save_student(tmp_path / "plif.safetensors", state, student, **images)
    settings = ["train.epochs=0", f"student.checkpoint={tmp_path}/plif.safetensors"]
    preflight.check(load_config("fashion_sew", settings), cluster="local", dry_run=True)
