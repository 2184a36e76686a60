"""analysis.py on finished runs."""
import csv
import json

import pytest

import analysis
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
    for name in ('loss.png', 'held_out.png', 'loss_by_t.png', 'metrics.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 1000


def test_names():
    assert analysis.short_names(['x/a', 'x/b']) == ['a', 'b'] and analysis.short_names(['x/a', 'y/a']) == ['x/a', 'y/a']


@pytest.mark.parametrize('run', ['none', 'phantom'])
def test_refused(run, phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        analysis.main(analysis.get_args(['compare', str(phantom if run == 'phantom' else run), '--out', str(tmp_path)]))
    assert e.value.code == 2 and 'log.csv' in capsys.readouterr().err
