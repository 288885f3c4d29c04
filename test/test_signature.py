import inspect

import pytest

from dldkit.signature import merged_signature


class Grandparent:
    def __init__(self, unseen: int = 0):
        pass


class Parent(Grandparent):
    def __init__(self, size: int, rate: float = 0.1, name: str = "parent"):
        pass


class Silent(Parent):
    pass


class Child(Silent):
    def __init__(self, *args, depth: int = 3, name: str = "child", **kwargs):
        pass


def test_own_options_and_those_passed_on():
    parameters = merged_signature(Child).parameters
    assert set(parameters) == {"size", "depth", "name", "rate"}
    assert parameters["size"].default is inspect.Parameter.empty
    assert parameters["depth"].default == 3
    assert parameters["rate"].default == 0.1
    assert parameters["rate"].annotation is float


def test_the_nearest_class_decides():
    assert merged_signature(Child).parameters["name"].default == "child"


def test_ends_where_nothing_is_passed_on():
    assert "unseen" not in merged_signature(Child).parameters
    assert set(merged_signature(Parent).parameters) == {"size", "rate", "name"}


def test_is_a_signature_that_binds():
    signature = merged_signature(Child)
    assert signature.bind(size=1, depth=2).arguments == {"size": 1, "depth": 2}
    with pytest.raises(TypeError):
        signature.bind(depth=2)
    with pytest.raises(TypeError):
        signature.bind(size=1, dept=2)
