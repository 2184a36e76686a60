"""Behind --slow, minutes long: does the README's first command learn to put tumours where the masks say?

    python -m pytest -q -s --slow tests/test_slow.py      (in the repository's root; uses runs/bravo if it is there, else trains it)
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train_bravo
from common import UNet, batch_rows, generator, load_slices, make_phantom


def dice(a, b):
    """Mean over images of 2|A and B| / (|A| + |B|), for (N,1,H,W) of bools whose b is never empty."""
    return (2 * (a & b).flatten(1).sum(1) / (a.flatten(1).sum(1) + b.flatten(1).sum(1))).mean().item()


def train_segmenter(images, masks, steps=600):
    """A small U-Net on (N,1,S,S) images with BCE + Dice; returns its prediction as a function."""
    torch.manual_seed(0)
    net = UNet(1, 1, (16, 32, 64), (0, 0, 0), 1, 32, norm_groups=8)
    opt = torch.optim.AdamW(net.parameters(), 2e-3, fused=True)
    t = torch.zeros(16)
    for step in range(steps):
        for group in opt.param_groups:
            group['lr'] = 2e-3 * (1 - step / steps)
        rows = batch_rows(len(images), 16, step, 0)
        x, y = torch.tensor(images[rows]), torch.tensor(masks[rows]).float()
        x = x + 0.05 * torch.randn(x.shape, generator=generator('seg', step))       # what little noise a sampler leaves is no tumour
        out = net(x, t)
        p = out.sigmoid()
        loss = F.binary_cross_entropy_with_logits(out, y) + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return torch.no_grad()(lambda x: torch.cat([net(p, torch.zeros(len(p))) for p in torch.as_tensor(x).split(32)]) > 0)


@pytest.mark.slow
def test_tumours_lie_where_the_masks_say(tmp_path):
    """Dice of a segmenter trained on another phantom: on generated images with their own masks, with shuffled masks, and on
    real phantom test images (the ceiling)."""
    os.chdir(Path(__file__).parent.parent)
    train_bravo.main(train_bravo.get_args(['--rflow', '--steps', '100']))           # resumes, or finds it complete
    out = tmp_path / 'set'
    sample.main(sample.get_args(['--data', 'runs/phantom', '--part', 'test', '--empty-slices', '0', '--bravo', 'runs/bravo', '--n', '96',
                                 '--out', str(out)]))
    other = load_slices([make_phantom(Path('runs/phantom_segmenter'), 60, seed=1)], 64)
    rows = np.arange(len(other.table))
    segment = train_segmenter(other.images[rows], other.masks[rows])
    real = load_slices(['runs/phantom'], 64)
    test = real.rows('test', 0.0)
    ceiling = dice(segment(real.images[test]), torch.tensor(real.masks[test]) > 0)
    made = load_slices([out], 64, training=False)
    keep = [i for i, r in enumerate(made.table) if r['tumour']]
    found, masks = segment(made.images[keep]), torch.tensor(made.masks[keep]) > 0
    own, shuffled = dice(found, masks), np.mean([dice(found, masks.roll(k, 0)) for k in range(1, 11)])
    print(f'\nDice, generated images with their own masks {own:.3f}, with shuffled masks {shuffled:.3f}; ceiling on real ones {ceiling:.3f}')
    assert ceiling > 0.6 and own > shuffled + 0.3
