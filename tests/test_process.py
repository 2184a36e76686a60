"""Processes, losses and samplers against closed forms. The oracle: for x_0 ~ N(m, s^2) a pixel, E[x_0|x_t] and the exact
path of the probability-flow ODE are known, so orders of convergence, marginals and straightness need no training."""
import math

import pytest
import torch

from common import (embedded_step, DDPM, PAIRS, SAMPLERS, RFlow, asked_times, generator, make_denoise, sample_adaptive, sample_ddim, sample_dpmpp,
                    sample_dpmpp_2s, sample_dpmpp_sde, sample_euler, sample_heun)

M, S = 0.3, 0.5
EVERY = [RFlow(), RFlow(100), *(DDPM(1000, s, t) for s in ('linear', 'cosine') for t in ('eps', 'v', 'x0'))]
NAMES = [f'{type(p).__name__}-{p.steps}-{getattr(p, "schedule", "")}-{p.target}' for p in EVERY]


def oracle(process):
    """denoise() of a perfect network for N(M, S^2)."""
    def denoise(x, t):
        a, s = process.alpha(t).double(), process.sigma(t).double()
        x_0 = (a * S ** 2 * x + s ** 2 * M) / (a ** 2 * S ** 2 + s ** 2)
        return x_0, (x - a * x_0) / s
    return denoise


def exact(process, z, t):
    a, s = process.alpha(t).double(), process.sigma(t).double()
    return a * M + (a ** 2 * S ** 2 + s ** 2).sqrt() * z


class Perfect(torch.nn.Module):
    """A network that answers x_0 = `x_0`, in the terms of the process's target: fed x_t and net_time(t)."""

    def __init__(self, process, x_0):
        super().__init__()
        self.process, self.x_0, self.times = process, x_0, []

    def forward(self, x, t, context=None, extra=None):
        self.times.append(t)
        t = t + (1 / self.process.steps if isinstance(self.process, DDPM) else 0)
        a, s = (f(t).reshape(-1, 1, 1, 1) for f in (self.process.alpha, self.process.sigma))
        eps = (x - a * self.x_0) / s
        return {'eps': eps, 'x0': self.x_0.expand_as(x), 'v': self.process.v_of(self.x_0, eps, a, s)}[self.process.target]


@pytest.mark.parametrize('process', EVERY, ids=NAMES)
def test_schedule(process):
    """alpha and sigma agree with the log-SNR, fall and rise monotonically, and end at clean data."""
    t = torch.arange(1, 1001) / 1000
    a, s, L = process.alpha(t), process.sigma(t), process.log_snr(t)
    if isinstance(process, DDPM):
        torch.testing.assert_close(a ** 2 + s ** 2, torch.ones_like(t), rtol=0, atol=2e-7)
    inner = slice(0, 999)
    torch.testing.assert_close(torch.log(a[inner] ** 2 / s[inner] ** 2), L[inner], rtol=1e-4, atol=1e-4)
    assert (a.diff() < 0).all() and (s.diff() > 0).all() and (L.diff() < 0).all()
    assert process.alpha(torch.tensor(0.0)) == 1 and process.sigma(torch.tensor(0.0)) == 0
    below = process.sigma(torch.linspace(0, 1 / 1000, 11))                       # between data and the first grid time
    assert (below.diff() > 0).all() and torch.allclose(below[-1], s[0])


def test_ddpm_tables():
    """Linear: the product of 1 - beta in fp64. Cosine: Nichol 2021, eq. 17, up to the cap on beta. RFlow: t/(1-t)."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    t = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(DDPM(1000, 'linear').alpha(t).double() ** 2, torch.cumprod(1 - beta, 0), rtol=2e-6, atol=1e-9)
    f = lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(DDPM(1000, 'cosine').alpha(t[:990]).double() ** 2, (f(t) / f(torch.zeros(())))[:990].double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(RFlow().log_snr(t[:-1]), 2 * torch.log((1 - t) / t)[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('process', EVERY, ids=NAMES)
def test_split_and_loss(process):
    """A network that is right has no loss and gives back x_0 and eps; one off by d in x_0 is charged by the conversion."""
    g = generator('split')
    x_0, eps = torch.randn(5, 1, 4, 4, generator=g).clamp(-1, 1), torch.randn(5, 1, 4, 4, generator=g)
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95])
    weighted, error, x0_hat = process.loss(Perfect(process, x_0), x_0, eps, t)
    assert error.max() < 1e-6
    torch.testing.assert_close(x0_hat, x_0, rtol=1e-3, atol=1e-3)
    a, s = (f(t).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    back = process.split(process.target_of(x_0, eps, t), a * x_0 + s * eps, a, s)
    torch.testing.assert_close(back[0], x_0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back[1], eps, rtol=1e-3, atol=1e-3)


def test_min_snr_is_one_weight_in_x0_space():
    """The same error of x0_hat costs min(SNR, 5) |error|^2 whatever the target (Hang 2023), in DDPM and RFlow."""
    t64 = torch.arange(1, 999, dtype=torch.float64) / 1000                                    # the weights themselves, exactly
    for process in (RFlow(), *(DDPM(1000, 'cosine', k) for k in ('eps', 'v', 'x0'))):
        L = process.log_snr(t64, torch.float64)
        a, s = ((1 - t64, t64) if isinstance(process, RFlow) else (L.sigmoid().sqrt(), (-L).sigmoid().sqrt()))
        x0_error = {'eps': s / a, 'x0': 1, 'v': s}[process.target] if isinstance(process, DDPM) else s        # |x_0 error| of a unit error in the target
        torch.testing.assert_close(process.min_snr(t64, 5.0).double(), L.exp().clamp(max=5) * x0_error ** 2 + 0 * t64, rtol=1e-5, atol=1e-9)
    off = 0.1 * torch.randn(64, 1, 4, 4, generator=generator('off'))
    x_0, eps = torch.zeros(64, 1, 4, 4), torch.randn(64, 1, 4, 4, generator=generator('eps'))
    t = torch.arange(10, 650, 10) / 1000
    for process in (RFlow(), *(DDPM(1000, 'cosine', k) for k in ('eps', 'v', 'x0'))):
        weighted, _, x0_hat = process.loss(Perfect(process, off), x_0, eps, t, min_snr=5.0)
        expected = torch.exp(process.log_snr(t)).clamp(max=5) * off.square().flatten(1).mean(1)
        torch.testing.assert_close(weighted, expected, rtol=2e-3, atol=1e-7)
    t = (torch.arange(100000) + 0.5) / 100000
    w = RFlow().min_snr(t, 5.0)
    assert abs(float(w.double().mean()) - 5 / (3 * (1 + math.sqrt(5)) ** 2)) < 1e-6           # 0.1592
    assert abs(float(t[w.argmax()]) - 1 / (1 + math.sqrt(5))) < 1e-4                          # peak at 0.309
    for process in EVERY:                                                                     # both ends are finite
        assert torch.isfinite(process.min_snr(torch.tensor([0.0, 1e-4, 1.0]), 5.0)).all()


def test_loss_on_the_grid_is_the_mean_of_the_table():
    """RFlow on 100 times: a network whose error at t = k/100 is e_k has, over t as they are drawn, the mean of e_k^2: each time is asked alike often."""
    process, error = RFlow(100), torch.rand(100, generator=generator('table'))
    net = lambda x, t, context=None, extra=None: x * 0 + eps - x_0 + error[(100 * t).round().long() - 1].view(-1, 1, 1, 1)
    x_0, eps = torch.randn(100, 1, 4, 4), torch.randn(100, 1, 4, 4)
    loss = process.loss(net, x_0, eps, torch.arange(1, 101) / 100)[0]
    torch.testing.assert_close(loss, error ** 2, rtol=1e-4, atol=1e-6)
    drawn = (100 * process.draw_t(200_000, generator('many'))).round().long()
    share = torch.bincount(drawn, minlength=101)[1:] / len(drawn)
    assert drawn.min() == 1 and drawn.max() == 100 and (share - 0.01).abs().max() < 5 * (0.01 * 0.99 / len(drawn)) ** 0.5
    assert abs((share * loss).sum() - (error ** 2).mean()) < 0.003


def test_draw_t():
    """Grid: pure noise is drawn, t=0 never; uniform on it. Logit-normal: log-SNR is N(0, 4), by moments and KS distance."""
    t = RFlow(100).draw_t(200_000, generator('grid'))
    k, counts = torch.unique((t * 100).round(), return_counts=True)
    assert k.tolist() == list(range(1, 101))
    assert (counts / 2000 - 1).abs().max() < 0.12                                             # 5 sigma of 1/sqrt(2000)
    x_0, eps = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2, generator=generator(0))
    assert torch.equal(RFlow(100).alpha(torch.ones(1)) * x_0 + RFlow(100).sigma(torch.ones(1)) * eps, eps)
    u = RFlow().draw_t(100_000, generator('u'))
    assert u.min() > 0 and u.max() <= 1 and (u.sort().values - torch.linspace(0, 1, 100_000)).abs().max() < 1.63 / math.sqrt(1e5)
    normal = RFlow()
    normal.density = 'logit-normal'
    L = normal.log_snr(normal.draw_t(100_000, generator('l'))).double()
    assert abs(float(L.mean())) < 0.03 and abs(float(L.std()) - 2) < 0.02
    cdf = torch.distributions.Normal(0.0, 2.0).cdf(L.sort().values)
    assert (cdf - torch.linspace(0, 1, len(L), dtype=torch.float64)).abs().max() < 1.63 / math.sqrt(1e5)       # KS, 1 %


def test_times():
    """Solver times lie on the training grid, fall strictly, start at noise and end at data."""
    for process, n in ((RFlow(100), 30), (RFlow(100), 100), (DDPM(1000), 50), (DDPM(1000), 1000), (RFlow(), 7)):
        ts = process.times(n)
        assert len(ts) == n + 1 and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
        if process.steps:
            assert torch.equal(ts, ((ts * process.steps).round() / process.steps))
    net = Perfect(DDPM(1000), torch.zeros(1, 1, 2, 2))
    sample_ddim(make_denoise(net, net.process), torch.randn(1, 1, 2, 2), net.process.times(1000), net.process)
    fed = 1000 * torch.cat(net.times)
    assert (fed - fed.round()).abs().max() < 1e-3 and fed.round().tolist() == list(range(999, -1, -1))         # the integers of DDPM


def slope(sample, process, low, high):
    """log2 of how the error at the end falls from 80 to 160 steps, uniform in log-SNR between two times."""
    z, errors = torch.randn(256, 1, 1, 1, dtype=torch.float64, generator=generator('z')), []
    fine = torch.linspace(low, high, 100_001)
    for n in (80, 160):
        wanted = torch.linspace(float(process.log_snr(fine[-1])), float(process.log_snr(fine[0])), n + 1)
        ts = fine[torch.searchsorted(-process.log_snr(fine), -wanted).clamp(max=len(fine) - 1)]
        x = sample(oracle(process), exact(process, z, ts[0]), ts, process)
        errors.append(float((x - exact(process, z, ts[-1])).square().mean().sqrt()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize('process', [RFlow(), DDPM(1000, 'cosine'), DDPM(1000, 'linear')], ids=['rflow', 'cosine', 'linear'])
def test_orders(process):
    """Twice the steps divide Euler's and DDIM's error by 2 and Heun's by 4."""
    assert abs(slope(sample_euler, process, 1e-3, 0.999) - 1) < 0.06
    assert abs(slope(sample_ddim, process, 1e-3, 0.999) - 1) < 0.06
    assert abs(slope(sample_heun, process, 1e-3, 0.999) - 2) < 0.06


@pytest.mark.parametrize('process', [RFlow(), DDPM(1000, 'cosine'), DDPM(1000, 'linear')], ids=['rflow', 'cosine', 'linear'])
def test_orders_of_dpm_solver(process):
    """DPM-Solver++ 2M and 2S are second order, also on the whole way from t=1 to 0 with its first-order ends."""
    assert abs(slope(sample_dpmpp, process, 1e-3, 0.999) - 2) < 0.15
    assert abs(slope(sample_dpmpp_2s, process, 1e-3, 0.999) - 2) < 0.06
    z = torch.randn(256, 1, 1, 1, dtype=torch.float64, generator=generator('z'))
    for sample in (sample_dpmpp, sample_dpmpp_2s):
        ends = [sample(oracle(process), exact(process, z, torch.tensor(1.0)), process_times(process, n), process) for n in (10, 40)]
        errors = [float((x - exact(process, z, torch.tensor(0.0))).square().mean().sqrt()) for x in ends]
        euler = sample_euler(oracle(process), exact(process, z, torch.tensor(1.0)), process_times(process, 40), process)
        assert errors[1] < errors[0] / 4 and errors[1] < 0.3 * float((euler - exact(process, z, torch.tensor(0.0))).square().mean().sqrt())


def process_times(process, n):
    """n times uniform in log-SNR without snapping, so that orders show."""
    return type(process).times(process if isinstance(process, RFlow) else Free(process), n, 'log-snr')


class Free:
    """A DDPM whose times are not snapped to its grid."""

    def __init__(self, process):
        self.log_snr, self.time_of, self.steps = process.log_snr, process.time_of, 0


@pytest.mark.parametrize('process', EVERY, ids=NAMES)
def test_time_of(process):
    """The inverse of log_snr, between grid times and below the first too."""
    t = torch.cat([torch.linspace(1e-5, 0.999, 2001, dtype=torch.float64), torch.tensor([1e-4, 0.5, 0.0101])])
    torch.testing.assert_close(process.time_of(process.log_snr(t, torch.float64)), t, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize('process', EVERY, ids=NAMES)
@pytest.mark.parametrize('n', [1, 2, 5, 25, 100])
def test_grids_and_shift(process, n):
    """Every grid falls strictly from 1 to 0, on trained times where there is a grid; shifts compose; log-SNR steps are equal."""
    for grid in ('time', 'log-snr'):
        for shift in (0.2, 1.0, 3.0):
            ts = process.times(n, grid, shift)
            assert len(ts) == n + 1 and ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
            if process.steps:
                torch.testing.assert_close(ts * process.steps, (ts * process.steps).round(), rtol=0, atol=1e-4)
    assert torch.equal(process.times(n), process.times(n, 'time', 1.0))
    if not process.steps and n > 2:
        L = process.log_snr(process.times(n, 'log-snr')[1:-1], torch.float64).diff()
        assert (L - L.mean()).abs().max() < 0.01 * L.mean()                                    # fp32 times
        twice = 2 * (3 * (ts := process.times(n)) / (1 + 2 * ts)) / (1 + 3 * ts / (1 + 2 * ts))
        torch.testing.assert_close(twice, process.times(n, shift=6.0))
        early = process.times(n, shift=0.2).diff()
        assert (early.diff() > 0).all()                                                      # large steps first


def test_dpm_solver_sde_is_ddim_with_eta_one():
    """One step of the SDE solver has the coefficients of DDIM with eta = 1; its marginal is the data's."""
    for process in (RFlow(), DDPM(1000, 'cosine')):
        ts, x = torch.tensor([0.7, 0.4]), torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=generator('x'))
        z = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=generator('z'))
        a, b = (f(oracle(process), x, ts, process, lambda: z) for f in (sample_dpmpp_sde, lambda *v: sample_ddim(*v, eta=1.0)))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        g = generator('sde')
        noise = lambda: torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
        x = sample_dpmpp_sde(oracle(process), noise(), process_times(process, 100), process, noise)
        assert abs(float(x.mean()) - M) < 0.02 and abs(float(x.std()) - S) < 0.015


def velocity_oracle(scale):
    """denoise() for N(M, scale^2) that takes a time for each image and counts its calls."""
    calls = []

    def denoise(x, t):
        calls.append(t)
        t = torch.as_tensor(t).double().reshape(-1, 1, 1, 1)
        a, s = 1 - t, t
        x_0 = (a * scale ** 2 * x + s ** 2 * M) / (a ** 2 * scale ** 2 + s ** 2)
        return x_0, (x - a * x_0) / s
    return denoise, calls


@pytest.mark.parametrize('pair, order, below', [('bs23', 3, 2), ('heun-euler', 2, 1)])
def test_orders_of_embedded_pairs(pair, order, below):
    """Equal steps: Bogacki-Shampine's result is third order, Heun-Euler's second, and what they are compared with is one less in a single step."""
    z, errors, gaps = torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=generator('z')), [], []
    denoise, _ = velocity_oracle(S)
    slope, process = lambda x, t: (lambda x_0, eps: eps - x_0)(*denoise(x, t)), RFlow()
    path = lambda t: (1 - t) * M + ((1 - t) ** 2 * S ** 2 + t ** 2) ** 0.5 * z
    for n in (20, 40, 80, 160):
        x, h = path(0.95), torch.full((64,), 0.9 / n, dtype=torch.float64)
        for i in range(n):
            t = torch.full((64,), 0.95 - i * 0.9 / n, dtype=torch.float64)
            new, coarse, last = embedded_step(slope, x, t, h, slope(x, t), pair)
            if i == 0:
                gaps.append(float((coarse - path(0.95 - 0.9 / n)).square().mean().sqrt()))
            x = new
        assert (last is None) == (pair == 'heun-euler') and (last is None or torch.equal(last, slope(x, t - h)))       # first same as last
        errors.append(float((x - path(0.05)).square().mean().sqrt()))
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order] * 3, abs=0.12) and slopes[-1] == pytest.approx(order, abs=0.03)
    assert math.log2(gaps[-2] / gaps[-1]) == pytest.approx(below + 1, abs=0.05)                                           # of one step: an order more


@pytest.mark.parametrize('pair', PAIRS)
def test_adaptive(pair):
    """The error follows the tolerance; times end at 0 exactly; forwards are counted; a straight flow takes the largest steps."""
    z = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=generator('z'))
    errors, costs = [], []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        (denoise, calls), trace = velocity_oracle(S), []
        x = sample_adaptive(denoise, z, [1.0, 0.0], RFlow(), tol=tol, pair=pair, trace=trace)
        errors.append(float((x - (M + S * z)).square().mean().sqrt()))
        t, h, good = (torch.stack(v) for v in zip(*trace))
        steps = len(trace)
        kept = good.any(1).sum().item()
        assert len(calls) == (1 + 3 * steps if pair == 'bs23' else 1 + steps + kept)
        assert ((h * good).sum(0) - 0.999).abs().max() < 1e-9                                     # accepted steps cover the way
        costs.append(len(calls))
    assert errors == sorted(errors, reverse=True) and errors[2] < 3e-3 and costs == sorted(costs)
    denoise, calls = velocity_oracle(1e-9)                                                    # one point: straight lines
    x = sample_adaptive(denoise, z, [1.0, 0.0], RFlow(), tol=1e-3, pair=pair)
    assert (x - M).abs().max() < 1e-6 and len(calls) <= 16


@pytest.mark.parametrize('pair', PAIRS)
def test_adaptive_images_are_alone(pair):
    """An image's path is the same bits whatever shares its batch; batch-mates may need more steps."""
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=generator('z')) * torch.tensor([0.1, 1, 30]).reshape(3, 1, 1, 1)
    run = lambda z: sample_adaptive(velocity_oracle(0.05)[0], z, [1.0, 0.0], RFlow(), tol=1e-3, pair=pair)
    together = run(z)
    for i in range(3):
        assert torch.equal(run(z[i:i + 1]), together[i:i + 1])


def test_adaptive_gives_up_on_noise():
    """A network that contradicts itself ends the run with one line instead of turning for ever."""
    g = generator('noise')
    with pytest.raises(SystemExit):
        sample_adaptive(lambda x, t: (torch.randn(x.shape, generator=g), torch.randn(x.shape, generator=g)), torch.randn(2, 1, 4, 4), [1.0, 0.0], RFlow(), tol=1e-6)


@pytest.mark.parametrize('scale, known', [(1.0, {'bs23': 25, 'heun-euler': 60}), (0.05, {'bs23': 31, 'heun-euler': 33})])
def test_adaptive_costs_what_is_known(scale, known):
    """Forwards for 256 pixels at a tolerance of 0.001, smooth and stiff near t=0: those of another controller, to an eighth."""
    z = torch.randn(1, 1, 16, 16, dtype=torch.float64, generator=generator('n'))
    for pair, forwards in known.items():
        denoise, calls = velocity_oracle(scale)
        sample_adaptive(denoise, z, [1.0, 0.0], RFlow(), tol=1e-3, pair=pair)
        assert len(calls) == pytest.approx(forwards, rel=0.125)


def test_euler_shrinks_as_known():
    """N Euler steps of RFlow from N(0,1) data end with a standard deviation of 0.5, 0.720, 0.851, 0.923 for N = 2, 4, 8, 16."""
    z, process = torch.ones(1, 1, 1, 1, dtype=torch.float64), RFlow()

    def denoise(x, t):
        a, s = 1 - t.double(), t.double()
        x_0 = a * x / (a ** 2 + s ** 2)
        return x_0, (x - a * x_0) / s
    for n, known in ((1, 0.0), (2, 0.5), (4, 0.720), (8, 0.851), (16, 0.923), (64, 0.980)):
        x = sample_euler(denoise, z, torch.linspace(1, 0, n + 1), process)
        assert abs(float(x) - known) < 6e-4


@pytest.mark.parametrize('name', [n for n in SAMPLERS if n not in ('adaptive', 'maisi')])
@pytest.mark.parametrize('process', EVERY, ids=NAMES)
def test_samplers(name, process):
    """Data that is one point is hit exactly; the times asked for are asked_times; the callback sees every step."""
    x_0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    net, seen, g = Perfect(process, x_0), [], generator('s', name)
    noise = lambda: torch.randn(3, 1, 4, 4, generator=g)
    ts = process.times(10)
    x = SAMPLERS[name](make_denoise(net, process), noise(), ts, process, noise, lambda i, t, x_t, x0: seen.append((i, t)))
    torch.testing.assert_close(x, x_0.expand(3, -1, -1, -1), rtol=0, atol=2e-5)
    asked = sorted(float(t[0]) + (1 / process.steps if isinstance(process, DDPM) else 0) for t in net.times)
    torch.testing.assert_close(torch.tensor(asked), torch.tensor(sorted(asked_times(name, ts, process))), rtol=0, atol=1e-6)
    extra = {'heun': 9, 'dpm++2s': 9 - isinstance(process, RFlow)}.get(name, 0)            # all but the last step, and from t=1
    assert len(asked) == 10 + extra and seen == [(i, float(t)) for i, t in enumerate(ts[:-1])]


def test_targets_give_the_same_trajectory():
    """eps, v and x0 networks that mean the same thing walk the same path, with every solver."""
    x, ts = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=generator('t')), DDPM(1000, 'cosine').times(20)
    for solver in (sample_ddim, sample_dpmpp, sample_dpmpp_2s):
        ends = []
        for target in ('eps', 'v', 'x0'):
            process = DDPM(1000, 'cosine', target)
            net = lambda x_t, t, context, extra, p=process: p.target_of(*oracle(p)(x_t, (t + 1e-3)[0]), t + 1e-3)
            ends.append(solver(make_denoise(net, process), x.float(), ts, process))
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize('process', EVERY, ids=NAMES)
def test_one_point_is_hit_in_one_step(process):
    """Whatever D (the x_0 asked for) is, if it is constant, DPM-Solver++ is there at once; the log-SNR of the first trained time is known."""
    x_0, x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), torch.randn(2, 1, 4, 4, generator=generator('one'))
    for solver in (sample_dpmpp, sample_dpmpp_2s):
        torch.testing.assert_close(solver(make_denoise(Perfect(process, x_0), process), x, torch.tensor([0.5, 0.0]), process), x_0.expand(2, -1, -1, -1), rtol=0, atol=2e-5)
    assert [float(RFlow(n).log_snr(1 / n)) for n in (100, 1000)] == pytest.approx([9.19, 13.8], abs=0.02)


@pytest.mark.parametrize('process', [RFlow(), DDPM(1000, 'cosine')], ids=['rflow', 'ddpm'])
def test_noise_keeps_the_marginal(process):
    """Ancestral steps end in N(M, S^2) like the data; eta = 0 draws no noise at all."""
    g = generator('anc')
    noise = lambda: torch.randn(20_000, 1, 1, 1, generator=g, dtype=torch.float64)
    x = SAMPLERS['ddpm'](oracle(process), noise(), torch.linspace(1, 0, 201), process, noise)
    assert abs(float(x.mean()) - M) < 0.02 and abs(float(x.std()) - S) < 0.015
    sample_ddim(oracle(process), noise(), torch.linspace(1, 0, 5), process, lambda: pytest.fail('noise asked for'))


def test_ddpm_posterior():
    """sample_ddpm on neighbouring times is Ho 2020, eq. 7: mean and variance of q(x_{t-1} | x_t, x_0)."""
    process = DDPM(1000, 'linear')
    t, u = torch.tensor(0.5), torch.tensor(0.499)
    ab, ab_prev = process.alpha(t).double() ** 2, process.alpha(u).double() ** 2
    beta = 1 - ab / ab_prev
    x, x_0, z = torch.tensor([[[[0.7]]]]), torch.tensor([[[[0.2]]]]), torch.tensor([[[[1.3]]]])
    denoise = lambda x_t, t: (x_0, (x_t - process.alpha(t) * x_0) / process.sigma(t))
    got = SAMPLERS['ddpm'](denoise, x, torch.stack([t, u]), process, lambda: z)
    mean = ab_prev.sqrt() * beta / (1 - ab) * x_0 + (ab / ab_prev).sqrt() * (1 - ab_prev) / (1 - ab) * x
    std = (beta * (1 - ab_prev) / (1 - ab)).sqrt()
    torch.testing.assert_close(got.double(), (mean + std * z).double(), rtol=0, atol=3e-6)


def test_clip_keeps_the_pair_consistent():
    """Clipping x0_hat moves eps_hat with it: alpha x_0 + sigma eps is x_t still; within the range it changes nothing."""
    process, x = RFlow(), torch.randn(8, 1, 2, 2, generator=generator('c'))
    net = lambda x_t, t, context, extra: 3 * x_t
    x_0, eps = make_denoise(net, process, clip=True)(x, 0.4)
    assert x_0.abs().max() <= 1
    torch.testing.assert_close(0.6 * x_0 + 0.4 * eps, x, rtol=0, atol=1e-6)
    free = make_denoise(net, process)(x, 0.4)
    inside = free[0].abs() < 1
    assert inside.any() and torch.equal(x_0[inside], free[0][inside])


def test_gradients_flow():
    """A sampler is differentiable: d(sample)/d(noise) of RFlow's Euler on a linear network equals the closed product."""
    process, x = RFlow(), torch.ones(1, 1, 1, 1, requires_grad=True)
    net = lambda x_t, t, context, extra: 0.5 * x_t
    sample_euler(make_denoise(net, process), x, torch.linspace(1, 0, 5), process).sum().backward()
    assert abs(float(x.grad) - (1 - 0.25 * 0.5) ** 4) < 1e-6


def test_range():
    """A process on [0, 1] maps data there and back exactly."""
    process, x = RFlow(), torch.linspace(-1, 1, 5)
    assert process.to_range(x) is x
    process.range = (0.0, 1.0)
    assert process.to_range(x).tolist() == [0, 0.25, 0.5, 0.75, 1] and torch.equal(process.from_range(process.to_range(x)), x)
