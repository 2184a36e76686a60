"""Volumes: decoding, the mask rule in mm3, training that resumes to the bit, sampling to NIfTI, crops that know their place, inflation."""
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

import common
import evaluate
from common import (UNet, augment, coordinates, crop_volumes, decode_patient, find_patients, generator, inflate, load_run, load_slices, read_nifti,
                    resample, shrink_mask, views, write_patient)
from test_errors import refused

ON = ('--rflow', '--volume', 4)


@pytest.fixture(scope='module')
def volumes(call, tmp_path_factory):
    """Finished runs on volumes of 4 x 16 x 16: seg, bravo, bands."""
    root = tmp_path_factory.mktemp('volumes')
    call('seg', root / 'seg', *ON)
    call('bravo', root / 'bravo', *ON, '--augment', '--p-uncond', 0.1, '--lr', 0.01)
    call('bravo', root / 'bands', *ON, '--wavelet', '--iters', 2)
    return root


def ball(shape, spacing, centre, mm):
    """Voxels within mm of a centre in voxels."""
    i = np.indices(shape) - np.array(centre).reshape(3, 1, 1, 1)
    return ((i * np.array(spacing).reshape(3, 1, 1, 1)) ** 2).sum(0) <= mm ** 2


# ---------------------------------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------------------------------


def test_mask_rule_in_mm3():
    """2 x 1 x 1 mm voxels: a piece of 3 (6 mm3) is a speck below 8 mm3, one of 4 is kept as a voxel, a ball keeps its volume; a piece that
    joins across slices only is one piece; nothing changes on the mask's own grid."""
    mask, spacing = np.zeros((32, 64, 64), np.uint8), (2.0, 1.0, 1.0)
    mask[2, 2, 2:5] = 1
    mask[20:22, 50, 50:52] = 1
    mask |= ball(mask.shape, spacing, (14, 30, 30), 12)
    for z in range(4):
        mask[26 + z, 8 + z, 8 + z] = 1                                             # a staircase of corners
    small, (kept, rescued, dropped) = shrink_mask(mask, (8, 16, 16), math.prod(spacing), 8.0)
    assert (kept, rescued, dropped) == (3, 2, 1)
    assert small[0, 0, 0] == 0 and small[5, 12, 12] == 1 and small[6:].sum() == 1
    voxel = math.prod(spacing) * 4 ** 3
    assert abs(small[1:6, 4:11, 4:11].sum() * voxel / (mask[4:24, 16:44, 16:44].sum() * 2) - 1) < 0.15
    assert np.array_equal(shrink_mask(mask, mask.shape, 2.0, 0)[0], mask)
    flat = np.random.default_rng(0).random((1, 40, 40)) > 0.8                        # one slice: the rule of slices
    assert np.array_equal(shrink_mask(flat, (1, 10, 10), 1.0, 4.0)[0][0], shrink_mask(flat[0], 10, 1.0, 4.0)[0])


def test_resample_is_linear_in_each_axis():
    """A plane a + bz + cy + dx stays one away from the borders, up and down, with voxel centres kept; its own size is the same bits."""
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) + 0.5 for n in (12, 16, 16)), indexing='ij')
    plane = (0.02 * z - 0.03 * y + 0.01 * x)[None]
    for depth, size in ((6, 8), (24, 32), (24, 8)):
        out = resample(plane, size, depth)
        w, v, u = np.meshgrid(*((np.arange(n) + 0.5) * m / n for n, m in ((depth, 12), (size, 16), (size, 16))), indexing='ij')
        inside = (slice(depth // 6, -(depth // 6)), *(slice(size // 8, -(size // 8)),) * 2)
        np.testing.assert_allclose(out[0][inside], (0.02 * w - 0.03 * v + 0.01 * u)[inside], atol=1e-5)
    assert np.array_equal(resample(plane, 16, 12), plane) and np.array_equal(resample(plane, 16), plane)


def test_decode(tmp_path):
    """From the first slice with a head to the last; spacing follows the grid, so that extents in mm stay; image and mask stay together."""
    shape, spacing = (14, 40, 40), (3.0, 2.0, 2.0)
    head = np.zeros(shape, np.float32)
    head[2:12, 4:-4, 4:-4], head[2:12, 4:6, 4:-4] = 300, 150
    mask = ball(shape, spacing, (6, 16, 24), 9)
    head[mask] = 1000
    write_patient(tmp_path / 'p', {'bravo': head}, mask, spacing)
    images, masks, (row,), notes = decode_patient(find_patients([tmp_path], ('bravo', 'seg'))[0], 20, (0.0, 0.0, 1.0, 1.0), 4.0, None, 5)
    assert images.shape == masks.shape == (1, 1, 5, 20, 20) and images.dtype == np.float32 and masks.dtype == np.uint8
    assert row['spacing'] == [6.0, 4.0, 4.0] and row['z'] == 2 and row['tumour'] == masks.sum() and notes['lesions kept'] == 1
    assert abs(masks.sum() * 6 * 4 * 4 / (mask.sum() * 12) - 1) < 0.2
    for weight in (np.clip(images[0, 0] + 0.5, 0, None), masks[0, 0]):                # voxel centres: (6.5 x 3 - 6) / 6 - 0.5 and so on
        centre = [(weight * i).sum() / weight.sum() for i in np.indices(weight.shape)]
        np.testing.assert_allclose(centre, (1.75, 7.75, 11.75), atol=0.2)
    outer = images[0, 0, :, 0, 0]
    assert (outer == -1).all() and images[0, 0, 2, 10, 4] > -0.7                     # all five slices are head: the empty ones are gone
    assert (images[0, 0, :, 5, 5] > -0.7).all()


def test_cache_and_reading_back(tmp_path, phantom, cache):
    """A volume row a patient, in the same parts as its slices; a written set comes back to the bit; slices keep their own cache."""
    slices, data = (load_slices([phantom], 16, cache=cache, depth=d) for d in (None, 4))
    assert data.images.shape == (14, 1, 4, 16, 16) and data.masks.shape == (14, 1, 4, 16, 16) and slices.images.shape[1:] == (1, 16, 16)
    assert dict(zip((r['patient'] for r in data.table), data.part)) == dict(zip((r['patient'] for r in slices.table), slices.part))
    for i in (0, 1):
        write_patient(tmp_path / f'set/s{i}', {'bravo': data.images[i, 0]}, data.masks[i, 0], data.table[i]['spacing'])
    (tmp_path / 'set/manifest.csv').write_text('folder,source_patient\ns0,\ns1,\n')
    back = load_slices([tmp_path / 'set'], 16, cache=tmp_path / 'cache', depth=4)
    assert np.array_equal(back.images, data.images[:2]) and np.array_equal(back.masks, data.masks[:2])
    np.testing.assert_allclose([r['spacing'] for r in back.table], [r['spacing'] for r in data.table[:2]], rtol=1e-6)


def test_augment_moves_all_slices_alike():
    """Each slice of a volume moves as that slice alone would."""
    g = generator('augment')
    x, m, u = torch.rand(3, 1, 4, 16, 16, generator=g) * 2 - 1, (torch.rand(3, 1, 4, 16, 16, generator=g) > 0.8).float(), torch.rand(3, 5, generator=g)
    moved, mask = augment(x, m, u)
    for z in range(4):
        a, b = augment(x[:, :, z], m[:, :, z], u)
        assert torch.equal(moved[:, :, z], a) and torch.equal(mask[:, :, z], b)
    assert not torch.equal(moved, x)


def test_views():
    """The plane with the most tumour, or the middle one; the coronal one has its top up and cubes for voxels."""
    v = np.arange(4 * 8 * 8, dtype=np.float32).reshape(1, 4, 8, 8)
    middle, = views(v)
    assert middle.shape == (16, 8) and np.array_equal(middle[:8], v[0, 2]) and np.array_equal(middle[8::2], v[0, ::-1, 4])
    mask = np.zeros_like(v)
    mask[0, 3, 1, 2] = 1
    tumour, = views(v, mask)
    assert np.array_equal(tumour[:8], v[0, 3]) and np.array_equal(tumour[9::2], v[0, ::-1, 1])
    assert all(np.array_equal(a, b) for a, b in zip(views(v[0]), v[0]))


# ---------------------------------------------------------------------------------------------------------------------
# crops
# ---------------------------------------------------------------------------------------------------------------------


def test_crops_know_where_they_are():
    """Coordinates of a crop are the crop of the volume's coordinates; a third of the crops has the tumour inside, the rest lies anywhere."""
    whole = coordinates(torch.zeros(1, 1, 8, 16, 16))
    assert whole.shape == (1, 3, 8, 16, 16) and torch.allclose(whole[0, 0, :, 0, 0], (torch.arange(8) + 0.5) / 4 - 1)
    n, mask = 600, torch.zeros(1, 1, 8, 16, 16)
    mask[0, 0, 7, 15, 0] = 1
    u = torch.rand(n, 4, generator=generator('crops'))
    images, masks, where = crop_volumes(whole[:, :1].expand(n, -1, -1, -1, -1), mask.expand(n, -1, -1, -1, -1), (4, 8), u, 1 / 3)
    assert images.shape == masks.shape == (n, 1, 4, 8, 8)
    assert torch.allclose(coordinates(images, where)[:, :1], images, atol=1e-6)
    at = (where[:, :3] * torch.tensor([8, 16, 16])).round().long()
    assert torch.equal(masks.flatten(1).any(1), (at == torch.tensor([4, 8, 0])).all(1)) and masks[u[:, 0] < 1 / 3].flatten(1).any(1).all()
    free = at[u[:, 0] >= 1 / 3]
    assert free.min(0).values.tolist() == [0, 0, 0] and free.max(0).values.tolist() == [4, 8, 8]
    none = crop_volumes(images, torch.zeros_like(images), (4, 8), u, 1.0)            # no tumour: anywhere, here the only place
    assert torch.equal(none[0], images)


# ---------------------------------------------------------------------------------------------------------------------
# inflation
# ---------------------------------------------------------------------------------------------------------------------


def randomised(net, seed):
    g = generator('weights', seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim == 1 else 1.2 / math.sqrt(p[0].numel())))
    return net.eval()


@torch.no_grad()
def test_inflated_network_is_the_2d_one_on_constant_volumes():
    """Every parameter random: of a volume constant along z the inflated net makes the 2D output at every z, borders included. Of one that
    changes along z it does not (norms, attention and strides join the slices)."""
    shape = dict(channels=(8, 16, 16), attention=(0, 1, 1), head_channels=8, norm_groups=4)
    flat, deep = randomised(UNet(2, 1, **shape), 0), UNet(2, 1, dims=3, **shape).eval()
    deep.load_state_dict(inflate(flat.state_dict()))
    x, t = torch.randn(2, 2, 16, 16, generator=generator('x')), torch.tensor([0.3, 0.9])
    want = flat(x, t)
    assert want.std() > 0.1
    out = deep(x[:, :, None].repeat(1, 1, 8, 1, 1), t)
    assert (out - want[:, :, None]).abs().max() < 1e-5 * max(1, want.abs().max())
    y = torch.randn(2, 2, 8, 16, 16, generator=generator('y'))
    assert (deep(y, t) - torch.stack([flat(y[:, :, z], t) for z in range(8)], 2)).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# end to end
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('script, flags', [('seg', ('--crop', '2,8')), ('bravo', ('--augment', '--p-uncond', 0.1, '--crop', '2,8'))])
def test_resume_is_exact(call, tmp_path, script, flags):
    """Two steps, a stop and two more are four steps, to the bit; crops and augmentation included."""
    flags = (*ON, *flags, '--save-every', 2, '--keep-every', 2)
    whole = torch.load(call(script, tmp_path / 'a', *flags) / 'ckpt.pt', weights_only=True)
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b/ckpt.pt').write_bytes((tmp_path / 'a/ckpt_2.pt').read_bytes())
    again = torch.load(call(script, tmp_path / 'b', *flags) / 'ckpt.pt', weights_only=True)
    assert whole['step'] == again['step'] == 4 and whole['net'].keys() == again['net'].keys()
    assert all(torch.equal(whole[k][n], again[k][n]) for k in ('net', 'ema') for n in whole[k])
    assert whole['net']['conv_in.weight'].shape[1:] == ((1 if script == 'seg' else 3) + 3, 3, 3, 3)
    assert (tmp_path / 'a/samples_000004.png').stat().st_size > 1000


def test_inflate_trains(call, trained, tmp_path, capsys):
    """--inflate: step 0 is the 2D run's EMA, inflated, also with a mask-present channel and coordinates that start without effect."""
    run = load_run(call('bravo', tmp_path / 'a', *ON, '--inflate', trained / 'bravo', '--iters', 0))
    flat = load_run(trained / 'bravo')
    assert all(torch.equal(v, inflate(flat.net.state_dict())[k]) for k, v in run.net.state_dict().items())
    more = load_run(call('bravo', tmp_path / 'b', *ON, '--inflate', trained / 'bravo', '--p-uncond', 0.1, '--crop', '2,8', '--iters', 0))
    x, t = torch.randn(1, 2, 4, 16, 16, generator=generator('more')), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.allclose(more.net(torch.cat([x, torch.ones(1, 1, 4, 16, 16)], 1), t), run.net(x, t), atol=1e-6)
    call('bravo', tmp_path / 'a2', *ON, '--inflate', trained / 'bravo')
    assert load_run(tmp_path / 'a2').step == 4


def test_sample_end_to_end(call, volumes, phantom, cache, tmp_path):
    """Masks and images as volumes with spacing and affine; the same whatever the batch; read as volumes by training, as slices by evaluate.py."""
    out = call('sample', tmp_path / 'a', '--seg', volumes / 'seg', '--bravo', volumes / 'bravo', '--cfg', 2, '--n', 3, '--steps', 3, '--seg-steps', 3,
               '--save-at', '1,0')
    spacing = load_run(volumes / 'seg').spacing
    assert len(spacing) == 3
    for f in sorted(out.glob('syn_*')):
        a, zooms = read_nifti(f / 'bravo.nii.gz')
        m, _ = read_nifti(f / 'seg.nii.gz')
        assert a.shape == m.shape == (4, 16, 16) and np.isfinite(a).all() and np.abs(a).max() <= 1 and np.allclose(zooms, spacing)
        assert nib.aff2axcodes(nib.load(f / 'bravo.nii.gz').affine) == ('L', 'P', 'S') and (f / 'preview.png').exists()
    assert np.load(f / 'trajectory.npz')['x_t'].shape == (2, 4, 16, 16)
    one = call('sample', tmp_path / 'b', '--seg', volumes / 'seg', '--bravo', volumes / 'bravo', '--cfg', 2, '--n', 1, '--steps', 3, '--seg-steps', 3)
    np.testing.assert_allclose(read_nifti(one / 'syn_0_000000/bravo.nii.gz')[0], read_nifti(out / 'syn_0_000000/bravo.nii.gz')[0], atol=1e-4)
    # masks of patients, of a folder; bands
    own = call('sample', tmp_path / 'c', '--data', phantom, '--bravo', volumes / 'bravo', '--n', 2, '--steps', 2)
    data = load_slices([phantom], 16, box=load_run(volumes / 'bravo').box, cache=cache, depth=4)
    names = {r['patient']: i for i, r in enumerate(data.table)}
    for row in common.read_csv(own / 'manifest.csv'):
        i = names[row['source_patient']]
        assert np.array_equal(read_nifti(own / row['folder'] / 'seg.nii.gz')[0], data.masks[i, 0]) and data.part[i] == 'train'
    again = call('sample', tmp_path / 'd', '--masks', own, '--bravo', volumes / 'bands', '--n', 2, '--steps', 2)
    for k in (0, 1):
        assert np.array_equal(*(read_nifti(s / f'syn_0_00000{k}/seg.nii.gz')[0] for s in (own, again)))
    # as data
    assert load_slices([out], 16, cache=cache, depth=4, training=False).images.shape == (3, 1, 4, 16, 16)
    assert load_slices([out], 16, cache=cache, training=False).images.shape == (12, 1, 16, 16)
    call('bravo', tmp_path / 'more', *ON, '--data', phantom, own, '--iters', 1)
    evaluate.main(evaluate.get_args(['quality', '--fake', str(out), '--data', str(phantom), '--part', 'test', '--vgg-weights', 'none', '--repeats', '20',
                                     '--cache', str(cache), '--out', str(tmp_path / 'quality')]))
    assert json.loads((tmp_path / 'quality/metrics.json').read_text())


def test_autoencoder_and_latents(call, tmp_path):
    """--vae in 3D, a report of what it loses, and an image model on its latents that samples volumes."""
    vae = call('bravo', tmp_path / 'vae', '--volume', 4, '--vae', '2', '--crop', '2,8', '--iters', 2)
    assert len(common.read_csv(vae / 'reconstruction.csv')) == 5 and common.read_csv(vae / 'reconstruction.csv')[0]['n'] == '4'
    call('bravo', tmp_path / 'ldm', *ON, '--latent', vae, '--iters', 2)
    run = load_run(tmp_path / 'ldm')
    assert run.process.space.shape(16) == (4, 2, 8, 8) and run.process.space.factor == (2, 2, 2)
    out = call('sample', tmp_path / 'set', '--masks', call('sample', tmp_path / 'm', '--seg', call('seg', tmp_path / 's', *ON, '--iters', 1), '--n', 1),
               '--bravo', tmp_path / 'ldm', '--n', 1, '--steps', 2)
    assert read_nifti(out / 'syn_0_000000/bravo.nii.gz')[0].shape == (4, 16, 16)


@pytest.mark.parametrize('script, flags, words', [
    ('bravo', '--volume 5', '--volume 5 multiple of 2'),
    ('bravo', '--volume 4 --fft 1', '--volume 4 --fft slices'),
    ('bravo', '--volume 4 --perceptual 1', '--volume 4 --perceptual slices'),
    ('seg', '--volume 4 --progressive 16,32', '--volume 4 --progressive slices'),
    ('seg', '--volume 4 --controllable', '--volume 4 --controllable slices'),
    ('seg', '--volume 4 --slice-level', '--volume 4 --slice-level slices'),
    ('bravo', '--volume 4 --rflow --reflow x --init {trained}/bravo', '--volume 4 --reflow slices'),
    ('bravo', '--volume 1', "--volume '1' at least 2"),
    ('bravo', '--volume 6 --model dit', '--volume 6 patches multiple of 4'),
    ('bravo', '--rflow --volume 6 --wavelet', '--volume 6 --wavelet 2 levels multiple of 4'),
    ('bravo', '--volume 6 --vae 4', '--volume 6 multiple of 4'),
    ('bravo', '--crop 2,8', '--crop --volume D'),
    ('bravo', '--volume 4 --model dit --crop 4,8', '--crop U-Net --model dit'),
    ('seg', '--volume 4 --crop 8,8', '--crop 8,8 at most 4,16 multiples of 2'),
    ('seg', '--volume 4 --crop 2', '--crop 2 expected D,S'),
    ('bravo', '--rflow --volume 4 --wavelet --crop 4,8', '--wavelet --crop voxels'),
    ('bravo', '--rflow --inflate {trained}/bravo', '--inflate --volume D'),
    ('bravo', '--rflow --volume 4 --inflate {trained}/bravo --init {trained}/bravo', '--inflate --init give one'),
    ('bravo', '--rflow --volume 4 --inflate none', '--init none no such file'),
    ('bravo', '--rflow --volume 4 --init {trained}/bravo', '--init --volume None 4 --inflate'),
    ('bravo', '--rflow --volume 4 --inflate {volumes}/bravo', '--init --volume 4 --inflate'),
    ('bravo', '--rflow --init {volumes}/bravo', '--init --volume 4 None'),
    ('sample', '--seg {volumes}/seg --bravo {trained}/bravo', '--seg --volume 4 --bravo None'),
    ('sample', '--data {phantom} --bravo {volumes}/bravo --pairs', '--pairs slices volumes'),
    ('sample', '--seg {volumes}/seg --count 1', '--count --controllable'),
])
def test_refused(call, volumes, trained, phantom, tmp_path, capsys, script, flags, words):
    refused(capsys, words.split(), call, script, tmp_path / 'out', *flags.format(volumes=volumes, trained=trained, phantom=phantom).split())
    assert not list(tmp_path.glob('out/*.pt'))
