"""The labelling page: what a hostile request gets, what a kill loses (nothing), undo, repeats, and three images in a real browser."""
import base64
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import classifier
import common
from classifier import Study, border, summary
from common import CLASSES, read_csv

SCRIPT = Path(classifier.__file__)
CHROME = next((c for c in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if c), None)


class Server:
    """classifier.py label in a process of its own; ask() speaks plain sockets to it."""

    def __init__(self, phantom, cache, out, *flags):
        self.start('--sets', phantom, '--cache', cache, '--out', out, '--size', 32, *flags)

    def start(self, *flags):
        self.process = subprocess.Popen([str(c) for c in (sys.executable, SCRIPT, 'label', *flags)], stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        for line in self.process.stdout:
            if found := re.search(r'http://127.0.0.1:(\d+)/([\w-]+)/', line):
                self.port, self.token, self.url = int(found[1]), found[2], found[0]
                return
        raise AssertionError('the server did not start')

    def ask(self, path, method='GET', body=None, raw=None, **headers):
        """Status and body of one request, written by hand."""
        path = path if path.startswith('/') else f'/{self.token}/{path}'
        if body is not None and 'Content_Length' not in headers:
            headers['Content_Length'] = len(body)
        headers = {'Host': f'127.0.0.1:{self.port}', **{k.replace('_', '-'): v for k, v in headers.items()}}
        lines = [f'{method} {path} HTTP/1.1', *(f'{k}: {v}' for k, v in headers.items() if v is not None), '', '']
        with socket.create_connection(('127.0.0.1', self.port), 5) as s:
            s.sendall(raw if raw is not None else '\r\n'.join(lines).encode('latin1') + (body or b''))
            data = b''
            while part := s.recv(65536):
                data += part
        head, _, body = data.partition(b'\r\n\r\n')
        return int(head.split()[1]) if head.startswith(b'HTTP/') else 0, body                          # 0: HTTP 0.9, no status line

    def state(self, rater, at=None):
        return json.loads(self.ask(f'state?rater={rater}' + ('' if at is None else f'&at={at}'))[1])

    def answer(self, s, verdict='good', kind='', severity=''):
        a = dict(rater=s['rater'], at=s['at'], item=s['item'], verdict=verdict, seconds=1.5, severity=severity, **{'class': kind})
        return self.ask('answer', 'POST', json.dumps(a).encode())

    def stop(self, signum=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.communicate(timeout=20)[0]


@pytest.fixture(scope='module')
def server(phantom, cache, tmp_path_factory):
    s = Server(phantom, cache, tmp_path_factory.mktemp('label'), '--n', 12)
    yield s
    s.stop(signal.SIGKILL)


# -- hostile requests -------------------------------------------------------------------------------------------------


def test_only_this_machine_and_only_with_the_token(server):
    assert server.ask('')[0] == 200 and server.ask('', Host=f'localhost:{server.port}')[0] == 200
    for host in ('evil.example', f'evil.example:{server.port}', '127.0.0.1', f'127.0.0.1:{server.port + 1}', '', None):
        assert server.ask('', Host=host)[0] in (400, 403), host
    assert server.ask('answer', 'POST', b'{}', Origin='http://evil.example')[0] == 403
    for path in ('/', '/x/', f'/{server.token[:-1]}/', f'/{server.token}', f'/{server.token}x/', '/%2e%2e/', '/\u00e9/'):
        assert server.ask(path)[0] == 404, path
    ports = [line.split()[1] for line in Path('/proc/net/tcp').read_text().splitlines()[1:]] if Path('/proc/net/tcp').exists() else []
    assert {p for p in ports if p.endswith(f':{server.port:04X}') and not p.startswith('0100007F')} == set()         # listens on 127.0.0.1 alone


@pytest.mark.parametrize('path', ['../labels.csv', '../../etc/passwd', 'image/../../labels.csv', 'labels.csv', 'items.csv', 'image/', 'image/x.png',
                                  'image/%2e%2e/labels.csv', 'example/..%2f..%2flabels.csv', '/etc/passwd', 'image/\\..\\labels.csv', 'state/../labels.csv'])
def test_no_path_is_ever_opened(server, path):
    status, body = server.ask(path)
    assert status == 404 and b'rater' not in body and b'root' not in body


def test_bad_requests_change_nothing(server):
    s, good = server.state('eve'), lambda **k: json.dumps({**dict(rater='eve', at=0, item=s['item'], verdict='good', severity='', seconds=1), 'class': '', **k}).encode()
    before = sorted(server.ask('state?rater=eve')[1])
    assert server.ask('answer', 'POST', b'', Content_Length=10 ** 9)[0] == 413
    assert server.ask('answer', 'POST', b'x' * 5000)[0] == 413
    for length in ('-1', 'x', '', '1e3', '9' * 30):
        assert server.ask('answer', 'POST', b'', Content_Length=length)[0] == 411, length
    assert server.ask('answer', 'POST', good(), Transfer_Encoding='chunked')[0] == 411
    bodies = [b'', b'{', b'[]', b'3', b'null', b'\xff\xfe', b'[' * 4000, b'{}', good(rater='../x'), good(rater=3), good(rater='a,b'), good(rater=''),
              good(at=1), good(at=-1), good(at='0'), good(at=True), good(at=10 ** 9), good(item='0' * 16), good(item=None), good(item='../labels.csv'),
              good(verdict='fine'), good(verdict='bad'), good(severity=2), good(verdict='bad', severity=4), good(verdict='bad', severity=True),
              good(verdict='bad', severity=1.0), good(**{'class': 'boundary'}), good(**{'class': ['x']}), good(verdict='bad', severity=1, **{'class': 'x'}),
              good(seconds=-1), good(seconds='1'), good(seconds=float('nan')), good(seconds=1e9)]
    for body in bodies:
        assert server.ask('answer', 'POST', body)[0] == 400, body
    for method in ('PUT', 'DELETE', 'HEAD', 'OPTIONS', 'TRACE', 'CONNECT'):
        assert server.ask('answer', method)[0] == 501, method
    assert server.ask('answer')[0] == 404 and server.ask('state', 'POST', b'{}')[0] == 404
    assert server.ask('state?rater=a%2Cb')[0] == server.ask('state?rater=eve&at=x')[0] == 400
    assert server.ask('', raw=b'\x16\x03\x01\x00\x05hello\r\n\r\n')[0] in (0, 400, 505) and server.ask('', raw=b'GET\r\n\r\n')[0] in (0, 400)
    assert sorted(server.ask('state?rater=eve')[1]) == before and server.answer(s)[0] == 200                  # and it still works


def test_the_page_is_whole_and_tells_nothing(server, phantom):
    """No address outside, the six definitions, pictures without metadata, ids of equal length that hold no name."""
    page = server.ask('')[1].decode()
    assert 'http' not in page and 'src=' not in page and all(classifier.DEFINITIONS[c] in page for c in CLASSES)
    assert not any(f.name in page for f in phantom.iterdir())
    item = server.state('ann')['item']
    status, png = server.ask(f'image/{item}.png')
    kinds = re.findall(rb'(IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|tIME|pHYs)', png)
    assert status == 200 and set(kinds) == {b'IHDR', b'IDAT', b'IEND'} and re.fullmatch('[0-9a-f]{16}', item)
    assert all(server.ask(f'example/{c}.png')[0] == 200 for c in CLASSES)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_kill_between_answers_loses_nothing(phantom, cache, tmp_path):
    """Answers are there after kill -9; a line cut off half way is dropped; the order goes on where it stopped; undo, repeats."""
    s = Server(phantom, cache, tmp_path, '--n', 12, '--again', 0.25)
    now, items = s.state('ann'), []
    assert now['total'] == 15 and (now['at'], now['done']) == (0, 0)
    for k in range(3):
        items.append(now['item'])
        status, body = s.answer(now, *(('good',), ('bad', 'textural', 2), ('unsure',))[k])
        assert status == 200 and len(read_csv(tmp_path / 'labels.csv')) == k + 1                  # on disk before the next is shown
        now = json.loads(body)
        assert now['at'] == now['done'] == k + 1
    s.stop(signal.SIGKILL)
    with open(tmp_path / 'labels.csv', 'a') as f:
        f.write('ann,0123,half a li')
    s = Server(phantom, cache, tmp_path, '--n', 12, '--again', 0.25)
    assert s.state('ann') == now and len(read_csv(tmp_path / 'labels.csv')) == 3
    back = s.state('ann', now['at'] - 2)
    assert (back['item'], back['was']) == (items[1], 'bad textural 2') and s.state('ann', 99)['at'] == 3
    assert json.loads(s.answer(back, 'good')[1])['at'] == 3                                       # undone, then on with the first open one
    assert s.answer(dict(back, at=0))[0] == 400                                                   # another image than that place shows
    other = s.state('bob')
    assert (other['at'], other['total']) == (0, 15)
    while 'item' in now:
        now = json.loads(s.answer(now, 'good')[1])
    assert now['done'] == 15 and 'ann, the same image again' in now['text']
    told = s.stop(signal.SIGINT)
    rows = read_csv(tmp_path / 'labels.csv')
    assert len(rows) == 16 and Counter(r['repeat'] for r in rows) == {'0': 13, '1': 3} and tuple(rows[0]) == common.LABELS
    last = {(r['item'], r['repeat']): r['verdict'] for r in rows}
    assert last[items[1], '0'] == 'good' and 'ann: 12 images, 11 good, 0 bad, 1 unsure' in told
    key = {r['item']: r for r in read_csv(tmp_path / 'items.csv')}
    assert all(key[r['item']]['folder'] == r['folder'] and (Path(r['set']) / r['folder']).is_dir() for r in rows)


def test_orders(tmp_path):
    """Seeded per rater, every image once, a tenth twice and at least 20 other images later; some positions before it tell nothing."""
    items = {f'{i:016x}': dict(set='s', folder=str(i), outline='', size=8) for i in range(200)}
    study = Study(tmp_path, items, 0, 0.1)
    a, b = study.order('ann'), study.order('bob')
    assert a != b and a == Study(tmp_path, items, 0, 0.1).order('ann') and a != Study(tmp_path, items, 1, 0.1).order('ann')
    for order in (a, b):
        first = [i for i, r in order if not r]
        again = [i for i, r in order if r]
        assert sorted(first) == sorted(items) and len(again) == len(set(again)) == 20
        for item in again:
            assert order.index((item, 1)) - order.index((item, 0)) > 20
    assert Study(tmp_path, {'0': dict(outline='', size=8)}, 0, 1.0).order('x') == [('0', 0), ('0', 1)]


def test_border_of_a_mask():
    """The path has the perimeter's length, and nothing for an empty mask."""
    assert border(np.zeros((5, 5))) == ''
    m = np.zeros((5, 5))
    m[0, 1:3] = 1                                                        # at the image's edge
    assert sorted(border(m).split('M')[1:]) == sorted(['1 0h1', '2 0h1', '1 1h1', '2 1h1', '1 0v1', '3 0v1'])


def test_agreement_counts():
    row = lambda rater, item, verdict, repeat=0: dict(rater=rater, item=str(item), verdict=verdict, repeat=str(repeat))
    rows = [row('a', i, 'good' if i < 25 else 'bad') for i in range(50)] + [row('b', i, 'good' if i < 20 or 25 <= i < 35 else 'bad') for i in range(50)]
    assert summary(rows) == ['a: 50 images, 25 good, 25 bad, 0 unsure', 'b: 50 images, 30 good, 20 bad, 0 unsure', 'a and b: 70% alike, kappa 0.40 (50 images)']
    assert summary([]) == ['no answers yet']


# -- a real browser ---------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium over its DevTools protocol: one page, a websocket written by hand (RFC 6455)."""

    def __init__(self, folder, url):
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-port=0', f'--user-data-dir={folder}',
                 '--window-size=1366,768', '--no-first-run', 'about:blank']
        self.process, self.id = subprocess.Popen([CHROME, *flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL), 0
        file = Path(folder) / 'DevToolsActivePort'
        for _ in range(300):
            if file.exists() and file.read_text().count('\n'):
                break
            time.sleep(0.1)
        port = int(file.read_text().split()[0])
        pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json', timeout=10))
        path = next(p for p in pages if p['type'] == 'page')['webSocketDebuggerUrl'].split(str(port), 1)[1]
        self.socket = socket.create_connection(('127.0.0.1', port), 30)
        self.socket.sendall((f'GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
                             f'Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n').encode())
        self.file = self.socket.makefile('rb')
        while self.file.readline().strip():
            pass
        self.call('Page.enable')
        self.call('Page.navigate', url=url)

    def call(self, method, **params):
        self.id += 1
        data, mask = json.dumps(dict(id=self.id, method=method, params=params)).encode(), os.urandom(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b'\xfe' + struct.pack('>H', len(data))
        self.socket.sendall(b'\x81' + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:                                                      # replies and events come mixed
            message = b''
            while True:
                head, n = self.file.read(2)
                n = struct.unpack('>H', self.file.read(2))[0] if n == 126 else struct.unpack('>Q', self.file.read(8))[0] if n == 127 else n
                message += self.file.read(n)
                if head & 0x80:
                    break
            reply = json.loads(message)
            if reply.get('id') == self.id:
                assert 'error' not in reply, reply
                return reply['result']

    def run(self, script):
        return self.call('Runtime.evaluate', expression=script, returnByValue=True)['result'].get('value')

    def until(self, script, wanted=True):
        for _ in range(150):                                             # and nothing is under way
            if (got := self.run(script)) == wanted and not self.run('busy'):
                return
            time.sleep(0.1)
        raise AssertionError(f'{script} is {got!r}, not {wanted!r}')

    def press(self, *keys):
        for key in keys:
            more = dict(text=key) if len(key) == 1 else dict(text='\r') if key == 'Enter' else {}
            self.call('Input.dispatchKeyEvent', type='keyDown', key=key, **more)
            self.call('Input.dispatchKeyEvent', type='keyUp', key=key)

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot')['data']))


@pytest.mark.skipif(CHROME is None, reason='no Chromium here (Debian: apt-get install chromium)')
def test_three_images_in_a_browser(phantom, cache, tmp_path):
    """A name typed in, good, bad with class and severity, undo, unsure; outline and zoom; a dead server is told; nothing from outside."""
    s = Server(phantom, cache, tmp_path / 'out', '--n', 6)
    b = Browser(tmp_path / 'profile', s.url)
    rows = lambda: [(r['rater'], r['verdict'], r['class'], r['severity']) for r in read_csv(tmp_path / 'out/labels.csv')]
    shown, text = 'document.getElementById("img").naturalWidth', 'document.getElementById("%s").textContent'
    try:
        b.until('document.activeElement.id', 'name')
        b.press(*'dr g', 'Enter')
        b.until(shown, 32)
        b.until('[...document.images].every(i => i.complete && i.naturalWidth > 0)')
        b.press('m')
        assert b.run('document.getElementById("svg").classList.contains("gone")')
        b.press('m', '+', '+')
        assert 'scale(2.25)' in b.run('document.getElementById("stage").style.transform')
        b.press('0', 'g')
        b.until(text % 'count', '1 of 7')
        b.press('3')
        assert 'boundary: 1 slight' in b.run(text % 'say')
        b.picture(os.environ.get('LABEL_PICTURE', tmp_path / 'page.png'))
        b.press('Escape', '2', '3')
        b.until(text % 'count', '2 of 7')
        b.press('z')
        b.until(text % 'say', 'gone back; you said: bad textural 3')
        b.press('5', '1')
        b.until('s.at', 2)
        b.press('u')
        b.until(text % 'count', '3 of 7')
        assert rows() == [('dr g', 'good', '', ''), ('dr g', 'bad', 'textural', '3'), ('dr g', 'bad', 'artefact', '1'), ('dr g', 'unsure', '', '')]
        assert [u for u in b.run('performance.getEntriesByType("resource").map(e => e.name)') if not u.startswith(f'http://127.0.0.1:{s.port}/')] == []
        s.stop(signal.SIGKILL)
        b.press('g')
        b.until(f'{text % "say"}.startsWith("NOT saved")')
        assert len(rows()) == 4
    finally:
        b.process.kill()
        b.process.wait()
        s.stop(signal.SIGKILL)
