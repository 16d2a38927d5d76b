"""unitok: one model that reads and writes text, pictures and sound."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unitok.api import Unitok
    from unitok.document import Document, Segment

__version__ = "0.1.0"
__all__ = ["Document", "Segment", "Unitok", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Unitok":
        from unitok.api import Unitok

        return Unitok
    if name in ("Document", "Segment"):
        from unitok import document

        return getattr(document, name)
    raise AttributeError(f"module 'unitok' has no attribute {name!r}")
