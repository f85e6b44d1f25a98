"""How changes of a model add up: their logit deviations as vectors in the Fisher metric (docs/method.md, section 10).

To second order KL(p || p + d) = 1/2 Var_p(d), half the squared length of u = sqrt(p) (d - E_p d), where d [V] is the
change of the logits. If the deviations of two changes add up, KL(both) = KL(a) + KL(b) + u_a . u_b: the interaction
of every pair follows from the single changes alone. Random signs project u to a few numbers a token and keep its
inner products (Johnson and Lindenstrauss; Achlioptas 2003).
"""

import torch
from torch import Tensor

from ffn_fusion.core.losses import Reference, chunks

SKETCH = 16
"""Numbers kept a token. Errors of inner products average out over tokens."""


def signs(vocab_size: int, device: torch.device, size: int = SKETCH) -> Tensor:
    """Projection [V, size] with entries of random sign; the same one on every device."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (vocab_size, size), generator=generator, dtype=torch.int8)
    scaled: Tensor = (2 * bits - 1).float() / size**0.5
    return scaled.to(device)


class Sketcher:
    """Projects deviations from one reference. What depends on the parent alone is projected once.

    The parent's log-probabilities are its logits up to a constant a token, which centring takes away:
    u = sqrt(p) (z - log p - E_p[z - log p]).
    """

    def __init__(self, ref: Reference, signs_vk: Tensor) -> None:
        self._ref, self._signs = ref, signs_vk
        roots, parents = [], []
        for p in chunks(ref.probabilities):
            root = p.sqrt()
            # What has no probability has no weight either; the floor keeps its logarithm finite.
            log = p.clamp(min=torch.finfo(torch.float32).tiny).log()
            roots.append(root @ signs_vk)
            parents.append((root * log) @ signs_vk)
        self._root, self._parent = torch.cat(roots), torch.cat(parents)

    def __call__(self, logits_nv: Tensor) -> Tensor:
        """Projected deviation of each token, [N, K] in float32."""
        parts, means = [], []
        for p, z in zip(chunks(self._ref.probabilities), chunks(logits_nv), strict=True):
            z = z.float()
            parts.append((p.sqrt() * z) @ self._signs)
            means.append(torch.einsum("nv,nv->n", p, z))
        mean = torch.cat(means) - self._ref.negative_entropy
        return torch.cat(parts) - self._parent - mean[:, None] * self._root


def gram(sketches: Tensor) -> Tensor:
    """Mean inner products [M, M] of M changes' sketches [M, N, K], in float64; positive semidefinite."""
    flat = sketches.flatten(1).double()
    return flat @ flat.T / sketches.shape[1]
