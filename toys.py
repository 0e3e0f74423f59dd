"""Toy sets that are drawn on the fly with exact captions, and can be read back: shapes and digits.

Legend:  B batch   T pixel frames   H, W picture (both `size` here)
Videos are float32 (B, T, 3, H, W) in [-1, 1], black is -1. Positions are (x, y) in pixels from the
upper left corner, y pointing down. Every clip is a pure function of (seed, index): nothing advances
a hidden state, so a resumed run and any split of the indices over processes see the same clips.
"""
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DIGITS = "zero one two three four five six seven eight nine".split()
PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)         # (4, 3)
HEADINGS = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)     # (4, 2)


# Shared by the sets: random draws, captions, straight-line motion, and measuring a clip.

def draw(seed: int, indices, count: int) -> torch.Tensor:
    """Uniform numbers (B, count) in [0, 1), float64, a row a function of (seed, index) alone."""
    rows = [np.random.default_rng([0, seed, int(i)]).random(count) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count, dtype=torch.float64)


def choose(captions: list[str], draws: torch.Tensor, wanted: list[str] | None) -> list[str]:
    """The caption of each clip: as wanted, or drawn evenly by draws (B,)."""
    if wanted is None:
        return [captions[i] for i in (draws * len(captions)).long().tolist()]
    if len(wanted) != len(draws):
        raise ValueError(f"{len(wanted)} captions for {len(draws)} indices: give one for each")
    return list(wanted)


def caption_labels(captions, known: list[str], attributes: dict) -> dict[str, torch.Tensor]:
    """Attribute values of captions, {attribute: (B,) long}; `known` are all captions, in order.
    Raises ValueError for another one."""
    flat = torch.tensor([known.index(caption) for caption in captions], dtype=torch.long)
    sizes = [len(values) for values in attributes.values()]
    return dict(zip(attributes, torch.unravel_index(flat, sizes)))


def motion(direction: torch.Tensor, speed: float, frames: int) -> torch.Tensor:
    """Displacement (B, T, 2) since the first frame, for labels (B,) and pixels a frame."""
    return HEADINGS[direction][:, None] * (speed * torch.arange(frames))[:, None]


def place_inside(draws, displacement, margin, size: int) -> torch.Tensor:
    """Positions (B, T, 2) whose start, chosen by draws (B, 2), keeps `margin` (B, 1) from every
    edge in all frames."""
    low = margin - displacement.amin(1)
    high = size - margin - displacement.amax(1)
    return (low + draws.float() * (high - low))[:, None] + displacement


def paint(coverage: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Coverage (B, T, H, W) in [0, 1] and colours (B, 3) in [0, 1] -> video."""
    return coverage[:, :, None] * colour[:, None, :, None, None] * 2 - 1


def unit_range(video: torch.Tensor) -> torch.Tensor:
    """Any video, even one that is not finite, as float32 in [0, 1] on the CPU."""
    return video.float().cpu().nan_to_num(-1.0).clamp(-1, 1) / 2 + 0.5


def foreground(video: torch.Tensor) -> torch.Tensor:
    """Intensity (B, T, H, W) in [0, 1]: the brightest channel, less a floor against noise."""
    return above_floor(unit_range(video).amax(2))


def above_floor(intensity: torch.Tensor) -> torch.Tensor:
    return (intensity - 0.2).clamp(min=0) / 0.8


def wrapped(offset: torch.Tensor, size: int) -> torch.Tensor:
    """Offsets on a picture whose opposite edges meet: the shortest, in [-size / 2, size / 2)."""
    return (offset + size / 2) % size - size / 2


def centroids(intensity: torch.Tensor, wrap: bool = False) -> torch.Tensor:
    """Intensity-weighted mean position (B, T, 2); the middle of the picture for an empty frame.

    wrap: opposite edges meet. The track then leaves the picture and goes on, without a jump.
    """
    size = intensity.shape[-1]
    pixel = torch.arange(size) + 0.5
    sums = torch.stack([intensity.sum(2), intensity.sum(3)], 2) + 1e-6 / size   # columns, then rows
    weight = sums / sums.sum(3, keepdim=True)                    # (B, T, 2, size)
    if not wrap:
        return weight @ pixel
    angle = pixel * (2 * torch.pi / size)
    rough = torch.atan2(weight @ angle.sin(), weight @ angle.cos()) * (size / (2 * torch.pi))
    centre = rough + (weight * wrapped(pixel - rough[..., None], size)).sum(3)
    travel = wrapped(centre.diff(dim=1), size).cumsum(1)
    return torch.cat([centre[:, :1], centre[:, :1] + travel], 1)


def read_direction(centre: torch.Tensor) -> torch.Tensor:
    """Direction labels (B,) of tracks (B, T, 2), by the least-squares velocity."""
    time = torch.arange(centre.shape[1]) - (centre.shape[1] - 1) / 2
    velocity = torch.einsum("t,btd->bd", time, centre)           # up to a positive factor
    return (velocity @ HEADINGS.T).argmax(1)


def standardise(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B, values), rows centred and of length 1: a dot product is a correlation."""
    x = x.flatten(1)
    return nnf.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-6)


class Shapes:
    """A circle, square or triangle of one of four colours that moves straight, four directions.

    Lengths are given for a 16 x 16 picture and scale with its size: radius 3.4 to 4.2, travel 5.6
    pixels a clip (0.8 a frame for 8 frames). 48 captions: "a red circle moving left". The shape
    stays inside the picture or, with wrap, comes back in on the other side, for ever.
    """
    RADII = (3.4, 4.2)

    def __init__(self, frames: int = 8, size: int = 16, wrap: bool = False):
        self.frames, self.size, self.scale, self.wrap = frames, size, size / 16, wrap
        self.speed = 5.6 * self.scale / max(frames - 1, 1)       # pixels a frame
        self.attributes = {"colour": list(COLOURS), "shape": ["circle", "square", "triangle"],
                           "direction": list(DIRECTIONS)}
        self.captions = [f"a {c} {s} moving {d}" for c, s, d in product(*self.attributes.values())]

    def clips(self, indices, seed: int = 0, captions: list[str] | None = None):
        """Video (B, T, 3, size, size) and its captions; ValueError for an unknown caption."""
        draws = draw(seed, indices, 4)
        captions = choose(self.captions, draws[:, 0], captions)
        labels = self.labels(captions)
        low, high = self.RADII
        radius = (low + (high - low) * draws[:, 1].float()) * self.scale
        displacement = motion(labels["direction"], self.speed, self.frames)
        if self.wrap:
            centre = (draws[:, 2:].float() * self.size)[:, None] + displacement
        else:
            centre = place_inside(draws[:, 2:], displacement, radius[:, None] + 0.5, self.size)
        # That is the bounding box's middle; a triangle's centre of mass lies lower.
        centre[..., 1] += (radius / 3 * (labels["shape"] == 2))[:, None]
        coverage = self.render(centre, radius, labels["shape"])
        return paint(coverage, PALETTE[labels["colour"]]), captions

    def labels(self, captions) -> dict[str, torch.Tensor]:
        return caption_labels(captions, self.captions, self.attributes)

    def render(self, centre, radius, shape) -> torch.Tensor:
        """Coverage (B, T, size, size) of shapes with centre of mass (B, T, 2), radius (B,) and
        label (B,). A pixel at signed distance d (negative inside) is covered by 1/2 - d: an edge
        one pixel wide."""
        pixel = torch.arange(self.size) + 0.5
        x = pixel - centre[..., 0, None, None]                   # (B, T, 1, W)
        y = pixel[:, None] - centre[..., 1, None, None]          # (B, T, H, 1)
        if self.wrap:
            x, y = wrapped(x, self.size), wrapped(y, self.size)
        r = radius[:, None, None, None]
        coverage = torch.empty(*centre.shape[:2], self.size, self.size)
        for label, distance in enumerate((
            # A thick outline: a filled disc of this size is a square but for a few pixels.
            lambda x, y, r: ((x * x + y * y).sqrt() - 0.75 * r).abs() - 0.25 * r,
            lambda x, y, r: torch.maximum(x.abs(), y.abs()) - 0.9 * r,
            # As tall as wide: apex 4/3 r above the centre of mass, base 2/3 r below it.
            lambda x, y, r: torch.maximum((2 * x.abs() - y - 4 / 3 * r) / 5**0.5, y - 2 / 3 * r),
        )):
            rows = shape == label
            coverage[rows] = (0.5 - distance(x[rows], y[rows], r[rows])).clamp(0, 1)
        return coverage

    def read(self, video: torch.Tensor) -> dict[str, torch.Tensor]:
        """The attributes seen in any clip, real or generated, {attribute: (B,) long}. Direction:
        the track of the centre of mass. Colour: the hue of the foreground. Shape: the drawing, at
        the measured centres and any radius, that correlates best. Defined even for noise."""
        intensity = foreground(video)
        centre, count = centroids(intensity, self.wrap), len(video)
        mean = torch.einsum("bthw,btchw->bc", intensity, unit_range(video))
        colour = (mean @ nnf.normalize(PALETTE, dim=1).T).argmax(1)
        seen, fit = standardise(intensity), torch.zeros(count, 3)
        for label, radius in product(range(3), torch.linspace(*self.RADII, 3) * self.scale):
            drawn = self.render(centre, radius.expand(count), torch.full((count,), label))
            match = (seen * standardise(above_floor(drawn))).sum(1)
            fit[:, label] = torch.maximum(fit[:, label], match)
        return {"colour": colour, "shape": fit.argmax(1), "direction": read_direction(centre)}

    def nearest(self, video: torch.Tensor) -> torch.Tensor:
        """The clip of this set closest to `video`: the attributes read from it, the known speed,
        least-squares start and the best radius. The PSNR to it scores realism."""
        labels, intensity, errors = self.read(video), foreground(video), []
        displacement = motion(labels["direction"], self.speed, video.shape[1])
        start = (centroids(intensity, self.wrap) - displacement).mean(1, keepdim=True)
        centre = start + displacement
        radii = torch.linspace(*self.RADII, 9) * self.scale
        for radius in radii:
            drawn = above_floor(self.render(centre, radius.expand(len(video)), labels["shape"]))
            errors.append((drawn - intensity).square().flatten(1).mean(1))
        best = radii[torch.stack(errors, 1).argmin(1)]
        coverage = self.render(centre, best, labels["shape"])
        return paint(coverage, PALETTE[labels["colour"]]).to(video.device)


class Digits:
    """A white handwritten digit, one of 1797 images, that moves straight in one of four directions.

    In a 16 x 16 picture the digit is 10 x 10 and travels 4 pixels a clip; both scale with the size.
    40 captions: "a handwritten seven moving up". The images are from UCI (see assets/README.md).
    """

    def __init__(self, frames: int = 8, size: int = 16):
        self.frames, self.size, self.scale = frames, size, size / 16
        self.speed = 4 * self.scale / max(frames - 1, 1)         # pixels a frame
        self.attributes = {"digit": DIGITS, "direction": list(DIRECTIONS)}
        self.captions = [f"a handwritten {n} moving {d}" for n, d in product(DIGITS, DIRECTIONS)]
        with np.load(Path(__file__).parent / "assets" / "digits.npz") as file:
            self.images = torch.from_numpy(file["images"]).float() / 16    # (1797, 8, 8) in [0, 1]
            self.digit = torch.from_numpy(file["labels"]).long()           # (1797,)
        self.members = [(self.digit == n).nonzero()[:, 0] for n in range(10)]

    def clips(self, indices, seed: int = 0, captions: list[str] | None = None):
        """Video (B, T, 3, size, size) and its captions; ValueError for an unknown caption."""
        draws = draw(seed, indices, 4)
        captions = choose(self.captions, draws[:, 0], captions)
        labels = self.labels(captions)
        which = torch.zeros(len(draws), dtype=torch.long)
        for i, n in enumerate(labels["digit"].tolist()):
            which[i] = self.members[n][int(draws[i, 1].item() * len(self.members[n]))]
        # Interpolation lets the ink fade out over half a source pixel beyond the 10 x 10 box.
        margin = torch.full((len(draws), 1), (5 + 10 / 16) * self.scale)
        displacement = motion(labels["direction"], self.speed, self.frames)
        centre = place_inside(draws[:, 2:], displacement, margin, self.size)
        return paint(self.render(centre, which), torch.ones(len(draws), 3)), captions

    def labels(self, captions) -> dict[str, torch.Tensor]:
        return caption_labels(captions, self.captions, self.attributes)

    def render(self, centre: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Coverage (B, T, size, size) of images which (B,), their middles at centre (B, T, 2)."""
        pixel = torch.arange(self.size) + 0.5
        xy = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), -1)       # (H, W, 2)
        # (B, T, H, W, 2), with the 10 x 10 box at [-1, 1].
        grid = (xy - centre[:, :, None, None]) / (5 * self.scale)
        ink = nnf.grid_sample(self.images[which][:, None], grid.flatten(1, 2), align_corners=False)
        return ink.view(*grid.shape[:4])

    def align(self, intensity: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """The mean frame in a 12 x 12 window around the moving centre, (B, 144), standardised."""
        offset = (torch.arange(12) - 5.5) * self.scale
        xy = torch.stack(torch.meshgrid(offset, offset, indexing="xy"), -1)     # (12, 12, 2)
        window = (centre[:, :, None, None] + xy) * 2 / self.size - 1       # the picture is [-1, 1]
        seen = nnf.grid_sample(intensity.flatten(0, 1)[:, None], window.flatten(0, 1),
                               align_corners=False)
        return standardise(seen.view(*centre.shape[:2], 144).mean(1))

    @cached_property
    def bank(self):
        """All images as `align` sees them (1797, 144), and their centres of mass from the middle of
        the box (1797, 2). Four half-pixel offsets stand for the frames: motion blurs."""
        count = len(self.images)
        middle = torch.tensor([(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]) + self.size / 2
        coverage = self.render(middle.expand(count, 4, 2), torch.arange(count))
        intensity = foreground(paint(coverage, torch.ones(count, 3)))
        centre = centroids(intensity)
        return self.align(intensity, centre), (centre - middle).mean(1)

    def match(self, video: torch.Tensor):
        """The best image (B,) and the track (B, T, 2) of its centre of mass."""
        intensity = foreground(video)
        centre = centroids(intensity)
        return (self.align(intensity, centre) @ self.bank[0].T).argmax(1), centre

    def read(self, video: torch.Tensor) -> dict[str, torch.Tensor]:
        """The attributes seen in any clip, real or generated, {attribute: (B,) long}. The digit is
        that of the image that correlates best with the aligned frames. Defined even for noise."""
        which, centre = self.match(video)
        return {"digit": self.digit[which], "direction": read_direction(centre)}

    def nearest(self, video: torch.Tensor) -> torch.Tensor:
        """The clip of this set closest to `video`: the best image on the line, at the known speed,
        that fits the track in the least-squares sense. The PSNR to it scores realism."""
        which, centre = self.match(video)
        displacement = motion(read_direction(centre), self.speed, video.shape[1])
        start = (centre - displacement).mean(1) - self.bank[1][which]
        coverage = self.render(start[:, None] + displacement, which)
        return paint(coverage, torch.ones(len(video), 3)).to(video.device)


SETS = {"shapes": Shapes, "loop": partial(Shapes, wrap=True), "digits": Digits}
