"""Every mistake ends in code 2 and one line: what was given, what was expected. Odd data has a defined answer."""
import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

import classifier
import common
from common import find_patients, load_slices, part_of, read_nifti, read_patient


def refused(capsys, words, f, *args):
    """f(*args) ends with code 2 and one line on stderr that holds all the words. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        f(*args)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 1 and lines[0].startswith('error: '), (e.value.code, lines)
    assert all(w in lines[0] for w in words), (words, lines[0])
    return lines[0]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files that are wrong in one way each."""
    root = tmp_path_factory.mktemp('files')
    text = {'columns.csv': 'name,part\na,train\n', 'part.csv': 'patient,part\nphantom_0_000,training\n',
            'short.csv': 'patient,part\nphantom_0_000\n', 'one.csv': 'patient,part\nphantom_0_000,train\n',
            'empty.csv': '', 'notes.txt': 'not a network'}
    for name, content in text.items():
        (root / name).write_text(content)
    (root / 'binary.csv').write_bytes(gzip.compress(b'patient,part\n') + bytes(range(256)))
    (root / 'empty').mkdir()
    (root / 'full').mkdir()
    (root / 'full/thesis.txt').write_text('precious')
    (root / 'run_without').mkdir()
    (root / 'run_without/args.json').write_text('{}')
    networks = {'plain': {'a.weight': torch.zeros(1)}, 'undotted': {'weight': torch.zeros(1)}, 'list': [1, 2],
                'tensor': torch.zeros(3), 'numbers': {'epoch.number': 3},
                'half_attention': {'a.to_q.weight': torch.zeros(2, 2)}}
    for name, content in networks.items():
        torch.save(content, root / f'{name}.pt')
    return root


TRAIN = [  # script, flags, words of the line
    ('bravo', '--lr 0', "--lr '0' above 0"),
    ('bravo', '--lr nan', "--lr 'nan' number above 0"),
    ('bravo', '--lr 1e-4x', "--lr '1e-4x'"),
    ('seg', '--batch-size 0', "--batch-size '0' at least 1"),
    ('bravo', '--batch-size 6 --accumulate 4', '--batch-size 6 multiple --accumulate 4'),
    ('bravo', '--iters 2 --minutes 1', '--iters --minutes give one'),
    ('seg', '--iters -1', "--iters '-1' at least 0"),
    ('seg', '--seed 1' + 400 * '0', '--seed whole number'),
    ('seg', '--iters 1.5', "--iters '1.5' whole number"),
    ('bravo', '--minutes 0', "--minutes '0' above 0"),
    ('bravo', '--channels 8,x', "--channels 'x' whole number"),
    ('bravo', '--attention 0,0,1', '--attention 3 --channels 2'),
    ('bravo', '--attention 0,2', "--attention '2' at most 1"),
    ('bravo', '--size 17', '--size 17 multiple of 2'),
    ('bravo', '--size 4', "--size '4' at least 8"),
    ('bravo', '--steps 1', '--steps 1 at least 2 --rflow'),
    ('bravo', '--steps -1', "--steps '-1' at least 0"),
    ('bravo', '--head-channels 3', '--head-channels 3 divide 8'),
    ('bravo', '--model transformer', "--model 'transformer' unet dit mmdit mamba"),
    ('bravo', '--model dit --channels 8,8', '--channels --model unet dit'),
    ('seg', '--model mamba --norm-groups 2', '--norm-groups --model unet mamba'),
    ('seg', '--patch 4', '--patch --model dit mmdit mamba unet'),
    ('bravo', '--model-size S', '--model-size --model dit unet'),
    ('bravo', '--model dit --model-size S --depth 2', '--model-size S --depth give one'),
    ('bravo', '--model dit --model-size M', "--model-size 'M' S B L XL"),
    ('bravo', '--model dit --patch 3', '--size 16 patches multiple of 3'),
    ('bravo', '--model mmdit --heads 3', '--heads 3 divide --width 16'),
    ('bravo', '--model dit --depth 0', "--depth '0' at least 1"),
    ('seg', '--model mmdit', '--model mmdit --controllable dit'),
    ('bravo', '--rflow --model dit --init {trained}/bravo', '--init model unet dit agree'),
    ('bravo', '--rflow --model dit --init {files}/plain.pt --init-target v', '--init-target v MONAI U-Net dit'),
    ('bravo', '--logit-normal', '--logit-normal --rflow'),
    ('bravo', '--rflow --target x0', '--target x0 RFlow v'),
    ('bravo', '--target x', "--target 'x' eps v x0"),
    ('bravo', '--schedule quadratic', "--schedule 'quadratic' linear cosine laplace"),
    ('bravo', '--schedule-width 2', '--schedule-width 2 laplace cauchy'),
    ('bravo', '--schedule cosine --uniform-mix 0.1', '--uniform-mix 0.1 laplace cauchy'),
    ('bravo', '--rflow --schedule laplace --logit-normal', '--logit-normal --schedule laplace give one'),
    ('seg', '--rflow --schedule cauchy --curriculum 4', '--schedule cauchy --curriculum give one'),
    ('seg', '--dense-tail 0.5', '--dense-tail 0.5 --sparse24'),
    ('bravo', '--prune 0.3', '--prune 0.3 --init RUN'),
    ('bravo', '--prune-by taylor', '--prune-by taylor --prune R'),
    ('bravo', '--rflow --init {trained}/bravo --prune 0.3 --sparse24', '--prune --sparse24 give one'),
    ('bravo', '--rflow --init {trained}/bravo --prune 0.95', "--prune '0.95' at most 0.9"),
    ('bravo', '--rflow --model dit --init {trained}/bravo --prune 0.3 --prune-how channels', '--prune-how channels unet weights'),
    ('bravo', '--vae 2 --dtype pure-bf16', '--dtype pure-bf16 autoencoder'),
    ('bravo', '--curriculum 1', '--curriculum 1 give 2'),
    ('bravo', '--kahan', '--kahan --dtype pure-bf16'),
    ('bravo', '--progressive 16', '--progressive 16 two or more rising'),
    ('bravo', '--progressive 32,16', '--progressive 32,16 rising'),
    ('bravo', '--progressive 16,33', '--progressive 33 multiple of 2'),
    ('seg', '--progressive 16,32 --size 64', '--size 64 --progressive 32'),
    ('seg', '--fft 1', '--fft --help'),
    ('bravo', '--fft -1', "--fft '-1' at least 0"),
    ('seg', '--ema-decay 1.5', "--ema-decay '1.5' at most 1"),
    ('seg', '--clip 0', "--clip '0' above 0"),
    ('seg', '--labels 0', "--labels '0' at least 1"),
    ('seg', '--empty-slices 2', "--empty-slices '2' at most 1"),
    ('seg', '--seed x', "--seed 'x' whole number"),
    ('seg', '--no-such-flag 3', '--no-such-flag --help'),
    ('seg', '--lr-fin', '--lr-fin --help'),
    ('seg', '--perceptual 1', '--perceptual --help'),
    ('bravo', '--init none.pt', '--init none.pt no such file'),
    ('bravo', '--init-target eps', '--init-target --init'),
    ('bravo', '--init-range 0,1', '--init-range --init'),
    ('bravo', '--init {trained}/bravo --init-range 1,0', '--init-range 1 0 two rising'),
    ('bravo', '--init {trained}/bravo --init-range 0', '--init-range two rising'),
    ('bravo', '--init {trained}/bravo', '--init rflow True False agree'),
    ('bravo', '--rflow --init {trained}/bravo --init-range 0,1', '--init-range MONAI run of ours'),
    ('bravo', '--rflow --schedule linear', '--schedule linear DDPM'),
    ('bravo', '--rflow --init {trained}/seg', '--init does not fit conv_in'),
    ('bravo', '--rflow --channels 8,16 --init {trained}/bravo', '--init does not fit --channels'),
    ('bravo', '--rflow --init {files}/plain.pt', '--init --init-target'),
    ('bravo', '--rflow --init {files}/plain.pt --init-target eps', '--init-target eps RFlow v'),
    ('bravo', '--init {files}/plain.pt --init-target eps', '--init does not fit missing'),
    ('bravo', '--init {files}/undotted.pt --init-target eps', '--init undotted.pt'),
    ('bravo', '--init {files}/half_attention.pt --init-target eps', '--init half_attention.pt'),
    ('bravo', '--rflow --init {files}/plain.pt --init-target x0-eps', '--init plain.pt'),
    ('bravo', '--init {files}/list.pt --init-target eps', '--init list.pt'),
    ('bravo', '--init {files}/tensor.pt --init-target eps', '--init tensor.pt'),
    ('bravo', '--init {files}/numbers.pt --init-target eps', '--init numbers.pt'),
    ('bravo', '--init {files}/notes.txt --init-target eps', 'notes.txt loaded safely'),
    ('bravo', '--init {files}/run_without', 'run_without ckpt.pt'),
    ('bravo', '--perceptual-weights {files}/plain.pt', '--perceptual-weights without --perceptual'),
    ('bravo', '--perceptual 0.1 --perceptual-weights none.pth', '--perceptual-weights none.pth no such file'),
    ('bravo', '--perceptual 0.1 --lpips-weights none.pth', '--lpips-weights none.pth no such file'),
    ('bravo', '--perceptual 0.1 --perceptual-weights {files}/plain.pt', 'weights plain.pt features.0.weight'),
    ('bravo', '--perceptual 0.1 --perceptual-weights {files}/list.pt', 'weights list.pt features.0.weight'),
    ('bravo', '--perceptual 0.1 --perceptual-weights {files}/tensor.pt', 'weights tensor.pt features.0.weight'),
    ('bravo', '--perceptual -1', "--perceptual '-1' at least 0"),
    ('seg', '--data none', '--data none no such folder one folder a patient'),
    ('seg', '--data {files}/empty', '--data empty bravo, seg'),
    ('seg', '--data {files}/notes.txt', '--data notes.txt folder'),
    ('seg', '--split none.csv', '--split none.csv patient,part'),
    ('seg', '--split {files}/columns.csv', '--split columns.csv patient,part'),
    ('seg', '--split {files}/part.csv', "--split 'training' phantom_0_000 train, val"),
    ('seg', '--split {files}/one.csv', '--split one.csv phantom_0_001 add it'),
    ('seg', '--split {files}/short.csv', 'short.csv line 2 columns'),
    ('seg', '--split {files}/empty.csv', '--split empty.csv patient,part'),
    ('seg', '--split {files}/binary.csv', 'binary.csv'),
    ('bravo', '--rflow --size 8 --perceptual 0.01', '--perceptual 0.01 --size 16'),
    ('bravo', '--vae 2 --gan 0.5 --size 8', '--gan 0.5 --size 12'),
    ('seg', '--out {files}/notes.txt', '--out notes.txt is a file'),
    ('seg', '--out {files}/notes.txt/run', '--out notes.txt/run is a file'),
    ('seg', '--out {files}/notes.txt/run', '--out notes.txt/run folder'),
    ('seg', '--cache {files}/notes.txt', '--cache notes.txt folder'),
]


@pytest.mark.parametrize('script, flags, words', TRAIN, ids=[f'{s} {f}' for s, f, _ in TRAIN])
def test_training_refuses(call, trained, files, tmp_path, capsys, script, flags, words):
    given = flags.format(trained=trained, files=files).split()
    refused(capsys, words.split(), call, script, tmp_path / 'out', *given)
    assert not list((tmp_path / 'out').glob('*.pt*'))


OTHER = [('--lr 0.002', '--lr 0.002 0.001 another --out'), ('--iters 8', '--iters 8 4'), ('--seed 5', '--seed 5 0'),
         ('--augment', '--augment affine False'), ('--size 32', '--size 32 16')]


@pytest.mark.parametrize('flags, words', OTHER, ids=[f for f, _ in OTHER])
def test_resuming_with_other_flags_is_refused(call, trained, capsys, flags, words):
    """The run is left as it was."""
    before = {f: f.read_bytes() for f in (trained / 'seg').iterdir()}
    refused(capsys, words.split(), call, 'seg', trained / 'seg', '--rflow', *flags.split())
    assert before == {f: f.read_bytes() for f in (trained / 'seg').iterdir()}


def test_a_run_of_an_older_version_starts_anew(call, trained, tmp_path, capsys):
    state = common.load_checkpoint(trained / 'seg')
    del state['curriculum']
    (tmp_path / 'old').mkdir()
    torch.save(state, tmp_path / 'old/ckpt.pt')
    refused(capsys, ['older version', '--init'], call, 'seg', tmp_path / 'old', '--rflow')


def test_resuming_the_other_script_or_a_foreign_checkpoint_is_refused(call, trained, files, tmp_path, capsys):
    refused(capsys, ['--out', 'train_seg.py', 'another'], call, 'bravo', trained / 'seg', '--rflow')
    for name in ('plain', 'list', 'tensor'):
        (tmp_path / name).mkdir()
        shutil.copy(files / f'{name}.pt', tmp_path / name / 'ckpt.pt')
        refused(capsys, ['no training to resume', '--out'], call, 'bravo', tmp_path / name)


SAMPLE = [
    ('--bravo {trained}/bravo', '--seg --data --masks none'),
    ('--bravo {trained}/bravo --seg {trained}/seg --data {phantom}', 'one --seg, --data'),
    ('--data {phantom}', '--data --bravo'),
    ('--masks {phantom}', '--masks --bravo'),
    ('--bravo {trained}/bravo --data {phantom} --eta 0.5', '--eta 0.5 ddim'),
    ('--bravo {trained}/ddpm --data {phantom} --steps 60', '--steps 60 grid of 50 at most'),
    ('--bravo {trained}/ddpm --data {phantom} --sampler ddpm --steps 51', '--steps 51 grid of 50'),
    ('--bravo {trained}/bravo --data {phantom} --steps 0', "--steps '0' at least 1"),
    ('--bravo {trained}/bravo --data {phantom} --save-at .5,.51 --steps 4', '--save-at 0.5,0.51 4 more --steps'),
    ('--bravo {trained}/bravo --data {phantom} --save-at 1.5', "--save-at '1.5' at most 1"),
    ('--seg {trained}/seg --save-at .5', '--save-at --bravo'),
    ('--bravo {trained}/seg --data {phantom}', '--bravo seg train_seg.py'),
    ('--seg {trained}/bravo', '--seg bravo train_bravo.py'),
    ('--seg {files}/run_without', 'run_without ckpt.pt'),
    ('--seg none', '--seg none no such run folder'),
    ('--seg {files}/plain.pt', 'plain.pt train_seg.py train_bravo.py'),
    ('--seg {files}/list.pt', 'list.pt train_seg.py'),
    ('--seg {files}/tensor.pt', 'tensor.pt train_seg.py'),
    ('--seg {files}/notes.txt', 'notes.txt loaded safely'),
    ('--bravo {trained}/bravo --masks none', '--masks none no such folder'),
    ('--bravo {trained}/bravo --masks {files}/empty', 'empty seg'),
    ('--bravo {trained}/bravo --data none', '--data none no such folder'),
    ('--bravo {trained}/bravo --data {files}/empty', '--data empty bravo, seg'),
    ('--bravo {trained}/bravo --data {phantom} --part all', "--part 'all' train val judge test"),
    ('--bravo {trained}/bravo --data {phantom} --split none.csv', '--split none.csv patient,part'),
    ('--bravo {trained}/bravo --data {phantom} --sampler magic', "--sampler 'magic' euler heun"),
    ('--seg {trained}/seg --n 0', "--n '0' at least 1"),
    ('--seg {trained}/seg --slice-level 2', "--slice-level '2' at most 1"),
    ('--seg {trained}/seg --out {files}/full', '--out full empty folder'),
    ('--seg {trained}/seg --out {files}/notes.txt', '--out notes.txt folder'),
    ('--seg {trained}/seg --seg-step 3', '--seg-step --help'),
    ('--seg {trained}/seg --part test', '--part test without --data'),
    ('--bravo {trained}/ddpm --data {phantom} --sampler adaptive', '--sampler adaptive RFlow dpm++'),
    ('--bravo {trained}/bravo --data {phantom} --sampler adaptive --steps 5', '--steps adaptive'),
    ('--bravo {trained}/bravo --data {phantom} --sampler adaptive --shift 2', '--shift adaptive'),
    ('--bravo {trained}/bravo --data {phantom} --sampler euler --tol 0.1', '--tol 0.1 adaptive'),
    ('--bravo {trained}/bravo --data {phantom} --pair bs23', '--pair bs23 adaptive'),
    ('--bravo {trained}/bravo --data {phantom} --shift 0', "--shift '0' above 0"),
    ('--seg {trained}/seg --empty-slices 0', '--empty-slices 0.0 without --data'),
    ('--bravo {trained}/bravo --data {phantom} --seg-steps 3', '--seg-steps 3 without --seg'),
    ('--seg {trained}/seg --steps 3', '--steps 3 without --bravo'),
    ('--bravo {trained}/bravo --data {phantom} --threshold 0.5', '--threshold 0.5 without --gate'),
    ('--bravo {trained}/bravo --data {phantom} --best-of 4', '--best-of 4 without --gate'),
    ('--bravo {trained}/bravo --data {phantom} --rate 0.06', '--rate 0.06 without --gate'),
    ('--bravo {trained}/bravo --data {phantom} --max-draws 9', '--max-draws 9 without --reject-copies'),
    ('--bravo {trained}/bravo --data {phantom} --gate {detector} --threshold 0', "--threshold '0' above 0"),
    ('--bravo {trained}/bravo --data {phantom} --gate {detector} --best-of 4 --max-draws 3', '--max-draws 3 less --best-of 4'),
    ('--bravo {trained}/bravo --data {phantom} --gate {detector} --learn-steps 4', '--gate leave --learn-steps'),
    ('--bravo {trained}/bravo --data {phantom} --gate {detector} --pairs', '--gate leave --pairs'),
    ('--bravo {trained}/bravo --data {phantom} --gate none', '--gate none no such run folder'),
    ('--bravo {trained}/bravo --data {phantom} --gate {trained}/bravo', 'bravo not a detector classifier.py train'),
    ('--bravo {trained}/bravo --data {phantom} --gate {judge}', '--gate judge reports select training'),
    ('--seg {trained}/seg --gate {detector}', '--gate without --bravo'),
    ('--seg {trained}/seg --reject-copies {phantom}', '--reject-copies without --bravo'),
    ('--bravo {trained}/bravo --data {phantom} --reject-copies none', '--data none no such folder'),
    ('--bravo {trained}/bravo --data {phantom} --reject-copies {phantom} --split {files}/one.csv', '--split one.csv phantom_0_001 add it'),
    ('--bravo {trained}/bravo --data {phantom} --per-patient 0', "--per-patient '0' at least 1"),
    ('--bravo {trained}/bravo --data {phantom} --per-patient 3 --n 4', '--n --per-patient give one'),
    ('--seg {trained}/seg --per-patient 3', '--per-patient 3 without --data'),
    ('--bravo {trained}/bravo --data {phantom} --lora-scale 0.5', '--lora-scale 0.5 no run of draft.py'),
    ('--bravo {trained}/bravo --data {phantom} --lora-scale 2', "--lora-scale '2' at most 1"),
    ('--bravo {trained}/bravo --data {phantom} --lora-scale 0 --weights raw', '--weights raw --lora-scale'),
    ('--seg {trained}/seg --lora-scale 0.5', '--lora-scale 0.5 without --bravo'),
    ('--bravo {trained}/bravo --data {phantom} --slice-level 0.3', '--slice-level 0.3 trained without'),
    ('--bravo {trained}/bravo --data {phantom} --out {files}/notes.txt/set', '--out notes.txt/set folder'),
]


@pytest.mark.parametrize('flags, words', SAMPLE, ids=[f for f, _ in SAMPLE])
def test_sampling_refuses(call, trained, phantom, files, detector, tmp_path, capsys, flags, words):
    """And leaves no folder of a patient, nor anything in a folder that is not its own."""
    given = flags.format(trained=trained, phantom=phantom, files=files, detector=detector(), judge=detector('judge')).split()
    refused(capsys, words.split(), call, 'sample', tmp_path / 'out', *given)
    assert not list((tmp_path / 'out').glob('syn_*')) and [f.name for f in (files / 'full').iterdir()] == ['thesis.txt']


DRAFT = [
    ('--lv 2 --k 3', '--lv 2 --k 3 last step'),
    ('--k 0', "--k '0' at least 1"),
    ('--k 4', '--k 4 3 solver steps'),
    ('--steps 60 --bravo {trained}/ddpm', '--steps 60 grid of 50'),
    ('--sampler adaptive', "--sampler 'adaptive'"),
    ('--bravo none', '--bravo none no such run folder'),
    ('--bravo {trained}/seg', '--bravo seg train_seg.py'),
    ('--reward none', '--reward none no such run folder'),
    ('--reward {trained}/bravo', 'bravo not a detector'),
    ('--reward {judge}', '--reward judge reports select training'),
    ('--data none', '--data none no such folder'),
    ('--split {files}/trains.csv', '--data 0 val --split'),
    ('--lr 0', "--lr '0' above 0"),
    ('--rank 0', "--rank '0' at least 1"),
    ('--alpha 0', "--alpha '0' above 0"),
    ('--penalty -1', "--penalty '-1' at least 0"),
    ('--held-out 1', "--held-out '1' at least 2"),
    ('--seeds 1', "--seeds '1' at least 2"),
    ('--out {files}/notes.txt', '--out notes.txt is a file'),
]


@pytest.mark.parametrize('flags, words', DRAFT, ids=[f for f, _ in DRAFT])
def test_draft_refuses(call, trained, phantom, files, detector, tmp_path, capsys, flags, words):
    (files / 'trains.csv').write_text('patient,part\n' + ''.join(f'{p.name},train\n' for p in phantom.iterdir()))
    given = flags.format(trained=trained, files=files, judge=detector('judge')).split()
    refused(capsys, words.split(), call, 'draft', tmp_path / 'out', '--bravo', trained / 'bravo', '--reward', detector(), *given)
    assert not list((tmp_path / 'out').glob('*.pt*'))


@pytest.mark.parametrize('flags, words', [('--lr 0.1', '--lr 0.1 (was 0.0003)'), ('--k 2', '--k 2'), ('--rank 4', '--rank 4 (was 8)'), ('--bravo {trained}/ddpm', '--bravo another --out')],
                         ids=str)
def test_going_on_with_another_draft_is_refused(call, trained, detector, tmp_path_factory, capsys, flags, words):
    given = ['--bravo', trained / 'bravo', '--reward', detector(), '--iters', 1]
    out = tmp_path_factory.getbasetemp() / 'drafted'
    if not out.exists():
        call('draft', out, *given)
    before = (out / 'ckpt.pt').read_bytes()
    refused(capsys, words.split(), call, 'draft', out, *given, *flags.format(trained=trained).split())
    refused(capsys, ['--draft', 'another --out'], call, 'bravo', out, '--rflow', '--lr', 0.01)
    assert before == (out / 'ckpt.pt').read_bytes()


DETECT = [
    ('', 'COMMAND --help'),
    ('find', "'find' corrupt"),
    ('corrupt --data none', '--data none no such folder'),
    ('corrupt --data {files}/empty', '--data empty bravo, seg'),
    ('corrupt --data {made}', '--data set neither real --answers'),
    ('corrupt --data {phantom} --out {files}/full', '--out full not empty'),
    ('corrupt --data {phantom} --severities 1,4', "--severities '4' at most 3"),
    ('corrupt --data {phantom} --part all', "--part 'all' train val judge test"),
    ('corrupt --data {phantom} --split {files}/part.csv', "--split 'training' phantom_0_000"),
    ('label', '--sets required'),
    ('label --sets none', '--sets none no such folder'),
    ('label --sets {files}/empty', 'empty bravo, seg'),
    ('label --sets {phantom} --rater a,b', "--rater 'a,b' name letters"),
    ('label --sets {phantom} --rater=-x', "--rater '-x' name letters"),
    ('label --sets {phantom} --again 2', "--again '2' at most 1"),
    ('label --sets {phantom} --port 70000', "--port '70000' at most 65535"),
    ('label --sets {phantom} --out {files}/notes.txt', '--out notes.txt is a file'),
    ('train --data none', '--data none no such folder'),
    ('train --data {made}', '--data set neither real --answers'),
    ('train --data {phantom} --iters 2 --minutes 1', '--iters --minutes give one'),
    ('train --data {phantom} --answers {files}/empty', '--answers empty labels.csv'),
    ('train --data {phantom} --answers none', '--answers none no such folder'),
    ('train --data {phantom} --iters 1 --answers {files}/answers', "--answers answers verdict 'fine' good, bad, unsure"),
    ('train --data {phantom} --iters 1 --answers {files}/gone', '--answers {files}/nowhere no folder here'),
    ('train --data {phantom} --iters 1 --answers {files}/silent', '--answers silent no answer'),
    ('train --data {phantom} --probe none.pth', '--probe none.pth no such file'),
    ('train --data {phantom} --probe {files}/notes.txt', '--probe judged images --answers'),
    ('train --data {phantom} --leave-out colour', "--leave-out 'colour' anatomical"),
    ('train --data {phantom} --leave-out anatomical textural boundary intensity artefact conditioning', '--leave-out no family'),
    ('train --data {phantom} --target-tpr 0', "--target-tpr '0' above 0"),
    ('train --data {phantom} --part val', "--part 'val' train judge"),
    ('train --data {phantom} --iters 1 --split {files}/all.csv', '--data no slice of a val patient --split'),
    ('train --data {phantom} --iters 1 --out {trained}/seg', '--out train_seg.py another --out'),
    ('score --detector {trained}/seg', '--data required'),
    ('score --data {phantom} --detector {trained}/seg', 'seg is not a detector classifier.py train'),
    ('score --data {phantom} --detector {files}/list.pt', 'list.pt is not a detector'),
    ('score --data {phantom} --detector {files}/half.pt', 'half.pt unfinished step 3 again'),
    ('score --data {phantom} --detector {files}/foreign.pt', 'foreign.pt weights do not fit train it again'),
    ('score --data {phantom} --detector {files}/notes.txt', 'notes.txt loaded safely'),
    ('score --data {phantom} --detector none', 'none no such run folder'),
    ('score --data {phantom} --detector {trained}/seg --prior 1', '--prior 1.0 below 1'),
]


@pytest.mark.parametrize('flags, words', DETECT, ids=[f for f, _ in DETECT])
def test_the_classifier_refuses(trained, phantom, files, cache, tmp_path, capsys, flags, words):
    made = tmp_path / 'set'
    shutil.copytree(phantom / 'phantom_0_000', made / 'phantom_0_000')
    (made / 'manifest.csv').write_text('folder,source_patient\nphantom_0_000,\n')
    for name, rows in (('answers', f'a,1,{phantom},x,fine,,,1,0,\n'), ('gone', f'a,1,{files}/nowhere,x,good,,,1,0,\n'), ('silent', '')):
        (files / name).mkdir(exist_ok=True)
        (files / name / 'labels.csv').write_text(','.join(common.LABELS) + '\n' + rows)
    (files / 'all.csv').write_text('patient,part\n' + ''.join(f'{p.name},train\n' for p in phantom.iterdir()))
    whole = dict(best={'a': torch.zeros(1)}, temperature=1.0, threshold=0.5, prior=0.5, box=[0, 0, 1, 1], args=dict(size=16, part='train'), step=3)
    torch.save(whole, files / 'foreign.pt')
    torch.save({**whole, 'temperature': None}, files / 'half.pt')
    given = flags.format(trained=trained, phantom=phantom, files=files, made=made).split()
    more = ['--out', tmp_path / 'out'] if given and '--out' not in given else []
    more += ['--cache', cache] if given else []
    more += ['--size', 16, '--device', 'cpu'] if given and given[0] == 'train' else []
    refused(capsys, words.format(files=files).split(), lambda: classifier.main(classifier.get_args([*given, *map(str, more)])))
    assert not list((tmp_path / 'out').glob('*.pt*')) and [f.name for f in (files / 'full').iterdir()] == ['thesis.txt']


def test_labelling_the_same_folder_twice_or_changed_images_is_refused(phantom, cache, tmp_path, capsys):
    import fcntl
    out = tmp_path / 'out'
    out.mkdir()
    go = lambda: classifier.main(classifier.get_args(['label', '--sets', str(phantom), '--size', '16', '--out', str(out), '--cache', str(cache)]))
    with open(out / 'lock', 'w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(capsys, ['--out', 'another classifier.py label'], go)
    row = load_slices([phantom], 16, cache=cache).table[0]
    (out / 'items.csv').write_text(f'item,set,folder,z\n{"0" * 16},{row["root"]},{row["folder"]},{row["z"]}\n')
    refused(capsys, ['--out', 'changed', 'another --out'], go)


@pytest.mark.parametrize('script', ['seg', 'bravo', 'sample', 'draft'])
def test_help(call, tmp_path, capsys, script):
    with pytest.raises(SystemExit) as e:
        call(script, tmp_path, '--help')
    assert e.value.code == 0 and '--out' in capsys.readouterr().out


# -- data files -------------------------------------------------------------------------------------------------------


def volume(f):
    return np.asarray(nib.load(f).dataobj), nib.load(f).affine


def save(f, a, dtype=None, like=None):
    nib.save(nib.Nifti1Image(np.asarray(a, dtype), volume(like or f)[1]), f)


def edit(name, change, dtype=np.float32):
    """A change of one file of the first patient's voxels."""
    return lambda p: save(p / name, change(volume(p / name)[0].astype(np.float32)), dtype)


def put(value):
    def change(a):
        a[5, 5, 1] = value
        return a
    return change


def header(at, data):
    """Overwrites bytes of the first patient's image from that place in its header on."""
    def change(p):
        raw = bytearray(gzip.decompress((p / 'bravo.nii.gz').read_bytes()))
        raw[at:at + len(data)] = data
        (p / 'bravo.nii.gz').write_bytes(gzip.compress(bytes(raw)))
    return change


def colour(p):
    a = volume(p / 'bravo.nii.gz')[0]
    rgb = np.zeros(a.shape, [('R', 'u1'), ('G', 'u1'), ('B', 'u1')])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), p / 'bravo.nii.gz')


def cut(p, keep=0.5):
    f = p / 'bravo.nii.gz'
    f.write_bytes(f.read_bytes()[:int(len(f.read_bytes()) * keep)])


def cut_plain(p):
    save(p / 'bravo.nii', volume(p / 'bravo.nii.gz')[0], like=p / 'bravo.nii.gz')
    (p / 'bravo.nii.gz').unlink()
    (p / 'bravo.nii').write_bytes((p / 'bravo.nii').read_bytes()[:1000])


def two_files(p):
    shutil.copy(p / 'bravo.nii.gz', p / 'x_t1ce.nii.gz')
    (p / 'bravo.nii.gz').rename(p / 'x_t1c.nii.gz')


def table(name, content):
    """Puts a CSV file into the data folder."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda p: (p.parent / name).write_bytes(content)


def content(name, data):
    return lambda p: (p / name).write_bytes(data)


DATA = {
    'truncated gzip': (cut, 'bravo.nii.gz cannot be read gzip -t'),
    'empty file': (content('seg.nii.gz', b''), 'seg.nii.gz cannot be read'),
    'text file': (content('bravo.nii.gz', b'hello'), 'bravo.nii.gz cannot be read'),
    'gzipped text': (content('bravo.nii.gz', gzip.compress(b'hello' * 200)), 'bravo.nii.gz cannot be read'),
    'truncated nii': (cut_plain, 'bravo.nii cannot be read'),
    'unknown voxel type': (header(70, np.int16(9999).tobytes()), 'bravo.nii.gz cannot be read'),
    'affine of NaN': (header(280, np.full(12, np.nan, np.float32).tobytes()), 'bravo.nii.gz'),
    'affine of zeros': (header(280, bytes(48)), 'bravo.nii.gz'),
    'colour': (colour, 'bravo.nii.gz'),
    '4D': (edit('bravo.nii.gz', lambda a: np.stack([a, a], -1)), 'bravo.nii.gz 4 dimensions (32, 32, 3, 2) 3D'),
    'mask of another shape': (edit('seg.nii.gz', lambda a: a[:-2]), 'seg.nii.gz (30, 32, 3) (32, 32, 3) resample'),
    'mask with NaN': (edit('seg.nii.gz', put(np.nan)), 'seg.nii.gz mask whole numbers nan'),
    'mask with a fraction': (edit('seg.nii.gz', put(0.5)), 'seg.nii.gz mask whole numbers'),
    'negative mask': (edit('seg.nii.gz', put(-1), np.int16), 'seg.nii.gz mask from 0 -1'),
    'groups columns': (table('groups.csv', 'dir,patient\na,b\n'), 'groups.csv dir,patient expected folder,patient'),
    'groups short line': (table('groups.csv', 'folder,patient\na,b\nc\n'), 'groups.csv line 3 columns'),
    'groups long line': (table('groups.csv', 'folder,patient\na,b,c\n'), 'groups.csv line 2 columns'),
    'groups binary': (table('groups.csv', bytes(range(128, 256))), 'groups.csv'),
    'manifest columns': (table('manifest.csv', 'a,b\n1,2\n'), 'manifest.csv folder source_patient'),
    'two files for one modality': (two_files, 'phantom_0_000 bravo x_t1c.nii.gz x_t1ce.nii.gz keep one'),
}


@pytest.fixture
def data(tmp_path, phantom):
    shutil.copytree(phantom, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.mark.parametrize('name', DATA)
def test_data_is_refused(call, data, tmp_path, capsys, name):
    """The line names the file; neither a checkpoint nor a half-written cache is left."""
    change, words = DATA[name]
    change(data / 'phantom_0_000')
    refused(capsys, words.split(), call, 'bravo', tmp_path / 'out', '--data', data, '--cache', tmp_path / 'cache')
    assert not list((tmp_path / 'out').glob('*.pt*')) and not list((tmp_path / 'cache').glob('.*'))


def test_no_head_is_refused(call, data, tmp_path, capsys):
    for p in data.iterdir():
        save(p / 'bravo.nii.gz', np.zeros((32, 32, 3)), np.uint8)
    flags = ['--data', data, '--cache', tmp_path / 'cache']
    refused(capsys, ['--data', 'no head'], call, 'bravo', tmp_path / 'out', *flags)


def test_synthetic_patient_of_a_test_patient_is_refused(call, phantom, tmp_path, capsys):
    """A set made from a test patient's mask never trains; made from a training patient's, or from none, it does."""
    names = {part: next(f.name for f in sorted(phantom.iterdir()) if part_of(f.name) == part) for part in common.PARTS}
    for part, source in (*names.items(), ('drawn', '')):
        made = tmp_path / part
        shutil.copytree(phantom / names['train'], made / 'syn_0_000000')
        (made / 'manifest.csv').write_text(f'folder,source_patient\nsyn_0_000000,{source}\n')
        flags = ['--rflow', '--iters', 1, '--data', phantom, made, '--cache', tmp_path / 'cache']
        if part in ('train', 'drawn'):
            call('bravo', tmp_path / f'out_{part}', *flags)
            assert '14 real and 1 synthetic' in capsys.readouterr().out
        else:
            refused(capsys, [source, part, 'training patient'], call, 'bravo', tmp_path / f'out_{part}', *flags)


# -- odd data with a defined answer -----------------------------------------------------------------------------------


def patient(root, name='phantom_0_000'):
    return next(p for p in find_patients([root], ('bravo', 'seg')) if p['name'] == name)


def test_voxels_that_are_no_numbers_become_background(data, tmp_path, capsys):
    """Counted, printed, and the lowest value of the image; the rest of the image is untouched."""
    f = data / 'phantom_0_000/bravo.nii.gz'
    before = read_patient(patient(data))[0]
    a = volume(f)[0].astype(np.float32)
    a[5, 5, 1], a[6, 5, 1], a[7, 5, 1] = np.nan, np.inf, -np.inf
    save(f, a, np.float32)
    images, _, _, notes = read_patient(patient(data))
    changed = images != before
    assert notes['non-finite voxels set to background'] == 3
    assert changed.sum() <= 3 and (images[changed] == before.min()).all()
    made = load_slices([data], 16, cache=tmp_path / 'c')
    assert '3 non-finite voxels set to background' in capsys.readouterr().out and np.isfinite(made.images).all()


def test_a_fourth_dimension_of_one_is_dropped(data):
    f = data / 'phantom_0_000/bravo.nii.gz'
    before = read_nifti(f)
    save(f, volume(f)[0][..., None])
    after = read_nifti(f)
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]


def test_label_maps(data, tmp_path, capsys):
    """Labels 1..4 count as tumour, all of them or those of --labels; the file's 1..4 never reach the network."""
    save(data / 'phantom_0_000/seg.nii.gz', np.arange(32 * 32 * 3).reshape(32, 32, 3) // 64 % 5, np.uint8)
    p, labels = patient(data), read_nifti(data / 'phantom_0_000/seg.nii.gz')[0]
    for chosen, wanted in ((None, labels > 0), ((1, 4), (labels == 1) | (labels == 4)), ((2,), labels == 2)):
        _, mask, _, notes = read_patient(p, chosen)
        assert mask.dtype == np.uint8 and np.array_equal(mask, wanted) and notes['masks with several labels'] == 1
    tables = [load_slices([data], 16, cache=tmp_path / 'c', labels=v).table for v in (None, (1, 4), (2,))]
    total = [sum(r['tumour'] for r in t if r['patient'] == p['name']) for t in tables]
    assert total[0] > total[1] > total[2] > 0 and '1 masks with several labels' in capsys.readouterr().out


def test_a_folder_without_a_file_is_left_out_aloud(call, data, tmp_path, capsys):
    (data / 'phantom_0_000/bravo.nii.gz').unlink()
    (data / 'phantom_0_003/seg.nii.gz').unlink()
    call('bravo', tmp_path / 'out', '--rflow', '--iters', 1, '--data', data, '--cache', tmp_path / 'c')
    told = capsys.readouterr().out
    assert all(w in told for w in ('left out 2 folders', 'phantom_0_000 (bravo)', 'phantom_0_003 (seg)', '12 real'))


@pytest.mark.parametrize('name, ends', [('BraTS20_Training_001', ('_t1ce', '_t1', '_seg')),
                                        ('BraTS-MET-00002-000', ('-t1c', '-t1n', '-seg'))])
def test_brats_names(phantom, tmp_path, name, ends):
    """The image after contrast is never taken for the one before, nor the other way round."""
    folder, names = tmp_path / 'data' / name, [f'{name}{e}.nii.gz' for e in ends]
    folder.mkdir(parents=True)
    for mine, theirs in zip(('bravo', 't1_pre', 'seg'), names):
        shutil.copy(phantom / f'phantom_0_000/{mine}.nii.gz', folder / theirs)
    found = find_patients([tmp_path / 'data'], ('bravo', 't1_pre', 'seg'))
    assert [{m: f.name for m, f in p['files'].items()} for p in found] == [dict(zip(('bravo', 't1_pre', 'seg'), names))]


def test_a_table_from_a_spreadsheet(data):
    """Excel's "CSV UTF-8" starts with a byte-order mark and ends lines its own way."""
    names = [p['name'] for p in find_patients([data], ('seg',))]
    (data / 'split.csv').write_text('patient,part\r\n' + ''.join(f'{n},test\r\n' for n in names), 'utf-8-sig')
    found = common.split_patients(find_patients([data], ('seg',)), data / 'split.csv')
    assert {p['part'] for p in found} == {'test'} and len(found) == 14


def test_groups_join_the_scans_of_a_patient(data):
    """Two folders of one patient in groups.csv are one patient, in one part."""
    (data / 'groups.csv').write_text('folder,patient\nphantom_0_000,anna\nphantom_0_001,anna\n')
    found = common.split_patients(find_patients([data], ('seg',)))
    assert [(p['name'], p['part']) for p in found[:2]] == [('anna', part_of('anna'))] * 2
    assert len({p['name'] for p in found}) == 13
