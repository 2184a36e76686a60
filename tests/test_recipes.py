"""What is trained on and at what cost: densities of t, curriculum, sizes in turn, spectra, pure bf16, 2:4 sparsity, pruning."""
import argparse
import copy
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import sample
import train_bravo
from common import (DDPM, EMA, Curriculum, PureBF16, RFlow, TwoFour, UNet, build_optimizer, generator, load_checkpoint, load_run, lr_at, prune, quantile,
                    sparse_layers, sparsify, stage_of, stochastic)
from test_errors import refused
from test_reliability import assert_same_run, code, signal_at
from test_training import scramble


def resumes(call, tmp_path, monkeypatch, kind, *flags):
    """The flags survive a stop after 2 of 4 steps bit for bit. Returns the run."""
    straight = call(kind, tmp_path / 'straight', *flags)
    with monkeypatch.context() as m:
        signal_at(m, 2, signal.SIGTERM)
        assert code(call, kind, tmp_path / 'cut', *flags) == 143
    assert load_checkpoint(tmp_path / 'cut')['step'] == 2
    a, b = (load_checkpoint(f) for f in (straight, call(kind, tmp_path / 'cut', *flags)))
    assert all(torch.equal(a[n][k], b[n][k]) for n in ('net', 'ema') for k in a[n]) and a['curriculum'] == b['curriculum']
    return straight


# -- where the noise goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('process', [RFlow(), DDPM(1000)], ids=['rflow', 'ddpm'])
@pytest.mark.parametrize('density, cdf', [('laplace', lambda L, c, w: torch.where(L < c, torch.exp((L - c) / w) / 2, 1 - torch.exp((c - L) / w) / 2)),
                                          ('cauchy', lambda L, c, w: 0.5 + torch.atan((L - c) / w) / math.pi)], ids=['laplace', 'cauchy'])
def test_densities_of_log_snr(process, density, cdf):
    """KS distance to the closed form where the process reaches; centre at u = 1/2; falls with u; the mix is uniform on -10 to 10."""
    n, c, w = 50_000, 0.5, 0.7
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    assert quantile(density, torch.tensor(0.5), c, w) == c and (quantile(density, u, c, w).diff() < 0).all()
    torch.testing.assert_close(cdf(quantile(density, u, c, w), c, w), 1 - u, rtol=0, atol=1e-12)
    process.density, process.centre, process.width, process.mix, process.steps = density, c, w, 0.0, process.steps
    grid, process.steps = process.steps, 0 if isinstance(process, RFlow) else process.steps
    L = process.log_snr(process.draw_t(n, generator(density))).double().sort().values
    inside = (L > -8) & (L < 8)                                                # DDPM's table, and a grid of 1000, end near there
    apart = (cdf(L, c, w) - torch.linspace(0, 1, n, dtype=torch.float64)).abs()[inside].max()
    assert apart < (1.63 / math.sqrt(n) if isinstance(process, RFlow) else 0.01)            # KS at 1 %; on the grid one step of it more
    process.mix = 0.3
    L = process.log_snr(process.draw_t(n, generator(density))).double()
    expected = 0.7 * (cdf(torch.tensor(-3.0), c, w) + 1 - cdf(torch.tensor(4.0), c, w)) + 0.3 * (1 - 7 / 20)
    assert abs(float(((L < -3) | (L > 4)).double().mean()) - float(expected)) < 0.01
    process.density, process.mix, process.steps = 'uniform', 0.0, grid
    assert torch.equal(process.draw_t(9, generator(1)), RFlow(grid).draw_t(9, generator(1)))       # off: the same bits


@pytest.mark.parametrize('process', [RFlow(), DDPM(1000, 'cosine'), DDPM(1000, 'linear')], ids=['rflow', 'cosine', 'linear'])
def test_shift_by_resolution(process):
    """log-SNR falls by 2 log a, composes, and is that of averaged pixels: the mean of 2 x 2 has a quarter of the noise."""
    t = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    L = lambda t: process.log_snr(t, torch.float64)
    torch.testing.assert_close(L(process.shifted(t, 2)), L(t) - 2 * math.log(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(process.shifted(process.shifted(t, 2), 1.5), process.shifted(t, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(RFlow().shifted(t, 2), 2 * t / (1 + t))
    process.shift = 2.0                                                         # sampling walks where the training was, on the grid
    own, plain = process.times(10, own=True), process.times(10)
    assert own[[0, -1]].tolist() == [1, 0] and plain[5] == 0.5 and (own - process.shifted(plain, 2)).abs().max() <= (0.501 / process.steps if process.steps else 1e-6)
    assert process.shifted(torch.tensor(1.0), 2) == 1 and process.shifted(torch.tensor(0.0), 2) == 0
    noise = torch.randn(4, 1, 256, 256, generator=generator('noise'))
    assert abs(float(F.avg_pool2d(noise, 2).var() * 4) - 1) < 0.02
    ts = process.times(10, shift=2.0)
    assert ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all() and (ts[1:-1] > process.times(10)[1:-1]).all()


def test_curriculum_windows_and_moves():
    """Noise first for eps and v, data first for x0; a range more when the loss stands still, or after 4 checks; all t at the end."""
    make = lambda target, n=4, iters=1280: Curriculum(argparse.Namespace(curriculum=n, target=target, iters=iters))
    assert make('v').window == (0.75, 1.0) and make('x0').window == (0.0, 0.25) and make('v', 0).window == (0.0, 1.0)
    still, falling = make('eps'), make('eps')                                  # a check every 1280 / (2 x 4 x 4) = 40 steps
    seen = []
    for step in range(20, 1281, 20):
        before = still.state[0]
        assert still.add([1.0] * 20, step) == (still.state[0] > before)             # the loops let the average forget then
        falling.add([0.9 ** (step / 20)] * 20, step)
        seen.append((still.state[0], falling.state[0]))
    ranges = lambda k: [next(20 * (i + 1) for i, s in enumerate(seen) if s[k] == r) for r in (2, 3, 4)]
    assert ranges(0) == [80, 160, 240] and ranges(1) == [160, 320, 480]
    assert still.window == (0.0, 1.0)
    odd = make('eps')                                                          # losses that come in other portions change nothing
    for end in range(10, 1281, 10):
        odd.add([1.0] * 10, end)
        if end % 20 == 0 and end <= 240:
            assert odd.state[0] == seen[end // 20 - 1][0]
    g, process = generator('window'), RFlow(100)
    assert process.draw_t(500, g, (0.75, 1.0)).min() > 0.75 and process.draw_t(500, g, (0.0, 0.25)).max() <= 0.25
    assert torch.equal(process.draw_t(9, generator(2), (0.0, 1.0)), process.draw_t(9, generator(2)))


def test_stages_of_sizes():
    """As many steps at each size, every step in one stage that begins at its first; warmed up anew; before the length is known in turn."""
    args = argparse.Namespace(progressive=(8, 16, 32), iters=100, warmup=5, lr=1.0)
    stages = [stage_of(i, args) for i in range(100)]
    assert [sum(s[0] == k for s in stages) for k in range(3)] == [34, 33, 33]
    assert all(stages[first] == (k, first) and (first == 0 or stages[first - 1][0] == k - 1) for k, first in {*stages})
    plain = argparse.Namespace(progressive=None, iters=100, warmup=5, lr=1.0)
    for i in range(100):
        k, first = stages[i]
        share = min(1, (i - first + 1) / 5) if k else 1
        assert lr_at(i, args) == pytest.approx(lr_at(i, plain) * share, rel=1e-12)
    args.iters = None
    assert [stage_of(i, args)[0] for i in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize('kind, flags', [('bravo', ['--rflow', '--progressive', '8,16']), ('seg', ['--rflow', '--progressive', '8,16']),
                                         ('bravo', ['--rflow', '--schedule', 'laplace']), ('bravo', ['--schedule', 'cauchy', '--steps', 10]),
                                         ('bravo', ['--rflow', '--curriculum', 3]), ('bravo', ['--rflow', '--fft', 1, '--fft-log', 0.1]),
                                         ('bravo', ['--rflow', '--dtype', 'pure-bf16']), ('seg', ['--dtype', 'pure-bf16', '--kahan', '--steps', 10]),
                                         ('bravo', ['--rflow', '--sparse24', '--dense-tail', 0.5]),
                                         ('bravo', ['--rflow', '--sparse24', '--dtype', 'pure-bf16'])], ids=str)
def test_flags_resume_and_sample(call, phantom, tmp_path, monkeypatch, kind, flags):
    run = resumes(call, tmp_path, monkeypatch, kind, *flags)
    more = ['--bravo', run, '--data', phantom] if kind == 'bravo' else ['--seg', run]
    assert len(list(call('sample', tmp_path / 'set', *more, '--n', 2, '--steps' if kind == 'bravo' else '--seg-steps', 3).glob('syn_*'))) == 2


def test_progressive_ends_where_the_last_size_is(call, tmp_path, capsys):
    """The network sees each size in turn; the run is one of the last size and samples with its shift."""
    out = call('bravo', tmp_path / 'run', '--rflow', '--progressive', '8,16,32', '--iters', 6, '--sample-every', 2)
    told = capsys.readouterr().out
    assert all(f'slices of {s}x{s}' in told for s in (8, 16, 32))
    run = load_run(out)
    assert run.args.size == 32 and run.process.shift == 4 and len(list(out.glob('samples_*.png'))) == 3


def test_fft_loss():
    """Zero at equality and for noisy times; focal with even weights is the squared error (Parseval); one frequency is told from the others;
    the logarithm does not see a shift."""
    g, process, t = generator('fft'), RFlow(), torch.tensor([0.2, 0.3, 0.9])
    x = torch.randn(3, 1, 16, 16, generator=g)
    assert train_bravo.fft_loss(x, x, t, process, 1, 1) == 0
    other = x.clone()
    other[2] += 1
    assert train_bravo.fft_loss(other, x, t, process, 1, 1) == 0               # t = 0.9 has SNR below 1
    wave = 0.1 * torch.cos(2 * math.pi * 3 * torch.arange(16) / 16)[None, None, None].expand(3, 1, 16, 16)
    one = train_bravo.fft_loss(x + wave, x, t, process, 1, 0)                    # both bins of the wave have weight 1
    assert float(one) == pytest.approx(2 * float(wave[0].square().mean()), rel=1e-4)
    F_hat, F_0 = (torch.fft.fft2(v, norm='ortho') for v in (other, x))
    assert float((F_hat - F_0).abs().square().mean()) == pytest.approx(float((other - x).square().mean()), rel=1e-5)
    assert train_bravo.fft_loss(x.roll((3, 5), (2, 3)), x, t, process, 0, 1) < 1e-3 < train_bravo.fft_loss(x * 1.5, x, t, process, 0, 1)
    smooth = x + 8                                                               # no bin near the 1e-3 that keeps the logarithm finite, but DC's
    assert float(train_bravo.fft_loss(1.5 * x, x, t, process, 0, 1)) == pytest.approx(2 * math.log(1.5), rel=0.01)           # of two images that count
    assert train_bravo.fft_loss(smooth, x, t, process, 0, 1) < 1e-3              # the mean intensity does not
    y = (x * 0.9).requires_grad_()
    apart = torch.fft.fft2(y.detach()[:2] - x[:2], norm='ortho').abs()
    w = apart / apart.amax((-2, -1), keepdim=True)
    torch.autograd.backward((w * torch.fft.fft2(y[:2] - x[:2], norm='ortho').abs().square()).flatten(1).mean(1).sum())
    direct, y.grad = y.grad, None
    train_bravo.fft_loss(y, x, t, process, 1, 0).backward()
    torch.testing.assert_close(y.grad, direct, rtol=1e-4, atol=1e-8)             # the weight is no path of the gradient


# -- cheaper weights --------------------------------------------------------------------------------------------------


def test_stochastic_rounding():
    """Right on average, to one of the two neighbours, never on what bf16 holds already; a change that nearest loses is kept."""
    x = torch.full((400_000,), 1.0013)
    y = stochastic(x, generator('round')).float()
    assert set(y.unique().tolist()) == {1.0, 1.0078125} and abs(float(y.double().mean()) - 1.0013) < 1e-4
    exact = torch.randn(1000, generator=generator('exact')).bfloat16().float()
    assert torch.equal(stochastic(exact, generator(1)).float(), exact) and torch.equal(stochastic(-x, generator('round')).float(), -y)
    w, g = torch.ones(1000, dtype=torch.bfloat16), generator('sum')
    for _ in range(1000):
        w = stochastic(w.float() + 1e-4, g)
    assert abs(float(w.float().mean()) - 1.1) < 0.005 and 0.02 < float(w.float().std()) < 0.04       # sqrt(1000 x 1e-4 x 2^-7) = 0.028
    w = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        w = (w.float() + 1e-4).bfloat16()
    assert w == 1                                                                # what nearest rounding does


@pytest.mark.parametrize('kahan', [False, True])
def test_pure_bf16_optimiser(kahan):
    """Follows AdamW in fp32 on the same gradients; 8 (10 with --kahan) bytes a parameter; replicas and resumed copies agree in every bit."""
    g = generator('adam')
    start, grads = torch.randn(4000, generator=g).bfloat16(), torch.randn(150, 4000, generator=g) * 0.3 + 0.2
    full = nn.Parameter(start.float())
    reference = torch.optim.AdamW([full], 1e-3, weight_decay=0.1)
    pair = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [PureBF16([p], 1e-3, 0.1, 5, kahan) for p in pair]
    for i, grad in enumerate(grads):
        full.grad = grad.bfloat16().float()
        reference.step()
        for p, opt in zip(pair, opts):
            p.grad = grad.bfloat16()
            opt.step()
        if i == 70:                                                              # through a checkpoint
            opts[1] = PureBF16([pair[1]], 1e-3, 0.1, 5, kahan)
            opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    assert torch.equal(*pair)
    state = [v for v in opts[0].state[pair[0]].values() if torch.is_tensor(v)]
    assert sum(v.element_size() for v in (pair[0], pair[0].grad, *state)) == (10 if kahan else 8)
    kept = pair[0].detach().float() + (opts[0].state[pair[0]]['lost'].float() if kahan else 0)
    move = full.detach() - start.float()
    assert float(((kept - full.detach()) * move).mean() / move.square().mean()) == pytest.approx(0, abs=0.02)      # no bias along the way
    assert float((kept - full.detach()).square().mean().sqrt()) < (0.2 if kahan else 0.6) * float(move.square().mean().sqrt())


def test_schedules_stay_exact_beside_bf16_weights():
    """A DDPM table in bf16 is 1.0 for 94 steps; ours falls strictly at every step, and the average of bf16 weights is kept in fp32."""
    naive = torch.cumprod((1 - torch.linspace(1e-4, 2e-2, 1000)).bfloat16(), 0)
    assert int((naive == 1).sum()) == 94
    assert len((1 - torch.linspace(1e-4, 2e-2, 1000)).bfloat16().unique()) == 6                  # what a cast leaves of 1 - beta
    wide = torch.arange(1000).float()
    assert len(wide.bfloat16().unique()) == 507 and int((wide.bfloat16().float() != wide).nonzero()[0]) == 257      # and of whole times
    seen = [common.time_embedding(1000 * t.float(), 64) for t in (torch.tensor([0.257]), torch.tensor([0.258]))]
    assert seen[0].dtype == torch.float32 and not torch.equal(*seen)
    process = DDPM(1000, 'linear')
    t = torch.arange(1, 1001) / 1000
    assert (process.log_snr(t).diff() < 0).all() and (process.alpha(t).diff() < 0).all()
    ema = EMA(nn.Linear(3, 3).bfloat16(), 0.999)
    assert all(p.dtype == torch.float32 for p in ema.net.parameters())


def test_kahan_sums():
    """A thousand updates of 1e-4 on 1: to nearest they leave 1, with the lost part kept 1.1016, and 1.1027 with that part added."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = PureBF16([p], 1e-4, 0.0, 0, kahan=True)
    for _ in range(1000):
        p.grad = -torch.ones_like(p)                                                              # Adam's step is lr, whatever the gradient
        opt.step()
    assert p.item() == pytest.approx(1.1016, abs=1e-4) and p.item() + opt.state[p]['lost'].item() == pytest.approx(1.1027, abs=5e-4)


@pytest.mark.parametrize('model', ['dit', 'mamba', 'mmdit'])
def test_what_modulates_stays_wide(model, call, tmp_path):
    """In pure bf16 a scale of 2^-10 still scales; Mamba's A and the bias of its dt are kept, updated and averaged in fp32, all else in bf16."""
    run = call('bravo', tmp_path / 'run', '--rflow', '--dtype', 'pure-bf16', '--model', model, '--iters', 3)
    kept = {n: v for n, v in load_checkpoint(run)['net'].items() if v.dtype == torch.float32}
    assert {n.rsplit('.')[-1] for n in kept} == ({'A_log', 'dt_bias'} if model == 'mamba' else set())
    assert all(not torch.equal(v, v.bfloat16().float()) for v in kept.values())
    assert call('bravo', run, '--rflow', '--dtype', 'pure-bf16', '--model', model, '--iters', 3) == run                # loads
    net = common.load_run(run).net
    common.pure_bf16(net)
    for p in net.blocks[0].modules():
        if isinstance(p, common.Block):
            p.ada.weight.data.zero_(), p.ada.bias.data.fill_(2.0 ** -10)
    ones = torch.ones(1, net.blocks[0].image.ada.in_features if model == 'mmdit' else net.blocks[0].ada.in_features)
    mods = (net.blocks[0].image if model == 'mmdit' else net.blocks[0]).modulation(ones)
    assert all(m.dtype == torch.float32 for m in mods) and float((1 + mods[1].detach()).mean()) == 1 + 2.0 ** -10 != float((1 + mods[1].detach().bfloat16()).mean())


def test_pure_bf16_says_its_bytes(call, tmp_path, capsys):
    run = call('bravo', tmp_path / 'run', '--rflow', '--dtype', 'pure-bf16')
    assert 'pure bf16: 8.00 bytes a parameter' in capsys.readouterr().out
    state = load_checkpoint(run)
    assert all(v.dtype == torch.bfloat16 for v in state['net'].values() if v.is_floating_point()) and all(v.dtype == torch.float32 for v in state['ema'].values())
    assert code(call, 'bravo', run, '--rflow', '--dtype', 'fp32') == 2 and 'pure-bf16' in capsys.readouterr().err


def small(seed=0):
    return scramble(UNet(2, 1, (8, 16), (0, 1), 1, 8, norm_groups=4), seed)


@pytest.mark.parametrize('shape', [(6, 8), (3, 12, 3, 3), (2, 4, 3, 3, 3)], ids=str)
def test_two_of_four(shape):
    """Exactly two of every four along the reduction dimension, the two largest; the gradient is the dense one; dense = 1 is no change."""
    w, sparse = torch.randn(shape, generator=generator('w')).requires_grad_(), TwoFour()
    y = sparse(w)
    rows = y.detach().transpose(1, -1).reshape(-1, 4)
    assert ((rows != 0).sum(1) == 2).all()
    size = w.detach().transpose(1, -1).reshape(-1, 4).abs()
    assert torch.equal(rows.abs().sort(1).values[:, 2:], size.sort(1).values[:, 2:])
    assert (sparse.mask(torch.ones(shape)).transpose(1, -1).reshape(-1, 4) == torch.tensor([1.0, 1, 0, 0])).all()       # ties
    g = torch.randn(shape, generator=generator('g'))
    y.backward(g)
    assert torch.equal(w.grad, g)
    sparse.dense.fill_(1)
    assert torch.equal(sparse(w), w)


def test_sparsity_keeps_most_of_gaussian_weights():
    w = torch.randn(4000, 400, generator=generator('gauss'))
    assert abs(float(TwoFour()(w).square().sum() / w.square().sum()) - 0.8675) < 0.001


def test_sparsity_survives(call, tmp_path, capsys):
    """Every layer that fits is 2:4 in the network, its average, and the loaded run; what does not fit is told; SR-STE shrinks only what is masked."""
    run = call('bravo', tmp_path / 'run', '--rflow', '--sparse24')
    assert '2:4 sparsity: ' in capsys.readouterr().out
    net = load_run(run).net
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    fit = [m for m in layers if m.weight.shape[1] % 4 == 0]
    assert len(sparse_layers(net)) == len(fit) > 10 and len(layers) - len(fit) == 1         # the first convolution sees 2 channels
    assert all(((m.weight.transpose(1, -1).reshape(-1, 4) != 0).sum(1) <= 2).all() for m in fit)
    x, t = torch.randn(2, 2, 16, 16, generator=generator('bake')), torch.tensor([0.3, 0.8])
    before = net(x, t)
    sample.bake_sparse(net, 'cpu', 'fp32')                                     # as sample.py does: nothing is masked any more, nothing changes
    assert torch.equal(net(x, t), before) and not sparse_layers(net) and f'0 of {len(fit)} sparse layers run on sparse' in capsys.readouterr().out
    tail = load_run(call('bravo', tmp_path / 'tail', '--rflow', '--sparse24', '--dense-tail', 0.5)).net
    assert all((m.weight != 0).float().mean() > 0.9 for m in tail.modules() if isinstance(m, nn.Linear))
    net = sparsify(small())
    opt = build_optimizer(net, argparse.Namespace(dtype='fp32', lr=0.1, weight_decay=0.0, sparse24=True, prune=0))
    before = [(w.detach().clone(), s.mask(w)) for w, s in sparse_layers(net)]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for (w, _), (old, mask) in zip(sparse_layers(net), before):
        torch.testing.assert_close(w.detach(), old * (1 - 0.1 * common.SR_STE * (1 - mask)), rtol=1e-6, atol=0)


@pytest.mark.parametrize('kahan', [False, True])
def test_decay_of_masked_weights_survives_bf16(kahan):
    """SR-STE takes 2e-5 of a masked weight a step, far below what bf16 can hold; over many weights and steps it adds up all the same."""
    net = sparsify(nn.Linear(256, 64, bias=False)).bfloat16()
    opt = build_optimizer(net, argparse.Namespace(dtype='pure-bf16', kahan=kahan, seed=0, lr=1e-3, weight_decay=0.0, sparse24=True, prune=0))
    (w, sparse), = sparse_layers(net)
    old, mask = w.detach().float(), sparse.mask(w).bool()
    for _ in range(500):
        w.grad = torch.zeros_like(w)
        opt.step()
    assert float((w.detach().float() * old)[~mask].sum() / old[~mask].square().sum()) == pytest.approx((1 - 1e-3 * common.SR_STE) ** 500, abs=2e-3)
    assert torch.equal(w.detach().float()[mask & sparse.mask(w).bool()], old[mask & sparse.mask(w).bool()])


def prune_args(how, by='magnitude', share=0.3):
    return argparse.Namespace(prune=share, prune_by=by, prune_how=how, steps=0, dtype='fp32', lr=1e-3, weight_decay=0.0, sparse24=False)


def wide(twice, context_dim=None, seed=0, **kw):
    """A U-Net with attention at its second level and weights of one size everywhere, their signs at random. twice: as wide as two of it, see test_copies_go_unnoticed."""
    torch.manual_seed(seed)
    net = UNet(2, 1, (8 * twice, 16 * twice), (0, 1), layers=2, head_channels=8 * twice, context_dim=context_dim, norm_groups=2, **kw)
    g = generator('wide', seed)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=g).sign()
    return net.requires_grad_(False)


@pytest.mark.parametrize('kw', [{}, dict(context_dim=common.TOKEN), dict(updown=True, project=False), dict(dims=3)], ids=str)
def test_copies_go_unnoticed(kw):
    """Every channel twice, side by side, and of each two the second is read by nobody: half the channels by magnitude are those, and what is left
    does what it did. In every norm group half are gone, so its mean and variance stay, and a head's products keep their scale."""
    net = wide(2, **kw)
    lengths, layers = common.channel_sets(net)
    for m, reads, writes in layers:                                              # rows in pairs of copies
        if writes:
            for p in (m.weight, m.bias):
                if p is not None:
                    p[1::2] = p[::2]
    for m, reads, writes in layers:
        if reads:
            m.weight[:, 1::2] = 0
    for a in (m for m in net.modules() if isinstance(m, common.Attention)):      # a product reads what it writes: the second of each query
        q, n = (a.q, 1) if hasattr(a, 'q') else (a.qkv, 3)
        for p in (q.weight, q.bias) if q.bias is not None else (q.weight,):
            p[1:len(p) // n:2] = 0
    size = (3, 2, *(8,) * net.dims)
    x, t = torch.randn(size, generator=generator('x')), torch.tensor([0.1, 0.5, 0.9])
    context = common.lesion_tokens([np.array([[0.2, 0.5, 0.5]])] * 3) if net.context_dim else None
    y, n = net(x, t, context), sum(p.numel() for p in net.parameters())
    assert common.prune_channels(net, torch.Tensor.abs, 0.5) == (net.down_blocks[0].resnets[0].norm1.num_channels // 2, net.down_blocks[0].resnets[0].norm1.num_channels)
    assert sum(p.numel() for p in net.parameters()) < 0.4 * n
    torch.testing.assert_close(net(x, t, context), y, rtol=0, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize('how', ['weights', 'channels'])
@pytest.mark.parametrize('by', ['magnitude', 'taylor'])
def test_prune(how, by, capsys):
    """The share is met by what the formula scores lowest; pruned weights stay zero in training and in the average."""
    g = generator('prune test')
    x_0, noise, mask, t = torch.randn(8, 1, 8, 8, generator=g), torch.randn(8, 1, 8, 8, generator=g), torch.ones(8, 1, 8, 8), torch.linspace(0.05, 1, 8)
    net, process = small(), RFlow()
    n, old = sum(p.numel() for p in net.parameters()), small()                   # the score, written out: |w|, or |w dL/dw| summed over the times that matter
    eps, ts = torch.randn(x_0.shape, generator=generator('prune')), [k / 20 for k in range(20, 0, -1)]
    at = lambda k: ((old(torch.cat([(1 - k) * x_0 + k * eps, mask], 1), torch.full((8,), k)) - (eps - x_0)) ** 2).mean()
    levels = [float(at(k).detach()) for k in ts]
    sum(at(k) for k, v in zip(ts, levels) if v > 0.05 * max(levels)).backward()
    score = lambda w: (w * w.grad if by == 'taylor' else w).abs().detach()
    prune(net, process, prune_args(how, by, 0.5 if how == 'channels' else 0.3), x_0, mask)
    if how == 'channels':
        gone = n - sum(p.numel() for p in net.parameters())
        assert f'{gone} of {n}' in capsys.readouterr().out
        blocks = lambda v: [m for m in v.modules() if isinstance(m, common.ResBlock)]
        for a, b in zip(blocks(old), blocks(net)):                               # one of each norm group of 2, two of 4
            at = torch.cat([score(w).reshape(len(w), -1) for w in (a.conv1.weight, a.conv1.bias, a.time.weight, a.time.bias, a.norm2.weight, a.norm2.bias)]
                           + [score(a.conv2.weight).transpose(0, 1).flatten(1)], 1).mean(1).view(-1, 2)
            keep = at.argmax(1) + torch.arange(0, at.numel(), 2)
            assert torch.equal(b.time.weight, a.time.weight[keep]) and torch.equal(b.conv1.bias, a.conv1.bias[keep])
            assert b.norm2.num_groups == a.norm2.num_groups and b.norm2.num_channels == a.norm2.num_channels // 2 == b.conv2.out_channels
        assert net.conv_in.out_channels == old.conv_in.out_channels // 2 and net.time_embed[0].weight.shape == old.time_embed[0].weight.shape
        other = small(1)
        common.fit_pruned(other, net.state_dict(), 'run')
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x_0.repeat(1, 2, 1, 1), t), net(x_0.repeat(1, 2, 1, 1), t))
        return
    layers = common.prunable(net)
    zero = [m.weight == 0 for m in layers]
    assert abs(sum(int(z.sum()) for z in zero) / sum(z.numel() for z in zero) - 0.3) < 1e-3
    scores = [score(m.weight) for m in common.prunable(old)]
    assert max(float(s[z].max()) for s, z in zip(scores, zero) if z.any()) <= min(float(s[~z].min()) for s, z in zip(scores, zero) if not z.all()) * (1 + 1e-4)
    opt, ema = build_optimizer(net, prune_args(how, by)), EMA(net, 0.9)
    for _ in range(10):
        process.loss(net, x_0, noise, t, mask)[0].mean().backward()
        opt.step(), opt.zero_grad(), ema.update(net)
    averaged = common.prunable(ema.net)
    assert all((m.weight[z] == 0).all() and (a.weight[z] == 0).all() for m, a, z in zip(layers, averaged, zero))


def test_taylor_is_the_first_order_change():
    """-w dL/dw predicts how the loss changes when a weight goes, to the second order in the weight."""
    g = generator('first order')
    x_0, noise, mask, t = torch.randn(4, 1, 8, 8, generator=g), torch.randn(4, 1, 8, 8, generator=g), torch.ones(4, 1, 8, 8), torch.linspace(0.2, 0.8, 4)
    net, process = small().double(), RFlow()
    net.time_embed.double()
    weight = net.down_blocks[0]['resnets'][0].conv1.weight
    loss = lambda: process.loss(net, x_0.double(), noise.double(), t, mask.double())[0].mean()
    with torch.no_grad():
        weight[0, 0, 0, 0] = 1e-3
    (grad,) = torch.autograd.grad(loss(), weight)
    before = loss()
    with torch.no_grad():
        weight[0, 0, 0, 0] = 0
    assert float((loss() - before).detach()) == pytest.approx(-1e-3 * float(grad[0, 0, 0, 0]), rel=2e-2)


@pytest.mark.parametrize('model', ['dit', 'mamba', 'mmdit'])
def test_cheaper_weights_for_every_model(call, phantom, tmp_path, model):
    """2:4, pruned and recomputed networks of tokens train, load and sample."""
    first = call('bravo', tmp_path / 'sparse', '--rflow', '--model', model, '--sparse24', '--checkpointing')
    then = call('bravo', tmp_path / 'pruned', '--rflow', '--model', model, '--init', first, '--prune', 0.3)
    weights = [m.weight for m in load_run(then).net.modules() if isinstance(m, nn.Linear) and m.weight.any()]
    assert sum(int((w == 0).sum()) for w in weights) > 0.2 * sum(w.numel() for w in weights)
    call('sample', tmp_path / 'set', '--bravo', then, '--data', phantom, '--n', 2, '--steps', 2)


@pytest.mark.parametrize('how', ['weights', 'channels'])
def test_a_pruned_run_is_a_run(call, trained, phantom, tmp_path, monkeypatch, capsys, how):
    """--init, --prune and the training after it in one command; resumes, is smaller on disk, samples, and can be the start of another run."""
    flags = ['--rflow', '--init', trained / 'bravo', '--prune', 0.3, '--prune-how', how]
    run = resumes(call, tmp_path, monkeypatch, 'bravo', *flags)
    size = lambda p: sum(v.numel() for v in load_checkpoint(p)['ema'].values())
    assert (size(run) < 0.75 * size(trained / 'bravo')) == (how == 'channels')
    call('sample', tmp_path / 'set', '--bravo', run, '--data', phantom, '--n', 2, '--steps', 2)
    again = call('bravo', tmp_path / 'again', '--rflow', '--init', run)
    assert size(again) == size(run)
    if how == 'channels':
        refused(capsys, ['--init', 'lacks pruned channels', '--sparse24'], call, 'bravo', tmp_path / 'sparse', '--rflow', '--init', run, '--sparse24')
        refused(capsys, ['--prune 0.05', '4 wide', 'multiple of 0.25'], call, 'bravo', tmp_path / 'few', '--rflow', '--init', trained / 'bravo', '--prune', 0.05)
        state = load_checkpoint(trained / 'bravo')                           # as an older version left it: a whole group fewer inside a block
        for name, dim in (('conv1.weight', 0), ('conv1.bias', 0), ('time.weight', 0), ('time.bias', 0), ('norm2.weight', 0), ('norm2.bias', 0), ('conv2.weight', 1)):
            key = f'down_blocks.0.resnets.0.{name}'
            state['ema'][key] = state['ema'][key].narrow(dim, 0, 4)
        (tmp_path / 'old').mkdir()
        torch.save(state, tmp_path / 'old/ckpt.pt')
        refused(capsys, ['old', 'older version', 'prune'], load_run, tmp_path / 'old')


# -- knowing before, remembering less ----------------------------------------------------------------------------------


def test_dry_run(call, tmp_path, capsys):
    """Prints parameters, FLOPs of a step, memory and time; trains nothing and leaves no folder. FLOPs grow with the batch and the width."""
    told = []
    for flags in ([], ['--batch-size', 8], ['--channels', '16,16']):
        call('bravo', tmp_path / 'none', '--rflow', '--dry-run', *flags)
        told.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith('dry run')))
    assert not (tmp_path / 'none').exists()
    n = sum(p.numel() for p in UNet(2, 1, (8, 8), (0, 1), 1, 8, norm_groups=2).parameters())
    assert f'{n / 1e6:.2f} M parameters' in told[0] and f'{20 * n / 1e6:.0f} MB for weights' in told[0]
    flops = [float(t.split(' GFLOP')[0].split()[-1]) for t in told]
    assert flops[1] >= 1.9 * flops[0] and flops[2] > 2 * flops[0]


def test_dry_run_covers_every_size(call, tmp_path, capsys):
    """The work of a step is the mean over the sizes, the memory that of the largest."""
    told = []
    for flags in (['--size', 8], ['--size', 16], ['--progressive', '8,16']):
        call('bravo', tmp_path / 'none', '--rflow', '--dry-run', *flags)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('dry run'))
        told.append((float(line.split(' GFLOP')[0].split()[-1]), float(line.split(' MB kept')[0].split()[-1])))
    assert told[2][0] == pytest.approx((told[0][0] + told[1][0]) / 2, rel=0.01) and told[2][1] >= told[1][1]


def test_pure_bf16_with_a_vector_condition(call, tmp_path):
    call('bravo', tmp_path / 'run', '--rflow', '--model', 'dit', '--slice-level', '--dtype', 'pure-bf16', '--iters', 2)


def test_what_started_at_zero_still_learns(call, trained, tmp_path):
    """Pruned weights stay zero; the mask-present channel, new and zero, does not."""
    run = call('bravo', tmp_path / 'run', '--rflow', '--init', trained / 'bravo', '--prune', 0.3, '--prune-how', 'weights', '--p-uncond', 0.3)
    assert load_run(run).net.conv_in.weight[:, 2].abs().max() > 0
    run = call('bravo', tmp_path / 'level', '--rflow', '--init', trained / 'bravo', '--prune', 1e-6, '--prune-how', 'weights', '--slice-level', '--iters', 6)
    assert all(p.abs().max() > 0 for n, p in load_run(run).net.named_parameters() if n.startswith('extra_embed'))


def test_checkpointing_changes_no_bit(call, tmp_path):
    """The same weights as without, with less kept for the backward."""
    a, b = (load_checkpoint(call('bravo', tmp_path / str(len(f)), '--rflow', *f)) for f in ([], ['--checkpointing']))
    assert all(torch.equal(a['net'][k], b['net'][k]) for k in a['net'])
    kept = []
    for on in (False, True):
        net = small()
        net.checkpointing, total = on, []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: (total.append(v.numel()), v)[1], lambda v: v):
            net(torch.randn(2, 2, 16, 16), torch.rand(2))
        kept.append(sum(total))
    assert kept[1] < 0.5 * kept[0]
