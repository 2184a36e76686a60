"""Hard cases: recall of lesions by kind, weights that follow it, and masks drawn from the mixture."""
import csv
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

import analysis
import common
import evaluate
import sample
from test_errors import refused

HEADER = ['arm', 'seed', 'patient', 'folder', 'slice', 'lesion', 'diameter', 'unit', 'area', 'x', 'y', 'count', 'edge', 'hit']
TRAIN = [n for n in (f'p{i}' for i in range(40)) if common.part_of(n) == 'train'][:8]
TEST = next(n for n in (f'p{i}' for i in range(40)) if common.part_of(n) == 'test')


def write(path, rows, more=()):
    common.write_csv(path, [*HEADER, *more], rows)
    return path


def lesions(n=300, seed=0, arms=('real', 'both'), unit='mm'):
    """Rows of n lesions, one to three a slice: small ones and those on the left are found less often."""
    g, rows, i, z = np.random.default_rng(seed), [], 0, 0
    while i < n:
        count, z = int(g.integers(1, 4)), z + 1
        for k in range(count):
            d, x, y = g.uniform(2, 20), *g.uniform(0.1, 0.9, 2)
            for arm in arms:
                for s in (0, 1):
                    hit = g.random() < 0.2 + 0.03 * d + 0.2 * (x > 0.4)
                    rows.append([arm, s, TRAIN[z % 8], f'{TRAIN[z % 8]}_a', z, k, f'{d:.3f}', unit, 9, f'{x:.4f}', f'{y:.4f}', count, f'{20 * g.random():.2f}', int(hit)])
        i += count
    return rows


def mine(out, file, *flags):
    analysis.main(analysis.get_args(['hard-cases', str(file), '--out', str(out), *map(str, flags)]))
    return json.loads((out / 'hard.json').read_text())


def test_weights():
    """Smoothed recall and weight by the formula; alpha 0 or equal recall: all alike; swapped bins, swapped weights; bounds."""
    hits, n = np.array([2.0, 30, 9, 0]), np.array([10, 40, 10, 0])
    recall, w = analysis.hard_weights(hits, n, 1.0)
    every = 41 / 60
    np.testing.assert_allclose(recall, [(h + 10 * every) / (m + 10) for h, m in zip(hits, n)])
    np.testing.assert_allclose(w, (1 - recall) / ((1 - recall) * n / 60).sum())
    np.testing.assert_allclose((w * n).sum(), 60)                                                       # no bound is met: the mean over lesions is 1
    for i, j in ((0, 1), (1, 2), (0, 3)):
        order = np.arange(4)
        order[[i, j]] = j, i
        np.testing.assert_allclose(analysis.hard_weights(hits[order], n[order], 1.0)[1], w[order])
    assert (analysis.hard_weights(hits, n, 0.0)[1] == 1).all()
    np.testing.assert_allclose(analysis.hard_weights(n * 0.3, n, 0.7)[1], 1)
    low, high = analysis.hard_weights(np.array([0.0, 10000]), np.array([100, 10000]), 1.0)[1]
    assert low == 4 and high == pytest.approx(0.05 / ((1 - 1000 / 1010 * 0 - 10 * 10000 / 10100 / 110) * 100 + 0.05 * 10000) * 10100)
    assert analysis.hard_weights(np.array([0.0, 100]), np.array([1000, 100]), 3.0)[1][1] == 0.25
    np.testing.assert_allclose(analysis.hard_weights(hits, n, 0.5)[1] / w, ((1 - recall) ** -0.5) * (w / (1 - recall))[0] ** -1 * 60 / (((1 - recall) ** 0.5) * n).sum())


def test_effective():
    assert common.effective(np.full(7, 0.3)) == pytest.approx(7) and common.effective([1, 0, 0]) == 1 and common.effective([3, 1]) == pytest.approx(1.6)


def test_hard_cases(tmp_path, capsys):
    """A lesion counts once; bins, mixture and sizes by brute force; misses are drawn more often; pictures and tables."""
    rows = lesions()
    told = mine(tmp_path / 'out', write(tmp_path / 'cv.csv', rows))
    one = {}
    for r in rows:
        one.setdefault((r[3], r[4], r[5]), []).append(r)
    d, x, y = (np.array([float(v[0][k]) for v in one.values()]) for k in (6, 9, 10))
    hit = np.array([np.mean([r[13] for r in v]) for v in one.values()])
    assert told['lesions'] == len(one) == sum(b['lesions'] for b in told['bins']) and told['recall'] == pytest.approx(hit.mean())
    assert told['arms'] == ['both', 'real'] and told['seeds'] == ['0', '1'] and told['unit'] == 'mm' and len(told['input']) == 1
    e = told['size_edges']
    assert e == np.quantile(d, (1 / 3, 2 / 3)).tolist()
    of = lambda b: (np.digitize(d, e) == b // 9) & ((y * 3).astype(int) == b // 3 % 3) & ((x * 3).astype(int) == b % 3)
    for b, v in enumerate(told['bins']):
        assert v['lesions'] == of(b).sum() and v['found'] == pytest.approx(hit[of(b)].sum()) and (v['x'], v['y']) == (b % 3, b // 3 % 3)
    assert [v['weight'] for v in told['bins']] == pytest.approx(analysis.hard_weights(np.array([hit[of(b)].sum() for b in range(27)]), np.array([of(b).sum() for b in range(27)]), 1.0)[1])
    mean = lambda size: np.mean([b['weight'] for b in told['bins'][9 * size:9 * size + 9]])
    assert mean(0) > 1.2 > mean(2) * 1.5

    weight = {k: told['bins'][next(b for b in range(27) if of(b)[i])]['weight'] for i, k in enumerate(one)}
    slices = {}
    for k in one:
        slices.setdefault(k[:2], []).append(weight[k])
    w = {k: np.mean(v) for k, v in slices.items()}
    p = {(c['folder'], int(c['slice'])): c['p'] for c in told['conditions']}
    assert p.keys() == w.keys() and all(p[k] == pytest.approx(0.6 / len(w) + 0.4 * w[k] / sum(w.values())) for k in w)
    assert sum(p.values()) == pytest.approx(1) and told['ess'] == pytest.approx(1 / sum(v ** 2 for v in p.values())) and told['ess'] < len(w)
    first = told['conditions'][0]['lesions']
    assert first == sorted(first, reverse=True) and sum(len(c['lesions']) for c in told['conditions']) == len(one)
    out = capsys.readouterr().out
    assert 'no distance to the ventricles' in out and f'{len(one)} lesions in {len(w)} slices of 8 patients, 2 arms, 2 seeds' in out
    table = common.read_csv(tmp_path / 'out/recall.csv')
    small = hit[d < e[0]]
    assert table[0]['lesions'] == str(len(small)) and [float(table[0][k]) for k in ('recall', 'low', 'high')] == pytest.approx([small.mean(), *common.wilson(small.sum(), len(small))], abs=1e-3)
    assert len(table) == 15 and all(sum(int(r['lesions']) for r in table if r['feature'] == f) == len(one) for f in {r['feature'] for r in table})
    for name in ('recall.png', 'weights.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 1000

    even = mine(tmp_path / 'even', tmp_path / 'cv.csv', '--alpha', 0)
    assert {b['weight'] for b in even['bins']} == {1.0} and even['ess'] == pytest.approx(len(w)) and even['input'] == told['input']
    assert mine(tmp_path / 'real', tmp_path / 'cv.csv', '--lam', 0)['ess'] == pytest.approx(len(w))


def test_distance_to_ventricles(phantom, tmp_path, capsys):
    """In three dimensions, mm, on the patient's own grid; from a column; patients without a map are counted."""
    root = tmp_path / 'data'
    names = [f.name for f in sorted(phantom.iterdir()) if common.part_of(f.name) == 'train'][:2]
    for f in phantom.iterdir():
        (root / f.name).mkdir(parents=True)
        for file in f.glob('*.nii.gz'):
            (root / f.name / file.name).symlink_to(file)
    image = nib.load(phantom / names[0] / 'bravo.nii.gz')
    labels = np.zeros(image.shape)
    labels[8, 20, 1], labels[20, 5, 0], labels[3, 3, 2] = 43, 2, 4                           # 2 is white matter
    nib.save(nib.Nifti1Image(labels, image.affine), root / names[0] / 'parc.nii.gz')
    volume, spacing = common.read_nifti(root / names[0] / 'parc.nii.gz')
    box = common.measure_box([p for p in common.split_patients(common.find_patients([root], ('bravo', 'seg'))) if p['part'] == 'train'])
    y0, x0, y1, x1 = common.square_view(volume.shape[1:], spacing[1:], box)
    rows = [['real', 0, n, n, z, 0, 5, 'mm', 9, x, y, 1, 4, 1] for n in names for z, x, y in ((0, 0.25, 0.5), (2, 0.7, 0.9), (1, 0.5, 0.1))]
    args = analysis.get_args(['hard-cases', str(write(tmp_path / 'cv.csv', rows)), '--data', str(root), '--out', str(tmp_path / 'out')])
    keys, a, _ = analysis.read_lesions(args)
    ventricles = [(z + 0.5, y + 0.5, x + 0.5) for z, y, x in np.argwhere(np.isin(volume, (4, 43)))]
    for (_, folder, z, _), v in zip(keys, a):
        at = int(z) + 0.5, y0 + v[2] * (y1 - y0), x0 + v[1] * (x1 - x0)
        want = min(math.dist(np.multiply(at, spacing), np.multiply(q, spacing)) for q in ventricles) if folder == names[0] else math.nan
        assert v[6] == pytest.approx(want, nan_ok=True)
    assert len(ventricles) == 2 and '3 of 6 lesions have no distance' in capsys.readouterr().out
    analysis.hard_cases(args)
    assert 'to the ventricles' in (tmp_path / 'out/recall.csv').read_text()
    args.lesions = [str(write(tmp_path / 'column.csv', [r + [k] for k, r in enumerate(rows)], ['ventricle']))]
    args.data = None
    assert analysis.read_lesions(args)[1][:, 6].tolist() == [0, 1, 2, 3, 4, 5]


def swapped(row, **new):
    return [new.get(k, v) for k, v in zip(HEADER, row)]


GOOD = ['real', 0, TRAIN[0], 'f', 0, 0, 5, 'mm', 9, 0.5, 0.5, 1, 4, 1]
MINE = [
    ([swapped(GOOD, patient=TEST)], '', f'{TEST} test training only'), ([GOOD], '--split {d}/parts.csv', f'{TRAIN[0]} judge training only'),
    ([GOOD], '--split none.csv', '--split none.csv no such file'), ([GOOD, swapped(GOOD, patient=TRAIN[1])], '--split {d}/parts.csv', f'parts.csv no line {TRAIN[1]}'),
    ([], '', 'no lesion'), ([swapped(GOOD, x='left')], '', 'lesion 1 numbers left'), ([GOOD, swapped(GOOD, y=1.5)], '', 'lesion 2 from 0 to 1'),
    ([swapped(GOOD, hit=2)], '', 'hit 0 or 1'), ([swapped(GOOD, diameter=0)], '', 'lesion 1'), ([GOOD, swapped(GOOD, unit='pixels')], '', 'lesion 2 unit mm'),
    ([swapped(GOOD, edge='nan')], '', 'lesion 1 numbers'), ([GOOD], '--alpha -1', "--alpha '-1' at least 0"), ([GOOD], '--lam 2', "--lam '2' at most 1"),
    ([GOOD], '--data none', '--data none no such folder'),
]


@pytest.mark.parametrize('rows, flags, words', MINE, ids=[w for _, _, w in MINE])
def test_mining_refuses(tmp_path, capsys, rows, flags, words):
    common.write_csv(tmp_path / 'parts.csv', ['patient', 'part'], [[TRAIN[0], 'judge']])
    refused(capsys, words.split(), mine, tmp_path / 'out', write(tmp_path / 'cv.csv', rows), *flags.format(d=tmp_path).split())
    assert not (tmp_path / 'out').exists()


def test_the_split_beside_the_file_decides(tmp_path, capsys):
    """A patient whom the name puts into the test part may be mined where split.csv says train, and the other way round."""
    file = write(tmp_path / 'cv.csv', [swapped(GOOD, patient=TEST)])
    common.write_csv(tmp_path / 'split.csv', ['patient', 'part'], [[TEST, 'train'], [TRAIN[0], 'test']])
    assert mine(tmp_path / 'out', file)['lesions'] == 1
    refused(capsys, [TRAIN[0], 'test part'], mine, tmp_path / 'no', write(tmp_path / 'cv.csv', [GOOD]))
    refused(capsys, ['none.csv', 'no such file'], mine, tmp_path / 'no', 'none.csv')
    (tmp_path / 'columns.csv').write_text('a,b\n1,2\n')
    refused(capsys, ['columns a,b', 'diameter'], mine, tmp_path / 'no', tmp_path / 'columns.csv')


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def told(call, tmp_path_factory):
    """A controllable mask model that has seen requests only, and a hard.json."""
    root = tmp_path_factory.mktemp('hard')
    call('seg', root / 'seg', '--rflow', '--controllable')
    mine(root / 'mined', write(root / 'cv.csv', lesions(60)), '--alpha', 2)
    return root


def test_the_mixture(tmp_path):
    """20,000 draws: frequencies within 3 sd of p; weighted by p_real / p they give back the real means within 3 standard errors."""
    g, N = np.random.default_rng(0), 20_000
    p = np.array([0.2, 0.15, 0.15, 0.1, 0.1, 0.08, 0.08, 0.06, 0.05, 0.03])
    conditions = [dict(p=v, p_real=0.1, lesions=[[20 * (1 - v) - k, *g.random(2)] for k in range(1 + i % 3)]) for i, v in enumerate(p)]
    (tmp_path / 'hard.json').write_text(json.dumps(dict(unit='mm', conditions=conditions)))

    class Run:
        args, spacing = type('A', (), dict(size=16)), (2.0, 3.0)
    requests, q, undo = sample.read_hard(tmp_path / 'hard.json', Run)
    for r, c in zip(requests, conditions, strict=True):
        np.testing.assert_allclose(r, np.array(c['lesions']) / [16 * 2.5, 1, 1])                          # mm to the box's side
    np.testing.assert_allclose(q * undo, 0.1)
    drawn = np.array([sample.draw_condition(q, 5, i) for i in range(N)])
    assert (np.abs(np.bincount(drawn, minlength=10) - N * p) < 3 * np.sqrt(N * p * (1 - p))).all()
    w = undo.numpy()[drawn]
    assert abs(w.mean() - 1) < 3 * w.std() / math.sqrt(N)
    for feature in (np.array([len(r) for r in requests]), np.array([r[:, 0].mean() for r in requests]), np.array([r[0, 1] for r in requests]), p > 0.1):
        x = w * feature[drawn]
        assert abs(x.mean() - feature.mean()) < 3 * x.std() / math.sqrt(N) and abs(feature[drawn].mean() - feature.mean()) > 3 * feature[drawn].std() / math.sqrt(N)


def test_sampling_hard_cases(told, call, tmp_path, capsys):
    """Requests, log p and weight of each mask in the manifest; the same by other batches and when gone on with; ESS printed."""
    draw = lambda name, *flags: call('sample', tmp_path / name, '--seg', told / 'seg', '--hard-cases', told / 'mined/hard.json', '--seg-steps', 2, *flags)
    out = draw('a', '--n', 12, '--batch-size', 5)
    mined, rows = json.loads((told / 'mined/hard.json').read_text()), common.read_csv(out / 'manifest.csv')
    for r in rows:
        number, count = r['condition'].split(' request ')[1].split(' ')[:2]
        c = mined['conditions'][int(number[:-1])]
        assert len(c['lesions']) == int(count) and float(r['log_p']) == pytest.approx(math.log(c['p']), abs=1e-5)
        assert float(r['weight']) == pytest.approx(c['p_real'] / c['p'], abs=1e-5)
    ess = common.effective([float(r['weight']) for r in rows])
    assert len({r['condition'] for r in rows}) > 4 and f'12 masks then count as {ess:.1f}' in capsys.readouterr().out
    draw('b', '--n', 5)
    again = draw('b', '--n', 12, '--batch-size', 1)
    assert (again / 'manifest.csv').read_text() == (out / 'manifest.csv').read_text()
    assert all((common.read_nifti(f / 'seg.nii.gz')[0] == common.read_nifti(again / f.name / 'seg.nii.gz')[0]).all() for f in out.glob('syn_*'))
    assert [r['condition'] for r in common.read_csv(draw('c', '--n', 12, '--seed', 1) / 'manifest.csv')] != [r['condition'] for r in rows]
    # the requests of other lines would be the wrong ones to compare with
    evaluate.main(evaluate.get_args(['control', '--fake', str(out), '--out', str(tmp_path / 'control'), '--repeats', '20']))
    counts = [int(r['condition'].split(': ')[-1].split()[0]) for r in rows]
    got = [common.components(common.read_nifti(out / r['folder'] / 'seg.nii.gz')[0][0])[1] for r in rows]
    assert json.loads((tmp_path / 'control/metrics.json').read_text())['metrics']['count exact']['fake'] == pytest.approx(np.mean([a == b for a, b in zip(counts, got)]))
    changed = tmp_path / 'hard.json'
    changed.write_text(json.dumps({**mined, 'lam': 0.1}))
    refused(capsys, ['--out', 'made otherwise'], call, 'sample', out, '--seg', told / 'seg', '--hard-cases', changed, '--seg-steps', 2, '--n', 12)


def test_a_gate_keeps_the_columns(told, trained, detector, call, tmp_path):
    out = call('sample', tmp_path / 'gated', '--seg', told / 'seg', '--bravo', trained / 'bravo', '--hard-cases', told / 'mined/hard.json', '--seg-steps', 2, '--steps', 2,
               '--n', 3, '--gate', detector(), '--threshold', 1)
    rows = common.read_csv(out / 'manifest.csv')
    assert len(rows) == 3 and all(float(r['log_p']) < 0 < float(r['weight']) and 0 < float(r['p_bad']) < 1 for r in rows)


ASKED = [
    ('--seg {d}/seg --hard-cases {h} --count 2', '--hard-cases --count one'), ('--seg {d}/seg --hard-cases {h} --size 3', '--hard-cases --size one'),
    ('--seg {d}/seg --hard-cases {h} --requests {h}', '--hard-cases --requests one'), ('--bravo {t}/bravo --data {p} --hard-cases {h}', '--hard-cases --seg'),
    ('--seg {t}/seg --hard-cases {h}', '--hard-cases seg without --controllable'), ('--seg {d}/seg --hard-cases none.json', 'none.json no such file'),
    ('--seg {d}/seg --hard-cases {d}/cv.csv', '--hard-cases cv.csv JSON'), ('--seg {d}/seg --hard-cases {x}/sum.json', 'sum.json JSON p_real'),
    ('--seg {d}/seg --hard-cases {x}/list.json', 'list.json JSON'), ('--seg {d}/seg --bravo {t}/bravo --pairs --hard-cases {h}', '--hard-cases --pairs'),
]


@pytest.mark.parametrize('flags, words', ASKED, ids=[f for f, _ in ASKED])
def test_asking_refuses(told, trained, phantom, call, tmp_path, capsys, flags, words):
    mined = json.loads((told / 'mined/hard.json').read_text())
    mined['conditions'][0]['p'] += 0.1
    (tmp_path / 'sum.json').write_text(json.dumps(mined)), (tmp_path / 'list.json').write_text('[1, 2]')
    given = flags.format(d=told, h=told / 'mined/hard.json', t=trained, p=phantom, x=tmp_path).split()
    refused(capsys, words.split(), call, 'sample', tmp_path / 'out', *given)
    assert not (tmp_path / 'out').exists()
