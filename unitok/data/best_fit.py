"""Best-fit packing: which documents share a row, from their lengths alone."""

import itertools
from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, sequence_length: int) -> list[np.ndarray]:
    """Pack documents into rows of at most `sequence_length` tokens: best fit, longest first. Returns: document indices per row.

    Rows of equal contents are made together, so its time depends on how many lengths there are, not on how many documents (after Krell
    et al. 2021, "Efficient sequence packing without cross-contamination").
    """
    waiting: dict[
        int, list[tuple[tuple[int, ...], int]]
    ] = {}  # rows with so much room: lengths in them, and how many are alike
    rooms: list[int] = []  # sorted
    full: list[tuple[tuple[int, ...], int]] = []

    def put(room: int, contents: tuple[int, ...], count: int) -> None:
        if not room:
            full.append((contents, count))
        elif count:
            if room not in waiting:
                insort(rooms, room)
            waiting.setdefault(room, []).append((contents, count))

    values, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            position = bisect_left(rooms, length)
            if position == len(rooms):
                room, alike = sequence_length, left  # new rows
                contents: tuple[int, ...] = ()
            else:
                room = rooms[position]
                contents, alike = waiting[room].pop()
                if not waiting[room]:
                    del waiting[room], rooms[position]
            fit = min(room // length, left)  # a row that took one is the tightest for the next
            filled = min(alike, left // fit)
            put(room - fit * length, contents + (length,) * fit, filled)
            if contents:
                put(room, contents, alike - filled)
            left -= fit * filled
    order, taken = np.argsort(-lengths, kind="stable"), dict(zip(values[::-1].tolist(), _starts(counts[::-1]), strict=True))
    rows: list[np.ndarray] = []
    for contents, alike in itertools.chain(full, *waiting.values()):
        columns = []
        for length in contents:
            columns.append(order[taken[length] : taken[length] + alike])
            taken[length] += alike
        rows += list(np.stack(columns, 1))
    return rows


def _starts(counts: np.ndarray) -> list[int]:
    """Where stretches of these sizes begin, one after the other."""
    return (np.cumsum(counts) - counts).tolist()
