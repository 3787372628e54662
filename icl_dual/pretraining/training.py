"""Train small decoders that differ in η only, and measure their perplexity and in-context accuracy.

`train` starts all models of one seed from the same weights and shows them the same sequences in the same order, with
transformers' `Trainer`. A training run that was stopped resumes from its last checkpoint, with the same losses bit for
bit. `perplexity` and `in_context_accuracy` are the measures of the paper's two tables on momentum attention.
"""

# Methods of transformers and tqdm have types in part.
# pyright: reportUnknownMemberType=false

import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from icl_dual.finetuning.sgd import DivergedError
from icl_dual.models.momentum_gpt2 import MomentumConfig, MomentumForCausalLM
from icl_dual.pretraining.corpus import LabelMapping, TrainingData
from icl_dual.progress import progress_bar, transformers_bars
from icl_dual.storage import (
    AssetError,
    check_same_settings,
    check_writable,
    first_line,
    read_json,
    write_json,
    writing,
)
from icl_dual.torch_utils import fork_rng

RANK = int(os.environ.get("RANK", "0"))
"""The rank of this process under `torchrun`; rank 0 writes files."""


@dataclass(frozen=True)
class Preset:
    """A decoder's shape and its training: Adam (β = .9, .98; ε = 1e-6), linear warm-up, then linear decay to 0."""

    n_layers: int
    """Number of layers."""
    n_heads: int
    """Number of heads in a layer."""
    d_model: int
    """Width of the residual stream."""
    d_mlp: int
    """Width of the MLP's hidden layer."""
    n_ctx: int
    """Tokens in a training sequence, and the model's context."""
    d_vocab: int
    """Size of the vocabulary."""
    batch_size: int
    """Sequences in a step, over all devices."""
    n_steps: int
    """Training steps."""
    n_warmup: int
    """Steps of warm-up, fewer than `n_steps`."""
    lr: float
    """The highest learning rate, reached after warm-up."""
    clip: float = 2.0
    """The gradient norm to which larger gradients are clipped."""
    micro_batch: int = 64
    """Most sequences that a device runs at once; a step sums the gradients of several such batches."""

    def __post_init__(self) -> None:
        too_small = {name for name, value in asdict(self).items() if value < (0 if name == "n_warmup" else 1e-12)}
        if too_small or self.n_warmup >= self.n_steps:
            raise ValueError(f"expected sizes above 0, and n_warmup below n_steps, got {self}")


PRESETS = {
    "tiny": Preset(4, 4, 128, 512, 256, 2048, batch_size=8, n_steps=500, n_warmup=50, lr=3e-3),
    "label-mapping": Preset(2, 4, 64, 256, 33, 13, batch_size=64, n_steps=2000, n_warmup=50, lr=3e-3),
    "small": Preset(6, 8, 256, 1024, 512, 8192, batch_size=16, n_steps=1200, n_warmup=60, lr=1e-3),
    "paper-350m": Preset(
        24, 16, 1024, 4096, 1024, 50257, batch_size=512, n_steps=500_000, n_warmup=20_000, lr=3e-4, micro_batch=8
    ),
}
"""Presets by name. `tiny`, and `label-mapping` for the task of that name, take minutes on two cores; `small` takes an
hour on two cores, minutes on a GPU. `paper-350m` has the paper's numbers, for `torchrun` on several GPUs."""


def train(
    preset: Preset,
    data: TrainingData,
    *,
    eta: float | Literal["learned"],
    seed: int,
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    checkpoints: int = 10,
    progress: bool = True,
) -> MomentumForCausalLM:
    """Train a decoder with momentum attention, resume a run that was stopped, or load a finished one.

    For one seed, initial weights and the order of sequences are the same whatever η is. Global random states are left
    unchanged.

    Args:
        preset: the decoder's shape and its training.
        data: the training data.
        eta: η of momentum attention: 0 for none, or `learned` for an η that every head learns.
        seed: the seed of initial weights and of the order of sequences.
        folder: the folder for the finished model, its tokenizer and `losses.json` (pairs of a step and the mean
            training loss in nats since the last entry, about 100 of them). Until then it holds checkpoints.
        device: `cpu`, or `cuda` (in bfloat16 where the GPU supports it). `torchrun` gives each process its own GPU.
        checkpoints: most checkpoints to write during training; the last two are kept until it is finished.
        progress: whether to show a progress bar.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: η is out of range, there is not enough data, the batch cannot be shared among the processes, or the
            device cannot be used.
        SettingsError: the folder holds a model with other settings; the message says which differ.
        AssetError: the folder cannot be written, holds files of another origin, or a damaged model or checkpoint.
        DivergedError: the loss or a gradient is no longer finite; the message gives the step. The last good checkpoint
            is kept.
    """
    folder = Path(folder)
    checkpoint_folder = folder / "checkpoints"
    config = build_config(preset, data.d_vocab, eta)
    sequences = data.training_sequences(preset.n_ctx, preset.n_steps * preset.batch_size, seed)
    with _random_states_kept(), transformers_bars(show=False):
        arguments = _arguments(preset, checkpoint_folder, seed, device, checkpoints)
        settings = {**asdict(preset), "eta": eta, "seed": seed, "data": data.name, "digest": data.digest}
        settings["precision"] = "bfloat16" if arguments.bf16 else "float32"
        if RANK == 0:
            _check_settings(folder, settings)
        if (folder / "losses.json").exists():
            with _loading(folder, "delete the folder to train the model again"):
                return MomentumForCausalLM.from_pretrained(folder).eval()
        if RANK == 0:
            check_writable(folder)
        torch.manual_seed(seed)
        model = MomentumForCausalLM(config)
        trainer = _Trainer(
            model,
            arguments,
            train_dataset=_Sequences(sequences, data.labels(sequences)),
            callbacks=[_GradientCheck()],
        )
        trainer.remove_callback(PrinterCallback)
        if progress and trainer.is_world_process_zero():
            trainer.add_callback(_Bar(f"{data.name} η={eta} seed={seed}"))
        checkpoint = _last_checkpoint(checkpoint_folder)
        with writing(folder), _loading(checkpoint, "delete this checkpoint to resume from the one before"):
            trainer.train(resume_from_checkpoint=checkpoint)
        model.config.use_cache = True  # for generation
        if trainer.is_world_process_zero():
            with writing(folder):
                model.cpu().save_pretrained(folder)
                if data.tokenizer is not None:
                    data.tokenizer.save_pretrained(folder)
                losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
                write_json(folder / "losses.json", losses)  # written last: the model is complete
            shutil.rmtree(checkpoint_folder)
        trainer.accelerator.wait_for_everyone()
    return model.cpu().eval()


def build_config(preset: Preset, d_vocab: int, eta: float | str) -> MomentumConfig:
    """Return the configuration of a decoder of the preset's shape, without dropout.

    Args:
        preset: the decoder's shape.
        d_vocab: size of the vocabulary.
        eta: η of momentum attention, or `learned`.

    Raises:
        ValueError: η is out of range.
    """
    return MomentumConfig(
        vocab_size=d_vocab,
        n_positions=preset.n_ctx,
        n_embd=preset.d_model,
        n_layer=preset.n_layers,
        n_head=preset.n_heads,
        n_inner=preset.d_mlp,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.02 * math.sqrt(1024 / preset.d_model),  # GPT-2's value at the paper's width
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        eta=eta,
    )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a new folder's settings, or check that they equal those of the run in the folder."""
    path = folder / "settings.json"
    if path.exists():
        check_same_settings(folder, settings, read_json(path))
        return
    check_writable(folder)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if others := sorted(name for name in names if not name.startswith(".")):
        raise AssetError(
            f"expected a new folder, or one of this training, got {folder} with other files in it ({others[0]!r}, …): "
            "choose another folder"
        )
    write_json(path, settings)


@contextmanager
def _loading(folder: str | PathLike[str] | None, advice: str) -> Generator[None]:
    """Turn the errors of damaged files into an AssetError; without a folder, nothing is loaded."""
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError, EOFError, IndexError, json.JSONDecodeError, RuntimeError) as error:
        is_other = isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error)
        if folder is None or is_other or "I/O error" in str(error):
            raise
        raise AssetError(f"expected undamaged files in {folder}, got {first_line(error)}: {advice}") from error


def _arguments(
    preset: Preset, folder: Path, seed: int, device: str | torch.device, checkpoints: int
) -> TrainingArguments:
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = str(device) == "cpu"
    if not on_cpu and (str(device) != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"expected device as cpu, or as cuda on a machine with a GPU, got {str(device)!r}")
    if not on_cpu and n_processes == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"expected one GPU for one process, got {torch.cuda.device_count()} GPUs: choose one with "
            "CUDA_VISIBLE_DEVICES, or start one process for each GPU with torchrun"
        )
    if checkpoints < 1:
        raise ValueError(f"expected checkpoints of at least 1, got {checkpoints}: the last one is the model")
    # A resumed run has lost the losses since the last log entry: checkpoints are written at steps with an entry.
    log_every = max(1, preset.n_steps // 100)
    per_device = min(preset.micro_batch, max(1, preset.batch_size // n_processes))
    if preset.batch_size % (per_device * n_processes):
        raise ValueError(
            f"expected batch_size as a multiple of {per_device * n_processes} ({n_processes} processes with "
            f"{per_device} sequences each), got {preset.batch_size}: change batch_size or micro_batch of the preset"
        )
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=preset.n_steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=preset.batch_size // (per_device * n_processes),
        learning_rate=preset.lr,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 1.0, "lr_end": 0.0},
        warmup_steps=preset.n_warmup,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=preset.clip,
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpu,
        bf16=not on_cpu and torch.cuda.is_bf16_supported(),
        save_steps=log_every * math.ceil(preset.n_steps / checkpoints / log_every),
        save_total_limit=2,
        logging_steps=log_every,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )


class _Sequences(Dataset[Mapping[str, Tensor]]):
    def __init__(self, sequences: Int[Tensor, "sequence pos"], labels: Int[Tensor, "sequence pos"]) -> None:
        self.sequences, self.labels = sequences, labels

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.labels[index]}


class _Trainer(Trainer):
    """Stops at a loss that is not finite, before it changes a weight."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _diverged(f"a finite loss, got {loss.item()}", self.state.global_step + 1, str(self.args.output_dir))
        return loss


class _GradientCheck(TrainerCallback):
    """Stops at a gradient that is not finite, before it changes a weight."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _diverged(f"finite gradients, got a norm of {norm.item()}", state.global_step + 1, args.output_dir)


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint and delete incomplete ones: the trainer's state is the last file written."""
    by_step = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    complete = {step: path for step, path in by_step.items() if (path / TRAINER_STATE_NAME).exists()}
    for path in (by_step[step] for step in by_step.keys() - complete if RANK == 0):
        shutil.rmtree(path)
    return str(complete[max(complete)]) if complete else None


def _diverged(expected_and_got: str, step: int, folder: str) -> DivergedError:
    """Return the error, and delete the preceding step's checkpoint: its weights gave the non-finite number."""
    shutil.rmtree(Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step - 1}", ignore_errors=True)
    last = _last_checkpoint(Path(folder))
    kept = "no checkpoint was written before" if last is None else f"the last good checkpoint is kept in {last}"
    return DivergedError(f"step {step}: expected {expected_and_got}; {kept}: lower the learning rate, in a new folder")


class _Bar(TrainerCallback):
    """Shows a progress bar with the last loss."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


@contextmanager
def _random_states_kept() -> Generator[None]:
    """Restore the global random states of Python, numpy and torch after a block: the trainer seeds them all."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the trainer seeds this one
    with fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def perplexity(model: MomentumForCausalLM, sequences: Int[Tensor, "sequence pos"], *, batch_size: int = 16) -> float:
    """Return exp of the mean negative log-likelihood in nats, over all tokens but the first of each sequence.

    Args:
        model: the decoder.
        sequences: token ids.
        batch_size: sequences that run at once.

    Raises:
        ValueError: there are no such tokens.
    """
    if not sequences[:, 1:].numel():
        raise ValueError(f"expected sequences of at least two tokens, got shape {list(sequences.shape)}")
    total = 0.0
    with torch.no_grad():
        for batch in torch.split(sequences, batch_size):
            batch = batch.to(model.device)
            log_probs = model(batch).logits[:, :-1].float().log_softmax(-1)
            total -= log_probs.gather(-1, batch[:, 1:, None]).double().sum().item()
    return math.exp(total / sequences[:, 1:].numel())


def in_context_accuracy(
    model: MomentumForCausalLM, task: LabelMapping, *, n: int = 512, seed: int = 0
) -> Bool[Tensor, "sequence pair"]:
    """Return whether the model's most likely label is right, for every pair; the preceding pairs are demonstrations.

    Args:
        model: the decoder.
        task: the task that it was trained on.
        n: number of sequences.
        seed: the seed of the sequences.
    """
    sequences = task.training_sequences(task.length, n, seed)
    correct: list[Tensor] = []
    with torch.no_grad():
        for batch in torch.split(sequences, 64):
            logits = model(batch.to(model.device)).logits[:, 1:-1:2, 1 + task.n_x :]
            correct.append(logits.argmax(-1).cpu() == batch[:, 2::2] - 1 - task.n_x)
    return torch.cat(correct)
