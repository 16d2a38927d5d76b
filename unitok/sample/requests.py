"""From prompts to outputs: the requests of each prompt, the outputs that their tokens decode to, and the best of several."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from unitok.bundle import Bundle
from unitok.document import ROLES, Document
from unitok.errors import UserError
from unitok.generation_config import FILE, GenerationConfig, SamplingParams, check_count, combine
from unitok.grammar import Grammar
from unitok.plan import PlanItem, parse_plan
from unitok.sample.engine import generate
from unitok.sample.outputs import Output, Outputs
from unitok.sample.prompts import read_one
from unitok.sample.running import Request
from unitok.sample.score import log_probabilities
from unitok.vocab import Vocab


def config_for(bundle: Bundle, *configs: GenerationConfig, edited: str = "") -> GenerationConfig:
    """Return the config of a call: the bundle's own, over it those given, the last one first. edited: see `combine`."""
    tokenizers = {name: span.kind for name, span in bundle.vocab.spans.items()}
    return combine([(FILE, bundle.generation_config), *(("", config) for config in configs)], tokenizers, edited)


def sampling_of(bundle: Bundle, config: GenerationConfig) -> dict[str, SamplingParams]:
    """Return the sampling parameters of each tokenizer of a bundle."""
    return {name: SamplingParams(**config.sampling_values(name, span.kind)) for name, span in bundle.vocab.spans.items()}


def edit_plan(config: GenerationConfig, image: str = "image") -> str:
    """Return the plan of an answer that changes an image, whose own plan is `image`: a text comes first where `edit_described` says so."""
    return f"text,{image}" if config.edit_described else image


def edit_prompt(bundle: Bundle, image: object, instruction: str) -> tuple[Document, str]:
    """Return the prompt that asks for an image to be changed, and the plan of the image. Errors: `UserError` for what is no image."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise UserError("instruction: give a text, such as 'make the circle blue'")
    if isinstance(image, str):
        raise UserError(
            f"image: {image[:40]!r} is a text; give a file as Path({image[:40]!r}), a tensor, an array or a PIL image"
        )
    document = read_one(bundle, [image, f" {instruction.strip()}"])
    first = document.segments[0]
    if not bundle.vocab.span(first.modality).header:
        raise UserError(f"image: {first.modality}, where an image should be")
    return document, f"{first.modality}:{'x'.join(map(str, first.codes.shape[-2:]))}"


@dataclass
class Draft:
    """One output to be generated: its request, and what turns the new tokens into an `Output`.

    prompt: what stands before the output. lead: ids of an image or audio that the prompt began (`prefix_fraction`): they are part of
    the output. role: the role that holds where it begins.
    """

    index: int
    bundle: Bundle
    request: Request
    prompt: Document
    lead: np.ndarray
    role: str

    def finish(self, ids: Sequence[int] | np.ndarray) -> Output:
        """Return the output of new tokens."""
        ids = np.asarray(ids, np.int64)
        new = self.bundle.vocab.decode(np.concatenate([self.lead, ids]), role=self.role)
        return Output(self.bundle, self.prompt, new, ids, self.index)


def make_drafts(
    bundle: Bundle,
    prompts: list[Document],
    config: GenerationConfig,
    turn: bool = False,
    plans: Sequence[list[PlanItem]] = (),
) -> list[Draft]:
    """Return n drafts for each prompt, in order.

    turn: each is a turn of the assistant, whose token then follows the prompt. plans: of each prompt, instead of the config's `modalities`.
    """
    vocab = bundle.vocab
    plan = None if plans else parse_plan(str(config.modalities), vocab, bundle.rates)
    negative = config.negative_prompt
    negative_ids = None if negative is None else vocab.encode(read_one(bundle, negative, "negative_prompt"), eos=False)
    if negative is not None and not any(params.guided for params in sampling_of(bundle, config).values()):
        warnings.warn("negative_prompt has no effect without guidance: set guidance_scale above 1, such as 2", stacklevel=2)
    drafts: list[Draft] = []
    repeated: Counter[bytes] = Counter()
    for number, prompt in enumerate(prompts):
        plan = plans[number] if plans else plan
        ids, lead = vocab.encode(prompt, eos=False), np.zeros(0, np.int64)
        before, role = prompt, prompt.segments[-1].role if prompt.segments else "none"
        if config.prefix_fraction is not None:
            before, ids, lead = _split_prefix(bundle, prompt, config.prefix_fraction)
        if turn:
            role = "assistant"
            ids = np.append(ids, vocab.specials[f"<{role}>"])
        shown = tuple(s for s in before.segments if vocab.span(s.modality).begin)
        media = vocab.encode(Document(shown), eos=False)
        if turn and shown:  # as training has it
            media = np.append(media, vocab.specials[f"<{role}>"])
        most = config.max_new_tokens
        if plan and "max_new_tokens" not in config.given():  # a plan says how long its output is
            most = max(most, 1 + sum(item.cost(vocab) for item in plan))
        for _ in range(config.n):
            row = repeated[ids.tobytes()]  # counts equal prompts, so that outputs do not depend on the other prompts of a call
            repeated[ids.tobytes()] += 1
            request = Request(ids, plan, most, config.seed, row, negative_prompt=negative_ids, turn=turn, media=media)
            drafts.append(Draft(len(drafts), bundle, request, before, lead, role))
    return drafts


def _split_prefix(bundle: Bundle, prompt: Document, fraction: float) -> tuple[Document, np.ndarray, np.ndarray]:
    """Cut the prompt's last image or audio after a fraction of its rows or frames.

    Returns: what stands before it, all ids up to the cut, and those of them that belong to the image or audio.
    """
    last = prompt.segments[-1] if prompt.segments else None
    span = bundle.vocab.spans.get(last.modality) if last else None
    if last is None or span is None or not span.begin:
        raise UserError("prefix_fraction: the prompt must end with an image or audio, which is then continued")
    ids = bundle.vocab.encode(prompt, eos=False)
    body = len(ids) - 1 - last.codes.size  # index of its first code: the end id stands last
    start, stop = body - len(span.header) - 1, body + span.order.begun(last.codes, fraction)
    return Document(prompt.segments[:-1], prompt.id), ids[:stop], ids[start:stop]


def generate_outputs(
    bundle: Bundle,
    prompts: list[Document],
    config: GenerationConfig,
    batch_size: int = 64,
    progress: bool = False,
    turn: bool = False,
    plans: Sequence[list[PlanItem]] = (),
) -> list[Output]:
    """Generate outputs for prompts as `config` says; `config_for` puts the bundle's own values under it. turn, plans: as in `make_drafts`."""
    check_count("batch_size", batch_size, 1)
    grammar = Grammar(bundle.vocab)
    drafts = make_drafts(bundle, prompts, config.replace(n=config.n * config.best_of), turn, plans)
    with tqdm(total=len(drafts), desc="sample", unit="output", disable=not progress, mininterval=1.0, delay=0.3) as bar:
        new_ids = generate(
            bundle.inference,
            grammar,
            [draft.request for draft in drafts],
            sampling_of(bundle, config),
            1 if config.jacobi_window else batch_size,
            config.jacobi_window,
            lambda tokens, done: bar.update(done),
        )
    outputs = [draft.finish(ids) for draft, ids in zip(drafts, new_ids, strict=True)]
    return Outputs(outputs if config.best_of == 1 else _best(bundle, grammar, drafts, outputs, config))


def _best(
    bundle: Bundle, grammar: Grammar, drafts: list[Draft], outputs: list[Output], config: GenerationConfig
) -> list[Output]:
    """Return the n best of each prompt's outputs, best first, with new indices."""
    vocab, decoder = bundle.vocab, bundle.require("model")
    documents, alone, counts = [], [], []
    for draft, output in zip(drafts, outputs, strict=True):
        ids = output.ids[: len(output.ids) - int(len(output.ids) > 0 and output.ids[-1] == vocab.eos)]
        role, body = _split_role(vocab, draft, np.concatenate([draft.lead, ids]))
        documents.append(np.concatenate([draft.request.prompt, ids]))
        alone.append(vocab.unconditional(np.concatenate([role, body])))
        counts.append(len(body))
    conditional = log_probabilities(decoder, grammar, documents)
    pmi = config.rank_by == "pmi"
    unconditional = log_probabilities(decoder, grammar, alone) if pmi else [np.zeros(len(ids)) for ids in alone]
    for output, count, c, u in zip(outputs, counts, conditional, unconditional, strict=True):
        total = c[len(c) - count :].sum() - u[len(u) - count :].sum()
        output.score = float(total) / count if count else -math.inf
    best, size = [], config.n * config.best_of
    for start in range(0, len(outputs), size):
        group = sorted(outputs[start : start + size], key=lambda output: -(output.score or 0.0))
        best += group[: config.n]
    return [replace(output, index=i) for i, output in enumerate(best)]


def _split_role(vocab: Vocab, draft: Draft, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split an output's ids -> the id of the role in which its first span stands (empty for `none`), and the ids from that span on."""
    start = next((i for i, id in enumerate(ids.tolist()) if id not in vocab.roles), len(ids))
    name = ROLES[vocab.roles.index(int(ids[start - 1]))] if start else draft.role
    return np.array([] if name == "none" else [vocab.specials[f"<{name}>"]], np.int64), ids[start:]
