"""The map holds: imports point one way, and codes become ids in one place. Everything is read from the source, nothing is run."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "unitok"
parse = functools.cache(ast.parse)

#: The house from the ground up. A room, a file or a folder, may import the rooms that stand before it, except those
#: named behind it. What stands in no room is an error, so that a new file gets its place here.
LANGUAGE = (
    "unitok.document",
    "unitok.content",
    "unitok.generation_config",
    "unitok.layouts",
    "unitok.ranges",
    "unitok.vocab",
    "unitok.location",
    "unitok.plan",
    "unitok.holes",
    "unitok.grammar",
    "unitok.filling",
)
HOUSE: dict[str, tuple[str, ...]] = {
    "unitok.errors": (),
    "unitok.keywords": (),
    "unitok.configs": (),
    "unitok.lazy": (),
    "unitok.hardware": (),
    "unitok.files": (),
    "unitok.hub": (),
    "unitok.storage": (),
    "unitok.pages": (),
    "unitok.checkpoints": (),
    "unitok.pretrained": (),
    "unitok.media": (),
    "unitok.document": (),
    "unitok.content": (),
    "unitok.generation_config": (),
    "unitok.intervals": (),
    "unitok.span_positions": (),
    "unitok.layouts": (),
    "unitok.ranges": (),
    "unitok.vocab": (),
    "unitok.location": (),
    "unitok.plan": (),
    "unitok.holes": (),
    "unitok.grammar": (),
    "unitok.filling": (),
    "unitok.tokenizers": LANGUAGE,  # networks know codes, not documents
    "unitok.model": (*LANGUAGE, "unitok.tokenizers", "unitok.media"),
    "unitok.modalities": ("unitok.model",),
    "unitok.interleaved": ("unitok.model",),
    "unitok.conversations": ("unitok.model",),
    "unitok.bundle": (),
    "unitok.sample": (),
    "unitok.data": ("unitok.sample",),
    "unitok.training": (),
    "unitok.api": (),
    "unitok.evaluate": (),
    "unitok.interop": (),
    "unitok.scenes": (),
    "unitok.serve": ("unitok.scenes", "unitok.training"),
    "unitok": (),
    "unitok.cli": (),
    "unitok.__main__": (),
}

#: Kinds of content, those to come too.
KINDS = ("text", "image", "audio", "box", "video", "speech", "music")

#: Where codes become ids.
VOCABULARY = ("unitok.ranges", "unitok.vocab")


def sources() -> dict[str, str]:
    """The source of each module by its name; a package is its `__init__.py`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(("unitok", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")] = (
            path.read_text()
        )
    return found


@functools.cache
def imports(name: str, source: str, modules: frozenset[str]) -> set[str]:
    """Which of `modules` a module imports anywhere in it: in functions, under TYPE_CHECKING, relatively, or by a string."""
    package = name if any(module.startswith(f"{name}.") for module in modules) else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {module for module in found if isinstance(module, str) and module.split(".")[0] == "unitok"} - {name}


def room_of(module: str) -> str | None:
    """The innermost room that a module stands in."""
    while module and module not in HOUSE:
        module = module.rpartition(".")[0]
    return module if module != "unitok" else None


def violations(modules: dict[str, str]) -> list[str]:
    """What breaks the map, in words."""
    order = list(HOUSE)
    wrong, within = [], {}
    for name, source in modules.items():
        room = "unitok" if name == "unitok" else room_of(name)
        if room is None:
            wrong.append(f"{name} stands in no room: give it one in HOUSE")
            continue
        within[name] = set()
        for other in sorted(imports(name, source, frozenset(modules))):
            there = "unitok" if other == "unitok" else room_of(other)
            if other not in modules:
                wrong.append(f"{name} imports {other}, which is not there")
            elif there is None:
                continue  # said above
            elif there != room and (order.index(there) > order.index(room) or there in HOUSE[room]):
                wrong.append(f"{name} must not import {other}")
            else:
                within[name].add(other)
    try:
        graphlib.TopologicalSorter(within).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle: {' imports '.join(reversed(error.args[1]))}")
    return wrong


def test_imports_point_one_way():
    modules = sources()
    assert violations(modules) == []
    assert {room_of(name) or name for name in modules} == set(HOUSE)  # every room is there, every file in one


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("unitok.model.loss", "import unitok.vocab", "unitok.model.loss must not import unitok.vocab"),
        ("unitok.model.loss", "import unitok.vocab as v", "must not import unitok.vocab"),
        ("unitok.model.loss", "from unitok.vocab import Vocab", "must not import unitok.vocab"),
        ("unitok.model.loss", "from unitok import vocab", "must not import unitok.vocab"),
        ("unitok.model.loss", "from unitok import Unitok", "must not import unitok"),
        ("unitok.model.loss", "from unitok.data import shards", "must not import unitok.data.shards"),
        ("unitok.model.loss", "from unitok.media import formats", "must not import unitok.media.formats"),
        ("unitok.model.loss", "from .. import vocab", "must not import unitok.vocab"),
        ("unitok.model.loss", "from ..vocab import Vocab", "must not import unitok.vocab"),
        ("unitok.model.loss", "from ..data.shards import TokenDataset", "must not import unitok.data.shards"),
        ("unitok.tokenizers", "from ..model import Decoder", "unitok.tokenizers must not import unitok.model"),
        ("unitok.tokenizers.text", "def f():\n    from unitok.grammar import Row", "must not import unitok.grammar"),
        ("unitok.document", "if TYPE_CHECKING:\n    from unitok.bundle import Bundle", "must not import unitok.bundle"),
        ("unitok.errors", "try:\n    import unitok.cli\nexcept ImportError: ...", "must not import unitok.cli"),
        ("unitok.vocab", "importlib.import_module('unitok.grammar')", "must not import unitok.grammar"),
        ("unitok.sample.engine", "from unitok.data.shards import TokenDataset", "must not import unitok.data.shards"),
        ("unitok.bundle", "from unitok.data.prepare import plan", "must not import unitok.data.prepare.plan"),
        ("unitok.data.prepare.plan", "from unitok.data.prepare import tokenize", "a circle: "),
        ("unitok.training.shell", "import unitok.gone", "imports unitok.gone, which is not there"),
    ],
)
def test_an_import_against_the_order_is_found_in_every_form(name, line, says):
    modules = sources()
    (found,) = set(violations(modules | {name: f"{modules[name]}\n{line}\n"})) - set(violations(modules))
    assert says in found
    assert name in found


def test_a_new_file_needs_a_room():
    modules = sources()
    assert "unitok.attic stands in no room: give it one in HOUSE" in violations(modules | {"unitok.attic": ""})


def arithmetic_of_ids(modules: dict[str, str]) -> set[str]:
    """`module:Class.function` outside the vocabulary that turns codes into ids or back: by the two methods, or by a range's offset."""
    found = set()

    def visit(node: ast.AST, where: str, name: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}" if where else node.name
        called = isinstance(node, ast.Attribute) and node.attr in ("to_ids", "to_codes")
        sums = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub)
        if called or (sums and any(isinstance(n, ast.Attribute) and n.attr == "offset" for n in ast.walk(node))):
            found.add(f"{name}:{where}")
        for child in ast.iter_child_nodes(node):
            visit(child, where, name)

    below = list(HOUSE)[: list(HOUSE).index("unitok.vocab")]  # what stands below knows no ranges
    for name, source in modules.items():
        if name not in VOCABULARY and room_of(name) not in below:
            visit(parse(source), "", name)
    return found


def test_only_the_vocabulary_turns_codes_into_ids():
    assert arithmetic_of_ids(sources()) == set()


@pytest.mark.parametrize(
    "line",
    [
        "ids = vocab.range('image').to_ids(codes)",
        "codes = r.to_codes(ids)",
        "ids = r.offset + codes",
        "codes = [int(id) - vocab.range(n).offset for id, n in pairs]",
        "ids += self.range.offset",
    ],
)
def test_codes_that_become_ids_elsewhere_are_found(line):
    body = f"class Reader:\n    def read(self, codes):\n        {line}\n"
    assert arithmetic_of_ids({"unitok.data.planted": body, "unitok.vocab": body}) == {"unitok.data.planted:Reader.read"}


#: Rooms that may know a modality by its name.
KNOWING = ("unitok.modalities", "unitok.interop", "unitok.scenes", "unitok.serve")


def comparisons(source: str) -> list[int]:
    """Lines that do something else for one modality than for another: compare its name, match it, or look it up in a dict."""

    def names(node: ast.AST | None) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(names, node.elts))
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS

    found = []
    for node in ast.walk(parse(source)):
        compared = isinstance(node, ast.Compare) and any(map(names, (node.left, *node.comparators)))
        matched = isinstance(node, ast.MatchValue) and names(node.value)
        looked_up = (isinstance(node, ast.Subscript) and names(node.slice)) or (
            isinstance(node, ast.Dict) and any(map(names, node.keys))
        )
        if compared or matched or looked_up:
            found.append(node.value.lineno if isinstance(node, ast.MatchValue) else node.lineno)
    return found


def test_a_modality_is_known_by_name_in_its_own_room_alone():
    elsewhere = {name: source for name, source in sources().items() if not name.startswith(KNOWING)}
    assert [f"{name}:{line}" for name, source in elsewhere.items() for line in comparisons(source)] == []


@pytest.mark.parametrize(
    "line",
    [
        "if segment.modality == 'image': ...",
        "return 'audio' != kind",
        "if kind in ('image', 'audio'): ...",
        "x = 1 if kind not in {'text'} else 2",
        "decoders = {'text': f, 'image': g}",
        "sizes['audio'] = 3",
        "match kind:\n        case 'text': ...",
        "match kind:\n        case 'box' | 'video': ...",
    ],
)
def test_a_comparison_with_a_modality_is_found_in_every_form(line):
    assert comparisons(f"def f(kind, segment):\n    {line}\n")
    assert not comparisons("def f(kind):\n    return modality_of(kind).encode('image', [kind])\n")


def test_files_and_functions_can_be_read_in_one_sitting():
    long = []
    for name, source in sources().items():
        if len(source.splitlines()) > 450:
            long.append(f"{name}: {len(source.splitlines())} lines")
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 70:
                long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []


def test_public_functions_say_what_they_do():
    silent = []
    for name, source in sources().items():
        tree = parse(source)
        assert ast.get_docstring(tree), name
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            public = public and "overload" not in [ast.unparse(decorator) for decorator in node.decorator_list]
            if public and not ast.get_docstring(node):
                silent.append(f"{name}:{node.name}")
    assert not silent
