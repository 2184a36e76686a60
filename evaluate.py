"""Measures generated images against real patients, with the same measure between real patients beside each figure.

  python evaluate.py quality --fake runs/synthetic --data DIR --vgg-weights vgg16.pth     distances, diversity, lesions, memorisation
  python evaluate.py cycle --fake runs/synthetic --data DIR       does a segmenter find the mask that an image was made from?
  python evaluate.py control --fake runs/asked                    do masks hold what was asked for (sample.py --count, --requests)?
  python evaluate.py downstream --fake runs/synthetic --data DIR  does a segmenter get better on real test patients by training on the set?
  python evaluate.py downstream --engine nnunetv2 --iters 5000 --data DIR    the same with nnU-Net v2 itself, where it is installed
  python evaluate.py coherence --fake runs/stacks --data DIR      do the slices of volumes fit together (sample.py --stack)?
  python evaluate.py atlas --data DIR --template T1.nii.gz --labels LABELS.nii.gz   where in a template's brain does each patient lie?
  python evaluate.py dual --fake runs/pairs --data DIR            are pairs enhanced as real ones are (train_bravo.py --dual)?
  python evaluate.py readers plan --fake runs/synthetic --data DIR        a blinded study for people: then classifier.py label --study

Each leaves metrics.json, metrics.csv and pictures in --out. Reads files, changes none.
"""
import base64, bisect, fcntl, functools, gzip, itertools, subprocess
from statistics import NormalDist

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('quality', 'is a generated set like real patients it has not seen?'),
                       ('cycle', 'does a segmenter find in the images the masks that they were made from?'),
                       ('control', 'do the masks hold what was asked for?'),
                       ('coherence', 'do the slices of generated volumes fit together as those of real ones do?'),
                       ('dual', 'are made pairs enhanced where, and as much as, real ones are?'),
                       ('readers', 'can people tell generated from real? plan the study, write its page, score it')):
        c = commands.add_parser(name, help=told)
        g, whole = c.add_argument_group('what'), name != 'readers'
        if name == 'readers':
            g.add_argument('step', choices=('plan', 'page', 'score'), help='plan: draw the images; page: one file a reader, for those without Python; score: the answers')
            g.add_argument('--reader', nargs='+', type=rater_name, default=(), metavar='NAME', help='page: whose')
            g.add_argument('--answers', nargs='+', default=(), metavar='FILE', help='score: what readers sent back, beside answers.csv in --out')
        g.add_argument('--fake', required=whole, metavar='DIR', help='a set made by sample.py')
        if name == 'dual':
            g.add_argument('--dual', type=two_files, metavar='PRE,POST', help='the files that are a pair; none: those of the run that made the set')
        if name == 'cycle':
            g.add_argument('--bravo', metavar='RUN', help='the run that made the set: image -> mask -> image, too')
        if name != 'control':
            g.add_argument('--data', nargs='+', required=whole, metavar='DIR', help='the real patients, training patients included')
            g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
        if name in ('quality', 'coherence'):
            g.add_argument('--part', choices=('val', 'judge', 'test'), default='test', help='the real patients to compare with')
        if name == 'quality':
            g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of real slices without tumour')
            g.add_argument('--vgg-weights', metavar='FILE', help='VGG16 weights; "none" leaves its metrics out; not given: fetched')
        g = c.add_argument_group('how')
        if name == 'quality':
            g.add_argument('--n', type=number(int, 8), default=1000, help='images on each side at most; fewer where a side has fewer')
        if name == 'cycle':
            g.add_argument('--train-steps', type=number(int, 1), default=800, help='of the segmenter, 16 slices of judge patients each')
            g.add_argument('--at', type=number(float, 0, 1, open_low=True), default=0.6, metavar='T', help='with --bravo: real images are noised to this t and drawn on from there')
        if name == 'readers':
            g.add_argument('--n', type=number(int, 0), default=100, help='plan: images to call real or generated; half are real')
            g.add_argument('--pairs', type=number(int, 0), default=100, help='plan: pairs of a real and a generated image, to find the real one')
            g.add_argument('--likert', type=number(int, 0), default=20, help='plan: images to grade 1 to 5, with their mask; half are real')
        g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients (control: of masks; readers: of readers and images)')
        g.add_argument('--out', default=f'runs/{name}', metavar='DIR')
        g.add_argument('--seed', type=number(int, 0), default=0)
        if name != 'control':
            g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
        if name in ('quality', 'cycle'):
            g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    c = commands.add_parser('downstream', help='does a segmenter get better on real test patients by training on the set?')
    g = c.add_argument_group('what')
    g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients: training patients teach, test patients judge')
    g.add_argument('--fake', metavar='DIR', help='a set made by sample.py; not given: only the arms without one')
    g.add_argument('--gated', metavar='DIR', help='a set made by sample.py --gate; not given: its arms are left out')
    g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
    g.add_argument('--size', type=number(int, 16), metavar='S', help='of the slices; none: of --fake, else 64')
    g.add_argument('--arms', nargs='+', choices=ARMS, metavar='ARM', help=f'none: all that the sets allow of {", ".join(ARMS)}')
    g.add_argument('--cross-validate', type=number(int, 2), metavar='K', help='instead of the arms: K folds of training patients, writes cv_lesions.csv')
    g = c.add_argument_group('how')
    g.add_argument('--engine', choices=('own', 'nnunetv2'), default='own', help='nnunetv2: trains and predicts with the nnU-Net v2 that is on the PATH')
    g.add_argument('--network', choices=('nnunet', *(f'mednext-{k}' for k in MEDNEXT)), default='nnunet', help="nnU-Net's, or MedNeXt's four sizes")
    g.add_argument('--kernel', choices=('3', '5', 'upkern'), default='3', help='of MedNeXt; upkern: half the steps with 3, then 5 from its weights')
    g.add_argument('--optimizer', choices=('sgd', 'adamw'), default='sgd', help="sgd: nnU-Net's; adamw: MedNeXt's, which always has it")
    g.add_argument('--width', type=number(int, 1), default=32, help="features at full size; 32 is nnU-Net's and MedNeXt's, 8 suits a CPU")
    g.add_argument('--batch-size', type=number(int, 2), default=16, help='slices a step')
    g.add_argument('--seeds', type=number(int, 1), default=3, help='trainings of each arm')
    g.add_argument('--iters', type=number(int, 1), help='steps of every training')
    g.add_argument('--minutes', type=number(float, 0, open_low=True), help='instead of --iters: timed once, then as many steps for every training; '
                   'none of both: 5')
    g.add_argument('--tolerance', type=number(float, 0), metavar='MM', help='of the surface Dice; none: one pixel')
    g.add_argument('--margin', type=number(float, 0), default=0.02, help='a loss of Dice that would not matter: an effect whose interval lies above minus it is not inferior')
    g.add_argument('--repeats', type=number(int, 20), default=1000, help='bootstrap draws of patients')
    g.add_argument('--out', default='runs/downstream', metavar='DIR')
    g.add_argument('--seed', type=number(int, 0), default=0, help='of the first training')
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
    g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    c = commands.add_parser('atlas', help='where in a template\'s brain do patients and slices lie, and is tumour where it can be?')
    g = c.add_argument_group('what')
    g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients')
    g.add_argument('--template', required=True, metavar='FILE', help='T1 of a brain without skull (NIfTI)')
    g.add_argument('--labels', required=True, metavar='FILE', help='its FreeSurfer parcellation, on the same grid')
    g.add_argument('--fake', metavar='DIR', help='a set made by sample.py, to compare with the patients\' slices')
    g.add_argument('--write', action='store_true', help='parc.nii.gz beside each patient\'s images, for train_seg.py --anatomy, instead of --out/PATIENT/')
    g = c.add_argument_group('how')
    g.add_argument('--copies', type=int, choices=range(len(COPIES) + 1), default=0, help='copies of each volume, moved a little, that are registered too, for the mean answer')
    g.add_argument('--moved', action='store_true', help='a copy of each volume, moved by a known transform, is registered too: how far apart are the answers?')
    g.add_argument('--n', type=number(int, 8), default=200, help='slices of --fake at most')
    g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients')
    g.add_argument('--out', default='runs/atlas', metavar='DIR', help='matrices of all patients; the same command goes on')
    g.add_argument('--seed', type=number(int, 0), default=0)
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept, with --fake')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    if args.command == 'readers':
        for flag, step in (('fake', 'plan'), ('data', 'plan'), ('split', 'plan'), ('reader', 'page'), ('answers', 'score')):
            if getattr(args, flag) and args.step != step:
                fail(f'--{flag}: is for readers {step}; leave it away')
        there, needed = (Path(args.out) / 'study.json').is_file(), [f for f, v in (('--fake', args.fake), ('--data', args.data)) if not v]
        if args.step == 'plan' and (there or needed or args.n % 2 or args.likert % 2 or not args.n + args.pairs + args.likert):
            fail(f'--out {args.out}: holds a study already; give another folder' if there else f'readers plan: {needed[0]} is required' if needed
                 else f'--n {args.n}, --pairs {args.pairs}, --likert {args.likert}: expected even numbers of images, and not all 0')
        if args.step != 'plan' and not there:
            fail(f'--out {args.out}: holds no study.json; give a folder of evaluate.py readers plan')
        if args.step == 'page' and not args.reader:
            fail('readers page: --reader NAME is required; each reader has an order of their own')
        for file in args.answers:
            if not Path(file).is_file():
                fail(f'--answers {file}: no such file')
    for flag in ('fake', 'gated'):
        root = getattr(args, flag, None)
        if root and not (Path(root) / 'sample.json').is_file():
            fail(f'--{flag} {root}: holds no sample.json; give a set made by sample.py')
    for name in ('template', 'labels'):
        if args.command == 'atlas' and not Path(getattr(args, name)).is_file():
            fail(f'--{name} {getattr(args, name)}: no such file; see "Anatomy" in README for where to get one')
    for root in getattr(args, 'data', None) or ():
        if not Path(root).is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
        if args.command != 'atlas' and (Path(root) / 'manifest.csv').is_file():                       # atlas says it itself
            fail(f'--data {root}: is a synthetic set; give it with --fake')
    vgg = getattr(args, 'vgg_weights', None)
    if vgg not in (None, 'none') and not Path(vgg).is_file():
        fail(f'--vgg-weights {vgg}: no such file')
    check_out(args.out)
    if args.command == 'downstream':
        finish_downstream(args)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets. a and b are index arrays into what is given first, so that a bootstrap may repeat images:
# two copies of one image never count as a pair.
# ---------------------------------------------------------------------------------------------------------------------


def kid(kernel, a, b):
    """Kernel distance (Binkowski 2018): unbiased MMD^2 from a matrix of kernel values. nan where a side has one distinct image only."""
    if min(len(np.unique(i)) for i in (a, b)) < 2:
        return math.nan
    def within(i):
        pairs = i[:, None] != i[None]
        return kernel[np.ix_(i, i)][pairs].mean()
    return within(a) + within(b) - 2 * kernel[np.ix_(a, b)].mean()


def polynomial_kernel(x):
    """(x.y / d + 1)^3 for all pairs of x (N,d)."""
    return (x @ x.T / x.shape[1] + 1) ** 3


def frechet(x, a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^0.5) for features x (N,d) (Heusel 2017). Biased upwards for few images.
    nan where a side has one distinct image only."""
    if min(len(np.unique(i)) for i in (a, b)) < 2:
        return math.nan
    xa, xb = x[a] - x[a].mean(0), x[b] - x[b].mean(0)
    # tr((S_a S_b)^0.5) is the nuclear norm of the cross product of the centred features: no square root of a singular matrix
    cross = np.linalg.svd(xa @ xb.T, compute_uv=False).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))
    return float(((x[a].mean(0) - x[b].mean(0)) ** 2).sum() + (xa ** 2).sum() / (len(a) - 1) + (xb ** 2).sum() / (len(b) - 1) - 2 * cross)


def prdc(distance, fake, real, k=5):
    """Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020) from a matrix of distances: k-th neighbour, strict <.
    All nan where an image has fewer than k neighbours on its side, as in a bootstrap draw of few patients."""
    def radius(i):
        d = np.where(i[:, None] != i[None], distance[np.ix_(i, i)], np.inf)
        return np.partition(d, k - 1, 1)[:, k - 1] if len(i) > k else np.full(len(i), np.inf)
    d, r_fake, r_real = distance[np.ix_(fake, real)], radius(fake), radius(real)
    if not np.isfinite(np.concatenate([r_fake, r_real])).all():
        return dict.fromkeys(('precision', 'recall', 'density', 'coverage'), math.nan)
    inside = d < r_real
    return dict(precision=inside.any(1).mean(), recall=(d < r_fake[:, None]).any(0).mean(), density=inside.sum(1).mean() / k,
                coverage=(d.min(0) < r_real).mean())


def distances(x):
    """Euclidean distances of all pairs of x (N,d)."""
    square = (x ** 2).sum(1)
    return np.sqrt(np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0))


def principal(images, real, n=64):
    """The first n principal components (N,n) of images (N,S,S), fitted to the `real` ones, scaled to a mean variance of 1 there."""
    pixels = images.reshape(len(images), -1).astype(np.float64)
    centre, some = pixels[real].mean(0), real[np.linspace(0, len(real) - 1, min(len(real), 2000)).astype(int)]      # 2,000 say as much as 9,000
    x = (pixels - centre) @ np.linalg.svd(pixels[some] - centre, full_matrices=False)[2][:n].T
    return x / np.sqrt(x[real].var(0).mean())


def radial_spectrum(images):
    """Power of each image (N,H,W) at whole spatial frequencies 1 .. H/2 cycles an image, in dB, averaged over directions."""
    n = images.shape[-1]
    f = np.fft.fftfreq(n, 1 / n)
    radius = np.hypot(f[:, None], f[None]).round().astype(int).ravel()
    window = np.hanning(n + 2)[1:-1]                                              # the borders do not meet
    power = np.abs(np.fft.fft2(images * window[:, None] * window)).reshape(len(images), -1) ** 2
    rings = np.stack([np.bincount(radius, row) for row in power]) / np.bincount(radius)
    return 10 * np.log10(rings[:, 1:n // 2 + 1] + 1e-12)


def traits(images, spectrum):
    """What a distorted head is often wrong in, of images (N,S,S) in [-1,1] and their radial spectra: (N,3). Share of the square that is head;
    correlation with the mirror image about the head's middle; mean power of the upper half of frequencies, dB."""
    out = []
    for image, power, head in zip(images, spectrum, head_mask(images)):
        middle = np.nonzero(head)[1].mean() if head.any() else (len(image) - 1) / 2
        mirrored = np.roll(image[:, ::-1], round(2 * middle) - len(image) + 1, 1)
        out.append((head.mean(), correlation(image[None], mirrored[None])[0, 0], power[len(power) // 2:].mean()))
    return np.array(out, float).reshape(-1, len(TRAITS))


TRAITS = ('head area', 'symmetry', 'fine power')


def outside(a, b):
    """Share of the values a (N,) beyond the 1st and 99th percentile of b."""
    low, high = np.percentile(b, (1, 99))
    return ((a < low) | (a > high)).mean()


def wasserstein(a, b):
    """W1 between two samples of numbers: the area between their distribution functions. nan when one is empty."""
    if not len(a) or not len(b):
        return math.nan
    both = np.sort(np.concatenate([a, b]))
    F_a, F_b = (np.searchsorted(np.sort(v), both[:-1], 'right') / len(v) for v in (a, b))
    return float((np.abs(F_a - F_b) * np.diff(both)).sum())


def lesions(masks):
    """Of masks (N,S,S): the number of pieces of each, and for all pieces image number, diameter (pixels), centre x, y in [0,1]."""
    counts, pieces = np.zeros(len(masks), int), []
    for i, mask in enumerate(masks):
        labels, counts[i] = components(mask)
        for k in range(1, counts[i] + 1):
            y, x = np.nonzero(labels == k)
            pieces.append((i, math.sqrt(4 * len(x) / math.pi), (x.mean() + 0.5) / mask.shape[1], (y.mean() + 0.5) / mask.shape[0]))
    return counts, np.array(pieces, float).reshape(-1, 4)


def real_like(args, made, names=(), parts=()):
    """The patients of --data as slices like those that the run behind a set (its sample.json) was trained on: same size, brain box, labels, specks
    and scale, which the images of a pair share. names: all of these images; none: bravo alone. Its training patients may be in none of
    the parts that are to be new to it."""
    scale = names or tuple(made.get('dual') or ('bravo',))
    data = load_slices(args.data, made['pixels'], scale, made['box'], getattr(args, 'split', None), args.cache,
                       made.get('labels'), made.get('speck', 4.0))
    if not names and 'bravo' in scale:
        data.images = data.images[:, [scale.index('bravo')]]
    refuse_seen(args.fake, made, data, parts)
    return data


def made_rows(root):
    """The lines of a set's manifest. Fails when there is none: sample.py writes them when it ends."""
    rows = read_csv(Path(root) / 'manifest.csv')
    if not rows:
        fail(f'--fake {root}: manifest.csv holds no patient yet; let the command that made it go on to its end')
    return rows


def refuse_seen(root, made, data, parts):
    """Fails where a patient of these parts was a training patient of the runs that made the set, or of those that they started from."""
    seen = noted_seen(made)
    if parts and seen is None:
        print0(f'note: {root} does not say whom its runs were trained on (older ones, or begun from a foreign network); see to it yourself that no {" or ".join(parts)} patient was among them')
    for row, part in zip(data.table, data.part):
        if part in parts and patient_id(row['patient']) in (seen or ()):
            fail(f'{root}: patient {row["patient"]} was a training patient of the run that made it, here it is in the {part} part; '
                 'give that run\'s split.csv with --split')


# ---------------------------------------------------------------------------------------------------------------------
# quality
# ---------------------------------------------------------------------------------------------------------------------


def memorisation(x, samples, train, held_out, patients):
    """Share of samples nearer to a training image than to a held-out one, 0.5 when nothing is memorised: the pools have equally many images
    of equally many patients, the first ones of train, which is in a drawn order."""
    few = [*dict.fromkeys(patients[train])][:len({*patients[held_out]})]
    train = train[np.isin(patients[train], few)]
    n = min(len(train), len(held_out))
    return (x[np.ix_(samples, train[:n])].min(1) < x[np.ix_(samples, held_out[:n])].min(1)).mean()


def draw(rows, patients, g, resample):
    """Shuffled rows of a set; with `resample` those of as many patients drawn with replacement."""
    if resample and len(rows):
        names, inverse = np.unique(patients[rows], return_inverse=True)
        picked = torch.randint(len(names), (len(names),), generator=g).numpy()
        rows = np.concatenate([rows[inverse == p] for p in picked])
    return rows[torch.randperm(len(rows), generator=g).numpy()]


def quality(args):
    """The metric table: fake against --part, and as floor real training patients against --part, images drawn alike."""
    device, out = setup(args), Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    if made['weights'] == 'raw':
        print0('note: the images were made with raw weights')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = real_like(args, made, parts=('val', 'judge', 'test'))
    pools = {k: real.rows(k, args.empty_slices, args.seed) for k in ('train', args.part)}
    others = np.concatenate([real.rows(k, args.empty_slices, args.seed) for k in PARTS if k not in ('train', args.part)])
    if not all(len(v) >= 8 for v in pools.values()):
        fail(f'--data {" ".join(args.data)}: has {len(pools["train"])} slices of training and {len(pools[args.part])} of {args.part} '
             'patients; at least 8 of each are needed, see --split')
    # one list of images: the real ones that are used, then the fakes
    used = np.concatenate([pools['train'], pools[args.part], others]).astype(int)
    images = np.concatenate([real.images[used], fake.images])[:, 0]
    masks = np.concatenate([real.masks[used], fake.masks])[:, 0]
    patients = np.array([real.table[i]['patient'] for i in used] + [f'fake:{r["source"] or r["folder"]}' for r in fake.table])
    a, b = len(pools['train']), len(pools['train']) + len(pools[args.part])
    train, test, others, fakes = np.arange(a), np.arange(a, b), np.arange(b, len(used)), np.arange(len(used), len(images))
    sizes = {k: f'{len(v)} images of {len(set(patients[v]))}' for k, v in dict(fake=fakes, train=train, test=test).items()}
    print0(f'fake {sizes["fake"]} sources, train {sizes["train"]} patients, {args.part} {sizes["test"]} patients')
    everything, sides = (images, fakes, train, np.concatenate([test, others])), (train, test, others, fakes)        # copies are looked for among all
    some = [np.sort(v[torch.randperm(len(v), generator=generator(args.seed, 'side', k)).numpy()[:3 * args.n]])           # the matrices grow as the square
            for k, v in enumerate(sides)]
    if sum(map(len, some)) < len(images):
        kept = np.concatenate(some)
        images, masks, patients = images[kept], masks[kept], patients[kept]
        train, test, others, fakes = np.split(np.arange(len(kept)), np.cumsum(list(map(len, some)))[:3])
        print0(f'distances on a draw of {len(fakes)} of the generated, {len(train)} training, {len(test)} {args.part} images (at most 3 * --n); copies on all')

    spectrum = radial_spectrum(images)
    trait = traits(images, spectrum)
    counts, pieces = lesions(masks)
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]
    near = distances(images.reshape(len(images), -1).astype(np.float64))           # of pixels: axes that fit one side would favour the other
    if args.vgg_weights != 'none':
        vgg, by = VGG16(args.vgg_weights).to(device), ''
        with torch.no_grad():
            x = torch.cat([vgg(part.to(device))[-1].mean((2, 3)).cpu() for part in progress(torch.from_numpy(images)[:, None].split(64), 'VGG16')])
        x = x.double().numpy()
    else:                                                                          # needs no weights; to compare sets, not to be compared
        x, by = principal(images, np.concatenate([train, test, others])), ', pixel PCA'
    kernel, apart = polynomial_kernel(x), distances(x)

    def measure(i, j):
        """All distances of images i to reference images j."""
        m = {n + by: v for n, v in {'KID x 1000': 1000 * kid(kernel, i, j), 'Frechet distance': frechet(x, i, j), **prdc(apart, i, j)}.items()}
        m['spectrum, dB'] = float(np.sqrt(((spectrum[i].mean(0) - spectrum[j].mean(0)) ** 2).mean()))
        m |= {f'outside: {name}': float(outside(trait[i, k], trait[j, k])) for k, name in enumerate(TRAITS)}
        pairs = torch.from_numpy(images[i])[:, None]
        half = min(len(i) // 2, 200)
        m['MS-SSIM within'] = float(ms_ssim(pairs[:half], pairs[half:2 * half]).mean())
        p, q = (pieces[np.concatenate([piece_rows[r] for r in rows])] for rows in (i, j))
        m['lesion count, W1'] = wasserstein(counts[i], counts[j])
        m['lesion diameter, W1 pixels'] = wasserstein(p[:, 1], q[:, 1])
        m['lesion place, W1 of x and y'] = (wasserstein(p[:, 2], q[:, 2]) + wasserstein(p[:, 3], q[:, 3])) / 2
        return m

    def both(k, resample):
        """One draw: (fake against part, floor against part), equal numbers of images in all three."""
        g = generator(args.seed, 'quality', k)
        f, t, r, o = (draw(rows, patients, g, resample) for rows in (fakes, train, test, others))
        n = min(len(f), len(t), len(r), args.n)
        ours, floor = measure(f[:n], r[:n]), measure(t[:n], r[:n])
        ours['nearer to training'] = memorisation(near, f, t, r, patients)
        floor['nearer to training'] = memorisation(near, o, t, r, patients) if len(o) else math.nan
        return ours, floor

    points = [both(('point', k), False) for k in range(10)]
    draws = [both(('draw', k), True) for k in progress(range(args.repeats), 'bootstrap')]
    mean = [{name: np.mean([p[side][name] for p in points]) for name in points[0][side]} for side in (0, 1)]
    cut, nearest = copies(*everything, out, max(4096, 3 * args.n))
    # sets with masks of the same patients, in the same order, are drawn alike: compare takes their draws in pairs
    alike = seed_of(args.part, args.seed, args.n, args.vgg_weights == 'none', *patients, *map(len, (train, test, others, fakes)))
    write_csv(out / 'draws.csv', list(mean[0]), [[float(d[0][name]) for name in mean[0]] for d in draws])
    bands = {name: spectrum[i].mean(0) for name, i in (('fake', fakes), ('train', train), ('real', test))}
    report(out, intervals(list(mean[0]), mean, draws), dict(
        fake=args.fake, hash=made['bravo'], part=args.part, n=int(min(len(fakes), len(train), len(test), args.n)), sizes=sizes, repeats=args.repeats, drawn=alike,
        correlation_cut=cut, copies=int((nearest > cut).sum()), spectrum={name: [round(float(v), 3) for v in dB] for name, dB in bands.items()}))
    plot(out / 'spectrum.png', {name: (np.arange(1, len(dB) + 1), dB) for name, dB in bands.items()}, 'radial power spectrum', 'cycles an image', 'dB', logx=True)
    print0(f'copies: {(nearest > cut).sum()} of {len(nearest)} images correlate above {cut:.3f} with a training image (the 99th percentile of real '
           f'held-out images); look at {out}/nearest.png')


def copies(images, fakes, train, held_out, out, block=4096):
    """Nearest training image of each fake by correlation, a block of fakes at a time; the eight closest pairs as a picture. Returns the cut and the
    correlations."""
    def nearest(pool):
        of, some = images[pool], (correlation(images[part], of) for part in np.split(fakes, range(block, len(fakes), block)))
        return [np.concatenate(v) for v in zip(*((c.max(1), c.argmax(1)) for c in some))]
    (to_train, train_at), (_, held_at) = nearest(train), nearest(held_out)
    cut = copy_cut(images[train], images[held_out])
    top = np.argsort(-to_train)[:8]
    zoom = max(1, 128 // images.shape[-1])
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / 'nearest.png', [[images[fakes[i]] for i in top], [images[train[train_at[i]]] for i in top],
                                    [images[held_out[held_at[i]]] for i in top]], ['generated', 'nearest train', 'held out'], zoom)
    return cut, to_train


# ---------------------------------------------------------------------------------------------------------------------
# Segmenters: nnU-Net's network and recipe (Isensee 2021, and nnU-Net v2), MedNeXt (Roy 2023)
# ---------------------------------------------------------------------------------------------------------------------


class PlainUNet(nn.Module):
    """nnU-Net's plain U-Net for images of `size` (H,W) or (D,H,W): two convolutions a stage, strided down, transposed up.

    An axis is halved while at least 4 would be left. Widths double from `width` up to 512 (3D: 320). In training all heads
    answer, finest first; else the finest. With 32 the parameters are nnU-Net's. GroupNorm with a group a channel is its instance norm.
    """

    def __init__(self, size, width=32, inputs=1, classes=2):
        super().__init__()
        dims, edge, strides = len(size), size, [(1,) * len(size)]
        while True:
            stride = tuple(2 if e >= 8 and e % 2 == 0 else 1 for e in edge)
            if max(stride) == 1:
                break
            strides.append(stride)
            edge = [e // s for e, s in zip(edge, stride)]
        conv, transposed = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        f = [min(width * 2 ** i, 512 if dims == 2 else 320) for i in range(len(strides))]

        def stage(a, b, stride=1):
            return nn.Sequential(*(layer for i in (0, 1) for layer in (conv(b if i else a, b, 3, 1 if i else stride, 1), GroupNorm(b, b), nn.LeakyReLU(0.01, True))))

        self.down = nn.ModuleList(stage(inputs if i == 0 else f[i - 1], f[i], s) for i, s in enumerate(strides))
        up = range(len(f) - 2, -1, -1)                                                     # coarse to fine
        self.up = nn.ModuleList(stage(2 * f[i], f[i]) for i in up)
        self.grow = nn.ModuleList(transposed(f[i + 1], f[i], strides[i + 1], strides[i + 1]) for i in up)
        self.heads = nn.ModuleList(conv(f[i], classes, 1) for i in up)
        for m in self.modules():
            if isinstance(m, (conv, transposed)):
                nn.init.kaiming_normal_(m.weight, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        kept, out = [], []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        for grow, stage, head, skip in zip(self.grow, self.up, self.heads, kept[-2::-1]):
            x = stage(torch.cat([grow(x), skip], 1))
            if self.training or head is self.heads[-1]:
                out.insert(0, head(x))
        return out if self.training else out[0]


# expansion and number of blocks at five levels down and four up
MEDNEXT = {'s': ((2,) * 9, (2,) * 9), 'b': ((2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9), 'm': ((2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3)),
           'l': ((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3))}


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, a norm for each channel, 1x1 up by `expand`, GELU, 1x1 down, and the input added; way 'down' and 'up' halve and double the size."""

    def __init__(self, dims, a, b, expand, kernel, way=None):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        resize = conv if way != 'up' else nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.depthwise = resize(a, a, kernel, 2 if way else 1, kernel // 2, groups=a)
        self.norm, self.wide, self.narrow = GroupNorm(a, a), conv(a, expand * a, 1), conv(expand * a, b, 1)
        self.skip = resize(a, b, 1, 2) if way else nn.Identity()
        self.pad = (1, 0) * dims if way == 'up' else None                                 # a stride of 2 makes 2n - 1 of n

    def forward(self, x):
        x = self.narrow(F.gelu(self.wide(self.norm(self.depthwise(x))))) + self.skip(x)
        return F.pad(x, self.pad) if self.pad else x


class MedNeXt(nn.Module):
    """MedNeXt (Roy 2023) of MEDNEXT[kind]: an axis must be a multiple of 16, 32 at least. Skips are added. Heads as in PlainUNet, at all five levels."""

    def __init__(self, kind, dims=2, kernel=3, width=32, inputs=1, classes=2):
        super().__init__()
        expand, blocks = MEDNEXT[kind]
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        f = [width * 2 ** i for i in (0, 1, 2, 3, 4, 3, 2, 1, 0)]
        stage = lambda i: nn.Sequential(*(MedNeXtBlock(dims, f[i], f[i], expand[i], kernel) for _ in range(blocks[i])))
        self.stem = conv(inputs, width, 1)
        self.encode = nn.ModuleList(map(stage, range(4)))
        self.down = nn.ModuleList(MedNeXtBlock(dims, f[i], f[i + 1], expand[i + 1], kernel, 'down') for i in range(4))
        self.middle = stage(4)
        self.up = nn.ModuleList(MedNeXtBlock(dims, f[i - 1], f[i], expand[i], kernel, 'up') for i in range(5, 9))
        self.decode = nn.ModuleList(map(stage, range(5, 9)))
        self.heads = nn.ModuleList(conv(f[i], classes, 1) for i in range(5))

    def forward(self, x):
        x, kept = self.stem(x), []
        for encode, down in zip(self.encode, self.down):
            kept.append(encode(x))
            x = down(kept[-1])
        x = self.middle(x)
        out = [self.heads[4](x)] if self.training else []
        for i, (up, decode) in enumerate(zip(self.up, self.decode)):
            x = decode(up(x) + kept[3 - i])
            if self.training or i == 3:
                out.insert(0, self.heads[3 - i](x))
        return out if self.training else out[0]


def upkern(small, net):
    """UpKern: `net` takes the weights of `small`, whose depthwise kernels are smaller and are interpolated linearly."""
    mode = {4: 'bilinear', 5: 'trilinear'}
    own, weights = net.state_dict(), small.state_dict()
    net.load_state_dict({k: v if v.shape == own[k].shape else F.interpolate(v, own[k].shape[2:], mode=mode[v.ndim]) for k, v in weights.items()})
    return net


def segmentation_loss(outputs, y):
    """Cross-entropy - soft Dice (of the tumour, over the batch; of each case in 3D), summed over heads with weights 1, 1/2, 1/4 ... of which the
    last is set to 0, then to sum 1. outputs: logits (B,2,...), finest first; y (B,1,...) in {0,1}. Down to -1 for a perfect answer."""
    weights = [0.5 ** i for i in range(len(outputs))]
    weights = [*weights[:-1], 0.0] if len(weights) > 1 else weights
    loss = 0
    for weight, out in zip(weights, outputs):
        if weight:
            t, p = F.interpolate(y, out.shape[2:], mode='nearest-exact'), out.softmax(1)[:, 1:]
            over = tuple(range(2, y.ndim)) + ((0,) if y.ndim == 4 else ())
            dice_ = (2 * (p * t).sum(over) + 1e-5) / (p.sum(over) + t.sum(over) + 1e-5)
            loss = loss + weight / sum(weights) * (F.cross_entropy(out, t[:, 0].long()) - dice_.mean())
    return loss


def spatial(x, y, angle, scale):
    """Images x (B,C,H,W) and masks y turned by angles (B,) in radians and shrunk by scales (B,), outside lies the image's minimum; masks nearest."""
    cos, sin, zero = scale * torch.cos(angle), scale * torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid, low = F.affine_grid(theta, list(x.shape), align_corners=False), x.amin((1, 2, 3), True)
    return F.grid_sample(x - low, grid, align_corners=False) + low, F.grid_sample(y, grid, mode='nearest', align_corners=False)


def intensity(x, g):
    """nnU-Net v2's changes of intensity, in its order and with its odds: noise, blur, brightness, contrast, low resolution, gamma of the
    inverted image, gamma. x (B,C,H,W) of mean 0 and deviation 1, not changed in place; g: the generator of all draws."""
    x = x.clone()

    def sometimes(p, change):
        hit = (torch.rand(len(x), generator=g) < p).nonzero()[:, 0]
        if len(hit):
            x[hit] = change(x[hit], lambda low, high: low + (high - low) * torch.rand(len(hit), 1, 1, 1, generator=g))

    def around_1(u, low, high):                                                     # below and above 1 equally often
        return torch.where(u(0, 1) < 0.5, u(low, 1), u(1, high))

    def blur(v, u):
        at = torch.arange(-3.0, 4)
        for shape, pad in (((1, 7), (3, 3, 0, 0)), ((7, 1), (0, 0, 3, 3))):
            k = torch.exp(-at ** 2 / (2 * u(0.5, 1) ** 2)).view(-1, 1, 7)
            k = (k / k.sum(2, True)).repeat_interleave(v.shape[1], 0).view(-1, 1, *shape)
            flat = F.pad(v, pad, mode='reflect').flatten(0, 1)[None]
            v = F.conv2d(flat, k, groups=len(k)).view(v.shape)
        return v

    def contrast(v, u):
        mean, low, high = v.mean((1, 2, 3), True), v.amin((1, 2, 3), True), v.amax((1, 2, 3), True)
        return ((v - mean) * around_1(u, 0.75, 1.25) + mean).clamp(low, high)

    def low_resolution(v, u):
        small = [F.interpolate(w[None], scale_factor=z, mode='nearest-exact') for w, z in zip(v, u(0.5, 1).flatten().tolist())]
        return torch.cat([F.interpolate(w, v.shape[2:], mode='bilinear') for w in small])

    def gamma(v, u, sign=1):
        mean, std, low = v.mean((1, 2, 3), True), v.std((1, 2, 3), keepdim=True), (sign * v).amin((1, 2, 3), True)
        span = (sign * v).amax((1, 2, 3), True) - low
        v = sign * (((sign * v - low) / span.clamp(min=1e-7)) ** around_1(u, 0.7, 1.5) * span + low)
        return (v - v.mean((1, 2, 3), True)) / v.std((1, 2, 3), keepdim=True).clamp(min=1e-7) * std + mean

    sometimes(0.1, lambda v, u: v + u(0, 0.1) * torch.randn(v.shape, generator=g))
    sometimes(0.1, blur)                                                            # 0.2, and half of the channels: here there is one
    sometimes(0.15, lambda v, u: v * around_1(u, 0.75, 1.25))
    sometimes(0.15, contrast)
    sometimes(0.125, low_resolution)
    sometimes(0.1, lambda v, u: gamma(v, u, -1))
    sometimes(0.3, gamma)
    return x


def nnunet_augment(x, y, g):
    """nnU-Net v2's augmentation in 2D, of a batch: any rotation (p 0.2), scale 0.7 to 1.4 (p 0.2), `intensity`, mirrors (p 1/2 each axis)."""
    n = len(x)
    hit, u = torch.rand(2, n, generator=g) < 0.2, torch.rand(2, n, generator=g)
    angle, scale = hit[0] * (2 * u[0] - 1) * math.pi, torch.where(hit[1], 0.7 + 0.7 * u[1], 1.0)
    rows = hit.any(0)
    x, y = x.clone(), y.clone()
    if rows.any():
        x[rows], y[rows] = spatial(x[rows], y[rows], angle[rows], scale[rows])
    x = intensity(x, g)
    for axis in (2, 3):
        rows = torch.rand(n, generator=g) < 0.5
        x[rows], y[rows] = x[rows].flip(axis), y[rows].flip(axis)
    return x, y


def build_segmenter(network, size, width, kernel):
    return PlainUNet(size, width) if network == 'nnunet' else MedNeXt(network[-1], len(size), kernel, width)


def z_score(x):
    return (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True).clamp(min=1e-7)


def train_segmenter(images, masks, steps, device='cpu', seed=0, network='nnunet', width=32, kernel='3', batch=16, augmented=True, optimizer='sgd'):
    """nnU-Net's recipe on slices (N,1,S,S) and masks; each slice to mean 0 and deviation 1. Returns images -> masks (N,S,S).

    Nesterov's SGD (MedNeXt, and on request: AdamW, 1e-3), the rate falls as (1 - step/steps)^0.9, gradients clipped at 12; a third of each batch is drawn
    from slices with tumour. The last weights are taken, as nnU-Net does, so that no patient is needed to choose them. No mirrors at test time.
    """
    layout = torch.channels_last if network == 'nnunet' else torch.contiguous_format      # narrow MedNeXts crash in channels_last (torch 2.13, CPU)

    def build(kernel):
        torch.manual_seed(seed_of(seed, 'segmenter') % 2 ** 32)
        net = build_segmenter(network, images.shape[2:], width, kernel).to(device, memory_format=layout)
        if network == 'nnunet' and optimizer == 'sgd':
            return net, torch.optim.SGD(net.parameters(), 0.01, 0.99, nesterov=True, weight_decay=3e-5)
        return net, torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=3e-5, eps=1e-4)

    net, opt = build(5 if kernel == '5' else 3)
    rate, tumour = opt.param_groups[0]['lr'], np.flatnonzero(masks.reshape(len(masks), -1).any(1))
    third = round(batch / 3) if len(tumour) else 0
    for step in progress(range(steps), 'segmenter', leave=False):
        if kernel == 'upkern' and step == steps // 2:
            small, (net, opt) = net, build(5)
            upkern(small, net)
        for group in opt.param_groups:
            group['lr'] = rate * (1 - step / steps) ** 0.9
        rows = np.concatenate([batch_rows(len(images), batch - third, step, seed), tumour[batch_rows(len(tumour), third, step, (seed, 'tumour'))]])
        x, y = z_score(torch.tensor(images[rows])), torch.tensor(masks[rows]).float()
        if augmented:
            x, y = nnunet_augment(x, y, generator(seed, 'segmenter', step))
        loss = segmentation_loss(net(x.to(device, memory_format=layout)), y.to(device))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 12)
        opt.step()
        if step % 50 == 49 and not math.isfinite(loss.item()):
            fail(f'segmenter: loss {loss.item()} at step {step + 1}, rate {group["lr"]:.2g}; nothing of this training is kept', 1)
    net.eval()

    @torch.no_grad()
    def segment(x):
        return np.concatenate([net(z_score(v).to(device, memory_format=layout)).argmax(1).bool().cpu().numpy() for v in torch.tensor(x).split(64)])

    return segment


# ---------------------------------------------------------------------------------------------------------------------
# cycle
# ---------------------------------------------------------------------------------------------------------------------


def dice(a, b):
    """2 |A and B| / (|A| + |B|) of masks (N,S,S): (N,); nan where both are empty."""
    a, b = a.reshape(len(a), -1) > 0, b.reshape(len(b), -1) > 0
    with np.errstate(invalid='ignore'):
        return 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1))


def diameter(pixels):
    """Of the disc with as many pixels as a mask has."""
    return math.sqrt(4 * pixels.sum() / math.pi)


def times_from(run, at):
    """The run's usual solver times from the last that is <= at on. Fails where those are fewer than two steps."""
    ts = run.process.times(default_solver(run.args)[1], own=True)
    left = ts[ts <= at] if at < 1 else ts
    if len(left) < 3:
        fail(f'--at {at:g}: leaves {len(left) - 1} of the run\'s {len(ts) - 1} steps; take a larger one')
    return left


def redraw(run, images, masks, levels, at, seed, device):
    """SDEdit (Meng 2022, 2108.01073): images (N,1,S,S) noised to the run's last solver time <= at, and drawn on from there for masks (N,1,S,S).
    The noise is that of the image's number, whatever the mask. Returns (N,1,S,S) in [-1,1]."""
    (sampler, _, clip), process, parts, ts = default_solver(run.args), run.process, [], times_from(run, at)
    for i in range(0, len(images), 32):
        x_0, mask = process.to_range(torch.tensor(images[i:i + 32]).to(device)), torch.tensor(masks[i:i + 32]).float().to(device)
        sources = [generator(seed, 'redraw', k) for k in range(i, i + len(x_0))]
        noise = lambda: torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in sources]).to(device)
        level = torch.tensor(levels[i:i + 32])[:, None].float().to(device) if run.args.slice_level else None
        given = mask_condition(mask, run.args.p_uncond), request_tokens(mask, run.args), level
        denoise = make_denoise(run.net, process, *given, clip=clip and not process.space.about)
        with torch.no_grad():
            x = SAMPLERS[sampler](denoise, process.alpha(ts[0]) * x_0 + process.sigma(ts[0]) * noise(), ts, process, noise)
        parts.append(process.from_range(x).clamp(-1, 1).cpu().numpy())
    return np.concatenate(parts)


def back_again(args, run, real, test, found, patients, edges, device):
    """image -> mask -> image: real test images with tumour, drawn on from --at with the mask that the segmenter found, their own (the ceiling), another
    patient's, and none. Mean absolute error in the tumour, by size of its lesions, and in the head beyond RING pixels around it, where SSIM is taken too.
    patients, edges: of the images, and the thirds of the lesions' sizes. Writes back.csv and back.png."""
    out, images, own, who = Path(args.out), real.images[test], real.masks[test], patients
    g = generator(args.seed, 'another')
    others = [np.flatnonzero(who != p) for p in who]
    other = own[[int(o[torch.randint(len(o), (1,), generator=g)]) for o in others]]
    kinds = {'the mask found': found[:, None].astype(own.dtype), 'its own': own, "another patient's": other, 'no tumour': np.zeros_like(own)}
    levels = [real.table[i]['level'] for i in test]
    drawn = {k: redraw(run, images, m, levels, args.at, args.seed, device) for k, m in kinds.items()}
    rest = np.stack([head_mask(x)[0] & ~around(m[0] > 0, RING) for x, m in zip(images, own)])
    lesions_of = []
    for m in own[:, 0]:
        labels, n = components(m)
        lesions_of.append([(int(np.digitize(diameter(labels == k), edges)), labels == k) for k in range(1, n + 1)])
    names = ['error in the tumour', *(f'error in its lesions {n}' for n in (f'below {edges[0]:.1f} pixels', f'to {edges[1]:.1f}', 'above')),
             'error in the rest of the head', 'SSIM of the rest of the head']
    values = {}                                                                                        # of each kind (N, metrics); nan: nothing of that size
    for k, y in drawn.items():
        e = np.abs(y - images)[:, 0]
        sized = [[np.mean([e[i][w].mean() for s, w in mine if s == b] or [math.nan]) for b in range(3)] for i, mine in enumerate(lesions_of)]
        luminance, structure = ssim_parts(torch.tensor(images), torch.tensor(y))                       # 5 pixels less on every side
        ssim = [v[w].mean() if w.any() else math.nan for v, w in zip((luminance * structure)[:, 0].numpy(), rest[:, 5:-5, 5:-5])]
        values[k] = np.column_stack([[e[i][own[i, 0] > 0].mean() for i in range(len(e))], sized, [e[i][rest[i]].mean() for i in range(len(e))], ssim])
    mean = lambda v, i: [np.nanmean(c) if np.isfinite(c).any() else math.nan for c in v[i].T]
    draws = [draw(np.arange(len(test)), who, generator(args.seed, 'back', k), True) for k in range(args.repeats)]
    table, first = [], values['the mask found']
    for m, name in enumerate(names):
        for k, v in values.items():
            points = [mean(f, slice(None))[m] for f in (v, first - v)]
            bounds = [centred(p, [mean(f, i)[m] for i in draws]) for p, f in zip(points, (v, first - v))]
            table.append([name, k, points[0], *bounds[0], points[1], *bounds[1]])
    write_csv(out / 'back.csv', ['metric', 'drawn for', 'value', 'low', 'high', 'found - this', 'found - this, low', 'found - this, high'], table)
    print0(f'image -> mask -> image: {len(test)} real test images with tumour, drawn on from t = {args.at:g}; means, 95 % over patients')
    print_table(['metric', 'drawn for', 'value', 'the mask found less this'],
                [[r[0], r[1], f'{r[2]:.4f} [{r[3]:.4f}, {r[4]:.4f}]', '' if r[1] == 'the mask found' else f'{r[5]:+.4f} [{r[6]:+.4f}, {r[7]:+.4f}]'] for r in table])
    show, zoom = np.linspace(0, len(test), 6, endpoint=False).astype(int), max(1, 128 // images.shape[-1])
    save_grid(out / 'back.png', [[outline(images[i, 0], own[i, 0], zoom=zoom) for i in show],
                                 *([outline(y[i, 0], kinds[k][i, 0], (80, 220, 90), zoom) for i in show] for k, y in drawn.items())], ['real', *drawn], zoom)


def cycle(args):
    """mask -> image -> mask: Dice, contrast and lesion recall by size on the images, on the same with shuffled masks, and on real test images; on
    empty masks the share in which something is found. With --bravo image -> mask -> image (back_again)."""
    device, out = setup(args), Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    run = load_run(args.bravo, device) if args.bravo else None
    if run and (run.hash != made['bravo'] or run.args.volume or getattr(run.args, 'dual', None) or run.args.neighbours):
        fail(f'--bravo {args.bravo}: ' + ('makes volumes or pairs, or sees neighbours; image -> mask -> image is for single slices' if run.hash == made['bravo'] else
                                          f'is not the run that made {args.fake}, or not with these weights'))
    if run:
        times_from(run, args.at)
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = real_like(args, made, parts=('judge', 'test'))
    judged = {p for p, part in zip((r['patient'] for r in real.table), real.part) if part == 'judge'} & {r['source'] for r in fake.table}
    if judged:
        fail(f'--fake {args.fake}: has masks of judge patients ({sorted(judged)[0]}), whom the segmenter learns from; make the set on others')
    judge, test = real.rows('judge', 0.2, args.seed), real.rows('test', 0.0)
    rows = np.array([i for i, r in enumerate(fake.table) if r['tumour']])
    if min(map(len, (judge, test, rows))) < 8:
        fail(f'--data: {len(judge)} judge and {len(test)} test slices, --fake: {len(rows)} images with tumour; at least 8 of each are needed, see --split')
    segment = train_segmenter(real.images[judge], real.masks[judge], args.train_steps, device, args.seed, width=8, optimizer='adamw')
    images = np.concatenate([fake.images[rows], real.images[test]])
    masks = np.concatenate([fake.masks[rows], real.masks[test]])[:, 0]
    patients = np.array([f'fake:{fake.table[i]["source"] or fake.table[i]["folder"]}' for i in rows] + [real.table[i]['patient'] for i in test])
    found, fakes, reals = segment(images), np.arange(len(rows)), np.arange(len(rows), len(images))
    empty = [fake.images[[not r['tumour'] for r in fake.table]], real.images[[part == 'test' and not r['tumour'] for r, part in zip(real.table, real.part)]]]
    alarms = [int(segment(v).any((1, 2)).sum()) if len(v) else 0 for v in empty]
    own = dice(found, masks)
    g, who, shuffled = generator(args.seed, 'shuffled'), np.unique(patients, return_inverse=True)[1], np.empty(len(images))
    for side, flag in ((fakes, '--fake'), (reals, '--data')):
        if len({*who[side]}) < 2:
            fail(f'{flag}: all {len(side)} images are of patient {patients[side[0]].removeprefix("fake:")}; masks of another are needed to compare with'
                 + (', see --split' if flag == '--data' else ''))
        for i in side:                                                  # neighbouring slices of a patient have nearly the same mask
            others = side[who[side] != who[i]]
            others = others[torch.randperm(len(others), generator=g)[:10].numpy()]
            shuffled[i] = dice(found[np.full(len(others), i)], masks[others]).mean()
    contrast = np.full(len(images), math.nan)                            # a mask that is found because what is drawn there shines is no success
    for i in np.flatnonzero(masks.any((1, 2))):
        ring = around(masks[i] > 0, RING) & (masks[i] == 0) & head_mask(images[i])[0]
        contrast[i] = images[i, 0][masks[i] > 0].mean() - images[i, 0][ring].mean() if ring.any() else math.nan
    pieces, false = [], np.zeros(len(images))
    for i, mask in enumerate(masks):
        labels, n = components(mask)
        pieces += [(i, diameter(labels == k), found[i][labels == k].any()) for k in range(1, n + 1)]
        labels, n = components(found[i])
        false[i] = sum(not mask[labels == k].any() for k in range(1, n + 1))
    pieces = np.array(pieces, float)
    edges = np.quantile(pieces[pieces[:, 0] >= len(rows), 1], (1 / 3, 2 / 3))
    name = (f'below {edges[0]:.1f} pixels', f'{edges[0]:.1f} to {edges[1]:.1f} pixels', f'above {edges[1]:.1f} pixels')
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]
    whole = np.array([np.digitize(diameter(m > 0), edges) for m in masks])                                # of the disc as large as all of a mask

    def measure(i):
        p = pieces[np.concatenate([piece_rows[r] for r in i])]
        size = np.digitize(p[:, 1], edges)
        mean = lambda v: np.nanmean(v) if np.isfinite(v).any() else math.nan
        return {'Dice, own masks': np.nanmean(own[i]), 'Dice, shuffled masks': np.nanmean(shuffled[i]), 'Dice, own - shuffled': np.nanmean(own[i] - shuffled[i]),
                'contrast, mask - ring': mean(contrast[i]), 'false pieces an image': false[i].mean(),
                **{f'Dice, masks {n}': mean(own[i][whole[i] == k]) for k, n in enumerate(name)},
                **{f'lesions found, {n}': p[size == k, 2].mean() if (size == k).any() else math.nan for k, n in enumerate(name)}}

    names, points = list(measure(fakes)), [measure(fakes), measure(reals)]
    draws = [[measure(draw(r, patients, generator(args.seed, 'cycle', k, side), True)) for side, r in enumerate((fakes, reals))] for k in range(args.repeats)]
    report(out, intervals(names, points, draws), dict(fake=args.fake, hash=made['bravo'], judge_slices=len(judge), images=len(rows), test_slices=len(test),
                                                      empty=dict(zip(('fake', 'real'), ([k, len(v)] for k, v in zip(alarms, empty))))))
    told = ['{} of {} [{:.2f}, {:.2f}]'.format(k, len(v), *wilson(k, len(v))) for k, v in zip(alarms, empty)]
    print0(f'something found where the mask is empty: {told[0]} generated, {told[1]} real images (intervals: as if slices were independent)')
    if run:
        back_again(args, run, real, test, found[len(rows):], patients[len(rows):], edges, device)
    show = np.concatenate([fakes[np.linspace(0, len(fakes), 6, endpoint=False).astype(int)], reals[np.linspace(0, len(reals), 6, endpoint=False).astype(int)]])
    zoom = max(1, 128 // images.shape[-1])
    save_grid(out / 'cycle.png', [[outline(images[i, 0], m[i], c, zoom) for i in show] for m, c in ((masks, (255, 80, 60)), (found, (80, 220, 90)))],
              ['asked for', 'found'], zoom)
    print0(f'the segmenter saw {len(judge)} slices of judge patients; the left half of {out}/cycle.png is generated, the right half real')


# ---------------------------------------------------------------------------------------------------------------------
# control
# ---------------------------------------------------------------------------------------------------------------------


def match(asked, found):
    """Pairs (i, j) of asked and found lesions, as many as there can be, with the least summed distance of centres."""
    asked, found = np.reshape(asked, (-1, 3)), np.reshape(found, (-1, 3))
    d = np.hypot(asked[:, None, 1] - found[None, :, 1], asked[:, None, 2] - found[None, :, 2])
    e = d if d.shape[0] <= d.shape[1] else d.T
    best = {0: (0.0, ())}                                    # by which of the fewer have a partner (bits): least sum, its pairs
    for j in range(e.shape[1]):
        for taken, (total, pairs) in list(best.items()):
            for i in (i for i in range(len(e)) if not taken >> i & 1):
                if total + e[i, j] < best.get(taken | 1 << i, (math.inf,))[0]:
                    best[taken | 1 << i] = (total + e[i, j], (*pairs, (i, j)))
    return sorted(pair if e is d else pair[::-1] for pair in best[2 ** len(e) - 1][1])


def spearman(a, b):
    """Rank correlation; ties share their mean rank. nan for fewer than three pairs, or where one side is constant."""
    rank_of = lambda v: np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])
    return float(np.corrcoef(rank_of(np.asarray(a)), rank_of(np.asarray(b)))[0, 1]) if len(a) > 2 and len({*a}) > 1 and len({*b}) > 1 else math.nan


def control(args):
    """Counts, sizes and places obtained against those asked for; beside each, against the requests of other masks (shuffled)."""
    out = Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('asked'):
        fail(f'--fake {args.fake}: was made without --count, --requests or --hard-cases')
    requests = [np.array([[math.nan if v is None else v for v in lesion] for lesion in r]).reshape(-1, 3) for r in made['asked']]
    rows = made_rows(args.fake)
    got, wish = [], []
    for r in rows:
        mask = read_nifti(Path(args.fake) / r['folder'] / 'seg.nii.gz')[0][0]
        got.append(lesion_records(mask))
        wish.append(requests[int(r['condition'].split(' request ')[1].split(':')[0])])
    side = made['pixels']
    other = [wish[i] for i in torch.randperm(len(wish), generator=generator(args.seed, 'shuffled')).tolist()]

    def judge(asked, found):
        """Count error, and for each pair with a known size or place: (log sizes), hit."""
        sizes, hits = [], []
        placed = asked[np.isfinite(asked[:, 1])]
        for i, j in match(placed, found):
            hits.append(math.hypot(*(placed[i, 1:] - found[j, 1:])) * side < max(2, placed[i, 0] * side / 2 if np.isfinite(placed[i, 0]) else 2))
        hits += [False] * (len(placed) - len(hits))
        known = np.sort(asked[np.isfinite(asked[:, 0]), 0])[::-1]                      # sizes without a place are compared in order of size
        pairs = [(placed[i, 0], found[j, 0]) for i, j in match(placed, found)] if len(placed) == len(asked) else list(zip(known, np.sort(found[:, 0])[::-1]))
        sizes = [(math.log(a), math.log(b)) for a, b in pairs if np.isfinite(a) and a > 0]
        return len(found) - len(asked), sizes, hits

    scores = [[judge(a, f) for a, f in zip(w, got)] for w in (wish, other)]

    def measure(i, side_):
        some = [scores[side_][k] for k in i]
        error, sizes, hits = np.array([s[0] for s in some]), [p for s in some for p in s[1]], [h for s in some for h in s[2]]
        return {'count exact': (error == 0).mean(), 'count error, mean absolute': np.abs(error).mean(),
                'tumour or none right': np.mean([(len(got[k]) > 0) == (len((wish, other)[side_][k]) > 0) for k in i]),
                'log diameter, Spearman': spearman(*zip(*sizes)) if len(sizes) > 2 else math.nan,
                'log diameter, mean absolute error': np.mean([abs(a - b) for a, b in sizes]) if sizes else math.nan,
                'place hit': np.mean(hits) if hits else math.nan}

    every = np.arange(len(rows))
    points = [measure(every, 0), measure(every, 1)]
    draws = []
    for k in range(args.repeats):
        i = torch.randint(len(rows), (len(rows),), generator=generator(args.seed, 'control', k)).numpy()
        draws.append([measure(i, 0), measure(i, 1)])
    counts = Counter(len(w) for w in wish)
    constant = counts.most_common(1)[0]
    report(out, intervals(list(points[0]), points, draws), dict(fake=args.fake, hash=made.get('seg'), masks=len(rows), best_constant=constant[1] / len(rows)),
           ('asked for', 'shuffled'))
    print0(f'{len(rows)} masks; answering always {constant[0]} would be exact for {constant[1] / len(rows):.3f} of them')
    table = Counter((len(w), min(len(f), 9)) for w, f in zip(wish, got))
    for asked in sorted(counts):
        print0(f'  asked {asked}: ' + ', '.join(f'{n} in {table[asked, n]}' for n in range(10) if table[asked, n]))
    show = sorted(range(len(rows)), key=lambda k: len(wish[k]))[::max(1, (len(rows) - 1) // 7)][:8]                # of all counts alike
    zoom, pictures = max(1, 128 // side), []
    for k in show:
        mask = read_nifti(Path(args.fake) / rows[k]['folder'] / 'seg.nii.gz')[0][0]
        want = np.zeros(mask.shape)
        y, x = np.mgrid[:side, :side] + 0.5
        for size, cx, cy in wish[k]:
            if np.isfinite(cx):
                want[np.hypot(x - cx * side, y - cy * side) <= max(size * side / 2 if np.isfinite(size) else 1.5, 1)] = 1
        pictures.append((want * 2 - 1, outline(mask * 2 - 1, want, zoom=zoom)))
    save_grid(out / 'control.png', [[p[0] for p in pictures], [p[1] for p in pictures]], ['asked for', 'drawn'], zoom)
    print0(f'look at {out}/control.png')


# ---------------------------------------------------------------------------------------------------------------------
# downstream
# ---------------------------------------------------------------------------------------------------------------------
ARMS = {f'{name}{end}': sets for end in ('', '_aug') for name, sets in
        (('real', ('data',)), ('synthetic', ('fake',)), ('both', ('data', 'fake')), ('gated', ('data', 'gated')))}
PAIRS = [(f'{a}{end}', f'{b}{end}') for end in ('', '_aug') for a, b in
         (('synthetic', 'real'), ('both', 'real'), ('gated', 'real'), ('gated', 'both'))] + [('real_aug', 'real')]
METRICS = ('Dice', 'lesion-wise Dice', 'lesion recall', 'false positives a slice', 'HD95, mm', 'NSD')
LESION = ['arm', 'seed', 'patient', 'folder', 'slice', 'lesion', 'diameter', 'area', 'x', 'y', 'count', 'edge', 'hit', 'unit']
STUDY = ('data', 'fake', 'gated', 'split', 'size', 'engine', 'network', 'kernel', 'optimizer', 'width', 'batch_size', 'iters', 'minutes', 'seed')


def finish_downstream(args):
    """Checks what no parser can, fills in --size, --arms and the brain box of the sets."""
    made = {k: json.loads((Path(root) / 'sample.json').read_text()) for k, root in (('fake', args.fake), ('gated', args.gated)) if root}
    for k, m in made.items():
        if not m.get('bravo'):
            fail(f'--{k} {getattr(args, k)}: holds masks only; make images with sample.py --bravo RUN')
    read = {(tuple(m['box']), tuple(m.get('labels') or ()), m.get('speck', 4.0)) for m in made.values()}
    if len(read) > 1:
        fail(f'--gated {args.gated}: its brain box, --labels or --speck are not those of --fake {args.fake}; make both with the same --bravo run')
    args.box, args.labels, args.speck = read.pop() if read else (None, (), 4.0)
    args.made, args.sets = made, {'brain box': args.box and list(args.box), 'labels': list(args.labels), 'speck': args.speck}
    for k in made:
        files = [Path(getattr(args, k)) / f for f in ('sample.json', 'manifest.csv')]
        args.sets[f'hash of --{k}'] = hashlib.sha256(b''.join(f.read_bytes() for f in files if f.is_file())).hexdigest()[:12]
    args.size = args.size or next((m['pixels'] for m in made.values()), 64)
    multiple = 4 if args.network == 'nnunet' else 32                        # MedNeXt halves it four times and norms what is left
    if args.size % multiple:
        fail(f'--size {args.size}: must be a multiple of {multiple} for --network {args.network}')
    if args.network == 'nnunet' and args.kernel != '3':
        fail(f'--kernel {args.kernel}: is of MedNeXt; --network nnunet has 3')
    if args.engine == 'nnunetv2' and (args.network != 'nnunet' or args.optimizer != 'sgd' or args.cross_validate or not args.iters):
        fail('--engine nnunetv2: needs --iters N (its own recipe has 250000), --network nnunet, --optimizer sgd and no --cross-validate')
    if args.engine == 'nnunetv2' and args.iters > 20 and args.iters % 20:
        fail(f'--iters {args.iters}: nnU-Net trains in 20 equal epochs; give {args.iters // 20 * 20} or {args.iters // 20 * 20 + 20}')
    for program in NNUNET if args.engine == 'nnunetv2' else ():
        if not shutil.which(program):
            fail(f'--engine nnunetv2: no {program} on the PATH; python3 -m venv nnunet && nnunet/bin/pip install nnunetv2, then PATH="$PWD/nnunet/bin:$PATH"')
    if args.iters and args.minutes:
        fail(f'--iters {args.iters} and --minutes {args.minutes:g}: give one of them')
    args.minutes = args.minutes or (None if args.iters else 5.0)
    can = [a for a, sets in ARMS.items() if all(s == 'data' or s in made for s in sets)]
    lacking = [a for a in args.arms or () if a not in can]
    if lacking:
        fail(f'--arms {lacking[0]}: needs ' + ' and '.join(f'--{s} DIR' for s in ARMS[lacking[0]] if s != 'data'))
    args.arms = args.arms or can
    args.left_out = [a for a in ARMS if a not in can]


@functools.cache
def study_slices(roots, size, box, split, cache, labels=None, speck=4.0):
    return load_slices(roots, size, box=box, split=split, cache=cache, labels=labels, speck=speck)


def arm_slices(args, arm, part='train'):
    """Images (N,1,S,S), masks and table of what an arm trains on: training patients' slices, then the slices of its sets. Any other
    part: the real slices alone. Slices of all sources are drawn alike, so a set weighs as much as it has slices."""
    images, masks, table = [], [], []
    for source in ARMS[arm] if part == 'train' else ('data',):
        about = (args.size, args.box, args.split, args.cache)
        s = study_slices(tuple(args.data), *about, args.labels or None, args.speck) if source == 'data' else study_slices((getattr(args, source),), *about)
        rows = s.rows(part)
        images.append(s.images[rows]), masks.append(s.masks[rows])
        table += [s.table[i] for i in rows]
    return np.concatenate(images), np.concatenate(masks), table


def lesion_wise(found, truth, voxel=1.0):
    """BraTS-METS' lesion-wise Dice of masks (H,W) or (D,H,W): (sum of Dice over real lesions, how many count, how many found pieces are false).

    Pieces of the truth that touch when grown by one voxel are one lesion; those of at most 2 mm^3 (2D: mm^2; voxel is that of one) do not
    count. A found piece belongs to every lesion whose grown form it touches; one that touches none is false, whatever its size.
    """
    around = torch.tensor(list(itertools.product((-1, 0, 1), repeat=truth.ndim))).abs().sum(1) <= 2
    conv = F.conv2d if truth.ndim == 2 else F.conv3d
    grow = lambda m: conv(torch.tensor(m)[None, None].float(), around.view(1, 1, *(3,) * truth.ndim).float(), padding=1)[0, 0].numpy() > 0
    lesions_, pieces = components(grow(truth))[0] * (truth > 0), components(found)[0]
    total, n, touched = 0.0, 0, set()
    for k in np.unique(lesions_[lesions_ > 0]):
        lesion = lesions_ == k
        own = set(pieces[grow(lesion)].tolist()) - {0}
        touched |= own
        if lesion.sum() * voxel > 2:
            mine = np.isin(pieces, list(own))
            total, n = total + 2 * (mine & lesion).sum() / (mine.sum() + lesion.sum()), n + 1
    return float(total), n, len(set(np.unique(pieces).tolist()) - {0} - touched)


def border_distances(a, b, spacing):
    """mm from each border pixel of mask a (H,W) to the nearest of b; the image's diagonal where b is empty. A border pixel has one of its four
    neighbours outside."""
    def border(m):
        p = np.pad(m, 1)
        return np.argwhere(m & ~(p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:])) * spacing
    p, q = border(a), border(b)
    if not len(q):
        return np.full(len(p), math.hypot(*(np.array(a.shape) * spacing)))
    return np.hypot(*(p[:, None] - q[None]).transpose(2, 0, 1)).min(1) if len(p) else np.zeros(0)


def patient_metrics(found, truth, spacing, tolerance=None):
    """METRICS of one patient: masks (N,S,S) of all its slices, spacing (N,2) mm. Slices are judged in 2D, each for itself, and pooled.

    Both empty: Dice, lesion-wise Dice and NSD 1, HD95 0. One empty: 0, and HD95 the image's diagonal. Without a lesion there is no recall (nan).
    """
    total = found.sum() + truth.sum()
    scores, n, false = np.sum([lesion_wise(f, t, math.prod(s)) for f, t, s in zip(found, truth, spacing)], 0)
    hits = [bool(f[labels == k].any()) for f, (labels, m) in zip(found, map(components, truth)) for k in range(1, m + 1)]
    near, apart = [], [[], []]
    for f, t, s in zip(found, truth, spacing):
        for side, d in enumerate((border_distances(f, t, s), border_distances(t, f, s))):
            near.append(d <= (max(s) if tolerance is None else tolerance) + 1e-6)
            apart[side].append(d)
    apart, near = [np.concatenate(d) for d in apart], np.concatenate(near)
    return dict(zip(METRICS, (
        float(2 * (found & truth).sum() / total) if total else 1.0, float(scores / (n + false)) if n + false else 1.0, float(np.mean(hits)) if hits else math.nan,
        float(false / len(found)), max([float(np.percentile(d, 95)) for d in apart if len(d)], default=0.0), float(near.mean()) if len(near) else 1.0)))


def lesion_rows(arm, seed, table, images, found, truth):
    """Rows of LESION: each piece of the real masks, whether found, and what might explain it. Sizes in mm as the headers say, x and y in the brain box."""
    out = []
    for r, image, f, t in zip(table, images, found, truth):
        labels, n = components(t)
        outside = np.argwhere(~np.pad(head_mask(image)[0], 1)) - 1 if n else None
        for k in range(1, n + 1):
            at = np.argwhere(labels == k)
            area, centre = len(at) * math.prod(r['spacing']), at.mean(0)
            edge = np.hypot(*((outside - centre) * r['spacing']).T).min()
            out.append([arm, seed, r['patient'], r['folder'], r['z'], k, f'{math.sqrt(4 * area / math.pi):.4g}', f'{area:.5g}',
                        *(f'{(centre[i] + 0.5) / t.shape[i]:.4f}' for i in (1, 0)), n, f'{edge:.4g}', int(f[labels == k].any()), 'mm'])
    return out


def signed_rank(d):
    """Two-sided exact p of Wilcoxon's signed-rank test (Wilcoxon 1945) of differences: zeros dropped, ties share ranks, every sign pattern
    counted. 1 without a difference."""
    d = np.asarray(d, float)
    d = d[d != 0]
    if not len(d):
        return 1.0
    size = np.abs(d)
    rank2 = np.array([2 * (size < v).sum() + (size == v).sum() + 1 for v in size])        # twice the mean rank: whole numbers
    ways = np.zeros(rank2.sum() + 1)
    ways[0] = 1
    for r in rank2:
        ways[r:] += ways[:-r].copy()
        ways /= 2
    w = rank2[d > 0].sum()
    return float(min(1.0, 2 * min(ways[:w + 1].sum(), ways[w:].sum())))


def hodges_lehmann(d):
    """The median of the means of all pairs, each with itself too (Hodges 1963)."""
    i, j = np.triu_indices(len(d))
    return float(np.median((d[i] + d[j]) / 2))


def compare_arms(values, repeats, seed, margin):
    """values {arm: (patients, metrics)}, means over seeds -> rows [metric, comparison, n, effect, low, high, p, p_holm, not_inferior] of PAIRS that are
    there and of the interaction of a set with augmentation, (with set and aug - with set) - (aug - neither). Holm over a metric's comparisons.
    not_inferior, of Dice and lesion-wise Dice: the whole interval lies above -margin (which no p says)."""
    rows = []
    for m, metric in enumerate(METRICS):
        of = {a: v[:, m] for a, v in values.items()}
        differ = {f'{a} - {b}': of[a] - of[b] for a, b in PAIRS if {a, b} <= of.keys()}
        differ |= {f'{a} x aug': (of[f'{a}_aug'] - of[a]) - (of['real_aug'] - of['real']) for a in ('both', 'gated')
                   if {a, f'{a}_aug', 'real', 'real_aug'} <= of.keys()}
        differ = {k: d[np.isfinite(d)] for k, d in differ.items() if np.isfinite(d).any()}
        p = [signed_rank(d) for d in differ.values()]
        for (k, d), raw, corrected in zip(differ.items(), p, holm(p)):
            draws = [hodges_lehmann(d[torch.randint(len(d), (len(d),), generator=generator(seed, 'effect', i)).numpy()]) for i in range(repeats)]
            low, high = np.percentile(draws, (2.5, 97.5)).tolist()
            rows.append([metric, k, len(d), hodges_lehmann(d), low, high, raw, corrected, '' if m > 1 or ' x ' in k else 'yes' if low > -margin else 'no'])
    return rows


def arms_png(path, values, table):
    """One panel a metric of METRICS[:2]: a dot for each patient, the mean and its interval, for each arm."""
    left, step, high = 60, 92, 220
    image = Image.new('RGB', (max(left + step * len(values) + 20, 560), 2 * (high + 70)), (255, 255, 255))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for m in (0, 1):
        top = 30 + m * (high + 70)
        put = lambda v: top + (1 - v) * high
        draw.text((left, top - 22), f'{METRICS[m]} on real test patients: a dot is one, bar and line are the mean and its 95 %', (0, 0, 0), font)
        for v in (0, 0.25, 0.5, 0.75, 1):
            draw.line([(left, put(v)), (image.width - 20, put(v))], (225, 225, 225))
            draw.text((left - 34, put(v) - 7), f'{v:.2f}', (60, 60, 60), font)
        for i, arm in enumerate(values):
            x, colour = left + step * (i + 0.5), COLOURS[list(ARMS).index(arm) % 4]
            for j, v in enumerate(values[arm][:, m]):
                at = x - 24 + 48 * (j + 0.5) / len(values[arm])
                draw.ellipse([at - 3, put(v) - 3, at + 3, put(v) + 3], fill=colour)
            mean, *bounds = table[arm][METRICS[m]]
            draw.line([(x + 32, put(bounds[0])), (x + 32, put(bounds[1]))], (0, 0, 0), 2)
            draw.line([(x + 26, put(mean)), (x + 38, put(mean))], (0, 0, 0), 3)
            draw.text((x - draw.textlength(arm, font) / 2, top + high + 6), arm, colour, font)
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    atomic_write(path, buffer.getvalue())


def trained_once(args, name, steps, arm_images, arm_masks, seed, augmented, images, device):
    """What a training's segmenter finds in images (N,1,S,S): from results/NAME.npz if that training was finished, else trained and written."""
    file = Path(args.out) / 'results' / f'{name}.npz'
    if not file.exists():
        start = time.perf_counter()
        if args.engine == 'nnunetv2':
            found = nnunetv2(args, name, steps, augmented, device)
        else:
            found = train_segmenter(arm_images, arm_masks, steps, device, seed, args.network, args.width, args.kernel, args.batch_size, augmented, args.optimizer)(images)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, found=found)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, buffer.getvalue())
        print0(f'{name}: {len(arm_images)} slices, {steps} steps, {time.perf_counter() - start:.0f} s')
    found = np.load(file)['found']
    if found.shape != images[:, 0].shape:
        fail(f'{file}: holds {found.shape[0]} slices, expected {len(images)}; choose another --out')
    return found


def study_steps(args, device):
    """The number of steps of every training, from --iters or by timing 20; kept in arms.json. Fails when a flag there differs. Writes split.csv."""
    out, now = Path(args.out), {k: v for k, v in plain(args).items() if k in STUDY}
    counts = {s: len(arm_slices(args, a)[0]) for s, a in (('data', 'real'), ('fake', 'synthetic'), ('gated', 'gated')) if getattr(args, s)}
    old = json.loads((out / 'arms.json').read_text()) if (out / 'arms.json').exists() else None
    if old:
        changed = [f'--{k.replace("_", "-")} {now[k]} (was {old[k]})' for k in STUDY if old[k] != now[k]]
        known = old.get('sets', args.sets)                                                  # older studies do not say
        changed += [f'{k} {v} (was {known.get(k)})' for k, v in args.sets.items() if known.get(k) != v]
        changed += [f'{n} training slices of --{s} (were {old["slices"].get(s)})' for s, n in counts.items() if old['slices'].get(s) != n]
        if changed:
            fail(f'--out {out}: holds a study with other flags: {", ".join(changed[:4])}; choose another --out, or repeat its flags')
    out.mkdir(parents=True, exist_ok=True)
    part = {p['name']: p['part'] for p in split_patients(find_patients(args.data, ('bravo', 'seg')), args.split)}          # those without a slice, too
    write_csv(out / 'split.csv', ['patient', 'part'], sorted(part.items()))                             # analysis.py hard-cases looks for it here
    if old:
        return old['steps']
    steps = args.iters
    if not steps:
        images, masks, _ = arm_slices(args, args.arms[0])
        seconds = []
        for n in (2, 22):
            start = time.perf_counter()
            train_segmenter(images, masks, n, device, args.seed, args.network, args.width, args.kernel, args.batch_size, optimizer=args.optimizer)
            seconds.append(time.perf_counter() - start)
        seconds = (seconds[1] - seconds[0]) / 20
        steps = max(int(args.minutes * 60 / seconds), 1)
        print0(f'{seconds:.3f} s a step of {args.batch_size}: {steps} steps in {args.minutes:g} minutes, for every training')
    atomic_write(out / 'arms.json', json.dumps(dict(now, steps=steps, slices=counts, sets=args.sets), indent=1).encode())
    return steps


def downstream(args):
    """Trains a segmenter on each arm, with each seed, and compares them on the real test patients; or on folds of training patients."""
    device, out = setup(args), Path(args.out)
    real = study_slices(tuple(args.data), args.size, args.box, args.split, args.cache, args.labels or None, args.speck)
    for name, made in args.made.items():
        refuse_seen(getattr(args, name), made, real, ('val', 'test') if args.engine == 'nnunetv2' else ('test',))
    images, masks, table = arm_slices(args, 'real', 'test')
    arm_images, arm_masks, arm_table = arm_slices(args, 'real')
    patients = np.array([r['patient'] for r in table])
    if len({*patients}) < 2 or not arm_masks.any():
        fail(f'--data {" ".join(args.data)}: {len({*patients})} test patients (2 are needed), {int(arm_masks.any((1, 2, 3)).sum())} training slices with '
             'tumour; see --split')
    n = sum(p.numel() for p in build_segmenter(args.network, (args.size,) * 2, args.width, 5 if args.kernel == '5' else 3).parameters())
    print0(f'{args.network}, {n:,} parameters, slices of {args.size}x{args.size}'
           + ('' if args.width == 32 else f'; width {args.width}, the published networks have 32'))
    if args.cross_validate:
        return cross_validate(args, arm_images, arm_masks, arm_table, device)
    if args.left_out:
        print0(f'left out for want of a set: {", ".join(args.left_out)}')
    steps = study_steps(args, device)
    truth, names = masks[:, 0] > 0, sorted({*patients})
    spacing = np.array([r['spacing'] for r in table])
    results, found, rows = {a: [] for a in args.arms}, {}, []
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in args.arms:
            own_images, own_masks, _ = arm_slices(args, arm)
            f = trained_once(args, f'{arm}_{seed}', steps, own_images, own_masks, seed, arm.endswith('_aug'), images, device)
            if not (f & truth).any():
                print0(f'WARNING: {arm}_{seed} touches no real lesion: this training failed, and its zeros compare nothing; take more steps')
            scores = {p: patient_metrics(f[patients == p], truth[patients == p], spacing[patients == p], args.tolerance) for p in names}
            atomic_write(out / 'results' / f'{arm}_{seed}.json', json.dumps(dict(arm=arm, seed=seed, steps=steps, slices=len(own_images), patients=scores), indent=1).encode())
            results[arm].append([list(scores[p].values()) for p in names])
            found.setdefault(arm, f)
            rows += lesion_rows(arm, seed, table, images, f, truth)
    write_csv(out / 'lesions.csv', LESION, rows)
    write_csv(out / 'patients.csv', ['arm', 'seed', 'patient', *METRICS],
              [[arm, args.seed + k, p, *v] for arm, r in results.items() for k, s in enumerate(r) for p, v in zip(names, s)])

    values = {arm: np.mean(r, 0) for arm, r in results.items()}                                   # (patients, metrics)
    draws = [torch.randint(len(names), (len(names),), generator=generator(args.seed, 'downstream', k)).numpy() for k in range(args.repeats)]
    summary = {arm: {m: [float(np.nanmean(v[:, i])), *np.nanpercentile([np.nanmean(v[d, i]) for d in draws], (2.5, 97.5)).tolist()]
                     for i, m in enumerate(METRICS)} for arm, v in values.items()}
    tests = compare_arms(values, args.repeats, args.seed, args.margin)
    print0(f'{len(names)} real test patients, {len(table)} slices (2D, pooled over a patient), {args.seeds} seeds, {steps} steps; mean over patients')
    print_table(['arm', *METRICS], [[arm, *(f'{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]' for v in s.values())] for arm, s in summary.items()])
    header = ['metric', 'comparison', 'patients', 'effect', 'low', 'high', 'p', 'p_holm', 'not_inferior']
    print0()
    print_table(header, [[*r[:3], *(f'{v:.3f}' for v in r[3:8]), r[8]] for r in tests if r[0] in METRICS[:2]])
    write_csv(out / 'tests.csv', header, tests)
    write_csv(out / 'metrics.csv', ['arm', *(f'{m}{end}' for m in METRICS for end in ('', ', low', ', high'))],
              [[arm, *itertools.chain(*s.values())] for arm, s in summary.items()])
    keys = [k for k in summary if k != args.arms[0]]                                              # as analysis.py compare reads it: against the first arm
    atomic_write(out / 'metrics.json', json.dumps(dict(
        fake=args.fake, gated=args.gated, network=args.network, width=args.width, parameters=n, steps=steps, seeds=args.seeds, patients=len(names),
        slices=len(table), arms=summary, tests=[dict(zip(header, r)) for r in tests],
        metrics={f'{m}, {k}': dict(zip(('fake', 'fake_low', 'fake_high', 'floor', 'floor_low', 'floor_high'), summary[k][m] + summary[args.arms[0]][m]))
                 for k in keys for m in METRICS}), indent=1).encode())
    arms_png(out / 'arms.png', values, summary)
    pair = next(([a, b] for b, a in (('both_aug', 'real_aug'), ('both', 'real')) if {a, b} <= found.keys()), args.arms[:2])
    order = np.flatnonzero(truth.any((1, 2)))
    order = order[np.argsort(np.mean([dice(found[a], truth)[order] for a in pair], 0), kind='stable')]
    show, zoom = np.concatenate([order[:5], order[len(order) // 2 - 2:][:5]]), max(1, 128 // args.size)
    save_grid(out / 'slices.png', [[outline(images[i, 0], m[i], c, zoom) for i in show] for m, c in
                                   ((truth, (255, 80, 60)), *((found[a], (80, 220, 90)) for a in pair))], ['truth', *pair], zoom)
    print0(f'look at {out}/arms.png, and at {out}/slices.png: the five worst slices, then five typical ones')


def cross_validate(args, images, masks, table, device):
    """real_aug on all folds but one of the training patients, its lesions found or missed in that one: cv_lesions.csv. No test patient is seen."""
    out, patients = Path(args.out), np.array([r['patient'] for r in table])
    names = sorted({*patients})
    if len(names) < args.cross_validate:
        fail(f'--cross-validate {args.cross_validate}: there are {len(names)} training patients')
    steps, rows, truth = study_steps(args, device), [], masks[:, 0] > 0
    order = torch.randperm(len(names), generator=generator(args.seed, 'folds')).tolist()
    fold = {names[k]: i % args.cross_validate for i, k in enumerate(order)}
    for k in range(args.cross_validate):
        held = np.array([fold[p] == k for p in patients])
        f = trained_once(args, f'cv{args.cross_validate}_{k}', steps, images[~held], masks[~held], args.seed, True, images[held], device)
        rows += lesion_rows('real_aug', args.seed, [r for r, h in zip(table, held) if h], images[held], f, truth[held])
    write_csv(out / 'cv_lesions.csv', LESION, rows)
    hits = [r[LESION.index('hit')] for r in rows]
    print0(f'{len(names)} training patients in {args.cross_validate} folds: {sum(hits)} of {len(hits)} lesions found; {out}/cv_lesions.csv')


# ---------------------------------------------------------------------------------------------------------------------
# downstream --engine nnunetv2: the published program, through its command line, on the same slices
# ---------------------------------------------------------------------------------------------------------------------
NNUNET = ('nnUNetv2_plan_and_preprocess', 'nnUNetv2_train', 'nnUNetv2_predict')
TRAINER = """import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = {epochs}, {steps}, 1, 1


class nnUNetTrainerShortNoDA(nnUNetTrainerShort, nnUNetTrainerNoDA):
    pass
"""


def export_nnunet(args, arm, raw):
    """Writes an arm as nnU-Net v2's raw data: training slices real_*, syn_*, those of val patients val_*, test slices test_*. dataset.json last.

    Every pixel measures 1 and a slice is 999 thick, so that nnU-Net sees the same 64 x 64 (or --size) pixels as --engine own, resamples nothing.
    """
    shutil.rmtree(raw, ignore_errors=True)
    for folder in ('imagesTr', 'labelsTr', 'imagesTs'):
        (raw / folder).mkdir(parents=True)
    n = 0
    for part in ('train', 'val', 'test'):
        images, masks, table = arm_slices(args, arm, part)
        if not table:
            fail(f'--data {" ".join(args.data)}: no slice of a {part} patient, and nnU-Net needs some; see --split')
        for i, (image, mask, row) in enumerate(zip(images, masks, table)):
            name = f'{part if part != "train" else "real" if row["root"] in [str(Path(d)) for d in args.data] else "syn"}_{i:06d}'
            for folder, a in ((f'images{"Ts" if part == "test" else "Tr"}/{name}_0000', image), *([] if part == 'test' else [(f'labelsTr/{name}', mask)])):
                nib.save(nib.Nifti1Image(a[0].T[..., None], np.diag([1.0, 1, 999, 1])), raw / f'{folder}.nii.gz')
            n += part != 'test'
    atomic_write(raw / 'dataset.json', json.dumps(dict(channel_names={'0': 'T1'}, labels=dict(background=0, tumour=1), numTraining=n, file_ending='.nii.gz')).encode())


def nnunetv2(args, name, steps, augmented, device):
    """What nnU-Net v2, trained on an arm, finds in the test slices: (N,S,S) bool. Goes on where a killed call stopped: export, plans, epoch.

    Every arm has raw data, plans, splits and results of its own. Real val patients validate, synthetic slices only train. Its last weights
    are taken, without mirrors at test time, as --engine own does. It draws from no seed: seeds are repeats.
    """
    arm, seed = name.rsplit('_', 1)
    root, here = Path(args.out).resolve() / 'nnunet' / arm, 'Dataset001_study'
    raw, plans = root / 'raw' / here, root / 'preprocessed' / here
    # passive: threads that spin while they wait made a step 30 times as long on cores that others use
    env = {'nnUNet_def_n_proc': '1', 'nnUNet_compile': 'f', 'OMP_WAIT_POLICY': 'PASSIVE', **os.environ, 'nnUNet_raw': str(raw.parent),
           'nnUNet_preprocessed': str(plans.parent), 'nnUNet_results': str(root / f'results_{seed}'), 'nnUNet_extTrainer': str(root / 'trainer')}
    root.mkdir(parents=True, exist_ok=True)
    with open(root / 'lock', 'w') as lock:                                # its programs hold it too: one may outlive a killed call
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f'{root}: another process is still at work there; end it, or wait')

        def run(program, *flags):
            log = root / f'{program}_{seed}.log'
            print0(f'{name}: {program} {" ".join(flags)}; log: {log}')
            with open(log, 'w') as f:
                more = {'nnUNet_n_proc_DA': os.environ.get('nnUNet_n_proc_DA', '0') if program == NNUNET[1] else '1'}           # its planner fails with 0
                code = subprocess.run([program, *flags], env={**env, **more}, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]).returncode
            if code:
                last = [line for line in log.read_text(errors='replace').splitlines() if line.strip()][-1:]
                fail(f'{program} ended with code {code}: {"".join(last) or "it said nothing"}; see {log}. The same command tries this step again; to begin the arm anew, '
                     f'remove {root}', 1)

        if not (raw / 'dataset.json').exists():
            export_nnunet(args, arm, raw)
        cases = sorted(f.name[:-7] for f in (raw / 'labelsTr').iterdir())
        if not (plans / 'splits_final.json').exists():
            run(NNUNET[0], '-d', '1', '-c', '2d', '--verify_dataset_integrity', '-np', '1', '-npfp', '1')
            told = json.loads((plans / 'nnUNetPlans.json').read_text())
            net = told['configurations']['2d']
            net['batch_size'], shape = args.batch_size, net['architecture']['arch_kwargs']
            shape['features_per_stage'] = [min(args.width * 2 ** i, 512) for i in range(shape['n_stages'])]
            atomic_write(plans / 'nnUNetPlans.json', json.dumps(told, indent=1).encode())
            folds = [dict(train=[c for c in cases if not c.startswith('val_')], val=[c for c in cases if c.startswith('val_')])]
            atomic_write(plans / 'splits_final.json', json.dumps(folds, indent=1).encode())
        epochs = min(20, steps)
        (root / 'trainer').mkdir(exist_ok=True)
        (root / 'trainer/short.py').write_text(TRAINER.format(epochs=epochs, steps=steps // epochs))
        how = ('-device', torch.device(device).type, '-tr', 'nnUNetTrainerShort' if augmented else 'nnUNetTrainerShortNoDA')
        if not (root / f'results_{seed}' / here / f'{how[-1]}__nnUNetPlans__2d/fold_0/checkpoint_final.pth').exists():
            run(NNUNET[1], '1', '2d', '0', *how, '--c')
        run(NNUNET[2], '-i', str(raw / 'imagesTs'), '-o', str(root / f'found_{seed}'), '-d', '1', '-c', '2d', '-f', '0', *how, '--disable_tta', '-npp', '1', '-nps', '1')
    files = sorted((root / f'found_{seed}').glob('test_*.nii.gz'))
    return np.stack([np.asarray(nib.load(f).dataobj)[..., 0].T > 0 for f in files])


# ---------------------------------------------------------------------------------------------------------------------
# coherence
# ---------------------------------------------------------------------------------------------------------------------


def z_spectrum(volume, head):
    """Mean power along z of the voxel columns that lie in the head throughout, their means taken away, Hann window: (Z//2,) at frequencies
    1/Z .. 1/2 cycles a slice, summing to 1. nan where there is no such column, or nothing changes."""
    lines = volume[:, head.all(0)]
    window = np.hanning(len(volume) + 2)[1:-1, None]
    power = (np.abs(np.fft.rfft((lines - lines.mean(0)) * window, axis=0)) ** 2).mean(1)[1:] if lines.size else np.full(len(volume) // 2, math.nan)
    return power / power.sum() if power.sum() > 1e-9 else np.full(len(power), math.nan)                # a frozen stack has none


def stack_measures(volume, mask):
    """How alike the slices of a stack are: volume (Z,S,S) in [-1,1], mask (Z,S,S), Z >= 4. Dict of numbers, nan where there is no tumour."""
    head, x = head_mask(volume), torch.from_numpy(np.ascontiguousarray(volume))[:, None]
    luminance, structure = ssim_parts(x[1:], x[:-1])

    def alike(k):
        both = [(a[h], b[h]) for a, b, h in zip(volume[k:], volume[:-k], head[k:] & head[:-k]) if h.sum() > 1]
        with np.errstate(invalid='ignore'):
            return float(np.nanmean([np.corrcoef(a, b)[0, 1] for a, b in both] or [math.nan]))

    dz, dy, dx = (np.abs(np.diff(volume, axis=a)) for a in range(3))
    inside = [head[1:] & head[:-1], head[:, 1:] & head[:, :-1], head[:, :, 1:] & head[:, :, :-1]]
    plane = (dy[inside[1]].mean() + dx[inside[2]].mean()) / 2
    sharp = [np.mean([d[part][i[part]].mean() for d, i in zip((dy, dx), inside[1:])]) for part in (slice(0, len(volume) // 3), slice(-(len(volume) // 3), None))]
    area, spectrum, m = head.sum((1, 2)).astype(float), z_spectrum(volume, head), mask > 0
    either, (labels, n) = (m[1:] | m[:-1]).sum((1, 2)), components(m)
    extents = [np.ptp(np.nonzero(labels == k)[0]) + 1 for k in range(1, n + 1)]
    return {'adjacent SSIM': float((luminance * structure).mean()), **{f'correlation, {k} slice{"s" * (k > 1)} apart': alike(k) for k in (1, 2, 3)},
            'z gradient / in-plane': dz[inside[0]].mean() / plane, 'power above 1/4 cycle a slice': spectrum[len(spectrum) // 2:].sum(),
            'jitter of head area': np.abs(np.diff(area, 2)).mean() / area.mean(), 'sharpness, top third / lowest': sharp[1] / sharp[0],
            'head area, top third / lowest': area[-(len(area) // 3):].mean() / area[:len(area) // 3].mean(),
            'mask IoU of neighbours': ((m[1:] & m[:-1]).sum((1, 2))[either > 0] / either[either > 0]).mean() if either.any() else math.nan,
            'lesion extent, slices': float(np.mean(extents)) if n else math.nan}


def coherence(args):
    """Ratios of stack_measures to those of --part's real stacks, beside training patients' as the floor. Where the masks came from that
    part's own patients, only these are the real side, and a bootstrap draw holds the same ones on both sides."""
    out, made = Path(args.out), json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('stack'):
        fail(f'--fake {args.fake}: holds single slices; make volumes with sample.py --stack')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = real_like(args, made, parts=(args.part,))
    stacks = {side: [] for side in ('fake', 'train', args.part)}                                      # (patient, volume, mask, folder)
    for data in (fake, real):
        for (root, folder, part), rows in itertools.groupby(range(len(data.table)), lambda i: (data.table[i]['root'], data.table[i]['folder'], data.part[i])):
            rows, side = list(rows), 'fake' if data is fake else part
            if side in stacks and len(rows) >= 4:
                row = data.table[rows[0]]
                stacks[side].append((row['source'] or row['patient'], data.images[rows][:, 0], data.masks[rows][:, 0], Path(root) / folder))
    paired = {s[0] for s in stacks['fake']} <= {s[0] for s in stacks[args.part]}
    if paired:
        stacks[args.part] = [s for s in stacks[args.part] if s[0] in {f[0] for f in stacks['fake']}]
    if min(map(len, stacks.values())) < 2:
        fail('at least 2 stacks of 4 slices or more are needed on each side, there are ' + ', '.join(f'{len(v)} {k}' for k, v in stacks.items()) + '; see --split')
    values = {side: [stack_measures(*s[1:3]) for s in some] for side, some in stacks.items()}
    names = list(values['fake'][0])
    table = {side: np.array([[v[n] for n in names] for v in some]) for side, some in values.items()}
    of = {side: np.array([s[0] for s in some]) for side, some in stacks.items()}

    def ratios(g):
        """fake / real and train / real of each measure; with a generator, of patients drawn with replacement."""
        pick, mean = {}, {}
        for side in (args.part, 'fake', 'train'):
            patients = np.unique(of[side])
            pick[side] = patients if g is None else pick[args.part] if side == 'fake' and paired else patients[torch.randint(len(patients), (len(patients),), generator=g).numpy()]
            rows = np.concatenate([np.flatnonzero(of[side] == p) for p in pick[side]])
            with np.errstate(all='ignore'):
                mean[side] = np.array([np.mean(c[np.isfinite(c)]) if np.isfinite(c).any() else math.nan for c in table[side][rows].T])
        with np.errstate(all='ignore'):
            return [dict(zip(names, mean[side] / mean[args.part])) for side in ('fake', 'train')]

    draws = [ratios(generator(args.seed, 'coherence', k)) for k in range(args.repeats)]
    counts = {side: len(some) for side, some in stacks.items()}
    report(out, intervals(names, ratios(None), draws), dict(fake=args.fake, hash=made['bravo'], rho=made['rho'], stacks=counts, paired=bool(paired), repeats=args.repeats,
                                                           real={n: float(np.nanmean(c)) if np.isfinite(c).any() else math.nan for n, c in zip(names, table[args.part].T)}),
           ('fake/real', 'train/real'))
    write_csv(out / 'stacks.csv', ['set', 'patient', 'folder', 'slices', *names],
              [[side, s[0], s[3].name, len(s[1]), *(f'{v:.4g}' for v in row)] for side, some in stacks.items() for s, row in zip(some, table[side])])
    grid = np.linspace(0.05, 0.5, 19)
    spectra = {side: [np.interp(grid, np.arange(1, len(v) // 2 + 1) / len(v), z_spectrum(v, head_mask(v)) * len(v)) for _, v, *_ in some] for side, some in stacks.items()}
    plot(out / 'spectrum_z.png', {side: (grid, np.nanmean(some, 0)) for side, some in spectra.items()}, 'power along z', 'cycles a slice', 'share', logy=True)
    rows = []
    for patient, volume, mask, folder in stacks['fake'][:4]:
        twin = next((s for s in stacks[args.part] if s[0] == patient), stacks[args.part][len(rows) % len(stacks[args.part])])
        z, y, _ = read_nifti(folder / 'bravo.nii.gz')[1]
        rows.append([coronal(*s[1:3], z / y, max(1, 128 // volume.shape[-1])) for s in (twin, (patient, volume, mask))])
    height = max(len(p) for row in rows for p in row)
    save_grid(out / 'coronal.png', [[np.pad(p, ((0, height - len(p)), (0, 0), (0, 0))) for p in (r[k] for r in rows)] for k in (0, 1)], ['real', 'generated'])
    print0(f'{counts["fake"]} generated stacks against {counts[args.part]} real {args.part} stacks' + (' of the same patients' if paired else '')
           + f'; 1: like real, SSIM and correlations above it: frozen along z; look at {out}/coronal.png and spectrum_z.png')


def coronal(volume, mask, step, zoom):
    """The coronal slice through the middle of the tumour (or of the image), head up, as (H,W,3): a slice is `step` pixels thick."""
    rows = np.nonzero((mask > 0).any((0, 2)))[0]
    y = int(np.median(rows)) if len(rows) else volume.shape[1] // 2
    tall = max(round(step * zoom), 1)
    return outline(*(v[::-1, y].repeat(tall, 0).repeat(zoom, 1) for v in (volume, mask)))


# ---------------------------------------------------------------------------------------------------------------------
# atlas. Points are (x, y, z) in mm from the corner of a grid as displayed, so 2 p / extent - 1 is what grid_sample wants; a matrix
# (3,4) takes the points of a patient to those of the template.
# ---------------------------------------------------------------------------------------------------------------------

UNITS = torch.tensor([1.0] * 3 + [1 / 60] * 9)      # of the 12 dof: each moves the brain's edge, 60 mm from its centre, by about 1 mm
FLAT = torch.tensor([math.inf, math.inf, 0, 0, 0, math.inf, 15, 15, 0, math.inf, 0, 0])        # 6 in the plane of a slice, scale within 30 %
TILT = torch.tensor([math.inf, math.inf, 0, *[math.radians(10) * 60] * 2, math.inf, 15, 15, 0, math.inf, 0, 0])
NEAR = 0.09         # nats below the best: levels as good as that are in the interval of a single slice; so it held 15 of 16 slices of known place
COPIES = ((-4, 0.97, 1.5), (3, 1.03, -0.5), (-7, 1.0, 0.3), (8, 0.98, -1.2))           # degrees, scale and voxels of register_often's
extent_of = lambda shape, spacing: torch.tensor([n * s for n, s in zip(shape[::-1], spacing[::-1])], dtype=torch.float32)
carried = lambda matrix, points: points @ matrix[:, :3].T + matrix[:, 3]
thick = lambda spacing: spacing[0] > 2 * max(spacing[1:])                     # a stack: what is between its slices would be made up
rms = lambda d: d.square().sum(1).mean().sqrt().item()                       # length of d (N,3)


def affine(q):
    """T R Sh S of q (K,12) in UNITS: translation, rotation vector, log-scales, shears xy, xz, yz. (K,3,4), for points from the centre."""
    t, r, s, h = (q * UNITS).split(3, 1)
    zero, one = torch.zeros_like(t[:, 0]), torch.ones_like(t[:, 0])
    skew = torch.stack([zero, -r[:, 2], r[:, 1], r[:, 2], zero, -r[:, 0], -r[:, 1], r[:, 0], zero], 1).view(-1, 3, 3)
    shear = torch.stack([one, h[:, 0], h[:, 1], zero, one, h[:, 2], zero, zero, one], 1).view(-1, 3, 3)
    return torch.cat([torch.linalg.matrix_exp(skew) @ shear * s.exp()[:, None], t[:, :, None]], 2)


def uncentred(A, here, there):
    """A map (3,4) of points from their middle, for points from the corner: here (3,) is the middle of what comes in, there of what comes out."""
    return torch.cat([A[:, :3], (A[:, 3] + there - A[:, :3] @ here)[:, None]], 1)


def after(second, first):
    """The map (3,4) that carries points by first, then by second."""
    return torch.cat([second[:, :3] @ first[:, :3], carried(second, first[None, :, 3]).T], 1)


def inverse(matrix):
    """Of an affine map (3,4), in fp64."""
    back = torch.linalg.inv(matrix[:, :3].double())
    return torch.cat([back, -back @ matrix[:, 3:].double()], 1).to(matrix.dtype)


def joint_histogram(fixed, moving, weight=None, bins=32, order=3):
    """p(a,b) (K,B,B) of bin numbers fixed (N,) and values moving (K,N) in [0,1], whose window is a B-spline of order 3 (Mattes 2003) or 0."""
    if order:
        u = 1 + moving.clamp(0, 1 - 1e-5) * (bins - 3)
        low = u.detach().floor()
        f, low = u - low, low.long() - 1
        w = torch.stack([(1 - f) ** 3, 3 * f ** 3 - 6 * f ** 2 + 4, -3 * f ** 3 + 3 * f ** 2 + 3 * f + 1, f ** 3], 2) / 6
    else:
        low, w = (moving * bins).long().clamp(0, bins - 1), torch.ones_like(moving)[..., None]
    w = w if weight is None else w * weight[..., None]
    at = ((torch.arange(len(moving))[:, None] * bins + fixed) * bins + low)[..., None] + torch.arange(w.shape[2])
    h = moving.new_zeros(len(moving) * bins * bins).index_add(0, at.flatten(), w.flatten()).view(-1, bins, bins)
    return h / h.sum((1, 2), keepdim=True).clamp(min=1e-9)


def information(p):
    """Mutual information H(F) + H(M) - H(F,M) in nats, and NMI (H(F) + H(M)) / H(F,M) in [1,2] (Studholme 1999), of p (K,B,B)."""
    H = lambda v: -(v * (v + 1e-12).log()).flatten(1).sum(1)
    both, apart = H(p), H(p.sum(1)) + H(p.sum(2))
    return apart - both, apart / both


def look(volume, points, extent, mode='bilinear'):
    """Values (C,K,N) of a volume (C,Z,H,W) at points (K,N,3), the border's beyond it; and which points are inside, (K,N)."""
    grid = 2 * points / extent - 1
    return F.grid_sample(volume[None], grid[None, None], mode, 'border', align_corners=False)[0, :, 0], (grid.detach().abs() <= 1).all(-1)


def explained(q, centre, points, fixed, volume, extent, order=3):
    """What points (N,3), from their centre, tell about a volume (C,Z,H,W) in [0,1] where affine(q) (K,12) puts them: MI times the share of
    the points that lie inside, so that leaving the image does not pay; and NMI; (K,)."""
    A = affine(q)
    values, inside = look(volume, points @ A[:, :, :3].mT + A[:, None, :, 3] + centre, extent)
    mi, nmi = information(joint_histogram(fixed, values[0], inside, order=order))
    return mi * inside.float().mean(1), nmi


def climb(start, reach, steps, lr, *about):
    """Adam with a falling rate on all starts (K,12) at once, no parameter further from its start than reach (12,). Returns q, explained."""
    q = start.clone().requires_grad_()
    opt = torch.optim.Adam([q], lr, betas=(0.9, 0.9))
    for step in range(steps):
        opt.param_groups[0]['lr'] = lr * (0.05 + 0.95 * (1 - step / steps))
        q.grad, = torch.autograd.grad(-explained(q, *about)[0].sum(), q)
        opt.step()
        q.data = start + (q.data - start).clamp(-reach, reach)
    with torch.no_grad():
        return q.detach(), explained(q, *about)[0]


def coarser(v, spacing, mm=2.0):
    """A volume (Z,H,W) averaged over blocks of about that size, and its spacing; a remainder at the end is cut off."""
    k = [min(n, max(1, round(mm / s))) for n, s in zip(v.shape, spacing)]
    return F.avg_pool3d(v[None], k)[0], [a * s for a, s in zip(k, spacing)]


class Template:
    """Labels (Z,H,W) and, at about 2 mm and in [0,1], the brain, smoothed by Gaussians of 1, 2 and 4 mm; at: its voxels and those up to 6 mm
    from it, shuffled, where images are compared. extent of the labels, size of the levels, mm; floor: the world's z at the lower border."""

    def __init__(self, file, labels_file):
        (image, spacing), (labels, _) = read_nifti(file), read_nifti(labels_file)
        if labels.shape != image.shape:
            fail(f'--labels {labels_file}: shape {labels.shape[::-1]} differs from {image.shape[::-1]} of --template {file}; resample it onto the template')
        if labels.max() >= 2 ** 16 or (labels != labels.round()).any() or not np.isin(labels, VENTRICLES).any() or labels.min() < 0:
            fail(f'--labels {labels_file}: expected FreeSurfer\'s whole numbers from 0 to 65535 with ventricles ({", ".join(map(str, VENTRICLES))}) among them')
        if (image > 0).mean() > 0.6:
            fail(f'--template {file}: {(image > 0).mean():.0%} of its voxels are above 0; expected a brain without skull, 0 outside it')
        world = nib.as_closest_canonical(nib.load(file)).affine
        self.labels, self.extent, self.floor = torch.from_numpy(labels.copy()), extent_of(image.shape, spacing), world[2, 3] - spacing[0] / 2
        v, self.spacing = coarser(torch.from_numpy(image.copy()), spacing)
        brain = (v > 0).float()
        v = (v / np.percentile(v[v > 0].numpy(), 99)).clamp(0, 1)
        self.levels, self.size = {mm: blur(v, mm, self.spacing) for mm in (1, 2, 4)}, extent_of(v.shape, self.spacing)
        at = (blur(brain, 3, self.spacing) > 0.02).nonzero()
        self.at = at[torch.randperm(len(at), generator=generator('atlas', len(at)))]
        self.centre = self.mm(brain.nonzero()).mean(0)

    def mm(self, at):
        return (at.flip(1) + 0.5) * torch.tensor(self.spacing[::-1])

    def sample(self, n, mm):
        """The first n of the shuffled points near the brain, from its centre, and their bins of 32."""
        return self.mm(self.at[:n]) - self.centre, (self.levels[mm][tuple(self.at[:n].T)] * 31.999).long()


def brain_of(image, spacing, clean=False):
    """An image (Z,H,W) without its skull, in [0,1] and at about 2 mm; its spacing; the brain's centre (x, y) mm. Brain: the largest piece
    of what is brighter than 0.6 of the head's inner median, opened by 5 mm in plane (that cuts the scalp off), grown 3 mm more for its fluid.
    clean: nothing brighter than 1.6 of it (fat), and a soft edge, so that little hangs on a pixel; a single slice tells its level by such remains."""
    v, spacing = coarser(torch.from_numpy(np.ascontiguousarray(image)), spacing)
    pool = lambda m, mm: F.max_pool2d(m.float(), [2 * round(mm / s) + 1 for s in spacing[1:]], 1, [round(mm / s) for s in spacing[1:]])
    head = torch.from_numpy(head_mask(v.numpy()))
    inner = 1 - pool(~head, 15) > 0
    middle = v[inner if inner.any() else v > v.min()].median()
    fat = (v >= 1.6 * middle) & clean
    core = 1 - pool((v <= 0.6 * middle) | fat, 5)
    labels, n = components(core[:, ::2, ::2].numpy())
    if n:
        piece = torch.from_numpy(labels == np.bincount(labels.ravel())[1:].argmax() + 1).float()
        core = core * F.interpolate(piece[None], core.shape[1:], mode='nearest')[0]
    brain = pool(core, 8) > 0 if n else torch.ones_like(v, dtype=torch.bool)
    bare = (v == v.min()).float().mean() > 0.5 and (brain & head).sum() > 0.8 * head.sum()
    brain = v > v.min() if bare else brain                                    # somebody took the skull away already
    low, high = np.percentile(v[brain & (v > v.min())].numpy(), (1, 99))
    _, y, x = brain.nonzero().float().mean(0).tolist()
    edge = ~fat * blur(brain.float(), 4, (1e3, *spacing[1:])) if clean and not bare else brain             # in plane
    return ((v - low) / max(high - low, 1e-6)).clamp(0, 1) * edge, spacing, ((x + 0.5) * spacing[2], (y + 0.5) * spacing[1])


@torch.no_grad()
def register(template, image, spacing):
    """A volume (Z,H,W): matrix, NMI, and NMI of the same place in the volume turned upside down. 12 dof from the template to the patient, from
    1,755 starts (scale, height, depth, pitch, z-scale), on 3,000 to 60,000 points: 5 to 8 s of one core. A tenth of them climbs a little before
    the best are told apart, for from afar the right one need not look it."""
    brain, spacing, middle = brain_of(image, spacing, clean=True)
    centre = torch.tensor([*middle, len(brain) * spacing[0] / 2])
    extent, reach = extent_of(brain.shape, spacing), torch.full((12,), math.inf)
    starts = torch.cartesian_prod(torch.tensor([0.82, 0.92, 1.03]).log() * 60, torch.linspace(-0.35, 0.4, 13) * extent[2], torch.tensor([-25.0, 0, 25]),
                                  torch.tensor([-15.0, 0, 15]), torch.tensor([0.7, 0.9, 1.15, 1.5, 2.0]).log() * 60)
    q, told = torch.zeros(len(starts), 12), None
    q[:, [6, 2, 1, 3, 8]], q[:, 7] = starts, starts[:, 0]
    for mm, n, scales, keep, steps, lr in ((4, 3000, 3, 64, 15, 2.0), (4, 3000, 3, 12, 50, 2.0), (2, 20000, 3, 2, 50, 0.7), (1, 60000, 1, 1, 60, 0.25)):
        about = (centre, *template.sample(n, mm), blur(brain, mm, spacing)[None], extent)
        told = torch.cat([explained(part, *about)[0] for part in q.split(64)]) if told is None else told
        best = told.view(scales, -1).topk(keep)[1] + torch.arange(scales)[:, None] * (len(q) // scales)      # the best of each scale
        with torch.enable_grad():
            q, told = climb(q[best.flatten()], reach, steps, lr, *about)
    A = affine(q)[0]
    nmi, turned = (explained(q, *about[:3], v, extent, order=0)[1].item() for v in (about[3], about[3].flip(1)))
    return inverse(uncentred(A, template.centre, centre)), nmi, turned


def known_move(shape, spacing, degrees=5, scale=1.05, voxels=3):
    """A turn about each axis, a scale and a shift, about the middle: (3,4), mm to mm. Stacks move in their planes alone."""
    free = float(not thick(spacing))
    turn, grow, middle = math.radians(degrees) * 60, math.log(scale) * 60, extent_of(shape, spacing) / 2
    shift = [voxels * s * way for s, way in zip(spacing[::-1], (1, -1, free))]
    A = affine(torch.tensor([[*shift, turn * free, turn * free, turn, grow, grow, grow * free, 0, 0, 0]]))[0]
    return uncentred(A, middle, middle)


def moved_copy(image, spacing, move):
    """A volume (Z,H,W) after a known_move. A stack's by cubic interpolation in its planes, as a linear one smooths; volumes that move along z too by
    a linear one."""
    v = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    points = torch.cat([plane((0, 0, *v.shape[1:]), v.shape[1:], spacing, z) for z in range(len(v))])
    at = (2 * carried(inverse(move), points) / extent_of(v.shape, spacing) - 1).view(*v.shape, 3)
    if thick(spacing):
        return F.grid_sample(v[:, None], at[..., :2], 'bicubic', 'border', align_corners=False)[:, 0].clamp(v.min(), v.max()).numpy()
    return F.grid_sample(v[None, None], at[None], 'bilinear', 'border', align_corners=False)[0, 0].numpy()


def brain_points(image, spacing):
    """Middles of the voxels of about 2 mm of the brain, (N,3) mm."""
    brain, mm, _ = brain_of(image, spacing, clean=True)
    return ((brain > 0).nonzero().flip(1) + 0.5) * torch.tensor(mm[::-1])


@torch.no_grad()
def register_often(template, image, spacing, copies):
    """register() of a volume and of copies that are moved a little, brought back: the mean matrix of the answers within 3 voxels (RMS over the
    brain, on the template) of the one that most others are near, and that one's scores. What hangs on where a pixel falls goes with the mean. 0 copies: register()."""
    told = [register(template, image, spacing)]
    if not copies:
        return told[0]
    for how in COPIES[:copies]:
        move = known_move(image.shape, spacing, *how)
        matrix, *scores = register(template, moved_copy(image, spacing, move), spacing)
        told.append((after(matrix, move), *scores))
    points = brain_points(image, spacing)
    at = [carried(m, points) for m, *_ in told]
    apart = torch.tensor([[rms(a - b) for b in at] for a in at])
    middle = int(apart.median(1)[0].argmin())
    agree = apart[middle] <= 3 * max(spacing[1:])
    return torch.stack([m for m, *_ in told])[agree].mean(0), *told[middle][1:]


@torch.no_grad()
def moved_apart(template, image, spacing, matrix, copies=0):
    """A copy of a volume (Z,H,W) after known_move() is registered; where do the two answers put the voxels of the brain? RMS difference, voxels."""
    move, points = known_move(image.shape, spacing), brain_points(image, spacing)
    other = register_often(template, moved_copy(image, spacing, move), spacing, copies)[0]
    apart = carried(matrix, points) - carried(after(other, move), points)
    return rms(apart @ torch.linalg.inv(matrix[:, :3]).T / torch.tensor(spacing[::-1]))


def search(template, image, spacing):
    """A single slice (1,H,W) at every level, 4 mm apart: 6 dof in plane, then tilts up to 10 degrees, then the level itself. Matrix, NMI, the
    template's z at the slice's middle (mm above its lower border), and the levels that are about as good: low, high."""
    v, spacing, middle = brain_of(image, spacing)
    centre = torch.tensor([*middle, spacing[0] / 2])
    at = (F.max_pool2d((v > 0).float(), 5, 1, 2)[0] > 0).nonzero()
    at = at[torch.randperm(len(at), generator=generator('atlas', len(at)))[:4000]]
    points = F.pad((at.flip(1) + 0.5) * torch.tensor(spacing[:0:-1]), (0, 1), value=spacing[0] / 2) - centre
    fixed = (blur(v, 1, spacing)[0][tuple(at.T)] * 31.999).long()
    about = (template.centre, points, fixed, template.levels[2][None], template.size)
    height = template.mm(template.at)[:, 2]
    z = torch.arange(float(height.min()) + 10, float(height.max()) - 8, 4)
    q = torch.zeros(3, len(z), 12)
    q[:, :, 2], q[:, :, 1] = z - template.centre[2], torch.tensor([[-20.0], [0], [20]])
    with torch.no_grad():
        best = torch.stack([explained(part, *about)[0] for part in q]).argmax(0)
    q, _ = climb(q[best, torch.arange(len(z))], FLAT, 30, 2.0, *about)
    q, told = climb(q, TILT, 25, 1.0, *about)
    good = z[told >= told.max() - NEAR]
    k = int(told.argmax())
    reach = TILT.clone()
    reach[2] = 4
    q, _ = climb(q[k:k + 1], reach, 25, 0.5, *about)
    A = affine(q)[0]
    matrix = uncentred(A, centre, template.centre)
    z = float(q[0, 2] + template.centre[2])                                   # may have climbed beyond the levels tried
    with torch.no_grad():
        return matrix, float(explained(q, *about, order=0)[1]), z, min(z, float(good.min()) - 2), max(z, float(good.max()) + 2)


def plane(bounds, size, spacing, z):
    """Points of the size (h,w) pixels that divide the voxel bounds y0, x0, y1, x1 of slice z: (h w, 3)."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    y, x = bounds[0] + y / size[0] * (bounds[2] - bounds[0]), bounds[1] + x / size[1] * (bounds[3] - bounds[1])
    y, x = torch.meshgrid(y * spacing[1], x * spacing[2], indexing='ij')
    return torch.stack([x, y, torch.full_like(x, (z + 0.5) * spacing[0])], 2).view(-1, 3)


def labels_at(template, matrix, points, size):
    """The template's labels at a patient's points, nearest: (h,w) uint16."""
    return look(template.labels[None], carried(matrix, points)[None], template.extent, 'nearest')[0].view(size).numpy().astype(np.uint16)


def as_stored(labels, file):
    """Labels (Z,H,W) as displayed, as the bytes of a .nii.gz on the grid of that file: same axes, same affine."""
    image = nib.load(file)
    turn = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(image.affine))
    a = nib.apply_orientation(labels.transpose(2, 1, 0)[::-1, ::-1], turn)
    return gzip.compress(nib.Nifti1Image(a.reshape(image.shape), image.affine).to_bytes(), 1, mtime=0)


def tumour_counts(mask, grown):
    """Voxels of tumour: in all, in ventricles, outside the brain."""
    return [int(v.sum()) for v in (mask > 0, (mask > 0) & np.isin(grown, VENTRICLES), (mask > 0) & (grown == 0))]


def slice_nmi(image, template, matrix, points):
    """NMI of a slice (S,S) in [-1,1] and the template there, where it is near the brain; 16 bins, as there are few pixels. nan without any."""
    brain, _ = look(template.levels[2][None], carried(matrix, points)[None], template.size)
    near = brain[0] > 0.02
    fixed = ((torch.tensor(image).flatten() + 1) * 7.999).long().clamp(0, 15)
    return float(information(joint_histogram(fixed, brain[0], near, 16))[1]) if near.any() else math.nan


def atlas(args):
    """Registers every patient once, writes parcellations, atlas.json, atlas.csv and a picture; with --fake measures its slices beside real ones."""
    keep_memory()
    if args.fake and not all(r.get('level') for r in made_rows(args.fake)) and not json.loads((Path(args.fake) / 'sample.json').read_text()).get('bravo'):
        fail(f'--fake {args.fake}: its masks know no level, so there is no place to lay them; train their model with --slice-level')
    out, template = Path(args.out), Template(args.template, args.labels)
    patients = find_patients(args.data, ('bravo', 'seg'))
    names = Counter(p['folder'].name for p in patients)
    for p in patients:
        if p['synthetic'] or names[p['folder'].name] > 1:
            fail(f'--data {p["root"]}: ' + ('is synthetic; give it with --fake' if p['synthetic'] else f'another root has a folder {p["folder"].name} too'))
    file = out / 'atlas.json'
    stamp = hashlib.sha256(Path(args.template).read_bytes() + Path(args.labels).read_bytes() + b'3' + b'+' * args.copies).hexdigest()[:16]          # 3: of register
    state = json.loads(file.read_text()) if file.exists() else dict(template=stamp, patients={}, fakes={})
    if state['template'] != stamp:
        fail(f'--out {out}: was made with another --template, --labels, --copies or version of this program; choose another')
    done, targets = state['patients'], {p['folder'].name: (p['folder'] if args.write else out / p['folder'].name) / 'parc.nii.gz' for p in patients}
    sha = lambda data: hashlib.sha256(data).hexdigest()[:16]
    for name, target in targets.items():
        if target.exists() and done.get(name, {}).get('sha') != sha(target.read_bytes()):
            fail(f'{target}: is there and was not written by {file}; move it away, or leave --write away')
    out.mkdir(parents=True, exist_ok=True)
    save = lambda: atomic_write(file, json.dumps(state).encode())
    for p in progress(patients, 'registering'):
        name, stat = p['folder'].name, p['files']['bravo'].stat()
        file_is = dict(size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        if name in done and any(done[name].get(k, v) != v for k, v in file_is.items()):                          # older lines do not say
            print0(f'{p["files"]["bravo"]}: has changed since it was registered; again')
            targets[name].unlink(missing_ok=True)                             # ours, as checked above; gone before its line is another
            del done[name]
        known = not args.moved or 'moved' in done.get(name, {}) or 'z' in done.get(name, {})
        if name in done and targets[name].exists() and known:
            done[name] |= file_is
            continue
        (image,), mask, spacing, _ = read_patient(p)
        if image.min() == image.max():
            fail(f'{p["files"]["bravo"]}: is empty; remove the patient', 1)
        if name in done and (list(done[name]['shape']), list(done[name]['spacing'])) != (list(image.shape), list(spacing)):
            print0(f'{p["files"]["bravo"]}: is not of the shape and spacing that were registered; again')
            del done[name]
        if name not in done:
            clock = time.process_time()
            matrix, nmi, *more = search(template, image, spacing) if len(image) == 1 else register_often(template, image, spacing, args.copies)
            done[name] = dict(matrix=matrix.tolist(), nmi=nmi, seconds=time.process_time() - clock, shape=image.shape, spacing=spacing,
                              **(dict(zip(('z', 'z_low', 'z_high'), (v + template.floor for v in more))) if len(image) == 1 else dict(upside_down=more[0])))
        bounds, matrix = (0, 0, *image.shape[1:]), torch.tensor(done[name]['matrix'])
        if args.moved and len(image) > 1 and 'moved' not in done[name]:
            done[name]['moved'] = moved_apart(template, image, spacing, matrix, args.copies)
        labels = np.stack([labels_at(template, matrix, plane(bounds, bounds[2:], spacing, z), bounds[2:]) for z in range(len(image))])
        data = as_stored(labels, p['files']['bravo'])
        done[name] |= dict(file_is, sha=sha(data), tumour=tumour_counts(mask, grow_labels(labels, spacing[1:])))
        save()                                                                # first: what stands there without a line here is somebody else's
        targets[name].parent.mkdir(parents=True, exist_ok=True)
        atomic_write(targets[name], data)
    here = [done[p['folder'].name] for p in patients]
    some = ['upside_down', 'z', 'z_low', 'z_high', *(['moved'] if args.moved else [])]                           # of volumes, of slices
    write_csv(out / 'atlas.csv', ['patient', 'nmi', *some, 'tumour', 'in_ventricles', 'outside_brain', 'seconds'],
              [[n, d['nmi'], *(d.get(k, '') for k in some), *d['tumour'], f'{d["seconds"]:.1f}'] for n, d in zip(names, here)])
    spread = lambda v: '{:.3f} to {:.3f}, median {:.3f}'.format(*np.percentile(v, (0, 100, 50)))
    total, inside, outside = np.sum([d['tumour'] for d in here], 0)
    turned = [d['upside_down'] for d in here if 'upside_down' in d]
    print0(f'{len(here)} patients: NMI {spread([d["nmi"] for d in here])}' + (f' (volumes upside down: {spread(turned)})' if turned else '')
           + f'; of {total} voxels of tumour {inside / max(total, 1):.4f} in ventricles, {outside / max(total, 1):.4f} outside the brain')
    apart = [d['moved'] for d in here if args.moved and 'moved' in d]
    if apart:
        print0(f'a moved copy registered anew: {spread(apart)} voxels apart, {sum(v <= 0.5 for v in apart)} of {len(apart)} within half a voxel')
    atlas_picture(out / 'atlas.png', template, patients, done)
    print0(f'look at {out}/atlas.png: ventricles red, brain green')
    if args.fake:
        compare_slices(args, template, done, state, save)


def atlas_picture(path, template, patients, done):
    """Six levels of up to four volumes, or 24 single slices, with the outlines of the template's ventricles and labels."""
    heights = np.percentile(template.labels.nonzero()[:, 0], (15, 35, 45, 52, 62, 80)) * (template.extent[2].item() / len(template.labels))
    some, tiles = patients[::max(1, len(patients) // 4)][:4], []
    if all(done[p['folder'].name]['shape'][0] == 1 for p in patients):
        some, heights = patients[::max(1, len(patients) // 24)][:24], heights[:1]
    for p in some:
        image, spacing = read_nifti(p['files']['bravo'])
        matrix, extent = torch.tensor(done[p['folder'].name]['matrix']), extent_of(image.shape, spacing)
        middle = [carried(matrix, torch.tensor([extent[0] / 2, extent[1] / 2, (z + 0.5) * spacing[0]]))[2].item() for z in range(len(image))]
        white = np.percentile(image[image > image.min()], 99)
        for h in heights:
            z = int(np.abs(np.array(middle) - h).argmin())
            points, size = plane(square_view(image.shape[1:], spacing[1:], (0, 0, 1, 1)), (144, 144), spacing, z), (144, 144)
            side = extent[:2].max().item() / 144
            shown, inside = look(torch.from_numpy(image[None, z:z + 1] / white), points[None] * torch.tensor([1, 1, 0.0]), extent)
            labels = labels_at(template, matrix, points, size)
            rgb = outline((shown[0] * inside).view(size).numpy() * 2 - 1, grow_labels(labels[None], (side, side))[0] > 0, (60, 170, 80))
            red = outline(np.zeros(size), np.isin(labels, VENTRICLES))
            tiles.append(np.where((red == (255, 80, 60)).all(-1, keepdims=True), red, rgb))
    save_grid(path, [tiles[i:i + 6] for i in range(0, len(tiles), 6)])


def compare_slices(args, template, done, state, save):
    """Generated slices where their source lies, single ones by search, masks alone on the parcellations of all patients at that level."""
    out, made = Path(args.out), json.loads((Path(args.fake) / 'sample.json').read_text())
    S, box = made['pixels'], tuple(made['box'])
    real = real_like(args, made)

    def geometry(name, z):
        d = done[name]
        return torch.tensor(d['matrix']), plane(square_view(d['shape'][1:], d['spacing'][1:], box), (S, S), d['spacing'], z)

    at = [geometry(r['folder'], r['z']) for r in real.table]
    grown = np.stack([grow_labels(labels_at(template, *g, (S, S))[None], r['spacing'])[0] for g, r in zip(at, real.table)])
    by_patient = [[i for i, r in enumerate(real.table) if r['patient'] == n] for n in sorted({r['patient'] for r in real.table})]

    def elsewhere(mask, level, patient=''):
        """Mean counts of a mask on the parcellations of all other patients, at the slice of the nearest level."""
        rows = [min(rows, key=lambda i: abs(real.table[i]['level'] - level)) for rows in by_patient if real.table[rows[0]]['patient'] != patient]
        return np.mean([tumour_counts(mask, grown[i]) for i in rows], 0)

    rows = made_rows(args.fake)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator(args.seed, 'atlas')).tolist()[:args.n]]
    table, who, how, levels = [], [], Counter(), {}
    for r in progress(rows, 'slices'):
        folder = Path(args.fake) / r['folder']
        mask, spacing = read_nifti(folder / 'seg.nii.gz')
        if len(mask) > 1:
            fail(f'--fake {args.fake}: {r["folder"]} is a stack of {len(mask)} slices; sets of single slices are compared here')
        source, _, z = r['condition'].rpartition(':')
        if not made.get('bravo'):
            how['on others\' parcellations'] += 1
            table.append([math.nan, *elsewhere(mask[0], float(r['level']))])
        else:
            image = read_nifti(folder / 'bravo.nii.gz')[0]
            if source in done and z.isdigit():
                how['where the source lies'] += 1
                matrix, points = geometry(source, int(z))
            else:
                how['by search'] += 1
                key = hashlib.sha256((folder / 'bravo.nii.gz').read_bytes()).hexdigest()[:16]           # another set has folders of the same names
                if key not in state['fakes']:
                    matrix, _, *level = search(template, image, spacing)
                    state['fakes'][key] = dict(matrix=matrix.tolist(), **dict(zip(('z', 'z_low', 'z_high'), (v + template.floor for v in level))))
                    save()
                levels[r['folder']] = state['fakes'][key]
                matrix, points = torch.tensor(state['fakes'][key]['matrix']), plane((0, 0, S, S), (S, S), spacing, 0)
            labels = grow_labels(labels_at(template, matrix, points, (S, S))[None], spacing[1:])
            table.append([slice_nmi(image[0], template, matrix, points), *tumour_counts(mask, labels)])
        who.append(f'fake:{r["source_patient"] or r["folder"]}')
    for i, (r, g) in enumerate(zip(real.table, at)):
        mask = real.masks[i, 0]
        table.append([slice_nmi(real.images[i, 0], template, *g), *tumour_counts(mask, grown[i])] if made.get('bravo') else
                     [math.nan, *elsewhere(mask, r['level'], r['patient'])])
        who.append(r['patient'])
    table, who, n = np.array(table, float), np.array(who), len(rows)
    cut = np.nanpercentile(table[n:, 0], 5) if made.get('bravo') else math.nan

    def measure(i):
        nmi, tumour, inside, outside = table[i].T
        shares = {'tumour in ventricles': inside.sum() / max(tumour.sum(), 1), 'tumour outside the brain': outside.sum() / max(tumour.sum(), 1)}
        return shares if math.isnan(cut) else {'NMI of a slice': np.nanmean(nmi), 'NMI below 5 % of real': (nmi < cut).mean(), **shares}

    sides = np.arange(n), np.arange(n, len(table))
    points = [measure(i) for i in sides]
    draws = [[measure(draw(i, who, generator(args.seed, 'atlas', k, side), True)) for side, i in enumerate(sides)] for k in range(args.repeats)]
    report(out, intervals(list(points[0]), points, draws), dict(fake=args.fake, slices=n, placed=dict(how), real_slices=len(real.table), nmi_cut=float(cut)))
    write_csv(out / 'slices.csv', ['folder', 'nmi', 'tumour', 'in_ventricles', 'outside_brain', 'z', 'z_low', 'z_high'],
              [[r['folder'], *t, *(levels.get(r['folder'], {}).get(k, '') for k in ('z', 'z_low', 'z_high'))] for r, t in zip(rows, table[:n].tolist())])
    print0(f'placed: {", ".join(f"{k} {v}" for v, k in how.items())}; real beside: {len(real.table)} slices of {len(by_patient)} patients')


# ---------------------------------------------------------------------------------------------------------------------
# dual
# ---------------------------------------------------------------------------------------------------------------------


def around(mask, pixels):
    """The pixels within so many of a mask (S,S), along rows, columns and diagonals; the mask among them."""
    return F.max_pool2d(torch.from_numpy(np.float32(mask))[None, None], 2 * pixels + 1, 1, pixels)[0, 0].numpy() > 0


def gradient_correlation(a, b, where):
    """<grad a, grad b> / (|grad a| |grad b|) of images (S,S) over the pixels `where`: 1 for equal edges, -1 for inverted ones."""
    a, b = (np.stack(np.gradient(v))[:, where].ravel() for v in (a, b))
    return float(a @ b / math.sqrt((a @ a) * (b @ b) + 1e-20))


def nmi_of(a, b, bins=32):
    """Normalised mutual information (H(a) + H(b)) / H(a,b) of values (N,) in [-1,1] (Studholme 1999): 1 independent, 2 the same."""
    joint = np.histogram2d(a, b, bins, ((-1, 1), (-1, 1)))[0] / len(a)
    return float(information(torch.from_numpy(joint)[None])[1]) if joint.max() < 1 else 2.0


def shift_of(a, b):
    """Whole pixels (dy, dx) by which b (S,S) lies from a: the peak of their phase correlation (Kuglin 1975)."""
    cross = np.conj(np.fft.fft2(a - a.mean())) * np.fft.fft2(b - b.mean())
    peak = np.unravel_index(np.fft.ifft2(cross / (np.abs(cross) + 1e-12)).real.argmax(), a.shape)
    return tuple(int((p + n // 2) % n - n // 2) for p, n in zip(peak, a.shape))


RING = 3                                 # pixels around a tumour that are neither tumour nor background


def enhancement(pre, post, mask):
    """E = post - pre (S,S), both in [-1,1] on one scale, less its median in the head beyond RING pixels around the tumour, and a dict of
    figures. Their scales can differ by patient all the same: that median, the "background shift", says by how much. nan where a part is empty."""
    tumour, near, head = mask > 0, around(mask, RING), head_mask(pre[None])[0]
    rest = head & ~near
    if not rest.any() or not tumour.any():
        return post - pre, rest, {}
    base = np.median((post - pre)[rest])
    E = post - pre - base
    mean = lambda where: float(E[where].mean()) if where.any() else math.nan
    sd = float(E[rest].std())
    return E, rest, {'E in tumour': mean(tumour), f'E in a ring of {RING} pixels': mean(near & head & ~tumour), 'E outside': mean(rest), 'sd of E outside': sd,
                     'CNR': (mean(tumour) - mean(rest)) / max(sd, 1e-6), 'AUC of E, tumour against head': auc(E[tumour], E[head & ~tumour]),
                     'background shift': float(base), 'gradient correlation': gradient_correlation(pre, post, rest), 'NMI': nmi_of(pre[rest], post[rest]),
                     'shift, pixels': math.hypot(*shift_of(pre, post))}


def dual(args):
    """Enhancement and agreement of pairs: means beside those of real test pairs, and W1 to them beside that of real training pairs."""
    made, out = json.loads((Path(args.fake) / 'sample.json').read_text()), Path(args.out)
    names = args.dual or tuple(made.get('dual') or ())
    if not names:
        fail(f'--fake {args.fake}: was not made by a run of train_bravo.py --dual; give a set that was, or the names of its files with --dual')
    fake = load_slices([args.fake], made['pixels'], names, cache=args.cache, training=False)
    real = real_like(args, made, names, ('test',))
    sets = [[(d.images[i], d.masks[i, 0], d.table[i]) for i in rows if d.table[i]['tumour']] for d, rows in (
        (fake, range(len(fake.table))), (real, real.rows('test')), (real, real.rows('train')))]
    pairs = [(x, m, t, *enhancement(*x, m)) for s in sets for x, m, t in s]
    known = np.array([bool(p[5]) for p in pairs])
    of = np.repeat(range(3), list(map(len, sets)))
    fakes, test, train = (np.flatnonzero(known[of == k]) + (of < k).sum() for k in range(3))
    if min(map(len, (fakes, test, train))) < 8:
        fail(f'--fake: {len(fakes)} pairs with a tumour and head around it, --data: {len(test)} test, {len(train)} train; 8 of each are needed, see --split')
    patients = np.array([f'fake:{t["source"] or t["folder"]}' if k == 0 else t['patient'] for (_, _, t, *_), k in zip(pairs, of)])
    cut = 2 * float(np.median([pairs[i][5]['sd of E outside'] for i in test]))
    values = {m: np.array([p[5].get(m, math.nan) for p in pairs]) for m in pairs[fakes[0]][5]}
    values['leakage'] = np.array([(np.abs(p[3][p[4]]) > cut).mean() if p[5] else math.nan for p in pairs])

    def both(k, resample):
        """One draw: means of fake and test pairs, and W1 of equally many fake, or training, pairs to test pairs, in sd of these (nan where they do not vary)."""
        f, r, t = (draw(rows, patients, generator(args.seed, 'dual', k, name), resample) for rows, name in ((fakes, 'f'), (test, 'r'), (train, 't')))
        n = min(len(f), len(r), len(t))
        return [{**{m: np.nanmean(v[i]) for m, v in values.items()},
                 **{f'{m}, W1': wasserstein(v[j[:n]], v[r[:n]]) / (np.nanstd(v[test]) or math.nan) for m, v in values.items()}} for i, j in ((f, f), (r, t))]

    points = [both(('point', k), False) for k in range(10)]
    mean = [{m: np.mean([p[side][m] for p in points]) for m in points[0][side]} for side in (0, 1)]
    report(out, intervals(list(mean[0]), mean, [both(k, True) for k in progress(range(args.repeats), 'bootstrap')]), dict(
        fake=args.fake, hash=made['bravo'], dual=names, pairs=len(fakes), test_pairs=len(test), train_pairs=len(train), left_out=int((~known).sum()), leakage_cut=cut))
    zoom = max(1, 128 // made['pixels'])
    show = [(f'{n} {name}', [outline(v, pairs[i][1], zoom=zoom) for i, v in zip(some, images)]) for n, rows in (('gen.', fakes), ('real', test))
            for some in [rows[np.linspace(0, len(rows), 8, endpoint=False).astype(int)]]
            for name, images in (*((name, [pairs[i][0][c] for i in some]) for c, name in enumerate(names)), ('E x 2', [2 * pairs[i][3] for i in some]))]
    save_grid(out / 'dual.png', [s[1] for s in show], [s[0] for s in show], zoom)
    print0(f'{len(fakes)} generated pairs, {len(test)} test pairs; {(~known).sum()} left out without head beyond {RING} pixels around the tumour. leakage: share of '
           f'the head there with |E| above {cut:.3f}, 2 sd of real pairs; W1: distance to test pairs in their sd, under "real" of training pairs; look at {out}/dual.png')


# ---------------------------------------------------------------------------------------------------------------------
# readers
# ---------------------------------------------------------------------------------------------------------------------
KINDS = ('real', 'pair', 'grade')                                    # is it real? which one is real? how good is it?
GRADES = ('realism', 'anatomy', 'lesion plausibility', 'mask fit')   # 1 to 5
MARGIN = 0.1                                                         # of equivalence: right in 50 +- 10 %


def critical(n, p=0.5, level=0.05):
    """The fewest right of n that a true share p reaches with a probability of at most `level`; n + 1 where none does."""
    return bisect.bisect_left(range(n + 1), True, key=lambda k: upper_tail(k, n, p) <= level)


def equivalence(k, n):
    """p of the two one-sided exact tests that the true share lies within 0.5 +- MARGIN, for k right of n (Schuirmann 1987)."""
    return max(upper_tail(k, n, 0.5 - MARGIN), upper_tail(n - k, n, 0.5 - MARGIN))


def equivalence_power(n):
    """The probability that `equivalence` is at most 0.05 for a reader who guesses."""
    low = critical(n, 0.5 - MARGIN)                                  # and by symmetry at most n - low
    return max(upper_tail(low, n, 0.5) - upper_tail(n - low + 1, n, 0.5), 0.0)


def power(n):
    """What n answers of one reader can show, in a line."""
    k, z = critical(n), NormalDist().inv_cdf
    enough = [math.ceil((z(0.95) + z((1 + b) / 2)) ** 2 / 4 / MARGIN ** 2 - 0.5) for b in (0.8, 0.9)]          # normal approximation
    return (f'{n} answers of a reader: chance is rejected from {k} right (exact, one-sided 5 %), with a power of {upper_tail(k, n, 0.6):.2f} at a true 60 %, '
            f'{upper_tail(k, n, 0.65):.2f} at 65 %; that a guesser is within {0.5 - MARGIN:.0%} to {0.5 + MARGIN:.0%} is shown with {equivalence_power(n):.2f} '
            f'(about {enough[0]} answers give .80, {enough[1]} .90)')


def plain_png(a):
    """(H,W) or (H,W,3) uint8 as PNG without metadata or compression: pictures of one shape have one size, which tells nothing. In base64."""
    buffer = io.BytesIO()
    Image.fromarray(a).save(buffer, 'PNG', compress_level=0)
    return base64.b64encode(buffer.getvalue()).decode()


def with_border(image, mask):
    """A slice (S,S) enlarged smoothly, as a browser would, with the mask's border on it: (H,H,3) uint8."""
    zoom = max(1, 256 // len(image))
    big = Image.fromarray(np.float32(image)).resize((len(image) * zoom,) * 2, Image.BICUBIC)
    return outline(np.asarray(big), mask.repeat(zoom, 0).repeat(zoom, 1))


def alike(fake, real, n, g):
    """n pairs (i, j) of rows of fake and real, arrays (N,3) of size, level, tumour or none: for each real one, drawn by g, the nearest fake left."""
    left, pairs = np.ones(len(fake), bool), []
    for j in torch.randperm(len(real), generator=g)[:n].tolist():
        i = int(np.where(left, np.abs(fake - real[j]) @ (1, 0.2, 1), math.inf).argmin())
        left[i] = False
        pairs.append((i, j))
    return pairs


def plan_readers(args, out):
    """Prints what the study can show, then writes study.json (all that a page may know), key.csv and key.png (what no reader may see), page.html."""
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = real_like(args, made, parts=('test',))
    sides = [(data, [data.table[i] for i in rows], rows) for data, rows in ((fake, range(len(fake.table))), (real, real.rows('test')))]
    about = [np.array([(math.sqrt(t['tumour']) / made['pixels'], t['level'], t['tumour'] > 0) for t in table]).reshape(-1, 3) for _, table, _ in sides]
    want = {k: n for k, n in zip(KINDS, (args.n // 2, args.pairs, args.likert // 2)) if n}                # matched pairs, and one more each for practice
    todo = [(k, m == 0) for k, n in want.items() for m in range(n + 1)]
    if min(map(len, about)) < len(todo):
        fail(f'--n, --pairs, --likert: need {len(todo)} generated and as many real test images, each shown in one place; there are {len(about[0])} and '
             f'{len(about[1])}; ask for fewer')
    told = {k: power(2 * n if k == 'real' else n) for k, n in want.items() if k != 'grade'}
    items, pictures, key, shown = {}, {}, [], {k: [[], []] for k in want}
    for number_, ((kind, practice), chosen) in enumerate(zip(todo, alike(*about, len(todo), generator(args.seed, 'readers')))):
        for side, (truth, i, (data, table, rows)) in enumerate(zip(('generated', 'real'), chosen, sides)):
            t, image, mask = table[i], data.images[rows[i], 0], data.masks[rows[i], 0]
            name = lambda *what: hashlib.sha256(repr((args.seed, number_, what)).encode() + image.tobytes() * (truth in what)).hexdigest()[:12]
            views = {name(truth, 'image'): to_rgb(image)[..., 0], **({name(truth, 'outline'): with_border(image, mask)} if kind == 'grade' else {})}
            pictures.update({n: plain_png(a) for n, a in views.items()})
            item = name('pair') if kind == 'pair' else name(truth)
            items.setdefault(item, dict(kind=kind, practice=practice, pictures=[]))['pictures'] += views
            key.append([item, name(truth, 'image'), kind, int(practice), truth, number_,
                        args.fake if truth == 'generated' else t['root'], t['folder'], t['z'], t['source'] or t['patient'], t['tumour'], f'{about[side][i, 1]:.3f}'])
            shown[kind][side].append(outline(image, mask, zoom=max(1, 128 // made['pixels'])))
    for v in items.values():
        v['pictures'] = sorted(v['pictures']) if v['kind'] == 'pair' else v['pictures']
    study = json.dumps(dict(seed=args.seed, kinds=list(want), grades=GRADES, items=dict(sorted(items.items())), pictures=dict(sorted(pictures.items()))))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'key.csv', ['item', 'picture', 'kind', 'practice', 'truth', 'pair', 'set', 'folder', 'z', 'patient', 'tumour_pixels', 'level'], sorted(key))
    save_grid(out / 'key.png', [side[:12] for k in want for side in shown[k]], [f'{k}: {t}' for k in want for t in ('generated', 'real')])
    atomic_write(out / 'page.html', reader_page().encode())
    atomic_write(out / 'plan.json', json.dumps(dict(plain(args), hash=made['bravo'], power=told), indent=1).encode())
    atomic_write(out / 'study.json', study.encode())
    for kind, line in told.items():
        print0(f'{dict(real="real or generated", pair="pairs")[kind]}: {line}')
    tumour = [np.mean([int(k[10]) for k in key if k[4] == truth]) for truth in ('generated', 'real')]
    print0(f'{len(items)} items, {sum(v["practice"] for v in items.values())} of them practice; mean tumour {tumour[0]:.0f} pixels generated, {tumour[1]:.0f} real '
           f'(of {len({k[9] for k in key if k[4] == "real"})} patients, whose slices are not independent). Keep key.csv '
           f'and key.png from readers. Serve it: python classifier.py label --study {out}; or a file for each: python evaluate.py readers page --out {out} --reader NAME')


def page_readers(args, out):
    """reader_NAME.html: everything that one reader needs in one file. It holds the order and opaque names, not what they stand for."""
    data = (out / 'study.json').read_bytes()
    study = json.loads(data)
    for reader in args.reader:
        file, parts = out / f'reader_{re.sub(r"[^A-Za-z0-9-]", "_", reader)}.html', {k: study[k] for k in ('items', 'pictures')}
        page = reader_page(dict(parts, reader=reader, hash=hashlib.sha256(data).hexdigest()[:12], order=study_order(study, reader)))
        atomic_write(file, page.encode())
        print0(f'{file}: {len(page) / 1e6:.1f} MB; the reader sends a CSV back, for: python evaluate.py readers score --out {out} --answers FILE ...')


def reader_page(study=None):
    """The page, to be served (None) or as one file, as text."""
    values = dict(STUDY=json.dumps(study), GRADES=json.dumps(GRADES), COLUMNS=json.dumps(READINGS))
    return re.sub(r'(?<== )(STUDY|GRADES|COLUMNS)\b', lambda m: values[m[1]], READER_PAGE)


def read_readings(out, files):
    """Answers as arrays: names of readers, items {kind: ids}, got {kind, repeat: (readers, items, 1, or 4 of 'grade')} with nan where there is none, the
    key's rows by item. 'real': 1 surely generated to 6 surely real; 'pair': 1 right, 0 wrong. Practice is left out; the last answer of several counts."""
    key, rows = {}, {}
    for r in read_csv(out / 'key.csv'):
        key.setdefault(r['item'], {})[r['truth']] = r
    for file in files:
        for r in read_csv(file):
            if not {*READINGS} <= r.keys():
                fail(f'{file}: expected columns {",".join(READINGS)}')
            if r['item'] not in key:
                fail(f'{file}: item {r["item"]} is not of the study in {out}')
            rows[r['reader'], r['item'], r['repeat']] = dict(r, file=file)
    kind_of = {i: next(iter(k.values())) for i, k in key.items()}
    items = {kind: [i for i, r in kind_of.items() if r['kind'] == kind and r['practice'] == '0'] for kind in KINDS}
    names, place = sorted({k[0] for k in rows}), {i: n for some in items.values() for n, i in enumerate(some)}
    got = {(kind, repeat): np.full((len(names), len(items[kind]), len(GRADES) if kind == 'grade' else 1), math.nan) for kind in KINDS for repeat in '01'}
    for (reader, item, repeat), r in rows.items():
        kind, a = kind_of[item]['kind'], r['answer']
        try:
            if kind == 'real':
                value = (('generated', '3'), ('generated', '2'), ('generated', '1'), ('real', '1'), ('real', '2'), ('real', '3')).index((a, r['confidence'])) + 1
            elif kind == 'pair':
                value = [key[item][t]['picture'] for t in ('generated', 'real')].index(a)
            else:
                value = np.reshape([' 12345'.index(v) for v in a.split(';')], len(GRADES))
            if item in place:
                got[kind, repeat][names.index(reader), place[item]] = value
        except (ValueError, KeyError):
            fail(f'{r["file"]}: item {item}, repeat {repeat!r}: answer {a!r}, confidence {r["confidence"]!r} are none of those on the page')
    return names, items, got, key


def grades_table(args, items, got, key):
    """Rows of HEADER, generated beside real: got (readers, items, grade) of matched pairs of images; intervals over readers and pairs."""
    matched = {}
    for n, i in enumerate(items):
        for t, r in key[i].items():
            matched.setdefault(r['pair'], {})[t] = n
    grades = got[:, np.array([[m['generated'], m['real']] for m in matched.values()], int).reshape(-1, 2)]          # (readers, pairs, generated | real, grade)
    grades = np.where(np.isfinite(grades).all(2, keepdims=True), grades, math.nan)                                # a pair counts where both are graded
    if not np.isfinite(grades).any():
        return []

    def means(k):
        """Means of both sides, of all (k None) or of readers and pairs drawn with replacement."""
        who, some = (np.arange(n) if k is None else torch.randint(n, (n,), generator=generator(args.seed, 'grades', k, axis)).numpy()
                     for axis, n in enumerate(grades.shape[:2]))
        v = grades[np.ix_(who, some)].reshape(-1, 2, len(GRADES))
        return [dict(zip(GRADES, np.nanmean(v[:, side], 0) if np.isfinite(v).any() else [math.nan] * len(GRADES))) for side in (0, 1)]

    apart = [np.nanmean(v[:, np.isfinite(v).any(0)], 0) for v in np.moveaxis(grades[:, :, 0] - grades[:, :, 1], 2, 0)]                    # of each pair, over readers
    print0('grades, generated against real, p of the signed-rank test over pairs: ' + ', '.join(f'{g} {signed_rank(d):.2g}' for g, d in zip(GRADES, apart)))
    return intervals(GRADES, means(None), [means(k) for k in range(args.repeats)])


def score_readers(args, out):
    """readers.csv: of each reader, and of all, right answers with the tests, AUC, d', agreement; metrics.csv: grades; roc.png, hardest.png."""
    files = [f for f in (out / 'answers.csv', *map(Path, args.answers)) if f.exists()]
    names, items, got, key = read_readings(out, files)
    if not names:
        fail(f'--out {out}: holds no answers.csv with an answer; serve the study first, or give --answers FILE')
    truth, level = np.array(['real' in key[i] for i in items['real']], bool), got['real', '0'][..., 0]
    right = {'real': np.where(np.isnan(level), math.nan, (level > 3) == truth), 'pair': got['pair', '0'][..., 0]}
    table, z = [], NormalDist().inv_cdf

    def boot(f, who, sides):
        """Draws of f(readers, items), both drawn with replacement, items within each of the sides."""
        def pick(rows, *keys):
            return rows[torch.randint(len(rows), (len(rows),), generator=generator(args.seed, 'readers', *keys)).numpy()]
        values = [f(pick(who, k), np.concatenate([pick(s, k, n) for n, s in enumerate(sides) if len(s)])) for k in range(args.repeats)]
        return np.array([v for v in values if math.isfinite(v)] or [math.nan])

    def areas(who, some):
        each = [auc(level[r, some][truth[some] & ~np.isnan(level[r, some])], level[r, some][~truth[some] & ~np.isnan(level[r, some])]) for r in who]
        return float(np.nanmean(each)) if np.isfinite(each).any() else math.nan

    for name, who in [(n, np.array([i])) for i, n in enumerate(names)] + ([('all', np.arange(len(names)))] if len(names) > 1 else []):
        for kind, what, sides in (('real', 'real or generated', [np.flatnonzero(truth), np.flatnonzero(~truth)]), ('pair', 'pairs', [np.arange(len(items['pair']))])):
            n, k = int(np.isfinite(right[kind][who]).sum()), int(np.nansum(right[kind][who]))
            if not n:
                continue
            if len(who) == 1:
                tests = [*wilson(k, n), upper_tail(k, n, 0.5), equivalence(k, n)]
            else:                                                    # answers to one image, or of one reader, are not independent: no exact test of the sum
                v = boot(lambda r, i: np.nanmean(right[kind][np.ix_(r, i)]), who, sides)
                tests = [*np.percentile(v, (2.5, 97.5)), (v <= 0.5).mean(), max((v <= 0.5 - MARGIN).mean(), (v >= 0.5 + MARGIN).mean())]
            table.append([name, f'{what}: right', n, k / n, *tests])
            if kind == 'real':
                table.append([name, 'AUC of confidence', n, areas(who, np.arange(len(truth))), *np.percentile(boot(areas, who, sides), (2.5, 97.5)), '', ''])
                hit, false = (((level[who][:, side] > 3).sum() + 0.5) / (np.isfinite(level[who][:, side]).sum() + 1) for side in (truth, ~truth))       # never 0 or 1
            table.append([name, f"{what}: d'", n, z(hit) - z(false) if kind == 'real' else math.sqrt(2) * z((k + 0.5) / (n + 1)), '', '', '', ''])
            again = got[kind, '1'][who, :, 0]
            both = np.isfinite(again) & np.isfinite(got[kind, '0'][who, :, 0])
            if both.any():
                first, second = ((v[both] > (3 if kind == 'real' else 0.5)).tolist() for v in (got[kind, '0'][who, :, 0], again))
                a = agree(first, second)
                table += [[name, f'{what}: the same again', len(first), a['po'], *wilson(sum(x == y for x, y in zip(first, second)), len(first)), '', '']]
    every = np.isfinite(level).all(0)
    if len(names) > 1 and every.any():
        said = level[:, every] > 3
        draws = [agree(*said[:, torch.randint(said.shape[1], (said.shape[1],), generator=generator(args.seed, 'kappa', k)).numpy()])['kappa'] for k in range(args.repeats)]
        table.append(['all', 'kappa between readers', int(every.sum()), agree(*said)['kappa'], *(np.nanpercentile(draws, (2.5, 97.5)) if np.isfinite(draws).any() else ('', '')), '', ''])
    header = ['reader', 'measure', 'n', 'value', 'low', 'high', 'p above chance', 'p not within 50 +- 10 %']
    print0(f'{"":44}{"n":>5}{"value":>8}  {"95 %":^16}  above chance: p  not within 50 +- {100 * MARGIN:.0f} %: p')
    cell = lambda v, width: f'{v:{width}.3f}' if v != '' else ' ' * width
    for who, what, n, value, *v in table:
        print0(f'{who[:14]:15}{what:29}{n:5}{value:8.3f}  ' + (f'[{cell(v[0], 6)}, {cell(v[1], 6)}]' if v[0] != '' else ' ' * 16) + f'{cell(v[2], 17)}{cell(v[3], 22)}')
    write_csv(out / 'readers.csv', header, table)

    report(out, grades_table(args, items['grade'], got['grade', '0'], key), dict(
        readers=names, answers=int(sum(np.isfinite(v[..., 0]).sum() for v in got.values())), table=[dict(zip(header, r)) for r in table]), ('generated', 'real'))
    rates = lambda r, side: [float((level[r][side & ~np.isnan(level[r])] >= c).mean()) if (side & ~np.isnan(level[r])).any() else math.nan for c in range(1, 8)]
    plot(out / 'roc.png', {'chance': ([0, 1], [0, 1]), **{n: (rates(r, ~truth), rates(r, truth)) for r, n in enumerate(names)}}, 'real or generated, by confidence',
         'generated called real', 'real called real')
    pictures, rows = json.loads((out / 'study.json').read_text())['pictures'], {}
    for kind, what in (('real', 'generated'), ('real', 'real'), ('pair', 'generated')):
        share = [(np.nanmean(right[kind][:, n]), key[i][what]['picture']) for n, i in enumerate(items[kind]) if what in key[i] and np.isfinite(right[kind][:, n]).any()]
        if share:
            rows[f'{kind}: {what}'] = [np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[p]))).convert('RGB').resize((128, 128))) for _, p in sorted(share)[:8]]
    if rows:
        save_grid(out / 'hardest.png', list(rows.values()), list(rows))
    print0(f'look at {out}/roc.png, and {out}/hardest.png: the images that readers were most often wrong about')


def readers(args):
    {'plan': plan_readers, 'page': page_readers, 'score': score_readers}[args.step](args, Path(args.out))


# STUDY: null where classifier.py label serves the page; else all that one file needs to do without a server.
READER_PAGE = r"""<!doctype html><meta charset=utf-8><title>Reader study</title>
<style>
body{margin:0;height:100vh;display:flex;flex-direction:column;background:#000;color:#ddd;font:16px/1.4 system-ui,sans-serif;text-align:center}
header{display:flex;gap:20px;align-items:center;padding:8px 16px;background:#1c1c1c}progress{flex:1}main{flex:1;min-height:0;display:flex;flex-direction:column;align-items:center}
#pictures{flex:1;min-height:0;display:flex;gap:24px;justify-content:center}#pictures img{height:100%;max-width:48vw;object-fit:contain}
#told,#say{padding:8px;min-height:24px;font-weight:600}#say{color:#ff7a5c}.row{padding:3px}.row span{display:inline-block;width:160px;text-align:right;padding-right:12px}
button{background:#2a2a2a;color:#eee;border:1px solid #555;border-radius:6px;padding:6px 12px;margin:0 3px;font:inherit;cursor:pointer}button.on{background:#7a4a1a}
input{font:inherit;padding:8px;background:#222;color:#eee;border:1px solid #555}.gone{display:none!important}#ask,#end{margin:auto}
</style>
<header><span id=who></span><progress id=bar value=0></progress><span id=count></span><button id=save class=gone>Save answers as CSV</button></header>
<main><form id=ask class=gone><p>Your name (it goes with your answers)</p><input id=name maxlength=40 autofocus> <button>Start</button></form>
<div id=end class=gone><h2>All done, thank you.</h2><p id=last>You can close this page.</p></div>
<div id=told></div><div id=pictures></div><div id=keys></div><div id=say></div></main>
<script>
const S = STUDY, grades = GRADES, columns = COLUMNS, $ = id => document.getElementById(id), place = S && 'reader study ' + S.hash + ' ' + S.reader
let rows = [], s = null, since = 0, busy = false, given = [], warning = ''
const text = {
  real: 'Is this a real scan or a generated one?   1 surely generated ... 6 surely real',
  pair: 'One is real, one is generated. Which is the real one?   Left or right arrow key',
  grade: 'Grade the image at the left; the outline at the right is where its lesion should be.   1 very poor ... 5 excellent'}
function csv() {
  const cell = v => /[",\n]/.test(v) ? '"' + String(v).replaceAll('"', '""') + '"' : v
  return [columns, ...rows].map(r => r.map(cell).join(',') + '\n').join('')
}
function local(a) {                                     // without a server: answers stay in this browser until they are saved as a file
  if (a) {
    rows.push([S.reader, a.at, a.item, s.repeat, a.answer, a.confidence, a.ms, new Date().toISOString()])
    if (!warning) localStorage.setItem(place, JSON.stringify(rows))
  }
  const at = rows.length, total = S.order.length, [item, repeat, turned] = S.order[at] || [], state = {rater: S.reader, at, total}
  if (!item) return state
  const {kind, practice, pictures} = S.items[item]
  return {...state, item, repeat, kind, practice, pictures: turned ? [...pictures].reverse() : pictures}
}
async function remote(a) {
  const r = await fetch(a ? 'answer' : 'state' + (s ? '?rater=' + encodeURIComponent(s.rater) : ''), a && {method: 'POST', body: JSON.stringify({rater: s.rater, ...a})})
  if (!r.ok) throw new Error(await r.text())
  return r.json()
}
async function go(a) {
  if (busy) return
  busy = true
  try { await show(S ? local(a) : await remote(a)); say(warning) } catch (e) {
    say((a ? 'NOT saved: ' : '') + (e instanceof TypeError && !S ? 'the program does not answer; what was saved is safe' : e.message))
    if (S && a) rows.pop()
  }
  busy = false
}
const say = t => { $('say').textContent = t }
async function show(n) {
  const done = n.at === n.total
  for (const [id, on] of [['ask', n.ask], ['end', !n.ask && done], ['told', n.item], ['pictures', n.item], ['keys', n.item], ['save', S]]) $(id).classList.toggle('gone', !on)
  if (n.ask) return $('name').focus()
  if (S) $('last').textContent = 'Save your answers as a file (at the top right) and send it back.'
  if (n.item) {
    const images = await Promise.all(n.pictures.map(async p => {
      const i = new Image()
      i.src = S ? 'data:image/png;base64,' + S.pictures[p] : 'image/' + p + '.png'; await i.decode()
      i.onclick = () => n.kind === 'pair' && answer(p)
      return i
    }))
    $('pictures').replaceChildren(...images); $('told').textContent = (n.practice ? 'PRACTICE, not counted. ' : '') + text[n.kind]
    const line = (name, m, f) => {
      const row = document.createElement('div'), label = document.createElement('span')
      row.className = 'row'; label.textContent = name; row.append(...name ? [label] : [])
      for (let k = 1; k <= m; k++) { const b = document.createElement('button'); b.textContent = k; b.onclick = () => { b.blur(); f(k) }; row.append(b) }
      return row
    }
    given = []
    $('keys').replaceChildren(...n.kind === 'real' ? [line('', 6, sure)] : n.kind === 'grade' ? grades.map((g, i) => line(g, 5, k => grade(i, k))) : [])
    since = performance.now()
  }
  if (!S) location.hash = encodeURIComponent(n.rater)
  s = n; $('who').textContent = n.rater; $('bar').max = n.total; $('bar').value = n.at; $('count').textContent = n.at + ' of ' + n.total
}
const answer = (a, confidence = '') => go({at: s.at, item: s.item, answer: a, confidence, ms: Math.round(performance.now() - since)})
const sure = k => answer(k > 3 ? 'real' : 'generated', k > 3 ? k - 3 : 4 - k)
function grade(i, k) {                                  // all four are needed; until then each may be changed
  given[i] = k
  document.querySelectorAll('.row').forEach((row, j) => row.querySelectorAll('button').forEach((b, m) => b.classList.toggle('on', given[j] === m + 1)))
  if (grades.every((_, j) => given[j])) answer(given.join(';'))
}
addEventListener('keydown', e => {
  if (e.target.id === 'name' || e.repeat || e.ctrlKey || e.metaKey || e.altKey || busy || !s || !s.item) return
  const k = Number(e.key)
  if (s.kind === 'pair' && ['ArrowLeft', 'ArrowRight'].includes(e.key)) answer(s.pictures[e.key === 'ArrowLeft' ? 0 : 1])
  if (s.kind === 'real' && k >= 1 && k <= 6) sure(k)
  if (s.kind === 'grade' && k >= 1 && k <= 5) grade(grades.findIndex((_, j) => !given[j]), k)
})
$('ask').onsubmit = e => { e.preventDefault(); s = {rater: $('name').value.trim()}; go() }
$('save').onclick = () => {
  const a = document.createElement('a')
  a.href = URL.createObjectURL(new Blob([csv()], {type: 'text/csv'})); a.download = 'answers_' + S.reader.replace(/\W/g, '_') + '.csv'; a.click()
}
if (!S && location.hash) s = {rater: decodeURIComponent(location.hash.slice(1))}
try { rows = S && JSON.parse(localStorage.getItem(place)) || [] } catch (e) { warning = 'This browser keeps nothing between visits: finish in one sitting.' }
go()
</script>
"""


HEADER = ['metric', 'fake', 'fake_low', 'fake_high', 'floor', 'floor_low', 'floor_high', 'above_low', 'above_high']


def intervals(names, points, draws):
    """Rows of HEADER: value and 95 % interval for both sides, and of their difference: centred() draws."""
    rows = []
    for n in names:
        a, b = float(points[0][n]), float(points[1][n])
        rows.append([n, a, *centred(a, [d[0][n] for d in draws], 0, 1), b, *centred(b, [d[1][n] for d in draws], 0, 1),
                     *centred(a - b, [d[0][n] - d[1][n] for d in draws], -1, 1)])
    return rows


def report(out, table, about, sides=('fake', 'real')):
    """Prints the table and writes metrics.csv and metrics.json."""
    print0(f'{"":34}{sides[0]:>9}  {"95 %":^19}{sides[1]:>9}  {"95 %":^19}  difference, 95 %')
    for name, *v in table:
        print0(f'{name:34}{v[0]:9.3f}  [{v[1]:7.3f}, {v[2]:7.3f}]  {v[3]:9.3f}  [{v[4]:7.3f}, {v[5]:7.3f}]  [{v[6]:7.3f}, {v[7]:7.3f}]')
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'metrics.csv', HEADER, table)
    atomic_write(out / 'metrics.json', json.dumps({**about, 'metrics': {r[0]: dict(zip(HEADER[1:], r[1:])) for r in table}}, indent=1).encode())


def main(args):
    {'quality': quality, 'cycle': cycle, 'control': control, 'coherence': coherence, 'atlas': atlas, 'dual': dual, 'readers': readers,
     'downstream': downstream}[args.command](args)


if __name__ == '__main__':
    main(get_args())
