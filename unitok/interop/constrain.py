"""The grammar for transformers' `generate`, so that an exported decoder writes pictures and sounds there, too.

    model = AutoModelForCausalLM.from_pretrained(OUT)                         # OUT of `unitok export hf-qwen3 BUNDLE OUT`
    grammar = GrammarLogitsProcessor.from_pretrained(OUT, modalities="image:8x8", max_new_tokens=128)
    ids = model.generate(prompt, max_new_tokens=128, logits_processor=[grammar])

Prompts are ids, bos first, padded on the left; what is generated decodes with `Vocab.decode`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unitok.errors import UserError
from unitok.files import read_json
from unitok.grammar import Grammar, Row, parse_plan
from unitok.vocab import Vocab

try:
    from transformers import LogitsProcessor
except ImportError:
    raise UserError("this needs the package transformers: pip install 'unitok-lm[transformers]'") from None


class GrammarLogitsProcessor(LogitsProcessor):
    """Ids that cannot stand in a row get -inf, also where beam search exchanges rows; one for each call of `generate`.

    Args:
        vocab: the vocabulary that the model was trained on.
        modalities: `free`, or a plan such as `text,image:8x12`, after which comes eos.
        rates: frames per second of the audio tokenizer, for `audio:2s`: `{"audio": 50.0}`.
        max_new_tokens: most new ids; `generate`'s max_new_tokens. Nothing is opened that they cannot close.
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
        """For what `unitok export` wrote: the vocabulary is in its `unitok_ids.json`."""
        path = Path(folder) / "unitok_ids.json"
        known = read_json(path, "export the bundle again; a decoder's folder alone has no vocabulary")
        return cls(Vocab.from_manifest(known["manifest"]), modalities, max_new_tokens, rates)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids [B, T] so far, scores [B, V] -> scores."""
        mask, eos = torch.ones_like(scores, dtype=torch.bool), self.grammar.vocab.eos
        rows: dict[tuple[int, ...], Row] = {}
        for b, ids in enumerate(map(tuple, input_ids.tolist())):
            row = rows[ids] = rows.get(ids) or self._follow(ids)
            for start, stop in [(eos, eos + 1)] if row.state == "done" else row.allowed():
                mask[b, start:stop] = False
        self._rows = rows
        return scores.masked_fill(mask, -torch.inf)

    def _follow(self, ids: tuple[int, ...]) -> Row:
        """The state after a row's ids: that of the call before, one id on; at first the prompt's."""
        vocab = self.grammar.vocab
        before = self._rows.get(ids[:-1])
        if before is not None:
            row = before.copy()
            if row.state != "done":
                row.advance(ids[-1])
            return row
        start = next((i for i, id in enumerate(ids) if id != vocab.pad), 0)
        prompt = torch.tensor(ids[start:]).numpy()
        return self.grammar.follow(prompt, complete=False).copy_for(self.max_new_tokens, self.plan)
