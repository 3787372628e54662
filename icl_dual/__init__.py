"""Compare in-context learning with finetuning, layer by layer, on any decoder model."""

from importlib.metadata import version

from icl_dual import dual, plots, statistics
from icl_dual.arguments import ArgumentError
from icl_dual.captures.capture import DECOMPOSE_FIELDS, METRIC_FIELDS, Capture, capture
from icl_dual.contexts import relabel
from icl_dual.decomposition import Decomposition, DecompositionSummary, decompose, decompose_prompts
from icl_dual.experiment import Experiment, run_experiment
from icl_dual.finetuning import DivergedError, FinetuneConfig, Lora, WeightDelta, finetune, finetune_many
from icl_dual.harness_tasks import task_from_yaml
from icl_dual.massive_activations import MassiveActivations, find_massive_activations
from icl_dual.metrics import Comparison, Metric, compare, compare_recordings, register_metric
from icl_dual.models import Model, UnsupportedModelError, control_model, load_model, momentum_attention
from icl_dual.order_sensitivity import OrderSensitivity, measure_order_sensitivity
from icl_dual.paper_tasks import PAPER_K, TASKS, load_task, register_task
from icl_dual.patches import (
    EFFECT_FIELDS,
    AttentionRun,
    EffectComparison,
    ExactPatch,
    FunctionVector,
    Generation,
    SharedPatch,
    SharedStatistics,
    ValuePatch,
    WeightComparison,
    build_exact_patch,
    build_function_vector,
    build_mean_patch,
    build_shared_patch,
    build_thought_matrix,
    build_value_patch,
    capture_each,
    compare_effects,
    compare_weights,
    draw_random_patch,
    generate_patched,
    run_inserted,
    run_relaxed,
    sum_statistics,
)
from icl_dual.planning import CellPlan, PromptLengths, plan
from icl_dual.progress import set_progress
from icl_dual.prompt_view import show_prompt
from icl_dual.prompts import PromptError, Prompts, build_prompts
from icl_dual.recordings import RecordingError, Recordings, load_recordings
from icl_dual.source_attention import SourceAttention, capture_sources
from icl_dual.sourced_prompts import SourcedPrompt, find_spans, prompt_from_parts, prompt_from_query, prompt_from_text
from icl_dual.storage import AssetError, SettingsError
from icl_dual.study import Cell, CellResult, StudyError, export_recordings, load_cell, run_cell, run_study
from icl_dual.tasks import Task, TaskError
from icl_dual.texts import Chat
from icl_dual.torch_utils import DeviceLostError
from icl_dual.updates import DeltaSummary, UpdateComparison, compare_updates, summarise
from icl_dual.views import InteractiveView, view

__version__ = version("icl-dual")

__all__ = [  # noqa: RUF022 - grouped by use
    # load models and tasks, and build prompts of them
    "load_model",
    "control_model",
    "momentum_attention",
    "Model",
    "load_task",
    "task_from_yaml",
    "register_task",
    "Task",
    "TASKS",
    "PAPER_K",
    "relabel",
    "build_prompts",
    "Prompts",
    "Chat",
    "prompt_from_parts",
    "prompt_from_text",
    "prompt_from_query",
    "find_spans",
    "SourcedPrompt",
    "show_prompt",
    # run
    "plan",
    "PromptLengths",
    "run_experiment",
    "capture",
    "METRIC_FIELDS",
    "DECOMPOSE_FIELDS",
    "finetune",
    "finetune_many",
    "FinetuneConfig",
    "Lora",
    "set_progress",
    # compare
    "compare",
    "compare_recordings",
    "load_recordings",
    "find_massive_activations",
    "register_metric",
    "Metric",
    "statistics",
    "plots",
    # decompose
    "decompose",
    "decompose_prompts",
    "compare_updates",
    "capture_sources",
    "view",
    "summarise",
    "measure_order_sensitivity",
    "build_exact_patch",
    "build_mean_patch",
    "build_shared_patch",
    "build_thought_matrix",
    "draw_random_patch",
    "sum_statistics",
    "build_value_patch",
    "generate_patched",
    "run_inserted",
    "run_relaxed",
    "build_function_vector",
    "capture_each",
    "compare_effects",
    "compare_weights",
    "EFFECT_FIELDS",
    "dual",
    # study
    "Cell",
    "run_cell",
    "run_study",
    "load_cell",
    "export_recordings",
    # results
    "Experiment",
    "CellPlan",
    "Capture",
    "WeightDelta",
    "Comparison",
    "Recordings",
    "MassiveActivations",
    "Decomposition",
    "DecompositionSummary",
    "SourceAttention",
    "InteractiveView",
    "UpdateComparison",
    "DeltaSummary",
    "OrderSensitivity",
    "ExactPatch",
    "SharedPatch",
    "SharedStatistics",
    "ValuePatch",
    "AttentionRun",
    "Generation",
    "FunctionVector",
    "EffectComparison",
    "WeightComparison",
    "CellResult",
    # errors
    "ArgumentError",
    "AssetError",
    "DeviceLostError",
    "DivergedError",
    "PromptError",
    "RecordingError",
    "SettingsError",
    "StudyError",
    "TaskError",
    "UnsupportedModelError",
]
