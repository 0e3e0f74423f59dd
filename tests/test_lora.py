"""Adapters: they start as nothing, merge to rounding, and three on one base are three networks."""
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import checkpoint
import distributed
import dmd
import flowmap
import lora
import networks
import pipeline
import updates
import wan
from cache import Context, teacher_forced
from checkpoint import Tensors
from config import Config, parse_config
from model import PRESETS, FlowMapDiT

CONFIG = replace(PRESETS["tiny"], compressed=True)
NAMES = ("student", "teacher", "fake")
RANK, ALPHA = 4, 8.0


def randn(*shape, key):
    key = key if isinstance(key, tuple) else (key,)
    return torch.randn(shape, generator=distributed.generator(*key))


def random_state(net, seed, scale=0.2) -> dict:
    """Random tensors for a network or an adapter, by name."""
    return {name: scale * randn(*p.shape, key=(seed, name)) for name, p in net.named_parameters()}


@pytest.fixture
def shared():
    """(one base with three random adapters, the same as three networks with merged weights)."""
    base = FlowMapDiT(CONFIG)
    weights = random_state(base, "base")
    base.load_state_dict(weights)
    adapted, apart = {}, {}
    base.requires_grad_(False)
    for name in NAMES:
        score = name != "student"
        lora.add_adapter(base, name, RANK, ALPHA, lora.SCORE if score else ())
        adapted[name] = lora.Adapted(base, name)
        state = random_state(adapted[name], name)
        checkpoint.load_weights(adapted[name], state, "test")
        merged = Tensors(lora.merged(weights, state, ALPHA / RANK))
        config, merged = wan.as_asked(CONFIG, merged, not score, not score)
        apart[name] = FlowMapDiT(config)
        checkpoint.load_weights(apart[name], merged, "test")
    return adapted, apart


def inputs():
    x, n = randn(2, 4, 48, 4, 4, key="x"), randn(2, 4, 48, 4, 4, key="n")
    return x, n, randn(2, 3, 64, key="text"), torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.4])


def losses(nets):
    """Every loss of causal distill: two chunks trained after a compressed one, a whole rollout."""
    x, n, text, t, r = inputs()
    c = Config(stage="distill", causal=True, chunks="1,1,2", full_chunks=2)
    dropped = torch.tensor([False, True])
    rollout = updates.Rollout(flowmap.time_grid(4, 5.0), 1, n, [])
    batch = updates.Batch(x=x, n=n[:, 1:], text=text, null_text=0 * text, dropped=dropped,
                          guided_rows=torch.tensor([0]), conditioning={}, chunks=(1, 1, 2), start=1,
                          t=t, r=r, roles=(0, 0, 2), some_gap=True, rollout=rollout, tau=t,
                          tau_noise=n, fake_t=t, fake_noise=n)
    z_0 = torch.cat(list(updates.roll_out(nets["student"], batch, rollout, c, graph="all")), 1)
    gradient = updates.score_gradient(z_0.detach(), nets["teacher"], nets["fake"], batch, c)
    return {"flow map": updates.flow_map_error(nets["student"], batch, c),
            "dmd": dmd.dmd_loss(z_0, gradient),
            "fake": updates.fake_score_error(nets["fake"], batch, z_0)}


def test_three_adapters_on_one_base_are_three_networks(shared):
    adapted, apart = shared
    mine, theirs = losses(adapted), losses(apart)
    for name, loss in mine.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-5)
    pair = adapted["student"].network.blocks[0].ffn.up.adapters["student"]
    up, = torch.autograd.grad(mine["dmd"].sum(), pair.up)
    weight, = torch.autograd.grad(theirs["dmd"].sum(), apart["student"].blocks[0].ffn.up.weight)
    torch.testing.assert_close(up, ALPHA / RANK * weight @ pair.down.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["student", "fake"])
def test_a_loss_reaches_its_own_adapter_only(shared, name):
    adapted, _ = shared
    losses(adapted)["dmd" if name == "student" else "fake"].sum().backward()
    reached = {key for key, p in adapted[name].network.named_parameters() if p.grad is not None}
    assert reached and all(f".adapters.{name}." in key for key in reached)
    # All of it but the compressed chunks' embedding: the rollout encodes the data without gradient.
    names = [key for key, _ in adapted[name].named_parameters()]
    pieces = {key for key in names if not key.startswith("far_patch_embed")}
    assert {key.replace(f".adapters.{name}.", ".") for key in reached} >= pieces


def test_checkpointing_computes_again_with_the_adapter_that_was_asked_for(shared):
    """Other adapters are asked between forward and backward; a hidden active one would show."""
    adapted, _ = shared
    x, n, text, t, r = inputs()
    results = []
    pairs = [p for name, p in adapted["student"].named_parameters()
             if name.endswith((".down", ".up"))]
    for on in (False, True):
        for block in adapted["student"].network.blocks:
            block.checkpointing = on
        u = adapted["student"](x, t, r, Context(text))
        adapted["teacher"](x, t, r, Context(text))
        results.append(torch.autograd.grad(u.square().sum(), pairs))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_its_seed(shared):
    adapted, _ = shared
    net = adapted["student"].network
    lora.add_adapter(net, "new", RANK, ALPHA)
    weights = {n: p for n, p in net.named_parameters() if ".adapters." not in n}
    new = lora.Adapted(net, "new")
    makers = [lora.fresh_adapter(new, weights, partial(distributed.generator, seed))
              for seed in (0, 0, 1)]
    checkpoint.load_weights(new, Tensors(makers[0]), "test")
    x, _, text, t, r = inputs()
    for context in (Context(text), teacher_forced(new, x, text, (1, 1, 2), 2)):
        z = x[:, context.start:]
        assert torch.equal(new(z, t, r, context), net(z, t, r, replace(context, adapter="")))
    first, same, other = ({name: make() for name, make in m.items()} for m in makers)
    for name, tensor in first.items():
        if name.endswith(".down"):                   # uniform within 1 / sqrt(D_in)
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_taking_out_again_is_exact_to_rounding(shared, dtype):
    """What an adapter adds is kept, as a bf16 base could not hold it: merged weights are fp32."""
    adapted, _ = shared
    weights = {n: p.to(dtype) for n, p in adapted["student"].network.named_parameters()
               if ".adapters." not in n}
    state = {n: p.detach() * (1e-3 if n.endswith("up") else 1)
             for n, p in adapted["student"].named_parameters() if not n.startswith(lora.REPLACED)}
    there = Tensors(lora.merged(weights, state, ALPHA / RANK))
    back = Tensors(lora.merged(there, state, -ALPHA / RANK))
    for name, tensor in weights.items():
        path = name.removesuffix(".weight")
        tensor, added = tensor.detach().float(), torch.zeros_like(tensor, dtype=torch.float32)
        if f"{path}.up" in state:
            added = ALPHA / RANK * state[f"{path}.up"] @ state[f"{path}.down"]
        difference = there[name].float() - tensor
        torch.testing.assert_close(difference, added, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(back[name].float(), tensor, rtol=1e-6, atol=1e-6)
        assert there[name].dtype == (torch.float32 if added.any() else dtype)


def test_the_adapter_of_a_teacher_becomes_that_of_a_flow_map(shared):
    """At r = t the flow map that starts from an adapted teacher is that teacher, for any gate."""
    adapted, _ = shared
    net, plain = adapted["student"].network, FlowMapDiT(replace(CONFIG, second_time=False))
    lora.add_adapter(plain, "student", RANK, ALPHA)
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    for name in weights:
        weights[name].copy_(0.2 * randn(*weights[name].shape, key=("plain", name)))
    teacher = lora.Adapted(plain, "student")
    base = {n: p for n, p in plain.named_parameters() if ".adapters." not in n}
    checkpoint.load_weights(net, wan.as_flow_map(base), "test")
    adapter = wan.as_flow_map(dict(teacher.named_parameters()))
    checkpoint.load_weights(adapted["student"], adapter, "test")
    x, _, text, t, _ = inputs()
    u, expected = adapted["student"](x, t, t, Context(text)), teacher(x, t, t, Context(text))
    torch.testing.assert_close(u, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset, rank", [("wan-1.3b", 256), ("wan-14b", 256)])
def test_the_released_recipe_adapts_these_layers(preset, rank):
    c = replace(PRESETS[preset], compressed=True)
    with torch.device("meta"):
        net = FlowMapDiT(c)
        lora.add_adapter(net, "student", rank, rank)
    sizes = {name: p.numel() for name, p in lora.Adapted(net, "student").named_parameters()}
    block = 4 * rank * 2 * c.dim + 2 * rank * (c.dim + c.ffn_dim)     # q, k, v, out; the FFN
    times = 2 * (rank * (c.freq_dim + c.dim) + rank * 2 * c.dim)       # both time embedders
    far = c.dim * c.channels * 16 + c.dim
    assert sum(sizes.values()) == c.layers * block + times + far
    assert not any("cross_attn" in name or "text_embed" in name for name in sizes)


def trained(run, stage, *flags, steps=None):
    """The folder of a stage of the tiny preset, trained in `run`."""
    import train
    flags = ["--preset", "tiny", "--stage", stage, "--run-dir", str(run), *flags]
    flags += ["--steps", str(steps)] if steps else []
    return train.train(train.parse_config(flags))


def test_a_run_of_adapters_from_base_to_clip(tmp_path):
    """Three stages on a frozen base; what is saved is the adapter; the base may move."""
    run = partial(trained, tmp_path / "run")
    base = trained(tmp_path / "base", "pretrain")
    base = base.rename(tmp_path / "blob")
    link = tmp_path / "weights"                              # as in a cache of downloads
    link.symlink_to(base)
    run("pretrain", "--base", str(link), "--lora-rank", "3", "--lora-alpha", "6", "--lr", "1e-2")
    for stage in ("flowmap", "distill"):
        run(stage, "--lr", "1e-2")
    config, tensors, adapter = checkpoint.load_model(tmp_path / "run" / "distill")
    found = [adapter[key] for key in ("rank", "alpha", "base")]
    assert found == [3, 6.0, str(link)] and config.second_time
    paths = {re.sub(r"^blocks\.\d+\.", "", name.rpartition(".")[0]) for name in tensors}
    assert paths == set(adapter["targets"]) - set(lora.REPLACED)
    assert all(t.shape[1 if name.endswith(".up") else 0] == 3 for name, t in tensors.items())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(".up"))
    stage = tmp_path / "run" / "distill"
    c = parse_config(["--stage", "distill", "--run-dir", str(tmp_path / "run")])
    weights, world = networks.find_weights(c), distributed.World(0, 1, torch.device("cpu"))
    nets = networks.build(c, weights.config, world, weights.below)
    networks.fill(nets, weights, c, world)
    for name, of in (("student", "flowmap"), ("teacher", "pretrain"), ("fake", "pretrain")):
        expected = checkpoint.load_model(tmp_path / "run" / of)[1]
        for key, p in nets[name].named_parameters():
            assert torch.equal(p, expected[key]), (name, key)

    def clip():
        net = pipeline.load_pipeline(stage)
        return pipeline.generate(net, ["a red circle moving left"], [0], [1.0, 0.0])
    expected = clip()
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not there: put them, or a link .*--base"):
        wan.load(stage)
    with pytest.raises(ValueError, match="adapts the weights .*not there: put them, or a link"):
        run("distill", "--fresh")
    _, state = wan.load(stage, base=moved)
    wan.main(["show", str(stage), "--base", str(moved)])
    merged = FlowMapDiT(config)
    checkpoint.load_weights(merged, state, stage)
    # In place of the adapter:
    checkpoint.save_model(stage, dict(merged.named_parameters()), config, is_main=True)
    torch.testing.assert_close(clip(), expected, rtol=1e-4, atol=1e-4)


def saved_stage(folder, config, rank: int = 0, base=None, scale: float = 0.2):
    """(folder, tensors) of a stage of random weights, or of an adapter of `base`; alpha is 8."""
    net, adapter = FlowMapDiT(config), None
    if rank:
        lora.add_adapter(net, "it", rank, ALPHA)
        net, adapter = lora.Adapted(net, "it"), {"rank": rank, "alpha": ALPHA, "base": str(base)}
    tensors = random_state(net, folder.name, scale)
    folder.mkdir(exist_ok=True)
    checkpoint.save_model(folder, tensors, config, is_main=True, adapter=adapter)
    return folder, tensors


def test_an_adapter_of_an_adapter_is_whole_in_bf16(tmp_path):
    """An adapter stage that is the base of another: bf16 holds root and adapters apart. Updates are
    about 1e-2 of the weights, of which a bf16 grid would lose a part."""
    teacher = replace(CONFIG, second_time=False, compressed=False)
    root, weights = saved_stage(tmp_path / "root", teacher)
    first, below = saved_stage(tmp_path / "first", teacher, 2, root, scale=0.01)
    second, above = saved_stage(tmp_path / "second", CONFIG, 3, first, scale=0.01)
    # Merged one after the other in fp32, the second into the flow map of the first.
    merged = Tensors(lora.merged(weights, below, ALPHA / 2))
    merged = wan.as_causal(wan.as_flow_map(merged))
    merged = Tensors(lora.merged(merged, above, ALPHA / 3))
    loaded = wan.load(second)[1]
    assert loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6)

    net = pipeline.load_network(second, *wan.load_apart(second), "cpu", bf16=True)
    weights = wan.as_flow_map(weights)
    adapted = [path for path, _ in net.named_modules() if path.endswith(lora.TARGETS)]
    assert len(adapted) == 2 * 6 + 4
    for path in adapted:
        module, W = net.get_submodule(path), weights[f"{path}.weight"]
        pair, = module.adapters.values()
        kept = module.weight.float() + pair.scale * pair.up.float() @ pair.down.float()
        kept, exact = kept - W.bfloat16().float(), merged[f"{path}.weight"] - W
        assert (kept - exact).norm() < 0.01 * exact.norm(), path
    moved = wan.load(second, base=root.rename(tmp_path / "moved"))[1]
    assert all(torch.equal(moved[name], tensor) for name, tensor in loaded.items())


def test_training_on_an_adapter_stage_keeps_its_adapter_apart_from_bf16_weights(tmp_path):
    """As a frozen adapter below the one that is trained, of which distill's scores are, too."""
    teacher = replace(CONFIG, second_time=False, compressed=False)
    root, weights = saved_stage(tmp_path / "root", teacher)
    first, below = saved_stage(tmp_path / "first", teacher, 2, root, scale=0.01)
    world = distributed.World(0, 1, torch.device("cpu"))
    x, _, text, t, _ = inputs()
    merged = FlowMapDiT(teacher)
    state = Tensors(lora.merged(weights, below, ALPHA / 2))
    checkpoint.load_weights(merged, state, "test")
    for stage, bf16 in (("pretrain", False), ("flowmap", False), ("flowmap", True)):
        c = Config(stage=stage, preset="tiny", base=str(first), lora_rank=3, lora_alpha=3.0,
                   run_dir=str(tmp_path / "run"))
        found = networks.find_weights(c)
        nets = networks.build(c, found.config, world, found.below)
        base = nets["student"].network
        if bf16:                                     # as under --bf16, but not sharded
            base.to(torch.bfloat16)
        networks.fill(nets, found, c, world)
        trained = [name for name, p in base.named_parameters() if p.requires_grad]
        assert trained and all(".adapters.student." in name for name in trained)
        pair = base.blocks[0].ffn.up.adapters["below"]
        if bf16:
            weight = weights["blocks.0.ffn.up.weight"]
            assert torch.equal(base.blocks[0].ffn.up.weight, weight.bfloat16())
            torch.testing.assert_close(pair.up.float(), below["blocks.0.ffn.up.up"], rtol=1e-2,
                                       atol=1e-4)
        else:
            u = nets["student"](x, t, t, Context(text))
            torch.testing.assert_close(u, merged(x, t, t, Context(text)), rtol=1e-4, atol=1e-5)


def test_a_causal_adapter_stage_as_a_base(tmp_path):
    """Its compressed patch embedding is kept, or left out; and it is no teacher."""
    root, _ = saved_stage(tmp_path / "root", replace(CONFIG, second_time=False, compressed=False))
    first, below = saved_stage(tmp_path / "first", CONFIG, 2, root)
    world = distributed.World(0, 1, torch.device("cpu"))
    for causal in (True, False):
        c = Config(stage="flowmap", preset="tiny", base=str(first), lora_rank=3, lora_alpha=3.0,
                   causal=causal, run_dir=str(tmp_path / "run"))
        found = networks.find_weights(c)
        nets = networks.build(c, found.config, world, found.below)
        networks.fill(nets, found, c, world)
        student = dict(nets["student"].named_parameters())
        if causal:
            name = "far_patch_embed.weight"
            assert torch.equal(student[name], below[name])
        assert ("far_patch_embed.weight" in student) == causal
    (tmp_path / "run" / "flowmap").mkdir(parents=True)
    shutil.copy(first / "model.safetensors", tmp_path / "run" / "flowmap")
    record = {"config": {"base": str(root)}}
    (tmp_path / "run" / "flowmap" / "config.json").write_text(json.dumps(record))
    saved_stage(tmp_path / "root", replace(CONFIG, compressed=False))          # now a flow map
    c = Config(stage="distill", preset="tiny", lora_rank=2, lora_alpha=ALPHA,
               run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="needs stage pretrain, a teacher: .*root is a flow map"):
        networks.find_weights(c)


def test_adapters_of_different_bases_do_not_mix(tmp_path, monkeypatch):
    run = partial(trained, tmp_path / "run" / ".." / "run", steps=1)
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", "pretrain", "--lora-rank", "2")              # nothing to adapt
    run("pretrain")
    run("flowmap")
    with pytest.raises(ValueError, match="pretrain is not an adapter of .*flowmap.*--lora-rank 0"):
        run("distill", "--lora-rank", "2")
    run("flowmap", "--lora-rank", "2", "--fresh")              # adapts pretrain's teacher
    with pytest.raises(ValueError, match="rank 2 and alpha 2, not --lora-rank 2 --lora-alpha 4"):
        run("distill", "--lora-alpha", "4")
    (tmp_path / "run").rename(tmp_path / "moved")              # with the base that is inside
    monkeypatch.chdir(tmp_path)
    trained("moved", "distill", steps=1)


def test_an_adapter_vouches_for_the_base_that_it_was_trained_on(tmp_path, monkeypatch):
    """Not for one that took its place before the stage ended."""
    import train
    base, stage, save = tmp_path / "base", tmp_path / "run" / "flowmap", train.save_stage
    config = replace(CONFIG, second_time=False, compressed=False)
    saved_stage(base, config)

    def replaced_before(*args):
        saved_stage(base, config, scale=0.3)
        save(*args)
    monkeypatch.setattr(train, "save_stage", replaced_before)
    trained(tmp_path / "run", "flowmap", "--base", str(base), "--lora-rank", "2", steps=1)
    with pytest.raises(ValueError, match="adapts other weights than"):
        wan.load(stage)
    saved_stage(base, config)
    wan.load(stage)


def test_a_fresh_adapter_is_even_around_zero_and_no_two_layers_start_alike():
    net = FlowMapDiT(PRESETS["tiny"])
    lora.add_adapter(net, "new", 4, 8.0)
    base = {name: p for name, p in net.named_parameters() if ".adapters." not in name}
    makers = lora.fresh_adapter(lora.Adapted(net, "new"), base, partial(distributed.generator, 0))
    downs = [make() for name, make in makers.items() if name.endswith(".down")]
    for down in downs:
        scaled = down * down.shape[1] ** 0.5                 # uniform in (-1, 1)
        assert abs(scaled.mean()) < 4 * (1 / 3 / down.numel()) ** 0.5
    alike = [torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i]]
    assert alike and not any(alike)
