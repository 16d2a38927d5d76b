"""The built-in configurations: one complete YAML per training run, whose header says purpose, command, hardware and time."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from unitok.errors import UserError

CONFIGS = Path(str(files(__name__)))


def config_file(name: str) -> Path:
    """Return the file `name` where there is one, else the built-in configuration: `scenes/image.yaml`, also `configs/scenes/image.yaml`.

    Errors: `UserError` where there is neither.
    """
    built_in = CONFIGS / name.removeprefix("configs/")
    for path in (Path(name), built_in):
        if path.is_file():
            return path
    names = [path.relative_to(CONFIGS).as_posix() for path in sorted(CONFIGS.rglob("*.yaml"))]
    near = get_close_matches(name.removeprefix("configs/"), names, 1)
    hint = f"did you mean {near[0]}?" if near else f"the built-in ones are {', '.join(names)}"
    raise UserError(f"{name}: no such file, and no built-in configuration of that name; {hint}")
