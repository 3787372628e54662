"""What the metrics are computed from → `Recordings`: of captures, or read from what was recorded elsewhere.

| module | holds |
|---|---|
| `recordings` | `Recordings`, of captures and a finetuning, saved and loaded |
| `released_layout` | the layout of the paper's released code, in and out |
"""

from icl_dual.recordings.recordings import SETTINGS, RecordingError, Recordings
from icl_dual.recordings.released_layout import load_recordings, write_recordings

__all__ = ["SETTINGS", "RecordingError", "Recordings", "load_recordings", "write_recordings"]
