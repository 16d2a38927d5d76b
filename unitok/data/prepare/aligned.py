"""Aligned folders: one folder per modality, in which files of equal relative paths are one document, as 4M lays out its data.

    rgb/x/1.jpg   depth/x/1.png   labels/x/1.png   caption/x/1.txt      or the same inside train/, val/, …

A source is read in this way where everything in it lies in folders with such names, at least two of them. The parts of a document stand
in the order of `FOLDERS`: texts, images, maps, audio. The names of all its files are held in memory.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from unitok.data.prepare.fields import TEXT, text_of
from unitok.data.prepare.listing import SourceItem
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.splits import folder_split_of
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import sniff_bytes
from unitok.media.maps import MAPS
from unitok.modalities import modality_of
from unitok.storage import Blob, Files

#: What the files in a folder of a name are: a map, or "" for what their content says.
FOLDERS = dict.fromkeys(("caption", "captions", "text", "rgb", "image", "images"), "")
FOLDERS |= {"labels": "labels", "semantic": "labels", "semseg": "labels", "segmentation": "labels", "depth": "depth"}
FOLDERS |= {"edges": "edges", "canny_edge": "edges", "normal": "normals", "normals": "normals", "surface_normals": "normals"}
FOLDERS |= dict.fromkeys(("audio", "sound"), "")


def split_name(name: str) -> tuple[str, str] | None:
    """Return the folder of a file's modality, and its path without that folder and its suffix; None where it is in none.

    name: relative to the source. The folder is the first step, or the second one after that of a split.
    """
    *steps, base = PurePosixPath(name).parts
    at = 1 if steps and folder_split_of(f"{steps[0]}/") else 0
    if len(steps) <= at or steps[at] not in FOLDERS:
        return None
    rest = PurePosixPath(*steps[:at], *steps[at + 1 :], base)
    return steps[at], str(rest.with_suffix(""))


def is_aligned(files: Files) -> bool:
    """Whether a source is aligned folders: all of its folders with files belong to at least two modalities."""
    found = set()
    for names, _ in files.folders():
        if names:
            split = split_name(names[0])
            if split is None:
                return False
            found.add(split[0])
    return len(found) > 1


def aligned_items(files: Files) -> Iterator[SourceItem]:
    """List the documents of aligned folders."""
    documents: dict[str, list[tuple[str, int, int]]] = {}
    for names, known in files.folders():
        for name in names:
            f = known.get(name) or files.look(name)
            if f.problem:
                yield SourceItem("", f.name, "error", error=f"{f.name}: {f.problem}")
            elif (split := split_name(name)) is not None:
                documents.setdefault(split[1], []).append((name, f.stamp, f.size))
    order = {folder: number for number, folder in enumerate(FOLDERS)}
    for id in sorted(documents):
        members = sorted(documents[id], key=lambda member: order[(split_name(member[0]) or ("caption", ""))[0]])
        yield SourceItem(id, id, "aligned", members=tuple(members), split=folder_split_of(id))


def read_aligned(spec: SourceSpec, files: Files, item: SourceItem) -> list[Part]:
    """Return the parts of a document. Errors: `UserError` for a file of another kind than its folder says."""
    parts = []
    for name, stamp, _ in item.members:
        blob = Blob.of(files, name, stamp)
        folder = (split_name(name) or ("", ""))[0]
        kind = "image" if FOLDERS[folder] in MAPS else sniff_bytes(blob.head(), name)
        if kind is None:
            raise UserError(f"{name}: neither an image nor audio nor UTF-8 text")
        role, loss = spec.defaults(kind)
        if kind == TEXT:
            parts.append(Part(kind, text_of(blob).strip(), role=role, loss=loss))
            continue
        view = modality_of(kind).view({"map": FOLDERS[folder]}, name) if FOLDERS[folder] else ""
        parts.append(Part(kind, path=Path(name), file=blob, role=role, loss=loss, view=view))
    return parts
