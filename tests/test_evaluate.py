"""The yardsticks of evaluate.py: closed forms, identities, and sets whose answer is known."""
import contextlib
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
from common import centred, generator, load_slices, patient_id, read_csv, ssim_parts, write_csv, write_patient
from evaluate import (copies, dice, distances, draw, frechet, kid, lesions, match, memorisation, ms_ssim, outside, polynomial_kernel, prdc,
                      principal, radial_spectrum, spearman, train_segmenter, traits, wasserstein)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


A, B = np.arange(300), np.arange(300, 600)


def test_frechet():
    """A shift of one feature by 3 costs exactly 9; y = 2x costs tr(S) + |mu|^2; equal sets 0; Gaussians: the closed form."""
    x = normal(300, 8)
    assert abs(frechet(np.concatenate([x, x + 3 * np.eye(8)[0]]), A, B) - 9) < 1e-9
    assert abs(frechet(np.concatenate([x, 2 * x]), A, B) - (np.trace(np.cov(x.T)) + (x.mean(0) ** 2).sum())) < 1e-9
    assert abs(frechet(np.concatenate([x, x]), A, B)) < 1e-9
    y = normal(300, 8, seed=1) @ normal(8, 8, seed=2)
    S, T = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(S @ T).real.clip(0)).sum()
    assert abs(frechet(np.concatenate([x, y]), A, B) - (((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(S + T) - 2 * root)) < 1e-8
    wide = np.concatenate([normal(300, 500), normal(300, 500, seed=3)])                       # fewer images than features
    assert math.isfinite(frechet(wide, A, B)) and frechet(wide, A, B) > 0


def test_kid():
    """Unbiased: mean 0 between equal distributions, one value by hand, and copies of an image are no pair."""
    values = [kid(polynomial_kernel(normal(400, 16, seed=s)), np.arange(200), np.arange(200, 400)) for s in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 60 ** 0.5 and 0.005 < np.std(values) < 0.03
    x = np.array([[1.0, 0], [0, 1], [1, 1], [2, 0]])
    k = lambda u, v: (np.dot(u, v) / 2 + 1) ** 3
    by_hand = k(x[0], x[1]) + k(x[2], x[3]) - 2 * np.mean([k(x[i], x[j]) for i in (0, 1) for j in (2, 3)])
    assert abs(kid(polynomial_kernel(x), np.array([0, 1]), np.array([2, 3])) - by_hand) < 1e-12
    twice = kid(polynomial_kernel(x), np.array([0, 1, 0, 1]), np.array([2, 3]))
    assert abs(twice - by_hand) < 1e-12
    assert kid(polynomial_kernel(np.concatenate([normal(300, 16), normal(300, 16, seed=1) + 1])), A, B) > 0.5


def test_prdc():
    """1 for equal sets, 0 for distant ones, coverage .969 for independent ones at k=5 (1 - C(n,k)/C(2n,k) for large n)."""
    x = normal(300, 8)
    same = prdc(distances(np.concatenate([x, x])), A, B)
    assert same['precision'] == same['recall'] == same['coverage'] == 1 and abs(same['density'] - 1) < 1e-9
    far = prdc(distances(np.concatenate([x, x + 100])), A, B)
    assert set(far.values()) == {0}
    found = [prdc(distances(normal(400, 8, seed=s)), np.arange(200), np.arange(200, 400))['coverage'] for s in range(20)]
    assert abs(np.mean(found) - 0.969) < 0.01
    one_mode = prdc(distances(np.concatenate([x[:1] + 0.01 * normal(300, 8, seed=4), x])), A, B)
    assert one_mode['precision'] == 1 and one_mode['recall'] < 0.05 and one_mode['coverage'] < 0.1
    d = distances(x)
    np.testing.assert_allclose(d[3, 7], np.linalg.norm(x[3] - x[7]))


def test_draws_of_too_few_images():
    """Fewer than k + 1 images on a side, or k neighbours of an image: all four nan; one distinct image: no KID, no Frechet; an interval of some such draws."""
    x = normal(40, 8)
    d, many = distances(x), np.arange(20, 40)
    for few in (np.arange(1), np.arange(4), np.arange(5), np.array([0] * 8 + [1, 2])):
        for found in (prdc(d, few, many), prdc(d, many, few)):
            assert list(found) == ['precision', 'recall', 'density', 'coverage'] and all(map(math.isnan, found.values()))
    assert all(map(math.isfinite, prdc(d, np.arange(6), many).values())) and all(map(math.isfinite, prdc(d, np.array([0, 1, 2] * 5), many).values()))
    for f in (lambda a, b: kid(polynomial_kernel(x), a, b), lambda a, b: frechet(x, a, b)):
        assert math.isnan(f(np.array([3, 3, 3]), many)) and math.isnan(f(many, np.array([3]))) and math.isfinite(f(np.array([3, 4]), many))
    draws = [({'m': v}, {'m': 0.0}) for v in (1.0, math.nan, 1.0)]
    assert evaluate.intervals(['m'], [{'m': 1.0}, {'m': 0.0}], draws) == [['m', 1, 1, 1, 0, 0, 0, 1, 1]]
    assert ms_ssim(torch.zeros(0, 1, 64, 64), torch.zeros(0, 1, 64, 64)).shape == (0,)               # of a draw of one image


def test_spectrum():
    """A cosine of 5 cycles has its power in ring 5; doubling adds 6.02 dB; white noise is flat."""
    n = np.arange(64)
    wave = np.cos(2 * np.pi * 5 * n / 64)[None, :] * np.ones((64, 1))
    s = radial_spectrum(np.stack([wave, 2 * wave]))
    assert s.shape == (2, 32) and s[0].argmax() == 4
    np.testing.assert_allclose(s[1] - s[0], 20 * math.log10(2), atol=1e-3)
    white = radial_spectrum(normal(200, 64, 64))
    assert np.ptp(white.mean(0)[2:]) < 1.5


def test_traits():
    """A mirrored disc off the middle is symmetric, its area is that of a disc, bright in one half it is not; noise adds fine power, twice the contrast 6.02 dB."""
    y, x = np.mgrid[:64, :64] + 0.5
    disc = np.where((x - 37) ** 2 + (y - 30) ** 2 < 20 ** 2, 0.2, -1.0)
    half, noisy = np.where((disc > 0) & (x < 37), 0.9, disc), np.where(disc > 0, disc + 0.1 * normal(64, 64), disc)
    images = np.stack([disc, half, noisy]).astype(np.float32)
    area, symmetry, fine = traits(images, radial_spectrum(images)).T
    np.testing.assert_allclose(area, np.pi * 20 ** 2 / 64 ** 2, rtol=0.01)
    assert symmetry[0] > 0.9999 and symmetry[1] < symmetry[2] < 1 and fine[2] > fine[0] + 2
    np.testing.assert_allclose(traits(2 * images[:1], radial_spectrum(2 * images[:1])), [[area[0], symmetry[0], fine[0] + 20 * math.log10(2)]], atol=1e-3)
    b = np.arange(1.0, 1002)                                                      # percentiles 11 and 991
    assert outside(b, b) == 20 / 1001 and outside(np.array([10.9, 11, 991, 991.1]), b) == 0.5


def test_principal():
    """Components of correlated features are uncorrelated, falling, of mean variance 1 where they were fitted; a shift along the first moves it alone."""
    images = (normal(300, 16) @ normal(16, 16, seed=1)).reshape(300, 4, 4)
    x = principal(images, np.arange(200), 8)
    covariance = np.cov(x[:200].T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    assert x.shape == (300, 8) and (np.diff(np.diag(covariance)) < 0).all() and np.trace(covariance) == pytest.approx(8)


def test_centred_ends():
    """A share's interval ends at 0 and 1, of which no draw is beyond; that of a statistic that was negative is left alone."""
    assert centred(0.9, [0.5, 0.6, 0.9], 0, 1)[1] == 1 < centred(0.9, [0.5, 0.6, 0.9])[1] and centred(0.1, [0.1, 0.4, 0.5], 0, 1)[0] == 0
    assert centred(0.1, [-0.1, 0.4, 0.5], 0, 1) == centred(0.1, [-0.1, 0.4, 0.5])


def test_centred():
    """Equal populations, a bootstrap over patients: the interval of a distance that repeats move holds the value, and the true distance."""
    assert centred(3.0, [9.0, 10, 11, math.nan]) == pytest.approx(list(np.percentile([2.0, 3, 4], (2.5, 97.5)))) and math.isnan(centred(1.0, [math.nan])[0])
    held = 0
    for s in range(20):
        g = np.random.default_rng(s)
        x = g.standard_normal((160, 4)) + np.repeat(0.5 * g.standard_normal((40, 4)), 4, 0)           # 40 patients of 4 images
        pick = lambda first: (g.integers(first, first + 20, 20)[:, None] * 4 + np.arange(4)).ravel()
        low, high = centred(value := frechet(x, np.arange(80), np.arange(80, 160)), draws := [frechet(x, pick(0), pick(20)) for _ in range(40)])
        assert low <= value <= high and np.mean(draws) > value
        held += low <= np.mean([frechet(np.random.default_rng(100 + k).standard_normal((160, 4)) + np.repeat(0.5 * np.random.default_rng(200 + k).standard_normal((40, 4)), 4, 0),
                                        np.arange(80), np.arange(80, 160)) for k in range(20)]) <= high
    assert held >= 16


def test_wasserstein():
    x = normal(500)
    assert wasserstein(x, x) == 0 and abs(wasserstein(x, x + 3) - 3) < 1e-9 and abs(wasserstein(x, 3 - x) - wasserstein(3 - x, x)) < 1e-12
    assert wasserstein(np.array([0.0]), np.array([0.0, 1, 2, 3])) == 1.5 and math.isnan(wasserstein(x, x[:0]))
    np.testing.assert_allclose(wasserstein(x, np.sort(2 * x)), np.abs(np.sort(x) - np.sort(2 * x)).mean())   # equal sizes: sorted pairs


@pytest.mark.parametrize('size', [64, 128, 192])
def test_ms_ssim(size):
    """1 of an image with itself, falls with noise; the published product, written out with SSIM maps that test_ssim_parts pins."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 1, size, size, generator=g) * 2 - 1
    assert (ms_ssim(x, x) - 1).abs().max() < 1e-5
    noise = torch.randn(x.shape, generator=g)
    near, far = ms_ssim(x, x + 0.1 * noise), ms_ssim(x, x + noise)
    assert (0 < far).all() and (far < near).all() and (near < 1).all()
    a, b, scales, wanted = x, x + noise, {64: 3, 128: 4, 192: 5}[size], 1
    published = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    for k, w in enumerate(published / published.sum()):
        luminance, structure = ssim_parts(a, b)
        wanted = wanted * (structure * (luminance if k == scales - 1 else 1)).mean((1, 2, 3)) ** w
        a, b = (v.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for v in (a, b))
    torch.testing.assert_close(far, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ms_ssim(x, x + noise), ms_ssim(x + noise, x))
    assert ms_ssim(x, torch.rand(x.shape, generator=g) * 2 - 1).max() < 0.2


def test_lesions():
    """Three discs of known radius and place: count, equivalent diameters, centres; an empty mask has none."""
    y, x = np.mgrid[:64, :64]
    mask = np.zeros((2, 64, 64), np.uint8)
    discs = [(3, 12, 20), (5, 40, 15), (8, 30, 48)]
    for r, cy, cx in discs:
        mask[1] |= ((y - cy) ** 2 + (x - cx) ** 2 <= r * r).astype(np.uint8)
    counts, pieces = lesions(mask)
    assert counts.tolist() == [0, 3] and (pieces[:, 0] == 1).all()
    for r, cy, cx in discs:
        found = pieces[np.abs(pieces[:, 2] * 64 - cx - 0.5).argmin()]
        area = ((y - cy) ** 2 + (x - cx) ** 2 <= r * r).sum()
        assert abs(found[1] - math.sqrt(4 * area / math.pi)) < 1e-9 and abs(found[2] * 64 - 0.5 - cx) < 1e-9 and abs(found[3] * 64 - 0.5 - cy) < 1e-9


def test_memorisation():
    """Fresh samples: 0.5, also where images of a patient are alike and there are seven times as many training patients. Training images among the samples: all of
    those are nearer to training."""
    share, alone = [], np.arange(300)
    g = np.random.default_rng(0)
    for s in range(60):
        x = distances(normal(300, 8, seed=s))
        share.append(memorisation(x, np.arange(100), np.arange(100, 200), np.arange(200, 300), alone))
    assert abs(np.mean(share) - 0.5) < 0.03
    share, patients = [], np.concatenate([np.repeat(np.arange(30), 5), 30 + np.repeat(np.arange(42), 5), 80 + np.repeat(np.arange(6), 5)])
    for s in range(100):
        x = distances(3 * normal(90, 4, seed=s)[patients % 90] + normal(len(patients), 4, seed=1000 + s))
        share.append(memorisation(x, np.arange(150), g.permutation(np.arange(150, 360)), np.arange(360, 390), patients))
    assert abs(np.mean(share) - 0.5) < 0.03
    z = normal(300, 8)
    z[:10] = z[100:110]
    assert memorisation(distances(z), np.arange(10), np.arange(100, 200), np.arange(200, 300), alone) == 1
    z[:100] = z[100:200]
    assert memorisation(distances(z), np.arange(100), np.arange(100, 200), np.arange(200, 300), alone) == 1


def test_copies(tmp_path):
    """Two copied training images, brighter and with a little noise, are the ones above the cut."""
    images = normal(130, 16, 16).astype(np.float32)
    images[100:102] = 1.3 * images[:2] + 0.2 + 0.05 * normal(2, 16, 16)
    cut, nearest = copies(images, np.arange(100, 115), np.arange(50), np.arange(50, 100), tmp_path)
    assert set(np.flatnonzero(nearest > cut)) == {0, 1} and (tmp_path / 'nearest.png').stat().st_size > 1000
    picture = (tmp_path / 'nearest.png').read_bytes()
    in_blocks = copies(images, np.arange(100, 115), np.arange(50), np.arange(50, 100), tmp_path, 4)
    assert in_blocks[0] == cut and np.allclose(in_blocks[1], nearest, atol=1e-6) and (tmp_path / 'nearest.png').read_bytes() == picture


@pytest.mark.parametrize('n, few', [(8, True), (9, True), (100, False)])
def test_a_large_set_is_measured_on_a_draw(phantom, cache, tmp_path, monkeypatch, capsys, n, few):
    """Of 28 fakes at most 3 n are compared, the same in each run, and copies are looked for among all; a set that is no larger is whole and in its order."""
    data, fake = load_slices([phantom], 16, cache=cache), tmp_path / 'set'
    rows = np.resize([i for i, p in enumerate(data.part) if p == 'train'], 28)
    for k, i in enumerate(rows):
        write_patient(fake / f'syn_{k:02d}', {'bravo': data.images[i, 0]}, data.masks[i, 0], (1.0, 1.0))
    write_csv(fake / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_{k:02d}', ''] for k in range(28)])
    (fake / 'sample.json').write_text(json.dumps(dict(bravo='x', weights='ema', pixels=16, box=list(data.box))))
    seen = []
    monkeypatch.setattr(evaluate, 'radial_spectrum', lambda images: (seen.append(images), radial_spectrum(images))[1])
    for out in ('a', 'b'):
        evaluate.main(evaluate.get_args(['quality', '--fake', str(fake), '--data', str(phantom), '--vgg-weights', 'none', '--cache', str(cache), '--repeats', '20',
                                         '--n', str(n), '--out', str(tmp_path / out), '--device', 'cpu']))
    told = json.loads((tmp_path / 'a/metrics.json').read_text())
    assert told == json.loads((tmp_path / 'b/metrics.json').read_text()) and np.array_equal(*seen)
    whole = np.concatenate([data.images[data.rows(p, 0.2, 0)] for p in ('train', 'test', 'val', 'judge')] + [data.images[rows]])[:, 0]
    assert ('copies on all' in capsys.readouterr().out) == few and told['sizes']['fake'] == '28 images of 28' and told['copies'] == 28
    assert len(seen[0]) == len(whole) - max(28 - 3 * n, 0) if few else np.array_equal(seen[0], whole)


def test_draw():
    """Without resampling a permutation; with it whole patients, some of them more than once."""
    rows, patients = np.arange(10, 40), np.repeat(np.arange(40) // 4, 1)
    g = torch.Generator().manual_seed(0)
    assert sorted(draw(rows, patients, g, False)) == list(rows)
    some = draw(rows, patients, g, True)
    for p in set(patients[some]):
        times = [int((some == r).sum()) for r in rows[patients[rows] == p]]
        assert len(set(times)) == 1
    assert len(set(patients[some])) < len(set(patients[rows]))


def test_quality(trained, call, phantom, cache, tmp_path, capsys):
    """The command on a tiny run, end to end, twice to the same figures; real patients as a set of fakes reach the floor's size."""
    fake = call('sample', tmp_path / 'set', '--bravo', trained / 'bravo', '--data', phantom, '--n', 12, '--steps', 2)
    run = lambda out: evaluate.main(evaluate.get_args(['quality', '--fake', str(fake), '--data', str(phantom), '--vgg-weights', 'none', '--out', str(out),
                                                       '--cache', str(cache), '--repeats', '20', '--device', 'cpu']))
    run(tmp_path / 'a'), run(tmp_path / 'b')
    found = [json.loads((tmp_path / d / 'metrics.json').read_text()) for d in 'ab']
    assert found[0]['metrics'].keys() >= {'spectrum, dB', 'MS-SSIM within', 'lesion count, W1', 'nearer to training'}
    assert json.dumps(found[0]) == json.dumps(found[1])
    row = found[0]['metrics']['spectrum, dB']
    assert row['fake'] > row['floor'] > 0 and row['above_low'] > 0                            # four steps of training make no brain
    for name in ('metrics.csv', 'spectrum.png', 'nearest.png'):
        assert (tmp_path / 'a' / name).exists()


def test_quality_in_features_of_vgg16(phantom, cache, tmp_path):
    """With weights: KID and Frechet distance of real test slices against themselves are nothing, of blurred ones more than the floor; both are named without "PCA"."""
    state, c, i, g = {}, 3, 0, generator('vgg')
    for width in common.VGG16.LAYERS:
        if width != 'M':
            state |= {f'features.{i}.weight': torch.randn(width, c, 3, 3, generator=g) * (2 / 9 / c) ** 0.5, f'features.{i}.bias': torch.zeros(width)}
            c, i = width, i + 1
        i += 1
    torch.save(state, tmp_path / 'vgg.pth')
    data, found = load_slices([phantom], 16, cache=cache), {}
    rows = [i for i, p in enumerate(data.part) if p == 'test']
    blur = lambda x: F.avg_pool2d(torch.tensor(x)[None], 5, 1, 2)[0].numpy()
    for name, change in (('same', lambda x: x), ('blurred', blur)):
        for k, i in enumerate(rows):
            write_patient(tmp_path / name / f'syn_{k:02d}', {'bravo': change(data.images[i])[0]}, data.masks[i, 0], (1.0, 1.0))
        write_csv(tmp_path / name / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_{k:02d}', ''] for k in range(len(rows))])
        (tmp_path / name / 'sample.json').write_text(json.dumps(dict(bravo='x', weights='ema', pixels=16, box=list(data.box))))
        evaluate.main(evaluate.get_args(['quality', '--fake', str(tmp_path / name), '--data', str(phantom), '--vgg-weights', str(tmp_path / 'vgg.pth'), '--cache', str(cache),
                                         '--repeats', '20', '--out', str(tmp_path / f'{name}.q'), '--device', 'cpu']))
        found[name] = json.loads((tmp_path / f'{name}.q/metrics.json').read_text())['metrics']
    assert {'KID x 1000', 'Frechet distance', 'precision', 'coverage'} <= found['same'].keys() and not any('PCA' in k for k in found['same'])
    for k in ('KID x 1000', 'Frechet distance'):
        assert found['same'][k]['fake'] < found['same'][k]['floor'] < found['blurred'][k]['fake'], (k, found)
    assert abs(found['same']['Frechet distance']['fake']) < 1e-3 and found['same']['precision']['fake'] == found['same']['coverage']['fake'] == 1


def disc(r, cx, cy, side=64):
    y, x = np.mgrid[:side, :side] + 0.5
    return np.hypot(x - cx, y - cy) <= r


def test_dice():
    """Equal 1, apart 0, both empty nan, two shifted discs 2/pi (acos u - u sqrt(1 - u^2)) with u = shift / 2r."""
    a = disc(10, 30, 32)
    assert dice(a[None], a[None]) == 1 and dice(a[None], disc(5, 55, 55)[None]) == 0 and np.isnan(dice(0 * a[None], 0 * a[None]))
    for r, shift, known in ((10, 2, 0.873), (10, 1, 0.936), (5, 2, 0.747), (3, 1, 0.789)):
        u = shift / 2 / r
        assert abs(2 / math.pi * (math.acos(u) - u * math.sqrt(1 - u * u)) - known) < 1e-3
        assert abs(dice(disc(r, 30, 32)[None], disc(r, 30 + shift, 32)[None])[0] - known) < 0.03


def test_segmenter():
    """Bright discs on grey are found: on other images than it was trained on."""
    g = np.random.default_rng(0)
    masks = np.stack([disc(g.integers(3, 7), *g.integers(8, 24, 2), side=32) for _ in range(96)])[:, None].astype(np.uint8)
    images = (masks - 0.5 + 0.2 * g.standard_normal(masks.shape)).astype(np.float32)
    segment = train_segmenter(images[:64], masks[:64], 200, width=8, augmented=False, optimizer='adamw')
    assert dice(segment(images[64:]), masks[64:]).mean() > 0.85


def test_match_and_spearman():
    """The least summed distance, also where nearest-first would miss it; ranks with ties."""
    at = lambda *xs: np.array([[0.1, x, 0.5] for x in xs])
    assert match(at(0.1, 0.9), at(0.88, 0.12)) == [(0, 1), (1, 0)]
    assert sorted(match(at(0.0, 0.4), at(0.3, 0.9))) == [(0, 0), (1, 1)]                       # nearest first: 0.4-0.3, then 0.0-0.9
    assert sorted(match(at(0.2, 0.5, 0.8), at(0.79))) == [(2, 0)] and match(at(), at(0.5)) == []
    a, b = np.random.default_rng(0).random((2, 6, 3))                                          # every order tried
    cost = lambda pairs: sum(math.dist(a[i, 1:], b[j, 1:]) for i, j in pairs)
    assert cost(match(a[:5], b)) == pytest.approx(min(cost(zip(range(5), order)) for order in itertools.permutations(range(6), 5)))
    assert cost(match(a, b[:4])) == pytest.approx(min(cost(zip(order, range(4))) for order in itertools.permutations(range(6), 4)))
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 1, 2, 3]) == pytest.approx(1) and math.isnan(spearman([1], [1]))


@pytest.fixture
def asked(tmp_path):
    """asked(drawn): a set of 30 masks made for requests of 0 to 3 discs; drawn(request) gives the discs that are there."""
    def make(drawn):
        g = np.random.default_rng(1)
        places = [(0.25, 0.25), (0.75, 0.3), (0.5, 0.75)]
        requests = [[[float(g.choice([6, 9, 14])) / 64, *places[i]] for i in range(n)] for n in (0, 1, 2, 3, 1, 2)]
        out = tmp_path / 'asked'
        rows = []
        for i in range(30):
            mask = np.zeros((64, 64), bool)
            for size, x, y in drawn(requests[i % 6], i):
                mask |= disc(size * 32, x * 64, y * 64)
            write_patient(out / f'syn_{i}', {}, mask, (1.0, 1.0))
            rows.append([f'syn_{i}', i, '', f'seg:x request {i % 6}: {len(requests[i % 6])} lesions'])
        write_csv(out / 'manifest.csv', ['folder', 'index', 'source_patient', 'condition'], rows)
        (out / 'sample.json').write_text(json.dumps(dict(asked=requests, pixels=64, seg='x')))
        evaluate.main(evaluate.get_args(['control', '--fake', str(out), '--out', str(tmp_path / 'control'), '--repeats', '20']))
        return json.loads((tmp_path / 'control/metrics.json').read_text())
    return make


def test_control_of_one_that_obeys(asked):
    """All right: exact 1, Spearman 1, hits 1, all above the shuffled requests; the best constant answer is the commonest count."""
    told = asked(lambda request, i: request)
    m = told['metrics']
    assert m['count exact']['fake'] == 1 and m['count exact']['above_low'] > 0 and told['best_constant'] == pytest.approx(1 / 3)
    assert m['log diameter, Spearman']['fake'] > 0.95 and m['log diameter, mean absolute error']['fake'] < 0.05 and m['place hit']['fake'] == 1
    assert 0.1 < m['count exact']['floor'] < 0.6 and m['tumour or none right']['fake'] == 1


def test_control_of_one_that_does_not(asked):
    """Always one lesion in the middle: the constant's share exact, no place hit, like the shuffled requests."""
    m = asked(lambda request, i: [[8 / 64, 0.5, 0.5]])['metrics']
    assert m['count exact']['fake'] == m['count exact']['floor'] == pytest.approx(1 / 3) and m['place hit']['fake'] == 0
    assert m['count error, mean absolute']['fake'] == pytest.approx(np.mean([1, 0, 1, 2, 0, 1])) and m['tumour or none right']['fake'] == pytest.approx(5 / 6)


def test_cycle(trained, call, phantom, cache, tmp_path, monkeypatch, capsys):
    """End to end on a tiny run, beside the ceiling of real test patients; the judge patients are those of the split."""
    names = sorted(f.name for f in phantom.iterdir())
    write_csv(tmp_path / 'split.csv', ['patient', 'part'], [(n, ('train', 'judge', 'test', 'train')[i % 4]) for i, n in enumerate(names)])
    fake = call('sample', tmp_path / 'set', '--bravo', trained / 'bravo', '--data', phantom, '--split', tmp_path / 'split.csv', '--n', 12, '--steps', 2)
    made = {**json.loads((fake / 'sample.json').read_text()), 'seen': []}                         # the run had another split
    (fake / 'sample.json').write_text(json.dumps(made))
    run = lambda *flags: evaluate.main(evaluate.get_args(['cycle', '--fake', str(fake), '--data', str(phantom), '--out', str(tmp_path / 'out'), '--cache', str(cache),
                                                          '--repeats', '20', '--device', 'cpu', *flags]))
    known, load = {}, evaluate.load_slices

    def slices(*a, **kw):
        data = load(*a, **kw)
        known.update({x.tobytes(): m[0] > 0 for x, m in zip(data.images, data.masks)})
        return data
    asked = []
    monkeypatch.setattr(evaluate, 'load_slices', slices)                 # a segmenter that knows every mask; test_segmenter has one that learns
    monkeypatch.setattr(evaluate, 'train_segmenter', lambda images, masks, steps, *a, **kw: (
        asked.append((len(images), steps)), lambda x: np.stack([known[v.tobytes()] for v in np.asarray(x)]))[1])
    run('--split', str(tmp_path / 'split.csv'), '--train-steps', '7', '--bravo', str(trained / 'bravo'))
    assert 'where the mask is empty: 0 of ' in capsys.readouterr().out                                # it knows those too
    apart = [r['found - this'] for r in read_csv(tmp_path / 'out/back.csv') if r['drawn for'] == 'its own']
    m = json.loads((tmp_path / 'out/metrics.json').read_text())['metrics']
    assert m['false pieces an image']['fake'] == m['false pieces an image']['floor'] == 0                # it knows every mask
    assert [m[k]['floor'] for k in m if k.startswith('Dice, masks')].count(1.0) >= 2
    assert len(apart) == 6 and {*map(float, apart[4:]), float(apart[0])} == {0.0} and (tmp_path / 'out/back.png').exists()
    with pytest.raises(SystemExit) as e:
        run('--split', str(tmp_path / 'split.csv'), '--bravo', str(trained / 'seg'))
    assert e.value.code == 2 and f'is not the run that made {fake}' in capsys.readouterr().err
    told = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert asked == [(told['judge_slices'], 7)] and told['judge_slices'] >= 8
    own, shuffled = told['metrics']['Dice, own masks'], told['metrics']['Dice, shuffled masks']
    assert own['fake'] == own['floor'] == 1 and shuffled['floor'] < 0.9 and shuffled['fake'] < 0.9
    data, of = load([phantom], 16, split=tmp_path / 'split.csv', cache=cache), {}                     # 3 test patients: at most 9 slices, so all of the others'
    for i in data.rows('test', 0.0):
        of.setdefault(data.table[i]['patient'], []).append(data.masks[i])
    by_hand = [np.mean([dice(m, v)[0] for q, some in of.items() if q != p for v in some]) for p, mine in of.items() for m in mine]
    assert len(of) == 3 and shuffled['floor'] == pytest.approx(np.mean(by_hand))
    seen = next(iter(of))
    for who, ok in ((['0' * 12], True), (None, True), ([patient_id(seen)], False)):
        (fake / 'sample.json').write_text(json.dumps(dict(made, seen=who)))
        with contextlib.nullcontext() if ok else pytest.raises(SystemExit) as e:
            run('--split', str(tmp_path / 'split.csv'), '--train-steps', '7')
    assert e.value.code == 2 and f'{fake}: patient {seen} was a training patient of the run that made it, here it is in the test part' in capsys.readouterr().err
    (fake / 'sample.json').write_text(json.dumps(made))
    rows = read_csv(fake / 'manifest.csv')
    write_csv(fake / 'manifest.csv', list(rows[0]), [[v if k != 'source_patient' else rows[0][k] for k, v in r.items()] for r in rows])
    with pytest.raises(SystemExit) as e:
        run('--split', str(tmp_path / 'split.csv'), '--train-steps', '7')
    assert e.value.code == 2 and f'images are of patient {rows[0]["source_patient"]}; masks of another' in capsys.readouterr().err
    assert len([m for m in told['metrics'] if m.startswith('lesions found')]) == 3 and (tmp_path / 'out/cycle.png').exists()
    with pytest.raises(SystemExit) as e:
        run()                                                                                 # one judge patient of three slices
    assert e.value.code == 2 and '--split' in capsys.readouterr().err


def test_image_to_mask_to_image(tmp_path, capsys):
    """A network whose only image is the mask itself: drawn on from any t, a real image becomes its mask exactly, so that every error is known."""
    class Mask(torch.nn.Module):
        def forward(self, x, t, context=None, extra=None):
            return (x[:, :1] - x[:, 1:]) / t[:, None, None, None]                              # v of a point mass at the mask
    run = types.SimpleNamespace(net=Mask(), process=common.RFlow(100), args=types.SimpleNamespace(rflow=True, maisi=None, steps=100, p_uncond=0.0, slice_level=False, controllable=False))
    g = torch.Generator().manual_seed(0)
    masks = np.stack([disc(r, 16, 16, 32) for r in (2, 3, 5, 6)])[:, None].astype(np.uint8)
    images = np.where(disc(14, 16, 16, 32), 0.5, -1.0)[None, None].repeat(4, 0).astype(np.float32) + 0.01 * torch.randn(4, 1, 32, 32, generator=g).numpy()
    drawn = evaluate.redraw(run, images, masks, [0.5] * 4, 0.6, 0, 'cpu')
    assert np.abs(drawn - masks).max() < 1e-5
    keep = types.SimpleNamespace(**{**vars(run), 'net': lambda x, t, context=None, extra=None: 0.5 * x[:, :1]})      # keeps some of the noise
    again = [evaluate.redraw(keep, images[k], masks[::-1].copy()[k], [0.5] * 4, 0.6, seed, 'cpu') for k, seed in ((slice(None), 0), (slice(3), 0), (slice(None), 1))]
    np.testing.assert_allclose(again[0][:3], again[1], rtol=0, atol=1e-6)                                                    # by number, whatever the batch and mask
    np.testing.assert_array_equal(again[0], evaluate.redraw(keep, images, masks, [0.5] * 4, 0.6, 0, 'cpu'))
    assert np.abs(again[0] - again[2]).max() > 0.1
    real = types.SimpleNamespace(images=images, masks=masks, table=[dict(tumour=1, level=0.5)] * 4)
    args = types.SimpleNamespace(out=tmp_path, seed=0, at=0.6, repeats=20)
    evaluate.back_again(args, run, real, np.arange(4), masks[:, 0] > 0, np.array(list('abcd')), (5.0, 9.0), 'cpu')
    rows = {(r['metric'], r['drawn for']): r for r in read_csv(tmp_path / 'back.csv')}
    within = [np.abs(1 - x[m > 0]).mean() for x, m in zip(images[:, 0], masks[:, 0])]             # drawn: 1 in the tumour
    for kind in ('the mask found', 'its own'):
        assert float(rows['error in the tumour', kind]['value']) == pytest.approx(np.mean(within), abs=1e-5)
        assert float(rows['error in its lesions below 5.0 pixels', kind]['value']) == pytest.approx(within[0], abs=1e-5)
    assert float(rows['error in the tumour', 'its own']['found - this']) == 0
    without = [np.abs(x[m > 0]).mean() for x, m in zip(images[:, 0], masks[:, 0])]                # 0 where there is no tumour
    assert float(rows['error in the tumour', 'no tumour']['value']) == pytest.approx(np.mean(without), abs=1e-5)
    luminance, structure = ssim_parts(torch.tensor(images), torch.tensor(masks, dtype=torch.float32))
    rest = [common.head_mask(x)[0] & ~evaluate.around(m[0] > 0, evaluate.RING) for x, m in zip(images, masks)]
    by_hand = np.mean([(luminance * structure)[i, 0].numpy()[w[5:-5, 5:-5]].mean() for i, w in enumerate(rest)])
    assert float(rows['SSIM of the rest of the head', 'its own']['value']) == pytest.approx(by_hand, abs=1e-4)
    with pytest.raises(SystemExit) as e:
        evaluate.redraw(run, images, masks, [0.5] * 4, 0.01, 0, 'cpu')
    assert e.value.code == 2 and '--at 0.01' in capsys.readouterr().err


def test_real_masks_are_read_as_the_run_read_them(tmp_path):
    """sample.json's labels and speck say what a tumour is; without them (older sets) all labels, pieces from 4 mm2."""
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 4:12], mask[4:12, 16:24], mask[24, 24:26] = 1, 2, 1                                     # 64, 64 and 2 mm2
    for k in range(2):
        write_patient(tmp_path / f'data/p{k}', {'bravo': np.where(disc(14, 16, 16, 32), 100, 0).astype(np.float32)}, mask, (1.0, 1.0))
    args = types.SimpleNamespace(data=[tmp_path / 'data'], split=None, fake='set', cache=tmp_path / 'cache')
    for about, tumour in (({}, 32), (dict(labels=None, speck=0.0), 33), (dict(labels=[2], speck=4.0), 16), (dict(labels=[1], speck=0.0), 17)):
        assert [t['tumour'] for t in evaluate.real_like(args, dict(pixels=16, box=[0.0, 0.0, 1.0, 1.0], **about)).table] == [tumour] * 2


REFUSED = [('quality --fake {data} --data {data}', 'sample.json'), ('quality --fake {fake} --data none', '--data none'), ('quality --fake {fake}', '--data'),
           ('quality --fake {fake} --data {data} --vgg-weights none.pth', 'none.pth'), ('quality --fake {fake} --data {data} --part train', '--part'),
           ('quality --fake {fake} --data {data} --repeats 1', '--repeats'), ('quality --fake {fake} --data {data} --vgg-weights none', 'masks only'),
           *((f'{c} --fake {{fake}} --data {{data}} {{fake}}', 'masks: is a synthetic set; give it with --fake')
             for c in ('quality', 'cycle', 'coherence', 'dual', 'readers plan', 'downstream')),
           ('cycle --fake {fake} --data {data}', 'masks only'), ('control --fake {fake}', '--count'), ('none', 'quality'), ('', 'COMMAND')]


@pytest.mark.parametrize('flags, words', REFUSED, ids=[f for f, _ in REFUSED])
def test_refused(flags, words, trained, call, phantom, cache, tmp_path, capsys):
    fake = call('sample', tmp_path / 'masks', '--seg', trained / 'seg', '--n', 2, '--seg-steps', 1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        evaluate.main(evaluate.get_args([*flags.format(fake=fake, data=phantom).split(), *(['--cache', str(cache)] if 'masks only' in words else [])]))
    line = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(line) == 1 and words in line[0], line
