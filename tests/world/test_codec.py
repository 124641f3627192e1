"""H.264: the round trip, frame types and motion vectors of the stream, and errors that say what is wrong."""

import numpy as np
import pytest

pytest.importorskip("av", reason="needs the extra vision")

from grainwise.world import World
from grainwise.world.actions import ACTIONS
from grainwise.world.clips import Clips
from grainwise.world.codec import psnr, read_video, write_video


@pytest.fixture(scope="module")
def clip():
    return Clips(World(seed=11), 10, 24, 96, actors=(1, 1)).draw([1]).frames[0]


def moving_square(dx, dy, count=9):
    """A textured square on a finely textured ground, moving (dx, dy) pixels a frame."""
    numbers = np.random.default_rng(10)
    ground = numbers.integers(70, 130, (48, 48, 1)).repeat(2, 0).repeat(2, 1).repeat(3, 2).astype(np.uint8)
    square = numbers.integers(0, 255, (8, 8, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    frames = np.repeat(ground[None], count, 0)
    for t in range(count):
        y, x = 32 + dy * (t - count // 2), 32 + dx * (t - count // 2)
        frames[t, y : y + 32, x : x + 32] = square
    return frames


@pytest.mark.parametrize(
    ("settings", "least"), [({}, 30), ({"full_colour": True}, 37), ({"quality": 1, "full_colour": True}, 45)]
)
def test_round_trip(tmp_path, clip, settings, least):
    video = read_video(write_video(tmp_path / "clip.mp4", clip, **settings))
    assert video.frames.shape == clip.shape
    assert psnr(video.frames, clip) > least
    np.testing.assert_allclose(video.times, np.arange(24) / 8, atol=1e-6)


def test_worse_quality_is_smaller_and_worse(tmp_path, clip):
    good, bad = write_video(tmp_path / "good.mp4", clip, quality=10), write_video(tmp_path / "bad.mp4", clip, quality=40)
    assert good.stat().st_size > bad.stat().st_size
    assert psnr(read_video(good).frames, clip) > psnr(read_video(bad).frames, clip)


def test_frame_types_follow_the_settings(tmp_path, clip):
    video = read_video(write_video(tmp_path / "clip.mp4", clip, group=8, b_frames=2))
    assert video.types[0] == "I"
    assert set(video.types) == {"I", "P", "B"}
    assert np.diff(np.flatnonzero(video.types == "I")).max() <= 8
    assert not (video.vectors["frame"][:, None] == np.flatnonzero(video.types == "I")).any()
    assert (video.types[video.vectors["frame"][video.vectors["source"] > 0]] == "B").all()
    plain = read_video(write_video(tmp_path / "plain.mp4", clip, group=24, b_frames=0))
    assert "".join(plain.types) == "I" + "P" * 23
    assert plain.references().tolist() == list(range(-1, 23))
    assert len(read_video(write_video(tmp_path / "all.mp4", clip, group=1)).vectors) == 0


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (-3, 0), (0, 2), (-2, 2)])
def test_vectors_point_where_the_object_went(tmp_path, dx, dy, b_frames):
    video = read_video(write_video(tmp_path / "square.mp4", moving_square(dx, dy), b_frames=b_frames))
    field, known = video.motion(8)
    for t in range(1, 9):
        y, x = 32 + dy * (t - 4), 32 + dx * (t - 4)
        inside = np.s_[t, -(-y // 8) : (y + 32) // 8, -(-x // 8) : (x + 32) // 8]
        if known[inside].any():
            np.testing.assert_allclose(np.median(field[inside][known[inside]], 0), [dx, dy], atol=0.6)
    assert known[1:, 4:7, 4:7].mean() > 0.4
    assert not known[0].any()
    assert (np.abs(field[:, 10:, 10:]).max(-1) < 1).mean() > 0.8


def test_vectors_follow_a_walking_individual(tmp_path):
    chosen = [action.index for action in ACTIONS if action.steps[0].sub == "walk left" and action.variant == "first slow"]
    batch = Clips(World(seed=11), 10, 16, 96, actors=(1, 1), actions=chosen).draw([0, 1, 2])
    for i in range(3):
        field, known = read_video(write_video(tmp_path / f"{i}.mp4", batch.frames[i], b_frames=0)).motion()
        step = batch.moments[i][0]
        seen = batch.masks(0)[i].reshape(16, 12, 8, 12, 8).mean((2, 4)) > 0.5
        during = np.zeros(16, bool)
        during[step.start + 2 : step.end - 1] = True
        assert field[..., 0][known & seen & during[:, None, None]].mean() < -0.5


def test_same_frames_give_the_same_bytes(tmp_path, clip):
    first, second = (write_video(tmp_path / name, clip).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert first == second
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_failed_write_leaves_the_old_file(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", clip)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("grainwise.world.codec.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, clip[:8])
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((0, 32, 32, 3), {}, "1 to 4096 frames"),
        ((8, 33, 32, 3), {}, "even"),
        ((8, 8, 32, 3), {}, "16 to 2048"),
        ((1, 16, 4096, 3), {}, "16 to 2048"),
        ((8, 32, 32), {}, "frames, height, width, 3"),
        ((8, 32, 32, 3), {"rate": 0}, "rate"),
        ((8, 32, 32, 3), {"quality": 60}, "quality"),
        ((8, 32, 32, 3), {"group": 0}, "group"),
        ((8, 32, 32, 3), {"b_frames": 17}, "b_frames"),
    ],
)
def test_wrong_frames_and_settings_are_named(tmp_path, shape, settings, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "x.mp4", np.zeros(shape, np.uint8), **settings)
    assert not list(tmp_path.iterdir())


def test_other_types_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        write_video(tmp_path / "x.mp4", np.zeros((8, 32, 32, 3), np.float32))
    with pytest.raises(FileNotFoundError, match="folder"):
        write_video(tmp_path / "none" / "x.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="no video"):
        read_video(tmp_path / "none.mp4")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_damaged_files_are_named(tmp_path, clip, damage):
    data = bytearray(write_video(tmp_path / "clip.mp4", clip).read_bytes())
    if damage == "flipped":
        start = data.index(b"mdat") + 800
        for place in range(start, start + 300):
            data[place] ^= 0x5A
    path = tmp_path / "bad.mp4"
    path.write_bytes({"empty": b"", "text": b"not a video" * 50, "cut": data[: len(data) // 2], "flipped": data}[damage])
    with pytest.raises(ValueError, match=r"bad\.mp4 is"):
        read_video(path)


def test_too_long_a_file_is_refused(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", clip)
    monkeypatch.setattr("grainwise.world.codec.MOST_FRAMES", 20)
    with pytest.raises(ValueError, match="at most 20"):
        read_video(path)


def test_motion_blocks_of_other_sizes_are_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="4, 8 or 16"):
        read_video(write_video(tmp_path / "clip.mp4", clip)).motion(5)
