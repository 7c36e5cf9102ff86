"""The training loop, the only one in the repository.

A run is a function of its config: initialization, batches, the optimizer's noise and stochastic rounding are keyed by
seed and step, so a run stopped anywhere and resumed from its checkpoint ends in the same bits as one that was not (same
machine and versions). Divergence is an outcome, not an error.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from experiments.training.config import Config
from experiments.training.data import Batch, Data
from experiments.training.histograms import BINS_PER_OCTAVE, WeightHistograms, recorded_steps
from experiments.training.parallel import Alone, Peers
from experiments.training.record import RunRecord
from experiments.training.weights import weight_statistics
from lpsim import simulate
from lpsim.machine import precision
from lpsim.machine.simulate import Simulation
from lpsim.machine.telemetry import Telemetry

Result = dict[str, Any]
FREE_EVERY = 100  # steps after which free memory goes back to the system
ALONE = Alone()


def train(
    config: Config, record: RunRecord, stop: Callable[[], bool] = lambda: False, peers: Peers = ALONE
) -> Result | None:
    """Train to the end, from the record's checkpoint where it has one. Returns what result.json is to hold.

    None when stopped: `stop` is asked after every step; a stopped run has written its checkpoint. peers: the processes
    that share the run; each calls this function.
    Raises: ValueError for data that do not fit the config; RunFolderError when the folder cannot be read or written.
    """
    with deterministic():
        data: Data = config.data.load(config.model)
        model, optimizer = build(config)
        step, time_before, final, cause = 0, 0.0, dict[str, float](), None
        saved = record.load_checkpoint(config.device)
        if saved is None and config.begin_with is not None:
            model.load_state_dict(record.weights_of(config.begin_with, config.device))
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step, time_before, final = saved["step"], saved["time_s"], saved["final"]
        network = compiled(config, peers.network(model))
        record.keep_metrics_until(step if saved is not None else -1)
        started = time.perf_counter()

        def time_s() -> float:
            return time_before + time.perf_counter() - started

        def outcome(status: str, cause: str | None, final: dict[str, float]) -> Result:
            return {
                "status": status,
                "step": step,
                "cause": cause,
                "traceback": None,
                "final": final,
                "time_s": time_s(),
            }

        simulation = simulate(model, config.recipe.build(), seed=config.seed)
        simulation.step = step
        with precision.pinned() if config.compile else simulation:
            if saved is None:
                measure(config, model, data, record, simulation, step)
            telemetry = None if config.telemetry_every is None else Telemetry(simulation, config.telemetry_every)
            if telemetry is not None and saved is not None:
                telemetry.load_state_dict(saved["telemetry"])
                record.write_telemetry(saved["telemetry"]["tables"])
            first = step
            while step < config.steps:
                begun = time.perf_counter()
                simulation.step = step
                rate = set_learning_rate(config, optimizer, step)
                batch = peers.part(data.train_batch(config.seed, step, config.batch_size), config.micro_batches)
                simulation.part = peers.rank
                loss, grad_norm = gradients(config, network, optimizer, batch, telemetry)
                loss, simulation.part = peers.mean(loss), 0
                cause = divergence(config, loss, grad_norm, data.classes)
                if cause is None:
                    optimizer.step()
                optimizer.zero_grad()
                if step == first and config.compile is None and (escaped := simulation.audit().escaped):
                    raise RuntimeError(f"matrix products ran outside the recipe: {', '.join(escaped)}")
                step += 1
                last = step == config.steps
                if step % config.log_every == 0 or last or cause is not None:
                    time_ms = 1000 * (time.perf_counter() - begun)
                    record.log(step, "train", loss=loss, lr=rate, grad_norm=grad_norm, time_ms=time_ms)
                if cause is not None:
                    break
                final["train_loss"] = loss
                if step % config.validate_every == 0 or last:
                    final |= measure(config, model, data, record, simulation, step)
                stopped = peers.any(stop())
                if step % config.checkpoint_every == 0 or last or stopped:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    if telemetry is not None:
                        state["telemetry"] = telemetry.state_dict()
                        record.write_telemetry(state["telemetry"]["tables"])
                    record.save_checkpoint({"step": step, "time_s": time_s(), "final": final, **state})
                if step % FREE_EVERY == 0 or last:
                    return_free_memory()
                if stopped and not last:
                    return None
        if cause is None:
            return outcome("finished", None, final)
        if telemetry is not None:
            if not telemetry.sampling:
                telemetry = observed_again(config, model, optimizer, batch, telemetry)
            record.write_telemetry(telemetry.state_dict()["tables"])
            if (origin := telemetry.first_nonfinite) is not None:
                cause += f"; the first {origin.kind} after {origin.step} updates at {origin.site}, {origin.role}"
        return outcome("diverged", cause, {"train_loss": loss})


def build(config: Config) -> tuple[nn.Module, Optimizer]:
    """The initialized model and its optimizer; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = config.model.build()
    model.to(config.device)
    if config.recompute:
        recompute_blocks(model)
    optimizer = config.optimizer.build(model, config.seed)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return model, optimizer


def compiled(config: Config, network: nn.Module) -> nn.Module:
    """What to call for gradients, compiled where the config says so."""
    if config.compile is None:
        return network
    torch.compiler.reset()  # a worker's earlier runs count against the number of times that a function is compiled
    return cast(nn.Module, torch.compile(network, backend=config.compile))


def recompute_blocks(model: nn.Module) -> None:
    """Make every block, a module in an nn.ModuleList, keep its inputs alone; the backward pass computes the rest again.

    Under `simulate` the second pass draws the random bits of the first. Raises ValueError for a model without blocks.
    """
    blocks: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and not any(module in set(block.modules()) for block in blocks):
            blocks += module
    if not blocks:
        raise ValueError("recompute needs a model with blocks, modules in an nn.ModuleList; this one has none")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def computing(config: Config) -> AbstractContextManager[Any]:
    """The context of a forward pass: autocast where the config has it."""
    if config.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.autocast))


def set_learning_rate(config: Config, optimizer: Optimizer, step: int) -> float:
    """Set every group's rate for update `step` (from 0): linear warm-up, then the schedule. Returns the first's."""
    if step < config.warmup_steps:
        fraction = (step + 1) / config.warmup_steps
    else:
        progress = (step + 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
        fraction = config.schedule.factor(progress, config.final_lr_fraction)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * fraction
    return float(optimizer.param_groups[0]["lr"])


def gradients(
    config: Config, model: nn.Module, optimizer: Optimizer, batch: Batch, telemetry: Telemetry | None = None
) -> tuple[float, float]:
    """Put the clipped gradient into `.grad`, taken at sampled weights where the optimizer samples.

    Returns the loss, averaged over the samples where the optimizer takes several, and the gradient's 2-norm before
    clipping.
    """
    inputs, targets = (tensor.to(config.device) for tensor in batch)
    parts = list(zip(inputs.chunk(config.micro_batches), targets.chunk(config.micro_batches), strict=True))

    def loss_of(part: Batch) -> Tensor:
        with computing(config):
            return cross_entropy(model(part[0]), part[1])

    samples, total = getattr(optimizer, "mc_samples", 1), 0.0
    for sample in range(samples):
        with getattr(optimizer, "sampled_params", nullcontext)():
            for part in parts:
                loss = loss_of(part)
                # the mean's gradient; by backward's argument, for a division would be one more op of the machine
                loss.backward(None if len(parts) == 1 else torch.full_like(loss, 1 / len(parts)))
                total += loss.item() / len(parts)
            if sample == 0 and telemetry is not None and telemetry.sampling:
                telemetry.compare_gradients(lambda: torch.stack([loss_of(part) for part in parts]).mean())
    limit = math.inf if config.clip_norm is None else config.clip_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return total / samples, norm.item()


def observed_again(
    config: Config, model: nn.Module, optimizer: Optimizer, batch: Batch, before: Telemetry
) -> Telemetry:
    """What `before` saw and, in addition, the step it is at, which was not sampled, run once more.

    The same bits: the weights are as they were, and random bits are keyed by the step.
    """
    with simulate(model, config.recipe.build(), seed=config.seed, audit=False) as simulation:
        simulation.step = before.simulation.step
        telemetry = Telemetry(simulation, every=1)
        telemetry.load_state_dict(before.state_dict())
        gradients(config, model, optimizer, batch, telemetry)
    optimizer.zero_grad()
    return telemetry


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in nats."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def divergence(config: Config, loss: float, grad_norm: float, classes: int) -> str | None:
    """Why this step counts as diverged; None when it does not. The bound is documented at Config.divergence_factor."""
    bound = config.divergence_factor * math.log(classes)
    if not math.isfinite(loss):
        return f"the training loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient's norm is {grad_norm}"
    if loss > bound:
        return f"the training loss {loss:.4g} is above {bound:.4g}, {config.divergence_factor:g} times a uniform guess"
    return None


def measure(
    config: Config, model: nn.Module, data: Data, record: RunRecord, simulation: Simulation, step: int
) -> dict[str, float]:
    """Log validation metrics and weight statistics after `step` updates. Returns the former, named for result.json."""
    if step in recorded_steps(config):
        histograms = WeightHistograms(model)
        with histograms.watching(simulation):
            measured = validate(config, model, data)
        record.write_weights(step, histograms.rows(), histograms.values, 1 / BINS_PER_OCTAVE)
    else:
        measured = validate(config, model, data)
    of_own = own_metrics(config, model, data)
    record.log(step, "validation", **measured, **of_own)
    record.log(step, "weights", **weight_statistics(model))
    return {f"validation_{name}": value for name, value in measured.items()} | of_own


@torch.no_grad()
def validate(config: Config, model: nn.Module, data: Data) -> dict[str, float]:
    """Mean loss, and for images accuracy, over the held-out split, at the posterior mean: what the parameters hold."""
    loss, correct, count = 0.0, 0, 0
    model.eval()
    for inputs, targets in held_out(config, data):
        with computing(config):
            logits = model(inputs)
            loss += cross_entropy(logits, targets).item() * targets.numel()
        correct += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    model.train()
    measured = {"loss": loss / count}
    return measured if targets.ndim > 1 else measured | {"accuracy": correct / count}


def held_out(config: Config, data: Data) -> Iterator[Batch]:
    """The batches of the held-out split, on the run's device."""
    for inputs, targets in data.validation_batches(config.batch_size // config.micro_batches):
        yield inputs.to(config.device), targets.to(config.device)


@torch.no_grad()
def own_metrics(config: Config, model: nn.Module, data: Data) -> dict[str, float]:
    """What the config's metrics measure, by their names. Raises ValueError for one that gives no number."""
    measured = {}
    model.eval()
    for metric in config.metrics:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            value = metric.measure(model, held_out(config, data))
        try:
            measured[metric.name] = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
            raise ValueError(f"metric {metric.name}: measure must return a number, it returned {value!r}") from None
    model.train()
    return measured


def return_free_memory() -> None:
    """Give the C library's free memory back to the system, where the library can (glibc).

    glibc before 2.38 does not reuse the gaps that aligned blocks, torch's tensors, leave between others: a process that
    mixes them with small arrays grows by up to a megabyte a step, all of it free.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms on one CPU thread inside, the previous settings after.

    One thread, since torch's reductions (of a layer norm's gradients, for one) depend on their number. Fresh memory is
    not filled, which would cost time: nothing here reads it. On a GPU, torch refuses matrix products without this
    variable, which it reads at the first of them.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
