"""Mistakes that their user can mend: the exception that says so, and reading JSON, where they often are.

The command line prints a `UserError` as one line and exits with code 2; everything else is a bug and keeps its traceback.
"""

import json
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


def read_json(path: Path, absent: str) -> Any:
    """What a JSON file holds; errors: `UserError` naming the file, `absent` says what to do where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {absent}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
