"""`hf://` addresses and `--push-to`, against a hub on this machine that serves real files."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, errors
from support.command_line import Ended
from support.paths import PROJECT, SAMPLES

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.hub.download import HubAddress, hub_address, wanted_files
from mlm_eval.checkpoints.hub.upload import check_target
from mlm_eval.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The three requests of a download: what a repository holds, a file's size, a file."""

    def __init__(self, root: Path, asked: list[str], *args: Any) -> None:
        self.root, self.asked = root, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._listing("/".join(parts[2:4]), parts[4:])
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        file = self.root / name / path
        if parts[2:3] != ["resolve"] or not file.is_file():
            return self._refuse("EntryNotFound")
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def _listing(self, name: str, more: list[str]) -> None:
        folder = self.root / name
        if not folder.is_dir():
            return self._refuse("RepoNotFound")
        if more[1:2] and more[1] not in ("main", COMMIT):
            return self._refuse("RevisionNotFound")
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if more[:1] == ["tree"]:
            listed: Any = [
                {"type": "file", "path": p, "size": (folder / p).stat().st_size, "oid": COMMIT}
                for p in files
            ]
        else:
            listed = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]}
        data = json.dumps(listed).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A hub with one repository, `lab/gpt`: the sample, and files that no checkpoint needs."""
    root, asked = tmp_path_factory.mktemp("hub"), []
    shutil.copytree(SAMPLES / "gpt", root / "lab" / "gpt")
    (root / "lab" / "gpt" / "picture.png").write_bytes(b"not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, root, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", root=root, asked=asked)
    server.shutdown()


def run(hub_url: str, home: Path, *arguments: str, **variables: str) -> Any:
    """Run a command line with a hub and a cache of its own."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(PROJECT),
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "mlm_eval", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.mark.process
@pytest.mark.long
def test_a_repository_is_evaluated_fetched_once_and_used_offline(hub: Any, tmp_path: Path) -> None:
    score = ("score", "--ckpt", "hf://lab/gpt", "--input", str(tmp_path / "in.jsonl"))
    (tmp_path / "in.jsonl").write_text('{"text": "A module can contain functions."}\n')
    done = run(hub.url, tmp_path / "home", *score, "--output", str(tmp_path / "hub.jsonl"))
    assert done.returncode == 0, done.stderr
    assert not any("picture" in path for path in hub.asked)
    fetched = [path for path in hub.asked if "/resolve/" in path]
    local = (
        *score[:2],
        str(SAMPLES / "gpt"),
        *score[3:],
        "--output",
        str(tmp_path / "local.jsonl"),
    )
    assert run(hub.url, tmp_path / "home", *local).returncode == 0
    assert (tmp_path / "hub.jsonl").read_text() == (tmp_path / "local.jsonl").read_text()

    # Without a network, and with the server gone, the cache answers.
    for variables in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = run(hub.url, tmp_path / "home", "inspect", "--ckpt", "hf://lab/gpt", **variables)
        assert again.returncode == 0, again.stderr
    assert [path for path in hub.asked if "/resolve/" in path] == fetched


@pytest.mark.process
@pytest.mark.parametrize(
    ("address", "variables", "message"),
    [
        ("hf://lab/none", {}, "has no model lab/none, or it is private"),
        ("hf://lab/gpt@other", {}, "has no revision 'other'"),
        ("hf://lab/gpt/iter_9", {}, "has no files under iter_9; it has"),
        ("hf://lab/gpt", {"HF_HUB_OFFLINE": "1"}, "not in the local cache"),
        ("hf://lab/gpt", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    hub: Any, address: str, variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = run(hub.url, tmp_path, "inspect", "--ckpt", address, **variables)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("mlm-eval: ") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", HubAddress("org/name", None, "")),
        ("hf://org/na.me-1_b/", HubAddress("org/na.me-1_b", None, "")),
        ("hf://org/name@v1.0", HubAddress("org/name", "v1.0", "")),
        ("hf://org/name@refs%2Fpr%2F1/a/b", HubAddress("org/name", "refs/pr/1", "a/b")),
        ("hf://org/name/iter_0001000", HubAddress("org/name", None, "iter_0001000")),
        ("org/name", None),
        ("/data/hf:/x", None),
        (Path("hf://org/name"), HubAddress("org/name", None, "")),
    ],
)
def test_addresses(text: str | Path, expected: HubAddress | None) -> None:
    assert hub_address(text) == expected


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf://a/b/../../c", "hf://a/b@", "hf://a b/c", "hf://a/b@c@d"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="no address of the Hugging Face hub"):
        hub_address(text)


def test_one_copy_of_the_weights_is_fetched() -> None:
    names = [
        *("config.json", "model-1.safetensors", "pytorch_model.bin", "tf_model.h5", "flax/x.bin"),
        *("tokenizer.json", "original/consolidated.00.pth", "logo.PNG", "README.md"),
    ]
    kept = ["config.json", "model-1.safetensors", "tokenizer.json", "README.md"]
    assert wanted_files(names) == kept
    alone = ["config.json", "pytorch_model.bin", "iter_1/mp_rank_00/model.pt", "original/a.pt"]
    assert wanted_files(alone) == alone
    steps = ["iter_1/a.pt", "iter_10/a.pt", "vocab.json", "weights.pt", "iter_1.json", "b/c.json"]
    assert wanted_files(steps, "iter_1") == ["iter_1/a.pt", "vocab.json", "iter_1.json"]


class Recorder:
    """Stands in for HfApi: what is there, and what was done."""

    def __init__(self, files: list[str] | None, *, fault: Exception | None = None) -> None:
        self.files, self.fault, self.done = files, fault, []

    def whoami(self) -> dict[str, str]:
        return {"name": "someone"}

    def model_info(self, name: str) -> Any:
        if self.files is None:
            error = errors.RepositoryNotFoundError
            raise error.__new__(error, "404")  # without a response of a server
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in self.files])

    def create_repo(self, name: str, **settings: Any) -> None:
        self.done.append(("create", name, settings))

    def upload_folder(self, *, folder_path: Path, **settings: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        files = sorted(p.name for p in Path(folder_path).rglob("*") if p.is_file())
        self.done.append(("upload", files, settings))
        return SimpleNamespace(oid=COMMIT)


def recorded(monkeypatch: pytest.MonkeyPatch, api: Recorder) -> Recorder:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: api)
    return api


@pytest.fixture
def convert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ended]:
    """Converts the sample, in this process."""

    def run(*more: str) -> Ended:
        given = ["--ckpt", "sample:gpt", "--to", "hf", "--output", str(tmp_path / "out"), *more]
        monkeypatch.setattr(sys, "argv", ["mlm-eval", "convert", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, *capsys.readouterr())

    return run


def test_a_conversion_is_pushed_to_a_new_private_repository(
    monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Ended], tmp_path: Path
) -> None:
    api = recorded(monkeypatch, Recorder(None))
    done = convert("--push-to", "lab/gpt2")
    assert done.code == 0 and f"pushed: hf://lab/gpt2@{COMMIT}" in done.out, done
    (create, upload) = api.done
    assert create == ("create", "lab/gpt2", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(upload[1])


def test_files_that_are_there_are_replaced_with_overwrite_only(
    monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Ended], tmp_path: Path
) -> None:
    api = recorded(monkeypatch, Recorder([".gitattributes", "model.safetensors"]))
    done = convert("--push-to", "lab/gpt2")
    assert done.code == 2 and "holds files already (model.safetensors)" in done.err
    assert not (tmp_path / "out").exists() and not api.done
    assert convert("--push-to", "lab/gpt2", "--overwrite").code == 0
    assert [what for what, *_ in api.done] == ["upload"]


def test_a_lost_push_leaves_the_folder_and_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Ended], tmp_path: Path
) -> None:
    recorded(monkeypatch, Recorder([], fault=ConnectionError("connection reset")))
    done = convert("--push-to", "lab/gpt2")
    assert done.code == 2 and "connection reset" in done.err
    assert "hf upload lab/gpt2" in done.err and (tmp_path / "out" / "config.json").is_file()


def test_names_and_tokens_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no ORGANISATION/NAME"):
        check_target("name", overwrite=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._auth.get_token", lambda: None)
    monkeypatch.setattr(HfApi, "whoami", _no_token)
    with pytest.raises(InputError, match="hf auth login"):
        check_target("lab/gpt2", overwrite=False)


def _no_token(api: HfApi) -> None:
    raise errors.LocalTokenNotFoundError("Token is required, but no token found.")
