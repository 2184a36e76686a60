"""evaluate.py downstream: the networks' published sizes, the recipe's parts, metrics and tests by hand and by brute force, a whole tiny study."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import evaluate
from common import patient_id, read_csv, write_csv
from evaluate import (METRICS, MedNeXt, PlainUNet, border_distances, compare_arms, hodges_lehmann, intensity, lesion_rows, lesion_wise, nnunet_augment,
                      patient_metrics, segmentation_loss, signed_rank, spatial, train_segmenter, upkern)

count = lambda net: sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('size, known', [((256, 256), 33471820), ((128, 128), 20619082), ((192, 160), 20619082), ((96, 160, 160), 30785994),
                                         ((128, 128, 128), 31195594)])
def test_size_of_nnunet(size, known):
    with torch.device('meta'):
        assert count(PlainUNet(size)) == known


@pytest.mark.parametrize('kind, known', [('s', (5550915, 5980547, 5472003, 5542147)), ('b', (10526307, 10955939, 10447395, 10517539)),
                                         ('m', (17548963, 18260835, 17418211, 17534435)), ('l', (61779267, 62992899, 61556355, 61754499))])
def test_size_of_mednext(kind, known):
    """Those of the published code without deep supervision; ours has 1,928 more for the four coarse heads, and lacks one unused number."""
    with torch.device('meta'):
        assert tuple(count(MedNeXt(kind, dims, k)) - 1928 + 1 for dims, k in ((3, 3), (3, 5), (2, 3), (2, 5))) == known


def test_heads():
    """In training every level answers, finest first; else one, the same numbers. A 3D axis that is short is halved less often."""
    x = torch.randn(2, 1, 32, 32)
    for net, sides in ((PlainUNet((32, 32), 4), [32, 16, 8]), (MedNeXt('s', width=4), [32, 16, 8, 4, 2])):
        heads = net(x)
        assert [h.shape for h in heads] == [(2, 2, s, s) for s in sides]
        assert torch.equal(net.eval()(x), heads[0])
    assert [h.shape[2:] for h in PlainUNet((8, 16, 16), 4)(torch.randn(1, 1, 8, 16, 16))] == [(8, 16, 16), (4, 8, 8)]
    assert MedNeXt('s', 3, width=2)(torch.randn(1, 1, 32, 32, 32))[4].shape == (1, 2, 2, 2, 2)


def test_upkern():
    """All weights but depthwise ones are the small network's; those are interpolated: a constant stays one, the centre stays the centre."""
    small, net = MedNeXt('s', kernel=3, width=4), MedNeXt('s', kernel=5, width=4)
    with torch.no_grad():
        small.middle[0].depthwise.weight[0] = 0.7
        small.middle[0].depthwise.weight[1] = torch.eye(3)
    after = upkern(small, net).state_dict()
    wide = [k for k, v in small.state_dict().items() if v.shape != after[k].shape]
    assert len(wide) == 2 * 9 + 8 and all(k.endswith('depthwise.weight') for k in wide)
    assert all(torch.equal(v, after[k]) for k, v in small.state_dict().items() if k not in wide)
    w = after['middle.0.depthwise.weight']
    assert torch.allclose(w[0], torch.full((1, 5, 5), 0.7)) and torch.equal(w[1, 0], w[1, 0].T) and w[1, 0, 2, 2] == 1 and w[1, 0, 0, 0] == 1


def test_loss():
    """-1 for a perfect answer; ln 2 - 2/3 a where all is undecided and a share a ... by hand; the coarsest head counts for nothing, the others 2/3 and 1/3."""
    y = torch.zeros(2, 1, 16, 16)
    y[:, :, :8, :8] = 1
    sure = lambda t: torch.cat([1 - t, t], 1) * 60 - 30
    low = lambda k: y[:, :, ::k, ::k]
    assert segmentation_loss([sure(y), sure(low(2)), sure(low(4))], y) == pytest.approx(-1, abs=1e-6)
    undecided = math.log(2) - 2 * 0.5 * 0.25 / (0.5 + 0.25)
    flat = [torch.zeros(2, 2, 16 // k, 16 // k) for k in (1, 2, 4)]
    assert segmentation_loss(flat, y) == pytest.approx(undecided, abs=1e-5)
    assert segmentation_loss([sure(y), flat[1], 1e3 * torch.randn(2, 2, 4, 4)], y) == pytest.approx(-2 / 3 + undecided / 3, abs=1e-5)
    one = y.clone()
    one[1] = 0                                                          # 2D: one Dice over the batch; 3D: the empty case has a Dice of its own
    half = torch.zeros(2, 2, 16, 16)
    assert segmentation_loss([half], one) == pytest.approx(math.log(2) - 2 * 0.5 * 64 / (0.5 * 512 + 64), abs=1e-5)
    deep = segmentation_loss([half[:, :, None]], one[:, :, None])
    assert deep == pytest.approx(math.log(2) - (2 * 0.5 * 64 / (0.5 * 256 + 64) + 1e-5 / 128) / 2, abs=1e-5)


def disc(r, side=64):
    y, x = np.mgrid[:side, :side] + 0.5
    return np.hypot(x - side / 2, y - side / 2) <= r


def test_spatial():
    """Turned by 0 and shrunk by 1 nothing changes; a turned disc keeps its area, one shrunk by s has 1/s^2 of it; masks stay 0 and 1; turns add up."""
    y = torch.tensor(disc(18))[None, None].float().repeat(8, 1, 1, 1)
    x = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    same = spatial(x, y, torch.zeros(8), torch.ones(8))
    assert torch.allclose(same[0], x, atol=5e-5) and torch.equal(same[1], y)
    turned = spatial(x, y, torch.linspace(-math.pi, math.pi, 8), torch.ones(8))[1]
    assert set(turned.unique().tolist()) == {0, 1} and ((turned.sum((1, 2, 3)) / y.sum((1, 2, 3)) - 1).abs() < 0.02).all()
    scale = torch.linspace(0.7, 1.4, 8)
    assert ((spatial(x, y, torch.zeros(8), scale)[1].sum((1, 2, 3)) / y.sum((1, 2, 3)) * scale ** 2 - 1).abs() < 0.02).all()
    quarter = spatial(x, y, torch.full((8,), math.pi / 2), torch.ones(8))[0]
    assert torch.allclose(quarter, x.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(quarter, x.rot90(-1, (2, 3)), atol=1e-4)
    far = spatial(x + 5, y, torch.zeros(8), torch.full((8,), 1.4))[0]
    assert torch.allclose(far[:, 0, 0, 0], (x + 5).amin((1, 2, 3)))                       # outside lies each image's own background


def test_intensity():
    """Its odds: a share 0.9 0.9 0.85 0.85 0.875 0.9 0.7 of images keeps its bits; same seed, same images; the argument is left alone."""
    x = torch.randn(4000, 1, 8, 8)
    kept, again = x.clone(), intensity(x, torch.Generator().manual_seed(1))
    share = ((again == x).flatten(1).all(1)).float().mean()
    expected = 0.9 * 0.9 * 0.85 * 0.85 * 0.875 * 0.9 * 0.7
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert torch.equal(x, kept) and again.isfinite().all() and torch.equal(again, intensity(x, torch.Generator().manual_seed(1)))
    flat = torch.zeros(500, 1, 8, 8)                                                      # noise alone changes what is constant
    changed = intensity(flat, torch.Generator().manual_seed(2)).flatten(1)
    assert 20 < (changed.std(1) > 0.001).sum() < 90 and changed.std() < 0.1


def test_augment():
    """Same generator, same pair. Image and mask move together, and intensities never touch the mask: of an image that is its mask, the mask is found
    again by a threshold at its middle. A half of all is mirrored on each axis."""
    y = torch.zeros(400, 1, 32, 32)
    y[:, :, 6:16, 8:20] = 1
    x = 4 * y - 1 + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    a, b = (nnunet_augment(x, y, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and set(a[1].unique().tolist()) == {0, 1}
    middle = (a[0].amin((1, 2, 3), True) + a[0].amax((1, 2, 3), True)) / 2
    overlap = ((a[0] > middle) * a[1]).sum((1, 2, 3)) / (((a[0] > middle) + a[1]) > 0).sum((1, 2, 3))
    assert overlap.median() > 0.99 and (overlap > 0.7).float().mean() > 0.97
    known = [torch.equal(m, w) for m in a[1] for w in (y[0], y[0].flip(1), y[0].flip(2), y[0].flip((1, 2)))]
    share = np.array(known).reshape(400, 4).mean(0)
    assert abs(share.sum() - 0.64) < 0.1 and (abs(share - 0.16) < 0.075).all()


def test_segmenter_is_seeded():
    """Same seed, same answers; a third of each batch is drawn from slices with tumour."""
    g = np.random.default_rng(0)
    images = g.standard_normal((30, 1, 16, 16)).astype(np.float32)
    masks = (images > 2) & (np.arange(30) < 4)[:, None, None, None]
    first, again, other = (train_segmenter(images, masks.astype(np.uint8), 3, seed=s, width=2, batch=9)(images) for s in (0, 0, 1))
    assert first.shape == (30, 16, 16) and (first == again).all() and (first != other).any()
    drawn = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluate, 'segmentation_loss', lambda out, y: (drawn.append(y.flatten(1).any(1)), out[0].sum() * 0)[1])
        train_segmenter(images, masks.astype(np.uint8), 15, width=2, batch=9, augmented=False)
    drawn = torch.stack(drawn)
    assert drawn[:, 6:].all() and 0 < drawn[:, :6].float().mean() < 0.3
    for kernel in ('5', 'upkern'):
        big = np.tile(images[:4], (1, 1, 2, 2))
        assert train_segmenter(big, (big > 2).astype(np.uint8), 2, network='mednext-s', width=1, kernel=kernel, batch=2)(big).shape == (4, 32, 32)


@pytest.mark.parametrize('dims', [2, 3])
def test_lesion_wise(dims):
    """Two boxes, one found: 1/2; with a false one 1/3; both: 1. Pieces that are one voxel of gap apart are one lesion. Specks do not count."""
    empty, box = np.zeros((24,) * dims, bool), lambda *at: (slice(*at),) * dims
    two, first, wrong = empty.copy(), empty.copy(), empty.copy()
    first[box(2, 6)] = True
    two[box(2, 6)] = two[box(12, 16)] = True
    wrong[box(20, 22)] = True
    score = lambda found, truth, voxel=1.0: (lambda s, n, f: s / (n + f))(*lesion_wise(found, truth, voxel))
    assert score(first, two) == 0.5 and score(first | wrong, two) == pytest.approx(1 / 3) and score(two, two) == 1 and score(empty, two) == 0
    specks = empty.copy()
    specks[(3, slice(3, 5)) + (3,) * (dims - 2)] = specks[(12, slice(3, 5)) + (3,) * (dims - 2)] = True
    assert lesion_wise(empty, specks) == (0, 0, 0) and lesion_wise(specks, specks) == (0, 0, 0) and lesion_wise(specks, empty) == (0, 0, 2)
    assert lesion_wise(empty, specks, 1.5)[1] == 2                                       # 3 mm each
    near = empty.copy()
    near[box(2, 4)], near[(slice(6, 8),) + box(2, 4)[1:]] = True, True                   # two voxels between: their grown forms touch
    assert lesion_wise(near, near) == (1, 1, 0)
    beside = empty.copy()
    beside[(slice(6, 8),) + box(2, 6)[1:]] = True                                        # touches the grown box: not false, overlaps nothing
    assert lesion_wise(beside, first) == (0, 1, 0)
    if dims == 3:                                                                        # grown by 18 neighbours: a corner is not reached
        corner = empty.copy()
        corner[box(6, 8)] = True
        assert lesion_wise(corner, first) == (0, 1, 1)


def test_patient_metrics():
    """A square moved by 3 pixels of 2 mm; two slices are pooled; empty sides as defined; the tolerance is a pixel unless given."""
    t, f = np.zeros((2, 32, 32), bool), np.zeros((2, 32, 32), bool)
    t[0, 8:18, 8:18], f[0, 8:18, 11:21] = True, True
    mm = np.full((2, 2), 2.0)
    m = patient_metrics(f, t, mm)
    assert m['Dice'] == m['lesion-wise Dice'] == pytest.approx(0.7) and m['lesion recall'] == 1 and m['false positives a slice'] == 0 and m['HD95, mm'] == 6
    d = np.concatenate([border_distances(f[0], t[0], mm[0]), border_distances(t[0], f[0], mm[0])])
    assert len(d) == 72 and m['NSD'] == (d <= 2).mean() and 0.3 < m['NSD'] < 1 and patient_metrics(f, t, mm, 6)['NSD'] == 1
    f[1, 2:4, 2:4] = True                                                                  # a false piece in the second slice
    m = patient_metrics(f, t, mm)
    assert m['Dice'] == pytest.approx(140 / 204) and m['lesion-wise Dice'] == 0.35 and m['false positives a slice'] == 0.5
    assert m['HD95, mm'] == pytest.approx(math.hypot(64, 64))                              # 4 of 40 border pixels have no counterpart
    nothing = np.zeros_like(t)
    m = patient_metrics(nothing, nothing, mm)
    assert [m[k] for k in METRICS if k != 'lesion recall'] == [1, 1, 0, 0, 1] and math.isnan(m['lesion recall'])
    assert list(patient_metrics(nothing, t, mm).values()) == [0, 0, 0, 0, math.hypot(64, 64), 0] and patient_metrics(f, nothing, mm)['Dice'] == 0
    y, x = np.array([0, 3]), np.array([4, 0])
    a, b = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    a[0, 0], b[3, 4] = True, True
    assert border_distances(a, b, np.array([2.0, 1.0])).tolist() == [math.hypot(6, 4)]     # spacing is (y, x)


def test_lesion_rows():
    """Two pieces of a slice of 2 mm pixels in a round head of radius 24: sizes, places, distance to the head's edge, found or not."""
    head, t, f = np.where(disc(24), 1.0, -1.0)[None].astype(np.float32), np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    t[31:33, 31:33], t[20:22, 40:44] = True, True
    f[32, 32] = True
    rows = lesion_rows('real', 7, [dict(patient='p', folder='f', z=3, spacing=[2.0, 2.0])], head[None], f[None], t[None])
    rows = [dict(zip(evaluate.LESION, r)) for r in rows]
    assert [(r['lesion'], r['hit'], r['count'], r['slice'], r['unit']) for r in rows] == [(1, 0, 2, 3, 'mm'), (2, 1, 2, 3, 'mm')]
    assert [float(r['area']) for r in rows] == [32, 16] and float(rows[1]['diameter']) == pytest.approx(math.sqrt(64 / math.pi), rel=1e-3)
    assert (float(rows[1]['x']), float(rows[1]['y'])) == (0.5, 0.5) and (float(rows[0]['x']), float(rows[0]['y'])) == (0.6562, 0.3281)
    assert abs(float(rows[1]['edge']) - 48) < 3 and abs(float(rows[0]['edge']) - (48 - 2 * math.hypot(10, 11))) < 3


def test_signed_rank():
    """Equals counting all sign patterns, with ties and zeros; 2/64 for six of one sign; 1 for none."""
    g = np.random.default_rng(0)
    for trial in range(30):
        d = np.round(g.normal(0.4, 1, g.integers(1, 10)), (1, 9)[trial % 2])
        e = d[d != 0]
        rank = np.array([(abs(e) < abs(v)).sum() + ((abs(e) == abs(v)).sum() + 1) / 2 for v in e])
        w = rank[e > 0].sum()
        every = np.array([sum(r for r, s in zip(rank, signs) if s) for signs in itertools.product((0, 1), repeat=len(e))])
        assert signed_rank(d) == pytest.approx(min(1, 2 * min((every <= w).mean(), (every >= w).mean())), abs=1e-12)
    assert signed_rank([1, 2, 3, 4, 5, 6]) == 2 / 64 and signed_rank([0, 0]) == 1 and signed_rank(-g.random(200)) < 1e-30


def test_hodges_lehmann():
    assert hodges_lehmann(np.array([1.0, 2, 10])) == 3.75 and hodges_lehmann(np.array([-1.0, 0, 1])) == 0          # 1 1.5 2 5.5 6 10
    d = np.random.default_rng(1).normal(size=20)
    assert hodges_lehmann(d + 3) == pytest.approx(hodges_lehmann(d) + 3) and hodges_lehmann(-d) == pytest.approx(-hodges_lehmann(d))


def test_not_inferior():
    """A loss of 0.01 to 0.03 is within a margin of 0.04, not of 0.02; a gain is within any; only Dice is judged, and no interaction."""
    real = np.full((6, len(METRICS)), 0.5)
    loss, gain = real - np.linspace(0.01, 0.03, 6)[:, None], real + 0.1
    values = dict(real=real, synthetic=loss, both=gain, real_aug=real, both_aug=gain)
    verdict = lambda margin: {r[:2][1]: r[8] for r in compare_arms(values, 200, 0, margin) if r[0] == 'Dice'}
    assert verdict(0.02)['synthetic - real'] == 'no' and verdict(0.04)['synthetic - real'] == 'yes' == verdict(0)['both - real'] and verdict(0)['both x aug'] == ''
    assert {r[8] for r in compare_arms(values, 20, 0, 0.02) if r[0] not in METRICS[:2]} == {''}


def test_compare_arms():
    """Additive gains interact by nothing; each patient's own level drops out; Holm over the comparisons of a metric."""
    g = np.random.default_rng(2)
    level = g.random((8, len(METRICS)))
    noise = lambda: 0.01 * g.random((8, 1))
    gain = noise() + 0.2
    values = dict(real=level, both=level + gain, real_aug=level + 0.1, both_aug=level + 0.1 + gain)
    rows = {r[1]: r for r in compare_arms(values, 30, 0, 0.02) if r[0] == 'Dice'}
    assert list(rows) == ['both - real', 'both_aug - real_aug', 'real_aug - real', 'both x aug']
    assert abs(rows['both x aug'][3]) < 1e-9 and rows['real_aug - real'][3] == pytest.approx(0.1)
    assert rows['both - real'][6] == 2 / 256 and rows['both - real'][7] >= 3 * 2 / 256 and rows['both - real'][4] >= 0.2 and rows['both - real'][5] <= 0.21
    values['real'][3, 2] = math.nan                                                        # a patient without lesions has no recall
    assert [r[2] for r in compare_arms(values, 20, 0, 0.02) if r[0] == 'lesion recall' and r[1] == 'both - real'] == [7]


@pytest.fixture(scope='module')
def study(phantom, cache, trained, call, tmp_path_factory):
    """study(*flags): a tiny study of the phantom, 9 patients to learn from, 5 to test on, two sets of 6 images. Returns its folder."""
    root = tmp_path_factory.mktemp('study')
    names = sorted(f.name for f in phantom.iterdir())
    write_csv(root / 'split.csv', ['patient', 'part'], [(n, 'train' if i < 9 else 'test') for i, n in enumerate(names)])
    for k in (0, 1):
        call('sample', root / f'set{k}', '--bravo', trained / 'bravo', '--data', phantom, '--split', root / 'split.csv', '--n', 6, '--steps', 2, '--seed', k)
        file = root / f'set{k}/sample.json'                                                # the run had another split
        file.write_text(json.dumps({**json.loads(file.read_text()), 'seen': []}))

    def go(*flags):
        first = ['downstream', '--data', phantom, '--split', root / 'split.csv', '--cache', cache, '--device', 'cpu', '--out', root / 'out', '--fake', root / 'set0',
                 '--iters', 2, '--width', 2, '--batch-size', 4, '--repeats', 20, '--seeds', 2]
        evaluate.main(evaluate.get_args([str(f) for f in (*first, *flags)]))
        return root / 'out'
    go.root = root
    return go


def test_study(study, monkeypatch, capsys):
    """Arms without their set are left out and named; each training is on its arm's slices; a second start trains what is missing only; other flags are refused."""
    trainings = []
    real = train_segmenter
    monkeypatch.setattr(evaluate, 'train_segmenter', lambda images, *a: (trainings.append((len(images), a[-2])), real(images, *a))[1])
    out = study('--arms', 'real', 'both', 'real_aug', 'both_aug', 'synthetic')
    told = capsys.readouterr().out
    assert 'left out for want of a set: gated, gated_aug' in told and 'width 2, the published networks have 32' in told
    scores = [json.loads(r.read_text())['patients'].values() for r in (out / 'results').glob('*.json')]
    assert told.count('touches no real lesion') == sum(all(p['Dice'] == 0 for p in r) for r in scores)
    assert trainings == 2 * [(27, False), (33, False), (27, True), (33, True), (6, False)]
    about = json.loads((out / 'metrics.json').read_text())
    assert about['patients'] == 5 and about['slices'] == 15 and set(about['arms']) == {'real', 'both', 'real_aug', 'both_aug', 'synthetic'}
    assert {t['comparison'] for t in about['tests']} >= {'both - real', 'both x aug', 'synthetic - real'}
    patients = read_csv(out / 'patients.csv')
    assert len(patients) == 5 * 2 * 5 and np.mean([float(r['Dice']) for r in patients if r['arm'] == 'both']) == pytest.approx(about['arms']['both']['Dice'][0])
    lesions = read_csv(out / 'lesions.csv')
    assert len(lesions) == 10 * len({(r['folder'], r['slice'], r['lesion']) for r in lesions}) and all(0 < float(r['x']) < 1 and float(r['edge']) > 0 for r in lesions)
    assert (out / 'arms.png').exists() and (out / 'slices.png').exists()
    (out / 'results/both_1.npz').unlink()                                                  # as if killed before it was written
    before = (out / 'metrics.json').read_bytes()
    trainings.clear()
    study('--arms', 'real', 'both', 'real_aug', 'both_aug', 'synthetic')
    assert trainings == [(33, False)] and (out / 'metrics.json').read_bytes() == before
    made, test = (study.root / 'set0/sample.json').read_text(), sorted(p['patient'] for p in patients)[0]
    (study.root / 'set0/sample.json').write_text(json.dumps({**json.loads(made), 'seen': [patient_id(test)]}))
    with pytest.raises(SystemExit) as e:
        study()
    assert e.value.code == 2 and f'set0: patient {test} was a training patient' in capsys.readouterr().err
    (study.root / 'set0/sample.json').write_text(made)
    for file, change in (('manifest.csv', lambda v: v.replace('syn_0_000001,1,', 'syn_0_000001,7,')), ('sample.json', lambda v: v.replace('"seed": 0', '"seed": 5'))):
        whole = (study.root / 'set0' / file).read_text()                                   # a set made anew at the same path
        assert change(whole) != whole
        (study.root / 'set0' / file).write_text(change(whole))
        with pytest.raises(SystemExit) as e:
            study()
        assert e.value.code == 2 and 'hash of --fake' in capsys.readouterr().err
        (study.root / 'set0' / file).write_text(whole)
    for flags, words in ((('--iters', '3'), '--iters 3 (was 2)'), (('--fake', study.root / 'set1'), 'set1'), (('--width', '4'), '--width 4 (was 2)')):
        with pytest.raises(SystemExit) as e:
            study(*flags)
        assert e.value.code == 2 and words in capsys.readouterr().err


def test_gated_arms(study, monkeypatch):
    """Real and gated slices together, with and without augmentation; the interaction of the gate with augmentation is among the comparisons."""
    trainings, real = [], train_segmenter
    monkeypatch.setattr(evaluate, 'train_segmenter', lambda images, *a: (trainings.append((len(images), a[-2])), real(images, *a))[1])
    out = study.root / 'gated'
    study('--gated', study.root / 'set1', '--arms', 'real', 'real_aug', 'gated', 'gated_aug', 'synthetic_aug', '--seeds', '1', '--out', out)
    assert trainings == [(27, False), (27, True), (33, False), (33, True), (6, True)]
    assert {t['comparison'] for t in json.loads((out / 'metrics.json').read_text())['tests']} >= {'gated - real', 'gated x aug'}


def test_recipe(monkeypatch):
    """nnU-Net's optimiser: SGD 0.01 with Nesterov's momentum 0.99 and decay 3e-5, the rate (1 - k/K)^0.9, gradients clipped at 12; a third of a batch with tumour."""
    seen, clips, batches = [], [], []

    class SGD(torch.optim.SGD):
        def step(self):
            seen.append({k: self.param_groups[0][k] for k in ('lr', 'momentum', 'nesterov', 'weight_decay')})
            super().step()
    monkeypatch.setattr(torch.optim, 'SGD', SGD)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda p, most: clips.append(most))
    monkeypatch.setattr(evaluate, 'segmentation_loss', lambda out, y: (batches.append(int(y.flatten(1).any(1).sum())), out[0].mean())[1])
    masks = np.zeros((24, 1, 16, 16), np.uint8)
    masks[:2, :, 4:8, 4:8] = 1
    train_segmenter(np.random.default_rng(0).random((24, 1, 16, 16), np.float32), masks, 4, width=2, batch=9, augmented=False)
    assert [s.pop('lr') for s in seen] == pytest.approx([0.01 * (1 - k / 4) ** 0.9 for k in range(4)]) and clips == [12] * 4
    assert seen == [dict(momentum=0.99, nesterov=True, weight_decay=3e-5)] * 4 and min(batches) >= 3


def test_cross_validation(study, capsys):
    """Every training patient is held out once; no test patient is in it."""
    study('--cross-validate', '3', '--gated', study.root / 'set1', '--out', study.root / 'cv')
    out = study.root / 'cv'
    rows = read_csv(out / 'cv_lesions.csv')
    part = {r['patient']: r['part'] for r in read_csv(study.root / 'split.csv')}
    assert {part[r['patient']] for r in rows} == {'train'} and len({r['patient'] for r in rows}) == 9 and {r['arm'] for r in rows} == {'real_aug'}
    assert len(rows) == len({(r['folder'], r['slice'], r['lesion']) for r in rows}) and not (out / 'lesions.csv').exists()
    assert {r['patient']: r['part'] for r in read_csv(out / 'split.csv')} == part
    assert '9 training patients in 3 folds' in capsys.readouterr().out
    args = evaluate.get_args(['downstream', '--data', 'tests', '--fake', str(study.root / 'set0'), '--gated', str(study.root / 'set1')])
    assert args.arms == list(evaluate.ARMS) and args.size == 16 and args.minutes == 5


REFUSED = [('', '--data'), ('--data none', '--data none'), ('--data {data} --fake {data}', 'sample.json'), ('--data {data} --gated {data}', '--gated'),
           ('--data {data} --arms both', '--arms both --fake DIR'), ('--data {data} --arms gated_aug --fake {fake}', '--arms gated_aug --gated DIR'),
           ('--data {data} --arms none', "'none'"), ('--data {data} --size 18', '--size 18 multiple of 4'), ('--data {data} --size 48 --network mednext-b', 'multiple of 32'),
           ('--data {data} --kernel 5', '--kernel 5'), ('--data {data} --iters 3 --minutes 1', '--iters 3'), ('--data {data} --cross-validate 1', '--cross-validate'),
           ('--data {data} --width 0', '--width'), ('--data {data} --size 32', '--split'), ('--data {data} --split {split} --size 32 --iters 1 --cross-validate 40', '9 training patients')]


@pytest.mark.parametrize('flags, words', REFUSED, ids=[f for f, _ in REFUSED])
def test_refused(flags, words, study, phantom, cache, tmp_path, capsys):
    write_csv(tmp_path / 'one.csv', ['patient', 'part'], [(f.name, 'train' if i else 'test') for i, f in enumerate(sorted(phantom.iterdir()))])
    named = dict(data=phantom, fake=study.root / 'set0', split=study.root / 'split.csv')
    with pytest.raises(SystemExit) as e:
        more = ['--split', str(tmp_path / 'one.csv')] if words == '--split' else []
        evaluate.main(evaluate.get_args(['downstream', *flags.format(**named).split(), '--cache', str(cache), '--out', str(tmp_path / 'out'), *more]))
    line = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(line) == 1 and all(w in line[0] for w in words.split()), line
    assert not (tmp_path / 'out').exists()
