import os
import sys
import time
import types

import pytest

from dldkit.errors import UserError
from dldkit.parallel import parallel_map


@pytest.fixture
def square():
    def square(number):
        time.sleep(0.02 * (number % 3))  # so that they do not end in order
        return number * number, os.getpid()

    return square


@pytest.fixture
def fail_at_five():
    def fail_at_five(number):
        if number == 5:
            raise UserError("five is bad")
        return number

    return fail_at_five


def test_in_this_process(square, capsys):
    results = parallel_map(square, range(5), desc="squares")
    assert [value for value, _ in results] == [0, 1, 4, 9, 16]
    assert {pid for _, pid in results} == {os.getpid()}
    assert "squares: 100%" in capsys.readouterr().err
    assert parallel_map(square, [], nj=4) == []


def test_one_error_ends_the_work_here(fail_at_five):
    done = []
    with pytest.raises(UserError, match="five is bad"):
        parallel_map(lambda number: done.append(fail_at_five(number)), range(9))
    assert len(done) == 5


@pytest.mark.integration
def test_two_processes_keep_the_order(square, capsys, caplog):
    caplog.set_level("INFO")  # as the commands log
    items = [5, 3, 3, 8, 1, 1, 0, 2, 7, 6]  # equal items are separate work
    results = parallel_map(square, items, nj=2, desc="squares")
    assert [value for value, _ in results] == [item * item for item in items]
    pids = {pid for _, pid in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert "squares: 100%" in capsys.readouterr().err
    assert not caplog.records  # nothing of Dask's


@pytest.mark.integration
def test_an_error_in_a_process_arrives_as_it_is(fail_at_five):
    with pytest.raises(UserError, match="five is bad"):
        parallel_map(fail_at_five, range(9), nj=2)


@pytest.mark.integration
def test_a_dying_process_is_reported():
    def die_of_one(number):
        if number == 1:
            os._exit(9)

    with pytest.raises(UserError, match="deaths: 2 workers at work, and one died"):
        parallel_map(die_of_one, range(3), nj=2, desc="deaths")


@pytest.mark.integration
def test_a_function_that_workers_can_not_import_is_an_error():
    module = types.ModuleType("only_here")
    exec("def double(number):\n    return 2 * number", module.__dict__)
    sys.modules["only_here"] = module
    try:
        with pytest.raises(ModuleNotFoundError, match="only_here"):
            parallel_map(module.double, range(3), nj=2)
    finally:
        del sys.modules["only_here"]


@pytest.mark.integration
def test_config_names_the_workers(square, tmp_path):
    config = tmp_path / "parallel.yaml"
    config.write_text("env: local\nn_workers: 2\noptions:\n  threads_per_worker: 1\n")
    results = parallel_map(square, range(6), config=str(config))
    assert [value for value, _ in results] == [0, 1, 4, 9, 16, 25]
    assert len({pid for _, pid in results}) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("env: [", "not valid YAML"),
        ("slurm", "expected"),
        ("env: mars", "env 'mars'"),
        ("env: local\nn_workers: many", "positive integer"),
        ("env: local\nnj: 2", "unknown key.* nj"),
        ("env: local\nn_workers: 2\noptions: abc", "options must be keys and values"),
    ],
)
def test_bad_config_is_refused(tmp_path, content, message):
    config = tmp_path / "parallel.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(UserError, match=message):
        parallel_map(str, range(3), config=str(config))


@pytest.mark.integration
@pytest.mark.parametrize(
    "options, message",
    [
        ("{cores: 1}", "options of SLURMCluster: You must specify .* memory"),
        ("{cores: 1, memory: 1GB, coers: 2}", "unexpected keyword argument 'coers'"),
        ("{cores: 1, memory: 1GB}", "slurm takes no job .*: 'sbatch'"),
    ],
)
def test_a_cluster_that_takes_no_job_ends_the_work(
    tmp_path, monkeypatch, options, message
):
    config = tmp_path / "parallel.yaml"
    config.write_text(f"env: slurm\nn_workers: 2\noptions: {options}\n")
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no sbatch
    with pytest.raises(UserError, match=message):
        parallel_map(str, range(3), config=str(config))
