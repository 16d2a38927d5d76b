"""What training reads: token shards, packed rows, folders of images and audio; `prepare` makes shards of raw files."""

from unitok.lazy import attach

__getattr__, __all__ = attach(
    __name__, {"ImageFiles": "modules", "AudioFiles": "modules", "VideoFiles": "modules", "TokenShards": "modules"}
)
