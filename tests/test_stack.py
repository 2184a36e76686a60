"""Volumes from slices (--neighbours, --stack, coherence), Monte-Carlo draws and uncertainty, attention maps."""
import csv
import json
import math

import numpy as np
import pytest
import torch

import analysis
import common
import evaluate
import sample
import train_bravo
from common import generator, read_nifti
from test_errors import refused


@pytest.fixture(scope='module')
def runs(call, tmp_path_factory):
    """Tiny runs: plain (with guidance), near (two neighbours), and a set of volumes of each."""
    root = tmp_path_factory.mktemp('runs')
    call('bravo', root / 'plain', '--rflow', '--lr', 0.01, '--p-uncond', 0.2)
    call('bravo', root / 'near', '--rflow', '--lr', 0.01, '--p-uncond', 0.2, '--neighbours', 2, '--augment')
    return root


def volume_of(folder, name='bravo'):
    return read_nifti(folder / f'{name}.nii.gz')


# -- neighbours ---------------------------------------------------------------------------------------------------------


def test_below():
    """Nearest first, never out of the folder, never from above."""
    table = [dict(root='a', folder=f) for f in 'xxxxyyz'] + [dict(root='b', folder='z')]
    assert train_bravo.below(table, 2).tolist() == [[-1, -1], [0, -1], [1, 0], [2, 1], [-1, -1], [4, -1], [-1, -1], [-1, -1]]
    assert train_bravo.below(table, 0).shape == (8, 0)


def test_worn():
    """A fifth has no neighbours; the others have noise of the told deviation; what has none keeps none."""
    g, near = generator('worn'), torch.ones(4000, 2, 3, 3)
    near[:10, 1] = 0
    out = train_bravo.worn(near, torch.rand(4000, 2, generator=g), torch.randn(near.shape, generator=g))
    assert (out[:10, 1] == 0).all() and abs(float((out[10:] == 0).all((1, 2, 3)).float().mean()) - 0.2) < 0.02
    u = torch.tensor([[0.5, 0.25], [0.19, 1.0]])
    assert torch.equal(train_bravo.worn(torch.ones(2, 1, 2, 2), u, 2 * torch.ones(2, 1, 2, 2)), torch.tensor([1.1, 0.0])[:, None, None, None].expand(2, 1, 2, 2))


def test_neighbours_reach_the_network(runs, phantom, cache, monkeypatch):
    """Training shows slice z the slices z-1 and z-2 of its patient, and without augmentation and wear to the bit."""
    seen, loss = [], common.Process.loss
    monkeypatch.setattr(common.Process, 'loss', lambda self, net, x_0, eps, t, mask=None, *a, **k: (seen.append((x_0, mask)), loss(self, net, x_0, eps, t, mask, *a, **k))[1])
    monkeypatch.setattr(train_bravo, 'worn', lambda near, u, noise: near)
    flags = ['--preset', 'tiny', '--dtype', 'fp32', '--rflow', '--iters', 2, '--neighbours', 2, '--p-uncond', 0.1, '--sample-every', 100, '--data', phantom, '--cache', cache]
    train_bravo.main(train_bravo.get_args([*map(str, flags), '--out', str(runs / 'seen')]))
    data = common.load_slices([phantom], 16, cache=cache)
    for x_0, given in seen:
        assert given.shape[1] == 4                                                           # mask, mask-present, two neighbours
        for x, near in zip(x_0, given[:, 2:]):
            i = next(i for i, a in enumerate(data.images) if np.array_equal(a, x.numpy()))
            for k in (1, 2):
                there = data.table[i - k]['folder'] == data.table[i]['folder'] and i >= k
                assert np.array_equal(near[k - 1], data.images[i - k][0] if there else np.zeros((16, 16)))


def test_init_without_neighbours(runs, call, tmp_path, capsys):
    """--init gives neighbours and the slice level to a run without: at first they change nothing; channels of another meaning are refused."""
    call('bravo', tmp_path / 'more', '--rflow', '--p-uncond', 0.2, '--neighbours', 2, '--slice-level', '--init', runs / 'plain', '--iters', 0)
    old, new = (common.load_run(p) for p in (runs / 'plain', tmp_path / 'more'))
    x = torch.randn(2, 3, 16, 16, generator=generator(0))
    far = torch.cat([x, 9 * torch.randn(2, 2, 16, 16, generator=generator(1))], 1)
    with torch.no_grad():
        assert torch.allclose(old.net(x, torch.tensor([0.3, 0.9])), new.net(far, torch.tensor([0.3, 0.9]), None, torch.rand(2, 1)), atol=1e-6)
    refused(capsys, ['--init', 'p_uncond', 'neighbours'], call, 'bravo', tmp_path / 'x', '--rflow', '--neighbours', 1, '--init', runs / 'plain', '--iters', 0)
    refused(capsys, ['--init', 'p_uncond', 'neighbours'], call, 'bravo', tmp_path / 'y', '--rflow', '--p-uncond', 0.1, '--init', runs / 'near', '--iters', 0)


# -- stacks -------------------------------------------------------------------------------------------------------------


def test_noise_along_z():
    """corr(e_i, e_j) = rho^|i-j|, every e_i is N(0,1); rho 1 gives one noise, rho 0 fresh ones."""
    for rho in (0.0, 0.3, 0.7, 0.95):
        e = torch.stack([sample.along(rho, [torch.randn(64, 64, generator=generator('z', k)) for k in range(z + 1)]) for z in range(20)])
        c = torch.corrcoef(e.flatten(1))
        want = rho ** (torch.arange(20)[:, None] - torch.arange(20)).abs().float()
        assert (c - want).abs().max() < 0.06 and abs(float(e.square().mean()) - 1) < 0.03
        for k in (1, 2, 3):
            assert abs(float((c - want).diagonal(k).mean())) < 0.02
    n = [torch.randn(4, generator=generator(k)) for k in range(3)]
    assert torch.equal(sample.along(1.0, n), n[0]) and torch.equal(sample.along(0.0, n), n[2])


@pytest.fixture(scope='module')
def stack(call, runs, phantom, tmp_path_factory):
    def make(run, *flags):
        return call('sample', tmp_path_factory.mktemp('stack') / 's', '--data', phantom, '--part', 'test', '--bravo', runs / run, '--stack', '--steps', 3, *flags)
    return make


def test_stacks(stack, phantom):
    """A volume for each test patient: its masks in order, its spacing, whose it is; any batch size and number gives the same images."""
    out = stack('plain', '--rho', 0.7)
    rows = list(csv.DictReader(open(out / 'manifest.csv', newline='')))
    tests = sorted(f.name for f in phantom.iterdir() if common.part_of(f.name) == 'test')
    assert [r['source_patient'] for r in rows] == tests and (out / 'grid.png').stat().st_size > 1000
    data = common.load_slices([phantom], 16, cache=out.parent / 'c')
    for r in rows:
        volume, spacing = volume_of(out / r['folder'])
        mask = np.stack([data.masks[i, 0] for i, t in enumerate(data.table) if t['patient'] == r['source_patient']])
        assert volume.shape == mask.shape and np.array_equal(volume_of(out / r['folder'], 'seg')[0], mask) and np.abs(volume).max() <= 1
        assert spacing[0] == pytest.approx(read_nifti(phantom / r['source_patient'] / 'seg.nii.gz')[1][0]) and int(r['tumour_pixels']) == mask.sum()
    again = stack('plain', '--rho', 0.7, '--batch-size', 2, '--n', 2)
    for r in rows[:2]:
        assert np.abs(volume_of(out / r['folder'])[0] - volume_of(again / r['folder'])[0]).max() < 1e-4
    assert common.load_slices([out], 16, cache=out.parent / 'c', training=False).table[1]['level'] == 0.5
    run = sample.argparse.Namespace(args=sample.argparse.Namespace(size=16, volume=None))
    back = sample.Masks(sample.argparse.Namespace(data=None, masks=str(out), seg=None, stack=True, per_patient=None, n=0, slice_level=None), run, ('bravo',), False)
    assert [len(g) for g in back.groups] == [3] * 5 and back.groups[0][0][4][0] == pytest.approx(8, rel=1e-4)


def test_neighbours_are_drawn_in_order(stack, runs, call, monkeypatch):
    """A run of --neighbours sees the slices that were just drawn, nearest first; its batches and numbers change nothing."""
    seen, one = [], sample.draw
    monkeypatch.setattr(sample, 'draw', lambda run, args, keys, *a, near=None, **k: (seen.append((keys, near)), one(run, args, keys, *a, near=near, **k))[1])
    out = stack('near', '--rho', 0.5, '--cfg', 2)
    first = volume_of(out / 'syn_0_000000')[0]
    for z, (keys, near) in enumerate(seen):
        assert len(keys) == 5 and keys[0] == [(0, 'slice', y) for y in range(z + 1)] and near.shape == (5, 2, 16, 16)
        for k in (1, 2):
            assert np.array_equal(near[0, k - 1], first[z - k] if z >= k else np.zeros((16, 16)))
    alone = stack('near', '--rho', 0.5, '--cfg', 2, '--batch-size', 1, '--n', 1)
    assert np.abs(first - volume_of(alone / 'syn_0_000000')[0]).max() < 1e-4
    other = stack('near', '--rho', 0.5)
    assert np.abs(first - volume_of(other / 'syn_0_000000')[0]).max() > 1e-3


def test_frozen_noise_is_one_slice(stack, monkeypatch):
    """rho 1, one mask throughout and a solver without or with fresh noise: all slices are the same image."""
    init = sample.Masks.__init__

    def same(self, *a):
        init(self, *a)
        self.groups = [[(g[0][0], *item[1:]) for item in g] for g in self.groups]

    monkeypatch.setattr(sample.Masks, '__init__', same)
    for flags in ([], ['--sampler', 'dpm++sde']):
        volume = volume_of(stack('plain', '--rho', 1, '--n', 1, *flags) / 'syn_0_000000')[0]
        assert np.abs(volume - volume[:1]).max() < 1e-5
    volume = volume_of(stack('plain', '--n', 1) / 'syn_0_000000')[0]
    assert np.abs(volume - volume[:1]).max() > 0.01


# -- coherence ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def smooth():
    """Ten smooth heads (12 slices of 32 x 32) with a lesion each."""
    z, y, x = np.mgrid[:12, :32, :32].astype(np.float32)
    out = []
    for k in range(10):
        texture = common.smooth_noise((12, 32, 32), (3, 6, 6), generator('coherent', k)).numpy()
        head = np.hypot(y - 15.5, x - 15.5) < 13 - 0.05 * (z - 5) ** 2
        mask = np.hypot(np.hypot(y - 12 - k % 3, x - 14), 2 * (z - 6)) < 4.5
        out.append((np.where(head, np.clip(0.2 * texture + 0.4 * mask, -0.9, 1), -1).astype(np.float32), mask.astype(np.uint8)))
    return out


def test_stack_measures(smooth):
    """Shuffled slices fit together less, repeated slices more; masks have the extent and overlap of their shapes."""
    for k, (volume, mask) in enumerate(smooth):
        real = evaluate.stack_measures(volume, mask)
        order = torch.randperm(12, generator=generator('shuffle', k)).numpy()
        mixed, frozen = evaluate.stack_measures(volume[order], mask[order]), evaluate.stack_measures(volume[[5] * 12], mask[[6] * 12])
        for name in ('adjacent SSIM', 'correlation, 1 slice apart', 'mask IoU of neighbours'):
            assert mixed[name] < real[name] < frozen[name] + 1e-6 and frozen[name] == pytest.approx(1, abs=1e-5), name
        for name in ('z gradient / in-plane', 'power above 1/4 cycle a slice', 'jitter of head area'):
            assert mixed[name] > real[name], name
        assert frozen['z gradient / in-plane'] == frozen['jitter of head area'] == 0 and math.isnan(frozen['power above 1/4 cycle a slice'])
        assert real['lesion extent, slices'] == np.ptp(np.nonzero(mask)[0]) + 1
        assert math.isnan(evaluate.stack_measures(volume, 0 * mask)['mask IoU of neighbours'])


def test_z_spectrum():
    """A wave of 3 cycles in 12 slices has its power there."""
    z = np.arange(12)[:, None, None]
    volume = np.cos(2 * np.pi * 3 * z / 12) * np.ones((1, 8, 8))
    power = evaluate.z_spectrum(volume, np.ones(volume.shape, bool))
    assert power.argmax() == 2 and power[1:4].sum() > 0.98 and power.sum() == pytest.approx(1)


def test_coherence(smooth, tmp_path, capsys):
    """The real set itself has ratio 1 everywhere; shuffled slices do not, beyond the interval; single slices are refused."""
    root = tmp_path / 'real'
    for k, (volume, mask) in enumerate(smooth):
        common.write_patient(root / f'p{k}', {'bravo': volume}, mask, (5.0, 2.0, 2.0))
    (tmp_path / 'split.csv').write_text('patient,part\n' + ''.join(f'p{k},{"train" if k < 4 else "test"}\n' for k in range(10)))
    data = common.load_slices([root], 32, box=(0.0, 0.0, 1.0, 1.0), split=tmp_path / 'split.csv', cache=tmp_path / 'c')
    for name, order in (('same', list(range(12))), ('mixed', [7, 0, 9, 3, 11, 5, 1, 8, 2, 10, 4, 6])):
        fake = tmp_path / name
        for k in range(4, 10):
            rows = np.array([i for i, r in enumerate(data.table) if r['folder'] == f'p{k}'])
            common.write_patient(fake / f'syn_{k}', {'bravo': data.images[rows][order[:len(rows)] if len(rows) == 12 else range(len(rows)), 0]}, data.masks[rows, 0], (5.0, 2.0, 2.0))
        common.write_csv(fake / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_{k}', f'p{k}'] for k in range(4, 10)])
        (fake / 'sample.json').write_text(json.dumps(dict(bravo='x', pixels=32, box=[0.0, 0.0, 1.0, 1.0], stack=True, rho=None)))
        flags = ['coherence', '--fake', fake, '--data', root, '--split', tmp_path / 'split.csv', '--cache', tmp_path / 'c', '--repeats', 40, '--out', tmp_path / f'out_{name}']
        evaluate.main(evaluate.get_args([*map(str, flags)]))
        told = json.loads((tmp_path / f'out_{name}/metrics.json').read_text())
        assert told['paired'] and told['stacks'] == dict(fake=6, train=4, test=6) and (tmp_path / f'out_{name}/coronal.png').stat().st_size > 1000
        for measure, v in told['metrics'].items():
            if name == 'same':
                assert v['fake'] == v['fake_low'] == v['fake_high'] == 1, measure
        if name == 'mixed':
            assert told['metrics']['correlation, 1 slice apart']['fake_high'] < 0.9 and told['metrics']['z gradient / in-plane']['fake_low'] > 1.3
            assert told['metrics']['lesion extent, slices']['fake'] == 1                                  # the masks were not shuffled
    (fake / 'sample.json').write_text(json.dumps(dict(bravo='x', pixels=32, box=[0, 0, 1, 1])))
    refused(capsys, ['--fake', '--stack'], evaluate.main, evaluate.get_args([*map(str, flags)]))


# -- Monte-Carlo draws, uncertainty -------------------------------------------------------------------------------------


def test_mc(call, runs, phantom, tmp_path):
    """--mc writes mean and deviation of K draws, the first of which is what is drawn without it."""
    flags = ['--data', phantom, '--part', 'test', '--bravo', runs / 'plain', '--steps', 3, '--n', 3]
    plain, mc = call('sample', tmp_path / 'plain', *flags), call('sample', tmp_path / 'mc', *flags, '--mc', 4)
    run, args = common.load_run(runs / 'plain'), sample.get_args([*map(str, flags), '--dtype', 'fp32', '--out', str(tmp_path / 'no')])
    run.model = run.net
    for k in range(3):
        a, b, mean, std = (volume_of(f / f'syn_0_{k:06d}', n)[0][0] for f, n in ((plain, 'bravo'), (mc, 'bravo'), (mc, 'bravo_mean'), (mc, 'bravo_std')))
        mask = torch.tensor(volume_of(mc / f'syn_0_{k:06d}', 'seg')[0][:1].copy())[None]
        with torch.no_grad():
            x = np.stack([sample.draw(run, args, [(k, c) if c else (k,)], 'image', 3, mask, torch.tensor([0.5]))[0, 0].clamp(-1, 1).numpy() for c in range(4)]).astype(np.float64)
        assert np.array_equal(a, b) and np.allclose(mean, x.mean(0), atol=1e-5) and np.allclose(std, x.std(0, ddof=1), atol=1e-5)
    assert (mc / 'mc.png').stat().st_size > 1000 and common.load_slices([mc], 16, cache=tmp_path / 'c', training=False).images.shape[1] == 1


def test_decompose():
    """Known variances come back; equal models have no epistemic part; the sum of squares is split exactly; members may change places."""
    g = np.random.default_rng(0)
    x = 2 * g.standard_normal((500, 1, 8)) + g.standard_normal((500, 10, 8))
    aleatoric, epistemic = analysis.decompose(x)
    assert abs(aleatoric.mean() - 1) < 0.07 and abs(epistemic.mean() - 4) < 0.8
    assert abs(x.reshape(5000, -1).var(0).mean() / (aleatoric + epistemic).mean() - 1) < 0.01
    a, e = analysis.decompose(g.standard_normal((40, 10, 2000)))
    assert abs(e.mean()) < 0.002 and (e < 0).any()                                              # unbiased, so not clipped
    assert all((v == 0).all() for v in analysis.decompose(np.ones((3, 4, 5))))
    M, K = x.shape[:2]
    assert np.allclose(x.reshape(M * K, -1).var(0), aleatoric * (K - 1) / K + (epistemic + aleatoric / K) * (M - 1) / M, rtol=1e-12)
    again = analysis.decompose(x[g.permutation(M)][:, g.permutation(K)])
    assert np.allclose(again[0], aleatoric) and np.allclose(again[1], epistemic)
    assert np.isnan(analysis.decompose(x[:1])[1]).all()
    with pytest.raises(AssertionError):
        analysis.decompose(x[:, :1])


def look(command, *flags):
    analysis.main(analysis.get_args([command, *map(str, flags)]))


def test_uncertainty(runs, trained, phantom, cache, tmp_path, capsys):
    """Two models and several numbers of steps; one model says that it has no epistemic term; finished draws are not made again."""
    flags = ['--data', phantom, '--cache', cache, '--n', 3, '--seeds', 3, '--device', 'cpu', '--out', tmp_path / 'u']
    look('uncertainty', runs / 'plain', trained / 'bravo', *flags, '--steps', '2,4')
    told = json.loads((tmp_path / 'u/uncertainty.json').read_text())
    draws = {f.name: np.load(f) for f in (tmp_path / 'u').glob('draws_*.npy')}
    assert len(draws) == 4 and len(told['by_steps']) == 2 and all(v.shape == (3, 3, 16, 16) for v in draws.values())
    assert all(math.isfinite(v) for r in told['by_steps'] for k, v in r.items() if k != 'steps') and (tmp_path / 'u/uncertainty.png').exists()
    rows = common.read_csv(tmp_path / 'u/uncertainty.csv')
    assert {r['place'] for r in rows} == {'tumour', 'rest of head', *(f'intensity, fifth {k}' for k in range(1, 6))}
    file = next((tmp_path / 'u').glob('draws_*.npy'))
    before = file.stat().st_mtime_ns
    look('uncertainty', runs / 'plain', trained / 'bravo', *flags, '--steps', '2,4')
    assert file.stat().st_mtime_ns == before
    capsys.readouterr()
    look('uncertainty', runs / 'near', *flags)
    assert 'no epistemic term' in capsys.readouterr().out
    assert all(r['epistemic variance'] == 'nan' for r in common.read_csv(tmp_path / 'u/uncertainty.csv'))
    refused(capsys, ['same network'], look, 'uncertainty', runs / 'plain', runs / 'plain', *flags)
    refused(capsys, ['train_seg.py'], look, 'uncertainty', trained / 'seg', *flags)
    refused(capsys, ['--n 99', 'tumour'], look, 'uncertainty', runs / 'plain', *flags, '--n', 99)


# -- attention ----------------------------------------------------------------------------------------------------------


def test_attention_rows():
    """A V is what the network computes; rows sum to 1; hidden keys get nothing; a part of the rows is that part."""
    q, k, v = torch.randn(3, 2, 4, 30, 8, generator=generator('qkv'))
    A = torch.stack([analysis.attention_rows(a, b) for a, b in zip(q, k)])
    assert (A @ v - common.attention(q, k, v)).abs().max() < 1e-5 and (A.sum(-1) - 1).abs().max() < 1e-6
    open_ = torch.arange(30) < 20
    A = torch.stack([analysis.attention_rows(a, b, open_) for a, b in zip(q, k)])
    assert (A @ v - common.attention(q, k, v, open_.expand(2, 1, 1, 30))).abs().max() < 1e-5 and (A[..., 20:] == 0).all()
    assert torch.allclose(analysis.attention_rows(q[0], k[0], None, torch.tensor([3, 7])), analysis.attention_rows(q[0], k[0])[:, [3, 7]], atol=1e-6)


def test_looks():
    """No preference is chance exactly, a block is all of it, and the map is told from its region."""
    region, mirror = np.zeros(64, bool), np.zeros(64, bool)
    region[3:11], mirror[40:48] = True, True
    even = analysis.attention_rows(torch.zeros(2, 64, 4), torch.randn(2, 64, 4)).mean(0).numpy()
    seen = analysis.looks(even, region, mirror, 0, 64, 64)
    assert seen['lift'] == seen['mirror'] == seen['elsewhere'] == 1 and seen['auroc'] == 0.5
    block = np.zeros((64, 64), np.float32)
    block[np.ix_(region, region)] = block[np.ix_(~region, ~region)] = 1
    block /= block.sum(1, keepdims=True)
    seen = analysis.looks(block, region, mirror, 0, 64, 64)
    assert seen['lift'] == pytest.approx(64 / 8) and seen['elsewhere'] == 0 and seen['auroc'] == 1        # a mass of 1
    tokens = np.zeros((64, 11), np.float32)
    tokens[region, 1], tokens[~region, 0] = 1, 1
    seen = analysis.looks(tokens, region, mirror, 0, 11, 3, np.isin(np.arange(11), (1, 2)))
    assert seen['lift'] == pytest.approx(1.5) and seen['elsewhere'] == 0 and seen['auroc'] == 1


@pytest.mark.parametrize('model', ['unet', 'dit', 'mmdit', 'controllable'])
def test_watching_changes_nothing(model):
    """Outputs are the same bits while watched; every attention is named once a forward; nothing is left behind."""
    torch.manual_seed(0)
    net = {'unet': lambda: common.UNet(2, 1, (8, 8), (1, 1), head_channels=4, norm_groups=2), 'dit': lambda: common.Tokens(2, 1, 4, 16, 2, 2),
           'mmdit': lambda: common.MMDiT(2, 1, 4, 16, 2, 2), 'controllable': lambda: common.UNet(1, 1, (8, 8), (0, 1), context_dim=common.TOKEN, norm_groups=2)}[model]()
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    x, context = torch.randn(2, 1 if model == 'controllable' else 2, 16, 16), common.lesion_tokens([np.array([[0.2, 0.5, 0.5]])] * 2) if model == 'controllable' else None
    names, t = [], torch.tensor([0.5, 0.2])
    with torch.no_grad():
        plain = net(x, t, context)
        with analysis.watching(net, lambda name, q, k, mask: names.append((name, q.shape, k.shape))):
            watched = net(x, t, context)
        assert torch.equal(plain, watched) and torch.equal(plain, net(x, t, context)) and not common.WATCHERS
    assert len({n for n, *_ in names}) == len(names) == {'unet': 7, 'dit': 2, 'mmdit': 2, 'controllable': 8}[model]
    if model == 'controllable':
        assert sorted({s[2][2] for s in names}) == [11, 64]


@pytest.mark.parametrize('kind', ['plain', 'near', 'mmdit', 'seg'])
def test_attention_command(kind, runs, call, phantom, cache, tmp_path, capsys):
    """A figure, a table, and for image models what happens to x0_hat without the mask."""
    run = runs / kind
    if kind == 'mmdit':
        run = call('bravo', tmp_path / 'run', '--rflow', '--model', 'mmdit', '--lr', 0.01, '--p-uncond', 0.2)
    if kind == 'seg':
        run = call('seg', tmp_path / 'run', '--rflow', '--controllable', '--lr', 0.01)
    look('attention', run, '--data', phantom, '--cache', cache, '--n', 4, '--times', '.8,.4', '--device', 'cpu', '--out', tmp_path / 'a')
    told, rows = json.loads((tmp_path / 'a/attention.json').read_text()), common.read_csv(tmp_path / 'a/attention.csv')
    assert {r['to'] for r in rows} == {'mmdit': {'mask', 'image'}, 'seg': {'image', 'requests'}}.get(kind, {'image'}) and {r['t'] for r in rows} == {'0.8', '0.4'}
    assert all(0 <= float(r['AUROC']) <= 1 and float(r['lift']) >= 0 for r in rows) and (tmp_path / 'a/attention.png').stat().st_size > 1000
    assert ('mask removed' in told) == (kind != 'seg')


def test_refusals(runs, trained, call, detector, phantom, tmp_path, capsys):
    out, stack = tmp_path / 'x', ['--data', phantom, '--bravo', runs / 'plain', '--stack']
    for flags, words in (([*stack, '--mc', 3], '--stack --mc'), ([*stack, '--save-at', '1,0'], '--stack --save-at'), ([*stack, '--per-patient', 2], '--stack --per-patient'),
                         (['--seg', trained / 'seg', '--bravo', runs / 'plain', '--stack'], '--stack --seg'), ([*stack[:-1], '--rho', 0.5], '--rho 0.5 --stack'),
                         ([*stack, '--rho', 1.5], "--rho '1.5' at most 1"), ([*stack[:-1], '--mc', 1], "--mc '1' at least 2"),
                         (['--seg', trained / 'seg', '--mc', 3], '--mc 3 --bravo'), ([*stack[:-1], '--mc', 3, '--pairs'], '--mc --pairs')):
        refused(capsys, words.split(), call, 'sample', out, *flags)
    single = tmp_path / 'single'
    common.write_patient(single / 'a', {'bravo': np.ones((16, 16), np.float32)}, np.ones((16, 16)), (1.0, 1.0))
    refused(capsys, ['--stack', 'single'], call, 'sample', out, '--masks', single, '--bravo', runs / 'plain', '--stack')
    assert not out.exists() or not any(f.is_dir() for f in out.iterdir())
    for flags, words in ((['--neighbours', 1, '--wavelet', '--rflow'], '--neighbours --wavelet'), (['--neighbours', 1, '--model', 'mmdit'], '--neighbours mmdit'),
                         (['--neighbours', 9], "--neighbours '9' at most 8"), (['--neighbours', 1, '--vae', 2], '--neighbours autoencoder')):
        refused(capsys, words.split(), call, 'bravo', out, *flags)
    refused(capsys, ["--seeds: '1'", 'at least 2'], look, 'uncertainty', runs / 'plain', '--data', phantom, '--seeds', 1)
    refused(capsys, ['--bravo', '--neighbours'], call, 'draft', out, '--bravo', runs / 'near', '--reward', detector())
    refused(capsys, ['none', 'no such run'], look, 'uncertainty', tmp_path / 'none', '--data', phantom)
