"""dldkit: speech models whose encoder depth is chosen at run time, or grows."""

__version__ = "0.1.0"


def register() -> None:
    """Add dldkit's classes to ESPnet's choices; calling it again does nothing."""
    from dldkit import patches

    patches.prepare_espnet()
    from dldkit.registry import register as register_classes

    register_classes()
