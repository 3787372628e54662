"""The functions of datasets that the library calls; the package itself comes without types."""

from collections.abc import Iterable, Mapping
from typing import Any

def load_dataset(
    path: str,
    name: str | None = None,
    *,
    split: str,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> Iterable[Mapping[str, Any]]: ...
def are_progress_bars_disabled() -> bool: ...
def disable_progress_bars() -> None: ...
def enable_progress_bars() -> None: ...
