"""Small speech encoders with random weights, as transformers saves them."""

import torch

TINY_STUDENT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_hidden_layers=4,
    conv_dim=[8] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def write_pretrained(directory, kind, layers):
    """A small speech encoder with random weights, as transformers saves it."""
    from transformers import AutoConfig, AutoModel

    sizes = {**TINY_STUDENT, "num_hidden_layers": layers}
    if kind == "whisper":
        sizes = dict(d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32)
        sizes |= dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
        sizes |= dict(encoder_layers=layers)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(
        directory
    )
    return directory


def write_teacher(directory, layers):
    """A small HuBERT with random weights, as transformers saves it."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    config = HubertConfig(**{**TINY_STUDENT, "num_hidden_layers": layers})
    HubertModel(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(directory)
    return directory
