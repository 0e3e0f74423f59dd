"""Adapters: they start as nothing, merge to rounding, and three on one base are three networks."""
from dataclasses import replace

import pytest
import torch

import backward_sim
import checkpoint
import distributed
import dmd
import flowmap
import lora
import meanflow
import pipeline
import wan
from cache import Context, append_chunk, teacher_forced
from checkpoint import Tensors
from model import PRESETS, FlowMapDiT

CONFIG = replace(PRESETS["tiny"], compressed=True)
NAMES = ("student", "teacher", "fake")
RANK, ALPHA = 4, 8.0


def randn(*shape, key):
    return torch.randn(shape, generator=distributed.generator(*key) if isinstance(key, tuple) else distributed.generator(key))


@pytest.fixture
def shared():
    """(one base with three random adapters, the same as three networks with merged weights)."""
    base = FlowMapDiT(CONFIG)
    base.load_state_dict({name: 0.2 * randn(*p.shape, key=("base", name)) for name, p in base.named_parameters()})
    weights, adapted, apart = {n: p.detach().clone() for n, p in base.named_parameters()}, {}, {}
    base.requires_grad_(False)
    for name in NAMES:
        lora.add_adapter(base, name, RANK, ALPHA)
        adapted[name] = lora.Adapted(base, name)
        state = {n: 0.2 * randn(*p.shape, key=(name, n)) for n, p in adapted[name].named_parameters()}
        checkpoint.load_weights(adapted[name], state, "test")
        apart[name] = FlowMapDiT(CONFIG)
        checkpoint.load_weights(apart[name], Tensors(lora.merged(weights, state, ALPHA / RANK)), "test")
    return adapted, apart


def inputs():
    x, n = randn(2, 4, 48, 4, 4, key="x"), randn(2, 4, 48, 4, 4, key="n")
    return x, n, randn(2, 3, 64, key="text"), torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.4])


def losses(nets):
    """Every loss of distill, the causal way: two chunks trained after a compressed one."""
    x, n, text, t, r = inputs()
    chunks, full = (1, 1, 2), 2
    context = {name: teacher_forced(net, x, text, chunks, full) for name, net in nets.items()}
    new, start = n[:, 1:], context["student"].start
    flow = meanflow.meanflow_error(nets["student"], x[:, start:], new, t, r, context["student"], context["student"],
                                   torch.tensor([False, True]), guidance=2.0)

    def jump(z, context):
        return backward_sim.flow_map_simulation(flowmap.conditioned(nets["student"], context), z, flowmap.time_grid(4, 5.0), 1)
    cache = context["student"].cache[:1]
    z_0 = torch.cat(list(backward_sim.chunk_by_chunk(jump, lambda c, z: append_chunk(nets["student"], c, z, 0),
                                                     Context(text, cache, start), new, chunks[1:])), 1)
    real, fake = (flowmap.conditioned(nets[name], context[name]) for name in ("teacher", "fake"))
    gradient = dmd.dmd_gradient(z_0.detach(), new, t, real, fake)
    return {"flow map": flow, "dmd": dmd.dmd_loss(z_0, gradient), "fake": dmd.fake_score_error(fake, z_0, new, t)}


def test_three_adapters_on_one_base_are_three_networks(shared):
    adapted, apart = shared
    mine, theirs = losses(adapted), losses(apart)
    for name, loss in mine.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(mine["dmd"].sum(), adapted["student"].network.blocks[0].ffn.up.adapters["student"].up)[0]
    weight = torch.autograd.grad(theirs["dmd"].sum(), apart["student"].blocks[0].ffn.up.weight)[0]
    down = adapted["student"].network.blocks[0].ffn.up.adapters["student"].down
    torch.testing.assert_close(gradients, ALPHA / RANK * weight @ down.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["student", "fake"])
def test_a_loss_reaches_its_own_adapter_only(shared, name):
    adapted, _ = shared
    losses(adapted)["dmd" if name == "student" else "fake"].sum().backward()
    reached = {key for key, p in adapted[name].network.named_parameters() if p.grad is not None}
    assert reached and all(f".adapters.{name}." in key for key in reached)
    # All of it but the compressed chunks' embedding, which the rollout reads from the data without gradient.
    pieces = {key for key, _ in adapted[name].named_parameters() if not key.startswith("far_patch_embed")}
    assert {key.replace(f".adapters.{name}.", ".") for key in reached} >= pieces


def test_checkpointing_computes_again_with_the_adapter_that_was_asked_for(shared):
    """Other adapters speak between forward and backward; a hidden active adapter would give their gradients."""
    adapted, _ = shared
    x, n, text, t, r = inputs()
    results = []
    for on in (False, True):
        for block in adapted["student"].network.blocks:
            block.checkpointing = on
        u = adapted["student"](x, t, r, Context(text))
        adapted["teacher"](x, t, r, Context(text))
        results.append(torch.autograd.grad(u.square().sum(), [p for _, p in adapted["student"].named_parameters()
                                                              if p.shape[-1] == RANK or p.shape[0] == RANK]))
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_its_seed(shared):
    adapted, _ = shared
    net = adapted["student"].network
    lora.add_adapter(net, "new", RANK, ALPHA)
    weights = {n: p for n, p in net.named_parameters() if ".adapters." not in n}
    new = lora.Adapted(net, "new")
    makers = [lora.fresh_adapter(new, weights, lambda name, seed=seed: distributed.generator(seed, name)) for seed in (0, 0, 1)]
    checkpoint.load_weights(new, Tensors(makers[0]), "test")
    x, _, text, t, r = inputs()
    for context in (Context(text), teacher_forced(new, x, text, (1, 1, 2), 2)):
        z = x[:, context.start:]
        assert torch.equal(new(z, t, r, context), net(z, t, r, replace(context, adapter="")))
    same, other = (all(torch.equal(makers[0][n](), makers[i][n]()) for n in makers[0]) for i in (1, 2))
    assert same and not other
    with pytest.raises(ValueError, match="'new' already"):
        lora.add_adapter(net, "new", RANK, ALPHA)
    with pytest.raises(ValueError, match="rank 0"):
        lora.add_adapter(net, "zero", 0, ALPHA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_taking_out_again_is_exact_to_rounding(shared, dtype):
    """What an adapter adds is kept although a bf16 base could not hold it: merged weights are fp32."""
    adapted, _ = shared
    weights = {n: p.to(dtype) for n, p in adapted["student"].network.named_parameters() if ".adapters." not in n}
    state = dict(adapted["student"].named_parameters())
    state = {n: p.detach() * (1e-3 if n.endswith("up") else 1) for n, p in state.items() if not n.startswith(lora.REPLACED)}
    there = Tensors(lora.merged(weights, state, ALPHA / RANK))
    back = Tensors(lora.merged(there, state, -ALPHA / RANK))
    for name, tensor in weights.items():
        path = name.removesuffix(".weight")
        added = ALPHA / RANK * state[f"{path}.up"] @ state[f"{path}.down"] if f"{path}.up" in state else torch.zeros(())
        torch.testing.assert_close(there[name].float() - tensor.float(), added.expand_as(tensor), rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(back[name].float(), tensor.detach().float(), rtol=1e-6, atol=1e-6)
        assert there[name].dtype == (torch.float32 if added.any() else dtype)


def test_the_adapter_of_a_teacher_becomes_that_of_a_flow_map(shared):
    """At r = t the flow map that starts from an adapted teacher is that teacher, whatever the gate."""
    adapted, _ = shared
    net, plain = adapted["student"].network, FlowMapDiT(replace(CONFIG, second_time=False))
    lora.add_adapter(plain, "student", RANK, ALPHA)
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    for name in weights:
        weights[name].copy_(0.2 * randn(*weights[name].shape, key=("plain", name)))
    teacher = lora.Adapted(plain, "student")
    base = {n: p for n, p in plain.named_parameters() if ".adapters." not in n}
    checkpoint.load_weights(net, wan.as_flow_map(base), "test")
    checkpoint.load_weights(adapted["student"], wan.as_flow_map(dict(teacher.named_parameters())), "test")
    x, _, text, t, _ = inputs()
    torch.testing.assert_close(adapted["student"](x, t, t, Context(text)), teacher(x, t, t, Context(text)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset, rank", [("wan-1.3b", 256), ("wan-14b", 256)])
def test_the_released_recipe_adapts_these_layers(preset, rank):
    c = replace(PRESETS[preset], compressed=True)
    with torch.device("meta"):
        net = FlowMapDiT(c)
        lora.add_adapter(net, "student", rank, rank)
    sizes = {name: p.numel() for name, p in lora.Adapted(net, "student").named_parameters()}
    block = 4 * rank * 2 * c.dim + 2 * rank * (c.dim + c.ffn_dim)               # q, k, v, out; both Linears of the FFN
    times = 2 * (rank * (c.freq_dim + c.dim) + rank * 2 * c.dim)                 # both time embedders
    far = c.dim * c.channels * 16 + c.dim
    assert sum(sizes.values()) == c.layers * block + times + far
    assert not any("cross_attn" in name or "text_embed" in name for name in sizes)


def test_a_run_of_adapters_from_base_to_clip(tmp_path):
    """Three stages on a frozen base; what is saved is the adapter; the base may move."""
    import sample
    import train

    def run(stage, *flags):
        return train.train(train.parse_config(["--preset", "tiny", "--stage", stage, "--run-dir", str(tmp_path / "run"), *flags]))
    base = train.train(train.parse_config(["--preset", "tiny", "--run-dir", str(tmp_path / "base")]))
    base = base.rename(tmp_path / "blob")
    link = tmp_path / "weights"                                                 # as in a cache of downloads
    link.symlink_to(base)
    run("pretrain", "--base", str(link), "--lora-rank", "3", "--lora-alpha", "6", "--lr", "1e-2")
    for stage in ("flowmap", "distill"):
        run(stage, "--lr", "1e-2")
    config, tensors, adapter = checkpoint.load_model(tmp_path / "run" / "distill")
    assert {k: adapter[k] for k in ("rank", "alpha", "base")} == {"rank": 3, "alpha": 6.0, "base": str(link)} and config.second_time
    assert {name.rpartition(".")[0].split(".", 2)[-1] if name.startswith("blocks") else name.rpartition(".")[0]
            for name in tensors} == set(adapter["targets"]) - set(lora.REPLACED)
    assert {tuple(t.shape)[tensors_name.endswith("up")] for tensors_name, t in tensors.items()} == {3}
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith(".up"))
    stage, prompt = tmp_path / "run" / "distill", ["a red circle moving left"]
    clip = sample.generate(sample.load_pipeline(stage), prompt, [0], [1.0, 0.0])
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="weights, which are not there: give their folder with --base"):
        wan.load(stage)
    with pytest.raises(ValueError, match="adapts the weights .*which are not there: put them there again"):
        run("distill", "--fresh")
    _, state = wan.load(stage, base=moved)
    merged = FlowMapDiT(config)
    checkpoint.load_weights(merged, state, stage)
    checkpoint.save_model(stage, dict(merged.named_parameters()), config, is_main=True)       # in place of the adapter
    torch.testing.assert_close(sample.generate(sample.load_pipeline(stage), prompt, [0], [1.0, 0.0]), clip, rtol=1e-4, atol=1e-4)


def saved_stage(folder, config, rank: int = 0, base=None, scale: float = 0.2):
    """(folder, tensors) of a stage of random weights, or of an adapter of `base`; alpha is 8."""
    net, adapter = FlowMapDiT(config), None
    if rank:
        lora.add_adapter(net, "it", rank, ALPHA)
        net, adapter = lora.Adapted(net, "it"), {"rank": rank, "alpha": ALPHA, "base": str(base)}
    tensors = {n: scale * randn(*p.shape, key=(folder.name, n)) for n, p in net.named_parameters()}
    folder.mkdir()
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


def test_adapters_of_different_bases_do_not_mix(tmp_path, monkeypatch):
    import train

    def run(stage, *flags):
        return train.train(train.parse_config(["--preset", "tiny", "--stage", stage, "--run-dir", str(tmp_path / "run"), "--steps", "1",
                                               *flags]))
    with pytest.raises(SystemExit):
        train.parse_config(["--preset", "tiny", "--lora-rank", "2"])            # nothing to adapt
    run("pretrain")
    run("flowmap")
    with pytest.raises(ValueError, match="pretrain is not an adapter of .*flowmap, .*--lora-rank 0"):
        run("distill", "--lora-rank", "2")
    run("flowmap", "--lora-rank", "2", "--fresh")                               # adapts the teacher that pretrain ended with
    with pytest.raises(ValueError, match="rank 2 and alpha 2, not --lora-rank 2 --lora-alpha 4"):
        run("distill", "--lora-alpha", "4")
    (tmp_path / "run").rename(tmp_path / "moved")                               # with the base that is inside
    monkeypatch.chdir(tmp_path)
    train.train(train.parse_config(["--preset", "tiny", "--stage", "distill", "--run-dir", "moved", "--steps", "1"]))
