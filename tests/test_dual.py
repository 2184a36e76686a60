"""Pairs made jointly: what a run of --dual leaves, and enhancement, agreement and shift of pairs whose answer is known."""
import argparse
import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import common
import draft
import evaluate
from common import head_mask, load_run, load_slices, read_csv, read_nifti, write_csv, write_patient
from evaluate import around, enhancement, gradient_correlation, nmi_of, shift_of
from test_errors import refused


def brain(size=64, seed=0):
    """A disc of smooth tissue on black, as an image (S,S) in [-1,1], and a tumour of 81 pixels in it."""
    g = torch.Generator().manual_seed(seed)
    y, x = np.mgrid[:size, :size] - size / 2
    tissue = 0.2 * common.smooth_noise((1, size, size), (1, 8, 8), g)[0].numpy()
    image = np.where(np.hypot(y, x) < 0.45 * size, -0.2 + tissue, -1).astype(np.float32)
    mask = np.zeros((size, size), np.uint8)
    mask[24:33, 30:39] = 1
    return image, mask


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_enhancement_of_a_known_pair():
    """post = pre + .3 mask: .3 inside, 0 outside and in the ring, AUC 1, agreement 1 outside; another scale of post is a background shift and nothing else."""
    pre, mask = brain()
    E, rest, m = enhancement(pre, pre + np.float32(0.3) * mask, mask)
    assert m['E in tumour'] == pytest.approx(0.3, abs=1e-6) and m['E in a ring of 3 pixels'] == m['E outside'] == m['background shift'] == 0
    assert m['AUC of E, tumour against head'] == 1 and m['sd of E outside'] == 0 and m['CNR'] > 1e4 and m['shift, pixels'] == 0
    assert m['gradient correlation'] == pytest.approx(1, abs=1e-9) and m['NMI'] == pytest.approx(2, abs=1e-9)
    assert np.allclose(E, 0.3 * mask, atol=1e-6) and rest.sum() == head_mask(pre[None])[0].sum() - 15 ** 2
    moved = enhancement(pre, pre + np.float32(0.3) * mask + np.float32(0.05), mask)[2]
    assert moved['background shift'] == pytest.approx(0.05, abs=1e-6) and moved['E in tumour'] == pytest.approx(0.3, abs=1e-6) and abs(moved['E outside']) < 1e-6
    rim = around(mask, 1) & ~(mask > 0)                                                # 40 of the ring's 15^2 - 9^2 pixels
    assert enhancement(pre, pre + np.float32(0.3) * rim, mask)[2]['E in a ring of 3 pixels'] == pytest.approx(0.3 * 40 / 144, abs=1e-6)
    assert enhancement(pre, pre, mask)[2]['AUC of E, tumour against head'] == 0.5
    assert enhancement(pre, pre, 0 * mask)[2] == {} and enhancement(pre, pre, 0 * mask + 1)[2] == {}


def test_noise_of_a_difference():
    """sd(E) = sqrt(s1^2 + s2^2 - 2 rho s1 s2), and CNR = .3 / sd."""
    pre, mask = brain(256)
    a, b = np.random.default_rng(0).standard_normal((2, 256, 256))
    for s1, s2, rho in ((0.02, 0.03, 0.0), (0.02, 0.03, 0.5), (0.02, 0.02, -0.8)):
        noisy = pre + s1 * a, pre + 0.3 * mask + s2 * (rho * a + math.sqrt(1 - rho ** 2) * b)
        m, sd = enhancement(*noisy, mask)[2], math.sqrt(s1 ** 2 + s2 ** 2 - 2 * rho * s1 * s2)
        assert m['sd of E outside'] == pytest.approx(sd, rel=0.02) and m['CNR'] == pytest.approx(0.3 / sd, abs=4 / 9 + 0.02 * 0.3 / sd)
        assert m['E in tumour'] == pytest.approx(0.3, abs=4 * sd / 9) and abs(m['E outside']) < 1e-3


def test_agreement():
    """Gradient correlation is 1 for a x + b, a > 0, and -1 for a < 0; NMI is 2 of equal images, as many of a bijection of the bins, and 1 of independent ones."""
    x = np.random.default_rng(0).random((64, 64)) * 2 - 1
    where = np.ones((64, 64), bool)
    assert [gradient_correlation(x, y, where) for y in (x, 0.3 * x + 0.2)] == pytest.approx([1, 1], abs=1e-12)
    assert gradient_correlation(x, -0.3 * x + 0.2, where) == pytest.approx(-1, abs=1e-12)
    assert abs(gradient_correlation(x, np.random.default_rng(1).random((64, 64)), where)) < 0.05 and gradient_correlation(x, 0 * x, where) == 0
    assert nmi_of(x.ravel(), x.ravel()) == pytest.approx(2, abs=1e-12) == nmi_of(x.ravel(), -x.ravel()) and nmi_of(np.zeros(9), np.zeros(9)) == 2
    a, b = np.random.default_rng(2).random((2, 10 ** 6)) * 2 - 1
    assert nmi_of(a, b) == pytest.approx(1, abs=1e-3) and nmi_of(a, b) > 1
    four = np.repeat([-0.9, -0.9, 0.9, 0.9], 5), np.repeat([-0.9, 0.9, 0.9, 0.9], 5)         # joint 1/4, 1/4, 1/2: by hand
    H = lambda *p: -sum(q * math.log(q) for q in p)
    assert nmi_of(*four) == pytest.approx((H(0.5, 0.5) + H(0.25, 0.75)) / H(0.25, 0.25, 0.5), abs=1e-12)


def test_shift():
    image = brain()[0]
    for dy, dx in ((0, 0), (2, 0), (0, -2), (5, 3), (-1, -1)):
        assert shift_of(image, np.roll(image, (dy, dx), (0, 1))) == (dy, dx)
        assert shift_of(image, 0.5 * np.roll(image, (dy, dx), (0, 1)) + 0.1) == (dy, dx)
    assert enhancement(image, np.roll(image, 2, 0), brain()[1])[2]['shift, pixels'] == 2


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(call, tmp_path_factory):
    root = tmp_path_factory.mktemp('dual')
    return call('bravo', root / 'run', '--rflow', '--dual', 't1_pre,bravo', '--p-uncond', 0.1, '--fft', 0.1), root


def test_a_pair_is_trained_and_sampled_jointly(runs, call, phantom, cache):
    """Two channels on one scale, noise of the first is not that of the second, both files in the layout, the same whatever the batch; a gate would look at bravo."""
    run, root = runs
    r = load_run(run)
    assert (r.net.conv_in.weight.shape[1], r.process.space.channels, r.process.space.shape(16), r.args.dual) == (4, 2, (2, 16, 16), ['t1_pre', 'bravo'])
    data = load_slices([phantom], 16, ('t1_pre', 'bravo'), cache=cache)
    patient = common.find_patients([phantom], ('t1_pre', 'bravo', 'seg'))[0]
    images = common.read_patient(patient)[0]
    joint = common.normalise(images, head_mask(images[0]))
    assert data.images.shape[1:] == (2, 16, 16) and np.allclose((joint[1] - joint[0])[abs(joint).max(0) < 1], 2 * (images[1] - images[0])[abs(joint).max(0) < 1] / np.subtract(
        *np.percentile(images[:, head_mask(images[0])], (99.9, 0.5))), atol=1e-5)
    one = call('sample', root / 'one', '--bravo', run, '--data', phantom, '--n', 5, '--steps', 2, '--batch-size', 2, '--save-at', '1,0', '--cfg', 2)
    two = call('sample', root / 'two', '--bravo', run, '--data', phantom, '--n', 5, '--steps', 2, '--batch-size', 5, '--save-at', '1,0', '--cfg', 2)
    for f in sorted(one.glob('syn_*')):
        pair = [[read_nifti(s / f.name / f'{n}.nii.gz')[0][0] for n in ('t1_pre', 'bravo')] for s in (one, two)]
        assert np.allclose(*pair, atol=1e-4) and abs(np.corrcoef(pair[0][0].ravel(), pair[0][1].ravel())[0, 1]) < 0.9
        assert (np.load(f / 'trajectory.npz')['x0_hat'][-1] == pair[0][1]).all()
    assert json.loads((one / 'sample.json').read_text())['dual'] == ['t1_pre', 'bravo']
    made = load_slices([one], 16, ('t1_pre', 'bravo'), cache=cache, training=False)
    assert made.images.shape == (5, 2, 16, 16)
    call('bravo', run, '--rflow', '--dual', 't1_pre,bravo', '--p-uncond', 0.1, '--fft', 0.1)                       # complete: nothing to do


def test_wavelets_and_reflow_of_pairs(runs, call, phantom):
    """Haar bands of both images, 8 channels; pairs of noise and image for reflow."""
    run, root = runs
    bands = call('bravo', root / 'bands', '--rflow', '--dual', 'bravo,t1_pre', '--wavelet', '--channels', '8,8', '--attention', '0,0', '--iters', 1)
    space = load_run(bands).process.space
    x = torch.rand(3, 2, 16, 16)
    assert space.shape(16) == (8, 8, 8) and torch.allclose(space.decode(space.encode(x)), x, atol=1e-5)
    made = call('sample', root / 'made', '--bravo', bands, '--data', phantom, '--n', 1, '--steps', 1)
    assert (made / 'syn_0_000000/t1_pre.nii.gz').exists() and not (made / 'syn_0_000000/t1_gd.nii.gz').exists()
    pairs = call('sample', root / 'pairs', '--bravo', run, '--data', phantom, '--n', 4, '--steps', 1, '--pairs')
    assert np.load(next(pairs.glob('*.npz')))['image'].shape == (4, 2, 16, 16)
    call('bravo', root / 'straight', '--rflow', '--dual', 't1_pre,bravo', '--p-uncond', 0.1, '--init', run, '--reflow', pairs, '--iters', 1)


def planted(root, data, rows, change):
    """Real pairs as a set of sample.py; change(pre, post, mask) -> pre, post."""
    for n, i in enumerate(rows):
        pre, post = change(*data.images[i], data.masks[i, 0])
        write_patient(root / f'syn_0_{n:06d}', dict(t1_pre=np.float32(pre), bravo=np.float32(post)), data.masks[i, 0], (1, 1))
    write_csv(root / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_0_{n:06d}', data.table[i]['patient']] for n, i in enumerate(rows)])
    (root / 'sample.json').write_text(json.dumps(dict(bravo='0123456789ab', pixels=32, box=list(data.box), dual=['t1_pre', 'bravo'])))


@pytest.mark.parametrize('name, change', [('same', lambda a, b, m: (a, b)), ('flat', lambda a, b, m: (a, a)), ('moved', lambda a, b, m: (a, np.roll(b, 3, 0)))])
def test_sets_whose_answer_is_known(phantom, cache, tmp_path, capsys, name, change):
    """Real test pairs themselves have W1 0 and equal means; without enhancement it is missed, and agreement is too good; a shift is found."""
    data = load_slices([phantom], 32, ('t1_pre', 'bravo'), cache=cache)
    rows = [i for i in data.rows('test') if data.table[i]['tumour']]
    planted(tmp_path / 'set', data, rows, change)
    evaluate.main(evaluate.get_args(['dual', '--fake', str(tmp_path / 'set'), '--data', str(phantom), '--cache', str(cache), '--out', str(tmp_path / 'out'), '--repeats', '20']))
    about = json.loads((tmp_path / 'out/metrics.json').read_text())
    m = {k: (v['fake'], v['floor']) for k, v in about['metrics'].items()}
    assert about['pairs'] + about['left_out'] >= len(rows) and (tmp_path / 'out/dual.png').stat().st_size > 5000
    assert m['E in tumour'][1] > 0.05 and m['AUC of E, tumour against head'][1] > 0.7 and m['gradient correlation'][1] > 0.5 and m['shift, pixels'][1] == 0
    if name == 'same':
        assert all(a == pytest.approx(b, abs=1e-5) for k, (a, b) in m.items() if 'W1' not in k) and all(a < b + 1e-6 for k, (a, b) in m.items() if 'W1' in k and 'shift' not in k)
    if name == 'flat':
        assert m['E in tumour'][0] == m['sd of E outside'][0] == m['leakage'][0] == 0 and m['AUC of E, tumour against head'][0] == 0.5 and m['NMI'][0] == pytest.approx(2)
        assert m['E in tumour, W1'][0] > m['E in tumour, W1'][1]
    if name == 'moved':
        assert m['shift, pixels'][0] == 3 and np.isnan(m['shift, pixels, W1']).all()               # real ones do not vary: no unit
        assert m['gradient correlation'][0] < m['gradient correlation'][1] - 0.2 and m['leakage'][0] > 2 * m['leakage'][1]
    assert len(read_csv(tmp_path / 'out/metrics.csv')) == 22


def test_training_on_one_image_of_pairs_is_noted(runs, call, phantom, cache, tmp_path, capsys):
    """Its scale is the pair's, that of real ones their own; of both images nothing is to be said."""
    made = call('sample', tmp_path / 'made', '--bravo', runs[0], '--data', phantom, '--n', 2, '--steps', 1)
    for names, told in ((('bravo',), True), (('t1_pre', 'bravo'), False)):
        load_slices([phantom, made], 16, names, cache=cache)
        assert (f'note: {made} holds pairs' in capsys.readouterr().out) == told


def test_real_images_beside_a_pair_share_its_scale(phantom, cache, tmp_path):
    """bravo of a set of pairs is compared with bravo as pairs have it, not as it is alone; t1_pre is stored 2.5 times as bright, which MR may."""
    shutil.copytree(phantom, tmp_path / 'data')
    for f in (tmp_path / 'data').glob('*/t1_pre.nii.gz'):
        n = nib.load(f)
        nib.save(nib.Nifti1Image(np.float32(2.5 * n.get_fdata()), n.affine), f)
    box = (0.0, 0.0, 1.0, 1.0)
    pairs, alone = (load_slices([tmp_path / 'data'], 32, names, box, cache=cache).images for names in (('t1_pre', 'bravo'), ('bravo',)))
    made = dict(pixels=32, box=list(box), dual=['t1_pre', 'bravo'], seen=[])
    args = argparse.Namespace(data=[tmp_path / 'data'], cache=cache, fake='set')
    assert np.array_equal(evaluate.real_like(args, made).images, pairs[:, 1:]) and np.abs(pairs[:, 1:] - alone).max() > 0.5
    assert np.array_equal(evaluate.real_like(args, made, ('t1_pre', 'bravo')).images, pairs)
    assert np.array_equal(evaluate.real_like(args, dict(made, dual=None)).images, alone)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('flags, words', [('--dual t1_pre', "'t1_pre' two different t1_pre,t1_gd"), ('--dual bravo,bravo', 'two different'), ('--dual bravo,seg', 'two different'),
                                          ('--dual a,../b', 'two different'), ('--dual t1_pre,bravo --perceptual 0.1', '--dual --perceptual away'),
                                          ('--dual t1_pre,bravo --vae 4', '--dual --vae away'), ('--dual t1_pre,t1_gd', '--data t1_pre, t1_gd'),
                                          ('--init {pair}', '--init was trained with dual make them agree')])
def test_training_refuses(call, runs, tmp_path, capsys, flags, words):
    refused(capsys, words.split(), lambda: call('bravo', tmp_path / 'out', '--rflow', '--p-uncond', 0.1, *flags.format(pair=runs[0]).split()))


def test_others_refuse(runs, call, phantom, cache, detector, tmp_path, capsys):
    """draft.py; latents; a gate where no image is bravo; evaluate.py of a set of single images, or of too few."""
    run, root = runs
    refused(capsys, ['--bravo', '--dual', 'single images'], lambda: call('draft', tmp_path / 'draft', '--bravo', run, '--reward', detector()))
    refused(capsys, ['--dual', '--latent', 'away'], lambda: call('bravo', tmp_path / 'l', '--rflow', '--dual', 't1_pre,bravo', '--latent', _latent(tmp_path)))
    odd = torch.load(run / 'ckpt.pt', weights_only=True)
    odd['args']['dual'] = ['t1_pre', 't1_gd']
    torch.save(odd, tmp_path / 'odd.pt')
    refused(capsys, ['--gate', 't1_pre and t1_gd'], lambda: call('sample', tmp_path / 's', '--bravo', tmp_path / 'odd.pt', '--data', phantom, '--gate', detector()))
    go = lambda *flags: evaluate.main(evaluate.get_args(['dual', '--data', str(phantom), '--cache', str(cache), '--out', str(tmp_path / 'out'), *map(str, flags)]))
    few = call('sample', tmp_path / 'few', '--bravo', run, '--data', phantom, '--n', 2, '--steps', 1)
    refused(capsys, ['8 of each'], lambda: go('--fake', few))
    refused(capsys, ['t1_gd, bravo, seg'], lambda: go('--fake', few, '--dual', 't1_gd,bravo'))
    (few / 'sample.json').write_text(json.dumps({**json.loads((few / 'sample.json').read_text()), 'dual': None}))
    refused(capsys, ['--fake', 'few', '--dual'], lambda: go('--fake', few))
    assert not (tmp_path / 'out').exists()


def _latent(tmp_path):
    """What passes for a run of --vae until somebody looks closer."""
    args = dict(vae='2', channels=[8, 8], layers=1, latent_channels=2, norm_groups=2, size=16)
    net = common.build_autoencoder(common.argparse.Namespace(**args))[0]
    torch.save(dict(args=args, ema=net.state_dict(), box=[0, 0, 1, 1]), tmp_path / 'vae.pt')
    return tmp_path / 'vae.pt'
