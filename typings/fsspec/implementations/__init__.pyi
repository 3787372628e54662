"""fsspec's kinds of storage."""
