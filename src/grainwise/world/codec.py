"""Clips through a real codec: H.264 by PyAV, read back with frame types and motion vectors from the stream itself.

`write_video` encodes with libx264, one reference frame and no B-pyramid, so that every vector points to the nearest I or P
frame before it (or after it, in a B frame). `read_video` returns the pictures, the type of every frame and the decoder's
motion vectors.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from grainwise.extras import require

MOST_FRAMES = 4096
MOST_SIDE = 2048
VECTOR = np.dtype(
    [("frame", "i4"), ("source", "i4"), ("x", "f4"), ("y", "f4"), ("width", "f4"), ("height", "f4"), ("dx", "f4"), ("dy", "f4")]
)


@dataclass
class Video:
    """A decoded video.

    frames: uint8 (f, height, width, 3); types: "I", "P" or "B" for each frame, str (f,); times: float64 (f,), seconds;
    vectors: structured array, one row per motion vector, with the fields of `VECTOR`: frame, the frame it belongs to;
    source, -1 when it refers to a frame before and 1 to one after; x, y: the block's centre in pixels; width, height: its
    size; dx, dy: how far the block has moved from its reference to here, in pixels.
    """

    frames: np.ndarray
    types: np.ndarray
    times: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def references(self) -> np.ndarray:
        """int64 (f,): the frame that vectors with source -1 of each frame refer to, -1 where there is none (I frames)."""
        anchors = np.where(self.types == "B", -1, np.arange(len(self)))
        before = np.r_[-1, np.maximum.accumulate(anchors)[:-1]]
        return np.where(self.types == "I", -1, before)

    def motion(self, block: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """The vectors that refer to frames before, on a grid of blocks.

        Returns:
            float32 (f, rows, columns, 2), pixels right and down per frame since the reference; bool (f, rows, columns),
            where a vector is
            known: not in I frames, nor in blocks coded on their own or from a later frame.
        """
        if block not in (4, 8, 16):
            raise ValueError(f"block is {block}; H.264 moves blocks of 4, 8 or 16 pixels")
        count, height, width = self.frames.shape[:3]
        rows, columns = -(-height // block), -(-width // block)
        field, known = np.zeros((count, rows, columns, 2), np.float32), np.zeros((count, rows, columns), bool)
        v = self.vectors[self.vectors["source"] < 0]
        reference = self.references()[v["frame"]]
        v, reference = v[reference >= 0], reference[reference >= 0]
        step = np.stack([v["dx"], v["dy"]], 1) / (v["frame"] - reference)[:, None]
        reach_x, reach_y = (np.maximum(v[side] // block, 1).astype(int) for side in ("width", "height"))
        left, top = (np.floor((v[axis] - v[side] / 2) / block).astype(int) for axis, side in (("x", "width"), ("y", "height")))
        for down in range(int(reach_y.max(initial=0))):
            for right in range(int(reach_x.max(initial=0))):
                row, column = top + down, left + right
                here = (down < reach_y) & (right < reach_x) & (row < rows) & (column < columns) & (row >= 0) & (column >= 0)
                place = v["frame"][here], row[here], column[here]
                field[place], known[place] = step[here], True
        return field, known


def write_video(
    path: str | Path,
    frames: np.ndarray,
    *,
    rate: float = 8,
    quality: float = 18,
    group: int = 12,
    b_frames: int = 2,
    full_colour: bool = False,
) -> Path:
    """Encode frames as H.264 in an mp4 file, written under a temporary name and renamed.

    Args:
        path: where; the folder must exist.
        frames: uint8 (f, height, width, 3), 1 to 4096 frames, sides even, from 16 to 2048 pixels.
        rate: frames per second.
        quality: x264's constant rate factor, 0 (best) to 51.
        group: at most this many frames from one I frame to the next.
        b_frames: at most this many B frames in a row, 0 to 16.
        full_colour: keep colour at full resolution (4:4:4); half of it in each direction otherwise, as most videos do.

    Raises:
        ValueError: frames or settings out of range.
        FileNotFoundError: the folder does not exist.
        ImportError: PyAV is not installed.
    """
    av = require("av", extra="vision")
    path = Path(path)
    frames = _checked(frames, rate, quality, group, b_frames)
    if "libx264" not in av.codecs_available:
        raise RuntimeError("this build of PyAV has no libx264; install the wheels of av")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    handle, name = tempfile.mkstemp(suffix=".part", prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        with av.open(name, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv444p" if full_colour else "yuv420p"
            stream.options = {
                "crf": str(quality),
                "g": str(group),
                "bf": str(b_frames),
                "refs": "1",
                "b-pyramid": "none",
                "threads": "1",
            }
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def read_video(path: str | Path) -> Video:
    """Decode the first video stream of a file, with frame types and motion vectors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no video, is damaged, ends early, or is larger than 4096 frames or 2048 pixels a side.
        ImportError: PyAV is not installed.
    """
    av = require("av", extra="vision")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            return _decode(av, container, path)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} is no readable video: {error}") from error


def _decode(av: Any, container: Any, path: Path) -> Video:
    stream = container.streams.video[0]
    if stream.frames > MOST_FRAMES or max(stream.width, stream.height) > MOST_SIDE:
        raise ValueError(
            f"{path} has {stream.frames} frames of {stream.width} x {stream.height} pixels; "
            f"at most {MOST_FRAMES} of {MOST_SIDE} are read"
        )
    stream.codec_context.options = {"flags2": "+export_mvs", "err_detect": "explode", "threads": "1"}
    images: list[np.ndarray] = []
    types: list[str] = []
    times: list[float] = []
    vectors: list[np.ndarray] = []
    for frame in container.decode(stream):
        if len(images) == MOST_FRAMES:
            raise ValueError(f"{path} has more than {MOST_FRAMES} frames")
        vectors.append(_vectors(frame, len(images)))
        images.append(frame.to_ndarray(format="rgb24"))
        types.append(av.video.frame.PictureType(frame.pict_type).name)
        times.append(float(frame.time if frame.time is not None else len(images) - 1))
    if not images:
        raise ValueError(f"{path} holds no frame that can be decoded")
    if stream.frames and len(images) != stream.frames:
        raise ValueError(f"{path} is damaged: {len(images)} of its {stream.frames} frames can be decoded")
    return Video(np.stack(images), np.array(types), np.array(times), np.concatenate(vectors))


def _vectors(frame: Any, number: int) -> np.ndarray:
    """The motion vectors of one frame as rows of `VECTOR`."""
    found = frame.side_data.get("MOTION_VECTORS")
    if found is None:
        return np.zeros(0, VECTOR)
    raw = found.to_ndarray()
    rows = np.zeros(len(raw), VECTOR)
    rows["frame"], rows["source"] = number, raw["source"]
    for mine, its in (("x", "dst_x"), ("y", "dst_y"), ("width", "w"), ("height", "h")):
        rows[mine] = raw[its]
    rows["dx"], rows["dy"] = -raw["motion_x"] / raw["motion_scale"], -raw["motion_y"] / raw["motion_scale"]
    return rows


def _checked(frames: np.ndarray, rate: float, quality: float, group: int, b_frames: int) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (frames, height, width, 3), got {frames.dtype} {frames.shape}")
    count, height, width = frames.shape[:3]
    if not 1 <= count <= MOST_FRAMES:
        raise ValueError(f"a video has 1 to {MOST_FRAMES} frames, got {count}")
    if not (16 <= height <= MOST_SIDE and 16 <= width <= MOST_SIDE) or height % 2 or width % 2:
        raise ValueError(f"sides must be even, from 16 to {MOST_SIDE} pixels; got {height} x {width}")
    if not 0 < rate <= 240:
        raise ValueError(f"rate is {rate} frames per second; choose more than 0 and at most 240")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality is {quality}; x264's constant rate factor goes from 0 (best) to 51")
    if group < 1 or not 0 <= b_frames <= 16:
        raise ValueError(f"group is {group} (at least 1) and b_frames is {b_frames} (0 to 16)")
    return np.ascontiguousarray(frames)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, in decibels; infinite when they are equal."""
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {first.shape} and {second.shape}")
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
