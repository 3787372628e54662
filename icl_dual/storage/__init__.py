"""Saving and loading: folders that appear complete or not at all, results as safetensors and JSON.

Every result of the library is a frozen dataclass that inherits `Saved`: its tensors go into `tensors.safetensors`, all
other values into `metadata.json`, with the checksum of each file. A field that an older version did not write yet is
absent (`None` or its default), not an error.
"""

from icl_dual.storage.errors import AssetError, SettingsError, first_line, reading, writing
from icl_dual.storage.folders import (
    CHECKSUMS,
    CLASS,
    METADATA,
    TENSORS,
    atomic_file,
    atomic_folder,
    check_writable,
    clean_scratch,
    finished_folders,
    is_scratch,
    recover,
)
from icl_dual.storage.json_files import read_json, to_json
from icl_dual.storage.saved import NOT_SAVED, Saved, from_json
from icl_dual.storage.settings import check_same_settings
from icl_dual.storage.tensors import load_tensors, save_tensors, write_json

__all__ = [
    "CHECKSUMS",
    "CLASS",
    "METADATA",
    "NOT_SAVED",
    "TENSORS",
    "AssetError",
    "Saved",
    "SettingsError",
    "atomic_file",
    "atomic_folder",
    "check_same_settings",
    "check_writable",
    "clean_scratch",
    "finished_folders",
    "first_line",
    "from_json",
    "is_scratch",
    "load_tensors",
    "read_json",
    "reading",
    "recover",
    "save_tensors",
    "to_json",
    "write_json",
    "writing",
]
