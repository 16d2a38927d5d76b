"""Checkpoints of any program as plain types and tensors. Nothing in them is ever executed.

`torch.load(weights_only=True)` refuses files that also hold objects of other programs, such as Lightning's callbacks or an argparse
Namespace; published checkpoints often do. Here such objects are read as placeholders that do nothing (`Inert`), so the tensors can be
read. Files that still cannot be read are refused, unless `trust` allows to unpickle them. A sharded checkpoint is a folder with one
pickle of PyTorch's own; the classes that it names are checked before it is read.
"""

import io
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok.errors import UserError, first_line
from unitok.files import Json, atomic_write, read_yaml, settle

log = logging.getLogger(__name__)


def load_checkpoint(path: Path, trust: bool = False) -> Any:
    """Return what a checkpoint holds, with `Inert` in place of objects of other programs. Errors: `UserError` naming the file.

    Tensors are read from the disk when they are used, where the format allows it.
    trust: unpickle everything, which runs whatever code the file's author put there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if is_sharded(path):
        return _load_sharded(path)
    foreign: list[str] = []
    while True:
        try:
            return _load(path, trust, foreign)
        except Exception as error:  # a torn file, and what a stand-in cannot do, raise almost anything
            named = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))  # torch names the first
            if trust or not (named or foreign):
                cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # torch writes advice around it
                reason = first_line(ValueError(cause or str(error)))
                raise UserError(f"{path}: {_foreign(path) or f'not a checkpoint that can be read ({reason})'}") from None
            if named is None or named[1] in foreign:
                what = f"holds objects that would have to be run to be read ({', '.join(sorted(foreign)[:4])})"
                raise UserError(f"{path}: {what}; if you trust its author, pass --trust-checkpoint") from None
            foreign.append(named[1])


def _load(path: Path, trust: bool, foreign: list[str]) -> object:
    """The checkpoint in a file, with placeholders for objects of the classes `foreign`."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([(_placeholder(name), name) for name in foreign]):
        warnings.simplefilter("ignore")  # about a TorchScript archive, which is refused later
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
        except RuntimeError:  # PyTorch's format from before 2020, or a file system without mmap
            return torch.load(path, map_location="cpu", weights_only=not trust)


def write_checkpoint(checkpoint: Mapping[str, object], path: Path) -> None:
    """Write a checkpoint, completely or not at all. Errors: `UserError` where the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, binary=True) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError where the disk is full
        remedy = "the checkpoint before it is whole: make room and go on with --resume auto"
        raise UserError(f"{path}: could not be written ({first_line(error)}); {remedy}") from None


# ---- Sharded checkpoints (FSDP2): a folder with a part for each process ------------------------------------------------

_INDEX, _REST = ".metadata", "meta.pt"
_DCP = "torch.distributed.checkpoint"
#: The classes that an index names: plain records, which do nothing when they are made.
_OF_AN_INDEX = {
    *("torch.Size", "torch.serialization._get_layout", f"{_DCP}.filesystem._StorageInfo"),
    *(f"{_DCP}.metadata.{name}StorageMetadata" for name in ("Bytes", "Chunk", "Tensor")),
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    *(f"pathlib{where}.{kind}Path" for where in ("", "._local") for kind in ("Posix", "Windows")),  # Python 3.13: _local
}


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of parts, as Lightning's `ModelParallelStrategy` writes them."""
    return path.is_dir() and (path / _REST).exists()


def _enum_member(owner: object, name: str) -> object:
    """The member of an enum, which Python 3.11.0 to 3.11.3 pickle as `getattr` of its class; nothing else has attributes here."""
    if not (isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__):
        raise pickle.UnpicklingError("it names builtins.getattr")
    return owner[name]


class _IndexReader(pickle.Unpickler):
    """Refuses classes that an index of PyTorch's distributed checkpoints does not name."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and f"{module}.{name}" not in _OF_AN_INDEX:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's description of itself (its `unitok` entry); {} for one of another program. Weights stay on the disk.

    Errors: `UserError` for a checkpoint that cannot be read.
    """
    if is_sharded(path):
        _check_index(path)
        path = path / _REST
    checkpoint = load_checkpoint(path)
    described = checkpoint.get("unitok") if isinstance(checkpoint, dict) else None
    return described if isinstance(described, dict) else {}


def _check_index(path: Path) -> None:
    """Raise `UserError` unless all files of a sharded checkpoint are complete and none of them would execute anything."""
    try:
        with open(path / _INDEX, "rb") as file:
            index = _IndexReader(file).load()
        for entry, where in index.storage_data.items():
            part = (path / where.relative_path).resolve()
            if not part.is_relative_to(path.resolve()):
                raise ValueError(f"{where.relative_path} lies elsewhere")
            if part.stat().st_size - where.length < where.offset:
                raise ValueError(f"{where.relative_path} is cut off")
            if type(index.state_dict_metadata[entry.fqn]).__name__ == "BytesStorageMetadata":
                with open(part, "rb") as file:
                    file.seek(where.offset)
                    data = file.read(where.length)
                torch.load(io.BytesIO(data), weights_only=True)  # PyTorch itself would unpickle it
    except Exception as error:  # a torn pickle raises almost anything
        raise UserError(f"{path}: not a sharded checkpoint that can be read ({first_line(error)})") from None


def _load_sharded(path: Path) -> dict[str, object]:
    """The weights and the description of a sharded checkpoint; the optimizer's state is not read."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    _check_index(path)
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})  # type: ignore[no-untyped-call]
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return dict(load_checkpoint(path / _REST)) | state


class Inert:
    """A placeholder for an object of another program: takes any arguments, keeps its state, and does nothing."""

    state: object = None

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    __setitem__ = append = extend = __init__


def _placeholder(name: str) -> type:
    module, _, short = name.rpartition(".")
    return type(short, (Inert,), {"__module__": module})


def load_weights(path: Path, trust: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or a checkpoint, by name: `{"state_dict": {"w": …}}` gives `state_dict.w`.

    Errors: `UserError` that says what the file is instead.
    """
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        raise UserError(f"{path}: a folder; give the file of the weights in it")
    if path.is_file() and is_safetensors(path):
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # a torn file raises almost anything
            raise UserError(f"{path}: {_foreign(path) or f'not a whole safetensors file ({first_line(error)})'}") from None
    return weights_in(load_checkpoint(path, trust), path)


def weights_in(checkpoint: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors in what `load_checkpoint` returned, by name as in `load_weights`. Errors: `UserError` where there are none."""
    tensors = {name: tensor for name, tensor in _tensors(checkpoint, "") if name}
    if not tensors:
        raise UserError(f"{path}: no weights in it")
    return tensors


def _tensors(node: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Inert) and isinstance(node.state, dict):  # a whole module, as `torch.save(model)` writes it
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _tensors(node.state.get(kind), name)
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _tensors(child, f"{name}.{key}" if name else str(key))


def merge_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge peft's LoRA layers into plain weights, W + scale x B A. scale: alpha / rank."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, a in state.items():
        if match := re.fullmatch(r"(.*)\.lora_A\.default\.weight", name):
            b = state[f"{match[1]}.lora_B.default.weight"]
            weight = plain[f"{match[1]}.weight"]
            plain[f"{match[1]}.weight"] = (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)
    return plain


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors by its first bytes or its suffix."""
    with open(path, "rb") as file:
        head = file.read(9)
    header = head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32  # its length, then JSON
    return header or path.suffix == ".safetensors"


#: First bytes of files that people take for weights -> what they are, and what to do.
_HEADS = {
    b"": "an empty file; get it again",
    b"version https://git-lfs": "a Git LFS pointer, not the weights themselves; get them with `git lfs pull`",
    b"<": "a web page, not weights; download the file itself",
    b"GGUF": "a GGUF file, whose weights are quantized; give the model's safetensors or checkpoint",
    b"\x93NUMPY": "a NumPy array (.npy), not a checkpoint",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow), not a checkpoint of PyTorch",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}


def _foreign(path: Path) -> str:
    """What a file without readable weights is, and what to do; "" where that is unknown."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        head = file.read(200)
    for magic, answer in _HEADS.items():
        if head.lstrip().startswith(magic) if magic else not head:
            return answer
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive (code and weights); save the model's state_dict() instead"
        if names and all(name.endswith(".npy") for name in names):
            return "NumPy arrays (.npz), not a checkpoint"
        if not any(name.endswith("data.pkl") for name in names):
            return "a zip archive; unpack it first"
        return "a checkpoint of PyTorch's, not safetensors; rename it to .ckpt" if path.suffix == ".safetensors" else ""
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c.isspace() for c in text):
        return f"a text file, not weights; it begins {text[:40]!r}"
    return ""


def training_facts(path: Path, described: Mapping[str, object]) -> dict[str, Json]:
    """Return what is known of the training that wrote a checkpoint: `data` (names of data sets, without their folders), `steps`,
    `samples`, `minutes`, and of a decoder `tokens`.

    path: of the checkpoint; its run's `config.yaml` names the data. described: the checkpoint's `unitok` entry.
    """
    facts: dict[str, Json] = {}
    run = path.absolute().parent.parent
    config = next((file for file in (run / "metrics" / "config.yaml", run / "config.yaml") if file.is_file()), None)
    data = ((read_yaml(config) or {}).get("data") or {}).get("init_args") or {} if config else {}
    paths = data.get("path") or []
    names = [Path(str(one)).name for one in ([paths] if isinstance(paths, str) else paths)]
    facts |= {"data": ", ".join(names)} if names else {}
    steps, samples, budget = (described.get(key) for key in ("steps_done", "samples_seen", "budget"))
    if isinstance(steps, int) and isinstance(samples, int):
        facts |= {"steps": steps, "samples": samples}
        if isinstance(data.get("sequence_length"), int):
            facts["tokens"] = samples * int(data["sequence_length"])
    if isinstance(budget, dict) and isinstance(budget.get("spent"), float):
        facts["minutes"] = round(budget["spent"] / 60, 1)
    return facts


_LAST = ("stopped.ckpt", "final.ckpt")  # names of a run's last checkpoint, the later one last


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps in a run's folder; None where there is none. Those that the run named come first.

    Checkpoints that cannot be read are skipped with a warning. Times of files do not count: a backup may be younger.
    """
    for old in (folder / "checkpoints").glob(".*.ckpt.unitok-old"):  # a sharded one whose replacement was interrupted
        settle(old.with_name(old.name[1:].removesuffix(".unitok-old")))
    torn: list[UserError] = []
    for _ in range(2):  # a run that is going on may remove what was listed
        torn, found = [], []
        for file in (folder / "checkpoints").glob("*.ckpt"):
            try:
                steps = int(check_checkpoint(file).get("steps_done", 0))
            except UserError as error:
                torn += [error] if file.exists() else []
                continue
            found.append((is_written_by_run(file), steps, _LAST.index(file.name) if file.name in _LAST else -1, file))
        if found:
            break
    for problem in torn:
        log.warning("%s: skipped", problem)
    return max(found)[-1] if found else None


def is_written_by_run(file: Path) -> bool:
    """Return whether a checkpoint's name is one that a run gives, not the user."""
    return file.name in _LAST or re.fullmatch(r"step=\d+\.ckpt", file.name) is not None
