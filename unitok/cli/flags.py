"""Flags from typed, documented functions: a verb's signature and docstring are its command line.

Positional parameters are positional arguments: one that may be None may be left out, a list takes one or more. Keyword-only
parameters are flags: a `bool` is a switch, `bool | None` a pair of them, a list may be repeated, a `Literal` is a choice. What
`Annotated` adds may be the choices, with their meanings in a dict; a check of the value, which may return what to pass on instead; or something with `flags`, which makes
several. Sections of the docstring beside `Args:` are groups of the help. jsonargparse, which serves LightningCLI, writes flags with
underscores, makes all that is required positional, keeps no order between flags, and takes 0.12 s to import (argparse 0.01).
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from unitok.errors import UserError, visible


def run(function: Callable[..., None], prog: str, arguments: Sequence[str]) -> None:
    """Call a function with what a command line gives it. Errors: `UserError`; exit code 2 where the flags do not fit."""
    parser = make_parser(function, prog)
    hints = get_type_hints(function, include_extras=True)
    values: dict[str, Any] = {name: {} for name in inspect.signature(function).parameters}
    for name, value in vars(parser.parse_args(arguments)).items():
        parameter, *path = name.split(".")
        if not path:
            values[parameter] = value
        elif value is not None:
            values[parameter].setdefault(path[0], {})[path[1]] = value
    try:
        for name, value in values.items():
            for check in filter(callable, _marks(hints[name])):
                if isinstance(value, list):
                    for one in value:
                        check(one)
                elif value:
                    values[name] = check(value) or value
        function(**values)
    except UserError as error:
        actions = parser._option_string_actions
        paths = [flag for flag, action in actions.items() if action.type not in (str, int, float)]
        raise UserError(name_flags(str(error), actions, paths)) from None


def make_parser(function: Callable[..., None], prog: str) -> argparse.ArgumentParser:
    """The parser of a function's arguments."""
    description, sections = read_docstring(function)
    parser = _Parser(prog=prog, description=description)
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    for title, entries in sections.items():
        group: Any = parser if title == "Args" else parser.add_argument_group(title)
        for name, text in entries.items():
            for flag, options in _flags(parameters[name], hints[name], text):
                group.add_argument(flag, **options)
    shown = [prog]
    for action in parser._actions:
        name = str(action.metavar or action.dest.upper())
        if not action.option_strings:
            shown.append({"?": f"[{name}]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name))
        elif action.required:
            shown.append(f"{action.option_strings[0]} {name}")
    parser.usage = " ".join([*shown, "[options]"])
    return parser


def read_docstring(owner: Any) -> tuple[str, dict[str, dict[str, str]]]:
    """What stands before the first section, and the entries `name: text` of each section; `a, b: text` is two entries."""
    description, *rest = re.split(r"^(\S.*):$", inspect.getdoc(owner) or "", flags=re.MULTILINE)
    sections = {}
    for title, body in zip(rest[::2], rest[1::2]):
        indented = re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0]
        _, *parts = re.split(r"^ {4}(\w+(?:, \w+)*): ", indented, flags=re.MULTILINE)
        entries = [(names.split(", "), " ".join(text.split())) for names, text in zip(parts[::2], parts[1::2])]
        sections[title] = {name: text for names, text in entries for name in names}
    return " ".join(description.split()), sections


def flag_of(*words: str) -> str:
    """The flag of a name."""
    return "--" + "-".join(words).replace("_", "-")


def of_type(hint: Any) -> dict[str, Any]:
    """What `add_argument` takes for a type."""
    origin, inner = get_origin(hint), [kind for kind in get_args(hint) if kind is not NoneType]
    if hint is bool or inner == [bool]:
        return {"action": "store_true" if hint is bool else argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"type": str, "choices": tuple(inner)}
    if origin is Annotated and isinstance(inner[1], Iterable):
        return of_type(inner[0]) | {"choices": tuple(inner[1])}
    if origin is list:
        return of_type(inner[0]) | {"action": "append"}
    return of_type(inner[0]) if origin else {"type": hint}


def described(text: str, default: Any) -> str:
    """A help text with the default behind it, unless there is none, or the text says what happens there, as in `0: all`."""
    none = default is None or default is False or default in ("", [])
    said = none or "(default" in text or f"{str(default).removesuffix('.0')}: " in text
    return (text if said else f"{text} (default: {default})").replace("%", "%%")


def name_flags(message: str, flags: Iterable[str], paths: Collection[str] = ()) -> str:
    """A library's message with flags in place of its arguments: `max_new_tokens` anywhere, `seed is -1` and `image: area 0` where it begins.

    paths: flags whose values are paths; their name before a colon may be such a path.
    """
    for flag in sorted(flags, key=len, reverse=True):
        words = flag.lstrip("-").split("-")
        if len(words) > 1:
            message = re.sub(rf"(?<![\w/.'\"-]){'_'.join(words)}(?![\w/'\"-])", flag, message)
        behind = r" is | [-./\d'\"\[]" + ("" if flag in paths else "|:")
        message = re.sub(rf"(?:^|(?<=: )){'(?:_|: |[. ])'.join(words)}(?={behind})", flag, message)
    return message


def _marks(hint: Any) -> list[Any]:
    """What `Annotated` adds to a type, or to one in it."""
    own = list(get_args(hint)[1:]) if get_origin(hint) is Annotated else []
    return own + [mark for inner in get_args(hint) for mark in _marks(inner)]


def _flags(parameter: inspect.Parameter, hint: Any, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `add_argument` takes for a parameter, per flag."""
    for mark in _marks(hint):
        if hasattr(mark, "flags"):
            yield from mark.flags(parameter.name, text)
            return
        if isinstance(mark, Mapping):
            text = f"{text} {'; '.join(f'{choice}: {meaning}' for choice, meaning in mark.items())}"
    needed = parameter.default is parameter.empty
    options = of_type(hint) | {"help": described(text, None if needed else parameter.default)}
    if parameter.kind is parameter.KEYWORD_ONLY:
        yield flag_of(parameter.name), options | ({"required": True} if needed else {"default": parameter.default})
    else:
        nargs = "+" if options.pop("action", None) else "?" if NoneType in get_args(hint) else None
        yield parameter.name, options | {"nargs": nargs}


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Reports an unknown option, with the nearest one, before a required one that is missing for it."""
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            known = any(flag.startswith(name) for flag in self._option_string_actions)
            if name.startswith("--") and " " not in name and not known:
                near = get_close_matches(name, self._option_string_actions, 1)
                self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"error: {visible(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)
