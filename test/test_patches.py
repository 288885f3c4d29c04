"""ESPnet behaves as it does without our changes."""

import inspect

import pytest
import typeguard

from dldkit.patches import prepare_espnet


def test_types_are_checked_at_the_first_call_and_later():
    prepare_espnet()

    class Encoder:
        @typeguard.typechecked
        def __init__(self, size: int, rate: float = 0.1) -> None:
            super().__init__()
            self.size = size

    assert list(inspect.signature(Encoder).parameters) == ["size", "rate"]
    for _ in range(2):
        assert Encoder(3).size == 3
        with pytest.raises(typeguard.TypeCheckError, match='"rate" .str. is neither'):
            Encoder(3, rate="1e-3")


def test_of_espnet_no_function_is_compiled_before_it_is_called(python):
    code = """if True:
        import inspect
        import dldkit
        dldkit.register()
        from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
        own = inspect.unwrap(TransformerEncoder.__init__)
        assert not any("typeguard" in name for name in own.__code__.co_names)
        try:
            TransformerEncoder(8, dropout_rate="1e-3")
        except Exception as error:
            print(error)
        """
    printed = python("-c", code).stdout
    assert 'argument "dropout_rate" (str) is neither float or int' in printed
    assert "Flash Attention" not in printed
