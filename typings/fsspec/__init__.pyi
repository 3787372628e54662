"""The function of fsspec that the library calls; file systems are `Any`, for each storage has its own class."""

from typing import Any

def url_to_fs(url: str, **kwargs: Any) -> tuple[Any, str]: ...
