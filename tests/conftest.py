"Material that several tests share: a portrait, a voice, and a model small enough to build on the spot"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest


@pytest.fixture(scope='session')
def portrait():
    "A face, uint8 [160,160,3]"
    from skimage.data import astronaut
    return np.ascontiguousarray(astronaut()[20:180, 144:304])


@pytest.fixture(scope='session')
def voice():
    "Half a second of something like a vowel, float32, 16 kHz"
    time = np.arange(8000)/16000
    return np.float32(.3*np.sin(2*np.pi*140*time)*(1 + np.sin(2*np.pi*4*time))/2)


@pytest.fixture(scope='session')
def toy_folder(tmp_path_factory):
    "A bundle on disk with the real layout, random weights and next to no size"
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Network
    from musetalk.audio import WhisperEncoder
    from musetalk.bundle import Bundle, save_bundle
    from musetalk.core import read_json, write_json
    from musetalk.mouth import MouthAdapter
    from musetalk.unet import LatentPainter
    from musetalk.vae import CompactAutoencoder, FaceVAE
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('models')
    network = Network(WhisperConfig(d_model=32, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=80, max_source_positions=108))
    network.save_pretrained(folder/'encoder')
    block = dict(left=1.84, hop=.16, lookahead=.16, layers=[4])
    write_json(folder/'encoder/config.json', read_json(folder/'encoder/config.json') | dict(block=block))
    unet = dict(sample_size=(8, 16), in_channels=80, out_channels=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
                down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), attention_head_dim=4)
    vae = CompactAutoencoder(encoder_channels=(16, 24), encoder_blocks=(0, 0), decoder_channels=(24, 16, 12), decoder_blocks=(0, 0, 0))
    painter = LatentPainter(unet, layout='mouth')
    torch.nn.init.normal_(painter.network.conv_out.weight, std=.5)  # so that the speech reaches the picture
    toy = Bundle(FaceVAE(vae.eval()), painter.eval(), WhisperEncoder(network), MouthAdapter(feature_dim=32, token_dim=24, tokens=4).eval(),
                 dict(name='toy', audio=dict(left=5, right=2)))
    return save_bundle(toy, folder/'toy', folder/'encoder', dtype=torch.float32)


@pytest.fixture(scope='session')
def toy(toy_folder):
    "The same, loaded"
    from musetalk.bundle import load_bundle
    return load_bundle(toy_folder, device='cpu', dtype='float32')
