"""analysis.py on finished runs."""
import contextlib
import csv
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analysis
import common
import evaluate


def test_compare(trained, call, phantom, cache, tmp_path, capsys):
    """Two runs and two sets of metrics: last figures of the logs, the flags that differ, metrics in one table, pictures."""
    for name, steps in (('a', 1), ('b', 3)):
        fake = call('sample', tmp_path / f'set_{name}', '--bravo', trained / 'bravo', '--data', phantom, '--n', 10, '--steps', steps)
        evaluate.main(evaluate.get_args(['quality', '--fake', str(fake), '--data', str(phantom), '--vgg-weights', 'none', '--out', str(tmp_path / name),
                                         '--cache', str(cache), '--repeats', '20', '--device', 'cpu']))
    capsys.readouterr()
    analysis.main(analysis.get_args(['compare', *map(str, (trained / 'bravo', trained / 'ddpm', tmp_path / 'a', tmp_path / 'b')), '--out', str(tmp_path / 'out')]))
    told = capsys.readouterr().out
    rows = {r['run']: r for r in csv.DictReader(open(tmp_path / 'out/compare.csv'))}
    log = list(csv.DictReader(open(trained / 'ddpm/log.csv')))[-1]
    assert rows.keys() == {'bravo', 'ddpm'} and rows['ddpm']['steps'] == log['step'] and float(rows['ddpm']['loss']) == pytest.approx(float(log['loss']), abs=1e-4)
    assert '--rflow' in told and '--seed' not in told
    wanted = json.loads((tmp_path / 'b/metrics.json').read_text())['metrics']['spectrum, dB']
    table = {r['metric']: r for r in csv.DictReader(open(tmp_path / 'out/metrics.csv'))}
    assert table['spectrum, dB']['b'].startswith(f'{wanted["fake"]:.3f} [') and float(table['spectrum, dB']['floor']) == pytest.approx(wanted['floor'], abs=1e-3)
    for name in ('loss.png', 'held_out.png', 'loss_by_t.png', 'metrics.png', 'spectra.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 1000
    bands, set_b = json.loads((tmp_path / 'b/metrics.json').read_text())['spectrum'], common.load_slices([tmp_path / 'set_b'], 16, training=False, cache=cache)
    np.testing.assert_allclose(bands['fake'], evaluate.radial_spectrum(np.array(set_b.images)[:, 0]).mean(0), atol=1e-3)
    # the same masks: differences draw by draw, narrower than the two intervals say; a set drawn otherwise has none
    value = {n: json.loads((tmp_path / n / 'metrics.json').read_text())['metrics']['MS-SSIM within'] for n in 'ab'}
    draws = {n: [float(r['MS-SSIM within']) for r in csv.DictReader(open(tmp_path / n / 'draws.csv'))] for n in 'ab'}
    gap = value['b']['fake'] - value['a']['fake']
    low, high = np.percentile(np.subtract(draws['b'], draws['a']) - np.mean(np.subtract(draws['b'], draws['a'])) + gap, (2.5, 97.5))
    found = {r['metric']: r['b'] for r in csv.DictReader(open(tmp_path / 'out/differences.csv'))}['MS-SSIM within']
    assert found.rstrip('*') == f'{gap:+.3f} [{low:+.3f}, {high:+.3f}]' and found.endswith('*') == (low * high > 0)
    assert len(draws['a']) == 20 and high - low < value['a']['fake_high'] - value['b']['fake_low'] - (value['a']['fake_low'] - value['b']['fake_high'])
    evaluate.main(evaluate.get_args(['quality', '--fake', str(tmp_path / 'set_b'), '--data', str(phantom), '--vgg-weights', 'none', '--out', str(tmp_path / 'c'),
                                     '--cache', str(cache), '--repeats', '20', '--seed', '1', '--device', 'cpu']))
    analysis.main(analysis.get_args(['compare', *map(str, (tmp_path / 'a', tmp_path / 'c')), '--out', str(tmp_path / 'out2')]))
    assert not (tmp_path / 'out2/differences.csv').exists()


def test_compare_what_cannot_be(tmp_path, capsys):
    """A detector's metrics.json is left out, sets without a common metric have no table, and what is nan has no bar; each said in a line."""
    value = dict(fake=1.0, fake_low=0.5, fake_high=1.5, floor=2.0)
    for name, about in (('a', dict(metrics=dict(x=value, y=dict.fromkeys(value, math.nan)))), ('b', dict(metrics=dict(x=dict(value, floor=math.nan), y=value))),
                        ('c', dict(metrics=dict(z=value))), ('d', dict(detector={}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.json').write_text(json.dumps(about))
    run = lambda *names: (analysis.main(analysis.get_args(['compare', *(str(tmp_path / n) for n in names), '--out', str(tmp_path / ''.join(names) / 'out')])),
                          capsys.readouterr().out)[1]
    assert 'd: its metrics.json holds no metrics of a set' in run('a', 'b', 'd')
    table = {r['metric']: r for r in common.read_csv(tmp_path / 'abd/out/metrics.csv')}
    assert table['x']['a'] == '1.000 [0.500, 1.500]' and table['y']['a'].startswith('nan') and (tmp_path / 'abd/out/metrics.png').stat().st_size > 500
    assert 'a, c: have no metric in common' in run('a', 'c') and not (tmp_path / 'ac/out/metrics.png').exists() and 'nothing to compare' in run('d')
    analysis.bars(tmp_path / 'all.png', {'x': {'a': dict.fromkeys(value, math.nan)}})
    analysis.bars(tmp_path / 'two.png', {'x': {'a': dict.fromkeys(value, math.nan), 'b': value}})
    image = lambda v: np.asarray(common.Image.open(tmp_path / v))
    coloured = lambda v: (np.ptp(image(v).astype(int), 2) > 20).any(1).nonzero()[0]
    assert not len(coloured('all.png')) and coloured('two.png').min() > 24 + 18                         # the second row alone


def test_timesteps(trained, tmp_path, capsys):
    """The table's mean is that of the bins; regions apart; different targets are told; a run without the file is refused."""
    analysis.main(analysis.get_args(['timesteps', str(trained / 'bravo'), str(trained / 'ddpm'), '--out', str(tmp_path)]))
    assert 'predict different things' in capsys.readouterr().out and (tmp_path / 'timesteps.png').stat().st_size > 1000
    table = {(r['run'], r['region']): r for r in csv.DictReader(open(tmp_path / 'timesteps.csv'))}
    bins = [r for r in csv.DictReader(open(trained / 'bravo/loss_by_t.csv')) if r['set'] == 'train']
    for region in common.REGIONS:
        n, e = zip(*[(int(r['count']), float(r['mean_squared_error'])) for r in bins if r['region'] == region])
        assert table['bravo', region]['images'] == str(sum(n)) and float(table['bravo', region]['mean error']) == pytest.approx(
            sum(a * b for a, b in zip(n, e)) / sum(n), abs=1e-4)
        assert float(table['bravo', region]['hardest log-SNR']) == float(max((b, r['log_snr_low']) for b, r in zip(e, [r for r in bins if r['region'] == region]))[1]) + 0.5
    assert table['bravo', 'all']['images'] == table['bravo', 'background']['images'] == '16' and int(table['bravo', 'tumour']['images']) <= 16
    with pytest.raises(SystemExit) as e:
        analysis.main(analysis.get_args(['timesteps', str(tmp_path)]))
    assert e.value.code == 2 and 'loss_by_t.csv' in capsys.readouterr().err


def test_release(trained, call, phantom, tmp_path, capsys):
    """A fraction of the size, no paths, no optimiser; samples like the run, up to the rounding of the weights."""
    analysis.main(analysis.get_args(['release', str(trained / 'bravo'), str(tmp_path / 'small.pt')]))
    state = torch.load(tmp_path / 'small.pt', weights_only=True)
    assert 'opt' not in state and 'net' not in state and not any('/' in str(v) for v in state['args'].values())
    assert (tmp_path / 'small.pt').stat().st_size < 0.4 * (trained / 'bravo/ckpt.pt').stat().st_size
    old, new = common.load_run(trained / 'bravo'), common.load_run(tmp_path / 'small.pt')
    x, t = torch.randn(2, 2, 16, 16), torch.tensor([0.3, 0.9])
    assert 0 < (old.net(x, t) - new.net(x, t)).abs().max() < 5e-3 * old.net(x, t).std()
    images = [common.read_nifti(call('sample', tmp_path / name, '--bravo', run, '--data', phantom, '--n', 1, '--steps', 3) / 'syn_0_000000/bravo.nii.gz')[0]
              for name, run in (('a', trained / 'bravo'), ('b', tmp_path / 'small.pt'))]
    assert abs(images[0] - images[1]).max() < 0.01
    with pytest.raises(SystemExit) as e:
        call('sample', tmp_path / 'raw', '--bravo', tmp_path / 'small.pt', '--data', phantom, '--weights', 'raw')
    assert e.value.code == 2 and '--weights ema' in capsys.readouterr().err
    for run, file in (('none', 'x.pt'), (trained / 'bravo', tmp_path), (trained / 'bravo', tmp_path / 'no/x.pt')):
        with pytest.raises(SystemExit) as e:
            analysis.main(analysis.get_args(['release', str(run), str(file)]))
        assert e.value.code == 2


def test_masks_are_read_as_the_run_read_them(phantom, cache):
    """attention and uncertainty draw masks with the labels and the speck of their run."""
    for labels, speck, tumour in (([1], 2.0, True), ([7], 2.0, False), (None, 2.0, True), (None, 1e6, False)):
        run = types.SimpleNamespace(args=types.SimpleNamespace(size=16, labels=labels, speck=speck), box=(0.0, 0.0, 1.0, 1.0))
        args = types.SimpleNamespace(data=[phantom], split=None, cache=cache, part='test', n=2, seed=0)
        with contextlib.nullcontext() if tumour else pytest.raises(SystemExit):
            assert analysis.tumour_rows(run, args)[1].sum() > 0


def test_names():
    assert analysis.short_names(['x/a', 'x/b']) == ['a', 'b'] and analysis.short_names(['x/a', 'y/a']) == ['x/a', 'y/a']


@pytest.mark.parametrize('run', ['none', 'phantom'])
def test_refused(run, phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        analysis.main(analysis.get_args(['compare', str(phantom if run == 'phantom' else run), '--out', str(tmp_path)]))
    assert e.value.code == 2 and 'log.csv' in capsys.readouterr().err


# -- patients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('k, n, low, high', [(0, 10, 0, 0.2775), (3, 3, 0.4385, 1), (5, 20, 0.1119, 0.4687), (0, 100, 0, 0.0370), (6, 100, 0.0278, 0.1248),
                                             (10, 100, 0.0552, 0.1744)])
def test_wilson(k, n, low, high):
    a, b = common.wilson(k, n)
    assert abs(a - low) < 5e-5 and abs(b - high) < 5e-5
    assert common.wilson(n - k, n) == pytest.approx((1 - b, 1 - a)) and common.wilson(0, 0) == (0, 1)


def test_upper_tail():
    """Against the sum of exact terms; the sheet's cuts at 8 % and 100 images: 14 alone, 19 for 105 patients."""
    for n, q in ((10, 0.3), (100, 0.08)):
        for x in (0, 1, 3, n // 2, n):
            assert common.upper_tail(x, n, q) == pytest.approx(sum(math.comb(n, k) * q ** k * (1 - q) ** (n - k) for k in range(x, n + 1)), rel=1e-9)
    cut = lambda level: next(x for x in range(101) if common.upper_tail(x, 100, 0.08) < level)
    assert cut(0.05) == 14 and cut(0.05 / 105) == 19


def test_tarone():
    """Equal rates: Z has mean 0 +- 0.1 and deviation 1 +- 0.1. A correlation of 0.02: Z of about 14, and rho finds it."""
    g = np.random.default_rng(0)
    z = [analysis.tarone(g.binomial(100, 0.08, 105), np.full(105, 100))[0] for _ in range(2000)]
    assert abs(np.mean(z)) < 0.1 and abs(np.std(z) - 1) < 0.1
    a = 0.08 * (1 / 0.02 - 1)
    p = g.beta(a, a * 0.92 / 0.08, (500, 105))
    spread = np.array([analysis.tarone(g.binomial(100, row), np.full(105, 100)) for row in p])
    assert abs(spread[:, 0].mean() - 14) < 2 and abs(spread[:, 1].mean() - 0.02) < 0.002 and (spread[:, 0] > 3).all()
    assert all(math.isnan(v) for v in analysis.tarone([0, 0], [5, 5]))
    x, n = np.array([1, 4, 0]), np.array([10, 12, 7])                                              # by hand
    q = 5 / 29
    assert analysis.tarone(x, n)[0] == pytest.approx((sum((x - n * q) ** 2) / (q * (1 - q)) - 29) / math.sqrt(2 * (90 + 132 + 42)))


def test_holm():
    p = np.random.default_rng(1).random(50) ** 3
    corrected = analysis.holm(p)
    assert (corrected >= p).all() and (np.diff(corrected[np.argsort(p)]) >= 0).all() and corrected.max() <= 1
    assert analysis.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


@pytest.fixture
def judged(tmp_path):
    """A set of 5 patients with 20 images each, of which patient p4 has 12 bad and the others 1; its scores, and answers that say the same."""
    (tmp_path / 'set').mkdir(), (tmp_path / 'scores').mkdir(), (tmp_path / 'labels').mkdir()
    (tmp_path / 'set/sample.json').write_text('{}')
    rows = [(f'syn_0_{i:06d}', f'p{i % 5}', i // 5 < (12 if i % 5 == 4 else 1)) for i in range(100)] + [('syn_0_000100', '', True)]
    common.write_csv(tmp_path / 'set/manifest.csv', ['folder', 'source_patient'], [r[:2] for r in rows])
    common.write_csv(tmp_path / 'scores/scores.csv', ['folder', 'z', 'p_bad', *common.CLASSES, 'verdict'],
                     [[f, 0, 0.5, *[0.1] * 6, 'bad' if b else 'good'] for f, _, b in rows])
    answer = lambda f, verdict, rater='a', repeat=0: [rater, f'item {f}', str(tmp_path / 'set'), f, verdict, 'boundary' if verdict == 'bad' else '',
                                                     2 if verdict == 'bad' else '', 1.0, repeat, 'now']
    said = [answer(rows[0][0], 'unsure')] + [answer(f, 'bad' if b else 'good') for f, _, b in rows]        # the later line of an image counts
    said += [answer(rows[50][0], 'bad', 'b'), answer(rows[0][0], 'good', 'a', 1)]                          # a tie is left out, a repeat no vote
    common.write_csv(tmp_path / 'labels/labels.csv', list(common.LABELS), said)
    return tmp_path


@pytest.mark.parametrize('who', ['scores', 'answers'])
def test_patients(judged, who, capsys):
    """The one who stands out is found, by scores and by answers; an image without a source, and a tie, are counted and left out."""
    source = judged / ('scores' if who == 'scores' else 'labels')
    analysis.main(analysis.get_args(['patients', '--fake', str(judged / 'set'), f'--{who}', str(source), '--out', str(judged / 'out')]))
    told, rows = capsys.readouterr().out, common.read_csv(judged / 'out/patients.csv')
    n0 = 20 - (who == 'answers')
    assert [(r['patient'], r['images'], r['bad']) for r in rows[:2]] == [('p4', '20', '12'), ('p0', str(n0), '1')] and len(rows) == 5
    assert [float(rows[0][k]) for k in ('low', 'high')] == pytest.approx(common.wilson(12, 20), abs=1e-4)
    assert float(rows[0]['p']) == pytest.approx(common.upper_tail(12, 20, 4.5 / (61 + n0)), rel=0.01) and float(rows[0]['p_holm']) < 1e-6
    summary = json.loads((judged / 'out/patients.json').read_text())
    assert summary['stand_out'] == ['p4'] and summary['bad'] == 16 and summary['undecided'] == (who == 'answers') and '1 judged images without a source' in told
    assert summary['tarone_z'] == pytest.approx(analysis.tarone([12, 1, 1, 1, 1], [20, n0, 20, 20, 20])[0]) and (judged / 'out/patients.png').stat().st_size > 1000


def test_verdicts_of_sets_of_one_name(tmp_path, capsys):
    """a/set and b/set are two; one that was judged elsewhere is known by its name, unless two have it."""
    answer = lambda root, verdict, kind='': {'set': str(root / 'set'), 'folder': 'f', 'verdict': verdict, 'class': kind, 'repeat': '0'}
    said = [answer(tmp_path / 'a', 'bad', 'boundary'), answer(tmp_path / 'a', 'bad'), answer(tmp_path / 'b', 'good'), answer(tmp_path / 'b/../b', 'good')]
    assert analysis.verdicts(said, tmp_path / 'a/set') == ({'f': True}, 0, {'f': 'boundary'})
    assert analysis.verdicts(said, tmp_path / 'b/set') == ({'f': False}, 0, {})
    assert analysis.verdicts(said[2:], tmp_path / 'moved/set') == ({'f': False}, 0, {})
    with pytest.raises(SystemExit) as e:
        analysis.verdicts(said, tmp_path / 'moved/set')
    err = capsys.readouterr().err
    with pytest.raises(SystemExit):                                                                # slices of a volume are no raters
        analysis.verdicts([dict(said[0], z=z) for z in '01'], tmp_path / 'a/set')
    assert 'several slices of f' in capsys.readouterr().err
    assert e.value.code == 2 and f'--fake {tmp_path}/moved/set: people judged {tmp_path}/a/set and ' in err


# -- taxonomy ---------------------------------------------------------------------------------------------------------


def pairs(table):
    """A square table of two raters as answers (N,2)."""
    return [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]


def both(table):
    one = np.eye(len(table))[np.array(pairs(table))]
    return common.agreement(one.sum(1), one.mean(0))


def test_agreement():
    """Tables of known kappa, the 10 x 14 example of Fleiss, perfect and independent raters, renamed classes."""
    k = both([[20, 5], [10, 15]])
    assert (k['po'], k['pe'], k['kappa']) == pytest.approx((0.70, 0.50, 0.40))
    k = both([[90, 4], [4, 2]])
    assert k['po'] == pytest.approx(0.92) and k['kappa'] == pytest.approx(0.2908, abs=5e-5)
    q = 0.94                                                                                      # AC1 by hand: chance 2 q (1 - q)
    assert k['ac1'] == pytest.approx((0.92 - 2 * q * (1 - q)) / (1 - 2 * q * (1 - q))) and k['ac1'] > 0.9
    fleiss = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2],
                       [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    k = common.agreement(fleiss)
    assert (k['po'], k['pe'], k['kappa']) == pytest.approx((0.3780, 0.2128, 0.2099), abs=6e-5)
    assert common.agreement(fleiss[:, [3, 1, 4, 0, 2]]) == pytest.approx(k)
    assert both(np.diag([5, 3, 2]))['kappa'] == both(np.diag([5, 3, 2]))['ac1'] == 1
    g = np.random.default_rng(2)
    free = [common.agreement(one.sum(1), one.mean(0))['kappa'] for one in (np.eye(3)[g.choice(3, (100, 2), p=(0.6, 0.3, 0.1))] for _ in range(400))]
    assert abs(np.mean(free)) < 0.02


def test_taxonomy(call, trained, phantom, tmp_path, capsys):
    """Frequencies (raters of one image share its vote), agreement between two and with oneself, the gallery."""
    fake = call('sample', tmp_path / 'set', '--bravo', trained / 'bravo', '--data', phantom, '--n', 6, '--steps', 1)
    say = {0: 'anatomical', 1: 'anatomical', 2: 'artefact', 3: '', 4: '', 5: 'textural'}
    line = lambda rater, i, c, repeat=0: [rater, f'i{i}', str(fake), f'syn_0_{i:06d}', 'bad' if c else 'good', c, 1 + i % 3 if c else '', 2.0, repeat, 'now']
    rows = [line('a', i, c) for i, c in say.items()] + [line('b', i, 'boundary' if i == 1 else '' if i == 5 else c) for i, c in say.items()]
    rows += [line('a', i, say[i], 1) for i in (0, 3)]
    (tmp_path / 'labels').mkdir()
    common.write_csv(tmp_path / 'labels/labels.csv', list(common.LABELS), rows)
    analysis.main(analysis.get_args(['taxonomy', str(tmp_path / 'labels'), '--out', str(tmp_path / 'out'), '--repeats', '50']))
    table = {r['class']: r for r in common.read_csv(tmp_path / 'out/taxonomy.csv')}
    assert {c: float(r['images']) for c, r in table.items() if float(r['images'])} == dict(anatomical=1.5, boundary=0.5, artefact=1, textural=1)
    assert float(table['artefact']['share of bad']) == 0.25 and float(table['artefact']['high']) == pytest.approx(common.wilson(1, 4)[1], abs=1e-3)
    told = {r['who']: r for r in common.read_csv(tmp_path / 'out/agreement.csv')}
    assert told.keys() == {'a and b, verdict', 'a and b, class', 'a and b, severity', 'a again, verdict'}
    assert told['a and b, severity']['kappa of'] == 'Cohen, weighted' and told['a and b, severity']['kappa'].startswith('1.000') and told['a and b, class']['kappa of'] == 'Cohen'
    a, b = np.array([1, 1, 2, 3, 3, 2]), np.array([1, 2, 2, 3, 1, 3])                            # 1 - sum w O / sum w E over the table
    O = np.zeros((3, 3))
    np.add.at(O, (a - 1, b - 1), 1 / 6)
    w = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    graded = analysis.weighted_kappa(a, b, 2)
    assert graded['kappa'] == pytest.approx(1 - (w * O).sum() / (w * np.outer(O.sum(1), O.sum(0))).sum()) and math.isnan(analysis.weighted_kappa(a[:2], a[:2], 2)['kappa'])
    assert graded['po'] == pytest.approx(1 - (w * O).sum() / 2) and told['a and b, severity']['AC1'] == ''
    assert told['a and b, verdict']['images'] == '6' and float(told['a and b, verdict']['agree']) == pytest.approx(5 / 6, abs=1e-3)
    assert told['a and b, verdict']['kappa'].startswith(f'{both([[2, 0], [1, 3]])["kappa"]:.3f}') and told['a and b, class']['images'] == '3'
    assert float(told['a again, verdict']['agree']) == 1 and told['a again, verdict']['AC1'].startswith('1.000')
    assert '6 images, 12 answers of 2 raters: 5 good, 7 bad' in capsys.readouterr().out and (tmp_path / 'out/gallery.png').stat().st_size > 1000


# -- onset ------------------------------------------------------------------------------------------------------------


def test_onset_of():
    above = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], bool)
    assert analysis.onset_of(above).tolist() == [0, 1, 2, 3, 3]


def test_onset(tmp_path, detector, monkeypatch, capsys):
    """Trajectories of the oracle for N(0, 1) pixels: the distance of x0_hat to the image is t^2/((1-t)^2 + t^2), although every x0_hat
    at high t is a blur no time is called bad but those where bad ones differ from good ones. Faults: from t = 0.75 on, or at the end only."""
    ts, n, S, g = [1, 0.75, 0.5, 0.25, 0], 60, 16, common.generator('onset')
    t = torch.tensor(ts).view(1, -1, 1, 1)
    x_0 = 0.3 * torch.randn(n, 1, S, S, generator=g)                         # small, so that the bounds -1, 1 cut nothing
    x_t = (1 - t) * x_0 + t * 0.3 * torch.randn(n, 1, S, S, generator=g)
    hat = (1 - t) / ((1 - t) ** 2 + t ** 2) * x_t
    fake, since = tmp_path / 'set', {0: 1, 1: 1, 2: 1, 3: 4, 4: 4, 5: 4, 6: 4}
    for i in range(n):
        fault = torch.zeros(5, S, S)
        if i in since:
            fault[since[i]:, 0, 0] = 5.0                                     # a bright corner, which only the fake detector minds
        common.write_patient(fake / f'syn_0_{i:06d}', {}, np.zeros((S, S)), (1, 1))
        np.savez(fake / f'syn_0_{i:06d}/trajectory.npz', t=np.float32(ts), x_t=x_t[i].numpy(), x0_hat=(hat[i] + fault).numpy())
    common.write_csv(fake / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_0_{i:06d}', ''] for i in range(n)])
    (fake / 'sample.json').write_text('{}')

    def logits(d, x, mask):                                                  # blur is worth 3: without the reference all early ones were bad
        z = 4 * (x[:, 0, 0, 0] > 0.99) + 3 * (x[:, 0, 1:].square().mean((1, 2)) < 0.025) - 2
        return torch.cat([z[:, None], 5 * F.one_hot((x[:, 0, 0, 0] > 0.99).long(), 6)], 1)

    monkeypatch.setattr(analysis, 'detector_logits', logits)
    analysis.main(analysis.get_args(['onset', '--fake', str(fake), '--gate', str(detector()), '--out', str(tmp_path / 'out'), '--repeats', '20', '--device', 'cpu']))
    rows = {float(r['t']): r for r in common.read_csv(tmp_path / 'out/onset.csv')}
    for at, r in rows.items():
        assert float(r['distance good']) == pytest.approx(0.09 * at ** 2 / ((1 - at) ** 2 + at ** 2), rel=0.03, abs=1e-6)
    assert [int(rows[v]['onsets']) for v in (1, 0.75, 0.5, 0.25, 0)] == [0, 3, 0, 0, 4]
    assert float(rows[0]['auc']) == 1 and float(rows[1]['auc']) == 0.5 and float(rows[0.75]['auc']) == pytest.approx((3 + 4 * 0.5) / 7, abs=1e-3)
    assert float(rows[0]['textural, bad - good']) > 0.9 and abs(float(rows[1]['textural, bad - good'])) < 1e-3
    kinds = {r['class']: r for r in common.read_csv(tmp_path / 'out/kinds.csv')}
    assert kinds['textural'] == dict({'class': 'textural'}, structure='3', detail='4', neither='0')
    assert '3 are so for good from t >= 0.5 (structure), 4 only below it' in capsys.readouterr().out
    for name in ('onset.png', 'classes.png', 'trajectories.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 500
    common.write_csv(fake / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_0_{i:06d}', f'p{i // 30}'] for i in range(n)])       # all bad ones are p0's
    analysis.main(analysis.get_args(['onset', '--fake', str(fake), '--gate', str(detector()), '--out', str(tmp_path / 'two'), '--repeats', '20', '--device', 'cpu']))
    two = {float(r['t']): r for r in common.read_csv(tmp_path / 'two/onset.csv')}
    assert all(two[at]['auc'] == r['auc'] for at, r in rows.items()) and {k: two[0.75][k] for k in ('low', 'high')} != {k: rows[0.75][k] for k in ('low', 'high')}
    assert float(two[0.75]['low']) == float(two[0.75]['high']) == pytest.approx(float(two[0.75]['auc']), abs=1e-3)          # a draw holds all of p0's or nothing: one AUC


def test_onset_of_a_set(call, trained, phantom, detector, tmp_path):
    """On what sample.py --save-at leaves, with people's answers for the end."""
    fake = call('sample', tmp_path / 'set', '--bravo', trained / 'bravo', '--data', phantom, '--n', 30, '--steps', 4, '--save-at', '1,.5,0')
    (tmp_path / 'labels').mkdir()
    common.write_csv(tmp_path / 'labels/labels.csv', list(common.LABELS), [
        ['a', f'i{i}', str(fake), f'syn_0_{i:06d}', 'bad' if i < 4 else 'good', 'textural' if i < 4 else '', 1 if i < 4 else '', 1, 0, 'now'] for i in range(29)])
    analysis.main(analysis.get_args(['onset', '--fake', str(fake), '--gate', str(detector()), '--answers', str(tmp_path / 'labels'), '--out', str(tmp_path / 'out'),
                                     '--early', '0.7', '--device', 'cpu', '--repeats', '20']))
    rows = common.read_csv(tmp_path / 'out/onset.csv')
    assert [float(r['t']) for r in rows] == [1, 0.5, 0] and float(rows[-1]['distance bad']) == 0 < float(rows[0]['distance bad'])
    assert sum(int(r['onsets']) for r in rows) <= 4
    kinds = {r['class']: sum(int(r[k]) for k in ('structure', 'detail', 'neither')) for r in common.read_csv(tmp_path / 'out/kinds.csv')}
    assert kinds == {**dict.fromkeys(common.CLASSES, 0), 'textural': 4}                        # the raters' word, not the detector's


ANALYSIS = [
    ('patients --fake {d}/set', '--scores --answers one of them'), ('patients --fake {d}/set --scores {d}/scores --answers {d}/labels', 'one of them'),
    ('patients --fake none --scores {d}/scores', '--fake none sample.json'), ('patients --fake {d}/set --scores {d}/labels', '--scores labels scores.csv'),
    ('patients --fake {d}/set --answers {d}/scores', '--answers scores labels.csv'), ('taxonomy none', '--answers none labels.csv'),
    ('taxonomy {d}/empty', '--answers empty no answer'), ('taxonomy {d}/wrong', "'awful' good, bad, unsure"), ('taxonomy {d}/columns', 'other columns rater,item'),
    ('onset --fake {d}/set --gate none', 'none no such run folder'), ('onset --fake {d}/set --gate {gate} --answers {d}/labels --threshold 0.5', '--threshold 0.5 --answers'),
    ('onset --fake {d}/set --gate {gate}', 'trajectory.npz --save-at'), ('onset --fake {d}/set --gate {gate} --threshold 0', "--threshold '0' above 0"),
    ('taxonomy {d}/labels --repeats 3', "--repeats '3' at least 20"), ('onset --fake {d}/set --gate {gate} --early 2', "--early '2' at most 1"),
]


@pytest.mark.parametrize('flags, words', ANALYSIS, ids=[f for f, _ in ANALYSIS])
def test_others_refused(judged, detector, tmp_path, capsys, flags, words):
    header = ','.join(common.LABELS) + '\n'
    for name, text in (('empty', header), ('wrong', header + 'a,i,s,f,awful,,,1,0,now\n'), ('columns', 'a,b\n1,2\n')):
        (judged / name).mkdir()
        (judged / name / 'labels.csv').write_text(text)
    with pytest.raises(SystemExit) as e:
        analysis.main(analysis.get_args([*flags.format(d=judged, gate=detector()).split(), '--out', str(tmp_path / 'out')]))
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and all(w in err[0] for w in words.split()), err
