"""The equations of lmd/update.py and lmd/priors.py against a float64 transcription of the derivation, autograd and
sampling.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Exponential, HalfNormal, LogNormal, kl_divergence

from lmd import update
from lmd.priors import PRIORS
from lmd.random import NoiseKey, normal_pair

SIGMA, M0 = 0.4, 0.7


def normals(count: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return normal_pair(NoiseKey(11, 0, step), torch.empty(count, dtype=torch.float64))


# --- priors ---


def log_normal(location: float | Tensor, scale: float) -> LogNormal:
    return LogNormal(torch.as_tensor(location, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def kl(name: str, log_m: Tensor) -> Tensor:
    """KL(log-normal(log m, SIGMA^2) || prior) in closed form; the log-normal prior has scale 1, so lambda =
    weight_decay.
    """
    entropy = log_m + 0.5 + math.log(SIGMA * math.sqrt(2.0 * math.pi))
    if name == "log-normal":
        return kl_divergence(log_normal(log_m, SIGMA), log_normal(math.log(M0), 1.0))
    if name == "half-normal":
        moment = torch.exp(2.0 * log_m + 2.0 * SIGMA**2)
        return -entropy - (0.5 * math.log(2.0 / math.pi) - math.log(M0) - moment / (2.0 * M0**2))
    if name == "exponential":
        return -entropy - (-math.log(M0) - torch.exp(log_m + 0.5 * SIGMA**2) / M0)
    assert name == "flat"
    return -entropy + log_m  # p(theta) = 1 / theta: E[log theta] = log m


PROPER = {
    "log-normal": log_normal(math.log(M0), 1.0),
    "half-normal": HalfNormal(torch.tensor(M0, dtype=torch.float64)),
    "exponential": Exponential(torch.tensor(1.0 / M0, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ["log-normal", "half-normal", "exponential", "flat"])
def test_the_regularizer_is_the_gradient_of_the_exact_kl(name):
    log_m = torch.linspace(-3.0, 2.0, 41, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kl(name, log_m).sum(), log_m)
    regularizer = PRIORS[name].regularizer(log_m - math.log(M0), SIGMA)
    torch.testing.assert_close(regularizer.detach(), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROPER)
def test_the_kl_and_its_gradient_agree_with_sampling(name):
    """Each within 4 standard errors of its Monte-Carlo estimate: with fixed keys, one comparison of probability 6e-5
    to fail.
    """
    count = 200_000
    for log_m in (-1.5, 0.0, 1.0):
        theta = torch.exp(log_m + SIGMA * normals(count)[0]).requires_grad_()
        prior_log_prob = PROPER[name].log_prob(theta)
        ratio = log_normal(log_m, SIGMA).log_prob(theta.detach()) - prior_log_prob.detach()
        assert abs(ratio.mean() - kl(name, torch.tensor(log_m).double())) < 4.0 * ratio.std() / math.sqrt(count)
        # the derivative in log m of E[-log p(theta)] by reparametrization, and that of -entropy, which is -1
        (slope,) = torch.autograd.grad(-prior_log_prob.sum(), theta)
        gradient = theta.detach() * slope - 1.0
        regularizer = PRIORS[name].regularizer(torch.tensor(log_m).double() - math.log(M0), SIGMA)
        assert abs(gradient.mean() - regularizer) < 4.0 * gradient.std() / math.sqrt(count)


def test_the_entropy_is_the_only_thing_its_option_drops():
    d = torch.linspace(-2, 2, 9)
    for name, prior in PRIORS.items():
        difference = prior.regularizer(d, SIGMA, keep_entropy=False) - prior.regularizer(d, SIGMA)
        expected = 1.0 if name in ("half-normal", "exponential") else 0.0
        torch.testing.assert_close(difference, torch.full_like(d, expected))


def test_constant_decay_is_one_and_flat_is_zero():
    d = torch.linspace(-2, 2, 9)
    assert torch.equal(PRIORS["constant"].regularizer(d, SIGMA), torch.ones(9))
    assert torch.equal(PRIORS["flat"].regularizer(d, SIGMA), torch.zeros(9))


def test_the_priors_that_keep_the_product_are_those_with_an_odd_regularizer():
    d = torch.linspace(-2, 2, 9)
    for prior in PRIORS.values():
        odd = torch.equal(prior.regularizer(-d, SIGMA), -prior.regularizer(d, SIGMA))
        assert prior.keeps_product == odd


# --- posterior ---


def test_mean_and_log_ratio_are_inverse():
    mean = torch.cat((torch.logspace(-12, 6, 200), -torch.logspace(-12, 6, 200))).double()
    a = update.half_log_ratio(mean, M0, SIGMA)
    torch.testing.assert_close(update.posterior_mean(a, M0, SIGMA), mean, rtol=1e-14 * 50, atol=0.0)
    plus, minus = update.multipliers(a, M0, SIGMA, None)
    torch.testing.assert_close(plus - minus, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_samples_have_the_mean_and_the_variance_of_the_formulas(sigma):
    """E[w] = w; Var[w] = (m+^2 + m-^2) e^(sigma^2) (e^(sigma^2) - 1); within 4 standard errors, of the variance by
    its own.
    """
    count = 400_000
    for w in (-3.0, 0.0, 0.02, 1.0):
        mean = torch.full((count,), w, dtype=torch.float64)
        drawn = update.sample(mean, M0, sigma, normals(count))
        a = update.half_log_ratio(mean[:1], M0, sigma).item()
        medians = M0 * math.exp(a), M0 * math.exp(-a)
        variance = sum(m**2 for m in medians) * math.exp(sigma**2) * math.expm1(sigma**2)
        assert abs(drawn.mean() - w) < 4.0 * math.sqrt(variance / count)
        squares = (drawn - w).square()
        assert abs(squares.mean() - variance) < 4.0 * squares.std() / math.sqrt(count)


# --- the step against the derivation, written out in float64 ---


def split_by_the_derivation(m_plus, m_minus, v_plus, v_minus, g, noise, *, lr, betas, decay, sigma, regularizer):
    """lmd/README.md, "The update", line by line."""
    theta_plus, theta_minus = m_plus * torch.exp(sigma * noise[0]), m_minus * torch.exp(sigma * noise[1])
    g_plus, g_minus = g * theta_plus, -g * theta_minus
    u_plus = betas[0] * v_plus + (1 - betas[0]) * g_plus
    u_minus = betas[0] * v_minus + (1 - betas[0]) * g_minus
    v_plus = betas[1] * v_plus + (1 - betas[1]) * g_plus
    v_minus = betas[1] * v_minus + (1 - betas[1]) * g_minus
    m_plus = m_plus * torch.exp(-lr * (torch.sign(u_plus) + decay * regularizer(m_plus)))
    m_minus = m_minus * torch.exp(-lr * (torch.sign(u_minus) + decay * regularizer(m_minus)))
    return m_plus, m_minus, v_plus, v_minus


REGULARIZERS = {
    "log-normal": lambda m: torch.log(m / M0),
    "half-normal": lambda m: (m / M0) ** 2 * math.exp(2.0 * SIGMA**2) - 1.0,
    "exponential": lambda m: m / M0 * math.exp(0.5 * SIGMA**2) - 1.0,
    "flat": torch.zeros_like,
    "constant": torch.ones_like,
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_split_step_is_the_derivation(name):
    torch.manual_seed(0)
    count, settings = 500, {"lr": 0.05, "betas": (0.9, 0.99), "noise_scale": SIGMA}
    mean = torch.randn(count, dtype=torch.float64)
    a = update.half_log_ratio(mean, M0, SIGMA)
    medians = M0 * torch.exp(a), M0 * torch.exp(-a)
    by_hand = (*medians, torch.zeros_like(mean), torch.zeros_like(mean))
    ours = update.Split(mean, *(torch.zeros_like(mean) for _ in range(3)), (mean, mean))
    for step in range(60):
        g, noise = torch.randn(count, dtype=torch.float64), normals(count, step)
        by_hand = split_by_the_derivation(
            *by_hand, g, noise, lr=0.05, betas=(0.9, 0.99), decay=0.3, sigma=SIGMA, regularizer=REGULARIZERS[name]
        )
        ours = update.step_split(
            ours.mean, ours.log_center, ours.v_plus, ours.v_minus, g, M0,
            weight_decay=0.3, noise=noise, prior=PRIORS[name], entropy=True, **settings,
        )  # fmt: skip
    m_plus, m_minus, v_plus, v_minus = by_hand
    scale = math.exp(0.5 * SIGMA**2)
    torch.testing.assert_close(ours.mean, scale * (m_plus - m_minus), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(M0**2 * torch.exp(2 * ours.log_center), m_plus * m_minus, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(ours.v_plus, v_plus, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours.v_minus, v_minus, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["log-normal", "flat"])
def test_the_shared_step_is_the_derivation(name):
    """lmd/README.md, "One vector": with the sign of G+ - G- for both sides, EG+- keeps m+ m-."""
    torch.manual_seed(0)
    count, lr, decay = 500, 0.05, 0.3
    mean = torch.randn(count, dtype=torch.float64)
    a = update.half_log_ratio(mean, M0, SIGMA)
    m_plus, m_minus, v = M0 * torch.exp(a), M0 * torch.exp(-a), torch.zeros_like(mean)
    ours = update.Shared(mean, torch.zeros_like(mean), (mean,))
    for step in range(60):
        g, noise = torch.randn(count, dtype=torch.float64), normals(count, step)
        gradient = g * (m_plus * torch.exp(SIGMA * noise[0]) + m_minus * torch.exp(SIGMA * noise[1]))
        u, v = 0.9 * v + (1 - 0.9) * gradient, 0.99 * v + (1 - 0.99) * gradient
        r_plus, r_minus = (REGULARIZERS[name](m) for m in (m_plus, m_minus))
        m_plus = m_plus * torch.exp(-lr * (torch.sign(u) + decay * r_plus))
        m_minus = m_minus * torch.exp(-lr * (-torch.sign(u) + decay * r_minus))
        ours = update.step_shared(
            ours.mean, ours.v, g, M0,
            lr=lr, betas=(0.9, 0.99), weight_decay=decay, noise_scale=SIGMA, noise=noise, prior=PRIORS[name],
        )  # fmt: skip
    torch.testing.assert_close(m_plus * m_minus, torch.full_like(mean, M0**2), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(ours.mean, math.exp(0.5 * SIGMA**2) * (m_plus - m_minus), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.v, v, rtol=1e-10, atol=1e-13)


def test_shared_and_split_follow_one_trajectory_on_identical_signs():
    """Gradients of a fixed sign give both sides opposite signs in every step."""
    torch.manual_seed(0)
    mean = torch.randn(500, dtype=torch.float64)
    settings = {
        "lr": 0.05,
        "betas": (0.9, 0.99),
        "weight_decay": 0.3,
        "noise_scale": SIGMA,
        "prior": PRIORS["log-normal"],
    }
    shared, split = (
        update.Shared(mean, torch.zeros_like(mean), (mean,)),
        update.Split(mean, *[torch.zeros_like(mean)] * 3, (mean, mean)),
    )
    sign = torch.sign(torch.randn(500, dtype=torch.float64))
    for step in range(100):
        g, noise = sign * torch.rand(500, dtype=torch.float64), normals(500, step)
        shared = update.step_shared(shared.mean, shared.v, g, M0, noise=noise, **settings)
        split = update.step_split(
            split.mean, split.log_center, split.v_plus, split.v_minus, g, M0, noise=noise, entropy=True, **settings
        )
    torch.testing.assert_close(split.mean, shared.mean, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(split.log_center, torch.zeros_like(mean), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(split.v_plus - split.v_minus, shared.v, rtol=1e-11, atol=1e-14)


def test_a_gradient_at_the_mean_is_scaled_by_the_expected_multipliers():
    mean, g = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    scale = 2.0 * M0 * math.exp(0.5 * SIGMA**2)
    result = update.step_shared(
        mean, torch.zeros_like(mean), g, M0,
        lr=0.1, betas=(0.9, 0.5), weight_decay=0.0, noise_scale=SIGMA, noise=None, prior=PRIORS["log-normal"],
    )  # fmt: skip
    torch.testing.assert_close(result.v, 0.5 * torch.sqrt(mean**2 + scale**2))


@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_without_weight_scaling_the_gradient_alone_moves_the_medians(parameterization):
    """Multipliers of any size and noise take the same steps in log m, +-lr sign of the gradient's momentum."""
    torch.manual_seed(0)
    settings = {
        "lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0, "noise_scale": SIGMA, "prior": PRIORS["log-normal"],
        "weight_scaling": False,
    }  # fmt: skip
    mean = torch.randn(200, dtype=torch.float64)
    shared, split = (
        update.Shared(mean, torch.zeros_like(mean), (mean,)),
        update.Split(mean, *[torch.zeros_like(mean)] * 3, (mean, mean)),
    )
    v, moved = torch.zeros_like(mean), torch.zeros_like(mean)
    for step in range(30):
        g = torch.randn(200, dtype=torch.float64)
        u, v = 0.9 * v + 0.1 * g, 0.99 * v + 0.01 * g
        moved -= 0.05 * torch.sign(u)
        if parameterization == "shared":
            shared = update.step_shared(shared.mean, shared.v, g, M0, noise=normals(200, step), **settings)
        else:
            split = update.step_split(
                split.mean, split.log_center, split.v_plus, split.v_minus, g, M0,
                noise=normals(200, step), entropy=True, **settings,
            )  # fmt: skip
    a = update.half_log_ratio(mean, M0, SIGMA) + moved
    if parameterization == "shared":
        torch.testing.assert_close(update.half_log_ratio(shared.mean, M0, SIGMA), a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shared.v, 2.0 * M0 * v, rtol=1e-12, atol=0.0)
    else:
        torch.testing.assert_close(update.half_log_ratio(split.mean, M0, SIGMA), a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(split.log_center, torch.zeros_like(mean), rtol=0.0, atol=1e-13)
        torch.testing.assert_close(split.v_minus, -M0 * v, rtol=1e-12, atol=0.0)


def test_a_step_is_proportional_below_full_and_of_length_one_above():
    u = torch.tensor([0.0, 0.25, -0.5, 1.0, -7.0, math.inf, math.nan], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.5, -1.0, 1.0, -1.0, 1.0, math.nan], dtype=torch.float64)
    torch.testing.assert_close(update.direction(u, 0.5), expected, equal_nan=True, rtol=0.0, atol=0.0)
    for none in (0.0, math.nan, math.inf):
        torch.testing.assert_close(update.direction(u, none), torch.sign(u), equal_nan=True, rtol=0.0, atol=0.0)


def test_the_scale_of_the_gradients_does_not_enter():
    """`full` is a multiple of u's own root mean square: a loss in other units takes the same steps."""
    torch.manual_seed(0)
    mean, g = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    settings = {
        "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.3, "noise_scale": SIGMA, "noise": None,
        "prior": PRIORS["log-normal"],
    }  # fmt: skip
    ends = []
    for unit in (1.0, 2.0**40):
        state, rms = update.Shared(mean, torch.zeros_like(mean), (mean,)), math.nan
        for step in range(20):
            gradient = unit * g.roll(step)
            state = update.step_shared(state.mean, state.v, gradient, M0, full=0.5 * rms, **settings)
            rms = update.root_mean_square(*state.us).item()
        ends.append(state.mean)
    assert torch.equal(*ends)


@pytest.mark.parametrize("prior_a", [0.0, 0.8])
def test_without_gradients_weights_go_to_the_priors_medians(prior_a):
    """Of both parameterizations, and at the rate lr weight_decay."""
    mean, zero = torch.randn(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    settings = {
        "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 2.0, "noise_scale": SIGMA, "noise": None,
        "prior": PRIORS["log-normal"], "prior_a": prior_a,
    }  # fmt: skip
    shared = update.step_shared(mean, zero, zero, M0, **settings)
    split = update.step_split(mean, zero, zero, zero, zero, M0, entropy=True, **settings)
    a = update.half_log_ratio(mean, M0, SIGMA) - prior_a
    for result in (shared, split):
        torch.testing.assert_close(update.half_log_ratio(result.mean, M0, SIGMA) - prior_a, 0.8 * a)
    torch.testing.assert_close(split.log_center, zero, rtol=0.0, atol=1e-15)


# --- initialization ---


@pytest.mark.parametrize("weights", [torch.zeros(3), torch.ones(3), torch.tensor([[0.5, -1.5], [1.0, 2.0]])], ids=str)
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_gradient_that_never_changes_takes_a_weight_to_the_bound_of_the_prior(weights, side):
    """|a - prior_a| = 1 / weight_decay, for every weight of the tensor."""
    m0, prior_a = update.start(weights, 3.0)
    mean, v = weights.double(), torch.zeros_like(weights, dtype=torch.float64)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5, "noise_scale": 0.05, "noise": None}
    for _ in range(1000):
        gradient = torch.full_like(mean, -side)
        mean, v, _ = update.step_shared(mean, v, gradient, m0, prior=PRIORS["log-normal"], prior_a=prior_a, **settings)
    bound = update.posterior_mean(torch.full_like(mean, prior_a + side * 2.0), m0, 0.05)
    torch.testing.assert_close(mean, bound)


def test_the_center_is_the_spread_of_the_weights():
    torch.manual_seed(0)
    weights = 0.02 * torch.randn(300, 257)
    expected = weights.double().std(correction=0).item()
    assert update.start(weights, 1.0).m0 == pytest.approx(expected, rel=1e-12)
    assert update.start(weights, 3.0).m0 == pytest.approx(3.0 * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "m0", "prior_a"),
    [
        (torch.ones(64), 0.5, math.asinh(1.0)),
        (-torch.ones(64), 0.5, -math.asinh(1.0)),
        (torch.zeros(64), 0.05, 0.0),
        (torch.full((4,), 0.01), 0.05, math.asinh(0.1)),
        (torch.zeros(8, 10_000), 0.005, 0.0),
        (torch.zeros(8, 4), 0.05, 0.0),
        (torch.tensor(-3.0), 1.5, -math.asinh(1.0)),
        (torch.tensor(0.0), 0.05, 0.0),
        (torch.empty(0, 4), 0.05, 0.0),
        (
            1.0 + 0.1 * torch.cos(torch.arange(64.0)),
            0.5 * (1.0 + 0.1 * torch.cos(torch.arange(64.0))).mean().item(),
            math.asinh(1.0),
        ),
    ],
)
def test_tensors_without_a_spread_get_half_their_size_and_a_prior_about_their_mean(weights, m0, prior_a):
    assert update.start(weights, 7.0) == pytest.approx((m0, prior_a), rel=1e-6)


def test_the_center_does_not_depend_on_the_thread_count():
    torch.manual_seed(0)
    weights = torch.randn(3, 1_000_003)
    threads = torch.get_num_threads()
    try:
        centers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            centers.append(update.start(weights, 1.0).m0)
    finally:
        torch.set_num_threads(threads)
    assert len(set(centers)) == 1


def test_a_weight_that_is_not_finite_has_no_scale():
    with pytest.raises(ValueError, match="finite"):
        update.start(torch.tensor([1.0, math.inf]), 1.0)
