"""What is installed is whole: dependencies are those that are imported, and a wheel works outside of the checkout."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from unitok import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

#: Needed without an import of ours: who imports it.
IMPORTED_BY_OTHERS = {
    "tensorboard": "Lightning's TensorBoardLogger, which `unitok fit` has by default",
}


# ---- Dependencies ---------------------------------------------------------------------------------------------------


def distribution_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared(requirements: list[str]) -> set[str]:
    """Return the distributions of a list of requirements; references to extras of our own are followed."""
    names = set()
    for requirement in requirements:
        if distribution_name(requirement) == PROJECT["name"]:
            extras = re.search(r"\[(.+)\]", requirement)[1].split(",")
            names |= declared([line for extra in extras for line in EXTRAS[extra]])
        else:
            names.add(distribution_name(requirement))
    return names


def imports(tree: ast.AST, optional: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (top-level module, optional) of each import; optional: within a function, or within a `try` for ImportError."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0], optional
        tried = isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type)
        yield from imports(node, optional or tried or isinstance(node, ast.FunctionDef | ast.Lambda))


def imported(*places: str) -> tuple[set[str], set[str]]:
    """Return the distributions that the Python files of some folders import, and those among them whose imports are all optional."""
    distributions = {"llama_cpp": ["llama-cpp-python"]} | packages_distributions()  # which is not installed everywhere
    ours = {
        "unitok",
        *(file.stem for file in [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*/*.py")]),
    }
    found: dict[str, bool] = {}
    for file in (file for place in places for file in ROOT.glob(f"{place}/**/*.py")):
        for module, optional in imports(ast.parse(file.read_text())):
            if module not in {*sys.stdlib_module_names, *ours, "_typeshed"}:  # _typeshed: of type checkers
                name = distribution_name(distributions.get(module, [module])[0])
                in_room_of_extra = file.is_relative_to(ROOT / "unitok" / "serve")  # which its verb imports alone, after a look
                found[name] = found.get(name, True) and (optional or in_room_of_extra)
    return set(found), {name for name, optional in found.items() if optional}


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported():
    core = declared(PROJECT["dependencies"])
    extras = declared(
        [line for name, lines in EXTRAS.items() if name not in ("dev", "docs", "examples", "judges") for line in lines]
    )
    used, optional = imported("unitok")
    assert len(used) > 20
    assert used - core - extras == {"triton"}  # which PyTorch's builds for CUDA bring
    assert core - used == set(IMPORTED_BY_OTHERS)
    assert core & extras == set()
    assert used & extras <= optional  # the package works without its extras
    references, _ = imported("tests", "benchmarks")  # networks that ours are compared with
    assert extras - used - {"python-multipart"} <= references  # which FastAPI imports


def test_imports_of_every_form_are_found():
    source = "import a.b, c as d\nfrom e.f import g\nfrom . import h\ntry:\n    import i\nexcept ImportError:\n    pass\ndef j():\n    import k\n"
    assert dict(imports(ast.parse(source))) == {"a": False, "c": False, "e": False, "i": True, "k": True}


def test_the_extra_dev_is_all_that_tests_and_benchmarks_import():
    used, _ = imported("tests", "benchmarks", "examples")
    reference = {"taming-transformers", "encodec"}  # which `make env` installs without what they depend on
    undeclared = {"onnxruntime", "setuptools"}  # which the judges of voices import and do not declare
    others = reference | declared(EXTRAS["bench"]) | declared(EXTRAS["examples"]) | declared(EXTRAS["judges"]) - undeclared
    assert used - declared(PROJECT["dependencies"]) - declared(EXTRAS["dev"]) == others


def test_the_workflow_runs_targets_of_the_makefile_on_the_versions_that_are_declared():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    classifiers = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert workflow["strategy"]["matrix"]["python"] == classifiers != []
    ran = [step["run"].split()[1] for step in workflow["steps"] if "run" in step]
    assert ran == re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert set(ran) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_every_tested_version_is_pinned():
    pins = {distribution_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared(PROJECT["dependencies"]) | declared(EXTRAS["dev"]) <= pins


def test_whatever_suggests_to_install_unitok_names_our_distribution_and_an_extra_of_it():
    files = [*ROOT.glob("unitok/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py")]
    suggested = 0
    for file in files:
        text = file.read_text()
        assert not re.search(r"pip install [^\n`]*\bunitok\b(?!-lm)", text), file
        assert not re.search(r"\bunitok\[[a-z]+[],]", text), file
        assert not re.search(r"pip install ['\"]?\.\[", text), file
        for extras in re.findall(r"unitok-lm\[([^]{]+)\]", text):
            assert set(extras.split(",")) <= set(EXTRAS), file
            suggested += 1
    assert suggested > 5


# ---- The built package ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, unpacked in `source/`, and the wheel that is built from it, unpacked in `site/`."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.11.2
    (folder / archive.name.removesuffix(".tar.gz")).rename(folder / "source")
    subprocess.run([*build, "-t", "wheel"], cwd=folder / "source", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "site")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_the_wheel_holds_the_package_its_data_and_its_license_and_nothing_else(built):
    package = content(ROOT / "unitok")
    assert content(built / "site" / "unitok") == package
    assert {Path(name).suffix for name in package} == {
        ".py",
        ".html",
        ".cpp",
        ".css",
        ".js",
        ".md",
        ".yaml",
        ".typed",
        ".json",
        ".safetensors",
        ".model",
    }
    info = built / "site" / f"unitok_lm-{__version__}.dist-info"
    assert {file.name for file in (built / "site").iterdir()} == {"unitok", info.name}
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "unitok = unitok.cli:main" in (info / "entry_points.txt").read_text()
    metadata = message_from_string((info / "METADATA").read_text())
    assert [metadata[name] for name in ("Name", "Version", "Author")] == ["unitok-lm", __version__, "unitok contributors"]
    assert [metadata[name] for name in ("License-Expression", "Requires-Python")] == ["Apache-2.0", ">=3.11"]


def test_the_source_distribution_holds_what_the_wheel_is_built_from_and_nothing_else(built):
    beside = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore", "PKG-INFO"}
    assert {file.name for file in (built / "source").iterdir()} == {"unitok", *beside}
    assert content(built / "source" / "unitok") == content(ROOT / "unitok")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment with the wheel, which sees this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder


def test_the_wheel_works_where_there_is_no_checkout(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [str(installed / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    (package,) = installed.glob("lib/python*/site-packages/unitok")
    assert run("python", "-c", "import unitok; print(unitok.__file__)") == str(package / "__init__.py")
    assert run("unitok", "--version") == __version__
    assert run("unitok", "doctor").endswith("everything that unitok needs works")
    assert "seed_everything: 0" in run("unitok", "fit", "--config", "scenes/image.yaml", "--print_config")
    run("unitok", "bundle", "tiny", "--untrained", "tiny")
    run("unitok", "sample", "--bundle", "tiny", "--text", "a red circle", "--modalities", "image", "--out", "samples")
    assert (tmp_path / "samples" / "000000-0.png").exists()
