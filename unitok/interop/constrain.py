"""The grammar for transformers' `generate`, so that an exported decoder generates images and audio there, too.

    model = AutoModelForCausalLM.from_pretrained(OUT)                         # OUT of `unitok export hf-qwen3 BUNDLE OUT`
    grammar = GrammarLogitsProcessor.from_pretrained(OUT, modalities="image:8x8", max_new_tokens=128)
    ids = model.generate(prompt, max_new_tokens=128, logits_processor=[grammar])

Prompts are ids, bos first, padded on the left. `Vocab.decode` decodes what is generated.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.files import read_json
from unitok.grammar import Grammar, Row
from unitok.intervals import holds
from unitok.plan import parse_plan
from unitok.vocab import Vocab

try:
    from transformers import LogitsProcessor
except ImportError:
    raise UserError("this needs the package transformers: pip install 'unitok-lm[transformers]'") from None


class GrammarLogitsProcessor(LogitsProcessor):
    """Sets the scores of tokens that the grammar does not allow to -inf, also in beam search. Make one for each call of `generate`.

    Args:
        vocab: the vocabulary that the model was trained on.
        modalities: `free`, or a plan such as `text,image:8x12`, which ends with eos.
        rates: frames per second of the audio tokenizer, for `audio:2s`: `{"audio": 50.0}`.
        max_new_tokens: that of `generate`. No image or audio begins that does not fit.
    """

    def __init__(
        self, vocab: Vocab, modalities: str = "free", max_new_tokens: int = 512, rates: Mapping[str, float] | None = None
    ):
        self.grammar, self.plan, self.max_new_tokens = Grammar(vocab), parse_plan(modalities, vocab, rates), max_new_tokens
        self._rows: dict[tuple[int, ...], Row] = {}

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, modalities: str = "free", max_new_tokens: int = 512, rates: Mapping[str, float] | None = None
    ) -> "GrammarLogitsProcessor":
        """Read the vocabulary from the folder that `unitok export` wrote (`unitok_ids.json`)."""
        path = Path(folder) / "unitok_ids.json"
        known = read_json(path, "export the bundle again; a decoder's folder alone has no vocabulary")
        return cls(Vocab.from_manifest(known["manifest"]), modalities, max_new_tokens, rates)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids [B, T] so far and scores [B, V] of the next token -> scores [B, V]."""
        mask, eos = torch.ones_like(scores, dtype=torch.bool), self.grammar.vocab.eos
        rows: dict[tuple[int, ...], Row] = {}
        for b, ids in enumerate(map(tuple, input_ids.tolist())):
            row = rows[ids] = rows.get(ids) or self._follow(ids)
            for start, stop in [(eos, eos + 1)] if row.state == "done" else row.allowed():
                mask[b, start:stop] = False
        self._rows = rows
        return scores.masked_fill(mask, -torch.inf)

    def _follow(self, ids: tuple[int, ...]) -> Row:
        """Return the grammar's state after the ids of a row: one id after that of the last call, or after the prompt."""
        vocab = self.grammar.vocab
        before = self._rows.get(ids[:-1])
        if before is not None:
            row = before.copy()
            if row.state != "done" and holds(row.allowed(), ids[-1]):
                row.advance(ids[-1])
            else:  # also a beam of probability 0: there are some where fewer tokens are allowed than there are beams
                row.state = "done"
            return row
        start = next((i for i, id in enumerate(ids) if id != vocab.pad), 0)
        prompt = torch.tensor(ids[start:]).numpy()
        return self.grammar.follow(prompt, complete=False).copy_for(self.max_new_tokens, self.plan)
