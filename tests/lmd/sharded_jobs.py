"""What processes that share parameters do for test_sharded.py: python -m tests.lmd.sharded_jobs RANK COUNT FOLDER.

Each job compares with an unsharded optimizer in the same process; its traceback, or nothing, is written to FOLDER.
"""

import copy
import json
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lmd
from lmd import LMD

# Rows that do and do not divide, fewer rows than processes, parts that begin and end within tiles and four words.
SHAPES = [(300, 77), (1, 3), (5,), (2, 4099), (4096,), (1000, 9), (0, 4), (8, 2048)]
BACKENDS = {"fused": {}, "plain": {"fused": False}, "foreach": {"fused": False, "foreach": True}}
RANK, COUNT, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

JOBS: dict[str, Callable[[], None]] = {}


def job(function: Callable[[], None]) -> Callable[[], None]:
    """A job of two processes."""
    if COUNT == 2:
        JOBS[function.__name__] = function
    return function


def job_of_three(function: Callable[[], None]) -> Callable[[], None]:
    """A job of two processes, and of three."""
    JOBS[function.__name__] = function
    return function


@cache
def mesh() -> Any:
    return init_device_mesh("cpu", (COUNT,))


def rows(x: Tensor, q: Any) -> Tensor:
    """This process's rows of a whole tensor that is laid out as q."""
    if not any(isinstance(placement, Shard) for placement in q.placements):
        return x
    parts = x.chunk(COUNT) if len(x) else ()
    return parts[RANK] if len(parts) > RANK else x[:0]


def sharded(x: Tensor, on: Any, placements: Any) -> DTensor:
    """A whole tensor that every process has, sharded without communication."""
    layout = DTensor.from_local(x, on, placements, run_check=False, shape=x.shape, stride=x.stride())
    own = rows(x, layout).clone()
    return DTensor.from_local(own, on, placements, run_check=False, shape=x.shape, stride=x.stride())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensors(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [(0.1 * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def pair(dtype: torch.dtype = torch.float32, placements: Any = None, on: Any = None) -> list[list[nn.Parameter]]:
    """The same parameters, unsharded and sharded."""
    on, placements = on or mesh(), placements or [Shard(0)]
    cut = [nn.Parameter(sharded(x, on, placements)) for x in tensors(0, dtype)]
    return [[nn.Parameter(x) for x in tensors(0, dtype)], cut]


def agree(x: Tensor, y: Tensor, exact: bool) -> bool:
    """Bit for bit, or to the bound that lmd/sharded.py states for one step, where a mean is near 0 in units of 0.1."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    rtol, atol = (0.0, 0.0) if exact else (1e-6, 0.0) if x.ndim == 0 else (1e-5, 1e-7)
    return torch.allclose(x, y, rtol, atol, equal_nan=True)


def check_equal(params: list[list[nn.Parameter]], optimizers: list[Any], what: Any, exact: bool = True) -> None:
    """Weights and state; torch's fused AdamW takes another path for the last elements of a tensor, and is not ours."""
    fused = [p for group in optimizers[0].param_groups if group.get("fused") for p in group["params"]]
    everything = exact
    for i, (p, q) in enumerate(zip(*params, strict=True)):
        exact = everything and all(p is not other for other in fused)
        assert agree(rows(p, q), q._local_tensor, exact), f"{what}: weights of parameter {i}"
        ours, theirs = (optimizer.state[r] for optimizer, r in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            y = theirs[name]
            if isinstance(x, Tensor):
                mine = (rows(x, q), y._local_tensor) if x.ndim else (x, y)
                assert agree(*mine, exact), f"{what}: {name} of parameter {i}"
                assert x.ndim == 0 or (y.device_mesh, y.placements) == (q.device_mesh, q.placements)
            else:
                assert x == y, f"{what}: {name} of parameter {i}"


def follow(params: list[list[nn.Parameter]], optimizers: list[LMD], what: Any, exact: bool = True) -> None:
    """Samples, and steps with given gradients; one parameter has none in the second step."""
    for step in range(3):
        gradients = tensors(100 + step, params[0][0].dtype)
        for draw in range(optimizers[0].mc_samples):
            before = [[p.detach().clone() for p in ps] for ps in params]
            with optimizers[0].sampled_params(), optimizers[1].sampled_params():
                for i, (p, q) in enumerate(zip(*params, strict=True)):
                    assert agree(rows(p, q), q._local_tensor, exact), f"{what}: sample of parameter {i} in step {step}"
                    if (step, i) != (1, 0):
                        gradient = gradients[i] * (1 + draw)
                        p.grad = gradient.clone()
                        q.grad = sharded(gradient, q.device_mesh, q.placements)
            for ps, xs in zip(params, before, strict=True):
                assert all(torch.equal(local(p), local(x)) for p, x in zip(ps, xs, strict=True)), (
                    f"{what}: not restored"
                )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        check_equal(params, optimizers, f"{what} step {step}", exact)


@job_of_three
def given_gradients_fused() -> None:
    given("fused")


@job
def given_gradients_plain() -> None:
    given("plain")


@job
def given_gradients_foreach() -> None:
    given("foreach")


def given(backend: str) -> None:
    cases = [
        *((kind, dtype, {}) for kind in ("shared", "split") for dtype in (torch.float32, torch.bfloat16)),
        ("shared", torch.float64, {}),
        ("shared", torch.float32, {"mc_samples": 2, "noise_scale": 0.3}),
        ("shared", torch.float32, {"saturation": 0.0, "weight_scaling": False}),
    ]
    if backend != "fused":
        cases = [("shared", torch.float64, {}), ("split", torch.float32, {})]
    for kind, dtype, settings in cases:
        params = pair(dtype)
        everything = {"parameterization": kind, "seed": 2**63 + 5, **BACKENDS[backend], **settings}
        exact = backend == "fused" and dtype != torch.float64
        follow(params, [LMD(ps, **everything) for ps in params], (backend, kind, dtype, settings), exact)


@job
def other_layouts() -> None:
    """Replicated over another dimension of the mesh, or over all of it; and one parameter in two is not sharded."""
    two = init_device_mesh("cpu", (1, COUNT))
    for on, placements in ((two, [Replicate(), Shard(0)]), (mesh(), [Replicate()])):
        params = pair(placements=placements, on=on)
        follow(params, [LMD(ps) for ps in params], placements)
    params = pair()
    params[1][::2] = [nn.Parameter(p.detach().clone()) for p in params[0][::2]]
    optimizers = [LMD(ps) for ps in params]
    for p, q, gradient in zip(*params, tensors(7), strict=True):
        p.grad = gradient
        q.grad = distribute_tensor(gradient, q.device_mesh, q.placements) if isinstance(q, DTensor) else gradient
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, whole(q)) for p, q in zip(*params, strict=True))


@job_of_three
def a_gradient_that_is_not_finite_in_one_process() -> None:
    for nonfinite in ("raise", "skip"):
        _, ps = pair()
        optimizer = LMD(ps, nonfinite=nonfinite)
        before = [whole(p).clone() for p in ps]
        for p, gradient in zip(ps, tensors(3), strict=True):
            if gradient.shape == (300, 77):
                gradient[-1, -1] = torch.nan
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
        try:
            optimizer.step()
            assert nonfinite == "skip"
        except FloatingPointError:
            assert nonfinite == "raise"
        assert optimizer.skipped_steps == (nonfinite == "skip")
        assert all(torch.equal(whole(p), x) for p, x in zip(ps, before, strict=True))


@job
def other_shardings_are_refused() -> None:
    on, two = mesh(), init_device_mesh("cpu", (1, COUNT))
    local = torch.ones(2, 6)
    for parameter in (
        distribute_tensor(torch.ones(6, 6), on, [Shard(1)]),
        DTensor.from_local(local, on, [Partial()]),
        distribute_tensor(torch.ones(6, 6), two, [Shard(0), Shard(0)]),
        distribute_tensor(torch.ones(6, 6), two, [Shard(0), Shard(1)]),
    ):
        p = nn.Parameter(parameter)
        for make in (lambda p=p: LMD([p]), lambda p=p: LMD([nn.Parameter(local)]).add_param_group({"params": [p]})):
            try:
                make()
            except ValueError as error:
                assert "dimension 0 is sharded over one dimension of a mesh" in str(error), error
            else:
                raise AssertionError(parameter.placements)
    uneven = DTensor.from_local(
        torch.ones(4 - RANK, 3), on, [Shard(0)], run_check=False, shape=torch.Size((4 * COUNT, 3)), stride=(3, 1)
    )
    try:
        LMD([nn.Parameter(uneven)])
        assert RANK == 0
    except ValueError as error:
        assert RANK > 0 and "in equal parts but the last" in str(error)


class Net(nn.Module):
    """An embedding, blocks of odd sizes and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(19, 10)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(10, 23), nn.GELU(), nn.Linear(23, 10), nn.LayerNorm(10)) for _ in range(2))
        )
        self.head = nn.Linear(10, 19, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x)))


def cut(model: Net, tied: bool = False) -> Net:
    """Blocks by themselves, and the rest, which stays gathered after a forward without a backward."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": adamw,
    "LMD": lambda model: LMD(model.parameters()),
    "for_model": lmd.for_model,
}


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x = torch.randint(0, 19, (20,), generator=torch.Generator().manual_seed(10 * step + rank))
    return nn.functional.cross_entropy(model(x), x.roll(1))


def sampling(optimizer: Any) -> Any:
    return optimizer.sampled_params() if hasattr(optimizer, "sampled_params") else torch.enable_grad()


def train(model: nn.Module, optimizer: Any, steps: range, evaluate: bool = True) -> list[list[Tensor | None]]:
    """The whole gradients of every step."""
    found = []
    for step in steps:
        with torch.no_grad():
            if evaluate:
                loss_of(model, step, 0)  # leaves weights of means gathered
        with sampling(optimizer):
            loss_of(model, step, RANK).backward()
        found.append([None if p.grad is None else whole(p.grad).clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return found


def replay(model: nn.Module, optimizer: Any, steps: range, gradients: list[list[Tensor | None]]) -> None:
    """An unsharded model with given gradients, which are those of its own sample up to the order of sums."""
    for step, given in zip(steps, gradients, strict=True):
        with sampling(optimizer):
            (sum(loss_of(model, step, rank) for rank in range(COUNT)) / COUNT).backward()
        for p, gradient in zip(model.parameters(), given, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


@job_of_three
def training_is_that_of_one_process() -> None:
    """Gradients of each step are those at the sample of that step, and what is made of them is equal bit for bit."""
    for name, make in OPTIMIZERS.items():
        alone, together = Net(), cut(Net())
        optimizers = [make(alone), make(together)]
        gradients = train(together, optimizers[1], range(4))
        replay(alone, optimizers[0], range(4), gradients)
        check_equal([[*alone.parameters()], [*together.parameters()]], optimizers, name)


@job
def samples_and_medians_are_evaluated() -> None:
    """Forwards without a backward, which leave weights gathered, see what is in place, also after a block."""
    alone, together = Net(), cut(Net())
    optimizers = [LMD(model.parameters(), noise_scale=0.3) for model in (alone, together)]

    def check() -> None:
        with torch.no_grad():
            assert torch.equal(loss_of(alone, 0, 0), loss_of(together, 0, 0))

    check()
    for blocks in zip(*(optimizer.posterior_samples(2) for optimizer in optimizers), strict=True):
        with blocks[0], blocks[1]:
            check()
        check()
    with optimizers[0].median_params(), optimizers[1].median_params():
        check()
    check()
    try:
        with optimizers[1].sampled_params():
            loss_of(together, 0, 0)
            raise KeyError
    except KeyError:
        check()


@job
def roles_are_those_before_it_was_sharded() -> None:
    for tied in (False, True):
        before = lmd.divide(Net(tied))
        assert lmd.divide(cut(Net(tied))) == before
        partly = Net(tied)
        fully_shard(partly.blocks[0])  # its class is now another than that of the other block
        assert lmd.divide(partly) == before
    bare = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    blocks = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4), nn.TransformerEncoderLayer(4, 2, 4))
    for model in (bare, blocks):
        before = lmd.divide(model)
        fully_shard(model[1])
        assert lmd.divide(model) == before
        fully_shard(model)
        assert lmd.divide(model) == before


@job
def a_checkpoint_goes_on_in_the_same_bits() -> None:
    """Through files, and whole into unsharded optimizers; Combined as one optimizer and as a list of its parts."""
    import torch.distributed.checkpoint as dcp  # here, since it takes a second
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    for name, make in OPTIMIZERS.items():
        for apart in (False, True)[: 1 + (name == "for_model")]:
            model = cut(Net())
            optimizer = make(model)
            train(model, optimizer, range(2), evaluate=False)

            def parts(of: Any, apart: bool = apart) -> Any:
                return list(of.parts) if apart else of

            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, parts(optimizer)),
            }
            folder = str(FOLDER / f"{name}{apart}")
            dcp.save(state, checkpoint_id=folder)
            options = StateDictOptions(full_state_dict=True)
            full = copy.deepcopy(get_optimizer_state_dict(model, parts(optimizer), options=options))
            full_model = copy.deepcopy(get_model_state_dict(model, options=options))
            gradients = train(model, optimizer, range(2, 4), evaluate=False)

            resumed = Net()
            for p in resumed.parameters():
                p.data.add_(1.0)
            again = make(cut(resumed))
            state = {
                "model": get_model_state_dict(resumed),
                "optimizer": get_optimizer_state_dict(resumed, parts(again)),
            }
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(resumed, state["model"])
            set_optimizer_state_dict(resumed, parts(again), state["optimizer"])
            found = train(resumed, again, range(2, 4), evaluate=False)
            for xs, ys in zip([*found, resumed.parameters()], [*gradients, model.parameters()], strict=True):
                assert all(torch.equal(whole(x), whole(y)) for x, y in zip(xs, ys, strict=True)), (name, apart)

            alone = Net()
            unsharded = make(alone)
            set_model_state_dict(alone, full_model)
            set_optimizer_state_dict(alone, parts(unsharded), full)
            replay(alone, unsharded, range(2, 4), gradients)
            for last, its in ((resumed, again), (model, optimizer)):
                check_equal([[*alone.parameters()], [*last.parameters()]], [unsharded, its], (name, apart))


@job
def an_unsharded_state_is_loaded_into_sharded_parameters() -> None:
    params = pair()
    optimizers = [LMD(ps) for ps in params]
    for p, gradient in zip(params[0], tensors(4), strict=True):
        p.grad = gradient
    optimizers[0].step()
    with torch.no_grad():
        for p, q in zip(*params, strict=True):
            q.copy_(distribute_tensor(p.detach(), q.device_mesh, q.placements))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    follow(params, optimizers, "loaded")


def main() -> None:
    torch.set_num_threads(1)
    store = f"file://{FOLDER}/meet"
    dist.init_process_group("gloo", init_method=store, rank=RANK, world_size=COUNT)
    found = {}
    for name, function in JOBS.items():
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        # a process that is ahead would wait for the others in vain
        failed: list[Any] = [None] * COUNT
        dist.all_gather_object(failed, bool(found[name]))
        if any(failed):
            break
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
