"""Which parameters of a model are LMD's and which are another optimizer's, and the optimizer made of both."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lmd.combined import Combined
from lmd.optimizer import LMD, LR, NOISE_SCALE, WEIGHT_DECAY

# What the other optimizer takes where the caller of for_model says nothing.
OTHERS_DEFAULTS: dict[str, Any] = {"lr": 0.012, "betas": (0.9, 0.99), "weight_decay": 0.3}

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
KERNELS = (nn.modules.conv._ConvNd, nn.Bilinear)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # what an output head may be
FUSED_ADAMW = ("cpu", "cuda")  # devices

VECTOR, NORM = "vector", "normalization layer"  # reasons

# A parameter, a module for all of its parameters, the dotted name of either, or several of these.
Chosen = nn.Module | Tensor | str | Iterable[Any]
Found = dict[int, str]  # the id of a parameter -> why it is in this part


class Place(NamedTuple):
    """Where a parameter goes: `optimizer` is "LMD" or "other", `reason` says why, `shape` is the parameter's."""

    optimizer: str
    reason: str
    shape: tuple[int, ...]


class Division(dict[str, Place]):
    """Every parameter's place by its name; printed, a table. A parameter with several names is here by its first."""

    def __str__(self) -> str:
        rows = [(place.optimizer, name, str(place.shape), place.reason) for name, place in self.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def divide(
    model: nn.Module,
    *,
    head: Chosen | None = "auto",
    lmd_params: Chosen = (),
    other_params: Chosen = (),
) -> Division:
    """Where `for_model` puts every parameter of `model`, and why: `print(lmd.divide(model))`.

    Arguments and errors are for_model's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"this takes the model itself, a torch.nn.Module, not {type(model).__name__}")
    chosen = dict.fromkeys(_resolve(model, lmd_params, "lmd_params"), "named in lmd_params")
    others = dict.fromkeys(_resolve(model, other_params, "other_params"), "named in other_params")
    embeddings = _of(model, EMBEDDINGS, "embedding")
    heads = _heads(model, head, embeddings)
    norms = _of(model, NORMS, NORM)
    kernels = _of(model, KERNELS, "kernel")
    for wanted, name in ((others, "other_params"), ({} if _is_auto(head) else heads, "head")):
        if chosen.keys() & wanted.keys():
            raise ValueError(f"lmd_params and {name} name the same parameter; it can only be in one of them")
    division = Division()
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter) or p.is_meta:
            raise ValueError(f"{name} has no values yet: build the optimizer after the model's parameters exist")
        found = next((part[id(p)] for part in (others, embeddings, heads, norms) if id(p) in part), None)
        if found is None and sum(size != 1 for size in p.shape) < 2:
            found = VECTOR
        if found is None and p.ndim >= 3 and p.shape[0] == 1 and id(p) not in kernels:
            found = "table added to every example"
        place = Place("other", found, tuple(p.shape)) if found else Place("LMD", "matrix or kernel", tuple(p.shape))
        if id(p) in chosen:
            place = Place("LMD", chosen[id(p)], tuple(p.shape))
        if place.optimizer == "LMD" and not p.is_floating_point():
            raise TypeError(f"LMD optimizes real floating-point parameters, but {name} is {p.dtype}")
        division[name] = place
    return division


def for_model(
    model: nn.Module,
    lr: float = LR,
    *,
    weight_decay: float = WEIGHT_DECAY,
    noise_scale: float = NOISE_SCALE,
    others_lr: float | None = None,
    others_weight_decay: float | None = None,
    others: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    head: Chosen | None = "auto",
    lmd_params: Chosen = (),
    other_params: Chosen = (),
    **settings: Any,
) -> Combined:
    """The recommended optimizer for a whole model: LMD for its hidden matrices and kernels, AdamW for the rest.

        optimizer = lmd.for_model(model)
        with optimizer.sampled_params():
            loss = model(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    What goes to AdamW is found by what it is, not by its name; the first line that holds decides, and
    `print(lmd.divide(model))` shows it all:

        1. what `lmd_params` or `other_params` name goes where they say;
        2. embeddings: parameters of nn.Embedding and nn.EmbeddingBag, wherever else they are used (tied heads);
        3. the output head, weight and bias; see `head`;
        4. parameters of torch's normalization layers;
        5. vectors: parameters of whatever shape with at most one dimension above 1 (biases, gains, class tokens);
        6. tables added to every example, such as learned positions (1, N, D): three or more dimensions, the first
           of them 1, and not a parameter of a convolution or nn.Bilinear.

    All others are LMD's: weights of linear and recurrent layers, attention and convolutions, bare matrices (d, d) and
    experts (E, d, d). A bare table of positions (N, D), which no shape tells from a matrix, is LMD's too: name it in
    `other_params`, or make it an nn.Embedding. Frozen parameters are placed as if they were not.

    Arguments:
        lr, weight_decay, noise_scale: LMD's; and so are all further `settings` (kappa, betas, seed, ...): see LMD.
        others_lr: AdamW's learning rate, an absolute step as in any AdamW, 0.012 if None. Its betas are (0.9, 0.99).
        others_weight_decay: AdamW's decay of embeddings, heads and tables, 0.3 if None; vectors and norms have none.
        others: makes another optimizer than this AdamW. It is called with at most two groups, {"params": [...]} of
            embeddings, heads and tables and {"params": [...], "weight_decay": 0.0} of vectors and norms:
            `others=lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)`.
        head: a module, a parameter, the dotted name of either, or several; None or False: the model has no output
            head. "auto" is what model.get_output_embeddings() returns, where there is such a method (transformers); or
            else the module that shares a weight with an embedding; or else the last nn.Linear or convolution that was
            registered in the model. It is none where that one lies within a block of an nn.ModuleList or among
            others of its class in an nn.Sequential, as in a bare encoder, or within nn.MultiheadAttention.
        lmd_params, other_params: exceptions to the rule, each given as `head` is.

    Returns a `Combined`: LMD's parameters are one group, in the order of model.parameters(), the others' groups follow.
    A learning-rate scheduler scales every group's rate.

    Raises ValueError where LMD would have no parameter to train (a model of one layer: its head; use
    LMD(model.parameters()) or head=None), for a name or parameter that the model does not have, for one named twice,
    for parameters without values (meta, lazy) and settings out of range; TypeError for integer or complex parameters
    that would be LMD's, and for a `model` or `others` of a wrong kind.
    """
    given = {"lr": others_lr, "weight_decay": others_weight_decay}
    for_adamw = {name: value for name, value in given.items() if value is not None}
    if others is not None and for_adamw:
        raise ValueError(
            f"{', '.join(f'others_{name}' for name in for_adamw)} is for the AdamW that others=None makes; "
            "set it for yours where you make it"
        )
    if others is not None and not callable(others):
        example = "lambda groups: torch.optim.SGD(groups, lr=0.1)"
        raise TypeError(f"others must be a function of parameter groups, such as {example}, not {others!r}")
    division = divide(model, head=head, lmd_params=lmd_params, other_params=other_params)
    named = dict(model.named_parameters())
    matrices = [named[name] for name, place in division.items() if place.optimizer == "LMD"]
    if not any(p.requires_grad for p in matrices):
        raise ValueError(
            f"no parameter that LMD would train is among the model's {len(named)}: for a model of a single layer use "
            "LMD(model.parameters()) or head=None; lmd.divide(model) tells where each one goes"
        )
    lmd = LMD(matrices, lr=lr, weight_decay=weight_decay, noise_scale=noise_scale, **settings)
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, place in division.items():
        if place.optimizer == "other":
            (vectors if named[name].ndim < 2 or place.reason in (VECTOR, NORM) else tables).append(named[name])
    if not (tables or vectors):
        return Combined(lmd)
    both: list[dict[str, Any]] = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in both if group["params"]]
    if others is None:
        fused = all(p.is_floating_point() and p.device.type in FUSED_ADAMW for p in tables + vectors)
        other: Any = torch.optim.AdamW(groups, **{**OTHERS_DEFAULTS, **for_adamw}, fused=fused or None)
    else:
        other = others(groups)
    if not isinstance(other, Optimizer):
        raise TypeError(f"others must return a torch.optim.Optimizer, not {type(other).__name__}")
    return Combined(lmd, other)


def _of(model: nn.Module, kinds: tuple[type[nn.Module], ...], reason: str) -> Found:
    """The parameters of all modules of these kinds, those of their parametrizations included."""
    return {id(p): reason for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}


def _resolve(model: nn.Module, chosen: Any, argument: str) -> Iterator[int]:
    """The ids of the parameters that an argument names."""
    own = {id(p) for p in model.parameters()}
    if isinstance(chosen, str):
        modules = dict(model.named_modules(remove_duplicate=False))
        named = modules.get(chosen, dict(model.named_parameters(remove_duplicate=False)).get(chosen))
        if named is None:
            raise ValueError(f"{argument}: the model has no module or parameter {chosen!r}")
        chosen = named
    if isinstance(chosen, nn.Module | Tensor):
        ids = [id(p) for p in ([chosen] if isinstance(chosen, Tensor) else chosen.parameters())]
        if not own.issuperset(ids):
            raise ValueError(f"{argument}: this {type(chosen).__name__} is no part of the model")
        yield from ids
    elif isinstance(chosen, Iterable):
        for one in chosen:
            yield from _resolve(model, one, argument)
    else:
        raise TypeError(
            f"{argument} takes modules, parameters or their dotted names, one or several, not {type(chosen).__name__}"
        )


def _is_auto(head: Any) -> bool:
    return isinstance(head, str) and head == "auto"


def _heads(model: nn.Module, head: Any, embeddings: Found) -> Found:
    """The parameters of the output head; in `divide`, what is an embedding's stays the embedding's."""
    if head is None or head is False:
        return {}
    if not _is_auto(head):
        return dict.fromkeys(_resolve(model, head, "head"), "head, as given")
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(output, nn.Module):
            return dict.fromkeys(map(id, output.parameters()), "head, by get_output_embeddings()")
    tied = [m for _, m in _outside(model, EMBEDDINGS) if any(id(p) in embeddings for p in m.parameters(recurse=False))]
    if tied:
        return {id(p): "head, tied with an embedding" for m in tied for p in m.parameters(recurse=False)}
    layers = [(n, m) for n, m in _outside(model, (nn.MultiheadAttention,)) if isinstance(m, LAYERS)]
    if not layers or _in_a_block(model, layers[-1][0]):
        return {}
    return dict.fromkeys(map(id, layers[-1][1].parameters()), "head, the last layer registered")


def _outside(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    """The modules, by name, that are neither of these kinds nor within one."""
    inside = {id(inner) for module in model.modules() if isinstance(module, kinds) for inner in module.modules()}
    return [(name, module) for name, module in model.named_modules() if id(module) not in inside]


def _in_a_block(model: nn.Module, name: str) -> bool:
    """Whether a layer lies deeper within an element of a ModuleList, or within one of several modules of one class in
    a Sequential."""
    parent, keys = model, name.split(".")
    for key in keys[:-1]:
        child = parent.get_submodule(key)
        alike = sum(_class(other) is _class(child) for other in parent.children())
        if isinstance(parent, nn.ModuleList):
            return True
        if isinstance(parent, nn.Sequential) and not isinstance(child, nn.Sequential) and alike > 1:
            return True
        parent = child
    return False


def _class(module: nn.Module) -> type:
    """A module's class; its own where fully_shard has derived another from it."""
    return next(one for one in type(module).__mro__ if not one.__module__.startswith("torch.distributed.fsdp"))
