"""Measures generated images against real patients, with the same measure between real patients beside each figure.

  python evaluate.py quality --fake runs/synthetic --data DIR --vgg-weights vgg16.pth     distances, diversity, lesions, memorisation
  python evaluate.py cycle --fake runs/synthetic --data DIR       does a segmenter find the mask that an image was made from?
  python evaluate.py control --fake runs/asked                    do masks hold what was asked for (sample.py --count, --requests)?
  python evaluate.py atlas --data DIR --template T1.nii.gz --labels LABELS.nii.gz   where in a template's brain does each patient lie?

Each leaves metrics.json, metrics.csv and pictures in --out. Reads files, changes none.
"""
import gzip
import itertools

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('quality', 'is a generated set like real patients it has not seen?'),
                       ('cycle', 'does a segmenter find in the images the masks that they were made from?'),
                       ('control', 'do the masks hold what was asked for?')):
        c = commands.add_parser(name, help=told)
        g = c.add_argument_group('what')
        g.add_argument('--fake', required=True, metavar='DIR', help='a set made by sample.py')
        if name != 'control':
            g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients, training patients included')
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
        g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients (control: of masks)')
        g.add_argument('--out', default=f'runs/{name}', metavar='DIR')
        g.add_argument('--seed', type=number(int, 0), default=0)
        if name != 'control':
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
    g.add_argument('--n', type=number(int, 8), default=200, help='slices of --fake at most')
    g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients')
    g.add_argument('--out', default='runs/atlas', metavar='DIR', help='matrices of all patients; the same command goes on')
    g.add_argument('--seed', type=number(int, 0), default=0)
    g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept, with --fake')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    for name in ('template', 'labels'):
        if args.command == 'atlas' and not Path(getattr(args, name)).is_file():
            fail(f'--{name} {getattr(args, name)}: no such file; see "Anatomy" in README for where to get one')
    if args.fake is not None and not (Path(args.fake) / 'sample.json').is_file():
        fail(f'--fake {args.fake}: holds no sample.json; give a set made by sample.py')
    for root in getattr(args, 'data', ()):
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
# atlas. Points are (x, y, z) in mm from the corner of a grid as displayed, so 2 p / extent - 1 is what grid_sample wants; a matrix
# (3,4) takes the points of a patient to those of the template.
# ---------------------------------------------------------------------------------------------------------------------

UNITS = torch.tensor([1.0] * 3 + [1 / 60] * 9)      # of the 12 dof: each moves the brain's edge, 60 mm from its centre, by about 1 mm
FLAT = torch.tensor([math.inf, math.inf, 0, 0, 0, math.inf, 15, 15, 0, math.inf, 0, 0])        # 6 in the plane of a slice, scale within 30 %
TILT = torch.tensor([math.inf, math.inf, 0, *[math.radians(10) * 60] * 2, math.inf, 15, 15, 0, math.inf, 0, 0])
NEAR = 0.01         # nats below the best: levels as good as that are in the interval of a single slice; set by the levels of slices of known place
extent_of = lambda shape, spacing: torch.tensor([n * s for n, s in zip(shape[::-1], spacing[::-1])], dtype=torch.float32)
carried = lambda matrix, points: points @ matrix[:, :3].T + matrix[:, 3]


def affine(q):
    """T R Sh S of q (K,12) in UNITS: translation, rotation vector, log-scales, shears xy, xz, yz. (K,3,4), for points from the centre."""
    t, r, s, h = (q * UNITS).split(3, 1)
    zero, one = torch.zeros_like(t[:, 0]), torch.ones_like(t[:, 0])
    skew = torch.stack([zero, -r[:, 2], r[:, 1], r[:, 2], zero, -r[:, 0], -r[:, 1], r[:, 0], zero], 1).view(-1, 3, 3)
    shear = torch.stack([one, h[:, 0], h[:, 1], zero, one, h[:, 2], zero, zero, one], 1).view(-1, 3, 3)
    return torch.cat([torch.linalg.matrix_exp(skew) @ shear * s.exp()[:, None], t[:, :, None]], 2)


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


def brain_of(image, spacing):
    """An image (Z,H,W) without its skull, in [0,1] and at about 2 mm; its spacing; the brain's centre (x, y) mm. Brain: the largest piece
    of what is brighter than 0.6 of the head's inner median, opened by 5 mm in plane (that cuts the scalp off), grown 3 mm more for its fluid."""
    v, spacing = coarser(torch.from_numpy(np.ascontiguousarray(image)), spacing)
    pool = lambda m, mm: F.max_pool2d(m.float(), [2 * round(mm / s) + 1 for s in spacing[1:]], 1, [round(mm / s) for s in spacing[1:]])
    head = torch.from_numpy(head_mask(v.numpy()))
    inner = 1 - pool(~head, 15) > 0
    bright = v > 0.6 * v[inner if inner.any() else v > v.min()].median()
    core = 1 - pool(~bright, 5)
    labels, n = components(core[:, ::2, ::2].numpy())
    if n:
        piece = torch.from_numpy(labels == np.bincount(labels.ravel())[1:].argmax() + 1).float()
        core = core * F.interpolate(piece[None], core.shape[1:], mode='nearest')[0]
    brain = pool(core, 8) > 0 if n else torch.ones_like(v, dtype=torch.bool)
    if (v == v.min()).float().mean() > 0.5 and (brain & head).sum() > 0.8 * head.sum():
        brain = v > v.min()                                                   # somebody took the skull away already
    low, high = np.percentile(v[brain & (v > v.min())].numpy(), (1, 99))
    _, y, x = brain.nonzero().float().mean(0).tolist()
    return ((v - low) / max(high - low, 1e-6)).clamp(0, 1) * brain, spacing, ((x + 0.5) * spacing[2], (y + 0.5) * spacing[1])


@torch.no_grad()
def register(template, image, spacing):
    """A volume (Z,H,W): matrix, NMI, and NMI of the same place in the volume turned upside down. 12 dof from the template to the patient, from
    1,755 starts (scale, height, depth, pitch, z-scale), on 3,000 to 50,000 points: 4 to 8 s of one core."""
    brain, spacing, middle = brain_of(image, spacing)
    centre = torch.tensor([*middle, len(brain) * spacing[0] / 2])
    extent, reach = extent_of(brain.shape, spacing), torch.full((12,), math.inf)
    starts = torch.cartesian_prod(torch.tensor([0.82, 0.92, 1.03]).log() * 60, torch.linspace(-0.35, 0.4, 13) * extent[2], torch.tensor([-25.0, 0, 25]),
                                  torch.tensor([-15.0, 0, 15]), torch.tensor([0.7, 0.9, 1.15, 1.5, 2.0]).log() * 60)
    q, told = torch.zeros(len(starts), 12), None
    q[:, [6, 2, 1, 3, 8]], q[:, 7] = starts, starts[:, 0]
    for mm, n, scales, keep, steps, lr in ((4, 3000, 3, 3, 50, 2.0), (2, 20000, 3, 1, 50, 0.7), (1, 60000, 1, 1, 60, 0.25)):
        about = (centre, *template.sample(n, mm), blur(brain, mm, spacing)[None], extent)
        told = torch.cat([explained(part, *about)[0] for part in q.split(64)]) if told is None else told
        best = told.view(scales, -1).topk(keep)[1] + torch.arange(scales)[:, None] * (len(q) // scales)      # the best of each scale
        with torch.enable_grad():
            q, told = climb(q[best.flatten()], reach, steps, lr, *about)
    A = affine(q)[0]
    nmi, turned = (explained(q, *about[:3], v, extent, order=0)[1].item() for v in (about[3], about[3].flip(1)))
    return inverse(torch.cat([A[:, :3], (A[:, 3] + centre - A[:, :3] @ template.centre)[:, None]], 1)), nmi, turned


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
    matrix = torch.cat([A[:, :3], (A[:, 3] + template.centre - A[:, :3] @ centre)[:, None]], 1)
    with torch.no_grad():
        return matrix, float(explained(q, *about, order=0)[1]), float(q[0, 2] + template.centre[2]), float(good.min()) - 2, float(good.max()) + 2


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


def agreement(image, template, matrix, points):
    """NMI of a slice (S,S) in [-1,1] and the template there, where it is near the brain; 16 bins, as there are few pixels. nan without any."""
    brain, _ = look(template.levels[2][None], carried(matrix, points)[None], template.size)
    near = brain[0] > 0.02
    fixed = ((torch.tensor(image).flatten() + 1) * 7.999).long().clamp(0, 15)
    return float(information(joint_histogram(fixed, brain[0], near, 16))[1]) if near.any() else math.nan


def atlas(args):
    """Registers every patient once, writes parcellations, atlas.json, atlas.csv and a picture; with --fake measures its slices beside real ones."""
    keep_memory()
    out, template = Path(args.out), Template(args.template, args.labels)
    patients = find_patients(args.data, ('bravo', 'seg'))
    names = Counter(p['folder'].name for p in patients)
    for p in patients:
        if p['synthetic'] or names[p['folder'].name] > 1:
            fail(f'--data {p["root"]}: ' + ('is synthetic; give it with --fake' if p['synthetic'] else f'another root has a folder {p["folder"].name} too'))
    file = out / 'atlas.json'
    stamp = hashlib.sha256(Path(args.template).read_bytes() + Path(args.labels).read_bytes()).hexdigest()[:16]
    state = json.loads(file.read_text()) if file.exists() else dict(template=stamp, patients={}, fakes={})
    if state['template'] != stamp:
        fail(f'--out {out}: was made with another --template or --labels; choose another')
    done, targets = state['patients'], {p['folder'].name: (p['folder'] if args.write else out / p['folder'].name) / 'parc.nii.gz' for p in patients}
    sha = lambda data: hashlib.sha256(data).hexdigest()[:16]
    for name, target in targets.items():
        if target.exists() and done.get(name, {}).get('sha') != sha(target.read_bytes()):
            fail(f'{target}: is there and was not written by {file}; move it away, or leave --write away')
    out.mkdir(parents=True, exist_ok=True)
    save = lambda: atomic_write(file, json.dumps(state).encode())
    for p in progress(patients, 'registering'):
        name = p['folder'].name
        if name in done and targets[name].exists():
            continue
        (image,), mask, spacing, _ = read_patient(p)
        if image.min() == image.max():
            fail(f'{p["files"]["bravo"]}: is empty; remove the patient', 1)
        if name not in done:
            clock = time.process_time()
            matrix, nmi, *more = (search if len(image) == 1 else register)(template, image, spacing)
            done[name] = dict(matrix=matrix.tolist(), nmi=nmi, seconds=time.process_time() - clock, shape=image.shape, spacing=spacing,
                              **(dict(zip(('z', 'z_low', 'z_high'), (v + template.floor for v in more))) if len(image) == 1 else dict(upside_down=more[0])))
        bounds, matrix = (0, 0, *image.shape[1:]), torch.tensor(done[name]['matrix'])
        labels = np.stack([labels_at(template, matrix, plane(bounds, bounds[2:], spacing, z), bounds[2:]) for z in range(len(image))])
        data = as_stored(labels, p['files']['bravo'])
        done[name] |= dict(sha=sha(data), tumour=tumour_counts(mask, grow_labels(labels, spacing[1:])))
        save()                                                                # first: what stands there without a line here is somebody else's
        targets[name].parent.mkdir(parents=True, exist_ok=True)
        atomic_write(targets[name], data)
    here = [done[p['folder'].name] for p in patients]
    write_csv(out / 'atlas.csv', ['patient', 'nmi', 'upside_down', 'z', 'z_low', 'z_high', 'tumour', 'in_ventricles', 'outside_brain', 'seconds'],
              [[n, d['nmi'], *(d.get(k, '') for k in ('upside_down', 'z', 'z_low', 'z_high')), *d['tumour'], f'{d["seconds"]:.1f}'] for n, d in zip(names, here)])
    spread = lambda v: '{:.3f} to {:.3f}, median {:.3f}'.format(*np.percentile(v, (0, 100, 50)))
    total, inside, outside = np.sum([d['tumour'] for d in here], 0)
    turned = [d['upside_down'] for d in here if 'upside_down' in d]
    print0(f'{len(here)} patients: NMI {spread([d["nmi"] for d in here])}' + (f' (volumes upside down: {spread(turned)})' if turned else '')
           + f'; of {total} voxels of tumour {inside / max(total, 1):.4f} in ventricles, {outside / max(total, 1):.4f} outside the brain')
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
    real = load_slices(args.data, S, box=box, cache=args.cache)

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

    rows = read_csv(Path(args.fake) / 'manifest.csv')
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator(args.seed, 'atlas')).tolist()[:args.n]]
    table, who, how = [], [], Counter()
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
                if r['folder'] not in state['fakes']:
                    matrix, _, *level = search(template, image, spacing)
                    state['fakes'][r['folder']] = dict(matrix=matrix.tolist(), **dict(zip(('z', 'z_low', 'z_high'), (v + template.floor for v in level))))
                    save()
                matrix, points = torch.tensor(state['fakes'][r['folder']]['matrix']), plane((0, 0, S, S), (S, S), spacing, 0)
            labels = grow_labels(labels_at(template, matrix, points, (S, S))[None], spacing[1:])
            table.append([agreement(image[0], template, matrix, points), *tumour_counts(mask, labels)])
        who.append(f'fake:{r["source_patient"] or r["folder"]}')
    for i, (r, g) in enumerate(zip(real.table, at)):
        mask = real.masks[i, 0]
        table.append([agreement(real.images[i, 0], template, *g), *tumour_counts(mask, grown[i])] if made.get('bravo') else
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
    draws = [[measure(draw(i, who, generator(args.seed, 'atlas', k), True)) for i in sides] for k in range(args.repeats)]
    report(out, intervals(list(points[0]), points, draws), dict(fake=args.fake, slices=n, placed=dict(how), real_slices=len(real.table), nmi_cut=float(cut)))
    write_csv(out / 'slices.csv', ['folder', 'nmi', 'tumour', 'in_ventricles', 'outside_brain'],
              [[r['folder'], *t] for r, t in zip(rows, table[:n].tolist())])
    print0(f'placed: {", ".join(f"{k} {v}" for v, k in how.items())}; real beside: {len(real.table)} slices of {len(by_patient)} patients')


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
    {'quality': quality, 'cycle': cycle, 'control': control, 'atlas': atlas}[args.command](args)


if __name__ == '__main__':
    main(get_args())
