"""What is installed is whole: a wheel holds every module, template and config, and the package in it finds them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A wheel's content, unpacked."""
    build = pytest.importorskip("hatchling.build", reason="the build backend is in the extra `dev`")
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(ROOT)  # where the backend looks
    try:
        name = build.build_wheel(str(folder))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / name) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_all_modules_templates_and_configs_and_nothing_else(installed):
    def files(folder: Path, suffix: str) -> dict[str, bytes]:
        return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob(f"*{suffix}")}

    for suffix in (".py", ".html", ".css"):
        assert files(installed / "unitok", suffix) == files(ROOT / "unitok", suffix) != {}
    assert files(installed / "unitok" / "configs", ".yaml") == files(ROOT / "configs", ".yaml")
    assert len(files(ROOT / "configs", ".yaml")) > 20
    assert {f.name.split("-")[0] for f in installed.iterdir()} == {"unitok"}  # no tests, no benchmarks
    (info,) = installed.glob("*.dist-info")
    assert "unitok = unitok.cli:main" in (info / "entry_points.txt").read_text()


def test_the_installed_demo_finds_its_configs(installed, tmp_path):
    code = "import unitok, unitok.scenes.demo as d; print(unitok.__file__); print(*sorted((d.configs_folder() / 'scenes').glob('*.yaml')))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    where, configs = done.stdout.splitlines()
    assert where == str(installed / "unitok" / "__init__.py")
    folder = installed / "unitok" / "configs" / "scenes"
    assert configs.split() == [str(folder / f"{name}.yaml") for name in ("audio", "decoder", "image")]
