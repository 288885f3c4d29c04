import pytest

from dldkit.errors import UserError
from dldkit.sfm.teacher_loss import teacher_loss


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "config.yaml can not be read: No such file"),
        ("a: [1\n", "config.yaml is no YAML file"),
        ("encoder: conformer\n", "config.yaml: its model_conf names no teacher"),
        ("model_conf: {teacher: x}\n", "config.yaml: its model_conf names no teacher"),
    ],
)
def test_refuses_what_is_no_config_of_a_distillation(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        teacher_loss(str(tmp_path / "config.yaml"))
