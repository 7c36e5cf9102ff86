"""The simulated machine: what a context does to a model, where, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, named_recipes, simulate
from lpsim.machine.recipes import BackwardOperands
from lpsim.machine.simulate import EscapedProductError, EscapedProductWarning, UnknownOpError

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
FP6 = Quantizer(formats.get("mxfp6_e3m2"))
BF16 = Quantizer(formats.get("bfloat16"))
STOCHASTIC = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 40, width: int = 48, layers: int = 2, length: int = 20) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, 3) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.h:
            y = block(y)
        return self.lm_head(self.norm(y))


class ViT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.cls.expand(len(x), -1, -1), y], 1)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.norm(y)[:, 0])


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    data = torch.randint(0, 40, (3, 21))
    return GPT(), data[:, :-1], data[:, 1:]


def vit() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return ViT(), torch.randn(3, 3, 12, 12), torch.randint(0, 10, (3,))


MODELS = {"gpt": gpt, "vit": vit}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_recipe_of_nones_is_plain_torch(make: Callable[[], tuple[nn.Module, Tensor, Tensor]], audit: bool) -> None:
    model, x, y = make()
    plain = gradients(model, loss_of(model, x, y))
    with simulate(model, Recipe(), audit=audit) as sim:
        simulated = gradients(model, loss_of(model, x, y))
    assert same(plain, simulated)
    assert not audit or not sim.audit().escaped


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.forward(FP6.format),
        Recipe.forward(FP4.format, vector=BF16.format, rounding=Rounding.STOCHASTIC),
        Recipe(Gemm(FP6, FP6), Gemm(FP4, FP6), Gemm(FP6, FP4), backward_operands=BackwardOperands.UNQUANTIZED),
    ],
    ids=["forward", "vector", "three"],
)
def test_no_matrix_product_escapes(make: Callable[[], tuple[nn.Module, Tensor, Tensor]], recipe: Recipe) -> None:
    model, x, y = make()
    with simulate(model, recipe) as sim:
        loss_of(model, x, y).backward()
    audit = sim.audit()
    assert audit.escaped == ()
    assert audit.products and all(owner == "the recipe" for _, _, owner in audit.products)
    assert {where for _, where, _ in audit.products} == {"forward", "backward"}
    assert "escaped products: none" in str(audit)


def test_the_audit_finds_what_escapes() -> None:
    """A product that ran below the functions that a simulation sees is listed, and told at the end."""
    sim = simulate(nn.Linear(2, 2), Recipe.forward(FP6.format))
    told = pytest.warns(EscapedProductWarning, match=r"in full precision: aten\.mm, forward\.")
    with told, sim, torch._C.DisableTorchFunction():
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert sim.audit().escaped == ("aten.mm, forward",)
    with sim:  # nothing new: nothing to tell
        pass


def test_escaped_operands_are_found_in_lists_and_keywords_too() -> None:
    """A library's own aten ops, below the functions that a simulation sees."""
    with torch.library._scoped_library("escaping", "FRAGMENT") as library:
        library.define("conv_of_list(Tensor[] x, *, Tensor[]? y=None) -> Tensor")
        library.impl("conv_of_list", lambda x, *, y=None: torch.ones(()), "CompositeExplicitAutograd")
        tensors = [torch.ones(2)]
        integers = [torch.ones(2, dtype=torch.long)]
        for x, y, escaped in ((tensors, None, 1), (integers, tensors, 1), (integers, integers, 0)):
            sim = simulate(nn.Linear(2, 2), Recipe())
            told = pytest.warns(EscapedProductWarning) if escaped else nullcontext()
            with told, sim, torch._C.DisableTorchFunction():
                torch.ops.escaping.conv_of_list(x, y=y)
            assert sim.audit().escaped == ("aten.conv_of_list, forward",) * escaped


class Spectral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return torch.linalg.matrix_norm(x, 2)


def test_a_decomposition_that_escapes_is_told() -> None:
    told = pytest.raises(EscapedProductError, match=r"aten\._linalg_svd, forward of <model>")
    model = Spectral()
    with told, simulate(model, Recipe.forward(FP6.format), on_escape="raise"):
        model(torch.ones(2, 2))


class Hidden(nn.Module):
    """As a compiled extension does it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return torch.mm(x, x)


def test_an_escaped_product_is_an_error_where_it_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Hidden())
    told = pytest.raises(EscapedProductError, match=r"in full precision: aten\.mm, forward of 1\.")
    with told, simulate(model, Recipe.forward(FP6.format), on_escape="raise"):
        model(torch.ones(2, 2))
    with pytest.raises(ValueError, match="needs audit=True"):
        simulate(model, Recipe(), audit=False, on_escape="raise")
    with pytest.raises(ValueError, match='must be "warn" or "raise"'):
        simulate(model, Recipe(), on_escape="error")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(self.inner(x), -1)


def test_an_unknown_op_raises_and_names_op_and_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unknown())
    with simulate(model, Recipe.forward(FP6.format)), pytest.raises(UnknownOpError, match=r"1/cumprod: .*'cumprod'"):
        model(torch.randn(2, 4))


def test_the_context_leaves_nothing_behind() -> None:
    model, x, y = gpt()
    plain = gradients(model, loss_of(model, x, y))
    hooks = torch.nn.modules.module
    with pytest.raises(ZeroDivisionError), simulate(model, Recipe.forward(FP4.format)):
        model(x)
        raise ZeroDivisionError
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
    assert not torch.overrides._get_current_function_mode_stack()
    assert same(plain, gradients(model, loss_of(model, x, y)))


def test_a_failed_forward_does_not_confuse_the_paths() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unknown())
    override = Recipe(overrides={"0": Recipe.forward(FP4.format)})
    with simulate(model, override):
        first = model[0](torch.ones(2, 4) / 3)
        with pytest.raises(UnknownOpError):
            model(torch.ones(2, 4))
        assert torch.equal(first, model[0](torch.ones(2, 4) / 3))


def test_contexts_are_entered_again_and_do_not_nest() -> None:
    model, x, _ = gpt()
    sim = simulate(model, Recipe.forward(FP4.format))
    with sim:
        first = model(x)
        with pytest.raises(RuntimeError, match="already running"):
            sim.__enter__()
    with sim:
        assert torch.equal(first, model(x))


def test_stochastic_rounding_is_keyed_by_seed_step_and_call() -> None:
    model, x, _ = gpt()
    recipe = Recipe.forward(FP4.format, rounding=Rounding.STOCHASTIC)

    def outputs(seed: int, step: int, calls: int = 1) -> list[Tensor]:
        with simulate(model, recipe, seed=seed) as sim, torch.no_grad():
            sim.step = step
            return [model(x) for _ in range(calls)]

    first, second = outputs(0, 5, 2)
    assert not torch.equal(first, second)  # two samples of one step differ
    assert same([first, second], outputs(0, 5, 2))  # and are the same in a run resumed at that step
    assert not torch.equal(first, outputs(0, 6)[0])
    assert not torch.equal(first, outputs(1, 5)[0])


def test_evaluating_after_an_update_leaves_the_random_bits_of_training() -> None:
    model, x, y = gpt()
    recipe = Recipe(*[Gemm(STOCHASTIC, STOCHASTIC)] * 3)

    def trained(evaluate: bool) -> list[Tensor]:
        found = []
        with simulate(model, recipe) as sim:
            for sim.step in range(3):
                found += gradients(model, loss_of(model, x, y))
                if evaluate:
                    model.eval()
                    with torch.no_grad():
                        model(x)
                    model.train()
        return found

    assert same(trained(True), trained(False))


def test_optimizer_and_clipping_stay_in_full_precision() -> None:
    recipe = Recipe.forward(FP4.format, vector=BF16.format)

    def weights(inside: bool, make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        model, x, y = gpt()
        optimizer = make(model.parameters())

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

        for _ in range(2):
            optimizer.zero_grad()
            with simulate(model, recipe):
                loss_of(model, x, y).backward()
                if inside:
                    update()
            if not inside:
                update()
        return [p.detach().clone() for p in model.parameters()]

    makers = [
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    ]
    for make in makers:
        assert same(weights(False, make), weights(True, make))


def test_a_closure_is_simulated() -> None:
    model, x, y = gpt()
    recipe = Recipe.forward(FP4.format, vector=BF16.format)
    losses: list[Tensor] = []
    with simulate(model, recipe):
        expected = loss_of(model, x, y)

        def closure() -> Tensor:
            losses.append(loss_of(model, x, y))
            losses[-1].backward()
            return losses[-1]

        torch.optim.SGD(model.parameters(), 0.1).step(closure)
    assert torch.equal(losses[0], expected)


def test_overrides_by_module_op_and_repetition() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT @ x

    model = nn.Sequential(Twice(), Twice())
    x = torch.randn(5, 5)
    q = FP4.quantize

    def run(overrides: dict[str, Recipe]) -> Tensor:
        with simulate(model, Recipe(Gemm(FP4, FP4), overrides=overrides)):
            return model(x)

    def product(a: Tensor, b: Tensor, rounded: bool = True) -> Tensor:
        return q(a, -1) @ q(b, -2) if rounded else a @ b

    def expected(*rounded: bool) -> Tensor:
        first = product(product(x, x.mT, rounded[0]), x, rounded[1])
        return product(product(first, first.mT, rounded[2]), first, rounded[3])

    assert torch.equal(run({}), expected(True, True, True, True))
    assert torch.equal(run({"0": Recipe()}), expected(False, False, True, True))
    assert torch.equal(run({"*/matmul#1": Recipe()}), expected(True, False, True, False))
    assert torch.equal(run({"1/matmul#1": Recipe(Gemm(FP4, FP4)), "1/*": Recipe()}), expected(True, True, False, True))


def test_overrides_that_match_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'lm_head' matches no module; modules are 0"):
        simulate(model, Recipe(overrides={"lm_head": Recipe()}))
    with pytest.warns(UserWarning, match="matched no site that ran: 0/matmul"):  # noqa: SIM117
        with simulate(model, Recipe(Gemm(FP4, FP4), overrides={"0/matmul": Recipe()})):
            model(torch.randn(2, 4))


def test_a_shared_module_has_the_path_of_the_current_call() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    x = torch.randn(3, 8)
    with simulate(model, Recipe(overrides={"b.0": Recipe.forward(FP4.format)})):
        assert torch.equal(model["a"](x), F.linear(x, shared.weight, shared.bias))
        assert torch.equal(model["b"](x), FP4.quantize(x) @ FP4.quantize(shared.weight).T + shared.bias)


def test_outside_the_model_what_carries_a_gradient_is_covered() -> None:
    """The loss is the machine's, a metric of it is not; nor is what prepares the data."""
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with simulate(model, Recipe(vector=BF16)):
        data = x / 3
        out = model(data)
        loss = F.mse_loss(out, x)
        metric = (out.detach() - x).abs().mean()
        torch.cumprod(x, 0)
        with pytest.raises(UnknownOpError, match="<outside>/cumprod"):
            torch.cumprod(out, 0)
    assert torch.equal(data, x / 3)
    assert torch.equal(loss, BF16.quantize(F.mse_loss(out, x)))
    assert torch.equal(metric, (out - x).abs().mean())


def test_operands_by_keyword_are_quantized() -> None:
    a, b = torch.randn(5, 40), torch.randn(40, 6)
    expected = FP4.quantize(a) @ FP4.quantize(b, 0)
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        assert torch.equal(torch.matmul(input=a, other=b), expected)
        assert torch.equal(torch.mm(a, mat2=b), expected)
        assert torch.equal(F.linear(input=a, weight=b.T), FP4.quantize(a) @ FP4.quantize(b.T).T)


def test_autocast_sees_the_operands_in_its_dtype() -> None:
    model, x = nn.Linear(32, 8), torch.randn(5, 32)
    with simulate(model, Recipe.forward(FP6.format)), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().sum().backward()
    x16, w16, b16 = x.bfloat16(), model.weight.bfloat16(), model.bias.bfloat16()
    assert torch.equal(y, FP6.quantize(x16) @ FP6.quantize(w16).T + b16)
    assert model.weight.grad is not None and model.weight.grad.dtype is torch.float32
    assert torch.equal(model.weight.grad, (torch.ones(8, 5).bfloat16() @ FP6.quantize(x16)).float())


def test_what_cannot_be_simulated_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"Recipe\.forward\(format\)"):
        simulate(model, FP4.format)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'got str; use named_recipes\.get\("nvfp4"\)\.recipe'):
        simulate(model, "nvfp4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^recipe must be a Recipe, got NamedRecipe; .{,50} its attribute \.recipe$"):
        simulate(model, named_recipes.get("nvfp4"))  # type: ignore[arg-type]
    for seed in ("a", None, True, 1.0):
        with pytest.raises(TypeError, match="seed must be an int"):
            simulate(model, Recipe(), seed=seed)  # type: ignore[arg-type]
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*64\)"):
            simulate(model, Recipe(), seed=seed)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        simulate(lambda x: x, Recipe())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DataParallel"):
        simulate(nn.DataParallel(model), Recipe())
    model[0].compile(backend="eager")
    with pytest.raises(TypeError, match="0 is compiled"):
        simulate(model, Recipe())
    with pytest.raises(ValueError, match="block format mxfp4_e2m1"):
        Recipe(vector=FP4)
    with pytest.raises(TypeError, match=r"Quantizer\(format\)"):
        Gemm(lhs=FP4.format)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be"):
        simulate(nn.Linear(2, 2), Recipe()).step = -1


def test_the_audit_ends_with_the_first_step() -> None:
    model, x, y = gpt()
    with simulate(model, Recipe.forward(FP6.format)) as sim:
        sim.step = 7
        loss_of(model, x, y).backward()
        first = sim.audit()
        sim.advance()
        loss_of(model, x, y).backward()
    assert first.rows and sim.audit() == first
    assert sim.step == 8


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: torch.linalg.norm(x, 2),
        lambda x: torch.linalg.norm(x, ord="nuc"),
        lambda x: torch.linalg.matrix_norm(x, -2),
        lambda x: torch.linalg.norm(x[None], ord=2, dim=(1, 2)),
        lambda x: x.norm("nuc"),
    ],
)
def test_norms_of_singular_values_are_refused(norm: Callable[[Tensor], Tensor]) -> None:
    with simulate(nn.Linear(2, 2), Recipe(), audit=False) as sim:
        with pytest.raises(NotImplementedError, match="of a matrix's singular values"):
            norm(torch.ones(2, 3))
        with sim.suspended():
            norm(torch.ones(2, 3))


def test_other_norms_are_those_of_torch() -> None:
    x = torch.randn(3, 4)
    with simulate(nn.Linear(2, 2), Recipe()):
        inside = [torch.linalg.norm(x), torch.linalg.norm(x, 2, -1), x.norm(2), torch.linalg.matrix_norm(x), x.norm()]
    outside = [torch.linalg.norm(x), torch.linalg.norm(x, 2, -1), x.norm(2), torch.linalg.matrix_norm(x), x.norm()]
    assert all(map(torch.equal, inside, outside))
