"""Build an argparse parser from a function: its signature and docstring are the command line of a verb.

Positional parameters become positional arguments. One with a default, or with None in its type, is optional; a list takes one or more values.
Keyword-only parameters become flags. A `bool` is a switch, `bool | None` is a pair such as --causal and --no-causal, a list is a
flag that may be repeated, and a `Literal` is a choice. `Annotated` may add a collection of choices (a dict also gives their
meanings), a function that checks the value and may return another one to pass on, or an object with a method `flags`, which makes
several flags of one parameter. Sections of the docstring other than `Args:` become groups of the help.

LightningCLI's jsonargparse is not used: its flags have underscores, required parameters become positional, the order of different
flags is lost, and importing it takes 0.12 s (argparse: 0.01 s).
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


class Written(str):
    """A path or name as it was written: a Path forgets a `./` at its beginning. A check that takes it gets it in place of a Path."""

    __slots__ = ()


Options = dict[str, Any]  #: keyword arguments of `add_argument`


def run(function: Callable[..., None], prog: str, arguments: Sequence[str]) -> None:
    """Parse a command line and call the function with the values.

    Args:
        function: of a verb.
        prog: the command, for the help.
        arguments: the words after the verb.

    Raises:
        UserError: of the function, with flags in place of its arguments.
        SystemExit: exit code 2 for a command line that cannot be parsed.
    """
    parser = make_parser(function, prog)
    hints = get_type_hints(function, include_extras=True)
    values: Options = {name: {} for name in inspect.signature(function).parameters}
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
    """Return the parser for the parameters of a function."""
    description, sections = read_docstring(function)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    for title, entries in sections.items():
        group = parser if title == "Args" else parser.add_argument_group(title)
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


def read_docstring(owner: object) -> tuple[str, dict[str, dict[str, str]]]:
    """Parse a docstring of Google's style.

    Args:
        owner: a function or class.

    Returns:
        The text before the first section, and {section: {name: text}}. An entry `a, b: text` gives two names.
    """
    description, *rest = re.split(r"^(\S.*):$", inspect.getdoc(owner) or "", flags=re.MULTILINE)
    sections = {}
    for title, body in zip(rest[::2], rest[1::2]):
        indented = re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0]
        _, *parts = re.split(r"^ {4}(\w+(?:, \w+)*): ", indented, flags=re.MULTILINE)
        entries = [(names.split(", "), " ".join(text.split())) for names, text in zip(parts[::2], parts[1::2])]
        sections[title] = {name: text for names, text in entries for name in names}
    return " ".join(description.split()), sections


def flag_of(*words: str) -> str:
    """Return the flag for the words of a name: `max_new_tokens` becomes `--max-new-tokens`."""
    return "--" + "-".join(words).replace("_", "-")


def of_type(hint: object) -> Options:
    """Return the keyword arguments of `add_argument` for a type."""
    origin, inner = get_origin(hint), [kind for kind in get_args(hint) if kind is not NoneType]
    if hint is bool or inner == [bool]:
        return {"action": "store_true" if hint is bool else argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"type": str, "choices": tuple(inner)}
    if origin is Annotated and isinstance(inner[1], Iterable):
        return of_type(inner[0]) | {"choices": tuple(inner[1])}
    if origin is Annotated and Written in getattr(inner[1], "__annotations__", {}).values():
        return {"type": Written}
    if origin is list:
        return of_type(inner[0]) | {"action": "append"}
    return of_type(inner[0]) if origin else {"type": hint}


def described(text: str, default: object) -> str:
    """Return a help text followed by the default, unless there is none or the text explains it, as in `0: all`."""
    none = default is None or default is False or default in ("", [])
    explained = none or "(default" in text or f"{str(default).removesuffix('.0')}: " in text
    return (text if explained else f"{text} (default: {default})").replace("%", "%%")


def name_flags(message: str, flags: Iterable[str], paths: Collection[str] = ()) -> str:
    """Replace the names of arguments in a message by flags.

    `max_new_tokens` is replaced anywhere. `seed is -1` and `image: area 0` are replaced at the beginning of the message or after a colon.

    Args:
        message: of a `UserError` of the library.
        flags: all flags of the verb.
        paths: flags whose values are paths: their name before a colon may be a path, and is kept.
    """
    for flag in sorted(flags, key=len, reverse=True):
        words = flag.lstrip("-").split("-")
        if len(words) > 1:
            message = re.sub(rf"(?<![\w/.'\"-]){'_'.join(words)}(?![\w/'\"-])", flag, message)
        behind = r" is | [-./\d'\"\[]" + ("" if flag in paths else "|:")
        message = re.sub(rf"(?:^|(?<=: )){'(?:_|: |[. ])'.join(words)}(?={behind})", flag, message)
    return message


def _marks(hint: object) -> list[object]:
    """Return what `Annotated` adds to a type or to the types in it."""
    own = list(get_args(hint)[1:]) if get_origin(hint) is Annotated else []
    return own + [mark for inner in get_args(hint) for mark in _marks(inner)]


def _flags(parameter: inspect.Parameter, hint: object, text: str) -> Iterator[tuple[str, Options]]:
    """Yield the arguments of `add_argument` for each flag of a parameter."""
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
        optional = NoneType in get_args(hint) or not needed
        nargs = "+" if options.pop("action", None) else "?" if optional else None
        yield parameter.name, options | {"nargs": nargs} | ({} if needed else {"default": parameter.default})


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Report an unknown option, with the nearest match, before argparse reports missing required ones."""
        for word in takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                near = get_close_matches(name, self._option_string_actions, 1)
                self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        print(f"error: {visible(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)
