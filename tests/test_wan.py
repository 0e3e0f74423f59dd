"""Weights in the public layouts, in and out, on tiny random models; real sizes on meta."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file

import checkpoint
import cli
import wan
from cache import Context
from distributed import generator
from flowmap import conditioned, euler_sample, first_frames_given, flow_map, time_grid
from golden import CAUSAL, ROLLOUT, ROLLOUT_SIDES, SMALL, inputs, network, rollout, theirs
from model import PRESETS, FlowMapDiT

PLAIN = replace(SMALL, second_time=False)
IMAGE = replace(PLAIN, image_channels=10, image_dim=28)
I2V_14B = replace(PRESETS["wan-14b"], image_channels=20, image_dim=1280)
BIG = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
WAN_CONFIGS = {
    "wan-1.3b": (PRESETS["wan-1.3b"],
                 dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
    "wan-14b": (PRESETS["wan-14b"], BIG),
    "wan-5b": (PRESETS["wan-5b"], dict(num_attention_heads=24, ffn_dim=14336, num_layers=30,
                                       in_channels=48, out_channels=48)),
    "wan-14b-i2v": (I2V_14B, dict(BIG, in_channels=36, out_channels=16, image_dim=1280,
                                  added_kv_proj_dim=5120))}


def state_of(config) -> dict:
    return {name: tensor.clone() for name, tensor in network(config).state_dict().items()}


def renamed(config, layout: str) -> dict:
    return {wan.their_name(name, layout): tensor for name, tensor in state_of(config).items()}


def finished_stage(folder, config, chunks=(3,), **settings):
    """A stage as train.py leaves it, of random weights."""
    folder.mkdir(parents=True)
    checkpoint.save_model(folder, state_of(config), config, is_main=True)
    record = {"config": {"shift": 5.0, "full_chunks": 3, **settings}, "chunks": list(chunks)}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def same(state, expected: dict):
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.fixture
def heads(tmp_path):
    """Tiny models have other heads than 128 wide: config.json says so."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": SMALL.heads}))
    return tmp_path


@pytest.mark.parametrize("layout", wan.LAYOUTS)
@pytest.mark.parametrize("wrapped, config_there", [
    ("bare", PLAIN), ("model.", PLAIN), ("generator_ema", PLAIN), ("bare", IMAGE)])
def test_both_layouts_load_bare_and_wrapped(heads, layout, wrapped, config_there):
    tensors = renamed(config_there, layout)
    if wrapped == "generator_ema":
        path = heads / "weights.pt"
        ema = {f"model.{name}": t for name, t in tensors.items()}
        torch.save({"generator": {}, "generator_ema": ema, "step": 3}, path)
    else:
        path = heads / "weights.safetensors"
        save_file({wrapped.replace("bare", "") + name: t for name, t in tensors.items()}, path)
    config, state = wan.load(path)
    assert config == config_there
    same(state, state_of(config_there))
    net = FlowMapDiT(config)
    checkpoint.load_weights(net, state, path)
    same(net.state_dict(), state_of(config_there))


def test_shards_with_an_index_load_and_a_missing_one_is_named(heads):
    tensors = renamed(SMALL, "diffusers")
    half = len(tensors) // 2
    parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    index = {name: f"part-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    for i, part in enumerate(parts):
        save_file(part, heads / f"part-{i}.safetensors")
    file = heads / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    config, state = wan.load(heads)
    assert config == SMALL
    same(state, state_of(SMALL))
    (heads / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match="names 2 files, of which part-1.safetensors are missing"):
        wan.load(heads)


def test_plain_weights_become_a_flow_map_and_a_causal_one(heads):
    save_file(renamed(PLAIN, "wan"), heads / "weights.safetensors")
    config, state = wan.load(heads, second_time=True, compressed=True)
    assert config == CAUSAL
    net, plain = FlowMapDiT(config).requires_grad_(False), network(PLAIN)
    checkpoint.load_weights(net, state, heads)
    z, t, _, text = inputs()
    torch.testing.assert_close(net(z, t, t, text), plain(z, t, t, text), rtol=1e-4, atol=1e-5)
    assert torch.equal(net.far_patch_embed.bias, plain.patch_embed.bias)
    # And back: what is not asked for is left out.
    save_file(renamed(CAUSAL, "diffusers"), heads / "weights.safetensors")
    config, state = wan.load(heads, second_time=False, compressed=False)
    assert config == PLAIN and not any("r_embed" in name or "far" in name for name in state)


@pytest.mark.parametrize("case, message", [
    ("missing", "tensor blocks.1.ffn.net.2.bias is missing"),
    ("left over", "tensor extra.weight, of shape .2, 2., is not of this"),
    ("shape", r"tensor blocks.0.attn1.to_q.weight has shape \(48, 47\), expected \(48, 48\)"),
    ("truncated", "weights.safetensors: truncated, or not a file of weights"),
    ("other", "neither Diffusers' nor Wan's names"),
    ("pickle", "holds more than tensors, which could run code"),
    ("empty", "expected one .safetensors, .pt or .pth file")])
def test_wrong_files_are_named(heads, case, message):
    tensors, path = renamed(SMALL, "diffusers"), heads / "weights.safetensors"
    if case == "missing":
        del tensors["blocks.1.ffn.net.2.bias"]
    elif case == "left over":
        tensors["extra.weight"] = torch.zeros(2, 2)
    elif case == "shape":
        tensors["blocks.0.attn1.to_q.weight"] = torch.zeros(48, 47)
    elif case == "other":
        tensors = {"a": torch.zeros(1)}
    if case == "pickle":
        torch.save({"model": print}, heads / "weights.pt")
    elif case != "empty":
        save_file(tensors, path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=message):
        wan.load(heads)


@pytest.mark.parametrize("preset", list(WAN_CONFIGS))
def test_every_tensor_of_real_wan_has_its_place(preset):
    """Names and shapes as Diffusers makes them from the published configs: no more, no less."""
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    config, arguments = WAN_CONFIGS[preset]
    with torch.device("meta"):
        there = diffusers.WanTransformer3DModel(**arguments, text_dim=4096, cross_attn_norm=True)
        ours = FlowMapDiT(replace(config, second_time=False))
    expected = {name: p.shape for name, p in there.named_parameters()}
    found = {wan.their_name(name, "diffusers"): p.shape for name, p in ours.named_parameters()}
    assert found == expected
    names = [wan.their_name(name, "wan") for name, _ in ours.named_parameters()]
    assert len(set(names)) == len(names) and all(names)


def image_inputs(batch=2):
    """z, t, r and the Context of an image-to-video network. For Diffusers the last 512 tokens are
    the prompt's."""
    z, t, r, _ = inputs(IMAGE, batch)
    g = generator("image")
    condition = torch.randn(batch, 3, IMAGE.image_channels, *z.shape[3:], generator=g)
    text = torch.randn(batch, 512, IMAGE.text_dim, generator=g)
    image = torch.randn(batch, 7, IMAGE.image_dim, generator=g)
    return z, t, r, Context(text, image=image, condition=condition)


def test_image_tokens_are_normed_and_answer_with_a_softmax_of_their_own():
    """The output is linear: it splits into the prompt's answer and the picture's."""
    net, (*_, context) = network(IMAGE), image_inputs()
    embed, attention = net.image_embed, net.blocks[0].cross_attn
    x, text = torch.randn(2, 2, 5, 48, generator=generator("tokens"))
    with torch.no_grad():
        embed.norm_in.weight.fill_(10)               # where the two GELUs differ
        h = nnf.layer_norm(context.image, (28,), embed.norm_in.weight, embed.norm_in.bias, 1e-5)
        h = nnf.gelu(nnf.linear(h, embed.mlp.up.weight, embed.mlp.up.bias))
        h = nnf.linear(h, embed.mlp.down.weight, embed.mlp.down.bias)
        image = nnf.layer_norm(h, (48,), embed.norm_out.weight, embed.norm_out.bias, 1e-5)
        torch.testing.assert_close(embed(context.image), image, rtol=1e-5, atol=1e-5)
        prompt, picture = attention.keys_values(text), attention.image_keys_values(image)
        rms = (picture[0] / attention.norm_k_image.weight).square().mean(2)
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)
        both = attention(x, *prompt, *picture)
        apart = attention(x, *prompt) + attention(x, *picture) - attention.out.bias
        torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_parity_of_the_image_to_video_network():
    pytest.importorskip("diffusers", minversion="0.42")
    z, t, r, context = image_inputs()
    with torch.no_grad():
        z_and_condition = torch.cat([z, context.condition], 2).transpose(1, 2)
        expected = theirs(IMAGE)(z_and_condition, 1000 * t, context.text, context.image).sample
        expected = expected.transpose(1, 2)
    ours = network(IMAGE)(z, t, r, context)
    assert (ours - expected).abs().max() < 1e-4 * expected.std()


def test_the_picture_is_data_of_the_context(heads):
    """Keys made beforehand, rows of a batch, chunks of a clip and a second time: the same network.
    Every part matters."""
    net, (z, t, r, context) = network(IMAGE), image_inputs()
    u = net(z, t, r, context)
    prompt = net.encode_prompt(context.text, context.image)
    encoded = replace(context, text=prompt, image=None)
    torch.testing.assert_close(net(z, t, r, encoded), u, rtol=1e-5, atol=1e-5)
    for c in (context, encoded):
        second = net(z[1:], t[1:], r[1:], c[torch.tensor([1])])
        torch.testing.assert_close(second, u[1:], rtol=1e-4, atol=1e-5)
    for name in ("text", "image", "condition"):
        other = replace(context, **{name: -getattr(context, name)})
        assert (net(z, t, r, other) - u).abs().max() > 1e-3
    # The condition has its place in the video: the second frame alone takes the second frame's.
    alone = net(z[:, 1:2], t, r, replace(context, start=1))
    of_second = replace(context, condition=context.condition[:, 1:2])
    torch.testing.assert_close(alone, net(z[:, 1:2], t, r, of_second), rtol=0, atol=1e-4)
    # As a flow map it is the same at r = t and looks at r elsewhere. Published weights hold a
    # tensor that is not used.
    unused = {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    save_file(renamed(IMAGE, "diffusers") | unused, heads / "weights.safetensors")
    config, state = wan.load(heads, second_time=True)
    student = FlowMapDiT(config)
    checkpoint.load_weights(student, state, heads)
    torch.testing.assert_close(student(z, t, t, context), u, rtol=1e-4, atol=1e-5)
    assert (student(z, t, r, context) - u).abs().max() > 1e-3
    student.blocks[0].checkpointing = True
    student(z, t, r, context).square().mean().backward()
    of_image = [p for name, p in student.named_parameters() if "image" in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in of_image)


def test_a_picture_that_is_missing_or_not_wanted_is_named():
    net, (z, t, r, context) = network(IMAGE), image_inputs()
    with pytest.raises(ValueError, match="needs the features of a picture"):
        net(z, t, r, replace(context, image=None))
    with pytest.raises(ValueError, match="nothing is there, this network wants .*10"):
        net(z, t, r, replace(context, condition=None))
    with pytest.raises(ValueError, match="this network wants .*3, 10"):
        net(z, t, r, replace(context, condition=context.condition[:, :2]))
    with pytest.raises(ValueError, match="takes no features of a picture"):
        network(PLAIN)(z, t, r, replace(context, condition=None))
    with pytest.raises(ValueError, match="wants nothing"):
        network(PLAIN)(z, t, r, replace(context, image=None))


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_an_exported_model_samples_alike_in_diffusers(tmp_path, causal, first_frame, steps):
    """Load, export, load in Diffusers and here again: same tensors, same latents step by step."""
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    config, chunks, sides = SMALL, (3,), (4, 2)
    if causal:
        config, chunks, sides = ROLLOUT, (1, 2, 1, 1), ROLLOUT_SIDES
    frames = sum(chunks)
    folder = wan.export(finished_stage(tmp_path / "distill", config, chunks), tmp_path / "out")
    same(wan.load(folder)[1], state_of(config))
    assert wan.load(folder)[0] == config
    pipe = (diffusers.AnyFlowFARPipeline if causal else diffusers.AnyFlowPipeline).from_pretrained(
        folder, text_encoder=None, tokenizer=None, vae=None)
    pipe.set_progress_bar_config(disable=True)
    same(dict(pipe.transformer.named_parameters()), renamed(config, "diffusers"))
    z, _, _, text = inputs(config, 1, frames, sides=sides)
    given = inputs(config, 1, 1, seed=3, sides=sides)[0]
    seen = []
    options = {"video_latents": given} if first_frame else {}
    if not causal:
        options |= {"callback_on_step_end": lambda pipe, i, t, kw: seen.append(kw["latents"]) or kw}
    theirs = pipe(prompt_embeds=text, latents=z.transpose(1, 2), height=8 * z.shape[3],
                  width=8 * z.shape[4], num_frames=4 * (frames - 1) + 1, num_inference_steps=steps,
                  output_type="latent", **options).frames
    theirs = theirs if theirs.shape == z.shape else theirs.transpose(1, 2)
    net, grid = network(config), time_grid(steps, 5.0)
    if causal:
        def jump(z, context):
            if first_frame and context.start == 0:
                return given
            return euler_sample(conditioned(net, context), z, grid)
        ours = rollout(net, jump, Context(text), z, chunks, 3)
    else:
        ours, u = z, conditioned(net, text)
        if first_frame:
            u = first_frames_given(u, given)
        for i, (t, r) in enumerate(zip(grid, grid[1:])):
            ours = flow_map(u, ours, torch.tensor([t]), torch.tensor([r]))
            assert (ours - seen[i])[:, first_frame:].abs().max() < 1e-4 * ours.std()
        ours = torch.cat([given[:, :first_frame], ours[:, first_frame:]], 1)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.std()


def test_export_refuses_what_diffusers_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="output_skip 1.0"):
        wan.export(finished_stage(tmp_path / "toy", PRESETS["tiny"]), tmp_path / "out")
    with pytest.raises(ValueError, match="--full-chunks above 0"):
        wan.export(finished_stage(tmp_path / "full", SMALL, (1, 2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        wan.export(finished_stage(tmp_path / "good", SMALL), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_teacher_is_exported_as_the_flow_map_that_training_starts_from(tmp_path):
    """On which an adapter that was trained on it, and is exported alone, is loaded."""
    config, state = wan.load(wan.export(finished_stage(tmp_path / "pretrain", PLAIN),
                                        tmp_path / "out"))
    assert config == SMALL
    for name, tensor in state_of(PLAIN).items():
        assert torch.equal(state[name], tensor)
        if name.startswith("time_embed."):
            assert torch.equal(state[name.replace("time_embed.", "r_embed.")], tensor)


def test_export_takes_the_other_parts_from_the_base(tmp_path):
    base, stage = tmp_path / "base", finished_stage(tmp_path / "distill", SMALL)
    for name in ("text_encoder", "tokenizer", "vae"):
        (base / name).mkdir(parents=True)
        (base / name / "config.json").write_text(name)
    index = {"text_encoder": ["transformers", "UMT5EncoderModel"],
             "tokenizer": ["transformers", "T5TokenizerFast"],
             "vae": ["diffusers", "AutoencoderKLWan"]}
    (base / "model_index.json").write_text(json.dumps(index))
    linked = wan.export(stage, tmp_path / "a", base)
    copied = wan.export(stage, tmp_path / "b", base, copy=True)
    assert (linked / "vae").is_symlink() and not (copied / "vae").is_symlink()
    for folder in (linked, copied):
        assert (folder / "vae" / "config.json").read_text() == "vae"
    assert json.loads((copied / "model_index.json").read_text())["vae"] == index["vae"]
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ValueError, match="base has no tokenizer"):
        wan.export(stage, tmp_path / "c", base)
    assert not [*tmp_path.glob("c*")]


def test_command_line(heads, capsys):
    save_file(renamed(PLAIN, "wan"), heads / "weights.safetensors")
    wan.main(["show", str(heads)])
    count = sum(t.numel() for t in state_of(PLAIN).values())
    assert f"{count:,} parameters" in capsys.readouterr().out
    for flags, message in ((["show", "nowhere"], "is not there"),
                           (["export", str(heads)], "needs --to"),
                           (["exprot", "x"], "did you mean export"),
                           (["export", "nowhere", "--to", "x"], "is not there")):
        with pytest.raises(SystemExit) as error:
            cli.run(lambda: wan.main(flags))         # noqa: B023
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_wans_own_names_are_these():
    """Written out: renaming there and back would not notice two names that are exchanged."""
    block = {"self_attn.q": "self_attn.q", "self_attn.k": "self_attn.k",
             "self_attn.v": "self_attn.v", "self_attn.out": "self_attn.o",
             "self_attn.norm_q": "self_attn.norm_q", "self_attn.norm_k": "self_attn.norm_k",
             "cross_attn.q": "cross_attn.q", "cross_attn.k": "cross_attn.k",
             "cross_attn.v": "cross_attn.v", "cross_attn.out": "cross_attn.o",
             "cross_attn.norm_q": "cross_attn.norm_q", "cross_attn.norm_k": "cross_attn.norm_k",
             "cross_attn.k_image": "cross_attn.k_img", "cross_attn.v_image": "cross_attn.v_img",
             "cross_attn.norm_k_image": "cross_attn.norm_k_img", "norm_cross": "norm3",
             "ffn.up": "ffn.0", "ffn.down": "ffn.2"}
    top = {"patch_embed": "patch_embedding", "time_embed.up": "time_embedding.0",
           "time_embed.down": "time_embedding.2", "time_proj": "time_projection.1",
           "text_embed.up": "text_embedding.0", "text_embed.down": "text_embedding.2",
           "image_embed.norm_in": "img_emb.proj.0", "image_embed.mlp.up": "img_emb.proj.1",
           "image_embed.mlp.down": "img_emb.proj.3", "image_embed.norm_out": "img_emb.proj.4",
           "head": "head.head"}
    for ours, wans in top.items():
        assert wan.their_name(f"{ours}.weight", "wan") == f"{wans}.weight"
    for ours, wans in block.items():
        assert wan.their_name(f"blocks.7.{ours}.bias", "wan") == f"blocks.7.{wans}.bias"
    assert wan.their_name("blocks.7.modulation", "wan") == "blocks.7.modulation"
    assert wan.their_name("head_modulation", "wan") == "head.modulation"


def test_an_export_keeps_shift_and_gate(tmp_path):
    config = replace(SMALL, gate=0.5)
    folder = wan.export(finished_stage(tmp_path / "distill", config, shift=3.0), tmp_path / "out")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 3.0 and wan.load(folder)[0] == config
    assert wan.read_record(folder, config)["config"]["shift"] == 3.0


def test_heads_are_128_wide_where_nothing_says_otherwise(tmp_path):
    config = replace(PLAIN, dim=256, heads=2, layers=1)
    save_file(renamed(config, "wan"), tmp_path / "weights.safetensors")
    assert wan.load(tmp_path)[0] == config


def test_weights_that_changed_anywhere_have_another_fingerprint(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2**20)}, file)                   # 4 MB, read in part
    before = wan.fingerprint(file)
    save_file({"a": (torch.arange(2**20) >= 2**19).float()}, file)
    assert wan.fingerprint(file) != before
