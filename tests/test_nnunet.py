"""evaluate.py downstream --engine nnunetv2: what is written for nnU-Net, and how its programs are called, with others in their place.

tests/parity/test_nnunet.py runs the real ones.
"""
import fcntl
import json
import sys

import nibabel as nib
import numpy as np
import pytest

import common
import evaluate
from test_errors import refused

NAME = 'Dataset001_study'
PROGRAM = '''#!{python}
import json, os, pathlib, sys
import nibabel as nib, numpy as np
program, flags = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
here = pathlib.Path(sys.argv[0]).parent
path = lambda k: pathlib.Path(os.environ['nnUNet_' + k])
with open(here / 'calls.jsonl', 'a') as f:
    f.write(json.dumps([program, flags, {{k: v for k, v in os.environ.items() if k.startswith('nnUNet')}}]) + '\\n')
if program == 'nnUNetv2_plan_and_preprocess':
    out = path('preprocessed') / '{name}'
    out.mkdir(parents=True)
    kwargs = dict(n_stages=3, features_per_stage=[32, 64, 128])
    (out / 'nnUNetPlans.json').write_text(json.dumps(dict(configurations={{'2d': dict(batch_size=300, patch_size=[16, 16], architecture=dict(arch_kwargs=kwargs))}})))
if program == 'nnUNetv2_train':
    if (here / 'fail').exists() and '/both_aug/' in os.environ['nnUNet_raw']:
        print('before\\nRuntimeError: background workers are no longer alive')
        sys.exit(3)
    out = path('results') / '{name}' / (flags[flags.index('-tr') + 1] + '__nnUNetPlans__2d') / 'fold_0'
    out.mkdir(parents=True)
    (out / 'checkpoint_final.pth').write_bytes(b'1')
if program == 'nnUNetv2_predict':
    out = pathlib.Path(flags[flags.index('-o') + 1])
    out.mkdir(exist_ok=True)
    (out / 'plans.json').write_text('{{}}')
    for f in pathlib.Path(flags[flags.index('-i') + 1]).iterdir():
        a = nib.load(f)
        nib.save(nib.Nifti1Image(np.uint8(np.asarray(a.dataobj) > 0.4), a.affine), out / (f.name[:-12] + '.nii.gz'))
'''


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder on the PATH with stand-ins that note how they were called."""
    here = tmp_path / 'bin'
    here.mkdir()
    for name in evaluate.NNUNET:
        (here / name).write_text(PROGRAM.format(python=sys.executable, name=NAME))
        (here / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{here}:/usr/bin:/bin')
    return here


def calls(programs):
    """(program, flags, environment) of each call."""
    return [json.loads(line) for line in (programs / 'calls.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def fake(tmp_path_factory):
    """A synthetic set of three 16 x 16 images."""
    root, g = tmp_path_factory.mktemp('fake'), np.random.default_rng(0)
    for i in range(3):
        m = np.zeros((16, 16), np.uint8)
        m[4:8, 4 + i:9] = 1
        common.write_patient(root / f'syn_0_{i:06d}', {'bravo': np.float32(g.uniform(-1, 1, (16, 16)))}, m, (2.0, 3.0))
    common.write_csv(root / 'manifest.csv', ['folder', 'source_patient'], [[f'syn_0_{i:06d}', ''] for i in range(3)])
    (root / 'sample.json').write_text(json.dumps(dict(bravo='x', box=[0, 0, 1, 1], pixels=16)))
    return root


@pytest.fixture
def study(phantom, cache, fake, tmp_path):
    def go(*flags):
        evaluate.main(evaluate.get_args(['downstream', '--engine', 'nnunetv2', '--data', str(phantom), '--fake', str(fake), '--iters', '40', '--seeds', '1', '--repeats', '20',
                                         '--batch-size', '12', '--width', '8', '--device', 'cpu', '--cache', str(cache), '--out', str(tmp_path / 'out'), *map(str, flags)]))
        return tmp_path / 'out'
    return go


def test_a_study(study, programs, phantom, fake, cache, capsys):
    """Raw layout, plans, splits, commands and environment of each arm; a step that fails is named and tried again; one code scores both engines."""
    (programs / 'fail').touch()
    with pytest.raises(SystemExit) as e:
        study('--arms', 'real', 'both_aug')
    line = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and len(line) == 1 and 'nnUNetv2_train ended with code 3: RuntimeError: background workers are no longer alive; see' in line[0]
    log = line[0].split('; see ')[1].split('. The same')[0]
    assert open(log).read().startswith('before\n') and '/both_aug/' in log
    (programs / 'fail').unlink()
    out = study('--arms', 'real', 'both_aug')
    made = calls(programs)
    plan, train, predict = evaluate.NNUNET
    assert [c[0] for c in made] == [plan, train, predict, plan, train, train, predict]                    # nothing twice but the step that failed
    real, s = common.load_slices([phantom], 16, box=[0, 0, 1, 1], cache=cache), common.load_slices([fake], 16, cache=cache, training=False)
    n = {p: len(real.rows(p)) for p in ('train', 'val', 'test')}
    for arm, own, trainer in (('real', made[:3], 'nnUNetTrainerShortNoDA'), ('both_aug', made[3:4] + made[5:], 'nnUNetTrainerShort')):
        root = (out / 'nnunet' / arm).resolve()
        raw, done = root / 'raw' / NAME, root / 'preprocessed' / NAME
        env = dict(nnUNet_raw=root / 'raw', nnUNet_preprocessed=root / 'preprocessed', nnUNet_results=root / 'results_0', nnUNet_extTrainer=root / 'trainer',
                   nnUNet_def_n_proc=1, nnUNet_compile='f')
        assert all(c[2] == {**{k: str(v) for k, v in env.items()}, 'nnUNet_n_proc_DA': str(int(c[0] != train))} for c in own)
        how = ['-device', 'cpu', '-tr', trainer]
        assert [c[1] for c in own] == [
            ['-d', '1', '-c', '2d', '--verify_dataset_integrity', '-np', '1', '-npfp', '1'], ['1', '2d', '0', *how, '--c'],
            ['-i', str(raw / 'imagesTs'), '-o', str(root / 'found_0'), '-d', '1', '-c', '2d', '-f', '0', *how, '--disable_tta', '-npp', '1', '-nps', '1']]
        train_names = [f'real_{i:06d}' for i in range(n['train'])] + ([f'syn_{n["train"] + i:06d}' for i in range(3)] if arm == 'both_aug' else [])
        val = [f'val_{i:06d}' for i in range(n['val'])]
        assert json.loads((done / 'splits_final.json').read_text()) == [dict(train=train_names, val=val)]
        assert sorted(f.name for f in (raw / 'labelsTr').iterdir()) == [f'{c}.nii.gz' for c in train_names + val]
        assert sorted(f.name for f in (raw / 'imagesTr').iterdir()) == [f'{c}_0000.nii.gz' for c in train_names + val]
        assert sorted(f.name for f in (raw / 'imagesTs').iterdir()) == [f'test_{i:06d}_0000.nii.gz' for i in range(n['test'])]
        assert json.loads((raw / 'dataset.json').read_text()) == dict(channel_names={'0': 'T1'}, labels=dict(background=0, tumour=1), numTraining=len(train_names + val),
                                                                     file_ending='.nii.gz')
        net = json.loads((done / 'nnUNetPlans.json').read_text())['configurations']['2d']
        assert net['batch_size'] == 12 and net['patch_size'] == [16, 16] and net['architecture']['arch_kwargs']['features_per_stage'] == [8, 16, 32]
        for k, (file, images, masks) in {'real_000001': ('Tr', real.images[real.rows('train')[1]], real.masks[real.rows('train')[1]]),
                                         'val_000002': ('Tr', real.images[real.rows('val')[2]], real.masks[real.rows('val')[2]]),
                                         'test_000003': ('Ts', real.images[real.rows('test')[3]], None),
                                         train_names[-1]: ('Tr', *((s.images[2], s.masks[2]) if arm == 'both_aug' else [v[real.rows('train')[-1]] for v in (real.images, real.masks)]))}.items():
            image = nib.load(raw / f'images{file}' / f'{k}_0000.nii.gz')
            assert image.shape == (16, 16, 1) and image.header.get_zooms() == (1, 1, 999) and (np.asarray(image.dataobj)[..., 0].T == images[0]).all()
            assert masks is None or (np.asarray(nib.load(raw / 'labelsTr' / f'{k}.nii.gz').dataobj)[..., 0].T == masks[0]).all()
        text = (root / 'trainer/short.py').read_text()
        assert '= 20, 2, 1, 1' in text
        compile(text, 'short.py', 'exec')
    rows = real.rows('test')
    assert (np.load(out / 'results/real_0.npz')['found'] == (real.images[rows, 0] > 0.4)).all()
    patients = np.array([real.table[i]['patient'] for i in rows])
    spacing = np.array([real.table[i]['spacing'] for i in rows])
    want = [evaluate.patient_metrics(real.images[rows, 0][patients == p] > 0.4, real.masks[rows, 0][patients == p] > 0, spacing[patients == p])['Dice'] for p in sorted({*patients})]
    assert json.loads((out / 'metrics.json').read_text())['arms']['both_aug']['Dice'][0] == pytest.approx(np.mean(want)) and min(want) < max(want)
    study('--arms', 'real', 'both_aug')
    assert len(calls(programs)) == 7
    with pytest.raises(SystemExit) as e:
        study('--iters', 50)
    assert e.value.code == 2 and '--iters 50: nnU-Net trains in 20 equal epochs; give 40 or 60' in capsys.readouterr().err


def test_plans_once_for_all_seeds(study, programs):
    out = study('--arms', 'real_aug', '--seeds', 2, '--iters', 7)
    plan, train, predict = evaluate.NNUNET
    assert [c[0] for c in calls(programs)] == [plan, train, predict, train, predict]
    assert [c[2]['nnUNet_results'][-1] for c in calls(programs)] == list('00011')
    assert '= 7, 1, 1, 1' in (out / 'nnunet/real_aug/trainer/short.py').read_text()


def test_a_program_that_outlived_its_call(study, programs, tmp_path, capsys):
    """It still holds the lock."""
    root = tmp_path / 'out/nnunet/real'
    root.mkdir(parents=True)
    with open(root / 'lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refused(capsys, ['real', 'another process'], study, '--arms', 'real')
    assert not (programs / 'calls.jsonl').exists()


@pytest.mark.parametrize('flags, words', [('--network mednext-s --size 32', 'nnunetv2 --network nnunet'), ('--cross-validate 3', 'nnunetv2 no --cross-validate'), ('--engine mine', "'mine' own"),
                                          ('--split {d}/none.csv', 'val --split')], ids=str)
def test_refused(study, programs, phantom, tmp_path, capsys, flags, words):
    parts = {p.name: common.part_of(p.name) for p in phantom.iterdir()}
    common.write_csv(tmp_path / 'none.csv', ['patient', 'part'], [[k, 'train' if v == 'val' else v] for k, v in parts.items()])
    refused(capsys, words.split(), study, '--arms', 'real', *flags.format(d=tmp_path).split())
    assert not (programs / 'calls.jsonl').exists()


def test_not_installed(study, monkeypatch, capsys):
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    refused(capsys, ['nnUNetv2_plan_and_preprocess', 'PATH', 'pip install nnunetv2'], study)
