"""Headless Chromium, driven through its DevTools protocol: what tests of pages, widgets and the app share.

    with Browser() as browser:
        browser.open(address, "document.querySelector('button')")
        browser.type('input', 'words')
        browser.click('button')
        browser.wait("document.body.innerText.includes('done')")
        browser.look(folder/'page.png', 390)
        assert not browser.errors and not browser.outgoing()
"""
import base64
import http.client
import json
import shutil
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit
import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
PATIENCE = 60 # seconds, for machines that have much else to do
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update --disable-sync --disable-extensions '
         '--no-first-run --mute-audio --autoplay-policy=no-user-gesture-required --use-fake-ui-for-media-stream --use-fake-device-for-media-stream --hide-scrollbars')

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed')


def wait_for(true, seconds=PATIENCE, pause=.05, what=None):
    "Wait until `true()` is; gives what it gave"
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f'{seconds} s have passed without: {what or true}'
        time.sleep(pause)
    return found


class Browser:
    "One page in a browser of its own; selectors are those of CSS"
    def __init__(self, width=1280, height=900, flags=''):
        connect = pytest.importorskip('websockets.sync.client', reason="needs the extra: pip install 'musetalk[serve]'").connect
        self.width, self.height, self.numbers = width, height, count(1)
        self.errors, self.requests, self.events = [], [], [] # of the page: what its console complains about, all addresses, files that it asks for
        self.profile = tempfile.TemporaryDirectory(prefix='browser-', ignore_cleanup_errors=True)
        port = Path(self.profile.name)/'DevToolsActivePort'
        self.process = subprocess.Popen([CHROMIUM, *FLAGS.split(), *flags.split(), f'--window-size={width},{height}', '--remote-debugging-port=0', f'--user-data-dir={self.profile.name}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: port.exists() and len(port.read_text().split()) == 2, what='a browser')
            connection = http.client.HTTPConnection('127.0.0.1', int(port.read_text().split()[0]), timeout=PATIENCE)
            connection.request('GET', '/json/list')
            page = next(target for target in json.loads(connection.getresponse().read()) if target['type'] == 'page')
            self.opened = connect(page['webSocketDebuggerUrl'], max_size=None, open_timeout=PATIENCE)
            self.line = self.opened.__enter__()
            for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM'): self.do(f'{domain}.enable')
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self): return self

    def __exit__(self, *problem): self.close()

    def close(self):
        if hasattr(self, 'line'): self.opened.__exit__(None, None, None)
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        self.profile.cleanup()

    def do(self, method, **parameters):
        "One command of the protocol and its answer; what happens meanwhile is noted"
        number = next(self.numbers)
        self.line.send(json.dumps(dict(id=number, method=method, params=parameters)))
        while (message := json.loads(self.line.recv(PATIENCE))).get('id') != number: self._note(message)
        assert 'error' not in message, (method, message['error'])
        return message['result']

    def _note(self, message):
        kind, given = message.get('method'), message.get('params', {})
        if kind == 'Network.requestWillBeSent': self.requests.append(given['request']['url'])
        elif kind == 'Runtime.exceptionThrown': self.errors.append(given['exceptionDetails'].get('exception', {}).get('description') or given['exceptionDetails']['text'])
        elif kind == 'Runtime.consoleAPICalled' and given['type'] in ('error', 'assert'): self.errors.append(' '.join(str(part.get('value', part.get('description', ''))) for part in given['args']))
        elif kind == 'Log.entryAdded' and given['entry']['level'] == 'error': self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}".strip())
        elif kind == 'Page.fileChooserOpened': self.events.append(given)

    def outgoing(self):
        "Addresses that left this machine"
        return [url for url in self.requests if urlsplit(url).scheme not in ('data', 'blob', 'about', 'file', 'chrome') and urlsplit(url).hostname not in ('127.0.0.1', 'localhost', '::1')]

    def open(self, url, until='true', seconds=PATIENCE):
        "Go to an address and wait until the page is there, and a condition is true"
        failed = self.do('Page.navigate', url=str(url)).get('errorText')
        assert not failed, (url, failed)
        self.wait(f"document.readyState === 'complete' && location.href !== 'about:blank' && ({until})", seconds)

    def run(self, code):
        "The value of an expression in JavaScript; promises are awaited"
        result = self.do('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True, userGesture=True)
        assert 'exceptionDetails' not in result, (code, result['exceptionDetails'].get('exception', result['exceptionDetails']))
        return result['result'].get('value')

    def wait(self, code, seconds=PATIENCE): return wait_for(lambda: self.run(f'!!({code})'), seconds, .1, code)

    def text(self): return self.run('document.body.innerText')

    def _object(self, selector):
        self.wait(f'document.querySelector({json.dumps(selector)})')
        return self.do('Runtime.evaluate', expression=f'document.querySelector({json.dumps(selector)})')['result']['objectId']

    def click(self, selector):
        "Press the mouse in the middle of an element, which may lie outside the view"
        self._object(selector)
        x, y = self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2] }})()")
        for kind in ('mouseMoved', 'mousePressed', 'mouseReleased'): self.do('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='none' if kind == 'mouseMoved' else 'left', clickCount=int(kind != 'mouseMoved'))

    def key(self, name, code=None, number=13):
        "Press a key, such as `key('Enter')` or `key('Tab', number=9)`"
        for kind in ('keyDown', 'keyUp'): self.do('Input.dispatchKeyEvent', type=kind, key=name, code=code or name, windowsVirtualKeyCode=number, **(dict(text='\r') if name == 'Enter' and kind == 'keyDown' else {}))

    def type(self, selector, text, enter=True):
        "Replace the text of a field, or of the number beside a slider"
        self.click(selector)
        self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); if (e.select) e.select(); else getSelection().selectAllChildren(e) }})()")
        self.do('Input.insertText', text=str(text))
        if enter: self.key('Enter')

    def upload(self, selector, *paths):
        "Give files to a file input, or to the chooser that a click on the element opens"
        paths = [str(Path(path).resolve()) for path in paths]
        self._object(selector)
        if self.run(f"document.querySelector({json.dumps(selector)}).matches('input[type=file]')"): return self.do('DOM.setFileInputFiles', files=paths, objectId=self._object(selector))
        self.do('Page.setInterceptFileChooserDialog', enabled=True)
        self.events.clear()
        self.click(selector)
        wait_for(lambda: self.run('true') and self.events, what='a file chooser')
        self.do('DOM.setFileInputFiles', files=paths, backendNodeId=self.events[-1]['backendNodeId'])
        self.do('Page.setInterceptFileChooserDialog', enabled=False)

    def resize(self, width, height, mobile=False):
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def look(self, path=None, width=None, height=None, mobile=False):
        "A picture (PNG) of the page at some width, as high as the page unless a height is given; gives its bytes"
        self.resize(width or self.width, height or self.height, mobile)
        time.sleep(.3)
        if height is None: self.resize(width or self.width, max(self.height, self.run('Math.ceil(document.documentElement.scrollHeight)')), mobile); time.sleep(.3)
        picture = base64.b64decode(self.do('Page.captureScreenshot', format='png')['data'])
        if path is not None: Path(path).write_bytes(picture)
        self.resize(self.width, self.height)
        return picture
