"""What makes clips: a trained network between the encoders that it was trained behind. For sample.py, eval.py and Python:

    pipeline = load_pipeline("runs/toy-shapes/distill")
    clips = generate(pipeline, ["a red circle moving left"], seeds=[0], grid=flowmap.time_grid(4, shift=5.0))

Legend:  B batch   F latent frames, C channels, h, w   T pixel frames   H, W picture
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from safetensors.torch import load_file

import backward_sim
import checkpoint
import data
import distributed
import encoders
import flowmap
import lora
import wan
from model import Context, FlowMapDiT, remember

SAMPLERS = ("euler", "consistency")


@dataclass
class Pipeline:
    """What is needed to sample."""
    network: FlowMapDiT
    codec: object                # encoders.PatchPCA or encoders.WanCodec
    words: object                # encoders.Words or encoders.WanText: prompts to features (B, T, D)
    config: dict                 # of training: shift, guidance, full_chunks, ...
    latent_shape: tuple          # (F, C, h, w)
    chunks: tuple                # latent frames of each chunk; one chunk for a bidirectional model
    null_prompt: str = ""        # what stands for no prompt
    picture: object = None       # encoders.WanPicture, for networks that see the features of their first frame
    batch: int = 48              # clips made at a time
    fps: int = 8                 # frames a second of a clip
    adapter: str = ""            # of the network, that is sampled


def load_pipeline(path, device="cpu", base=None, frames: int = 81, height: int = 480, width: int = 832,
                  tiling: bool = False, bf16: bool | None = None, chunks=None) -> Pipeline:
    """The pipeline of a finished stage, RUN/STAGE, or of Wan or AnyFlow weights (see wan.load).

    base: Wan pipeline folder with text encoder and autoencoder, for networks of Wan's latents. frames, height, width: of
    the clips, in pixels, where the weights come without a run. chunks: latent frames of each chunk, in place of `frames`, for
    causal weights whose file does not say so; without a compressed patch embedding (Self-Forcing, Krea) every past chunk is
    seen in full. tiling: of the autoencoder, see encoders.WanCodec. bf16: of the network's weights and products (None: for
    Wan's networks on a GPU). Raises ValueError for weights that do not fit each other, the size or the chunks.
    """
    path = Path(path)
    model_config, state, adapter = wan.load_apart(path, base)
    own = (path / "model.safetensors").exists()
    record = json.loads((path / "config.json").read_text()) if own else {}
    if own and chunks:
        raise ValueError(f"--chunks: {path} was trained with chunks of {record['chunks']}; ask for another length with --frames")
    if "vocabulary" not in record:
        if not base:
            raise ValueError(f"{path} works on Wan's latents: give the folder of Wan's text encoder and autoencoder with --base")
        codec = encoders.WanCodec(base, device, tiling)
        if codec.channels != model_config.channels:
            raise ValueError(f"{path} works on latents of {model_config.channels} channels, but the autoencoder of {base} makes "
                             f"{codec.channels}: give --base the folder that belongs to the weights")
    if not own:
        side = codec.pixels * model_config.patch * (2 if model_config.compressed else 1)
        if height % side or width % side:
            raise ValueError(f"--height {height} and --width {width} must be multiples of {side} for these weights")
        if (frames - 1) % codec.stride and not chunks and not model_config.compressed:
            raise ValueError(f"--frames {frames} must be {codec.stride} n + 1 for these weights")
        record = wan.read_record(path, model_config, -(-(frames - 1) // codec.stride) + 1, chunks)
        record["latent_shape"] = (sum(record["chunks"]), model_config.channels, height // codec.pixels, width // codec.pixels)
    bf16 = "vocabulary" not in record and torch.device(device).type != "cpu" if bf16 is None else bf16
    with torch.device("meta"):
        network, name = FlowMapDiT(model_config), "trained" if adapter else ""
        if adapter:                                      # kept apart: a bf16 base could not hold what it adds
            lora.add_adapter(network, name, adapter["rank"], adapter["alpha"])
    network = network.to(torch.bfloat16 if bf16 else torch.float32).to_empty(device=device).eval().requires_grad_(False)
    checkpoint.load_weights(network, state, path)
    if adapter:
        checkpoint.load_weights(lora.Adapted(network, name), adapter["tensors"], path)
    if "vocabulary" in record:
        codec = encoders.PatchPCA.from_state(load_file(path / "codec.safetensors"))
        words = encoders.Words(record["vocabulary"], network.config.text_dim, record["text_length"])
        of_wan = {}
    else:
        words = encoders.WanText(base, device, record.get("text_length", 512))
        picture = encoders.WanPicture(base, device) if model_config.image_dim else None
        of_wan = {"null_prompt": encoders.NEGATIVE_PROMPT, "picture": picture, "batch": 1, "fps": codec.fps}
    return Pipeline(network, codec, words, record["config"], tuple(record["latent_shape"]), tuple(record["chunks"]), adapter=name,
                    **of_wan)


@torch.no_grad()
def latents(pipeline: Pipeline, captions: list[str], seeds: list[int], grid: list[float],
            sampler: str = "euler", guidance: float = 1.0, chunks=None, given: torch.Tensor | None = None, window: int | None = None,
            prompt_at: dict[int, str] | None = None, picture: tuple | None = None):
    """Yields the latents (B, F of a chunk, C, h, w) of clips chunk by chunk, one clip for each caption and seed; a
    bidirectional model yields its one chunk.

    chunks: latent frames of each chunk (default: as trained); more than trained make a longer video. given: latents (B or
    1, F, C, H, W) of the first frames, whole chunks of them, which are kept as they are (image- and video-to-video); a
    bidirectional model keeps any number of them but all, at t = 0. picture: for a network with image inputs, what
    `read_picture` makes of its first frame. window: how many past chunks are remembered (None: as many as in training,
    which long videos need; 0: all). prompt_at: another caption for all clips from chunk m on. guidance: classifier-free
    guidance, for a teacher; 1 for flow maps, which have theirs built in.
    Raises ValueError for a caption with unknown words, a grid that does not fall from 1 to 0, a `given` that does not
    end where a chunk ends, or a picture that is missing or not wanted.
    """
    net, device = pipeline.network, next(pipeline.network.parameters()).device
    flowmap.check_grid(grid)
    if chunks and len(pipeline.chunks) == 1:
        raise ValueError("this model was trained on whole clips (without --causal): it has one length and one chunk")
    window = len(pipeline.chunks) - 1 if window is None else window
    chunks, frames = tuple(chunks or pipeline.chunks), 0 if given is None else given.shape[1]
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    if frames and frames not in (ends[:-1] if len(chunks) > 1 else range(chunks[0])):
        raise ValueError(f"{frames} given latent frames: must be whole chunks of {list(chunks)}, and not all of them")
    given, features, known = (m if m is None else m.to(device).expand(len(captions), *m.shape[1:])
                              for m in (given, *(picture or (None, None))))
    prompts = {0: captions, **{m: [text] * len(captions) for m, text in (prompt_at or {}).items()}}
    # Keys and values of each prompt are made once, and again from the chunk on where it changes.
    texts = {m: pipeline.words(text) for m, text in prompts.items()}
    null = net.read(pipeline.words([pipeline.null_prompt] * len(captions)).to(device), features) if guidance != 1 else None
    z_1 = distributed.noise((sum(chunks), *pipeline.latent_shape[1:]), "sample", slots=seeds).to(device)
    renoise = distributed.noise_stream("renoise", slots=seeds)

    def with_prompt(contexts):
        """The contexts (conditional, empty prompt) of a chunk; at a new prompt, with its keys."""
        m = ends.index(contexts[0].start) + 1 if contexts[0].start else 0
        return (replace(contexts[0], text=net.read(texts[m].to(device), features)), contexts[1]) if m in texts else contexts

    def jump(z, contexts):
        start = contexts[0].start
        kept = z[:, :0] if given is None else given[:, start:start + z.shape[1]]
        if kept.shape[1] == z.shape[1]:
            return kept
        u = flowmap.conditioned(net, contexts[0])
        if guidance != 1:
            u = flowmap.guided(u, flowmap.conditioned(net, contexts[1]), guidance)
        if kept.shape[1]:
            u = flowmap.first_frames_given(u, kept)
        z_0 = flowmap.euler_sample(u, z, grid) if sampler == "euler" else flowmap.consistency_sample(u, z, grid, renoise)
        return torch.cat([kept, z_0[:, kept.shape[1]:]], 1)

    def write(contexts, z_0):
        return with_prompt(tuple(remember(net, context, z_0, pipeline.config["full_chunks"], window) if context else None
                                 for context in contexts))

    start = Context(None, known=known, adapter=pipeline.adapter)
    contexts = with_prompt((start, replace(start, text=null) if guidance != 1 else None))
    yield from backward_sim.chunk_by_chunk(jump, write, contexts, z_1, chunks)


def stream(pipeline: Pipeline, *args, **options):
    """Yields clips chunk by chunk, (B, T of a chunk, 3, H, W) in [-1, 1] on the CPU; arguments and errors as for `latents`."""
    decode = pipeline.codec.decoder()
    for z_0 in latents(pipeline, *args, **options):
        yield decode(z_0.cpu())


def generate(pipeline: Pipeline, captions: list[str], seeds: list[int], grid: list[float],
             sampler: str = "euler", guidance: float = 1.0, **options) -> torch.Tensor:
    """Whole clips (B, T, 3, H, W) in [-1, 1] on the CPU, pipeline.batch at a time; arguments and errors as for `latents`.

    A seed decides its clip whatever else is in the batch.
    """
    clips = []
    for first in range(0, len(captions), pipeline.batch):
        rows = slice(first, first + pipeline.batch)
        given = options.get("given")
        some = options | {"given": given if given is None or len(given) == 1 else given[rows]}
        z_0 = torch.cat(list(latents(pipeline, captions[rows], seeds[rows], grid, sampler, guidance, **some)), 1)
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
    """Latents (1, F, C, H, W) of the chunks that an image or the start of a video fills; at least one chunk is left.

    An image fills a first chunk of one latent frame, or the first latent frame of a bidirectional model. Raises ValueError
    for what cannot be read or is too short, and for a video where the model makes whole clips.
    """
    length, ends = pipeline.codec.frames, [sum(chunks[: i + 1]) for i in range(len(chunks) - 1)]
    if len(chunks) == 1 and is_image:
        ends = [1] * (chunks[0] > 1)
    elif len(chunks) == 1:
        raise ValueError("--video: this model was trained on whole clips; use one trained with --causal")
    frames = read_frames(path, is_image) * (length(1) if is_image else 1)
    whole = max((end for end in ends if length(end) <= len(frames)), default=0)
    if not whole:
        raise ValueError(f"{path}: {len(frames)} frames; the first chunk takes {length(chunks[0])}, and one more must be left to "
                         f"generate")
    if length(whole) < len(frames):
        print(f"{path}: {length(whole)} of its {len(frames)} frames are used, {ends.index(whole) + 1} whole chunks")
    video = torch.stack([fit(pipeline, frame) for frame in frames[: length(whole)]])
    return pipeline.codec.encode(video[None].float() / 127.5 - 1)


def read_picture(pipeline: Pipeline, path: Path) -> tuple:
    """What a network with image inputs is told of its first frame: features (1, I, image_dim), or None where it takes none,
    and what is known of the clip (1, F, image_channels, h, w). Raises ValueError for what cannot be read."""
    frame = fit(pipeline, read_frames(path, is_image=True)[0])
    known = pipeline.codec.known(frame[None].float() / 127.5 - 1, pipeline.latent_shape[0])
    return pipeline.picture(frame) if pipeline.picture else None, known


def read_frames(path: Path, is_image: bool) -> list[np.ndarray]:
    try:
        return [iio.imread(path)] if is_image else list(iio.imiter(path))
    except data.DECODER_ERRORS as error:
        raise ValueError(f"{path}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def fit(pipeline: Pipeline, frame: np.ndarray) -> torch.Tensor:
    """A frame at the size of the model's clips, (3, H, W) uint8."""
    return data.fit_frame(frame, *(side * pipeline.codec.pixels for side in pipeline.latent_shape[2:]))
