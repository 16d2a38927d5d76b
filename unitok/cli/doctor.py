"""`unitok doctor`: report which packages are installed and load, and how to mend the others. Nothing is downloaded."""

import importlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

from unitok.errors import UserError
from unitok.hardware import bound_waiting, fast_bfloat16

if TYPE_CHECKING:
    from unitok.bundle import Bundle

_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # module names that differ from their packages'
#: Optional package -> its module, its purpose, and how to install it.
EXTRAS = {
    "xformers": ("xformers.ops", "attention on CUDA", "pip install 'unitok-lm[xformers]' (only of use on CUDA)"),
    "taming-transformers": (
        "taming.modules.diffusionmodules.model",
        "reference networks",
        "pip install --no-deps taming-transformers==0.0.1",
    ),
    "encodec": ("encodec.modules.seanet", "reference networks", "pip install --no-deps encodec==0.1.1 (license CC-BY-NC)"),
    "transformers": ("transformers", "export and import", "pip install 'unitok-lm[transformers]'"),
    "tokenizers": ("tokenizers", "imported text tokenizers", "pip install 'unitok-lm[transformers]'"),
    "peft": ("peft", "LoRA", "pip install 'unitok-lm[lora]'"),
    "torchvision": ("torchvision", "not needed", "pip uninstall torchvision, or install the build that fits your torch"),
    "torchaudio": ("torchaudio", "not needed", "pip uninstall torchaudio, or install the build that fits your torch"),
}
_LOADED = "loaded\0"
_IMPORT = f"import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name); print({_LOADED!r}, flush=True)"


def doctor() -> None:
    """Report which packages are installed and load, and how to mend the others; exit code 1 if a needed one does not work."""
    raise SystemExit(report())


def core() -> list[str]:
    """Return the names of the packages that unitok needs, from its installed metadata. Errors: `UserError` if it is not
    installed."""
    try:
        requirements = requires("unitok-lm") or []
    except PackageNotFoundError:
        raise UserError("unitok is not installed: pip install -e . in its checkout") from None
    return [re.split(r"[^\w-]", line)[0] for line in requirements if "extra ==" not in line]


def report() -> int:
    """Print the report. Returns the exit code: 0 if all needed packages work, else 1."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    needed = {name: (_MODULES.get(name, name.replace("-", "_")), "", f"pip install '{name}'") for name in core()}
    packages = needed | EXTRAS
    versions = {name: _version(name) for name in packages}
    found = _problems([module for name, (module, _, _) in packages.items() if versions[name]])
    problems = 0
    for name, (module, purpose, remedy) in packages.items():
        installed, problem = versions[name], found.get(module, "")
        if not installed and name in EXTRAS:
            if name not in ("torchvision", "torchaudio"):
                print(f"  -  {name:<24}{'not installed':<16}{purpose}: {remedy}")
        elif not installed:
            print(f"  !! {name:<24}{'missing':<16}{remedy}")
        elif problem:
            print(f"  !! {name:<24}{installed:<16}does not load: {problem}; {remedy}")
        else:
            print(f"  ok {name:<24}{installed}")
        problems += name in needed and (not installed or bool(problem))
    problems += not _print_devices()
    problems += _check_bundles() if not problems else 0
    print("everything that unitok needs works" if not problems else f"{problems} problems; see the lines marked !!")
    return int(problems > 0)


def _version(name: str) -> str:
    """The version of a package that is installed; "" if it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _problems(modules: list[str]) -> dict[str, str]:
    """Import modules. Returns: why each does not load, or "".

    One after another in another process, because a broken extension may crash it; one that does not load there is tried alone, and the
    rest in a new process.
    """
    found: list[str] = []
    while rest := modules[len(found) :]:
        done = _import(*rest)
        loaded = done.stdout.count(_LOADED)
        if not done.returncode:
            found += [""] * len(rest)
        elif loaded < len(rest):
            found += [*[""] * loaded, _problem(rest[loaded])]
        else:  # one of them crashes at its end
            found += map(_problem, rest)
    return dict(zip(modules, found, strict=True))


def _problem(module: str) -> str:
    """Why a module does not load, or "": the last line that it says."""
    done = _import(module)
    return (done.stderr.strip().splitlines() or ["crashed"])[-1][:110] if done.returncode else ""


def _import(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _IMPORT, *modules], capture_output=True, text=True, check=False)


def _check_bundles() -> int:
    """Load the built-in bundles in full; print what they know. Returns how many do not work."""
    from unitok.bundle import Bundle
    from unitok.hub import BUILT_IN, built_in

    problems = 0
    for name in built_in():
        try:
            bundle = Bundle.from_pretrained(BUILT_IN / name)
        except UserError as error:
            problems += 1
            print(f"  !! built-in bundle {name}: {error}")
            continue
        world = bundle.facts.get("world")
        known = world if isinstance(world, dict) else {}
        words = known.get("words")
        print(f"  ok built-in bundle {name:<7}{', '.join(bundle.parts)}; prompts such as {known.get('example')!r}")
        if isinstance(words, list):
            print(f"     all of its words: {', '.join(map(str, words))}")
        if bundle.model is not None:
            print(_speed(bundle))
    return problems


def _speed(bundle: "Bundle") -> str:
    """Measure how fast a bundle's decoder generates by type of its weights; return a line."""
    from unitok.model.copies import milliseconds_per_token

    found = milliseconds_per_token(bundle.require("model"))
    best = min(found, key=lambda kind: found[kind])
    times = ", ".join(f"{kind} {value:.2f} ms" for kind, value in found.items())
    return f"  -  a token of the built-in decoder: {times}" + (f"; --dtype auto takes {best}" if len(found) > 1 else "")


def _print_devices() -> bool:
    """Print the devices and what slows them down. Returns False without PyTorch."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return False
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"  ok cuda:{i} {torch.cuda.get_device_name(i)}")
        _print_attention(torch)
    else:
        print(f"  -  no CUDA device: training and sampling use {torch.get_num_threads()} CPU threads")
    print(f"  -  OpenMP: {bound_waiting()}")
    print(f"  -  bfloat16 on this CPU: {'fast' if fast_bfloat16() else 'slow; keep trainer.precision at 32-true'}")
    from unitok.model.native import why_not

    if reason := why_not():
        print(f"  -  generation on this CPU: in PyTorch, at half of the speed or less: {reason}")
    else:
        print("  ok generation on this CPU: compiled for it")
    return True


def _print_attention(torch: Any) -> None:
    """Print which back ends of attention run on the first GPU in bfloat16, and why the others do not."""
    from unitok.model.attention import choose_backend

    for name in ("varlen", "xformers"):
        try:
            choose_backend(name, torch.device("cuda:0"), torch.bfloat16, 64)
            print(f"  ok attention in bfloat16: {name}")
        except UserError as error:
            print(f"  -  {error}")
