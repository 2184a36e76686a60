"""sample.py: every flag once, what it leaves on disk, and that it says who an image was made from."""
import argparse
import csv
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analysis
import common
import sample
import train_bravo
import train_seg
from common import find_patients, part_of, read_nifti


@pytest.fixture(scope='module')
def runs(tmp_path_factory, phantom):
    """A tiny RFlow run of each kind that knows the slice level, and a DDPM one."""
    folder = tmp_path_factory.mktemp('runs')
    shared = ['--preset', 'tiny', '--dtype', 'fp32', '--iters', '2', '--sample-every', '100', '--data', str(phantom), '--cache', str(folder / 'cache')]
    for script, name, flags in ((train_seg, 'seg', ['--rflow', '--slice-level']), (train_bravo, 'bravo', ['--rflow', '--slice-level']),
                                (train_bravo, 'ddpm', ['--steps', '50']), (train_bravo, 'twenty', ['--rflow', '--steps', '20'])):
        script.main(script.get_args([*shared, *flags, '--out', str(folder / name)]))
    return folder


@pytest.fixture
def make(tmp_path, runs):
    def go(name, *flags):
        sample.main(sample.get_args(['--n', '3', '--dtype', 'fp32', '--out', str(tmp_path / name), '--cache', str(runs / 'cache'), *map(str, flags)]))
        with open(tmp_path / name / 'manifest.csv', newline='') as f:
            return tmp_path / name, list(csv.DictReader(f))
    return go


def test_new_masks_new_images(make, runs):
    """A set has the layout of real data, loads as synthetic training data, and its manifest names runs and seeds."""
    out, rows = make('a', '--seg', runs / 'seg', '--bravo', runs / 'bravo', '--steps', 4, '--seg-steps', 3)
    assert [r['folder'] for r in rows] == [f'syn_0_{i:06d}' for i in range(3)] and {r['source_patient'] for r in rows} == {''}
    assert rows[0]['bravo'] == common.load_run(runs / 'bravo').hash and rows[0]['seg'] == common.load_run(runs / 'seg').hash
    data = common.load_slices([out], 16, cache=out.parent / 'c')
    assert data.part == ['train'] * 3 and [r['tumour'] for r in data.table] == [int(r['tumour_pixels']) for r in rows]
    assert np.abs(data.images).max() <= 1 and len({r['level'] for r in rows}) > 1
    assert Image.open(out / 'grid.png').size[0] > 300 and (out / 'syn_0_000002/preview.png').exists()
    spacing = common.load_run(runs / 'bravo').spacing
    assert np.allclose(read_nifti(out / 'syn_0_000000/bravo.nii.gz')[1][1:], spacing, rtol=1e-4)


def test_levels_are_drawn_as_the_training_slices_have_them(make, runs, tmp_path):
    """A run that knows levels keeps their quantiles, also released; a drawn level is one of that distribution. An older run's are drawn evenly."""
    run, u = common.load_run(runs / 'seg'), [float(torch.rand((), generator=common.generator(0, 'level', i))) for i in range(3)]
    data = common.load_slices(run.args.data, 16, cache=runs / 'cache')
    trained = [data.table[i]['level'] for i in data.rows('train', 0.2, 0)]
    assert run.levels == pytest.approx(np.quantile(trained, np.linspace(0, 1, 101)).tolist()) and common.load_run(runs / 'ddpm').levels is None
    drawn = lambda name, seg: [float(r['level']) for r in make(name, '--seg', seg, '--seg-steps', 1)[1]]
    assert drawn('a', runs / 'seg') == pytest.approx(np.quantile(trained, u), abs=0.02)
    analysis.release(argparse.Namespace(run=str(runs / 'seg'), file=str(tmp_path / 'seg.pt')))
    assert common.load_run(tmp_path / 'seg.pt').levels == run.levels
    state = common.load_checkpoint(runs / 'seg')
    del state['levels']
    torch.save(state, tmp_path / 'old.pt')
    assert drawn('b', tmp_path / 'old.pt') == pytest.approx(u, abs=1e-4)


def test_ema_unless_asked_and_what_it_cost(make, runs, phantom, capsys):
    """Drawn are the averaged weights, to the bit those of --weights ema, not those of --weights raw; images a second and forwards are printed."""
    flags = ['--data', phantom, '--bravo', runs / 'bravo', '--steps', 2]
    image = lambda out: read_nifti(out / 'syn_0_000000/bravo.nii.gz')[0]
    default = image(make('a', *flags)[0])
    told = capsys.readouterr().out
    assert re.search(r'3 patients \([\d.]+ images/s, ', told) and '2 forwards' in told, told
    assert np.array_equal(default, image(make('b', *flags, '--weights', 'ema')[0])) and not np.array_equal(default, image(make('c', *flags, '--weights', 'raw')[0]))


def test_masks_of_patients(make, runs, phantom):
    """--data takes masks of the asked part only and writes down whose they are."""
    out, rows = make('b', '--data', phantom, '--part', 'test', '--empty-slices', 0, '--bravo', runs / 'bravo', '--steps', 2)
    assert all(part_of(r['source_patient']) == 'test' and int(r['tumour_pixels']) > 0 for r in rows)
    assert {p['source'] for p in find_patients([out], ('bravo', 'seg'))} == {r['source_patient'] for r in rows}


def test_masks_of_masks(make, runs, phantom, capsys):
    """Images on the masks of a set: nobody's masks stay nobody's, levels stay, and the result may train; with no network told a level, none is noted."""
    first, before = make('x', '--seg', runs / 'seg', '--bravo', runs / 'bravo', '--steps', 2, '--seg-steps', 2)
    for name, source in (('y', '--data'), ('z', '--masks')):
        out, rows = make(name, source, first, '--bravo', runs / 'bravo', '--steps', 2)
        assert {r['source_patient'] for r in rows} == {''} and {r['level'] for r in rows} == {r['level'] for r in before}
        assert common.load_slices([out], 16, cache=out.parent / 'c').part == ['train'] * 3
    with pytest.raises(SystemExit) as e:
        sample.main(sample.get_args([*map(str, ('--data', first, '--bravo', runs / 'bravo', '--per-patient', 2, '--out', first.parent / 'v', '--cache', runs / 'cache'))]))
    assert e.value.code == 2 and 'no patient; give --n' in capsys.readouterr().err
    assert {r['level'] for r in make('w', '--masks', phantom, '--bravo', runs / 'ddpm', '--steps', 2)[1]} == {''}


def test_labels_of_the_run(make, runs, phantom, tmp_path):
    """What was tumour in training is tumour in sampling: --labels and --speck of the run."""
    for f in phantom.iterdir():
        image, seg = (read_nifti(f / f'{n}.nii.gz')[0] for n in ('bravo', 'seg'))
        common.write_patient(tmp_path / 'two' / f.name, {'bravo': image}, seg * (1 + (np.arange(32) < 16)), (8.0, 6.4, 6.4))
    flags = ['--preset', 'tiny', '--rflow', '--iters', 1, '--data', tmp_path / 'two', '--labels', 2, '--speck', 0, '--cache', runs / 'cache', '--out', tmp_path / 'left']
    train_bravo.main(train_bravo.get_args([*map(str, flags)]))
    out, rows = make('l', '--n', 12, '--data', tmp_path / 'two', '--empty-slices', 0, '--bravo', tmp_path / 'left', '--steps', 1)
    made = common.load_slices([out], 16, cache=out.parent / 'c', labels=[2])                      # labels are of real masks; a set's say 1
    assert made.masks[..., 9:].sum() == 0 < made.masks.sum()
    note = json.loads((out / 'sample.json').read_text())
    assert note['labels'] == [2] and note['speck'] == 0 and note['seen'] == sorted(common.patient_id(f.name) for f in phantom.iterdir() if part_of(f.name) == 'train')


def test_a_run_remembers_whom_its_parents_saw(call, phantom, tmp_path):
    """Trained on three patients, gone on with on three others: both are seen, by the released file and by its set too, and no name is in the file."""
    names = sorted(f.name for f in phantom.iterdir())
    for k in (0, 3):
        common.write_csv(tmp_path / f'{k}.csv', ['patient', 'part'], [(n, 'train' if k <= i < k + 3 else 'test') for i, n in enumerate(names)])
    first = call('bravo', tmp_path / 'first', '--rflow', '--iters', 1, '--split', tmp_path / '0.csv')
    second = call('bravo', tmp_path / 'second', '--rflow', '--iters', 1, '--split', tmp_path / '3.csv', '--init', first)
    wanted = sorted(common.patient_id(n) for n in names[:6])
    analysis.main(analysis.get_args(['release', str(second), str(tmp_path / 'small.pt')]))
    assert common.load_run(first).seen == sorted(common.patient_id(n) for n in names[:3]) and common.load_run(tmp_path / 'small.pt').seen == wanted
    assert call('bravo', second, '--rflow', '--iters', 1, '--split', tmp_path / '3.csv', '--init', first) and common.load_run(second).seen == wanted
    made = call('sample', tmp_path / 'set', '--bravo', tmp_path / 'small.pt', '--data', phantom, '--split', tmp_path / '3.csv', '--n', 1, '--steps', 1)
    assert json.loads((made / 'sample.json').read_text())['seen'] == wanted and names[0].encode() not in (tmp_path / 'small.pt').read_bytes()


def test_whom_others_saw(call, phantom, tmp_path):
    """Who starts from a network or learns from a set that does not say whom it saw cannot say it either; a set that says it passes it on, as
    masks, as images to train on, as pairs; the first version's sets noted all parts."""
    names = sorted(f.name for f in phantom.iterdir())
    split = lambda k: common.write_csv(tmp_path / f'{k}.csv', ['patient', 'part'], [(n, 'train' if k <= i < k + 3 else 'test') for i, n in enumerate(names)]) or tmp_path / f'{k}.csv'
    ids, seen = lambda k: sorted(common.patient_id(n) for n in names[k:k + 3]), lambda out: json.loads((out / 'sample.json').read_text())['seen']
    seg = call('seg', tmp_path / 'seg', '--rflow', '--iters', 1, '--split', split(0))
    bravo = call('bravo', tmp_path / 'bravo', '--rflow', '--iters', 1, '--split', split(3))
    masks = call('sample', tmp_path / 'masks', '--seg', seg, '--n', 2, '--seg-steps', 1)
    both = call('sample', tmp_path / 'both', '--masks', masks, '--bravo', bravo, '--n', 2, '--steps', 1)
    assert seen(masks) == ids(0) and seen(both) == sorted(ids(0) + ids(3))
    pairs = call('sample', tmp_path / 'pairs', '--masks', masks, '--bravo', bravo, '--n', 2, '--steps', 1, '--pairs')
    wider = lambda name, *flags: common.load_run(call('bravo', tmp_path / name, '--rflow', '--iters', 1, '--split', split(6), *flags)).seen
    assert wider('more', '--data', phantom, both) == sorted(ids(0) + ids(3) + ids(6)) == wider('reflow', '--reflow', pairs, '--init', bravo)
    old = common.load_checkpoint(bravo)
    torch.save({k: v for k, v in old.items() if k != 'seen'}, tmp_path / 'old.pt')
    assert wider('from_old', '--init', tmp_path / 'old.pt') is None
    assert common.noted_seen(dict(parts={names[0]: 'train', names[1]: 'test'})) == [common.patient_id(names[0])] and common.noted_seen({}) is None
    (both / 'sample.json').write_text('{"seen": [')
    with pytest.raises(SystemExit) as e:
        common.seen_by(both)
    assert e.value.code == 2


def test_a_set_keeps_its_sampler(make, runs, phantom):
    """Begun when another sampler was the default, a set does not go on with this one's."""
    out, _ = make('euler', '--data', phantom, '--bravo', runs / 'bravo', '--n', 2, '--steps', 2)
    text = (out / 'manifest.csv').read_text()
    assert ',dpm++,' in text
    (out / 'manifest.csv').write_text(text.replace(',dpm++,', ',euler,'))
    with pytest.raises(SystemExit) as e:
        make('euler', '--data', phantom, '--bravo', runs / 'bravo', '--n', 4, '--steps', 2)
    assert e.value.code == 2


def test_masks_of_a_folder(make, runs):
    """Masks made first, images later: the same masks; a fixed slice level is used and stored."""
    first, _ = make('m', '--seg', runs / 'seg', '--seg-steps', 3)
    assert not list(first.rglob('bravo.nii.gz'))
    second, rows = make('n', '--masks', first, '--bravo', runs / 'bravo', '--steps', 2, '--slice-level', 0.75)
    for r in rows:
        assert np.array_equal(read_nifti(first / r['folder'] / 'seg.nii.gz')[0], read_nifti(second / r['folder'] / 'seg.nii.gz')[0])
    assert {r['level'] for r in rows} == {'0.7500'}


@pytest.mark.parametrize('flags', [['--sampler', 'ddpm', '--steps', 10], ['--sampler', 'ddim', '--eta', 0.5, '--steps', 5], ['--sampler', 'heun', '--steps', 4],
                                   ['--sampler', 'euler', '--steps', 50], ['--sampler', 'dpm++', '--grid', 'log-snr', '--steps', 6],
                                   ['--sampler', 'dpm++2s', '--steps', 3], ['--sampler', 'dpm++sde', '--shift', 0.5, '--steps', 4], ['--clip', '--steps', 3], ['--no-clip', '--steps', 3],
                                   ['--weights', 'raw', '--steps', 3], ['--seed', 5, '--steps', 3], ['--dtype', 'bf16', '--steps', 3]], ids=str)
@pytest.mark.parametrize('kind', ['bravo', 'ddpm'])
def test_solvers(make, runs, phantom, kind, flags):
    """Every solver and switch gives finite images, and others than the default's."""
    out, rows = make('s', '--data', phantom, '--bravo', runs / kind, *flags)
    images = [read_nifti(out / r['folder'] / 'bravo.nii.gz')[0] for r in rows]
    assert all(np.isfinite(i).all() and np.abs(i).max() <= 1 for i in images)
    if flags[0] == '--sampler':
        assert rows[0]['sampler'] == flags[1] and rows[0]['steps'] == str(flags[-1])


@pytest.mark.parametrize('flags', [[], ['--tol', 0.1, '--pair', 'heun-euler']], ids=str)
def test_adaptive(make, runs, phantom, flags, capsys):
    """The adaptive solver leaves its picture and says what it cost; an image does not depend on its batch."""
    out, rows = make('a', '--data', phantom, '--bravo', runs / 'bravo', '--sampler', 'adaptive', *flags)
    said = capsys.readouterr().out
    assert 'forwards an image' in said and (out / 'steps.png').stat().st_size > 1000
    alone, _ = make('b', '--data', phantom, '--bravo', runs / 'bravo', '--sampler', 'adaptive', *flags, '--batch-size', 1)
    for r in rows:
        a, b = (read_nifti(o / r['folder'] / 'bravo.nii.gz')[0] for o in (out, alone))
        assert np.abs(a - b).max() < 1e-3


@pytest.mark.parametrize('guidance', [common.Guidance(), common.Guidance(2.0, (0.2, 0.7))], ids=['plain', 'guided'])
@pytest.mark.parametrize('pair', [None, 'heun-euler'])
def test_adaptive_cost_is_what_was_asked(pair, guidance, tmp_path, capsys):
    """The printed forwards of one image are those that a counting network saw, refused steps among them; where it is guided, two."""
    trace, asked = [], []

    def denoise(x, t):
        asked.extend([t] * (1 + int(guidance.at(torch.as_tensor(t)).any())))
        t = torch.as_tensor(t).reshape(-1, 1, 1, 1)
        x_0 = torch.tanh(40 * (x - 0.3)) * (1 - t)                                        # stiff: steps are refused
        return x_0, (x - (1 - t) * x_0) / t
    common.sample_adaptive(denoise, torch.full((1, 1, 2, 2), 0.31), [1.0, 0.0], common.RFlow(), tol=0.01, pair=pair or 'bs23', trace=trace)
    sample.plot_steps(tmp_path / 's.png', [tuple(map(torch.stack, zip(*trace)))], argparse.Namespace(pair=pair, tol=0.01), guidance)
    assert not all(bool(good) for _, _, good in trace) and f'adaptive: {len(asked)}.0 forwards an image' in capsys.readouterr().out


def test_learned_steps_are_the_best():
    """Dynamic programming finds what brute force finds; equal costs tie; the ends are fixed."""
    for seed in range(20):
        cost = torch.rand(9, 9, dtype=torch.float64, generator=common.generator('cost', seed))
        cost[torch.tril_indices(9, 9).unbind()] = math.inf
        for n in (1, 2, 3, 4, 8):
            path, total = sample.best_steps(cost, n)
            every = [[0, *middle, 8] for middle in itertools.combinations(range(1, 8), n - 1)]
            price = lambda p: sum(float(cost[i, j]) for i, j in zip(p, p[1:]))
            assert abs(total - min(map(price, every))) < 1e-12 and abs(price(path) - total) < 1e-12
            assert len(path) == n + 1 and path[0] == 0 and path[-1] == 8 and path == sorted(set(path))


def test_jump_costs():
    """0 on a straight flow; on a curved one the learned times beat equal steps at the same number of forwards."""
    def walk(scale, n=100):
        def denoise(x, t):
            a, s = 1 - t.double(), t.double()
            x_0 = (a * scale ** 2 * x + s ** 2 * 0.3) / (a ** 2 * scale ** 2 + s ** 2)
            return x_0, (x - a * x_0) / s
        states, x_0s, process, ts = [], [], common.RFlow(), common.RFlow().times(n)
        z = torch.randn(50, 1, 4, 4, dtype=torch.float64, generator=common.generator('walk'))
        end = common.sample_euler(denoise, z, ts, process, None, lambda i, t, x, x_0: (states.append(x), x_0s.append(x_0)))
        return denoise, z, ts, process, end, sample.jump_costs([*states, end], x_0s, ts, process)

    cost = walk(1e-8)[-1]
    assert cost[torch.triu_indices(101, 101, 1).unbind()].max() < 1e-5 and cost[3, 3] == cost[5, 2] == math.inf
    denoise, z, ts, process, end, cost = walk(0.1)
    assert all(cost[i, i + 1] < 1e-6 for i in range(100)) and cost[0, 50] < cost[0, 99]
    for n in (3, 5, 8):
        path, total = sample.best_steps(cost, n)
        errors = [float((common.sample_euler(denoise, z, t, process) - end).square().mean().sqrt()) for t in (ts[path], process.times(n))]
        assert errors[0] < 0.9 * errors[1], (n, errors)


def test_learn_steps(make, runs, phantom, tmp_path, capsys):
    """Writes times, costs and a picture, no patients; the file is taken, and refused when it is none."""
    source = ['--data', phantom, '--bravo', runs / 'twenty', '--cache', runs / 'cache']
    sample.main(sample.get_args([*map(str, source), '--out', str(tmp_path / 'learned'), '--learn-steps', '4']))
    told = json.loads((tmp_path / 'learned/steps.json').read_text())
    assert sorted(f.name for f in (tmp_path / 'learned').iterdir()) == ['steps.json', 'steps.png']
    assert len(told['times']) == 5 and told['cost'] <= told['cost_of_equal_steps'] and told['run'] == common.load_run(runs / 'twenty').hash
    sample.main(sample.get_args([*map(str, source), '--bravo', str(runs / 'bravo'), '--out', str(tmp_path / 'shifted'), '--learn-steps', '4', '--shift', '0.5']))
    shifted = json.loads((tmp_path / 'shifted/steps.json').read_text())['grid']              # costs are of the times that were walked
    assert shifted == common.RFlow().times(100, shift=0.5).tolist() != common.RFlow().times(100).tolist()
    _, rows = make('used', *source[:4], '--steps-file', tmp_path / 'learned/steps.json', '--sampler', 'dpm++')
    assert {r['steps'] for r in rows} == {'4'} and {r['sampler'] for r in rows} == {'dpm++'}
    for bad in ('{}', '[', '{"times": [1, 0.2, 0.5, 0]}', '{"times": "x"}'):
        (tmp_path / 'bad.json').write_text(bad)
        with pytest.raises(SystemExit) as e:
            make('bad', *source[:4], '--steps-file', tmp_path / 'bad.json')
        assert e.value.code == 2 and '--learn-steps' in capsys.readouterr().err


def test_save_at(make, runs, phantom):
    """The trajectory is kept at the times asked for: it starts as the image's own noise and ends as the image."""
    out, rows = make('t', '--data', phantom, '--bravo', runs / 'bravo', '--steps', 20, '--save-at', '1,.5,.05,0')
    saved = np.load(out / rows[1]['folder'] / 'trajectory.npz')
    assert np.allclose(saved['t'], [1, 0.5, 0.05, 0]) and saved['x_t'].shape == saved['x0_hat'].shape == (4, 16, 16)
    noise = torch.randn(1, 16, 16, generator=common.generator(0, 'image', 1))
    assert np.array_equal(saved['x_t'][0], noise[0].numpy())
    assert np.array_equal(saved['x_t'][-1], read_nifti(out / rows[1]['folder'] / 'bravo.nii.gz')[0][0])


@pytest.mark.parametrize('name', ['bravo64', 'seg64', 'reflow64'])
def test_released_checkpoint(name):
    """Under 4 MB, EMA weights in half precision, nothing that could run; a run like any other."""
    file = Path(__file__).parent.parent / f'assets/{name}.pt'
    state = torch.load(file, weights_only=True)
    assert file.stat().st_size < 4e6 and {v.dtype for v in state['ema'].values() if v.is_floating_point()} == {torch.float16} and 'opt' not in state
    run = common.load_run(file)
    assert run.args.size == 64 and run.args.rflow and len(run.seen['hashes'] if 'hashes' in run.seen else run.seen) > 0


def test_a_set_goes_on_with_what_is_its_own(call, trained, phantom, tmp_path, capsys):
    """An unfinished patient goes, results that somebody keeps there stay; other times in the same file are another set; t near 0 is the last step."""
    source = ('--bravo', trained / 'bravo', '--data', phantom)
    (tmp_path / 'steps.json').write_text('{"times": [1, 0.9, 0]}')
    draw = lambda n, *flags: call('sample', tmp_path / 'set', *source, '--n', n, '--steps-file', tmp_path / 'steps.json', *flags)
    out = draw(1, '--save-at', '0.01')
    assert np.load(out / 'syn_0_000000/trajectory.npz')['t'].tolist() == pytest.approx([0.9])
    for name in ('quality/results', 'syn_0_000007'):
        (out / name).mkdir(parents=True)
    draw(2, '--save-at', '0.01')
    assert sorted(f.name for f in out.iterdir() if f.is_dir()) == ['quality', 'syn_0_000000', 'syn_0_000001']
    (tmp_path / 'steps.json').write_text('{"times": [1, 0.1, 0]}')
    with pytest.raises(SystemExit):
        draw(3, '--save-at', '0.01')
    assert 'made otherwise: times [1.0, 0.1' in capsys.readouterr().err


def test_four_forwards_after_reflow():
    """From the same noise and masks they end nearer to 25 steps of the model that drew the pairs than its own four do, by a third."""
    assets, g = Path(__file__).parent.parent / 'assets', torch.Generator().manual_seed(0)
    noise, mask = torch.randn(8, 1, 64, 64, generator=g), torch.zeros(8, 1, 64, 64)
    for i in range(8):
        mask[i, 0, 20 + 2 * i:26 + 3 * i, 22 + i:30 + i] = 1                     # tumours of 48 to 104 pixels
    ends = {}
    for name, n in (('bravo64', 25), ('bravo64', 4), ('reflow64', 4)):
        run = common.load_run(assets / f'{name}.pt')
        denoise = common.make_denoise(run.net, run.process, common.mask_condition(mask, 0.1), None, None, 'fp32')
        ends[name, n] = common.sample_euler(denoise, noise, run.process.times(n), run.process)
    off = lambda name: (ends[name, 4] - ends['bravo64', 25]).square().mean()
    assert off('reflow64') < 0.67 * off('bravo64')


def test_third_command(tmp_path):
    """Masks and images of the released checkpoints: a head in each image, brighter than what is around it, lesions of a size that training masks have."""
    assets = Path(__file__).parent.parent / 'assets'
    sample.main(sample.get_args(['--seg', str(assets / 'seg64.pt'), '--bravo', str(assets / 'bravo64.pt'), '--n', '4', '--steps', '8', '--seg-steps', '8',
                                 '--device', 'cpu', '--dtype', 'fp32', '--cache', str(tmp_path / 'cache'), '--out', str(tmp_path / 'set')]))
    for folder in sorted((tmp_path / 'set').glob('syn_*')):
        image, mask = read_nifti(folder / 'bravo.nii.gz')[0], read_nifti(folder / 'seg.nii.gz')[0]
        head = common.head_mask(image)
        assert 0.3 < head.mean() < 0.9 and image[head].mean() > image[~head].mean() + 0.4 and mask.mean() < 0.2
