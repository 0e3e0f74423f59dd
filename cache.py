"""The KV cache of causal generation (docs/method.md, 7): which chunks the network knows,
which chunk sees which, and how a finished chunk is appended.

A chunk is a few latent frames that are made together. `network` is a callable as FlowMapDiT, with
its method `encode`, which turns clean latents into the keys and values that later chunks see.

Legend:  B batch   F latent frames   C latent channels   H, W latent height and width
         L tokens of a chunk   S tokens of a frame   D width   T text tokens   I image tokens
"""
import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class CachedChunk:
    """A clean chunk in the cache: keys, before rotation, and values of every layer, (B, L, D)."""
    start: int                    # position in the video of its first frame
    frames: int
    stride: int                   # 1; 2 if compressed: patches that a token covers, each way
    keys_values: tuple            # of (keys, values), one a layer

    @property
    def stop(self) -> int:
        """Position in the video of the first frame after it."""
        return self.start + self.frames

    @property
    def tokens(self) -> int:
        return self.keys_values[0][0].shape[1]


@dataclass(frozen=True)
class Context:
    """What a call of the network knows beside z and its times. Never changed in place:
    `append_chunk` makes a new one, so that a checkpointed block computes the same in backward."""
    text: torch.Tensor | tuple    # prompt features (B, T, text_dim), or what `encode_prompt` makes
    cache: tuple[CachedChunk, ...] = ()  # compressed chunks, then full ones, in the video's order
    start: int = 0                # position in the video of z's first frame
    chunks: tuple[int, ...] = ()  # frames of each chunk of z; none: z is one chunk
    adapter: str = ""             # the adapter (lora.py) that is added to the weights; none: as is
    full_latents: tuple = ()      # append_chunk's: clean latents of full chunks, to encode again
    # Image-to-video alone:
    image: torch.Tensor | None = None      # features (B, I, image_dim), unless `text` has them
    condition: torch.Tensor | None = None  # mask and picture latents, channels beside z's:
                                           # (B, frames of the video, image_channels, H, W)

    def __getitem__(self, rows) -> "Context":
        """The same for some samples of the batch."""
        cached = (replace(c, keys_values=rows_of(c.keys_values, rows)) for c in self.cache)
        return replace(self,
                       text=rows_of(self.text, rows),
                       cache=tuple(cached),
                       full_latents=rows_of(self.full_latents, rows),
                       image=rows_of(self.image, rows),
                       condition=rows_of(self.condition, rows))


def rows_of(value, rows):
    """Samples of a tensor, or of every tensor in nested tuples; None stays None."""
    if isinstance(value, tuple):
        return tuple(rows_of(part, rows) for part in value)
    return None if value is None else value[rows]


def attention_spans(context: Context, chunks, S: int, prefill: bool) -> list:
    """Which keys each chunk of z may see: (first query, last query + 1, [(first key, last + 1)]).

    Keys are the cache's, then z's own, S a frame. A chunk sees itself and the cached chunks that
    end before it starts. prefill: z is clean and is about to be cached (FlowMapDiT.encode), and a
    chunk also sees the chunks of z before it.
    """
    cached = sum(chunk.tokens for chunk in context.cache)
    spans = []
    query, frame = 0, context.start              # counted in tokens of z, in frames of the video
    for frames in chunks:
        query_stop = query + frames * S
        seen = sum(chunk.tokens for chunk in context.cache if chunk.stop <= frame)
        first = cached if prefill else cached + query
        if seen == first:                        # two ranges that touch are one: no copy
            ranges = [(0, cached + query_stop)]
        else:
            ranges = [(0, seen), (first, cached + query_stop)]
        spans.append((query, query_stop, ranges))
        query, frame = query_stop, frame + frames
    return spans


def teacher_forced(network, x: torch.Tensor, context, chunks, full_chunks: int) -> Context:
    """The context in which the last chunks of a clip are trained: each sees clean chunks before it.

    x (B, F, C, H, W) clean latents, context: prompt features, or a Context without a cache, chunks:
    frames of each chunk, adding up to F. The last `full_chunks` are trained, older ones compressed;
    0 trains all and compresses none. The result's `start` is the first frame that is trained. A
    clip of one chunk makes the bidirectional context: nothing but what `context` holds.
    """
    if not isinstance(context, Context):
        context = Context(context)
    full = full_chunks or len(chunks)
    old, new = chunks[:-full], chunks[-full:]
    start, last = sum(old), sum(chunks[:-1])
    cache = ()
    if old:
        cache = network.encode(x[:, :start], replace(context, chunks=old), compressed=True)
    context = replace(context, cache=cache, start=start, chunks=new)
    if len(new) == 1:
        return context
    # Nobody sees the clean copy of the last chunk.
    clean = network.encode(x[:, start:last], replace(context, chunks=new[:-1]))
    return replace(context, cache=cache + clean)


def newest(cache: tuple, count: float) -> tuple:
    """The last `count` chunks, or as many as there are."""
    return cache[max(0, len(cache) - count):]


def append_chunk(network, context: Context, z_0: torch.Tensor, full_chunks: int,
                 window: int = 0) -> Context:
    """The context of the next chunk, once z_0 (B, F, C, H, W) is finished. context: what
    this made for the chunk before, or one without a cache.

    The next chunk sees itself and the `full_chunks` - 1 chunks before it in full, older ones
    compressed (0: all in full). A chunk that leaves the full ones is compressed once: it sees only
    compressed chunks, so its keys never change. The full ones that remain are encoded again, since
    their past has one compressed chunk more. window > 0: only the last `window` chunks are kept,
    and the `full_chunks` - 1 full ones in any case. Older ones are dropped before anything is
    encoded, so that with the window of training no chunk sees more of the past than there.
    """
    start = context.start + z_0.shape[1]
    window = window or math.inf
    if not full_chunks:
        cache = newest(context.cache, window - 1)
        cache += network.encode(z_0, replace(context, cache=cache))
        return replace(context, cache=cache, start=start)

    full = [*context.full_latents, z_0]
    cache = tuple(chunk for chunk in context.cache if chunk.stride > 1)
    first = start - sum(z.shape[1] for z in full)
    if len(full) >= full_chunks:
        leaving = full.pop(0)
        places = window - len(full)                  # for compressed chunks, this one included
        cache = newest(cache, places - 1)
        if places > 0:
            before = replace(context, cache=cache, start=first, chunks=())
            cache += network.encode(leaving, before, compressed=True)
        first += leaving.shape[1]
    if full:
        lengths = tuple(z.shape[1] for z in full)
        before = replace(context, cache=cache, start=first, chunks=lengths)
        cache += network.encode(torch.cat(full, 1), before)
    return replace(context, cache=cache, start=start, full_latents=tuple(full))
