"""Bad input: each ends with exit code 2 and one line that names the value and what was expected, before any work."""
import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

import sample
import train_bravo
import train_seg
from common import find_patients, load_slices, make_phantom, part_of, read_nifti, read_patient, write_patient

BRAVO = [  # flags, what the line must say
    ('--lr 0', ['--lr', "'0'", 'above 0']), ('--lr nan', ["'nan'", 'not a number']), ('--lr fast', ["'fast'"]),
    ('--batch-size 0', ["'0'", 'at least 1']), ('--batch-size 2.5', ["'2.5'", 'whole number']), ('--batch-size 6 --accumulate 4', ['6', 'multiple', '4']),
    ('--iters 5 --minutes 1', ['--iters', '--minutes']), ('--iters -1', ["'-1'"]), ('--minutes 0', ["'0'", 'above 0']),
    ('--channels 8,x', ["'x'"]), ('--channels 8,8,8', ['2 levels', '3']), ('--attention 1', ['1 levels', '2']), ('--attention 0,2', ["'2'", 'at most 1']),
    ('--size 17', ['17', 'multiple of 2']), ('--steps 1', ['--steps 1', 'at least 2']), ('--steps -1', ["'-1'"]),
    ('--channels 8,12 --head-channels 8', ['8', '12 channels']), ('--logit-normal', ['--logit-normal', '--rflow']),
    ('--rflow --target x0', ['x0', 'RFlow']), ('--target w', ["'w'", 'eps']), ('--schedule linearly', ['linearly']),
    ('--init nowhere.pt', ['nowhere.pt', 'no such file']), ('--init-target v', ['--init-target', '--init']), ('--init-range 1,0 --init {bad}', ['1.0', 'rising']),
    ('--rflow --init {bad} --init-target eps', ['eps', 'v or x0-eps']), ('--rflow --init {bad}', ['bad.pt', '--init-target']),
    ('--bogus 1', ['--bogus']), ('--warm 3', ['--warm']), ('--preset huge', ['huge', 'small']), ('--device tpu', ['tpu']),
    ('--perceptual-weights x.pth', ['--perceptual']), ('--perceptual 0.1 --perceptual-weights x.pth', ['x.pth', 'no such file']),
    ('--perceptual 0.1 --perceptual-weights {bad}', ['bad.pt', 'VGG16']), ('--ema-decay 1.5', ["'1.5'", 'at most 1']), ('--clip 0', ["'0'"]),
    ('--empty-slices 2', ["'2'"]), ('--split none.csv', ['none.csv', 'patient,part']), ('--data nowhere', ['nowhere', 'no such folder']),
    ('--data {empty}', ['empty', 'no patient folder']), ('--split {columns}', ['patient,part']), ('--split {part}', ['holdout', 'train']),
    ('--split {missing}', ['has no line for patient']), ('--split {ragged}', ['line 2', 'columns']), ('--out {file}', ['file', 'give a folder']),
]
SAMPLE = [
    ('--bravo {run}', ['--seg, --data, --masks', 'none']), ('--bravo {run} --seg {run} --masks {empty}', ['one place']), ('--data {phantom}', ['--bravo RUN']),
    ('--bravo {run} --data {phantom} --eta 0.5', ['--eta 0.5', 'ddim']), ('--bravo {run} --data {phantom} --steps 101', ['101', 'at most 100']),
    ('--bravo {run} --data {phantom} --steps 4 --save-at .5,.51', ['0.51', 'more --steps']), ('--bravo {run} --data {phantom} --save-at 1.5', ["'1.5'"]),
    ('--seg {run}', ['train_bravo.py']), ('--bravo {empty} --data {phantom}', ['ckpt.pt']), ('--bravo nowhere --data {phantom}', ['nowhere']),
    ('--bravo {bad} --data {phantom}', ['bad.pt']), ('--bravo {run} --data {phantom} --out {foreign}', ['foreign', 'empty folder']),
    ('--bravo {run} --data {phantom} --n 0', ["'0'"]), ('--bravo {run} --masks {empty}', ['no patient folder']),
    ('--bravo {run} --data {phantom} --part holdout', ['holdout', 'judge']),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory, phantom):
    """Files and folders that the flags of the tables name."""
    d = tmp_path_factory.mktemp('places')
    (d / 'empty').mkdir(), (d / 'foreign').mkdir(), (d / 'foreign/thesis.txt').write_text('mine'), (d / 'file').write_text('x')
    torch.save({'a': torch.zeros(1)}, d / 'bad.pt')
    (d / 'columns.csv').write_text('name,group\na,train\n'), (d / 'ragged.csv').write_text('patient,part\na\n')
    (d / 'part.csv').write_text('patient,part\na,holdout\n'), (d / 'missing.csv').write_text('patient,part\na,train\n')
    train_bravo.main(train_bravo.get_args(['--preset', 'tiny', '--rflow', '--steps', '100', '--iters', '1', '--data', str(phantom),
                                           '--cache', str(d / 'cache'), '--out', str(d / 'run')]))
    return {n: d / n for n in ('empty', 'foreign', 'file', 'run', 'cache')} | {'bad': d / 'bad.pt', 'phantom': phantom, 'dir': d} | {
        n: d / f'{n}.csv' for n in ('columns', 'ragged', 'part', 'missing')}


def refused(capsys, action, told):
    """Runs it: SystemExit 2, one line on stderr that says all of `told`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        action()
    lines = capsys.readouterr().err.strip().split('\n')
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), lines
    assert all(str(t) in lines[0] for t in told), lines[0]


@pytest.mark.parametrize('flags,told', BRAVO, ids=[b[0] for b in BRAVO])
def test_train_refuses(places, tmp_path, capsys, flags, told):
    flags = flags.format(**places).split()
    flags += [] if '--data' in flags else ['--data', str(places['phantom'])]
    flags += [] if '--out' in flags else ['--out', str(tmp_path / 'run')]
    refused(capsys, lambda: train_bravo.main(train_bravo.get_args(['--preset', 'tiny', '--cache', str(places['cache']), *flags])), told)
    assert not (tmp_path / 'run/ckpt.pt').exists()


@pytest.mark.parametrize('flags,told', SAMPLE, ids=[s[0] for s in SAMPLE])
def test_sample_refuses(places, tmp_path, capsys, flags, told):
    flags = flags.format(**places).split()
    flags += [] if '--out' in flags else ['--out', str(tmp_path / 'set')]
    refused(capsys, lambda: sample.main(sample.get_args(['--cache', str(places['cache']), *flags])), told)
    assert not list(tmp_path.rglob('*.nii.gz'))


def test_another_run_is_not_overwritten(places, capsys):
    """The same --out with other flags, or another script's."""
    shared = ['--preset', 'tiny', '--rflow', '--data', str(places['phantom']), '--cache', str(places['cache']), '--out', str(places['run'])]
    refused(capsys, lambda: train_bravo.main(train_bravo.get_args([*shared, '--steps', '100', '--iters', '1', '--lr', '0.5'])), ['--lr 0.5', 'was 0.001'])
    refused(capsys, lambda: train_seg.main(train_seg.get_args([*shared, '--steps', '100', '--iters', '1'])), ['--script seg', 'was bravo'])


# ---- damaged and odd files


def patient(root, name='p', image=None, mask=None):
    image = np.full((2, 24, 24), 100.0, np.float32) + np.arange(24, dtype=np.float32) if image is None else image
    write_patient(root / name, {'bravo': image}, np.zeros(image.shape) if mask is None else mask, (5.0, 2.0, 2.0))
    return root / name


def save(path, array):
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def truncate(p):
    data = (p / 'bravo.nii.gz').read_bytes()
    (p / 'bravo.nii.gz').write_bytes(data[:len(data) // 2])


DAMAGE = {
    'truncated gzip': (truncate, ['bravo.nii.gz', 'cannot be read', 'gzip -t']),
    'no NIfTI': (lambda p: (p / 'bravo.nii.gz').write_bytes(gzip.compress(b'hello')), ['bravo.nii.gz', 'cannot be read']),
    '4D': (lambda p: save(p / 'bravo.nii.gz', np.ones((24, 24, 2, 3), np.float32)), ['4 dimensions', 'one 3D volume']),
    'mask of another shape': (lambda p: save(p / 'seg.nii.gz', np.zeros((24, 20, 2), np.uint8)), ['(24, 20, 2)', '(24, 24, 2)', 'resample']),
    'NaN in mask': (lambda p: save(p / 'seg.nii.gz', np.full((24, 24, 2), np.nan, np.float32)), ['seg.nii.gz', 'whole numbers']),
    'fractions in mask': (lambda p: save(p / 'seg.nii.gz', np.full((24, 24, 2), 0.5, np.float32)), ['whole numbers', '0.5']),
    'negative mask': (lambda p: save(p / 'seg.nii.gz', np.full((24, 24, 2), -1, np.int16)), ['whole numbers', '-1']),
    'two candidates': (lambda p: ((p / 'bravo.nii.gz').rename(p / 'x_t1ce.nii.gz'), save(p / 'y_t1c.nii.gz', np.ones((24, 24, 2)))), ['2 files', 'keep one']),
    'groups.csv': (lambda p: (p.parent / 'groups.csv').write_text('dir,who\np,1\n'), ['groups.csv', 'folder,patient']),
    'empty image': (lambda p: save(p / 'bravo.nii.gz', np.zeros((24, 24, 2), np.float32)), ['no head']),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_files(tmp_path, capsys, kind):
    action, told = DAMAGE[kind]
    action(patient(tmp_path / 'data'))
    refused(capsys, lambda: load_slices([tmp_path / 'data'], 16, cache=tmp_path / 'c'), told)
    assert not list((tmp_path / 'c').glob('*/index.json')) and not list((tmp_path / 'c').glob('.*'))


def test_synthetic_of_a_test_patient_is_refused(tmp_path, capsys):
    """Training data made from a held-out patient would leak it."""
    source = next(f'q{i}' for i in range(99) if part_of(f'q{i}') == 'test')
    patient(tmp_path / 'syn', 's0', np.zeros((1, 16, 16), np.float32))
    (tmp_path / 'syn/manifest.csv').write_text(f'folder,source_patient\ns0,{source}\n')
    refused(capsys, lambda: load_slices([tmp_path / 'syn'], 16, cache=tmp_path / 'c'), [source, 'test part', 'training patient'])


def test_defined_answers(tmp_path, capsys):
    """Non-finite voxels become background and are counted; a trailing axis of 1 goes; labels 1-4 are tumour, or those of
    --labels; a folder that lacks a file is named and left out; BraTS names are known."""
    image = np.full((2, 24, 24), 100.0, np.float32)
    image[0, 3, 3], image[1, 4, 4], image[0, 0, 0] = np.nan, np.inf, 7
    mask = np.zeros(image.shape)
    mask[0, 5:9, 5] = [1, 2, 3, 4]
    p = patient(tmp_path / 'data', 'a', image, mask)
    found = find_patients([tmp_path / 'data'], ('bravo', 'seg'))[0]
    images, m, spacing, notes = read_patient(found)
    assert images[0, 0, 3, 3] == images[0, 1, 4, 4] == 7 and notes['non-finite voxels set to background'] == 2
    assert m[0, 5:9, 5].tolist() == [1, 1, 1, 1] and notes['masks with several labels'] == 1
    assert read_patient(found, (1, 4))[1][0, 5:9, 5].tolist() == [1, 0, 0, 1]
    save(p / 'bravo.nii.gz', np.ones((24, 24, 2, 1), np.float32))
    assert read_nifti(p / 'bravo.nii.gz')[0].shape == (2, 24, 24)
    lone = tmp_path / 'data/b'
    patient(tmp_path / 'data', 'b')
    (lone / 'seg.nii.gz').unlink()
    brats = patient(tmp_path / 'data', 'BraTS-MET-00001-000')
    (brats / 'bravo.nii.gz').rename(brats / 'BraTS-MET-00001-000-t1c.nii.gz')
    (brats / 'seg.nii.gz').rename(brats / 'BraTS-MET-00001-000-seg.nii.gz')
    capsys.readouterr()
    assert [p['name'] for p in find_patients([tmp_path / 'data'], ('bravo', 'seg'))] == ['BraTS-MET-00001-000', 'a']
    assert 'left out 1 folders' in (told := capsys.readouterr().out) and 'b (seg)' in told


def test_small_split_says_so(tmp_path, capsys):
    """Three patients leave parts empty: said, with the way out."""
    make_phantom(tmp_path / 'three', 3, 0, 2, 32)
    load_slices([tmp_path / 'three'], 16, cache=tmp_path / 'c')
    assert '--split FILE' in capsys.readouterr().out
