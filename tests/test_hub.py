"""Promises of names: a folder, a built-in bundle, a repository in the hub's cache; what is pushed; what is missing is one clear line."""

import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import unitok
from unitok.api import Unitok
from unitok.bundle import Bundle, make_bundle
from unitok.bundle.checksums import checksums
from unitok.cli import main
from unitok.cli.arguments import find_bundle
from unitok.errors import UserError
from unitok.hub import BUILT_IN, CardTexts, built_in, find, name_of
from unitok.model import Decoder
from unitok.tokenizers import AudioTokenizer, ImageTokenizer, TextTokenizer

OLD, NEW = "1" * 40, "2" * 40


def put(cache: Path, commit: str, folder: Path, **refs: str) -> None:
    """Lay a folder into a cache as the hub's own downloads do: blobs by hash, snapshots of links to them, refs to commits."""
    repository = cache / "models--ada--frogs"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for name, target in refs.items():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(target)


@pytest.fixture
def cache(tmp_path, bundle_folder):
    """A cache of the hub with two commits of a repository: tokenizers alone, tagged v1, and the whole bundle on main."""
    tokenizers = Bundle.from_pretrained(bundle_folder, parts="tokenizers")
    tokenizers.save_pretrained(tmp_path / "tokenizers")
    put(tmp_path / "cache", OLD, tmp_path / "tokenizers", v1=OLD)
    put(tmp_path / "cache", NEW, bundle_folder, main=NEW)
    return tmp_path / "cache"


def test_a_repository_is_read_from_the_cache_by_branch_tag_and_commit(cache, bundle_folder, monkeypatch):
    u = Unitok.from_pretrained("ada/frogs", cache_dir=cache, local_files_only=True)
    assert u.parts == ["text", "image", "audio", "model"]
    assert u.vocab == Bundle.from_pretrained(bundle_folder, parts=[]).vocab
    for revision in ("v1", OLD):
        old = Unitok.from_pretrained("ada/frogs", cache_dir=cache, revision=revision, local_files_only=True)
        assert old.parts == ["text", "image", "audio"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for kind, tokenizer in (("text", TextTokenizer), ("image", ImageTokenizer), ("audio", AudioTokenizer)):
        assert tokenizer.from_pretrained("ada/frogs", revision="v1").fingerprint() == u.tokenizers[kind].fingerprint()


def test_a_bundle_of_the_command_line_may_be_a_repository(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    main(["sample", "--bundle", "ada/frogs", "--text", "hm", "--modalities", "image:2x2", "--out", "out"])
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    with pytest.raises(SystemExit):
        main(["sample", "--bundle", "ada/frogs@v1", "--text", "hm", "--out", "out"])
    assert "the bundle has no decoder" in capsys.readouterr().err


def test_a_folder_comes_first(cache, bundle_folder, tmp_path, monkeypatch):
    shutil.copytree(bundle_folder, tmp_path / "ada" / "frogs")
    monkeypatch.chdir(tmp_path)
    assert find("ada/frogs", cache_dir=cache) == Path("ada/frogs")
    with pytest.raises(UserError, match=r"revision 'v1': ada/frogs is a folder"):
        find("ada/frogs", revision="v1", cache_dir=cache)


def test_a_name_without_a_slash_is_a_built_in_bundle(bundle_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"frogs: no such folder, and no built-in bundle \(there are: scenes\)"):
        Unitok.from_pretrained("frogs")
    assert built_in() == ["scenes"]
    assert Path(unitok.__file__).parent / "bundles" == BUILT_IN
    monkeypatch.setattr("unitok.hub.BUILT_IN", tmp_path)
    shutil.copytree(bundle_folder, tmp_path / "frogs")
    assert Unitok.from_pretrained("frogs").model is not None
    with pytest.raises(UserError, match=r"toads: no such folder, and no built-in bundle \(there are: frogs\)"):
        Unitok.from_pretrained("toads")
    with pytest.raises(UserError, match=r"revision 'v1': frogs is a built-in bundle"):
        Unitok.from_pretrained("frogs", revision="v1")


def test_a_folder_of_data_does_not_hide_a_built_in_bundle_and_a_bundle_does(bundle_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unitok.hub.BUILT_IN", tmp_path / "bundles")
    shutil.copytree(bundle_folder, tmp_path / "bundles" / "scenes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    assert find("scenes") == tmp_path / "bundles" / "scenes"
    assert find_bundle("scenes") == find_bundle(Path("scenes")) == tmp_path / "bundles" / "scenes"
    shutil.copytree(bundle_folder, tmp_path / "scenes", dirs_exist_ok=True)
    assert find("scenes") == find_bundle("scenes") == Path("scenes")


def test_a_damaged_or_missing_file_of_a_bundle_with_checksums_is_named(bundle_folder, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_folder, folder)
    info = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(info | {"sha256": checksums(folder)}))
    assert Unitok.from_pretrained(folder).model is not None
    weights = folder / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model/model\.safetensors: damaged \(its checksum differs\); install unitok again"):
        Unitok.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"bundle: model/model\.safetensors is missing"):
        Unitok.from_pretrained(folder)


@pytest.mark.parametrize("name", ["./ada/frogs", "../ada/frogs", "/ada/frogs", "~/frogs"])
def test_a_path_of_the_command_line_is_never_asked_for_on_the_hub(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SystemExit):
        main(["sample", "--bundle", name, "--text", "hm", "--out", "out"])
    assert f"{Path(name)}: not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize("path", [Path("ada/frogs"), "a/b/c", "./ada", "../x", "", "ada/../frogs"])
def test_a_path_is_never_asked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no such"):
        Unitok.from_pretrained(path)


def test_what_the_cache_does_not_hold_is_said_offline(cache):
    with pytest.raises(UserError, match=r"^ada/toads: no such folder; the Hugging Face hub's cache does not hold it whole"):
        find("ada/toads", cache_dir=cache)
    with pytest.raises(UserError, match="ada/frogs: .*cache does not hold it at revision v2 whole"):
        find("ada/frogs", "v2", cache_dir=cache, local_files_only=True)


@pytest.fixture
def server(monkeypatch):
    """A server in the hub's place, which answers each request as its `answers` say; (path, status, error code, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code, body = next((a for part, *a in self.server.answers if part in self.path), (404, "RepoNotFound", b""))
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", NEW)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.answers = []
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    huggingface_hub.close_session()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "ada/frogs: no such folder; the Hugging Face hub has no such repository, or a private one"),
        (403, "GatedRepo", "ada/frogs: a gated repository, whose owner has to let you in; ask for access at "),
        (404, "RevisionNotFound", "ada/frogs: the repository has no revision 'v7'; give one of its branches"),
        (503, "", "ada/frogs: no such folder; the Hugging Face hub cannot be reached ("),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, tmp_path, status, code, says):
    server.answers = [("/api/models/ada/frogs", status, code, b"{}")]
    with pytest.raises(UserError) as error:
        Unitok.from_pretrained("ada/frogs", revision="v7", cache_dir=tmp_path)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_a_missing_network_is_one_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"^ada/frogs: no such folder; the Hugging Face hub cannot be reached \([^\n]*check the network$"
    ):
        Unitok.from_pretrained("ada/frogs", cache_dir=tmp_path)


def test_a_push_without_a_network_is_one_line(server, tiny):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"^ada/frogs: could not be written to the Hugging Face hub \([^\n]+\)$"):
        tiny.push_to_hub("ada/frogs", token="hf_x")


@pytest.mark.parametrize("name", ["ada/frogs.git", "ada/a--b", "ada/a..b", "ada/frogs."])
def test_a_name_that_the_hub_does_not_allow_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match=rf"^{name}: could not be read from the Hugging Face hub \([^\n]+\)$"):
        find(name, cache_dir=tmp_path)


def test_only_files_of_models_are_downloaded(server, bundle_folder, tmp_path):
    names = sorted(path.relative_to(bundle_folder).as_posix() for path in bundle_folder.rglob("*") if path.is_file())
    files = {name: (bundle_folder / name).read_bytes() for name in names} | {"evil.bin": b"pickle", "README.md": b"a card"}
    tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
    info = {"id": "ada/frogs", "sha": NEW, "siblings": [{"rfilename": name} for name in files]}
    server.answers = [
        (f"/api/models/ada/frogs/tree/{NEW}", 200, "", json.dumps(tree).encode()),
        ("/api/models/ada/frogs", 200, "", json.dumps(info).encode()),
        *((f"/resolve/{NEW}/{name}", 200, "", data) for name, data in files.items()),
    ]
    u = Unitok.from_pretrained("ada/frogs", cache_dir=tmp_path)
    assert u.parts == ["text", "image", "audio", "model"]
    found = tmp_path / "models--ada--frogs" / "snapshots" / NEW
    assert (name_of(found), name_of(found.parent)) == ("ada/frogs", "snapshots")
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()) == names


@pytest.fixture
def api(monkeypatch):
    """The hub's client as far as its arguments; `sent` holds the files of an upload."""
    made = create_autospec(huggingface_hub.HfApi, instance=True)
    made.sent = {}

    def upload(*, folder_path, **_):
        made.sent = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/ada/frogs/commit/2", commit_message="", commit_description="", oid=NEW
        )

    made.upload_folder.side_effect = upload
    made.file_exists.return_value = False
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: made)
    return made


def test_a_push_sends_the_bundle_and_its_card_and_nothing_else(api, tiny, bundle_folder):
    assert (
        tiny.push_to_hub("ada/frogs", private=True, revision="v2", commit_message="Frogs")
        == "https://huggingface.co/ada/frogs/commit/2"
    )
    files = {p.relative_to(bundle_folder).as_posix(): p.read_bytes() for p in bundle_folder.rglob("*") if p.is_file()}
    assert {name: data for name, data in api.sent.items() if name != "README.md"} == files
    api.create_repo.assert_called_once_with("ada/frogs", private=True, exist_ok=True)
    api.create_branch.assert_called_once_with("ada/frogs", branch="v2", exist_ok=True)
    given = api.upload_folder.call_args.kwargs
    assert (given["repo_id"], given["revision"], given["commit_message"]) == ("ada/frogs", "v2", "Frogs")
    assert {"tokenizers/*", "model/*"} <= set(given["delete_patterns"])  # parts of an older bundle do not stay
    with pytest.raises(UserError, match="repo_id 'frogs': give USER/NAME"):
        tiny.push_to_hub("frogs")
    api.create_repo.side_effect = OSError("403 Forbidden: no write access\nadvice")
    with pytest.raises(
        UserError, match=r"^ada/frogs: could not be written to the Hugging Face hub \(403 Forbidden: no write access\)$"
    ):
        tiny.push_to_hub("ada/frogs")


def test_a_card_that_is_there_stays_unless_one_is_given(api, tiny, bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("My own words.", encoding="utf-8")
    own = Unitok.from_pretrained(tmp_path / "b")
    own.push_to_hub("ada/frogs")
    assert api.sent["README.md"] == b"My own words."
    own.push_to_hub("ada/frogs", card={})
    assert b"Not stated." in api.sent["README.md"]
    assert api.upload_folder.call_args.kwargs["ignore_patterns"] is None
    api.file_exists.return_value = True
    for bundle in (own, tiny):
        bundle.push_to_hub("ada/frogs", revision="v2")
        assert api.upload_folder.call_args.kwargs["ignore_patterns"] == ["README.md"]
    api.file_exists.assert_called_with("ada/frogs", "README.md", revision="v2")
    tiny.push_to_hub("ada/frogs", card={"limits": "Only frogs."})
    assert api.upload_folder.call_args.kwargs["ignore_patterns"] is None
    assert b"Only frogs." in api.sent["README.md"]


def test_a_card_says_what_is_known_and_says_so_where_nothing_is(api, tiny):
    card = huggingface_hub.ModelCard(tiny.model_card("ada/frogs"))
    assert card.data.library_name == "unitok"
    assert card.data.license is None
    assert {"unitok", "text", "image", "audio"} <= set(card.data.tags)
    assert card.text.count("Not stated.") == 5  # training, measurement, use, limits, license
    assert 'Unitok.from_pretrained("ada/frogs")' in card.text
    weights = sum(weight.numel() for weight in tiny.model.parameters())
    assert f"| model | decoder | {weights:,} | – |" in card.text
    assert "| image | image tokenizer |" in card.text
    assert f"The vocabulary has {tiny.vocab.size:,} tokens." in card.text
    texts = {"license": "apache-2.0", "limits": "Only frogs.", "intended_use": "To draw frogs."}
    told = huggingface_hub.ModelCard(tiny.model_card("ada/frogs", texts))
    assert told.data.license == "apache-2.0"
    assert told.text.count("Not stated.") == 2
    assert "Only frogs." in told.text
    with pytest.raises(UserError, match=f"card: has no 'licence'; it has {', '.join(CardTexts.__dataclass_fields__)}"):
        tiny.push_to_hub("ada/frogs", card={"licence": "mit"})
    assert not api.create_repo.called


def test_a_card_holds_training_and_scores_that_the_bundle_carries(bundle_folder, tmp_path):
    scores = {"text": {"accuracy": 0.98765}, "count": 1200, "note": "a | b\n<script>", "none": None, "k | <b>\n": 1}
    make_bundle(tmp_path / "b", {"text": bundle_folder, "model": bundle_folder, "image": bundle_folder, "audio": bundle_folder})
    info = json.loads((tmp_path / "b" / "bundle.json").read_text())
    info["training"] = {"model": {"data": "frogs", "steps": 4000, "tokens": 1_000_000}, "p | <i>": {"q\n|": 1}}
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(info))
    make_bundle(tmp_path / "b", {}, scores=scores)
    other = make_bundle(tmp_path / "c", dict.fromkeys(("text", "image", "audio", "model"), tmp_path / "b"))
    assert other.facts == {"training": {"model": info["training"]["model"]}}  # scores are of the bundle that was measured
    text = Bundle.from_pretrained(tmp_path / "b").model_card("ada/frogs")
    assert "| model | data frogs, steps 4,000, tokens 1,000,000 |" in text
    assert "| text / accuracy | 0.9877 |" in text
    assert "| count | 1,200 |" in text
    assert "| note | a \\| b &lt;script> |" in text
    assert "| none |" not in text
    assert "| k \\| &lt;b> | 1 |" in text
    make_bundle(tmp_path / "b", {"image": bundle_folder})
    assert "accuracy" not in Bundle.from_pretrained(tmp_path / "b").model_card("ada/frogs")


def test_the_dtype_is_the_decoders_and_codes_stay_those_of_float32(bundle_folder, tiny):
    u = Unitok.from_pretrained(bundle_folder, dtype=torch.bfloat16)
    assert (u.dtype, u.device) == (torch.bfloat16, torch.device("cpu"))
    assert u.image.dtype == u.audio.dtype == torch.float32
    assert u.generate("hm", modalities="image:2x2")[0].document.segments[-1].codes.shape == (2, 2)
    assert all(u.image.fingerprint() == one.image.fingerprint() for one in (tiny, u.to("float16"), u.to(torch.float32)))
    assert u.to("cpu", "bfloat16").dtype == torch.bfloat16
    assert u.to(device="cpu", dtype="float32").dtype == torch.float32
    assert u.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    tokenizers = Unitok.from_pretrained(bundle_folder, parts="tokenizers", dtype="bfloat16")
    assert (tokenizers.dtype, tokenizers.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("where", "keywords", "says"),
    [
        ((torch.int16,), {}, "dtype torch.int16: give a type of floating point"),
        (("bf16",), {}, "to 'bf16': neither a device, such as cuda, nor a type, such as bfloat16"),
        (("cuda",), {}, "device 'cuda': not available here"),
        ((), {"device": "cuda:1"}, "device 'cuda:1': not available here"),
        ((), {"device": "bfloat16"}, "device 'bfloat16': no device; give one such as cpu or cuda:1"),
        ((), {"dtype": "fast"}, "dtype fast: give a type of floating point, such as torch.bfloat16"),
        ((), {"dtype": "cuda"}, "dtype cuda: give a type of floating point"),
    ],
)
def test_a_device_or_type_that_is_none_is_one_line_and_changes_nothing(bundle_folder, tiny, where, keywords, says):
    calls = [lambda: tiny.to("bfloat16", *where, **keywords)]
    if keywords:
        calls.append(lambda: Unitok.from_pretrained(bundle_folder, **keywords))
    if "device" in keywords:
        calls += [
            lambda: ImageTokenizer.from_pretrained(bundle_folder, **keywords),
            lambda: Decoder.from_pretrained(bundle_folder, **keywords),
        ]
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        if call in calls[:2]:
            assert str(error.value).startswith(says)
        assert "\n" not in str(error.value)
    assert tiny.dtype == torch.float32
