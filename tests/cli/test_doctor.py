"""Promises of `unitok doctor`: what it says of a package is so, and what is missing or broken is said with what to do."""

import importlib
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from unitok.cli import main
from unitok.errors import UserError

doctor = importlib.import_module("unitok.cli.doctor")

DEPENDENCIES = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]


@pytest.fixture
def few(monkeypatch):
    """Packages that are quick to load, in place of all; the others are loaded by every other test."""
    monkeypatch.setattr(doctor, "core", lambda: ["numpy", "pillow"])
    monkeypatch.setattr(doctor, "EXTRAS", {"einops": ("einops", "shapes", "pip install einops")})


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package that is installed and does not load."""
    (tmp_path / "broken_one").mkdir()
    (tmp_path / "broken_one" / "__init__.py").write_text("raise ImportError('libthing.so: undefined symbol')")
    (tmp_path / "broken_one-3.2.dist-info").mkdir()
    (tmp_path / "broken_one-3.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 3.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_what_it_says_of_this_machine_is_so(few, capsys):
    assert doctor.report() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["python", ".".join(map(str, sys.version_info[:3]))]
    for name in ("numpy", "pillow", "einops"):
        assert ["ok", name, version(name)] in lines
    assert torch.cuda.is_available() == any(line[1].startswith("cuda:") for line in lines)
    assert lines[-1] == ["everything", "that", "unitok", "needs", "works"]


def test_a_package_that_is_missing_or_broken_is_said_with_what_to_do(few, broken, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "core", lambda: ["numpy", "no-such-package", "broken-one"])
    monkeypatch.setattr(doctor, "EXTRAS", {"no-such-extra": ("nothing", "something else", "pip install 'unitok-lm[x]'")})
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert re.search(r"!! no-such-package +missing +pip install 'no-such-package'", said)
    assert re.search(r"!! broken-one +3\.2 +does not load: ImportError: libthing\.so: undefined symbol; pip install", said)
    assert re.search(r"-  no-such-extra +not installed +something else: pip install 'unitok-lm\[x\]'", said)
    assert said.splitlines()[-1] == "2 problems; see the lines marked !!"


def test_one_that_crashes_or_prints_hides_none_of_the_others(tmp_path, monkeypatch):
    """They share a process until one does not load."""
    sources = {"loud": "import sys; print('loaded'); print('a warning', file=sys.stderr)", "dead": "import os; os.abort()"}
    sources |= {"left": "raise SystemExit(3)", "fine": "import loud", "wrong": "import no_such_module"}
    sources |= {"linked": "import os, sys; print('undefined symbol: x', file=sys.stderr, flush=True); os._exit(127)"}
    sources |= {"alone": "import sys; assert 'loud' not in sys.modules", "late": "import atexit, os; atexit.register(os.abort)"}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor._problems(["loud", "dead", "fine", "left", "wrong", "loud"])
    assert found == {"loud": "", "dead": "crashed", "fine": "", "left": "crashed", "wrong": found["wrong"]}
    assert found["wrong"].startswith("ModuleNotFoundError: No module named 'no_such_module'")
    assert doctor._problems(["loud", "linked", "fine"]) == {"loud": "", "linked": "undefined symbol: x", "fine": ""}
    assert doctor._problems(["loud", "alone", "late"]) == {"loud": "", "alone": "", "late": "crashed"}
    assert doctor._problems(["late", "fine"]) == {"late": "crashed", "fine": ""}


def test_an_extra_that_does_not_load_is_no_problem_of_what_is_needed(few, broken, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "EXTRAS", {"broken-one": ("broken_one", "nothing", "pip uninstall broken-one")})
    assert doctor.report() == 0
    assert re.search(r"!! broken-one +3\.2 +does not load: .*; pip uninstall broken-one", capsys.readouterr().out)


def test_every_package_that_unitok_needs_is_looked_at(monkeypatch):
    needed = [re.match(r"[\w-]+", dependency)[0].lower() for dependency in DEPENDENCIES]
    assert len(needed) > 10
    assert len(doctor.core()) > 10
    monkeypatch.setattr(
        doctor, "requires", lambda _: [*DEPENDENCIES, "xformers>=0.0.35; (sys_platform == 'linux') and extra == 'xformers'"]
    )
    assert doctor.core() == needed
    monkeypatch.setattr(doctor, "requires", lambda _: version("no-such-package"))
    with pytest.raises(UserError, match="unitok is not installed"):
        doctor.core()
