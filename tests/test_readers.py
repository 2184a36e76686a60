"""The reader study: its power, its plan, its page served and as one file in a real browser, and readers whose score is known."""
import base64
import csv
import io
import json
import math
import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
import common
import evaluate
from common import READINGS, generator, read_csv, study_order, write_csv
from evaluate import GRADES, alike, critical, equivalence, equivalence_power, power
from test_label import CHROME, Browser, Server


def go(*flags):
    evaluate.main(evaluate.get_args(['readers', *map(str, flags)]))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """20 images of 16 x 16 as sample.py leaves them, with a square as mask, of another size each; some are empty."""
    root, rows = tmp_path_factory.mktemp('fake') / 'set', []
    for i in range(20):
        mask, name = np.zeros((16, 16), np.uint8), f'syn_0_{i:06d}'
        mask[4:4 + i // 3, 4:4 + i // 3] = 1
        common.write_patient(root / name, {'bravo': torch.rand(16, 16, generator=generator('fake', i)).numpy() * 2 - 1}, mask, (1, 1))
        rows.append([name, '', f'{i / 20}'])
    write_csv(root / 'manifest.csv', ['folder', 'source_patient', 'level'], rows)
    (root / 'sample.json').write_text(json.dumps(dict(bravo='0123456789ab', pixels=16, box=[-0.02, -0.02, 1.02, 1.02])))
    return root


@pytest.fixture
def study(made, phantom, cache, tmp_path):
    go('plan', '--fake', made, '--data', phantom, '--n', 8, '--pairs', 3, '--likert', 2, '--cache', cache, '--out', tmp_path / 'study')
    return tmp_path / 'study'


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n, k, at60, at65', [(50, 32, 0.34, 0.62), (100, 59, 0.62, 0.91), (200, 113, 0.86, 0.99), (300, 165, 0.97, 1.00)])
def test_power(n, k, at60, at65):
    """The exact binomial, against sums of math.comb; 59 of 100 is p = .0443 and 58 is not enough."""
    tail = lambda k, p: sum(math.comb(n, x) * p ** x * (1 - p) ** (n - x) for x in range(k, n + 1))
    assert critical(n) == k and tail(k, 0.5) <= 0.05 < tail(k - 1, 0.5)
    assert tail(k, 0.6) == pytest.approx(at60, abs=0.0051) and tail(k, 0.65) == pytest.approx(at65, abs=0.0051)
    assert f'from {k} right' in power(n) and f'power of {tail(k, 0.6):.2f} at a true 60 %, {tail(k, 0.65):.2f}' in power(n) and '214 answers give .80, 271 .90' in power(n)
    assert common.upper_tail(59, 100, 0.5) == pytest.approx(0.0443, abs=5e-5) and common.upper_tail(58, 100, 0.5) > 0.05


def test_equivalence():
    """Symmetric; not reached by few answers, whatever they are; its power by counting; about .80 and .90 where a normal approximation says so."""
    assert equivalence(40, 90) == pytest.approx(equivalence(50, 90)) and equivalence(50, 100) < equivalence(49, 100)
    assert min(equivalence(k, 50) for k in range(51)) > 0.05 and equivalence_power(50) == 0
    for n in (100, 214, 271):
        by_hand = sum(math.comb(n, k) / 2 ** n for k in range(n + 1) if equivalence(k, n) <= 0.05)
        assert equivalence_power(n) == pytest.approx(by_hand, rel=1e-9)
    assert equivalence_power(214) == pytest.approx(0.80, abs=0.03) and equivalence_power(271) == pytest.approx(0.90, abs=0.03)
    assert equivalence(0, 100) == pytest.approx(1) and equivalence(107, 214) < 0.005


def test_alike():
    """Nobody twice; a real image finds the generated one of its size, and an empty one an empty one."""
    g = np.random.default_rng(0)
    real = np.stack([np.linspace(0, 0.5, 30), g.random(30), np.arange(30) > 5], 1)
    fake = np.concatenate([g.random((20, 3)) + (0, 0, 5), real])[g.permutation(50)]
    pairs = alike(fake, real, 30, generator(0))
    assert all((fake[i] == real[j]).all() for i, j in pairs) and len({i for i, _ in pairs}) == len({j for _, j in pairs}) == 30
    assert len({i for i, _ in alike(real, fake, 30, generator(0))}) == 30


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_is_balanced_and_tells_nothing(study, made, phantom, cache, tmp_path, capsys):
    plan, key = json.loads((study / 'study.json').read_text()), read_csv(study / 'key.csv')
    count = Counter((r['kind'], r['practice'], r['truth']) for r in key)
    assert count == {(k, p, t): n for k, p, n in (('real', '0', 4), ('pair', '0', 3), ('grade', '0', 1), ('real', '1', 1), ('pair', '1', 1), ('grade', '1', 1))
                     for t in ('real', 'generated')}
    assert sum(v['practice'] for v in plan['items'].values()) == 5
    ids = [*plan['items'], *plan['pictures']]
    assert all(re.fullmatch('[0-9a-f]{12}', i) for i in ids) and len({*ids}) == len(ids)
    size = {(im.size, im.mode, len(data), tuple(im.info)) for data in map(base64.b64decode, plan['pictures'].values()) for im in [Image.open(io.BytesIO(data))]}
    assert len(size) == 2 and {s[0] for s in size} == {(16, 16), (256, 256)} and all(s[3] == () for s in size)      # plain and with a border; all of one kind alike in bytes
    told = (study / 'study.json').read_text() + (study / 'page.html').read_text()
    assert not any(w in told for w in ('http', 'syn_0_', 'phantom', '"generated"', str(made), str(phantom)))
    real = {r['folder']: common.part_of(r['folder']) for r in key if r['truth'] == 'real'}
    assert {*real.values()} == {'test'} and len({(r['set'], r['folder'], r['z']) for r in key}) == len(key)         # nothing is shown in two places
    go('plan', '--fake', made, '--data', phantom, '--n', 8, '--pairs', 3, '--likert', 2, '--cache', cache, '--out', tmp_path / 'again')
    assert (tmp_path / 'again/study.json').read_bytes() == (study / 'study.json').read_bytes() and '3 answers of a reader' in capsys.readouterr().out
    go('plan', '--fake', made, '--data', phantom, '--n', 8, '--pairs', 3, '--likert', 2, '--cache', cache, '--out', tmp_path / 'other', '--seed', 1)
    assert not {*ids} & {*json.loads((tmp_path / 'other/study.json').read_text())['items']}


def test_order():
    """Of each reader's own, from the seed; practice first, then kind after kind; a tenth twice and 20 later; pairs turned half the time; ids tell no class."""
    ids = {f'{int(v):012x}': n for n, v in enumerate(torch.randint(2 ** 40, (600,), generator=generator('ids')))}
    items = {i: dict(kind=('real', 'pair', 'grade')[n % 3], practice=n < 6, pictures=[]) for i, n in ids.items()}
    plan = dict(seed=3, kinds=['real', 'pair', 'grade'], items=items)
    a, b = study_order(plan, 'ann'), study_order(plan, 'bob')
    assert a == study_order(json.loads(json.dumps(plan)), 'ann') != b and a != study_order(dict(plan, seed=4), 'ann')
    kinds = [items[i]['kind'] for i, _, _ in a]
    assert all(items[i]['practice'] == (n < 6) for n, (i, _, _) in enumerate(a)) and kinds[6:] == sorted(kinds[6:], key=plan['kinds'].index) and len(a) == 600 + 3 * 20
    where = {(i, r): n for n, (i, r, _) in enumerate(a)}
    assert len(where) == len(a) and all(where[i, 1] - where[i, 0] > 20 for i, r in where if r)
    assert 0.4 < np.mean([t for i, _, t in a if items[i]['kind'] == 'pair']) < 0.6 and not any(t for i, _, t in a if items[i]['kind'] != 'pair')


# -- scores of known readers ------------------------------------------------------------------------------------------


def invented(folder, n=100, pairs=100, likert=20):
    """A study without images: key.csv and study.json with one picture for all."""
    names, key, items = iter(f'{i:012x}' for i in range(10 ** 4)), [], {}
    for kind, count in (('real', n // 2), ('pair', pairs), ('grade', likert // 2)):
        for m in range(count + 1 if count else 0):
            item = next(names)
            for truth in ('generated', 'real'):
                item, picture = item if kind == 'pair' or truth == 'generated' else next(names), next(names)
                items.setdefault(item, dict(kind=kind, practice=m == 0, pictures=[]))['pictures'].append(picture)
                key.append([item, picture, kind, int(m == 0), truth, f'{kind}{m}'])
    folder.mkdir()
    write_csv(folder / 'key.csv', ['item', 'picture', 'kind', 'practice', 'truth', 'pair'], key)
    dot = evaluate.plain_png(np.zeros((4, 4), np.uint8))
    (folder / 'study.json').write_text(json.dumps(dict(seed=0, kinds=['real', 'pair', 'grade'], items=items, pictures={k[1]: dot for k in key})))
    return folder


def answers(folder, reader, choose):
    """All answers of a reader to a study; choose(kind, right answer, wrong answer) -> answer, confidence."""
    plan, key, rows = json.loads((folder / 'study.json').read_text()), {}, []
    for r in read_csv(folder / 'key.csv'):
        key.setdefault(r['item'], {})[r['truth']] = r
    for at, (item, repeat, _) in enumerate(study_order(plan, reader)):
        kind, k = plan['items'][item]['kind'], key[item]
        right = ('real' if 'real' in k else 'generated') if kind != 'pair' else k['real']['picture']
        rows.append([reader, at, item, repeat, *choose(kind, right, {'real': 'generated', 'generated': 'real'}.get(right) or k['generated']['picture']), 900, ''])
    return rows


def scored(folder, rows):
    write_csv(folder / 'answers.csv', READINGS, rows)
    go('score', '--out', folder, '--repeats', 40)
    return {(r['reader'], r['measure']): r for r in read_csv(folder / 'readers.csv')}, json.loads((folder / 'metrics.json').read_text())


def test_readers_who_know_and_who_are_wrong(tmp_path, capsys):
    """On the key 100 %, on its inverse 0 %; grades that favour real images by 2 are 2 apart; all agree with themselves."""
    folder = invented(tmp_path / 'study')
    grade = lambda right: ('5;4;4;5' if right == 'real' else '3;2;2;3', '')
    know = lambda kind, right, wrong: grade(right) if kind == 'grade' else (right, 3 if kind == 'real' else '')
    never = lambda kind, right, wrong: grade(right) if kind == 'grade' else (wrong, 3 if kind == 'real' else '')
    rows, metrics = scored(folder, answers(folder, 'ann', know) + answers(folder, 'bob, MD'.replace(',', ''), never))
    value = lambda who, what: float(rows[who, what]['value'])
    for what in ('real or generated: right', 'pairs: right'):
        assert (value('ann', what), value('bob MD', what), value('all', what)) == (1, 0, 0.5) and rows['ann', what]['n'] == '100'
        assert float(rows['ann', what]['p above chance']) == pytest.approx(2.0 ** -100) and float(rows['bob MD', what]['p above chance']) == 1
    assert (value('ann', 'AUC of confidence'), value('bob MD', 'AUC of confidence')) == (1, 0) and value('all', 'kappa between readers') == pytest.approx(-1, abs=1e-9)
    assert value('ann', 'real or generated: the same again') == value('bob MD', 'pairs: the same again') == 1 and rows['ann', 'pairs: the same again']['n'] == '10'
    assert value('ann', "pairs: d'") == pytest.approx(-value('bob MD', "pairs: d'")) and value('ann', "pairs: d'") > 3
    m = metrics['metrics']
    assert {g: (m[g]['fake'], m[g]['floor'], m[g]['above_low'], m[g]['above_high']) for g in GRADES} == {
        g: (f, r, -2, -2) for g, f, r in zip(GRADES, (3, 2, 2, 3), (5, 4, 4, 5))}
    assert (folder / 'roc.png').stat().st_size > 1000 and (folder / 'hardest.png').exists()
    assert f'signed-rank test over pairs: {GRADES[0]} {2 ** -9:.2g}' in capsys.readouterr().out               # ten pairs, all on one side


def test_readers_who_guess(tmp_path):
    """At chance: no test rejects it, AUC and kappa near none, intervals hold the truth; 300 pairs of a guesser are equivalent to a coin; a 70 % reader is not."""
    folder, g = invented(tmp_path / 'study', 400, 300, 0), np.random.default_rng(1)

    def reader(share):
        def choose(kind, right, wrong):
            return (right if g.random() < share else wrong), (int(g.integers(1, 4)) if kind == 'real' else '')
        return choose

    rows, metrics = scored(folder, [r for n in 'abcd' for r in answers(folder, n, reader(0.5))] + answers(folder, 'good', reader(0.7)))
    for n in 'abcd':
        for what, count in (('real or generated: right', 400), ('pairs: right', 300)):
            r = rows[n, what]
            k = round(float(r['value']) * count)
            assert r['n'] == str(count) and abs(k / count - 0.5) < 0.09 and float(r['low']) < k / count < float(r['high'])
            assert float(r['p above chance']) == pytest.approx(sum(math.comb(count, x) for x in range(k, count + 1)) / 2 ** count, rel=1e-6)
        assert 0.4 < float(rows[n, 'AUC of confidence']['value']) < 0.6 and abs(float(rows[n, "pairs: d'"]['value'])) < 0.35
    assert sum(float(rows[n, 'pairs: right']['p not within 50 +- 10 %']) < 0.05 for n in 'abcd') >= 3
    assert float(rows['good', 'pairs: right']['p above chance']) < 1e-6 and float(rows['good', 'pairs: right']['p not within 50 +- 10 %']) > 0.5
    assert float(rows['good', 'real or generated: right']['value']) == pytest.approx(0.7, abs=0.07) and abs(float(rows['all', 'kappa between readers']['value'])) < 0.08
    assert metrics['metrics'] == {} and metrics['answers'] == 5 * (400 + 40 + 300 + 30)


def test_ties_repeats_and_second_thoughts(tmp_path):
    """The last of two answers counts, practice does not, a reader without some answers is scored on the others."""
    folder = invented(tmp_path / 'study', 20, 0, 0)
    rows = [r for r in answers(folder, 'x', lambda kind, right, wrong: (right, 1)) if r[3] == 0]
    practice = {r['item'] for r in read_csv(folder / 'key.csv') if r['practice'] == '1'}
    counted = [r for r in rows if r[2] not in practice]
    wrong = {'real': 'generated', 'generated': 'real'}
    rows = [r for r in rows if r[2] not in {c[2] for c in counted[:5]}] + [[*r[:4], wrong[r[4]], *r[5:]] for r in rows if r[2] in practice or r in counted[5:8]]
    told, _ = scored(folder, rows)
    assert told['x', 'real or generated: right']['n'] == '15' and float(told['x', 'real or generated: right']['value']) == pytest.approx(12 / 15)


# -- the page ---------------------------------------------------------------------------------------------------------


class StudyServer(Server):
    def __init__(self, study):
        self.start('--study', study)


def test_the_server_is_one_way_and_takes_only_what_the_page_offers(study):
    """kill -9 loses nothing, a line cut off half way is dropped; an answer twice, ahead, for another item or of another kind is refused."""
    s = StudyServer(study)
    now = s.state('ann')
    send = lambda **k: s.ask('answer', 'POST', json.dumps({**dict(rater='ann', at=now['at'], item=now['item'], answer='real', confidence=2, ms=10), **k}).encode())
    assert now['practice'] and now['kind'] == 'real' and len(now['pictures']) == 1 and s.state('ann', 5) == now and 'real' not in now['pictures']
    for bad in (dict(rater='a,b'), dict(rater=3), dict(at=1), dict(at=True), dict(at='0'), dict(item='0' * 12), dict(item=None), dict(answer='maybe'), dict(answer=None),
                dict(answer=now['pictures'][0]), dict(confidence=4), dict(confidence=True), dict(confidence='2'), dict(confidence=2.0), dict(ms=-1), dict(ms=1.5), dict(ms='1')):
        assert send(**bad)[0] == 400, bad
    assert read_csv(study / 'answers.csv') == [] and s.ask('key.csv')[0] == s.ask('image/../key.csv')[0] == s.ask('study.json')[0] == 404
    status, body = send()
    assert status == 200 and [r['item'] for r in read_csv(study / 'answers.csv')] == [now['item']] and send()[0] == 400           # no second time
    assert s.ask(f'image/{now["pictures"][0]}.png')[1][:4] == b'\x89PNG' and s.ask('')[1].decode() == (study / 'page.html').read_text()
    s.stop(signal.SIGKILL)
    with open(study / 'answers.csv', 'a') as f:
        f.write('ann,1,half a li')
    plan, seen = json.loads((study / 'study.json').read_text()), [now['item']]
    again = classifier.Reading(study, plan, 'ann')
    now = json.loads(body)
    assert again.state('ann') == now and again.answer(dict(rater='bob', at=0)) == 'no such rater'
    while 'item' in now:
        seen.append(now['item'])
        say = lambda **k: again.answer(dict(dict(rater='ann', at=now['at'], item=now['item'], ms=10, confidence=''), **k))
        if now['kind'] != 'real':
            assert {type(say(answer=a)) for a in ('real', '1;2;3', '1;2;3;6', now['item'], None)} == {str}
        now = say(**dict(real=dict(answer='generated', confidence=1), pair=dict(answer=now['pictures'][-1]), grade=dict(answer='1;2;3;5'))[now['kind']])
    assert seen == [i for i, _, _ in study_order(plan, 'ann')] and now == dict(rater='ann', at=len(seen), total=len(seen))
    assert again.answer(dict(rater='ann', at=len(seen), item=None, answer='real', confidence=2, ms=1)).startswith('this is not the item')
    assert [(r['item'], r['order']) for r in read_csv(study / 'answers.csv')] == [(i, str(n)) for n, i in enumerate(seen)]


def drive(b, key, knows):
    """Answers a page to its end by keys, as one who knows the key or as one who always says the same. Returns {(item, repeat): answer}."""
    said = {}
    while b.run('Boolean(s.item)'):
        s = b.run('s')
        k = key[s['item']]
        if s['kind'] == 'real':
            real = 'real' in k if knows else len(said) % 2 > 0
            b.press('6' if real else '2')
            said[s['item'], s['repeat']] = 'real' if real else 'generated'
        elif s['kind'] == 'pair':
            left = s['pictures'][0] == k['real']['picture'] if knows else True
            b.press('ArrowLeft' if left else 'ArrowRight')
            said[s['item'], s['repeat']] = s['pictures'][0 if left else 1]
        else:
            assert b.run('[...document.images].map(i => i.naturalWidth)') == [16, 256]             # the image, then the one with its border
            b.press(*('5432' if 'real' in k else '1212'))
            said[s['item'], s['repeat']] = '5;4;3;2' if 'real' in k else '1;2;1;2'
        b.until('s.at', s['at'] + 1)
    return said


@pytest.mark.skipif(CHROME is None, reason='no Chromium here (Debian: apt-get install chromium)')
def test_two_readers_in_a_browser(study, tmp_path):
    """One who knows the key and one who does not, on the served page and on the one file: each scores what it should; a reload loses nothing; nothing from outside."""
    key, n = {}, len(study_order(json.loads((study / 'study.json').read_text()), 'ann'))
    for r in read_csv(study / 'key.csv'):
        key.setdefault(r['item'], {})[r['truth']] = r
    go('page', '--out', study, '--reader', 'cleo', 'dan')
    page = (study / 'reader_cleo.html').read_text()
    assert 'http' not in page and '"seed"' not in page and not any(w in page for w in ('syn_0_', 'phantom', 'truth', '"generated"'))
    s, b, said = StudyServer(study), Browser(tmp_path / 'profile', 'about:blank'), {}
    try:
        for name, knows in (('ann', True), ('bob', False)):
            b.call('Page.navigate', url='about:blank')
            b.call('Page.navigate', url=s.url)
            b.until('document.activeElement.id', 'name')
            b.press(*name, 'Enter')
            b.until('Boolean(s && s.item)')
            b.until('[...document.images].length > 0 && [...document.images].every(i => i.naturalWidth == 16)')
            b.press('ArrowLeft', '9')                                    # keys of other questions do nothing
            assert b.run('s.at') == 0 and 'PRACTICE' in b.run('document.getElementById("told").textContent')
            b.press('3')
            b.until('s.at', 1)
            b.call('Page.reload')
            b.until('Boolean(s && s.at == 1)')
            said[name] = drive(b, key, knows)
            assert [u for u in b.run('performance.getEntriesByType("resource").map(e => e.name)') if not u.startswith(f'http://127.0.0.1:{s.port}/')] == []
        s.stop(signal.SIGKILL)
        b.call('Page.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
        for name, knows in (('cleo', True), ('dan', False)):
            b.call('Page.navigate', url=f'file://{study}/reader_{name}.html')
            b.until('Boolean(s && s.item)')
            b.press('3')
            b.until('s.at', 1)
            b.call('Page.reload')
            b.until('Boolean(s && s.at == 1)')                           # kept in this browser
            if name == 'dan':
                b.until('s.kind', 'real')
                b.picture(os.environ.get('READERS_PICTURE', tmp_path / 'page.png'))
            said[name] = drive(b, key, knows)
            assert b.run('performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length') == 0 and b.run('warning') == ''
            b.run('document.getElementById("save").click()')
            for _ in range(100):
                if (file := tmp_path / f'answers_{name}.csv').exists():
                    break
                b.run('new Promise(r => setTimeout(r, 50))')
            assert list(csv.reader(io.StringIO(b.run('csv()')))) == list(csv.reader(io.StringIO(file.read_text())))
    finally:
        b.process.kill()
        b.process.wait()
        s.stop(signal.SIGKILL)
    go('score', '--out', study, '--answers', tmp_path / 'answers_cleo.csv', tmp_path / 'answers_dan.csv', '--repeats', 20)
    rows = {(r['reader'], r['measure']): r for r in read_csv(study / 'readers.csv')}
    for name in said:
        assert len(said[name]) == n - 1
        mine = [(i, a) for (i, repeat), a in said[name].items() if not repeat and next(iter(key[i].values()))['practice'] == '0']
        for kind, what, count in (('real', 'real or generated: right', 8), ('pair', 'pairs: right', 3)):
            right = sum(a in key[i] if kind == 'real' else a == key[i]['real']['picture'] for i, a in mine if next(iter(key[i].values()))['kind'] == kind)
            assert rows[name, what]['n'] == str(count) and float(rows[name, what]['value']) == pytest.approx(right / count)
            assert right == count or name in ('bob', 'dan')
    m = json.loads((study / 'metrics.json').read_text())['metrics']
    assert [(m[g]['fake'], m[g]['floor']) for g in GRADES] == [(1, 5), (2, 4), (1, 3), (2, 2)]


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes(study, made, phantom, cache, tmp_path, capsys):
    """One line each, and code 2."""
    good = f'{READINGS[0]},' + ','.join(READINGS[1:]) + '\n'
    (tmp_path / 'columns.csv').write_text('reader,item\na,b\n')
    (tmp_path / 'foreign.csv').write_text(good + 'a,0,000000000000,0,real,1,5,\n')
    item = next(r['item'] for r in read_csv(study / 'key.csv') if r['kind'] == 'real')
    (tmp_path / 'value.csv').write_text(good + f'a,0,{item},0,yes,1,5,\n')
    plan, run = f'plan --fake {made} --data {phantom} --cache {cache}', lambda flags: evaluate.main(evaluate.get_args(['readers', *flags.split()]))
    cases = [('', 'required step'), (f'plan --out {tmp_path}/x', '--fake required'), (f'plan --fake {made} --out {tmp_path}/x', '--data required'), (f'{plan} --out {study}', 'holds a study already'),
             (f'{plan} --n 5 --out {tmp_path}/x', '--n 5 even'), (f'{plan} --n 0 --pairs 0 --likert 0 --out {tmp_path}/x', 'not all 0'),
             (f'{plan} --n 60 --out {tmp_path}/x', 'need 143 there are 20 and 15 ask for fewer'), (f'page --reader a --out {tmp_path}/x', 'study.json readers plan'),
             (f'page --out {study}', '--reader NAME required'), (f'score --out {study} --reader a', '--reader readers page away'), (f'page --reader a,b --out {study}', "'a,b' name"), (f'score --out {tmp_path}/x', 'study.json readers plan'),
             (f'score --out {study}', 'answers.csv --answers FILE'), (f'score --out {study} --answers {tmp_path}/none.csv', 'none.csv'),
             *((f'score --out {study} --answers {tmp_path}/{f}.csv', w) for f, w in (('columns', 'expected columns reader,order'), ('foreign', '000000000000 not of the study'),
                                                                                     ('value', f"{item} 'yes' none of those")))]
    label = [('', '--sets --study required'), (f'--study {tmp_path}', 'study.json readers plan'), (f'--study {study} --again 0.5', '--again away'),
             (f'--study {study} --sets {phantom}', 'one of --sets --study')]
    for flags, words, f in [(*c, run) for c in cases] + [(*c, lambda v: classifier.main(classifier.get_args(['label', *v.split()]))) for c in label]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            f(flags)
        lines = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and len(lines) == 1 and all(w in lines[0] for w in words.split()), (flags, lines)
    assert not (tmp_path / 'x').exists()
