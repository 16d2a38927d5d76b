"""`unitok doctor`: what is installed, what works, and what to do about the rest. Nothing is fetched."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from unitok.errors import UserError
from unitok.hardware import bound_waiting, fast_bfloat16

_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}  # where the name differs from the package's
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


def doctor() -> None:
    """What is installed, what works, and what to do about the rest."""
    raise SystemExit(report())


def core() -> list[str]:
    """The packages that unitok needs, by what its installer was told. Errors: `UserError` where it was not installed."""
    try:
        needed = requires("unitok-lm") or []
    except PackageNotFoundError:
        raise UserError("unitok is not installed: pip install -e . in its checkout") from None
    return [re.split(r"[^\w-]", line)[0] for line in needed if "extra ==" not in line]


def report() -> int:
    """Print the report; -> 0 if everything that unitok needs works, else 1."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    problems = 0
    for name in core():
        problems += not _line(name, _MODULES.get(name, name.replace("-", "_")), f"pip install '{name}'")
    for name, (module, purpose, remedy) in EXTRAS.items():
        try:
            version(name)
        except PackageNotFoundError:
            if name not in ("torchvision", "torchaudio"):
                print(f"  -  {name:<24}{'not installed':<16}{purpose}: {remedy}")
            continue
        _line(name, module, remedy)
    problems += not _devices()
    print("everything that unitok needs works" if not problems else f"{problems} problems; see the lines marked !!")
    return int(problems > 0)


def _line(name: str, module: str, remedy: str) -> bool:
    """Try an import in a process of its own: a broken extension may take the process down."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        print(f"  !! {name:<24}{'missing':<16}{remedy}")
        return False
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(f"  ok {name:<24}{installed}")
        return True
    reason = (done.stderr.strip().splitlines() or ["died"])[-1][:110]
    print(f"  !! {name:<24}{installed:<16}does not load: {reason}; {remedy}")
    return False


def _devices() -> bool:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return False
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(f"  ok cuda:{i} {torch.cuda.get_device_name(i)}")
    else:
        print(f"  -  no CUDA device; training and sampling run on {torch.get_num_threads()} CPU threads")
    print(f"  -  OpenMP: {bound_waiting()}")
    print(f"  -  bfloat16 on this CPU: {'fast' if fast_bfloat16() else 'slow: keep trainer.precision at 32-true'}")
    if not shutil.which("g++"):
        print("  -  no g++: torch.compile on CPU needs it; nothing in unitok requires it")
    return True
