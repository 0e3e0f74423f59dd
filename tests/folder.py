"""What a folder of videos costs: made with ffmpeg, loaded twice, and the codec fitted.

    python tests/folder.py                     1,000 clips of 5 s at 720p; minutes, once
    python tests/folder.py --clips 30 --size 128
    python tests/folder.py --dir DIR           kept there: the same command goes on after a kill

Memory is the peak of the process, and beside it that of the largest ffmpeg.
"""
import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCENES = ("testsrc2", "mandelbrot", "life=mold=10:ratio=0.2:death_color=#402060", "gradients")


def make(folder: Path, count: int) -> None:
    """So many clips, by name; four files are encoded and the others are copies."""
    from imageio_ffmpeg import get_ffmpeg_exe
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        clip = folder / f"{i:05d}.mp4"
        if clip.exists():
            continue
        if i < len(SCENES):
            glue = ":" if "=" in SCENES[i] else "="
            command = [get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i",
                       f"{SCENES[i]}{glue}s=1280x720:r=30", "-t", "5", "-preset", "ultrafast",
                       "-pix_fmt", "yuv420p", clip]
            subprocess.run(command, check=True)
        else:
            shutil.copyfile(folder / f"{i % len(SCENES):05d}.mp4", clip)
        clip.with_suffix(".txt").write_text(f"scene {i}")


def start(folder: str, size: int, fit: bool) -> None:
    """In a process of its own: open the folder, draw from it, and print what that took."""
    import torch

    import data
    import encoders
    torch.set_num_threads(1)

    def peak(who) -> float:
        return resource.getrusage(who).ru_maxrss / 1e6           # GB
    before, started = peak(resource.RUSAGE_SELF), time.time()
    found = data.open_data(folder, 8, size)
    found.clips(range(16))
    print(f"opened in {time.time() - started:.1f} s: {before:.2f} GB before, at most "
          f"{peak(resource.RUSAGE_SELF):.2f} GB, ffmpeg {peak(resource.RUSAGE_CHILDREN):.2f} GB",
          flush=True)
    if fit:
        started = time.time()
        encoders.PatchPCA.fit(lambda: encoders.in_parts(found, 1024, 0))
        print(f"codec fitted in {time.time() - started:.1f} s: "
              f"{peak(resource.RUSAGE_SELF):.2f} GB at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--dir", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.dir or Path(temporary)
        make(place / "clips", args.clips)
        for fit in (False, True):
            call = f"import folder; folder.start({str(place / 'clips')!r}, {args.size}, {fit})"
            subprocess.run([sys.executable, "-c", call], check=True, cwd=ROOT / "tests",
                           env=os.environ | {"XDG_CACHE_HOME": str(place / "cache")})


if __name__ == "__main__":
    main()
