"""The U-Net, the weight names, the processes and the samplers against MONAI: same weights, same noise, same numbers.

    python -m pytest -q tests/parity/test_monai.py        (-s prints the largest difference of each test)
"""
import pytest
import torch

pytest.importorskip('monai', reason='pip install -r tests/parity/requirements.txt')
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

import train_bravo
from common import (DDPM, Autoencoder, RFlow, UNet, haar, inverse_haar, load_maisi_vae, load_monai, load_run, make_phantom, sample_ddim, sample_ddpm,
                    sample_euler)
from steps import exact_tables, noise_source, trajectory

TYPES = {'eps': 'epsilon', 'v': 'v_prediction', 'x0': 'sample'}
SCHEDULES = {'linear': 'linear_beta', 'cosine': 'cosine'}


def pair(randomise, dims=2, in_channels=2, channels=(16, 32, 32), attention=(0, 1, 1), layers=1, head_channels=8, context_dim=None,
         groups=4, seed=0):
    """MONAI's network with random weights, and ours with the same."""
    theirs = randomise(DiffusionModelUNet(dims, in_channels, 1, layers, channels, [bool(a) for a in attention], groups,
                                          num_head_channels=head_channels, with_conditioning=context_dim is not None,
                                          cross_attention_dim=context_dim), seed)
    ours = UNet(in_channels, 1, channels, attention, layers, head_channels, context_dim, dims, norm_groups=groups)
    ours.load_state_dict(load_monai(theirs.state_dict()), strict=True)
    return theirs, ours


DEFAULT = dict(channels=(128, 256, 256), head_channels=256, groups=32)          # UNet's own widths
NETS = [dict(dims=d, context_dim=c, layers=n) for d in (2, 3) for c in (None, 6) for n in (1, 2)] + [DEFAULT, {**DEFAULT, 'context_dim': 6}]


@pytest.mark.parametrize('kw', NETS, ids=['-'.join(f'{k}={v}' for k, v in kw.items()) for kw in NETS])
def test_unet(kw, randomise, gap):
    """Same number of parameters, same output, same gradient of every parameter and of the input."""
    theirs, ours = pair(randomise, **kw)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    g, context_dim = torch.Generator().manual_seed(1), kw.get('context_dim')
    x = torch.randn(2, 2, *[16 if kw.get('dims') != 3 else 8] * kw.get('dims', 2), generator=g)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    t, context = torch.tensor([0.017, 0.83]), None if context_dim is None else torch.randn(2, 3, context_dim, generator=g)
    mine, other = ours(a, t, context), theirs(b, 1000 * t, context)
    assert other.std() > 0.1
    assert gap(mine, other, 'output') < 1e-5
    assert (ours(a, t.flip(0), context) - mine).abs().max() > 1e-2                     # the weights let t through

    weight = torch.randn(mine.shape, generator=g)
    (mine * weight).mean().backward()
    (other * weight).mean().backward()
    wanted = load_monai({name: p.grad for name, p in theirs.named_parameters()})
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert wanted.keys() == found.keys()
    relative = {k: float((found[k] - wanted[k]).abs().max() / wanted[k].abs().max()) for k in wanted}
    print(f'; gradients {max(relative.values()):.1e} of the largest entry', end='')
    assert max(relative.values()) < 1e-4, max(relative, key=relative.get)
    assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max()


@pytest.mark.parametrize('dims', [3, 2], ids=['3D MAISI', '2D AutoencoderKL'])
def test_autoencoder(dims, randomise, gap):
    """Mean, sigma, decoded image and all gradients equal MAISI's autoencoder (3D, 32^3) and AutoencoderKL without attention (2D)."""
    if dims == 3:
        theirs = AutoencoderKlMaisi(3, 1, 1, [2, 2, 2], [8, 16, 16], [False] * 3, 4, 4, num_splits=1, save_mem=False, norm_float16=False)
    else:
        theirs = AutoencoderKL(2, 1, 1, 2, (8, 16, 16), (False,) * 3, 4, 4, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)
    randomise(theirs)
    ours = Autoencoder(1, 4, (8, 16, 16), 2, dims=dims, norm_groups=4, smooth=dims == 3)
    ours.load_state_dict(load_maisi_vae(theirs.state_dict()), strict=True)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    x = torch.randn(1, 1, *(32,) * dims, generator=torch.Generator().manual_seed(1))
    (mean, log_var), (mu, sigma) = ours.encode(x), theirs.encode(x)
    mine, other = ours.decode(mean), theirs.decode(mu)
    assert min(v.std() for v in (mu, sigma, other)) > 0.1
    assert gap([mean, (log_var / 2).exp(), mine], [mu, sigma, other], f'{dims}D') < 1e-4
    (mine.square().mean() + log_var.mean()).backward()
    (other.square().mean() + 2 * sigma.log().mean()).backward()
    wanted, found = load_maisi_vae({n: p.grad for n, p in theirs.named_parameters()}), {n: p.grad for n, p in ours.named_parameters()}
    assert wanted.keys() == found.keys() and max(float((found[k] - wanted[k]).abs().max() / wanted[k].abs().max()) for k in wanted) < 1e-3


@pytest.mark.parametrize('dims', [2, 3])
def test_haar(dims, gap):
    """PyWavelets' one-level transform; its bands are named by axis, a for the mean and d for the difference."""
    pywt = pytest.importorskip('pywt')
    x = torch.randn(2, 3, *(8, 12, 6)[:dims], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bands = pywt.dwtn(x.numpy(), 'haar', axes=range(2, 2 + dims))
    names = [''.join('ad'[s >> (dims - 1 - a) & 1] for a in range(dims)) for s in range(2 ** dims)]               # the last axis: lowest bit
    wanted = torch.cat([torch.from_numpy(bands[n]) for n in names], 1)
    assert gap(haar(x), wanted, 'bands') < 1e-12 and gap(inverse_haar(wanted), x, 'back') < 1e-12


@pytest.mark.parametrize('kw', NETS[:8:2], ids=['-'.join(f'{k}={v}' for k, v in kw.items()) for kw in NETS[:8:2]])
def test_old_names(kw, randomise):
    """A GenerativeModels state dict gives the same tensors. MONAI's own reader vouches for the old names made here."""
    theirs, _ = pair(randomise, **kw)
    new, old = theirs.state_dict(), {}
    for key, value in new.items():
        if 'transformer_blocks' in key:
            key = key.replace('.out_proj.', '.to_out.0.')
        else:
            key = key.replace('.attn.out_proj.', '.proj_attn.').replace('.attn.to_', '.to_')
        old[key.replace('postconv', 'conv')] = value
    assert {'proj_attn' if kw['context_dim'] is None else 'to_out'} <= {part for key in old for part in key.split('.')}
    assert len(old.keys() - new.keys()) >= 8
    fresh, _ = pair(randomise, **kw, seed=9)
    fresh.load_old_state_dict(dict(old))
    assert all(torch.equal(v, new[k]) for k, v in fresh.state_dict().items())
    a, b = load_monai(old), load_monai(new)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def test_init_from_a_file_of_theirs(randomise, tmp_path, gap):
    """What MONAI's users save starts a run of ours, flags as the file needs them, and the run answers what their network does."""
    theirs = randomise(DiffusionModelUNet(spatial_dims=2, in_channels=2, out_channels=1, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1,
                                          num_head_channels=8, norm_num_groups=4)).eval()
    torch.save(theirs.state_dict(), tmp_path / 'monai.pt')
    make_phantom(tmp_path / 'data', 14, 0, 3, 32)
    train_bravo.main(train_bravo.get_args([*'--preset tiny --channels 8,16 --attention 0,1 --head-channels 8 --norm-groups 4 --steps 1000 --iters 0 --device cpu --dtype fp32'.split(),
                                           '--init', f'{tmp_path}/monai.pt', '--init-target', 'eps', '--data', f'{tmp_path}/data', '--cache', f'{tmp_path}/cache', '--out', f'{tmp_path}/run']))
    x, t = torch.randn(3, 2, 16, 16), torch.tensor([0, 499, 999])
    wanted = theirs(x, t)
    assert wanted.std() > 0.1 and gap(load_run(tmp_path / 'run').net(x, t / 1000), wanted, 'outputs') < 1e-5


@pytest.fixture(params=['bounded'])
def networks(request, randomise):
    """networks(process): our network and MONAI's, same weights, for 1-channel 8x8 images.

    random: they answer whatever they answer. bounded: they guess an x_0 in [-1, 1] and put it in the target's terms, as a
    trained network does, so that nothing is divided by a tiny alpha.
    """
    theirs, ours = pair(randomise, in_channels=1, channels=(8, 16), attention=(0, 1), groups=2)

    def make(process):
        def answer(net):
            def forward(x, t, context=None, extra=None):
                out = net(x, t)
                if request.param == 'random':
                    return out
                time = (t / (1000 if net is theirs else 1) + (1 / process.steps if isinstance(process, DDPM) else 0)).reshape(-1, 1, 1, 1)
                a, s = process.alpha(time), process.sigma(time)
                return process.target_of(out.tanh(), (x - a * out.tanh()) / s, time)
            return forward
        return answer(ours), answer(theirs)

    make.kind = request.param
    return make


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_alpha_bar(schedule):
    t = torch.arange(1, 1001) / 1000
    theirs = DDPMScheduler(1000, SCHEDULES[schedule]).alphas_cumprod
    ours = DDPM(1000, schedule).alpha(t) ** 2
    print(f'\n  alpha^2 {(ours - theirs).abs().max():.1e}', end='')
    assert (ours - theirs).abs().max() < 1e-6
    assert (DDPM(1000, schedule).sigma(t) ** 2 - (1 - theirs)).abs().max() < 1e-6


@pytest.mark.parametrize('target', TYPES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@torch.no_grad()
def test_add_noise(schedule, target):
    """x_t and the training target at every time."""
    process, theirs = DDPM(1000, schedule, target), DDPMScheduler(1000, SCHEDULES[schedule], prediction_type=TYPES[target])
    g, i = torch.Generator().manual_seed(3), torch.arange(1000)
    x_0, eps, t = torch.randn(1000, 1, 4, 4, generator=g), torch.randn(1000, 1, 4, 4, generator=g), (i + 1) / 1000
    seen = []
    process.loss(lambda x, *rest: (seen.append((x, rest[0])), x)[1], x_0, eps, t)
    assert (seen[0][0] - theirs.add_noise(x_0, eps, i)).abs().max() < 1e-5
    assert (1000 * seen[0][1] - i).abs().max() < 1e-3                              # the network sees their integers
    wanted = {'eps': eps, 'x0': x_0, 'v': theirs.get_velocity(x_0, eps, i)}[target]
    assert (process.target_of(x_0, eps, t) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize('clip', [False, True], ids=['', 'clip'])
@pytest.mark.parametrize('target', TYPES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@torch.no_grad()
def test_ddpm(schedule, target, clip, networks, gap):
    """The last 80 of 1000 ancestral steps, fixed_small variance, from the same x_t."""
    process, x = DDPM(1000, schedule, target), noise_source(2)()
    ours, theirs = networks(process)
    states = trajectory(sample_ddpm, ours, process, x, process.times(1000)[-81:], clip=clip)
    scheduler, g, wanted = DDPMScheduler(1000, SCHEDULES[schedule], clip_sample=clip, prediction_type=TYPES[target]), torch.Generator().manual_seed(7), []
    exact_tables(scheduler, process)
    for i in scheduler.timesteps[-80:]:
        x = scheduler.step(theirs(x, i.float().expand(2)), int(i), x, g)[0]
        wanted.append(x)
    assert gap(states, wanted, f'{networks.kind} {schedule} {target}') < 1e-5


@pytest.mark.parametrize('eta', [0.0, 0.7])
@pytest.mark.parametrize('target', TYPES)
@pytest.mark.parametrize('schedule', SCHEDULES)
@torch.no_grad()
def test_ddim(schedule, target, eta, networks, gap):
    """50 steps. MONAI's set_timesteps spaces its times by 999/49 but steps by 20, so the times are given to it."""
    process, x = DDPM(1000, schedule, target), noise_source(2)()
    ours, theirs = networks(process)
    states = trajectory(sample_ddim, ours, process, x, process.times(50), eta=eta)
    scheduler, g, wanted = DDIMScheduler(1000, SCHEDULES[schedule], clip_sample=False, prediction_type=TYPES[target]), torch.Generator().manual_seed(7), []
    scheduler.set_timesteps(50)
    exact_tables(scheduler, process)
    for i in range(999, 0, -20):
        x = scheduler.step(theirs(x, torch.full((2,), float(i))), i, x, eta, g)[0]
        wanted.append(x)
    assert gap(states, wanted, f'{networks.kind} {schedule} {target}') < 1e-5


@pytest.mark.parametrize('n', [1, 10, 30, 1000])
@torch.no_grad()
def test_rflow(n, networks, gap):
    """Euler on MONAI's times; its network predicts x_0 - eps, the negative of ours."""
    process, x = RFlow(1000), noise_source(2)()
    ours, theirs = networks(process)
    ts = process.times(n)
    states = trajectory(sample_euler, ours, process, x, ts)
    scheduler, wanted = RFlowScheduler(1000), []
    scheduler.set_timesteps(n)
    times = [*scheduler.timesteps.tolist(), 0]
    assert (1000 * ts).round().long().tolist() == times
    for t, u in zip(times[:-1], times[1:]):
        x = scheduler.step(-theirs(x, torch.full((2,), float(t))), t, x, u)[0]
        wanted.append(x)
    assert gap(states, wanted, f'{networks.kind} {n} steps') < 1e-5


def test_rflow_add_noise():
    g, t = torch.Generator().manual_seed(3), torch.arange(1, 1001)
    x_0, eps = torch.randn(1000, 1, 4, 4, generator=g), torch.randn(1000, 1, 4, 4, generator=g)
    seen = []
    RFlow(1000).loss(lambda x, *rest: (seen.append(x), x)[1], x_0, eps, t / 1000)
    assert (seen[0] - RFlowScheduler(1000).add_noise(x_0, eps, t)).abs().max() < 1e-6
