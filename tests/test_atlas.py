"""The atlas and the anatomy loss: information in closed form, known transforms found again, what is written, what is refused."""
import gzip
import itertools
import json
import math
import os
import re
import shutil
import types

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
import train_seg
from common import VENTRICLES, atomic_write, blur, decode_parc, decode_patient, find_patients, grow_labels, load_slices, read_csv, read_nifti, write_csv, write_patient
from evaluate import UNITS, affine, as_stored, carried, explained, extent_of, information, inverse, joint_histogram, labels_at, look, plane, slice_nmi
from test_errors import refused
from train_seg import anatomy_loss, augment_both, plausibility


def test_information_of_known_pairs():
    """32 equally filled bins: MI(x,x) = MI(x,1-x) = ln 32, NMI = 2; independent images: the bias (B-1)^2 / 2N; a constant tells nothing."""
    x = torch.rand(64 * 64, generator=torch.Generator().manual_seed(0)).argsort().argsort().float().add(0.5) / 4096
    bins = (x * 32).long()
    for y in (x, 1 - x):
        mi, nmi = information(joint_histogram(bins, y[None], order=0))
        assert abs(mi.item() - math.log(32)) < 1e-5 and abs(nmi.item() - 2) < 1e-5
    g = torch.Generator().manual_seed(1)
    mi = torch.stack([information(joint_histogram(bins, torch.rand(1, 4096, generator=g), order=0))[0] for _ in range(20)])
    assert abs(mi.mean() - 31 ** 2 / 2 / 4096) < 0.015
    assert information(joint_histogram(bins, torch.full((1, 4096), 0.3), order=0))[0].abs() < 1e-5


def test_histogram():
    """Sums to 1, its fixed marginal is the count of bins, weights of 0 take points out, the window is the cubic B-spline, its gradient that of differences."""
    g = torch.Generator().manual_seed(0)
    fixed, moving = torch.randint(8, (500,), generator=g), torch.rand(2, 500, generator=g, dtype=torch.float64)
    p = joint_histogram(fixed, moving, bins=8)
    assert p.shape == (2, 8, 8) and (p.sum((1, 2)) - 1).abs().max() < 1e-12
    torch.testing.assert_close(p.sum(2)[0], torch.bincount(fixed, minlength=8).double() / 500)
    keep = torch.arange(500) < 100
    torch.testing.assert_close(joint_histogram(fixed, moving, keep.expand(2, -1), 8), joint_histogram(fixed[:100], moving[:, :100], bins=8))
    one = joint_histogram(torch.tensor([3]), torch.tensor([[0.4]], dtype=torch.float64), bins=8)[0, 3]            # at 1 + 0.4 * 5 = 3: a knot
    torch.testing.assert_close(one, torch.tensor([0, 0, 1 / 6, 4 / 6, 1 / 6, 0, 0, 0], dtype=torch.float64))
    told = lambda m: information(joint_histogram(fixed, m, bins=8))[0].sum()
    slope = torch.autograd.grad(told(moving.requires_grad_()), moving)[0]
    step = 1e-6 * torch.randn(moving.shape, generator=g, dtype=torch.float64)
    moving = moving.detach()
    torch.testing.assert_close(told(moving + step) - told(moving - step), 2 * (slope * step).sum(), rtol=1e-4, atol=0)


def test_affine_is_its_parts():
    """Each parameter alone; together T R Sh S; the volume by the scales; A and its inverse make the identity to 1e-6."""
    q = torch.zeros(4, 12)
    q[0, :3], q[1, 5], q[2, 6:9], q[3, 9:] = torch.tensor([1.0, 2, 3]), math.pi / 2 * 60, torch.tensor([2.0, 3, 4]).log() * 60, torch.tensor([0.1, 0.2, 0.3]) * 60
    T, R, S, Sh = affine(q)
    eye = torch.eye(3)
    torch.testing.assert_close(T, torch.cat([eye, torch.tensor([[1.0], [2], [3]])], 1))
    torch.testing.assert_close(R[:, :3], torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(S[:, :3], torch.diag(torch.tensor([2.0, 3, 4])))
    torch.testing.assert_close(Sh[:, :3], torch.tensor([[1, 0.1, 0.2], [0, 1, 0.3], [0, 0, 1]]))
    A = affine(q.sum(0, keepdim=True))[0]
    torch.testing.assert_close(A, torch.cat([R[:, :3] @ Sh[:, :3] @ S[:, :3], T[:, 3:]], 1), atol=1e-5, rtol=0)
    assert abs(torch.linalg.det(A[:, :3]) - 24) < 1e-4
    x = torch.randn(50, 3)
    torch.testing.assert_close(carried(inverse(A), carried(A, x)), x, atol=1e-5, rtol=0)
    back = inverse(A.double())
    assert (A[:, :3].double() @ back[:, :3] - torch.eye(3)).abs().max() < 1e-6 and UNITS[0] == 1


def test_points():
    """The middles of a slice's pixels give back its pixels; a box and a coarser grid their averages' places; beyond the image is outside."""
    v, spacing = torch.rand(5, 6, 7), (4.0, 2.0, 3.0)
    extent = extent_of(v.shape, spacing)
    assert extent.tolist() == [21, 12, 20]
    values, inside = look(v[None], plane((0, 0, 6, 7), (6, 7), spacing, 3)[None], extent)
    torch.testing.assert_close(values.view(6, 7), v[3])
    assert inside.all()
    p = plane((-1, 2, 5, 8), (3, 3), spacing, 0)
    assert p[0].tolist() == [9, 0, 2] and p[-1].tolist() == [21, 8, 2] and not look(v[None], p[None] + 0.1, extent)[1][0, -1]


@pytest.mark.parametrize('axes', ['LPS', 'RAS', 'LAS', 'PIR', 'SLA'])
def test_labels_are_written_on_the_grid_of_the_image(tmp_path, axes):
    """Whatever the file's axes, its label map has the same shape and affine, and read_nifti shows it as it was."""
    ornt = nib.orientations.axcodes2ornt(axes)
    affine = np.zeros((4, 4))
    for i, (row, sign) in enumerate(ornt):
        affine[int(row), i] = sign * (i + 1)
    affine[:, 3] = 5, 6, 7, 1
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 5, 6)).astype(np.float32), affine), tmp_path / 'a.nii.gz')
    shown = read_nifti(tmp_path / 'a.nii.gz')[0]
    labels = (shown * 60000).astype(np.uint16)
    (tmp_path / 'b.nii.gz').write_bytes(as_stored(labels, tmp_path / 'a.nii.gz'))
    stored = nib.load(tmp_path / 'b.nii.gz')
    assert np.array_equal(read_nifti(tmp_path / 'b.nii.gz')[0], labels) and stored.shape == (4, 5, 6) and np.array_equal(stored.affine, affine)
    assert as_stored(labels, tmp_path / 'a.nii.gz') == as_stored(labels, tmp_path / 'a.nii.gz')


# -- a brain made here, moved by a known transform ----------------------------------------------------------------------

SHAPE, SPACING = (52, 62, 54), (3.0, 3.0, 3.0)
# patient point = M (template point - middle) + middle + shift: rotation 5 degrees about each axis, scale 1.05, 3 voxels
TURN = affine(torch.tensor([[9.0, -9, 9, *[math.radians(5) * 60] * 3, *[math.log(1.05) * 60] * 3, 0, 0, 0]]))[0]


def save(path, a, dtype):
    """An array (Z,H,W) as displayed."""
    nib.save(nib.Nifti1Image(np.asarray(a, dtype).transpose(2, 1, 0), np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1])), path)


@pytest.fixture(scope='module')
def atlas(tmp_path_factory):
    """Template, labels, two patients (a volume moved by TURN, in another contrast; a slice of the template) and what the command leaves."""
    root = tmp_path_factory.mktemp('atlas')
    z, y, x = (torch.arange(n) - (n - 1) / 2 for n in SHAPE)
    z, y, x = torch.meshgrid(z * 3, y * 3, x * 3, indexing='ij')
    brain = (z / 58) ** 2 + (y / 76) ** 2 + (x / 62 * (1 + y / 400)) ** 2 < 1
    ventricle = (z / 16) ** 2 + ((y + 5) / 30) ** 2 + ((x.abs() - 10) / 7) ** 2 < 1
    texture = blur(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), 6, SPACING)
    t1 = torch.where(brain, 0.65 + 0.18 * texture / texture.std(), 0).clamp(0, 1)
    t1[ventricle] = 0.15
    labels = torch.where(brain, torch.where(x < 0, 2, 41), 0)
    labels[ventricle & (x < 0)], labels[ventricle & (x >= 0)] = 4, 43
    save(root / 'template.nii.gz', t1 * 200, np.float32)
    save(root / 'labels.nii.gz', labels, np.uint16)
    middle = extent_of(SHAPE, SPACING) / 2
    to_template = inverse(torch.cat([TURN[:, :3], (TURN[:, 3] + middle - TURN[:, :3] @ middle)[:, None]], 1))
    points = torch.cat([plane((0, 0, *SHAPE[1:]), SHAPE[1:], SPACING, k) for k in range(SHAPE[0])])
    moved = look(t1[None], carried(to_template, points)[None], extent_of(SHAPE, SPACING))[0].view(SHAPE)
    mask = np.zeros(SHAPE, np.uint8)
    mask[20:30, 20:30, 20:30] = 1
    write_patient(root / 'data/volume', {'bravo': moved.sqrt().numpy() * 100}, mask, SPACING)
    write_patient(root / 'data/slice', {'bravo': t1[30].numpy()}, mask[25], SPACING[1:])
    flags = [str(f) for f in ('atlas', '--data', root / 'data', '--template', root / 'template.nii.gz', '--labels', root / 'labels.nii.gz', '--out', root / 'out',
                              '--cache', root / 'cache', '--repeats', 20)]
    run = lambda *more: evaluate.main(evaluate.get_args([*flags, *map(str, more)]))
    run()
    return types.SimpleNamespace(root=root, run=run, t1=t1, labels=labels, to_template=to_template, told=json.loads((root / 'out/atlas.json').read_text()))


def test_a_known_transform_is_found_again(atlas):
    """Within half a voxel, root mean square over the brain, from the contrast of a square root; the upside-down score is lower."""
    found = torch.tensor(atlas.told['patients']['volume']['matrix'])
    points = (atlas.labels > 0).nonzero().flip(1) * 3 + 1.5
    there = carried(inverse(atlas.to_template), points)
    error = ((carried(found, there) - points) / 3).square().sum(1).mean().sqrt()
    assert error < 0.5, error
    told = atlas.told['patients']['volume']
    assert told['nmi'] > told['upside_down'] + 0.05


def test_the_parcellation_is_the_moved_label_map(atlas):
    """Nearest label at each voxel, on the patient's grid, and the counts of tumour in it."""
    found, _ = read_nifti(atlas.root / 'out/volume/parc.nii.gz')
    points = torch.cat([plane((0, 0, *SHAPE[1:]), SHAPE[1:], SPACING, k) for k in range(SHAPE[0])])
    wanted = look(atlas.labels.float()[None], carried(atlas.to_template, points)[None], extent_of(SHAPE, SPACING), 'nearest')[0].view(SHAPE).numpy()
    assert {*np.unique(found)} == {0, 2, 4, 41, 43} and (found == wanted).mean() > 0.98
    for group in (VENTRICLES, (2, 41)):
        a, b = np.isin(found, group), np.isin(wanted, group)
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9
    mask, _ = read_nifti(atlas.root / 'data/volume/seg.nii.gz')
    grown = grow_labels(found, SPACING[1:])
    assert atlas.told['patients']['volume']['tumour'] == [1000, int(np.isin(grown[mask > 0], VENTRICLES).sum()), int((grown[mask > 0] == 0).sum())]
    assert (atlas.root / 'out/atlas.png').stat().st_size > 1000 and len((atlas.root / 'out/atlas.csv').read_text().splitlines()) == 3


def test_a_single_slice_finds_its_level(atlas):
    """Slice 30 of the template lies at z = 30.5 * 3 mm over its lower border; the interval holds it and is no whole brain."""
    told = atlas.told['patients']['slice']
    floor = nib.load(atlas.root / 'template.nii.gz').affine[2, 3] - 1.5
    assert abs(told['z'] - floor - 91.5) < 4 and told['z_low'] - floor <= 91.5 <= told['z_high'] - floor and told['z_high'] - told['z_low'] < 40


def test_no_gradient_where_images_meet(atlas):
    """At the identity between identical images the information is at its top: the gradient is a fraction of the one 6 mm away."""
    t = evaluate.Template(atlas.root / 'template.nii.gz', atlas.root / 'labels.nii.gz')
    slope = []
    for shift in (0.0, 6.0):
        q = torch.zeros(1, 12)
        q[0, 0] = shift
        q.requires_grad_()
        told = explained(q, t.centre, *t.sample(20000, 2), t.levels[2][None], t.size)[0]
        slope.append(torch.autograd.grad(told.sum(), q)[0].norm().item())
    assert slope[0] < 0.2 * slope[1]


def test_the_same_command_goes_on(atlas, capsys):
    """Nothing is registered twice; a parcellation that was lost is written again, the same; one of somebody else is never touched."""
    target = atlas.root / 'out/volume/parc.nii.gz'
    before, stamp = target.read_bytes(), (atlas.root / 'out/slice/parc.nii.gz').stat().st_mtime_ns
    atlas.run()
    assert (atlas.root / 'out/slice/parc.nii.gz').stat().st_mtime_ns == stamp
    atomic_write(target, gzip.compress(b'precious'))
    refused(capsys, ['volume/parc.nii.gz', 'was not written by', 'move it away'], atlas.run)
    assert gzip.decompress(target.read_bytes()) == b'precious'
    atomic_write(target, before)
    (atlas.root / 'data/slice/parc.nii.gz').write_bytes(b'other')
    refused(capsys, ['slice/parc.nii.gz', 'was not written by'], atlas.run, '--write')
    (atlas.root / 'data/slice/parc.nii.gz').unlink()
    refused(capsys, ['--labels', 'ventricles'], atlas.run, '--labels', atlas.root / 'template.nii.gz')
    refused(capsys, ['--labels', 'shape'], atlas.run, '--labels', atlas.root / 'data/slice/seg.nii.gz')
    refused(capsys, ['--template', 'no such file', 'README'], atlas.run, '--template', atlas.root / 'none.nii.gz')
    refused(capsys, ['--fake', 'sample.json'], atlas.run, '--fake', atlas.root / 'data')


def test_a_changed_image_is_registered_again(atlas, capsys, monkeypatch):
    """Another file under the name of a patient: size or time tell; the others are left alone. An older atlas.json, which does not say, is taken as it is."""
    file, out = atlas.root / 'data/slice/bravo.nii.gz', atlas.root / 'again'
    shutil.copytree(atlas.root / 'out', out)
    told = lambda: json.loads((out / 'atlas.json').read_text())['patients']
    older, stat, calls = told(), file.stat(), []
    assert (older['slice']['size'], older['slice']['mtime_ns']) == (stat.st_size, stat.st_mtime_ns)
    real = evaluate.search
    monkeypatch.setattr(evaluate, 'search', lambda *a: (calls.append('slice'), real(*a))[1])
    monkeypatch.setattr(evaluate, 'register', lambda *a: calls.append('volume'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    atlas.run('--out', out)
    assert calls == ['slice'] and 'slice/bravo.nii.gz: has changed since it was registered' in capsys.readouterr().out
    assert told()['slice']['mtime_ns'] == stat.st_mtime_ns + 1 and told()['slice']['matrix'] == older['slice']['matrix'] and told()['volume'] == older['volume']
    atlas.run('--out', out)
    assert calls == ['slice'] and 'has changed' not in capsys.readouterr().out
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    state = json.loads((out / 'atlas.json').read_text())
    for d in state['patients'].values():
        del d['size'], d['mtime_ns']
    (out / 'atlas.json').write_text(json.dumps(state))
    atlas.run('--out', out)
    assert calls == ['slice']


def test_written_parcellations_are_trained_on(atlas, call, tmp_path, capsys):
    """atlas --write, then train_seg.py --anatomy on the same folder; the command again keeps the files."""
    shutil.copytree(atlas.root / 'data', tmp_path / 'data')                                   # with its times: what is registered stays so
    shutil.copytree(atlas.root / 'out', tmp_path / 'out')
    flags = ['--data', tmp_path / 'data', '--out', tmp_path / 'out', '--write']
    atlas.run(*flags)
    for name in ('volume', 'slice'):
        assert (tmp_path / 'data' / name / 'parc.nii.gz').read_bytes() == (atlas.root / 'out' / name / 'parc.nii.gz').read_bytes()
    write_csv(tmp_path / 'split.csv', ['patient', 'part'], [('volume', 'train'), ('slice', 'val')])
    call('seg', tmp_path / 'run', '--rflow', '--slice-level', '--data', tmp_path / 'data', '--split', tmp_path / 'split.csv', '--anatomy', 1, '--iters', 2)
    told = re.search(r'anatomy: (\S+) of the pixels are ventricle or outside the brain; (\S+) of the real tumour', capsys.readouterr().out)
    assert 0 < float(told[1]) < 1 and 0 <= float(told[2]) < 1
    atlas.run(*flags)
    assert 'again' not in capsys.readouterr().out


def fakes(atlas, name, bravo, rows):
    """A set of sample.py by hand: rows of (condition, level, image or None, mask)."""
    made = atlas.root / name
    for i, (_, _, image, mask) in enumerate(rows):
        write_patient(made / f'syn_{i}', {} if image is None else {'bravo': image}, mask, (10.0, 10.0))
    write_csv(made / 'manifest.csv', ['folder', 'condition', 'source_patient', 'level'], [[f'syn_{i}', r[0], 'volume', r[1]] for i, r in enumerate(rows)])
    (made / 'sample.json').write_text(json.dumps(dict(pixels=16, box=[0.0, 0.0, 1.0, 1.0], bravo=bravo)))
    return made


def test_sets_without_level_or_patient_are_refused(atlas, capsys):
    """Before anything is registered."""
    none = [('seg:1', '', None, np.zeros((16, 16), np.uint8))]
    for rows, words in ((none, '--slice-level'), ([], 'no patient yet')):
        (atlas.root / f'no{len(rows)}').mkdir()
        with pytest.raises(SystemExit) as e:
            atlas.run('--fake', fakes(atlas, f'no{len(rows)}', None, rows), '--out', atlas.root / 'never')
        assert e.value.code == 2 and words in capsys.readouterr().err and not (atlas.root / 'never').exists()


def test_generated_slices_lie_where_their_source_does(atlas, capsys):
    """Copies of real slices score as the real ones; noise scores less; masks outside the brain are found there; masks alone are placed by level."""
    data = load_slices([atlas.root / 'data'], 16, box=(0.0, 0.0, 1.0, 1.0), cache=atlas.root / 'cache')
    picked = [i for i, r in enumerate(data.table) if r['folder'] == 'volume'][10:26]
    corner = np.zeros((16, 16), np.uint8)
    corner[:2, :2] = 1
    rows = [(f'volume:{data.table[i]["z"]}', data.table[i]['level'], data.images[i, 0], corner) for i in picked]
    atlas.run('--fake', fakes(atlas, 'copies', 'x', rows), '--out', atlas.root / 'out')
    told = json.loads((atlas.root / 'out/metrics.json').read_text())
    assert told['placed'] == {'where the source lies': 16} and told['metrics']['tumour outside the brain']['fake'] == 1
    t = evaluate.Template(atlas.root / 'template.nii.gz', atlas.root / 'labels.nii.gz')
    matrix = torch.tensor(atlas.told['patients']['volume']['matrix'])
    wanted = [slice_nmi(data.images[i, 0], t, matrix, plane(common.square_view(SHAPE[1:], SPACING[1:], (0, 0, 1, 1)), (16, 16), SPACING, data.table[i]['z'])) for i in picked]
    assert abs(told['metrics']['NMI of a slice']['fake'] - np.mean(wanted)) < 1e-6
    atlas.run('--fake', fakes(atlas, 'drawn', 'x', [('drawn', *rows[8][1:])]), '--out', atlas.root / 'out')      # on a drawn mask: by search
    told, row = json.loads((atlas.root / 'out/metrics.json').read_text()), read_csv(atlas.root / 'out/slices.csv')[0]
    assert told['placed'] == {'by search': 1} and float(row['z_low']) <= float(row['z']) <= float(row['z_high'])
    noise = [(c, z, np.random.default_rng(i).random((16, 16), np.float32) * 2 - 1, m) for i, (c, z, _, m) in enumerate(rows)]
    atlas.run('--fake', fakes(atlas, 'noise', 'x', noise))
    assert json.loads((atlas.root / 'out/metrics.json').read_text())['metrics']['NMI of a slice']['fake'] < np.mean(wanted) - 0.02
    atlas.run('--fake', fakes(atlas, 'masks', None, [('seg:1', z, None, m) for _, z, _, m in rows]))
    told = json.loads((atlas.root / 'out/metrics.json').read_text())
    assert told['placed'] == {'on others\' parcellations': 16} and told['metrics']['tumour outside the brain']['fake'] == 1 and 'NMI of a slice' not in told['metrics']


# -- the loss -----------------------------------------------------------------------------------------------------------


def test_anatomy_loss():
    """0 for tumour where it may be, 1 where it cannot, 1/2 for both; no scale; the sign of its slope; 0 for no tumour, and finite slopes."""
    A, p = torch.ones(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    A[:, :, :, 4:] = 0
    p[0, 0, 2, :4], p[1, 0, 2, 4:], p[2, 0, 2] = 0.7, 0.7, 0.7
    for mode in ('soft', 'hard'):
        torch.testing.assert_close(anatomy_loss(p, A, mode, 0), torch.tensor([0, 1, 0.5]))
    A, p = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8, requires_grad=True)
    loss = anatomy_loss(p, A, eps=0)
    torch.testing.assert_close(anatomy_loss(0.1 * p, A, eps=0), loss)
    slope, = torch.autograd.grad(loss.sum(), p)
    assert torch.equal(slope > 0, 1 - A > loss.detach().view(2, 1, 1, 1))
    empty = torch.zeros(1, 1, 8, 8, requires_grad=True)
    for mode in ('soft', 'hard'):
        loss = anatomy_loss(empty, A[:1], mode)
        assert loss.item() == 0 and torch.autograd.grad(loss.sum(), empty)[0].isfinite().all()
    assert anatomy_loss(p, (A > 0.5).float() * 0.2, 'hard', 0)[0] == (p * (A <= 0.5)).sum((1, 2, 3))[0] / p.sum((1, 2, 3))[0]     # what is unlikely is not forbidden
    late, early = (anatomy_loss(p, A, eps=0, t=torch.tensor(t)) for t in ([0.51, 1.0], [0.1, 0.5]))        # where x0_hat is a blur it says nothing
    assert (late == 0).all() and torch.equal(early, anatomy_loss(p, A, eps=0))


def test_the_map_moves_with_its_mask():
    """A mask that is its own map stays it: flipped, and turned, scaled and shifted where both are 1 inside. The flip is exact, and the other side's tumour counts."""
    x_0 = -torch.ones(8, 1, 32, 32)
    x_0[:, :, 6:20, 3:13] = 1
    A, u = (x_0 + 1) / 2, torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    moved, B = augment_both(x_0, A, u, 'flip')
    torch.testing.assert_close(2 * B - 1, moved)
    flipped = (moved != x_0).flatten(1).any(1)
    assert 0 < flipped.sum() < 8 and torch.equal(moved[flipped], x_0[flipped].flip(-1)) and torch.equal(moved[~flipped], x_0[~flipped])
    assert torch.equal(augment_both(moved, B, u, 'flip')[0], x_0)                                      # twice is nothing
    assert (anatomy_loss((moved + 1) / 2, B, eps=0) == 0).all() and anatomy_loss((moved + 1) / 2, A, eps=0)[flipped].min() == 1
    moved, B = augment_both(x_0, A, u, 'affine')
    assert anatomy_loss((moved + 1) / 2, B, eps=0).max() < 0.1 and not torch.equal(moved, x_0)         # the map is bilinear, the mask nearest


def test_grown_labels():
    """Equal to a search of the neighbourhood; ventricles stay as they are, and no label is overwritten."""
    labels = np.random.default_rng(0).choice([0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 17, 1003], (2, 20, 24)).astype(np.float32)
    found = grow_labels(labels, (2.0, 4.0), 4)
    brain = np.where(labels == 4, 0, labels)
    wanted = labels.copy()
    for z, y, x in zip(*np.nonzero(labels == 0)):
        wanted[z, y, x] = brain[z, max(y - 2, 0):y + 3, max(x - 1, 0):x + 2].max()
    assert found.dtype == np.uint16 and np.array_equal(found, wanted)


def test_plausibility():
    """0 exactly in ventricles and outside, (n + 1) / (max n + 1) elsewhere with n the smoothed count, so 1 at its top and never 0; or the atlas's."""
    parc = np.full((40, 1, 16, 16), 17, np.uint16)
    parc[:, :, :, 12:], parc[:, :, 7:9, 4:6] = 0, 4
    masks = np.zeros(parc.shape, np.uint8)
    masks[::2, 0, 3:5, 3:5] = 1
    data = types.SimpleNamespace(parc=parc, masks=masks, table=[dict(level=i / 39, spacing=(4.0, 4.0)) for i in range(40)])
    A = plausibility(data, np.arange(40))
    assert A.dtype == np.uint8 and np.array_equal(A == 0, (parc == 0) | (parc == 4)) and A.max() == 255
    n = blur(torch.stack([torch.from_numpy(masks[[i for i in range(40) if min(int(i / 39 * 8), 7) == k], 0].sum(0).astype(np.float32)) for k in range(8)]), 8, (8, 4.0, 4.0))
    wanted = ((n + 1) / (n.max() + 1) * 255).round().clamp(1)
    assert np.array_equal(A[39, 0][parc[39, 0] == 17], wanted[7].numpy()[parc[39, 0] == 17].astype(np.uint8))
    data.masks = np.zeros_like(masks)
    assert (plausibility(data, np.arange(40))[parc == 17] == 255).all()        # without tumours all of the brain is alike
    table = np.ones(2 ** 16)
    table[17] = 0.2
    assert {*np.unique(plausibility(data, np.arange(40), table))} == {0, 51}


@pytest.fixture(scope='module')
def parcelled(phantom, tmp_path_factory):
    """The phantom with a parcellation beside 13 of its 14 patients: brain in the left two thirds, a ventricle in a corner of it."""
    root = tmp_path_factory.mktemp('parcelled') / 'data'
    shutil.copytree(phantom, root)
    for folder in sorted(root.iterdir())[1:]:
        labels = np.zeros(read_nifti(folder / 'seg.nii.gz')[0].shape, np.uint16)
        labels[:, :, :20], labels[:, 8:12, 8:12] = 1003, 4
        (folder / 'parc.nii.gz').write_bytes(as_stored(labels, folder / 'seg.nii.gz'))
    return root


def test_slices_carry_the_parcellation_only_when_asked(parcelled, tmp_path, capsys):
    """Off: the same cache key and slices as before. On: those of the patients that have one, cut and resized like the mask."""
    plain = load_slices([parcelled], 16, cache=tmp_path)
    assert not hasattr(plain, 'parc') and len(list(tmp_path.glob('*/images.f32'))) == 1
    capsys.readouterr()
    data = load_slices([parcelled], 16, cache=tmp_path, box=plain.box, parc=True)
    told = capsys.readouterr().out
    assert 'left out 1 folders' in told and '(parc)' in told and len(data.table) == len(plain.table) - 3
    first = next(i for i, r in enumerate(plain.table) if r['folder'] == data.table[0]['folder'])
    assert np.array_equal(data.images, plain.images[first:]) and np.array_equal(data.masks, plain.masks[first:])
    p = find_patients([parcelled], ('bravo', 'seg', 'parc'))[0]
    p['parc'] = p['files'].pop('parc')
    assert decode_patient(p, 32, (0.0, 0.0, 1.0, 1.0), 4.0)[1].shape[1:] == (1, 32, 32)
    assert np.array_equal(decode_parc(p, 32, (0.0, 0.0, 1.0, 1.0), [1, 2])[:, 0], grow_labels(read_nifti(p['parc'])[0], (read_nifti(p['parc'])[1])[1:])[[1, 2]])
    again = load_slices([parcelled], 16, cache=tmp_path)
    assert np.array_equal(again.images, plain.images) and len(list(tmp_path.glob('*/images.f32'))) == 2


def test_training(call, parcelled, phantom, tmp_path, capsys):
    """Runs, says what it is, differs from a training without; the weight 0 is a training without; refuses what does not go together."""
    flags = ['--rflow', '--slice-level', '--data', parcelled, '--augment']
    call('seg', tmp_path / 'on', *flags, '--anatomy', 1)
    assert 'anatomy: ' in capsys.readouterr().out
    (tmp_path / 'atlas.csv').write_text('label,plausible\n1003,0.5\n')
    assert train_seg.read_atlas(tmp_path / 'atlas.csv')[[4, 1003]].tolist() == [1, 0.5]
    for name, more in (('hard', ['--anatomy', 1, '--anatomy-mode', 'hard']), ('zero', ['--anatomy', 0]), ('off', []), ('half', ['--anatomy', 0.5])):
        call('seg', tmp_path / name, *flags, *more)
    weights = {n: torch.cat([v.flatten() for v in torch.load(tmp_path / n / 'ckpt.pt', weights_only=True)['net'].values()]) for n in ('on', 'hard', 'zero', 'off', 'half')}
    apart = lambda a, b: float((weights[a] - weights[b]).norm())
    assert apart('zero', 'off') == 0 and min(apart(a, b) for a, b in itertools.combinations(('on', 'hard', 'off', 'half'), 2)) > 0
    call('seg', tmp_path / 'on', *flags, '--anatomy', 1)
    assert 'complete at step 4' in capsys.readouterr().out
    for words, more in ((['--anatomy', '--slice-level'], ['--rflow', '--anatomy', 1]),
                        (['--anatomy-mode', '--anatomy W'], flags + ['--anatomy-mode', 'hard']),
                        (['--anatomy-atlas', 'hard'], flags + ['--anatomy', 1, '--anatomy-mode', 'hard', '--anatomy-atlas', tmp_path / 'atlas.csv']),
                        (['--anatomy-atlas', 'no such file'], flags + ['--anatomy', 1, '--anatomy-atlas', tmp_path / 'none.csv']),
                        (['--anatomy-atlas', 'expected columns'], flags + ['--anatomy', 1, '--anatomy-atlas', parcelled / '../wrong.csv']),
                        (['--data', 'parc'], ['--rflow', '--slice-level', '--anatomy', 1, '--data', phantom])):
        (parcelled / '../wrong.csv').write_text('label,plausible\n17,2\n')
        refused(capsys, words, call, 'seg', tmp_path / 'none', *more)
    f = sorted(parcelled.iterdir())[1] / 'parc.nii.gz'
    before = f.read_bytes()
    f.write_bytes(as_stored(np.zeros((1, 32, 32), np.uint16), write_slice(tmp_path)))
    refused(capsys, [f.name, 'shape', 'evaluate.py atlas'], call, 'seg', tmp_path / 'shape', *flags, '--anatomy', 1)
    f.write_bytes(before)


def write_slice(root):
    write_patient(root / 'one', {'bravo': np.zeros((32, 32), np.float32)}, None, (1.0, 1.0))
    return root / 'one/bravo.nii.gz'


@pytest.mark.parametrize('spacing', [(2.0, 2.0, 2.0), (6.0, 2.0, 2.0)])
def test_moved_tells_how_far_two_answers_lie_apart(monkeypatch, spacing):
    """Two registrations that agree are 0 apart; one that is off by 4 mm in x, before the template's scale, 2 voxels."""
    image, right = np.random.default_rng(0).random((8, 20, 24), np.float32), torch.tensor([[1.1, 0.1, 0, 3], [0, 0.9, 0, 1], [0, 0, 1.2, -2]])
    move = inverse(evaluate.known_move(image.shape, spacing))
    after = torch.cat([right[:, :3] @ move[:, :3], (right[:, :3] @ move[:, 3] + right[:, 3])[:, None]], 1)      # the right answer for the copy
    for off, told in ((0.0, 0.0), (4.0, 2.0)):
        answer = torch.cat([after[:, :3], (after[:, 3] + right[:, :3] @ torch.tensor([off, 0, 0]))[:, None]], 1)
        monkeypatch.setattr(evaluate, 'register', lambda template, copy, spacing: (answer, 1.1, 1.0))
        assert abs(evaluate.moved_apart(None, image, spacing, right) - told) < 1e-4


def test_a_moved_copy_is_registered_where_it_went(atlas):
    """--moved adds a number to each volume and nothing to a single slice; matrices stay; the copy of a stack keeps its slices."""
    atlas.run('--moved')
    told = json.loads((atlas.root / 'out/atlas.json').read_text())['patients']
    assert told['volume']['matrix'] == atlas.told['patients']['volume']['matrix'] and 'moved' not in told['slice'] and told['volume']['moved'] < 0.5
    rows = (atlas.root / 'out/atlas.csv').read_text().splitlines()
    assert 'moved' in rows[0].split(',') and len(rows) == 3
    move = evaluate.known_move((20, 128, 128), (5.0, 1.9, 1.9))
    assert torch.equal(move[2], torch.tensor([0.0, 0, 1, 0])) and not move[:2, 2].any() and abs(torch.linalg.det(move[:2, :2]) - 1.05 ** 2) < 1e-5


def test_copies_take_the_mean_of_the_answers_that_agree(monkeypatch):
    """Answers off by 2, -1, -1, 0 mm and one that is lost, whatever its NMI: brought back, the mean of the four; of no copies, register's own."""
    image, spacing = np.random.default_rng(0).random((8, 20, 24), np.float32), (6.0, 2.0, 2.0)
    right = torch.tensor([[1.0, 0.1, 0, 3], [0, 0.9, 0, 1], [0, 0, 1.2, -2]])
    moves = [torch.eye(3, 4), *(evaluate.known_move(image.shape, spacing, *how) for how in evaluate.COPIES)]
    asked = []

    def register(template, copy, spacing):
        back, k = inverse(moves[len(asked)]), len(asked)
        asked.append(copy)
        off = torch.tensor([(2.0, -1.0, -1.0, 0.0, 50.0)[k], 0, 0])
        return torch.cat([right[:, :3] @ back[:, :3], (right[:, :3] @ back[:, 3] + right[:, 3] + off)[:, None]], 1), (1.1, 1.05, 1.04, 1.03, 1.2)[k], 1.0 + k

    monkeypatch.setattr(evaluate, 'register', register)
    matrix, nmi, turned = evaluate.register_often(None, image, spacing, 4)
    assert torch.allclose(matrix, right, atol=1e-5) and (nmi, turned, len(asked)) == (1.05, 2.0, 5)
    assert np.array_equal(asked[0], image) and not any(np.array_equal(copy, image) for copy in asked[1:])
    asked.clear()
    assert evaluate.register_often(None, image, spacing, 0)[0][0, 3] == 5 and len(asked) == 1


@pytest.mark.parametrize('spacing', [(2.0, 2.0, 2.0), (6.0, 2.0, 2.0)])
def test_a_moved_copy_shows_at_the_moved_point_what_was_at_the_point(spacing):
    """A ramp far from the border: linear interpolation leaves it as it is, torch's cubic one (a = -0.75) in the mean, within a tenth of a pixel."""
    shape, move = (24, 40, 40), evaluate.known_move((24, 40, 40), spacing)
    points = torch.cat([plane((0, 0, 40, 40), (40, 40), spacing, z) for z in range(24)])
    ramp = lambda p: 300 + 2 * p[:, 0] - p[:, 1] + p[:, 2]
    copy = torch.from_numpy(evaluate.moved_copy(ramp(points).view(shape).numpy(), spacing, move))
    inner = (slice(8, 16), slice(12, 28), slice(12, 28))
    error = (copy - ramp(carried(inverse(move), points)).view(shape))[inner]
    assert error.mean().abs() < 5e-3 and error.abs().max() < (1e-3 if spacing[0] == 2 else 0.4)                       # a pixel in x is 4
    assert (copy - ramp(points).view(shape))[inner].abs().max() > 5
