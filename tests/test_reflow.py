"""Pairs of noise and image, training on them, straightness."""
import argparse
import math
import shutil

import numpy as np
import pytest
import torch

import common
import train_bravo
from common import RFlow, generator


class Oracle(torch.nn.Module):
    """The velocity of data N(0, scale^2), whatever the mask."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, context=None, extra=None):
        x, t = x[:, :1].double(), t.double().reshape(-1, 1, 1, 1)
        return x * (t - (1 - t) * self.scale ** 2) / ((1 - t) ** 2 * self.scale ** 2 + t ** 2)


def test_straightness():
    """For N(0,s^2) data it is s (2 - pi/2) a pixel, 0.4292 for s = 1 (Liu 2022's flow between Gaussians); for one point, and on the coupled
    pairs of the flow itself, it is 0, and there one Euler step is exact."""
    pairs = argparse.Namespace(noise=torch.randn(64, 1, 16, 16, generator=generator('z')).double(), mask=torch.zeros(64, 1, 16, 16), level=torch.zeros(64))
    args = argparse.Namespace(p_uncond=0.0, slice_level=False, controllable=False, dtype='fp32', steps=0)
    found = train_bravo.straightness(Oracle(1.0), RFlow(), pairs, args, 'cpu', steps=1000)
    assert abs(found / float(pairs.noise.square().mean()) - (2 - math.pi / 2)) < 2e-3
    assert train_bravo.straightness(Oracle(1e-6), RFlow(), pairs, args, 'cpu') < 1e-6
    found = train_bravo.straightness(Oracle(0.5), RFlow(), pairs, args, 'cpu', steps=1000)
    assert abs(found / float(pairs.noise.square().mean()) - 0.5 * (2 - math.pi / 2)) < 2e-3

    class Coupled(torch.nn.Module):
        def forward(self, x, t, context=None, extra=None):                                  # of pairs (z, z/2): x_t = (1 + t) z / 2, v = z / 2
            return x[:, :1].double() / (1 + t.double().reshape(-1, 1, 1, 1))
    assert train_bravo.straightness(Coupled(), RFlow(), pairs, args, 'cpu') < 1e-12
    end = common.sample_euler(common.make_denoise(Coupled(), RFlow(), pairs.mask), pairs.noise, RFlow().times(1), RFlow())
    torch.testing.assert_close(end, pairs.noise / 2, rtol=0, atol=1e-6, check_dtype=False)


@pytest.fixture(scope='module')
def pairs(call, trained, phantom, tmp_path_factory):
    out = tmp_path_factory.mktemp('pairs') / 'p'
    call('sample', out, '--bravo', trained / 'bravo', '--data', phantom, '--pairs', '--n', 70, '--steps', 4, '--batch-size', 48)
    return out


def test_pairs(pairs, call, trained, phantom, tmp_path):
    """Each image follows from its own noise; shards are kept, a missing one is made again to the same bits; more join them."""
    files = sorted(f.name for f in pairs.glob('*.npz'))
    assert files == ['pairs_0000000_64.npz', 'pairs_0000064_6.npz'] and not list(pairs.glob('syn_*'))
    shard, run = np.load(pairs / files[1]), common.load_run(trained / 'bravo')
    assert shard['index'].tolist() == list(range(64, 70)) and shard['noise'].shape == shard['image'].shape == (6, 1, 16, 16)
    assert all(common.part_of(s) == 'train' for s in shard['source']) and shard['guidance'].tolist() == [[1, 0, 1, 0]] * 6
    for k, i in enumerate(shard['index']):
        assert np.array_equal(shard['noise'][k], torch.randn(1, 16, 16, generator=generator(0, 'image', int(i))).numpy())
    with torch.no_grad():
        denoise = common.make_denoise(run.net, run.process, torch.from_numpy(shard['mask']).float())
        again = common.sample_dpmpp(denoise, torch.from_numpy(shard['noise']), run.process.times(4), run.process)
    assert (again - torch.from_numpy(shard['image'])).abs().max() < 1e-4
    before = {f: (pairs / f).read_bytes() for f in files}
    stamp = (pairs / files[0]).stat().st_mtime_ns
    (pairs / files[1]).unlink()
    make = lambda n: call('sample', pairs, '--bravo', trained / 'bravo', '--data', phantom, '--pairs', '--n', n, '--steps', 4, '--batch-size', 48)
    make(70)
    assert {f: (pairs / f).read_bytes() for f in files} == before and (pairs / files[0]).stat().st_mtime_ns == stamp
    copy = tmp_path / 'more'
    shutil.copytree(pairs, copy)
    call('sample', copy, '--bravo', trained / 'bravo', '--data', phantom, '--pairs', '--n', 80, '--steps', 4, '--batch-size', 48)
    assert sorted(f.name for f in copy.glob('*.npz')) == ['pairs_0000000_64.npz', 'pairs_0000064_16.npz']


@pytest.mark.parametrize('flags', [[], ['--distill']], ids=str)
def test_reflow(pairs, call, trained, tmp_path, capsys, flags):
    """Trains on the pairs from the run that made them; the error on them falls; straightness is told before and after."""
    start = common.load_run(trained / 'bravo')
    data = train_bravo.read_pairs(pairs, 16, None)

    def error(run):
        t = torch.ones(len(data.image)) if flags else torch.linspace(0.05, 1, len(data.image))
        with torch.no_grad():
            return float(run.process.loss(run.net, data.image, data.noise, t, data.mask.float())[1].mean())

    go = lambda out, n: call('bravo', out, '--rflow', '--reflow', pairs, '--init', trained / 'bravo', '--iters', n, '--save-every', 20, '--ema-decay', 0.5, *flags)
    out = go(tmp_path / 'out', 120)
    said = capsys.readouterr().out
    assert 'straightness before' in said and 'straightness after' in said and 'training on 70 pairs' in said
    assert error(common.load_run(out)) < 0.7 * error(start)


def test_guided_pairs(pairs, call, trained, phantom, tmp_path, capsys):
    """How they were guided is kept with the pairs, and said when they are learned; solvers off the grid are named."""
    shutil.copytree(pairs, tmp_path / 'guided')
    for f in (tmp_path / 'guided').glob('*.npz'):
        shard = dict(np.load(f))
        np.savez(f, **dict(shard, guidance=np.tile(np.float32([3, 0.1, 0.8, 0.5]), (len(shard['index']), 1))))
    train_bravo.read_pairs(tmp_path / 'guided', 16, None)
    assert '--cfg 3 from 0.1 to 0.8, rescale 0.5' in capsys.readouterr().out
    train_bravo.read_pairs(pairs, 16, None)
    assert 'guided' not in capsys.readouterr().out
    gridded = call('bravo', tmp_path / 'gridded', '--rflow', '--steps', 100, '--iters', 1)
    for run, said in ((gridded, True), (trained / 'bravo', False)):                                     # the other was trained on all times
        capsys.readouterr()
        call('sample', tmp_path / f'off{said}', '--bravo', run, '--data', phantom, '--pairs', '--n', 2, '--steps', 4, '--sampler', 'dpm++2s')
        assert ('note: dpm++2s asks the network at times that it was not trained on' in capsys.readouterr().out) == said


def test_pairs_keep_their_box(pairs, call, trained, phantom, tmp_path):
    """The straightened run has the brain box that its pairs were drawn in, whatever --data says."""
    state = common.load_checkpoint(trained / 'bravo')
    torch.save(state | dict(box=[0.1, 0.1, 0.9, 0.9]), tmp_path / 'start.pt')
    out = call('bravo', tmp_path / 'out', '--rflow', '--reflow', pairs, '--init', tmp_path / 'start.pt', '--iters', 1)
    assert common.load_run(out).box == (0.1, 0.1, 0.9, 0.9) != tuple(state['box'])


def test_levels_are_those_of_the_pairs(pairs, call, tmp_path):
    """A run that is told levels keeps, for sample.py, those of the pairs that it learned from, however many more than slices they are."""
    (tmp_path / 'many').mkdir()
    for f in pairs.glob('*.npz'):
        shard = {k: np.concatenate([v] * 8) for k, v in np.load(f).items()}
        np.savez(tmp_path / 'many' / f.name, **dict(shard, level=np.full_like(shard['level'], 0.25)))
    start = call('bravo', tmp_path / 'start', '--rflow', '--slice-level', '--iters', 1)
    out = call('bravo', tmp_path / 'out', '--rflow', '--slice-level', '--reflow', tmp_path / 'many', '--init', start, '--iters', 1)
    levels = [common.load_run(run).levels for run in (start, out)]
    assert len({*levels[0]}) > 2 and {*levels[1]} == {0.25}


def test_pairs_without_a_level_are_refused(pairs, call, trained, tmp_path, capsys):
    (tmp_path / 'none').mkdir()
    for f in pairs.glob('*.npz'):
        np.savez(tmp_path / 'none' / f.name, **dict(np.load(f), level=np.full_like(np.load(f)['level'], np.nan)))
    with pytest.raises(SystemExit) as e:
        call('bravo', tmp_path / 'out', '--rflow', '--slice-level', '--reflow', tmp_path / 'none', '--init', trained / 'bravo')
    assert e.value.code == 2 and 'know no level' in capsys.readouterr().err


def test_pairs_of_no_run(pairs, call, trained, tmp_path, capsys):
    torch.save(common.load_checkpoint(trained / 'bravo')['net'], tmp_path / 'state.pt')
    with pytest.raises(SystemExit) as e:
        call('bravo', tmp_path / 'out', '--rflow', '--reflow', pairs, '--init', tmp_path / 'state.pt', '--init-target', 'v')
    assert e.value.code == 2 and 'state.pt: is not a run' in capsys.readouterr().err


def test_patients_held_back_stay_out(pairs, call, trained, phantom, tmp_path, capsys):
    bad = call('sample', tmp_path / 'bad', '--bravo', trained / 'bravo', '--data', phantom, '--part', 'test', '--pairs', '--n', 3, '--steps', 2)
    for flags, words in ((['--reflow', bad, '--init', trained / 'bravo', '--rflow'], 'test part'), (['--reflow', pairs, '--rflow'], '--init'),
                         (['--reflow', pairs, '--init', trained / 'bravo'], '--rflow'), (['--distill', '--rflow'], '--reflow'),
                         (['--reflow', pairs, '--init', trained / 'bravo', '--rflow', '--prune', 0.3], '--prune'),
                         (['--reflow', pairs, '--init', trained / 'bravo', '--rflow', '--distill', '--min-snr', 5], '--min-snr'),
                         (['--reflow', tmp_path, '--init', trained / 'bravo', '--rflow'], '--pairs'),
                         (['--reflow', pairs, '--init', trained / 'bravo', '--rflow', '--augment'], '--augment'),
                         (['--reflow', pairs, '--init', trained / 'bravo', '--rflow', '--size', 32], '16 pixels')):
        with pytest.raises(SystemExit) as e:
            call('bravo', tmp_path / 'out', *flags)
        assert e.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call('sample', tmp_path / 'noisy', '--bravo', trained / 'bravo', '--data', phantom, '--pairs', '--sampler', 'ddpm')
