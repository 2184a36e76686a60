"""Measures generated images against real patients, with the same measure between real patients beside each figure.

  python evaluate.py quality --fake runs/synthetic --data DIR --vgg-weights vgg16.pth     distances, diversity, lesions, memorisation
  python evaluate.py cycle --fake runs/synthetic --data DIR       does a segmenter find the mask that an image was made from?
  python evaluate.py control --fake runs/asked                    do masks hold what was asked for (sample.py --count, --requests)?
  python evaluate.py dual --fake runs/pairs --data DIR            are pairs enhanced as real ones are (train_bravo.py --dual)?
  python evaluate.py readers plan --fake runs/synthetic --data DIR        a blinded study for people: then classifier.py label --study

Each leaves metrics.json, metrics.csv and pictures in --out. Reads files, changes none.
"""
import base64, bisect, itertools
from statistics import NormalDist

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('quality', 'is a generated set like real patients it has not seen?'),
                       ('cycle', 'does a segmenter find in the images the masks that they were made from?'),
                       ('control', 'do the masks hold what was asked for?'), ('dual', 'are made pairs enhanced where, and as much as, real ones are?'),
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
        if name != 'control':
            g.add_argument('--data', nargs='+', required=whole, metavar='DIR', help='the real patients, training patients included')
            g.add_argument('--split', metavar='FILE', help='CSV patient,part instead of the split by name')
        if name == 'quality':
            g.add_argument('--part', choices=('val', 'judge', 'test'), default='test', help='the real patients to compare with')
            g.add_argument('--empty-slices', type=number(float, 0, 1), default=0.2, help='share of real slices without tumour')
            g.add_argument('--vgg-weights', metavar='FILE', help='VGG16 weights; "none" leaves its metrics out; not given: fetched')
        g = c.add_argument_group('how')
        if name == 'quality':
            g.add_argument('--n', type=number(int, 8), default=1000, help='images on each side at most; fewer where a side has fewer')
        if name == 'cycle':
            g.add_argument('--train-steps', type=number(int, 1), default=800, help='of the segmenter, 16 slices of judge patients each')
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
    if args.fake and not (Path(args.fake) / 'sample.json').is_file():
        fail(f'--fake {args.fake}: holds no sample.json; give a set made by sample.py')
    for root in getattr(args, 'data', None) or ():
        if not Path(root).is_dir():
            fail(f'--data {root}: no such folder; give a folder that holds one folder a patient')
    vgg = getattr(args, 'vgg_weights', None)
    if vgg not in (None, 'none') and not Path(vgg).is_file():
        fail(f'--vgg-weights {vgg}: no such file')
    if Path(args.out).exists() and not Path(args.out).is_dir():
        fail(f'--out {args.out}: is a file; give a folder')
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets. a and b are index arrays into what is given first, so that a bootstrap may repeat images:
# two copies of one image never count as a pair.
# ---------------------------------------------------------------------------------------------------------------------


def kid(kernel, a, b):
    """Kernel distance (Binkowski 2018): unbiased MMD^2 from a matrix of kernel values."""
    def within(i):
        pairs = i[:, None] != i[None]
        return kernel[np.ix_(i, i)][pairs].mean()
    return within(a) + within(b) - 2 * kernel[np.ix_(a, b)].mean()


def polynomial_kernel(x):
    """(x.y / d + 1)^3 for all pairs of x (N,d)."""
    return (x @ x.T / x.shape[1] + 1) ** 3


def frechet(x, a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^0.5) for features x (N,d) (Heusel 2017). Biased upwards for few images."""
    xa, xb = x[a] - x[a].mean(0), x[b] - x[b].mean(0)
    # tr((S_a S_b)^0.5) is the nuclear norm of the cross product of the centred features: no square root of a singular matrix
    cross = np.linalg.svd(xa @ xb.T, compute_uv=False).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))
    return float(((x[a].mean(0) - x[b].mean(0)) ** 2).sum() + (xa ** 2).sum() / (len(a) - 1) + (xb ** 2).sum() / (len(b) - 1) - 2 * cross)


def prdc(distance, fake, real, k=5):
    """Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020) from a matrix of distances: k-th neighbour, strict <."""
    def radius(i):
        d = np.where(i[:, None] != i[None], distance[np.ix_(i, i)], np.inf)
        return np.partition(d, k - 1, 1)[:, k - 1]
    d, r_fake, r_real = distance[np.ix_(fake, real)], radius(fake), radius(real)
    inside = d < r_real
    return dict(precision=inside.any(1).mean(), recall=(d < r_fake[:, None]).any(0).mean(), density=inside.sum(1).mean() / k,
                coverage=(d.min(0) < r_real).mean())


def distances(x):
    """Euclidean distances of all pairs of x (N,d)."""
    square = (x ** 2).sum(1)
    return np.sqrt(np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0))


def radial_spectrum(images):
    """Power of each image (N,H,W) at whole spatial frequencies 1 .. H/2 cycles an image, in dB, averaged over directions."""
    n = images.shape[-1]
    f = np.fft.fftfreq(n, 1 / n)
    radius = np.hypot(f[:, None], f[None]).round().astype(int).ravel()
    window = np.hanning(n + 2)[1:-1]                                              # the borders do not meet
    power = np.abs(np.fft.fft2(images * window[:, None] * window)).reshape(len(images), -1) ** 2
    rings = np.stack([np.bincount(radius, row) for row in power]) / np.bincount(radius)
    return 10 * np.log10(rings[:, 1:n // 2 + 1] + 1e-12)


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


# ---------------------------------------------------------------------------------------------------------------------
# quality
# ---------------------------------------------------------------------------------------------------------------------


def memorisation(x, samples, train, held_out):
    """Share of samples nearer to a training image than to a held-out one; 0.5 when nothing is memorised. Pools of equal size."""
    return (x[np.ix_(samples, train)].min(1) < x[np.ix_(samples, held_out)].min(1)).mean()


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
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
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

    spectrum = radial_spectrum(images)
    counts, pieces = lesions(masks)
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]
    pixels = images.reshape(len(images), -1).astype(np.float64)
    centre = pixels[train].mean(0)
    axes = np.linalg.svd(pixels[train] - centre, full_matrices=False)[2][:64]      # PCA of the training images
    near = distances((pixels - centre) @ axes.T)
    x = None
    if args.vgg_weights != 'none':
        vgg = VGG16(args.vgg_weights).to(device)
        with torch.no_grad():
            x = torch.cat([vgg(part.to(device))[-1].mean((2, 3)).cpu() for part in progress(torch.from_numpy(images)[:, None].split(64), 'VGG16')])
        x = x.double().numpy()
        kernel, apart = polynomial_kernel(x), distances(x)

    def measure(i, j):
        """All distances of images i to reference images j."""
        m = {}
        if x is not None:
            m |= {'KID x 1000': 1000 * kid(kernel, i, j), 'Frechet distance': frechet(x, i, j), **prdc(apart, i, j)}
        m['spectrum, dB'] = float(np.sqrt(((spectrum[i].mean(0) - spectrum[j].mean(0)) ** 2).mean()))
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
        n = min(len(t), len(r))
        ours['nearer to training'] = memorisation(near, f, t[:n], r[:n])
        floor['nearer to training'] = memorisation(near, o, t[:n], r[:n]) if len(o) else math.nan
        return ours, floor

    points = [both(('point', k), False) for k in range(10)]
    draws = [both(('draw', k), True) for k in progress(range(args.repeats), 'bootstrap')]
    mean = [{name: np.mean([p[side][name] for p in points]) for name in points[0][side]} for side in (0, 1)]
    cut, nearest = copies(images, fakes, train, np.concatenate([test, others]), out)
    report(out, intervals(list(mean[0]), mean, draws), dict(
        fake=args.fake, hash=made['bravo'], part=args.part, n=int(min(len(fakes), len(train), len(test), args.n)), sizes=sizes, repeats=args.repeats,
        correlation_cut=cut, copies=int((nearest > cut).sum())))
    cycles = np.arange(1, spectrum.shape[1] + 1)
    plot(out / 'spectrum.png', {n: (cycles, spectrum[i].mean(0)) for n, i in (('fake', fakes), ('train', train), (args.part, test))},
         'radial power spectrum', 'cycles an image', 'dB', logx=True)
    print0(f'copies: {(nearest > cut).sum()} of {len(fakes)} images correlate above {cut:.3f} with a training image (the 99th percentile of real '
           f'held-out images); look at {out}/nearest.png')


def copies(images, fakes, train, held_out, out):
    """Nearest training image of each fake by correlation; the eight closest pairs as a picture. Returns the cut and the correlations."""
    to_train, to_held = correlation(images[fakes], images[train]), correlation(images[fakes], images[held_out])
    cut = copy_cut(images[train], images[held_out])
    top = np.argsort(-to_train.max(1))[:8]
    zoom = max(1, 128 // images.shape[-1])
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / 'nearest.png', [[images[fakes[i]] for i in top], [images[train[to_train[i].argmax()]] for i in top],
                                    [images[held_out[to_held[i].argmax()]] for i in top]], ['generated', 'nearest train', 'held out'], zoom)
    return cut, to_train.max(1)


# ---------------------------------------------------------------------------------------------------------------------
# cycle
# ---------------------------------------------------------------------------------------------------------------------


def dice(a, b):
    """2 |A and B| / (|A| + |B|) of masks (N,S,S): (N,); nan where both are empty."""
    a, b = a.reshape(len(a), -1) > 0, b.reshape(len(b), -1) > 0
    with np.errstate(invalid='ignore'):
        return 2 * (a & b).sum(1) / (a.sum(1) + b.sum(1))


def train_segmenter(images, masks, steps, device='cpu', seed=0):
    """A small U-Net on images (N,1,S,S) and masks, cross-entropy + Dice, flips and small affine maps. Returns images -> masks (N,S,S)."""
    torch.manual_seed(seed_of(seed, 'segmenter') % 2 ** 32)
    net = UNet(1, 1, (16, 32, 64), (0, 0, 0), 1, 32, norm_groups=8).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters(), 2e-3, fused=True)
    for step in progress(range(steps), 'segmenter', leave=False):
        for group in opt.param_groups:
            group['lr'] = 2e-3 * (1 - step / steps)
        g, rows = generator(seed, 'segmenter', step), batch_rows(len(images), 16, step, seed)
        x, y = augment(torch.tensor(images[rows]), torch.tensor(masks[rows]).float(), torch.rand(16, 5, generator=g))
        x, y = (x + 0.05 * torch.randn(x.shape, generator=g)).to(device), y.to(device)      # what little noise a sampler leaves is no tumour
        out = net(x, torch.zeros(16, device=device))
        p = out.sigmoid()
        loss = F.binary_cross_entropy_with_logits(out, y) + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        opt.zero_grad()
        loss.backward()
        opt.step()

    @torch.no_grad()
    def segment(x):
        return np.concatenate([(net(v.to(device), torch.zeros(len(v), device=device)) > 0).cpu().numpy()[:, 0] for v in torch.tensor(x).split(64)])

    return segment


def cycle(args):
    """mask -> image -> mask: Dice and lesion recall by size on the images, on the same with shuffled masks, and on real test images."""
    device, out = setup(args), Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('bravo'):
        fail(f'--fake {args.fake}: holds masks only; make images with sample.py --bravo RUN')
    fake = load_slices([args.fake], made['pixels'], cache=args.cache, training=False)
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
    judge, test = real.rows('judge', 0.2, args.seed), real.rows('test', 0.0)
    rows = np.array([i for i, r in enumerate(fake.table) if r['tumour']])
    if min(map(len, (judge, test, rows))) < 8:
        fail(f'--data: {len(judge)} judge and {len(test)} test slices, --fake: {len(rows)} images with tumour; at least 8 of each are needed, see --split')
    segment = train_segmenter(real.images[judge], real.masks[judge], args.train_steps, device, args.seed)
    images = np.concatenate([fake.images[rows], real.images[test]])
    masks = np.concatenate([fake.masks[rows], real.masks[test]])[:, 0]
    patients = np.array([f'fake:{fake.table[i]["source"] or fake.table[i]["folder"]}' for i in rows] + [real.table[i]['patient'] for i in test])
    found, fakes, reals = segment(images), np.arange(len(rows)), np.arange(len(rows), len(images))
    own = dice(found, masks)
    shuffled = np.concatenate([np.mean([dice(found[i], np.roll(masks[i], k, 0)) for k in range(1, min(11, len(i)))], 0) for i in (fakes, reals)])
    pieces = []
    for i, mask in enumerate(masks):
        labels, n = components(mask)
        pieces += [(i, math.sqrt(4 * (labels == k).sum() / math.pi), found[i][labels == k].any()) for k in range(1, n + 1)]
    pieces = np.array(pieces, float)
    edges = np.quantile(pieces[pieces[:, 0] >= len(rows), 1], (1 / 3, 2 / 3))
    piece_rows = [np.flatnonzero(pieces[:, 0] == i) for i in range(len(images))]

    def measure(i):
        p = pieces[np.concatenate([piece_rows[r] for r in i])]
        size = np.digitize(p[:, 1], edges)
        name = (f'below {edges[0]:.1f} pixels', f'{edges[0]:.1f} to {edges[1]:.1f} pixels', f'above {edges[1]:.1f} pixels')
        return {'Dice, own masks': np.nanmean(own[i]), 'Dice, shuffled masks': np.nanmean(shuffled[i]), 'Dice, own - shuffled': np.nanmean(own[i] - shuffled[i]),
                **{f'lesions found, {n}': p[size == k, 2].mean() if (size == k).any() else math.nan for k, n in enumerate(name)}}

    names, points = list(measure(fakes)), [measure(fakes), measure(reals)]
    draws = [[measure(draw(r, patients, generator(args.seed, 'cycle', k), True)) for r in (fakes, reals)] for k in range(args.repeats)]
    report(out, intervals(names, points, draws), dict(fake=args.fake, hash=made['bravo'], judge_slices=len(judge), images=len(rows), test_slices=len(test)))
    show = np.concatenate([fakes[np.linspace(0, len(fakes), 6, endpoint=False).astype(int)], reals[np.linspace(0, len(reals), 6, endpoint=False).astype(int)]])
    zoom = max(1, 128 // images.shape[-1])
    save_grid(out / 'cycle.png', [[outline(images[i, 0], m[i], c, zoom) for i in show] for m, c in ((masks, (255, 80, 60)), (found, (80, 220, 90)))],
              ['asked for', 'found'], zoom)
    print0(f'the segmenter saw {len(judge)} slices of judge patients; the left half of {out}/cycle.png is generated, the right half real')


# ---------------------------------------------------------------------------------------------------------------------
# control
# ---------------------------------------------------------------------------------------------------------------------


def match(asked, found):
    """Pairs (i, j) of asked and found lesions with the least summed distance of centres; all orders are tried up to 6, else nearest first."""
    if not len(asked) or not len(found):
        return []
    d = np.hypot(asked[:, None, 1] - found[None, :, 1], asked[:, None, 2] - found[None, :, 2])
    if max(d.shape) <= 6:
        few, many = sorted(d.shape)
        e = d if d.shape[0] == few else d.T
        best = min(itertools.permutations(range(many), few), key=lambda order: sum(e[i, j] for i, j in enumerate(order)))
        return [(i, j) if d.shape[0] == few else (j, i) for i, j in enumerate(best)]
    pairs = []
    for i, j in zip(*np.unravel_index(np.argsort(d, axis=None), d.shape)):
        if all(i != a and j != b for a, b in pairs):
            pairs.append((int(i), int(j)))
    return pairs


def spearman(a, b):
    """Rank correlation; ties share their mean rank. nan for fewer than three pairs, or where one side is constant."""
    rank_of = lambda v: np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])
    return float(np.corrcoef(rank_of(np.asarray(a)), rank_of(np.asarray(b)))[0, 1]) if len(a) > 2 and len({*a}) > 1 and len({*b}) > 1 else math.nan


def control(args):
    """Counts, sizes and places obtained against those asked for; beside each, against the requests of other masks (shuffled)."""
    out = Path(args.out)
    made = json.loads((Path(args.fake) / 'sample.json').read_text())
    if not made.get('asked'):
        fail(f'--fake {args.fake}: was made without --count or --requests')
    requests = [np.array([[math.nan if v is None else v for v in lesion] for lesion in r]).reshape(-1, 3) for r in made['asked']]
    rows = read_csv(Path(args.fake) / 'manifest.csv')
    got, wish = [], []
    for r in rows:
        mask = read_nifti(Path(args.fake) / r['folder'] / 'seg.nii.gz')[0][0]
        got.append(lesion_records(mask))
        wish.append(requests[int(r['index']) % len(requests)])
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
    show = np.linspace(0, len(rows), 8, endpoint=False).astype(int)
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
# dual
# ---------------------------------------------------------------------------------------------------------------------


def around(mask, pixels):
    """The pixels within so many of a mask (S,S), along rows, columns and diagonals; the mask among them."""
    return F.max_pool2d(torch.from_numpy(np.float32(mask))[None, None], 2 * pixels + 1, 1, pixels)[0, 0].numpy() > 0


def gradient_correlation(a, b, where):
    """<grad a, grad b> / (|grad a| |grad b|) of images (S,S) over the pixels `where`: 1 for equal edges, -1 for inverted ones."""
    a, b = (np.stack(np.gradient(v))[:, where].ravel() for v in (a, b))
    return float(a @ b / math.sqrt((a @ a) * (b @ b) + 1e-20))


def information(a, b, bins=32):
    """Normalised mutual information (H(a) + H(b)) / H(a,b) of values (N,) in [-1,1] (Studholme 1999): 1 independent, 2 the same."""
    joint = np.histogram2d(a, b, bins, ((-1, 1), (-1, 1)))[0] / len(a)
    H = lambda p: -(p[p > 0] * np.log(p[p > 0])).sum()
    return float((H(joint.sum(0)) + H(joint.sum(1))) / max(H(joint), 1e-12)) if H(joint) else 2.0


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
                     'background shift': float(base), 'gradient correlation': gradient_correlation(pre, post, rest), 'NMI': information(pre[rest], post[rest]),
                     'shift, pixels': math.hypot(*shift_of(pre, post))}


def dual(args):
    """Enhancement and agreement of pairs: means beside those of real test pairs, and W1 to them beside that of real training pairs."""
    made, out = json.loads((Path(args.fake) / 'sample.json').read_text()), Path(args.out)
    names = args.dual or tuple(made.get('dual') or ())
    if not names:
        fail(f'--fake {args.fake}: was not made by a run of train_bravo.py --dual; give a set that was, or the names of its files with --dual')
    fake = load_slices([args.fake], made['pixels'], names, cache=args.cache, training=False)
    real = load_slices(args.data, made['pixels'], names, made['box'], args.split, args.cache)
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
        """One draw: means of fake and test pairs, and W1 of equally many fake, or training, pairs to test pairs, in sd of these."""
        f, r, t = (draw(rows, patients, generator(args.seed, 'dual', k, name), resample) for rows, name in ((fakes, 'f'), (test, 'r'), (train, 't')))
        n = min(len(f), len(r), len(t))
        return [{**{m: np.nanmean(v[i]) for m, v in values.items()},
                 **{f'{m}, W1': wasserstein(v[j[:n]], v[r[:n]]) / max(np.nanstd(v[test]), 1e-6) for m, v in values.items()}} for i, j in ((f, f), (r, t))]

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
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
    level = {r['folder']: float(r['level']) for r in read_csv(Path(args.fake) / 'manifest.csv')}
    sides = [(data, [data.table[i] for i in rows], rows) for data, rows in ((fake, range(len(fake.table))), (real, real.rows('test')))]
    about = [np.array([(math.sqrt(t['tumour']) / made['pixels'], level.get(t['folder'], t['level']), t['tumour'] > 0) for t in table]).reshape(-1, 3) for _, table, _ in sides]
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
    """Rows of HEADER: value and 2.5 to 97.5 % of the draws for both sides, and the interval of their difference."""
    def between_(values):
        values = np.array(values, float)
        return [float(np.nanpercentile(values, q)) if np.isfinite(values).any() else math.nan for q in (2.5, 97.5)]
    return [[n, float(points[0][n]), *between_([d[0][n] for d in draws]), float(points[1][n]), *between_([d[1][n] for d in draws]),
             *between_([d[0][n] - d[1][n] for d in draws])] for n in names]


def report(out, table, about, sides=('fake', 'real')):
    """Prints the table and writes metrics.csv and metrics.json."""
    print0(f'{"":34}{sides[0]:>9}  {"95 %":^19}{sides[1]:>9}  {"95 %":^19}  difference, 95 %')
    for name, *v in table:
        print0(f'{name:34}{v[0]:9.3f}  [{v[1]:7.3f}, {v[2]:7.3f}]  {v[3]:9.3f}  [{v[4]:7.3f}, {v[5]:7.3f}]  [{v[6]:7.3f}, {v[7]:7.3f}]')
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / 'metrics.csv', HEADER, table)
    atomic_write(out / 'metrics.json', json.dumps({**about, 'metrics': {r[0]: dict(zip(HEADER[1:], r[1:])) for r in table}}, indent=1).encode())


def main(args):
    {'quality': quality, 'cycle': cycle, 'control': control, 'dual': dual, 'readers': readers}[args.command](args)


if __name__ == '__main__':
    main(get_args())
