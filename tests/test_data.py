"""The data layer: geometry, normalisation, masks that shrink, the split, the cache, writing and reading back."""
import functools
import json
import multiprocessing

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import train_bravo
from common import (PARTS, Slices, augment, components, crop, decode_patient, find_patients, generator, load_slices, make_phantom, measure_box,
                    normalise, part_of, phantom_patient, read_nifti, shrink_mask, split_patients, square_view, write_patient)


def disc(size, y, x, r):
    i, j = np.mgrid[:size, :size]
    return (i - y) ** 2 + (j - x) ** 2 <= r ** 2


def patient(root, name, mask=None, shape=(3, 40, 40), spacing=(5.0, 2.0, 2.0), **images):
    head = np.zeros(shape, np.float32)
    head[:, 4:-4, 8:-8] = np.linspace(100, 900, shape[1] - 8)[None, :, None]
    write_patient(root / name, {'bravo': head, **images}, np.zeros(shape, np.uint8) if mask is None else mask, spacing)
    return root / name


def test_write_read_is_the_same_bits(tmp_path):
    """A volume comes back bit for bit with its spacing, whatever its shape; single slices too."""
    a = np.random.default_rng(0).standard_normal((4, 9, 7)).astype(np.float32)
    write_patient(tmp_path / 'p', {'bravo': a}, a > 0, (5.0, 1.5, 1.25))
    b, spacing = read_nifti(tmp_path / 'p/bravo.nii.gz')
    assert np.array_equal(a, b) and np.allclose(spacing, (5.0, 1.5, 1.25))
    assert np.array_equal(read_nifti(tmp_path / 'p/seg.nii.gz')[0], a > 0)
    write_patient(tmp_path / 'q', {'bravo': a[0]}, None, (1.5, 1.25))
    assert np.array_equal(read_nifti(tmp_path / 'q/bravo.nii.gz')[0][0], a[0])


@pytest.mark.parametrize('axes', ['RAS', 'LPS', 'LAS', 'PIR', 'SRA', 'AIL'])
def test_orientation_comes_from_the_affine(tmp_path, axes):
    """However a volume is stored, it is displayed with the patient's right at the left and the front at the top."""
    ras = np.zeros((6, 8, 4), np.float32)                    # x to the right, y to the front, z up
    ras[5, 7, 3] = 1                                         # right, front, top
    image = nib.Nifti1Image(ras, np.diag([2.0, 3.0, 4.0, 1]))
    turned = image.as_reoriented(nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)))
    nib.save(turned, tmp_path / 'a.nii.gz')
    a, spacing = read_nifti(tmp_path / 'a.nii.gz')
    assert a.shape == (4, 8, 6) and spacing == (4.0, 3.0, 2.0)
    assert np.argwhere(a == 1).tolist() == [[3, 0, 0]]       # last slice, first row, first column


def test_synthetic_set_reads_back_exactly(tmp_path):
    """What sample.py writes comes through the whole loader unchanged: read(write(x)) == x."""
    g = generator('x')
    x, m = torch.rand(2, 16, 16, generator=g).numpy() * 2 - 1, (torch.rand(2, 16, 16, generator=g) > 0.9).numpy()
    for i in (0, 1):
        write_patient(tmp_path / f'data/s{i}', {'bravo': x[i]}, m[i], (3.0, 3.0))
    (tmp_path / 'data/manifest.csv').write_text('folder,source_patient\ns0,\ns1,\n')
    data = load_slices([tmp_path / 'data'], 16, cache=tmp_path / 'cache')
    assert np.array_equal(data.images[:, 0], x) and np.array_equal(data.masks[:, 0], m) and data.part == ['train'] * 2
    assert [r['spacing'] for r in data.table] == [[3.0, 3.0]] * 2


def test_normalise():
    """0.5 and 99.9 percentiles inside the head become -1 and 1, jointly for several modalities: their ratio survives."""
    g = np.random.default_rng(0)
    images, head = g.uniform(0, 100, (2, 1, 50, 50)).astype(np.float32), np.zeros((1, 50, 50), bool)
    head[:, 10:40, 10:40] = True
    images[1] *= 2
    out = normalise(images, head)
    low, high = np.percentile(images[:, head], (0.5, 99.9))
    inside = (images > low) & (images < high)
    assert out.min() == -1 and out.max() == 1
    np.testing.assert_allclose(out[inside], ((images - low) / (high - low) * 2 - 1)[inside], atol=1e-5)
    np.testing.assert_array_equal(normalise(images * 7 + 3, head).round(4), out.round(4))          # scanner gain and offset


def test_components():
    """Three discs: count, centres, exact areas; diagonal neighbours are one piece; 3D; full and empty masks."""
    mask = disc(64, 12, 12, 3) | disc(64, 40, 20, 5) | disc(64, 30, 48, 8)
    labels, n = components(mask)
    assert n == 3
    for i, (y, x, r) in enumerate(((12, 12, 3), (30, 48, 8), (40, 20, 5)), 1):      # by first voxel
        where = np.argwhere(labels == i)
        assert len(where) == disc(64, y, x, r).sum() and np.abs(where.mean(0) - (y, x)).max() < 0.5
    assert components(np.eye(5, dtype=bool))[1] == 1 and components(np.ones((4, 4), bool))[1] == 1
    assert components(np.zeros((4, 4), bool))[1] == 0
    snake = np.zeros((3, 5, 5), bool)
    snake[0, 0], snake[1, 1, 4], snake[2, 4, 0] = True, True, True
    assert components(snake)[1] == 2


def test_shrink_keeps_lesions_and_drops_specks():
    """Speck below the limit: dropped. Small lesion that no pixel holds half of: kept as one. Large one: area within 15 %."""
    mask = np.zeros((256, 256), np.uint8)
    mask[10, 10] = 1                                                                 # 1 mm2: a speck
    mask[66:69, 66:69] = 1                                                           # 9 mm2 over four 16 mm2 pixels
    mask |= disc(256, 150, 150, 20).astype(np.uint8)
    small, (kept, rescued, dropped) = shrink_mask(mask, 64, 1.0, 4.0)
    assert (kept, rescued, dropped) == (2, 1, 1)
    assert small[2, 2] == 0 and components(small)[1] == 2
    assert small[16:18, 16:18].sum() == 1
    assert abs(small[30:45, 30:45].sum() * 16 / mask[120:180, 120:180].sum() - 1) < 0.15
    assert np.array_equal(shrink_mask(mask, 256, 1.0, 0)[0], mask)


def test_box_and_crop(tmp_path):
    """The box is the head in fractions of the view made square; cropping outside the image pads."""
    for i in range(3):
        patient(tmp_path, f'p{i}', shape=(2, 40, 80))         # mm: 80 high, 160 wide; the head 64 x 128
    box = measure_box(find_patients([tmp_path], ('bravo', 'seg')))
    assert np.allclose(box, (0.5 - 0.42, 0.08, 0.92, 0.92), atol=0.002)
    assert square_view((40, 80), (2.0, 2.0), (0.0, 0.0, 1.0, 1.0)) == [-20, 0, 60, 80]
    a = np.arange(6.0).reshape(1, 2, 3)
    assert crop(a, (-1, 1, 2, 4), -1).tolist() == [[[-1, -1, -1], [1, 2, -1], [4, 5, -1]]]


def test_image_and_mask_stay_together(tmp_path):
    """A bright square and its mask land on the same pixels after crop and resize, at any spacing."""
    for name, size in (('coarse', 48), ('fine', 160)):
        image, k = np.zeros((1, size, size), np.float32), size // 16
        image[:, k:-k, k:-k] = 300
        mask = np.zeros(image.shape, np.uint8)
        mask[:, 5 * k:8 * k, 9 * k:12 * k] = 1
        image[mask > 0] = 1000
        write_patient(tmp_path / name, {'bravo': image}, mask, (5.0, 160 / size, 160 / size))
        p = find_patients([tmp_path], ('bravo', 'seg'))[-1 if name == 'fine' else 0]
        images, masks, table, _ = decode_patient(p, 32, (0.0, 0.0, 1.0, 1.0), 4.0)
        bright = images[0, 0] > 0.2
        assert (bright & (masks[0, 0] > 0)).sum() / (bright | (masks[0, 0] > 0)).sum() > 0.75
        assert np.allclose(table[0]['spacing'], (5.0, 5.0))


def test_split(tmp_path):
    """By SHA-1 of the name: shares near 60/10/15/15, one patient's folders together, the same on every machine."""
    parts = [part_of(f'patient_{i}') for i in range(4000)]
    for part, share in PARTS.items():
        assert abs(parts.count(part) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert [part_of(n) for n in ('Mets_001', 'Mets_002', 'Mets_003', 'p01')] == ['train', 'train', 'judge', 'train']
    for name in ('a_1', 'a_2', 'b_1'):
        patient(tmp_path, name)
    (tmp_path / 'groups.csv').write_text('folder,patient\na_1,a\na_2,a\n')
    (tmp_path / 'split.csv').write_text('patient,part\na,test\nb_1,train\n')
    found = split_patients(find_patients([tmp_path], ('bravo', 'seg')), tmp_path / 'split.csv')
    assert [(p['name'], p['part']) for p in found] == [('a', 'test'), ('a', 'test'), ('b_1', 'train')]


def test_cache(tmp_path, phantom, monkeypatch):
    """A second start decodes nothing; a changed file, size or speck limit does; two processes at once agree."""
    first = load_slices([phantom], 16, cache=tmp_path / 'c')
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / 'c').rglob('*.*')}
    with monkeypatch.context() as m:
        m.setattr(common, 'decode_patient', lambda *a, **k: pytest.fail('decoded again'))
        again = load_slices([phantom], 16, cache=tmp_path / 'c')
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / 'c').rglob('*.*')} == before
    assert np.array_equal(first.images, again.images) and isinstance(again.images, np.memmap)
    load_slices([phantom], 16, cache=tmp_path / 'c', speck=9.0)
    assert len([d for d in (tmp_path / 'c').iterdir() if d.is_dir()]) == 2
    context = multiprocessing.get_context('spawn')
    jobs = [context.Process(target=load_slices, args=([phantom], 16), kwargs=dict(cache=tmp_path / 'd')) for _ in range(2)]
    [j.start() for j in jobs], [j.join() for j in jobs]
    assert [j.exitcode for j in jobs] == [0, 0]
    assert np.array_equal(first.images, load_slices([phantom], 16, cache=tmp_path / 'd').images)
    assert not list((tmp_path / 'd').glob('.*'))


def test_without_data_the_phantom_is_made_and_named(tmp_path, monkeypatch, capsys):
    """The README's first command, smaller: the phantom is written beside the cache and said to be made up; the picture shows its real slices and their masks
    above two images generated for each."""
    monkeypatch.setattr(common, 'make_phantom', functools.partial(make_phantom, patients=14, slices=3, size=32))
    shown, real = {}, common.save_grid
    monkeypatch.setattr(train_bravo, 'save_grid', lambda path, rows, labels, zoom: (shown.update(zip(labels, rows)), real(path, rows, labels, zoom)))
    flags = ['--rflow', '--steps', '100', '--preset', 'tiny', '--iters', '2', '--cache', str(tmp_path / 'cache'), '--out', str(tmp_path / 'run')]
    for again in (False, True):
        train_bravo.main(train_bravo.get_args([*flags[:-1], str(tmp_path / f'run{again}')]))
        assert f'no --data given: using the built-in phantom in {tmp_path}/phantom' in capsys.readouterr().out
    assert len(list((tmp_path / 'phantom').glob('phantom_0_*'))) == 14
    data = load_slices([tmp_path / 'phantom'], 16, cache=tmp_path / 'cache')
    known = {data.images[i].tobytes(): data.masks[i] for i in data.rows('val') if data.table[i]['tumour']}
    assert list(shown) == ['real', 'mask', 'generated', 'generated 2', 'with mask'] and (tmp_path / 'runTrue/samples_000002.png').exists()
    for x, m, a, b in zip(*(shown[k] for k in ('real', 'mask', 'generated', 'generated 2'))):
        assert np.array_equal((np.asarray(m) + 1) / 2, known[np.asarray(x, np.float32).tobytes()][0]) and not np.array_equal(a, b)


def test_empty_slices():
    """The share of tumour-free slices is the one asked for, as far as there are any; drawn by seed."""
    data = Slices.__new__(Slices)
    data.table, data.part = [{'tumour': int(i < 60)} for i in range(200)], ['train'] * 180 + ['val'] * 20
    share = lambda rows: np.mean([data.table[i]['tumour'] == 0 for i in rows])
    assert len(data.rows('train')) == 180 and len(data.rows('val')) == 20
    assert data.rows('train', 0.0).tolist() == list(range(60))
    assert len(data.rows('train', 0.2)) == 75 and share(data.rows('train', 0.2)) == 0.2
    assert share(data.rows('train', 1.0)) == 1 and len(data.rows('train', 0.9)) == 180            # no more than there are
    assert np.array_equal(data.rows('train', 0.2, 1), data.rows('train', 0.2, 1))
    assert not np.array_equal(data.rows('train', 0.2, 1), data.rows('train', 0.2, 2))


def test_augment():
    """Image and mask move together; masks stay 0 or 1; half are mirrored; no motion is the identity."""
    size, n = 32, 64
    mask = torch.from_numpy(disc(size, 10, 20, 4)).float().expand(n, 1, -1, -1)
    image = mask * 2 - 1
    u = torch.rand(n, 5, generator=generator('aug'))
    moved, moved_mask = augment(image, mask, u)
    assert set(moved_mask.unique().tolist()) == {0.0, 1.0} and moved.min() >= -1 and moved.max() <= 1
    both, either = ((moved > 0) & (moved_mask > 0)).sum(), ((moved > 0) | (moved_mask > 0)).sum()
    assert both / either > 0.85
    left = torch.stack([m.nonzero()[:, 2].float().mean() for m in moved_mask]) < (size - 1) / 2
    assert torch.equal(left, u[:, 2] < 0.5)
    still = torch.full((1, 5), 0.5)
    assert torch.allclose(augment(image[:1], mask[:1], still)[0], image[:1], atol=1e-5)
    mirror = torch.tensor([[0.5, 0.5, 0.0, 0.5, 0.5]])
    assert torch.equal(augment(image[:1], mask[:1], mirror)[1], mask[:1].flip(-1))
    flipped, flipped_mask = augment(image, mask, u, 'flip')
    for i in range(n):
        assert all(torch.equal(a[i], b[i].flip(-1) if u[i, 2] < 0.5 else b[i]) for a, b in ((flipped, image), (flipped_mask, mask)))


def test_phantom(tmp_path):
    """Seeded, patient i the same in any set; lesions enhance in bravo and not before; inside the head; 0-4 a slice mostly."""
    pre, post, seg, spacing = phantom_patient(generator('phantom', 0, 1), 10, 64)
    again = phantom_patient(generator('phantom', 0, 1), 10, 64)
    assert np.array_equal(post, again[1]) and np.array_equal(seg, again[2])
    counts, contrast = [], []
    for i in range(12):
        pre, post, seg, spacing = phantom_patient(generator('phantom', 0, i), 10, 64)
        inside, brain = seg > 0, post > 0.4
        counts += [components(s)[1] for s in seg]
        if inside.any():
            contrast.append((post - pre)[inside].mean() - (post - pre)[brain & ~inside].mean())
            assert common.head_mask(post)[inside].all()
    assert np.mean(contrast) > 0.2 and min(contrast) > 0.02
    assert np.mean(np.array(counts) > 4) < 0.05 and 0.2 < np.mean(np.array(counts) > 0) < 0.9
    make_phantom(tmp_path / 'a', 2, 5, 2, 32), make_phantom(tmp_path / 'b', 1, 5, 2, 32)
    for f in ('bravo', 't1_pre', 'seg'):
        assert np.array_equal(read_nifti(tmp_path / f'a/phantom_5_000/{f}.nii.gz')[0], read_nifti(tmp_path / f'b/phantom_5_000/{f}.nii.gz')[0])


def test_phantom_looks_like_a_head():
    """A bright scalp, a dark skull, brain; dark ventricles in the middle; lesions of 2 to 41 mm that all enhance: the small ones solid, a third of the large ones
    rings."""
    lesions = []
    for i in range(12):
        pre, post, seg, spacing = phantom_patient(generator('phantom', 0, i), 10, 128)
        head = common.head_mask(pre[5:6])[0]
        y, x = (int(v.mean()) for v in np.nonzero(head))
        line = pre[5, y, np.nonzero(head[y])[0].min():x]                                       # from the left ear to the middle
        assert line[:8].max() > 0.4 and line[4:12].min() < 0.25 and np.median(line[14:]) > 0.45
        assert 0.05 < (pre[5, y - 30:y + 30, x - 25:x + 25] < 0.3).mean() < 0.35
        for z, (found, n) in enumerate(map(components, seg)):
            for k in range(1, n + 1):
                inner = torch.from_numpy(found == k)[None, None].float()
                whole, rim = inner[0, 0].bool(), (inner + F.max_pool2d(-inner, 3, 1, 1))[0, 0].bool()
                while (less := -F.max_pool2d(-inner, 3, 1, 1)).sum() >= max(4, 0.12 * whole.sum()):
                    inner = less
                lesions.append((2 * (whole.sum() * spacing[1] * spacing[2] / np.pi) ** 0.5, post[z][inner[0, 0].bool()].mean() / post[z][rim].mean(),
                                (post - pre)[z][whole].mean()))
    size, core, enhancement = np.array(lesions).T
    assert size.min() > 1.5 and size.max() < 42 and 8 < np.median(size) < 25 and enhancement.min() > 0.1
    large = core[size > 14]
    assert (core[size < 10] > 0.95).all() and 0.15 < (large < 0.7).mean() < 0.6 and (large > 1).mean() > 0.3


def test_slice_level(tmp_path):
    """0 at the lowest slice with a head, 1 at the highest; a lone slice does not know and gets 0.5."""
    image = np.zeros((7, 40, 40), np.float32)
    image[1:6, 4:-4, 4:-4] = 500
    write_patient(tmp_path / 'p', {'bravo': image}, np.zeros(image.shape), (5.0, 2.0, 2.0))
    write_patient(tmp_path / 'q', {'bravo': image[2]}, np.zeros(image[2].shape), (2.0, 2.0))
    p, q = find_patients([tmp_path], ('bravo', 'seg'))
    table, notes = decode_patient(p, 16, (0.0, 0.0, 1.0, 1.0), 4.0)[2:]
    assert [r['level'] for r in table] == [0, 0.25, 0.5, 0.75, 1] and notes['slices with too little head left out'] == 2
    assert decode_patient(q, 16, (0.0, 0.0, 1.0, 1.0), 4.0)[2][0]['level'] == 0.5


def test_the_cache_knows_no_names_of_folders(tmp_path, monkeypatch, capsys):
    """Data reached by another path are the same data, under the name that was given now; a level in a manifest is the slice's."""
    make_phantom(tmp_path / 'set', 4, 0, 2, 32)
    monkeypatch.chdir(tmp_path)
    for root in ('set', tmp_path / 'set', 'set/../set'):
        data = load_slices([root], 16, cache=tmp_path / 'cache')
        assert {r['root'] for r in data.table} == {str(root)} and len(list((tmp_path / 'cache').glob('*/index.json'))) == 1
    for i, level in enumerate(('', '0.7000')):
        write_patient(tmp_path / f'made/s{i}', {'bravo': data.images[i, 0]}, data.masks[i, 0], (2.0, 2.0))
    (tmp_path / 'made/manifest.csv').write_text('folder,source_patient,level\ns0,,\ns1,,0.7\n')
    for bad in ('x', 'nan', '1.5', '-0.1'):
        (tmp_path / 'made/manifest.csv').write_text(f'folder,source_patient,level\ns0,,{bad}\n')
        with pytest.raises(SystemExit) as e:
            find_patients(['made'], ('bravo', 'seg'))
        assert e.value.code == 2 and bad in capsys.readouterr().err
    (tmp_path / 'made/manifest.csv').write_text('folder,source_patient,level\ns0,,\ns1,,0.7\n')
    assert [r['level'] for r in load_slices(['made'], 16, cache=tmp_path / 'cache').table] == [0.5, 0.7]


def test_run_folder_says_who_saw_what(tmp_path, phantom):
    """split.csv of a run lists every patient with its part, and args.json the flags."""
    import train_seg
    train_seg.main(train_seg.get_args(['--preset', 'tiny', '--iters', '1', '--data', str(phantom), '--cache', str(tmp_path / 'c'),
                                       '--out', str(tmp_path / 'run')]))
    rows = common.read_csv(tmp_path / 'run/split.csv')
    assert {r['patient']: r['part'] for r in rows} == {p['name']: part_of(p['name']) for p in find_patients([phantom], ('seg',))}
    assert json.loads((tmp_path / 'run/args.json').read_text())['channels'] == [8, 8]
