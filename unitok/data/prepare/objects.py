"""Labeled boxes of images, as data sets for detection write them: COCO's JSON files, and the `objects` of ImageFolder's rows.

An image's objects become, after the image, the label and the box of each in reading order (rows by the upper edge, then by the left
one), so that there is one right answer to learn.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from unitok.document import Part
from unitok.errors import UserError
from unitok.modalities.box import Boxes

#: The kind of parts that hold boxes.
BOX = "box"

_LABELS = ("categories", "category", "labels", "label", "names", "name")
_PREFIXES = ("instances_", "captions_", "person_keypoints_", "annotations_")

Stretch = tuple[int, int]  # where a value of a JSON text is: start and length in bytes


def object_parts(boxes: Sequence[object], labels: Sequence[object], size: tuple[float, float] | None = None) -> list[Part]:
    """Return the labels and boxes of an image's objects in reading order.

    boxes: x, y, width, height each, in pixels. labels: texts, or numbers of classes. size: width and height of the image that the
    pixels are of; None: of its file. Errors: `UserError` for what is none.
    """
    if len(boxes) != len(labels):
        raise UserError(f"objects: {len(boxes)} boxes, but {len(labels)} labels")
    found = []
    for box, label in zip(boxes, labels, strict=True):
        if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"objects: box {str(box)[:60]}: it is [x, y, width, height] in pixels")
        x, y, width, height = box
        if not isinstance(label, str | int) or not str(label).strip():
            raise UserError(f"objects: label {str(label)[:40]!r}: it is a text or a number")
        found.append(((y, x), str(label), Boxes([[x, y, x + width, y + height]], "pixel", size=size)))
    return [part for _, label, one in sorted(found, key=lambda row: row[0]) for part in (Part("text", label), Part(BOX, one))]


def boxes_part(content: object, text: str) -> Part:
    """Return the part for a `<bbox>` of ms-swift: boxes, or its text where it is none, such as a point.

    content: box, its type and the number of its image. Errors: `UserError` for another type.
    """
    assert isinstance(content, tuple)
    box, unit, image = content
    rows = box if isinstance(box, list) and box and isinstance(box[0], list) else [box]
    if any(not isinstance(row, list) or len(row) != 4 for row in rows):
        return Part("text", text)
    if unit not in ("real", "norm1"):
        raise UserError(f"objects: bbox_type {unit!r}; choose real (pixels) or norm1 (fractions)")
    return Part(BOX, Boxes(rows, "pixel" if unit == "real" else "fraction", image))


def objects_of(objects: Mapping[str, object]) -> list[Part]:
    """Return the parts of a row's field `objects`, `{"bbox": [[x, y, width, height]], "categories": [labels]}`. Errors: `UserError`."""
    boxes = objects.get("bbox")
    if not isinstance(boxes, list):
        raise UserError('objects: it must be {"bbox": [[x, y, width, height]], "categories": [labels]}')
    labels = next((value for name in _LABELS if isinstance(value := objects.get(name), list)), None)
    if labels is None:
        raise UserError(f"objects: no {_LABELS[0]} beside bbox; give a list of labels")
    return object_parts(boxes, labels)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- COCO -------------------------------------------------------------------------------------------------------------


def may_be_coco(head: bytes) -> bool:
    """Whether a JSON file begins as COCO's do: an object whose first keys are theirs."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    keys = (b"info", b"licenses", b"images", b"annotations", b"categories", b"type", b"year", b"version")
    return text.startswith(b"{") and text[1:].lstrip().startswith(tuple(b'"%s"' % key for key in keys))


def is_coco(text: bytes) -> bool:
    """Whether a whole JSON file has COCO's lists of images and annotations."""
    return all(re.search(rb'"%s"\s*:\s*\[' % key, text) for key in (b"images", b"annotations"))


def coco_images(text: str) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Yield the file name of each image of a COCO file's text (one character per byte), and the records of it, of its annotations, and
    of all categories: what they are, start and length in bytes. Errors: `UserError`, and `ValueError` where it is no JSON."""
    found = _find_records(text)
    of_image: defaultdict[object, list[tuple[str, int, int]]] = defaultdict(list)
    for start, length in found["annotations"]:
        of_image[str(_record(text, start, length).get("image_id"))].append(("annotation", start, length))
    categories = [("categories", *stretch) for stretch in found.get("categories", [])]
    for number, (start, length) in enumerate(found["images"], 1):
        row = _record(text, start, length)
        if not isinstance(row.get("file_name"), str) or "id" not in row:
            raise UserError(f"image {number}: an image of COCO has an id and a file_name")
        yield row["file_name"], [("image", start, length), *of_image[str(row["id"])], *categories]


def _record(text: str, start: int, length: int) -> dict[str, Any]:
    row = json.loads(text[start : start + length].encode("latin-1"))
    if not isinstance(row, dict):
        raise UserError(f"{str(row)[:40]!r}, where an object of COCO should be")
    return row


def _find_records(text: str) -> dict[str, list[Stretch]]:
    """Return where the records of COCO's lists are in a JSON text of one character per byte; that of `categories` is one stretch.

    Errors: `UserError` where lists are missing, `ValueError` where it is no JSON.
    """
    decoder, found, at = json.JSONDecoder(), dict[str, list[Stretch]](), text.index("{") + 1
    while True:
        at = _skip(text, at, " \t\r\n,")
        if text.startswith("}", at):
            break
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, at, " \t\r\n:")
        if key in ("images", "annotations") and text.startswith("[", at):
            found[key] = []
            at = _skip(text, at + 1, " \t\r\n,")
            while not text.startswith("]", at):
                _, end = decoder.raw_decode(text, at)
                found[key].append((at, end - at))
                at = _skip(text, end, " \t\r\n,")
            at += 1
        else:
            _, end = decoder.raw_decode(text, at)
            found[key] = [(at, end - at)]
            at = end
    if missing := [key for key in ("images", "annotations") if key not in found]:
        raise UserError(f"no list {missing[0]!r}; COCO's files have images, annotations and categories")
    return found


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    if at == len(text):
        raise ValueError("cut off")
    return at


def coco_folders(name: str) -> Iterator[str]:
    """Yield the folders where a COCO file's images may be, relative to the source, the likeliest first. name: of the file."""
    folder, stem = PurePosixPath(name).parent, PurePosixPath(name).stem
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    for step in (".", "images", stem, f"images/{stem}"):
        yield str(folder / step)
        if folder.name:
            yield str(folder.parent / step)


def coco_parts(records: Sequence[bytes], categories: bytes) -> tuple[list[str], list[Part]]:
    """Return the captions and the labeled boxes of an image; crowds are left out.

    records: the JSON of the image and of its annotations. categories: the JSON of all categories, or nothing.
    """
    image, *annotations = (json.loads(record) for record in records)
    rows = json.loads(categories) if categories else []
    try:
        names = {row["id"]: row["name"] for row in rows}
        size = (float(image["width"]), float(image["height"])) if "width" in image and "height" in image else None
        seen = [a for a in annotations if "bbox" in a and not a.get("iscrowd")]
        if unknown := [a["category_id"] for a in seen if a["category_id"] not in names]:
            raise UserError(f"category {unknown[0]!r} of an annotation is not among the categories")
        labels = [names[a["category_id"]] for a in seen]
        captions = [a["caption"].strip() for a in annotations if isinstance(a.get("caption"), str)]
        return captions, object_parts([a["bbox"] for a in seen], labels, size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"not a record of COCO's ({type(error).__name__}: {error})") from None
