"""MAISI's diffusion U-Net, its rectified-flow scheduler and its split convolutions against MONAI's classes: same weights, same numbers.

    python -m pytest -q tests/parity/test_maisi.py        (-s prints the largest difference of each test)
"""
import pytest
import torch

pytest.importorskip('monai', reason='pip install -r tests/parity/requirements.txt')
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.schedulers import RFlowScheduler

from common import MAISI, Autoencoder, Conv3d, RFlow, UNet, load_maisi_unet, load_maisi_vae, make_denoise, sample_maisi

COUNTS = dict(ddpm=169_370_884, rflow=180_500_868)


def maisi(kind, channels, attention, layers=2, heads=32, groups=32):
    """MONAI's network of the published kind, at other widths."""
    old = kind == 'ddpm'
    return DiffusionModelUNetMaisi(3, 4, 4, layers, channels, [bool(a) for a in attention], groups, num_head_channels=[heads * a for a in attention],
                                   num_class_embeds=None if old else 128, resblock_updown=not old, include_fc=not old, use_flash_attention=False,
                                   include_top_region_index_input=old, include_bottom_region_index_input=old, include_spacing_input=True)


@pytest.mark.parametrize('kind', MAISI)
def test_parameters(kind):
    """As many as published, and every tensor of the same shape; no memory is taken."""
    with torch.device('meta'):
        theirs = maisi(kind, (64, 128, 256, 512), (0, 0, 1, 1)).state_dict()
        weights, found, shape = load_maisi_unet(theirs)
        ours = UNet(**shape, **MAISI[kind], dims=3)
    assert found == kind and shape['channels'] == (64, 128, 256, 512) and shape['attention'] == (0, 0, 1, 1) and shape['layers'] == 2
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[kind]
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in weights.items()}


@pytest.mark.parametrize('kind', MAISI)
def test_unet(kind, randomise, gap):
    """Output and gradients at 32^3, every parameter random; class, spacing, region and t each move the output."""
    theirs = randomise(maisi(kind, (8, 16, 16), (0, 0, 1), 1, 8, 4))
    weights, _, shape = load_maisi_unet(theirs.state_dict())
    ours = UNet(**{**shape, 'head_channels': 8, 'norm_groups': 4}, **MAISI[kind], dims=3)
    ours.load_state_dict(weights, strict=True)
    g = torch.Generator().manual_seed(1)
    x, t, spacing = torch.randn(2, 4, 32, 32, 32, generator=g), torch.tensor([0.017, 0.83]), 100 * torch.tensor([[1.0, 1.2, 0.9], [0.5, 2, 1]])
    top, bottom = torch.eye(4)[[0, 2]], torch.eye(4)[[1, 3]]
    extra = torch.cat([top, bottom, spacing], 1) if kind == 'ddpm' else torch.cat([torch.tensor([[9.0], [30]]), spacing], 1)
    told = dict(top_region_index_tensor=top, bottom_region_index_tensor=bottom) if kind == 'ddpm' else dict(class_labels=torch.tensor([9, 30]))
    mine, other = ours(x, t, extra=extra), theirs(x, 1000 * t, spacing_tensor=spacing, **told)
    assert other.std() > 0.1
    assert gap(mine, other, kind) < 1e-4
    for moved in [(t.flip(0), extra), *((t, torch.cat([extra[:, :i], extra.flip(0)[:, i:i + 1], extra[:, i + 1:]], 1)) for i in range(extra.shape[1]))]:
        assert moved[1].equal(extra) and moved[0].equal(t) or (ours(x, moved[0], extra=moved[1]) - mine).abs().max() > 1e-3
    (mine ** 2).mean().backward(), (other ** 2).mean().backward()
    wanted, found = load_maisi_unet({n: p.grad for n, p in theirs.named_parameters()})[0], {n: p.grad for n, p in ours.named_parameters()}
    assert wanted.keys() == found.keys() and max(float((found[k] - wanted[k]).abs().max() / wanted[k].abs().max()) for k in wanted) < 1e-3


@pytest.mark.parametrize('n', [1, 2, 10, 30, 100, 1000])
@pytest.mark.parametrize('size', [(64, 64, 32), (64, 64, 64), (128, 128, 128), (48, 40, 24), (8, 8, 4)], ids=str)
def test_times(size, n):
    """Times and steps of their scheduler as published: half precision, next time cut to a whole number. The sums of the steps to 1e-5."""
    scheduler = RFlowScheduler(1000, use_discrete_timesteps=False, use_timestep_transform=True, sample_method='uniform', scale=1.4)
    numel = torch.prod(torch.tensor(size))
    scheduler.set_timesteps(n, input_img_size_numel=numel)
    ts = RFlow().times(n, 'maisi', (float(numel) / 32 ** 3) ** (1 / 3))
    theirs = [*scheduler.timesteps.float().tolist(), 0]
    assert (1000 * ts - torch.tensor(theirs)).abs().max() < 1e-3
    v, x, states = torch.ones(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2), []
    end = sample_maisi(lambda x, t: (x - t * v, x + (1 - t) * v), x, ts, RFlow(), None, lambda i, t, x_t, x_0: states.append(x_t))
    for i, (t, u) in enumerate(zip(scheduler.timesteps, [*scheduler.timesteps[1:], 0])):
        x = scheduler.step(-v, t, x, u)[0]
        assert (([*states[1:], end][i] - x).abs().max() < 1e-5), i


@torch.no_grad()
def test_trajectory(randomise, gap):
    """10 steps of a random network from the same noise: ours predicts eps - x_0, theirs x_0 - eps."""
    theirs = randomise(maisi('rflow', (8, 16), (0, 1), 1, 8, 4))
    weights, _, shape = load_maisi_unet(theirs.state_dict())
    ours = UNet(**{**shape, 'head_channels': 8, 'norm_groups': 4}, **MAISI['rflow'], dims=3)
    ours.load_state_dict(weights | {k: -weights[k] for k in ('out.2.weight', 'out.2.bias')})
    x, states, wanted = torch.randn(1, 4, 8, 8, 4, generator=torch.Generator().manual_seed(2)), [], []
    spacing = torch.tensor([[100.0, 90, 120]])
    ts = RFlow().times(10, 'maisi', 1.3)
    end = sample_maisi(make_denoise(ours, RFlow(), extra=torch.cat([torch.tensor([[9.0]]), spacing], 1)), x, ts, RFlow(), None,
                       lambda i, t, x_t, x_0: states.append(x_t))
    scheduler = RFlowScheduler(1000, use_discrete_timesteps=False, use_timestep_transform=True)
    scheduler.set_timesteps(10, input_img_size_numel=1.3 ** 3 * 32 ** 3)
    for t, u in zip(scheduler.timesteps, [*scheduler.timesteps[1:], 0]):
        x = scheduler.step(theirs(x, torch.tensor([float(t)]), class_labels=torch.tensor([9]), spacing_tensor=spacing), t, x, u)[0]
        wanted.append(x)
    assert gap([*states[1:], end], wanted, 'states') < 1e-4


@torch.no_grad()
def test_splits(randomise, gap, monkeypatch):
    """Their autoencoder in 4 splits (whose convolutions want lengths that divide) against ours in 4 slabs and in one."""
    theirs = randomise(AutoencoderKlMaisi(3, 1, 1, [1] * 3, [8, 8, 16], [False] * 3, 4, 4, num_splits=4, dim_split=0, save_mem=False, norm_float16=False))
    ours = Autoencoder(1, 4, (8, 8, 16), 1, dims=3, norm_groups=4, smooth=True)
    ours.load_state_dict(load_maisi_vae(theirs.state_dict()), strict=True)
    x = torch.randn(1, 1, 64, 16, 16, generator=torch.Generator().manual_seed(1))
    mu = theirs.encode(x)[0]
    wanted = [mu, theirs.decode(mu)]
    for n in (1, 4):
        monkeypatch.setattr(Conv3d, 'splits', n)
        assert gap([ours.encode(x)[0], ours.decode(mu)], wanted, f'{n} slabs') < 1e-4
