"""`UserError`, the exception for mistakes that the user can fix, and text that is safe to show in a terminal or on a page.

The command line prints a `UserError` as one line and exits with code 2; everything else is a bug and keeps its traceback.
"""

import math
import re


class UserError(ValueError):
    """A mistake that the user can fix. The message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 120 characters; the type's name if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


def type_of(value: object) -> str:
    """The type of a value, with its article, for messages: `an int`, `a dict`, `None`."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def check_range(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise `UserError` for a number outside of a range; None is one that was not given."""
    if value is not None and not least <= value <= most:
        raise UserError(
            f"{name} {value}: it must be " + (f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}")
        )


#: Control characters, characters that end a line or change its direction, and surrogates, which UTF-8 cannot encode.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, lines: bool = False) -> str:
    """Return a text that is safe to show: control characters become escapes such as `\\x1b`.

    Args:
        text: anything; `str()` of it is shown.
        lines: keep line feeds and tabs.
    """

    def escape(match: re.Match[str]) -> str:
        if lines and match[0] in "\n\t":
            return match[0]
        surrogate = "\udc80" <= match[0] <= "\udcff"  # a byte of a file name that is not UTF-8
        return f"\\x{ord(match[0]) - 0xDC00:02x}" if surrogate else match[0].encode("unicode_escape").decode()

    return _UNSAFE.sub(escape, str(text))


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8. A lone surrogate cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
