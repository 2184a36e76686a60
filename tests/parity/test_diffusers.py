"""Our samplers against diffusers' schedulers: same network output, same noise, same numbers.

    python -m pytest -q tests/parity/test_diffusers.py        (-s prints the largest difference of each test)
"""
import pytest
import torch

pytest.importorskip('diffusers', reason='pip install -r tests/parity/requirements.txt')
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, FlowMatchEulerDiscreteScheduler,
                       FlowMatchHeunDiscreteScheduler)

from common import DDPM, RFlow, between, sample_ddim, sample_ddpm, sample_dpmpp, sample_dpmpp_2s, sample_dpmpp_sde, sample_euler, sample_heun
from steps import exact_tables, noise_source, trajectory

TYPES = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}
SCHEDULES = {'linear': 'linear', 'cosine': 'squaredcos_cap_v2'}


def network(process):
    """A fixed network of (x_t, net time): a random convolution, bounded. For DDPM it is a guess of x_0, put in the target's terms."""
    kernel = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(1))

    def net(x, t, context=None, extra=None):
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x)).reshape(-1, 1, 1, 1) + (1 / process.steps if isinstance(process, DDPM) else 0)
        x_0 = torch.tanh(torch.conv2d(x, kernel, padding=1) + torch.cos(9 * t))
        if isinstance(process, RFlow):
            return 2 * x_0                                              # a velocity: dividing by t near 0 would blow up both
        return process.target_of(x_0, (x - process.alpha(t) * x_0) / process.sigma(t), t)

    return net


TABLES = pytest.mark.parametrize('own', [False, True], ids=['', 'their tables'])


@TABLES
@pytest.mark.parametrize('clip', [False, True], ids=['', 'clip'])
@pytest.mark.parametrize('eta', [0.0, 0.7, 1.0])
@pytest.mark.parametrize('target', TYPES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@torch.no_grad()
def test_ddim(schedule, target, eta, clip, own, gap):
    """50 steps on trailing times, with and without noise; clipping moves eps along (use_clipped_model_output)."""
    process, x = DDPM(1000, schedule, target), noise_source(2)()
    net, noise, wanted = network(process), noise_source(), []
    states = trajectory(sample_ddim, net, process, x, process.times(50), eta=eta, clip=clip)
    scheduler = DDIMScheduler(1000, beta_schedule=SCHEDULES[schedule], timestep_spacing='trailing', prediction_type=TYPES[target], clip_sample=clip)
    own or exact_tables(scheduler, process)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == [round(1000 * float(t)) - 1 for t in process.times(50)[:-1]]
    for i in scheduler.timesteps:
        fresh = dict(variance_noise=noise()) if eta and i > 19 else {}
        x = scheduler.step(net(x, i / 1000), i, x, eta if i > 19 else 0.0, use_clipped_model_output=clip, **fresh)[0].float()
        wanted.append(x)
    assert gap(states, wanted, f'{schedule} {target}') < (5e-4 if own else 2e-5)


@TABLES
@pytest.mark.parametrize('n', [50, 1000])
@pytest.mark.parametrize('target', TYPES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@torch.no_grad()
def test_ddpm(schedule, target, n, own, gap, monkeypatch):
    """Ancestral steps with the posterior's variance (fixed_small), all of them and on a subset."""
    process, x = DDPM(1000, schedule, target), noise_source(2)()
    net, noise, wanted = network(process), noise_source(), []
    states = trajectory(sample_ddpm, net, process, x, process.times(n))
    scheduler = DDPMScheduler(1000, beta_schedule=SCHEDULES[schedule], timestep_spacing='trailing', prediction_type=TYPES[target], clip_sample=False)
    own or exact_tables(scheduler, process)
    scheduler.set_timesteps(n)
    monkeypatch.setattr('diffusers.schedulers.scheduling_ddpm.randn_tensor', lambda *a, **kw: noise())
    for i in scheduler.timesteps:
        x = scheduler.step(net(x, i / 1000), i, x)[0].float()
        wanted.append(x)
    assert gap(states, wanted, f'{schedule} {target} {n}') < (5e-4 if own else 2e-5)


@pytest.mark.parametrize('n', [1, 7, 50])
@torch.no_grad()
def test_flow_euler(n, gap):
    process, x = RFlow(), noise_source(2)()
    net, wanted, ts = network(process), [], process.times(n)
    states = trajectory(sample_euler, net, process, x, ts)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=ts[:-1].tolist())
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t / 1000), t, x)[0]
        wanted.append(x)
    assert gap(states, wanted, f'{n} steps') < 1e-5


@pytest.mark.parametrize('n', [5, 10, 50])                                        # with fewer, their v = (x - x_0) / 0.001 rounds too coarsely
@torch.no_grad()
def test_flow_heun(n, gap):
    """On diffusers' own times, whose last step, to t=0, is Euler as ours is."""
    process, x, scheduler = RFlow(), noise_source(2)(), FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(n)
    net, wanted, ts = network(process), [], torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    states = trajectory(sample_heun, net, process, x, ts)
    assert len(ts) == n + 1 and ts[0] == 1 and ts[-1] == 0
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(net(x, t / 1000), t, x)[0]
        if k % 2 == 0 and k < len(scheduler.timesteps) - 1:
            continue                                                    # half way: the state at which the slope is taken again
        wanted.append(x)
    assert gap(states, wanted, f'{n} steps') < 1e-5


@pytest.mark.parametrize('n', [5, 20])
@pytest.mark.parametrize('algorithm', ['dpmsolver++', 'sde-dpmsolver++'])
@pytest.mark.parametrize('kind', ['linear eps', 'linear v', 'cosine eps', 'cosine x0', 'flow'])
@torch.no_grad()
def test_dpmpp_2m(kind, algorithm, n, gap, monkeypatch):
    """Two-step DPM-Solver++ and its SDE, times as ours; the last step, to no noise, is first order for both. RFlow on diffusers' own times."""
    noise, wanted, x = noise_source(), [], noise_source(2)()
    shared = dict(algorithm_type=algorithm, solver_order=2, solver_type='midpoint', final_sigmas_type='zero', timestep_spacing='trailing')
    if kind == 'flow':
        process, scheduler = RFlow(), DPMSolverMultistepScheduler(1000, prediction_type='flow_prediction', use_flow_sigmas=True, **shared)
        scheduler.set_timesteps(n)
        ts = scheduler.sigmas.clone()
    else:
        schedule, target = kind.split()
        process, scheduler = DDPM(1000, schedule, target), DPMSolverMultistepScheduler(1000, beta_schedule=SCHEDULES[schedule], prediction_type=TYPES[target], **shared)
        exact_tables(scheduler, process)
        scheduler.set_timesteps(n)
        ts = process.times(n)
        assert scheduler.timesteps.tolist() == [round(1000 * float(t)) - 1 for t in ts[:-1]]
    net = network(process)
    states = trajectory(sample_dpmpp_sde if 'sde' in algorithm else sample_dpmpp, net, process, x, ts)
    monkeypatch.setattr('diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor', lambda *a, **kw: noise())
    for k, i in enumerate(scheduler.timesteps):
        x = scheduler.step(net(x, ts[k] if kind == 'flow' else i / 1000), i, x)[0]
        wanted.append(x)
    assert gap(states, wanted, f'{kind} {algorithm} {n}') < 1e-5


@pytest.mark.parametrize('n', [5, 20])
@pytest.mark.parametrize('kind', ['cosine eps', 'cosine x0', 'cosine v', 'linear eps', 'linear v', 'flow'])
@torch.no_grad()
def test_dpmpp_2s(kind, n, gap):
    """Single-step DPM-Solver++: diffusers' goes through a list of times, here ours with the middles (in log-SNR) between them. RFlow from t=0.999, as
    diffusers' log-SNR at t=1 is -inf."""
    schedule, target = kind.split() if kind != 'flow' else ('linear', 'v')
    process, x, wanted = DDPM(1000, schedule, target) if kind != 'flow' else RFlow(), noise_source(2)(), []
    net, ts = network(process), process.times(n)
    ts[0] = 0.999 if kind == 'flow' else ts[0]
    fine = torch.cat([torch.stack([t, between(t, u, process)]) for t, u in zip(ts[:-2], ts[1:-1])] + [ts[-2:]])
    told = dict(prediction_type='flow_prediction', use_flow_sigmas=True) if kind == 'flow' else dict(beta_schedule=SCHEDULES[schedule], prediction_type=TYPES[target])
    scheduler = DPMSolverSinglestepScheduler(1000, algorithm_type='dpmsolver++', solver_order=2, solver_type='midpoint', final_sigmas_type='zero', **told)
    scheduler.set_timesteps(2 * n - 1)
    assert scheduler.order_list == [1, 2] * (n - 1) + [1]
    sigmas = process.sigma(fine).double()                                  # diffusers' are sigma / alpha, but for flows
    scheduler.sigmas, scheduler.timesteps = sigmas if kind == 'flow' else sigmas / process.alpha(fine).double(), torch.arange(2 * n - 1)
    states = trajectory(sample_dpmpp_2s, net, process, x, ts)
    for k, t in enumerate(fine[:-1]):
        x = scheduler.step(net(x, t if kind == 'flow' else t - 1 / 1000), scheduler.timesteps[k], x)[0]
        if k % 2 or k == 2 * n - 2:
            wanted.append(x)
    assert gap(states, wanted, f'{kind} {n}') < 1e-5
