"""Corruptions, calibration, and a detector that learns: closed forms, brute force, resume to the same bits."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

import classifier
import common
from classifier import (auc, auc_interval, checkerboard, corrupt_image, ece, ece_floor, example, fit_temperature, nll, shift_prior,
                        threshold_for)
from common import CLASSES, Detector, agree, detector_logits, load_detector, load_slices, read_csv

TINY = ('--size', 16, '--batch-size', 8, '--iters', 4, '--val-every', 2, '--warmup', 1, '--test-slices', 8, '--repeats', 20)


def run(*flags):
    classifier.main(classifier.get_args([str(f) for f in flags]))


@pytest.fixture(scope='module')
def brain():
    return example(48)


@pytest.fixture(scope='module')
def detector(phantom, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp('detector') / 'run'
    run('train', '--data', phantom, '--cache', cache, '--out', out, '--device', 'cpu', *TINY, '--leave-out', 'artefact')
    return out


# -- corruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', CLASSES)
def test_severity_grades_a_fault(brain, family):
    """0: the same bits; above: changed, float32, in range, further away the higher; seeded; the mask as it was. Every kind."""
    image, mask = brain
    before, kinds = mask.clone(), {}
    for seed in range(30):
        same, none = corrupt_image(image, mask, family, 0, seed)
        made = [corrupt_image(image, mask, family, s, seed) for s in (1, 2, 3)]
        assert torch.equal(same, image) and none == '' and same.data_ptr() != image.data_ptr()
        assert len({kind for _, kind in made}) == 1
        d = [float((m - image).abs().mean()) for m, _ in made]
        assert 0 < d[0] < d[1] < d[2], (made[0][1], d)
        for m, _ in made:
            assert m.dtype == torch.float32 and m.shape == image.shape and m.min() >= -1 and m.max() <= 1
        assert torch.equal(corrupt_image(image, mask, family, 2, seed)[0], made[1][0])
        kinds.setdefault(made[0][1], []).append(seed)
    assert torch.equal(mask, before) and len(kinds) == {'textural': 4, 'boundary': 4, 'conditioning': 4}.get(family, 5)


@pytest.mark.parametrize('family', CLASSES)
def test_corruption_of_an_image_without_tumour_or_head(family):
    """An empty mask and an empty image are no errors; the result is finite and in range."""
    for image in (torch.full((24, 24), -1.0), example(24)[0]):
        for seed in range(12):
            made, kind = corrupt_image(image, torch.zeros(24, 24), family, 3, seed)
            assert torch.isfinite(made).all() and made.abs().max() <= 1
            assert family != 'conditioning' or kind == 'another'


def test_a_conditioning_fault_takes_the_tumour_from_its_mask():
    """'gone' and 'elsewhere' bring the inside of the mask to what is around it; 'elsewhere' and 'another' light up another place."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing='ij')
    image = torch.where((y - 32).square() + (x - 32).square() < 28 ** 2, 0.0, -1.0)
    mask = ((y - 32).square() + (x - 24).square() < 16).float()
    image = torch.where(mask > 0, 0.9, image)
    for seed in range(40):
        made, kind = corrupt_image(image, mask, 'conditioning', 3, seed)
        if kind in ('gone', 'elsewhere'):
            assert made[mask > 0].mean() < 0.15
        if kind in ('elsewhere', 'another'):
            assert (made - image)[mask == 0].max() > 0.25


def test_checkerboard_has_its_energy_at_the_highest_frequency():
    power = torch.fft.fft2(checkerboard(32, 2)).abs()
    assert power.argmax() == 16 * 32 + 16 and torch.allclose(power.sum(), power[16, 16])
    power = torch.fft.fft2(checkerboard(32, 4)).abs()
    assert power[16, 16] < 1e-3 and power.argmax() in [y * 32 + x for y in (8, 24) for x in (8, 24)]


def test_displacement(brain):
    """displaced by 0 is the image; by whole pixels, the image shifted."""
    image, zero = brain[0], torch.zeros(())
    assert torch.allclose(classifier.displaced(image, zero, zero), image, atol=1e-5)
    assert torch.allclose(classifier.displaced(image, zero, zero + 3)[:, :-3], image[:, 3:], atol=1e-5)


def test_corrupt_writes_a_set(phantom, cache, tmp_path):
    """In the data layout, as synthetic of its source patients, read back to the bits of the slices; twice the same."""
    for name in ('a', 'b'):
        run('corrupt', '--data', phantom, '--cache', cache, '--out', tmp_path / name, '--size', 16, '--n', 3, '--severities', '1,3')
    rows = read_csv(tmp_path / 'a/manifest.csv')
    assert (tmp_path / 'a/families.png').exists() and len(rows) == 3 * 13
    assert [{k: r[k] for k in r} for r in rows] == [dict(r) for r in read_csv(tmp_path / 'b/manifest.csv')]
    assert {(r['family'], r['severity']) for r in rows} == {('', '0')} | {(f, s) for f in CLASSES for s in '13'}
    made = load_slices([tmp_path / 'a'], 16, cache=cache)                                   # training=True: of training patients
    real = load_slices([phantom], 16, cache=cache)
    assert set(made.part) == {'train'} and len(made.table) == 39
    at = {t['folder']: i for i, t in enumerate(made.table)}
    for r in rows:
        i, j = at[r['folder']], next(j for j, t in enumerate(real.table) if (t['folder'], t['z']) == (r['source_folder'], int(r['z'])))
        assert np.array_equal(made.images[i], real.images[j]) == (r['family'] == '') and np.array_equal(made.masks[i], real.masks[j])
    answers = classifier.judged_images([tmp_path / 'a'], 16, None, cache, real.box)
    assert len(answers.bad) == 39 and answers.bad.sum() == 36 and (np.bincount(answers.kind[answers.bad > 0]) == 6).all()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_auc_equals_all_pairs_with_ties():
    g = np.random.default_rng(0)
    for _ in range(20):
        bad, good = g.integers(0, 6, 17).astype(float), g.integers(0, 5, 23).astype(float)
        assert auc(bad, good) == pytest.approx(np.mean([(b > a) + 0.5 * (b == a) for b in bad for a in good]), abs=1e-12)
    assert auc(np.ones(3), np.zeros(2)) == 1 and auc(np.zeros(4), np.zeros(4)) == 0.5 and np.isnan(auc(np.ones(0), np.ones(1)))


def test_auc_interval_resamples_patients():
    """One patient: no spread, however many images. Many: it holds the value, and is wider than over images when they agree."""
    g = np.random.default_rng(1)
    bad, good = g.normal(1, 1, 200), g.normal(0, 1, 200)
    value, low, high = auc_interval(bad, good, np.full(200, 'a'), np.full(200, 'a'), 50)
    assert value == low == high == auc(bad, good)
    alone, groups = np.arange(200), np.arange(200) // 20
    shift = g.normal(0, 1, 10)[groups]
    a = auc_interval(bad + shift, good + shift, groups, groups, 200)
    b = auc_interval(bad + shift, good + shift, alone, alone, 200)
    assert a[1] < a[0] < a[2] and b[2] - b[1] < a[2] - a[1]


def test_temperature_undoes_a_scale():
    g = np.random.default_rng(2)
    z = g.normal(0, 2, 20_000)
    y = (g.random(20_000) < 1 / (1 + np.exp(-z))).astype(float)
    T = fit_temperature(3 * z, y)
    assert abs(T - 3) < 0.1 and abs(auc(3 * z[y > 0] / T, 3 * z[y == 0] / T) - auc(z[y > 0], z[y == 0])) < 1e-12
    assert all(nll(3 * z / T, y) <= nll(3 * z / (T * k), y) for k in (0.9, 0.99, 1.01, 1.1))
    assert fit_temperature(np.array([-1.0, 1.0]), np.array([0.0, 1.0])) == pytest.approx(0.05, rel=1e-6)      # separable: the bound


@pytest.mark.parametrize('n, floor', [(100, 0.12), (500, 0.054), (2000, 0.027)])
def test_ece_of_the_perfectly_calibrated(n, floor):
    assert ece_floor(np.random.default_rng(3).random(n)) == pytest.approx(floor, rel=0.08)


def test_ece_by_hand():
    p, y = np.array([0.01, 0.02, 0.99, 1.0]), np.array([0, 0, 1, 0.0])
    error, mean_p, share = ece(p, y)
    assert error == pytest.approx((2 * 0.015 + 2 * 0.495) / 4) and np.allclose(mean_p, [0.015, 0.995]) and np.allclose(share, [0, 0.5])


def test_threshold_catches_the_stated_share():
    p = np.random.default_rng(4).random(97)
    for tpr in (0.01, 0.5, 0.9, 1.0):
        t = threshold_for(p, tpr)
        assert (p >= t).mean() >= tpr > (p > t).mean()


def test_prior_shift_is_bayes():
    """Two normals: the posterior under another prior is the one computed from its own formula. There and back is the identity."""
    x = np.linspace(-3, 3, 50)
    post = lambda prior: prior * np.exp(-(x - 1) ** 2 / 2) / (prior * np.exp(-(x - 1) ** 2 / 2) + (1 - prior) * np.exp(-x ** 2 / 2))
    assert np.allclose(shift_prior(post(0.5), 0.5, 0.06), post(0.06), atol=1e-12)
    assert np.allclose(shift_prior(shift_prior(post(0.5), 0.5, 0.06), 0.06, 0.5), post(0.5), atol=1e-12)


def test_kappa():
    a, b = ['x'] * 25 + ['y'] * 25, ['x'] * 20 + ['y'] * 5 + ['x'] * 10 + ['y'] * 15
    assert (agree(a, b)['kappa'], agree(a, b)['po']) == pytest.approx((0.4, 0.7)) and agree(a, a)['kappa'] == 1


# -- the detector -----------------------------------------------------------------------------------------------------


def test_detector_takes_any_size_and_passes_gradients(detector):
    d = load_detector(detector)
    assert (d.part, d.args.size, d.args.leave_out) == ('train', 16, ['artefact']) and 0 <= d.threshold <= 1 and len(d.hash) == 12
    x, m = torch.rand(3, 1, 16, 16) * 2 - 1, torch.zeros(3, 1, 16, 16)
    assert torch.allclose(detector_logits(d, x, m) * d.temperature, d.net(torch.cat([x, m], 1)), atol=1e-6)
    for size in (8, 17, 40):
        big = torch.rand(2, 1, size, size).requires_grad_()
        detector_logits(d, big, torch.ones(2, 1, size, size))[:, 0].sum().backward()
        assert big.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in d.net.parameters())
    assert Detector()(torch.zeros(2, 2, 9, 13)).shape == (2, 7)


def test_detector_sees_a_checkerboard_of_two_pixels():
    """Its first layer takes 2 x 2 blocks apart: a shift of the pattern by one pixel, of the same mean, changes the answer."""
    torch.manual_seed(0)
    net, board = Detector(), checkerboard(32, 2)[None, None]
    a, b, c = (net(torch.cat([v, torch.zeros_like(v)], 1)) for v in (board, -board, torch.zeros_like(board)))
    assert (a - b).abs().max() > 1e-3 and (a - c).abs().max() > 1e-3


def test_training_writes_what_it_says(detector):
    got = json.loads((detector / 'metrics.json').read_text())
    rows = {r['metric']: r for r in read_csv(detector / 'metrics.csv')}
    assert got['left_out'] == ['artefact'] and 'AUC, artefact (left out), severity 2' in rows and 'AUC, boundary' in rows and got['prior'] == 0.5
    assert all(0 <= float(r['low']) <= float(r['high']) <= 1 for n, r in rows.items() if n.startswith('AUC'))
    confusion = read_csv(detector / 'confusion.csv')
    n = got['slices']
    assert [sum(int(r[c]) for c in ('good', *CLASSES)) for r in confusion] == [n] + [3 * n] * 6
    assert all((detector / f).exists() for f in ('worst.png', 'reliability.png', 'log.csv', 'args.json', 'ckpt.pt'))


def test_resume_is_exact(phantom, cache, tmp_path, monkeypatch):
    """Stopped after 3 of 4 steps by a signal, then the same command: the same bits in every tensor and figure."""
    first = ('train', '--data', phantom, '--cache', cache, '--device', 'cpu', *TINY)
    run(*first, '--out', tmp_path / 'whole')

    class Stops(common.Stop):
        asks = 0

        def asked(self, device):
            self.asks += 1
            return 15 if self.asks == 3 else 0
    monkeypatch.setattr(classifier, 'Stop', Stops)
    with pytest.raises(SystemExit) as e:
        run(*first, '--out', tmp_path / 'parts')
    assert e.value.code == 143 and common.load_checkpoint(tmp_path / 'parts')['step'] == 3
    monkeypatch.setattr(classifier, 'Stop', common.Stop)
    run(*first, '--out', tmp_path / 'parts')
    a, b = (common.load_checkpoint(tmp_path / f) for f in ('whole', 'parts'))
    assert a['step'] == b['step'] == 4 and (a['temperature'], a['threshold']) == (b['temperature'], b['threshold'])
    for part in ('net', 'ema', 'best'):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())
    assert (tmp_path / 'whole/metrics.csv').read_text() == (tmp_path / 'parts/metrics.csv').read_text()
    before, _ = (tmp_path / 'parts/metrics.csv').read_text(), (tmp_path / 'parts/metrics.json').unlink()          # killed before the figures
    run(*first, '--out', tmp_path / 'parts')
    assert (tmp_path / 'parts/metrics.csv').read_text() == before and common.load_checkpoint(tmp_path / 'parts')['step'] == 4


def test_temperature_is_of_the_network_that_is_kept(phantom, cache, tmp_path, monkeypatch):
    """The last fit sees, bit for bit, the logits of the validation that was best (in eval mode), and its T is what is stored."""
    seen = []
    monkeypatch.setattr(classifier, 'fit_temperature', lambda z, y: seen.append((z, y)) or fit_temperature(z, y))
    run('train', '--data', phantom, '--cache', cache, '--out', tmp_path, '--device', 'cpu', *TINY, '--iters', 6)
    scores = [nll(z / fit_temperature(z, y), y) for z, y in seen]
    assert len(seen) == 4 and np.array_equal(seen[-1][0], seen[int(np.argmin(scores[:-1]))][0])
    d, (z, y) = load_detector(tmp_path), seen[-1]
    assert d.temperature == fit_temperature(z, y) and (1 / (1 + np.exp(-z[y > 0] / d.temperature)) >= d.threshold).mean() >= 0.9


def test_batch_norm_belongs_to_the_averaged_weights(phantom, cache, tmp_path, monkeypatch):
    """The kept network's statistics are those of its own activations, not of the network that the average runs behind."""
    batches = []
    monkeypatch.setattr(classifier, 'update_bn', lambda loader, net: (batches.append(loader), update_bn(loader, net)))
    run('train', '--data', phantom, '--cache', cache, '--out', tmp_path, '--device', 'cpu', *TINY, '--lr', 0.02)
    state = common.load_checkpoint(tmp_path)
    for name, far in (('best', False), ('net', True)):
        net, seen = Detector().eval(), []
        net.stages[0].norm1.register_forward_hook(lambda m, x, y: seen.append(x[0].mean((0, 2, 3))))
        net.load_state_dict(state[name])
        with torch.no_grad():
            [net(x) for x in batches[0]]
        gap = (state['best']['stages.0.norm1.running_mean'] - torch.stack(seen).mean(0)).abs().max()
        assert (gap > 1e-4) == far, (name, gap)


def test_the_parts_see_different_patients(phantom, cache, tmp_path, monkeypatch):
    """--part judge learns from judge patients alone, --part train from training patients; both stop by val and report on test."""
    seen = []
    monkeypatch.setattr(classifier, 'corrupt_image', lambda *a: seen.append(a[0].clone()) or (a[0], ''))
    data = load_slices([phantom], 16, cache=cache)
    for part in ('train', 'judge'):
        seen.clear()
        run('train', '--data', phantom, '--cache', cache, '--out', tmp_path / part, '--device', 'cpu', *TINY, '--part', part)
        first, found = len(data.rows('val', 0.2, 0)), set()
        for x in seen[:first] + seen[first + (8 + 4) * 4:]:                # validation and test slices as they are; batches are augmented
            found |= {p for p, y in zip(data.part, data.images) if np.array_equal(x.numpy(), y[0])}
        assert found == {'val', 'test'} and load_detector(tmp_path / part).part == part


@pytest.fixture
def judged(phantom, cache, tmp_path):
    """A set whose bad images have a checkerboard, and the answers to it."""
    data, rows, manifest = load_slices([phantom], 16, cache=cache), [], []
    for i, t in enumerate(data.table):
        for bad in (0, 1):
            image = torch.tensor(data.images[i, 0]) + bad * 0.5 * checkerboard(16, 2)
            common.write_patient(tmp_path / f'set/f_{bad}_{i:03d}', {'bravo': image.clamp(-1, 1).numpy()}, data.masks[i, 0], (1, 1))
            manifest.append([f'f_{bad}_{i:03d}', t['patient']])
            rows.append(['r', f'{bad}-{i}', str(tmp_path / 'set'), f'f_{bad}_{i:03d}', ('good', 'bad')[bad], ('', 'artefact')[bad], ('', 3)[bad], 1, 0, ''])
    common.write_csv(tmp_path / 'set/manifest.csv', ['folder', 'source_patient'], manifest)
    common.write_csv(tmp_path / 'set/labels.csv', common.LABELS, rows)
    return tmp_path / 'set'


def test_training_on_answers_finds_an_easy_fault(phantom, cache, tmp_path, judged):
    """AUC on the judged images of patients it never saw, above 0.9 after 60 steps."""
    run('train', '--data', phantom, '--cache', cache, '--out', tmp_path / 'run', '--device', 'cpu', *TINY, '--iters', 60, '--val-every', 20,
        '--batch-size', 16, '--answers', tmp_path / 'set')
    got = json.loads((tmp_path / 'run/metrics.json').read_text())['detector']['AUC, judged images of other patients']
    assert got['value'] > 0.9 and got['n'] == 3 * 6, got                  # 1 judge and 5 test patients
    run('score', '--data', tmp_path / 'set', '--detector', tmp_path / 'run', '--cache', cache, '--out', tmp_path / 'score', '--device', 'cpu')
    scores = {r['folder']: r for r in read_csv(tmp_path / 'score/scores.csv')}
    assert auc(*(np.array([float(r['p_bad']) for n, r in scores.items() if n.startswith(f'f_{bad}')]) for bad in (1, 0))) > 0.9


def test_logistic_regression():
    """Its slope is 0, penalty included; strength 0 on a table is the table's log odds."""
    g = np.random.default_rng(0)
    x, y = g.normal(size=(40, 60)), (g.random(40) < 0.4).astype(float)
    w, b = classifier.logistic(x, y, 0.3)
    error = 1 / (1 + np.exp(-(x @ w + b))) - y
    assert np.abs(x.T @ error + 0.3 * w).max() < 1e-6 and abs(error.sum()) < 1e-6 and np.abs(w).max() > 0.1
    table = np.repeat([[0.0], [1.0]], 10, 0), np.r_[np.arange(10) < 2, np.arange(10) < 7].astype(float)
    w, b = classifier.logistic(*table, 0)
    assert b == pytest.approx(math.log(2 / 8), abs=1e-6) and b + w[0] == pytest.approx(math.log(7 / 3), abs=1e-6)


def test_probe(phantom, cache, tmp_path, judged, capsys, monkeypatch):
    """A linear layer on frozen features: finds the checkerboard in patients it did not learn from, is blind to left and right and to the mask,
    has a slope in the image, and is loaded without the file that its features came from."""
    torch.manual_seed(0)
    torch.save({k: v.half() for k, v in common.VGG16(False).state_dict().items()}, tmp_path / 'vgg.pth')
    run('train', '--data', phantom, '--cache', cache, '--out', tmp_path / 'run', '--device', 'cpu', '--size', 16, '--test-slices', 8, '--repeats', 20,
        '--answers', judged, '--probe', tmp_path / 'vgg.pth')
    found = json.loads((tmp_path / 'run/metrics.json').read_text())['detector']
    assert found['AUC, judged images, patients left out in turn']['value'] > 0.9 and found['AUC, judged images of other patients']['value'] > 0.9
    assert 0.9 <= found['bad caught at threshold']['value'] and found['bad caught at threshold']['n'] == found['good flagged at threshold']['n'] == 3 * 7    # of judged images
    again = ('train', '--data', phantom, '--cache', cache, '--out', tmp_path / 'other', '--device', 'cpu', '--size', 16, '--test-slices', 8, '--repeats', 20, '--answers', judged,
             '--probe', tmp_path / 'vgg.pth')
    with monkeypatch.context() as m:                                         # killed before its figures: the same command makes them
        m.setattr(classifier, 'figures', lambda *a: exec('raise KeyboardInterrupt'))
        with pytest.raises(KeyboardInterrupt):
            run(*again)
    run(*again), run(*again)
    assert 'complete' in capsys.readouterr().out.splitlines()[-1]
    made = json.loads((tmp_path / 'other/metrics.json').read_text())['detector']['AUC, judged images, patients left out in turn']
    assert made['value'] == pytest.approx(found['AUC, judged images, patients left out in turn']['value'], abs=0.02)
    (tmp_path / 'vgg.pth').unlink()
    d, data = load_detector(tmp_path / 'run'), load_slices([judged], 16, cache=cache, training=False)
    x, m = torch.tensor(data.images[:6]).requires_grad_(), torch.tensor(data.masks[:6]).float()
    z = detector_logits(d, x, m)
    assert z.shape == (6, 7) and torch.allclose(z, detector_logits(d, x.flip(-1), 1 - m), atol=1e-5) and (z[:, 1:] == z[0, 1:]).all()
    z[:, 0].sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().amax(1) > 0).all()
    p = 1 / (1 + np.exp(-detector_logits(d, torch.tensor(data.images), torch.tensor(data.masks).float())[:, 0].double().numpy()))
    bad = np.array([t['folder'].startswith('f_1') for t in data.table])
    assert (p[bad] >= d.threshold).mean() >= 0.9 > 0.1 >= (p[~bad] >= d.threshold).mean()
    with pytest.raises(SystemExit):                                          # it is never written over
        run('train', '--data', phantom, '--cache', cache, '--out', tmp_path / 'run', '--device', 'cpu', '--size', 16, '--answers', judged, '--probe', tmp_path / 'run/ckpt.pt')
    assert 'choose another --out' in capsys.readouterr().err


def test_majority_of_raters(phantom, cache, tmp_path):
    """A later line wins over an earlier one of the same rater; a repeat is no vote; ties and unsure are left out."""
    data = load_slices([phantom], 16, cache=cache)
    root = str(phantom)
    line = lambda rater, item, verdict, kind='', repeat=0: [rater, item, root, data.table[int(item)]['folder'], verdict, kind, 2 if kind else '', 1, repeat, '']
    rows = [line('a', '0', 'good'), line('a', '0', 'bad', 'boundary'), line('b', '0', 'bad', 'boundary'), line('c', '0', 'good'),
            line('a', '3', 'good'), line('b', '3', 'bad', 'textural'), line('a', '6', 'good'), line('a', '6', 'bad', 'textural', 1),
            line('a', '9', 'unsure')]
    common.write_csv(tmp_path / 'labels.csv', common.LABELS, rows)
    common.write_csv(tmp_path / 'items.csv', ['item', 'set', 'folder', 'z'], [[i, root, data.table[int(i)]['folder'], data.table[int(i)]['z']] for i in '0369'])
    got = classifier.judged_images([tmp_path], 16, None, cache, data.box)
    assert got.bad.tolist() == [1, 0] and got.kind.tolist() == [CLASSES.index('boundary'), -1]
    assert np.array_equal(got.images[0], data.images[0]) and np.array_equal(got.images[1], data.images[6])


def test_score_reads_masks_as_the_detector_did(detector, phantom, cache, tmp_path, monkeypatch):
    """Its --labels for real patients; a synthetic set's masks have no label but 1, so all of them."""
    d, seen, load = load_detector(detector), [], classifier.load_slices
    d.args.labels = [2]                                                         # the phantom's masks hold 1 alone
    monkeypatch.setattr(classifier, 'load_detector', lambda *a: d)
    shutil.copytree(phantom, tmp_path / 'set')
    (tmp_path / 'set/manifest.csv').write_text('folder,source_patient\n' + ''.join(f'{f.name},\n' for f in phantom.iterdir()))
    monkeypatch.setattr(classifier, 'load_slices', lambda *a, **kw: (seen.append(load(*a, **kw)), seen[-1])[1])
    for data in (phantom, tmp_path / 'set'):
        classifier.main(classifier.get_args(['score', '--detector', str(detector), '--data', str(data), '--cache', str(cache), '--out', str(tmp_path / 'out'), '--device', 'cpu']))
    assert [s.masks.any() for s in seen] == [False, True]


def test_score_follows_threshold_and_prior(detector, phantom, cache, tmp_path):
    call = lambda name, *more: run('score', '--data', phantom, '--detector', detector, '--cache', cache, '--out', tmp_path / name, '--device', 'cpu', *more)
    call('a'), call('b', '--prior', 0.06), call('c', '--threshold', 0)
    a, b, c = (read_csv(tmp_path / n / 'scores.csv') for n in 'abc')
    assert len(a) == 42 and [r['verdict'] for r in a] == [r['verdict'] for r in b] and {r['verdict'] for r in c} == {'bad'}
    p, q = (np.array([float(r['p_bad']) for r in rows]) for rows in (a, b))
    assert np.allclose(q, shift_prior(p, 0.5, 0.06), atol=1e-5)
    assert all(abs(sum(float(r[k]) for k in CLASSES) - 1) < 1e-3 for r in a) and (tmp_path / 'a/best_worst.png').exists()
    d, data = load_detector(detector), load_slices([phantom], 16, cache=cache)
    with torch.no_grad():
        z = detector_logits(d, torch.tensor(data.images), torch.tensor(data.masks))
    assert np.allclose(p, torch.sigmoid(z[:, 0]).numpy(), atol=1e-5)
