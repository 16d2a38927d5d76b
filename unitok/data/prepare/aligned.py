"""Aligned folders: one folder per modality, in which files of equal relative paths are one document, as 4M lays out its data.

    rgb/x/1.jpg   depth/x/1.png   labels/x/1.png   caption/x/1.txt      or the same inside train/, val/, …

A source is read in this way where everything in it lies in folders with such names, at least two of them. The parts of a document stand
in the order of `FOLDERS`: texts, images, maps, audio. The names of all its files are held in memory.
"""

import logging
from collections import Counter
from pathlib import Path, PurePosixPath

from unitok.data.prepare.fields import TEXT, text_of
from unitok.data.prepare.items import SourceItem
from unitok.data.prepare.listing import may_hold_many
from unitok.data.prepare.recipe import SourceSpec
from unitok.data.prepare.splits import describes_data_set, folder_split_of, group_of_id
from unitok.document import Part
from unitok.errors import UserError
from unitok.media import promised, sniff_bytes
from unitok.media.maps import MAPS
from unitok.modalities import modality_of
from unitok.storage import Blob, Files

log = logging.getLogger("unitok")

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
    """Whether a source is aligned folders: all of its files, but those that describe it, lie in folders of at least two modalities."""
    found: set[str] = set()
    foreign = ""
    for names, _ in files.folders():
        for name in (name for name in names if not describes_data_set(name)):
            split = split_name(name)
            if split is None or may_hold_many(name, set()) or not _suits(split[0], name):
                foreign = foreign or name
                if len(found) < 2:
                    return False
            else:
                found.add(split[0])
    if foreign and len(found) > 1 and any(FOLDERS[folder] in MAPS for folder in found):
        log.warning("%s is not in a folder of a modality: files are not read as aligned folders", foreign)
    return len(found) > 1 and not foreign


def _suits(folder: str, name: str) -> bool:
    """Whether a file in a folder of maps can be one."""
    return FOLDERS[folder] not in MAPS or promised(name) == "an image" or name.endswith(".npy")


def aligned_items(files: Files, left_out: Counter[str], group_separator: str = "") -> list[SourceItem]:
    """List the documents of aligned folders. left_out: counts what is left out. group_separator: as `SourceSpec.group_separator`."""
    documents: dict[str, list[tuple[str, int, int]]] = {}
    items = []
    for names, known in files.folders():
        for name in names:
            f = known.get(name) or files.look(name)
            split = split_name(name)
            if describes_data_set(name) or split is None:
                left_out["files that describe a data set"] += 1
            elif f.problem:
                items.append(SourceItem("", f.name, "error", error=f"{f.name}: {f.problem}"))
            else:
                documents.setdefault(split[1], []).append((name, f.stamp, f.size))
    order, splits = list(FOLDERS), {folder_split_of(id) for id in documents}
    has_splits = len(splits - {""}) > 1 and "train" in splits
    for id in sorted(documents):
        members = sorted(documents[id], key=lambda member: order.index((split_name(member[0]) or ("caption", ""))[0]))
        split_of_id, group = folder_split_of(id) if has_splits else "", group_of_id(id, group_separator)
        items.append(SourceItem(id, id, "aligned", members=tuple(members), split=split_of_id, group=group))
    return items


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
