"A model of no size in exactly the official layout and file formats, a web server that shows it as the hub does, and the measure of agreement with recorded numbers"
import atexit
import http.server
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import torch

from musetalk.parity import recipe_weights

OLD_ATTENTION = dict(to_q='query', to_k='key', to_v='value', **{'to_out.0': 'proj_attn'})
SMALL_UNET = dict(block_out_channels=(32, 32, 64, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4)
SMALL_VAE = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8)
SMALL_WHISPER = dict(d_model=32, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0,
                     bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_target_positions=8)
FULL_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
FULL_WHISPER = dict(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536)


GOLDEN = Path(__file__).resolve().parent/'golden'
SEEN = {} # (file, test, tolerance, relative): how far off


def golden(name):
    "Recorded arrays and their parameters"
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as file: stored = {key: file[key] for key in file.files}
    return stored, json.loads(str(stored.pop('meta')))


def agree(name, ours, theirs, tolerance=1e-4, relative=True):
    "Compare with recorded numbers; the tolerance is a share of the largest of them, or absolute. `PARITY_RECORD=file.json` keeps the largest deviation of each test"
    ours, theirs = (np.asarray(value.detach() if isinstance(value, torch.Tensor) else value) for value in (ours, theirs))
    assert ours.shape == theirs.shape, f'{name}: {ours.shape}, not {theirs.shape}'
    scale = float(np.abs(theirs).max()) if relative and tolerance else 1.
    deviation = float(np.abs(ours.astype(np.float64) - theirs).max())/scale
    key = name, os.environ.get('PYTEST_CURRENT_TEST', '').split(' ')[0].split('[')[0], float(tolerance), bool(relative and tolerance > 0)
    before, unequal = SEEN.get(key, dict(deviation=0., compared=0, unequal=0)), int((ours != theirs).sum())
    SEEN[key] = dict(deviation=max(deviation, before['deviation']), compared=before['compared'] + ours.size, unequal=before['unequal'] + unequal)
    assert deviation <= tolerance, f'{name}: off by {deviation:.3g}, {tolerance:.3g} is allowed'


def _keep_record():
    path = Path(os.environ['PARITY_RECORD'])
    named = ('file', 'test', 'tolerance', 'relative')
    rows = {tuple(row[name] for name in named): row for row in json.loads(path.read_text())} if path.exists() else {}
    rows |= {key: dict(zip(named, key)) | seen for key, seen in SEEN.items()}
    path.write_text('[\n ' + ',\n '.join(json.dumps(rows[key]) for key in sorted(rows)) + '\n]\n')


if os.environ.get('PARITY_RECORD'): atexit.register(_keep_record)


def recipe(seed, shapes):
    "Weights that follow from a seed and the names, for a network"
    return {key: torch.from_numpy(np.asarray(made)) for key, made in recipe_weights(seed, shapes).items()}


def with_singular_vectors(weights):
    "One power iteration in double precision for each spectral norm, as the recorded weights had"
    for key in [key for key in weights if key.endswith('weight_orig')]:
        stem, matrix = key.removesuffix('_orig'), weights[key].flatten(1).double()
        v = torch.nn.functional.normalize(matrix.T @ weights[stem + '_u'].double(), dim=0)
        weights |= {stem + '_u': torch.nn.functional.normalize(matrix @ v, dim=0).float(), stem + '_v': v.float()}
    return weights


def filled(network, seed, change=lambda weights: weights):
    "The network with weights of the recipe, ready for use; give it built on 'meta'"
    network.load_state_dict(change(recipe(seed, {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})), assign=True)
    return network.eval().requires_grad_(False)


def old_name(key):
    "As the autoencoder's file calls its attention"
    for new, old in OLD_ATTENTION.items(): key = key.replace(f'.attentions.0.{new}.', f'.attentions.0.{old}.')
    return key


def write_official(folder, unet=SMALL_UNET, vae=SMALL_VAE, whisper=SMALL_WHISPER, versions=('v1.5', 'v1.0'), seeds=(1, 2, 3)):
    "The files of an official model with weights of the recipe"
    from diffusers import AutoencoderKL
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    from musetalk.core import write_json
    from musetalk.official import OFFICIAL, OFFICIAL_UNET
    from musetalk.unet import LatentPainter
    folder, config = Path(folder), OFFICIAL_UNET | unet
    with torch.device('meta'):
        painter = LatentPainter(config).network
        autoencoder = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, sample_size=256, down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, **vae)
        speech = WhisperForConditionalGeneration(WhisperConfig(**whisper))
    shapes = lambda network: {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for version in versions:
        place = folder/OFFICIAL[version]['folder']
        place.mkdir(parents=True)
        write_json(place/'musetalk.json', dict(_class_name='UNet2DConditionModel', _diffusers_version='0.6.0.dev0') | config)
        torch.save(recipe(seeds[0], shapes(painter)), place/OFFICIAL[version]['file'])
    for name in ('sd-vae', 'whisper'): (folder/name).mkdir(parents=True)
    stored = {key: value for key, value in autoencoder.config.items() if key not in ('scaling_factor', 'shift_factor', 'latents_mean', 'latents_std') and key[0] != '_'}
    write_json(folder/'sd-vae/config.json', dict(_class_name='AutoencoderKL', _diffusers_version='0.4.2') | stored)
    torch.save({old_name(key): value for key, value in recipe(seeds[1], shapes(autoencoder)).items()}, folder/'sd-vae/diffusion_pytorch_model.bin')
    write_json(folder/'whisper/config.json', speech.config.to_diff_dict() | whisper)
    write_json(folder/'whisper/preprocessor_config.json', dict(feature_size=80, n_fft=400, hop_length=160, sampling_rate=16000, chunk_length=30))
    torch.save({key: value for key, value in recipe(seeds[2], shapes(speech)).items() if key != 'proj_out.weight'}, folder/'whisper/pytorch_model.bin')
    return folder


def manifest(folder):
    "The real manifest with the sizes and hashes of the files in a folder; what is not there is left out"
    from dataclasses import replace
    from musetalk.core import sha256_file
    from musetalk.models import FILES
    return tuple(replace(file, bytes=(Path(folder)/file.path).stat().st_size, sha256=sha256_file(Path(folder)/file.path)) for file in FILES if (Path(folder)/file.path).exists())


class Hub:
    "Serves the files of a manifest under the hub's addresses; it can hang up, lie, fail and forget ranges"
    def __init__(self, folder, files):
        from musetalk.models import HUBS
        self.folder, self.cut, self.ranges, self.status, self.log = Path(folder), None, True, None, []
        self.files = {f'/{HUBS[file.hub][0]}/resolve/{HUBS[file.hub][1]}/{file.name}': self.folder/file.path for file in files}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self): hub.answer(self)
            def log_message(self, *arguments): pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request):
        path = self.files.get(request.path)
        start = int(re.match(r'bytes=(\d+)-', request.headers.get('Range', 'bytes=0-'))[1]) if self.ranges else 0
        self.log.append((request.path, start))
        if self.status or path is None: return request.send_error(self.status or 404)
        size = path.stat().st_size
        request.send_response(206 if start else 200)
        if start: request.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
        request.send_header('Content-Length', str(size - start))
        request.end_headers()
        left = min(size - start, self.cut or size)
        with open(path, 'rb') as file:
            file.seek(start)
            try:
                while left > 0 and (piece := file.read(min(left, 1 << 20))):
                    request.wfile.write(piece)
                    left -= len(piece)
            except ConnectionError: pass

    def close(self):
        self.server.shutdown()
        self.server.server_close()
