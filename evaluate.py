"""Measures generated images against real patients, with the same measure between real patients beside each figure.

  python evaluate.py quality --fake runs/synthetic --data DIR --vgg-weights vgg16.pth     distances, diversity, lesions, memorisation
  python evaluate.py cycle --fake runs/synthetic --data DIR       does a segmenter find the mask that an image was made from?
  python evaluate.py control --fake runs/asked                    do masks hold what was asked for (sample.py --count, --requests)?
  python evaluate.py coherence --fake runs/stacks --data DIR      do the slices of volumes fit together (sample.py --stack)?

Each leaves metrics.json, metrics.csv and pictures in --out. Reads files, changes none.
"""
import itertools

from common import *


def get_args(argv=None):
    p = Parser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=Parser)
    for name, told in (('quality', 'is a generated set like real patients it has not seen?'),
                       ('cycle', 'does a segmenter find in the images the masks that they were made from?'),
                       ('control', 'do the masks hold what was asked for?'),
                       ('coherence', 'do the slices of generated volumes fit together as those of real ones do?')):
        c = commands.add_parser(name, help=told)
        g = c.add_argument_group('what')
        g.add_argument('--fake', required=True, metavar='DIR', help='a set made by sample.py')
        if name != 'control':
            g.add_argument('--data', nargs='+', required=True, metavar='DIR', help='the real patients, training patients included')
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
        g.add_argument('--repeats', type=number(int, 20), default=200, help='bootstrap draws, of patients (control: of masks)')
        g.add_argument('--out', default=f'runs/{name}', metavar='DIR')
        g.add_argument('--seed', type=number(int, 0), default=0)
        if name != 'control':
            g.add_argument('--cache', default='runs/cache', metavar='DIR', help='where decoded slices are kept')
        if name in ('quality', 'cycle'):
            g.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    args = p.parse_args(argv)
    args.dtype = 'fp32'
    if not (Path(args.fake) / 'sample.json').is_file():
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
    real = load_slices(args.data, made['pixels'], box=made['box'], split=args.split, cache=args.cache)
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
    {'quality': quality, 'cycle': cycle, 'control': control, 'coherence': coherence}[args.command](args)


if __name__ == '__main__':
    main(get_args())
