"""The map holds: imports point one way, and codes become ids in one place."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "unitok"
FREE = {
    "unitok",
    "unitok.errors",
    "unitok.data",
    "unitok.data.media",
    "unitok.pretrained",
    "unitok.checkpoints",
    "unitok.memory",
    "unitok.hardware",
    "unitok.training",
}

#: What each room may import of ours, besides FREE. Rooms not listed sit on top.
MAY = {
    "unitok.errors": set(),
    "unitok.data.mpeg": set(),
    "unitok.data.formats": {"unitok.data.mpeg", "unitok.errors"},
    "unitok.data.image_files": {"unitok.data.formats", "unitok.errors"},
    "unitok.data.byte_source": set(),
    "unitok.data.flac": {"unitok.data.byte_source"},
    "unitok.data.audio_streams": {"unitok.data.byte_source", "unitok.data.flac", "unitok.data.mpeg"},
    "unitok.data.audio_files": {"unitok.data.audio_streams", "unitok.data.byte_source", "unitok.data.formats", "unitok.errors"},
    "unitok.data.media": {"unitok.data.formats", "unitok.data.image_files", "unitok.data.audio_files", "unitok.errors"},
    "unitok.document": {"unitok.errors"},
    "unitok.vocab": {"unitok.document", "unitok.errors"},
    "unitok.grammar": {"unitok.vocab", "unitok.document", "unitok.errors"},
    "unitok.tokenizers": {"unitok.tokenizers"},
    "unitok.model": {"unitok.model"},
    "unitok.training": {"unitok.errors", "unitok.checkpoints"},
    "unitok.checkpoints": {"unitok.errors"},
    "unitok.pretrained": {"unitok.errors"},
    "unitok.memory": set(),
    "unitok.hardware": set(),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "unitok"}


def test_imports_point_one_way():
    checked = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("unitok", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        room = name if name in MAY else ".".join(name.split(".")[:2])
        if room not in MAY:
            continue
        free = FREE if room in ("unitok.tokenizers", "unitok.model") else set()
        for used in imports(path):
            fits = used in free or any(used == m or used.startswith(f"{m}.") for m in MAY[room])
            assert fits, f"{name} must not import {used}"
        checked += 1
    assert checked > 15


def test_only_the_vocabulary_turns_codes_into_ids():
    users = {p.name for p in PACKAGE.rglob("*.py") if ".to_ids(" in p.read_text() or ".to_codes(" in p.read_text()}
    assert users == {"vocab.py"}


def test_public_functions_say_what_they_do():
    silent = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or path.read_text().strip() == "", path
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                silent.append(f"{path.name}:{node.name}")
    assert not silent
