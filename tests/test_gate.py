"""sample.py --gate, --best-of, --reject-copies, --per-patient: what is kept, what is logged, what it costs, and that it goes on."""
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

import common
import sample
from common import read_csv, read_nifti


@pytest.fixture(scope='module')
def masks(phantom, trained):
    return ['--bravo', trained / 'bravo', '--data', phantom, '--steps', 1]


def images(out):
    return {r['folder']: read_nifti(out / r['folder'] / 'bravo.nii.gz')[0][0] for r in read_csv(out / 'manifest.csv')}


def same(a, b, tolerance=0.0):
    a, b = images(a), images(b)
    return a.keys() == b.keys() and all(np.abs(a[k] - b[k]).max() <= tolerance for k in a)


def chance(q, seen=None):
    """A detector that calls a share q of the images bad, by the digits of their mean: no image looks different from another."""
    def logits(detector, x, mask):
        u = (x.double().mean((1, 2, 3)) * 1000) % 1
        if seen is not None:
            seen.extend(u.tolist())
        bad = torch.where(u < q, 1.0 + u, -1.0 - u)
        return torch.cat([bad[:, None], torch.zeros(len(x), 6)], 1)
    return logits


@pytest.mark.parametrize('q, tpr, fpr, a, residual, mean, sd', [(0.06, 0.80, 0.05, 0.905, 0.0133, 1105, 11), (0.08, 0.80, 0.05, 0.890, 0.0180, 1124, 12),
                                                                (0.08, 0.90, 0.10, 0.836, 0.0096, 1196, 15)])
def test_formulas(q, tpr, fpr, a, residual, mean, sd):
    got = sample.acceptance(q, tpr, fpr)
    assert abs(got[0] - a) < 5e-4 and abs(got[1] - residual) < 5e-5
    draws = sample.draws_for(1000, got[0])
    assert abs(draws[0] - mean) < 0.5 and abs(draws[1] - sd) < 0.5
    assert sample.bad_share(got[0], tpr, fpr) == pytest.approx(q)


def test_a_gate_that_lets_all_pass_is_plain_sampling(call, masks, detector, tmp_path):
    """Threshold 1 and best of 1: the same bits as without a gate, the same manifest up to the columns of the judge, nothing rejected."""
    plain = call('sample', tmp_path / 'plain', *masks, '--n', 5)
    for name, flags in (('gate', ['--threshold', 1]), ('best', ['--best-of', 1])):
        out = call('sample', tmp_path / name, *masks, '--n', 5, '--gate', detector(), *flags)
        assert same(plain, out) and not read_csv(out / 'rejected.csv') and not list(out.glob('*.part*'))
        rows = read_csv(out / 'manifest.csv')
        assert [{k: r[k] for k in sample.HEADER} for r in rows] == read_csv(plain / 'manifest.csv')
        assert all(r['candidate'] == '0' and 0 < float(r['p_bad']) < 1 and abs(sum(float(r[c]) for c in common.CLASSES) - 1) < 1e-5 for r in rows)
        told = json.loads((out / 'gate.json').read_text())
        assert told['draws'] == told['kept'] == 5 and told['rounds_formula'] == [5, 0] and told['lesions_drawn'] == told['lesions_kept']
    assert not (plain / 'rejected.csv').exists() and not (plain / 'gate.json').exists()


def test_bernoulli(call, masks, detector, tmp_path, monkeypatch):
    """A share q of draws is bad whatever they are: exactly N are kept, N/a draws within 4 sd, each of the others stands in rejected.csv."""
    seen, n, q = [], 150, 0.3
    monkeypatch.setattr(sample, 'detector_logits', chance(q, seen))
    out = call('sample', tmp_path / 'set', *masks, '--n', n, '--gate', detector(), '--batch-size', 50, '--rate', 0.3)
    kept, rejected, told = read_csv(out / 'manifest.csv'), read_csv(out / 'rejected.csv'), json.loads((out / 'gate.json').read_text())
    mean, sd = sample.draws_for(n, 1 - q)
    assert len(kept) == n and len({r['index'] for r in kept}) == n and abs(len(seen) - mean) < 4 * sd
    assert len(rejected) == len(seen) - n == sum(u < q for u in seen) and {r['why'] for r in rejected} == {'distorted'}
    assert min(float(r['p_bad']) for r in rejected) > 0.5 > max(float(r['p_bad']) for r in kept)
    tries = {r['index']: [] for r in rejected}
    for r in rejected:
        tries[r['index']].append(int(r['candidate']))
    for r in kept:                                                    # a patient's candidates 0, 1, .. were refused, the next one kept
        assert tries.get(r['index'], []) == list(range(int(r['candidate'])))
    assert told['draws'] == told['rounds'] == len(seen) and told['first_rounds'] == pytest.approx(np.mean([r['index'] not in tries for r in kept]))
    assert told['rounds_formula'] == pytest.approx(sample.draws_for(n, told['first_rounds'])) and told['acceptance'] == pytest.approx(n / len(seen))
    for k, r in enumerate(rejected[:3]):                              # a logged candidate can be drawn again: its key is (patient, candidate)
        run = common.load_run(masks[1])
        key = (int(r['index']), int(r['candidate'])) if int(r['candidate']) else (int(r['index']),)
        args = sample.get_args([*map(str, masks), '--gate', str(detector())])
        level, mask = torch.zeros(1), torch.from_numpy(read_nifti(out / f'syn_0_{key[0]:06d}/seg.nii.gz')[0].copy())[None].float()
        run.model, args.dtype = run.net, 'fp32'
        with torch.no_grad():
            x = sample.draw(run, args, [key], 'image', 1, mask, level).clamp(-1, 1)
        assert float(chance(q)(None, x, mask)[0, 0].sigmoid()) == pytest.approx(float(r['p_bad']), abs=0.02)


def test_batch_order_and_a_stop_change_nothing(call, masks, detector, tmp_path, monkeypatch):
    """Batches of 1 and 8, and a set stopped by SIGTERM half way: the same candidates are kept, the same are rejected."""
    monkeypatch.setattr(sample, 'detector_logits', chance(0.5))
    flags = [*masks, '--n', 12, '--gate', detector()]
    one, eight = (call('sample', tmp_path / str(b), *flags, '--batch-size', b) for b in (1, 8))
    real = sample.write_patient
    with monkeypatch.context() as m:
        count = []
        m.setattr(sample, 'write_patient', lambda *a: (real(*a), count.append(1), os.kill(os.getpid(), signal.SIGTERM) if len(count) == 5 else None))
        with pytest.raises(SystemExit) as e:
            call('sample', tmp_path / 'cut', *flags, '--batch-size', 2)
        assert e.value.code == 143
    part = tmp_path / 'cut/rejected.part0.csv'
    part.write_text(part.read_text()[:-9])                                     # and the last line was cut off
    cut = call('sample', tmp_path / 'cut', *flags, '--batch-size', 2)
    choice = lambda out, name: [(r['index'], r['candidate'], r['condition']) for r in read_csv(out / f'{name}.csv')]
    for name in ('manifest', 'rejected'):
        assert choice(one, name) == choice(eight, name) == choice(cut, name) and len(choice(one, name)) > 4
    assert same(one, eight, 1e-4) and same(one, cut, 1e-4)
    more = call('sample', tmp_path / '1', *flags, '--n', 14)                   # more patients: the first stay
    assert choice(more, 'manifest')[:12] == choice(eight, 'manifest')


def test_best_of(call, masks, detector, tmp_path):
    """The kept of four is no worse than the one of one, patient by patient, on the same mask; all others are logged with their score."""
    flags = [*masks, '--n', 6, '--gate', detector(), '--save-at', '1,0', '--steps', 2]
    first, best = (call('sample', tmp_path / str(n), *flags, '--best-of', n) for n in (1, 4))
    a, b, rejected = read_csv(first / 'manifest.csv'), read_csv(best / 'manifest.csv'), read_csv(best / 'rejected.csv')
    assert all(float(y['p_bad']) <= float(x['p_bad']) + 1e-6 and x['condition'] == y['condition'] for x, y in zip(a, b)) and a != b
    assert len(rejected) == 18 and {r['why'] for r in rejected} == {'not the best'}
    for r in b:
        others = [q for q in rejected if q['index'] == r['index']]
        assert sorted([r['candidate'], *(q['candidate'] for q in others)]) == list('0123') and float(r['p_bad']) <= min(float(q['p_bad']) for q in others)
        saved = np.load(best / r['folder'] / 'trajectory.npz')                  # the trajectory is that of the one kept
        key = (int(r['index']), int(r['candidate'])) if r['candidate'] != '0' else (int(r['index']),)
        assert np.array_equal(saved['x_t'][0], torch.randn(1, 16, 16, generator=common.generator(0, 'image', *key))[0].numpy())
        assert np.array_equal(saved['x_t'][-1], read_nifti(best / r['folder'] / 'bravo.nii.gz')[0][0])
    assert json.loads((best / 'gate.json').read_text())['p_bad_kept'] < json.loads((best / 'gate.json').read_text())['p_bad_first']


def test_best_of_and_a_gate(call, masks, detector, tmp_path, monkeypatch):
    """Both: a round of three whose best is still bad is drawn again as candidates 3, 4, 5."""
    monkeypatch.setattr(sample, 'detector_logits', chance(0.7))
    out = call('sample', tmp_path / 'set', *masks, '--n', 12, '--gate', detector(), '--best-of', 3, '--threshold', 0.5)
    kept, rejected = read_csv(out / 'manifest.csv'), read_csv(out / 'rejected.csv')
    again = [r for r in kept if int(r['candidate']) >= 3]
    assert again and all(float(r['p_bad']) < 0.5 for r in kept) and {r['why'] for r in rejected} == {'distorted', 'not the best'}
    for r in kept:
        rounds = int(r['candidate']) // 3
        assert sum(q['index'] == r['index'] and q['why'] == 'distorted' for q in rejected) == rounds
        assert sum(q['index'] == r['index'] for q in rejected) == 3 * rounds + 2


def test_a_hopeless_gate(call, masks, detector, tmp_path, monkeypatch, capsys):
    """Code 1 and one line; what passed is a whole set, and the same command with more draws ends as if it had had them at once."""
    monkeypatch.setattr(sample, 'detector_logits', chance(0.8))
    flags = [*masks, '--n', 10, '--gate', detector()]
    straight = call('sample', tmp_path / 'straight', *flags, '--max-draws', 100)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call('sample', tmp_path / 'set', *flags, '--max-draws', 3)
    lines = capsys.readouterr().err.splitlines()
    rows = read_csv(tmp_path / 'set/manifest.csv')
    assert e.value.code == 1 and len(lines) == 1 and f'{len(rows)} of 10 patients' in lines[0] and '--max-draws' in lines[0] and 0 < len(rows) < 10
    assert max(int(r['candidate']) for r in read_csv(tmp_path / 'set/rejected.csv')) == 2
    assert (tmp_path / 'set/gate.json').exists() and (tmp_path / 'set/rejected.png').exists()
    again = call('sample', tmp_path / 'set', *flags, '--max-draws', 100)
    assert read_csv(again / 'manifest.csv') == read_csv(straight / 'manifest.csv') and read_csv(again / 'rejected.csv') == read_csv(straight / 'rejected.csv')
    monkeypatch.setattr(sample, 'detector_logits', chance(2.0))                # nothing ever passes: it gives up long before 20 draws for each
    with pytest.raises(SystemExit) as e:
        call('sample', tmp_path / 'none', *masks, '--n', 200, '--gate', detector(), '--batch-size', 100)
    assert e.value.code == 1 and 600 < len(read_csv(tmp_path / 'none/rejected.csv')) < 1000 and not read_csv(tmp_path / 'none/manifest.csv')


def test_another_round_has_the_same_mask_unless_a_model_drew_it(call, trained, masks, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, 'detector_logits', chance(0.5))
    seen, real = [], sample.Judge.__call__
    monkeypatch.setattr(sample.Judge, '__call__', lambda self, x, m: (seen.append(m.copy()), real(self, x, m))[1])
    for name, source in (('data', masks), ('seg', ['--seg', trained / 'seg', '--bravo', trained / 'bravo', '--steps', 1, '--seg-steps', 2])):
        seen.clear()
        out = call('sample', tmp_path / name, *source, '--n', 8, '--gate', detector(), '--batch-size', 1)
        rejected, kept = read_csv(out / 'rejected.csv'), read_csv(out / 'manifest.csv')
        order = sorted([(int(r['candidate']), int(r['index'])) for r in rejected + kept])
        by_item = {}
        for (_, i), m in zip(order, seen):
            by_item.setdefault(i, []).append(m)
        alike = [np.array_equal(v[0], w) for v in by_item.values() for w in v[1:]]
        assert alike and all(alike) == (name == 'data')
        assert all(np.array_equal(by_item[int(r['index'])][-1][0], read_nifti(out / r['folder'] / 'seg.nii.gz')[0][0]) for r in kept)


def test_the_shift_of_lesions_is_told(call, trained, detector, tmp_path, monkeypatch):
    """A gate that calls images with much tumour bad keeps fewer and smaller lesions, and says so."""
    def logits(d, x, mask):
        return torch.cat([(mask.sum((1, 2, 3)) - 120.0)[:, None], torch.zeros(len(x), 6)], 1)
    monkeypatch.setattr(sample, 'detector_logits', logits)
    out = call('sample', tmp_path / 'set', '--seg', trained / 'seg', '--bravo', trained / 'bravo', '--steps', 1, '--seg-steps', 2, '--n', 20, '--gate', detector(),
               '--max-draws', 200)
    told, kept, rejected = json.loads((out / 'gate.json').read_text()), read_csv(out / 'manifest.csv'), read_csv(out / 'rejected.csv')
    assert max(int(r['tumour_pixels']) for r in kept) < 120 <= min(int(r['tumour_pixels']) for r in rejected)
    for name, rows in (('kept', kept), ('drawn', kept + rejected)):
        pieces = [float(d) for r in rows for d in r['diameters_mm'].split(';') if d]
        assert told[f'lesions_{name}']['count'] == pytest.approx(np.mean([int(r['lesions']) for r in rows])) and len(pieces) == sum(int(r['lesions']) for r in rows)
        assert told[f'lesions_{name}']['diameters_mm'] == pytest.approx(np.percentile(pieces, (25, 50, 75)).tolist())
    mask = read_nifti(out / kept[0]['folder'] / 'seg.nii.gz')[0][0]
    spacing = common.load_run(trained / 'seg').spacing
    area = sum(math.pi * float(d) ** 2 / 4 for d in kept[0]['diameters_mm'].split(';'))
    assert area == pytest.approx(mask.sum() * (sum(spacing) / 2) ** 2, rel=0.01)


def test_copies_are_drawn_again(call, masks, phantom, cache, tmp_path, monkeypatch):
    """Patient 2's first image is a training slice: rejected as a copy, its next candidate kept. Other images are as without the flag."""
    run = common.load_run(masks[1])
    data = common.load_slices([phantom], 16, box=run.box, cache=cache)
    train = data.images[data.rows('train')]
    real, others = sample.draw, data.images[np.setdiff1d(np.arange(len(data.table)), data.rows('train'))][:, 0]

    def draw(run, args, keys, *more, **kw):
        out = real(run, args, keys, *more, **kw)
        for b, key in enumerate(keys):
            if key == (2,):
                out[b] = torch.tensor(train[5])
        return out

    plain = call('sample', tmp_path / 'plain', *masks, '--n', 4)
    monkeypatch.setattr(sample, 'draw', draw)
    out = call('sample', tmp_path / 'set', *masks, '--n', 4, '--reject-copies', phantom)
    kept, rejected = read_csv(out / 'manifest.csv'), read_csv(out / 'rejected.csv')
    assert [(r['index'], r['candidate'], r['why'], r['p_bad']) for r in rejected] == [('2', '0', 'copy', '')] and float(rejected[0]['nearest_train']) > 0.99999
    assert [r['candidate'] for r in kept] == ['0', '0', '1', '0']
    a, b = images(plain), images(out)
    assert all(np.array_equal(a[f'syn_0_{i:06d}'], b[f'syn_0_{i:06d}']) for i in (0, 1, 3))
    pearson = max(np.corrcoef(b['syn_0_000000'].ravel(), t.ravel())[0, 1] for t in train)
    assert float(kept[0]['nearest_train']) == pytest.approx(pearson, abs=1e-5)
    cut = np.percentile([max(np.corrcoef(o.ravel(), t.ravel())[0, 1] for t in train) for o in others], 99)
    assert json.loads((out / 'gate.json').read_text())['correlation_cut'] == pytest.approx(cut, abs=1e-5)


def test_per_patient(call, masks, phantom, tmp_path, capsys):
    """K images for each patient of the part, masks of that patient in turn; a larger K adds to them."""
    flags = [*masks, '--part', 'test', '--empty-slices', 0]
    out = call('sample', tmp_path / 'set', *flags, '--per-patient', 3)
    rows = read_csv(out / 'manifest.csv')
    names = {f.name for f in phantom.iterdir() if common.part_of(f.name) == 'test'}
    count = {n: [r['condition'] for r in rows if r['source_patient'] == n] for n in {r['source_patient'] for r in rows}}
    assert count.keys() == names and all(len(v) == 3 for v in count.values()) and f'3 images for each of {len(names)} patients' in capsys.readouterr().out
    first = images(out)
    more = read_csv(call('sample', tmp_path / 'set', *flags, '--per-patient', 5) / 'manifest.csv')
    assert more[:len(rows)] == rows and all(np.array_equal(first[k], images(out)[k]) for k in first)
    for name in names:
        used = [r['condition'] for r in more if r['source_patient'] == name]
        assert len(used) == 5 and used[len({*used}):] == used[:5 - len({*used})] and all(c.startswith(name) for c in used)      # in turn


def test_the_reporting_detector_is_refused(call, masks, detector, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        call('sample', tmp_path / 'set', *masks, '--gate', detector('judge'))
    assert e.value.code == 2 and 'judge' in capsys.readouterr().err and not (tmp_path / 'set').exists()
