"""What makes clips: a trained network between its encoders. For sample.py, eval.py and Python:

    pipeline = load_pipeline("runs/toy-shapes/distill")
    clips = generate(pipeline, ["a red circle moving left"], [0], time_grid(4, shift=5.0))

Legend:  B batch   F latent frames, C channels, h, w   T pixel frames   H, W picture
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import checkpoint
import distributed
import encoders
import lora
import media
import runs
import wan
from cache import Context, append_chunk
from config import finished, record_of
from flowmap import SAMPLERS, check_grid, conditioned, first_frames_given, guided, watched
from model import FlowMapDiT

ADAPTER = "trained"              # name of the network's adapter, if it has one


@dataclass
class Pipeline:
    """What is needed to sample."""
    network: FlowMapDiT
    codec: object                # encoders.PatchPCA or encoders.WanCodec
    words: object                # encoders.Words or encoders.WanText: features of prompts
    config: dict                 # of training: shift, guidance, full_chunks, ...
    latent_shape: tuple          # (F, C, h, w)
    chunks: tuple                # latent frames of each chunk; one chunk: a bidirectional model
    null_prompt: str = ""        # what stands for no prompt
    picture: object = None       # encoders.WanPicture, for networks that see the first frame
    batch: int = 48              # clips made at a time
    fps: float = 8               # frames a second of a clip
    adapter: str = ""            # of the network, that is sampled

    def encode_prompts(self, captions: list[str], image=None) -> tuple:
        """Their keys and values in every cross-attention, for a Context."""
        device = next(self.network.parameters()).device
        return self.network.encode_prompt(self.words(captions).to(device), image)

    def default_guidance(self, sampler: str) -> float:
        """1 where it is built in: for flow maps, and under the consistency sampler."""
        built_in = self.network.config.second_time or sampler == "consistency"
        return 1.0 if built_in else self.config["guidance"]


def load_pipeline(path, device="cpu", base=None, frames: int = 81, height: int = 480,
                  width: int = 832, tiling: bool = False, bf16: bool | None = None,
                  chunks=None) -> Pipeline:
    """The pipeline of a finished stage, RUN/STAGE, or of Wan or AnyFlow weights (see wan.load).

    base: Wan pipeline folder with text encoder and autoencoder, for networks of Wan's latents.
    frames, height, width: of the clips, pixel frames and pixels, where weights come without a run.
    chunks: latent frames of each chunk, in place of `frames`, for causal weights whose file does
    not say so; without a compressed patch embedding (Self-Forcing, Krea) all are seen in full.
    tiling: of the autoencoder, see encoders.WanCodec. bf16: of the network's weights and products
    (None: for Wan's networks on a GPU).
    Raises ValueError for weights that do not fit each other, the size or the chunks.
    """
    path = Path(path)
    config, state, adapter = wan.load_apart(path, base)
    trained_here = finished(path)
    needed = ("chunks", "latent_shape", "text_length", "shift", "guidance", "full_chunks")
    record = record_of(path, *needed) if trained_here else {}
    of_wan = "vocabulary" not in record
    if trained_here and chunks:
        raise ValueError(f"--chunks: {path} was trained with chunks of {record['chunks']}; ask for "
                         f"another length with --frames")
    if of_wan:
        codec = wan_codec(path, config, base, device, tiling)
    else:
        codec = runs.read_codec(path / runs.CODEC)
    if not trained_here:
        record = record_for(path, config, codec, frames, height, width, chunks)
    if bf16 is None:
        bf16 = of_wan and torch.device(device).type != "cpu"
    network = load_network(path, config, state, adapter, device, bf16)
    if of_wan:
        words = encoders.WanText(base, device, record.get("text_length", 512))
        picture = encoders.WanPicture(base, device) if config.image_dim else None
        own = {"null_prompt": encoders.NEGATIVE_PROMPT, "picture": picture, "batch": 1}
    else:
        words = encoders.Words(record["vocabulary"], config.text_dim, record["text_length"])
        own = {}
    made_by = record.get("set", {}).get("made by") or {}         # of shards, with their own fps
    return Pipeline(network, codec, words, record["config"], tuple(record["latent_shape"]),
                    tuple(record["chunks"]), fps=made_by.get("fps", codec.fps),
                    adapter=ADAPTER if adapter else "", **own)


def wan_codec(path, config, base, device, tiling: bool) -> encoders.WanCodec:
    """The autoencoder in the folder `base`, for weights at `path`."""
    if not base:
        raise ValueError(f"{path} works on Wan's latents: give the folder of Wan's text encoder "
                         f"and autoencoder with --base")
    codec = encoders.WanCodec(base, device, tiling)
    if codec.channels != config.channels:
        raise ValueError(f"{path} works on latents of {config.channels} channels, but the "
                         f"autoencoder of {base} makes {codec.channels}: give --base the folder "
                         f"that belongs to the weights")
    return codec


def record_for(path, config, codec, frames: int, height: int, width: int, chunks) -> dict:
    """What a stage's config.json would say of weights that were not trained here."""
    side = codec.pixels * config.patch * (2 if config.compressed else 1)
    if height % side or width % side:
        raise ValueError(f"--height {height} and --width {width} must be multiples of {side} for "
                         f"these weights")
    whole_frames = (frames - 1) % codec.stride == 0
    if not whole_frames and not chunks and not config.compressed:
        raise ValueError(f"--frames {frames} must be {codec.stride} n + 1 for these weights")
    latent_frames = -(-(frames - 1) // codec.stride) + 1                     # rounded up
    record = wan.read_record(path, config, latent_frames, chunks)
    size = (height // codec.pixels, width // codec.pixels)
    return record | {"latent_shape": (sum(record["chunks"]), config.channels, *size)}


def load_network(path, config, state, adapter: dict | None, device, bf16: bool) -> FlowMapDiT:
    """The network of weights `state`, with their adapter beside them: a bf16 weight could not hold
    what it adds."""
    with torch.device("meta"):
        network = FlowMapDiT(config)
        if adapter:
            lora.add_adapter(network, ADAPTER, adapter["rank"], adapter["alpha"])
    network = network.to(torch.bfloat16 if bf16 else torch.float32)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    checkpoint.load_weights(network, state, path)
    if adapter:
        checkpoint.load_weights(lora.Adapted(network, ADAPTER), adapter["tensors"], path)
    return network


@torch.no_grad()
def latents(pipeline: Pipeline, captions: list[str], seeds: list[int], grid: list[float],
            sampler: str = "euler", guidance: float = 1.0, chunks=None,
            given: torch.Tensor | None = None, window: int | None = None,
            prompt_at: dict[int, str] | None = None, picture: tuple | None = None, on_step=None):
    """Yields the latents (B, F of a chunk, C, h, w) of clips chunk by chunk, one clip for each
    caption and seed; a bidirectional model yields its one chunk.

    sampler: a name in flowmap.SAMPLERS.
    guidance: classifier-free guidance, for a teacher; 1 for flow maps, which have theirs built in.
    chunks: latent frames of each chunk (default: as trained). More than trained make a longer
    video, an endless iterator an endless one, without `given`.
    given: latents (B or 1, F, C, h, w) of the first frames, whole chunks of them, which are kept as
    they are (image- and video-to-video); a bidirectional model keeps any number but all, at t = 0.
    window: how many chunks the cache keeps (None: as in training, which long videos need; 0: all).
    prompt_at: another caption for all clips from chunk m on; more may be added between two chunks.
    picture: what `read_picture` makes of a first frame. on_step: see flowmap.watched.
    Raises ValueError for unknown words or too many, an unknown sampler, a grid that does not fall
    from 1 to 0, chunks of a model of whole clips, a `given` that does not end where a chunk ends, a
    picture that is missing or not wanted, and latents that are no finite numbers.
    """
    net, device = pipeline.network, next(pipeline.network.parameters()).device
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    check_grid(grid)
    if chunks and len(pipeline.chunks) == 1:
        raise ValueError("this model was trained on whole clips (without --causal): it has one "
                         "length and one chunk")
    chunks = chunks or pipeline.chunks
    if given is not None:
        check_given(chunks, given)
        given = for_each(captions, given, device)
    full_chunks = pipeline.config["full_chunks"]
    window = len(pipeline.chunks) - 1 if window is None else window
    image, condition = picture or (None, None)
    image = for_each(captions, image, device)
    condition = for_each(captions, condition, device)

    prompt_at = {} if prompt_at is None else prompt_at
    for text in prompt_at.values():
        pipeline.words([text])               # what is wrong with it is said before the first chunk
    context = Context(pipeline.encode_prompts(captions, image), condition=condition,
                      adapter=pipeline.adapter)
    null = None                                          # the same with the empty prompt
    if guidance != 1:
        null_prompts = [pipeline.null_prompt] * len(captions)
        null = replace(context, text=pipeline.encode_prompts(null_prompts, image))

    noise = distributed.noise_stream("sample", slots=seeds)
    renoise = distributed.noise_stream("renoise", slots=seeds)
    z_0 = None
    for m, frames in enumerate(chunks):
        if m:
            context = append_chunk(net, context, z_0, full_chunks, window)
            if null:
                null = append_chunk(net, null, z_0, full_chunks, window)
        if m in prompt_at:
            prompts = [prompt_at[m]] * len(captions)
            context = replace(context, text=pipeline.encode_prompts(prompts, image))
        u = conditioned(net, context)
        if null:
            u = guided(u, conditioned(net, null), guidance)
        z = noise((frames, *pipeline.latent_shape[1:])).to(device)
        kept = z[:, :0] if given is None else given[:, context.start:context.start + frames]
        z_0 = sample_chunk(u, z, kept, grid, sampler, renoise, on_step)
        check_finite(z_0, captions, seeds)
        yield z_0


def check_finite(z_0, captions, seeds) -> None:
    """Raises ValueError that names the first clip of z_0 (B, F, C, h, w) that is not."""
    finite = z_0.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        bad = finite.index(False)
        raise ValueError(f"the clip of {captions[bad]!r}, seed {seeds[bad]}, has latents that are "
                         "no finite numbers: the weights are damaged, or --guidance is too large")


def sample_chunk(u, z, given, grid, sampler: str, renoise, on_step) -> torch.Tensor:
    """A chunk's noise z -> z_0. given: its first frames, none to all of them, which are kept."""
    count = given.shape[1]
    if count == z.shape[1]:
        return given
    if count:
        u = first_frames_given(u, given)
    if on_step:
        u = watched(u, lambda z: on_step(torch.cat([given, z[:, count:]], 1)))
    z_0 = SAMPLERS[sampler](u, z, grid, renoise)
    return torch.cat([given, z_0[:, count:]], 1)


def check_given(chunks: tuple, given) -> None:
    """Raises ValueError unless given frames are whole chunks, or some of a single one; not all."""
    frames = given.shape[1]
    fits = frames < chunks[0] if len(chunks) == 1 else frames in chunk_ends(chunks)
    if frames and not fits:
        raise ValueError(f"{frames} given latent frames: must be whole chunks of {list(chunks)}, "
                         f"and not all of them")


def chunk_ends(chunks) -> list[int]:
    """Latent frames up to the end of each chunk but the last."""
    return [sum(chunks[:m]) for m in range(1, len(chunks))]


def for_each(captions, value, device):
    """A tensor (B or 1, ...) as one row for each caption, on the device; None stays None."""
    return None if value is None else value.to(device).expand(len(captions), *value.shape[1:])


def stream(pipeline: Pipeline, *args, **options):
    """Yields clips chunk by chunk, (B, T of a chunk, 3, H, W) in [-1, 1] on the CPU; arguments and
    errors as for `latents`."""
    decode = pipeline.codec.decoder()
    for z_0 in latents(pipeline, *args, **options):
        yield decode(z_0.cpu())


def generate(pipeline: Pipeline, captions: list[str], seeds: list[int], grid: list[float],
             sampler: str = "euler", guidance: float = 1.0, given=None, **options) -> torch.Tensor:
    """Whole clips (B, T, 3, H, W) in [-1, 1] on the CPU, pipeline.batch at a time; arguments and
    errors as for `latents`. A seed decides its clip whatever else is in the batch."""
    clips = []
    for first in range(0, len(captions), pipeline.batch):
        rows = slice(first, first + pipeline.batch)
        some = given if given is None or len(given) == 1 else given[rows]
        chunks = latents(pipeline, captions[rows], seeds[rows], grid, sampler, guidance,
                         given=some, **options)
        z_0 = torch.cat(list(chunks), 1)
        clips.append(pipeline.codec.decode(z_0.cpu()))
    return torch.cat(clips)


def chunks_for(pipeline: Pipeline, frames: int) -> tuple[int, ...]:
    """Chunks, as trained and then on with the longest, for at least so many pixel frames."""
    chunks, length = list(pipeline.chunks), pipeline.codec.frames
    while length(sum(chunks)) < frames:
        chunks.append(max(chunks))
    while len(chunks) > 1 and length(sum(chunks[:-1])) >= frames:
        chunks.pop()
    return tuple(chunks)


def given_latents(pipeline: Pipeline, path: Path, is_image: bool, chunks) -> torch.Tensor:
    """Latents (1, F, C, h, w) of the chunks that an image or the start of a video fills; at least
    one chunk is left.

    An image fills a first chunk of one latent frame, or the first latent frame of a bidirectional
    model. Raises ValueError for what cannot be read or is too short, and for a video where a
    model makes whole clips.
    """
    length, ends = pipeline.codec.frames, chunk_ends(chunks)
    whole_clips = len(pipeline.chunks) == 1
    if whole_clips and not is_image:
        raise ValueError("--video: this model was trained on whole clips; use one trained with "
                         "--causal")
    if whole_clips and chunks[0] > 1:
        ends = [1]
    if is_image:
        video = media.read_picture(path, *sides(pipeline)).expand(length(1), -1, -1, -1)
    else:
        most = length(max(ends, default=1)) + 1
        video = media.read_video(path, *sides(pipeline), pipeline.fps, most)
    whole = max((end for end in ends if length(end) <= len(video)), default=0)
    if not whole:
        has = "a picture" if is_image else f"{len(video)} frames at {pipeline.fps:g} a second"
        raise ValueError(f"{path}: {has}; the first of the chunks {list(chunks)} takes "
                         f"{length(chunks[0])} frames, and one more must be left to generate")
    if length(whole) < len(video):
        print(f"{path}: its first {length(whole)} frames at {pipeline.fps:g} a second are used, "
              f"{ends.index(whole) + 1} whole chunks")
    return pipeline.codec.encode(media.from_pixels(video[None, :length(whole)]))


def read_picture(pipeline: Pipeline, path: Path, frames: int) -> tuple:
    """(image, condition) of the first frame of a clip of so many latent frames, for a network with
    image inputs: features (1, I, image_dim), or None where it takes none, and what is told of the
    clip (1, F, image_channels, h, w). Raises ValueError for what cannot be read."""
    frame = media.read_picture(path, *sides(pipeline))
    condition = pipeline.codec.condition(media.from_pixels(frame[None]), frames)
    return pipeline.picture(frame) if pipeline.picture else None, condition


def sides(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the model's clips."""
    height, width = pipeline.latent_shape[2:]
    return height * pipeline.codec.pixels, width * pipeline.codec.pixels
