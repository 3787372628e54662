"""In-context learning held against finetuning, layer by layer, on any decoder model."""

from icl_dual import dual, plots
from icl_dual.captures.capture import DECOMPOSE_FIELDS, METRIC_FIELDS, Capture, capture
from icl_dual.contexts import relabel
from icl_dual.decomposition import Decomposition, decompose
from icl_dual.finetuning import DivergedError, FinetuneConfig, WeightDelta, finetune, finetune_many
from icl_dual.metrics.comparison import Comparison, compare, compare_recordings
from icl_dual.models import Model, UnsupportedModelError, control_model, load_model, momentum_attention
from icl_dual.order_sensitivity import OrderSensitivity, measure_order_sensitivity
from icl_dual.paper_tasks import PAPER_K, TASKS, load_task
from icl_dual.progress import set_progress
from icl_dual.prompts import PromptError, Prompts, build_prompts
from icl_dual.recordings.recordings import RecordingError, Recordings
from icl_dual.recordings.released_layout import load_recordings
from icl_dual.statistics import intervals
from icl_dual.storage import AssetError, SettingsError
from icl_dual.study import Cell, CellResult, StudyError, export_recordings, load_cell, run_cell, run_study
from icl_dual.tasks import Task, TaskError
from icl_dual.updates import DeltaSummary, UpdateComparison, compare_updates, summarise

__all__ = [
    "DECOMPOSE_FIELDS",
    "METRIC_FIELDS",
    "PAPER_K",
    "TASKS",
    "AssetError",
    "Capture",
    "Cell",
    "CellResult",
    "Comparison",
    "Decomposition",
    "DeltaSummary",
    "DivergedError",
    "FinetuneConfig",
    "Model",
    "OrderSensitivity",
    "PromptError",
    "Prompts",
    "RecordingError",
    "Recordings",
    "SettingsError",
    "StudyError",
    "Task",
    "TaskError",
    "UnsupportedModelError",
    "UpdateComparison",
    "WeightDelta",
    "build_prompts",
    "capture",
    "compare",
    "compare_recordings",
    "compare_updates",
    "control_model",
    "decompose",
    "dual",
    "export_recordings",
    "finetune",
    "finetune_many",
    "intervals",
    "load_cell",
    "load_model",
    "load_recordings",
    "load_task",
    "momentum_attention",
    "measure_order_sensitivity",
    "plots",
    "relabel",
    "run_cell",
    "run_study",
    "set_progress",
    "summarise",
]
