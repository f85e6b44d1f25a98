"""Deviations in the Fisher metric: half a squared length is the second-order KL, inner products are interactions."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from ffn_fusion.core.fisher import Sketcher, gram, signs
from ffn_fusion.core.losses import CHUNKS, kl_to, reference

VOCAB = 40
CHUNK = CHUNKS["cpu"]
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kl(parent: Tensor, student: Tensor) -> Tensor:
    """KL(parent || student) of each token in float64, by its definition."""
    p, q = parent.double().log_softmax(-1), student.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_with_no_projection_half_the_squared_length_is_the_variance_of_the_change() -> None:
    z, d = 3 * normal(CHUNK + 7, VOCAB), normal(CHUNK + 7, VOCAB, seed=1)
    u = Sketcher(reference(z), torch.eye(VOCAB))(z + d).double()
    p = z.double().softmax(-1)
    variance = (p * d.double().square()).sum(-1) - (p * d.double()).sum(-1).square()
    torch.testing.assert_close(u.square().sum(-1), variance, rtol=1e-4, atol=1e-5)


def test_it_is_the_hessian_of_the_kl() -> None:
    z, d = 3 * normal(5, VOCAB), normal(5, VOCAB, seed=1)
    u = Sketcher(reference(z), torch.eye(VOCAB))(z + d).double()
    for at in range(5):
        hessian = torch.autograd.functional.hessian(lambda x, own=z[at]: kl(own, x), z[at].double())
        expected = d[at].double() @ hessian @ d[at].double()
        assert float(u[at].square().sum()) == pytest.approx(float(expected), rel=1e-4)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    z, d = normal(6, VOCAB), normal(6, VOCAB, seed=1)
    sketch = Sketcher(reference(z), signs(VOCAB, CPU))
    torch.testing.assert_close(sketch(z + d + 3.0), sketch(z + d), rtol=1e-3, atol=1e-4)
    assert float(sketch(z + 3.0).abs().max()) < 1e-4


def test_the_interaction_of_additive_changes_is_what_both_cost_above_the_sum() -> None:
    """To second order; the changes are small enough for it."""
    n = 400
    z = 2 * normal(n, VOCAB)
    shared = normal(n, VOCAB, seed=9)
    small = [0.02 * (shared + normal(n, VOCAB, seed=seed)) for seed in (1, 2, 3)]
    ref = reference(z.double())
    for projection, tolerance in ((torch.eye(VOCAB), 0.03), (signs(VOCAB, CPU), 0.15)):
        sketch = Sketcher(ref, projection)
        inner = gram(torch.stack([sketch(z + d) for d in small]))
        for i, j in combinations(range(3), 2):
            alone = [kl(z, z + small[k]).mean() for k in (i, j)]
            both = kl(z, z + small[i] + small[j]).mean()
            assert float(sum(alone) + inner[i, j]) == pytest.approx(float(both), rel=tolerance)
            assert float(inner[i, j]) > 0.2 * float(both), "they do interact"
        for i, d in enumerate(small):
            assert float(inner[i, i]) / 2 == pytest.approx(float(kl(z, z + d).mean()), rel=tolerance)


def test_the_projection_keeps_inner_products_on_average_over_tokens() -> None:
    u = normal(2000, 300, seed=4)
    v = u + normal(2000, 300, seed=5)
    projection = signs(300, CPU)
    assert torch.equal(projection, signs(300, CPU)), "the same one every time"
    projected = ((u @ projection) * (v @ projection)).sum(-1).mean()
    assert float(projected) == pytest.approx(float((u * v).sum(-1).mean()), rel=0.03)
    assert projection.shape == (300, 16)


def test_a_token_without_probability_has_no_weight() -> None:
    z, d = normal(8, VOCAB), normal(8, VOCAB, seed=1)
    z[:, 0] = -1e4
    d[:, 0] = 1e3
    sketch = Sketcher(reference(z), torch.eye(VOCAB))(z + d)
    assert torch.isfinite(sketch).all()
    rest = Sketcher(reference(z[:, 1:]), torch.eye(VOCAB - 1))((z + d)[:, 1:])
    torch.testing.assert_close(sketch[:, 1:], rest, rtol=1e-4, atol=1e-5)
    assert float(sketch[:, 0].abs().max()) == 0
    assert torch.isfinite(kl_to(reference(z), z + d)).all()


def test_a_gram_matrix_is_positive_semidefinite_and_in_a_mean_token() -> None:
    sketches = normal(7, 3, 2)  # of rank 6
    found = gram(sketches)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, found.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert float(found[1, 4]) == pytest.approx(float((sketches[1] * sketches[4]).sum() / 3), rel=1e-6)
