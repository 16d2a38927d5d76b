"""What names say of documents: the split and the group that they belong to, and whether a file describes a data set."""

import re
from functools import lru_cache

#: Words in names that tell which split of a data set a file belongs to, as Hugging Face `datasets` reads them.
SPLIT_OF = dict.fromkeys(("train", "training"), "train")
SPLIT_OF |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLIT_OF |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")

#: Files that describe a data set and are not documents of it.
_DESCRIBES = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation)(\.(md|txt|rst|html?|pdf|bib|cff))?|(dataset_infos?|dataset_dict|state|croissant)\.json|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)


def group_of_id(id: str, separator: str) -> str:
    """The part of an id before the last separator, or all of it where it has none; "" without a separator."""
    return (id.rpartition(separator)[0] or id) if separator else ""


def describes_data_set(name: str) -> bool:
    """Whether a file describes a data set (README, LICENSE, …)."""
    return _DESCRIBES.fullmatch(name.rpartition("/")[2]) is not None


def split_of(name: str) -> str:
    """The split in the name of a file that holds many documents, or of one of its folders; or ""."""
    *folders, base = name.lower().split("/")
    words = [word for step in (*folders, base.rpartition(".")[0]) for word in re.split(r"[^a-z]+", step)]
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), "")


def folder_split_of(name: str) -> str:
    """As `split_of`, by the folders alone: `train.png` may show a train."""
    return _split_of_folders(name.rpartition("/")[0])


@lru_cache(maxsize=1024)
def _split_of_folders(folders: str) -> str:
    return split_of(f"{folders}/")
