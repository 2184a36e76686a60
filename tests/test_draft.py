"""draft.py: adapters that start without effect and add what they should, the gradient of DRaFT against plain autograd and finite
differences, and a whole run: resumes to the same bits, stops early, is a run that every script takes."""
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import analysis
import common
import draft
import train_bravo
from common import DDPM, SAMPLERS, RFlow, generator, load_checkpoint, make_denoise, read_nifti


def randomise(net, seed=0, spread=0.1):
    """Weights without zeros, so that no layer is without effect."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(spread * torch.randn(p.shape, generator=generator(seed, i)))
    return net


def unet(dims=2, context=None):
    net = randomise(common.UNet(2, 1, (8, 8), (0, 1), 1, 8, context_dim=context, dims=dims, norm_groups=2))
    return net.to(memory_format=torch.channels_last) if dims == 2 else net


NETS = {'2D': (lambda: unet(), (torch.randn(2, 2, 16, 16), torch.tensor([0.3, 0.8]))),
        'context': (lambda: unet(context=5), (torch.randn(2, 2, 16, 16), torch.tensor([0.3, 0.8]), torch.randn(2, 3, 5))),
        '3D': (lambda: unet(3), (torch.randn(1, 2, 4, 8, 8), torch.tensor([0.4]))),
        'detector': (lambda: randomise(common.Detector()), (torch.randn(2, 2, 16, 16),))}


def test_bounds_stop_no_gradient():
    """DDPM's x0_hat is bounded to [-1,1]; where it lies outside, the image is the bound and the gradient passes as if it were not."""
    theta = torch.tensor(1.05, requires_grad=True)
    denoise = make_denoise(lambda x, t, *_: theta.expand(x.shape), DDPM(10, target='x0'), clip=True)
    image, = draft.drafted(denoise, torch.randn(2, 1, 4, 4), SAMPLERS['ddim'], DDPM(10, target='x0').times(5), DDPM(10, target='x0'), 1)
    torch.testing.assert_close(image, torch.ones(2, 1, 4, 4))
    image.sum().backward()
    assert float(theta.grad) == pytest.approx(32)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NETS)
def test_adapters_start_without_effect(name):
    """B = 0: the same bits as before. The first gradient moves B of every layer and no A, and no weight of the network."""
    net, inputs = NETS[name][0](), NETS[name][1]
    before = net(*inputs).detach()
    loras = draft.add_lora(net, 3, 6.0)
    assert len(loras) == sum(isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear)) for m in net.modules()) > 8
    after = net(*inputs)
    assert torch.equal(before, after)
    after.square().sum().backward()
    assert all(torch.count_nonzero(v.A.grad) == 0 and v.B.grad.abs().max() > 0 for v in loras.values())
    trained = {id(p) for v in loras.values() for p in v.parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in net.parameters())


@pytest.mark.parametrize('name', NETS)
def test_merged_weights(name):
    """merge() is base + scale alpha/r B A in every layer, and gives what the adapters give; scale 0 gives the base's bits."""
    net, inputs = NETS[name][0](), NETS[name][1]
    base, plain = {k: v.clone() for k, v in net.state_dict().items()}, net(*inputs).detach()
    loras = draft.add_lora(net, 3, 6.0)
    for i, v in enumerate(loras.values()):
        nn.init.normal_(v.B, 0, 0.05, generator=generator('B', i))
    for scale in (0.0, 0.5, 1.0):
        merged = draft.merge(base, loras, scale)
        assert merged.keys() == base.keys()
        for n, v in loras.items():
            torch.testing.assert_close(merged[f'{n}.weight'], base[f'{n}.weight'] + scale * 2 * (v.B @ v.A).view_as(base[f'{n}.weight']), rtol=1e-6, atol=1e-7)
        assert all(torch.equal(merged[k], base[k]) for k in base if k.removesuffix('.weight') not in loras)
        other = NETS[name][0]()
        other.load_state_dict(merged)
        with draft.scaled(loras, scale):
            out = net(*inputs)
            torch.testing.assert_close(other(*inputs), out, rtol=1e-4, atol=1e-5)
        assert torch.equal(out, plain) if scale == 0 else (out - plain).abs().max() > 1e-4
    assert {v.scale for v in loras.values()} == {1.0}
    with draft.scaled(loras, 0.5):
        with draft.scaled(loras, 0.0):
            pass
        assert {v.scale for v in loras.values()} == {0.5}


def test_an_adapter_of_a_convolution_is_two_convolutions():
    """A has the kernel, stride and padding of the layer and r outputs, B is 1x1: B(A(x)) is what is added."""
    conv = nn.Conv2d(4, 6, 3, 2, 1)
    x, before = torch.randn(2, 4, 9, 9), conv.weight.detach().clone()
    lora = draft.add_lora(nn.Sequential(conv), 2, 3.0)['0']
    nn.init.normal_(lora.B)
    added = 1.5 * F.conv2d(F.conv2d(x, lora.A.view(2, 4, 3, 3), stride=2, padding=1), lora.B.view(6, 2, 1, 1))
    torch.testing.assert_close(conv(x), F.conv2d(x, before, conv.bias, 2, 1) + added, rtol=1e-4, atol=1e-5)


# -- the gradient -----------------------------------------------------------------------------------------------------


def ready(process, seed=0):
    """A small network with live adapters, its noise and mask, and a toy reward: the network's own features do not matter."""
    net = unet()
    loras = draft.add_lora(net, 2, 2.0)
    for i, v in enumerate(loras.values()):
        nn.init.normal_(v.B, 0, 0.1, generator=generator('B', seed, i))
    mask = (torch.rand(2, 1, 8, 8, generator=generator('mask')) > 0.7).float()
    return loras, make_denoise(net, process, mask), torch.randn(2, 1, 8, 8, generator=generator('x', seed)), [p for v in loras.values() for p in v.parameters()]


def noises(seed):
    g = generator('fresh', seed)
    return lambda: torch.randn(2, 1, 8, 8, generator=g)


toy = lambda x: (x * torch.linspace(-1, 1, 64).view(8, 8)).mean() + x.square().mean()


@pytest.mark.parametrize('again', [False, True], ids=['kept', 'checkpointed'])
@pytest.mark.parametrize('sampler', [s for s in SAMPLERS if s != 'adaptive'])
def test_all_steps_are_plain_autograd(sampler, again):
    """k = all steps: image and gradient of backpropagation through the sampler as it is, with activations kept or computed again."""
    process = RFlow() if sampler != 'ddpm' else DDPM(50, 'cosine', 'v')
    loras, denoise, x, params = ready(process)
    ts = process.times(4)
    plain = SAMPLERS[sampler](denoise, x, ts, process, noises(1))
    wanted = torch.autograd.grad(toy(plain), params)
    watched = draft.Watched(denoise, loras, penalty=False, keep_no_activations=again)
    image, = draft.drafted(watched, x, SAMPLERS[sampler], ts, process, 4, noise=noises(1))
    assert torch.equal(image, plain)
    for a, b in zip(torch.autograd.grad(toy(image), params), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('sampler', ['euler', 'heun', 'ddim', 'dpm++2s', 'ddpm'])
def test_the_last_k_steps(sampler):
    """k = 1, 2 of 4: the image of plain sampling; the gradient of the last k steps with the state before them held fixed, and of no step more."""
    process = DDPM(50, 'cosine', 'v') if sampler in ('ddim', 'ddpm') else RFlow()
    loras, denoise, x, params = ready(process)
    ts, grads = process.times(4), []
    plain = SAMPLERS[sampler](denoise, x, ts, process, noises(1)).detach()
    for k in (1, 2, 4):
        calls, fresh = [], noises(1)
        watched = draft.Watched(lambda x, t: (calls.append(torch.is_grad_enabled()), denoise(x, t))[1], loras, penalty=False)
        image, = draft.drafted(watched, x, SAMPLERS[sampler], ts, process, k, noise=fresh)
        assert torch.equal(image, plain)
        steps = {'heun': 2 * k - 1, 'dpm++2s': 2 * k - 1 - (k == 4)}.get(sampler, k)
        assert sum(calls) == steps and calls[-steps:] == [True] * steps
        fresh = noises(1)
        with torch.no_grad():
            state = SAMPLERS[sampler](denoise, x, ts[:5 - k], process, fresh)
        wanted = torch.autograd.grad(toy(SAMPLERS[sampler](denoise, state, ts[4 - k:], process, fresh)), params)
        grads.append(torch.autograd.grad(toy(image), params))
        for a, b in zip(grads[-1], wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(grads[0][1], grads[2][1], rtol=1e-2)


def test_finite_differences():
    """A linear model with two parameters, v = a x_t + b t, in fp64: the gradient of DRaFT-K is the central difference over the last k
    steps; and where the earlier steps do not depend on the parameters, DRaFT-K is the whole gradient."""
    process, x = RFlow(), torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator('fd'))
    ts = process.times(6).double()
    reward = lambda image: (image.square().mean() + 0.3 * image.mean())

    def value(a, b, k, frozen, only_late=False):
        def denoise(x, t):
            p, q = (a, b) if torch.is_grad_enabled() or not frozen else frozen
            live = not only_late or t <= ts[-3]
            v = (p * x + q * t) if live else 0.2 * x
            return x - t * v, x + (1 - t) * v
        image, = draft.drafted(denoise, x, SAMPLERS['euler'], ts, process, k)
        return reward(image)

    for k in (1, 3, 6):
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, -0.7))
        grad = torch.autograd.grad(value(a, b, k, None), (a, b))
        h, fixed = 1e-5, (0.4, -0.7)
        for i, g in enumerate(grad):
            up, down = ([v + s * h * (j == i) for j, v in enumerate(fixed)] for s in (1, -1))
            assert abs(float(value(*up, k, fixed) - value(*down, k, fixed)) / (2 * h) - float(g)) < 1e-8
    late = [torch.autograd.grad(value(a, b, k, None, only_late=True), (a, b)) for k in (2, 6)]
    torch.testing.assert_close(late[0], late[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('process', [RFlow(), DDPM(50, 'cosine', 'v')], ids=['rflow', 'ddpm'])
def test_lv(process):
    """DRaFT-LV: the image, then n denoisings of alpha x_0 + sigma eps at the last solver time, with gradients of one step each."""
    loras, denoise, x, params = ready(process)
    ts = process.times(5)
    one, two, three = draft.drafted(draft.Watched(denoise, loras, False), x, SAMPLERS['ddim'], ts, process, 1, 2, noises(3))
    fresh, t = noises(3), ts[-2]
    assert torch.equal(one, SAMPLERS['ddim'](denoise, x, ts, process))
    for got in (two, three):
        x_t = process.alpha(t) * one.detach() + process.sigma(t) * fresh()
        wanted = denoise(x_t, t)[0]
        assert torch.equal(got, wanted)
        for a, b in zip(torch.autograd.grad(toy(got), params), torch.autograd.grad(toy(wanted), params)):
            assert torch.equal(a, b)
    assert not torch.equal(two, three)


def test_the_penalty():
    """Mean squared distance of the velocity to the old network's: 0 at the start, the plain difference after, same with checkpointing,
    gradient included; 0 where no gradient flows."""
    process = RFlow()
    loras, denoise, x, params = ready(process)
    for again in (False, True):
        watched = draft.Watched(denoise, loras, True, again)
        list(draft.drafted(watched, x, SAMPLERS['euler'], process.times(4), process, 2))
        assert len(watched.drift) == 2 and {v.scale for v in loras.values()} == {1.0}
        t, drift = torch.tensor(0.6), draft.Watched(denoise, loras, True, again)
        drift(x, t)
        v = lambda: (lambda x_0, eps: eps - x_0)(*denoise(x, t))
        with draft.scaled(loras, 0.0):
            old = v().detach()
        wanted = (v() - old).square().mean()
        assert torch.allclose(drift.drift[0], wanted, rtol=1e-4) and wanted > 1e-8
        for a, b in zip(torch.autograd.grad(drift.drift[0], params), torch.autograd.grad(wanted, params)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9)
    for v in loras.values():
        nn.init.zeros_(v.B)
    watched = draft.Watched(denoise, loras)
    watched(x, torch.tensor(0.5))
    assert watched.drift[0] == 0


def test_flip_and_shift():
    """The image moves by whole pixels, at most 5 % of the side, and may be mirrored: no value is new. The mask moves along."""
    x, m = torch.rand(64, 1, 40, 40, generator=generator('i')) * 2 - 1, (torch.rand(64, 1, 40, 40, generator=generator('m')) > 0.5).float()
    moved, mask = common.augment(x, m, draft.flip_and_shift(64, 40, generator('u')))
    found = set()
    for a, b, c, d in zip(x, moved, m, mask):
        fits = [(flip, dy, dx) for flip in (False, True) for dy in range(-2, 3) for dx in range(-2, 3)
                if (torch.roll(a.flip(-1) if flip else a, (dy, dx), (-2, -1)) - b)[..., 2:-2, 2:-2].abs().max() < 1e-4]
        assert len(fits) == 1
        flip, dy, dx = fits[0]
        assert torch.equal(torch.roll(c.flip(-1) if flip else c, (dy, dx), (-2, -1))[..., 2:-2, 2:-2], d[..., 2:-2, 2:-2])
        found.add(fits[0])
    assert len(found) > 15 and {f[0] for f in found} == {True, False} and {f[1] for f in found} == {f[2] for f in found} == set(range(-2, 3))


def test_reward(detector):
    """Minus the calibrated logit of bad, of the image as it is on disk; the gradient passes the bounds."""
    d = common.load_detector(detector())
    x, mask = 1.5 * torch.randn(3, 1, 16, 16, generator=generator('x')), torch.zeros(3, 1, 16, 16)
    x.requires_grad_()
    value = draft.reward(d, x, mask)
    torch.testing.assert_close(value, -common.detector_logits(d, x.clamp(-1, 1), mask)[:, 0], rtol=1e-5, atol=1e-5)
    inner = x.detach().clamp(-1, 1).requires_grad_()
    wanted = torch.autograd.grad(-common.detector_logits(d, inner, mask)[:, 0].sum(), inner)[0]
    got = torch.autograd.grad(value.sum(), x)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert value.dtype == torch.float32 and got[x.abs() > 1].abs().max() > 0


def test_diversity():
    x = torch.rand(4, 1, 32, 32, generator=generator('d')) * 2 - 1
    assert draft.pair_diversity(x[:1].repeat(3, 1, 1, 1)) == pytest.approx((0, 0), abs=1e-6)
    pairs = [(x[i] - x[j]).square().mean() for i in range(4) for j in range(i + 1, 4)]
    apart, far = draft.pair_diversity(x)
    assert far == pytest.approx(float(torch.stack(pairs).mean().sqrt()), rel=1e-5) and apart > 0.8
    assert apart == pytest.approx(np.mean([1 - float(common.ms_ssim(x[i:i + 1], x[j:j + 1])) for i in range(4) for j in range(i + 1, 4)]), rel=1e-5)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def flags(trained, detector):
    return ['--bravo', trained / 'bravo', '--reward', detector(), '--iters', 4]


def bright(detector_, images, masks):
    """A toy reward that rises with the brightness of the image."""
    return torch.cat([-10 * images.mean((1, 2, 3))[:, None], torch.zeros(len(images), 6)], 1)


def same_run(a, b):
    x, y = load_checkpoint(a), load_checkpoint(b)
    assert x.keys() == y.keys()
    for part in ('net', 'ema', 'lora', 'best'):
        assert all(torch.equal(x[part][k], y[part][k]) for k in x[part]), part
    assert all(torch.equal(x['opt']['state'][k][n], y['opt']['state'][k][n]) for k in x['opt']['state'] for n in ('exp_avg', 'exp_avg_sq'))
    logs = [[{k: v for k, v in r.items() if k != 's_per_step'} for r in common.read_csv(f / 'log.csv')] for f in (a, b)]
    assert logs[0] == logs[1] and x['curve'] == y['curve'] and x['step'] == y['step']
    assert (a / 'sweep.json').read_bytes() == (b / 'sweep.json').read_bytes()


def test_the_reward_rises_and_the_run_is_a_run(call, trained, phantom, detector, tmp_path, monkeypatch, capsys):
    """Brightness as reward: held-out images get brighter, the sweep follows the scale, sample.py, --init and release take the folder,
    and --lora-scale goes from the old model's images, bit for bit, to the new one's."""
    monkeypatch.setattr(draft, 'detector_logits', bright)
    out = call('draft', tmp_path / 'draft', '--bravo', trained / 'bravo', '--reward', detector(), '--iters', 8, '--lr', 0.03, '--penalty', 0, '--batch-size', 4)
    table = json.loads((out / 'sweep.json').read_text())
    rewards = [r['reward'] for r in table['scales']]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.5 and [r['scale'] for r in table['scales']] == [0, 0.25, 0.5, 0.75, 1]
    assert table['scales'][0]['rise'] == 0 and not table['scales'][0]['accepted']
    for r in table['scales']:
        assert r['accepted'] == (r['low'] > 0 and r['diversity'] >= 0.95 * table['scales'][0]['diversity']) == (r['scale'] in table['accepted'])
    curve = load_checkpoint(out)['curve']
    assert curve[-1][1] > curve[0][1] and load_checkpoint(out)['best_step'] == max(curve, key=lambda c: c[1])[0]
    for name in ('log.png', 'sweep.png', 'samples_000008.png', 'args.json'):
        assert (out / name).stat().st_size > 100
    draw = lambda name, *more: [read_nifti(f)[0] for f in sorted(call('sample', tmp_path / name, '--data', phantom, '--n', 3, '--steps', 3, *more).glob('syn*/bravo.nii.gz'))]
    old, new = draw('old', '--bravo', trained / 'bravo'), draw('new', '--bravo', out)
    assert all(np.array_equal(a, b) for a, b in zip(old, draw('scale0', '--bravo', out, '--lora-scale', 0)))
    assert all(np.array_equal(a, b) for a, b in zip(new, draw('scale1', '--bravo', out, '--lora-scale', 1)))
    half = draw('half', '--bravo', out, '--lora-scale', 0.5)
    assert np.mean(old) < np.mean(half) < np.mean(new)
    state, lora = load_checkpoint(out), load_checkpoint(out)['best']
    W = state['ema']['conv_in.weight'] - state['net']['conv_in.weight']
    torch.testing.assert_close(W, (lora['conv_in.B'] @ lora['conv_in.A']).view_as(W), rtol=1e-4, atol=1e-6)
    assert common.load_run(out).hash != common.load_run(trained / 'bravo').hash == common.load_run(out, weights=0.0).hash
    call('bravo', tmp_path / 'more', '--rflow', '--init', out, '--iters', 1)
    analysis.main(analysis.get_args(['release', str(out), str(tmp_path / 'small.pt')]))
    assert common.load_run(tmp_path / 'small.pt').args.lora_rank == 8
    capsys.readouterr()
    again = ['--bravo', trained / 'bravo', '--iters', 8, '--lr', 0.03, '--penalty', 0, '--batch-size', 4]
    call('draft', out, *again, '--reward', detector(name='the same, elsewhere.pt'))
    assert 'complete' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        call('draft', out, *again, '--reward', detector(seed=1))
    assert e.value.code == 2 and 'another --bravo or --reward' in capsys.readouterr().err


@pytest.mark.parametrize('more', [['--k', 3, '--sampler', 'heun', '--penalty', 1], ['--k', 2, '--no-checkpoint', '--no-reward-augment', '--sampler', 'ddpm'],
                                  ['--checkpoint', '--rank', 2, '--alpha', 8, '--clip', 0.1, '--weight-decay', 0.1, '--seed', 3, '--dtype', 'bf16']], ids=str)
def test_every_flag(call, flags, tmp_path, more):
    """Runs, leaves a finite log, and moves the weights."""
    out = call('draft', tmp_path / 'run', *flags, '--iters', 2, *more)
    rows = common.read_csv(out / 'log.csv')
    assert [r['step'] for r in rows] == ['1', '2'] and all(np.isfinite(float(r[k])) for r in rows for k in ('reward', 'drift', 'grad_norm'))
    state = load_checkpoint(out)
    assert state['args']['lora_rank'] == (2 if '--rank' in more else 8) and any(v.abs().max() > 0 for k, v in state['lora'].items() if k.endswith('.B'))


def test_a_ddpm_run_and_a_slice_level(call, trained, detector, tmp_path):
    base = call('bravo', tmp_path / 'level', '--steps', 20, '--slice-level', '--p-uncond', 0.1)
    call('draft', tmp_path / 'run', '--bravo', base, '--reward', detector(), '--iters', 1, '--k', 2)
    assert load_checkpoint(tmp_path / 'run')['extra_dim'] == 1


def test_resume_gives_the_same_bits(call, flags, tmp_path, monkeypatch):
    """SIGTERM at step 3 of 4, between two looks, and the same command again: the run that was never stopped."""
    more = [*flags, '--iters', 4, '--lv', 1, '--save-every', 3]
    straight, real, count = call('draft', tmp_path / 'straight', *more), nn.utils.clip_grad_norm_, []
    with monkeypatch.context() as m:
        m.setattr(nn.utils, 'clip_grad_norm_', lambda *a: (count.append(1), os.kill(os.getpid(), signal.SIGTERM) if len(count) == 3 else None, real(*a))[2])
        with pytest.raises(SystemExit) as e:
            call('draft', tmp_path / 'cut', *more)
    assert e.value.code == 143 and load_checkpoint(tmp_path / 'cut')['step'] == 3 and not (tmp_path / 'cut/sweep.json').exists()
    same_run(straight, call('draft', tmp_path / 'cut', *more))


def test_it_stops_early_and_goes_back(call, flags, tmp_path, monkeypatch, capsys):
    """A held-out reward that falls: stops after --patience looks, keeps the weights it started with, accepts no scale."""
    looks = iter(range(1000))
    monkeypatch.setattr(draft, 'reward', lambda d, x, m, u=None: x.flatten(1).mean(1) if torch.is_grad_enabled() else torch.full((len(x),), -float(next(looks))))
    out = call('draft', tmp_path / 'run', *flags, '--iters', 50, '--patience', 2)
    state = load_checkpoint(out)
    assert state['step'] == 4 and state['best_step'] == 0 and all(torch.equal(state['ema'][k], v) for k, v in state['net'].items())
    assert any(v.abs().max() > 0 for k, v in state['lora'].items() if k.endswith('.B'))
    assert json.loads((out / 'sweep.json').read_text())['use'] == 0 and 'no scale is accepted' in capsys.readouterr().out


def test_a_number_that_is_none_stops_the_run(call, flags, tmp_path, monkeypatch, capsys):
    real = draft.detector_logits
    monkeypatch.setattr(draft, 'detector_logits', lambda d, x, m: real(d, x, m) * (float('nan') if torch.is_grad_enabled() else 1))
    with pytest.raises(SystemExit) as e:
        call('draft', tmp_path / 'run', *flags)
    assert e.value.code == 1 and 'step 0' in capsys.readouterr().err and not (tmp_path / 'run/ckpt.pt').exists()


BOTH = '''
import json, sys
import torch
torch.set_num_threads(1)
import draft, sample
tune, draw = json.loads(sys.argv[1])
draft.main(draft.get_args(tune))
sample.main(sample.get_args(draw))
'''


def test_two_processes_equal_one(call, flags, trained, phantom, cache, detector, tmp_path):
    """torchrun with 2: rewards and gradients within 1e-4; a gated set keeps and rejects the same candidates."""
    tune = [*flags, '--iters', 2, '--k', 2, '--lv', 0]
    draw = ['--bravo', trained / 'bravo', '--data', phantom, '--steps', 1, '--n', 7, '--gate', detector(), '--batch-size', 2]
    p = sorted(float(r['p_bad']) for r in common.read_csv(call('sample', tmp_path / 'all', *draw, '--threshold', 1) / 'manifest.csv'))
    draw += ['--threshold', (p[3] + p[4]) / 2, '--max-draws', 100]                                     # about half of the draws pass
    one = call('draft', tmp_path / 'one', *tune), call('sample', tmp_path / 'set_one', *draw)
    shared = ['--cache', cache, '--device', 'cpu', '--dtype', 'fp32', '--out']
    tune = ['--data', phantom, '--batch-size', 2, '--held-out', 2, '--seeds', 2, '--eval-every', 2, '--steps', 3, *tune, *shared, tmp_path / 'two']
    (tmp_path / 'both.py').write_text(BOTH)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    root = str(common.Path(common.__file__).parent)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={port}', str(tmp_path / 'both.py'),
                           json.dumps([[str(f) for f in tune], [str(f) for f in [*draw, *shared, tmp_path / 'set_two']]])], cwd=root, capture_output=True, text=True,
                          timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root})
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (common.read_csv(f / 'log.csv') for f in (one[0], tmp_path / 'two'))
    assert len(a) == len(b) == 2
    for x, y in zip(a, b):
        assert all(abs(float(x[k] or 0) - float(y[k] or 0)) <= 1e-4 * (1 + abs(float(x[k] or 0))) for k in ('step', 'reward', 'drift', 'grad_norm', 'held_out'))
    x, y = load_checkpoint(one[0])['lora'], load_checkpoint(tmp_path / 'two')['lora']
    assert all(torch.allclose(x[k], y[k], rtol=0, atol=1e-4) for k in x)
    for name in ('manifest', 'rejected'):
        rows = [[(r['index'], r['candidate']) for r in common.read_csv(f / f'{name}.csv')] for f in (one[1], tmp_path / 'set_two')]
        assert rows[0] == rows[1] and rows[0]


def test_images_below_the_window_of_ms_ssim_are_refused(call, detector, tmp_path, capsys):
    run = call('bravo', tmp_path / 'small', '--rflow', '--size', 8, '--iters', 1)
    with pytest.raises(SystemExit) as e:
        call('draft', tmp_path / 'draft', '--bravo', run, '--reward', detector())
    assert e.value.code == 2 and 'draws 8 pixels' in capsys.readouterr().err
