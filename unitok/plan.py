"""Plans: which spans an output shall have, as people write them (`text,image:8x12,audio:2s`) and as the grammar follows them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from unitok.errors import UserError
from unitok.intervals import Intervals
from unitok.vocab import Vocab


@dataclass(frozen=True)
class PlanItem:
    """One span of a plan.

    Args:
        modality: the name of the span in the vocabulary.
        grid: the values of its header, (rows, columns) in codes for an image; () leaves them open.
        repeats: number of frames, or of text tokens; None leaves it open.
        given: the tokens of a text that stands there in any case; `repeats` is then their number.
    """

    modality: str
    grid: tuple[int, ...] = ()
    repeats: int | None = None
    given: tuple[int, ...] = ()

    def cost(self, vocab: Vocab) -> int:
        """The smallest number of tokens that the span takes."""
        span = vocab.span(self.modality)
        units = prod(span.sides(self.grid)) if self.grid else self.repeats or 1
        return bool(span.begin) + len(span.header) + span.order.length(units) + bool(span.end)

    @property
    def opening(self) -> Intervals:
        """The first of the given tokens; empty where none are."""
        return ((self.given[0], self.given[0] + 1),) if self.given else ()


def parse_plan(text: str, vocab: Vocab, rates: Mapping[str, float] | None = None) -> list[PlanItem] | None:
    """Parse a plan such as `text,image:8x12,audio:2s`; `free` gives None, no plan.

    rates: frames per second by modality, which turn seconds into frames. Errors: `UserError` that shows the form.
    """
    if text.strip() == "free":
        return None
    items = []
    for item in text.split(","):
        modality, _, length = item.strip().partition(":")
        try:
            modality = vocab.instance(modality)
            span, rate = vocab.span(modality), (rates or {}).get(modality)
        except UserError as error:
            raise UserError(f"modalities {item!r}: {error}") from None
        if not length:
            items.append(PlanItem(modality))
        elif span.header and re.fullmatch("x".join([r"[1-9]\d{0,5}"] * len(span.header)), length):
            grid = tuple(int(side) for side in length.split("x"))
            for name, value in zip(span.header, grid, strict=True):
                if value > (most := vocab.range(name).size):
                    what = "side" if name == span.header[-1] else name
                    raise UserError(f"modalities {item!r}: no {what} may be over {most}")
            items.append(PlanItem(modality, grid))
        elif rate and not span.header and re.fullmatch(r"\d{1,6}(\.\d{1,6})?s", length):
            items.append(PlanItem(modality, repeats=max(1, round(float(length[:-1]) * rate))))
        elif not span.header and re.fullmatch(r"[1-9]\d{0,8}", length):
            items.append(PlanItem(modality, repeats=int(length)))
        else:
            raise UserError(f"modalities {item!r}: write free, or a plan such as text,image:8x12,audio:2s")
    for before, after in zip(items, items[1:], strict=False):
        if before.modality == after.modality == vocab.bare:
            raise UserError(f"modalities {text!r}: two {after.modality}s in a row are one; write it once")
    return items
