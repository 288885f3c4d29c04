import inspect
import re
from collections.abc import Sequence
from typing import Optional, Union

import pytest

from dldkit.errors import UserError
from dldkit.signature import checked_options, merged_signature


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


class Checked:
    @checked_options
    def __init__(
        self,
        *args,
        weight: float = 1.0,
        depths: Union[int, Sequence[int]] = (),
        number: Optional[int] = None,
        shared: bool = True,
        **kwargs,
    ):
        self.options = dict(weight=weight, depths=depths, number=number, shared=shared)
        self.options.update(kwargs)


@pytest.mark.parametrize(
    "options",
    [
        dict(weight=2, depths=3, number=None, shared=False),
        dict(weight=0.5, depths=[1, 2], number=3),
        dict(depths=(), unknown="anything"),
    ],
)
def test_options_of_the_right_type_arrive(options):
    assert Checked(**options).options.items() >= options.items()


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("weight", "5e-1", "float"),
        ("weight", float("nan"), "float"),
        ("weight", True, "float"),
        ("depths", 2.5, "Union[int, Sequence[int]]"),
        ("depths", [1, "a"], "Union[int, Sequence[int]]"),
        ("depths", "12", "Union[int, Sequence[int]]"),
        ("number", 1.5, "Optional[int]"),
        ("number", True, "Optional[int]"),
        ("shared", "no", "bool"),
    ],
)
def test_others_are_refused_by_name(name, value, kind):
    with pytest.raises(UserError, match=re.escape(f"{name}: {value!r} is no {kind}. ")):
        Checked(**{name: value})


def test_a_checked_constructor_shows_its_options():
    assert {"weight", "depths", "number", "shared"} == set(
        merged_signature(Checked).parameters
    )
