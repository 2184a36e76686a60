"""Networks and what trains them: U-Net pieces, EMA, learning rate, LR finder, batches, perceptual loss, checkpoints, pictures."""
import argparse
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import train_bravo
import train_seg
from common import EMA, VGG16, LossByT, Upsample, UNet, batch_rows, generator, load_run, lr_at, lr_suggestions


@pytest.fixture
def run(tmp_path, phantom):
    """run(kind, name, *flags): trains 4 steps of the tiny preset on the phantom, returns the run folder."""
    def train(kind, name, *flags, iters=4):
        script = {'seg': train_seg, 'bravo': train_bravo}[kind]
        length = ([] if iters is None else ['--iters', str(iters)]) + ([] if '--sample-every' in flags else ['--sample-every', '100'])
        script.main(script.get_args(['--preset', 'tiny', '--dtype', 'fp32', '--data', str(phantom), '--cache', str(tmp_path / 'cache'), '--out',
                                     str(tmp_path / name), *length, *flags]))
        return tmp_path / name
    return train


def scramble(net, seed=0):
    """Every parameter random, those that start at zero too."""
    g = generator('scramble', seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.5) + (p.ndim == 1) * 0.5
    return net


@pytest.mark.parametrize('dims', [2, 3])
def test_upsample_is_nearest_then_conv(dims):
    """The convolution on the small grid equals nearest upsampling followed by the 3-wide convolution, gradients too."""
    Conv = nn.Conv2d if dims == 2 else nn.Conv3d
    up = scramble(Upsample(6, lambda i, o: Conv(i, o, 3, padding=1)).double())
    up.double()
    x = torch.randn(2, 6, *(4, 5, 3)[:dims], generator=generator('up'), dtype=torch.float64, requires_grad=True)
    mine, plain = up(x), up.conv(F.interpolate(x, scale_factor=2, mode='nearest'))
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)
    w = torch.randn(plain.shape, generator=generator('w'), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((mine * w).sum(), (x, *up.parameters())), torch.autograd.grad((plain * w).sum(), (x, *up.parameters()))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_no_level_is_blind_to_time():
    """One channel a group would let GroupNorm take the time embedding away: every preset has more, and the effect is real."""
    for preset in common.PRESETS.values():
        assert all(c // math.gcd(c, preset['norm_groups']) > 1 for c in preset['channels'])
    x, t = torch.randn(2, 1, 8, 8, generator=generator('blind')), torch.tensor([0.1, 0.9])
    blind, sees = (scramble(UNet(1, 1, (8, 8), (0, 0), 1, 8, norm_groups=n)) for n in (8, 2))
    change = lambda net: float((net(x, t) - net(x, t.flip(0))).detach().abs().max() / net(x, t).detach().std())
    assert change(blind) < 1e-3 < 0.05 < change(sees)


@pytest.mark.parametrize('dims', [2, 3])
def test_unet(dims):
    """Zero at the start; uses time, context and extra; no image depends on its batch; channels_last changes nothing."""
    net = UNet(3, 1, (8, 16), (0, 1), 1, 8, context_dim=5, dims=dims, extra_dim=2, norm_groups=2)
    g = generator('unet', dims)
    x, t = torch.randn(2, 3, *(8,) * dims, generator=g), torch.tensor([0.2, 0.9])
    context, extra = torch.randn(2, 4, 5, generator=g), torch.randn(2, 2, generator=g)
    assert net(x, t, context, extra).abs().max() == 0
    scramble(net).requires_grad_(False)
    y = net(x, t, context, extra)
    assert y.shape == (2, 1, *(8,) * dims) and y.std() > 0.1
    torch.testing.assert_close(net(x[1:], t[1:], context[1:], extra[1:]), y[1:], rtol=0, atol=1e-5 * float(y.abs().max()))
    for other in (net(x, t + 0.05, context, extra), net(x, t, context * 2, extra), net(x, t, context, extra * 2)):
        assert (other - y).abs().max() > 1e-3
    torch.testing.assert_close(net(x, t, context.flip(1), extra), y, rtol=0, atol=1e-5 * float(y.abs().max()))      # a set
    if dims == 2:
        last = net.to(memory_format=torch.channels_last)(x, t, context, extra)
        torch.testing.assert_close(last, y, rtol=0, atol=1e-5 * float(y.abs().max()))


def test_ema():
    """Weights of the average sum to one and follow the warm-up in closed form; a constant stays; buffers are copied."""
    net = nn.Linear(1, 1, bias=False)
    net.register_buffer('count', torch.zeros(1))
    ema, expected = EMA(net, 0.99), float(net.weight.detach())
    for n in range(1, 300):
        net.weight.data.fill_(math.sin(n))
        net.count += 1
        ema.update(net)
        d = min(0.99, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * math.sin(n)
    assert abs(float(ema.net.weight) - expected) < 1e-6 and float(ema.net.count) == 299
    constant = EMA(net, 0.9999)
    for _ in range(50):
        constant.update(net)
    assert torch.allclose(constant.net.weight, net.weight, rtol=1e-6)
    raw = EMA(net, 0.0)
    net.weight.data += 1
    raw.update(net)
    assert torch.equal(raw.net.weight, net.weight)


def test_learning_rate():
    """Rises linearly, meets the cosine without a jump, ends at a hundredth; the cosine's mean is half way."""
    args = argparse.Namespace(lr=2e-4, warmup=50, iters=1050, progressive=None)
    lrs = [lr_at(i, args) for i in range(1051)]
    assert lrs[0] == 2e-4 / 50 and lrs[49] == lrs[50] == 2e-4 and abs(lrs[1050] - 2e-6) < 1e-12
    assert np.all(np.diff(lrs[:50]) > 0) and np.all(np.diff(lrs[50:]) < 0)
    assert abs(np.mean(lrs[50:1051]) - (2e-4 + 2e-6) / 2) < 1e-9
    assert lr_at(0, argparse.Namespace(lr=1.0, warmup=0, iters=10, progressive=None)) == 1.0


def test_lr_suggestions():
    """A curve whose steepest point and valley are known gives them."""
    lrs = np.geomspace(1e-6, 1, 101)
    x = np.log10(lrs)
    losses = 1 / (1 + np.exp(4 * (x + 3))) + np.where(x > -1, 3 * (x + 1) ** 2, 0)          # steepest at 1e-3, rises from about 1e-1
    steep, valley = lr_suggestions(lrs, losses)
    assert abs(math.log10(steep) + 3) < 0.061
    end = int(np.argmin(losses))
    assert valley == lrs[int(end / 3) + int(end / 6)]
    bumpy = [5, 6, 4, 3, 3.5, 2, 1, 7, 8]                                                   # longest fall: 5 4 3 2 1, or 6 4 3 2 1
    assert lr_suggestions(np.geomspace(1, 256, 9), bumpy)[1] == np.geomspace(1, 256, 9)[0 + 2 + 1]


def test_batches():
    """Every row once an epoch, another order each epoch, a function of the step alone, also when a batch spans epochs."""
    rows = np.concatenate([batch_rows(10, 4, s, 0) for s in range(10)])                     # 40 = 4 epochs
    epochs = rows.reshape(4, 10)
    assert all(sorted(e) == list(range(10)) for e in epochs.tolist()) and len({tuple(e) for e in epochs.tolist()}) == 4
    assert np.array_equal(batch_rows(10, 4, 2, 0), rows[8:12]) and not np.array_equal(batch_rows(10, 10, 0, 1), epochs[0])
    assert len(batch_rows(3, 8, 0, 0)) == 8


def test_loss_by_t():
    """Bin means equal a direct group-by; training and held-out, tumour and background apart; images without tumour do not count there."""
    track, g = LossByT('cpu'), generator('bins')
    L, square = torch.randn(500, generator=g) * 6, torch.rand(500, 2, 3, 3, generator=g)
    mask = (torch.rand(500, 1, 3, 3, generator=g) > 0.5).float() * (torch.arange(500) % 4 > 0).reshape(-1, 1, 1, 1)
    track.add(0, L[:300], square[:300], mask[:300]), track.add(0, L[300:], square[300:], mask[300:]), track.add(1, L[:10], square[:10])
    edges, m = common.LOSS_BINS.tolist(), mask.expand_as(square).bool()
    for b in range(20):
        inside = ((L >= (edges[b] if b else -1e9)) & (L <= (edges[b + 1] if b < 19 else 1e9))).nonzero().flatten().tolist()
        for region, pick in enumerate((lambda i: square[i], lambda i: square[i][m[i]], lambda i: square[i][~m[i]])):
            e = [float(pick(i).mean()) for i in inside if pick(i).numel()]
            assert track.sums[0, region, 1, b] == len(e) and abs(float(track.sums[0, region, 0, b]) - sum(e)) < 1e-4
    assert track.sums[1, 0, 1].sum() == 10 and track.sums[1, 1:].sum() == 0
    assert track.held_out() == pytest.approx(float(square[:10].mean()), rel=1e-6)


@pytest.fixture(scope='module')
def vgg(tmp_path_factory):
    """VGG16 with random weights, and heads, from files as a user would give them."""
    folder = tmp_path_factory.mktemp('vgg')
    net, g = VGG16.__new__(VGG16), generator('vgg')
    shapes, c, i = {}, 3, 0
    for width in VGG16.LAYERS:
        if width == 'M':
            i += 1
            continue
        shapes |= {f'features.{i}.weight': (width, c, 3, 3), f'features.{i}.bias': (width,)}
        c, i = width, i + 2
    torch.save({k: torch.randn(s, generator=g) * (2 / np.prod(s[1:])) ** 0.5 for k, s in shapes.items()}, folder / 'vgg.pth')
    torch.save({f'lin{j}.model.1.weight': torch.rand(1, n, 1, 1, generator=g) for j, n in enumerate((64, 128, 256, 512, 512))}, folder / 'lin.pth')
    return folder / 'vgg.pth', folder / 'lin.pth'


def test_perceptual(vgg):
    """d(x,x)=0, symmetric, positive; one channel is three equal ones; frozen; only images with SNR > 1 count, the rest has
    no gradient; with heads of one the distance is the unweighted one."""
    net = VGG16(*vgg)
    g = generator('p')
    x, y = torch.rand(4, 1, 32, 32, generator=g) * 2 - 1, torch.rand(4, 1, 32, 32, generator=g) * 2 - 1
    assert net.distance(x, x).abs().max() == 0 and net.distance(x, y).min() > 0
    torch.testing.assert_close(net.distance(x, y), net.distance(y, x))
    torch.testing.assert_close(net.distance(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)), net.distance(x, y))
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    plain = VGG16(vgg[0])
    for i in range(5):
        getattr(net, f'head{i}').fill_(1.0)
    torch.testing.assert_close(net.distance(x, y), plain.distance(x, y))

    def features(image):                                                                       # written out, from the file
        state, h, out = torch.load(vgg[0], weights_only=True), image.double().repeat(1, 3, 1, 1), []
        h = ((h + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            h = F.max_pool2d(h, 2) if block[0] else h
            for i in block:
                h = F.conv2d(h, state[f'features.{i}.weight'].double(), state[f'features.{i}.bias'].double(), padding=1).clamp(min=0)
            out.append(h)
        return out
    heads = torch.load(vgg[1], weights_only=True)
    wanted = sum((((a / (a ** 2).sum(1, True) ** 0.5 - b / (b ** 2).sum(1, True) ** 0.5) ** 2) * heads[f'lin{i}.model.1.weight'].double()).sum(1).mean((1, 2))
                 for i, (a, b) in enumerate(zip(features(x), features(y))))                    # Zhang 2018, eq. 1
    torch.testing.assert_close(VGG16(*vgg).distance(x, y).double(), wanted, rtol=1e-4, atol=0)
    process, t = common.RFlow(), torch.tensor([0.2, 0.49, 0.51, 0.9])
    x0_hat = x.clone().requires_grad_()
    loss = train_bravo.perceptual_loss(plain, x0_hat, y, t, process)
    torch.testing.assert_close(loss, plain.distance(x, y)[:2].sum())
    loss.backward()
    assert x0_hat.grad[:2].abs().sum() > 0 and x0_hat.grad[2:].abs().sum() == 0
    assert train_bravo.perceptual_loss(plain, x0_hat, y, torch.full((4,), 0.7), process) == 0
    for mine, layer in zip(plain(x), (3, 8, 15, 22, 29)):
        assert mine.shape[1] == plain.features[layer - 1].out_channels and mine.min() >= 0


def test_flag_off_is_free_on_is_not(run, vgg):
    """Each technique flag changes the weights when on; the same command twice gives the same bits."""
    weights = lambda out: torch.cat([v.flatten() for v in common.load_checkpoint(out)['net'].values()])
    base = weights(run('bravo', 'base', '--rflow'))
    assert torch.equal(base, weights(run('bravo', 'again', '--rflow')))
    on = {'min-snr': ['--min-snr', '5'], 'logit': ['--logit-normal'], 'grid': ['--steps', '100'], 'augment': ['--augment'], 'flip': ['--augment', 'flip'],
          'perceptual': ['--perceptual', '0.1', '--perceptual-weights', str(vgg[0]), '--lpips-weights', str(vgg[1])], 'seed': ['--seed', '1'],
          'laplace': ['--schedule', 'laplace'], 'centre': ['--schedule', 'laplace', '--schedule-centre', '3'], 'mix': ['--schedule', 'laplace', '--uniform-mix', '0.9'],
          'width': ['--schedule', 'laplace', '--schedule-width', '0.1'], 'groups': ['--norm-groups', '8'], 'decay': ['--weight-decay', '0.5'], 'warmup': ['--warmup', '3'], 'clip': ['--clip', '0.01'], 'lr': ['--lr', '0.002']}
    made = {name: weights(run('bravo', name, '--rflow', *flags)) for name, flags in on.items()}
    assert not any(torch.equal(base, w) for w in made.values())
    assert not any(torch.equal(made['laplace'], made[n]) for n in ('centre', 'mix', 'width'))
    again = common.load_checkpoint(run('bravo', 'raw', '--rflow', '--ema-decay', '0'))
    assert all(torch.equal(again['ema'][k], again['net'][k]) for k in again['net'])
    parts = weights(run('bravo', 'parts', '--rflow', '--accumulate', '2'))
    torch.testing.assert_close(parts, base, rtol=0, atol=1e-5)                             # Adam divides by tiny numbers at first


@pytest.mark.parametrize('kind', ['seg', 'bravo'])
@pytest.mark.parametrize('flags', [
    ['--target', 'eps', '--labels', '1'], ['--target', 'v', '--schedule', 'cosine'], ['--target', 'x0', '--schedule', 'linear', '--steps', '50'],
    ['--rflow', '--steps', '100', '--slice-level', '--empty-slices', '0.5', '--speck', '0', '--size', '24'],
    ['--rflow', '--layers', '2', '--channels', '8,8,16', '--attention', '0,1,1', '--head-channels', '4', '--batch-size', '2'],
    ['--rflow', '--keep-every', '2', '--save-every', '100', '--sample-every', '2', '--device', 'cpu', '--dtype', 'bf16'],
    ['--rflow', '--schedule', 'cauchy', '--schedule-centre', '-1', '--schedule-width', '0.5', '--uniform-mix', '0.3', '--norm-groups', '4'],
    ['--rflow', '--model', 'dit', '--model-size', 'S', '--patch', '4'],
    ['--rflow', '--compile'],
], ids=lambda f: ' '.join(f)[:40])
def test_every_flag_runs(run, kind, flags, monkeypatch):
    """Every way of training ends with a run that loads, a log, pictures and a finite loss. --compile traces the network; no C++ compiler is asked for."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    out = run(kind, 'run', *(f if kind == 'bravo' else f.replace('bf16', 'fp32') for f in flags))          # bf16 is emulated on many machines
    trained = load_run(out)
    assert trained.step == 4 and trained.args.script == kind
    rows = common.read_csv(out / 'log.csv')
    assert rows[-1]['step'] == '4' and all(math.isfinite(float(r['loss'])) for r in rows) and float(rows[-1]['held_out']) > 0
    assert Image.open(out / 'samples_000004.png').size[0] > 800 and Image.open(out / 'log.png').size == (640, 400)
    if '--keep-every' in flags:
        assert {f.name for f in out.glob('ckpt*')} == {'ckpt.pt', 'ckpt.prev.pt', 'ckpt_2.pt', 'ckpt_4.pt'}
        assert load_run(out / 'ckpt_2.pt').step == 2
    if '--model-size' in flags:
        assert trained.net.width == 384
    if '--compile' in flags:                                                                 # another order of sums at most
        plain = load_run(run(kind, 'plain', '--rflow')).net
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(trained.net.parameters(), plain.parameters()))


def test_minutes_are_frozen(run, capsys):
    """--minutes becomes a number of steps, stored; the same command again finds the run complete."""
    out = run('bravo', 'timed', '--rflow', '--minutes', '0.003', iters=None)
    steps = common.load_checkpoint(out)['args']['iters']
    assert steps >= 1 and common.load_checkpoint(out)['step'] == steps
    capsys.readouterr()
    run('bravo', 'timed', '--rflow', '--minutes', '0.003', iters=None)
    assert f'complete at step {steps}' in capsys.readouterr().out


def test_init(run, tmp_path):
    """--init starts from a run's EMA, or from a MONAI state dict; x0-eps turns its sign; the range is kept for sampling."""
    start = run('bravo', 'start', '--rflow')
    first = common.load_checkpoint(run('bravo', 'more', '--rflow', '--init', str(start), iters=0))
    assert all(torch.equal(first['net'][k], v) for k, v in common.load_checkpoint(start)['ema'].items())
    net = scramble(UNet(2, 1, (8, 8), (0, 1), 1, 8, norm_groups=2))
    monai = {}
    for k, v in net.state_dict().items():
        if k.endswith(('qkv.weight', 'qkv.bias')):
            monai |= {k.replace('qkv', f'to_{n}'): part for n, part in zip('qkv', v.chunk(3))}
            continue
        k = k.replace('resample.conv.', 'upsampler.postconv.conv.').replace('resample.', 'downsampler.op.conv.').replace('.skip.', '.skip_connection.conv.')
        for conv in ('conv_in.', 'conv1.', 'conv2.', 'out.2.'):
            k = k.replace(conv, conv + 'conv.') if k.startswith(conv) or conv[:4] == 'conv' and f'.{conv}' in k and 'postconv' not in k else k
        monai[k.replace('attn.out.', 'attn.out_proj.').replace('.time.', '.time_emb_proj.')] = v
    torch.save({'state_dict': {f'module.{k}': v for k, v in monai.items()}}, tmp_path / 'monai.pt')
    out = run('bravo', 'monai', '--rflow', '--init', str(tmp_path / 'monai.pt'), '--init-target', 'x0-eps', '--init-range', '0,1', iters=0)
    state = common.load_checkpoint(out)
    for k, v in net.state_dict().items():
        assert torch.equal(state['net'][k], -v if k.startswith('out.2') else v), k
    assert load_run(out).process.range == (0.0, 1.0)


def test_pictures(tmp_path):
    """The outline lies on the mask's border; a grid has a cell for each picture; a plot with one point and odd values works."""
    mask = np.zeros((16, 16))
    mask[4:9, 5:12] = 1
    red = (common.outline(np.zeros((16, 16)), mask) == (255, 80, 60)).all(-1)
    assert red.sum() == 2 * 5 + 2 * 7 - 4 and (mask[red] == 1).all()
    common.save_grid(tmp_path / 'g.png', [[np.zeros((16, 16))] * 3] * 2, ['a', 'b'], zoom=2)
    assert Image.open(tmp_path / 'g.png').size == (100 + 3 * 34, 2 * 34)
    common.plot(tmp_path / 'p.png', {'a': ([1, 10, 100], [1e-3, float('nan'), 1]), '.b': ([5], [0.1]), 'none': ([], [])}, 't', 'x', 'y', True, True)
    assert Image.open(tmp_path / 'p.png').size == (640, 400)


def test_lr_find_is_of_all_processes(tmp_path, monkeypatch):
    """A process sees its part of a batch; the curve is of the mean over all, so that all stop at the same step."""
    net = torch.nn.Linear(1, 1)
    monkeypatch.setattr(common, 'world', lambda: 2)
    monkeypatch.setattr(common.dist, 'all_reduce', lambda v, *_: v.add_(3))                     # what the other process adds
    common.lr_find(lambda step, lr: (torch.tensor(1.0), None), net, torch.optim.AdamW(net.parameters()), tmp_path, steps=5)
    assert [float(r['loss']) for r in common.read_csv(tmp_path / 'lr_find.csv')] == pytest.approx([2] * 5)
