"""analysis.py on finished runs."""
import csv
import json

import pytest
import torch

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
    for name in ('loss.png', 'held_out.png', 'loss_by_t.png', 'metrics.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 1000


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


def test_names():
    assert analysis.short_names(['x/a', 'x/b']) == ['a', 'b'] and analysis.short_names(['x/a', 'y/a']) == ['x/a', 'y/a']


@pytest.mark.parametrize('run', ['none', 'phantom'])
def test_refused(run, phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        analysis.main(analysis.get_args(['compare', str(phantom if run == 'phantom' else run), '--out', str(tmp_path)]))
    assert e.value.code == 2 and 'log.csv' in capsys.readouterr().err
