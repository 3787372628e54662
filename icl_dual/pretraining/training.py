"""Small decoders trained from scratch, alike in everything but η: what momentum attention does to a model.

1. A corpus is lines of text, tokenized by a vocabulary learned on its training split; or sequences of a task that can
   only be solved in context.
2. `train` starts every model of a seed from the same weights and shows it the same sequences in the same order, by
   transformers' `Trainer`. It goes on from its last checkpoint where it was stopped, with the same losses, bit for bit.
3. `perplexity` and `in_context_accuracy` are what the paper's two tables of momentum attention hold.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from icl_dual.finetuning.sgd import DivergedError
from icl_dual.models.momentum_gpt2 import MomentumConfig, MomentumForCausalLM
from icl_dual.pretraining.corpus import Data, LabelMapping
from icl_dual.progress import progress_bar, transformers_bars
from icl_dual.storage import check_same_settings, write_json

RANK = int(os.environ.get("RANK", "0"))
"""Which process of `torchrun` this is; the first writes."""


@dataclass(frozen=True)
class Preset:
    """A decoder's shape, and how it is trained: Adam (.9, .98), ε 1e-6, warmed up, then decayed linearly to nothing."""

    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    batch_size: int
    """Sequences a step, over all devices."""
    n_steps: int
    n_warmup: int
    lr: float
    clip: float = 2.0
    micro_batch: int = 64
    """Most sequences that a device runs at once; a step's others follow, and their gradients are summed."""

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if value < (0 if name == "n_warmup" else 1e-12)}
        if wrong or self.n_warmup >= self.n_steps:
            raise ValueError(f"expected sizes above 0, and fewer steps of warm-up than steps, got {self}")


PRESETS = {
    "tiny": Preset(4, 4, 128, 512, 256, 2048, batch_size=8, n_steps=500, n_warmup=50, lr=3e-3),
    "label-mapping": Preset(2, 4, 64, 256, 33, 13, batch_size=64, n_steps=2000, n_warmup=50, lr=3e-3),
    "small": Preset(6, 8, 256, 1024, 512, 8192, batch_size=16, n_steps=1200, n_warmup=60, lr=1e-3),
    "paper-350m": Preset(
        24, 16, 1024, 4096, 1024, 50257, batch_size=512, n_steps=500_000, n_warmup=20_000, lr=3e-4, micro_batch=8
    ),
}
"""`tiny`, and `label-mapping` for the task of that name: minutes on two cores. `small`: an hour on two cores, minutes
on a GPU. `paper-350m`: the paper's own numbers, for `torchrun` on several GPUs."""


def train(
    preset: Preset,
    data: Data,
    *,
    eta: float | Literal["learned"],
    seed: int,
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    checkpoints: int = 10,
    progress: bool = True,
) -> MomentumForCausalLM:
    """Train a decoder, go on training one that was stopped, or load one that is done.

    With the same seed, weights start the same and sequences come in the same order whatever η is.

    Args:
        preset: shape and training.
        data: what to learn from.
        eta: of momentum attention; 0 for none, or `learned` by every head for itself.
        seed: of weights and order.
        folder: where the model goes when it is done (with its tokenizer, and `losses.json`: the mean training loss in
            nats up to every hundredth of the steps), and its checkpoints before.
        device: `cpu`; or `cuda`, in bfloat16 where the GPU has it. `torchrun` gives each process its own.
        checkpoints: how many to write on the way, at most; the last two are kept until the end.
        progress: show a progress bar.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: η is out of range, the data are too few, the batch cannot be shared by the processes there are, or
            the device cannot be used.
        StudyError: the folder holds a model of other settings; says which differ.
        DivergedError: the loss or a gradient is no longer finite; says at which step, and the last good checkpoint is
            kept.
    """
    folder = Path(folder)
    halfway = folder / "checkpoints"
    config = configuration(preset, data.d_vocab, eta)
    sequences = data.training_sequences(preset.n_ctx, preset.n_steps * preset.batch_size, seed)
    with _own_randomness(), transformers_bars(show=False):
        arguments = _arguments(preset, halfway, seed, device, checkpoints)
        settings = {**asdict(preset), "eta": eta, "seed": seed, "data": data.name, "digest": data.digest}
        settings["precision"] = "bfloat16" if arguments.bf16 else "float32"
        if RANK == 0:
            _check_settings(folder, settings)
        if (folder / "losses.json").exists():
            return MomentumForCausalLM.from_pretrained(folder).eval()
        torch.manual_seed(seed)
        model = MomentumForCausalLM(config)
        trainer = _Trainer(
            model, arguments, train_dataset=_Sequences(sequences, data.labels(sequences)), callbacks=[_Finite()]
        )
        trainer.remove_callback(PrinterCallback)
        if progress and trainer.is_world_process_zero():
            trainer.add_callback(_Bar(f"{data.name} η={eta} seed={seed}"))
        trainer.train(resume_from_checkpoint=_last_checkpoint(halfway))
        model.config.use_cache = True  # from here on it is to generate
        if trainer.is_world_process_zero():
            model.cpu().save_pretrained(folder)
            if data.tokenizer is not None:
                data.tokenizer.save_pretrained(folder)
            losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
            write_json(folder / "losses.json", losses)
            shutil.rmtree(halfway)
        trainer.accelerator.wait_for_everyone()
    return model.cpu().eval()


def configuration(preset: Preset, d_vocab: int, eta: float | str) -> MomentumConfig:
    """A decoder of the preset's shape, without dropout.

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
        initializer_range=0.02 * math.sqrt(1024 / preset.d_model),  # at the paper's width, GPT-2's
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        eta=eta,
    )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note a folder's settings, or hold these against what it was begun with."""
    path = folder / "settings.json"
    if path.exists():
        check_same_settings(folder, settings, json.loads(path.read_text()))
    else:
        write_json(path, settings)


def _arguments(
    preset: Preset, folder: Path, seed: int, device: str | torch.device, checkpoints: int
) -> TrainingArguments:
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = str(device) == "cpu"
    if not on_cpu and (str(device) != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"expected the device cpu, or cuda where there is one, got {str(device)!r}")
    if not on_cpu and n_processes == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"expected one GPU, or a process for each by torchrun, got {torch.cuda.device_count()} GPUs and one "
            "process: choose one by CUDA_VISIBLE_DEVICES"
        )
    if checkpoints < 1:
        raise ValueError(f"expected a checkpoint at least, got checkpoints={checkpoints}")
    # A training that goes on has lost the losses since the last one logged: checkpoints are written where one is.
    every = max(1, preset.n_steps // 100)
    per_device = min(preset.micro_batch, max(1, preset.batch_size // n_processes))
    if preset.batch_size % (per_device * n_processes):
        raise ValueError(
            f"expected a batch size that {n_processes} processes of {per_device} sequences at once divide, got "
            f"{preset.batch_size}"
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
        save_steps=every * math.ceil(preset.n_steps / checkpoints / every),
        save_total_limit=2,
        logging_steps=every,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )


class _Sequences(Dataset):
    def __init__(self, sequences: Int[Tensor, "sequence pos"], labels: Int[Tensor, "sequence pos"]) -> None:
        self.sequences, self.labels = sequences, labels

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.labels[index]}


class _Trainer(Trainer):
    """Stops at a loss that is not finite, before it moves a weight."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _diverged(f"a finite loss, got {loss.item()}", self.state.global_step + 1, str(self.args.output_dir))
        return loss


class _Finite(TrainerCallback):
    """Stops at a gradient that is not finite, before it moves a weight."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _diverged(f"finite gradients, got a norm of {norm.item()}", state.global_step + 1, args.output_dir)


def _last_checkpoint(folder: Path) -> str | None:
    """The last that was written to its end, of which the trainer's state is the last file; others are deleted."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    whole = {step: path for step, path in found.items() if (path / TRAINER_STATE_NAME).exists()}
    for path in (found[step] for step in found.keys() - whole if RANK == 0):
        shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None


def _diverged(what: str, step: int, folder: str) -> DivergedError:
    """What is wrong at a step was done by the one before: its checkpoint is not good."""
    shutil.rmtree(Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step - 1}", ignore_errors=True)
    last = _last_checkpoint(Path(folder))
    kept = "no checkpoint was written before" if last is None else f"the last good checkpoint is kept in {last}"
    return DivergedError(f"step {step}: expected {what}; {kept}. Lower the learning rate, in a new folder")


class _Bar(TrainerCallback):
    """A progress bar with the last loss."""

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
def _own_randomness() -> Iterator[None]:
    """Python's, numpy's and torch's random states as they were, afterwards: the trainer seeds them all."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the trainer seeds this one
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def perplexity(model: MomentumForCausalLM, sequences: Int[Tensor, "sequence pos"], *, batch_size: int = 16) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token behind the first of its sequence.

    Raises:
        ValueError: there are no such tokens.
    """
    if not sequences[:, 1:].numel():
        raise ValueError(f"expected sequences of two tokens at least, got {list(sequences.shape)}")
    total = 0.0
    with torch.no_grad():
        for batch in sequences.split(batch_size):
            batch = batch.to(model.device)
            log_probs = model(batch).logits[:, :-1].float().log_softmax(-1)
            total -= log_probs.gather(-1, batch[:, 1:, None]).double().sum().item()
    return math.exp(total / sequences[:, 1:].numel())


def in_context_accuracy(
    model: MomentumForCausalLM, task: LabelMapping, *, n: int = 512, seed: int = 0
) -> Bool[Tensor, "sequence pair"]:
    """Whether the model gives each pair's label right, after as many demonstrations as there are pairs before it."""
    sequences = task.training_sequences(task.length, n, seed)
    found = []
    with torch.no_grad():
        for batch in sequences.split(64):
            logits = model(batch.to(model.device)).logits[:, 1:-1:2, 1 + task.n_x :]
            found.append(logits.argmax(-1).cpu() == batch[:, 2::2] - 1 - task.n_x)
    return torch.cat(found)
