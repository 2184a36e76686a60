"""MAISI's published files, here with random weights of small widths: loading, the volumes' frame, splits, the sampler, end to end. Against
MONAI's own classes: tests/parity/test_maisi.py."""
import argparse
import math
import re

import nibabel as nib
import numpy as np
import pytest
import torch

import common
from common import MAISI, Autoencoder, Conv3d, MaisiVAE, RFlow, UNet, load_run, make_denoise, maisi_extra, sample_euler, sample_maisi, turn, turn_back
from train_bravo import get_args, read_autoencoder, read_maisi_unet


def randomised(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.2 * torch.randn(p.shape, generator=g)
    return net


def as_published(weights, kind=None):
    """Our weights under the names of MAISI's autoencoder, or of its U-Net of this kind: what a published file holds."""
    if kind is None:
        rename = [(r'^(en|de)coder\.', r'\1coder.blocks.'), (r'\.skip', '.nin_shortcut'), ('^mean', 'quant_conv_mu'), ('^log_var', 'quant_conv_log_sigma'),
                  ('^from_latent', 'post_quant_conv')]
    else:
        layers = ['top_region_index', 'bottom_region_index', 'spacing'][-len(MAISI[kind]['joined']):]
        rename = [(rf'^joined\.{i}', f'{name}_layer') for i, name in enumerate(layers)]
        rename += [('class_embed', 'class_embedding'), (r'\.time$', '.time_emb_proj'), (r'\.skip$', '.skip_connection'), (r'attn\.out$', 'attn.out_proj'),
                   (r'^(down_blocks\.\d+)\.resample$', r'\1.downsampler.op'), (r'resample\.conv$', 'upsampler.postconv'),
                   (r'^(down|up)(_blocks\.\d+)\.resample', r'\1\2.\1sampler')]
    out = {}
    for key, value in weights.items():
        old, name = key.rsplit('.', 1)
        stem = old
        for pattern, text in rename:
            stem = re.sub(pattern, text, stem)
        wrap = ('.conv' if kind or 'quant' in stem else '.conv.conv') if weights[f'{old}.weight'].ndim == 5 else ''
        parts = [(stem, value)] if not stem.endswith('.qkv') else [(f'{stem[:-3]}to_{c}', v) for c, v in zip('qkv', value.chunk(3))]
        out |= {f'{stem}{wrap}.{name}': v for stem, v in parts}
    return out


SMALL = dict(channels=(8, 16), attention=(0, 1), layers=1, head_channels=32, norm_groups=32)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of the published layout: the autoencoder a bare state dict, the U-Nets dicts with what training left in them."""
    root = tmp_path_factory.mktemp('maisi')
    torch.save(as_published(randomised(MaisiVAE(4, (8, 8, 16), 1, 32)).state_dict()), root / 'vae.pt')
    for kind in MAISI:
        net = randomised(UNet(4, 4, dims=3, **SMALL, **MAISI[kind]))
        told = as_published(net.state_dict(), kind)
        if kind == 'ddpm':
            told |= {k.replace('to_q', 'out_proj'): v for k, v in told.items() if 'to_q' in k}                 # the layers that it does not use
        torch.save(dict(unet_state_dict=told, scale_factor=torch.tensor(0.8, dtype=torch.float16), num_train_timesteps=1000, epoch=3, loss=0.1), root / f'{kind}.pt')
    return root


@pytest.mark.parametrize('kind', MAISI)
def test_shape_from_file(kind, files):
    """Kind, widths, attention, layers and scale factor are read off the file; the network is the one that was written, its sign ours."""
    weights, found, shape, scale = read_maisi_unet(files / f'{kind}.pt')
    assert found == kind and scale == pytest.approx(0.8, abs=1e-3)
    assert shape == dict(in_channels=4, out_channels=4, **SMALL)
    ours, theirs = UNet(**shape, dims=3, **MAISI[kind]), randomised(UNet(4, 4, dims=3, **SMALL, **MAISI[kind]))
    ours.load_state_dict(weights, strict=True)
    x, t, extra = torch.randn(1, 4, 8, 8, 8, generator=common.generator('x')), torch.tensor([0.3]), torch.ones(1, 4 if kind == 'rflow' else 11)
    assert torch.equal(ours(x, t, extra=extra), theirs(x, t, extra=extra) * (-1 if kind == 'rflow' else 1))


def test_autoencoder_from_file(files):
    about, run = read_autoencoder(files / 'vae.pt')
    assert run is None and about['args']['channels'] == [8, 8, 16] and about['args']['layers'] == 1 and about['args']['latent_channels'] == 4
    written = randomised(MaisiVAE(4, (8, 8, 16), 1, 32)).state_dict()
    assert written.keys() == about['weights'].keys() and all(torch.equal(v, about['weights'][k]) for k, v in written.items())


def test_frame():
    """Right, anterior, superior: voxel (z, y, x) goes to (x from the right end, y from the far end, z). Both networks act in that frame."""
    v = torch.arange(2 * 3 * 4.0).view(1, 1, 2, 3, 4)
    assert turn(v)[0, 0, 0, 0, 1] == v[0, 0, 1, 2, 3] and turn(v)[0, 0, 3, 2, 0] == v[0, 0, 0, 0, 0]
    assert torch.equal(turn_back(turn(v)), v)
    vae, x = randomised(MaisiVAE(2, (4, 4, 8), 1, 4)), torch.randn(1, 1, 4, 8, 12, generator=common.generator('frame'))
    plain = Autoencoder(1, 2, (4, 4, 8), 1, dims=3, norm_groups=4, smooth=True)
    plain.load_state_dict(vae.state_dict())
    mean = plain.encode((turn(x) + 1) / 2)[0]
    assert torch.allclose(vae.encode(x)[0], turn_back(mean), atol=1e-6) and vae.encode(x)[0].shape[2:] == (1, 2, 3)
    assert torch.allclose(vae.decode(vae.encode(x)[0]), turn_back(2 * plain.decode(mean) - 1), atol=1e-5)
    nets = [randomised(UNet(1, 1, (8, 8), (0, 0), dims=3, norm_groups=2, head_channels=8, turned=on)) for on in (False, True)]
    t = torch.tensor([0.4])
    assert torch.allclose(nets[1](v.repeat(1, 1, 2, 2, 1)[:, :, :, :6], t), turn_back(nets[0](turn(v.repeat(1, 1, 2, 2, 1)[:, :, :, :6]), t)), atol=1e-5)


@pytest.mark.parametrize('kind', MAISI)
def test_extra(kind):
    args = argparse.Namespace(maisi=kind, maisi_class=9)
    extra = maisi_extra(args, [[2.0, 1.1, 0.9], [1, 1, 1]])
    head = [9.0] if kind == 'rflow' else [100.0, 0, 0, 0, 100, 0, 0, 0]
    assert torch.allclose(extra, torch.tensor([[*head, 90, 110, 200], [*head, 100, 100, 100]]))


@pytest.mark.parametrize('size', [(8, 8, 8), (7, 6, 5), (3, 4, 4)], ids=str)
@pytest.mark.parametrize('kw', [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=1), dict(kernel_size=3, stride=2, padding=1)], ids=str)
def test_split_convolution(kw, size):
    """Any number of slabs, lengths that do not divide and slabs that hold nothing included: the same values and gradients."""
    conv, x = randomised(Conv3d(3, 4, **kw)), torch.randn(2, 3, *size, generator=common.generator('split', size), requires_grad=True)
    seen = []
    for conv.splits in (1, 2, 4, 9):
        conv.zero_grad(), setattr(x, 'grad', None)
        out = conv(x)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        seen.append([out.detach(), x.grad, conv.weight.grad.clone()])
    assert all((a - b).abs().max() < 1e-5 * max(1, float(a.abs().max())) for other in seen[1:] for a, b in zip(seen[0], other))


def test_split_autoencoder(monkeypatch):
    """num_splits 1 against 4: encode and decode to 1e-5, group norm over the whole."""
    vae, x = randomised(MaisiVAE(4, (8, 8, 16), 1, 4)), torch.randn(1, 1, 16, 16, 16, generator=common.generator('vae'))
    seen = []
    for n in (1, 4):
        monkeypatch.setattr(Conv3d, 'splits', n)
        mean, log_var = vae.encode(x)
        seen.append((mean, log_var, vae.decode(mean)))
    assert seen[0][2].std() > 0.1 and all((a - b).abs().max() < 1e-5 * max(1, float(a.detach().std())) for a, b in zip(*seen))


@pytest.mark.parametrize('size, total, first', [((64, 64, 32), 1.00984, (1000, 978.5, 957, 934.5)), ((64, 64, 64), 1.00962, (1000, 983, 965.5, 947.5)),
                                                ((128, 128, 128), 1.00869, (1000, 991.5, 982.5, 973))], ids=str)
def test_published_times(size, total, first):
    """The times that the published networks were sampled at with 30 steps, and the sum of the steps: a walk under a constant slope of 1."""
    process = RFlow()
    ts = process.times(30, 'maisi', (math.prod(size) / 32 ** 3) ** (1 / 3))
    assert (1000 * ts[:4]).tolist() == pytest.approx(first, abs=1e-4) and ts[-1] == 0
    end = sample_maisi(lambda x, t: (torch.zeros(1), -torch.ones(1)), torch.zeros(1), ts, process)             # v = eps - x_0 = -1
    assert float(end) == pytest.approx(total, abs=1e-5)
    grid = RFlow().times(30, shift=(math.prod(size) / 32 ** 3) ** (1 / 3))                                      # our own: no rounding, sum 1
    assert (grid - ts).abs().max() < 3e-4
    assert float(sample_euler(lambda x, t: (x - t * -1, x + (1 - t) * -1), torch.zeros(1), grid, process)) == pytest.approx(1, abs=1e-5)


def test_scaled_schedule():
    """DDPM of the ddpm version: betas linear in their root, 0.0015 to 0.0195."""
    beta = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    t = torch.tensor([1, 400, 1000]) / 1000
    assert torch.allclose(common.DDPM(1000, 'maisi').alpha(t) ** 2, torch.cumprod(1 - beta, 0)[[0, 399, 999]].float(), rtol=1e-5)


@pytest.mark.parametrize('kind', MAISI)
def test_start(kind, files, call, tmp_path):
    """A run that starts from the files is, at its first step, the network of the file in our frame, blind to the mask; it keeps the file's scale
    factor and the network's own time shift."""
    flags = ['--volume', 8, '--size', 16, '--maisi-vae', files / 'vae.pt', '--maisi-unet', files / f'{kind}.pt', '--iters', 0]
    run = load_run(call('bravo', tmp_path / kind, *flags, *(['--rflow', '--maisi-class', 30] if kind == 'rflow' else [])))
    theirs = randomised(UNet(4, 4, dims=3, **SMALL, **MAISI[kind]))
    g = common.generator('start')
    x, mask, t, spacing = torch.randn(2, 4, 2, 4, 4, generator=g), torch.rand(2, 1, 8, 16, 16, generator=g).round(), 0.7, [[3, 2, 1.5], [1, 1, 1]]
    extra = maisi_extra(run.args, spacing)
    assert extra[0, 0] == (30 if kind == 'rflow' else 100) and run.args.maisi == kind
    run.net.to(memory_format=torch.contiguous_format)                  # channels_last's norm of so few voxels is good to 1e-2 only
    x_0, eps = make_denoise(run.net, run.process, mask, None, extra)(x, t)
    with torch.no_grad():
        told = turn_back(theirs(turn(x), torch.full((2,), 1000 * t if kind == 'rflow' else 699.0) / 1000, extra=extra))
    found = x_0 - eps if kind == 'rflow' else eps                                             # what the original predicts
    assert found.std() > 0.1 and (found - told).abs().max() < 1e-4
    space = run.process.space
    assert space.scale.flatten().tolist() == pytest.approx([1 / 0.8] * 4, abs=1e-3) and not space.shift.any()
    images = torch.rand(1, 1, 8, 16, 16, generator=g) * 2 - 1
    z = randomised(MaisiVAE(4, (8, 8, 16), 1, 32)).encode(images)[0]
    assert torch.allclose(space.encode(images), z * space.scale.reciprocal(), atol=1e-5) and space.encode(images).shape == (1, *space.shape(16))
    assert run.process.shift == pytest.approx((2 * 4 * 4) ** (1 / 3) / 32 if kind == 'rflow' else 1)


def test_end_to_end(files, call, phantom, tmp_path):
    """Autoencoder trained on from the file, latents of it, the U-Net trained on, a volume drawn as the original draws, NIfTI with its spacing."""
    sizes = ['--volume', 8, '--size', 16, '--iters', 2]
    vae = call('bravo', tmp_path / 'vae', '--vae', 4, '--maisi-vae', files / 'vae.pt', '--splits', 2, *sizes)
    run = call('bravo', tmp_path / 'run', '--rflow', '--latent', vae, '--maisi-unet', files / 'rflow.pt', *sizes)
    sparse = load_run(call('bravo', tmp_path / 'sparse', '--rflow', '--latent', vae, '--maisi-unet', files / 'rflow.pt', '--sparse24', *sizes, '--iters', 0)).net.state_dict()
    started = read_maisi_unet(files / 'rflow.pt')[0]
    assert all(torch.equal(v, started[common.plain_name(k)]) for k, v in sparse.items() if k.endswith('norm1.weight'))
    assert all((f / 'samples_000002.png').exists() for f in (vae, run))
    state = common.load_checkpoint(run)
    start = read_autoencoder(files / 'vae.pt')[0]['weights']
    assert state['space']['weights'].keys() == start.keys() and any(not torch.equal(v, start[k]) for k, v in state['space']['weights'].items())
    assert state['space']['scale'].tolist() == pytest.approx([1 / 0.8] * 4, abs=1e-3)
    seen = {}
    for name, flags in dict(maisi=['--sampler', 'maisi'], split=['--sampler', 'maisi', '--splits', 3], euler=[]).items():
        out = call('sample', tmp_path / name, '--data', phantom, '--bravo', run, '--n', 1, '--steps', 3, *flags)
        row = common.read_csv(out / 'manifest.csv')[0]
        image = nib.load(out / row['folder'] / 'bravo.nii.gz')
        volumes = common.load_slices([phantom], 16, box=common.load_run(run).box, cache=tmp_path / 'cache', depth=8)
        spacing = next(r['spacing'] for r in volumes.table if r['folder'] == row['condition'].split(':')[0])
        assert image.shape == (16, 16, 8) and np.allclose(image.header.get_zooms(), spacing[::-1], atol=1e-4)
        seen[name] = np.asarray(image.dataobj)
    assert seen['maisi'].std() > 0.01 and np.abs(seen['maisi'] - seen['split']).max() < 5e-5 and np.abs(seen['maisi'] - seen['euler']).max() > 2e-4


WRONG = [  # flags, words of the line
    ('--maisi-vae VAE', '--maisi-vae volumes --volume'),
    ('--volume 8 --maisi-vae RFLOW --rflow', '--maisi-vae no'),
    ('--volume 8 --maisi-vae NOWHERE --rflow', '--maisi-vae no such file'),
    ('--volume 8 --maisi-vae VAE --maisi-unet VAE --rflow', '--maisi-unet no diffusion U-Net unet_state_dict scale_factor'),
    ('--volume 8 --maisi-vae VAE --maisi-unet NOTES --rflow', 'NOTES loaded safely'),
    ('--volume 8 --maisi-vae VAE --maisi-unet RFLOW', 'rflow add --rflow'),
    ('--volume 8 --maisi-vae VAE --maisi-unet DDPM --rflow', 'ddpm leave away --rflow'),
    ('--volume 8 --maisi-vae VAE --maisi-unet RFLOW --rflow --channels 8,8', '--channels follows leave'),
    ('--volume 8 --maisi-unet RFLOW --rflow', '--maisi-unet --maisi-vae --latent'),
    ('--volume 8 --maisi-vae VAE --vae 2', '--maisi-vae factor 4'),
    ('--volume 8 --rflow --maisi-class 9', '--maisi-class 9 --maisi-unet'),
    ('--rflow --splits 4', '--splits 4 --volume'),
]


@pytest.mark.parametrize('flags, words', WRONG, ids=[w[0] for w in WRONG])
def test_wrong(flags, words, files, capsys, tmp_path):
    (tmp_path / 'notes').write_text('no network')
    names = dict(VAE=files / 'vae.pt', RFLOW=files / 'rflow.pt', DDPM=files / 'ddpm.pt', NOWHERE=tmp_path / 'nowhere', NOTES=tmp_path / 'notes')
    with pytest.raises(SystemExit) as e:
        get_args(['--preset', 'tiny', '--size', '16', '--device', 'cpu', *(str(names.get(f, f)) for f in flags.split())])
    line = capsys.readouterr().err
    assert e.value.code == 2 and line.count('\n') == 1 and all(str(names.get(w, w)) in line for w in words.split()), line
