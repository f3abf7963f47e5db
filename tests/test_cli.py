"The command line as a user meets it: words in, files, sentences and exit statuses out"
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import musetalk
from musetalk.cli import COMMANDS, main
from musetalk.speak import speak
from musetalk.core import ConfigError, save_image, sha256_file
from musetalk.media import VideoSource
from musetalk.models import FILES
from musetalk.sound import load_audio, write_audio

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path, portrait, voice, toy_folder, monkeypatch):
    "A folder with a picture and a sound, which is the working directory"
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', voice)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MUSETALK_MODELS', str(toy_folder.parent))
    return tmp_path


@pytest.fixture
def hibari(monkeypatch):
    "A stand-in for the voice"
    module = types.ModuleType('hibari')
    class Hibari:
        def __call__(self, text, speed=1., seed=0): return np.float32(.2*np.sin(np.arange(int(2400*len(text)/speed))/9))
    module.Hibari = Hibari
    monkeypatch.setitem(sys.modules, 'hibari', module)


def run(*words, capsys):
    "Exit status, what was printed, what was complained"
    try: status = main([str(word) for word in words])
    except SystemExit as leaving: status = leaving.code
    return status, *capsys.readouterr()


def test_help_and_version(capsys):
    status, printed, _ = run('--help', capsys=capsys)
    assert status == 0 and 'examples:' in printed and all(f'\n    {name} ' in printed for name in COMMANDS)
    assert run('--version', capsys=capsys)[1].strip() == f'musetalk {musetalk.__version__}'
    for name in COMMANDS: assert 'examples:' in run(name, '--help', capsys=capsys)[1]


def test_help_is_quick():
    code = 'import sys, musetalk.cli as cli; cli.build_parser().format_help(); print(sorted({"torch", "cv2", "av", "yaml"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_dub(place, capsys):
    status, printed, complaints = run('dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'toy', '--fps', '30', '--no-progress', capsys=capsys)
    assert status == 0 and printed.startswith('results/she_words.mp4: 15 frames, 0.50 s at 30 fps') and not complaints
    assert VideoSource('results/she_words.mp4').frame_count == 15 and Path('results/she_words.json').exists()


def test_dub_json(place, capsys):
    status, printed, _ = run('dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'toy', '--out', 'a.mp4', '--json', '--crf', 30, '--loop', 'hold', capsys=capsys)
    report = json.loads(printed)
    assert status == 0 and report['settings']['crf'] == 30 and report['settings']['loop'] == 'hold'
    assert report == json.loads(Path('a.json').read_text())
    assert set(report['stages']) >= {'decode', 'face', 'encode', 'audio', 'generate', 'blend', 'write'} and report['bundle']['name'] == 'toy'


def test_dub_text(place, capsys, hibari):
    status, printed, _ = run('dub', '--video', 'she.png', '--text', 'Hello', '--bundle', 'toy', capsys=capsys)
    assert status == 0 and VideoSource('results/she_text.mp4').frame_count == 12


def test_text_without_a_voice(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'hibari', None)
    status, printed, complaint = run('dub', '--video', 'she.png', '--text', 'Hello', '--bundle', 'toy', capsys=capsys)
    assert status == 2 and "pip install 'musetalk[tts]'" in complaint


def test_speak(tmp_path, hibari):
    speak('Hello', tmp_path/'a.wav', speed=2)
    assert len(load_audio(tmp_path/'a.wav')) == 4000
    with pytest.raises(ConfigError, match='no text'): speak('  ', tmp_path/'b.wav')


def test_preview(place, capsys):
    status, printed, _ = run('preview', '--video', 'she.png', '--bundle', 'toy', '--bbox-shift', -4, capsys=capsys)
    assert status == 0 and 'results/she_preview.jpg: crop box' in printed and 'sensible values of --bbox-shift' in printed
    status, printed, _ = run('dub', '--preview', '--video', 'she.png', '--audio', 'words.wav', '--out', 'x.mp4', '--bundle', 'toy', '--json', capsys=capsys)
    assert status == 0 and json.loads(printed)['preview'] == 'x.jpg' and Path('x.jpg').exists() and not Path('x.mp4').exists()


def test_info(place, capsys):
    assert json.loads(run('info', 'she.png', '--json', capsys=capsys)[1])['width'] == 160
    assert 'audio seconds 0.5' in run('info', 'words.wav', capsys=capsys)[1]


def test_demo(place, capsys, hibari):
    status, printed, complaint = run('demo', '--bundle', 'toy', '--text', 'Hi', '--out', 'out/demo.mp4', capsys=capsys)
    assert status == 0 and 'out/demo.mp4' in printed and 'out/demo.jpg' in printed, complaint
    assert Path('out/demo.jpg').exists() and VideoSource('out/demo.mp4').has_audio


def test_tasks(place, capsys):
    Path('tasks.yaml').write_text('a: {video_path: she.png, audio_path: words.wav}\nb: {video_path: gone.png, audio_path: words.wav}\n')
    status, printed, _ = run('dub', '--tasks', 'tasks.yaml', '--bundle', 'toy', '--no-progress', capsys=capsys)
    assert status == 1 and 'b: FAILED: gone.png does not exist' in printed and '1 of 2 tasks done' in printed
    Path('tasks.yaml').write_text('a: {video_path: she.png, audio_path: words.wav, shift: 3}\n')
    status, _, complaint = run('dub', '--tasks', 'tasks.yaml', '--bundle', 'toy', capsys=capsys)
    assert status == 2 and "unknown key 'shift'; known are" in complaint


@pytest.mark.parametrize('words,sentence', [
    (['dub'], 'There is no footage'), (['dub', '--video', 'she.png'], 'There is nothing to say'), (['info', 'gone.mp4'], 'gone.mp4 does not exist'),
    (['dub', '--video', 'she.png', '--audio', 'words.wav', '--text', 'Hi'], 'choose one'), (['dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'maxi'], "no bundle 'maxi'"),
    (['dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'toy', '--device', 'abacus'], "Unknown device 'abacus'"),
    (['dub', '--video', 'she.png', '--audio', 'words.wav', '--face', 'left'], "Unknown face 'left'"), (['preview'], 'There is no footage'),
    (['dub', '--tasks', 'gone.yaml'], 'Cannot read gone.yaml'), (['dub', '--video', 'she.png', '--audio', 'words.wav', '--fps', '0'], 'out of range')])
def test_mistakes(place, capsys, words, sentence):
    status, _, complaint = run(*words, capsys=capsys)
    assert status == 2 and complaint.startswith('musetalk: ') and sentence in complaint and complaint.count('\n') == 1


def test_wrong_usage_is_argparse_business(capsys):
    for words in ([], ['fly'], ['dub', '--crf', 'much']): assert run(*words, capsys=capsys)[0] == 2


def test_bench(place, capsys):
    status, printed, complaint = run('bench', 'dub', '--bundle', 'toy', '--video', 'she.png', '--audio', 'words.wav', '--seconds', 1, '--json', '--save', 'figures.json', capsys=capsys)
    figures = json.loads(printed)
    assert status == 0 and figures['frames'] == 25 and set(figures['milliseconds_per_frame']) >= {'clock', 'face', 'generate', 'write'}, complaint
    assert json.loads(Path('figures.json').read_text())['command'] == 'musetalk bench dub --bundle toy --video she.png --audio words.wav --seconds 1 --json'


def test_bench_memory(place, capsys):
    status, printed, complaint = run('bench', 'memory', '--bundle', 'toy', '--video', 'she.png', '--audio', 'words.wav', '--lengths', 1, 2, '--json', capsys=capsys)
    assert status == 0, complaint
    figures = json.loads(printed)
    assert [run['frames'] for run in figures['runs']] == [25, 50] and abs(figures['growth']) < .1


@pytest.fixture
def shelf(tmp_path_factory, monkeypatch):
    "Official files of no size, a server that shows them, and a manifest that knows them"
    from official import Hub, manifest, write_official
    from musetalk import models
    folder = write_official(tmp_path_factory.mktemp('shelf'))
    hub = Hub(folder, manifest(folder))
    monkeypatch.setattr(models, 'FILES', manifest(folder))
    monkeypatch.setattr(models.download, '__kwdefaults__', models.download.__kwdefaults__ | dict(files=manifest(folder)))
    monkeypatch.setattr(models, 'PAUSE', 0.)
    yield hub
    hub.close()


def test_download_and_models(tmp_path, shelf, capsys, monkeypatch):
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'mine'))
    status, printed, complaint = run('download', 'v1.5', 'v1.0', '--mirror', shelf.address, '--no-progress', capsys=capsys)
    assert status == 0 and printed.count(' whole\n') == 9 and '9 files are in' in printed, complaint
    status, printed, _ = run('download', '--json', '--dir', tmp_path/'mine', capsys=capsys)
    assert status == 0 and {state['state'] for state in json.loads(printed)} == {'whole'}
    (tmp_path/'mine/sd-vae/config.json').write_text('{}')
    status, _, complaint = run('download', 'v1.5', capsys=capsys)
    assert status == 2 and 'sd-vae/config.json is not the official file' in complaint and complaint.count('\n') == 1


def test_small_autoencoder(tmp_path, shelf, portrait, capsys, monkeypatch):
    "Fetched by its group, asked for by options, gone with the command; and every way it can be missing"
    import torch
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file
    from musetalk import models
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'mine'))
    for part in ('ENCODER', 'DECODER'): monkeypatch.delenv(f'MUSETALK_{part}', raising=False)
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', np.float32(.2*np.sin(np.arange(3200)/20)))
    assert run('download', 'v1.5', '--mirror', shelf.address, '--no-progress', capsys=capsys)[0] == 0
    words = 'dub', '--video', tmp_path/'she.png', '--audio', tmp_path/'words.wav', '--device', 'cpu', '--dtype', 'fp32', '--crf', 0, '--bundle'
    status, _, complaint = run(*words, 'v1.5', '--small-decoder', '--out', tmp_path/'none.mp4', capsys=capsys)
    assert status == 2 and 'run `musetalk download small`' in complaint and complaint.count('\n') == 1 and not (tmp_path/'none.mp4').exists()
    status, _, complaint = run(*words, 'mini', '--small-decoder', '--out', tmp_path/'none.mp4', capsys=capsys)
    assert status == 2 and 'reads the 4 latent channels of Stable Diffusion' in complaint and complaint.count('\n') == 1
    name = 'taesd/diffusion_pytorch_model.safetensors'
    (tmp_path/'stick/taesd').mkdir(parents=True)
    torch.manual_seed(0)
    save_file(AutoencoderTiny().state_dict(), tmp_path/'stick'/name)
    (known,) = (replace(file, bytes=(tmp_path/'stick'/name).stat().st_size, sha256=sha256_file(tmp_path/'stick'/name)) for file in FILES if file.path == name)
    monkeypatch.setattr(models.download, '__kwdefaults__', models.download.__kwdefaults__ | dict(files=(known,)))
    status, printed, _ = run('download', 'small', '--mirror', tmp_path/'stick', '--no-progress', capsys=capsys)
    assert status == 0 and printed.startswith(name) and printed.count(' whole\n') == 1
    file = tmp_path/'mine'/name
    for name, option in (('own', ()), ('small', ('--small-decoder',)), ('both', ('--small-decoder', '--small-encoder'))):
        status, _, complaint = run(*words, 'v1.5', *option, '--out', tmp_path/f'{name}.mp4', capsys=capsys)
        assert status == 0 and not {'MUSETALK_DECODER', 'MUSETALK_ENCODER'} & set(os.environ), complaint
    own, small, both = (next(VideoSource(tmp_path/f'{name}.mp4').frames(0, 1)).image.astype(int) for name in ('own', 'small', 'both'))
    for one, other, least in ((own, small, 8), (small, both, 4)): assert np.abs(one - other).max() > least and not np.abs(one - other)[:own.shape[0]//3].any() # another mouth, and nothing else
    facts = [json.loads((tmp_path/f'{name}.json').read_text())['bundle'] for name in ('own', 'small', 'both')]
    assert [(fact['encoder'], fact['decoder']) for fact in facts] == [('own', 'own'), ('own', 'small'), ('small', 'small')]
    file.write_bytes(file.read_bytes()[:1000])
    status, _, complaint = run(*words, 'v1.5', '--small-decoder', '--out', tmp_path/'none.mp4', capsys=capsys)
    assert status == 2 and 'is damaged' in complaint and complaint.count('\n') == 1


def test_an_export_runs_a_dub(tmp_path, portrait, capsys):
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', np.float32(.2*np.sin(np.arange(3200)/20)))
    assert run('export', '--output', tmp_path/'mini-onnx', '--frames', 2, capsys=capsys)[0] == 0
    words = 'dub', '--video', tmp_path/'she.png', '--audio', tmp_path/'words.wav', '--device', 'cpu', '--dtype', 'fp32', '--runtime'
    for runtime, ran in ((tmp_path/'mini-onnx', 'onnxruntime'), ('torch', 'torch')):
        status, _, complaint = run(*words, runtime, '--out', tmp_path/f'{ran}.mp4', capsys=capsys)
        assert status == 0 and json.loads((tmp_path/f'{ran}.json').read_text())['bundle']['runtime'] == ran, complaint
    one, other = (next(VideoSource(tmp_path/f'{ran}.mp4').frames(3, 4)).image.astype(int) for ran in ('onnxruntime', 'torch'))
    assert np.abs(one - other).mean() < .5
    (tmp_path/'mini-onnx/paint.onnx').unlink()
    for runtime, sentence in ((tmp_path/'mini-onnx', 'paint.onnx is missing'), (tmp_path, "Unknown runtime"), ('tensorflow', 'use torch, openvino, or a folder that `musetalk export` wrote')):
        status, _, complaint = run(*words, runtime, '--out', tmp_path/'none.mp4', capsys=capsys)
        assert status == 2 and sentence in complaint and complaint.count('\n') == 1 and not (tmp_path/'none.mp4').exists()


@pytest.mark.parametrize('words,sentence', [(['v2'], "under the name 'v2': choose v1.5"), (['v1.5', '--mirror', 'http://127.0.0.1:9'], 'no connection to 127.0.0.1:9'), (['--workers', '0'], '--workers is 0')])
def test_download_mistakes(tmp_path, shelf, capsys, words, sentence):
    status, _, complaint = run('download', *words, '--dir', tmp_path/'mine', '--no-progress', capsys=capsys)
    assert status == 2 and sentence in complaint.splitlines()[-1]


def test_models_tells_and_checks(tmp_path, toy_folder, capsys):
    import shutil
    shutil.copytree(toy_folder, tmp_path/'models/toy')
    status, printed, _ = run('models', '--dir', tmp_path/'models', '--json', capsys=capsys)
    found = {model['name']: model for model in json.loads(printed)}
    assert status == 0 and found['toy']['state'] == 'whole' and found['v1.5']['state'] == 'missing' and found['v1.5']['total'] > 3.9e9
    config = tmp_path/'models/toy/vae/config.json'
    config.write_text(config.read_text().replace('24', '25', 1))
    status, printed, _ = run('models', '--dir', tmp_path/'models', '--check', capsys=capsys)
    assert status == 1 and 'SHA-256 differs' in printed and 'v1.0' in printed


def test_number_format_is_for_one_command_only(place, capsys, monkeypatch):
    monkeypatch.delenv('MUSETALK_DTYPE', raising=False)
    status, printed, _ = run('dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'toy', '--dtype', 'fp32', '--json', capsys=capsys)
    assert status == 0 and json.loads(printed)['bundle']['dtype'] == 'float32' and 'MUSETALK_DTYPE' not in os.environ
    status, _, complaint = run('dub', '--video', 'she.png', '--audio', 'words.wav', '--bundle', 'toy', '--dtype', 'fp7', capsys=capsys)
    assert status == 2 and "Unknown number format 'fp7'" in complaint


def test_config_is_the_other_name_of_tasks(place, capsys):
    Path('tasks.yaml').write_text('a: {video_path: she.png, audio_path: words.wav, bbox_shift: -7, result_name: shifted.mp4}\n')
    status, printed, complaint = run('dub', '--config', 'tasks.yaml', '--result-dir', 'out', '--bundle', 'toy', '--no-progress', capsys=capsys)
    assert status == 0 and Path('out/shifted.mp4').exists(), complaint
