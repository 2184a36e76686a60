"""What both parity tests share. Run from the repository's root, in an environment with parity/requirements.txt:

    python -m pytest -q tests/parity
"""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def randomise():
    """randomise(net, seed): every parameter random, those that start at zero too. Norm weights lie around 1."""
    @torch.no_grad()
    def fill(net, seed=0):
        g = torch.Generator().manual_seed(seed)
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                z = torch.randn(p.shape, generator=g)
                norm = isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
                p.copy_(z * p[0].numel() ** -0.5 if p.ndim > 1 else 0.2 * z + (norm and name == 'weight'))
        return net
    return fill


@pytest.fixture
def gap(record_property):
    """gap(a, b): largest difference of two tensors, or lists of them, in units of max(1, std of b). Printed with -s."""
    def measure(a, b, what=''):
        pairs = list(zip(a, b, strict=True)) if isinstance(a, (list, tuple)) else [(a, b)]
        worst = 0.0
        for x, y in pairs:
            assert x.shape == y.shape and x.isfinite().all() and y.isfinite().all()
            worst = max(worst, float((x - y).detach().abs().max() / y.detach().std().clamp(min=1)))
        record_property(f'gap {what}', worst)
        print(f'\n  {what} {worst:.1e} (largest std {max(float(y.std()) for _, y in pairs):.3g})', end='')
        return worst
    return measure
