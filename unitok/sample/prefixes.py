"""Keys and values of sequences that were generated before, for prompts that begin with the same tokens."""

from collections.abc import Sequence

import numpy as np

from unitok.model.cache import Cache
from unitok.model.copies import GenerationDecoder


class PrefixCache:
    """The last few sequences that a decoder has read, each with its keys and values.

    entries: how many are kept; the one that was not used for the longest time goes first.
    """

    def __init__(self, entries: int = 4):
        self.entries = entries
        self._kept: list[tuple[np.ndarray, Cache]] = []
        self._decoder: GenerationDecoder | None = None

    def longest(self, ids: Sequence[int] | np.ndarray, decoder: GenerationDecoder) -> tuple[Cache, int] | None:
        """Return the cache (of one slot) of the sequence that begins most like `ids`, and how many tokens they share; None for none.

        The last token of `ids` is never among them: it has to be read to know what comes after it.
        """
        if self._decoder is not decoder:
            return None
        given, best, most = np.asarray(ids), None, 0
        for i, (kept, _) in enumerate(self._kept):
            length = min(len(kept), len(given) - 1)
            different = np.flatnonzero(kept[:length] != given[:length])
            shared = int(different[0]) if len(different) else length
            if shared > most:
                best, most = i, shared
        if best is None:
            return None
        self._kept.append(self._kept.pop(best))
        return self._kept[-1][1], most

    def store(self, ids: Sequence[int] | np.ndarray, cache: Cache, decoder: GenerationDecoder) -> None:
        """Keep what a decoder has read. ids: the tokens; cache: of one slot, whose first len(ids) positions are copied."""
        if self._decoder is not decoder:
            self._decoder, self._kept = decoder, []
        new = np.asarray(ids)
        self._kept = [(kept, c) for kept, c in self._kept if len(kept) > len(new) or (kept != new[: len(kept)]).any()]
        copy = Cache(cache.keys[:, :, :, : len(new)].clone(), cache.values[:, :, :, : len(new)].clone())
        self._kept = [*self._kept, (new, copy)][-self.entries :]
