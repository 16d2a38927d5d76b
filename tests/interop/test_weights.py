"""Promises of weights on a disk: what an index names is read and nothing else; files that are no weights say what they are."""

import argparse
import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unitok.checkpoints import load_weights
from unitok.errors import UserError
from unitok.interop.weights import read_folder

ONE, TWO = torch.ones(3), torch.full((3,), 2.0)


def index(folder, name="model.safetensors.index.json", **files):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_an_index_is_followed_to_the_letter(tmp_path, caplog):
    save_file({"a": ONE, "stale": TWO}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": TWO}, tmp_path / "model-00002-of-00002.safetensors")
    index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    save_file({"a": TWO * 9}, tmp_path / "model-00001-of-00099.safetensors")
    save_file({"a": TWO * 9}, tmp_path / "consolidated.safetensors")
    found = read_folder(tmp_path)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], ONE)
    assert "not read: consolidated.safetensors, model-00001-of-00099.safetensors" in caplog.text
    index(tmp_path, a="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="00002.safetensors: no c in it, though model.safetensors.index.json says so"):
        read_folder(tmp_path)
    index(tmp_path, a="model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="model-00001-of-00003.safetensors: no such file, though"):
        read_folder(tmp_path)
    for broken in ("[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(UserError, match="not an index of weights|a JSON list, not an object"):
            read_folder(tmp_path)
    index(tmp_path, a="model-00001-of-00003.safetensors")
    save_file({"a": TWO}, tmp_path / "model.safetensors")  # saved anew, whole: the index is a leftover
    assert torch.equal(read_folder(tmp_path)["a"], TWO)


def test_without_an_index_the_standard_file_is_read_or_one_line_says_why_not(tmp_path, caplog):
    with pytest.raises(UserError, match=r"no .safetensors or .bin file in it"):
        read_folder(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="model.gguf cannot be read"):
        read_folder(tmp_path)
    torch.save({"a": ONE}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    assert torch.equal(read_folder(tmp_path)["a"], ONE)
    assert not caplog.text
    save_file({"a": TWO}, tmp_path / "model.safetensors")
    assert torch.equal(read_folder(tmp_path)["a"], TWO)
    assert "read model.safetensors; not read: pytorch_model.bin" in caplog.text
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "x-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"1 of 2 files x-…-of-00002, and no index"):
        read_folder(tmp_path)
    save_file({"b": ONE}, tmp_path / "x-00002-of-00002.safetensors")
    assert read_folder(tmp_path).keys() == {"a", "b"}
    save_file({"b": ONE}, tmp_path / "y.safetensors")
    assert read_folder(tmp_path).keys() == {"a", "b"}
    (tmp_path / "x-00002-of-00002.safetensors").rename(tmp_path / "z.safetensors")
    (tmp_path / "x-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="several files could be its weights"):
        read_folder(tmp_path)


def test_files_that_are_no_weights_say_what_they_are(tmp_path):
    file = tmp_path / "model.ckpt"
    heads = {
        "an empty file": b"",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a web page": b"\n<!DOCTYPE html><html><head>",
        "a GGUF file": b"GGUF\x03\0\0\0" + bytes(64),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "a gzip archive": b"\x1f\x8b\x08" + bytes(64),
        "a text file, not weights; it begins 'Entry not found'": b"Entry not found",
    }
    for says, data in heads.items():
        for path in (file, file.with_suffix(".safetensors")):
            path.write_bytes(data)
            with pytest.raises(UserError, match=f"{path.name}: {says}"):
                load_weights(path)
    with open(file, "wb") as out:
        np.savez(out, a=np.ones(2))
    with pytest.raises(UserError, match="NumPy arrays"):
        load_weights(file)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    with pytest.raises(UserError, match="a TorchScript archive"):
        load_weights(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(UserError, match="a zip archive; unpack it first"):
        load_weights(file)
    save_file({"a": ONE}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="cut.safetensors: not a whole safetensors file"):
        load_weights(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="a folder; give the file"):
        load_weights(tmp_path)
    (tmp_path / "whole.safetensors").rename(file)  # content decides, not the suffix
    assert torch.equal(load_weights(file)["a"], ONE)
    caught = {"epoch": np.int64(3), "best": np.float32(0.5), "history": np.arange(4), "args": argparse.Namespace(lr=1e-4)}
    torch.save({"state_dict": {"a": ONE}} | caught, file)
    assert load_weights(file).keys() == {"state_dict.a"}
    torch.save({"state_dict": {"a": ONE}} | caught, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_weights(tmp_path / "old.pth").keys() == {"state_dict.a"}
    file.rename(tmp_path / "named.safetensors")
    with pytest.raises(UserError, match="a checkpoint of PyTorch's, not safetensors; rename it"):
        load_weights(tmp_path / "named.safetensors")
