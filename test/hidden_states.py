"""Hidden states that a teacher should give, and a comparison with what it gives."""

import torch
import transformers

LAYERS = ([0, 1, 2, 3], [3], [2], [1, 0], [0])


def truth(model, directory, speech, lengths):
    """Hidden states as transformers itself gives them.

    Its GroupNorm would hear the padding, so that those utterances go in one by one.
    """
    norm = getattr(model.config, "feat_extract_norm", "layer")
    if norm == "group" and len(speech) > 1:
        alone = [
            truth(model, directory, s[None, :n], n[None])
            for s, n in zip(speech, lengths)
        ]
        return [
            torch.nn.utils.rnn.pad_sequence([s[0] for s in states], batch_first=True)
            for states in zip(*alone)
        ]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    inputs = extractor(
        [s[:n].numpy() for s, n in zip(speech, lengths)],
        sampling_rate=16000,
        padding=True,
        return_tensors="pt",
        return_attention_mask=True,
    )
    with torch.no_grad():
        states = list(model(**inputs, output_hidden_states=True).hidden_states)
    if getattr(model.config, "do_stable_layer_norm", False):
        states[-1] = model.encoder.layer_norm(states[-1])
    return states


def assert_gives(teacher, speech, lengths, states, frames, tolerance=1e-5):
    """Compare the valid frames of a teacher's layers with hidden states."""
    outputs, output_lengths = teacher(speech, lengths)
    assert output_lengths.tolist() == frames
    assert len(outputs) == len(teacher.layers)
    for layer, output in zip(teacher.layers, outputs):
        assert output.dtype == torch.float32
        assert output.shape == (len(frames), max(frames), teacher.info.hidden_size)
        for i, n in enumerate(frames):
            expected = states[layer][i, :n]
            assert torch.allclose(output[i, :n], expected, atol=tolerance), layer
