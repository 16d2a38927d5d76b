"""The field's words: the old ones stay out of public names, flags, configurations, metrics, messages, docstrings and docs.

Two tables, each with the word to use instead. `NAMES` are identifiers, compared whole, so that `keep_large_blocks` is not `keep`;
`PROSE` are patterns for sentences. Honest other meanings (a sample rate, processes that share a batch, a place in memory) are no
part of the patterns.
"""

import argparse
import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from unitok.cli import VERBS, function_of
from unitok.cli.flags import make_parser

ROOT = Path(__file__).parent.parent

#: A public name -> the field's. Parts of a name are compared too where they stand in `PARTS`.
NAMES = {
    # asking for content
    "want": "modalities", "wants": "modalities", "Want": "PlanItem", "max_ids": "max_new_tokens", "settings": "generation_config or sampling",
    "Settings": "SamplingParams", "Task": "GenerationConfig", "guidance": "guidance_scale", "guidance_media": "media_guidance_scale",
    "negative": "negative_prompt", "keep": "prefix_fraction", "best_by": "rank_by", "jacobi": "jacobi_window", "Piece": "Chunk",
    # the sampler
    "Menu": "AllowedLogits", "Menus": "AllowedLogits", "menu": "allowed", "menus": "allowed", "Knobs": "BatchedSamplingParams",
    "knobs": "params", "how": "params, or what it is", "contexts": "slots", "forget": "weights for inference are made once",
    "places": "span_positions", "embed_places": "embed_span_positions", "Placed": "SegmentSpan",
    # training
    "learning_rate": "lr", "muon_rate": "muon_lr", "row_length": "sequence_length", "quantize_from": "quantize_start",
    "drop_condition": "condition_dropout", "start_from": "init_from", "only_new_ids": "train_new_tokens_only", "loss_over": "loss_vocabulary",
    "half_life": "beta2_half_life_tokens", "skip_above": "skip_grad_norm_ratio", "share": "fraction", "shares": "weights",
    "learns_by_update": "ema_updated", "pass_through": "project", "for_use": "prepare_for_inference",
    # data
    "shard_index": "job_index", "num_shards": "num_jobs", "shard_size": "documents_per_shard", "Found": "FileInfo", "Item": "SourceItem",
    "Medium": "MediaItem", "Make": "DocumentFactory", "Stop": "RunAborted", "TooManyBad": "ErrorRateExceeded", "one_at_a_time": "lock",
    "need": "require",
    # what the thing is
    "told": "what was reported", "said": "what the text is", "heard": "what was read", "there": "what exists", "found": "what was found",
}  # fmt: skip

#: A word of a public name, between underscores -> the field's.
PARTS = {
    "a": "per", "an": "per", "legal": "allowed", "pictures": "images", "picture": "image", "sounds": "audio", "sound": "audio",
    "normaliser": "logsumexp", "colour": "color", "centre": "center", "behaviour": "behavior", "neighbour": "neighbor", "grey": "gray",
}  # fmt: skip

#: Names and words of names that a configuration must not have, or a flag; in code they may mean something else.
KEYS = {
    "rate": "lr", "hold": "stable_fraction", "clip": "grad_clip", "accumulate": "accumulate_grad_batches", "ahead": "disc_only",
    "refuse": "error", "ids": "tokens",
}  # fmt: skip
METRICS = {
    "ids_a_second": "tokens_per_second", "seconds_a_step": "seconds_per_step", "minutes_left": "eta_minutes", "bits_an_id": "bits_per_token",
    "log_normaliser_": "logsumexp_rms/", "codebook_use_": "codebook_usage/", "codebook_use": "codebook_usage",
}  # fmt: skip
FLAGS = {"most": "max_objects", "ids": "tokens"}
FLAGS_OF = {"train-text-tokenizer": {"size": "vocab_size", "sample": "max_lines"}}  # `--size` of an image is right
CHOICES = {"likelihood": "logprob", "relevance": "pmi", "refuse": "error", "centre": "center"}

BRITISH = (
    r"\b\w*(?:normal|quant|regular|orthogonal|optim|initial|token|serial|summar|recogn|synchron|general|organ|memor|minim|maxim"
    r"|emphas|local|util|visual|vector)is(?:e[sdr]?|ing|ation|ers?)\b|\w*(?:colour|behaviour|neighbour|favour)\w*"
    r"|\bcentr(?:e[sd]?|ing)\b|\bgrey\w*|\b(?:mis)?spelt\b|\blearnt\b"
)
NOUNS = "ids?|tokens?|bits|codes?|images?|pictures?|samples?|seconds?|steps?|frames?|words?|lines?|FLOPs|documents?|recordings?|times|process(?:es)?"
PER = "second|minute|hour|step|id|token|line|row|image|picture|frame|level|batch|document|process|device|GPU|core|direction|code|codebook"

#: A pattern of a sentence -> what to write instead.
PROSE = {
    rf"\b(?:{NOUNS}) an? (?:{PER})\b": "per",
    r"\b[Pp]ictures?\b": "image",
    r"\b[Ss]ounds?\b": "audio, recording",
    r"\b[Ll]egal (?:sets?|ids?|tokens?|texts?|documents?)\b": "allowed tokens",
    r"\b(?:next|new|forced|drawn)[ -]ids?\b": "token",
    r"\b[Tt]old\b": "reported, named, given",
    r"\b[Hh]ears? of\b": "the weight or input that it gets",
    r"\b(?:[Aa]|[Tt]he|[Tt]his|what|its|their|same|least) shares?\b|\b[Ss]hares? (?:of|in)\b": "fraction",
    r"\b(?:[Tt]he|[Rr]andom|[Ee]ach|[Ee]very|ten|all) places\b|\b[Pp]laces:": "position",
    r"\b[Kk]nobs?\b|\bmenus?\b": "sampling parameters, allowed tokens",
    rf"(?:{BRITISH})": "the American spelling",
}  # fmt: skip
#: The same in docs pages, where a token is no `ids`; documents have ids.
PAGES = PROSE | {r"(?<!document )(?<!documents' )(?<!token )\b[Ii]ds\b": "tokens (or `document ids`)"}
#: The same in docstrings: results stand under `Returns:`.
DOCSTRINGS = PROSE | {r"(?:^|[;.,] )-> ": "Returns:"}


# ---- Finding --------------------------------------------------------------------------------------------------------


def wrong_names(names: Iterable[str], table: Mapping[str, str] = NAMES) -> list[str]:
    """`old: say new` for each name, or word of a name, that stands in the tables."""
    out = []
    for name in names:
        words = name.lower().split("_")
        words = words if len(words) > 1 else [word for word in words if len(word) > 2]  # `a` alone is a name
        out += [f"{name}: say {table.get(name)}"] * (name in table)
        out += [f"{name}: {word}: say {PARTS[word]}" for word in words if word in PARTS]
        out += [f"{name}: say it in American spelling"] * bool(re.search(BRITISH, name.replace("_", " ")))
    return out


def wrong_prose(text: str, table: dict[str, str] = PROSE) -> list[str]:
    """`what it says: say what` for each pattern that a text has; code between backticks is no prose."""
    text = re.sub(r"`[^`]*`", "``", text)
    return [
        f"{' '.join(hit[0].split())}: say {new}" for pattern, new in table.items() for hit in re.finditer(pattern, text, re.M)
    ]


def public_names(source: str) -> Iterator[tuple[int, str]]:
    """Functions, classes, fields of classes and parameters of public functions, with their lines."""

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if child.name.startswith("_") and not (child.name.startswith("__") and child.name.endswith("__")):
                    continue
                yield child.lineno, child.name
                if isinstance(child, ast.ClassDef):
                    yield from visit(child)
                else:
                    arguments = child.args
                    for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                        yield child.lineno, one.arg
            elif isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                yield child.lineno, child.target.id

    yield from ((line, name) for line, name in visit(ast.parse(source)) if not name.startswith("_"))


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Texts of several words that are no docstrings, with `{}` for what is filled in: whatever is raised, printed or shown."""
    tree = ast.parse(source)
    passed = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in node.values}
            text = "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            text = node.value
        else:
            continue
        if " " in text.strip():
            yield node.lineno, text


def metric_names(source: str) -> Iterator[tuple[int, str]]:
    """Strings that are keys of a dict or an index, or the name in `log(name, …)`: the names that a training logs."""
    for node in ast.walk(ast.parse(source)):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".log"):
            keys = list(node.args[:1])
        for key in keys:
            for part in ast.walk(key) if key else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch(r"[\w/]+", part.value):
                    yield node.lineno, part.value


def keys_of(value: object) -> Iterator[str]:
    """The keys of a configuration, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def fields_of(owner: type, seen: set[type] | None = None) -> Iterator[str]:
    """The parameters of a constructor, choices of a `Literal`, and those of the classes that its parameters take."""
    seen = set() if seen is None else seen
    for parent in owner.__mro__:
        if "__init__" not in vars(parent) or not parent.__module__.startswith("unitok") or parent in seen:
            continue
        seen.add(parent)
        hints = typing.get_type_hints(parent.__init__)
        for name in inspect.signature(parent.__init__).parameters:
            yield name
            yield from _within(hints.get(name), seen)


def _within(hint: object, seen: set[type]) -> Iterator[str]:
    if typing.get_origin(hint) is typing.Literal:
        yield from (str(choice) for choice in typing.get_args(hint))
    elif isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        yield from fields_of(hint, seen)
    else:
        for inner in typing.get_args(hint):
            yield from _within(inner, seen)


def prose_of_page(text: str) -> str:
    """A page without its code and the targets of its links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return re.sub(r"\]\([^)]*\)", "]", text)


def parts_of_template(text: str) -> tuple[list[str], str]:
    """The names in the expressions of a Jinja template, and its text without expressions and tags."""
    expressions = r"\{\{.*?\}\}|\{%.*?%\}"
    names = re.findall(r"\w+", " ".join(re.findall(expressions, text, flags=re.S)))
    return names, re.sub(rf"{expressions}|<[^>]*>", " ", text, flags=re.S)


# ---- What must be clean ---------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    paths = (path for folder in ("unitok", "examples", "docs") for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*paths, ROOT / "sample.py")}


def wrong_in(part: Callable[[str], Iterator[tuple[int, str]]], check: Callable[[str], list[str]], rooms: str = "") -> str:
    """What is wrong in the sources, a line each."""
    found = []
    for file, source in sources().items():
        if file.startswith(rooms):
            found += [(file, line, wrong) for line, text in part(source) for wrong in check(text)]
    return "\n".join(f"{file}:{line}: {wrong}" for file, line, wrong in found)


def test_public_names():
    assert not wrong_in(public_names, lambda name: wrong_names([name]))


def test_docstrings():
    assert not wrong_in(docstrings, lambda text: wrong_prose(text, DOCSTRINGS))


def test_messages():
    assert not wrong_in(messages, wrong_prose)


def test_metrics():
    assert not wrong_in(metric_names, lambda name: wrong_names([name], METRICS), "unitok/training/")
    named = {name for file, source in sources().items() if "training" in file for _, name in metric_names(source)}
    assert {"tokens_per_second", "eta_minutes"} <= named


def actions(verb: str) -> list[argparse.Action]:
    return make_parser(function_of(verb), f"unitok {verb}")._actions


@pytest.mark.parametrize("verb", VERBS)
def test_flags_and_their_help(verb):
    names = [flag.lstrip("-").replace("-", "_") for action in actions(verb) for flag in action.option_strings]
    kinds = ("text_", "image_", "audio_")
    names += [name.removeprefix(kind) for name in names for kind in kinds if name.startswith(kind)]
    texts = [VERBS[verb], *(str(action.help) for action in actions(verb))]
    choices = [str(choice) for action in actions(verb) for choice in action.choices or ()]
    found = wrong_names(names, NAMES | FLAGS | FLAGS_OF.get(verb, {})) + wrong_names(choices, CHOICES)
    assert found + [wrong for text in texts for wrong in wrong_prose(text)] == []


def test_configurations():
    from unitok.data import AudioFiles, ImageFiles, TokenShards
    from unitok.scenes import SceneSamples
    from unitok.training import AudioTokenizerTraining, DecoderTraining, ImageTokenizerTraining, Samples

    found, paths = [], sorted((ROOT / "unitok" / "configs").rglob("*.yaml"))
    assert len(paths) > 10
    for path in paths:
        where, text = path.relative_to(ROOT).as_posix(), path.read_text()
        found += [(where, wrong) for wrong in wrong_names(keys_of(yaml.safe_load(text)), NAMES | KEYS)]
        found += [(where, wrong) for wrong in wrong_prose("\n".join(re.findall(r"#(.*)", text)))]
    for owner in (
        ImageTokenizerTraining,
        AudioTokenizerTraining,
        DecoderTraining,
        Samples,
        SceneSamples,
        ImageFiles,
        AudioFiles,
        TokenShards,
    ):
        found += [(owner.__name__, wrong) for wrong in wrong_names(fields_of(owner), NAMES | KEYS | CHOICES)]
    assert [f"{where}: {wrong}" for where, wrong in found] == []


PAGES_OF_DOCS = [
    page.relative_to(ROOT).as_posix()
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if page.name != "notes.md"  # dated findings keep the words of their day
]


@pytest.mark.parametrize("page", PAGES_OF_DOCS)
def test_docs(page):
    text = prose_of_page((ROOT / page).read_text())
    if page == "CHANGELOG.md":  # what stood there before the rule keeps its words
        text, older = text.split("One room per idea")
        assert text
        assert older
    assert wrong_prose(text, PAGES) == []


def test_templates_of_pages():
    found, templates = (
        [],
        [path for path in sorted((ROOT / "unitok" / "pages").iterdir()) if path.suffix in (".html", ".md", ".css")],
    )
    assert len(templates) > 5
    for path in templates:
        names, text = parts_of_template(path.read_text())
        found += [(path.name, wrong) for wrong in wrong_names(names) + wrong_prose(text)]
    assert found == []


def test_comments_of_the_makefile():
    comments = re.findall(r"#(.*)", (ROOT / "Makefile").read_text())
    assert len(comments) > 5
    assert wrong_prose("\n".join(comments)) == []


# ---- Each form is found ---------------------------------------------------------------------------------------------


FORMS = [
    *(
        "def {}(): ...",
        "class {}: ...",
        "class A:\n    {}: int = 0",
        "def f({}=0): ...",
        "def f(*, {}): ...",
        "async def f({}, /): ...",
    ),
    *("class A:\n    def __init__(self, {}): ...", "class A:\n    def {}(self): ..."),
]


@pytest.mark.parametrize("form", FORMS)
def test_an_old_name_is_found_in_every_form(form):
    for old in [*NAMES, "seconds_a_page", "legal_sets", "codebook_normalise", "crop_centre", "sound_rate"]:
        code = form.format(old)
        assert wrong_names(name for _, name in public_names(code)), old
        assert not list(public_names("def _f():\n" + textwrap.indent(code, "    ")))  # what nobody calls


@pytest.mark.parametrize(
    "text",
    [
        "ids a second", "bits an id", "a line a document: two lines a document", "a code a frame", "a process a core", "Pictures of cats", "the sound of it",
        "legal sets", "the next id", "what it is told", "the generator hears of it", "a share of the run", "shares of the tokens",
        "what share is bad", "at random places", "turn the knobs", "it is normalised", "quantisation", "colours", "the centre square",
        "neighbours", "behaviour", "learnt from them", "orthogonalise",
    ],
)  # fmt: skip
def test_an_old_word_is_found_in_prose_and_in_every_place_of_it(text):
    text = f"it is {text}, so to say"
    assert wrong_prose(text)
    assert not wrong_prose(f"`{text}`")
    for code in (f'raise UserError(f"{{x}}: {text}")', f'print("{text}", file=f)', f'log.warning("{text}")'):
        assert [wrong for _, said in messages(code) for wrong in wrong_prose(said)]
    assert [wrong for _, said in docstrings(f'def f():\n    """{text}"""') for wrong in wrong_prose(said)]
    assert wrong_prose(prose_of_page(f"# Title\n\n{text}\n"))
    assert not wrong_prose(prose_of_page(f"```\n{text}\n```\n"))


@pytest.mark.parametrize(
    "text",
    [
        "keep the files", "processes share each batch", "it takes the place of the old one", "a sample rate of 24 kHz", "a normalized raise",
        "what you want", "a token per frame", "a noise, otherwise a promise", "the images a model writes", "an optimizer", "half a second",
    ],
)  # fmt: skip
def test_honest_words_are_left_alone(text):
    assert not wrong_prose(text, PAGES | DOCSTRINGS)


def test_keys_metrics_and_results_are_found():
    assert wrong_names(keys_of({"model": [{"init_args": {"rate": 1}}]}), NAMES | KEYS)
    assert wrong_names(
        name for _, name in metric_names('self.log("seconds_a_step", 1)\nout["codebook_use_0"] = {"bits_an_id": 2}')
    )
    assert len(list(metric_names('self.log("seconds_a_step", 1)\nout["codebook_use_0"] = {"bits_an_id": 2}'))) == 3
    assert wrong_prose("Fit a line; -> its slope", DOCSTRINGS)
    assert wrong_prose("The next ids: all ids that are drawn", PAGES)
    assert not wrong_prose("Sorted by document ids.", PAGES)


def test_old_words_are_found_in_templates_and_whole_names():
    names, text = parts_of_template("<p title='x'>its share of it</p>{% if row.share %}{{ row.a }}{% endif %}")
    assert wrong_names(names) == ["share: say fraction"]
    assert wrong_prose(text)
    assert wrong_names(["picture", "sounds", "Legal"])
    assert {"unitok/api.py", "examples/esperanto.py", "docs/figures/readme.py"} < set(sources())


def test_fields_are_found_through_the_classes_of_parameters():
    from unitok.training import ImageTokenizerTraining

    assert {"lr", "disc_only", "codebook_size", "hinge"} <= set(fields_of(ImageTokenizerTraining))
