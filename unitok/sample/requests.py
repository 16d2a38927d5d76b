"""From prompts to outputs: what to make of each prompt, the requests that make it, and the best of several."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from unitok.bundle import Bundle
from unitok.document import ROLES, Document
from unitok.errors import UserError
from unitok.grammar import Grammar, parse_plan
from unitok.sample.defaults import sampling_params_of
from unitok.sample.engine import generate
from unitok.sample.outputs import Output
from unitok.sample.prompts import check_names
from unitok.sample.running import Request
from unitok.sample.sampling import SamplingParams
from unitok.sample.score import log_probabilities
from unitok.vocab import Vocab


def check_count(name: str, value: Any, least: int) -> None:
    """Raise `UserError` for what is no integer of at least that."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name} is {value!r}: it must be an integer of at least {least}")


@dataclass
class Task:
    """What to make of each prompt; want, n, seed and max_new_tokens as for `Unitok.generate`."""

    modalities: str | Sequence[str] = "free"
    n: int = 1
    seed: int = 0
    max_new_tokens: int = 512
    settings: dict[str, SamplingParams] = field(default_factory=dict)  # by modality; a missing one has the defaults
    negative_prompt: Document | None = None  # what guidance leads away from; without it, from no prompt at all
    prefix_fraction: float | None = (
        None  # share of the prompt's last picture or sound that stays, in rows or frames, and is continued
    )
    best_of: int = 1  # so many are made for each output, and of all of a prompt's the n best kept
    #: `logprob`, the mean log-probability of its ids, or `pmi`, how much likelier the prompt makes them.
    rank_by: str = "logprob"
    jacobi_window: int = (
        0  # span_positions of an image that are guessed and read at once; outputs are then made one by one. 0: one place
    )

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("best_of", 1), ("seed", 0), ("max_new_tokens", 1), ("jacobi_window", 0)):
            check_count(name.replace("_", " "), getattr(self, name), least)
        if isinstance(self.modalities, list | tuple):
            self.modalities = ",".join(map(str, self.modalities))
        if not isinstance(self.modalities, str):
            raise UserError(
                f"modalities is a {type(self.modalities).__name__}: write free, or a plan such as text,image:8x12,audio:2s"
            )
        if self.rank_by not in ("logprob", "pmi"):
            raise UserError(f"best by {self.rank_by!r}: choose one of likelihood, relevance")
        if self.prefix_fraction is not None and not (
            isinstance(self.prefix_fraction, int | float) and 0 < self.prefix_fraction <= 1
        ):
            raise UserError(f"prefix_fraction is {self.prefix_fraction!r}: it is a share, above 0 and at most 1")


def make_task(bundle: Bundle, options: Mapping[str, Any]) -> Task:
    """A Task from arguments by name. Errors: `UserError` for a name that does not exist, with the nearest."""
    check_names(options, ["prompt", *(f.name for f in fields(Task)), "batch_size"], "generate")
    return Task(**{**options, "settings": sampling_params_of(bundle, options.get("settings"))})


@dataclass
class Draft:
    """One output to be made: its request, and what turns the ids into it. prompt: what stands before it. lead: ids of the begun
    picture or sound that belong to it."""

    index: int
    bundle: Bundle
    request: Request
    prompt: Document
    lead: np.ndarray
    role: str

    def finish(self, ids: Sequence[int] | np.ndarray) -> Output:
        """New ids -> the output."""
        ids = np.asarray(ids, np.int64)
        new = self.bundle.vocab.decode(np.concatenate([self.lead, ids]), role=self.role)
        return Output(self.bundle, self.prompt, new, ids, self.index)


def begin(bundle: Bundle, prompts: list[Document], task: Task) -> list[Draft]:
    """n outputs for each prompt, still to be made."""
    vocab = bundle.vocab
    plan = parse_plan(str(task.modalities), vocab, bundle.rates)
    negative_prompt = None if task.negative_prompt is None else vocab.encode(task.negative_prompt, eos=False)
    drafts: list[Draft] = []
    repeated: Counter[bytes] = Counter()
    for prompt in prompts:
        ids, lead = vocab.encode(prompt, eos=False), np.zeros(0, np.int64)
        before, role = prompt, prompt.segments[-1].role if prompt.segments else "none"
        if task.prefix_fraction is not None:
            before, ids, lead = _begun(bundle, prompt, task.prefix_fraction)
        media = vocab.encode(Document(tuple(s for s in before.segments if vocab.span(s.modality).begin)), eos=False)
        for _ in range(task.n):
            row = repeated[ids.tobytes()]  # so that a prompt's outputs do not depend on what else is asked
            repeated[ids.tobytes()] += 1
            request = Request(ids, plan, task.max_new_tokens, task.seed, row, negative_prompt=negative_prompt, media=media)
            drafts.append(Draft(len(drafts), bundle, request, before, lead, role))
    return drafts


def _begun(bundle: Bundle, prompt: Document, share: float) -> tuple[Document, np.ndarray, np.ndarray]:
    """-> what stands before the last picture or sound, all ids up to where it goes on, and those of them that are its own."""
    last = prompt.segments[-1] if prompt.segments else None
    span = bundle.vocab.spans.get(last.modality) if last else None
    if last is None or span is None or not span.begin:
        raise UserError("prefix_fraction: the prompt must end with a picture or a sound, which is then continued")
    ids = bundle.vocab.encode(prompt, eos=False)
    body = len(ids) - 1 - last.codes.size  # where it begins: its end id stands last
    start, stop = body - len(span.header) - 1, body + span.order.begun(last.codes, share)
    return Document(prompt.segments[:-1], prompt.id), ids[:stop], ids[start:stop]


def generate_outputs(
    bundle: Bundle, prompts: list[Document], task: Task, batch_size: int = 64, progress: bool = False
) -> list[Output]:
    """Outputs for documents, as `Unitok.generate` gives them for prompts."""
    check_count("batch size", batch_size, 1)
    grammar = Grammar(bundle.vocab)
    drafts = begin(bundle, prompts, replace(task, n=task.n * task.best_of))
    with tqdm(total=len(drafts), desc="sample", unit="output", disable=not progress, mininterval=1.0, delay=0.3) as bar:
        together = 1 if task.jacobi_window else batch_size
        made = generate(
            *(bundle.inference, grammar, [one.request for one in drafts], task.settings, together, task.jacobi_window),
            progress=lambda ids, done: bar.update(done),
        )
    outputs = [one.finish(ids) for one, ids in zip(drafts, made, strict=True)]
    return outputs if task.best_of == 1 else _best(bundle, grammar, drafts, outputs, task)


def _best(bundle: Bundle, grammar: Grammar, drafts: list[Draft], outputs: list[Output], task: Task) -> list[Output]:
    """The n best of each prompt's outputs, the best first, numbered anew."""
    vocab, decoder = bundle.vocab, bundle.require("model")
    wholes, alone, counts = [], [], []
    for one, output in zip(drafts, outputs, strict=True):
        ids = output.ids[: len(output.ids) - int(len(output.ids) > 0 and output.ids[-1] == vocab.eos)]
        role, body = _begins(vocab, one, np.concatenate([one.lead, ids]))
        wholes.append(np.concatenate([one.request.prompt, ids]))
        alone.append(vocab.unconditional(np.concatenate([role, body])))
        counts.append(len(body))
    likely = log_probabilities(decoder, grammar, wholes)
    without = log_probabilities(decoder, grammar, alone) if task.rank_by == "pmi" else [np.zeros(len(a)) for a in alone]
    for output, count, given, none in zip(outputs, counts, likely, without, strict=True):
        gain = given[len(given) - count :].sum() - none[len(none) - count :].sum()
        output.score = float(gain) / count if count else -math.inf
    kept = []
    for start in range(0, len(outputs), task.n * task.best_of):
        group = sorted(outputs[start : start + task.n * task.best_of], key=lambda output: -(output.score or 0.0))
        kept += group[: task.n]
    return [replace(output, index=i) for i, output in enumerate(kept)]


def _begins(vocab: Vocab, one: Draft, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An output's ids -> the id of the role that holds where its first span begins (none has no id), and the ids from there on."""
    start = next((i for i, id in enumerate(ids.tolist()) if id not in vocab.roles), len(ids))
    name = ROLES[vocab.roles.index(int(ids[start - 1]))] if start else one.role
    return np.array([] if name == "none" else [vocab.specials[f"<{name}>"]], np.int64), ids[start:]
