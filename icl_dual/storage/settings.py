"""Checks that what was saved was made with the settings that are wanted now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_dual.storage.errors import SettingsError


def check_same_settings(folder: Path, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that what a folder or file holds was made with the settings that are wanted now.

    Args:
        folder: the folder or file, which the error names.
        wanted: the settings that are wanted, by name.
        saved: the settings that were saved, by name. Those that `wanted` lacks are not compared.

    Raises:
        SettingsError: they differ; names each setting, the saved value and the wanted one.
    """
    different = [key for key, value in wanted.items() if saved.get(key) != value]
    if different:
        expected, got = (", ".join(f"{key}={values.get(key)!r}" for key in different) for values in (wanted, saved))
        raise SettingsError(
            f"expected a result made with {expected}, got {folder}, made with {got}: choose another output folder, or "
            "delete this one"
        )
