"""Mistakes that their user can mend: the exception that says so, and text as a terminal or a page may show it.

The command line prints a `UserError` as one line and exits with code 2; everything else is a bug and keeps its traceback.
"""

import re


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """What an error says, short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


#: What a terminal obeys, what turns the direction of a line or ends it, and what is no UTF-8.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, lines: bool = False) -> str:
    """What a terminal or a page may show: what would act there becomes an escape such as `\\x1b`. lines: keep line feeds, tabs."""

    def escape(match: re.Match[str]) -> str:
        if lines and match[0] in "\n\t":
            return match[0]
        surrogate = "\udc80" <= match[0] <= "\udcff"  # a byte of a file's name that is no UTF-8
        return f"\\x{ord(match[0]) - 0xDC00:02x}" if surrogate else match[0].encode("unicode_escape").decode()

    return _UNSEEN.sub(escape, str(text))


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
