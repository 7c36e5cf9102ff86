"""lmd.for_model: which parameters are LMD's, the exceptions a caller makes, that it equals a Combined made by hand."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lmd
from experiments.training.models import gpt2, vit, zoo
from lmd import LMD, Combined, Place
from tests.lmd.small_nets import equal, same, values

IN_BLOCKS = ("attention.qkv.weight", "attention.proj.weight")
TOKENS = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.GELU(), nn.Linear(17, 5))


def lmds(model: nn.Module, **exceptions: Any) -> set[str]:
    """The names of LMD's parameters."""
    return {name for name, place in lmd.divide(model, **exceptions).items() if place.optimizer == "LMD"}


def parts(optimizer: Combined) -> list[list[int]]:
    return [
        [id(p) for group in part.param_groups for p in group["params"]] for part in (optimizer.lmd, *optimizer.others)
    ]


class Holder(nn.Module):
    """Parameters and modules by name, in order."""

    def __init__(self, **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def bare(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)


# --- the rule ---


@pytest.mark.parametrize("name", [name for name in zoo.CASES if not name.startswith("transformers")])
def test_every_parameter_is_in_exactly_one_part(name):
    model, _ = zoo.CASES[name]()
    optimizer = lmd.for_model(model)
    everywhere = [p for part in parts(optimizer) for p in part]
    assert sorted(everywhere) == sorted(id(p) for p in model.parameters())
    named, division = dict(model.named_parameters()), lmd.divide(model)
    assert parts(optimizer)[0] == [id(p) for n, p in named.items() if division[n].optimizer == "LMD"]
    assert all(place.shape == named[n].shape for n, place in division.items())


def test_gpt2_is_divided_as_stated():
    kernels = ("mlp.fc.weight", "mlp.proj.weight")
    model = gpt2.MICRO.build()
    assert lmds(model) == {f"blocks.{i}.{name}" for i in range(2) for name in (*IN_BLOCKS, *kernels)}
    division = lmd.divide(model)
    assert division["tokens.weight"] == Place("other", "embedding", (256, 64))  # the tied head, too
    assert division["positions.weight"].reason == "embedding"
    assert division["norm.bias"].reason == "normalization layer"
    assert division["blocks.0.mlp.fc.bias"].reason == "vector"


def test_vit_is_divided_as_stated():
    kernels = ("mlp.0.weight", "mlp.2.weight")
    model = vit.MICRO.build()
    in_blocks = {f"blocks.{i}.{name}" for i in range(2) for name in (*IN_BLOCKS, *kernels)}
    assert lmds(model) == {"patches.weight"} | in_blocks
    division = lmd.divide(model)
    assert division["class_token"].reason == "vector"
    assert division["positions"].reason == "table added to every example"
    assert {division[f"head.{name}"].reason for name in ("weight", "bias")} == {"head, the last layer registered"}


def test_transformers_models_are_divided_as_stated():
    pytest.importorskip("transformers")
    model, _ = zoo.hf_llama()
    within = {n for n in dict(model.named_parameters()) if "self_attn" in n or ".mlp." in n}
    assert lmds(model) == within and len(within) == 14
    assert lmd.divide(model)["lm_head.weight"].reason == "head, by get_output_embeddings()"
    assert lmds(Holder(wrapped=model)) == {f"wrapped.{name}" for name in within}
    model, _ = zoo.hf_vit()
    within = {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    assert lmds(model) == within | {"vit.embeddings.patch_embeddings.projection.weight"} and len(within) == 12
    assert lmd.divide(model)["classifier.weight"].reason == "head, the last layer registered"
    model, _ = zoo.hf_gpt2()  # transformers' Conv1D; a tied head
    assert lmds(model) == {n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2}
    model, _ = zoo.hf_mixtral()
    experts = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert experts and lmds(model) >= experts


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "nn.Transformer"])
def test_a_model_of_blocks_alone_has_no_head(name):
    """A one-layer decoder, too; and MultiheadAttention's in_proj_weight is a matrix."""
    model, _ = zoo.CASES[name]()
    assert lmds(model) == {n for n, p in model.named_parameters() if p.ndim == 2}
    assert any(n.endswith("in_proj_weight") for n in lmds(model))


def test_attention_and_recurrence_are_layers_of_matrices():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4, vdim=4)
    assert lmds(attention) == {
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    }  # not bias_k, bias_v
    model, _ = zoo.lstm()
    assert lmds(model) == {f"lstm.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
    assert lmds(nn.GRUCell(4, 4)) == {"weight_ih", "weight_hh"}


def test_convolution_kernels_are_lmds_and_the_last_one_is_a_head_where_no_linear_follows():
    model, _ = zoo.resnet()
    assert lmds(model) == {n for n, p in model.named_parameters() if p.ndim == 4}
    assert lmd.divide(model)["2.norm1.weight"].reason == "normalization layer"
    model, _ = zoo.unet()
    assert lmds(model) == {"down1.weight", "down2.weight", "up.weight"}


def test_one_output_channel_is_no_table_of_positions():
    """Also under a parametrization, whose magnitudes are vectors."""
    assert lmds(Holder(conv=nn.Conv2d(4, 1, 3), bilinear=nn.Bilinear(3, 4, 1)), head=None) == {
        "conv.weight",
        "bilinear.weight",
    }
    model = Holder(conv=parametrizations.weight_norm(nn.Conv2d(4, 1, 3)))
    assert lmds(model, head=None) == {"conv.parametrizations.weight.original1"}


def test_a_norm_over_several_dimensions_is_a_norm():
    model = Holder(norm=nn.LayerNorm((4, 5, 6)), layer=nn.Linear(6, 6), head=nn.Linear(6, 2))
    assert lmds(model) == {"layer.weight"}


@pytest.mark.parametrize(
    "table", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4), type("Mine", (nn.Embedding,), {})(9, 4)], ids=repr
)
def test_an_embedding_is_one_by_what_it_is(table):
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 9)
    tied.weight = table.weight
    assert lmds(Holder(layer=layer, head=table)) == set()  # the last layer is the head, whatever the names
    assert lmds(Holder(tied=tied, table=table, layer=layer)) == {"layer.weight"}
    division = lmd.divide(Holder(tied=tied, table=table, layer=layer))
    assert division["tied.weight"].reason == "embedding"  # under its first name
    assert division["tied.bias"].reason == "head, tied with an embedding"


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.T


def test_parametrized_modules_are_what_they_were():
    model = Holder(table=nn.Embedding(4, 4), layer=nn.Linear(4, 4), head=nn.Linear(4, 4))
    for module in model.children():
        parametrize.register_parametrization(module, "weight", Symmetric())
    division = lmd.divide(model)
    assert division["table.parametrizations.weight.original"].reason == "embedding"
    assert division["head.parametrizations.weight.original"].reason.startswith("head")
    assert lmds(model) == {"layer.parametrizations.weight.original"}


def test_bare_parameters_go_by_their_shape():
    shapes = {
        "LMD": [(3, 4), (5, 3, 4), (2, 3, 4, 5)],
        "other": [(), (3,), (3, 1), (1, 3), (1, 1, 3), (1, 7, 3), (1, 3, 4, 4), (0,)],
    }
    model = Holder(**{str(i): bare(*shape) for i, shape in enumerate(shapes["LMD"] + shapes["other"])})
    found = [place.optimizer for place in lmd.divide(model).values()]
    assert found == ["LMD"] * len(shapes["LMD"]) + ["other"] * len(shapes["other"])


def test_a_head_is_not_within_one_of_several_blocks():
    def block() -> nn.Module:
        return Holder(layer=nn.Linear(4, 4))

    blocks = {
        "a list": (nn.ModuleList([block()]), False),
        "alike in a sequence": (nn.Sequential(block(), block()), False),
        "the last of a sequence": (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), True),
        "of nested sequences": (nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 2))), True),
        "a module of its own kind": (nn.Sequential(nn.Linear(4, 4), block()), True),
        "the last of a list": (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)]), True),
        "attention": (Holder(layer=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 2)), True),
    }
    for name, (model, has_head) in blocks.items():
        matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
        assert len(matrices - lmds(model)) == has_head, name
    assert "attention.out_proj.weight" in lmds(blocks["attention"][0])


def test_frozen_parameters_are_placed_as_if_they_were_not():
    model = vit.MICRO.build()
    before = lmds(model)
    for p in (model.patches.weight, model.positions, model.head.weight):
        p.requires_grad_(False)
    assert lmds(model) == before
    x, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    optimizer = lmd.for_model(model)
    with optimizer.sampled_params():
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert equal(frozen, [p.detach() for p in model.parameters() if not p.requires_grad])


def test_the_division_prints_as_a_table():
    lines = str(lmd.divide(mlp())).splitlines()
    assert lines[0] == "LMD    0.weight  (17, 6)  matrix or kernel"
    assert lines[-1] == "other  3.bias    (5,)     head, the last layer registered"
    assert len(lines) == 6 and str(lmd.divide(nn.Module())) == ""


# --- exceptions to the rule ---


@pytest.mark.parametrize(
    "head",
    ["0", "0.weight", lambda m: m[0], lambda m: m[0].weight, lambda m: [m[0]], lambda m: ["0.weight", m[0].bias]],
)
def test_the_head_may_be_named(head):
    model = mlp()
    head = head(model) if callable(head) else head
    assert lmds(model, head=head) == {"3.weight"}
    assert lmd.divide(model, head=head)["0.weight"].reason == "head, as given"


@pytest.mark.parametrize("none", [None, False])
def test_there_may_be_no_head(none):
    assert lmds(mlp(), head=none) == {"0.weight", "3.weight"}
    assert lmds(nn.Linear(4, 4), head=none) == {"weight"}


def test_a_parameter_goes_where_the_caller_says():
    model = gpt2.MICRO.build()
    by_rule = lmds(model)
    assert lmds(model, lmd_params=[model.tokens, "norm.weight"]) == by_rule | {"tokens.weight", "norm.weight"}
    assert lmds(model, other_params="blocks.0") == {n for n in by_rule if n.startswith("blocks.1")}
    assert lmds(model, other_params=model.blocks[1].mlp.fc.weight) == by_rule - {"blocks.1.mlp.fc.weight"}
    division = lmd.divide(model, lmd_params="lm_head", other_params=["blocks.0"])
    assert division["tokens.weight"] == Place("LMD", "named in lmd_params", (256, 64))
    assert division["blocks.0.norm1.bias"].reason == "named in other_params"
    assert lmds(mlp(), lmd_params="3.weight") == {"0.weight", "3.weight"}  # the rule's head gives way


def test_bad_input_is_an_error():
    model, single = mlp(), nn.Linear(3, 3)
    for wrong in (model.parameters(), None):
        with pytest.raises(TypeError, match="the model itself"):
            lmd.for_model(wrong)
    for empty in (single, nn.Module(), nn.LayerNorm(3), mlp().requires_grad_(False)):
        with pytest.raises(ValueError, match=r"LMD\(model.parameters\(\)\) or head=None"):
            lmd.for_model(empty)
    for argument in ("head", "lmd_params", "other_params"):
        with pytest.raises(ValueError, match=f"{argument}: the model has no module or parameter 'fc'"):
            lmd.for_model(model, **{argument: "fc"})
        for stranger in (single, single.weight, [single.bias]):
            with pytest.raises(ValueError, match=f"{argument}: this .* is no part of the model"):
                lmd.for_model(model, **{argument: stranger})
        with pytest.raises(TypeError, match=f"{argument} takes modules, parameters"):
            lmd.for_model(model, **{argument: 3})
    with pytest.raises(ValueError, match="lmd_params and other_params name the same"):
        lmd.for_model(model, lmd_params=model[0], other_params="0.weight")
    with pytest.raises(ValueError, match="lmd_params and head name the same"):
        lmd.for_model(model, lmd_params=model[3], head="3")
    with pytest.raises(ValueError, match="kappa"):
        lmd.for_model(model, kappa=0.0)
    with pytest.raises(TypeError, match="nothing_like_it"):
        lmd.for_model(model, nothing_like_it=1)
    with pytest.raises(ValueError, match="must be 1 here"):
        lmd.for_model(model, mc_samples=2)
    for name, value in {"others_lr": 0.1, "others_weight_decay": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name} is for the AdamW"):
            lmd.for_model(model, others=torch.optim.AdamW, **{name: value})
    with pytest.raises(TypeError, match=r"others must be a function .* torch\.optim\.SGD.*, not 'sgd'"):
        lmd.for_model(model, others="sgd")
    for name, value, said in (("lr", "0.1", "a number"), ("betas", 0.9, "two numbers")):
        with pytest.raises(ValueError, match=f"{name} must be {said}"):
            lmd.for_model(model, **{name: value})
    with pytest.raises(TypeError, match=r"must return a torch\.optim\.Optimizer"):
        lmd.for_model(model, others=lambda groups: None)
    with pytest.raises(TypeError, match="one LMD"):
        lmd.for_model(model, others=LMD)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_lmd_refuses_what_is_no_real_number(dtype):
    model = Holder(layer=nn.Linear(4, 4), codes=bare(4, 4, dtype=dtype))
    with pytest.raises(TypeError, match="but codes is"):
        lmd.for_model(model, head=None)
    assert lmds(model, head=None, other_params="codes") == {"layer.weight"}
    optimizer = lmd.for_model(model, head=None, other_params="codes")
    (model.layer.weight.sum() + model.layer.bias.sum()).backward()
    optimizer.step()


def test_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight has no values yet"):
        lmd.for_model(nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"0\.weight has no values yet"):
        lmd.for_model(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))


# --- the optimizer ---


def train(model: nn.Module, optimizer: Combined, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        tokens = TOKENS.roll(step, 0)[:2]
        optimizer.zero_grad()
        with optimizer.sampled_params():
            nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def by_hand(model: nn.Module) -> Combined:
    blocks = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in blocks)]
    groups = [
        {"params": [p for p in rest if p.ndim == 2]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.012, betas=(0.9, 0.99), weight_decay=0.3, fused=True)
    return Combined(LMD(blocks), adamw)


@pytest.mark.parametrize(
    "arguments", [{}, {"others_lr": 0.012, "others_weight_decay": 0.3, "seed": 0}], ids=["defaults", "named"]
)
def test_it_is_the_combined_that_one_would_make_by_hand(arguments):
    model = gpt2.MICRO.build()
    other = copy.deepcopy(model)
    train(model, lmd.for_model(model, **arguments), range(3))
    train(other, by_hand(other), range(3))
    assert equal(values(model), values(other))


def test_the_settings_reach_the_parts():
    model = gpt2.MICRO.build()
    others: dict[str, Any] = {"others_lr": 0.01, "others_weight_decay": 0.2}
    optimizer = lmd.for_model(
        model, 0.02, weight_decay=0.3, noise_scale=0.1, **others, kappa=2.0, betas=(0.8, 0.9), seed=7
    )
    ours, theirs = optimizer.lmd.param_groups[0], optimizer.others[0].param_groups
    wanted = {"lr": 0.02, "weight_decay": 0.3, "noise_scale": 0.1, "kappa": 2.0, "betas": (0.8, 0.9), "seed": 7}
    assert {name: ours[name] for name in wanted} == wanted
    assert [(group["lr"], group["weight_decay"]) for group in theirs] == [(0.01, 0.2), (0.01, 0.0)]
    assert any(p is model.tokens.weight for p in theirs[0]["params"]) and all(p.ndim < 2 for p in theirs[1]["params"])
    assert lmd.for_model(model).lmd.defaults == LMD(model.parameters()).defaults


def test_another_optimizer_takes_the_others_in_two_groups():
    """Vectors, norms and tokens have no decay whatever its own is."""
    model = vit.MICRO.build()
    optimizer = lmd.for_model(model, others=lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5))
    tables, vectors = optimizer.others[0].param_groups
    assert [id(p) for p in tables["params"]] == [id(model.positions), id(model.head.weight)]
    assert tables["weight_decay"] == 0.5 and vectors["weight_decay"] == 0.0 and vectors["lr"] == 0.1
    assert any(p is model.class_token for p in vectors["params"]) and any(
        p is model.head.bias for p in vectors["params"]
    )


def test_there_may_be_nothing_for_the_others():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    alone = copy.deepcopy(model)
    optimizers: list[Any] = [lmd.for_model(model, head=None), LMD(alone.parameters())]
    assert isinstance(optimizers[0], Combined) and optimizers[0].others == ()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for net, optimizer in zip((model, alone), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                net(x).square().mean().backward()
            optimizer.step()
    assert equal(values(model), values(alone))
    fresh = lmd.for_model(model, head=None)
    fresh.load_state_dict(optimizers[0].state_dict())
    assert same(fresh.state_dict(), optimizers[0].state_dict())


def schedule(optimizer: Combined) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_a_schedule_scales_every_rate():
    model = gpt2.MICRO.build()
    optimizer = lmd.for_model(model, 0.04, others_lr=0.008)
    train(model, optimizer, range(3), schedule(optimizer))
    assert [group["lr"] for group in optimizer.lmd.param_groups] == [0.04 / 8]
    assert [group["lr"] for group in optimizer.others[0].param_groups] == [0.008 / 8] * 2


def test_a_state_continues_bit_for_bit_in_an_equal_model():
    whole, first = gpt2.MICRO.build(), gpt2.MICRO.build()
    first.load_state_dict(whole.state_dict())
    optimizer = lmd.for_model(whole)
    train(whole, optimizer, range(6), schedule(optimizer))
    optimizer = lmd.for_model(first)
    scheduler = schedule(optimizer)
    train(first, optimizer, range(2), scheduler)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (first, optimizer, scheduler)], file)
    file.seek(0)
    second = gpt2.MICRO.build()
    optimizer = lmd.for_model(second)
    scheduler = schedule(optimizer)
    for part, saved in zip((second, optimizer, scheduler), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(second, optimizer, range(2, 6), scheduler)
    assert equal(values(whole), values(second))


@pytest.mark.parametrize("which", [0, 1], ids=["lmd", "adamw"])
def test_a_part_that_is_loaded_by_itself_shows_in_the_whole(which):
    """Groups, state and a copy; as torch.distributed.checkpoint does with a list of the parts."""
    model = gpt2.MICRO.build()
    optimizer = lmd.for_model(model, 0.04, others_lr=0.008)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.parts[which].state_dict())
    fresh = lmd.for_model(model, 0.02, others_lr=0.004)
    fresh.parts[which].load_state_dict(saved)

    def check(whole: Combined) -> None:
        assert [id(group) for group in whole.param_groups] == [
            id(group) for part in whole.parts for group in part.param_groups
        ]
        rates = [[0.04, 0.004, 0.004], [0.02, 0.008, 0.008]][which]
        assert [group["lr"] for group in whole.param_groups] == rates
        for group in whole.parts[which].param_groups:
            assert all(whole.state[p] is whole.parts[which].state[p] for p in group["params"])
        for group in whole.param_groups:  # as a schedule does
            group["lr"] /= 2
        assert [group["lr"] for part in whole.parts for group in part.param_groups] == [rate / 2 for rate in rates]

    check(copy.deepcopy(fresh))
    check(fresh)
    bare = nn.Parameter(torch.ones(3, 4))
    fresh.lmd.add_param_group({"params": [bare]})
    assert len(fresh.param_groups) == 4 and fresh.param_groups[1]["params"][0] is bare
    with pytest.raises(ValueError, match="more than one parameter group"):
        fresh.add_param_group({"params": [model.tokens.weight]})
    assert len(fresh.param_groups) == 4


def test_grad_scaler_skips_and_unscales():
    """Powers of two scale exactly: two steps, the one between them skipped, are the two without a scaler."""
    model, plain = mlp(), mlp()
    optimizer, reference = lmd.for_model(model), lmd.for_model(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            scaler.scale(model(x).square().mean()).backward()
        if step == 1:
            before = values(model)
            model[3].bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert step != 1 or equal(values(model), before)
    for _ in range(2):
        reference.zero_grad()
        with reference.sampled_params():
            plain(x).square().mean().backward()
        reference.step()
    assert equal(values(model), values(plain))


@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.bfloat16], ids=["float64", "bfloat16"])
def test_it_trains_in_other_dtypes(cast):
    model = cast(mlp())
    optimizer = lmd.for_model(model)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(model[0].weight.dtype)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            loss = (model(x) - x[:, :5]).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
