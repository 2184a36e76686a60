"""Spaces that a process can act in: Haar bands, latents, the autoencoders behind them, and runs in each through sample.py."""
import argparse
import csv
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analysis
import common
import sample
import train_bravo
from common import (VAES, Autoencoder, Down, MultiScale, Space, Up, build_autoencoder, depth_to_space, generator, haar, inverse_haar, load_run,
                    make_denoise, read_nifti, space_to_depth, ssim_parts)
from test_errors import refused
from train_bravo import PatchGAN, adaptive_weight, kl, moments, report_reconstruction, vae_stage


def scramble(net, seed=0):
    """Every parameter random, those that start at zero too."""
    g = generator('scramble', seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return net.requires_grad_(False)


# -- exact properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(8, 12), (4, 6, 8)], ids=['2D', '3D'])
def test_haar(size):
    """Its inverse, orthonormal (energy to 1e-12), white noise stays white, a constant lies in the first band, bands as documented."""
    dims, g = len(size), generator('haar')
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=g)
    z = haar(x)
    assert z.shape == (2, 3 * 2 ** dims, *(n // 2 for n in size))
    torch.testing.assert_close(inverse_haar(z), x, rtol=0, atol=1e-14)
    assert abs(float(z.square().sum() / x.square().sum()) - 1) < 1e-12
    block = torch.eye(2 ** dims, dtype=torch.float64).view(2 ** dims, 1, *(2,) * dims)                       # the matrix of the transform
    matrix = haar(block).flatten(1)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(2 ** dims, dtype=torch.float64), rtol=0, atol=1e-15)
    flat = haar(torch.full((1, 1, *size), 0.7, dtype=torch.float64))
    torch.testing.assert_close(flat[:, 0], torch.full_like(flat[:, 0], 0.7 * 2 ** (dims / 2)), rtol=0, atol=1e-15)
    assert flat[:, 1:].abs().max() == 0
    if dims == 2:
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        torch.testing.assert_close(z, torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2, rtol=0, atol=1e-14)
    covariance = torch.cov(haar(torch.randn(1, 1, *(128,) * 2, generator=g))[0].flatten(1))
    assert (covariance - torch.eye(4)).abs().max() < 0.06                                                    # 4 standard errors of 4,096 draws


@pytest.mark.parametrize('factor', [(2, 2), (2, 4), (1, 2), (2, 4, 2)], ids=str)
def test_space_to_depth_keeps_every_pixel(factor):
    x = torch.randn(2, 3, *(8,) * len(factor), generator=generator('fold'))
    z = space_to_depth(x, factor)
    assert z.shape == (2, 3 * math.prod(factor), *(8 // f for f in factor)) and torch.equal(depth_to_space(z, factor), x)
    if factor == (2, 2):
        assert torch.equal(z, F.pixel_unshuffle(x, 2)) and torch.equal(depth_to_space(z, factor), F.pixel_shuffle(z, 2))


@pytest.mark.parametrize('wide, narrow', [(8, 8), (16, 8), (32, 8)])
@pytest.mark.parametrize('stride', [(2, 2), (2, 2, 2)], ids=['2D', '3D'])
def test_down_undoes_up(stride, wide, narrow):
    """The shortcuts of DC-AE: averaging what was repeated gives back the same bits. (fp32 numbers in fp64: eight of them add up exactly.)"""
    x = torch.randn(2, wide, *(4,) * len(stride), generator=generator('dc')).double()
    y = Up.repeat(x, narrow, stride)
    assert y.shape == (2, narrow, *(8,) * len(stride)) and torch.equal(Down.average(y, wide, stride), x)
    for layer, value, wanted in ((Down(narrow, wide, stride, True), y, x), (Up(wide, narrow, stride, shortcut=True), x, y)):
        for p in layer.double().parameters():
            p.data.zero_()
        assert torch.equal(layer(value), wanted)


@pytest.mark.parametrize('vae', VAES)
def test_shapes_and_factors(vae):
    """2: 4 times less area, 2x4: 8, 4: 16, 8 and multiscale: 64; decoding gives the size back; every parameter has a gradient."""
    args = argparse.Namespace(vae=vae, channels=(4, 8, 8, 8)[:len(VAES[vae]) + 1], layers=1, latent_channels=3, norm_groups=2)
    net, factor = build_autoencoder(args)
    assert factor == {'2': (2, 2), '2x4': (2, 4), '4': (4, 4)}.get(vae, (8, 8))
    x = torch.randn(2, 1, 16, 32, generator=generator('x'))
    recon, mean, log_var = net(x, torch.randn(2, 3, 16 // factor[0], 32 // factor[1]))
    assert recon.shape == x.shape and mean.shape == log_var.shape == (2, 3, 16 // factor[0], 32 // factor[1])
    (recon.square().mean() + kl(mean, log_var).mean()).backward()
    missing = {k for k, p in net.named_parameters() if p.grad is None}
    assert all('log_var' in k for k in missing) and (vae == 'multiscale') == bool(missing)                   # of the stages in between


def test_maisi_has_20_944_897_parameters():
    count = lambda net: sum(p.numel() for p in net.parameters())
    net = Autoencoder(1, 4, (64, 128, 256), 2, dims=3, smooth=True)
    assert count(net) == 20_944_897 and (count(net.encoder), count(net.decoder)) == (8_813_252, 12_131_585)


def test_stages(tmp_path):
    """A stage goes through the earlier ones; all are the whole; each has a sixth of the steps, then they learn together."""
    net = scramble(MultiScale(1, 4, (4, 8, 8, 8), 1, norm_groups=2))
    x = torch.randn(1, 1, 16, 16, generator=generator('s'))
    for k in range(3):
        recon, mean, _ = net(x, None, k)
        assert recon.shape == x.shape and mean.shape == (1, 4 if k == 2 else 8, 8 >> k, 8 >> k)
    assert torch.equal(net(x)[0], net(x, None, 2)[0]) and torch.equal(net.decode(net.encode(x)[0]), net(x)[0])
    args = argparse.Namespace(vae='multiscale', iters=600)
    assert [vae_stage(s, args) for s in (0, 99, 100, 199, 200, 299, 300, 599)] == [0, 0, 1, 1, 2, 2, None, None]
    assert vae_stage(0, argparse.Namespace(vae='4', iters=600)) is None


def test_kl():
    """0 for a standard normal; the analytic value is the Monte-Carlo one; per pixel, sums and means are the same loss."""
    assert kl(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).abs().max() == 0
    g = generator('kl')
    mean, log_var = torch.randn(1, 2, 3, 3, generator=g, dtype=torch.float64), torch.randn(1, 2, 3, 3, generator=g, dtype=torch.float64)
    z = mean + (log_var / 2).exp() * torch.randn(100_000, 2, 3, 3, generator=g, dtype=torch.float64)
    log_q = -((z - mean).square() / log_var.exp() + log_var) / 2
    drawn = (log_q + z.square() / 2).flatten(1).sum(1)
    assert abs(float(drawn.mean() - kl(mean, log_var)[0])) < 4 * float(drawn.std()) / math.sqrt(len(z))
    q = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (log_var / 2).exp()), torch.distributions.Normal(0, 1))
    torch.testing.assert_close(kl(mean, log_var), q.flatten(1).sum(1))


def test_the_loss_of_a_step_is_in_units_of_a_pixel(call, phantom, tmp_path):
    """The logged loss of one step is (summed L1 + K KL) / pixels, computed here from the first weights."""
    out = call('bravo', tmp_path / 'vae', '--vae', 2, '--iters', 1, '--kl', 0.3)
    args, data = argparse.Namespace(**common.load_checkpoint(out)['args']), common.load_slices([phantom], 16, cache=tmp_path / 'c')
    torch.manual_seed(common.seed_of(0, 'weights') % 2 ** 32)
    net = build_autoencoder(args)[0]
    rows = data.rows('train', args.empty_slices, 0)
    x = torch.tensor(data.images[rows[common.batch_rows(len(rows), 4, 0, 0)]])
    recon, mean, log_var = (v.detach() for v in net(x, torch.randn(4, 4, 8, 8, generator=generator(0, 'noise', 0))))
    summed = ((recon - x).abs().flatten(1).sum(1) + 0.3 * kl(mean, log_var)) / 256
    assert abs(float(common.read_csv(out / 'log.csv')[-1]['loss']) - float(summed.mean())) < 1e-5 and float(kl(mean, log_var).mean()) > 1


def test_adaptive_weight():
    """On a toy of one weight it is the ratio of the two slopes, whatever the scale of the GAN; then both pull equally."""
    w = torch.tensor([1.5, -2.0], requires_grad=True)
    for scale in (1e-3, 1.0, 50.0):
        loss, gan = (3 * w).sum(), scale * (w * torch.tensor([4.0, 3.0])).sum()
        weight = adaptive_weight(loss, gan, w)
        assert abs(float(weight) / (3 * math.sqrt(2) / (5 * scale)) - 1) < 1e-4 and not weight.requires_grad
        pulls = [torch.autograd.grad(v, w, retain_graph=True)[0].norm() for v in (loss, weight * gan)]
        torch.testing.assert_close(*pulls)
    assert adaptive_weight(loss, 0 * gan, w) == 1e4


@pytest.mark.parametrize('layers, field', [(2, 34), (3, 70)])
def test_patch_gan(layers, field):
    """The logits look at patches of 34 or 70 pixels (without the norms, which see the whole image); 256 pixels give 30 x 30 of 70."""
    net = PatchGAN(8, layers)
    x = torch.zeros(1, 1, 160, 160, requires_grad=True)
    y = torch.nn.Sequential(*(m for m in net.net if not isinstance(m, torch.nn.GroupNorm)))(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    assert int((x.grad[0, 0].abs().sum(0) > 0).sum()) == int((x.grad[0, 0].abs().sum(1) > 0).sum()) == field
    assert PatchGAN(8, 3)(torch.zeros(1, 1, 256, 256)).shape == (1, 1, 30, 30)


# -- Space ----------------------------------------------------------------------------------------------------------------


def bands():
    return Space(dict(shift=torch.tensor([-1.0, 0, 0, 0]), scale=torch.tensor([1.0, 0.1, 0.2, 0.05])))


def test_space_of_pixels_does_nothing():
    space, x = Space(), torch.randn(2, 1, 8, 8)
    assert space.encode(x) is x and space.decode(x) is x and space.condition(x) is x and space.condition(None) is None
    assert space.shape(8) == (1, 8, 8) and space.in_channels(1) == 2 and space.in_channels(2) == 3 and space.in_channels(0) == 1


def test_space_of_bands():
    """decode(encode(x)) = x; a mask keeps its pixels, mask-present is one channel; the door conditions by itself."""
    space, g = bands(), generator('bands')
    x, mask = torch.randn(2, 1, 8, 8, generator=g), (torch.rand(2, 1, 8, 8, generator=g) > 0.7).float()
    torch.testing.assert_close(space.decode(space.encode(x)), x)
    told = common.mask_condition(mask, 0.1, torch.tensor([True, False]))
    condition = space.condition(told)
    assert condition.shape == (2, 5, 4, 4) and space.in_channels(2) == 9 and space.in_channels(1) == 8
    assert torch.equal(depth_to_space(condition[:, :4], (2, 2))[0], mask[0]) and condition[1].abs().max() == 0 and condition[0, 4].min() == 1
    process, seen = common.RFlow(), []
    process.space = space
    net = lambda z, t, context, extra: (seen.append(z), z[:, :4])[1]
    make_denoise(net, process, told)(space.encode(x), 0.5)
    process.loss(net, process.to_range(x), torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), told)
    assert all(torch.equal(z[:, 4:], condition) for z in seen) and len(seen) == 2
    torch.testing.assert_close(process.from_range(process.to_range(x)), x)


@pytest.mark.parametrize('vae', VAES)
def test_lesions_of_two_pixels_reach_every_latent(vae):
    """The mask comes out of the condition as it went in, whatever the factor: a lesion of two pixels at any place is two ones in one cell, or in two."""
    args = dict(vae=vae, channels=(4, 8, 8, 8)[:len(VAES[vae]) + 1], layers=1, latent_channels=3, norm_groups=2)
    net, factor = build_autoencoder(argparse.Namespace(**args))
    space = Space(dict(args=args, weights=net.state_dict(), shift=torch.zeros(3), scale=torch.ones(3)))
    masks = torch.zeros(16 * 15, 1, 16, 16)
    for k in range(len(masks)):
        masks[k, 0, k // 15, k % 15:k % 15 + 2] = 1
    condition = space.condition(masks)
    assert condition.shape[1:] == (math.prod(factor), *(16 // f for f in factor)) and (condition.sum((1, 2, 3)) == 2).all()
    assert torch.equal(depth_to_space(condition, factor), masks) and condition.flatten(1).unique(dim=0).shape[0] == len(masks)


def test_moments():
    """Scaled by them, every channel has mean 0 and standard deviation 1, whatever the parts."""
    z = torch.randn(50, 3, 4, 4, generator=generator('m')) * torch.tensor([0.1, 1, 30.0])[:, None, None] + 5
    mean, std = moments(z.split(7))
    scaled = (z - mean.float().view(-1, 1, 1)) / std.float().view(-1, 1, 1)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-3 and (scaled.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4


def test_ssim_parts():
    """SSIM of an image with itself is 1; of constants the luminance formula alone; of a window of noise what the definition says."""
    x = torch.rand(2, 1, 16, 16, generator=generator('ssim')) * 2 - 1
    assert all((v - 1).abs().max() < 1e-5 for v in ssim_parts(x, x))
    luminance, structure = ssim_parts(torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.2))
    y, g = torch.rand(2, 1, 16, 16, generator=generator('other')) * 2 - 1, np.exp(-(np.arange(11) - 5) ** 2 / 4.5)     # sigma 1.5
    w, found = np.outer(g, g) / g.sum() ** 2, torch.stack(ssim_parts(x, y), -1)[0, 0]
    for i, j in ((0, 0), (3, 5)):
        a, b = x[0, 0, i:i + 11, j:j + 11].double().numpy(), y[0, 0, i:i + 11, j:j + 11].double().numpy()
        ma, mb = (w * a).sum(), (w * b).sum()
        va, vb, ab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
        assert found[i, j].tolist() == pytest.approx([(2 * ma * mb + 4e-4) / (ma ** 2 + mb ** 2 + 4e-4), (2 * ab + 3.6e-3) / (va + vb + 3.6e-3)], abs=1e-5)
    assert luminance.shape == (1, 1, 6, 6) and abs(float(luminance.mean()) - (0.2 + 4e-4) / (0.29 + 4e-4)) < 1e-5 and (structure - 1).abs().max() < 1e-3


def test_report_of_reconstruction(tmp_path):
    """Errors that are known: 0.2 everywhere, 0.4 more inside one lesion. The bins are in mm: 2 x 2 pixels of 2 mm are a disc of 4.5 mm."""
    images, masks = np.zeros((2, 1, 32, 32), np.float32), np.zeros((2, 1, 32, 32), np.uint8)
    masks[0, 0, 4:6, 4:6], masks[0, 0, 10:18, 10:18], masks[1, 0, 20:22, 20:22] = 1, 1, 1                  # 4.5, 18.1 and 4.5 mm
    data = argparse.Namespace(images=images, masks=masks, table=[dict(patient=p, spacing=(2.0, 2.0)) for p in 'ab'])
    wrong = torch.full((2, 1, 32, 32), 0.2)
    wrong[0, 0, 4:6, 4:6] += 0.4
    report_reconstruction(lambda x: x + wrong, data, np.arange(2), 'cpu', (2, 2), tmp_path)
    rows = {r['held out']: r for r in csv.DictReader(open(tmp_path / 'reconstruction.csv'))}
    psnr = lambda *errors: 10 * math.log10(4 / np.mean(errors))
    small, large = rows['lesions below 5 mm'], rows['lesions 10 to 20 mm']
    assert small['n'] == '2' and small['patients'] == '2' and float(small['PSNR, dB']) == pytest.approx(psnr(0.36, 0.04), abs=0.006)
    assert large['n'] == '1' and float(large['PSNR, dB']) == pytest.approx(psnr(0.04), abs=0.006)
    assert float(rows['slices']['PSNR, dB']) == pytest.approx(psnr(0.04 + 4 / 1024 * 0.32, 0.04), abs=0.006) and rows['lesions from 20 mm']['SSIM'] == ''


# -- runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def vaes(call, tmp_path_factory):
    """A finished tiny autoencoder of each kind; `4` has a GAN for its second half."""
    root = tmp_path_factory.mktemp('vaes')
    for vae in VAES:
        call('bravo', root / vae, '--vae', vae, *(['--gan', 0.5] if vae == '4' else []))
    return root


def images(out):
    return np.stack([read_nifti(f / 'bravo.nii.gz')[0][0] for f in sorted(out.glob('syn_*'))])


@pytest.mark.parametrize('vae', VAES)
def test_latent_run(call, vaes, phantom, tmp_path, vae):
    """Trains on latents of standard deviation 1, carries its autoencoder (the autoencoder's folder may go), draws images."""
    folder = tmp_path / 'vae'
    (vaes / vae).rename(folder)
    try:
        out = call('bravo', tmp_path / 'run', '--latent', folder, '--rflow', *(['--p-uncond', 0.5, '--augment'] if vae == '4' else []))
    finally:
        folder.rename(vaes / vae)
    run = load_run(out)
    data = common.load_slices([phantom], 16, box=run.box, cache=tmp_path / 'c')
    x_0 = run.process.to_range(torch.tensor(data.images[data.rows('train', 0.2)]))
    assert x_0.shape[1:] == run.process.space.shape(16) and x_0.mean((0, 2, 3)).abs().max() < 1e-3 and (x_0.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    weights = common.load_checkpoint(vaes / vae)['ema']
    assert all(torch.equal(v, weights[k]) for k, v in run.process.space.autoencoder.state_dict().items())
    made = call('sample', tmp_path / 'set', '--bravo', out, '--data', phantom, '--n', 2, '--steps', 2, *(['--cfg', 2] if vae == '4' else []))
    found = images(made)
    assert found.shape == (2, 16, 16) and np.isfinite(found).all() and found.std() > 0
    alone = call('sample', tmp_path / 'alone', '--bravo', out, '--data', phantom, '--n', 2, '--steps', 2, '--batch-size', 1, *(['--cfg', 2] if vae == '4' else []))
    assert np.abs(images(alone) - found).max() < 1e-4


@pytest.mark.parametrize('flags', [('--rflow',), ('--target', 'v', '--steps', 50), ('--target', 'x0', '--steps', 50, '--p-uncond', 0.1)], ids=lambda f: ' '.join(map(str, f)))
def test_wavelet_run(call, phantom, tmp_path, flags):
    """The measured scale is stored and each band of the training slices has it; trajectories are images; pairs and reflow stay in the space."""
    out = call('bravo', tmp_path / 'run', '--wavelet', *flags)
    run = load_run(out)
    data = common.load_slices([phantom], 16, box=run.box, cache=tmp_path / 'c')
    x_0 = run.process.to_range(torch.tensor(data.images[data.rows('train', 0.2)]))
    assert x_0.shape[1:] == (4, 8, 8) and x_0.mean((0, 2, 3)).abs().max() < 1e-3 and (x_0.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    made = call('sample', tmp_path / 'set', '--bravo', out, '--data', phantom, '--n', 2, '--steps', 3, '--save-at', '1,.3,0')
    saved = np.load(made / 'syn_0_000001/trajectory.npz')
    noise = torch.randn(4, 8, 8, generator=generator(0, 'image', 1))
    assert np.allclose(saved['x_t'][0], run.process.space.decode(noise[None])[0, 0].numpy(), atol=1e-6) and np.array_equal(saved['x_t'][-1], images(made)[1])
    if flags == ('--rflow',):
        call('sample', tmp_path / 'pairs', '--bravo', out, '--data', phantom, '--n', 6, '--steps', 2, '--pairs')
        shard = np.load(next((tmp_path / 'pairs').glob('*.npz')))
        assert shard['image'].shape == shard['noise'].shape == (6, 4, 8, 8) and shard['mask'].shape == (6, 1, 16, 16)
        again = call('bravo', tmp_path / 'reflow', '--wavelet', '--rflow', '--reflow', tmp_path / 'pairs', '--init', out)
        assert torch.equal(load_run(again).process.space.scale, run.process.space.scale)


def weights(out, *names):
    state = common.load_checkpoint(out)
    return torch.cat([v.flatten().float() for name in names for v in state[name].values()])


@pytest.mark.parametrize('flags', [('--vae', 'multiscale', '--iters', 6), ('--vae', '4', '--gan', 0.5, '--gan-from', 0.2, '--augment', '--lr-find'), ('--wavelet', '--rflow')],
                         ids=['multiscale', 'gan', 'wavelet'])
def test_resume_is_exact(call, tmp_path, monkeypatch, flags):
    """Stopped by a signal and started again, to the same bits as in one go: networks, average, and the judge of the GAN."""
    whole = call('bravo', tmp_path / 'whole', *flags)

    class Once(common.Stop):
        def asked(self, device):
            self.steps = getattr(self, 'steps', 0) + 1
            return 15 if self.steps == 3 else 0

    with monkeypatch.context() as m:
        m.setattr(train_bravo, 'Stop', Once)
        with pytest.raises(SystemExit) as e:
            call('bravo', tmp_path / 'parts', *flags)
        assert e.value.code == 128 + 15 and common.load_checkpoint(tmp_path / 'parts')['step'] == 3
    call('bravo', tmp_path / 'parts', *flags)
    names = ('net', 'ema', 'disc') if '--gan' in flags else ('net', 'ema')
    assert torch.equal(weights(whole, *names), weights(tmp_path / 'parts', *names))


def test_two_processes_train_the_same_autoencoder(call, phantom, cache, tmp_path):
    """torchrun with 2: the same losses (1e-5) and weights, with the adaptive weight of the GAN in it."""
    flags = ['--vae', 4, '--gan', 0.5, '--gan-from', 0.25, '--save-every', 1]
    one = call('bravo', tmp_path / 'one', *flags)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    script = Path(train_bravo.__file__)
    done = subprocess.run([str(v) for v in (sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                                            f'--master_port={port}', script, '--preset', 'tiny', '--data', phantom, '--iters', 4, '--cache', cache, '--device',
                                            'cpu', '--dtype', 'fp32', '--sample-every', 100, '--out', tmp_path / 'two', *flags)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[float(r['loss']) for r in common.read_csv(out / 'log.csv')] for out in (one, tmp_path / 'two')]
    assert len(losses[0]) == 4 and np.allclose(*losses, rtol=0, atol=1e-5)
    for name in ('net', 'disc'):
        torch.testing.assert_close(weights(one, name), weights(tmp_path / 'two', name), rtol=0, atol=1e-4)


def test_stages_train_alone_then_together(call, tmp_path):
    """In its time a stage alone moves (no decay of the others either); later they all do."""
    out = call('bravo', tmp_path / 'vae', '--vae', 'multiscale', '--iters', 12, '--save-every', 2, '--keep-every', 2)
    at = [common.load_checkpoint(out / f'ckpt_{n}.pt')['net'] for n in (2, 4, 6, 8)]
    moved = lambda a, b: {k.split('.')[1] for k in a if not torch.equal(a[k], b[k])}
    assert [moved(a, b) for a, b in zip(at, at[1:])] == [{'1'}, {'2'}, {'0', '1', '2'}]
    assert [r['stage'] for r in common.read_csv(out / 'log.csv')][-1] == 'all'


def test_flags_of_an_autoencoder_change_it(call, vaes, tmp_path):
    """KL, latent channels, the GAN (from its step on): each leaves other weights; --minutes freezes the number of steps."""
    base = weights(vaes / '2', 'net')
    assert torch.equal(base, weights(call('bravo', tmp_path / 'same', '--vae', 2), 'net'))
    for name, flags in (('kl', ('--kl', 1)), ('gan', ('--gan', 0.5)), ('seed', ('--seed', 1))):
        assert not torch.equal(base, weights(call('bravo', tmp_path / name, '--vae', 2, *flags), 'net')), name
    assert torch.equal(base, weights(call('bravo', tmp_path / 'late', '--vae', 2, '--gan', 0.5, '--gan-from', 1), 'net'))
    wide = common.load_checkpoint(call('bravo', tmp_path / 'wide', '--vae', 2, '--latent-channels', 6, '--channels', '4,6', '--layers', 2))
    assert wide['net']['mean.weight'].shape[0] == 6 and (tmp_path / 'wide/samples_000004.png').stat().st_size > 1000
    timed = call('bravo', tmp_path / 'timed', '--vae', 2, '--gan', 0.5, '--minutes', 0.002)
    assert common.load_checkpoint(timed)['args']['iters'] == common.load_checkpoint(timed)['step'] >= 1


def test_latents_are_encoded_once(call, vaes, phantom, tmp_path, monkeypatch):
    """The second run reads the file; --augment encodes anew; a run that starts from another keeps its scale."""
    flags = ('--latent', vaes / '2', '--rflow', '--cache', tmp_path / 'c')
    first = call('bravo', tmp_path / 'a', *flags)
    files = list((tmp_path / 'c').glob('latents_*.f32'))
    assert len(files) == 1 and files[0].stat().st_size % (4 * 8 * 8 * 4) == 0 and not list((tmp_path / 'c').glob('.latents*'))
    with monkeypatch.context() as m:
        m.setattr(Space, 'transform', lambda *a: pytest.fail('encoded again'))
        again = call('bravo', tmp_path / 'b', *flags)
        with pytest.raises(pytest.fail.Exception):
            call('bravo', tmp_path / 'c2', *flags, '--augment')
    assert torch.equal(weights(first, 'net'), weights(again, 'net'))
    on = call('bravo', tmp_path / 'on', '--latent', first, '--rflow', '--init', first, '--empty-slices', 0.9, '--cache', tmp_path / 'c')
    assert torch.equal(load_run(on).process.space.scale, load_run(first).process.space.scale)


def test_an_autoencoder_with_perceptual_loss(call, tmp_path, monkeypatch):
    """--vae with --perceptual: the distance is of images and their reconstructions, changes the weights, and weighs what was asked."""
    asked = []

    class Vgg:
        to = lambda self, device: self
        distance = lambda self, a, b: (asked.append((a.shape, b.shape)), (a - b).square().flatten(1).sum(1))[1]
    monkeypatch.setattr(train_bravo, 'VGG16', lambda *files: Vgg())
    base, none, some = (common.load_checkpoint(call('bravo', tmp_path / name, '--vae', 2, *flags))['net'] for name, flags in (
        ('base', []), ('little', ['--perceptual', 1e-30]), ('much', ['--perceptual', 1.0])))
    assert set(asked) == {(torch.Size([4, 1, 16, 16]),) * 2} and len(asked) == 8
    assert all(torch.equal(base[k], none[k]) for k in base) and any(not torch.equal(base[k], some[k]) for k in base)
    all_three = call('bravo', tmp_path / 'all', '--vae', 2, '--perceptual', 1.0, '--gan', 0.5, '--gan-from', 0.25)          # L1, perceptual and GAN in one training
    last = common.read_csv(all_three / 'log.csv')[-1]
    assert len(asked) == 12 and math.isfinite(float(last['loss']))
    assert any(not torch.equal(v, some[k]) for k, v in common.load_checkpoint(all_three)['net'].items())


def test_perceptual_loss_sees_images():
    """The distance is between decoded images, and its gradient goes through the decoder."""
    process, asked = common.RFlow(), []
    process.space = bands()
    vgg = argparse.Namespace(distance=lambda a, b: (asked.append((a, b)), (a - b).square().flatten(1).sum(1))[1])
    x_0, x0_hat = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4, requires_grad=True)
    train_bravo.perceptual_loss(vgg, x0_hat, x_0, torch.tensor([0.1, 0.2]), process).backward()
    torch.testing.assert_close(asked[0][1], process.space.decode(x_0))
    assert asked[0][0].shape == (2, 1, 8, 8) and x0_hat.grad.abs().min() > 0


def test_release_of_a_latent_run(call, vaes, phantom, tmp_path):
    """One small file without the autoencoder's folder; the same images up to the rounding of both networks."""
    out = call('bravo', tmp_path / 'run', '--latent', vaes / '4', '--rflow')
    analysis.main(analysis.get_args(['release', str(out), str(tmp_path / 'small.pt')]))
    state = torch.load(tmp_path / 'small.pt', weights_only=True)
    assert state['space']['weights']['mean.weight'].dtype == torch.float16 and not any('/' in str(v) for v in state['args'].values())
    assert (tmp_path / 'small.pt').stat().st_size < 0.5 * (out / 'ckpt.pt').stat().st_size
    both = [images(call('sample', tmp_path / name, '--bravo', run, '--data', phantom, '--n', 2, '--steps', 2)) for name, run in (('a', out), ('b', tmp_path / 'small.pt'))]
    assert np.abs(both[0] - both[1]).max() < 0.02
    analysis.main(analysis.get_args(['release', str(vaes / '2'), str(tmp_path / 'vae.pt')]))                # an autoencoder too; it can be used
    call('bravo', tmp_path / 'on', '--latent', tmp_path / 'vae.pt', '--rflow', '--iters', 1)


TRAIN = [
    ('--wavelet --latent {vaes}/2 --rflow', '--wavelet --latent give one'),
    ('--wavelet', '--wavelet eps --rflow --target v x0'),
    ('--latent {vaes}/2', '--latent eps --rflow --target v x0'),
    ('--latent none --rflow', 'none: no such run folder'),
    ('--latent {trained}/bravo --rflow', '--latent bravo no autoencoder --vae'),
    ('--latent {vaes}/2 --rflow --size 32', '--latent --size 16 this run has 32'),
    ('--latent {vaes}/8 --rflow --channels 8,8,8 --attention 0,0,0', '--size 16 --latent 3 levels multiple of 32'),
    ('--wavelet --rflow --size 18', '--size 18 --wavelet multiple of 4'),
    ('--wavelet --rflow --init {trained}/bravo --init-range 0,1', '--init-range --wavelet'),
    ('--wavelet --rflow --init {trained}/bravo', '--init pixels bands agree'),
    ('--rflow --gan 0.5', '--gan autoencoder --vae'),
    ('--rflow --kl 1', '--kl --vae'),
    ('--vae 3', "--vae '3' 2x4 multiscale"),
    ('--vae 2 --rflow', '--rflow --vae leave it away'),
    ('--vae 2 --p-uncond 0.1', '--p-uncond --vae'),
    ('--vae 2 --attention 0,1', '--attention --vae'),
    ('--vae 2 --gan-from 0.2', '--gan-from 0.2 without --gan'),
    ('--vae 4 --channels 8,8', '--channels 2 levels --vae 4 has 3'),
    ('--vae multiscale --channels 4,8,8,64', '--channels 4,8,8,64 multiscale multiple'),
    ('--vae 8 --size 20', '--size 20 --vae 8 multiple of 8'),
    ('--vae 2 --iters 0', '--iters 0 train'),
    ('--vae 2 --kl -1', "--kl '-1' at least 0"),
]


@pytest.mark.parametrize('flags, words', TRAIN, ids=[f for f, _ in TRAIN])
def test_training_refuses(call, trained, vaes, tmp_path, capsys, flags, words):
    refused(capsys, words.split(), call, 'bravo', tmp_path / 'out', *flags.format(trained=trained, vaes=vaes).split())
    assert not list((tmp_path / 'out').glob('*.pt*'))


def test_sampling_refuses(call, vaes, phantom, tmp_path, capsys):
    out = call('bravo', tmp_path / 'run', '--wavelet', '--target', 'v', '--steps', 50, '--iters', 1)
    refused(capsys, ['--clip', 'bands'], call, 'sample', tmp_path / 'a', '--bravo', out, '--data', phantom, '--clip')
    refused(capsys, ['autoencoder', '--latent'], call, 'sample', tmp_path / 'b', '--bravo', vaes / '2', '--data', phantom)


def test_an_autoencoder_killed_before_its_report_makes_it_later(call, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train_bravo, 'report_reconstruction', lambda *a: exec('raise KeyboardInterrupt'))
        with pytest.raises(KeyboardInterrupt):
            call('bravo', tmp_path / 'vae', '--vae', 2)
    assert not (tmp_path / 'vae/reconstruction.csv').exists()
    assert (call('bravo', tmp_path / 'vae', '--vae', 2) / 'reconstruction.csv').exists()


def test_a_compiled_autoencoder_trains_with_a_gan(call, tmp_path, monkeypatch):
    """The GAN's pull goes back through the compiled graph twice; same bits as without."""
    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net: compiled(net, backend='aot_eager'))
    flags = ('--vae', 2, '--gan', 0.5, '--gan-from', 0.25)
    a, b = (common.load_checkpoint(call('bravo', tmp_path / name, *flags, *more))['net'] for name, more in (('eager', ()), ('compiled', ('--compile',))))
    assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < 1e-5 for k in a)
