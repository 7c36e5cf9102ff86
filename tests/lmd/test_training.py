"""LMD's settings in the training loop of experiments/training/train.py."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments.training.config import Config
from experiments.training.optimizers import LMD
from experiments.training.train import build, gradients
from lmd.optimizer import LMD as LMDOptimizer
from tests.experiments.experiment_jobs import tiny_config
from tests.experiments.test_train import metrics, on_one_thread, run, weights

__all__ = ["on_one_thread"]  # a fixture of this module, too

SAMPLED = tiny_config(optimizer=LMD(lr=0.03, noise_scale=0.1, mc_samples=3))


def test_the_loop_takes_every_sample_of_a_step() -> None:
    """The gradient and the loss are those of mc_samples blocks written out; the clipping acts on their average."""
    results = []
    for by_hand in (False, True):
        model, optimizer = build(SAMPLED)
        assert isinstance(optimizer, LMDOptimizer) and optimizer.mc_samples == 3
        batch = SAMPLED.data.load(SAMPLED.model).train_batch(0, 0, SAMPLED.batch_size)
        if by_hand:
            losses = []
            for _ in range(3):
                with optimizer.sampled_params():
                    loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
                    loss.backward()
                losses.append(loss.item())
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            assert len(set(losses)) == 3  # three samples, not one
            mean = sum(losses) / 3
        else:
            mean, norm = gradients(SAMPLED, model, optimizer, batch)
        optimizer.step()
        results.append((mean, norm, [p.detach().clone() for p in model.parameters()]))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(results[0][2], results[1][2], strict=True))


@pytest.mark.parametrize("config", [SAMPLED, tiny_config(optimizer=LMD(lr=0.03, weight_scaling=False))], ids=str)
def test_a_resumed_run_is_bit_equal(config: Config, tmp_path: Path) -> None:
    assert run(config, tmp_path / "a") == run(config, tmp_path / "b", stops=(1, 5))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
