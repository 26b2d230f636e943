"""What importing the package does, and what it leaves for later."""

import subprocess
import sys

import pytest


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
        "from tdkd_dist.students import create_student; import timm; print(timm.is_model('ms_resnet18'))",
        "from tdkd_dist.batch_norm import synchronise; import timm; print(timm.is_model('sew_resnet34'))",
    ],
)
def test_the_students_are_timms_whatever_is_imported_first(code):
    assert run(code) == "True"


def test_the_package_alone_is_quick():
    assert run("import sys, tdkd_dist; print(sorted({'torch', 'timm'} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    "module", ["tdkd_dist.cluster.status", "tdkd_dist.cluster.follow", "tdkd_dist.data.beton.writing"]
)
def test_what_needs_no_network_does_not_wait_for_timm(module):
    assert run(f"import sys, {module}; print('timm' in sys.modules)") == "False"
