"""From a folder of videos to a clip in Diffusers, on tiny random models in the real layouts: encode, three stages, export."""
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import distributed
import flowmap
import sample
import train
import wan

pytest.importorskip("diffusers", minversion="0.42")
pytest.importorskip("transformers")
CAPTIONS = ["a red ball rolls", "a blue ball rolls", "a red box falls"]
SIZE = ["--frames", "9", "--height", "32", "--width", "64"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Wan2.1 pipeline folder: tokenizer, UMT5 encoder, autoencoder and transformer, all tiny and random."""
    import diffusers
    import tokenizers
    import transformers
    folder = tmp_path_factory.mktemp("wan")
    words = ["<pad>", "</s>", "<unk>", *sorted({word for caption in CAPTIONS for word in caption.split()})]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                                     unk_token="<unk>")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=len(words), d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    parts = {
        "tokenizer": tokenizer, "text_encoder": transformers.UMT5EncoderModel(config),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                          temperal_downsample=[False, True, True]),
        "transformer": diffusers.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24,
                                                       in_channels=16, out_channels=16, text_dim=20, freq_dim=32,
                                                       ffn_dim=64, num_layers=2, cross_attn_norm=True)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "WanPipeline", "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "vae": ["diffusers", "AutoencoderKLWan"],
        "transformer": ["diffusers", "WanTransformer3DModel"]}))
    return folder


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


@pytest.fixture(scope="module")
def shards(base, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    data.main(["encode", "--videos", str(videos), "--base", str(base), "--out", str(out), *SIZE, "--text-length", "8",
               "--clips-per-shard", "2", "--dtype", "float32"])
    return out


def test_shards_hold_what_the_encoders_say(base, videos, shards, capsys):
    found = data.Shards(shards)
    assert len(found) == 3 and found.latent_shape == (3, 16, 4, 8) and found.text_shape == (8, 20)
    latents, text = found.draw(range(3), seed=5)
    codec, words = wan.Codec(base), wan.Text(base, length=8)
    rows = [torch.where((text == words([caption])).all(2).all(1))[0].item() for caption in CAPTIONS]
    assert sorted(rows) == [0, 1, 2]
    for row, i in zip(rows, range(3)):
        video = data.read_clip(videos / f"{i}.mp4", 9, 32, 64, 16)[None].float() / 127.5 - 1
        torch.testing.assert_close(latents[row], codec.encode(video)[0], rtol=1e-4, atol=1e-4)
    assert not text[rows[0], 5:].any() and text[rows[0], :5].any(1).all()           # zero after the prompt's 4 words and </s>
    data.main(["check", str(shards)])
    assert "3 clips" in capsys.readouterr().out


def test_encoding_goes_on_where_it_was_killed_and_in_parts(base, videos, shards, tmp_path, capsys, monkeypatch):
    flags = ["encode", "--videos", str(videos), "--base", str(base), "--out", str(tmp_path / "out"), *SIZE, "--text-length", "8",
             "--clips-per-shard", "1", "--dtype", "float32"]
    encode, calls = wan.Codec.encode, []

    def killed(self, video):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, video)
    monkeypatch.setattr(wan.Codec, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        data.main(flags)
    assert not (tmp_path / "out" / "manifest.json").exists() and len(list((tmp_path / "out").glob("part-*.safetensors"))) == 2
    data.main(flags)
    assert len(calls) == 4                                       # only the third clip was left
    assert "skipped broken.mp4" in capsys.readouterr().err
    for rank in (1, 0):                                          # two processes, each its part
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        data.main([*flags, "--out", str(tmp_path / "two")])      # the last --out counts
    for folder in ("out", "two"):
        mine, whole = (sorted(s.draw(range(3))[0].flatten(1).sum(1).tolist()) for s in (data.Shards(tmp_path / folder), data.Shards(shards)))
        assert mine == pytest.approx(whole, rel=1e-4)


def test_damaged_shards_are_named(shards, tmp_path):
    import shutil
    shutil.copytree(shards, tmp_path / "copy")
    victim = next((tmp_path / "copy").glob("part-*.safetensors"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit):
        data.main(["check", str(tmp_path / "copy")])
    victim.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{victim.name}: missing, or not the"):
        data.Shards(tmp_path / "copy")


@pytest.mark.parametrize("rank", ["0", "4"])
@pytest.mark.parametrize("flags", [[], ["--causal", "--chunks", "1,1,1", "--full-chunks", "2"]])
def test_three_stages_export_and_the_same_latents_in_diffusers(base, shards, tmp_path, flags, rank, capsys):
    import diffusers
    run = tmp_path / "run"
    for stage in train.STAGES:
        start = ["--base", str(base)] if stage == "pretrain" else []
        train.train(train.parse_config(["--preset", "wan-1.3b", "--stage", stage, "--data", str(shards), "--run-dir", str(run),
                                        "--steps", "2", "--batch-size", "2", "--no-bf16", "--lr", "1e-3", "--lora-rank", rank, *start, *flags]))
    out = wan.export(run / "distill", tmp_path / "out", base)
    pipe = (diffusers.AnyFlowFARPipeline if flags else diffusers.AnyFlowPipeline).from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    ours = sample.load_pipeline(run / "distill", base=base)
    assert sample.load_pipeline(out, base=base, frames=9, height=32, width=64).chunks == ours.chunks
    ours.words.length = 512
    z = distributed.noise(ours.latent_shape, "sample", slots=[7])
    options = dict(latents=z.transpose(1, 2), height=32, width=64, num_frames=9, num_inference_steps=2)
    grid = flowmap.time_grid(2, 5.0)
    # With chunks of 8 tokens Diffusers' cached step pads with zero keys (LOG.md): its latents are compared elsewhere.
    video = pipe(prompt=CAPTIONS[0], output_type="pt", **options).frames
    mine = sample.generate(ours, [CAPTIONS[0]], [7], grid)
    assert mine.shape == (1, 9, 3, 32, 64) == video.shape
    if not flags:
        torch.testing.assert_close(mine, video * 2 - 1, rtol=1e-3, atol=1e-3)
    # The same from the command line, from the exported folder, and streamed.
    sample.main(["--ckpt", str(out), "--base", str(base), "--frames", "9", "--height", "32", "--width", "64", "--steps", "2",
                 "--prompt", CAPTIONS[0], "--out", str(tmp_path / "clip.mp4"), "--stream"])
    assert iio.imread(tmp_path / "clip.mp4").shape[0] == 9 and "first chunk after" in capsys.readouterr().out


def test_an_adapter_alone_is_loaded_by_diffusers(base, shards, tmp_path):
    """The base as a flow map and the adapter as a LoRA file: the same latents as the merged weights."""
    import diffusers
    pytest.importorskip("peft")
    run = tmp_path / "run"
    for stage in train.STAGES[:2]:
        start = ["--base", str(base)] if stage == "pretrain" else []
        train.train(train.parse_config(["--preset", "wan-1.3b", "--stage", stage, "--data", str(shards), "--run-dir", str(run),
                                        "--lora-rank", "4", "--lora-alpha", "12", "--steps", "3", "--batch-size", "2", "--warmup", "0",
                                        "--ema-start", "0", "--ema-decay", "0", "--no-bf16", "--lr", "3e-2", *start]))
    wan.main(["export", str(base), "--to", str(tmp_path / "start"), "--base", str(base)])
    wan.main(["export", str(run / "flowmap"), "--to", str(tmp_path / "lora.safetensors")])
    wan.main(["export", str(run / "flowmap"), "--to", str(tmp_path / "merged"), "--base", str(base)])
    with pytest.raises(ValueError, match="is there already"):
        wan.export_adapter(run / "flowmap", tmp_path / "lora.safetensors")
    plain, whole = (diffusers.AnyFlowPipeline.from_pretrained(tmp_path / name) for name in ("start", "merged"))
    inputs = [torch.randn(1, 16, 3, 4, 8, generator=distributed.generator("z")), torch.tensor([700.0]),
              torch.randn(1, 8, 20, generator=distributed.generator("text"))]

    def velocity(pipe):
        z, t, text = inputs
        with torch.no_grad():
            return pipe.transformer(hidden_states=z.transpose(1, 2), timestep=t[:, None].expand(1, 3), r_timestep=t[:, None].expand(1, 3) / 2,
                                    encoder_hidden_states=text, return_dict=False)[0]
    before = velocity(plain)
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    torch.testing.assert_close(velocity(plain), velocity(whole), rtol=1e-4, atol=1e-4)
    assert (velocity(plain) - before).abs().max() > 1e-2


def test_streamed_decoding_is_whole_decoding(base):
    codec = wan.Codec(base)
    latents = torch.randn(1, 5, 16, 4, 6, generator=distributed.generator("stream"))
    decode = codec.decoder()
    pieces = [decode(part) for part in latents.split([1, 2, 2], 1)]
    assert [piece.shape[1] for piece in pieces] == [1, 8, 8]
    torch.testing.assert_close(torch.cat(pieces, 1), codec.decode(latents), rtol=1e-4, atol=1e-5)


def test_a_teacher_makes_the_shards_that_it_is_distilled_on(base, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.json", tmp_path / "shards"
    prompts.write_text(json.dumps([{"prompt_en": CAPTIONS[0]}, CAPTIONS[1]]))
    flags = ["--ckpt", str(base), "--base", str(base), "--frames", "9", "--height", "32", "--width", "64", "--steps", "2",
             "--prompts", str(prompts), "--count", "2"]
    sample.main([*flags, "--save-latents", str(out)])
    found = data.Shards(out)
    assert len(found) == 4 and found.latent_shape == (3, 16, 4, 8) and found.null_text.any()
    teacher = sample.load_pipeline(base, base=base, frames=9, height=32, width=64)
    clip = torch.cat(list(sample.latents(teacher, [CAPTIONS[1]], [3], flowmap.time_grid(2, 5.0), guidance=5.0)), 1)
    assert any(torch.equal(clip[0].bfloat16().float(), row) for row in found.draw(range(4))[0])
    sample.main([*flags, "--save-latents", str(out)])            # nothing is left to do
    run = train.train(train.parse_config(["--preset", "wan-1.3b", "--data", str(out), "--base", str(base), "--run-dir",
                                          str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", "--no-bf16"]))
    assert (run / "model.safetensors").exists()
    sample.main([*flags, "--vbench", "--out", str(tmp_path / "vbench")])
    assert sorted(file.name for file in (tmp_path / "vbench").iterdir()) == [
        f"{caption}-{i}.mp4" for caption in sorted(CAPTIONS[:2]) for i in range(2)]
