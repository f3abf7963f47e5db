"""The documentation site and README.md, without Quarto and without a network.

    .venv/bin/python .ci/docs.py            build _docs and write README.md
    .venv/bin/python .ci/docs.py --check    build into a temporary folder; fail on broken links or an outdated README.md

nbdev turns the notebooks into pages with signatures and cross-links (folder `_proc`), smalldocs renders them as HTML from the same
`_quarto.yml` that Quarto would read, and formulas become MathML, which browsers draw by themselves.
Those who have Quarto can run `nbdev_docs` instead.
"""
import base64
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

NOTICE = '<!-- Made from nbs/index.ipynb by `make docs`; edit that instead. -->\n'
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg'}
KATEX = re.compile(r'<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?', re.I)
FOREIGN_FONT = re.compile(r"""@import\s+(?:url\(["']?https?:[^)]*\)|(["'])https?:.*?\1);?""")
FORMULA = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def source(cell): return ''.join(cell.get('source', ''))


def front_matter(notebook):
    "The `key: value` lines that nbdev put at the top of a processed notebook"
    first = notebook['cells'][0]
    return dict(re.findall(r'^([\w-]+): *(.*)$', source(first), re.M)) if first['cell_type'] == 'raw' else {}


# README.md

def for_github(markdown):
    "Links and pictures of a page in nbs, as seen from the folder above"
    return re.sub(r'(\]\()(?![a-z]+:|#|/)', r'\1nbs/', markdown)


def shown(output, pictures):
    "One output as markdown; a picture joins `pictures`, name to bytes"
    data = output.get('data', {})
    for kind, ending in PICTURES.items():
        if kind in data:
            name = f'nbs/images/readme-{len(pictures) + 1}.{ending}'
            pictures[name] = base64.b64decode(''.join(data[kind]))
            return f'![]({name})\n'
    if 'text/markdown' in data: return ''.join(data['text/markdown']) + '\n'
    text = ''.join(output.get('text') or data.get('text/plain', '')).rstrip()
    return '\n'.join('    ' + line for line in text.split('\n')) + '\n' if text else ''


def readme(notebook):
    "The text of README.md and its pictures, from the index notebook"
    cells, pictures = notebook['cells'], {}
    title = re.match(r'# (?P<title>.+)\n+> (?P<summary>.+)', source(cells[0]))
    parts = [f"# {title['title']}\n", NOTICE, f"> {title['summary']}\n"]
    for cell in cells[1:]:
        text = source(cell).strip()
        if not text or text.startswith('#| hide'): continue
        if cell['cell_type'] == 'markdown': parts.append(for_github(text) + '\n')
        if cell['cell_type'] != 'code': continue
        if not re.search(r'^#\| *echo: *false', text, re.M):
            parts.append('```python\n' + re.sub(r'^#\|.*\n', '', text, flags=re.M).strip() + '\n```\n')
        parts += [part for part in (shown(output, pictures) for output in cell['outputs']) if part]
    return '\n'.join(parts).replace('\n```\n\n```python\n', '\n'), pictures  # neighbouring code cells read as one


# The site

def named_as_pages(processed, root, site):
    "Copy the pages to `site` under the names nbdev links to: `00_core.ipynb` is the page `core`, in files and in every link"
    shutil.copytree(processed, site, dirs_exist_ok=True)
    pages = {path: json.loads(path.read_text(encoding='utf-8')) for path in site.rglob('*.ipynb')}
    names = {path.name: Path(front_matter(page).get('output-file', path.name)).stem + '.ipynb' for path, page in pages.items()}
    def renamed(text): return re.sub(r'[\w.-]+\.ipynb', lambda found: names.get(found[0], found[0]), text)
    for path, page in pages.items():
        for cell in page['cells']:
            if cell['cell_type'] == 'markdown': cell['source'] = renamed(source(cell))
            if cell['cell_type'] == 'raw': cell['source'] = re.sub(r'^output-file:.*\n', '', source(cell), flags=re.M)
        path.unlink()
        path.with_name(names[path.name]).write_text(json.dumps(page), encoding='utf-8')
    navigation = renamed((root/'_quarto.yml').read_text(encoding='utf-8'))
    (site/'_quarto.yml').write_text(navigation + '\nmetadata-files: [nbdev.yml]\n', encoding='utf-8')


def self_contained(pages, address):
    "Make finished pages readable from a disk without a network: formulas as MathML, no fonts from elsewhere, links within the site relative"
    def drawn(found):
        display = 'block' if found[1] == 'display' else 'inline'
        return f'<span class="math {found[1]}">{convert(html.unescape(found[2]), display=display)}</span>'
    for path in pages.rglob('*.html'):
        page = FORMULA.sub(drawn, KATEX.sub('', path.read_text(encoding='utf-8')))
        above = '../'*(len(path.relative_to(pages).parts) - 1)
        if 'rel="icon"' not in page: page = page.replace('<head>', f'<head>\n<link rel="icon" href="{above}images/icon.svg">', 1)
        path.write_text(page.replace(f'href="{address}/', f'href="{above}'), encoding='utf-8')
    for path in pages.rglob('*.css'):
        path.write_text(FOREIGN_FONT.sub('', path.read_text(encoding='utf-8')), encoding='utf-8')


def render(processed, settings, site):
    "Render the pages; returns the folder of the finished site"
    named_as_pages(processed, settings.config_path, site)
    for command in (['check'], ['render', '--quiet', '--strict']):
        subprocess.run([sys.executable, '-m', 'smalldocs.cli', *command, str(site)], check=True)
    finished = site/settings.doc_path.name
    self_contained(finished, settings.doc_host.rstrip('/') + settings.doc_baseurl.rstrip('/'))
    return finished


def main(check):
    settings = get_config()
    root, target = settings.config_path, settings.config_path/'README.md'
    text, pictures = readme(json.loads((settings.nbs_path/'index.ipynb').read_text(encoding='utf-8')))
    if check and (not target.exists() or target.read_text(encoding='utf-8') != text):
        sys.exit('README.md is not what nbs/index.ipynb says; run: make docs')
    refresh_quarto_yml()
    if not check: _build_modidx()
    processed = proc_nbs(force=True, n_workers=2)
    if not check:
        target.write_text(text, encoding='utf-8')
        for name, data in pictures.items(): (root/name).write_bytes(data)
    with tempfile.TemporaryDirectory() as scratch:
        try: finished = render(processed, settings, Path(scratch))
        except subprocess.CalledProcessError as error: sys.exit(f'The documentation has faults (listed above): {error}')
        count = len(list(finished.rglob('*.html')))
        if not check:
            shutil.rmtree(settings.doc_path, ignore_errors=True)
            shutil.move(finished, settings.doc_path)
    print(f'{count} pages without a broken link' + ('' if check else f', in {settings.doc_path.name}; README.md written'))


if __name__ == '__main__': main('--check' in sys.argv[1:])
