"""The library's front door: a bundle that generates, streams and scores."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from unitok.bundle import Bundle
from unitok.document import Document
from unitok.errors import UserError
from unitok.sample.outputs import Output
from unitok.sample.prompts import Prompt, is_part, read_one, read_prompts_of
from unitok.sample.requests import Task, begin, generate_outputs, make_task
from unitok.sample.score import Score, score_documents
from unitok.sample.stream import Chunk, stream


class Unitok(Bundle):
    """Vocabulary, tokenizers and decoder, and what they do together."""

    def generate(
        self,
        prompt: Prompt,
        modalities: str | Sequence[str] = "free",
        n: int = 1,
        seed: int = 0,
        max_new_tokens: int = 512,
        settings: Any = None,
        batch_size: int = 64,
        progress: bool = False,
        negative_prompt: Any = None,
        **more: Any,
    ) -> list[Output]:
        """Continue prompts.

        Args:
            prompt: a part, the parts of one prompt in a list, or a list of such lists for a batch. A part is str (text),
                Path (a file), PIL.Image, (waveform [C, T], Hz) or Document. So `["A frog.", "A dog."]` is one prompt of two
                texts, and `[["A frog."], ["A dog."]]` are two prompts.
            modalities: `free`, or a plan such as `text,image:8x12,audio:2s` (rows x columns of codes), also as a list.
            n: outputs per prompt. seed: the same seed gives the same outputs.
            max_new_tokens: most new ids of each output.
            settings: `unitok.sample.sampling.SamplingParams` for all, or by kind of content or name of a tokenizer:
                `{"image": SamplingParams(temperature=0.5)}`; a dict changes only what it names. Default: the bundle's own
                (`defaults`), else temperature 1 and no filters.
            batch_size: outputs that are generated together.
            negative_prompt: parts of what guidance leads away from.
            more: `prefix_fraction`, `best_of`, `rank_by`, `jacobi_window` as in `unitok.sample.requests.Task`.

        Returns n Outputs for each prompt, in order. Errors: `UserError` that names the argument.
        """
        documents, task = self._task(
            prompt,
            negative_prompt,
            modalities=modalities,
            n=n,
            seed=seed,
            max_new_tokens=max_new_tokens,
            settings=settings,
            **more,
        )
        return generate_outputs(self, documents, task, batch_size, progress)

    def stream(
        self,
        prompt: Prompt,
        modalities: str | Sequence[str] = "free",
        negative_prompt: Any = None,
        batch_size: int = 64,
        **more: Any,
    ) -> Iterator[Chunk | Output]:
        """`generate` while it goes on: a `unitok.sample.stream.Chunk` for each new piece of text, row of an image and chunk of
        audio, and each whole Output after its last piece. Other arguments as for `generate`, without those for progress, the
        best of several and Jacobi decoding."""
        documents, task = self._task(prompt, negative_prompt, modalities=modalities, **more)
        if task.best_of > 1 or task.jacobi_window:
            raise UserError("a stream cannot choose the best of several, nor guess ahead; leave out best_of and jacobi_window")
        return stream(self, begin(self, documents, task), task.settings, batch_size)

    def _task(self, prompt: Prompt, negative_prompt: Any, **options: Any) -> tuple[list[Document], Task]:
        """Prompts as documents, and what to do with them."""
        task = make_task(self, options)
        return read_prompts_of(self, prompt), task if negative_prompt is None else replace(
            task, negative_prompt=read_one(self, negative_prompt)
        )

    def read_prompt(self, prompt: Prompt) -> Document:
        """The Document of a part, or of the parts of one prompt."""
        return read_one(self, prompt)

    def score(self, documents: "Sequence[Document | Prompt]") -> list[Score]:
        """How likely documents are, segment by segment. A part, or a list of parts, stands for the document of them."""
        several = [documents] if is_part(documents) else list(documents)
        return score_documents(self, [d if isinstance(d, Document) else read_one(self, d) for d in several])
