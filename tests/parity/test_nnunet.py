"""evaluate.py downstream --engine nnunetv2 with the real nnU-Net v2: its network is ours, and it learns from what is written for it.

Skipped where nnunetv2 is not installed.
"""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import evaluate

HERE = Path(sys.executable).parent
# timm is imported for a transformer that is not used here, and wants a torchvision that fits torch: where there is none, empty classes do
TIMM = """import sys, types


class Anything(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


sys.modules.update((name, Anything(name)) for name in ('timm', 'timm.layers', 'timm.models', 'timm.models.eva'))
"""
pytestmark = pytest.mark.skipif(not all(shutil.which(p, path=f'{HERE}:{os.environ["PATH"]}') for p in evaluate.NNUNET), reason='nnunetv2 is not installed')


def test_nnunet_end_to_end(tmp_path, monkeypatch):
    """Integrity check, plans, a short training, predictions in the right place and order, scored."""
    monkeypatch.setenv('PATH', f'{HERE}:{os.environ["PATH"]}')
    try:
        import timm
    except (ImportError, RuntimeError):
        (tmp_path / 'sitecustomize.py').write_text(TIMM)
        monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    data, g, at = tmp_path / 'data', np.random.default_rng(0), np.mgrid[:32, :32] - 15.5
    for i in range(24):                                                     # bright discs, which few steps can learn to find
        seg = np.stack([np.hypot(*(at - g.uniform(-6, 6, (2, 1, 1)))) < g.uniform(3, 5) for _ in range(3)])
        image = (np.hypot(*at) < 14) * (0.4 + 0.05 * g.standard_normal((3, 32, 32))) + 0.5 * seg
        common.write_patient(data / f'phantom_0_{i:03d}', {'bravo': np.float32(image)}, seg, (3.0, 2.0, 2.0))
    evaluate.main(evaluate.get_args(['downstream', '--engine', 'nnunetv2', '--data', str(data), '--size', '32', '--arms', 'real', '--seeds', '1', '--iters', '60',
                                     '--width', '8', '--batch-size', '4', '--device', 'cpu', '--cache', str(tmp_path / 'cache'), '--out', str(tmp_path / 'out'), '--repeats', '20']))
    root = tmp_path / 'out/nnunet/real'
    slices = common.load_slices([data], 32, cache=tmp_path / 'cache')
    truth, found = slices.masks[slices.rows('test'), 0] > 0, np.load(tmp_path / 'out/results/real_0.npz')['found']
    own, others = (np.nanmean([evaluate.dice(np.roll(found, k, 0), truth) for k in shift]) for shift in ((0,), (3, 6, 9)))
    print(f'\n  Dice {own:.3f} a slice, {others:.3f} on masks of other patients', end='')
    assert own > 0.7 and own > others + 0.4                                # in the wrong order, or transposed, they would not fit
    net = json.loads((root / 'preprocessed/Dataset001_study/nnUNetPlans.json').read_text())['configurations']['2d']
    assert net['patch_size'] == [32, 32] and net['batch_size'] == 4 and net['normalization_schemes'] == ['ZScoreNormalization'] and net['spacing'] == [1, 1]
    fold = root / 'results_0/Dataset001_study/nnUNetTrainerShortNoDA__nnUNetPlans__2d/fold_0'
    with torch.serialization.safe_globals([np._core.multiarray.scalar, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]):      # of its log
        weights = torch.load(fold / 'checkpoint_final.pth', weights_only=True)
    own = {k: v for k, v in weights['network_weights'].items() if 'decoder.encoder' not in k and 'all_modules' not in k}           # held twice
    assert weights['current_epoch'] == 20
    assert sum(v.numel() for v in own.values()) == sum(p.numel() for p in evaluate.build_segmenter('nnunet', (32, 32), 8, 3).parameters())
    split = json.loads((root / 'preprocessed/Dataset001_study/splits_final.json').read_text())
    log = next(fold.glob('training_log_*.txt')).read_text()
    assert f'{len(split[0]["train"])} training and {len(split[0]["val"])} validation cases' in log
