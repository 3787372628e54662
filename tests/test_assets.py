"""Wheels, unpacked models and what identifies their bytes."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
import pytest

import icl_dual as icl
from icl_dual import assets
from icl_dual.assets import Wheel

PACKAGE, VERSION = "icl-dual-test-bytes", "1.0"
FILENAME = "icl_dual_test_bytes-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "icl_dual"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, which the interpreter's own pip reads instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = f"{FILENAME.split('-')[0]}-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / FILENAME, "w") as wheel:
        wheel.writestr("carried/bytes.txt", "what was wanted")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_of(index: Path) -> Wheel:
    return Wheel(PACKAGE, VERSION, FILENAME, hashlib.sha256((index / FILENAME).read_bytes()).hexdigest())


def test_a_wheel_is_fetched_once_and_read_as_an_archive(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(index)
    assert assets.read_wheel_member(wheel, "carried/bytes.txt") == b"what was wanted"
    assert [path.name for path in (cache / "wheels").iterdir() if path.suffix == ".whl"] == [FILENAME]
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a cached wheel was fetched again"))
    assert assets.read_wheel_member(wheel, "carried/bytes.txt") == b"what was wanted"


def test_other_bytes_than_the_pinned_ones_are_refused_and_not_kept(cache: Path, index: Path) -> None:
    with pytest.raises(icl.AssetError, match=r"expected SHA-256 0000 of .* the package index served other bytes"):
        assets.fetch_wheel(Wheel(PACKAGE, VERSION, FILENAME, "0000"))
    assert not (cache / "wheels" / FILENAME).exists()


def test_a_truncated_wheel_in_the_cache_is_refused(cache: Path, index: Path) -> None:
    wheel = wheel_of(index)
    path = assets.fetch_wheel(wheel)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(icl.AssetError, match=rf"expected SHA-256 {wheel.sha256} .*delete this file and run again"):
        assets.fetch_wheel(wheel)


def test_without_network_and_cache_it_says_what_was_wanted_and_where_it_goes(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    with pytest.raises(icl.AssetError) as caught:
        assets.fetch_wheel(wheel)
    assert f"expected {FILENAME}" in str(caught.value)
    assert f"put it at {cache / 'wheels' / FILENAME}" in str(caught.value)


def test_two_processes_can_fetch_at_once(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    # The package's other modules take seconds to import, and none is needed.
    code = (
        "import importlib.util, sys, types; package = types.ModuleType('icl_dual'); "
        "package.__path__ = importlib.util.find_spec('icl_dual').submodule_search_locations; "
        "sys.modules['icl_dual'] = package; from icl_dual import assets; "
        "print(assets.read_wheel_member(assets.Wheel(*sys.argv[1:]), 'carried/bytes.txt').decode())"
    )
    wheel = wheel_of(index)
    command = [sys.executable, "-c", code, PACKAGE, VERSION, FILENAME, wheel.sha256]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == ["what was wanted"] * 2


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "a/b/c", "model.gguf"])
def test_unknown_models_are_refused_with_what_is_possible(name: str) -> None:
    with pytest.raises(
        icl.AssetError,
        match=r"expected name as one of \['gemma3-270m', 'smollm2-135m'\], .* got '.*'.*: check its spelling",
    ) as refused:
        assets.model_files(name)
    assert ("did you mean 'smollm2-135m'?" in str(refused.value)) == (name == "smollm3")


def test_hub_models_that_cannot_be_had_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(icl.AssetError, match=r"expected the model 'nobody/nothing' on .*hf download nobody/nothing"):
        assets.model_files("nobody/nothing")


def test_revisions_are_for_hub_models() -> None:
    with pytest.raises(icl.AssetError, match="expected no revision for 'smollm2-135m'"):
        assets.model_files("smollm2-135m", revision="main")


def test_a_folder_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = assets.model_files(str(tmp_path))
    assert before == assets.model_files(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert before.provenance != assets.model_files(str(tmp_path)).provenance


@pytest.mark.parametrize("name", ["chat_template.jinja", "qwen.tiktoken", "model.pt", "model.pth"])
def test_a_folder_is_known_by_templates_vocabularies_and_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = assets.model_files(str(tmp_path)).provenance
    (tmp_path / name).write_bytes(b"bytes")
    assert assets.model_files(str(tmp_path)).provenance != before


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_unpacked_model_is_refused(cache: Path, damage: str) -> None:
    model = assets.PACKAGED_MODELS["smollm2-135m"]
    folder = cache / "models" / model.sha256[:16]
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"0123456789")
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"model.safetensors": sha256}))
    assert assets.model_files("smollm2-135m").folder == folder
    if damage == "truncate":
        weights.write_bytes(b"01234")
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(icl.AssetError, match=r"(?s)expected .*delete .* and run again to unpack it once more"):
        assets.model_files("smollm2-135m")


def test_a_gguf_is_unpacked_once_and_its_terms_are_shown_then(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sha256 = hashlib.sha256(b"what was wanted").hexdigest()
    made: list[Path] = []

    def write_dequantised_model(gguf: Path, folder: Path) -> None:
        made.append(gguf)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(assets, "_write_dequantised_model", write_dequantised_model)
    model = assets.PackagedModel((wheel_of(index),), ("carried/bytes.txt",), sha256, terms="terms of use")
    monkeypatch.setitem(assets.PACKAGED_MODELS, "made-up", model)
    first, second = assets.model_files("made-up"), assets.model_files("made-up")
    assert first == second
    assert first.provenance == f"sha256:{sha256}"
    assert (first.folder / "model.safetensors").read_bytes() == b"what was wanted"
    assert len(made) == 1
    assert caplog.messages.count("terms of use") == 1
    local = index / "local.gguf"
    local.write_bytes(b"what was wanted")
    assert assets.model_files(str(local)) == first, "the same bytes as a local file are the same model"


def test_wheels_that_join_to_other_bytes_are_refused(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = assets.PackagedModel((wheel_of(index),), ("carried/bytes.txt",), "f" * 64)
    monkeypatch.setitem(assets.PACKAGED_MODELS, "made-up", model)
    with pytest.raises(icl.AssetError, match="the wheels do not hold the model that this library pins"):
        assets.model_files("made-up")
    assert not (cache / "models" / ("f" * 16)).exists()


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("smollm2-135m", "SmolLM2-135M-Instruct (Q4_1, dequantised)"),
        ("gemma3-270m", "google/gemma-3-270m (base model; unofficial Q4_K_M re-upload, dequantised)"),
        (
            "smollm2-135m (random-blocks, seed 3)",
            "SmolLM2-135M-Instruct (Q4_1, dequantised) (random-blocks, seed 3)",
        ),
        ("smollm2-135m + momentum η=0.1", "SmolLM2-135M-Instruct (Q4_1, dequantised) + momentum η=0.1"),
        ("smollm2-135m-v2", "smollm2-135m-v2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("", ""),
    ],
)
def test_a_packaged_model_is_described_and_any_other_name_stays(name: str, description: str) -> None:
    assert assets.describe_model(name) == description


def test_the_description_names_the_file_in_the_wheel() -> None:
    """What the description says of checkpoint and quantisation is in the name of the packaged GGUF file."""
    described = {name: assets.describe_model(name).lower() for name in assets.PACKAGED_MODELS}
    members = {name: model.members[0].lower() for name, model in assets.PACKAGED_MODELS.items()}
    for name, words in {"smollm2-135m": ("135m-instruct", "q4_1"), "gemma3-270m": ("gemma-3-270m", "q4_k_m")}.items():
        assert all(word in described[name] and word in members[name] for word in words)
    assert "instruct" not in members["gemma3-270m"]


def test_a_model_made_of_a_packaged_file_has_its_description_and_a_folder_has_none(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(b"what was wanted").hexdigest()
    monkeypatch.setattr(assets, "_write_dequantised_model", lambda gguf, folder: (folder / "a").write_bytes(b"a"))
    model = assets.PackagedModel((wheel_of(index),), ("carried/bytes.txt",), sha256, description="Made-up (Q1)")
    monkeypatch.setitem(assets.PACKAGED_MODELS, "made-up", model)
    unpacked, cached = assets.model_files("made-up"), assets.model_files("made-up")
    assert unpacked.description == cached.description == assets.describe_model("made-up") == "Made-up (Q1)"
    assert assets.model_files(str(unpacked.folder)).description == ""
