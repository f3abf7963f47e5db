"Official weights from the server to the finished video, and all that can go wrong on the way"
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from official import FULL_VAE, FULL_WHISPER, Hub, agree, manifest, recipe, write_official

from musetalk import models
from musetalk.bench import peak_megabytes
from musetalk.core import BundleError, MediaError, read_json, save_image, sha256_file, write_json
from musetalk.crop import crop_face
from musetalk.dataset import FaceClips, FaceLessons
from musetalk.dub import dub
from musetalk.losses import load_vgg19
from musetalk.media import VideoSource
from musetalk.models import FILES, chosen_files, download, file_state, list_models, models_folder
from musetalk.official import OFFICIAL_UNET, find_official, is_official, load_official, load_official_vae, load_unet, read_weights
from musetalk.parity import recipe_input
from musetalk.parsing import load_parser
from musetalk.sound import write_audio
from musetalk.syncnet import load_syncnet
from musetalk.windows import positional_encoding

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def shelf(tmp_path_factory): return write_official(tmp_path_factory.mktemp('shelf'))


@pytest.fixture(scope='module')
def files(shelf): return manifest(shelf)


@pytest.fixture
def hub(shelf, files, monkeypatch):
    monkeypatch.setattr(models, 'PAUSE', 0.)
    hub = Hub(shelf, files)
    yield hub
    hub.close()


def own(path, **changes): return replace(next(file for file in FILES if file.path == path), **changes)


# Download

def test_all_versions_arrive_whole(shelf, files, hub, tmp_path):
    states = download('v1.5', 'v1.0', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)
    assert len(states) == 9 and {state.state for state in states} == {'whole'}
    for file in files: assert (tmp_path/'models'/file.path).read_bytes() == (shelf/file.path).read_bytes()
    assert not list((tmp_path/'models').rglob('*.partial'))
    asked = len(hub.log)
    download('v1.5', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)
    assert len(hub.log) == asked


def test_goes_on_where_the_line_broke(shelf, files, hub, tmp_path):
    hub.cut = 300_000
    download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)
    starts = [start for path, start in hub.log if path.endswith('unet.pth')]
    assert len(starts) > 2 and starts == sorted(starts) and sha256_file(tmp_path/'musetalkV15/unet.pth') == sha256_file(shelf/'musetalkV15/unet.pth')


def test_killed_process_is_continued(shelf, files, hub, tmp_path):
    "A real process, killed in the middle of a file, leaves no file under its final name, and the next run asks for the rest only"
    slow = f'''
import json, sys
from musetalk import models
closing = models._closing
def slowly(source, pieces):
    import time
    for piece in closing(source, pieces): time.sleep(.05); yield piece
models._closing = slowly
files = tuple(models.ModelFile(*row) for row in json.loads(sys.argv[1]))
models.download('v1.5', folder={str(tmp_path)!r}, mirror={hub.address!r}, files=files, shown=False)
'''
    rows = json.dumps([[getattr(file, name) for name in file.__dataclass_fields__] for file in files if 'unet' in file.path])
    process = subprocess.Popen([sys.executable, '-c', slow, rows], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)})
    partial = tmp_path/'musetalkV15/.unet.pth.partial'
    for _ in range(1200):
        if partial.exists() and partial.stat().st_size > 200_000: break
        time.sleep(.05)
    process.kill()
    process.wait()
    left = partial.stat().st_size
    assert left > 200_000 and not (tmp_path/'musetalkV15/unet.pth').exists()
    hub.log.clear()
    download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)
    assert left in [start for path, start in hub.log if path.endswith('unet.pth')]
    assert sha256_file(tmp_path/'musetalkV15/unet.pth') == sha256_file(shelf/'musetalkV15/unet.pth')


@pytest.mark.parametrize('status', [403, 404, 429, 500, 503])
def test_status_is_told(files, hub, tmp_path, status):
    hub.status = status
    with pytest.raises(BundleError, match=f'could not be had .*answered {status}.*: check the network, give --mirror'): download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)


def test_no_network(files, tmp_path, monkeypatch):
    monkeypatch.setattr(models, 'PAUSE', 0.)
    with pytest.raises(BundleError, match='no connection to 127.0.0.1:9; no connection.*check the network, give --mirror URL, or put the file there by hand'):
        download('v1.5', folder=tmp_path, mirror='http://127.0.0.1:9', files=files, shown=False)
    with pytest.raises(BundleError, match='no connection to nowhere.invalid'): download('v1.5', folder=tmp_path, mirror='http://nowhere.invalid', files=files[:1], shown=False)
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name != '.download.lock']


def test_wrong_hash_is_named_and_thrown_away(shelf, files, hub, tmp_path):
    lying = tuple(replace(file, sha256='0'*64) if file.path.endswith('unet.pth') else file for file in files)
    with pytest.raises(BundleError, match='is not musetalkV15/unet.pth .it has SHA-256 .*not 000000'): download('v1.5', folder=tmp_path, mirror=hub.address, files=lying, shown=False)
    assert not list((tmp_path/'musetalkV15').glob('*unet*')) and file_state(files[-1], tmp_path).state == 'whole' # the others came


def test_server_that_is_short_of_bytes(files, hub, tmp_path):
    longer = tuple(replace(file, bytes=file.bytes + 1) for file in files if file.path.endswith('unet.pth'))
    with pytest.raises(BundleError, match='bytes, not'): download('v1.5', folder=tmp_path, mirror=hub.address, files=longer, shown=False)


def test_unknown_hash_is_recorded_then_enforced(shelf, files, hub, tmp_path):
    unknown = tuple(replace(file, bytes=None, sha256=None) for file in files if file.path == 'musetalk/pytorch_model.bin')
    download('v1.0', folder=tmp_path, mirror=hub.address, files=unknown, shown=False)
    assert read_json(tmp_path/'downloads.json')['musetalk/pytorch_model.bin']['sha256'] == sha256_file(shelf/'musetalk/pytorch_model.bin')
    (tmp_path/'musetalk/pytorch_model.bin').unlink()
    changed = tmp_path/'shelf/musetalk/pytorch_model.bin'
    changed.parent.mkdir(parents=True)
    body = (shelf/'musetalk/pytorch_model.bin').read_bytes()
    changed.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(BundleError, match='SHA-256'): download('v1.0', folder=tmp_path, mirror=str(tmp_path/'shelf'), files=unknown, shown=False)


def test_full_disk_before_and_during(files, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(BundleError, match='GB left and needs'): download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)
    monkeypatch.undo()
    monkeypatch.setattr(models, '_closing', lambda source, pieces: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(MediaError, match='the disk is full'): download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)
    assert not [path for path in tmp_path.rglob('*.*') if path.suffix in ('.pth', '.bin', '.json')]
    monkeypatch.undo()
    assert {state.state for state in download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)} == {'whole'}


READ_ONLY = """
import os, sys
from musetalk.core import MuseTalkError
from musetalk.models import download
if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
try: download('v1.5', folder=sys.argv[1], mirror=sys.argv[2], shown=False)
except MuseTalkError as error: print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.name == 'nt', reason='Windows has other rights')
def test_read_only_folder(hub):
    "By somebody without the right to write, also where the tests are run by the superuser"
    folder = Path(tempfile.mkdtemp())
    (folder/'models').mkdir()
    for place in (folder/'models', folder): place.chmod(0o555)
    try: said = subprocess.run([sys.executable, '-c', READ_ONLY, folder/'models', hub.address], cwd=ROOT, capture_output=True, text=True)
    finally:
        for place in (folder, folder/'models'): place.chmod(0o700)
        shutil.rmtree(folder)
    assert re.match('MediaError .*models.* not writable', said.stdout), said
    assert not hub.log


def test_two_downloads_at_once(files, hub, tmp_path):
    with FileLock(tmp_path/'.download.lock'), pytest.raises(BundleError, match='Another download into .* is running'): download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)


def test_rest_of_something_else(shelf, files, hub, tmp_path):
    "A partial file that never was the beginning of this one is found out by its hash, and the next try begins anew"
    (tmp_path/'musetalkV15').mkdir()
    (tmp_path/'musetalkV15/.unet.pth.partial').write_bytes(b'something else')
    with pytest.raises(BundleError, match='SHA-256 .*try again'): download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)
    assert {state.state for state in download('v1.5', folder=tmp_path, mirror=hub.address, files=files, shown=False)} == {'whole'}
    assert (tmp_path/'musetalkV15/unet.pth').read_bytes() == (shelf/'musetalkV15/unet.pth').read_bytes()


def test_names_that_every_system_takes():
    "No reserved character or word, nothing that differs by case only, nothing that leaves the folder"
    paths = [name for file in FILES for name in (file.path, str(models._partial(Path(file.path)).as_posix()))] + [models.RECORD]
    assert len({path.lower() for path in paths}) == len(paths)
    for part in {part for path in paths for part in path.split('/')}:
        assert re.fullmatch(r'[A-Za-z0-9._-]+', part) and not part.endswith('.') and set(part) != {'.'}
        assert part.split('.')[0].upper() not in {'CON', 'PRN', 'AUX', 'NUL', *(f'{port}{n}' for port in ('COM', 'LPT') for n in range(10))}
    assert max(map(len, paths)) < 100


def test_folder_that_is_a_file(files, hub, tmp_path):
    (tmp_path/'models').touch()
    with pytest.raises(MediaError, match='part of its folder is a file|has that name'): download('v1.5', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)


def test_files_placed_by_hand_are_checked_and_kept(shelf, files, hub, tmp_path):
    shutil.copytree(shelf, tmp_path/'models')
    states = download('v1.5', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)
    assert not hub.log and {state.state for state in states} == {'whole'}
    (tmp_path/'models/sd-vae/config.json').write_text('{}')
    with pytest.raises(BundleError, match='sd-vae/config.json is not the official file'): download('v1.5', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)
    assert (tmp_path/'models/sd-vae/config.json').read_text() == '{}'


def test_plain_copies_serve_as_mirrors(shelf, files, tmp_path):
    "A folder, and a web server that knows neither the hub's addresses nor ranges"
    download('v1.5', folder=tmp_path/'one', mirror=str(shelf), files=files, shown=False)
    server = subprocess.Popen([sys.executable, '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1', '--directory', str(shelf)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = server.stdout.readline().split(' port ')[1].split()[0]
        (tmp_path/'two/musetalkV15').mkdir(parents=True)
        (tmp_path/'two/musetalkV15/.unet.pth.partial').write_bytes(b'old')
        states = download('v1.5', folder=tmp_path/'two', mirror=f'http://127.0.0.1:{port}', files=files, shown=False)
    finally:
        server.terminate()
        server.wait()
    assert {state.state for state in states} == {'whole'}


def test_state_words(shelf, files, tmp_path):
    assert {model.name: model.state for model in list_models(folder=tmp_path, files=files)}['v1.5'] == 'missing'
    download('v1.5', folder=tmp_path, mirror=str(shelf), files=files, shown=False)
    assert {model.name: model.state for model in list_models(folder=tmp_path, files=files)}['v1.5'] == 'whole'
    unet = tmp_path/'musetalkV15/unet.pth'
    body = bytearray(unet.read_bytes())
    body[1000] ^= 1
    unet.write_bytes(body)
    state = lambda check: next(model for model in list_models(check, tmp_path, files) if model.name == 'v1.5')
    assert state(False).state == 'unchecked' and state(True).state == 'damaged'
    assert next(file for file in state(True).files if file.state == 'damaged').problem.startswith('its SHA-256 is')
    unet.write_bytes(body[:100])
    assert state(False).state == 'damaged'
    unet.rename(tmp_path/'musetalkV15/.unet.pth.partial')
    assert state(False).state == 'incomplete'


def test_bundles_are_listed_and_checked(toy_folder, tmp_path, monkeypatch):
    shutil.copytree(toy_folder, tmp_path/'toy')
    state = lambda check: next(model for model in list_models(check, tmp_path) if model.folder == str(tmp_path/'toy'))
    assert state(True).state == 'whole' and state(True).bytes == state(True).total
    weights = tmp_path/'toy/unet/diffusion_pytorch_model.safetensors'
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    assert state(False).state == 'whole' and state(True).state == 'damaged' and 'SHA-256 differs' in state(True).about
    weights.unlink()
    assert state(False).state == 'incomplete'


def test_where_downloads_go(tmp_path, monkeypatch):
    monkeypatch.setenv('MUSETALK_MODELS', os.pathsep.join([str(tmp_path/'not yet'), str(tmp_path)]))
    assert models_folder() == tmp_path/'not yet'
    with pytest.raises(BundleError, match='choose v1.5'): chosen_files('sd-vae')


# Loading

def test_loads_as_diffusers_and_transformers_would(shelf, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import WhisperForConditionalGeneration
    monkeypatch.setenv('MUSETALK_MODELS', str(shelf))
    bundle = load_official('v1.5', 'cpu', 'fp32')
    pictures = torch.randn(1, 3, 256, 256).clamp(-1, 1)
    vae = AutoencoderKL.from_pretrained(shelf/'sd-vae', local_files_only=True, low_cpu_mem_usage=False).eval()
    with torch.no_grad(): wanted = vae.encode(pictures).latent_dist.mode()*.18215
    torch.testing.assert_close(bundle.vae.encode(pictures), wanted, atol=1e-4, rtol=1e-4)
    whisper = WhisperForConditionalGeneration.from_pretrained(shelf/'whisper', local_files_only=True).eval()
    with torch.no_grad(): states = whisper.model.encoder(torch.ones(1, 80, 3000)*.3, output_hidden_states=True).hidden_states
    ours = bundle.audio_encoder.states(torch.ones(1, 80, 3000)*.3, 0, 1500)
    for number in range(5): torch.testing.assert_close(ours[number], states[number][0], atol=1e-4, rtol=1e-4)
    assert bundle.positional_encoding and (bundle.left, bundle.right, bundle.crop_rule.name, bundle.crop_rule.extra_margin) == (2, 2, 'half_face', 10)


def test_versions_differ_by_their_margin(shelf, monkeypatch):
    monkeypatch.setenv('MUSETALK_MODELS', str(shelf))
    first, bare = load_official('v1', 'cpu', 'fp32'), load_official('v1.0-unnormalized', 'cpu', 'fp32')
    assert first.crop_rule.extra_margin is bare.crop_rule.extra_margin is None
    mel = torch.randn(1, 80, 3000)
    ours, theirs = (bundle.audio_encoder.states(mel, 0, 1500) for bundle in (bare, first))
    torch.testing.assert_close(bare.audio_encoder.network.layer_norm(ours[4]), theirs[4])
    assert all(torch.equal(ours[number], theirs[number]) for number in range(4)) and not torch.allclose(ours[4], theirs[4], atol=.1)
    assert find_official('V15').unet == shelf/'musetalkV15/unet.pth'
    assert is_official(shelf/'musetalk') and not is_official('mini') and not is_official(shelf/'sd-vae')


def test_own_checkpoint_of_the_original_trainer(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv('MUSETALK_MODELS', str(shelf))
    (tmp_path/'exp').mkdir()
    shutil.copy(shelf/'musetalkV15/unet.pth', tmp_path/'exp/unet-2000.pth')
    shutil.copy(shelf/'musetalkV15/musetalk.json', tmp_path/'exp')
    assert load_official(tmp_path/'exp/unet-2000.pth', 'cpu', 'fp32').crop_rule.extra_margin == 10


def test_official_unet_has_686_tensors():
    from musetalk.unet import LatentPainter
    with torch.device('meta'): network = LatentPainter(OFFICIAL_UNET).network
    assert len(network.state_dict()) == 686 and sum(tensor.numel() for tensor in network.state_dict().values()) == 849_947_844
    assert not [name for name in network.state_dict() if name not in dict(network.named_parameters())] # no buffers: nothing is left on 'meta'


@pytest.mark.parametrize('name', ['musetalkV15/unet.pth', 'sd-vae/diffusion_pytorch_model.bin', 'whisper/pytorch_model.bin'])
@pytest.mark.parametrize('share', [0, .3, .98])
def test_truncated_weights_are_named(shelf, tmp_path, monkeypatch, name, share):
    shutil.copytree(shelf, tmp_path/'models')
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    body = (shelf/name).read_bytes()
    (tmp_path/'models'/name).write_bytes(body[:int(share*len(body))])
    with pytest.raises(BundleError, match=f'{Path(name).name}.* is damaged'): load_official('v1.5', 'cpu', 'fp32')


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), 'w'))


@pytest.mark.parametrize('name', ['musetalkV15/unet.pth', 'sd-vae/diffusion_pytorch_model.bin', 'whisper/pytorch_model.bin'])
@pytest.mark.parametrize('bare', [False, True])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_pickle_bombs_do_not_go_off(shelf, tmp_path, monkeypatch, name, bare):
    shutil.copytree(shelf, tmp_path/'models')
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    if bare: (tmp_path/'models'/name).write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
    else: torch.save({'conv_in.weight': Bomb(tmp_path/'boom')}, tmp_path/'models'/name)
    with pytest.raises(BundleError, match=Path(name).name): load_official('v1.5', 'cpu', 'fp32')
    assert not (tmp_path/'boom').exists()


@pytest.mark.parametrize('name,load', [('face-parse-bisent/79999_iter.pth', load_parser), ('syncnet/latentsync_syncnet.pt', load_syncnet), ('vgg19/vgg19-dcbb9e9d.pth', load_vgg19)])
@pytest.mark.parametrize('bare', [False, True])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_nor_in_other_weights(tmp_path, name, load, bare):
    (tmp_path/name).parent.mkdir()
    if bare: (tmp_path/name).write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
    else: torch.save({'conv1.weight': Bomb(tmp_path/'boom')}, tmp_path/name)
    with pytest.raises(BundleError, match=Path(name).name): load(tmp_path/name if load is not load_vgg19 else (tmp_path/name).parent)
    assert not (tmp_path/'boom').exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path/'boom'))) # it would have gone off
    assert (tmp_path/'boom').exists()


@pytest.mark.parametrize('change,sentence', [
    (dict(in_channels=32, out_channels=16), 'is the faulty file that was published for a while'), (dict(in_channels=9), 'belong to different models'),
    (dict(cross_attention_dim=64), 'is .32, 32., not .32, 64.'), (dict(layers_per_block=2), "has no 'down_blocks")])
def test_configuration_of_another_network(shelf, tmp_path, change, sentence):
    write_json(tmp_path/'musetalk.json', read_json(shelf/'musetalkV15/musetalk.json') | change)
    with pytest.raises(BundleError, match=sentence): load_unet(shelf/'musetalkV15/unet.pth', tmp_path/'musetalk.json')


def test_parts_that_do_not_belong_together(shelf, tmp_path, monkeypatch):
    shutil.copytree(shelf, tmp_path/'models')
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    shutil.rmtree(tmp_path/'models/whisper')
    with pytest.raises(BundleError, match='The folder whisper, which belongs to'): load_official('v1.5', 'cpu')
    write_official(tmp_path/'wide', whisper=dict(d_model=64, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60,
                                                 pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_target_positions=8), versions=())
    shutil.copytree(tmp_path/'wide/whisper', tmp_path/'models/whisper')
    with pytest.raises(BundleError, match='features of 64 numbers, but .* attends to 32: take whisper-tiny'): load_official('v1.5', 'cpu', 'fp32')
    (tmp_path/'models/sd-vae/diffusion_pytorch_model.bin').unlink()
    with pytest.raises(BundleError, match='lacks config.json or'): load_official_vae(tmp_path/'models/sd-vae')


def test_other_peoples_weights_are_not_ours(shelf):
    with pytest.raises(BundleError, match='no UNet of MuseTalk'): load_unet(shelf/'sd-vae/diffusion_pytorch_model.bin')
    assert set(read_weights(shelf/'musetalk/pytorch_model.bin')) == set(read_weights(shelf/'musetalkV15/unet.pth'))


def test_half_precision(shelf, monkeypatch):
    monkeypatch.setenv('MUSETALK_MODELS', str(shelf))
    exact, coarse = (load_official('v1.5', 'cpu', dtype) for dtype in ('fp32', 'bf16'))
    latents, tokens = torch.randn(2, 8, 32, 32), torch.randn(2, 50, 32)
    with torch.no_grad(): one, two = (bundle.painter.network(latents.to(bundle.dtype), 0, tokens.to(bundle.dtype)).sample.float() for bundle in (exact, coarse))
    assert coarse.painter.dtype == torch.bfloat16 and (one - two).abs().max() < .1*one.abs().max()


def test_numbers_of_the_original_program_from_crop_to_face(tmp_path, monkeypatch):
    "Golden vectors: crops, latents, positional encoding, UNet and decoder, with weights that went through the official files"
    golden = np.load(ROOT/'tests/golden/end_to_end.npz')
    meta = json.loads(str(golden['meta']))
    speech = dict(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=6, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_target_positions=8)
    vae = {name: meta['vae_config'][name] for name in ('block_out_channels', 'layers_per_block', 'norm_num_groups')}
    write_official(tmp_path/'models', meta['unet_config'], vae, speech, ('v1.5',), (meta['unet_seed'], meta['vae_seed'], 0))
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    bundle = load_official('v1.5', 'cpu', 'fp32')
    crops = np.stack([crop_face(frame[..., ::-1], box) for frame, box in zip(golden['frames_bgr'], meta['boxes'])])
    agree('end_to_end', crops[:, ::4, ::4, ::-1], golden['crops_256_sample'], 0)
    latents = bundle.encode_crops(crops)
    agree('end_to_end', latents, golden['latents_8ch'])
    tokens = torch.from_numpy(recipe_input(meta['unet_seed'], 'audio', (3, 50, 384))) + torch.as_tensor(positional_encoding(50, 384))
    order = [0, 1, 1]
    with torch.no_grad(): painted = bundle.painter(latents[order], tokens)
    agree('end_to_end', painted, golden['pred_latents'])
    faces = bundle.generate(latents[order], tokens, crops[order])
    agree('end_to_end', faces[:, ::4, ::4, ::-1].astype(int), golden['faces_sample'], 1, relative=False)


# Face detection by the package face-alignment

def test_face_alignment_reads_its_files_from_the_models_folder(tmp_path, portrait, monkeypatch):
    "S3FD and FAN with weights of the recipe, in the formats and under the names of their makers"
    pytest.importorskip('face_alignment')
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN
    from musetalk.face import FaceAlignmentBackend, face_backend
    (tmp_path/'models/face-alignment').mkdir(parents=True)
    for name, network in (('s3fd-619a316812.pth', s3fd()), ('2DFAN4-11f355bf06.pth.tar', FAN(4))):
        state = network.state_dict()
        torch.save({key: value.to(state[key].dtype) for key, value in recipe(3, {key: tuple(tensor.shape) for key, tensor in state.items()}).items()}, tmp_path/'models/face-alignment'/name)
        if name.startswith('s3fd'): assert (len(state), sum(tensor.numel() for tensor in state.values())) == (65, 22_459_110)
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    monkeypatch.setenv('MUSETALK_DEVICE', 'cpu')
    backend = face_backend()
    assert isinstance(backend, FaceAlignmentBackend) and isinstance(backend.detect(portrait), list)
    landmarks, score = backend.locate(portrait, (30, 30, 130, 140))
    assert landmarks.shape == (68, 2) and landmarks.dtype == np.float32 and 0 <= score <= 1


# From the server to the video

def test_server_to_video(files, hub, tmp_path, portrait, monkeypatch):
    "Download, load, dub"
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    download('v1.5', mirror=hub.address, files=files, shown=False)
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', np.float32(.2*np.sin(np.arange(16000)/20)))
    report = dub(tmp_path/'she.png', tmp_path/'words.wav', tmp_path/'out.mp4', load_official('v1.5', 'cpu', 'fp32'), progress=False)
    assert (report.frames, report.frames_missed, report.bundle['name']) == (25, 0, 'MuseTalk 1.5')
    assert VideoSource(tmp_path/'out.mp4').frame_count == 25


@pytest.mark.skipif(not os.environ.get('RUN_SLOW'), reason='takes 10 GB and ten minutes of two cores; set RUN_SLOW=1, SLOW_SECONDS=0.4 for less, SLOW_VIDEO for other footage')
def test_full_size_from_server_to_video(tmp_path, portrait, monkeypatch):
    "The same at full size, for two seconds"
    shelf = write_official(tmp_path/'shelf', {}, FULL_VAE, FULL_WHISPER, ('v1.5',))
    files, seconds = manifest(shelf), float(os.environ.get('SLOW_SECONDS', 2))
    for name, tensors, numbers in (('musetalkV15/unet.pth', 686, 849_947_844), ('sd-vae/diffusion_pytorch_model.bin', 248, 83_653_863)):
        weights = read_weights(shelf/name)
        assert (len(weights), sum(tensor.numel() for tensor in weights.values())) == (tensors, numbers)
        del weights
    hub = Hub(shelf, files)
    hub.cut = 1_500_000_000
    try: states = download('v1.5', folder=tmp_path/'models', mirror=hub.address, files=files, shown=False)
    finally: hub.close()
    assert {state.state for state in states} == {'whole'} and len([path for path, _ in hub.log if path.endswith('unet.pth')]) > 2
    shutil.rmtree(shelf)
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    bundle = load_official('v1.5', 'cpu', os.environ.get('SLOW_DTYPE', 'fp32'))
    video, frames, out = os.environ.get('SLOW_VIDEO'), int(25*seconds), Path(os.environ.get('SLOW_OUT', tmp_path))
    if not video: save_image(video := tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', np.float32(.2*np.sin(np.arange(int(16000*seconds))/20)))
    begin = time.process_time()
    report = dub(video, tmp_path/'words.wav', out/'out.mp4', bundle, progress=False)
    print(json.dumps(dict(cpu_seconds=round(time.process_time() - begin), peak_gb=round(peak_megabytes()/1000, 1)) | report.stages_per_frame))
    made, source = VideoSource(out/'out.mp4'), VideoSource(video)
    assert (report.frames, report.frames_missed, made.frame_count, made.has_audio) == (frames, 0, frames, True)
    assert (made.width, made.height) == (source.width//2*2, source.height//2*2)
    (first,), (given,) = list(made.frames(0, 1)), list(source.frames(0, 1))
    changed = np.abs(first.image.astype(int) - given.image[:made.height, :made.width]).max(2) > 48
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert changed.mean() > .001 and len(rows) < .6*made.height and len(columns) < .7*made.width # noise about the mouth, and nothing else


def test_lessons_for_training_the_official_model(shelf, tmp_path, portrait, monkeypatch):
    "`musetalk preprocess --bundle v1.5`: its crop rule, five states of its speech encoder, and no listener that judges offsets"
    from musetalk.cli import main
    from musetalk.writer import VideoWriter
    monkeypatch.setenv('MUSETALK_MODELS', str(shelf))
    (tmp_path/'films').mkdir()
    write_audio(tmp_path/'words.wav', np.float32(.2*np.sin(np.arange(19200)/20)))
    with VideoWriter(tmp_path/'films/anna.mp4', 25, 320, 320, audio=tmp_path/'words.wav') as writer:
        for _ in range(30): writer.write(np.kron(portrait, np.ones((2, 2, 1), np.uint8)))
    assert main(['preprocess', '--source', str(tmp_path/'films'), '--out', str(tmp_path/'lessons'), '--bundle', 'v1.5', '--workers', '1']) == 0
    assert read_json(tmp_path/'lessons/rejected.json') == [] and read_json(tmp_path/'lessons/settings.json')['rule']['name'] == 'half_face'
    clips = FaceClips(tmp_path/'lessons')
    assert len(clips.rows) == 1 and clips.rows[0]['sound'] and 'offsets' not in clips.rows[0]
    lesson = FaceLessons(clips, frames=2)(np.random.default_rng(0))
    assert lesson['windows'].shape == (2, 10, 5, 32)


def test_face_backend_of_the_command_line(toy_folder, tmp_path, portrait, voice, monkeypatch, capsys):
    "An unknown one, and one whose file is missing; what was said holds for this command only"
    from musetalk.cli import main
    monkeypatch.delenv('MUSETALK_FACE_BACKEND', raising=False)
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', voice)
    for name, sentence in (('yolo', "unknown face backend 'yolo'"), ('dwpose', 'run `musetalk download dwpose`')):
        words = ['dub', '--video', str(tmp_path/'she.png'), '--audio', str(tmp_path/'words.wav'), '--out', str(tmp_path/'out.mp4'), '--bundle', str(toy_folder), '--face-backend', name]
        assert main(words) == 2 and sentence in capsys.readouterr().err and 'MUSETALK_FACE_BACKEND' not in os.environ
    assert not (tmp_path/'out.mp4').exists()
