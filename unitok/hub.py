"""Names of models: folders, built-in bundles, and repositories of the Hugging Face hub, with model cards for the latter.

The files of a repository are read and never executed: only JSON, safetensors and models of text tokenizers are downloaded.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from unitok.errors import UserError, first_line
from unitok.files import Json, kind_of, settle

#: Files of a repository that are downloaded.
_FILES = ["*.json", "*.safetensors", "*.model"]
#: What an older bundle in a repository may hold; what the new one does not replace is removed there.
_REPLACED = ["tokenizers/*", "model/*", "generation_config.json"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUILT_IN = Path(str(files("unitok"))) / "bundles"


# ---- Names -> folders ------------------------------------------------------------------------------------------------


def built_in() -> list[str]:
    """Return the names of the bundles that unitok ships."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/bundle.json"))


def local(path: Path) -> Path:
    """Return the path itself, or the folder of the built-in bundle of that name, as `find` does. Nothing is looked for elsewhere."""
    return find(str(path)) if str(path) in built_in() else path


def find(
    name: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a bundle, or of one of its parts.

    Args:
        name: a folder; else, as a str, a built-in bundle (a name without a slash, such as `scenes`) or a repository of the Hugging Face
            hub (`user/name`). An existing folder comes first; before a built-in bundle only if unitok wrote a bundle or a part into it. A `Path` is a folder, whether it
            exists or not.
        revision: branch, tag or commit of a repository; default: `main`.
        cache_dir: where repositories are kept; default: the hub's own cache.
        local_files_only: download nothing; also where the environment says `HF_HUB_OFFLINE=1`.
        token: for private and gated repositories; default: the one of `hf auth login`.

    Errors: `UserError` that says what is missing: the folder, the repository, its revision, access to it, or the network.
    """
    folder = Path(name)
    is_data = name in built_in() and not kind_of(settle(folder))  # a folder of scenes, say
    if isinstance(name, Path) or (settle(folder).exists() and not is_data):
        if revision is not None:
            raise UserError(f"revision {revision!r}: {name} is a folder; revisions are of repositories of the Hugging Face hub")
        return folder
    if _REPOSITORY.fullmatch(name):
        return _download(name, revision, cache_dir, local_files_only, token)
    if "/" in name or not name:
        raise UserError(f"{name or 'an empty name'}: no such folder")
    if name not in built_in():
        names = ", ".join(built_in()) or "none"
        raise UserError(f"{name}: no such folder, and no built-in bundle (there are: {names}); a repository is USER/NAME")
    if revision is not None:
        raise UserError(f"revision {revision!r}: {name} is a built-in bundle, which has none; it is of this version of unitok")
    return BUILT_IN / name


def name_of(folder: Path) -> str:
    """The name of a bundle's folder; of one that was downloaded `user/name`, where its folder is called after a commit."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def _download(
    name: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool, token: str | bool | None
) -> Path:
    """The folder of a repository in the hub's cache, after a download of what is not there."""
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.utils import httpx

    offline = local_files_only or constants.HF_HUB_OFFLINE
    why = "no such folder; the Hugging Face hub"
    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=offline,
            token=token,
            allow_patterns=_FILES,
            library_name="unitok",
        )
    except errors.GatedRepoError:
        access = f"ask for access at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or give a token"
        raise UserError(f"{name}: a gated repository, whose owner has to let you in; {access}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: {why} has no such repository, or a private one; check the name, or give a token") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: the repository has no revision {revision!r}; give one of its branches, tags or commits"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        at = f" at revision {revision}" if revision else ""
        if offline:
            network = f"{why}'s cache does not hold it{at} whole, and nothing may be downloaded"
            raise UserError(f"{name}: {network}; allow it (local_files_only=False, HF_HUB_OFFLINE=0)") from None
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{name}: {why} cannot be reached ({reason}), its cache does not hold it{at}; check the network"
        ) from None
    except (OSError, httpx.HTTPError, errors.RevisionResolutionError, errors.HFValidationError) as error:
        # no token, a full disk, a server's own trouble, torn downloads, a name that the hub does not allow
        raise UserError(f"{name}: could not be read from the Hugging Face hub ({first_line(error)})") from None
    return Path(found)


# ---- Folders -> repositories -----------------------------------------------------------------------------------------


def upload(
    folder: Path,
    name: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    keep_card: bool = False,
) -> str:
    """Make a repository of the Hugging Face hub hold a bundle's folder, and return the URL of the commit.

    Args:
        name: `user/name` or `organization/name`; made if need be.
        private: whether a new repository is private; default: the organization's, else public.
        revision: the branch; made if need be. Default: `main`.
        keep_card: do not replace a README.md that the repository has.

    Parts of an older bundle there that the new one lacks are removed in the same commit; other files stay.
    Errors: `UserError` with the hub's reason.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import httpx

    api = HfApi(token=token, library_name="unitok")
    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"repo_id {name!r}: give USER/NAME")
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        kept = keep_card and api.file_exists(name, "README.md", revision=revision)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a bundle of unitok",
            delete_patterns=_REPLACED,
            ignore_patterns=["README.md"] if kept else None,
        )
    except (OSError, httpx.HTTPError, errors.HFValidationError) as error:
        raise UserError(f"{name}: could not be written to the Hugging Face hub ({first_line(error)})") from None
    return commit.commit_url


# ---- Model cards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CardTexts:
    """What only the author of a model knows, as Markdown; the card says "Not stated." for what is left out.

    Args:
        license: an identifier of the Hugging Face hub, such as `apache-2.0`
        description: what the model is
        training_data: what it was trained on, beside the names of data sets that training wrote down
        evaluation: how it was measured, beside the scores
        intended_use: what it is for
        limits: what it does badly, and what it must not be used for
    """

    license: str = ""
    description: str = ""
    training_data: str = ""
    evaluation: str = ""
    intended_use: str = ""
    limits: str = ""


def make_card_texts(given: Mapping[str, str]) -> CardTexts:
    """Texts from plain values. Errors: `UserError` for a key that a card does not have, or a value that is no text."""
    known = asdict(CardTexts())
    for key, text in given.items():
        if key not in known:
            raise UserError(f"card: has no {key!r}; it has {', '.join(known)}")
        if not isinstance(text, str):
            raise UserError(f"card: {key} is {text!r}; it is a text")
    return CardTexts(**given)


@dataclass(frozen=True)
class PartFacts:
    """A row of a card's table: a tokenizer or the decoder. tokens: how many of the vocabulary stand for its content."""

    name: str
    kind: str
    parameters: int = 0
    tokens: int = 0


def model_card(
    name: str,
    kinds: list[str],
    vocab_size: int,
    parts: list[PartFacts],
    training: Mapping[str, Json],
    scores: Json,
    texts: CardTexts,
) -> str:
    """Return a model card: Markdown below YAML metadata, as the Hugging Face hub reads it.

    Args:
        name: the repository, `user/name`.
        kinds: kinds of content that the model reads and writes.
        training: of each part, by its name: what is known of its training, by words (`data`, `steps`, …).
        scores: numbers by name, also nested; they become rows of a table.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="unitok", license=texts.license or None, tags=["unitok", "multimodal", *kinds])
    template = Path(str(files("unitok"))) / "pages" / "model_card.md"
    rows = {
        _shown(part): ", ".join(f"{_shown(key)} {_shown(value)}" for key, value in _leaves(known))
        for part, known in training.items()
    }
    measured = [(_shown(key), _shown(value)) for key, value in _leaves(scores)]
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        name=name,
        kinds=kinds,
        vocab_size=vocab_size,
        parts=parts,
        training=rows,
        scores=measured,
        texts=texts,
        generates=any(part.kind == "decoder" for part in parts),
    )
    return str(card)


def _leaves(value: Json, name: str = "") -> Iterator[tuple[str, Json]]:
    """Each value of nested objects, with its path of keys."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{name} / {key}" if name else key)
    elif value is not None and value != []:
        yield name, value


def _shown(value: Json) -> str:
    """A value in a table's cell: on one line, without what would end the cell."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
