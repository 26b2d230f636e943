"""What importing the package does, and what it leaves for later."""

import subprocess
import sys
from pathlib import Path

import pytest

from tdkd_dist.config import Config
from tdkd_dist.recipe import save_config

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import tdkd_dist, timm; print(timm.is_model('sew_resnet34'))",
        "import timm, tdkd_dist; print(timm.is_model('sew_resnet34'))",
        "import tdkd_dist; print(hasattr(tdkd_dist.students, 'create_student'))",
        "import tdkd_dist, importlib.util; importlib.util.find_spec('timm'); import timm;"
        " print(timm.is_model('sew_resnet34'))",
        "import tdkd_dist; print(hasattr(tdkd_dist.anytime, 'AnytimeStudent'))",
        "from tdkd_dist.students import create_student; import timm; print(timm.is_model('ms_resnet18'))",
        "from tdkd_dist.batch_norm import synchronise; import timm; print(timm.is_model('sew_resnet34'))",
    ],
)
def test_the_students_are_timms_whatever_is_imported_first(code):
    assert run(code) == "True"


def test_the_package_alone_is_quick():
    assert run("import sys, tdkd_dist; print(sorted({'torch', 'timm'} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("module", ["cluster.status", "cluster.follow", "data.beton.writing"])
def test_what_needs_no_network_does_not_wait_for_torch(module):
    assert run(f"import sys, tdkd_dist.{module}; print(sorted({{'torch', 'timm'}} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--list"], ["status", "RUN"], ["logs", "RUN"], ["cancel", "RUN"]])
def test_a_question_about_a_run_does_not_wait_for_torch(arguments, tmp_path):
    """Half a second instead of ten; matplotlib, numpy and W&B aren't needed either."""
    save_config(Config(), tmp_path / "config.yaml")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import submit
try:
    submit.main({[str(tmp_path) if a == "RUN" else a for a in arguments]!r})
except SystemExit:
    pass
print("\\n" + str(sorted({{"torch", "timm", "numpy", "wandb", "submitit", "matplotlib"}} & set(sys.modules))))
"""
    assert run(code).splitlines()[-1] == "[]"
