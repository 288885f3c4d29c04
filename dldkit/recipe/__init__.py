"""The options of a recipe, checked before its first stage begins.

What the options and the configs alone can tell is refused here, in less than a second:
neither ESPnet nor torch is imported, but to look into a model to start from.
"""
