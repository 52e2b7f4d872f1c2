"""Sizes and units, torchrun's variables, and folders that were begun with other settings."""

import pytest

from common.device import own_place
from common.errors import UserError
from common.outputs import require_same
from common.sizes import amount, duration, require_memory, require_video_size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1.5 * 2**20, "1.5 MiB"), (3 * 2**30, "3 GiB")],
)
def test_amounts_have_a_unit_that_fits(size, text):
    assert amount(size) == text


def test_large_amounts_and_durations():
    assert amount(5 * 2**40) == "5.0 TiB"
    assert [duration(s) for s in (0.25, 90, 600, 3 * 3600, 10 * 86400)] == [
        "0.2 seconds", "90.0 seconds", "10.0 minutes", "3.0 hours", "10.0 days"
    ]  # fmt: skip


def test_every_size_that_a_vae_takes_and_no_other():
    """Cells of 8 x 32 x 32: 8k+1 frames, multiples of 32; the two sizes that the message names are taken."""
    for name, taken in (("frames", {1, 9, 17, 25}), ("height", {32, 64, 96}), ("width", {32, 64, 96})):
        for value in range(-3, 100 if name != "frames" else 30):
            settings = {"frames": 9, "height": 64, "width": 64, name: value}
            if value in taken:
                require_video_size(settings, (8, 32, 32))
                continue
            with pytest.raises(UserError, match=f"--{name} {value} is not") as caught:
                require_video_size(settings, (8, 32, 32))
            for nearest in str(caught.value).rsplit("are ", 1)[1].split(" and "):
                require_video_size(settings | {name: int(nearest)}, (8, 32, 32))


def test_a_size_beyond_every_float_is_one_line():
    with pytest.raises(UserError, match=r"--width 1000+ is above 1,000,000"):
        require_video_size({"frames": 9, "height": 64, "width": 10**400}, (8, 32, 32))


def test_more_memory_than_there_is():
    require_memory(2**20, "a clip", "take less")
    with pytest.raises(UserError, match=r"a clip: at least 1,024\.0 TiB, and this machine has .*: take less"):
        require_memory(2**50, "a clip", "take less")


def test_places_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert own_place() == (0, 1, 0)
    for variables, result in [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK = 5 is not below WORLD_SIZE = 2"),
        ({"RANK": "1"}, "RANK and WORLD_SIZE go together"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK = 'abc'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK = ''"),
        ({"RANK": "1e400"}, "RANK"),
        ({"LOCAL_RANK": "9" * 5000}, "LOCAL_RANK"),
    ]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            if isinstance(result, tuple):
                assert own_place() == result
            else:
                with pytest.raises(UserError, match=result):
                    own_place()


def test_settings_of_before_and_now():
    require_same({"a": 1, "b": None}, {"a": 1}, "out", "stop")
    for before, now, said in [({"a": 1}, {"a": 2}, "a = 1 .* 2"), ({}, {"b": 2}, "b = None .* 2"), ({"c": 0}, {}, "c")]:
        with pytest.raises(UserError, match=f"out was begun with {said}.*: stop"):
            require_same(before, now, "out", "stop")
