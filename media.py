"""Pictures and videos: read as a person sees them, whatever a camera or an editor wrote; written.

By Pillow and ffmpeg, which imageio needs and brings.
"""
import io
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from itertools import chain
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as nnf
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

import cli

# What Pillow raises for files that are not what their names say.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, EOFError,
                  TypeError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError)


# How ffmpeg ends when a signal, or the system for want of memory, stops it.
STOPPED = (255, -signal.SIGTERM, -signal.SIGKILL)


def refuse_stopped(file: Path, code: int) -> None:
    if code in STOPPED:
        raise ChildProcessError(f"{file}: ffmpeg was stopped (exit code {code}); run the same "
                                "command again")


def decode(file: Path, height: int, width: int, fps: float, most: int | None = None):
    """Yields the frames of a video, (n, height, width, 3) uint8, as a player shows them at `fps`
    instants a second, at `most` so many: upright, pixels square, HDR brought to BT.709 (brighter
    than white is white), transparent parts over white, resized with their aspect, the middle
    cropped. Raises ValueError for what ffmpeg cannot decode, ChildProcessError where it is stopped;
    damage that it conceals is named on stderr. Ctrl-C is for this process, which then ends it."""
    ffmpeg = [get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-protocol_whitelist", "file",
              "-threads", "1", "-i", f"file:{file}"]
    header = subprocess.run(ffmpeg, capture_output=True, start_new_session=True)
    refuse_stopped(file, header.returncode)
    hdr = re.search(rb"Video: .*(smpte2084|arib-std-b67)", header.stderr)
    # A frame that begins up to 1/16 of an interval late still counts: files round their times.
    late = 1e6 / fps / 16
    filters = (f"settb=AVTB,setpts=PTS-STARTPTS-{late:.0f},fps={fps}:round=up,"
               + ("zscale=p=bt709:t=bt709:m=bt709:r=tv:npl=203,format=yuv444p," if hdr else "") +
               f"scale=max({width}\\,round({height}*dar)):max({height}\\,round({width}/dar)):"
               "flags=bilinear+accurate_rnd+full_chroma_int,"
               f"format=rgba,crop={width}:{height}")
    command = [*ffmpeg, "-v", "error", "-vf", filters, "-fps_mode", "passthrough",
               *(["-frames:v", str(most)] if most else []), "-f", "rawvideo", "-"]
    size, empty = height * width * 4, True
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said,
                              start_new_session=True) as process:
            while len(block := process.stdout.read(16 * size)) >= size:
                whole = len(block) // size * size
                rgba = np.frombuffer(block[:whole], np.uint8).reshape(-1, height, width, 4)
                yield over_white(rgba)
                empty = False
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
        line = lines[0].rpartition("] ")[2].replace(f"file:{file}", "it") if lines else "no picture"
        refuse_stopped(file, process.returncode)
        if process.returncode or empty:
            raise ValueError(f"{file}: cannot be read ({line})")
        if lines:
            tqdm.write(f"{file}: used, though damaged: {line}", file=sys.stderr)


def read_video(file: Path, height: int, width: int, fps: float, most: int | None = None):
    """(n, 3, height, width) uint8, see `decode`."""
    frames = np.concatenate(list(decode(file, height, width, fps, most)))
    return torch.from_numpy(frames).movedim(3, 1).contiguous()


def read_clip(file: Path, frames: int, height: int, width: int, fps: float) -> torch.Tensor:
    """The start of a video, (frames, 3, height, width) uint8. ValueError if it is too short."""
    video = read_video(file, height, width, fps, frames)
    if len(video) < frames:
        raise ValueError(f"{file}: too short, {len(video)} of {frames} frames at {fps:g} a second")
    return video


def over_white(rgba: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 -> (..., 3), transparent parts over white."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(colour)
    mixed = colour.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return ((mixed + 127) // 255).astype(np.uint8)


def read_picture(file: Path, height: int, width: int) -> torch.Tensor:
    """A picture as a viewer shows it, (3, height, width) uint8: upright, colours of sRGB, any depth
    and palette, transparent parts over white, resized with its aspect, the middle cropped; of one
    that moves the first frame. Raises ValueError for what cannot be read."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            profile = opened.info.get("icc_profile")
        if image.mode[0] == "F":
            raise ValueError("floating-point pixels; save it with 8 or 16 bits")
        if image.mode[0] == "I":                                 # 16 bits of grey
            grey = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(grey.round().astype(np.uint8))
        image = to_srgb(image, profile) if profile else image
        rgb = Image.fromarray(over_white(np.asarray(image.convert("RGBA"))))
    except PICTURE_ERRORS as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: cannot be read ({line})") from None
    fitted = ImageOps.fit(rgb, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).movedim(2, 0).contiguous()


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Out of the colour space of a camera or an editor. A profile that does not fit the picture is
    ignored, as viewers do."""
    if image.mode in ("P", "PA", "LA", "1") or "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                                         ImageCms.createProfile("sRGB"),
                                         outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


# --- written

def to_pixels(video: torch.Tensor, height: int = 128) -> np.ndarray:
    """Clips (..., 3, H, W) in [-1, 1] -> uint8 (..., H', W', 3), magnified by a whole factor."""
    factor = max(1, height // video.shape[-2])
    video = video.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).numpy()


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8, of any shape, as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def contact_sheet(rows: torch.Tensor) -> torch.Tensor:
    """Pictures (R, N, 3, H, W) -> one picture (3, R * (H + 2), N * (W + 2)) with grey gaps."""
    cells = nnf.pad(rows, (0, 2, 0, 2), value=0.0)
    return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def write_clip(path: Path, video: torch.Tensor, fps: float) -> None:
    """Write one clip (T, 3, H, W), whole or not at all: .mp4 and .gif play, .png is a row of its
    frames. Raises ValueError for other names, OSError where it cannot be written."""
    if path.suffix == ".png":
        write_picture(path, to_pixels(contact_sheet(video[None])))
    elif path.suffix in (".mp4", ".gif"):
        write_frames(path, iter(to_pixels(video)), fps)
    else:
        raise ValueError(f"{path}: the name must end in .mp4, .gif or .png")


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """A picture (H, W, 3) uint8, whole or not at all."""
    with cli.written_aside(path) as aside:
        aside.write_bytes(iio.imwrite("<bytes>", pixels, extension=".png"))


def write_frames(path: Path, frames, fps: float) -> None:
    """An .mp4 or .gif of an iterator of frames (H, W, 3) uint8, whole or not at all."""
    with cli.written_aside(path) as aside:
        if path.suffix == ".mp4":
            write_mp4(aside, frames, fps)
        else:
            aside.write_bytes(iio.imwrite("<bytes>", np.stack(list(frames)), extension=".gif",
                                          duration=1000 / fps, loop=0))


def write_mp4(path: Path, frames, fps: float) -> None:
    """By ffmpeg. Raises OSError with its first word where it fails, as on a full disk."""
    first = next(frames)
    height, width = first.shape[:2]
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-xerror",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps),
               "-i", "-", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p",
               f"file:{path}"]
    # In a session of its own: Ctrl-C is for this process, which then ends ffmpeg.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as ffmpeg:
        with suppress(BrokenPipeError):              # why, it says at its end
            for frame in chain([first], frames):
                ffmpeg.stdin.write(frame.tobytes())
            ffmpeg.stdin.close()
        problem = ffmpeg.stderr.read().decode(errors="replace").strip().splitlines()
    if ffmpeg.returncode or problem:
        reason = problem[0].split("] ")[-1] if problem else f"exit code {ffmpeg.returncode}"
        raise OSError(f"{path}: ffmpeg could not write it ({reason})")
