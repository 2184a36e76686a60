"""Behind --slow, minutes long: does the README's first command learn to put tumours where the masks say?

    python -m pytest -q -s --slow tests/test_slow.py      (in the repository's root; uses runs/bravo if it is there, else trains it)
"""
import os
from pathlib import Path

import numpy as np
import pytest

import sample
import train_bravo
from common import load_slices, make_phantom
from evaluate import dice, train_segmenter


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
    segment = train_segmenter(other.images[rows], other.masks[rows], 1500, width=16, augmented=False, optimizer='adamw')
    real = load_slices(['runs/phantom'], 64)
    test = real.rows('test', 0.0)
    ceiling = dice(segment(real.images[test]), real.masks[test]).mean()
    made = load_slices([out], 64, training=False)
    keep = [i for i, r in enumerate(made.table) if r['tumour']]
    found, masks = segment(made.images[keep]), made.masks[keep]
    own, shuffled = dice(found, masks).mean(), np.mean([dice(found, np.roll(masks, k, 0)) for k in range(1, 11)])
    print(f'\nDice, generated images with their own masks {own:.3f}, with shuffled masks {shuffled:.3f}; ceiling on real ones {ceiling:.3f}')
    assert ceiling > 0.6 and own > shuffled + 0.3
