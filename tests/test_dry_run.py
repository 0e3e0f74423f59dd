"""From a folder of videos to a clip in Diffusers: encode, three stages, export. On tiny random
models in the real layouts."""
import argparse
import json
import shlex
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import distributed
import encoders
import flowmap
import media
import play
import sample
import train
import wan
from cache import teacher_forced
from config import STAGES, parse_config
from model import FlowMapDiT

pytest.importorskip("diffusers", minversion="0.42")
pytest.importorskip("transformers")
CAPTIONS = ["a red ball rolls", "a blue ball rolls", "a red box falls"]
CAUSAL = "--causal --chunks 1,1,1 --full-chunks 2"
SMALL = "--frames 9 --height 32 --width 64".split()


def flags_of(text: str, *values) -> list[str]:
    """The words of `text`, and then the values, which may hold spaces."""
    return [*text.split(), *map(str, values)]


def trained(run, stage: str, shards, *flags):
    """A stage of two updates, on shards."""
    text = f"--preset wan-1.3b --stage {stage} --data {shards} --run-dir {run} --steps 2"
    argv = flags_of(f"{text} --batch-size 2 --no-bf16", *flags)
    return train.train(parse_config(argv))


def three_stages(run, shards, base, rank: int, causal: str):
    """The folder of the last one; causal: flags of the student's stages."""
    options = flags_of(f"--lr 1e-3 --lora-rank {rank}")
    trained(run, "pretrain", shards, *options, "--base", base)
    for stage in STAGES[1:]:
        folder = trained(run, stage, shards, *options, *causal.split())
    return folder


def clip_of(pipeline, caption: str, seed: int, grid, *args, **options) -> torch.Tensor:
    """Latents (1, F, C, h, w)."""
    return torch.cat(list(sample.latents(pipeline, [caption], [seed], grid, *args, **options)), 1)


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def normal(shape, *keys) -> torch.Tensor:
    return torch.randn(*shape, generator=distributed.generator(*keys))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Wan2.1 pipeline folder, all tiny and random."""
    import diffusers
    import tokenizers
    import transformers
    folder = tmp_path_factory.mktemp("wan")
    known = sorted({word for caption in CAPTIONS for word in caption.split()})
    places = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *known])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(places, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>").save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=len(places), d_model=20, d_kv=8, d_ff=32, num_layers=2,
        num_heads=2)).save_pretrained(folder / "text_encoder")
    diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True]).save_pretrained(folder / "vae")
    tiny_transformer().save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer": ["diffusers", "WanTransformer3DModel"]}))
    return folder


def tiny_transformer(**options):
    import diffusers
    sizes = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16,
                 out_channels=16, text_dim=20, freq_dim=32, ffn_dim=64, num_layers=2,
                 cross_attn_norm=True)
    return diffusers.WanTransformer3DModel(**(sizes | options))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i, caption in enumerate(CAPTIONS):
        clip = np.random.default_rng(i).integers(0, 255, (12, 40, 72, 3), dtype=np.uint8)
        iio.imwrite(folder / f"{i}.mp4", clip, fps=16, codec="libx264", macro_block_size=2)
        (folder / f"{i}.txt").write_text(caption)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("a red ball rolls")
    return folder


def encode(base, videos, out, *flags):
    data.main([*encode_flags(base, videos, out), "--clips-per-shard", "2", *flags])
    return out


def encode_flags(base, videos, out) -> list[str]:
    return flags_of(f"encode --videos {videos} --base {base} --out {out} --text-length 8 --dtype "
                    f"float32", *SMALL)


@pytest.fixture(scope="module")
def shards(base, videos, tmp_path_factory):
    return encode(base, videos, tmp_path_factory.mktemp("shards") / "out")


def test_shards_hold_what_the_encoders_say(base, videos, shards, capsys):
    found = data.Shards(shards)
    assert len(found) == 3 and found.latent_shape == (3, 16, 4, 8)
    assert found.null_text.shape == (8, 20)
    latents, text, _ = found.draw(range(3), seed=5)
    codec, words = encoders.WanCodec(base), encoders.WanText(base, length=8)
    rows = [(text == words([caption])).all(2).all(1).nonzero().item() for caption in CAPTIONS]
    assert sorted(rows) == [0, 1, 2]
    for i, row in enumerate(rows):
        video = data.read_clip(videos / f"{i}.mp4", 9, 32, 64, 16)[None].float() / 127.5 - 1
        close(latents[row], codec.encode(video)[0])
    # Zero after the prompt's 4 words and </s>.
    assert not text[rows[0], 5:].any() and text[rows[0], :5].any(1).all()
    data.main(["check", str(shards)])
    assert "3 clips" in capsys.readouterr().out


def test_encoding_goes_on_where_it_was_killed_and_in_parts(base, videos, shards, tmp_path, capsys,
                                                           monkeypatch):
    out = tmp_path / "out"
    flags = [*encode_flags(base, videos, out), "--clips-per-shard", "1"]
    encode, calls = encoders.WanCodec.encode, []

    def killed(self, video):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, video)
    monkeypatch.setattr(encoders.WanCodec, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        data.main(flags)
    assert not (out / "manifest.json").exists() and len(list(out.glob("part-*.safetensors"))) == 2
    data.main(flags)
    assert len(calls) == 4                                       # only the third clip was left
    assert "broken.mp4: cannot be read" in capsys.readouterr().err
    for rank in (1, 0):                                          # two processes, each its part
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        data.main([*flags, "--out", str(tmp_path / "two")])      # the last --out counts
    sums = {folder: sorted(data.Shards(folder).draw(range(3))[0].flatten(1).sum(1).tolist())
            for folder in (out, tmp_path / "two", shards)}
    assert sums[out] == pytest.approx(sums[shards], rel=1e-4)
    assert sums[tmp_path / "two"] == pytest.approx(sums[shards], rel=1e-4)


def test_damaged_shards_are_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    victim = next((tmp_path / "copy").glob("part-*.safetensors"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is not what was written"):
        data.main(["check", str(tmp_path / "copy")])
    victim.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{victim.name}: missing, or not the"):
        data.Shards(tmp_path / "copy")


@pytest.mark.parametrize("rank", ["0", "4"])
@pytest.mark.parametrize("flags", ["", CAUSAL])
def test_three_stages_export_and_the_same_latents_in_diffusers(base, videos, tmp_path, flags, rank,
                                                               capsys):
    """Frames of 128 tokens for the causal network: else Diffusers' cached step pads with zero keys
    (LOG.md)."""
    import diffusers
    height, width = (128, 256) if flags else (32, 64)
    size = flags_of(f"--height {height} --width {width}")
    shards = encode(base, videos, tmp_path / "shards", *size)
    made = three_stages(tmp_path / "run", shards, base, rank, flags)
    assert made.name == ("causal-distill" if flags else "distill")
    out = wan.export(made, tmp_path / "out", base)
    theirs = diffusers.AnyFlowFARPipeline if flags else diffusers.AnyFlowPipeline
    pipe = theirs.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    ours = sample.load_pipeline(made, base=base)
    again = sample.load_pipeline(out, base=base, frames=9, height=height, width=width)
    assert (again.chunks, again.latent_shape) == (ours.chunks, ours.latent_shape)
    assert again.config["full_chunks"] == (2 if flags else 0)
    ours.words.length = 512
    z, grid = distributed.noise(ours.latent_shape, "sample", slots=[7]), flowmap.time_grid(2, 5.0)
    video = pipe(prompt=CAPTIONS[0], output_type="pt", latents=z.transpose(1, 2), height=height,
                 width=width, num_frames=9, num_inference_steps=2).frames
    mine = sample.generate(ours, [CAPTIONS[0]], [7], grid)
    assert mine.shape == (1, 9, 3, height, width) == video.shape
    close(mine, video * 2 - 1, 1e-3, 1e-3)
    merged = sample.generate(again, [CAPTIONS[0]], [7], grid)
    close(merged, mine, 1e-3, 1e-3)
    # The same from the command line, from the exported folder, and streamed.
    sample.main(flags_of(f"--ckpt {out} --base {base} --frames 9 --steps 2 --stream --out "
                         f"{tmp_path / 'clip.mp4'} --prompt", CAPTIONS[0], *size))
    assert iio.imread(tmp_path / "clip.mp4").shape[0] == 9
    assert "first chunk after" in capsys.readouterr().out


def test_far_weights_without_a_config_have_the_released_chunks(base, tmp_path):
    """As in AnyFlow's own training checkpoints: tensors under `ema`, in Diffusers' layout, and
    nothing that says how long chunks are. Sampled and exported as the causal network they are."""
    import diffusers
    file, size = tmp_path / "weights.pt", {"base": base, "height": 32, "width": 64}
    config, state = wan.load(base, second_time=True, compressed=True)
    ema = {wan.their_name(name, "diffusers"): state[name] for name in state}
    torch.save({"ema": ema, "step": 1}, file)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    ours = sample.load_pipeline(file, **size)
    assert ours.chunks == (1, 3, 3, 3, 3, 3, 3, 2) and ours.config["full_chunks"] == 3
    # Whatever is asked for, so that a long video's window is that of training.
    assert sample.load_pipeline(file, frames=321, **size).chunks == ours.chunks
    out = wan.export(file, tmp_path / "out", base)
    pipe = diffusers.AnyFlowFARPipeline.from_pretrained(out)
    assert type(pipe.transformer) is diffusers.AnyFlowFARTransformer3DModel
    assert pipe.transformer.config.chunk_partition == [1, 3, 3, 3, 3, 3, 3, 2]
    # What a scheduler and a config beside the weights say counts.
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "FlowMapEulerDiscreteScheduler", "shift": 3.0}))
    assert sample.load_pipeline(out, **size).config["shift"] == 3.0
    own = json.loads((out / "transformer" / "config.json").read_text())
    (out / "transformer" / "config.json").write_text(json.dumps(own | {"deltatime_type": "t-r"}))
    with pytest.raises(ValueError, match="second time is 't-r'"):
        wan.load(out)


def test_a_video_that_is_not_there_is_skipped(base, videos, tmp_path, capsys):
    links = shutil.copytree(videos, tmp_path / "links")
    (links / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (links / "gone.txt").write_text(CAPTIONS[0])
    assert len(data.Shards(encode(base, links, tmp_path / "out"))) == 3
    assert "skipped gone.mp4: No such file" in capsys.readouterr().err


def test_shards_of_other_settings_do_not_mix(base, videos, shards, tmp_path):
    encode(base, videos, tmp_path / "out")
    for flags, message in (("--fps 8", "was begun with fps = 16, not 8.0"),
                           ("--frames 5", "was begun with frames = 9, not 5")):
        with pytest.raises(ValueError, match=message):
            encode(base, videos, tmp_path / "out", *flags.split())
    for name, content in (("0.txt", "another caption"), ("0.mp4", (videos / "1.mp4").read_bytes())):
        other = shutil.copytree(videos, tmp_path / name)
        (other / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match="clips that are not in"):
            encode(base, other, tmp_path / "out")
    more = shutil.copytree(videos, tmp_path / "more")            # elsewhere, and one more
    shutil.copy(videos / "0.mp4", more / "new.mp4")
    (more / "new.txt").write_text(CAPTIONS[0])
    encode(base, more, tmp_path / "added")
    shutil.copytree(tmp_path / "out", tmp_path / "grown")
    encode(base, more, tmp_path / "grown")
    assert len(data.Shards(tmp_path / "grown")) == len(data.Shards(tmp_path / "added")) == 4
    assert len(data.Shards(tmp_path / "out")) == 3


@pytest.mark.parametrize("stage", STAGES[:2])
def test_an_adapter_alone_is_loaded_by_diffusers(base, shards, tmp_path, stage):
    """The base as a flow map, the adapter as a LoRA file: the latents of the merged weights."""
    import diffusers
    pytest.importorskip("peft")
    run = tmp_path / "run"
    flags = flags_of("--lora-rank 4 --lora-alpha 12 --steps 3 --lr 3e-2 --warmup 0 --ema-start 0 "
                     "--ema-decay 0")
    for name in STAGES[:STAGES.index(stage) + 1]:
        start = ["--base", base] if name == "pretrain" else []
        trained(run, name, shards, *flags, *start)
    wan.main(flags_of(f"export {base} --to {tmp_path / 'start'} --base {base}"))
    wan.main(flags_of(f"export {run / stage} --to {tmp_path / 'lora.safetensors'}"))
    wan.main(flags_of(f"export {run / stage} --to {tmp_path / 'merged'} --base {base}"))
    with pytest.raises(ValueError, match="is there already"):
        wan.export_adapter(run / stage, tmp_path / "lora.safetensors")
    plain = diffusers.AnyFlowPipeline.from_pretrained(tmp_path / "start")
    whole = diffusers.AnyFlowPipeline.from_pretrained(tmp_path / "merged")

    def velocity(pipe):
        z, text = normal((1, 3, 16, 4, 8), "z"), normal((1, 8, 20), "text")
        t = torch.full((1, 3), 700.0)
        with torch.no_grad():
            return pipe.transformer(hidden_states=z, timestep=t, r_timestep=t / 2,
                                    encoder_hidden_states=text, return_dict=False)[0]
    before = velocity(plain)
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    close(velocity(plain), velocity(whole))
    assert (velocity(plain) - before).abs().max() > 1e-2


def test_streamed_decoding_is_whole_decoding(base):
    codec = encoders.WanCodec(base)
    latents = normal((1, 5, 16, 4, 6), "stream")
    decode = codec.decoder()
    pieces = [decode(part) for part in latents.split([1, 2, 2], 1)]
    assert [piece.shape[1] for piece in pieces] == [1, 8, 8]
    close(torch.cat(pieces, 1), codec.decode(latents), atol=1e-5)


def test_a_teacher_makes_the_shards_that_it_is_distilled_on(base, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.json", tmp_path / "shards"
    prompts.write_text(json.dumps([{"prompt_en": CAPTIONS[0]}, CAPTIONS[1]]))
    flags = flags_of(f"--ckpt {base} --base {base} --steps 2 --prompts {prompts} --per-prompt 2",
                     *SMALL)
    sample.main([*flags, "--save-latents", str(out)])
    found = data.Shards(out)
    assert len(found) == 4 and found.latent_shape == (3, 16, 4, 8) and found.null_text.any()
    teacher = sample.load_pipeline(base, base=base, frames=9, height=32, width=64)
    clip = clip_of(teacher, CAPTIONS[1], 3, flowmap.time_grid(2, 5.0), guidance=5.0)
    assert any(torch.equal(clip[0].bfloat16().float(), row) for row in found.draw(range(4))[0])
    sample.main([*flags, "--save-latents", str(out)])            # nothing is left to do
    stage = trained(tmp_path / "run", "pretrain", out, "--base", base)
    assert (stage / "model.safetensors").exists()
    # Fine-tuned, it is sampled at the guidance of its recipe, not at that of Wan's pipeline, 5.
    sample.main(flags_of(f"--ckpt {stage} --base {base} --steps 1 --save-latents "
                         f"{tmp_path / 'tuned'} --prompt", CAPTIONS[0]))
    used = json.loads((tmp_path / "tuned" / "made_by.json").read_text())["guidance"]
    assert used == json.loads((stage / "config.json").read_text())["config"]["guidance"] < 5
    sample.main([*flags, "--vbench", "--out", str(tmp_path / "vbench")])
    assert sorted(file.name for file in (tmp_path / "vbench").iterdir()) == [
        f"{caption}-{i}.mp4" for caption in sorted(CAPTIONS[:2]) for i in range(2)]


@pytest.fixture
def text_encoder(monkeypatch):
    """What Wan's text encoder is told: "to" (a move of its weights) and "forward"."""
    import transformers
    calls = []

    def count(name, method):
        def counted(self, *args, **options):
            calls.append(name)
            return method(self, *args, **options)
        monkeypatch.setattr(transformers.UMT5EncoderModel, name, counted)
    for name in ("to", "forward"):
        count(name, getattr(transformers.UMT5EncoderModel, name))
    return calls


def test_the_text_encoder_moves_once_for_many_prompts(base, videos, tmp_path, text_encoder):
    """In and out once, and every prompt encoded once: three captions and the empty one; two, each
    for two clips with guidance, and the empty one; one for a clip without guidance."""
    encode(base, videos, tmp_path / "videos")
    assert text_encoder == ["to", *["forward"] * 4, "to"]
    flags = flags_of(f"--ckpt {base} --base {base} --steps 1 --prompt", CAPTIONS[0], *SMALL)
    text_encoder.clear()
    sample.main([*flags, "--prompt", CAPTIONS[1], "--per-prompt", "2", "--save-latents",
                 str(tmp_path / "made")])
    assert text_encoder == ["to", *["forward"] * 3, "to"]
    text_encoder.clear()
    sample.main([*flags, "--per-prompt", "2", "--guidance", "1", "--out", str(tmp_path / "a.mp4")])
    assert text_encoder == ["to", "forward", "to"]


def test_features_of_a_prompt_do_not_depend_on_others_and_old_ones_are_dropped(base):
    words, alone = encoders.WanText(base, length=8), encoders.WanText(base, length=8)
    words.prepare([CAPTIONS[0], *map(str, range(130)), CAPTIONS[1]])
    assert torch.equal(words([CAPTIONS[1], CAPTIONS[0]])[0], alone([CAPTIONS[1]])[0])
    assert len(words.kept) == 130 and {CAPTIONS[0], CAPTIONS[1], "129"} <= set(words.kept)
    words(CAPTIONS[2:])
    assert len(words.kept) == 129 and "2" not in words.kept and CAPTIONS[2] in words.kept


def test_causal_weights_of_others_are_sampled_chunk_by_chunk(base, tmp_path, monkeypatch):
    """As Self-Forcing's: Wan's own layout in a training checkpoint, every past chunk in full, the
    consistency sampler; against the network asked about the whole clip at once."""
    _, state = wan.load(base)
    ema = {f"model.{wan.their_name(name, 'wan')}": state[name] for name in state}
    file = tmp_path / "weights.pt"
    torch.save({"generator_ema": ema}, file)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2}))
    chunks, grid = (1, 2, 2), flowmap.time_grid(3, 5.0)
    ours = sample.load_pipeline(file, base=base, height=32, width=64, chunks=chunks)
    assert ours.chunks == chunks and ours.latent_shape == (5, 16, 4, 8)
    assert ours.config["full_chunks"] == 0
    mine = clip_of(ours, CAPTIONS[0], 7, grid, "consistency")
    clip = distributed.noise(ours.latent_shape, "sample", slots=[7])
    renoise = distributed.noise_stream("renoise", slots=[7])
    text, stop = ours.words([CAPTIONS[0]]), 0
    for i, frames in enumerate(chunks):
        start, stop = stop, stop + frames
        past = clip[:, :start]
        whole = teacher_forced(ours.network, clip[:, :stop], text, chunks[:i + 1], 0)

        def u(z, t, r, past=past, whole=whole):
            return ours.network(torch.cat([past, z], 1), t, r, whole)[:, past.shape[1]:]
        clip[:, start:stop] = flowmap.consistency_sample(u, clip[:, start:stop], grid, renoise)
    assert (mine - clip).abs().max() < 1e-4 * clip.std()
    calls, forward, out = [], FlowMapDiT.forward, tmp_path / "clip.mp4"
    monkeypatch.setattr(FlowMapDiT, "forward", lambda *args: calls.append(1) or forward(*args))
    for more, length, expected in (("", 17, 6), ("--frames 25", 25, 8)):
        calls.clear()
        sample.main(flags_of(f"--base {base} --ckpt {file} --chunks 1,2,2 --height 32 --width 64 "
                             f"--steps 2 --sampler consistency --out {out} {more} --prompt",
                             CAPTIONS[0]))
        assert iio.imread(out).shape[0] == length and len(calls) == expected   # none for guidance


# --- image-to-video

IMAGE = torch.randint(256, (32, 64, 3), generator=distributed.generator("picture")).byte()


def with_parts(base, folder, **parts):
    """A copy of the pipeline folder with other parts."""
    for name in ("tokenizer", "text_encoder", "vae"):
        (folder / name).symlink_to(base / name)
    for name, part in parts.items():
        (folder / name).unlink(missing_ok=True)
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def base_i2v(base, tmp_path_factory):
    """As Wan2.1-I2V: a picture is given as CLIP's features and as latents beside the clip's."""
    import transformers
    torch.manual_seed(2)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=28, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    network = tiny_transformer(in_channels=36, image_dim=28, added_kv_proj_dim=48)
    return with_parts(base, tmp_path_factory.mktemp("i2v"), image_encoder=clip,
                      image_processor=processor, transformer=network)


@pytest.fixture(scope="module")
def base_5b(base, tmp_path_factory):
    """As Wan2.2-TI2V-5B: 48 channels, of 16 x 16 pixels."""
    import diffusers
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.5] * 48)
    network = tiny_transformer(in_channels=48, out_channels=48)
    return with_parts(base, tmp_path_factory.mktemp("5b"), vae=vae, transformer=network)


@pytest.mark.parametrize("kind, height, width", [("i2v", 32, 64), ("5b", 64, 96)])
def test_image_to_video_is_that_of_diffusers(request, tmp_path, kind, height, width):
    """Same latents for the same noise, with guidance; the command line makes a clip of its size."""
    import diffusers
    folder = request.getfixturevalue(f"base_{kind}")
    picture = tmp_path / "start.png"
    iio.imwrite(picture, IMAGE.numpy())
    ours = sample.load_pipeline(folder, base=folder, frames=9, height=height, width=width)
    assert ours.fps == (24 if kind == "5b" else 16)
    if kind == "i2v":
        image, condition = sample.read_picture(ours, picture, sum(ours.chunks))
        options, without = {"picture": (image, condition)}, {"picture": (image, 0 * condition)}
        image_parts = {"image_encoder": ours.picture.encoder,
                       "image_processor": ours.picture.processor}
    else:
        options, without, image_parts = {}, {}, {}
        options["given"] = sample.given_latents(ours, picture, True, ours.chunks)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=ours.words.tokenizer, text_encoder=ours.words.encoder, vae=ours.codec.vae,
        transformer=diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer"),
        scheduler=scheduler, expand_timesteps=kind == "5b", **image_parts)
    pipe.set_progress_bar_config(disable=True)
    z = distributed.noise(ours.latent_shape, "sample", slots=[7])
    import PIL.Image
    first = media.read_picture(picture, height, width)
    start = PIL.Image.fromarray(first.permute(1, 2, 0).numpy())
    expected = pipe(start, CAPTIONS[0], encoders.NEGATIVE_PROMPT, height=height, width=width,
                    num_frames=9, num_inference_steps=4, guidance_scale=3.0,
                    latents=z.transpose(1, 2), output_type="latent").frames.transpose(1, 2)
    grid = scheduler.sigmas.tolist()
    mine = clip_of(ours, CAPTIONS[0], 7, grid, guidance=3.0, **options)
    assert (mine - expected).abs().max() < 1e-4 * expected.std()
    other = clip_of(ours, CAPTIONS[0], 7, grid, guidance=3.0, **without)
    assert (mine - other).abs().max() > 1e-2 * expected.std()    # the picture does count
    factor, out = 128 // height, tmp_path / "clip.mp4"           # media.to_pixels magnifies
    for more in ("", "--stream"):
        sample.main(flags_of(f"--ckpt {folder} --base {folder} --frames 9 --height {height} "
                             f"--width {width} --steps 2 --image {picture} --out {out} {more} "
                             f"--prompt", CAPTIONS[0]))
        assert iio.imread(out).shape == (9, height * factor, width * factor, 3)


def test_a_given_first_frame_is_kept_and_the_network_sees_it_at_time_0(base_5b):
    ours = sample.load_pipeline(base_5b, base=base_5b, frames=9, height=64, width=96)
    given, seen = normal((1, 1, 48, 4, 6), "given"), []
    hook = ours.network.register_forward_pre_hook(lambda net, args: seen.append(args))
    captions = CAPTIONS[:2]
    clips = torch.cat(list(sample.latents(ours, captions, [1, 2], [1.0, 0.5, 0.0], given=given)), 1)
    hook.remove()
    assert torch.equal(clips[:, :1], given.expand(2, -1, -1, -1, -1)) and len(seen) == 2
    for (z, t, r, _), (high, low) in zip(seen, [(1.0, 0.5), (0.5, 0.0)]):
        assert torch.equal(z[:, :1], given.expand(2, -1, -1, -1, -1))
        assert t.tolist() == [[0.0, high, high]] * 2 and r.tolist() == [[low, low, low]] * 2


def test_the_autoencoder_of_wan22_both_ways_streamed_and_in_tiles(base_5b):
    codec = encoders.WanCodec(base_5b)
    assert (codec.channels, codec.pixels, codec.stride, codec.fps) == (48, 16, 4, 24)
    video = torch.rand(1, 9, 3, 64, 96, generator=distributed.generator("video")) * 2 - 1
    z = codec.encode(video)
    expected = codec.vae.encode(video.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(z, (expected - 0.1) / 1.5)
    whole, decode = codec.decode(z), codec.decoder()
    assert whole.shape == video.shape
    close(torch.cat([decode(part) for part in z.split([1, 2], 1)], 1), whole, atol=1e-5)


def test_tiles_are_those_of_diffusers(base):
    import diffusers
    z = normal((2, 2, 16, 40, 40), "tiles")
    whole = encoders.WanCodec(base).decode(z)
    tiled = encoders.WanCodec(base, tiling=True).decode(z)
    vae = diffusers.AutoencoderKLWan.from_pretrained(base / "vae")
    vae.enable_tiling()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    scaled = z.transpose(1, 2) * std + mean
    with torch.no_grad():
        clips = torch.cat([vae.decode(row[None]).sample for row in scaled])
    expected = clips.transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(tiled, expected)
    assert 1e-4 < (tiled - whole).abs().max() and (tiled - whole).abs().mean() < 0.1


def test_bf16_weights_make_nearly_the_same_clip(base):
    clips = []
    for bf16 in (None, False, True):
        ours = sample.load_pipeline(base, base=base, frames=9, height=32, width=64, bf16=bf16)
        assert next(ours.network.parameters()).dtype == (torch.bfloat16 if bf16 else torch.float32)
        clips.append(clip_of(ours, CAPTIONS[0], 3, flowmap.time_grid(4, 5.0), guidance=5.0))
    assert torch.equal(clips[0], clips[1]) and clips[2].dtype == torch.float32
    assert 0 < (clips[2] - clips[0]).std() < 0.05 * clips[0].std()


@pytest.mark.parametrize("weights, parts, flags, message", [
    ("i2v", "i2v", "", "is an image-to-video network: give its first frame with --image"),
    ("i2v", "plain", "--image a.png", "has no image_processor"),
    ("5b", "plain", "", "works on latents of 48 channels, but the autoencoder of"),
    ("5b", "5b", "--height 48", "must be multiples of 32"),
    ("5b", "5b", "--video a.mp4", "trained on whole clips"),
    ("plain", "plain", "--tiling --stream", "give one of them"),
    ("plain", "gone", "", "has no vae: give --base")])
def test_pictures_weights_and_autoencoders_that_do_not_fit(
        base, base_i2v, base_5b, weights, parts, flags, message, tmp_path, monkeypatch):
    folder = {"plain": base, "i2v": base_i2v, "5b": base_5b, "gone": tmp_path / "gone"}
    monkeypatch.chdir(tmp_path)
    iio.imwrite("a.png", IMAGE.numpy())
    with pytest.raises(ValueError, match=message):
        sample.main(flags_of(f"--ckpt {folder[weights]} --base {folder[parts]} --frames 9 --height "
                             f"64 --width 96 --steps 1 --out c.mp4 {flags} --prompt", CAPTIONS[0]))
    assert not (tmp_path / "c.mp4").exists()


@pytest.mark.parametrize("flags, message", [
    ("--frames 80", "--frames 80 must be 4 n"), ("--height 48", "multiples of 32")])
def test_sizes_that_the_autoencoder_cannot_take(base_5b, videos, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        encode(base_5b, videos, tmp_path / "o", "--height", "64", *flags.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags, rank", [("", 0), (CAUSAL, 4)])
def test_an_image_to_video_network_is_distilled(base_i2v, videos, shards, tmp_path, flags, rank,
                                                monkeypatch):
    """Shards made with its folder hold what it is told of first frames; three stages see it, also
    when the prompt is dropped."""
    made = encode(base_i2v, videos, tmp_path / "shards")
    found = data.Shards(made)
    assert found.conditioning == ("image", "condition") and data.Shards(shards).conditioning == ()
    latents, _, told = found.draw(range(3))
    codec = encoders.WanCodec(base_i2v)
    for i in range(3):
        first = data.read_clip(videos / f"{i}.mp4", 9, 32, 64, 16)[0]
        condition = codec.condition(first[None].float() / 127.5 - 1, 3)
        row = (told["condition"] - condition).flatten(1).norm(dim=1).argmin()
        close(told["condition"][row], condition[0])
        close(told["image"][row], encoders.WanPicture(base_i2v)(first)[0])
        close(latents[row, :1], condition[0, :1, 4:])            # the first frame is its own latent
    seen, forward = [], FlowMapDiT.run_blocks

    def noted(net, z, embed, e, context, **more):
        seen.append(context)
        return forward(net, z, embed, e, context, **more)
    monkeypatch.setattr(FlowMapDiT, "run_blocks", noted)
    picture, out = tmp_path / "start.png", tmp_path / "clip.mp4"
    stage = three_stages(tmp_path / "run", made, base_i2v, rank, flags)
    assert {context.condition.shape[1:] for context in seen} == {(3, 20, 4, 8)}
    assert {context.image.shape[1:] for context in seen} == {(5, 28)}
    iio.imwrite(picture, IMAGE.numpy())
    sample.main(flags_of(f"--ckpt {stage} --base {base_i2v} --steps 2 --image {picture} "
                         f"--out {out} --prompt", CAPTIONS[0]))
    assert iio.imread(out).shape[0] == 9
    if flags:                                        # longer than it was trained
        sample.main(flags_of(f"--ckpt {stage} --base {base_i2v} --steps 1 --image {picture} "
                             f"--frames 17 --out {out} --prompt", CAPTIONS[0]))
        assert iio.imread(out).shape[0] == 17


def test_what_training_and_export_do_not_do(base_i2v, shards, tmp_path):
    missing = "image-to-video network, and --data .* has no first frames: make shards with"
    with pytest.raises(ValueError, match=missing):
        trained(tmp_path / "run", "pretrain", shards, "--base", base_i2v)
    with pytest.raises(ValueError, match="no class for a flow map with Wan2.1-I2V"):
        wan.export(base_i2v, tmp_path / "out", base_i2v)
    (tmp_path / "a14b" / "transformer_2").mkdir(parents=True)
    with pytest.raises(ValueError, match="Wan2.2-A14B"):
        wan.load(tmp_path / "a14b")


def test_the_page_makes_clips_of_wan_weights_in_any_words_step_by_step(base, monkeypatch):
    args = argparse.Namespace(run_dir=None, ckpt=base, base=base, frames=5, height=32, width=64)
    player, events = play.Player(args, "cpu"), []
    assert player.state()["captions"] == [] and list(player.models) == ["euler"]     # a teacher
    asked = player.check({"mode": "compare", "model": "euler", "prompt": "a red Box, falling",
                          "seed": 1, "steps": 2})
    player.make(asked, events.append)
    assert [event.get("step") for event in events] == [1, 2, None]
    assert len(events[-1]["frames"]) == 5
    made = []
    monkeypatch.setattr(sample, "write_clip", lambda path, video, fps: made.append(video))
    sample.main(shlex.split(events[-1]["command"])[2:])
    assert made[0].shape == (5, 3, 32, 64)
    assert play.pictures(made[0]) == events[-1]["frames"]


def test_a_prompt_is_cleaned_as_for_wan():
    pytest.importorskip("ftfy")
    seen, words = [], object.__new__(encoders.WanText)

    def tokenizer(texts, **options):
        seen.extend(texts)
        raise InterruptedError
    words.tokenizer, words.length = tokenizer, 8
    with pytest.raises(InterruptedError):
        words.encode(" a  caf\u00c3\u00a9 &amp;amp;\n bar ")
    assert seen == ["a caf\u00e9 & bar"]
