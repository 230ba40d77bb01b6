"""``python -m benchmarks.gpu``: what it says of an environment, which tests it runs, how it reads their outcome."""

import pytest
import torch

from benchmarks import gpu

GOOD = {"torch": "2.13.0+cu130", "triton": "3.7.1", "einops": "0.8.2", "pytest": "9.2.0"}


def test_a_sufficient_environment():
    assert gpu.unmet(GOOD.get) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"einops": None}, "einops >= 0.8 is needed, einops is not installed"),
        ({"torch": "2.9.1"}, "torch >= 2.11 is needed, this is 2.9.1"),
        ({"triton": "3.5.0"}, "triton >= 3.6 is needed, this is 3.5.0"),
    ],
)
def test_what_is_missing_is_said_exactly(changes, message):
    assert gpu.unmet({**GOOD, **changes}.get) == [message]


def test_installed_versions_are_found():
    assert gpu.installed_version("torch").startswith(torch.__version__.split("+")[0])
    assert gpu.installed_version("a_package_that_nobody_has") is None


def test_an_insufficient_environment_stops_at_once(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "unmet", lambda: ["pytest >= 7.0 is needed, pytest is not installed"])
    assert gpu.main([]) == 2
    assert "pytest is not installed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_is_a_clear_failure(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "sees no GPU on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_only_files_with_gpu_tests_are_collected(tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text("pytestmark = [pytest.mark.gpu, pytest.mark.interpret]")
    (folder / "test_b.py").write_text("import a_package_that_nobody_has")
    assert gpu.gpu_test_files(tmp_path) == ["tests/kernels/test_a.py"]


def test_junit_summary(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="assert 1 == 2">trace</failure></testcase>'
        '<testcase classname="t" name="c"><skipped message="needs x"/></testcase>'
        '<testcase classname="t" name="d"><error message="no module"/></testcase></testsuite></testsuites>'
    )
    summary = gpu.read_junit(path)
    assert (summary["passed"], summary["failed"], summary["skipped"]) == (1, 2, 1)
    assert summary["failures"][0] == {"test": "t::b", "message": "assert 1 == 2"}
    assert summary["skip_reasons"] == {"needs x": 1}


@pytest.mark.parametrize(("passed", "exit_code", "good"), [(3, 0, True), (3, 1, False), (0, 0, False), (0, 5, False)])
def test_nothing_run_is_no_pass(passed, exit_code, good):
    assert gpu.tests_passed({"passed": passed, "exit_code": exit_code}) is good
