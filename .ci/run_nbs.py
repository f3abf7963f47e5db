"""Run notebooks where they are and keep what their cells show.

    .venv/bin/python .ci/run_nbs.py [NOTEBOOK ...]          all of them without arguments
    .venv/bin/python .ci/run_nbs.py --shrink NOTEBOOK ...   only make stored pictures smaller

Cells that `nbdev_test` skips (flags of settings.ini, `eval: false`) are skipped here too, and keep the outputs they have:
that is how a figure made on a large machine stays on the page. Cells marked `#| measured` are run, but keep what they
show as long as only numbers changed, for those are times of this machine at this moment. Warnings, progress bars and widget state are dropped,
and the notebook is cleaned, so that running twice changes nothing. A notebook that fails is left as it was.
"""
import base64
import io
import re
import subprocess
import sys
from pathlib import Path
from PIL import Image
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

WIDGET_VIEW = 'application/vnd.jupyter.widget-view+json'
LARGE = 12_000  # characters of a PNG that is worth the trouble


def skipped_cells(path, flags):
    "Indices of the code cells that stay as they are"
    skipped = set()
    for cell in NBProcessor(path, process=True).nb.cells:
        if cell.cell_type != 'code': continue
        directives = cell.directives_
        not_evaluated = directives.get('eval:', [''])[0].lower() == 'false'
        if not_evaluated or flags & directives.keys() or 'nbdev_export(' in cell.source: skipped.add(cell.idx_)
    return skipped


def lasting(output):
    "Whether an output belongs in the repository"
    if output.get('name') == 'stderr': return False
    if output.output_type == 'stream': return bool(''.join(output.text).strip())
    output.get('data', {}).pop(WIDGET_VIEW, None)
    return output.output_type not in ('display_data', 'execute_result') or bool(output.data)


def words(outputs):
    "What outputs say, but for the numbers"
    return [re.sub(r'[\d.,]+', '0', ''.join(output.get('text', [])) + ''.join(output.get('data', {}).get('text/plain', []))) for output in outputs]


def encoded(picture, kind, **options):
    "A picture as text for a notebook"
    picture.save(buffer := io.BytesIO(), kind, optimize=True, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def smaller(output):
    "Keep a PNG with 64 colours, which is enough for curves, or as a JPEG, if that takes less than two thirds of the room"
    data = output.get('data', {})
    png = ''.join(data.get('image/png', ''))
    if len(png) < LARGE: return output
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == 'P': return output
    picture = picture.convert('RGB')
    kind, text = min((('image/jpeg', encoded(picture, 'jpeg', quality=82)), ('image/png', encoded(picture.quantize(64, dither=Image.Dither.NONE), 'png'))), key=lambda pair: len(pair[1]))
    if len(text) < len(png)*2/3:
        del data['image/png']
        data[kind] = text
    return output


def refresh(
    path,  # The notebook
    flags,  # Directives whose cells are not run, such as {'slow', 'cuda'}
):
    "Run one notebook in place. Raises what the failing cell raises; the file is then unchanged"
    path = Path(path).absolute()
    skipped = skipped_cells(path, set(flags))
    notebook, stored = read_nb(path), read_nb(path).cells
    shell = CaptureShell(path)
    with working_directory(path.parent):
        shell.run_all(notebook, exc_stop=True, preproc=lambda cell: cell.cell_type != 'code' or cell.idx_ in skipped)
    for cell in notebook.cells:
        if cell.cell_type != 'code' or cell.idx_ in skipped: continue
        cell.outputs = [smaller(output) for output in cell.outputs if lasting(output)]
        before = stored[cell.idx_].outputs
        if '#| measured' in cell.source and words(before) == words(cell.outputs): cell.outputs = before
    notebook.metadata.pop('widgets', None)
    clean_nb(notebook, clean_ids=True)
    write_nb(notebook, path)


def shrink(path):
    "Do that to the outputs a notebook has"
    notebook = read_nb(path)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs = [smaller(output) for output in cell.outputs]
    write_nb(notebook, path)


def main():
    settings = get_config()
    if sys.argv[1:2] == ['--shrink']: return [shrink(Path(name)) for name in sys.argv[2:]]
    sys.path.insert(0, str(settings.config_path))
    paths = [Path(name) for name in sys.argv[1:]] or sorted(settings.nbs_path.glob('[!_.]*.ipynb'))
    if len(paths) == 1: return refresh(paths[0], settings.tst_flags.split())
    failed = [path.name for path in paths if subprocess.run([sys.executable, __file__, str(path)]).returncode]
    if failed: sys.exit('Failed: ' + ', '.join(failed))


if __name__ == '__main__': main()
