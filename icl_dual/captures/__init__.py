"""Running a model over prompts with hooks on → `Capture`.

| module | holds |
|---|---|
| `capture` | the result, and `capture()`, which makes it |
| `shared_prefix` | the engine: what queries share runs once, each query's own tokens after it |
| `pairing` | every check that captures belong together |
"""
