"""The recipes that `scene_race.py` compares: rows of tokenizers, documents, networks, losses and optimizer settings."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unitok.api import Unitok
from unitok.model import Decoder, DecoderConfig
from unitok.scenes import world
from unitok.tokenizers.base import Reconstruction
from unitok.training.image import ImageTokenizerTraining
from unitok.vocab import Vocab

DECODER = DecoderConfig(
    hidden_size=128, num_hidden_layers=4, intermediate_size=384, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=256, span_positions=72,
)  # fmt: skip
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A recipe. world: changes the world, if need be; image, audio: the kind of tokenizer, a key of `TOKENIZERS`; documents: a key of `DOCUMENTS`; data: of `TokenShards`;
    muon_every: of `DecoderTraining`; seconds: of its run, as a multiple of what all have.

    wrap: what is trained in place of a decoder. change: of a batch, given the fraction of the run. more_loss: from the hidden states,
    the head and a batch, added to the loss; built from the bundle.
    """

    world: Callable[[], None] = field(default_factory=lambda: eight_colors)
    image: str = "patch"
    audio: str = "patch"
    documents: str = "all"
    data: dict[str, Any] = field(default_factory=lambda: {"prompt_loss_weight": {"image": 0.2}})
    muon_every: int = 4
    lr: float = 1e-2
    seconds: float = 1.0
    decoder: DecoderConfig = field(default_factory=lambda: DECODER)
    wrap: "Callable[[Decoder, Unitok], Wrapped] | None" = None
    change: Callable[[Batch, Vocab, float, torch.Generator], Batch] | None = None
    more_loss: Callable[[Unitok], Callable[[Tensor, Tensor, Batch], Tensor]] | None = None


#: Options of `unitok fit`, below `model`, by kind of tokenizer.
TOKENIZERS: dict[str, dict[str, dict[str, str]]] = {
    "image": {
        "patch": {},
        "patch, seen pairs": {},
        "vqgan": {"init_args.tokenizer.encoder": "vqgan"},
        "patch, 128 codes": {"init_args.tokenizer.codebook_size": "128"},
        "patch, grid of 4 x 4": {"init_args.tokenizer.patch": "8", "init_args.tokenizer.codebook_size": "1024"},
        "patch, predictable": {"class_path": "scene_recipes.PredictableImageTraining"},
    },
    "audio": {
        "patch": {},
        "patch, seen pairs": {},
        "seanet": {"init_args.tokenizer.encoder": "seanet"},
        "patch, 4 levels of 32": {"init_args.tokenizer.num_codebooks": "4", "init_args.tokenizer.codebook_size": "32"},
    },
}


# ---- Worlds ----------------------------------------------------------------------------------------------------------


def eight_colors() -> None:
    """The built-in world as it is."""


def sixteen_colors() -> None:
    """Twice as many colors and pitches, in this process."""
    world.COLORS.update(
        brown=(130, 80, 30), lime=(165, 255, 60), navy=(20, 20, 120), teal=(0, 120, 120),
        magenta=(255, 0, 200), olive=(120, 120, 20), salmon=(255, 150, 120), maroon=(110, 10, 50),
    )  # fmt: skip
    hertz = (196.0, 207.7, 220.0, 233.1, 246.9, 277.2, 311.1, 370.0)
    world.PITCHES.update(zip(("G3", "Gis3", "A3", "Ais3", "B3", "Cis4", "Dis4", "Fis4"), hertz, strict=True))
    world._PITCH.update(zip(world.COLORS, world.PITCHES, strict=True))
    world._OBJECT = r"a ({}) ({}) ({})".format("|".join(world.SIZES), "|".join(world.COLORS), "|".join(world.SHAPES))
    world._NOTE = r"a ({}) ({}) ({})".format("|".join(world.LOUDNESSES), "|".join(world.PITCHES), "|".join(world.TIMBRES))


# ---- Documents -------------------------------------------------------------------------------------------------------


def _no_names(document: dict[str, Any], random: np.random.Generator) -> dict[str, Any] | None:
    """Without text documents, the only ones that name pairs that are kept out."""
    return None if document["id"].endswith(("-caption", "-notes")) and len(document["content"]) == 1 else document


def _any_order(document: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """In a quarter of the captions that are learned, each object's attributes stand in another order, the color before the size."""
    for part in document["content"]:
        if part["type"] == "text" and part.get("loss", True) and random.random() < 0.25:
            part["text"] = re.sub(
                r"a (\w+) (\w+) (\w+)(?= then| left| right| above| below| on|,|$)", r"a \2 \1 \3", part["text"]
            )
    return document


DOCUMENTS = {"all": None, "pairs not named": _no_names, "attributes in two orders": _any_order}


# ---- What some rows change -------------------------------------------------------------------------------------------


def inside(tokens: Tensor, vocab: Vocab, name: str) -> Tensor:
    """Which tokens are codes of a modality."""
    ranges = [(tokens >= r.offset) & (tokens < r.stop) for r in vocab.body(name)]
    return torch.stack(ranges).any(0)


class Wrapped(nn.Module):
    """A decoder with more around it, whose states it returns."""

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__()
        self.decoder, self.vocab, self.width = decoder, bundle.vocab, decoder.config.hidden_size

    def hidden(self, batch: Batch) -> Tensor:
        return self.decoder.hidden(batch["ids"], batch["positions"], batch["documents"], batch["span_positions"])

    def plain(self) -> Decoder | None:
        """The decoder that does the same alone; None if there is none."""
        return None


class Neighbors(Wrapped):
    """The input also has the code above the next one, an embedding of its own (8 columns)."""

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__(decoder, bundle)
        self.embed_above = nn.Embedding(bundle.vocab.size, self.width)
        nn.init.zeros_(self.embed_above.weight)

    def hidden(self, batch: Batch) -> Tensor:
        ids = batch["ids"]
        above = F.pad(ids, (7, 0))[:, : ids.shape[1]]  # the next code is one to the right, so the one above it is 7 back
        known = inside(ids, self.vocab, "image") & inside(above, self.vocab, "image")
        added = self.embed_above(above) * known[..., None]
        handle = self.decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: out + added)
        try:
            return super().hidden(batch)
        finally:
            handle.remove()


class ValueEmbeddings(Wrapped):
    """In every second block each token adds an embedding of its own to its values."""

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__(decoder, bundle)
        self.tables = nn.ModuleList()
        self.ids = torch.zeros(0, dtype=torch.long)
        for name, projection in decoder.named_modules():
            if name.endswith(("1.self_attn.v_proj", "3.self_attn.v_proj")) and isinstance(projection, nn.Linear):
                table = nn.Embedding(bundle.vocab.size, projection.out_features)
                nn.init.zeros_(table.weight)
                self.tables.append(table)
                projection.register_forward_hook(lambda module, args, out, table=table: out + table(self.ids))

    def hidden(self, batch: Batch) -> Tensor:
        self.ids = batch["ids"]
        return super().hidden(batch)


class TargetPlaces(Wrapped):
    """The input also says where the next code stands, so that images can be learned in any order (Yu et al. 2024, "RAR")."""

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__(decoder, bundle)
        self.embed_next = nn.Embedding(decoder.config.span_positions + 1, self.width)
        nn.init.zeros_(self.embed_next.weight)

    def hidden(self, batch: Batch) -> Tensor:
        after = (batch["span_positions"] + 1) * (batch["span_positions"] > 0)
        added = self.embed_next(batch.get("next_positions", after).clamp(max=self.decoder.config.span_positions))
        handle = self.decoder.model.embed_tokens.register_forward_hook(lambda module, args, out: out + added)
        try:
            return super().hidden(batch)
        finally:
            handle.remove()

    @torch.no_grad()
    def plain(self) -> Decoder:
        self.decoder.model.embed_span_positions.weight[1:] += self.embed_next.weight[2:]
        self.decoder.model.embed_span_positions.weight += self.embed_next.weight[0]
        self.decoder.model.embed_span_positions.weight[1:] -= self.embed_next.weight[0]
        return self.decoder


def random_order(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
    """Images in a random order: all of them at first, none from a third of the run on."""
    positions = batch["span_positions"]
    out = {key: value.clone() for key, value in batch.items()} | {"next_positions": (positions + 1) * (positions > 0)}
    codes = inside(batch["ids"], vocab, "image")
    starts = codes & ~F.pad(codes, (1, 0))[:, :-1]
    for row, start in starts.nonzero().tolist():
        length = int((~codes[row, start:]).int().argmax()) if not codes[row, start:].all() else 0
        if length < 2 or torch.rand((), generator=random) > 1 - 3 * fraction:
            continue
        span, order = slice(start, start + length), torch.randperm(length, generator=random)
        for key in ("ids", "span_positions"):
            out[key][row, span] = batch[key][row, span][order]
        out["targets"][row, start - 1 : start + length - 1] = out["ids"][row, span]
        out["next_positions"][row, start - 1 : start + length - 1] = out["span_positions"][row, span]
    return out


class FromCodebooks(nn.Module):
    """Adds to the rows of a matrix [V, C], those of the codes, what an MLP makes of their codebook vectors; a parametrization."""

    def __init__(self, codebooks: dict[tuple[int, int], Tensor], width: int):
        super().__init__()
        self.ranges = list(codebooks)
        self.vectors = [F.normalize(vectors - vectors.mean(0)) * vectors.shape[1] ** 0.5 for vectors in codebooks.values()]
        self.mlps = nn.ModuleList()
        for vectors in self.vectors:
            last = nn.Linear(64, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlps.append(nn.Sequential(nn.Linear(vectors.shape[1], 64), nn.SiLU(), last))

    def forward(self, matrix: Tensor) -> Tensor:
        added = torch.zeros_like(matrix)
        for (start, stop), vectors, mlp in zip(self.ranges, self.vectors, self.mlps, strict=True):
            added[start:stop] = mlp(vectors)
        return matrix + added


def codebooks_of(bundle: Unitok, *names: str) -> dict[tuple[int, int], Tensor]:
    """The codebook [K, d] of each range (first token, end) of these modalities."""
    found = {}
    for name in names:
        quantizer = bundle.require(name).quantizer
        books = quantizer.codebooks if hasattr(quantizer, "codebooks") else [quantizer.codebook]
        for r, book in zip(bundle.vocab.body(name), books, strict=True):
            found[r.offset, r.stop] = book.embed.clone()
    return found


class KnowsCodebooks(Wrapped):
    """Embedding and head know the vectors of the codes, so that near codes share what is learned."""

    names = ("image", "audio")

    def __init__(self, decoder: Decoder, bundle: Unitok):
        super().__init__(decoder, bundle)
        self.layers = (decoder.model.embed_tokens, decoder.lm_head)
        for layer in self.layers:
            added = FromCodebooks(codebooks_of(bundle, *self.names), self.width)
            parametrize.register_parametrization(layer, "weight", added)

    def plain(self) -> Decoder:
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight")
        return self.decoder


def drop_text(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
    """A tenth of the text tokens of the input become another text token."""
    return batch | {"ids": _disturbed(batch["ids"], vocab, "text", 0.1, random)}


def noisy_codes(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
    """A twentieth of the image tokens of the input become another one, until the last fifth of the run."""
    return batch | {"ids": _disturbed(batch["ids"], vocab, "image", 0.05 if fraction < 0.8 else 0.0, random)}


def _disturbed(ids: Tensor, vocab: Vocab, name: str, share: float, random: torch.Generator) -> Tensor:
    (r,) = vocab.body(name)
    chosen = inside(ids, vocab, name) & (torch.rand(ids.shape, generator=random) < share)
    out = ids.clone()
    out[chosen] = torch.randint(r.offset, r.stop, (int(chosen.sum()),), generator=random)
    return out


def rare_codes(power: float) -> Callable[[Batch, Vocab, float, torch.Generator], Batch]:
    """Image tokens weigh by a power of how rare they are in the batch, one in the mean."""

    def change(batch: Batch, vocab: Vocab, fraction: float, random: torch.Generator) -> Batch:
        chosen = inside(batch["targets"], vocab, "image") & (batch["weights"] > 0)
        if not chosen.any():
            return batch
        codes = batch["targets"][chosen]
        weights = torch.bincount(codes, minlength=vocab.size)[codes].float() ** -power
        scaled = batch["weights"].clone()
        scaled[chosen] *= weights / weights.mean()
        return batch | {"weights": scaled}

    return change


def near_codes(bundle: Unitok) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    """A tenth of each image target goes to the codes near it: what that adds to the cross-entropy."""
    ((start, stop), vectors), *_ = codebooks_of(bundle, "image").items()
    near = torch.softmax(-torch.cdist(F.normalize(vectors), F.normalize(vectors)).square().fill_diagonal_(torch.inf) / 0.05, -1)

    def more(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
        chosen = (batch["targets"] >= start) & (batch["targets"] < stop) & (batch["weights"] > 0)
        logits, codes = hidden[chosen] @ head[start:stop].T, batch["targets"][chosen] - start
        moved = 0.1 * (logits.gather(1, codes[:, None]).squeeze(1) - (near[codes] * logits).sum(-1))
        return (moved * batch["weights"][chosen]).sum()

    return more


def groups_of_codes(bundle: Unitok) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    """Cross-entropy of the group of the next image code, too; groups of about eight near codes, by k-means (Hu et al. 2025, "IAR")."""
    ((start, stop), vectors), *_ = codebooks_of(bundle, "image").items()
    _, group = kmeans2(F.normalize(vectors).numpy(), len(vectors) // 8, minit="++", seed=0)
    member = F.one_hot(torch.from_numpy(group).long()).float()  # [K, G]

    def more(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
        chosen = (batch["targets"] >= start) & (batch["targets"] < stop) & (batch["weights"] > 0)
        chances = torch.softmax(hidden[chosen] @ head[start:stop].T, -1) @ member
        of_target = chances.gather(1, member.argmax(1)[batch["targets"][chosen] - start][:, None]).squeeze(1)
        return -(of_target.clamp_min(1e-9).log() * batch["weights"][chosen]).sum()

    return more


class PredictableImageTraining(ImageTokenizerTraining):
    """Latents that a small causal transformer can predict from those before, by a squared error (Ramanujan et al. 2024, "CRT")."""

    def build(self) -> None:
        super().build()
        dim = self.config.codebook_dim
        layer = nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True, norm_first=True)
        prior = nn.ModuleDict({"in": nn.Linear(dim, 64), "blocks": nn.TransformerEncoder(layer, 2), "out": nn.Linear(64, dim)})
        place = nn.Parameter(torch.zeros((self.config.resolution // self.config.stride) ** 2 - 1, 64))
        self.prior = [prior]  # in a list, so that no checkpoint has it
        self.place = [place]
        self.tokenizer.encoder.register_forward_hook(self._keep)
        self.prior_optimizer = torch.optim.AdamW([*prior.parameters(), place], 1e-3)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], latents: Tensor) -> None:
        self.latents = latents.flatten(2).mT

    def _backward(
        self, target: Tensor, semantic_target: Tensor | None, out: Reconstruction, fraction: float, adversarial: bool
    ) -> dict[str, Tensor]:
        (prior,), (place,) = self.prior, self.place
        latents = self.tokenizer.quantizer._project(self.latents)
        mask = nn.Transformer.generate_square_subsequent_mask(len(place))
        guess = prior["out"](prior["blocks"](prior["in"](latents[:, :-1]) + place, mask, is_causal=True))
        weight = 4.0 / self.config.codebook_dim * min(1.0, 4 * self.progress)
        out.losses["predictable"] = weight * (guess - latents[:, 1:]).square().sum(-1).mean()
        self.prior_optimizer.zero_grad()
        losses = super()._backward(target, semantic_target, out, fraction, adversarial)
        self.prior_optimizer.step()
        return losses


NOW = Row()
BEFORE = Row(image="vqgan", audio="seanet", data={}, muon_every=1)
ROWS = {
    "now": NOW,
    "now, half of the seconds": replace(NOW, seconds=0.5),
    "now, 3/4 of the seconds": replace(NOW, seconds=0.75),
    "now, 3/2 of the seconds": replace(NOW, seconds=1.5),
    "as before: encoders with convolutions, Muon in every step, prompts not learned": BEFORE,
    "as before, twice the seconds": replace(BEFORE, seconds=2.0),
    "image encoder with convolutions": replace(NOW, image="vqgan"),
    "audio encoder with convolutions": replace(NOW, audio="seanet"),
    "image latents trained to be predictable": replace(NOW, image="patch, predictable"),
    "image codebook of 128": replace(NOW, image="patch, 128 codes"),
    "images of 4 x 4 codes of 1,024": replace(NOW, image="patch, grid of 4 x 4"),
    "audio: 4 levels of 32 codes": replace(NOW, audio="patch, 4 levels of 32"),
    "Muon in every step": replace(NOW, muon_every=1),
    "Muon in every eighth step": replace(NOW, muon_every=8),
    "AdamW 5e-3": replace(NOW, lr=5e-3),
    "AdamW 2e-2": replace(NOW, lr=2e-2),
    "prompts not learned": replace(NOW, data={}),
    "given images learned as much": replace(NOW, data={"prompt_loss_weight": {"image": 1.0}}),
    "no span positions": replace(NOW, decoder=replace(DECODER, span_positions=0)),
    "images in random order at first": replace(NOW, wrap=TargetPlaces, change=random_order),
    "the place of the next code is given": replace(NOW, wrap=TargetPlaces),
    "near codes share a tenth of the target": replace(NOW, more_loss=near_codes),
    "loss of groups of near codes": replace(NOW, more_loss=groups_of_codes),
    "rare codes weigh more, power 0.5": replace(NOW, change=rare_codes(0.5)),
    "codebook vectors in embedding and head": replace(NOW, wrap=KnowsCodebooks),
    "embedding of the code above": replace(NOW, wrap=Neighbors),
    "value embeddings": replace(NOW, wrap=ValueEmbeddings),
    "text tokens of the input disturbed": replace(NOW, change=drop_text),
    "image codes of the input disturbed": replace(NOW, change=noisy_codes),
    "attributes in two orders": replace(NOW, documents="attributes in two orders"),
    "kept-out pairs not named in text": replace(NOW, documents="pairs not named"),
    "tokenizers never saw kept-out pairs": replace(NOW, image="patch, seen pairs", audio="patch, seen pairs"),
    "16 colors and pitches": replace(NOW, world=sixteen_colors),
}
