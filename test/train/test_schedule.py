import inspect

import pytest
import torch

from dldkit.errors import UserError
from dldkit.hf_options import SCHEDULE
from dldkit.train.schedule import TransformersSchedule, total_steps


def rates(total, name="linear", warmup_ratio=0.1, stop=None, state=None):
    """Return the rates of all steps and the one after, and the place at `stop`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = TransformersSchedule(optimizer, name, warmup_ratio)
    schedule.begin(total)
    if state:
        schedule.load_state_dict(state["schedule"])
        optimizer.load_state_dict(state["optimizer"])
    found = []
    for _ in range(total if stop is None else stop):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found.append(optimizer.param_groups[0]["lr"])
    return found, dict(schedule=schedule.state_dict(), optimizer=optimizer.state_dict())


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("total", [20, 50, 330])
def test_rises_for_its_share_and_ends_at_zero(name, total):
    found, _ = rates(total, name)
    assert found[0] == 0 and found[-1] == pytest.approx(0, abs=1e-12)
    assert found.index(max(found)) == total // 10 and max(found) == 2.0
    assert min(found[1:-1]) > 0


def test_goes_on_from_its_place():
    whole, _ = rates(30)
    first, state = rates(30, stop=12)
    rest, _ = rates(30, stop=18, state=state)
    assert first[:-1] + rest == whole


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 7])
def test_refuses_what_is_no_share(ratio):
    with pytest.raises(UserError, match="warmup_ratio .* share of the steps"):
        rates(10, warmup_ratio=ratio)


def test_the_options_that_are_checked_are_those_of_the_class():
    assert tuple(inspect.signature(TransformersSchedule).parameters)[1:] == SCHEDULE


def test_refuses_what_yaml_takes_for_text():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match="warmup_ratio: '7e-2' is no float"):
        TransformersSchedule(optimizer, warmup_ratio="7e-2")


@pytest.mark.parametrize("name", ["triangle", "reduce_lr_on_plateau", "greedy"])
def test_refuses_another_name(name):
    with pytest.raises(UserError, match=f"scheduler_conf name {name}"):
        rates(10, name)


def test_refuses_a_trainer_that_does_not_begin_it():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(UserError, match="not told how long .* resumable or stacking"):
        TransformersSchedule(optimizer).step()


def test_total():
    assert total_steps(5, 3) == 15 and total_steps(None, 3, 7) == 7
    assert total_steps(5, 3, 7) == 7
    with pytest.raises(UserError, match="not known in advance: choose trainer: stack"):
        total_steps(None, 3)
    with pytest.raises(UserError, match="no optimiser step: lower accum_grad"):
        total_steps(0, 3)
