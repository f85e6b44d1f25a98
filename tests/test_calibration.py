"""The closed-form refit, against least squares on the augmented system."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import relative_error
from torch import Tensor

from ffn_fusion.core.calibration import STRENGTHS, RidgeSystem, best_solution

CPU = torch.device("cpu")
TOLERANCE = 1e-3
"""The system is summed in float32; its error grows with the condition number, at most about 1 / strength."""
Tokens = tuple[Tensor, Tensor, Tensor]


def draw(seed: int, num_tokens: int, channels: int, hidden: int, signal: float = 0.0) -> Tokens:
    """Activations, residuals (noise, plus `signal` times a map that all seeds share) and weights."""
    g = torch.Generator().manual_seed(seed)
    activations = torch.randn(num_tokens, channels, generator=g) * (torch.rand(channels, generator=g) + 0.1)
    shared = torch.randn(channels, hidden, generator=torch.Generator().manual_seed(0))
    residual = torch.randn(num_tokens, hidden, generator=g) + signal * activations @ shared
    return activations, residual, torch.rand(num_tokens, generator=g) + 0.1


def system_of(*batches: Tokens) -> RidgeSystem:
    system = RidgeSystem(batches[0][0].shape[1], batches[0][1].shape[1], CPU)
    for batch in batches:
        system.add(*batch)
    return system


def slow_ridge(tokens: Tokens, strength: float) -> Tensor:
    """Least squares in float64, the regularisation as extra rows that ask for D = 0."""
    activations, residual, weights = (t.double() for t in tokens)
    root = weights.sqrt()[:, None]
    ridge = strength * (activations * root).square().sum() / activations.shape[1]
    rows = torch.cat([activations * root, ridge.sqrt() * torch.eye(activations.shape[1], dtype=torch.float64)])
    wanted = torch.cat([residual * root, torch.zeros(activations.shape[1], residual.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 20), st.integers(1, 8), st.sampled_from(STRENGTHS[2:]))
def test_the_solution_is_that_of_least_squares_on_the_augmented_system(
    seed: int, num_tokens: int, channels: int, hidden: int, strength: float
) -> None:
    tokens = draw(seed, num_tokens, channels, hidden)
    found = system_of(tokens).solve(strength)
    assert found.shape == (channels, hidden)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), slow_ridge(tokens, strength)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    activations, residual, weights = draw(1, 3000, 6, 3, signal=1.0)
    tokens = (activations.to(dtype), residual.to(dtype), weights)
    assert relative_error(system_of(tokens).solve(0.01).double(), slow_ridge(tokens, 0.01)) < TOLERANCE


def test_batches_added_in_parts_equal_one_batch() -> None:
    tokens = draw(2, 90, 12, 5)
    parts = zip(*(t.split([1, 40, 49]) for t in tokens), strict=True)
    whole, summed = system_of(tokens), system_of(*parts)
    assert relative_error(summed.gram, whole.gram) < 1e-5
    assert relative_error(summed.cross, whole.cross) < 1e-5
    assert relative_error(summed.solve(0.01), whole.solve(0.01)) < 1e-4


def test_solving_does_not_change_the_system() -> None:
    system = system_of(draw(3, 50, 8, 4))
    first = system.solve(0.1)
    system.solve(3.0)
    assert torch.equal(system.solve(0.1), first)


def test_a_stronger_regularisation_gives_a_smaller_change() -> None:
    system = system_of(draw(4, 50, 8, 4, signal=1.0))
    norms = [float(system.solve(strength).norm()) for strength in STRENGTHS]
    assert norms == sorted(norms, reverse=True)


def test_channels_that_never_fire_get_no_change() -> None:
    activations, residual, weights = draw(5, 50, 8, 4)
    activations[:, 3] = 0
    found = system_of((activations, residual, weights)).solve(1e-4)
    assert torch.isfinite(found).all()
    assert not found[3].any()
    nothing = system_of((torch.zeros_like(activations), residual, weights)).solve(1e-4)
    assert not nothing.any()


def test_channels_that_always_fire_together_share_the_change() -> None:
    activations, residual, weights = draw(6, 200, 2, 3, signal=1.0)
    doubled = torch.cat([activations, activations], 1)
    found = system_of((doubled, residual, weights)).solve(1e-3)
    assert relative_error(found[:2], found[2:]) < 0.05


def held_out(tokens: Tokens) -> Callable[[Tensor | None], float]:
    activations, residual, weights = tokens

    def error(delta: Tensor | None) -> float:
        left = residual if delta is None else residual - activations @ delta
        return float((left.square().sum(-1) * weights).sum())

    return error


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_is_left_alone(seed: int) -> None:
    system = system_of(draw(10 + seed, 200, 64, 64))
    error = held_out(draw(20 + seed, 100, 64, 64))
    solution = best_solution(system, error)
    assert solution.delta is None
    assert solution.strength is None
    assert solution.error_before == solution.error_after == error(None)


@pytest.mark.parametrize("seed", range(5))
def test_a_signal_is_found_and_lowers_the_held_out_error(seed: int) -> None:
    system = system_of(draw(30 + seed, 400, 32, 16, signal=1.0))
    error = held_out(draw(40 + seed, 100, 32, 16, signal=1.0))
    solution = best_solution(system, error)
    assert solution.delta is not None
    assert solution.error_before == error(None)
    assert solution.error_after == error(solution.delta)
    assert solution.error_after < 0.3 * solution.error_before


@pytest.mark.parametrize("signal", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("start", [STRENGTHS[0], 0.1, STRENGTHS[-1]])
def test_the_strength_chosen_is_the_best_of_all(signal: float, start: float) -> None:
    system = system_of(draw(50, 100, 32, 16, signal))
    error = held_out(draw(51, 100, 32, 16, signal))
    errors = {strength: error(system.solve(strength)) for strength in STRENGTHS}
    solution = best_solution(system, error, start=start)
    assert solution.strength == min(errors, key=errors.__getitem__)
    assert solution.error_after == pytest.approx(min(errors.values()))


def test_a_fit_whose_error_is_not_a_number_is_not_kept() -> None:
    system = system_of(draw(60, 50, 8, 4))
    solution = best_solution(system, lambda delta: 1.0 if delta is None else float("nan"))
    assert solution.delta is None
